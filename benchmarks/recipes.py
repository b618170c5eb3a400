"""What the usual tutorials do, as they do it.

    python -m benchmarks.recipes RECIPE FOLDER SIZE EPOCHS LIMIT WEIGHTS TOLD

The recipe is that of www.tensorflow.org/tutorials/images/transfer_learning: a frozen MobileNetV2 inside `fit`, behind
layers that flip, rotate and zoom, fed by `image_dataset_from_directory` in batches of 32; dropout 0.2, Adam with a
learning rate of 0.001, 10 epochs. The older tutorials vary and decode picture by picture in Python instead, with
`ImageDataGenerator`; Keras keeps that class for them.

So many EPOCHS are measured, after a few steps that build the graphs. FOLDER holds train, val and test, each with one
folder of JPEG files a class. TOLD receives what was measured, as JSON.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catdog.files import write_json

if TYPE_CHECKING:
    import keras

BATCH = 32
EPOCHS = 10
"""As many as the tutorial trains with a frozen backbone."""
RECIPES = ("image_dataset_from_directory", "ImageDataGenerator")
_SPLITS = ("train", "val", "test")


def main() -> None:
    """Runs a recipe in this process."""
    recipe, folder, size, epochs, limit, weights, told = sys.argv[1:]
    result = run_recipe(recipe, Path(folder), int(size), Path(weights), epochs=int(epochs), limit=int(limit))
    write_json(Path(told), result)


def run_recipe(
    recipe: str, folder: Path, size: int, weights: Path, *, epochs: int = 1, limit: int = 2000
) -> dict[str, Any]:
    """Trains and validates for some epochs, then tests, each on at most `limit` images of its split.

    Args:
        recipe: one of RECIPES.
        folder: holds train, val and test.
        size: pixels a side.
        weights: MobileNetV2's, without the top.
        epochs: 1 to EPOCHS.
        limit: images of a split, rounded up to whole batches.

    Returns:
        epochs; for train, val and test: images in all, images that were measured, and seconds (of one epoch, the mean);
        accuracy on the measured images of the test split.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from catdog.runtime import notices_held_back

    with notices_held_back():
        import keras
        import tensorflow as tf

        tf.zeros(())  # the first operation writes a notice once more

    keras.utils.set_random_seed(20)
    varies_in_python = recipe == "ImageDataGenerator"
    open_split = _generated if varies_in_python else _streamed
    images = {split: sum(1 for _ in (folder / split).rglob("*.jpg")) for split in _SPLITS}
    steps = {split: -(-min(images[split], limit) // BATCH) for split in _SPLITS}
    data = {split: open_split(folder / split, size) for split in _SPLITS}
    model = _build(size, weights, varies=not varies_in_python)
    # Both shuffle on their own; `fit` is told so.
    warm = min(2, steps["train"])
    model.fit(data["train"], epochs=1, steps_per_epoch=warm, shuffle=False, verbose=0)
    model.evaluate(data["val"], steps=1, verbose=0)

    def judge(split: str) -> dict[str, float]:
        told: dict[str, float] = model.evaluate(data[split], steps=steps[split], verbose=0, return_dict=True)
        return told

    seconds = dict.fromkeys(_SPLITS, 0.0)
    for _ in range(epochs):
        started = time.perf_counter()
        model.fit(data["train"], epochs=1, steps_per_epoch=steps["train"], shuffle=False, verbose=0)
        trained = time.perf_counter()
        judge("val")
        seconds["train"] += (trained - started) / epochs
        seconds["val"] += (time.perf_counter() - trained) / epochs
    started = time.perf_counter()
    accuracy = judge("test")["accuracy"]
    seconds["test"] = time.perf_counter() - started
    result: dict[str, Any] = {"epochs": epochs, "accuracy": round(float(accuracy), 6)}
    for split in _SPLITS:
        measured = min(images[split], steps[split] * BATCH)
        result[split] = {"images": images[split], "measured": measured, "seconds": round(seconds[split], 3)}
    return result


def ten_epochs(told: dict[str, Any], process_seconds: float) -> float:
    """The seconds of the recipe with all of its epochs on all images, from what was measured.

    Training and validating an image costs the same in every epoch, so both are scaled by images and epochs; testing
    is done once; what is left of the process, its imports and graphs, is paid once.

    Args:
        told: from `run_recipe`.
        process_seconds: of the process in which that ran.
    """
    seconds = {split: told[split]["seconds"] for split in _SPLITS}
    rest = process_seconds - told["epochs"] * (seconds["train"] + seconds["val"]) - seconds["test"]
    whole = {split: seconds[split] * told[split]["images"] / told[split]["measured"] for split in _SPLITS}
    return float(rest + EPOCHS * (whole["train"] + whole["val"]) + whole["test"])


def _streamed(folder: Path, size: int) -> Any:
    import keras
    import tensorflow as tf

    files = keras.utils.image_dataset_from_directory(
        folder, label_mode="binary", image_size=(size, size), batch_size=BATCH, seed=20, verbose=False
    )
    return files.prefetch(tf.data.AUTOTUNE)


def _generated(folder: Path, size: int) -> Any:
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    # A fifth of a full turn, as the layer below; a generator counts in degrees.
    varied = {"rotation_range": 72, "zoom_range": 0.2, "horizontal_flip": True} if folder.name == "train" else {}
    generator = ImageDataGenerator(preprocessing_function=lambda pixels: pixels / 127.5 - 1, **varied)
    with _silent():
        return generator.flow_from_directory(
            folder, target_size=(size, size), class_mode="binary", batch_size=BATCH, seed=20
        )


def _silent() -> Any:
    import contextlib
    import io

    return contextlib.redirect_stdout(io.StringIO())


def _build(size: int, weights: Path, *, varies: bool) -> keras.Model:
    """The network; `varies` puts the layers that vary the picture, and the scaling of pixels, in front of it."""
    import keras

    network = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(size, size, 3))
    network.load_weights(weights)
    network.trainable = False
    pixels = keras.Input((size, size, 3))
    front: list[Callable[[Any], Any]] = []
    if varies:
        front = [
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomRotation(0.2),
            keras.layers.RandomZoom(0.2),
            keras.layers.Rescaling(1 / 127.5, offset=-1),
        ]
    varied = pixels
    for layer in front:
        varied = layer(varied)
    features = keras.layers.GlobalAveragePooling2D()(network(varied, training=False))
    model = keras.Model(pixels, keras.layers.Dense(1, activation="sigmoid")(keras.layers.Dropout(0.2)(features)))
    # The default of `compile`, jit_compile="auto", would take XLA, which is 15 times slower on a CPU: the kinder one.
    model.compile(keras.optimizers.Adam(0.001), "binary_crossentropy", metrics=["accuracy"], jit_compile=False)
    return model


if __name__ == "__main__":
    main()
