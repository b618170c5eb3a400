"""The same work on many items, on all processors: in threads, or in processes where threads would wait for each other.

Decoding, resizing, encoding and hashing release the interpreter's lock, and so run beside each other in threads. What
Python does between them does not: with two threads on two processors a third of the time goes into waiting, and with
more of both, more. Processes wait for nothing, but take as long to start as work on a thousand images.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from catdog.errors import CatdogError
from catdog.second_process import fresh_processes

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAST_IMAGES = 3000
"""Fewer images are done in threads before processes have started and done them (measured on two processors)."""
LEAST_FOR_EACH = 250
"""Images that each of many processes must have to do, to be worth its memory."""
_AT_ONCE = 32  # items that travel together
_AHEAD = 4
"""Such groups under way or waiting to be yielded, at most, for each process."""


def processors() -> int:
    """Returns how many processors this process may use: the machine's, or what a batch system or `taskset` left it."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int = 32
) -> Iterator[Result]:
    """Runs a function over images, or shards, in a pool of threads and yields the results in their order.

    Args:
        function: what is done.
        items: taken as the work goes on.
        workers: threads.
        ahead: items under way or waiting, at most, behind the one whose result is yielded next.
    """
    with ThreadPoolExecutor(workers) as pool:
        yield from _in_order((pool.submit(function, item) for item in items), ahead)


def _in_order(submitted: Iterator[Future[Result]], ahead: int) -> Iterator[Result]:
    """Yields the results of calls that the iterator submits; keeps none, and cancels the rest where it ends early."""
    waiting: deque[Future[Result]] = deque()
    try:
        for future in submitted:
            waiting.append(future)
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def image_workers(
    make: Callable[[], Callable[[Item], Result]], images: int, *, workers: int
) -> Iterator[Callable[[Sequence[Item]], Iterator[Result]]]:
    """Starts what runs a function over many images: processes, if there are enough for more than one, else threads.

    The results are the same.

    Args:
        make: opens what the work needs, once in every process, and returns the function. It travels as a pickle, and
            so do items and results.
        images: how many there are.
        workers: processors.

    Yields:
        When all have opened what they need: a function that takes the items and yields the results in their order.
        Only a few are under way at a time, however many there are.

    Raises:
        CatdogError: a process died. What `make` and the function raise comes as it is.
    """
    processes = min(workers, images // LEAST_FOR_EACH)
    if processes < 2 or images < LEAST_IMAGES:
        function = make()
        yield lambda items: map_in_threads(function, items, workers=workers)
        return
    pickled = pickle.dumps(make)
    try:
        with fresh_processes(processes) as pool:

            def map_all(items: Sequence[Item]) -> Iterator[Result]:
                groups = (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
                submitted = (pool.submit(_do, pickled, group) for group in groups)
                for results in _in_order(submitted, processes * _AHEAD - 1):
                    yield from results

            # The pool starts a process for each call that finds none idle.
            for opened in [pool.submit(_do, pickled, ()) for _ in range(processes)]:
                opened.result()
            yield map_all
    except BrokenProcessPool:
        raise process_died(processes) from None


def process_died(processes: int) -> CatdogError:
    """Returns what to raise for BrokenProcessPool, of so many processes."""
    return CatdogError(
        f"one of {processes} processes died at its work; too little memory may be to blame, so close other "
        "programs and run again"
    )


@functools.cache
def _open(pickled: bytes) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(pickled)()
    return function


def _do(pickled: bytes, items: Sequence[Any]) -> list[Any]:
    function = _open(pickled)
    return [function(item) for item in items]
