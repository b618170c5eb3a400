"""A copy of the repository in which tests run the real commands, far from the user's files and settings."""

import contextlib
import functools
import gc
import json
import multiprocessing.spawn
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import gto  # noqa: F401  # imported after TensorFlow it closes the standard error that pytest captures
import numpy as np
import psutil
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

import warm
from internet import Internet

REPOSITORY = Path(__file__).parents[1]
MODULES = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])
"""PYTHONPATH of processes that import this project's modules and the tests'."""
gc.disable()  # until everything is imported
# Without `source`, which runs every time and leaves no run in MLflow.
STAGES = ("download", "split", "preprocess", "embed", "train", "evaluate", "track")
SPLITS = ("train", "val", "test")
SHAPES = ("disc", "square", "stripes")

# Small enough for seconds, large enough for several shards and for a model that learns.
SMALL = {
    "download.sample_images": 100,
    "split.test": 0.3,
    "preprocess.image_size": 96,
    "preprocess.shard_megabytes": 0.13,
    "train.batch_size": 16,
    "train.learning_rate": 0.002,
    "train.epochs": 12,
    "evaluate.gallery": 6,
    "evaluate.resamples": 100,
}
# Files that take a minute and more, the longest first, but those that wait for projects of the workshop not at once.
# Begun last, one of them would keep a single worker of pytest-xdist busy while the others have nothing left.
LONGEST_FIRST = (
    "test_containers.py",
    "test_tuning.py",
    "test_backbone_comparison.py",
    "test_ray.py",
    "test_tracking_servers.py",
    "test_workers.py",
    "test_tracking.py",
    "test_bad_input.py",
    "test_data_in_dvc.py",
    "test_registry.py",
    "test_training.py",
    "test_fine_tuning.py",
    "test_gradcam.py",
    "test_checkpoints.py",
)
PATIENCE = 600
"""Seconds that guard against hanging and against nothing else: a slow machine has time enough."""
SMALL_DISK = ("unshare", "--user", "--map-root-user", "--mount")
"""Before a command that mounts a disk of its own, which nobody else sees."""
# Nothing listens there: whoever needs the network fails at once.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Project:
    """A working copy of the repository, and the commands a user runs in it."""

    root: Path
    home: Path
    warm: bool = False  # `dvc` and the stages are forks of a process that has imported already

    def environment(self, **changes):
        """The caller's environment without anything that would steer git, DVC, MLflow or Keras."""
        steering = ("DVC_", "MLFLOW_", "GIT_", "KERAS_", "XDG_", "XLA_", "TF_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
        # Libraries set MPLBACKEND in the tests' process; without bytecode every stage would compile the project anew.
        for name in ("PYTHONPATH", "MPLBACKEND", "PYTHONDONTWRITEBYTECODE"):
            kept.pop(name, None)
        kept |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_CONFIG_DIRS": str(self.home / "config-of-the-system"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_DATA_HOME": str(self.home / "data"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.home / "dvc"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        if self.warm:
            folder, variables = warm_programs()
            kept |= {"PATH": f"{folder}{os.pathsep}{kept['PATH']}"} | variables
        return kept | changes

    def start(self, *command, stdin=subprocess.DEVNULL, **changes):
        """Starts a command; `changes` are environment variables."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment(**changes),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_under_jax(self, *arguments, **changes):
        """Starts Python where Keras computes with JAX, warm, too; it finds this project's modules and the tests'."""
        programs, variables = warm_programs(KERAS_BACKEND="jax")
        variables |= {"KERAS_BACKEND": "jax", "PYTHONPATH": MODULES}
        return self.start(programs / "python", *arguments, **variables | changes)

    def run(self, *command, **changes):
        """Runs a command to its end, however that is."""
        process = self.start(*command, **changes)
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def dvc(self, *arguments, **changes):
        """Runs the real dvc."""
        return self.run("dvc", *arguments, **changes)

    def git(self, *arguments):
        """Runs git, which must succeed; returns what it prints."""
        done = self.run("git", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit(self):
        """Commits everything that git does not ignore."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "state of the test")

    def repro(self, **changes):
        """Runs `dvc repro`, which must succeed; returns the names of the stages that it ran."""
        done = self.dvc("repro", **changes)
        assert done.returncode == 0, done.stdout + done.stderr
        return stages_run(done.stdout)

    def stage(self, name, **changes):
        """Runs one stage's script as dvc.yaml does."""
        return self.run("python", f"stages/{name}.py", PYTHONPATH="src", **changes)

    def set_params(self, values):
        """Changes parameters, given by their dotted names, in params.yaml."""
        path = self.root / "params.yaml"
        yaml = YAML()
        tree = yaml.load(path)
        for name, value in values.items():
            *blocks, key = name.split(".")
            block = tree
            for part in blocks:
                block = block[part]
            block[key] = value
        with path.open("w") as file:
            yaml.dump(tree, file)

    def lock(self):
        """dvc.lock, by stage."""
        return YAML(typ="safe").load(self.root / "dvc.lock")["stages"]

    def out_hashes(self):
        """DVC's hash of every output, by path."""
        return {out["path"]: out["md5"] for entry in self.lock().values() for out in entry.get("outs", [])}

    def store(self):
        """The project's own tracking store."""
        return Store(f"sqlite:///{self.root / 'mlflow.db'}")


WARM_STARTS = threading.Lock()  # the workshop's threads come at once


def warm_programs(**changes):
    """See `warm`; one process for all projects, and one more for each change of the environment."""
    with WARM_STARTS:
        return _warm_programs(tuple(changes.items()))


@functools.cache
def _warm_programs(changes):
    nowhere = Path("/nonexistent")  # commands have a home of their own
    return warm.programs(Project(nowhere, nowhere).environment(**dict(changes)))


def require_small_disk(project):
    """Skips the test where SMALL_DISK is not allowed."""
    if project.run(*SMALL_DISK, "true").returncode != 0:
        pytest.skip("this user may not mount a small disk (`unshare --user --mount` fails)")


class Store:
    """What the pipeline wrote into an MLflow tracking store."""

    def __init__(self, uri):
        self.client = MlflowClient(uri)

    def runs(self):
        """Every run of the pipeline, oldest first."""
        experiment = self.client.get_experiment_by_name("catdog")
        if experiment is None:
            return []
        return self.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])

    def parents(self):
        """The runs that stand for a whole pipeline run, oldest first."""
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    def children(self, parent):
        """A parent's runs, one a stage, oldest first."""
        return [run for run in self.runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]

    def parent_named(self, name):
        """The only parent of this name."""
        (parent,) = [run for run in self.parents() if run.info.run_name == name]
        return parent

    def runs_of(self, stage):
        """The runs in which a stage did its work, or tried to, oldest first."""
        return [run for run in self.runs() if run.info.run_name == stage]

    def last_child(self, stage):
        """The latest run of a stage."""
        return self.runs_of(stage)[-1]


