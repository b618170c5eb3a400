"""Fitting the head: it learns, stops early with the best weights, repeats by seed, and tells divergence."""

import keras
import numpy as np
import pandas as pd
import pytest

from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.features import FeatureSet
from catdog.model import build_head
from catdog.runtime import prepare_keras
from catdog.training import best_epoch, fit_head

WIDTH = 8


def features(values: np.ndarray, labels: np.ndarray, shards: int = 3) -> FeatureSet:
    parts = np.array_split(values.astype(np.float32), shards)
    return FeatureSet(tuple(parts), np.cumsum([0, *map(len, parts)]), labels.astype(np.int64))


def blobs(count: int, classes: int = 2, *, spread: float = 0.5, seed: int = 0) -> FeatureSet:
    """Classes around different corners: separable when the spread is small, hopeless when it is large."""
    rng = np.random.default_rng([seed, count])
    labels = rng.integers(0, classes, count)
    return features(3 * np.eye(WIDTH)[labels] + spread * rng.normal(size=(count, WIDTH)), labels)


def params(**changes) -> TrainParams:
    return TrainParams(**{"dropout": 0.0, "learning_rate": 0.05, "batch_size": 16, "epochs": 6, **changes})


def trained(train, val, settings, *, seed=1, classes=2):
    """A head after fitting, in the order the train stage does it."""
    prepare_keras(seed)
    head = build_head(WIDTH, classes, settings, seed)
    return head, fit_head(head, train, val, settings, seed=seed)


def logits(head, data: FeatureSet) -> np.ndarray:
    return np.asarray(head(data.take(np.arange(len(data.labels))), training=False), np.float64)


def cross_entropy(head, data: FeatureSet) -> float:
    """Mean of -log p(label), by numpy."""
    scores = logits(head, data)
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    scores -= scores.max(axis=1, keepdims=True)
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return float(-logs[np.arange(len(data.labels)), data.labels].mean())


def accuracy(head, data: FeatureSet) -> float:
    scores = logits(head, data)
    predicted = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(axis=1)
    return float((predicted == data.labels).mean())


@pytest.mark.parametrize(("classes", "output"), [(2, "sigmoid"), (2, "softmax"), (3, "auto")])
def test_learns_a_separable_problem(classes, output):
    train, val = blobs(120, classes), blobs(60, classes)
    head, history = trained(train, val, params(output=output, epochs=8), classes=classes)
    assert accuracy(head, blobs(200, classes, seed=9)) > 0.97
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] / 3
    assert history["val_accuracy"].max() > 0.97


def test_hidden_layers_learn_what_no_line_separates():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (200, WIDTH))
    data = features(values, values[:, 0] * values[:, 1] > 0)
    settings = params(hidden_units=(64,), learning_rate=0.05, batch_size=64, epochs=25, patience=25)
    assert accuracy(trained(data, data, settings)[0], data) > 0.9


def test_history_has_one_row_an_epoch():
    _, history = trained(blobs(50), blobs(30), params(epochs=3))
    assert list(history.columns) == ["epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy"]
    assert history["epoch"].tolist() == [1, 2, 3]
    assert np.isfinite(history.to_numpy()).all()


@pytest.mark.parametrize(("classes", "output"), [(2, "sigmoid"), (2, "softmax"), (3, "softmax")])
def test_reported_values_are_those_of_the_head(classes, output):
    train, val = blobs(80, classes, spread=2), blobs(50, classes, spread=2)
    head, history = trained(train, val, params(output=output, epochs=1), classes=classes)
    assert history["val_loss"].item() == pytest.approx(cross_entropy(head, val), rel=1e-4)
    assert history["val_accuracy"].item() == pytest.approx(accuracy(head, val), abs=1e-6)


@pytest.mark.parametrize("patience", [2, 100])
def test_best_weights_are_kept(patience):
    """On noise the validation loss soon rises, whether early stopping ends the training or the epochs do."""
    train, val = blobs(24, spread=8, seed=1), blobs(40, spread=8, seed=2)
    settings = params(hidden_units=(32,), learning_rate=0.02, epochs=14, patience=patience)
    head, history = trained(train, val, settings)
    best = best_epoch(history)
    assert best["val_loss"] == history["val_loss"].min() < history["val_loss"].iloc[-1]
    assert cross_entropy(head, val) == pytest.approx(history["val_loss"].min(), rel=1e-4)
    assert len(history) == (int(best["epoch"]) + 2 if patience == 2 else 14)


def test_best_epoch_is_the_first_of_the_lowest_loss():
    history = pd.DataFrame({"epoch": [1, 2, 3, 4], "val_loss": [0.5, 0.3, 0.4, 0.3]})
    assert best_epoch(history)["epoch"] == 2


def weights(head) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in head.get_weights()])


