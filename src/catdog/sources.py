"""Where images come from: every source ends as one zip archive, `data/raw.zip`, that is never unpacked.

To add a source, write a function with the signature of `FetchSource` and give it a line in
`choose_source`. It writes a zip to the path it gets and returns the facts about where the bytes came from.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from catdog.archives import Rename, open_archive, pack_archive, pack_folder
from catdog.catalog import KAGGLE_COMPETITION, NAMES, PUBLISHED, Published, is_drive_url
from catdog.clients import export_tfds, fetch_drive, fetch_kaggle
from catdog.errors import CatdogError
from catdog.files import require_disk_space, sha256_of, used_up, written_aside
from catdog.fingerprint import dataset_path, dvc_tracking
from catdog.paths import DOWNLOADS, RAW
from catdog.sample import write_sample
from catdog.transfer import downloaded, public_url


@dataclass(frozen=True)
class SourceFacts:
    """What is recorded about a data set's origin."""

    kind: str  # sample, zip, tar, folder, or tfds
    location: str  # the `dataset` parameter, without passwords
    files: int  # members of raw.zip, folders not counted
    bytes: int  # size of raw.zip
    sha256: str  # of raw.zip
    origin: dict[str, Any] = field(default_factory=dict)  # what else is known: address, hash, licence, DVC's hash

    def as_dict(self) -> dict[str, Any]:
        """Returns the facts as a JSON object."""
        own = {"kind": self.kind, "location": self.location, "files": self.files, "bytes": self.bytes}
        return own | {"sha256": self.sha256, "origin": self.origin}


FetchSource = Callable[[Path], tuple[str, dict[str, Any]]]
"""Writes a zip archive to the path it is given and returns the kind of the source and what is known of its origin."""


def fetch(dataset: str, target: Path, *, root: Path, seed: int, sample_images: int, sha256: str = "") -> SourceFacts:
    """Brings a data set in as one zip archive.

    Args:
        dataset: the `dataset` parameter.
        target: the archive to write; it appears whole or not at all.
        root: the repository's root, from which a relative path counts.
        seed: draws the sample pictures.
        sample_images: number of sample pictures.
        sha256: expected hash of the archive that `dataset` names; "" takes what comes.

    Raises:
        CatdogError: there is no such data set, it cannot be reached, it is no archive, it is not the expected one,
            it cannot be read, or the disk is too full.
    """
    source = choose_source(dataset, root=root, seed=seed, sample_images=sample_images, sha256=sha256.lower())
    with written_aside(target) as aside:
        kind, origin = source(aside)
        with open_archive(aside) as archive:
            files = sum(not member.is_dir() for member in archive.infolist())
        if files == 0:
            raise CatdogError(
                f"dataset = {public_url(dataset)!r} holds no files; point it at a folder or archive of images"
            )
        return SourceFacts(kind, public_url(dataset), files, aside.stat().st_size, sha256_of(aside), origin)


def choose_source(dataset: str, *, root: Path, seed: int, sample_images: int, sha256: str = "") -> FetchSource:
    """Returns the function that fetches a data set; raises CatdogError when nothing fits its name."""
    downloads = root / DOWNLOADS
    if dataset in PUBLISHED:
        return lambda target: _fetch_published(PUBLISHED[dataset], target, downloads, sha256)
    if dataset == "kaggle":
        return lambda target: _fetch_kaggle(target, downloads, sha256)
    if is_drive_url(dataset):
        return lambda target: _fetch_drive(dataset, target, downloads, sha256)
    if "://" in dataset:
        return lambda target: _fetch_address(dataset, target, downloads, sha256)
    path = dataset_path(dataset, root)
    if path is not None and _kind_of_path(path, dataset, root) == "archive":
        return lambda target: _fetch_archive(path, dataset, target, root, sha256)
    if sha256:
        raise CatdogError(
            f"download.sha256 is set, but dataset = {dataset!r} is no archive that could have it; set it to ''"
        )
    if dataset == "sample":
        return lambda target: _draw_sample(target, sample_images, seed)
    if dataset.startswith("tfds:"):
        return lambda target: ("tfds", export_tfds(dataset.removeprefix("tfds:"), target))
    assert path is not None, "every name has been told apart"
    _require_own_folder(path, dataset, root)
    return lambda target: _fetch_folder(path, target, root)


def _kind_of_path(path: Path, dataset: str, root: Path) -> str:
    """Returns "folder" or "archive"; raises CatdogError when the path is neither."""
    with _reading_told(dataset):
        if path.is_dir():
            return "folder"
        if path.is_file():
            return "archive"
    close = difflib.get_close_matches(dataset, NAMES, n=1)
    if os.path.isfile(f"{path}.dvc"):  # noqa: PTH113 Path.is_file raises where the name gets too long
        command = f"`dvc pull {dataset}.dvc`" if path.is_relative_to(root) else f"`dvc pull` in {path.parent}"
        hint = f"DVC tracks it, but it is not here: {command} brings it"
    elif close:
        hint = f"did you mean {close[0]}?"
    else:
        hint = (
            f"give one of {', '.join(NAMES)}, tfds:<name>, an address, or the path of a folder or archive, absolute or "
            "relative to the repository root"
        )
    raise CatdogError(f"dataset = {dataset!r} does not exist ({path}); {hint}")