def stages_run(output):
    """Names the stages that dvc says it ran, in order, without `source`, which runs every time."""
    ran = [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]
    return [name for name in ran if name != "source"]


def wait_until(condition, *, every=0.1):
    """Asks again and again until `condition()` is true, and returns what it gave."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
    return value


def new_project(root, home, params):
    """Copies the repository as it is now, files that git ignores left out, into a git repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = REPOSITORY / name, root / name
        # Without dvc.lock nothing of the repository's own results is taken for this project's.
        if source.is_file() and name != "dvc.lock":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    home.mkdir(parents=True, exist_ok=True)
    (home / ".gitconfig").write_text("[user]\n\tname = Test\n\temail = test@example.org\n")
    project = Project(root, home)
    project.set_params(params)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    return project


def copy_project(source, root, **options):
    """Copies a project with its cache and its runs; the store's absolute paths follow.

    The options are those of shutil.copytree.
    """
    shutil.copytree(source.root, root, symlinks=True, **options)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
        ):
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(source.root), str(root)))
    return Project(root, source.home, warm=True)


class Workshop:
    """Builds the session's costly projects, two at a time, in the background.

    A pipeline run is mostly one process after another that imports on one core; two runs take hardly longer than
    one. The order of BUILDERS is the order of work. What is built stays as it is; tests change copies.
    """

    def __init__(self, folder, names):
        self.folder = folder
        self.home = folder / "home"
        self.pool = ThreadPoolExecutor(2)
        self._jobs = {}
        for name in (name for name in BUILDERS if name in names):
            # A builder may ask at once for what others build before it.
            self._jobs[name] = self.pool.submit(self._build, name)

    def project(self, name):
        """Where a project lies, whether it is built or not."""
        return Project(self.folder / name, self.home)

    def built(self, name):
        """Waits until a project is built, and returns it."""
        self._jobs[name].result()
        return self.project(name)

    def rest(self):
        """Waits until nothing is built in the background, so that a time can be taken."""
        wait(self._jobs.values())

    def record(self, name):
        """The file in which a builder keeps what it saw."""
        return self.folder / f"{name}.json"

    def _build(self, name):
        # Several workers of pytest-xdist share the folder: one builds, the others wait.
        with FileLock(self.folder / f"{name}.lock"):
            done = self.folder / f"{name}.done"
            if not done.exists():
                BUILDERS[name](self)
                done.touch()


