"""From an experiment to a registered model and back, with real git, DVC, GTO and MLflow."""

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import filelock
import pytest
from gto import api
from mlflow import MlflowClient
from ruamel.yaml import YAML

import tiny_registry
from catdog import cli, doctor, registry, registry_files
from catdog.errors import CatdogError
from catdog.registry import run_promote, run_rollback
from catdog.registry_files import cached_model, resolve_model, run_fetch
from catdog.registry_list import run_models
from catdog.registry_mirror import differences, read_mirror
from catdog.registry_source import choose_version
from catdog.registry_tags import Registry, Version, next_version, read_registry
from catdog.tracking import dvc_hash, stage_hashes
from conftest import REPOSITORY, Project, wait_until

NAME = "cats-vs-dogs"


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Project:
    """The project of `tiny_registry` with an empty store; tests change copies."""
    folder = tmp_path_factory.mktemp("registry")
    project = tiny_registry.build(folder / "project", folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        tiny_registry.enter(project, patch)
        registry.connect(project.root)
    return project


@pytest.fixture
def project(built, tmp_path, monkeypatch) -> Project:
    """A copy whose runs of `train` left a model in the store, and which this process sees as its user does."""
    return _copy(built, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def first_promoted(built, tmp_path_factory) -> Project:
    """The project after its first promotion; tests change copies."""
    with pytest.MonkeyPatch.context() as patch:
        project = _copy(built, tmp_path_factory.mktemp("promoted"), patch)
        run_promote(project.root, None)
    return project


@pytest.fixture
def promoted(first_promoted, tmp_path, monkeypatch) -> Project:
    """A copy of the project after its first promotion."""
    return _copy(first_promoted, tmp_path, monkeypatch)


def _copy(source, folder, monkeypatch) -> Project:
    copied = tiny_registry.copy(source, folder / "project", monkeypatch)
    monkeypatch.setattr(registry, "mirror_version", _cheap(registry.mirror_version))
    return copied


def _cheap(mirror_version):
    """Lets the store know a run of `train` that logged a model, so that none has to be logged from the file.

    MLflow takes seconds to log one; `test_model_that_no_run_logged_is_logged_from_the_file` does without this.
    """

    def with_run(client, registry, name, *, train_hash, **options):
        experiment = client.get_experiment_by_name("catdog").experiment_id
        if not client.search_runs([experiment], f"tags.`pipeline.stage_hash` = '{train_hash}'"):
            tags = {"pipeline.stage": "train", "pipeline.stage_hash": train_hash}
            run = client.create_run(experiment, tags=tags)
            model = client.create_logged_model(experiment, "model", source_run_id=run.info.run_id)
            client.log_outputs(run.info.run_id, [_output(model.model_id)])
            client.finalize_logged_model(model.model_id, "READY")
        return mirror_version(client, registry, name, train_hash=train_hash, **options)

    return with_run


def _output(model_id):
    from mlflow.entities import LoggedModelOutput

    return LoggedModelOutput(model_id, 0)


def tags(project) -> list[str]:
    return project.git("tag", "--list").split()


def state(project) -> Registry:
    return read_registry(project.root, NAME)


def served(project, stage="prod") -> str | None:
    version = state(project).serving(stage)
    return version.name if version else None


def mirror(project):
    """What the registry of the project's own store says, whichever store this process opened last."""
    uri = f"sqlite:///{project.root / 'mlflow.db'}"
    return read_mirror(MlflowClient(uri, registry_uri=uri), NAME)


def mlflow_says(project) -> dict[str, str]:
    """Which version each alias names."""
    return {alias: name for name, entry in mirror(project).items() for alias in entry.aliases}


def everything(project) -> tuple:
    """What a promotion may change."""
    files = {path.name: path.read_bytes() for path in (project.root / "models").iterdir()}
    status, runs = project.git("status", "--porcelain"), len(project.store().runs())
    return project.git("for-each-ref"), status, files, mirror(project), runs


def in_order(project) -> bool:
    """Whether there is no version that nothing was ever assigned to, and git and MLflow agree."""
    now = state(project)
    assigned = {entry.version for entry in now.assignments}
    return all(version.name in assigned for version in now.versions) and not differences(now, mirror(project))


def model_hash(project, revision) -> str:
    lock = YAML(typ="safe").load(project.git("show", f"{revision}:dvc.lock"))
    return lock["stages"]["train"]["outs"][0]["md5"]


# ------------------------------------------------------------------------------------------------------ the whole story


def test_story_of_two_candidates(project, capsys):
    root = project.root
    assert cli.main(["promote"]) == 0
    assert tags(project) == ["cats-vs-dogs#prod#1", "cats-vs-dogs@v1.0.0"]
    assert mlflow_says(project) == {"champion": "v1.0.0"}

    # Another backbone is a minor step, other parameters are a patch; the experiment becomes a commit.
    head = project.git("rev-parse", "HEAD")
    assert cli.main(["promote", "vgg", "--stage", "prod"]) == 0
    assert project.git("rev-parse", "HEAD~1") == head and project.git("status", "--porcelain") == ""
    assert tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.925
    assert dvc_hash(root / "models/model.keras") == model_hash(project, "HEAD"), "the workspace holds the model"
    assert project.dvc("status").stdout.split() == ["source:", "always", "changed"]
    assert served(project) == "v1.1.0"
    assert mlflow_says(project) == {"champion": "v1.1.0", "previous": "v1.0.0"}

    # The other one started from the same commit; its results take the place of the first one's.
    assert cli.main(["promote", "better"]) == 0
    assert served(project) == "v1.2.0", "back to the other backbone is a minor step as well"
    assert tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.95
    assert project.git("status", "--porcelain") == ""
    assert mlflow_says(project) == {"champion": "v1.2.0", "previous": "v1.1.0"}

    # Something is wrong.
    assert cli.main(["rollback"]) == 0
    assert served(project) == "v1.1.0"
    assert mlflow_says(project) == {"champion": "v1.1.0", "previous": "v1.2.0"}
    assert cli.main(["rollback"]) == 0
    assert served(project) == "v1.0.0", "the second one goes further back, not to what was rolled back from"
    capsys.readouterr()
    assert cli.main(["rollback"]) == 2
    assert "prod served nothing before v1.0.0; there is nothing to roll back to" in capsys.readouterr().err
    assert cli.main(["rollback", "--to", "v1.2.0"]) == 0
    assert served(project) == "v1.2.0"
    capsys.readouterr()
    assert cli.main(["models"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[:3] for line in told.splitlines()[2:5]] == [
        ["v1.2.0", "prod", "0.9500"],
        ["v1.1.0", "-", "0.9250"],
        ["v1.0.0", "-", "0.9000"],
    ]
    assert told.splitlines()[2].endswith("Ann  3 (champion)")
    assert told.splitlines()[-1] == "git's tags and MLflow's registry agree"

    # Others see the same.
    assert api.show(str(root))[NAME]["stage"] == {"prod": "v1.2.0"}
    shown = project.run("gto", "show", NAME, "--json").stdout
    assert [(e["version"], [s["stage"] for s in e["stages"]]) for e in json.loads(shown)] == [
        ("v1.2.0", ["prod"]),
        ("v1.1.0", []),
        ("v1.0.0", []),
    ]
    history = json.loads(project.run("gto", "history", NAME, "--json", "--ascending").stdout)
    assignments = [event["version"] for event in history if event["event"] == "assignment"]
    assert assignments == ["v1.0.0", "v1.1.0", "v1.2.0", "v1.1.0", "v1.0.0", "v1.2.0"]
    got = project.dvc("artifacts", "get", str(root), NAME, "--stage", "prod", "-o", "got.keras")
    assert got.returncode == 0, got.stderr
    assert cli.main(["fetch", "-o", "fetched.keras"]) == 0
    for file in ("got.keras", "fetched.keras"):
        assert dvc_hash(root / file) == model_hash(project, f"{NAME}@v1.2.0")


def test_tag_and_mlflow_keep_who_what_and_why(promoted):
    project = promoted
    run_promote(project.root, "worse", force="the test pictures\nare of the old camera")
    now = state(project)
    version = now.versions[0]
    assert (version.name, version.author) == ("v1.0.1", "Ann")
    forced = "the test pictures are of the old camera (failed: accuracy, incumbent)"
    for text in (version.message, now.assignments[-1].message):
        assert f"Forced: {forced}" in text
        assert "FAIL accuracy: 0.25, at least 0.8 is asked" in text and "ok leaks: 0 between the splits" in text
    mirrored = mirror(project)["v1.0.1"]
    assert mirrored.tags["promote.forced"] == forced
    assert mirrored.tags["git.commit"] == project.git("rev-parse", "HEAD")
    assert mirrored.tags["dvc.md5"] == model_hash(project, "HEAD")
    assert "promote.forced" not in mirror(project)["v1.0.0"].tags


def test_dry_run_shows_everything_and_changes_nothing(promoted, capsys):
    project = promoted
    before = everything(project)
    capsys.readouterr()
    run_promote(project.root, "vgg", dry_run=True)
    told = capsys.readouterr().out
    assert everything(project) == before
    assert told.startswith(
        "vgg, to be cats-vs-dogs v1.1.0 (compared with v1.0.0: backbone vgg16 instead of mobilenetv2)\n"
    )
    for text in (
        "  ok    accuracy      0.925, at least 0.8 is asked",
        "the results of the experiment on the branch main",
        "prod serves v1.1.0 instead of v1.0.0",
        "tag gto.version=v1.1.0, alias champion",
    ):
        assert text in told
    with pytest.raises(CatdogError, match=r"worse is not promoted, 2 of 7 checks failed: accuracy: 0\.25, at least"):
        run_promote(project.root, "worse", dry_run=True)
    assert everything(project) == before


def test_refusal_names_every_failed_check_with_both_numbers_and_changes_nothing(promoted):
    project = promoted
    tiny_registry.experiment(project, "bad", {"train.epochs": 30, "train.dropout": 0.3, "split.fold": 2})
    before = everything(project)
    with pytest.raises(CatdogError) as refusal:
        run_promote(project.root, "bad")
    told = str(refusal.value)
    assert "bad is not promoted, 4 of 7 checks failed" in told
    for part in (
        "accuracy: 0.25, at least 0.8 is asked",
        "calibration: error 0.3, at most 0.1 is allowed",
        "leaks: 2 between the splits, 0 are allowed",
        "incumbent: accuracy 0.25, v1.0.0 has 0.9; bad is right on 0 pictures",
    ):
        assert part in told
    assert everything(project) == before


def test_branch_of_an_experiment_leaves_the_present_one_alone(project):
    head = project.git("rev-parse", "HEAD")
    run_promote(project.root, "better", branch="candidates/better")
    assert project.git("rev-parse", "HEAD") == head and project.git("status", "--porcelain") == ""
    experiment = project.git("for-each-ref", "--format=%(objectname)", "refs/exps/*/*/better")
    assert project.git("rev-parse", "candidates/better") == experiment == state(project).versions[0].commit
    with pytest.raises(CatdogError, match="the branch main exists; choose another name"):
        run_promote(project.root, "vgg", branch="main")
    with pytest.raises(CatdogError, match="HEAD is none"):
        run_promote(project.root, None, branch="other")


def test_experiment_whose_results_are_in_the_workspace_is_promoted_from_there(project):
    tiny_registry.run(project, "exp", "run", "--quiet", "--name", "fresh", "-S", "train.epochs=1")
    assert project.git("status", "--porcelain") != ""
    for other in (None, "better"):
        with pytest.raises(CatdogError, match="results of the experiment fresh, which `catdog promote fresh` promotes"):
            run_promote(project.root, other)
    run_promote(project.root, "fresh")
    assert project.git("status", "--porcelain") == "" and served(project) == "v1.0.0"
    assert tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.975
    assert dvc_hash(project.root / "models/model.keras") == model_hash(project, "HEAD")


def test_experiment_brings_no_gate_of_its_own(project):
    change = ("-S", "train.epochs=30", "-S", "promote.min_accuracy=0.0")
    tiny_registry.run(project, "exp", "run", "--quiet", "--name", "loose", *change)
    for _ in "in the workspace", "in git alone":
        with pytest.raises(CatdogError, match=r"loose is not promoted, 1 of 7 .*: accuracy: 0\.25, at least 0\.8"):
            run_promote(project.root, "loose")
        project.git("checkout", "--quiet", ".")
    assert tags(project) == []


def test_version_moves_from_stage_to_stage_without_a_new_one(project):
    run_promote(project.root, "better", stage="staging")
    assert mlflow_says(project) == {"staging": "v1.0.0"}
    run_promote(project.root, "v1.0.0")
    assert len(state(project).versions) == 1 and served(project, "staging") == served(project) == "v1.0.0"
    assert mlflow_says(project) == {"staging": "v1.0.0", "champion": "v1.0.0"}


def test_latency_comes_from_the_run_that_judged_the_model(project):
    client = project.store().client
    tags = {"pipeline.stage": "evaluate", "pipeline.stage_hash": stage_hashes(project.root / "dvc.lock")["evaluate"]}
    run = client.create_run(client.get_experiment_by_name("catdog").experiment_id, tags=tags)
    client.log_metric(run.info.run_id, "latency_ms", 40.0)
    project.set_params({"promote.max_latency_ms": 30.0})
    project.commit()
    with pytest.raises(CatdogError, match="latency: 40 ms, at most 30 ms is allowed"):
        run_promote(project.root, None)
    with pytest.raises(CatdogError, match="latency: not known to this tracking store, at most 30 ms is allowed"):
        run_promote(project.root, "better", dry_run=True)


# ------------------------------------------------------------------------------------------- what GTO alone lets pass


def edit(path):
    return lambda project: (project.root / path).write_text((project.root / path).read_text() + "\n# changed\n")


def forget_the_lock(project):
    project.git("rm", "--quiet", "--cached", "dvc.lock")
    (project.root / ".gitignore").write_text("dvc.lock\n" + (project.root / ".gitignore").read_text())


def committed(change):
    def change_and_commit(project):
        change(project)
        project.commit()

    return change_and_commit


def cached(project, digest) -> Path:
    """Where DVC's cache keeps an object."""
    return project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def lose(*paths):
    """Removes outputs from DVC's cache."""

    def change(project):
        hashes = project.out_hashes()
        for path in paths:
            cached(project, hashes[path]).unlink()

    return change


def other_hash(stage, path):
    """Lets dvc.lock say that a stage read something else than was written."""

    def change(project):
        lock = YAML(typ="safe").load(project.root / "dvc.lock")
        (dep,) = [dep for dep in lock["stages"][stage]["deps"] if dep["path"] == path]
        dep["md5"] = "0" * 32
        with (project.root / "dvc.lock").open("w") as file:
            YAML().dump(lock, file)

    return change


def change_metrics(project):
    (project.root / "reports/metrics.json").write_text('{"accuracy": 1.0, "ece": 0.0, "test_images": 40}\n')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("notes.txt"), r"notes\.txt differ from the last commit, .*; commit the changes"),
        (edit("dvc.lock"), r"dvc\.lock differ from the last commit, .*; commit the changes"),
        (committed(forget_the_lock), r"dvc\.lock is not in commit \w{7}; `git add dvc\.lock` and commit it"),
        (
            committed(lambda project: project.set_params({"train.learning_rate": 0.5})),
            r"reproducible: dvc\.lock differs in 1 place.*: train: params\.yaml changed \(train\)",
        ),
        (
            committed(edit("work.py")),
            r"reproducible: dvc\.lock differs in 4 places.*: download: work\.py changed; split: work\.py changed;",
        ),
        (
            committed(other_hash("evaluate", "models/model.keras")),
            r"dvc\.lock differs in 1 place, 0 are allowed: evaluate: models/model\.keras is another by now",
        ),
        (
            committed(other_hash("evaluate", "data/features/1")),
            r"dvc\.lock differs in 1 place, 0 are allowed: evaluate: data/features/1 is another by now",
        ),
        (committed(change_metrics), r"evaluate: reports/metrics\.json is not what the stage wrote"),
        (
            lose("models/model.keras"),
            r"models/model\.keras of commit \w{7} is neither in DVC's cache nor in a remote; `dvc repro`",
        ),
        (lose("models/model.keras", "reports/predictions.csv"), r"model\.keras and reports/predictions\.csv of commit"),
    ],
    ids=["tree", "lock", "no-lock", "params", "code", "upstream", "inside", "metrics", "model", "predictions"],
)
def test_state_that_cannot_be_made_again_is_refused(project, change, message):
    change(project)
    with pytest.raises(CatdogError, match=message):
        run_promote(project.root, None)
    assert tags(project) == []


