"""How a batch is divided among the devices and the workers that compute on it together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from catdog.optimization import NO_IMAGE, Batch, Floats


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process computes on."""

    devices: int = 1  # of all processes together; each takes equally many images
    processes: int = 1  # each with equally many devices
    process: int = 0  # the number of this one

    def filled_size(self, images: int) -> int:
        """Returns the number of images of a batch that was filled up for all devices."""
        return -(-images // self.devices) * self.devices

    def fill(self, batch: Batch) -> Batch:
        """Fills a batch up to a multiple of the number of devices; one that is such a multiple stays as it is.

        JAX refuses a batch that cannot be divided evenly, and TensorFlow lets the images of a smaller part count for
        more. Fillers are black, weigh nothing in the loss, and their targets say that they are no images.
        """
        missing = self.filled_size(len(batch[0])) - len(batch[0])
        if not missing:
            return batch
        pixels, targets, weights = batch
        return _extended(pixels, missing, 0), _extended(targets, missing, NO_IMAGE), _extended(weights, missing, 0)

    def cut(self, batch: Batch) -> Batch:
        """Returns the images of a filled batch that this process computes on."""
        count = len(batch[0]) // self.processes
        part = slice(self.process * count, (self.process + 1) * count)
        pixels, targets, weights = (values[part] for values in batch)
        return pixels, targets, weights


def current_share() -> Share:
    """Returns the share of this process in the work of the models of `runtime.distribution`, inside that block."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return Share(tf.distribute.get_strategy().num_replicas_in_sync)
    parallel = keras.distribution.distribution()
    if parallel is None:
        return Share()
    import jax

    return Share(parallel.device_mesh.devices.size, jax.process_count(), jax.process_index())


def _extended(values: Floats, count: int, by: float) -> Floats:
    return np.concatenate([values, np.full((count, *values.shape[1:]), by, values.dtype)])
