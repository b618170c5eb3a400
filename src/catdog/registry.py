"""`catdog promote` and `rollback`: from an experiment to a model in DVC's registry, and back.

The git tags are the truth, and they are written last but for what can be done again: until then a promotion has only
read, and sent files to DVC's remote. What comes after them (the branch, MLflow's mirror) a second call completes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catdog import paths
from catdog.compared_runs import read_runs
from catdog.comparison import ComparedRun
from catdog.config import Params, load_params, validate_params
from catdog.errors import CatdogError
from catdog.gate import Candidate, Check, check, failures, format_checks
from catdog.registry_files import (
    LockedModel,
    cached_model,
    checkout,
    find_artifact,
    find_missing,
    find_stale,
    find_version,
    has_remote,
    push_outs,
    read_json_out,
    read_locked,
    read_stage_hashes,
    read_yaml,
)
from catdog.registry_list import accuracy_text
from catdog.registry_mirror import (
    CHAMPION,
    FORCED_TAG,
    PREVIOUS,
    PRODUCTION,
    alias_of,
    find_stage_run,
    mirror_aliases,
    mirror_version,
    open_store,
    read_mirror,
)
from catdog.registry_source import (
    Source,
    adopt_commit,
    build_commit,
    choose_version,
    find_source,
    registered_as,
    require_branch,
    require_clean,
)
from catdog.registry_tags import (
    Registry,
    Version,
    choose_remote,
    fetch_tags,
    git,
    new_tags_or_none,
    promotion_lock,
    push_tags,
    read_identity,
    read_registry,
    try_git,
    write_tags,
)
from catdog.tracking import StoreError, connect, pipeline_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Found:
    """What is to be promoted, and what is there."""

    registry: Registry
    source: Source
    version: Version | None  # as which it is registered already


@dataclass(frozen=True)
class Plan:
    """A promotion before anything is done."""

    registry: Registry
    source: Source
    commit: str  # that gets the tags; of an experiment a new one, which is on no branch yet
    outs: Mapping[str, str]  # hashes by path, of what DVC keeps of the stages behind the model
    version: str
    step: str  # why this version
    stage: str
    checks: Sequence[Check]
    branch: str  # to make; empty: none


def run_promote(
    root: Path,
    reference: str | None,
    *,
    stage: str = PRODUCTION,
    name: str | None = None,
    force: str | None = None,
    branch: str = "",
    push: bool = False,
    dry_run: bool = False,
) -> int:
    """`catdog promote`: registers a model as the next version and lets a stage serve it; returns 0.

    Args:
        root: of the repository.
        reference: a DVC experiment, a git revision or a version; None: HEAD.
        stage: that is to serve it.
        name: of the model in dvc.yaml; None: the only one.
        force: why it is promoted even though checks fail; None: it is not.
        branch: to make of the experiment; empty: its results become a commit on the present branch.
        push: send the tags to the git remote.
        dry_run: only show what would be done.

    Raises:
        CatdogError: the gate refuses, something is not as it must be, or a step failed; then no tag was made, or the
            sentence says what is left to be done by the same call.
    """
    if force is not None and not force.strip():
        raise CatdogError("--force needs a reason, e.g. --force 'the camera changed, the old model fails'")
    # In the workspace may lie the parameters of the very experiment that the gate is to judge.
    tree = read_yaml(git(root, "show", f"HEAD:{paths.PARAMS}"), f"{paths.PARAMS} of HEAD")
    params = validate_params(tree, source=f"{paths.PARAMS} of HEAD")
    artifact = find_artifact(root, "HEAD", name)
    remote = choose_remote(root) if push else ""
    with contextlib.nullcontext() if dry_run else promotion_lock(root):
        if remote and not dry_run:
            fetch_tags(root, artifact, remote)
        found = _find(root, artifact, reference, stage, branch)
        if found.version is not None and found.registry.serving(stage) == found.version:
            if dry_run:
                print(
                    f"{stage} serves {artifact} {found.version.name} already; at most MLflow's registry has to follow"
                )
            else:
                _complete(root, params, found, stage, branch, remote)
            return 0
        plan = _plan(root, params, found, stage, branch)
        print(_description(root, plan, force, remote), flush=True)
        failed = failures(plan.checks)
        if failed and force is None:
            told = "; ".join(f"{entry.name}: {entry.sentence}" for entry in failed)
            raise CatdogError(
                f"{plan.source.name} is not promoted, {len(failed)} of {len(plan.checks)} checks failed: {told}"
            )
        if not dry_run:
            _execute(root, params, plan, force, remote)
    return 0


def _find(root: Path, artifact: str, reference: str | None, stage: str, branch: str) -> Found:
    read_identity(root)
    _require_stage(root, stage)
    registry = read_registry(root, artifact)
    source = find_source(root, artifact, reference)
    require_clean(root, source)
    if branch:
        require_branch(root, source, branch)
    return Found(registry, source, registered_as(root, registry, source))


def _plan(root: Path, params: Params, found: Found, stage: str, branch: str) -> Plan:
    """Finds out what is to be done, and changes nothing."""
    registry, source, version = found.registry, found.source, found.version
    if version is not None:
        commit = version.commit
    elif source.experiment and not branch:
        commit = build_commit(root, source)
    else:
        commit = source.commit
    model = read_locked(_scm(root), commit, registry.artifact)
    stale, behind = find_stale(root, commit, model.path)
    outs = {path: model.outs[path] for path in behind if path in model.outs}
    _require_objects(root, model, outs)
    (run,) = read_runs(root, [f"git:{commit}"])
    leaks = read_json_out(root, model, paths.DATA_REPORT).get("leaks")
    candidate = Candidate(
        dataclasses.replace(run, name=source.name),
        leaks if isinstance(leaks, int) else None,
        model.size,
        _read_latency(root, params, commit),
        tuple(stale),
    )
    checks = check(candidate, _read_incumbent(root, registry.serving(stage)), params.promote)
    new, step = (version.name, "registered already") if version else choose_version(root, registry, commit)
    return Plan(registry, source, commit, outs, new, step, stage, checks, branch)


def _scm(root: Path) -> Any:
    from scmrepo.git import Git

    return Git(str(root))


def _require_stage(root: Path, stage: str) -> None:
    from gto import api

    if not re.fullmatch(r"[a-zA-Z]([\w-]*[a-zA-Z0-9])?", stage) or re.fullmatch(r"[vV]\d+", stage):
        raise CatdogError(f"--stage {stage!r} is no stage; use a word such as prod, staging or dev")
    if stage in (CHAMPION, PREVIOUS, "latest"):
        raise CatdogError(f"--stage {stage} has another meaning in MLflow's registry; use prod, staging or dev")
    allowed = api.get_stages(str(root), allowed=True)
    if allowed is not None and stage not in allowed:
        raise CatdogError(f"--stage {stage} is not among the stages in .gto: {', '.join(allowed)}")


def _require_objects(root: Path, model: LockedModel, outs: Mapping[str, str]) -> None:
    """What can be computed again from the data may be missing; the model and what it was judged by may not."""
    needed = {path: outs[path] for path in (model.path, paths.PREDICTIONS.as_posix()) if path in outs}
    missing = find_missing(root, needed)
    if missing:
        raise CatdogError(
            f"{' and '.join(missing)} of commit {model.commit[:7]} is neither in DVC's cache nor in a remote; "
            "`dvc repro` there makes it anew"
        )


def _read_latency(root: Path, params: Params, commit: str) -> float | None:
    """Milliseconds for one picture, from the run of `evaluate` that judged the model."""
    try:
        client = open_store(root)
        if client is not None:
            pipeline_experiment(client)
    except StoreError:
        # Better now than when the tags are made.
        if params.tracking.required:
            raise
        return None
    run = find_stage_run(client, "evaluate", read_stage_hashes(root, commit).get("evaluate", "")) if client else None
    latency = run.data.metrics.get("latency_ms") if run else None
    return None if latency is None else float(latency)


def _read_incumbent(root: Path, serving: Version | None) -> ComparedRun | str | None:
    if serving is None:
        return None
    try:
        (run,) = read_runs(root, [f"git:{serving.commit}"])
    except CatdogError as error:
        return f"{serving.name} cannot be compared: {error}"
    return dataclasses.replace(run, name=serving.name)


def _description(root: Path, plan: Plan, force: str | None, remote: str) -> str:
    """Says what a promotion will do, before it does it."""
    registry, serving = plan.registry, plan.registry.serving(plan.stage)
    new = registry.version(plan.version) is None
    lines = [f"{plan.source.name}, to be {registry.artifact} {plan.version} ({plan.step})", format_checks(plan.checks)]
    if plan.source.experiment and plan.commit != plan.source.commit and new:
        lines.append(f"  commit   the results of the experiment on {_present_branch(root)}")
    if plan.branch:
        lines.append(f"  branch   {plan.branch}, with the results of the experiment")
    lines.append(f"  files    {_remote_text(root, plan)}")
    if new:
        lines.append(f"  tag      {registry.artifact}@{plan.version} on {plan.commit[:7]}")
    instead = f" instead of {serving.name}" if serving else ""
    lines.append(f"  tag      {registry.artifact}#{plan.stage}#...: {plan.stage} serves {plan.version}{instead}")
    lines.append(f"  push     {f'the tags, to {remote}' if remote else 'no tags; --push does'}")
    lines.append(f"  MLflow   {registry.artifact}, tag gto.version={plan.version}, alias {alias_of(plan.stage)}")
    if force is not None and failures(plan.checks):
        lines.append(f"  forced   {force}")
    return "\n".join(lines)


def _present_branch(root: Path) -> str:
    branch = try_git(root, "symbolic-ref", "--short", "HEAD").strip()
    return f"the branch {branch}" if branch else "HEAD, which is on no branch"


def _remote_text(root: Path, plan: Plan) -> str:
    if not has_remote(root):
        return "stay in DVC's cache here; `dvc remote add --default NAME ADDRESS` sets up a place to share them"
    return f"{len(plan.outs)} outputs, to DVC's remote as far as it lacks them"


def _execute(root: Path, params: Params, plan: Plan, force: str | None, remote: str) -> None:
    """Does what was planned; when it fails before the tags are complete, none is left."""
    artifact = plan.registry.artifact
    push_outs(root, plan.outs)
    with new_tags_or_none(root, artifact):
        write_tags(root, artifact, plan.version, plan.commit, plan.stage, _message(plan, force))
        if remote:
            push_tags(root, artifact, remote)
    registry = read_registry(root, artifact)
    version = find_version(registry, plan.version)
    _adopt(root, plan.source, version, plan.branch)
    _mirror(root, params, registry, plan.stage)
    _tell(root, registry, plan.stage, remote)


def _message(plan: Plan, force: str | None) -> str:
    """The text of the tags: what was checked, and why it was forced."""
    failed = ", ".join(entry.name for entry in failures(plan.checks))
    # A reason of several lines would be cut short by whoever reads it.
    forced = f"Forced: {' '.join((force or '').split())} (failed: {failed})"
    return "\n".join(
        [
            f"{plan.registry.artifact} {plan.version} from {plan.source.name}, for {plan.stage}",
            *(["", forced] if failed else []),
            "",
            *(f"{'ok' if entry.passed else 'FAIL'} {entry.name}: {entry.sentence}" for entry in plan.checks),
        ]
    )


def _adopt(root: Path, source: Source, version: Version, branch: str) -> bool:
    """Brings the branch to an experiment's commit, and DVC's files with it; says whether it did anything."""
    if not source.experiment:
        return False
    if branch:
        if try_git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}"):
            return False
        git(root, "branch", branch, version.commit)
        return True
    # Of an experiment that was promoted by --branch, the commit is its own, and the branch is left alone.
    if version.commit == source.commit or not _is_ahead(root, version.commit):
        return False
    try:
        adopt_commit(root, source, version.commit)
    except CatdogError as error:
        raise CatdogError(
            f"{version.name} is registered, but the branch was not brought to its commit ({error}); make room and call "
            "the same command again"
        ) from None
    checkout(root)
    return True


def _is_ahead(root: Path, commit: str) -> bool:
    """Says whether a commit follows HEAD."""
    head = git(root, "rev-parse", "HEAD").strip()
    return commit != head and try_git(root, "merge-base", "HEAD", commit).strip() == head


def _complete(root: Path, params: Params, found: Found, stage: str, branch: str, remote: str) -> None:
    """Does what a promotion that was cut off left to be done."""
    registry, version = found.registry, found.version
    assert version is not None
    if remote:
        push_tags(root, registry.artifact, remote)
    adopted = _adopt(root, found.source, version, branch)
    if not (_mirror(root, params, registry, stage) or adopted):
        raise CatdogError(
            f"{registry.artifact} {version.name} is registered already, on commit {version.commit[:7]}, and serves "
            f"{stage}; nothing is left to be promoted"
        )
    _tell(root, registry, stage, remote)


def run_rollback(
    root: Path, *, stage: str = PRODUCTION, to: str | None = None, name: str | None = None, push: bool = False
) -> int:
    """`catdog rollback`: lets a stage serve an earlier version again; returns 0.

    Args:
        root: of the repository.
        stage: whose version is changed.
        to: the version; None: what it served before the present version first came to it.
        name: of the model in dvc.yaml; None: the only one.
        push: send the tags to the git remote.

    Raises:
        CatdogError: there is nothing to roll back to, its file is lost, or a step failed.
    """
    params = load_params(root / paths.PARAMS)
    artifact = find_artifact(root, "HEAD", name)
    remote = choose_remote(root) if push else ""
    with promotion_lock(root):
        if remote:
            fetch_tags(root, artifact, remote)
        registry = read_registry(root, artifact)
        serving = find_version(registry, stage)
        target = registry.before(stage) if to is None else find_version(registry, to)
        if target is None:
            raise CatdogError(f"{stage} served nothing before {serving.name}; there is nothing to roll back to")
        if target == serving:
            _complete(root, params, Found(registry, Source(target.name, target.commit), target), stage, "", remote)
            return 0
        model = read_locked(_scm(root), target.commit, artifact)
        _require_objects(root, model, {model.path: model.md5})
        message = f"{artifact} {target.name} for {stage}: rolled back from {serving.name}"
        with new_tags_or_none(root, artifact):
            write_tags(root, artifact, target.name, target.commit, stage, message)
            if remote:
                push_tags(root, artifact, remote)
        registry = read_registry(root, artifact)
        _mirror(root, params, registry, stage)
        _tell(root, registry, stage, remote)
    return 0


def _mirror(root: Path, params: Params, registry: Registry, stage: str) -> bool:
    """Brings MLflow's registry in line with the tags; says whether it did anything."""
    from mlflow.exceptions import MlflowException

    serving, former = registry.serving(stage), registry.former(stage)
    assert serving is not None
    try:
        client = connect(root)
        before = read_mirror(client, registry.artifact)
        _mirror_version(root, client, registry, serving)
        missing = [version for version in registry.versions if version != serving and version.name not in before]
        # What has an alias does not wait until the models of all others are brought from a remote.
        with_alias = [version for version in missing if version == former]
        for versions in (with_alias, [version for version in missing if version != former]):
            for version in versions:
                try:
                    _mirror_version(root, client, registry, version)
                except (CatdogError, MlflowException) as error:
                    cause = " ".join(str(error).split())[:300]
                    print(f"catdog: {version.name} is not in MLflow: {cause}", file=sys.stderr)
            mirror_aliases(client, registry)
        return read_mirror(client, registry.artifact) != before
    except (StoreError, MlflowException) as error:
        cause = " ".join(str(error).split())[:300]
        if params.tracking.required:
            raise CatdogError(
                f"{stage} serves {registry.artifact} {serving.name} in git, but MLflow's registry does not say so "
                f"({cause}); `catdog promote {serving.name} --stage {stage}` makes up for it"
            ) from None
        print(f"catdog: MLflow's registry is left as it was ({cause})", file=sys.stderr)
        return False


def _mirror_version(root: Path, client: MlflowClient, registry: Registry, version: Version) -> None:
    forced = registry.forced(version.name)
    model = read_locked(_scm(root), version.commit, registry.artifact)
    mirror_version(
        client,
        registry,
        version.name,
        train_hash=read_stage_hashes(root, version.commit).get("train", ""),
        model=lambda: cached_model(root, model),
        tags={
            "git.commit": version.commit,
            "dvc.md5": model.md5,
            **({FORCED_TAG: forced} if forced else {}),
        },
    )


def _tell(root: Path, registry: Registry, stage: str, remote: str) -> None:
    """Says what is served now, and what may be left to do."""
    serving, former = registry.serving(stage), registry.former(stage)
    assert serving is not None
    before = f"; before: {former.name}" if former else ""
    accuracy = accuracy_text(root, serving.commit)
    print(
        f"{stage} serves {registry.artifact} {serving.name}, accuracy {accuracy}, commit {serving.commit[:7]}{before}"
    )
    remotes = git(root, "remote").split()
    if remotes and not remote:
        print(f"the tags are only here; `git push --atomic {remotes[0]} 'refs/tags/{registry.artifact}*'` shares them")
