"""What backbones cost, and their comparison through DVC's queue: real networks, real DVC, real MLflow."""

import csv
import io
import json
import subprocess
from itertools import product

import pandas as pd
import pytest

from catdog import backbone_comparison, cli
from catdog.backbone_comparison import (
    Contender,
    count_multiply_adds,
    failure_reason,
    finished_experiments,
    measure_cost,
    plan,
    queue_command,
    rank,
    run_comparison,
)
from catdog.backbones import build_backbone, get_backbone
from catdog.config import load_params
from catdog.errors import CatdogError
from conftest import NO_NETWORK, REPOSITORY

# Billions of multiply-adds at the native size, each of the paper that the comment names. They include the classifier,
# which here is left out: at most 2.5 % less.
PUBLISHED = {
    "mobilenetv2": 0.300,  # MobileNetV2 (Sandler et al. 2018), Table 4
    "resnet50": 3.8,  # Deep Residual Learning (He et al. 2015), Table 1
    "xception": 8.38,  # Learning Transferable Architectures (Zoph et al. 2017), Table 2
    "efficientnetb0": 0.39,  # EfficientNet (Tan and Le 2019), Table 2
    "convnexttiny": 4.5,  # A ConvNet for the 2020s (Liu et al. 2022), Table 1
}


# Cost


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_are_those_of_the_papers(name):
    size = get_backbone(name).native_size
    assert measure_cost(name, size).multiply_adds / 1e9 == pytest.approx(PUBLISHED[name], rel=0.025)


@pytest.mark.parametrize(
    ("builder", "classifier", "published"),
    [("MobileNetV2", 1280 * 1000, 300_774_272), ("VGG16", (7 * 7 * 512 + 4096 + 1000) * 4096, 15_470_264_320)],
)
def test_with_its_classifier_a_network_costs_what_the_paper_counts(builder, classifier, published):
    """VGG16's known number (Simonyan and Zisserman 2014), and MobileNetV2's 300 million, to the last one."""
    import keras

    whole = getattr(keras.applications, builder)(weights=None)
    body = build_backbone(get_backbone(builder.lower()), 224)
    assert count_multiply_adds(whole) == published
    assert count_multiply_adds(body) == published - classifier


def test_each_kind_of_layer_is_counted_by_hand():
    import keras

    def count(*layers, shape=(8, 6, 4)):
        return count_multiply_adds(keras.Sequential([keras.Input(shape), *layers]))

    layers = keras.layers
    assert count(layers.Conv2D(5, 3, padding="same")) == 8 * 6 * 3 * 3 * 4 * 5
    assert count(layers.Conv2D(5, 3, padding="valid")) == 6 * 4 * 3 * 3 * 4 * 5
    assert count(layers.Conv2D(6, 3, strides=2, padding="same")) == 4 * 3 * 3 * 3 * 4 * 6
    assert count(layers.Conv2D(6, 3, groups=2, padding="same")) == 8 * 6 * 3 * 3 * 2 * 6
    assert count(layers.DepthwiseConv2D(3, padding="same")) == 8 * 6 * 3 * 3 * 4
    assert count(layers.SeparableConv2D(5, 3, padding="same")) == 8 * 6 * (3 * 3 * 4 + 4 * 5)
    assert count(layers.Dense(7)) == 8 * 6 * 4 * 7
    assert count(layers.GlobalAveragePooling2D(), layers.Dense(7)) == 4 * 7
    assert count(layers.BatchNormalization(), layers.ReLU()) == 0
    inner = keras.Sequential([layers.Conv2D(5, 1), layers.Conv2D(2, 1)])
    assert count(inner) == 8 * 6 * (4 * 5 + 5 * 2)


def test_a_layer_that_cannot_be_counted_is_no_zero():
    import keras

    layer = keras.layers.Conv2DTranspose(2, 3, name="up")
    with pytest.raises(TypeError, match="up, a Conv2DTranspose"):
        count_multiply_adds(keras.Sequential([keras.Input((8, 8, 3)), layer]))


