"""What the pipeline writes into MLflow, in every way of running it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML
from sqlalchemy.engine import make_url

from catdog import housekeeping, tracking
from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.tracking import dvc_hash, nothing_follows
from catdog.tracking import stage as stage_run
from conftest import REPOSITORY, STAGES, Store, stages_run

TEST_METRICS = {
    *("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "precision", "recall", "f1", "roc_auc"),
    *("pr_auc", "log_loss", "brier", "ece", "test_images"),
}


def artifact(run, name):
    """The file on disk of a run's artifact."""
    return Path(url2pathname(urlparse(run.info.artifact_uri).path)) / name


def require_complete(project, store, parent, live, *, params=None, tracked=True):
    """A parent that tells everything: itself and its stages finished, every parameter, every number."""
    assert parent.info.status == "FINISHED"
    flat = load_params(project.root / "params.yaml").flat() | (params or {})
    assert parent.data.params == flat
    finished = [run for run in store.children(parent) if run.info.status == "FINISHED"]
    assert sorted(run.info.run_name for run in finished) == sorted(
        name if name in live else f"{name} (cached)" for name in (STAGES if tracked else STAGES[:-1])
    )
    for run in finished:
        stage = run.data.tags["pipeline.stage"]
        if stage == "track":
            continue
        assert run.data.metrics, f"{stage} has no numbers"
        for name, value in run.data.metrics.items():
            plain = stage == "evaluate" and name in TEST_METRICS
            assert parent.data.metrics[name if plain else f"{stage}.{name}"] == value
    assert set(parent.data.metrics) >= TEST_METRICS


# The first `dvc repro`


def test_first_repro_has_one_complete_parent(finished):
    (parent,) = finished.store().parents()
    require_complete(finished, finished.store(), parent, STAGES)
    assert [run.info.run_name for run in finished.store().children(parent)] == list(STAGES)


def test_test_metrics_are_those_of_the_report(finished):
    (parent,) = finished.store().parents()
    report = json.loads((finished.root / "reports/metrics.json").read_text())
    assert {name: parent.data.metrics[name] for name in report} == report
    assert set(report) == TEST_METRICS


def test_runs_name_the_git_revision(finished):
    first = finished.git("rev-list", "--max-parents=0", "HEAD")
    for run in finished.store().runs():
        assert run.data.tags["mlflow.source.git.commit"] == first


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("split", "data/raw.zip"),
        ("preprocess", "data/manifest.csv"),
        ("embed", "data/tfrecords"),
        ("train", "data/features"),
        ("evaluate", "data/tfrecords"),
    ],
)
def test_a_stage_names_its_data_by_dvcs_hash(finished, stage, data):
    run = finished.store().last_child(stage)
    (named,) = run.inputs.dataset_inputs
    assert named.dataset.digest == finished.out_hashes()[data]


def test_parent_names_the_data_set_by_dvcs_hash(finished):
    (parent,) = finished.store().parents()
    (named,) = parent.inputs.dataset_inputs
    assert (named.dataset.name, named.dataset.digest) == ("sample", finished.out_hashes()["data/raw.zip"])


def test_parent_names_every_output_by_dvcs_hash(finished):
    (parent,) = finished.store().parents()
    tags = {name: value for name, value in parent.data.tags.items() if name.startswith("dvc.out.")}
    assert tags == {f"dvc.out.{path}": digest for path, digest in finished.out_hashes().items()}


def test_pictures_are_artifacts_on_disk(finished):
    store = finished.store()
    (parent,) = store.parents()
    for run, name in (
        (parent, "evaluation/confusion.png"),
        (parent, "learning_curves.png"),
        (parent, "metrics.json"),
        (store.last_child("split"), "data.html"),
        (store.last_child("split"), "data/montage-1-cat.png"),
        (store.last_child("split"), "data/properties.png"),
        (store.last_child("train"), "learning_curves.png"),
        (store.last_child("evaluate"), "predictions.csv"),
    ):
        assert artifact(run, name).stat().st_size > 0
        assert artifact(run, name).is_relative_to(finished.root / "mlruns")


