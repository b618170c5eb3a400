"""The pictures of the evaluation, drawn from the tables that it writes; so each can be drawn again from its CSV."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.calibration import calibration_error
from catdog.files import written_aside
from catdog.images import Pixels
from catdog.plots import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    PALETTE,
    PURPLE,
    decimals,
    fit_picture,
    format_log_axis,
    ignore_missing_letters,
    new_figure,
    percent,
    plain_text,
    save_figure,
    set_headline,
)
from catdog.slices import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_NAMED_CURVES = 3  # the weakest classes, which are drawn in colour
_LEGEND_CLASSES = 8  # more than these are named beside their points: no more colours can be told apart
_GALLERY_WIDTH = 1360  # pixels
_SMALLEST_SIDE, _SMALLEST_CELL = 64, 120  # pixels
_GALLERY_BYTES = 1.3e6
_BYTES_PER_PIXEL = 1.75  # of photographs shrunk to thumbnails, as PNG, measured


def plot_confusion(matrix: npt.NDArray[np.int64], class_names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix: counts as text, shares of the true class as colour.

    The colour goes with the square root of the share, so that one picture in fifty shows as well.

    Args:
        matrix: int64 [true class, predicted class], counts.
        class_names: one a row.
        path: of the PNG.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    count = len(class_names)
    longest = max(map(len, class_names))
    grid = min(13.0, 2.6 + 0.3 * count)
    font = 14.0 if count <= 4 else max(4.5, min(10.0, 26 * grid / count))
    labels = min(10.0, font + 1)
    across = count * max(8, longest) <= 60  # the names below lie side by side
    beside, below = 0.7 + longest * labels * 0.55 / 72, 0.7 if across else 0.35 + longest * labels * 0.55 / 72
    figure, (axis,) = new_figure(max(5.2, beside + 1.08 * grid + 1.3), grid + below + 0.4)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(
        image, ax=axis, label="share of the true class", fraction=0.05, aspect=30, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1]
    )
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bar.outline.set_visible(False)
    step = math.ceil(count / 120)  # names that would lie on each other are left out
    if step == 1:
        for row, column in np.ndindex(matrix.shape):
            if matrix[row, column] or count <= 4:
                color = "white" if shares[row, column] > 0.35 else "black"
                axis.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=color, fontsize=font)
    positions, names = range(0, count, step), [plain_text(name) for name in class_names[::step]]
    axis.set_xticks(positions, names, rotation=0 if across else 90, fontsize=labels)
    axis.set_yticks(positions, names, fontsize=labels)
    axis.tick_params(length=0)
    if count > 4 and step == 1:
        # Thin lines between the cells lead the eye from a count to both names.
        axis.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="#EEEEEE", linewidth=0.5)
        axis.tick_params(which="minor", length=0)
    axis.set(xlabel="predicted", ylabel="true")
    axis.spines[:].set_visible(False)
    right, total = int(np.trace(matrix)), int(matrix.sum())
    set_headline(figure, f"{percent(right, total)} of {total:,} test pictures right, {total - right:,} wrong")
    save_figure(figure, path)


def plot_roc(roc: pd.DataFrame, metrics: pd.DataFrame, classes: pd.DataFrame, path: Path) -> None:
    """Draws the receiver operating characteristic, with a zoom where the curves hug the corner.

    Of two classes, the curve of the second and the point at which the model is used. Of more, each against the rest
    in grey, their mean, and the weakest by name.

    Args:
        roc: class, false_positive_rate, true_positive_rate; both rising.
        metrics: metric, value, low, high; with roc_auc.
        classes: class, recall; in the order of the classes.
        path: of the PNG.
    """
    curves = []
    for name, points in roc.groupby("class", sort=False):
        x, y = points["false_positive_rate"].to_numpy(np.float64), points["true_positive_rate"].to_numpy(np.float64)
        curves.append(_Curve(str(name), x, y, float(np.trapezoid(y, x))))
    mean, point = None, None
    if len(classes) > 2 and curves:
        # Close to both sides of every step, so that what is upright stays upright.
        steps = np.concatenate([curve.x for curve in curves])
        grid = np.unique(np.clip(np.concatenate([steps - 1e-9, steps + 1e-9]), 0, 1))
        values = np.mean([np.interp(grid, curve.x, curve.y) for curve in curves], axis=0)
        mean = np.insert(grid, 0, 0), np.insert(values, 0, 0)
    elif len(classes) == 2:
        point = 1 - float(classes["recall"].iloc[0]), float(classes["recall"].iloc[1])
    _draw_curves(
        curves,
        mean=mean,
        point=point,
        chance=([0, 1], [0, 1]),
        best=0,
        labels=("false positive rate (share of the others taken for the class)", "true positive rate (recall)"),
        headline=f"ROC area {_estimate(metrics, 'roc_auc')}",
        path=path,
    )


def plot_precision_recall(curve: pd.DataFrame, metrics: pd.DataFrame, classes: pd.DataFrame, path: Path) -> None:
    """Draws precision against recall, with a zoom where the curves hug the corner; otherwise as `plot_roc`.

    The areas are average precisions: between two points the precision of the one with the higher recall counts.

    Args:
        curve: class, recall, precision; by rising or by falling recall.
        metrics: metric, value, low, high; with pr_auc.
        classes: class, images, precision, recall; in the order of the classes.
        path: of the PNG.
    """
    curves = []
    for name, points in curve.groupby("class", sort=False):
        rising = points if points["recall"].iloc[0] <= points["recall"].iloc[-1] else points.iloc[::-1]
        x, y = rising["recall"].to_numpy(np.float64), rising["precision"].to_numpy(np.float64)
        curves.append(_Curve(str(name), x, y, float(np.sum(np.diff(x, prepend=0) * y))))
    mean, point, chance = None, None, None
    if len(classes) > 2 and curves:
        grid = np.linspace(0, 1, 501)
        values = [one.y[np.minimum(np.searchsorted(one.x, grid), len(one.x) - 1)] for one in curves]
        mean = grid, np.mean(values, axis=0)
    elif len(classes) == 2:
        point = float(classes["recall"].iloc[1]), float(classes["precision"].iloc[1])
        share = float(classes["images"].iloc[1] / max(1, classes["images"].sum()))
        chance = [0, 1], [share, share]
    _draw_curves(
        curves,
        mean=mean,
        point=point,
        chance=chance,
        best=1,
        labels=("recall (share of the class that is found)", "precision (share of the found that are of the class)"),
        headline=f"Precision-recall area {_estimate(metrics, 'pr_auc')}",
        path=path,
    )


def plot_calibration(calibration: pd.DataFrame, path: Path) -> None:
    """Draws how often the model is right where it is so and so confident, and how many pictures say so.

    The bars are 95 % Wilson intervals of the accuracy (E. B. Wilson, "Probable Inference, the Law of Succession, and
    Statistical Inference", 1927): a bin of three pictures proves little.

    Args:
        calibration: calibration (before or after the temperature), bin_low, bin_high, images, confidence, accuracy.
        path: of the PNG.
    """
    from matplotlib.ticker import PercentFormatter

    figure, (axis,) = new_figure(7, 7)
    axis.remove()
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for one in (axis, below):
        one.spines[["top", "right"]].set_visible(False)
    before, after = (
        calibration[calibration["calibration"] == name].reset_index(drop=True) for name in ("before", "after")
    )
    same = before.drop(columns="calibration").equals(after.drop(columns="calibration"))
    series: list[tuple[Literal["before", "after"], pd.DataFrame, str, str, str]] = [
        ("after", after, "as saved", BLUE, "o")
    ]
    if len(before) and not same:
        series.insert(0, ("before", before, "before the temperature", ORANGE, "s"))
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="as often right as confident")
    for number, (when, table, name, color, marker) in enumerate(series):
        images, accuracy = table["images"].to_numpy(np.float64), table["accuracy"].to_numpy(np.float64)
        counts = zip(np.rint(accuracy * images), images, strict=True)
        low, high = np.array([wilson_interval(int(right), int(of)) for right, of in counts]).reshape(-1, 2).T
        label = f"{name}: calibration error {calibration_error(calibration, when):.4f}"
        axis.errorbar(
            table["confidence"],
            accuracy,
            yerr=[np.maximum(0, accuracy - low), np.maximum(0, high - accuracy)],
            fmt=marker,
            color=color,
            markersize=6,
            elinewidth=1.2,
            label=label,
        )
        width = (table["bin_high"] - table["bin_low"]) / (len(series) + 0.5)
        below.bar(table["bin_low"] + (number + 0.25) * width, images, width, align="edge", color=color)
    left = float(calibration["bin_low"].min()) if len(calibration) else 0.0
    axis.set(ylabel="accuracy", xlim=(left - 0.01, 1.01), ylim=(-0.02, 1.02))
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    format_log_axis(below)
    below.set_ylim(bottom=0.5)
    for ticks in (axis.yaxis, below.xaxis):
        ticks.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(frameon=False, loc="outside lower center")
    error = calibration_error(calibration, "after")
    headline = f"Expected calibration error {error:.4f}"
    if len(series) == 2:
        headline += f", before the temperature {calibration_error(calibration, 'before'):.4f}"
    elif len(after):
        mean = float(np.average(after["confidence"], weights=after["images"]))
        headline += f": {percent(mean, 1)} confident on average"
    set_headline(figure, headline)
    save_figure(figure, path)


def plot_scores(scores: pd.DataFrame, classes: pd.DataFrame, threshold: float, path: Path) -> None:
    """Draws how the probabilities are distributed, on a logarithmic scale so that a few wrong pictures show.

    Of two classes, the probability of the second one, by true class, and the threshold. Of more, the probability of
    the true class: by class up to four classes, otherwise of all pictures.

    Args:
        scores: class, bin_low, bin_high, images.
        classes: class, images, recall; in the order of the classes.
        threshold: probability from which the second of two classes is predicted.
        path: of the PNG.
    """
    from matplotlib.ticker import PercentFormatter

    names = [str(name) for name in classes["class"]]
    edges = np.unique(scores[["bin_low", "bin_high"]].to_numpy(np.float64).round(6))
    counts = {
        name: np.histogram(table["bin_low"] + 1e-6, bins=edges, weights=table["images"])[0]
        for name, table in scores.groupby("class", sort=False)
    }
    figure, (axis,) = new_figure(8, 4.6)
    total = int(scores["images"].sum())
    if len(names) <= 4:
        for name, color, style in zip(names, PALETTE, ("-", "--", "-.", ":"), strict=False):
            label = f"{name} ({int(counts[name].sum()):,})" if name in counts else f"{name} (0)"
            values = counts.get(name, np.zeros(len(edges) - 1))
            axis.stairs(values, edges, color=color, linewidth=2, linestyle=style, label=plain_text(label))
            axis.stairs(values, edges, color=color, fill=True, alpha=0.15)
    else:
        axis.stairs(np.sum(list(counts.values()), axis=0), edges, color=BLUE, fill=True, alpha=0.8)
    if len(names) == 2:
        axis.axvline(threshold, color="black", linewidth=1.2, linestyle="--", label=f"threshold {threshold:.3g}")
        missed = (classes["images"] * (1 - classes["recall"].fillna(0))).round().astype(int)
        headline = " and ".join(
            f"{wrong:,} of {images:,} {name} pictures"
            for wrong, images, name in zip(missed, classes["images"], names, strict=True)
        )
        headline += " on the wrong side of the threshold"
        axis.set_xlabel(plain_text(f"probability of {names[1]}"))
    else:
        likely = int(scores.loc[scores["bin_low"] > 0.5 - 1e-6, "images"].sum())
        headline = f"{percent(likely, total)} of {total:,} test pictures give their true class 50 % or more"
        axis.set_xlabel("probability of the true class")
    axis.set(ylabel="images (logarithmic)", xlim=(-0.01, 1.01))
    format_log_axis(axis)
    axis.set_ylim(bottom=0.5)
    axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    if len(names) <= 4:
        figure.legend(
            frameon=False, ncols=1 if max(map(len, names)) > 24 else len(names) + 1, loc="outside lower center"
        )
    set_headline(figure, headline)
    save_figure(figure, path)


def plot_feature_map(features: pd.DataFrame, path: Path) -> None:
    """Draws the pictures as points of a plane, coloured by class; those that are wrong have a ring.

    Args:
        features: label, correct, x, y.
        path: of the PNG.
    """
    names = sorted(features["label"].unique())
    figure, (axis,) = new_figure(9.5, 7.5)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    size = float(np.clip(36000 / max(1, len(features)), 9, 60))  # square points
    for number, name in enumerate(names):
        points = features[features["label"] == name]
        axis.scatter(
            points["x"],
            points["y"],
            s=size,
            color=PALETTE[number % len(PALETTE)],
            marker=_MARKERS[(number + number // len(PALETTE)) % len(_MARKERS)],
            alpha=0.65,
            linewidth=0,
            label=plain_text(f"{name} ({len(points):,})"),
        )
    wrong = features[~features["correct"].astype(bool)]
    axis.scatter(wrong["x"], wrong["y"], s=size * 3 + 20, facecolor="none", edgecolor="black", linewidth=1.1)
    if len(names) <= _LEGEND_CLASSES:
        longest = max((len(name) for name in names), default=0)
        legend = figure.legend(
            frameon=False, ncols=max(1, min(len(names), 100 // (longest + 12))), loc="outside lower center"
        )
        for handle in filter(None, legend.legend_handles):
            handle.set(sizes=[50], alpha=1)
    else:
        _name_clusters(figure, axis, features, names)
    rings = "the wrong one is ringed" if len(wrong) == 1 else f"the {len(wrong):,} wrong ones are ringed"
    headline = f"{len(features):,} test pictures as the model sees them, alike beside alike; "
    set_headline(figure, headline + (rings if len(wrong) else "none of them is wrong"))
    save_figure(figure, path)


def plot_slices(slices: pd.DataFrame, metrics: pd.DataFrame, path: Path) -> None:
    """Draws the accuracy on each slice of the test pictures with its 95 % interval, grouped by property.

    Args:
        slices: property, slice, images, errors, accuracy, low, high, weak.
        metrics: metric, value; with accuracy, the line to compare with.
        path: of the PNG.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    groups = list(slices.groupby("property", sort=False))
    rows = len(slices) + 1.4 * len(groups)
    figure, (axis,) = new_figure(9.5, max(2.4, 1.4 + 0.24 * rows))
    row, ticks, labels = 0.0, [], []
    overall = float(metrics.set_index("metric")["value"]["accuracy"])
    axis.axvline(overall, color=GREY, linewidth=1.2, linestyle="--", label=f"all test pictures: {percent(overall, 1)}")
    seen = set()
    for name, table in groups:
        axis.text(
            -0.01,
            row,
            plain_text(str(name)),
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            weight="bold",
        )
        row += 1
        for one in table.to_dict("records"):
            weak = bool(one["weak"])
            label = "weaker than the rest" if weak else "slice, with its 95 % interval"
            axis.errorbar(
                one["accuracy"],
                row,
                xerr=[[max(0.0, one["accuracy"] - one["low"])], [max(0.0, one["high"] - one["accuracy"])]],
                fmt="D" if weak else "o",
                color=ORANGE if weak else BLUE,
                markersize=7 if weak else 5,
                elinewidth=2.4 if weak else 1.4,
                label=label if label not in seen else None,
            )
            seen.add(label)
            note = f"{one['errors']:,} of {one['images']:,} wrong"
            axis.text(
                1.01,
                row,
                note,
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=9,
                color=ORANGE if weak else GREY,
                weight="bold" if weak else "normal",
            )
            ticks.append(row)
            labels.append(plain_text(str(one["slice"])))
            row += 1
        row += 0.4
    axis.set_yticks(ticks, labels, fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.set(xlabel="accuracy", ylim=(row - 0.4, -0.8), xlim=_accuracy_limits(slices))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axis.grid(axis="x", color="#EEEEEE")
    axis.set_axisbelow(True)
    figure.legend(frameon=False, ncols=3, loc="outside lower center")
    weak_names = (slices["property"] + " " + slices["slice"].astype(str))[slices["weak"].astype(bool)].tolist()
    if weak_names:
        shown = ", ".join(weak_names[:3]) + (f" and {len(weak_names) - 3} more" if len(weak_names) > 3 else "")
        headline = f"{len(weak_names)} of {len(slices)} slices weaker than the rest: {shown}"
    else:
        headline = f"None of {len(slices)} slices is clearly weaker than the rest"
    set_headline(figure, headline)
    save_figure(figure, path)


def plot_corruptions(corruptions: pd.DataFrame, path: Path) -> None:
    """Draws the accuracy by severity with its 95 % interval, one panel a corruption, the worst first.

    Args:
        corruptions: corruption, severity, images, accuracy, low, high, lost; one row has the corruption "none".
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    clean = corruptions[corruptions["corruption"] == "none"].iloc[0]
    tried = corruptions[corruptions["corruption"] != "none"]
    # A stable order: by the highest loss, then as the table has them.
    losses = tried.groupby("corruption", sort=False)["lost"].max().sort_values(ascending=False, kind="stable")
    columns = max(1, min(4, len(losses)))
    rows = max(1, math.ceil(len(losses) / columns))
    figure = Figure(figsize=(max(6.0, 2.7 * columns), 2.3 * rows + 1), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    severities = sorted(tried["severity"].unique())
    limits = _accuracy_limits(corruptions)
    for axis in axes[len(losses) :]:
        axis.remove()
    for number, (axis, name) in enumerate(zip(axes, losses.index, strict=False)):
        table = tried[tried["corruption"] == name].sort_values("severity")
        accuracy = table["accuracy"]
        axis.axhline(
            clean["accuracy"], color=GREY, linewidth=1.2, linestyle="--", label="uncorrupted" if not number else None
        )
        axis.errorbar(
            table["severity"],
            accuracy,
            yerr=[(accuracy - table["low"]).clip(lower=0), (table["high"] - accuracy).clip(lower=0)],
            fmt="o-",
            color=ORANGE if number == 0 and losses.iloc[0] > 0 else BLUE,
            linewidth=1.8,
            elinewidth=1.2,
            markersize=5,
        )
        lost = round(100 * float(losses.iloc[number]), 1)
        loss = "nothing lost" if lost == 0 else f"{abs(lost):.1f} points {'lost' if lost > 0 else 'gained'}"
        axis.set_title(plain_text(f"{name}\n{loss}"), fontsize=10)
        axis.set(xticks=table["severity"], xlim=(min(severities) - 0.6, max(severities) + 0.6), ylim=limits)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#EEEEEE")
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    headline = f"{percent(clean['accuracy'], 1)} of {int(clean['images']):,} pictures right as they are (dashed line)"
    if len(tried):
        worst = tried.sort_values("lost", ascending=False, kind="stable").iloc[0]
        headline += (
            f"; {worst['corruption']} costs most: {percent(worst['accuracy'], 1)} right at severity {worst['severity']}"
        )
    set_headline(figure, headline)
    save_figure(figure, path)


def plot_gallery(
    pictures: Iterable[Pixels],
    captions: Sequence[str],
    path: Path,
    *,
    title: str,
    overlays: Sequence[Pixels] | None = None,
    side: int = 160,
) -> None:
    """Draws a grid of pictures with a caption below each; with no pictures, the title alone.

    One canvas instead of one pair of axes a picture: hundreds of pictures take a second, not a minute.

    Args:
        pictures: uint8 [height, width, 3] of any size; shown whole. Taken one by one, so that large ones need not be
            in memory at once.
        captions: one each, of one or more lines; long lines are broken.
        path: of the PNG.
        title: above all.
        overlays: uint8 [height, width, 3], shown to the right of each picture, e.g. what the network looked at.
        side: pixels of the longer side of each picture; fewer, but not below 64, where
            many would make the file larger than about 1.3 MB.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    gap, between, edge, line_height, letter_width = 14, 2, 10, 14, 7  # pixels
    beside = [] if overlays is None else [overlays]
    count = len(captions)
    parts = 1 + len(beside)
    affordable = int(math.sqrt(_GALLERY_BYTES / _BYTES_PER_PIXEL / max(1, parts * count)))
    side = min(side, max(_SMALLEST_SIDE, affordable))
    cell = max(_SMALLEST_CELL, parts * side + (parts - 1) * between)
    columns = max(1, min(count, (_GALLERY_WIDTH - 2 * edge + gap) // (cell + gap)))
    wrapped = [_wrap(caption, cell // letter_width) for caption in captions]
    rows = [range(first, min(first + columns, count)) for first in range(0, count, columns)]
    heights = [side + gap + line_height * max(wrapped[at].count("\n") + 1 for at in row) for row in rows]
    width = max(560, columns * (cell + gap) - gap + 2 * edge)
    head = 20 + 20 * math.ceil(len(title) * 10.5 / (width - 40))
    height = head + sum(heights) + edge
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    set_headline(figure, title)
    places = []  # the left upper corner of each cell, pixels
    for row, top in zip(rows, np.cumsum([head, *heights[:-1]]).tolist(), strict=False):
        places += [(edge + column * (cell + gap), top) for column in range(len(row))]
    for (left, top), caption in zip(places, wrapped, strict=True):
        y = 1 - (top + side + 4) / height
        figure.text(left / width, y, plain_text(caption), fontsize=8, va="top", linespacing=1.15)
    with warnings.catch_warnings():
        ignore_missing_letters()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    # The pictures are put into the drawn pixels themselves: Matplotlib would resample them, and take seconds.
    pixels = np.array(canvas.buffer_rgba())[..., :3]
    for (left, top), cell_pictures in zip(places, zip(pictures, *beside, strict=True), strict=True):
        for part, picture in enumerate(cell_pictures):
            fitted = fit_picture(picture, side)
            y = top + (side - fitted.shape[0]) // 2
            x = left + part * (side + between) + (side - fitted.shape[1]) // 2
            pixels[y : y + fitted.shape[0], x : x + fitted.shape[1]] = fitted
    with written_aside(path) as aside:
        # Half the time of Pillow's own level, 6, for files that are a fiftieth larger.
        Image.fromarray(pixels).save(aside, format="png", compress_level=4)


@dataclass(frozen=True)
class _Curve:
    """A curve of one class against the rest."""

    name: str
    x: Floats
    y: Floats
    area: float


def _draw_curves(
    curves: Sequence[_Curve],
    *,
    mean: tuple[Floats, Floats] | None,
    point: tuple[float, float] | None,
    chance: tuple[Sequence[float], Sequence[float]] | None,
    best: int,
    labels: tuple[str, str],
    headline: str,
    path: Path,
) -> None:
    """Draws curves whose ideal is a corner above: at `best` 0 the left one, at 1 the right one."""
    from matplotlib.patches import Rectangle

    figure, (axis,) = new_figure(7.2, 7.4)
    weakest = sorted(curves, key=lambda curve: (curve.area, curve.name))[:_NAMED_CURVES]
    # Precision is constant between two points, as in the average precision.
    steps = "steps-pre" if best else "default"

    def draw(axis: Axes, *, clip: bool) -> None:
        if chance:
            axis.plot(*chance, color=GREY, linewidth=1, linestyle=":", label="chance")
        for curve in curves:
            if curve not in weakest:
                axis.plot(curve.x, curve.y, color=LIGHT_GREY, linewidth=0.8, drawstyle=steps)
        if len(curves) > len(weakest):
            axis.plot([], [], color=LIGHT_GREY, label=f"the other {len(curves) - len(weakest)} classes")
        styles = zip((ORANGE, GREEN, PURPLE), ("-", "--", "-."), strict=True) if mean else [(BLUE, "-")]
        for curve, (color, style) in zip(weakest, styles, strict=False):
            label = plain_text(f"{curve.name}: area {decimals(curve.area, 4)}")
            axis.plot(curve.x, curve.y, color=color, linestyle=style, linewidth=1.6, drawstyle=steps, label=label)
        if mean:
            axis.plot(*mean, color=BLUE, linewidth=2.6, drawstyle=steps, label=f"mean of {len(curves)} classes")
        if point:
            axis.plot(*point, "D", color="black", markersize=6, label="at the threshold", clip_on=clip, zorder=3)

    draw(axis, clip=False)  # a marker at the edge stays whole
    axis.set(xlabel=labels[0], ylabel=labels[1], xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    # How far the worst of the named curves stays from the corner.
    distance = max((float(np.maximum(abs(curve.x - best), 1 - curve.y).min()) for curve in weakest), default=1.0)
    reach = next((reach for reach in (0.01, 0.02, 0.05, 0.1, 0.2) if reach >= 2.5 * distance), None)
    if reach and distance:
        margin = 0.03 * reach
        xlim = (1 - reach, 1 + margin) if best else (-margin, reach)
        # The lines behind would run through the numbers at the inset's edges.
        axis.add_patch(
            Rectangle((0.04 if best else 0.24, 0.1), 0.67, 0.69, transform=axis.transAxes, color="white", zorder=2.5)
        )
        inset = axis.inset_axes((0.13 if best else 0.35, 0.17, 0.55, 0.55), xlim=xlim, ylim=(1 - reach, 1 + margin))
        draw(inset, clip=True)
        inset.tick_params(labelsize=8)
        inset.locator_params(nbins=5)
        inset.set_title("the corner, enlarged", fontsize=9)
        for connector in axis.indicate_inset_zoom(inset, edgecolor="black", alpha=0.5).connectors or ():
            connector.set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, ncols=2, loc="outside lower center")
    set_headline(figure, headline if curves else "No curve: the test pictures are of one class")
    save_figure(figure, path)


def _estimate(metrics: pd.DataFrame, name: str) -> str:
    """A metric with its interval, as text."""
    row = metrics[metrics["metric"] == name]
    if row.empty or not np.isfinite(row["value"].iloc[0]):
        return "unknown"
    value, low, high = (float(row[column].iloc[0]) for column in ("value", "low", "high"))
    return f"{decimals(value, 4)} (95 % interval {decimals(low, 4)} to {decimals(high, 4)})"


def _accuracy_limits(table: pd.DataFrame) -> tuple[float, float]:
    """The ends of an axis that shows all intervals of a table, at least five points wide."""
    low, high = float(table["low"].min()), float(table["high"].max())
    low = max(0.0, min(low, high - 0.05))
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _name_clusters(figure: Figure, axis: Axes, features: pd.DataFrame, names: Sequence[str]) -> None:
    """Writes each class's name beside the middle of its points, pushed apart where two would overlap."""
    font = 8 if len(names) <= 40 else 6
    middles = features.groupby("label")[["x", "y"]].median().loc[list(names)].to_numpy()
    texts = [
        axis.text(
            x,
            y,
            plain_text(_wrap(name, 16)),
            fontsize=font,
            ha="center",
            va="center",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": PALETTE[number % len(PALETTE)], "pad": 1.5},
        )
        for number, (name, (x, y)) in enumerate(zip(names, middles, strict=True))
    ]
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    boxes = [text.get_window_extent() for text in texts]
    sizes = np.array([[box.width, box.height] for box in boxes]) + 7  # for the frames
    anchors = axis.transData.transform(middles)
    placed = _push_apart(anchors, sizes, np.array([[frame.x0, frame.y0], [frame.x1, frame.y1]]))
    for text, middle, at in zip(texts, middles, axis.transData.inverted().transform(placed), strict=True):
        text.set_position(at)
        axis.plot(*zip(middle, at, strict=True), color=GREY, linewidth=0.7)


def _push_apart(centres: Floats, sizes: Floats, frame: Floats) -> Floats:
    """Moves boxes until none covers another, as far as 300 small steps go.

    Args:
        centres: [boxes, 2].
        sizes: width and height, [boxes, 2].
        frame: lower left and upper right end of the space, [2, 2].

    Returns:
        New centres [boxes, 2].
    """
    placed = centres.copy()
    reach = (sizes[:, None] + sizes[None]) / 2
    numbers = np.arange(len(placed))
    for _ in range(300):
        offset = placed[:, None] - placed[None]
        overlap = reach - np.abs(offset)
        overlap[numbers, numbers] = -1
        colliding = (overlap > 0).all(axis=2)
        if not colliding.any():
            break
        # Each pair moves along the axis on which less is missing; boxes at one place part by their order.
        axis = overlap.argmin(axis=2)
        away = np.sign(np.take_along_axis(offset, axis[..., None], axis=2)[..., 0])
        away = np.where(away == 0, np.sign(numbers[:, None] - numbers[None]), away)
        step = np.where(colliding, 0.5 * np.take_along_axis(overlap, axis[..., None], axis=2)[..., 0] + 0.5, 0) * away
        for dimension in (0, 1):
            placed[:, dimension] += 0.5 * np.where(axis == dimension, step, 0).sum(axis=1)
        placed = np.clip(placed, frame[0] + sizes / 2, frame[1] - sizes / 2)
    return placed


def _wrap(text: str, letters: int) -> str:
    """Breaks lines after a space, an underscore, a hyphen or a slash, or anywhere if need be, at so many letters."""
    lines = []
    for whole in text.split("\n"):
        line = ""
        for piece in re.findall(rf".{{1,{letters}}}?(?:[ _/-]|$)|.{{{letters}}}", whole):
            if line and len((line + piece).rstrip()) > letters:
                lines.append(line.rstrip())
                line = ""
            line += piece
        lines.append(line.rstrip())
    return "\n".join(lines)