def test_joined_networks_cost_the_sum():
    one, other = measure_cost("mobilenetv2", 96), measure_cost("mobilenetv3large", 96)
    joined = measure_cost("mobilenetv2+mobilenetv3large", 96)
    assert joined.parameters == one.parameters + other.parameters == 2_257_984 + 2_996_352
    assert joined.multiply_adds == one.multiply_adds + other.multiply_adds
    assert one.bytes == 4 * 2_257_984


def test_cost_is_printed_for_the_image_size_of_the_parameters(root, capsys):
    assert cli.main(["backbones", "--cost", "mobilenetv2,mobilenetv2+vgg16,mobilenetv2"]) == 0
    header, *rows, _, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["backbone", "parameters", "multiply-adds", "float32", "weights"]
    assert [row.split()[0] for row in rows] == ["mobilenetv2", "mobilenetv2+vgg16"]
    assert rows[0].split()[1:] == ["2.26", "M", "0.30", "G", "9.0", "MB"]
    assert rows[1].split()[1:] == ["16.97", "M", "15.65", "G", "67.9", "MB"]
    assert "224x224" in note


# Plan


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A git repository with the project's parameters and a line of code."""
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "train.py").write_text("1\n")
    (tmp_path / "reports").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "a@example.org")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(root, *arguments):
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(root):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "state")


def test_an_experiment_is_named_by_all_that_decides_about_it(root):
    def name(*changes):
        (contender,) = plan(root, ["vgg16"], changes)
        return contender.experiment

    first = name()
    assert first.startswith("vgg16-")
    assert name() == first
    assert name("train.learning_rate=0.001") == first  # its value anyway
    names = {first, name("train.learning_rate=0.01"), name("train.epochs=5")}
    (root / "reports/source.json").write_text("{}")  # the data set was found to be another
    names.add(name())
    (root / "stages/train.py").write_text("2\n")
    names.add(name())
    commit(root)
    names.add(name())
    assert len(names) == 6


def test_each_backbone_has_an_experiment_once(root):
    contenders = plan(root, ["vgg16", "mobilenetv2+vgg16", "vgg16"], ["train.epochs=5"])
    assert [one.backbone for one in contenders] == ["vgg16", "mobilenetv2+vgg16"]
    assert [one.params.backbone for one in contenders] == ["vgg16", "mobilenetv2+vgg16"]
    assert {one.params.train.epochs for one in contenders} == {5}
    assert len({one.experiment for one in contenders}) == 2


