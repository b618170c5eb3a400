"""Temperature, threshold and reliability, against values worked out by hand and against what they are for."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, softmax

from catdog.calibration import (
    Calibration,
    bin_numbers,
    calibrate,
    check_threshold_rule,
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    reliability_table,
    undo_temperature,
)
from catdog.config import THRESHOLD_RULES, CalibrateParams
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions, compute_metrics
from catdog.model import predict_classes


def drawn(images: int, classes: int, *, seed: int, strength: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the very probability of each class, and labels drawn from it."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(images, classes)) * strength
    labels = [int(generator.choice(classes, p=row)) for row in softmax(logits, axis=1)]
    return logits.astype(np.float32), np.array(labels)


def log_loss(logits, labels, temperature=1.0) -> float:
    return -float(log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].sum())


# Temperature


@pytest.mark.parametrize("classes", [2, 37])
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_temperature_undoes_a_known_factor(classes, factor):
    logits, labels = drawn(4000, classes, seed=1)
    assert fit_temperature(logits * np.float32(factor), labels) == pytest.approx(factor, rel=0.06)


def test_temperature_has_the_smallest_penalized_log_loss():
    logits, labels = drawn(60, 3, seed=2)
    logits *= 3
    grid = np.exp(np.linspace(-3, 3, 6001))
    costs = [log_loss(logits, labels, one) + math.log(one) ** 2 / 2 for one in grid]
    assert fit_temperature(logits, labels) == pytest.approx(float(grid[int(np.argmin(costs))]), rel=1e-3)


def test_one_logit_is_that_of_the_second_class_against_zero():
    logits, labels = drawn(200, 2, seed=3)
    difference = logits[:, 1:] - logits[:, :1]
    assert fit_temperature(difference, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-5)
    assert fit_temperature(difference, labels) != pytest.approx(fit_temperature(difference, 1 - labels), rel=0.5)


def test_what_is_added_to_all_logits_of_an_image_changes_nothing():
    logits, labels = drawn(200, 5, seed=4)
    moved = logits + np.arange(200, dtype=np.float32)[:, None]
    assert fit_temperature(moved, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-4)


@pytest.mark.parametrize("images", [90, 5000])
@pytest.mark.parametrize("margin", [0.01, 1.0, 5.0, 20.0, 1e4])
def test_images_that_are_all_right_do_not_ask_for_certainty(images, margin):
    labels = np.arange(images) % 2
    temperature = fit_temperature(np.where(labels == 1, margin, -margin).astype(np.float32)[:, None], labels)
    assert 0 < temperature <= 1
    errors_before, errors_claimed = (images * expit(-margin / one) for one in (1, temperature))
    # Fewer mistakes than the one that would have shown, but not none; and what was as good as certain stays as it was.
    assert min(0.05, 0.9 * errors_before) <= errors_claimed < 1.5
    if margin >= 20:
        assert temperature > 0.999


def test_few_images_leave_the_temperature_near_one():
    logits = np.array([[4.0], [-4.0], [3.0]], np.float32)
    assert fit_temperature(logits, np.array([1, 0, 1])) == pytest.approx(1, abs=0.25)
    many = fit_temperature(np.tile(logits, (1000, 1)), np.array([1, 0, 1] * 1000))
    assert many < 0.6


def test_logits_that_say_nothing_keep_their_temperature():
    assert fit_temperature(np.zeros((10, 3), np.float32), np.arange(10) % 3) == 1
    assert fit_temperature(np.full((10, 1), 0.0, np.float32), np.arange(10) % 2) == 1


def test_wrong_logits_become_unsure():
    logits, labels = drawn(300, 2, seed=5, strength=5)
    temperature = fit_temperature(logits, 1 - labels)
    assert 5 < temperature < math.inf
    assert softmax(logits / temperature, axis=1).max(axis=1).mean() < 0.7


def test_calibration_helps_new_images_and_moves_no_decision():
    logits, labels = drawn(6000, 4, seed=6)
    logits *= 3
    temperature = fit_temperature(logits[:500], labels[:500])
    new, truth = logits[500:], labels[500:]
    assert log_loss(new, truth, temperature) < 0.7 * log_loss(new, truth)
    before, after = softmax(new, axis=1), softmax(new / temperature, axis=1)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    errors = [expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == truth) for p in (before, after)]
    assert errors[0] > 0.1 and errors[1] < 0.03


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 6])
def test_temperature_can_be_undone(temperature, classes):
    logits, _ = drawn(50, classes, seed=7)
    calm = softmax(logits / np.float32(temperature), axis=1)
    undone = undo_temperature(calm, temperature)
    assert undone.dtype == np.float32
    assert undone == pytest.approx(softmax(logits, axis=1), abs=2e-6)


def test_certainty_stays_certain_when_undone():
    sure = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    for temperature in (0.1, 1.0, 300.0):
        assert undo_temperature(sure, temperature).tolist() == sure.tolist()
    even = np.full((1, 37), 1 / 37, np.float32)
    assert undo_temperature(even, 1000.0) == pytest.approx(even)


# Threshold

#                   of each image: probability of a dog, and whether it is one
SCORES = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9], np.float32)
DOGS = np.array([0, 0, 1, 0, 1, 0, 1, 1])


def two(scores) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    return np.stack([1 - scores, scores], axis=1)


@pytest.mark.parametrize(
    ("rule", "target", "middle"),
    [
        ("f1", 0.9, 0.25),  # 4 of 6 called dogs are: 8/10; from 0.6 on 3 of 4: 6/8
        ("precision", 0.6, 0.25),  # 4 of 6
        ("precision", 0.7, 0.5),  # 3 of 4; from 0.4 on only 3 of 5
        ("precision", 0.75, 0.5),
        ("precision", 0.76, 0.75),  # 2 of 2; from 0.7 on 2 of 3
        ("precision", 1.0, 0.75),
        ("recall", 1.0, 0.25),
        ("recall", 0.76, 0.25),
        ("recall", 0.75, 0.5),
        ("recall", 0.5, 0.75),
        ("recall", 0.01, 0.85),
    ],
)
def test_threshold_by_rule(rule, target, middle):
    assert choose_threshold(DOGS, two(SCORES), rule, target) == pytest.approx(middle, abs=1e-6)


def test_of_equally_good_stretches_the_widest_is_chosen():
    # Youden's index is 1/2 above 0.2 up to 0.3, above 0.4 up to 0.6, and above 0.7 up to 0.8.
    assert choose_threshold(DOGS, two(SCORES), "youden", 0.9) == pytest.approx(0.5, abs=1e-6)
    wider = SCORES.copy()
    wider[:2] = 0.01, 0.02
    assert choose_threshold(DOGS, two(wider), "youden", 0.9) == pytest.approx((0.02 + 0.3) / 2, abs=1e-6)


def test_equally_good_neighbours_make_one_stretch():
    # Youden's index is the same above 0.2 and above 0.4, where a cat and a dog of one probability were left behind.
    labels, scores = np.array([0, 0, 0, 1, 1, 1]), [0.1, 0.2, 0.4, 0.4, 0.8, 0.9]
    assert choose_threshold(labels, two(scores), "youden", 0.9) == pytest.approx((0.2 + 0.8) / 2)
    assert choose_threshold(labels, two(scores), "recall", 0.9) == pytest.approx((0.2 + 0.4) / 2)


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_perfectly_separated_classes_are_divided_in_the_middle(rule):
    probabilities = two([0.1, 0.3, 0.9, 0.95])
    assert choose_threshold(np.array([0, 0, 1, 1]), probabilities, rule, 1.0) == pytest.approx(0.6)


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_certain_and_right_probabilities_have_a_threshold_inside(rule):
    threshold = choose_threshold(np.array([0, 0, 1]), two([0.0, 0.0, 1.0]), rule, 1.0)
    assert threshold == pytest.approx(0.5)


images_of_both = st.lists(
    st.tuples(
        st.booleans(), st.sampled_from([0.0, 1e-30, 0.2, 0.5, 0.7, 0.99, 1 - 2**-24, 1.0]) | st.floats(0, 1, width=32)
    ),
    min_size=2,
    max_size=30,
).filter(lambda images: len({dog for dog, _ in images}) == 2)


def judge(dogs, called_dogs) -> dict[str, float]:
    """The four rules' measures, counted one by one."""
    right = sum(dog and called for dog, called in zip(dogs, called_dogs, strict=True))
    cats_right = sum(not dog and not called for dog, called in zip(dogs, called_dogs, strict=True))
    recall = right / sum(dogs)
    return {
        "f1": 2 * right / (sum(dogs) + sum(called_dogs)),
        "youden": recall + cats_right / (len(dogs) - sum(dogs)) - 1,
        "precision": right / max(1, sum(called_dogs)),
        "recall": recall,
        "called": sum(called_dogs),
    }


