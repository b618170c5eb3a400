"""Fine-tuning: after the head, the top of the backbones is trained on the images themselves.

It is to be kept only where it helps: where no epoch has a better validation loss than the frozen model, that one stays.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.augment import build_augmentation, reseed
from catdog.backbones import Backbone
from catdog.checkpoints import Checkpoints
from catdog.config import AugmentParams, FineTuneParams, TrainParams
from catdog.errors import CatdogError
from catdog.optimization import (
    Batch,
    build_accuracy,
    build_loss,
    build_optimizer,
    encode_targets,
    image_weights,
    mix,
)
from catdog.parallel import processors
from catdog.records import untuned
from catdog.shares import Share, current_share
from catdog.training import FitPlan, fit

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

SHUFFLE_BYTES = 128_000_000
"""Memory for the stored pictures among which the next one is drawn; small data sets are shuffled as a whole."""
_FILES_AT_ONCE = 16


@dataclass(frozen=True)
class Images:
    """The stored images of one split."""

    shards: tuple[Path, ...]  # TFRecord files, in order
    labels: npt.NDArray[np.int64]  # class numbers, in the order of the records


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning brought."""

    history: pd.DataFrame  # as `training.fit_head` returns it, epochs from 1
    improved: bool  # whether an epoch has a lower validation loss than the model had before
    frozen_loss: float  # validation loss before
    unfrozen: tuple[str, ...]  # the first layer that was trained, one a backbone; "" where none was
    images_per_second: float | None  # of the training steps; None where a checkpoint held them all

    def report(self) -> dict[str, str | int | float]:
        """Returns what goes into the stage's report: nothing that differs from run to run."""
        return {
            "kept": "yes" if self.improved else "no: the frozen model is better",
            "from_layer": ", ".join(name or "none" for name in self.unfrozen),
            "epochs": len(self.history),
            "best_val_loss": round(float(self.history["val_loss"].min()), 6),
            "frozen_val_loss": round(self.frozen_loss, 6),
        }


def unfreeze(networks: Sequence[keras.Model], backbones: Sequence[Backbone], layers: int | str) -> tuple[str, ...]:
    """Makes the top of the networks trainable, and all below it not. BatchNorm stays frozen everywhere.

    Args:
        networks: in the same order as `backbones`; changed in place.
        backbones: their records.
        layers: a number of layers from the top; the name of the first layer, of any of the networks (those without
            such a layer stay frozen); last_block, from `Backbone.fine_tune_from` on; or all.

    Returns:
        The name of the first trainable layer of each network, "" where there is none.

    Raises:
        CatdogError: no network has such a layer or so many; or what it reaches has no weights to train.
    """
    starts = [_first_layer(network, backbone, layers) for network, backbone in zip(networks, backbones, strict=True)]
    if all(start is None for start in starts):
        names = [layer.name for network in networks for layer in network.layers]
        close = difflib.get_close_matches(str(layers), ["last_block", "all", *names], n=3, cutoff=0.4)
        where = " or ".join(backbone.name for backbone in backbones)
        raise CatdogError(
            f"fine_tune.layers = {layers!r} is no layer of {where}; "
            + (f"did you mean {' or '.join(close)}?" if close else "use a number of layers, last_block, or all")
        )
    first_trained = []
    for network, start in zip(networks, starts, strict=True):
        trained = ""
        for position, layer in enumerate(network.layers):
            layer.trainable = start is not None and position >= start and not _is_batch_norm(layer)
            if layer.trainable_weights and not trained:
                trained = layer.name
        first_trained.append(trained)
    for backbone, start, trained in zip(backbones, starts, first_trained, strict=True):
        if start is not None and not trained:
            raise CatdogError(
                f"fine_tune.layers = {layers!r} reaches no weights of {backbone.name} but those of BatchNorm, which "
                "stay as they are; use more layers, last_block, or all"
            )
    return tuple(first_trained)


def _first_layer(network: keras.Model, backbone: Backbone, layers: int | str) -> int | None:
    names = [layer.name for layer in network.layers]
    if isinstance(layers, int):
        if layers > len(names):
            raise CatdogError(
                f"fine_tune.layers = {layers} is more than the {len(names)} layers of {backbone.name}; use all"
            )
        return len(names) - layers
    if layers == "all":
        return 0
    name = backbone.fine_tune_from if layers == "last_block" else layers
    return names.index(name) if name in names else None


