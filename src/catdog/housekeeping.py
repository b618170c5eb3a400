"""`catdog clean`: what killed, deleted and forgotten work leaves behind, shown first and removed on request.

Nothing outside the repository is removed, nothing that a running process uses, and of MLflow only what lies in the
repository's own store; artifacts that may be another store's only where they are asked for by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from catdog import paths, tracking
from catdog.errors import CatdogError

STORE = Path("mlflow.db")
ARTIFACTS = Path("mlruns")
DVC_TMP = Path(".dvc") / "tmp"
KINDS = ("checkpoints", "downloads", "runs", "experiments", "artifacts")
DAYS = 14.0
"""What was last touched so many days ago is old."""
DAYS_RUNNING = 1.0
"""A run that has not ended may be at work for so many days from its start, whatever age is asked for."""
_DAY = 24 * 3600.0
_NOT_ENDED = ("RUNNING", tracking.BETWEEN_STAGES)
_RUN_FOLDER = re.compile(r"[0-9a-f]{32}")
_MODEL_FOLDER = re.compile(r"m-[0-9a-f]{32}")
_EXPERIMENT = re.compile(r"refs/exps/([0-9a-f]{2}/[0-9a-f]{38})/([^/]+)")


@dataclass(frozen=True)
class Item:
    """One thing to remove or to put right.

    Attributes:
        kind: one of KINDS.
        action: what to do: delete a folder (or file), remove a run or a model from the store with its folder, end a
            run in the store, or remove a DVC experiment.
        target: id of the run or model, name of the experiment's git reference, empty for a folder.
        name: what people know it by.
        reason: why it can go.
        folder: what is deleted on the disk.
        lock: the file that a process which uses the folder would hold.
        bytes: that the folder takes on the disk.
    """

    kind: str
    action: Literal["folder", "run", "model", "end", "experiment"]
    target: str
    name: str
    reason: str
    folder: Path | None = None
    lock: Path | None = None
    bytes: int = 0


def run_clean(root: Path, kinds: Sequence[str], *, days: float, yes: bool) -> int:
    """Shows what can go, or, with `yes`, removes it; returns the exit code.

    Args:
        root: of the main repository.
        kinds: of KINDS, those to look at; none for all.
        days: what was touched within so many days stays.
        yes: remove.

    Raises:
        CatdogError: `yes` without a kind; the tracking store cannot be read; DVC could not remove an experiment.
    """
    if yes and not kinds:
        options = ", ".join(f"--{kind}" for kind in KINDS)
        raise CatdogError(f"--yes removes nothing without a kind: add one or more of {options}")
    items = find_all(root, kinds or KINDS, days=days)
    for kind in KINDS:
        _print_kind(kind, [item for item in items if item.kind == kind])
    if "runs" in (kinds or KINDS) and (elsewhere := runs_elsewhere(root)):
        print(
            f"{_count(elsewhere, 'run keeps its', 'runs keep their')} artifacts outside this repository's {ARTIFACTS}/ "
            "and stay as they are; `catdog doctor` tells more"
        )
    total = f"{_count(len(items), 'entry', 'entries')}, {size_text(sum(item.bytes for item in items))}"
    if not items:
        print("nothing to clean")
    elif yes:
        remove(root, items)
        print(f"done: {total}")
        if any(item.kind == "experiments" for item in items):
            print("`dvc gc --all-commits --all-experiments` frees what only they had in DVC's cache")
    else:
        # Who did not ask for artifacts is not to remove those of another store by copying a line.
        found = [kind for kind in KINDS if any(item.kind == kind for item in items)]
        offered = " ".join(f"--{kind}" for kind in found if kind != "artifacts" or kind in kinds)
        age = "" if days == DAYS else f" --older-than {days:g}"
        print(
            f"{total}; nothing is removed yet" + (f": `catdog clean {offered}{age} --yes` does it" if offered else "")
        )
        if "artifacts" in found:
            print(
                f"the artifacts may be those of another tracking store that keeps its files in {ARTIFACTS}/, such as a "
                "database on a server; only where there is none, --artifacts removes them"
            )
    return 0


def _print_kind(kind: str, items: Sequence[Item]) -> None:
    if items:
        print(f"{kind}:")
        width = max(len(item.name) for item in items)
        for item in items:
            print(f"  {item.name:<{width}}  {size_text(item.bytes) if item.bytes else '-':>9}  {item.reason}")


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def size_text(size: int) -> str:
    """Returns bytes as people read them, e.g. "12.3 MB"; a kB has 1000 bytes."""
    if size < 1000:
        return f"{size} B"
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= f)
    return f"{size / factor:.1f} {unit}"


def find_all(root: Path, kinds: Sequence[str], *, days: float = DAYS) -> list[Item]:
    """Returns everything of the kinds given that can go, kind by kind in the order of KINDS.

    Args:
        root: of the main repository.
        kinds: of KINDS.
        days: what was touched within so many days stays.

    Raises:
        CatdogError: the tracking store cannot be read.
    """
    find = {
        "checkpoints": find_checkpoints,
        "downloads": find_downloads,
        "runs": find_runs,
        "experiments": find_experiments,
        "artifacts": find_artifacts,
    }
    return [item for kind in KINDS if kind in kinds for item in find[kind](root, days=days)]


def remove(root: Path, items: Sequence[Item]) -> None:
    """Does what the items of `find_all` say, except to what a process has taken up since.

    Raises:
        CatdogError: DVC could not remove an experiment; everything else is done.
    """
    for item in items:
        if item.action in ("run", "model", "end"):
            _change_store(root, item)
        if item.folder is not None and is_inside(item.folder, root):
            with hold(item.lock) as free:
                if free:
                    _delete(item.folder)
    refs = [item.target for item in items if item.action == "experiment"]
    if refs:
        # By their full names: experiments on two commits may be called the same.
        command = [sys.executable, "-m", "dvc", "exp", "remove", *refs]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            cause = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CatdogError(f"`dvc exp remove` failed ({cause}); `dvc exp list --all-commits` lists the experiments")


def _change_store(root: Path, item: Item) -> None:
    store = _sql_store(root)
    if item.action == "end":
        from mlflow.entities import RunStatus

        store.update_run_info(item.target, RunStatus.KILLED, int(time.time() * 1000), None)
    elif item.action == "run":
        # The two calls of `mlflow gc`; that command would also remove everything else that was deleted.
        store._hard_delete_run(item.target)
    else:
        store._hard_delete_logged_model(item.target)


@functools.cache
def _sql_store(root: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return SqlAlchemyStore(tracking.database_uri(root / STORE), (root / ARTIFACTS).as_uri())


# Checkpoints of trainings and tunings, and downloads


def find_checkpoints(root: Path, *, days: float = DAYS) -> list[Item]:
    """Returns the checkpoints, and the folders of tunings, that nobody wrote to for some days and no process holds."""
    kept_by = {paths.CHECKPOINTS: "a training", paths.TUNING_SEARCHES: "a tuning", paths.TUNING_FEATURES: "a tuning"}
    return [item for parent, what in kept_by.items() for item in _find_left(root, parent, "checkpoints", what, days)]


def find_downloads(root: Path, *, days: float = DAYS) -> list[Item]:
    """Returns downloads of data sets that were cut off or not used for some days, and that no process holds."""
    return _find_left(root, paths.DOWNLOADS, "downloads", "a download", days)


def _find_left(root: Path, parent: Path, kind: str, what: str, days: float) -> list[Item]:
    """What work by one key left in a folder: <key>/, <key>.part and the like; who uses them holds <key>.lock."""
    by_key: dict[str, list[Path]] = {}
    for path in _entries(root / parent):
        by_key.setdefault(path.name.partition(".")[0], []).append(path)
    items = []
    for key, found in by_key.items():
        lock = root / parent / f"{key}.lock"
        used = [path for path in found if path != lock] or found  # a lock goes with what it is for
        age = min(map(_age, used))
        if age < days or is_locked(lock):
            continue
        for path in used:
            if is_inside(path, root):
                reason = f"left by {what}, last written {_days(age)} ago"
                items.append(Item(kind, "folder", "", str(parent / path.name), reason, path, lock, _size(path)))
    return items


# MLflow runs


def find_runs(root: Path, *, days: float = DAYS) -> list[Item]:
    """Returns what is wrong with the runs of the repository's own store.

    Those are: runs that a person deleted some days ago; runs whose parent is gone; runs that never ended although
    they began more than a day ago and no pipeline is at work (they are marked KILLED, not removed). A run or model
    that MLflow's model registry names stays.

    Raises:
        CatdogError: the store cannot be read.
    """
    if not (root / STORE).exists():
        return []
    with open_store(root) as store:
        runs, models = _read_runs(store), _read_models(store)
        known = _ids(store)
        registered = _registered(store)
    items = []
    gone = _runs_to_remove(runs, known, registered, days)
    for run in runs:
        folder = _folder_of(run, root)
        if run.id in gone and folder is not None:
            items.append(Item("runs", "run", run.id, run.title, gone[run.id], folder, None, _size(folder)))
    for model in models:
        deleted = model.deleted is not None and _days_since(model.deleted) >= days
        lost = model.parent is not None and (model.parent in gone or model.parent not in known)
        kept = model.id in registered or model.parent in registered
        folder = _folder_of(model, root)
        if (deleted or lost) and not kept and folder is not None:
            reason = "deleted in MLflow" if deleted else "its run is deleted"
            items.append(Item("runs", "model", model.id, model.title, reason, folder, None, _size(folder)))
    if not pipelines_at_work(root):
        for run in runs:
            if run.status in _NOT_ENDED and not _may_live(run) and run.deleted is None and run.id not in gone:
                reason = f"{run.status} since {_days(_days_since(run.started))}, but by no process; becomes KILLED"
                items.append(Item("runs", "end", run.id, run.title, reason))
    return items


def _runs_to_remove(runs: Sequence[_Row], known: set[str], registered: set[str], days: float) -> dict[str, str]:
    """The reasons by run: deleted some days ago, or the child of such a one or of none."""
    candidates = [run for run in runs if run.id not in registered and not _may_live(run)]
    gone = {
        run.id: f"deleted in MLflow {_days(_days_since(run.deleted))} ago"
        for run in candidates
        if run.deleted is not None and _days_since(run.deleted) >= days
    }
    while True:  # again, because a child may have children
        orphans = {
            run.id: "its parent run is deleted"
            for run in candidates
            if run.id not in gone and run.parent and (run.parent in gone or run.parent not in known)
        }
        if not orphans:
            return gone
        gone |= orphans


def _may_live(run: _Row) -> bool:
    return run.status in _NOT_ENDED and _days_since(run.started) < DAYS_RUNNING


def runs_elsewhere(root: Path) -> int:
    """Returns how many runs of the repository's own store keep their artifacts outside its mlruns/."""
    if not (root / STORE).exists():
        return 0
    with open_store(root) as store:
        return sum(_folder_of(run, root) is None for run in _read_runs(store))


