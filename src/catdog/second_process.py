"""A second process for work that is mostly Python, which one process does on one processor only."""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

_LEFT_TO_THE_FIRST = (signal.SIGINT, signal.SIGTERM)


def second_process() -> contextlib.AbstractContextManager[Executor]:
    """Returns a block's second process, as `fresh_processes` does; it does one thing after the other."""
    return fresh_processes(1)


@contextlib.contextmanager
def fresh_processes(count: int) -> Iterator[Executor]:
    """Starts processes as they are needed, and ends them with the block; an error in it ends them whatever they are at.

    The block should wait for all that it has them do: what is waiting at its end may be left.

    Args:
        count: how many there are at most.

    Yields:
        Their `submit(function, *arguments)` returns a future.
    """
    pool = FreshProcesses(count)
    try:
        yield pool
    except BaseException:
        # To cancel what is waiting is not enough: of that the pool has handed on the next two things already.
        pool.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class FreshProcesses(ProcessPoolExecutor):
    """A pool of processes that leave interrupts to this one and end when it ends, however it does.

    They are fresh ones, since copies of this one would hold its locks, so functions, arguments and results travel as
    pickles. What a function raises there, its `result()` raises here.
    """

    def __init__(self, count: int) -> None:
        """Takes how many there are at most; one starts with each call that finds none idle."""
        context = multiprocessing.get_context("spawn")
        # Nothing is ever sent: it ends where this process closes its side or is no more.
        there, self._here = context.Pipe(duplex=False)
        super().__init__(count, context, initializer=_live_and_die_with_the_first, initargs=(there,))

    def submit(self, *call: Any, **arguments: Any) -> Future[Any]:
        """As the base class; a process that starts for it is deaf to interrupts from its first moment on."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_FIRST)  # a new process inherits it
        try:
            return super().submit(*call, **arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def kill(self) -> None:
        """Ends all processes, whatever they are at."""
        self._here.close()


def _live_and_die_with_the_first(first: Connection) -> None:
    atexit.register(gc.freeze)  # nothing is left to collect in a process that ends; the first one waits for that end
    # Ctrl-C reaches both, and what ends a group of processes does; the first one tells, and ends this one.
    for number in _LEFT_TO_THE_FIRST:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_THE_FIRST)

    def watch() -> None:
        first.poll(None)
        os._exit(1)  # nobody reads what is made here

    threading.Thread(target=watch, daemon=True).start()
