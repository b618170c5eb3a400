"""`catdog models`: the versions of a model, as git's tags and MLflow's registry have them."""

from __future__ import annotations

import json
from pathlib import Path

from catdog import paths
from catdog.errors import CatdogError
from catdog.registry_files import find_artifact
from catdog.registry_mirror import FORCED_TAG, MirroredVersion, differences, open_store, read_mirror
from catdog.registry_tags import Registry, read_registry, try_git


def run_models(root: Path, *, name: str | None = None) -> int:
    """`catdog models`: prints a line a version, and whether the two agree; returns 0.

    Args:
        root: of the repository.
        name: of the model in dvc.yaml; None: the only one.
    """
    from mlflow.exceptions import MlflowException

    artifact = find_artifact(root, "HEAD", name)
    registry = read_registry(root, artifact)
    if not registry.versions:
        print(f"{artifact} has no version yet; `catdog promote` makes the first")
        return 0
    client = open_store(root)
    try:
        mirror = read_mirror(client, artifact) if client else {}
    except MlflowException as error:
        raise CatdogError(f"MLflow's registry cannot be read: {' '.join(str(error).split())[:300]}") from None
    print(f"{artifact}\n{format_versions(root, registry, mirror)}\n")
    if client is None:
        print("there is no MLflow store here to compare git's tags with")
        return 0
    told = differences(registry, mirror)
    if not told:
        print("git's tags and MLflow's registry agree")
        return 0
    for sentence in told:
        print(sentence)
    # What is in MLflow only, no promotion takes away. Whichever stage is named, all is brought in line.
    known = {name: entry for name, entry in mirror.items() if registry.version(name)}
    serving = next((version for version in registry.versions if version.stages), None)
    if serving is not None and differences(registry, known):
        command = f"catdog promote {serving.name} --stage {serving.stages[0]}"
        print(f"`{command}` brings MLflow in line, or says what is lost")
    return 0


def format_versions(root: Path, registry: Registry, mirror: dict[str, MirroredVersion]) -> str:
    """Returns the table of versions, the highest first.

    Args:
        root: of the repository.
        registry: what the tags say.
        mirror: what MLflow's registry holds, by version.
    """
    rows = [("version", "stages", "accuracy", "commit", "registered", "by", "MLflow")]
    for version in registry.versions:
        rows.append(
            (
                version.name,
                ", ".join(version.stages) or "-",
                accuracy_text(root, version.commit),
                version.commit[:7],
                f"{version.created.astimezone():%Y-%m-%d %H:%M}",
                version.author,
                _mirrored_text(mirror.get(version.name)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _mirrored_text(entry: MirroredVersion | None) -> str:
    if entry is None:
        return "-"
    told = [*entry.aliases, *([f"forced: {entry.tags[FORCED_TAG]}"] if FORCED_TAG in entry.tags else [])]
    return f"{entry.number} ({', '.join(told)})" if told else entry.number


def accuracy_text(root: Path, commit: str) -> str:
    """Returns the accuracy in a commit's metrics; - where it has none."""
    try:
        return f"{json.loads(try_git(root, 'show', f'{commit}:{paths.METRICS.as_posix()}'))['accuracy']:.4f}"
    except (ValueError, KeyError, TypeError):
        return "-"