def test_curves_have_a_point_an_epoch(finished):
    store = finished.store()
    epochs = len((finished.root / "reports/history.csv").read_text().splitlines()) - 1
    train, (parent, *_) = store.last_child("train"), store.parents()
    # The parent has them too, because charts compare parents.
    for run, name in ((train, "val_loss"), (parent, "train.val_loss")):
        points = store.client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == list(range(1, epochs + 1))


def test_repro_without_change_adds_no_run(finished):
    before = [run.info.run_id for run in finished.store().runs()]
    assert finished.repro() == []
    assert [run.info.run_id for run in finished.store().runs()] == before


# A stage that fails, is terminated, is killed; then the pipeline goes on


def test_failed_stage_is_marked(interruptions):
    assert interruptions["failed"] == {"child": "FAILED", "parent": "FAILED"}


def test_terminated_stage_is_marked(interruptions):
    assert interruptions["SIGTERM"] == {"child": "KILLED", "parent": "KILLED"}


def test_killed_stage_cannot_mark_itself(interruptions):
    assert interruptions["SIGKILL"]["child"] == "RUNNING"


def test_next_repro_goes_on_and_completes_the_same_parent(elsewhere, other_store, interruptions):
    # In a clone that repeats dvc.lock DVC may or may not find something for `track`.
    assert interruptions["stages run"] in (["train", "evaluate", "track"], ["train", "evaluate"])
    tracked = "track" in interruptions["stages run"]
    (parent,) = other_store.parents()
    require_complete(elsewhere, other_store, parent, STAGES, tracked=tracked)
    attempts = {
        name: [run.info.status for run in other_store.children(parent) if run.info.run_name == name] for name in STAGES
    }
    once = ["FINISHED"]
    assert attempts == dict.fromkeys(STAGES, once) | {
        "preprocess": ["FAILED", "FINISHED"],
        "train": ["KILLED", "KILLED", "FINISHED"],
        "track": once if tracked else [],
    }


def test_parent_of_a_fresh_clone_that_repeats_dvc_lock_has_the_same_numbers(elsewhere, other_store, finished):
    assert elsewhere.out_hashes() == finished.out_hashes()
    (parent,), (original,) = other_store.parents(), finished.store().parents()
    assert {k: parent.data.metrics[k] for k in TEST_METRICS} == {k: original.data.metrics[k] for k in TEST_METRICS}
    assert {name for name in parent.data.metrics if name.endswith("seconds")} >= {
        f"{stage}.seconds" for stage in STAGES[:-1]
    }


# Stages that run alone


def test_folders_and_files_are_hashed_as_dvc_does(finished, tmp_path):
    entries = [
        entry for stage in finished.lock().values() for kind in ("deps", "outs") for entry in stage.get(kind, [])
    ]
    assert sum(entry["md5"].endswith(".dir") for entry in entries) > 5
    hashes = {entry["path"]: entry["md5"] for entry in entries}
    assert {path: dvc_hash(finished.root / path) for path in hashes} == hashes
    # What the interpreter leaves does not count.
    shutil.copytree(finished.root / "stages", tmp_path / "stages")
    (tmp_path / "stages/__pycache__").mkdir(exist_ok=True)
    (tmp_path / "stages/__pycache__/train.cpython-311.pyc").touch()
    assert dvc_hash(tmp_path / "stages") == hashes["stages"]


