"""`catdog doctor`: every check tells what is so and what to do, and `--fix` repairs a repository that was moved."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from catdog import cli, doctor, paths, tracking
from catdog.backbones import BACKBONES
from catdog.doctor import (
    Finding,
    check_device,
    check_disk,
    check_git,
    check_locations,
    check_locks,
    check_memory,
    check_packages,
    check_pipeline,
    check_programs,
    check_python,
    check_remote,
    check_store,
    check_weights,
    moved_location,
    repair_locations,
    repair_locks,
)
from catdog.errors import CatdogError
from catdog.housekeeping import is_dvc
from conftest import wait_until

REPOSITORY = Path(__file__).parents[1]
RUN = "1" * 32


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty git repository with DVC, and a git that guesses nobody's name."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what MLflow itself writes there is removed at the end
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DVC_", "GIT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "home"))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "home" / "dvc"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    root = tmp_path / "repository"
    (root / ".dvc" / "tmp").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / ".dvc" / ".gitignore").write_text("/tmp\n/cache\n")
    (root / ".gitignore").write_text("/mlflow.db*\n/mlruns\n/out\n")
    monkeypatch.chdir(root)
    git("init", "--quiet", "--initial-branch=main")
    git("config", "user.useConfigOnly", "true")
    commit()
    return root


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def commit():
    git("add", "--all")
    git("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "state")


def only(findings):
    """The only finding, as level and text."""
    (finding,) = findings
    return finding.level, finding.text


def sql(root, statement, *values):
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        return store.execute(statement, values).fetchall()


# A repository that was moved


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A repository with a store that has a run, a model and a registered model, with files."""
    root = tmp_path_factory.mktemp("used") / "first place"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.setenv(name, "")  # so that what MLflow itself writes there is removed at the end
            patch.delenv(name)
        patch.chdir(root)
        client = tracking.connect(root)
    experiment = client.get_experiment_by_name("catdog").experiment_id
    run_id = client.create_run(experiment, run_name="repro-1").info.run_id
    client.log_dict(run_id, {"accuracy": 0.9}, "evaluation/metrics.json")
    client.create_run(experiment, run_name="without files")
    model = client.create_logged_model(experiment, name="model", source_run_id=run_id)
    (root / "mlruns" / "models" / model.model_id / "artifacts").mkdir(parents=True)
    client.create_registered_model("pets")
    client.create_model_version("pets", source=f"{(root / 'mlruns').as_uri()}/{run_id}/artifacts/m", run_id=run_id)
    return root


@pytest.fixture
def moved(root, used):
    """That repository in another place, where its former one is no more (as far as this copy is concerned)."""
    shutil.copytree(used, root, dirs_exist_ok=True)
    for table, column in doctor.LOCATIONS:
        sql(root, f"UPDATE {table} SET {column} = replace({column}, 'first%20place', 'gone%20away')")
        sql(root, f"UPDATE {table} SET {column} = replace({column}, 'first place', 'gone away')")
    return root


def locations(root):
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store:
        return [location for *_, location in doctor._locations(store)]


def test_a_store_where_it_was_made_is_in_order(used):
    before = (used / "mlflow.db").read_bytes()
    assert only(check_locations(used)) == ("ok", "MLflow's artifacts are looked for in mlruns/")
    assert repair_locations(used) == []
    assert (used / "mlflow.db").read_bytes() == before
    assert not list(used.glob("*backup*"))


def test_a_moved_repository_is_found_and_repaired(moved):
    before = locations(moved)
    level, text = only(check_locations(moved))
    assert level == "problem"
    assert "the artifacts of 1 experiment, 2 runs, 1 model, 1 model version are looked for where" in text
    assert "`catdog doctor --fix`" in text

    (told,) = repair_locations(moved)
    assert told == (
        "the artifacts of 2 experiments, 2 runs, 1 model, 1 model version are looked for in mlruns/ "
        "(before: mlflow.db-backup)"
    )
    assert only(check_locations(moved))[0] == "ok"
    here, uri = str(moved / "mlruns"), (moved / "mlruns").as_uri()
    assert all(location.startswith((f"{here}/", uri)) for location in locations(moved))
    assert [new.partition("mlruns")[2] for new in locations(moved)] == [old.partition("mlruns")[2] for old in before]
    assert "%20" not in "".join(locations(moved))

    with contextlib.closing(sqlite3.connect(moved / "mlflow.db-backup")) as backup:
        assert [location for *_, location in doctor._locations(backup)] == before
    assert repair_locations(moved) == []


