"""`catdog doctor`: is everything there that the pipeline needs, and is it in order?

Every check is a function of the repository's root that returns findings, and changes nothing. What `--fix` repairs is
in the functions `repair_locations` and `repair_locks`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from catdog import paths, tracking
from catdog.backbones import BACKBONES, get_backbones
from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.files import write_json, written_aside
from catdog.housekeeping import (
    ARTIFACTS,
    DVC_TMP,
    STORE,
    artifact_path,
    is_dvc,
    is_locked,
    lock_entries,
    size_text,
)
from catdog.weights import check_weights_available

LEAST_DISK, ENOUGH_DISK = 1e9, 5e9
"""Bytes: below the first a stage hardly ends; the second is what the 25,000 photographs take with DVC's cache."""
ENOUGH_MEMORY = 2e9
"""Bytes: more than any stage takes with the default backbone, 1.4 GB."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's database holds absolute paths, by table and column."""
_DEFAULT_EXPERIMENT = 0
_SECONDS = 60.0
"""How long another program may take to answer."""
_RWLOCK = DVC_TMP / "rwlock"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: ok, warning (it works, but not as well as it could), or problem (something will fail).
        text: one sentence: what is so and, but for ok, what to do.
    """

    level: Literal["ok", "warning", "problem"]
    text: str


Check = Callable[[Path], list[Finding]]


def run_doctor(root: Path, *, fix: bool) -> int:
    """Prints a line a finding; returns 1 where there is a problem, else 0.

    Args:
        root: of the main repository.
        fix: first repair the paths of MLflow's artifacts and DVC's locks.
    """
    if fix:
        for repaired in (*repair_locations(root), *repair_locks(root)):
            print(f"fixed    {repaired}", flush=True)
    levels = Counter[str]()
    for finding in examine(root):
        levels[finding.level] += 1
        print(f"{finding.level:<8} {finding.text}", flush=True)
    if levels["problem"] or levels["warning"]:
        print(f"\n{_plural(levels['problem'], 'problem')}, {_plural(levels['warning'], 'warning')}")
    return 1 if levels["problem"] else 0


def examine(root: Path) -> Iterator[Finding]:
    """Runs every check, quick ones first, and yields what it finds."""
    for check in CHECKS:
        yield from check(root)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Environment


def check_python(root: Path) -> list[Finding]:
    """Is this Python the one that DVC will find?"""
    name = f"Python {platform.python_version()} in {sys.prefix}"
    found = shutil.which("python")
    if found is None:
        return [Finding("problem", f"{name}, but no `python` is on PATH, which every stage calls; {_activate(root)}")]
    if Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        return [Finding("warning", f"{name}, but stages call `python`, which on PATH is {found}; {_activate(root)}")]
    return [Finding("ok", name)]


def _activate(root: Path) -> str:
    script = Path(sys.prefix) / "bin" / "activate"
    return f"`source {script}` before you call dvc (make does it by itself)"


def check_packages(root: Path) -> list[Finding]:
    """Are the installed packages those of the lock file?"""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    gpu = (root / ".venv" / ".ready-requirements-gpu.lock").exists()
    lock = root / ("requirements-gpu.lock" if gpu else "requirements.lock")
    if not lock.exists():
        return [Finding("problem", f"{lock.name} is missing; `git checkout {lock.name}` brings it back")]
    wanted = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith((" ", "#", "-")):
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker is None or requirement.marker.evaluate():
                wanted[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    have, broken = {}, []
    for found in importlib.metadata.distributions():
        try:
            have[canonicalize_name(found.name)] = found.version
        except Exception:  # without METADATA, or with a part of it, each version of Python raises something else
            broken.append(str(getattr(found, "_path", found)))
    missing = sorted(name for name in wanted if name not in have)
    other = sorted(name for name in wanted if name in have and have[name] != wanted[name])
    findings = []
    advice = f"`make setup{' GPU=1' if gpu else ''}` installs what {lock.name} names"
    if broken:
        number = _plural(len(broken), "package")
        few = _few(sorted(broken))
        findings.append(
            Finding("warning", f"{number} installed in part ({few}); remove what is named there, then {advice}")
        )
    if missing:
        few = _few(missing)
        findings.append(Finding("warning", f"{_plural(len(missing), 'package')} missing ({few}); {advice}"))
    if other:
        few = _few([f"{name} {have[name]} in place of {wanted[name]}" for name in other])
        number = "1 package differs" if len(other) == 1 else f"{len(other)} packages differ"
        findings.append(Finding("warning", f"{number} from {lock.name} ({few}); {advice}"))
    return findings or [Finding("ok", f"{len(wanted)} packages as {lock.name} names them")]


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (" and others" if len(names) > most else "")


def check_programs(root: Path) -> list[Finding]:
    """Are git, DVC and MLflow there?"""
    git = _answer(["git", "--version"], root)
    findings = [
        Finding("ok", git.text.strip())
        if git.done
        else Finding("problem", f"git does not run ({git.text}); install it with the system's package manager")
    ]
    for package, name in (("dvc", "DVC"), ("mlflow", "MLflow"), ("keras", "Keras")):
        version = None
        with contextlib.suppress(Exception):  # not there, or in part as in `check_packages`
            version = importlib.metadata.version(package)
        if version:
            findings.append(Finding("ok", f"{name} {version}"))
        else:
            findings.append(Finding("problem", f"{name} is not installed; `make setup` installs it"))
    return findings


def check_disk(root: Path) -> list[Finding]:
    """Is there room on the disk?"""
    free = shutil.disk_usage(root).free
    text = f"{size_text(free)} free on the disk"
    if free < LEAST_DISK:
        # With --workspace instead, the models of registered versions would go, too.
        remedy = "`catdog clean`, then `dvc gc --all-commits --all-experiments` free some"
        return [Finding("problem", f"only {text}; {remedy}")]
    if free < ENOUGH_DISK:
        needed = size_text(int(ENOUGH_DISK))
        return [Finding("warning", f"{text}: enough for the sample, but large data sets need {needed} or more")]
    return [Finding("ok", text)]


def check_memory(root: Path) -> list[Finding]:
    """Is there memory for a stage?"""
    free = available_memory()
    if free is None:
        return []
    text = f"{size_text(free)} of memory available"
    if free < ENOUGH_MEMORY:
        return [Finding("warning", f"only {text}, where a stage may take 1.4 GB or more; end other programs")]
    return [Finding("ok", text)]


def available_memory() -> int | None:
    """Returns the bytes of memory that a new process may take; None on a system that does not tell.

    The lower of what Linux says is available, and what the container (cgroup, version 2) may have at all.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return available


