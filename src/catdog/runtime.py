"""The process-wide settings of Keras: quiet, seeded, deterministic, and what suits the device at hand."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from catdog.startup import quick_imports, without

if TYPE_CHECKING:
    from catdog.config import Params

Precision = Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"]
Xla = Literal["auto", "always", "never"]


def prepare_keras(seed: int, *, precision: Precision = "auto") -> None:
    """Imports Keras with the settings every stage shares. Call it before anything else imports Keras.

    Args:
        seed: seeds Python, NumPy and the backend.
        precision: what layers compute with from now on, as in `choose_precision`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Otherwise one process takes the whole card, and a queue of two workers fails. TensorFlow reads its variable when
    # it first uses a GPU, also where it only reads records for another backend.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with quick_imports(), notices_held_back():
        # TensorFlow and Keras import these for functions that are not used here, which takes a quarter of the time.
        with without("sklearn", "matplotlib", "IPython", *([] if _backend_asked() == "jax" else ["jax"])):
            import keras

        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            tf.config.experimental.enable_op_determinism()
            tf.zeros(())  # the first operation writes the notice once more
        elif backend == "jax":
            _make_jax_deterministic()
        keras.utils.set_random_seed(seed)
    if backend == "tensorflow":
        tf.get_logger().setLevel("ERROR")
    keras.config.set_dtype_policy(choose_precision(precision))


def prepare_keras_for(params: Params) -> None:
    """As `prepare_keras`, with the seed and the precision of params.yaml."""
    prepare_keras(params.seed, precision=params.runtime.precision)


def _backend_asked() -> str:
    """The backend that Keras will have, from where it takes the name, before it is imported."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name
    config = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras", "keras.json")
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("backend", "tensorflow"))
    except (OSError, ValueError):  # Keras does without one, too
        return "tensorflow"


def _make_jax_deterministic() -> None:
    """Has XLA use no operation whose result depends on chance; JAX reads the variable when it first computes."""
    flag = "--xla_gpu_deterministic_ops=true"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


@contextlib.contextmanager
def notices_held_back() -> Iterator[None]:
    """Keeps what native code writes to standard error from the screen, unless the block fails.

    TensorFlow announces there, twice and at every log level, that it uses oneDNN.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def has_gpu() -> bool:
    """Says whether Keras' backend sees a GPU."""
    return bool(_accelerators("gpu"))


def _accelerators(kind: str) -> list[str]:
    """The backend's names of its devices of a kind (cpu, gpu, tpu); none where it has no such kind."""
    import keras

    if keras.backend.backend() == "torch":  # Keras lists no devices for it
        import torch

        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if kind == "gpu" else []
    # Keras' function asks JAX for the kind, which raises where there is no such device.
    with contextlib.suppress(RuntimeError):
        return list(keras.distribution.list_devices(kind))
    return []


def choose_precision(precision: Precision) -> str:
    """Returns the name of the Keras dtype policy: with auto, the fastest that the device is made for.

    The mixed policies compute in 16 bits and keep weights in 32. Tensor cores take float16 from compute capability
    7.0 (Volta) and bfloat16, which needs no scaling of the loss, from 8.0 (Ampere); before, and on a CPU, 16 bits
    gain nothing. From www.tensorflow.org/guide/mixed_precision and NVIDIA's "Training With Mixed Precision".

    Args:
        precision: auto, or a policy, which is returned as it is, whatever the device.
    """
    if precision != "auto":
        return precision
    if _accelerators("tpu"):
        return "mixed_bfloat16"
    capability = compute_capability()
    if capability is None or capability < (7, 0):
        return "float32"
    return "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16"


def compute_capability() -> tuple[int, int] | None:
    """Returns the lowest CUDA compute capability of the GPUs that the backend sees; None without one that tells it."""
    import keras

    if not has_gpu():
        return None
    backend = keras.backend.backend()
    found: list[tuple[int, int] | None] = []
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        found = [tf.config.experimental.get_device_details(gpu).get("compute_capability") for gpu in gpus]
    elif backend == "jax":
        import jax

        texts = [getattr(gpu, "compute_capability", "") for gpu in jax.local_devices(backend="gpu")]
        found = [_version(text) for text in texts]
    elif backend == "torch":
        import torch

        found = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
    known = [capability for capability in found if capability is not None]
    return min(known) if known and len(known) == len(found) else None


