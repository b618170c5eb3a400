"""Which test pictures the galleries show, and which tables and pictures an evaluation has."""

import weakref

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog import evaluation_pictures
from catdog.corruptions import CORRUPTIONS
from catdog.evaluation import LabelledPredictions
from catdog.evaluation_pictures import Gallery, choose_galleries, collect_galleries, draw_gallery, draw_tables
from catdog.evaluation_tables import evaluation_tables, robustness_table
from catdog.images import decode, encode_jpeg
from catdog.model import ModelInfo

SIZE = 32
INFO = ModelInfo(("cat", "dog"), SIZE, "stretch", 95, "tiny", "random", "avg", threshold=0.6)


def predictions_of(second, labels, *, threshold=0.6, paths=None):
    second = np.array(second, np.float32)
    names = tuple(paths or [f"{number}.jpg" for number in range(len(second))])
    probabilities = np.stack([1 - second, second], axis=1)
    return LabelledPredictions(names, np.array(labels), probabilities, ("cat", "dog"), threshold)


# Called dog from 0.6 on: 1 is a wrong cat, 3 a wrong dog.
JUDGED = predictions_of([0.1, 0.9, 0.7, 0.55, 0.02, 0.95], [0, 0, 1, 1, 0, 1])


def test_mistakes_and_best_are_by_confidence_and_the_uncertain_by_the_threshold():
    chosen = choose_galleries(JUDGED, 3)
    assert chosen["mistakes"].tolist() == [1, 3]  # 90 % dog, 45 % cat
    assert chosen["best"].tolist() == [4, 5, 0]
    assert chosen["uncertain"].tolist() == [3, 2, 1]  # 0.05, 0.1 and 0.3 from the threshold, not from 0.5


def test_equal_pictures_are_in_the_order_of_their_paths():
    same = predictions_of([0.1] * 4, [0] * 4, paths=["d", "b", "c", "a"])
    for name, positions in choose_galleries(same, 3).items():
        assert positions.tolist() == ([] if name == "mistakes" else [3, 1, 2])


def test_of_more_classes_the_uncertain_have_two_that_are_alike():
    probabilities = np.array([[0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]], np.float32)
    judged = LabelledPredictions(("a", "b", "c"), np.zeros(3, np.int64), probabilities, ("x", "y", "z"), 0.5)
    assert choose_galleries(judged, 3)["uncertain"].tolist() == [0, 1, 2]


def flat_pictures(count):
    return {f"{number}.jpg": np.full((20, 40, 3), 40 * number, np.uint8) for number in range(count)}


@pytest.mark.parametrize("explained", [False, True])
def test_galleries_show_pictures_and_what_is_explained_is_the_predicted_class(tmp_path, explained):
    asked = []

    def explain(pixels, classes):
        assert pixels.shape[1:] == (SIZE, SIZE, 3)
        asked.append(classes.tolist())
        return np.zeros(pixels.shape[:3], np.float32)

    files = {name: encode_jpeg(picture, 95) for name, picture in flat_pictures(6).items()}
    chosen = choose_galleries(JUDGED, 3)
    galleries = list(collect_galleries(JUDGED, chosen, files.__getitem__, INFO, explain if explained else None))
    written = {name: path for one in galleries for name, path in draw_gallery(one, tmp_path).items()}
    assert written == {name: tmp_path / f"{name}.png" for name in ("mistakes", "uncertain", "best")}
    assert [one.overlays is not None for one in galleries] == [explained] * 3
    assert asked == ([[1, 0], [0, 1, 1], [0, 1, 0]] if explained else [])
    for path in written.values():
        with Image.open(path) as picture:
            picture.load()


def test_without_mistakes_the_gallery_says_so_and_nothing_is_explained(tmp_path):
    right = predictions_of([0.1, 0.9], [0, 1])
    files = {name: encode_jpeg(picture, 95) for name, picture in flat_pictures(2).items()}

    def explain(pixels, classes):
        assert len(pixels)
        return np.zeros(pixels.shape[:3], np.float32)

    mistakes, *_ = collect_galleries(right, choose_galleries(right, 3), files.__getitem__, INFO, explain)
    draw_gallery(mistakes, tmp_path)
    assert (tmp_path / "mistakes.png").stat().st_size > 1000


def test_large_pictures_are_not_in_memory_at_once(tmp_path, monkeypatch):
    decoded, most = [], 0

    def decode_and_count(data):
        nonlocal most
        decoded.append(weakref.ref(picture := decode(data)))
        most = max(most, sum(one() is not None for one in decoded))
        return picture

    monkeypatch.setattr(evaluation_pictures, "decode", decode_and_count)
    files = [encode_jpeg(picture, 95) for picture in flat_pictures(6).values()]
    draw_gallery(Gallery("best", "The best", files, ["one"] * 6, None), tmp_path)
    assert len(decoded) == 6
    assert most <= 3  # loops and zip let go of one when they have the next


def manifest_of(paths):
    return pd.DataFrame(
        {"path": paths, "label": "x", "width": 40, "height": 20, "brightness": 90.0, "format": "JPEG",
         "group": np.arange(len(paths)) // 2}
    )  # fmt: skip


def test_tables_are_drawn_and_what_was_not_measured_is_not(tmp_path):
    manifest = manifest_of([*reversed(JUDGED.paths), "of another split.jpg"])
    sharpness = np.arange(6, dtype=np.float32)
    tables = evaluation_tables(JUDGED, manifest, sharpness, temperature=1.0, resamples=100, seed=1)
    assert tables["metrics"].set_index("metric")["value"]["accuracy"] == pytest.approx(4 / 6, abs=1e-6)
    drawn = draw_tables(tables, JUDGED, tmp_path)
    assert set(drawn) == {"confusion", "roc", "precision_recall", "calibration", "scores", "slices"}
    assert all(path.is_file() for path in drawn.values())
    assert draw_tables({}, JUDGED, tmp_path) == {}


def test_near_duplicates_are_drawn_together():
    manifest = manifest_of(list(JUDGED.paths))
    sharpness = np.zeros(6, np.float32)
    together = evaluation_tables(JUDGED, manifest, sharpness, temperature=1.0, resamples=500, seed=1)["metrics"]
    apart = evaluation_tables(
        JUDGED, manifest.assign(group=range(6)), sharpness, temperature=1.0, resamples=500, seed=1
    )["metrics"]
    assert not together.equals(apart)


def test_robustness_asks_for_every_damage_of_the_chosen_pictures():
    positions = np.array([1, 4])
    pictures = np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in (250, 5)])
    seen = []

    def predict(batches):
        pixels = np.concatenate(list(batches))
        seen.append(len(pixels))
        # Bright ones are cats: both right, until a damage gives or takes the light.
        return (pixels.mean(axis=(1, 2, 3)) < 60).astype(np.int64)

    judged = predictions_of([0.1, 0.1, 0.1, 0.1, 0.9], [0, 0, 0, 0, 1])
    table = robustness_table(pictures, positions, judged, predict, seed=1, batch_size=1)
    assert seen == [2] * len(CORRUPTIONS)
    by_name = table.set_index(["corruption", "severity"])["accuracy"]
    assert by_name["none", 0] == 1
    assert by_name["horizontal flip", 1] == 1
    assert by_name.min() < 1
