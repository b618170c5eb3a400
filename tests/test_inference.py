"""The forward pass: both engines compute the same, in the images' order, whatever the batches."""

import importlib.util

import keras
import numpy as np
import pytest

from catdog import inference
from catdog.backbones import build_backbone, get_backbone
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.inference import choose_engine, compile_forward
from catdog.model import assemble, build_head
from conftest import MODULES, Project
from test_gradcam import ENGINES, small_model


@pytest.fixture(scope="module")
def averages():
    """Both engines of a model that gives each picture's mean red, green and blue."""
    pixels = keras.Input((8, 8, 3))
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(pixels))
    return {engine: compile_forward(model, engine) for engine in ("openvino", "keras")}


def numbered(start: int, count: int) -> np.ndarray:
    """Pictures of one colour that says their number."""
    numbers = np.arange(start, start + count)
    colours = np.stack([numbers % 256, numbers // 256, np.full(count, 255)], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None, :], (count, 8, 8, 3)).copy()


def numbers(output: np.ndarray) -> list[int]:
    assert output[:, 2] == pytest.approx(np.full(len(output), 255), abs=1e-3)
    return np.rint(output[:, 0] + 256 * output[:, 1]).astype(int).tolist()


@ENGINES
@pytest.mark.parametrize("sizes", [[1], [7], [4, 4, 4, 1], [1] * 80, [1, 9, 2, 16, 3], [16] * 40])
def test_order_is_kept_over_batches_of_any_size(averages, engine, sizes):
    starts = np.cumsum([0, *sizes])
    output = averages[engine](numbered(start, size) for start, size in zip(starts, sizes, strict=False))
    assert output.dtype == np.float32
    assert output.shape == (sum(sizes), 3)
    assert numbers(output) == list(range(sum(sizes)))


@ENGINES
def test_forward_can_be_called_again(averages, engine):
    assert numbers(averages[engine]([numbered(5, 3)])) == [5, 6, 7]
    assert numbers(averages[engine]([numbered(1, 2), numbered(9, 1)])) == [1, 2, 9]


@ENGINES
def test_batch_may_be_overwritten_once_the_next_is_asked_for(averages, engine):
    def batches():
        buffer = np.empty((4, 8, 8, 3), np.uint8)
        for start in range(0, 200, 4):
            buffer[:] = numbered(start, 4)
            yield buffer

    assert numbers(averages[engine](batches())) == list(range(200))


@ENGINES
def test_pixels_keep_their_range_and_colours(averages, engine):
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    pictures[..., 0], pictures[:, :4, :, 1] = 255, 128
    assert averages[engine]([pictures])[0] == pytest.approx([255, 64, 0], abs=1e-3)


def settle(network: keras.Model, values: np.ndarray) -> None:
    """Gives BatchNorm the statistics of some inputs; fresh ones let random weights fade to nothing."""
    layers = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        layer.momentum, before = 0.0, layer.momentum
    network(values, training=True)
    for layer in layers:
        layer.momentum = before


@pytest.mark.parametrize(
    ("name", "size"),
    [("mobilenetv2", 64), ("vgg16", 16), ("efficientnetb0", 64), ("efficientnetv2b0", 64), ("mobilenetv3large", 64)],
)
def test_engines_agree(name, size):
    """With whole networks, some with swish; with a small one behind preprocessing of operations, not layers."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    if name == "vgg16":
        model, _ = small_model(name, classes=3, hidden=(8,), scale=0.02)
    else:
        backbone = get_backbone(name)
        network = build_backbone(backbone, size)
        settle(network, rng.uniform(-1, 1, (16, size, size, 3)))
        head = build_head(network.output_shape[-1], 3, TrainParams(hidden_units=(8,)), 1)
        model = assemble([network], [backbone], head, size, "avg")
    batches = [(rng.integers(0, 256, (n, size, size, 3)) * rng.uniform(0.2, 1)).astype(np.uint8) for n in (4, 4, 3)]
    one, other = (compile_forward(model, engine)(batches) for engine in ("openvino", "keras"))
    assert one.shape == (11, 3)
    assert np.abs(one - other).max() < 1e-5
    assert np.ptp(other, axis=0).max() > 1e-3  # pictures differ by far more than the engines


@pytest.mark.parametrize("sizes", [[4, 4, 3], [1], [9, 4]])
def test_xla_compiles_for_one_size_and_drops_what_fills_it_up(monkeypatch, sizes):
    seen = []
    filled = inference._filled
    monkeypatch.setattr(inference, "_filled", lambda *given: seen.append(filled(*given).shape) or filled(*given))
    pixels = keras.Input((8, 8, 3))
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(pixels))
    forward = compile_forward(model, "keras", batch_size=4, xla="always")
    starts = np.cumsum([0, *sizes])
    output = forward(numbered(start, size) for start, size in zip(starts, sizes, strict=False))
    assert numbers(output) == list(range(sum(sizes)))
    assert {count % 4 for count, *_ in seen} == {0}
    assert len(seen) == len(sizes)


def test_keras_engine_is_the_model_in_inference_mode():
    pixels = keras.Input((4, 4, 3))
    model = keras.Model(pixels, keras.layers.Flatten()(keras.layers.Dropout(0.5)(pixels)))
    picture = np.full((2, 4, 4, 3), 7, np.uint8)
    for engine in ("keras", "openvino"):
        assert (compile_forward(model, engine)([picture]) == 7).all()


def without_openvino(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest)
    )


@pytest.mark.parametrize(("gpu", "chosen"), [(False, "openvino"), (True, "keras")])
def test_auto_is_openvino_on_a_cpu_and_keras_on_a_gpu(monkeypatch, gpu, chosen):
    monkeypatch.setattr(inference, "has_gpu", lambda: gpu)
    assert choose_engine("auto") == chosen
    assert choose_engine("keras") == "keras"
    assert choose_engine("openvino") == "openvino"


def test_without_openvino_auto_is_keras_and_asking_for_it_is_refused(monkeypatch):
    without_openvino(monkeypatch)
    monkeypatch.setattr(inference, "has_gpu", lambda: False)
    assert choose_engine("auto") == "keras"
    assert choose_engine("keras") == "keras"
    with pytest.raises(
        CatdogError, match=r"embed\.engine = 'openvino' cannot run: it is not installed; use auto or keras"
    ):
        choose_engine("openvino")


def test_with_another_backend_auto_is_keras_and_openvino_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(inference, "has_gpu", lambda: False)
    assert choose_engine("auto") == "keras"
    with pytest.raises(CatdogError, match="backend is jax"):
        choose_engine("openvino")


# In a process of its own: an engine destroyed at work ends the interpreter with a segmentation fault, not each time.
ENGINES_THAT_GO = """
import sys
import keras, numpy as np
from catdog.inference import compile_forward

pixels = keras.Input((32, 32, 3))
model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3)(pixels)))
batch = np.zeros((4, 32, 32, 3), np.uint8)
for _ in range(20):
    forward = compile_forward(model, "openvino")
    assert forward([batch] * 9).shape == (36, 8)
    del forward  # its threads end here
print("dropped", flush=True)

pixels = keras.Input((8, 8, 3))
model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(pixels))

def batches():
    yield np.zeros((2, 8, 8, 3), np.uint8)
    raise OSError("disk")

for engine, times in (("keras", 1), ("openvino", 400)):
    forward = compile_forward(model, engine)
    for _ in range(times):
        try:
            forward(batches())
        except OSError as error:
            told = error
    print(engine, told, flush=True)
assert sys.modules["openvino_telemetry"] is None
"""


def test_dropped_and_failing_engines_neither_block_nor_crash_nor_report_their_use(workshop, monkeypatch, tmp_path):
    """A dropped model ends its threads; an error while reading is raised also with batches under way."""
    monkeypatch.delenv("CI", raising=False)  # where it is set, OpenVINO does not report
    project = Project(tmp_path, workshop.home, warm=True)
    done = project.run("python", "-c", ENGINES_THAT_GO, PYTHONPATH=MODULES, HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "dropped\nkeras disk\nopenvino disk\n"), done.stderr[-2000:]
    assert not (tmp_path / "intel").exists()
