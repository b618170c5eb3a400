"""The fastest exact forward pass of a Keras model on this machine."""

from __future__ import annotations

import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from catdog.errors import CatdogError
from catdog.images import Pixels
from catdog.runtime import has_gpu

if TYPE_CHECKING:
    import keras

Engine = Literal["openvino", "keras"]
Forward = Callable[[Iterable[Pixels]], npt.NDArray[np.float32]]
"""From batches of uint8 pixels [batch, size, size, 3] to the outputs of all of them, float32 [images, n]."""


def choose_engine(engine: Literal["auto", "openvino", "keras"]) -> Engine:
    """Returns the engine that runs: for auto, OpenVINO on a CPU where it is installed, else Keras.

    OpenVINO computes the same float32 network 1.9 times as fast as `predict` (MobileNetV2, two AVX-512 cores).

    Raises:
        CatdogError: OpenVINO is asked for and cannot run here.
    """
    import importlib.util

    import keras

    obstacle = None
    if importlib.util.find_spec("openvino") is None:
        obstacle = "it is not installed"
    elif keras.backend.backend() != "tensorflow":
        obstacle = f"the Keras backend is {keras.backend.backend()}, and models reach it through TensorFlow"
    if engine == "openvino" and obstacle:
        raise CatdogError(f"embed.engine = 'openvino' cannot run: {obstacle}; use auto or keras")
    if engine == "auto":
        return "keras" if obstacle or has_gpu() else "openvino"
    return engine


def compile_forward(model: keras.Model, engine: Engine) -> Forward:
    """Prepares a model for inference.

    Args:
        model: one image input, float32 [batch, size, size, 3], and one output [batch, n].
        engine: from `choose_engine`.

    Returns:
        A function that keeps the order of the images and holds only its outputs in memory.
    """
    return _compile_openvino(model) if engine == "openvino" else _compile_keras(model)


def _compile_keras(model: keras.Model) -> Forward:
    def forward(batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        return np.concatenate([np.asarray(model.predict_on_batch(batch.astype(np.float32))) for batch in batches])

    return forward


def _compile_openvino(model: keras.Model) -> Forward:
    # OpenVINO reports every import to its makers, unless its reporter cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    import tensorflow as tf
    from openvino.preprocess import PrePostProcessor
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="pixels")
    concrete = tf.function(lambda pixels: model(pixels, training=False)).get_concrete_function(signature)
    graph = convert_variables_to_constants_v2(concrete).graph.as_graph_def()
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pb")
        path.write_bytes(graph.SerializeToString())
        network = core.read_model(path)
    steps = PrePostProcessor(network)
    steps.input().tensor().set_element_type(openvino.Type.u8)
    # float32 on every CPU: some would silently choose bfloat16 and give other probabilities.
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(steps.build(), "CPU", settings)
    count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    # A round of plain requests, not AsyncInferQueue: its Python callbacks run in OpenVINO's threads, which then
    # need the interpreter's lock to end, while whoever drops the model holds it and waits for them: a deadlock.
    def forward(batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        requests = [compiled.create_infer_request() for _ in range(count)]
        running: deque[Any] = deque()
        outputs: list[npt.NDArray[np.float32]] = []

        def collect() -> None:
            request = running.popleft()
            request.wait()
            outputs.append(request.get_output_tensor().data.copy())

        try:
            for position, batch in enumerate(batches):
                if len(running) == count:
                    collect()
                request = requests[position % count]
                request.start_async({0: batch})
                running.append(request)
        finally:
            # Also when reading a batch failed: a request must not be dropped while it computes.
            while running:
                collect()
        return np.concatenate(outputs)

    return forward
