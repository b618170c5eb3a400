"""Downloads that end whole or not at all: resumed, retried, checked, from the first mirror that gives the file.

The bytes collect in a part, beside a small JSON that says which version of the file they belong to. A part outlives
the process that began it, however that ended; it is continued only where the server proves that the file is still
the same, and is handed out only after its size and SHA-256 were checked. It goes when it was used: a whole part that
could not be packed is found again as one that lacks nothing.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import http
import json
import re
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus, urljoin, urlsplit

from tqdm import tqdm

from catdog.errors import CatdogError
from catdog.files import require_disk_space, sha256_of, used_up, write_json

if TYPE_CHECKING:
    import requests

_CHUNK = 1 << 20
# Object stores answer one request a read, so that short reads would mostly wait.
_OBJECT_STORE_CHUNK = 8 << 20
_TRY_LATER = (408, 425, 429)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_SECRET_NAME = re.compile(
    r"x-(amz|goog|ms)-.*|.*(token|secret|signature|passw|credential|session).*|.*key(-?pair)?(-?id)?|.*accessid"
    r"|auth|authorization|sig|pwd|pass|policy|expires|code",
    re.IGNORECASE,
)
_WEB_TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*")


@dataclass(frozen=True)
class Patience:
    """How long a mirror is waited for; all times in seconds."""

    connect_timeout: float = 10
    stall_timeout: float = 60  # without a single byte
    attempts: int = 5  # in a row that did not bring the part further
    first_wait: float = 1  # before the next attempt; doubled after each one that brought nothing
    longest_wait: float = 30
    longest_retry_after: float = 120  # a server that asks for more is given up


@dataclass(frozen=True)
class Transferred:
    """What a download brought, and from where."""

    url: str  # of the mirror that gave it, as `public_url` shows it
    bytes: int
    sha256: str
    etag: str | None
    last_modified: str | None


@dataclass(frozen=True)
class _Version:
    """Which version of which file the bytes of a part belong to."""

    url: str
    etag: str | None
    last_modified: str | None
    total: int | None  # bytes of the whole file, where the server says it

    @property
    def validator(self) -> str | None:
        """What `If-Range` may carry (RFC 9110, 13.1.5): a strong entity tag, else the date."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified

    def contradicts(self, other: _Version) -> bool:
        """Tells whether two answers cannot be about the same bytes; mirrors share nothing but the length."""
        if _differ(self.total, other.total):
            return True
        return self.url == other.url and (_differ(self.validator, other.validator) or _differ(self.etag, other.etag))


@dataclass(frozen=True)
class _Job:
    """What every step of a download needs to know."""

    target: Path
    part: Path
    sha256: str  # lower case, or ""
    size: int | None
    patience: Patience


@dataclass(frozen=True)
class _Reply:
    """An open answer: bytes of a version of a file, from an offset to the end."""

    offset: int
    version: _Version
    chunks: Iterator[bytes]


