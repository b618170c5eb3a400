"""Every metric on every resample is scikit-learn's, and the intervals are as wide as they should be."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from catdog import bootstrap
from catdog.bootstrap import (
    class_intervals,
    intervals,
    mcnemar,
    paired_differences,
    weighted_class_metrics,
    weighted_metrics,
)
from catdog.calibration import top_class
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions, compute_metrics


def predictions(labels, probabilities, threshold=0.5) -> LabelledPredictions:
    probabilities = np.asarray(probabilities, np.float32)
    return LabelledPredictions(
        tuple(f"{number}.jpg" for number in range(len(labels))),
        np.asarray(labels, np.int64),
        probabilities,
        tuple(f"class {number}" for number in range(probabilities.shape[1])),
        threshold,
    )


def drawn(
    images: int, classes: int, *, seed: int, strength: float = 1.5, digits: int = 7, threshold: float = 0.5
) -> LabelledPredictions:
    """Few digits make ties; the labels of a seed are the same whatever the strength."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=images)
    logits = generator.normal(size=(images, classes)) + strength * np.eye(classes)[labels]
    exponents = np.exp(logits)
    probabilities = np.round(exponents / exponents.sum(axis=1, keepdims=True), digits) + 1e-6
    return predictions(labels, probabilities / probabilities.sum(axis=1, keepdims=True), threshold)


def repeated(one: LabelledPredictions, times: np.ndarray) -> LabelledPredictions:
    """The images as often as drawn: what a resample is by definition."""
    chosen = np.repeat(np.arange(len(one.labels)), times)
    return LabelledPredictions(
        tuple(one.paths[number] for number in chosen),
        one.labels[chosen],
        one.probabilities[chosen],
        one.class_names,
        one.threshold,
    )


def by_name(table) -> dict:
    return table.set_index(table.columns[0]).to_dict("index")


@pytest.mark.parametrize(("classes", "digits", "threshold"), [(2, 7, 0.5), (2, 1, 0.3), (3, 7, 0.5), (3, 1, 0.5)])
def test_metrics_of_a_resample_are_those_of_the_drawn_images(classes, digits, threshold):
    one = drawn(60, classes, seed=classes, digits=digits, threshold=threshold)
    times = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=40)
    found = weighted_metrics(one, times.T.astype(np.float64))
    assert list(found) == list(compute_metrics(one))
    for resample, counts in enumerate(times):
        expected = compute_metrics(repeated(one, counts))
        assert {name: values[resample] for name, values in found.items()} == pytest.approx(expected, abs=1e-6)


def test_classes_that_a_resample_misses_are_left_out_as_of_the_split():
    # Of 20 classes in 40 images a resample misses several; three have no image at all.
    one = drawn(40, 20, seed=4)
    one = predictions(np.minimum(one.labels, 16), one.probabilities)
    times = np.random.default_rng(2).multinomial(40, np.full(40, 1 / 40), size=30)
    found = weighted_metrics(one, times.T.astype(np.float64))
    for resample, counts in enumerate(times):
        sample = repeated(one, counts)
        assert len(set(sample.labels.tolist())) < 17
        expected = compute_metrics(sample)
        assert {name: values[resample] for name, values in found.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_weighted_metrics_are_those_of_scikit_learn(classes):
    one = drawn(200, classes, seed=7)
    weights = np.random.default_rng(3).random((200, 2)) * 3
    found, of_classes = weighted_metrics(one, weights), weighted_class_metrics(one, weights)
    labels, predicted, probabilities = one.labels, one.predicted, one.probabilities
    scores = probabilities.astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    one_hot = np.eye(classes)[labels]
    for column, weight in enumerate(weights.T):
        support = sklearn_metrics.precision_recall_fscore_support
        each = support(labels, predicted, sample_weight=weight, zero_division=0)
        for number, name in enumerate(("precision", "recall", "f1")):
            assert of_classes[name][:, column] == pytest.approx(each[number], abs=1e-12)
        macro = support(labels, predicted, sample_weight=weight, average="macro")
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(labels, predicted, sample_weight=weight),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predicted, sample_weight=weight),
            "precision": macro[0],
            "recall": macro[1],
            "f1": macro[2],
            "roc_auc": sklearn_metrics.roc_auc_score(
                one_hot if classes > 2 else labels,
                probabilities if classes > 2 else probabilities[:, 1],
                sample_weight=weight,
            ),
            "pr_auc": sklearn_metrics.average_precision_score(one_hot, probabilities, sample_weight=weight),
            "log_loss": sklearn_metrics.log_loss(labels, scores, sample_weight=weight),
            "brier": sklearn_metrics.brier_score_loss(labels, scores, sample_weight=weight),
        }
        got = {name: values[column] for name, values in found.items() if name != "ece"}
        assert got == pytest.approx(expected, abs=1e-10)


