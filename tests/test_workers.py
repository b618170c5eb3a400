"""Jobs of several workers: real processes on this machine that fine-tune one tiny model together."""

import importlib.util
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from catdog import workers
from catdog.errors import CatdogError
from catdog.shares import Share
from catdog.workers import Job, meet, read_job
from conftest import Project, wait_until

SOURCES = str(Path(workers.__file__).parents[1])
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")

# Everything that could tell the workers apart: a last batch that cannot be divided, mixtures of images, varied copies,
# dropout, class weights, averaged weights.
TUNE = """
import os, sys, time
from pathlib import Path
import numpy as np
import tiny
from catdog.checkpoints import Checkpoints
from catdog.config import AugmentParams
from catdog.errors import CatdogError
from catdog.fine_tuning import fine_tune
from catdog.runtime import distribution, prepare_keras
from catdog.workers import JobCheckpoints, leave, read_job, taking_part, weights_from_first

shards, out, kept, pause = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
job = read_job(os.environ)

class Slow(Checkpoints):
    def save(self, phase, state):
        super().save(phase, state)
        time.sleep(pause)

try:
    with taking_part(job, {}, seconds=600):
        prepare_keras(1)
        colours = AugmentParams(flip="none", rotation=0, zoom=0, translation=0)  # the others take long to compile
        settings = tiny.train_params(mixup=0.2, class_weights="balanced", dropout=0.3, ema=0.5)
        first = job is None or job.is_first
        with np.load(shards / "weights.npz") as archive:  # which only the first worker gives
            weights = weights_from_first(job, [archive[key] for key in archive.files] if first else [])
        checkpoints = Slow(Path(kept) if kept and first else None, seconds_between=0)
        data = tiny.Data.__new__(tiny.Data)
        data.shards = {split: tuple(sorted(shards.glob(f"{split}-*"))) for split in ("train", "val")}
        data.labels = {split: np.load(shards / f"{split}.npy") for split in ("train", "val")}
        with distribution() as devices:
            model, network, _ = tiny.model(settings)
            model.set_weights(weights)
            result = fine_tune(
                model, [network], [tiny.BACKBONE], data.images("train"), data.images("val"),
                tiny.fine_tune_params(cutmix=1.0), settings, colours, seed=1, jit_compile=True,
                checkpoints=checkpoints if job is None else JobCheckpoints(job, checkpoints),
            )
        np.savez(out, result.frozen_loss, result.history.to_numpy(), *model.get_weights())
        leave(job)
except CatdogError as error:
    sys.exit(f"stopped: {error}")
print(devices, "devices")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Jobs:
    """Starts trainings on the same shards, each in processes of its own."""

    def __init__(self, folder, home):
        self.folder, self.home, self.processes = folder, home, []
        data = tiny.Data(folder, train=43, val=25)
        for split, labels in data.labels.items():
            np.save(folder / f"{split}.npy", labels)
        model, *_ = tiny.model(tiny.train_params())
        np.savez(folder / "weights.npz", *model.get_weights())

    def start(self, name, *, number=None, port=0, kept="", pause=0, devices=1):
        job = {"JOB_ADDRESSES": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(number)}
        changes = {} if number is None else {f"KERAS_DISTRIBUTION_{key}": value for key, value in job.items()}
        # Two devices of one process wait for each other 40 s at most, which is little on a busy machine.
        patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        # What is compiled runs for a moment: optimizing it takes longer.
        quick = "--xla_backend_optimization_level=0"
        changes |= tiny.pretended_devices(devices, patience, quick)
        arguments = ("-c", TUNE, self.folder, self.folder / name, str(kept), str(pause))
        process = Project(self.folder, self.home).start_under_jax(*arguments, **changes)
        self.processes.append(process)
        return process

    def start_two(self, name, **options):
        port = free_port()
        return [self.start(f"{name}{number}", number=number, port=port, **options) for number in (0, 1)]

    def result(self, name):
        with np.load(self.folder / f"{name}.npz") as archive:
            return [archive[key] for key in archive.files]

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def jobs(workshop, tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), workshop.home)
    yield jobs
    jobs.end()


@pytest.fixture(scope="module")
def finished_job(jobs):
    """A job of two workers, and the same training in one process on two devices."""
    started = [*jobs.start_two("job"), jobs.start("two", devices=2)]
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    return jobs


@needs_jax
def test_two_workers_train_what_one_process_trains(finished_job):
    job, other, two = (finished_job.result(name) for name in ("job0", "job1", "two"))
    assert job[1][-1, 2] < 0.95 * job[0]  # validation loss, of the last epoch and before
    for ours, theirs in zip(job, other, strict=True):
        assert np.array_equal(ours, theirs)
    for ours, theirs in zip(job, two, strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)


@needs_jax
def test_killed_worker_ends_the_job_which_goes_on_from_its_checkpoint(finished_job, tmp_path):
    jobs, kept = finished_job, tmp_path / "kept"
    first, second = jobs.start_two("killed", kept=kept, pause=5)
    wait_until((kept / "fine_tune.npz").exists)
    second.kill()
    _, errors = first.communicate(timeout=600)
    assert first.returncode == 2, errors[-3000:]
    assert "another worker of the job ended before its work was done" in errors
    for process in jobs.start_two("resumed", kept=kept):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        assert "going on with fine_tune after epoch" in errors
    # The very same bytes, as those of another job that was not interrupted.
    for number in (0, 1):
        for ours, theirs in zip(jobs.result(f"resumed{number}"), jobs.result("job0"), strict=True):
            assert np.array_equal(ours, theirs)


@needs_jax
def test_stage_names_the_worker_with_other_parameters_and_trains_nothing(make_copy):
    port = free_port()
    projects = [make_copy(name) for name in ("first", "second")]
    started = []
    for number, project in enumerate(projects):
        project.set_params({"fine_tune.layers": "last_block", "fine_tune.batch_size": 16 * (number + 1)})
        job = {"JOB_ADDRESSES": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(number)}
        changes = {f"KERAS_DISTRIBUTION_{key}": value for key, value in job.items()}
        started.append(project.start_under_jax("stages/train.py", PYTHONPATH="src", **changes))
    for process in started:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 2, (output, errors)
        told = [line for line in f"{output}{errors}".splitlines() if line.startswith("catdog train: ")]
        assert told == [
            f"catdog train: worker 1 ({socket.gethostname()}) differs from the first worker in fine_tune.batch_size "
            "(32, the first worker 16); give it the same files, and start all again"
        ]


@needs_jax
def test_worker_without_the_data_says_how_to_bring_it(make_copy):
    project = make_copy("empty-handed")
    project.set_params({"fine_tune.layers": "last_block"})
    shutil.rmtree(project.root / "data/tfrecords")
    job = {"JOB_ADDRESSES": f"127.0.0.1:{free_port()}", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    changes = {f"KERAS_DISTRIBUTION_{key}": value for key, value in job.items()}
    output, errors = project.start_under_jax("stages/train.py", PYTHONPATH="src", **changes).communicate(timeout=600)
    assert f"{output}{errors}".strip().splitlines()[-1] == (
        "catdog train: data/tfrecords/dataset_info.json is missing; every worker needs the same data: "
        "`dvc pull preprocess embed` brings it"
    )
    assert "Traceback" not in errors


FACTS = {"train.batch_size": "64", "data/tfrecords/dataset_info.json": "0123456789ab"}


def meet_all(jobs_and_facts, *, seconds=300):
    """What each worker of a job is told: nothing, or the sentence of its CatdogError."""
    told = {}

    def come(position, job, facts):
        try:
            meet(job, facts, seconds=seconds)
            told[position] = ""
        except CatdogError as error:
            told[position] = str(error)

    threads = [threading.Thread(target=come, args=(position, *each)) for position, each in enumerate(jobs_and_facts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told[position] for position in range(len(threads))]


def test_workers_with_the_same_facts_meet_in_any_order():
    address = f"127.0.0.1:{free_port()}"
    assert meet_all([(Job(address, 3, number), FACTS) for number in (2, 0, 1)]) == ["", "", ""]


def test_stranger_at_the_meeting_is_no_worker():
    port = free_port()
    jobs = [(Job(f"127.0.0.1:{port}", 2, number), FACTS) for number in (0, 1)]

    def knock(words):
        until = time.monotonic() + 100
        while time.monotonic() < until:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(words)
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    strangers = [threading.Thread(target=knock, args=(words,)) for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"")]
    first = threading.Thread(target=lambda: told.extend(meet_all(jobs[:1])))
    told = []
    first.start()
    for stranger in strangers:
        stranger.start()
    for stranger in strangers:
        stranger.join()
    assert meet_all(jobs[1:]) == [""]
    first.join()
    assert told == [""]


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        (
            {},
            {**FACTS, "train.batch_size": "32"},
            "differs from the first worker in train.batch_size (32, the first worker 64);",
        ),
        ({}, {"train.batch_size": "64"}, "dataset_info.json (none, the first worker 0123456789ab)"),
        ({}, {**FACTS, "more": "1"}, "more (1, the first worker none)"),
        ({"workers": 3}, FACTS, "thinks that it is one of 3 workers, the first one that there are 2"),
    ],
)
def test_worker_that_differs_is_named_to_all(changes, facts, message):
    address = f"127.0.0.1:{free_port()}"
    other = Job(**{"address": address, "workers": 2, "number": 1, **changes})
    told = meet_all([(Job(address, 2, 0), FACTS), (other, facts)])
    assert told[0] == told[1]
    assert told[0].startswith(f"worker 1 ({socket.gethostname()}) ")
    assert message in told[0]


def test_two_workers_with_one_number_are_told():
    address = f"127.0.0.1:{free_port()}"
    told = meet_all([(Job(address, 3, number), FACTS) for number in (0, 1, 1)])
    assert all("two workers call themselves number 1" in sentence for sentence in told)


def test_worker_that_does_not_come_is_named_in_time():
    address = f"127.0.0.1:{free_port()}"
    told = meet_all([(Job(address, 3, number), FACTS) for number in (0, 2)], seconds=1)
    assert told[0] == told[1] == f"worker 1 of 3 did not come to {address} within 1 s; start all workers again"
    told = meet_all([(Job(address, 2, 1), FACTS)], seconds=1)
    assert told[0].startswith(f"the first worker did not answer at {address} within 1 s")


def test_first_worker_says_where_it_cannot_listen():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CatdogError, match=rf"cannot listen at {address} \(Address already in use\)"):
            meet(Job(address, 2, 0), FACTS, seconds=1)


@pytest.mark.parametrize("number", [0, 1])
def test_host_that_nobody_knows_is_told(number):
    with pytest.raises(CatdogError, match=r"at first\.invalid:4000 ") as caught:
        meet(Job("first.invalid:4000", 2, number), FACTS, seconds=0.1)
    assert "Unknown error" not in str(caught.value)


def environment(**values):
    return {f"KERAS_DISTRIBUTION_{name}": value for name, value in values.items()}


def test_job_is_read_from_keras_variables():
    variables = environment(JOB_ADDRESSES="10.0.0.1:4000,10.0.0.2:4000", NUM_PROCESSES="2", PROCESS_ID="1")
    assert read_job(variables) == Job("10.0.0.1:4000", 2, 1)
    assert not read_job(variables).is_first
    assert read_job(variables | environment(PROCESS_ID="0")).is_first
    assert read_job({}) is None
    assert read_job({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}) is None
    assert read_job({"TF_CONFIG": "no JSON"}) is None
    assert read_job(environment(JOB_ADDRESSES="a:1", NUM_PROCESSES="1", PROCESS_ID="0")) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (environment(NUM_PROCESSES="2"), "KERAS_DISTRIBUTION_JOB_ADDRESSES is not set"),
        (environment(JOB_ADDRESSES="a:1", NUM_PROCESSES="2"), "KERAS_DISTRIBUTION_PROCESS_ID is not set"),
        (environment(JOB_ADDRESSES="a", NUM_PROCESSES="2", PROCESS_ID="0"), "'a' names no host and port"),
        (environment(JOB_ADDRESSES="a:x", NUM_PROCESSES="2", PROCESS_ID="0"), "'a:x' names no host and port"),
        (environment(JOB_ADDRESSES="a:1", NUM_PROCESSES="two", PROCESS_ID="0"), "'two' is no number of workers"),
        (
            environment(JOB_ADDRESSES="a:1", NUM_PROCESSES="2", PROCESS_ID="2"),
            "'2' is no number of one of 2 workers; use 0 to 1",
        ),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}, "use KERAS_BACKEND=jax"),
    ],
)
def test_job_that_makes_no_sense_is_told(variables, message):
    with pytest.raises(CatdogError, match=message):
        read_job(variables)


def test_job_needs_jax():
    job = Job("127.0.0.1:1", 2, 0)
    told = "the Keras backend is tensorflow; set KERAS_BACKEND=jax"
    with pytest.raises(CatdogError, match=told), workers.taking_part(job, FACTS):
        pass


def test_shares_of_a_batch_are_the_batch_and_fillers_that_count_for_nothing():
    rng = np.random.default_rng(0)
    batch = rng.random((5, 4, 4, 3)), rng.random((5, 2)), rng.random(5)
    parts = [Share(4, 2, process) for process in (0, 1)]
    found = [share.cut(share.fill(batch)) for share in parts]
    assert [len(pixels) for pixels, _, _ in found] == [4, 4]
    for position, values in enumerate(batch):
        joined = np.concatenate([part[position] for part in found])
        assert np.array_equal(joined[:5], values)
        assert np.all(joined[5:] == (0, -1, 0)[position])
        assert joined.dtype == values.dtype
    assert Share(5).fill(batch) is batch
