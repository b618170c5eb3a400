"""What the test split says about a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn import metrics as sklearn_metrics


def predict_classes(probabilities: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.int64]:
    """Returns the predicted class numbers.

    Args:
        probabilities: [images, classes].
        threshold: for two classes, the probability from which the second is predicted; else unused.
    """
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return np.asarray(probabilities.argmax(axis=1), np.int64)


def prediction_table(
    paths: Sequence[str],
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    class_names: Sequence[str],
    threshold: float,
) -> pd.DataFrame:
    """Returns one row an image: path, label, predicted, correct, confidence, one probability a class.

    `confidence` is the probability of the predicted class. Probabilities are rounded to six digits.
    """
    predicted = predict_classes(probabilities, threshold)
    names = np.asarray(class_names)
    table = pd.DataFrame({"path": list(paths), "label": names[labels], "predicted": names[predicted]})
    table["correct"] = labels == predicted
    table["confidence"] = probabilities[np.arange(len(labels)), predicted]
    for number, name in enumerate(class_names):
        table[f"p_{name}"] = probabilities[:, number]
    return table.round(6)


def compute_metrics(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], threshold: float
) -> dict[str, float]:
    """Computes the headline metrics with scikit-learn.

    Precision, recall and F1 are means over the classes (macro), so neither class of a pair is "the"
    positive one. ROC AUC of more than two classes is the mean of one class against the rest.

    Args:
        labels: class numbers [images]; every class occurs.
        probabilities: [images, classes].
        threshold: as `predict_classes`.

    Returns:
        accuracy, precision, recall, f1, roc_auc (0..1) and log_loss (nats), rounded to six digits.
    """
    predicted = predict_classes(probabilities, threshold)
    classes = range(probabilities.shape[1])
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, average="macro", zero_division=0
    )
    scores = probabilities.astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    auc = (
        sklearn_metrics.roc_auc_score(labels, scores[:, 1])
        if scores.shape[1] == 2
        else sklearn_metrics.roc_auc_score(labels, scores, multi_class="ovr", labels=classes)
    )
    values = {
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "roc_auc": auc,
        "log_loss": sklearn_metrics.log_loss(labels, scores, labels=classes),
    }
    return {name: round(float(value), 6) for name, value in values.items()}


def class_table(
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    class_names: Sequence[str],
    threshold: float,
) -> pd.DataFrame:
    """Returns one row a class: class, precision, recall, f1, images."""
    precision, recall, f1, images = sklearn_metrics.precision_recall_fscore_support(
        labels, predict_classes(probabilities, threshold), labels=range(len(class_names)), zero_division=0
    )
    return pd.DataFrame(
        {"class": class_names, "precision": precision, "recall": recall, "f1": f1, "images": images}
    ).round(6)


def roc_table(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], class_names: Sequence[str]
) -> pd.DataFrame:
    """Returns the points of the ROC curves: class, false_positive_rate, true_positive_rate, threshold.

    Two classes have one curve, of the second class; more have one each, against the rest.
    """
    numbers = [1] if len(class_names) == 2 else range(len(class_names))
    curves = []
    for number in numbers:
        false_positive, true_positive, thresholds = sklearn_metrics.roc_curve(
            labels == number, probabilities[:, number]
        )
        curves.append(
            pd.DataFrame(
                {
                    "class": class_names[number],
                    "false_positive_rate": false_positive,
                    "true_positive_rate": true_positive,
                    # The curve's first point needs a threshold above every score: infinite, which no plot reads.
                    "threshold": np.minimum(thresholds, 1.0),
                }
            )
        )
    return pd.concat(curves, ignore_index=True).round(6)