def _is_batch_norm(layer: keras.layers.Layer) -> bool:
    import keras

    return isinstance(layer, keras.layers.BatchNormalization)


def fine_tune(
    model: keras.Model,
    networks: Sequence[keras.Model],
    backbones: Sequence[Backbone],
    train: Images,
    val: Images,
    params: FineTuneParams,
    train_params: TrainParams,
    augment_params: AugmentParams,
    *,
    seed: int,
    checkpoints: Checkpoints | None = None,
    jit_compile: bool = False,
) -> FineTuned:
    """Trains the head and the top of the backbones in place, with early stopping on the validation loss.

    The model ends with the weights of its best epoch, also where that is worse than no fine-tuning: give it a copy,
    and take the weights over where the result improved.

    Args:
        model: from `model.assemble`, with the fitted head, of any precision; built inside `runtime.distribution`
            where several devices share the work, as this call then is.
        networks: the backbones in it; their layers stay as trainable as this makes them.
        backbones: their records, in the same order.
        train: fits; varied on the fly, each image anew in each epoch.
        val: selects the epoch.
        params: which layers, learning rate, epochs and so on.
        train_params: optimizer, loss, label smoothing, mixup, class weights, clip_norm and ema, as for the head.
        augment_params: how the images are varied where params.augment is set.
        seed: shuffles and varies the images, and draws mixtures.
        checkpoints: a training that was killed goes on from its last one; None keeps none.
        jit_compile: whether the steps are compiled with XLA.

    Raises:
        CatdogError: as `unfreeze`; or the loss became infinite, no number, or far larger than it was.
    """
    import keras

    image_size = model.input_shape[1]
    outputs = model.output_shape[-1]
    steps = math.ceil(len(train.labels) / params.batch_size)
    unfrozen = unfreeze(networks, backbones, params.layers)
    # Up to the logits: the loss is exact there, where a probability would be rounded to 0 or 1.
    trainee = keras.Model(model.input, model.get_layer("probabilities").input)
    trainee.compile(
        optimizer=build_optimizer(
            train_params,
            learning_rate=params.learning_rate,
            schedule="cosine",
            warmup=params.warmup,
            epochs=params.epochs,
            steps_per_epoch=steps,
        ),
        loss=build_loss(train_params, outputs),
        metrics=[build_accuracy(outputs)],
        jit_compile=jit_compile,
    )
    share = current_share()
    val_batches = _validation_batches(val, image_size, outputs, params.batch_size, share)
    # Measured the same way as the epochs to come, not taken from the head's history: another engine may have made
    # the features, in another precision.
    frozen_loss = float(trainee.evaluate(val_batches, verbose=0, return_dict=True)["loss"])
    plan = FitPlan("fine_tune", "fine_tune", params, len(train.labels), outputs)
    result = fit(
        trainee,
        lambda epoch: _restartable(
            lambda: _training_batches(
                train, image_size, outputs, params, train_params, augment_params, share, seed=seed, first_epoch=epoch
            ),
            image_size,
            outputs,
        ),
        val_batches,
        plan,
        checkpoints or Checkpoints(None),
        steps_per_epoch=steps,
    )
    improved = bool(result.history["val_loss"].min() < frozen_loss)
    return FineTuned(result.history, improved, frozen_loss, unfrozen, result.images_per_second)


def _restartable(batches: Callable[[], Iterator[Batch]], image_size: int, outputs: int) -> tf.data.Dataset:
    """Wraps a generator for `fit`, and runs it ahead of the training.

    Keras reads from its data before the first epoch, and begins anew then: a plain generator would have moved on.
    """
    import tensorflow as tf

    shapes = [(None, image_size, image_size, 3), (None, outputs), (None,)]
    signature = tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes)
    return untuned(tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(2))


