"""`catdog compare`: which of several runs is better, from hand-made predictions to real DVC and MLflow."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from mlflow import MlflowClient

from catdog import cli
from catdog.bootstrap import holm
from catdog.compared_runs import parse_predictions, read_runs
from catdog.comparison import (
    ComparedRun,
    _group_numbers,
    compare,
    format_markdown,
    format_text,
    verdict_sentences,
)
from catdog.errors import CatdogError
from catdog.evaluation import LabelledPredictions, prediction_table
from conftest import REPOSITORY, Project


def predictions(correct, confidence=0.9, classes=("cat", "dog")):
    """As many images as `correct` has signs, their labels in turn; a wrong one is given to the next class."""
    correct = np.asarray(correct, bool)
    labels = np.arange(len(correct)) % len(classes)
    predicted = np.where(correct, labels, (labels + 1) % len(classes))
    probabilities = np.full((len(labels), len(classes)), (1 - confidence) / (len(classes) - 1), np.float32)
    probabilities[np.arange(len(labels)), predicted] = confidence
    names = tuple(f"photos/{number}.jpg" for number in range(len(labels)))
    return LabelledPredictions(names, labels.astype(np.int64), probabilities, tuple(classes), 0.5)


def run(name, predictions, **details):
    alone = {"name": name, "params": {}, "metrics": {}, "predictions": predictions, "groups": {}}
    return ComparedRun(**alone | details)


def where(images, *wrong):
    """True for each of `images` but the numbers `wrong`."""
    return ~np.isin(np.arange(images), wrong)


# One hundred images: the candidate has 14 right that the baseline has wrong, and the other way round 3.
BASELINE = run("A", predictions(where(100, *range(14))))
CANDIDATE = run("B", predictions(where(100, 50, 51, 52)))


def outcomes(verdict):
    return {entry.metric: entry.outcome for entry in verdict.differences}


def test_mcnemar_decides_and_its_sentence_says_why():
    verdict = compare([BASELINE, CANDIDATE]).verdicts[0]
    assert verdict.outcome == "better"
    # 2 * (1 + 17 + 136 + 680) / 2**17: three heads or fewer of 17, on either side.
    assert verdict.differences[0].p == pytest.approx(2 * (1 + 17 + 136 + 680) / 2**17, abs=1e-6)
    assert verdict.differences[0].difference == pytest.approx(0.11, abs=1e-6)
    assert verdict_sentences(verdict)[0] == (
        "Accuracy: B is right on 14 pictures where A is wrong, A on 3 where B is wrong; p = 0.013: B is better."
    )


def test_a_worse_candidate_is_told_as_such():
    verdict = compare([CANDIDATE, BASELINE]).verdicts[0]
    assert verdict.outcome == "worse"
    assert (verdict.only_baseline, verdict.only_candidate) == (14, 3)
    assert verdict_sentences(verdict)[0].endswith("p = 0.013: B is better.")


# Near-duplicates


SCENES = {f"photos/{number}.jpg": f"scene {number // 4}" for number in range(240)}


def test_groups_are_drawn_together():
    # A has all four pictures of three scenes right that B has wrong: McNemar's test counts twelve.
    a, b = predictions(where(240)), predictions(where(240, *range(12)))
    alone, together = (compare([run("A", a, groups=groups), run("B", b, groups=groups)]) for groups in ({}, SCENES))
    (told,), (grouped,) = alone.verdicts, together.verdicts
    assert (told.outcome, told.grouped, grouped.outcome, grouped.grouped) == ("worse", False, "unclear", True)
    # That none of three of sixty scenes is drawn has a chance of (57/60)^60 = 0.046, on the one side.
    assert grouped.differences[0].p == pytest.approx(2 * (57 / 60) ** 60, abs=0.02)
    assert "p = 0.0" in verdict_sentences(grouped)[0]
    assert verdict_sentences(grouped)[0].endswith(
        " by a bootstrap of whole groups of near-duplicates: no difference can be told with 240 test images."
    )
    assert "McNemar's test would take them for independent." in format_text(together)
    assert "near-duplicates" not in format_text(alone)
    # The intervals of the runs themselves, too.
    width = [entry.metrics["accuracy"][1].high - entry.metrics["accuracy"][1].low for entry in (alone, together)]
    assert width[1] > 1.7 * width[0]


def test_groups_of_one_image_change_no_byte():
    names = {path: str(1000 - number) for number, path in enumerate(BASELINE.predictions.paths)}
    single = [replace(entry, groups=names) for entry in (BASELINE, CANDIDATE)]
    assert format_text(compare(single)) == format_text(compare([BASELINE, CANDIDATE]))


def test_images_that_either_run_has_in_a_group_belong_together():
    paths = BASELINE.predictions.paths
    a, b = {paths[0]: "x", paths[1]: "x"}, {paths[1]: "y", paths[2]: "y"}
    numbers = _group_numbers(paths, replace(BASELINE, groups=a), replace(CANDIDATE, groups=b))
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers)) == 98


def test_runs_without_a_manifest_are_told():
    unknown = [replace(entry, groups=None) for entry in (BASELINE, CANDIDATE)]
    text = format_text(compare(unknown))
    for name in "AB":
        assert f"CAUTION: data/manifest.csv of {name} cannot be had, which tells near-duplicates" in text
    assert "CAUTION: near-duplicates among the test images are not known, so each image counts on its own" in text
    # That of the other one tells as much of the images that both judged.
    comparison = compare([BASELINE, unknown[1]])
    assert comparison.verdicts[0].cautions == ()
    assert [note.partition(" cannot")[0] for note in comparison.notes] == ["data/manifest.csv of B"]


def test_few_images_tell_nothing():
    comparison = compare([run("A", predictions(where(30, 0, 2, 4))), run("B", predictions(where(30, 0, 1)))])
    assert set(outcomes(comparison.verdicts[0]).values()) == {"unclear"}
    assert verdict_sentences(comparison.verdicts[0]) == [
        "Accuracy: B is right on 2 pictures where A is wrong, A on 1 where B is wrong; p = 1.000: no difference can be "
        "told with 30 test images.",
        "Other metrics: no difference can be told with 30 test images.",
    ]


def test_equal_predictions_are_no_difference():
    verdict = compare([BASELINE, replace(BASELINE, name="B")]).verdicts[0]
    assert set(outcomes(verdict).values()) == {"unclear"}
    assert verdict_sentences(verdict)[0].startswith("Accuracy: A and B are right on the same pictures; p = 1.000")


def test_of_a_loss_less_is_better():
    # Both make the same mistakes; B is surer of what it gets right, A of what it gets wrong.
    correct = where(100, 0, 1, 2, 3)
    timid, sure = predictions(correct, 0.7), predictions(correct, 0.9)
    verdict = compare([run("A", timid), run("B", sure)]).verdicts[0]
    assert outcomes(verdict) | {"log_loss": "better", "brier": "better", "ece": "better"} == outcomes(verdict)
    assert outcomes(verdict)["accuracy"] == "unclear"
    loss = next(entry for entry in verdict.differences if entry.metric == "log_loss")
    assert loss.high < 0
    assert loss.difference < 0
    assert verdict_sentences(verdict)[1] == "Other metrics: B is better in log_loss, brier and ece."
    back = compare([run("B", sure), run("A", timid)]).verdicts[0]
    assert outcomes(back)["log_loss"] == "worse"
    assert verdict_sentences(back)[1] == "Other metrics: B is better in log_loss, brier and ece."


def test_a_difference_that_is_not_shown_is_none():
    right = predictions(where(100, 0), 0.9)
    shifted = replace(right, probabilities=right.probabilities + np.float32([[2e-6, -2e-6], [-2e-6, 2e-6]] * 50))
    assert set(outcomes(compare([run("A", right), run("B", shifted)]).verdicts[0]).values()) == {"unclear"}


def test_more_candidates_need_more_evidence():
    p = compare([BASELINE, CANDIDATE]).verdicts[0].differences[0].p
    several = compare([BASELINE, *(replace(CANDIDATE, name=name) for name in "BCDE")], resamples=100)
    assert [verdict.candidate for verdict in several.verdicts] == list("BCDE")
    for verdict in several.verdicts:
        assert verdict.differences[0].p == pytest.approx(4 * p)
        assert verdict.outcome == "unclear"


def test_many_metrics_of_many_candidates_can_still_be_told():
    perfect = predictions(where(60), 0.95)
    poor = predictions(where(60, *range(0, 60, 3)), 0.95)
    for verdict in compare([run("A", poor), *(run(name, perfect) for name in "BCD")]).verdicts:
        told = outcomes(verdict)
        assert {told["f1"], told["roc_auc"], told["brier"]} == {"better"}


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        pytest.param([], [], id="none"),
        pytest.param([0.03], [0.03], id="one stays"),
        pytest.param([0.01, 0.04, 0.03], [0.03, 0.06, 0.06], id="the order stays, none is below a smaller one"),
        pytest.param([0.5, 0.6, 0.001], [1.0, 1.0, 0.003], id="at most 1"),
        pytest.param([0.02, 0.02], [0.04, 0.04], id="ties"),
    ],
)
def test_holm(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_images_are_matched_by_path_whatever_their_order():
    order = np.random.default_rng(0).permutation(100)
    shuffled = select(CANDIDATE.predictions, order)
    assert (
        compare([BASELINE, replace(CANDIDATE, predictions=shuffled)]).verdicts
        == compare([BASELINE, CANDIDATE]).verdicts
    )


def select(predictions, rows):
    return replace(
        predictions,
        paths=tuple(predictions.paths[row] for row in rows),
        labels=predictions.labels[rows],
        probabilities=predictions.probabilities[rows],
    )


def test_most_images_in_common_are_compared_and_the_rest_is_told():
    # Without ten images, of which the candidate has ten right and the baseline none.
    rest = select(CANDIDATE.predictions, np.arange(10, 100))
    comparison = compare([BASELINE, replace(CANDIDATE, predictions=rest)])
    (verdict,) = comparison.verdicts
    assert (verdict.images, verdict.only_candidate, verdict.only_baseline) == (90, 4, 3)
    assert verdict.differences[0].difference == pytest.approx(1 / 90, abs=1e-6)
    assert verdict.cautions == (
        "A was tested on 100 images and B on 90; what follows is about the 90 that both judged, the metrics above are "
        "not",
    )
    assert [estimate.value for estimate in comparison.metrics["test_images"]] == [100, 90]
    assert f"CAUTION: {verdict.cautions[0]}." in format_text(comparison)
    assert f"> **CAUTION: {verdict.cautions[0]}.**" in format_markdown(comparison)


def test_an_image_with_another_label_is_another_image():
    labels = CANDIDATE.predictions.labels.copy()
    labels[:5] = 1 - labels[:5]
    relabelled = replace(CANDIDATE, predictions=replace(CANDIDATE.predictions, labels=labels))
    assert compare([BASELINE, relabelled]).verdicts[0].images == 95


@pytest.mark.parametrize(("common", "tested"), [(80, True), (79, False), (0, False)], ids=str)
def test_too_few_images_in_common_are_not_tested(common, tested):
    names = tuple(f"elsewhere/{number}.jpg" for number in range(100 - common))
    other = replace(CANDIDATE.predictions, paths=CANDIDATE.predictions.paths[:common] + names)
    comparison = compare([replace(BASELINE, params={"seed": "1"}), replace(CANDIDATE, predictions=other)])
    (verdict,) = comparison.verdicts
    assert bool(verdict.differences) is tested
    assert (verdict.cautions[0].endswith("too few to say which is better")) is not tested
    # Parameters and metrics are told all the same.
    assert comparison.params == {"seed": ("1", None)}
    assert [estimate.value for estimate in comparison.metrics["accuracy"]] == pytest.approx([0.86, 0.97])
    if not tested:
        assert verdict.outcome == "unclear"
        assert verdict_sentences(verdict) == []
        assert "McNemar" not in format_text(comparison)


def test_one_untestable_candidate_leaves_the_other_alone():
    strange = replace(CANDIDATE.predictions, paths=tuple(f"elsewhere/{number}" for number in range(100)))
    first, second = compare([BASELINE, replace(CANDIDATE, name="C", predictions=strange), CANDIDATE]).verdicts
    assert first.differences == ()
    assert second.outcome == "better"
    assert second.differences[0].p == compare([BASELINE, CANDIDATE]).verdicts[0].differences[0].p


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([BASELINE], "A alone cannot be compared; name two or more runs"),
        ([BASELINE, CANDIDATE, BASELINE], "A is named twice; name runs that differ"),
        (
            [BASELINE, run("B", predictions(where(6), classes=("cat", "dog", "fox")))],
            "A tells cat, dog apart and B cat, dog, fox; compare runs with the same classes in the same order",
        ),
        (
            [run("A", predictions(where(80), classes=[f"{n:02}" for n in range(37)])), CANDIDATE],
            "A tells 00, 01, 02, 03, 04 and 32 more apart and B cat, dog; "
            "compare runs with the same classes in the same order",
        ),
    ],
    ids=["alone", "twice", "classes", "many classes"],
)
def test_what_cannot_be_compared(runs, sentence):
    with pytest.raises(CatdogError) as caught:
        compare(runs)
    assert str(caught.value) == sentence


def test_parameters_that_differ():
    first = {"seed": "20", "train.learning_rate": "1e-05", "train.l2": "0.0", "backbone": "vgg16", "dataset": ""}
    second = {"seed": "21", "train.learning_rate": "0.00001", "train.l2": "0", "backbone": "vgg16", "tune.trials": "9"}
    comparison = compare([replace(BASELINE, params=first), replace(CANDIDATE, params=second)])
    assert comparison.params == {"seed": ("20", "21"), "dataset": ("", None), "tune.trials": (None, "9")}
    text = format_text(comparison)
    assert "\nseed         20       21\ndataset      ''       not set\ntune.trials  not set  9\n" in text
    assert "\n\nNone.\n\n" in format_text(compare([BASELINE, CANDIDATE]))


def test_metrics_have_intervals_and_what_else_is_known():
    known = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "test_images": 100, "images_per_second": 41.5}
    comparison = compare([replace(BASELINE, metrics=known), CANDIDATE])
    assert list(comparison.metrics)[:2] == ["test_images", "accuracy"]
    assert {"balanced_accuracy", "f1", "roc_auc", "pr_auc", "log_loss", "brier", "ece"} < comparison.metrics.keys()
    first, second = comparison.metrics["accuracy"]
    # Of the predictions, whatever the report says.
    assert (first.value, second.value) == pytest.approx((0.86, 0.97))
    # Twice the standard error of a share of 100.
    assert (first.low, first.high) == pytest.approx((0.86 - 0.07, 0.86 + 0.07), abs=0.015)
    speed = comparison.metrics["images_per_second"]
    assert speed[0].value == 41.5
    assert speed[1] is None
    assert not any(name.endswith(("_low", "_high")) for name in comparison.metrics)
    line = next(line for line in format_text(comparison).splitlines() if line.startswith("images_per_second"))
    assert line.split() == ["images_per_second", "41.5", "-"]


def test_other_data_are_told():
    for data, told in ((("x", "y"), True), (("x", "x"), False), (("", "y"), False)):
        comparison = compare([replace(BASELINE, data=data[0]), replace(CANDIDATE, data=data[1])])
        cautions = comparison.verdicts[0].cautions
        assert any("different versions of data/raw.zip" in sentence for sentence in cautions) is told


def test_text_is_plain_and_its_columns_stand_below_each_other():
    comparison = compare([replace(BASELINE, params={"seed": "20"}), replace(CANDIDATE, params={"seed": "21"})])
    text = format_text(comparison)
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines()[:30])) < 120
    table = [line for line in text.split("Metrics on")[1].splitlines() if " [0." in line]
    assert len({line.index("[") for line in table}) == 1
    assert len({line.rindex("[") for line in table}) == 1
    assert format_text(compare([BASELINE, CANDIDATE])) == format_text(compare([BASELINE, CANDIDATE]))


def test_markdown_tables_are_whole_and_names_stay_names():
    odd = replace(CANDIDATE, name="a|b*c_d_", params={"dataset": "x|y <b>"})
    text = format_markdown(compare([BASELINE, odd]))
    assert r"a\|b\*c_d\_" in text
    assert r"| dataset | not set | x\|y \<b\> |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            columns = {len(line.replace(r"\|", "").split("|")) for line in block.splitlines()}
            assert len(columns) == 1
            assert block.splitlines()[1].startswith("| --- |")


# --- predictions.csv


@pytest.mark.parametrize("classes", [2, 3, 37])
def test_predictions_come_back_as_they_were_written(classes):
    random = np.random.default_rng(classes)
    for threshold in (0.5, 0.031, 0.97):
        probabilities = random.dirichlet(np.ones(classes), 300).astype(np.float32)
        # The hardest are those that rounding moves across the threshold, or into a tie.
        probabilities[:50] = 1 / classes
        probabilities[:50] += random.normal(0, 3e-7, (50, classes)).astype(np.float32)
        if classes == 2:
            near = np.float32(threshold) + random.normal(0, 3e-7, 50).astype(np.float32)
            probabilities[:50] = np.stack([1 - near, near], axis=1)
        names = tuple(f"{number}.jpg" for number in range(300))
        class_names = tuple(f"c{number:02}" for number in range(classes))
        labels = random.integers(classes, size=300)
        written = LabelledPredictions(names, labels, probabilities, class_names, threshold)
        read = parse_predictions(prediction_table(written).to_csv(index=False), "predictions.csv")
        np.testing.assert_array_equal(read.predicted, written.predicted)
        np.testing.assert_array_equal(read.labels, labels)
        np.testing.assert_allclose(read.probabilities, probabilities, atol=2.6e-6)
        assert (read.paths, read.class_names) == (names, written.class_names)


@pytest.mark.parametrize("predicted", ["a", "b"])
def test_one_class_predicted_throughout(predicted):
    text = f"path,label,predicted,p_a,p_b\n1.jpg,a,{predicted},0.3,0.7\n2.jpg,b,{predicted},0.6,0.4\n"
    assert set(parse_predictions(text, "it").predicted) == {"ab".index(predicted)}


def test_names_that_look_like_something_else_stay_names():
    text = 'path,label,predicted,p_NA,p_1\nNone,NA,NA,0.8,0.2\n"a,b.jpg",1,1,0.1,0.9\n'
    read = parse_predictions(text, "it")
    assert read.class_names == ("1", "NA")
    assert read.paths == ("None", "a,b.jpg")
    assert read.labels.tolist() == read.predicted.tolist() == [1, 0]


GOOD = "path,label,predicted,p_a,p_b\n1.jpg,a,a,0.9,0.1\n2.jpg,b,b,0.2,0.8\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is not a table of predictions: No columns to parse from file"),
        (GOOD.replace("predicted", "guess"), "it has no column predicted; `dvc repro` writes it anew"),
        (GOOD.replace("p_b", "b"), "it has no images or fewer than two columns p_<class>; `dvc repro` writes it anew"),
        (GOOD.splitlines()[0], "it has no images or fewer than two columns p_<class>; `dvc repro` writes it anew"),
        (GOOD.replace(",b,b", ",c,b"), "it names the class c but has no column p_c; `dvc repro` writes it anew"),
        (GOOD.replace("0.8", "x"), "it holds a probability that is no number from 0 to 1; `dvc repro` writes it anew"),
        (GOOD.replace("0.8", "8"), "it holds a probability that is no number from 0 to 1; `dvc repro` writes it anew"),
        (GOOD.replace("2.jpg", "1.jpg"), "it names the image 1.jpg twice; `dvc repro` writes it anew"),
        (
            GOOD.replace("a,a", "a,b").replace("b,b", "b,a"),
            "the column predicted of it contradicts its probabilities; `dvc repro` writes it anew",
        ),
    ],
    ids=["empty", "column", "one class", "no images", "class", "word", "range", "twice", "contradiction"],
)
def test_broken_predictions(text, sentence):
    with pytest.raises(CatdogError) as caught:
        parse_predictions(text, "it")
    assert str(caught.value) == sentence


def test_contradicting_predictions_of_three_classes():
    with pytest.raises(CatdogError, match="contradicts"):
        parse_predictions("path,label,predicted,p_a,p_b,p_c\n1.jpg,a,b,0.9,0.1,0\n", "it")


# --- Runs in git, DVC and MLflow

DVC_YAML = """
stages:
  download:
    cmd: mkdir -p data && echo ${seed} > data/raw.zip
    params: [seed]
    outs: [data/raw.zip]
  evaluate:
    cmd:
      - mkdir -p reports && cp made/${train.epochs}.csv reports/predictions.csv
      - cp made/metrics.json reports/ && cp made/manifest.csv data/
    params: [train]
    deps: [made, data/raw.zip]
    outs: [reports/predictions.csv, data/manifest.csv]
    metrics:
      - reports/metrics.json: {cache: false}
