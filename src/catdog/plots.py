"""What all pictures share, and the pictures of the data and of training."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from catdog.files import written_aside
from catdog.images import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, "Color Universal Design": told apart with every kind of colour-blindness. Its yellow is left
# out because it is hardly seen on white.
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
GREY, LIGHT_GREY = "#6E6E6E", "#BDBDBD"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY, BLACK)
"""Of as many classes as colours can tell apart."""
DPI = 110
"""Pixels an inch of every picture."""
_HEADLINE_POINTS = 12


def import_matplotlib() -> None:
    """Imports what the first picture would wait for."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import PIL.PngImagePlugin  # noqa: F401


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Makes a figure with one row of axes.

    Args:
        width: inches.
        height: inches.
        columns: number of axes.
    """
    # The object interface: no global state, no window system, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def set_headline(figure: Figure, text: str) -> None:
    """Writes a figure's finding above it, from the left edge, in as many lines as its width asks for."""
    width, height = figure.get_size_inches()
    letters = int(width * 72 / (0.58 * _HEADLINE_POINTS)) - 2
    lines = textwrap.wrap(text, max(20, letters))
    # A layout engine makes room for it and places it; without one the default lies far down in a high figure.
    place = {} if figure.get_layout_engine() else {"y": 1 - 0.08 / height, "va": "top"}
    figure.suptitle(plain_text("\n".join(lines)), x=0.1 / width, ha="left", fontsize=_HEADLINE_POINTS, **place)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, the same bytes for the same figure: no date, no version of a program."""
    with warnings.catch_warnings(), written_aside(path) as aside:
        ignore_missing_letters()
        figure.savefig(aside, format="png", metadata={"Software": None})


def ignore_missing_letters() -> None:
    """Within `warnings.catch_warnings`: letters that the font lacks are drawn as boxes, without a word."""
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")


def percent(part: float, whole: float) -> str:
    """A share in per cent with one digit, or as many as it takes to tell nearly all from all, and few from none.

    Args:
        part: 0 to `whole`.
        whole: above 0; 0 of 0 is 0 %.
    """
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share in (0, 100) else f"{decimals(share, 1, ends=(0, 100))} %"


def decimals(value: float, digits: int, ends: tuple[float, float] = (0, 1)) -> str:
    """A number with so many decimals, or up to six where fewer would round it to one of the ends."""
    while digits < 6 and float(f"{value:.{digits}f}") in ends and value not in ends:
        digits += 1
    return f"{value:.{digits}f}"


def format_log_axis(axis: Axes, layout: str = "{:,.0f}") -> None:
    """Makes an axes' y axis logarithmic, with plain numbers in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: layout.format(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def plot_learning_curves(history: pd.DataFrame, kept_epoch: int, path: Path) -> None:
    """Draws loss and accuracy by epoch, training and validation, and marks the epoch whose weights are kept.

    The epochs of fine-tuning have a background of their own.

    Args:
        history: from `training.join_histories`: epoch, phase (head or fine_tune), and loss and accuracy of both splits.
        kept_epoch: from `training.best_epoch`.
        path: of the PNG.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = new_figure(11, 4.4, columns=2)
    epochs = history["epoch"]
    kept = history[epochs == kept_epoch].iloc[0]
    fine_tuned = epochs[history["phase"] == "fine_tune"]
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        if len(fine_tuned):
            axis.axvspan(
                fine_tuned.min() - 0.5, fine_tuned.max() + 0.5, color="#EFEFEF", linewidth=0, label="fine-tuning"
            )
        for split, color, style in (("train", BLUE, "--"), ("val", ORANGE, "-")):
            name = {"train": "training", "val": "validation"}[split]
            values = history[f"{split}_{quantity}"]
            marker = "o" if len(epochs) <= 20 else ""  # a single epoch has no line
            axis.plot(epochs, values, style, marker=marker, markersize=4, color=color, label=name, linewidth=1.8)
        axis.axvline(kept_epoch, color=GREY, linewidth=1, linestyle=":")
        axis.plot(
            [kept_epoch], [kept[f"val_{quantity}"]], "D", color=BLACK, markersize=6, label=f"kept: epoch {kept_epoch}"
        )
        axis.set(xlabel="epoch", ylabel=quantity, xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    losses = history[["train_loss", "val_loss"]].to_numpy()
    if losses.min() > 0 and losses.max() > 30 * losses.min():
        # A first epoch that is far off would press all others flat.
        format_log_axis(axes[0], "{:g}")
        axes[0].set_ylabel("loss (logarithmic)")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside lower center")
    set_headline(
        figure,
        f"Kept: epoch {kept_epoch} of {len(history)}, validation loss {kept['val_loss']:.4f} and accuracy "
        f"{percent(kept['val_accuracy'], 1)}",
    )
    save_figure(figure, path)


def plot_class_counts(counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Draws images by class and split, from `split.count_table`."""
    classes = list(next(iter(counts.values())))
    figure, (axis,) = new_figure(7, max(2.2, 1.0 + 0.35 * len(classes)))
    left = np.zeros(len(classes))
    for (split, row), color in zip(counts.items(), (BLUE, ORANGE, GREY, LIGHT_GREY), strict=False):
        values = np.array([row[name] for name in classes])
        axis.barh(
            [plain_text(name) for name in classes], values, left=left, color=color, label=f"{split} ({values.sum():,})"
        )
        left += values
    axis.set(xlabel="images", ylim=(len(classes) - 0.4, -0.6))
    figure.legend(frameon=False, ncols=len(counts), loc="outside upper center")
    save_figure(figure, path)


