"""The registry is true, the networks build, and preprocessing is Keras' own."""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import catdog
from catdog.backbones import BACKBONES, Backbone, build_backbone, get_backbone, get_backbones, preprocess
from catdog.errors import CatdogError

EVERY = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=list(BACKBONES))


@contextmanager
def without_values():
    """Networks are built here without the numbers of their weights, which take most of the time."""
    import keras
    from keras.src.backend.common import global_state

    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", [])  # nobody gives them values later


@cache
def smallest_model(name):
    """Each network is built once, at its minimum size: building is what takes the time."""
    backbone = BACKBONES[name]
    with without_values():
        return build_backbone(backbone, backbone.minimum_size)


def keras_module(backbone: Backbone):
    """The module of keras.applications the builder comes from."""
    import keras

    return sys.modules[getattr(keras.applications, backbone.builder).__module__]


def test_import_loads_no_framework():
    code = (
        "import sys, catdog.backbones, catdog.weights;"
        "print([name for name in ('keras', 'tensorflow', 'h5py') if name in sys.modules])"
    )
    source = str(Path(catdog.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_names_are_the_keys_and_plain():
    assert all(name == backbone.name and name.isalnum() for name, backbone in BACKBONES.items())
    assert all((b.shipped is None) == (b.shipped_sha256 is None) for b in BACKBONES.values())


def test_registry_cannot_be_changed():
    with pytest.raises(TypeError):
        BACKBONES["mine"] = BACKBONES["vgg16"]  # type: ignore[index]


def test_get_backbone():
    assert get_backbone("vgg16") is BACKBONES["vgg16"]


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("mobilnetv2", "mobilenetv2"), ("MobileNetV2", "mobilenetv2"), ("efficientnet-b0", "efficientnetb0")],
)
def test_unknown_name_names_all_and_the_nearest(typed, nearest):
    with pytest.raises(CatdogError) as caught:
        get_backbone(typed)
    message = str(caught.value)
    assert f"'{typed}'" in message
    assert f"did you mean '{nearest}'" in message
    assert all(name in message for name in BACKBONES)


def test_unknown_name_without_a_near_one():
    with pytest.raises(CatdogError, match="choose one of mobilenetv2, ") as caught:
        get_backbone("zzz")
    assert "did you mean" not in str(caught.value)


def test_several_names_keep_their_order():
    assert get_backbones("vgg16") == (BACKBONES["vgg16"],)
    assert get_backbones("xception+mobilenetv2+vgg16") == tuple(
        BACKBONES[name] for name in ("xception", "mobilenetv2", "vgg16")
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("vgg16+mobilenetv2+vgg16", r"'vgg16\+mobilenetv2\+vgg16' names vgg16 twice"),
        ("vgg16+exception", "no backbone 'exception': did you mean 'xception'"),
        ("vgg16 + mobilenetv2", "no backbone 'vgg16 ': did you mean 'vgg16'"),
        ("vgg16+", "no backbone '': choose one of"),
        ("", "no backbone '': choose one of"),
    ],
)
def test_wrong_list_of_names_is_told(names, message):
    with pytest.raises(CatdogError, match=message):
        get_backbones(names)


def test_networks_have_names_of_their_own():
    """Joined in one model, each must be found by its name."""
    names = [smallest_model(name).name for name in BACKBONES]
    assert len(set(names)) == len(names)


@EVERY
def test_too_small_images_are_refused(backbone):
    import keras

    size = backbone.minimum_size - 1
    with pytest.raises(CatdogError, match=rf"{size} is too small for '{backbone.name}': use {size + 1} or"):
        build_backbone(backbone, size)
    with pytest.raises(ValueError, match="at least"):  # Keras draws the same line
        getattr(keras.applications, backbone.builder)(weights=None, include_top=False, input_shape=(size, size, 3))


@EVERY
def test_network_is_as_the_record_says(backbone):
    model = smallest_model(backbone.name)
    size = backbone.minimum_size
    assert model.input_shape == (None, size, size, 3)
    assert len(model.output_shape) == 4

    # The last convolution sees the whole depth; only pooling (VGG) may follow.
    activation = model.get_layer(backbone.last_convolution).output
    assert len(activation.shape) == 4
    assert activation.shape[-1] == model.output_shape[-1]
    after = model.layers[[layer.name for layer in model.layers].index(backbone.last_convolution) + 1 :]
    assert not [layer.name for layer in after if layer.weights]
    if backbone.name.startswith("vgg"):
        assert [type(layer).__name__ for layer in after] == ["MaxPooling2D"]
    else:
        assert activation is model.outputs[0]


@EVERY
def test_fine_tuning_starts_at_a_clean_cut(backbone):
    import keras

    model = smallest_model(backbone.name)
    names = [layer.name for layer in model.layers]
    tail = model.layers[names.index(backbone.fine_tune_from) :]
    # Everything after the cut, and nothing else, is computed from what goes into the cut layer.
    # (The node, because a nested Sequential's own `input` is not the outer graph's.)
    inputs = tail[0]._inbound_nodes[-1].input_tensors
    rest = keras.Model(inputs, model.output)
    assert {layer.name for layer in rest.layers if layer.weights} == {layer.name for layer in tail if layer.weights}
    assert any(layer.trainable_weights for layer in tail)


@EVERY
def test_weights_file_is_what_keras_asks_for(backbone, monkeypatch):
    import keras
    from keras.src.utils import file_utils

    class Asked(Exception):
        pass

    def get_file(fname, origin, cache_subdir, **_):
        raise Asked(fname, cache_subdir)

    monkeypatch.setattr(file_utils, "get_file", get_file)
    size = backbone.native_size
    with pytest.raises(Asked) as caught, without_values():
        getattr(keras.applications, backbone.builder)(
            weights="imagenet", include_top=False, input_shape=(size, size, 3)
        )
    assert caught.value.args == (backbone.weights_file, "models")


@EVERY
def test_preprocessing_equals_that_of_keras(backbone):
    import keras

    pixels = np.random.default_rng(0).uniform(0.0, 255.0, (2, 8, 9, 3)).astype("float32")
    expected = keras_module(backbone).preprocess_input(pixels.copy())
    actual = keras.ops.convert_to_numpy(preprocess(pixels, backbone))
    assert actual.dtype == np.float32
    assert actual.shape == pixels.shape
    # Values that cancel to almost zero have no relative accuracy: 1e-5 of the range counts there.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["mobilenetv2", "vgg16", "densenet121"])
def test_preprocessing_stays_float32_under_mixed_precision(name):
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        outputs = preprocess(keras.Input((8, 8, 3), dtype="float32"), BACKBONES[name])
    finally:
        keras.config.set_dtype_policy(before)
    assert outputs.dtype == "float32"