class _Lost(Exception):
    """An attempt failed; another one may succeed."""

    def __init__(self, reason: str, *, wait: float | None = None, discard: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds, where the server names them
        self.discard = discard  # the part is of no use


class _Refused(Exception):
    """A mirror will not give the file, however often it is asked."""


@contextlib.contextmanager
def downloaded(
    urls: Sequence[str],
    target: Path,
    *,
    parts: Path,
    sha256: str = "",
    size: int | None = None,
    patience: Patience = Patience(),
) -> Iterator[tuple[Path, Transferred]]:
    """Downloads a file from the first mirror that gives it as it should be, and removes it when the block has used it.

    A call after a cut, or after a killed process, goes on where the part ends. A file that the block could not use
    up, see `files.used_up`, is taken by the next call. Of two processes that download the same file into the same
    `parts`, the second waits until the first has used its own.

    Args:
        urls: mirrors of one file, in the order in which they are tried: http, https, s3, gs, or any other protocol
            that fsspec has a client for.
        target: what the block will make of the file. Room for one as large is asked for with that for the file.
        parts: the folder of downloads that are unfinished or unused.
        sha256: of the file, 64 hexadecimal digits, or "" where it is unknown. With it a mirror can continue what
            another one began.
        size: of the file in bytes, where it is known.
        patience: for each mirror.

    Yields:
        The file, to be read only, and what is known of it.

    Raises:
        CatdogError: no mirror gave the file, or the disk is full or cannot be written to.
    """
    with contextlib.ExitStack() as held:
        part, transferred = _from_first_mirror(urls, target, parts, sha256.lower(), size, patience, held)
        with used_up(lambda: _remove(part)):
            yield part, transferred


def _from_first_mirror(
    urls: Sequence[str],
    target: Path,
    parts: Path,
    sha256: str,
    size: int | None,
    patience: Patience,
    held: contextlib.ExitStack,
) -> tuple[Path, Transferred]:
    """Returns the whole part of the first mirror that gives it; `held` keeps other processes from it."""
    reasons: dict[str, str] = {}
    begun: list[Path] = []
    for number, url in enumerate(urls, start=1):
        shown = public_url(url)
        key = sha256 or hashlib.sha256(shown.encode()).hexdigest()
        job = _Job(target, parts / f"{key}.part", sha256, size, patience)
        try:
            with contextlib.ExitStack() as alone:
                alone.enter_context(_alone(job.part))
                transferred = _from_mirror(url, job)
                for part in set(begun) - {job.part}:
                    _forget(part)
                held.push(alone.pop_all())
                return job.part, transferred
        except _Refused as refused:
            reasons[shown] = str(refused)
            begun.append(job.part)
            if number < len(urls):
                _say(f"{shown}: {refused}; trying the next address")
        except OSError as error:
            # Whatever a server or a client does was told apart before; this is the disk.
            raise CatdogError(
                f"the download cannot be written to {error.filename or parts}: {error.strerror or error}; "
                "free or mend it and run again, which goes on where this stopped"
            ) from None
    raise CatdogError(
        f"the download failed: {'; '.join(f'{shown}: {reason}' for shown, reason in reasons.items())}; run again to "
        "go on where it stopped, check the address, or fetch the file yourself and give its path"
    )


def identity(url: str, *, timeout: float = 5) -> dict[str, Any]:
    """Looks at a file without downloading it, so that a change can be noticed cheaply.

    Args:
        url: an address as `download` takes it.
        timeout: seconds, for the connection and for each answer.

    Returns:
        `etag` and `last_modified` (text) and `bytes` (number), each None where the server does not say it.

    Raises:
        CatdogError: the file cannot be reached.
    """
    try:
        version = _look_http(url, timeout) if _is_http(url) else _look_fsspec(url, timeout, timeout)[2]
    except (_Lost, _Refused) as error:
        raise CatdogError(f"{public_url(url)} cannot be reached: {error}; check the address and the network") from None
    return {"etag": version.etag, "last_modified": version.last_modified, "bytes": version.total}


def public_url(url: str) -> str:
    """Returns an address without user, password, fragment, and query values that are or look like secrets.

    The rest stays as it was given, so that the address still tells which file it is.
    """
    if _is_http(url):
        url = url.partition("#")[0]
    address, _, query = url.partition("?")
    address = re.sub(r"(://)[^/]*@", r"\1", address)
    kept = [part for part in query.split("&") if part and not _is_secret(*part.partition("=")[::2])]
    return address + ("?" + "&".join(kept) if kept else "")


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.fullmatch(unquote_plus(name)) or _WEB_TOKEN.fullmatch(unquote_plus(value)))


def _from_mirror(url: str, job: _Job) -> Transferred:
    """Fills the part and checks it; a file that is not what it should be is fetched once more.

    Raises:
        _Refused: the mirror does not give the file.
    """
    known, length = _read_version(job.part), _length(job.part)
    # Without a known SHA-256 only the server can tell whether a part that lacks nothing is still the file.
    if job.sha256 and known is not None and known.total == length > 0 and sha256_of(job.part) == job.sha256:
        _say(f"all {_megabytes(length)} are here from before")
        return Transferred(known.url, length, job.sha256, known.etag, known.last_modified)
    problem = ""
    for _ in range(2):
        if problem:
            _say(f"{public_url(url)}: {problem}; fetching it once more from the start")
        version = _fill(url, job)
        received, digest = job.part.stat().st_size, sha256_of(job.part)
        if job.size is not None and received != job.size:
            problem = f"it gives {received:,} bytes, not {job.size:,}"
        elif job.sha256 and digest != job.sha256:
            problem = f"it gives a file with another SHA-256, {digest} instead of {job.sha256}"
        else:
            return Transferred(version.url, received, digest, version.etag, version.last_modified)
        job.part.unlink()
    raise _Refused(problem)


