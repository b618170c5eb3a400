"""Archives and folders of any origin become one zip that is safe to read and never unpacked.

`pack_archive` and `pack_folder` write it, `open_archive` reads it. A sound zip is copied as it is; all else is
repacked. Nothing is extracted by its own name, nothing is left out, and what no honest data set holds (links, paths
that leave the archive, members that overlap, absurd sizes) is refused by the name of the member.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from catdog.errors import CatdogError
from catdog.files import DISK_IS_FULL, ZIP_DATE, DiskError, require_disk_space, written_aside
from catdog.names import IMAGE_SUFFIXES, is_hidden

Rename = Callable[[str], str | None]
"""Gives a file its name in the packed archive, or None to leave it out."""

Kind = Literal["zip", "tar"]
_Member = tuple[str, Iterable[bytes] | None]  # name and content in pieces; a folder, whose name ends in "/", has none

MAX_MEMBERS = 5_000_000
MAX_MEMBER_BYTES = 4_000_000_000
MAX_NAME_LENGTH = 4096  # characters; what Linux takes for a path
BOMB_BYTES = 1_000_000_000
BOMB_RATIO = 100
"""An archive that unpacks to more than BOMB_BYTES and to more than BOMB_RATIO times its own size is refused."""

_CHUNK = 1 << 20
_MAX_TAR_HEADER_BYTES = 16 << 20
_LOCAL_HEADER_BYTES = 30  # of a zip member, without its name
_UNICODE_PATH_FIELD = 0x7075  # PKWARE's APPNOTE.TXT, 4.6.9
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)

_DECOMPRESSORS: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"\x5d\x00\x00", lzma.open),  # .lzma, the format before .xz
)
_OTHER_FORMATS = (
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
)
_ARCHIVE_NAME = re.compile(r"(?P<stem>.*[^/])\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))", re.IGNORECASE)
_SPLIT_NAME = re.compile(r"train|val|test", re.IGNORECASE)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DRIVE = re.compile(r"[A-Za-z]:")
# What the standard library raises on damaged archives; OSError without a number is one of them too.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    LookupError,
    RecursionError,
    NotImplementedError,
)


class MemberError(Exception):
    """A file in an archive cannot be read; the message is the reason, for a table of rejected files."""


def pack_archive(path: Path, target: Path, *, rename: Rename | None = None, location: str = "") -> Kind:
    """Brings an archive (zip, tar, tar.gz, tar.bz2, tar.xz) in as a zip.

    A zip that needs no change is copied byte for byte, so that its SHA-256 stays the published one. An archive
    without pictures but with archives in it is merged with them, one level deep, see `_keep_own_names`. Backslashes
    become slashes where an archive uses nothing else. Names that stand twice stay twice, see `duplicate_members`.

    Args:
        path: the archive; what it is, is told by its content.
        target: the zip to write; it appears whole or not at all.
        rename: new names for the files, given their names after merging; entries of folders are then left out.
        location: what messages call the archive, usually the `dataset` parameter; by default the file's name.

    Returns:
        "zip" or "tar": what the archive was.

    Raises:
        CatdogError: it is no archive, damaged, locked by a password, unsafe, a bomb, or the disk is too full.
    """
    location = location or path.name
    with written_aside(target) as aside, _scratch_folder(aside) as scratch:
        kind = _kind(path, location)
        archive_bytes = path.stat().st_size
        require_disk_space(target.parent, archive_bytes, f"packing {location}")
        outer = path
        if kind == "tar":
            outer = scratch / "outer.zip"
            _tar_to_zip(path, outer, location)
        with _open_safe_zip(outer, location, archive_bytes) as archive:
            members = archive.infolist()
            inner = _inner_archives(members)
            unchanged = not inner and rename is None and not _has_windows_names(members)
            if not unchanged:
                if inner:
                    repacked = _merged_members(archive, inner, scratch, location, archive_bytes)
                else:
                    require_disk_space(target.parent, sum(m.file_size for m in members), f"repacking {location}")
                    repacked = _zip_members(archive, members, location)
                _write_zip(aside, repacked if rename is None else _renamed(repacked, rename))
        if unchanged:
            if kind == "zip":
                shutil.copyfile(path, aside)
            else:
                outer.replace(aside)
    return kind


def pack_folder(folder: Path, target: Path) -> None:
    """Packs a folder into a zip whose bytes depend on nothing but the names and contents of its files.

    Links to files and folders are followed. Names that are not UTF-8 are kept apart by their escaped bytes.

    Args:
        folder: what to pack.
        target: the zip to write; it appears whole or not at all.

    Raises:
        CatdogError: something in it cannot be read, is no file, is a link to nothing or to a folder above itself,
            changes while it is packed, or the disk is too full.
    """
    with written_aside(target) as aside:
        try:
            paths = sorted(_walk(folder))
            sizes = {path: path.stat().st_size for path in paths if path.is_file()}
        except OSError as error:
            raise DiskError(
                f"dataset folder has something that cannot be read: {error.filename} ({error.strerror}); check the "
                "permissions of it and of its folder"
            ) from None
        require_disk_space(target.parent, sum(sizes.values()), f"packing {folder}")
        _write_zip(aside, _folder_members(folder, paths, sizes))


def open_archive(path: Path) -> zipfile.ZipFile:
    """Opens a zip with its names as they were meant, whatever tool wrote them.

    Names that are flagged as UTF-8, or carry a Unicode name beside the legacy one, are that. The other names are read
    as UTF-8 where all of them are (tools on macOS and Linux often forget the flag), else as the code page 437 of the
    zip standard, where each byte stands for a character: perhaps the wrong one, but files stay apart.

    Raises:
        CatdogError: the file is no sound zip archive.
    """
    try:
        return _open_zip(path)
    except (*_DAMAGE, OSError) as error:
        raise CatdogError(f"{path} cannot be read as a zip archive ({error}); fetch it again") from None


def duplicate_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Returns the files that a later one of the same name hides, in the archive's order.

    `archive.read(name)` gives the last file of a name; these are the others.
    """
    return [
        member
        for member in archive.infolist()
        if not member.is_dir() and archive.getinfo(member.filename) is not member
    ]


