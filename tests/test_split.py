"""The split: exact, stratified, drawn from seed and content alone, and without a group that crosses it."""

import hashlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from catdog.errors import CatdogError
from catdog.split import (
    assign_folds,
    assign_splits,
    complete_given,
    count_table,
    draw_order,
    find_leaks,
    read_exclusions,
    read_given_splits,
    reject_contradictions,
    reject_crossing,
    reject_excluded,
)


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def table(labels, groups=None, salt: str = "") -> pd.DataFrame:
    """A manifest of pictures with all contents different; without groups every picture is its own."""
    count = len(labels)
    return pd.DataFrame(
        {
            "path": [f"{label}/{number}.jpg" for number, label in enumerate(labels)],
            "label": labels,
            "sha256": [digest(f"{salt}{number}") for number in range(count)],
            "perceptual_hash": [digest(f"p{salt}{number}")[:32] for number in range(count)],
            "group": range(count) if groups is None else groups,
        }
    )


def pets(cats: int, dogs: int, **options) -> pd.DataFrame:
    return table(["cat"] * cats + ["dog"] * dogs, **options)


def counts(images: pd.DataFrame, split: pd.Series) -> dict:
    return dict(Counter(zip(split, images["label"], strict=True)))


def by_content(images: pd.DataFrame, split: pd.Series) -> dict:
    return dict(zip(images["sha256"], split, strict=True))


def crossing(images: pd.DataFrame, split: pd.Series) -> list:
    """Groups in more than one split, by plain loops."""
    seen: dict = {}
    for group, part in zip(images["group"], split, strict=True):
        seen.setdefault(group, set()).add(part)
    return [group for group, parts in seen.items() if len(parts) > 1]


