"""The model: the head's shape, the parts joined exactly, and a file that stands for itself."""

import functools
import json
import time
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from catdog import paths
from catdog.backbones import build_backbone, get_backbone, get_backbones, preprocess
from catdog.config import TrainParams, load_params, validate_params
from catdog.errors import CatdogError
from catdog.features import open_features
from catdog.files import read_json, write_json
from catdog.model import (
    ModelInfo,
    assemble,
    build_extractor,
    build_head,
    choose_output,
    class_probabilities,
    load_model,
    logits_of,
    read_info,
    save_model,
    set_temperature,
)
from catdog.records import (
    ImageRow,
    RecordReader,
    encode_record,
    plan_shards,
    shard_paths,
    write_index,
    write_shard,
)
from catdog.sample import write_sample
from catdog.tracking import STAGES
from catdog.weights import load_all
from conftest import Project
from stage_scripts import without_mlflow

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SIZE = 64  # MobileNetV2 gives maps of 2 x 2 there
INFO = ModelInfo(("cat", "Köter"), SIZE, "pad", 93, "mobilenetv2", "random", "avg")


@pytest.fixture(scope="module")
def network():
    """MobileNetV2 with random weights; the tests only read it."""
    keras.utils.set_random_seed(3)
    built = build_backbone(get_backbone("mobilenetv2"), SIZE)
    # With fresh statistics random weights would fade to nothing; these are of random pixels.
    layers = [layer for layer in built.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        layer.momentum, before = 0.0, layer.momentum
    built(pictures(16) / 127.5 - 1, training=True)
    for layer in layers:
        layer.momentum = before
    return built


@pytest.fixture(scope="module")
def model(network):
    """The whole classifier with a head that tells pictures apart."""
    return joined(network, head_for(network))


def head_for(network, classes=2, **changes) -> keras.Model:
    keras.utils.set_random_seed(4)
    head = build_head(network.output_shape[-1], classes, TrainParams(**{"dropout": 0.0, **changes}), 4)
    return head


def joined(network, head, pooling="avg") -> keras.Model:
    return assemble([network], [get_backbone("mobilenetv2")], head, SIZE, pooling)


def pictures(count=5, size=SIZE) -> np.ndarray:
    """Pixels as the model gets them: 0..255, as float32; from dark to light."""
    rng = np.random.default_rng(0)
    light = np.linspace(0.2, 1, count)[:, None, None, None]
    return (rng.integers(0, 256, (count, size, size, 3)) * light).round().astype(np.float32)


def eager(model, values) -> np.ndarray:
    return np.asarray(model(values, training=False))


@pytest.mark.parametrize(
    ("output", "classes", "chosen"),
    [("auto", 2, "sigmoid"), ("auto", 3, "softmax"), ("softmax", 2, "softmax"), ("sigmoid", 2, "sigmoid")],
)
def test_choice_of_the_output(output, classes, chosen):
    assert choose_output(output, classes) == chosen
    head = build_head(7, classes, TrainParams(output=output), 1)
    assert head.output_shape == (None, 1 if chosen == "sigmoid" else classes)


def test_sigmoid_for_three_classes_is_refused():
    with pytest.raises(CatdogError, match=r"train\.output = 'sigmoid'.* has 3; use softmax or auto"):
        choose_output("sigmoid", 3)
    with pytest.raises(CatdogError):
        build_head(7, 3, TrainParams(output="sigmoid"), 1)


@pytest.mark.parametrize(
    ("hidden", "classes", "parameters"),
    [
        ((), 2, 10 + 1),
        ((), 3, 10 * 3 + 3),
        ((6,), 2, 10 * 6 + 6 + 6 + 1),
        ((6, 4), 3, 10 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3),
    ],
)
def test_head_has_the_layers_asked_for(hidden, classes, parameters):
    head = build_head(10, classes, TrainParams(hidden_units=hidden, activation="gelu", dropout=0.3, l2=0.1), 1)
    assert head.input_shape == (None, 10)
    assert head.count_params() == parameters
    dense = [layer for layer in head.layers if isinstance(layer, keras.layers.Dense)]
    assert [layer.units for layer in dense[:-1]] == list(hidden)
    assert [layer.activation for layer in dense] == [keras.activations.gelu] * len(hidden) + [keras.activations.linear]
    assert len(head.losses) == len(dense)  # one penalty a kernel
    kinds = [type(layer).__name__ for layer in head.layers[1:]]
    assert kinds == ["Dense", "Dropout"] * len(hidden) + ["Dense"] if hidden else ["Dropout", "Dense"]


def test_head_without_dropout_and_penalty_has_none():
    head = build_head(10, 2, TrainParams(hidden_units=(3,), dropout=0.0), 1)
    assert [type(layer).__name__ for layer in head.layers[1:]] == ["Dense", "Dense"]
    assert head.losses == []


def test_dropout_layers_drop_the_share_and_differ():
    head = build_head(4, 2, TrainParams(hidden_units=(3, 3), dropout=0.3), 1)
    layer, last = (layer for layer in head.layers if isinstance(layer, keras.layers.Dropout))
    assert layer.seed != last.seed
    dropped = np.asarray(layer(np.ones((5, 4000), np.float32), training=True)) == 0
    assert abs(dropped.mean() - 0.3) < 0.02


@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
def test_extractor_preprocesses_and_pools(network, pooling):
    values = pictures()
    maps = eager(network, values / 127.5 - 1)
    assert maps.shape == (5, 2, 2, 1280)
    pooled = {
        "avg": maps.mean(axis=(1, 2)),
        "max": maps.max(axis=(1, 2)),
        "flatten": maps.reshape(5, -1),
    }[pooling]
    extractor = build_extractor([network], [get_backbone("mobilenetv2")], SIZE, pooling)
    found = eager(extractor, values)
    assert extractor.output_shape == (None, pooled.shape[1])
    scale = np.abs(pooled).max()
    assert np.abs(found - pooled).max() < 1e-4 * scale
    assert np.abs(pooled - pooled[::-1]).max() > 0.05 * scale


@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
@pytest.mark.parametrize(("classes", "output"), [(2, "sigmoid"), (2, "softmax"), (3, "softmax")])
def test_assembled_model_is_exactly_extractor_then_head_then_probabilities(network, pooling, classes, output):
    extractor = build_extractor([network], [get_backbone("mobilenetv2")], SIZE, pooling)
    head = build_head(extractor.output_shape[1], classes, TrainParams(output=output, hidden_units=(4,)), 1)
    values = pictures(3)
    logits = head(extractor(values, training=False), training=False)
    activation = keras.ops.sigmoid if output == "sigmoid" else keras.ops.softmax
    found = eager(joined(network, head, pooling), values)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.asarray(activation(logits)))