def check_device(root: Path) -> list[Finding]:
    """What does Keras compute on, and is a GPU left unused?"""
    # In a process of its own: a library that does not fit the processor ends the process that imports it.
    code = "from catdog.runtime import device_name; print(device_name())"
    answer = _answer([sys.executable, "-c", code], root, TF_CPP_MIN_LOG_LEVEL="3", PYTHONPATH=_source())
    if not answer.done:
        return [Finding("problem", f"Keras does not start ({answer.text}); `make setup` installs it anew")]
    device = answer.text.strip().splitlines()[-1]
    if device.startswith("cpu") and Path("/dev/nvidiactl").exists():
        return [
            Finding("warning", f"Keras computes on {device} and sees no GPU, but there is one; try `make repro GPU=1`")
        ]
    return [Finding("ok", f"Keras computes on {device}")]


def _source() -> str:
    return str(Path(__file__).parents[1])


def check_weights(root: Path) -> list[Finding]:
    """Are the parameters valid, the shipped weights intact, and the weights that the parameters want at hand?"""
    try:
        params = load_params(root / paths.PARAMS)
    except CatdogError as error:
        return [Finding("problem", str(error))]
    findings = [Finding("ok", f"{paths.PARAMS} is valid")]
    pretrained = root / paths.PRETRAINED
    for backbone in BACKBONES.values():
        if backbone.shipped is None:
            continue
        file = paths.PRETRAINED / backbone.shipped
        try:
            check_weights_available([backbone], "imagenet", pretrained_dir=pretrained, root=root)
        except CatdogError as error:
            findings.append(Finding("problem", str(error)))
        else:
            if (root / file).exists():
                findings.append(Finding("ok", f"weights of {backbone.name} have the right SHA-256"))
            else:
                findings.append(
                    Finding("warning", f"{file} is missing, Keras would download it; `git checkout {file}`")
                )
    try:
        check_weights_available(get_backbones(params.backbone), params.weights, pretrained_dir=pretrained, root=root)
    except CatdogError as error:
        if all(finding.text != str(error) for finding in findings):
            findings.append(Finding("problem", str(error)))
    return findings


# The repository


