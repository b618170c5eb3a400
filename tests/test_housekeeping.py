"""`catdog clean`: it finds what can go and nothing else, shows it first, and removes it only when told to."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from catdog import cli, housekeeping, paths, tracking
from catdog.errors import CatdogError
from catdog.housekeeping import (
    artifact_path,
    find_all,
    find_artifacts,
    find_checkpoints,
    find_downloads,
    find_experiments,
    find_runs,
    is_dvc,
    is_locked,
    lock_entries,
    pipelines_at_work,
    remove,
    size_text,
)
from conftest import wait_until

DAY = 24 * 3600
OLD = time.time() - 30 * DAY
KEYS = ["a" * 32, "b" * 32, "c" * 32]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A tracking store without runs; making one takes seconds."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.setenv(name, "")  # so that what MLflow itself writes there is removed at the end
            patch.delenv(name)
        tracking.connect(root)
    return root


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty git repository with DVC."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.setenv(name, "")  # so that what MLflow itself writes there is removed at the end
        monkeypatch.delenv(name)
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "2")
    for number, (key, value) in enumerate({"user.name": "Test", "user.email": "test@example.org"}.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    git("init", "--quiet", "--initial-branch=main")
    (root / ".dvc" / "tmp").mkdir(parents=True)
    (root / ".dvc" / "config").touch()
    (root / ".dvc" / ".gitignore").write_text("/tmp\n")
    git("add", ".dvc")
    git("commit", "--quiet", "--message", "start")
    return root


@pytest.fixture
def client(root, empty_store):
    """A client of the repository's own store, which is empty."""
    shutil.copy(empty_store / "mlflow.db", root / "mlflow.db")
    sql(root, "UPDATE experiments SET artifact_location = ? WHERE name = 'catdog'", (root / "mlruns").as_uri())
    return tracking.connect(root)


def git(*arguments, **environment):
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, env=os.environ | environment)
    return done.stdout.strip()


def sql(root, statement, *values):
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        return store.execute(statement, values).fetchall()


def folder(path, *, written, size=1000):
    """A folder with a file below it, last written at a time."""
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").write_bytes(bytes(size))
    for entry in (path / "below" / "file", path / "below", path):
        os.utime(entry, (written, written))
    return path


def names(items):
    return [item.name for item in items]


