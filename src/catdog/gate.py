"""The gate in front of the model registry: may this model be promoted?

Everything here is a pure function of what was read before: the candidate, the model that serves now (the incumbent),
and the policy, which is the block `promote` of params.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from catdog.comparison import UNKNOWN_GROUPS, ComparedRun, Verdict, compare, verdict_sentences
from catdog.config import PromoteParams
from catdog.errors import CatdogError

MINIMA = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc")
"""Metrics for which the policy may ask a least value, `min_<metric>`."""


@dataclass(frozen=True)
class Candidate:
    """What the gate must know of a model."""

    run: ComparedRun  # its metrics and its predictions of the test images
    leaks: int | None  # images in two splits at once, by the audit of the data; None: there is no audit
    model_bytes: int
    latency_ms: float | None  # of one picture, as `evaluate` measured it; None: this tracking store does not know it
    stale: tuple[str, ...]  # in what dvc.lock is not what the code and the parameters would give, a sentence each


@dataclass(frozen=True)
class Check:
    """One question that the gate asks.

    Attributes:
        name: of what is checked.
        passed: whether the answer is good enough.
        sentence: what was found and what is asked, both with their numbers; without a full stop.
        found: the number that was found; None: there is none.
        wanted: the number that it was held against; None: nothing was, or there is none.
    """

    name: str
    passed: bool
    sentence: str
    found: float | None = None
    wanted: float | None = None


def check(candidate: Candidate, incumbent: ComparedRun | str | None, policy: PromoteParams) -> list[Check]:
    """Answers every question, also after one that failed.

    Args:
        candidate: the model that is to be promoted.
        incumbent: the model that serves now; None: none does; a text: why it cannot be compared.
        policy: what is asked.
    """
    return [
        *_check_minimum(candidate, policy),
        _check_calibration(candidate, policy),
        _check_leaks(candidate),
        _check_incumbent(candidate, incumbent),
        _check_limit("size", "MB", candidate.model_bytes / 1e6, policy.max_megabytes),
        _check_limit("latency", "ms", candidate.latency_ms, policy.max_latency_ms),
        _check_state(candidate),
    ]


def failures(checks: Sequence[Check]) -> list[Check]:
    """Returns the checks that failed, in their order."""
    return [entry for entry in checks if not entry.passed]


def format_checks(checks: Sequence[Check]) -> str:
    """Returns one line a check, the names aligned."""
    width = max(len(entry.name) for entry in checks)
    return "\n".join(
        f"  {'ok  ' if entry.passed else 'FAIL'}  {entry.name:<{width}}  {entry.sentence}" for entry in checks
    )


def _check_minimum(candidate: Candidate, policy: PromoteParams) -> Iterator[Check]:
    for name in MINIMA:
        found, wanted = candidate.run.metrics.get(name), getattr(policy, f"min_{name}")
        if not wanted:
            continue
        if found is None:
            known = ", ".join(candidate.run.metrics)
            sentence = f"no metric {name} is reported, at least {wanted:g} is asked; reported are {known or 'none'}"
            yield Check(name, False, sentence, None, wanted)
        else:
            yield Check(name, found >= wanted, f"{found:.6g}, at least {wanted:g} is asked", found, wanted)


def _check_calibration(candidate: Candidate, policy: PromoteParams) -> Check:
    found, wanted = candidate.run.metrics.get("ece"), policy.max_ece
    if found is None:
        return Check("calibration", False, f"no error ece is reported, at most {wanted:g} is allowed", None, wanted)
    return Check("calibration", found <= wanted, f"error {found:.6g}, at most {wanted:g} is allowed", found, wanted)


def _check_leaks(candidate: Candidate) -> Check:
    if candidate.leaks is None:
        return Check("leaks", False, "the data has no audit, 0 leaks between the splits are allowed", None, 0)
    sentence = f"{candidate.leaks:,} between the splits, 0 are allowed"
    return Check("leaks", candidate.leaks == 0, sentence, candidate.leaks, 0)


def _check_incumbent(candidate: Candidate, incumbent: ComparedRun | str | None) -> Check:
    name = "incumbent"
    if incumbent is None:
        return Check(name, True, "no model serves yet")
    if isinstance(incumbent, str):
        return Check(name, False, incumbent)
    try:
        comparison = compare([incumbent, candidate.run])
    except CatdogError as error:
        return Check(name, False, str(error))
    (verdict,) = comparison.verdicts
    if not verdict.differences:
        return Check(name, False, "; ".join(verdict.cautions))
    estimates = comparison.metrics["accuracy"]
    assert estimates[0] is not None and estimates[1] is not None
    wanted, found = estimates[0].value, estimates[1].value
    return Check(name, verdict.outcome != "worse", _compared(verdict, found, wanted), found, wanted)


def _compared(verdict: Verdict, found: float, wanted: float) -> str:
    told = verdict_sentences(verdict)[0].removeprefix("Accuracy: ").removesuffix(".")
    caution = f"; {UNKNOWN_GROUPS}" if verdict.grouped is None else ""
    return f"accuracy {found:.6g}, {verdict.baseline} has {wanted:.6g}; {told}{caution}"


def _check_limit(name: str, unit: str, found: float | None, limit: float) -> Check:
    """A limit of 0 is none."""
    asked = f"at most {limit:g} {unit} is allowed" if limit else "no limit is set"
    if found is None:
        sentence = f"not known to this tracking store, {asked}"
        return Check(name, not limit, sentence, None, limit or None)
    return Check(name, not limit or found <= limit, f"{found:.3g} {unit}, {asked}", found, limit or None)


def _check_state(candidate: Candidate) -> Check:
    if not candidate.stale:
        return Check("reproducible", True, "dvc.lock is what code and parameters say", 0, 0)
    count = len(candidate.stale)
    places = f"{count} place{'' if count == 1 else 's'}"
    sentence = f"dvc.lock differs in {places}, 0 are allowed: {'; '.join(candidate.stale)}"
    return Check("reproducible", False, sentence, count, 0)
