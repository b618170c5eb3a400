"""Features on disk: what the forward pass gave, in the shards' order, read at any positions."""

import functools
import io
import zipfile
from itertools import pairwise

import keras
import numpy as np
import pytest
from PIL import Image

from catdog.augment import build_augmentation
from catdog.config import AugmentParams, load_params, validate_params
from catdog.embedding import EmbedTask, open_embedder
from catdog.features import FeatureSet, embed_copy, embed_shard, open_features, reporting
from catdog.records import (
    ImageRow,
    RecordReader,
    encode_record,
    plan_shards,
    shard_paths,
    write_index,
    write_shard,
)
from conftest import REPOSITORY

BRIGHTNESS = AugmentParams(flip="none", rotation=0, zoom=0, translation=0, contrast=0, saturation=0, brightness=0.05)


def feature_set(sizes, width=3) -> FeatureSet:
    """Shards of these sizes; row i of the whole is [i, i + 0.25, ...]."""
    total = sum(sizes)
    values = np.arange(total, dtype=np.float32)[:, None] + np.arange(width, dtype=np.float32) / 4
    starts = np.cumsum([0, *sizes])
    shards = tuple(values[start:end] for start, end in pairwise(starts))
    return FeatureSet(shards, starts, np.arange(total) % 2)


@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1), (4, 1, 7), (3, 0, 2), (0, 4)])
def test_take_gives_the_rows_asked_for_in_their_order(sizes):
    features = feature_set(sizes)
    rng = np.random.default_rng(0)
    total = sum(sizes)
    for positions in (
        np.arange(total),
        np.arange(total)[::-1],
        rng.integers(0, total, 40),
        np.array([0, total - 1, 0]),
    ):
        taken = features.take(positions)
        assert taken.dtype == np.float32
        assert np.array_equal(taken, positions[:, None] + np.arange(3) / 4)


def test_take_of_nothing_is_empty():
    assert feature_set((4, 2)).take(np.array([], np.int64)).shape == (0, 3)


def test_size_is_the_length_of_a_vector():
    assert feature_set((2, 2), width=7).size == 7


def feature_set_with_copies(sizes, views) -> FeatureSet:
    """As `feature_set`; copy number v is 100 v more."""
    plain = feature_set(sizes)
    copies = tuple(tuple(shard + 100 * view for shard in plain.shards) for view in range(1, views + 1))
    return FeatureSet(plain.shards, plain.starts, plain.labels, copies)


@pytest.mark.parametrize("sizes", [(5,), (4, 1, 7), (3, 0, 2)])
def test_take_gives_of_each_image_the_view_asked_for(sizes):
    features = feature_set_with_copies(sizes, 3)
    rng = np.random.default_rng(0)
    total = sum(sizes)
    positions = rng.integers(0, total, 50)
    for view in (rng.integers(0, 4, 50), np.zeros(50, np.int64), np.full(50, 3)):
        taken = features.take(positions, view)
        assert np.array_equal(taken, (positions + 100 * view)[:, None] + np.arange(3) / 4)
    assert np.array_equal(features.take(positions), features.take(positions, np.zeros(50, np.int64)))


def test_labels_stand_for_images_whatever_the_views():
    features = feature_set_with_copies((4, 2), 3)
    assert features.views == 3
    assert len(features.labels) == features.starts[-1] == 6
    assert feature_set((4, 2)).views == 0


def forward(batches):
    return np.concatenate(
        [np.stack([b.mean(axis=(1, 2, 3)), np.full(len(b), len(b))], axis=1).astype(np.float32) for b in batches]
    )


@pytest.fixture
def embedded(tmp_path):
    """Three shards of grey pictures, embedded as [brightness, batch size]."""
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for number in range(11):
            buffer = io.BytesIO()
            Image.new("L", (32, 32), 20 * number).save(buffer, "PNG")
            archive.writestr(f"{number}.png", buffer.getvalue())
    rows = [ImageRow(f"{number}.png", number % 3) for number in range(11)]
    options = {"classes": "abc", "size": 32, "mode": "stretch", "quality": 95, "max_pixels": 1e6}
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        encode = functools.partial(encode_record, archive=archive, **options)
        written = [write_shard(shard, tmp_path, encode) for shard in plan_shards("train", rows, 4)]
    write_index(tmp_path, written, "abc", size=32)

    counts = [
        embed_shard(shard, tmp_path / "features", forward, batch_size=3) for shard in shard_paths(tmp_path, "train")
    ]
    return tmp_path, counts


def test_embedding_writes_every_image_in_order_with_its_label(embedded):
    folder, counts = embedded
    assert sum(counts) == 11
    assert max(counts) <= 4
    features = open_features(folder / "features", "train")
    assert [len(shard) for shard in features.shards] == counts
    values = features.take(np.arange(11))
    assert np.abs(values[:, 0] - np.arange(0, 220, 20)).max() < 1
    reader = RecordReader(shard_paths(folder, "train"), 4)
    list(reader)
    assert features.labels.tolist() == reader.labels.tolist() == [number % 3 for number in range(11)]
    assert features.labels.dtype == np.int64


