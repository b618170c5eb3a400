"""Accuracy on slices of the test split, so that a weak spot shows: small pictures, dark ones, one source.

A slice is the test images that share a property. Each property divides all of them: every image is in exactly one of
its slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.bootstrap import holm
from catdog.errors import CatdogError
from catdog.images import Pixels
from catdog.paths import MANIFEST

if TYPE_CHECKING:
    from catdog.evaluation import LabelledPredictions

PROPERTIES: Mapping[str, str] = {
    "shorter side": "of the file's picture, in pixels",
    "aspect": "width divided by height",
    "brightness": "mean grey of the picture, from 0 (black) to 255 (white)",
    "sharpness": "variance of the Laplacian of the stored picture; low where it is blurred, or shows little",
    "file format": "by the file's content",
    "folder": "in the archive; * is the folder that names the class",
}
"""What the images are sliced by, in the table's order, each with what its numbers mean."""

COLUMNS = ("property", "slice", "images", "errors", "accuracy", "low", "high", "weak")
LEAST_IMAGES = 10
"""Fewer images than this are too few to call a slice weak."""
FOLDERS_SHOWN = 20
_UNKNOWN = "unknown"
_SIGNIFICANCE = 0.05


def sharpness(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Measures how sharp pictures are: the variance of the Laplacian of their brightness.

    J. Pech-Pacheco and others, "Diatom autofocusing in brightfield microscopy: a comparative study", 2000, without
    their factor 1/6 before the Laplacian. Blur lowers it; but so does a picture that shows only a plain wall.

    Args:
        pixels: uint8 [batch, height, width, 3], RGB. Compare pictures of one size only: shrinking one sharpens it.

    Returns:
        float32 [batch], from 0 (one plain colour); most photographs of 224 pixels have 100 to 2,000.
    """
    return np.fromiter((_laplacian_variance(picture) for picture in pixels), np.float32, len(pixels))


def _laplacian_variance(picture: Pixels) -> float:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return float(deviation[0, 0]) ** 2


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Returns the 95 % interval of an accuracy, low and high, 0..1.

    E. Wilson, "Probable inference, the law of succession, and statistical inference", 1927; good for few images too,
    and where all or none are right.

    Args:
        correct: images that were classified rightly.
        images: all of them, 1 or more.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def slice_table(
    predictions: LabelledPredictions, manifest: pd.DataFrame, sharpness: npt.NDArray[np.float32]
) -> pd.DataFrame:
    """Counts images and errors on every slice of the test split.

    Numbers are cut near their quartiles, into fewer parts where values repeat. Folders are left out where they say
    nothing beyond the classes: where all images of each class lie in one folder.

    Args:
        predictions: of the test images.
        manifest: columns path, width, height, brightness and format, of these images and any others.
        sharpness: float32 [images], in the predictions' order, as the function of that name returns it.

    Returns:
        One row a slice: property (see PROPERTIES), slice (its range or name; "unknown" where the value is missing),
        images, errors, accuracy with its Wilson interval low and high, and weak: at least LEAST_IMAGES images, and
        so many errors that chance explains them badly, see `find_weak`. Rounded to six digits.

    Raises:
        CatdogError: the manifest does not list one of the images.
    """
    listed = _rows_of(predictions.paths, manifest)
    width, height, brightness = (_numbers(listed[name]) for name in ("width", "height", "brightness"))
    labels = [predictions.class_names[number] for number in predictions.labels]
    slicings = [
        _by_quartiles("shorter side", np.minimum(width, height), unit=" px"),
        _by_aspect(width, height),
        _by_quartiles("brightness", brightness),
        _by_quartiles("sharpness", np.asarray(sharpness, np.float64)),
        _by_format(listed["format"]),
        *_by_folder(predictions.paths, labels),
    ]
    wrong = ~predictions.correct
    rows = []
    for slicing in slicings:
        for number, name in enumerate(slicing.names):
            inside = slicing.numbers == number
            images, errors = int(inside.sum()), int(wrong[inside].sum())
            if images:
                low, high = wilson_interval(images - errors, images)
                rows.append((slicing.property, name, images, errors, 1 - errors / images, low, high))
    table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
    table["weak"] = find_weak(
        table["images"].to_numpy(np.int64), table["errors"].to_numpy(np.int64), len(wrong), int(wrong.sum())
    )
    return table.round(6)


def find_weak(
    images: npt.NDArray[np.int64], errors: npt.NDArray[np.int64], all_images: int, all_errors: int
) -> npt.NDArray[np.bool_]:
    """Says which slices have more errors than chance explains.

    Fisher's exact test, one-sided, of each slice against the rest of the images; the probabilities are corrected for
    the number of slices that were looked at (S. Holm, "A simple sequentially rejective multiple test procedure", 1979),
    so that in a test split without any weak spot one is found in at most 5 of 100 cases.

    Args:
        images: of each slice, int64 [slices]; with fewer than LEAST_IMAGES, or with all images, it is not tested.
        errors: among them, int64 [slices].
        all_images: of the test split.
        all_errors: among them.

    Returns:
        bool [slices].
    """
    from scipy.stats import hypergeom

    tested = np.flatnonzero((images >= LEAST_IMAGES) & (images < all_images))
    # At least so many errors, were this slice drawn from all images blindly.
    chance = hypergeom.sf(errors[tested] - 1, all_images, all_errors, images[tested])
    weak = np.zeros(len(images), bool)
    weak[tested] = np.asarray(holm(chance.tolist())) < _SIGNIFICANCE
    return weak


@dataclass(frozen=True)
class _Slicing:
    """How one property divides the images."""

    property: str
    names: tuple[str, ...]  # of its slices, in the order to show; some may hold no image
    numbers: npt.NDArray[np.int64]  # [images], which slice each is in


def _rows_of(paths: Sequence[str], manifest: pd.DataFrame) -> pd.DataFrame:
    by_path = manifest.set_index("path")
    missing = sorted(set(paths) - set(by_path.index))
    if missing:
        raise CatdogError(
            f"{MANIFEST} does not list {missing[0]!r}, which the stored test images hold; `dvc repro` makes both anew"
        )
    return by_path.loc[list(paths)]


def _numbers(values: pd.Series) -> npt.NDArray[np.float64]:
    # A column with an empty field was read as text.
    return pd.to_numeric(values, errors="coerce").to_numpy(np.float64)


def _by_quartiles(name: str, values: npt.NDArray[np.float64], unit: str = "") -> _Slicing:
    """Cuts between the whole numbers that lie nearest to the quartiles; never between equal ones."""
    known = np.isfinite(values)
    whole = np.rint(np.where(known, values, 0)).astype(np.int64)
    distinct, counts = np.unique(whole[known], return_counts=True)
    starts, below = distinct[1:], np.cumsum(counts)[:-1]  # where a cut may be, and how many images lie below it
    wanted = np.array([0.25, 0.5, 0.75]) * counts.sum()
    cuts = np.unique(starts[np.abs(below[:, None] - wanted).argmin(axis=0)]) if len(starts) else starts
    numbers = np.where(known, np.searchsorted(cuts, whole, side="right"), len(cuts) + 1)
    return _Slicing(name, (*_ranges(distinct, cuts, unit), _UNKNOWN), numbers.astype(np.int64))


def _ranges(distinct: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64], unit: str) -> list[str]:
    """Names the parts below, between and above cuts: "below 300 px", "300 to 374 px", "375 px and more"."""
    if not len(cuts):
        return [f"{value:,}{unit}" for value in distinct] or [_UNKNOWN]
    between = [
        f"{start:,}{unit}" if start == end - 1 else f"{start:,} to {end - 1:,}{unit}" for start, end in pairwise(cuts)
    ]
    return [f"below {cuts[0]:,}{unit}", *between, f"{cuts[-1]:,}{unit} and more"]


def _by_aspect(width: npt.NDArray[np.float64], height: npt.NDArray[np.float64]) -> _Slicing:
    names = ("portrait (below 0.80)", "nearly square (0.80 to 1.25)", "landscape (above 1.25)", _UNKNOWN)
    known = np.isfinite(width) & np.isfinite(height)
    portrait, landscape = width < 0.8 * height, width > 1.25 * height
    return _Slicing("aspect", names, np.select([~known, portrait, landscape], [3, 0, 2], 1).astype(np.int64))


def _by_format(formats: pd.Series) -> _Slicing:
    return _by_names("file format", [str(name) for name in formats.fillna("").replace("", _UNKNOWN)])


def _by_names(name: str, values: Sequence[str]) -> _Slicing:
    """One slice a value, the most frequent first."""
    counts = Counter(values)
    names = tuple(sorted(counts, key=lambda value: (-counts[value], value)))
    number = {value: position for position, value in enumerate(names)}
    return _Slicing(name, names, np.array([number[value] for value in values], np.int64))


def _by_folder(paths: Sequence[str], labels: Sequence[str]) -> list[_Slicing]:
    """Returns one slicing, or none where the folders are nothing but the classes."""
    folders = [_folder(path, label) for path, label in zip(paths, labels, strict=True)]
    if len(set(zip(folders, labels, strict=True))) == len(set(labels)):
        return []
    found = _by_names("folder", folders)
    rest = len(found.names) - FOLDERS_SHOWN
    if rest <= 0:
        return [found]
    names = (*found.names[:FOLDERS_SHOWN], f"{rest} other folder{'s' if rest > 1 else ''}")
    return [_Slicing("folder", names, np.minimum(found.numbers, FOLDERS_SHOWN))]


def _folder(path: str, label: str) -> str:
    # The class's own folder is starred: then `clinic/cat` and `clinic/dog` are one source.
    parts = ["*" if part == label else part for part in PurePosixPath(path).parts[:-1]]
    return "/".join(parts) or "(top)"