def read_member(archive: zipfile.ZipFile, member: str | zipfile.ZipInfo) -> bytes:
    """Returns the content of a file in an archive, checked by its checksum.

    `ZipFile.read` would follow a member that unpacks to more than it claims to any size.

    Raises:
        MemberError: it is damaged, protected, or compressed in a way that cannot be read.
    """
    info = archive.getinfo(member) if isinstance(member, str) else member
    try:
        with archive.open(info) as file:
            return file.read(info.file_size)
    except (*_DAMAGE, OSError, RuntimeError) as error:  # RuntimeError: a password protects it
        raise MemberError(f"damaged in the archive: {' '.join(str(error).split())[:200]}") from None


def _refusal(location: str, sentence: str) -> CatdogError:
    return CatdogError(f"dataset = {location!r} {sentence}")


@contextlib.contextmanager
def _damage_told(location: str, kind: Kind) -> Iterator[None]:
    """Turns what the standard library raises on archives that are damaged or cannot be read into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        if error.errno is not None:
            raise DiskError(
                f"dataset = {location!r} cannot be read: {error.strerror}; check the path and its permissions"
            ) from None
        raise _damaged(location, kind, error) from None
    except _DAMAGE as error:
        raise _damaged(location, kind, error) from None


def _damaged(location: str, kind: Kind, error: Exception) -> CatdogError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return _refusal(location, f"is a damaged {kind} archive ({reason}); fetch it again")


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, on the same disk, that is gone afterwards and first rid of what a killed run left."""
    folder = target.with_name(target.name + ".scratch")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kind(path: Path, location: str) -> Kind:
    with _damage_told(location, "zip"), path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise _refusal(location, "cannot be used: the file is empty (0 bytes); fetch it again")
    for magic, name in _OTHER_FORMATS:
        if head.startswith(magic):
            raise _refusal(location, f"is a {name} archive, which cannot be read here; unpack it and give the folder")
    # Tar first: a tar that ends with a zip looks like a zip as well.
    with _damage_told(location, "tar"), contextlib.suppress(tarfile.ReadError), _open_tar(path, location):
        return "tar"
    if zipfile.is_zipfile(path):
        return "zip"
    raise _refusal(
        location,
        "is no archive that can be read; give a folder, .zip, .tar, .tar.gz or .tar.xz "
        "(a broken download looks like this too)",
    )


