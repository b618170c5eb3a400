"""Finds the pictures that a user points at: files, folders, patterns, archives, addresses and standard input."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import os
import re
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from catdog import paths
from catdog.archives import open_archive, pack_archive, read_member
from catdog.errors import CatdogError
from catdog.files import readable
from catdog.images import FORMATS
from catdog.names import IMAGE_SUFFIXES, is_hidden
from catdog.transfer import public_url

if TYPE_CHECKING:
    import requests

MAX_BYTES = 1 << 30
"""Of an archive's member and of standard input: no picture takes as much, and a small archive unpacks to any size."""
MAX_DOWNLOAD_BYTES = 100_000_000
"""Of a picture from the web."""
MAX_DOWNLOAD_SECONDS = 120.0
"""For all of it: a server may send a byte now and then for ever."""

_SILENCE_SECONDS = (10.0, 30.0)  # to connect; between two pieces of the answer
_STANDARD_INPUT = "-"
_WAYS = "give image files, folders, archives, patterns such as 'photos/*.jpg', http(s) addresses, or - to read them in"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TAR_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # gzip, bzip2, xz: no picture begins like that


class UnreadableError(Exception):
    """A picture cannot be had; the message is the reason, for the list of unreadable files."""


@dataclass(frozen=True)
class ImageFile:
    """A file to classify."""

    name: str  # as it is told to the user
    read: Callable[[], bytes]  # raises UnreadableError, archives.MemberError or OSError


_Found = tuple[list[ImageFile], list[str]]  # the files to classify, and the names of those passed over for their ending


