"""One path from a file to its label: every way to ask the model sees the same ten awkward pictures and agrees.

To add a way, write a function with the signature of `Ask` and put it into WAYS.
"""

import base64
import contextlib
import io
import json
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog.app import classify_bytes
from catdog.evaluation import LabelledPredictions
from catdog.export import FORMATS, Format, Precision, describe, write_export
from catdog.export_runtimes import open_export, read_description
from catdog.files import sha256_of
from catdog.images import model_pixels
from catdog.inference import choose_engine, compile_forward
from catdog.model import ModelInfo, class_probabilities, load_model, save_model
from catdog.predict import Classifier, run_predict
from catdog.records import ImageRow, RecordReader, Shard, encode_record, write_shard
from catdog.serving import ServedModel
from test_gradcam import small_model, some_pixels

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Answers = tuple[list[str], np.ndarray]
"""The labels of the pictures, and the probabilities of the classes, [pictures, classes]."""

Ask = Callable[[Path, dict[str, bytes], Path], Answers]
"""Asks a model file about pictures, which are files by their names, in sorted order; has an empty folder to work in."""


# The pictures


def drawing(width: int = 96, height: int = 64) -> Image.Image:
    """Every corner, edge and shade is different, so that nothing can be turned, cut or recoloured unseen."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, np.newaxis]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = across, down
    pixels[..., 2] = 255 * (np.add(across / 37, down / 61, dtype=np.float32) % 2 < 1)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right by a quarter
    return file_of(drawing(), "JPEG", quality=95, exif=exif)


def see_through() -> bytes:
    image = drawing().convert("RGBA")
    image.putalpha(drawing().convert("L"))
    return file_of(image, "PNG")


def sixteen_bits() -> bytes:
    grey = np.asarray(drawing().convert("L")).astype(np.uint16)
    return file_of(Image.fromarray(grey * 200), "PNG")  # up to 51,000 of 65,535


def cut_off() -> bytes:
    whole = file_of(drawing(400, 300), "JPEG", quality=95)
    return whole[: len(whole) * 6 // 10]


PICTURES = {
    "alpha.png": see_through(),
    "cmyk.jpg": file_of(drawing().convert("CMYK"), "JPEG", quality=95),
    "exif.jpg": turned(),
    "grey.jpg": file_of(drawing().convert("L"), "JPEG", quality=95),
    "huge.jpg": file_of(drawing(5000, 3000), "JPEG", quality=60),
    "narrow.png": file_of(drawing(700, 20), "PNG"),
    "palette.png": file_of(drawing().quantize(17), "PNG"),
    "sixteen-bit.png": sixteen_bits(),
    "tiny.png": file_of(Image.new("RGB", (1, 1), (10, 200, 90)), "PNG"),
    "truncated.jpg": cut_off(),
}


# The ways


def by_evaluate(path: Path, pictures: dict[str, bytes], folder: Path) -> Answers:
    """The stages preprocess and evaluate: through a TFRecord shard."""
    model, info = load_model(path)
    settings = {"size": info.image_size, "mode": info.resize, "quality": info.jpeg_quality, "max_pixels": 80e6}
    with zipfile.ZipFile(folder / "raw.zip", "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
    with zipfile.ZipFile(folder / "raw.zip") as archive:
        encode = partial(encode_record, archive=archive, classes=info.class_names, **settings)
        shard = Shard("test-00000-of-00001.tfrecord", "test", tuple(ImageRow(name, 0) for name in pictures))
        write_shard(shard, folder, encode)
    reader = RecordReader([folder / shard.name], 4)
    probabilities = class_probabilities(compile_forward(model, choose_engine("auto"))(reader))
    assert reader.paths == list(pictures)
    judged = LabelledPredictions(tuple(reader.paths), reader.labels, probabilities, info.class_names, info.threshold)
    return [info.class_names[number] for number in judged.predicted], probabilities


def by_predict(path: Path, pictures: dict[str, bytes], folder: Path) -> Answers:
    """The command `catdog predict` on a folder."""
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_predict([folder], model=path, layout="jsonl", probabilities=True) == 0
    rows = [json.loads(line) for line in printed.getvalue().splitlines()]
    assert [Path(row["path"]).name for row in rows] == list(pictures)
    return [row["label"] for row in rows], np.array([[row[k] for k in row if k.startswith("p_")] for row in rows])


def by_plain_keras(path: Path, pictures: dict[str, bytes], folder: Path) -> Answers:
    """The model file in the hands of someone who has Keras, and pixels by `Classifier.pixels`."""
    classifier = Classifier(path, engine="keras")
    model, _ = load_model(path)
    pixels = np.stack([classifier.pixels(data) for data in pictures.values()])
    probabilities = class_probabilities(model.predict(pixels.astype("float32"), verbose=0))
    return [classifier.info.class_names[number] for number in classifier.labels(probabilities)], probabilities


def by_rest(path: Path, pictures: dict[str, bytes], folder: Path) -> Answers:
    """The model that the REST server answers with."""
    served = ServedModel()
    served.load_context(types.SimpleNamespace(artifacts={"model": str(path)}))
    images = [base64.b64encode(data).decode() for data in pictures.values()]
    table = served.predict(None, pd.DataFrame({"image": images}))
    return table["label"].tolist(), table.filter(regex="^p_").to_numpy()


def by_page(path: Path, pictures: dict[str, bytes], folder: Path) -> Answers:
    """What the page of `catdog app` shows."""
    classifier = Classifier(path)
    answers = [classify_bytes(classifier, data) for data in pictures.values()]
    return [answer.label for answer in answers], np.stack([answer.probabilities for answer in answers])


def by_export(
    path: Path, pictures: dict[str, bytes], folder: Path, *, format_: Format, precision: Precision
) -> Answers:
    """An export, in the hands of someone who knows of the model only what the export says."""
    model, info = load_model(path)
    calibration = some_pixels(40, seed=1)
    description = describe(info, precision, model_sha256=sha256_of(path), calibration_images=len(calibration))
    write_export(model, description, folder / "export", format_, precision, calibration=calibration)
    said = read_description(folder / "export", format_)
    settings = {"size": said["image_size"], "mode": said["resize"], "quality": said["jpeg_quality"]}
    pixels = np.stack([model_pixels(data, **settings) for data in pictures.values()])
    probabilities = open_export(folder / "export", format_)([pixels])
    names = said["class_names"]
    if len(names) == 2:
        labels = [names[int(second >= said["threshold"])] for second in probabilities[:, 1]]
    else:
        labels = [names[number] for number in probabilities.argmax(axis=1)]
    return labels, probabilities


EXPORTS = [(format_, precision) for format_, facts in FORMATS.items() for precision in facts.precisions]

WAYS: dict[str, Ask] = {
    "predict": by_predict,
    "plain Keras": by_plain_keras,
    "REST": by_rest,
    "page": by_page,
    **{" ".join(kind): partial(by_export, format_=kind[0], precision=kind[1]) for kind in EXPORTS},
}
"""Each is compared with `by_evaluate`."""

ROUNDED = {"float16": 0.001, "int8": 0.02}
"""By how much the probabilities of an export that rounds may differ: about three times what they did when written.