@contextlib.contextmanager
def _reading_told(dataset: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CatdogError(
            f"dataset = {dataset!r} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None


def _require_own_folder(path: Path, dataset: str, root: Path) -> None:
    """Raises CatdogError for a folder that holds the repository, or the data that the pipeline itself writes."""
    folder = path.resolve()
    for inside in (root, (root / RAW).parent):
        if inside.resolve().is_relative_to(folder):
            raise CatdogError(
                f"dataset = {dataset!r} holds {inside}, where the pipeline's own files lie, which would be packed with "
                "the pictures; move the pictures into a folder of their own, e.g. pictures, and give that"
            )


def _draw_sample(target: Path, count: int, seed: int) -> tuple[str, dict[str, Any]]:
    require_disk_space(target.parent, count * 60_000, "drawing the sample pictures")
    write_sample(target, count=count, seed=seed)
    return "sample", {}


def _fetch_published(one: Published, target: Path, downloads: Path, sha256: str) -> tuple[str, dict[str, Any]]:
    expected = sha256 or one.sha256
    size = one.bytes if expected == one.sha256 else None
    facts = {"license": one.license, "homepage": one.homepage}
    kind, origin = _download_and_pack(one.urls, one.name, target, downloads, expected, size=size, rename=one.rename)
    return kind, facts | origin


def _fetch_address(dataset: str, target: Path, downloads: Path, sha256: str) -> tuple[str, dict[str, Any]]:
    return _download_and_pack((dataset,), public_url(dataset), target, downloads, sha256)


def _download_and_pack(
    urls: tuple[str, ...],
    name: str,
    target: Path,
    downloads: Path,
    sha256: str,
    *,
    size: int | None = None,
    rename: Rename | None = None,
) -> tuple[str, dict[str, Any]]:
    with downloaded(urls, target, parts=downloads, sha256=sha256, size=size) as (archive, got):
        kind = pack_archive(archive, target, rename=rename, location=name)
    origin = {"url": got.url, "archive_sha256": got.sha256, "etag": got.etag, "last_modified": got.last_modified}
    return kind, {key: value for key, value in origin.items() if value}


def _fetch_kaggle(target: Path, downloads: Path, sha256: str) -> tuple[str, dict[str, Any]]:
    with _fetched(lambda folder: fetch_kaggle(KAGGLE_COMPETITION, folder), downloads, "kaggle") as path:
        found = _require_hash(path, "kaggle", sha256)
        kind = pack_archive(path, target, location="kaggle")
    page = f"https://www.kaggle.com/c/{KAGGLE_COMPETITION}"
    return kind, {"homepage": page, "archive_sha256": found, "license": "the competition's rules"}


def _fetch_drive(dataset: str, target: Path, downloads: Path, sha256: str) -> tuple[str, dict[str, Any]]:
    name = f"drive-{hashlib.sha256(dataset.encode()).hexdigest()[:16]}"
    with _fetched(lambda folder: fetch_drive(dataset, folder), downloads, name) as path:
        if path.is_file():
            found = _require_hash(path, dataset, sha256)
            return pack_archive(path, target, location=dataset), {"url": dataset, "archive_sha256": found}
        if sha256:
            raise CatdogError(
                f"download.sha256 is set, but dataset = {dataset!r} is a folder, no archive; set it to ''"
            )
        pack_folder(path, target)
        return "folder", {"url": dataset}


@contextlib.contextmanager
def _fetched(client: Callable[[Path], Path], downloads: Path, name: str) -> Iterator[Path]:
    """What a client brings into a folder of its own, which goes when the data has been packed, or was of no use.

    Where the client or the packing was cut off the folder stays, so that the next run goes on. One process at a time:
    workers of DVC's queue may bring the same data.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    with FileLock(downloads / f"{name}.lock"):
        path = client(downloads / name)
        with used_up(lambda: shutil.rmtree(downloads / name)):
            yield path


def _fetch_archive(path: Path, dataset: str, target: Path, root: Path, sha256: str) -> tuple[str, dict[str, Any]]:
    found = _require_hash(path, dataset, sha256)
    origin = {"archive_sha256": found} | _require_tracked_state(path, root)
    return pack_archive(path, target, location=dataset), origin


def _fetch_folder(path: Path, target: Path, root: Path) -> tuple[str, dict[str, Any]]:
    origin = _require_tracked_state(path, root)
    pack_folder(path, target)
    return "folder", origin


def _require_hash(path: Path, dataset: str, sha256: str) -> str:
    with _reading_told(dataset):
        found = sha256_of(path)
    if sha256 and found != sha256:
        raise CatdogError(
            f"dataset = {dataset!r} has the SHA-256 {found}, not download.sha256 = {sha256}; fetch it again, or set "
            "download.sha256 to the new hash if the change is meant"
        )
    return found


def _require_tracked_state(path: Path, root: Path) -> dict[str, Any]:
    """Returns DVC's hash of data that the user tracks with `dvc add` or `dvc import-url`; none for other data.

    Raises:
        CatdogError: the data is no longer what its .dvc file says, so that the hash would be a lie.
    """
    tracking = dvc_tracking(path, root)
    if tracking is None:
        return {}
    file, recorded = tracking
    name = file.relative_to(root).as_posix()
    data = name.removesuffix(".dvc")
    command = [sys.executable, "-m", "dvc", "status", "--json", os.fspath(file)]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise CatdogError(f"`dvc status {name}` failed: {' '.join(answer.stderr.split())[-300:]}")
    if json.loads(answer.stdout or "{}"):
        raise CatdogError(
            f"{data} is not what {name} records; `dvc add {data}` records the change, `dvc checkout {name}` undoes it"
        )
    return {"dvc_file": name, "dvc_hash": recorded}
