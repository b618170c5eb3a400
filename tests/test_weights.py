"""Weights come from where they should, and never silently from nowhere."""

import functools
import hashlib
import shutil
import socket
import threading
import time
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest

from catdog import weights as weights_module
from catdog.backbones import BACKBONES, build_backbone
from catdog.errors import CatdogError
from catdog.weights import check_weights_available, load_all, load_weights

PRETRAINED = Path(__file__).parents[1] / "pretrained"
SHIPPED = [name for name, backbone in BACKBONES.items() if backbone.shipped is not None]
VGG16 = BACKBONES["vgg16"]
VGG19 = BACKBONES["vgg19"]
EFFICIENTNET = BACKBONES["efficientnetb0"]


@pytest.fixture
def keras_cache(tmp_path, monkeypatch):
    """An empty Keras cache of this test's own; returns the directory of the weights files."""
    from keras.src.backend import config

    home = tmp_path / "keras_home"
    models = home / "models"
    models.mkdir(parents=True)
    monkeypatch.setenv("KERAS_HOME", str(home))
    monkeypatch.setattr(config, "_KERAS_DIR", str(home))  # Keras read the variable when imported
    return models


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine; returns its address and the directory it serves."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    directory = tmp_path / "served"
    directory.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=directory)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/", directory
        http.shutdown()
        thread.join()


def values(model):
    """All weights of a model in one float64 vector (not the seeds of its dropout layers)."""
    import keras

    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(v)).astype("float64") for v in model.weights])


@functools.cache
def built(name):
    """A network that is built once, for tests to which it matters little which weights it has."""
    return build_backbone(BACKBONES[name], 32)


def load(model, backbone, weights, root=Path("/nonexistent"), pretrained=Path("/nonexistent")):
    return load_weights(model, backbone, weights, pretrained_dir=pretrained, root=root)


def check(backbone, weights, root=Path("/nonexistent"), pretrained=Path("/nonexistent")):
    check_weights_available([backbone], weights, pretrained_dir=pretrained, root=root)


# --- shipped files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load(name):
    backbone = BACKBONES[name]
    assert backbone.shipped is not None
    model = build_backbone(backbone, 32)
    random = values(model)
    source = load(model, backbone, "imagenet", pretrained=PRETRAINED)
    file = PRETRAINED / backbone.shipped

    assert (source.kind, source.path) == ("pretrained", file)
    assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {variable.dtype for variable in model.variables} == {"float32"}
    loaded = values(model)
    assert np.isfinite(loaded).all()
    assert np.mean(loaded != random) > 0.99
    with h5py.File(file) as stored:  # every number of the file is in the model, and nothing else
        arrays = []
        stored.visititems(lambda _, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    assert loaded.size == sum(array.size for array in arrays)
    assert {"float16", "float32"} >= {str(array.dtype) for array in arrays}
    np.testing.assert_allclose(loaded.sum(), sum(array.astype("float64").sum() for array in arrays), rtol=1e-9)


def test_changed_shipped_file_is_refused(tmp_path):
    backbone = BACKBONES["mobilenetv2"]
    assert backbone.shipped is not None
    file = tmp_path / backbone.shipped
    shutil.copyfile(PRETRAINED / backbone.shipped, file)
    with file.open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"\0\1\2\3")
    model = built(backbone.name)
    with pytest.raises(CatdogError, match="damaged or was changed: its SHA-256 is"):
        load(model, backbone, "imagenet", pretrained=tmp_path)
    with pytest.raises(CatdogError, match="damaged or was changed"):
        check(backbone, "imagenet", pretrained=tmp_path)


# --- files of the user -------------------------------------------------------------------------


def test_random_leaves_the_model_alone():
    model = built("vgg16")
    before = values(model)
    source = load(model, VGG16, "random")
    assert (source.kind, source.path, source.sha256) == ("random", None, None)
    assert np.array_equal(values(model), before)
    check(VGG16, "random")


def test_file_relative_to_root_and_absolute(tmp_path):
    saved = built("vgg16")
    file = tmp_path / "mine.weights.h5"
    saved.save_weights(file)
    for weights in ("mine.weights.h5", str(file)):
        check(VGG16, weights, root=tmp_path)
        model = build_backbone(VGG16, 64)
        source = load(model, VGG16, weights, root=tmp_path)
        assert (source.kind, source.path) == ("file", file)
        assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert np.array_equal(values(model), values(saved))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.weights.h5", None, "there is no weights file"),
        ("folder", "folder", "there is no weights file"),
        (f"{'x' * 300}.h5", None, "cannot be read: File name too long"),
        ("image-net", None, '"imagenet", "random" or the path'),
        ("notes.txt", b"hello", r"must end in \.weights\.h5 or \.h5"),
        ("text.weights.h5", b"hello", "is not an HDF5 file"),
        ("empty.h5", b"", "is not an HDF5 file"),
    ],
)
def test_what_cannot_be_a_weights_file_is_refused_early_and_late(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CatdogError, match=message) as caught:
        check(VGG16, name, root=tmp_path)
    assert str(path) in str(caught.value)
    with pytest.raises(CatdogError, match=message):
        load(built("vgg16"), VGG16, name, root=tmp_path)