def test_dvc_reads_the_command_as_it_is_meant(root):
    from dvc.utils.hydra import apply_overrides

    changes = ["train.hidden_units=[16,8]", "dataset='my pictures'"]
    (contender,) = plan(root, ["mobilenetv2+vgg16"], changes)
    command = queue_command(contender, changes)
    assert command[:6] == ["dvc", "exp", "run", "--queue", "--name", contender.experiment]
    apply_overrides(root / "params.yaml", [command[at + 1] for at, word in enumerate(command) if word == "-S"])
    params = load_params(root / "params.yaml")
    assert (params.backbone, params.dataset, params.train.hidden_units) == (
        "mobilenetv2+vgg16",
        "my pictures",
        (16, 8),
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--compare", "vgg61"], "there is no backbone 'vgg61'"),
        (["--cost", "vgg16,"], "there is no backbone ''"),
        (["--compare", "vgg16", "-S", "train.epoch=5"], "no parameter train.epoch; did you mean train.epochs?"),
        (["--compare", "vgg16", "-S", "train.epochs"], "changes nothing: write it as KEY=VALUE"),
        (["--compare", "vgg16", "-S", "train.epochs=[1"], "-S train.epochs=[1 cannot be read"),
        (["--compare", "vgg16", "-S", "train.epochs=1,2"], "give one value, which all backbones get"),
        (["--compare", "vgg16", "-S", "train.epochs=0"], "train.epochs = 0"),
        (["--compare", "vgg16", "-S", "backbone=vgg19"], "name the backbones after --compare"),
        (["--compare", "vgg16", "-S", "weights=none.h5"], "there is no weights file"),
        (["--compare", "xception", "-S", "preprocess.image_size=70"], "70 is too small for backbone xception"),
        (["--jobs", "2"], "-S, --jobs and --dry-run belong to --compare"),
        (["--cost", "vgg16", "--dry-run"], "-S, --jobs and --dry-run belong to --compare"),
    ],
)
def test_a_mistake_is_one_sentence_and_queues_nothing(root, capsys, arguments, told):
    before = (root / "params.yaml").read_bytes()
    assert cli.main(["backbones", *arguments]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert git(root, "for-each-ref", "refs/exps") == ""
    assert (root / "params.yaml").read_bytes() == before


def test_without_a_commit_there_are_no_experiments(root):
    git(root, "checkout", "--quiet", "--orphan", "empty")
    git(root, "update-ref", "-d", "refs/heads/empty")
    with pytest.raises(CatdogError, match="experiments need a repository with a commit"):
        plan(root, ["vgg16"])


def test_a_dry_run_prints_the_commands_of_what_is_not_done(root, capsys):
    done, left = plan(root, ["vgg16", "vgg19"], ["train.hidden_units=[8]"])
    head = git(root, "rev-parse", "HEAD")
    git(root, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{done.experiment}", "HEAD")
    git(root, "update-ref", f"refs/exps/00/{head[2:]}/{left.experiment}", "HEAD")  # started from another commit
    assert finished_experiments(root) == {done.experiment: head}
    assert run_comparison(root, ["vgg16", "vgg19"], ["train.hidden_units=[8]"], jobs=3, dry_run=True) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"backbones: vgg16 is done already, in the experiment {done.experiment}",
        f"dvc exp run --queue --name {left.experiment} -S 'train.hidden_units=[8]' -S backbone=vgg19",
        "dvc queue start --jobs 3",
    ]


# Result


def test_the_validation_loss_ranks_and_not_the_test_split():
    results = pd.DataFrame(
        {
            "backbone": ["b", "a", "c"],
            "val_loss": [0.3, 0.3, 0.2],
            "val_accuracy": [0.99, 0.9, 0.8],
            "accuracy": [0.99, 0.9, 0.8],
            "log_loss": [0.1, 0.2, 0.3],
        }
    )
    assert rank(results)["backbone"].tolist() == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "> PYTHONPATH=src python stages/embed.py\ncatdog embed: no weights; get some\n"
            "ERROR: failed to reproduce 'embed': exited with 2\nERROR: failed to reproduce 'embed'\n\n",
            "embed: no weights; get some",
        ),
        (
            "Traceback (most recent call last):\n  File x\nValueError: too bad\nERROR: failed to reproduce 'train'\n",
            "ValueError: too bad",
        ),
        (
            "Running stage 'train':\n> python stages/train.py\nERROR: failed to reproduce 'train': exited with -9\n",
            "failed to reproduce 'train': exited with -9",
        ),
        ("ERROR: no space left\n", "no space left"),
        ("something else\n", "something else"),
        ("", "DVC could not start it; `dvc queue logs` and `dvc queue status` tell more"),
    ],
    ids=["sentence", "traceback", "killed", "dvc", "unknown", "nothing"],
)
def test_the_reason_of_a_failure_is_found(log, reason):
    assert failure_reason(log) == reason


# With DVC


@pytest.fixture
def catdog(make_copy):
    """The command in a copy of the finished project, without network."""
    project = make_copy()

    def run(*arguments):
        return project.run("python", "-m", "catdog.cli", *arguments, PYTHONPATH="src", **NO_NETWORK)

    run.project = project
    return run


