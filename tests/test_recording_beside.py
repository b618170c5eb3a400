"""A stage whose second process does the recording: the same runs as without, beside the first one's work."""

import errno
import os
import signal
import time

import pytest

from catdog.errors import CatdogError
from catdog.parallel import process_died
from catdog.second_process import second_process
from catdog.tracking import stage
from conftest import Store


@pytest.fixture
def store(finished, warm_processes, monkeypatch, tmp_path):
    """A store of its own for stages that run in this process, where the finished project is."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(finished.root)
    return Store(uri)


def refuse(*values):
    raise PermissionError(errno.EACCES, "Permission denied", "data/raw.zip.part")


def fail(client, recorded):
    raise OSError(28, "No space left on device", "a file")


def fail_as_store(client, recorded):
    client.get_run("none-such")


def test_the_run_is_open_when_the_body_begins_and_has_all_at_its_end(store):
    order = []
    with second_process() as second, stage("embed", second, meanwhile=lambda params: order.append(params.seed)) as run:
        (parent, child) = sorted(store.runs(), key=lambda one: "mlflow.parentRunId" in one.data.tags)
        assert child.info.status == "RUNNING"
        assert child.data.params["backbone"] == run.params.backbone
        order.append("body")
        run.measure({"images_per_second": 12})
        run.note({"engine": "none"})
    assert order == [run.params.seed, "body"]
    child = store.client.get_run(child.info.run_id)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["images_per_second"] == 12
    assert child.data.metrics["seconds"] > 0
    assert child.data.tags["engine"] == "none"
    # Everything is as dvc.lock says, so DVC would run nothing after it: the parent is complete, too.
    assert store.client.get_run(parent.info.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("where", ["meanwhile", "body"])
def test_what_fails_here_is_marked_there(store, capsys, where):
    def refuse(params=None):
        raise CatdogError("something is wrong")

    with (
        pytest.raises(SystemExit) as stopped,
        second_process() as second,
        stage("embed", second, meanwhile=refuse if where == "meanwhile" else None),
    ):
        refuse()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "catdog embed: something is wrong\n"
    assert [run.info.status for run in store.runs()] == ["FAILED", "FAILED"]
    assert [run.data.tags.get("error") for run in store.runs()] == [None, "something is wrong"]


def test_a_second_process_that_dies_is_told_and_marked_by_the_first(store, capsys):
    with pytest.raises(SystemExit) as stopped, second_process() as second, stage("embed", second) as run:
        run.note({"engine": "none"})
        # As the system kills the largest process where memory has run out.
        second.submit(os.kill, second.submit(os.getpid).result(), signal.SIGKILL).result()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"catdog embed: {process_died(2)}\n"
    assert [run.info.status for run in store.runs()] == ["FAILED", "FAILED"]


@pytest.mark.parametrize("wanted", [signal.SIGTERM, signal.SIGINT])
def test_who_is_terminated_while_the_other_one_connects_marks_the_run_all_the_same(store, wanted):
    def interrupt(params):
        os.kill(os.getpid(), wanted)
        time.sleep(1)

    with (
        pytest.raises(SystemExit) as stopped,
        second_process() as second,
        stage("embed", second, meanwhile=interrupt),
    ):
        pytest.fail("the body begins")
    assert stopped.value.code == 128 + wanted
    assert [run.info.status for run in store.runs()] == ["KILLED", "KILLED"]


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (refuse, "data/raw.zip.part cannot be read or written: Permission denied; check the permissions"),
        (fail, "no space left for a file; free some (`dvc gc --all-commits --all-experiments`) and run again"),
        (fail_as_store, "; check that it can be reached and that its disk is not full, or set tracking.required to"),
    ],
    ids=["permission", "disk", "store"],
)
def test_a_write_that_fails_stops_the_stage_though_it_went_on(store, capsys, write, told):
    with pytest.raises(SystemExit) as stopped, second_process() as second, stage("embed", second) as run:
        run.record(write)
        time.sleep(0.1)  # it does not wait for it
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("catdog embed: ")
    assert told in line
    assert [run.info.status for run in store.runs()] == ["FAILED", "FAILED"]


def test_recording_does_not_hold_up_the_work(store):
    with second_process() as second, stage("embed", second) as run:
        second.submit(time.sleep, 1.0)
        started = time.monotonic()
        run.measure({"images_per_second": 12})
        assert time.monotonic() - started < 0.5
