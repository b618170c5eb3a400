"""Classifying new pictures: the very numbers of the evaluation, every file accounted for, and Kaggle's format."""

import base64
import contextlib
import csv
import json
import os
import tarfile
import types
import zipfile
from functools import partial
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from catdog import paths, predict
from catdog.archives import MemberError
from catdog.backbones import build_backbone, get_backbone
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.evaluation import predict_classes, prediction_table
from catdog.images import encode_jpeg
from catdog.inference import choose_engine, compile_forward
from catdog.model import ModelInfo, assemble, build_head, class_probabilities, load_model, save_model
from catdog.predict import (
    Classifier,
    ImageFile,
    Predictions,
    classify,
    find_images,
    find_unlabelled,
    format_predictions,
    format_submission,
    kaggle_ids,
    most_probable,
    run_predict,
)
from catdog.records import ImageRow, RecordReader, Shard, encode_record, write_shard
from catdog.sample import write_sample
from catdog.weights import load_weights

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SIZE = 16
CAT, DOG = (20, 20, 230), (230, 20, 20)  # RGB; to the model of the tests a cat is blue and a dog is red


def picture(colour=DOG, suffix=".png") -> bytes:
    pixels = np.full((20, 30, 3), colour, np.uint8)
    return cv2.imencode(suffix, pixels[..., ::-1])[1].tobytes()


def model_of(classes, path: Path) -> Path:
    """A model that compares a picture's mean red and blue, and green where there is a third class."""
    pixels = keras.Input((SIZE, SIZE, 3))
    means = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(pixels))
    if len(classes) == 2:
        output, kernel = keras.layers.Dense(1, "sigmoid", use_bias=False), [[4], [0], [-4]]
    else:
        output, kernel = keras.layers.Dense(3, "softmax", use_bias=False), [[0, 4, 0], [0, 0, 4], [4, 0, 0]]
    model = keras.Model(pixels, output(means))
    output.set_weights([np.array(kernel, np.float32)])
    save_model(model, ModelInfo(tuple(classes), SIZE, "stretch", 95, "tiny", "random", "avg"), path)
    return path


def chance(red, blue) -> float:
    """What the model of two classes says of a picture of one colour."""
    return 1 / (1 + np.exp(-4 * (red - blue) / 255))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_of(("cat", "dog"), tmp_path_factory.mktemp("model") / "colours.keras")


@pytest.fixture(scope="module")
def classifier(model) -> Classifier:
    return Classifier(model, engine="keras")


@pytest.fixture
def archives():
    with contextlib.ExitStack() as stack:
        yield stack


