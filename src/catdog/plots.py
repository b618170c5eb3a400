"""The pictures that stages write, as PNG files. Blue and orange stay apart for colour-blind readers."""

from __future__ import annotations

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

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6E6E6E"  # Okabe and Ito's palette, "Color Universal Design"
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
    with written_aside(path) as aside:
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
    for (split, row), color in zip(counts.items(), (BLUE, ORANGE, GREY), strict=True):
        values = np.array([row[name] for name in classes])
        axis.barh(classes, values, left=left, color=color, label=f"{split} ({values.sum():,})")
        left += values
    axis.invert_yaxis()
    axis.set(xlabel="images")
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
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
        axis.set_title(caption, fontsize=8, pad=3)
    _save(figure, path)
