"""Where things lie in the repository.

Stage outputs are relative to the working directory, which DVC sets to the repository's root, or to a
copy of it in `dvc exp run --temp` and in the queue. What lies outside the pipeline (the tracking store,
a data set's path) is relative to the main repository instead: `repository_root`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from catdog.errors import CatdogError

PARAMS = Path("params.yaml")
PRETRAINED = Path("pretrained")

RAW = Path("data/raw.zip")
MANIFEST = Path("data/manifest.csv")
UNLABELLED = Path("data/unlabelled.csv")
TFRECORDS = Path("data/tfrecords")
DATASET_INFO = TFRECORDS / "dataset_info.json"
PREPROCESS_REPORT = TFRECORDS / "preprocess.json"
FEATURES = Path("data/features")
FEATURES_INFO = FEATURES / "features.json"
MODEL = Path("models/model.keras")
EXPORTS = Path("models/export")

SOURCE_REPORT = Path("reports/source.json")
CURATION_REPORT = Path("reports/curation.json")
WEIGHTS_REPORT = Path("reports/weights.json")
DOWNLOAD_REPORT = Path("reports/download.json")
DATA_REPORT = Path("reports/data.json")
REJECTED = Path("reports/rejected.csv")
DATA_PICTURES = Path("reports/data")
DATA_PAGE = Path("reports/data.html")
AUGMENTATION = Path("reports/augmentation.png")
TRAIN_REPORT = Path("reports/train.json")
HISTORY = Path("reports/history.csv")
LEARNING_CURVES = Path("reports/learning_curves.png")
METRICS = Path("reports/metrics.json")
PREDICTIONS = Path("reports/predictions.csv")
TABLES = Path("reports/tables")
EVALUATION_PICTURES = Path("reports/evaluation")
REPORT_PAGE = Path("reports/report.html")
MODEL_CARD = Path("reports/model_card.md")

# Relative to the main repository: what must outlive a killed process and a temporary copy.
CHECKPOINTS = Path(".dvc/tmp/checkpoints")
DOWNLOADS = Path(".dvc/tmp/downloads")
TUNING_SEARCHES = Path(".dvc/tmp/tuning")
TUNING_FEATURES = Path(".dvc/tmp/features")

SPLITS = ("train", "val", "test")
UNUSED = "unused"
"""What the manifest calls the split of an image that is sound but in none of the three."""


def users_path(parameter: str, value: str, root: Path) -> Path:
    """Returns the path that a parameter means: a relative one starts at the root, "~" is a home folder.

    Raises:
        CatdogError: nobody knows whose or which home folder that is.
    """
    try:
        return root / Path(value).expanduser()
    except RuntimeError:
        raise CatdogError(
            f"{parameter} = {value!r} begins with a home folder that this system does not know; give the whole path"
        ) from None


def repository_root() -> Path:
    """Returns the absolute root of the main repository, in every way of running.

    DVC tells it in DVC_ROOT, also where a stage runs in a copy of the repository; outside DVC, git does.

    Raises:
        CatdogError: called outside a git repository.
    """
    told = os.environ.get("DVC_ROOT")
    if told:
        return Path(told).resolve()
    answer = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise CatdogError(f"{Path.cwd()} is not inside the project's git repository; change into it first")
    return Path(answer.stdout.strip())
