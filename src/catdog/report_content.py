"""What the report page and the model card are written from, and the sentences that both take from the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from catdog.backbones import get_backbones
from catdog.calibration import calibration_error
from catdog.config import Params
from catdog.model import ModelInfo
from catdog.paths import SPLITS
from catdog.plots import decimals
from catdog.slices import find_weak

MEASURE_ROBUSTNESS = "dvc exp run -S evaluate.corruptions=500"
CONFIDENT = 0.9
"""The probability from which a mistake counts as a confident one."""

_UNDEFINED = "n/a"
_FEW_IMAGES = 30  # of a class in the test split: a share of so few is a rough number
_NOTEWORTHY = 3  # times that one class is called another
_WIDE_INTERVAL = 0.05
_UNEVEN_CALIBRATION = 0.05
_IMBALANCE = 3.0
_NAMES_IN_SENTENCE = 3


@dataclass(frozen=True)
class ReportContent:
    """All that a report is written from. It holds no time and no rate, so that equal runs give equal reports.

    Attributes:
        tables: by name, as the evaluate stage writes them: metrics, classes, calibration, slices, corruptions (absent
            or with its first row alone where nothing was measured) and predictions.
        metrics: the content of reports/metrics.json: accuracy, accuracy_low, accuracy_high, ..., test_images. None or
            NaN stands for a metric that the test split does not define.
        pictures: PNG files by name: confusion, roc, precision_recall, calibration, scores, learning_curves, slices,
            corruptions, mistakes, uncertain, best, feature_map. What is absent is left out of the page.
        info: what the model file says about itself.
        params: of the run.
        facts: the content of reports/data.json (`counts` by split and class, `rejected`, and where known `method`,
            `rejected_by_reason`, `in_duplicate_groups`, `groups_with_two_labels`, `leaks`, `unlabelled`), and
            `dataset`, its name, and `dataset_hash`, with the kind of hash before a colon.
        training: the content of reports/train.json.
        weights: one entry a network, from `describe_weights`.
        model_bytes: size of the model file.
    """

    tables: Mapping[str, pd.DataFrame]
    metrics: Mapping[str, float | None]
    pictures: Mapping[str, Path]
    info: ModelInfo
    params: Params
    facts: Mapping[str, Any]
    training: Mapping[str, Any]
    weights: Sequence[Mapping[str, str]]
    model_bytes: int

    @property
    def test_images(self) -> int:
        """Images in the test split."""
        return len(self.tables["predictions"])

    @property
    def corruptions(self) -> pd.DataFrame:
        """The rows of the corruptions that were measured; none where none was."""
        table = self.tables.get("corruptions", pd.DataFrame({"corruption": []}))
        return table[table["corruption"] != "none"]

    @property
    def fine_tuned(self) -> bool:
        """Whether the saved model holds fine-tuned weights, not only whether fine-tuning was tried."""
        return str(self.training.get("fine_tuning", {}).get("kept", "")) == "yes"


@dataclass(frozen=True)
class Finding:
    """One sentence that the numbers support.

    Attributes:
        kind: `good`; `note`; or `check` where a reader should look before trusting the model.
        text: plain text; it may hold class names, so whoever shows it escapes it.
        command: a command that the sentence leads to, or "".
    """

    kind: Literal["good", "note", "check"]
    text: str
    command: str = ""


METRIC_NAMES: Mapping[str, tuple[str, str]] = {
    "accuracy": ("accuracy", "share of the test images that are called by their right class"),
    "balanced_accuracy": ("balanced accuracy", "mean over the classes of the share that is recognised"),
    "precision": ("precision", "of the images called a class, the share that is; mean over the classes"),
    "recall": ("recall", "of the images of a class, the share called so; mean over the classes"),
    "f1": ("F1", "harmonic mean of precision and recall; mean over the classes"),
    "roc_auc": ("ROC AUC", "area under the ROC curve; 0.5 is chance, 1 is perfect"),
    "pr_auc": ("PR AUC", "area under the precision-recall curve; 1 is perfect"),
    "log_loss": ("log loss", "mean of minus the logarithm of the right class's probability; 0 is perfect"),
    "brier": ("Brier score", "squared error of the probabilities; 0 is perfect"),
    "ece": ("calibration error", "expected calibration error: how far confidence and accuracy lie apart; 0 is perfect"),
}
"""The metrics of the reports in their order: what each is called, and what it means."""

_SHARES = frozenset({"accuracy", "balanced_accuracy", "precision", "recall", "f1", "ece"})


def describe_weights(backbone: str, weights: str, sha256: str) -> list[dict[str, str]]:
    """Says of each network where its weights come from.

    Args:
        backbone: one name, or several joined by "+".
        weights: "imagenet", "random" or a path; for several networks one for all, or one each joined by "+".
        sha256: of the weights' files, as reports of the embed stage give it: one each joined by "+", or "none".

    Returns:
        backbone, source, licence (SPDX, or what is known) and sha256, all text, for each network.
    """
    records = get_backbones(backbone)
    # A single path may hold a "+" itself.
    parts = weights.split("+") if len(records) > 1 and "+" in weights else [weights] * len(records)
    hashes = sha256.split("+") if len(records) > 1 else [sha256]
    described = []
    for record, part, digest in zip(records, parts, hashes, strict=True):
        source, licence = {
            "imagenet": (f"ImageNet weights by {record.source}", record.license),
            "random": ("random values, not pretrained", "none needed"),
        }.get(part, (f"the file {part}", "unknown: ask who made the file"))
        described.append({"backbone": record.name, "source": source, "licence": licence, "sha256": digest})
    return described


def percent(value: float | None) -> str:
    """Writes a share as "96.7 %", with more digits where one would make nearly all into all, or something into nothing.

    None and NaN, a share of nothing, give `n/a`.
    """
    if value is None or math.isnan(value):
        return _UNDEFINED
    return f"{decimals(100 * value, 1, ends=(0, 100))} %"


def metric_value(name: str, value: float | None) -> str:
    """Writes a metric: those that are shares in per cent, the others with four digits; `n/a` for None and NaN."""
    if name in _SHARES or value is None or math.isnan(value):
        return percent(value)
    return f"{value:.4f}"


def metric_range(name: str, low: float | None, high: float | None) -> str:
    """Writes an interval as "93.3 % to 99.2 %", as `metric_value` does; `n/a` where it is not defined."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return _UNDEFINED
    return f"{metric_value(name, low)} to {metric_value(name, high)}"


