"""Exports: other runtimes compute what the Keras model computes, and whoever has only the export can use it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import tiny
from catdog import cli, paths
from catdog.errors import CatdogError
from catdog.export import FORMATS, describe, require_format, write_export
from catdog.export_check import ALLOWED, BORDER, Agreement, Check, compare_probabilities, format_check
from catdog.export_command import balanced_sample
from catdog.export_runtimes import open_export, read_description
from catdog.files import sha256_of, write_json
from catdog.inference import compile_forward
from catdog.model import ModelInfo, class_probabilities, load_model, predict_classes, save_model, set_temperature
from catdog.predict import Classifier
from catdog.records import (
    ImageRow,
    RecordReader,
    encode_record,
    plan_shards,
    read_labels,
    shard_paths,
    write_index,
    write_shard,
)
from conftest import MODULES, Project
from test_gradcam import SIZE, small_model, some_pixels

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
KINDS = [(format_, precision) for format_, facts in FORMATS.items() for precision in facts.precisions]
EACH_KIND = pytest.mark.parametrize(("format_", "precision"), KINDS, ids=["-".join(kind) for kind in KINDS])
# Of the probabilities of small networks with random weights. float16 has 11 bits; int8 has 256 steps a layer.
TOLERANCES = {"float32": 1e-5, "float16": 0.01, "int8": 0.1}


# The models. Not the small network that stands for MobileNetV2: the XNNPACK of TensorFlow 2.21 is wrong where a
# kernel of more than one place has a larger stride and fits without padding, as no real backbone has it.


def sigmoid_model():
    """Two classes, a hidden layer, a temperature, and a threshold that is not 0.5."""
    model, info = small_model("vgg16", "flatten", hidden=(5,), scale=0.05)
    set_temperature(model, 1.7)
    return model, replace(info, threshold=0.45, temperature=1.7)


def joined_model():
    """Three classes by the features of two networks."""
    return small_model("vgg16+xception", classes=3, scale=0.05)


def fine_tuned_model():
    """BatchNorm with statistics and weights of its own, and layers that were trained."""
    model, body, _ = tiny.model(tiny.train_params())
    rng = np.random.default_rng(0)
    for layer in body.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, value.shape) for value in layer.get_weights()])
        layer.trainable = True
    return model, ModelInfo(("cat", "dog"), tiny.SIZE, "stretch", 95, "tiny", "random", "avg")


MODELS = {"sigmoid": sigmoid_model, "joined": joined_model, "fine-tuned": fine_tuned_model}


@dataclass(frozen=True)
class Subject:
    """A saved model, its pictures, and what it says of them."""

    path: Path
    info: ModelInfo
    pixels: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="module", params=MODELS)
def subject(request, tmp_path_factory) -> Subject:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    save_model(*MODELS[request.param](), path)
    model, info = load_model(path)
    pixels = some_pixels(24)
    return Subject(path, info, pixels, class_probabilities(compile_forward(model, "keras")([pixels])))


def export(path: Path, target: Path, format_: str, precision: str) -> dict:
    """Exports a saved model; returns its description."""
    model, info = load_model(path)
    pictures = some_pixels(40, seed=1)
    description = describe(info, precision, model_sha256=sha256_of(path), calibration_images=40)
    write_export(model, description, target, format_, precision, calibration=pictures)
    return description


@EACH_KIND
def test_export_computes_what_the_model_computes_and_says_how_to_use_it(subject, tmp_path, format_, precision):
    target = tmp_path / "export"
    description = export(subject.path, target, format_, precision)
    assert [file.name for file in tmp_path.iterdir()] == ["export"]
    forward = open_export(target, format_)
    probabilities = forward([subject.pixels[:5], subject.pixels[5:6], subject.pixels[6:]])
    assert (probabilities.dtype, probabilities.shape) == (np.float32, subject.probabilities.shape)
    assert probabilities == pytest.approx(subject.probabilities, abs=TOLERANCES[precision])
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert np.ptp(subject.probabilities, axis=0).max() > 0.05
    if precision == "float32":
        threshold = subject.info.threshold
        assert (predict_classes(probabilities, threshold) == predict_classes(subject.probabilities, threshold)).all()

    assert read_description(target, format_) == json.loads(json.dumps(description))
    assert description["class_names"] == subject.info.class_names
    assert description["threshold"] == subject.info.threshold
    assert f"uint8 [batch, {SIZE}, {SIZE}, 3]" in description["input"]
    assert f"float32 [batch, {len(subject.info.class_names)}]" in description["output"]


@pytest.mark.parametrize(("format_", "precision"), [kind for kind in KINDS if kind[1] == "int8"])
def test_int8_of_a_model_that_pools_the_maximum(tmp_path, format_, precision):
    """ONNX Runtime's inference of shapes by symbols stumbles over it."""
    save_model(*small_model("vgg16", "max", scale=0.05), tmp_path / "model.keras")
    export(tmp_path / "model.keras", tmp_path / "export", format_, precision)
    model, _ = load_model(tmp_path / "model.keras")
    expected = class_probabilities(compile_forward(model, "keras")([some_pixels()]))
    assert open_export(tmp_path / "export", format_)([some_pixels()]) == pytest.approx(expected, abs=0.1)


