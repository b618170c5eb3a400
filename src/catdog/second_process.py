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

    It is a fresh one, since a copy of this one would hold its locks, so functions, arguments and results travel as
    pickles. It does one thing after the other. What a function raises there, its `result()` raises here.

    Yields:
        Its `submit(function, *arguments)` returns a future.
    """
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=live_and_die_with_the_first)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def live_and_die_with_the_first() -> None:
    """Has this process leave interrupts to the one that started it, and end when that one ends, however it does."""
    # Ctrl-C reaches both, and what ends a group of processes does; the first one tells, and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    first = multiprocessing.parent_process()
    assert first is not None

    def watch() -> None:
        first.join()
        os._exit(1)  # it was killed, and nobody reads what is made here

    threading.Thread(target=watch, daemon=True).start()