def test_what_the_model_does_not_come_from_may_change(project):
    committed(edit("notes.txt"))(project)
    lose("data/features", "data/raw.zip")(project)
    run_promote(project.root, None)
    assert served(project) == "v1.0.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "dogs"}, r"dvc\.yaml has no artifact 'dogs'; under `artifacts:` stand: cats-vs-dogs"),
        ({"reference": "bettr"}, "there is no DVC experiment, git revision or version 'bettr'"),
        ({"reference": "exp:main"}, "there is no DVC experiment, git revision or version 'main'"),
        ({"force": "  "}, "--force needs a reason"),
        ({"stage": "champion"}, "--stage champion has another meaning"),
        ({"stage": "v2"}, "--stage 'v2' is no stage"),
        ({"stage": "pre prod"}, "--stage 'pre prod' is no stage"),
        ({"push": True}, "--push needs one git remote, but there are 0"),
    ],
    ids=["name", "reference", "kind", "force", "alias", "number", "space", "push"],
)
def test_mistake_is_told(project, options, message):
    options = dict(options)
    with pytest.raises(CatdogError, match=message):
        run_promote(project.root, options.pop("reference", None), **options)
    assert tags(project) == []


def test_commit_that_is_registered_already_is_refused(project):
    run_promote(project.root, "better")
    for reference in (None, "better", "v1.0.0"):
        with pytest.raises(CatdogError, match=r"v1\.0\.0 is registered already, on commit \w{7}, and serves prod"):
            run_promote(project.root, reference)
    assert len(tags(project)) == 2


