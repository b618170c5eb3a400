"""Grad-CAM: where in a picture the network found the evidence for a class.

From Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017
(arXiv:1610.02391), equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from catdog.backbones import Backbone, get_backbones
from catdog.errors import CatdogError
from catdog.images import Pixels
from catdog.inference import Engine, openvino_network, run_openvino
from catdog.model import ModelInfo

if TYPE_CHECKING:
    import keras

Heat = npt.NDArray[np.float32]
"""Heat maps, float32 [images, height, width], 0..1, or one of them, [height, width]."""

Explain = Callable[[Pixels, npt.NDArray[np.int64]], Heat]
"""From uint8 pixels [images, size, size, 3] and a class number each, int64 [images], to heat maps [images, size, size].

A network's map has the highest value 1, or is 0 everywhere if nothing in the picture speaks for the class.
"""

_Step = Callable[[Pixels, npt.NDArray[np.float32]], Sequence[npt.NDArray[np.float32]]]
"""From pixels, and the direction of each one's class among the logits [images, logits], to maps [images, h, w]: one a
network."""


def build_gradcam(model: keras.Model, info: ModelInfo, engine: Engine = "keras", *, batch_size: int = 8) -> Explain:
    """Prepares Grad-CAM for a model of this pipeline.

    The gradient is that of the class's logit: where the model is sure, that of its probability vanishes. The negative
    class of a sigmoid has the negative logit. Several joined networks give the mean of their maps.

    Args:
        model: from `model.load_model`; stays as it is.
        info: what it says about itself.
        engine: from `inference.choose_engine`, of the way to the last convolution; what follows is little, and Keras'.
        batch_size: images that are computed at once; it bounds the memory.

    Returns:
        A function for any number of pictures and classes.

    Raises:
        CatdogError: Keras runs on a backend whose gradients are not used here.
    """
    import keras

    backend = keras.backend.backend()
    if backend not in _STEPS:
        raise CatdogError(
            f"Grad-CAM cannot run with the Keras backend {backend}; set evaluate.gradcam to false, or KERAS_BACKEND to "
            f"{' or '.join(_STEPS)}"
        )
    backbones = get_backbones(info.backbone)
    names = ["pooling"] if len(backbones) == 1 else [f"pooling_{backbone.name}" for backbone in backbones]
    branches = [_cut(model, name, backbone) for name, backbone in zip(names, backbones, strict=True)]
    head = model.get_layer("head")

    def maps_of(pixels: Any) -> list[Any]:
        values = keras.ops.cast(pixels, "float32")
        return [branch.bottom(values) for branch in branches]

    def logits_of(maps: Sequence[Any]) -> Any:
        parts = [branch.top(values) for branch, values in zip(branches, maps, strict=True)]
        features = parts[0] if len(parts) == 1 else model.get_layer("pooling")(parts)
        return keras.ops.cast(head(features, training=False), "float32")

    step = _openvino_step(branches, logits_of) if engine == "openvino" else _STEPS[backend](model, maps_of, logits_of)
    size = info.image_size
    directions = np.eye(head.output_shape[-1], dtype=np.float32)
    if len(directions) == 1:
        directions = np.array([[-1], [1]], np.float32)

    def explain(pixels: Pixels, classes: npt.NDArray[np.int64]) -> Heat:
        heat = np.zeros((len(pixels), size, size), np.float32)
        for first in range(0, len(pixels), batch_size):
            batch = slice(first, first + batch_size)
            maps = step(pixels[batch], directions[classes[batch]])
            heat[batch] = np.mean([_enlarge(values, size) for values in maps], axis=0)
        return heat

    return explain


@dataclass(frozen=True)
class _Branch:
    """One network's way from the pixels to its features, cut in two at its last convolutional activation."""

    bottom: Callable[[Any], Any]
    top: Callable[[Any], Any]
    lower: keras.Model  # the part of the network that `bottom` goes through