def _version(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def jit_compile(xla: Xla, *, trains: bool = False) -> bool:
    """Says what to give to Keras' `compile(jit_compile=...)`.

    Args:
        xla: always and never are taken as they are. auto means: with JAX always, since without it JAX runs operation
            by operation; with TensorFlow on a GPU; else never. On a CPU XLA takes 15 times as long for convolutions.
        trains: whether gradients are computed. TensorFlow's are deterministic here, and then XLA refuses some of
            them on a GPU, that of max pooling for one. Keras itself then trains without (`model_supports_jit`),
            whatever it is told: so with TensorFlow this is False, also for always.
    """
    import keras

    backend = keras.backend.backend()
    if trains and backend == "tensorflow":
        return False
    if xla != "auto":
        return xla == "always"
    return backend == "jax" or (backend == "tensorflow" and has_gpu())


@contextlib.contextmanager
def distribution() -> Iterator[int]:
    """Shares the work of the models built inside the block among all devices, where there are several.

    Build, compile and run the model inside; each device holds a copy and takes a part of every batch
    (tf.distribute.MirroredStrategy, keras.distribution.DataParallel). With one device nothing changes. In a job of
    several workers (`workers`) all devices of all workers share it, and each process gives its own part of a batch.
    Batches must be divisible by the number of devices: `shares.Share` makes them so.

    Yields:
        The number of devices.
    """
    import keras

    count = device_count()
    backend = keras.backend.backend()
    if count > 1 and backend == "tensorflow":
        with _mirrored_strategy().scope():
            yield count
    elif count > 1:
        # Keras itself could only divide a data set whose batches are all of one known size.
        with keras.distribution.DataParallel(
            devices=keras.distribution.list_devices(), auto_shard_dataset=False
        ).scope():
            yield count
    else:
        yield 1


@functools.cache
def _mirrored_strategy() -> Any:
    """One for the whole process: the exchanges of a second one would take those of the first for their own."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([device.name for device in _tensorflow_devices()])


def device_count() -> int:
    """Returns how many devices `distribution` shares the work among: the GPUs or TPUs, else 1 for the CPU.

    A CPU counts more than once only where it was split into logical devices, and once for every worker of a job.
    """
    import keras

    if keras.backend.backend() == "tensorflow":
        return len(_tensorflow_devices())
    kinds = ("tpu", "gpu", "cpu") if keras.backend.backend() == "jax" else ()
    return next((len(found) for kind in kinds if (found := _accelerators(kind))), 1)


def _tensorflow_devices() -> list[Any]:
    import tensorflow as tf

    devices: list[Any] = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return devices


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Gives the models built inside the block float32 layers, whatever `prepare_keras` chose.

    A saved model keeps the precision of its layers, and one in 16 bits is slow on a CPU: what is saved is built here.
    """
    import keras

    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


def device_name() -> str:
    """Returns what the numbers run on, e.g. "cpu: AMD EPYC, 2 cores" or "gpu: NVIDIA H200 x 1"."""
    for kind in ("tpu", "gpu"):
        found = _accelerators(kind)
        if found:
            return f"{kind}: {_accelerator_model()} x {len(found)}"
    return f"cpu: {processor_name()}, {os.cpu_count()} cores"


def _accelerator_model() -> str:
    import keras

    name = ""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
        name = details.get("device_name", "")
    elif backend == "jax":
        import jax

        name = jax.local_devices()[0].device_kind
    elif backend == "torch":
        import torch

        name = torch.cuda.get_device_name(0)
    return name or "unknown model"


def device_facts(xla: Xla = "auto", *, trains: bool = False) -> dict[str, str]:
    """Returns what tells one run's speed and rounding from another's, as texts for `StageRun.note`.

    Args:
        xla: the parameter runtime.xla.
        trains: as in `jit_compile`.

    Returns:
        device (`device_name`), device.count, device.memory_gb (of one GPU, or of the machine; left out where nothing
        tells it), keras.backend, precision (the dtype policy), xla (true or false).
    """
    import keras

    facts = {
        "device": device_name(),
        "device.count": str(device_count()),
        "keras.backend": keras.backend.backend(),
        "precision": keras.config.dtype_policy().name,
        "xla": str(jit_compile(xla, trains=trains)).lower(),
    }
    memory = _gpu_memory() if has_gpu() else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return facts | ({"device.memory_gb": f"{memory / 1e9:.1f}"} if memory else {})


def _gpu_memory() -> int | None:
    """Bytes of memory of the GPU in use, or None where NVIDIA's library or its driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError without the package, NVMLError without a driver: this is only told, never needed
        return None
    try:
        # The library numbers the cards of the machine, the backend those that it may use: the name links the two.
        model = _accelerator_model()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        named = [handle for handle in handles if pynvml.nvmlDeviceGetName(handle) == model]
        return int(pynvml.nvmlDeviceGetMemoryInfo(named[0]).total) if named else None
    finally:
        pynvml.nvmlShutdown()


def processor_name() -> str:
    """Returns the model of the CPU, e.g. "AMD EPYC 7B13"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