def test_a_comparison_ranks_what_finished_and_tells_what_failed(catdog):
    """MobileNetV2 comes from DVC's cache; the weights of ResNet50 cannot be downloaded."""
    project = catdog.project
    done = catdog("backbones", "--compare", "resnet50,mobilenetv2")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    told = {"backbones: mobilenetv2 finished", "backbones: resnet50 failed"}
    assert {line[:-9] for line in lines[:2]} == told, done.stdout
    (name,) = [name for name in finished_experiments(project.root) if name.startswith("mobilenetv2-")]
    header, row = lines[3:5]
    assert header.startswith("backbone     val loss  val accuracy  test accuracy")
    tested = json.loads((project.root / "reports/metrics.json").read_text())
    trained = json.loads((project.root / "reports/train.json").read_text())
    (parent,) = [run for run in project.store().parents() if run.info.run_name == name]
    rate = parent.data.metrics["embed.images_per_second"]
    assert row.split() == [
        "mobilenetv2",
        f"{trained['best_val_loss']:.4f}",
        f"{trained['best_val_accuracy']:.2%}",
        f"{tested['accuracy']:.2%}",
        *(f"{tested['accuracy_low']:.1%}", "to", f"{tested['accuracy_high']:.1%}"),
        f"{tested['log_loss']:.4f}",
        *("2.26", "M", "0.06", "G"),  # at 96 pixels
        f"{rate:,.1f}",
        *(f"{trained['model_bytes'] / 1e6:.1f}", "MB"),
        name,
    ]
    assert "ranked by validation loss; the test split does not choose" in lines
    assert lines[-1].startswith("resnet50 failed: embed: the ImageNet weights of 'resnet50' are missing")
    # Once more: only what failed is tried again.
    again = catdog("backbones", "--compare", "resnet50,mobilenetv2", "--dry-run").stdout.splitlines()
    assert again[0] == f"backbones: mobilenetv2 is done already, in the experiment {name}"
    assert [line.partition(" --name")[0] for line in again[1:]] == ["dvc exp run --queue", "dvc queue start --jobs 1"]
    only = catdog("backbones", "--compare", "mobilenetv2")
    assert only.returncode == 0
    assert row in only.stdout.splitlines()


def test_a_queue_without_a_worker_is_not_waited_for(catdog, monkeypatch):
    from dvc.repo import Repo

    root = catdog.project.root
    (one,) = plan(root, ["vgg16"])
    assert isinstance(one, Contender)
    queued = catdog.project.run(*queue_command(one, []))
    assert queued.returncode == 0, queued.stderr
    monkeypatch.setattr(backbone_comparison, "SECONDS_WITHOUT_WORKER", 1.0)
    told = f"no worker of DVC's queue is left for {one.experiment};"
    with Repo(str(root)) as repo, pytest.raises(CatdogError, match=told):
        backbone_comparison._wait(repo.experiments.celery_queue, {one.experiment: "vgg16"}, set())


def test_a_sweep_queues_every_combination_and_its_table_has_short_columns(make_copy):
    project = make_copy()
    sweep = {"backbone": ("mobilenetv2", "vgg16"), "train.learning_rate": ("0.01", "0.001")}
    changes = [word for name, values in sweep.items() for word in ("-S", f"{name}={','.join(values)}")]
    queued = project.dvc("exp", "run", "--queue", *changes)
    assert queued.returncode == 0, queued.stderr
    table = list(csv.DictReader(io.StringIO(project.dvc("exp", "show", "--csv").stdout)))
    waiting = [row for row in table if row["State"] == "Queued"]
    assert {(row["backbone"], row["train.learning_rate"]) for row in waiting} == set(product(*sweep.values()))
    assert len(waiting) == 4
    # A second file of metrics or parameters, or a name twice, would put the file before each name.
    report = json.loads((project.root / "reports/metrics.json").read_text())
    assert set(table[0]) >= {*report, *load_params(project.root / "params.yaml").flat()}
    assert [name for name in table[0] if ":" in name] == []
