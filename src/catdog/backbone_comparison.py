"""What backbones cost, and what each reaches in a DVC experiment of its own: `catdog backbones --cost`, `--compare`.

An experiment is named after its backbone and a hash of all that decides about its result. So the same command again
finds what has finished, waits for what is under way, and queues the rest; stages that any other experiment has done
already come from DVC's cache.

The ranking goes by the validation loss. The test split is there to judge what was chosen, not to choose.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from catdog import paths
from catdog.backbones import get_backbones
from catdog.config import Params, load_params
from catdog.errors import CatdogError

if TYPE_CHECKING:
    import keras

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_WITHOUT_WORKER = 45.0
"""When no worker of the queue has answered for so long, none will: a busy one may miss a call, but not so many."""

_SLIDING_LAYERS = ("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv2D", "SeparableConv2D", "Dense")
_CODE = ("dvc.yaml", "src/**/*.py", "stages/*.py")


@dataclass(frozen=True)
class Cost:
    """What a network takes, without its classifier."""

    backbone: str  # one name, or several joined by +
    parameters: int
    multiply_adds: int  # of the forward pass of one picture

    @property
    def bytes(self) -> int:
        """Size of the weights in float32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Contender:
    """A backbone and its experiment."""

    backbone: str
    experiment: str  # name of the DVC experiment
    params: Params


# --- cost -------------------------------------------------------------------------------------------------------------


def run_cost(root: Path, names: Sequence[str]) -> int:
    """Prints what backbones cost at the image size of params.yaml; returns the exit code.

    Args:
        root: of the repository.
        names: as in params.yaml, each one backbone or several joined by +.

    Raises:
        CatdogError: a name is unknown, or a network cannot take the image size.
    """
    size = load_params(root / paths.PARAMS).preprocess.image_size
    for name in names:
        get_backbones(name)  # all names before the first of them takes seconds
    rows = [measure_cost(name, size) for name in dict.fromkeys(names)]
    table = pd.DataFrame(
        {
            "backbone": [row.backbone for row in rows],
            "parameters": [_millions(row.parameters) for row in rows],
            "multiply-adds": [_billions(row.multiply_adds) for row in rows],
            "float32 weights": [_megabytes(row.bytes) for row in rows],
        }
    )
    print(_lines(table))
    print(f"\nof one picture of {size}x{size} pixels, without the head; one multiply-add is two FLOPs")
    return 0


def measure_cost(backbone: str, image_size: int) -> Cost:
    """Builds a backbone, or several joined by +, and counts; no weights are loaded.

    Args:
        backbone: as in params.yaml.
        image_size: pixels a side.

    Raises:
        CatdogError: the name is unknown, or the image size too small.
    """
    from catdog.backbones import build_backbone
    from catdog.runtime import prepare_keras

    prepare_keras(0)
    networks = [build_backbone(part, image_size) for part in get_backbones(backbone)]
    return Cost(
        backbone,
        parameters=sum(network.count_params() for network in networks),
        multiply_adds=sum(count_multiply_adds(network) for network in networks),
    )