def test_embedding_uses_the_batch_size(embedded):
    folder, counts = embedded
    values = open_features(folder / "features", "train").take(np.arange(counts[0]))
    assert values[:, 1].tolist() == [3, 3, 3, 1][: counts[0]]


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_openvino_makes_the_same_features_whatever_the_precision(embedded, tmp_path, precision):
    """It computes in float32; of a network in 16 bits it gave other numbers, or none."""
    (shard, *_), made, facts = shard_paths(embedded[0], "train"), [], []
    defaults = load_params(REPOSITORY / "params.yaml").model_dump()
    changes = {"backbone": "mobilenetv3large", "weights": "random"}
    changes |= {"embed": defaults["embed"] | {"engine": "openvino"}}
    try:
        for asked in ("float32", precision):
            params = validate_params(defaults | changes | {"runtime": {"precision": asked}})
            folder = tmp_path / asked
            folder.mkdir()
            embed = open_embedder(params, size=32, pretrained=tmp_path, root=tmp_path, folder=folder)
            facts.append(embed(EmbedTask(shard)).network.facts["precision"])
            made.append(np.load(folder / f"{shard.stem}.features.npy"))
    finally:
        keras.config.set_dtype_policy("float32")
    assert facts == ["float32", "float32"]
    assert made[1].dtype == np.float32
    assert np.array_equal(*made)
    assert made[0].any()


def test_features_stay_on_disk_until_taken(embedded):
    features = open_features(embedded[0] / "features", "train")
    assert all(isinstance(shard, np.memmap) for shard in features.shards)


def test_embedding_leaves_two_files_a_shard_and_no_parts(embedded):
    names = sorted(path.name for path in (embedded[0] / "features").iterdir())
    assert names == sorted(
        f"train-{number:05d}-of-00003.{kind}.npy" for number in range(3) for kind in ("features", "labels")
    )


def embed_copies(shards, folder, *, views=2, seed=5, batch_size=3):
    augmentation = build_augmentation(BRIGHTNESS, 32, 0)
    return [
        embed_copy(shard, folder, forward, augmentation, view=view, seed=seed, batch_size=batch_size)
        for shard in shards
        for view in range(1, views + 1)
    ]


@pytest.fixture
def with_copies(embedded):
    """The same with two copies of each image, varied in brightness only."""
    folder, counts = embedded
    assert embed_copies(shard_paths(folder, "train"), folder / "features") == [n for n in counts for _ in range(2)]
    return folder


def test_copies_are_of_the_same_images_in_the_same_order(with_copies):
    features = open_features(with_copies / "features", "train", views=True)
    assert features.views == 2
    positions = np.arange(11)
    plain = features.take(positions)[:, 0]
    for view in (1, 2):
        change = features.take(positions, np.full(11, view))[:, 0] - plain
        middle = change[2:-2]  # those that are not clipped
        assert np.abs(change).max() < 13.5
        assert len(set(np.round(middle, 1))) > 4
        assert np.abs(middle).max() > 3
    assert not np.array_equal(features.take(positions, np.full(11, 1)), features.take(positions, np.full(11, 2)))


def test_copies_are_not_opened_unless_asked_for(with_copies):
    features = open_features(with_copies / "features", "train")
    assert features.views == 0
    assert len(features.labels) == 11


def test_copies_stay_on_disk_until_taken(with_copies):
    features = open_features(with_copies / "features", "train", views=True)
    assert all(isinstance(shard, np.memmap) for copy in features.copies for shard in copy)


def copy_values(folder):
    """The brightness of every copy, by file."""
    return {path.name: np.load(path)[:, 0] for path in folder.glob("*.view-*.npy")}


def test_copies_depend_on_seed_shard_and_view_but_not_on_batch_size_or_order(with_copies, tmp_path):
    shards = shard_paths(with_copies, "train")
    expected = copy_values(with_copies / "features")
    assert len(expected) == 6
    embed_copies(shards[::-1], tmp_path / "again", batch_size=2)
    again = copy_values(tmp_path / "again")
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[name], values) for name, values in expected.items())
    embed_copies(shards, tmp_path / "other", seed=6)
    other = copy_values(tmp_path / "other")
    assert not any(np.array_equal(other[name], values) for name, values in expected.items())


def test_shards_of_the_same_pictures_are_varied_differently(with_copies, tmp_path):
    (first, second, _) = shard_paths(with_copies, "train")
    same = tmp_path / second.name
    same.write_bytes(first.read_bytes())
    for shard in (first, same):
        embed_copies([shard], tmp_path / "features", views=1)
    values = copy_values(tmp_path / "features")
    assert not np.array_equal(values[f"{first.stem}.view-001.npy"], values[f"{same.stem}.view-001.npy"])


def test_pictures_of_a_shard_are_varied_differently_wherever_it_is_cut(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr("catdog.features._VARIED_TOGETHER", 1)
    shard = shard_paths(embedded[0], "train")[1]
    embed_copies([shard], tmp_path, views=1)
    (varied,) = copy_values(tmp_path).values()
    change = varied - np.load(embedded[0] / f"features/{shard.stem}.features.npy")[:, 0]
    assert len(set(np.round(change))) > 1


def test_missing_copy_of_a_shard_is_noticed(with_copies):
    (with_copies / "features/train-00001-of-00003.view-002.npy").unlink()
    with pytest.raises(FileNotFoundError, match="view-002"):
        open_features(with_copies / "features", "train", views=True)


def test_copies_leave_one_file_a_shard_and_view(with_copies):
    names = {path.name for path in (with_copies / "features").iterdir()}
    assert {name for name in names if "view" in name} == {
        f"train-{number:05d}-of-00003.view-{view:03d}.npy" for number in range(3) for view in (1, 2)
    }
    assert not any(name.endswith(".part") for name in names)


def test_reporting_counts_every_image_and_changes_nothing():
    batches = [np.full((count, 4, 4, 3), count, np.uint8) for count in (3, 3, 1)]
    counts = []
    assert np.array_equal(reporting(forward, counts.append)(batches), forward(batches))
    assert counts == [3, 3, 1]


def test_split_without_features_is_refused(embedded):
    with pytest.raises(AssertionError, match="val"):
        open_features(embedded[0] / "features", "val")
