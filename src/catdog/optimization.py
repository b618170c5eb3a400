"""What head and fine-tuning optimize, and how: the steps, the loss, the targets, and mixed batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from catdog.config import TrainParams
from catdog.errors import CatdogError

if TYPE_CHECKING:
    import keras

Floats = npt.NDArray[np.float32]
Batch = tuple[Floats, Floats, Floats]
"""Inputs [batch, ...], targets [batch, outputs], weights of the images [batch]."""

NO_IMAGE = -1.0
"""Target of a place in a batch that holds no image (`shares.Share.fill`): no metric counts it."""

FOCUS = 2.0
"""Lin et al. found 2 to be the best exponent of the focal loss (table 1b)."""


def build_optimizer(
    params: TrainParams,
    *,
    learning_rate: float,
    schedule: Literal["constant", "cosine"],
    warmup: int,
    epochs: int,
    steps_per_epoch: int,
) -> keras.optimizers.Optimizer:
    """Builds the optimizer that `params` name, with its learning rate by step.

    Args:
        params: optimizer, clip_norm (of the gradient of all weights together) and ema.
        learning_rate: the highest step size.
        schedule: constant, or along a cosine to 0 at the last step.
        warmup: epochs over which the step size rises, step by step; it counts among `epochs`.
        epochs: at most; early stopping does not shorten the schedule.
        steps_per_epoch: batches an epoch.

    Raises:
        CatdogError: the warm-up is longer than the training.
    """
    import keras

    rate: Any = learning_rate
    if warmup > epochs:
        raise CatdogError(f"a warm-up of {warmup} epochs does not fit into {epochs}; lower warmup or raise epochs")
    warmup_steps, steps = warmup * steps_per_epoch, epochs * steps_per_epoch
    # From one part of the way, not from 0, which would waste the first step.
    first = learning_rate / warmup_steps if warmup_steps else learning_rate
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            first, max(1, steps - warmup_steps), warmup_target=learning_rate, warmup_steps=warmup_steps
        )
    elif warmup_steps:
        rate = keras.optimizers.schedules.PolynomialDecay(first, warmup_steps, end_learning_rate=learning_rate)
    common = {
        "learning_rate": rate,
        "global_clipnorm": params.clip_norm or None,
        "use_ema": params.ema > 0,
        "ema_momentum": params.ema,
    }
    match params.optimizer:
        case "adam":
            return keras.optimizers.Adam(**common)
        case "adamw":
            return keras.optimizers.AdamW(**common)
        case "rmsprop":
            return keras.optimizers.RMSprop(**common)
        case "sgd":
            return keras.optimizers.SGD(**common)
        case "momentum":
            return keras.optimizers.SGD(momentum=0.9, nesterov=True, **common)


def build_loss(params: TrainParams, outputs: int) -> Any:
    """Builds the loss on logits for `compile`.

    Args:
        params: crossentropy or focal.
        outputs: 1 (the logit of the second class) or the number of classes (softmax).

    Returns:
        A loss of targets [batch, outputs], as `encode_targets` makes them, and logits [batch, outputs].
    """
    import keras

    if params.loss == "focal":
        return focal_loss
    return (
        keras.losses.BinaryCrossentropy(from_logits=True)
        if outputs == 1
        else keras.losses.CategoricalCrossentropy(from_logits=True)
    )


def focal_loss(targets: Any, logits: Any) -> Any:
    """Computes the focal loss: cross-entropy times (1 - p)^2, so that images that are right already count less.

    T.-Y. Lin and others, "Focal loss for dense object detection", 2017, with the exponent `FOCUS` and without the
    class factor alpha, for which there is `train.class_weights`. For soft targets it is the mean over the classes,
    weighted by the target.

    Args:
        targets: float [batch, outputs], shares of the classes.
        logits: float [batch, outputs]; one output is the logit of the second class.

    Returns:
        float [batch].
    """
    from keras import ops

    if logits.shape[-1] == 1:
        targets, logits = targets[:, 0], logits[:, 0]
        # softplus(-x) is -log sigmoid(x), also where the sigmoid itself is rounded to 0.
        second = ops.power(ops.sigmoid(-logits), FOCUS) * ops.softplus(-logits)
        first = ops.power(ops.sigmoid(logits), FOCUS) * ops.softplus(logits)
        return targets * second + (1 - targets) * first
    logs = ops.log_softmax(logits, axis=-1)
    return -ops.sum(targets * ops.power(1 - ops.exp(logs), FOCUS) * logs, axis=-1)


def build_accuracy(outputs: int) -> keras.metrics.Metric:
    """Builds the share of images whose most probable class is the one with the largest target."""
    import keras

    # On logits the boundary between two classes is 0, the probability one half. Rounded targets, because
    # BinaryAccuracy would count a smoothed or mixed one as always wrong.
    def right(targets: Any, logits: Any) -> Any:
        agree = keras.ops.equal(targets > 0.5, logits > 0)
        return keras.ops.mean(keras.ops.cast(agree, "float32"), axis=-1)

    class Accuracy(keras.metrics.MeanMetricWrapper):  # type: ignore[misc]
        def update_state(self, targets: Any, logits: Any, sample_weight: Any = None) -> None:
            # Every image counts the same, whatever it weighs in the loss.
            is_image = keras.ops.cast(targets[:, 0] != NO_IMAGE, "float32")
            super().update_state(targets, logits, sample_weight=is_image)

    return Accuracy(right if outputs == 1 else keras.metrics.categorical_accuracy, name="accuracy")


def encode_targets(labels: npt.NDArray[np.int64], outputs: int, smoothing: float = 0.0) -> Floats:
    """Encodes class numbers as targets of the loss.

    Smoothing (C. Szegedy and others, "Rethinking the Inception architecture", 2016) belongs to training only: a
    validation loss with it could not be compared between runs.

    Args:
        labels: class numbers [batch].
        outputs: 1 for two classes and one logit, else the number of classes.
        smoothing: share of the target that is spread evenly over all classes, 0 to below 1.

    Returns:
        float32 [batch, outputs]: the share of the second class, or of each class.
    """
    classes = max(2, outputs)
    shares = np.eye(classes, dtype=np.float32)[labels] * np.float32(1 - smoothing) + np.float32(smoothing / classes)
    return shares[:, 1:] if outputs == 1 else shares


def image_weights(labels: npt.NDArray[np.int64], params: TrainParams) -> Floats:
    """Returns what each training image counts for, float32 [images]: 1, or n / (classes * images of its class).

    The latter is scikit-learn's "balanced": every class counts the same, and the mean over all images is 1.
    """
    if params.class_weights == "none":
        return np.ones(len(labels), np.float32)
    counts = np.bincount(labels)
    present = np.count_nonzero(counts)
    return (len(labels) / (present * counts[labels])).astype(np.float32)


def mix(batch: Batch, *, mixup: float, cutmix: float, rng: np.random.Generator) -> Batch:
    """Mixes every image of a batch with another one of it, and their targets and weights in the same shares.

    mixup (H. Zhang and others, 2018) blends two inputs; CutMix (S. Yun and others, 2019) puts a rectangle of one
    image into the other. The share is drawn from Beta(alpha, alpha), once a batch. With both, a coin decides.

    Args:
        batch: inputs [batch, n] or, as CutMix needs them, [batch, height, width, channels]; they stay unchanged.
        mixup: its alpha, 0: off.
        cutmix: its alpha, 0: off.
        rng: source of the draws.

    Returns:
        A batch of the same shapes and types.
    """
    if not mixup and not cutmix:
        return batch
    inputs, targets, weights = batch
    partners = rng.permutation(len(inputs))
    cut = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    if cut:
        mixed = inputs.copy()
        rows, columns = _rectangle(inputs.shape[1], inputs.shape[2], 1 - share, rng)
        mixed[:, rows, columns] = inputs[partners][:, rows, columns]
        # Of the rectangle as it was drawn: the border may have cut it.
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = 1 - area / (inputs.shape[1] * inputs.shape[2])
    else:
        mixed = _blend(inputs, partners, share)
    return mixed, _blend(targets, partners, share), _blend(weights, partners, share)


def _blend(values: Floats, partners: npt.NDArray[np.int64], share: float) -> Floats:
    return np.float32(share) * values + np.float32(1 - share) * values[partners]


def _rectangle(height: int, width: int, area: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draws a rectangle of the picture's aspect with this share of its area, its centre anywhere in the picture."""
    side = np.sqrt(area)
    bounds = []
    for length in (height, width):
        centre, half = rng.integers(length), round(side * length) // 2
        bounds.append(slice(int(max(0, centre - half)), int(min(length, centre + half))))
    return bounds[0], bounds[1]
