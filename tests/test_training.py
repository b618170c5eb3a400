"""Fitting the head: it learns, stops early with the best weights, repeats by seed, and tells divergence."""

import keras
import numpy as np
import pandas as pd
import pytest

from catdog.checkpoints import Checkpoints
from catdog.config import TrainParams
from catdog.errors import CatdogError
from catdog.features import FeatureSet
from catdog.model import build_head
from catdog.optimization import build_loss, build_optimizer, encode_targets, focal_loss, image_weights, mix
from catdog.runtime import prepare_keras
from catdog.training import best_epoch, fit_head, join_histories, kept_epoch

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


@pytest.fixture(scope="module")
def plain():
    """A head after the plainest training, and its history; tests only read it."""
    return trained(blobs(120), blobs(60), params())


@pytest.mark.parametrize(("classes", "output"), [(2, "sigmoid"), (2, "softmax"), (3, "auto")])
def test_learns_a_separable_problem_and_reports_it(classes, output):
    """The validation images are harder, so that the values to be reported are no round numbers."""
    train, val = blobs(120, classes), blobs(50, classes, spread=2)
    head, history = trained(train, val, params(output=output), classes=classes)
    assert accuracy(head, blobs(200, classes, seed=9)) > 0.97
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] / 3
    assert history["train_accuracy"].max() > 0.97
    best = best_epoch(history)
    assert best["val_loss"] == pytest.approx(cross_entropy(head, val), rel=1e-4)
    assert best["val_accuracy"] == pytest.approx(accuracy(head, val), abs=1e-6)
    assert 0.5 < best["val_accuracy"] < 1


def test_a_step_is_traced_once(monkeypatch):
    """Tracing takes most of the time of a small head's training."""
    traced = []
    step = keras.Model.train_step

    def counted(model, data):
        traced.append(model)
        return step(model, data)

    monkeypatch.setattr(keras.Model, "train_step", counted)
    trained(blobs(60), blobs(20), params(epochs=3, ema=0.5, hidden_units=(4,)))
    assert len(traced) == 1


def test_hidden_layers_learn_what_no_line_separates():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (200, WIDTH))
    data = features(values, values[:, 0] * values[:, 1] > 0)
    settings = params(hidden_units=(64,), epochs=8, patience=8)
    assert accuracy(trained(data, data, settings)[0], data) > 0.9


def test_history_has_one_row_an_epoch(plain):
    _, history = plain
    assert list(history.columns) == ["epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy"]
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(history.to_numpy()).all()
    assert history["val_accuracy"].max() > 0.97


@pytest.mark.parametrize("patience", [2, 100])
def test_best_weights_are_kept(patience):
    """On noise the validation loss soon rises, whether early stopping ends the training or the epochs do."""
    train, val = blobs(24, spread=8, seed=1), blobs(40, spread=8, seed=2)
    settings = params(hidden_units=(32,), learning_rate=0.02, epochs=10, patience=patience)
    head, history = trained(train, val, settings)
    best = best_epoch(history)
    assert best["val_loss"] == history["val_loss"].min() < history["val_loss"].iloc[-1]
    assert cross_entropy(head, val) == pytest.approx(history["val_loss"].min(), rel=1e-4)
    assert len(history) == (int(best["epoch"]) + 2 if patience == 2 else 10)


def test_best_epoch_is_the_first_of_the_lowest_loss():
    history = pd.DataFrame({"epoch": [1, 2, 3, 4], "val_loss": [0.5, 0.3, 0.4, 0.3]})
    assert best_epoch(history)["epoch"] == 2


def weights(head) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in head.get_weights()])


