"""Features on disk: what the forward pass gave, in the shards' order, read at any positions."""

import functools
import io
import zipfile
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from catdog.features import FeatureSet, embed_shard, open_features
from catdog.records import (
    ImageRow,
    RecordReader,
    encode_record,
    plan_shards,
    shard_paths,
    write_index,
    write_shard,
)


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

    def forward(batches):
        return np.concatenate(
            [np.stack([b.mean(axis=(1, 2, 3)), np.full(len(b), len(b))], axis=1).astype(np.float32) for b in batches]
        )

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


def test_features_stay_on_disk_until_taken(embedded):
    features = open_features(embedded[0] / "features", "train")
    assert all(isinstance(shard, np.memmap) for shard in features.shards)


def test_embedding_leaves_two_files_a_shard_and_no_parts(embedded):
    names = sorted(path.name for path in (embedded[0] / "features").iterdir())
    assert names == sorted(
        f"train-{number:05d}-of-00003.{kind}.npy" for number in range(3) for kind in ("features", "labels")
    )


def test_split_without_features_is_refused(embedded):
    with pytest.raises(AssertionError, match="val"):
        open_features(embedded[0] / "features", "val")
