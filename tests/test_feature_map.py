"""The feature map: features beside unchanged probabilities, places that repeat to the byte, groups kept together."""

import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from catdog import feature_map
from catdog.backbones import BACKBONES, get_backbones, preprocess
from catdog.config import TrainParams
from catdog.evaluation import LabelledPredictions
from catdog.feature_map import MOST_IMAGES, feature_table, project, split_outputs, with_features
from catdog.inference import compile_forward
from catdog.model import ModelInfo, assemble, build_head, load_model, save_model, set_temperature

SIZE = 16


def small_network(name):
    """One convolution; its maps have 4x4 places."""
    pixels = keras.Input((SIZE, SIZE, 3))
    kernel = keras.initializers.GlorotUniform(seed=len(name))
    maps = keras.layers.Conv2D(6, 3, 4, "same", activation="relu", kernel_initializer=kernel, name="conv")(pixels)
    return keras.Model(pixels, maps, name=f"small_{name}")


def small_model(names="vgg16", pooling="avg", classes=2):
    backbones = get_backbones(names)
    networks = [small_network(backbone.name) for backbone in backbones]
    size = 6 * len(networks) * (16 if pooling == "flatten" else 1)
    head = build_head(size, classes, TrainParams(hidden_units=(5,)), 1)
    model = assemble(networks, backbones, head, SIZE, pooling)
    set_temperature(model, 1.7)
    return model, ModelInfo(tuple("abc"[:classes]), SIZE, "stretch", 95, names, "random", pooling)


def some_pixels(count=7):
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
@pytest.mark.parametrize(
    ("names", "classes", "engine"),
    [
        ("vgg16", 2, "keras"),
        ("mobilenetv2", 3, "openvino"),
        ("vgg16+mobilenetv2", 2, "keras"),
        ("vgg16+mobilenetv2", 2, "openvino"),
    ],
)
def test_features_come_beside_the_same_probabilities(tmp_path, engine, pooling, names, classes):
    save_model(*small_model(names, pooling, classes), tmp_path / "model.keras")
    model, info = load_model(tmp_path / "model.keras")
    pixels = some_pixels()
    batches = [pixels[:4], pixels[4:]]
    outputs = model.output_shape[-1]
    values = compile_forward(with_features(model, info), engine)(batches)
    assert values.dtype == np.float32
    features, output = split_outputs(values, outputs)
    assert output == pytest.approx(compile_forward(model, engine)(batches), abs=1e-6)
    assert np.ptp(output) > 1e-3

    expected = []
    for name in names.split("+"):
        network = next(layer for layer in model.layers if layer.name == f"small_{name}")
        maps = np.asarray(network(preprocess(pixels.astype(np.float32), BACKBONES[name])))
        expected.append(maps.max(axis=(1, 2)) if pooling == "max" else maps.mean(axis=(1, 2)))
    expected = np.concatenate(expected, axis=1)
    assert features == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("pooling", ["avg", "flatten"])
def test_half_precision_does_not_round_the_output(pooling):
    """The policy of a run on a GPU is for training; the saved model computes in float32."""
    model, info = small_model(pooling=pooling)
    pixels = some_pixels()
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        both = with_features(model, info)
    finally:
        keras.config.set_dtype_policy(policy)
    features, output = split_outputs(np.asarray(both(pixels)), 1)
    assert (output == np.asarray(model(pixels.astype(np.float32)))).all()
    assert (features == split_outputs(np.asarray(with_features(model, info)(pixels)), 1)[0]).all()


def test_split_outputs():
    features, output = split_outputs(np.arange(12, dtype=np.float32).reshape(2, 6), 2)
    assert features.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert output.tolist() == [[4, 5], [10, 11]]


