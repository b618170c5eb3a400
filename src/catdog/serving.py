"""The trained model as an MLflow model: base64 images in, labels and probabilities out."""

from __future__ import annotations

import base64
import binascii
import importlib.metadata
import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from catdog.images import ImageError, Pixels
from catdog.model import ModelInfo, read_info
from catdog.predict import Classifier, most_probable

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MODEL_NAME = "cats-vs-dogs"
MAX_IMAGES = 64
"""In one request."""
MAX_IMAGE_BYTES = 20_000_000
"""Of one image's file, before base64 makes it a third longer."""
MAX_IMAGE_PIXELS = 50e6
"""Of one image, before it is resized; decoding it takes eight bytes each for a moment."""

_REQUIREMENTS = (
    *("keras", "tensorflow", "tensorflow-cpu", "openvino", "numpy", "pandas", "pillow", "opencv-python-headless"),
    *("pydantic", "ruamel.yaml", "scikit-learn", "simplejpeg", "tqdm"),
)


class BadRequest(MlflowException):  # type: ignore[misc]
    """What is wrong with a request, in one sentence; the client gets it with status 400.

    Any other exception would send its stack trace to the client.
    """

    def __init__(self, sentence: str) -> None:
        """Takes the sentence."""
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self._sentence = sentence

    def serialize_as_json(self) -> str:
        """Returns the body of the answer; MLflow has put the request's data before the message by then."""
        return json.dumps({"error_code": self.error_code, "message": self._sentence})


class ServedModel(PythonModel):  # type: ignore[misc]
    """Answers with one row an image: label, probability (of the label), and p_<class> for each class."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the .keras file that was logged with the model."""
        self.classifier = Classifier(Path(context.artifacts["model"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Classifies images.

        Args:
            context: unused.
            model_input: column `image`: base64 of an image file's bytes. Never a path: a server must not read files.
            params: `threshold`, of two classes the probability from which the second is given, by default the model's
                own; `top_k`, how many of the most probable classes to give, as label_1, probability_1 and so on, in
                place of p_<class> for each; 0, the default, for p_<class>.

        Raises:
            BadRequest: too many images, an image is no base64, shows no picture or is too large (its position is
                named), or a parameter does not suit the model.
        """
        threshold, top = _checked(params or {}, self.classifier.info)
        if len(model_input) > MAX_IMAGES:
            raise BadRequest(
                f"{len(model_input)} images are more than the limit of {MAX_IMAGES}; send several requests"
            )
        pixels = [self._pixels(position, text) for position, text in enumerate(model_input["image"])]
        size = self.classifier.batch_size
        batches = [np.stack(pixels[first : first + size]) for first in range(0, len(pixels), size)]
        probabilities = self.classifier.probabilities(batches)
        names = np.array(self.classifier.info.class_names, object)
        labels = self.classifier.labels(probabilities, threshold)
        columns = {"label": names[labels], "probability": _pick(probabilities, labels)}
        for position, best in enumerate(most_probable(probabilities, top).T, start=1):
            columns |= {f"label_{position}": names[best], f"probability_{position}": _pick(probabilities, best)}
        if not top:
            columns |= {f"p_{name}": probabilities[:, number] for number, name in enumerate(names)}
        return pd.DataFrame(columns)

    def _pixels(self, position: int, text: object) -> Pixels:
        if not isinstance(text, str) or not text:
            raise BadRequest(f"image {position} is empty or no text; send the base64 of an image file's bytes")
        if len(text) > math.ceil(MAX_IMAGE_BYTES / 3) * 4:
            raise BadRequest(f"image {position} has more than {MAX_IMAGE_BYTES:,} bytes, the limit; send a smaller one")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise BadRequest(
                f"image {position} is no base64; send that of an image file's bytes, without line breaks and without "
                "'data:image/...' before it"
            ) from None
        try:
            return self.classifier.pixels(data, max_pixels=MAX_IMAGE_PIXELS)
        except ImageError as error:
            raise BadRequest(f"image {position}: {error}; send the base64 of an image file's bytes") from None


def _pick(probabilities: np.ndarray[Any, Any], classes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Each image's probability of one class, [images], of [images, classes]."""
    return np.asarray(np.take_along_axis(probabilities, classes[:, np.newaxis], axis=1)[:, 0])


def _checked(params: dict[str, Any], info: ModelInfo) -> tuple[float | None, int]:
    """Returns threshold and top_k; raises BadRequest where the model cannot go by them."""
    threshold, top, count = params.get("threshold"), params.get("top_k") or 0, len(info.class_names)
    if threshold is not None and not 0 <= threshold <= 1:
        raise BadRequest(f"threshold = {threshold} is no number from 0 to 1")
    if threshold not in (None, info.threshold) and count != 2:
        raise BadRequest(f"threshold = {threshold} tells two classes apart, but the model knows {count}; leave it out")
    if not 0 <= top <= count:
        raise BadRequest(f"top_k = {top} is no number from 0 to {count}, the number of classes")
    return threshold, top


def signature_of(info: ModelInfo) -> ModelSignature:
    """Returns what a request may hold, which MLflow checks: the column `image`, and the parameters with defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "image")]),
        params=ParamSchema([ParamSpec("threshold", "double", info.threshold), ParamSpec("top_k", "long", 0)]),
    )


def log_served_model(run_id: str, model: Path) -> None:
    """Logs a .keras file to an existing run, as an MLflow model that `mlflow models serve` can start."""
    import mlflow

    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        # An input example would be sent through the model, at the price of loading it once more.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(model)},
            code_paths=[str(Path(__file__).parent)],
            signature=signature_of(read_info(model)),
            # Left to itself, MLflow finds the requirements by loading the model, which takes half a minute.
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    pinned = []
    for name in _REQUIREMENTS:
        try:
            pinned.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # of the two builds of TensorFlow, one is installed; OpenVINO is not made for every machine
    return pinned
