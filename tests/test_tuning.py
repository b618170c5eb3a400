"""The search for a head: the trials are what they say, repeat, go on after a kill, and never see the test split."""

import json
import os
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from ruamel.yaml import YAML

from catdog import cli, paths, tuning
from catdog.checkpoints import Checkpoints
from catdog.config import Params, TrainParams, TuneParams, load_params, validate_params
from catdog.errors import CatdogError
from catdog.features import FeatureSet
from catdog.gathered import fit_gathered, gather
from catdog.model import build_head
from catdog.records import ImageRow, Shard, write_index, write_shard
from catdog.runtime import prepare_keras
from catdog.training import best_epoch, fit_head
from catdog.tuning import HYPERBAND_TRIALS, Plan, build_oracle, plan_search, rank, ranking, train_params, tune
from catdog.tuning_features import IMAGE_STAGES, features_of, with_backbone
from conftest import Project, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:(currentThread|getName):DeprecationWarning")  # of Keras Tuner

ROOT = Path(__file__).parents[1]
WIDTH = 6
SMALL = {"epochs": 6, "patience": 2, "hidden_units": [4, 8], "trials": 6}
TIMES = ["seconds"]


def draw(count, seed, views=0):
    """Two overlapping classes in two shards, and copies with some noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    values = (labels[:, None] * 1.5 + rng.normal(size=(count, WIDTH))).astype(np.float32)
    copies = [values + rng.normal(size=values.shape).astype(np.float32) for _ in range(views)]
    cut = count // 2
    parts = tuple((array[:cut], array[cut:]) for array in (values, *copies))
    return FeatureSet(parts[0], np.array([0, cut, count]), labels, parts[1:])


def write_features(root, *, backbone="mobilenetv2", scale=1.0, seed=0):
    folder = root / paths.FEATURES
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 60), ("val", 40), ("test", 30)):
        data = draw(count, [seed, count])
        for number, shard in enumerate(data.shards):
            labels = data.labels[data.starts[number] : data.starts[number + 1]]
            np.save(folder / f"{split}-0000{number}-of-00002.features.npy", shard * np.float32(scale))
            np.save(folder / f"{split}-0000{number}-of-00002.labels.npy", labels)
    info = {"backbone": backbone, "weights": "imagenet", "pooling": "avg", "views": 0}
    (folder / "features.json").write_text(json.dumps(info))


def write_lock(root):
    """Makes params.yaml the one with which the stages have run."""
    yaml = YAML(typ="safe")
    tree, pipeline = yaml.load(root / "params.yaml"), yaml.load(ROOT / "dvc.yaml")["stages"]
    stages = {name: {"params": {"params.yaml": {}}} for name in (*IMAGE_STAGES, "embed")}
    for name, entry in stages.items():
        for key in pipeline[name]["params"]:
            block, _, inner = key.partition(".")
            entry["params"]["params.yaml"][key] = tree[block][inner] if inner else tree[block]
    stages["preprocess"]["outs"] = [{"path": "data/tfrecords", "md5": "a"}]
    stages["embed"]["deps"] = [{"path": "data/tfrecords", "md5": "a"}, {"path": "src/catdog/model.py", "md5": "b"}]
    with (root / "dvc.lock").open("w") as file:
        yaml.dump({"stages": stages}, file)


def set_params(root, changes):
    yaml = YAML()
    tree = yaml.load(root / "params.yaml")
    for name, value in changes.items():
        block, _, key = name.rpartition(".")
        (tree[block] if block else tree)[key] = value
    with (root / "params.yaml").open("w") as file:
        yaml.dump(tree, file)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with features and an empty tracking store, which takes seconds to make."""
    from catdog.tracking import connect

    root = tmp_path_factory.mktemp("template")
    shutil.copy(ROOT / "params.yaml", root)
    set_params(root, {f"tune.{key}": value for key, value in SMALL.items()})
    write_features(root)
    write_lock(root)
    (root / paths.TFRECORDS).mkdir(parents=True)
    (root / paths.PREPROCESS_REPORT).write_text(json.dumps({"classes": ["cat", "dog"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(root)
    return root


def enter(root, patch):
    """Makes a repository the one that the commands find."""
    patch.setenv("DVC_ROOT", str(root))
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return root


@pytest.fixture
def root(template, tmp_path, monkeypatch):
    return enter(shutil.copytree(template, tmp_path / "root"), monkeypatch)


def params_of(root) -> Params:
    return load_params(root / "params.yaml")


def search(root, **options):
    return tune(root, params_of(root), **options)


def search_in_a_copy(template, folder, **options):
    """A repository in which a search has ended, and what it found; no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        copy = enter(shutil.copytree(template, folder / "root"), patch)
        return copy, search(copy, **options)


@pytest.fixture(scope="module")
def five_trials(template, tmp_path_factory):
    """A random search of five trials."""
    return search_in_a_copy(template, tmp_path_factory.mktemp("five_trials"), method="random", trials=5)


@pytest.fixture(scope="module")
def hyperband(template, tmp_path_factory):
    """The shortest Hyperband."""
    return search_in_a_copy(template, tmp_path_factory.mktemp("hyperband"), method="hyperband", trials=6)


@pytest.fixture
def searched(five_trials, tmp_path, monkeypatch):
    """A copy of the repository in which five trials are there."""
    return enter(shutil.copytree(five_trials[0], tmp_path / "searched"), monkeypatch)


def without_times(study, count=None):
    """The first trials, or all."""
    return study.trials.drop(columns=TIMES).head(len(study.trials) if count is None else count)


def runs_of(root):
    """The parents and the trials in the store, oldest first."""
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("catdog").experiment_id], order_by=["start_time ASC"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if "mlflow.parentRunId" in run.data.tags]


def settings(**changes) -> TuneParams:
    return TuneParams(**{**SMALL, **changes})


# What is tried


@pytest.mark.parametrize("resource", [3, 9, 27])
def test_hyperband_has_the_trials_that_are_announced(resource):
    plan = plan_search(settings(method="hyperband", trials=HYPERBAND_TRIALS[resource]), 0)
    assert plan.resource == resource
    oracle = build_oracle(settings(dropout="0.0..0.9"), plan)
    tried = 0
    while (trial := oracle.create_trial("test")).status == "RUNNING":
        oracle.update_trial(trial.trial_id, {"val_loss": 1 / (1 + tried)})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
        tried += 1
    assert tried == plan.trials == HYPERBAND_TRIALS[resource]


def test_hyperband_fills_the_trials_with_repetitions():
    assert plan_search(settings(method="hyperband", trials=69), 0).trials == 3 * 23
    assert plan_search(settings(method="hyperband", trials=75), 0) == plan_search(
        settings(method="hyperband", trials=70), 0
    )
    assert plan_search(settings(method="random", trials=5), 0).trials == 5
    with pytest.raises(CatdogError, match=r"tune\.trials = 5 is too few for hyperband: give 6 or more"):
        plan_search(settings(method="hyperband", trials=5), 0)


def test_seed_zero_is_a_seed_and_neighbours_share_no_draws():
    seeds = [plan_search(settings(method="random"), seed).seed for seed in range(50)]
    assert min(seeds) > 0
    assert min(np.diff(sorted(seeds))) > 1000


def drawn(tuned, count=40, method="random"):
    """Values of the first trials that an oracle asks for."""
    oracle = build_oracle(tuned, plan_search(tuned.model_copy(update={"method": method, "trials": count}), 1))
    return [dict(oracle.create_trial(f"worker {number}").hyperparameters.values) for number in range(count)]


def test_ranges_are_searched_from_end_to_end_in_short_values():
    values = drawn(
        settings(learning_rate="0.0001..0.1", dropout="0.2..0.6", hidden_layers="0..2", hidden_units="16..64")
    )
    rates = np.array([one["learning_rate"] for one in values])
    assert 1e-4 <= rates.min() < 1e-3
    assert 1e-2 < rates.max() <= 0.1
    assert 0.2 < np.mean(rates < 10**-2.5) < 0.8  # on a logarithmic scale: half of them
    assert all(rate == float(f"{rate:.2g}") for rate in rates)
    assert {one["hidden_layers"] for one in values} == {0, 1, 2}
    assert all(0.2 <= one["dropout"] <= 0.6 for one in values)
    units = [one["hidden_units"] for one in values if one["hidden_layers"]]
    assert 16 <= min(units) < 32 < max(units) <= 64
    assert not any("hidden_units" in one for one in values if not one["hidden_layers"])


def test_rounding_does_not_leave_the_range():
    assert tuning._short(0.12345, 0.1234, 0.1239) == 0.1234
    assert tuning._short(0.0021499, 0.0001, 0.1) == 0.0021


def test_lists_are_searched_as_they_are():
    values = drawn(
        settings(
            learning_rate=[0.0123], optimizer=["sgd"], hidden_layers=[0, 3], hidden_units=[5, 7], dropout=[0, 0.25]
        ),
        count=6,
    )
    assert {one["learning_rate"] for one in values} == {0.0123}
    assert {one["hidden_units"] for one in values if "hidden_units" in one} <= {5, 7}
    # 2 dropouts, and without hidden layers or 3 of 5 or of 7 units
    assert len({json.dumps(one) for one in values}) == 6


def test_a_trial_is_what_its_command_line_makes_of_params_yaml(root):
    """The point of the printed line: the very parameters that were tried."""
    from dvc.utils.hydra import apply_overrides

    params = params_of(root)
    tuned = settings(hidden_layers=[0, 1, 2], learning_rate="0.000001..0.1")
    for method, share in (("random", {}), ("hyperband", {"tuner/epochs": 1})):
        plan = plan_search(tuned.model_copy(update={"method": method}), 0)
        for values in drawn(tuned, count=12):
            tried = train_params(values | share, params.train, tuned, plan)
            copy = root / "copy.yaml"
            shutil.copy(root / "params.yaml", copy)
            changes = tuning._overrides(tuning._described(tried), params.train)
            apply_overrides(copy, [f"{key}={value}" for key, value in changes.items()])
            assert load_params(copy).train == tried


def test_trial_is_limited_by_the_search_and_by_train():
    values = {"learning_rate": 0.1, "optimizer": "sgd", "hidden_layers": 2, "hidden_units": 8, "dropout": 0.0}
    plan = Plan("hyperband", 23, 1, resource=9)
    tried = train_params(values | {"tuner/epochs": 3}, TrainParams(l2=0.5), settings(epochs=20, patience=4), plan)
    assert (tried.epochs, tried.patience, tried.hidden_units, tried.l2) == (7, 4, (8, 8), 0.5)
    assert (tried.learning_rate, tried.optimizer, tried.dropout) == (0.1, "sgd", 0.0)
    tried = train_params(values, TrainParams(epochs=5, patience=1), settings(epochs=20, patience=4), plan)
    assert (tried.epochs, tried.patience) == (5, 1)


# How it is fitted


@pytest.mark.parametrize(
    ("views", "changes"),
    [
        (2, {"hidden_units": (5,), "dropout": 0.4, "batch_size": 7}),
        (1, {"schedule": "cosine", "warmup": 2, "ema": 0.9, "class_weights": "balanced"}),
        (0, {"label_smoothing": 0.1, "optimizer": "momentum", "output": "softmax", "batch_size": 100}),
    ],
    ids=["views", "cosine", "one batch"],
)
def test_gathered_features_train_the_very_same_head(views, changes):
    train, val = draw(61, 1, views), draw(45, 2)
    params = TrainParams(**{"epochs": 5, "batch_size": 16, "learning_rate": 0.02, **changes})
    results = []
    for fit in (fit_head, None):
        prepare_keras(3)
        head = build_head(WIDTH, 2, params, 3)
        if fit:
            history = fit(head, train, val, params, seed=4)
        else:
            history = fit_gathered(head, gather(train, val), params, seed=4, checkpoints=Checkpoints(None))
        results.append((history, head.get_weights()))
    pd.testing.assert_frame_equal(results[0][0], results[1][0], rtol=1e-6)
    for expected, found in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"optimizer": "momentum"}], ids=["adam", "average", "momentum"])
def test_longer_training_goes_on_with_the_shorter_one(tmp_path, changes):
    """What Hyperband does with a good trial, though its last epoch was not its best."""
    data = gather(draw(61, 1), draw(45, 2))
    prepare_keras(3)

    def fitted(epochs, checkpoints):
        params = TrainParams(epochs=epochs, hidden_units=(5,), dropout=0.2, batch_size=16, learning_rate=0.3, **changes)
        head = build_head(WIDTH, 2, params, 3)
        return fit_gathered(head, data, params, seed=4, checkpoints=checkpoints), head.get_weights()

    kept = Checkpoints(tmp_path / "weights")
    short, _ = fitted(4, kept)
    assert best_epoch(short)["epoch"] < len(short) == 4
    for epochs in (9, 9):  # the second time nothing is left to do
        history, weights = fitted(epochs, kept)
        expected, expected_weights = fitted(epochs, Checkpoints(None))
        pd.testing.assert_frame_equal(history, expected)
        for found, wanted in zip(weights, expected_weights, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_features_that_do_not_fit_into_memory_give_the_same_trials(root, five_trials, monkeypatch):
    monkeypatch.setattr(tuning, "gather", lambda train, val: None)
    pd.testing.assert_frame_equal(
        without_times(search(root, method="random", trials=2)), without_times(five_trials[1], 2)
    )


# A search


def test_same_seed_gives_the_same_trials_and_another_seed_others(root, five_trials):
    _, study = five_trials
    assert study.trials["trial"].tolist() == [1, 2, 3, 4, 5]
    assert study.best["val_loss"] == study.trials["val_loss"].min()
    again = search(root, method="random", trials=2, seed=params_of(root).seed)
    pd.testing.assert_frame_equal(without_times(again), without_times(study, 2))
    other = search(root, method="random", trials=1, seed=params_of(root).seed + 1)
    assert other.trials["learning_rate"][0] not in study.trials["learning_rate"].tolist()


def test_each_trial_is_fitted_as_the_train_stage_does(root, five_trials):
    params = params_of(root)
    for row in five_trials[1].trials.head(2).to_dict("records"):
        changed = {"hidden_units": tuple(json.loads(row["hidden_units"]))}
        changed |= {key: row[key] for key in ("learning_rate", "optimizer", "dropout", "epochs", "patience")}
        prepare_keras(params.seed)
        train = params.train.model_copy(update=changed)
        head = build_head(WIDTH, 2, train, params.seed)
        data = [tuning.open_features(root / paths.FEATURES, split) for split in ("train", "val")]
        best = best_epoch(fit_head(head, *data, train, seed=params.seed))
        assert (row["val_loss"], row["best_epoch"]) == (pytest.approx(best["val_loss"], rel=1e-6), best["epoch"])


def test_mlflow_has_a_parent_and_a_run_a_trial(five_trials):
    root, study = five_trials
    (parent,), children = runs_of(root)
    assert (parent.info.run_name, parent.info.status) == ("tune", "FINISHED")
    assert parent.data.metrics["val_loss"] == study.best["val_loss"]
    assert parent.data.metrics["trials"] == 5
    assert parent.data.tags["best.trial"] == f"trial {study.best['trial']}"
    assert parent.data.tags["best.train.learning_rate"] == study.overrides["train.learning_rate"]
    assert parent.data.params["tune.method"] == "random"
    assert parent.data.params["backbone"] == "mobilenetv2"
    assert [child.info.run_name for child in children] == [f"trial {number}" for number in range(1, 6)]
    for child, row in zip(children, study.trials.to_dict("records"), strict=True):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        assert child.data.metrics == {key: row[key] for key in ("val_loss", "val_accuracy", "best_epoch", "seconds")}
        assert child.data.params["train.hidden_units"] == row["hidden_units"]
        assert float(child.data.params["train.learning_rate"]) == row["learning_rate"]


def test_test_split_is_never_opened(root, five_trials):
    for path in (root / paths.FEATURES).glob("test-*"):
        path.write_bytes(b"not to be read")
    opened = []
    listening = True
    sys.addaudithook(
        lambda event, arguments: opened.append(str(arguments[0])) if listening and event == "open" else None
    )
    study = search(root, method="random", trials=1)
    listening = False
    names = [Path(name).name for name in opened]
    assert any(name.startswith("train-00001") for name in names)
    assert any(name.startswith("val-00001") for name in names)
    assert not any(name.startswith("test-") for name in names)
    pd.testing.assert_frame_equal(without_times(study), without_times(five_trials[1], 1))


def test_diverging_trials_fail_and_the_search_goes_on_until_nothing_is_left_to_try(root, capsys):
    write_features(root, scale=1e20)
    set_params(root, {"tune.learning_rate": [1e-30, 10], "tune.optimizer": ["sgd"], "tune.hidden_layers": [0]})
    set_params(root, {"tune.dropout": [0.0]})
    study = search(root, method="random", trials=5)
    assert len(study.trials) == 2
    assert "after 2 trials, random search found nothing else to try" in capsys.readouterr().out
    status = study.trials.set_index("learning_rate")["status"]
    assert status[10] == "failed"
    assert status[1e-30] == "finished"
    failed = study.trials[study.trials["status"] == "failed"]
    assert failed["error"].str.contains("became (?:inf|nan)|grew").all()
    assert failed["val_loss"].isna().all()
    _, children = runs_of(root)
    assert [child.info.status == "FAILED" for child in children] == (study.trials["status"] == "failed").tolist()
    assert "phase head" in next(child for child in children if child.info.status == "FAILED").data.tags["error"]


def test_search_in_which_all_trials_fail_is_told(root):
    write_features(root, scale=1e20)
    set_params(root, {"tune.learning_rate": [10], "tune.optimizer": ["sgd"], "tune.hidden_layers": [0]})
    with pytest.raises(CatdogError, match=r"every trial failed, the last because the \w+ loss"):
        search(root, method="random", trials=2)


# Going on


def ask(oracle, count):
    """Lets an oracle try so many trials on a loss without any training; returns the values that it asked for."""
    values = []
    for _ in range(count):
        with tuning._quiet_oracle():
            trial = oracle.create_trial("test")
            tried = trial.hyperparameters.values
            values.append(dict(tried))
            trial.status = "FAILED" if tried["optimizer"] == "sgd" else "COMPLETED"
            loss = abs(np.log10(tried["learning_rate"]) + 2.5) + tried["dropout"] + 1 / tried.get("tuner/epochs", 1)
            if trial.status == "COMPLETED":
                oracle.update_trial(trial.trial_id, {"val_loss": loss})
            oracle.end_trial(trial)
    return values


def ask_in_waves(oracle, count, most):
    """Like `ask`, but with several trials open at a time; returns also how many there were in each wave."""
    values, sizes = [], []
    while len(values) < count and (wave := tuning.ask(oracle, min(most, count - len(values)))):
        assert tuning.open_trials_of(oracle) == wave
        sizes.append(len(wave))
        for trial_id in wave:
            tried = oracle.trials[trial_id].hyperparameters.values
            values.append(dict(tried))
            loss = abs(np.log10(tried["learning_rate"]) + 2.5) + tried["dropout"] + 1 / tried.get("tuner/epochs", 1)
            tuning.tell(oracle, trial_id, None if tried["optimizer"] == "sgd" else loss)
    return values, sizes


def comparable(oracle):
    state = json.loads(json.dumps(tuning.oracle_state(oracle)))
    state["own"]["tried_so_far"].sort()  # a set
    return state


OPTIMIZERS = ["adam", "sgd", "adamw", "momentum"]


@pytest.mark.parametrize(("method", "before", "after"), [("random", 4, 4), ("hyperband", 10, 8)])
def test_oracle_goes_on_in_another_process_as_it_would_have(method, before, after):
    tuned = settings(optimizer=OPTIMIZERS, trials=26, method=method)
    plan = plan_search(tuned, 0)
    oracle = build_oracle(tuned, plan)
    ask(oracle, before)
    goes_on_in_another_process(oracle, tuned, plan, after)


def goes_on_in_another_process(oracle, tuned, plan, after):
    other = build_oracle(tuned, plan)
    tuning.restore_oracle(other, json.loads(json.dumps(tuning.oracle_state(oracle))))
    expected = ask(oracle, after)
    assert ask(other, after) == expected
    assert len({json.dumps(one) for one in expected}) == after
    return other


@pytest.mark.parametrize(("method", "count"), [("random", 30), ("hyperband", 46), ("bayesian", 19)])
def test_trials_that_run_at_once_are_those_that_would_run_one_by_one(method, count):
    """Also where some fail, which makes Hyperband's rounds shorter.

    The Bayesian oracle asks its Gaussian process, which takes a second a trial, for two: the last, and one more.
    """
    tuned = settings(optimizer=OPTIMIZERS, trials=count + 1 if method == "bayesian" else count, method=method)
    plan = plan_search(tuned, 0)
    one_by_one = build_oracle(tuned, plan)
    expected, _ = ask_in_waves(one_by_one, count, 1)
    for most in (4, 100):
        waves = build_oracle(tuned, plan)
        values, sizes = ask_in_waves(waves, count, most)
        assert values == expected
        assert comparable(waves) == comparable(one_by_one)
        assert max(sizes) == min(most, {"random": 30, "hyperband": 9, "bayesian": 15}[method])
    if method == "random":
        assert expected == ask(build_oracle(tuned, plan), count)
    if method == "bayesian":
        others = list(one_by_one.trials.values())[:-1]
        assert sum(trial.status == "COMPLETED" for trial in others) == 15
        other = goes_on_in_another_process(one_by_one, tuned, plan, 1)
        assert other._random_state.uniform() == one_by_one._random_state.uniform()


def test_bayesian_search_tries_nothing_twice():
    """Left alone, Keras Tuner's oracle asks for the best place again and again."""
    rates, dropouts = [0.001, 0.002, 0.003, 0.004, 0.005], [0.0, 0.1, 0.2, 0.3]
    tuned = settings(learning_rate=rates, dropout=dropouts, optimizer=["adam"], hidden_layers=[0], trials=30)
    oracle = build_oracle(tuned, plan_search(tuned.model_copy(update={"method": "bayesian"}), 0))
    values = ask(oracle, 15)  # the first 12 are random
    assert len({json.dumps(one) for one in values}) == 15


def test_interrupted_search_ends_as_if_it_had_not_been(root, hyperband, monkeypatch, capsys):
    _, expected = hyperband
    calls = iter(range(1, 100))
    real = tuning.fit_either_way

    def stopping(*arguments, **options):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(tuning, "fit_either_way", stopping)
    with pytest.raises(SystemExit):
        search(root, method="hyperband", trials=6)
    assert "stopped after 4 of 6 trials; the same command goes on there" in capsys.readouterr().err
    parents, children = runs_of(root)
    assert (parents[-1].info.status, children[-1].info.status) == ("KILLED", "KILLED")

    study = search(root, method="hyperband", trials=6)
    assert "4 trials of this search are there; going on" in capsys.readouterr().out
    pd.testing.assert_frame_equal(without_times(study), without_times(expected))
    parents, children = runs_of(root)
    assert [parent.info.status for parent in parents] == ["FINISHED"]
    names = [child.info.run_name for child in children if child.info.status == "FINISHED"]
    assert names == [f"trial {number}" for number in range(1, 7)]
    assert not list((root / ".dvc/tmp/tuning").glob("*/weights"))


def test_hyperband_trains_the_best_of_the_short_trials_on(hyperband):
    trials = hyperband[1].trials
    assert trials["epochs"].tolist() == [2, 2, 2, 6, 6, 6]
    short, longer = trials.head(3), trials.iloc[3]
    best = short.loc[short["val_loss"].idxmin()]
    assert best[list(tuning.SEARCHED)].tolist() == longer[list(tuning.SEARCHED)].tolist()
    assert longer["val_loss"] <= best["val_loss"]


def test_killed_command_goes_on_and_ends_its_runs(root, workshop):
    command = ["python", "-m", "catdog.cli", "tune", "--method", "random", "--trials", "200"]
    process = Project(root, workshop.home, warm=True).start(*command, PYTHONPATH=str(ROOT / "src"), DVC_ROOT=str(root))

    def rows():
        found = list((root / ".dvc/tmp/tuning").glob("*/search.json"))
        return found and len(json.loads(found[0].read_text())["rows"])

    try:
        wait_until(rows)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = rows()
    assert 0 < done < 200
    study = search(root, method="random", trials=done + 1)
    assert study.trials["trial"].tolist() == list(range(1, done + 2))
    (parent,), children = runs_of(root)
    assert parent.info.status == "FINISHED"
    finished = [child.info.run_name for child in children if child.info.status == "FINISHED"]
    assert finished == [f"trial {number}" for number in range(1, done + 2)]
    assert {child.info.status for child in children} <= {"FINISHED", "KILLED"}


def test_finished_search_is_only_shown(searched, five_trials, capsys):
    _, first = five_trials
    before = len(runs_of(searched)[1])
    again = search(searched, method="random", trials=5)
    assert "5 trials of this search are there; nothing is left to try" in capsys.readouterr().out
    pd.testing.assert_frame_equal(again.trials, first.trials)
    assert len(search(searched, method="random", trials=1).trials) == 1
    assert len(runs_of(searched)[1]) == before
    more = search(searched, method="random", trials=6)
    pd.testing.assert_frame_equal(more.trials.head(5), first.trials)
    assert len(more.trials) == 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: set_params(root, {"tune.dropout": "0.0..0.2"}), "the search space"),
        (lambda root: set_params(root, {"train.l2": 0.001}), "the block train"),
        (lambda root: write_features(root, seed=5), "the features"),
        (lambda root: (set_params(root, {"seed": 4}), write_lock(root)), "the seed"),
    ],
    ids=["space", "train", "features", "seed"],
)
def test_change_starts_anew_and_is_told(searched, capsys, change, told):
    change(searched)
    search(searched, method="random", trials=1)
    lines = capsys.readouterr().out.splitlines()
    assert f"tune: starting anew, because of a change since the last search: {told}" in lines


def test_parameters_of_the_best_trial_do_not_start_anew(searched, five_trials, capsys):
    _, study = five_trials
    set_params(
        searched,
        {key: json.loads(value) if key != "train.optimizer" else value for key, value in study.overrides.items()},
    )
    again = search(searched, method="random", trials=5)
    assert "nothing is left to try" in capsys.readouterr().out
    assert "train.epochs" in study.overrides
    assert "train.epochs" not in again.overrides


def test_second_process_at_the_same_search_is_refused(searched):
    (folder,) = [path for path in (searched / ".dvc/tmp/tuning").iterdir() if path.is_dir()]
    with FileLock(f"{folder}.lock"), pytest.raises(CatdogError, match="another process is at this very search"):
        search(searched, method="random", trials=6)


def test_search_works_without_mlflow_where_it_may(root, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'params.yaml'}")
    with pytest.raises(CatdogError, match="tracking store"):
        search(root, method="random", trials=1)
    set_params(root, {"tracking.required": False})
    assert len(search(root, method="random", trials=1).trials) == 1
    assert "working without MLflow" in capsys.readouterr().err


def test_search_without_an_experiment_to_go_into(root, capsys):
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    client.delete_experiment(client.get_experiment_by_name("catdog").experiment_id)
    with pytest.raises(CatdogError, match=r"the MLflow experiment catdog was deleted; `.*restore.*` restores it"):
        search(root, method="random", trials=1)
    set_params(root, {"tracking.required": False})
    assert len(search(root, method="random", trials=1).trials) == 1
    assert "working without MLflow" in capsys.readouterr().err


# Mistakes


def test_missing_features_are_told(root):
    shutil.rmtree(root / paths.FEATURES)
    with pytest.raises(CatdogError, match="there are no features in data/features; run `dvc repro` first"):
        search(root)


@pytest.mark.parametrize(
    ("name", "value", "had"),
    [
        ("backbone", "vgg16", "mobilenetv2"),
        ("weights", "random", "imagenet"),
        ("embed.pooling", "max", "avg"),
        ("augment.views", 2, "0"),
        ("dataset", "microsoft", "sample"),
        ("split.val", 0.2, "0.15"),
        ("preprocess.image_size", 160, "224"),
        ("seed", 21, "20"),
        ("augment.flip", "none", "horizontal"),
    ],
)
def test_features_of_other_parameters_are_told(root, name, value, had):
    set_params(root, {name: value})
    message = f"were made with {name} = {had}, but params.yaml says {value}; run `dvc repro` first"
    with pytest.raises(CatdogError, match=message):
        search(root)


def test_features_of_other_images_are_told(root):
    lock = root / "dvc.lock"
    lock.write_text(lock.read_text().replace("md5: a", "md5: c", 1))
    with pytest.raises(CatdogError, match="data/features were made before data/tfrecords changed; run `dvc repro` f"):
        search(root)
    lock.write_text("stages: {}")
    with pytest.raises(CatdogError, match=r"dvc\.lock knows no run of the stage download; run `dvc repro` first"):
        search(root)


def test_numbers_that_are_written_in_another_way_are_the_same(root):
    lock = root / "dvc.lock"
    lock.write_text(lock.read_text().replace("image_size: 224", "image_size: 224.0").replace("test: 0.2", "test: 2e-1"))
    assert "2e-1" in lock.read_text()
    assert len(search(root, method="random", trials=1).trials) == 1


def test_images_of_other_parameters_are_told_before_they_are_embedded(pictures):
    set_params(pictures, {"preprocess.jpeg_quality": 80})
    params = params_of(pictures)
    message = "the images in data/tfrecords were made with preprocess.jpeg_quality = 95, but params.yaml says 80; run"
    with pytest.raises(CatdogError, match=message):
        features_of(pictures, params, with_backbone(params, "vgg16"))
    # What only the embedding depends on may change: the features are made with it.
    set_params(pictures, {"preprocess.jpeg_quality": 95, "embed.batch_size": 4})
    params = params_of(pictures)
    assert features_of(pictures, params, with_backbone(params, "vgg16")).is_dir()


def test_parameters_that_no_trial_could_have_are_told_before_any(root):
    set_params(root, {"train.warmup": 3})
    with pytest.raises(CatdogError, match=r"train\.warmup = 3 epochs is longer than the shortest trial, which has 2"):
        search(root, method="hyperband", trials=6)
    assert len(search(root, method="random", trials=1).trials) == 1
    set_params(root, {"train.output": "sigmoid"})
    (root / paths.PREPROCESS_REPORT).write_text(json.dumps({"classes": ["a", "b", "c"]}))
    with pytest.raises(CatdogError, match="the data has 3"):
        search(root, method="random", trials=1)
    with pytest.raises(CatdogError, match=r"tune\.method = 'grid'"):
        search(root, method="grid")


# The command


def test_command_prints_five_trials_and_the_line_of_the_best(searched, capsys):
    assert cli.main(["tune", "--method", "random", "--trials", "6"]) == 0
    printed = capsys.readouterr()
    study = search(searched, method="random", trials=6)
    lines = printed.out.splitlines()
    header = next(number for number, line in enumerate(lines) if "val_loss" in line)
    shown = [float(line.split()[0]) for line in lines[header + 1 : header + 6]]
    assert shown == [round(loss, 4) for loss in rank(study.trials)["val_loss"].head(5)]
    assert lines[header + 6] == ""
    assert lines[-1].startswith("dvc exp run -S train.learning_rate=")
    changes = [after.strip("'") for before, after in pairwise(lines[-1].split()) if before == "-S"]
    assert dict(change.split("=") for change in changes) == study.overrides
    assert printed.err == ""


def test_apply_runs_the_line(root, monkeypatch, capsys):
    program = root / "bin" / "dvc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\npwd > '{root}/seen'\nprintf '%s\\n' \"$@\" >> '{root}/seen'\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert cli.main(["tune", "--method", "random", "--trials", "1", "--seed", "0", "--apply"]) == 3
    place, *arguments = (root / "seen").read_text().splitlines()
    assert place == str(root)
    assert capsys.readouterr().out.splitlines()[-1].replace("'", "") == " ".join(["dvc", *arguments])
    search(root, method="random", trials=1, seed=0)
    assert "1 trials of this search are there; nothing is left to try" in capsys.readouterr().out


def test_line_that_dvc_cannot_write_is_told(root, capsys):
    """DVC 3.67 leaves a broken file where a list that it wrote before is emptied."""
    from dvc.utils.hydra import apply_overrides

    apply_overrides(root / "params.yaml", ["train.hidden_units=[16]"])
    set_params(root, {"tune.hidden_layers": [0]})
    assert cli.main(["tune", "--method", "random", "--trials", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("tune: DVC damages params.yaml when it empties a list")
    assert cli.main(["tune", "--method", "random", "--trials", "1", "--apply"]) == 2
    assert "write `hidden_units: []` into its block train yourself" in capsys.readouterr().err
    shutil.copy(ROOT / "params.yaml", root)
    set_params(root, {"tune.hidden_layers": [0], "tune.epochs": 1})
    assert cli.main(["tune", "--method", "random", "--trials", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("dvc exp run")


def test_mistakes_of_the_command_are_one_sentence(root, capsys):
    for arguments, told in (
        (["--trials", "3", "--method", "hyperband"], "tune.trials = 3 is too few"),
        (["--backbones", "vgg-16"], "no backbone 'vgg-16'"),
        (["--backbones", "vgg16"], "there are no images in data/tfrecords; run `dvc repro` first"),
    ):
        assert cli.main(["tune", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("catdog: ")
        assert told in error
        assert len(error.splitlines()) == 1
    set_params(root, {"weights": "mine.weights.h5"})
    assert cli.main(["tune", "--backbones", "vgg16"]) == 2
    assert "--backbones needs imagenet or random" in capsys.readouterr().err


# Several backbones


def test_ranking_puts_the_best_backbone_first():
    def study(backbone, *losses):
        rows = [
            {"trial": number, "status": "finished", "val_loss": loss, "val_accuracy": 0.5, "learning_rate": number}
            | {"optimizer": "adam", "hidden_units": "[]", "dropout": 0.0, "epochs": 3}
            for number, loss in enumerate(losses, start=1)
        ]
        return tuning.Study(backbone, pd.DataFrame(rows), {})

    table = ranking([study("a", 0.4, 0.3), study("b", 0.2, 0.9)])
    assert table[["backbone", "val_loss", "trial"]].values.tolist() == [["b", 0.2, 1], ["a", 0.3, 2]]


def test_rank_shows_a_trial_that_was_trained_on_once():
    row = {"status": "finished", "learning_rate": 0.1, "optimizer": "adam", "hidden_units": "[]", "dropout": 0.0}
    trials = pd.DataFrame(
        [
            {**row, "trial": 1, "val_loss": 0.3, "epochs": 2},
            {**row, "trial": 2, "val_loss": 0.4, "epochs": 2, "dropout": 0.5},
            {**row, "trial": 3, "val_loss": 0.3, "epochs": 6},
            {**row, "trial": 4, "val_loss": None, "epochs": 6, "status": "failed"},
        ]
    )
    assert rank(trials)["trial"].tolist() == [3, 2]


@pytest.fixture
def pictures(root):
    """Shards of noise for train and val; those of test are listed, but not there."""
    import tensorflow as tf

    from catdog.images import encode_jpeg

    rng = np.random.default_rng(0)

    def encode(row):
        pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        fields = {"image/encoded": encode_jpeg(pixels, 95), "image/path": row.path.encode()}
        features = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for name, value in fields.items()
        }
        features["image/class/label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[row.label]))
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    folder = root / paths.TFRECORDS
    shards = []
    for split, number in (("train", 2), ("val", 1), ("test", 1)):
        for index in range(number):
            rows = tuple(ImageRow(f"{split}/{position}.jpg", position % 2) for position in range(12))
            name = f"{split}-{index:05d}-of-{number:05d}.tfrecord"
            shards.append(write_shard(Shard(name, split, rows), folder, encode))
    write_index(folder, shards, ["cat", "dog"], size=32)
    report = {"classes": ["cat", "dog"], "image_size": 32, "images": {"train": 24, "val": 12, "test": 12}}
    (root / paths.PREPROCESS_REPORT).write_text(json.dumps(report))
    (folder / "test-00000-of-00001.tfrecord").unlink()
    set_params(root, {"backbone": "resnet50", "weights": "random", "preprocess.image_size": 32, "augment.views": 1})
    write_lock(root)
    return root


def test_other_backbones_are_embedded_once_and_ranked(pictures, capsys):
    params = params_of(pictures)
    variant = with_backbone(params, "vgg16")
    folder = features_of(pictures, params, variant)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert len(written) == 3 * 2 + 2  # features and labels of three shards, a copy of two
    assert np.load(folder / "val-00000-of-00001.labels.npy").tolist() == [0, 1] * 6
    assert "computing the features of vgg16 for 36 images" in capsys.readouterr().out

    # A process that was killed before its last files.
    lost = ["train-00001-of-00002.view-001.npy", "val-00000-of-00001.labels.npy", "features.json"]
    expected = np.load(folder / lost[0])
    for name in lost:
        (folder / name).unlink()
    assert features_of(pictures, params, variant) == folder
    capsys.readouterr()
    np.testing.assert_array_equal(np.load(folder / lost[0]), expected)
    kept = {path.name for path in folder.glob("*.npy") if path.stat().st_mtime_ns == written[path.name]}
    assert written.keys() - kept == {*lost[:2], "val-00000-of-00001.features.npy"}

    set_params(pictures, {"tune.epochs": 2})
    assert cli.main(["tune", "--backbones", "vgg16,vgg16+mobilenetv2", "--method", "random", "--trials", "1"]) == 0
    printed = capsys.readouterr().out
    assert "computing the features of vgg16 for" not in printed
    assert "computing the features of vgg16+mobilenetv2 for" in printed
    table = printed.split("tune: the best of each backbone\n")[1].splitlines()
    losses = {line.split()[0]: float(line.split()[1]) for line in table[1:3]}
    assert losses.keys() == {"vgg16", "vgg16+mobilenetv2"}
    assert list(losses.values()) == sorted(losses.values())
    assert printed.splitlines()[-1].endswith(f"-S backbone={min(losses, key=losses.get)}")
    parents, _ = runs_of(pictures)
    assert {parent.data.params["backbone"] for parent in parents} == losses.keys()


def test_pipelines_own_backbone_is_searched_on_its_own_features(root):
    params = params_of(root)
    assert features_of(root, params, with_backbone(params, "mobilenetv2")) == root / paths.FEATURES
    with pytest.raises(CatdogError, match=r"preprocess\.image_size = 32 is too small for backbone inceptionv3"):
        with_backbone(validate_params({**params.model_dump(), "preprocess": {"image_size": 32}}), "inceptionv3")
