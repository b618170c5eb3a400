"""Files that are either whole or absent, and hashes of them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catdog.errors import CatdogError

if TYPE_CHECKING:
    import pandas as pd

ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""The date of every member of a zip that is written here: equal contents then give equal bytes."""


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class DiskError(CatdogError):
    """A disk is full, or the system does not read or write; what was to be used may be all right."""


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and renames it to `path` when the block succeeds.

    A reader sees the old file or the whole new one. A failing block leaves neither behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def used_up(remove: Callable[[], object]) -> Iterator[None]:
    """Removes what a block uses when the block has succeeded, or has found it of no use (CatdogError).

    After anything else, such as an interrupt or a disk that is full or fails, it stays for the next run.
    """
    try:
        yield
    except DiskError:
        raise
    except CatdogError:
        remove()
        raise
    remove()


@contextlib.contextmanager
def writing_where_asked(path: Path) -> Iterator[None]:
    """Lets a block write where a user asked it to; raises CatdogError, with the path, where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise CatdogError(
            f"{readable(path)} cannot be written: {error.strerror or error}; give another place"
        ) from None


def told_to_users(error: OSError) -> str | None:
    """Returns the sentence for a full disk or a file that this user may not use; None for what no user can mend."""
    if error.errno in DISK_IS_FULL:
        place = error.filename or "the disk"
        return f"no space left for {place}; free some (`dvc gc --all-commits --all-experiments`) and run again"
    if error.errno in _NOT_ALLOWED and error.filename is not None:
        return (
            f"{error.filename} cannot be read or written: {error.strerror}; check the permissions of it and of its "
            "folder (`ls -ld`), and run again"
        )
    return None


def readable(path: str | Path) -> str:
    """Returns a path as text that any terminal or file can hold, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text aside and renames it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON aside and renames it: two spaces, keys in the order given, newline at the end."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that a stage wrote."""
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), f"{path} holds no JSON object"
    return value


def read_yaml(path: Path) -> Any:
    """Reads a YAML file, by PyYAML's loader in C where it has one: the one in Python takes 0.1 s for dvc.lock."""
    import yaml

    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def parse_yaml(text: str, source: str) -> Any:
    """Reads YAML 1.2, in which the `1e-05` that DVC writes is a number; `read_yaml`, of YAML 1.1, takes it for a text.

    Args:
        text: what to read.
        source: what it is, for the message.

    Raises:
        CatdogError: it is no YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise CatdogError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def read_manifest(path: Path) -> pd.DataFrame:
    """Reads the manifest that the split stage wrote; names and labels that look like numbers or "NA" stay texts."""
    import pandas as pd

    return pd.read_csv(path, dtype={"path": str, "label": str}, keep_default_na=False)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_disk_space(folder: Path, needed: int, purpose: str) -> None:
    """Stops before work that would fill the disk.

    Args:
        folder: where the files will be written; it or a parent exists.
        needed: bytes.
        purpose: what the bytes are for, for the message.

    Raises:
        DiskError: fewer bytes are free.
    """
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{purpose} needs {needed / 1e6:,.0f} MB but {os.fspath(folder)} has {free / 1e6:,.0f} MB free; "
            "free some space (`catdog clean`, then `dvc gc --all-commits --all-experiments`)"
        )
