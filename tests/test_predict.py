"""Classifying new pictures: the very numbers of the evaluation, every file accounted for, and Kaggle's format."""

import contextlib
import csv
import io
import json
import os
import zipfile
from functools import partial
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest

from catdog import paths, predict
from catdog.archives import MemberError
from catdog.backbones import build_backbone, get_backbone
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions, prediction_table
from catdog.gradcam import build_gradcam, overlay
from catdog.images import encode_jpeg
from catdog.inference import choose_engine, compile_forward
from catdog.inputs import ImageFile, UnreadableError, find_images
from catdog.model import ModelInfo, assemble, build_head, class_probabilities, load_model, predict_classes, save_model
from catdog.predict import (
    Classifier,
    Predictions,
    classify,
    format_predictions,
    format_submission,
    kaggle_ids,
    most_probable,
    name_heat_maps,
    run_predict,
)
from catdog.records import ImageRow, RecordReader, Shard, encode_record, write_shard
from catdog.sample import write_sample
from catdog.weights import load_weights
from test_gradcam import small_model
from test_inputs import CAT, data_set, fill, pack, picture

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SIZE = 16  # to the model of the tests a cat is blue and a dog is red


def model_of(classes, path: Path, *, threshold=0.5) -> Path:
    """A model that compares a picture's mean red and blue, and green where there is a third class."""
    pixels = keras.Input((SIZE, SIZE, 3))
    means = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(pixels))
    if len(classes) == 2:
        output, kernel = keras.layers.Dense(1, "sigmoid", use_bias=False), [[4], [0], [-4]]
    else:
        output, kernel = keras.layers.Dense(3, "softmax", use_bias=False), [[0, 4, 0], [0, 0, 4], [4, 0, 0]]
    model = keras.Model(pixels, output(means))
    output.set_weights([np.array(kernel, np.float32)])
    save_model(model, ModelInfo(tuple(classes), SIZE, "stretch", 95, "tiny", "random", "avg", threshold), path)
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


# One path from bytes to probabilities


def test_probabilities_are_those_of_the_evaluation(tmp_path, archives):
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
    judged = LabelledPredictions(tuple(reader.paths), reader.labels, evaluated, tuple(names), 0.5)
    table = prediction_table(judged)

    files, _ = find_images([tmp_path / "raw.zip"], archives)
    for engine in ("keras", "auto"):
        found = classify(Classifier(tmp_path / "model.keras", engine=engine), files)
        assert (found.unreadable, len(files)) == ([], 22)
        assert [name.removeprefix(f"{tmp_path}/raw.zip/") for name in found.names] == table["path"].tolist()
        assert np.abs(found.probabilities[:, 1] - table["p_dog"]).max() < 1e-5
        assert np.ptp(table["p_dog"]) > 1e-2  # pictures differ by far more than that
        rows = list(csv.DictReader(format_predictions(found, names, "csv").splitlines()))
        assert [row["label"] for row in rows] == table["predicted"].tolist()
        assert [float(row["probability"]) for row in rows] == pytest.approx(table["confidence"].tolist(), abs=1e-5)


def test_a_model_decides_by_its_own_threshold(tmp_path, capsys):
    fill(tmp_path, {"1.jpg": picture((130, 20, 20))})  # 86 % dog
    found = {}
    for threshold in (0.8, 0.9):
        path = model_of(["cat", "dog"], tmp_path / "model.keras", threshold=threshold)
        assert run_predict([tmp_path / "1.jpg"], model=path, layout="csv") == 0
        found[threshold] = capsys.readouterr().out.splitlines()[1].split(",")[1:]
    assert found[0.8][0] == "dog"
    assert found[0.9][0] == "cat"
    # The probability is that of the label, also where the other is more probable.
    assert float(found[0.8][1]) + float(found[0.9][1]) == pytest.approx(1, abs=2e-6)
    assert float(found[0.9][1]) < 0.2
    # The model's threshold is 0.9 now.
    for threshold, label in ((0.8, "dog"), (0.95, "cat"), (0.0, "dog"), (1.0, "cat")):
        assert run_predict([tmp_path / "1.jpg"], model=path, layout="csv", threshold=threshold) == 0
        assert capsys.readouterr().out.splitlines()[1].split(",")[1] == label