A wrong way is further off: a careless reader of the same files by 0.02 to 0.5 (`test_the_pictures_tell_ways_apart`).
"""
EXACT = 1e-4


# Do they agree?


@dataclass(frozen=True)
class Subject:
    """A model, and what the evaluation says of the pictures."""

    path: Path
    info: ModelInfo
    labels: list[str]
    probabilities: np.ndarray


@pytest.fixture(scope="module", params=[("stretch", 2), ("pad", 2), ("crop", 3)], ids=["stretch", "pad", "three"])
def subject(request, tmp_path_factory) -> Subject:
    """Two classes (a sigmoid and a threshold of its own), and three (a softmax)."""
    mode, classes = request.param
    folder = tmp_path_factory.mktemp("subject")
    # Not the small network that stands for MobileNetV2: TensorFlow Lite gets it wrong (test_export.py says why).
    model, info = small_model("vgg16", "flatten", classes=classes, scale=0.02)
    info = replace(info, resize=mode)
    save_model(model, info, folder / "model.keras")
    _, probabilities = by_evaluate(folder / "model.keras", PICTURES, folder)
    # In the middle of two pictures, so that either label occurs and rounding decides about none.
    middle = np.sort(probabilities[:, 1])[4:6]
    info = replace(info, threshold=float(middle.mean()))
    assert classes > 2 or np.diff(middle) > 2e-4
    save_model(model, info, folder / "model.keras")
    return Subject(folder / "model.keras", info, *by_evaluate(folder / "model.keras", PICTURES, folder))


def margins(subject: Subject) -> np.ndarray:
    """How far each picture's probabilities are from giving it another label."""
    if len(subject.info.class_names) == 2:
        return np.abs(subject.probabilities[:, 1] - subject.info.threshold)
    best = np.sort(subject.probabilities, axis=1)
    return best[:, -1] - best[:, -2]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_labels_and_probabilities_of_the_evaluation(subject, tmp_path, way):
    labels, probabilities = WAYS[way](subject.path, PICTURES, tmp_path)
    tolerance = ROUNDED.get(way.rpartition(" ")[2], EXACT)
    assert probabilities == pytest.approx(subject.probabilities, abs=tolerance)
    # Rounding may decide about a picture that is nearer to the threshold, or to another class, than that.
    clear = margins(subject) > (0 if tolerance == EXACT else 2 * tolerance)
    assert clear.sum() >= 4
    for name, label, wanted, is_clear in zip(PICTURES, labels, subject.labels, clear, strict=True):
        assert not is_clear or (name, label) == (name, wanted)


def test_the_pictures_tell_ways_apart(subject):
    """Pictures are far apart, both labels occur, and a careless reader of the files would be found out."""
    assert len(PICTURES) == 10
    assert len(set(subject.labels)) == 2 or len(subject.info.class_names) == 3
    chances = np.sort(subject.probabilities[:, 1])
    assert np.diff(chances).min() > 2e-4
    side = subject.info.image_size
    careless = np.zeros((10, side, side, 3), np.uint8)
    for position, data in enumerate(PICTURES.values()):
        # As stored, not as meant: neither turned, nor on white, nor averaged; of what ends early, nothing.
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is not None and pixels.size:
            careless[position] = cv2.resize(pixels, (side, side))
    found = Classifier(subject.path, engine="keras").probabilities([careless])
    differs = np.abs(found - subject.probabilities).max(axis=1) > 1e-3
    names = {name for name, differ in zip(PICTURES, differs, strict=True) if differ}
    assert {"alpha.png", "exif.jpg", "huge.jpg", "narrow.png", "truncated.jpg"} <= names
