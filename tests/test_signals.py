"""Signals that end a block: always as an exit, and never in the middle of a step."""

import os
import signal
import time

import pytest

from catdog.signals import ended_by


def send(number):
    """Sends this process a signal and gives Python the time to run its handler."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_with_its_status(number):
    former = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, ended_by(signal.SIGTERM, signal.SIGINT):
        send(number)
        pytest.fail("the block goes on")
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is former


@pytest.mark.parametrize("error", [ImportError("initialization failed"), None], ids=["turned", "dropped"])
def test_it_does_so_whatever_was_made_of_it_on_the_way(error):
    """An extension module that is terminated while it is initialized raises ImportError; a finalizer raises nothing."""
    with pytest.raises(SystemExit) as stopped, ended_by(signal.SIGTERM):
        try:
            send(signal.SIGTERM)
        except SystemExit:
            if error:
                raise error from None
    assert stopped.value.code == 128 + signal.SIGTERM


def test_a_step_is_done_to_its_end_first():
    done = []
    with pytest.raises(SystemExit) as stopped, ended_by(signal.SIGTERM) as ending:
        with ending.afterwards():
            send(signal.SIGTERM)
            done.append("step")
        done.append("what follows")
    assert (stopped.value.code, done) == (128 + signal.SIGTERM, ["step"])


def test_other_errors_pass_as_they_are():
    with pytest.raises(ImportError, match="no such module"), ended_by(signal.SIGTERM):
        raise ImportError("no such module")


def test_blocks_may_be_nested():
    with pytest.raises(SystemExit) as outer, ended_by(signal.SIGTERM):
        with pytest.raises(SystemExit) as inner, ended_by(signal.SIGTERM):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
    assert inner.value.code == outer.value.code == 128 + signal.SIGTERM


def test_what_is_ignored_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_by(signal.SIGINT):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)
