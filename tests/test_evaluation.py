"""Metrics against values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from catdog.evaluation import class_table, compute_metrics, predict_classes, prediction_table, roc_table

# Two classes, eight pictures. At 0.5: three of four cats and two of four dogs are right.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SECOND = np.array([0.1, 0.2, 0.3, 0.7, 0.6, 0.9, 0.4, 0.25], np.float32)
TWO = np.stack([1 - SECOND, SECOND], axis=1)

# Three classes, four pictures; the last is wrong.
LABELS_3 = np.array([0, 1, 2, 2])
THREE = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]], np.float32)


def test_headline_metrics_of_two_classes():
    found = compute_metrics(LABELS, TWO, 0.5)
    cat_precision, cat_recall, dog_precision, dog_recall = 3 / 5, 3 / 4, 2 / 3, 2 / 4
    cat_f1, dog_f1 = 2 / 3, 4 / 7
    # Of the 16 pairs of a dog and a cat the dog scores higher in 4 (0.9) + 3 (0.6) + 3 (0.4) + 2 (0.25).
    right = [0.9, 0.8, 0.7, 0.3, 0.6, 0.9, 0.4, 0.25]
    assert found == pytest.approx(
        {
            "accuracy": 5 / 8,
            "precision": (cat_precision + dog_precision) / 2,
            "recall": (cat_recall + dog_recall) / 2,
            "f1": (cat_f1 + dog_f1) / 2,
            "roc_auc": 12 / 16,
            "log_loss": -sum(map(math.log, right)) / 8,
        },
        abs=1e-6,
    )


def test_threshold_moves_decisions_and_nothing_else():
    low, high = compute_metrics(LABELS, TWO, 0.25), compute_metrics(LABELS, TWO, 0.65)
    assert low["accuracy"] == 6 / 8  # two cats above it, no dog below
    assert low["recall"] == (2 / 4 + 4 / 4) / 2
    assert high["accuracy"] == 4 / 8
    assert high["recall"] == (3 / 4 + 1 / 4) / 2
    for name in ("roc_auc", "log_loss"):
        assert low[name] == high[name]


def test_threshold_itself_counts_as_the_second_class():
    for threshold in (0.3, 0.5, 0.7):
        one = np.array([[1 - threshold, threshold]], np.float32)
        assert predict_classes(one, threshold).tolist() == [1]
        assert predict_classes(one, np.nextafter(threshold, 1) + 1e-6).tolist() == [0]


def test_metrics_are_the_same_from_either_class():
    swapped = compute_metrics(1 - LABELS, TWO[:, ::-1], 0.5)
    assert swapped == pytest.approx(compute_metrics(LABELS, TWO, 0.5), abs=1e-6)


def test_perfect_model():
    found = compute_metrics(LABELS, np.eye(2, dtype=np.float32)[LABELS], 0.5)
    assert found == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "roc_auc": 1, "log_loss": 0}


def test_certain_and_wrong_costs_a_finite_log_loss():
    found = compute_metrics(LABELS, np.eye(2, dtype=np.float32)[1 - LABELS], 0.5)
    assert found["accuracy"] == found["roc_auc"] == 0
    assert 10 < found["log_loss"] < 1000


def test_class_that_is_never_predicted_counts_as_zero():
    found = compute_metrics(LABELS, np.tile(np.array([[0.9, 0.1]], np.float32), (8, 1)), 0.5)
    assert found["precision"] == pytest.approx((4 / 8 + 0) / 2)
    assert found["recall"] == 0.5
    assert found["f1"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    assert found["roc_auc"] == 0.5


def test_three_classes_take_the_most_probable_whatever_the_threshold():
    for threshold in (0.01, 0.5, 0.99):
        assert predict_classes(THREE, threshold).tolist() == [0, 1, 2, 0]
    found = compute_metrics(LABELS_3, THREE, 0.5)
    assert found["accuracy"] == 3 / 4
    assert found["precision"] == pytest.approx((1 / 2 + 1 + 1) / 3, abs=1e-6)
    assert found["recall"] == pytest.approx((1 + 1 + 1 / 2) / 3, abs=1e-6)
    assert found["f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3, abs=1e-6)
    # Each class against the rest: no pair of the three is in the wrong order.
    assert found["roc_auc"] == 1
    assert found["log_loss"] == pytest.approx(-math.log(0.7 * 0.8 * 0.6 * 0.2) / 4, abs=1e-6)


def test_auc_of_three_classes_is_the_mean_of_each_against_the_rest():
    scores = np.array([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.1, 0.5, 0.4], [0.3, 0.1, 0.6]], np.float32)
    labels = np.array([0, 1, 1, 2])
    # Class 0: 0.5 against 0.6, 0.1, 0.3 is 2/3. Class 1: (0.2, 0.5) against (0.3, 0.1) is 3/4. Class 2: 1.
    assert compute_metrics(labels, scores, 0.5)["roc_auc"] == pytest.approx((2 / 3 + 3 / 4 + 1) / 3, abs=1e-6)


def test_values_are_plain_numbers_with_six_digits():
    for value in compute_metrics(LABELS, TWO, 0.5).values():
        assert type(value) is float
        assert value == round(value, 6)


def test_table_of_predictions():
    table = prediction_table([f"{n}.jpg" for n in range(8)], LABELS, TWO, ["cat", "dog"], 0.5)
    assert list(table.columns) == ["path", "label", "predicted", "correct", "confidence", "p_cat", "p_dog"]
    assert table["label"].tolist() == ["cat"] * 4 + ["dog"] * 4
    assert table["predicted"].tolist() == ["cat", "cat", "cat", "dog", "dog", "dog", "cat", "cat"]
    assert table["correct"].tolist() == [True, True, True, False, True, True, False, False]
    assert table["confidence"].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.7, 0.6, 0.9, 0.6, 0.75])
    assert table["p_dog"].tolist() == pytest.approx(SECOND.tolist())


def test_confidence_is_of_the_predicted_class_also_below_one_half():
    table = prediction_table(["a", "b"], np.array([0, 0]), np.array([[0.7, 0.3], [0.9, 0.1]]), ["cat", "dog"], 0.2)
    assert table["predicted"].tolist() == ["dog", "cat"]
    assert table["confidence"].tolist() == pytest.approx([0.3, 0.9])


def test_probabilities_in_the_table_are_rounded_in_print():
    table = prediction_table(["a"], np.array([0]), np.array([[2 / 3, 1 / 3]], np.float32), ["cat", "dog"], 0.5)
    assert table.to_csv(index=False).splitlines()[1] == "a,cat,cat,True,0.666667,0.666667,0.333333"


def test_table_of_three_classes():
    table = prediction_table(list("abcd"), LABELS_3, THREE, ["x", "y", "z"], 0.5)
    assert table["predicted"].tolist() == ["x", "y", "z", "x"]
    assert table["confidence"].tolist() == pytest.approx([0.7, 0.8, 0.6, 0.5])
    assert list(table.columns[-3:]) == ["p_x", "p_y", "p_z"]


def test_table_of_classes():
    table = class_table(LABELS, TWO, ["cat", "dog"], 0.5).set_index("class")
    assert table.loc["cat"].tolist() == pytest.approx([3 / 5, 3 / 4, 2 / 3, 4], abs=1e-6)
    assert table.loc["dog"].tolist() == pytest.approx([2 / 3, 2 / 4, 4 / 7, 4], abs=1e-6)
    assert table["images"].dtype.kind == "i"
    other = class_table(LABELS_3, THREE, ["x", "y", "z"], 0.5)
    assert other["precision"].tolist() == [0.5, 1, 1]
    assert other["images"].tolist() == [1, 1, 2]


def rates(labels, scores, threshold):
    """False and true positive rate where scores from the threshold on are positive, counted one by one."""
    positive = [score >= threshold for score in scores]
    true = sum(p and label for p, label in zip(positive, labels, strict=True))
    false = sum(p and not label for p, label in zip(positive, labels, strict=True))
    return false / sum(not label for label in labels), true / sum(map(bool, labels))


def area(curve: pd.DataFrame) -> float:
    return float(np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"]))


def test_roc_of_two_classes_is_one_curve_of_the_second():
    roc = roc_table(LABELS, TWO, ["cat", "dog"])
    assert list(roc.columns) == ["class", "false_positive_rate", "true_positive_rate", "threshold"]
    assert set(roc["class"]) == {"dog"}
    assert roc.iloc[0, 1:3].tolist() == [0, 0]
    assert roc.iloc[-1, 1:3].tolist() == [1, 1]
    assert area(roc) == pytest.approx(12 / 16, abs=1e-5)
    for point in roc.iloc[1:].itertuples():
        expected = rates(LABELS.tolist(), SECOND.tolist(), point.threshold - 1e-5)
        assert (point.false_positive_rate, point.true_positive_rate) == pytest.approx(expected, abs=1e-5)


def test_roc_of_three_classes_is_one_curve_each():
    roc = roc_table(LABELS_3, THREE, ["x", "y", "z"])
    assert roc["class"].unique().tolist() == ["x", "y", "z"]
    mean = np.mean([area(curve) for _, curve in roc.groupby("class")])
    assert mean == pytest.approx(compute_metrics(LABELS_3, THREE, 0.5)["roc_auc"], abs=1e-5)


def test_roc_can_be_written_without_infinite_numbers():
    roc = roc_table(LABELS, TWO, ["cat", "dog"])
    assert np.isfinite(roc.drop(columns="class").to_numpy()).all()
    assert roc["threshold"].is_monotonic_decreasing