@pytest.mark.filterwarnings("error")
def test_intervals_of_the_headline_metrics():
    one = drawn(300, 3, seed=8)
    table = intervals(one, 400, 20)
    assert list(table.columns) == ["metric", "value", "low", "high"]
    assert dict(zip(table["metric"], table["value"], strict=True)) == compute_metrics(one)
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()
    assert table.equals(intervals(one, 400, 20))
    assert not table.equals(intervals(one, 400, 21))
    assert (table[["value", "low", "high"]] == table[["value", "low", "high"]].round(6)).all(axis=None)


def test_interval_of_the_accuracy_is_that_of_a_binomial_share():
    one = drawn(1000, 2, seed=9, strength=1)
    row = by_name(intervals(one, 2000, 1))["accuracy"]
    share = row["value"]
    error = math.sqrt(share * (1 - share) / 1000)
    assert (row["low"], row["high"]) == pytest.approx((share - 1.96 * error, share + 1.96 * error), abs=0.12 * error)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    truth = compute_metrics(drawn(60_000, 2, seed=10, strength=1))
    del truth["ece"]  # its truth here is 0, where no interval of a sum of absolute values begins
    missed = dict.fromkeys(truth, 0)
    for seed in range(100):
        rows = by_name(intervals(drawn(150, 2, seed=100 + seed, strength=1), 200, seed))
        for name, value in truth.items():
            missed[name] += not rows[name]["low"] <= value <= rows[name]["high"]
    assert all(1 <= count <= 13 for count in missed.values()), missed


def test_draws_do_not_depend_on_how_many_fit_into_memory(monkeypatch):
    one = drawn(80, 3, seed=11)
    groups = np.arange(80) // 3
    expected = intervals(one, 150, 5), class_intervals(one, 150, 5), intervals(one, 150, 5, groups)
    monkeypatch.setattr(bootstrap, "_CHUNK_VALUES", 80 * 7)
    found = intervals(one, 150, 5), class_intervals(one, 150, 5), intervals(one, 150, 5, groups)
    assert all(one.equals(other) for one, other in zip(expected, found, strict=True))


def test_images_that_belong_together_are_drawn_together():
    one = drawn(90, 2, seed=12)
    tripled = repeated(one, np.full(90, 3))
    groups = np.repeat(np.arange(90), 3)
    alone, together = intervals(one, 300, 6), intervals(tripled, 300, 6, groups)
    # Copies add nothing, so the intervals are those of the originals; taken as images of their own they would.
    assert np.allclose(alone[["low", "high"]], together[["low", "high"]], atol=2e-6)
    careless = intervals(tripled, 300, 6)
    widths = [by_name(table)["accuracy"] for table in (careless, together)]
    ratio = (widths[1]["high"] - widths[1]["low"]) / (widths[0]["high"] - widths[0]["low"])
    assert ratio == pytest.approx(math.sqrt(3), rel=0.15)
    # What the groups are called plays no part.
    assert intervals(tripled, 300, 6, groups * 1000 - 7).equals(together)


def test_calibration_error_reaches_down_below_its_value():
    # Well calibrated and few: by chance alone the value is far from 0, and resampling adds as much again.
    generator = np.random.default_rng(13)
    second = generator.random(200)
    one = predictions(generator.random(200) < second, np.stack([1 - second, second], axis=1))
    row = by_name(intervals(one, 500, 1))["ece"]
    resampled = weighted_metrics(one, generator.multinomial(200, np.full(200, 1 / 200), size=200).T * 1.0)["ece"]
    assert resampled.mean() > row["value"] + 0.005
    assert 0 <= row["low"] < row["value"] - 0.02
    assert row["value"] <= row["high"] < np.percentile(resampled, 97.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [1, 4])