@pytest.mark.parametrize(("fine_tuned", "epoch", "loss"), [(False, 2, 0.05), (True, 3, 0.0503)])
def test_epoch_of_the_kept_weights_is_of_their_phase(fine_tuned, epoch, loss):
    """Fine-tuning computes in half precision, say: it improved what it began with, if not the head's recorded loss."""
    columns = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
    head, fine = (
        pd.DataFrame({"epoch": [1, 2]} | dict.fromkeys(columns, losses)) for losses in ([0.06, 0.05], [0.0503, 0.0504])
    )
    kept = kept_epoch(join_histories(head, fine), fine_tuned=fine_tuned)
    assert (kept["epoch"], kept["val_loss"]) == (epoch, loss)


def test_seed_of_the_fit_alone_decides_the_order_of_the_images():
    train, val = blobs(70, spread=2), blobs(30, spread=2)
    settings = params(epochs=3, hidden_units=(6, 4), dropout=0.4)

    def fitted(seed: int, draws_before: int) -> tuple[np.ndarray, pd.DataFrame]:
        prepare_keras(1)
        head = build_head(WIDTH, 2, settings, 1)
        keras.utils.set_random_seed(draws_before)  # as if the process had drawn other numbers before
        history = fit_head(head, train, val, settings, seed=seed)
        return weights(head), history

    one, again, other = fitted(1, 5), fitted(1, 6), fitted(2, 5)
    assert np.array_equal(one[0], again[0])
    assert one[1].equals(again[1])
    assert not np.allclose(one[0], other[0])


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


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd", "momentum"])
def test_one_step_of_every_optimizer_is_of_the_size_of_the_learning_rate(optimizer):
    settings = TrainParams(optimizer=optimizer)
    built = build_optimizer(settings, learning_rate=0.001, schedule="constant", warmup=0, epochs=1, steps_per_epoch=1)
    before = np.linspace(-0.5, 0.5, WIDTH, dtype=np.float32)
    variable, gradient = keras.Variable(before), np.linspace(1, -0.5, WIDTH, dtype=np.float32)
    built.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    moved = np.asarray(variable) - before
    assert 0.0002 < np.abs(moved).max() < 0.005
    assert np.dot(moved, -gradient) > 0


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


def test_penalty_keeps_the_kernel_small_and_is_part_of_the_loss(plain):
    val = blobs(60)
    head, history = trained(blobs(120), val, params(l2=3.0))
    free, held = plain[0].get_weights()[0], head.get_weights()[0]
    assert np.linalg.norm(held) < np.linalg.norm(free) / 2
    assert history["val_loss"].min() == pytest.approx(cross_entropy(head, val) + 3 * (held**2).sum(), rel=1e-4)
    assert 3 * (held**2).sum() > 0.01


def test_dropout_acts_in_training_only():
    data = blobs(60, spread=2)
    head, history = trained(data, data, params(epochs=1, dropout=0.9, learning_rate=1e-9))
    assert np.array_equal(logits(head, data), logits(head, data))
    # The weights stand still, so only dropout makes the two losses differ.
    assert history["train_loss"].item() > history["val_loss"].item() * 1.05


def rates(**changes) -> list[float]:
    """The learning rate of each step of 4 epochs of 5 steps."""
    settings = {"learning_rate": 2.0, "schedule": "constant", "warmup": 0, "epochs": 4, "steps_per_epoch": 5}
    optimizer = build_optimizer(TrainParams(), **{**settings, **changes})
    found = []
    for step in range(20):
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    return found


def test_schedules():
    assert rates() == [2.0] * 20
    assert rates(warmup=1) == pytest.approx([0.4, 0.72, 1.04, 1.36, 1.68, *[2.0] * 15])
    cosine = [1 + np.cos(np.pi * step / 20) for step in range(20)]
    assert rates(schedule="cosine") == pytest.approx(cosine, abs=1e-6)
    warm = rates(schedule="cosine", warmup=2)
    assert warm[:10] == sorted(warm[:10])
    assert 0 < warm[0] < 0.21
    assert warm[10:] == pytest.approx([1 + np.cos(np.pi * step / 10) for step in range(10)], abs=1e-6)


