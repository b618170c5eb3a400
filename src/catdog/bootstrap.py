"""How far the numbers of a test split can be trusted: bootstrap intervals, and comparisons of two models.

A resample draws as many images as there are, with replacement, and every metric is computed anew on it (Efron 1979).
Instead of copying images, each gets a weight: how often it was drawn. All resamples are computed side by side, which
is a hundred times as fast as calling scikit-learn for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.calibration import BINS, bin_numbers, top_class
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions, compute_metrics, exact_probabilities, present_classes

_PERCENTILES = (2.5, 97.5)
_CHUNK_VALUES = 500_000
"""Weights that are held at once: 4 MB, which a processor's cache holds; more images mean fewer resamples at once."""

Weights = npt.NDArray[np.float64]
"""How often each image was drawn, [images, resamples]."""
Samples = dict[str, npt.NDArray[np.float64]]
"""By metric: its value on each resample, [..., resamples]; NaN where the resample leaves it undefined."""


def intervals(
    predictions: LabelledPredictions, resamples: int, seed: int, groups: npt.NDArray[np.int64] | None = None
) -> pd.DataFrame:
    """Returns the headline metrics with 95 % intervals: metric, value, low, high; a row for each of `compute_metrics`.

    The ends are the 2.5th and the 97.5th percentile of the resamples. A perfect value has an interval without width,
    since no resample of images without a mistake holds one. Only the calibration error sums up absolute values, which
    resampling increases as sampling did; so its percentiles are mirrored at the value (basic bootstrap interval,
    Davison and Hinkley 1997, section 5.2) and widened where that leaves out the value itself. Even so, that interval
    is rough: near 0 it holds the truth two times in three, from 0.03 on nine times in ten.

    Args:
        predictions: of the test images.
        resamples: how many; 1,000 fix the ends to a few percent of the interval's width.
        seed: of the draws.
        groups: int64 [images], equal for images that belong together, such as near-duplicates; groups are drawn
            instead of images (cluster bootstrap). Without it each image is on its own.
    """
    values = compute_metrics(predictions)
    samples = _sample(weighted_metrics, predictions, resamples, seed, groups)
    rows = []
    for name, value in values.items():
        low, high = np.nanpercentile(samples[name], _PERCENTILES)
        if name == "ece":
            low, high = max(0.0, min(value, 2 * value - high)), max(value, 2 * value - low)
        rows.append((name, value, low, high))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high"]).round(6)


def class_intervals(
    predictions: LabelledPredictions, resamples: int, seed: int, groups: npt.NDArray[np.int64] | None = None
) -> pd.DataFrame:
    """Returns one row a class: class, images, then precision, recall and f1, each with its 95 % interval.

    The columns of the intervals end in _low and _high. The precision of a class that is never predicted counts as 0.
    Of a class without images nothing is known: its cells are empty. Resamples without images of a class say nothing
    about it. The arguments are those of `intervals`.
    """
    once = weighted_class_metrics(predictions, np.ones((len(predictions.labels), 1)))
    samples = _sample(weighted_class_metrics, predictions, resamples, seed, groups)
    images = np.bincount(predictions.labels, minlength=len(predictions.class_names))
    table = pd.DataFrame({"class": predictions.class_names, "images": images})
    present = present_classes(predictions)
    for name, values in once.items():
        ends = np.full((2, len(table)), np.nan)
        ends[:, present] = np.nanpercentile(samples[name][present], _PERCENTILES, axis=1)
        table[name], table[f"{name}_low"], table[f"{name}_high"] = values[:, 0], *ends
    return table.round(6)