def count_multiply_adds(network: keras.Model) -> int:
    """Counts the multiplications, each with an addition, in one picture's forward pass through a network.

    Counted are convolutions and dense layers: their kernels are applied once at each place of the output, as in Table
    1 of "Deep Residual Learning for Image Recognition" (He et al. 2015), which calls it FLOPs. Everything else
    (BatchNorm, activations, pooling) is far less and left out, as is usual.

    Args:
        network: built for pictures of a fixed size, channels last.

    Raises:
        TypeError: a layer has a kernel, but is of a kind that applies it in another way.
    """
    total = 0
    for layer in _layers(network):
        kernels = [math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1]
        if not kernels:
            continue
        if type(layer).__name__ not in _SLIDING_LAYERS:
            raise TypeError(f"cannot count the multiply-adds of {layer.name}, a {type(layer).__name__}")
        total += math.prod(layer.output.shape[1:-1]) * sum(kernels)
    return total


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """All layers, also those of models inside the model."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


# --- the experiments --------------------------------------------------------------------------------------------------


def run_comparison(
    root: Path, names: Sequence[str], changes: Sequence[str] = (), *, jobs: int = 1, dry_run: bool = False
) -> int:
    """Runs an experiment for each backbone through DVC's queue, and prints the ranking.

    Args:
        root: of the repository.
        names: as in params.yaml, each one backbone or several joined by +.
        changes: of other parameters, for all of them alike, each "key=value" as `dvc exp run -S` takes it.
        jobs: experiments at a time.
        dry_run: only print the commands.

    Returns:
        The exit code: 0, or 1 where an experiment failed.

    Raises:
        CatdogError: a name or a change is wrong, DVC refuses to queue, or the queue stopped before its end.
    """
    contenders = plan(root, names, changes)
    found = finished_experiments(root)
    missing = [one for one in contenders if one.experiment not in found]
    for one in contenders:
        if one not in missing:
            print(f"backbones: {one.backbone} is done already, in the experiment {one.experiment}")
    if dry_run:
        for one in missing:
            print(shlex.join(queue_command(one, changes)))
        if missing:
            print(f"dvc queue start --jobs {jobs}")
        return 0
    failed: dict[str, str] = {}
    if missing:
        _require_dvc()
        failed = _run_queue(root, missing, changes, jobs)
        found = finished_experiments(root)
    done = [one for one in contenders if one.experiment in found and one.experiment not in failed]
    if done:
        print(f"\n{_ranking_text(rank(read_results(root, {one: found[one.experiment] for one in done})))}")
    for one in contenders:
        if one not in done:
            print(f"\n{one.backbone} failed: {failed[one.experiment]}")
    return 1 if failed else 0


def plan(root: Path, names: Sequence[str], changes: Sequence[str] = ()) -> list[Contender]:
    """Checks backbones and changes, and names the experiment of each backbone; the arguments as in `run_comparison`.

    Raises:
        CatdogError: a backbone or a parameter does not exist, a value is impossible or several values at once, or the
            weights cannot be those of the backbone.
    """
    from catdog.weights import check_weights_available

    _check_changes(root, changes)
    code = _hash_code(root)
    head = _git(root, "rev-parse", "HEAD").strip()
    contenders = []
    for name in dict.fromkeys(names):
        backbones = get_backbones(name)
        params = _changed_params(root, [*changes, f"backbone={name}"])
        check_weights_available(backbones, params.weights, pretrained_dir=root / paths.PRETRAINED, root=root)
        facts = json.dumps([head, code, params.flat()], sort_keys=True)
        contenders.append(Contender(name, f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:7]}", params))
    return contenders


def queue_command(contender: Contender, changes: Sequence[str]) -> list[str]:
    """Returns the command that queues a backbone's experiment, `dvc` first."""
    settings = [argument for change in (*changes, f"backbone={contender.backbone}") for argument in ("-S", change)]
    return ["dvc", "exp", "run", "--queue", "--name", contender.experiment, *settings]


def _check_changes(root: Path, changes: Sequence[str]) -> None:
    """Refuses, one by one, what does not change one parameter to one value."""
    from dvc.utils.hydra import to_hydra_overrides
    from hydra.errors import HydraException

    known = load_params(root / paths.PARAMS).flat()
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise CatdogError(f"-S {change} changes nothing: write it as KEY=VALUE, for example -S train.epochs=5")
        if key == "backbone":
            raise CatdogError(f"-S {change}: name the backbones after --compare, as in {value},vgg16")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{paths.PARAMS} lists them all"
            raise CatdogError(f"-S {change}: there is no parameter {key}; {hint}")
        try:
            (override,) = to_hydra_overrides([change])
        except HydraException:
            raise CatdogError(
                f"-S {change} cannot be read: write it as KEY=VALUE, texts with signs in quotes"
            ) from None
        if override.is_sweep_override():
            raise CatdogError(f"-S {change}: give one value, which all backbones get; docs/experiments.md has sweeps")