# --- names and sizes -------------------------------------------------------------------------------------------------


def _require_safe_name(name: str, location: str) -> None:
    shown = name if len(name) <= 200 else name[:200] + "..."
    if not name or _CONTROL_CHARACTER.search(name):
        raise _refusal(
            location,
            f"has a member whose name is empty or holds control characters: {shown!r}; unpack it, rename the file "
            "and give the folder",
        )
    if len(name) > MAX_NAME_LENGTH:
        raise _refusal(location, f"has a member whose name has {len(name):,} characters: {shown!r}; do not trust it")
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or ".." in re.split(r"[/\\]", name):
        raise _refusal(location, f"has a member that leaves the archive: {shown!r}; do not trust it")


def _neither_file_nor_folder(location: str, name: str) -> CatdogError:
    return _refusal(
        location,
        f"has a member that is neither a file nor a folder: {name!r}; unpack it, replace links by files and give "
        "the folder",
    )


def _require_bearable_count(count: int, location: str) -> None:
    if count > MAX_MEMBERS:
        raise _refusal(location, f"has more than {MAX_MEMBERS:,} members; divide it")


def _require_bearable_member(name: str, size: int, location: str) -> None:
    # An archive inside may well be larger: it holds many files.
    if size > MAX_MEMBER_BYTES and not _ARCHIVE_NAME.fullmatch(name):
        raise _refusal(
            location,
            f"has a member of {size / 1e9:,.1f} GB: {name!r}; no picture is larger than {MAX_MEMBER_BYTES / 1e9:g} GB, "
            "do not trust it",
        )


def _bearable_bytes(archive_bytes: int) -> int:
    return max(BOMB_BYTES, BOMB_RATIO * archive_bytes)


def _require_bearable_total(total: int, archive_bytes: int, location: str) -> None:
    if total > _bearable_bytes(archive_bytes):
        raise _bomb(archive_bytes, location)


def _bomb(archive_bytes: int, location: str) -> CatdogError:
    return _refusal(
        location,
        f"has {archive_bytes / 1e6:,.1f} MB but unpacks to more than {_bearable_bytes(archive_bytes) / 1e6:,.0f} MB, "
        "as a zip bomb does; do not trust it, or unpack it and give the folder",
    )


# --- zip -------------------------------------------------------------------------------------------------------------


def _open_zip(path: Path) -> zipfile.ZipFile:
    """As `open_archive`, with the standard library's exceptions."""
    encoding = "utf-8"
    try:
        archive = zipfile.ZipFile(path, metadata_encoding=encoding)
    except UnicodeDecodeError:
        encoding = "cp437"
        archive = zipfile.ZipFile(path)
    renamed = False
    for member in archive.infolist():
        unicode_name = _unicode_name(member, encoding)
        if unicode_name is not None and unicode_name != member.filename:
            # The name in the local header stays `orig_filename`, with which the standard library compares it.
            member.filename, renamed = unicode_name, True
    if renamed:
        archive.NameToInfo = {member.filename: member for member in archive.infolist()}
    return archive


def _unicode_name(member: zipfile.ZipInfo, encoding: str) -> str | None:
    """The name in the Info-ZIP Unicode Path field, which counts where its checksum is that of the legacy name."""
    extra = member.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH_FIELD and len(field) > 5 and not member.flag_bits & 0x800:
            legacy_name = member.orig_filename.encode(encoding)
            if int.from_bytes(field[1:5], "little") == zlib.crc32(legacy_name):
                return field[5:].decode("utf-8", "backslashreplace")
    return None


