"""Recipes: each is valid, changes something, and becomes exactly the command that `dvc exp run` understands."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from catdog import cli
from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.recipes import get_recipe, list_recipes, recipe_command

ROOT = Path(__file__).parents[1]
NAMES = ["mobilenetv2-dense", "resnet50-1000", "resnet50-flatten", "small-697-tuned", "vgg-resnet-inception"]
EVERY = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the project's params.yaml and recipes, as the repository that commands see; not yet in git."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


@pytest.fixture
def dvc(tmp_path, monkeypatch):
    """A `dvc` on PATH that writes down its arguments and working directory and exits with 3; returns the file."""
    seen = tmp_path / "seen.txt"
    program = tmp_path / "bin" / "dvc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\npwd > '{seen}'\nprintf '%s\\n' \"$@\" >> '{seen}'\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return seen


def write_recipe(root, text, name="mine"):
    (root / "recipes" / f"{name}.yaml").write_text(text)


def changes(command):
    """The values after -S."""
    return [after for before, after in pairwise(command) if before == "-S"]


def flat(tree, prefix=""):
    """The values of a YAML tree by dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_all_are_listed_with_what_their_sources_report(root):
    recipes = list_recipes(root)
    assert [recipe.name for recipe in recipes] == NAMES
    assert all(40 < len(recipe.about) <= 118 and recipe.published for recipe in recipes)
    assert {recipe.name: recipe.published for recipe in recipes} == {
        "mobilenetv2-dense": "training accuracy 96 %, test accuracy 90 %, test loss 0.72",
        "resnet50-1000": "curves of accuracy and loss",
        "resnet50-flatten": "training accuracy 99.6 %, test accuracy 98.8 %",
        "small-697-tuned": "a comparison of backbones, no single figure",
        "vgg-resnet-inception": "accuracy 99.36 %",
    }


@EVERY
def test_every_line_of_a_recipe_changes_a_parameter(root, name):
    yaml = YAML(typ="safe")
    defaults = dict(flat(yaml.load(root / "params.yaml")))
    overlay = dict(flat(yaml.load(root / "recipes" / f"{name}.yaml")))
    assert overlay
    assert {key: value for key, value in overlay.items() if defaults[key] == value} == {}


@EVERY
def test_dvc_reads_the_command_as_the_recipe_is_written(root, name):
    """DVC's own code applies the command's changes to params.yaml; they are the recipe's, and valid."""
    from dvc.utils.hydra import apply_overrides

    yaml = YAML(typ="safe")
    overlay = dict(flat(yaml.load(root / "recipes" / f"{name}.yaml")))
    before = dict(flat(yaml.load(root / "params.yaml")))
    command = recipe_command(root, get_recipe(root, name))
    assert command[:3] == ["dvc", "exp", "run"]
    apply_overrides(root / "params.yaml", changes(command))
    assert dict(flat(yaml.load(root / "params.yaml"))) == before | overlay
    load_params(root / "params.yaml")


def test_settings_are_those_of_the_published_recipes(root):
    def params(name):
        return get_recipe(root, name).overrides

    flatten = params("resnet50-flatten")
    stated = {"backbone": "resnet50", "embed.pooling": "flatten", "train.hidden_units": "[1024]"}
    stated |= {"train.dropout": "0.2", "train.optimizer": "sgd", "train.batch_size": "20", "train.epochs": "10"}
    assert stated.items() <= flatten.items()
    assert (int(flatten["split.train"]) + int(flatten["split.val"]), flatten["split.val"]) == (20_000, "4000")
    stated = {"backbone": "resnet50", "split.train": "1000", "split.val": "5000", "train.output": "softmax"}
    assert stated.items() <= params("resnet50-1000").items()
    small = params("small-697-tuned")
    assert sum(int(small[f"split.{split}"]) for split in ("train", "val", "test")) == 697
    assert small["preprocess.image_size"] == "256"
    assert params("vgg-resnet-inception")["fine_tune.layers"] == "last_block"


@pytest.mark.parametrize(
    "value",
    ["a b", "it's", "1e3", "null", "true", "[x]", "{a}", "C:\\x", "tfds:beans", "https://a.org/b.zip?c=d&e", "ä/é", ""],
)
def test_any_text_reaches_params_yaml_unchanged(root, value):
    from dvc.utils.hydra import apply_overrides

    with (root / "recipes" / "mine.yaml").open("w") as file:
        YAML().dump(
            {"split": {"file": value}, "train": {"hidden_units": [3, 4]}, "fine_tune": {"augment": False}}, file
        )
    command = recipe_command(root, get_recipe(root, "mine"))
    apply_overrides(root / "params.yaml", changes(command))
    params = load_params(root / "params.yaml")
    assert (params.split.file, params.train.hidden_units, params.fine_tune.augment) == (value, (3, 4), False)


def test_further_changes_win_and_stand_once(root):
    recipe = get_recipe(root, "vgg-resnet-inception")
    command = recipe_command(root, recipe, ["backbone=resnet50", "seed=3", "seed=4"], queue=True)
    assert command[:4] == ["dvc", "exp", "run", "--queue"]
    assert changes(command) == [
        "dataset=microsoft",
        "backbone=resnet50",
        "train.hidden_units=[256]",
        "fine_tune.layers=last_block",
        "seed=4",
    ]
    assert recipe.overrides["backbone"] == "vgg16"


