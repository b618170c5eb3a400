"""Every stage in MLflow: one parent run a pipeline run, one child run a stage, also for cached stages.

A stage is one process, so nothing in memory links the stages of a pipeline run. They find their common
parent run by a tag, the pipeline's key: baseline revision and name of a DVC experiment, or, for a plain
`dvc repro`, a hash of the parameters, dvc.yaml and the code.

A store that cannot be used stops a stage before it works, unless `tracking.required` is false.

MLflow is imported late: it takes seconds, and `catdog --help` or a mistake in params.yaml need not wait.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import functools
import gc
import hashlib
import json
import logging
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast
from urllib.parse import unquote, urlsplit

from catdog import paths
from catdog.config import Params, load_params
from catdog.errors import CatdogError
from catdog.files import DISK_IS_FULL, read_json, read_yaml, told_to_users, write_json
from catdog.parallel import process_died
from catdog.signals import Ending, ended_by
from catdog.startup import quick_imports

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

EXPERIMENT = "catdog"
KEY_TAG = "pipeline.key"
STAGE_TAG = "pipeline.stage"
LOCK_TAG = "pipeline.stage_hash"
PLACE_TAG = "pipeline.place"
AWAITS_TRACK_TAG = "pipeline.awaits_track"
CACHED_TAG = "pipeline.cached_from"
PARENT_TAG = "mlflow.parentRunId"
ELSEWHERE = "not in this store"
"""What `CACHED_TAG` says of work that was done in another copy of the repository, or without MLflow."""

BETWEEN_STAGES = "SCHEDULED"
"""The status of a parent run while none of its stages runs, but more may follow."""

SECONDS_TO_ANSWER = 5.0


@dataclass(frozen=True)
class StageFiles:
    """What a stage leaves that `track` can read again when DVC restored the stage from its cache."""

    report: Path  # JSON; its numbers become metrics, its texts parameters
    artifacts: tuple[Path, ...] = ()  # files and folders to show in MLflow


STAGES: Mapping[str, StageFiles] = {
    "download": StageFiles(paths.DOWNLOAD_REPORT),
    "split": StageFiles(paths.DATA_REPORT, (paths.REJECTED, paths.DATA_PAGE, paths.DATA_PICTURES)),
    "preprocess": StageFiles(paths.PREPROCESS_REPORT),
    "embed": StageFiles(paths.FEATURES_INFO, (paths.AUGMENTATION,)),
    "train": StageFiles(paths.TRAIN_REPORT, (paths.HISTORY, paths.LEARNING_CURVES)),
    "evaluate": StageFiles(
        paths.METRICS,
        (paths.PREDICTIONS, paths.TABLES, paths.EVALUATION_PICTURES, paths.REPORT_PAGE, paths.MODEL_CARD),
    ),
}
"""The stages that `track` completes, in the pipeline's order."""

LAST_STAGE = "evaluate"


class StoreError(CatdogError):
    """The tracking store cannot be used."""


@dataclass(frozen=True)
class Recorded:
    """What the store knows a stage's run by."""

    name: str
    params: Params
    run_id: str
    parent_id: str


