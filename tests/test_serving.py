"""The REST server: a real process, asked over HTTP; right answers to many at once, a sentence for every mistake."""

import ast
import base64
import contextlib
import http.client
import importlib.metadata
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from catdog import serving
from catdog.model import read_info
from catdog.predict import Classifier
from catdog.serving import ServedModel, signature_of
from conftest import Project
from test_inputs import CAT, DOG, picture
from test_predict import chance, model_of

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
JSON = {"Content-Type": "application/json"}
THRESHOLD = 0.7

LOG = """
import sys
from pathlib import Path
import mlflow
from catdog.serving import log_served_model
client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment("catdog", artifact_location=Path("mlruns").absolute().as_uri()))
log_served_model(run.info.run_id, Path(sys.argv[1]))
print(run.info.run_id)
"""


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def ask(self, body=None, headers=JSON, path="/invocations", method="POST") -> tuple[int, str]:
        with contextlib.closing(self.connect()) as connection:
            return exchange(connection, body, headers, path, method)


def exchange(connection, body, headers=JSON, path="/invocations", method="POST") -> tuple[int, str]:
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def server(workshop, tmp_path_factory):
    """`mlflow models serve` of a model that `log_served_model` logged."""
    folder = tmp_path_factory.mktemp("served")
    model = model_of(("cat", "dog"), folder / "model.keras", threshold=THRESHOLD)
    project = Project(folder, workshop.home, warm=True)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    logged = project.run("python", "-c", LOG, str(model), PYTHONPATH=str(ROOT / "src"), **store)
    assert logged.returncode == 0, logged.stderr
    model.unlink()  # what is logged must stand on its own, and so must its code
    uri = f"runs:/{logged.stdout.split()[-1]}/model"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            ["mlflow", "models", "serve", "--env-manager", "local", "-m", uri, "--host", "127.0.0.1", "-p", str(port)],
            cwd=folder,
            env=project.environment(**store),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        server = Server(port)
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                if server.ask(headers={}, path="/ping", method="GET")[0] == 200:
                    break
            told = (folder / "log.txt").read_text(errors="replace")
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(300)


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def request(*images, **params) -> str:
    body = {"dataframe_records": [{"image": encode(one) if isinstance(one, bytes) else one} for one in images]}
    return json.dumps(body | ({"params": params} if params else {}))


def rows_of(answer: tuple[int, str]) -> list[dict]:
    status, text = answer
    assert status == 200, text
    return json.loads(text)["predictions"]


# Right answers


def test_health_is_told(server):
    for path in ("/ping", "/health"):
        assert server.ask(headers={}, path=path, method="GET")[0] == 200


def test_answers_have_label_and_probabilities(server):
    rows = rows_of(server.ask(request(picture(CAT), picture(DOG), picture((130, 0, 100)))))
    assert [list(row) for row in rows] == [["label", "probability", "p_cat", "p_dog"]] * 3
    # The third is more likely a dog, at 62 %, but the model's own threshold is 70 %.
    assert [row["label"] for row in rows] == ["cat", "dog", "cat"]
    assert [row["p_dog"] for row in rows] == pytest.approx(
        [chance(20, 230), chance(230, 20), chance(130, 100)], abs=0.01
    )
    for row in rows:
        assert row["p_cat"] + row["p_dog"] == pytest.approx(1, abs=1e-6)
        assert row["probability"] == row[f"p_{row['label']}"]


def test_probabilities_are_those_of_predict(server, tmp_path):
    classifier = Classifier(model_of(("cat", "dog"), tmp_path / "model.keras"), engine="keras")
    noise = [np.random.default_rng(n).integers(0, 256, (40, 30, 3), np.uint8) for n in range(9)]
    files = []
    for pixels in noise:
        files.append(io.BytesIO())
        Image.fromarray(pixels).save(files[-1], "PNG")
    expected = classifier.probabilities(np.stack([classifier.pixels(file.getvalue()) for file in files])[np.newaxis])
    rows = rows_of(server.ask(request(*(file.getvalue() for file in files))))
    assert [[row["p_cat"], row["p_dog"]] for row in rows] == pytest.approx(expected, abs=1e-6)


def test_parameters_change_threshold_and_columns(server):
    dog = picture((130, 0, 100))
    assert rows_of(server.ask(request(dog, threshold=0.5)))[0]["label"] == "dog"
    assert rows_of(server.ask(request(dog, threshold=1)))[0]["label"] == "cat"
    for count in (1, 2):
        (row,) = rows_of(server.ask(request(dog, top_k=count)))
        columns = [f"{kind}_{number}" for number in range(1, count + 1) for kind in ("label", "probability")]
        assert list(row) == ["label", "probability", *columns]
        assert (row["label"], row["label_1"], row.get("label_2", "cat")) == ("cat", "dog", "cat")
        assert row["probability_1"] == pytest.approx(1 - row["probability"], abs=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [encode(picture(CAT))]},
        {"inputs": {"image": [encode(picture(CAT))]}},
        {"instances": [{"image": encode(picture(CAT))}]},
        {"dataframe_split": {"columns": ["image"], "data": [[encode(picture(CAT))]]}},
    ],
    ids=["inputs", "columns", "instances", "split"],
)
def test_other_forms_of_a_request_are_understood(server, body):
    assert [row["label"] for row in rows_of(server.ask(json.dumps(body)))] == ["cat"]


