"""TFRecord shards: written once by preprocess, read by everything after it.

The folder is a data set of TensorFlow Datasets as well: `tfds.builder_from_directory` opens it (docs/tfrecords.md).
"""

from __future__ import annotations

import contextlib
import errno
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from catdog.errors import CatdogError
from catdog.files import read_json, sha256_of, write_json, write_text, written_aside
from catdog.images import Pixels, ResizeMode, decode, encode_jpeg, resize
from catdog.parallel import map_in_threads, processors

INDEX = "dataset_info.json"
FEATURES = "features.json"
CLASS_NAMES = "image.class.label.labels.txt"

SAMPLED_IMAGES = 64
"""The mean of so many stored photographs is within about 6 % of the mean of all."""
LEAST_SHARDS = 4
"""A set that one shard would hold is still cut into so many, so that several processors can share the work."""
LEAST_IMAGES = 32
"""Fewer images than this are not worth a shard of their own, except by their bytes."""
_FRAME_BYTES = 16  # what TFRecord puts around each record: its length and two checksums
_WRITE_AGAIN = "`dvc repro --force --single-item preprocess` writes it again"


@dataclass(frozen=True)
class ImageRow:
    """One image of a shard."""

    path: str  # member of raw.zip
    label: int  # number of its class


@dataclass(frozen=True)
class Shard:
    """A shard to write: the unit of parallel work."""

    name: str  # e.g. train-00000-of-00004.tfrecord
    split: str
    rows: tuple[ImageRow, ...]


@dataclass(frozen=True)
class WrittenShard:
    """What is known of a shard once it is on the disk."""

    name: str
    split: str
    images: int
    bytes: int
    sha256: str  # of the file


EncodeRecord = Callable[[ImageRow], bytes]
"""From an image's row to its record: `encode_record` with everything but the row filled in."""


