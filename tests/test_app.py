"""`catdog app`: what the page shows, how it is started, and the page itself as a browser shows it."""

import contextlib
import csv
import hashlib
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
from gto import api
from ruamel.yaml import YAML

from catdog import app, app_command, cli, paths
from catdog.app import Answer, Judged, classify_bytes, find_examples, in_order, load_assistant, look_at, place_heat
from catdog.backbones import BACKBONES, get_backbone
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.images import ImageError, decode, resize
from catdog.inputs import ImageFile, find_images
from catdog.model import ModelInfo, assemble, build_head, save_model
from catdog.predict import Classifier
from catdog.predict import classify as predict_all
from conftest import Project, wait_until

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZE = 32
RED, BLUE = (230, 30, 30), (30, 30, 230)  # RGB; to the model of the tests a cat is blue and a dog is red


def model_of(path: Path, classes=("cat", "dog"), *, mode="stretch") -> Path:
    """A model that looks for red and blue; more classes than two are all the same to it, but for the first two."""
    backbone = get_backbone("mobilenetv2")
    pixels = keras.Input((SIZE, SIZE, 3))
    colours = keras.layers.Conv2D(2, 1, use_bias=False, name="colours")(pixels)
    maps = keras.layers.MaxPooling2D(4)(colours)
    network = keras.Model(pixels, keras.layers.ReLU(name=BACKBONES["mobilenetv2"].last_convolution)(maps))
    network.get_layer("colours").set_weights([np.array([[[[-1, 1], [0, 0], [1, -1]]]], np.float32)])
    head = build_head(2, len(classes), TrainParams(dropout=0.0, hidden_units=()), 1)
    kernel = np.zeros((2, len(classes)))
    kernel[:, :2] = [[3, -3], [-3, 3]]
    kernel = kernel[:, 1:2] if len(classes) == 2 else kernel
    head.get_layer("logits").set_weights([kernel.astype(np.float32), np.zeros(kernel.shape[1], np.float32)])
    model = assemble([network], [backbone], head, SIZE, "avg")
    save_model(model, ModelInfo(tuple(classes), SIZE, mode, 95, "mobilenetv2", "random", "avg"), path)
    return path


def picture(colour=RED, share=1.0, suffix=".png") -> bytes:
    """A grey picture whose left part has a colour; the smaller the part, the less certain the model."""
    pixels = np.full((40, 60, 3), 120, np.uint8)
    pixels[:, : round(60 * share)] = colour
    return cv2.imencode(suffix, pixels[..., ::-1])[1].tobytes()


PICTURES = {
    "a.png": picture(RED, 0.5),
    "b.png": picture(BLUE, 0.8),
    "c.jpg": picture(RED, suffix=".jpg"),
    "sub/d.png": picture(BLUE, 0.3),
    "e.png": picture(RED, 0.1),
    "broken.png": picture()[:70],
    "notes.txt": b"no picture, and not named as one",
}


def fill(folder: Path, files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_of(tmp_path_factory.mktemp("model") / "colours.keras")


@pytest.fixture(scope="module")
def assistant(model):
    return load_assistant(model)


@pytest.fixture
def archives():
    with contextlib.ExitStack() as stack:
        yield stack


def answer(*probabilities, number=None) -> Answer:
    names = tuple("abcdefghij"[: len(probabilities)])
    values = np.array(probabilities, np.float32)
    return Answer(names, values, int(values.argmax()) if number is None else number)


# Answers


def test_the_answer_is_that_of_predict(assistant, tmp_path, archives):
    fill(tmp_path, {name: data for name, data in PICTURES.items() if name != "broken.png"})
    files, _ = find_images([tmp_path], archives)
    expected = predict_all(assistant.classifier, files)
    for file, probabilities, number in zip(files, expected.probabilities, expected.labels, strict=True):
        found = classify_bytes(assistant.classifier, file.read())
        np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-6)
        assert found.number == number
    assert set(expected.labels) == {0, 1}


def test_a_threshold_of_its_own_decides(tmp_path, model, assistant):
    shy = Classifier(model, engine="keras")
    data = picture(RED, 0.05)
    probability = classify_bytes(assistant.classifier, data).probabilities[1]
    assert probability > 0.5
    shy.info = replace(shy.info, threshold=float(probability) + 0.01)
    found = classify_bytes(shy, data)
    assert found.label == "cat"
    assert found.probability == pytest.approx(1 - probability, abs=1e-5)


