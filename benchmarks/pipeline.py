"""The whole pipeline by the real `dvc repro`, from an archive to an evaluated and tracked model, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.project import Project, bytes_of, new_project
from catdog import paths
from catdog.files import read_json

STAGES = ("source", "download", "split", "preprocess", "embed", "train", "evaluate", "track")


def make_finished(folder: Path, params: Mapping[str, Any]) -> Project:
    """Makes a project in which every stage has run; the arguments are those of `new_project`."""
    project = new_project(folder, params)
    project.run("dvc", "repro")
    return project


def measure_pipeline(folder: Path, params: Mapping[str, Any]) -> tuple[Project, dict[str, Any]]:
    """Runs the pipeline in a fresh project with an empty cache and an empty tracking store.

    Args:
        folder: where the project is made.
        params: changes of params.yaml by dotted names, the data set among them.

    Returns:
        The project, and: repro (the whole command), stages (by name: usage and disk_mb of the outputs), cache_mb
        (DVC's), tracking_mb (MLflow's), images (kept by split), accuracy and log_loss on the test split.
    """
    project = new_project(folder, params)
    run = project.run("dvc", "repro")
    outputs = project.outputs()
    metrics = read_json(project.root / paths.METRICS)
    return project, {
        "repro": run.usage,
        "stages": {name: run.stages[name] | {"disk_mb": _megabytes(*outputs[name])} for name in STAGES},
        "cache_mb": _megabytes(project.root / ".dvc/cache"),
        "tracking_mb": _megabytes(project.root / "mlflow.db", project.root / "mlruns"),
        "images": read_json(project.root / paths.DATA_REPORT)["images"],
        "accuracy": metrics["accuracy"],
        "log_loss": metrics["log_loss"],
    }


def measure_again(project: Project) -> dict[str, Any]:
    """Measures what follows the first run of the pipeline in a project.

    Returns:
        nothing_to_do (`dvc repro`), another_head (an experiment with another learning rate, and its stages), and help
        (`catdog --help`).
    """
    project.commit()
    nothing = project.run("dvc", "repro").usage
    experiment = project.run("dvc", "exp", "run", "-S", "train.learning_rate=0.002")
    return {
        "nothing_to_do": nothing,
        "another_head": experiment.usage | {"stages": experiment.stages},
        "help": project.run("catdog", "--help").usage,
    }


def _megabytes(*paths: Path) -> float:
    return round(sum(map(bytes_of, paths)) / 1e6, 3)