def find_images(
    inputs: Sequence[str | Path],
    archives: contextlib.ExitStack,
    *,
    read_standard_input: Callable[[], bytes] = lambda: sys.stdin.buffer.read(MAX_BYTES + 1),
) -> tuple[list[ImageFile], list[str]]:
    """Lists the images that a user points at, in the order given; those of a folder or archive sorted by name.

    A folder is searched to its bottom. In folders, archives and what a pattern finds, hidden files are left out, and
    so is what has not the ending of an image; a file that is named itself is always taken for an image.

    Standard input is the bytes of one image, or else text with one input a line.

    Args:
        inputs: files, folders, archives (zip, tar, tar.gz, tar.bz2, tar.xz), patterns with `*`, `?`, `[...]` and `**`
            (for any folders), http and https addresses of pictures, which are fetched when they are read, and `-` for
            standard input.
        archives: closes the archives, which the files are read from.
        read_standard_input: called once, if at all.

    Returns:
        The files, and the names of those that were passed over for their ending.

    Raises:
        CatdogError: there is no such file, it cannot be read, or there is no image at all.
    """
    texts = [os.fspath(one) for one in inputs]
    if texts.count(_STANDARD_INPUT) > 1:
        raise CatdogError(f"{_STANDARD_INPUT} is given twice, but standard input can be read once; leave one out")
    files: list[ImageFile] = []
    others: list[str] = []
    for text in texts:
        found = _from_standard_input(read_standard_input(), archives) if text == "-" else _find(text, archives)
        files += found[0]
        others += found[1]
    if not files:
        given = ", ".join(map(readable, texts[:3])) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
        raise CatdogError(
            f"there are no images in {given}; give image files, or folders or archives of files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files, others


def find_unlabelled(root: Path, archives: contextlib.ExitStack) -> list[ImageFile]:
    """Lists the images of the data set that have no label, as the split stage found them.

    Args:
        root: the repository's root.
        archives: closes the archive, which the files are read from.

    Raises:
        CatdogError: the pipeline has not run, the data set has no such images, or its files disagree.
    """
    listed, raw = root / paths.UNLABELLED, root / paths.RAW
    for path in (listed, raw):
        if not path.is_file():
            raise CatdogError(f"{path} does not exist; run `dvc repro` first, or give the paths of images")
    with listed.open(newline="", encoding="utf-8") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    if not names:
        raise CatdogError("the data set has no images without a label; give the paths of the images to classify")
    archive = archives.enter_context(open_archive(raw))
    members = {member.filename: member for member in archive.infolist()}
    for name in names:
        if name not in members:
            raise CatdogError(f"{paths.UNLABELLED} lists {name!r}, which {paths.RAW} does not hold; run `dvc repro`")
    return [ImageFile(name, partial(_read_member, archive, members[name])) for name in names]


def _find(text: str, archives: contextlib.ExitStack) -> _Found:
    if _ADDRESS.match(text):
        return [_from_address(text)], []
    path = Path(text)
    try:
        if path.is_dir():
            return _by_ending(ImageFile(readable(file), file.read_bytes) for file in _walk(path))
        if path.is_file():
            return _from_file(path, archives)
        exists = path.exists()
    except OSError as error:
        raise CatdogError(f"{readable(path)} cannot be read: {error.strerror}; check the path") from None
    if exists:
        raise CatdogError(f"{readable(path)} is neither a file nor a folder; {_WAYS}")
    if glob.has_magic(text):
        return _from_pattern(text, archives)
    raise CatdogError(f"{readable(path)} does not exist; {_WAYS}")


def _by_ending(files: Iterable[ImageFile]) -> _Found:
    """Parts files from those that have not the ending of an image."""
    taken: list[ImageFile] = []
    others: list[str] = []
    for file in files:
        if PurePosixPath(file.name).suffix.lower() in IMAGE_SUFFIXES:
            taken.append(file)
        else:
            others.append(file.name)
    return taken, others


def _walk(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, sorted; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise CatdogError(f"folder {error.filename} cannot be read: {error.strerror}; check its permissions")

    found: list[Path] = []
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:  # a link to a folder above would never end
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted(found)


def _from_pattern(pattern: str, archives: contextlib.ExitStack) -> _Found:
    taken: dict[str, ImageFile] = {}
    others: dict[str, None] = {}
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 Path.glob takes no absolute patterns
    matches = sorted(match for match in found if not is_hidden(Path(match).name))
    for match in matches:
        path = Path(match)
        # A dangling link is no mistake in the pattern: it fails by itself when it is read, as in a folder.
        if not path.exists() or (path.is_file() and _archive_kind(path) is None):
            files, passed = _by_ending([ImageFile(readable(path), path.read_bytes)])
        else:
            files, passed = _find(match, archives)
        # `**` finds a folder and the files in it.
        taken |= {file.name: file for file in files}
        others |= dict.fromkeys(passed)
    if not matches:
        raise CatdogError(f"{readable(pattern)} matches no file; {_WAYS}")
    return list(taken.values()), list(others)


# --- archives --------------------------------------------------------------------------------------------------------


def _from_file(path: Path, archives: contextlib.ExitStack) -> _Found:
    kind = _archive_kind(path)
    if kind is None:
        return [ImageFile(readable(path), path.read_bytes)], []
    archive = archives.enter_context(open_archive(path if kind == "zip" else _zip_of_tar(path, archives)))
    members = sorted(archive.infolist(), key=lambda member: member.filename)
    return _by_ending(
        ImageFile(f"{readable(path)}/{member.filename}", partial(_read_member, archive, member))
        for member in members
        if not member.is_dir() and not is_hidden(member.filename)
    )


def _archive_kind(path: Path) -> Literal["zip", "tar"] | None:
    """Tells what an archive is by its name and first bytes; None for all else."""
    # Not by zipfile.is_zipfile: it also takes a picture with an archive behind its end for a zip.
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError:
        return None  # told when it is read
    if name.endswith(".zip") or head.startswith(b"PK\x03\x04"):
        return "zip"
    is_tar = name.endswith(_TAR_SUFFIXES) or head.startswith(_COMPRESSED) or head[257:262] == b"ustar"
    return "tar" if is_tar else None


def _zip_of_tar(path: Path, archives: contextlib.ExitStack) -> Path:
    """Repacks a tar, which can only be read from its beginning to its end, as a zip, which threads may share."""
    folder = archives.enter_context(tempfile.TemporaryDirectory(prefix="catdog-"))
    target = Path(folder, "repacked.zip")
    try:
        pack_archive(path, target, location=readable(path))
    except CatdogError as error:
        # It speaks of the parameter that data sets come by.
        raise CatdogError(str(error).removeprefix("dataset = ")) from None
    return target


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_BYTES:
        raise UnreadableError(f"{member.file_size:,} bytes are more than the limit of {MAX_BYTES:,}")
    return read_member(archive, member)


# --- standard input --------------------------------------------------------------------------------------------------


def _from_standard_input(data: bytes, archives: contextlib.ExitStack) -> _Found:
    if len(data) > MAX_BYTES:
        raise CatdogError(f"standard input has more than {MAX_BYTES:,} bytes; send one image, or paths, one a line")
    # What is no picture and has a zero byte is no text either: a damaged picture, which is told as any other is.
    if _begins_like_a_picture(data) or b"\0" in data:
        return [ImageFile("standard input", lambda: data)], []
    lines = [os.fsdecode(line.removesuffix(b"\r")) for line in data.split(b"\n")]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise CatdogError("standard input is empty; send the bytes of an image, or paths, one a line")
    if _STANDARD_INPUT in texts:
        raise CatdogError("standard input names itself (-) among the paths; leave that line out")
    found = [_find(text, archives) for text in texts]
    return [file for files, _ in found for file in files], [name for _, others in found for name in others]


def _begins_like_a_picture(data: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    except Exception:  # Pillow's plugins raise nearly anything on what is not theirs
        return False


# --- the web ---------------------------------------------------------------------------------------------------------


def _from_address(url: str) -> ImageFile:
    name = public_url(url)
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        raise CatdogError(f"{name} is no address that can be understood; check it") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise CatdogError(f"{name} is no http or https address; download the file and give its path")
    if not host:
        raise CatdogError(f"{name} names no server; give a whole address, as https://example.org/picture.jpg")
    return ImageFile(name, partial(download_picture, url))


def download_picture(url: str) -> bytes:
    """Fetches a picture from an http or https address; redirects are followed to such addresses only.

    Raises:
        UnreadableError: it cannot be reached, is refused, too large, too slow, cut off, or a web page.
    """
    deadline = time.monotonic() + MAX_DOWNLOAD_SECONDS
    fetched: Future[bytes] = Future()

    def fetch() -> None:
        try:
            fetched.set_result(_fetch(url, deadline))
        except BaseException as error:
            fetched.set_exception(error)

    # requests limits the silence between two bytes, not all of it: names, headers and redirects may come a byte now
    # and then. A thread of its own can be left behind; it ends with its server or with this process.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        return fetched.result(MAX_DOWNLOAD_SECONDS)
    except TimeoutError:
        raise _too_slow() from None


def _fetch(url: str, deadline: float) -> bytes:
    import requests
    import urllib3

    headers = {"Accept-Encoding": "identity"}  # unpacked as it comes, a small answer could have any size
    hooks = {"response": _close_redirect}
    try:
        # The only kinds of address that requests knows are http and https.
        with requests.get(url, headers=headers, stream=True, timeout=_SILENCE_SECONDS, hooks=hooks) as answer:
            return _body(answer, deadline)
    except requests.exceptions.InvalidSchema:
        raise UnreadableError("the server redirects to something other than http or https") from None
    except requests.TooManyRedirects:
        raise UnreadableError("the server redirects without end") from None
    except requests.exceptions.SSLError:
        raise UnreadableError("the server's certificate cannot be trusted") from None
    except requests.ConnectTimeout:
        raise UnreadableError(f"no connection within {_SILENCE_SECONDS[0]:g} seconds") from None
    except (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError):
        raise UnreadableError(f"nothing came for {_SILENCE_SECONDS[1]:g} seconds") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError) as error:
        raise UnreadableError(f"no connection, or it was cut ({_first_cause(error)})") from None
    except (requests.RequestException, UnicodeError):
        raise UnreadableError("the address is not valid") from None


def _close_redirect(answer: requests.Response, **_: Any) -> None:
    # Otherwise requests reads its body, of any size, before it goes on, also where it is not to follow.
    if answer.is_redirect:
        answer.close()


def _body(answer: requests.Response, deadline: float) -> bytes:
    if answer.status_code != 200:
        raise UnreadableError(f"the server answers {answer.status_code} {answer.reason or ''}".rstrip())
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise UnreadableError("is a web page; give the address of the picture in it")
    data = bytearray()
    # As it comes, without waiting for a whole piece: a slow answer could not be given up.
    while piece := answer.raw.read1(1 << 16, decode_content=False):
        data += piece
        if len(data) > MAX_DOWNLOAD_BYTES:
            raise UnreadableError(f"is larger than {MAX_DOWNLOAD_BYTES / 1e6:g} MB, the limit of a download")
        if time.monotonic() > deadline:
            raise _too_slow()
    return bytes(data)


def _too_slow() -> UnreadableError:
    return UnreadableError(f"does not come within {MAX_DOWNLOAD_SECONDS:g} seconds, the limit of a download")


def _first_cause(error: BaseException) -> str:
    """What the innermost error says, without the address, which may hold a password."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or type(error).__name__
