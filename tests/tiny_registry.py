"""A project whose stages take no time: for tests of the model registry with real git, DVC, GTO and MLflow."""

import json
import os
import shutil

from conftest import REPOSITORY, Project, copy_project

# What the numbers come from are parameters that exist: the leaks are split.fold, the mistakes train.epochs, the
# calibration error train.dropout.
WORK = """
import json, sys, zipfile
from pathlib import Path
from ruamel.yaml import YAML

params = YAML(typ="safe").load(Path("params.yaml"))
stage, out = sys.argv[1], Path(sys.argv[2])
out.parent.mkdir(exist_ok=True)
if stage == "download":
    out.write_text(params["dataset"])
if stage == "split":
    out.write_text(json.dumps({"leaks": params["split"]["fold"]}))
if stage == "train":
    about = {"class_names": ["cat", "dog"], "image_size": 32, "resize": "stretch", "jpeg_quality": 95}
    about |= {"backbone": params["backbone"], "weights": "random", "pooling": "avg"}
    with zipfile.ZipFile(out, "w") as model:
        model.writestr(zipfile.ZipInfo("catdog.json"), json.dumps(about))
        model.writestr(zipfile.ZipInfo("weights"), json.dumps(params["train"]))
if stage == "evaluate":
    names, mistakes = ("cat", "dog"), params["train"]["epochs"]
    rows = ["path,label,predicted,correct,confidence,p_cat,p_dog"]
    for number in range(40):
        label, right = number % 2, number >= mistakes
        shown = label if right else 1 - label
        p_dog = 0.9 if shown else 0.1
        rows.append(f"{number}.jpg,{names[label]},{names[shown]},{right},0.9,{1 - p_dog:.1f},{p_dog}")
    out.write_text("\\n".join(rows) + "\\n")
    metrics = {"accuracy": 1 - mistakes / 40, "ece": params["train"]["dropout"], "test_images": 40}
    Path("reports/metrics.json").write_text(json.dumps(metrics) + "\\n")
"""

PIPELINE = """
stages:
  source:
    cmd: mkdir -p reports && echo here > reports/source.json
    always_changed: true
    outs:
      - reports/source.json:
          persist: true
  download:
    cmd: python work.py download data/raw.zip
    deps: [reports/source.json, work.py]
    params: [dataset]
    outs: [data/raw.zip]
  split:
    cmd: python work.py split reports/data.json
    deps: [data/raw.zip, work.py]
    params: [split]
    outs: [reports/data.json]
  embed:
    cmd: mkdir -p data/features && cp data/raw.zip data/features/0 && echo one > data/features/1
    deps: [data/raw.zip]
    params: [backbone]
    outs: [data/features]
  train:
    cmd: python work.py train models/model.keras
    deps: [data/features, reports/data.json, work.py]
    params: [train]
    outs: [models/model.keras]
  evaluate:
    cmd: python work.py evaluate reports/predictions.csv
    deps: [models/model.keras, data/features/1, work.py]
    params: [train.epochs]
    outs: [reports/predictions.csv]
    metrics:
      - reports/metrics.json:
          cache: false
  track:
    cmd: echo tracked
    deps: [notes.txt]
artifacts:
  cats-vs-dogs:
    path: models/model.keras
    type: model
"""
BASE = {"split.fold": 0, "train.epochs": 4, "train.dropout": 0.05}
EXPERIMENTS = {
    "better": {"train.epochs": 2},
    "worse": {"train.epochs": 30},
    "vgg": {"backbone": "vgg16", "train.epochs": 3},
}


def build(root, home) -> Project:
    """Makes the project: a run that is committed, three experiments, and an empty tracking store."""
    home.mkdir(parents=True, exist_ok=True)
    (home / ".gitconfig").write_text("[user]\n\tname = Ann\n\temail = ann@example.org\n")
    root.mkdir()
    project = Project(root, home, warm=True)
    shutil.copy(REPOSITORY / "params.yaml", root)
    (root / "work.py").write_text(WORK)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "notes.txt").write_text("what track depends on\n")
    (root / ".gitignore").write_text("/data\n/models\n/reports/*\n!/reports/metrics.json\n/mlflow.db*\n/mlruns\n")
    project.set_params(BASE)
    project.git("init", "--quiet", "--initial-branch=main")
    assert project.dvc("init", "--quiet").returncode == 0
    run(project, "repro", "--quiet")
    project.commit()
    for name, changes in EXPERIMENTS.items():
        experiment(project, name, changes)
    run(project, "checkout", "--quiet")
    return project


def experiment(project, name, changes):
    """Runs an experiment of DVC, and leaves the files in git as they were."""
    overrides = [text for key, value in changes.items() for text in ("-S", f"{key}={value}")]
    run(project, "exp", "run", "--quiet", "--name", name, *overrides)
    project.git("checkout", "--quiet", ".")


def run(project, *arguments):
    """Runs DVC, which must succeed."""
    done = project.dvc(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def enter(project, monkeypatch):
    """Lets what runs in this process see the project as a user in it does."""
    # MLflow sets it itself, which must not outlast the test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    environment = project.environment()
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project.root)
    return project


def copy(project, root, monkeypatch) -> Project:
    """Copies the project with its store, and enters the copy."""
    return enter(copy_project(project, root), monkeypatch)


def metrics_of(project, revision) -> dict:
    """The metrics that a commit holds."""
    return json.loads(project.git("show", f"{revision}:reports/metrics.json"))
