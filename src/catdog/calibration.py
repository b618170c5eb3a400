"""Probabilities that mean what they say, and the threshold from which the second of two classes is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.config import CalibrateParams
from catdog.errors import CatdogError
from catdog.model import class_probabilities

if TYPE_CHECKING:
    from catdog.evaluation import LabelledPredictions

BINS = 15
"""Bins of equal width in which confidence is compared with accuracy, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Calibration:
    """What the validation split says about how to read a model's logits."""

    temperature: float  # by which they are divided, above 0
    threshold: float  # two classes: the probability from which the second is predicted; more: unused


def check_threshold_rule(threshold: float | str, class_count: int) -> None:
    """Raises CatdogError where a rule is to choose the threshold but there are not two classes."""
    if isinstance(threshold, str) and class_count != 2:
        raise CatdogError(
            f"calibrate.threshold = {threshold!r} divides two classes, but the data has {class_count}; "
            "give a number, e.g. 0.5, which more classes leave unused"
        )


def calibrate(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], params: CalibrateParams) -> Calibration:
    """Fits the temperature and chooses the threshold on the validation images, as the parameters say.

    Args:
        logits: [images, 1] (of the second of two classes) or [images, classes], finite.
        labels: class numbers [images].
        params: the block `calibrate`.

    Raises:
        CatdogError: as `check_threshold_rule` and `choose_threshold`.
    """
    from scipy.special import expit, softmax

    check_threshold_rule(params.threshold, max(2, logits.shape[1]))
    temperature = fit_temperature(logits, labels) if params.temperature else 1.0
    if not isinstance(params.threshold, str):
        return Calibration(temperature, params.threshold)
    calm = np.asarray(logits, np.float32) / np.float32(temperature)
    probabilities = class_probabilities(expit(calm) if logits.shape[1] == 1 else softmax(calm, axis=1))
    return Calibration(temperature, choose_threshold(labels, probabilities, params.threshold, params.target))