@contextlib.contextmanager
def _open_safe_zip(path: Path, location: str, archive_bytes: int) -> Iterator[zipfile.ZipFile]:
    with _damage_told(location, "zip"):
        archive = _open_zip(path)
    with archive:
        _require_safe_zip(archive, location, archive_bytes)
        yield archive


def _require_safe_zip(archive: zipfile.ZipFile, location: str, archive_bytes: int) -> None:
    members = archive.infolist()
    _require_bearable_count(len(members), location)
    for member in members:
        for name in {member.orig_filename, member.filename}:
            _require_safe_name(name, location)
        is_link_or_device = stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR)
        if is_link_or_device or (member.is_dir() and member.file_size):
            raise _neither_file_nor_folder(location, member.filename)
        if member.flag_bits & 0x1:
            raise _refusal(location, f"is protected by a password ({member.filename}); unpack it and give the folder")
        if member.compress_type not in _ZIP_METHODS:
            raise _refusal(
                location,
                f"has a member compressed by method {member.compress_type}, which cannot be read here: "
                f"{member.filename!r}; unpack it and give the folder",
            )
        _require_bearable_member(member.filename, member.file_size, location)
    _require_bearable_total(sum(member.file_size for member in members), archive_bytes, location)
    # Overlapping members are how a small zip holds petabytes (D. Fifield, "A better zip bomb", 2019).
    ordered = sorted(members, key=lambda member: member.header_offset)
    ends = [member.header_offset + _LOCAL_HEADER_BYTES + member.compress_size for member in ordered]
    next_starts = [*(member.header_offset for member in ordered), archive.start_dir][1:]
    for member, end, next_start in zip(ordered, ends, next_starts, strict=True):
        if end > next_start or member.header_offset < 0:
            raise _refusal(
                location,
                f"is a damaged zip archive ({member.filename!r} overlaps what follows it); fetch it again, and do not "
                "trust it if it stays so",
            )


def _has_windows_names(members: Iterable[zipfile.ZipInfo]) -> bool:
    """Says whether the folders are told apart by backslashes, as some tools on Windows write them.

    Beside slashes a backslash is an ordinary character of a name.
    """
    names = [member.filename for member in members]
    return any("\\" in name for name in names) and not any("/" in name for name in names)


def _zip_members(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], location: str) -> Iterator[_Member]:
    windows = _has_windows_names(archive.infolist())
    for member in members:
        name = member.filename.replace("\\", "/") if windows else member.filename
        yield name, None if name.endswith("/") else _zip_chunks(archive, member, location)


def _zip_chunks(archive: zipfile.ZipFile, member: zipfile.ZipInfo, location: str) -> Iterator[bytes]:
    with _damage_told(location, "zip"), archive.open(member) as file:
        yield from _chunks(file)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _renamed(members: Iterable[_Member], rename: Rename) -> Iterator[_Member]:
    for name, chunks in members:
        if chunks is not None and (new_name := rename(name)) is not None:
            yield new_name, chunks


