"""The classifier: pixels in, probabilities out, everything it needs inside one file."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from catdog.backbones import Backbone, preprocess
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.files import ZIP_DATE, written_aside
from catdog.images import ResizeMode

if TYPE_CHECKING:
    import keras

Pooling = Literal["avg", "max", "flatten"]
Output = Literal["sigmoid", "softmax"]

_INFO_MEMBER = "catdog.json"


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about itself beside the network: how to feed it and how to read it."""

    class_names: tuple[str, ...]  # position = number of the class
    image_size: int  # pixels a side
    resize: ResizeMode
    jpeg_quality: int
    backbone: str  # as in params.yaml: one name, or several joined by +
    weights: str
    pooling: Pooling
    threshold: float = 0.5  # two classes: the probability from which the second is predicted
    temperature: float = 1.0  # by which the model divides its logits; it already does


def choose_output(output: Literal["auto", "sigmoid", "softmax"], class_count: int) -> Output:
    """Returns the kind of output layer; raises CatdogError for a sigmoid on more than two classes."""
    if output == "auto":
        return "sigmoid" if class_count == 2 else "softmax"
    if output == "sigmoid" and class_count != 2:
        raise CatdogError(
            f"train.output = 'sigmoid' tells two classes apart, but the data has {class_count}; use softmax or auto"
        )
    return output


def build_extractor(
    networks: Sequence[keras.Model], backbones: Sequence[Backbone], image_size: int, pooling: Pooling
) -> keras.Model:
    """Builds the frozen part: pixels to the features of all networks, one network's after another's.

    Args:
        networks: from `backbones.build_backbone`, for `image_size`.
        backbones: their records, in the same order, each once.
        image_size: pixels a side.
        pooling: how a network's last feature map becomes a vector.

    Returns:
        float32 pixels [batch, size, size, 3], RGB in 0..255, to features [batch, n]; they are the output of the
        layer "pooling", of one network or of several.
    """
    import keras

    pixels = keras.Input((image_size, image_size, 3), name="pixels")
    return keras.Model(pixels, _joined_features(pixels, networks, backbones, pooling), name="extractor")


def _joined_features(
    pixels: keras.KerasTensor, networks: Sequence[keras.Model], backbones: Sequence[Backbone], pooling: Pooling
) -> keras.KerasTensor:
    import keras

    if len(networks) == 1:
        return _features(pixels, networks[0], backbones[0], pooling)
    parts = [
        _features(pixels, network, backbone, pooling, suffix=f"_{backbone.name}")
        for network, backbone in zip(networks, backbones, strict=True)
    ]
    return keras.layers.Concatenate(name="pooling")(parts)


def _features(
    pixels: keras.KerasTensor, network: keras.Model, backbone: Backbone, pooling: Pooling, *, suffix: str = ""
) -> keras.KerasTensor:
    """Returns one network's features; the suffix keeps the names of its layers apart from another's."""
    import keras

    # BatchNorm stays in inference mode. `training=False` alone would not do: a caller's `training=True` overrides it.
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    maps = network(preprocess(pixels, backbone, name=f"preprocessing{suffix}"), training=False)
    pool = {
        "avg": keras.layers.GlobalAveragePooling2D,
        "max": keras.layers.GlobalMaxPooling2D,
        "flatten": keras.layers.Flatten,
    }[pooling]
    return pool(name=f"pooling{suffix}")(maps)


def build_head(feature_size: int, class_count: int, params: TrainParams, seed: int) -> keras.Model:
    """Builds the part that is trained: float32 features [batch, n] to logits.

    Returns:
        A model with output [batch, 1] (sigmoid: the logit of the second class) or [batch, classes] (softmax).

    Raises:
        CatdogError: as `choose_output`.
    """
    import keras

    units = 1 if choose_output(params.output, class_count) == "sigmoid" else class_count
    penalty = keras.regularizers.L2(params.l2) if params.l2 else None

    def dense(size: int, number: int, name: str, activation: str | None = None) -> keras.layers.Layer:
        # A seed of its own for each layer: the weights depend on nothing that was built before.
        initializer = keras.initializers.GlorotUniform(seed=seed + number)
        return keras.layers.Dense(
            size, activation, kernel_initializer=initializer, kernel_regularizer=penalty, name=name
        )

    features = keras.Input((feature_size,), name="features")
    x = features
    for number, size in enumerate(params.hidden_units, start=1):
        x = dense(size, number, f"hidden_{number}", params.activation)(x)
        if params.dropout and number < len(params.hidden_units):
            x = keras.layers.Dropout(params.dropout, seed=seed + number, name=f"dropout_{number}")(x)
    if params.dropout:
        x = keras.layers.Dropout(params.dropout, seed=seed, name="dropout")(x)
    logits = dense(units, 0, "logits")(x)
    return keras.Model(features, logits, name="head")


