"""What is known about each image file before it is used: does it decode, and which files show the same."""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.archives import MemberError, duplicate_members, open_archive, read_member
from catdog.errors import CatdogError
from catdog.images import ImageError, decode_viewable
from catdog.labels import EXCLUDED, HIDDEN, NOT_LISTED, Labelling
from catdog.parallel import image_workers
from catdog.paths import REJECTED
from catdog.progress import progress

HASH_BITS = 128
_AT_ONCE = 2**20
"""Pairs of hashes that are compared, or kept, at a time: what the memory holds, whatever the pictures."""
REJECTED_COLUMNS = ["path", "label", "reason", "bytes"]
NO_DEFECTS = (HIDDEN, NOT_LISTED, EXCLUDED)
"""How the reasons begin for which a file is left out although nothing is wrong with the data."""


@dataclass(frozen=True)
class Inspection:
    """Facts about one decoded picture."""

    width: int  # pixels, upright
    height: int
    bytes: int
    format: str  # of the file by its content, e.g. JPEG
    mode: str  # its colours as Pillow names them, e.g. RGB, L (grey), CMYK, P (palette)
    brightness: float  # mean grey, 0 (black) to 255 (white)
    sha256: str  # of the file's bytes
    perceptual_hash: str  # 32 hexadecimal digits, see `perceptual_hash`
    note: str  # "" or what is unusual but acceptable