@dataclass(frozen=True)
class _Row:
    """A run or a model of the store; times in seconds since 1970."""

    id: str
    title: str
    status: str
    started: float
    deleted: float | None
    artifacts: str
    parent: str | None  # of a run its parent run, of a model the run that made it


@contextlib.contextmanager
def open_store(root: Path, name: str = STORE.name) -> Iterator[sqlite3.Connection]:
    """Opens a tracking store in the repository's root for reading; raises CatdogError where it is none."""
    path = root / name
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30)) as store:
            store.row_factory = sqlite3.Row
            yield store
    except sqlite3.Error as error:
        raise CatdogError(f"{path} cannot be read ({error}); `catdog doctor` checks it") from None


def _read_runs(store: sqlite3.Connection) -> list[_Row]:
    """The runs of the pipeline's experiment, oldest first."""
    rows = store.execute(
        "SELECT runs.*, tags.value AS parent FROM runs JOIN experiments USING (experiment_id) "
        "LEFT JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = ? "
        "WHERE experiments.name = ? ORDER BY start_time, runs.run_uuid",
        (tracking.PARENT_TAG, tracking.experiment_name()),
    )
    return [
        _Row(
            id=row["run_uuid"],
            title=f"run {row['name'] or ''} {row['run_uuid'][:8]}",
            status=row["status"],
            started=(row["start_time"] or 0) / 1000,
            deleted=(row["deleted_time"] or 0) / 1000 if row["lifecycle_stage"] == "deleted" else None,
            artifacts=row["artifact_uri"] or "",
            parent=row["parent"],
        )
        for row in rows
    ]