def test_schedule_is_followed():
    """Against plain gradient descent by numpy: images that are all the same give the same step in any batch."""
    data = features(np.tile(np.linspace(-1, 1, WIDTH), (10, 1)), np.ones(10))
    settings = params(optimizer="sgd", learning_rate=0.5, schedule="cosine", batch_size=4, epochs=2)
    head, _ = trained(data, data, settings)
    prepare_keras(1)
    weight = weights(build_head(WIDTH, 2, settings, 1)).astype(np.float64)
    for step in range(6):
        rate = 0.25 * (1 + np.cos(np.pi * step / 6))
        weight = weight - rate * errors(data, weight, data.labels).mean(axis=0)
    assert weights(head) == pytest.approx(weight, abs=1e-5)


def test_warmup_longer_than_the_training_is_told():
    with pytest.raises(CatdogError, match="warm-up of 7 epochs does not fit into 6"):
        trained(blobs(20), blobs(20), params().model_copy(update={"warmup": 7}))


def one_step(data, **changes):
    """Kernel and bias before and after one step of gradient descent on all images, the head and the history."""
    settings = params(optimizer="sgd", learning_rate=0.5, batch_size=len(data.labels), epochs=1, **changes)
    prepare_keras(1)
    head = build_head(WIDTH, 2, settings, 1)
    before = weights(head).astype(np.float64)
    history = fit_head(head, data, data, settings, seed=1)
    return before, weights(head), head, history


def errors(data, before, targets) -> np.ndarray:
    """Gradient of each image's cross-entropy, [images, weights], by numpy."""
    values = data.take(np.arange(len(data.labels))).astype(np.float64)
    ones = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    return (1 / (1 + np.exp(-(ones @ before))) - targets)[:, None] * ones


def test_balanced_classes_count_the_same():
    rng = np.random.default_rng(0)
    data = features(rng.normal(size=(40, WIDTH)), np.arange(40) < 4)
    before, after, *_ = one_step(data, class_weights="balanced")
    gradients = errors(data, before, data.labels)
    rare, common = gradients[:4].mean(axis=0), gradients[4:].mean(axis=0)
    assert after == pytest.approx(before - 0.5 * (rare + common) / 2, abs=1e-5)
    counts = image_weights(data.labels, params(class_weights="balanced"))
    assert counts.sum() == pytest.approx(40)
    assert counts.dtype == np.float32
    assert image_weights(np.array([0, 0, 2]), params(class_weights="balanced")).tolist() == [0.75, 0.75, 1.5]


def test_smoothing_moves_the_targets_but_not_the_validation_loss():
    data = blobs(40, spread=2)
    before, after, head, history = one_step(data, label_smoothing=0.2)
    gradient = errors(data, before, 0.1 + 0.8 * data.labels).mean(axis=0)
    assert after == pytest.approx(before - 0.5 * gradient, abs=1e-5)
    assert history["val_loss"].item() == pytest.approx(cross_entropy(head, data), rel=1e-4)
    correct = (errors(data, before, 0)[:, -1] > 0.5) == data.labels
    assert history["train_accuracy"].item() == pytest.approx(correct.mean())
    assert 0 < correct.mean() < 1


def test_gradient_is_clipped_to_its_norm():
    data = features(100 * np.ones((16, WIDTH)), np.arange(16) % 4 == 0)
    before, after, *_ = one_step(data, clip_norm=0.3)
    gradient = errors(data, before, data.labels).mean(axis=0)
    assert np.linalg.norm(gradient) > 1
    assert np.linalg.norm(after - before) == pytest.approx(0.5 * 0.3, rel=1e-4)
    assert np.dot(after - before, -gradient) > 0


