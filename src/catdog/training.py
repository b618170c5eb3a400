"""Fitting: the head on stored features, and the loop that head and fine-tuning share."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.checkpoints import (
    Checkpoints,
    State,
    assign,
    changing_variables,
    values_of,
)
from catdog.config import FineTuneParams, TrainParams
from catdog.errors import CatdogError
from catdog.features import FeatureSet
from catdog.optimization import (
    Batch,
    Floats,
    build_accuracy,
    build_loss,
    build_optimizer,
    encode_targets,
    image_weights,
    mix,
)

if TYPE_CHECKING:
    import keras

DIVERGED_FACTOR = 10.0
DIVERGED_EPOCHS = 3
"""Training stops when its loss is above so many times where it started, for so many epochs in a row."""

_COLUMNS = {
    "train_loss": "loss",
    "val_loss": "val_loss",
    "train_accuracy": "accuracy",
    "val_accuracy": "val_accuracy",
}


@dataclass(frozen=True)
class FitPlan:
    """How long a phase is trained, and what it is called."""

    phase: str  # names the checkpoint and the progress bar: head or fine_tune
    block: str  # of params.yaml that holds its learning rate, for messages
    settings: TrainParams | FineTuneParams  # its epochs, patience, batch size and learning rate
    images: int  # training images an epoch
    outputs: int  # of the model: 1 (sigmoid) or the number of classes

    @property
    def chance_loss(self) -> float:
        """The loss of a model that knows nothing."""
        return math.log(max(2, self.outputs))


@dataclass
class FitState:
    """Where a training stands after an epoch; a checkpoint keeps all of it."""

    rows: list[dict[str, float]] = field(default_factory=list)  # of the history
    best_loss: float = math.inf  # lowest validation loss so far
    wait: int = 0  # epochs since then
    best_weights: list[npt.NDArray[Any]] = field(default_factory=list)  # trained ones, of that epoch

    def finished(self, plan: FitPlan) -> bool:
        """Says whether no epoch is left, or too many brought nothing."""
        return len(self.rows) >= plan.settings.epochs or self.wait >= plan.settings.patience


@dataclass(frozen=True)
class FitResult:
    """What a training tells."""

    history: pd.DataFrame  # a row an epoch: epoch (from 1), train_loss, val_loss, train_accuracy, val_accuracy
    images_per_second: float | None  # of the training steps of this process; None where a checkpoint had them all


def fit_head(
    head: keras.Model,
    train: FeatureSet,
    val: FeatureSet,
    params: TrainParams,
    *,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> pd.DataFrame:
    """Fits the head in place, with early stopping on the validation loss; it ends with the best weights.

    Args:
        head: from `model.build_head`.
        train: fits. Where it holds augmented views, each image is shown in one of its views an epoch, drawn anew.
        val: selects the epoch.
        params: everything about the steps: optimizer, loss, batch size, epochs, patience, mixup and so on.
        seed: shuffles the training images, anew in each epoch, and draws views and mixtures.
        checkpoints: a training that was killed goes on from its last one; None keeps none.

    Returns:
        One row an epoch: epoch (from 1), train_loss, val_loss, train_accuracy, val_accuracy.

    Raises:
        CatdogError: the loss became infinite, no number, or far larger than it was.
    """
    outputs = head.output_shape[-1]
    # Several steps a call leave less time to calling.
    trainee = compile_head(head, params, images=len(train.labels), steps_per_execution=8)
    plan = FitPlan("head", "train", params, len(train.labels), outputs)
    result = fit(
        trainee,
        lambda epoch: _training_batches(train, outputs, params, seed=seed, epoch=epoch),
        _validation_batches(val, outputs, max(params.batch_size, 1024)),
        plan,
        checkpoints or Checkpoints(None),
    )
    return result.history


def compile_head(head: keras.Model, params: TrainParams, *, images: int, steps_per_execution: int) -> keras.Model:
    """Returns a compiled model around the head's layers; the head itself stays free of the optimizer.

    The optimizer would be saved with it. XLA compiles for longer than such a head trains, hence without.

    Args:
        head: from `model.build_head`.
        params: optimizer, schedule, loss, batch size and epochs.
        images: training images an epoch.
        steps_per_execution: of the optimizer, a call.
    """
    import keras

    outputs = head.output_shape[-1]
    optimizer = build_optimizer(
        params,
        learning_rate=params.learning_rate,
        schedule=params.schedule,
        warmup=params.warmup,
        epochs=params.epochs,
        steps_per_epoch=math.ceil(images / params.batch_size),
    )
    trainee = keras.Model(head.input, head.output)
    trainee.compile(
        optimizer=optimizer,
        loss=build_loss(params, outputs),
        metrics=[build_accuracy(outputs)],
        jit_compile=False,
        steps_per_execution=steps_per_execution,
    )
    return trainee


def apply_head(head: keras.Model, features: FeatureSet) -> npt.NDArray[np.float32]:
    """Returns the head's logits for every image as it is, float32 [images, 1 or classes], in order."""
    chunks = (shard[start : start + 1024] for shard in features.shards for start in range(0, len(shard), 1024))
    return np.concatenate([np.asarray(head(np.asarray(chunk), training=False), np.float32) for chunk in chunks])