def _read_models(store: sqlite3.Connection) -> list[_Row]:
    """The logged models of the pipeline's experiment, oldest first."""
    rows = store.execute(
        "SELECT logged_models.* FROM logged_models JOIN experiments USING (experiment_id) "
        "WHERE experiments.name = ? ORDER BY creation_timestamp_ms, model_id",
        (tracking.experiment_name(),),
    )
    return [
        _Row(
            id=row["model_id"],
            title=f"model {row['name']} {row['model_id'][:10]}",
            status="",
            started=row["creation_timestamp_ms"] / 1000,
            deleted=row["last_updated_timestamp_ms"] / 1000 if row["lifecycle_stage"] == "deleted" else None,
            artifacts=row["artifact_location"],
            parent=row["source_run_id"],
        )
        for row in rows
    ]


def _ids(store: sqlite3.Connection) -> set[str]:
    """The ids of all runs and models."""
    statement = "SELECT run_uuid FROM runs UNION SELECT model_id FROM logged_models"
    return {row[0] for row in store.execute(statement)}


def _registered(store: sqlite3.Connection) -> set[str]:
    """The ids of runs and models that a version in MLflow's model registry comes from."""
    kept: set[str] = set()
    for row in store.execute("SELECT run_id, source, storage_location FROM model_versions"):
        kept |= {row["run_id"]} if row["run_id"] else set()
        for text in (row["source"] or "", row["storage_location"] or ""):
            kept |= set(_MODEL_FOLDER.findall(text)) | set(_RUN_FOLDER.findall(text))
    return kept


