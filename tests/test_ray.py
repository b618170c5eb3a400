"""Work on a Ray cluster of two nodes, both on this machine: the bytes of the local run, nothing lost with a worker."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from catdog import cluster as cluster_module
from catdog import paths
from catdog.cluster import describe_machine, join_cluster, require_same_machine
from catdog.compute import AHEAD, DEATHS, Cluster, open_compute
from catdog.embedding import Network, require_one_network
from catdog.errors import CatdogError
from catdog.files import sha256_of
from catdog.images import ImageError
from catdog.records import ImageRow, Shard
from conftest import REPOSITORY, Project, stages_run, wait_until
from test_tuning import (  # noqa: F401  # four are fixtures
    five_trials,
    hyperband,
    root,
    runs_of,
    search,
    set_params,
    template,
    without_times,
)

pytest.importorskip("ray", reason="Ray is not installed: pip install 'catdog[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore:(currentThread|getName):DeprecationWarning")  # of Keras Tuner

# Not 127.0.0.1, for which Ray takes the address of a network card.
ADDRESS = "127.0.0.2"
NODE = {"num_cpus": 1, "node_ip_address": ADDRESS, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def nodes():
    """Starts a head and a second node, each with one processor; yields Ray's handle of them."""
    from ray.cluster_utils import Cluster as LocalNodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        try:
            # Without processes that wait for work which never comes.
            settings = {"include_dashboard": False, "_system_config": {"prestart_worker_first_driver": False}}
            started = LocalNodes(initialize_head=True, head_node_args=NODE | settings)
            started.add_node(**NODE)
        except Exception as error:  # whatever keeps this machine from it
            pytest.skip(f"Ray cannot start here: {error}")
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def compute(nodes, tmp_path_factory):
    """This process, connected to the cluster."""
    with open_compute("ray", tmp_path_factory.mktemp("output")) as compute:
        yield compute


# What a stage says where processors that were given back are not free yet, as on a busy machine.
BUSY = "cluster: waiting for processors "

# Workers import no test: an item is a class of the package. Its number is its label.
ITEMS = [Shard(f"item-{number}", "train", (ImageRow("", number),)) for number in range(50)]
FEW = ITEMS[:12]