@pytest.mark.parametrize("settings", [params(epochs=3), params(epochs=3, hidden_units=(6, 4), dropout=0.4)])
def test_same_seed_gives_the_same_weights_and_another_seed_others(settings):
    train, val = blobs(70, spread=2), blobs(30, spread=2)
    one, again, other = (trained(train, val, settings, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(weights(one[0]), weights(again[0]))
    assert one[1].equals(again[1])
    assert not np.allclose(weights(one[0]), weights(other[0]))


def test_seed_of_the_fit_alone_decides_the_order_of_the_images():
    train, val = blobs(70, spread=2), blobs(30, spread=2)

    def fitted(seed: int, draws_before: int) -> np.ndarray:
        prepare_keras(1)
        head = build_head(WIDTH, 2, params(epochs=2), 1)
        keras.utils.set_random_seed(draws_before)  # as if the process had drawn other numbers before
        fit_head(head, train, val, params(epochs=2), seed=seed)
        return weights(head)

    assert np.array_equal(fitted(1, 5), fitted(1, 6))
    assert not np.array_equal(fitted(1, 5), fitted(2, 5))


def test_seed_of_the_head_alone_decides_its_initial_weights():
    settings = params(hidden_units=(5,))

    def initial(seed: int, draws_before: int) -> np.ndarray:
        keras.utils.set_random_seed(draws_before)
        return weights(build_head(WIDTH, 2, settings, seed))

    assert np.array_equal(initial(1, 5), initial(1, 6))
    assert not np.array_equal(initial(1, 5), initial(2, 5))


def test_every_image_is_seen_once_an_epoch():
    """With plain gradient descent and one batch an epoch, one epoch is one step along the mean gradient."""
    train = blobs(37, spread=2)
    settings = params(optimizer="sgd", learning_rate=0.5, batch_size=37, epochs=1)
    prepare_keras(1)
    head = build_head(WIDTH, 2, settings, 1)
    kernel, bias = (np.asarray(value, np.float64) for value in head.get_weights())
    fit_head(head, train, train, settings, seed=1)
    values = train.take(np.arange(37)).astype(np.float64)
    error = 1 / (1 + np.exp(-(values @ kernel + bias))) - train.labels[:, None]
    assert head.get_weights()[0] == pytest.approx(kernel - 0.5 * values.T @ error / 37, abs=1e-5)
    assert head.get_weights()[1] == pytest.approx(bias - 0.5 * error.mean(axis=0), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
def test_one_step_of_every_optimizer_is_of_the_size_of_the_learning_rate(optimizer):
    train = blobs(40, spread=2)
    settings = params(optimizer=optimizer, learning_rate=0.001, batch_size=40, epochs=1)
    prepare_keras(1)
    head = build_head(WIDTH, 2, settings, 1)
    before = weights(head)
    fit_head(head, train, train, settings, seed=1)
    assert 0.0002 < np.abs(weights(head) - before).max() < 0.005


@pytest.mark.parametrize(("bad", "place"), [(np.nan, 0), (np.inf, 1)])
def test_features_that_are_no_numbers_are_told(bad, place):
    pair = [blobs(40), blobs(20)]
    values = pair[place].take(np.arange(20))
    values[3, 2] = bad
    pair[place] = features(values, pair[place].labels[:20])
    with pytest.raises(CatdogError, match=r"train\.learning_rate"):
        trained(*pair, params(epochs=2))


def test_divergence_is_told_with_the_learning_rate():
    rng = np.random.default_rng(0)
    data = features(1e18 * rng.normal(size=(64, WIDTH)), rng.integers(0, 2, 64))
    settings = params(optimizer="sgd", learning_rate=10.0, l2=1.0, hidden_units=(8, 8))
    with pytest.raises(CatdogError, match=r"lower train\.learning_rate \(now 10\.0\)"):
        trained(data, data, settings)


def test_penalty_keeps_the_kernel_small():
    data = blobs(80)
    free = trained(data, data, params(epochs=5))[0].get_weights()[0]
    held = trained(data, data, params(epochs=5, l2=3.0))[0].get_weights()[0]
    assert np.linalg.norm(held) < np.linalg.norm(free) / 2


def test_penalty_is_part_of_the_loss():
    data = blobs(40, spread=2)
    head, history = trained(data, data, params(epochs=1, l2=0.3))
    kernel = head.get_weights()[0]
    assert history["val_loss"].item() == pytest.approx(cross_entropy(head, data) + 0.3 * (kernel**2).sum(), rel=1e-4)


def test_dropout_acts_in_training_only():
    data = blobs(60, spread=2)
    head, history = trained(data, data, params(epochs=1, dropout=0.9, learning_rate=1e-9))
    assert np.array_equal(logits(head, data), logits(head, data))
    # The weights stand still, so only dropout makes the two losses differ.
    assert history["train_loss"].item() > history["val_loss"].item() * 1.05
