"""`catdog ui`: MLflow's server, lean, and its pages as a browser shows them."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Metric
from PIL import Image

from catdog import cli, tracking, ui
from catdog.errors import CatdogError
from catdog.plots import PALETTE
from conftest import wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Name, backbone, hidden units and accuracy of pipeline runs, oldest first.
EXPERIMENTS = [
    ("repro-1234567", "mobilenetv2", "[]", 0.985),
    ("tardy-unit", "vgg16", "[]", 0.97),
    ("quick-unit", "mobilenetv2+vgg16", "[256]", 0.991),
]


STEERING = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT", "DVC_EXP_NAME")


@pytest.fixture(autouse=True)
def _own_store(monkeypatch):
    for name in STEERING:
        # Set, so that it is removed at the end again: MLflow writes the first of them into the environment itself.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with three finished pipeline runs, one that failed, and their stages."""
    root = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "--quiet", root], check=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in STEERING:
            patch.setenv(name, "")
            patch.delenv(name)
        client = tracking.connect(root)
    experiment = client.get_experiment_by_name("catdog").experiment_id
    Image.new("RGB", (40, 30), "#0072B2").save(root / "confusion.png")

    def make(name, tags, status="FINISHED"):
        run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        client.set_terminated(run_id, status)
        return run_id

    for number, (name, backbone, hidden, accuracy) in enumerate(EXPERIMENTS):
        run_id = make(name, {tracking.KEY_TAG: name})
        for key, value in {"backbone": backbone, "dataset": "sample", "train.hidden_units": hidden}.items():
            client.log_param(run_id, key, value)
        client.log_param(run_id, "train.learning_rate", 10 ** -(number + 2))
        values = {"accuracy": accuracy, "accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.005}
        values |= {"log_loss": 0.045, "train.seconds": 15.7, "embed.images_per_second": 90, "f1": 0.5}
        values |= {"evaluate.images_per_second": 54.5}
        curves = [Metric("train.val_loss", math.exp(-epoch), 0, epoch) for epoch in range(1, 9)]
        client.log_batch(run_id, metrics=[Metric(key, value, 0, 0) for key, value in values.items()] + curves)
        client.log_artifact(run_id, root / "confusion.png", "evaluation")
        make("train", {"mlflow.parentRunId": run_id, tracking.STAGE_TAG: "train"})
    make("broken-unit", {tracking.KEY_TAG: "broken"}, "FAILED")
    make("my own notes", {})
    return root


def client_of(root):
    client = tracking.connect(root)
    return client, client.get_experiment_by_name("catdog").experiment_id


def free_port():
    with socket.socket() as probe:
        probe.bind((ui.HOST, 0))
        return probe.getsockname()[1]


class Command:
    """`catdog ui` in a process of its own."""

    def __init__(self, root, *options, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "catdog.cli", "ui", "--no-open", *map(str, options)],
            cwd=root,
            env={name: value for name, value in os.environ.items() if name not in STEERING}
            | {"PYTHONPATH": str(Path(ui.__file__).parents[1])}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.printed = []

    def wait_for_links(self):
        """Reads to the line that says that everything is there; returns the links by name."""
        for line in self.process.stdout:
            self.printed.append(line.strip())
            if line.startswith("Ctrl-C"):
                break
        return links_of(self.printed)

    def end(self, signum):
        """Sends a signal, and returns the exit code and the processes that are still there."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert children
        self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=600)
        left = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert "Traceback" not in out + err
        return self.process.returncode, left


def links_of(lines):
    return dict(re.fullmatch(r"(\w+): +(http\S+)", line).groups() for line in lines if "http" in line)


@pytest.fixture(scope="module")
def shown(root):
    """The links that the command prints, while its server runs; afterwards it is terminated."""
    port = free_port()
    command = Command(root, "--port", port)
    try:
        links = command.wait_for_links()
        assert links, command.process.stderr.read()
        yield links
        code, left = command.end(signal.SIGTERM)
        assert (code, left) == (128 + signal.SIGTERM, [])
        ui.require_free_port(port)
    finally:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.communicate(timeout=600)


# Links and view


def query(link):
    """The page and the parameters of a link, in order."""
    page, _, text = urllib.parse.urlsplit(link).fragment.partition("?")
    return page, dict(urllib.parse.parse_qsl(text, strict_parsing=True))


def test_links_name_the_view_and_the_runs():
    links = ui.links("http://host:5000/", "7", ["a1", "b2"])
    assert all(link.startswith("http://host:5000/#/") for link in (links.table, links.charts, links.comparison))
    view = {"workflowType": "machine_learning", "viewStateShareKey": "catdog"}
    assert query(links.table) == ("/experiments/7/runs", view)
    assert query(links.charts) == ("/experiments/7/runs", view | {"compareRunsMode": "CHART"})
    page, parameters = query(links.comparison)
    assert page == "/compare-runs"
    assert next(iter(parameters)) == "runs"  # the page does not find it elsewhere
    assert json.loads(parameters["runs"]) == ["a1", "b2"]
    assert json.loads(parameters["experiments"]) == ["7"]


@pytest.mark.parametrize("run_ids", [[], ["a1"]], ids=["none", "one"])
def test_a_comparison_takes_two(run_ids):
    assert ui.links("http://host", "7", run_ids).comparison is None


def test_the_view_is_stored_where_mlflow_looks_for_it(root):
    links = ui.prepare_links(root, "http://host")
    client, experiment = client_of(root)
    state = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.catdog"])
    assert state == ui.view_state()
    found = client.search_runs([experiment], state["searchFilter"])
    assert {run.info.run_name for run in found} == {name for name, *_ in EXPERIMENTS} | {"broken-unit"}
    # Only what finished is compared, newest first.
    compared = json.loads(query(links.comparison)[1]["runs"])
    assert [client.get_run(run_id).info.run_name for run_id in compared] == [name for name, *_ in reversed(EXPERIMENTS)]


def test_every_column_and_chart_is_something_that_runs_have(root):
    client, experiment = client_of(root)
    run = client.search_runs([experiment], "attributes.run_name = 'quick-unit'")[0].data
    known = {f"params.`{name}`" for name in run.params} | {f"metrics.`{name}`" for name in run.metrics}
    assert set(ui.COLUMNS) <= known
    charts = ui.view_state()["compareRunCharts"]
    (parallel,) = [chart for chart in charts if chart["type"] == "PARALLEL"]
    assert set(parallel["selectedParams"]) <= set(run.params)
    assert set(parallel["selectedMetrics"]) <= set(run.metrics)
    assert {chart["metricKey"] for chart in charts if chart["type"] == "BAR"} <= set(run.metrics)
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_runs_get_colours_that_differ_and_a_chosen_one_stays(root, tmp_path):
    client, _ = client_of(root)
    experiment = client.create_experiment("colours", artifact_location=tmp_path.as_uri())
    chosen = {3: PALETTE[0], 5: "#123456"}
    for number in range(len(PALETTE) + 1):
        tags = {"mlflow.runColor": chosen[number]} if number in chosen else {}
        client.create_run(experiment, tags=tags | {tracking.KEY_TAG: str(number)}, run_name=str(number))
    ui.colour_runs(client, ui.newest_runs(client, experiment))
    colours = {run.info.run_name: run.data.tags["mlflow.runColor"] for run in ui.newest_runs(client, experiment)}
    assert {number: colours[str(number)] for number in chosen} == chosen
    assert set(colours.values()) == {*PALETTE, "#123456"}
    assert len(set(colours.values())) == len(colours)
    ui.colour_runs(client, ui.newest_runs(client, experiment))
    assert colours == {
        run.info.run_name: run.data.tags["mlflow.runColor"] for run in ui.newest_runs(client, experiment)
    }


def test_only_the_newest_are_compared(root, tmp_path):
    client, _ = client_of(root)
    experiment = client.create_experiment("many", artifact_location=tmp_path.as_uri())
    for number in range(ui.COMPARED + 3):
        client.create_run(experiment, start_time=1000 + number, tags={tracking.KEY_TAG: "k"}, run_name=str(number))
    names = [run.info.run_name for run in ui.newest_runs(client, experiment)]
    assert names == [str(number) for number in range(ui.COMPARED + 2, 2, -1)]


# Starting and ending


def test_a_port_that_is_taken_is_told_before_anything_starts(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    with socket.socket() as other:
        other.bind((ui.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["ui", "--port", str(port)]) == 2
        told = capsys.readouterr()
    assert told.err == (
        f"catdog: port {port} is taken by another program; end that one, or give another, e.g. --port 5000\n"
    )
    assert told.out == ""


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "5000.0"])
def test_a_wrong_port_is_told(port, capsys):
    with pytest.raises(SystemExit):
        cli.main(["ui", f"--port={port}"])
    assert f"'{port}' is no port" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_told_with_its_last_line(tmp_path):
    with (
        pytest.raises(
            CatdogError, match=r"MLflow's server ended at its start \(.+\); .+mlflow-ui\.log has its whole log"
        ),
        ui.server(tmp_path, "sqlite:////dev/null/no.db", free_port()),
    ):
        pytest.fail("it started")


def test_a_server_that_is_too_slow_is_ended(tmp_path):
    port = free_port()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with (
        pytest.raises(CatdogError, match=rf"does not answer on port {port} after 0 seconds"),
        ui.server(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", port, seconds=0),
    ):
        pytest.fail("it started")
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_damaged_store_is_told(tmp_path, monkeypatch, capsys):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 500)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ui", "--port", str(free_port())]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"catdog: the tracking store sqlite:///{tmp_path / 'mlflow.db'} failed (")
    assert len(told.splitlines()) == 1


def test_ctrl_c_ends_the_server_and_is_no_error(root):
    port = free_port()
    # A proxy must not come between the command and its own server.
    command = Command(root, "--port", port, http_proxy="http://127.0.0.1:9", no_proxy="")
    links = command.wait_for_links()
    assert links["runs"].startswith(f"http://127.0.0.1:{port}/#/experiments/")
    children = psutil.Process(command.process.pid).children(recursive=True)
    assert sum(child.memory_info().rss for child in children) < 1e9
    code, left = command.end(signal.SIGINT)
    assert (code, left) == (0, [])
    ui.require_free_port(port)
    # Whoever made the store, artifacts go into the repository.
    client, experiment = client_of(root)
    assert client.get_experiment(experiment).artifact_location == (root / "mlruns").as_uri()


def test_a_server_that_ends_by_itself_is_told(root):
    command = Command(root, "--port", free_port())
    command.wait_for_links()
    psutil.Process(command.process.pid).children()[0].kill()
    _, told = command.process.communicate(timeout=600)
    assert command.process.returncode == 2
    assert "catdog: MLflow's server ended (" in told
    assert "Traceback" not in told


def test_a_server_of_the_user_gets_links_and_no_other_server(shown, root, tmp_path):
    address = shown["runs"].partition("/#")[0]
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    uri = address.replace("//", "//me:secret@")
    command = Command(tmp_path, MLFLOW_TRACKING_URI=uri)
    out, err = command.process.communicate(timeout=600)
    assert command.process.returncode == 0, err
    assert links_of(out.splitlines()) == shown
    assert "secret" not in out + err
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_of_the_user_that_is_not_there_is_told(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    assert cli.main(["ui"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("catdog: the tracking store http://127.0.0.1:")
    assert "secret" not in told
    assert len(told.splitlines()) == 1


# The pages


@pytest.fixture(scope="module")
def page(shown):
    """A fresh browser, wide enough for all columns, without MLflow's assistant."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 2000, "height": 1400})
        page.set_default_timeout(60_000)
        # It opens in the first visit and covers a third of the page.
        page.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        yield page
        browser.close()


def test_the_table_shows_pipeline_runs_with_what_matters(page, shown):
    page.goto(shown["runs"])
    page.get_by_role("link", name="quick-unit").wait_for()
    heads = page.evaluate(
        "[...document.querySelectorAll('[role=columnheader]')].map(e => [e.getBoundingClientRect().x, e.innerText])"
    )
    wanted = [column.split("`")[1] for column in ui.COLUMNS]
    assert [name for _, name in sorted(set(map(tuple, heads))) if name in wanted] == wanted
    text = page.inner_text("body")
    assert "4 matching runs" in text
    assert "my own notes" not in text
    assert "train" not in text.split("\n")  # a stage's run
    names = [name for name in text.split("\n") if name.strip() in {"broken-unit", *(run[0] for run in EXPERIMENTS)}]
    assert [name.strip() for name in names] == ["broken-unit", "quick-unit", "tardy-unit", "repro-1234567"]
    assert {"0.991", "0.97", "mobilenetv2+vgg16", "sample", "0.045", "15.7"} <= set(text.split("\n"))
    assert "Error" not in text


def test_the_charts_overlay_the_runs(page, shown):
    page.goto(shown["charts"])
    page.get_by_text("Parallel Coordinates").first.wait_for()
    wait_until(lambda: "val_loss" in page.inner_text("body"))
    text = page.inner_text("body")
    for title in ("train.val_loss", "accuracy", "log_loss", "embed.images_per_second"):
        assert title in text
    assert "f1" not in text.split("\n")  # only the charts that were chosen
    for name, *_ in EXPERIMENTS:
        assert name in text


def test_the_comparison_shows_the_finished_runs(page, shown):
    page.goto(shown["comparison"])
    page.get_by_text("Comparing 3 Runs from 1 Experiment").wait_for()
    text = page.inner_text("body")
    for name, backbone, *_ in EXPERIMENTS:
        assert name in text
        assert backbone in text
    assert "Error while" not in text
    assert "GenAI" in text  # as a mode that could be chosen, and is not:
    assert "Prompts" not in text


def test_a_picture_is_shown(page, shown, root):
    client, experiment = client_of(root)
    (run,) = client.search_runs([experiment], "attributes.run_name = 'quick-unit'")
    address = shown["runs"].partition("/#")[0]
    page.goto(f"{address}/#/experiments/{experiment}/runs/{run.info.run_id}/artifacts/evaluation/confusion.png")
    wait_until(lambda: page.locator("img[src^='blob:'], img[src*='confusion']").count())


def test_a_deleted_experiment_is_told(tmp_path, monkeypatch, capsys):
    for name in STEERING:
        monkeypatch.delenv(name, raising=False)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    client, experiment_id = client_of(tmp_path)
    client.delete_experiment(experiment_id)
    assert cli.main(["ui", "--port", str(free_port())]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("catdog: the MLflow experiment catdog was deleted; `MLFLOW_TRACKING_URI=sqlite:////")
    assert f"mlflow experiments restore --experiment-id {experiment_id}` restores it" in told