def test_softmax_of_the_model_sums_to_one(network):
    found = eager(joined(network, head_for(network, 3)), pictures())
    assert found.shape == (5, 3)
    assert found.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-6)


def test_batchnorm_stays_in_inference_mode(network, model):
    """Also when the whole model is called in training mode, as fine-tuning would."""
    values = pictures()
    before = network.get_weights()
    expected = eager(model, values)
    try:
        trained = np.asarray(model(values, training=True))
        moved = [not np.array_equal(old, new) for old, new in zip(before, network.get_weights(), strict=True)]
    finally:
        network.set_weights(before)  # for the other tests
    assert not any(moved)
    assert np.array_equal(trained, expected)


JOINED = "mobilenetv2+vgg16"
JOINED_INFO = ModelInfo(("cat", "dog"), SIZE, "pad", 93, JOINED, "imagenet", "avg")


@pytest.fixture(scope="module")
def pretrained():
    """The two networks of JOINED with their real weights."""
    backbones = get_backbones(JOINED)
    networks = [build_backbone(backbone, SIZE) for backbone in backbones]
    load_all(networks, backbones, "imagenet", pretrained_dir=ROOT / "pretrained", root=ROOT)
    return networks


@pytest.fixture(scope="module")
def joined_model(pretrained):
    """A classifier on both networks."""
    head = build_head(1280 + 512, 2, TrainParams(dropout=0.0), 4)
    return assemble(pretrained, get_backbones(JOINED), head, SIZE, "avg")


@pytest.mark.parametrize(("pooling", "order"), [("avg", 1), ("max", 1), ("flatten", 1), ("avg", -1)])
def test_joined_features_are_the_single_ones_side_by_side(pretrained, pooling, order):
    """Each network sees the same pixels, prepared as it alone would get them."""
    networks, backbones = pretrained[::order], get_backbones(JOINED)[::order]
    both = build_extractor(networks, backbones, SIZE, pooling)
    alone = [
        build_extractor([network], [backbone], SIZE, pooling)
        for network, backbone in zip(networks, backbones, strict=True)
    ]
    singles = [eager(extractor, pictures()) for extractor in alone]
    assert both.output_shape == (None, sum(single.shape[1] for single in singles))
    assert np.array_equal(eager(both, pictures()), np.concatenate(singles, axis=1))
    assert all(np.ptp(single, axis=0).max() > 0.1 for single in singles)
    assert both.layers[-1].name == alone[0].layers[-1].name == "pooling"