def test_nobody_signs_without_a_name(project):
    (project.home / ".gitconfig").rename(project.home / "away")
    try:
        with pytest.raises(CatdogError, match="git does not know who you are"):
            run_promote(project.root, None)
    finally:
        (project.home / "away").rename(project.home / ".gitconfig")
    assert tags(project) == []


def test_experiment_whose_files_the_branch_changed_as_well_is_not_laid_over_them(project):
    (project.root / "notes.txt").write_text("of the experiment\n")
    tiny_registry.run(project, "exp", "run", "--quiet", "--name", "noted")
    project.git("checkout", "--quiet", ".")
    (project.root / "notes.txt").write_text("of the branch\n")
    project.commit()
    with pytest.raises(CatdogError, match=r"and the commits since \w{7} both changed notes\.txt; `--branch NAME`"):
        run_promote(project.root, "noted")
    # Nothing of what came since is lost with one that changed other files.
    run_promote(project.root, "better")
    assert project.git("show", "HEAD:notes.txt") == "of the branch"


def changed_lines(project, path) -> list[str]:
    """What the last commit wrote into a file, and what stood there before."""
    lines = project.git("show", "--format=", "--unified=0", "HEAD", "--", path).splitlines()
    return sorted(line for line in lines if line.startswith(("-", "+")) and not line.startswith(("---", "+++")))


