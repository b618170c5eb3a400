"""The results as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pipeline import STAGES
from benchmarks.recipes import EPOCHS, RECIPES
from benchmarks.spread import Spread, exponent, fit_line, ratios

Results = dict[str, Any]
"""The content of a results file: facts and measurements."""


def render(results: Results, picture: str) -> str:
    """Returns the page; `picture` is the file name of the plot. Parts that were not measured are left out."""
    parts = [_head(results, picture)]
    for part in (_wanted, _pipeline, _stages, _recipes, _limits, _scale, _near_duplicates):
        text = part(results)
        if text:
            parts.append(text)
    return "\n\n".join(parts) + "\n"


def counts_of(results: Results, part: str) -> list[int]:
    """The numbers of images at which a part was measured, ascending."""
    keys = (key.split("/") for key in results["measurements"])
    return sorted(int(key[1]) for key in keys if key[0] == part and len(key) > 1)


def rounds_of(results: Results, key: str) -> list[Any]:
    """The measurements under a key, one a round; none where it was not measured."""
    measured: list[Any] = results["measurements"].get(key, [])
    return measured


def described_photographs(results: Results) -> str:
    """Which photographs were measured, as a phrase."""
    names = results["facts"]["photographs"]
    return f"photographs of {', '.join(names)}" if names else "drawn sample pictures, no photographs"


def rates(measured: Sequence[dict[str, Any]], part: str) -> list[float]:
    """Images a second of each round of a limit: `part` is step, limit or stage."""
    return [one[part].get("images", one["limit"]["images"]) / one[part]["seconds"] for one in measured]


def _head(results: Results, picture: str) -> str:
    facts = results["facts"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    return "\n".join(
        [
            f"# Measured on {facts['date']}",
            "",
            f"{facts['machine']}; {facts['memory_gb']} GB of memory; load of the machine before: "
            f"{facts['load_before']}; revision {facts['revision']}; Python {facts['python']}, {packages}.",
            "",
            f"Of {described_photographs(results)}, in the same mix at every number, repeated with noise where they are "
            "too few. Several rounds give the median and, in brackets, the least and the largest. Seconds are wall "
            "clock and hold the start of each process; memory is the peak of the largest process; 1 MB is a million "
            "bytes. Files are in the system's cache when they are read.",
            "",
            f"![Plot]({picture})",
        ]
    )


@dataclass(frozen=True)
class Wanted:
    """What the project asks of a machine with two cores."""

    name: str
    unit: str
    bound: float
    least: bool  # whether the bound is the least or the largest that is good
    values: Callable[[Results, int], list[float]]  # of the rounds, at a number of photographs


def _of_pipeline(name: str) -> Callable[[Results, int], list[float]]:
    return lambda results, count: [one[name]["seconds"] for one in rounds_of(results, f"pipeline/{count}")]


def _of_limit(step: str) -> Callable[[Results, int], list[float]]:
    def values(results: Results, _: int) -> list[float]:
        measured = rounds_of(results, f"limits/{step}")
        return [ours / limit for ours, limit in zip(rates(measured, "step"), rates(measured, "limit"), strict=True)]

    return values


WANTED_SHARES = {"preprocess": 0.8, "embed": 0.9}
"""How much of its libraries' speed a step should reach, by step."""

WANTED = (
    Wanted("whole pipeline", "s", 300, False, _of_pipeline("repro")),
    Wanted("another head (`dvc exp run -S train.learning_rate=0.002`)", "s", 20, False, _of_pipeline("another_head")),
    Wanted("`dvc repro` with nothing to do", "s", 1.5, False, _of_pipeline("nothing_to_do")),
    Wanted("`catdog --help`", "s", 0.5, False, _of_pipeline("help")),
    *(Wanted(f"{step}, share of its limit", "", least, True, _of_limit(step)) for step, least in WANTED_SHARES.items()),
)
WANTED_AT = 12_000
"""The number of photographs that the wishes are about."""


def _wanted(results: Results) -> str:
    counts = counts_of(results, "pipeline")
    at = WANTED_AT if WANTED_AT in counts else max(counts, default=0)
    rows = []
    for one in WANTED:
        values = one.values(results, at)
        if values:
            spread = Spread.of(values)
            good = spread.median >= one.bound if one.least else spread.median <= one.bound
            bound = f"{'at least' if one.least else 'at most'} {one.bound:g} {one.unit}".strip()
            rows.append([one.name, bound, spread.told(2), "yes" if good else "no"])
    where = f", with {at:,} photographs" if at else ""
    return _section(f"What is wanted of two cores{where}", ["", "wanted", "measured", "reached"], rows)