@dataclass
class StageRun:
    """What a stage script works with: its parameters, and where to put what it finds.

    Either this process writes into the store, or `second` does, beside whatever this one does meanwhile.
    """

    name: str
    params: Params
    root: Path
    store_required: bool = True
    client: MlflowClient | None = None
    second: Executor | None = None  # neither: the store cannot be used, and the stage works without it
    recorded: Recorded | None = None
    _under_way: list[Future[None]] = field(default_factory=list)

    @property
    def has_store(self) -> bool:
        """Whether this run is recorded."""
        return self.recorded is not None and (self.client is not None or self.second is not None)

    def record(self, write: Callable[..., object], *arguments: Any) -> None:
        """Has `write(client, recorded, *arguments)` called where there is a store; a second process may do so later.

        One that fails stops the stage; with `tracking.required: false` that is told instead, and the rest of the
        stage works without it.
        """
        if self.recorded is None:
            return
        if self.second is not None:
            self._under_way.append(self.second.submit(_write_beside, write, self.root, self.recorded, arguments))
            self._settle([future for future in self._under_way if future.done()])
        elif self.client is not None:
            with self.store_may_fail():
                write(self.client, self.recorded, *arguments)

    def settle(self) -> None:
        """Waits until the store has all that was recorded."""
        self._settle(self._under_way)

    def _settle(self, futures: Iterable[Future[None]]) -> None:
        for future in list(futures):
            if not self.has_store:
                break
            self._under_way.remove(future)
            with self.store_may_fail():
                future.result()

    @contextlib.contextmanager
    def store_may_fail(self) -> Iterator[None]:
        """Gives the store up when the block cannot use it, where the stage may do without; else raises StoreError."""
        try:
            yield
        except Exception as error:
            if not _is_store_error(error):
                raise
            told = _describe_store_error(error)
            if self.store_required:
                raise StoreError(f"{told}, or set tracking.required to false to work without it") from error
            self.client = self.second = None
            print(f"catdog {self.name}: {told}; working without MLflow", file=sys.stderr)

    def measure(self, values: Mapping[str, float]) -> None:
        """Logs what differs from run to run (rates, times): MLflow only, never in a stage's output."""
        self.record(_measure, values)

    def note(self, values: Mapping[str, str]) -> None:
        """Logs facts about this very run as tags (device, engine)."""
        self.record(_note, values)

    def log_curves(self, table: Any) -> None:
        """Logs the training's history, a data frame with the columns epoch and CURVES."""
        self.record(_log_own_curves, table.to_dict("records"))

    def log_model(self, model: Path) -> None:
        """Logs a .keras file as an MLflow model that `mlflow models serve` can start."""
        self.record(_log_model, model)

    def finish(self, report: Mapping[str, Any], summary: str) -> None:
        """Writes the stage's report file, logs it with the stage's artifacts, and tells the user in a line.

        The last call of a stage.
        """
        files = STAGES[self.name]
        write_json(files.report, report)
        self.record(_log_own_files)
        self.settle()
        print(f"{self.name}: {summary}", flush=True)


def _measure(client: MlflowClient, recorded: Recorded, values: Mapping[str, float]) -> None:
    _log(client, recorded.run_id, metrics=values)


def _note(client: MlflowClient, recorded: Recorded, values: Mapping[str, str]) -> None:
    _log(client, recorded.run_id, tags=values)


def _log_own_curves(client: MlflowClient, recorded: Recorded, rows: list[dict[str, Any]]) -> None:
    _log_curves(client, recorded.run_id, rows)


def _log_own_files(client: MlflowClient, recorded: Recorded) -> None:
    _log_stage_files(client, recorded.run_id, recorded.name)


def _log_model(client: MlflowClient, recorded: Recorded, model: Path) -> None:
    from catdog.serving import log_served_model

    log_served_model(recorded.run_id, model)


@functools.cache
def _connect_once(root: Path) -> MlflowClient:
    return connect(root)


def _open_beside(name: str, params: Params | None, root: Path) -> Recorded:
    """In the second process: opens the run of a stage that works in the first one."""
    try:
        client = _connect_once(root)
        parent_id, experiment_id = _open_parent(client, root, params, name)
        return _create_run(client, name, params, parent_id, experiment_id)
    except Exception as error:
        raise _without_classes_of_libraries(error) from None


def _write_beside(write: Callable[..., object], root: Path, recorded: Recorded, arguments: tuple[Any, ...]) -> None:
    try:
        write(_connect_once(root), recorded, *arguments)
    except Exception as error:
        raise _without_classes_of_libraries(error) from None


def _without_classes_of_libraries(error: Exception) -> Exception:
    """An error as it can travel between processes: not all exceptions of MLflow and SQLAlchemy can."""
    return StoreError(_describe_store_error(error)) if _is_store_error(error) else error


@contextlib.contextmanager
def stage(
    name: str, second: Executor | None = None, *, meanwhile: Callable[[Params], object] | None = None
) -> Iterator[StageRun]:
    """Runs the body of a stage script as a child run in MLflow.

    MLflow's import takes as long as a fifth of a small stage. With a second process it is done there, beside Keras'
    own in this one, and so is what the stage records. The run is open when the body begins all the same.

    A CatdogError ends the process with its sentence on standard error and exit code 2, and a full disk, a file that
    this user may not use, a second process that died or a tracking store that cannot be used likewise; all mark the run
    FAILED, as every other exception does. SIGTERM and Ctrl-C mark it KILLED.

    Args:
        name: of the stage.
        second: from `second_process`; None: this process writes into the store.
        meanwhile: what this process does while the second one opens the run; it must write no output.
    """
    atexit.register(gc.freeze)  # nothing is left to collect in a process that ends
    started = time.monotonic()
    mistake: CatdogError | None = None
    try:
        root = paths.repository_root()
        params, mistake = _try_load_params()
        with ended_by(signal.SIGTERM, signal.SIGINT):
            with _stage_run(name, params, root, second, meanwhile) as run:
                if mistake is not None:
                    raise mistake
                yield run
                seconds = time.monotonic() - started
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # Linux counts in kB
                run.measure({"seconds": round(seconds, 2), "peak_memory_mb": round(peak, 1)})
            if name == LAST_STAGE or (name in STAGES and nothing_follows(name)):
                # DVC skips `track` where everything came out as dvc.lock says, as in a fresh clone: then this was all.
                run.record(_complete_before_track)
                run.settle()
    except CatdogError as error:
        # A mistake in params.yaml is what to mend first, even where the store cannot be used either.
        _stop(name, str(mistake or error))
    except BrokenProcessPool:
        _stop(name, str(process_died(2)))
    except OSError as error:
        sentence = told_to_users(error)
        if sentence is None:
            raise
        _stop(name, sentence)


