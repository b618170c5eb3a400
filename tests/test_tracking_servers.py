"""MLflow elsewhere: a server on PostgreSQL, one database for two pipelines at once, and nothing that answers."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.files import read_json
from catdog.tracking import Recorded, StageRun, StoreError, connect, dvc_outs, log_data_hash, public_address, stage
from conftest import STAGES, Project, Store, copy_project, stages_run, wait_until

# Nothing listens there.
NOBODY = "http://127.0.0.1:9"
SECRET = "b1-secret"  # of a database that lives as long as the test


def postgres_programs():
    """The folder of PostgreSQL's programs, which Debian keeps outside PATH; None where there are none."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in found if (folder / "initdb").exists()), None)


@contextlib.contextmanager
def running(*command, **options):
    """Runs a program and what it starts for the block; what it prints is lost unless the options say otherwise."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([str(part) for part in command], start_new_session=True, **silent | options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def postgres(programs):
    """Runs a database of its own for the block; gives its address."""
    import psycopg

    # PostgreSQL refuses to run as root; another user cannot look into pytest's folders.
    user = pwd.getpwnam("nobody").pw_name if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="catdog-postgres-"))
    try:
        (folder / "password").write_text(SECRET)
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        initdb = [
            *(programs / "initdb", "--username=catdog", "--auth=scram-sha-256", "--no-sync"),
            *("--locale=C", "--encoding=UTF8", f"--pwfile={folder / 'password'}", folder / "data"),
        ]
        subprocess.run(initdb, user=user, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        port = free_port()
        start = [
            *(programs / "postgres", "-D", folder / "data", "-p", port, "-k", folder),
            *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"),
        ]

        def answers():
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(f"postgresql://catdog:{SECRET}@127.0.0.1:{port}/postgres").close()
                return True

        with running(*start, user=user, cwd=folder) as process:
            wait_until(lambda: process.poll() is not None or answers())
            yield f"postgresql+psycopg://catdog:{SECRET}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def tracking_server(database, artifacts, environment):
    """Runs MLflow's server for the block, with the files behind it; gives its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def answers():
        with contextlib.suppress(requests.RequestException):
            return direct.get(f"{address}/health", timeout=5).ok

    command = [
        *("mlflow", "server", "--backend-store-uri", database, "--artifacts-destination", artifacts),
        *("--host", "127.0.0.1", "--port", port, "--workers", "1"),
    ]
    environment = environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with requests.Session() as direct, running(*command, env=environment, cwd=artifacts) as process:
        direct.trust_env = False
        wait_until(lambda: process.poll() is not None or answers(), every=0.3)
        assert process.poll() is None, "the tracking server does not start"
        yield address


def repro(project, uri, *targets):
    """Runs `dvc repro` with the store at `uri`; returns how it ended and how many seconds it took."""
    started = time.monotonic()
    done = project.dvc("repro", *targets, MLFLOW_TRACKING_URI=uri, NO_PROXY="*", no_proxy="*")
    return done, time.monotonic() - started


# The stages that each of the two copies below runs.
LIVE = {"rate": ("train", "evaluate", "track"), "gallery": ("evaluate", "track")}


def repro_stages(project, uri, stages):
    """Runs the pipeline, which must succeed and come to these stages."""
    done, _ = repro(project, uri)
    require_success(done)
    assert stages_run(done.stdout) == list(stages)
    return done


def require_success(done):
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pair(finished, tmp_path_factory):
    """Two copies of the finished project with nothing of its store: another learning rate, and other galleries."""
    folder = tmp_path_factory.mktemp("pair")
    copies = {}
    for name, change in (("rate", {"train.learning_rate": 0.003}), ("gallery", {"evaluate.gallery": 9})):
        project = copies[name] = copy_project(finished, folder / name)
        project.set_params(change)
        for path in project.root.glob("mlflow.db*"):
            path.unlink()
        shutil.rmtree(project.root / "mlruns")
        project.commit()
    return copies


@pytest.fixture(scope="module")
def started_without_server(pair, finished, tmp_path_factory):
    """The copy with another learning rate once more, at work with `tracking.required: false` and no server."""
    root = tmp_path_factory.mktemp("unreachable") / "project"
    shutil.copytree(pair["rate"].root, root, symlinks=True)
    project = Project(root, finished.home, warm=True)
    project.set_params({"tracking.required": False})
    with ThreadPoolExecutor() as pool:
        yield project, pool.submit(repro_stages, project, NOBODY, LIVE["rate"])