def _write_zip(target: Path, members: Iterable[_Member]) -> None:
    """Stores members in a zip whose bytes depend on nothing but their names and contents."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive, warnings.catch_warnings():
        # A name that stands twice is kept twice on purpose: none of the files may be lost.
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for name, chunks in members:
            # A zip's names are UTF-8; a name that is not is kept apart by its escaped bytes.
            readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            member = zipfile.ZipInfo(readable, ZIP_DATE)
            if chunks is not None:
                with archive.open(member, "w", force_zip64=True) as writer:
                    writer.writelines(chunks)
            elif readable not in archive.NameToInfo:
                archive.writestr(member, b"")


# --- tar -------------------------------------------------------------------------------------------------------------


class _BoundedStream:
    """What tarfile reads from: stops at sizes that no data set has, to which tarfile itself would follow an archive."""

    def __init__(self, stream: IO[bytes], archive_bytes: int, location: str) -> None:
        self._stream, self._archive_bytes, self._location = stream, archive_bytes, location

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, position: int) -> int:
        self._require_bearable(position)
        return self._stream.seek(position)

    def read(self, size: int) -> bytes:
        # Files are read in small pieces, but a header in one, of the size that it claims for itself.
        if not 0 <= size <= _MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims to have {size:,} bytes")
        data = self._stream.read(size)
        self._require_bearable(self._stream.tell())
        return data

    def _require_bearable(self, position: int) -> None:
        _require_bearable_total(position, self._archive_bytes, self._location)


@contextlib.contextmanager
def _open_tar(path: Path, location: str) -> Iterator[tarfile.TarFile]:
    with path.open("rb") as file:
        head = file.read(8)
    decompressor = next((opened for magic, opened in _DECOMPRESSORS if head.startswith(magic)), None)
    with decompressor(path) if decompressor else path.open("rb") as stream:
        bounded = cast(IO[bytes], _BoundedStream(stream, path.stat().st_size, location))
        with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            yield archive


def _tar_to_zip(path: Path, target: Path, location: str) -> None:
    _write_zip(target, _tar_members(path, location))


def _tar_members(path: Path, location: str) -> Iterator[_Member]:
    # In the archive's own order: a compressed tar can only be read forwards at a bearable cost.
    archive_bytes = path.stat().st_size
    count = total = 0
    with _damage_told(location, "tar"), _open_tar(path, location) as archive:
        while (member := archive.next()) is not None:
            cast(Any, archive).members = []  # tarfile would keep over a kilobyte of every member
            count, total = count + 1, total + member.size
            _require_bearable_count(count, location)
            name = member.name.removeprefix("./")
            if name in ("", "."):
                continue
            _require_safe_name(name, location)
            if member.isdir():
                yield name + "/", None
            elif member.isfile():
                if member.size < 0:
                    raise tarfile.ReadError(f"{name!r} claims to have {member.size} bytes")
                _require_bearable_member(name, member.size, location)
                _require_bearable_total(total, archive_bytes, location)
                yield name, _tar_chunks(archive, member, location)
            else:
                raise _neither_file_nor_folder(location, name)
        _require_sound_end(archive)


def _tar_chunks(archive: tarfile.TarFile, member: tarfile.TarInfo, location: str) -> Iterator[bytes]:
    with _damage_told(location, "tar"):
        file = archive.extractfile(member)
        assert file is not None, "a regular file has content"
        yield from _chunks(file)


def _require_sound_end(archive: tarfile.TarFile) -> None:
    """Raises tarfile.ReadError or the decompressor's error unless the archive is whole to its end.

    tarfile takes a damaged header for the end of the archive, and stops before the compression's checksum.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(512).strip(b"\0"):
        raise tarfile.ReadError("a header is damaged")
    while file.read(_CHUNK):
        pass


# --- archives in archives --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inner:
    """An archive that lay in another one."""

    location: str  # what messages call it
    stem: str  # its name without suffix
    path: Path  # where it is now, as a zip
    files: frozenset[str]  # names
    bytes: int  # of all its files