def _cut(model: keras.Model, pooling: str, backbone: Backbone) -> _Branch:
    """Cuts the way from the pixels to one network's features in two, at its last convolutional activation."""
    import keras

    pool = model.get_layer(pooling)
    # The pixels, the layers of the preprocessing, and the network: one after the other.
    *before, network = keras.Model(model.input, pool.input).operations[1:]
    last = network.get_layer(backbone.last_convolution).output
    lower = keras.Model(network.inputs[0], last)
    upper = None if last is network.outputs[0] else keras.Model(last, network.outputs[0])

    def bottom(values: Any) -> Any:
        for operation in before:
            values = operation(values)
        return lower(values, training=False)

    def top(maps: Any) -> Any:
        return pool(maps if upper is None else upper(maps, training=False))

    return _Branch(bottom, top, lower)


def _tensorflow_step(model: keras.Model, maps_of: Callable[..., Any], logits_of: Callable[..., Any]) -> _Step:
    import tensorflow as tf

    size = model.input_shape[1]
    outputs = model.get_layer("head").output_shape[-1]

    def explain(pixels: Any, directions: Any) -> Any:
        return _weighed(maps_of(pixels), directions, logits_of)

    # One signature for batches of any length: traced once.
    signature = [tf.TensorSpec((None, size, size, 3), tf.uint8), tf.TensorSpec((None, outputs), tf.float32)]
    compute = tf.function(explain, input_signature=signature, autograph=False)
    return lambda pixels, directions: [values.numpy() for values in compute(pixels, directions)]


def _openvino_step(branches: Sequence[_Branch], logits_of: Callable[..., Any]) -> _Step:
    """Takes half the processor time of `_tensorflow_step` for the 72 pictures of a report."""
    import tensorflow as tf

    forwards = [run_openvino(openvino_network(branch.lower, branch.bottom)) for branch in branches]

    def step(pixels: Pixels, directions: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        maps = [tf.constant(forward([pixels])) for forward in forwards]
        return [values.numpy() for values in _weighed(maps, tf.constant(directions), logits_of)]

    return step


def _weighed(maps: Sequence[Any], directions: Any, logits_of: Callable[..., Any]) -> list[Any]:
    """Weighs maps by their gradients, with TensorFlow."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(maps)
        # An image's logits depend on no other's: the gradient of the sum is each one's own.
        score = tf.reduce_sum(logits_of(maps) * directions)
    return [_weigh(*pair) for pair in zip(maps, tape.gradient(score, maps), strict=True)]


def _jax_step(model: keras.Model, maps_of: Callable[..., Any], logits_of: Callable[..., Any]) -> _Step:
    import jax

    def step(pixels: Pixels, directions: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        maps = maps_of(pixels)
        gradients = jax.grad(lambda values: (logits_of(values) * directions).sum())(maps)
        return [np.asarray(_weigh(*pair)) for pair in zip(maps, gradients, strict=True)]

    return step


_STEPS = {"tensorflow": _tensorflow_step, "jax": _jax_step}


def _weigh(maps: Any, gradients: Any) -> Any:
    """Sums the channels of maps [images, h, w, channels], each weighted by its mean gradient; below 0 becomes 0."""
    from keras import ops

    maps, gradients = ops.cast(maps, "float32"), ops.cast(gradients, "float32")
    return ops.relu(ops.sum(maps * ops.mean(gradients, axis=(1, 2), keepdims=True), axis=-1))


def _enlarge(maps: npt.NDArray[np.float32], size: int) -> Heat:
    """Enlarges maps [images, h, w] to [images, size, size], bilinear, and divides each by its highest value."""
    large = np.stack([cv2.resize(values, (size, size), interpolation=cv2.INTER_LINEAR) for values in maps])
    highest = large.max(axis=(1, 2), keepdims=True)
    return np.asarray(np.divide(large, highest, out=np.zeros_like(large), where=highest > 0), np.float32)


def overlay(pixels: Pixels, heat: Heat) -> Pixels:
    """Draws a heat map over its picture: half the picture in grey, half Matplotlib's map "inferno".

    Grey, so that every colour is the map's. From black over purple and orange to pale yellow it grows ever brighter,
    at an even pace, for colour-blind readers as well.

    Args:
        pixels: uint8 [height, width, 3], RGB.
        heat: float32 [height, width], 0..1.

    Returns:
        uint8 [height, width, 3].
    """
    from matplotlib import colormaps

    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., np.newaxis]
    colours = colormaps["inferno"](heat)[..., :3] * 255
    return np.asarray(np.rint((grey + colours) / 2), np.uint8)
