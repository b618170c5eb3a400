"""The example notebook, run for real in a finished project: it shows what is there and changes nothing."""

import base64
import csv
import io
import json
from collections import Counter

import nbformat
import numpy as np
import pytest
from PIL import Image

import warm
from conftest import NO_NETWORK, REPOSITORY, copy_project

NOTEBOOK = "examples/notebook.ipynb"
# In a process of its own, whose HOME and kernel are not the user's. The kernel is a fresh one: it chooses how
# Matplotlib shows pictures before that is imported. The last cell tells what the notebook found.
EXECUTE = """
import os, sys
os.environ.pop(sys.argv.pop(1), None)
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read("examples/notebook.ipynb", 4)
cells = notebook.cells[: int(sys.argv[2])] if len(sys.argv) > 2 else notebook.cells
notebook.cells = cells + [nbformat.v4.new_code_cell(sys.stdin.read())]
place = {"metadata": {"path": sys.argv[1]}}
NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
print(nbformat.writes(notebook))
"""
FOUND = """
import json
print(json.dumps({
    "images": images.to_dict(),
    "history": history.to_dict("list"),
    "kept": int(kept["epoch"]),
    "epochs": settings.epochs,
    "head": [layer.name for layer in head.layers],
    "predictions": predictions.to_dict("list"),
    "runs": runs.to_dict("list"),
}))
"""


def execute(project, folder, last_cell, *cells):
    """Runs the notebook, or its first cells, with one more at its end, as if opened in a folder of the project."""
    process = project.start(
        *("python", "-c", EXECUTE, warm.ADDRESS, folder, *cells),
        PYTHONPATH=str(project.root / "src"),
        **NO_NETWORK,
        stdin=-1,
    )
    stdout, stderr = process.communicate(last_cell, timeout=600)
    assert process.returncode == 0, stderr
    return nbformat.reads(stdout, 4)


def printed(cell):
    """What a cell wrote to standard output."""
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


def pictures(notebook):
    """The pictures that a notebook shows, uint8 [height, width, 3] each."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in shown]


def stamps(project):
    """When each file that the pipeline made was written, and its size."""
    files = [path for folder in ("data", "models", "reports") for path in (project.root / folder).rglob("*")]
    return {
        path.relative_to(project.root): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in files
        if path.is_file()
    }


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory):
    return copy_project(finished, tmp_path_factory.mktemp("notebook") / "project")


@pytest.fixture(scope="module")
def before(project):
    """The project's files, and how many runs its store has, before anything is executed."""
    return stamps(project), len(project.store().runs())


@pytest.fixture(scope="module")
def executed(project, before):
    """The notebook after its run from its own folder."""
    return execute(project, "examples", FOUND)


@pytest.fixture(scope="module")
def found(executed):
    return json.loads(printed(executed.cells[-1]))


@pytest.fixture(scope="module")
def manifest(project):
    with (project.root / "data/manifest.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(REPOSITORY / NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_uses_only_what_the_library_gives_to_everyone():
    source = "\n".join(cell.source for cell in nbformat.read(REPOSITORY / NOTEBOOK, 4).cells)
    imports = [line for line in source.splitlines() if line.startswith("from catdog")]
    assert len(imports) > 10
    assert not [line for line in imports if " _" in line or "._" in line]


def test_it_counts_the_images_of_the_manifest(found, manifest):
    counts = Counter((row["label"], row["split"]) for row in manifest)
    told = {
        (label, split): count
        for split, column in found["images"].items()
        for label, count in column.items()
        if "All" not in (label, split)
    }
    assert told == counts
    assert found["images"]["All"]["All"] == len(manifest)


def test_it_trains_a_head_that_learns(found):
    history = found["history"]
    assert 2 <= len(history["epoch"]) <= found["epochs"]
    assert "hidden_1" in found["head"]
    assert history["train_accuracy"][-1] > 0.9
    assert found["kept"] == 1 + int(np.argmin(history["val_loss"]))


def test_its_predictions_are_those_of_the_head_for_the_validation_images(found, manifest):
    predictions = found["predictions"]
    validation = {row["path"]: row["label"] for row in manifest if row["split"] == "val"}
    assert dict(zip(predictions["path"], predictions["label"], strict=True)) == validation
    correct = [a == b for a, b in zip(predictions["label"], predictions["predicted"], strict=True)]
    assert np.mean(correct) == pytest.approx(found["history"]["val_accuracy"][found["kept"] - 1])
    assert correct == [p >= 0.5 for p in predictions["p_label"]]
    assert predictions["p_label"] == sorted(predictions["p_label"])


def test_it_finds_the_run_with_its_numbers(found, project):
    (parent,) = project.store().parents()
    report = json.loads((project.root / "reports/metrics.json").read_text())
    trained = json.loads((project.root / "reports/train.json").read_text())
    runs = found["runs"]
    assert (runs["run"], runs["backbone"]) == ([parent.info.run_name], ["mobilenetv2"])
    for column, value in {
        "accuracy": report["accuracy"],
        "low": report["accuracy_low"],
        "high": report["accuracy_high"],
        "log loss": report["log_loss"],
        "validation loss": trained["best_val_loss"],
    }.items():
        assert runs[column] == [value]
    assert runs["images/s"][0] > 0


def test_it_shows_pictures_curves_mistakes_and_runs(executed):
    shown = pictures(executed)
    assert len(shown) == 4
    for picture in shown:
        assert min(picture.shape[:2]) > 100
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    data, _, mistakes, _ = shown
    # Photographs fill the place: far more colours than a drawing of lines has.
    assert min(len(np.unique(picture.reshape(-1, 3), axis=0)) for picture in (data, mistakes)) > 5000


def test_it_writes_nothing_to_standard_error(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []


def test_it_leaves_the_project_as_it_was(executed, project, before):
    assert project.git("status", "--porcelain") == ""
    assert (stamps(project), len(project.store().runs())) == before


def test_it_runs_from_the_root_too(project):
    executed = execute(project, ".", "print(os.getcwd(), len(manifest))", "4")
    assert printed(executed.cells[-1]).split() == [str(project.root), "100"]