def test_perfect_and_tiny_splits_have_intervals(images):
    labels = np.arange(images) % 2
    table = intervals(predictions(labels, np.eye(2)[labels]), 100, 1)
    for name, row in by_name(table).items():
        expected = 0 if name in ("log_loss", "brier", "ece") else 1
        assert (row["value"], row["low"], row["high"]) == (expected,) * 3
    assert ("roc_auc" in set(table["metric"])) == (images > 1)


@pytest.mark.filterwarnings("error")
def test_class_alone_has_intervals_without_roc():
    one = predictions(np.zeros(30), drawn(30, 2, seed=14).probabilities)
    assert list(intervals(one, 100, 1)["metric"]) == list(compute_metrics(one))
    differences = paired_differences(one, one, 100, 1)
    assert list(differences["metric"]) == list(compute_metrics(one))


@pytest.mark.filterwarnings("error")
def test_table_of_classes():
    second = np.array([0.1, 0.2, 0.3, 0.7, 0.6, 0.9, 0.4, 0.25])
    one = predictions([0, 0, 0, 0, 1, 1, 1, 1], np.stack([1 - second, second], axis=1))
    table = class_intervals(one, 200, 1)
    columns = "class images precision precision_low precision_high recall recall_low recall_high f1 f1_low f1_high"
    assert " ".join(table.columns) == columns
    rows = by_name(table)
    found = [[rows[name][key] for key in ("images", "precision", "recall", "f1")] for name in ("class 0", "class 1")]
    assert found[0] == pytest.approx([4, 3 / 5, 3 / 4, 2 / 3], abs=1e-6)
    assert found[1] == pytest.approx([4, 2 / 3, 2 / 4, 4 / 7], abs=1e-6)
    for name in ("precision", "recall", "f1"):
        assert (table[f"{name}_low"] < table[name]).all() and (table[name] < table[f"{name}_high"]).all()


