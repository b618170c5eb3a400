"""TFRecord shards: planned by bytes, written whole, verified, read back in order with labels and paths."""

import functools
import hashlib
import io
import zipfile
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from catdog.errors import CatdogError
from catdog.files import read_json
from catdog.images import ImageError, decode_stored
from catdog.parallel import map_in_threads
from catdog.records import (
    ImageRow,
    RecordReader,
    Shard,
    encode_record,
    images_per_shard,
    mean_record_bytes,
    plan_shards,
    shard_paths,
    verify_shards,
    write_index,
    write_shard,
)

CLASSES = ("ape", "bee", "cow")


def rows(count: int) -> list[ImageRow]:
    return [ImageRow(f"{number}.png", number % 3) for number in range(count)]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def grey(level: int) -> bytes:
    return png(Image.new("RGB", (40, 40), (level,) * 3))


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    """Encodes 0.png to 22.png, each of one brightness: ten times its number."""
    path = tmp_path_factory.mktemp("raw") / "raw.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(23):
            archive.writestr(f"{number}.png", grey(10 * number))
        archive.writestr("Ä 猫.png", grey(200))
        archive.writestr("broken.png", b"no picture")
    with zipfile.ZipFile(path) as archive:
        yield functools.partial(
            encode_record, archive=archive, classes=CLASSES, size=32, mode="stretch", quality=95, max_pixels=1e6
        )


def write_all(folder, encode, sizes, per_shard, workers=1):
    """Writes splits of these sizes, each from 0.png on, and the index."""
    shards = [shard for split, size in sizes.items() for shard in plan_shards(split, rows(size), per_shard)]
    written = list(
        map_in_threads(functools.partial(write_shard, folder=folder, encode=encode), shards, workers=workers)
    )
    write_index(folder, written, CLASSES, size=32)
    return written


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The plan


@pytest.mark.parametrize("count", [1, 9, 10, 11, 19, 20, 21, 250, 251])
@pytest.mark.parametrize("limit", [1, 3, 10, 250, 1000])
def test_plan_keeps_order_and_every_image_in_even_shards(count, limit):
    shards = plan_shards("val", rows(count), limit)
    assert [row for shard in shards for row in shard.rows] == rows(count)
    sizes = [len(shard.rows) for shard in shards]
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert len(shards) == -(-count // limit)


def test_names_of_shards_sort_in_their_order():
    shards = plan_shards("train", rows(12), 1)
    names = [shard.name for shard in shards]
    assert names[0] == "train-00000-of-00012.tfrecord"
    assert sorted(names) == names
    assert {shard.split for shard in shards} == {"train"}


@pytest.mark.parametrize(
    ("images", "record_bytes", "shard_bytes", "expected"),
    [
        (25_000, 28_000, 8e6, 285),  # by bytes
        (25_000, 28_000, 1e5, 3),
        (25_000, 28_000, 28_000, 1),
        (25_000, 28_000, 100, 1),  # no shard without an image
        (25_000, 28_000, 1e10, 6_250),  # one shard would hold it all
        (600, 15_000, 8e6, 150),
        (601, 15_000, 8e6, 151),
        (100, 15_000, 8e6, 32),  # too small to be worth four shards
        (5, 15_000, 8e6, 32),
        (100, 15_000, 1e5, 6),
    ],
)
def test_images_per_shard_follow_the_bytes_but_leave_work_for_several_processors(
    images, record_bytes, shard_bytes, expected
):
    assert images_per_shard(images, record_bytes, shard_bytes) == expected


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 100, 127, 128, 1000, 9999])
def test_sample_for_the_mean_is_spread_evenly_and_not_larger_than_needed(count):
    asked = []

    def encode(row):
        asked.append(int(row.path.removesuffix(".png")))
        return bytes(100 + int(row.path.removesuffix(".png")))

    mean = mean_record_bytes(rows(count), encode, workers=1)
    assert len(set(asked)) == len(asked) == min(count, 64)
    edges = [*asked, count]
    gaps = [end - start for start, end in pairwise(edges)]
    assert asked[0] == 0
    assert max(gaps) - min(gaps) <= 1
    assert mean == 100 + 16 + sum(asked) / len(asked)
    assert mean == mean_record_bytes(rows(count), encode, workers=4)


def test_mean_of_a_whole_set_is_exactly_what_its_shard_takes(encode, tmp_path):
    (shard,) = write_all(tmp_path, encode, {"train": 23}, 23)
    assert mean_record_bytes(rows(23), encode, workers=2) * 23 == shard.bytes == (tmp_path / shard.name).stat().st_size


