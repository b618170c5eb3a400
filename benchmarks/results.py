"""What was measured, on what machine: one JSON file, saved after every measurement, so that a run can be resumed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.project import ROOT
from catdog.errors import CatdogError
from catdog.files import read_json, write_json
from catdog.parallel import processors

_PACKAGES = ("dvc", "keras", "mlflow", "numpy", "opencv-python-headless", "openvino", "pillow", "tensorflow-cpu")
_MUST_AGREE = ("machine", "cores", "memory_gb", "python", "packages", "revision", "photographs", "settings")
"""What makes measurements comparable."""


class Results:
    """Measurements by key, e.g. "pipeline/12000", one a round."""

    def __init__(self, path: Path, facts: dict[str, Any], *, resume: bool) -> None:
        """Starts a file, or goes on with one.

        Args:
            path: the JSON file.
            facts: from `collect_facts`.
            resume: go on with the file where there is one.

        Raises:
            CatdogError: the file is there although `resume` is false, or it was measured under other circumstances.
        """
        self._path = path
        self.content: dict[str, Any] = {"facts": facts, "measurements": {}}
        if not path.exists():
            return
        if not resume:
            raise CatdogError(f"{path} is there already; RESUME=1 goes on with it, another NAME leaves it as it is")
        self.content = read_json(path)
        for name in _MUST_AGREE:
            former, now = self.content["facts"][name], facts[name]
            if former != now:
                raise CatdogError(f"{path} was measured with {name} = {former}, now it is {now}; choose another NAME")

    def take(self, key: str, number: int, measure: Callable[[], Any]) -> None:
        """Measures, unless the file holds this round already, and saves."""
        rounds = self.content["measurements"].setdefault(key, [])
        if len(rounds) > number:
            return
        print(f"{time.strftime('%H:%M:%S')} {key}, round {number + 1}", flush=True)
        rounds.append(measure())
        write_json(self._path, self.content)


def collect_facts(photographs: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Describes the machine, the code and the data.

    Args:
        photographs: names of the archives or folders; none for the drawn sample.
        settings: what else decides about the numbers.
    """
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": _device(),
        "cores": processors(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "revision": _git("describe", "--always", "--dirty", "--exclude=*"),
        "photographs": list(photographs),
        "settings": settings,
    }


def _device() -> str:
    code = "from catdog.runtime import *; prepare_keras(0); print(device_name())"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
