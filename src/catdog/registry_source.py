"""What is to be promoted: finds it in DVC and git, and makes a commit of an experiment."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from catdog import paths
from catdog.errors import CatdogError
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

    Every file that the experiment changed is taken from it, all others are those of HEAD.

    Raises:
        CatdogError: HEAD has moved on since the experiment started, and changed the same files.
    """
    changed = _changed(root, source.baseline, source.commit)
    clash = (changed & _changed(root, source.baseline, "HEAD")) - _RESULTS
    if clash:
        raise CatdogError(
            f"the experiment {source.experiment} and the commits since {source.baseline[:7]} both changed "
            f"{', '.join(sorted(clash))}; `--branch NAME` makes a branch of it, or run the experiment again"
        )
    entries = git(root, "ls-tree", "-r", "-z", source.commit).split("\0")
    kept = {path: fields for fields, _, path in (entry.partition("\t") for entry in entries) if path in changed}
    lines = []
    for path in sorted(changed):
        mode, _, digest = kept.get(path, f"0 blob {'0' * 40}").split()
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


def adopt_commit(root: Path, commit: str) -> None:
    """Brings HEAD and the files in git from the baseline of an experiment to the commit that was made of it."""
    if git(root, "status", "--porcelain", "--untracked-files=no"):
        # The experiment's results are there already (`require_clean`), and git would not overwrite even the same bytes.
        git(root, "reset", "--quiet", commit)
    else:
        git(root, "merge", "--quiet", "--ff-only", commit)
