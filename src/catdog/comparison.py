"""Which of several runs is better, and whether the test images are enough to tell: `catdog compare`.

The first run is the baseline; every other one is a candidate that is held against it on the images that both judged.

Accuracy decides. McNemar's exact test looks at the images on which exactly one of the two is right (Dietterich 1998,
"Approximate statistical tests for comparing supervised classification learning algorithms"). Every other metric gets a
paired bootstrap: the same resampled images for both. McNemar's test takes the images for independent, which
near-duplicates are not: where there are some, accuracy gets the bootstrap, too, and whole groups of them are drawn, as
`evaluate` does. The more one looks at, the more differs by chance, so p-values
are corrected after Holm (1979): those of accuracy for the number of candidates, and those of the other metrics for the
number of candidates times metrics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog import paths
from catdog.bootstrap import holm, intervals, mcnemar, paired_differences
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions
from catdog.quality import first_members

LOWER_IS_BETTER = frozenset({"log_loss", "brier", "ece"})
SIGNIFICANCE = 0.05
"""A difference with a corrected p-value below this is called one."""
LEAST_COMMON = 0.8
"""The share of the smaller test set that both runs must have judged before they are tested against each other."""
SMALLEST = 0.00005
"""A difference that four digits do not show is none, however sure: predictions are stored with six."""
RESAMPLES = 2000
"""Of the tests, for each candidate. Two in so many is the smallest p-value, which is then corrected for ten metrics."""
INTERVAL_RESAMPLES = 1000

UNKNOWN_GROUPS = (
    "near-duplicates among the test images are not known, so each image counts on its own and a difference may be told "
    "that is none"
)
"""The caution of a verdict on two runs without a manifest."""

Outcome = Literal["better", "worse", "unclear"]
"""What a candidate is, compared with the baseline."""


@dataclass(frozen=True)
class ComparedRun:
    """One run of the pipeline, as far as it is compared."""

    name: str  # as people call it
    params: Mapping[str, str]  # that made the results, by dotted name
    metrics: Mapping[str, float]  # of reports/metrics.json
    predictions: LabelledPredictions
    groups: Mapping[str, str] | None = None  # by path, the same for near-duplicates, as in the manifest; None: unknown
    data: str = ""  # hash of the images it worked on; empty: unknown
    notes: tuple[str, ...] = ()  # what the reader should know about it, a sentence each


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval; the ends are NaN where none is known."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Difference:
    """What a metric says about a candidate and the baseline, on the images that both judged."""

    metric: str
    difference: float  # candidate minus baseline
    low: float  # ends of its 95 % interval
    high: float
    p: float  # corrected
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """A candidate against the baseline."""

    baseline: str
    candidate: str
    images: int  # test images that both judged
    only_baseline: int  # of these, on how many only the baseline is right
    only_candidate: int
    differences: tuple[Difference, ...]  # accuracy first; empty where the two could not be tested
    cautions: tuple[str, ...] = ()  # a sentence each
    grouped: bool | None = False  # whether near-duplicates were drawn together; None: not known which images are such

    @property
    def outcome(self) -> Outcome:
        """What accuracy says; "unclear" also where the two could not be tested."""
        return self.differences[0].outcome if self.differences else "unclear"


@dataclass(frozen=True)
class Comparison:
    """Everything that `catdog compare` tells."""

    runs: tuple[str, ...]  # names, the baseline first
    params: Mapping[str, tuple[str | None, ...]]  # only what differs: a value for each run, None where it has none
    metrics: Mapping[str, tuple[Estimate | None, ...]]  # one for each run, on all its test images
    verdicts: tuple[Verdict, ...]  # one for each candidate
    notes: tuple[str, ...] = ()


def compare(runs: Sequence[ComparedRun], *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compares runs with the first of them.

    Args:
        runs: two or more, with different names.
        resamples: of the tests' bootstrap, for each candidate.
        seed: draws them.

    Raises:
        CatdogError: there are fewer than two runs, two have one name, or they tell different classes apart.
    """
    baseline, *candidates = runs
    if not candidates:
        raise CatdogError(f"{baseline.name} alone cannot be compared; name two or more runs")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise CatdogError(f"{name} is named twice; name runs that differ")
    for run in candidates:
        _require_same_classes(baseline, run)
    pairs = [_common_images(baseline, run) for run in candidates]
    differences = _test(pairs, resamples * len(candidates), seed)
    return Comparison(
        runs=tuple(names),
        params=_differing_params(runs),
        metrics=_metrics(runs, seed),
        verdicts=tuple(
            _verdict(baseline, run, pair, told) for run, pair, told in zip(candidates, pairs, differences, strict=True)
        ),
        notes=tuple(note for run in runs for note in (*run.notes, *_group_notes(run))),
    )