def _pipeline(results: Results) -> str:
    rows = []
    for count in counts_of(results, "pipeline"):
        measured = rounds_of(results, f"pipeline/{count}")
        rows.append(
            [
                f"{count:,}",
                _spread(one["repro"]["seconds"] for one in measured),
                f"{count / Spread.of([one['repro']['seconds'] for one in measured]).median:,.0f}",
                _spread((one["repro"]["peak_mb"] for one in measured), 0),
                f"{measured[0]['cache_mb']:,.0f}",
                f"{measured[0]['tracking_mb']:,.1f}",
                _spread((one["another_head"]["seconds"] for one in measured), 1),
                _spread((one["nothing_to_do"]["seconds"] for one in measured), 2),
                _spread((100 * one["accuracy"] for one in measured), 2),
            ]
        )
    head = ["images", "`dvc repro`, s", "images/s", "peak MB", "DVC's cache, MB", "MLflow, MB"]
    return _section(
        "The whole pipeline: from an archive to an evaluated, tracked model",
        [*head, "another head, s", "nothing to do, s", "test accuracy, %"],
        rows,
    )


def _stages(results: Results) -> str:
    rows = []
    for count in counts_of(results, "pipeline"):
        measured = rounds_of(results, f"pipeline/{count}")
        for stage in STAGES:
            seconds = [one["stages"][stage]["seconds"] for one in measured]
            rows.append(
                [
                    f"{count:,}",
                    stage,
                    Spread.of(seconds).told(),
                    f"{count / Spread.of(seconds).median:,.0f}",
                    f"{Spread.of([one['stages'][stage]['cpu_seconds'] for one in measured]).median:,.1f}",
                    _spread((one["stages"][stage]["peak_mb"] for one in measured), 0),
                    f"{measured[0]['stages'][stage]['disk_mb']:,.2f}",
                ]
            )
        rest = [one["repro"]["seconds"] - sum(stage["seconds"] for stage in one["stages"].values()) for one in measured]
        rows.append([f"{count:,}", "DVC itself", Spread.of(rest).told(), "", "", "", ""])
    head = ["images", "stage", "s", "images/s", "processor s", "peak MB", "outputs, MB"]
    return _section("Each stage, a process of its own", head, rows)


def _recipes(results: Results) -> str:
    rows = []
    for count in counts_of(results, "tutorial"):
        measured = rounds_of(results, f"tutorial/{count}")
        ours = rounds_of(results, f"pipeline/{count}")
        for recipe in RECIPES:
            told = [one[recipe] for one in measured]
            ten = [one["ten_epochs_seconds"] for one in told]
            train = told[0]["train"]
            rows.append(
                [
                    f"{count:,}",
                    f"`{recipe}`",
                    f"{train['measured']:,} of {train['images']:,}",
                    _spread(one["train"]["measured"] / one["train"]["seconds"] for one in told),
                    Spread.of(ten).told(0),
                    _spread((one["peak_mb"] for one in told), 0),
                    _spread((100 * one["accuracy"] for one in told), 2),
                    ratios(ten, [one["repro"]["seconds"] for one in ours]).told() if ours else "",
                    ratios(ten, [_embed_and_train(one) for one in ours]).told() if ours else "",
                    ratios(ten, [one["another_head"]["seconds"] for one in ours]).told() if ours else "",
                ]
            )
        if ours:
            accuracy = _spread((100 * one["accuracy"] for one in ours), 2)
            seconds = _spread((one["repro"]["seconds"] for one in ours), 0)
            peak = _spread((one["repro"]["peak_mb"] for one in ours), 0)
            rows.append([f"{count:,}", "this pipeline, all of it", "all", "", seconds, peak, accuracy, "1", "", ""])
    epochs = results["facts"]["settings"]["recipe_epochs"]
    run = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    head = ["images", "recipe", "trained on", "images/s in `fit`", f"{EPOCHS} epochs, s (scaled)", "peak MB"]
    head += [f"test accuracy after {run}, %", "times the whole pipeline", "times embed + train", "times another head"]
    text = _section("The tutorials' recipes", head, rows)
    return text and text + (
        f"\n\nThe recipes ran for {run} on the images named; their time is scaled to {EPOCHS} epochs of all images, "
        "with validation after each and one test; their accuracy is that after the epochs that ran. They begin with "
        "the pipeline's split as folders of JPEG files, whose writing is not counted. The pipeline begins with the "
        "archive, and its accuracy is that of its finished model."
    )


