"""TFRecord shards: written once by preprocess, read by everything after it."""

from __future__ import annotations

import contextlib
import errno
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from catdog.files import written_aside
from catdog.images import Pixels, ResizeMode, decode, encode_jpeg, resize

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def plan_shards(split: str, rows: Sequence[ImageRow], images_per_shard: int) -> list[Shard]:
    """Cuts a split into shards of nearly equal size, none above `images_per_shard`."""
    number = max(1, math.ceil(len(rows) / images_per_shard))
    bounds = [round(position * len(rows) / number) for position in range(number + 1)]
    return [
        Shard(f"{split}-{index:05d}-of-{number:05d}.tfrecord", split, tuple(rows[start:end]))
        for index, (start, end) in enumerate(pairwise(bounds))
    ]


def write_shard(
    shard: Shard, raw: Path, folder: Path, *, size: int, mode: ResizeMode, quality: int, max_pixels: float
) -> int:
    """Reads a shard's images from the raw archive, resizes them and writes them as one TFRecord file.

    Each record is a tf.train.Example with `image/encoded` (JPEG), `image/class/label` and `image/path`.
    Depends on nothing but its arguments, so any pool or cluster may run it.

    Returns:
        The shard's size in bytes.
    """
    import tensorflow as tf

    def feature(value: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    target = folder / shard.name
    with (
        _disk_full_as_os_error(target),
        zipfile.ZipFile(raw) as archive,
        written_aside(target) as aside,
        tf.io.TFRecordWriter(str(aside)) as writer,
    ):
        for row in shard.rows:
            pixels = resize(decode(archive.read(row.path), max_pixels=max_pixels), size, mode)
            label = tf.train.Feature(int64_list=tf.train.Int64List(value=[row.label]))
            features = {
                "image/encoded": feature(encode_jpeg(pixels, quality)),
                "image/class/label": label,
                "image/path": feature(row.path.encode()),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString(deterministic=True))
    return target.stat().st_size


@contextlib.contextmanager
def _disk_full_as_os_error(path: Path) -> Iterator[None]:
    """Turns TensorFlow's own exception for a full disk into Python's."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise OSError(errno.ENOSPC, str(error), str(path)) from None


def map_shards(function: Callable[[Item], Result], shards: Sequence[Item], *, workers: int) -> Iterator[Result]:
    """Runs a function over shards in a pool of threads and yields the results in the shards' order.

    Threads are enough: decoding, resizing, encoding and reading all release the interpreter's lock.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, shard) for shard in shards]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Returns a split's shards in order."""
    return sorted(folder.glob(f"{split}-*-of-*.tfrecord"))


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
            .map(parse, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(self._batch_size)
            .prefetch(2)
        )
        self._labels, self.paths = [], []
        for pixels, labels, names in dataset.as_numpy_iterator():
            self._labels.append(labels)
            self.paths += [name.decode() for name in names]
            yield pixels