def shade(difference: int) -> tuple[int, int, int]:
    """A colour with so much more red than blue."""
    return (max(difference, 0), 0, max(-difference, 0))


def test_many_clients_at_once_each_get_their_own_answers(server):
    """Eight clients send 25 requests each, of one to three pictures whose answers differ from each other's."""

    def talk(client: int) -> list[float]:
        errors = []
        with contextlib.closing(server.connect()) as connection:
            for number in range(25):
                colours = [shade(30 * client - 8 * number + 20 * extra) for extra in range(1 + number % 3)]
                rows = rows_of(exchange(connection, request(*map(picture, colours))))
                assert len(rows) == len(colours)
                errors += [abs(row["p_dog"] - chance(c[0], c[2])) for row, c in zip(rows, colours, strict=True)]
        return errors

    with ThreadPoolExecutor(8) as pool:
        errors = [error for each in pool.map(talk, range(8)) for error in each]
    assert len(errors) == 8 * sum(1 + number % 3 for number in range(25))
    # The answer to another client's picture would differ by more: 30 steps of red are 0.016 or more.
    assert max(errors) < 0.01
    assert abs(chance(230, 0) - chance(200, 0)) > 0.015


# Wrong requests


def black(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


GOOD = request(picture())
OWN = {  # what the model itself says
    "no base64": (request("/etc/passwd"), "image 0 is no base64; send that of an image file's bytes"),
    "a data address": (
        request("data:image/png;base64," + encode(picture())),
        "image 0 is no base64; .* without line br",
    ),
    "line breaks": (request(base64.encodebytes(picture()).decode()), "image 0 is no base64; .* without line breaks"),
    "other alphabets": (request("ä" * 8), "image 0 is no base64"),
    "half a quartet": (request(encode(picture())[:-1]), "image 0 is no base64"),
    "empty": (request(""), "image 0 is empty or no text; send the base64"),
    "null": (request(None), "image 0 is empty or no text"),
    "a number": (request(5), "image 0 is empty or no text"),
    "a list": (request([1, 2]), "image 0 is empty or no text"),
    "the second is missing": (request(picture())[:-2] + ", {}]}", "image 1 is empty or no text"),
    "a text": (request(b"no picture"), "image 0: not an image; send the base64 of an image file's bytes"),
    "the third is a text": (request(picture(), picture(), b"text"), "image 2: not an image"),
    "cut off": (request(picture()[:50]), "image 0: (cannot be decoded|not an image)"),
    "many pixels": (request(black(10_000, 5_001)), "image 0: 10000x5001 pixels are more than the limit of 50 million"),
    "many bytes": (request("A" * 26_666_672), "image 0 has more than 20,000,000 bytes, the limit; send a smaller one"),
    "many images": (request(*[picture()] * 65), "65 images are more than the limit of 64; send several requests"),
    "threshold above 1": (request(picture(), threshold=1.5), "threshold = 1.5 is no number from 0 to 1"),
    "threshold NaN": (request(picture(), threshold=float("nan")), "threshold = nan is no number from 0 to 1"),
    "top_k of 3": (request(picture(), top_k=3), "top_k = 3 is no number from 0 to 2, the number of classes"),
    "top_k below 0": (request(picture(), top_k=-1), "top_k = -1 is no number from 0 to 2"),
}
MLFLOWS = {  # what MLflow says before the model is asked
    "nothing": ("", 400, "valid JSON"),
    "no JSON": ("{", 400, "valid JSON"),
    "no UTF-8": (b'{"inputs": ["\xff"]}', 400, "valid JSON"),
    "JSON of a list": ("[]", 400, "must be a JSON dictionary"),
    "no rows": (request(), 400, "missing inputs"),
    "no known key": ('{"images": []}', 400, "exactly one of the input fields"),
    "another column": (json.dumps({"dataframe_records": [{"picture": "x"}]}), 400, "missing inputs"),
    "rows that do not fit": (
        json.dumps({"dataframe_split": {"columns": ["image"], "data": [[1, 2]]}}),
        400,
        "not a valid",
    ),
    "threshold of text": (request(picture(), threshold="x"), 400, "'threshold': double"),
    "top_k of 1.5": (request(picture(), top_k=1.5), 400, "'top_k': long"),
    "parameters of a list": (GOOD[:-1] + ', "params": [1]}', 400, "Parameters must be a dictionary"),
}


def require_no_trace(text: str) -> None:
    assert not re.search(r'Traceback|stack_trace|File \\?"|\.py\b', text), text


@pytest.mark.parametrize("kind", OWN)
def test_bad_pictures_and_parameters_get_400_and_one_sentence(server, kind):
    body, told = OWN[kind]
    status, text = server.ask(body)
    assert status == 400, text
    answer = json.loads(text)
    assert set(answer) == {"error_code", "message"}
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert re.match(told, answer["message"]), answer["message"]
    assert "\n" not in answer["message"]
    assert len(answer["message"]) < 200
    require_no_trace(text)


@pytest.mark.parametrize("kind", MLFLOWS)
def test_bad_requests_get_their_status_and_no_stack_trace(server, kind):
    body, status, told = MLFLOWS[kind]
    assert server.ask(body)[0] == status
    text = server.ask(body)[1]
    assert told in json.loads(text)["message"]
    require_no_trace(text)


@pytest.mark.parametrize(
    ("headers", "path", "method", "status"),
    [
        ({"Content-Type": "text/plain"}, "/invocations", "POST", 415),
        ({"Content-Type": "application/json; charset=latin-1"}, "/invocations", "POST", 415),
        (JSON, "/invocations", "GET", 405),
        (JSON, "/predict", "POST", 404),
        (JSON, "/../../etc/passwd", "GET", 404),
    ],
)
def test_wrong_kinds_of_request_get_their_status(server, headers, path, method, status):
    found, text = server.ask(GOOD, headers, path, method)
    assert found == status
    require_no_trace(text)


def test_server_answers_as_before_after_all_that(server):
    for kind in OWN:
        server.ask(OWN[kind][0])
    assert rows_of(server.ask(GOOD))[0]["label"] == "dog"


# The model without a server


def served(path: Path) -> ServedModel:
    model = ServedModel()
    model.load_context(types.SimpleNamespace(artifacts={"model": str(path)}))
    return model


def frame(*images: bytes) -> pd.DataFrame:
    return pd.DataFrame({"image": [encode(one) for one in images]})


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    return model_of(("cat", "dog", "fox"), tmp_path_factory.mktemp("three") / "model.keras")


def test_three_classes_are_ranked_and_have_no_threshold(three):
    model, dog = served(three), frame(picture((200, 60, 0)))
    row = model.predict(None, dog, {"threshold": 0.5, "top_k": 3}).iloc[0]
    # Blue speaks for the first class, red for the second, green for the third.
    assert [row["label_1"], row["label_2"], row["label_3"]] == ["dog", "fox", "cat"]
    assert row["probability_1"] > row["probability_2"] > row["probability_3"]
    assert len(row) == 2 + 3 * 2
    assert model.predict(None, dog).columns.tolist() == ["label", "probability", "p_cat", "p_dog", "p_fox"]
    with pytest.raises(
        MlflowException, match=r"threshold = 0\.6 tells two classes apart, but the model knows 3; leave"
    ):
        model.predict(None, dog, {"threshold": 0.6, "top_k": 0})


def test_limits_let_through_what_they_name(three, monkeypatch):
    model = served(three)
    files = [picture(), picture(CAT)]
    monkeypatch.setattr(serving, "MAX_IMAGES", 2)
    monkeypatch.setattr(serving, "MAX_IMAGE_BYTES", max(map(len, files)))
    monkeypatch.setattr(serving, "MAX_IMAGE_PIXELS", 30 * 20)
    assert len(model.predict(None, frame(*files))) == 2
    monkeypatch.setattr(serving, "MAX_IMAGE_BYTES", max(map(len, files)) - 3)
    with pytest.raises(MlflowException, match=r"image . has more than"):
        model.predict(None, frame(*files))
    monkeypatch.setattr(serving, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(serving, "MAX_IMAGE_PIXELS", 30 * 20 - 1)
    with pytest.raises(MlflowException, match="image 0: 30x20 pixels are more than the limit"):
        model.predict(None, frame(*files))


def test_no_images_give_no_rows_of_the_same_columns(three):
    model = served(three)
    for params in ({}, {"top_k": 2}):
        some, none = model.predict(None, frame(picture()), params), model.predict(None, frame(), params)
        assert (len(none), none.columns.tolist()) == (0, some.columns.tolist())


def test_signature_tells_the_models_own_threshold(tmp_path):
    info = read_info(model_of(("cat", "dog"), tmp_path / "model.keras", threshold=0.31))
    assert [(param.name, param.default) for param in signature_of(info).params] == [("threshold", 0.31), ("top_k", 0)]


def test_a_fresh_environment_has_all_that_the_model_imports():
    """What the modules behind `catdog.serving` import at once, against what the model asks to have installed."""
    code = "import catdog.served_model, sys; print(*(n for n in sys.modules if n.partition('.')[0] == 'catdog'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set()
    for name in done.stdout.split():
        path = ROOT / "src" / Path(*name.split("."))
        tree = ast.parse(
            (path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py").read_text()
        )
        for node in tree.body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"catdog", "mlflow"}  # MLflow asks for itself
    assert {"numpy", "cv2", "PIL"} <= others
    asked = {requirement.partition("==")[0] for requirement in serving._requirements()}
    packages = importlib.metadata.packages_distributions()
    assert {name: packages[name] for name in others if not asked & set(packages[name])} == {}
    assert {"keras", "openvino"} <= asked