def test_mlflow_finds_the_files_of_a_repaired_repository(moved):
    from mlflow import MlflowClient

    repair_locations(moved)
    client = MlflowClient(f"sqlite:///{moved / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("catdog")
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'repro-1'")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "evaluation")] == ["evaluation/metrics.json"]
    new = client.create_run(experiment.experiment_id).info
    client.log_dict(new.run_id, {}, "new.json")
    assert (moved / "mlruns" / new.run_id / "artifacts" / "new.json").exists()


def test_a_second_repair_keeps_the_first_backup(moved):
    repair_locations(moved)
    first = (moved / "mlflow.db-backup").read_bytes()
    sql(moved, "UPDATE runs SET artifact_uri = replace(artifact_uri, ?, 'file:///gone')", moved.as_uri())
    (told,) = repair_locations(moved)
    assert "2 runs are looked for in mlruns/ (before: mlflow.db-backup-2)" in told
    assert (moved / "mlflow.db-backup").read_bytes() == first


def test_a_copy_leaves_alone_what_only_the_original_has(root, used):
    """A copy that ran before it was repaired wrote into the original: those files are there, and only there."""
    shutil.copytree(used, root, dirs_exist_ok=True)
    (run_id,) = [name for (name,) in sql(root, "SELECT run_uuid FROM runs WHERE name = 'repro-1'")]
    shutil.rmtree(root / "mlruns" / run_id)
    original = (used / "mlruns" / run_id / "artifacts").as_uri()
    repair_locations(root)
    assert sql(root, "SELECT artifact_uri FROM runs WHERE run_uuid = ?", run_id) == [(original,)]
    level, text = only(check_locations(root))
    assert level == "warning"
    assert text.startswith("1 of MLflow's runs and models keep their artifacts outside the repository, e.g. in ")
    assert str(used / "mlruns" / run_id) in text


def test_a_repair_that_fails_changes_nothing(moved):
    before = locations(moved)
    sql(moved, "CREATE TRIGGER full BEFORE UPDATE ON logged_models BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(CatdogError, match=r"mlflow\.db cannot be repaired \(disk full\); it is as it was"):
        repair_locations(moved)
    assert locations(moved) == before


def test_mlflows_own_empty_experiment_is_no_problem(moved):
    """It lies wherever the first run was started, e.g. in a temporary copy of the repository."""
    repair_locations(moved)
    sql(moved, "UPDATE experiments SET artifact_location = '/gone/mlruns/0' WHERE name = 'Default'")
    assert only(check_locations(moved))[0] == "ok"
    assert len(repair_locations(moved)) == 1
    sql(moved, "UPDATE experiments SET artifact_location = 'file:///gone/mlruns' WHERE name = 'catdog'")
    assert only(check_locations(moved))[0] == "problem"


@pytest.mark.parametrize(
    ("location", "new"),
    [
        (f"file:///old/mlruns/{RUN}/artifacts", f"file:///n%20w/mlruns/{RUN}/artifacts"),
        ("file:///old/mlruns", "file:///n%20w/mlruns"),
        ("/old/mlruns/0", "/n w/mlruns/0"),
        ("/mlruns/project/mlruns/models/m-1/artifacts", "/n w/mlruns/models/m-1/artifacts"),
        ("file:///old/a%20b/mlruns/x%20y", "file:///n%20w/mlruns/x%20y"),
        (f"file:///n%20w/mlruns/{RUN}/artifacts", None),
        ("/n w/mlruns/0", None),
        ("file:///old/results/1", None),
        ("s3://bucket/mlruns/1", None),
        ("mlflow-artifacts:/1/mlruns", None),
        ("models:/m-1", None),
        ("", None),
    ],
)
def test_where_a_location_belongs(location, new):
    assert moved_location(location, Path("/n w")) == new


def test_without_a_store_there_is_nothing_to_repair(root):
    assert check_locations(root) == []
    assert repair_locations(root) == []
    assert not (root / "mlflow.db").exists()


# The tracking store


def test_a_variable_that_holds_no_address_is_a_problem_of_the_store(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[host")
    level, text = only(check_store(root))
    assert (level, text.partition(",")[0]) == ("problem", "MLFLOW_TRACKING_URI is no address")


def test_a_store_is_checked(root, used):
    assert only(check_store(root)) == ("ok", "no tracking store yet; the first run makes mlflow.db")
    assert not (root / "mlflow.db").exists()
    shutil.copy(used / "mlflow.db", root)
    assert only(check_store(root)) == ("ok", "mlflow.db is sound and holds 2 runs")
    sql(root, "UPDATE alembic_version SET version_num = '0123456789ab'")
    level, text = only(check_store(root))
    assert level == "problem"
    assert text.startswith("mlflow.db has the layout 0123456789ab, but MLflow ")
    assert text.endswith(f"`mlflow db upgrade sqlite:///{root / 'mlflow.db'}`")


@pytest.mark.parametrize("damage", ["text", "empty", "cut off"])
def test_a_damaged_store_is_told(root, used, damage):
    whole = (used / "mlflow.db").read_bytes()
    damaged = {"text": b"no database" * 500, "empty": b"", "cut off": whole[: len(whole) // 2]}[damage]
    (root / "mlflow.db").write_bytes(damaged)
    level, text = only(check_store(root))
    assert level == "problem"
    assert "mlflow.db is no sound tracking store (" in text
    assert check_locations(root) in ([], [Finding("ok", "MLflow's artifacts are looked for in mlruns/")])
    assert (root / "mlflow.db").read_bytes() == damaged


def test_the_store_that_the_user_named_is_checked(root, used, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{used / 'mlflow.db'}")
    assert only(check_store(root)) == ("ok", "mlflow.db is sound and holds 2 runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    level, text = only(check_store(root))
    assert level == "problem"
    assert "http://127.0.0.1:9, does not answer (ConnectionError)" in text
    assert "secret" not in text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/x")
    level, text = only(check_store(root))
    assert (level, "secret" in text) == ("ok", False)


# Locks


def test_locks_of_dead_processes_are_found_and_removed(root):
    path = root / ".dvc/tmp/rwlock"
    assert only(check_locks(root)) == ("ok", "no lock is left behind")
    with (
        subprocess.Popen(["sleep", "60"]) as other,
        subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE) as alive,
    ):
        wait_until(lambda: is_dvc(alive.pid))  # its command line is there a moment after it
        there = {"pid": other.pid, "cmd": "dvc repro"}  # the number was a dvc's once
        working = {"pid": alive.pid, "cmd": "dvc repro"}
        locks = {"write": {"out": there, "model": working}, "read": {"data": [there, working], "lone": [there]}}
        path.write_text(json.dumps(locks))
        assert only(check_locks(root)) == ("ok", f"DVC is at work (process {alive.pid})")
        assert len(repair_locks(root)) == 1
        assert json.loads(path.read_text()) == {"write": {"model": working}, "read": {"data": [working]}}
        assert repair_locks(root) == []

        path.write_text(json.dumps({"write": {"out": there}}))
        level, text = only(check_locks(root))
        assert (level, str(other.pid) in text, "`catdog doctor --fix`" in text) == ("warning", True, True)
        other.kill()
        alive.communicate(b"\n")
    repair_locks(root)
    assert only(check_locks(root)) == ("ok", "no lock is left behind")


@pytest.mark.parametrize("text", ["", '{"write": {"a"', '{"write": {"a": {"pid": "x"}}}'])
def test_a_damaged_file_of_locks_is_removed(root, text):
    path = root / ".dvc/tmp/rwlock"
    path.write_text(text)
    level, told = only(check_locks(root))
    assert (level, "rwlock is damaged" in told) == ("problem", True)
    with FileLock(root / ".dvc/tmp/rwlock.lock"):
        assert repair_locks(root) == []  # it may be half written right now
        assert path.exists()
    assert repair_locks(root) == [".dvc/tmp/rwlock was damaged and is removed"]
    assert not path.exists()


def test_a_dvc_that_holds_the_repository_is_at_work(root):
    with FileLock(root / ".dvc/tmp/lock"):
        assert only(check_locks(root)) == ("ok", "DVC is at work")


# The repository


def test_git_is_checked(root, monkeypatch):
    (identity, tree) = check_git(root)
    assert identity.level == "warning"
    assert '`git config --global user.name "..."`' in identity.text
    # With an address git would make a name up from that of the system's user.
    git("config", "--unset", "user.useConfigOnly")
    monkeypatch.setenv("EMAIL", "ada@example.org")
    assert check_git(root)[0] == identity
    assert (tree.level, tree.text) == ("ok", "everything is committed")
    git("config", "user.name", "Ada Lovelace")
    git("config", "user.email", "ada@example.org")
    (root / "new.py").touch()
    (identity, tree) = check_git(root)
    assert (identity.level, identity.text) == ("ok", "git commits as Ada Lovelace <ada@example.org>")
    assert tree.level == "warning"
    assert tree.text.startswith("1 file differs from the last commit (new.py)")


def test_a_merge_under_way_is_a_problem(root):
    git("config", "user.name", "t")
    git("config", "user.email", "t@example.org")
    (root / "file").write_text("base\n")
    commit()
    git("checkout", "--quiet", "-b", "other")
    (root / "file").write_text("theirs\n")
    commit()
    git("checkout", "--quiet", "main")
    (root / "file").write_text("ours\n")
    commit()
    assert subprocess.run(["git", "merge", "other"], capture_output=True, check=False).returncode != 0
    assert [finding.level for finding in check_git(root)] == ["ok", "problem"]


def test_the_pipelines_state_is_dvcs(root):
    assert only(check_pipeline(root))[0] == "ok"
    (root / "params.yaml").write_text("x: 1\n")
    (root / "dvc.yaml").write_text(
        "stages:\n"
        "  source: {cmd: 'true', always_changed: true}\n"
        "  make: {cmd: 'echo 1 > out', params: [x], outs: [out]}\n"
    )
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert only(check_pipeline(root)) == ("ok", "the workspace is what dvc.lock says")
    (root / "params.yaml").write_text("x: 2\n")
    assert only(check_pipeline(root)) == ("warning", "the workspace is not what dvc.lock says (make); `dvc repro`")
    (root / "dvc.lock").write_text("<<<<<<< ours\n")
    assert only(check_pipeline(root))[0] == "problem"


def test_remotes_are_asked(root, tmp_path):
    level, text = only(check_remote(root))
    assert (level, "no DVC remote" in text) == ("warning", True)
    config = root / ".dvc" / "config"
    remote = tmp_path / "remote"
    config.write_text(f"[core]\n    remote = near\n['remote \"near\"']\n    url = {remote}\n")
    assert only(check_remote(root)) == ("warning", "DVC remote near holds nothing yet; `dvc push` fills it")
    remote.mkdir()
    assert only(check_remote(root)) == ("ok", "DVC remote near answers")
    config.write_text(f"['remote \"near\"']\n    url = {remote}\n['remote \"far\"']\n    url = http://127.0.0.1:9/x\n")
    near, far, default = check_remote(root)
    assert near.level == "ok"
    assert far.level == "problem"
    assert far.text.startswith("DVC remote far does not answer (")
    assert (default.level, default.text) == ("warning", "no DVC remote is the default; `dvc remote default near`")


# Environment


def test_packages_are_compared_with_the_lock_file(root):
    level, text = only(check_packages(root))
    assert (level, "requirements.lock is missing" in text) == ("problem", True)
    here = importlib.metadata.version("numpy")
    lock = root / "requirements.lock"
    right = f"numpy=={here} \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\nno-such==1 ; sys_platform == 'none' \\\n"
    lock.write_text(right)
    assert only(check_packages(root)) == ("ok", "1 packages as requirements.lock names them")
    lock.write_text(right + "Ruamel_yaml==0.0.1\nno-such-a==1.0\nno-such-b==2 ; python_version >= '3'\n")
    missing, other = check_packages(root)
    assert missing.level == other.level == "warning"
    assert missing.text.startswith("2 packages missing (no-such-a, no-such-b); `make setup` ")
    have = importlib.metadata.version("ruamel.yaml")
    assert other.text.startswith(f"1 package differs from requirements.lock (ruamel-yaml {have} in place of 0.0.1); ")
    (root / ".venv").mkdir()
    (root / ".venv" / ".ready-requirements-gpu.lock").touch()
    (root / "requirements-gpu.lock").write_text(right)
    assert only(check_packages(root)) == ("ok", "1 packages as requirements-gpu.lock names them")


@pytest.mark.parametrize("metadata", [None, "", "Metadata-Version: 2.1\n"])
def test_a_package_that_was_installed_in_part_is_told(root, tmp_path, monkeypatch, metadata):
    (root / "requirements.lock").write_text(f"numpy=={importlib.metadata.version('numpy')}\nno-such-a==1.0\n")
    folder = tmp_path / "site" / "numpy-1.0.dist-info"
    folder.mkdir(parents=True)
    if metadata is not None:
        (folder / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(folder.parent)
    broken, missing = check_packages(root)
    assert broken.level == "warning"
    assert broken.text.startswith(f"1 package installed in part ({folder}); remove what is named there, then `make se")
    assert missing.text.startswith("1 package missing (no-such-a); ")
    folder.rename(folder.with_name("dvc-1.0.dist-info"))
    assert [finding.text for finding in check_programs(root) if finding.level == "problem"] == [
        "DVC is not installed; `make setup` installs it"
    ]


def test_the_python_that_stages_call_is_this_one(root, tmp_path, monkeypatch):
    assert only(check_python(root))[0] == "ok"
    other = tmp_path / "bin" / "python"
    other.parent.mkdir()
    other.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(other.parent))
    level, text = only(check_python(root))
    assert (level, str(other) in text, "activate`" in text) == ("warning", True, True)
    other.unlink()
    assert only(check_python(root))[0] == "problem"


def test_programs_are_there(root, tmp_path, monkeypatch):
    assert [finding.level for finding in check_programs(root)] == ["ok"] * 4
    assert f"DVC {importlib.metadata.version('dvc')}" in [finding.text for finding in check_programs(root)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_programs(root)[0].text.startswith("git does not run (git is not on PATH)")


def test_little_room_is_told(root, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK", 0)
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 0)
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 0)
    assert only(check_disk(root))[0] == "ok"
    assert only(check_memory(root))[0] == "ok"
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1e20)
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 1e20)
    assert only(check_disk(root))[0] == "warning"
    assert only(check_memory(root))[0] == "warning"
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e20)
    assert only(check_disk(root))[0] == "problem"


def test_the_device_is_named(root, monkeypatch):
    level, text = only(check_device(root))
    assert text.startswith("Keras computes on ")
    assert level in ("ok", "warning")
    monkeypatch.setenv("KERAS_BACKEND", "none-such")
    level, text = only(check_device(root))
    assert (level, "none-such" in text) == ("problem", True)


def test_weights_are_checked(root):
    shutil.copy(REPOSITORY / paths.PARAMS, root)
    shipped = [backbone for backbone in BACKBONES.values() if backbone.shipped]
    (root / paths.PRETRAINED).mkdir()
    missing = check_weights(root)
    assert [finding.level for finding in missing] == ["ok"] + ["warning"] * len(shipped)
    assert f"`git checkout {paths.PRETRAINED / shipped[0].shipped}`" in missing[1].text
    for backbone in shipped:
        (root / paths.PRETRAINED / backbone.shipped).symlink_to(REPOSITORY / paths.PRETRAINED / backbone.shipped)
    assert {finding.level for finding in check_weights(root)} == {"ok"}
    damaged = root / paths.PRETRAINED / shipped[0].shipped
    damaged.unlink()
    damaged.write_bytes(b"no weights")
    findings = check_weights(root)
    assert [finding.level for finding in findings].count("problem") == 1
    (root / paths.PARAMS).write_text("seed: 1\n")
    level, text = only(check_weights(root))
    assert (level, text.startswith("params.yaml: ")) == ("problem", True)


def test_weights_that_the_parameters_want_are_checked(root):
    text = (REPOSITORY / paths.PARAMS).read_text()
    assert "\nweights: imagenet " in text
    (root / paths.PARAMS).write_text(text.replace("\nweights: imagenet ", "\nweights: absent.h5 "))
    problems = [finding.text for finding in check_weights(root) if finding.level == "problem"]
    assert len(problems) == 1
    assert "absent.h5" in problems[0]


# The command


def test_the_command_has_a_line_a_finding_and_tells_by_its_exit_code(moved, capsys, monkeypatch):
    """In a repository with problems of its own: no parameters, no lock file, artifacts of another place."""
    # The device has its own test; asking for it takes longest.
    monkeypatch.setattr(doctor, "CHECKS", [check for check in doctor.CHECKS if check is not check_device])
    assert cli.main(["doctor"]) == 1
    first = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok       ", "warning  ", "problem  ")) for line in first[:-2])
    problems = [line for line in first if line.startswith("problem")]
    assert first[-1].startswith(f"{len(problems)} problems, ")
    assert any("are looked for where the repository was before" in line for line in problems)
    assert cli.main(["doctor", "--fix"]) == 1
    second = capsys.readouterr().out.splitlines()
    assert second[0].startswith("fixed    the artifacts of 2 experiments, ")
    assert len([line for line in second if line.startswith("problem")]) == len(problems) - 1


@pytest.mark.parametrize(("levels", "code"), [(["ok"], 0), (["ok", "warning"], 0), (["warning", "problem", "ok"], 1)])
def test_only_a_problem_makes_the_exit_code_1(root, monkeypatch, levels, code, capsys):
    monkeypatch.setattr(doctor, "CHECKS", [lambda root: [Finding(level, "it is so") for level in levels]])
    assert doctor.run_doctor(root, fix=False) == code
    assert capsys.readouterr().out.splitlines()[: len(levels)] == [f"{level:<8} it is so" for level in levels]