@pytest.fixture(scope="module")
def unreachable(started_without_server):
    """The project that ran without a server, and how the run ended."""
    project, run = started_without_server
    return project, run.result()


@pytest.fixture(scope="module")
def remote(pair, started_without_server, tmp_path_factory):
    """The two copies after they ran at once into a fresh server on PostgreSQL; gives its address and its files."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (`initdb` is neither on PATH nor in /usr/lib/postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (`pip install 'catdog[postgres]'`)")
    artifacts = tmp_path_factory.mktemp("artifacts")
    environment = pair["rate"].environment()
    with postgres(programs) as database, tracking_server(database, artifacts, environment) as address:
        started_without_server[1].result()  # it had the time in which the server starts
        with ThreadPoolExecutor() as pool:
            runs = [pool.submit(repro_stages, project, address, LIVE[name]) for name, project in pair.items()]
            for run in runs:
                run.result()
        yield address, artifacts


def parents_by_project(store):
    """The parent runs by the name of their project's folder."""
    return {Path(run.data.tags["pipeline.place"]).name: run for run in store.parents()}


# A server on PostgreSQL that keeps the files, too, and two pipelines that start with it


@pytest.fixture
def server(remote, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    return Store(remote[0])


@pytest.mark.parametrize(("name", "live"), LIVE.items())
def test_server_has_one_complete_parent_a_pipeline(server, pair, name, live):
    parents = parents_by_project(server)
    assert (len(server.parents()), sorted(parents)) == (2, ["gallery", "rate"])
    parent = parents[name]
    assert parent.info.status == "FINISHED"
    assert parent.data.params == load_params(pair[name].root / "params.yaml").flat()
    report = read_json(pair[name].root / "reports/metrics.json")
    assert {metric: parent.data.metrics[metric] for metric in report} == report
    children = server.children(parent)
    assert {run.info.status for run in children} == {"FINISHED"}
    assert sorted(run.info.run_name for run in children) == sorted(
        stage if stage in live else f"{stage} (cached)" for stage in STAGES
    )


def test_server_keeps_the_files_and_the_model(server, pair, remote, tmp_path):
    _, artifacts = remote
    parent = parents_by_project(server)["rate"]
    (train,) = [run for run in server.children(parent) if run.info.run_name == "train"]
    assert parent.info.artifact_uri.startswith("mlflow-artifacts:")
    for run, kept, original in (
        (parent, "evaluation/confusion.png", "reports/evaluation/confusion.png"),
        (parent, "metrics.json", "reports/metrics.json"),
        (train, "history.csv", "reports/history.csv"),
    ):
        file = Path(server.client.download_artifacts(run.info.run_id, kept, str(tmp_path)))
        assert file.read_bytes() == (pair["rate"].root / original).read_bytes()
    (model,) = server.client.search_logged_models([train.info.experiment_id])
    assert (model.source_run_id, model.status) == (train.info.run_id, "READY")
    (stored,) = artifacts.rglob("model.keras")
    assert stored.read_bytes() == (pair["rate"].root / "models/model.keras").read_bytes()
    points = server.client.get_metric_history(train.info.run_id, "val_loss")
    epochs = len((pair["rate"].root / "reports/history.csv").read_text().splitlines()) - 1
    assert [point.step for point in points] == list(range(1, epochs + 1))


@pytest.mark.parametrize("name", ["rate", "gallery"])
def test_server_leaves_nothing_of_mlflow_in_the_repository(server, pair, name):
    assert [path.name for path in pair[name].root.glob("ml*")] == []


# One database for two pipelines at once


def test_two_pipelines_create_one_database_at_once(finished, tmp_path):
    uri = f"sqlite:///{tmp_path / 'shared/mlflow.db'}"
    projects = [copy_project(finished, tmp_path / name) for name in ("first", "second")]
    for number, project in enumerate(projects):
        # Only `track` depends on this: it tells the whole pipeline from its report files.
        project.set_params({"tracking.required": True, "tune.trials": 71 + number})
    with ThreadPoolExecutor() as pool:
        for done, _ in pool.map(lambda project: repro(project, uri), projects):
            require_success(done)
            assert "without times and curves of download, split, preprocess, embed, train, evaluate" in done.stdout
    store = Store(uri)
    parents = parents_by_project(store)
    assert (len(store.parents()), sorted(parents)) == (2, ["first", "second"])
    for number, name in enumerate(("first", "second")):
        assert parents[name].info.status == "FINISHED"
        assert parents[name].data.params["tune.trials"] == str(71 + number)
        cached = {f"{stage} (cached)" for stage in STAGES[:-1]}
        assert {run.info.run_name for run in store.children(parents[name])} == cached | {"track"}
        # Beside the database: neither repository has the files of the other.
        assert parents[name].info.artifact_uri.startswith((tmp_path / "shared/mlruns").as_uri())


def test_path_of_a_database_starts_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mine.db")
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    experiment = connect(tmp_path).get_experiment_by_name("catdog")
    assert (tmp_path / "runs/mine.db").exists()
    assert experiment.artifact_location == (tmp_path / "runs/mlruns").as_uri()
    assert list((tmp_path / "copy").iterdir()) == []


def test_an_experiment_that_another_machine_makes_first_is_taken(monkeypatch, tmp_path):
    from mlflow import MlflowClient

    find = MlflowClient.get_experiment_by_name
    asked = []

    def find_late(client, name):
        """As if the other one makes it right after the first look."""
        asked.append(name)
        if len(asked) == 1:
            client.create_experiment(name)
            return None
        return find(client, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", find_late)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert connect(tmp_path).get_experiment_by_name("catdog").name == "catdog"


def test_data_that_another_pipeline_names_first_is_named_all_the_same(finished, monkeypatch, tmp_path):
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput
    from mlflow.store.tracking.dbmodels.models import SqlDataset
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(finished.root)
    client = connect(tmp_path)
    experiment = client.get_experiment_by_name("catdog").experiment_id
    ours, theirs = (client.create_run(experiment).info.run_id for _ in range(2))
    params = load_params(finished.root / "params.yaml")
    digest = dvc_outs()["data/raw.zip"]
    source = get_dataset_source_from_json('{"uri": "data/raw.zip"}', "local")
    same = DatasetInput(MetaDataset(source, name=params.dataset, digest=digest)._to_mlflow_entity(), [])
    added = []

    def add_first(session, *_):
        """The other one adds it between our search, which found none, and our own row."""
        if not added and any(isinstance(row, SqlDataset) for row in session.new):
            added.append(theirs)
            client.log_inputs(theirs, [same])

    event.listen(Session, "before_flush", add_first)
    try:
        run = StageRun("split", params, tmp_path, client=client, recorded=Recorded("split", params, ours, ""))
        log_data_hash(run, Path("data/raw.zip"))
    finally:
        event.remove(Session, "before_flush", add_first)
    assert added == [theirs]
    for run in (ours, theirs):
        (named,) = client.get_run(run).inputs.dataset_inputs
        assert (named.dataset.name, named.dataset.digest) == (params.dataset, digest)


# Nothing that answers


@pytest.fixture
def mute():
    """The address of a server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://somebody:{SECRET}@127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_keeps_silent_stops_the_pipeline_before_work(finished, mute, tmp_path):
    project = copy_project(finished, tmp_path / "project")
    project.set_params({"download.sample_images": 102})
    raw = (project.root / "data/raw.zip").read_bytes()
    shutil.rmtree(project.root / ".dvc/cache")
    done, seconds = repro(project, mute)
    assert done.returncode != 0
    assert seconds < 40  # on a busy machine; MLflow's own limits are a quarter of an hour
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("catdog download: ")]
    assert told == (
        f"catdog download: the tracking store {mute.replace(f'somebody:{SECRET}@', '')} failed (timed out); check that "
        "it can be reached, or set tracking.required to false to work without it"
    )
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not (project.root / "data/raw.zip").exists() or (project.root / "data/raw.zip").read_bytes() == raw
    assert not list((project.root / "data").glob("*.part"))


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        (NOBODY, "Connection refused"),
        (f"postgresql+psycopg://somebody:{SECRET}@127.0.0.1:9/catdog", "Connection refused"),
        ("nonsense://store", "nonsense://store"),
    ],
    ids=["server", "database", "nonsense"],
)
def test_a_store_that_is_not_there_is_told_at_once(monkeypatch, tmp_path, uri, cause):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(CatdogError) as caught:
        connect(tmp_path)
    assert time.monotonic() - started < 15  # MLflow's import included; it would ask for minutes
    text = str(caught.value)
    assert text.startswith(f"the tracking store {public_address(uri)} failed (")
    assert cause in text
    assert SECRET not in text
    assert text.endswith("; check that it can be reached")


def test_a_database_that_cannot_be_made_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///file/mlflow.db")
    with pytest.raises(CatdogError, match=r"the tracking store sqlite:////.*/file/mlflow.db failed .*; check the path"):
        connect(tmp_path)


# Where the store is not required


def test_without_a_store_each_stage_says_so_in_one_line(unreachable):
    _, done = unreachable
    told = [line for line in done.stderr.splitlines() if line.startswith("catdog ")]
    assert told == [
        f"catdog {stage}: the tracking store {NOBODY} failed ([Errno 111] Connection refused); check that it can be "
        "reached; working without MLflow"
        for stage in LIVE["rate"]
    ]
    assert "Traceback" not in done.stderr
    assert "track: this run is not in MLflow" in done.stdout


def test_without_a_store_the_outputs_are_the_same(unreachable, pair, remote, finished):
    made = unreachable[0].out_hashes()
    assert made == pair["rate"].out_hashes()
    assert made["models/model.keras"] != finished.out_hashes()["models/model.keras"]


def test_a_run_without_a_store_is_recorded_when_there_is_one(unreachable, tmp_path):
    project, _ = unreachable
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done, _ = repro(project, uri, "--single-item", "--force", "track")
    require_success(done)
    assert "without times and curves of download, split, preprocess, embed, train, evaluate" in done.stdout
    (parent,) = Store(uri).parents()
    assert parent.info.status == "FINISHED"
    report = read_json(project.root / "reports/metrics.json")
    assert {metric: parent.data.metrics[metric] for metric in report} == report


@pytest.mark.parametrize(
    "error",
    [requests.HTTPError("500 Server Error"), requests.ConnectionError("Connection aborted")],  # both are OSErrors
    ids=["answer", "connection"],
)
def test_a_server_that_fails_in_the_middle_stops_the_stage_with_a_sentence(
    finished, monkeypatch, tmp_path, capsys, error
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(finished.root)

    def fail(client, recorded):
        raise error

    with pytest.raises(SystemExit) as stopped, stage("download") as run:
        run.record(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"catdog download: the tracking store {uri} failed ({error}); check that it can be reached and that its "
        "disk is not full, or set tracking.required to false to work without it\n"
    )
    assert [run.info.status for run in Store(uri).runs()] == ["FAILED", "FAILED"]
    # What the stage itself asks of the internet is not the store.
    with pytest.raises(type(error)), stage("download"):
        raise error


@pytest.mark.parametrize("required", [True, False], ids=["required", "not required"])
def test_a_store_that_goes_away_while_a_stage_works(finished, monkeypatch, tmp_path, capsys, required):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    params = load_params(finished.root / "params.yaml")
    recorded = Recorded("download", params, "lost", "lost too")
    run = StageRun(
        "download", params, tmp_path, store_required=required, client=MlflowClient(NOBODY), recorded=recorded
    )
    if required:
        with pytest.raises(StoreError, match=r"set tracking\.required to false"):
            run.measure({"seconds": 1})
        return
    run.measure({"seconds": 1})
    run.note({"device": "CPU"})
    run.finish({"images": 3}, "three images")
    assert read_json(tmp_path / "reports/download.json") == {"images": 3}
    printed = capsys.readouterr()
    assert printed.out == "download: three images\n"
    (line,) = printed.err.splitlines()
    assert line.startswith(f"catdog download: the tracking store {NOBODY} failed (")
    assert line.endswith("; working without MLflow")


def test_an_error_that_is_not_the_stores_is_never_passed_over(finished, tmp_path):
    params = load_params(finished.root / "params.yaml")
    recorded = Recorded("train", params, "lost", "lost too")
    run = StageRun("train", params, tmp_path, store_required=False, client=object(), recorded=recorded)
    with pytest.raises(AttributeError):
        run.measure({"seconds": 1})


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("postgresql+psycopg://user:secret@host/db", "postgresql+psycopg://host/db"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_address_is_shown_without_password(uri, shown):
    assert public_address(uri) == shown
