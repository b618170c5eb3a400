"""The results as one picture: where the time goes, against the tutorials, against the libraries, and how it grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.recipes import EPOCHS, RECIPES
from benchmarks.spread import ratios
from benchmarks.tables import Results, counts_of, described_photographs, rates, rounds_of
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
            axes.barh(place, seconds, 0.7, left, color=_COLOURS.get(name, LIGHT_GREY), label=None if place else name)
            left += seconds
        axes.text(left, place, f"  {left:,.0f} s, {count / left:,.0f} images/s", va="center", fontsize=9)
    axes.set_yticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.margins(x=0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of dvc repro, from archive to tracked model")
    axes.set_ylabel("photographs")
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.06))
    axes.set_title("Where the time goes", loc="left", fontsize=11, pad=58)


def _recipes(axes: Axes, results: Results) -> None:
    """The whole pipeline, another head and the recipes of the tutorials, on a logarithmic axis."""
    counts = sorted({*counts_of(results, "pipeline"), *counts_of(results, "tutorial")})
    series: dict[str, tuple[str, dict[int, list[float]]]] = {}
    for name, key, colour in (("another head", "another_head", SKY), ("whole pipeline", "repro", BLUE)):
        found = {count: [one[key]["seconds"] for one in rounds_of(results, f"pipeline/{count}")] for count in counts}
        series[name] = (colour, {count: values for count, values in found.items() if values})
    for recipe, colour in zip(RECIPES, (ORANGE, AMBER), strict=True):
        found = {
            count: [one[recipe]["ten_epochs_seconds"] for one in rounds_of(results, f"tutorial/{count}")]
            for count in counts
        }
        series[f"{recipe}, {EPOCHS} epochs*"] = (colour, {count: values for count, values in found.items() if values})
    pipeline = series["whole pipeline"][1]
    for number, (name, (colour, found)) in enumerate(series.items()):
        for count, values in found.items():
            place = counts.index(count) + (number - 1.5) * 0.2
            axes.barh(place, statistics.median(values), 0.18, color=colour)
            told = f"  {statistics.median(values):,.0f} s"
            if number > 1 and count in pipeline:
                told += f", {ratios(values, pipeline[count]).median:,.1f} x"
            axes.text(statistics.median(values), place, told, va="center", fontsize=8)
        axes.barh(0, 0, color=colour, label=name)
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.set_xlim(left=1)
    _plain_numbers(axes, "x")
    axes.set_yticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlabel("seconds (logarithmic); * scaled from one epoch; x: times the whole pipeline")
    axes.set_ylabel("photographs")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    axes.set_title("Against the tutorials' recipes", loc="left", fontsize=11, pad=58)


def _limits(axes: Axes, results: Results) -> None:
    """Images a second of each step beside its limit, and the share pair by pair."""
    steps = [step for step in ("split", "preprocess", "embed", "evaluate") if rounds_of(results, f"limits/{step}")]
    names = []
    for place, step in enumerate(steps):
        measured = rounds_of(results, f"limits/{step}")
        ours, limit = rates(measured, "step"), rates(measured, "limit")
        names.append(f"{step}\n{ratios(ours, limit).median:.2f} of its limit")
        for offset, values, colour in ((-0.2, limit, LIGHT_GREY), (0.2, ours, BLUE)):
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            axes.bar(place + offset, middle, 0.38, color=colour, yerr=spread if len(values) > 1 else None, capsize=3)
            axes.text(place + offset, middle, f"{middle:,.0f}\n", ha="center", va="center", fontsize=8)
    axes.bar(0, 0, color=LIGHT_GREY, label="the libraries in a plain loop")
    axes.bar(0, 0, color=BLUE, label="this step, without the start of the process")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1)
    axes.margins(y=0.2)
    _plain_numbers(axes, "y")
    axes.set_xticks(range(len(steps)), names)
    axes.set_ylabel("images/s (logarithmic)")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    axes.set_title("Each step beside its libraries' own limit", loc="left", fontsize=11, pad=58)


def _time(axes: Axes, results: Results) -> None:
    """Seconds of each stage against the number of images."""
    counts = _growth(axes, results, "seconds")
    largest = rounds_of(results, f"scale/{counts[-1]}")[0]["repro"]["seconds"]
    line = [largest * count / counts[-1] for count in counts]
    axes.plot(counts, line, color=LIGHT_GREY, linestyle="--", zorder=0, label="linear")
    axes.set_yscale("log")
    _plain_numbers(axes, "y")
    axes.set_ylabel("seconds (logarithmic)")
    axes.set_title("Time against the number of images", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _memory(axes: Axes, results: Results) -> None:
    """Peak memory of each stage against the number of images."""
    _growth(axes, results, "peak_mb")
    axes.set_yscale("log")
    _plain_numbers(axes, "y")
    axes.set_ylabel("peak memory, MB (logarithmic)")
    axes.set_title("Peak memory against the number of images", loc="left", fontsize=11)


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


def _plain_numbers(axes: Axes, which: str) -> None:
    """Plain numbers in place of powers of ten on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