def _folder_of(row: _Row, root: Path) -> Path | None:
    """The folder <id> of a run's or model's artifacts; None where it is not under the repository's own mlruns/."""
    path = artifact_path(row.artifacts)
    if path is None or path.name != "artifacts" or path.parent.name != row.id:
        return None
    return path.parent if path.is_relative_to(root / ARTIFACTS) and is_inside(path, root) else None


def artifact_path(location: str) -> Path | None:
    """Returns the folder that an artifact location of MLflow names, a file:// address or a path; None for others."""
    parts = urllib.parse.urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(urllib.parse.unquote(parts.path))
    return Path(location) if location.startswith("/") else None


def find_artifacts(root: Path, *, days: float = DAYS) -> list[Item]:
    """Returns the folders under mlruns/ named as a run's or a model's that no store here knows.

    A store that MLFLOW_TRACKING_URI named may keep its artifacts there, too. Those are known of every database in
    the repository's root, but of no server's; with the variable set, nothing is found.

    Raises:
        CatdogError: the repository's own store cannot be read.
    """
    if tracking.database_path(tracking.store_uri(root)) != root / STORE or not (root / STORE).exists():
        return []  # without a store nothing tells whose the artifacts are
    with open_store(root) as store:
        known = _ids(store)
    for file in _entries(root):
        if file.is_file():  # a database may have any name
            with contextlib.suppress(CatdogError), open_store(root, file.name) as store:
                known |= _ids(store)
    items = []
    for parent, pattern in ((ARTIFACTS, _RUN_FOLDER), (ARTIFACTS / "models", _MODEL_FOLDER)):
        for path in _entries(root / parent):
            if pattern.fullmatch(path.name) and path.name not in known and is_inside(path, root):
                age = _age(path)
                # A day at least: the run may be that of a store which is just being put back.
                if age >= max(days, DAYS_RUNNING):
                    reason = f"no run in {STORE} has them, last written {_days(age)} ago"
                    name = str(parent / path.name)
                    items.append(Item("artifacts", "folder", "", name, reason, path, None, _size(path)))
    return items