def test_parameters_that_no_stage_reads_are_those_of_head(project):
    path = project.root / "params.yaml"
    path.write_text(re.sub("min_accuracy: 0.8 .*", "min_accuracy: 0.93  # raised", path.read_text()))
    project.commit()
    with pytest.raises(CatdogError, match=r"accuracy: 0\.925, at least 0\.93 is asked"):
        run_promote(project.root, "vgg")
    # Its commit has the comments of HEAD, too.
    run_promote(project.root, "better")
    assert [re.sub(" +#.*", "", line) for line in changed_lines(project, "params.yaml")] == [
        "+  epochs: 2",
        "-  epochs: 4",
    ]
    assert project.git("status", "--porcelain") == ""


def test_gate_of_an_experiment_comes_neither_into_the_commit_nor_into_the_workspace(project):
    change = ("-S", "train.epochs=3", "-S", "train.hidden_units=[8, 4]", "-S", "promote.min_accuracy=0.0")
    tiny_registry.run(project, "exp", "run", "--quiet", "--name", "loose", *change)
    run_promote(project.root, "loose")
    assert project.git("status", "--porcelain") == "" and tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.925
    assert [re.sub(" +#.*", "", line) for line in changed_lines(project, "params.yaml")] == [
        "+  - 4",
        "+  - 8",
        "+  epochs: 3",
        "+  hidden_units:",
        "-  epochs: 4",
        "-  hidden_units: []",
    ]