def metric_rows(content: ReportContent) -> list[dict[str, str]]:
    """Returns the metrics in the reports' order as text: name, value, interval and meaning."""
    found = {row["metric"]: row for row in content.tables["metrics"].to_dict("records")}
    return [
        {
            "name": label,
            "value": metric_value(name, found[name]["value"]),
            "interval": metric_range(name, found[name]["low"], found[name]["high"]),
            "meaning": meaning,
        }
        for name, (label, meaning) in METRIC_NAMES.items()
        if name in found
    ]


def class_rows(content: ReportContent) -> list[dict[str, str]]:
    """Returns the classes as text, the lowest F1 first: name, images, and precision, recall, F1 with intervals."""
    rows = content.tables["classes"].sort_values("f1", kind="stable", na_position="first").to_dict("records")
    return [
        {"name": str(row["class"]), "images": f"{row['images']:,}"}
        | {
            f"{name}{part}": text
            for name in ("precision", "recall", "f1")
            for part, text in (
                ("", percent(row[name])),
                ("_interval", metric_range(name, row[f"{name}_low"], row[f"{name}_high"])),
            )
        }
        for row in rows
    ]


def confusion_rows(content: ReportContent, limit: int = 10) -> list[dict[str, str]]:
    """Returns the most frequent mistakes as text: label, predicted, images, and the share of the label's images."""
    predictions = content.tables["predictions"]
    sizes = predictions["label"].value_counts()
    pairs = predictions[~predictions["correct"]].groupby(["label", "predicted"]).size().reset_index(name="images")
    pairs = pairs.sort_values(["images", "label", "predicted"], ascending=[False, True, True]).head(limit)
    return [
        {
            "label": str(row["label"]),
            "predicted": str(row["predicted"]),
            "images": f"{row['images']:,}",
            "share": percent(row["images"] / sizes[row["label"]]),
        }
        for row in pairs.to_dict("records")
    ]


def count_rows(content: ReportContent) -> list[dict[str, Any]]:
    """Returns `name` and `counts`, images in the order of SPLITS, of each class, and of all in the last row."""
    counts = content.facts["counts"]
    rows = [
        {"name": name, "counts": [counts[split].get(name, 0) for split in SPLITS]} for name in content.info.class_names
    ]
    return [*rows, {"name": "all", "counts": [sum(counts[split].values()) for split in SPLITS]}]


def findings(content: ReportContent) -> list[Finding]:
    """Returns what is worth knowing, the result first, each sentence with the numbers that it rests on."""
    return [
        *_result(content),
        *_classes(content),
        *_mistakes(content),
        *_calibration(content),
        *_slices(content),
        *_robustness(content),
        *_data(content),
        *_training(content),
    ]


def _accuracy_range(content: ReportContent) -> tuple[float, float]:
    """The accuracy's interval; where nothing is wrong, resampling finds none, and the rule of three gives its low end.

    Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything all right?"
    """
    low, high = content.metrics["accuracy_low"], content.metrics["accuracy_high"]
    assert low is not None and high is not None, "an accuracy is always defined"
    return (max(0.0, 1 - 3 / content.test_images), high) if low == 1 else (low, high)


