"""The whole pipeline by the real `dvc repro`, from an archive to an evaluated and tracked model, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.project import bytes_of, new_project
from catdog.files import read_json

STAGES = ("source", "download", "split", "preprocess", "embed", "train", "evaluate", "track")


def measure_pipeline(folder: Path, archive: Path, params: Mapping[str, Any], *, again: bool) -> dict[str, Any]:
    """Runs the pipeline in a fresh project with an empty cache and an empty tracking store.

    Args:
        folder: where the project is made.
        archive: the data set.
        params: changes of params.yaml by dotted names.
        again: also measure what follows a first run: `dvc repro` with nothing to do, an experiment with another
            learning rate, and `catdog --help`.

    Returns:
        repro (the whole command), stages (by name: usage and disk_mb of the outputs), cache_mb (DVC's), tracking_mb
        (MLflow's), images (kept by split), accuracy and log_loss on the test split, and with `again` nothing_to_do,
        another_head and help.
    """
    project = new_project(folder, {"dataset": str(archive)} | dict(params))
    run = project.run("dvc", "repro")
    outputs = project.outputs()
    metrics = read_json(project.root / "reports/metrics.json")
    result: dict[str, Any] = {
        "repro": run.usage,
        "stages": {
            name: run.stages[name] | {"disk_mb": _megabytes(*outputs[name])} for name in STAGES if name in run.stages
        },
        "cache_mb": _megabytes(project.root / ".dvc/cache"),
        "tracking_mb": _megabytes(project.root / "mlflow.db", project.root / "mlruns"),
        "images": read_json(project.root / "reports/data.json")["images"],
        "accuracy": metrics["accuracy"],
        "log_loss": metrics["log_loss"],
    }
    if again:
        project.commit()
        result["nothing_to_do"] = project.run("dvc", "repro").usage
        experiment = project.run("dvc", "exp", "run", "-S", "train.learning_rate=0.002")
        result["another_head"] = experiment.usage | {"stages": experiment.stages}
        result["help"] = project.run("catdog", "--help").usage
    return result


def _megabytes(*paths: Path) -> float:
    return round(sum(map(bytes_of, paths)) / 1e6, 3)
