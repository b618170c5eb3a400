"""The process-wide settings of Keras: quiet, seeded, deterministic, modest with GPU memory."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from catdog.startup import quick_imports


def prepare_keras(seed: int) -> None:
    """Imports Keras with the settings every stage shares. Call it before anything else imports Keras.

    Args:
        seed: seeds Python, NumPy and the backend.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with quick_imports(), notices_held_back():
        import keras

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.zeros(())  # the first operation writes the notice once more
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        tf.get_logger().setLevel("ERROR")
        tf.config.experimental.enable_op_determinism()
        for gpu in tf.config.list_physical_devices("GPU"):
            # Otherwise one process takes the whole card, and a queue of two workers fails.
            tf.config.experimental.set_memory_growth(gpu, True)


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
    import keras

    return bool(keras.distribution.list_devices("gpu"))


def device_name() -> str:
    """Returns what the numbers run on, e.g. "cpu: AMD EPYC, 2 cores" or "gpu: NVIDIA H200 x 1"."""
    import keras

    gpus = keras.distribution.list_devices("gpu")
    if not gpus:
        return f"cpu: {_cpu_model()}, {os.cpu_count()} cores"
    name = "unknown model"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
        name = details.get("device_name", name)
    return f"gpu: {name} x {len(gpus)}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