def mean_record_bytes(rows: Sequence[ImageRow], encode: EncodeRecord, *, workers: int) -> float:
    """Encodes images spread evenly over the rows; returns the mean bytes that one takes in a shard.

    The result depends on the rows alone, not on the number of workers.
    """
    count = min(SAMPLED_IMAGES, len(rows))
    sample = [rows[position * len(rows) // count] for position in range(count)]
    return sum(map_in_threads(lambda row: len(encode(row)) + _FRAME_BYTES, sample, workers=workers)) / count


def images_per_shard(images: int, record_bytes: float, shard_bytes: float) -> int:
    """Returns how many images a shard takes at most.

    As many as make `shard_bytes`; but fewer where the whole set would make less than LEAST_SHARDS shards.

    Args:
        images: in all splits together.
        record_bytes: mean bytes of a record, above 0, as `mean_record_bytes` returns it.
        shard_bytes: the size that a shard should have.
    """
    return max(1, min(int(shard_bytes / record_bytes), max(LEAST_IMAGES, math.ceil(images / LEAST_SHARDS))))


def plan_shards(split: str, rows: Sequence[ImageRow], images_per_shard: int) -> list[Shard]:
    """Cuts a split into shards of nearly equal size, none above `images_per_shard`."""
    number = max(1, math.ceil(len(rows) / images_per_shard))
    bounds = [round(position * len(rows) / number) for position in range(number + 1)]
    return [
        Shard(_shard_name(split, index, number), split, tuple(rows[start:end]))
        for index, (start, end) in enumerate(pairwise(bounds))
    ]


def _shard_name(split: str, index: int, number: int) -> str:
    return f"{split}-{index:05d}-of-{number:05d}.tfrecord"


def encode_picture(
    row: ImageRow, archive: zipfile.ZipFile, *, size: int, mode: ResizeMode, quality: int, max_pixels: float
) -> bytes:
    """Reads an image from the raw archive, resizes it and returns it as the JPEG that a shard stores.

    Args:
        row: the image.
        archive: the raw archive, open; threads may share it.
        size: pixels a side of the stored picture.
        mode: how it becomes a square, see `images.resize`.
        quality: of the stored JPEG, 1 to 100.
        max_pixels: larger pictures are refused.

    Raises:
        ImageError: the member shows no picture, or one above `max_pixels`.
    """
    return encode_jpeg(resize(decode(archive.read(row.path), max_pixels=max_pixels), size, mode), quality)


def make_record(row: ImageRow, picture: bytes, *, classes: Sequence[str], size: int) -> bytes:
    """Returns an image as a record.

    Args:
        row: the image.
        picture: from `encode_picture`.
        classes: class names by number.
        size: pixels a side of the picture.

    Returns:
        A serialized tf.train.Example: `image/encoded` (JPEG), `image/format`, `image/height` and `image/width`
        (pixels), `image/class/label` (number) and `image/class/text` (name), `image/path` (member of the archive).
    """
    import tensorflow as tf

    example = tf.train.Example()
    features = example.features.feature  # filled in place: half the time of giving it tf.train.Feature objects
    features["image/encoded"].bytes_list.value.append(picture)
    features["image/format"].bytes_list.value.append(b"jpeg")
    features["image/height"].int64_list.value.append(size)
    features["image/width"].int64_list.value.append(size)
    features["image/class/label"].int64_list.value.append(row.label)
    features["image/class/text"].bytes_list.value.append(classes[row.label].encode())
    features["image/path"].bytes_list.value.append(row.path.encode())
    record: bytes = example.SerializeToString(deterministic=True)
    return record


def encode_record(
    row: ImageRow,
    archive: zipfile.ZipFile,
    *,
    classes: Sequence[str],
    size: int,
    mode: ResizeMode,
    quality: int,
    max_pixels: float,
) -> bytes:
    """Reads an image from the raw archive and returns it as a record: `encode_picture`, then `make_record`."""
    picture = encode_picture(row, archive, size=size, mode=mode, quality=quality, max_pixels=max_pixels)
    return make_record(row, picture, classes=classes, size=size)


def write_shard(shard: Shard, folder: Path, encode: EncodeRecord) -> WrittenShard:
    """Writes a shard's records as one TFRecord file: whole, or not at all.

    Depends on nothing but its arguments, so any pool or cluster may run it.
    """
    import tensorflow as tf

    target = folder / shard.name
    with (
        _disk_full_as_os_error(target),
        written_aside(target) as aside,
        tf.io.TFRecordWriter(str(aside)) as writer,
    ):
        for row in shard.rows:
            writer.write(encode(row))
    return WrittenShard(shard.name, shard.split, len(shard.rows), target.stat().st_size, sha256_of(target))


@contextlib.contextmanager
def _disk_full_as_os_error(path: Path) -> Iterator[None]:
    """Turns TensorFlow's own exception for a full disk into Python's."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise OSError(errno.ENOSPC, str(error), str(path)) from None


def write_index(folder: Path, shards: Sequence[WrittenShard], classes: Sequence[str], *, size: int) -> None:
    """Writes what TensorFlow Datasets needs to open the folder, `dataset_info.json` last of all.

    That file lists each shard with its images (`shardLengths`) and its SHA-256 (`downloadChecksums`); it is the
    JSON form of the message DatasetInfo in tensorflow_datasets/core/proto/dataset_info.proto, in which 64-bit
    numbers are strings. The two others hold the features and the class names.

    Args:
        folder: where the shards lie.
        shards: all of them, in order, the shards of a split one after another.
        classes: class names by number.
        size: pixels a side of the stored pictures.
    """
    write_text(folder / CLASS_NAMES, "".join(f"{name}\n" for name in classes))
    features = {
        "image/encoded": _tfds_feature(
            "image_feature.Image",
            {
                "image": {
                    "shape": {"dimensions": [str(size), str(size), "3"]},
                    "dtype": "uint8",
                    "encodingFormat": "jpeg",
                }
            },
        ),
        "image/class/label": _tfds_feature(
            "class_label_feature.ClassLabel", {"classLabel": {"numClasses": str(len(classes))}}
        ),
        **{
            f"image/{name}": _tfds_feature("text_feature.Text", {"text": {}})
            for name in ("class/text", "format", "path")
        },
        **{
            f"image/{name}": _tfds_feature(
                "tensor_feature.Tensor", {"tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}}
            )
            for name in ("height", "width")
        },
    }
    # One flat level, not "image" with the others inside: TensorFlow Datasets finds the pair of `as_supervised`, and
    # the picture to show, on the first level only.
    write_json(folder / FEATURES, _tfds_feature("features_dict.FeaturesDict", {"featuresDict": {"features": features}}))
    splits = []
    for split, group in groupby(shards, key=lambda shard: shard.split):
        members = list(group)
        splits.append(
            {
                "name": split,
                "shardLengths": [str(shard.images) for shard in members],
                "numBytes": str(sum(shard.bytes for shard in members)),
                "filepathTemplate": "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}",
            }
        )
    write_json(
        folder / INDEX,
        {
            "name": "catdog",
            "version": "1.0.0",
            "description": f"Pictures of {size}x{size} pixels in {len(classes)} classes.",
            "fileFormat": "tfrecord",
            "disableShuffling": True,  # keeps readers to the order of the shards
            "supervisedKeys": {
                "tuple": {"items": [{"featureKey": key} for key in ("image/encoded", "image/class/label")]}
            },
            "splits": splits,
            "downloadChecksums": {shard.name: shard.sha256 for shard in shards},
        },
    )


def _tfds_feature(python_class: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{python_class}", **content}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / INDEX)
    except FileNotFoundError:
        raise CatdogError(f"{folder / INDEX} is missing; {_WRITE_AGAIN}") from None


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Returns a split's shards in order, as `dataset_info.json` lists them, whatever else the folder holds.

    Raises:
        CatdogError: there is no such list, or the split is not in it.
    """
    counts = {entry["name"]: len(entry["shardLengths"]) for entry in _read_index(folder)["splits"]}
    if split not in counts:
        raise CatdogError(f"{folder / INDEX} lists no split {split!r}, only {', '.join(counts)}; {_WRITE_AGAIN}")
    return [folder / _shard_name(split, index, counts[split]) for index in range(counts[split])]


def verify_shards(folder: Path, splits: Sequence[str]) -> None:
    """Compares the shards of these splits with their checksums, so that hours of work start from the right files.

    Reads every byte, which takes less than 1 % of the time that a small network takes for the same images on a CPU.

    Raises:
        CatdogError: a shard is missing, or is not the file that `write_shard` wrote.
    """
    expected = _read_index(folder)["downloadChecksums"]

    def verify(path: Path) -> None:
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            raise CatdogError(f"{path} is missing; {_WRITE_AGAIN}") from None
        if found != expected[path.name]:
            raise CatdogError(f"{path} is not the file that preprocess wrote: its SHA-256 is {found}; {_WRITE_AGAIN}")

    shards = [path for split in splits for path in shard_paths(folder, split)]
    for _ in map_in_threads(verify, shards, workers=processors()):
        pass


def read_labels(shards: Sequence[Path]) -> npt.NDArray[np.int64]:
    """Reads the class number of every image of these shards, in their order, int64 [images]; decodes no picture."""
    import tensorflow as tf

    def parse(record: Any) -> Any:
        return tf.io.parse_single_example(record, {"image/class/label": tf.io.FixedLenFeature([], tf.int64)})

    records = tf.data.TFRecordDataset([str(path) for path in shards]).map(parse)
    return np.array([example["image/class/label"] for example in records.as_numpy_iterator()], np.int64)


def untuned(dataset: Any) -> Any:
    """Returns a `tf.data.Dataset` that TensorFlow does not tune while it is read.

    The thread that tunes sleeps for 10, 20, 40 ms and so on, and is sometimes not woken when the reading ends
    (TensorFlow 2.21): whoever reads then waits for it, in all up to twice as long. Say how many threads `map` takes.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


class RecordReader:
    """Reads shards one after another, batch by batch, and keeps the labels and paths that it passed.

    Iterating yields uint8 pixels [batch, size, size, 3], RGB, in the shards' order; images are decoded in
    parallel, ahead of the reader. After the last batch, `labels` and `paths` describe every image.
    """

    def __init__(self, shards: Sequence[Path], batch_size: int) -> None:
        """Takes the TFRecord files in the order to read them."""
        self._shards = [str(path) for path in shards]
        self._batch_size = batch_size
        self._labels: list[npt.NDArray[np.int64]] = []
        self.paths: list[str] = []

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class numbers of the images read so far, int64 [images]."""
        return np.concatenate(self._labels)

    def __iter__(self) -> Iterator[Pixels]:
        """Yields the batches; raises tensorflow.errors.DataLossError where a record's checksum is wrong."""
        import tensorflow as tf

        schema = {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            "image/class/label": tf.io.FixedLenFeature([], tf.int64),
            "image/path": tf.io.FixedLenFeature([], tf.string),
        }

        def parse(record: Any) -> tuple[Any, Any, Any]:
            example = tf.io.parse_single_example(record, schema)
            # The accurate transform gives the very pixels of `images.decode_stored`; a test compares them.
            pixels = tf.io.decode_jpeg(example["image/encoded"], channels=3, dct_method="INTEGER_ACCURATE")
            return pixels, example["image/class/label"], example["image/path"]

        dataset = (
            tf.data.TFRecordDataset(self._shards)
            .map(parse, num_parallel_calls=processors())
            .batch(self._batch_size)
            .prefetch(2)
        )
        self._labels, self.paths = [], []
        for pixels, labels, names in untuned(dataset).as_numpy_iterator():
            self._labels.append(labels)
            self.paths += [name.decode() for name in names]
            yield pixels