def _result(content: ReportContent) -> Iterable[Finding]:
    predictions = content.tables["predictions"]
    right, images = int(predictions["correct"].sum()), len(predictions)
    low, high = _accuracy_range(content)
    if right == images:
        yield Finding(
            "good",
            f"All {_plural(images, 'test image')} are called by their right class. So many show, at 95 %, an accuracy "
            f"above {percent(low)}; harder images would tell more.",
        )
    else:
        yield Finding(
            "note",
            f"{right:,} of {_plural(images, 'test image')} are called by their right class: {percent(right / images)}, "
            f"95 % interval {metric_range('accuracy', low, high)}.",
        )
    if high - low > _WIDE_INTERVAL:
        yield Finding(
            "check",
            f"The test split is small: the interval of the accuracy is {points(high - low)} wide, and a model a little "
            "better or worse cannot be told from this one.",
        )
    frequent = predictions["label"].value_counts().sort_index()
    chance = float(frequent.max()) / images
    if low <= chance < 1:
        yield Finding(
            "check",
            f"That is not clearly better than always saying {frequent.idxmax()}, which is right for {percent(chance)}.",
        )


def _classes(content: ReportContent) -> Iterable[Finding]:
    table = content.tables["classes"]
    table = table[table["images"] > 0].sort_values(["recall", "class"])
    if len(table) > 1:
        rows = table.to_dict("records")
        worst, best = rows[0], rows[-1]
        if worst["recall"] == best["recall"] < 1:
            yield Finding("good", f"All classes are recognised alike, {percent(worst['recall'])} of their images.")
        elif worst["recall"] < best["recall"]:
            yield Finding(
                "note",
                f"Recognised least is {worst['class']}, {percent(worst['recall'])} of its "
                f"{_plural(worst['images'], 'image')}; best is {best['class']}, {percent(best['recall'])}.",
            )
    images = table["images"].to_numpy(np.int64)
    errors = images - (table["recall"] * images).round().to_numpy(np.int64)
    behind = table["class"][find_weak(images, errors, int(images.sum()), int(errors.sum()))]
    if len(behind):
        yield Finding("check", f"Recognised clearly less often than the rest, beyond chance: {_listed(behind)}.")
    absent = sorted(set(content.info.class_names) - set(table["class"]))
    if absent:
        yield Finding("check", f"Without a test image, so that nothing is known: {_listed(absent)}.")
    few = table[table["images"] < _FEW_IMAGES]
    if len(few):
        yield Finding(
            "check",
            f"{len(few):,} of {_plural(len(table), 'class', 'classes')} with fewer than {_FEW_IMAGES} test images: "
            "what is said about such a class alone is rough.",
        )


def _mistakes(content: ReportContent) -> Iterable[Finding]:
    predictions = content.tables["predictions"]
    wrong = predictions[~predictions["correct"]]
    if wrong.empty:
        return
    counts = wrong.groupby(["label", "predicted"]).size().sort_values(ascending=False, kind="stable")
    if counts.iloc[0] >= _NOTEWORTHY and (len(counts) == 1 or counts.iloc[0] > counts.iloc[1]):
        label, predicted = counts.index[0]
        yield Finding(
            "note",
            f"The most frequent mistake is {label} called {predicted}: {counts.iloc[0]:,} of "
            f"{_plural(len(wrong), 'mistake')}.",
        )
    confident = int((wrong["confidence"] >= CONFIDENT).sum())
    sure = f"{100 * CONFIDENT:.0f} % or more"
    if confident:
        yield Finding(
            "check",
            f"{confident:,} of {_plural(len(wrong), 'mistake')} with a probability of {sure}. Look at these first: "
            "what is wrong may be the label. This lists labels in doubt:",
            "catdog audit",
        )
    else:
        yield Finding("good", f"No mistake with a probability of {sure}.")


def _calibration(content: ReportContent) -> Iterable[Finding]:
    predictions, temperature = content.tables["predictions"], content.info.temperature
    sure, right = float(predictions["confidence"].mean()), float(predictions["correct"].mean())
    low, high = _accuracy_range(content)
    error = content.metrics["ece"]
    assert error is not None, "a calibration error is always defined"
    numbers = f"on average {percent(sure)} sure and {percent(right)} right, calibration error {percent(error)}"
    if sure > high:
        yield Finding("check", f"The model is too sure of itself: {numbers}.")
    elif sure < low:
        yield Finding("check", f"The model is right more often than its probabilities say: {numbers}.")
    elif error > _UNEVEN_CALIBRATION and high - low <= _WIDE_INTERVAL:
        yield Finding("check", f"The probabilities fit on average, but not at every height: {numbers}.")
    else:
        yield Finding("good", f"The probabilities agree with what comes true: {numbers}.")
    if temperature != 1:
        before = calibration_error(content.tables["calibration"], "before")
        yield Finding(
            "note",
            f"The temperature {temperature:.3g}, fitted on the validation split, changes the calibration error of the "
            f"test split from {percent(before)} to {percent(error)}.",
        )


