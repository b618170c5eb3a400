"""TFRecord shards: planned evenly, written whole, read back in order with labels and paths."""

import io
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from catdog.images import ImageError
from catdog.records import ImageRow, RecordReader, Shard, map_shards, plan_shards, shard_paths, write_shard

OPTIONS = {"size": 32, "mode": "stretch", "quality": 95, "max_pixels": 1e6}


def rows(count: int) -> list[ImageRow]:
    return [ImageRow(f"{number}.png", number % 3) for number in range(count)]


def grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Pictures 0.png to 22.png, each of one brightness: ten times its number. Tests only read it."""
    path = tmp_path_factory.mktemp("raw") / "raw.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(23):
            archive.writestr(f"{number}.png", grey(10 * number))
        archive.writestr("Ä 猫.png", grey(200))
        archive.writestr("broken.png", b"no picture")
    return path


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


def test_shards_come_back_in_order_with_labels_and_paths(raw, tmp_path):
    shards = plan_shards("train", rows(23), 7)
    for shard in reversed(shards):
        size = write_shard(shard, raw, tmp_path, **OPTIONS)
        assert size == (tmp_path / shard.name).stat().st_size
    assert [path.name for path in shard_paths(tmp_path, "train")] == [shard.name for shard in shards]
    reader = RecordReader(shard_paths(tmp_path, "train"), 5)
    batches = list(reader)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    pixels = np.concatenate(batches)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (23, 32, 32, 3))
    assert np.abs(pixels.astype(int) - np.arange(0, 230, 10)[:, None, None, None]).max() <= 1
    assert reader.labels.tolist() == [number % 3 for number in range(23)]
    assert reader.paths == [f"{number}.png" for number in range(23)]


def test_reading_again_starts_anew(raw, tmp_path):
    write_shard(plan_shards("val", rows(4), 9)[0], raw, tmp_path, **OPTIONS)
    reader = RecordReader(shard_paths(tmp_path, "val"), 3)
    first, second = list(reader), list(reader)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert reader.labels.tolist() == [0, 1, 2, 0]
    assert len(reader.paths) == 4


def test_names_of_any_script_survive(raw, tmp_path):
    write_shard(Shard("val-00000-of-00001.tfrecord", "val", (ImageRow("Ä 猫.png", 1),)), raw, tmp_path, **OPTIONS)
    reader = RecordReader(shard_paths(tmp_path, "val"), 1)
    list(reader)
    assert reader.paths == ["Ä 猫.png"]


def test_same_images_give_the_same_bytes(raw, tmp_path):
    shard = plan_shards("val", rows(9), 9)[0]
    for folder in ("one", "two"):
        write_shard(shard, raw, tmp_path / folder, **OPTIONS)
    assert (tmp_path / "one" / shard.name).read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_splits_are_told_apart(raw, tmp_path):
    for split in ("train", "test", "val"):
        write_shard(plan_shards(split, rows(2), 9)[0], raw, tmp_path, **OPTIONS)
    (tmp_path / "train-notes.txt").touch()
    (tmp_path / "train-00001-of-00002.tfrecord.part").touch()
    assert [path.name for path in shard_paths(tmp_path, "train")] == ["train-00000-of-00001.tfrecord"]


def test_picture_that_cannot_be_decoded_leaves_no_shard(raw, tmp_path):
    shard = Shard("val-00000-of-00001.tfrecord", "val", (ImageRow("1.png", 0), ImageRow("broken.png", 0)))
    with pytest.raises(ImageError):
        write_shard(shard, raw, tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_damaged_record_is_an_error_not_another_picture(raw, tmp_path):
    import tensorflow as tf

    shard = plan_shards("val", rows(3), 9)[0]
    write_shard(shard, raw, tmp_path, **OPTIONS)
    path = tmp_path / shard.name
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(tf.errors.DataLossError):
        list(RecordReader([path], 2))


@pytest.mark.parametrize("workers", [1, 4])
def test_results_of_the_pool_are_in_the_order_of_the_shards(workers):
    last_first = [threading.Event() for _ in range(4)]

    def work(number: int) -> int:
        if workers == 4 and number < 3:
            assert last_first[number + 1].wait(10)
        last_first[number].set()
        return number * number

    assert list(map_shards(work, range(4), workers=workers)) == [0, 1, 4, 9]


def test_error_in_the_pool_is_raised_and_cancels_the_rest():
    done = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("broken")
        done.append(number)

    with pytest.raises(ValueError, match="broken"):
        list(map_shards(work, range(1000), workers=1))
    assert len(done) < 1000
