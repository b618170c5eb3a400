"""Every stage in MLflow: one parent run a pipeline run, one child run a stage, also for cached stages.

A stage is one process, so nothing in memory links the stages of a pipeline run. They find their common
parent run by a tag, the pipeline's key: baseline revision and name of a DVC experiment, or, for a plain
`dvc repro`, a hash of the parameters, dvc.yaml and the code.

MLflow is imported late: it takes seconds, and `catdog --help` or a mistake in params.yaml need not wait.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from catdog import paths
from catdog.config import Params, load_params
from catdog.errors import CatdogError
from catdog.files import read_json, write_json
from catdog.startup import quick_imports

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "catdog"
KEY_TAG = "pipeline.key"
STAGE_TAG = "pipeline.stage"
LOCK_TAG = "pipeline.stage_hash"
PLACE_TAG = "pipeline.place"
AWAITS_TRACK_TAG = "pipeline.awaits_track"
CACHED_TAG = "pipeline.cached_from"
PARENT_TAG = "mlflow.parentRunId"


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
    "evaluate": StageFiles(paths.METRICS, (paths.PREDICTIONS, paths.ROC, paths.EVALUATION_PICTURES)),
}
"""The stages that `track` completes, in the pipeline's order."""

LAST_STAGE = "evaluate"