def fit(
    model: keras.Model,
    batches_from: Callable[[int], Any],
    val: Any,
    plan: FitPlan,
    checkpoints: Checkpoints,
    *,
    steps_per_epoch: int | None = None,
) -> FitResult:
    """Fits a compiled model in place, with early stopping on the validation loss; it ends with the best weights.

    Where the optimizer keeps an average of the weights, it is the average that is validated and kept. A killed
    process goes on from the last checkpoint and ends with the same weights, if the data depends on the epoch alone.

    Args:
        model: compiled, with the metric "accuracy".
        batches_from: from the number of the first epoch to train (from 0) to the training data for Keras' `fit`.
        val: the validation data for Keras' `fit`.
        plan: how long.
        checkpoints: where to go on, and where to keep the state.
        steps_per_epoch: where the training data goes on over the epochs without an end of its own.

    Raises:
        CatdogError: the loss became infinite, no number, or far larger than it was.
    """
    state = _resume(model, plan, checkpoints)
    first = len(state.rows)
    bookkeeper = _bookkeeper(state, plan, checkpoints)
    if not state.finished(plan):
        _make_variables(model)
        model.fit(
            batches_from(first),
            validation_data=val,
            initial_epoch=first,
            epochs=plan.settings.epochs,
            steps_per_epoch=steps_per_epoch,
            callbacks=[bookkeeper],
            shuffle=False,  # the batches come shuffled, from the seed; Keras would draw from global state
            verbose=0,
        )
    assign(model.trainable_variables, state.best_weights)
    table = pd.DataFrame(state.rows, columns=list(_COLUMNS))
    table.insert(0, "epoch", range(1, len(table) + 1))
    images = (len(state.rows) - first) * plan.images
    return FitResult(table, images / bookkeeper.seconds if images else None)


def _make_variables(model: keras.Model) -> None:
    """Makes what the optimizer and the metrics keep. TensorFlow traces a step twice that makes variables itself."""
    import keras

    if keras.backend.backend() != "tensorflow" or model.distribute_strategy.num_replicas_in_sync > 1:
        return  # Keras does it
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    outputs = np.zeros((1, *model.output_shape[1:]), np.float32)
    model.compute_metrics(None, outputs, outputs)
    model.reset_metrics()


def best_epoch(history: pd.DataFrame) -> pd.Series:
    """Returns the row of the epoch with the lowest validation loss, whose weights are kept."""
    return history.iloc[int(history["val_loss"].argmin())]


def kept_epoch(history: pd.DataFrame, *, fine_tuned: bool) -> pd.Series:
    """Returns the row of the epoch whose weights the model has: the best one of its phase.

    The losses of the two phases are not compared: each is computed in a precision of its own.

    Args:
        history: from `join_histories`.
        fine_tuned: whether fine-tuning improved the frozen model.
    """
    return best_epoch(history[history["phase"] == ("fine_tune" if fine_tuned else "head")])


def join_histories(head: pd.DataFrame, fine_tuned: pd.DataFrame | None) -> pd.DataFrame:
    """Puts both phases one below the other: a column phase (head or fine_tune), and epochs that go on counting."""
    tables = [head.assign(phase="head")]
    if fine_tuned is not None:
        tables.append(fine_tuned.assign(phase="fine_tune", epoch=fine_tuned["epoch"] + len(head)))
    joined = pd.concat(tables, ignore_index=True)
    return joined[["epoch", "phase", *_COLUMNS]]


def _snapshot(model: keras.Model, state: FitState) -> State:
    meta = {"rows": state.rows, "best_loss": state.best_loss, "wait": state.wait}
    return State({"best": state.best_weights, "current": values_of(changing_variables(model))}, meta)


def _resume(model: keras.Model, plan: FitPlan, checkpoints: Checkpoints) -> FitState:
    """Sets the model to the phase's last checkpoint, if there is one, and returns where the training stood."""
    found = checkpoints.load(plan.phase)
    if found is None:
        return FitState()
    assign(changing_variables(model), found.arrays["current"])
    state = FitState(**found.meta, best_weights=found.arrays["best"])
    print(f"train: going on with {plan.phase} after epoch {len(state.rows)}, from a checkpoint", file=sys.stderr)
    return state


