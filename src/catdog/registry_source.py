"""What is to be promoted: finds it in DVC and git, and makes a commit of an experiment."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catdog import paths
from catdog.config import leaves
from catdog.errors import CatdogError
from catdog.registry_files import read_yaml
from catdog.registry_tags import FIRST_VERSION, Registry, Version, git, next_version, try_git

LOCK = Path("dvc.lock")
EXPERIMENT_KEY = "Experiment"
"""The line in a commit's message that names the experiment it was made from."""
_RESULTS = frozenset({paths.PARAMS.as_posix(), LOCK.as_posix(), paths.METRICS.as_posix()})
"""What every experiment writes anew, whatever a promotion of another left in them."""
_EXPERIMENT_REF = re.compile("([0-9a-f]{40}) refs/exps/([0-9a-f]{2}/[0-9a-f]{38})/(.+)")


@dataclass(frozen=True)
class Source:
    """What is to be promoted."""

    name: str  # as the user called it
    commit: str
    experiment: str = ""  # the name of the DVC experiment, where it is one
    baseline: str = ""  # the commit where that started


def find_source(root: Path, artifact: str, reference: str | None) -> Source:
    """Finds what the user names: an experiment of DVC, a version, or a git revision; None is HEAD.

    Of several experiments with one name, that which started from HEAD is meant, as in DVC itself. `exp:` and `git:`
    before a name say which kind is meant.

    Raises:
        CatdogError: the name is unknown or stands for several.
    """
    kind, colon, rest = (reference or "HEAD").partition(":")
    if not colon or kind not in ("exp", "git"):
        kind, rest = "", reference or "HEAD"
    version = try_git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{artifact}@{rest}^{{commit}}").strip()
    revision = version or try_git(root, "rev-parse", "--verify", "--quiet", f"{rest}^{{commit}}").strip()
    experiments = [] if kind == "git" else _find_experiments(root)
    experiments = [entry for entry in experiments if rest == entry.name or revision == entry.commit]
    if kind == "exp":
        revision = ""
    if len(experiments) > 1:
        head = git(root, "rev-parse", "HEAD").strip()
        experiments = [entry for entry in experiments if entry.baseline == head] or experiments
    if len(experiments) > 1:
        raise CatdogError(
            f"{len(experiments)} DVC experiments are named {rest}; give the revision of the one meant: "
            + ", ".join(sorted(entry.commit[:7] for entry in experiments))
        )
    if experiments and revision not in ("", experiments[0].commit):
        raise CatdogError(
            f"{rest} is both a DVC experiment and a git revision; write exp:{rest} or git:{rest} for the one meant"
        )
    if experiments:
        return experiments[0]
    if not revision:
        raise CatdogError(
            f"there is no DVC experiment, git revision or version {rest!r}; `dvc exp list --all-commits`, "
            "`git log --all --oneline` and `catdog models` list what there is"
        )
    return Source(rest[:8] if rest == revision else rest, revision)


def _find_experiments(root: Path) -> list[Source]:
    lines = git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines()
    parts = [found.groups() for line in lines if (found := _EXPERIMENT_REF.fullmatch(line))]
    return [Source(name, commit, name, baseline.replace("/", "")) for commit, baseline, name in parts]


def registered_as(root: Path, registry: Registry, source: Source) -> Version | None:
    """Returns the version that this was registered as before; an experiment's commit says where it came from."""
    if not source.experiment:
        return registry.at_commit(source.commit)
    for version in registry.versions:
        if version.commit == source.commit or _experiment_line(source) in git(
            root, "log", "-1", "--format=%B", version.commit
        ):
            return version
    return None


def _experiment_line(source: Source) -> str:
    return f"{EXPERIMENT_KEY}: {source.experiment} {source.commit}"


def require_clean(root: Path, source: Source) -> None:
    """Raises CatdogError where a file in git differs from the last commit.

    But the results of the very experiment that is to be promoted, which `dvc exp run` leaves there, may be there.
    """
    changed = git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    if not changed or (source.experiment and _is_in_workspace(root, source)):
        return
    names = ", ".join(line[3:] for line in changed[:5]) + (f" and {len(changed) - 5} more" if changed[5:] else "")
    found = [entry.experiment for entry in _find_experiments(root) if _is_in_workspace(root, entry)]
    remedy = (
        f"these are the results of the experiment {found[0]}, which `catdog promote {found[0]}` promotes"
        if found
        else "commit the changes, or `git checkout` them"
    )
    raise CatdogError(f"{names} differ from the last commit, so that HEAD is not what is in the workspace; {remedy}")


