"""Where work on shards is done: by this process, or by workers on a Ray cluster.

A worker is made by a function without arguments, which opens and compiles what the work needs, once, and returns the
function that does one item. That function neither knows nor cares where it runs; its items share nothing. Items are
taken in order, results come back in order, and only a few are under way at a time, however many there are.

A worker may die with its process, or with its node. What it had finished is in its files; its item is done again by
another one. What the function itself raises is raised here, as it would be without a cluster, and not tried again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from catdog.cluster import Node, is_alive, join_cluster, last_line
from catdog.errors import CatdogError
from catdog.parallel import map_in_threads, processors

Share = Literal["cpu", "device", "node"]
"""What one worker takes: a processor (here: a thread), a GPU or else a processor, or a node with all that it has."""

DEATHS = 3
"""An item at which so many workers died is given up."""
AHEAD = 4
"""Items under way or waiting to be yielded, at most, for each worker."""
NODE_THREADS = 2
"""Items at a time for a local worker that has the whole machine: one is opened while the other computes."""
_SECONDS_SILENT = 30.0


class Named(Protocol):
    """An item of work."""

    @property
    def name(self) -> str:
        """What it is called in a message."""


Item = TypeVar("Item", bound=Named)
Result = TypeVar("Result")
MakeWorker = Callable[[], Callable[[Item], Result]]
"""Sets a worker up, and returns the function that it does each item with."""
MapItems = Callable[[Sequence[Item]], Iterator[Result]]
"""Does every item, and yields the results in the order of the items."""


class Compute(Protocol):
    """A place to work."""

    @property
    def is_local(self) -> bool:
        """Whether the work is done in this process."""

    def workers(
        self, make: MakeWorker[Item, Result], share: Share
    ) -> contextlib.AbstractContextManager[MapItems[Item, Result]]:
        """Sets workers up, which live until the block ends; yields the function that gives them items."""

    def facts(self, share: Share) -> dict[str, str]:
        """Returns where the work is done, and by how many workers, as texts for `StageRun.note`."""


@contextlib.contextmanager
def open_compute(kind: Literal["local", "ray"], folder: Path) -> Iterator[Compute]:
    """Opens the place that the parameter `compute` names.

    Args:
        kind: the parameter.
        folder: where the work is written; each node of a cluster must see it under the same path.

    Raises:
        CatdogError: as `cluster.join_cluster`.
    """
    if kind == "local":
        yield Local()
        return
    with join_cluster(folder) as nodes:
        yield Cluster(nodes)


class Local:
    """This process: one worker, whose function several threads share."""

    is_local = True

    @contextlib.contextmanager
    def workers(self, make: MakeWorker[Item, Result], share: Share) -> Iterator[MapItems[Item, Result]]:
        """Sets the one worker up, whose function the threads share."""
        function = make()
        threads = {"cpu": processors(), "device": 1, "node": NODE_THREADS}[share]
        yield lambda items: map_in_threads(function, items, workers=threads) if threads > 1 else map(function, items)

    def facts(self, share: Share) -> dict[str, str]:
        """Says that it was done here."""
        return {"compute": "local"}


class Cluster:
    """Nodes of a Ray cluster that this process has joined."""

    is_local = False

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Takes the nodes, all of which are used."""
        self._nodes = nodes

    @contextlib.contextmanager
    def workers(self, make: MakeWorker[Item, Result], share: Share) -> Iterator[MapItems[Item, Result]]:
        """Starts a process a worker on the nodes."""
        crew = _Crew[Item, Result](make, [slot for node in self._nodes for slot in _slots(node, share)])
        try:
            yield crew.map
        finally:
            crew.dismiss()

    def facts(self, share: Share) -> dict[str, str]:
        """Counts nodes and workers."""
        count = sum(len(_slots(node, share)) for node in self._nodes)
        return {"compute": "ray", "compute.nodes": str(len(self._nodes)), "compute.workers": str(count)}


@dataclass(frozen=True)
class _Slot:
    """A place for one worker."""

    node: Node
    cpus: int
    gpus: int


def _slots(node: Node, share: Share) -> list[_Slot]:
    if share == "node":
        return [_Slot(node, node.cpus, node.gpus)]
    if share == "device" and node.gpus:
        return [_Slot(node, 1, 1)] * min(node.gpus, node.cpus)
    return [_Slot(node, 1, 0)] * node.cpus