def test_shards_of_uneven_pictures_stay_near_their_size(tmp_path):
    """Pictures from smooth to noisy, as photographs are, whose JPEGs differ by a factor of several."""
    random = np.random.default_rng(7)
    smooth = np.add.outer(np.arange(48), np.arange(48))[..., None] * np.ones(3)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for number in range(400):
            noisy = smooth + random.normal(0, random.uniform(0, 60), smooth.shape)
            archive.writestr(f"{number}.png", png(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        encode = functools.partial(
            encode_record, archive=archive, classes=CLASSES, size=48, mode="stretch", quality=95, max_pixels=1e6
        )
        record_bytes = mean_record_bytes(rows(400), encode, workers=2)
        wanted = 20 * record_bytes
        limit = images_per_shard(400, record_bytes, wanted)
        written = [write_shard(shard, tmp_path, encode) for shard in plan_shards("train", rows(400), limit)]
        sizes = [len(encode(row)) for row in rows(400)]
    assert max(sizes) > 2.5 * min(sizes)
    assert len(written) == 20
    assert 0.6 * wanted < min(shard.bytes for shard in written)
    assert max(shard.bytes for shard in written) < 1.4 * wanted


# Writing and reading


def test_shards_come_back_in_order_with_labels_and_paths(encode, tmp_path):
    written = write_all(tmp_path, encode, {"train": 23}, 7)
    for shard in written:
        data = (tmp_path / shard.name).read_bytes()
        assert (shard.split, shard.bytes, shard.sha256) == ("train", len(data), hashlib.sha256(data).hexdigest())
    assert [shard.images for shard in written] == [6, 6, 5, 6]
    assert [path.name for path in shard_paths(tmp_path, "train")] == [shard.name for shard in written]
    reader = RecordReader(shard_paths(tmp_path, "train"), 5)
    batches = list(reader)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    pixels = np.concatenate(batches)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (23, 32, 32, 3))
    assert np.abs(pixels.astype(int) - np.arange(0, 230, 10)[:, None, None, None]).max() <= 1
    assert reader.labels.tolist() == [number % 3 for number in range(23)]
    assert reader.paths == [f"{number}.png" for number in range(23)]


def test_reading_again_starts_anew(encode, tmp_path):
    write_all(tmp_path, encode, {"val": 4}, 9)
    reader = RecordReader(shard_paths(tmp_path, "val"), 3)
    first, second = list(reader), list(reader)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert reader.labels.tolist() == [0, 1, 2, 0]
    assert len(reader.paths) == 4


def test_a_record_says_all_that_is_known_of_its_image(encode):
    import tensorflow as tf

    features = tf.train.Example.FromString(encode(ImageRow("Ä 猫.png", 1))).features.feature
    assert sorted(features) == [
        "image/class/label",
        "image/class/text",
        "image/encoded",
        "image/format",
        "image/height",
        "image/path",
        "image/width",
    ]
    for name, value in {"class/text": "bee", "format": "jpeg", "path": "Ä 猫.png"}.items():
        assert [text.decode() for text in features[f"image/{name}"].bytes_list.value] == [value]
    for name, value in {"class/label": 1, "height": 32, "width": 32}.items():
        assert list(features[f"image/{name}"].int64_list.value) == [value]
    (jpeg,) = features["image/encoded"].bytes_list.value
    assert decode_stored(jpeg).shape == (32, 32, 3)
    assert np.abs(decode_stored(jpeg).astype(int) - 200).max() <= 1


def test_names_of_any_script_survive(encode, tmp_path):
    shard = Shard("val-00000-of-00001.tfrecord", "val", (ImageRow("Ä 猫.png", 1),))
    write_shard(shard, tmp_path, encode)
    reader = RecordReader([tmp_path / shard.name], 1)
    list(reader)
    assert reader.paths == ["Ä 猫.png"]


def test_output_is_byte_identical_whatever_the_number_of_workers(encode, tmp_path):
    sizes = {"train": 23, "val": 5, "test": 9}
    for workers in (1, 3):
        write_all(tmp_path / str(workers), encode, sizes, 2, workers)
    one, three = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert len(one) == 12 + 3 + 5 + 3
    assert one == three


def test_what_the_index_does_not_list_is_not_read(encode, tmp_path):
    write_all(tmp_path, encode, {"train": 2, "val": 2, "test": 2}, 9)
    for name in ("train-notes.txt", "train-00001-of-00002.tfrecord.part", "train-00000-of-00007.tfrecord"):
        (tmp_path / name).touch()
    assert [path.name for path in shard_paths(tmp_path, "train")] == ["train-00000-of-00001.tfrecord"]


def test_picture_that_cannot_be_decoded_leaves_no_shard(encode, tmp_path):
    shard = Shard("val-00000-of-00001.tfrecord", "val", (ImageRow("1.png", 0), ImageRow("broken.png", 0)))
    with pytest.raises(ImageError):
        write_shard(shard, tmp_path, encode)
    assert list(tmp_path.iterdir()) == []


def test_damaged_record_is_an_error_not_another_picture(encode, tmp_path):
    import tensorflow as tf

    (shard,) = write_all(tmp_path, encode, {"val": 3}, 9)
    flip_a_bit(tmp_path / shard.name)
    with pytest.raises(tf.errors.DataLossError):
        list(RecordReader([tmp_path / shard.name], 2))


# Whether the shards are those that were written


def flip_a_bit(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def drop_last_record(path):
    """Cuts between two records, where a TFRecord reader sees nothing wrong."""
    import tensorflow as tf

    last = list(tf.data.TFRecordDataset([str(path)]).as_numpy_iterator())[-1]
    path.write_bytes(path.read_bytes()[: -len(last) - 16])
    assert len(list(tf.data.TFRecordDataset([str(path)]))) > 0


def exchange(path):
    """Swaps a shard and its neighbour, both sound."""
    other = path.with_name(path.name.replace("00001-of", "00002-of"))
    assert other != path
    here, there = path.read_bytes(), other.read_bytes()
    path.write_bytes(there)
    other.write_bytes(here)


def delete(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit, "is not the file that preprocess wrote"),
        (drop_last_record, "is not the file that preprocess wrote"),
        (exchange, "is not the file that preprocess wrote"),
        (delete, "is missing"),
    ],
)
def test_shards_that_are_not_those_written_are_refused_by_name(encode, tmp_path, damage, said):
    write_all(tmp_path, encode, {"train": 23, "val": 4, "test": 4}, 4)
    verify_shards(tmp_path, ["train", "val", "test"])
    damage(tmp_path / "train-00001-of-00006.tfrecord")
    with pytest.raises(CatdogError) as caught:
        verify_shards(tmp_path, ["val", "train"])
    message = str(caught.value)
    assert "\n" not in message
    assert "train-00001-of-00006.tfrecord" in message
    assert said in message
    assert "dvc repro" in message
    verify_shards(tmp_path, ["val", "test"])