def _complete_before_track(client: MlflowClient, recorded: Recorded) -> None:
    complete_parent(client, recorded)
    client.set_tag(recorded.parent_id, AWAITS_TRACK_TAG, "true")


def _stop(name: str, sentence: str) -> NoReturn:
    print(f"catdog {name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _is_store_error(error: Exception) -> bool:
    """Says whether MLflow, or the database or server under it, failed; MLflow is imported late, hence by name."""
    names = ("mlflow", "sqlalchemy", "sqlite3", "requests")
    return isinstance(error, StoreError) or type(error).__module__.partition(".")[0] in names


def _describe_store_error(error: Exception) -> str:
    """One sentence: which store, what happened, what to do."""
    if isinstance(error, StoreError):
        return str(error)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or ""
    cause = " ".join(str(error).split())[:200]
    if password := urlsplit(uri).password:
        cause = cause.replace(password, "***")
    return (
        f"the tracking store {public_address(uri) or 'mlflow.db'} failed ({cause}); check that it can be reached and "
        "that its disk is not full"
    )


def public_address(uri: str) -> str:
    """Returns a store's address without user name and password, fit to be shown."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri


def _try_load_params() -> tuple[Params | None, CatdogError | None]:
    """Loads params.yaml, and keeps a mistake in it for later, so that it is recorded in a FAILED run."""
    try:
        return load_params(paths.PARAMS), None
    except CatdogError as error:
        return None, error


@contextlib.contextmanager
def _stage_run(
    name: str,
    params: Params | None,
    root: Path,
    second: Executor | None,
    meanwhile: Callable[[Params], object] | None,
) -> Iterator[StageRun]:
    # Without parameters the block only raises what is wrong with them.
    run = StageRun(name, cast("Params", params), root, store_required=params is None or params.tracking.required)
    status, cause = "FAILED", ""
    try:
        with ended_by(signal.SIGTERM, signal.SIGINT) as ending:
            if second is None:
                _open_here(run, params, ending)
            else:
                opening = second.submit(_open_beside, name, params, root)
                try:
                    if params is not None and meanwhile is not None:
                        meanwhile(params)
                finally:
                    # Whatever happens to the first process: there is a run to be marked.
                    with ending.afterwards(), run.store_may_fail():
                        run.recorded, run.second = opening.result(), second
            yield run
            run.settle()
        status = "FINISHED"
    except SystemExit:
        status = "KILLED"
        raise
    except BrokenProcessPool:
        cause = str(process_died(2))
        # Nobody is left there to mark the run.
        run._under_way.clear()
        with contextlib.suppress(Exception):
            run.client, run.second = connect(root), None
        raise
    except BaseException as error:
        cause = str(error)
        raise
    finally:
        if status == "FINISHED":
            run.record(_end_stage)
            run.settle()
        else:
            # The error under way tells more than one about a store that cannot be written either.
            with contextlib.suppress(Exception):
                run.record(_mark, status, cause)
                run.settle()


def _open_here(run: StageRun, params: Params | None, ending: Ending) -> None:
    with run.store_may_fail():
        client = connect(run.root)
        parent_id, experiment_id = _open_parent(client, run.root, params, run.name)
        with ending.afterwards():  # else nobody would know which run to mark
            run.recorded, run.client = _create_run(client, run.name, params, parent_id, experiment_id), client


def _create_run(client: MlflowClient, name: str, params: Params | None, parent_id: str, experiment_id: str) -> Recorded:
    tags = {PARENT_TAG: parent_id, STAGE_TAG: name, **_context_tags()}
    run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    if params is not None:
        _log(client, run_id, params=_stage_params(name, params))
    return Recorded(name, cast("Params", params), run_id, parent_id)


def _end_stage(client: MlflowClient, recorded: Recorded) -> None:
    client.set_terminated(recorded.run_id, "FINISHED")
    if recorded.name in STAGES:
        # Nobody knows whether DVC will start another stage: `dvc repro train` will not.
        client.update_run(recorded.parent_id, status=BETWEEN_STAGES)


def _mark(client: MlflowClient, recorded: Recorded, status: str, cause: str) -> None:
    """Ends the run of a stage that did not come to its end, and its parent."""
    if cause:
        with contextlib.suppress(Exception):
            client.set_tag(recorded.run_id, "error", cause[:5000])
    client.set_terminated(recorded.run_id, status)
    client.set_terminated(recorded.parent_id, status)


def connect(root: Path) -> MlflowClient:
    """Opens the tracking store: MLFLOW_TRACKING_URI where the user set it, else mlflow.db and mlruns/ in `root`.

    Raises:
        StoreError: it does not answer within seconds, or cannot be opened.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow's own limits, seven retries of two minutes, keep silent for a quarter of an hour when a server hangs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # They print the trace of an error that is raised as well, and a line for each retry.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with quick_imports():
        from filelock import FileLock
        from mlflow import MlflowClient, set_tracking_uri

    uri = store_uri(root)
    set_tracking_uri(uri)
    lock = _store_lock(uri, root)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that create the database at once, which the client's constructor does, fail in its migration.
        with FileLock(lock), quick_imports():
            _require_answer(uri)
            client = MlflowClient(tracking_uri=uri)
            _require_experiment(client, _artifact_location(uri, root))
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in DISK_IS_FULL
        if full or not (isinstance(error, OSError | ImportError) or _is_store_error(error)):
            raise
        cause = _first_cause(error)
        if password := urlsplit(uri).password:
            cause = cause.replace(password, "***")
        if uri.startswith("sqlite"):
            advice = "check the path, and that the file is a store of this version of MLflow on a disk that is not full"
        else:
            advice = "check that it can be reached"
        raise StoreError(f"the tracking store {public_address(uri)} failed ({cause}); {advice}") from None
    return client


def store_uri(root: Path) -> str:
    """Returns the address of the tracking store: MLFLOW_TRACKING_URI, or the database mlflow.db in `root`.

    A relative path of a database starts at `root`, as in the copies of the repository in which DVC works for
    `dvc exp run --temp` and the queue, and which it deletes.

    Raises:
        StoreError: the variable holds what is no address.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return database_uri(root / "mlflow.db")
    if not _is_address(uri):
        # Without the address or the cause: both may show a password.
        raise StoreError(
            "MLFLOW_TRACKING_URI is no address, its host or port cannot be read; mend it, and write signs as / and @ "
            "in a password as %2F and %40"
        )
    path = database_path(uri)
    return uri if path is None or path.is_absolute() else database_uri(root / path) + _query(uri)


def _is_address(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        # Those of Databricks hold something else where others have a port.
        return parts.scheme.partition("+")[0] not in ("http", "https", *_DATABASE_PORTS) or parts.port != 0
    except ValueError:
        return False


def database_uri(path: Path) -> str:
    """Returns the address of a database file, as SQLAlchemy decodes it."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    # By the plain name MLflow makes the folder of this text, quotes and all, beside the one that is meant.
    return f"{'sqlite' if quoted == str(path) else 'sqlite+pysqlite'}:///{quoted}"


def database_path(uri: str) -> Path | None:
    """Returns the file of a store that is a database file, relative as in its address; None for every other store."""
    found = re.fullmatch(r"sqlite(?:\+pysqlite)?:///([^?]*)(?:\?.*)?", uri)
    return Path(unquote(found[1])) if found else None


def _query(uri: str) -> str:
    _, mark, query = uri.partition("?")
    return mark + query


def _store_lock(uri: str, root: Path) -> Path:
    """The file that keeps others on this machine from creating the same store."""
    path = database_path(uri)
    if path == root / "mlflow.db":
        return root / ".dvc" / "tmp" / "mlflow.lock"
    if path is not None:
        return Path(f"{path}.lock")
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"catdog-{os.getuid()}" / f"{name}.lock"


def _artifact_location(uri: str, root: Path) -> str | None:
    """Where the files of a new experiment go; None: its server knows.

    MLflow itself would fix the place from the working directory, which may be a copy that DVC deletes.
    """
    if (path := database_path(uri)) is not None:
        return (path.parent / "mlruns").as_uri()
    return (root / "mlruns").as_uri() if uri.startswith(tuple(_DATABASE_PORTS)) else None


_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def _require_answer(uri: str) -> None:
    """Raises what went wrong at the first attempt: MLflow itself tries again for minutes before it says a word."""
    from mlflow.store.db.utils import create_sqlalchemy_engine
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind in ("http", "https"):
        answer = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            timeout=SECONDS_TO_ANSWER,
            max_retries=0,
            raise_on_status=False,
        )
        if answer.status_code >= 500:
            raise StoreError(f"it answers {answer.status_code} {answer.reason}")
    if kind in _DATABASE_PORTS and parts.hostname:
        # Database drivers wait for minutes for a machine that drops what it gets.
        address = (parts.hostname, parts.port or _DATABASE_PORTS[kind])
        socket.create_connection(address, timeout=SECONDS_TO_ANSWER).close()
    if kind in _DATABASE_PORTS or kind == "sqlite":
        engine = create_sqlalchemy_engine(uri)
        engine.connect().close()
        engine.dispose()


