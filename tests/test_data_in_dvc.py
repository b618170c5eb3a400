"""Data from outside, through real DVC: a change is noticed, nothing else runs, and tracked data keeps its hash."""

import hashlib
import json
import zipfile

import h5py
import pytest

from conftest import NO_NETWORK, SHAPES, Project, copy_project, draw_shape
from internet import Internet, send

PICTURES = "pictures/shapes"


@pytest.fixture
def project(shapes, tmp_path) -> Project:
    """A copy of the project on a folder of pictures, which git does not know, after its first run."""
    project = copy_project(shapes, tmp_path / "project")
    with (project.root / ".git/info/exclude").open("a") as file:
        file.write(f"/{PICTURES}/\n")
    return project


def draw(project, kind, number):
    path = project.root / PICTURES / kind / f"{number}.png"
    draw_shape(kind, number).save(path)


def repro(project, target, **environment) -> list[str]:
    """Runs the pipeline up to `target` and returns the stages that ran."""
    done = project.dvc("repro", target, **(NO_NETWORK | environment))
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage '")]


def download_facts(project) -> dict:
    return json.loads((project.root / "reports/download.json").read_text())


def manifest(project) -> str:
    return (project.root / "data/manifest.csv").read_text()


def test_change_behind_a_path_is_noticed_and_only_then_the_data_is_brought_again(project):
    assert repro(project, "split") == ["source"]
    draw(project, "disc", 99)
    assert repro(project, "split") == ["source", "download", "split"]
    assert "disc/99.png" in manifest(project)
    # The same bytes at another time: brought again, found equal, and nothing after it runs.
    draw(project, "disc", 99)
    assert repro(project, "split") == ["source", "download"]


def test_lists_of_images_are_noticed(project):
    project.set_params({"split.exclude": "leave-out.csv"})
    (project.root / "leave-out.csv").write_text("path\ndisc/3.png\n")
    repro(project, "split")
    assert "disc/3.png" not in manifest(project)
    assert "disc/3.png,disc,excluded," in (project.root / "reports/rejected.csv").read_text()
    (project.root / "leave-out.csv").write_text("path\ndisc/4.png\n")
    assert repro(project, "split") == ["source", "split"]
    assert "disc/3.png" in manifest(project) and "disc/4.png" not in manifest(project)
    (project.root / "leave-out.csv").unlink()
    failed = project.dvc("repro", "split", **NO_NETWORK)
    assert failed.returncode != 0
    assert "split.exclude = 'leave-out.csv' cannot be read" in failed.stderr and "Traceback" not in failed.stderr


def test_weights_replaced_at_their_path_are_noticed_and_never_mixed(project):
    own = project.root / "own.weights.h5"
    own.write_bytes((project.root / "pretrained/mobilenetv2_imagenet_notop_fp16.weights.h5").read_bytes())
    project.set_params({"weights": "own.weights.h5"})
    assert repro(project, "embed") == ["source", "embed"]

    with h5py.File(own, "r+") as file:
        kernels = file["layers/conv2d/vars/0"]
        kernels[...] = kernels[...] * 2
    failed = project.run("python", "stages/train.py", PYTHONPATH="src")
    assert failed.returncode == 2
    assert "the backbone's weights changed since its features were made (SHA-256 " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert repro(project, "embed") == ["source", "embed"]
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    assert json.loads((project.root / "data/features/features.json").read_text())["weights_sha256"] == digest


def test_data_tracked_by_dvc_keeps_its_hash_and_an_unrecorded_change_is_told(project):
    assert project.dvc("add", PICTURES).returncode == 0
    assert repro(project, "split") == ["source", "download"]
    recorded = (project.root / f"{PICTURES}.dvc").read_text()
    facts = download_facts(project)["origin"]
    assert facts["dvc_file"] == f"{PICTURES}.dvc" and facts["dvc_hash"].endswith(".dir")
    assert f"md5: {facts['dvc_hash']}" in recorded
    assert facts["dvc_hash"] in str(project.store().last_child("download").data.params)

    draw(project, "disc", 99)
    failed = project.dvc("repro", "split", **NO_NETWORK)
    assert failed.returncode != 0 and f"is not what {PICTURES}.dvc records" in failed.stderr
    assert project.dvc("add", PICTURES).returncode == 0
    assert repro(project, "split") == ["source", "download", "split"]
    assert download_facts(project)["origin"]["dvc_hash"] != facts["dvc_hash"]


def test_data_from_import_url_keeps_its_hash(project, tmp_path):
    elsewhere = tmp_path / "elsewhere.zip"
    with zipfile.ZipFile(elsewhere, "w") as archive:
        for path in (project.root / "pictures").rglob("*.png"):
            archive.write(path, path.relative_to(project.root))
    imported = project.dvc("import-url", str(elsewhere), "imported.zip")
    assert imported.returncode == 0, imported.stderr
    project.set_params({"dataset": "imported.zip"})
    assert repro(project, "download") == ["source", "download"]
    facts = download_facts(project)["origin"]
    assert f"md5: {facts['dvc_hash']}" in (project.root / "imported.zip.dvc").read_text()


def test_change_behind_an_address_is_noticed(project):
    shown = {"disc", "stripes"}

    def site(request):
        path = project.root / "served.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((project.root / PICTURES).rglob("*.png")):
                if file.parent.name in shown:
                    archive.writestr(zipfile.ZipInfo(f"{file.parent.name}/{file.name}"), file.read_bytes())
        return send(request, path.read_bytes())

    def brought():
        with zipfile.ZipFile(project.root / "data/raw.zip") as archive:
            return {name.split("/")[0] for name in archive.namelist()}

    with Internet({"data.example.org": site}) as internet:
        # DVC itself asks for nothing; the stages do.
        project.set_params({"dataset": "https://data.example.org/pictures.zip"})
        assert repro(project, "download", **internet.environment) == ["source", "download"]
        assert brought() == shown
        assert repro(project, "download", **internet.environment) == ["source"]
        shown.add("square")
        assert repro(project, "download", **internet.environment) == ["source", "download"]
        assert brought() == set(SHAPES)
        asked = [request.method for request in internet.requests]
        assert asked.count("GET") == 2, "the data was brought twice, and otherwise only looked at"
    # Without the server: the data is there, and that it could not be asked is said.
    done = project.dvc("repro", "download", **NO_NETWORK)
    assert done.returncode == 0 and "cannot be asked whether it changed" in done.stderr
    assert "Running stage 'download'" not in done.stdout


def test_experiment_in_a_copy_sees_the_users_folder(project):
    project.commit()
    assert not project.git("ls-files", PICTURES)
    folds = [word for change in ("method=folds", "folds=4", "fold=1") for word in ("-S", f"split.{change}")]
    done = project.dvc("exp", "run", "--temp", "--name", "other", *folds, "split", **NO_NETWORK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'split'" in done.stdout and "Running stage 'download'" not in done.stdout