def test_folder_without_index_or_split_is_refused(encode, tmp_path):
    with pytest.raises(CatdogError, match=r"dataset_info\.json is missing; `dvc repro"):
        shard_paths(tmp_path, "train")
    write_all(tmp_path, encode, {"train": 2, "val": 2}, 9)
    with pytest.raises(CatdogError, match="no split 'test', only train, val"):
        shard_paths(tmp_path, "test")


def test_index_counts_and_names_every_shard(encode, tmp_path):
    written = write_all(tmp_path, encode, {"train": 23, "val": 4}, 8)
    index = read_json(tmp_path / "dataset_info.json")
    assert index["downloadChecksums"] == {shard.name: shard.sha256 for shard in written}
    assert [entry["name"] for entry in index["splits"]] == ["train", "val"]
    assert [entry["shardLengths"] for entry in index["splits"]] == [["8", "7", "8"], ["4"]]
    assert [entry["numBytes"] for entry in index["splits"]] == [
        str(sum(path.stat().st_size for path in shard_paths(tmp_path, split))) for split in ("train", "val")
    ]


def test_reading_is_not_tuned(encode, tmp_path, monkeypatch):
    """TensorFlow's thread that tunes is sometimes not woken at the end, and the reader waits for as long again."""
    import tensorflow as tf

    tuned = []
    iterate = tf.data.Dataset.as_numpy_iterator

    def spied(dataset):
        tuned.append(dataset.options().autotune.enabled)
        return iterate(dataset)

    monkeypatch.setattr(tf.data.Dataset, "as_numpy_iterator", spied)
    write_all(tmp_path, encode, {"train": 3}, 3)
    assert len(list(RecordReader(shard_paths(tmp_path, "train"), 2))) == 2
    assert tuned == [False]