def _fill(url: str, job: _Job) -> _Version:
    """Asks again and again until the part is complete, and returns the version it holds.

    Raises:
        _Refused: the mirror does not give the file, or several attempts in a row brought the part no further.
    """
    furthest = _length(job.part)
    in_vain = 0
    first = True
    while True:
        try:
            return _attempt(url, job, first=first)
        except _Lost as lost:
            length = _length(job.part)
            # Not simply "bytes arrived": a server that always starts anew and always cuts would be asked for ever.
            in_vain = 0 if length > furthest else in_vain + 1
            furthest = max(furthest, length)
            first = False
            if lost.discard:
                job.part.unlink(missing_ok=True)
                length = 0
            if in_vain >= job.patience.attempts:
                raise _Refused(f"{lost}, {in_vain} times in a row") from None
            wait = lost.wait
            if wait is None:
                wait = min(job.patience.first_wait * 2 ** max(in_vain - 1, 0), job.patience.longest_wait)
            after = f" after {_megabytes(length)}" if length else ""
            _say(f"{lost}{after}, " + (f"trying again in {wait:g} s" if wait else "trying again"))
        time.sleep(wait)


def _attempt(url: str, job: _Job, *, first: bool) -> _Version:
    """Opens the address once, where possible at the end of the part, and reads until the end.

    Raises:
        _Lost: it ended early, or what came does not fit what is there.
        _Refused: the mirror does not give the file.
    """
    known = _read_version(job.part)
    length = _length(job.part)
    offset = 0
    if known is not None and (job.sha256 or (known.url == public_url(url) and known.validator is not None)):
        # The last byte is asked for again: then no range is empty, and "not satisfiable" only means another file.
        offset = max(length - 1, 0)
    with _open(url, offset, known, job.patience) as reply:
        version = reply.version
        if job.size is not None and _differ(version.total, job.size):
            raise _Refused(f"it announces {version.total:,} bytes, not {job.size:,}")
        if reply.offset == 0:
            if length > 0 and first:
                _say(f"{_megabytes(length)} from before cannot be continued, starting anew")
            job.part.unlink(missing_ok=True)
        elif known is None or version.contradicts(known):
            raise _Lost("the file has changed meanwhile", wait=0, discard=True)
        else:
            version = replace(version, total=known.total if version.total is None else version.total)
            if first:
                _say(f"going on after {_megabytes(length)}")
        if version.total is not None:
            _require_room(url, job, missing=version.total - reply.offset, total=version.total)
        write_json(_version_path(job.part), asdict(version))
        limit = job.size if version.total is None else version.total
        with job.part.open("ab") as file, _bar(reply.offset, version.total) as bar:
            file.truncate(reply.offset)
            received = reply.offset
            for chunk in reply.chunks:
                file.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
                if limit is not None and received > limit:
                    raise _Lost("more bytes came than there should be", discard=True)
    if version.total is not None and received < version.total:
        raise _Lost("the connection was cut")
    return version


def _open(
    url: str, offset: int, known: _Version | None, patience: Patience
) -> contextlib.AbstractContextManager[_Reply]:
    if _is_http(url):
        return _open_http(url, offset, known, patience)
    return _open_fsspec(url, offset, patience)


# ---------------------------------------------------------------------------------------------------------------- http


@contextlib.contextmanager
def _open_http(url: str, offset: int, known: _Version | None, patience: Patience) -> Iterator[_Reply]:
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    if offset and known is not None and known.url == public_url(url) and known.validator is not None:
        headers["If-Range"] = known.validator
    times = (patience.connect_timeout, patience.stall_timeout)
    with _ask("GET", url, headers, times) as response:
        _require_success(response, patience.longest_retry_after)
        if response.status_code == 206:
            start, total = _content_range(response)
            if not offset or start != offset:
                raise _Lost("the server sent another range than was asked for", discard=True)
        else:
            start, total = 0, _content_length(response)

        def read(length: int) -> bytes:
            # Not `iter_content`: it would hold back what came before a stall, and unpack what is said to be encoded.
            with _http_errors(times):
                data: bytes = response.raw.read1(length, decode_content=False)
                return data

        yield _Reply(start, _http_version(url, response, total), _chunks(read, _CHUNK))


def _look_http(url: str, timeout: float) -> _Version:
    """Asks for the headers; where HEAD is refused, as by signed addresses, for a single byte."""
    times = (timeout, timeout)
    with _ask("HEAD", url, {}, times) as response:
        if response.status_code == 200 and not _is_web_page(response):
            return _http_version(url, response, _content_length(response))
    with _ask("GET", url, {"Range": "bytes=0-0"}, times) as response:
        if response.status_code == 416:  # an empty file has no first byte
            return _http_version(url, response, _content_range(response)[1])
        _require_success(response, 0)
        partial = response.status_code == 206
        return _http_version(url, response, _content_range(response)[1] if partial else _content_length(response))