def check_git(root: Path) -> list[Finding]:
    """Does git know who commits, and is everything committed?"""
    # As `catdog promote` asks: git would guess a name from the system's user.
    identity = _answer(["git", "-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT"], root)
    if identity.done:
        findings = [Finding("ok", f"git commits as {identity.text.rpartition('>')[0]}>")]
    else:
        calls = 'git config --global user.name "..."` and `git config --global user.email "..."'
        findings = [Finding("warning", f"git does not know who you are, and `catdog promote` asks for it; `{calls}`")]
    status = _answer(["git", "status", "--porcelain"], root)
    if not status.done:
        return [*findings, Finding("problem", f"`git status` fails ({status.text})")]
    changed = status.text.splitlines()
    if any(line[:2] in ("DD", "AU", "UD", "UA", "DU", "AA", "UU") for line in changed):
        findings.append(
            Finding("problem", "a merge is under way; solve its conflicts and commit, or `git merge --abort`")
        )
    elif changed:
        number = "1 file differs" if len(changed) == 1 else f"{len(changed)} files differ"
        names = _few([line[3:] for line in changed])
        findings.append(
            Finding("warning", f"{number} from the last commit ({names}); commit, so that runs can be repeated")
        )
    else:
        findings.append(Finding("ok", "everything is committed"))
    return findings


def check_locks(root: Path) -> list[Finding]:
    """Does a lock of a process that is dead keep DVC from working?"""
    entries = lock_entries(root / _RWLOCK)
    if entries is None:
        return [Finding("problem", f"{_RWLOCK} is damaged, and dvc fails; `catdog doctor --fix` removes it")]
    alive = sorted({entry["pid"] for entry in entries if is_dvc(entry["pid"])})
    if alive:
        return [Finding("ok", f"DVC is at work (process {', '.join(map(str, alive))})")]
    if entries:
        dead = ", ".join(sorted({str(entry["pid"]) for entry in entries}))
        return [
            Finding("warning", f"{_RWLOCK} holds locks of dead processes ({dead}); `catdog doctor --fix` removes them")
        ]
    if is_locked(root / DVC_TMP / "lock"):
        return [Finding("ok", "DVC is at work")]
    return [Finding("ok", "no lock is left behind")]


def check_pipeline(root: Path) -> list[Finding]:
    """Is the workspace what dvc.lock says?"""
    if not (root / "dvc.lock").exists():
        return [Finding("ok", "the pipeline has not run yet; `dvc repro` runs it")]
    answer = _answer([sys.executable, "-m", "dvc", "status", "--json"], root, stderr=False)
    if not answer.done:
        return [Finding("problem", f"`dvc status` fails ({answer.text})")]
    status: Mapping[str, list[Any]] = json.loads(answer.text or "{}")
    # One stage looks at every run whether its source changed, and is always listed.
    stages = [stage for stage, changes in status.items() if any(change != "always changed" for change in changes)]
    if stages:
        return [Finding("warning", f"the workspace is not what dvc.lock says ({_few(stages)}); `dvc repro`")]
    return [Finding("ok", "the workspace is what dvc.lock says")]


_REMOTES = """
import json, sys
from dvc.repo import Repo
with Repo(sys.argv[1]) as repo:
    for name in repo.config["remote"]:
        remote = repo.cloud.get_remote(name)
        try:
            if remote.fs.protocol in ("http", "https"):  # it calls every error "not there"
                import requests
                requests.head(remote.fs.unstrip_protocol(remote.path), timeout=20)
            state = "has data" if remote.fs.exists(remote.path) else "empty"
        except Exception as error:
            state = f"{type(error).__name__}: {error}"
        print(json.dumps([name, state, name == repo.config["core"].get("remote")]))
"""


def check_remote(root: Path) -> list[Finding]:
    """Is there a DVC remote, and does it answer?"""
    answer = _answer([sys.executable, "-c", _REMOTES, str(root)], root, stderr=False)
    if not answer.done:
        return [Finding("problem", f"a DVC remote does not answer ({answer.text}); `dvc remote list` shows them")]
    remotes = [json.loads(line) for line in answer.text.splitlines()]
    if not remotes:
        return [
            Finding("warning", "no DVC remote: data and models are only here; `dvc remote add --default NAME ADDRESS`")
        ]
    findings = []
    for name, state, _ in remotes:
        if state == "has data":
            findings.append(Finding("ok", f"DVC remote {name} answers"))
        elif state == "empty":
            findings.append(Finding("warning", f"DVC remote {name} holds nothing yet; `dvc push` fills it"))
        else:
            cause = " ".join(state.split())[:200]
            findings.append(
                Finding(
                    "problem", f"DVC remote {name} does not answer ({cause}); `dvc remote modify {name}` changes it"
                )
            )
    if not any(default for *_, default in remotes):
        findings.append(Finding("warning", f"no DVC remote is the default; `dvc remote default {remotes[0][0]}`"))
    return findings


