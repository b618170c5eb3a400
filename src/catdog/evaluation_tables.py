"""All tables of the evaluation, as the stage writes them to reports/tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.bootstrap import class_intervals, intervals
from catdog.calibration import reliability_table
from catdog.corruptions import CORRUPTIONS, corrupted_batches, corruption_table
from catdog.evaluation import LabelledPredictions, precision_recall_table, roc_table, score_table
from catdog.images import Pixels
from catdog.progress import progress
from catdog.slices import slice_table


def evaluation_tables(
    predictions: LabelledPredictions,
    manifest: pd.DataFrame,
    sharpness: npt.NDArray[np.float32],
    *,
    temperature: float,
    resamples: int,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Returns the tables that need nothing but the predictions and the manifest, by name.

    Args:
        predictions: of the test split.
        manifest: of the split stage; holds every test image.
        sharpness: of the stored test pictures, float32 [images], from `slices.sharpness`.
        temperature: by which the model divides its logits.
        resamples: of the bootstrap. Near-duplicates, which are not independent, are drawn together.
        seed: of the bootstrap.
    """
    groups = manifest.set_index("path")["group"].loc[list(predictions.paths)].to_numpy(np.int64)
    return {
        "metrics": intervals(predictions, resamples, seed, groups),
        "classes": class_intervals(predictions, resamples, seed, groups),
        "roc": roc_table(predictions),
        "precision_recall": precision_recall_table(predictions),
        "calibration": reliability_table(predictions, temperature),
        "scores": score_table(predictions),
        "slices": slice_table(predictions, manifest, sharpness),
    }


def robustness_table(
    pictures: Pixels,
    positions: npt.NDArray[np.int64],
    predictions: LabelledPredictions,
    predict: Callable[[Iterable[Pixels]], npt.NDArray[np.int64]],
    *,
    seed: int,
    batch_size: int,
) -> pd.DataFrame:
    """Classifies damaged copies of some test pictures; one forward pass a picture and damage.

    Args:
        pictures: uint8 [chosen, size, size, 3], from `corruptions.collect_pictures`.
        positions: of the pictures among the predictions, int64 [chosen].
        predictions: of the test split, undamaged.
        predict: from batches of pixels to class numbers, int64 [chosen].
        seed: of the noise.
        batch_size: pictures a batch.

    Returns:
        As `corruptions.corruption_table`.
    """
    labels = predictions.labels[positions]
    paths = [predictions.paths[position] for position in positions]
    correct = {}
    for corruption in progress(CORRUPTIONS, "robustness", len(CORRUPTIONS), "corruptions"):
        batches = corrupted_batches(pictures, paths, corruption, seed=seed, batch_size=batch_size)
        correct[corruption.name, corruption.severity] = predict(batches) == labels
    return corruption_table(predictions.correct[positions], correct)
