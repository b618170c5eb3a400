"""What the test split says about a model."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.calibration import expected_calibration_error, top_class
from catdog.model import predict_classes

CURVE_POINTS = 200
"""Points of a curve in a table, at most: chosen by `thin_curve`, they draw the same line."""

SCORE_BINS = 20


@dataclass(frozen=True)
class LabelledPredictions:
    """What a model said about images whose class is known."""

    paths: tuple[str, ...]  # of the images, in the raw archive
    labels: npt.NDArray[np.int64]  # [images]
    probabilities: npt.NDArray[np.float32]  # [images, classes], calibrated
    class_names: tuple[str, ...]  # position = number of the class
    threshold: float  # two classes: from this probability of the second on, it is predicted; more: unused

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """Predicted class numbers, int64 [images]."""
        return predict_classes(self.probabilities, self.threshold)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each image is classified correctly, bool [images]."""
        return np.asarray(self.predicted == self.labels, np.bool_)

    @property
    def confidence(self) -> npt.NDArray[np.float32]:
        """Probability of the predicted class, float32 [images]."""
        return self.probabilities[np.arange(len(self.labels)), self.predicted]


def prediction_table(predictions: LabelledPredictions) -> pd.DataFrame:
    """Returns one row an image: path, label, predicted, correct, confidence, one probability a class (p_<class>).

    `confidence` is the probability of the predicted class. Probabilities are rounded to six digits.
    """
    names = np.asarray(predictions.class_names)
    columns = {
        "path": predictions.paths,
        "label": names[predictions.labels],
        "predicted": names[predictions.predicted],
        "correct": predictions.correct,
        "confidence": predictions.confidence,
    }
    columns |= {f"p_{name}": predictions.probabilities[:, number] for number, name in enumerate(names)}
    return pd.DataFrame(columns).round(6)


def compute_metrics(predictions: LabelledPredictions) -> dict[str, float]:
    """Computes the headline metrics with scikit-learn.

    Each is a mean over the classes (macro) or over the images, so that neither class of a pair is "the" positive one.
    A class without images takes no part in the means over the classes, though images that are taken for it count as
    mistakes. Where all images are of one class, nothing can be ranked, and `roc_auc` is missing from the result.

    Returns:
        Rounded to six digits, in this order:
        accuracy: share of the images classified correctly.
        balanced_accuracy: mean recall of the classes; the same number as `recall`, under its other usual name.
        precision, recall, f1: macro means; the precision of a class that is never predicted counts as 0.
        roc_auc: area under the ROC curve; of more than two classes the mean of each against the rest.
        pr_auc: average precision, the area under the stepwise precision-recall curve; the mean of each class against
            the rest, of two classes too, because it differs with the class that is looked for.
        log_loss: in nats; a probability of 0 counts as 2.2e-16.
        brier: mean squared difference of the probabilities from 0 and 1; of two classes that of the second class
            (0..1), of more the sum over the classes (0..2).
        ece: `calibration.expected_calibration_error` of the most probable class, 0..1; the threshold plays no part.
    """
    from sklearn import metrics as sklearn_metrics

    labels, probabilities = predictions.labels, predictions.probabilities
    classes = range(probabilities.shape[1])
    present = present_classes(predictions)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        labels, predictions.predicted, labels=present, average="macro", zero_division=0
    )
    ranked = [number for number in present if len(present) > 1 and (len(classes) > 2 or number == 1)]
    areas = [sklearn_metrics.roc_auc_score(labels == number, probabilities[:, number]) for number in ranked]
    average_precisions = [
        sklearn_metrics.average_precision_score(labels == number, probabilities[:, number]) for number in present
    ]
    scores = exact_probabilities(probabilities)
    values = {
        "accuracy": sklearn_metrics.accuracy_score(labels, predictions.predicted),
        "balanced_accuracy": recall,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        **({"roc_auc": np.mean(areas)} if areas else {}),
        "pr_auc": np.mean(average_precisions),
        "log_loss": sklearn_metrics.log_loss(labels, scores, labels=classes),
        "brier": sklearn_metrics.brier_score_loss(labels, scores, labels=classes),
        "ece": expected_calibration_error(*top_class(labels, probabilities)),
    }
    return {name: round(float(value), 6) for name, value in values.items()}


def present_classes(predictions: LabelledPredictions) -> list[int]:
    """Returns the numbers of the classes that have images, rising."""
    return [int(number) for number in np.unique(predictions.labels)]