"""
PARAMS = "seed: 20\ntrain:\n  epochs: {}\n  learning_rate: 0.001\n"
IMAGES = [f"photos/{number}.jpg" for number in range(-2, 60)]
RIGHT = {10: where(60, 0, 1, 2, 3), 20: where(60), 30: where(60, 5)}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A repository with two commits of ten and thirty epochs, and between them an experiment `longer` of twenty."""
    folder = tmp_path_factory.mktemp("comparison")
    project = Project(folder / "project", folder / "home", warm=True)
    project.home.mkdir()
    (project.home / ".gitconfig").write_text("[user]\n\tname = Test\n\temail = test@example.org\n")
    (project.root / "made").mkdir(parents=True)
    for epochs, correct in RIGHT.items():
        table = prediction_table(predictions(correct)).to_csv(index=False)
        (project.root / f"made/{epochs}.csv").write_text(table)
    manifest = "path,label,group\n" + "".join(f"{path},?,{number // 2}\n" for number, path in enumerate(IMAGES))
    (project.root / "made/manifest.csv").write_text(manifest)
    (project.root / "made/metrics.json").write_text('{"accuracy": 0.9, "test_images": 60}\n')
    (project.root / "params.yaml").write_text(PARAMS.format(10))
    (project.root / "dvc.yaml").write_text(DVC_YAML)
    project.git("init", "--quiet", "--initial-branch=main")
    assert project.dvc("init", "--quiet").returncode == 0
    project.repro()
    project.commit()
    project.git("tag", "first")
    done = project.dvc("exp", "run", "--name", "longer", "--set-param", "train.epochs=20")
    assert done.returncode == 0, done.stderr
    project.git("checkout", "--quiet", ".")
    project.git("branch", "side", "first")
    (project.root / "params.yaml").write_text(PARAMS.format(30))
    project.repro()
    project.commit()
    return project


