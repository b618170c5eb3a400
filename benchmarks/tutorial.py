"""The tutorials' recipes on the photographs, split, weights and image size that the pipeline has."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

from benchmarks.project import Project
from benchmarks.recipes import RECIPES, ten_epochs
from catdog import paths
from catdog.archives import open_archive
from catdog.backbones import get_backbone
from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.files import read_json, read_manifest
from catdog.images import decode


def write_folders(project: Project) -> None:
    """Writes into a project's `folders` its train, val and test as the tutorials want them: JPEG files by class.

    This is not counted: a tutorial begins with such folders. Files that TensorFlow can read stay as they are; it
    cannot read every format that the pipeline accepts.

    Args:
        project: one in which the stage split has run.

    Raises:
        CatdogError: there are more than two classes, which the recipes do not tell apart.
    """
    manifest = read_manifest(project.root / paths.MANIFEST)
    classes = sorted(set(manifest["label"]))
    if len(classes) != 2:
        raise CatdogError(
            f"the tutorials' recipes tell two classes apart, PHOTOGRAPHS has {len(classes)}; leave the part tutorial "
            "out with ONLY"
        )
    with open_archive(project.root / paths.RAW) as opened, ThreadPoolExecutor() as pool:

        def write(number: int, row: Any) -> None:
            data = opened.read(row.path)
            if row.format != "JPEG" or row.mode not in ("RGB", "L") or row.note:
                _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(decode(data)[..., ::-1]))
                data = encoded.tobytes()
            target = project.root / "folders" / row.split / row.label / f"{number:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

        rows: Iterable[Any] = manifest.itertuples()
        for _ in pool.map(write, range(len(manifest)), rows):
            pass


def measure_recipes(project: Project, *, epochs: int, limit: int) -> dict[str, Any]:
    """Runs each recipe as a process of its own, for some epochs, on at most `limit` images of a split.

    Returns:
        By recipe: its usage, what `recipes.run_recipe` measured, and `ten_epochs_seconds`.
    """
    params = load_params(project.root / paths.PARAMS)
    weights = get_backbone("mobilenetv2").shipped
    assert weights, "MobileNetV2's weights come with the project"
    result = {}
    for recipe in RECIPES:
        told = project.root / "told.json"
        usage = project.run(
            sys.executable,
            *(
                "-m",
                "benchmarks.recipes",
                recipe,
                "folders",
                str(params.preprocess.image_size),
                str(epochs),
                str(limit),
            ),
            *(f"pretrained/{weights}", told.name),
        ).usage
        measured = read_json(told)
        result[recipe] = usage | measured | {"ten_epochs_seconds": round(ten_epochs(measured, usage["seconds"]), 1)}
    return result
