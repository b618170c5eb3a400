"""Train, validation and test: stratified, seeded, exact, and without a group that crosses splits."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from catdog.errors import CatdogError
from catdog.paths import SPLITS


def reject_contradictions(images: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows whose picture also stands under another label, with a `reason` column.

    "The same picture" means equal bytes or an equal perceptual hash; merely similar pictures of a cat
    and a dog are grouped, not rejected.

    Args:
        images: columns path, label, sha256, perceptual_hash.
    """
    contradicted = pd.Series(False, index=images.index)
    for column in ("sha256", "perceptual_hash"):
        # Blank pictures all have the hash 0 and are not the same picture for that.
        telling = images[column].str.strip("0") != ""
        contradicted |= telling & (images.groupby(column)["label"].transform("nunique") > 1)
    return images[contradicted].assign(reason="same picture under two labels")


def assign_splits(images: pd.DataFrame, *, val: int | float, test: int | float, seed: int) -> pd.Series:
    """Assigns each image to train, val or test.

    Within each class the groups are put in an order drawn from the seed and the content, not from names or
    from the file system. Every split gets its exact size.

    Args:
        images: columns label, sha256 and group (the same value for images that belong together).
        val: validation share of each class, a fraction below 1, or a number of images in all.
        test: test share, likewise.
        seed: draws the order.

    Returns:
        A series of "train", "val" or "test" with the index of `images`.

    Raises:
        CatdogError: a class has too few images for three splits, or the groups leave no way to fill one.
    """
    labels = images["label"]
    counts = labels.value_counts().sort_index()
    wanted = {"test": _per_class(test, counts, "test"), "val": _per_class(val, counts, "val")}
    for label, count in ((str(name), int(number)) for name, number in counts.items()):
        needed = wanted["test"][label] + wanted["val"][label] + 1
        if count < needed:
            raise CatdogError(
                f"class {label!r} has {count} usable images, but split.val = {val} and split.test = {test} "
                f"need at least {needed}; add images or lower the shares"
            )
    groups: dict[Any, _Group] = {}
    for position, (group, label, content) in enumerate(zip(images["group"], labels, images["sha256"], strict=True)):
        found = groups.setdefault(group, _Group(content))
        found.content = min(found.content, content)
        found.positions.append(position)
        found.labels[str(label)] += 1
    # Groups of several images are dealt by lot; single ones, in drawn order, then fill the splits exactly.
    drawn = sorted(groups.values(), key=lambda one: (len(one.positions) == 1, _draw(seed, one.content)))
    shares = {split: sum(wanted[split].values()) / len(images) for split in ("test", "val")}
    room = {split: dict(wanted[split]) for split in ("test", "val")}
    result = np.full(len(images), "train", dtype=object)

    def place(one: _Group, candidates: Sequence[str]) -> None:
        """Puts a group into the first of these splits that has room for all of it; else it stays in train."""
        for split in candidates:
            if all(room[split][label] >= number for label, number in one.labels.items()):
                for label, number in one.labels.items():
                    room[split][label] -= number
                result[one.positions] = split
                return

    for one in drawn:
        if len(one.positions) == 1:
            candidates = ["test", "val"]
        else:
            lot = int(_draw(seed, one.content)[:8], 16) / 16**8
            candidates = [s for s, low, high in _lots(shares) if low <= lot < high]
        place(one, candidates)
    # Where nearly everything comes in groups, single images cannot fill the splits: then groups do, large ones first.
    left_over = [one for one in drawn if result[one.positions[0]] == "train"]
    for one in sorted(left_over, key=lambda one: -len(one.positions)):
        place(one, ["test", "val"])
    if any(left for split in room.values() for left in split.values()):
        raise CatdogError(
            f"the groups of near-duplicates are too large to fill the splits exactly (still short: {room}); "
            "lower split.val and split.test, or split.near_duplicate_bits"
        )
    assigned = pd.Series(result, index=images.index, name="split")
    if set(labels[assigned == "train"]) != set(counts.index):
        raise CatdogError("near-duplicates leave a class without training images; add images or lower the shares")
    return assigned


@dataclass
class _Group:
    """Images that must stay together."""

    content: str  # the smallest hash of its members: a name that does not depend on their order
    positions: list[int] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)


def _lots(shares: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Cuts 0..1 into one interval a split; the rest, above the last, is train's."""
    edges = np.cumsum([0.0, *shares.values()])
    return [(split, edges[i], edges[i + 1]) for i, split in enumerate(shares)]


def find_leaks(manifest: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of every group that lies in more than one split; empty when nothing leaks.

    Groups are rebuilt from the contents here, not taken on trust: rows with equal bytes count as a group too.
    """
    crosses = pd.Series(False, index=manifest.index)
    for column in ("group", "sha256"):
        crosses |= manifest.groupby(column)["split"].transform("nunique") > 1
    return manifest[crosses]


def draw_order(images: pd.DataFrame, seed: int) -> pd.Series:
    """Returns a sort key per image: shuffled by the seed, the same whatever the files are called."""
    # The path only orders files with equal bytes.
    return images["sha256"].map(lambda content: _draw(seed, content)) + images["path"]


def _draw(seed: int, content: str) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _per_class(share: int | float, counts: pd.Series, name: str) -> dict[str, int]:
    """Images of each class in a split, with exact totals: largest remainders get what rounding leaves."""
    total = int(counts.sum())
    size = share if isinstance(share, int) else round(share * total)
    if size < len(counts):
        raise CatdogError(
            f"split.{name} = {share} gives {size} of {total} images, fewer than the {len(counts)} classes; raise it"
        )
    if size >= total:
        raise CatdogError(f"split.{name} = {share} takes all {total} images; lower it")
    exact = {str(label): size * int(count) / total for label, count in counts.items()}
    floors = {label: max(1, math.floor(value)) for label, value in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (floors[label] - exact[label], label))
    for position in range(size - sum(floors.values())):
        floors[by_remainder[position % len(by_remainder)]] += 1
    # The guaranteed one image of a rare class can exceed the total: the others give it back.
    for _ in range(sum(floors.values()) - size):
        floors[
            max((label for label in floors if floors[label] > 1), key=lambda label: floors[label] - exact[label])
        ] -= 1
    return floors


def count_table(manifest: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Returns images by split and class, splits in their usual order and classes sorted."""
    table = pd.crosstab(manifest["split"], manifest["label"]).reindex(SPLITS, fill_value=0)
    return {str(split): {str(label): int(n) for label, n in row.items()} for split, row in table.iterrows()}