def _require_experiment(client: MlflowClient, location: str | None) -> None:
    from mlflow.exceptions import MlflowException

    if client.get_experiment_by_name(experiment_name()) is not None:
        return
    try:
        client.create_experiment(experiment_name(), artifact_location=location)
    except MlflowException:
        # A pipeline on another machine may have been faster.
        if client.get_experiment_by_name(experiment_name()) is None:
            raise


def _first_cause(error: BaseException) -> str:
    """What the innermost error says: those around it name the same address again and again."""
    while (inner := error.__cause__ or error.__context__) and not isinstance(inner, LookupError):
        error = inner
    return " ".join(str(error).split())[:200]


def experiment_name() -> str:
    """Returns the MLflow experiment's name: MLFLOW_EXPERIMENT_NAME, else catdog."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def pipeline_experiment(client: MlflowClient) -> Experiment:
    """Returns the MLflow experiment that takes new runs.

    Args:
        client: from `connect`.

    Raises:
        StoreError: a person deleted it in MLflow, which keeps its name but takes no run into it.
    """
    experiment = client.get_experiment_by_name(experiment_name())
    if experiment.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        if database_path(client.tracking_uri) is not None:  # others are in the environment already, passwords and all
            restore = f"MLFLOW_TRACKING_URI={shlex.quote(client.tracking_uri)} {restore}"
        raise StoreError(
            f"the MLflow experiment {experiment.name} was deleted; `{restore}` restores it, or set "
            "MLFLOW_EXPERIMENT_NAME to another name"
        )
    return experiment


def pipeline_key(root: Path) -> tuple[str, str]:
    """Returns the key that the stages of one pipeline run share, and the run's name."""
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return experiment_key(root, os.environ.get("DVC_EXP_BASELINE_REV", ""), name), name
    digest = hashlib.sha256()
    for path in (
        paths.PARAMS,
        Path("dvc.yaml"),
        *sorted(Path("src").rglob("*.py")),
        *sorted(Path("stages").glob("*.py")),
    ):
        digest.update(f"{path}\0".encode() + path.read_bytes() + b"\0")
    return f"{pipeline_place(root)}:repro:{digest.hexdigest()}", f"repro-{digest.hexdigest()[:7]}"


