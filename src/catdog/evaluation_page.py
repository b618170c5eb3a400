"""The report on a trained model: one page that opens anywhere.

`reports/report.html` carries its style and pictures inside itself, has no script, and asks no server. Its bytes depend
on nothing but the numbers and pictures that it shows. The layout is in `templates/report.html.jinja`; this module
works out what goes into it.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catdog.corruptions import CORRUPTIONS
from catdog.files import write_text
from catdog.images import decode, encode_jpeg
from catdog.pages import data_uri, load_template
from catdog.paths import SPLITS
from catdog.plots import shrink
from catdog.report_content import (
    MEASURE_ROBUSTNESS,
    ReportContent,
    class_rows,
    confusion_rows,
    count_rows,
    findings,
    metric_range,
    metric_rows,
    metric_value,
    percent,
    points,
)
from catdog.slices import PROPERTIES

GALLERIES: Mapping[str, str] = {
    "mistakes": "The most confident mistakes",
    "uncertain": "The least certain",
    "best": "The best: right, and most certain",
}
# Bytes of all pictures together, so that the page stays under 6 MB: base64 makes four bytes of three. Where they are
# more, of each gallery, and where that is not enough, of each drawing.
_ALL_BYTES, _GALLERY_BYTES, _DRAWING_BYTES = 4_200_000, 800_000, 200_000
_JPEG_QUALITIES = (88, 80)
_SHRINK_STEP = 0.85


_NOT_OF_A_RUN = ("tune", "promote", "tracking")
"""Blocks of params.yaml that no stage's result depends on: a page that shows them would go stale."""


def write_report(path: Path, content: ReportContent) -> None:
    """Writes the page, e.g. as reports/report.html; it appears whole or not at all.

    Raises:
        OSError, images.ImageError: a file of `content.pictures` cannot be read or is no picture.
    """
    write_text(path, render_report(content))


def render_report(content: ReportContent) -> str:
    """Returns the page as HTML; raises as `write_report`."""
    info, params = content.info, content.params
    text = load_template("report.html.jinja").render(
        info=info,
        dataset=content.facts["dataset"],
        tiles=_tiles(content),
        findings=findings(content),
        pictures=embed_pictures(content.pictures),
        metrics=metric_rows(content),
        classes=class_rows(content),
        confusions=confusion_rows(content),
        test_images=content.test_images,
        slices=_slice_rows(content),
        properties=PROPERTIES,
        corruptions=_corruption_rows(content),
        measure_robustness=MEASURE_ROBUSTNESS,
        galleries=GALLERIES,
        gallery=params.evaluate.gallery,
        gradcam=params.evaluate.gradcam,
        feature_map=params.evaluate.feature_map,
        splits=SPLITS,
        counts=count_rows(content),
        facts=content.facts,
        training=content.training,
        fine_tuning=content.training.get("fine_tuning"),
        weights=content.weights,
        params={name: value for name, value in params.flat().items() if name.partition(".")[0] not in _NOT_OF_A_RUN},
    )
    return str(text)


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture inside a page."""

    uri: str
    width: int  # pixels
    height: int


def embed_pictures(pictures: Mapping[str, Path]) -> dict[str, EmbeddedPicture]:
    """Turns PNG files, by name, into pictures inside a page of less than 6 MB; raises as `embed_picture`.

    They stay as they are if they can. Galleries of photographs lose least as JPEG, so they give way before drawings.
    """
    sizes = {name: path.stat().st_size for name, path in pictures.items()}
    limits = sizes
    if sum(limits.values()) > _ALL_BYTES:
        limits = {name: min(size, _GALLERY_BYTES) if name in GALLERIES else size for name, size in sizes.items()}
    if sum(limits.values()) > _ALL_BYTES:
        limits = {name: size if name in GALLERIES else min(size, _DRAWING_BYTES) for name, size in limits.items()}
    return {name: embed_picture(path, limits[name]) for name, path in pictures.items()}


def embed_picture(path: Path, limit: int) -> EmbeddedPicture:
    """Turns a PNG file into a picture inside a page: as it is, or as a JPEG if it would take too many bytes.

    Args:
        path: the file.
        limit: bytes at most; the JPEG is made coarser, then smaller, until it fits.

    Raises:
        OSError, images.ImageError: the file cannot be read or is no picture.
    """
    from PIL import Image

    data = path.read_bytes()
    if len(data) <= limit:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        return EmbeddedPicture(data_uri(data, "png"), width, height)
    original = decode(data)
    side = max(original.shape[:2])
    while True:
        pixels = shrink(original, side)
        for quality in _JPEG_QUALITIES:
            encoded = encode_jpeg(pixels, quality)
            if len(encoded) <= limit or side == 1:
                return EmbeddedPicture(data_uri(encoded, "jpeg"), pixels.shape[1], pixels.shape[0])
        side = max(1, int(side * _SHRINK_STEP))


def _tiles(content: ReportContent) -> list[dict[str, str]]:
    """The headline numbers."""
    metrics = content.metrics
    parameters = content.training.get("model_parameters")
    return [
        {
            "value": metric_value("accuracy", metrics["accuracy"]),
            "name": "accuracy",
            "note": metric_range("accuracy", metrics["accuracy_low"], metrics["accuracy_high"]),
        },
        {"value": metric_value("log_loss", metrics["log_loss"]), "name": "log loss", "note": "0 is perfect"},
        {"value": metric_value("roc_auc", metrics.get("roc_auc")), "name": "ROC AUC", "note": "1 is perfect"},
        {"value": metric_value("ece", metrics["ece"]), "name": "calibration error", "note": "0 is perfect"},
        {
            "value": f"{content.test_images:,}",
            "name": "test images",
            "note": f"{len(content.info.class_names):,} classes",
        },
        {
            "value": f"{content.model_bytes / 1e6:,.1f} MB",
            "name": "model file",
            "note": f"{parameters / 1e6:,.2f} million parameters" if parameters else "",
        },
    ]


def _slice_rows(content: ReportContent) -> list[dict[Hashable, Any]]:
    return [
        row
        | {
            "accuracy": percent(row["accuracy"]),
            "interval": metric_range("accuracy", row["low"], row["high"]),
            "weak": bool(row["weak"]),
        }
        for row in content.tables["slices"].to_dict("records")
    ]


def _corruption_rows(content: ReportContent) -> list[dict[Hashable, Any]]:
    """The corruptions that were measured, and before them the pictures as they are; nothing where none was."""
    if content.corruptions.empty:
        return []
    meanings = {(one.name, one.severity): one.description for one in CORRUPTIONS}
    return [
        row
        | {
            "accuracy": percent(row["accuracy"]),
            "interval": metric_range("accuracy", row["low"], row["high"]),
            "lost": "" if row["corruption"] == "none" else points(row["lost"]),
            "meaning": meanings.get((row["corruption"], row["severity"]), ""),
        }
        for row in content.tables["corruptions"].to_dict("records")
    ]