def _training_batches(
    images: Images,
    image_size: int,
    outputs: int,
    params: FineTuneParams,
    train_params: TrainParams,
    augment_params: AugmentParams,
    share: Share,
    *,
    seed: int,
    first_epoch: int,
) -> Iterator[Batch]:
    """Yields this process's share of the batches of one epoch after another.

    What a batch holds depends on the seed, the epoch and its place alone, so that a training can be taken up at any
    epoch, and that all workers of a job take their parts of the same batch. Each of them makes the whole batch first:
    an image is varied as its place in it says, and mixed with any other of it. The pictures are read and decoded
    ahead, in parallel.
    """
    import keras

    augmentation = build_augmentation(augment_params, image_size, seed) if params.augment else None
    weight_of = dict(zip(images.labels.tolist(), image_weights(images.labels, train_params), strict=True))
    for epoch in range(first_epoch, params.epochs):
        dataset = _shuffled(images, seed=seed, epoch=epoch).batch(params.batch_size).prefetch(2)
        for index, (pixels, labels) in enumerate(dataset.as_numpy_iterator()):
            values = pixels.astype(np.float32)
            if augmentation is not None:
                reseed(augmentation, [seed, epoch, index])
                values = keras.ops.convert_to_numpy(augmentation(values))
            weights = np.array([weight_of[label] for label in labels.tolist()], np.float32)
            targets = encode_targets(labels, outputs, train_params.label_smoothing)
            # One number more than the augmentation's seed: other draws.
            rng = np.random.default_rng([seed, epoch, index, 1])
            batch = mix((values, targets, weights), mixup=train_params.mixup, cutmix=params.cutmix, rng=rng)
            yield share.cut(_evenly(batch, share))


def _evenly(batch: Batch, share: Share) -> Batch:
    """Fills a training batch up; what its images weigh makes up for the fillers in the mean that the loss is."""
    pixels, targets, weights = share.fill(batch)
    if len(pixels) == len(batch[0]):
        return batch
    return pixels, targets, weights * np.float32(len(pixels) / len(batch[0]))


def _shuffled(images: Images, *, seed: int, epoch: int) -> tf.data.Dataset:
    """Reads each image once, in an order that depends on seed and epoch: pixels uint8 [size, size, 3], label int64."""
    import tensorflow as tf

    rng = np.random.default_rng([seed, epoch])
    shards = [str(images.shards[position]) for position in rng.permutation(len(images.shards))]
    # Stored pictures are shuffled, not decoded ones, which take ten times the memory.
    record_bytes = sum(shard.stat().st_size for shard in images.shards) / len(images.labels)
    buffer = max(1, min(len(images.labels), int(SHUFFLE_BYTES / record_bytes)))
    return untuned(
        # From many files in turn: shards may hold one class each.
        tf.data.Dataset.from_tensor_slices(shards)
        .interleave(tf.data.TFRecordDataset, cycle_length=min(_FILES_AT_ONCE, len(shards)), block_length=1)
        .shuffle(buffer, seed=int(rng.integers(2**31)), reshuffle_each_iteration=False)
        .map(_decode, num_parallel_calls=processors())
    )


def _validation_batches(
    images: Images, image_size: int, outputs: int, batch_size: int, share: Share
) -> tf.data.Dataset:
    """Reads this process's share of the images in their order, for `fit`: each exactly once in all processes.

    The last batch is as small as it comes out, filled up only where several devices share it.
    """
    import tensorflow as tf

    shards = [str(shard) for shard in images.shards]
    target_of = encode_targets(np.arange(max(2, outputs)), outputs)

    def to_target(pixels: Any, labels: Any) -> tuple[Any, Any]:
        return tf.cast(pixels, tf.float32), tf.gather(target_of, labels)

    dataset = tf.data.TFRecordDataset(shards).map(_decode, num_parallel_calls=processors())
    dataset = untuned(dataset.batch(batch_size).map(to_target).prefetch(2))
    # Keras wants to know the number; a shard that holds more or fewer images than the labels is an error.
    count = math.ceil(len(images.labels) / batch_size)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(count))
    if share.devices == 1:
        return dataset
    # Keras' mean over an epoch counts fillers as images without a loss.
    whole, rest = divmod(len(images.labels), batch_size)
    places = whole * share.filled_size(batch_size) + share.filled_size(rest)
    weight = np.float32(places / len(images.labels))

    def parts() -> Iterator[Batch]:
        for pixels, targets in dataset.as_numpy_iterator():
            weights = np.full(len(pixels), weight, np.float32)
            yield share.cut(share.fill((pixels, targets, weights)))

    divided = _restartable(parts, image_size, outputs)
    return divided.apply(tf.data.experimental.assert_cardinality(count))


def _decode(record: Any) -> tuple[Any, Any]:
    import tensorflow as tf

    schema = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }
    example = tf.io.parse_single_example(record, schema)
    # The accurate transform, as `records.RecordReader` decodes: the very pixels that embed saw.
    pixels = tf.io.decode_jpeg(example["image/encoded"], channels=3, dct_method="INTEGER_ACCURATE")
    return pixels, example["image/class/label"]