def test_recipe_starts_from_the_last_commit(root):
    """One recipe's parameters, which `dvc exp run` leaves in params.yaml, are not the next one's."""
    from dvc.utils.hydra import apply_overrides

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "--quiet")
    git("add", "params.yaml")
    git("commit", "--quiet", "--message", "defaults")
    recipe = get_recipe(root, "vgg-resnet-inception")
    clean = recipe_command(root, recipe)
    apply_overrides(root / "params.yaml", changes(clean))
    assert recipe_command(root, recipe) == clean  # the same once more

    other = get_recipe(root, "resnet50-1000")
    with pytest.raises(
        CatdogError, match=r"differs from the last commit in train\.hidden_units, fine_tune\.layers, which"
    ):
        recipe_command(root, other)
    set_anew = ["train.hidden_units=[8]", "fine_tune.layers=none"]
    assert changes(recipe_command(root, other, set_anew))[-2:] == set_anew
    git("checkout", "params.yaml")
    assert changes(recipe_command(root, other)) == [f"{key}={value}" for key, value in other.overrides.items()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.epoch=5", r"there is no parameter train\.epoch; did you mean train\.epochs\?"),
        ("zzz=5", "there is no parameter zzz; params.yaml lists them all"),
        ("train=5", "there is no parameter train;"),
        ("train.epochs", "write it as KEY=VALUE"),
    ],
)
def test_wrong_change_is_told(root, change, message):
    with pytest.raises(CatdogError, match=message):
        recipe_command(root, get_recipe(root, "resnet50-1000"), [change])


def test_unknown_name_is_told_with_the_nearest(root):
    with pytest.raises(CatdogError, match="no recipe 'resnet50-flat': did you mean 'resnet50-flatten'") as caught:
        get_recipe(root, "resnet50-flat")
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(CatdogError, match=r"no recipe '\.\./params': choose one of mobilenetv2-dense, "):
        get_recipe(root, "../params")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 5}", r"recipes/mine\.yaml: unknown parameter train\.epoch; did you mean epochs\?"),
        ("train: {epochs: 0}", r"recipes/mine\.yaml: train\.epochs = 0"),
        ("train:", r"recipes/mine\.yaml: train = None"),
        ("backbone: inceptionv3\npreprocess: {image_size: 64}", "image_size = 64 is too small"),
        ("# nothing\n", "holds no parameters"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_wrong_recipe_is_told(root, text, message):
    write_recipe(root, text)
    with pytest.raises(CatdogError, match=message):
        get_recipe(root, "mine")


def test_an_empty_block_of_a_recipe_sets_nothing(root):
    """As in params.yaml, where it stands for the defaults; `-S train={}` would take the block's values away."""
    write_recipe(root, "seed: 4\ntrain: {}\n")
    assert get_recipe(root, "mine").overrides == {"seed": "4"}


def test_recipe_without_a_head_describes_nothing(root, capsys):
    write_recipe(root, "seed: 5\n# Published: too late\n")
    recipe = get_recipe(root, "mine")
    assert (recipe.about, recipe.published, recipe.overrides) == ("", "", {"seed": "5"})
    write_recipe(root, "#  Mine, and more\n#\n# Published: 7 %\nseed: 5\n")
    assert cli.main(["recipe", "--list"]) == 0
    assert "mine\n    Mine, and more\n    published: 7 %\n" in capsys.readouterr().out


@pytest.mark.usefixtures("root")
def test_command_prints_what_a_shell_takes(capsys):
    assert cli.main(["recipe", "mobilenetv2-dense", "-S", "dataset=my photos.zip"]) == 0
    expected = "dvc exp run -S 'dataset=my photos.zip' -S 'train.hidden_units=[128]' -S train.dropout=0.0\n"
    assert capsys.readouterr().out == expected
    for arguments in (["recipe"], ["recipe", "--list"]):
        assert cli.main(arguments) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if line[0] != " "] == NAMES


def test_run_starts_dvc_at_the_root_and_returns_its_exit_code(root, dvc, monkeypatch):
    monkeypatch.chdir("/")
    assert cli.main(["recipe", "mobilenetv2-dense", "--run", "--queue", "-S", "dataset=a b.zip"]) == 3
    arguments = ["exp", "run", "--queue", "-S", "dataset=a b.zip", "-S", "train.hidden_units=[128]"]
    assert dvc.read_text().splitlines() == [str(root), *arguments, "-S", "train.dropout=0.0"]


def test_mistakes_of_the_command_are_one_sentence(root, dvc, monkeypatch, capsys):
    for arguments in (["resnet50"], ["--run"], ["-S", "seed=1"], ["resnet50-1000", "--run", "-S", "sed=1"]):
        assert cli.main(["recipe", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("catdog: ")
        assert len(told.splitlines()) == 1
    assert not dvc.exists()
    without_dvc = root / "only-git"
    without_dvc.mkdir()
    (without_dvc / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(without_dvc))
    assert cli.main(["recipe", "resnet50-1000", "--run"]) == 2
    assert "dvc is not on PATH; activate the environment" in capsys.readouterr().err


@pytest.mark.usefixtures("root")
def test_nothing_heavy_is_loaded():
    code = (
        "import sys; from catdog.cli import main; assert main(['recipe']) == main(['recipe', 'resnet50-1000']) == 0;"
        "print([name for name in ('keras', 'numpy', 'dvc', 'mlflow', 'pandas') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