def workers_of(nodes):
    """The processes of workers on this test's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
            if command and command[0].startswith("ray::_Worker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def both_up(folder):
    """Returns what workers call as they are set up, which waits until both run.

    One that is killed while Ray starts its process may stay, with its processor, as long as the driver lives.
    """

    def wait():
        (folder / f"up-{os.getpid()}").touch()
        while len(list(folder.glob("up-*"))) < 2:
            time.sleep(0.02)

    return wait


def kill_one_at_work(nodes):
    """Waits until a worker does an item, which may take a few hundredths of a second, and kills it."""
    # They are there seconds before their first item. Finding them takes longer than an item, looking at them does not.
    workers = wait_until(lambda: workers_of(nodes))
    deadline, again = time.monotonic() + 600, time.monotonic() + 1
    while time.monotonic() < deadline:
        for worker in workers:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{worker.pid}/cmdline").read_bytes().startswith(b"ray::_Worker.do"):
                    worker.kill()
                    return
        if time.monotonic() > again:
            workers, again = workers_of(nodes), time.monotonic() + 1
        time.sleep(0.002)
    pytest.fail("no worker was seen at work")


# The mapping


def test_results_come_in_order_and_few_items_are_under_way(compute, tmp_path):
    def make():
        import time

        def work(item):
            number = item.rows[0].label
            (tmp_path / item.name).touch()
            while number == 0 and not (tmp_path / "go").exists():
                time.sleep(0.01)
            return number**2

        return work

    seen = []

    def started():
        return len(list(tmp_path.glob("item-*")))

    def let_go():
        # The other worker goes on while the first is held up, but not to the end.
        wait_until(lambda: started() == 2 * AHEAD, every=0.05)
        time.sleep(0.5)
        seen.append(started())
        (tmp_path / "go").touch()

    waiting = threading.Thread(target=let_go)
    waiting.start()
    with compute.workers(make, "cpu") as work_all:
        assert list(work_all(ITEMS)) == [number**2 for number in range(50)]
        assert list(work_all(ITEMS[:3])) == [0, 1, 4]
        assert list(work_all([])) == []
    waiting.join()
    assert seen == [2 * AHEAD]


@pytest.mark.parametrize(
    "error",
    [
        ImageError("this shows no picture"),
        CatdogError("one sentence"),
        OSError(errno.ENOSPC, "No space left on device", "data/shard"),
    ],
    ids=["image", "sentence", "disk full"],
)
def test_what_a_worker_raises_is_raised_here_and_not_tried_again(compute, tmp_path, error):
    wait = both_up(tmp_path)

    def make():
        wait()

        def work(item):
            (tmp_path / f"tried-{time.monotonic_ns()}").touch()
            raise error

        return work

    with compute.workers(make, "cpu") as work_all, pytest.raises(type(error)) as caught:
        list(work_all(ITEMS[:1]))
    assert caught.value.args == error.args
    assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)
    assert len(list(tmp_path.glob("tried-*"))) == 1


def test_what_setting_up_raises_is_raised_here(compute, tmp_path):
    wait = both_up(tmp_path)

    def make():
        wait()
        raise CatdogError("there are no weights")

    with compute.workers(make, "cpu") as work_all, pytest.raises(CatdogError, match="there are no weights"):
        list(work_all(FEW))


def waiting_work(folder, number):
    """Makes workers of which the one with this item waits, the first time, until it is killed."""

    def make():
        import os
        import time
        from pathlib import Path

        def work(item):
            mark = Path(folder, f"{item.name}-{time.monotonic_ns()}")
            first = not list(Path(folder).glob(f"{item.name}-*"))
            mark.write_text(str(os.getpid()))
            while item.rows[0].label == number and first:
                time.sleep(0.05)
            return item.rows[0].label

        return work

    return make


def held_up(folder, number):
    """The process that waits with the item, once it does."""
    (mark,) = wait_until(lambda: list(folder.glob(f"item-{number}-*")), every=0.05)
    return int(wait_until(mark.read_text, every=0.05))


def test_item_of_a_killed_worker_is_done_again(compute, tmp_path, capsys):
    killer = threading.Thread(target=lambda: os.kill(held_up(tmp_path, 3), signal.SIGKILL))
    killer.start()
    with compute.workers(waiting_work(tmp_path, 3), "cpu") as work_all:
        assert list(work_all(FEW)) == list(range(12))
    killer.join()
    counts = {item.name: len(list(tmp_path.glob(f"{item.name}-*"))) for item in FEW}
    assert counts == {item.name: 2 if item.name == "item-3" else 1 for item in FEW}
    assert "died; item-3 is done again" in capsys.readouterr().err


def test_items_of_a_node_that_goes_are_done_elsewhere(compute, nodes, tmp_path, capsys):
    import ray

    third = nodes.add_node(**NODE)
    entries = {entry["NodeID"]: entry for entry in ray.nodes() if entry["Alive"]}
    both = [entries[third.node_id], entries[nodes.head_node.node_id]]
    with_third = Cluster([cluster_module._node(entry) for entry in both])
    third_id = third.node_id

    def make():
        import time
        from pathlib import Path

        import ray

        here = ray.get_runtime_context().get_node_id()

        def work(item):
            (Path(tmp_path) / f"{item.name}-{time.monotonic_ns()}").write_text(here)
            # The third node never ends; the head waits until it has begun.
            while here == third_id or not any(mark.read_text() == third_id for mark in Path(tmp_path).iterdir()):
                time.sleep(0.05)
            return item.rows[0].label

        return work

    def taken():
        return [path for path in tmp_path.iterdir() if path.read_text() == third_id]

    def remove_when_at_work():
        wait_until(taken, every=0.05)
        nodes.remove_node(third, allow_graceful=False)

    remover = threading.Thread(target=remove_when_at_work)
    remover.start()
    with with_third.workers(make, "cpu") as work_all:
        assert list(work_all(FEW)) == list(range(12))
    remover.join()
    (lost,) = taken()
    assert f"{lost.name.rpartition('-')[0]} is done again" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == len(FEW) + 1
    wait_until(lambda: sum(entry["Alive"] for entry in ray.nodes()) == 2)  # for the tests that follow


def test_item_that_kills_every_worker_is_named(compute, tmp_path):
    def make():
        import os

        def work(item):
            (tmp_path / f"{item.name}-{os.getpid()}").touch()
            if item.rows[0].label == 5:
                os.kill(os.getpid(), 9)
            return item.rows[0].label

        return work

    with (
        compute.workers(make, "cpu") as work_all,
        pytest.raises(CatdogError, match=f"^item-5 killed its worker {DEATHS} times, at last on "),
    ):
        list(work_all(FEW))
    assert len(list(tmp_path.glob("item-5-*"))) == DEATHS


def test_workers_end_with_the_block(compute, nodes, tmp_path):
    wait = both_up(tmp_path)

    def make():
        wait()
        return lambda item: item.rows[0].label

    with compute.workers(make, "cpu") as work_all:
        assert list(work_all(FEW)) == list(range(12))
        assert workers_of(nodes)
    wait_until(lambda: not workers_of(nodes))


# What a cluster must be like


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (None, r"RAY_ADDRESS is not set; start one with `ray start --head`"),
        ("local", r"RAY_ADDRESS = 'local' would start a cluster of its own"),
        ("ray://127.0.0.1:10001", r"asks for Ray's client mode"),
        ("here", r"must be auto or host:port"),
        ("127.0.0.1:1", r"no Ray cluster answers at RAY_ADDRESS = '127\.0\.0\.1:1'"),
    ],
)
def test_address_that_cannot_be_used_is_told_at_once(monkeypatch, tmp_path, address, told):
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(CatdogError, match=told), join_cluster(tmp_path):
        pass


def test_nodes_have_what_this_machine_has(compute, tmp_path):
    found = cluster_module._check_nodes(tmp_path)
    assert [node.cpus for node in found] == [1, 1]
    assert list(tmp_path.iterdir()) == []
    assert compute.facts("cpu") == {"compute": "ray", "compute.nodes": "2", "compute.workers": "2"}


def test_node_that_does_not_see_the_folder_is_named(compute, nodes, tmp_path):
    """A node in a mount namespace of its own, with an empty folder in place of the shared one."""
    hidden = tmp_path / "shared"
    hidden.mkdir()
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not make mount namespaces")
    ray_command = Path(sys.executable).with_name("ray")
    start = f"mount -t tmpfs none {hidden} && exec {ray_command} start --block --num-cpus=1 --address={nodes.address}"
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{start} --node-ip-address={ADDRESS} --object-store-memory={80 * 2**20}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    import ray

    def alive():
        return sum(entry["Alive"] for entry in ray.nodes())

    try:
        wait_until(lambda: alive() == 3)
        with pytest.raises(CatdogError, match=rf"^node .* of the Ray cluster does not see {hidden}; share"):
            cluster_module._check_nodes(hidden)
        assert list(hidden.iterdir()) == []
    finally:
        process.terminate()
        process.wait()
        wait_until(lambda: alive() == 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"folder": "not seen"}, "does not see"),
        ({"code": "another"}, "runs other code of catdog"),
        (
            {"keras": "1.0", "python": "2.7"},
            r"has python 2\.7 \(here .*\), keras 1\.0 \(here .*\), and would write other",
        ),
    ],
    ids=["folder", "code", "versions"],
)
def test_node_that_would_write_other_bytes_is_refused(tmp_path, change, told):
    own = describe_machine(None)
    assert "none" not in own.values()
    require_same_machine(own, own, "twin", tmp_path)
    with pytest.raises(CatdogError, match=f"^node odd of the Ray cluster {told}"):
        require_same_machine(own, own | change, "odd", tmp_path)


def test_other_weights_on_a_node_are_refused():
    network = Network("keras-cache", "1" * 64, 10, "openvino", {"device": "one"})
    require_one_network(network, Network("keras-cache", "1" * 64, 10, "openvino", {"device": "another"}))
    for other in (
        Network("keras-cache", "2" * 64, 10, "openvino", {}),
        Network("keras-cache", "1" * 64, 10, "keras", {}),
    ):
        with pytest.raises(CatdogError, match="computed with different networks"):
            require_one_network(network, other)


# The stages


def hashes(project, *folders):
    return {
        path.relative_to(project.root).as_posix(): sha256_of(path)
        for folder in folders
        for path in sorted((project.root / folder).rglob("*"))
        if path.is_file()
    }


def forget(project, *outputs):
    for path in (project.root / output for output in outputs):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


OUTPUTS = (paths.TFRECORDS, paths.FEATURES, paths.AUGMENTATION.parent)


@pytest.fixture
def project(make_copy, nodes):
    """A copy of the finished project; varied copies of the training images are embedded, too."""
    project = make_copy()
    project.set_params({"augment.views": 1})
    done = project.stage("embed")
    assert done.returncode == 0, done.stderr
    return project


def test_stages_on_a_cluster_write_the_same_bytes_though_a_worker_is_killed(project, nodes):
    expected = hashes(project, *OUTPUTS)
    assert sum(name.endswith(".view-001.npy") for name in expected) >= 2
    project.set_params({"compute": "ray"})
    forget(project, paths.TFRECORDS, paths.FEATURES, paths.AUGMENTATION)
    for name in ("preprocess", "embed"):
        wait_until(lambda: not workers_of(nodes))
        process = project.start("python", f"stages/{name}.py", PYTHONPATH="src", RAY_ADDRESS=nodes.address)
        try:
            kill_one_at_work(nodes)
            stdout, stderr = process.communicate(timeout=600)
        finally:
            process.kill()
        assert process.returncode == 0, stderr
        assert stdout.startswith(f"{name}: ")
        told = ("cluster: a worker on ", BUSY)
        assert [line for line in stderr.splitlines() if not line.startswith(told)] == []
        assert "is done again" in stderr
        run = project.store().last_child(name)
        assert run.info.status == "FINISHED"
        told = {key: run.data.tags[key] for key in ("compute", "compute.nodes", "compute.workers")}
        assert told == {"compute": "ray", "compute.nodes": "2", "compute.workers": "2"}
    assert hashes(project, *OUTPUTS) == expected  # and nothing half written beside
    assert project.store().last_child("embed").data.tags["engine"] == "openvino"


def test_stage_that_is_terminated_ends_its_workers(make_copy, nodes):
    project = make_copy()
    project.set_params({"compute": "ray"})
    wait_until(lambda: not workers_of(nodes))  # of tests before this one
    process = project.start("python", "stages/embed.py", PYTHONPATH="src", RAY_ADDRESS=nodes.address)
    try:
        wait_until(lambda: workers_of(nodes))
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    # Ray turns every exit status that a signal's handler gives into 1.
    assert process.returncode in (1, 128 + signal.SIGTERM), stderr
    assert stderr == ""
    wait_until(lambda: not workers_of(nodes))
    assert project.store().last_child("embed").info.status == "KILLED"


def test_stage_without_an_address_stops_with_a_sentence(make_copy):
    project = make_copy()
    project.set_params({"compute": "ray"})
    dry = project.dvc("repro", "--dry")
    assert dry.returncode == 0, dry.stderr
    assert stages_run(dry.stdout) == ["track"]  # where the work is done changes no result
    environment = {name: value for name, value in project.environment().items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        ["python", "stages/preprocess.py"],
        cwd=project.root,
        env=environment | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "catdog preprocess: compute = 'ray' works on a Ray cluster that runs already, but RAY_ADDRESS"
    )
    assert project.store().last_child("preprocess").info.status == "FAILED"


# The search


def tune_on(nodes, workshop, root, *arguments):  # noqa: F811  # a path here
    environment = {"PYTHONPATH": str(REPOSITORY / "src"), "RAY_ADDRESS": nodes.address, "DVC_ROOT": str(root)}
    command = ("python", "-m", "catdog.cli", "tune", *arguments)
    return Project(root, workshop.home, warm=True).start(*command, **environment)


def stored(root):  # noqa: F811
    (path,) = (root / paths.TUNING_SEARCHES).glob("*/search.json")
    state = json.loads(path.read_text())
    state["oracle"]["own"]["tried_so_far"].sort()  # a set
    for row in state["rows"]:
        row.pop("seconds")
    return {name: value for name, value in state.items() if name != "parent_run"}


def recorded(root):  # noqa: F811
    """What MLflow has of each trial, but for times and identifiers."""
    _, children = runs_of(root)
    return [
        (
            child.info.run_name,
            child.info.status,
            child.data.params,
            {name: value for name, value in child.data.metrics.items() if name != "seconds"},
        )
        for child in sorted(children, key=lambda child: child.info.run_name)
    ]


def test_search_on_a_cluster_finds_what_a_local_one_does(hyperband, nodes, workshop, tmp_path):  # noqa: F811
    # Random search, whose trials know nothing of each other, is in the test after this one.
    local, _ = hyperband
    expected, runs = stored(local), recorded(local)
    other = tmp_path / "other"
    shutil.copytree(local, other, ignore=shutil.ignore_patterns(".dvc", "mlflow.db", "mlruns"))
    set_params(other, {"compute": "ray"})
    process = tune_on(nodes, workshop, other, "--method", "hyperband", "--trials", "6")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert [line for line in stderr.splitlines() if not line.startswith(BUSY)] == []
    assert "the best of 6 trials" in stdout
    assert stored(other) == expected
    assert recorded(other) == runs
    (parent,), _ = runs_of(other)
    assert (parent.data.tags["compute"], parent.data.tags["compute.workers"]) == ("ray", "2")
    assert not list((other / paths.TUNING_SEARCHES).glob("*/weights"))


def test_search_that_was_killed_on_a_cluster_goes_on_without_it(root, five_trials, nodes, workshop):  # noqa: F811
    _, expected = five_trials
    set_params(root, {"compute": "ray"})
    process = tune_on(nodes, workshop, root, "--method", "random", "--trials", "5")

    def rows():
        found = list((root / paths.TUNING_SEARCHES).glob("*/search.json"))
        return found and len(json.loads(found[0].read_text())["rows"])

    try:
        done = wait_until(rows, every=0.02)
    finally:
        process.kill()
        process.communicate()
    assert done < 5
    wait_until(lambda: not workers_of(nodes))
    set_params(root, {"compute": "local"})
    study = search(root, method="random", trials=5)
    pd.testing.assert_frame_equal(without_times(study), without_times(expected))