@dataclass
class StageRun:
    """What a stage script works with: its parameters, and where to put what it finds."""

    name: str
    params: Params
    root: Path
    client: MlflowClient
    run_id: str

    def measure(self, values: Mapping[str, float]) -> None:
        """Logs what differs from run to run (rates, times): MLflow only, never in a stage's output."""
        _log(self.client, self.run_id, metrics=values)

    def note(self, values: Mapping[str, str]) -> None:
        """Logs facts about this very run as tags (device, engine)."""
        for name, value in values.items():
            self.client.set_tag(self.run_id, name, value)

    def log_curves(self, table: Any) -> None:
        """Logs a data frame with a column `epoch`: each other column is a metric with a value an epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(str(name), float(row[name]), now, int(row["epoch"]))
            for row in table.to_dict("records")
            for name in table.columns
            if name != "epoch"
        ]
        for start in range(0, len(points), 1000):  # MLflow takes a thousand at a time
            self.client.log_batch(self.run_id, metrics=points[start : start + 1000])

    def finish(self, report: Mapping[str, Any], summary: str) -> None:
        """Writes the stage's report file, logs it with the stage's artifacts, and tells the user in a line.

        The last call of a stage.
        """
        files = STAGES[self.name]
        write_json(files.report, report)
        _log_stage_files(self.client, self.run_id, self.name)
        print(f"{self.name}: {summary}", flush=True)


@contextlib.contextmanager
def stage(name: str) -> Iterator[StageRun]:
    """Runs the body of a stage script as a child run in MLflow.

    A CatdogError ends the process with its sentence on standard error and exit code 2, and a full disk
    likewise; both mark the run FAILED, as every other exception does. SIGTERM marks it KILLED.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    atexit.register(gc.freeze)  # nothing is left to collect in a process that ends
    started = time.monotonic()
    try:
        root = paths.repository_root()
        params, mistake = _try_load_params()
        with _stage_run(name, params, root) as (client, run_id):
            if mistake is not None:
                raise mistake
            assert params is not None
            run = StageRun(name, params, root, client, run_id)
            yield run
            seconds = time.monotonic() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # Linux counts in kB
            run.measure({"seconds": round(seconds, 2), "peak_memory_mb": round(peak, 1)})
        if name == LAST_STAGE:
            # DVC skips `track` where everything came out as dvc.lock says, as in a fresh clone: then this was all.
            complete_parent(run)
            parent_id = client.get_run(run_id).data.tags[PARENT_TAG]
            client.set_tag(parent_id, AWAITS_TRACK_TAG, "true")
    except CatdogError as error:
        _stop(name, str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            place = error.filename or "the disk"
            _stop(name, f"no space left for {place}; free some (`dvc gc --workspace`) and run again")
        raise
    except Exception as error:
        if not _is_store_error(error):
            raise
        cause = " ".join(str(error).split())[:200]
        _stop(
            name,
            f"the tracking store {os.environ.get('MLFLOW_TRACKING_URI') or 'mlflow.db'} failed ({cause}); check that "
            "it can be reached and that its disk is not full",
        )


def _stop(name: str, sentence: str) -> NoReturn:
    print(f"catdog {name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _is_store_error(error: Exception) -> bool:
    """Says whether MLflow, or the database or server under it, failed; MLflow is imported late, hence by name."""
    return type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy", "sqlite3", "requests")


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _try_load_params() -> tuple[Params | None, CatdogError | None]:
    """Loads params.yaml, and keeps a mistake in it for later, so that it is recorded in a FAILED run."""
    try:
        return load_params(paths.PARAMS), None
    except CatdogError as error:
        return None, error


@contextlib.contextmanager
def _stage_run(name: str, params: Params | None, root: Path) -> Iterator[tuple[MlflowClient, str]]:
    client = connect(root)
    parent = _find_or_create_parent(client, root, params, name)
    tags = {PARENT_TAG: parent.info.run_id, STAGE_TAG: name, **_context_tags()}
    run_id = client.create_run(parent.info.experiment_id, tags=tags, run_name=name).info.run_id
    status = "FAILED"
    try:
        if params is not None:
            _log(client, run_id, params=_stage_params(name, params))
        yield client, run_id
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    except BaseException as error:
        with contextlib.suppress(Exception):
            client.set_tag(run_id, "error", str(error)[:5000])
        raise
    finally:
        if status == "FINISHED":
            client.set_terminated(run_id, status)
        else:
            # The error under way tells more than one about a store that cannot be written either.
            with contextlib.suppress(Exception):
                client.set_terminated(run_id, status)
                client.set_terminated(parent.info.run_id, status)


def connect(root: Path) -> MlflowClient:
    """Opens the tracking store: MLFLOW_TRACKING_URI where the user set it, else mlflow.db and mlruns/ in `root`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow's own seven retries keep silent for minutes when a server does not answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # It prints the trace of an error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with quick_imports():
        from filelock import FileLock
        from mlflow import MlflowClient, set_tracking_uri

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    local = not uri
    uri = uri or f"sqlite:///{root / 'mlflow.db'}"
    set_tracking_uri(uri)
    lock = _store_lock(uri, root)
    lock.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create the database at once, which the client's constructor does, fail in its migration.
    with FileLock(lock), quick_imports():
        client = MlflowClient(tracking_uri=uri)
        if client.get_experiment_by_name(experiment_name()) is None:
            # Without a location of its own, MLflow fixes the artifacts' place from the working directory.
            location = (root / "mlruns").as_uri() if local else None
            client.create_experiment(experiment_name(), artifact_location=location)
    return client


def _store_lock(uri: str, root: Path) -> Path:
    """The file that keeps others from creating the same store: beside a database that the user named."""
    named = uri.removeprefix("sqlite:///")
    if named != uri and Path(named) != root / "mlflow.db":
        return Path(f"{named}.lock")
    return root / ".dvc" / "tmp" / "mlflow.lock"


def experiment_name() -> str:
    """Returns the MLflow experiment's name: MLFLOW_EXPERIMENT_NAME, else catdog."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def pipeline_key(root: Path) -> tuple[str, str]:
    """Returns the key that the stages of one pipeline run share, and the run's name."""
    place = pipeline_place(root)
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return f"{place}:exp:{os.environ.get('DVC_EXP_BASELINE_REV', '')}:{name}", name
    digest = hashlib.sha256()
    for path in (
        paths.PARAMS,
        Path("dvc.yaml"),
        *sorted(Path("src").rglob("*.py")),
        *sorted(Path("stages").glob("*.py")),
    ):
        digest.update(f"{path}\0".encode() + path.read_bytes() + b"\0")
    return f"{place}:repro:{digest.hexdigest()}", f"repro-{digest.hexdigest()[:7]}"


def pipeline_place(root: Path) -> str:
    """Returns what tells two copies of the repository apart that share one tracking server."""
    return f"{socket.gethostname()}:{root}"


def _find_or_create_parent(client: MlflowClient, root: Path, params: Params | None, stage_name: str) -> Run:
    """Returns the parent run of this pipeline run.

    One that is RUNNING, FAILED or KILLED is taken up again; one that FINISHED belongs to an earlier
    pipeline run with the same parameters, so this one gets its own. Only `track` takes up one that ended with
    the last stage before it.
    """
    key, name = pipeline_key(root)
    experiment = client.get_experiment_by_name(experiment_name())
    found = client.search_runs(
        [experiment.experiment_id],
        f"tags.`{KEY_TAG}` = '{key}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    parent = found[0] if found else None
    if parent is not None and parent.info.status == "FINISHED":
        awaits = stage_name == "track" and parent.data.tags.get(AWAITS_TRACK_TAG) == "true"
        parent = parent if awaits else None
    if parent is None:
        place = pipeline_place(root)
        if "DVC_EXP_NAME" not in os.environ:
            # DVC lets one repro work in a place at a time: one that is still RUNNING there was cut off, or
            # the code was edited under it, which changes its key.
            for stale in client.search_runs(
                [experiment.experiment_id], f"tags.`{PLACE_TAG}` = '{place}' and attributes.status = 'RUNNING'"
            ):
                client.set_terminated(stale.info.run_id, "KILLED")
        tags = {KEY_TAG: key, **_context_tags()}
        if "DVC_EXP_NAME" not in os.environ:
            tags[PLACE_TAG] = place
        parent = client.create_run(experiment.experiment_id, tags=tags, run_name=name)
    elif parent.info.status != "RUNNING":
        client.update_run(parent.info.run_id, status="RUNNING")
    if params is not None:
        _log(client, parent.info.run_id, params=params.flat())
    return parent


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
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))
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
) -> None:
    """Logs parameters and metrics in one call."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), now, 0) for name, value in (metrics or {}).items()],
        params=[Param(name, value[:6000]) for name, value in (params or {}).items()],
    )


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
    _log_data_hash(run, run.run_id, data)


def _log_data_hash(run: StageRun, run_id: str, data: Path) -> None:
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    out = dvc_outs().get(data.as_posix())
    if out is None:
        return
    source = get_dataset_source_from_json(json.dumps({"uri": data.as_posix()}), "local")
    dataset = MetaDataset(source, name=run.params.dataset[-200:], digest=out[:36])
    entity = dataset._to_mlflow_entity()
    run.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", run.name)])])


def _locked_stages(lock: Path) -> dict[str, Any]:
    """The stages' entries in dvc.lock, by name; none before the first run."""
    content = yaml.safe_load(lock.read_text(encoding="utf-8")) if lock.exists() else None
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