def refused(images: pd.DataFrame, **options) -> str:
    with pytest.raises(CatdogError) as caught:
        assign_splits(images, **{"val": 0.15, "test": 0.2, "seed": 1, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fractions_give_exact_counts_in_each_class():
    images = pets(100, 60)
    split = assign_splits(images, val=0.15, test=0.2, seed=1)
    assert counts(images, split) == {
        ("train", "cat"): 65,
        ("train", "dog"): 39,
        ("val", "cat"): 15,
        ("val", "dog"): 9,
        ("test", "cat"): 20,
        ("test", "dog"): 12,
    }


def test_whole_numbers_are_images_in_all():
    images = pets(100, 60)
    split = assign_splits(images, val=8, test=16, seed=1)
    assert split.value_counts().to_dict() == {"train": 136, "test": 16, "val": 8}
    assert counts(images, split)["test", "cat"] == 10
    assert counts(images, split)["val", "dog"] == 3


def test_result_has_the_index_and_name_of_its_input():
    images = pets(10, 10).sample(frac=1, random_state=1)
    split = assign_splits(images, val=4, test=4, seed=1)
    assert split.index.equals(images.index)
    assert split.name == "split"


def test_rounding_leaves_the_totals_exact():
    for cats in range(7, 40, 3):
        images = table(["cat"] * cats + ["dog"] * 11 + ["emu"] * 8)
        split = assign_splits(images, val=0.17, test=0.23, seed=cats)
        total = len(images)
        assert (split == "val").sum() == round(0.17 * total)
        assert (split == "test").sum() == round(0.23 * total)


def test_each_class_has_its_share_to_within_one_image():
    images = table(["cat"] * 83 + ["dog"] * 31 + ["emu"] * 19)
    split = assign_splits(images, val=0.15, test=0.2, seed=3)
    for label, number in images["label"].value_counts().items():
        for name, size in (("val", (split == "val").sum()), ("test", (split == "test").sum())):
            assert abs(counts(images, split)[name, label] - size * number / len(images)) < 1


def test_totals_are_exact_when_classes_are_very_unequal():
    images = table(["cat"] * 100 + ["dog"] * 4 + ["emu"] * 4)
    split = assign_splits(images, val=3, test=3, seed=1)
    assert (split == "test").sum() == 3
    assert (split == "val").sum() == 3
    assert len(counts(images, split)) == 9


def test_same_seed_same_split_other_seed_other_split():
    images = pets(50, 50)
    one, again, other = (by_content(images, assign_splits(images, val=0.2, test=0.2, seed=s)) for s in (1, 1, 2))
    assert one == again
    moved = sum(one[content] != other[content] for content in one)
    assert 30 <= moved <= 80  # of independent draws, 56 of 100 differ


def test_every_image_can_come_into_every_split():
    images = pets(10, 10)
    seen = [set() for _ in range(20)]
    for seed in range(60):
        for place, split in zip(seen, assign_splits(images, val=4, test=4, seed=seed), strict=True):
            place.add(split)
    assert all(place == {"train", "val", "test"} for place in seen)


def test_split_does_not_depend_on_the_order_of_rows():
    images = pets(40, 30, groups=[number // 2 if number < 20 else number for number in range(70)])
    first = by_content(images, assign_splits(images, val=10, test=12, seed=1))
    for state in range(5):
        shuffled = images.sample(frac=1, random_state=state).reset_index(drop=True)
        assert by_content(shuffled, assign_splits(shuffled, val=10, test=12, seed=1)) == first


def test_split_does_not_depend_on_names_of_files_and_groups():
    images = pets(40, 30, groups=[number // 2 if number < 20 else number for number in range(70)])
    renamed = images.assign(path=[digest(path) for path in images["path"]], group=[f"g{-g}" for g in images["group"]])
    assert by_content(renamed, assign_splits(renamed, val=10, test=12, seed=1)) == by_content(
        images, assign_splits(images, val=10, test=12, seed=1)
    )


def random_case(rng: np.random.Generator) -> pd.DataFrame:
    """Two to four classes, up to a third of each in groups of 2 to 5; a few groups span classes, the rest is single."""
    labels = np.repeat(["cat", "dog", "emu", "fox"][: rng.integers(2, 5)], rng.integers(20, 60))
    labels = labels[rng.random(len(labels)) < rng.uniform(0.6, 1)]
    groups = np.arange(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        end = int(len(members) * rng.uniform(0, 1 / 3))
        while end > 1:
            size = min(end, int(rng.integers(2, 6)))
            groups[members[end - size : end]] = members[end - 1]
            end -= size
    single = np.flatnonzero(pd.Series(groups).map(pd.Series(groups).value_counts()) == 1)
    for _ in range(rng.integers(0, 3)):
        groups[rng.choice(single, 2, replace=False)] = rng.choice(single)
    return table(labels.tolist(), groups.tolist(), salt=str(rng.integers(10**9)))


def test_many_random_cases_are_exact_and_leak_nothing():
    grouped = 0
    for seed in range(150):
        images = random_case(np.random.default_rng(seed))
        split = assign_splits(images, val=0.15, test=0.2, seed=seed)
        assert crossing(images, split) == []
        assert (split == "val").sum() == round(0.15 * len(images))
        assert (split == "test").sum() == round(0.2 * len(images))
        assert set(split) == {"train", "val", "test"}
        assert len(counts(images, split)) == 3 * images["label"].nunique()
        assert find_leaks(images.assign(split=split)).empty
        sizes = images["group"].map(images["group"].value_counts())
        grouped += int((sizes > 1).to_numpy()[split != "train"].sum())
    assert grouped > 300  # groups come into val and test too, not only into train


def test_group_across_classes_stays_together():
    groups = [*range(20), 0, 1, *range(22, 40)]
    images = pets(20, 20, groups=groups)
    for seed in range(30):
        split = assign_splits(images, val=6, test=8, seed=seed)
        assert crossing(images, split) == []
        assert counts(images, split)["test", "cat"] == counts(images, split)["test", "dog"] == 4


@pytest.mark.parametrize("size", [2, 4])
def test_pictures_all_in_groups_can_be_split_where_a_way_exists(size):
    images = pets(80, 80, groups=[number // size for number in range(160)])
    for seed in range(10):
        split = assign_splits(images, val=0.1, test=0.2, seed=seed)
        assert split.value_counts().to_dict() == {"train": 112, "test": 32, "val": 16}
        assert crossing(images, split) == []


def test_groups_come_into_each_split_about_as_often_as_single_pictures():
    shares = Counter()
    for seed in range(40):
        images = pets(100, 100, groups=[number // 2 if number % 100 < 20 else number for number in range(200)])
        split = assign_splits(images, val=0.2, test=0.2, seed=seed)
        shares.update(split[images["group"].duplicated(keep=False)])
    total = shares.total()
    assert abs(shares["val"] / total - 0.2) < 0.06
    assert abs(shares["test"] / total - 0.2) < 0.06


def test_too_few_images_of_a_class_are_named():
    told = refused(pets(20, 2), val=2, test=2)
    assert "class 'dog' has 2 usable images" in told
    assert "at least 3" in told


def test_least_number_of_images_is_enough():
    images = pets(3, 3)
    assert len(counts(images, assign_splits(images, val=2, test=2, seed=1))) == 6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"test": 1}, "split.test = 1 gives 1 of 40 images, fewer than the 2 classes"),
        ({"val": 0.01}, "split.val = 0.01 gives 0 of 40 images"),
        ({"test": 40}, "split.test = 40 takes all 40 images"),
        ({"val": 0.999}, "split.val = 0.999 takes all 40 images"),
        ({"val": 0.5, "test": 0.5}, "at least"),
        ({"val": 20, "test": 20}, "at least"),
    ],
)
def test_share_too_small_or_too_large_is_named(options, told):
    assert told in refused(pets(20, 20), **options)


def test_group_larger_than_what_singles_can_fill_is_told():
    assert "near-duplicates" in refused(pets(20, 20, groups=[0] * 19 + [19] + [20] * 19 + [39]), val=4, test=4)


def test_class_with_only_one_group_cannot_be_split():
    assert "near-duplicates" in refused(pets(20, 20, groups=[0] * 20 + list(range(20, 40))), val=4, test=4)


def test_equal_bytes_under_two_labels_are_contradictions():
    images = pets(3, 3)
    images.loc[4, "sha256"] = images.loc[1, "sha256"]
    found = reject_contradictions(images)
    assert found["path"].tolist() == ["cat/1.jpg", "dog/4.jpg"]
    assert set(found["reason"]) == {"same picture under two labels"}
    assert "reason" not in images


def test_equal_looks_under_two_labels_are_contradictions():
    images = pets(3, 3)
    images.loc[[0, 2, 5], "perceptual_hash"] = "ab" * 16
    assert reject_contradictions(images).index.tolist() == [0, 2, 5]


def test_equal_pictures_under_one_label_are_no_contradiction():
    images = pets(3, 3)
    images.loc[[0, 2], ["sha256", "perceptual_hash"]] = images.loc[0, ["sha256", "perceptual_hash"]].tolist()
    assert reject_contradictions(images).empty


def test_planted_leaks_are_found():
    images = pets(30, 30, groups=[number // 2 for number in range(60)])
    split = pd.Series(["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    assert find_leaks(images.assign(split=split)).empty
    moved = split.copy()
    moved[7] = "test"
    assert find_leaks(images.assign(split=moved)).index.tolist() == [6, 7]


def test_equal_bytes_in_two_splits_leak_whatever_their_groups():
    images = pets(3, 3).assign(split=["train", "val", "test", "train", "val", "test"])
    assert find_leaks(images).empty
    images.loc[5, "sha256"] = images.loc[0, "sha256"]
    assert find_leaks(images).index.tolist() == [0, 5]


def test_drawn_order_is_a_shuffle_by_seed_and_content_only():
    images = pets(50, 50)
    one, other = (images["sha256"][draw_order(images, seed).sort_values().index].tolist() for seed in (1, 2))
    assert sorted(one) == sorted(images["sha256"])
    assert one != other
    renamed = images.assign(path=[digest(path) for path in images["path"]]).sample(frac=1, random_state=1)
    assert renamed["sha256"][draw_order(renamed, 1).sort_values().index].tolist() == one
    labels = images["label"][draw_order(images, 1).sort_values().index].tolist()
    assert 15 <= labels[:50].count("cat") <= 35


def test_drawn_order_tells_equal_pictures_apart():
    images = pets(3, 3).assign(sha256="same")
    assert draw_order(images, 1).is_unique


def test_table_of_counts():
    images = pets(3, 2).assign(split=["train", "test", "train", "train", "test"])
    found = count_table(images)
    assert found == {
        "train": {"cat": 2, "dog": 1},
        "val": {"cat": 0, "dog": 0},
        "test": {"cat": 1, "dog": 1},
    }
    assert list(found) == ["train", "val", "test"]


def test_fixed_number_of_training_images_leaves_the_rest_unused():
    images = pets(60, 40)
    split = assign_splits(images, train=30, val=20, test=10, seed=1)
    assert counts(images, split) == {
        ("train", "cat"): 18,
        ("train", "dog"): 12,
        ("val", "cat"): 12,
        ("val", "dog"): 8,
        ("test", "cat"): 6,
        ("test", "dog"): 4,
        ("unused", "cat"): 24,
        ("unused", "dog"): 16,
    }
    assert count_table(images.assign(split=split))["unused"] == {"cat": 24, "dog": 16}


def test_groups_do_not_cross_where_the_training_split_is_limited():
    for seed in range(20):
        images = pets(60, 60, groups=[number // 2 if number < 30 else number for number in range(120)])
        split = assign_splits(images, train=30, val=20, test=20, seed=seed)
        assert crossing(images, split) == []
        assert Counter(split)["train"] == 30


def test_more_than_there_is_is_refused_with_every_share():
    told = refused(pets(10, 10), train=10, val=6, test=6)
    assert "split.test = 6 and split.val = 6 and split.train = 10" in told
    assert assign_splits(pets(10, 10), train=8, val=6, test=6, seed=1).value_counts().to_dict() == {
        "train": 8,
        "val": 6,
        "test": 6,
    }


@pytest.mark.parametrize("count", range(50, 80))
def test_fractions_that_come_to_one_leave_nothing_over(count):
    images = pets(count, 2 * count, groups=[number // 2 if number < 8 else number for number in range(3 * count)])
    shares = {"val": 0.15, "seed": 1}
    assert assign_splits(images, train=0.65, test=0.2, **shares).equals(assign_splits(images, test=0.2, **shares))
    folds = {"folds": 5, "fold": count % 5} | shares
    assert assign_folds(images, train=0.65, **folds).equals(assign_folds(images, **folds))
    assert "unused" in set(assign_splits(images, train=0.6, test=0.2, **shares))


@pytest.mark.parametrize(("cats", "dogs", "folds"), [(50, 30, 5), (17, 23, 4), (10, 10, 10)])
def test_folds_test_every_image_once_and_are_even_in_every_class(cats, dogs, folds):
    images = pets(cats, dogs)
    splits = [assign_folds(images, folds=folds, fold=fold, val=0.1, seed=3) for fold in range(folds)]
    tested = sum((split == "test").astype(int) for split in splits)
    assert (tested == 1).all()
    for split in splits:
        found = counts(images, split)
        assert cats // folds <= found["test", "cat"] <= -(-cats // folds)
        assert dogs // folds <= found["test", "dog"] <= -(-dogs // folds)
        assert sum(n for (name, _), n in found.items() if name == "val") == round(0.1 * (cats + dogs))


def test_folds_keep_groups_together_and_do_not_depend_on_the_order_of_rows():
    images = pets(60, 60, groups=[number // 3 if number < 60 else number for number in range(120)])
    split = assign_folds(images, folds=4, fold=1, val=12, seed=9)
    assert crossing(images, split) == []
    shuffled = images.sample(frac=1, random_state=2)
    again = assign_folds(shuffled, folds=4, fold=1, val=12, seed=9)
    assert by_content(shuffled, again) == by_content(images, split)
    assert by_content(images, assign_folds(images, folds=4, fold=1, val=12, seed=10)) != by_content(images, split)


@pytest.mark.parametrize("train", [30, 0.25])
def test_folds_with_a_limited_training_split_test_the_same_images_and_leave_the_rest_unused(train):
    images = pets(60, 60, groups=[number // 2 if number < 40 else number for number in range(120)])
    split = assign_folds(images, folds=4, fold=1, val=12, train=train, seed=9)
    assert Counter(split) == {"train": 30, "val": 12, "test": 30, "unused": 48}
    assert crossing(images, split) == []
    whole = assign_folds(images, folds=4, fold=1, val=12, seed=9)
    assert (split == "test").equals(whole == "test")


def test_more_folds_than_images_of_a_class_are_refused():
    with pytest.raises(CatdogError, match="class 'dog' has 4 usable images, fewer than split"):
        assign_folds(pets(20, 4), folds=5, fold=0, val=2, seed=1)


def given(labels: str, splits: str, groups=None) -> pd.DataFrame:
    return table(list(labels), groups).assign(split=splits.split())


def test_given_splits_stay_as_they_are():
    images = given("abababab", "train train val val test test unused train")
    assert complete_given(images, val=0.5, test=0.5, seed=1).tolist() == images["split"].tolist()


def test_missing_split_is_drawn_from_the_given_training_images():
    images = given("ab" * 50, " ".join(["train"] * 80 + ["test"] * 20))
    split = complete_given(images, val=0.25, test=0.5, seed=1)
    assert (split[80:] == "test").all()
    assert Counter(split[:80]) == {"train": 60, "val": 20}
    only_training_and_validation = images.assign(split=images["split"].replace("test", "val"))
    split = complete_given(only_training_and_validation, val=0.25, test=0.5, seed=1)
    assert Counter(split[:80]) == {"train": 40, "test": 40} and (split[80:] == "val").all()


@pytest.mark.parametrize("train", [20, 0.25])
def test_limited_training_split_of_a_given_split_leaves_the_rest_unused(train):
    groups = [number // 2 if number < 30 else number for number in range(100)]
    images = given("ab" * 50, " ".join(["train"] * 80 + ["test"] * 10 + ["val"] * 8 + ["unused"] * 2), groups)
    split = complete_given(images, val=0.25, test=0.5, train=train, seed=1)
    assert split[80:].equals(images["split"][80:])
    assert counts(images[:80], split[:80]) == {
        ("train", "a"): 10,
        ("train", "b"): 10,
        ("unused", "a"): 30,
        ("unused", "b"): 30,
    }
    assert crossing(images[:80], split[:80]) == []
    assert not split.equals(complete_given(images, val=0.25, test=0.5, train=train, seed=2))
    without_val = images.assign(split=images["split"].replace("val", "test"))
    split = complete_given(without_val, val=0.25, test=0.5, train=train, seed=1)
    assert Counter(split[:80]) == {"train": 20, "val": 20, "unused": 40}


def test_more_training_images_than_a_given_split_has_are_refused():
    images = given("ab" * 10, " ".join(["train"] * 12 + ["test"] * 4 + ["val"] * 4))
    assert complete_given(images, val=4, test=4, train=12, seed=1).equals(images["split"])
    with pytest.raises(CatdogError, match=r"split\.train = 13 takes all 12 images; lower it"):
        complete_given(images, val=4, test=4, train=13, seed=1)


def test_class_without_given_training_images_is_told():
    with pytest.raises(CatdogError, match="class 'b' has no training images"):
        complete_given(given("aabb", "train val test val"), val=0.2, test=0.2, seed=1)


def test_given_split_loses_what_would_leak_and_test_loses_nothing():
    images = given("a" * 9, "train test train val val train train unused test", [0, 0, 2, 2, 4, 5, 5, 7, 7])
    lost = reject_crossing(images)
    assert lost["path"].tolist() == ["a/0.jpg", "a/2.jpg"]
    assert lost["reason"].tolist() == [
        "near-duplicate of an image in the given test split",
        "near-duplicate of an image in the given val split",
    ]
    assert find_leaks(images.drop(lost.index)).empty


def test_audit_compares_looks_without_trusting_the_groups():
    images = pets(3, 3).assign(split=["train", "val", "test", "train", "val", "test"])
    assert find_leaks(images, 4).empty
    looks = int(images.loc[0, "perceptual_hash"], 16)
    images.loc[5, "perceptual_hash"] = f"{looks ^ 0b1111:032x}"
    assert find_leaks(images, 4).index.tolist() == [0, 5]
    assert find_leaks(images, 3).empty and find_leaks(images).empty
    images.loc[5, "split"] = "unused"
    assert find_leaks(images, 4).empty


def test_exclusions_by_content_and_by_path(tmp_path):
    images = pets(3, 2)
    path = tmp_path / "exclude.csv"
    # The content decides where it is known: the file may have been renamed.
    rows = [f"old/name.jpg,{images['sha256'][1].upper()},wrong label", "dog/4.jpg,,", f"cat/0.jpg,{'0' * 64},x"]
    path.write_text("\n".join(["path,sha256,reason", *rows]))
    lost = reject_excluded(images, read_exclusions(path, "exclude.csv"))
    assert lost["path"].tolist() == ["cat/1.jpg", "dog/4.jpg"]
    assert lost["reason"].tolist() == ["excluded: wrong label", "excluded"]
    path.write_text("path\ncat/2.jpg\n")
    assert reject_excluded(images, read_exclusions(path, "x"))["path"].tolist() == ["cat/2.jpg"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file"),
        ("", "is no CSV table"),
        ("file,label\na,b\n", "neither a column path nor sha256"),
        ("path\na.jpg,blurred\n", "more fields in its rows than names in its header, 'a.jpg' for one"),
        ("path,reason\na.jpg,blurred, dark\nb.jpg,dark\n", "more fields in its rows than names in its header"),
        ("path,Path\na.jpg,b.jpg\n", "two columns path, whatever their case"),
    ],
)
def test_exclusions_that_cannot_be_used_are_told(tmp_path, content, told):
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CatdogError, match=told):
        read_exclusions(path, "x.csv")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("path\na\n", "has no column split"),
        ("path,split\na,train\nb,exam\n", "has the split 'exam' for 'b'"),
        ("path,split\na,train\na,val\n", "names 'a' twice"),
        ("path,split,label\na,train,x\nb,val,\n", "has no label for 'b'"),
        ("path,split\na,train,\n", "more fields in its rows than names in its header, 'a' for one"),
        ("path,split,Split\na,train,val\n", "two columns split, whatever their case"),
        (b"path,split\n\xff\xfe,train\n", "no CSV table in UTF-8"),
    ],
)
def test_given_splits_that_cannot_be_used_are_told(tmp_path, content, told):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CatdogError, match=told) as caught:
        read_given_splits(path, "x.csv")
    assert "\n" not in str(caught.value)


def test_spaces_beside_the_commas_of_a_list_mean_nothing(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('path, split, label\na b.jpg, train, cat\n c.jpg ,val ,cat\nd.jpg, test, "dog, wild"\n')
    assert read_given_splits(path, "x.csv").values.tolist() == [
        ["a b.jpg", "train", "cat"],
        ["c.jpg", "val", "cat"],
        ["d.jpg", "test", "dog, wild"],
    ]
    path.write_text("path,split,label\na.jpg,train, \n")
    with pytest.raises(CatdogError, match=r"has no label for 'a\.jpg'"):
        read_given_splits(path, "x.csv")
    path.write_text("sha256, path, reason\n, a.jpg, blurred\n")
    assert read_exclusions(path, "x.csv").values.tolist() == [["a.jpg", "", "blurred"]]


def test_given_splits_are_read_as_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("\ufeffpath,split,label\n1,train,007\nNA,validation,NA\n")
    assert read_given_splits(path, "x.csv").values.tolist() == [["1", "train", "007"], ["NA", "val", "NA"]]