def plot_sizes(manifest: pd.DataFrame, path: Path) -> None:
    """Draws histograms of the longer side (pixels), the aspect and the file size of the pictures."""
    figure, axes = new_figure(12, 3.4, columns=3)
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
    save_figure(figure, path)


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
    figure = Figure(figsize=(figure_width / DPI, figure_height / DPI), dpi=DPI)
    figure.text(edge / figure_width, 1 - head / 2 / figure_height, plain_text(title), fontsize=11, va="center")
    if canvas.size:
        # Placed in the file's own pixels, so that nothing is resampled.
        figure.figimage(canvas, xo=edge + text_width, yo=edge)
    for row, text in enumerate(texts):
        middle = 1 - (head + row * row_height + (row_height - gap) / 2) / figure_height
        figure.text(edge / figure_width, middle, plain_text(text), fontsize=7.5, va="center", linespacing=1.3)
    save_figure(figure, path)


def plot_properties(manifest: pd.DataFrame, path: Path) -> None:
    """Draws brightness by class, and how many images have each file format and each colour mode.

    Args:
        manifest: columns label, brightness (mean grey, 0..255), format and mode.
    """
    figure, axes = new_figure(12, 3.6, columns=3)
    classes = sorted(manifest["label"].unique())
    bins = np.linspace(0, 256, 33).tolist()
    if len(classes) <= 4:
        for name, color in zip(classes, (BLUE, ORANGE, GREY, GREEN), strict=False):
            values = manifest.loc[manifest["label"] == name, "brightness"]
            share = np.full(len(values), 1 / len(values))
            label = plain_text(name)
            axes[0].hist(values, bins=bins, weights=share, histtype="step", color=color, label=label, linewidth=2)
        axes[0].legend(frameon=False)
        axes[0].set(xlabel="brightness (mean grey, 0 to 255)", ylabel="share of the class")
    else:
        axes[0].hist(manifest["brightness"], bins=bins, color=BLUE)
        axes[0].set(xlabel="brightness (mean grey, 0 to 255)", ylabel="images")
    for axis, column, label in ((axes[1], "format", "file format"), (axes[2], "mode", "colour mode")):
        counts = manifest[column].value_counts().sort_index().sort_values(ascending=False, kind="stable").head(10)
        bars = axis.barh([plain_text(name) for name in counts.index], counts.to_numpy(), color=BLUE)
        axis.bar_label(bars, [f" {count:,}" for count in counts])
        axis.margins(x=0.2)
        axis.set(xlabel="images", title=label, ylim=(max(4, len(counts)) - 0.5, -0.6))
    save_figure(figure, path)


def shrink(pixels: Pixels, side: int) -> Pixels:
    """Shrinks a picture, its aspect kept, until neither side is above `side` pixels; never enlarges it.

    Args:
        pixels: uint8 [height, width, 3].
        side: pixels.
    """
    return pixels if max(pixels.shape[:2]) <= side else fit_picture(pixels, side)


def fit_picture(pixels: Pixels, side: int) -> Pixels:
    """Resizes a picture, its aspect kept, until the longer side has `side` pixels.

    Args:
        pixels: uint8 [height, width, 3].
        side: pixels.
    """
    import cv2

    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=method), np.uint8)


def plain_text(text: str) -> str:
    """Text that Matplotlib takes as it is.

    Between two dollar signs it would set a formula, or fail to; a text that begins with an underscore it would leave
    out of a legend.
    """
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")