def complete_parent(run: StageRun) -> str:
    """Makes the parent run complete, ends it, and returns its name.

    Stages that DVC skipped or restored get a child run "<stage> (cached)" from their report files, linked
    to the run that did the work where this store knows it; children that a killed process left RUNNING
    become KILLED; every metric of the children, and the data's hash, is copied to the parent, because the
    runs table compares parents.
    """
    client = run.client
    parent = client.get_run(client.get_run(run.run_id).data.tags[PARENT_TAG])
    parent_id, experiment_id = parent.info.run_id, parent.info.experiment_id
    # Newest last, so that a stage's latest attempt wins.
    children = client.search_runs(
        [experiment_id], f"tags.`{PARENT_TAG}` = '{parent_id}'", order_by=["attributes.start_time ASC"]
    )
    done: dict[str, Run] = {}
    for child in children:
        name = child.data.tags.get(STAGE_TAG, "")
        if child.info.status == "RUNNING" and child.info.run_id != run.run_id:
            client.set_terminated(child.info.run_id, "KILLED")
        elif child.info.status == "FINISHED" and name in STAGES:
            done[name] = child
    hashes = stage_hashes()
    for name in STAGES:
        if name in done and CACHED_TAG not in done[name].data.tags:
            client.set_tag(done[name].info.run_id, LOCK_TAG, hashes.get(name, ""))
        elif name not in done:
            done[name] = _replay(run, name, parent_id, experiment_id, hashes.get(name, ""))
    metrics: dict[str, float] = {}
    for name, child in done.items():
        values = client.get_run(child.info.run_id).data.metrics
        # The test metrics keep their plain names; they are what people compare.
        plain = set(flatten_report(read_json(STAGES[name].report))[0]) if name == "evaluate" else set()
        metrics |= {key if key in plain else f"{name}.{key}": value for key, value in values.items()}
    _log(client, parent_id, metrics=metrics)
    _log_data_hash(run, parent_id, paths.RAW)
    for path, digest in dvc_outs().items():
        client.set_tag(parent_id, f"dvc.out.{path}", digest)
    for file in (paths.LEARNING_CURVES, paths.METRICS):
        client.log_artifact(parent_id, str(file))
    client.log_artifacts(parent_id, str(paths.EVALUATION_PICTURES), artifact_path=paths.EVALUATION_PICTURES.name)
    client.set_tag(parent_id, AWAITS_TRACK_TAG, "false")
    client.set_terminated(parent_id, "FINISHED")
    return str(parent.info.run_name)


def _replay(run: StageRun, name: str, parent_id: str, experiment_id: str, stage_hash: str) -> Run:
    """Creates the child run of a stage that DVC did not have to run."""
    client = run.client
    originals = client.search_runs(
        [experiment_id],
        f"tags.`{LOCK_TAG}` = '{stage_hash}' and tags.`{STAGE_TAG}` = '{name}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    original = originals[0] if originals and stage_hash else None
    tags = {
        PARENT_TAG: parent_id,
        STAGE_TAG: name,
        CACHED_TAG: original.info.run_id if original else "not in this store",
        **_context_tags(),
    }
    child = client.create_run(experiment_id, tags=tags, run_name=f"{name} (cached)")
    run_id = child.info.run_id
    _log(client, run_id, params=_stage_params(name, run.params))
    if original is not None:
        # What the work cost when it was done: times and rates are in no report file.
        _log(client, run_id, metrics=original.data.metrics)
    _log_stage_files(client, run_id, name)
    client.set_terminated(run_id, "FINISHED")
    return child