def test_what_onnx_cannot_express_is_refused_not_written(tmp_path):
    """Such is ConvNeXt; unseen, as with --no-check, the file would be there and no runtime could load it."""
    pixels = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(6, 3, groups=3)(pixels)
    x = keras.layers.Activation(lambda x: keras.ops.gelu(x, approximate=False))(x)
    model = keras.Model(pixels, keras.layers.Dense(2, "softmax")(keras.layers.GlobalAveragePooling2D()(x)))
    with pytest.raises(CatdogError, match=r"tf2onnx has nothing for .*Erfc.* choose another format"):
        write_export(model, {}, tmp_path / "export", "onnx", "float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_", ["tflite", "onnx"])
def test_pixels_that_are_not_bytes_are_refused(tmp_path, format_):
    save_model(*sigmoid_model(), tmp_path / "model.keras")
    export(tmp_path / "model.keras", tmp_path / "export", format_, "float32")
    with pytest.raises(Exception, match=r"UINT8|uint8"):
        open_export(tmp_path / "export", format_)([some_pixels(1) / np.float32(255)])


# The comparison


def test_agreement_counts_labels_and_differences():
    model = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]], np.float32)
    exported = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.55, 0.45]], np.float32)
    found = compare_probabilities(model, exported, np.array([0, 0, 1, 0]), 0.5)
    assert found == Agreement(4, 2, 0, pytest.approx(0.4), pytest.approx(0.125), accuracy=0.75, model_accuracy=0.75)
    assert found.share == 0.5
    assert compare_probabilities(model, model, np.array([0, 0, 1, 0]), 0.5).other_labels == 0


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_label_that_hangs_on_rounding_is_told_but_not_held_against_the_export(threshold):
    near, far = threshold + BORDER / 2, threshold + BORDER * 3
    model = np.array([[1 - near, near], [1 - far, far]], np.float32)
    exported = np.array([[1 - threshold + 1e-5, threshold - 1e-5]] * 2, np.float32)
    found = compare_probabilities(model, exported, np.array([1, 1]), threshold)
    assert (found.other_labels, found.borderline, found.share) == (2, 1, 0.5)


def test_of_three_classes_the_border_is_between_the_best_two():
    model = np.array([[0.4, 0.39995, 0.20005], [0.5, 0.3, 0.2]], np.float32)
    found = compare_probabilities(model, model[:, [1, 0, 2]], np.array([0, 0]), 0.5)
    assert (found.other_labels, found.borderline) == (2, 1)