def _changed_params(root: Path, changes: Sequence[str]) -> Params:
    """Returns the parameters as DVC would change them, tried on a copy of params.yaml."""
    from dvc.utils.hydra import apply_overrides

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.PARAMS.name
        shutil.copy(root / paths.PARAMS, copy)
        apply_overrides(copy, list(changes))
        return load_params(copy)


def _hash_code(root: Path) -> str:
    """Returns a hash of the pipeline's code, and of what its last run saw of a data set outside."""
    digest = hashlib.sha256()
    files = sorted(path for pattern in _CODE for path in root.glob(pattern))
    for path in [*files, root / paths.SOURCE_REPORT]:
        if path.exists():
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def finished_experiments(root: Path) -> dict[str, str]:
    """Returns the commits of the finished DVC experiments that started from HEAD, by name."""
    head = _git(root, "rev-parse", "HEAD").strip()
    place = f"refs/exps/{head[:2]}/{head[2:]}/"
    lines = _git(root, "for-each-ref", "--format=%(refname) %(objectname)", place).splitlines()
    return {name.removeprefix(place): commit for name, commit in (line.split() for line in lines)}


def _git(root: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        cause = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CatdogError(f"`git {arguments[0]}` failed ({cause}); experiments need a repository with a commit")
    return answer.stdout


def _require_dvc() -> None:
    if shutil.which("dvc") is None:
        raise CatdogError("dvc is not on PATH; activate the environment first: source .venv/bin/activate")


def _dvc(root: Path, command: Sequence[str]) -> str:
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in answer.stderr.splitlines() if line.startswith("ERROR: ")]
        raise CatdogError(f"`{shlex.join(command[:4])}` failed: {(errors or ['no reason given'])[0]}")
    return answer.stdout