@given(images_of_both, st.sampled_from(THRESHOLD_RULES), st.floats(0.05, 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_other_threshold_is_better(images, rule, target):
    dogs = [dog for dog, _ in images]
    scores = np.array([score for _, score in images], np.float32)
    smallest, largest = np.nextafter(np.float32([0, 1]), np.float32([1, 0]))
    # Between two of these no threshold predicts anything new.
    thresholds = [*(float(score) for score in scores if 0 < score < 1), float(smallest), float(largest)]
    judged = [judge(dogs, [bool(score >= one) for score in scores]) for one in thresholds]
    reaching = [one for one in judged if one[rule] >= target]
    labels = np.array(dogs, np.int64)
    if rule in ("precision", "recall") and not reaching:
        with pytest.raises(CatdogError, match="cannot be reached"):
            choose_threshold(labels, two(scores), rule, target)
        return
    threshold = choose_threshold(labels, two(scores), rule, target)
    assert 0 < threshold < 1 and threshold == np.float32(threshold)
    found = judge(dogs, predict_classes(two(scores), threshold).astype(bool).tolist())
    if rule in ("f1", "youden"):
        assert found[rule] == pytest.approx(max(one[rule] for one in judged), abs=1e-12)
    elif rule == "precision":
        assert found["precision"] >= target
        assert found["recall"] == max(one["recall"] for one in reaching)
    else:
        assert found["recall"] >= target
        assert found["called"] == min(one["called"] for one in reaching)


def test_precision_out_of_reach_names_the_best():
    labels, probabilities = np.array([0, 1, 0]), two([0.1, 0.5, 0.9])
    with pytest.raises(CatdogError) as caught:
        choose_threshold(labels, probabilities, "precision", 0.95)
    told = str(caught.value)
    assert "calibrate.target = 0.95 cannot be reached: the best precision" in told and "is 0.5;" in told
    two_of_three = np.array([1, 1, 0])
    with pytest.raises(CatdogError, match=r"is 0\.6666;"):
        choose_threshold(two_of_three, two([0.9, 0.9, 0.9]), "precision", 0.95)
    assert choose_threshold(two_of_three, two([0.9, 0.9, 0.9]), "precision", 0.6666) == pytest.approx(0.45)


def test_dog_of_probability_zero_is_out_of_reach_of_any_threshold():
    with pytest.raises(CatdogError, match=r"calibrate.target = 1 .* best recall .* is 0\.5;"):
        choose_threshold(np.array([1, 1, 0]), two([0.0, 0.5, 0.0]), "recall", 1.0)


@pytest.mark.parametrize(("labels", "missing"), [([0, 0], "second"), ([1, 1], "first")])
@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_rule_needs_images_of_both_classes(labels, missing, rule):
    with pytest.raises(CatdogError, match=f"calibrate.threshold = '{rule}' .* none of the {missing};"):
        choose_threshold(np.array(labels), two([0.2, 0.6]), rule, 0.9)


def test_rule_is_for_two_classes():
    check_threshold_rule("f1", 2)
    check_threshold_rule(0.5, 37)
    with pytest.raises(CatdogError, match=r"calibrate\.threshold = 'f1' divides two classes, but the data has 37;"):
        check_threshold_rule("f1", 37)


# Both


def params(**changed) -> CalibrateParams:
    return CalibrateParams(**({"temperature": True, "threshold": 0.5, "target": 0.95} | changed))


def test_calibrate_does_what_the_parameters_say():
    logits, labels = drawn(400, 2, seed=8)
    one = 2 * (logits[:, 1:] - logits[:, :1])
    temperature = fit_temperature(one, labels)
    assert temperature == pytest.approx(2, rel=0.2)
    assert calibrate(one, labels, params(threshold=0.3)) == Calibration(temperature, 0.3)
    assert calibrate(one, labels, params(temperature=False)) == Calibration(1.0, 0.5)
    found = calibrate(one, labels, params(threshold="recall", target=0.9))
    assert found.temperature == temperature
    assert found.threshold == choose_threshold(labels, two(expit(one[:, 0] / temperature)), "recall", 0.9)
    raw = calibrate(one, labels, params(threshold="recall", target=0.9, temperature=False))
    assert raw.threshold == choose_threshold(labels, two(expit(one[:, 0])), "recall", 0.9) != found.threshold


def test_calibrate_takes_two_logits_and_more():
    logits, labels = drawn(400, 2, seed=9)
    one = logits[:, 1:] - logits[:, :1]
    both, single = (calibrate(given, labels, params(threshold="f1")) for given in (logits, one))
    assert both.temperature == pytest.approx(single.temperature, rel=1e-5)
    assert both.threshold == pytest.approx(single.threshold, abs=1e-5)
    logits, labels = drawn(100, 5, seed=10)
    assert calibrate(logits, labels, params()) == Calibration(fit_temperature(logits, labels), 0.5)
    with pytest.raises(CatdogError, match="but the data has 5"):
        calibrate(logits, labels, params(threshold="youden"))


# Reliability


def test_calibration_error_by_hand():
    # Bins of 0.1: two images of 0.85 on average, one right; two of 0.65, both right; one of 1, right.
    confidence = np.array([0.82, 0.88, 0.62, 0.68, 1.0])
    correct = np.array([True, False, True, True, True])
    expected = (2 * abs(0.5 - 0.85) + 2 * abs(1 - 0.65) + 0) / 5
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(expected)
    # In one bin errors of both directions cancel out.
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0)


def test_bins_hold_their_upper_end():
    ends = np.array([0.25, 0.5, 0.75, 1.0])
    assert bin_numbers(ends, 4).tolist() == [0, 1, 2, 3]
    assert bin_numbers(ends - 0.2, 4).tolist() == [0, 1, 2, 3]
    assert bin_numbers(np.array([0.0, 1e-9]), 4).tolist() == [0, 0]
    assert bin_numbers(np.array([1.0], np.float32)).tolist() == [14]


def labelled(labels, probabilities, threshold=0.5) -> LabelledPredictions:
    count = probabilities.shape[1]
    names = tuple(f"class {number}" for number in range(count))
    return LabelledPredictions(tuple(map(str, range(len(labels)))), labels, probabilities, names, threshold)


def test_reliability_by_hand():
    table = reliability_table(labelled(np.array([0, 1, 1, 1]), two([0.3, 0.72, 0.1, 0.7])), 1.0)
    assert list(table.columns) == ["calibration", "bin_low", "bin_high", "images", "confidence", "accuracy"]
    after = table[table["calibration"] == "after"].drop(columns="calibration").to_numpy()
    rows = [[10 / 15, 11 / 15, 3, (0.7 + 0.72 + 0.7) / 3, 1], [13 / 15, 14 / 15, 1, 0.9, 0]]
    assert after == pytest.approx(np.array(rows), abs=1e-6)
    before = table[table["calibration"] == "before"].drop(columns="calibration").to_numpy()
    assert before == pytest.approx(after, abs=1e-6)
    assert table["calibration"].tolist() == ["before"] * 2 + ["after"] * 2


def error_of(table: pd.DataFrame) -> float:
    gaps = (table["accuracy"] - table["confidence"]).abs()
    return float((gaps * table["images"]).sum() / table["images"].sum())


@pytest.mark.parametrize("classes", [2, 5])
def test_reliability_before_is_that_of_the_undivided_logits(classes):
    logits, labels = drawn(3000, classes, seed=11)
    logits *= 2
    temperature = fit_temperature(logits, labels)
    raw, calm = softmax(logits, axis=1), softmax(logits / np.float32(temperature), axis=1)
    one = labelled(labels, calm)
    table = reliability_table(one, temperature)
    parts = dict(list(table.groupby("calibration")))
    assert error_of(parts["after"]) == pytest.approx(compute_metrics(one)["ece"], abs=1e-5)
    assert error_of(parts["before"]) == pytest.approx(compute_metrics(labelled(labels, raw))["ece"], abs=1e-4)
    assert error_of(parts["before"]) > 2 * error_of(parts["after"])
    assert (table["images"] > 0).all() and (parts["before"]["images"].sum(), parts["after"]["images"].sum()) == (
        3000,
    ) * 2
    assert ((table["confidence"] > table["bin_low"]) & (table["confidence"] <= table["bin_high"] + 1e-6)).all()


def test_threshold_plays_no_part_in_reliability():
    labels, probabilities = np.array([0, 1, 1, 1]), two([0.3, 0.72, 0.1, 0.7])
    tables = [reliability_table(labelled(labels, probabilities, threshold), 1.5) for threshold in (0.1, 0.9)]
    assert tables[0].equals(tables[1])
