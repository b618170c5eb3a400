"""Work in a second process: its results and errors come back, and it never outlives the first one."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from catdog.errors import CatdogError
from catdog.second_process import second_process

SLEEPER = """
import os
import time
from catdog.second_process import second_process

if __name__ == "__main__":
    with second_process() as second:
        print(second.submit(os.getpid).result(), flush=True)
        second.submit(time.sleep, 600)
        time.sleep(600)
"""


def refuse(name):
    raise CatdogError(f"{name} cannot be drawn")


def test_results_and_errors_come_back():
    with second_process() as second:
        assert second.submit(os.getpid).result() not in (os.getpid(), os.getppid())
        with pytest.raises(CatdogError, match="the cat cannot be drawn"):
            second.submit(refuse, "the cat").result()
        assert second.submit(max, 3, 4).result() == 4  # an error does not end it


def test_it_ends_with_the_block():
    with second_process() as second:
        number = second.submit(os.getpid).result()
    assert not psutil.pid_exists(number)


def test_an_error_ends_it_whatever_it_is_at_and_has_waiting():
    with pytest.raises(CatdogError), second_process() as second:
        number = second.submit(os.getpid).result()
        begun = [second.submit(time.sleep, 600) for _ in range(5)]
        time.sleep(0.5)  # the pool has handed on some of them
        raise CatdogError("what is wrong here")
    assert all(future.done() for future in begun)
    assert not psutil.pid_exists(number)


def test_it_does_not_outlive_a_first_one_that_is_killed(tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as first:
        number = int(first.stdout.readline())
        assert psutil.pid_exists(number)
        first.kill()
    until = time.monotonic() + 300
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_the_first_ones_from_the_beginning(signum, capfd):
    """Also before the first line of Python, which an interrupt would end with a traceback."""
    with second_process() as second:
        answer = second.submit(max, 3, 4)
        (number,) = second._processes
        os.kill(number, signum)
        assert answer.result() == 4
        assert second.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result() == set()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_the_first_ones(signum):
    with second_process() as second:
        number = second.submit(os.getpid).result()
        os.kill(number, signum)
        assert second.submit(max, 3, 4).result() == 4