def exact_probabilities(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns probabilities [images, classes] whose sum is 1 to the last digit of float64."""
    values = probabilities.astype(np.float64)
    return np.asarray(values / values.sum(axis=1, keepdims=True), np.float64)


def choose_images(labels: npt.NDArray[np.int64], limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Chooses images so that each class has the share that it has among all, as nearly as can be.

    Seats are given by the method of Webster and Sainte-Laguë: the image at place 0, 1, 2, ... of a shuffled class of n
    has the rank 0.5/n, 1.5/n, 2.5/n, ..., and the lowest ranks win. So a larger limit adds images and drops none.

    Args:
        labels: class numbers, int64 [images].
        limit: how many at most, 0 or more.
        seed: what the shuffling and the order of equal ranks are drawn from.

    Returns:
        Their positions, int64 [chosen], ascending.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    # A stable sort of the shuffled images: equal ranks are in drawn order.
    winners = order[np.argsort(rank[order], kind="stable")][:limit]
    return np.sort(winners).astype(np.int64)


def roc_table(predictions: LabelledPredictions) -> pd.DataFrame:
    """Returns the ROC curves: class, false_positive_rate, true_positive_rate, threshold; at most 200 points each.

    Two classes have one curve, of the second class; more have one each, against the rest. A class that has no images,
    or all of them, has none.
    """
    from sklearn.metrics import roc_curve

    curves = []
    for number in _curve_classes(predictions):
        positive = predictions.labels == number
        if positive.all():
            continue
        false_positive, true_positive, thresholds = roc_curve(positive, predictions.probabilities[:, number])
        # The curve's first point needs a threshold above every score: infinite, which no plot reads.
        curves.append((number, false_positive, true_positive, np.minimum(thresholds, 1.0)))
    return _curve_table(predictions, ("false_positive_rate", "true_positive_rate"), curves)


def precision_recall_table(predictions: LabelledPredictions) -> pd.DataFrame:
    """Returns the precision-recall curves: class, recall, precision, threshold; at most 200 points each.

    Two classes have one curve, of the second class; more have one each, against the rest. A class that has no images
    has none. Recall rises from 0, where nothing is predicted and precision counts as 1.
    """
    from sklearn.metrics import precision_recall_curve

    curves = []
    for number in _curve_classes(predictions):
        precision, recall, thresholds = precision_recall_curve(
            predictions.labels == number, predictions.probabilities[:, number]
        )
        curves.append((number, recall[::-1], precision[::-1], np.append(thresholds, 1.0)[::-1]))
    return _curve_table(predictions, ("recall", "precision"), curves)


_Values = npt.NDArray[np.float64]


def _curve_classes(predictions: LabelledPredictions) -> list[int]:
    return [number for number in present_classes(predictions) if number == 1 or len(predictions.class_names) > 2]


def _curve_table(
    predictions: LabelledPredictions,
    axes: tuple[str, str],
    curves: list[tuple[int, _Values, _Values, _Values]],
) -> pd.DataFrame:
    columns = ["class", *axes, "threshold"]
    tables = [pd.DataFrame(columns=columns).astype(dict.fromkeys(columns[1:], np.float64))]
    for number, x, y, thresholds in curves:
        kept = thin_curve(x, y, CURVE_POINTS)
        values = (predictions.class_names[number], x[kept], y[kept], thresholds[kept])
        tables.append(pd.DataFrame(dict(zip(columns, values, strict=True))))
    return pd.concat(tables[1:] or tables, ignore_index=True).round(6)


def thin_curve(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Chooses the points of a line that can be drawn with fewer points and look the same.

    The first and the last, then again and again the point that lies farthest from the line drawn so far, until there
    are enough or every point lies on it (Douglas and Peucker 1973).

    Args:
        x: [points].
        y: [points].
        count: of points to keep, at most; 2 or more.

    Returns:
        The positions of the kept points, rising.
    """

    kept = {0, len(x) - 1}
    stretches: list[tuple[float, int, int, int]] = []

    def add_stretch(start: int, end: int) -> None:
        """Remembers the point that lies farthest from the straight line from `start` to `end`, where there is one."""
        if end - start < 2:
            return
        across, up = x[end] - x[start], y[end] - y[start]
        between = slice(start + 1, end)
        areas = np.abs(across * (y[between] - y[start]) - up * (x[between] - x[start]))
        place = int(areas.argmax())
        distance = float(areas[place] / (np.hypot(across, up) or 1.0))
        heapq.heappush(stretches, (-distance, start + 1 + place, start, end))

    add_stretch(0, len(x) - 1)
    while stretches and len(kept) < count:
        distance, position, start, end = heapq.heappop(stretches)
        if -distance < 1e-9:
            break
        kept.add(position)
        add_stretch(start, position)
        add_stretch(position, end)
    return np.array(sorted(kept), np.int64)


def score_table(predictions: LabelledPredictions) -> pd.DataFrame:
    """Returns a histogram of the scores for each true class: class, bin_low, bin_high, images; 20 bins over 0..1.

    The score is the probability of the second of two classes; of more, the probability of the true class.
    """
    labels, probabilities = predictions.labels, predictions.probabilities
    columns = np.ones_like(labels) if len(predictions.class_names) == 2 else labels
    scores = probabilities[np.arange(len(labels)), columns].astype(np.float64)
    tables = []
    for number, name in enumerate(predictions.class_names):
        images, edges = np.histogram(scores[labels == number], bins=SCORE_BINS, range=(0.0, 1.0))
        tables.append(pd.DataFrame({"class": name, "bin_low": edges[:-1], "bin_high": edges[1:], "images": images}))
    return pd.concat(tables, ignore_index=True).round(6)