def test_ranking_begins_with_the_most_probable():
    assert answer(0.1, 0.6, 0.3).ranking == [
        ("b", pytest.approx(0.6)),
        ("c", pytest.approx(0.3)),
        ("a", pytest.approx(0.1)),
    ]


@pytest.mark.parametrize("data", [b"", b"text", picture()[:60]], ids=["empty", "text", "cut"])
def test_what_shows_no_picture_is_told(assistant, data):
    with pytest.raises(ImageError):
        look_at(assistant, data)


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (50, 50), (30, 11)], ids=str)
def test_heat_lies_where_the_model_saw_it(mode, shape):
    """The white part of a picture, seen through the model's eyes, comes back to its own place."""
    height, width = shape
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255
    heat = resize(pixels, 64, mode)[..., 0].astype(np.float32) / 255
    placed = place_heat(heat, height, width, mode)
    assert (placed.shape, placed.dtype) == (shape, np.float32)
    seen = np.ones(shape, bool)
    if mode == "crop":
        side = min(shape)
        seen[:] = False
        seen[(height - side) // 2 :, (width - side) // 2 :][:side, :side] = True
    wrong = (placed > 0.5) != ((pixels[..., 0] > 0) & seen)
    assert wrong.mean() < 0.05


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_the_evidence_is_shown_where_it_is(tmp_path, mode):
    """A picture twice as wide as high, red in its middle left."""
    pixels = np.full((80, 160, 3), 120, np.uint8)
    pixels[20:60, 50:80] = RED
    shown = look_at(
        load_assistant(model_of(tmp_path / "model.keras", mode=mode)),
        cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(),
    )
    assert shown.answer.label == "dog"
    assert decode(shown.picture).shape == decode(shown.evidence).shape == (80, 160, 3)
    # The map's colours are brighter than grey; outside the heat the picture is drawn at half its brightness.
    brightness = decode(shown.evidence).astype(int).max(axis=2)
    middle = brightness[30:50, 58:72].mean()
    assert middle > 1.5 * brightness[:, 110:].mean()


def test_large_pictures_are_shrunk(assistant):
    pixels = np.full((300, 2000, 3), RED, np.uint8)
    shown = look_at(assistant, cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    assert decode(shown.picture).shape == decode(shown.evidence).shape == (120, app.PICTURE_SIDE, 3)


def test_a_backend_without_gradients_still_answers(assistant):
    shown = look_at(replace(assistant, explain=None), picture())
    assert (shown.answer.label, shown.evidence) == ("dog", None)


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0, "0.0 %"), (1e-6, "< 0.1 %"), (0.0014, "0.1 %"), (0.5, "50.0 %"), (0.99951, "> 99.9 %"), (1, "100.0 %")],
    ids=str,
)
def test_percent_claims_no_more_than_the_model(probability, text):
    assert app.percent(probability) == text


# Many pictures


def test_order_is_by_class_and_certainty_or_by_doubt():
    judged = [
        Judged(str(n), "x", one)
        for n, one in enumerate([answer(0.2, 0.8), answer(0.6, 0.4), answer(0.9, 0.1), answer(0.1, 0.9)])
    ]
    assert [one.key for one in in_order(judged, least_certain_first=False)] == list("2130")
    assert [one.key for one in in_order(judged, least_certain_first=True)] == list("1023")
    assert app.count_classes(judged) == {"a": 2, "b": 2}
    assert app.count_classes(judged[:1]) == {"b": 1}
    assert app.count_classes([]) == {}


def test_files_of_one_name_and_broken_ones_are_told_apart(assistant):
    files = {
        "k1": ImageFile("x.png", picture),
        "k2": ImageFile("x.png", lambda: b"text"),
        "k3": ImageFile("x.png", lambda: picture(BLUE)),
    }
    answers = app.judge(assistant.classifier, files)
    assert answers["k2"] == "not an image"
    assert (answers["k1"].label, answers["k3"].label) == ("dog", "cat")
    text = app.format_csv([Judged(key, files[key].name, answers[key]) for key in ("k3", "k1")])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["path"], row["label"]) for row in rows] == [("x.png", "cat"), ("x.png", "dog")]
    assert float(rows[1]["p_dog"]) == pytest.approx(answers["k1"].probability, abs=1e-6)
    assert app.format_csv([]) == ""


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_visitors_do_not_learn_where_a_folder_lies(tmp_path, packed, archives):
    folder = fill(tmp_path / "photos", PICTURES)
    if packed:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for name, data in PICTURES.items():
                archive.writestr(name, data)
        folder = tmp_path / "photos.zip"
    names = [file.name for file in app.find_pictures(folder, archives)]
    assert sorted(names) == sorted(name for name in PICTURES if name != "notes.txt")
    (single,) = app.find_pictures(tmp_path / "photos/sub/d.png", archives)
    assert single.name == "d.png"


