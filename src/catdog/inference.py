"""The fastest exact forward pass of a Keras model on this machine."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from catdog.errors import CatdogError
from catdog.images import Pixels
from catdog.runtime import Xla, has_gpu, jit_compile

if TYPE_CHECKING:
    import keras

Engine = Literal["openvino", "keras"]
Forward = Callable[[Iterable[Pixels]], npt.NDArray[np.float32]]
"""From batches of uint8 pixels [batch, size, size, 3] to the outputs of all of them, float32 [images, n]."""

# What so few pictures leave between two layers stays in the processor's cache, and OpenVINO computes several of these
# batches at once: a tenth less time a picture than in eights (MobileNetV2, two AVX-512 cores). And a twelfth less where
# it knows the number beforehand, with the same bits.
_OPENVINO_BATCH = 2
# On a GPU: one is computed, one is sent, one is decoded. The outputs of more would only fill its memory.
_BATCHES_UNDER_WAY = 2


def choose_engine(engine: Literal["auto", "openvino", "keras"]) -> Engine:
    """Returns the engine that runs: for auto, OpenVINO on a CPU where it is installed, else Keras.

    OpenVINO computes the same float32 network 2.9 times as fast as `predict` (MobileNetV2, two AVX-512 cores).

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


def compile_forward(model: keras.Model, engine: Engine, *, batch_size: int = 8, xla: Xla = "never") -> Forward:
    """Prepares a model for inference.

    With the Keras engine on a GPU, and wherever XLA compiles, every batch is filled up with black pictures to one size,
    because each size of its own would be compiled anew. On several devices, inside `runtime.distribution`, where the
    model must have been built too, the size is a multiple of their number. The fillers' outputs are dropped.

    Args:
        model: one image input, float32 [batch, size, size, 3], and one output [batch, n].
        engine: from `choose_engine`.
        batch_size: images a batch, at most; the Keras engine fills up to it, OpenVINO cuts its own batches.
        xla: the parameter runtime.xla; of the Keras engine only. Compiling takes seconds, which a few pictures do not
            earn back, hence never.

    Returns:
        A function that keeps the order of the images and holds only its outputs in memory.
    """
    return _compile_openvino(model) if engine == "openvino" else _compile_keras(model, batch_size, xla)