def snapshot(root):
    """Every file and link below, git's own left out, and what is in it; a database as its statements."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink() or name.startswith(".git/"):
            continue
        if name == "mlflow.db":
            with contextlib.closing(sqlite3.connect(path)) as store:
                found[name] = hashlib.sha256("".join(store.iterdump()).encode()).hexdigest()
        elif path.is_file():
            found[name] = path.read_bytes()
    return found | {"refs": git("for-each-ref")}


# Checkpoints


@pytest.mark.parametrize("parent", [paths.CHECKPOINTS, paths.TUNING_SEARCHES, paths.TUNING_FEATURES], ids=str)
def test_old_checkpoints_go_and_their_lock_with_them(root, parent):
    old = folder(root / parent / KEYS[0], written=OLD, size=1234)
    old.with_name(f"{KEYS[0]}.lock").touch()
    young = folder(root / parent / KEYS[1], written=time.time() - 10 * DAY)
    (item,) = find_checkpoints(root)
    assert (item.name, item.bytes, item.kind) == (f"{parent}/{KEYS[0]}", 1234, "checkpoints")
    assert "30 days ago" in item.reason
    remove(root, [item])
    assert sorted((root / parent).iterdir()) == [young]
    assert names(find_checkpoints(root, days=9)) == [f"{parent}/{KEYS[1]}"]


def test_one_young_file_keeps_an_old_folder(root):
    old = folder(root / paths.CHECKPOINTS / KEYS[0], written=OLD)
    os.utime(old / "below" / "file")
    assert find_checkpoints(root) == []


def test_checkpoints_in_use_stay(root):
    used = folder(root / paths.CHECKPOINTS / KEYS[0], written=OLD)
    with FileLock(used.with_name(f"{KEYS[0]}.lock")):
        assert find_checkpoints(root) == []
    assert names(find_checkpoints(root)) == [f"{paths.CHECKPOINTS}/{KEYS[0]}"]


def test_checkpoints_taken_up_after_they_were_shown_stay(root):
    used = folder(root / paths.CHECKPOINTS / KEYS[0], written=OLD)
    items = find_checkpoints(root)
    with FileLock(used.with_name(f"{KEYS[0]}.lock")):
        remove(root, items)
        assert (used / "below" / "file").exists()
    remove(root, items)
    assert list((root / paths.CHECKPOINTS).iterdir()) == []


def test_a_lock_without_checkpoints_goes(root):
    (root / paths.CHECKPOINTS).mkdir()
    lock = root / paths.CHECKPOINTS / f"{KEYS[0]}.lock"
    lock.touch()
    assert find_checkpoints(root) == []
    os.utime(lock, (OLD, OLD))
    remove(root, find_checkpoints(root))
    assert not lock.exists()


def test_old_downloads_go_whole_and_young_ones_stay(root):
    place = root / paths.DOWNLOADS
    place.mkdir(parents=True)
    written = {"one.part": OLD, "one.json": OLD, "one.lock": OLD, "two.part": time.time(), "two.json": OLD}
    for name, seconds in written.items():
        (place / name).write_bytes(b"12")
        os.utime(place / name, (seconds, seconds))
    folder(place / "kaggle", written=OLD, size=7)
    items = find_downloads(root)
    assert names(items) == [f"{paths.DOWNLOADS}/{name}" for name in ("kaggle", "one.json", "one.part")]
    assert {(item.kind, item.bytes) for item in items} == {("downloads", 7), ("downloads", 2)}
    assert "left by a download, last written 30 days ago" in items[0].reason
    with FileLock(place / "one.lock"):
        assert names(find_downloads(root)) == [f"{paths.DOWNLOADS}/kaggle"]
        remove(root, items)
        assert sorted(path.name for path in place.iterdir()) == sorted(written)
    remove(root, items)
    assert sorted(path.name for path in place.iterdir()) == ["two.json", "two.part"]


def test_links_out_of_the_repository_are_not_followed(root, tmp_path):
    outside = folder(tmp_path / "outside" / KEYS[0], written=OLD)
    (root / paths.CHECKPOINTS).mkdir()
    (root / paths.CHECKPOINTS / KEYS[0]).symlink_to(outside)
    inside = folder(root / paths.CHECKPOINTS / KEYS[1], written=OLD)
    (inside / "link").symlink_to(outside)
    os.utime(inside / "link", (OLD, OLD), follow_symlinks=False)
    os.utime(inside, (OLD, OLD))
    (root / paths.TUNING_SEARCHES).symlink_to(outside.parent)
    items = find_checkpoints(root)
    assert names(items) == [f"{paths.CHECKPOINTS}/{KEYS[1]}"]
    remove(root, items)
    assert not inside.exists()
    assert (outside / "below" / "file").exists()


# Runs


class Runs:
    """Makes runs as a pipeline leaves them, of any age."""

    def __init__(self, root, client):
        self.root, self.client = root, client
        self.experiment = client.get_experiment_by_name("catdog").experiment_id

    def make(self, name, *, parent=None, status="FINISHED", days=30.0, deleted=None, experiment=None):
        tags = {"mlflow.parentRunId": parent} if parent else {}
        run_id = self.client.create_run(experiment or self.experiment, tags=tags, run_name=name).info.run_id
        self.client.log_dict(run_id, {"a": 1}, "file.json")
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        started = int((time.time() - days * DAY) * 1000)
        sql(self.root, "UPDATE runs SET start_time = ? WHERE run_uuid = ?", started, run_id)
        if deleted is not None:
            self.client.delete_run(run_id)
            moment = int((time.time() - deleted * DAY) * 1000)
            sql(self.root, "UPDATE runs SET deleted_time = ? WHERE run_uuid = ?", moment, run_id)
        return run_id

    def model(self, run_id):
        model = self.client.create_logged_model(self.experiment, name="model", source_run_id=run_id)
        folder(self.root / "mlruns" / "models" / model.model_id, written=OLD)
        return model.model_id

    def left(self):
        return {name for (name,) in sql(self.root, "SELECT name FROM runs")}


@pytest.fixture
def runs(root, client):
    return Runs(root, client)


def found_runs(root, days=14.0):
    """What is found, by the first word of each action and the name without the id."""
    return sorted((item.action, item.name.rpartition(" ")[0]) for item in find_runs(root, days=days))


def test_nothing_is_found_in_a_healthy_store(root, runs):
    parent = runs.make("whole")
    runs.make("train", parent=parent)
    runs.model(parent)
    runs.make("failed", status="FAILED")
    assert find_runs(root, days=0) == []


def test_deleted_runs_go_with_their_children_models_and_files(root, runs):
    parent = runs.make("parent", deleted=20)
    child = runs.make("child", parent=parent)
    grandchild = runs.make("grandchild", parent=child)
    runs.make("lost", parent="0" * 32)
    model = runs.model(grandchild)
    kept = runs.make("kept")
    runs.make("kept child", parent=kept)
    kept_model = runs.model(kept)
    recent = runs.make("recently deleted", deleted=2)
    runs.make("child of the recent", parent=recent)

    assert found_runs(root) == [
        ("model", "model model"),
        ("run", "run child"),
        ("run", "run grandchild"),
        ("run", "run lost"),
        ("run", "run parent"),
    ]
    remove(root, find_runs(root))
    assert runs.left() == {"kept", "kept child", "recently deleted", "child of the recent"}
    assert sql(root, "SELECT model_id FROM logged_models") == [(kept_model,)]
    assert not (root / "mlruns" / parent).exists()
    assert not (root / "mlruns" / "models" / model).exists()
    assert (root / "mlruns" / kept / "artifacts" / "file.json").exists()
    assert (root / "mlruns" / "models" / kept_model / "below" / "file").exists()
    assert find_runs(root) == []
    assert found_runs(root, days=1) == [("run", "run child of the recent"), ("run", "run recently deleted")]


def test_the_bytes_are_those_of_the_files(root, runs):
    run_id = runs.make("deleted", deleted=20)
    (root / "mlruns" / run_id / "artifacts" / "more.bin").write_bytes(bytes(5000))
    (item,) = find_runs(root)
    assert item.bytes == 5000 + (root / "mlruns" / run_id / "artifacts" / "file.json").stat().st_size


def test_a_run_or_model_of_mlflows_registry_stays(root, runs):
    by_run, by_model, neither = (runs.make(name, deleted=20) for name in ("by run", "by model", "neither"))
    models = {run_id: runs.model(run_id) for run_id in (by_run, by_model, neither)}
    runs.client.create_registered_model("pets")
    runs.client.create_model_version("pets", source=(root / "mlruns" / by_run).as_uri(), run_id=by_run)
    runs.client.create_model_version("pets", source=(root / "mlruns" / "models" / models[by_model]).as_uri())
    found = {item.target for item in find_runs(root)}
    # The run of the second model may go: the model is what the registry names.
    assert found == {by_model, neither, models[neither]}


def test_runs_that_killed_processes_left_running_become_killed(root, runs):
    hung = runs.make("hung", status="RUNNING", days=2)
    between = runs.make("between stages", status="RUNNING", days=2)
    runs.client.update_run(between, status="SCHEDULED")
    alive = runs.make("alive", status="RUNNING", days=0.5)
    for days in (0.0, 14.0):
        assert found_runs(root, days=days) == [("end", "run between stages"), ("end", "run hung")]
    remove(root, find_runs(root))
    assert {runs.client.get_run(run_id).info.status for run_id in (hung, between)} == {"KILLED"}
    assert runs.client.get_run(hung).info.end_time >= (time.time() - 60) * 1000
    assert runs.client.get_run(alive).info.status == "RUNNING"
    assert (root / "mlruns" / hung / "artifacts" / "file.json").exists()


def test_a_running_run_stays_even_where_its_parent_is_deleted(root, runs):
    parent = runs.make("parent", deleted=20)
    runs.make("alive", parent=parent, status="RUNNING", days=0.5)
    runs.make("deleted alive", status="RUNNING", days=0.5, deleted=0.1)
    runs.make("dead", parent=parent, status="RUNNING", days=3)
    assert found_runs(root, days=0) == [("run", "run dead"), ("run", "run parent")]


def test_running_runs_stay_while_a_pipeline_is_at_work(root, runs):
    runs.make("long", status="RUNNING", days=3)
    with subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE) as dvc:
        wait_until(lambda: is_dvc(dvc.pid))  # its command line is there a moment after it
        for place in (".dvc/tmp/rwlock", ".dvc/tmp/exps/tmpabc/.dvc/tmp/rwlock"):
            lock = root / place
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.write_text(json.dumps({"write": {}, "read": {"x": [{"pid": dvc.pid, "cmd": "dvc repro"}]}}))
            assert pipelines_at_work(root) == [dvc.pid]
            assert find_runs(root) == []
            lock.unlink()
        (root / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {"x": {"pid": dvc.pid, "cmd": "dvc repro"}}}))
        assert find_runs(root) == []
        dvc.communicate(b"\n")
    assert found_runs(root) == [("end", "run long")]
    (root / paths.CHECKPOINTS).mkdir()
    with FileLock(root / paths.CHECKPOINTS / f"{KEYS[0]}.lock"):
        assert find_runs(root) == []


def test_artifacts_that_no_run_has_go(root, runs):
    known = runs.make("known")
    model = runs.model(known)
    os.utime(root / "mlruns" / known, (OLD, OLD))
    lost = folder(root / "mlruns" / KEYS[0], written=OLD, size=700)
    lost_model = folder(root / "mlruns" / "models" / f"m-{KEYS[0]}", written=OLD)
    stays = [
        folder(root / "mlruns" / KEYS[1], written=time.time() - 2 * DAY),
        folder(root / "mlruns" / "0" / KEYS[0], written=OLD),  # of another experiment or store
        folder(root / "mlruns" / "my-notes", written=OLD),
        root / "mlruns" / known,
        root / "mlruns" / "models" / model,
    ]
    items = find_artifacts(root)
    assert [(item.name, item.bytes) for item in items] == [
        (f"mlruns/{KEYS[0]}", 700),
        (f"mlruns/models/m-{KEYS[0]}", 1000),
    ]
    remove(root, items)
    assert not lost.exists()
    assert not lost_model.exists()
    assert all(path.exists() for path in stays)
    assert names(find_artifacts(root, days=1)) == [f"mlruns/{KEYS[1]}"]
    os.utime(stays[0] / "below" / "file")
    assert find_artifacts(root, days=0) == []  # it may be on its way into the store


def test_artifacts_of_another_store_stay(root, runs, monkeypatch):
    """One that MLFLOW_TRACKING_URI names, now or at some other time, may keep its artifacts beside the own ones."""
    folder(root / "mlruns" / KEYS[0], written=OLD)
    shutil.copy(root / "mlflow.db", root / "team.sqlite")
    assert len(find_artifacts(root)) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://server/runs")
    assert find_artifacts(root) == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with contextlib.closing(sqlite3.connect(root / "team.sqlite")) as store, store:
        store.execute("INSERT INTO runs (run_uuid, lifecycle_stage, status) VALUES (?, 'active', 'FINISHED')", KEYS[:1])
    assert find_artifacts(root) == []


def test_artifacts_that_a_server_may_know_go_only_by_their_name(root, runs, capsys):
    """Nothing here tells of a database on a server that was in use before."""
    theirs = folder(root / "mlruns" / KEYS[0], written=OLD)
    runs.make("deleted", deleted=20)
    assert cli.main(["clean"]) == 0
    shown = capsys.readouterr().out
    assert f"  mlruns/{KEYS[0]}     1.0 kB  no run in mlflow.db has them, last written 30 days ago\n" in shown
    assert "nothing is removed yet: `catdog clean --runs --yes` does it\n" in shown
    assert shown.splitlines()[-1].startswith("the artifacts may be those of another tracking store")
    assert cli.main(["clean", "--checkpoints", "--runs", "--experiments", "--yes"]) == 0
    assert theirs.exists() and find_runs(root) == []
    capsys.readouterr()
    assert cli.main(["clean", "--artifacts"]) == 0
    assert "nothing is removed yet: `catdog clean --artifacts --yes` does it\n" in capsys.readouterr().out
    assert theirs.exists()
    assert cli.main(["clean", "--artifacts", "--yes"]) == 0
    assert not theirs.exists()


def test_without_a_store_no_artifacts_go(root):
    folder(root / "mlruns" / KEYS[0], written=OLD)
    assert find_artifacts(root, days=0) == []


def test_runs_of_other_experiments_are_not_touched(root, runs):
    other = runs.client.create_experiment("mine", artifact_location=(root / "mlruns").as_uri())
    runs.make("deleted", experiment=other, deleted=20)
    runs.make("hung", experiment=other, status="RUNNING")
    assert find_runs(root, days=0) == []


def test_artifacts_outside_the_repository_are_not_touched(root, runs, tmp_path, capsys):
    run_id = runs.make("deleted", deleted=20)
    outside = folder(tmp_path / "other" / "mlruns" / run_id / "artifacts", written=OLD)
    sql(root, "UPDATE runs SET artifact_uri = ?", outside.as_uri())
    assert names(find_runs(root)) == []
    assert cli.main(["clean"]) == 0
    assert "1 run keeps its artifacts outside this repository's mlruns/" in capsys.readouterr().out
    for whole in (root / "mlruns", root / "mlruns" / "artifacts", root):
        sql(root, "UPDATE runs SET artifact_uri = ?", whole.as_uri())
        assert names(find_runs(root)) == []
    # Where mlruns/ is a link to another disk, likewise.
    sql(root, "UPDATE runs SET artifact_uri = ?", (root / "mlruns" / run_id / "artifacts").as_uri())
    assert len(find_runs(root)) == 1
    (root / "mlruns").rename(tmp_path / "elsewhere")
    (root / "mlruns").symlink_to(tmp_path / "elsewhere")
    assert find_runs(root) == []


def test_a_file_that_is_no_store_is_told(root, capsys):
    (root / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(CatdogError, match=r"mlflow\.db cannot be read \(file is not a database\); `catdog doctor`"):
        find_runs(root)
    assert cli.main(["clean", "--runs"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("file:///a/b%20c/artifacts", "/a/b c/artifacts"),
        ("file://localhost/a", "/a"),
        ("/a/b%20c", "/a/b%20c"),
        ("s3://bucket/a", None),
        ("mlflow-artifacts:/1/a", None),
        ("file://server/a", None),
        ("mlruns/1", None),
    ],
)
def test_only_local_locations_have_a_path(location, path):
    assert artifact_path(location) == (Path(path) if path else None)


# DVC experiments


def experiment(name, baseline, days):
    """The reference and commit that `dvc exp run` leaves."""
    then = f"{int(time.time() - days * DAY)} +0000"
    commit = git("commit-tree", "-m", name, "HEAD^{tree}", GIT_COMMITTER_DATE=then, GIT_AUTHOR_DATE=then)
    ref = f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"
    git("update-ref", ref, commit)
    return ref


def test_old_experiments_go_with_dvcs_own_command(root):
    head = git("rev-parse", "HEAD")
    old = experiment("tardy-unit", head, 20)
    young = experiment("quick-unit", head, 5)
    same_name = experiment("tardy-unit", "f" * 40, 40)
    git("update-ref", "refs/exps/exec/EXEC_HEAD", old)
    git("tag", "tardy-unit", old)
    items = find_experiments(root)
    assert [(item.name, item.target) for item in items] == [
        ("tardy-unit on fffffff", same_name),
        (f"tardy-unit on {head[:7]}", old),
    ]
    remove(root, items)
    refs = git("for-each-ref", "--format=%(refname)").splitlines()
    assert [ref for ref in refs if ref.startswith("refs/exps/") and "/exec/" not in ref] == [young]
    assert {"refs/heads/main", "refs/tags/tardy-unit"} <= set(refs)


def test_an_experiment_that_dvc_cannot_remove_is_told(root):
    ref = experiment("tardy-unit", git("rev-parse", "HEAD"), 20)
    items = find_experiments(root)
    (root / ".dvc" / "config").write_text("[nonsense\n")
    with pytest.raises(CatdogError, match=r"`dvc exp remove` failed \(.+\); `dvc exp list"):
        remove(root, items)
    assert git("for-each-ref", ref)


# The command


@pytest.fixture
def littered(root, runs):
    """Something of each kind, old and young."""
    folder(root / paths.CHECKPOINTS / KEYS[0], written=OLD, size=2_000_000)
    folder(root / paths.CHECKPOINTS / KEYS[1], written=time.time())
    folder(root / paths.DOWNLOADS / "kaggle", written=OLD)
    runs.make("deleted", deleted=20)
    runs.make("hung", status="RUNNING", days=2)
    runs.make("good")
    experiment("tardy-unit", git("rev-parse", "HEAD"), 20)
    folder(root / "mlruns" / KEYS[0], written=OLD)
    return root


def test_without_yes_nothing_changes_and_the_command_is_told(littered, capsys):
    before = snapshot(littered)
    for options in ([], [f"--{kind}" for kind in housekeeping.KINDS]):
        assert cli.main(["clean", *options]) == 0
        shown = capsys.readouterr().out
        assert f"  .dvc/tmp/checkpoints/{KEYS[0]}     2.0 MB  left by a training" in shown
        assert "deleted in MLflow 20 days ago" in shown
        assert "RUNNING since 2 days, but by no process; becomes KILLED" in shown
        assert "tardy-unit on " in shown
        assert "6 entries, 2.0 MB; nothing is removed yet: " in shown
        asked = " --artifacts" if options else ""
        assert f"`catdog clean --checkpoints --downloads --runs --experiments{asked} --yes` does it" in shown
    assert snapshot(littered) == before
    assert cli.main(["clean", "--older-than", "19.5"]) == 0
    assert "--older-than 19.5 --yes` does it" in capsys.readouterr().out


def test_yes_alone_removes_nothing(littered, capsys):
    before = snapshot(littered)
    assert cli.main(["clean", "--yes"]) == 2
    told = capsys.readouterr()
    assert told.err == (
        "catdog: --yes removes nothing without a kind: add one or more of --checkpoints, --downloads, --runs, "
        "--experiments, --artifacts\n"
    )
    assert snapshot(littered) == before


@pytest.mark.parametrize("kind", housekeeping.KINDS)
def test_yes_removes_the_kinds_that_are_named(littered, kind, capsys):
    assert cli.main(["clean", f"--{kind}", "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "done: " in shown
    assert ("`dvc gc" in shown) == (kind == "experiments")
    assert {item.kind for item in find_all(littered, housekeeping.KINDS)} == set(housekeeping.KINDS) - {kind}
    assert cli.main(["clean", f"--{kind}", "--yes"]) == 0
    assert capsys.readouterr().out == "nothing to clean\n"


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "two"])
def test_wrong_age_is_told(days, capsys):
    with pytest.raises(SystemExit):
        cli.main(["clean", f"--older-than={days}"])
    assert f"'{days}' is no number of days" in capsys.readouterr().err


def test_outside_a_repository_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["clean"]) == 2
    assert "is not inside the project's git repository" in capsys.readouterr().err


# What is in use


def test_locks_of_processes(root):
    lock = root / "some.lock"
    assert not is_locked(lock)
    lock.touch()
    assert not is_locked(lock)
    with FileLock(lock):
        assert is_locked(lock)
    assert not is_locked(lock)


def test_a_number_that_another_program_has_now_is_not_dvc():
    with subprocess.Popen(["sleep", "60"]) as other:
        assert not is_dvc(other.pid)
        other.kill()
    assert not is_dvc(other.pid)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("{}", []),
        ('{"write": {"a": {"pid": 5, "cmd": "dvc repro"}, "b": {}}}', [{"pid": 5, "cmd": "dvc repro"}]),
        (
            '{"read": {"a": [{"pid": 5, "cmd": "x"}, {"pid": 6, "cmd": "y"}]}}',
            [{"pid": 5, "cmd": "x"}, {"pid": 6, "cmd": "y"}],
        ),
        ("", None),
        ('{"write": {"a": {"pi', None),
        ("[]", None),
        ('{"write": {"a": {"pid": 5}}}', None),
    ],
    ids=["empty", "write", "read", "no byte", "cut off", "a list", "a field missing"],
)
def test_dvcs_file_of_locks(tmp_path, text, entries):
    assert lock_entries(tmp_path / "none") == []
    (tmp_path / "rwlock").write_text(text)
    assert lock_entries(tmp_path / "rwlock") == entries


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes_are_readable(size, text):
    assert size_text(int(size)) == text
