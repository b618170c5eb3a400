"""Training by several processes, on one machine or several, as one job.

Every worker runs the same training on its part of each batch; `keras.distribution` on JAX adds the gradients up. The
first worker, number 0, is the one that reads and writes: the others get weights and checkpoints from it and keep
nothing. Before JAX starts, all meet at the first worker's address and compare what they are about to do, because
workers that differ would wait for each other for ever, and JAX ends a process without a word of Python when one of
them does not come.

It is JAX alone, because Keras 3 does not train under TensorFlow's MultiWorkerMirroredStrategy
(github.com/keras-team/keras/issues/20585).
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from catdog.checkpoints import Checkpoints, State, read_state, write_state
from catdog.errors import CatdogError
from catdog.runtime import processor_name

SECONDS_TO_MEET = 300.0
"""How long workers wait for each other at the start."""
SECONDS_OF_SILENCE = 60
"""After so many seconds without a sign of life from a worker JAX ends the others. A worker that died is noticed at
once, since its connections close; this is for one whose machine or network went."""
_PREFIX = "KERAS_DISTRIBUTION_"
_MESSAGE_BYTES = 1_000_000
_SECONDS_TO_SPEAK = 10.0


@dataclass(frozen=True)
class Job:
    """The workers that train together, and which of them this process is."""

    address: str  # host:port, of the first worker
    workers: int
    number: int  # of this one, from 0

    @property
    def is_first(self) -> bool:
        """Whether this worker reads and writes."""
        return self.number == 0


def read_job(environment: Mapping[str, str]) -> Job | None:
    """Reads Keras' variables for a job of several processes; None where there is no such job.

    Args:
        environment: with KERAS_DISTRIBUTION_JOB_ADDRESSES (host:port of the first worker, or of all, with commas),
            KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID, as `keras.distribution.initialize`
            reads them; or with none of them.

    Raises:
        CatdogError: some are missing or make no sense, or TF_CONFIG asks for TensorFlow's way, which does not work.
    """
    _refuse_tensorflow_cluster(environment.get("TF_CONFIG", ""))
    names = [_PREFIX + name for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")]
    found = {name: environment[name] for name in names if environment.get(name)}
    if not found:
        return None
    if missing := [name for name in names if name not in found]:
        raise CatdogError(
            f"{' and '.join(found)} ask for a job of several workers, but {missing[0]} is not set; set it"
        )
    addresses, workers, number = found.values()
    address = addresses.partition(",")[0].strip()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise CatdogError(f"{names[0]} = {addresses!r} names no host and port; use e.g. 10.0.0.1:4000")
    if not workers.isdecimal() or int(workers) < 1:
        raise CatdogError(f"{names[1]} = {workers!r} is no number of workers; use 2 or more")
    if not number.isdecimal() or int(number) >= int(workers):
        raise CatdogError(
            f"{names[2]} = {number!r} is no number of one of {workers} workers; use 0 to {int(workers) - 1}"
        )
    return Job(address, int(workers), int(number)) if int(workers) > 1 else None


def _refuse_tensorflow_cluster(text: str) -> None:
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        if sum(len(tasks) for tasks in json.loads(text or "{}").get("cluster", {}).values()) > 1:
            raise CatdogError(
                "TF_CONFIG names several workers, and Keras 3 does not train under TensorFlow's "
                f"MultiWorkerMirroredStrategy; unset it and use KERAS_BACKEND=jax with {_PREFIX}* (docs/devices.md)"
            )


@contextlib.contextmanager
def taking_part(job: Job | None, facts: Mapping[str, str], *, seconds: float = SECONDS_TO_MEET) -> Iterator[None]:
    """Makes this process one of a job's workers; without a job nothing changes.

    Enter it before JAX computes anything, and call `leave` where the common work ends. A process that leaves the
    block by an error ends without JAX's farewell, which would wait for the others while they wait for it.

    Args:
        job: from `read_job`.
        facts: what decides about the training, by names for messages; it must be the same for all workers.
        seconds: how long to wait for the others.

    Raises:
        CatdogError: a worker does not come, differs from the first one, or is lost while the block runs.
    """
    if job is None:
        yield
        return
    _require_jax()
    ending = _Ending()
    # Handlers run in the reverse order: before JAX's own, which was registered when JAX was imported.
    import jax

    meet(job, facts, seconds=seconds)
    atexit.register(ending.skip_farewell)
    # As keras.distribution.initialize does, which knows no time limits.
    jax.distributed.initialize(
        job.address,
        job.workers,
        job.number,
        coordinator_bind_address=job.address,
        initialization_timeout=round(seconds),
        heartbeat_timeout_seconds=SECONDS_OF_SILENCE,
    )
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, Exception) and _tells_of_a_lost_worker(error)
        ending.exit_code = 2 if lost or isinstance(error, CatdogError) else 1
        if lost:
            raise CatdogError(
                f"{'another worker' if job.is_first else 'the first or another worker'} of the job ended before its "
                "work was done; see what it said, and start all again: the training goes on from the first worker's "
                "last checkpoint"
            ) from error
        raise


class _Ending:
    """How a process of a job ends."""

    exit_code: int | None = None  # None: in order

    def skip_farewell(self) -> None:
        if self.exit_code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)


def leave(job: Job | None) -> None:
    """Ends the common work in order; waits until all workers have come so far."""
    if job is not None:
        import jax

        jax.distributed.shutdown()


def _require_jax() -> None:
    import keras

    backend = keras.backend.backend()
    if backend != "jax":
        raise CatdogError(
            f"{_PREFIX}* ask for a job of several workers, which needs JAX, but the Keras backend is {backend}; "
            "set KERAS_BACKEND=jax, or unset them"
        )


def _require_equal_devices(job: Job) -> None:
    """Refuses workers that round differently: each computes the new weights itself, and they would drift apart."""
    import jax

    devices = jax.devices()
    of_each = [
        sorted(device.device_kind for device in devices if device.process_index == number)
        for number in range(jax.process_count())
    ]
    for number, found in enumerate(of_each):
        if found != of_each[0]:
            raise CatdogError(
                f"worker {number} has the devices {', '.join(found)}, the first worker {', '.join(of_each[0])}; "
                "use the same number of the same kind for each, e.g. with CUDA_VISIBLE_DEVICES"
            )
    if devices[0].platform == "cpu":
        mine, first = processor_name(), str(from_first(job, processor_name().encode()), "utf-8")
        if mine != first:
            raise CatdogError(
                f"worker {job.number} computes on {mine}, the first worker on {first}; use machines with the same "
                "processor"
            )


def _tells_of_a_lost_worker(error: Exception) -> bool:
    """Says whether an exchange failed; JAX raises ValueError for it as well as its own error."""
    import jax

    if not isinstance(error, ValueError | jax.errors.JaxRuntimeError):
        return False
    return any(word in str(error) for word in ("Gloo", "NCCL", "coordination service"))


def meet(job: Job, facts: Mapping[str, str], *, seconds: float) -> None:
    """Waits until all workers are there, and compares what they are about to do.

    The first worker listens at the job's address for one line of JSON from each of the others, and answers with a
    line: empty, or what is wrong.

    Raises:
        CatdogError: with the same sentence in all workers that came.
    """
    until = time.monotonic() + seconds
    if job.is_first:
        _receive_others(job, facts, until, seconds)
    else:
        _report_to_first(job, facts, until, seconds)


def _receive_others(job: Job, facts: Mapping[str, str], until: float, seconds: float) -> None:
    host, _, port = job.address.rpartition(":")
    found: dict[int, dict[str, Any]] = {}
    problem = ""
    with contextlib.ExitStack() as opened:
        try:
            listener = opened.enter_context(socket.create_server((host, int(port))))
        except OSError as error:
            raise CatdogError(
                f"the first worker cannot listen at {job.address} ({_cause(error)}); give an address of this machine "
                f"and a free port in {_PREFIX}JOB_ADDRESSES"
            ) from error
        connections = []
        while len(found) < job.workers - 1 and not problem:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection = opened.enter_context(listener.accept()[0])
            except TimeoutError:
                absent = next(number for number in range(1, job.workers) if number not in found)
                problem = (
                    f"worker {absent} of {job.workers} did not come to {job.address} within {seconds:.0f} s; start "
                    "all workers again"
                )
                break
            # Whoever asks for something else, or went away, is no worker; the real one may still come.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                told = _read_line(connection, min(until, time.monotonic() + _SECONDS_TO_SPEAK))
                problem = _difference(job, facts, told, set(found))
                connections.append(connection)
                found[int(told["number"])] = told
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(problem).encode() + b"\n")
    if problem:
        raise CatdogError(problem)


def _difference(job: Job, facts: Mapping[str, str], told: Mapping[str, Any], present: set[int]) -> str:
    """Says in what a worker differs from the first one; an empty text where it does not."""
    number, theirs = int(told["number"]), told["facts"]
    name = f"worker {number} ({told['host']})"
    if told["workers"] != job.workers or not 0 < number < job.workers:
        return f"{name} thinks that it is one of {told['workers']} workers, the first one that there are {job.workers}"
    if number in present:
        return f"two workers call themselves number {number}, the second at {told['host']}; give each its own"
    differing = [key for key in (*facts, *sorted(set(theirs) - set(facts))) if theirs.get(key) != facts.get(key)]
    if not differing:
        return ""
    shown = ", ".join(
        f"{key} ({theirs.get(key, 'none')}, the first worker {facts.get(key, 'none')})" for key in differing[:3]
    )
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"{name} differs from the first worker in {shown}{more}; give it the same files, and start all again"


def _report_to_first(job: Job, facts: Mapping[str, str], until: float, seconds: float) -> None:
    host, _, port = job.address.rpartition(":")
    told = {"number": job.number, "workers": job.workers, "host": socket.gethostname(), "facts": dict(facts)}
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=max(0.01, until - time.monotonic())) as connection:
                connection.sendall(json.dumps(told).encode() + b"\n")
                # The first one answers when all are there: it may have begun to wait later than this one.
                problem = _read_line(connection, until + seconds)
            break
        except (OSError, ValueError) as error:
            if time.monotonic() >= until:
                raise CatdogError(
                    f"the first worker did not answer at {job.address} within {seconds:.0f} s ({_cause(error)}); start "
                    f"it, or correct {_PREFIX}JOB_ADDRESSES"
                ) from error
            time.sleep(0.5)
    if problem:
        raise CatdogError(problem)


def _cause(error: Exception) -> str:
    number = getattr(error, "errno", None) or 0
    if number > 0:
        return os.strerror(number)
    # That of a host which nobody knows is negative, and no number of the system's.
    return getattr(error, "strerror", None) or str(error)


def _read_line(connection: socket.socket, until: float) -> Any:
    """Reads one line of JSON; raises TimeoutError after `until`, and ValueError for anything else."""
    content = b""
    while not content.endswith(b"\n"):
        connection.settimeout(max(0.01, until - time.monotonic()))
        received = connection.recv(65536)
        content += received
        if not received or len(content) > _MESSAGE_BYTES:
            raise ValueError("the connection was closed before it said anything")
    return json.loads(content)


def from_first(job: Job, content: bytes) -> bytes:
    """Returns what the first worker gave, in all workers.

    Args:
        job: all its workers must call this at the same place of their work.
        content: below 2 GB; what the others give does not matter.
    """
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    given = np.frombuffer(content, np.uint8) if job.is_first else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(given), np.uint8)) if size else b""


def weights_from_first(job: Job | None, weights: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Returns the first worker's weights in all workers, whatever the others give; without a job, what is given.

    Raises:
        CatdogError: the workers compute on devices of different kinds or number.
    """
    if job is None:
        return weights
    # Not before: what `runtime.prepare_keras` sets counts only until JAX first looks for its devices.
    _require_equal_devices(job)
    state = _state_from_first(job, State({"weights": weights}, {}))
    assert state is not None
    return state.arrays["weights"]


def _state_from_first(job: Job, state: State | None) -> State | None:
    buffer = io.BytesIO()
    if state is not None:
        write_state(buffer, state)
    content = from_first(job, buffer.getvalue())
    return read_state(io.BytesIO(content)) if content else None


class JobCheckpoints(Checkpoints):
    """The first worker's checkpoints, from which all workers of a job go on; only the first one writes them."""

    def __init__(self, job: Job, kept: Checkpoints) -> None:
        """Wraps the first worker's checkpoints; the others give some that keep none."""
        super().__init__(None)
        self._job = job
        self._kept = kept

    def due(self) -> bool:
        """Says whether it is time for another checkpoint; the others write none."""
        return self._kept.due()

    def save(self, phase: str, state: State) -> None:
        """Writes the phase's checkpoint, in the first worker."""
        self._kept.save(phase, state)

    def load(self, phase: str) -> State | None:
        """Returns the first worker's checkpoint in all workers."""
        return _state_from_first(self._job, self._kept.load(phase))
