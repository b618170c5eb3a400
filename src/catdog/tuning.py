"""A search for the head's hyperparameters with Keras Tuner, on the stored features: `catdog tune`.

Keras Tuner's oracles (random search, Hyperband, Bayesian optimization) choose what to try; what is tried is fitted as
the train stage fits it, on the training split, and judged by the validation loss. Files of the test split are never
opened. Values are rounded before they are tried, so that the `dvc exp run` line of a trial is that very trial.

A search lies under `.dvc/tmp/tuning/<key>/` of the main repository as one file, written aside after each trial; the
key says what went into it. A killed search goes on there, and ends as if it had not been killed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from catdog import paths
from catdog.checkpoints import Checkpoints, run_key
from catdog.compute import MapItems, open_compute
from catdog.config import Params, TrainParams, TuneParams, load_params, parse_range, validate_params
from catdog.errors import CatdogError
from catdog.features import FeatureSet, open_features
from catdog.files import read_json, write_json
from catdog.gathered import Gathered, fit_either_way, gather
from catdog.signals import ended_by
from catdog.tuning_features import SPLITS, check_weights, features_of, read_features_info, with_backbone
from catdog.tuning_runs import SearchRuns

if TYPE_CHECKING:
    import keras
    from filelock import FileLock

SHOWN = 5
"""Trials in the printed table."""
HYPERBAND_TRIALS = {3: 6, 9: 23, 27: 70, 81: 211}
"""Trials of one Hyperband of Keras Tuner with factor 3, by the resource that its longest trials get."""

SEARCHED = ("learning_rate", "optimizer", "hidden_units", "dropout")
"""What a trial differs in, as the block train names it."""

# Only what decides about a trial's result: another text in a command's help need not start a search anew.
_CODE = ("augment", "checkpoints", "features", "gathered", "model", "optimization", "runtime", "training", "tuning")
# Of the Gaussian process for five hyperparameters; the 20 of Keras Tuner take a second a trial.
_PROCESS_RESTARTS = 4


@dataclass(frozen=True)
class Study:
    """What a search found.

    Attributes:
        backbone: whose features it searched on.
        trials: a row a trial, in order: trial (from 1), status (finished or failed), val_loss and val_accuracy (0..1)
            of the best epoch, learning_rate, optimizer, hidden_units (as "[256]"), dropout, epochs (at most),
            patience, best_epoch, seconds, error (a sentence, where it failed).
        overrides: of the best trial: what differs from params.yaml or was searched, text by dotted name, as
            `dvc exp run -S` takes it.
    """

    backbone: str
    trials: pd.DataFrame
    overrides: Mapping[str, str]

    @property
    def best(self) -> pd.Series:
        """The trial with the lowest validation loss."""
        return rank(self.trials).iloc[0]

    @property
    def command(self) -> list[str]:
        """The command that runs the pipeline with the best trial's parameters, `dvc` first."""
        changes = [argument for key, value in self.overrides.items() for argument in ("-S", f"{key}={value}")]
        return ["dvc", "exp", "run", *changes]


@dataclass(frozen=True)
class Plan:
    """How many trials a search has and, for Hyperband, how it shares the epochs out."""

    method: str
    trials: int
    seed: int
    resource: int = 1  # Hyperband's unit: its longest trials get so many, its shortest 1
    repetitions: int = 1  # of Hyperband


# --- the command ------------------------------------------------------------------------------------------------------


