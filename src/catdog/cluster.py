"""A Ray cluster, as `compute: ray` finds it: connected to, and checked node by node before work starts.

Every node must see the working directory at the same path, and hold the same code and the same versions of the
libraries that decide about an output's bytes. Ray starts nothing here: a cluster that runs already is joined, and left
as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import catdog
from catdog.errors import CatdogError
from catdog.files import write_text
from catdog.parallel import processors
from catdog.runtime import notices_held_back, processor_name

SECONDS_TO_ANSWER = 5.0
"""How long the cluster's address may take to accept a connection."""
SECONDS_TO_CHECK = 120.0
"""How long a node may take to start a process and say what it has."""
# A directory that another machine wrote into may be remembered without its newest file, for so many seconds.
_SECONDS_TO_APPEAR = 5.0

# Each library by the names of the packages that bring it.
_LIBRARIES = {
    "numpy": ("numpy",),
    "simplejpeg": ("simplejpeg",),
    "opencv": ("opencv-python-headless", "opencv-python"),
    "pillow": ("pillow",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
    "openvino": ("openvino",),
}
# What steers the libraries in the caller's environment, and must steer them in the same way elsewhere.
_PASSED_ON = ("DVC_ROOT", "JAX_", "KERAS_", "TF_", "XLA_")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str  # Ray's
    name: str  # for people: host name and address
    cpus: int  # that Ray may use
    gpus: int


@contextlib.contextmanager
def join_cluster(folder: Path) -> Iterator[list[Node]]:
    """Connects to the cluster that RAY_ADDRESS names, checks its nodes, and leaves it in the end.

    Processes on the nodes import the code that this process runs, under the variables that steer Keras here. They
    get as many TensorFlow threads as this process has: sums depend on how many there are.

    Args:
        folder: where the work is written; each node must see it.

    Yields:
        The nodes that have processors to give, in the order of their names.

    Raises:
        CatdogError: Ray or the address is missing, nothing answers there, or a node cannot do this work.
    """
    address = _address()
    _connect(address)
    try:
        yield _check_nodes(folder)
    finally:
        import ray

        ray.shutdown()


def _address() -> str:
    address = os.environ.get("RAY_ADDRESS", "").strip()
    how = "start one with `ray start --head`, and set RAY_ADDRESS=auto on a machine of it (docs/cluster.md)"
    if address in ("", "local"):
        told = "is not set" if not address else "= 'local' would start a cluster of its own"
        raise CatdogError(f"compute = 'ray' works on a Ray cluster that runs already, but RAY_ADDRESS {told}; {how}")
    if address.startswith("ray://"):
        raise CatdogError(
            f"RAY_ADDRESS = {address!r} asks for Ray's client mode, in which this process would not be on the cluster; "
            "run on one of its machines with RAY_ADDRESS=auto, or give its address as host:port"
        )
    if importlib.util.find_spec("ray") is None:
        raise CatdogError("compute = 'ray' needs Ray, which is not installed; `pip install 'catdog[ray]'`")
    if address != "auto":
        _require_answer(address, how)
    return address


def _require_answer(address: str, how: str) -> None:
    """Raises CatdogError where nothing listens: Ray itself would try again for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except ValueError:
        raise CatdogError(f"RAY_ADDRESS = {address!r} must be auto or host:port, for example 10.0.0.5:6379") from None
    except OSError as error:
        raise CatdogError(f"no Ray cluster answers at RAY_ADDRESS = {address!r} ({error}); {how}") from None


def _connect(address: str) -> None:
    # One attempt of 40 seconds; else 20 of them.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It prints the last lines of a dead node's log, a screenful, among those of the stage.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    failure: Exception | None = None
    in_main = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGTERM)
    with notices_held_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that Ray will change
        import ray

        try:
            ray.init(
                address=address,
                # What dying processes write, some hundred lines each, would run into the stage's own.
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": _environment()},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            failure = error
    if in_main:
        signal.signal(signal.SIGTERM, former)  # Ray puts its own in its place
    if failure is not None:
        cause = " ".join(str(failure).split())[:300].rstrip(".")
        raise CatdogError(
            f"the Ray cluster at RAY_ADDRESS = {address!r} cannot be used ({cause}); check the address, and that the "
            "cluster has this machine's versions of Ray and Python"
        )


def _environment() -> dict[str, str]:
    """The variables under which processes on the nodes start."""
    import keras

    passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    own = {
        "PYTHONPATH": str(_source()),
        "KERAS_BACKEND": keras.backend.backend(),
        # What TensorFlow takes on its own: all processors that it may use.
        "TF_NUM_INTRAOP_THREADS": str(processors()),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return own | passed_on


def _source() -> Path:
    """The folder from which this process imports the package, in an experiment its own copy of the code."""
    return Path(catdog.__file__).resolve().parents[1]


def _check_nodes(folder: Path) -> list[Node]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = sorted((_node(entry) for entry in ray.nodes() if entry["Alive"]), key=lambda node: (node.name, node.id))
    nodes = [node for node in found if node.cpus]
    if not nodes:
        raise CatdogError("no node of the Ray cluster has a processor to give; start nodes with --num-cpus above 0")
    token = folder / f".seen-by-every-node-{secrets.token_hex(8)}"
    write_text(token, token.name)
    try:
        look = ray.remote(describe_machine)
        places = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
        asked = [
            look.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(token.resolve())
            for place in places
        ]
        answers = [(node, _answer(node, reference)) for node, reference in zip(nodes, asked, strict=True)]
    finally:
        token.unlink(missing_ok=True)
    own = describe_machine(None)
    living = [(node, answer) for node, answer in answers if answer is not None]
    for node, answer in living:
        require_same_machine(own, answer, node.name, folder)
    processors = {own["processor"], *(answer["processor"] for _, answer in living)}
    if len(processors) > 1:
        print(
            f"cluster: its processors differ ({'; '.join(sorted(processors))}), and so may the last digits of what "
            "they compute",
            file=sys.stderr,
        )
    return [node for node, _ in living]


def _node(entry: Mapping[str, Any]) -> Node:
    resources = entry["Resources"]
    name = f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']})"
    return Node(entry["NodeID"], name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _answer(node: Node, reference: Any) -> dict[str, str] | None:
    """What a node says of itself; None where it has died since it was listed."""
    import ray

    try:
        answer: dict[str, str] = ray.get(reference, timeout=SECONDS_TO_CHECK)
    except ray.exceptions.GetTimeoutError:
        raise CatdogError(
            f"node {node.name} of the Ray cluster did not answer in {SECONDS_TO_CHECK:.0f} seconds; look at its logs, "
            "or take it out of the cluster"
        ) from None
    except ray.exceptions.RayError as error:
        if not is_alive(node):
            return None
        if "No module named 'catdog'" in str(error):
            raise CatdogError(
                f"node {node.name} of the Ray cluster does not see {_source()}; share the working directory with it, "
                "under the same path"
            ) from None
        raise CatdogError(
            f"node {node.name} of the Ray cluster cannot start a process ({last_line(error)}); look at its logs, or "
            "take it out of the cluster"
        ) from None
    return answer


def is_alive(node: Node) -> bool:
    """Says whether the cluster still counts on a node; it takes about 10 seconds to notice that one died."""
    import ray

    return any(entry["Alive"] and entry["NodeID"] == node.id for entry in ray.nodes())


def last_line(error: Exception) -> str:
    """What a long message of Ray ends with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200].rstrip(".") if lines else type(error).__name__


