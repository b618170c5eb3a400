"""Feature vectors on disk: one forward pass of the frozen backbone, then any number of experiments."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from catdog.augment import augmented
from catdog.files import written_aside
from catdog.images import Pixels
from catdog.inference import Forward
from catdog.records import RecordReader

if TYPE_CHECKING:
    import keras

# Not the batch size of the forward pass: a copy must not depend on that.
_VARIED_TOGETHER = 32


def embed_shard(shard: Path, folder: Path, forward: Forward, *, batch_size: int) -> int:
    """Writes the features and labels of one TFRecord shard beside each other as .npy files.

    Depends on nothing but its arguments, so any pool or cluster may run it.

    Args:
        shard: the TFRecord file.
        folder: receives `<shard>.features.npy`, float32 [images, n], and `<shard>.labels.npy`, int64 [images].
        forward: the compiled extractor.
        batch_size: images a forward pass.

    Returns:
        The number of images.
    """
    reader = RecordReader([shard], batch_size)
    features = forward(reader)
    _save(features, folder / f"{shard.stem}.features.npy")
    _save(reader.labels, folder / f"{shard.stem}.labels.npy")
    return len(features)


def embed_copy(
    shard: Path,
    folder: Path,
    forward: Forward,
    augmentation: keras.layers.Pipeline,
    *,
    view: int,
    seed: int,
    batch_size: int,
) -> int:
    """Writes the features of one varied copy of each image of a shard beside what `embed_shard` wrote.

    Like there, the file depends on nothing but the arguments (on a shard's name, not on the folder it lies in).

    Args:
        shard: the TFRecord file.
        folder: receives `<shard>.view-<number>.npy`, float32 [images, n].
        forward: the compiled extractor.
        augmentation: from `augment.build_augmentation`.
        view: number of the copy, 1 or above; 0 stands for the image as it is.
        seed: with the shard's name and the view, draws how each image is varied.
        batch_size: images a forward pass.

    Returns:
        The number of images.
    """

    def copies() -> Iterator[Pixels]:
        for number, pixels in enumerate(RecordReader([shard], _VARIED_TOGETHER)):
            varied = augmented(pixels, augmentation, [seed, view, number, *shard.stem.encode()])
            for start in range(0, len(varied), batch_size):
                yield varied[start : start + batch_size]

    features = forward(copies())
    _save(features, folder / _copy_name(shard.stem, view))
    return len(features)


def reporting(forward: Forward, report: Callable[[int], object]) -> Forward:
    """Returns the same forward pass, which also tells `report` how many images it has taken, batch by batch."""

    def told(batches: Iterable[Pixels]) -> Iterator[Pixels]:
        for batch in batches:
            yield batch
            report(len(batch))

    return lambda batches: forward(told(batches))


def _copy_name(stem: str, view: int) -> str:
    return f"{stem}.view-{view:03d}.npy"


def _save(values: npt.NDArray[Any], path: Path) -> None:
    # Not straight to the file: there NumPy writes on its own, and a full disk is an error without a number.
    content = io.BytesIO()
    np.save(content, values)
    with written_aside(path) as aside:
        aside.write_bytes(content.getbuffer())


@dataclass(frozen=True)
class FeatureSet:
    """The features of one split, read from disk as they are needed.

    A position stands for an image, whatever the number of its copies: `labels` has one entry an image.
    """

    shards: tuple[npt.NDArray[np.float32], ...]  # memory maps, [images, n] each
    starts: npt.NDArray[np.int64]  # position of each shard's first image, and the number of images at the end
    labels: npt.NDArray[np.int64]  # [images]
    copies: tuple[tuple[npt.NDArray[np.float32], ...], ...] = ()  # for each varied copy the same as `shards`

    @property
    def size(self) -> int:
        """Length of a feature vector."""
        return int(self.shards[0].shape[1])

    @property
    def views(self) -> int:
        """Number of varied copies of each image that `take` can give, 0 or above."""
        return len(self.copies)

    def take(
        self, positions: npt.NDArray[np.int64], view: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Returns the features at these positions, float32 [positions, n].

        Args:
            positions: of the images, int64.
            view: which view of each, int64 [positions]: 0 the image as it is, 1 to `views` a varied copy; without it
                every image as it is.
        """
        result = np.empty((len(positions), self.size), np.float32)
        shard_of = np.searchsorted(self.starts, positions, side="right") - 1
        view = np.zeros(len(positions), np.int64) if view is None else view
        for number, shards in enumerate((self.shards, *self.copies)):
            for shard in np.unique(shard_of[view == number]):
                here = (shard_of == shard) & (view == number)
                result[here] = shards[shard][positions[here] - self.starts[shard]]
        return result


def open_features(folder: Path, split: str, *, views: bool = False) -> FeatureSet:
    """Opens the features of a split that `embed_shard` wrote, in the order of the shards.

    Args:
        folder: where they lie.
        split: train, val or test.
        views: also open the varied copies that `embed_copy` wrote, as many as there are.
    """
    paths = sorted(folder.glob(f"{split}-*.features.npy"))
    assert paths, f"{folder} has no features of the split {split}"
    shards = tuple(np.load(path, mmap_mode="r") for path in paths)
    stems = [path.name.removesuffix(".features.npy") for path in paths]
    labels = [np.load(folder / f"{stem}.labels.npy") for stem in stems]
    starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])])
    count = len(list(folder.glob(f"{stems[0]}.view-*.npy"))) if views else 0
    copies = tuple(
        tuple(np.load(folder / _copy_name(stem, view), mmap_mode="r") for stem in stems) for view in range(1, count + 1)
    )
    return FeatureSet(shards, starts, np.concatenate(labels), copies)