def run_tune(
    root: Path,
    *,
    method: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    backbones: Sequence[str] = (),
    apply: bool = False,
) -> int:
    """Searches, prints the best trials and the command that runs the best, and runs that if asked.

    Args:
        root: the repository's root, where `dvc repro` has run.
        method: random, hyperband or bayesian; None: as in params.yaml, as for the next two.
        trials: at most so many.
        seed: of the search; the heads themselves are trained with the seed of params.yaml, as the pipeline does.
        backbones: search on the features of each of these, which are computed where they are not stored yet; empty:
            on the features of the pipeline.
        apply: run the command, too.

    Returns:
        The exit code: 0, or that of the command.

    Raises:
        CatdogError: as `tune` and `features_of`; or the command cannot be run on this params.yaml.
    """
    from catdog.tracking import _describe_store_error, _is_store_error, connect, pipeline_experiment

    params = load_params(root / paths.PARAMS)
    # Checked before the first of them costs minutes.
    variants = [with_backbone(params, name) for name in dict.fromkeys(backbones)] or [params]
    for variant in variants:
        check_weights(root, params, variant)
    plan_search(_settings(params, method, trials), seed or 0)
    if backbones and params.tracking.required:
        pipeline_experiment(connect(root))
    studies = []
    try:
        with ended_by(signal.SIGTERM, signal.SIGINT):
            for variant in variants:
                folder = features_of(root, params, variant) if backbones else root / paths.FEATURES
                studies.append(tune(root, variant, features=folder, method=method, trials=trials, seed=seed))
                print(_table(rank(studies[-1].trials).head(SHOWN)))
    except Exception as error:
        if isinstance(error, CatdogError) or not _is_store_error(error):
            raise
        raise CatdogError(_describe_store_error(error)) from None
    if len(studies) > 1:
        print("\ntune: the best of each backbone")
        print(_table(ranking(studies)))
    best = min(studies, key=lambda study: float(study.best["val_loss"]))
    command = best.command + (["-S", f"backbone={best.backbone}"] if best.backbone != params.backbone else [])
    obstacle = _obstacle(root, command)
    print(f"\n{shlex.join(command)}", flush=True)
    if apply and obstacle:
        raise CatdogError(obstacle)
    if obstacle:
        print(f"tune: {obstacle}")
    if not apply:
        return 0
    from catdog.recipes import run_command

    return run_command(root, command)


def _settings(params: Params, method: str | None, trials: int | None) -> TuneParams:
    given = {key: value for key, value in (("method", method), ("trials", trials)) if value is not None}
    tree = params.model_dump()
    return validate_params({**tree, "tune": tree["tune"] | given}, source="tune").tune


def rank(trials: pd.DataFrame) -> pd.DataFrame:
    """Returns the finished trials, lowest validation loss first, each set of hyperparameters once."""
    finished = trials[trials["status"] == "finished"]
    # Hyperband trains the good ones on: of the same loss the longest training stands for all.
    ordered = finished.sort_values(["val_loss", "epochs", "trial"], ascending=[True, False, True])
    return ordered.drop_duplicates(list(SEARCHED)).reset_index(drop=True)


def ranking(studies: Sequence[Study]) -> pd.DataFrame:
    """Returns the best trial of each study, lowest validation loss first, with a column backbone."""
    table = pd.DataFrame([{"backbone": study.backbone, **study.best.to_dict()} for study in studies])
    return table.sort_values("val_loss", kind="stable").reset_index(drop=True)


def _table(trials: pd.DataFrame) -> str:
    columns = ["val_loss", "val_accuracy", "learning_rate", "optimizer", "hidden_units", "dropout", "epochs", "trial"]
    shown = trials[[*(["backbone"] if "backbone" in trials else []), *columns]]
    formats = {"val_loss": "{:.4f}".format, "val_accuracy": "{:.2%}".format, "learning_rate": "{:g}".format}
    return shown.to_string(index=False, formatters={**formats, "dropout": "{:g}".format})


def _obstacle(root: Path, command: Sequence[str]) -> str | None:
    """Says why DVC would not write these parameters into params.yaml, or None: tried on a copy.

    DVC 3.67 writes a list as lines of their own; where the list is emptied later, it leaves a file that is no YAML.
    """
    from dvc.utils.hydra import apply_overrides

    changes = [argument for argument in command if "=" in argument]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.PARAMS.name
        shutil.copy(root / paths.PARAMS, copy)
        try:
            apply_overrides(copy, changes)
            written = load_params(copy).flat()
        except CatdogError:
            written = {}
    for change in changes:
        key, _, value = change.partition("=")
        text = str(json.loads(value)) if value.startswith("[") else value
        if written.get(key) != text:
            return (
                f"DVC damages {paths.PARAMS} when it empties a list: write `hidden_units: []` into its block train "
                "yourself, then run the command"
            )
    return None