def test_names_cannot_write_the_page():
    evil = '<img src=x onerror="alert(1)">\u202e[a](b)'
    judged = [Judged("k", evil, Answer((evil, "b"), np.array([0.7, 0.3], np.float32), 0))]
    for html in (app.grid_html(judged, {"k": b"jpeg"}, headings=True), app.bars_html([(evil, 0.5)], evil)):
        assert "onerror=&#34;" in html
        assert "<img src=x" not in html
        assert "\u202e" not in html
    assert app.plain("a*b* [c](d) $x$ `e`") == r"a\*b\* \[c\]\(d\) \$x\$ \`e\`"


def test_a_class_has_a_heading_only_where_asked():
    judged = [
        Judged("1", "x", answer(0.9, 0.1)),
        Judged("2", "y", answer(0.8, 0.2)),
        Judged("3", "z", answer(0.1, 0.9)),
    ]
    thumbnails = dict.fromkeys("123", b"")
    assert re.findall("<h4.*>(.)</h4>", app.grid_html(judged, thumbnails, headings=True)) == ["a", "b"]
    assert "<h4" not in app.grid_html(judged, thumbnails, headings=False)


# Examples


def write_data_set(root, classes, count):
    """A manifest and raw archive with `count` test images and a training image of every class."""
    rows = ["path,label,split"]
    (root / paths.RAW).parent.mkdir(parents=True)
    with zipfile.ZipFile(root / paths.RAW, "w") as archive:
        for label in classes:
            for number in range(count + 1):
                name = f"x/{label}/{number}.png"
                archive.writestr(name, f"bytes of {name}")
                rows.append(f"{name},{label},{'test' if number < count else 'train'}")
    (root / paths.MANIFEST).write_text("\n".join(reversed(rows[1:])).join([rows[0] + "\n", "\n"]))
    return root


def test_examples_are_test_images_of_all_classes(tmp_path, archives):
    two = find_examples(write_data_set(tmp_path / "two", ["cat", "dog"], 9), None, archives)
    assert [(one.name, one.label) for one in two] == [(f"{n}.png", label) for n in range(4) for label in ("cat", "dog")]
    assert two[3].read() == b"bytes of x/dog/1.png"
    few = find_examples(write_data_set(tmp_path / "few", ["cat", "dog"], 1), None, archives)
    assert [one.label for one in few] == ["cat", "dog"]
    classes = [f"breed {n:02}" for n in range(37)]
    many = find_examples(write_data_set(tmp_path / "many", classes, 2), None, archives)
    assert len({one.label for one in many}) == app.EXAMPLES
    assert (many[0].label, many[-1].label) == (classes[0], classes[-1])


def test_examples_of_a_data_set_that_is_out_of_step_are_told(tmp_path, archives):
    root = write_data_set(tmp_path / "new", ["cat"], 2)
    (root / paths.MANIFEST).write_bytes((write_data_set(tmp_path / "old", ["dog"], 2) / paths.MANIFEST).read_bytes())
    told = r"data/manifest\.csv lists 'x/dog/0\.png', which data/raw\.zip does not hold; run `dvc repro`"
    with pytest.raises(CatdogError, match=told):
        find_examples(root, None, archives)


def test_examples_of_a_folder_and_none(tmp_path, archives):
    examples = find_examples(None, fill(tmp_path, {f"{n}.png": picture() for n in range(12)}), archives)
    assert len(examples) == app.EXAMPLES
    assert examples[0].read() == picture()
    assert find_examples(None, None, archives) == []
    assert find_examples(tmp_path, None, archives) == []


# Which model answers


