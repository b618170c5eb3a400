"""dvc.yaml against the code: nothing that a stage uses is missing, nothing that it names is absent."""

import ast
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
# What these do cannot change an output, or reaches it through the parameters that a stage names.
NEUTRAL = {"catdog", *(f"catdog.{name}" for name in ("config", "paths", "errors", "files", "tracking", "serving"))}
NEUTRAL |= {f"catdog.{name}" for name in ("parallel", "progress", "second_process", "signals", "startup")}
HEAVY = ("keras", "tensorflow", "mlflow", "openvino")

DEFINITION = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = DEFINITION["stages"]
EACH_STAGE = pytest.mark.parametrize("name", STAGES)


def names_of(entries) -> list[str]:
    """The paths of outs, metrics or plots, each a text or a mapping with settings."""
    return [name for entry in entries or () for name in (entry if isinstance(entry, dict) else [entry])]


def outs(stage: dict) -> list[str]:
    return [name for kind in ("outs", "metrics", "plots") for name in names_of(stage.get(kind))]


ALL_OUTS = [out for stage in STAGES.values() for out in outs(stage)]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST) -> set[str]:
    """Names of the catdog modules imported anywhere in a file, but for type checkers."""
    found = set()
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports are not followed here"
            found |= {child.module} | {f"{child.module}.{alias.name}" for alias in child.names}
        found |= imports(child)
    return {name for name in found if module_file(name) is not None}


def module_file(name: str) -> Path | None:
    path = SOURCE.joinpath(*name.split("."))
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return found[0] if f"{name}.".startswith("catdog.") and found else None


@cache
def imports_of(file: Path) -> frozenset[str]:
    return frozenset(imports(ast.parse(file.read_text(encoding="utf-8"))))


def modules_used(script: Path) -> set[str]:
    """Modules imported by a script and by what it imports; neutral ones are not followed."""
    found: set[str] = set()
    waiting = [script]
    while waiting:
        new = imports_of(waiting.pop()) - found - NEUTRAL
        found |= new
        waiting += [module_file(name) for name in new]
    return found


def covers(entries: list[str], path: str) -> bool:
    return any(path == entry or path.startswith(entry + "/") for entry in entries)


def test_definition_has_the_pipelines_stages():
    assert list(STAGES) == ["source", "download", "split", "preprocess", "embed", "train", "evaluate", "track"]


@EACH_STAGE
def test_command_runs_the_stages_script_which_is_among_its_deps(name):
    stage = STAGES[name]
    assert stage["cmd"] == f"PYTHONPATH=src python stages/{name}.py"
    assert covers(stage["deps"], f"stages/{name}.py")
    assert (ROOT / "stages" / f"{name}.py").is_file()


def test_import_finder_sees_every_way_to_import():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "import catdog.labels\n"
        "from catdog import images\n"
        "def f():\n    from catdog.split import assign_splits\n"
        "if TYPE_CHECKING:\n    from catdog.plots import plot_roc\n"
    )
    assert imports(tree) == {"catdog", "catdog.labels", "catdog.images", "catdog.split"}


@EACH_STAGE
def test_every_module_that_the_script_imports_is_a_dep(name):
    used = modules_used(ROOT / "stages" / f"{name}.py")
    files = sorted(module_file(module).relative_to(ROOT).as_posix() for module in used)
    assert [file for file in files if not covers(STAGES[name]["deps"], file)] == []


@EACH_STAGE
def test_no_module_is_a_dep_that_the_script_does_not_import(name):
    used = {module_file(module).relative_to(ROOT).as_posix() for module in modules_used(ROOT / "stages" / f"{name}.py")}
    listed = [dep for dep in STAGES[name]["deps"] if dep.startswith("src/catdog/") and dep.endswith(".py")]
    assert [dep for dep in listed if dep not in used] == []


@EACH_STAGE
def test_every_dep_is_in_the_repository_or_made_by_an_earlier_stage(name):
    earlier = [out for stage in list(STAGES)[: list(STAGES).index(name)] for out in outs(STAGES[stage])]
    absent = [dep for dep in STAGES[name]["deps"] if not covers(earlier, dep) and not (ROOT / dep).exists()]
    assert absent == []
    ignored = [dep for dep in STAGES[name]["deps"] if not covers(earlier, dep) and is_ignored(dep)]
    assert ignored == []


def params_of(stage: dict) -> list[str]:
    return names_of(stage.get("params"))


@EACH_STAGE
def test_every_parameter_named_exists(name):
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for entry in params_of(STAGES[name]):
        place = values
        for part in entry.split("."):
            assert part in place, entry
            place = place[part]


# Modules that a stage gives all of its parameters, as `params`.
GIVEN_PARAMS = {"preprocess": "preprocessing", "embed": "embedding"}


