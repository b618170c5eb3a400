"""Metrics against values worked out by hand."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from catdog.evaluation import (
    CURVE_POINTS,
    LabelledPredictions,
    choose_images,
    compute_metrics,
    precision_recall_table,
    prediction_table,
    roc_table,
    score_table,
    thin_curve,
)
from catdog.model import predict_classes

# Two classes, eight pictures. At 0.5: three of four cats and two of four dogs are right.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SECOND = np.array([0.1, 0.2, 0.3, 0.7, 0.6, 0.9, 0.4, 0.25], np.float32)
TWO = np.stack([1 - SECOND, SECOND], axis=1)

# Three classes, four pictures; the last is wrong.
LABELS_3 = np.array([0, 1, 2, 2])
THREE = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]], np.float32)


def predictions(labels, probabilities, threshold=0.5, class_names=None) -> LabelledPredictions:
    count = np.shape(probabilities)[1]
    names = class_names or {2: ("cat", "dog"), 3: ("x", "y", "z")}.get(count, tuple(f"class {n}" for n in range(count)))
    return LabelledPredictions(
        tuple(f"{number}.jpg" for number in range(len(labels))),
        np.asarray(labels, np.int64),
        np.asarray(probabilities, np.float32),
        names,
        threshold,
    )


def random_predictions(images: int, classes: int, *, seed: int, strength: float = 1.5) -> LabelledPredictions:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=images)
    logits = generator.normal(size=(images, classes)) + strength * np.eye(classes)[labels]
    exponents = np.exp(logits)
    return predictions(labels, exponents / exponents.sum(axis=1, keepdims=True))


def metrics_of(labels, probabilities, threshold=0.5) -> dict:
    return compute_metrics(predictions(labels, probabilities, threshold))


def test_predictions_know_what_is_right_and_how_sure():
    one = predictions(LABELS, TWO, 0.65)
    assert one.predicted.tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    assert one.correct.tolist() == [True, True, True, False, False, True, False, False]
    assert one.confidence.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.7, 0.4, 0.9, 0.6, 0.75])
    assert (one.predicted.dtype, one.correct.dtype, one.confidence.dtype) == (np.int64, np.bool_, np.float32)
    three = predictions(LABELS_3, THREE, 0.9)
    assert three.correct.tolist() == [True, True, True, False]
    assert three.confidence.tolist() == pytest.approx([0.7, 0.8, 0.6, 0.5])


def test_headline_metrics_of_two_classes():
    found = metrics_of(LABELS, TWO)
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
            "balanced_accuracy": (cat_recall + dog_recall) / 2,
            "roc_auc": 12 / 16,
            # From the top: dog, cat, dog, dog, cat, dog, cat, cat; and from the cats' side the same backwards.
            "pr_auc": ((1 + 2 / 3 + 3 / 4 + 4 / 6) / 4 + (1 + 2 / 2 + 3 / 4 + 4 / 7) / 4) / 2,
            "log_loss": -sum(map(math.log, right)) / 8,
            "brier": sum((1 - p) ** 2 for p in right) / 8,
            # Bins are shared by the two of 0.9, by those of 0.7 and by those of 0.6; of the latter one each is wrong.
            "ece": (2 * 0.1 + 0.2 + abs(1 - 2 * 0.7) + abs(1 - 2 * 0.6) + 0.75) / 8,
        },
        abs=1e-6,
    )


def test_threshold_moves_decisions_and_nothing_else():
    low, high = metrics_of(LABELS, TWO, 0.25), metrics_of(LABELS, TWO, 0.65)
    assert low["accuracy"] == 6 / 8  # two cats above it, no dog below
    assert low["recall"] == (2 / 4 + 4 / 4) / 2
    assert high["accuracy"] == 4 / 8
    assert high["recall"] == (3 / 4 + 1 / 4) / 2
    for name in ("roc_auc", "pr_auc", "log_loss", "brier", "ece"):
        assert low[name] == high[name]


def test_threshold_itself_counts_as_the_second_class():
    for threshold in (0.3, 0.5, 0.7):
        one = np.array([[1 - threshold, threshold]], np.float32)
        assert predict_classes(one, threshold).tolist() == [1]
        assert predict_classes(one, np.nextafter(threshold, 1) + 1e-6).tolist() == [0]


def test_metrics_are_the_same_from_either_class():
    swapped = metrics_of(1 - LABELS, TWO[:, ::-1])
    assert swapped == pytest.approx(metrics_of(LABELS, TWO), abs=1e-6)


def test_perfect_model():
    found = metrics_of(LABELS, np.eye(2, dtype=np.float32)[LABELS])
    errors = {"log_loss": 0, "brier": 0, "ece": 0}
    assert found == dict.fromkeys(found, 1) | errors


def test_certain_and_wrong_costs_a_finite_log_loss():
    found = metrics_of(LABELS, np.eye(2, dtype=np.float32)[1 - LABELS])
    assert found["accuracy"] == found["roc_auc"] == 0
    assert found["brier"] == found["ece"] == 1
    assert 10 < found["log_loss"] < 1000


def test_class_that_is_never_predicted_counts_as_zero():
    found = metrics_of(LABELS, np.tile(np.array([[0.9, 0.1]], np.float32), (8, 1)))
    assert found["precision"] == pytest.approx((4 / 8 + 0) / 2)
    assert found["recall"] == 0.5
    assert found["f1"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    assert found["roc_auc"] == 0.5


def test_three_classes_take_the_most_probable_whatever_the_threshold():
    for threshold in (0.01, 0.5, 0.99):
        assert predict_classes(THREE, threshold).tolist() == [0, 1, 2, 0]
    found = metrics_of(LABELS_3, THREE)
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
    assert metrics_of(labels, scores)["roc_auc"] == pytest.approx((2 / 3 + 3 / 4 + 1) / 3, abs=1e-6)


def test_values_are_plain_numbers_with_six_digits():
    for value in metrics_of(LABELS, TWO).values():
        assert type(value) is float
        assert value == round(value, 6)


def test_brier_score_of_more_than_two_classes_sums_over_the_classes():
    first, second, third, fourth = 0.3**2 + 0.2**2 + 0.1**2, 0.06, 0.2**2 * 2 + 0.4**2, 0.5**2 + 0.3**2 + 0.8**2
    assert metrics_of(LABELS_3, THREE)["brier"] == pytest.approx((first + second + third + fourth) / 4, abs=1e-6)


def test_every_metric_is_there_and_in_order():
    names = "accuracy balanced_accuracy precision recall f1 roc_auc pr_auc log_loss brier ece"
    assert " ".join(metrics_of(LABELS, TWO)) == " ".join(metrics_of(LABELS_3, THREE)) == names


def test_metrics_of_many_classes_are_those_of_scikit_learn():
    one = random_predictions(500, 37, seed=3)
    found = compute_metrics(one)
    scores = one.probabilities.astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    assert found["roc_auc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(one.labels, scores, multi_class="ovr"), abs=1e-6
    )
    assert found["pr_auc"] == pytest.approx(
        sklearn_metrics.average_precision_score(np.eye(37)[one.labels], scores), abs=1e-6
    )
    assert found["balanced_accuracy"] == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(one.labels, one.predicted), abs=1e-6
    )


@pytest.mark.filterwarnings("error")
def test_class_without_images_takes_no_part_in_means_over_the_classes():
    labels = np.array([0, 0, 2, 2])
    scores = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.1, 0.4]], np.float32)
    found = metrics_of(labels, scores)
    # One x is taken for y, of which there is none, and one z for x.
    assert found["accuracy"] == 2 / 4
    assert found["recall"] == found["balanced_accuracy"] == (1 / 2 + 1 / 2) / 2
    assert found["precision"] == (1 / 2 + 1) / 2
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-6)
    assert found["roc_auc"] == (2 / 4 + 4 / 4) / 2
    assert found["pr_auc"] == pytest.approx(((1 + 2 / 4) / 2 + 1) / 2)
    one = predictions(labels, scores)
    assert roc_table(one)["class"].unique().tolist() == ["x", "z"]
    assert precision_recall_table(one)["class"].unique().tolist() == ["x", "z"]
    assert score_table(one).groupby("class")["images"].sum().to_dict() == {"x": 2, "y": 0, "z": 2}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("only", [0, 1])
def test_images_of_one_class_alone_have_no_roc_curve(only):
    one = predictions(np.full(8, only), TWO)
    found = compute_metrics(one)
    assert "roc_auc" not in found
    assert found["pr_auc"] == 1
    assert found["recall"] == found["accuracy"] == (5 / 8, 3 / 8)[only]
    roc = roc_table(one)
    assert len(roc) == 0
    assert list(roc.columns) == ["class", "false_positive_rate", "true_positive_rate", "threshold"]
    assert set(precision_recall_table(one)["class"]) == [set(), {"dog"}][only]
    assert score_table(one)["images"].sum() == 8


def test_table_of_predictions():
    table = prediction_table(predictions(LABELS, TWO))
    assert table["path"].tolist() == [f"{n}.jpg" for n in range(8)]
    assert list(table.columns) == ["path", "label", "predicted", "correct", "confidence", "p_cat", "p_dog"]
    assert table["label"].tolist() == ["cat"] * 4 + ["dog"] * 4
    assert table["predicted"].tolist() == ["cat", "cat", "cat", "dog", "dog", "dog", "cat", "cat"]
    assert table["correct"].tolist() == [True, True, True, False, True, True, False, False]
    assert table["confidence"].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.7, 0.6, 0.9, 0.6, 0.75])
    assert table["p_dog"].tolist() == pytest.approx(SECOND.tolist())


def test_confidence_is_of_the_predicted_class_also_below_one_half():
    table = prediction_table(predictions([0, 0], [[0.7, 0.3], [0.9, 0.1]], 0.2))
    assert table["predicted"].tolist() == ["dog", "cat"]
    assert table["confidence"].tolist() == pytest.approx([0.3, 0.9])


def test_probabilities_in_the_table_are_rounded_in_print():
    table = prediction_table(predictions([0], [[2 / 3, 1 / 3]]))
    assert table.to_csv(index=False).splitlines()[1] == "0.jpg,cat,cat,True,0.666667,0.666667,0.333333"


def test_table_of_three_classes():
    table = prediction_table(predictions(LABELS_3, THREE))
    assert table["predicted"].tolist() == ["x", "y", "z", "x"]
    assert table["confidence"].tolist() == pytest.approx([0.7, 0.8, 0.6, 0.5])
    assert list(table.columns[-3:]) == ["p_x", "p_y", "p_z"]


def rates(labels, scores, threshold):
    """False and true positive rate where scores from the threshold on are positive, counted one by one."""
    positive = [score >= threshold for score in scores]
    true = sum(p and label for p, label in zip(positive, labels, strict=True))
    false = sum(p and not label for p, label in zip(positive, labels, strict=True))
    return false / sum(not label for label in labels), true / sum(map(bool, labels))


def area(curve: pd.DataFrame) -> float:
    return float(np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"]))


def test_roc_of_two_classes_is_one_curve_of_the_second():
    roc = roc_table(predictions(LABELS, TWO))
    assert list(roc.columns) == ["class", "false_positive_rate", "true_positive_rate", "threshold"]
    assert set(roc["class"]) == {"dog"}
    assert roc.iloc[0, 1:3].tolist() == [0, 0]
    assert roc.iloc[-1, 1:3].tolist() == [1, 1]
    assert area(roc) == pytest.approx(12 / 16, abs=1e-5)
    for point in roc.iloc[1:].itertuples():
        expected = rates(LABELS.tolist(), SECOND.tolist(), point.threshold - 1e-5)
        assert (point.false_positive_rate, point.true_positive_rate) == pytest.approx(expected, abs=1e-5)


def test_roc_of_three_classes_is_one_curve_each():
    roc = roc_table(predictions(LABELS_3, THREE))
    assert roc["class"].unique().tolist() == ["x", "y", "z"]
    mean = np.mean([area(curve) for _, curve in roc.groupby("class")])
    assert mean == pytest.approx(metrics_of(LABELS_3, THREE)["roc_auc"], abs=1e-5)


def test_roc_can_be_written_without_infinite_numbers():
    roc = roc_table(predictions(LABELS, TWO))
    assert np.isfinite(roc.drop(columns="class").to_numpy()).all()
    assert roc["threshold"].is_monotonic_decreasing


def test_precision_recall_of_two_classes_is_one_curve_of_the_second():
    curve = precision_recall_table(predictions(LABELS, TWO))
    assert list(curve.columns) == ["class", "recall", "precision", "threshold"]
    assert set(curve["class"]) == {"dog"}
    assert curve.iloc[0, 1:].tolist() == [0, 1, 1]
    assert curve["recall"].is_monotonic_increasing and curve["threshold"].is_monotonic_decreasing
    for point in curve.iloc[1:].itertuples():
        predicted = [float(score) >= point.threshold - 1e-5 for score in SECOND]
        right = sum(p and label for p, label in zip(predicted, LABELS, strict=True))
        assert (point.recall, point.precision) == pytest.approx((right / 4, right / sum(predicted)), abs=1e-5)


def test_precision_recall_of_three_classes_is_one_curve_each():
    curves = precision_recall_table(predictions(LABELS_3, THREE))
    assert curves["class"].unique().tolist() == ["x", "y", "z"]
    steps = [(np.diff(c["recall"], prepend=0) * c["precision"]).sum() for _, c in curves.groupby("class")]
    assert np.mean(steps) == pytest.approx(metrics_of(LABELS_3, THREE)["pr_auc"], abs=1e-5)


def distance_to_line(x, y, kept) -> float:
    """The farthest that any of the points lies from the line through the kept ones, by plain geometry."""
    points, corners = np.stack([x, y], axis=1), np.stack([x[kept], y[kept]], axis=1)
    starts, ways = corners[:-1], np.diff(corners, axis=0)
    lengths = np.maximum((ways**2).sum(axis=1), 1e-30)
    along = np.clip(((points[:, None] - starts) * ways).sum(axis=2) / lengths, 0, 1)
    nearest = starts + along[..., None] * ways
    return float(np.sqrt(((points[:, None] - nearest) ** 2).sum(axis=2)).min(axis=1).max())


def test_long_curves_have_fewer_points_on_the_same_line():
    one = random_predictions(2500, 2, seed=5, strength=0.5)
    positive, scores = one.labels == 1, one.probabilities[:, 1]
    roc, curve = roc_table(one), precision_recall_table(one)
    x, y, _ = sklearn_metrics.roc_curve(positive, scores)
    assert len(x) > 2 * CURVE_POINTS and len(roc) == CURVE_POINTS == 200
    # A pixel of a picture 500 pixels wide is 0.002.
    assert distance_to_line(x, y, thin_curve(x, y, 200)) < 0.002
    assert area(roc) == pytest.approx(compute_metrics(one)["roc_auc"], abs=5e-4)
    y, x, _ = sklearn_metrics.precision_recall_curve(positive, scores)
    assert len(x) > 2 * CURVE_POINTS and len(curve) == CURVE_POINTS
    assert distance_to_line(x, y, thin_curve(x, y, 200)) < 0.01
    for table in (roc, curve):
        assert (table.iloc[0, 1], table.iloc[-1, 1]) == (0, 1)


def test_points_on_a_straight_line_are_left_out():
    x = np.array([0, 0.25, 0.5, 0.75, 1.0])
    assert thin_curve(x, x * 2, 4).tolist() == [0, 4]
    assert thin_curve(x, np.array([0, 1.0, 0, 0, 0]), 10).tolist() == [0, 1, 2, 4]
    assert thin_curve(x, np.array([0, 1.0, 0, 3.0, 0]), 3).tolist() == [0, 3, 4]


def test_scores_are_counted_by_true_class():
    table = score_table(predictions([0, 0, 0, 1, 1], [[1 - p, p] for p in (0.0, 0.04, 0.06, 0.5, 1.0)]))
    assert list(table.columns) == ["class", "bin_low", "bin_high", "images"]
    assert table["class"].tolist() == ["cat"] * 20 + ["dog"] * 20
    assert table.loc[:19, "bin_low"].tolist() == pytest.approx([n / 20 for n in range(20)])
    assert table.loc[:19, "bin_high"].tolist() == pytest.approx([n / 20 for n in range(1, 21)])
    images = table["images"].tolist()
    assert images[:2] == [2, 1] and sum(images[:20]) == 3
    assert (images[30], images[39], sum(images[20:])) == (1, 1, 2)


def test_scores_of_more_classes_are_the_probability_of_the_true_one():
    table = score_table(predictions(LABELS_3, THREE))
    found = {
        name: [round(float(low), 2) for low in rows.loc[rows["images"] > 0, "bin_low"]]
        for name, rows in table.groupby("class")
    }
    # In float32 0.7, 0.6 and 0.2 are a little more or less than in decimals.
    assert [found["x"], found["y"], found["z"]] == [[pytest.approx(0.65, abs=0.051)], [0.8], [0.2, 0.6]]


@pytest.mark.parametrize("limit", [0, 1, 10, 37, 100, 299, 300, 1000])
def test_chosen_images_are_sorted_distinct_and_as_many_as_asked(limit):
    labels = np.random.default_rng(2).integers(0, 3, 300)
    chosen = choose_images(labels, limit, seed=20)
    assert chosen.dtype == np.int64
    assert len(chosen) == min(limit, 300)
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize("classes", [2, 37])
def test_chosen_images_have_the_shares_of_the_classes(classes):
    counts = np.arange(classes) * 4 + 10
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(classes), counts))
    for limit in (2, 20, 23):
        found = np.bincount(labels[choose_images(labels, limit, seed=3)], minlength=classes)
        assert (np.abs(found - limit * counts / len(labels)) <= 1).all()
    assert np.bincount(labels[choose_images(labels, len(labels) // 2, 1)]).min() > 0


def test_chosen_images_depend_on_the_seed_and_are_spread():
    labels = np.tile([0, 1], 500)
    one, other = (choose_images(labels, 100, seed) for seed in (1, 2))
    assert (one == choose_images(labels, 100, 1)).all()
    assert len(set(one) & set(other)) < 30
    assert 30 <= (one < 500).sum() <= 70
    assert np.bincount(labels[one]).tolist() == [50, 50]


def test_larger_limit_adds_images_and_drops_none():
    labels = np.random.default_rng(8).integers(0, 5, 200)
    chosen = [set(choose_images(labels, limit, 4)) for limit in range(0, 201, 20)]
    assert all(one < other for one, other in pairwise(chosen))


def test_odd_seats_go_to_a_drawn_class():
    labels = np.repeat([0, 1, 2, 3], 5)
    assert {int(labels[choose_images(labels, 1, seed)][0]) for seed in range(60)} == {0, 1, 2, 3}