# --- the search -------------------------------------------------------------------------------------------------------


def tune(
    root: Path,
    params: Params,
    *,
    features: Path | None = None,
    method: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
) -> Study:
    """Searches on stored features; each trial is a run in MLflow, under one parent run "tune".

    The same arguments on the same features give the same trials. A search that was cut off goes on where it was.

    Args:
        root: of the main repository.
        params: the block `tune` says what to try, `train` all else about a trial.
        features: folder with features and their `features.json`; None: those of the pipeline.
        method: in place of `params.tune.method`: random, hyperband or bayesian.
        trials: in place of `params.tune.trials`.
        seed: of the search; None: `params.seed`, which is also the seed of each trial's training.

    Raises:
        CatdogError: there are no features or they belong to other parameters, the parameters do not fit together,
            another process is at the same search, or every trial diverged.
    """
    folder = root / paths.FEATURES if features is None else features
    described = read_features_info(root, folder, params)
    settings = _settings(params, method, trials)
    plan = plan_search(settings, params.seed if seed is None else seed)
    classes = len(read_json(root / paths.PREPROCESS_REPORT)["classes"])
    _check_training(params.train, settings, plan, classes)

    from catdog.runtime import prepare_keras

    prepare_keras(params.seed, precision=params.runtime.precision)
    facts = _facts(folder, described, params, settings, plan, classes)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    with _search_folder(root, key) as place:
        search = _Search(root, place, facts, params, settings, plan)
        _tell_former(root, search)
        train, val = open_features(folder, "train", views=True), open_features(folder, "val")
        print(
            f"tune: {len(train.labels):,} images to train and {len(val.labels):,} to validate, {train.size:,} features "
            f"of {params.backbone}; {plan.method} search, {'' if plan.method == 'hyperband' else 'at most '}"
            f"{plan.trials} trials",
            flush=True,
        )
        if search.left:
            make = functools.partial(open_trials, folder, params, classes, plan, place / "weights")
            with open_compute(params.compute, place) as compute, compute.workers(make, "device") as run_trials:
                search.run(run_trials, compute.facts("device"), at_once=1 if compute.is_local else plan.trials)
        if search.exhausted and len(search.rows) < plan.trials:
            print(f"tune: after {len(search.rows)} trials, {plan.method} search found nothing else to try")
        table = pd.DataFrame(search.rows[: plan.trials], columns=list(_COLUMNS))
    failed = table[table["status"] == "failed"]
    if len(failed) == len(table):
        raise CatdogError(f"every trial failed, the last because {failed['error'].iloc[-1]}")
    best = rank(table).iloc[0]
    print(
        f"tune: the best of {len(table)} trials{f', {len(failed)} of which failed,' if len(failed) else ''} has a "
        f"validation loss of {best['val_loss']:.4f} and an accuracy of {best['val_accuracy']:.2%}; "
        f"{table['seconds'].mean():.1f} s a trial"
    )
    return Study(params.backbone, table, _overrides(best.to_dict(), params.train))


def plan_search(settings: TuneParams, seed: int) -> Plan:
    """Decides about the number of trials; raises CatdogError where Hyperband has too few."""
    # Keras Tuner takes 0 for "no seed"; a hash also keeps the trials of neighbouring seeds apart, which it draws from
    # seed, seed + 1, ...
    drawn = int.from_bytes(hashlib.sha256(f"tune {seed}".encode()).digest()[:4], "big") or 1
    if settings.method != "hyperband":
        return Plan(settings.method, settings.trials, drawn)
    fitting = [resource for resource, needed in HYPERBAND_TRIALS.items() if needed <= settings.trials]
    if not fitting:
        raise CatdogError(
            f"tune.trials = {settings.trials} is too few for hyperband: give {min(HYPERBAND_TRIALS.values())} or more, "
            "or choose random or bayesian"
        )
    resource = max(fitting)
    repetitions = settings.trials // HYPERBAND_TRIALS[resource]
    return Plan("hyperband", repetitions * HYPERBAND_TRIALS[resource], drawn, resource, repetitions)