def single_picture_seconds(forward: Forward, size: int, *, rounds: int = 20) -> float:
    """Returns the median time of the forward pass of one picture, in seconds, after a few that do not count.

    Args:
        forward: from `compile_forward`.
        size: pixels a side.
        rounds: how often it is measured.
    """
    picture = np.zeros((1, size, size, 3), np.uint8)
    times = []
    for _ in range(rounds + 3):
        started = time.perf_counter()
        forward([picture])
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _compile_keras(model: keras.Model, batch_size: int, xla: Xla) -> Forward:
    import keras

    compiles = jit_compile(xla)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        devices, step = _tensorflow_step(model, compiles)
    elif backend == "jax":
        devices, step = _jax_step(model, compiles)
    else:
        devices, step = 1, lambda pixels: [model.predict_on_batch(pixels.astype(np.float32))]
    fills = compiles or devices > 1 or has_gpu()
    full = math.ceil(batch_size / devices) * devices

    def forward(batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        running: deque[tuple[int, Sequence[Any]]] = deque()
        outputs: list[npt.NDArray[np.float32]] = []

        def collect() -> None:
            count, parts = running.popleft()
            outputs.append(np.concatenate([np.asarray(part, np.float32) for part in parts])[:count])

        for batch in batches:
            count = len(batch)
            # A device works on its own; while it does, the next batch is decoded and sent.
            running.append((count, step(_filled(batch, full) if fills else batch)))
            if len(running) > _BATCHES_UNDER_WAY:
                collect()
        while running:
            collect()
        return np.concatenate(outputs)

    return forward


def _filled(batch: Pixels, size: int) -> Pixels:
    """Returns a copy of a batch, made up with black pictures to a multiple of `size`."""
    filled = np.zeros((math.ceil(len(batch) / size) * size, *batch.shape[1:]), batch.dtype)
    filled[: len(batch)] = batch
    return filled


Step = Callable[[Pixels], Sequence[Any]]
"""From uint8 pixels [batch, size, size, 3] to the outputs of each device's part, perhaps still being computed."""


def _tensorflow_step(model: keras.Model, compiles: bool) -> tuple[int, Step]:
    """Returns over how many devices the model is spread, and its forward pass."""
    import tensorflow as tf

    strategy = model.distribute_strategy
    devices = strategy.num_replicas_in_sync

    def infer(pixels: Any) -> Any:
        # The pixels travel to the device as bytes.
        return tf.cast(model(tf.cast(pixels, tf.float32), training=False), tf.float32)

    if devices == 1:
        constant = frozen(model, infer)
        compute = tf.function(constant, jit_compile=True) if compiles else constant
        return 1, lambda pixels: [compute(tf.constant(pixels))]

    replica = tf.function(infer, jit_compile=compiles)

    on_all = tf.function(lambda parts: strategy.run(replica, (parts,)))

    def step(pixels: Pixels) -> Any:
        parts = np.split(pixels, devices)
        values = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
        return strategy.experimental_local_results(on_all(values))

    return devices, step


def frozen(
    model: keras.Model,
    function: Callable[[Any], Any],
    *,
    batch: int | None = None,
    dtype: Literal["uint8", "float32"] = "uint8",
) -> Any:
    """Returns a TensorFlow function with a model's weights as constants, which TensorFlow can fold into each other.

    1.5 times as fast as the function itself (MobileNetV2, two AVX-512 cores): BatchNorm goes into the convolutions.

    Args:
        model: whose weights become constants.
        function: from pixels [batch, size, size, 3] to what the model makes of them, without Python's if and while on
            tensors.
        batch: images a batch; None for any number.
        dtype: of the pixels.
    """
    import keras
    import tensorflow as tf

    # Traced as constants from the beginning, in half the time of a conversion of what was traced with variables.
    weights = [(variable, variable.numpy()) for variable in model.variables]

    def with_constants(pixels: Any) -> Any:
        constants = [(variable, tf.constant(value, name=variable.path)) for variable, value in weights]
        with keras.StatelessScope(state_mapping=constants):
            return function(pixels)

    size = model.input_shape[1]
    signature = tf.TensorSpec((batch, size, size, 3), dtype, name="pixels")
    return tf.function(with_constants, autograph=False).get_concrete_function(signature)


def _jax_step(model: keras.Model, compiles: bool) -> tuple[int, Step]:
    """Returns over how many devices the model is spread, and its forward pass."""
    import jax
    import keras

    parallel = keras.distribution.distribution()
    devices = parallel.device_mesh.devices.size if parallel else 1
    state = [
        [variable.value for variable in group] for group in (model.trainable_variables, model.non_trainable_variables)
    ]

    def infer(state: Any, pixels: Any) -> Any:
        outputs, _ = model.stateless_call(*state, pixels.astype("float32"), training=False)
        return outputs.astype("float32")

    compute = jax.jit(infer) if compiles or devices > 1 else infer

    def step(pixels: Pixels) -> Any:
        placed = (
            keras.distribution.distribute_tensor(pixels, parallel.get_data_layout(pixels.shape)) if parallel else pixels
        )
        return [compute(state, placed)]

    return devices, step


def _in_parts(batches: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """Cuts batches into parts of at most `size` pictures."""
    for batch in batches:
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _compile_openvino(model: keras.Model) -> Forward:
    return run_openvino(openvino_network(model, lambda pixels: model(pixels, training=False)))


def import_openvino() -> Any:
    """Imports OpenVINO, which with its companion NNCF then sends nothing to its makers; returns the module."""
    # Both report their use to their makers, unless the reporter cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def openvino_network(model: keras.Model, function: Callable[[Any], Any]) -> Any:
    """Returns an `openvino.Model`: uint8 pixels [batch, size, size, 3] to what a function makes of them, as float32.

    Args:
        model: whose weights become constants.
        function: from float32 pixels [batch, size, size, 3] to what the model makes of them, as for `frozen`.
    """
    import keras

    openvino = import_openvino()
    from openvino.preprocess import PrePostProcessor

    # float32 whatever the policy: NumPy knows no bfloat16.
    constant = frozen(model, lambda pixels: keras.ops.cast(function(pixels), "float32"), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pb")
        path.write_bytes(constant.graph.as_graph_def().SerializeToString())
        whole = openvino.Core().read_model(path)
    # Whatever nobody uses OpenVINO takes for another output: EfficientNet's swish leaves a node for its gradient.
    network = openvino.Model([whole.output(constant.outputs[0].name)], whole.get_parameters())
    steps = PrePostProcessor(network)
    steps.input().tensor().set_element_type(openvino.Type.u8)
    return steps.build()


def run_openvino(network: Any) -> Forward:
    """Prepares an `openvino.Model` from uint8 pixels [batch, size, size, 3] to one output for inference on the CPU."""
    openvino = import_openvino()
    # Its first array looks NumPy up in Python, while C++ guards that moment. Two threads that begin together, one with
    # the guard and the other with the interpreter's lock, would wait for each other for ever.
    _ = openvino.Tensor(np.zeros(1, np.uint8)).data
    core = openvino.Core()
    # float32 on every CPU: some would silently choose bfloat16 and give other probabilities.
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiling = threading.Lock()

    @functools.cache
    def compiled_for(size: int) -> Any:
        fixed, shape = network.clone(), network.input().partial_shape
        shape[0] = size
        fixed.reshape(shape)
        return core.compile_model(fixed, "CPU", settings)

    # A round of plain requests, not AsyncInferQueue: its Python callbacks run in OpenVINO's threads, which then
    # need the interpreter's lock to end, while whoever drops the model holds it and waits for them: a deadlock.
    def forward(batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        parts = _in_parts(batches, _OPENVINO_BATCH)
        first = next(parts)
        size = len(first)  # a picture by itself does not take the time of two
        with compiling:
            compiled = compiled_for(size)
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        requests = [compiled.create_infer_request() for _ in range(count)]
        running: deque[tuple[Any, int]] = deque()
        outputs: list[npt.NDArray[np.float32]] = []

        def collect() -> None:
            request, images = running.popleft()
            request.wait()
            outputs.append(request.get_output_tensor().data[:images].copy())

        try:
            for position, batch in enumerate(_in_parts(itertools.chain([first], parts), size)):
                if len(running) == count:
                    collect()
                request = requests[position % count]
                request.start_async({0: batch if len(batch) == size else _filled(batch, size)})
                running.append((request, len(batch)))
        finally:
            # Also when reading a batch failed: a request must not be dropped while it computes.
            while running:
                collect()
        return np.concatenate(outputs)

    return forward