def lose(project, out):
    """Removes an output, from DVC's cache as well."""
    digest = project.out_hashes()[out]
    (project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    (project.root / out).unlink()


def test_a_stage_that_mends_what_was_lost_has_a_complete_parent(make_copy):
    project = make_copy()
    lose(project, "data/raw.zip")
    assert project.repro() == ["download"]  # it came out as before, and DVC skips what follows
    _, parent = project.store().parents()
    require_complete(project, project.store(), parent, ("download",), tracked=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda project: project.set_params({"tune.trials": 71}),
        lambda project: (project.root / "src/catdog/split.py").open("a").write("\n"),
        lambda project: (project.root / "data/raw.zip").open("ab").write(b" "),
        lambda project: (project.root / "reports/train.json").unlink(),
        lambda project: lose(project, "models/model.keras"),
        lambda project: shutil.rmtree(project.root / ".dvc/cache"),
        lambda project: (project.root / "dvc.lock").unlink(),
    ],
    ids=["parameters", "code", "own output", "later output", "later output, in the cache too", "cache", "dvc.lock"],
)
def test_more_follows_where_anything_changed(make_copy, monkeypatch, change):
    project = make_copy()
    for name in [name for name in os.environ if name.startswith("DVC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", project.environment()["DVC_SITE_CACHE_DIR"])
    monkeypatch.chdir(project.root)
    assert nothing_follows("download")
    change(project)
    assert not nothing_follows("download")


def test_parent_of_a_part_of_the_pipeline_waits_for_the_rest(make_copy):
    project = make_copy()
    store = project.store()
    project.set_params({"download.sample_images": 12})
    assert stages_run(project.dvc("repro", "download").stdout) == ["download"]
    *_, parent = store.parents()
    assert parent.info.status == "SCHEDULED"
    assert [run.info.status for run in store.children(parent)] == ["FINISHED"]
    project.set_params({"download.sample_images": 10})
    assert stages_run(project.dvc("repro", "download").stdout) == ["download"]
    assert store.client.get_run(parent.info.run_id).info.status == "KILLED"


# Changed parameters, in every way of running


def test_repro_after_a_change_has_a_parent_of_its_own(experiments):
    first, second, *_ = experiments.store().parents()
    assert second.info.run_name.startswith("repro-")
    assert second.info.run_name != first.info.run_name
    require_complete(experiments, experiments.store(), second, ("evaluate", "track"), params={"evaluate.gallery": "9"})


def test_cached_stages_keep_the_numbers_of_the_run_that_did_the_work(experiments):
    store = experiments.store()
    first, second, *_ = store.parents()
    original = {run.info.run_name: run for run in store.children(first)}
    for run in store.children(second):
        name, cached, _ = run.info.run_name.partition(" (cached)")
        if cached:
            assert run.data.metrics == original[name].data.metrics
            assert run.data.tags["pipeline.cached_from"] == original[name].info.run_id
    assert second.data.metrics["embed.images_per_second"] == first.data.metrics["embed.images_per_second"]


@pytest.mark.parametrize(
    ("name", "live", "params"),
    [
        ("vgg16", ("embed", "train", "evaluate", "track"), {"backbone": "vgg16"}),
        ("calm", ("train", "evaluate", "track"), {"train.learning_rate": "0.001"}),
        ("again", ("track",), {"backbone": "vgg16"}),
        ("gallery", ("track",), {"evaluate.gallery": "9"}),
    ],
    ids=["queue, first worker", "queue, second worker", "temporary folder, all cached", "workspace, all cached"],
)
def test_experiment_has_one_complete_parent_of_its_name(experiments, name, live, params):
    parent = experiments.store().parent_named(name)
    require_complete(experiments, experiments.store(), parent, live, params=params)
    for run in (parent, *experiments.store().children(parent)):
        assert run.data.tags["dvc.exp_name"] == name
        assert run.data.tags["mlflow.source.git.commit"] == experiments.git("rev-parse", "HEAD")


def test_no_experiment_leaves_a_run_too_many(experiments):
    store = experiments.store()
    assert [run.info.run_name for run in store.parents()][2:] in (
        ["vgg16", "calm", "again", "gallery"],
        ["calm", "vgg16", "again", "gallery"],  # the two workers start as they please
    )
    assert {run.info.status for run in store.runs()} == {"FINISHED"}


def test_experiment_from_the_cache_has_the_numbers_of_the_first(experiments):
    first, again = (experiments.store().parent_named(name).data.metrics for name in ("vgg16", "again"))
    own = {"track.seconds", "track.peak_memory_mb"}
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in again.items() if k not in own}


