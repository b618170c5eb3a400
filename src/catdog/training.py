"""Fitting the head on stored features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.features import FeatureSet

if TYPE_CHECKING:
    import keras


def fit_head(
    head: keras.Model, train: FeatureSet, val: FeatureSet, params: TrainParams, *, seed: int, verbose: int = 0
) -> pd.DataFrame:
    """Fits the head in place, with early stopping on the validation loss; it ends with the best weights.

    Args:
        head: from `model.build_head`.
        train: fits.
        val: selects the epoch.
        params: optimizer, batch size, epochs, patience.
        seed: shuffles the training images, anew in each epoch.
        verbose: Keras' progress: 0 silent, 1 bars, 2 lines.

    Returns:
        One row an epoch: epoch (from 1), train_loss, val_loss, train_accuracy, val_accuracy.

    Raises:
        CatdogError: the loss became infinite or no number.
    """
    import keras

    binary = head.output_shape[-1] == 1
    loss = (
        keras.losses.BinaryCrossentropy(from_logits=True)
        if binary
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    # On logits the boundary between the classes is 0, the probability one half.
    accuracy = (
        keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)
        if binary
        else keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    )
    optimizer = keras.optimizers.get(
        {"class_name": params.optimizer, "config": {"learning_rate": params.learning_rate}}
    )
    # XLA compiles for longer than such a head trains; several steps a call leave less time to calling.
    head.compile(optimizer=optimizer, loss=loss, metrics=[accuracy], jit_compile=False, steps_per_execution=8)
    stopping = keras.callbacks.EarlyStopping(
        monitor="val_loss", patience=params.patience, restore_best_weights=True, mode="min"
    )
    history = head.fit(
        _batches(train, params.batch_size, shuffle_seed=seed),
        validation_data=_batches(val, max(params.batch_size, 1024), shuffle_seed=None),
        epochs=params.epochs,
        callbacks=[stopping, keras.callbacks.TerminateOnNaN()],
        shuffle=False,  # the batches come shuffled, from the seed; Keras would draw from global state
        verbose=verbose,
    ).history
    if not all(math.isfinite(value) for value in (*history["loss"], *history.get("val_loss", [math.nan]))):
        raise CatdogError(
            f"the training loss became {history['loss'][-1]} in epoch {len(history['loss'])}; lower "
            f"train.learning_rate (now {params.learning_rate})"
        )
    names = {
        "train_loss": "loss",
        "val_loss": "val_loss",
        "train_accuracy": "accuracy",
        "val_accuracy": "val_accuracy",
    }
    table = pd.DataFrame({name: history[key] for name, key in names.items()})
    table.insert(0, "epoch", range(1, len(table) + 1))
    return table


def best_epoch(history: pd.DataFrame) -> pd.Series:
    """Returns the row of the epoch with the lowest validation loss, whose weights are kept."""
    return history.iloc[int(history["val_loss"].argmin())]


def _batches(features: FeatureSet, batch_size: int, *, shuffle_seed: int | None) -> keras.utils.PyDataset:
    """Wraps features for `fit`: batches are read from disk as they are needed, each image once an epoch."""
    import keras

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.epoch = 0
            self._reorder()

        def _reorder(self) -> None:
            count = len(features.labels)
            self.order = (
                np.arange(count)
                if shuffle_seed is None
                else np.random.default_rng([shuffle_seed, self.epoch]).permutation(count)
            )

        def __len__(self) -> int:
            return math.ceil(len(features.labels) / batch_size)

        def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
            # Sorted positions read the disk forwards; the order inside a batch does not matter to the gradient.
            positions = np.sort(self.order[index * batch_size : (index + 1) * batch_size])
            return features.take(positions), features.labels[positions].astype(np.float32)[:, None]

        def on_epoch_end(self) -> None:
            self.epoch += 1
            self._reorder()

    return Batches()
