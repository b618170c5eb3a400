"""A made-up evaluation to write reports from: any number of classes, with or without mistakes and corruptions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from catdog.config import load_params
from catdog.model import ModelInfo
from catdog.report_content import ReportContent, describe_weights
from catdog.slices import wilson_interval

REPOSITORY = Path(__file__).parents[1]
SHIPPED = "5006146578d05e65b91ec0c007209d027f70327ad53b4fe9db874c1c17a5409b"
PICTURES = (
    "confusion", "roc", "precision_recall", "calibration", "scores", "learning_curves", "slices",
    "corruptions", "mistakes", "uncertain", "best", "feature_map",
)  # fmt: skip


def draw_predictions(names, images=240, wrong=0.04, seed=1) -> pd.DataFrame:
    """As reports/predictions.csv; every class has about as many images, and `wrong` of all are called by another."""
    rng = np.random.default_rng(seed)
    names = np.asarray(names, object)
    labels = np.arange(images) % len(names)
    mistaken = rng.permutation(images) < round(wrong * images)
    predicted = np.where(mistaken, (labels + rng.integers(1, len(names), images)) % len(names), labels)
    confidence = np.where(mistaken, rng.uniform(0.5, 0.97, images), 1 - 0.5 * rng.beta(0.3, 6, images))
    return pd.DataFrame(
        {
            "path": [f"{names[label]}/{number}.jpg" for number, label in enumerate(labels)],
            "label": names[labels],
            "predicted": names[predicted],
            "correct": ~mistaken,
            "confidence": confidence.round(6),
        }
    )


def class_table(predictions: pd.DataFrame, names) -> pd.DataFrame:
    """As reports/tables/classes.csv."""
    rows = []
    for name in names:
        right = int((predictions["correct"] & (predictions["label"] == name)).sum())
        images, called = (int((predictions[column] == name).sum()) for column in ("label", "predicted"))
        row = {"class": name, "images": images}
        for metric, of in (("precision", called), ("recall", images)):
            low, high = wilson_interval(right, of) if of else (np.nan, np.nan)
            row |= {metric: right / of if of else np.nan, f"{metric}_low": low, f"{metric}_high": high}
        row |= {f"f1{part}": (row[f"precision{part}"] + row[f"recall{part}"]) / 2 for part in ("", "_low", "_high")}
        rows.append(row)
    return pd.DataFrame(rows)


def calibration_table(predictions: pd.DataFrame) -> pd.DataFrame:
    """As reports/tables/calibration.csv; before the temperature, the model was surer of itself."""
    rows = []
    for when, shift in (("before", 0.05), ("after", 0.0)):
        confidence = (predictions["confidence"] + shift).clip(upper=1)
        for number, part in predictions.groupby(np.minimum(14, (confidence * 15).astype(int))):
            mean = float(confidence[part.index].mean())
            rows.append((when, number / 15, (number + 1) / 15, len(part), mean, float(part["correct"].mean())))
    return pd.DataFrame(rows, columns=["calibration", "bin_low", "bin_high", "images", "confidence", "accuracy"])


def slice_table(*rows) -> pd.DataFrame:
    """As reports/tables/slices.csv, from property, slice, images, errors and weak."""
    table = pd.DataFrame(rows, columns=["property", "slice", "images", "errors", "weak"])
    ends = [wilson_interval(row.images - row.errors, row.images) for row in table.itertuples()]
    return table.assign(
        accuracy=1 - table["errors"] / table["images"], low=[low for low, _ in ends], high=[high for _, high in ends]
    )


def corruption_table(clean: float, *rows, images=500) -> pd.DataFrame:
    """As reports/tables/corruptions.csv, from corruption, severity and accuracy."""
    table = pd.DataFrame([("none", 0, clean), *rows], columns=["corruption", "severity", "accuracy"])
    ends = [wilson_interval(round(value * images), images) for value in table["accuracy"]]
    return table.assign(
        images=images, low=[low for low, _ in ends], high=[high for _, high in ends], lost=clean - table["accuracy"]
    )


SLICES = (
    ("shorter side", "below 300 px", 62, 9, True),
    ("shorter side", "300 px and more", 178, 1, False),
    ("aspect", "nearly square (0.80 to 1.25)", 240, 10, False),
    ("file format", "JPEG", 240, 10, False),
)
CORRUPTIONS = (
    ("JPEG compression", 1, 0.956), ("JPEG compression", 5, 0.90), ("Gaussian noise", 5, 0.62),
    ("horizontal flip", 1, 0.958),
)  # fmt: skip


def make_content(
    names=("cat", "dog"),
    *,
    predictions=None,
    pictures=None,
    slices=SLICES,
    corruptions=CORRUPTIONS,
    params=None,
    **changes,
) -> ReportContent:
    """The content of a report. `params` are changes by dotted name; `changes`, of the other fields."""
    predictions = draw_predictions(names) if predictions is None else predictions
    accuracy = float(predictions["correct"].mean())
    low, high = wilson_interval(int(predictions["correct"].sum()), len(predictions))
    low = 1.0 if accuracy == 1 else low  # as resampling gives it
    calibration = calibration_table(predictions)
    values = {
        "accuracy": accuracy, "balanced_accuracy": accuracy - 0.001, "precision": accuracy, "recall": accuracy,
        "f1": accuracy, "roc_auc": 0.9969, "pr_auc": 0.9971, "log_loss": 0.0853, "brier": 0.0214, "ece": 0.0213,
    }  # fmt: skip
    per_class = dict.fromkeys(names, 200)
    loaded = load_params(REPOSITORY / "params.yaml")
    for name, value in (params or {}).items():
        block, _, key = name.rpartition(".")
        inner = {block: getattr(loaded, block).model_copy(update={key: value})} if block else {key: value}
        loaded = loaded.model_copy(update=inner)
    content = ReportContent(
        tables={
            "metrics": pd.DataFrame(
                [
                    ("accuracy", accuracy, low, high),
                    *((name, value, value - 0.01, min(1.0, value + 0.01)) for name, value in list(values.items())[1:]),
                ],
                columns=["metric", "value", "low", "high"],
            ),
            "classes": class_table(predictions, names),
            "calibration": calibration,
            "slices": slice_table(*slices),
            "predictions": predictions,
        }
        | ({"corruptions": corruption_table(0.96, *corruptions)} if corruptions else {}),
        metrics=values | {"accuracy_low": low, "accuracy_high": high, "test_images": len(predictions)},
        pictures={} if pictures is None else pictures,
        info=ModelInfo(tuple(names), 224, "stretch", 95, "mobilenetv2", "imagenet", "avg", 0.5, 0.84),
        params=loaded,
        facts={
            "dataset": "sample",
            "dataset_hash": "md5: 994ce4e41f9fe459bac489ac137f4312",
            "method": "random",
            "rejected": 3,
            "rejected_by_reason": {"not an image": 3},
            "in_duplicate_groups": 2,
            "groups_with_two_labels": 0,
            "leaks": 0,
            "counts": {"train": per_class, "val": dict.fromkeys(names, 40), "test": dict.fromkeys(names, 60)},
        },
        training={
            "best_epoch": 60, "epochs": 70, "best_val_loss": 0.072274, "best_val_accuracy": 0.977778,
            "head_parameters": 1281, "model_parameters": 2259265, "model_bytes": 9635100,
        },
        weights=describe_weights("mobilenetv2", "imagenet", SHIPPED),
        model_bytes=9635100,
    )  # fmt: skip
    return replace(content, **changes)


def draw_pictures(folder: Path, names=PICTURES, size=(60, 40)) -> dict[str, Path]:
    """PNG files of one colour each."""
    found = {}
    for number, name in enumerate(names):
        found[name] = folder / f"{name}.png"
        Image.new("RGB", size, (20 * number, 90, 160)).save(found[name])
    return found