def test_intervals_of_classes_are_percentiles_of_the_drawn_images(monkeypatch):
    one = drawn(120, 3, seed=15)
    times = np.random.default_rng(16).multinomial(120, np.full(120, 1 / 120), size=100)
    monkeypatch.setattr(bootstrap, "_draw", lambda *_: iter([times.T.astype(np.float64)]))
    table = class_intervals(one, 100, 1)
    samples = [repeated(one, counts) for counts in times]
    recalls = [sklearn_metrics.recall_score(sample.labels, sample.predicted, average=None) for sample in samples]
    low, high = np.percentile(recalls, [2.5, 97.5], axis=0)
    assert table["recall_low"].tolist() == pytest.approx(low.tolist(), abs=1e-6)
    assert table["recall_high"].tolist() == pytest.approx(high.tolist(), abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_class_without_images_has_empty_cells():
    labels = np.array([0, 0, 2, 2] * 5)
    one = predictions(labels, drawn(20, 3, seed=17).probabilities)
    table = class_intervals(one, 100, 1)
    assert table["images"].tolist() == [10, 0, 10]
    assert table.iloc[1, 2:].isna().all()
    assert not table.iloc[[0, 2]].isna().any(axis=None)
    assert table.to_csv(index=False).splitlines()[2] == "class 1,0,,,,,,,,,"


def better_and_worse(images=400, seed=18):
    """The second model is the first with some of its doubts removed, so both find the same images hard."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=images)
    logit = generator.normal(size=images) * 2 + (2 * labels - 1) * 1.5
    better = np.where(generator.random(images) < 0.15, logit + (2 * labels - 1) * 3, logit)
    first, second = (1 / (1 + np.exp(-one)) for one in (logit, better))
    return tuple(predictions(labels, np.stack([1 - p, p], axis=1)) for p in (first, second))


def test_better_model_is_found_better():
    worse, better = better_and_worse()
    table = paired_differences(worse, better, 500, 1)
    assert list(table.columns) == ["metric", "a", "b", "difference", "low", "high", "p"]
    rows = by_name(table)
    assert {name: row["a"] for name, row in rows.items()} == compute_metrics(worse)
    assert {name: row["b"] for name, row in rows.items()} == compute_metrics(better)
    for name in ("accuracy", "f1", "roc_auc", "pr_auc"):
        row = rows[name]
        assert row["difference"] == pytest.approx(row["b"] - row["a"], abs=1e-9)
        assert 0 < row["low"] < row["difference"] < row["high"]
        assert row["p"] == pytest.approx(2 / 501, abs=1e-6)
    assert rows["log_loss"]["high"] < 0 and rows["log_loss"]["p"] < 0.01


def test_exchanged_models_exchange_the_signs():
    worse, better = better_and_worse(seed=19)
    one, other = by_name(paired_differences(worse, better, 300, 2)), by_name(paired_differences(better, worse, 300, 2))
    for name, row in one.items():
        mirrored = other[name]
        assert mirrored["p"] == row["p"]
        assert [-mirrored["difference"], -mirrored["high"], -mirrored["low"]] == pytest.approx(
            [row["difference"], row["low"], row["high"]], abs=2e-6
        )


def test_model_differs_in_nothing_from_itself():
    one = drawn(100, 4, seed=20)
    for row in by_name(paired_differences(one, one, 200, 3)).values():
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_pairs_tell_more_than_two_intervals():
    worse, better = better_and_worse()
    paired = by_name(paired_differences(worse, better, 500, 4))["accuracy"]
    alone = [by_name(intervals(one, 500, 4))["accuracy"] for one in (worse, better)]
    apart = math.hypot(*(row["high"] - row["low"] for row in alone))
    assert paired["high"] - paired["low"] < 0.6 * apart


def test_p_value_is_even_where_nothing_differs():
    # Both models are as good as each other: 5 % of the comparisons may say otherwise.
    found = []
    for seed in range(60):
        a = drawn(200, 2, seed=seed)
        flipped = np.random.default_rng(seed + 1000).normal(size=(200, 2)) + 1.5 * np.eye(2)[a.labels]
        exponents = np.exp(flipped)
        b = predictions(a.labels, exponents / exponents.sum(axis=1, keepdims=True))
        found.append(by_name(paired_differences(a, b, 100, seed))["log_loss"]["p"])
    assert 1 <= sum(p < 0.05 for p in found) <= 9
    assert 18 <= sum(p < 0.5 for p in found) <= 42


def test_groups_are_drawn_together_in_comparisons_too():
    worse, better = better_and_worse(150)
    tripled = [repeated(one, np.full(150, 3)) for one in (worse, better)]
    groups = np.repeat(np.arange(150), 3)
    assert np.allclose(
        paired_differences(*tripled, 200, 5, groups).drop(columns="metric"),
        paired_differences(worse, better, 200, 5).drop(columns="metric"),
        atol=2e-6,
    )


def test_other_images_or_classes_cannot_be_compared():
    two, three = drawn(20, 2, seed=21), drawn(20, 3, seed=21)
    with pytest.raises(
        CatdogError, match=r"same classes, but one has class 0, class 1 and the other class 0, class 1, "
    ):
        paired_differences(two, three, 100, 1)
    for other in (drawn(19, 2, seed=21), predictions(1 - two.labels, two.probabilities)):
        with pytest.raises(CatdogError, match=f"but their 20 and {len(other.labels)} images or the labels of these"):
            paired_differences(two, other, 100, 1)
    renamed = LabelledPredictions(two.paths[::-1], two.labels, two.probabilities, two.class_names, 0.5)
    with pytest.raises(CatdogError, match="same test images"):
        paired_differences(two, renamed, 100, 1)


def test_mcnemar_by_hand():
    a = np.array([True] * 8 + [False] * 2 + [True] * 50 + [False] * 5)
    b = np.array([False] * 8 + [True] * 2 + [True] * 50 + [False] * 5)
    # Both tails of ten throws of a coin: 0, 1 or 2 of one side, or of the other.
    p = 2 * (1 + 10 + 45) / 2**10
    assert mcnemar(a, b) == (8, 2, pytest.approx(p))
    assert mcnemar(b, a) == (2, 8, pytest.approx(p))
    assert mcnemar(a, a) == (0, 0, 1.0)
    assert mcnemar(a[:4], b[:4]) == (4, 0, pytest.approx(2 / 2**4))


def test_calibration_error_of_a_resample_counts_the_most_probable_class():
    one = drawn(50, 2, seed=22, threshold=0.2)
    assert (one.predicted != one.probabilities.argmax(axis=1)).any()
    confidence, _ = top_class(one.labels, one.probabilities)
    assert (confidence >= 0.5).all()
    assert weighted_metrics(one, np.ones((50, 1)))["ece"][0] == pytest.approx(compute_metrics(one)["ece"], abs=1e-6)