@dataclass(frozen=True)
class _Pair:
    """What two runs predict for the images that both judged, in one order."""

    a: LabelledPredictions
    b: LabelledPredictions
    groups: npt.NDArray[np.int64] | None  # equal for near-duplicates; None: every image is on its own, or it is unknown
    enough: bool  # to test one against the other


def _require_same_classes(a: ComparedRun, b: ComparedRun) -> None:
    if a.predictions.class_names == b.predictions.class_names:
        return

    def classes(run: ComparedRun) -> str:
        known = run.predictions.class_names
        return ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")

    raise CatdogError(
        f"{a.name} tells {classes(a)} apart and {b.name} {classes(b)}; compare runs with the same classes in the same "
        "order"
    )


def _group_notes(run: ComparedRun) -> list[str]:
    if run.groups is not None:
        return []
    return [
        f"{paths.MANIFEST} of {run.name} cannot be had, which tells near-duplicates among its test images; its "
        "intervals take each image on its own and may be too narrow"
    ]


def _group_numbers(names: Sequence[str], *runs: ComparedRun) -> npt.NDArray[np.int64] | None:
    """Returns numbers that are equal for images that are in one group of any run; None where each is on its own."""
    links: list[tuple[int, int]] = []
    for run in runs:
        first: dict[str, int] = {}
        for row, name in enumerate(names):
            if (group := (run.groups or {}).get(name)) is not None and first.setdefault(group, row) != row:
                links.append((first[group], row))
    if not links:
        return None
    return first_members([np.array(links).T], len(names))


def _common_images(a_run: ComparedRun, b_run: ComparedRun) -> _Pair:
    """Pairs the images of one path and one label."""
    a, b = a_run.predictions, b_run.predictions
    place = {path: row for row, path in enumerate(b.paths)}
    rows = [
        (row, place[path])
        for row, path in enumerate(a.paths)
        if path in place and a.labels[row] == b.labels[place[path]]
    ]
    enough = len(rows) >= max(1, LEAST_COMMON * min(len(a.paths), len(b.paths)))
    common = _rows(a, [row for row, _ in rows])
    return _Pair(common, _rows(b, [row for _, row in rows]), _group_numbers(common.paths, a_run, b_run), enough)


def _rows(predictions: LabelledPredictions, rows: Sequence[int]) -> LabelledPredictions:
    chosen = np.asarray(rows, np.int64)
    return replace(
        predictions,
        paths=tuple(predictions.paths[row] for row in rows),
        labels=predictions.labels[chosen],
        probabilities=predictions.probabilities[chosen],
    )


def _test(pairs: Sequence[_Pair], resamples: int, seed: int) -> list[tuple[Difference, ...]]:
    """Returns for each pair what each metric says, accuracy first; nothing where there are not enough images.

    The p-values of all pairs are corrected together.
    """
    tables: list[dict[str, dict[str, float]]] = []
    accuracy: dict[tuple[int, str], float] = {}
    others: dict[tuple[int, str], float] = {}
    for number, pair in enumerate(pairs):
        # A metric that a class without images leaves undefined has nothing to say.
        table = (
            _by_metric(paired_differences(pair.a, pair.b, resamples, seed, pair.groups).dropna()) if pair.enough else {}
        )
        tables.append(table)
        others |= {(number, metric): row["p"] for metric, row in table.items() if metric != "accuracy"}
        if pair.enough:
            independent = pair.groups is None
            p = mcnemar(pair.a.correct, pair.b.correct)[2] if independent else table["accuracy"]["p"]
            accuracy[number, "accuracy"] = p
    p_values = {
        test: p for family in (accuracy, others) for test, p in zip(family, holm([*family.values()]), strict=True)
    }
    return [
        tuple(_difference(metric, row, p_values[number, metric]) for metric, row in table.items())
        for number, table in enumerate(tables)
    ]