def repository_with(root, model, accuracy):
    """A git and DVC repository whose dvc.lock and metrics are of a model file."""
    root.mkdir()
    (root / "reports").mkdir()
    metrics = json.dumps(
        {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.01, "test_images": 1234}
    )
    (root / paths.METRICS).write_text(metrics)
    md5 = hashlib.md5(model.read_bytes()).hexdigest()
    out = {"path": str(paths.MODEL), "hash": "md5", "md5": md5, "size": model.stat().st_size}
    written = {"path": str(paths.METRICS), "hash": "md5", "md5": hashlib.md5(metrics.encode()).hexdigest()}
    stages = {"train": {"cmd": "x", "outs": [out]}, "evaluate": {"cmd": "x", "deps": [out], "outs": [written]}}
    pipeline = {
        "stages": {"train": {"cmd": "x", "outs": [str(paths.MODEL)]}},
        "artifacts": {"colours": {"path": str(paths.MODEL), "type": "model"}},
    }
    for name, tree in (("dvc.lock", {"schema": "2.0", "stages": stages}), ("dvc.yaml", pipeline)):
        with (root / name).open("w") as file:
            YAML().dump(tree, file)
    fill(
        root,
        {
            f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}": model.read_bytes(),
            ".dvc/config": b"",
            ".gitignore": b"/models\n",
        },
    )
    fill(root, {str(paths.MODEL): model.read_bytes()})
    for command in (
        ["init", "--quiet"],
        ["config", "user.name", "Ann"],
        ["config", "user.email", "ann@example.org"],
        ["add", "dvc.lock", "dvc.yaml", "reports", ".gitignore"],
        ["commit", "--quiet", "--message", "a model"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    api.register(str(root), "colours", "HEAD", version="v1.2.0")
    api.assign(str(root), "colours", "prod", version="v1.2.0")
    return root


def test_the_model_is_named_with_its_accuracy(tmp_path, model, monkeypatch, archives):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = repository_with(tmp_path / "repository", model, 0.97)
    monkeypatch.setenv("DVC_ROOT", str(root))
    right = "97.0 % of 1,234 test pictures right (95 % interval: 92.0 to 98.0)"
    md5 = hashlib.md5(model.read_bytes()).hexdigest()
    found = app_command.find_model(root, None, archives)
    assert (found.name, found.accuracy) == (f"model.keras (md5 {md5[:8]})", right)
    # What was named answers, also where another one is trained before the first visitor comes.
    (root / paths.MODEL).write_bytes(b"another")
    assert found.path.read_bytes() == model.read_bytes()
    (root / paths.MODEL).write_bytes(model.read_bytes())
    for reference in ("prod", "v1.2.0"):
        found = app_command.find_model(root, reference, archives)
        assert (found.name, found.accuracy) == ("colours v1.2.0 (prod)", right)
        assert found.path.read_bytes() == model.read_bytes()
    # A merge under way tells nothing.
    lock = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(f"<<<<<<< HEAD\n{lock}=======\n{lock}>>>>>>> other\n")
    assert app_command.find_model(root, None, archives).accuracy == ""
    (root / "dvc.lock").write_text(lock)
    # Numbers of another model, or that somebody changed, are not this one's.
    other = model_of(tmp_path / "other.keras", mode="pad")
    assert app_command.find_model(root, str(other), archives).accuracy == ""
    (root / paths.METRICS).write_text('{"accuracy": 1.0, "test_images": 1}')
    assert app_command.find_model(root, None, archives).accuracy == ""
    assert app_command.find_model(root, "prod", archives).accuracy == right
    assert app_command.find_model(None, str(model), archives).name == f"{model.name} (md5 {md5[:8]})"
    with pytest.raises(CatdogError, match=r"no model file 'staging'.* has no stage staging; there are: prod"):
        app_command.find_model(root, "staging", archives)
    with pytest.raises(CatdogError, match=r"there is no model at none\.keras"):
        app_command.find_model(root, "none.keras", archives)


# Starting


def free_port():
    with socket.socket() as probe:
        probe.bind((app_command.HOST, 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "none.keras"], "there is no model at none.keras; `dvc repro` trains one"),
        (["--examples", "none"], "/none does not exist; give image files"),
        (["--folder", "none"], "/none does not exist; give image files"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 is no address of this machine"),
        (["--host", "no such host"], "--host no such host is no address of this machine"),
    ],
    ids=["model", "examples", "folder", "address", "host"],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, model, monkeypatch, capsys, options, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(app_command, "server_arguments", lambda *_: pytest.fail("it started"))
    default = [] if "--model" in options else ["--model", str(model)]
    assert cli.main(["app", "--port", str(free_port()), *default, *options]) == 2
    out, err = capsys.readouterr()
    assert re.match(f"catdog: .*{re.escape(told)}", err)
    assert (out, len(err.splitlines())) == ("", 1)


def test_a_port_that_is_taken_is_told(model, capsys):
    with socket.socket() as other:
        other.bind((app_command.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["app", "--model", str(model), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"catdog: port {port} is taken by another program; end that one, or give another, e.g. --port 8501\n"
    )


def test_a_missing_streamlit_is_told(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "streamlit", None)
    assert cli.main(["app", "--model", str(model)]) == 2
    assert capsys.readouterr().err == (
        "catdog: the page needs Streamlit, which is not installed; `pip install 'catdog[app]'` installs it\n"
    )


# The page


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """The address of a page that sorts PICTURES, outside of any repository; at the end Ctrl-C ends it."""
    pytest.importorskip("streamlit", reason="Streamlit is not installed")
    root = tmp_path_factory.mktemp("page")
    folder = fill(root / "photos", PICTURES)
    examples = fill(root / "examples", {"1.png": picture(BLUE), "2.png": picture(RED)})
    port = free_port()
    options = ["--model", model, "--port", port, "--folder", folder, "--examples", examples]
    environment = Project(root, root / "home", warm=True).environment(PYTHONPATH=str(Path(cli.__file__).parents[1]))
    process = subprocess.Popen(
        ["python", "-m", "catdog.cli", "app", *map(str, options)],
        cwd=root,
        env={name: value for name, value in environment.items() if not name.startswith("STREAMLIT_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, process.stdout.read()
        yield f"http://{app_command.HOST}:{port}"
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
        assert "Traceback" not in printed, printed
        app_command.require_free_port(app_command.HOST, port)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def answers(port):
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection(app_command.HOST, port)) as web:
        web.request("GET", "/_stcore/health")
        return web.getresponse().status == 200
    return False


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    # Chromium's own pretended camera: a green picture.
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A new visitor's page, which must not ask anybody else for anything."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.set_default_timeout(60_000)
    foreign = []
    page.on("request", lambda request: foreign.append(request.url))
    page.goto(address)
    page.get_by_text("5 pictures:").wait_for()
    yield page
    page.close()
    assert [url for url in foreign if not url.startswith((address, "data:", "blob:"))] == []


def choose(page, name):
    page.get_by_role("radio", name=name, exact=True).or_(
        page.get_by_role("button", name=name, exact=True)
    ).first.click()


def choose_one(page):
    choose(page, "One picture")
    page.get_by_text("Drop a picture, choose one, or paste it").wait_for()


def upload(page, *files):
    payload = [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files]
    choosers = page.locator('[data-testid="stFileUploader"] input[type="file"]')
    # That of the page before stays until the new page is complete.
    wait_until(lambda: choosers.count() == 1)
    choosers.set_input_files(payload)


def wait_for_answer(page, text):
    page.get_by_role("heading", name=text).wait_for()
    page.get_by_text("What speaks for").wait_for()
    wait_until(lambda: loaded_images(page) == 2)


def loaded_images(page):
    return page.evaluate(
        "[...document.querySelectorAll('[data-testid=stImage] img')].filter(i => i.complete && i.width > 150).length"
    )


def test_a_picture_gets_label_bars_and_evidence(page, assistant):
    choose_one(page)
    upload(page, ("red.png", PICTURES["a.png"]))
    expected = classify_bytes(assistant.classifier, PICTURES["a.png"])
    wait_for_answer(page, f"dog, {app.percent(expected.probability)}")
    bars = [bar.inner_text().split("\n") for bar in page.get_by_role("listitem").all()]
    assert [bar for bar in bars if len(bar) == 2] == [[name, app.percent(p)] for name, p in expected.ranking]
    text = page.inner_text("body")
    assert "Cat or dog?" in text
    assert "colours.keras (md5 " in text
    assert "mobilenetv2" in text


def test_a_broken_file_gets_a_sentence_and_the_next_one_an_answer(page):
    choose_one(page)
    upload(page, ("holiday.png", PICTURES["broken.png"]))
    page.get_by_text(re.compile(r"holiday\.png shows no picture: .+\. Please try another file\.")).wait_for()
    upload(page, ("blue.png", PICTURES["b.png"]))
    wait_for_answer(page, "cat, ")
    assert "shows no picture" not in page.inner_text("body")


def test_a_picture_can_be_pasted(page):
    choose_one(page)
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "image.png", { type: "image/png" }));
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        list(PICTURES["b.png"]),
    )
    wait_for_answer(page, "cat, ")


def test_a_picture_can_be_taken(page):
    choose_one(page)
    choose(page, "Camera")
    # What is clicked before the camera shows a picture does nothing.
    page.wait_for_function("document.querySelector('[data-testid=stCameraInput] video')?.readyState === 4")
    page.get_by_role("button", name="Take Photo").click()
    page.get_by_role("heading", name=re.compile(r"(cat|dog), \d")).wait_for()


def test_an_example_can_be_tried(page):
    choose_one(page)
    choose(page, "Examples")
    page.get_by_role("button", name="Try 2").click()
    wait_for_answer(page, "dog, ")
    page.get_by_role("button", name="Try 1").click()
    wait_for_answer(page, "cat, ")


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    fits = (
        "['html', '[data-testid=stMain]'].every(s => (e => e.scrollWidth <= e.clientWidth)(document.querySelector(s)))"
    )
    assert page.evaluate(fits)
    upload(page, ("a name that is as long as names on phones are " * 3 + ".png", PICTURES["a.png"]))
    page.get_by_text("6 pictures:").wait_for()
    assert page.evaluate(fits)
    choose_one(page)
    upload(page, ("red.png", PICTURES["a.png"]))
    wait_for_answer(page, "dog, ")
    assert page.evaluate(fits)
    choose(page, "Examples")
    page.get_by_role("button", name="Try 2").wait_for()
    assert page.evaluate(fits)


def wait_for_grid(page, *names):
    def shown():
        return [text.split("\n")[-1] for text in page.locator("figure.picture figcaption").all_inner_texts()]

    wait_until(lambda: shown() == list(names))


def test_a_folder_is_sorted_filtered_and_downloaded(page):
    wait_for_grid(page, "b.png", "sub/d.png", "c.jpg", "a.png", "e.png")
    assert re.findall("(?m)^(cat|dog)$", page.inner_text("body")) == ["cat", "dog"]
    text = page.inner_text("body")
    assert "2 cat, 3 dog" in text
    assert "1 file shows no picture" in text
    assert re.search(r"broken\.png: cannot be decoded", text)
    assert "notes.txt" not in text
    page.get_by_text("Least certain first").click()
    wait_for_grid(page, "e.png", "sub/d.png", "a.png", "b.png", "c.jpg")
    page.get_by_role("combobox").click()
    page.get_by_role("option", name="dog").click()
    wait_for_grid(page, "e.png", "a.png", "c.jpg")
    page.keyboard.press("Escape")  # closes the list of classes
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    assert download.value.suggested_filename == "predictions.csv"
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert [(row["path"], row["label"]) for row in rows] == [("e.png", "dog"), ("a.png", "dog"), ("c.jpg", "dog")]
    assert float(rows[0]["p_cat"]) + float(rows[0]["p_dog"]) == pytest.approx(1, abs=1e-5)


def test_uploads_join_the_folder(page):
    upload(page, ("new.png", picture(BLUE, 0.6)), ("bad.png", b"text"))
    page.get_by_text("6 pictures:").wait_for()
    wait_for_grid(page, "b.png", "new.png", "sub/d.png", "c.jpg", "a.png", "e.png")
    assert "bad.png: not an image" in page.inner_text("body")


def test_only_this_machine_reaches_the_page_and_by_no_other_name(address):
    port = int(address.rpartition(":")[2])

    def connect(host):
        with contextlib.closing(http.client.HTTPConnection(app_command.HOST, port)) as web:
            upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
            web.request(
                "GET", "/_stcore/stream", headers=upgrade | {"Host": host, "Sec-WebSocket-Key": "A" * 22 + "=="}
            )
            return web.getresponse().status

    assert connect(f"localhost:{port}") == 101
    assert connect("evil.example") == 403