def paired_differences(
    a: LabelledPredictions,
    b: LabelledPredictions,
    resamples: int,
    seed: int,
    groups: npt.NDArray[np.int64] | None = None,
) -> pd.DataFrame:
    """Compares two models on the same images: metric, a, b, difference (b minus a), low, high, p.

    Both are computed on the same resamples, so what makes an image hard for both cancels out. `low` and `high` are
    the 95 % percentile interval of the difference, and `p` is the two-sided bootstrap p-value: twice the share of the
    resamples on the rarer side of no difference, at least 2 / (resamples + 1) (Davison and Hinkley 1997, section 4.4).

    Args:
        a: of the first model.
        b: of the second model: same paths, labels and class names in the same order.
        resamples: how many.
        seed: of the draws.
        groups: as in `intervals`.

    Raises:
        CatdogError: the two are not about the same images and classes.
    """
    if a.class_names != b.class_names:
        raise CatdogError(
            f"two models can only be compared on the same classes, but one has {', '.join(a.class_names)} and the "
            f"other {', '.join(b.class_names)}"
        )
    if a.paths != b.paths or not np.array_equal(a.labels, b.labels):
        raise CatdogError(
            f"two models can only be compared on the same test images, but their {len(a.paths):,} and "
            f"{len(b.paths):,} images or the labels of these differ; evaluate both on one split"
        )
    a_values, b_values = compute_metrics(a), compute_metrics(b)
    # The same seed draws the same images for both.
    a_samples, b_samples = (_sample(weighted_metrics, one, resamples, seed, groups) for one in (a, b))
    rows = []
    for name, value in a_values.items():
        differences = b_samples[name] - a_samples[name]
        differences = differences[~np.isnan(differences)]
        low, high = np.percentile(differences, _PERCENTILES)
        rarer = min((differences <= 0).sum(), (differences >= 0).sum())
        p = min(1.0, 2 * (rarer + 1) / (len(differences) + 1))
        rows.append((name, value, b_values[name], b_values[name] - value, low, high, p))
    return pd.DataFrame(rows, columns=["metric", "a", "b", "difference", "low", "high", "p"]).round(6)


