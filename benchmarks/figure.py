"""The results as one picture: where the time goes, against the tutorials, against the libraries, and how it grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.recipes import EPOCHS, RECIPES
from benchmarks.spread import ratios
from benchmarks.tables import WANTED_SHARES, Results, counts_of, described_photographs, rates, rounds_of
from catdog.plots import (
    AMBER,
    BLACK,
    BLUE,
    DPI,
    GREEN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    PURPLE,
    SKY,
    save_figure,
    set_headline,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = ("download", "split", "preprocess", "embed", "train", "evaluate", "track")
_COLOURS = dict(zip(_SHOWN, (GREY, SKY, GREEN, BLUE, ORANGE, PURPLE, AMBER), strict=True))
_REST = "DVC and source"


def draw(results: Results, path: Path) -> None:
    """Writes the picture; a part that was not measured has no panel."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes, Results], None]] = []
    if counts_of(results, "pipeline"):
        panels.append(_stages)
    if counts_of(results, "pipeline") or counts_of(results, "tutorial"):
        panels.append(_recipes)
    if rounds_of(results, "limits/split"):
        panels.append(_limits)
    if len(counts_of(results, "scale")) > 1:
        panels += [_time, _memory]
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    if not panels:
        return
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.6 * rows + 0.5), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    # In sixths, so that two panels below three share the width.
    grid = figure.add_gridspec(rows, 6)
    for number, panel in enumerate(panels):
        row, place = divmod(number, columns)
        wide = 6 // min(columns, len(panels) - row * columns)
        axes = figure.add_subplot(grid[row, place * wide : (place + 1) * wide])
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes, results)
    facts = results["facts"]
    set_headline(figure, f"{facts['machine']}, {facts['date']}; {described_photographs(results)}")
    save_figure(figure, path)


def _stages(axes: Axes, results: Results) -> None:
    """Seconds of `dvc repro`, stacked by stage: the median round of each number of photographs."""
    counts = counts_of(results, "pipeline")
    for place, count in enumerate(counts):
        measured = rounds_of(results, f"pipeline/{count}")
        middle = sorted(measured, key=lambda one: one["repro"]["seconds"])[len(measured) // 2]
        parts = {name: middle["stages"][name]["seconds"] for name in _SHOWN}
        parts[_REST] = middle["repro"]["seconds"] - sum(parts.values())
        left = 0.0
        for name, seconds in parts.items():
            axes.barh(place, seconds, 0.6, left, color=_COLOURS.get(name, LIGHT_GREY), label=None if place else name)
            left += seconds
        axes.text(left, place, f"  {left:,.0f} s\n  {count / left:,.0f} images/s", va="center", fontsize=9)
    _rows(axes, [f"{count:,}" for count in counts])
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of dvc repro, from archive to tracked model")
    axes.set_ylabel("photographs")
    _title(axes, "Where the time goes", columns=4)


def _recipes(axes: Axes, results: Results) -> None:
    """The whole pipeline, another head and the recipes of the tutorials, on a logarithmic axis."""
    counts = sorted({*counts_of(results, "pipeline"), *counts_of(results, "tutorial")})
    pipeline = {count: rounds_of(results, f"pipeline/{count}") for count in counts}
    tutorial = {count: rounds_of(results, f"tutorial/{count}") for count in counts}
    whole = {count: [one["repro"]["seconds"] for one in pipeline[count]] for count in counts}
    head = {count: [one["another_head"]["seconds"] for one in pipeline[count]] for count in counts}
    series = [("whole pipeline", BLUE, whole), ("another head", SKY, head)]
    for recipe, colour in zip(RECIPES, (ORANGE, AMBER), strict=True):
        scaled = {count: [one[recipe]["ten_epochs_seconds"] for one in tutorial[count]] for count in counts}
        series.append((recipe, colour, scaled))
    for number, (name, colour, found) in enumerate(series):
        named = name
        for place, count in enumerate(counts):
            if not found[count]:
                continue
            middle, height = statistics.median(found[count]), place + (number - 1.5) * 0.2
            axes.plot([min(found[count]), max(found[count])], [height, height], color=colour, linewidth=3)
            axes.plot(middle, height, "o", color=colour, markersize=9, label=named)
            named = ""
            told = f"{middle:,.0f} s"
            if name in RECIPES and whole[count]:
                told += f", {ratios(found[count], whole[count]).median:,.1f} times the pipeline"
            axes.annotate(told, (middle, height), (9, 0), textcoords="offset points", va="center", fontsize=8)
    _rows(axes, [f"{count:,}" for count in counts])
    axes.set_xscale("log")
    axes.margins(x=0.1)
    # Room for the words beside the last points.
    low, high = axes.get_xlim()
    axes.set_xlim(right=high * (high / low) ** 0.4)
    for place in range(1, len(counts)):
        axes.axhline(place - 0.5, color=LIGHT_GREY, linewidth=0.6)
    _plain_numbers(axes, "x")
    axes.grid(axis="x", color=LIGHT_GREY, alpha=0.4, linewidth=0.6)
    axes.set_xlabel(f"seconds (logarithmic); recipes scaled to {EPOCHS} epochs")
    axes.set_ylabel("photographs")
    _title(axes, "Against the tutorials' recipes", columns=2)


def _limits(axes: Axes, results: Results) -> None:
    """What share of its libraries' speed each step reaches: the median, and the least and the largest pair."""
    steps = [step for step in ("split", "preprocess", "embed", "evaluate") if rounds_of(results, f"limits/{step}")]
    names = []
    for place, step in enumerate(steps):
        measured = rounds_of(results, f"limits/{step}")
        ours, limit = rates(measured, "step"), rates(measured, "limit")
        share = ratios(ours, limit)
        axes.barh(place, share.median, 0.6, color=BLUE)
        axes.plot([share.low, share.high], [place, place], color=BLACK, linewidth=1.5)
        names.append(f"{step}\n{statistics.median(ours):,.0f} of {statistics.median(limit):,.0f}/s")
        axes.text(0.02, place, f"{share.median:.2f}", va="center", fontsize=9, color="white", weight="bold")
        if step in WANTED_SHARES:
            axes.plot([WANTED_SHARES[step]] * 2, [place - 0.38, place + 0.38], color=ORANGE, linewidth=2.5)
    axes.plot([], [], color=ORANGE, linewidth=2.5, label="wanted")
    axes.plot([], [], color=BLACK, linewidth=1.5, label="least to largest pair")
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1, label="the libraries alone")
    _rows(axes, names)
    axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
    axes.set_xlabel("share of the libraries' images/s")
    _title(axes, "Each step beside its libraries' own limit", columns=3)