def assemble(
    networks: Sequence[keras.Model],
    backbones: Sequence[Backbone],
    head: keras.Model,
    image_size: int,
    pooling: Pooling,
) -> keras.Model:
    """Joins preprocessing, backbones and trained head into the model that is saved.

    Args:
        networks: as in `build_extractor`, like `backbones`, `image_size` and `pooling`.
        backbones: their records.
        head: from `build_head`, trained on the features of `build_extractor`.
        image_size: pixels a side.
        pooling: how a network's last feature map becomes a vector.

    Returns:
        float32 pixels [batch, size, size, 3], RGB in 0..255, to float32 probabilities [batch, 1] (of the
        second class) or [batch, classes]. Its temperature is 1; `set_temperature` changes that.
    """
    import keras

    pixels = keras.Input((image_size, image_size, 3), name="pixels")
    logits = head(_joined_features(pixels, networks, backbones, pooling))
    function = "sigmoid" if logits.shape[-1] == 1 else "softmax"
    # float32 also where the rest computes in half precision.
    calm = keras.layers.Rescaling(1.0, dtype="float32", name="temperature")(logits)
    probabilities = keras.layers.Activation(function, dtype="float32", name="probabilities")(calm)
    return keras.Model(pixels, probabilities, name="catdog")


def logits_of(model: keras.Model) -> keras.Model:
    """Returns the part of a model from `assemble` that ends before the temperature: pixels to logits."""
    import keras

    return keras.Model(model.input, model.get_layer("temperature").input)


def set_temperature(model: keras.Model, temperature: float) -> None:
    """Makes a model from `assemble` divide its logits by this number, above 0, from its next use on."""
    model.get_layer("temperature").scale = 1 / temperature


def class_probabilities(output: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns one column a class, [images, classes], whether the model has one sigmoid or a softmax."""
    return np.concatenate([1 - output, output], axis=1) if output.shape[1] == 1 else output


def predict_classes(probabilities: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.int64]:
    """Returns the predicted class numbers, int64 [images].

    Args:
        probabilities: [images, classes].
        threshold: for two classes, the probability from which the second is predicted; else unused.
    """
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return np.asarray(probabilities.argmax(axis=1), np.int64)


def save_model(model: keras.Model, info: ModelInfo, path: Path) -> None:
    """Writes a .keras file that also holds `info`, with bytes that depend on nothing but the two.

    Keras puts the time and addresses in memory into the file; here both are fixed. It ignores the extra member
    when it loads.
    """
    with written_aside(path) as aside:
        # Keras insists on the ending.
        saved = aside.with_name(path.stem + ".saving.keras")
        try:
            model.save(saved)
            with zipfile.ZipFile(saved) as source, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as target:
                for name in sorted(source.namelist()):
                    content = source.read(name)
                    if name == "metadata.json":
                        content = json.dumps(json.loads(content) | {"date_saved": "1980-01-01@00:00:00"}).encode()
                    elif name == "config.json":
                        content = _number_shared_objects(content.decode()).encode()
                    target.writestr(zipfile.ZipInfo(name, ZIP_DATE), content)
                description = json.dumps(asdict(info), indent=2).encode()
                target.writestr(zipfile.ZipInfo(_INFO_MEMBER, ZIP_DATE), description)
        finally:
            saved.unlink(missing_ok=True)


def _number_shared_objects(config: str) -> str:
    """Numbers the objects that a model's configuration shares by their order, where Keras writes their addresses."""
    numbers: dict[str, int] = {}
    return re.sub(
        r'(?<="shared_object_id": )\d+', lambda match: str(numbers.setdefault(match[0], len(numbers))), config
    )


def read_info(path: Path) -> ModelInfo:
    """Reads what a model file says about itself, without loading the network.

    Raises:
        CatdogError: no such file, or not a model of this pipeline.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            fields = json.loads(archive.read(_INFO_MEMBER))
        fields["class_names"] = tuple(fields["class_names"])
        return ModelInfo(**fields)
    except FileNotFoundError:
        raise CatdogError(f"there is no model at {path}; `dvc repro` trains one") from None
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError):
        raise CatdogError(f"{path} is not a model of this pipeline; `dvc repro` trains one") from None


def load_model(path: Path) -> tuple[keras.Model, ModelInfo]:
    """Loads a saved model, for inference, and what it says about itself; raises CatdogError as `read_info`."""
    import keras

    info = read_info(path)
    return keras.models.load_model(path, compile=False), info
