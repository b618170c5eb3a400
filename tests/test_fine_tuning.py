"""Fine-tuning: what is unfrozen, what the batches hold, and that only an improvement counts."""

import numpy as np
import pytest
import tensorflow as tf

import tiny
from catdog.augment import build_augmentation, reseed
from catdog.config import AugmentParams
from catdog.errors import CatdogError
from catdog.fine_tuning import _training_batches, _validation_batches, fine_tune, unfreeze
from catdog.model import assemble, build_head
from catdog.optimization import NO_IMAGE
from catdog.shares import Share
from catdog.training import fit_head, join_histories
from conftest import MODULES, Project
from test_runtime import TWO_CPUS, needs_jax

WHOLE = Share()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.Data(tmp_path_factory.mktemp("shards"))


def trainable(network) -> list[str]:
    return [layer.name for layer in network.layers if layer.trainable_weights]


@pytest.mark.parametrize(
    ("layers", "trained"),
    [
        ("all", ["stem_conv", "top_conv"]),
        (7, ["stem_conv", "top_conv"]),
        (6, ["stem_conv", "top_conv"]),
        (5, ["top_conv"]),
        (3, ["top_conv"]),
        ("top_conv", ["top_conv"]),
        ("stem_bn", ["top_conv"]),
        ("last_block", ["top_conv"]),
    ],
)
def test_unfrozen_layers(layers, trained):
    network = tiny.network()
    assert unfreeze([network], [tiny.BACKBONE], layers) == (trained[0],)
    assert trainable(network) == trained


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("top_conf", r"fine_tune\.layers = 'top_conf' is no layer of tiny; did you mean top_conv"),
        ("last-block", "did you mean last_block"),
        ("Zzz", "use a number of layers, last_block, or all"),
        (8, r"fine_tune\.layers = 8 is more than the 7 layers of tiny; use all"),
        (2, r"fine_tune\.layers = 2 reaches no weights of tiny but those of BatchNorm"),
        ("top_relu", "reaches no weights"),
    ],
)
def test_layers_that_make_no_sense_are_told(layers, message):
    with pytest.raises(CatdogError, match=message):
        unfreeze([tiny.network()], [tiny.BACKBONE], layers)


def test_several_networks_are_unfrozen_each():
    networks = [tiny.network("one"), tiny.network("two")]
    assert unfreeze(networks, [tiny.BACKBONE] * 2, "last_block") == ("top_conv", "top_conv")
    networks[1].get_layer("top_conv").name = "other"
    assert unfreeze(networks, [tiny.BACKBONE] * 2, "other") == ("", "other")
    assert [trainable(network) for network in networks] == [[], ["other"]]


def batches(data, *, seed=1, first_epoch=0, epochs=2, outputs=1, augment=False, share=WHOLE, **changes):
    settings = {"label_smoothing": changes.pop("label_smoothing", 0.0), "mixup": changes.pop("mixup", 0.0)}
    settings["class_weights"] = changes.pop("class_weights", "none")
    params = tiny.fine_tune_params(epochs=epochs, augment=augment, **changes)
    generator = _training_batches(
        data.images("train"),
        tiny.SIZE,
        outputs,
        params,
        tiny.train_params(**settings),
        tiny.AUGMENT,
        share,
        seed=seed,
        first_epoch=first_epoch,
    )
    return list(generator)


def pictures(epoch) -> list[bytes]:
    return [picture.astype(np.uint8).tobytes() for values, _, _ in epoch for picture in values]


def test_every_epoch_shows_every_image_once_in_another_order(data):
    found = batches(data)
    assert [len(values) for values, _, _ in found] == [8] * 10
    assert all(values.dtype == targets.dtype == weights.dtype == np.float32 for values, targets, weights in found)
    one, two = pictures(found[:5]), pictures(found[5:])
    stored = pictures([(data.stored("train"), None, None)])
    assert sorted(one) == sorted(two) == sorted(stored)
    assert one != two
    label_of = dict(zip(stored, data.labels["train"], strict=True))
    labels = [int(target) for _, targets, _ in found for target in targets[:, 0]]
    assert labels == [label_of[picture] for picture in one + two]
    # The shards hold one class after the other; the batches must not.
    assert 1 < sum(labels[:8]) < 7