def test_equal_chances_go_to_the_second_of_two_and_to_the_first_of_more():
    assert predict_classes(np.array([[0.5, 0.5], [0.6, 0.4]], np.float32), 0.5).tolist() == [1, 0]
    assert predict_classes(np.array([[0.3, 0.3, 0.4], [0.4, 0.2, 0.4]], np.float32), 0.5).tolist() == [2, 0]


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
    "web": (UnreadableError("the server answers 404 Not Found"), "the server answers 404 Not Found"),
    "checksum": (MemberError("damaged in the archive: Bad CRC-32"), "damaged in the archive: Bad CRC-32"),
}


def test_unreadable_files_are_told_and_stop_nothing(classifier):
    files = shades(20)
    for position, (name, (content, _)) in zip([0, 3, 8, 12, 13], BAD.items(), strict=True):
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


# What is printed and written

PREDICTIONS = Predictions(
    ["a/1.jpg", "a/x, y.jpg"],
    np.array([[0.9, 0.1], [0.1234567, 0.8765433]], np.float32),
    np.array([0, 1]),
    [("b.jpg", "not an image")],
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
    evil = Predictions([*PREDICTIONS.names, "\x1b[2Ja\nb"], np.eye(3, dtype=np.float32), np.arange(3), [])
    assert format_predictions(evil, ["cat", "dog", "x"], "table", each_class=True) == (
        "path         label  probability   p_cat   p_dog     p_x\n"
        "a/1.jpg      cat         1.0000  1.0000  0.0000  0.0000\n"
        "a/x, y.jpg   dog         1.0000  0.0000  1.0000  0.0000\n"
        "\\x1b[2Ja\\nb  x           1.0000  0.0000  0.0000  1.0000\n"
    )


def test_the_most_probable_classes_are_told_in_their_order():
    chances = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], np.float32)
    assert most_probable(chances, 2).tolist() == [[1, 2], [0, 2]]
    found = Predictions(["1.jpg", "2.jpg"], chances, np.array([0, 2]), [])
    assert format_predictions(found, ["cat", "dog", "fox"], "csv", top=2).splitlines() == [
        "path,label,probability,label_1,probability_1,label_2,probability_2",
        "1.jpg,cat,0.2,dog,0.5,fox,0.3",
        "2.jpg,fox,0.4,cat,0.4,fox,0.4",
    ]
    assert format_predictions(found, ["cat", "dog", "fox"], "table", top=1, each_class=True) == (
        "path   label  probability  label_1  probability_1   p_cat   p_dog   p_fox\n"
        "1.jpg  cat         0.2000  dog             0.5000  0.2000  0.5000  0.3000\n"
        "2.jpg  fox         0.4000  cat             0.4000  0.4000  0.2000  0.4000\n"
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
        ["10.jpg", "9.jpg", "100.jpg"],
        np.array([[0.2, 0.8], [0.9999999, 1e-7], [0.5, 0.5]], np.float32),
        np.array([1, 0, 1]),
        [],
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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top": 4}, r"--top 4 asks for more classes than there are: .*three\.keras knows 3: cat, dog, fox"),
        (
            {"threshold": 0.5},
            r"--threshold tells two classes apart, but .*three\.keras knows 3: cat, dog, fox; leave it",
        ),
        ({"submission": Path("s.csv"), "top": 2}, "--top 2 is for predictions that are printed; leave it out with"),
    ],
)
def test_options_that_do_not_suit_the_model_are_told_before_anything_is_loaded(tmp_path, monkeypatch, options, told):
    path = model_of(("cat", "dog", "fox"), tmp_path / "three.keras")
    monkeypatch.setattr(predict, "prepare_keras", lambda seed: pytest.fail("TensorFlow was started"))
    fill(tmp_path, {"1.png": picture()})
    with pytest.raises(CatdogError, match=told):
        run_predict([tmp_path / "1.png"], model=path, **options)