def test_home_folder_that_nobody_knows_is_told(tmp_path):
    with pytest.raises(CatdogError, match=r"weights = .~no-such-user/w\.h5. begins with a home folder"):
        check(VGG16, "~no-such-user/w.h5", root=tmp_path)


@pytest.mark.parametrize("name", ["vgg19", "mobilenetv2"])
def test_weights_of_another_network_are_refused(name):
    weights = str(PRETRAINED / str(VGG16.shipped))
    with pytest.raises(CatdogError, match=f"does not hold weights for '{name}'") as caught:
        load(built(name), BACKBONES[name], weights)
    assert caught.value.__cause__ is not None


def test_weights_file_of_another_structure_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names"] = 3  # Keras raises TypeError
    with pytest.raises(CatdogError, match="does not hold weights for 'vgg16'"):
        load(built("vgg16"), VGG16, "a.h5", root=tmp_path)


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
@pytest.mark.parametrize("damage", ["truncated", "unrelated", "other format"])
def test_hdf5_files_without_usable_weights_are_refused(tmp_path, suffix, damage):
    file = tmp_path / f"file{suffix}"
    shipped = PRETRAINED / str(VGG16.shipped)
    if damage == "truncated":
        file.write_bytes(shipped.read_bytes()[:1_000_000])
    elif damage == "unrelated":
        with h5py.File(file, "w") as stored:
            stored["images"] = np.zeros(3)
    elif suffix == ".weights.h5":
        save_legacy(built("vgg16"), file)
    else:
        shutil.copyfile(shipped, file)
    with pytest.raises(CatdogError, match="does not hold weights for 'vgg16'"):
        load(built("vgg16"), VGG16, str(file))


# --- several networks --------------------------------------------------------------------------

PAIR = (BACKBONES["mobilenetv2"], VGG16)


def load_into(networks, weights, root=Path("/nonexistent")):
    """Loads the networks of PAIR; returns the sources."""
    return load_all(networks, PAIR, weights, pretrained_dir=PRETRAINED, root=root)


def load_pair(weights, root=Path("/nonexistent")):
    """Builds the networks of PAIR and loads them; returns them and the sources."""
    networks = [build_backbone(backbone, 32) for backbone in PAIR]
    return networks, load_into(networks, weights, root)


def test_one_word_is_for_all():
    networks, sources = load_pair("imagenet")
    assert [source.path.name for source in sources] == [backbone.shipped for backbone in PAIR]
    for network, backbone in zip(networks, PAIR, strict=True):
        alone = built(backbone.name)
        load(alone, backbone, "imagenet", pretrained=PRETRAINED)
        assert np.array_equal(values(network), values(alone))
    assert [source.kind for source in load_into(networks, "random")] == ["random", "random"]


def test_one_source_each_in_their_order(tmp_path):
    saved = built("vgg16")
    saved.save_weights(tmp_path / "mine.weights.h5")
    weights = "imagenet+mine.weights.h5"
    check_weights_available(PAIR, weights, pretrained_dir=PRETRAINED, root=tmp_path)
    networks, sources = load_pair(weights, tmp_path)
    assert [source.kind for source in sources] == ["pretrained", "file"]
    assert np.array_equal(values(networks[1]), values(saved))
    with pytest.raises(CatdogError, match="does not hold weights for 'mobilenetv2'"):
        load_into(networks, "mine.weights.h5+imagenet", tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("mine.weights.h5", r"is one file, but 'mobilenetv2\+vgg16' are 2 networks.* imagenet\+mine\.weights\.h5"),
        ("imagenet+random+random", "does not name one source for each of the 2 networks"),
        ("imagenet+", "does not name one source for each"),
        ("imagenet+absent.weights.h5", "there is no weights file '.*absent.weights.h5'"),
    ],
)
def test_weights_that_do_not_fit_several_networks_are_refused_early_and_late(tmp_path, weights, message):
    (tmp_path / "mine.weights.h5").write_bytes((PRETRAINED / str(VGG16.shipped)).read_bytes())
    with pytest.raises(CatdogError, match=message):
        check_weights_available(PAIR, weights, pretrained_dir=PRETRAINED, root=tmp_path)
    networks = [built(backbone.name) for backbone in PAIR]
    with pytest.raises(CatdogError, match=message):
        load_into(networks, weights, tmp_path)


def test_path_of_a_single_network_may_hold_a_plus(tmp_path):
    built("vgg16").save_weights(tmp_path / "a+b.weights.h5")
    assert load(built("vgg16"), VGG16, "a+b.weights.h5", root=tmp_path).kind == "file"