@pytest.mark.parametrize("outputs", [1, 3])
def test_focal_loss(outputs):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(2, outputs), 50)
    scores = 4 * rng.normal(size=(50, outputs))
    full = np.concatenate([0 * scores, scores], axis=1) if outputs == 1 else scores
    p = (np.exp(full) / np.exp(full).sum(axis=1, keepdims=True))[np.arange(50), labels]
    loss = build_loss(params(loss="focal"), outputs)
    assert loss is focal_loss
    targets = encode_targets(labels, outputs)
    assert np.asarray(loss(targets, scores.astype(np.float32))) == pytest.approx(-((1 - p) ** 2) * np.log(p), rel=1e-3)
    extreme = np.full((1, outputs), -200.0, np.float32)
    extreme[0, 1:] = 200
    found = np.asarray(focal_loss(encode_targets(np.array([1 if outputs == 1 else 0]), outputs), extreme))
    assert found == pytest.approx([200 if outputs == 1 else 400 + np.log(2)])


@pytest.mark.parametrize(("classes", "output"), [(2, "sigmoid"), (3, "softmax")])
def test_focal_loss_learns(classes, output):
    head, history = trained(
        blobs(120, classes), blobs(60, classes), params(output=output, loss="focal"), classes=classes
    )
    assert accuracy(head, blobs(200, classes, seed=9)) > 0.95
    assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0] / 3
    # The optimizer and the loss would be saved with the model, and loading it would need this project's code.
    assert not head.compiled


def test_mixup_blends_inputs_and_targets_in_the_same_shares():
    values = np.eye(6, dtype=np.float32)
    targets, counts = values[:, :3].copy(), np.arange(6, dtype=np.float32)
    shares = []
    for seed in range(200):
        mixed, soft, weights = mix((values, targets, counts), mixup=0.4, cutmix=0, rng=np.random.default_rng(seed))
        assert mixed.dtype == soft.dtype == weights.dtype == np.float32
        assert np.allclose(mixed.sum(axis=1), 1)
        # With unit vectors as inputs, a mixed input holds the shares of the images it is made of.
        assert np.allclose(soft, mixed @ targets)
        assert np.allclose(weights, mixed @ counts)
        shares.append(mixed[0, 0])
    assert np.array_equal(values, np.eye(6))
    assert 0.5 < np.mean(shares) < 0.7  # one half of the others' shares, and itself as a partner in one of six
    assert np.std(shares) > 0.3  # Beta(0.4, 0.4) has most of its mass at the ends


def test_cutmix_puts_in_a_rectangle_and_counts_its_area():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (5, 12, 10, 3)).astype(np.float32)
    before, targets = images.copy(), np.eye(5, dtype=np.float32)
    areas = []
    for seed in range(100):
        mixed, soft, _ = mix(
            (images, targets, np.ones(5, np.float32)), mixup=0, cutmix=1.0, rng=np.random.default_rng(seed)
        )
        partner = int(np.argmax(np.where(np.arange(5) == 0, -1, soft[0])))
        other = np.all(mixed[0] != before[0], axis=-1)
        if soft[0, 0] == 1:
            assert not other.any()
            continue
        rows, columns = np.nonzero(other)
        box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert other[box].all()
        assert np.array_equal(mixed[0][box], before[partner][box])
        assert soft[0, partner] == pytest.approx(other.mean(), abs=1e-6)
        areas.append(other.mean())
    assert np.array_equal(images, before)
    assert len(areas) > 50
    assert min(areas) < 0.1
    assert max(areas) > 0.5


def test_mixup_changes_the_training_but_not_the_validation(plain):
    val = blobs(60)
    head, history = trained(blobs(120), val, params(mixup=0.4))
    assert history["train_loss"].iloc[-1] > plain[1]["train_loss"].iloc[-1] * 1.5
    assert history["val_loss"].min() == pytest.approx(cross_entropy(head, val), rel=1e-4)


