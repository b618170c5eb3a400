"""Exports run by the runtimes that they are for."""

from __future__ import annotations

import importlib.metadata
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from catdog.export import DESCRIPTION, DESCRIPTION_KEY, NETWORK, Format
from catdog.images import Pixels
from catdog.inference import Forward, import_openvino, run_openvino
from catdog.parallel import processors
from catdog.runtime import notices_held_back

# The distributions that may hold TensorFlow, in which two of the runtimes are.
_TENSORFLOW = ("tensorflow-cpu", "tensorflow")


def open_export(path: Path, format_: Format) -> Forward:
    """Loads an export with its own runtime, on the CPU.

    Returns:
        From batches of uint8 pixels [batch, size, size, 3] to the probabilities of the classes of all of them, float32
        [images, classes].
    """
    with notices_held_back():
        if format_ == "tflite":
            return _open_tflite(path)
        if format_ == "onnx":
            return _open_onnx(path)
        if format_ == "openvino":
            return run_openvino(import_openvino().Core().read_model(path / NETWORK))
        return _open_saved_model(path)


def read_description(path: Path, format_: Format) -> dict[str, Any]:
    """Reads what an export says about itself, as `export.describe` made it."""
    if format_ == "tflite":
        with zipfile.ZipFile(path) as archive:
            text = archive.read(DESCRIPTION).decode()
    elif format_ == "onnx":
        import onnx

        properties = onnx.load(path, load_external_data=False).metadata_props
        text = next(entry.value for entry in properties if entry.key == DESCRIPTION_KEY)
    elif format_ == "openvino":
        text = import_openvino().Core().read_model(path / NETWORK).get_rt_info(DESCRIPTION_KEY).value
    else:
        text = (path / "assets" / DESCRIPTION).read_text(encoding="utf-8")
    description: dict[str, Any] = json.loads(text)
    return description


def runtime_version(format_: Format) -> str:
    """Returns the runtime's name and version, e.g. "onnxruntime 1.32.0"."""
    packages = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}.get(format_, _TENSORFLOW)
    for package in packages:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages[-1]


def _open_tflite(path: Path) -> Forward:
    import warnings

    import tensorflow as tf

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it will move to another package
        interpreter = tf.lite.Interpreter(str(path), num_threads=processors())
    interpreter.allocate_tensors()
    pixels = interpreter.get_input_details()[0]["index"]
    probabilities = interpreter.get_output_details()[0]["index"]

    def forward(batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        outputs = []
        for batch in batches:
            for picture in batch:
                interpreter.set_tensor(pixels, picture[np.newaxis])
                interpreter.invoke()
                outputs.append(interpreter.get_tensor(probabilities))
        return np.concatenate(outputs)

    return forward


def _open_onnx(path: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batches: np.concatenate([session.run(None, {"pixels": batch})[0] for batch in batches])


def _open_saved_model(path: Path) -> Forward:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]

    def forward(batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        # `loaded` is named so that it lives as long as its signature, which holds no variables.
        assert loaded is not None
        return np.concatenate([serve(pixels=batch)["probabilities"].numpy() for batch in batches])

    return forward
