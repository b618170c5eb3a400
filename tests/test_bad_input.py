"""What a user gets wrong, and a full disk: one sentence, a marked run, and nothing lost.

Every case runs a stage's script, in a process and a workplace of its own.
"""

import io
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from conftest import NO_NETWORK, SMALL_DISK, Project, copy_project, require_small_disk

OFFLINE = {**NO_NETWORK, "KERAS_HOME": "no-such-cache"}


def nothing(project):
    """Leaves the project as it is."""


def params(**values):
    """Sets parameters; `__` stands for the dot."""
    return lambda project: project.set_params({name.replace("__", "."): value for name, value in values.items()})


def add_line(line):
    """Adds a line to params.yaml."""

    def prepare(project):
        with (project.root / "params.yaml").open("a") as file:
            file.write(f"\n{line}\n")

    return prepare


def dataset_file(name, content):
    """Gives a file as the data set."""

    def prepare(project):
        (project.root / name).write_bytes(content)
        project.set_params({"dataset": name})

    return prepare


def picture(seed):
    """The bytes of a small noisy picture."""
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def raw_zip(counts, *, files=()):
    """Puts so many pictures of each class into data/raw.zip, where `split` reads them; 0 is an empty folder."""

    def prepare(project):
        with zipfile.ZipFile(project.root / "data/raw.zip", "w") as archive:
            for label, count in counts.items():
                archive.writestr(f"{label}/", b"")
                for number in range(count):
                    archive.writestr(f"{label}/{number}.png", picture([*label.encode(), number]))
            for name, content in files:
                archive.writestr(name, content)

    return prepare


@dataclass(frozen=True)
class Case:
    stage: str
    prepare: Callable[[Project], None]
    says: tuple[str, ...]  # what the sentence must name
    environment: Mapping[str, str] = field(default_factory=dict)
    disk: tuple[str, str] | None = None  # a folder that is a disk of its own, and its size


CASES = {
    "unknown parameter in a block": Case(
        "download", add_line("zoom: {}"), ("zoom", "known keys"),
    ),
    "misspelt parameter in a block": Case(
        "download", params(train__learning_rte=0.1), ("train.learning_rte", "did you mean learning_rate"),
    ),
    "parameter of the wrong type": Case(
        "download", params(train__epochs="ten"), ("train.epochs", "'ten'", "integer"),
    ),
    "number out of range": Case(
        "download", params(train__dropout=1.5), ("train.dropout", "1.5", "less than 1"),
    ),
    "share above one": Case(
        "download", params(split__val=1.5), ("split.val", "1.5", "fraction below 1"),
    ),
    "choice that does not exist": Case(
        "train", params(train__optimizer="adm"), ("train.optimizer", "'adm'", "'adam'"),
    ),
    "unknown backbone": Case(
        "download", params(backbone="resnet51"), ("resnet51", "resnet50"),
    ),
    "broken YAML": Case(
        "download", add_line("train: [1, 2"), ("params.yaml", "not valid YAML", "line"),
    ),
    "parameter given twice": Case(
        "download", add_line("seed: 7"), ("params.yaml", "seed"),
    ),
    "no such data set": Case(
        "download", params(dataset="no/such/place"), ("no/such/place", "does not exist", "folder or archive"),
    ),
    "data set that is no archive": Case(
        "download", dataset_file("photos.zip", b"<html>Not Found</html>"), ("photos.zip", "no archive", "folder"),
    ),
    "empty file as data set": Case(
        "download", dataset_file("photos.zip", b""), ("photos.zip", "empty"),
    ),
    "one class": Case(
        "split", raw_zip({"cat": 12}), ("only the class 'cat'", "two or more"),
    ),
    "empty class": Case(
        "split", raw_zip({"cat": 12, "dog": 0}), ("'dog'", "no images", "fill it or remove it"),
    ),
    "fewer images than the splits need": Case(
        "split", raw_zip({"cat": 12, "dog": 2}), ("'dog'", "2", "split.val", "add images"),
    ),
    "no images": Case(
        "split", raw_zip({}, files=[("notes/a.txt", b"a"), ("other/b.txt", b"b")]), ("no image files", "dataset"),
    ),
    "mostly damaged images": Case(
        "split",
        raw_zip({"cat": 12, "dog": 12}, files=[(f"dog/x{n}.jpg", b"\xff\xd8 damaged") for n in range(12)]),
        ("12 of 36", "split.max_rejected", "0.05"),
    ),
    "weights that need the network": Case(
        "embed", params(backbone="resnet50"), ("resnet50", "could not be downloaded", "mobilenetv2"), OFFLINE,
    ),
    "weights file that does not exist": Case(
        "download", params(weights="my.weights.h5"), ("my.weights.h5", "imagenet"),
    ),
    "learning rate that diverges": Case(
        "train",
        params(
            train__optimizer="sgd", train__learning_rate=10.0, train__hidden_units=[256] * 5, train__activation="elu"
        ),
        ("train.learning_rate", "10.0", "lower"),
    ),
    "disk too small for the archive": Case("download", nothing, ("free",), disk=("data", "200k")),
    "disk full while writing shards": Case(
        "preprocess", nothing, ("no space left", "free"), disk=("data/tfrecords", "80k"),
    ),
    "disk full while writing features": Case(
        "embed", nothing, ("no space left", "free"), disk=("data/features", "80k"),
    ),
    "disk full while writing the model": Case("train", nothing, ("no space left", "free"), disk=("models", "1m")),
}  # fmt: skip


