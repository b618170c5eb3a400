"""Several measurements of the same: their spread, ratios pair by pair, and growth with the number of images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The least, the middle and the largest of several measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Takes one measurement or more."""
        return cls(min(values), statistics.median(values), max(values))

    def told(self, digits: int = 1) -> str:
        """The median, and where they differ after rounding also the ends: "12.3 (11.9 to 13.0)"."""
        low, median, high = (f"{value:,.{digits}f}" for value in (self.low, self.median, self.high))
        return median if low == high else f"{median} ({low} to {high})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The spread of ours / theirs, pair by pair: what drifts in the machine's speed meets both of a pair.

    Args:
        ours: one value a round.
        theirs: of the same rounds, above 0. A round that only one of them has (an interrupted run) does not count.
    """
    return Spread.of([one / other for one, other in zip(ours, theirs, strict=False)])


@dataclass(frozen=True)
class Line:
    """The straight line nearest to some measurements: what is paid once, and what is paid for each image."""

    fixed: float
    per_image: float


def fit_line(counts: Sequence[int], values: Sequence[float]) -> Line:
    """Fits values = fixed + per_image x count: least squares of relative deviations, so all counts weigh alike.

    Args:
        counts: numbers of images, two different ones at least.
        values: seconds or megabytes at each, above 0.
    """
    weights = 1 / np.asarray(values, np.float64)
    columns = np.stack([np.ones(len(counts)), np.asarray(counts, np.float64)], axis=1)
    (fixed, per_image), *_ = np.linalg.lstsq(columns * weights[:, None], np.ones(len(counts)), rcond=None)
    return Line(float(fixed), float(per_image))


def exponent(counts: Sequence[int], values: Sequence[float]) -> float:
    """How values grow between the two largest counts, as the exponent p of count^p.

    1 is linear, 2 quadratic, 0 flat; below 1 where a fixed cost still counts.
    """
    (one, first), (other, second) = sorted(zip(counts, values, strict=True))[-2:]
    return math.log(second / first) / math.log(other / one)
