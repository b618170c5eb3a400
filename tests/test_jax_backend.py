"""The same model and the same fit under Keras' JAX backend, in a process of its own: the backend is fixed at import."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from catdog import model as model_module
from catdog.backbones import Backbone
from catdog.config import TrainParams
from catdog.inference import compile_forward
from catdog.model import ModelInfo, assemble, build_head, save_model
from catdog.runtime import prepare_keras
from test_runtime import run_python

SOURCES = str(Path(model_module.__file__).parents[1])
pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")


def build_network(size):
    """One layer of every kind that the backbones are made of; those themselves take JAX half a minute to build."""
    from keras import Input, Model, layers

    pixels = Input((size, size, 3))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(pixels)
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, strides=2, use_bias=False)(x))
    x = layers.DepthwiseConv2D(3, padding="same")(layers.ReLU(6.0)(x))
    y = layers.MaxPooling2D(2)(layers.SeparableConv2D(8, 3, padding="same", activation="swish")(x))
    x = layers.Add()([layers.AveragePooling2D(2)(x), y])
    return Model(pixels, layers.Concatenate()([x, layers.Activation("relu")(x)]), name="mini")


BACKBONES = {
    name: Backbone(name, "none", 32, 32, name, "none", "none", "none", "none", "none")
    for name in ("tf", "caffe", "torch")
}


LOADED_AND_TRAINED = """
from pathlib import Path
import numpy as np
from catdog.runtime import prepare_keras
prepare_keras(1)
from catdog.inference import choose_engine, compile_forward
from catdog.model import load_model
pictures = np.load("pictures.npy")
for name in ("tf", "caffe", "torch"):
    model, info = load_model(Path(f"{name}.keras"))
    forward = compile_forward(model, choose_engine("auto"), batch_size=4)
    np.save(f"{name}.npy", forward([pictures[:4], pictures[4:]]))
print(choose_engine("auto"), info.class_names)

from catdog.config import TrainParams
from catdog.features import FeatureSet
from catdog.model import ModelInfo, assemble, build_extractor, build_head, save_model
from catdog.training import fit_head
from test_jax_backend import BACKBONES, build_network

prepare_keras(1)
backbone, network = BACKBONES["caffe"], build_network(32)
extractor = build_extractor([network], [backbone], 32, "avg")
rng = np.random.default_rng(0)
labels = np.arange(70) % 2
pictures = np.clip(rng.normal(90 + 70 * labels[:, None, None, None], 30, (70, 32, 32, 3)), 0, 255).astype(np.uint8)
features = compile_forward(extractor, "keras", batch_size=16)([pictures[:50], pictures[50:]])
features = (features - features.mean(axis=0)) / features.std(axis=0)
data = FeatureSet((features,), np.array([0, 70]), labels)
params = TrainParams(epochs=8, batch_size=16, learning_rate=0.01, hidden_units=(8,), dropout=0.2)

head = build_head(data.size, 2, params, 1)
history = fit_head(head, data, data, params, seed=1)
assert len(history) == 8, history
assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0] / 2, history
assert history["val_accuracy"].max() > 0.9, history
model = assemble([network], [backbone], head, 32, "avg")
save_model(model, ModelInfo(("cat", "dog"), 32, "stretch", 95, "mini", "random", "avg"), Path("jax.keras"))
np.savez("jax.npz", pictures=pictures, probabilities=compile_forward(model, "keras", batch_size=16)([pictures]))
"""


def test_saved_model_gives_the_same_probabilities_and_one_trained_there_runs_with_tensorflow(under_jax, tmp_path):
    prepare_keras(1)
    rng = np.random.default_rng(0)
    pictures = (rng.integers(0, 256, (7, 32, 32, 3)) * rng.uniform(0.1, 1, (7, 1, 1, 3))).astype(np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    expected = {}
    for name, backbone in BACKBONES.items():
        network = build_network(32)
        # Not what BatchNorm and biases start with, which changes nothing.
        weights = [value + rng.uniform(0, 0.3, value.shape) * (value.ndim == 1) for value in network.get_weights()]
        network.set_weights(weights)
        head = build_head(16, 3, TrainParams(hidden_units=(8,)), 1)
        model = assemble([network], [backbone], head, 32, "avg")
        info = ModelInfo(("cat", "dog", "emu"), 32, "stretch", 95, name, "random", "avg")
        save_model(model, info, tmp_path / f"{name}.keras")
        expected[name] = compile_forward(model, "keras")([pictures])
    # What is compiled runs for a moment: optimizing it takes longer.
    assert (
        under_jax(LOADED_AND_TRAINED, XLA_FLAGS="--xla_backend_optimization_level=0") == "keras ('cat', 'dog', 'emu')\n"
    )
    for name, probabilities in expected.items():
        assert np.load(tmp_path / f"{name}.npy") == pytest.approx(probabilities, abs=1e-4)
        assert np.ptp(probabilities, axis=0).max() > 3e-3  # pictures differ by far more than the backends
    model, _ = model_module.load_model(tmp_path / "jax.keras")
    with np.load(tmp_path / "jax.npz") as arrays:
        assert compile_forward(model, "keras")([arrays["pictures"]]) == pytest.approx(arrays["probabilities"], abs=1e-4)


WITHOUT = """
import sys
sys.modules["tensorflow"] = None  # not even to be found
from catdog.runtime import device_facts, device_name, prepare_keras
import keras
import numpy as np
from catdog.inference import choose_engine, compile_forward

pixels = keras.Input((8, 8, 3))
model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(pixels))
forward = compile_forward(model, choose_engine("auto"))
assert (forward([np.full((2, 8, 8, 3), 7, np.uint8)]) == 7).all()
print(device_name().partition(":")[0], device_facts()["keras.backend"])
"""


def test_runtime_and_inference_need_no_tensorflow():
    assert run_python(WITHOUT, KERAS_BACKEND="jax").stdout == "cpu jax\n"
