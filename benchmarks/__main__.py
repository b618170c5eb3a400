"""`make bench`: measures, and writes benchmarks/results/<name>.json, .md and .png."""

from __future__ import annotations

import argparse
import functools
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figure import draw
from benchmarks.limits import STEPS, measure_limits
from benchmarks.pictures import collect_archives, write_generated, write_photographs
from benchmarks.pipeline import make_finished, measure_again, measure_pipeline
from benchmarks.project import ROOT, Project, new_project, write_params
from benchmarks.recipes import EPOCHS
from benchmarks.results import Results, collect_facts
from benchmarks.scale import PARAMS, measure_near_duplicates, measure_scale
from benchmarks.tables import render
from benchmarks.tutorial import measure_recipes, write_folders
from catdog import paths
from catdog.config import load_params
from catdog.errors import CatdogError
from catdog.files import read_json, require_disk_space, write_text

RESULTS = Path(__file__).with_name("results")
PARTS = ("pipeline", "tutorial", "limits", "scale")
COUNTS = (2000, 12_000, 25_000)
SCALE = (1000, 10_000, 100_000)
LEAST = 100
"""With fewer images a step is too short to be timed, and a split too small for a batch."""
RECIPE_IMAGES = 2000
LIMIT_IMAGES = 4000
"""Photographs on which a step is compared with its limit: more would say the same."""