# An experiment that is run again under its name


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """Runs a stage of the experiment `foo` in this process, with parameters of its own; gives the store."""
    for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0" * 40)

    def attempt(name, *, rate, mistake=None, meanwhile=None, root=tmp_path, experiment="foo"):
        monkeypatch.setenv("DVC_ROOT", str(root))
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        monkeypatch.chdir(root)
        shutil.copy(REPOSITORY / "dvc.yaml", root)
        tree = YAML().load(REPOSITORY / "params.yaml")
        tree["train"]["learning_rate"] = rate
        YAML().dump(tree, root / "params.yaml")
        with contextlib.suppress(SystemExit), stage_run(name):
            if meanwhile:
                meanwhile()
            if mistake:
                raise CatdogError(mistake)
        return Store(tracking.store_uri(root))

    return attempt


def parents_of_attempts(store):
    """The learning rate and the status of each parent, and the stages in it, oldest first."""
    return [
        (
            run.data.params.get("train.learning_rate"),
            run.info.status,
            [child.info.run_name for child in store.children(run)],
        )
        for run in store.parents()
    ]


def test_experiment_that_failed_has_another_parent_for_other_parameters(attempt, capsys):
    attempt("preprocess", rate=5)
    attempt("embed", rate=5, mistake="the training diverged")
    attempt("embed", rate=0.001)
    assert capsys.readouterr().err == "catdog embed: the training diverged\n"
    store = attempt("train", rate=0.001)
    assert parents_of_attempts(store) == [
        ("5.0", "FAILED", ["preprocess", "embed"]),
        ("0.001", "SCHEDULED", ["embed", "train"]),
    ]
    assert {run.info.run_name for run in store.parents()} == {"foo"}


def test_experiment_goes_on_with_the_parent_of_its_parameters(attempt):
    attempt("embed", rate=5, mistake="the training diverged")
    attempt("embed", rate=0.001, mistake="stopped")
    assert parents_of_attempts(attempt("embed", rate=5)) == [
        ("5.0", "SCHEDULED", ["embed", "embed"]),
        ("0.001", "FAILED", ["embed"]),
    ]


def test_experiment_left_going_on_with_other_parameters_is_killed(attempt):
    attempt("preprocess", rate=5)
    assert parents_of_attempts(attempt("preprocess", rate=0.001)) == [
        ("5.0", "KILLED", ["preprocess"]),
        ("0.001", "SCHEDULED", ["preprocess"]),
    ]


def test_two_experiments_of_one_name_at_once_keep_apart(attempt):
    # As two `dvc exp run --temp -n foo` do: the stages of the second one come between those of the first.
    attempt("preprocess", rate=5, meanwhile=lambda: attempt("preprocess", rate=0.001))
    attempt("embed", rate=0.001, meanwhile=lambda: attempt("embed", rate=5))
    assert parents_of_attempts(attempt("train", rate=5)) == [
        ("5.0", "SCHEDULED", ["preprocess", "embed", "train"]),
        ("0.001", "SCHEDULED", ["preprocess", "embed"]),
    ]


def test_parent_of_a_mistake_in_the_parameters_is_that_of_the_mended_ones(attempt):
    attempt("train", rate="fast")
    assert parents_of_attempts(attempt("train", rate=0.001)) == [("0.001", "SCHEDULED", ["train", "train"])]


# The store


def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(attempt, capsys, monkeypatch, tmp_path):
    store = attempt("embed", rate=1)
    (child,) = store.runs_of("embed")
    store.client.delete_experiment(child.info.experiment_id)
    attempt("embed", rate=1)
    told = capsys.readouterr().err
    assert told == (
        "catdog embed: the MLflow experiment catdog was deleted; "
        f"`MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db mlflow experiments restore --experiment-id "
        f"{child.info.experiment_id}` restores it, or set MLFLOW_EXPERIMENT_NAME to another name, or set "
        "tracking.required to false to work without it\n"
    )
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    attempt("embed", rate=1)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    # The command works as it is told, from anywhere.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(told.split("`")[1], shell=True, cwd="/", env=os.environ | {"PATH": path}, check=True)
    attempt("embed", rate=1)
    assert parents_of_attempts(store) == [("1.0", "SCHEDULED", ["embed", "embed"])]