def _is_in_workspace(root: Path, experiment: Source) -> bool:
    """Says whether the files in git are those of an experiment that started from HEAD."""
    at_baseline = experiment.baseline == git(root, "rev-parse", "HEAD").strip()
    return at_baseline and not git(root, "diff", "--name-only", experiment.commit)


def require_branch(root: Path, source: Source, branch: str) -> None:
    """Raises CatdogError where no branch of this name can be made of it."""
    if not source.experiment:
        raise CatdogError(f"--branch makes a branch of a DVC experiment, and {source.name} is none; leave it out")
    if not try_git(root, "check-ref-format", "--branch", branch):
        raise CatdogError(f"--branch {branch!r} is no name for a branch")
    there = try_git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}").strip()
    if there not in ("", source.commit):
        raise CatdogError(f"the branch {branch} exists; choose another name")


def build_commit(root: Path, source: Source) -> str:
    """Makes the commit that holds an experiment's results on top of HEAD; no branch and no file changes.

    Every file that the experiment changed is taken from it, all others are those of HEAD. Of the parameters those are
    taken that a stage read, all others are those of HEAD.

    Raises:
        CatdogError: HEAD has moved on since the experiment started, and changed the same files, or parameters with
            which the experiment did not run.
    """
    changed = _changed(root, source.baseline, source.commit)
    since = _changed(root, source.baseline, "HEAD")
    clash = (changed & since) - _RESULTS
    if clash:
        raise CatdogError(
            f"the experiment {source.experiment} and the commits since {source.baseline[:7]} both changed "
            f"{', '.join(sorted(clash))}; `--branch NAME` makes a branch of it, or run the experiment again"
        )
    params = _merge_params(root, source, keep_text=paths.PARAMS.as_posix() not in since)
    entries = git(root, "ls-tree", "-r", "-z", source.commit).split("\0")
    there = {path: fields for fields, _, path in (entry.partition("\t") for entry in entries)}
    digest = git(root, "hash-object", "-w", "--stdin", text=params).strip()
    there[paths.PARAMS.as_posix()] = f"100644 blob {digest}"
    lines = []
    # An experiment whose results are those of its baseline takes the place of another one's, too.
    for path in sorted(changed | (_RESULTS & set(there))):
        mode, _, digest = there.get(path, f"0 blob {'0' * 40}").split()
        lines.append(f"{mode} {digest}\t{path}\0")
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        git(root, "read-tree", "HEAD", GIT_INDEX_FILE=index)
        git(root, "update-index", "-z", "--index-info", text="".join(lines), GIT_INDEX_FILE=index)
        tree = git(root, "write-tree", GIT_INDEX_FILE=index).strip()
    if tree == git(root, "rev-parse", "HEAD^{tree}").strip():
        return git(root, "rev-parse", "HEAD").strip()
    message = f"Promote the experiment {source.experiment}\n\n{_experiment_line(source)}\n"
    return git(root, "commit-tree", tree, "-p", "HEAD", text=message).strip()


