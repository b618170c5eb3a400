"""A second process for work that is mostly Python, which one process does on one processor only."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor


@contextlib.contextmanager
def second_process() -> Iterator[Executor]:
    """Starts a process at once, and ends it with the block; what is still waiting for it then is not begun.

    It does one thing after the other.

    Yields:
        Its `submit(function, *arguments)` returns a future.
    """
    pool = fresh_processes(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def fresh_processes(count: int) -> ProcessPoolExecutor:
    """Returns a pool of processes that leave interrupts to this one and end when it ends, however it does.

    They are fresh ones, since copies of this one would hold its locks, so functions, arguments and results travel as
    pickles. What a function raises there, its `result()` raises here.

    Args:
        count: at most; one starts with each call that finds none idle.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_live_and_die_with_the_first)


def _live_and_die_with_the_first() -> None:
    # Ctrl-C reaches both, and what ends a group of processes does; the first one tells, and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    first = multiprocessing.parent_process()
    assert first is not None

    def watch() -> None:
        first.join()
        os._exit(1)  # it was killed, and nobody reads what is made here

    threading.Thread(target=watch, daemon=True).start()
