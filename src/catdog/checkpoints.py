"""Checkpoints: what a killed training needs to go on where it was, and to end where it would have ended.

They lie under `.dvc/tmp/checkpoints/<key>/` of the main repository, because DVC deletes a stage's outputs before it
runs the stage, and a temporary copy of the repository disappears with its experiment. The key says what went into the
training, so a run finds the checkpoints of the same run only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from catdog import paths
from catdog.files import written_aside

if TYPE_CHECKING:
    import keras

SECONDS_BETWEEN = 10.0
"""At most one checkpoint in so many seconds: a head's epoch takes less time than writing one."""
DAYS_KEPT = 14
"""Checkpoints of runs that nobody took up again are deleted after so many days."""
_META = "meta"

Arrays = dict[str, list[npt.NDArray[Any]]]


@dataclass(frozen=True)
class State:
    """A training at the end of an epoch."""

    arrays: Arrays  # by group, e.g. "best": the variables' values in the model's order
    meta: dict[str, Any]  # JSON: epochs so far, best loss, ...


class Checkpoints:
    """The checkpoints of one run: a file a phase ("head", "fine_tune"), each whole or absent."""

    def __init__(self, folder: Path | None, seconds_between: float = SECONDS_BETWEEN) -> None:
        """Opens a folder that need not exist.

        Args:
            folder: where the files lie; None keeps no checkpoints.
            seconds_between: `due` says no until so many seconds after the last file was written.
        """
        self._folder = folder
        self._seconds_between = seconds_between
        self._written = time.monotonic()

    def due(self) -> bool:
        """Says whether it is time for another checkpoint."""
        return self._folder is not None and time.monotonic() - self._written >= self._seconds_between

    def save(self, phase: str, state: State) -> None:
        """Writes the phase's checkpoint aside, brings it to the disk, and renames it over the former one."""
        if self._folder is None:
            return
        with written_aside(self._path(phase)) as aside, aside.open("wb") as file:
            write_state(file, state)
            # A power cut must not leave a renamed file without its content.
            file.flush()
            os.fsync(file.fileno())
        self._written = time.monotonic()

    def load(self, phase: str) -> State | None:
        """Reads the phase's checkpoint; None where there is none, or, with a line on standard error, a damaged one."""
        if self._folder is None or not self._path(phase).exists():
            return None
        try:
            with self._path(phase).open("rb") as file:
                return read_state(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            cause = " ".join(str(error).split())
            print(f"train: {self._path(phase)} is damaged ({cause}) and ignored; starting anew", file=sys.stderr)
            return None

    def clear(self) -> None:
        """Deletes the run's checkpoints: the run succeeded."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, phase: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{phase}.npz"


def write_state(file: IO[bytes], state: State) -> None:
    """Writes a state as an .npz archive, which checks itself when it is read."""
    members: dict[str, Any] = {_META: np.frombuffer(json.dumps(state.meta).encode(), np.uint8)}
    for group, values in state.arrays.items():
        members |= {f"{group}/{number:05d}": value for number, value in enumerate(values)}
    np.savez(file, **members)


def read_state(file: IO[bytes]) -> State:
    """Reads a state back; raises what NumPy and zipfile do where the archive is damaged."""
    # Reading a member checks its CRC-32.
    with np.load(file) as archive:
        arrays: Arrays = {}
        for name in sorted(set(archive.files) - {_META}):
            arrays.setdefault(name.partition("/")[0], []).append(archive[name])
        return State(arrays, json.loads(archive[_META].tobytes()))


@contextlib.contextmanager
def open_checkpoints(root: Path, key: str) -> Iterator[Checkpoints]:
    """Opens the checkpoints of one run for one process.

    A second process with the same key (two workers of a queue, or one that outlived its killed `dvc`) trains
    without checkpoints, and says so: waiting for the other one would take longer.

    Args:
        root: of the main repository.
        key: from `run_key`.
    """
    from filelock import FileLock, Timeout

    parent = root / paths.CHECKPOINTS
    parent.mkdir(parents=True, exist_ok=True)
    _delete_forgotten(parent)
    lock = FileLock(parent / f"{key}.lock")
    with contextlib.suppress(Timeout):
        lock.acquire(blocking=False)
    if not lock.is_locked:
        print("train: another process is at the very same training; this one keeps no checkpoints", file=sys.stderr)
        yield Checkpoints(None)
        return
    try:
        yield Checkpoints(parent / key)
    finally:
        if not (parent / key).exists():
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _delete_forgotten(parent: Path) -> None:
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for path in parent.iterdir():
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in (path, *path.glob("*")))
            if newest < oldest and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif newest < oldest:
                path.unlink()


def run_key(facts: Mapping[str, Any], code: Sequence[Path]) -> str:
    """Returns a name for a training: equal for equal parameters, data, code and libraries, else another one.

    Args:
        facts: JSON of what went in: parameters, and hashes of the data.
        code: files whose text decides about the result, in any order.

    Returns:
        32 hexadecimal digits.
    """
    import keras

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(f"{keras.backend.backend()} {keras.version()} {np.__version__}".encode())
    for path in sorted(code):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def state_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns what training changes in a model itself: trainable weights and the seeds of random layers.

    Frozen weights stay out: they are most of a network, and every run loads the same.
    """
    # Seeds are in `variables` but not in `weights`; so are metrics and the optimizer's state.
    others = {id(variable) for variable in (*model.weights, *model.metrics_variables)}
    optimizer = {id(variable) for variable in model.optimizer.variables}
    seeds = [variable for variable in model.variables if id(variable) not in others | optimizer]
    return [*model.trainable_variables, *seeds]


def changing_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns what a step of a compiled model changes: `state_variables` and the optimizer's state."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*state_variables(model), *model.optimizer.variables]


def values_of(variables: Sequence[keras.Variable]) -> list[npt.NDArray[Any]]:
    """Copies variables to the host."""
    return [np.array(variable.numpy()) for variable in variables]


def assign(variables: Sequence[keras.Variable], values: Sequence[npt.NDArray[Any]]) -> None:
    """Sets variables to values from `values_of`; raises ValueError where number or shapes differ."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