def experiment_key(root: Path, baseline: str, name: str) -> str:
    """Returns the key that the stages of a DVC experiment share, given the revision it starts from and its name."""
    return f"{pipeline_place(root)}:exp:{baseline}:{_quotable(name)}"


def pipeline_place(root: Path) -> str:
    """Returns what tells two copies of the repository apart that share one tracking server."""
    return f"{socket.gethostname()}:{_quotable(str(root))}"


def _quotable(text: str) -> str:
    """A text as it can stand in quotes in a filter of MLflow, whose grammar has no sign to escape a quote with."""
    return re.sub(r"""[%'"\\]""", lambda sign: f"%{ord(sign[0]):02X}", text)


def _open_parent(client: MlflowClient, root: Path, params: Params | None, stage_name: str) -> tuple[str, str]:
    """Finds or creates the parent run of this pipeline run; returns its identifier and its experiment's.

    One with the same parameters that did not finish is taken up again, whether it waits for its next stage, failed
    or was killed; one that FINISHED belongs to an earlier pipeline run with the same parameters, so this one gets its
    own. Only `track` takes up one that ended with the last stage before it.

    DVC lets an experiment that failed be run again under its name with other parameters. Those get a parent of their
    own, and what was left going on under that name is marked KILLED.
    """
    key, name = pipeline_key(root)
    experiment = pipeline_experiment(client)
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", order_by=["attributes.start_time DESC"]
    )
    wanted = None if params is None else _stored(params.flat())
    # Without parameters, of a params.yaml with a mistake, nobody can tell; one that has none yet may be anyone's.
    parent = next((run for run in found if wanted is None or run.data.params in ({}, wanted)), None)
    if parent is not None and parent.info.status == "FINISHED":
        awaits = stage_name == "track" and parent.data.tags.get(AWAITS_TRACK_TAG) == "true"
        parent = parent if awaits else None
    if parent is None:
        place = pipeline_place(root)
        if "DVC_EXP_NAME" not in os.environ:
            # DVC lets one repro work in a place at a time: one that goes on there was cut off, or the code was
            # edited under it, which changes its key.
            for status in ("RUNNING", BETWEEN_STAGES):
                going_on = f"tags.`{PLACE_TAG}` = '{place}' and attributes.status = '{status}'"
                for stale in client.search_runs([experiment.experiment_id], going_on):
                    client.set_terminated(stale.info.run_id, "KILLED")
        # One that another process is at work on, by `dvc exp run --temp`, takes itself up again with its next stage.
        for stale in found:
            if stale.info.status in ("RUNNING", BETWEEN_STAGES):
                client.set_terminated(stale.info.run_id, "KILLED")
        tags = {KEY_TAG: key, **_context_tags()}
        if "DVC_EXP_NAME" not in os.environ:
            tags[PLACE_TAG] = place
        parent = client.create_run(experiment.experiment_id, tags=tags, run_name=name)
    elif parent.info.status != "RUNNING":
        client.update_run(parent.info.run_id, status="RUNNING")
    if params is not None:
        _log(client, parent.info.run_id, params=params.flat())
    return parent.info.run_id, parent.info.experiment_id


