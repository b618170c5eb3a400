"""The trained model as an MLflow model: base64 images in, labels and probabilities out."""

from __future__ import annotations

import base64
import binascii
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from catdog.images import ImageError
from catdog.predict import Classifier, most_probable

MODEL_NAME = "cats-vs-dogs"
_REQUIREMENTS = (
    *("keras", "tensorflow", "tensorflow-cpu", "numpy", "pandas", "pillow", "opencv-python-headless"),
    *("pydantic", "ruamel.yaml", "scikit-learn", "tqdm"),
)


class ServedModel(PythonModel):  # type: ignore[misc]
    """Answers with one row an image: label, probability (of the label), and p_<class> for each class."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the .keras file that was logged with the model."""
        # The engine that every server has: OpenVINO is not among the model's requirements.
        self.classifier = Classifier(Path(context.artifacts["model"]), engine="keras")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Classifies images.

        Args:
            context: unused.
            model_input: column `image`: base64 of an image file's bytes. Never a path: a server must not read files.
            params: unused.

        Raises:
            MlflowException: an image is no base64 or shows no picture; names its position. (Any other exception
                would send its stack trace to the client.)
        """
        pixels = [self._pixels(position, text) for position, text in enumerate(model_input["image"])]
        probabilities = self.classifier.probabilities([np.stack(pixels)] if pixels else [])
        class_names = self.classifier.info.class_names
        columns = {f"p_{name}": probabilities[:, number] for number, name in enumerate(class_names)}
        labels = np.asarray(class_names)[most_probable(probabilities)]
        return pd.DataFrame({"label": labels, "probability": probabilities.max(axis=1), **columns})

    def _pixels(self, position: int, text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        try:
            return self.classifier.pixels(base64.b64decode(text, validate=True))
        except (ImageError, binascii.Error, TypeError, ValueError) as error:
            raise MlflowException(
                f"image {position}: {error}; send the base64 of an image file's bytes",
                error_code=INVALID_PARAMETER_VALUE,
            ) from None


def log_served_model(run_id: str, model: Path) -> None:
    """Logs a .keras file to an existing run, as an MLflow model that `mlflow models serve` can start."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    signature = ModelSignature(inputs=Schema([ColSpec("string", "image")]))
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        # An input example would be sent through the model, at the price of loading it once more.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(model)},
            code_paths=[str(Path(__file__).parent)],
            signature=signature,
            # Left to itself, MLflow finds the requirements by loading the model, which takes half a minute.
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    pinned = []
    for name in _REQUIREMENTS:
        try:
            pinned.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # of the two builds of TensorFlow, one is installed
    return pinned