def mcnemar(a_correct: npt.NDArray[np.bool_], b_correct: npt.NDArray[np.bool_]) -> tuple[int, int, float]:
    """Tests whether two models are right equally often on the same images (McNemar 1947, exact and two-sided).

    Args:
        a_correct: whether the first model is right, [images].
        b_correct: whether the second is, on the same images.

    Returns:
        How many images only the first has right, how many only the second, and the p-value: the chance of so uneven a
        division of the images on which they disagree, if each fell to either side like a coin. 1 where they agree.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((a_correct & ~b_correct).sum()), int((b_correct & ~a_correct).sum())
    if not only_a + only_b:
        return 0, 0, 1.0
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, so that one in twenty such families has any below 0.05 by chance.

    The step-down method of Holm (1979), "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: 0..1, of the tests of one family.

    Returns:
        The corrected ones, 0..1, in the same order.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def weighted_metrics(predictions: LabelledPredictions, weights: Weights) -> Samples:
    """Computes the metrics of `evaluation.compute_metrics` for many weightings of the images at once.

    Args:
        predictions: of the test images.
        weights: [images, resamples], 0 or more; at least one above 0 a resample.

    Returns:
        By metric, not rounded: [resamples].
    """
    labels, probabilities = predictions.labels, predictions.probabilities
    present = present_classes(predictions)
    total = weights.sum(axis=0)
    # Every class has at least one image in the split, but perhaps not in a resample.
    macro = {
        name: np.nanmean(values[present], axis=0)
        for name, values in weighted_class_metrics(predictions, weights).items()
    }
    scores = exact_probabilities(probabilities)
    smallest = np.finfo(np.float64).eps
    losses = -np.log(np.clip(scores[np.arange(len(labels)), labels], smallest, 1 - smallest))
    squares = ((scores - np.eye(scores.shape[1])[labels]) ** 2).sum(axis=1) / (2 if scores.shape[1] == 2 else 1)
    confidence, correct = top_class(labels, probabilities)
    gaps = np.eye(BINS)[bin_numbers(confidence)].T * (correct - confidence.astype(np.float64))
    areas, average_precisions = [], []
    for number in present:
        area, average_precision = _rank_areas(probabilities[:, number], labels == number, weights)
        areas.append(area)
        average_precisions.append(average_precision)
    return {
        "accuracy": predictions.correct @ weights / total,
        "balanced_accuracy": macro["recall"],
        **macro,
        # Of two classes the second one's curve: the first one's mirrors it.
        "roc_auc": areas[-1] if scores.shape[1] == 2 else _mean_of_defined(areas),
        "pr_auc": _mean_of_defined(average_precisions),
        "log_loss": losses @ weights / total,
        "brier": squares @ weights / total,
        "ece": np.abs(gaps @ weights).sum(axis=0) / total,
    }


def weighted_class_metrics(predictions: LabelledPredictions, weights: Weights) -> Samples:
    """Computes precision, recall and f1 of each class for many weightings of the images at once.

    Args:
        predictions: of the test images.
        weights: [images, resamples], 0 or more.

    Returns:
        By metric: [classes, resamples]; NaN where the class has no images.
    """
    one_hot = np.eye(len(predictions.class_names))
    images = one_hot[predictions.labels].T
    support, predicted = images @ weights, one_hot[predictions.predicted].T @ weights
    right = (images * predictions.correct) @ weights
    known = np.where(support > 0, 1.0, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "precision": np.where(predicted > 0, right / predicted, 0.0) * known,
            "recall": right / support,
            "f1": 2 * right / (support + predicted) * known,
        }


def _rank_areas(
    scores: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_], weights: Weights
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns the area under the ROC curve and the average precision, each [resamples].

    Both are sums over the positive images of what lies above each of them, so one running sum over the images from
    the highest score down gives both. Images with one score count together: half above each other for the first,
    all of them above each other for the second, as in scikit-learn.
    """
    order = np.argsort(-scores, kind="stable")
    depth = -scores[order]
    weight_above = np.zeros((len(scores) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=weight_above[1:])
    places = np.flatnonzero(positive[order])
    drawn = weights[order[places]]
    positive_above = np.zeros((len(places) + 1, weights.shape[1]))
    np.cumsum(drawn, axis=0, out=positive_above[1:])

    above, with_ties = (weight_above[np.searchsorted(depth, depth[places], side)] for side in ("left", "right"))
    positives_depth = depth[places]
    right_above, right_with_ties = (
        positive_above[np.searchsorted(positives_depth, positives_depth, side)] for side in ("left", "right")
    )
    positives = positive_above[-1]
    negatives = weight_above[-1] - positives
    lost = (drawn * ((above - right_above) + (with_ties - right_with_ties))).sum(axis=0) / 2
    precision = right_with_ties / np.maximum(with_ties, np.finfo(np.float64).tiny)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - lost / (positives * negatives), (drawn * precision).sum(axis=0) / positives


def _mean_of_defined(values: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    stacked = np.stack(values)
    defined = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, stacked, 0).sum(axis=0) / defined.sum(axis=0), np.float64)


def _sample(
    compute: Callable[[LabelledPredictions, Weights], Samples],
    predictions: LabelledPredictions,
    resamples: int,
    seed: int,
    groups: npt.NDArray[np.int64] | None,
) -> Samples:
    chunks = [compute(predictions, weights) for weights in _draw(len(predictions.labels), resamples, seed, groups)]
    return {name: np.concatenate([chunk[name] for chunk in chunks], axis=-1) for name in chunks[0]}


def _draw(images: int, resamples: int, seed: int, groups: npt.NDArray[np.int64] | None) -> Iterator[Weights]:
    """Yields the weights of the resamples, chunk by chunk; the draws do not depend on the chunks."""
    group_of_image = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(group_of_image.max()) + 1
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_VALUES // images)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, np.newaxis]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        yield times.T.astype(np.float64, order="C")[group_of_image]
