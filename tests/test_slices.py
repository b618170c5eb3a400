"""Slices of the test split: every image in exactly one of each property, and weak ones found, against exact tests."""

import math
import time

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions
from catdog.slices import COLUMNS, PROPERTIES, find_weak, sharpness, slice_table, wilson_interval


def predictions(paths, wrong=(), labels=None, class_names=("cat", "dog")) -> LabelledPredictions:
    """Says the right class with certainty, but for the images at the positions `wrong` the one after it."""
    labels = np.arange(len(paths)) % len(class_names) if labels is None else np.asarray(labels)
    said = labels.copy()
    said[list(wrong)] = (said[list(wrong)] + 1) % len(class_names)
    probabilities = np.eye(len(class_names), dtype=np.float32)[said]
    return LabelledPredictions(tuple(paths), labels, probabilities, tuple(class_names), 0.5)


def manifest(paths, **columns) -> pd.DataFrame:
    defaults = {"width": 400, "height": 300, "brightness": 100.0, "format": "JPEG"}
    return pd.DataFrame({"path": list(paths)} | defaults | columns)


def slices(paths, wrong=(), labels=None, sharp=None, class_names=("cat", "dog"), **columns) -> pd.DataFrame:
    sharp = np.full(len(paths), 500, np.float32) if sharp is None else np.asarray(sharp, np.float32)
    return slice_table(predictions(paths, wrong, labels, class_names), manifest(paths, **columns), sharp)


def of(table, name):
    """The slices of one property: images by name, in order."""
    rows = table[table["property"] == name]
    return dict(zip(rows["slice"], rows["images"], strict=True))


def names(count):
    return [f"pets/{number:04d}.jpg" for number in range(count)]


def test_wilson_interval_of_known_cases():
    # E. Wilson's formula worked out by hand with z = 1.959964.
    assert wilson_interval(0, 10) == pytest.approx((0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1), abs=1e-6)
    z2 = 1.9599639845**2
    for right, images in ((1, 3), (45, 50), (977, 1000)):
        center = (right + z2 / 2) / (images + z2)
        half = math.sqrt(z2) / (images + z2) * math.sqrt(right * (images - right) / images + z2 / 4)
        assert wilson_interval(right, images) == pytest.approx((center - half, center + half), abs=1e-9)


def test_numbers_are_cut_at_quartiles_with_ranges_that_meet():
    table = slices(names(100), width=[1000] * 100, height=list(range(200, 300)))
    assert of(table, "shorter side") == {
        "below 225 px": 25,
        "225 to 249 px": 25,
        "250 to 274 px": 25,
        "275 px and more": 25,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([200] * 8, {"200 px": 8}),
        ([100, 200], {"below 200 px": 1, "200 px and more": 1}),
        ([100] * 8 + [200] * 2, {"below 200 px": 8, "200 px and more": 2}),
        ([100] * 6 + [200] * 4, {"below 200 px": 6, "200 px and more": 4}),
        ([100] + [200] * 9, {"below 200 px": 1, "200 px and more": 9}),
        ([1, 2, 3, 4], {"below 2 px": 1, "2 px": 1, "3 px": 1, "4 px and more": 1}),
        ([900, 1000, 1500, 2000], {"below 1,000 px": 1, "1,000 to 1,499 px": 1, "1,500 to 1,999 px": 1}),
    ],
    ids=["all equal", "two", "many small", "more small", "one small", "consecutive", "thousands"],
)
def test_repeated_numbers_stay_together(values, expected):
    found = of(slices(names(len(values)), width=values, height=values), "shorter side")
    assert expected.items() <= found.items()
    assert sum(found.values()) == len(values)


def test_shorter_side_is_whichever_is_shorter():
    assert of(slices(names(2), width=[640, 300], height=[300, 480]), "shorter side") == {"300 px": 2}