@pytest.fixture
def project(original, tmp_path, monkeypatch):
    """A copy of it to change at will, in the environment that its commands have."""
    shutil.copytree(original.root, tmp_path / "project", symlinks=True)
    project = Project(tmp_path / "project", original.home, warm=True)
    kept = project.environment()
    for name in set(os.environ) - set(kept):
        monkeypatch.delenv(name)
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    return project


def mistakes(run):
    return np.flatnonzero(~run.predictions.correct).tolist()


def test_revisions_experiments_and_the_workspace_are_read(project):
    head = project.git("rev-parse", "HEAD")
    names = ["first", "longer", "HEAD", "workspace", "HEAD~1", "git:main", "exp:longer", head, head[:7]]
    runs = read_runs(project.root, names)
    shown = ["first", "longer", "HEAD", "workspace", "HEAD~1", "main", "longer", head[:8], head[:7]]
    assert [run.name for run in runs] == shown
    epochs = [10, 20, 30, 30, 10, 30, 20, 30, 30]
    for run, number in zip(runs, epochs, strict=True):
        assert run.params == {"seed": "20", "train.epochs": str(number), "train.learning_rate": "0.001"}
        assert mistakes(run) == np.flatnonzero(~RIGHT[number]).tolist()
        assert run.metrics == {"accuracy": 0.9, "test_images": 60}
        assert run.notes == ()
        assert run.groups == {path: str(number // 2) for number, path in enumerate(IMAGES) if number > 1}
    assert len({run.data for run in runs}) == 1
    assert len(runs[0].data) == 32


def test_the_command_prints_and_writes(project):
    def catdog(*arguments):
        return project.run("python", "-m", "catdog.cli", "compare", *arguments, PYTHONPATH=str(REPOSITORY / "src"))

    done = catdog("first", "longer", "HEAD")
    assert (done.returncode, done.stderr) == (0, "")
    assert "train.epochs  10     20      30\n" in done.stdout
    assert "longer against first, on 60 common test images" in done.stdout
    assert "HEAD is right on 4 pictures where first is wrong, first on 1 where HEAD is wrong" in done.stdout
    done = catdog("first", "longer", "--markdown", "--output", "notes/comment.md")
    assert (done.returncode, done.stdout, done.stderr) == (0, "notes/comment.md written\n", "")
    assert "| train.epochs | 10 | 20 |" in (project.root / "notes/comment.md").read_text()


def test_an_output_that_cannot_be_written_is_told(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    assert cli.main(["compare", "first", "HEAD", "--output", "made"]) == 2
    assert capsys.readouterr() == ("", "catdog: --output made cannot be written: Is a directory\n")
    assert not (project.root / "made.part").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("worspace", "there is no DVC experiment, git revision or MLflow run 'worspace'; did you mean workspace?"),
        ("exp:first", "there is no DVC experiment 'first'; `dvc exp list --all-commits` will list what there is"),
        ("git:longer", "there is no git revision 'longer'; `git log --all --oneline` will list what there is"),
        ("git:man", "there is no git revision 'man'; did you mean main?"),
        ("mlflow:longer", "there is no MLflow run 'longer'; `mlflow ui` will list what there is"),
        (
            "0123456789abcdef0123456789abcdef",
            "there is no DVC experiment, git revision or MLflow run '0123456789abcdef0123456789abcdef'; `dvc exp list "
            "--all-commits`, `git log --all --oneline` and `mlflow ui` will list what there is",
        ),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_unknown_names(project, name, sentence):
    with pytest.raises(CatdogError) as caught:
        read_runs(project.root, [name])
    assert str(caught.value) == sentence
    # Asking did not make a tracking store.
    assert not (project.root / "mlflow.db").exists()


def test_a_name_of_two_kinds_needs_a_prefix(project):
    project.git("branch", "longer")
    with pytest.raises(CatdogError) as caught:
        read_runs(project.root, ["longer"])
    assert str(caught.value) == (
        "longer is both a DVC experiment and a git revision; write exp:longer or git:longer for the one meant"
    )
    experiment, branch = read_runs(project.root, ["exp:longer", "git:longer"])
    assert (experiment.params["train.epochs"], branch.params["train.epochs"]) == ("20", "30")


def test_of_two_experiments_with_one_name_that_of_head_is_meant(project):
    # Another experiment of that name, which started from HEAD.
    head, experiment = project.git("rev-parse", "HEAD"), project.git("rev-parse", "first")
    project.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/longer", experiment)
    assert read_runs(project.root, ["longer"])[0].params["train.epochs"] == "10"
    project.git("commit", "--quiet", "--allow-empty", "--message", "further")
    with pytest.raises(CatdogError, match="2 DVC experiments are named longer; give the revision of the one") as caught:
        read_runs(project.root, ["longer"])
    for revision in str(caught.value).partition("meant: ")[2].split(", "):
        assert read_runs(project.root, [revision])[0].params["train.epochs"] in ("10", "20")


def test_lost_predictions_come_from_the_remote_or_are_told(project):
    shutil.copytree(project.root / ".dvc/cache", project.root / "kept")
    shutil.rmtree(project.root / ".dvc/cache")
    with pytest.raises(CatdogError) as caught:
        read_runs(project.root, ["longer"])
    assert str(caught.value) == (
        "reports/predictions.csv of longer is neither in DVC's cache nor to be had from its remote; `dvc exp apply "
        "longer` and `dvc repro` make it anew"
    )
    with pytest.raises(CatdogError, match="`git checkout first` and `dvc repro` make it anew"):
        read_runs(project.root, ["first"])
    (project.root / ".dvc/config.local").write_text(
        "[core]\n    remote = there\n['remote \"there\"']\n    url = ../kept\n"
    )
    assert mistakes(read_runs(project.root, ["first"])[0]) == [0, 1, 2, 3]
    # Nothing was brought into the cache or the workspace.
    assert not (project.root / ".dvc/cache/files").exists()
    assert read_runs(project.root, ["workspace"])[0].params["train.epochs"] == "30"


def test_a_remote_that_cannot_be_used_is_told(project):
    shutil.rmtree(project.root / ".dvc/cache")
    (project.root / ".dvc/config.local").write_text(
        "[core]\n    remote = there\n['remote \"there\"']\n    url = nonsense://there\n"
    )
    with pytest.raises(CatdogError, match=r"first cannot be read through DVC \(.*\); check its settings and its"):
        read_runs(project.root, ["first"])


@pytest.mark.parametrize("change", ["no column", "lost", "lost, and the remote fails"])
def test_a_revision_without_a_manifest_is_compared_with_a_caution(project, monkeypatch, change):
    from dvc.api import DVCFileSystem

    manifest = project.root / "data/manifest.csv"
    digest = project.out_hashes()["data/manifest.csv"]
    manifest.unlink()
    if change == "no column":
        manifest.write_text("path,label\n")
    else:
        (project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    if change == "lost, and the remote fails":
        read = DVCFileSystem.read_text

        def fail(files, path, **options):
            if path == "data/manifest.csv":
                raise PermissionError("no credentials")
            return read(files, path, **options)

        monkeypatch.setattr(DVCFileSystem, "read_text", fail)
    (workspace,) = read_runs(project.root, ["workspace"])
    assert workspace.groups is None
    text = format_text(compare([workspace, replace(workspace, name="other")]))
    assert "CAUTION: data/manifest.csv of workspace cannot be had" in text


def test_a_manifest_that_is_no_table_is_told(project):
    (project.root / "data/manifest.csv").unlink()
    (project.root / "data/manifest.csv").write_text('path,group\n"a')
    with pytest.raises(CatdogError, match=r"data/manifest\.csv of workspace is not a table: .*; `dvc repro` writes it"):
        read_runs(project.root, ["workspace"])


def test_a_revision_without_results(project):
    project.git("rm", "--quiet", "dvc.lock", "reports/metrics.json")
    project.git("commit", "--quiet", "--message", "nothing")
    with pytest.raises(CatdogError) as caught:
        read_runs(project.root, ["HEAD"])
    assert str(caught.value) == (
        "reports/predictions.csv of HEAD does not exist; `git checkout HEAD` and `dvc repro` make it anew"
    )


def test_parameters_changed_after_the_run_are_not_taken_for_its_own(project):
    (project.root / "params.yaml").write_text(PARAMS.format(99).replace("0.001", "1e-3"))
    (workspace,) = read_runs(project.root, ["workspace"])
    assert workspace.params["train.epochs"] == "30"
    assert workspace.notes == (
        "params.yaml of workspace was changed after its last run, in train.epochs; shown are the values that made the "
        "results",
    )
    comparison = compare([*read_runs(project.root, ["first"]), workspace])
    assert comparison.params == {"train.epochs": ("10", "30")}
    assert f"CAUTION: {workspace.notes[0]}." in format_text(comparison)


@pytest.fixture(scope="module")
def original_store(original, tmp_path_factory):
    """A tracking store with a run of twenty epochs, an earlier one of the same name that failed, and others."""
    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("catdog", artifact_location=(folder / "mlruns").as_uri())
    table = shutil.copy(original.root / "made/20.csv", folder / "predictions.csv")

    def add(name, status, *, artifact=True):
        tags = {"pipeline.key": "any", "dvc.out.data/raw.zip": "f" * 32}
        parent = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        for key, value in {"seed": "20", "train.epochs": "20", "train.learning_rate": "0.001"}.items():
            client.log_param(parent, key, value)
        for key, value in {"accuracy": 0.9, "train.val_loss": 0.1}.items():
            client.log_metric(parent, key, value)
        tags = {"mlflow.parentRunId": parent, "pipeline.stage": "evaluate"}
        child = client.create_run(experiment, run_name="evaluate", tags=tags).info.run_id
        if artifact:
            client.log_artifact(child, str(table))
        for run_id in (child, parent):
            client.set_terminated(run_id, status)
        return parent, child

    runs = {
        "failed": add("repro-1", "FAILED"),
        "finished": add("repro-1", "FINISHED"),
        "first of two": add("twice", "FINISHED"),
        "second of two": add("twice", "FINISHED"),
        "bare": add("bare", "FINISHED", artifact=False),
        # The name that the experiment in DVC has too.
        "longer": add("longer", "FINISHED"),
    }
    return folder / "mlflow.db", runs


@pytest.fixture
def store(original_store, project):
    """The ids of parent and child of the runs in the project's store."""
    database, runs = original_store
    shutil.copy(database, project.root)
    return runs


def test_mlflow_runs_are_read_by_name_and_id(project, store):
    parent, child = store["finished"]
    runs = read_runs(project.root, ["repro-1", parent, child, "mlflow:longer"])
    assert [run.name for run in runs] == ["repro-1", parent[:8], child[:8], "longer"]
    for run in runs:
        assert run.params == {"seed": "20", "train.epochs": "20", "train.learning_rate": "0.001"}
        assert run.metrics == {"accuracy": 0.9}
        assert mistakes(run) == []
        assert run.data == "f" * 32
    # An experiment comes before the run of MLflow that has its name.
    assert len(read_runs(project.root, ["longer"])[0].data) == 32
    assert read_runs(project.root, ["longer"])[0].data != "f" * 32
    sentences = verdict_sentences(compare([*read_runs(project.root, ["first"]), runs[0]]).verdicts[0])
    assert "repro-1 is right on 4 pictures where first is wrong" in sentences[0]


def test_mlflow_runs_that_cannot_be_compared(project, store):
    def told(name):
        with pytest.raises(CatdogError) as caught:
            read_runs(project.root, [name])
        return str(caught.value)

    assert told("twice") == (
        "2 MLflow runs are named twice; give the id of the one meant, newest first: "
        f"{store['second of two'][0]}, {store['first of two'][0]}"
    )
    assert told(store["failed"][0]) == (
        f"the MLflow run {store['failed'][0][:8]} has no stage evaluate that finished; choose one that has"
    )
    assert told("bare").startswith("the artifact predictions.csv of the MLflow run bare cannot be read (")
    assert told("repro-l").endswith("did you mean repro-1?")
    # Stages are no runs to compare by name: every parent has one of each.
    assert told("mlflow:evaluate").startswith("there is no MLflow run 'evaluate'; ")


def test_a_tracking_store_that_fails_is_told(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(CatdogError, match=r"the tracking store http://127.0.0.1:9 failed \(.*\); check that it can be"):
        read_runs(project.root, ["mlflow:any"])
    # What is in git needs none.
    assert read_runs(project.root, ["first"])[0].name == "first"
