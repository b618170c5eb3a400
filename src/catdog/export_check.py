"""Does an export give the labels of the Keras model that it was made from?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from catdog.export import Precision
from catdog.images import Pixels
from catdog.inference import Forward, single_picture_seconds
from catdog.model import predict_classes

ALLOWED: Mapping[Precision, float] = {"float32": 0.0, "float16": 0.005, "int8": 0.02}
"""The share of the test images to which an export may give another label than the Keras model does.

float32 computes the same in another order. The two others are rounded on purpose; a conversion that went wrong
gives other labels by the dozen, not by the percent.
"""

BORDER = 1e-4
"""An image whose label hangs on so little a probability may get either: rounding in float32 decides."""

_TURNS = 3


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on the same images. The difference of an image is the largest of its classes'."""

    images: int
    other_labels: int  # images to which the two give different labels
    borderline: int  # of those, how many are within BORDER of both labels
    largest_difference: float  # of the probabilities, 0..1
    mean_difference: float
    accuracy: float  # of the export, 0..1
    model_accuracy: float  # of the Keras model

    @property
    def share(self) -> float:
        """The share of the images to which the export gives another label, without the borderline ones, 0..1."""
        return (self.other_labels - self.borderline) / self.images


@dataclass(frozen=True)
class Check:
    """What was found about an export."""

    agreement: Agreement
    allowed: float  # the share of other labels, 0..1
    latency_ms: float  # time of one picture in the export's runtime
    model_latency_ms: float  # in TensorFlow, with the weights as constants

    @property
    def passed(self) -> bool:
        """Whether the export may be used in the Keras model's place."""
        return self.agreement.share <= self.allowed

    def report(self) -> dict[str, Any]:
        """Returns it all for a JSON file."""
        agreement = {
            name: round(value, 7) if isinstance(value, float) else value
            for name, value in asdict(self.agreement).items()
        }
        return {
            "passed": self.passed,
            **agreement,
            "other_labels_share": round(self.agreement.share, 7),
            "other_labels_allowed": self.allowed,
            "latency_ms": round(self.latency_ms, 2),
            "model_latency_ms": round(self.model_latency_ms, 2),
        }


def compare_probabilities(
    model: npt.NDArray[np.float32],
    export: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    threshold: float,
) -> Agreement:
    """Compares what two models say of the same images.

    A probability of the export that is no number, as where float16 overflowed, counts as another label and a
    difference of 1.

    Args:
        model: the Keras model's probabilities, [images, classes], at least one image.
        export: the export's.
        labels: the true classes' numbers, int64 [images].
        threshold: of two classes, the probability from which the second is predicted.
    """
    broken = ~np.isfinite(export).all(axis=1)
    ours, theirs = predict_classes(model, threshold), predict_classes(export, threshold)
    other = (ours != theirs) | broken
    differences = np.where(broken, 1.0, np.abs(export - model).max(axis=1))
    return Agreement(
        images=len(labels),
        other_labels=int(other.sum()),
        borderline=int((other & ~broken & (_margin(model, threshold) <= BORDER)).sum()),
        largest_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        accuracy=float(((theirs == labels) & ~broken).mean()),
        model_accuracy=float((ours == labels).mean()),
    )


def _margin(probabilities: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.float32]:
    """Returns how far each image is from another label: from the threshold, or the second most probable class."""
    if probabilities.shape[1] == 2:
        return np.asarray(np.abs(probabilities[:, 1] - threshold), np.float32)
    best = np.sort(probabilities, axis=1)
    return np.asarray(best[:, -1] - best[:, -2], np.float32)


def check_export(
    model: Forward,
    export: Forward,
    pictures: Iterable[Pixels],
    labels: npt.NDArray[np.int64],
    *,
    size: int,
    threshold: float,
    allowed: float,
) -> Check:
    """Runs a model and its export on the same pictures and measures both.

    Args:
        model: to the probabilities of the classes, [images, classes].
        export: likewise, from `export_runtimes.open_export`.
        pictures: uint8 [batch, size, size, 3] each, which can be read twice.
        labels: their classes' numbers.
        size: pixels a side.
        threshold: as in `compare_probabilities`.
        allowed: the share of the images to which the export may give another label.
    """
    agreement = compare_probabilities(model(pictures), export(pictures), labels, threshold)
    # By turns, and the best of each: what else the machine does then weighs on both alike, and least.
    times = [[1000 * single_picture_seconds(forward, size) for forward in (export, model)] for _ in range(_TURNS)]
    latency, model_latency = (min(column) for column in zip(*times, strict=True))
    return Check(agreement, allowed, latency_ms=latency, model_latency_ms=model_latency)


def format_check(check: Check, *, export: str, size: int, model_size: int) -> str:
    """Returns a table for reading: the Keras model beside its export, then how far they agree.

    Args:
        check: the result.
        export: what the export and its runtime are called.
        size: bytes of the export.
        model_size: bytes of the Keras model's file.
    """
    agreement = check.agreement
    rows = [
        ("", "Keras model", export),
        ("accuracy", f"{agreement.model_accuracy:.2%}", f"{agreement.accuracy:.2%}"),
        ("size", f"{model_size / 1e6:.1f} MB", f"{size / 1e6:.1f} MB"),
        ("latency, one picture", f"{check.model_latency_ms:.1f} ms", f"{check.latency_ms:.1f} ms"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
    lines.append(
        f"another label for {agreement.other_labels:,} of {agreement.images:,} test images "
        f"({agreement.other_labels / agreement.images:.2%}; up to {check.allowed:.2%} allowed"
        + (f" beside {agreement.borderline:,} on the border)" if agreement.borderline else ")")
    )
    lines.append(
        f"probabilities differ by {agreement.largest_difference:.6f} at most, "
        f"{agreement.mean_difference:.6f} on average"
    )
    return "\n".join(lines) + "\n"
