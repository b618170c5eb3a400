"""What DVC knows of a commit's model: its hash, whether dvc.lock is in step, where the bytes are, and how to get them.

Objects are looked for by their hash, with the remotes of the present configuration: one that moved since a commit was
made, or that was added later, is found all the same.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catdog import paths
from catdog.errors import CatdogError
from catdog.files import parse_yaml, read_json, written_aside
from catdog.registry_tags import VERSION, Registry, Version, git, read_registry, try_git
from catdog.tracking import dvc_hash, stage_hashes

CACHE = Path(".cache/catdog/models")
"""Where `resolve_model` keeps models, in the home folder."""


@dataclass(frozen=True)
class LockedModel:
    """A model as dvc.yaml and dvc.lock of a commit name it."""

    artifact: str
    commit: str
    path: str
    md5: str
    size: int  # bytes
    outs: Mapping[str, str]  # hashes of all outputs in dvc.lock, by path


def find_artifact(root: Path, commit: str, name: str | None) -> str:
    """Returns the name of the model in dvc.yaml's `artifacts:`.

    Args:
        root: of the repository.
        commit: whose dvc.yaml is asked.
        name: as the user gave it; None: of the artifact whose path is that of the model that `train` writes.

    Raises:
        CatdogError: dvc.yaml has no such artifact, or several where one must be named.
    """
    artifacts = _artifacts(read_yaml(try_git(root, "show", f"{commit}:dvc.yaml"), "dvc.yaml"))
    known = ", ".join(artifacts) or "none"
    if name is not None:
        if name not in artifacts:
            raise CatdogError(f"dvc.yaml has no artifact {name!r}; under `artifacts:` stand: {known}")
        return name
    named = [key for key, path in artifacts.items() if Path(path) == paths.MODEL]
    if len(named) != 1:
        raise CatdogError(
            f"dvc.yaml has {len(named)} artifacts with the path {paths.MODEL}, where one is needed or --name; "
            f"under `artifacts:` stand: {known}"
        )
    return named[0]


def _artifacts(pipeline: Mapping[str, Any]) -> dict[str, str]:
    """The paths of the artifacts by their names."""
    entries = pipeline.get("artifacts") or {}
    return {name: entry["path"] for name, entry in entries.items() if isinstance(entry, dict) and "path" in entry}


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """Reads names and values from YAML 1.2; {} where the text holds something else, CatdogError where it is none."""
    tree = parse_yaml(text, source)
    return tree if isinstance(tree, dict) else {}


def read_locked(scm: Any, commit: str, artifact: str) -> LockedModel:
    """Reads what dvc.yaml and dvc.lock of a commit say of a model.

    Args:
        scm: the git repository, as `scmrepo.git.Git`.
        commit: its hash.
        artifact: the model's name.

    Raises:
        CatdogError: one of the files does not name the model.
    """
    files, short = scm.get_fs(commit), commit[:7]

    def read(name: str) -> dict[str, Any]:
        try:
            text = files.open(name, "r", encoding="utf-8").read()
        except FileNotFoundError:
            raise CatdogError(f"{name} is not in commit {short}; `git add {name}` and commit it") from None
        return read_yaml(text, f"{name} of commit {short}")

    path = _artifacts(read("dvc.yaml")).get(artifact)
    if path is None:
        raise CatdogError(f"dvc.yaml of commit {short} has no artifact {artifact!r}")
    entries = [out for stage in read("dvc.lock").get("stages", {}).values() for out in stage.get("outs", [])]
    outs = {out["path"]: out["md5"] for out in entries if "md5" in out}
    if path not in outs:
        raise CatdogError(f"dvc.lock of commit {short} does not know {path}; `dvc repro`, then commit dvc.lock")
    size = next(out.get("size", 0) for out in entries if out["path"] == path)
    return LockedModel(artifact, commit, path, outs[path], size, outs)


def read_stage_hashes(root: Path, commit: str) -> dict[str, str]:
    """Returns `tracking.stage_hashes` of the dvc.lock of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "dvc.lock"
        lock.write_text(git(root, "show", f"{commit}:dvc.lock"), encoding="utf-8")
        return stage_hashes(lock)


def find_stale(root: Path, commit: str, model_path: str) -> tuple[list[str], list[str]]:
    """Compares a commit's dvc.lock with its files, for all stages behind the model and its metrics.

    A stage is in step when its command, its parameters, its files in git and the outputs of other stages that it reads
    are those that dvc.lock names. Nothing in the workspace plays a part.

    Returns:
        In what they differ, a sentence each; and the paths of the outputs that DVC keeps of these stages.
    """
    with _open(root, commit) as repo:
        stages = list(repo.index.stages)
        producers = {out.def_path: (stage, out) for stage in stages for out in stage.outs}
        wanted = [model_path, paths.METRICS.as_posix()]
        behind: dict[str, Any] = {}
        while wanted:
            found = _producer(wanted.pop(), producers)
            if found is not None and found[0].addressing not in behind:
                stage = found[0]
                behind[stage.addressing] = stage
                wanted += [dep.def_path for dep in stage.deps]
        stale = [
            f"{getattr(stage, 'name', stage.addressing)}: {difference}"
            for stage in stages
            if stage.addressing in behind
            for difference in _differences(stage, producers)
        ]
        outs = [out.def_path for stage in behind.values() for out in stage.outs if out.use_cache]
    return stale, sorted(outs)


