"""Signals that end a process as an exit does, so that what must still be done on the way out is done."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Ending:
    """What a block of `ended_by` knows of the signals that shall end it."""

    _received: int | None = None
    _waits: bool = False

    @contextlib.contextmanager
    def afterwards(self) -> Iterator[None]:
        """Has a signal that comes in this block take effect at its end: for a step that must not be done by half."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.exit_if_received()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self._received = self._received or number
        if not self._waits:
            self.exit_if_received()

    def exit_if_received(self) -> None:
        """Raises SystemExit with status 128 + number, as a shell tells a signal, if one came."""
        if self._received is not None:
            raise SystemExit(128 + self._received)


@contextlib.contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[Ending]:
    """Has each of these signals end the block with SystemExit, status 128 + number.

    Python runs a handler between any two instructions, so that others may get hold of its exception: an extension
    module that is being initialized makes an ImportError of it, and a finalizer drops it. The block ends with
    SystemExit all the same. A signal that is ignored when the block begins, as under nohup, stays ignored.

    Blocks may be nested. To be used in the main thread.
    """
    ending = Ending()
    former = {number: signal.getsignal(number) for number in numbers}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ending.receive)
    try:
        yield ending
    except Exception:
        ending.exit_if_received()
        raise
    else:
        ending.exit_if_received()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