def fit_temperature(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Returns the number by which to divide the logits, so that the probabilities are right as often as they say.

    It minimises the log loss of the images (Guo et al. 2017, "On Calibration of Modern Neural Networks",
    arXiv:1706.04599). Above 1 the model was too sure of itself, below 1 too timid. Images that are all classified
    correctly would ask for 0, for certainty; therefore (log T)^2 / 2 is added to the sum of the losses, which says
    that log T comes from a standard normal distribution (a temperature from 1/e to e is likely). Images that tell
    little leave the temperature near 1; hundreds of them, some classified wrongly, outweigh this.

    Targets smoothed as in Platt 1999, to (N + 1) / (N + 2), would end above 0 too, but they claim errors that a good
    model does not make: in a trial with 90 images of well separated classes they asked for 5 where 1.7 was right, and
    tripled the log loss of new images.

    Args:
        logits: [images, 1] (of the second of two classes) or [images, classes], finite.
        labels: class numbers [images].

    Returns:
        The temperature, above 0. It is large where the logits point to the true classes no better than chance.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    scores = np.asarray(logits, np.float64)
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    true = scores[np.arange(len(labels)), labels]

    def slope(log_temperature: float) -> float:
        """Derivative of the sum that is minimised by the logarithm of the temperature."""
        calm = np.exp(-log_temperature)
        expected = (softmax(calm * scores, axis=1) * scores).sum(axis=1)
        return float(log_temperature - calm * (expected - true).sum())

    # Downhill from 1 until the other side rises, which the added square guarantees.
    step = -1.0 if slope(0.0) > 0 else 1.0
    while slope(step) * step < 0:
        step *= 2
    return float(np.exp(brentq(slope, min(0.0, step), max(0.0, step), xtol=1e-12)))


def undo_temperature(probabilities: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """Returns the probabilities [images, classes] that the model would give with a temperature of 1.

    Args:
        probabilities: [images, classes], of logits divided by `temperature`.
        temperature: above 0.
    """
    values = np.asarray(probabilities, np.float64)
    # softmax(z) is softmax(z / T) to the power of T, up to a factor; the largest becomes 1, so that none overflows.
    powers = (values / values.max(axis=1, keepdims=True)) ** temperature
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def choose_threshold(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], rule: str, target: float
) -> float:
    """Chooses the probability from which the second of two classes is predicted.

    All thresholds between two neighbouring probabilities of the images predict the same; the middle of such a
    stretch is returned, as far as possible from any image.

    Args:
        labels: class numbers, 0 or 1 [images].
        probabilities: [images, 2].
        rule: `f1`: the highest F1 of the second class; `youden`: the highest Youden index, which is the sum of both
            classes' recalls minus 1 (of several highest stretches the widest); `precision`: the highest recall of the
            second class among the thresholds with at least the target as its precision; `recall`: the highest
            threshold with at least the target as the recall of the second class.
        target: of `precision` and `recall`, above 0 to 1.

    Returns:
        A float32 value above 0 and below 1: compared with float32 probabilities, no rounding moves an image across.

    Raises:
        CatdogError: a class has no image, or the target cannot be reached.
    """
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        missing = "second" if negatives else "first"
        raise CatdogError(
            f"calibrate.threshold = {rule!r} needs validation images of both classes, but there is none of the "
            f"{missing}; give the threshold as a number, or raise split.val"
        )
    below, above, true, false = _stretches(labels, np.asarray(probabilities[:, 1], np.float32))
    precision = true / np.maximum(1, true + false)
    if rule == "f1":
        chosen = _widest_highest(2 * true / (true + false + positives), below, above)
    elif rule == "youden":
        # In whole numbers, so that equal ones are equal: recalls times positives times negatives.
        chosen = _widest_highest(true * negatives - false * positives, below, above)
    elif rule == "precision":
        first = int(np.argmax(_reaching(rule, precision, target)))
        chosen = first, first
    elif rule == "recall":
        last = int(np.flatnonzero(_reaching(rule, true / positives, target))[-1])
        chosen = last, last
    else:
        raise ValueError(f"unknown rule {rule!r}")
    low, high = below[chosen[0]], above[chosen[1]]
    middle = np.float32((float(low) + float(high)) / 2)
    return float(middle if middle > low else high)


def _stretches(
    labels: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns, rising, the stretches of thresholds that predict the same: each is above `below`, up to `above`.

    Then how many of the images with a score of at least such a threshold are of the second class, and how many not.
    """
    values, position = np.unique(scores, return_inverse=True)
    # Counts of the images at each value, and of none at the end: above the highest score nothing is predicted.
    of_second = np.bincount(position, weights=labels == 1, minlength=len(values) + 1).astype(np.int64)
    of_first = np.bincount(position, weights=labels != 1, minlength=len(values) + 1).astype(np.int64)
    true, false = (counts[::-1].cumsum()[::-1] for counts in (of_second, of_first))
    edges = np.concatenate([np.zeros(1, np.float32), values, np.ones(1, np.float32)])
    below = edges[:-1]
    above = np.minimum(edges[1:], np.nextafter(np.float32(1), np.float32(0)))
    # Without width are those at scores of exactly 0 and 1.
    kept = below < above
    return below[kept], above[kept], true[kept], false[kept]


def _widest_highest(
    values: npt.NDArray[np.float64] | npt.NDArray[np.int64],
    below: npt.NDArray[np.float32],
    above: npt.NDArray[np.float32],
) -> tuple[int, int]:
    """Returns the first and the last of the neighbouring stretches with the highest value that are widest together."""
    highest = np.flatnonzero(values == values.max())
    runs = np.split(highest, np.flatnonzero(np.diff(highest) > 1) + 1)
    widest = max(runs, key=lambda run: float(above[run[-1]]) - float(below[run[0]]))
    return int(widest[0]), int(widest[-1])


def _reaching(rule: str, values: npt.NDArray[np.float64], target: float) -> npt.NDArray[np.bool_]:
    reached = values >= target
    if not reached.any():
        # Rounded down, so that the number can be reached as it is told.
        best = np.floor(values.max() * 1e4) / 1e4
        raise CatdogError(
            f"calibrate.target = {target:g} cannot be reached: the best {rule} of the second class on the validation "
            f"split is {best:g}; lower the target or choose another calibrate.threshold"
        )
    return reached


def bin_numbers(confidence: npt.NDArray[np.floating], bins: int = BINS) -> npt.NDArray[np.int64]:
    """Returns each confidence's bin, 0 to bins - 1, int64 [images]; bin m is above m / bins, up to (m + 1) / bins."""
    numbers = np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1
    return np.clip(numbers, 0, bins - 1)


def expected_calibration_error(
    confidence: npt.NDArray[np.floating], correct: npt.NDArray[np.bool_], bins: int = BINS
) -> float:
    """Returns how far confidence and accuracy lie apart on average, 0..1.

    Guo et al. 2017, equation 3: the mean over the images of |accuracy - mean confidence| of their bin.

    Args:
        confidence: [images], 0..1.
        correct: [images].
        bins: of equal width.
    """
    gaps = np.asarray(correct, np.float64) - np.asarray(confidence, np.float64)
    return float(np.abs(np.bincount(bin_numbers(confidence, bins), weights=gaps)).sum() / len(gaps))


def top_class(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Returns the probability of each image's most probable class, float32 [images], and whether that is its label.

    The threshold plays no part here: calibration is a property of the probabilities.
    """
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def reliability_table(predictions: LabelledPredictions, temperature: float) -> pd.DataFrame:
    """Compares the confidence in the most probable class with its accuracy, before and after calibration.

    Args:
        predictions: with calibrated probabilities.
        temperature: by which the model divides its logits.

    Returns:
        calibration (before, after), bin_low, bin_high, images, confidence and accuracy (means over the images of the
        bin); 15 bins of equal width, those without images left out.
    """
    tables = []
    for calibration, probabilities in (
        ("before", undo_temperature(predictions.probabilities, temperature)),
        ("after", predictions.probabilities),
    ):
        confidence, correct = top_class(predictions.labels, probabilities)
        images = pd.DataFrame(
            {"bin": bin_numbers(confidence), "confidence": confidence.astype(np.float64), "accuracy": correct}
        )
        table = images.groupby("bin").agg(
            images=("bin", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
        )
        numbers = table.index.to_numpy()
        table.insert(0, "bin_high", (numbers + 1) / BINS)
        table.insert(0, "bin_low", numbers / BINS)
        table.insert(0, "calibration", calibration)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).round(6)


def calibration_error(calibration: pd.DataFrame, when: Literal["before", "after"]) -> float:
    """Returns the expected calibration error (0..1) before or after the temperature, from the bins of the table.

    The mean over the images of how far the confidence and the accuracy of their bin lie apart: Guo et al. 2017,
    arXiv:1706.04599, equation 3. NaN where there are no bins.
    """
    bins = calibration[calibration["calibration"] == when]
    images = float(bins["images"].sum())
    gaps = (bins["confidence"] - bins["accuracy"]).abs()
    return float((gaps * bins["images"]).sum()) / images if images else float("nan")
