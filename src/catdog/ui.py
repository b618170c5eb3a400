"""`catdog ui`: MLflow's own pages, started lean and opened where the experiments can be compared.

MLflow opens a fresh browser in its mode for language models, where the runs have neither parameters nor metrics, and
shows the stages of a pipeline run between the runs. Both are answered by the address: `workflowType` names the mode,
and `viewStateShareKey` a view that lies in a tag of the experiment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import webbrowser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catdog import tracking
from catdog.errors import CatdogError
from catdog.signals import ended_by

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HOST = "127.0.0.1"
VIEW = "catdog"
COLUMNS = {
    "params.`backbone`": 130,
    "params.`dataset`": 80,
    "metrics.`accuracy`": 80,
    "metrics.`accuracy_low`": 100,
    "metrics.`accuracy_high`": 105,
    "metrics.`log_loss`": 85,
    "metrics.`train.seconds`": 110,
    "metrics.`embed.images_per_second`": 190,
    "metrics.`evaluate.images_per_second`": 200,
}
"""What pipeline runs are compared by, as MLflow's page names its columns, and how wide each is, in pixels."""
PIPELINE_RUNS = f"tags.`{tracking.KEY_TAG}` != ''"
"""Of all runs those that stand for a whole pipeline run: only they carry the tag."""
COMPARED = 10
"""So many of the newest pipeline runs are compared."""
SECONDS_TO_START = 180.0
_SECONDS_TO_END = 10.0
_COLOUR_TAG = "mlflow.runColor"
_LOG = Path(".dvc") / "tmp" / "mlflow-ui.log"


@dataclass(frozen=True)
class Links:
    """Addresses of what is worth opening."""

    table: str  # the pipeline runs, newest first
    charts: str  # the same runs as charts
    comparison: str | None  # the newest finished pipeline runs side by side; None for fewer than two


def run_ui(root: Path, *, port: int, open_browser: bool) -> int:
    """Shows the tracking store of the repository at `root` in the browser until Ctrl-C; returns the exit code.

    Where MLFLOW_TRACKING_URI names a server, that one has the pages: its addresses are printed, and no server starts.

    Args:
        root: of the main repository.
        port: for the server, 1 to 65535.
        open_browser: open the table of runs, too, where there is a screen.

    Raises:
        CatdogError: the port is taken, the server does not start, or the store cannot be used.
    """
    uri = tracking.store_uri(root)
    if uri.startswith(("http://", "https://")):
        _show(prepare_links(root, tracking.public_address(uri)), open_browser)
        return 0
    require_free_port(port)
    # Before the server: one that created the database would give the experiment no place for its files.
    links = prepare_links(root, f"http://{HOST}:{port}")
    # A closed terminal, too, ends the server.
    with (
        contextlib.suppress(KeyboardInterrupt),
        ended_by(signal.SIGTERM, signal.SIGHUP),
        server(root, uri, port) as process,
    ):
        _show(links, open_browser)
        print("Ctrl-C ends it", flush=True)
        process.wait()
        raise CatdogError(f"MLflow's server ended ({_last_line(root / _LOG)}); {root / _LOG} has its whole log")
    return 0


def prepare_links(root: Path, address: str) -> Links:
    """Stores the view in the experiment, which is created where it is missing, and returns the addresses.

    The newest runs get colours that can be told apart, too.

    Args:
        root: of the main repository.
        address: of the server that shows the store which `tracking.connect` opens, e.g. "http://127.0.0.1:5000".

    Raises:
        StoreError: the store cannot be used, or the experiment was deleted in MLflow.
    """
    client = tracking.connect(root)
    experiment_id = tracking.pipeline_experiment(client).experiment_id
    state = json.dumps(view_state(), separators=(",", ":"))
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", state)
    newest = newest_runs(client, experiment_id)
    colour_runs(client, newest)
    finished = [run.info.run_id for run in newest if run.info.status == "FINISHED"]
    return links(address, experiment_id, finished)


def view_state() -> dict[str, Any]:
    """Returns the state of MLflow's page of runs that shows pipeline runs with what they are compared by.

    The names are those of MLflow 3.17's page, which puts its own defaults in place of those that are missing.
    """
    return {
        "searchFilter": PIPELINE_RUNS,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "runsHiddenMode": f"FIRST_{COMPARED}_RUNS",
        "compareRunSections": [
            {"uuid": "compare", "name": "Comparison", "display": True, "isReordered": True, "columns": 2}
        ],
        "compareRunCharts": _charts(),
    }


def _charts() -> list[dict[str, Any]]:
    def chart(number: int, kind: str, **settings: Any) -> dict[str, Any]:
        place = {"uuid": f"compare-{number}", "metricSectionId": "compare", "deleted": False, "isGenerated": False}
        return place | {"type": kind, "runsCountToCompare": COMPARED} | settings

    def line(number: int, name: str, keys: Sequence[str]) -> dict[str, Any]:
        settings = {"metricKey": keys[0], "selectedMetricKeys": list(keys), "displayName": name, "xAxisKey": "step"}
        shape = {"lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear", "yAxisKey": "metric"}
        return chart(number, "LINE", **settings, **shape, range={}, yAxisExpressions=[], useGlobalXaxisKey=True)

    def bar(number: int, key: str) -> dict[str, Any]:
        return chart(number, "BAR", metricKey=key, displayName=key)

    return [
        chart(
            1,
            "PARALLEL",
            selectedParams=["backbone", "train.hidden_units", "train.learning_rate"],
            selectedMetrics=["accuracy", "log_loss"],
            showAllRuns=False,
            displayName="Settings and results",
        ),
        line(2, "Loss by epoch", ("train.val_loss", "train.train_loss")),
        line(3, "Accuracy by epoch", ("train.val_accuracy", "train.train_accuracy")),
        bar(4, "accuracy"),
        bar(5, "log_loss"),
        bar(6, "embed.images_per_second"),
    ]


