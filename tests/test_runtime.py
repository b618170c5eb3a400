"""Settings by device: precision, XLA, the devices that share the work, and what is told of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import tiny
from catdog import runtime
from catdog.inference import compile_forward
from catdog.runtime import (
    choose_precision,
    compute_capability,
    device_count,
    device_facts,
    device_name,
    distribution,
    full_precision,
    jit_compile,
    prepare_keras,
)

SOURCES = str(Path(runtime.__file__).parents[1])
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")


@pytest.fixture(autouse=True)
def restored():
    yield
    keras.config.set_dtype_policy("float32")


def pretend(monkeypatch, *, gpu=False, capability=None, tpu=False, backend="tensorflow"):
    """A machine with other devices, as Keras' backend would name them."""
    found = {"gpu": ["gpu:0"] if gpu else [], "tpu": ["tpu:0"] if tpu else [], "cpu": ["cpu:0"]}
    monkeypatch.setattr(runtime, "_accelerators", found.__getitem__)
    monkeypatch.setattr(runtime, "compute_capability", lambda: capability)
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)


def run_python(code, **changes):
    """Runs code in a process of its own: devices are fixed once a backend has started."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KERAS_", "TF_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": SOURCES, **changes},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    ("device", "policy"),
    [
        ({}, "float32"),
        ({"gpu": True, "capability": (9, 0)}, "mixed_bfloat16"),
        ({"gpu": True, "capability": (8, 0)}, "mixed_bfloat16"),
        ({"gpu": True, "capability": (7, 5)}, "mixed_float16"),
        ({"gpu": True, "capability": (7, 0)}, "mixed_float16"),
        ({"gpu": True, "capability": (6, 1)}, "float32"),
        ({"gpu": True, "capability": None}, "float32"),
        ({"tpu": True, "backend": "jax"}, "mixed_bfloat16"),
    ],
)
def test_auto_computes_in_16_bits_where_the_device_is_made_for_it(monkeypatch, device, policy):
    pretend(monkeypatch, **device)
    assert choose_precision("auto") == policy
    for asked in ("float32", "mixed_bfloat16", "mixed_float16"):
        assert choose_precision(asked) == asked


@pytest.mark.parametrize(
    ("gpu", "backend", "inference", "training"),
    [
        (False, "tensorflow", False, False),
        (True, "tensorflow", True, False),
        (False, "jax", True, True),
        (True, "jax", True, True),
        (True, "torch", False, False),
    ],
)
def test_auto_compiles_with_xla_where_it_helps(monkeypatch, gpu, backend, inference, training):
    pretend(monkeypatch, gpu=gpu, backend=backend)
    assert (jit_compile("auto"), jit_compile("auto", trains=True)) == (inference, training)
    for trains in (False, True):
        # Of a deterministic training with TensorFlow Keras would only warn, and the tag `xla` would say true.
        possible = not (trains and backend == "tensorflow")
        assert jit_compile("always", trains=trains) is possible
        assert jit_compile("never", trains=trains) is False


def test_lowest_compute_capability_counts_and_an_unknown_one_counts_as_none(monkeypatch):
    import tensorflow as tf

    details = [{"compute_capability": (9, 0)}, {"compute_capability": (7, 5)}]
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(range(len(details))))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.__getitem__)
    assert compute_capability() == (7, 5)
    details.append({"device_name": "METAL"})
    assert compute_capability() is None


def test_here_on_a_cpu():
    prepare_keras(1)
    assert keras.config.dtype_policy().name == "float32"
    assert compute_capability() is None
    assert device_count() == 1
    with distribution() as count:
        assert count == 1
    facts = device_facts()
    assert facts["device"] == device_name()
    assert facts["device"].startswith("cpu: ")
    assert {**facts, "device": "", "device.memory_gb": ""} == {
        "device": "",
        "device.count": "1",
        "device.memory_gb": "",
        "keras.backend": "tensorflow",
        "precision": "float32",
        "xla": "false",
    }
    assert 0.5 < float(facts["device.memory_gb"]) < 100_000
    assert device_facts("always")["xla"] == "true"
    assert device_facts("always", trains=True)["xla"] == "false"


def test_precision_is_that_of_the_layers_built_afterwards_except_inside_full_precision():
    prepare_keras(1, precision="mixed_bfloat16")
    half = keras.layers.Dense(2)
    with pytest.raises(KeyError), full_precision():
        full = keras.layers.Dense(2)
        raise KeyError
    after = keras.layers.Dense(2)
    assert [layer.compute_dtype for layer in (half, full, after)] == ["bfloat16", "float32", "bfloat16"]
    assert half.variable_dtype == "float32"
    assert device_facts()["precision"] == "mixed_bfloat16"
    prepare_keras(1)
    assert keras.config.dtype_policy().name == "float32"


def test_half_precision_gives_nearly_the_same_in_float32():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(3, 3, 3, 8)) / 100, np.zeros(8)]
    batches = [rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8) for count in (4, 3)]
    outputs = {}
    for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
        prepare_keras(1, precision=precision)
        pixels = keras.Input((12, 12, 3))
        network = keras.layers.Conv2D(8, 3, activation="relu")
        model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(network(pixels)))
        network.set_weights(weights)
        outputs[precision] = compile_forward(model, "keras")(batches)
        assert outputs[precision].dtype == np.float32
    for precision in ("mixed_bfloat16", "mixed_float16"):
        error = np.abs(outputs[precision] - outputs["float32"]).max() / np.ptp(outputs["float32"])
        assert 0 < error < 0.02


def test_same_seed_draws_the_same():
    def drawn(seed):
        prepare_keras(seed)
        return keras.random.uniform((3,)).numpy().tolist(), np.random.rand()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


# What every device does is compared with one device, in the same process: forward passes and a training.
SEVERAL = """
import contextlib
from catdog.runtime import device_facts, distribution, jit_compile, prepare_keras
prepare_keras(1)
import keras, numpy as np
from catdog.inference import compile_forward