def _check_training(train: TrainParams, settings: TuneParams, plan: Plan, classes: int) -> None:
    """Refuses, before any trial, what would make each one fail."""
    from catdog.model import choose_output

    choose_output(train.output, classes)
    shortest = math.ceil(_unsearched(train, settings).epochs / plan.resource)
    if train.warmup > shortest:
        raise CatdogError(
            f"train.warmup = {train.warmup} epochs is longer than the shortest trial, which has {shortest}: lower it, "
            "raise tune.epochs, or choose --method random"
        )


def _facts(
    folder: Path, described: Mapping[str, Any], params: Params, settings: TuneParams, plan: Plan, classes: int
) -> dict[str, Any]:
    """All that decides about the trials, by a name for people."""
    space = settings.model_dump(mode="json", exclude={"method", "trials"})
    package = Path(__file__).parent
    return {
        "backbone": params.backbone,
        "the search space": space,
        # More random or Bayesian trials go on after those that there are; Hyperband's number decides about each.
        "the method": [plan.method, *([plan.resource, plan.repetitions] if plan.method == "hyperband" else [])],
        "the seed": [plan.seed, params.seed],
        "the block train": _unsearched(params.train, settings).model_dump(mode="json", exclude=set(SEARCHED)),
        "the features": [dict(described), classes, _digest(folder)],
        "the program": run_key({}, [package / f"{name}.py" for name in _CODE]),
    }


def _unsearched(train: TrainParams, settings: TuneParams) -> TrainParams:
    """The block train with what limits a trial: so running the best trial's command does not start a search anew."""
    limits = {"epochs": min(settings.epochs, train.epochs), "patience": min(settings.patience, train.patience)}
    return train.model_copy(update=limits)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for path in sorted(folder.glob(f"{split}-*.npy")):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _search_folder(root: Path, key: str) -> Iterator[Path]:
    """Keeps a second process from the same search."""
    from filelock import Timeout

    folder = root / paths.TUNING_SEARCHES / key
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CatdogError("another process is at this very search; wait for it, or change the seed") from None
    try:
        yield folder
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    """The lock of a search's folder, where `catdog clean` looks for it."""
    from filelock import FileLock

    return FileLock(folder.with_name(f"{folder.name}.lock"))


def _tell_former(root: Path, search: _Search) -> None:
    """Says what this search takes up, or why it starts anew; ends the runs of a former search that was cut off."""
    from filelock import Timeout

    if search.taken_up:
        more = "going on" if search.left else "nothing is left to try"
        print(f"tune: {len(search.rows)} trials of this search are there; {more}")
        return
    states = sorted((root / paths.TUNING_SEARCHES).glob("*/search.json"), key=lambda path: path.stat().st_mtime)
    formers = [(path, state) for path in states if (state := read_json(path))["facts"]["backbone"] == search.backbone]
    if not formers:
        return
    path, former = formers[-1]
    changed = [name for name, value in search.facts.items() if former["facts"].get(name) != value]
    print(f"tune: starting anew, because of a change since the last search: {', '.join(changed)}")
    with contextlib.suppress(Timeout), _lock(path.parent).acquire(blocking=False):
        search.runs.close(former["parent_run"], len(former["rows"]))