def test_aspects_meet_at_four_to_five():
    table = slices(names(6), width=[79, 80, 100, 125, 126, 400], height=[100, 100, 100, 100, 100, 300])
    assert of(table, "aspect") == {
        "portrait (below 0.80)": 1,
        "nearly square (0.80 to 1.25)": 3,
        "landscape (above 1.25)": 2,
    }


def test_missing_numbers_are_a_slice_of_their_own():
    table = slices(
        names(6),
        width=["400", "", "400", "400", "", "400"],  # a column with empty fields is text
        height=[300, 300, 300, 300, 300, 300],
        brightness=[10.0, math.nan, 20.0, 30.0, 40.0, 50.0],
        sharp=[math.nan, math.inf, 1, 1, 1, 1],
        format=["JPEG", "", "PNG", None, "JPEG", "JPEG"],
    )
    assert of(table, "shorter side") == {"300 px": 4, "unknown": 2}
    assert of(table, "aspect") == {"landscape (above 1.25)": 4, "unknown": 2}
    assert of(table, "brightness")["unknown"] == 1
    assert of(table, "sharpness") == {"1": 4, "unknown": 2}
    assert of(table, "file format") == {"JPEG": 3, "unknown": 2, "PNG": 1}


def test_nothing_known_of_any_image_is_one_slice():
    table = slices(names(3), sharp=[math.nan] * 3)
    assert of(table, "sharpness") == {"unknown": 3}


@pytest.mark.parametrize("classes", [2, 37])
def test_each_property_divides_the_images(classes):
    random = np.random.default_rng(classes)
    count = 300
    labels = np.arange(count) % classes
    class_names = [f"c{number}" for number in range(classes)]
    paths = [f"site{random.integers(30)}/c{label}/{number}.jpg" for number, label in enumerate(labels)]
    wrong = np.flatnonzero(random.random(count) < 0.2)
    table = slices(
        paths,
        wrong,
        labels,
        random.exponential(300, count),
        class_names,
        width=random.integers(20, 900, count),
        height=random.integers(20, 900, count),
        brightness=random.uniform(0, 255, count).round(1),
        format=random.choice(["JPEG", "PNG", "GIF"], count),
    )
    assert list(table.columns) == list(COLUMNS)
    assert list(dict.fromkeys(table["property"])) == list(PROPERTIES)
    assert table.groupby("property")["images"].sum().eq(count).all()
    assert table.groupby("property")["errors"].sum().eq(len(wrong)).all()
    assert not table.duplicated(["property", "slice"]).any()
    assert not table.isna().any(axis=None)
    assert (table["images"] > 0).all()
    assert table["accuracy"].tolist() == pytest.approx((1 - table["errors"] / table["images"]).tolist(), abs=1e-6)
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    quartiles = table[table["property"] == "sharpness"]
    assert len(quartiles) == 4
    assert quartiles["images"].between(70, 80).all()


def test_errors_are_counted_where_they_are():
    table = slices(names(8), wrong=[0, 1, 6], brightness=[10, 11, 60, 61, 120, 121, 200, 201])
    rows = table[table["property"] == "brightness"]
    assert rows["errors"].tolist() == [2, 0, 0, 1]
    assert rows["accuracy"].tolist() == [0, 1, 1, 0.5]


def test_manifest_may_be_in_any_order_and_hold_other_images():
    paths = names(8)
    sizes = [100, 100, 200, 200, 300, 300, 400, 400]
    listed = manifest([*paths, "pets/other.jpg"], width=[*sizes, 5], height=[*sizes, 5])
    sharp = np.arange(8, dtype=np.float32)
    one = slice_table(predictions(paths, [3]), listed, sharp)
    pd.testing.assert_frame_equal(one, slice_table(predictions(paths, [3]), listed[::-1], sharp))
    rows = one[one["property"] == "shorter side"]
    assert rows["slice"].tolist() == ["below 200 px", "200 to 299 px", "300 to 399 px", "400 px and more"]
    assert rows["errors"].tolist() == [0, 1, 0, 0]