def parameters_read(script: Path, whole: str = "run.params") -> set[str]:
    """Dotted names of `run.params...` in a stage script, also through `params = run.params.block`."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    prefix = {"params": None, whole: ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "params":
            prefix["params"] = ast.unparse(node.value).removeprefix("run.params").lstrip(".")
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            for start, block in prefix.items():
                if text.startswith(start + ".") and block is not None:
                    found.add(".".join(filter(None, [block, text.removeprefix(start + ".")])))
    # Of `split.max_megapixels` and `split`, only the longer says what is read.
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


@EACH_STAGE
def test_every_parameter_that_the_script_reads_is_named(name):
    stage = STAGES[name]
    if covers(stage["deps"], "params.yaml"):
        return
    if name == "source":  # reads params.yaml without judging it
        assert params_of(stage) == ["dataset", "backbone", "weights", "split.file", "split.exclude"]
        return
    read = parameters_read(ROOT / "stages" / f"{name}.py")
    if name in GIVEN_PARAMS:
        given = parameters_read(SOURCE / "catdog" / f"{GIVEN_PARAMS[name]}.py", "params")
        assert {"preprocess", "embed"} & given
        read |= given
    assert read, "a stage reads parameters"
    known = [entry.replace(".", "/") for entry in params_of(stage)]
    # No output holds them: download only checks that the weights are there, these stages draw nothing, and where they
    # compute makes no difference.
    harmless = {
        "download": {"backbone", "weights"},
        "preprocess": {"seed", "compute"},
        "embed": {"compute"},
        "train": {"model_dump"},
        "evaluate": {"seed", "embed.batch_size"},
    }.get(name, set())
    assert sorted(entry for entry in read - harmless if not covers(known, entry.replace(".", "/"))) == []


def test_plots_and_artifacts_name_outputs():
    shown = [entry for entry in DEFINITION["plots"] if isinstance(entry, str)]
    for entry in DEFINITION["plots"]:
        if isinstance(entry, dict):
            (settings,) = entry.values()
            shown += list(settings["y"]) if isinstance(settings["y"], dict) else [next(iter(entry))]
    assert len(shown) > 5
    within = tuple(f"{out}/" for out in ALL_OUTS)
    assert [name for name in shown if name not in ALL_OUTS and not name.startswith(within)] == []
    assert [artifact["path"] for artifact in DEFINITION["artifacts"].values() if artifact["path"] not in ALL_OUTS] == []


def test_no_output_has_two_stages():
    assert len(set(ALL_OUTS)) == len(ALL_OUTS)


def is_ignored(path: str) -> bool:
    """Whether .gitignore covers a path, whether or not git tracks it already."""
    done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT, check=False)
    assert done.returncode in (0, 1)
    return done.returncode == 0


@pytest.mark.parametrize("out", ALL_OUTS)
def test_outputs_are_ignored_by_git_but_for_the_metrics(out):
    assert is_ignored(out) == (out != "reports/metrics.json")


def test_metrics_are_kept_by_git_and_not_by_dvc():
    settings = [m["reports/metrics.json"] for s in STAGES.values() for m in s.get("metrics", ())]
    assert settings == [{"cache": False}]


@EACH_STAGE
def test_no_stage_depends_on_the_tracking_store(name):
    named = [*STAGES[name]["deps"], *outs(STAGES[name])]
    assert [path for path in named if path.startswith(("mlruns", "mlflow.db")) or path in (".", "./")] == []


def test_last_stage_has_no_outputs_so_that_it_is_never_restored():
    assert outs(STAGES["track"]) == []
    assert {"src/catdog", "stages", "params.yaml"} <= set(STAGES["track"]["deps"])


def fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_starts_no_framework():
    names = sorted(f"catdog.{file.stem}" for file in (SOURCE / "catdog").glob("*.py"))
    names = [name for name in names if name not in ("catdog.__init__", "catdog.served_model", "catdog.serving")]
    assert len(names) > 15
    code = (
        "import importlib, json, sys\nstarted = {}\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    for heavy in {HEAVY!r}:\n"
        "        if heavy in sys.modules: started.setdefault(heavy, name)\n"
        "print(json.dumps(started))"
    )
    assert json.loads(fresh_process(code)) == {}


def test_command_line_starts_quickly():
    started = time.monotonic()
    fresh_process("import catdog.cli")
    assert time.monotonic() - started < 3  # seconds, on a busy machine; with a framework it is twice that
    loaded = fresh_process("import sys, catdog.cli; print(*sys.modules)").split()
    assert [name for name in (*HEAVY, "pandas", "matplotlib", "sklearn", "scipy") if name in loaded] == []