def describe_machine(token: Path | None) -> dict[str, str]:
    """Returns what this machine would do the work with, each by a name for people.

    Args:
        token: a file whose content is its own name; None: there is none to look for.

    Returns:
        folder ("seen" or "not seen"), code (a hash of the package's source), python, each library of those that
        decide about an output's bytes, and processor.
    """
    package = Path(catdog.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"\0{path.relative_to(package)}\0".encode() + path.read_bytes())
    return {
        "folder": "seen" if token is None or _appears(token) else "not seen",
        "code": digest.hexdigest()[:16],
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{library: _version(packages) for library, packages in _LIBRARIES.items()},
        "processor": processor_name(),
    }


def _appears(token: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        with contextlib.suppress(OSError):
            return token.read_text(encoding="utf-8") == token.name
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _version(packages: Sequence[str]) -> str:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "none"


def require_same_machine(own: Mapping[str, str], found: Mapping[str, str], name: str, folder: Path) -> None:
    """Refuses a node whose outputs would not be those of this machine.

    Args:
        own: of this machine, as `describe_machine` says it.
        found: of the node.
        name: of the node.
        folder: where the work is written.

    Raises:
        CatdogError: the node does not see the folder, or has other code or another version of a library.
    """
    if found["folder"] != "seen":
        raise CatdogError(
            f"node {name} of the Ray cluster does not see {folder.resolve()}; share the working directory with it, "
            "under the same path"
        )
    if found["code"] != own["code"]:
        raise CatdogError(
            f"node {name} of the Ray cluster runs other code of catdog than {_source()}; share the working "
            "directory with it, under the same path"
        )
    differing = [f"{key} {found[key]} (here {own[key]})" for key in ("python", *_LIBRARIES) if found[key] != own[key]]
    if differing:
        raise CatdogError(
            f"node {name} of the Ray cluster has {', '.join(differing)}, and would write other bytes; install "
            "the same lock file on every node"
        )
