"""Varied copies of training images: turned, moved, zoomed and coloured a little, as the seed says.

The work is done by two Keras layers. One moves pixels: flip, rotation, zoom, shear and translation are one map of the
plane, so that a picture is interpolated once; Keras' own layers, one after another, would blur it four times and take
four times as long. The other changes colours, also in one step. Both run under every backend of Keras.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catdog.config import AugmentParams
from catdog.errors import CatdogError
from catdog.images import Pixels
from catdog.plots import plot_picture_rows
from catdog.records import RecordReader

if TYPE_CHECKING:
    import keras

_AMOUNTS = ("rotation", "zoom", "shear", "translation", "brightness", "contrast", "saturation")
_PREVIEW_ROWS = 8
_PREVIEW_COPIES = 7
# How bright red, green and blue look: Recommendation ITU-R BT.601, as JPEG uses it.
_LUMA = (0.299, 0.587, 0.114)


def require_variation(params: AugmentParams) -> None:
    """Refuses copies that would all be the same as their original.

    Raises:
        CatdogError: augment.views is above 0, but nothing is varied.
    """
    varied = params.randaugment or params.flip != "none" or any(getattr(params, name) for name in _AMOUNTS)
    if params.views and not varied:
        raise CatdogError(
            f"augment.views = {params.views} asks for varied copies, but nothing is varied; set augment.views to 0, or "
            f"one of flip, {', '.join(_AMOUNTS)} and randaugment in the block augment"
        )


def build_augmentation(params: AugmentParams, image_size: int, seed: int) -> keras.layers.Pipeline:
    """Builds the layers that vary a batch of pictures, each picture in its own way.

    Call it on a batch, `augmentation(pixels)`, or hand it to `tf.data.Dataset.map` after `batch`, which works under
    every backend. Each call draws anew from the layers' seed generators; `reseed` sets them back.

    Args:
        params: how much is varied; a layer without anything to do is left out.
        image_size: pixels a side.
        seed: what the first draws come from.

    Returns:
        From float32 [batch, size, size, 3] in 0..255 to the same. It computes in float32 under every precision policy.
        It always varies, unless called with `training=False`.
    """
    import keras

    layers: list[keras.layers.Layer] = []
    if params.randaugment:
        layers.append(_rand_augment(params))
    else:
        if params.flip != "none" or params.rotation or params.zoom or params.shear or params.translation:
            layers.append(_random_geometry(params, image_size))
        if params.brightness or params.contrast or params.saturation or not layers:  # a pipeline needs a layer
            layers.append(_random_color(params))
    # A generator of its own for each: two that start alike would draw the same numbers.
    for number, layer in enumerate(layers):
        layer.seed = _seed(seed, number)
        layer.generator = keras.random.SeedGenerator(layer.seed)
    return keras.layers.Pipeline(layers, name="augmentation")


def reseed(augmentation: keras.layers.Pipeline, key: Sequence[int]) -> None:
    """Makes the next draws depend on the key alone: so that it does not matter what was drawn before.

    It does not reach into a tf.data pipeline under another backend than TensorFlow; build anew there.

    Args:
        augmentation: from `build_augmentation`.
        key: numbers of 0 and above, e.g. the seed, the epoch and the batch.
    """
    for number, layer in enumerate(augmentation.layers):
        layer.generator.state.assign([_seed(*key, number), 0])


def augmented(pixels: Pixels, augmentation: keras.layers.Pipeline, key: Sequence[int]) -> Pixels:
    """Returns one varied copy of each picture, which depends on the arguments alone.

    Args:
        pixels: uint8 [batch, size, size, 3].
        augmentation: from `build_augmentation`; its generators are set from the key.
        key: numbers of 0 and above that tell this batch of copies from every other one.

    Returns:
        uint8 [batch, size, size, 3].
    """
    import keras

    reseed(augmentation, key)
    varied = keras.ops.convert_to_numpy(augmentation(pixels.astype(np.float32)))
    return np.asarray(np.rint(varied), np.uint8)


def write_preview(
    shards: Sequence[Path], class_names: Sequence[str], params: AugmentParams, *, seed: int, path: Path
) -> None:
    """Draws a few training images, one a row: the image as it is, and beside it seven varied copies.

    Args:
        shards: the TFRecord files of the training images; the pictures are taken from all over them.
        class_names: by number.
        params: how much is varied.
        seed: draws the copies.
        path: the PNG file.
    """
    chosen = []
    for row in range(_PREVIEW_ROWS):
        reader = RecordReader([shards[row * len(shards) // _PREVIEW_ROWS]], _PREVIEW_ROWS)
        pixels = next(iter(reader))
        position = row % len(pixels)
        chosen.append((pixels[position], class_names[reader.labels[position]]))
    pictures = np.stack([picture for picture, _ in chosen])
    augmentation = build_augmentation(params, pictures.shape[1], seed)
    columns = [pictures, *(augmented(pictures, augmentation, [seed, copy]) for copy in range(_PREVIEW_COPIES))]
    rows = [(name, [column[row] for column in columns]) for row, (_, name) in enumerate(chosen)]
    plot_picture_rows(rows, path, title=f"training images, and {_PREVIEW_COPIES} varied copies of each")


def _seed(*key: int) -> int:
    """Mixes numbers of 0 and above into one that every backend takes as a seed, 0..2^31 - 1."""
    # With the length: to NumPy, a key and the same key with zeros behind it are one.
    return int(np.random.SeedSequence([len(key), *key]).generate_state(1)[0] >> 1)


# Keras' base class of image layers, which makes them run in tf.data under every backend, is not public. The layers
# below subclass one of its public subclasses, and override its two methods: what is drawn, and how a batch changes by
# it. A number is drawn even where its amount is 0, so that one parameter does not change what another one draws.


def _random_geometry(params: AugmentParams, size: int) -> keras.layers.Layer:
    import keras

    class RandomGeometry(keras.layers.RandomRotation):  # type: ignore[misc]
        def get_random_transformation(self, data: Any, training: bool = True, seed: Any = None) -> Any:
            numpy = self.backend.numpy
            draws = _draw(self, data, 7, seed)
            angle = draws[0] * (params.rotation * 2 * math.pi)
            zoom = 1 + draws[1] * params.zoom
            shear = draws[2] * params.shear
            flip_x, flip_y = (
                numpy.where(draw < 0, -1.0, 1.0) if params.flip in (kind, "both") else numpy.ones_like(draw)
                for kind, draw in (("horizontal", draws[5]), ("vertical", draws[6]))
            )
            cosine, sine = numpy.cos(angle) * zoom, numpy.sin(angle) * zoom
            # From a place in the result to the place in the picture that it shows, both measured from the centre:
            # flipped, sheared, turned, zoomed.
            matrix = (
                (cosine * flip_x, (cosine * shear - sine) * flip_y),
                (sine * flip_x, (sine * shear + cosine) * flip_y),
            )
            center = (size - 1) / 2
            terms = []
            for (of_x, of_y), shift in zip(matrix, (draws[3], draws[4]), strict=True):
                terms += [of_x, of_y, center - center * (of_x + of_y) + shift * (params.translation * size)]
            zero = numpy.zeros_like(angle)
            return numpy.stack([*terms, zero, zero], axis=1)

        def transform_images(self, images: Any, transformation: Any, training: bool = True) -> Any:
            if not training:
                return images
            # A border that mirrors the picture looks most like a picture. Interpolating 255 can give a hair more.
            moved = self.backend.image.affine_transform(images, transformation, "bilinear", "reflect")
            return self.backend.numpy.clip(moved, 0, 255)

    return RandomGeometry(0.0, dtype="float32", name="geometry")


def _random_color(params: AugmentParams) -> keras.layers.Layer:
    import keras

    class RandomColor(keras.layers.RandomBrightness):  # type: ignore[misc]
        def get_random_transformation(self, data: Any, training: bool = True, seed: Any = None) -> Any:
            draws = _draw(self, data, 3, seed)
            brightness = draws[0] * (params.brightness * 255)
            contrast = 1 + draws[1] * params.contrast
            saturation = 1 + draws[2] * params.saturation
            return brightness, contrast, saturation

        def transform_images(self, images: Any, transformation: Any, training: bool = True) -> Any:
            if not training:
                return images
            numpy = self.backend.numpy
            brightness, contrast, saturation = (numpy.reshape(factor, (-1, 1, 1)) for factor in transformation)
            luma = numpy.reshape(self.backend.convert_to_tensor(_LUMA, "float32"), (1, 3, 1))
            # Saturation: away from, or towards, the grey of the same brightness. Contrast: likewise, the mean grey of
            # the picture. Together one 3x3 matrix and one number that is added, a picture.
            matrix = contrast * (saturation * numpy.eye(3) + (1 - saturation) * luma)
            mean = numpy.matmul(numpy.mean(images, axis=(1, 2))[:, None], luma)
            shape = self.backend.shape(images)
            flat = numpy.reshape(images, (shape[0], -1, 3))
            varied = numpy.matmul(flat, matrix) + ((1 - contrast) * mean + brightness)
            return numpy.reshape(numpy.clip(varied, 0, 255), shape)

    return RandomColor(0.0, dtype="float32", name="color")


def _rand_augment(params: AugmentParams) -> keras.layers.Layer:
    """Keras' RandAugment with the paper's strengths, and without computing the operations that are not drawn.

    E. Cubuk and others, "RandAugment: Practical automated data augmentation with a reduced search space", 2020;
    magnitude 1 is the end of each operation's range there. Keras' own strengths at magnitude 0.3 turn by up to 108
    degrees, and one way only, keep two bits of each colour, and solarize nearly the whole picture.
    """
    import keras

    class RandAugment(keras.layers.RandAugment):  # type: ignore[misc]
        _AUGMENT_LAYERS = tuple(name for name in keras.layers.RandAugment._AUGMENT_LAYERS if name != "solarization")

        def transform_images(self, images: Any, transformation: Any, training: bool = True) -> Any:
            if not training:
                return images
            branches = [
                lambda batch, name=name, drawn=drawn: getattr(self, name).transform_images(batch, drawn)
                for name, drawn in transformation["transforms"].items()
            ]
            for number in range(self.num_ops):
                index = transformation["layer_idxes"][number]
                if self.backend.name == "tensorflow":  # also in tf.data, where the index has no value yet
                    images = self.backend.core.switch(index, branches, images)
                else:
                    images = branches[int(index)](images)
            return self.backend.numpy.clip(images, 0, 255)

    amount = params.magnitude
    pixels: dict[str, Any] = {"value_range": (0, 255), "dtype": "float32"}
    layer = RandAugment(num_ops=params.randaugment, factor=amount, **pixels)
    layer.random_rotation = keras.layers.RandomRotation(30 / 360 * amount, dtype="float32")
    layer.random_shear = keras.layers.RandomShear(0.3 * amount, 0.3 * amount, dtype="float32")
    layer.random_translation = keras.layers.RandomTranslation(0.45 * amount, 0.45 * amount, dtype="float32")
    layer.random_brightness = keras.layers.RandomBrightness(0.9 * amount, **pixels)
    layer.random_contrast = keras.layers.RandomContrast(0.9 * amount, **pixels)
    layer.random_sharpness = keras.layers.RandomSharpness((0.5 - 0.45 * amount, 0.5 + 0.45 * amount), **pixels)
    layer.random_posterization = keras.layers.RandomPosterization(8 - round(4 * amount), **pixels)
    return layer


def _draw(layer: keras.layers.Layer, pixels: Any, count: int, seed: Any) -> Any:
    """Returns so many numbers for each picture of a batch, float32 [count, batch], each between -1 and 1."""
    ops = layer.backend
    generator = layer._get_seed_generator(ops._backend) if seed is None else seed
    return ops.random.uniform((count, ops.shape(pixels)[0]), -1.0, 1.0, "float32", seed=generator)