def _differences(stage: Any, producers: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    if not any(out.hash_info for out in stage.outs):
        yield "is not in dvc.lock"
        return
    if stage.changed_stage():
        yield "its command changed"
    for dep in stage.deps:
        found = _producer(dep.def_path, producers)
        if found is not None:
            if _hash_in(found[1], dep.def_path) not in (None, dep.hash_info):
                yield f"{dep.def_path} is another by now"
            continue
        for change in dep.status().values():
            keys = ", ".join(change) if isinstance(change, dict) else ""
            yield f"{dep.def_path} changed{f' ({keys})' if keys else ''}"
    for out in stage.outs:
        # What git keeps, like the metrics, must be what the stage wrote.
        if not out.use_cache and out.status():
            yield f"{out.def_path} is not what the stage wrote"


def _producer(path: str, producers: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """Returns the stage and the output that a path is, or lies in; None where no stage writes it."""
    for known in (path, *(parent.as_posix() for parent in Path(path).parents)):
        if known in producers:
            return producers[known]
    return None


def _hash_in(out: Any, path: str) -> Any:
    """Returns the hash of an output, or of a file in its folder; None where the cache has no list of the folder."""
    from dvc_data.hashfile.tree import Tree

    if out.def_path == path:
        return out.hash_info
    local = out.repo.cache.local
    if not local.exists(out.hash_info.value):
        return None
    inside = Path(path).relative_to(out.def_path).parts
    return next((digest for key, _, digest in Tree.load(local, out.hash_info) if key == inside), "no such file")


@contextlib.contextmanager
def _open(source: Path | str, commit: str | None = None) -> Iterator[Any]:
    """Opens a DVC repository: a folder, at a commit where one is named, or an address, which is cloned."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo(str(source), rev=commit) if isinstance(source, Path) else Repo.open(source) as repo:
            yield repo
    except NotDvcRepoError:
        raise CatdogError(f"{source} is no DVC repository; `dvc init` makes one") from None
    except (DvcException, SCMError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise CatdogError(
            f"{source} cannot be read as a DVC repository ({cause}); check its address and its HEAD"
        ) from None


def has_remote(root: Path) -> bool:
    """Says whether a default remote of DVC is configured."""
    with _open(root) as repo:
        return bool(repo.config["core"].get("remote"))


@contextlib.contextmanager
def _remote(repo: Any) -> Iterator[Any]:
    """Yields the object store of the default remote, None where there is none; tells in a sentence when it fails."""
    name = repo.config["core"].get("remote")
    try:
        yield repo.cloud.get_remote_odb() if name else None
    except CatdogError:
        raise
    except Exception as error:  # every kind of remote has its own
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CatdogError(f"DVC's remote {name} failed ({cause}); check its address and its credentials") from None


def find_missing(root: Path, outs: Mapping[str, str]) -> list[str]:
    """Returns the paths of the outputs that are neither in DVC's cache nor in its remote; `outs` are hashes by path."""
    with _open(root) as repo:
        absent = [path for path, md5 in outs.items() if not repo.cache.local.exists(md5)]
        if not absent:
            return []
        with _remote(repo) as remote:
            return [path for path in absent if remote is None or not remote.exists(outs[path])]


def push_outs(root: Path, outs: Mapping[str, str]) -> int | None:
    """Sends outputs to DVC's default remote, as far as the cache has them; `outs` are hashes by path.

    Returns:
        How many files were sent; None where no remote is configured.

    Raises:
        CatdogError: the remote failed.
    """
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    with _open(root) as repo, _remote(repo) as remote:
        if remote is None:
            return None
        local = repo.cache.local
        objects = {HashInfo("md5", md5, obj_name=path) for path, md5 in outs.items() if local.exists(md5)}
        # A folder's object is the list of its files, each an object of its own.
        folders = [Tree.load(local, entry) for entry in objects if entry.isdir]
        objects |= {file for folder in folders for _, _, file in folder if local.exists(file.value)}
        result = repo.cloud.push(objects)
        if result.failed:
            raise CatdogError(
                f"{len(result.failed)} files could not be sent to DVC's remote {repo.config['core']['remote']}; "
                "`dvc push` tells more"
            )
        return len(result.transferred)


def read_json_out(root: Path, model: LockedModel, path: Path) -> dict[str, Any]:
    """Reads a JSON object that a stage wrote beside the model; {} where it cannot be had.

    Args:
        root: of the repository.
        model: of the commit in question.
        path: of the output, in the repository.
    """
    md5 = model.outs.get(path.as_posix())
    if md5 is None:
        return {}
    with tempfile.TemporaryDirectory() as folder, _open(root) as repo:
        file = Path(folder) / path.name
        try:
            _get(repo, replace(model, path=path.as_posix(), md5=md5), file)
        except CatdogError:
            return {}
        return read_json(file)


def checkout(root: Path) -> None:
    """Brings the files that DVC keeps in line with dvc.lock; says what to do where that fails."""
    from dvc.exceptions import DvcException

    with _open(root) as repo:
        try:
            repo.checkout(allow_missing=True)
        except DvcException as error:
            cause = " ".join(str(error).split())[:200]
            print(f"the files under DVC are left as they were ({cause}); `dvc checkout` brings them in line")


def find_version(registry: Registry, reference: str) -> Version:
    """Returns the version that a stage serves, or the one of this name.

    Raises:
        CatdogError: there is none.
    """
    is_version = VERSION.fullmatch(reference) is not None
    found = registry.version(reference) if is_version else registry.serving(reference)
    if found is None:
        known = [version.name for version in registry.versions] if is_version else list(registry.stages)
        raise CatdogError(
            f"{registry.artifact} has no {'version' if is_version else 'stage'} {reference}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    return found


def run_fetch(root: Path | None, output: Path, *, reference: str, repository: str | None, name: str | None) -> int:
    """`catdog fetch`: writes the file of a promoted model; returns 0.

    Args:
        root: of the repository; unused where `repository` is given.
        output: the file to write.
        reference: a stage or a version.
        repository: path or git address of another repository to take it from.
        name: of the model in dvc.yaml; None: the only one.
    """
    if output.is_dir():
        raise CatdogError(f"-o {output} is a folder; name a file, e.g. {output / paths.MODEL.name}")
    with _open(repository or root or Path()) as repo:
        version, model = _find_model(repo, reference, name)
        try:
            _get(repo, model, output)
        except OSError as error:
            raise CatdogError(f"-o {output} cannot be written: {error.strerror}") from None
    print(f"{output}: {model.artifact} {version.name}, {model.size / 1e6:.1f} MB, md5 {model.md5}")
    return 0


def resolve_model(root: Path, reference: str, *, name: str | None = None) -> Path:
    """Returns the file of a promoted model, in a cache in the home folder; brings it there first where it is not.

    Args:
        root: of the repository.
        reference: a stage such as prod, or a version such as v1.2.0.
        name: of the model in dvc.yaml; None: the only one.

    Raises:
        CatdogError: there is no such stage or version, or its file is neither in DVC's cache nor in its remote.
    """
    with _open(root) as repo:
        _, model = _find_model(repo, reference, name)
        return cached_model(repo, model)


def cached_model(repository: Any, model: LockedModel) -> Path:
    """Returns the file of a model in the cache in the home folder; brings it there where it is not, or damaged.

    Args:
        repository: an open one (`dvc.repo.Repo`), or the root of one.
        model: which.

    Raises:
        CatdogError: it is neither in DVC's cache nor in its remote, or the home folder cannot be used.
    """
    from filelock import FileLock

    file = Path.home() / CACHE / f"{model.md5}{paths.MODEL.suffix}"

    def is_there() -> bool:
        return file.exists() and dvc_hash(file) == model.md5

    try:
        if is_there():
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not is_there():  # another process may have brought it in the meantime
                with _open(repository) if isinstance(repository, Path) else contextlib.nullcontext(repository) as repo:
                    _get(repo, model, file)
    except OSError as error:
        raise CatdogError(
            f"the model cannot be brought to {file.parent} ({error.filename or file.parent}: "
            f"{error.strerror or error}); mend that, or set HOME to a folder that can be written"
        ) from None
    return file


def _find_model(repo: Any, reference: str, name: str | None) -> tuple[Version, LockedModel]:
    if name is None:
        root = Path(repo.scm.root_dir)
        name = find_artifact(root, "HEAD", None)
    version = find_version(read_registry(repo.scm, name), reference)
    return version, read_locked(repo.scm, version.commit, name)


def _get(repo: Any, model: LockedModel, target: Path) -> None:
    """Writes a model's file from DVC's cache, else from its remote, if its hash is right."""
    local = repo.cache.local
    with written_aside(target) as aside:
        if local.exists(model.md5):
            local.fs.get_file(local.oid_to_path(model.md5), str(aside))
            if dvc_hash(aside) == model.md5:
                return
        with _remote(repo) as remote:
            if remote is None or not remote.exists(model.md5):
                raise CatdogError(
                    f"{model.path} of commit {model.commit[:7]} (md5 {model.md5}) is neither in DVC's cache nor in a "
                    "remote; `dvc push` where it was made brings it to the remote"
                )
            remote.fs.get_file(remote.oid_to_path(model.md5), str(aside))
        if dvc_hash(aside) != model.md5:
            raise CatdogError(
                f"{model.path} of commit {model.commit[:7]} came with another content than its md5 {model.md5}; "
                "`dvc push` where it was made, after removing it from the remote, mends it"
            )
