"""The `catdog` command: it starts at once, and a mistake is one sentence."""

import inspect
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from catdog import __version__, cli, paths
from catdog.model import ModelInfo

ROOT = Path(__file__).parents[1]
# Each takes longer to import than a person should wait for a list of options.
HEAVY = ("keras", "tensorflow", "mlflow", "openvino", "pandas", "matplotlib", "sklearn", "scipy", "numpy", "cv2")


def catdog(*arguments, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "catdog.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


# Runs the command as `catdog` does and says, at the end, which modules it loaded.
LOADED = """
import json, sys
from catdog.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_loaded_by(*arguments) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["audit", "--help"], ["backbones"]])
def test_help_loads_nothing_heavy(arguments):
    assert modules_loaded_by(*arguments) & set(HEAVY) == set()


def test_help_starts_at_once():
    def seconds() -> float:
        started = time.monotonic()
        done = catdog("--help")
        assert done.returncode == 0
        assert "predict" in done.stdout
        assert "audit" in done.stdout
        return time.monotonic() - started

    assert min(seconds() for _ in range(5)) < 0.5


def test_a_wrong_path_is_told_before_a_framework_is_loaded(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("catdog.json", json.dumps(asdict(ModelInfo(("a", "b"), 32, "pad", 95, "x", "random", "avg"))))
    arguments = ["predict", tmp_path / "absent.jpg", "--model", tmp_path / "model.keras"]
    told = catdog(*arguments).stderr
    assert told.startswith(f"catdog: {tmp_path}/absent.jpg does not exist; give image files, folders, archives")
    assert told.count("\n") == 1
    loaded = modules_loaded_by(*arguments)
    assert "catdog.predict" in loaded
    assert loaded & {"keras", "tensorflow", "mlflow", "openvino", "pandas"} == set()


def test_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    done = catdog("predict", tmp_path, "--model", tmp_path / "none.keras", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"catdog: there is no model at {tmp_path}/none.keras; `dvc repro` trains one\n"


def test_outside_the_repository_the_models_place_must_be_told(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    done = catdog("predict", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"catdog: {tmp_path} is not inside the project's git repository")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", "--format", "xml"], "invalid choice: 'xml'"),
        (["audit", "--top", "0"], "'0' is no whole number above 0"),
        (["audit", "--top", "1.5"], "'1.5' is no whole number above 0"),
        (["audit", "--minimum", "90"], "'90' is no number from 0 to 1"),
        (["audit", "--minimum", "nan"], "'nan' is no number from 0 to 1"),
        (["audit", "--minimum", "much"], "'much' is no number from 0 to 1"),
        (["pedict"], "invalid choice: 'pedict'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_option_is_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_version_and_backbones(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"catdog {__version__}\n"
    assert cli.main(["backbones"]) == 0
    assert "mobilenetv2" in capsys.readouterr().out


# A command that prints more than a pipe holds, and one that prints a line.
PRINTS = """
import sys
from catdog import cli
cli._list_backbones = lambda: [print("x" * 99) for _ in range({lines})] and 0
sys.exit(cli.main(["backbones"]))
"""


@pytest.mark.parametrize("lines", [1, 10_000])
def test_reader_that_leaves_early_is_no_error(lines):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS.format(lines=lines)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture
def calls(monkeypatch):
    """What the commands call in place of doing their work; arguments that the real function refuses are refused."""
    from catdog import predict, suspects

    seen = []

    def replace(module, name, result):
        signature = inspect.signature(getattr(module, name))

        def call(*arguments, **options):
            seen.append(signature.bind(*arguments, **options).arguments)
            return result

        monkeypatch.setattr(module, name, call)

    replace(predict, "run_predict", 1)
    replace(suspects, "run_audit", None)
    return seen


def test_predict_passes_its_options_on_and_returns_its_exit_code(calls):
    assert cli.main(["predict"]) == 1
    absent = dict.fromkeys(("model", "submission", "layout", "top", "threshold", "gradcam"))
    assert calls.pop() == absent | {"inputs": [], "probabilities": False}
    options = ["--model", "m.keras", "--submission", "s.csv", "--probabilities", "--format", "jsonl"]
    options += ["--top", "2", "--threshold", "0.7", "--gradcam", "maps"]
    assert cli.main(["predict", "a", "b c", *options]) == 1
    assert calls.pop() == {
        "inputs": ["a", "b c"],
        "model": "m.keras",
        "submission": Path("s.csv"),
        "probabilities": True,
        "layout": "jsonl",
        "top": 2,
        "threshold": 0.7,
        "gradcam": Path("maps"),
    }


def test_audit_passes_its_options_on_with_the_seed_of_the_parameters(calls, tmp_path, monkeypatch):
    text = (ROOT / paths.PARAMS).read_text(encoding="utf-8")
    assert "\nseed: 20 " in text
    (tmp_path / paths.PARAMS).write_text(text.replace("\nseed: 20 ", "\nseed: 77 "), encoding="utf-8")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    defaults = {"root": tmp_path, "top": 40, "minimum": 0.9, "exclude": None, "include_test": False, "seed": 77}
    assert cli.main(["audit"]) == 0
    assert calls.pop() == defaults
    assert cli.main(["audit", "--top", "7", "--minimum", "1", "--exclude", "x.csv", "--include-test"]) == 0
    assert calls.pop() == defaults | {"top": 7, "minimum": 1.0, "exclude": Path("x.csv"), "include_test": True}
