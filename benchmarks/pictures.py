"""As many pictures as a measurement needs: photographs, with noise where they are repeated, or generated ones."""

from __future__ import annotations

import contextlib
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from catdog.archives import open_archive, pack_archive, pack_folder
from catdog.errors import CatdogError
from catdog.files import written_aside
from catdog.labels import label_files
from catdog.parallel import processors
from catdog.sample import write_sample

SAMPLE_IMAGES = 600
"""Drawn pictures where no photographs are given; drawing more would take longer than it tells."""
_WRITTEN_TOGETHER = 1000  # pictures that are in memory at once while an archive is written

Picture = tuple[str, bytes]
"""The name of the class, and a JPEG file."""


@dataclass(frozen=True)
class Photograph:
    """A member of an archive."""

    archive: Path
    name: str
    label: str


def collect_archives(given: Sequence[Path], folder: Path) -> list[Path]:
    """Returns the given archives and folders as zips in `folder`; without any, one of drawn sample pictures.

    Raises:
        CatdogError: there is no such archive or folder, or it is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not given:
        target = folder / "sample.zip"
        write_sample(target, count=SAMPLE_IMAGES, seed=0)
        return [target]
    packed = []
    for number, path in enumerate(given):
        target = folder / f"{number}-{path.stem}.zip"
        if path.is_dir():
            pack_folder(path, target)
        elif path.is_file():
            pack_archive(path, target)
        else:
            raise CatdogError(f"PHOTOGRAPHS names {str(path)!r}, which is no file and no folder; check the path")
        packed.append(target)
    return packed


def list_photographs(archives: Sequence[Path]) -> list[Photograph]:
    """Lists the JPEG files that have a class, in an order of which every beginning has the mix of the whole.

    So 2,000 and 25,000 of them have the same classes, sizes and sources, and times can be compared. Two files of the
    same class in two archives count as one class, whatever the case of its name.

    Raises:
        CatdogError: there are none.
    """
    groups: dict[tuple[Path, str], list[Photograph]] = defaultdict(list)
    for path in archives:
        with open_archive(path) as archive:
            for name, label in label_files(archive.namelist()).labels.items():
                if name.lower().endswith((".jpg", ".jpeg")) and archive.getinfo(name).file_size:
                    groups[path, label.lower()].append(Photograph(path, name, label.lower()))
    # The middle of the i-th of n equal parts of the way: as when several piles are dealt out evenly.
    placed = [
        ((position + 0.5) / len(group), number, photograph)
        for number, group in enumerate(groups.values())
        for position, photograph in enumerate(group)
    ]
    if not placed:
        raise CatdogError("PHOTOGRAPHS holds no JPEG file with a class; name an archive with one folder a class")
    return [photograph for _, _, photograph in sorted(placed, key=lambda entry: entry[:2])]


def write_photographs(target: Path, archives: Sequence[Path], count: int) -> None:
    """Writes an archive of `count` photographs, one folder a class; one that was there before gets noise of its own."""
    photographs = list_photographs(archives)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(open_archive(path)) for path in archives}

        def take(number: int) -> Picture:
            photograph = photographs[number % len(photographs)]
            data = opened[photograph.archive].read(photograph.name)
            return photograph.label, data if number < len(photographs) else with_noise(data, number)

        _write_archive(target, take, count)


def with_noise(data: bytes, number: int) -> bytes:
    """Returns a JPEG of the photograph under strong blots, drawn from the number, so that it is a new picture."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return data  # split will say what is wrong with it, as it did in the first round
    blots = np.random.default_rng(number).normal(0, 60, (8, 8, 3)).astype(np.float32)
    noise = cv2.resize(blots, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return _jpeg(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def write_generated(target: Path, count: int) -> None:
    """Writes an archive of `count` generated pictures, one folder a class."""
    _write_archive(target, generated_picture, count)


def generated_picture(number: int) -> Picture:
    """Draws a picture of 200x200 pixels, blots of all colours under grain; the number gives its class and its blots.

    The classes, dark and light, overlap. No two pictures are near-duplicates, and a file has about the size of a
    photograph of 200 pixels.
    """
    random = np.random.default_rng([0, number])
    label, shift = (("dark", -12), ("light", 12))[number % 2]
    blots = random.normal(128 + shift, 50, (8, 8, 3)).astype(np.float32)
    grain = random.normal(0, 12, (100, 100, 1)).astype(np.float32)
    side = (200, 200)
    smooth = cv2.resize(blots, side, interpolation=cv2.INTER_CUBIC)
    smooth += cv2.resize(grain, side, interpolation=cv2.INTER_LINEAR)[..., None]
    return label, _jpeg(np.clip(smooth, 0, 255).astype(np.uint8))


def draw_pixels(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Draws pictures of smooth colours under noise, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
    smooth = [cv2.resize(picture, (size, size), interpolation=cv2.INTER_CUBIC) for picture in coarse]
    return np.stack(smooth) + rng.integers(0, 30, (count, size, size, 3), dtype=np.uint8)


def near_hashes(count: int) -> list[str]:
    """Perceptual hashes, as hexadecimal digits, of which four fifths are near another one: 0 to 24 bits away."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (count // 5, 128), dtype=np.uint8)
    bits = bits[random.integers(0, len(bits), count)]
    for row in bits:
        row[random.choice(128, random.integers(0, 25), replace=False)] ^= 1
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


def _write_archive(target: Path, take: Callable[[int], Picture], count: int) -> None:
    with (
        written_aside(target) as aside,
        zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive,
        ThreadPoolExecutor(processors()) as pool,
    ):
        for number, (label, data) in enumerate(_in_parts(pool, take, count)):
            archive.writestr(f"{label}/{number:06d}.jpg", data)


def _in_parts(pool: ThreadPoolExecutor, take: Callable[[int], Picture], count: int) -> Iterator[Picture]:
    for start in range(0, count, _WRITTEN_TOGETHER):
        yield from pool.map(take, range(start, min(start + _WRITTEN_TOGETHER, count)))


def _jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done, "OpenCV encodes any uint8 picture"
    data: bytes = encoded.tobytes()
    return data