def test_parameters_that_the_branch_set_since_are_not_set_back(project):
    head = project.git("rev-parse", "--short=7", "HEAD")
    project.set_params({"train.learning_rate": 0.5, "train.l2": 0.1})
    project.commit()
    with pytest.raises(CatdogError) as refusal:
        run_promote(project.root, "better")
    assert str(refusal.value) == (
        f"the commits since {head} set train.learning_rate = 0.5, train.l2 = 0.1, where the experiment better has "
        "0.001, 0.0; run it again from HEAD, or `--branch NAME` makes a branch of it"
    )
    assert tags(project) == []
    # Who sets them back may have it.
    project.set_params({"train.learning_rate": 0.001, "train.l2": 0.0})
    project.commit()
    run_promote(project.root, "better")
    assert served(project) == "v1.0.0" and in_order(project)


def test_experiment_that_changed_nothing_takes_the_place_of_another_one(promoted):
    project = promoted
    tiny_registry.run(project, "exp", "run", "--quiet", "--name", "same", "--force")
    project.git("checkout", "--quiet", ".")
    run_promote(project.root, "better")
    run_promote(project.root, "same")
    assert served(project) == "v1.0.2" and tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.9
    assert model_hash(project, "HEAD") == model_hash(project, f"{NAME}@v1.0.0")


def test_experiment_on_code_that_changed_since_is_not_reproducible(project):
    committed(edit("work.py"))(project)
    with pytest.raises(CatdogError, match=r"reproducible: dvc\.lock differs in 4 places"):
        run_promote(project.root, "better")


def test_clock_that_is_behind_the_last_tag_is_told(promoted):
    project = promoted
    project.run("git", "tag", "-a", "-m", "later", f"{NAME}#prod#2", GIT_COMMITTER_DATE="2090-01-01T00:00:00Z")
    with pytest.raises(CatdogError, match=r"assigned to prod at 2090-01-01 00:00, which is in the future"):
        run_promote(project.root, "better")
    assert len(tags(project)) == 3


# ---------------------------------------------------------------------------------------------- nothing is half done


STEPS = ["push_outs", "register", "assign", "_adopt", "_mirror_version", "mirror_aliases"]


@pytest.mark.parametrize("step", STEPS)
def test_step_that_fails_leaves_no_half_and_a_second_call_completes(promoted, monkeypatch, step):
    project = promoted
    before = everything(project)
    module = api if step in ("register", "assign") else registry

    def fail(*arguments, **options):
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail)
        with pytest.raises(RuntimeError, match="out of order"):
            run_promote(project.root, "better")
    now = state(project)
    assert {version.name for version in now.versions} == {entry.version for entry in now.assignments}
    if step in ("push_outs", "register", "assign"):
        assert everything(project) == before
    run_promote(project.root, "better")
    assert served(project) == "v1.0.1" and in_order(project)
    assert tags(project) == [f"{NAME}#prod#1", f"{NAME}#prod#2", f"{NAME}@v1.0.0", f"{NAME}@v1.0.1"]
    assert tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.95
    assert project.git("status", "--porcelain") == ""


KILLED = """
import os
from pathlib import Path
from gto import api
from catdog.registry import run_promote
api.assign = lambda *arguments, **options: os._exit(9)
run_promote(Path.cwd(), "better")
"""


def test_promotion_that_is_killed_between_the_tags_is_completed_by_a_second_call(promoted):
    project = promoted
    killed = project.run("python", "-c", KILLED, PYTHONPATH=str(REPOSITORY / "src"))
    assert killed.returncode == 9, killed.stderr
    assert tags(project) == [f"{NAME}#prod#1", f"{NAME}@v1.0.0", f"{NAME}@v1.0.1"]
    run_promote(project.root, "better")
    assert served(project) == "v1.0.1" and in_order(project)
    assert len(tags(project)) == 4 and tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.95