def _slices(content: ReportContent) -> Iterable[Finding]:
    table = content.tables["slices"]
    weak = table[table["weak"].astype(bool)].sort_values(["accuracy", "property", "slice"])
    accuracy = float(content.tables["predictions"]["correct"].mean())
    for row in weak.to_dict("records"):
        yield Finding(
            "check",
            f"Weak spot, {row['property']} {row['slice']}: {row['errors']:,} of {_plural(row['images'], 'image')} "
            f"wrong, {percent(row['accuracy'])} right, against {percent(accuracy)} of all.",
        )
    if weak.empty and len(table):
        properties = _listed(dict.fromkeys(table["property"]), limit=8)
        yield Finding(
            "good", f"None of {_plural(len(table), 'slice')} by {properties} is clearly weaker than the rest."
        )


def _robustness(content: ReportContent) -> Iterable[Finding]:
    table = content.corruptions
    if table.empty:
        yield Finding(
            "note", "How noise, blur, JPEG and the like change the result was not measured:", MEASURE_ROBUSTNESS
        )
        return
    (clean,) = [row for row in content.tables["corruptions"].to_dict("records") if row["corruption"] == "none"]
    worst = table.sort_values(["accuracy", "corruption", "severity"]).to_dict("records")[0]
    kinds = _plural(int(table["corruption"].nunique()), "corruption")
    if worst["lost"] <= 0:
        yield Finding("good", f"None of {kinds} lowers the accuracy on {_plural(worst['images'], 'test image')}.")
        return
    yield Finding(
        # More than chance does to as many images.
        "check" if worst["high"] < clean["low"] else "note",
        f"Of {kinds}, {worst['corruption']} at severity {worst['severity']} hurts most: {percent(worst['accuracy'])} "
        f"right in place of {percent(clean['accuracy'])}, on {_plural(worst['images'], 'test image')}.",
    )


def _data(content: ReportContent) -> Iterable[Finding]:
    facts = content.facts
    if facts["dataset"] == "sample":
        yield Finding(
            "note", "The sample's pictures are drawn by a program: the numbers say nothing about photographs."
        )
    if facts.get("leaks", 0):
        yield Finding(
            "check", f"{_plural(facts['leaks'], 'image')} in more than one split: the numbers here are too good."
        )
    if content.params.split.near_duplicate_bits < 0:
        yield Finding(
            "check",
            "Near-duplicates were not looked for (split.near_duplicate_bits = -1), so test images may resemble "
            "training images and the numbers here be too good.",
        )
    train = {name: count for name, count in sorted(facts["counts"]["train"].items()) if count}
    if train and max(train.values()) > _IMBALANCE * min(train.values()):
        rare, common = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
        sizes = (
            f"The classes differ in size: {_plural(train[common], 'training image')} of {common}, {train[rare]:,} of "
            f"{rare}. The balanced accuracy counts them alike"
        )
        if content.params.train.class_weights == "balanced":
            yield Finding("check", f"{sizes}.")
        else:
            yield Finding(
                "check",
                f"{sizes}; this lets rare classes count for more in training:",
                "dvc exp run -S train.class_weights=balanced",
            )
    if facts["rejected"]:
        yield Finding("note", f"{_plural(facts['rejected'], 'file')} rejected; reports/rejected.csv says why.")


def _training(content: ReportContent) -> Iterable[Finding]:
    training, params = content.training, content.params
    if training["best_epoch"] == training["epochs"]:
        tuned = content.fine_tuned
        done = training["fine_tuning"]["epochs"] if tuned else training["epochs"]
        block, limit = ("fine_tune", params.fine_tune.epochs) if tuned else ("train", params.train.epochs)
        if done >= limit:
            yield Finding(
                "check",
                f"The validation loss still fell when training ended at {block}.epochs = {limit}; more may help:",
                f"dvc exp run -S {block}.epochs={2 * limit}",
            )
    if "random" in content.info.weights.split("+"):
        yield Finding(
            "check", "The backbone starts from random weights, not pretrained ones, so its features mean little."
        )


def points(share: float) -> str:
    """Writes a difference of two shares: "5.8 points"."""
    return f"{100 * share:.1f} points"


def _plural(number: int, noun: str, plural: str = "") -> str:
    """Writes "1 image" or "1,200 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _listed(names: Iterable[object], limit: int = _NAMES_IN_SENTENCE) -> str:
    """Joins names for a sentence: "a", "a and b", "a, b, c and 34 more"."""
    texts = [str(name) for name in names]
    if len(texts) > limit:
        return f"{', '.join(texts[:limit])} and {len(texts) - limit:,} more"
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