@contextlib.contextmanager
def _ask(method: str, url: str, headers: dict[str, str], times: tuple[float, float]) -> Iterator[requests.Response]:
    """Opens an address, through redirects and the environment's proxies; the body waits to be read."""
    import requests

    with _http_errors(times):
        response = requests.request(
            method,
            url,
            # Otherwise a length and a range would count compressed bytes.
            headers={"Accept-Encoding": "identity", **headers},
            stream=True,
            timeout=times,
            allow_redirects=True,
            hooks={"response": _leave_redirect},
        )
    with response:
        yield response


def _leave_redirect(response: requests.Response, **_: Any) -> None:
    if not response.is_redirect:
        return
    response.close()  # otherwise requests reads its body, of any size, before it goes on
    location = urljoin(response.url, response.headers["Location"])
    if urlsplit(response.url).scheme == "https" and urlsplit(location).scheme == "http":
        raise _Refused("it redirects from https to http, where anyone on the way can change the file")


def _require_success(response: requests.Response, longest_retry_after: float) -> None:
    """Sorts an answer into one that brings bytes (200, 206), one to be tried again, and one that is final."""
    status = response.status_code
    phrases = {known.value: f" {known.phrase}" for known in http.HTTPStatus}
    answer = f"the server answered {status}{phrases.get(status, '')}"
    if status in (200, 206):
        if _is_web_page(response):
            raise _Refused("that address gives a web page, not an archive")
    elif status == 416:
        raise _Lost("the file has changed meanwhile", wait=0, discard=True)
    elif status in _TRY_LATER or status >= 500:
        wait = _retry_after(response.headers.get("Retry-After", ""))
        if wait is not None and wait > longest_retry_after:
            raise _Refused(f"{answer} and wants to be left alone for {wait:,.0f} s")
        raise _Lost(answer, wait=wait)
    else:
        raise _Refused(answer)


def _retry_after(value: str) -> float | None:
    """Returns the seconds that a Retry-After header names, as a number or as a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _is_web_page(response: requests.Response) -> bool:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml")


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """Returns where a partial answer starts and how long the whole file is, each None where it does not say."""
    value = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", value.strip(), re.ASCII)
    if match is None:
        return None, None
    start, total = (int(number) if number else None for number in match.groups())
    return start, total


def _content_length(response: requests.Response) -> int | None:
    value = response.headers.get("Content-Length", "").strip()
    # RFC 9112, 6.3: chunks override a length.
    return int(value) if value.isdecimal() and "Transfer-Encoding" not in response.headers else None


def _http_version(url: str, response: requests.Response, total: int | None) -> _Version:
    return _Version(public_url(url), response.headers.get("ETag"), response.headers.get("Last-Modified"), total)


@contextlib.contextmanager
def _http_errors(times: tuple[float, float]) -> Iterator[None]:
    """Turns what requests and urllib3 raise into `_Lost` and `_Refused`, without the address, which may be secret."""
    import requests
    import urllib3

    try:
        yield
    except requests.ConnectTimeout:
        raise _Lost(f"no connection within {times[0]:g} s") from None
    except (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError):
        raise _Lost(f"nothing came for {times[1]:g} s") from None
    except requests.ConnectionError as error:
        cause = _root_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _Refused(f"its certificate cannot be trusted ({cause.verify_message})") from None
        raise _Lost(f"no connection ({_words(cause)})") from None
    except urllib3.exceptions.HTTPError:
        raise _Lost("the connection was cut") from None
    except requests.TooManyRedirects:
        raise _Refused("it redirects without end") from None
    except requests.exceptions.InvalidSchema:
        raise _Refused("it redirects to something other than http or https") from None
    except (requests.RequestException, UnicodeError):
        raise _Refused("the address is not valid") from None


# -------------------------------------------------------------------------------------------------------------- fsspec


@contextlib.contextmanager
def _open_fsspec(url: str, offset: int, patience: Patience) -> Iterator[_Reply]:
    filesystem, path, version = _look_fsspec(url, patience.connect_timeout, patience.stall_timeout)
    with contextlib.ExitStack() as stack:
        with _client_errors():
            # Without a cache every read is one request of its own length.
            file = stack.enter_context(filesystem.open(path, "rb", cache_type="none"))
            if offset:
                # An offset beyond the end reads nothing, and the total has told that it is another file.
                file.seek(min(offset, version.total or offset))

        def read(length: int) -> bytes:
            with _client_errors():
                data: bytes = file.read(length)
                return data

        yield _Reply(offset, version, _chunks(read, _OBJECT_STORE_CHUNK))


def _look_fsspec(url: str, connect_timeout: float, stall_timeout: float) -> tuple[Any, str, _Version]:
    """Returns the file system of an address, the path in it, and the version of the file that is there now."""
    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        # One try each: the attempts, and the waits between them, are counted here.
        times = {"connect_timeout": connect_timeout, "read_timeout": stall_timeout, "retries": {"max_attempts": 0}}
        options["config_kwargs"] = times
    with _client_errors(protocol):
        try:
            return _look_with(url, options)
        except Exception as error:
            # Public buckets can be read by anyone, but only if the client does not try to sign.
            if type(error).__name__ != "NoCredentialsError":
                raise
            return _look_with(url, {**options, "anon": True})


def _look_with(url: str, options: dict[str, Any]) -> tuple[Any, str, _Version]:
    import fsspec  # type: ignore[import-untyped]

    # A file system from before may remember a listing from before.
    filesystem, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    if "config_kwargs" in options:
        filesystem.retries = 1
    info = filesystem.info(path)
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "is a folder")
    etag = next((str(info[key]) for key in ("ETag", "etag", "sha") if info.get(key)), None)
    dates = ("LastModified", "last_modified", "updated", "modify", "mtime")
    date = next((info[key] for key in dates if info.get(key)), None)
    modified = date.isoformat() if isinstance(date, datetime) else None if date is None else str(date)
    return filesystem, path, _Version(public_url(url), etag, modified, info.get("size"))


@contextlib.contextmanager
def _client_errors(protocol: str = "") -> Iterator[None]:
    """Turns what fsspec's clients raise into `_Lost` and `_Refused`."""
    try:
        yield
    except FileNotFoundError:
        raise _Refused("there is no such file") from None
    except PermissionError:
        raise _Refused("access is denied; check the credentials and that the file exists") from None
    except IsADirectoryError:
        raise _Refused("that is a folder, not an archive") from None
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        install = f"`pip install --editable '.[{extra}]'` in the repository root installs it" if extra else str(error)
        raise _Refused(f"the client for {protocol} addresses is missing: {install}") from None
    except (ValueError, NotImplementedError) as error:
        raise _Refused(f"the client cannot read the address ({_words(error)})") from None
    except Exception as error:  # every client has exceptions of its own for a connection that fails
        raise _Lost(f"no connection ({_words(_root_cause(error))})") from None


