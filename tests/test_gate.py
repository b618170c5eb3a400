"""The gate is a pure function: what it asks, what it answers, and that every failure is told with both numbers."""

from dataclasses import replace

import numpy as np
import pytest

from catdog.comparison import ComparedRun
from catdog.config import PromoteParams, load_params, validate_params
from catdog.evaluation import LabelledPredictions
from catdog.gate import Candidate, check, failures, format_checks
from conftest import REPOSITORY

POLICY = PromoteParams()


def run(name, wrong, *, images=60, classes=("cat", "dog"), first=0, **metrics) -> ComparedRun:
    """A run that is wrong on some images, by their numbers; image `first` is the first that it judged."""
    labels = np.arange(images) % len(classes)
    predicted = labels.copy()
    predicted[list(wrong)] = (labels[list(wrong)] + 1) % len(classes)
    probabilities = np.full((images, len(classes)), 0.1, np.float32)
    probabilities[np.arange(images), predicted] = 0.9
    predictions = LabelledPredictions(
        tuple(f"{first + number}.jpg" for number in range(images)), labels, probabilities, classes, 0.5
    )
    reported = {"accuracy": 1 - len(wrong) / images, "ece": 0.02} | metrics
    return ComparedRun(name, {}, reported, predictions, groups={})


def candidate(wrong=range(3), **changes) -> Candidate:
    metrics = changes.pop("metrics", {})
    return replace(Candidate(run("new", wrong, **metrics), 0, 9_600_000, 20.0, ()), **changes)


def failed(candidate, incumbent=None, policy=POLICY) -> dict[str, str]:
    """The sentences of the checks that failed, by name."""
    return {entry.name: entry.sentence for entry in failures(check(candidate, incumbent, policy))}


def test_sound_model_passes_every_check():
    checks = check(candidate(), None, POLICY)
    assert failures(checks) == []
    names = ["accuracy", "calibration", "leaks", "incumbent", "size", "latency", "reproducible"]
    assert [entry.name for entry in checks] == names


def test_every_failed_check_is_told_with_both_numbers():
    policy = PromoteParams(min_accuracy=0.9, min_f1=0.8, max_ece=0.1, max_megabytes=5.0, max_latency_ms=15.0)
    bad = candidate(range(30), leaks=3, stale=("train: params.yaml changed (seed)",), metrics={"f1": 0.55, "ece": 0.25})
    told = failed(bad, run("v1.0.0", range(2)), policy)
    assert told["accuracy"] == "0.5, at least 0.9 is asked"
    assert told["f1"] == "0.55, at least 0.8 is asked"
    assert told["calibration"] == "error 0.25, at most 0.1 is allowed"
    assert told["leaks"] == "3 between the splits, 0 are allowed"
    assert told["incumbent"].startswith("accuracy 0.5, v1.0.0 has 0.966667; new is right on 0 pictures where v1.0.0 is")
    assert told["size"] == "9.6 MB, at most 5 MB is allowed"
    assert told["latency"] == "20 ms, at most 15 ms is allowed"
    assert told["reproducible"].startswith("dvc.lock differs in 1 place")
    assert told["reproducible"].endswith("0 are allowed: train: params.yaml changed (seed)")
    numbers = {entry.name: (entry.found, entry.wanted) for entry in check(bad, run("v1.0.0", range(2)), policy)}
    assert numbers["accuracy"] == (0.5, 0.9) and numbers["incumbent"] == (0.5, pytest.approx(58 / 60))
    assert numbers["size"] == (9.6, 5.0) and numbers["latency"] == (20.0, 15.0) and numbers["leaks"] == (3, 0)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"metrics": {"accuracy": 0.8}}, "accuracy"),
        ({"metrics": {"ece": 0.1}}, "calibration"),
        ({"model_bytes": 5_000_000}, "size"),
        ({"latency_ms": 15.0}, "latency"),
    ],
)
def test_value_at_its_limit_passes(changes, name):
    policy = PromoteParams(max_megabytes=5.0, max_latency_ms=15.0)
    assert name not in failed(candidate(**changes), policy=policy)


def test_limit_of_0_is_none_and_an_unknown_latency_fails_only_against_a_limit():
    assert failed(candidate(model_bytes=10**12, latency_ms=10**9)) == {}
    assert failed(candidate(latency_ms=None)) == {}
    told = failed(candidate(latency_ms=None), policy=PromoteParams(max_latency_ms=15.0))
    assert told == {"latency": "not known to this tracking store, at most 15 ms is allowed"}