def fill(folder: Path, files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


# One path from bytes to probabilities


@pytest.mark.parametrize("engine", ["keras", "auto"])
def test_probabilities_are_those_of_the_evaluation(tmp_path, archives, engine):
    """A pretrained network on the drawn sample: shards, reader and table of the evaluate stage on the other side."""
    backbone, names = get_backbone("mobilenetv2"), ("cat", "dog")
    network = build_backbone(backbone, 64)
    load_weights(network, backbone, "imagenet", pretrained_dir=ROOT / paths.PRETRAINED, root=ROOT)
    head = build_head(network.output_shape[-1], 2, TrainParams(dropout=0.0), 3)
    info = ModelInfo(names, 64, "pad", 90, backbone.name, "imagenet", "avg")
    save_model(assemble([network], [backbone], head, 64, "avg"), info, tmp_path / "model.keras")
    write_sample(tmp_path / "raw.zip", count=22, seed=5)
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        members = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        encode = partial(encode_record, archive=archive, classes=names, size=64, mode="pad", quality=90, max_pixels=1e8)
        shard = Shard("test-00000-of-00001.tfrecord", "test", tuple(ImageRow(name, 0) for name in members))
        write_shard(shard, tmp_path, encode)
    saved, _ = load_model(tmp_path / "model.keras")
    reader = RecordReader([tmp_path / shard.name], 5)
    evaluated = class_probabilities(compile_forward(saved, choose_engine("auto"))(reader))
    table = prediction_table(reader.paths, reader.labels, evaluated, names, 0.5)

    files, _ = find_images([tmp_path / "raw.zip"], archives)
    found = classify(Classifier(tmp_path / "model.keras", engine=engine), files)
    assert (found.unreadable, len(files)) == ([], 22)
    assert [name.removeprefix(f"{tmp_path}/raw.zip/") for name in found.names] == table["path"].tolist()
    assert np.abs(found.probabilities[:, 1] - table["p_dog"]).max() < 1e-5
    assert np.ptp(table["p_dog"]) > 1e-2  # pictures differ by far more than that
    rows = list(csv.DictReader(format_predictions(found, names, "csv").splitlines()))
    assert [row["label"] for row in rows] == table["predicted"].tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(table["confidence"].tolist(), abs=1e-5)


def test_served_model_gives_the_same(model, classifier):
    from mlflow.exceptions import MlflowException

    from catdog.serving import ServedModel

    files = [ImageFile(str(n), partial(picture, colour)) for n, colour in enumerate([CAT, DOG, (99, 1, 120)])]
    expected = classify(classifier, files)
    served = ServedModel()
    served.load_context(types.SimpleNamespace(artifacts={"model": str(model)}))
    encoded = [base64.b64encode(file.read()).decode() for file in files]
    table = served.predict(None, pd.DataFrame({"image": encoded}))
    assert table["label"].tolist() == ["cat", "dog", "cat"]
    assert table[["p_cat", "p_dog"]].to_numpy() == pytest.approx(expected.probabilities, abs=1e-6)
    assert served.predict(None, pd.DataFrame({"image": []})).columns.tolist() == table.columns.tolist()
    with pytest.raises(MlflowException, match=r"image 1: not an image; send the base64"):
        served.predict(None, pd.DataFrame({"image": [encoded[0], base64.b64encode(b"text").decode()]}))


def test_equal_chances_go_where_the_evaluation_puts_them():
    chances = np.array([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6]], np.float32)
    assert most_probable(chances).tolist() == predict_classes(chances, 0.5).tolist() == [1, 0, 1]
    assert most_probable(np.array([[0.3, 0.3, 0.4], [0.4, 0.2, 0.4]], np.float32)).tolist() == [2, 0]


# Finding the files


def test_folders_are_searched_sorted_and_without_hidden_files(tmp_path, archives):
    names = ["b/2.JPG", "b/10.png", "b/Ä ö/1.jpeg", "a.webp", ".hidden.jpg", ".cache/x.jpg", "__MACOSX/y.jpg"]
    fill(tmp_path, dict.fromkeys([*names, "notes.txt", "b/table.csv"], b"x"))
    files, others = find_images([tmp_path], archives)
    kept = ["a.webp", "b/10.png", "b/2.JPG", "b/Ä ö/1.jpeg"]
    assert [file.name for file in files] == [f"{tmp_path}/{name}" for name in kept]
    assert others == [f"{tmp_path}/b/table.csv", f"{tmp_path}/notes.txt"]


def test_hidden_folder_that_is_named_itself_is_searched(tmp_path, archives):
    fill(tmp_path / ".photos", {"1.jpg": b"x"})
    files, _ = find_images([tmp_path / ".photos"], archives)
    assert [Path(file.name).name for file in files] == ["1.jpg"]


def test_inputs_keep_their_order_and_a_named_file_needs_no_ending(tmp_path, archives):
    fill(tmp_path, {"z": b"1", "a/2.jpg": b"2", "a/1.jpg": b"3"})
    files, others = find_images([tmp_path / "z", tmp_path / "a"], archives)
    assert [file.read() for file in files] == [b"1", b"3", b"2"]
    assert others == []


def test_archive_members_are_listed_like_a_folders_files(tmp_path, archives):
    members = {"p/b.jpg": b"2", "p/a.png": b"1", "__MACOSX/p/._a.png": b"0", "p/.DS_Store": b"0", "readme.txt": b"0"}
    path = pack(tmp_path / "photos.zip", members)
    files, others = find_images([path], archives)
    assert [(file.name, file.read()) for file in files] == [(f"{path}/p/a.png", b"1"), (f"{path}/p/b.jpg", b"2")]
    assert others == [f"{path}/readme.txt"]