# The tracking store


def check_store(root: Path) -> list[Finding]:
    """Does the tracking store open, in the form that this MLflow reads?"""
    try:
        uri = tracking.store_uri(root)
    except tracking.StoreError as error:
        return [Finding("problem", str(error))]
    if uri.startswith(("http://", "https://")):
        import requests

        server = f"the tracking server of MLFLOW_TRACKING_URI, {tracking.public_address(uri)},"
        try:
            status = requests.get(f"{uri.rstrip('/')}/health", timeout=10).status_code
        except requests.RequestException as error:
            return [
                Finding("problem", f"{server} does not answer ({type(error).__name__}); start it or unset the variable")
            ]
        if status >= 500:
            return [Finding("problem", f"{server} answers {status}; its log tells more")]
        return [Finding("ok", f"{server} answers")]
    path = tracking.database_path(uri)
    if path is None:
        return [Finding("ok", "MLFLOW_TRACKING_URI names a store of another kind, which is not checked")]
    return [_check_database(path)]


def _check_database(path: Path) -> Finding:
    if not path.exists():
        return Finding("ok", f"no tracking store yet; the first run makes {path.name}")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)) as store:
            sound = store.execute("PRAGMA quick_check").fetchone()[0]
            have = store.execute("SELECT version_num FROM alembic_version").fetchone()
            runs = store.execute("SELECT count(*) FROM runs").fetchone()[0]
    except sqlite3.Error as error:
        sound, have, runs = str(error), None, 0
    if sound != "ok" or have is None:
        move = ["mv", str(path), f"{path}-damaged"]
        advice = f"bring back a copy, or move it away and the next run makes a new one: `{shlex.join(move)}`"
        return Finding("problem", f"{path} is no sound tracking store ({sound}); {advice}")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.store.db.utils import _get_latest_schema_revision

    needed = _get_latest_schema_revision()
    if have[0] != needed:
        version = importlib.metadata.version("mlflow")
        return Finding(
            "problem",
            f"{path.name} has the layout {have[0]}, but MLflow {version} needs {needed}; copy it, then "
            f"`mlflow db upgrade {shlex.quote(tracking.database_uri(path))}`",
        )
    return Finding("ok", f"{path.name} is sound and holds {_plural(runs, 'run')}")


def check_locations(root: Path) -> list[Finding]:
    """Do MLflow's artifacts lie where its database says?"""
    if not (root / STORE).exists():
        return []
    try:
        with contextlib.closing(sqlite3.connect(f"{(root / STORE).as_uri()}?mode=ro", uri=True, timeout=30)) as store:
            moved = set()
            kept = []
            used = {row[0] for row in store.execute("SELECT experiment_id FROM runs")}
            for table, _, row, location in _locations(store):
                path = artifact_path(location)
                if path is None or path.is_relative_to(root / ARTIFACTS):
                    continue
                if table == "experiments" and row == _DEFAULT_EXPERIMENT and row not in used:
                    continue  # MLflow made it, in the working directory of the first run, and nobody uses it
                if moved_location(location, root) is not None:
                    moved.add((table, row))
                elif table in ("runs", "logged_models"):
                    kept.append(path)
    except sqlite3.Error:
        return []  # told by the check of the store
    findings = []
    if moved:
        text = f"the artifacts of {_rows_text(moved)} are looked for where the repository was before"
        findings.append(Finding("problem", f"{text}; `catdog doctor --fix` has {STORE} look here"))
    if kept:
        number = f"{len(kept)} of MLflow's runs and models keep their artifacts outside the repository"
        findings.append(Finding("warning", f"{number}, e.g. in {kept[0]}; a copy of the repository lacks them"))
    return findings or [Finding("ok", f"MLflow's artifacts are looked for in {ARTIFACTS}/")]


def _rows_text(rows: Collection[tuple[str, int]]) -> str:
    """Counts rows, given by table and number, for people."""
    number = Counter(table for table, _ in rows)
    nouns = {"experiments": "experiment", "runs": "run", "logged_models": "model", "model_versions": "model version"}
    return ", ".join(_plural(number[table], noun) for table, noun in nouns.items() if number[table])