def _run_queue(root: Path, contenders: Sequence[Contender], changes: Sequence[str], jobs: int) -> dict[str, str]:
    """Queues what is not queued yet, runs the queue, and waits; returns the reasons of those that failed, by name."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        queue = repo.experiments.celery_queue
        before = queue.status()
        under_way = {task["name"] for task in before if task["status"] in ("Queued", "Running")}
        # An earlier attempt of the same name is no news.
        old = {task["rev"] for task in before if task["status"] not in ("Queued", "Running")}
        others = len(under_way - {one.experiment for one in contenders})
        queued: list[str] = []
        try:
            for one in contenders:
                if one.experiment not in under_way:
                    _dvc(root, queue_command(one, changes))
                    queued.append(one.experiment)
            if others:
                print(f"backbones: {others} more in DVC's queue will run, too")
            _dvc(root, ["dvc", "queue", "start", "--jobs", str(jobs)])
        except BaseException:
            if queued:
                subprocess.run(["dvc", "queue", "remove", *queued], cwd=root, capture_output=True, check=False)
            raise
        try:
            failed = _wait(queue, {one.experiment: one.backbone for one in contenders}, old)
        except KeyboardInterrupt:
            print(
                "\nbackbones: the experiments go on in the background; the same command waits for them again, "
                "`dvc queue stop --kill` ends them",
                file=sys.stderr,
            )
            raise
        return {name: failure_reason(_log(queue, rev)) for name, rev in failed.items()}


def _wait(queue: Any, backbones: Mapping[str, str], old: set[str]) -> dict[str, str]:
    """Waits until none of the experiments is queued or running.

    Args:
        queue: of DVC.
        backbones: by the name of the experiment.
        old: revisions of tasks that do not count.

    Returns:
        The revision of each failed task, by the name of its experiment.
    """
    from tqdm import tqdm

    failed: dict[str, str] = {}
    done: set[str] = set()
    answered = time.monotonic()
    with tqdm(desc="backbones", total=len(backbones), unit=" experiments", disable=not sys.stderr.isatty()) as bar:
        while True:
            tasks = [task for task in queue.status() if task["name"] in backbones and task["rev"] not in old]
            running = [backbones[task["name"]] for task in tasks if task["status"] == "Running"]
            for task in tasks:
                name, status = task["name"], task["status"]
                if status in ("Success", "Failed") and name not in done:
                    done.add(name)
                    failed |= {name: task["rev"]} if status == "Failed" else {}
                    bar.update()
                    outcome = "failed" if status == "Failed" else "finished"
                    bar.write(f"backbones: {backbones[name]} {outcome} ({len(done)} of {len(backbones)})", sys.stdout)
                    sys.stdout.flush()
            bar.set_postfix_str(f"running {', '.join(running)}" if running else "waiting")
            if len(done) == len(backbones):
                return failed
            # Asking the workers takes a second, so only now and then.
            if time.monotonic() - answered > SECONDS_WITHOUT_WORKER / 3:
                if queue.worker_status():
                    answered = time.monotonic()
                elif time.monotonic() - answered > SECONDS_WITHOUT_WORKER:
                    left = ", ".join(name for name in backbones if name not in done)
                    raise CatdogError(
                        f"no worker of DVC's queue is left for {left}; `dvc queue status` tells more, `dvc queue "
                        "start` starts one, and `dvc queue kill` gives up what still counts as running"
                    )
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _log(queue: Any, rev: str) -> str:
    """What a task printed; empty where DVC could not even set it up."""
    process = queue.proc.get(rev)
    try:
        return Path(process.stdout).read_text(encoding="utf-8", errors="replace") if process else ""
    except OSError:
        return ""


def failure_reason(log: str) -> str:
    """Finds in what an experiment printed the sentence that says why it failed.

    A stage's own sentence or the last line of a traceback stands right before what DVC says of it.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first_error = next((number for number, line in enumerate(lines) if line.startswith("ERROR:")), None)
    if first_error is None:
        return lines[-1] if lines else "DVC could not start it; `dvc queue logs` and `dvc queue status` tell more"
    before = lines[first_error - 1] if first_error else ""
    told = before and not re.match(r"> |Running stage|Reproducing experiment", before)
    return before.removeprefix("catdog ") if told else lines[first_error].removeprefix("ERROR: ")


# --- the ranking ------------------------------------------------------------------------------------------------------


def read_results(root: Path, commits: Mapping[Contender, str]) -> pd.DataFrame:
    """Reads what finished experiments reached and cost.

    Args:
        root: of the main repository.
        commits: of the experiments.

    Returns:
        A row a backbone: backbone, experiment, val_loss, val_accuracy, accuracy, accuracy_low, accuracy_high (of the
        test split, 0..1, like val_accuracy), log_loss (test), parameters and multiply_adds (of the backbone, for one
        picture), images_per_second (of embed, when it ran; NaN where MLflow does not know), model_bytes.

    Raises:
        CatdogError: a report of an experiment is neither in DVC's cache nor to be had from its remote.
    """
    rates = _embed_rates(root, [one.experiment for one in commits])
    rows = []
    for one, commit in commits.items():
        trained = _read_report(root, one, commit, paths.TRAIN_REPORT)
        tested = _read_report(root, one, commit, paths.METRICS)
        cost = measure_cost(one.backbone, one.params.preprocess.image_size)
        rows.append(
            {
                "backbone": one.backbone,
                "experiment": one.experiment,
                "val_loss": trained["best_val_loss"],
                "val_accuracy": trained["best_val_accuracy"],
                **{name: tested[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "log_loss")},
                "parameters": cost.parameters,
                "multiply_adds": cost.multiply_adds,
                "images_per_second": rates.get(one.experiment, math.nan),
                "model_bytes": trained["model_bytes"],
            }
        )
    return pd.DataFrame(rows)