# --------------------------------------------------------------------------------------------------------------- pieces


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _chunks(read: Callable[[int], bytes], length: int) -> Iterator[bytes]:
    while chunk := read(length):
        yield chunk


def _differ(one: object, other: object) -> bool:
    """Tells whether two values are both known and not the same."""
    return one is not None and other is not None and one != other


def _root_cause(error: BaseException) -> BaseException:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error


def _words(error: BaseException) -> str:
    """Returns one line that says what an exception of a library means."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _say(line: str) -> None:
    # Through tqdm, so that a bar on the terminal is not torn.
    tqdm.write(f"download: {line}", file=sys.stderr)


def _bar(offset: int, total: int | None) -> tqdm[Any]:
    return tqdm(
        desc="download", total=total, initial=offset, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
    )


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version_path(part: Path) -> Path:
    return part.with_suffix(".json")


def _read_version(part: Path) -> _Version | None:
    """Returns the version that a part belongs to, or None where that is not known."""
    try:
        return _Version(**json.loads(_version_path(part).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _require_room(url: str, job: _Job, *, missing: int, total: int) -> None:
    """Raises CatdogError unless the rest fits where the part is, and as much as the whole where the target will be."""
    purpose = f"downloading {public_url(url)}"
    job.target.parent.mkdir(parents=True, exist_ok=True)
    if job.target.parent.stat().st_dev == job.part.parent.stat().st_dev:
        require_disk_space(job.part.parent, missing + total, f"{purpose} and packing it")
    else:
        require_disk_space(job.part.parent, missing, purpose)
        require_disk_space(job.target.parent, total, f"packing {public_url(url)}")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Keeps other processes from the same part meanwhile; a killed process holds nothing."""
    from filelock import FileLock, Timeout

    part.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another process is downloading the same file, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _forget(part: Path) -> None:
    """Removes what a mirror began that another one finished, unless another process works on it."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(Timeout), FileLock(part.with_suffix(".lock"), timeout=0):
        _remove(part)


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_path(part).unlink(missing_ok=True)


__all__ = ["Patience", "Transferred", "downloaded", "identity", "public_url"]