def _merge_params(root: Path, source: Source, *, keep_text: bool) -> str:
    """Returns params.yaml of HEAD with the values that a stage of the experiment read.

    Args:
        root: of the repository.
        source: the experiment.
        keep_text: HEAD's file is that of the baseline, so that the experiment's may take its place, where the rest of
            the values is the same.

    Raises:
        CatdogError: a commit since the baseline, but for promotions, set a value with which the experiment did not run.
    """
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    texts = [git(root, "show", f"{revision}:{paths.PARAMS}") for revision in ("HEAD", source.commit)]
    tree, theirs = (parse_yaml_for_update(text, paths.PARAMS) for text in texts)
    here, there = dict(leaves(tree)), dict(leaves(theirs))
    lock = read_yaml(try_git(root, "show", f"{source.commit}:{LOCK}"), f"{LOCK} of {source.experiment}")
    tracked = {
        tuple(name.split("."))
        for stage in (lock.get("stages") or {}).values()
        for name in stage.get("params", {}).get(paths.PARAMS.as_posix(), {})
    }
    differ = [key for key in here | there if here.get(key) != there.get(key)]
    read = [key for key in differ if any(key[: len(name)] == name for name in tracked)]
    set_since = _set_since(root, source)
    if lost := [key for key in read if key in set_since]:
        names = ", ".join(f"{'.'.join(key)} = {here.get(key, 'nothing')}" for key in lost)
        values = ", ".join(str(there.get(key, "nothing")) for key in lost)
        raise CatdogError(
            f"the commits since {source.baseline[:7]} set {names}, where the experiment {source.experiment} has "
            f"{values}; run it again from HEAD, or `--branch NAME` makes a branch of it"
        )
    if keep_text and read == differ:
        return texts[1]
    for key in read:
        block = tree
        for name in key[:-1]:
            block = block.setdefault(name, {})
        if key in there:
            block[key[-1]] = there[key]
        else:
            del block[key[-1]]
    return dumps_yaml(tree) if read else texts[0]


def _set_since(root: Path, source: Source) -> set[tuple[str, ...]]:
    """The parameters that commits since the baseline set; a promotion may take the place of another one."""

    def read(revision: str) -> dict[tuple[str, ...], Any]:
        name = f"{paths.PARAMS} of {revision}"
        return dict(leaves(read_yaml(try_git(root, "show", f"{revision}:{paths.PARAMS}"), name)))

    ours = ("--invert-grep", f"--grep=^{EXPERIMENT_KEY}: ")
    commits = git(root, "rev-list", *ours, f"{source.baseline}..HEAD", "--", str(paths.PARAMS)).split()
    changes = [(read(f"{commit}^"), read(commit)) for commit in commits]
    return {key for old, new in changes for key in old | new if old.get(key) != new.get(key)}


def _changed(root: Path, old: str, new: str) -> set[str]:
    return set(git(root, "diff", "--name-only", "--no-renames", "-z", old, new).split("\0")) - {""}


def choose_version(root: Path, registry: Registry, commit: str) -> tuple[str, str]:
    """Returns the next version and why it is this one.

    Another backbone or another data set than the highest version's is a minor step, anything else a patch.
    """
    if not registry.versions:
        return FIRST_VERSION, "the first version"
    latest = registry.versions[0]
    old, new = (_identity(root, entry) for entry in (latest.commit, commit))
    changed = [f"{key} {new[key]} instead of {old[key]}" for key in new if new[key] != old.get(key)]
    why = "; ".join(changed) or "backbone and data set are the same"
    return next_version(latest.name, minor=bool(changed)), f"compared with {latest.name}: {why}"


def _identity(root: Path, commit: str) -> dict[str, str]:
    from ruamel.yaml import YAML

    reader = YAML(typ="safe")
    params = reader.load(try_git(root, "show", f"{commit}:{paths.PARAMS}")) or {}
    lock = reader.load(try_git(root, "show", f"{commit}:{LOCK}")) or {}
    raw = [
        str(out.get("md5", ""))[:7]
        for stage in (lock.get("stages") or {}).values()
        for out in stage.get("outs", [])
        if out.get("path") == paths.RAW.as_posix()
    ]
    return {
        "backbone": str(params.get("backbone", "")),
        "dataset": str(params.get("dataset", "")),
        paths.RAW.as_posix(): raw[0] if raw else "",
    }


def adopt_commit(root: Path, source: Source, commit: str) -> None:
    """Brings HEAD and the files in git from the baseline of an experiment to the commit that was made of it."""
    if git(root, "status", "--porcelain", "--untracked-files=no"):
        # The experiment's results are there already (`require_clean`), and git would not overwrite even the same bytes.
        git(root, "reset", "--quiet", commit)
        if not git(root, "diff", "--name-only", source.commit, "--", str(paths.PARAMS)):
            git(root, "checkout", "--quiet", "--", str(paths.PARAMS))
    else:
        git(root, "merge", "--quiet", "--ff-only", commit)