def _by_metric(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The rows of a table by its column `metric`, in its order."""
    return {
        str(row.pop("metric")): {str(name): float(value) for name, value in row.items()}
        for row in table.to_dict("records")
    }


def _difference(metric: str, row: Mapping[str, float], p: float) -> Difference:
    difference = row["difference"]
    gain = -difference if metric in LOWER_IS_BETTER else difference
    told = p < SIGNIFICANCE and abs(gain) >= SMALLEST
    outcome: Outcome = "unclear" if not told else "better" if gain > 0 else "worse"
    return Difference(metric, difference, row["low"], row["high"], p, outcome)


def _verdict(a: ComparedRun, b: ComparedRun, pair: _Pair, differences: tuple[Difference, ...]) -> Verdict:
    common, sizes = len(pair.a.paths), (len(a.predictions.paths), len(b.predictions.paths))
    cautions = []
    if not pair.enough:
        cautions.append(
            f"{a.name} and {b.name} were tested on different images: {common:,} of {sizes[0]:,} and {sizes[1]:,} have "
            "the same path and label in both, too few to say which is better"
        )
    elif common < max(sizes):
        cautions.append(
            f"{a.name} was tested on {sizes[0]:,} images and {b.name} on {sizes[1]:,}; what follows is about the "
            f"{common:,} that both judged, the metrics above are not"
        )
    if pair.enough and a.data and b.data and a.data != b.data:
        cautions.append(
            f"{a.name} and {b.name} worked on different versions of {paths.RAW}; images of the same path and label are "
            "taken for the same"
        )
    unknown = a.groups is None and b.groups is None
    if pair.enough and unknown:
        cautions.append(UNKNOWN_GROUPS)
    only_a, only_b, _ = mcnemar(pair.a.correct, pair.b.correct)
    grouped = None if unknown else pair.groups is not None
    return Verdict(a.name, b.name, common, only_a, only_b, differences, tuple(cautions), grouped)


def _differing_params(runs: Sequence[ComparedRun]) -> dict[str, tuple[str | None, ...]]:
    names = dict.fromkeys(name for run in runs for name in run.params)
    values = {name: tuple(run.params.get(name) for run in runs) for name in names}
    return {name: row for name, row in values.items() if len({meaning(value) for value in row}) > 1}


def meaning(value: str | None) -> str | float | None:
    """Returns a parameter's value such that 1e-5 equals 0.00001, and 0 equals 0.0."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


def _metrics(runs: Sequence[ComparedRun], seed: int) -> dict[str, tuple[Estimate | None, ...]]:
    """Metrics of the predictions with intervals, then what else the runs report, e.g. a speed."""
    found: list[dict[str, Estimate]] = []
    for run in runs:
        groups = _group_numbers(run.predictions.paths, run)
        table = _by_metric(intervals(run.predictions, INTERVAL_RESAMPLES, seed, groups).dropna(subset=["value"]))
        estimates = {metric: Estimate(**row) for metric, row in table.items()}
        images = {"test_images": Estimate(len(run.predictions.labels))}
        reported = {
            name: Estimate(value) for name, value in run.metrics.items() if not name.endswith(("_low", "_high"))
        }
        found.append(images | estimates | {name: value for name, value in reported.items() if name not in estimates})
    names = dict.fromkeys(name for estimates in found for name in estimates)
    return {name: tuple(estimates.get(name) for estimates in found) for name in names}


@dataclass(frozen=True)
class _Section:
    heading: str
    table: Sequence[Sequence[str]] = ()  # its first row is the header
    lines: Sequence[str] = ()
    cautions: Sequence[str] = ()


def format_text(comparison: Comparison) -> str:
    """Returns the comparison as plain text with aligned columns; it ends with a newline."""
    blocks = []
    for section in _sections(comparison):
        blocks.append(section.heading)
        blocks += [f"CAUTION: {sentence}." for sentence in section.cautions]
        if section.table:
            widths = [max(map(len, column)) for column in zip(*section.table, strict=True)]
            blocks.append(
                "\n".join(
                    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                    for row in section.table
                )
            )
        if section.lines:
            blocks.append("\n".join(section.lines))
    return "\n\n".join(blocks) + "\n"


def format_markdown(comparison: Comparison) -> str:
    """Returns the comparison as GitHub Markdown; it ends with a newline."""
    blocks = []
    for section in _sections(comparison):
        blocks.append(f"### {_escaped(section.heading)}")
        blocks += [f"> **CAUTION: {_escaped(sentence)}.**" for sentence in section.cautions]
        if section.table:
            header, *rows = [[_escaped(cell) for cell in row] for row in section.table]
            rule = ["---"] * len(header)
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)))
        blocks += map(_escaped, section.lines)
    return "\n\n".join(blocks) + "\n"