def groups(counts, size, spread=1.0, seed=0):
    """Features of groups that lie `10` apart along a direction each, and the groups' numbers."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    return (10 * np.eye(len(counts), size)[labels] + spread * rng.normal(size=(len(labels), size))).astype(
        np.float32
    ), labels


def nearest_agree(points, labels):
    """The share of points whose nearest other point has their label."""
    distance = ((points[:, np.newaxis] - points) ** 2).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    return (labels[distance.argmin(axis=1)] == labels).mean()


def test_neighbours_stay_neighbours():
    features, labels = groups((40, 60, 50, 30, 20), 100)
    assert nearest_agree(project(features, "tsne", 1), labels) > 0.98
    # Two components cannot keep five groups apart, two of them they can.
    assert nearest_agree(project(features, "pca", 1), labels) < 0.98
    assert nearest_agree(project(features[:100], "pca", 1), labels[:100]) == 1


def test_pca_keeps_the_widest_directions():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(200, 2)) * [9, 4]
    turned = np.linalg.qr(rng.normal(size=(30, 30)))[0][:2]
    points = project((plane @ turned + 5).astype(np.float32), "pca", 1)
    centred = plane - plane.mean(axis=0)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    assert (points**2).sum(axis=0) == pytest.approx(variances, rel=1e-4)
    assert np.linalg.norm(points[3] - points[9]) == pytest.approx(np.linalg.norm(plane[3] - plane[9]), rel=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (2, 4), (2, 1), (3, 4), (5, 1), (10, 1280), (89, 7)])
def test_any_number_of_images_has_places(method, count, size):
    points = project(np.random.default_rng(0).normal(size=(count, size)).astype(np.float32), method, 1)
    assert (points.dtype, points.shape) == (np.float32, (count, 2))
    assert np.isfinite(points).all()
    assert len(np.unique(points, axis=0)) == count


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_pictures_that_are_all_alike_lie_on_one_point(method):
    assert (project(np.full((40, 9), 0.3, np.float32), method, 1) == 0).all()


@pytest.mark.filterwarnings("error")
def test_copies_of_a_picture_do_no_harm():
    features = np.repeat(np.random.default_rng(0).normal(size=(3, 9)), 30, axis=0).astype(np.float32)
    assert np.isfinite(project(features, "tsne", 1)).all()


PROJECTED = """
import hashlib, sys
import numpy as np
from catdog.feature_map import project
features = np.random.default_rng(0).gamma(1, 1, (600, 300)).astype(np.float32)
print([hashlib.sha256(project(features, method, 1).tobytes()).hexdigest() for method in ("tsne", "pca")])
"""


def test_places_repeat_to_the_byte_whatever_the_number_of_threads():
    told = set()
    for threads in ("1", "4"):
        environment = os.environ | {
            "PYTHONPATH": str(Path(feature_map.__file__).parents[1]),
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
        done = subprocess.run(
            [sys.executable, "-c", PROJECTED], env=environment, capture_output=True, text=True, check=True
        )
        told.add(done.stdout)
    assert len(told) == 1


def test_as_many_images_as_are_shown_are_placed_in_seconds():
    features, labels = groups((MOST_IMAGES // 2, MOST_IMAGES // 5, MOST_IMAGES * 3 // 10), 1280)
    before = time.process_time()
    points = project(features, "tsne", 1)
    assert time.process_time() - before < 20  # 1 to 2 s on a quiet machine
    assert nearest_agree(points, labels) > 0.99


def test_table_has_a_row_for_each_point():
    predictions = LabelledPredictions(
        paths=("a.jpg", "b.jpg", "c.jpg", "d.jpg"),
        labels=np.array([0, 1, 0, 1]),
        probabilities=np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]], np.float32),
        class_names=("cat", "dog"),
        threshold=0.15,
    )
    points = np.array([[1.23456789, -2], [0.1, 0.2]], np.float32)
    table = feature_table(predictions, np.array([1, 2]), points)
    assert table.to_csv(index=False, lineterminator="\n") == (
        "path,label,predicted,correct,x,y\nb.jpg,dog,dog,True,1.234568,-2.0\nc.jpg,cat,dog,False,0.1,0.2\n"
    )
