"""Data from outside, through real DVC: a change is noticed, nothing else runs, and tracked data keeps its hash."""

import json
import zipfile

import pytest

from conftest import NO_NETWORK, Project, draw_shape, new_project
from internet import Internet, send


@pytest.fixture
def project(tmp_path) -> Project:
    """A project on a folder of pictures, before its first run."""
    project = new_project(tmp_path / "project", tmp_path / "home", {"dataset": "pictures"})
    for kind in ("disc", "stripes"):
        for number in range(16):
            draw(project, f"pictures/{kind}/{number}.png", kind, number)
    return project


def draw(project, name, kind, number):
    path = project.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_shape(kind, number).save(path)


def split(project, **environment) -> list[str]:
    """Runs the pipeline up to `split` and returns the stages that ran."""
    done = project.dvc("repro", "split", **(NO_NETWORK | environment))
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage '")]


def download_facts(project) -> dict:
    return json.loads((project.root / "reports/download.json").read_text())


def manifest(project) -> str:
    return (project.root / "data/manifest.csv").read_text()


def test_change_behind_a_path_is_noticed_and_only_then_the_data_is_brought_again(project):
    assert split(project) == ["source", "download", "split"]
    assert split(project) == ["source"]
    draw(project, "pictures/disc/99.png", "disc", 99)
    assert split(project) == ["source", "download", "split"]
    assert "disc/99.png" in manifest(project)
    # The same bytes at another time: brought again, found equal, and nothing after it runs.
    draw(project, "pictures/disc/99.png", "disc", 99)
    assert split(project) == ["source", "download"]


def test_lists_of_images_are_noticed(project):
    project.set_params({"split.exclude": "leave-out.csv"})
    (project.root / "leave-out.csv").write_text("path\ndisc/3.png\n")
    split(project)
    assert "disc/3.png" not in manifest(project)
    assert "disc/3.png,disc,excluded," in (project.root / "reports/rejected.csv").read_text()
    (project.root / "leave-out.csv").write_text("path\ndisc/4.png\n")
    assert split(project) == ["source", "split"]
    assert "disc/3.png" in manifest(project) and "disc/4.png" not in manifest(project)
    (project.root / "leave-out.csv").unlink()
    failed = project.dvc("repro", "split", **NO_NETWORK)
    assert failed.returncode != 0
    assert "split.exclude = 'leave-out.csv' cannot be read" in failed.stderr and "Traceback" not in failed.stderr


def test_data_tracked_by_dvc_keeps_its_hash_and_an_unrecorded_change_is_told(project):
    assert project.dvc("add", "pictures").returncode == 0
    split(project)
    recorded = (project.root / "pictures.dvc").read_text()
    facts = download_facts(project)["origin"]
    assert facts["dvc_file"] == "pictures.dvc" and facts["dvc_hash"].endswith(".dir")
    assert f"md5: {facts['dvc_hash']}" in recorded
    assert facts["dvc_hash"] in str(project.store().last_child("download").data.params)

    draw(project, "pictures/disc/99.png", "disc", 99)
    failed = project.dvc("repro", "split", **NO_NETWORK)
    assert failed.returncode != 0 and "is not what pictures.dvc records" in failed.stderr
    assert project.dvc("add", "pictures").returncode == 0
    assert split(project) == ["source", "download", "split"]
    assert download_facts(project)["origin"]["dvc_hash"] != facts["dvc_hash"]


def test_data_from_import_url_keeps_its_hash(project, tmp_path):
    elsewhere = tmp_path / "elsewhere.zip"
    with zipfile.ZipFile(elsewhere, "w") as archive:
        for path in (project.root / "pictures").rglob("*.png"):
            archive.write(path, path.relative_to(project.root))
    imported = project.dvc("import-url", str(elsewhere), "imported.zip")
    assert imported.returncode == 0, imported.stderr
    project.set_params({"dataset": "imported.zip"})
    done = project.dvc("repro", "download", **NO_NETWORK)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = download_facts(project)["origin"]
    assert f"md5: {facts['dvc_hash']}" in (project.root / "imported.zip.dvc").read_text()


def test_change_behind_an_address_is_noticed(project):
    state = {"kinds": ("disc", "stripes")}

    def site(request):
        path = project.root / "served.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((project.root / "pictures").rglob("*.png")):
                if file.parent.name in state["kinds"]:
                    archive.writestr(zipfile.ZipInfo(f"{file.parent.name}/{file.name}"), file.read_bytes())
        return send(request, path.read_bytes())

    with Internet({"data.example.org": site}) as internet:
        # DVC itself asks for nothing; the stages do.
        project.set_params({"dataset": "https://data.example.org/pictures.zip"})
        assert split(project, **internet.environment) == ["source", "download", "split"]
        assert split(project, **internet.environment) == ["source"]
        for number in range(16):
            draw(project, f"pictures/square/{number}.png", "square", number)
        state["kinds"] = ("disc", "square")
        assert split(project, **internet.environment) == ["source", "download", "split"]
        assert "square" in manifest(project)
        asked = [request.method for request in internet.requests]
        assert asked.count("GET") == 2, "the data was brought twice, and otherwise only looked at"
    # Without the server: the data is there, and that it could not be asked is said.
    done = project.dvc("repro", "split", **NO_NETWORK)
    assert done.returncode == 0 and "cannot be asked whether it changed" in done.stderr
    assert "Running stage 'download'" not in done.stdout


def test_experiment_in_a_copy_sees_the_users_folder(project):
    project.set_params({"split.method": "folds", "split.folds": 4})
    project.commit()
    split(project)
    project.commit()
    done = project.dvc("exp", "run", "--temp", "--name", "other", "-S", "split.fold=1", "split", **NO_NETWORK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'split'" in done.stdout and "Running stage 'download'" not in done.stdout