def _locations(store: sqlite3.Connection) -> Iterator[tuple[str, str, int, str]]:
    """Every location in the database: table, column, row and value; an older layout lacks some tables."""
    for table, column in LOCATIONS:
        if column in {row[1] for row in store.execute(f"PRAGMA table_info({table})")}:
            for row, value in store.execute(f"SELECT rowid, {column} FROM {table} WHERE {column} IS NOT NULL"):
                yield table, column, row, value


def moved_location(location: str, root: Path) -> str | None:
    """Returns where an artifact location belongs now that the repository is at `root`.

    It ends in mlruns/<what>, and that is sought in the mlruns/ of this repository.

    Args:
        location: a file:// address or a path, as MLflow stores it; others stay.
        root: of the repository, absolute.

    Returns:
        The new location in the same form; None where it stays: it is in the repository already, it is no part of an
        mlruns/, or its files are where it says and not here.
    """
    path, here = artifact_path(location), root / ARTIFACTS
    if path is None or path.is_relative_to(here) or ARTIFACTS.name not in path.parts:
        return None
    last = len(path.parts) - 1 - path.parts[::-1].index(ARTIFACTS.name)
    new = here.joinpath(*path.parts[last + 1 :])
    if path.exists() and not new.exists():
        return None
    return new.as_uri() if location.startswith("file:") else str(new)


def repair_locations(root: Path) -> list[str]:
    """Has the database look for the artifacts in this repository; returns what it did, for people.

    All in one transaction, after a copy of the database to mlflow.db-backup (or -backup-2 and so on).

    Raises:
        CatdogError: the database cannot be read or written.
    """
    path = root / STORE
    if not path.exists():
        return []
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as store:
            if not any(moved_location(location, root) for *_, location in _locations(store)):
                return []
            backup = _free_name(path.with_name(f"{path.name}-backup"))
            with written_aside(backup) as aside, contextlib.closing(sqlite3.connect(aside)) as copy:
                store.backup(copy)
            store.execute("BEGIN IMMEDIATE")
            rows = set()
            for table, column, row, location in list(_locations(store)):
                if (new := moved_location(location, root)) is not None:
                    store.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))
                    rows.add((table, row))
            store.execute("COMMIT")
    except sqlite3.Error as error:
        raise CatdogError(f"{path} cannot be repaired ({error}); it is as it was") from None
    return [f"the artifacts of {_rows_text(rows)} are looked for in {ARTIFACTS}/ (before: {backup.name})"]


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(name for name in names if not name.exists())


def repair_locks(root: Path) -> list[str]:
    """Takes the locks of dead processes out of DVC's file of locks, or removes it when it is damaged.

    Returns:
        What it did, for people.
    """
    path = root / _RWLOCK
    entries = lock_entries(path)
    if is_locked(path.with_name("rwlock.lock")):
        return []  # somebody is changing it right now
    if entries is None:
        path.unlink()
        return [f"{_RWLOCK} was damaged and is removed"]
    dead = {entry["pid"] for entry in entries if not is_dvc(entry["pid"])}
    if not dead:
        return []
    locks = json.loads(path.read_text(encoding="utf-8"))
    written = {name: entry for name, entry in locks.get("write", {}).items() if entry and entry["pid"] not in dead}
    read = {name: [e for e in found if e["pid"] not in dead] for name, found in locks.get("read", {}).items()}
    write_json(path, {"write": written, "read": {name: found for name, found in read.items() if found}})
    return [f"{_RWLOCK} holds no lock of a dead process any more"]


# Asking other programs


@dataclass(frozen=True)
class _Answer:
    done: bool
    text: str  # what it printed, or in one line why it failed


def _answer(command: list[str], root: Path, *, stderr: bool = True, **environment: str) -> _Answer:
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return _Answer(False, f"{command[0]} is not on PATH")
    except subprocess.TimeoutExpired:
        return _Answer(False, f"no answer in {_SECONDS:.0f} seconds")
    if done.returncode == 0:
        return _Answer(True, done.stdout)
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return _Answer(False, lines[-1][:300] if lines else f"exit code {done.returncode}")


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_programs,
    check_disk,
    check_memory,
    check_weights,
    check_git,
    check_locks,
    check_store,
    check_locations,
    check_pipeline,
    check_remote,
    check_device,
)
