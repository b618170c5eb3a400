"""Whatever a user calls a model is found: files, stages and versions in git, and models in a real MLflow store."""

import contextlib
import errno
import shutil
from pathlib import Path

import pytest
from gto import api

from catdog import paths
from catdog.errors import CatdogError
from catdog.model_reference import find_model
from catdog.predict import run_predict
from conftest import Project
from test_inputs import CAT, DOG, fill, picture
from test_predict import model_of
from tiny_registry import enter

# Keras' own way of saving variables, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINE = """
stages:
  train:
    cmd: mkdir -p models && cp source.keras models/model.keras
    deps: [source.keras]
    outs: [models/model.keras]
artifacts:
  cats-vs-dogs:
    path: models/model.keras
    type: model
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A repository with two promoted models: v1.0.0, and v1.0.1, which prod serves. Its own file is a third."""
    folder = tmp_path_factory.mktemp("reference")
    project = Project(folder / "project", folder / "home")
    project.home.mkdir()
    project.root.mkdir()
    (project.root / "dvc.yaml").write_text(PIPELINE)
    (project.root / ".gitignore").write_text("/models\n/source.keras\n/mlflow.db*\n/mlruns\n")
    project.git("init", "--quiet", "--initial-branch=main")
    # GTO asks libgit2, which looks for the user's file where HOME was when this process first asked.
    project.git("config", "user.name", "Ann")
    project.git("config", "user.email", "ann@example.org")
    assert project.dvc("init", "--quiet").returncode == 0
    for number, version in enumerate(["v1.0.0", "v1.0.1", None]):
        model_of(("cat", "dog"), project.root / "source.keras", threshold=0.1 * number)
        done = project.dvc("repro", "--quiet")
        assert done.returncode == 0, done.stderr
        shutil.copy(project.root / paths.MODEL, folder / f"{number}.keras")
        project.commit()
        if version:
            project.git("tag", "-a", f"cats-vs-dogs@{version}", "-m", "promoted")
    with pytest.MonkeyPatch.context() as patch:
        enter(project, patch)
        api.assign(str(project.root), "cats-vs-dogs", "prod", version="v1.0.1")
    return project


@pytest.fixture
def project(built, monkeypatch):
    return enter(built, monkeypatch)


@pytest.fixture
def find():
    with contextlib.ExitStack() as downloads:
        yield lambda reference: find_model(reference, downloads)


def model_bytes(project, number: int) -> bytes:
    return (project.root.parent / f"{number}.keras").read_bytes()


def test_none_is_the_model_that_the_pipeline_trained(project, find):
    assert find(None) == project.root / paths.MODEL
    assert find(None).read_bytes() == model_bytes(project, 2)


def test_stages_and_versions_of_the_registry_are_found(project, find):
    assert find("prod").read_bytes() == find("v1.0.1").read_bytes() == model_bytes(project, 1)
    assert find("v1.0.0").read_bytes() == model_bytes(project, 0)


def test_files_go_before_names_in_the_registry(project, find, tmp_path, monkeypatch):
    fill(tmp_path, {"prod": b"a file", "one/m.keras": b"x", "two/a/1.keras": b"x", "two/b/2.keras": b"x"})
    monkeypatch.chdir(tmp_path)
    assert find("prod") == Path("prod")
    assert find("one") == Path("one/m.keras")
    assert find("absent.keras") == Path("absent.keras")  # whoever reads it says that there is none
    assert find("models/absent") == Path("models/absent")
    with pytest.raises(CatdogError, match=r"two holds 2 \.keras files, where one is needed; name the file, or"):
        find("two")


def refuse(*arguments, **options):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_files_that_cannot_be_read_are_told(find, tmp_path, monkeypatch):
    fill(tmp_path, {"notes.txt": b"no folder", "locked.keras": b"x"})
    monkeypatch.chdir(tmp_path)
    long = "a" * 300 + ".keras"
    for name, reason in (("notes.txt/x.keras", "Not a directory"), (long, "File name too long")):
        with pytest.raises(CatdogError, match=rf"the model {name} cannot be read \({reason}\); correct its path or"):
            find(name)
    for look in ("is_dir", "open"):  # in a folder that may not be entered, and a file of another user
        with monkeypatch.context() as patch:
            patch.setattr(Path, look, refuse)
            with pytest.raises(CatdogError, match=r"the model locked\.keras cannot be read \(Permission denied\)"):
                find("locked.keras")


@pytest.mark.parametrize("name", ["staging", "v9.9.9", "model.h5"])
def test_names_that_nobody_knows_are_told(project, find, name):
    with pytest.raises(CatdogError, match=f"there is no model file '{name}', and as a name in the registry: .* {name}"):
        find(name)


def test_a_store_that_is_not_there_is_told_and_not_made(project, find):
    with pytest.raises(
        CatdogError, match=r"models:/cats-vs-dogs@champion is a model in MLflow, but .* has no tracking"
    ):
        find("models:/cats-vs-dogs@champion")
    assert not (project.root / "mlflow.db").exists()


def test_models_in_mlflow_are_found(built, tmp_path, monkeypatch, find, capsys):
    project = Project(tmp_path / "project", built.home)
    shutil.copytree(built.root, project.root)
    enter(project, monkeypatch)
    from catdog.serving import log_served_model
    from catdog.tracking import connect

    client = connect(project.root)
    experiment = client.get_experiment_by_name("catdog").experiment_id
    run = client.create_run(experiment).info.run_id
    log_served_model(run, built.root.parent / "0.keras")
    client.create_registered_model("cats-vs-dogs")
    (logged,) = client.get_run(run).outputs.model_outputs
    client.create_model_version("cats-vs-dogs", f"models:/{logged.model_id}")
    client.set_registered_model_alias("cats-vs-dogs", "champion", "1")
    for reference in ("models:/cats-vs-dogs@champion", "models:/cats-vs-dogs/1", f"runs:/{run}/model"):
        with contextlib.ExitStack() as downloads:
            brought = find_model(reference, downloads)
            assert brought.read_bytes() == model_bytes(built, 0)
        assert not brought.exists()

    fill(tmp_path, {"1.png": picture(CAT), "2.png": picture(DOG)})
    images = [tmp_path / "1.png", tmp_path / "2.png"]
    capsys.readouterr()
    assert run_predict(images, model="models:/cats-vs-dogs@champion", layout="csv") == 0
    # The threshold of that model is 0.
    assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["dog", "dog"]

    client.log_text(run, "no model", "notes/text.txt")
    for reference, told in {
        "models:/cats-vs-dogs@loser": r"models:/cats-vs-dogs@loser cannot be had from sqlite:///.* \(.*loser.*\)",
        "models:/cats-vs-dogs/7": r"models:/cats-vs-dogs/7 cannot be had from",
        "runs:/0123/model": r"runs:/0123/model cannot be had from",
        f"runs:/{run}/notes": r"notes holds 0 \.keras files, where one is needed; name the file, or",
    }.items():
        with pytest.raises(CatdogError, match=told) as caught:
            find(reference)
        assert "\n" not in str(caught.value)