def test_archive_is_known_by_its_content(tmp_path, archives):
    path = pack(tmp_path / "photos.archive", {"a.jpg": b"1"})
    with_tail = tmp_path / "picture.png"  # an archive behind a picture's end is not looked at
    with_tail.write_bytes(picture() + path.read_bytes())
    files, _ = find_images([path, with_tail], archives)
    assert [file.name for file in files] == [f"{path}/a.jpg", str(with_tail)]


def test_links_are_followed_but_not_in_circles(tmp_path, archives):
    fill(tmp_path / "elsewhere", {"1.jpg": b"1"})
    fill(tmp_path / "here", {"0.jpg": b"0"})
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here/up").symlink_to(tmp_path / "here")
    files, _ = find_images([tmp_path / "here"], archives)
    assert [file.read() for file in files] == [b"0", b"1"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent", "absent does not exist; give image files, folders or zip archives"),
        ("empty", "there are no images in .*empty; give image files, or folders"),
        ("text.zip", "there are no images in .*text.zip"),
        ("damaged.zip", "damaged.zip .*archive"),
        ("damaged", "damaged .*archive"),
        ("page.zip", "page.zip .*archive"),
    ],
)
def test_nothing_to_classify_is_told(tmp_path, archives, name, told):
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "text.zip", {"a.txt": b"x"})
    damaged = dict.fromkeys(["damaged.zip", "damaged"], b"PK\x03\x04 and then nothing")
    fill(tmp_path, damaged | {"page.zip": b"<html>404</html>"})
    with pytest.raises(CatdogError, match=told) as caught:
        find_images([tmp_path / name], archives)
    assert "\n" not in str(caught.value)


def data_set(root: Path, members, unlabelled) -> Path:
    pack(root / paths.RAW, members)
    rows = [f"{name},{len(members.get(name, b''))}\n" for name in unlabelled]
    (root / paths.UNLABELLED).write_text("path,bytes\n" + "".join(rows), encoding="utf-8")
    return root


def test_unlabelled_images_are_read_from_the_raw_archive(tmp_path, archives):
    data_set(tmp_path, {"train/cat.1.jpg": b"1", "test1/2.jpg": b"2", "test1/10, ü.jpg": b"10"}, ["test1/2.jpg"])
    assert [(file.name, file.read()) for file in find_unlabelled(tmp_path, archives)] == [("test1/2.jpg", b"2")]


@pytest.mark.parametrize(
    ("missing", "unlabelled", "told"),
    [
        (paths.UNLABELLED, ["a.jpg"], r"unlabelled\.csv does not exist; run `dvc repro` first, or give the paths"),
        (paths.RAW, ["a.jpg"], r"raw\.zip does not exist; run `dvc repro` first"),
        (None, [], "no images without a label; give the paths"),
        (None, ["b.jpg"], r"unlabelled\.csv lists 'b.jpg', which data/raw\.zip does not hold; run `dvc repro`"),
    ],
)
def test_data_set_without_unlabelled_images_is_told(tmp_path, archives, missing, unlabelled, told):
    data_set(tmp_path, {"a.jpg": b"1"}, unlabelled)
    if missing:
        (tmp_path / missing).unlink()
    with pytest.raises(CatdogError, match=told):
        find_unlabelled(tmp_path, archives)


# Classifying them


def shades(count: int) -> list[ImageFile]:
    return [ImageFile(f"{n}.png", partial(picture, (n % 256, 0, 99))) for n in range(count)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_order_is_kept_over_any_number_of_files(classifier, count):
    found = classify(classifier, shades(count))
    assert found.names == [f"{n}.png" for n in range(count)]
    assert found.probabilities.dtype == np.float32
    assert found.probabilities[:, 1] == pytest.approx([chance(n, 99) for n in range(count)], abs=0.01)
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(count), abs=1e-6)


def fails(error: Exception) -> bytes:
    raise error