def test_average_of_the_weights_is_validated_and_kept():
    """Against plain gradient descent followed by numpy, one step an epoch."""
    data = blobs(40, spread=2)
    settings = {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 40, "epochs": 4, "ema": 0.6}
    head, history = trained(data, data, params(**settings))
    prepare_keras(1)
    weight = weights(build_head(WIDTH, 2, params(), 1)).astype(np.float64)
    average = None
    for _ in range(4):
        weight = weight - 0.5 * errors(data, weight, data.labels).mean(axis=0)
        average = weight if average is None else 0.6 * average + 0.4 * weight
    assert weights(head) == pytest.approx(average, abs=1e-5)
    assert not np.allclose(average, weight, atol=1e-3)
    assert history["val_loss"].iloc[-1] == pytest.approx(cross_entropy(head, data), rel=1e-5)


def test_views_are_drawn_anew_in_each_epoch():
    """Each view of an image is a number; the mean loss of an epoch tells which were shown."""
    labels = np.arange(200) % 2
    shards = tuple(np.full((200, WIDTH), number, np.float32) for number in range(4))
    plain = features(shards[0], labels, shards=1)
    data = FeatureSet(plain.shards, plain.starts, plain.labels, tuple((shard,) for shard in shards[1:]))
    shown = []
    take = FeatureSet.take

    class Spied(FeatureSet):
        def take(self, positions, view=None):
            found = take(self, positions, view)
            shown.append((positions, found[:, 0].astype(int)))
            return found

    spied = Spied(data.shards, data.starts, data.labels, data.copies)
    prepare_keras(1)
    settings = params(batch_size=200, epochs=6)
    fit_head(build_head(WIDTH, 2, settings, 1), spied, plain, settings, seed=1)
    epochs = [views for positions, views in shown if np.array_equal(positions, np.arange(200))]
    assert len(epochs) >= 6
    counts = np.bincount(np.concatenate(epochs), minlength=4) / (200 * len(epochs))
    assert counts == pytest.approx([0.25] * 4, abs=0.05)
    assert len({tuple(views) for views in epochs}) >= 6


def test_slow_divergence_is_told():
    """Growing, but far from infinite: the penalty's gradient doubles the weights at every step."""
    data = blobs(16)
    settings = params(optimizer="sgd", learning_rate=1.0, l2=1.2, batch_size=16, epochs=30, patience=30)
    with pytest.raises(CatdogError, match=r"phase head grew from .* lower train\.learning_rate \(now 1\.0\)"):
        trained(data, data, settings)


class Killed(BaseException):
    """As a SIGKILL would come: right after a checkpoint."""


class KillingCheckpoints(Checkpoints):
    """Ends the training after so many checkpoints."""

    left = 0

    def save(self, phase, state):
        super().save(phase, state)
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize(
    ("settings", "kills"),
    [
        (
            params(
                epochs=6, patience=6, dropout=0.4, mixup=0.3, ema=0.8, hidden_units=(6,), schedule="cosine", warmup=2
            ),
            (3, 1),
        ),
        (params(hidden_units=(32,), epochs=14, patience=3, learning_rate=0.02, optimizer="momentum"), (4,)),
    ],
)
def test_resumed_training_is_the_uninterrupted_one(tmp_path, settings, kills, capsys):
    """Killed once while patience is running out, or twice; a damaged checkpoint at the start is as good as none."""
    train, val = blobs(24, spread=8, seed=1), blobs(40, spread=8, seed=2)
    head, history = trained(train, val, settings)
    (tmp_path / "head.npz").write_bytes(b"half")

    def start(left):
        checkpoints = KillingCheckpoints(tmp_path, seconds_between=0)
        checkpoints.left = left
        prepare_keras(1)
        again = build_head(WIDTH, 2, settings, 1)
        return again, fit_head(again, train, val, settings, seed=1, checkpoints=checkpoints)

    for number, left in enumerate(kills):
        with pytest.raises(Killed):
            start(left)
        assert ("damaged" in capsys.readouterr().err) == (number == 0)
    for epochs in (4, len(history)):  # the second time there is nothing left to do
        again, resumed = start(-1)
        assert f"going on with head after epoch {epochs}," in capsys.readouterr().err
        assert resumed.equals(history)
        assert np.array_equal(weights(again), weights(head))
