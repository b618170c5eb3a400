"""Grad-CAM shows the evidence for a class, as the paper's formula has it, whatever the network, pooling and head."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from catdog.backbones import BACKBONES, build_backbone, get_backbones, preprocess
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.fine_tuning import unfreeze
from catdog.gradcam import build_gradcam, overlay
from catdog.model import ModelInfo, assemble, build_head, load_model, save_model, set_temperature
from test_jax_backend import pytestmark as needs_jax

SIZE = 16
ENGINES = pytest.mark.parametrize("engine", ["openvino", "keras"])


def small_network(name, channels=6):
    """One convolution that bears the name of a real network's last; after VGG16's comes a pooling, as in VGG16."""
    pixels = keras.Input((SIZE, SIZE, 3))
    maps = keras.layers.Conv2D(
        channels,
        3,
        4 if name == "mobilenetv2" else 2,  # maps of different sizes
        "same",
        activation="relu",
        kernel_initializer=keras.initializers.GlorotUniform(seed=len(name)),
        bias_initializer=keras.initializers.RandomUniform(-0.2, 0.2, seed=1),
        name=BACKBONES[name].last_convolution,
    )(pixels)
    return keras.Model(pixels, keras.layers.MaxPooling2D()(maps) if name == "vgg16" else maps, name=f"small_{name}")


def small_model(names="mobilenetv2", pooling="avg", *, classes=2, hidden=(), scale=1.0):
    """An assembled model of small networks, and what it says about itself."""
    backbones = get_backbones(names)
    networks = [small_network(backbone.name) for backbone in backbones]
    places = {"flatten": 16}.get(pooling, 1)
    head = build_head(6 * places * len(networks), classes, TrainParams(hidden_units=hidden), 1)
    head.get_layer("logits").set_weights([scale * value for value in head.get_layer("logits").get_weights()])
    info = ModelInfo(tuple("abcde"[:classes]), SIZE, "stretch", 95, names, "random", pooling)
    return assemble(networks, backbones, head, SIZE, pooling), info


def some_pixels(count=5, size=SIZE, seed=0):
    """Coloured noise, coarse enough to leave differences between the places of a map."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, size // 4, size // 4, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


def last_maps(model, name, pixels):
    """The last convolutional activation, by way of the network itself."""
    network = next(layer for layer in model.layers if layer.name == f"small_{name}")
    maps = keras.Model(network.inputs[0], network.get_layer(BACKBONES[name].last_convolution).output)
    return np.asarray(maps(preprocess(pixels.astype(np.float32), BACKBONES[name])), np.float64)


