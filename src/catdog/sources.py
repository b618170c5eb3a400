"""Where images come from: every source ends as one zip archive, `data/raw.zip`, that is never unpacked.

To add a source, write a function with the signature of `FetchSource` and give it a line in
`choose_source`. It writes a zip to the path it gets and returns the facts about where the bytes came from.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from catdog.errors import CatdogError
from catdog.files import require_disk_space, sha256_of, written_aside
from catdog.sample import write_sample

# Pictures are compressed already, so a packed archive stores them; a fixed date makes its bytes repeatable.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class SourceFacts:
    """What is recorded about a data set's origin."""

    kind: str  # sample, zip, tar or folder
    location: str  # the `dataset` parameter
    files: int  # members of raw.zip, folders not counted
    bytes: int  # size of raw.zip
    sha256: str  # of raw.zip

    def as_dict(self) -> dict[str, Any]:
        """Returns the facts as a JSON object."""
        return asdict(self)


FetchSource = Callable[[Path], str]
"""Writes a zip archive to the path it is given and returns the kind of the source."""


def fetch(dataset: str, target: Path, *, root: Path, seed: int, sample_images: int) -> SourceFacts:
    """Brings a data set in as one zip archive.

    Args:
        dataset: the `dataset` parameter.
        target: the archive to write; it appears whole or not at all.
        root: the repository's root, from which a relative path counts.
        seed: draws the sample pictures.
        sample_images: number of sample pictures.

    Raises:
        CatdogError: there is no such data set, it is no archive, it cannot be read, or the disk is too full.
    """
    source = choose_source(dataset, root=root, seed=seed, sample_images=sample_images)
    with written_aside(target) as aside:
        kind = source(aside)
        with zipfile.ZipFile(aside) as archive:
            files = sum(not member.is_dir() for member in archive.infolist())
        if files == 0:
            raise CatdogError(f"dataset = {dataset!r} holds no files; point it at a folder or archive of images")
        return SourceFacts(kind, dataset, files, aside.stat().st_size, sha256_of(aside))


def choose_source(dataset: str, *, root: Path, seed: int, sample_images: int) -> FetchSource:
    """Returns the function that fetches a data set; raises CatdogError when nothing fits its name."""
    if dataset == "sample":

        def draw(target: Path) -> str:
            require_disk_space(target.parent, sample_images * 60_000, "drawing the sample pictures")
            write_sample(target, count=sample_images, seed=seed)
            return "sample"

        return draw

    path = root / Path(dataset).expanduser()
    try:
        if path.is_dir():
            return lambda target: _pack_folder(path, target)
        if path.is_file():
            if path.stat().st_size == 0:
                raise CatdogError(f"dataset = {dataset!r}: the file is empty (0 bytes); fetch it again")
            # Tar first: a tar that ends with a zip looks like a zip as well.
            if tarfile.is_tarfile(path):
                return lambda target: _pack_tar(path, target)
            if zipfile.is_zipfile(path):
                return lambda target: _copy_zip(path, target)
            raise CatdogError(
                f"dataset = {dataset!r} is no archive that can be read; give a folder, .zip, .tar, .tar.gz or "
                ".tar.xz (a broken download looks like this too)"
            )
    except OSError as error:
        raise CatdogError(
            f"dataset = {dataset!r} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None
    raise CatdogError(
        f"dataset = {dataset!r} does not exist ({path}); give `sample`, or the path of a folder or archive, "
        "absolute or relative to the repository root"
    )


def _copy_zip(path: Path, target: Path) -> str:
    """Takes a zip as it is, so that its SHA-256 stays the published one."""
    require_disk_space(target.parent, path.stat().st_size, f"copying {path.name}")
    shutil.copyfile(path, target)
    try:
        with zipfile.ZipFile(target) as archive:
            locked = next((member.filename for member in archive.infolist() if member.flag_bits & 0x1), None)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise CatdogError(f"dataset {path} is a damaged zip archive ({error}); fetch it again") from None
    if locked is not None:
        raise CatdogError(f"dataset {path} is protected by a password ({locked}); unpack it and give the folder")
    return "zip"


def _pack_tar(path: Path, target: Path) -> str:
    require_disk_space(target.parent, path.stat().st_size, f"repacking {path.name}")
    try:
        with tarfile.open(path) as archive:
            _write_zip(target, _tar_members(archive, path))
            _require_sound_end(archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CatdogError(f"dataset {path} is a damaged tar archive ({error}); fetch it again") from None
    return "tar"


def _require_sound_end(archive: tarfile.TarFile) -> None:
    """Raises tarfile.ReadError or the decompressor's error unless the archive is whole to its end.

    tarfile takes a damaged header for the end of the archive, and stops before the compression's checksum.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(512).strip(b"\0"):
        raise tarfile.ReadError("a header is damaged")
    while file.read(1 << 20):
        pass


def _tar_members(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    # In the archive's own order: a compressed tar can only be read forwards at a bearable cost.
    for member in archive:
        name = member.name.removeprefix("./")
        if name in ("", "."):
            continue
        if name.startswith("/") or ".." in Path(name).parts:
            raise CatdogError(f"dataset {path} has a member that leaves the archive: {member.name!r}; do not trust it")
        if member.isdir():
            yield name + "/", None
        elif member.isfile():
            yield name, archive.extractfile(member)
        else:
            raise CatdogError(
                f"dataset {path} has a member that is neither a file nor a folder: {member.name!r}; "
                "unpack it, replace links by files and give the folder"
            )


def _pack_folder(folder: Path, target: Path) -> str:
    paths = sorted(_walk(folder))
    require_disk_space(target.parent, sum(p.stat().st_size for p in paths if p.is_file()), f"packing {folder}")
    _write_zip(target, _folder_members(folder, paths))
    return "folder"


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise CatdogError(f"dataset folder {error.filename} cannot be read: {error.strerror}; check its permissions")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        for name in (*folders, *files):
            path = Path(parent, name)
            if not path.exists():
                raise CatdogError(f"dataset folder has a link to nothing: {path}; remove or mend it")
            if not path.is_dir() and not path.is_file():
                raise CatdogError(f"dataset folder has something that is no file: {path}; remove it")
            if path.is_symlink() and path.is_dir() and path.resolve() in (Path(parent).resolve(), *path.parents):
                raise CatdogError(f"dataset folder has a link to a folder above itself: {path}; remove it")
            yield path


def _folder_members(folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, IO[bytes] | None]]:
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            yield name + "/", None
        else:
            with path.open("rb") as file:
                yield name, file


def _write_zip(target: Path, members: Iterable[tuple[str, IO[bytes] | None]]) -> None:
    """Stores members in a zip whose bytes depend on nothing but their names and contents."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, file in members:
            # A zip's names are UTF-8; a name that is not is kept apart by its escaped bytes.
            readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            member = zipfile.ZipInfo(readable, _ZIP_DATE)
            if file is None:
                archive.writestr(member, b"")
            else:
                with archive.open(member, "w", force_zip64=True) as writer:
                    while chunk := file.read(1 << 20):
                        writer.write(chunk)


__all__ = ["FetchSource", "SourceFacts", "choose_source", "fetch"]