def _bookkeeper(state: FitState, plan: FitPlan, checkpoints: Checkpoints) -> Any:
    """Builds the callback that keeps `state` up to date, shows progress and stops the training.

    Keras' own callbacks do not do: its EarlyStopping forgets the best weights when the process is killed.
    """
    import keras
    from tqdm import tqdm

    class Bookkeeper(keras.callbacks.Callback):  # type: ignore[misc]
        seconds = 0.0  # of training steps

        def on_train_begin(self, logs: Any = None) -> None:
            done = len(state.rows) * plan.images
            total = plan.settings.epochs * plan.images
            name = plan.phase.replace("_", "-")
            # Early stopping may end it sooner: the time left is the longest it can take.
            self.bar = tqdm(
                None, name, total, initial=done, unit=" images", leave=False, disable=not sys.stderr.isatty()
            )

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch, self.started = epoch, time.monotonic()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if not math.isfinite(logs["loss"]):
                raise CatdogError(_not_finite("training loss", logs["loss"], self.epoch, plan))
            seen = min(plan.images, (batch + 1) * plan.settings.batch_size)
            self.bar.update(self.epoch * plan.images + seen - self.bar.n)

        def on_test_begin(self, logs: Any = None) -> None:
            self.seconds += time.monotonic() - self.started
            _swap_averages(self.model)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            row = {name: float(logs[key]) for name, key in _COLUMNS.items()}
            if not math.isfinite(row["val_loss"]):
                raise CatdogError(_not_finite("validation loss", row["val_loss"], epoch, plan))
            state.rows.append(row)
            _refuse_divergence(state, plan)
            state.wait += 1
            if row["val_loss"] < state.best_loss:
                state.best_loss, state.wait = row["val_loss"], 0
                state.best_weights = values_of(self.model.trainable_variables)
            _swap_averages(self.model)
            self.bar.set_postfix(epoch=epoch + 1, loss=f"{row['train_loss']:.4f}", val_loss=f"{row['val_loss']:.4f}")
            # The last state is kept here, before the best weights, or Keras' averages, take its place in the model: a
            # training of more epochs goes on with it.
            self.model.stop_training = state.finished(plan)
            if self.model.stop_training or checkpoints.due():
                checkpoints.save(plan.phase, _snapshot(self.model, state))

        def on_train_end(self, logs: Any = None) -> None:
            self.bar.close()

    return Bookkeeper()


def _swap_averages(model: keras.Model) -> None:
    """Exchanges the trained weights with the optimizer's averages of them, if it keeps such."""
    # Half precision puts an optimizer that scales the loss around the real one.
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not optimizer.use_ema:
        return
    # Keras offers them nowhere else; its callback SwapEMAWeights reads the same attribute.
    averages = optimizer._model_variables_moving_average
    weights = values_of(model.trainable_variables)
    assign(model.trainable_variables, values_of(averages))
    assign(averages, weights)


def _not_finite(name: str, value: float, epoch: int, plan: FitPlan) -> str:
    return f"the {name} became {value} in epoch {epoch + 1} of phase {plan.phase}; {_what_to_try(plan)}"


def _what_to_try(plan: FitPlan) -> str:
    return (
        f"lower {plan.block}.learning_rate (now {plan.settings.learning_rate}), set train.clip_norm=1, or, if it "
        "computes in half precision, set runtime.precision=float32"
    )


def _refuse_divergence(state: FitState, plan: FitPlan) -> None:
    losses = [row["train_loss"] for row in state.rows]
    start = max(losses[0], plan.chance_loss)
    if len(losses) > DIVERGED_EPOCHS and min(losses[-DIVERGED_EPOCHS:]) > DIVERGED_FACTOR * start:
        raise CatdogError(
            f"the training loss of phase {plan.phase} grew from {start:.3g} to {losses[-1]:.3g} in epoch "
            f"{len(losses)}; {_what_to_try(plan)}"
        )


def _training_batches(features: FeatureSet, outputs: int, params: TrainParams, *, seed: int, epoch: int) -> Any:
    """Wraps features for `fit`: batches are read from disk as they are needed, each image once an epoch.

    What a batch holds depends on the seed, the epoch and the batch's number alone, so that a training can be taken
    up at any epoch.
    """
    import keras

    count = len(features.labels)
    targets = encode_targets(features.labels, outputs, params.label_smoothing)
    weights = image_weights(features.labels, params)

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.epoch = epoch
            self._reorder()

        def _reorder(self) -> None:
            rng = np.random.default_rng([seed, self.epoch])
            self.order = rng.permutation(count)
            self.views = rng.integers(0, features.views + 1, count)

        def __len__(self) -> int:
            return math.ceil(count / params.batch_size)

        def __getitem__(self, index: int) -> Batch:
            # Sorted positions read the disk forwards; the order inside a batch does not matter to the gradient.
            positions = np.sort(self.order[index * params.batch_size : (index + 1) * params.batch_size])
            batch = features.take(positions, self.views[positions]), targets[positions], weights[positions]
            return mix(batch, mixup=params.mixup, cutmix=0, rng=np.random.default_rng([seed, self.epoch, index]))

        def on_epoch_end(self) -> None:
            # Keras calls it once before the first epoch as well.
            self.epoch += 1
            self._reorder()

    return Batches()


def _validation_batches(features: FeatureSet, outputs: int, batch_size: int) -> Any:
    """Wraps features for `fit`, in their order, with plain targets."""
    import keras

    targets = encode_targets(features.labels, outputs)

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return math.ceil(len(targets) / batch_size)

        def __getitem__(self, index: int) -> tuple[Floats, Floats]:
            positions = np.arange(len(targets))[index * batch_size : (index + 1) * batch_size]
            return features.take(positions), targets[positions]

    return Batches()