class _Worker:
    """What runs in a process of its own on a node."""

    def set_up(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        # Where the caller works, so that relative paths mean the same.
        os.chdir(folder)
        self._function = make()

    def do(self, item: Any) -> Any:
        return self._function(item)


@dataclass
class _Member:
    """A worker as this process knows it."""

    slot: _Slot
    actor: Any
    attempt: int = 1  # at setting up a worker in this slot, since one was ready


@dataclass
class _Task(Generic[Item]):
    """An item on its way."""

    position: int
    item: Item


@dataclass
class _Crew(Generic[Item, Result]):
    """Workers on a cluster, each replaced when it dies."""

    make: MakeWorker[Item, Result]
    slots: list[_Slot]
    starting: dict[Any, _Member] = field(default_factory=dict)  # by Ray's reference of what is awaited
    idle: deque[_Member] = field(default_factory=deque)
    busy: dict[Any, tuple[_Member, _Task[Item]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slot in self.slots:
            self._start(slot, attempt=1)

    @property
    def _members(self) -> list[_Member]:
        return [*self.starting.values(), *self.idle, *(member for member, _ in self.busy.values())]

    def dismiss(self) -> None:
        """Ends all workers, whatever they are at."""
        import ray

        for member in self._members:
            # The cluster may be gone by now.
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
                ray.kill(member.actor)

    def map(self, items: Sequence[Item]) -> Iterator[Result]:
        """Does every item; yields the results in order. Called again only when it has yielded the last."""
        ahead = AHEAD * len(self.slots)
        again: deque[_Task[Item]] = deque()
        results: dict[int, Result] = {}
        deaths: Counter[int] = Counter()
        given = 0
        for position in range(len(items)):
            while position not in results:
                while self.idle and (again or given < min(len(items), position + ahead)):
                    if again:
                        task = again.popleft()
                    else:
                        task = _Task(given, items[given])
                        given += 1
                    member = self.idle.popleft()
                    self.busy[member.actor.do.remote(task.item)] = (member, task)
                self._await_one(results, again, deaths)
            yield results.pop(position)

    def _await_one(self, results: dict[int, Result], again: deque[_Task[Item]], deaths: Counter[int]) -> None:
        """Waits until a worker is ready or has done its item, or has died."""
        import ray

        if not self._members:
            raise CatdogError("every node of the Ray cluster that took part is gone; start nodes and run again")
        ready, _ = ray.wait([*self.starting, *self.busy], num_returns=1, timeout=_SECONDS_SILENT)
        if not ready and not self.busy and not self.idle:
            print("cluster: waiting for processors that other work on the cluster holds", file=sys.stderr)
        for reference in ready:
            starts = reference in self.starting
            member, task = (self.starting.pop(reference), None) if starts else self.busy.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise _own_error(error) from None
            except ray.exceptions.RayError as error:
                self._replace(member, task, last_line(error), deaths)
                if task is not None:
                    again.append(task)
                continue
            if task is not None:
                results[task.position] = result
            member.attempt = 0
            self.idle.append(member)

    def _replace(self, member: _Member, task: _Task[Item] | None, cause: str, deaths: Counter[int]) -> None:
        """Starts another worker for one that died, where its node still lives."""
        import ray

        node = member.slot.node
        # One that only cannot be reached must not go on in secret.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)
        if task is not None:
            deaths[task.position] += 1
            if deaths[task.position] >= DEATHS:
                raise CatdogError(
                    f"{task.item.name} killed its worker {DEATHS} times, at last on {node.name} ({cause}); too "
                    "little memory may be to blame, and Ray's logs on that node say more"
                )
        alive = is_alive(node)
        lost = "died" if alive else "is gone with its node"
        then = f"; {task.item.name} is done again" if task is not None else ""
        print(f"cluster: a worker on {node.name} {lost}{then}", file=sys.stderr)
        if not alive:
            return
        if task is None and member.attempt >= DEATHS:
            raise CatdogError(
                f"a worker on node {node.name} of the Ray cluster died {DEATHS} times before it was ready ({cause}); "
                "Ray's logs on that node say more, or take it out of the cluster"
            )
        self._start(member.slot, attempt=member.attempt + 1)

    def _start(self, slot: _Slot, *, attempt: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        hidden = {} if slot.gpus or not slot.node.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        actor = (
            ray.remote(_Worker)
            .options(
                num_cpus=slot.cpus,
                num_gpus=slot.gpus,
                scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node.id, soft=False),
                runtime_env=hidden,
            )
            .remote()
        )
        self.starting[actor.set_up.remote(self.make, str(Path.cwd()))] = _Member(slot, actor, attempt)


def _own_error(error: Any) -> Exception:
    """What a worker's function raised, with the trace of the worker as a note."""
    cause = error.cause
    if not isinstance(cause, Exception):
        return CatdogError(f"a worker failed: {last_line(error)}")
    cause.add_note(str(error))
    return cause