def build_finished(workshop):
    project = workshop.project("finished")
    new_project(project.root, project.home, SMALL)
    assert project.repro() == list(STAGES)
    project.commit()


def build_shapes(workshop):
    project = replace(workshop.project("shapes"), warm=True)
    new_project(project.root, project.home, SMALL | {"dataset": "pictures/shapes"})
    for kind in SHAPES:
        folder = project.root / "pictures/shapes" / kind
        folder.mkdir(parents=True)
        for number in range(20):
            draw_shape(kind, number).save(folder / f"{number}.png")
    project.repro(**NO_NETWORK)


def draw_shape(kind, seed):
    """A small noisy picture of a disc, a square or stripes."""
    random = np.random.default_rng([SHAPES.index(kind), seed])
    y, x = np.mgrid[:80, :96]
    top, left, size = random.integers(20, 60), random.integers(20, 70), random.integers(12, 30)
    inside = {
        "disc": (y - top) ** 2 + (x - left) ** 2 < size**2,
        "square": (abs(y - top) < size) & (abs(x - left) < size),
        "stripes": (x + y + top) % size < size // 2,
    }[kind]
    picture = np.where(inside[..., None], random.integers(150, 256, 3), random.integers(0, 100, 3))
    return Image.fromarray((picture + random.normal(0, 20, picture.shape)).clip(0, 255).astype(np.uint8))


def build_experiments(workshop):
    project = copy_project(workshop.built("finished"), workshop.folder / "experiments")
    logs = {}

    def run(name, change, *options):
        done = project.dvc("exp", "run", *options, "--name", name, "--set-param", change, **NO_NETWORK)
        assert done.returncode == 0, done.stdout + done.stderr
        logs[name] = stages_run(done.stdout)

    project.set_params({"evaluate.gallery": 9})
    logs["repro"] = project.repro()
    # Back to the last commit, where the experiments start.
    project.git("checkout", "--quiet", ".")
    run("vgg16", "backbone=vgg16", "--queue")
    run("calm", "train.learning_rate=0.001", "--queue")
    started = project.dvc("queue", "start", "--jobs", "2", **NO_NETWORK)
    assert started.returncode == 0, started.stdout + started.stderr
    # There the workers tell that a task is over, however it ended; asking `dvc queue status` would cost a second.
    told = project.root / ".dvc" / "tmp" / "exps" / "celery" / "result"
    try:
        wait_until(lambda: len(list(told.glob("celery-task-meta-*"))) == 2)
    finally:
        project.dvc("queue", "stop")
    for name in ("vgg16", "calm"):
        logs[name] = stages_run(project.dvc("queue", "logs", name).stdout)
    run("again", "backbone=vgg16", "--temp")
    run("gallery", "evaluate.gallery=9")
    project.git("checkout", "--quiet", ".")
    workshop.record("experiments").write_text(json.dumps(logs))


def build_elsewhere(workshop):
    """A clone with its dvc.lock, but neither cache nor runs; `preprocess` fails, `train` is terminated, then killed."""
    finished = workshop.built("finished")
    project = Project(workshop.folder / "elsewhere", workshop.home)
    finished.git("clone", "--quiet", str(finished.root), str(project.root))
    database = workshop.folder / "other.db"
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{database}", **NO_NETWORK}
    seen = {}

    def look(name, stage):
        child = store.last_child(stage)
        parent = store.client.get_run(child.data.tags["mlflow.parentRunId"])
        seen[name] = {"child": child.info.status, "parent": parent.info.status}

    def times_trained():
        with contextlib.closing(sqlite3.connect(database)) as connection:
            return connection.execute("SELECT count(*) FROM runs WHERE name = 'train'").fetchone()[0]

    failed = project.dvc("repro", KERAS_BACKEND="none-such", **environment)
    assert failed.returncode != 0
    store = Store(environment["MLFLOW_TRACKING_URI"])
    look("failed", "preprocess")
    for signum in (signal.SIGTERM, signal.SIGKILL):
        before = times_trained()
        repro = project.start("dvc", "repro", **environment)
        wait_until(lambda before=before, repro=repro: times_trained() > before or repro.poll() is not None)
        assert repro.returncode is None, repro.communicate()
        (train,) = [
            process
            for process in psutil.Process(repro.pid).children(recursive=True)
            if process.cmdline()[1:] == ["stages/train.py"]
        ]
        train.send_signal(signum)
        repro.communicate(timeout=PATIENCE)
        assert repro.returncode != 0
        look(signum.name, "train")
    seen["stages run"] = project.repro(**environment)
    workshop.record("elsewhere").write_text(json.dumps(seen))


