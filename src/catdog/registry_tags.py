"""Versions and stages of a model as git tags, the way GTO reads and writes them.

`cats-vs-dogs@v1.2.0` registers a version, `cats-vs-dogs#prod#7` assigns a stage; the latest assignment of a stage
counts. GTO tells the latest by the tags' time, in whole seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catdog.errors import CatdogError

FIRST_VERSION = "v1.0.0"
VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)([-+].*)?")
FORCED = re.compile("^Forced: (.*)$", re.MULTILINE)
"""The line in a tag's message that says why failed checks were passed by."""
_MOST_SKEW = 5.0
"""Seconds by which the clock of whoever assigned last may be ahead of this machine's."""


@dataclass(frozen=True)
class Version:
    """A registered version of the model."""

    name: str  # vX.Y.Z
    commit: str
    author: str
    created: datetime.datetime
    message: str
    stages: tuple[str, ...]  # that it serves now


@dataclass(frozen=True)
class Assignment:
    """One event in a stage's history."""

    stage: str
    version: str
    created: datetime.datetime
    message: str


@dataclass(frozen=True)
class Registry:
    """What the tags say about one model."""

    artifact: str
    versions: tuple[Version, ...] = ()  # highest first
    assignments: tuple[Assignment, ...] = ()  # oldest first

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage that a version was ever assigned to, sorted."""
        return tuple(sorted({entry.stage for entry in self.assignments}))

    def version(self, name: str) -> Version | None:
        """Returns the version of this name."""
        return next((version for version in self.versions if version.name == name), None)

    def at_commit(self, commit: str) -> Version | None:
        """Returns the version that a commit is registered as."""
        return next((version for version in self.versions if version.commit == commit), None)

    def serving(self, stage: str) -> Version | None:
        """Returns the version that a stage serves."""
        return next((version for version in self.versions if stage in version.stages), None)

    def forced(self, name: str) -> str:
        """Returns the latest reason why a version was promoted though checks failed; empty: it never was."""
        messages = [entry.message for entry in self.assignments if entry.version == name]
        return next((found[1] for text in reversed(messages) if (found := FORCED.search(text))), "")

    def former(self, stage: str) -> Version | None:
        """Returns the version that a stage served before the one that it serves now."""
        now = self.serving(stage)
        for entry in reversed(self.assignments):
            version = self.version(entry.version)
            if entry.stage == stage and version is not None and version != now:
                return version
        return None

    def before(self, stage: str) -> Version | None:
        """Returns the version to roll back to: what the stage served when the present version first came to it.

        So one rollback after the other goes further back, and none returns to a version that was rolled back from.
        """
        now = self.serving(stage)
        history = [entry.version for entry in self.assignments if entry.stage == stage]
        first = history.index(now.name) if now is not None and now.name in history else len(history)
        known = [version for name in history[:first] if (version := self.version(name)) is not None]
        return known[-1] if known else None


def read_registry(repository: Any, artifact: str) -> Registry:
    """Reads what GTO shows of a model.

    Args:
        repository: root of a git repository, or an open one (`scmrepo.git.Git`).
        artifact: its name in dvc.yaml.
    """
    from gto import api
    from gto.exceptions import ArtifactNotFound, NoRepo

    where = str(repository) if isinstance(repository, Path) else repository
    try:
        shown = api.show(where, artifact, registered_only=True)
        events = api.history(where, artifact, ascending=True)
    except ArtifactNotFound:
        return Registry(artifact)
    except NoRepo:
        raise CatdogError(f"{repository} is no git repository") from None
    versions = tuple(
        Version(
            entry["version"],
            entry["commit_hexsha"],
            entry["author"] or "",
            entry["created_at"],
            entry["message"] or "",
            tuple(sorted({stage["stage"] for stage in entry["stages"]})),
        )
        for entry in shown
    )
    assignments = tuple(
        Assignment(event["stage"], event["version"], event["timestamp"], event["message"] or "")
        for event in events
        if event["event"] == "assignment"
    )
    return Registry(artifact, versions, assignments)


def next_version(latest: str | None, *, minor: bool) -> str:
    """Returns the version that follows: a minor step, or a patch.

    Args:
        latest: the highest there is; None: there is none yet.
        minor: vX.Y+1.0 instead of vX.Y.Z+1.
    """
    found = VERSION.fullmatch(latest or "")
    if not found:
        return FIRST_VERSION
    major, middle, patch = map(int, found.groups()[:3])
    return f"v{major}.{middle + 1}.0" if minor else f"v{major}.{middle}.{patch + 1}"


def write_tags(root: Path, artifact: str, version: str, commit: str, stage: str, message: str) -> None:
    """Registers a version, where it is not yet, and assigns a stage to it.

    Whoever calls this holds `promotion_lock`. When it fails, none of its tags is left.

    Raises:
        CatdogError: GTO refuses, or a tag is dated in the future, so that a new one would not count.
    """
    from gto import api
    from gto.exceptions import GTOException

    author, email = read_identity(root)
    who: dict[str, Any] = {"message": message, "author": author, "author_email": email}
    with new_tags_or_none(root, artifact):
        registry = read_registry(root, artifact)
        _wait_for_the_next_second(registry)
        try:
            if registry.version(version) is None:
                api.register(str(root), artifact, commit, version=version, **who)
            # GTO takes a second assignment of one version to one stage, as after a rollback, only by force.
            api.assign(str(root), artifact, stage, version=version, force=True, **who)
        except GTOException as error:
            raise CatdogError(f"{artifact} {version} cannot be tagged: {' '.join(str(error).split())}") from None
        serving = read_registry(root, artifact).serving(stage)
        if serving is None or serving.name != version:
            raise CatdogError(
                f"{stage} serves {serving.name if serving else 'nothing'} instead of {version} according to GTO, which "
                f"goes by the tags' times; look at them with `gto history {artifact}`"
            )


def read_identity(root: Path) -> tuple[str, str]:
    """Returns the name and the address that git puts under a commit.

    Raises:
        CatdogError: nobody told git; it is not left to guess them from the machine's name.
    """
    found = re.match("(.+) <(.+)>", try_git(root, "-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT"))
    if not found:
        raise CatdogError(
            "git does not know who you are; `git config --global user.name NAME` and `git config --global user.email "
            "ADDRESS` tell it"
        )
    return found[1], found[2]


def _wait_for_the_next_second(registry: Registry) -> None:
    """Of two tags with one time, GTO may take the wrong one for the later."""
    for entry in registry.assignments[-1:]:
        ahead = entry.created.timestamp() + 1 - time.time()
        if ahead > _MOST_SKEW:
            raise CatdogError(
                f"{registry.artifact} {entry.version} was assigned to {entry.stage} at {entry.created:%Y-%m-%d %H:%M}, "
                "which is in the future, and a tag of now would count as older; correct the clock"
            )
        time.sleep(max(0.0, ahead))


@contextlib.contextmanager
def new_tags_or_none(root: Path, artifact: str) -> Iterator[None]:
    """Deletes the tags of a model that came up in the block when it fails."""
    before = set(_tags(root, artifact))
    try:
        yield
    except BaseException:
        for tag in set(_tags(root, artifact)) - before:
            git(root, "update-ref", "-d", f"refs/tags/{tag}")
        raise


def _tags(root: Path, artifact: str) -> list[str]:
    return git(root, "tag", "--list", f"{artifact}@*", f"{artifact}#*").splitlines()


@contextlib.contextmanager
def promotion_lock(root: Path) -> Iterator[None]:
    """Holds what only one promotion at a time may have in a repository.

    Raises:
        CatdogError: another one holds it.
    """
    from filelock import FileLock, Timeout

    folder = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir").strip())
    try:
        with FileLock(folder / "catdog-promote.lock", timeout=0):
            yield
    except Timeout:
        raise CatdogError(
            "another promotion or rollback is under way in this repository; look at `catdog models` when it is done"
        ) from None


def choose_remote(root: Path) -> str:
    """Returns the git remote of the present branch, else origin, else the only one there is.

    Raises:
        CatdogError: there is none, or several and none of them is meant.
    """
    remotes = git(root, "remote").split()
    branch = try_git(root, "symbolic-ref", "--short", "HEAD").strip()
    configured = try_git(root, "config", f"branch.{branch}.remote").strip()
    for name in (configured, "origin"):
        if name in remotes:
            return name
    if len(remotes) != 1:
        raise CatdogError(
            f"--push needs one git remote, but there are {len(remotes)}; `git remote add origin URL` adds one"
        )
    return remotes[0]


def fetch_tags(root: Path, artifact: str, remote: str) -> None:
    """Brings the tags of a model from a git remote.

    Raises:
        CatdogError: it cannot be reached, or has another tag of one name.
    """
    try:
        git(root, "fetch", "--quiet", "--no-tags", remote, *_refspecs(artifact))
    except CatdogError as error:
        raise CatdogError(
            f"the tags of {remote} cannot be brought here ({error}); where one is another there, `git tag --delete` it "
            "here: it is left from a promotion that was cut off or not pushed"
        ) from None


def push_tags(root: Path, artifact: str, remote: str) -> None:
    """Sends the tags of a model to a git remote: all or none.

    Raises:
        CatdogError: it cannot be reached, or took another promotion in the meantime.
    """
    try:
        git(root, "push", "--quiet", "--atomic", remote, *_refspecs(artifact))
    except CatdogError as error:
        raise CatdogError(
            f"{remote} did not take the tags ({error}); if another promotion was faster, `git fetch --tags {remote}`, "
            "look at `catdog models` and promote again"
        ) from None


def _refspecs(artifact: str) -> Sequence[str]:
    return [f"refs/tags/{artifact}{sign}*:refs/tags/{artifact}{sign}*" for sign in "@#"]


def git(root: Path, *arguments: str, text: str | None = None, **environment: str) -> str:
    """Runs git and returns what it prints.

    Args:
        root: where.
        arguments: of git.
        text: for its standard input.
        environment: variables to set in addition.

    Raises:
        CatdogError: it fails.
    """
    answer = subprocess.run(
        ["git", *arguments],
        cwd=root,
        input=text,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        cause = " ".join((answer.stderr or answer.stdout).split())[:300]
        raise CatdogError(f"`git {arguments[0]}` failed: {cause or f'exit code {answer.returncode}'}")
    return answer.stdout


def try_git(root: Path, *arguments: str) -> str:
    """Runs git and returns what it prints; nothing where it fails."""
    with contextlib.suppress(CatdogError):
        return git(root, *arguments)
    return ""