def test_image_that_the_manifest_does_not_list_is_named():
    with pytest.raises(CatdogError, match=r"manifest\.csv does not list 'pets/0001\.jpg'.*`dvc repro`") as caught:
        slice_table(predictions(names(2)), manifest(names(1)), np.zeros(2, np.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "paths",
    [
        ["PetImages/cat/0.jpg", "PetImages/dog/0.jpg", "PetImages/cat/1.jpg", "PetImages/dog/1.jpg"],
        ["train/cat.0.jpg", "train/dog.0.jpg", "train/cat.1.jpg", "train/dog.1.jpg"],
        ["pictures of cats/0.jpg", "pictures of dogs/0.jpg", "pictures of cats/1.jpg", "pictures of dogs/1.jpg"],
        ["0.jpg", "1.jpg", "2.jpg", "3.jpg"],
    ],
    ids=["classes", "one", "classes of other names", "none"],
)
def test_folders_that_say_no_more_than_the_classes_are_left_out(paths):
    assert of(slices(paths), "folder") == {}


def test_folders_beside_the_classes_are_sources():
    paths = ["a/cat/0.jpg", "a/dog/0.jpg", "b/x/cat/0.jpg", "b/x/dog/0.jpg", "cat/1.jpg", "a/dog/1.jpg", "2.jpg"]
    assert of(slices(paths), "folder") == {"a/*": 3, "(top)": 1, "*": 1, "b/x/*": 2} and list(
        of(slices(paths), "folder")
    ) == ["a/*", "b/x/*", "(top)", "*"]


@pytest.mark.parametrize(
    ("folders", "last"), [(20, "s19"), (21, "1 other folder"), (50, "30 other folders")], ids=["20", "21", "50"]
)
def test_many_folders_show_the_largest(folders, last):
    # Folder s00 has the most images, and every folder both classes.
    paths = [f"s{number:02d}/{image}.jpg" for number in range(folders) for image in range(2 * (folders - number))]
    found = of(slices(paths), "folder")
    assert list(found)[:19] == [f"s{number:02d}" for number in range(19)]
    assert list(found)[-1] == last
    assert len(found) == min(folders, 21)
    assert sum(found.values()) == len(paths)


def test_planted_weak_spot_is_found_and_nothing_else():
    count = 400
    bright = np.linspace(20, 230, count).round(1)
    wrong = [*range(0, 60), 150, 250, 350]  # of the hundred darkest, and three others
    table = slices(names(count), wrong, brightness=bright)
    weak = table[table["weak"]]
    assert weak["property"].tolist() == ["brightness"]
    assert weak["slice"].str.startswith("below").all()


def test_chance_alone_seldom_makes_a_weak_spot():
    random = np.random.default_rng(5)
    found = 0
    for _ in range(300):
        wrong = random.random(400) < 0.1
        numbers = np.arange(400) // 40
        errors = np.bincount(numbers[wrong], minlength=10)
        found += find_weak(np.full(10, 40), errors, 400, int(wrong.sum())).any()
    assert 1 <= found <= 15 + 12  # 5 of 100 at most, and three standard deviations


def test_weak_means_fishers_test_with_holms_correction():
    images, errors = np.array([30, 40, 50, 60, 12, 200]), np.array([9, 6, 8, 2, 5, 30])
    total, wrong = 200, 30
    chance = [
        fisher_exact([[e, n - e], [wrong - e, total - n - (wrong - e)]], alternative="greater").pvalue
        for n, e in zip(images[:5], errors[:5], strict=True)
    ]
    # Holm: the smallest is multiplied by 5, the next by 4, and so on, until one is not below 0.05.
    expected, open_ = set(), True
    for place, position in enumerate(np.argsort(chance)):
        open_ = open_ and chance[position] * (5 - place) < 0.05
        expected |= {int(position)} if open_ else set()
    found = find_weak(images, errors, total, wrong)
    assert set(np.flatnonzero(found)) == expected
    # 9 of 30 would be called weak by itself, and is not among five.
    assert chance[0] < 0.05
    assert not found[0]


def test_holm_asks_less_of_the_second_and_nothing_of_what_follows_a_failure():
    # Of 400 images 42 are wrong. In a slice of 40, chance gives 8 or more with 0.044, 9 with 0.015, and 11 with 0.001.
    def weak(*errors):
        return find_weak(np.full(len(errors), 40), np.array(errors), 400, 42).tolist()

    assert weak(8, 11) == [True, True]  # 0.001 < 0.05 / 2, and then 0.044 < 0.05 / 1
    assert weak(8, 0) == [False, False]  # 0.044 > 0.05 / 2
    assert weak(9, 9, 11, 0) == [True, True, True, False]  # 0.015 < 0.05 / 3 and < 0.05 / 2
    assert weak(9, 9, 11, 0, 0) == [
        False,
        False,
        True,
        False,
        False,
    ]  # 0.015 > 0.05 / 4; that it is < 0.05 / 3 is too late


def test_few_images_are_never_weak():
    assert find_weak(np.array([9, 191]), np.array([9, 0]), 200, 9).tolist() == [False, False]
    assert find_weak(np.array([10, 190]), np.array([10, 0]), 200, 10).tolist() == [True, False]


@pytest.mark.parametrize("wrong", [[], range(40)], ids=["none", "all"])
def test_perfect_and_hopeless_models_have_no_weak_spot(wrong):
    table = slices(names(40), wrong, brightness=np.arange(40))
    assert not table["weak"].any()
    assert table["weak"].dtype == bool


def test_table_does_not_depend_on_the_order_of_images():
    random = np.random.default_rng(1)
    paths, bright = names(60), random.uniform(0, 255, 60)
    sharp, labels = random.uniform(0, 900, 60).astype(np.float32), random.integers(0, 2, 60)
    wrong = np.arange(60) < 9
    order = random.permutation(60)
    one = slices(paths, np.flatnonzero(wrong), labels, sharp, brightness=bright)
    other = slices(
        [paths[n] for n in order], np.flatnonzero(wrong[order]), labels[order], sharp[order], brightness=bright[order]
    )
    pd.testing.assert_frame_equal(one, other)


def test_sharpness_is_the_variance_of_the_laplacian():
    picture = np.zeros((5, 5, 3), np.uint8)
    picture[2, 2] = 100
    # -400 at the point, 100 at its four neighbours, else 0: their mean is 0, the mean square (16 + 4) * 10^4 / 25.
    found = sharpness(picture[None])
    assert found.dtype == np.float32
    assert found.tolist() == [8000]
    assert sharpness(np.full((2, 8, 8, 3), 77, np.uint8)).tolist() == [0, 0]


def test_sharpness_sees_brightness_as_the_eye_does():
    stripes = np.zeros((3, 16, 16, 3), np.uint8)
    for channel in range(3):
        stripes[channel, :, ::2, channel] = 200
    red, green, blue = sharpness(stripes)
    assert green > red > blue > 0


def photograph(size=224):
    """Shapes and texture of every scale, drawn."""
    random = np.random.default_rng(3)
    return sum(
        cv2.resize(random.integers(0, 64, (side, side, 3), np.uint8), (size, size), interpolation=cv2.INTER_LINEAR)
        for side in (4, 16, 64, size)
    ).astype(np.uint8)


def test_blur_lowers_sharpness_step_by_step():
    picture = photograph()
    blurred = np.stack([picture, *(cv2.GaussianBlur(picture, (0, 0), sigma) for sigma in (0.5, 1, 2, 4))])
    found = sharpness(blurred)
    assert (np.diff(found) < 0).all()
    assert sharpness(blurred[::-1]).tolist() == found[::-1].tolist()


def test_sharpness_is_cheap():
    batch = np.stack([photograph()] * 8)
    best = min(_seconds(lambda: sharpness(batch)) for _ in range(20))
    assert best / 8 < 0.0005  # 0.05 ms on one core; ten times as much on a machine that is busy


def _seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
