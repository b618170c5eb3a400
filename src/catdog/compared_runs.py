"""Finds the runs that `catdog compare` names, in DVC, git and MLflow, and reads what is compared of them."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog import paths
from catdog.comparison import ComparedRun, listed, meaning
from catdog.config import flatten
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions
from catdog.files import parse_yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

WORKSPACE = "workspace"
_MAKE_IT = "`dvc repro`"
_ROUNDING = 2e-6  # probabilities have six digits, and two of them are compared
_FULL_HASH = re.compile("[0-9a-f]{20,40}")  # of git or MLflow
_EXPERIMENT = re.compile("([0-9a-f]{40}) refs/exps/([0-9a-f]{2}/[0-9a-f]{38})/(.+)")  # docs of DVC: "refs/exps"


def read_runs(root: Path, names: Iterable[str]) -> list[ComparedRun]:
    """Finds runs by their names and reads what is compared.

    A name is looked for in this order, and a prefix names one kind:

    1. `workspace`: the files as they lie in `root`;
    2. `exp:` a DVC experiment; of several with one name that which started from HEAD, as in DVC itself;
    3. `git:` a revision: branch, tag, HEAD, hash and what else `git rev-parse` understands;
    4. `mlflow:` a run's id (that of a stage stands for its parent), or the name of a parent run; of several with one
       name that which FINISHED.

    Predictions that are not in the workspace come from DVC's cache, else from its remote, and are not stored.

    Args:
        root: the repository's root.
        names: of the runs.

    Raises:
        CatdogError: a name is unknown or stands for several runs, or a run has no predictions or unreadable ones.
    """
    finder = _Finder(root)
    return [finder.read(name) for name in names]


def parse_predictions(text: str, source: str) -> LabelledPredictions:
    """Reads a predictions.csv as `evaluation.prediction_table` makes it.

    The classes are those of its columns `p_<class>`, sorted. What a run predicted is told by the column `predicted`:
    the threshold is chosen to give just that, and a probability that rounding put on its wrong side is moved back by
    the millionth that rounding took.

    Args:
        text: the CSV.
        source: what to call it in a message.

    Raises:
        CatdogError: a column is missing, a value is impossible, or `predicted` contradicts the probabilities.
    """
    try:
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise CatdogError(f"{source} is not a table of predictions: {' '.join(str(error).split())}") from None
    columns = sorted(str(column) for column in table if str(column).startswith("p_"))
    for name in ("path", "label", "predicted"):
        if name not in table:
            raise CatdogError(f"{source} has no column {name}; {_MAKE_IT} writes it anew")
    if len(columns) < 2 or table.empty:
        raise CatdogError(f"{source} has no images or fewer than two columns p_<class>; {_MAKE_IT} writes it anew")
    class_names = tuple(column.removeprefix("p_") for column in columns)
    numbers = {name: number for number, name in enumerate(class_names)}
    try:
        labels = np.array([numbers[label] for label in table["label"]], np.int64)
        predicted = np.array([numbers[label] for label in table["predicted"]], np.int64)
    except KeyError as error:
        raise CatdogError(
            f"{source} names the class {error.args[0]} but has no column p_{error.args[0]}; {_MAKE_IT} writes it anew"
        ) from None
    probabilities = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float32)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise CatdogError(f"{source} holds a probability that is no number from 0 to 1; {_MAKE_IT} writes it anew")
    if table["path"].duplicated().any():
        twice = table["path"][table["path"].duplicated()].iloc[0]
        raise CatdogError(f"{source} names the image {twice} twice; {_MAKE_IT} writes it anew")
    probabilities, threshold = _decided(probabilities, predicted, source)
    return LabelledPredictions(tuple(table["path"]), labels, probabilities, class_names, threshold)


def _decided(
    probabilities: npt.NDArray[np.float32], predicted: npt.NDArray[np.int64], source: str
) -> tuple[npt.NDArray[np.float32], float]:
    """Returns probabilities and a threshold that give `predicted`."""
    rows, column = np.arange(len(predicted)), predicted
    threshold = 0.5
    if probabilities.shape[1] == 2:
        column, second = np.ones_like(predicted), probabilities[:, 1]
        highest = second[predicted == 0].max(initial=np.float32(0))
        lowest = second[predicted == 1].min(initial=np.float32(1))
        if not highest < threshold <= lowest:
            threshold = float(np.nextafter(highest, np.float32(2)))
        least = np.where(predicted == 1, np.float32(threshold), second)
    else:
        others = probabilities.copy()
        others[rows, predicted] = 0
        just_above = np.nextafter(others.max(axis=1), np.float32(2))
        least = np.where(probabilities.argmax(axis=1) == predicted, 0, just_above)
    moved = probabilities.copy()
    moved[rows, column] = np.maximum(moved[rows, column], least)
    if (moved - probabilities).max() > _ROUNDING:
        raise CatdogError(f"the column predicted of {source} contradicts its probabilities; {_MAKE_IT} writes it anew")
    return moved, threshold


class _Finder:
    """Finds runs by name. What lists them is asked once, and MLflow, which takes a second, only when it has to be."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> ComparedRun:
        kind, colon, rest = name.partition(":")
        if not colon or kind not in ("exp", "git", "mlflow"):
            kind, rest = "", name
        shown = rest[:8] if _FULL_HASH.fullmatch(rest) else rest
        if not kind and rest == WORKSPACE:
            return _read_revision(self.root, shown, None, f"{_MAKE_IT} makes it")
        experiment = self._experiment(rest) if kind in ("", "exp") else None
        revision = self._revision(rest) if kind in ("", "git") else None
        if experiment and revision and experiment != revision:
            raise CatdogError(
                f"{rest} is both a DVC experiment and a git revision; write exp:{rest} or git:{rest} for the one meant"
            )
        if experiment:
            return _read_revision(self.root, shown, experiment, f"`dvc exp apply {rest}` and {_MAKE_IT} make it anew")
        if revision:
            return _read_revision(self.root, shown, revision, f"`git checkout {rest}` and {_MAKE_IT} make it anew")
        parent = self._mlflow_run(rest) if kind in ("", "mlflow") else None
        if self.client is not None and parent is not None:
            return _read_mlflow_run(self.client, parent, shown)
        raise CatdogError(f"there is no {_KINDS[kind]} {rest!r}; {self._hint(kind, rest)}")

    @cached_property
    def experiments(self) -> dict[str, dict[str, str]]:
        """Commits of the finished DVC experiments, by name and by the commit they started from."""
        found: dict[str, dict[str, str]] = {}
        for line in _git(self.root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines():
            if parts := _EXPERIMENT.fullmatch(line):
                commit, baseline, name = parts.groups()
                found.setdefault(name, {})[baseline.replace("/", "")] = commit
        return found

    def _experiment(self, name: str) -> str | None:
        commits = self.experiments.get(name, {})
        if len(commits) > 1:
            here = commits.get(self._revision("HEAD") or "")
            if here:
                return here
            raise CatdogError(
                f"{len(commits)} DVC experiments are named {name}; give the revision of the one meant: "
                + ", ".join(sorted(commit[:7] for commit in commits.values()))
            )
        return next(iter(commits.values()), None)

    def _revision(self, name: str) -> str | None:
        return _git(self.root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip() or None

    @cached_property
    def client(self) -> MlflowClient | None:
        """The tracking store; None where there is none yet, because connecting would make one."""
        from catdog.tracking import connect

        if not os.environ.get("MLFLOW_TRACKING_URI") and not (self.root / "mlflow.db").exists():
            return None
        with _store_errors():
            return connect(self.root)

    @cached_property
    def parents(self) -> list[Run]:
        """The parent runs of the experiment's pipeline runs, newest first."""
        from catdog.tracking import KEY_TAG, experiment_name

        if self.client is None:
            return []
        with _store_errors():
            experiment = self.client.get_experiment_by_name(experiment_name())
            runs: list[Run] = self.client.search_runs(
                [experiment.experiment_id],
                f"tags.`{KEY_TAG}` LIKE '%'",
                order_by=["attributes.start_time DESC"],
                max_results=50_000,
            )
            return runs

    def _mlflow_run(self, name: str) -> Run | None:
        from catdog.tracking import PARENT_TAG

        run = self._mlflow_run_by_id(name)
        if run is not None:
            return self._mlflow_run_by_id(run.data.tags.get(PARENT_TAG, "")) or run
        named = [run for run in self.parents if run.info.run_name == name]
        named = [run for run in named if run.info.status == "FINISHED"] or named
        if len(named) > 1:
            raise CatdogError(
                f"{len(named)} MLflow runs are named {name}; give the id of the one meant, newest first: "
                + ", ".join(run.info.run_id for run in named[:5])
            )
        return named[0] if named else None

    def _mlflow_run_by_id(self, run_id: str) -> Run | None:
        from mlflow.exceptions import MlflowException

        if self.client is None or not re.fullmatch("[0-9a-f]{32}", run_id):
            return None
        with _store_errors():
            try:
                return self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        return None

    def _hint(self, kind: str, name: str) -> str:
        known = set() if kind else {WORKSPACE}
        if kind in ("", "exp"):
            known |= set(self.experiments)
        if kind in ("", "git"):
            refs = ("refs/heads", "refs/tags", "refs/remotes")
            known |= {"HEAD", *_git(self.root, "for-each-ref", "--format=%(refname:short)", *refs).splitlines()}
        if kind in ("", "mlflow"):
            known |= {run.info.run_name for run in self.parents}
        close = difflib.get_close_matches(name, sorted(known), n=3)
        if close:
            return f"did you mean {' or '.join(close)}?"
        return f"{_LISTS[kind] if kind else listed(list(_LISTS.values()))} will list what there is"


_KINDS = {
    "": "DVC experiment, git revision or MLflow run",
    "exp": "DVC experiment",
    "git": "git revision",
    "mlflow": "MLflow run",
}
_LISTS = {"exp": "`dvc exp list --all-commits`", "git": "`git log --all --oneline`", "mlflow": "`mlflow ui`"}


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails."""
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return answer.stdout if answer.returncode == 0 else ""


def _read_revision(root: Path, name: str, commit: str | None, remedy: str) -> ComparedRun:
    """Reads the state of a commit, or of the working copy; `remedy` says what brings its results back."""
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(str(root), rev=commit)

    def read(path: Path) -> str:
        try:
            text: str = files.read_text(path.as_posix(), encoding="utf-8")
        except FileNotFoundError:
            return ""
        except Exception as error:  # every kind of remote has its own
            cause = " ".join(str(error).split())[:200]
            raise CatdogError(
                f"{path} of {name} cannot be read through DVC ({cause}); check its settings and its remote"
            ) from None
        return text

    current = dict(flatten(_read_yaml(read(paths.PARAMS), f"{paths.PARAMS} of {name}")))
    stages = _read_yaml(read(Path("dvc.lock")), f"dvc.lock of {name}").get("stages", {})
    used: dict[str, str] = {}
    for entry in stages.values():
        used |= flatten(entry.get("params", {}).get(paths.PARAMS.as_posix(), {}))
    changed = [key for key, value in used.items() if meaning(current.get(key)) != meaning(value)]
    outs = {out["path"]: out.get("md5", "") for entry in stages.values() for out in entry.get("outs", [])}
    predictions = paths.PREDICTIONS
    text = read(predictions)
    if not text:
        lost = "is neither in DVC's cache nor to be had from its remote"
        raise CatdogError(
            f"{predictions} of {name} {lost if predictions.as_posix() in outs else 'does not exist'}; {remedy}"
        )
    parsed = parse_predictions(text, f"{predictions} of {name}")
    try:
        manifest = read(paths.MANIFEST)
    except CatdogError:
        manifest = ""  # the comparison says that it cannot be had
    notes = (
        f"{paths.PARAMS} of {name} was changed after its last run, in {listed(changed)}; shown are the values that "
        "made the results",
    )
    return ComparedRun(
        name,
        current | used,
        _read_metrics(read(paths.METRICS), f"{paths.METRICS} of {name}"),
        parsed,
        groups=_read_groups(manifest, parsed.paths, f"{paths.MANIFEST} of {name}"),
        data=outs.get(paths.RAW.as_posix(), ""),
        notes=notes if changed else (),
    )


def _read_groups(text: str, images: Iterable[str], source: str) -> dict[str, str] | None:
    """The manifest's groups of the test images, by path; None where there is no manifest that tells them."""
    if not text:
        return None
    try:
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise CatdogError(
            f"{source} is not a table: {' '.join(str(error).split())}; {_MAKE_IT} writes it anew"
        ) from None
    if not {"path", "group"} <= set(table.columns):
        return None
    groups = dict(zip(table["path"], table["group"], strict=True))
    return {path: groups[path] for path in images if path in groups}


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    tree = parse_yaml(text, source) or {}
    if not isinstance(tree, dict):
        raise CatdogError(f"{source} holds no names and values; `git checkout` brings it back")
    return tree


def _read_metrics(text: str, source: str) -> dict[str, float]:
    try:
        report = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise CatdogError(f"{source} is not valid JSON ({error}); {_MAKE_IT} writes it anew") from None
    return {name: value for name, value in report.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        place = os.environ.get("MLFLOW_TRACKING_URI") or "mlflow.db"
        cause = " ".join(str(error).split())[:200]
        raise CatdogError(f"the tracking store {place} failed ({cause}); check that it can be reached") from None


def _read_mlflow_run(client: MlflowClient, parent: Run, name: str) -> ComparedRun:
    """Reads a parent run, and the predictions of its latest `evaluate`."""
    from mlflow.exceptions import MlflowException

    from catdog.tracking import PARENT_TAG, STAGE_TAG

    with _store_errors():
        children = client.search_runs(
            [parent.info.experiment_id],
            f"tags.`{PARENT_TAG}` = '{parent.info.run_id}' and tags.`{STAGE_TAG}` = 'evaluate' "
            "and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
    predictions = paths.PREDICTIONS.name
    if not children:
        raise CatdogError(f"the MLflow run {name} has no stage evaluate that finished; choose one that has")
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = Path(client.download_artifacts(children[0].info.run_id, predictions, folder)).read_text("utf-8")
        except (MlflowException, OSError) as error:
            cause = " ".join(str(error).split())[:200]
            raise CatdogError(
                f"the artifact {predictions} of the MLflow run {name} cannot be read ({cause}); name the git "
                "revision or DVC experiment instead"
            ) from None
    return ComparedRun(
        name,
        parent.data.params,
        # Of the copies of the stages' metrics only those of `evaluate` have plain names.
        {key: value for key, value in parent.data.metrics.items() if "." not in key},
        parse_predictions(text, f"{predictions} of {name}"),
        data=parent.data.tags.get(f"dvc.out.{paths.RAW.as_posix()}", ""),
    )
