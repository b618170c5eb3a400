"""A cheap look at what lies outside the pipeline: did the data set behind `dataset` change since it was brought in?

DVC watches files whose paths stand in dvc.yaml; `dataset` may be any path or address. So the first stage takes
this fingerprint at every run, in a fraction of a second, and DVC downloads again when it differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from catdog.catalog import is_drive_url, is_named
from catdog.errors import CatdogError
from catdog.files import sha256_of
from catdog.paths import users_path
from catdog.transfer import identity, public_url


def fingerprint(dataset: str, root: Path, former: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what tells one state of a data set from another, as a JSON object.

    A path is told by the names, sizes and times of its files, and by DVC's hash where DVC tracks it; an address by
    what its server says about the file (ETag, date, size). Published sets, and those that only their own clients can
    reach, are told by their name alone.

    Args:
        dataset: the `dataset` parameter.
        root: the repository's root, from which a relative path counts.
        former: the fingerprint of the run before. It stays valid, with a line on standard error, where a server
            cannot be reached.
    """
    try:
        path = dataset_path(dataset, root)
    except CatdogError:
        return {"dataset": dataset, "files": None}  # the download will say what is wrong
    if path is None:
        if "://" not in dataset or is_drive_url(dataset):
            return {"dataset": dataset}
        return {"dataset": public_url(dataset), "remote": _remote(dataset, former)}
    found: dict[str, Any] = {"dataset": dataset, "files": _files_digest(path)}
    with contextlib.suppress(CatdogError):  # the download will say what is wrong
        if found["files"] is not None and (tracked := dvc_tracking(path, root)) is not None:
            found["dvc_file"], found["dvc_hash"] = tracked[0].name, tracked[1]
    return found


def dataset_path(dataset: str, root: Path) -> Path | None:
    """Returns the path that a `dataset` means, without "..", or None where it is a name or an address.

    Raises:
        CatdogError: it begins with a home folder that nobody knows.
    """
    if is_named(dataset) or "://" in dataset:
        return None
    return _without_dots(users_path("dataset", dataset, root))


def _without_dots(path: Path) -> Path:
    """Removes "..", so that the path itself says whether it lies in the repository; links stay, but before a ".."."""
    kept = Path()
    try:
        for part in path.parts:
            # Above a link to a folder is what lies above the folder, not above the link.
            kept = Path(os.path.realpath(kept)).parent if part == ".." else kept / part
    except ValueError:  # a name that no file can have
        return path
    return kept


def dvc_tracking(path: Path, root: Path) -> tuple[Path, str] | None:
    """Returns the .dvc file that tracks a path, or a folder above it, and the hash that it records.

    Raises:
        CatdogError: that file cannot be read.
    """
    for one in (path, *path.parents):
        if not one.is_relative_to(root) or one == root:
            return None
        file = one.with_name(one.name + ".dvc")
        if os.path.isfile(file):  # noqa: PTH113 Path.is_file raises where nothing may be looked at
            try:
                text = file.read_text(encoding="utf-8")
            except OSError as error:
                raise CatdogError(f"{file} cannot be read: {error.strerror}; check its permissions") from None
            outs = (yaml.safe_load(text) or {}).get("outs") or [{}]
            return file, str(outs[0].get("md5", ""))
    return None


def curation_fingerprint(file: str, exclude: str, root: Path) -> dict[str, Any]:
    """Returns hashes of the lists that the split stage reads, by parameter.

    Null stands for one that is not set, or that cannot be read: of that the split stage tells.
    """
    return {name: _hash(name, value, root) for name, value in (("split.file", file), ("split.exclude", exclude))}


def _hash(parameter: str, value: str, root: Path) -> str | None:
    with contextlib.suppress(CatdogError, OSError):
        if value and (path := users_path(parameter, value, root)).is_file():
            return sha256_of(path)
    return None


def weights_fingerprint(weights: str, backbone: str, root: Path) -> dict[str, str | None]:
    """Returns hashes of the user's own files of weights, by path as it was given.

    Null stands for one that cannot be read: of that the embed stage tells.

    Args:
        weights: the parameter: imagenet, random or a path; of several backbones one each, joined by +.
        backbone: the parameter.
        root: the repository's root, from which a relative path counts.
    """
    parts = weights.split("+") if "+" in backbone else [weights]  # one path may hold a +
    return {part: _hash("weights", part, root) for part in parts if part not in ("imagenet", "random")}


def _remote(dataset: str, former: dict[str, Any] | None) -> dict[str, Any]:
    try:
        found = identity(dataset)
        if not any(found.values()):
            print(
                f"source: the server of {public_url(dataset)} tells no version of it, so a change goes unnoticed; "
                "`dvc repro --force --single-item download` fetches it again",
                file=sys.stderr,
            )
        return found
    except CatdogError as error:
        known = former is not None and former.get("dataset") == public_url(dataset)
        if not known:
            return {}  # the download will say what is wrong
        print(
            f"source: {public_url(dataset)} cannot be asked whether it changed; going on with what was downloaded "
            f"before ({error})",
            file=sys.stderr,
        )
        assert former is not None
        remote: dict[str, Any] = former.get("remote", {})
        return remote


def _files_digest(path: Path) -> str | None:
    """A hash over name, size and time of change of every file; None where nothing is there."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # also a name that no file can have
        return None
    if not stat.S_ISDIR(status.st_mode):
        return f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    digest = hashlib.sha256()
    for name, status in sorted(_entries(path, ""), key=lambda entry: entry[0]):
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _entries(folder: str | Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    # A link to a folder is entered once; packing refuses the ones that lead back.
                    is_folder = entry.is_dir() and not (entry.is_symlink() and _leads_back(entry.path))
                    status = entry.stat()
                except OSError:
                    continue  # packing will name it
                if is_folder:
                    yield from _entries(entry.path, f"{prefix}{entry.name}/")
                else:
                    yield f"{prefix}{entry.name}", status
    except OSError:
        return  # packing will name it


def _leads_back(link: str) -> bool:
    return Path(link).resolve() in (Path(link).parent.resolve(), *Path(link).parents)