def test_store_that_is_down_is_told_before_anything_is_done_unless_it_is_not_required(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(CatdogError, match=r"the tracking store http://127\.0\.0\.1:9 failed"):
        run_promote(project.root, None)
    assert tags(project) == []
    project.set_params({"tracking.required": False})
    project.commit()
    run_promote(project.root, None)
    assert served(project) == "v1.0.0" and "MLflow's registry is left as it was" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run_models(project.root)
    told = capsys.readouterr().out
    assert "v1.0.0 is not in MLflow" in told
    (command,) = re.findall("`catdog (.*)` brings MLflow in line", told)
    assert cli.main(shlex.split(command)) == 0
    assert in_order(project) and mlflow_says(project) == {"champion": "v1.0.0"}


def test_deleted_experiment_is_told_before_anything_is_done(project):
    client = project.store().client
    client.delete_experiment(client.get_experiment_by_name("catdog").experiment_id)
    with pytest.raises(CatdogError, match="the MLflow experiment catdog was deleted"):
        run_promote(project.root, None)
    assert tags(project) == []


def test_new_store_gets_every_version_that_can_be_had(promoted, monkeypatch, capsys):
    project = promoted
    for reference in ("vgg", "better"):
        run_promote(project.root, reference)
    empty = project.git("commit-tree", "-m", "without a model", project.git("hash-object", "-wt", "tree", "/dev/null"))
    done = project.run("gto", "register", NAME, empty, "--version", "v0.1.0")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///new.db")
    run_models(project.root)
    (command,) = re.findall("`catdog (.*)` brings MLflow in line", capsys.readouterr().out)
    assert cli.main(shlex.split(command)) == 0
    assert "catdog: v0.1.0 is not in MLflow: dvc.yaml is not in commit" in capsys.readouterr().err
    assert cli.main(["models"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[-2:] for line in told.splitlines()[2:5]] == [
        ["1", "(champion)"],
        ["2", "(previous)"],
        ["Ann", "3"],
    ]
    assert "v0.1.0 is not in MLflow\n" in told and told.count("is not in MLflow") == 1


def test_no_command_is_given_for_what_none_mends(promoted, capsys):
    project = promoted
    run_promote(project.root, "better")
    for tag in (f"{NAME}#prod#2", f"{NAME}@v1.0.1"):
        project.git("tag", "--delete", tag)
    run_models(project.root)
    told = capsys.readouterr().out
    (command,) = re.findall("`catdog (.*)` brings MLflow in line", told)
    assert "v1.0.1 is in MLflow only" in told and cli.main(shlex.split(command)) == 0
    capsys.readouterr()
    run_models(project.root)
    assert capsys.readouterr().out.splitlines()[-1] == "v1.0.1 is in MLflow only"


def test_model_that_no_run_logged_is_logged_from_the_file(built, tmp_path, monkeypatch):
    project = tiny_registry.copy(built, tmp_path / "project", monkeypatch)
    run_promote(project.root, "better")
    version = project.store().client.get_model_version_by_alias(NAME, "champion")
    logged = project.store().client.get_logged_model(version.source.removeprefix("models:/"))
    files = list(Path(logged.artifact_location.removeprefix("file://")).rglob("*.keras"))
    assert [dvc_hash(path) for path in files] == [model_hash(project, "HEAD")]


# ------------------------------------------------------------------------------------------------------- two at once


def clone(project, remote, tmp_path, monkeypatch, name) -> Project:
    """Another person's clone, with the same cache and the experiments."""
    other = tiny_registry.copy(project, tmp_path / name, monkeypatch)
    other.git("remote", "add", "origin", str(remote))
    other.git("config", "user.name", name)
    return other


@pytest.fixture
def bare(project, tmp_path) -> Path:
    """A shared repository."""
    remote = tmp_path / "shared.git"
    project.git("clone", "--quiet", "--bare", str(project.root), str(remote))
    return remote


def test_of_two_clones_that_promote_at_once_one_wins(project, bare, tmp_path, monkeypatch):
    ben, ann = (clone(project, bare, tmp_path, monkeypatch, name) for name in ("ben", "ann"))
    original = registry.push_tags

    def overtaken(root, *arguments):
        # Ben's promotion comes in between Ann's last look at the tags and her push.
        monkeypatch.setattr(registry, "push_tags", original)
        tiny_registry.enter(ben, monkeypatch)
        run_promote(ben.root, "vgg", stage="staging", push=True)
        tiny_registry.enter(ann, monkeypatch)
        original(root, *arguments)

    before = everything(ann)
    monkeypatch.setattr(registry, "push_tags", overtaken)
    with pytest.raises(CatdogError, match=r"origin did not take the tags .* look at `catdog models` and promote again"):
        run_promote(ann.root, "better", push=True)
    assert everything(ann) == before
    # Of her two tags only one clashed with his; the other is not there either.
    pushed = subprocess.run(["git", "tag"], cwd=bare, capture_output=True, text=True, check=True).stdout.split()
    assert pushed == tags(ben) == [f"{NAME}#staging#1", f"{NAME}@v1.0.0"]
    assert read_registry(bare, NAME).serving("staging").author == "ben"

    # She has another try, on top of his.
    run_promote(ann.root, "better", push=True)
    assert served(ann) == read_registry(bare, NAME).serving("prod").name == "v1.1.0"
    # He sees it, and changes it for both.
    tiny_registry.enter(ben, monkeypatch)
    run_promote(ben.root, "v1.0.0", push=True)
    assert served(ben) == read_registry(bare, NAME).serving("prod").name == "v1.0.0"
    run_rollback(ben.root, push=True)
    assert served(ben) == read_registry(bare, NAME).serving("prod").name == "v1.1.0"


def test_of_two_promotions_in_one_repository_one_wins(project, monkeypatch):
    started, told = threading.Event(), threading.Event()
    original = registry.push_outs

    def slow(*arguments):
        started.set()
        assert told.wait(600)
        return original(*arguments)

    monkeypatch.setattr(registry, "push_outs", slow)
    first = threading.Thread(target=run_promote, args=(project.root, "vgg"))
    first.start()
    try:
        wait_until(started.is_set)
        asked = ("-m", "catdog.cli", "promote", "better")
        second = project.run("python", *asked, PYTHONPATH=str(REPOSITORY / "src"))
    finally:
        told.set()
        first.join()
    assert second.returncode == 2
    assert "another promotion or rollback is under way in this repository" in second.stderr
    assert served(project) == "v1.0.0" and in_order(project)
    assert tiny_registry.metrics_of(project, "HEAD")["accuracy"] == 0.925


# ------------------------------------------------------------------------------------------------ remotes and fetching


def add_remote(project, address):
    project.dvc("remote", "add", "--default", "store", str(address))
    project.commit()


def without_cache(project, source, tmp_path) -> Project:
    """A fresh clone, of a folder or a bare repository: no cache, no files under DVC."""
    other = Project(tmp_path / "fresh", project.home, warm=True)
    project.git("clone", "--quiet", str(source), str(other.root))
    return other


def test_fetch_from_here_a_clone_without_cache_and_an_address(project, tmp_path, monkeypatch, capsys):
    add_remote(project, tmp_path / "remote")
    run_promote(project.root, None)
    run_promote(project.root, "better")
    wanted = {name: model_hash(project, f"{NAME}@{name}") for name in ("v1.0.0", "v1.0.1")}
    bare = tmp_path / "shared.git"
    project.git("clone", "--quiet", "--bare", str(project.root), str(bare))
    fresh = without_cache(project, bare, tmp_path)
    for root, repository in ((project.root, None), (fresh.root, None), (None, str(bare)), (None, f"file://{bare}")):
        monkeypatch.chdir(root or tmp_path)
        for reference, version in (("prod", "v1.0.1"), ("v1.0.0", "v1.0.0")):
            target = tmp_path / "out" / "model.keras"
            target.unlink(missing_ok=True)
            run_fetch(root, target, reference=reference, repository=repository, name=None)
            assert dvc_hash(target) == wanted[version]
            assert f"{NAME} {version}" in capsys.readouterr().out
    assert not (fresh.root / ".dvc/cache").exists()
    # The plain tools, from the same address.
    got = fresh.dvc("artifacts", "get", str(bare), NAME, "--rev", "v1.0.0", "-o", "got.keras")
    assert got.returncode == 0, got.stderr
    assert dvc_hash(fresh.root / "got.keras") == wanted["v1.0.0"]
    # And the model by a word, in the home folder.
    monkeypatch.chdir(fresh.root)
    file = resolve_model(fresh.root, "prod")
    assert file == fresh.home / f".cache/catdog/models/{wanted['v1.0.1']}.keras" and dvc_hash(file) == wanted["v1.0.1"]
    (tmp_path / "remote").rename(tmp_path / "gone")
    assert resolve_model(fresh.root, "v1.0.1") == file, "no remote is asked for what is there"


def test_fetch_of_what_is_not_there_is_told_and_leaves_the_old_file(promoted, tmp_path):
    project = promoted
    target = tmp_path / "model.keras"
    target.write_text("old")

    def fetch(reference="prod"):
        run_fetch(project.root, target, reference=reference, repository=None, name=None)

    with pytest.raises(CatdogError, match=r"cats-vs-dogs has no version v9\.0\.0; there are: v1\.0\.0"):
        fetch("v9.0.0")
    with pytest.raises(CatdogError, match="cats-vs-dogs has no stage dev; there are: prod"):
        fetch("dev")
    with pytest.raises(CatdogError, match="nowhere cannot be read as a DVC repository"):
        run_fetch(None, target, reference="prod", repository=str(tmp_path / "nowhere"), name=None)
    sound = shutil.copy(project.root / "models/model.keras", tmp_path / "sound")
    # A damaged object is not handed out.
    digest = model_hash(project, "HEAD")
    cached(project, digest).chmod(0o644)
    cached(project, digest).write_text("damaged")
    with pytest.raises(CatdogError, match="is neither in DVC's cache nor in a remote"):
        fetch()
    add_remote(project, tmp_path / "remote")
    there = tmp_path / "remote/files/md5" / digest[:2] / digest[2:]
    there.parent.mkdir(parents=True)
    there.write_text("damaged as well")
    with pytest.raises(CatdogError, match="came with another content than its md5"):
        fetch()
    assert target.read_text() == "old" and [path.name for path in tmp_path.glob("model.*")] == ["model.keras"]
    shutil.copy(sound, there)
    fetch()
    assert dvc_hash(target) == digest


def test_two_that_need_a_model_at_once_get_it_once(promoted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = registry.read_locked(registry._scm(promoted.root), "HEAD", NAME)
    original, begun, waiting = registry_files._get, [], threading.Event()
    found = []
    second = threading.Thread(target=lambda: found.append(cached_model(promoted.root, model)))

    class Watched(filelock.FileLock):
        def acquire(self, *arguments, **options):
            if begun:
                waiting.set()
            return super().acquire(*arguments, **options)

    def get(*arguments):
        begun.append(arguments)
        if len(begun) == 1:
            second.start()
            wait_until(lambda: waiting.is_set() or len(begun) == 2)
        original(*arguments)

    monkeypatch.setattr(filelock, "FileLock", Watched)
    monkeypatch.setattr(registry_files, "_get", get)
    found.append(cached_model(promoted.root, model))
    second.join()
    assert len(begun) == 1 and found[0] == found[1] and dvc_hash(found[0]) == model.md5


def test_model_that_is_damaged_in_the_home_folder_is_got_again(promoted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = resolve_model(promoted.root, "prod")
    sound = file.read_bytes()
    file.write_bytes(sound[:-1])
    assert resolve_model(promoted.root, "prod") == file and file.read_bytes() == sound
    assert [path.suffix for path in sorted(file.parent.iterdir())] == [".keras", ".lock"]


def test_home_folder_that_cannot_be_used_is_told(promoted, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.cache").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(
        CatdogError,
        match=r"cannot be brought to .*/\.cache/catdog/models \(.*: Not a directory\); mend that, or set HOME",
    ):
        resolve_model(promoted.root, "prod")


def test_remote_that_was_added_after_the_experiment_gets_its_files(project, tmp_path):
    add_remote(project, tmp_path / "remote")
    # The experiment's own commit knows of no remote; by --branch it is promoted as it is.
    run_promote(project.root, "better", branch="better")
    sent = {path.relative_to(tmp_path / "remote/files/md5").as_posix().replace("/", "") for path in _files(tmp_path)}
    lock = YAML(typ="safe").load(project.git("show", "better:dvc.lock"))["stages"]
    kept = {
        out["md5"] for entry in lock.values() for out in entry.get("outs", []) if out["path"][-12:] != "metrics.json"
    }
    assert kept <= sent and len(sent) == len(kept) + 1, "with the two equal files of the folder of features"
    fresh = without_cache(project, project.root, tmp_path)
    assert dvc_hash(resolve_model(fresh.root, "v1.0.0")) == model_hash(project, "better")


def _files(tmp_path):
    return [path for path in (tmp_path / "remote/files/md5").rglob("*") if path.is_file()]


def test_remote_that_fails_stops_before_the_tags(project, tmp_path):
    (tmp_path / "remote").write_text("this is no folder")
    add_remote(project, tmp_path / "remote")
    with pytest.raises(CatdogError, match="DVC's remote store failed"):
        run_promote(project.root, "better")
    assert tags(project) == []


def test_rollback_to_a_version_whose_file_is_lost_is_refused(promoted):
    project = promoted
    run_promote(project.root, "better")
    cached(project, model_hash(project, f"{NAME}@v1.0.0")).unlink()
    with pytest.raises(CatdogError, match=r"models/model\.keras of commit \w{7} is neither in DVC's cache nor in"):
        run_rollback(project.root)
    assert served(project) == "v1.0.1"


def test_registered_versions_outlive_what_doctor_says_of_a_full_disk(promoted, monkeypatch):
    project = promoted
    tiny_registry.experiment(project, "gone", {"train.epochs": 5})
    run_promote(project.root, "vgg", stage="staging", branch="topic")
    run_promote(project.root, "better")
    gone = model_hash(project, project.git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/gone"))
    assert cached(project, gone).exists()
    project.git("branch", "--delete", "--force", "topic")
    tiny_registry.run(project, "exp", "remove", "--quiet", "gone", "vgg", "better")
    usage = shutil.disk_usage(project.root)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        (finding,) = doctor.check_disk(project.root)
    (command,) = re.findall("`(dvc gc [^`]*)`", finding.text)
    tiny_registry.run(project, *shlex.split(command)[1:], "--force")
    assert not cached(project, gone).exists()
    for version in state(project).versions:
        assert cached(project, model_hash(project, f"{NAME}@{version.name}")).exists()
    assert len(state(project).versions) == 3 and (project.root / "models/model.keras").exists()


def test_s3_remote(project, tmp_path, monkeypatch):
    pytest.importorskip("dvc_s3", reason="DVC's client of S3 is not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="models")
        project.dvc("remote", "add", "--default", "store", "s3://models/dvc")
        project.dvc("remote", "modify", "store", "endpointurl", address)
        project.commit()
        run_promote(project.root, "better")
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="models")["Contents"]]
        digest = model_hash(project, "HEAD")
        assert f"dvc/files/md5/{digest[:2]}/{digest[2:]}" in keys
        fresh = without_cache(project, project.root, tmp_path)
        target = tmp_path / "model.keras"
        run_fetch(fresh.root, target, reference="prod", repository=None, name=None)
        assert dvc_hash(target) == digest
        client.delete_object(Bucket="models", Key=f"dvc/files/md5/{digest[:2]}/{digest[2:]}")
        with pytest.raises(CatdogError, match="neither in DVC's cache nor in a remote"):
            run_fetch(fresh.root, target, reference="prod", repository=None, name=None)
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------------- small decisions


@pytest.mark.parametrize(
    ("latest", "minor", "expected"),
    [
        (None, False, "v1.0.0"),
        (None, True, "v1.0.0"),
        ("v1.0.0", False, "v1.0.1"),
        ("v1.9.9", True, "v1.10.0"),
        ("v2.3.4-rc.1", False, "v2.3.5"),
    ],
)
def test_next_version(latest, minor, expected):
    assert next_version(latest, minor=minor) == expected


def test_another_data_set_is_a_minor_step(project):
    first = project.git("rev-parse", "HEAD")
    now = Registry(NAME, (Version("v1.0.0", first, "", None, "", ()),))
    assert choose_version(project.root, now, first)[0] == "v1.0.1"
    project.set_params({"dataset": "microsoft"})
    project.commit()
    version, why = choose_version(project.root, now, "HEAD")
    assert version == "v1.1.0" and "dataset microsoft instead of sample" in why


# ------------------------------------------------------------------------------------------------ what others can copy


def commands_of(path):
    """The shell commands of an example, a line each."""
    tree = YAML(typ="safe").load(path)
    jobs = tree.get("jobs", tree).values()
    for job in jobs:
        if isinstance(job, dict):
            steps = [step.get("run", "") for step in job.get("steps", [])] or [
                line for key in ("before_script", "script") for line in job.get(key, [])
            ]
            yield from (line.strip() for step in steps for line in step.splitlines() if line.strip())


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_every_command_of_the_examples_exists(name):
    path = REPOSITORY / "examples/ci" / name
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for line in commands_of(path):
        program, *arguments = shlex.split(line)
        seen.add(program)
        if program == "catdog":
            cli._parser().parse_args(arguments)
        elif program == "make":
            assert arguments[0] in targets
        elif program == "dvc":
            assert arguments[0] in ("pull", "push", "repro")
        else:
            assert program in ("echo", "export", "gh", "curl", "git"), line
    assert {"catdog", "make", "dvc"} <= seen
    assert not re.search(r"pypi|index-url|registry\.", path.read_text())
