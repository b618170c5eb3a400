"""Runs a command and notes what it took: python -S -E usage.py LOG COMMAND [ARGUMENT ...]

A process of its own, which imports next to nothing, because Linux starts a command's peak memory (`ru_maxrss`) at that
of the process that starts it: started from a process of 300 MB, `true` has a peak of 300 MB.

A line is added to LOG: `command` without the program, `seconds` of wall clock, `cpu_seconds` on all cores, `peak_mb` of
the largest process among the command and what it waited for, and its `exit` status, which is also this script's.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> int:
    """Runs the command and returns its exit status."""
    log, *command = sys.argv[1:]
    started = time.perf_counter()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    line = {
        "command": command[1:],
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6, 1),  # Linux counts in KiB
        "exit": code,
    }
    # One write of one line: stages of several projects may share a log.
    with open(log, "a", encoding="utf-8") as file:  # noqa: PTH123  # pathlib takes longer to import than all else here
        file.write(json.dumps(line) + "\n")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