def build():
    pixels = keras.Input((8, 8, 3))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="relu")(pixels))
    return keras.Model(pixels, keras.layers.Dense(2)(features))

rng = np.random.default_rng(0)
pictures = rng.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
targets = rng.normal(size=(64, 2))
start = build().get_weights()
seen = {}
for name, several in (("one", contextlib.nullcontext(1)), ("two", distribution())):
    with several as devices:
        model = build()
        model.set_weights(start)
        model.compile(optimizer="sgd", loss="mse", jit_compile=jit_compile("auto", trains=True))
        losses = []
        for epoch in range(2):
            history = model.fit(pictures[..., :] / 255, targets, batch_size=16, epochs=1, shuffle=False, verbose=0)
            losses += history.history["loss"]
        forward = compile_forward(model, "keras", batch_size=5)
        outputs = forward([pictures[:5], pictures[5:9], pictures[9:10]])
    seen[name] = devices, losses, outputs
assert [devices for devices, _, _ in seen.values()] == [1, 2]
assert seen["one"][1][1] < seen["one"][1][0]
assert np.allclose(seen["one"][1], seen["two"][1], rtol=1e-4), seen
one, two = seen["one"][2], seen["two"][2]
assert one.shape == (10, 2) and np.ptp(one) > 0.1
assert np.allclose(one, two, atol=1e-3 * np.ptp(one)), (one, two)
assert device_facts()["device.count"] == "2"
"""
TWO_CPUS = """
import tensorflow as tf
part = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [part, part])
"""


def test_two_devices_share_the_work_with_tensorflow():
    run_python(TWO_CPUS + SEVERAL, TF_CPP_MIN_LOG_LEVEL="2")


@needs_jax
def test_two_devices_share_the_work_with_jax(under_jax):
    under_jax(SEVERAL, **tiny.pretended_devices(2))


START = """
import os, sys
from catdog.runtime import prepare_keras
prepare_keras(1)
import keras
keras.ops.zeros(3)
print(os.environ["TF_FORCE_GPU_ALLOW_GROWTH"], os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], os.environ.get("XLA_FLAGS"))
print(*sorted({"IPython", "jax", "matplotlib", "sklearn"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("backend", "flags"),
    [("tensorflow", "None"), pytest.param("jax", "--xla_gpu_deterministic_ops=true", marks=needs_jax)],
)
def test_start_is_quiet_modest_with_memory_and_deterministic_and_imports_no_more_than_it_must(backend, flags):
    done = run_python(START, KERAS_BACKEND=backend)
    assert done.stdout.splitlines() == [f"true false {flags}", "jax" if backend == "jax" else ""]
    assert done.stderr == ""


def test_the_backend_is_known_before_keras_is_imported(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert runtime._backend_asked() == "tensorflow"
    for text, backend in (('{"backend": "jax"}', "jax"), ("{}", "tensorflow"), ("no JSON", "tensorflow")):
        (tmp_path / "keras.json").write_text(text)
        assert runtime._backend_asked() == backend
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert runtime._backend_asked() == "torch"
