"""Accuracy on damaged copies of the test pictures: compressed, blurred, noisy, too bright, too dark, cropped, turned.

D. Hendrycks and T. Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", 2019
(arXiv:1903.12261). Compression, blur, noise and brightness are as strong as severities 1, 3 and 5 of its ImageNet-C,
whose pictures have 224 pixels a side. Darker is its brightness turned round; crop and flips are not in it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.images import Pixels, decode_stored, encode_jpeg
from catdog.slices import wilson_interval

COLUMNS = ("corruption", "severity", "images", "accuracy", "low", "high", "lost")
_REFERENCE_SIDE = 224  # pixels, of the pictures that the blur's strengths are meant for

Damage = Callable[[Pixels, np.random.Generator], Pixels]
"""From one picture, uint8 [height, width, 3], to another of the same size; draws from the generator, if at all."""


@dataclass(frozen=True)
class Corruption:
    """One way to damage a picture, at one strength."""

    name: str
    severity: int  # 1, 3 or 5, where 5 is the strongest; 1 for what has no strength
    description: str
    apply: Damage


def _compress(picture: Pixels, _: np.random.Generator, *, quality: int) -> Pixels:
    return decode_stored(encode_jpeg(picture, quality))


def _blur(picture: Pixels, _: np.random.Generator, *, sigma: float) -> Pixels:
    scaled = sigma * min(picture.shape[:2]) / _REFERENCE_SIDE
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), scaled, borderType=cv2.BORDER_REPLICATE), np.uint8)


def _add_noise(picture: Pixels, generator: np.random.Generator, *, deviation: float) -> Pixels:
    noise = generator.standard_normal(picture.shape, dtype=np.float32) * np.float32(deviation * 255)
    return np.asarray(cv2.add(picture, noise, dtype=cv2.CV_8U), np.uint8)  # rounds, and stays within 0..255


def _brighten(picture: Pixels, _: np.random.Generator, *, amount: float) -> Pixels:
    """Adds to the value of HSV, the largest of red, green and blue; hue and saturation stay.

    That is the same as to multiply all three by the new value over the old one. Black, which has neither hue nor
    saturation, stays black when multiplied, so it is added to instead.
    """
    value = np.arange(256)
    brighter = np.clip(value + amount * 255, 0, 255)
    factors = (brighter / np.maximum(value, 1)).astype(np.float32)
    channels = cv2.split(picture)
    largest = functools.reduce(cv2.max, channels)
    factor = cv2.LUT(largest, factors)
    result = cv2.merge([cv2.multiply(channel, factor, dtype=cv2.CV_8U) for channel in channels])
    result[largest == 0] = round(float(brighter[0]))
    return np.asarray(result, np.uint8)


def _crop(picture: Pixels, _: np.random.Generator, *, share: float) -> Pixels:
    height, width = picture.shape[:2]
    inner_height, inner_width = max(1, round(height * share)), max(1, round(width * share))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    inner = picture[top : top + inner_height, left : left + inner_width]
    return np.asarray(cv2.resize(inner, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _flip(picture: Pixels, _: np.random.Generator, *, axis: int) -> Pixels:
    return np.flip(picture, axis)


def _corruptions() -> Iterator[Corruption]:
    for severity, quality in ((1, 25), (3, 15), (5, 7)):
        damage: Damage = functools.partial(_compress, quality=quality)
        yield Corruption("JPEG compression", severity, f"JPEG of quality {quality}", damage)
    for severity, sigma in ((1, 1.0), (3, 3.0), (5, 6.0)):
        damage = functools.partial(_blur, sigma=sigma)
        yield Corruption("Gaussian blur", severity, f"sigma {sigma:.0f} of {_REFERENCE_SIDE} pixels", damage)
    for severity, deviation in ((1, 0.08), (3, 0.18), (5, 0.38)):
        damage = functools.partial(_add_noise, deviation=deviation)
        yield Corruption("Gaussian noise", severity, f"standard deviation {deviation:.0%} of the range", damage)
    for severity, amount in ((1, 0.1), (3, 0.3), (5, 0.5)):
        damage = functools.partial(_brighten, amount=amount)
        yield Corruption("brighter", severity, f"{amount:.0%} of the range added to the brightness", damage)
    for severity, amount in ((1, 0.1), (3, 0.3), (5, 0.5)):
        damage = functools.partial(_brighten, amount=-amount)
        yield Corruption("darker", severity, f"{amount:.0%} of the range taken from the brightness", damage)
    for severity, share in ((1, 0.9), (3, 0.75), (5, 0.5)):
        damage = functools.partial(_crop, share=share)
        yield Corruption("centre crop", severity, f"the middle {share:.0%} of each side, enlarged", damage)
    yield Corruption("horizontal flip", 1, "left and right exchanged", functools.partial(_flip, axis=1))
    yield Corruption("vertical flip", 1, "upside down", functools.partial(_flip, axis=0))


CORRUPTIONS: tuple[Corruption, ...] = tuple(_corruptions())
"""All that are tried, in the table's order."""