def _context_tags() -> dict[str, str]:
    """Git revision, whether the working tree differs from it, and the DVC experiment's name."""

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    # In a copy of the repository (--temp, queue) HEAD is DVC's own commit; the baseline is what people know.
    tags = {
        "mlflow.source.git.commit": os.environ.get("DVC_EXP_BASELINE_REV") or git("rev-parse", "HEAD"),
        "git.dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        "mlflow.source.name": "dvc.yaml",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
    }
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.exp_name"] = name
    return {key: value for key, value in tags.items() if value}


def _stage_params(name: str, params: Params) -> dict[str, str]:
    """The parameters that dvc.yaml names for a stage, so that a child run shows what it depends on."""
    pipeline = read_yaml(Path("dvc.yaml"))
    named = [entry for entry in pipeline["stages"][name].get("params", []) if isinstance(entry, str)]
    return {
        key: value
        for key, value in params.flat().items()
        if any(key == entry or key.startswith(f"{entry}.") for entry in named)
    }


def _log(
    client: MlflowClient,
    run_id: str,
    *,
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Logs parameters, metrics and tags in one call."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), now, 0) for name, value in (metrics or {}).items()],
        params=[Param(name, value) for name, value in _stored(params or {}).items()],
        tags=[RunTag(name, value) for name, value in (tags or {}).items()],
    )


def _stored(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters as the store has them: it takes texts of 6,000 characters."""
    return {name: value[:6000] for name, value in params.items()}


CURVES = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
"""The columns of the training's history, each a metric with a value an epoch."""


def _log_curves(client: MlflowClient, run_id: str, rows: Iterable[Mapping[str, Any]], prefix: str = "") -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(prefix + name, float(row[name]), now, int(float(row["epoch"]))) for row in rows for name in CURVES]
    for start in range(0, len(points), 1000):  # MLflow takes a thousand at a time
        client.log_batch(run_id, metrics=points[start : start + 1000])


def flatten_report(report: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, float], dict[str, str]]:
    """Splits a report into metrics (numbers) and parameters (texts), by dotted names; lists are texts."""
    metrics: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in report.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner_metrics, inner_texts = flatten_report(value, f"{name}.")
            metrics |= inner_metrics
            texts |= inner_texts
        elif isinstance(value, int | float) and not isinstance(value, bool):
            metrics[name] = value
        elif value is not None:
            texts[name] = value if isinstance(value, str) else json.dumps(value)
    # Class names may hold signs that MLflow refuses in a name.
    return {_clean(name): value for name, value in metrics.items()}, {_clean(n): t for n, t in texts.items()}


def _clean(name: str) -> str:
    return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name)