# DVC experiments


def find_experiments(root: Path, *, days: float = DAYS) -> list[Item]:
    """Returns the DVC experiments whose commit is older than some days; queued and running ones have none yet."""
    command = ["git", "for-each-ref", "refs/exps", "--sort=committerdate", "--format=%(committerdate:unix) %(refname)"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    items = []
    for line in listed.stdout.splitlines():
        seconds, _, ref = line.partition(" ")
        if found := _EXPERIMENT.fullmatch(ref):
            age = _days_since(float(seconds))
            if age >= days:
                name, reason = f"{found[2]} on {found[1].replace('/', '')[:7]}", f"ended {_days(age)} ago"
                items.append(Item("experiments", "experiment", ref, name, reason))
    return items


# What is in use, and what is ours


def pipelines_at_work(root: Path) -> list[int]:
    """Returns the ids of processes of DVC that are at work in the repository or in its temporary copies."""
    files = [root / DVC_TMP / "rwlock", *(root / DVC_TMP / "exps").glob("*/.dvc/tmp/rwlock")]
    found = {entry["pid"] for file in files for entry in lock_entries(file) or [] if is_dvc(entry["pid"])}
    # A training outlives a killed `dvc`, and holds the lock of its checkpoints.
    if any(is_locked(lock) for lock in (root / paths.CHECKPOINTS).glob("*.lock")):
        found.add(0)
    return sorted(found)


def lock_entries(rwlock: Path) -> list[dict[str, Any]] | None:
    """Returns the processes that DVC's file of locks names, each with pid and cmd; None where it cannot be read."""
    try:
        content = json.loads(rwlock.read_text(encoding="utf-8"))
        entries = [*content.get("write", {}).values(), *(e for es in content.get("read", {}).values() for e in es)]
        return [{"pid": int(entry["pid"]), "cmd": str(entry["cmd"])} for entry in entries if entry]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def is_dvc(pid: int) -> bool:
    """Says whether a process lives and is one of DVC's: a system that started anew gives old numbers to others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        return b"dvc" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # a system without /proc cannot tell more


def is_locked(lock: Path) -> bool:
    """Says whether a process holds a lock file (flock, as filelock and zc.lockfile take it)."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def hold(lock: Path | None) -> Iterator[bool]:
    """Holds a lock file for the block and deletes it after; yields False where another process holds it.

    Args:
        lock: as in `is_locked`; None where there is nothing to hold.
    """
    if lock is None:
        yield True
        return
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def is_inside(path: Path, root: Path) -> bool:
    """Says whether a path, all links followed, lies in the repository and is no link itself."""
    return not path.is_symlink() and path.resolve().is_relative_to(root.resolve())


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _paths_below(path: Path) -> Iterator[os.stat_result]:
    for entry in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            yield entry.lstat()


def _age(path: Path) -> float:
    """Days since anything in a folder was last written."""
    return _days_since(max((status.st_mtime for status in _paths_below(path)), default=time.time()))


def _size(path: Path) -> int:
    return sum(status.st_size for status in _paths_below(path) if stat.S_ISREG(status.st_mode))


def _days_since(seconds: float) -> float:
    return (time.time() - seconds) / _DAY


def _days(days: float) -> str:
    return _count(int(days), "day", "days") if days >= 1 else "less than a day"
