"""What is known about each image file before it is used: does it decode, and which files show the same."""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.errors import CatdogError
from catdog.images import ImageError, Pixels, decode_viewable
from catdog.labels import Labelling
from catdog.paths import REJECTED
from catdog.progress import progress

HASH_BITS = 128
REJECTED_COLUMNS = ["path", "label", "reason", "bytes"]


@dataclass(frozen=True)
class Inspection:
    """Facts about one decoded picture."""

    width: int  # pixels, upright
    height: int
    bytes: int
    sha256: str  # of the file's bytes
    perceptual_hash: str  # 32 hexadecimal digits, see `perceptual_hash`
    note: str  # "" or what is unusual but acceptable


def inspect(data: bytes, *, max_pixels: float) -> Inspection:
    """Decodes a file fully and measures it; raises ImageError with the reason when it shows no picture."""
    pixels, whole = decode_viewable(data, max_pixels=max_pixels)
    return Inspection(
        width=pixels.shape[1],
        height=pixels.shape[0],
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        perceptual_hash=perceptual_hash(pixels),
        note="" if whole else "ends early",
    )


def perceptual_hash(pixels: Pixels) -> str:
    """Returns the 128-bit difference hash of a picture: 64 bits across and 64 bits down.

    Each bit says whether the brightness rises between two neighbours on a small grid, so rescaling,
    recompression and small changes of brightness move few bits (N. Krawetz, "Kind of Like That", 2013).

    Args:
        pixels: uint8 [height, width, 3].

    Returns:
        32 hexadecimal digits.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
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
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(sha256)
    _, same_bytes = np.unique(np.asarray(sha256), return_inverse=True)
    first_of = np.full(count, count)
    np.minimum.at(first_of, same_bytes, np.arange(count))
    pairs = [np.stack([np.arange(count), first_of[same_bytes]])]
    if max_bits >= 0:
        bits = np.frombuffer(bytes.fromhex("".join(perceptual_hashes)), np.uint8).reshape(count, HASH_BITS // 8)
        pairs.append(_near_pairs(bits, max_bits))
    left, right = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    first = np.full(count, count)
    np.minimum.at(first, component, np.arange(count))
    groups: npt.NDArray[np.int64] = first[component].astype(np.int64)
    return groups


def _near_pairs(hashes: npt.NDArray[np.uint8], max_bits: int) -> npt.NDArray[np.int64]:
    """All pairs within `max_bits` of each other, int64 [2, pairs], found through equal parts of the hash.

    Cut into max_bits + 1 parts, two hashes that differ in max_bits bits agree in at least one part
    (pigeonhole), so only files that share a part are compared: near linear instead of quadratic.
    """
    found = [np.empty((2, 0), np.int64)]
    bits = np.unpackbits(hashes, axis=1)
    # Equal hashes are joined in a chain first, so that a thousand blank pictures are not half a million pairs.
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    found.append(np.stack([np.arange(len(hashes)), first[inverse.ravel()]]))
    for part in np.array_split(np.arange(HASH_BITS), max_bits + 1):
        keys = np.packbits(bits[np.ix_(first, part)], axis=1)
        order = np.lexsort(keys.T)
        boundaries = np.flatnonzero((keys[order][1:] != keys[order][:-1]).any(axis=1)) + 1
        for bucket in np.split(order, boundaries):
            for position, one in enumerate(bucket[:-1]):
                others = bucket[position + 1 :]
                distance = np.bitwise_count(hashes[first[one]] ^ hashes[first[others]]).sum(axis=1)
                near = others[distance <= max_bits]
                found.append(np.stack([np.full(len(near), first[one]), first[near]]))
    return np.concatenate(found, axis=1)


def inspect_archive(
    archive: zipfile.ZipFile, labelling: Labelling, *, max_pixels: float, workers: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Inspects every file of an archive; one that shows no picture stops nothing.

    Args:
        archive: the raw data set.
        labelling: the class of each member, or why it has none.
        max_pixels: larger pictures are rejected before they are decoded.
        workers: threads; decoding releases the interpreter's lock.

    Returns:
        The accepted images (path, label and the fields of `Inspection`) and the rejected files (path, label,
        reason, bytes), both sorted by path.
    """

    def one(path: str) -> dict[str, Any]:
        row: dict[str, Any] = {"path": path, "label": labelling.labels[path]}
        try:
            return row | asdict(inspect(archive.read(path), max_pixels=max_pixels))
        except ImageError as error:
            reason = str(error)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError) as error:
            reason = f"damaged in the archive: {error}"
        return row | {"reason": reason, "bytes": archive.getinfo(path).file_size}

    with ThreadPoolExecutor(workers) as pool:
        paths = sorted(labelling.labels)
        rows = list(progress(pool.map(one, paths), "validate", len(paths), "images"))
    rows += [
        {"path": path, "label": "", "reason": reason, "bytes": archive.getinfo(path).file_size}
        for path, reason in labelling.unlabelled.items()
    ]
    columns = ["path", "label", *(field.name for field in fields(Inspection))]
    accepted = pd.DataFrame([row for row in rows if "reason" not in row], columns=columns)
    rejected = pd.DataFrame([row for row in rows if "reason" in row], columns=REJECTED_COLUMNS)
    return accepted.sort_values("path", ignore_index=True), rejected.sort_values("path", ignore_index=True)


def require_mostly_accepted(accepted: int, rejected: pd.DataFrame, max_share: float) -> None:
    """Stops a run whose data is mostly broken.

    Raises:
        CatdogError: more than `max_share` of the files were rejected.
    """
    total = accepted + len(rejected)
    if len(rejected) > max_share * total:
        reasons = rejected["reason"].value_counts()
        raise CatdogError(
            f"{len(rejected):,} of {total:,} files were rejected, more than split.max_rejected = {max_share:g} allows "
            f"(mostly: {reasons.index[0]}, {reasons.iloc[0]:,} times; all in {REJECTED}); mend the data or raise it"
        )