def _time(axes: Axes, results: Results) -> None:
    """Seconds of each stage against the number of images."""
    counts = _growth(axes, results, "seconds")
    largest = rounds_of(results, f"scale/{counts[-1]}")[0]["repro"]["seconds"]
    line = [largest * count / counts[-1] for count in counts]
    axes.plot(counts, line, color=LIGHT_GREY, linestyle="--", zorder=0, label="linear")
    axes.set_yscale("log")
    _plain_numbers(axes, "y")
    axes.set_ylabel("seconds (logarithmic)")
    _title(axes, "Time against the number of images", columns=5)


def _memory(axes: Axes, results: Results) -> None:
    """Peak memory of each stage against the number of images."""
    _growth(axes, results, "peak_mb")
    axes.set_yscale("log")
    axes.set_ylim(bottom=100)
    _plain_numbers(axes, "y")
    axes.set_ylabel("peak memory, MB (logarithmic)")
    _title(axes, "Peak memory against the number of images", columns=5)


def _growth(axes: Axes, results: Results, what: str) -> list[int]:
    counts = counts_of(results, "scale")
    measured = [rounds_of(results, f"scale/{count}")[0] for count in counts]
    for name in _SHOWN:
        axes.plot(
            counts,
            [one["stages"][name][what] for one in measured],
            color=_COLOURS[name],
            marker="o",
            markersize=4,
            label=name,
        )
    if what == "seconds":
        whole = [one["repro"]["seconds"] for one in measured]
        axes.plot(counts, whole, color=BLACK, marker="o", markersize=4, linewidth=2, label="dvc repro")
    axes.set_xscale("log")
    _plain_numbers(axes, "x")
    axes.set_xticks(counts, minor=False)
    axes.set_xlabel("generated pictures (logarithmic)")
    axes.grid(color=LIGHT_GREY, alpha=0.4, linewidth=0.6)
    return counts


def _rows(axes: Axes, names: list[str]) -> None:
    """Names the rows of horizontal bars, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _title(axes: Axes, text: str, *, columns: int) -> None:
    """Writes what a panel is about, with its legend between the title and the axes."""
    axes.legend(
        ncols=columns,
        fontsize=8,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        columnspacing=1.2,
        handlelength=1.4,
    )
    axes.set_title(text, loc="left", fontsize=11, pad=38)


def _plain_numbers(axes: Axes, which: str) -> None:
    """Plain numbers in place of powers of ten on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    if high < 50 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
