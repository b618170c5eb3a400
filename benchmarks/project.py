"""A fresh copy of the project, far from the user's files and settings, whose stages are measured as processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from catdog.errors import CatdogError

ROOT = Path(__file__).parents[1]
USAGE = Path(__file__).with_name("usage.py")

Usage = dict[str, Any]
"""What a process took, as usage.py writes it: seconds, cpu_seconds, peak_mb."""


@dataclass(frozen=True)
class Run:
    """A command that was run to its end."""

    usage: Usage
    stages: dict[str, Usage]  # of each stage that DVC ran meanwhile, by name


@dataclass(frozen=True)
class Project:
    """A working copy, and what it takes to run commands in it."""

    root: Path
    home: Path

    def environment(self) -> dict[str, str]:
        """The caller's environment without anything that would steer git, DVC, MLflow or Keras."""
        steering = ("DVC_", "MLFLOW_", "GIT_", "KERAS_", "XDG_", "TF_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)  # with it every process would compile the project anew
        return kept | {
            "PATH": os.pathsep.join([str(self.home / "bin"), str(Path(sys.executable).parent), kept["PATH"]]),
            "PYTHONPATH": "src",
            "HOME": str(self.home),
            "GIT_CONFIG_NOSYSTEM": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.home / "dvc"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def run(self, *command: str, **changes: str) -> Run:
        """Runs a command, which must succeed; `changes` are environment variables.

        Raises:
            CatdogError: it failed; the message ends with what it wrote last.
        """
        with tempfile.TemporaryDirectory() as folder:
            own, stages, told = (Path(folder, name) for name in ("command", "stages", "told"))
            with told.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-S", "-E", str(USAGE), str(own), *command],
                    cwd=self.root,
                    env=self.environment() | {"BENCHMARK_LOG": str(stages)} | changes,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    code = process.wait()
                except BaseException:
                    # The stages that DVC started go with it.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise
            if code:
                last = "\n".join(told.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
                raise CatdogError(f"`{' '.join(command)}` failed with exit status {code}:\n{last}")
            (usage,) = _read_log(own)
            ran = {Path(line["command"][0]).stem: _plain(line) for line in _read_log(stages)}
            return Run(_plain(usage), ran)

    def stage(self, name: str) -> Usage:
        """Runs a stage's script alone, without DVC, after removing its outputs as DVC would."""
        for path in self.outputs()[name]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return self.run(sys.executable, f"stages/{name}.py", DVC_ROOT=str(self.root)).usage

    def outputs(self) -> dict[str, list[Path]]:
        """Every output that dvc.yaml names, by stage."""
        stages = YAML(typ="safe").load(self.root / "dvc.yaml")["stages"]
        return {
            name: [
                self.root / (next(iter(entry)) if isinstance(entry, dict) else entry)
                for entry in (*stage.get("outs", []), *stage.get("metrics", []))
            ]
            for name, stage in stages.items()
        }

    def last_metric(self, stage: str, name: str) -> float:
        """What a stage logged last in MLflow under this name."""
        query = (
            "SELECT metrics.value FROM metrics JOIN runs USING (run_uuid) WHERE runs.name = ? AND metrics.key = ? "
            "ORDER BY runs.start_time DESC LIMIT 1"
        )
        with closing(sqlite3.connect(self.root / "mlflow.db")) as store:
            found = store.execute(query, (stage, name)).fetchone()
        assert found, f"{stage} logged no {name}"
        return float(found[0])

    def commit(self) -> None:
        """Commits everything that git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "state of the measurement")


def _plain(line: Mapping[str, Any]) -> Usage:
    return {name: line[name] for name in ("seconds", "cpu_seconds", "peak_mb")}


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def new_project(folder: Path, params: Mapping[str, Any]) -> Project:
    """Copies the repository as it is now, files that git ignores left out, into a git repository of its own.

    Args:
        folder: receives `project` and `home`; what an earlier measurement left there is removed.
        params: changes of params.yaml by dotted names.
    """
    project = Project(folder / "project", folder / "home")
    shutil.rmtree(folder, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        # Without dvc.lock nothing of the repository's own results is taken for this project's.
        if (ROOT / name).is_file() and name != "dvc.lock":
            (project.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project.root / name)
    write_params(project.root / "params.yaml", params)
    python = project.home / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{USAGE}" "$BENCHMARK_LOG" "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (project.home / ".gitconfig").write_text("[user]\n\tname = Benchmark\n\temail = benchmark@example.org\n")
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.commit()
    return project


def write_params(path: Path, values: Mapping[str, Any]) -> None:
    """Changes values of a params.yaml, by the dotted names that it has."""
    yaml = YAML()
    tree = yaml.load(path)
    for name, value in values.items():
        *blocks, key = name.split(".")
        block = tree
        for part in blocks:
            block = block[part]
        block[key] = value
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def bytes_of(path: Path) -> int:
    """The bytes of a file, or of all files below a folder; 0 where there is nothing."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