def _embed_and_train(one: dict[str, Any]) -> float:
    return float(one["stages"]["embed"]["seconds"] + one["stages"]["train"]["seconds"])


_LIMITS = {
    "read": "members of the archive, read one after another",
    "split": "read, `cv2.imdecode` at full size",
    "preprocess": "read, `imdecode`, `resize` by area, `imencode`",
    "embed": "OpenVINO alone on pixels in memory",
    "evaluate": "OpenVINO alone on pixels in memory",
}


def _limits(results: Results) -> str:
    rows = []
    for step, what in _LIMITS.items():
        measured = rounds_of(results, f"limits/{step}")
        if not measured:
            continue
        limit = measured[0]["limit"]
        rate = Spread.of(rates(measured, "limit"))
        row = [step, f"{limit['images']:,}", what, limit.get("settings", ""), rate.told(0)]
        if step == "read":
            speed = Spread.of([one["limit"]["megabytes"] / one["limit"]["seconds"] for one in measured])
            rows.append([*row[:3], f"{speed.told(0)} MB/s", row[4], "", "", ""])
        else:
            ours = rates(measured, "step")
            share = ratios(ours, rates(measured, "limit"))
            whole = [one["step"]["images"] / one["stage"]["seconds"] for one in measured]
            rows.append([*row, Spread.of(ours).told(0), share.told(2), Spread.of(whole).told(0)])
    head = ["step", "images", "limit: the libraries in a plain loop", "with", "limit, images/s", "step, images/s"]
    return _section(
        "Each step beside what its libraries can do", [*head, "step / limit", "whole stage process, images/s"], rows
    )


def _scale(results: Results) -> str:
    counts = counts_of(results, "scale")
    if not counts:
        return ""
    measured = {count: rounds_of(results, f"scale/{count}")[0] for count in counts}
    rows = []
    for stage in STAGES:
        times = [measured[count]["stages"][stage]["seconds"] for count in counts]
        memory = [measured[count]["stages"][stage]["peak_mb"] for count in counts]
        row = [stage, *(f"{seconds:,.1f} s, {mb:,.0f} MB" for seconds, mb in zip(times, memory, strict=True))]
        rows.append([*row, *_growth(counts, times, memory)])
    times = [measured[count]["repro"]["seconds"] for count in counts]
    memory = [measured[count]["repro"]["peak_mb"] for count in counts]
    row = ["`dvc repro`", *(f"{seconds:,.1f} s, {mb:,.0f} MB" for seconds, mb in zip(times, memory, strict=True))]
    rows.append([*row, *_growth(counts, times, memory)])
    changed = ", ".join(f"{name}={value}" for name, value in results["facts"]["settings"]["scale"].items())
    head = ["", *(f"{count:,} images" for count in counts)]
    if len(counts) > 1:
        head += ["exponent of time", "ms an image", "start, s", "MB more per 1,000 images"]
    return _section("Growth with generated pictures", head, rows) + (
        f"\n\nPictures of 200x200 pixels, once, with {changed}. The exponent p says that time grows as images^p "
        "between the two largest numbers: 1 is linear, below 1 a fixed cost still counts. Milliseconds and start are "
        "those of the straight line nearest to all times; the growth of memory is that between the two largest numbers."
    )


def _growth(counts: Sequence[int], times: Sequence[float], memory: Sequence[float]) -> list[str]:
    if len(counts) < 2:
        return []
    line = fit_line(counts, times)
    more = (memory[-1] - memory[-2]) / (counts[-1] - counts[-2]) * 1000
    return [
        f"{exponent(counts, times):.2f}",
        f"{1000 * line.per_image:.2f}",
        f"{round(line.fixed, 1) + 0.0:.1f}",
        f"{more:+.1f}",
    ]


def _near_duplicates(results: Results) -> str:
    measured = rounds_of(results, "near_duplicates")
    rows = [[bits, f"{seconds:.1f}"] for bits, seconds in (measured[0] if measured else {}).items()]
    return _section("The search for near-duplicates among 100,000 hashes", ["distance, bits", "s"], rows)


def _spread(values: Any, digits: int = 1) -> str:
    return Spread.of(list(values)).told(digits)


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