def _log_stage_files(client: MlflowClient, run_id: str, name: str) -> None:
    files = STAGES[name]
    metrics, texts = flatten_report(read_json(files.report))
    # A text that is a parameter already would clash with it; MLflow refuses another value.
    known = client.get_run(run_id).data.params
    _log(client, run_id, metrics=metrics, params={n: t for n, t in texts.items() if n not in known})
    client.log_artifact(run_id, str(files.report))
    for path in files.artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), artifact_path=path.name)
        else:
            client.log_artifact(run_id, str(path))


def log_data_hash(run: StageRun, data: Path) -> None:
    """Names the data of a stage's run by the hash under which DVC keeps it (MLflow's "dataset" column)."""
    run.record(_log_data_hash, data)


def _log_data_hash(client: MlflowClient, recorded: Recorded, data: Path, run_id: str = "") -> None:
    """Names the data of a stage's own run, or of another one."""
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST, ErrorCode

    out = dvc_outs().get(data.as_posix())
    if out is None:
        return
    source = get_dataset_source_from_json(json.dumps({"uri": data.as_posix()}), "local")
    dataset = MetaDataset(source, name=recorded.params.dataset[-200:], digest=out[:36])
    entity = dataset._to_mlflow_entity()
    inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", recorded.name)])]
    try:
        client.log_inputs(run_id or recorded.run_id, inputs)
    except MlflowException as error:
        # MLflow looks for the data set and then adds it: it fails where another pipeline adds the same one in between,
        # and finds that one the next time.
        if error.error_code != ErrorCode.Name(BAD_REQUEST):
            raise
        client.log_inputs(run_id or recorded.run_id, inputs)


def _locked_stages(lock: Path) -> dict[str, Any]:
    """The stages' entries in dvc.lock, by name; none before the first run."""
    content = read_yaml(lock) if lock.exists() else None
    stages: dict[str, Any] = (content or {}).get("stages", {})
    return stages


def dvc_outs(lock: Path = Path("dvc.lock")) -> dict[str, str]:
    """Returns DVC's hash of every output that dvc.lock knows, by path."""
    return {
        out["path"]: out["md5"]
        for entry in _locked_stages(lock).values()
        for out in entry.get("outs", [])
        if "md5" in out
    }


def stage_hashes(lock: Path = Path("dvc.lock")) -> dict[str, str]:
    """Returns a hash of every stage's entry in dvc.lock: equal when a stage did the same work."""
    return {
        name: hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:32]
        for name, entry in _locked_stages(lock).items()
    }


def nothing_follows(name: str) -> bool:
    """Says whether DVC will skip all that comes after a stage that has just done its work.

    So it is where outputs had been lost, from DVC's cache too, and came out as before.
    """
    locked = _locked_stages(Path("dvc.lock")).get("track", {}).get("deps", [])
    params = [dep["md5"] for dep in locked if dep["path"] == paths.PARAMS.as_posix()]
    # Asking DVC takes a second; these settle the matter in most runs.
    if params != [dvc_hash(paths.PARAMS)] or not all(Path(path).exists() for path in dvc_outs()):
        return False
    with quick_imports():
        from dvc.repo import Repo
    with Repo() as repo:
        # Not by `dvc status`: that waits for the DVC which runs this stage.
        return not any(_is_changed(other, done=other.name == name) for other in repo.index.stages)


def _is_changed(stage: Any, *, done: bool) -> bool:
    """Says whether DVC would run a stage (dvc.stage.Stage); one that is `done` has outputs that are not cached yet."""
    found = [dep.workspace_status() for dep in stage.deps]
    found += [out.workspace_status() if done else out.status() for out in stage.outs]
    return stage.cmd_changed or any(found)