class _Search:
    """A search that may have been cut off: Keras Tuner's oracle, the rows so far, and the file that keeps both."""

    def __init__(
        self, root: Path, folder: Path, facts: Mapping[str, Any], params: Params, settings: TuneParams, plan: Plan
    ) -> None:
        self.folder, self.facts, self.params, self.settings, self.plan = folder, facts, params, settings, plan
        self.oracle = build_oracle(settings, plan)
        self.rows: list[dict[str, Any]] = []
        self.exhausted = False  # nothing is left in the search space that was not tried
        self.runs = SearchRuns(root, required=params.tracking.required)
        self.parent_run = ""
        self.taken_up = self._file.exists()
        if self.taken_up:
            self._restore(read_json(self._file))

    @property
    def _file(self) -> Path:
        return self.folder / "search.json"

    @property
    def backbone(self) -> str:
        """The backbone whose features are searched on."""
        return self.params.backbone

    @property
    def left(self) -> int:
        """Number of trials to come, at most."""
        return 0 if self.exhausted else max(0, self.plan.trials - len(self.rows))

    def run(self, run_trials: MapItems[Trial, Outcome], facts: Mapping[str, str], *, at_once: int) -> None:
        """Runs the trials that are left.

        Args:
            run_trials: fits heads, see `open_trials`.
            facts: where it does so, for the tags of the parent run.
            at_once: number of trials to ask the oracle for before it is told their results, at most.
        """
        from catdog.progress import progress

        self.parent_run = self.runs.open_parent(self.parent_run, len(self.rows), self._description())
        self._save()
        status = "FAILED"
        try:
            with ended_by(signal.SIGTERM, signal.SIGINT):  # also where Python, not the command, runs the search
                for _ in progress(self._trials(run_trials, at_once), "tune", self.left, "trials"):
                    pass
            status = "FINISHED"
        except SystemExit:
            status = "KILLED"
            print(
                f"tune: stopped after {len(self.rows)} of {self.plan.trials} trials; the same command goes on there",
                file=sys.stderr,
            )
            raise
        finally:
            metrics, tags = self._summary()
            self.runs.end_parent(self.parent_run, status, metrics, {**tags, **facts})
        # Hyperband has nothing more to train on.
        shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def _description(self) -> dict[str, str]:
        """What the parent run's parameters say."""
        flat = self.params.model_copy(update={"tune": self.settings}).flat()
        fixed = {name: text for name, text in flat.items() if name.startswith(("tune.", "train.", "embed."))}
        fixed = {name: text for name, text in fixed.items() if name.removeprefix("train.") not in SEARCHED}
        return fixed | {"backbone": self.params.backbone, "seed": flat["seed"], "tune.seed": str(self.plan.seed)}

    def _summary(self) -> tuple[dict[str, float], dict[str, str]]:
        """The best trial so far, as metrics and tags."""
        metrics: dict[str, float] = {"trials": len(self.rows)}
        ranked = rank(pd.DataFrame(self.rows, columns=list(_COLUMNS)))
        if not len(ranked):
            return metrics, {}
        best = ranked.iloc[0].to_dict()
        metrics |= {name: float(best[name]) for name in ("val_loss", "val_accuracy")}
        tags = {f"best.{name}": value for name, value in _overrides(best, None).items()}
        return metrics, tags | {"best.trial": f"trial {best['trial']}"}

    def _trials(self, run_trials: MapItems[Trial, Outcome], at_once: int) -> Iterator[None]:
        while self.left:
            # Those that a search on a cluster had open when it was cut off come first.
            wave = open_trials_of(self.oracle) or ask(self.oracle, min(at_once, self.left))
            if not wave:
                self.exhausted = True
                self._save()
                return
            first = len(self.rows) + 1
            trials = [
                Trial(number, train_params(self._values(trial_id), self.params.train, self.settings, self.plan))
                for number, trial_id in enumerate(wave[: self.left], start=first)
            ]
            outcomes = iter(run_trials(trials))
            for trial_id, trial in zip(wave, trials, strict=False):
                row: dict[str, Any] = {"trial": trial.number, **_described(trial.train)}
                with self.runs.trial(self.parent_run, trial.number, _overrides(row, None)) as measured:
                    row |= next(outcomes)
                    measured.update(row)
                tell(self.oracle, trial_id, row["val_loss"] if row["status"] == "finished" else None)
                self.rows.append(row)
                self._save()
                yield

    def _values(self, trial_id: str) -> dict[str, Any]:
        return dict(self.oracle.trials[trial_id].hyperparameters.values)

    def _save(self) -> None:
        own = {"parent_run": self.parent_run, "rows": self.rows, "exhausted": self.exhausted}
        write_json(self._file, {"facts": self.facts, **own, "oracle": oracle_state(self.oracle)})

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.rows, self.parent_run, self.exhausted = state["rows"], state["parent_run"], state["exhausted"]
        restore_oracle(self.oracle, state["oracle"])