def logit(maps, name, pooling, head, number):
    """The head's logit of a class from one picture's maps [h, w, channels], in NumPy."""
    if name == "vgg16":
        height, width, channels = maps.shape
        maps = maps.reshape(height // 2, 2, width // 2, 2, channels).max(axis=(1, 3))
    values = {"avg": maps.mean((0, 1)), "max": maps.max((0, 1)), "flatten": maps.ravel()}[pooling]
    for layer in head.layers:
        if isinstance(layer, keras.layers.Dense):
            kernel, bias = layer.get_weights()
            values = values @ kernel + bias
            values = np.maximum(0, values) if layer.name.startswith("hidden") else values
    return values[number] if len(values) > 1 else values[0] * (1 if number else -1)


def enlarged(cam):
    """One picture's map [h, w], bilinear and with the highest value 1."""
    large = np.asarray(tf.image.resize(np.maximum(0, cam)[..., np.newaxis], (SIZE, SIZE)))[..., 0]
    return large / (large.max() or 1)


def expected(model, name, pooling, pixels, classes):
    """The paper's equations 1 and 2, each gradient by finite differences."""
    heats = []
    for maps, number in zip(last_maps(model, name, pixels), classes, strict=True):
        weights = []
        for channel in range(maps.shape[-1]):
            step = np.zeros(maps.shape[-1])
            step[channel] = 1e-6
            up, down = (logit(maps + way * step, name, pooling, model.get_layer("head"), number) for way in (1, -1))
            weights.append((up - down) / 2e-6)
        heats.append(enlarged(maps @ np.array(weights)))
    return np.array(heats)


@ENGINES
@pytest.mark.parametrize(
    ("name", "pooling", "classes", "hidden"),
    [
        *itertools.product(["mobilenetv2", "vgg16"], ["avg", "max", "flatten"], [2], [(), (7, 5)]),
        *itertools.product(["mobilenetv2", "vgg16"], ["avg", "max", "flatten"], [4], [(), (7,)]),
        ("densenet121", "avg", 2, ()),  # its preprocessing is a third one
    ],
)
def test_maps_are_the_papers(name, pooling, classes, hidden, engine):
    model, info = small_model(name, pooling, classes=classes, hidden=hidden)
    pixels, wanted = some_pixels(6), np.arange(6) % classes
    heat = build_gradcam(model, info, engine)(pixels, wanted)
    assert (heat.dtype, heat.shape) == (np.float32, (6, SIZE, SIZE))
    assert set(heat.max(axis=(1, 2)).tolist()) <= {0.0, 1.0}
    assert heat.max() == 1
    assert heat.min() >= 0
    assert heat == pytest.approx(expected(model, name, pooling, pixels, wanted), abs=1e-4)


# In all networks but VGG the last convolution is the output, as `test_backbones` has it. These differ in what is
# around it: VGG's pooling, the preprocessing outside or inside the network, and a layer that was renamed or copied.
FAMILIES = ["convnexttiny", "efficientnetb0", "mobilenetv2", "resnet50", "vgg16"]


@ENGINES
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_backbone_can_be_explained(name, engine):
    """With average pooling and a linear head, Grad-CAM is the maps times the head's kernel (section 3.1)."""
    keras.utils.set_random_seed(1)
    backbone = BACKBONES[name]
    size = max(64, backbone.minimum_size + 32)
    network = build_backbone(backbone, size)
    head = build_head(network.output_shape[-1], 2, TrainParams(), 1)
    model = assemble([network], [backbone], head, size, "avg")
    pixels = np.repeat(some_pixels(1, size // 4 * 4, seed=2), 2, axis=0)
    pixels = np.pad(pixels, ((0, 0), (0, size - pixels.shape[1]), (0, size - pixels.shape[2]), (0, 0)))
    info = ModelInfo(("cat", "dog"), size, "stretch", 95, name, "random", "avg")
    heat = build_gradcam(model, info, engine)(pixels, np.array([0, 1]))

    maps = keras.Model(network.inputs[0], network.get_layer(backbone.last_convolution).output)
    values = np.asarray(maps(preprocess(pixels[:1].astype(np.float32), backbone), training=False), np.float64)[0]
    evidence = values @ head.get_layer("logits").get_weights()[0][:, 0]
    assert np.ptp(evidence) > 0
    for found, sign in zip(heat, (-1, 1), strict=True):
        large = np.asarray(tf.image.resize(np.maximum(0, sign * evidence)[..., np.newaxis], (size, size)))[..., 0]
        assert found == pytest.approx(large / (large.max() or 1), abs=1e-3)
    assert heat.max() == 1


def red_against_blue():
    """A sigmoid model whose first channel is red, its second blue, and whose second class is red."""
    model, info = small_model()
    convolution = next(layer for layer in model.layers if layer.name == "small_mobilenetv2").get_layer("out_relu")
    kernel = np.zeros((3, 3, 3, 6))
    kernel[1, 1, 0, 0] = kernel[1, 1, 2, 1] = 1
    convolution.set_weights([kernel, np.zeros(6)])
    model.get_layer("head").get_layer("logits").set_weights([np.array([[1, -1, 0, 0, 0, 0]]).T, np.zeros(1)])
    pixels = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    pixels[:, :, : SIZE // 2, 0] = 255
    pixels[:, :, SIZE // 2 :, 2] = 255
    return model, info, pixels


def test_each_class_of_a_sigmoid_is_found_on_its_side():
    model, info, pixels = red_against_blue()
    blue, red = build_gradcam(model, info)(pixels.repeat(2, axis=0), np.array([0, 1]))
    quarter = SIZE // 4
    assert (red[:, :quarter] == 1).all()
    assert (red[:, -quarter:] == 0).all()
    assert blue == pytest.approx(red[:, ::-1], abs=1e-6)


@ENGINES
def test_nothing_that_speaks_for_a_class_gives_no_heat(engine):
    model, info, pixels = red_against_blue()
    only_red = np.where(np.arange(3) == 0, pixels.max(), 0).astype(np.uint8) * np.ones_like(pixels)
    blue, red = build_gradcam(model, info, engine)(only_red.repeat(2, axis=0), np.array([0, 1]))
    assert (blue == 0).all()
    assert (red == 1).all()


@ENGINES
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_joined_networks_give_the_mean_of_their_maps(pooling, engine):
    names = ("vgg16", "mobilenetv2")
    model, info = small_model("+".join(names), pooling)
    pixels, wanted = some_pixels(), np.ones(5, np.int64)
    heat = build_gradcam(model, info, engine)(pixels, wanted)
    kernel = model.get_layer("head").get_layer("logits").get_weights()[0][:, 0]
    parts = []
    for name, weights in zip(names, (kernel[:6], kernel[6:]), strict=True):
        parts.append(np.array([enlarged(maps @ weights) for maps in last_maps(model, name, pixels)]))
    assert heat == pytest.approx(np.mean(parts, axis=0), abs=1e-4)
    assert np.abs(parts[0] - parts[1]).max() > 0.1


def test_a_sure_model_has_a_gradient_too():
    """Of the logit: that of a probability of exactly 1 is 0."""
    model, info = small_model(scale=1e4)
    pixels = some_pixels()
    assert set(np.ravel(model(pixels.astype(np.float32))).tolist()) <= {0.0, 1.0}
    unsure, _ = small_model()
    classes = np.array([0, 1, 0, 1, 0])
    heat = build_gradcam(model, info)(pixels, classes)
    assert heat.max() == 1
    assert heat == pytest.approx(build_gradcam(unsure, info)(pixels, classes), abs=1e-4)


@pytest.mark.parametrize("names", ["mobilenetv2", "vgg16+mobilenetv2"])
def test_saved_model_and_its_temperature_and_a_model_without_one(tmp_path, names):
    model, info = small_model(names, classes=3, hidden=(5,))
    pixels, classes = some_pixels(), np.arange(5) % 3
    heat = build_gradcam(model, info)(pixels, classes)
    set_temperature(model, 3.7)
    save_model(model, info, tmp_path / "model.keras")
    logits = model.get_layer("temperature").input
    old = keras.Model(model.input, keras.layers.Activation("softmax", name="probabilities")(logits))
    save_model(old, info, tmp_path / "old.keras")
    for name in ("model", "old"):
        assert (build_gradcam(*load_model(tmp_path / f"{name}.keras"))(pixels, classes) == heat).all()


@ENGINES
def test_model_stays_as_it_is(tmp_path, engine):
    model, info = small_model("vgg16+mobilenetv2", "max", hidden=(5,))
    save_model(model, info, tmp_path / "before.keras")
    build_gradcam(model, info, engine)(some_pixels(), np.zeros(5, np.int64))
    save_model(model, info, tmp_path / "after.keras")
    assert (tmp_path / "after.keras").read_bytes() == (tmp_path / "before.keras").read_bytes()


def test_frozen_and_trainable_layers_are_explained_alike():
    model, info = small_model()
    pixels, classes = some_pixels(), np.zeros(5, np.int64)
    frozen = build_gradcam(model, info)(pixels, classes)
    unfreeze(
        [layer for layer in model.layers if layer.name == "small_mobilenetv2"], get_backbones("mobilenetv2"), "all"
    )
    assert (build_gradcam(model, info)(pixels, classes) == frozen).all()


@ENGINES
def test_pictures_do_not_depend_on_their_batch(engine):
    model, info = small_model(hidden=(5,), pooling="max")
    pixels, classes = some_pixels(11), np.arange(11) % 2
    explain = build_gradcam(model, info, engine, batch_size=4)
    heat = explain(pixels, classes)
    assert (explain(pixels, classes) == heat).all()
    assert build_gradcam(model, info, engine, batch_size=1)(pixels, classes) == pytest.approx(heat, abs=1e-5)
    assert explain(pixels[::-1], classes[::-1])[::-1] == pytest.approx(heat, abs=1e-5)
    assert explain(pixels[:0], classes[:0]).shape == (0, SIZE, SIZE)


def test_openvino_takes_half_precision_too():
    """A run may ask for it anywhere; the maps are those of the same network in Keras."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, info = small_model()
        pixels, classes = some_pixels(), np.array([0, 1, 0, 1, 0])
        half = build_gradcam(model, info, "openvino")(pixels, classes)
        assert half == pytest.approx(build_gradcam(model, info)(pixels, classes), abs=0.05)
        assert half.max() == 1
    finally:
        keras.config.set_dtype_policy("float32")


def test_unknown_backend_is_told(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(CatdogError, match=r"backend torch; set evaluate\.gradcam to false, or KERAS_BACKEND to"):
        build_gradcam(*small_model())


EXPLAINED = """
from pathlib import Path
import numpy as np
from catdog.runtime import prepare_keras
prepare_keras(1)
from catdog.gradcam import build_gradcam
from catdog.model import load_model
pixels, classes = np.load("pixels.npy"), np.load("classes.npy")
for name, batch_size in (("one", 5), ("two", 3)):
    explain = build_gradcam(*load_model(Path(f"{name}.keras")), batch_size=batch_size)
    np.save(f"{name}.npy", explain(pixels, classes))
"""


@needs_jax
def test_jax_gives_the_same_maps(under_jax, tmp_path):
    models = {"one": small_model("vgg16", "flatten"), "two": small_model("vgg16+mobilenetv2", "max", hidden=(5,))}
    pixels, classes = some_pixels(), np.array([0, 1, 0, 1, 1])
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "classes.npy", classes)
    for name, (model, info) in models.items():
        save_model(model, info, tmp_path / f"{name}.keras")
    under_jax(EXPLAINED)
    for name, (model, info) in models.items():
        heat = build_gradcam(model, info)(pixels, classes)
        assert np.load(tmp_path / f"{name}.npy") == pytest.approx(heat, abs=1e-3)
        assert heat.std() > 0.1


def test_overlay_shows_picture_and_heat():
    pixels = some_pixels(1)[0]
    heat = np.zeros((SIZE, SIZE), np.float32)
    heat[4:8, 8:12] = 1
    drawn = overlay(pixels, heat)
    assert (drawn.dtype, drawn.shape) == (np.uint8, pixels.shape)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    cold = heat == 0
    assert np.abs(drawn[cold] - grey[cold][:, np.newaxis] / 2 - [0, 0, 2]).max() <= 1  # next to black, the map's start
    hot = drawn[~cold].astype(int) - grey[~cold][:, np.newaxis] / 2
    assert hot == pytest.approx(np.tile([126, 127.5, 82], (16, 1)), abs=2)  # pale yellow, the map's end


def test_overlay_grows_brighter_with_the_heat():
    pixels = np.full((8, 101, 3), 120, np.uint8)
    heat = np.tile(np.linspace(0, 1, 101, dtype=np.float32), (8, 1))
    lightness = overlay(pixels, heat)[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness[::5]) > 0).all()