def test_each_joined_network_gets_its_own_preprocessing(pretrained):
    prepare = (keras.applications.mobilenet_v2.preprocess_input, keras.applications.vgg16.preprocess_input)
    found = eager(build_extractor(pretrained, get_backbones(JOINED), SIZE, "avg"), pictures())
    for network, function, part in zip(pretrained, prepare, (found[:, :1280], found[:, 1280:]), strict=True):
        expected = eager(network, function(pictures())).mean(axis=(1, 2))
        assert np.abs(part - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_network_gives_the_names_that_model_files_have(model):
    names = [layer.name for layer in model.layers]
    assert names[:4] == ["pixels", "preprocessing", "mobilenetv2_1.00_64", "pooling"]
    assert names[4:] == ["head", "temperature", "probabilities"]


def test_names_in_a_joined_model_are_unique_and_tell_the_networks_apart(joined_model, pretrained):
    names = [layer.name for layer in joined_model.layers]
    assert len(set(names)) == len(names)
    inner = [layer for layer in joined_model.layers if isinstance(layer, keras.Model) and layer.name != "head"]
    assert [layer.name for layer in inner] == [network.name for network in pretrained]
    for network, backbone in zip(inner, get_backbones(JOINED), strict=True):
        # Where class activation maps are read, and where fine-tuning starts.
        assert network.get_layer(backbone.last_convolution) is not None
        assert network.get_layer(backbone.fine_tune_from) is not None


def test_joined_model_is_saved_loaded_and_the_same_with_its_temperature(joined_model, tmp_path):
    logits = eager(logits_of(joined_model), pictures())
    told = replace(JOINED_INFO, temperature=2.5, threshold=0.7)
    set_temperature(joined_model, 2.5)
    try:
        save_model(joined_model, told, tmp_path / "model.keras")
        expected = eager(joined_model, pictures())
    finally:
        set_temperature(joined_model, 1.0)
    loaded, info = load_model(tmp_path / "model.keras")
    assert info == told
    assert np.array_equal(eager(loaded, pictures()), expected)
    assert np.ptp(expected) > 1e-3
    assert np.allclose(expected, 1 / (1 + np.exp(-logits / 2.5)), atol=1e-6)
    assert np.allclose(eager(joined_model, pictures()), 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_batchnorm_of_every_joined_network_stays_in_inference_mode(joined_model):
    assert np.array_equal(
        np.asarray(joined_model(pictures(), training=True)), np.asarray(joined_model(pictures(), training=False))
    )


def test_networks_and_records_must_be_as_many(network):
    with pytest.raises(ValueError, match="shorter"):
        build_extractor([network, network], [get_backbone("mobilenetv2")], SIZE, "avg")


def test_class_probabilities_have_one_column_a_class():
    one = np.array([[0.25], [1.0]], np.float32)
    assert class_probabilities(one).tolist() == [[0.75, 0.25], [0, 1]]
    many = np.array([[0.5, 0.2, 0.3]], np.float32)
    assert class_probabilities(many) is many


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The model, saved; tests only read the file. The time of saving is returned too."""
    path = tmp_path_factory.mktemp("model") / "deep" / "model.keras"
    save_model(model, INFO, path)
    return path, time.time()


def test_file_works_in_a_process_without_this_project(saved, model, workshop, tmp_path):
    vgg = get_backbone("vgg16")  # its preprocessing swaps colours with an operation, not with a layer
    network = build_backbone(vgg, 32)
    other = assemble([network], [vgg], build_head(512, 3, TrainParams(), 1), 32, "avg")
    save_model(other, INFO, tmp_path / "vgg.keras")
    inputs = keras.Input((32, 32, 3))
    third = keras.Model(inputs, preprocess(inputs, get_backbone("densenet121")))  # the network alone takes 10 s to load
    third.save(tmp_path / "torch.keras")
    np.savez(tmp_path / "pixels.npz", a=pictures(), b=pictures(4, 32))
    code = (
        "import sys; sys.modules['catdog'] = None\n"
        "import keras, numpy as np\n"
        "data = np.load('pixels.npz')\n"
        f"a = keras.models.load_model({str(saved[0])!r}); b = keras.models.load_model('vgg.keras')\n"
        "c = keras.models.load_model('torch.keras', safe_mode=True)\n"
        "np.savez('out.npz', a=a(data['a'], training=False), b=b(data['b'], training=False), c=c(data['b']))\n"
    )
    done = Project(tmp_path, workshop.home, warm=True).run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    expected = {"a": eager(model, pictures()), "b": eager(other, pictures(4, 32)), "c": eager(third, pictures(4, 32))}
    for name, there in expected.items():
        assert np.abs(found[name] - there).max() < 1e-6
        assert np.ptp(there, axis=0).max() > 1e-3


def test_loaded_model_gives_the_same_output(saved, model):
    loaded, info = load_model(saved[0])
    assert info == INFO
    assert np.array_equal(eager(loaded, pictures()), eager(model, pictures()))


def test_saving_again_gives_the_same_bytes(saved, model, tmp_path):
    path, at = saved
    time.sleep(max(0, at + 1.1 - time.time()))  # Keras notes the second
    again = tmp_path / "other.keras"
    save_model(model, INFO, again)
    assert again.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["other.keras"]
    assert [p.name for p in path.parent.iterdir()] == ["model.keras"]


def test_file_says_how_to_feed_and_read_it(saved):
    assert read_info(saved[0]) == INFO
    with zipfile.ZipFile(saved[0]) as archive:
        described = json.loads(archive.read("catdog.json"))
    assert described["class_names"] == ["cat", "Köter"]
    assert described["jpeg_quality"] == 93


def test_failed_save_leaves_nothing(tmp_path):
    class Broken:
        def save(self, path):
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(Broken(), INFO, tmp_path / "model.keras")
    assert list(tmp_path.iterdir()) == []


def test_missing_model_is_told(tmp_path):
    with pytest.raises(CatdogError, match=r"no model at .*none\.keras; `dvc repro` trains one"):
        load_model(tmp_path / "none.keras")


@pytest.mark.parametrize("members", [None, {}, {"catdog.json": "{}"}, {"catdog.json": "[1]"}, {"catdog.json": "{"}])
def test_file_of_another_kind_is_told(tmp_path, members):
    path = tmp_path / "model.keras"
    if members is None:
        path.write_bytes(b"HDF5 or whatever")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in {"config.json": "{}", **members}.items():
                archive.writestr(name, text)
    with pytest.raises(CatdogError, match="not a model of this pipeline"):
        read_info(path)


def run_stage(name: str, params) -> None:
    """Runs a stage script in the working directory as it stands, but for what it tells MLflow."""

    def finish(report, *rest):
        write_json(STAGES[name].report, report)

    run = types.SimpleNamespace(params=params, root=Path.cwd(), run_id="none", finish=finish)
    run.measure = run.note = run.log_curves = run.log_model = lambda *values: None
    without_mlflow(name, run).main()


def test_trained_file_holds_the_networks_that_made_the_features(tmp_path, monkeypatch):
    """Through the real embed and train stages: the file's output is the head on the stored features."""
    weights = "imagenet+random"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "PRETRAINED", ROOT / "pretrained")
    write_sample(tmp_path / "raw.zip", count=12, seed=1)
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        rows = [ImageRow(name, int("dog" in name.lower())) for name in archive.namelist() if not name.endswith("/")]
        classes, options = ("cat", "dog"), {"size": 32, "mode": "stretch", "quality": 95, "max_pixels": 1e8}
        encode = functools.partial(encode_record, archive=archive, classes=classes, **options)
        splits = {"train": rows[::2], "val": rows[1::4], "test": rows[3::4]}
        shards = [shard for split, part in splits.items() for shard in plan_shards(split, part, 4)]
        written = [write_shard(shard, paths.TFRECORDS, encode) for shard in shards]
    write_index(paths.TFRECORDS, written, classes, size=32)
    described = {"classes": list(classes), "image_size": 32, "resize": "stretch", "jpeg_quality": 95}
    described["images"] = {split: len(part) for split, part in splits.items()}
    write_json(paths.PREPROCESS_REPORT, described)
    params = load_params(ROOT / "params.yaml").model_dump()
    params["embed"]["engine"], params["train"]["epochs"] = "keras", 1
    params = validate_params(params | {"backbone": JOINED, "weights": weights})
    run_stage("embed", params)
    run_stage("train", params)
    assert read_json(paths.FEATURES_INFO)["weights"] == weights

    whole, info = load_model(paths.MODEL)
    extractor = keras.Model(whole.inputs[0], whole.get_layer("pooling").output)
    reader = RecordReader(shard_paths(paths.TFRECORDS, "train"), 4)
    batches = [batch.astype(np.float32) for batch in reader]
    features = open_features(paths.FEATURES, "train")
    stored = features.take(np.arange(len(features.labels)))
    made = np.concatenate([eager(extractor, batch) for batch in batches])
    assert made.shape[1] == 1280 + 512
    for network in (np.s_[:, :1280], np.s_[:, 1280:]):
        scale = np.abs(stored[network]).max()
        assert np.ptp(stored[network], axis=0).max() > 1e-3 * scale > 0
        assert np.abs(made[network] - stored[network]).max() < 1e-3 * scale
    logits = eager(whole.get_layer("head"), stored).astype(np.float64) / info.temperature
    found = np.concatenate([eager(whole, batch) for batch in batches])
    assert np.abs(found - 1 / (1 + np.exp(-logits))).max() < 1e-4
