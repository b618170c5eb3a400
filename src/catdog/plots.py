"""The pictures that stages write, as PNG files. Blue and orange stay apart for colour-blind readers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.files import written_aside
from catdog.images import Pixels, resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, LIGHT_GREY = (
    "#0072B2",
    "#D55E00",
    "#6E6E6E",
    "#BDBDBD",
)  # Okabe and Ito's palette, "Color Universal Design"
_DPI = 110


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    # The object interface: no global state, no window system, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings(), written_aside(path) as aside:
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(aside, format="png", metadata={"Software": None})


def plot_learning_curves(history: pd.DataFrame, kept_epoch: int, path: Path) -> None:
    """Draws loss and accuracy by epoch, training and validation, and marks the epoch whose weights are kept.

    Args:
        history: from `training.fit_head`.
        kept_epoch: from `training.best_epoch`.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(10, 4, columns=2)
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for split, color, style in (("train", BLUE, "--"), ("val", ORANGE, "-")):
            name = {"train": "training", "val": "validation"}[split]
            axis.plot(history["epoch"], history[f"{split}_{quantity}"], style, color=color, label=name, linewidth=2)
        axis.axvline(kept_epoch, color=GREY, linewidth=1, linestyle=":", label=f"kept: epoch {kept_epoch}")
        axis.set(xlabel="epoch", ylabel=quantity, title=quantity.capitalize())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
    _save(figure, path)