def inspect(data: bytes, *, max_pixels: float) -> Inspection:
    """Decodes a file fully and measures it; raises ImageError with the reason when it shows no picture."""
    decoded = decode_viewable(data, max_pixels=max_pixels)
    grey = np.asarray(cv2.cvtColor(decoded.pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    return Inspection(
        width=grey.shape[1],
        height=grey.shape[0],
        bytes=len(data),
        format=decoded.format,
        mode=decoded.mode,
        brightness=round(float(grey.mean()), 1),
        sha256=hashlib.sha256(data).hexdigest(),
        perceptual_hash=perceptual_hash(grey),
        note="" if decoded.whole else "ends early",
    )


def perceptual_hash(grey: npt.NDArray[np.uint8]) -> str:
    """Returns the 128-bit difference hash of a picture: 64 bits across and 64 bits down.

    Each bit says whether the brightness rises between two neighbours on a small grid, so rescaling,
    recompression and small changes of brightness move few bits (N. Krawetz, "Kind of Like That", 2013).

    Args:
        grey: uint8 [height, width], the brightness.

    Returns:
        32 hexadecimal digits.
    """
    across = np.diff(cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16), axis=1) > 0
    down = np.diff(cv2.resize(grey, (8, 9), interpolation=cv2.INTER_AREA).astype(np.int16), axis=0) > 0
    return np.packbits(np.concatenate([across.ravel(), down.ravel()])).tobytes().hex()


def group_duplicates(sha256: Sequence[str], perceptual_hashes: Sequence[str], max_bits: int) -> npt.NDArray[np.int64]:
    """Finds which pictures show the same.

    Two belong together when their bytes are equal or their perceptual hashes differ in at most
    `max_bits` bits, and so on from neighbour to neighbour.

    Args:
        sha256: hash of each file's bytes.
        perceptual_hashes: of each file, in the same order.
        max_bits: -1 (only equal bytes) to 16.

    Returns:
        int64 [files]: the index of the first member of each file's group.
    """
    count = len(sha256)
    _, same_bytes = np.unique(np.asarray(sha256), return_inverse=True)
    first_of = np.full(count, count)
    np.minimum.at(first_of, same_bytes, np.arange(count))
    links = [np.stack([np.arange(count), first_of[same_bytes]])]
    if max_bits >= 0:
        bits = np.frombuffer(bytes.fromhex("".join(perceptual_hashes)), np.uint8).reshape(count, HASH_BITS // 8)
        links.append(_near_links(bits, max_bits))
    return first_members(links, count)


def first_members(links: Sequence[npt.NDArray[np.int64]], count: int) -> npt.NDArray[np.int64]:
    """Returns the index of the first member of each file's group.

    Args:
        links: int64 [2, n] each, one at least: pairs of files that are in one group.
        count: of files.

    Returns:
        int64 [count].
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    first = np.full(count, count)
    np.minimum.at(first, component, np.arange(count))
    groups: npt.NDArray[np.int64] = first[component].astype(np.int64)
    return groups


def _near_links(hashes: npt.NDArray[np.uint8], max_bits: int) -> npt.NDArray[np.int64]:
    """Pairs, int64 [2, n], that join all hashes within `max_bits` of each other, found through equal parts.

    Cut into max_bits + 1 parts, two hashes that differ in max_bits bits agree in at least one part
    (pigeonhole), so only files that share a part are compared: near linear instead of quadratic.
    """
    count = len(hashes)
    bits = np.unpackbits(hashes, axis=1)
    # Equal hashes are joined in a chain first, so that a thousand blank pictures are not half a million pairs.
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    links = [np.stack([np.arange(count), first[inverse.ravel()]])]
    held = 0  # pairs among the links
    # With bits as -1 and 1, the product of two hashes is 128 - 2 x distance: one matrix product compares a bucket.
    signs = bits[first].astype(np.float32) * 2 - 1
    for part in np.array_split(np.arange(HASH_BITS), max_bits + 1):
        keys = np.packbits(bits[np.ix_(first, part)], axis=1)
        order = np.lexsort(keys.T)
        boundaries = np.flatnonzero((keys[order][1:] != keys[order][:-1]).any(axis=1)) + 1
        for bucket in np.split(order, boundaries):
            if len(bucket) < 2:
                continue
            files, compared = first[bucket], signs[bucket]
            rows = max(1, _AT_ONCE // len(bucket))
            for start in range(0, len(bucket) - 1, rows):
                near = compared[start : start + rows] @ compared[start:].T >= HASH_BITS - 2 * max_bits
                links.append(files[start:][np.stack(np.nonzero(np.triu(near, 1)))])  # each pair once
                held += links[-1].shape[1]
                # A thousand pictures that are all near each other are half a million pairs, but one group.
                if held > _AT_ONCE:
                    links, held = [np.stack([np.arange(count), first_members(links, count)])], 0
    return np.concatenate(links, axis=1)


def inspect_archive(
    archive: zipfile.ZipFile, labelling: Labelling, *, max_pixels: float, workers: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Inspects every file of an archive; one that shows no picture stops nothing.

    Args:
        archive: the raw data set.
        labelling: the class of each member, or why it has none.
        max_pixels: larger pictures are rejected before they are decoded.
        workers: processors.

    Returns:
        The accepted images (path, label and the fields of `Inspection`) and the rejected files (path, label,
        reason, bytes), both sorted by path.
    """
    assert archive.filename is not None, "it is a file"
    paths = sorted(labelling.labels)
    make = functools.partial(_open_inspector, Path(archive.filename), max_pixels)
    with image_workers(make, len(paths), workers=workers) as inspect_all:
        found = progress(inspect_all(paths), "validate", len(paths), "images")
        rows: list[dict[str, Any]] = [
            {"path": path, "label": labelling.labels[path]} | facts for path, facts in zip(paths, found, strict=True)
        ]
    rows += [
        {"path": path, "label": "", "reason": reason, "bytes": archive.getinfo(path).file_size}
        for path, reason in labelling.refused.items()
    ]
    rows += [
        {"path": member.filename, "label": "", "reason": "a later file in the archive has the same name"}
        | {"bytes": member.file_size}
        for member in duplicate_members(archive)
    ]
    columns = ["path", "label", *(field.name for field in fields(Inspection))]
    accepted = pd.DataFrame([row for row in rows if "reason" not in row], columns=columns)
    rejected = pd.DataFrame([row for row in rows if "reason" in row], columns=REJECTED_COLUMNS)
    return accepted.sort_values("path", ignore_index=True), rejected.sort_values("path", ignore_index=True)


def _open_inspector(raw: Path, max_pixels: float) -> Callable[[str], dict[str, Any]]:
    archive = open_archive(raw)

    def inspect_member(path: str) -> dict[str, Any]:
        try:
            return asdict(inspect(read_member(archive, path), max_pixels=max_pixels))
        except (ImageError, MemberError) as error:
            return {"reason": str(error), "bytes": archive.getinfo(path).file_size}

    return inspect_member


def require_mostly_accepted(accepted: int, rejected: pd.DataFrame, max_share: float) -> None:
    """Stops a run whose data is mostly broken.

    What an operating system or archiver left beside the pictures, and what the user left out, does not count.

    Raises:
        CatdogError: more than `max_share` of the files were rejected.
    """
    counted = rejected[~rejected["reason"].astype(str).str.startswith(NO_DEFECTS)]
    total = accepted + len(counted)
    if len(counted) > max_share * total:
        reasons = counted["reason"].value_counts()
        raise CatdogError(
            f"{len(counted):,} of {total:,} files were rejected, more than split.max_rejected = {max_share:g} allows "
            f"(mostly: {reasons.index[0]}, {reasons.iloc[0]:,} times; all in {REJECTED}); mend the data or raise it"
        )