def bare_copy(source, root):
    """Copies what stages read: neither git's objects nor DVC's cache; the weights are linked, not copied."""
    left_out = shutil.ignore_patterns(".git", "cache", "tmp", "mlruns", "mlflow.db-*")

    def link_weights(here, there):
        return os.link(here, there) if str(here).endswith(".h5") else shutil.copy2(here, there)

    project = copy_project(source, root, ignore=left_out, copy_function=link_weights)
    project.git("init", "--quiet")
    return project


@pytest.fixture
def outcome(name, workshop, finished, tmp_path):
    """Runs the case of this name; gives its project, how it ended and how long it took."""
    case = CASES[name]
    project = bare_copy(finished, tmp_path / "project")
    case.prepare(project)
    script = f"stages/{case.stage}.py"
    workshop.rest()
    started = time.monotonic()
    if case.disk:
        require_small_disk(finished)
        done = run_on_small_disk(project, *case.disk, "python", script)
    else:
        done = project.run("python", script, PYTHONPATH="src", **case.environment)
    return project, done, time.monotonic() - started


def run_on_small_disk(project, folder, size, *command, **environment):
    """Runs a command to which a folder appears as an empty disk of its own."""
    script = f'mkdir -p {folder} && mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"'
    return project.run(*SMALL_DISK, "bash", "-c", script, "bash", *command, PYTHONPATH="src", **environment)


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_a_failed_run(name, finished, outcome):
    case = CASES[name]
    project, done, seconds = outcome
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"catdog {case.stage}: ")
    assert [words for words in case.says if words not in done.stderr] == [], done.stderr
    assert done.returncode in (1, 2)
    assert seconds < 30
    child = project.store().last_child(case.stage)
    parent = project.store().client.get_run(child.data.tags["mlflow.parentRunId"])
    assert (child.info.status, parent.info.status) == ("FAILED", "FAILED")
    assert child.info.run_id != finished.store().last_child(case.stage).info.run_id


def test_full_disk_under_the_store_ends_in_one_sentence(finished, tmp_path):
    require_small_disk(finished)
    project = bare_copy(finished, tmp_path / "project")
    size = (project.root / "mlflow.db").stat().st_size + 3 * 4096
    done = run_on_small_disk(
        project,
        "store",
        size,
        *("bash", "-c", "cp mlflow.db store && exec python stages/download.py"),
        MLFLOW_TRACKING_URI=f"sqlite:///{project.root}/store/mlflow.db",
    )
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


# Through DVC: the last good outputs come back without their work being done again


def test_good_outputs_come_back_after_failures(finished, make_copy):
    project = make_copy()
    good = (project.root / "params.yaml").read_text()
    for stage, prepare in (("download", params(dataset="no/such/place")), ("split", params(split__test=0.99))):
        prepare(project)
        failed = project.dvc("repro")
        assert failed.returncode != 0
        assert f"catdog {stage}: " in failed.stderr
        assert "Traceback" not in failed.stderr
        assert project.store().last_child(stage).info.status == "FAILED"
        (project.root / "params.yaml").write_text(good)
    assert project.repro() == []
    assert project.out_hashes() == finished.out_hashes()
    assert project.dvc("status").stdout.strip() == "source:\n\talways changed"