def declared_outs(project):
    """Every output that dvc.yaml names, by stage."""
    stages = YAML(typ="safe").load(project.root / "dvc.yaml")["stages"]
    return {
        name: [next(iter(out)) if isinstance(out, dict) else out for out in (*s.get("outs", []), *s.get("metrics", []))]
        for name, s in stages.items()
    }


BUILDERS = {
    "finished": build_finished,
    "shapes": build_shapes,
    "experiments": build_experiments,
    "elsewhere": build_elsewhere,
}


def pytest_collection_modifyitems(items):
    """Puts the longest files first; the order is otherwise pytest's."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """Spares the garbage collector the objects of imported libraries, over which it would go again and again."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)  # of Python's 700, 10, 10: TensorFlow's graphs are many objects that live on
    gc.enable()


@pytest.fixture(scope="session")
def workshop(request, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    workshop = Workshop(folder, wanted & set(BUILDERS) | {"finished"})
    yield workshop
    workshop.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def finished(workshop):
    """A small project after its first `dvc repro`, committed."""
    return workshop.built("finished")


@pytest.fixture(scope="session")
def shapes(workshop):
    """A project on three classes of pictures from a folder."""
    return workshop.built("shapes")


@pytest.fixture(scope="session")
def elsewhere(workshop):
    """A fresh clone of the finished project: no cache, no network, runs in `other_store`; see `interruptions`.

    All came out as dvc.lock says, so `track` had nothing new to track.
    """
    return workshop.built("elsewhere")


@pytest.fixture(scope="session")
def other_store(workshop, elsewhere):
    """The store into which `elsewhere` wrote."""
    return Store(f"sqlite:///{workshop.folder / 'other.db'}")


@pytest.fixture(scope="session")
def interruptions(workshop, elsewhere):
    """What the store said after `preprocess` failed and `train` was terminated and killed; what the last repro ran."""
    return json.loads(workshop.record("elsewhere").read_text())


@pytest.fixture(scope="session")
def experiments(workshop):
    """A copy in which DVC ran changed parameters in each of its ways, without network.

    First a plain `dvc repro` with smaller galleries; then `vgg16` and `calm` from the queue by two workers at once
    (another backbone, another learning rate), `again` in a temporary folder (what `vgg16` did already) and `gallery`
    in the workspace (what the plain repro did already).
    """
    return workshop.built("experiments")


@pytest.fixture(scope="session")
def experiment_stages(workshop, experiments):
    """The stages that DVC ran for each experiment, and for the plain `repro`."""
    return json.loads(workshop.record("experiments").read_text())


@pytest.fixture
def under_jax(workshop, tmp_path):
    """Runs code in the test's folder, where Keras computes with JAX; gives what it prints."""
    project = Project(tmp_path, workshop.home)

    def run(code, **changes):
        process = project.start_under_jax("-c", code, **changes)
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, stderr[-3000:]
        return stdout

    return run


@pytest.fixture
def warm_processes(monkeypatch):
    """Has the processes of a pool that the test starts be forks of the warm one."""
    folder, variables = warm_programs()
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(folder / "python"))
    for name in [name for name in os.environ if name.startswith(warm.COLD)]:  # which libraries wrote into it
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def make_copy(finished, tmp_path):
    """Gives a copy of the finished project, to be changed at will."""
    return lambda name="copy": copy_project(finished, tmp_path / name)


@pytest.fixture
def ordinary_user(tmp_path):
    """A folder, and until the test ends the process is of a user whom the modes of files hold, as they do not root."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are only root's
        os.chown(folder, 65534, -1)
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"root may not become another user here: {error}")
        try:
            if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                pytest.skip("another user may not write into temporary folders here")
            yield Path(folder)
        finally:
            os.seteuid(0)


@pytest.fixture
def internet(monkeypatch):
    """A pretend internet that this process and its children use; the test fills in `sites`."""
    with Internet() as internet:
        for name, value in internet.environment.items():
            monkeypatch.setenv(name, value)
        yield internet