_COLUMNS = (
    "trial",
    "status",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "optimizer",
    "hidden_units",
    "dropout",
    "epochs",
    "patience",
    "best_epoch",
    "seconds",
    "error",
)


def build_oracle(settings: TuneParams, plan: Plan) -> Any:
    """Builds Keras Tuner's oracle for the search space, which asks for the lowest `val_loss`.

    It keeps no files of its own, and its next choice depends on its `oracle_state` alone.
    """
    import keras_tuner

    base: Any = {
        "random": keras_tuner.oracles.RandomSearchOracle,
        "hyperband": keras_tuner.oracles.HyperbandOracle,
        "bayesian": keras_tuner.oracles.BayesianOptimizationOracle,
    }[plan.method]
    ranges = {name: getattr(settings, name) for name in ("learning_rate", "dropout")}
    limits = {name: parse_range(text) for name, text in ranges.items() if isinstance(text, str)}

    def shortened(values: dict[str, Any]) -> dict[str, Any]:
        return values | {name: _short(values[name], *ends) for name, ends in limits.items()}

    class Oracle(base):  # type: ignore[misc]
        def populate_space(self, trial_id: str) -> dict[str, Any]:
            if plan.method == "bayesian":
                # A random state that goes on from trial to trial would be lost with the process.
                self._random_state = np.random.RandomState((plan.seed + len(self.trials)) % 2**32)
                self.gpr.n_restarts_optimizer = _PROCESS_RESTARTS
            response: dict[str, Any] = super().populate_space(trial_id)
            if not response.get("values"):
                return response  # it waits or stops
            values = shortened(response["values"])
            if plan.method == "bayesian" and self._duplicate(values):
                # It would ask once more for the place that it believes in.
                another = self._random_values()
                return {"status": "RUNNING", "values": shortened(another)} if another else {"status": "STOPPED"}
            return {**response, "values": values}

        def save(self) -> None:
            """Nothing: a file of several that is written while the process is killed would be half a state."""

        def _save_trial(self, trial: Any) -> None:
            """Nothing, likewise."""

    common = {
        "objective": keras_tuner.Objective("val_loss", "min"),
        "hyperparameters": _space(settings),
        "seed": plan.seed,
        "max_consecutive_failed_trials": plan.trials + 1,
    }
    if plan.method == "hyperband":
        oracle = Oracle(max_epochs=plan.resource, factor=3, hyperband_iterations=plan.repetitions, **common)
    else:
        oracle = Oracle(max_trials=plan.trials, **common)
    oracle.verbose = 0
    return oracle


def oracle_state(oracle: Any) -> dict[str, Any]:
    """Returns all that an oracle between two trials knows, for JSON."""
    return {"own": oracle.get_state(), "trials": [trial.get_state() for trial in oracle.trials.values()]}


def restore_oracle(oracle: Any, state: Mapping[str, Any]) -> None:
    """Gives a new oracle of `build_oracle` what `oracle_state` said of another one."""
    from keras_tuner.engine.trial import Trial

    oracle.trials = {one["trial_id"]: Trial.from_state(one) for one in state["trials"]}
    oracle.set_state(state["own"])


def ask(oracle: Any, most: int) -> list[str]:
    """Asks for trials that may run at once: the next that do not depend on the result of one another.

    Asked for one at a time, with the result of each told before the next, the oracle would choose the same. Random
    search: all are such. Hyperband: those of one round of a bracket. Bayesian: the random ones at the beginning.

    Args:
        oracle: from `build_oracle`.
        most: trials at most, 1 or above.

    Returns:
        Their identifiers, by which `oracle.trials` has them; none where nothing is left to try.
    """
    wave: list[str] = []
    with _quiet_oracle():
        while len(wave) < most and not (wave and _waits_for_results(oracle)):
            before = json.dumps(oracle_state(oracle)) if wave else ""
            trial = oracle.create_trial(f"catdog {len(oracle.trials)}")
            if trial.status == "RUNNING" and (not wave or _round(trial) == _round(oracle.trials[wave[0]])):
                wave.append(trial.trial_id)
                continue
            if wave:
                # Too early: with the results, it may choose otherwise.
                restore_oracle(oracle, json.loads(before))
            break
    return wave


