"""All pictures of the evaluation: the drawn tables, and the test pictures that are worth looking at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog import evaluation_plots as plots
from catdog.evaluation import LabelledPredictions
from catdog.gradcam import Explain, overlay
from catdog.images import Pixels, decode, model_pixels
from catdog.model import ModelInfo
from catdog.plots import import_matplotlib, percent


def import_libraries() -> None:
    """Imports what the first table and the first picture would wait for."""
    import scipy.stats  # noqa: F401
    import sklearn.manifold  # noqa: F401

    import_matplotlib()


def draw_tables(tables: Mapping[str, pd.DataFrame], predictions: LabelledPredictions, folder: Path) -> dict[str, Path]:
    """Draws the tables that are there, each as `<name>.png`, and returns the files by name.

    Args:
        tables: by name, from `evaluation_tables`; all that it returns, none, or more.
        predictions: of the test split.
        folder: of the PNG files.
    """
    draw: dict[str, Callable[[Path], None]] = {}
    if "metrics" in tables:
        metrics, classes = tables["metrics"], tables["classes"]
        draw |= {
            "confusion": lambda path: plots.plot_confusion(_count(predictions), predictions.class_names, path),
            "roc": lambda path: plots.plot_roc(tables["roc"], metrics, classes, path),
            "precision_recall": lambda path: plots.plot_precision_recall(
                tables["precision_recall"], metrics, classes, path
            ),
            "calibration": lambda path: plots.plot_calibration(tables["calibration"], path),
            "scores": lambda path: plots.plot_scores(tables["scores"], classes, predictions.threshold, path),
            "slices": lambda path: plots.plot_slices(tables["slices"], metrics, path),
        }
    if "features" in tables:
        draw["feature_map"] = lambda path: plots.plot_feature_map(tables["features"], path)
    if "corruptions" in tables:
        draw["corruptions"] = lambda path: plots.plot_corruptions(tables["corruptions"], path)
    pictures = {name: folder / f"{name}.png" for name in draw}
    for name, path in pictures.items():
        draw[name](path)
    return pictures


def _count(predictions: LabelledPredictions) -> npt.NDArray[np.int64]:
    """The confusion matrix, int64 [true class, predicted class]."""
    from sklearn.metrics import confusion_matrix

    numbers = range(len(predictions.class_names))
    return np.asarray(confusion_matrix(predictions.labels, predictions.predicted, labels=numbers), np.int64)


def choose_galleries(predictions: LabelledPredictions, count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Chooses the pictures of each gallery.

    Args:
        predictions: of the test split.
        count: pictures a gallery, at most.

    Returns:
        By name, positions of the pictures, int64: mistakes and best by falling confidence, uncertain by how near the
        decision was. Equal ones are in the order of their paths.
    """
    by_path = np.argsort(np.asarray(predictions.paths, object), kind="stable")

    def first(values: npt.NDArray[np.float32], among: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        order = by_path[np.argsort(values[by_path], kind="stable")]
        return np.asarray(order[among[order]][:count], np.int64)

    correct, confidence = predictions.correct, predictions.confidence
    return {
        "mistakes": first(-confidence, ~correct),
        "uncertain": first(_margin(predictions), np.ones_like(correct)),
        "best": first(-confidence, correct),
    }


def _margin(predictions: LabelledPredictions) -> npt.NDArray[np.float32]:
    """How far each picture is from being called another class, in probability."""
    probabilities = predictions.probabilities
    if probabilities.shape[1] == 2:
        return np.asarray(np.abs(probabilities[:, 1] - predictions.threshold), np.float32)
    two = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0], np.float32)


@dataclass(frozen=True)
class Gallery:
    """What one picture of many test pictures shows."""

    name: str
    title: str
    pictures: Sequence[bytes | Pixels]  # image files, or uint8 [height, width, 3]
    captions: Sequence[str]  # one each
    overlays: Sequence[Pixels] | None  # one each, beside it


def collect_galleries(
    predictions: LabelledPredictions,
    chosen: Mapping[str, npt.NDArray[np.int64]],
    read: Callable[[str], bytes],
    info: ModelInfo,
    explain: Explain | None,
) -> Iterator[Gallery]:
    """Collects what each gallery shows, one after the other.

    Args:
        predictions: of the test split.
        chosen: from `choose_galleries`.
        read: gives the bytes of a picture by its path in the raw archive.
        info: of the model.
        explain: from `gradcam.build_gradcam`, shown for the predicted class beside each picture; None: pictures alone.
    """
    titles = _titles(predictions, chosen)
    names = np.asarray(predictions.class_names)
    for name, positions in chosen.items():
        files = [read(predictions.paths[position]) for position in positions]
        captions = [
            _caption(str(names[predictions.labels[at]]), str(names[predictions.predicted[at]]), confidence)
            for at, confidence in zip(positions, predictions.confidence[positions], strict=True)
        ]
        if explain is None:
            yield Gallery(name, titles[name], files, captions, None)
            continue
        # What the network saw, stretched or cropped as it was: the heat map lies on that.
        pictures = [
            model_pixels(data, size=info.image_size, mode=info.resize, quality=info.jpeg_quality) for data in files
        ]
        overlays = _overlays(explain, pictures, predictions.predicted[positions])
        yield Gallery(name, titles[name], pictures, captions, overlays)


def draw_gallery(gallery: Gallery, folder: Path) -> dict[str, Path]:
    """Draws a gallery as `<name>.png`, and returns the file by name."""
    pictures = (decode(one) if isinstance(one, bytes) else one for one in gallery.pictures)
    path = folder / f"{gallery.name}.png"
    plots.plot_gallery(pictures, gallery.captions, path, title=gallery.title, overlays=gallery.overlays)
    return {gallery.name: path}


def _overlays(explain: Explain, pictures: list[Pixels], classes: npt.NDArray[np.int64]) -> list[Pixels]:
    if not pictures:
        return []
    heat = explain(np.stack(pictures), classes)
    return [overlay(picture, one) for picture, one in zip(pictures, heat, strict=True)]


def _caption(label: str, predicted: str, confidence: float) -> str:
    said = label if label == predicted else f"{label}, called {predicted}"
    return f"{said}\n{percent(confidence, 1)}"


def _titles(predictions: LabelledPredictions, chosen: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, str]:
    wrong, images = int((~predictions.correct).sum()), len(predictions.paths)
    return {
        "mistakes": f"The {len(chosen['mistakes'])} most confident of {wrong:,} mistakes"
        if wrong
        else f"No mistake among {images:,} test pictures",
        "uncertain": f"The {len(chosen['uncertain'])} least certain of {images:,} test pictures",
        "best": f"The {len(chosen['best'])} most certain that are right"
        if len(chosen["best"])
        else "No test picture is right",
    }