# --- Keras' cache and download -----------------------------------------------------------------


def save_legacy(model, file):
    """Save weights as the files are that Keras publishes."""
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(file, "w") as stored:
        legacy_h5_format.save_weights_to_hdf5_group(stored, model)


def test_download_then_cache_then_damage(keras_cache, server, monkeypatch):
    """Keras' own download code runs against a local server, with Keras' own checks."""
    import keras
    from keras.src.applications import efficientnet

    address, served = server
    published = build_backbone(EFFICIENTNET, 32)
    normalization = next(x for x in published.layers if isinstance(x, keras.layers.Normalization))
    normalization.set_weights([np.array([0.485, 0.456, 0.406]), np.array([0.05, 0.06, 0.07]), np.array(1)])
    file = served / EFFICIENTNET.weights_file
    save_legacy(published, file)
    checksum = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(efficientnet, "BASE_WEIGHTS_PATH", address)
    monkeypatch.setitem(efficientnet.WEIGHTS_HASHES, "b0", (checksum, checksum))
    cached = keras_cache / EFFICIENTNET.weights_file
    model = build_backbone(EFFICIENTNET, 64)

    source = load(model, EFFICIENTNET, "imagenet")
    assert (source.kind, source.path) == ("keras-download", cached)
    assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert np.array_equal(values(model), values(published))

    # It computes what Keras' own pretrained network computes, the extra scaling included.
    theirs = keras.applications.EfficientNetB0(include_top=False, input_shape=(64, 64, 3))
    pixels = np.random.default_rng(0).uniform(0.0, 255.0, (1, 64, 64, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(theirs(pixels))
    assert np.abs(expected).max() > 0.0
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(pixels)), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )

    file.rename(served / "away")
    assert load(model, EFFICIENTNET, "imagenet").kind == "keras-cache"

    cached.write_bytes(cached.read_bytes()[:1000])  # an interrupted download, and the server lost the file
    with pytest.raises(CatdogError, match="404"):
        load(model, EFFICIENTNET, "imagenet")

    cached.write_bytes(b"again")
    (served / "away").rename(file)
    assert load(model, EFFICIENTNET, "imagenet").kind == "keras-download"

    cached.unlink()
    file.write_bytes(b"not what was published")
    with pytest.raises(CatdogError, match="Incomplete or corrupted file"):
        load(model, EFFICIENTNET, "imagenet")


def test_nothing_anywhere_is_an_error_and_leaves_the_model_alone(keras_cache, monkeypatch):
    from keras.src.applications import vgg19

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(vgg19, "WEIGHTS_PATH_NO_TOP", "http://127.0.0.1:1/weights.h5")  # refuses connections
    model = built("vgg19")
    before = values(model)
    check(VGG19, "imagenet")  # only the download can tell
    with pytest.raises(CatdogError) as caught:
        load(model, VGG19, "imagenet")
    message = str(caught.value)
    assert "'vgg19'" in message
    assert f"put {VGG19.weights_file} into {keras_cache}" in message
    assert "work" in message and "mobilenetv2, vgg16" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert np.array_equal(values(model), before)
    assert not list(keras_cache.iterdir())


def test_shipped_backbone_without_its_file_falls_back_to_keras(keras_cache, tmp_path):
    """The same file in Keras' cache serves as well; MobileNetV2 is the one Keras has no checksum for."""
    backbone = BACKBONES["mobilenetv2"]
    published = build_backbone(backbone, 32)
    save_legacy(published, keras_cache / backbone.weights_file)
    model = build_backbone(backbone, 32)
    source = load(model, backbone, "imagenet", pretrained=tmp_path)
    assert source.kind == "keras-cache"
    assert np.array_equal(values(model), values(published))

    (keras_cache / backbone.weights_file).write_bytes(b"damaged")
    with pytest.raises(CatdogError, match="could not be"):
        load(model, backbone, "imagenet", pretrained=tmp_path)


@pytest.mark.usefixtures("keras_cache")
def test_silent_server_is_given_up_soon(monkeypatch):
    from keras.src.applications import vgg19

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights_module, "NETWORK_TIMEOUT_SECONDS", 0.3)
    model = built("vgg19")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.h5"
        monkeypatch.setattr(vgg19, "WEIGHTS_PATH_NO_TOP", address)
        start = time.monotonic()
        with pytest.raises(CatdogError, match="timed out"):
            load(model, VGG19, "imagenet")
    assert time.monotonic() - start < 10.0
    assert socket.getdefaulttimeout() is None


def test_record_without_shipped_file_is_not_looked_for(keras_cache):
    backbone = replace(VGG16, shipped=None, shipped_sha256=None)
    save_legacy(built("vgg16"), keras_cache / "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5")
    check(backbone, "imagenet", pretrained=PRETRAINED)
