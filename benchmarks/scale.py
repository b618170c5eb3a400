"""How time and memory grow with the number of images, up to 100,000 generated ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.pictures import near_hashes
from benchmarks.pipeline import measure_pipeline
from catdog.quality import group_duplicates

PARAMS: dict[str, Any] = {"preprocess.image_size": 96, "train.epochs": 5, "evaluate.gallery": 6}
"""What is changed so that 100,000 images do not take hours on two cores: a sixth of the pixels; and a fixed number of
epochs, so that the time of train depends on the number of images and not on when early stopping ends it."""

HASHES = 100_000
DISTANCES = (4, 8, 16)


def measure_scale(folder: Path, archive: Path) -> dict[str, Any]:
    """Runs the pipeline once on generated pictures; returns what `measure_pipeline` measured."""
    _, measured = measure_pipeline(folder, {"dataset": str(archive)} | PARAMS)
    return measured


def measure_near_duplicates() -> dict[str, float]:
    """The seconds that the search for near-duplicates among HASHES hashes takes, by the distance in bits."""
    hashes = near_hashes(HASHES)
    names = [str(number) for number in range(HASHES)]
    seconds = {}
    for bits in DISTANCES:
        started = time.perf_counter()
        group_duplicates(names, hashes, bits)
        seconds[str(bits)] = round(time.perf_counter() - started, 2)
    return seconds
