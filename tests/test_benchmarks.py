"""The logic of benchmarks/: what is measured is measured right, and told right. Nothing here takes a time."""

import json
import math
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from benchmarks import pictures, project, recipes
from benchmarks.figure import draw
from benchmarks.results import Results
from benchmarks.spread import Spread, exponent, fit_line, ratios
from benchmarks.tables import render
from catdog.errors import CatdogError
from catdog.quality import group_duplicates, inspect

FACTS = {
    "date": "2025-01-31 12:00",
    "machine": "cpu: Some Processor, 2 cores",
    "cores": 2,
    "memory_gb": 8.0,
    "load_before": 0.1,
    "python": "3.11.0",
    "packages": {"keras": "3.12"},
    "revision": "abc1234",
    "photographs": ["pets.zip"],
    "settings": {"recipe_epochs": 1, "scale": {"preprocess.image_size": 96}},
}


def test_a_spread_tells_its_ends_only_where_they_differ():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert Spread.of([1234.04, 1234.01]).told() == "1,234.0"
    assert Spread.of([12.0, 10.0, 11.0]).told(0) == "11 (10 to 12)"


def test_ratios_are_taken_pair_by_pair():
    # The machine was half as fast in the second round: the ratio does not notice, medians apart would.
    assert ratios([10.0, 20.0, 12.0], [5.0, 10.0, 4.0]) == Spread(2.0, 2.0, 3.0)
    # A round that an interrupted run did not finish does not count.
    assert ratios([10.0, 99.0], [5.0]) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_exponent_of_growth_is_that_of_the_largest_counts(power):
    counts = [100_000, 100, 10_000]
    assert exponent(counts, [count**power * 3.0 for count in counts]) == pytest.approx(power)


def test_a_line_parts_what_is_paid_once_from_what_each_image_costs():
    counts = [1000, 10_000, 100_000]
    line = fit_line(counts, [4 + 0.002 * count for count in counts])
    assert line.fixed == pytest.approx(4)
    assert line.per_image == pytest.approx(0.002)


def test_what_a_process_takes_does_not_hold_what_its_parent_had(tmp_path):
    log = tmp_path / "log"
    ballast = np.ones(40_000_000)  # 320 MB
    command = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(0.2)"]
    subprocess.run([sys.executable, "-S", "-E", project.USAGE, log, *command], check=True)
    usage = json.loads(log.read_text())
    assert ballast.sum() == len(ballast)
    assert 0.2 <= usage["seconds"] < 5
    assert usage["cpu_seconds"] < usage["seconds"]
    assert usage["peak_mb"] < 100
    assert usage["command"] == command[1:]