def _waits_for_results(oracle: Any) -> bool:
    """Says whether a Bayesian oracle may have enough results for a model of them, once the open trials have ended."""
    import keras_tuner

    if not isinstance(oracle, keras_tuner.oracles.BayesianOptimizationOracle):
        return False
    # As in its populate_space.
    enough = oracle.num_initial_points or max(3 * len(oracle.hyperparameters.space), 3)
    return sum(trial.status in ("COMPLETED", "RUNNING") for trial in oracle.trials.values()) >= enough


def _round(trial: Any) -> list[Any]:
    """Tells a Hyperband trial's round from others."""
    return [trial.hyperparameters.values.get(f"tuner/{name}") for name in ("bracket", "round")]


def open_trials_of(oracle: Any) -> list[str]:
    """Returns the identifiers of trials that the oracle was asked for and has no result of, in order."""
    return [trial_id for trial_id in oracle.start_order if oracle.trials[trial_id].status == "RUNNING"]


def tell(oracle: Any, trial_id: str, val_loss: float | None) -> None:
    """Tells the result of a trial, in the order in which they were asked for; None: it failed."""
    trial = oracle.trials[trial_id]
    trial.status = "FAILED" if val_loss is None else "COMPLETED"
    with _quiet_oracle():
        if val_loss is not None:
            oracle.update_trial(trial_id, {"val_loss": val_loss})
        oracle.end_trial(trial)


def _short(value: float, low: float, high: float) -> float:
    """Rounds to two significant digits, inside the range."""
    return min(max(float(f"{value:.2g}"), low), high)


def _space(settings: TuneParams) -> Any:
    """Describes the search space to Keras Tuner."""
    import keras_tuner

    space = keras_tuner.HyperParameters()

    def add(name: str, kind: type, sampling: str) -> None:
        candidates = getattr(settings, name)
        if not isinstance(candidates, str):
            space.Choice(name, list(candidates))
            return
        low, high = parse_range(candidates)
        (space.Int if kind is int else space.Float)(name, kind(low), kind(high), sampling=sampling)

    add("learning_rate", float, "log")
    add("optimizer", str, "")
    add("hidden_layers", int, "linear")
    add("dropout", float, "linear")
    layers = settings.hidden_layers
    if isinstance(layers, str):
        low, high = map(int, layers.split(".."))
        layers = tuple(range(low, high + 1))
    if any(layers):
        # The size of layers that are not there is not tried.
        with space.conditional_scope("hidden_layers", [count for count in layers if count]):
            add("hidden_units", int, "log")
    return space


@contextlib.contextmanager
def _quiet_oracle() -> Iterator[None]:
    """Keeps an oracle's and scikit-learn's notices from the screen, and its small matrices from many threads.

    On two busy cores, threads make the Gaussian process ten times as slow.
    """
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1, "blas"), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def train_params(values: Mapping[str, Any], base: TrainParams, settings: TuneParams, plan: Plan) -> TrainParams:
    """Returns the parameters of one trial.

    Args:
        values: as Keras Tuner chose them.
        base: all that is not searched.
        settings: the longest training and the patience of a trial; `base` holds if it has less.
        plan: of the search; a Hyperband trial gets the share of the epochs that its values say.
    """
    limited = _unsearched(base, settings)
    share = values.get("tuner/epochs", plan.resource) / plan.resource
    layers = values["hidden_layers"]
    return limited.model_copy(
        update={
            "learning_rate": values["learning_rate"],
            "optimizer": values["optimizer"],
            "hidden_units": (values["hidden_units"],) * layers if layers else (),
            "dropout": values["dropout"],
            "epochs": math.ceil(limited.epochs * share),
        }
    )