def corrupt(pixels: Pixels, corruption: Corruption, paths: Sequence[str], seed: int) -> Pixels:
    """Damages a batch of pictures.

    What happens to a picture depends on its pixels, its path and the seed alone, not on the batch that it is in. The
    noise of the three severities is the same pattern, made stronger.

    Args:
        pixels: uint8 [batch, height, width, 3], RGB.
        corruption: one of CORRUPTIONS.
        paths: of the pictures, [batch].
        seed: what noise is drawn from.

    Returns:
        uint8 [batch, height, width, 3].
    """
    pairs = zip(pixels, paths, strict=True)
    return np.stack([corruption.apply(picture, _generator(path, seed)) for picture, path in pairs])


def _generator(path: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def collect_pictures(batches: Iterable[Pixels], positions: npt.NDArray[np.int64]) -> Pixels:
    """Picks the chosen pictures out of a stream, which it reads no further than to the last of them.

    All that it holds is the result and one batch: 75 MB for 500 pictures of 224x224 pixels.

    Args:
        batches: uint8 [batch, height, width, 3] each, as `records.RecordReader` yields them.
        positions: in the stream, ascending, int64 [chosen]; at least one.

    Returns:
        uint8 [chosen, height, width, 3].

    Raises:
        ValueError: none are chosen, or the stream ends before the last.
    """
    if not len(positions):
        raise ValueError("no pictures are chosen")
    pictures: Pixels | None = None
    start = filled = 0
    for batch in batches:
        if pictures is None:
            pictures = np.empty((len(positions), *batch.shape[1:]), np.uint8)
        stop = int(np.searchsorted(positions, start + len(batch)))
        pictures[filled:stop] = batch[positions[filled:stop] - start]
        start, filled = start + len(batch), stop
        if filled == len(positions):
            return pictures
    raise ValueError(f"picture {positions[-1]} is chosen, but there are only {start}")


def corrupted_batches(
    pictures: Pixels, paths: Sequence[str], corruption: Corruption, *, seed: int, batch_size: int
) -> Iterator[Pixels]:
    """Yields damaged copies of pictures batch by batch, made as they are asked for.

    Args:
        pictures: uint8 [images, height, width, 3], from `collect_pictures`; unchanged.
        paths: of the pictures, [images].
        corruption: one of CORRUPTIONS.
        seed: what noise is drawn from.
        batch_size: pictures a batch; the last may be smaller.

    Yields:
        uint8 [batch, height, width, 3].
    """
    for start in range(0, len(pictures), batch_size):
        chosen = slice(start, start + batch_size)
        yield corrupt(pictures[chosen], corruption, paths[chosen], seed)


def corruption_table(
    clean: npt.NDArray[np.bool_], corrupted: Mapping[tuple[str, int], npt.NDArray[np.bool_]]
) -> pd.DataFrame:
    """Compares the accuracy on damaged pictures with that on the same pictures undamaged.

    Args:
        clean: whether each undamaged picture was classified rightly, bool [images].
        corrupted: the same for each damage, by name and severity, in the order to show; bool [images] each.

    Returns:
        One row for the undamaged pictures, corruption "none" of severity 0, and one a damage: corruption, severity,
        images, accuracy with its Wilson interval low and high, and lost: how far accuracy fell, below 0 where it rose.
        Rounded to six digits. No rows where there are no images.

    Raises:
        ValueError: not as many pictures everywhere.
    """
    rows = []
    for (name, severity), correct in {("none", 0): clean, **corrupted}.items():
        if correct.shape != clean.shape:
            raise ValueError(f"{len(clean)} undamaged pictures, but {len(correct)} of {name}, severity {severity}")
        if not len(clean):
            continue
        right, images = int(correct.sum()), len(correct)
        low, high = wilson_interval(right, images)
        lost = (int(clean.sum()) - right) / images
        rows.append((name, severity, images, right / images, low, high, lost))
    return pd.DataFrame(rows, columns=list(COLUMNS)).round(6)