BAD = {
    "empty": (b"", "empty file (0 bytes)"),
    "text": (b"no picture", "not an image"),
    "denied": (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
    "checksum": (MemberError("damaged in the archive: Bad CRC-32"), "damaged in the archive: Bad CRC-32"),
}


def test_unreadable_files_are_told_and_stop_nothing(classifier):
    files = shades(20)
    for position, (name, (content, _)) in zip([0, 3, 8, 12], BAD.items(), strict=True):
        read = partial(fails, content) if isinstance(content, Exception) else partial(bytes, content)
        files.insert(position, ImageFile(name, read))
    found = classify(classifier, files)
    assert found.unreadable == [(name, reason) for name, (_, reason) in BAD.items()]
    assert found.names == [f"{n}.png" for n in range(20)]
    assert found.probabilities[:, 1] == pytest.approx([chance(n, 99) for n in range(20)], abs=0.01)


def test_nothing_readable_gives_no_predictions(classifier):
    found = classify(classifier, [ImageFile("a", bytes), ImageFile("a", bytes)])
    assert found.names == []
    assert found.probabilities.shape == (0, 2)
    assert found.unreadable == [("a", "empty file (0 bytes)")] * 2


def test_defects_of_the_program_are_not_taken_for_unreadable_files(classifier):
    with pytest.raises(ZeroDivisionError):
        classify(classifier, [*shades(3), ImageFile("a", lambda: bytes(1 // 0))])


def test_few_files_are_held_at_once():
    opened = []
    files = [ImageFile(str(n), partial(lambda n: opened.append(n) or b"", n)) for n in range(500)]
    decoded = predict._decode_ahead(files, lambda data: np.zeros((1, 1, 3), np.uint8))
    for taken, _ in enumerate(decoded, start=1):
        assert len(opened) <= taken + predict._AHEAD
    assert sorted(opened) == list(range(500))
    assert predict._AHEAD < 100


def test_damaged_member_of_an_archive_is_told(tmp_path, archives, classifier):
    path = pack(tmp_path / "photos.zip", {"a.png": picture(CAT), "b.png": picture(), "c.png": picture()})
    content = bytearray(path.read_bytes())
    second = content.index(b"\x89PNG", content.index(b"\x89PNG") + 1)
    content[second + 40] ^= 0xFF
    path.write_bytes(content)
    found = classify(classifier, find_images([path], archives)[0])
    assert [Path(name).name for name in found.names] == ["a.png", "c.png"]
    ((name, reason),) = found.unreadable
    assert name == f"{path}/b.png"
    assert reason.startswith("damaged in the archive: Bad CRC-32")


def test_member_that_unpacks_beyond_any_picture_is_not_read(tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(predict, "_MAX_MEMBER_BYTES", 10_000)
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture())
        archive.writestr("b.png", bytes(10_001))
    with contextlib.ExitStack() as archives:
        found = classify(classifier, find_images([path], archives)[0])
    assert found.names == [f"{path}/a.png"]
    assert found.unreadable == [(f"{path}/b.png", "10,001 bytes are more than the limit of 10,000")]


# What is printed and written

PREDICTIONS = Predictions(
    ["a/1.jpg", "a/x, y.jpg"], np.array([[0.9, 0.1], [0.1234567, 0.8765433]], np.float32), [("b.jpg", "not an image")]
)


def test_csv_has_a_row_an_image():
    assert format_predictions(PREDICTIONS, ["cat", "dog"], "csv") == (
        'path,label,probability\na/1.jpg,cat,0.9\n"a/x, y.jpg",dog,0.876543\n'
    )
    assert format_predictions(PREDICTIONS, ["cat", "dog"], "csv", each_class=True).splitlines()[::2] == [
        "path,label,probability,p_cat,p_dog",
        '"a/x, y.jpg",dog,0.876543,0.123457,0.876543',
    ]


def test_jsonl_has_an_object_a_line():
    lines = format_predictions(PREDICTIONS, ["cat", "Köter"], "jsonl", each_class=True).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "a/1.jpg", "label": "cat", "probability": 0.9, "p_cat": 0.9, "p_Köter": 0.1},
        {"path": "a/x, y.jpg", "label": "Köter", "probability": 0.876543, "p_cat": 0.123457, "p_Köter": 0.876543},
    ]
    assert "Köter" in lines[1]


def test_table_is_aligned_and_names_cannot_steer_the_terminal():
    evil = Predictions([*PREDICTIONS.names, "\x1b[2Ja\nb"], np.eye(3, dtype=np.float32)[:, :3], [])
    assert format_predictions(evil, ["cat", "dog", "x"], "table", each_class=True) == (
        "path         label  probability   p_cat   p_dog     p_x\n"
        "a/1.jpg      cat         1.0000  1.0000  0.0000  0.0000\n"
        "a/x, y.jpg   dog         1.0000  0.0000  1.0000  0.0000\n"
        "\\x1b[2Ja\\nb  x           1.0000  0.0000  0.0000  1.0000\n"
    )


def test_ids_are_the_numbers_in_the_names():
    assert kaggle_ids(["test1/10.jpg", "9.jpg", "x/007.png"]) == {"test1/10.jpg": 10, "9.jpg": 9, "x/007.png": 7}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["1.jpg", "test1/cat.2.jpg"], r"named by their id, as 12\.jpg, but one is test1/cat\.2\.jpg"),
        (["-1.jpg"], "one is -1.jpg"),
        (["٣.jpg"], "one is ٣.jpg"),
        (["12 (1).jpg"], r"one is 12 \(1\)\.jpg"),
        (["a/1.jpg", "b/01.png"], r"one row an id, but a/1\.jpg and b/01\.png both are 1; leave one out"),
    ],
)
def test_names_that_are_no_ids_are_told(names, told):
    with pytest.raises(CatdogError, match=told):
        kaggle_ids(names)