def test_what_is_no_number_is_another_label_and_wrong():
    model = np.array([[0.9, 0.1], [0.1, 0.9]], np.float32)
    exported = np.array([[np.nan, np.nan], [0.1, 0.9]], np.float32)
    found = compare_probabilities(model, exported, np.array([0, 1]), 0.5)
    assert found == Agreement(2, 1, 0, 1.0, 0.5, accuracy=0.5, model_accuracy=1.0)


@pytest.mark.parametrize(("other", "passed"), [(0, True), (5, True), (6, False)])
def test_check_passes_up_to_the_share_that_is_allowed(other, passed):
    check = Check(Agreement(250, other, 0, 0.3, 0.01, 0.9, 0.91), ALLOWED["int8"], 2.0, 4.0)
    assert check.passed == passed
    assert check.report()["passed"] == passed
    text = format_check(check, export="onnx int8", size=2_500_000, model_size=9_600_000)
    assert f"another label for {other} of 250 test images ({other / 250:.2%}; up to 2.00% allowed)" in text
    assert "2.5 MB" in text
    assert "9.6 MB" in text


def test_calibration_takes_as_many_of_each_class_and_the_same_each_time():
    labels = np.repeat([0, 1, 2], [500, 60, 9])
    chosen = balanced_sample(labels, 99, 0)
    assert np.bincount(labels[chosen]).tolist() == [45, 45, 9]
    assert (np.diff(chosen) > 0).all()
    assert (balanced_sample(labels, 99, 0) == chosen).all()
    assert (balanced_sample(labels, 99, 1) != chosen).any()
    assert (balanced_sample(labels, 10_000, 0) == np.arange(569)).all()


# The command