def _read_report(root: Path, contender: Contender, commit: str, path: Path) -> dict[str, Any]:
    from dvc.api import DVCFileSystem

    try:
        report: dict[str, Any] = json.loads(DVCFileSystem(str(root), rev=commit).read_text(path.as_posix()))
    except Exception as error:  # every kind of remote has its own
        cause = " ".join(str(error).split())[:200]
        raise CatdogError(
            f"{path} of the experiment {contender.experiment} cannot be read ({cause}); `dvc exp remove "
            f"{contender.experiment}`, then compare again"
        ) from None
    return report


def _embed_rates(root: Path, experiments: Sequence[str]) -> dict[str, float]:
    """Images a second of embed by experiment, of those that MLflow knows; a store that cannot be used knows none."""
    from catdog.tracking import KEY_TAG, StoreError, connect, experiment_key, experiment_name

    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        return {}
    try:
        client = connect(root)
    except StoreError as error:
        print(f"backbones: {error}; images/s are left out", file=sys.stderr)
        return {}
    head = _git(root, "rev-parse", "HEAD").strip()
    store = client.get_experiment_by_name(experiment_name())
    rates: dict[str, float] = {}
    for name in experiments:
        runs = client.search_runs(
            [store.experiment_id],
            f"tags.`{KEY_TAG}` = '{experiment_key(root, head, name)}' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if runs:
            rates[name] = runs[0].data.metrics.get("embed.images_per_second", math.nan)
    return rates


def rank(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of `read_results`, lowest validation loss first; the test split has no say."""
    return results.sort_values(["val_loss", "backbone"], kind="stable").reset_index(drop=True)


def _ranking_text(ranking: pd.DataFrame) -> str:
    rates = ["-" if math.isnan(rate) else f"{rate:,.1f}" for rate in ranking["images_per_second"]]
    table = pd.DataFrame(
        {
            "backbone": ranking["backbone"],
            "val loss": ranking["val_loss"].map("{:.4f}".format),
            "val accuracy": ranking["val_accuracy"].map("{:.2%}".format),
            "test accuracy": ranking["accuracy"].map("{:.2%}".format),
            "95 % interval": [
                f"{low:.1%} to {high:.1%}"
                for low, high in zip(ranking["accuracy_low"], ranking["accuracy_high"], strict=True)
            ],
            "test log loss": ranking["log_loss"].map("{:.4f}".format),
            "parameters": ranking["parameters"].map(_millions),
            "multiply-adds": ranking["multiply_adds"].map(_billions),
            "images/s": rates,
            "model": ranking["model_bytes"].map(_megabytes),
            "experiment": ranking["experiment"],
        }
    )
    best = ranking["experiment"].iloc[0]
    told = [
        "ranked by validation loss; the test split does not choose",
        "parameters and multiply-adds: of the backbone, for one picture; images/s: of embed, when it ran",
        f"`dvc exp apply {best}` takes the first.",
    ]
    if len(ranking) > 1:
        second = ranking["experiment"].iloc[1]
        told.append(f"`catdog compare {best} {second}` says whether the test images tell it from the next.")
    return "\n".join([_lines(table), "", *told])


def _lines(table: pd.DataFrame) -> str:
    """A table of texts, names to the left, numbers to the right."""
    rows = [list(table.columns), *table.to_numpy().tolist()]
    columns = []
    for name, *cells in zip(*rows, strict=True):
        width = max(map(len, (name, *cells)))
        fit = str.ljust if name in ("backbone", "experiment") else str.rjust
        columns.append([fit(cell, width) for cell in (name, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M"


def _billions(number: float) -> str:
    return f"{number / 1e9:,.2f} G"


def _megabytes(number: float) -> str:
    return f"{number / 1e6:,.1f} MB"