def plot_confusion(matrix: npt.NDArray[np.int64], class_names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix [true, predicted] with counts; colour shows the share of the true class."""
    count = len(class_names)
    side = min(14.0, 3.6 + 0.45 * count)
    figure, (axis,) = _figure(side + 0.8, side)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    font = 13 if count <= 3 else max(5, 11 - count // 5)
    for row, column in np.ndindex(matrix.shape):
        if matrix[row, column] or count <= 10:
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{matrix[row, column]:,}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=font)
    rotation = 0 if count <= 4 else 90
    axis.set_xticks(range(count), class_names, rotation=rotation, fontsize=max(6, font - 1))
    axis.set_yticks(range(count), class_names, fontsize=max(6, font - 1))
    right = int(np.trace(matrix))
    axis.set(xlabel="predicted", ylabel="true", title=f"{right:,} of {int(matrix.sum()):,} right")
    axis.spines[:].set_visible(False)
    _save(figure, path)


def plot_roc(roc: pd.DataFrame, auc: float, path: Path) -> None:
    """Draws the ROC curves of `evaluation.roc_table`; `auc` is the headline value in the title."""
    figure, (axis,) = _figure(5.6, 5)
    curves = list(roc.groupby("class", sort=False))
    for name, curve in curves:
        color, width = (BLUE, 2.0) if len(curves) <= 2 else (None, 1.0)
        label = str(name) if len(curves) <= 12 else None
        axis.plot(
            curve["false_positive_rate"],
            curve["true_positive_rate"],
            color=color,
            linewidth=width,
            label=label,
        )
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
    axis.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        title=f"ROC, area {auc:.4f}",
        aspect="equal",
    )
    axis.legend(frameon=False, loc="lower right")
    _save(figure, path)


def plot_class_counts(counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Draws images by class and split, from `split.count_table`."""
    classes = list(next(iter(counts.values())))
    figure, (axis,) = _figure(7, max(2.2, 1.0 + 0.35 * len(classes)))
    left = np.zeros(len(classes))
    for (split, row), color in zip(counts.items(), (BLUE, ORANGE, GREY, LIGHT_GREY), strict=False):
        values = np.array([row[name] for name in classes])
        axis.barh(
            [_plain(name) for name in classes], values, left=left, color=color, label=f"{split} ({values.sum():,})"
        )
        left += values
    axis.set(xlabel="images", ylim=(len(classes) - 0.4, -0.6))
    figure.legend(frameon=False, ncols=len(counts), loc="outside upper center")
    _save(figure, path)


def plot_sizes(manifest: pd.DataFrame, path: Path) -> None:
    """Draws histograms of the longer side (pixels), the aspect and the file size of the pictures."""
    figure, axes = _figure(12, 3.4, columns=3)
    longer = manifest[["width", "height"]].max(axis=1)
    quantities = (
        (longer, "longer side, pixels"),
        (manifest["width"] / manifest["height"], "width / height"),
        (manifest["bytes"] / 1000, "file size, kB"),
    )
    for axis, (values, label) in zip(axes, quantities, strict=True):
        # A few giants would squeeze all others into one bar; they are counted in the last one.
        top = float(values.quantile(0.99))
        axis.hist(values.clip(upper=top), bins=40, color=BLUE)
        axis.set(xlabel=label, ylabel="images")
    _save(figure, path)


def plot_gallery(
    pictures: Sequence[Pixels],
    captions: Sequence[str],
    path: Path,
    *,
    title: str,
    columns: int = 8,
    side: int = 160,
) -> None:
    """Draws a grid of pictures with a caption each; with no pictures, the title alone.

    Args:
        pictures: uint8 [height, width, 3] of any size; shown whole, on black.
        captions: one each, up to two lines.
        side: pixels a side of each.
    """
    from matplotlib.figure import Figure

    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    inch = side / _DPI
    figure = Figure(
        figsize=(max(5.0, columns * (inch + 0.15)), rows * (inch + 0.5) + 0.6), dpi=_DPI, layout="constrained"
    )
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, picture, caption in zip(axes, pictures, captions, strict=False):
        axis.imshow(resize(picture, side, "pad"))
        axis.set_title(_plain(caption), fontsize=8, pad=3)
    _save(figure, path)


def plot_picture_rows(rows: Sequence[tuple[str, Sequence[Pixels]]], path: Path, *, title: str, side: int = 112) -> None:
    """Draws rows of pictures, each with a text to its left, e.g. one row a class; with no rows, the title alone.

    One canvas instead of one pair of axes a picture: hundreds of pictures take a second, not a minute.

    Args:
        rows: text (with line breaks) and pictures, uint8 [height, width, 3] of any size, shown whole on white.
        title: above all rows.
        side: pixels a side of each picture.
    """
    from matplotlib.figure import Figure

    gap, edge, head, line_height, letter_width = 4, 8, 40, 14, 7  # pixels
    texts = [text for text, _ in rows]
    row_height = gap + max(side, line_height * max((text.count("\n") + 1 for text in texts), default=1))
    columns = max((len(pictures) for _, pictures in rows), default=0)
    canvas = np.full((len(rows) * row_height, columns * (side + gap), 3), 255, np.uint8)
    for row, (_, pictures) in enumerate(rows):
        for column, picture in enumerate(pictures):
            shown = shrink(picture, side)
            height, width = shown.shape[:2]
            top = row * row_height + (row_height - gap - height) // 2
            left = column * (side + gap) + (side - width) // 2
            canvas[top : top + height, left : left + width] = shown
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    text_width = longest * letter_width + (edge if longest else 0)
    figure_width = max(text_width + canvas.shape[1], 9 * len(title)) + 2 * edge
    figure_height = head + canvas.shape[0] + edge
    figure = Figure(figsize=(figure_width / _DPI, figure_height / _DPI), dpi=_DPI)
    figure.text(edge / figure_width, 1 - head / 2 / figure_height, _plain(title), fontsize=11, va="center")
    if canvas.size:
        # Placed in the file's own pixels, so that nothing is resampled.
        figure.figimage(canvas, xo=edge + text_width, yo=edge)
    for row, text in enumerate(texts):
        middle = 1 - (head + row * row_height + (row_height - gap) / 2) / figure_height
        figure.text(edge / figure_width, middle, _plain(text), fontsize=7.5, va="center", linespacing=1.3)
    _save(figure, path)


def plot_properties(manifest: pd.DataFrame, path: Path) -> None:
    """Draws brightness by class, and how many images have each file format and each colour mode.

    Args:
        manifest: columns label, brightness (mean grey, 0..255), format and mode.
    """
    figure, axes = _figure(12, 3.6, columns=3)
    classes = sorted(manifest["label"].unique())
    bins = np.linspace(0, 256, 33).tolist()
    if len(classes) <= 4:
        for name, color in zip(classes, (BLUE, ORANGE, GREY, "#009E73"), strict=False):
            values = manifest.loc[manifest["label"] == name, "brightness"]
            share = np.full(len(values), 1 / len(values))
            label = _plain(name)
            axes[0].hist(values, bins=bins, weights=share, histtype="step", color=color, label=label, linewidth=2)
        axes[0].legend(frameon=False)
        axes[0].set(xlabel="brightness (mean grey, 0 to 255)", ylabel="share of the class")
    else:
        axes[0].hist(manifest["brightness"], bins=bins, color=BLUE)
        axes[0].set(xlabel="brightness (mean grey, 0 to 255)", ylabel="images")
    for axis, column, label in ((axes[1], "format", "file format"), (axes[2], "mode", "colour mode")):
        counts = manifest[column].value_counts().sort_index().sort_values(ascending=False, kind="stable").head(10)
        bars = axis.barh([_plain(name) for name in counts.index], counts.to_numpy(), color=BLUE)
        axis.bar_label(bars, [f" {count:,}" for count in counts])
        axis.margins(x=0.2)
        axis.set(xlabel="images", title=label, ylim=(max(4, len(counts)) - 0.5, -0.6))
    _save(figure, path)


def shrink(pixels: Pixels, side: int) -> Pixels:
    """Shrinks a picture, its aspect kept, until neither side is above `side` pixels; never enlarges it.

    Args:
        pixels: uint8 [height, width, 3].
        side: pixels.
    """
    import cv2

    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _plain(text: str) -> str:
    """Text that Matplotlib takes as it is: between two dollar signs it would set a formula, or fail to."""
    return text.replace("$", r"\$")