def test_what_a_process_takes_holds_its_own_memory_and_its_exit_status(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", "ballast = b'1' * 150_000_000; raise SystemExit(3)"]
    done = subprocess.run([sys.executable, "-S", "-E", project.USAGE, log, *command], check=False)
    usage = json.loads(log.read_text())
    assert done.returncode == usage["exit"] == 3
    assert usage["peak_mb"] > 150


def test_stages_are_measured_in_a_copy_of_the_project_with_its_own_home(tmp_path):
    copy = project.new_project(tmp_path / "fresh", {"train.epochs": 3})
    assert YAML(typ="safe").load(copy.root / "params.yaml")["train"]["epochs"] == 3
    (copy.root / "stages/nothing.py").write_text("import os; print(os.environ['HOME']); b'1' * 60_000_000")
    run = copy.run("sh", "-c", "python stages/nothing.py > home.txt && python stages/nothing.py")
    assert (copy.root / "home.txt").read_text().strip() == str(copy.home)
    assert list(run.stages) == ["nothing"]
    assert 60 < run.stages["nothing"]["peak_mb"] <= run.usage["peak_mb"] < 200
    assert run.stages["nothing"]["seconds"] <= run.usage["seconds"]


def test_a_command_that_fails_is_told_with_what_it_wrote_last(tmp_path):
    copy = project.new_project(tmp_path / "fresh", {})
    with pytest.raises(CatdogError, match=r"exit status 4:\nthe reason$"):
        copy.run("sh", "-c", "echo the reason >&2; exit 4")


def test_every_beginning_of_the_photographs_has_the_mix_of_the_whole(tmp_path):
    sizes = {"one.zip": {"Cat": 10, "Dog": 30}, "other.zip": {"cat": 60, "dog": 20}}
    for name, classes in sizes.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for label, count in classes.items():
                for number in range(count):
                    archive.writestr(f"{label}/{number}.jpg", b"x")
                archive.writestr(f"{label}/empty.jpg", b"")
    listed = pictures.list_photographs([tmp_path / name for name in sizes])
    assert len(listed) == 120
    half = [(one.archive.name, one.label) for one in listed[:60]]
    wanted = {(name, label.lower()): count / 2 for name, classes in sizes.items() for label, count in classes.items()}
    assert {key: half.count(key) for key in wanted} == wanted


def test_repeated_photographs_are_new_pictures_and_generated_ones_are_all_different(tmp_path):
    source, target = tmp_path / "given.zip", tmp_path / "written.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for number in range(20):
            label, data = pictures.generated_picture(1000 + number)
            archive.writestr(f"{label}/{number}.jpg", data)
    pictures.write_photographs(target, [source], 60)
    with zipfile.ZipFile(target) as archive:
        photographs = [archive.read(name) for name in archive.namelist()]
        assert len({name.split("/")[0] for name in archive.namelist()}) == 2
    generated = [pictures.generated_picture(number)[1] for number in range(200)]
    found = [inspect(data, max_pixels=1e6) for data in photographs + generated]
    groups = group_duplicates([one.sha256 for one in found], [one.perceptual_hash for one in found], 8)
    assert len(set(groups)) == len(found) == 260


def test_results_are_saved_after_each_measurement_and_resumed(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path, FACTS, resume=False)
    results.take("pipeline/200", 0, lambda: {"seconds": 1})

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.take("pipeline/200", 1, fail)
    again = Results(path, FACTS | {"date": "later"}, resume=True)
    again.take("pipeline/200", 0, fail)  # is there already
    again.take("pipeline/200", 1, lambda: {"seconds": 2})
    assert json.loads(path.read_text())["measurements"] == {"pipeline/200": [{"seconds": 1}, {"seconds": 2}]}


def test_results_are_neither_overwritten_nor_mixed(tmp_path):
    path = tmp_path / "results.json"
    Results(path, FACTS, resume=False).take("pipeline/200", 0, lambda: 1)
    with pytest.raises(CatdogError, match="RESUME=1"):
        Results(path, FACTS, resume=False)
    with pytest.raises(CatdogError, match="measured with revision = abc1234, now it is other"):
        Results(path, FACTS | {"revision": "other"}, resume=True)


def test_ten_epochs_scale_what_is_repeated_and_nothing_else():
    told = {
        "epochs": 2,
        "train": {"images": 6400, "measured": 640, "seconds": 8.0},
        "val": {"images": 1000, "measured": 500, "seconds": 3.0},
        "test": {"images": 2000, "measured": 1000, "seconds": 5.0},
    }
    assert recipes.ten_epochs(told, process_seconds=35) == pytest.approx(8 + 10 * (80 + 6) + 10)


@pytest.fixture
def without_graphs():
    """Steps run at once instead of being compiled, which takes longer than a few steps do."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.usefixtures("without_graphs")
def test_a_recipe_of_the_tutorials_trains_on_a_few_pictures(recipe, tmp_path):
    for split, count in (("train", 40), ("val", 4), ("test", 4)):
        for number in range(count):
            file = tmp_path / split / ("blue", "red")[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (10 * number % 250, 0, 0)).save(file)
    weights = project.ROOT / "pretrained/mobilenetv2_imagenet_notop_fp16.weights.h5"
    told = recipes.run_recipe(recipe, tmp_path, 32, weights, limit=30)
    assert {split: (told[split]["images"], told[split]["measured"]) for split in ("train", "val", "test")} == {
        "train": (40, 32),
        "val": (4, 4),
        "test": (4, 4),
    }
    assert 0 <= told["accuracy"] <= 1


def usage(seconds, **more):
    return {"seconds": seconds, "cpu_seconds": seconds, "peak_mb": 500.0} | more


def run_of(count, seconds):
    stages = {
        name: usage(seconds / 10, disk_mb=1.0)
        for name in ("source", "download", "split", "preprocess", "embed", "train", "evaluate", "track")
    }
    return {
        "repro": usage(seconds),
        "stages": stages,
        "cache_mb": 3.0,
        "tracking_mb": 1.0,
        "images": count,
        "accuracy": 0.95,
        "log_loss": 0.1,
        "nothing_to_do": usage(1.0),
        "another_head": usage(25.0),
        "help": usage(0.2),
    }


def recipe_run(seconds):
    splits = {split: {"images": 100, "measured": 50, "seconds": 2.0} for split in ("train", "val", "test")}
    return {name: usage(10.0) | splits | {"accuracy": 0.9, "ten_epochs_seconds": seconds} for name in recipes.RECIPES}


def step_run(ours, limit):
    return {
        "stage": usage(9.0),
        "step": {"images": 100, "seconds": 100 / ours},
        "limit": {"images": 100, "seconds": 100 / limit, "settings": "batches of 2"},
    }


MEASUREMENTS = {
    "pipeline/200": [run_of(200, 50.0), run_of(200, 100.0)],
    "pipeline/12000": [run_of(12_000, 200.0), run_of(12_000, 400.0), run_of(12_000, 310.0)],
    "tutorial/200": [recipe_run(500.0), recipe_run(500.0)],
    "limits/read": [{"limit": {"images": 100, "seconds": 0.1, "megabytes": 5.0}}],
    "limits/split": [step_run(300, 600)],
    "limits/preprocess": [step_run(90, 100), step_run(70, 100), step_run(85, 100)],
    "limits/embed": [step_run(80, 100)],
    "limits/evaluate": [step_run(80, 100)],
    "scale/1000": [run_of(1000, 20.0)],
    "scale/10000": [run_of(10_000, 200.0)],
    "near_duplicates": [{"4": 1.0}],
}


def row(page, *starts):
    (found,) = [line for line in page.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_tables_tell_medians_ratios_and_what_is_reached():
    page = render({"facts": FACTS, "measurements": MEASUREMENTS}, "plot.png")
    assert "with 12,000 photographs" in page
    assert row(page, "whole pipeline")[2:] == ["310.00 (200.00 to 400.00)", "no"]
    assert row(page, "preprocess, share of its limit")[2:] == ["0.85 (0.70 to 0.90)", "yes"]
    assert row(page, "embed, share of its limit")[2:] == ["0.80", "no"]
    assert row(page, "`catdog --help`")[2:] == ["0.20", "yes"]
    assert row(page, "12,000", "split")[2:4] == ["31.0 (20.0 to 40.0)", "387"]
    assert row(page, "200", "DVC itself")[2] == "15.0 (10.0 to 20.0)"
    # Pair by pair: 500 / 50 and 500 / 100.
    assert row(page, "200", "`ImageDataGenerator`")[-3:] == ["7.5 (5.0 to 10.0)", "37.5 (25.0 to 50.0)", "20.0"]
    assert row(page, "read")[3:5] == ["50 MB/s", "1,000"]
    assert row(page, "embed", "100")[4:7] == ["100", "80", "0.80"]
    assert row(page, "split", "2.0 s, 500 MB")[3:] == ["1.00", "2.00", "0.0", "+0.0"]


@pytest.mark.parametrize("left_out", ["nothing", "pipeline", "tutorial", "limits", "scale"])
def test_a_part_that_was_not_measured_is_left_out(left_out, tmp_path):
    kept = {key: value for key, value in MEASUREMENTS.items() if key.split("/")[0] != left_out}
    results = {"facts": FACTS, "measurements": kept}
    page = render(results, "plot.png")
    assert ("Growth" in page) == (left_out != "scale")
    assert ("The whole pipeline:" in page) == (left_out != "pipeline")
    assert ("plain loop" in page) == (left_out != "limits")
    draw(results, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 800


def test_growth_of_a_line_is_not_above_one():
    assert math.isclose(exponent([10, 100], [10 + 10, 10 + 100]), math.log10(110 / 20))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--counts", "20"], "20 images are too few to be measured; use 100 or more"),
        (["--set-param", "views"], "PARAMS has 'views'; write it as name=value, like augment.views=3"),
        (
            ["--set-param", "foo.bar=1"],
            "PARAMS has 'foo.bar', which params.yaml has not; write it as there, like augment.views=3",
        ),
        (["--set-param", "seed.x=1"], "PARAMS has 'seed.x', which params.yaml has not; write it as there, like"),
        (["--set-param", "train.hidden_units=[1"], "PARAMS has 'train.hidden_units=[1', whose value is no YAML; write"),
        (["--set-param", "seed=3", "augment.views=-1"], "params.yaml: augment.views = -1: "),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once_in_one_sentence(arguments, told):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=project.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"bench: {told}")
    assert done.stderr.count("\n") == 1