def newest_runs(client: MlflowClient, experiment_id: str) -> list[Run]:
    """Returns the newest pipeline runs, newest first, at most COMPARED."""
    return list(
        client.search_runs(
            [experiment_id], PIPELINE_RUNS, order_by=["attributes.start_time DESC"], max_results=COMPARED
        )
    )


def colour_runs(client: MlflowClient, runs: Sequence[Run]) -> None:
    """Gives each run that has no colour the one that the fewest others of them have.

    MLflow would take it from a hash of the run's id, and often the same for two. One that a person chose stays.
    """
    from catdog.plots import PALETTE

    used = Counter(run.data.tags[_COLOUR_TAG] for run in runs if _COLOUR_TAG in run.data.tags)
    for run in runs:
        if _COLOUR_TAG not in run.data.tags:
            colour = min(PALETTE, key=lambda candidate: used[candidate])
            used[colour] += 1
            client.set_tag(run.info.run_id, _COLOUR_TAG, colour)


def links(address: str, experiment_id: str, run_ids: Sequence[str]) -> Links:
    """Returns the addresses of the runs' table and charts and of the comparison of the runs given.

    Args:
        address: of the server, with or without a slash at its end.
        experiment_id: of the experiment that holds the view and the runs.
        run_ids: which runs to compare.
    """
    pages = f"{address.rstrip('/')}/#"

    def page(path: str, query: Mapping[str, str]) -> str:
        return f"{pages}/{path}?{urllib.parse.urlencode(query)}"

    mode = {"workflowType": "machine_learning"}
    table = mode | {"viewStateShareKey": VIEW}
    # MLflow's page of the comparison reads `runs` only where it comes first.
    chosen = {"runs": json.dumps(list(run_ids), separators=(",", ":")), "experiments": json.dumps([experiment_id])}
    return Links(
        table=page(f"experiments/{experiment_id}/runs", table),
        charts=page(f"experiments/{experiment_id}/runs", table | {"compareRunsMode": "CHART"}),
        comparison=page("compare-runs", chosen | mode) if len(run_ids) > 1 else None,
    )


def _show(links: Links, open_browser: bool) -> None:
    print(f"runs:       {links.table}")
    print(f"charts:     {links.charts}")
    if links.comparison:
        print(f"comparison: {links.comparison}")
    sys.stdout.flush()
    # Without a screen Python would take a browser that fills the terminal.
    screen = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if open_browser and screen:
        webbrowser.open(links.table)


def require_free_port(port: int) -> None:
    """Raises CatdogError where another program listens on the port, or this one must not."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that just ended does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise CatdogError(f"port {port} is for the system only; give one above 1023, e.g. --port 5000") from None
        except OSError:
            other = 5001 if port == 5000 else 5000
            raise CatdogError(
                f"port {port} is taken by another program; end that one, or give another, e.g. --port {other}"
            ) from None


@contextlib.contextmanager
def server(root: Path, uri: str, port: int, *, seconds: float = SECONDS_TO_START) -> Iterator[subprocess.Popen[bytes]]:
    """Runs MLflow's server for the block, which begins when the server answers, and ends it with all its children.

    One worker and no jobs: the defaults take 20 to 60 seconds and up to 2 GB, this 17 seconds and 0.5 GB.

    Args:
        root: of the main repository; the server writes its log there, to .dvc/tmp/mlflow-ui.log.
        uri: of the store, as SQLAlchemy takes it.
        port: one that is free.
        seconds: how long the server may take to start.

    Yields:
        The server's process.

    Raises:
        CatdogError: the server ended, or does not answer in time; the message has the last line of its log.
    """
    log = root / _LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    # In the environment, because everyone on the machine can read a command line, and the address may hold a password.
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that its children can be ended with it
        )
    try:
        _wait_for_answer(process, port, log, seconds)
        yield process
    finally:
        _end_group(process)


def _wait_for_answer(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    print(f"starting MLflow on port {port} ...", file=sys.stderr, flush=True)
    deadline = time.monotonic() + seconds
    # A proxy, which the environment may name, does not reach this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if process.poll() is not None:
            raise CatdogError(f"MLflow's server ended at its start ({_last_line(log)}); {log} has its whole log")
        with contextlib.suppress(OSError), direct.open(f"http://{HOST}:{port}/health", timeout=5):
            return
        if time.monotonic() > deadline:
            raise CatdogError(
                f"MLflow's server does not answer on port {port} after {seconds:.0f} seconds ({_last_line(log)}); "
                f"{log} has its whole log"
            )
        time.sleep(0.2)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a group, and the group; whoever is not gone after some seconds is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