def dvc_hash(path: Path) -> str:
    """Returns the hash by which dvc.lock names a file (its MD5) or a folder (the MD5 of a list of its files)."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    # As .dvcignore has it, the interpreter's files do not count.
    files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    listing = [{"md5": dvc_hash(files[name]), "relpath": name.as_posix()} for name in sorted(files, key=Path.as_posix)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def track(run: StageRun) -> None:
    """Completes the parent run, as `complete_parent`, and tells what of this pipeline run is not in MLflow."""
    run.record(_track)
    if not run.has_store:
        print(
            "track: this run is not in MLflow, or not all of it; its numbers, pictures and model are in reports/ and "
            "models/, and `dvc repro --single-item --force track` records them when the store can be reached, but for "
            "times, rates and curves",
            flush=True,
        )


def _track(client: MlflowClient, recorded: Recorded) -> None:
    name = complete_parent(client, recorded)
    parent = client.get_run(recorded.parent_id)
    unmeasured = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`{PARENT_TAG}` = '{recorded.parent_id}' and tags.`{CACHED_TAG}` = '{ELSEWHERE}'",
        order_by=["attributes.start_time ASC"],
    )
    stages = ", ".join(child.data.tags[STAGE_TAG] for child in unmeasured)
    lacking = f", without times and curves of {stages}, done elsewhere or without MLflow" if stages else ""
    print(f"track: run {name!r} is complete{lacking}; compare runs with `mlflow ui`", flush=True)


def complete_parent(client: MlflowClient, recorded: Recorded) -> str:
    """Makes the parent run complete, ends it, and returns its name.

    Stages that DVC skipped or restored get a child run "<stage> (cached)" from their report files, linked
    to the run that did the work where this store knows it; children that a killed process left RUNNING
    become KILLED; every metric of the children, and the data's hash, is copied to the parent, because the
    runs table compares parents.
    """
    parent = client.get_run(recorded.parent_id)
    parent_id, experiment_id = parent.info.run_id, parent.info.experiment_id
    # Newest last, so that a stage's latest attempt wins.
    children = client.search_runs(
        [experiment_id], f"tags.`{PARENT_TAG}` = '{parent_id}'", order_by=["attributes.start_time ASC"]
    )
    done: dict[str, Run] = {}
    for child in children:
        name = child.data.tags.get(STAGE_TAG, "")
        if child.info.status == "RUNNING" and child.info.run_id != recorded.run_id:
            client.set_terminated(child.info.run_id, "KILLED")
        elif child.info.status == "FINISHED" and name in STAGES:
            done[name] = child
    hashes = stage_hashes()
    for name in STAGES:
        if name in done and CACHED_TAG not in done[name].data.tags:
            client.set_tag(done[name].info.run_id, LOCK_TAG, hashes.get(name, ""))
        elif name not in done:
            done[name] = _replay(client, recorded, name, experiment_id, hashes.get(name, ""))
    metrics: dict[str, float] = {}
    for name, child in done.items():
        values = client.get_run(child.info.run_id).data.metrics
        # The test metrics keep their plain names; they are what people compare.
        plain = set(flatten_report(read_json(STAGES[name].report))[0]) if name == "evaluate" else set()
        metrics |= {key if key in plain else f"{name}.{key}": value for key, value in values.items()}
    curves = {f"train.{name}" for name in CURVES}
    _log(client, parent_id, metrics={name: value for name, value in metrics.items() if name not in curves})
    if not curves & parent.data.metrics.keys():
        with paths.HISTORY.open(encoding="utf-8", newline="") as history:
            _log_curves(client, parent_id, csv.DictReader(history), prefix="train.")
    _log_data_hash(client, recorded, paths.RAW, parent_id)
    _log(client, parent_id, tags={f"dvc.out.{path}": digest for path, digest in dvc_outs().items()})
    for file in (paths.LEARNING_CURVES, paths.METRICS, paths.REPORT_PAGE, paths.MODEL_CARD):
        client.log_artifact(parent_id, str(file))
    client.log_artifacts(parent_id, str(paths.EVALUATION_PICTURES), artifact_path=paths.EVALUATION_PICTURES.name)
    client.set_tag(parent_id, AWAITS_TRACK_TAG, "false")
    client.set_terminated(parent_id, "FINISHED")
    return str(parent.info.run_name)


def _replay(client: MlflowClient, recorded: Recorded, name: str, experiment_id: str, stage_hash: str) -> Run:
    """Creates the child run of a stage that DVC did not have to run."""
    originals = client.search_runs(
        [experiment_id],
        f"tags.`{LOCK_TAG}` = '{stage_hash}' and tags.`{STAGE_TAG}` = '{name}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    original = originals[0] if originals and stage_hash else None
    tags = {
        PARENT_TAG: recorded.parent_id,
        STAGE_TAG: name,
        CACHED_TAG: original.info.run_id if original else ELSEWHERE,
        **_context_tags(),
    }
    child = client.create_run(experiment_id, tags=tags, run_name=f"{name} (cached)")
    run_id = child.info.run_id
    _log(client, run_id, params=_stage_params(name, recorded.params))
    if original is not None:
        # What the work cost when it was done: times and rates are in no report file.
        _log(client, run_id, metrics=original.data.metrics)
    _log_stage_files(client, run_id, name)
    client.set_terminated(run_id, "FINISHED")
    return child