def main() -> int:
    """Runs the command line and returns the exit code: 2 for a mistake, which is told in one sentence."""
    options = _parser().parse_args()
    # A terminated run also ends what it started, and removes its folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _run(options)
    except CatdogError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--photographs", nargs="*", type=Path, default=[], help="archives or folders; default: drawn")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="numbers of photographs")
    parser.add_argument(
        "--scale", nargs="*", type=int, help=f"numbers of generated pictures; default: {SCALE}, up to 4 x counts"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often all but scale is measured")
    parser.add_argument("--epochs", type=int, default=1, help=f"of the recipes that are run, 1 to {EPOCHS}")
    parser.add_argument(
        "--set-param", nargs="*", default=[], metavar="NAME=VALUE", help="change params.yaml for the part pipeline"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--name", default=time.strftime("%Y-%m-%d-%H%M"), help="of the files in benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="go on with the results of this name")
    parser.add_argument("--report", action="store_true", help="only write the tables and the plot of this name again")
    return parser


def _run(options: argparse.Namespace) -> None:
    target = RESULTS / f"{options.name}.json"
    if options.report:
        if not target.exists():
            raise CatdogError(f"{target} is not there; NAME must be that of a former run")
        _write_report(target)
        return
    scale = [count for count in SCALE if count <= 4 * max(options.counts)] if options.scale is None else options.scale
    for count in (*options.counts, *scale):
        if count < LEAST:
            raise CatdogError(f"{count} images are too few to be measured; use {LEAST} or more")
    if options.rounds < 1:
        raise CatdogError(f"ROUNDS = {options.rounds}; use 1 or more")
    if not 1 <= options.epochs <= EPOCHS:
        raise CatdogError(f"EPOCHS = {options.epochs}; use 1 to {EPOCHS}")
    settings = {
        "params": _parse_params(options.set_param),
        "recipe_epochs": options.epochs,
        "recipe_images": RECIPE_IMAGES,
        "limit_images": LIMIT_IMAGES,
        "scale": PARAMS,
    }
    facts = collect_facts([path.name for path in options.photographs], settings)
    results = Results(target, facts, resume=options.resume)
    with tempfile.TemporaryDirectory(prefix="catdog-bench-") as folder:
        try:
            _measure(results, Workplace(Path(folder), options.photographs, settings), options, scale)
        finally:
            if target.exists():
                _write_report(target)


def _parse_params(given: list[str]) -> dict[str, Any]:
    """Raises CatdogError unless params.yaml has each name, and may have each value."""
    values = {}
    known = load_params(ROOT / paths.PARAMS).flat()
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise CatdogError(f"PARAMS has {text!r}; write it as name=value, like augment.views=3")
        if name not in known:
            raise CatdogError(
                f"PARAMS has {name!r}, which {paths.PARAMS} has not; write it as there, like augment.views=3"
            )
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CatdogError(f"PARAMS has {text!r}, whose value is no YAML; write it as in {paths.PARAMS}") from None
    with tempfile.TemporaryDirectory(prefix="catdog-bench-") as folder:
        changed = Path(shutil.copy(ROOT / paths.PARAMS, folder))
        write_params(changed, values)
        load_params(changed)
    return values


def _measure(results: Results, work: Workplace, options: argparse.Namespace, scale: list[int]) -> None:
    parts = options.only
    compared = min(max(options.counts), LIMIT_IMAGES)
    for number in range(options.rounds):
        # The parts take turns, so that what drifts in the machine's speed meets all of them.
        for count in options.counts:
            if "pipeline" in parts:
                results.take(f"pipeline/{count}", number, functools.partial(work.pipeline, count))
            if "tutorial" in parts:
                results.take(f"tutorial/{count}", number, functools.partial(work.tutorial, count))
        if "limits" in parts:
            for step in STEPS:
                results.take(f"limits/{step}", number, functools.partial(work.limits, compared, step))
    if "scale" in parts:
        for count in sorted(scale):
            results.take(f"scale/{count}", 0, functools.partial(work.scale, count))
        if scale:
            results.take("near_duplicates", 0, measure_near_duplicates)


class Workplace:
    """The folder in which the archives and the projects lie; each is made when it is needed first."""

    def __init__(self, folder: Path, given: list[Path], settings: dict[str, Any]) -> None:
        """Takes an empty folder, the photographs that were given, and the settings as they are saved."""
        self._folder, self._settings = folder, settings
        self._collect = functools.cache(lambda: collect_archives(given, folder / "given"))
        self._archive = functools.cache(self._write_photographs)
        self._recipes_project = functools.cache(self._prepare_recipes)
        self._limits_project = functools.cache(
            lambda count: make_finished(folder / "limits", {"dataset": str(self._archive(count))})
        )
        self._finished: tuple[int, Project] | None = None  # what `pipeline` made last, and for which count

    def pipeline(self, count: int) -> object:
        """Measures the pipeline."""
        self._finished = None
        params = {"dataset": str(self._archive(count))} | self._settings["params"]
        project, measured = measure_pipeline(self._folder / "pipeline", params)
        measured |= measure_again(project)
        self._finished = (count, project)
        return measured

    def tutorial(self, count: int) -> object:
        """Measures the tutorials' recipes."""
        project = self._recipes_project(count)
        return measure_recipes(project, epochs=self._settings["recipe_epochs"], limit=RECIPE_IMAGES)

    def limits(self, count: int, step: str) -> object:
        """Measures a step beside its limit."""
        finished = self._finished
        # The project of the part pipeline will do, where that has changed no parameters.
        usable = finished is not None and finished[0] == count and not self._settings["params"]
        return measure_limits(finished[1] if finished and usable else self._limits_project(count), step)

    def scale(self, count: int) -> object:
        """Measures the pipeline on generated pictures."""
        archive = self._folder / f"generated-{count}.zip"
        write_generated(archive, count)
        self._require_space(archive, count)
        self._finished = None
        measured = measure_scale(self._folder / "pipeline", archive)
        archive.unlink()
        return measured

    def _prepare_recipes(self, count: int) -> Project:
        folder = self._folder / f"tutorial-{count}"
        project = new_project(folder, {"dataset": str(self._archive(count))})
        project.run("dvc", "repro", "split")
        write_folders(project)
        return project

    def _write_photographs(self, count: int) -> Path:
        archive = self._folder / f"photographs-{count}.zip"
        write_photographs(archive, self._collect(), count)
        self._require_space(archive, count)
        return archive

    def _require_space(self, archive: Path, count: int) -> None:
        # The archive in the project and in DVC's cache; the shards, the features and the recipes' files likewise.
        needed = 4 * archive.stat().st_size + 60_000 * count
        require_disk_space(self._folder, needed, f"measuring {count:,} images")


def _write_report(target: Path) -> None:
    results = read_json(target)
    write_text(target.with_suffix(".md"), render(results, target.with_suffix(".png").name))
    draw(results, target.with_suffix(".png"))
    print(f"{target.with_suffix('.md')}, {target.with_suffix('.png')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