def test_what_is_not_known_does_not_pass():
    without = replace(candidate().run, metrics={"test_images": 60})
    assert set(failed(candidate(run=without, leaks=None))) == {"accuracy", "calibration", "leaks"}
    assert "reported are test_images" in failed(candidate(run=without))["accuracy"]


# ---------------------------------------------------------------------------------------------------- the incumbent


def test_model_that_the_paired_test_calls_worse_fails_even_where_its_accuracy_is_high():
    # 60 images: 8 more mistakes, and all mistakes of the incumbent among them.
    assert set(failed(candidate(range(10)), run("v1.0.0", range(2)))) == {"incumbent"}


def test_difference_that_the_images_cannot_tell_passes_and_says_so():
    # As many more mistakes as above, but on other images: 12 against 6 is p = 0.24.
    checks = check(candidate(range(12)), run("v1.0.0", range(54, 60)), POLICY)
    (told,) = [entry for entry in checks if entry.name == "incumbent"]
    assert told.passed and "no difference can be told with 60 test images" in told.sentence


def test_near_duplicates_do_not_make_a_model_worse():
    # Three scenes of four pictures each, all of which the candidate has wrong: 12 mistakes, but of three kinds.
    groups = {f"{number}.jpg": str(number // 4) for number in range(240)}
    serving, new = run("v1.0.0", (), images=240), run("new", range(12), images=240)
    assert set(failed(candidate(run=new), serving)) == {"incumbent"}
    checks = check(candidate(run=replace(new, groups=groups)), replace(serving, groups=groups), POLICY)
    (told,) = [entry for entry in checks if entry.name == "incumbent"]
    assert (
        told.passed and "by a bootstrap of whole groups of near-duplicates: no difference can be told" in told.sentence
    )


def test_unknown_near_duplicates_are_told():
    unknown = [replace(entry, groups=None) for entry in (run("v1.0.0", range(3)), run("new", range(3)))]
    checks = check(candidate(run=unknown[1]), unknown[0], POLICY)
    (told,) = [entry for entry in checks if entry.name == "incumbent"]
    assert told.passed and "near-duplicates among the test images are not known" in told.sentence


def test_better_model_passes():
    assert failed(candidate(range(2)), run("v1.0.0", range(20))) == {}


def test_models_that_judged_other_images_are_not_compared():
    told = failed(candidate(), run("v1.0.0", range(3), first=1000))
    assert "were tested on different images" in told["incumbent"]


def test_models_of_other_classes_are_not_compared():
    told = failed(candidate(), run("v1.0.0", range(3), classes=("cat", "dog", "horse")))
    assert "compare runs with the same classes" in told["incumbent"]


def test_incumbent_that_cannot_be_read_fails():
    told = failed(candidate(), "v1.0.0 cannot be compared: reports/predictions.csv of v1.0.0 does not exist")
    assert told == {"incumbent": "v1.0.0 cannot be compared: reports/predictions.csv of v1.0.0 does not exist"}


# ---------------------------------------------------------------------------------------------------- the rest


def test_table_of_checks_is_aligned():
    lines = format_checks(check(candidate(range(30)), None, POLICY)).splitlines()
    assert lines[0] == "  FAIL  accuracy      0.5, at least 0.8 is asked"
    assert lines[1] == "  ok    calibration   error 0.02, at most 0.1 is allowed"
    assert lines[-1].startswith("  ok    reproducible  ")


def test_parameters_from_before_the_registry_get_its_defaults():
    tree = load_params(REPOSITORY / "params.yaml").model_dump()
    assert tree.pop("promote") == POLICY.model_dump()
    assert validate_params(tree).promote == POLICY


def test_every_minimum_of_the_policy_is_asked():
    names = [name.removeprefix("min_") for name in PromoteParams.model_fields if name.startswith("min_")]
    policy = PromoteParams(**{f"min_{name}": 0.9 for name in names})
    good, bad = (dict.fromkeys(names, value) for value in (0.9, 0.8))
    assert failed(candidate(metrics=good), policy=policy) == {}
    assert set(failed(candidate(metrics=bad), policy=policy)) == set(names)


def test_minimum_of_0_is_none():
    policy = PromoteParams(min_accuracy=0.0)
    assert "accuracy" not in [entry.name for entry in check(candidate(range(60)), None, policy)]
