"""Published recipes by name: sets of parameters that `dvc exp run` takes.

A recipe is a file `recipes/<name>.yaml`. It holds the parameters that differ from params.yaml, in the same blocks. The
comment at its head describes it: the first line says what it is, and a line that begins with "Published:" says what
its source reports.

It starts from the params.yaml of the last commit: `dvc exp run` leaves the parameters of one experiment in the working
copy, where they would become part of the next.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catdog import paths
from catdog.config import leaves, load_params, validate_params
from catdog.errors import CatdogError
from catdog.files import parse_yaml

FOLDER = Path("recipes")
_HYDRA_WORDS = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True)
class Recipe:
    """One published way to train.

    Attributes:
        name: the file's name without its ending.
        about: what it is, in one line.
        published: what its source reports, in one line; empty where it says nothing.
        overrides: what to change in params.yaml, text by dotted name, as `dvc exp run -S` takes it.
    """

    name: str
    about: str
    published: str
    overrides: Mapping[str, str]


def list_recipes(root: Path) -> list[Recipe]:
    """Returns all recipes of the repository at `root`, by name; raises CatdogError as `get_recipe`."""
    return [get_recipe(root, name) for name in _names(root)]


def get_recipe(root: Path, name: str) -> Recipe:
    """Reads a recipe and checks it against the parameters of the repository.

    Args:
        root: of the repository, which holds params.yaml and the folder recipes.
        name: of the recipe.

    Raises:
        CatdogError: no recipe has this name, the file is not YAML, or it holds an unknown parameter or an
            impossible value.
    """
    known = _names(root)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? The recipes are" if close else "choose one of"
        raise CatdogError(f"there is no recipe '{name}': {hint} {', '.join(known) or 'none'}")
    path = root / FOLDER / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    overlay = _read(path)
    validate_params(_laid_over(overlay, _committed_params(root)), source=str(FOLDER / path.name))
    about, published = _description(text)
    return Recipe(name, about, published, dict(_flat(overlay)))


def recipe_command(root: Path, recipe: Recipe, extra: Sequence[str] = (), *, queue: bool = False) -> list[str]:
    """Returns the command that runs a recipe, on the parameters of the last commit.

    Args:
        root: of the repository.
        recipe: from `get_recipe`.
        extra: further changes, each "key=value" as `dvc exp run -S` takes it; they win over the recipe's.
        queue: put the experiment into DVC's queue instead of running it; then a value may be several, as "a,b".

    Returns:
        The arguments, `dvc` first.

    Raises:
        CatdogError: a further change is not "key=value", or there is no such parameter; or params.yaml
            differs from the last commit in a parameter that the command does not set.
    """
    known = load_params(root / paths.PARAMS).flat()
    overrides = dict(recipe.overrides)
    for change in extra:
        key, equals, value = change.partition("=")
        if not equals:
            raise CatdogError(f"-S {change} changes nothing: write it as KEY=VALUE, for example -S train.epochs=5")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise CatdogError(
                f"-S {change}: there is no parameter {key}; "
                + (f"did you mean {close[0]}?" if close else f"{paths.PARAMS} lists them all")
            )
        overrides[key] = value
    # Not set back by further -S: emptying a list in this way, DVC 3.67 writes a params.yaml that is no YAML.
    committed = dict(_flat(_committed_params(root)))
    here = _flat(_read(root / paths.PARAMS))
    left = [key for key, value in here if key not in overrides and committed.get(key, value) != value]
    if left:
        raise CatdogError(
            f"{paths.PARAMS} differs from the last commit in {', '.join(left)}, which would become part of the recipe: "
            f"`git checkout {paths.PARAMS}` first, or commit it"
        )
    changes = [argument for key, value in overrides.items() for argument in ("-S", f"{key}={value}")]
    return ["dvc", "exp", "run", *(["--queue"] if queue else []), *changes]


def run_command(root: Path, command: Sequence[str]) -> int:
    """Runs a command of `recipe_command` at the root of the repository and returns its exit code.

    Raises:
        CatdogError: `dvc` is not on PATH.
    """
    if shutil.which(command[0]) is None:
        raise CatdogError(f"{command[0]} is not on PATH; activate the environment first: source .venv/bin/activate")
    return subprocess.run(command, cwd=root, check=False).returncode


def _names(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def _committed_params(root: Path) -> dict[str, Any]:
    """Returns the params.yaml of the last commit, or of the working copy where nothing is committed."""
    command = ["git", "show", f"HEAD:./{paths.PARAMS}"]
    committed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if committed.returncode != 0:
        return _read(root / paths.PARAMS)
    return _parse(committed.stdout, f"the committed {paths.PARAMS}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise CatdogError(f"{path} does not exist; run from the repository root") from None
    except UnicodeDecodeError as error:
        raise CatdogError(f"{path} is not valid YAML: {error}") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    tree = parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise CatdogError(f"{source} holds no parameters; give those that differ from {paths.PARAMS}")
    return tree


def _laid_over(overlay: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with the overlay's values in place of its own."""
    result = dict(tree)
    for key, value in overlay.items():
        below = result.get(key)
        result[key] = _laid_over(value, below) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for names, value in leaves(tree):
        if not isinstance(value, Mapping):  # an empty block sets nothing
            yield ".".join(names), _override_text(value)


def _override_text(value: object) -> str:
    """Writes a value as Hydra reads it, whose grammar `-S` has."""
    if isinstance(value, str):
        # What Hydra could read as something else stands in quotes (hydra.cc, "Extended Override syntax").
        plain = re.fullmatch(r"[A-Za-z][\w/.+-]*", value) and value.lower() not in _HYDRA_WORDS
        return value if plain else "'" + value.replace("'", r"\'") + "'"
    return json.dumps(value, separators=(",", ":"))


def _description(text: str) -> tuple[str, str]:
    """Takes what the recipe is and what its source reports from the comment at the head of the file."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    about = head[0] if head else ""
    published = [line.removeprefix("Published:").strip() for line in head if line.startswith("Published:")]
    return about, published[0] if published else ""
