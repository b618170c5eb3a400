"""MLflow's model registry as a mirror of the git tags, which are the truth.

A registered version is a version of MLflow's registered model of the same name, found by its tag `gto.version`. The
alias `champion` is what the stage prod serves, `previous` what prod served before; every other stage is an alias of its
own name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catdog.registry_tags import Registry
from catdog.tracking import LOCK_TAG, STAGE_TAG, connect, experiment_name, pipeline_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PRODUCTION = "prod"
CHAMPION, PREVIOUS = "champion", "previous"
VERSION_TAG = "gto.version"
FORCED_TAG = "promote.forced"
"""Why a version was promoted though checks failed."""


@dataclass(frozen=True)
class MirroredVersion:
    """A version in MLflow's registry."""

    number: str  # MLflow's own: 1, 2, ...
    tags: Mapping[str, str]
    aliases: tuple[str, ...]


def open_store(root: Path) -> MlflowClient | None:
    """Opens the tracking store; None where there is none yet, because connecting would make one."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        return None
    return connect(root)


def find_stage_run(client: MlflowClient, stage: str, stage_hash: str) -> Run | None:
    """Returns the latest run in which a stage did the work that dvc.lock names, None where the store has none.

    Args:
        client: of the tracking store.
        stage: its name.
        stage_hash: of `tracking.stage_hashes`.
    """
    experiment = client.get_experiment_by_name(experiment_name())
    if experiment is None or not stage_hash:
        return None
    found = client.search_runs(
        [experiment.experiment_id],
        f"tags.`{LOCK_TAG}` = '{stage_hash}' and tags.`{STAGE_TAG}` = '{stage}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def read_mirror(client: MlflowClient, artifact: str) -> dict[str, MirroredVersion]:
    """Returns what MLflow's registry holds of a model, by the version's name in git; {} where it has none of it."""
    from mlflow.exceptions import MlflowException

    try:
        aliases: Mapping[str, Any] = client.get_registered_model(artifact).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    found = sorted(client.search_model_versions(f"name = '{artifact}'"), key=lambda entry: int(entry.version))
    return {
        entry.tags[VERSION_TAG]: MirroredVersion(
            str(entry.version),
            dict(entry.tags),
            tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(entry.version))),
        )
        for entry in found
        if VERSION_TAG in entry.tags
    }


def wanted_aliases(registry: Registry) -> dict[str, str | None]:
    """Returns what each alias should name by the tags: a version's name, or None where the alias should not be."""
    aliases = {alias_of(stage): registry.serving(stage) for stage in registry.stages}
    if PRODUCTION in registry.stages:
        aliases[PREVIOUS] = registry.former(PRODUCTION)
    return {alias: version.name if version else None for alias, version in aliases.items()}


def alias_of(stage: str) -> str:
    """Returns the alias that names what a stage serves."""
    return CHAMPION if stage == PRODUCTION else stage


def differences(registry: Registry, mirror: Mapping[str, MirroredVersion]) -> list[str]:
    """Says in what MLflow's registry does not agree with the tags, a sentence each."""
    found = {alias: name for name, entry in mirror.items() for alias in entry.aliases}
    told = [f"{version.name} is not in MLflow" for version in registry.versions if version.name not in mirror]
    told += [
        f"{name} is in MLflow only" for name in mirror if all(version.name != name for version in registry.versions)
    ]
    told += [
        f"the alias {alias} names {found.get(alias) or 'nothing'} instead of {wanted or 'nothing'}"
        for alias, wanted in wanted_aliases(registry).items()
        if found.get(alias) != wanted
    ]
    return told


def mirror_version(
    client: MlflowClient,
    registry: Registry,
    name: str,
    *,
    train_hash: str,
    model: Callable[[], Path],
    tags: Mapping[str, str],
) -> str:
    """Makes sure that MLflow's registry has a version, and returns its number there.

    Args:
        client: of the tracking store.
        registry: what the tags say.
        name: of the version, in git.
        train_hash: of the stage `train` in dvc.lock, by which the run is found that logged the model.
        model: gives the model's file; asked where no run logged it in this store.
        tags: further tags of the version; on one that is there they are set anew.
    """
    from mlflow.exceptions import MlflowException

    there = read_mirror(client, registry.artifact).get(name)
    if there is not None:
        for key, value in tags.items():
            if there.tags.get(key) != value:
                client.set_model_version_tag(registry.artifact, there.number, key, value)
        return there.number
    run = find_stage_run(client, "train", train_hash)
    if run is None or not run.outputs or not run.outputs.model_outputs:
        run = _log_model(client, registry.artifact, name, model())
    try:
        client.create_registered_model(registry.artifact)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The model that a run logged last is the one that it left.
    model_id = max(run.outputs.model_outputs, key=lambda output: output.step).model_id
    made = client.create_model_version(
        registry.artifact,
        f"models:/{model_id}",
        run.info.run_id,
        tags={VERSION_TAG: name, **tags},
        await_creation_for=0,
        model_id=model_id,
    )
    return str(made.version)


def mirror_aliases(client: MlflowClient, registry: Registry) -> list[str]:
    """Makes MLflow's aliases those of the tags, as far as their versions are in MLflow; returns the changed ones."""
    mirror = read_mirror(client, registry.artifact)
    found = {alias: name for name, entry in mirror.items() for alias in entry.aliases}
    changed = []
    for alias, wanted in wanted_aliases(registry).items():
        if found.get(alias) == wanted:
            continue
        if wanted in mirror:
            client.set_registered_model_alias(registry.artifact, alias, mirror[wanted].number)
        elif alias in found:
            client.delete_registered_model_alias(registry.artifact, alias)
        else:
            continue
        changed.append(alias)
    return changed


def _log_model(client: MlflowClient, artifact: str, name: str, model: Path) -> Run:
    """Logs a model's file in a run of its own, as `train` would have done in this store."""
    from catdog.serving import log_served_model

    experiment = pipeline_experiment(client)
    run = client.create_run(experiment.experiment_id, run_name=f"{artifact} {name}", tags={VERSION_TAG: name})
    log_served_model(run.info.run_id, model)
    return client.get_run(run.info.run_id)