def verdict_sentences(verdict: Verdict) -> list[str]:
    """Returns what the tests say in one or two sentences; none where there was no test."""
    if not verdict.differences:
        return []
    a, b = verdict.baseline, verdict.candidate
    images = _counted(verdict.images, "test image")
    accuracy = verdict.differences[0]
    told = {
        "better": f"{b} is better",
        "worse": f"{a} is better",
        "unclear": f"no difference can be told with {images}",
    }
    disagreement = (
        f"{b} is right on {_counted(verdict.only_candidate, 'picture')} where {a} is wrong, {a} on "
        f"{verdict.only_baseline:,} where {b} is wrong"
        if verdict.only_candidate or verdict.only_baseline
        else f"{a} and {b} are right on the same pictures"
    )
    test = " by a bootstrap of whole groups of near-duplicates" if verdict.grouped else ""
    sentences = [f"Accuracy: {disagreement}; {_p(accuracy.p)}{test}: {told[accuracy.outcome]}."]
    better = [entry.metric for entry in verdict.differences[1:] if entry.outcome == "better"]
    worse = [entry.metric for entry in verdict.differences[1:] if entry.outcome == "worse"]
    parts = [f"{name} is better in {listed(won)}" for name, won in ((b, better), (a, worse)) if won]
    if parts:
        sentences.append(f"Other metrics: {'; '.join(parts)}.")
    else:
        sentences.append(f"Other metrics: no difference can be told with {images}.")
    return sentences


def _sections(comparison: Comparison) -> Iterator[_Section]:
    params = [[name, *map(_param, values)] for name, values in comparison.params.items()]
    yield _Section(
        "Parameters that differ",
        [["", *comparison.runs], *params] if params else [],
        [] if params else ["None."],
        comparison.notes,
    )
    metrics = [[name, *map(_estimate, values)] for name, values in comparison.metrics.items()]
    yield _Section("Metrics on the test images, with 95 % intervals", [["", *comparison.runs], *metrics])
    for verdict in comparison.verdicts:
        winner = {"better": verdict.candidate, "worse": verdict.baseline, "unclear": "cannot be told"}
        rows = [
            [
                entry.metric,
                f"{_signed(entry.difference)} [{_signed(entry.low)}, {_signed(entry.high)}]",
                _p(entry.p).removeprefix("p ").removeprefix("= "),
                winner[entry.outcome],
            ]
            for entry in verdict.differences
        ]
        yield _Section(
            f"{verdict.candidate} against {verdict.baseline}, on {_counted(verdict.images, 'common test image')}",
            [["", "difference", "p", "better"], *rows] if rows else [],
            verdict_sentences(verdict),
            verdict.cautions,
        )
    if any(verdict.differences for verdict in comparison.verdicts):
        grouped = any(verdict.grouped for verdict in comparison.verdicts)
        yield _Section(
            "How to read it",
            lines=[
                f"Higher is better, except for {listed(sorted(LOWER_IS_BETTER))}. A difference is told where p is "
                f"below {SIGNIFICANCE}.",
                "p: McNemar's exact test for accuracy, a paired bootstrap for the rest; corrected (Holm) for the "
                "number of runs, and of the other metrics.",
                *([_ABOUT_GROUPS] if grouped else []),
            ],
        )


_ABOUT_GROUPS = (
    "Where test images are near-duplicates of each other, accuracy has the bootstrap, too, and whole groups are drawn: "
    "McNemar's test would take them for independent."
)


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if math.isnan(estimate.low):
        return f"{estimate.value:,.6g}"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # the sum turns a rounded -0 into 0


def _param(value: str | None) -> str:
    return "not set" if value is None else value or "''"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Returns "a", "a and b", or "a, b and c"; empty for none."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _escaped(text: str) -> str:
    """Keeps Markdown from reading signs of a name as its own; an underscore inside a word is none to it."""
    return re.sub(r"[\\`*<>|]|(?<!\w)_|_(?!\w)", lambda sign: f"\\{sign[0]}", text)