def _inner_archives(members: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The archives in an archive, where it has no pictures of its own; else they are files like others."""
    visible = [member for member in members if not member.is_dir() and not is_hidden(_slashed(member.filename))]
    if any(_is_image_name(member.filename) for member in visible):
        return []
    return [member for member in visible if _ARCHIVE_NAME.fullmatch(member.filename)]


def _slashed(name: str) -> str:
    return name.replace("\\", "/")


def _is_image_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _merged_members(
    archive: zipfile.ZipFile, inner: Sequence[zipfile.ZipInfo], scratch: Path, location: str, archive_bytes: int
) -> Iterator[_Member]:
    """The files of an archive and of the archives in it, see `_keep_own_names` for what they are called."""
    require_disk_space(scratch, sum(member.file_size for member in inner), "unpacking the archives in the data set")
    opened = []
    total = 0
    for number, member in enumerate(inner):
        opened.append(_unpack_inner(archive, member, scratch / f"{number}.zip", location))
        total += opened[-1].bytes
        _require_bearable_total(total, archive_bytes, location)
    require_disk_space(scratch, total, "merging the archives in the data set")

    own = [member for member in archive.infolist() if member not in inner]
    own_files = frozenset(name for name, chunks in _zip_members(archive, own, location) if chunks is not None)
    keep = _keep_own_names(own_files, opened)
    yield from _zip_members(archive, own, location)
    for one in opened:
        prefix = "" if keep else one.stem + "/"
        with _open_zip(one.path) as packed:
            for name, chunks in _zip_members(packed, packed.infolist(), one.location):
                yield prefix + name, chunks


def _keep_own_names(own_files: frozenset[str], inner: Sequence[_Inner]) -> bool:
    """Says whether the files of inner archives keep their names, or come below a folder called as their archive.

    Its name counts where it says what their own do not: where names would collide, where a picture lies in no folder
    (`cats.zip`, `dogs.zip`), and where `train.zip` and `test.zip` have the same folders. Otherwise the archives are
    parts that were made to be unpacked in one place.
    """
    files = [{name for name in names if not is_hidden(name)} for names in (own_files, *(one.files for one in inner))]
    folders = [{name.partition("/")[0] for name in names} for names in files[1:]]
    bare = any(_is_image_name(name) and "/" not in name for names in files[1:] for name in names)
    splits = all(_SPLIT_NAME.match(PurePosixPath(one.stem).name) for one in inner)
    return _disjoint(files) and not bare and not (splits and not _disjoint(folders))


def _disjoint(sets: Sequence[Collection[str]]) -> bool:
    return len(set().union(*sets)) == sum(len(one) for one in sets)


def _unpack_inner(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, location: str) -> _Inner:
    match = _ARCHIVE_NAME.fullmatch(_slashed(member.filename))
    assert match is not None, "only members of such names are taken for archives"
    location = f"{location}/{member.filename}"
    raw = target.with_suffix(".raw")
    with raw.open("wb") as copy:
        copy.writelines(_zip_chunks(archive, member, location))
    archive_bytes = raw.stat().st_size
    if _kind(raw, location) == "tar":
        _tar_to_zip(raw, target, location)
        raw.unlink()
    else:
        raw.replace(target)
    with _open_safe_zip(target, location, archive_bytes) as packed:
        members = packed.infolist()
        files = frozenset(name for name, chunks in _zip_members(packed, members, location) if chunks is not None)
        return _Inner(location, match["stem"], target, files, sum(one.file_size for one in members))


# --- folder ----------------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise CatdogError(f"dataset folder {error.filename} cannot be read: {error.strerror}; check its permissions")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        for name in (*folders, *files):
            path = Path(parent, name)
            if _CONTROL_CHARACTER.search(name):
                raise CatdogError(f"dataset folder has a name with control characters: {str(path)!r}; rename it")
            if not path.exists():
                raise CatdogError(f"dataset folder has a link to nothing: {path}; remove or mend it")
            if not path.is_dir() and not path.is_file():
                raise CatdogError(f"dataset folder has something that is no file: {path}; remove it")
            if path.is_symlink() and path.is_dir() and _leads_upwards(path):
                raise CatdogError(f"dataset folder has a link to a folder above itself: {path}; remove it")
            yield path


def _leads_upwards(link: Path) -> bool:
    # Each folder on the way may itself have been reached through a link.
    real = link.resolve()
    return any(real == above.resolve() for above in link.absolute().parents)


def _folder_members(folder: Path, paths: Iterable[Path], sizes: Mapping[Path, int]) -> Iterator[_Member]:
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path in sizes:
            yield name, _file_chunks(path, sizes[path])
        else:
            yield name + "/", None


def _file_chunks(path: Path, size: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from _chunks(file)
            read = file.tell()
    except OSError as error:
        raise CatdogError(
            f"dataset folder has a file that cannot be read: {path} ({error.strerror}); mend or remove it"
        ) from None
    if read != size:
        raise CatdogError(f"dataset folder has a file that changed while it was packed: {path}; run again")


__all__ = [
    "MemberError",
    "Rename",
    "duplicate_members",
    "open_archive",
    "pack_archive",
    "pack_folder",
    "read_member",
]
