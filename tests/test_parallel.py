"""The same work on many images, in threads or in processes: in order, few at a time, to its end."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from catdog import parallel
from catdog.archives import open_archive
from catdog.compute import Local
from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.images import ImageError
from catdog.labels import label_files
from catdog.parallel import image_workers, map_in_threads
from catdog.preprocessing import shard_writers
from catdog.quality import inspect_archive
from catdog.records import ImageRow, plan_shards

ROOT = Path(__file__).parents[1]


# Threads


@pytest.mark.parametrize("workers", [1, 4])
def test_results_of_the_pool_are_in_the_order_of_the_shards(workers):
    last_first = [threading.Event() for _ in range(4)]

    def work(number: int) -> int:
        if workers == 4 and number < 3:
            assert last_first[number + 1].wait(60)
        last_first[number].set()
        return number * number

    assert list(map_in_threads(work, range(4), workers=workers)) == [0, 1, 4, 9]


def test_error_in_the_pool_is_raised_and_cancels_the_rest():
    done = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("broken")
        done.append(number)

    with pytest.raises(ValueError, match="broken"):
        list(map_in_threads(work, range(1000), workers=1))
    assert len(done) < 1000


def test_threads_keep_no_result_and_run_a_few_items_ahead():
    class Picture:
        pass

    made = []

    def work(_):
        picture = Picture()
        made.append(weakref.ref(picture))
        return picture

    for taken, _ in enumerate(map_in_threads(work, range(300), workers=2, ahead=8), start=1):
        assert len(made) <= taken + 8
        # The one in hand, those that wait, and one that each thread has just made.
        assert sum(one() is not None for one in made) <= 1 + 8 + 2
    assert len(made) == 300


# Processes


def doubler(told=None):
    """Makes what doubles a number, and tells in a folder which process did it."""
    parts = []  # one list for each process: not pickled, but made there

    def double(number):
        parts.append(number)
        if told is not None:
            (told / f"{number}-{os.getpid()}-{len(parts)}").touch()
        return 2 * number

    return double


def refuser(where):
    if where == "opening":
        raise CatdogError("the archive cannot be read")

    def refuse(number):
        if number == 70:
            raise ImageError("no picture")
        return number

    return refuse


def killer(told):
    def die_at_the_end(number):
        if number == 150:
            (told / "dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return die_at_the_end


@pytest.fixture
def few(monkeypatch):
    """Two processes are worth their start for 8 images."""
    monkeypatch.setattr(parallel, "LEAST_IMAGES", 8)
    monkeypatch.setattr(parallel, "LEAST_FOR_EACH", 4)


@pytest.mark.usefixtures("few")
def test_processes_yield_the_results_in_order_and_share_the_work(tmp_path):
    numbers = range(300)
    with image_workers(functools.partial(doubler, tmp_path), len(numbers), workers=2) as double_all:
        assert list(double_all(numbers)) == [2 * number for number in numbers]
    told = [path.name.split("-") for path in tmp_path.iterdir()]
    assert sorted(int(number) for number, _, _ in told) == list(numbers)  # each once
    by_process = [
        max(int(count) for _, process, count in told if process == one) for one in {one for _, one, _ in told}
    ]
    assert len(by_process) == 2
    assert str(os.getpid()) not in {process for _, process, _ in told}
    assert sum(by_process) == 300  # each had opened its work once, and kept it


@pytest.mark.parametrize(("images", "workers"), [(7, 2), (300, 1), (0, 2)])
@pytest.mark.usefixtures("few")
def test_few_images_or_one_processor_stay_in_this_process(tmp_path, images, workers):
    with image_workers(functools.partial(doubler, tmp_path), images, workers=workers) as double_all:
        assert list(double_all(range(images))) == [2 * number for number in range(images)]
    assert {path.name.split("-")[1] for path in tmp_path.iterdir()} <= {str(os.getpid())}


@pytest.mark.usefixtures("few")
def test_only_a_few_are_under_way_ahead_of_the_caller(tmp_path):
    numbers = range(2000)
    with image_workers(functools.partial(doubler, tmp_path), len(numbers), workers=2) as double_all:
        results = double_all(numbers)
        assert next(results) == 0
        until = time.monotonic() + 2
        while time.monotonic() < until:
            time.sleep(0.1)
            done = len(list(tmp_path.iterdir()))
            assert done <= 2 * parallel._AHEAD * parallel._AT_ONCE < 1000
    assert done >= 1


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("where", "error", "sentence"),
    [("opening", CatdogError, "the archive cannot be read"), ("working", ImageError, "no picture")],
)
def test_an_error_comes_as_it_is_and_ends_the_processes(where, error, sentence):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with (
        pytest.raises(error, match=f"^{sentence}$"),
        image_workers(functools.partial(refuser, where), 300, workers=2) as do_all,
    ):
        list(do_all(range(300)))
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert not [process for process in left if "spawn_main" in " ".join(process.cmdline())]


@pytest.mark.usefixtures("few")
def test_a_process_that_dies_is_told_in_one_sentence(tmp_path):
    with (
        pytest.raises(CatdogError, match=r"^one of 2 processes died at its work; too little memory may be to blame"),
        image_workers(functools.partial(killer, tmp_path), 300, workers=2) as do_all,
    ):
        list(do_all(range(300)))
    assert (tmp_path / "dead").exists()


def test_processors_are_those_that_a_batch_system_left_to_the_process():
    left = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    asked = f"{left}; from catdog.parallel import processors; print(processors())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert done.stdout == "1\n"


# What the stages do with them


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """24 photographs of noise and a file that is none."""
    path = tmp_path_factory.mktemp("raw") / "raw.zip"
    noise = np.random.default_rng(5)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(24):
            pixels = noise.integers(0, 256, (40 + number, 60, 3), np.uint8)
            archive.writestr(
                f"{'cat' if number % 2 else 'dog'}/{number:02}.png", cv2.imencode(".png", pixels)[1].tobytes()
            )
        archive.writestr("cat/broken.jpg", b"no picture")
    return path


def in_both_ways(monkeypatch, work):
    """What a function returns with its images in threads, and in processes."""
    started = []
    real = parallel.fresh_processes
    monkeypatch.setattr(parallel, "fresh_processes", lambda count: started.append(count) or real(count))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    in_threads = work("threads")
    assert not started
    monkeypatch.setattr(parallel, "LEAST_IMAGES", 8)
    monkeypatch.setattr(parallel, "LEAST_FOR_EACH", 4)
    in_processes = work("processes")
    assert started == [2]
    return in_threads, in_processes


def test_inspection_finds_the_same_in_processes(raw, monkeypatch):
    def inspect(_):
        with open_archive(raw) as archive:
            return inspect_archive(archive, label_files(archive.namelist()), max_pixels=1e6, workers=2)

    (accepted, rejected), (accepted_by_processes, rejected_by_processes) = in_both_ways(monkeypatch, inspect)
    assert len(accepted) == 24
    assert list(rejected["path"]) == ["cat/broken.jpg"]
    assert accepted.equals(accepted_by_processes)
    assert rejected.equals(rejected_by_processes)


def test_shards_have_the_same_bytes_by_processes(raw, tmp_path, monkeypatch):
    params = load_params(ROOT / "params.yaml")
    with open_archive(raw) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
    shards = plan_shards("train", [ImageRow(name, int(name[:3] == "dog")) for name in names], 10)

    def write(way):
        folder = tmp_path / way
        folder.mkdir()
        with shard_writers(raw, params, ["cat", "dog"], images=len(names), folder=folder, compute=Local()) as write_all:
            return list(write_all(shards))

    in_threads, in_processes = in_both_ways(monkeypatch, write)
    assert in_threads == in_processes  # names, numbers and SHA-256
    assert [shard.images for shard in in_threads] == [8, 8, 8]
    assert sorted(path.name for path in (tmp_path / "processes").iterdir()) == [shard.name for shard in shards]


def test_a_picture_that_cannot_be_read_leaves_no_half_written_shard(raw, tmp_path, monkeypatch):
    params = load_params(ROOT / "params.yaml")
    monkeypatch.setattr(parallel, "LEAST_IMAGES", 2)
    monkeypatch.setattr(parallel, "LEAST_FOR_EACH", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    rows = [ImageRow("dog/00.png", 1), ImageRow("cat/broken.jpg", 0)]
    with (
        pytest.raises(ImageError, match="not an image"),
        shard_writers(raw, params, ["cat", "dog"], images=2, folder=tmp_path, compute=Local()) as write_all,
    ):
        list(write_all(plan_shards("train", rows, 10)))
    assert not list(tmp_path.iterdir())
