"""Feature vectors on disk: one forward pass of the frozen backbone, then any number of experiments."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from catdog.files import written_aside
from catdog.inference import Forward
from catdog.records import RecordReader


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
    for kind, values in (("features", features), ("labels", reader.labels)):
        # Not straight to the file: there NumPy writes on its own, and a full disk is an error without a number.
        content = io.BytesIO()
        np.save(content, values)
        with written_aside(folder / f"{shard.stem}.{kind}.npy") as aside:
            aside.write_bytes(content.getbuffer())
    return len(features)


@dataclass(frozen=True)
class FeatureSet:
    """The features of one split, read from disk as they are needed."""

    shards: tuple[npt.NDArray[np.float32], ...]  # memory maps, [images, n] each
    starts: npt.NDArray[np.int64]  # position of each shard's first image, and the number of images at the end
    labels: npt.NDArray[np.int64]  # [images]

    @property
    def size(self) -> int:
        """Length of a feature vector."""
        return int(self.shards[0].shape[1])

    def take(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Returns the features at these positions, float32 [positions, n]."""
        result = np.empty((len(positions), self.size), np.float32)
        shard_of = np.searchsorted(self.starts, positions, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            result[here] = self.shards[shard][positions[here] - self.starts[shard]]
        return result


def open_features(folder: Path, split: str) -> FeatureSet:
    """Opens the features of a split that `embed_shard` wrote, in the order of the shards."""
    paths = sorted(folder.glob(f"{split}-*.features.npy"))
    assert paths, f"{folder} has no features of the split {split}"
    shards = tuple(np.load(path, mmap_mode="r") for path in paths)
    labels = [np.load(path.with_name(path.name.replace(".features.", ".labels."))) for path in paths]
    starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])])
    return FeatureSet(shards, starts, np.concatenate(labels))