def test_standard_input_of_the_process_is_read(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(picture(CAT))))
    assert run_predict(["-"], model=model, layout="csv") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("standard input,cat,")


# Heat maps


@pytest.fixture(scope="module")
def explained(tmp_path_factory) -> Path:
    """A model with a convolution that Grad-CAM can look into."""
    path = tmp_path_factory.mktemp("explained") / "small.keras"
    save_model(*small_model(), path)
    return path


def patterns(count: int) -> dict[str, bytes]:
    """Pictures of coloured noise."""
    noise = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return {f"{number:03d}.png": cv2.imencode(".png", pixels)[1].tobytes() for number, pixels in enumerate(noise)}


def test_heat_maps_are_those_of_the_label_and_change_no_prediction(tmp_path, explained, capsys, monkeypatch):
    monkeypatch.setattr(predict, "_EXPLAINED_TOGETHER", 4)
    folder = fill(tmp_path / "photos", {**patterns(9), "005.png": b"text"})
    arguments = {"model": explained, "layout": "csv", "probabilities": True}
    assert run_predict([folder], **arguments) == 1
    plain = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    middle = float(np.median([float(row["p_b"]) for row in plain]))  # so that there are both labels
    assert run_predict([folder], **arguments, threshold=middle, gradcam=tmp_path / "heat") == 1
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    files = [Path(row.pop("gradcam")) for row in rows]
    assert [file.relative_to(tmp_path) for file in files] == [
        Path(f"heat/{number:03d}.png") for number in range(9) if number != 5
    ]
    assert sorted((tmp_path / "heat").iterdir()) == files
    for row, before in zip(rows, plain, strict=True):
        assert row["path"] == before["path"]
        assert float(row["p_a"]) == pytest.approx(float(before["p_a"]), abs=2e-6)
    assert {row["label"] for row in rows} == {"a", "b"}
    known = Classifier(explained, engine="keras")
    explain = build_gradcam(known.model, known.info)
    for row, file in zip(rows, files, strict=True):
        pixels = known.pixels(Path(row["path"]).read_bytes())
        heat = explain(pixels[np.newaxis], np.array(["ab".index(row["label"])]))[0]
        shown = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB).astype(int)
        assert np.abs(shown - overlay(pixels, heat)).max() <= 1


def test_heat_maps_have_names_of_their_own(tmp_path):
    names = ["a/1.jpg", "b/1.png", "c/1-2.jpg", "a.png", "A.png", "x.zip/sub dir/é:1.jpg", "https://x.org/1.jpg?a=b"]
    names += [".png/..", "standard input", "1" * 300]
    found = [path.name for path in name_heat_maps(names, tmp_path)]
    expected = ["1.png", "1-2.png", "1-2-2.png", "a.png", "A-2.png", "é_1.png", "1-3.png"]
    assert found[:7] == expected
    assert len({name.casefold() for name in found}) == len(names)
    assert all(len(name) <= 104 and not name.startswith(".") and "/" not in name for name in found)


def test_heat_maps_are_never_written_over_anything(tmp_path, explained, monkeypatch):
    monkeypatch.setattr(predict, "prepare_keras", lambda seed: pytest.fail("TensorFlow was started"))
    fill(tmp_path, {"1.png": picture(), "heat/1.png": b"older"})
    with pytest.raises(CatdogError, match=r"--gradcam: .*heat/1\.png exists already; remove it or give another folder"):
        run_predict([tmp_path / "1.png"], model=explained, gradcam=tmp_path / "heat")
    with pytest.raises(CatdogError, match=r"1\.png/heat cannot be written: .*; give another place"):
        run_predict([tmp_path / "1.png"], model=explained, gradcam=tmp_path / "1.png" / "heat")
    assert (tmp_path / "heat/1.png").read_bytes() == b"older"


# The model


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