@pytest.mark.parametrize("name", ["it's", "a%20b", 'q?x #"\\'])
def test_any_folder_can_hold_the_repository(attempt, tmp_path, monkeypatch, name):
    root = tmp_path / name
    root.mkdir()
    attempt("embed", rate=1, root=root, experiment="all'", mistake="stopped")
    store = attempt("embed", rate=1, root=root, experiment="all'")
    assert parents_of_attempts(store) == [("1.0", "SCHEDULED", ["embed", "embed"])]
    assert store.parents()[0].data.tags["pipeline.key"] == tracking.experiment_key(root, "0" * 40, "all'")
    monkeypatch.delenv("DVC_EXP_NAME")
    for page in ("src", "stages"):
        (root / page).mkdir()
        with contextlib.suppress(SystemExit), stage_run("embed"):
            (root / page / "new.py").touch()  # the code is edited under it
    assert [run.info.status for run in store.parents()] == ["SCHEDULED", "KILLED", "SCHEDULED"]
    assert artifact(store.parents()[0], "") == root / "mlruns" / store.parents()[0].info.run_id / "artifacts"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in root.glob("*mlflow*")) == ["mlflow.db"]
    assert (root / ".dvc/tmp/mlflow.lock").exists()
    assert tracking.database_path(tracking.store_uri(root)) == root / "mlflow.db"
    failed, _ = store.children(store.parents()[0])
    store.client.delete_run(failed.info.run_id)
    housekeeping.remove(root, housekeeping.find_runs(root, days=0))
    with pytest.raises(MlflowException, match="not found"):
        store.client.get_run(failed.info.run_id)


@pytest.mark.parametrize(
    ("uri", "path", "used"),
    [
        ("", "/a b/mlflow.db", "sqlite:////a b/mlflow.db"),
        ("sqlite:///runs/my%20db?timeout=9", "/a b/runs/my db", "sqlite:////a b/runs/my db?timeout=9"),
        ("sqlite:////c%3Fd/mlflow.db", "/c?d/mlflow.db", "sqlite:////c%3Fd/mlflow.db"),
        ("sqlite+pysqlite:///e%3Ff", "/a b/e?f", "sqlite+pysqlite:////a b/e%3Ff"),
        ("postgresql://host/a", None, "postgresql://host/a"),
    ],
)
def test_a_database_is_where_sqlalchemy_decodes_it(monkeypatch, uri, path, used):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.store_uri(Path("/a b")) == used
    assert tracking.database_path(used) == (path and Path(path))
    if path:
        assert make_url(used).database == path


@pytest.mark.parametrize(
    "uri", ["http://[bad", "http://localhost:abc", "http://me:se/cret@host", "postgresql://me:se/cret@host:5432/db"]
)
def test_what_is_no_address_is_told_without_its_password(monkeypatch, tmp_path, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(tracking.StoreError, match="MLFLOW_TRACKING_URI is no address") as caught:
        tracking.connect(tmp_path)
    assert "cret" not in str(caught.value)


def test_databricks_needs_no_port(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks://scope:prefix")
    assert tracking.store_uri(Path("/")) == "databricks://scope:prefix"


CONNECT = """
import sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from catdog.tracking import connect

deadline = time.monotonic() + 300
me, rounds = sys.argv[1], [Path(name) for name in sys.argv[2:]]
for root in rounds:
    (root / me).touch()
    while len(list(root.glob("process-*"))) < 2:  # the other one is as far
        assert time.monotonic() < deadline, "the other process has gone"
        time.sleep(0.001)
    client = connect(root)
    experiment = client.get_experiment_by_name("catdog")
    client.set_terminated(client.create_run(experiment.experiment_id).info.run_id)
"""


def test_two_pipelines_may_create_the_store_at_once(finished, tmp_path):
    rounds = [tmp_path / str(number) for number in range(3)]
    for root in rounds:
        root.mkdir()
    project = replace(finished, warm=True)
    started = [project.start("python", "-c", CONNECT, f"process-{n}", *rounds, PYTHONPATH="src") for n in range(2)]
    complaints = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "".join(complaints)