def _described(train: TrainParams) -> dict[str, Any]:
    """The columns of a row that say what was tried."""
    searched: dict[str, Any] = train.model_dump(include={"learning_rate", "optimizer", "dropout", "epochs", "patience"})
    return searched | {"hidden_units": json.dumps(train.hidden_units, separators=(",", ":"))}


def _overrides(row: Mapping[Any, Any], base: TrainParams | None) -> dict[str, str]:
    """Returns a trial's parameters as `-S` takes them; epochs and patience only where `base` has others."""
    names = list(SEARCHED)
    names += [name for name in ("epochs", "patience") if base is None or row[name] != getattr(base, name)]
    return {f"train.{name}": _override_text(row[name]) for name in names}


def _override_text(value: Any) -> str:
    # From a table, numbers are NumPy's.
    return value if isinstance(value, str) else json.dumps(getattr(value, "item", lambda: value)())


# --- one trial --------------------------------------------------------------------------------------------------------

Outcome = dict[str, Any]
"""The columns of a row that a trial measured: status, error, seconds, and where it finished the others."""


@dataclass(frozen=True)
class Trial:
    """A head to fit."""

    number: int  # from 1
    train: TrainParams

    @property
    def name(self) -> str:
        """What it is called in a message."""
        return f"trial {self.number}"


def open_trials(features: Path, params: Params, classes: int, plan: Plan, weights: Path) -> Callable[[Trial], Outcome]:
    """Takes the features of train and val into memory, where they fit; returns what runs a trial on them.

    Args:
        features: the folder with them.
        params: of the pipeline.
        classes: their number.
        plan: of the search.
        weights: the folder in which Hyperband keeps the state of each training, so that a longer trial goes on with it.
    """
    from catdog.runtime import prepare_keras

    prepare_keras(params.seed, precision=params.runtime.precision)
    train, val = open_features(features, "train", views=True), open_features(features, "val")
    data = _Data(train, val, classes, gather(train, val))

    def run(trial: Trial) -> Outcome:
        return _run_trial(trial.train, data, params.seed, _checkpoints(trial.train, plan, weights))

    return run


def _run_trial(train: TrainParams, data: _Data, seed: int, checkpoints: Checkpoints) -> Outcome:
    """Fits a head, and returns what came out."""
    from catdog.model import build_head
    from catdog.runtime import full_precision
    from catdog.training import best_epoch

    started = time.monotonic()
    outcome: Outcome
    try:
        with full_precision():
            head = build_head(data.train.size, data.classes, train, seed)
        history = data.fit(head, train, seed, checkpoints)
    except CatdogError as error:
        # The parameters fit together, so it diverged.
        outcome = {"status": "failed", "error": str(error)}
    else:
        best = best_epoch(history)
        outcome = {"status": "finished", "error": "", "best_epoch": int(best["epoch"])}
        outcome |= {name: float(best[name]) for name in ("val_loss", "val_accuracy")}
    return outcome | {"seconds": round(time.monotonic() - started, 3)}


def _checkpoints(train: TrainParams, plan: Plan, weights: Path) -> Checkpoints:
    """Where the state of a training is kept, if a longer one can go on with it."""
    # A cosine of more epochs is another one from the first step on.
    if plan.method != "hyperband" or train.schedule != "constant":
        return Checkpoints(None)
    settings = train.model_dump(mode="json", exclude={"epochs"})
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    return Checkpoints(weights / name, seconds_between=math.inf)


@dataclass(frozen=True)
class _Data:
    """The features of both splits, and how a head is fitted on them."""

    train: FeatureSet
    val: FeatureSet
    classes: int
    gathered: Gathered | None  # None: read from disk batch by batch

    def fit(self, head: keras.Model, params: TrainParams, seed: int, checkpoints: Checkpoints) -> pd.DataFrame:
        """Fits a head as `training.fit_head` does, and returns the same history."""
        # Its notices and its own progress bar would run into that of the search.
        with contextlib.redirect_stderr(io.StringIO()):
            return fit_either_way(head, self.train, self.val, self.gathered, params, seed=seed, checkpoints=checkpoints)