def test_submission_is_sorted_by_number_and_dog_is_one():
    predictions = Predictions(
        ["10.jpg", "9.jpg", "100.jpg"], np.array([[0.2, 0.8], [0.9999999, 1e-7], [0.5, 0.5]], np.float32), []
    )
    ids = kaggle_ids(predictions.names)
    assert format_submission(predictions, ids) == "id,label\n9,0\n10,1\n100,1\n"
    assert format_submission(predictions, ids, probabilities=True) == (
        "id,label\n9,0.000000\n10,0.800000\n100,0.500000\n"
    )


# The command


def test_prints_predictions_and_lists_unreadable_files(tmp_path, model, capsys):
    fill(tmp_path, {"1.jpg": picture(CAT), "2.jpg": b"", "3.jpg": picture(), "notes.txt": b"x"})
    assert run_predict([tmp_path], model=model, layout="csv") == 1
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert [(row["path"], row["label"]) for row in rows] == [(f"{tmp_path}/1.jpg", "cat"), (f"{tmp_path}/3.jpg", "dog")]
    assert float(rows[0]["probability"]) == pytest.approx(chance(230, 20), abs=0.01)
    assert err.splitlines() == [
        f"catdog: passed over 1 file without the ending of an image, first {tmp_path}/notes.txt",
        "catdog: 1 of 3 files cannot be read:",
        f"  {tmp_path}/2.jpg: empty file (0 bytes)",
    ]
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "notes.txt").unlink()
    assert run_predict([tmp_path], model=model) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["path", "label", "probability"]
    assert (len(out.splitlines()), err) == (3, "")


def test_file_name_that_is_no_text_can_be_printed(tmp_path, model, capsys):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb") as file:  # noqa: PTH123 a name of bytes
        file.write(picture())
    assert run_predict([Path(os.fsdecode(path))], model=model, layout="jsonl") == 0
    assert json.loads(capsys.readouterr().out)["path"] == f"{tmp_path}/\\xff.png"


@pytest.fixture
def repository(tmp_path, model, monkeypatch) -> Path:
    """A repository after the pipeline, with three unlabelled images."""
    tests = {"test1/10.jpg": picture(suffix=".jpg"), "test1/9.jpg": picture(CAT), "test1/1.jpg": picture((60, 0, 0))}
    data_set(tmp_path, {"train/cat.1.jpg": picture(CAT), **tests}, sorted(tests))
    fill(tmp_path, {paths.MODEL: model.read_bytes()})
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_submission_of_the_unlabelled_images(repository, capsys):
    target = repository / "out" / "submission.csv"
    assert run_predict([], submission=target) == 0
    assert target.read_bytes() == b"id,label\n1,1\n9,0\n10,1\n"
    assert capsys.readouterr() == (f"{target}: 2 dog (1), 1 cat (0)\n", "")
    assert run_predict([], submission=target, probabilities=True) == 0
    rows = dict(line.split(",") for line in target.read_text().splitlines()[1:])
    expected = {"1": chance(60, 0), "9": chance(20, 230), "10": chance(230, 20)}
    assert {number: float(text) for number, text in rows.items()} == pytest.approx(expected, abs=0.01)
    assert all(len(text) == len("0.123456") for text in rows.values())
    assert list(target.parent.iterdir()) == [target]


