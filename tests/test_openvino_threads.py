"""OpenVINO in a process whose threads are the first to use it."""

import subprocess
import sys

SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from catdog.inference import import_openvino, run_openvino

openvino = import_openvino()
from openvino import opset13 as ops

pixels = ops.parameter([-1, 4, 4, 3], np.uint8, name="pixels")
network = openvino.Model([ops.reduce_max(pixels, np.array([1, 2, 3]), keep_dims=False)], [pixels])
forward = run_openvino(network)
sys.setswitchinterval(1e-6)  # Python's threads take turns as often as they can
pictures = np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
begin = Barrier(8)
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda _: (begin.wait(), forward([pictures]))[1], range(8)))
assert all((answer == pictures.max(axis=(1, 2, 3))).all() for answer in answers)
"""


def test_threads_that_begin_together_do_not_wait_for_each_other_for_ever():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