def write_data(folder: Path, info: ModelInfo, *, train=60, test=40) -> None:
    """Stores pictures of noise as preprocess does, the two classes brighter and darker."""
    (folder / "data/tfrecords").mkdir(parents=True)
    counts = {"train": train, "test": test}
    with zipfile.ZipFile(folder / "raw.zip", "w") as archive:
        for seed, (split, count) in enumerate(counts.items()):
            for number, pixels in enumerate(some_pixels(count, seed=seed)):
                with archive.open(f"{split}/{number:03d}.png", "w") as file:
                    Image.fromarray(pixels // (1 + number % 2)).save(file, "PNG")
    written = []
    with zipfile.ZipFile(folder / "raw.zip") as archive:
        encode = partial(
            encode_record,
            archive=archive,
            classes=info.class_names,
            size=info.image_size,
            mode=info.resize,
            quality=info.jpeg_quality,
            max_pixels=1e6,
        )
        for split, count in counts.items():
            rows = [ImageRow(f"{split}/{number:03d}.png", number % 2) for number in range(count)]
            for shard in plan_shards(split, rows, 25):
                written.append(write_shard(shard, folder / "data/tfrecords", encode))
    write_index(folder / "data/tfrecords", written, info.class_names, size=info.image_size)
    report = {"classes": list(info.class_names), "image_size": info.image_size}
    write_json(
        folder / "data/tfrecords/preprocess.json", report | {"resize": info.resize, "jpeg_quality": info.jpeg_quality}
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with a model in models/ and its pictures in data/tfrecords."""
    folder = tmp_path_factory.mktemp("material")
    model, info = sigmoid_model()
    (folder / "models").mkdir()
    save_model(model, info, folder / paths.MODEL)
    write_data(folder, info)
    return folder


@pytest.fixture
def project(material, tmp_path, monkeypatch) -> Path:
    """The same for one test, as the root of the repository."""
    (tmp_path / "models").mkdir()
    (tmp_path / paths.MODEL).symlink_to(material / paths.MODEL)
    (tmp_path / "data").symlink_to(material / "data")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def catdog_export(*arguments) -> int:
    return cli.main(["export", *map(str, arguments)])


def told(capsys) -> str:
    """What the command said on standard error, which is one sentence."""
    text = capsys.readouterr().err
    assert text.startswith("catdog: ")
    assert text.count("\n") == 1
    return text


def test_labels_are_read_in_the_order_of_the_shards(material):
    shards = shard_paths(material / paths.TFRECORDS, "test")
    assert len(shards) == 2
    assert read_labels(shards).tolist() == [0, 1] * 20


@pytest.mark.parametrize(("format_", "precision"), [("onnx", "int8"), ("openvino", "float32")])
def test_command_writes_a_checked_export_beside_its_report(project, capsys, format_, precision):
    assert catdog_export("--format", format_, "--precision", precision, "--max-disagreement", 0.25) == 0
    target = project / f"models/export/model-{precision}.{format_}"
    report = json.loads(target.with_name(target.name + ".json").read_text())
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name, f"{target.name}.json"]
    files = [target] if target.is_file() else list(target.iterdir())
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    assert report["model_sha256"] == sha256_of(project / paths.MODEL)
    assert report["calibration_images"] == (60 if precision == "int8" else 0)
    assert report["check"]["images"] == 40
    assert report["check"]["mean_difference"] < TOLERANCES[precision]
    assert report["check"]["latency_ms"] > 0
    assert read_description(target, format_)["calibration_images"] == report["calibration_images"]
    said = capsys.readouterr()
    assert "of 40 test images" in said.out
    assert str(target) in said.out
    assert said.err == ""


def test_what_is_there_is_replaced_only_where_asked(project, capsys):
    options = ("--format", "saved_model", "--no-check")
    assert catdog_export(*options) == 0
    target = project / "models/export/model-float32.saved_model"
    (target / "old").touch()
    capsys.readouterr()
    assert catdog_export(*options) == 2
    assert f"{target} exists already; --force replaces it, -o names another place" in told(capsys)
    assert (target / "old").exists()
    assert catdog_export(*options, "--force") == 0
    assert not (target / "old").exists()
    assert (target / "saved_model.pb").exists()
    assert len(list(target.parent.iterdir())) == 2
    assert "not checked" in capsys.readouterr().out
    assert json.loads(target.with_name(target.name + ".json").read_text())["check"] is None


def test_a_file_in_the_place_of_the_report_is_replaced_only_where_asked(project, capsys):
    own = project / "cats.json"
    own.write_text("mine")
    options = ("--format", "saved_model", "--no-check", "-o", "cats")
    assert catdog_export(*options) == 2
    assert "cats.json, where the report of the export goes, exists already; --force replaces it, -o" in told(capsys)
    assert own.read_text() == "mine"
    assert not (project / "cats").exists()
    assert catdog_export(*options, "--force") == 0
    assert json.loads(own.read_text())["export"] == "cats"
    (project / "dogs.json").mkdir()
    assert catdog_export("--format", "saved_model", "-o", "dogs", "--force") == 2
    assert "dogs.json, where the report of the export goes, is a folder; -o names another place" in told(capsys)


def test_a_folder_that_is_no_export_is_never_replaced(project, capsys):
    for format_ in ("onnx", "openvino"):
        assert catdog_export("--format", format_, "-o", project / "models", "--force") == 2
        assert f"-o {project}/models is a folder; name what is to be written" in told(capsys)
    assert (project / paths.MODEL).exists()
    (project / "file").touch()
    assert catdog_export("--format", "openvino", "-o", "file", "--force") == 2
    assert "-o file is a file, and openvino is written as a folder" in told(capsys)


def test_place_that_cannot_be_written_is_told(project, capsys):
    (project / "file").touch()
    assert catdog_export("--format", "tflite", "-o", "file/model.tflite") == 2
    assert "file/model.tflite cannot be written: " in told(capsys)


def test_export_with_too_many_other_labels_is_not_written(project, capsys):
    """The threshold is put where the rounding of int8 moves a picture across."""
    options = ("--format", "tflite", "--precision", "int8", "--model", "close.keras", "-o", "new/close.tflite")
    model, info = load_model(project / paths.MODEL)
    save_model(model, info, project / "close.keras")
    assert catdog_export(*options, "--max-disagreement", 1) == 0
    pictures = list(RecordReader(shard_paths(project / paths.TFRECORDS, "test"), 8))
    ours = compile_forward(model, "keras")(pictures)[:, 0]
    theirs = open_export(project / "new/close.tflite", "tflite")(pictures)[:, 1]
    moved = np.abs(ours - theirs).argmax()
    save_model(model, replace(info, threshold=float(ours[moved] + theirs[moved]) / 2), project / "close.keras")
    before = sha256_of(project / "new/close.tflite")
    capsys.readouterr()

    assert catdog_export(*options, "--force", "--max-disagreement", 0) == 1
    said = capsys.readouterr()
    assert "close.tflite gives " in said.err
    assert "test images another label than the Keras model, more than the 0.00% allowed, and is not written" in said.err
    assert "another label for" in said.out
    assert sorted(path.name for path in (project / "new").iterdir()) == ["close.tflite", "close.tflite.json"]
    assert sha256_of(project / "new/close.tflite") == before
    assert catdog_export(*options, "--force", "--max-disagreement", 1) == 0
    report = json.loads((project / "new/close.tflite.json").read_text())
    assert 0 < report["check"]["other_labels"] < 10
    assert report["check"]["other_labels_allowed"] == 1


def test_format_without_the_precision_is_told(project, capsys):
    assert catdog_export("--format", "saved_model", "--precision", "int8") == 2
    assert told(capsys) == "catdog: saved_model has no int8; it has float32\n"


@pytest.mark.parametrize(
    ("kind", "absent", "sentence"),
    [
        (("onnx", "float32"), {"tf2onnx"}, r"needs tf2onnx, not installed here; `pip install 'catdog\[onnx\]'`"),
        (("onnx", "int8"), {"onnx", "onnxruntime"}, r"needs onnx and onnxruntime, .*'catdog\[onnx\]'"),
        (("openvino", "int8"), {"nncf"}, r"int8 in openvino needs nncf, .*'catdog\[openvino\]'"),
    ],
)
def test_missing_package_is_told_with_the_extra_that_brings_it(monkeypatch, kind, absent, sentence):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(CatdogError, match=sentence):
        require_format(*kind)
    require_format("openvino", "float16")


def test_without_pictures_the_check_must_be_left_out_by_name(project, capsys):
    (project / "data").unlink()
    assert catdog_export("--format", "onnx") == 2
    assert "the check needs the test images, but" in (text := told(capsys))
    assert "--no-check exports without it" in text
    assert catdog_export("--format", "onnx", "--precision", "int8", "--no-check") == 2
    assert "int8 needs training images, but" in (text := told(capsys))
    assert "--no-check" not in text
    assert catdog_export("--format", "onnx", "--no-check", "--max-disagreement", 0.1) == 2
    assert "leave it out with --no-check" in told(capsys)
    assert not (project / "models/export").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"class_names": ("a", "c")}, "have classes = ['a', 'b'] and the model takes ['a', 'c']"),
        ({"resize": "pad"}, "have resize = stretch and the model takes pad"),
        ({"jpeg_quality": 90}, "have jpeg_quality = 95 and the model takes 90"),
    ],
)
def test_pictures_of_another_model_are_told(project, capsys, change, sentence):
    model, info = load_model(project / paths.MODEL)
    save_model(model, replace(info, **change), project / "other.keras")
    assert catdog_export("--format", "onnx", "--model", "other.keras") == 2
    assert sentence in told(capsys)


def test_other_backend_is_told(project):
    done = subprocess.run(
        [sys.executable, "-m", "catdog.cli", "export", "--format", "tflite"],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the Keras backend is jax; set KERAS_BACKEND=tensorflow" in done.stderr
    assert done.stderr.count("\n") == 1


EXPORT_ALL = """
import sys
from pathlib import Path
import numpy as np
from catdog.runtime import prepare_keras
prepare_keras(0)
from catdog.export import FORMATS, describe, write_export
from catdog.model import load_model
model, info = load_model(Path(sys.argv[1]))
pictures = np.random.default_rng(0).integers(0, 256, (20, info.image_size, info.image_size, 3)).astype(np.uint8)
for name, facts in FORMATS.items():
    for precision in facts.precisions:
        description = describe(info, precision, model_sha256="0", calibration_images=20)
        write_export(model, description, Path(f"{name}-{precision}"), name, precision, calibration=pictures)
assert "nncf" in sys.modules and sys.modules["openvino_telemetry"] is None
"""


def test_same_model_and_pictures_give_the_same_bytes_and_nothing_is_reported_or_printed(
    material, workshop, monkeypatch, tmp_path
):
    """Each is asked for in a process of its own, as by the command; all of them in one saves the test a minute."""
    for name in ("CI", "NNCF_CI", "NNCF_DEV"):  # where one is set, nothing is reported anyhow
        monkeypatch.delenv(name, raising=False)
    processes = {}
    # A fresh process, and a fork of one that orders sets in a way of its own.
    for warm in (False, True):
        folder = tmp_path / f"warm-{warm}"
        folder.mkdir()
        environment = {"PYTHONPATH": MODULES, "PYTHONHASHSEED": "1", "HOME": str(tmp_path / f"home-{warm}")}
        command = ("python", "-c", EXPORT_ALL, str(material / paths.MODEL))
        processes[folder] = Project(folder, workshop.home, warm=warm).start(*command, **environment)
    contents = []
    for folder, process in processes.items():
        assert process.communicate() == ("", "")
        assert process.returncode == 0
        files = [file for file in folder.rglob("*") if file.is_file()]
        contents.append({str(file.relative_to(folder)): sha256_of(file) for file in files})
    assert len(contents[0]) > len(KINDS)
    assert contents[0] == contents[1]
    assert not list(tmp_path.glob("home-*/intel"))


# The documentation


BLOCKS = {
    block.splitlines()[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
}


def test_documentation_shows_every_format():
    assert BLOCKS.keys() == {"picture.py", *FORMATS}


def test_documented_examples_give_the_models_answer_without_this_project(workshop, tmp_path):
    """One after the other in one process, which imports TensorFlow once."""
    save_model(*joined_model(), tmp_path / "model.keras")
    Image.fromarray(some_pixels(1, 64)[0]).save(tmp_path / "cat.jpg", quality=95)
    (tmp_path / "picture.py").write_text(BLOCKS["picture.py"])
    for format_ in FORMATS:
        export(tmp_path / "model.keras", tmp_path / f"model-float32.{format_}", format_, "float32")
        (tmp_path / f"{format_}_example.py").write_text(BLOCKS[format_])
    run_all = (
        "import runpy, sys; sys.path.insert(0, '.')\n"
        f"for name in {list(FORMATS)}: print(end=name + ' ', flush=True); "
        "runpy.run_path(name + '_example.py', run_name='__main__')\n"
        "assert 'catdog' not in sys.modules"
    )
    done = Project(tmp_path, workshop.home, warm=True).run("python", "-c", run_all)
    assert done.returncode == 0, done.stderr
    classifier = Classifier(tmp_path / "model.keras", engine="keras")
    wanted = classifier.probabilities([classifier.pixels((tmp_path / "cat.jpg").read_bytes())[np.newaxis]])
    answers = [line.split(" ", 2) for line in done.stdout.strip().splitlines()]
    assert [format_ for format_, _, _ in answers] == list(FORMATS)
    for _, label, numbers in answers:
        assert label == classifier.info.class_names[classifier.labels(wanted)[0]]
        assert np.array(numbers.strip("[]").split(), float) == pytest.approx(wanted[0], abs=1e-5)