@pytest.mark.parametrize("changes", [{}, {"augment": True, "mixup": 0.4, "cutmix": 1.0}])
def test_batches_depend_on_seed_and_epoch_alone(data, changes):
    whole = batches(data, epochs=3, **changes)
    tail = batches(data, epochs=3, first_epoch=1, **changes)
    for one, two in zip(whole[5:], tail, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    other = batches(data, seed=2, epochs=1, **changes)
    assert not np.array_equal(whole[0][0], other[0][0])


def test_augmentation_varies_images_anew_in_each_epoch(data):
    plain, varied = batches(data), batches(data, augment=True)
    differences = [np.abs(a[0] - b[0]).mean() for a, b in zip(plain, varied, strict=True)]
    assert min(differences) > 2
    assert all(values.min() >= 0 and values.max() <= 255 for values, _, _ in varied)
    assert set(pictures(varied[:5])).isdisjoint(pictures(varied[5:]))
    layers = build_augmentation(tiny.AUGMENT, tiny.SIZE, 1)
    reseed(layers, [1, 0, 0])
    assert np.array_equal(varied[0][0], layers(plain[0][0]))


def test_targets_and_weights_follow_the_head_s_parameters(data):
    found = batches(data, epochs=1, outputs=2, label_smoothing=0.2, class_weights="balanced")
    targets = np.concatenate([targets for _, targets, _ in found])
    weights = np.concatenate([weights for _, _, weights in found])
    labels = targets.argmax(axis=1)
    assert np.unique(targets.round(6)).tolist() == pytest.approx([0.1, 0.9])
    counts = np.bincount(labels)
    assert len(set(counts)) == 2  # else balancing would show nothing
    assert weights == pytest.approx(40 / (2 * counts[labels]), rel=1e-6)


def test_validation_shows_every_image_once_in_order_with_the_pixels_of_embed(data):
    for _ in range(2):
        found = list(_validation_batches(data.images("val"), tiny.SIZE, 1, 8, WHOLE))
        assert [len(values) for values, _ in found] == [8, 8, 8, 2]
        assert np.array_equal(np.concatenate([values for values, _ in found]), data.stored("val"))
        assert np.array_equal(np.concatenate([targets for _, targets in found])[:, 0], data.labels["val"])


def test_shard_with_another_number_of_images_is_an_error(data):
    images = data.images("val")
    with pytest.raises(tf.errors.FailedPreconditionError):
        list(_validation_batches(type(images)(images.shards, images.labels[:15]), tiny.SIZE, 1, 8, WHOLE))


@pytest.mark.parametrize("changes", [{}, {"augment": True, "mixup": 0.4, "cutmix": 1.0, "class_weights": "balanced"}])
def test_parts_of_the_workers_are_the_batch_and_weigh_as_much(data, changes):
    whole = batches(data, epochs=1, **changes)
    parts = [batches(data, epochs=1, share=Share(6, 3, process), **changes) for process in range(3)]
    for batch, of_each in zip(whole, zip(*parts, strict=True), strict=True):
        assert [len(pixels) for pixels, _, _ in of_each] == [4, 4, 4]
        pixels, targets, weights = (np.concatenate(values) for values in zip(*of_each, strict=True))
        assert np.array_equal(pixels[:8], batch[0])
        assert np.array_equal(targets[:8], batch[1])
        assert not pixels[8:].any()
        # The loss is the mean over all places.
        assert weights / 12 == pytest.approx([*(batch[2] / 8), 0, 0, 0, 0], rel=1e-6)


def test_parts_of_the_validation_images_are_all_of_them_and_weigh_the_same(data):
    parts = [list(_validation_batches(data.images("val"), tiny.SIZE, 1, 8, Share(6, 3, number))) for number in range(3)]
    assert [[len(pixels) for pixels, _, _ in part] for part in parts] == [[4, 4, 4, 2]] * 3
    in_order = [part for of_each in zip(*parts, strict=True) for part in of_each]
    pixels, targets, weights = (np.concatenate(values) for values in zip(*in_order, strict=True))
    assert np.array_equal(pixels[weights > 0], data.stored("val"))
    assert np.array_equal(targets[weights > 0][:, 0], data.labels["val"])
    assert np.unique(weights).tolist() == pytest.approx([0, len(weights) / 26])
    assert np.all(targets[weights == 0] == NO_IMAGE)


def tuned(data, *, settings=None, **changes):
    """A fitted head, then fine-tuned; weights by layer before and after."""
    settings = tiny.train_params(**(settings or {}))
    model, network, head = tiny.model(settings)
    fit_head(head, data.features(network, "train"), data.features(network, "val"), settings, seed=1)
    before = {weight.path: np.array(weight.numpy()) for weight in model.weights}
    parts = (model, [network], [tiny.BACKBONE], data.images("train"), data.images("val"))
    result = fine_tune(*parts, tiny.fine_tune_params(**changes), settings, AugmentParams(rotation=0, zoom=0), seed=1)
    after = {weight.path: np.array(weight.numpy()) for weight in model.weights}
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    return model, result, {"/".join(path.split("/")[-2:]) for path in moved}


@pytest.fixture(scope="module")
def improved(data):
    """A fine-tuning that improves; no test changes it."""
    return tuned(data, epochs=6)


def loss(model, data) -> float:
    p = np.asarray(model(data.stored("val"), training=False), np.float64)[:, 0]
    return float(-np.log(np.where(data.labels["val"] == 1, p, 1 - p)).mean())


def test_fine_tuning_improves_and_moves_only_what_is_unfrozen(data, improved):
    model, result, moved = improved
    assert result.improved
    assert result.history["val_loss"].min() < 0.8 * result.frozen_loss
    assert loss(model, data) == pytest.approx(result.history["val_loss"].min(), rel=1e-4)
    assert moved == {"top_conv/kernel", "top_conv/bias", "logits/kernel", "logits/bias"}
    assert result.unfrozen == ("top_conv",)
    assert result.images_per_second > 0
    assert result.report()["kept"] == "yes"


def test_frozen_loss_is_that_of_the_model_before(data):
    settings = tiny.train_params()
    model, network, _ = tiny.model(settings)
    before = loss(model, data)
    parts = (model, [network], [tiny.BACKBONE], data.images("train"), data.images("val"))
    result = fine_tune(*parts, tiny.fine_tune_params(epochs=1), settings, tiny.AUGMENT, seed=1)
    assert result.frozen_loss == pytest.approx(before, rel=1e-5)


def test_what_does_not_move_does_not_improve(data):
    _, result, _ = tuned(data, settings={"optimizer": "sgd"}, learning_rate=1e-12, epochs=3, patience=1)
    assert not result.improved
    assert result.history["val_loss"].tolist() == [result.frozen_loss] * 2
    assert result.report()["kept"].startswith("no")


def test_early_stopping_and_same_seed_same_weights(data):
    changes = {"learning_rate": 0.3, "warmup": 0, "epochs": 8, "patience": 2, "cutmix": 1.0}
    settings = {"mixup": 0.2, "ema": 0.5, "dropout": 0.3, "clip_norm": 1.0, "optimizer": "adamw"}
    one, two = (tuned(data, settings=settings, **changes) for _ in range(2))
    assert one[1].history.equals(two[1].history)
    for a, b in zip(one[0].get_weights(), two[0].get_weights(), strict=True):
        assert np.array_equal(a, b)
    best = int(one[1].history["val_loss"].argmin())
    assert len(one[1].history) == min(8, best + 1 + 2)


def test_divergence_names_the_learning_rate(data):
    with pytest.raises(CatdogError, match=r"phase fine_tune.*lower fine_tune\.learning_rate \(now 10\.0\)"):
        tuned(data, settings={"optimizer": "sgd", "l2": 1.0}, learning_rate=10.0, warmup=0)


def test_several_backbones_are_tuned_together(data):
    networks = [tiny.network("one"), tiny.network("two", channels=4)]
    backbones = [type(tiny.BACKBONE)(**{**vars(tiny.BACKBONE), "name": name}) for name in ("one", "two")]
    head = build_head(12, 2, tiny.train_params(), 1)
    model = assemble(networks, backbones, head, tiny.SIZE, "avg")
    before = [[weight.copy() for weight in network.get_layer("top_conv").get_weights()] for network in networks]
    parts = (model, networks, backbones, data.images("train"), data.images("val"))
    result = fine_tune(*parts, tiny.fine_tune_params(epochs=1), tiny.train_params(), tiny.AUGMENT, seed=1)
    assert result.unfrozen == ("top_conv", "top_conv")
    for network, weights in zip(networks, before, strict=True):
        assert not np.array_equal(network.get_layer("top_conv").get_weights()[0], weights[0])


SEVERAL_DEVICES = """
import contextlib, sys
from pathlib import Path
import numpy as np
import tiny
from catdog.fine_tuning import fine_tune
from catdog.runtime import distribution, jit_compile

settings = tiny.train_params(class_weights="balanced", mixup=0.2)
data = tiny.Data(Path("."), train=43, val=25)
found = []
for block in (contextlib.nullcontext(1), distribution()):
    with block as devices:
        model, network, _ = tiny.model(settings)
        parts = (model, [network], [tiny.BACKBONE], data.images("train"), data.images("val"))
        params = tiny.fine_tune_params(augment=False, epochs=3)
        result = fine_tune(*parts, params, settings, tiny.AUGMENT, seed=1, jit_compile=jit_compile("auto", trains=True))
        found.append((devices, result.frozen_loss, result.history, model.get_weights()))
(one, frozen_by_one, history_by_one, by_one), (two, frozen_by_two, history_by_two, by_two) = found
assert (one, two) == (1, 2)
assert abs(frozen_by_one - frozen_by_two) < 1e-5
for ours, theirs in zip(by_one, by_two, strict=True):
    assert np.allclose(ours, theirs, atol=1e-5)
# Keras' training loss of an epoch counts the last batch's filler.
columns = ["val_loss", "train_accuracy", "val_accuracy"]
assert np.allclose(history_by_one[columns], history_by_two[columns], atol=1e-5), (history_by_one, history_by_two)
assert history_by_two["val_loss"].min() < 0.95 * frozen_by_two
"""


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=needs_jax)])
def test_two_devices_tune_as_one_does_where_batches_cannot_be_halved(backend, under_jax, workshop, tmp_path):
    if backend == "jax":
        # What is compiled runs for a moment: optimizing it takes longer.
        under_jax(SEVERAL_DEVICES, **tiny.pretended_devices(2, "--xla_backend_optimization_level=0"))
        return
    project = Project(tmp_path, workshop.home, warm=True)
    done = project.run("python", "-c", TWO_CPUS + SEVERAL_DEVICES, PYTHONPATH=MODULES)
    assert done.returncode == 0, done.stderr[-3000:]


def test_histories_are_joined_with_their_phases(improved):
    history = improved[1].history.head(2)
    head = history.head(1)
    joined = join_histories(head, history)
    assert joined["epoch"].tolist() == [1, 2, 3]
    assert joined["phase"].tolist() == ["head", "fine_tune", "fine_tune"]
    assert list(joined.columns[:3]) == ["epoch", "phase", "train_loss"]
    assert join_histories(head, None)["phase"].tolist() == ["head"]