def test_submission_with_an_unreadable_image_is_not_written(repository, tmp_path, capsys):
    folder = fill(tmp_path / "photos", {"1.jpg": picture(), "2.jpg": b"text", "3.jpg": b""})
    target = fill(tmp_path, {"submission.csv": b"older"}) / "submission.csv"
    assert run_predict([folder], submission=target) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "catdog: 2 of 3 files cannot be read:",
        f"  {folder}/2.jpg: not an image",
        f"  {folder}/3.jpg: empty file (0 bytes)",
        f"catdog: {target} is not written, as Kaggle wants a row for each; mend or leave out those files",
    ]
    assert target.read_bytes() == b"older"
    assert not (tmp_path / "submission.csv.part").exists()


def test_submission_needs_two_classes(tmp_path):
    path = model_of(("cat", "dog", "fox"), tmp_path / "three.keras")
    fill(tmp_path, {"1.png": picture()})
    with pytest.raises(CatdogError, match=r"tells two classes apart, but .*three\.keras knows 3: cat, dog, fox; leave"):
        run_predict([tmp_path / "1.png"], model=path, submission=tmp_path / "submission.csv")
    assert not (tmp_path / "submission.csv").exists()


def test_more_than_two_classes_are_printed(tmp_path, capsys):
    path = model_of(("cat", "dog", "fox"), tmp_path / "three.keras")
    fill(tmp_path, {"1.png": picture((0, 250, 0)), "2.png": picture(CAT)})
    assert run_predict([tmp_path / "1.png", tmp_path / "2.png"], model=path, layout="csv", probabilities=True) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["label"] for row in rows] == ["fox", "cat"]
    for row in rows:
        assert sum(float(row[f"p_{name}"]) for name in ("cat", "dog", "fox")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("submission", "layout", "told"),
    [
        ("folder", None, r"--submission .*folder is a folder; give the name of the file to write"),
        ("s.csv", "csv", "--format csv is for predictions that are printed; leave it out with --submission"),
        ("1.png/s.csv", None, r"1\.png/s\.csv cannot be written: .*; give another place"),
    ],
)
def test_submission_that_cannot_be_written_is_told(tmp_path, model, submission, layout, told):
    (tmp_path / "folder").mkdir()
    fill(tmp_path, {"1.png": picture()})
    with pytest.raises(CatdogError, match=told):
        run_predict([tmp_path / "1.png"], model=model, submission=tmp_path / submission, layout=layout)


def test_model_that_is_absent_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "prepare_keras", lambda seed: pytest.fail("TensorFlow was started"))
    fill(tmp_path, {"1.png": picture()})
    with pytest.raises(CatdogError, match=r"no model at .*none\.keras; `dvc repro` trains one"):
        run_predict([tmp_path / "1.png"], model=tmp_path / "none.keras")


def test_pixels_are_those_of_the_models_own_settings(tmp_path):
    """Size, way of resizing and JPEG quality come from the model file."""
    path = model_of(("cat", "dog"), tmp_path / "model.keras")
    model, info = load_model(path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8)
    found = {}
    for mode in ("crop", "pad", "stretch"):
        for quality in (20, 95):
            described = ModelInfo(info.class_names, SIZE, mode, quality, "tiny", "random", "avg")
            save_model(model, described, path)
            found[mode, quality] = Classifier(path, engine="keras").pixels(encode_jpeg(noise, 95))
    assert {pixels.shape for pixels in found.values()} == {(SIZE, SIZE, 3)}
    assert len({pixels.tobytes() for pixels in found.values()}) == 6
    assert found["pad", 95][:, 0].max() < 30  # black bars beside a picture that is twice as high as wide


def test_address_and_tar_are_told_what_to_do(tmp_path):
    with contextlib.ExitStack() as archives:
        with pytest.raises(CatdogError, match="is an address; download the file"):
            find_images([Path("https://example.org/1.jpg")], archives)
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
            archive.add(__file__, "1.jpg")
        with pytest.raises(CatdogError, match="is a tar archive; unpack it"):
            find_images([tmp_path / "x.tar.gz"], archives)
