"""Train, validation and test: drawn, folded or given, and always without a group that crosses splits."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog.errors import CatdogError
from catdog.labels import EXCLUDED, SPLIT_NAMES
from catdog.paths import SPLITS, UNUSED


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


def reject_excluded(images: pd.DataFrame, excluded: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of images that the user left out, with a `reason` column.

    Args:
        images: columns path, sha256.
        excluded: from `read_exclusions`; a row with a sha256 means that content, wherever it lies, else the path.
    """
    by_content = excluded[excluded["sha256"] != ""].set_index("sha256")["reason"].to_dict()
    by_path = excluded[excluded["sha256"] == ""].set_index("path")["reason"].to_dict()
    reasons = [
        by_content.get(content, by_path.get(path))
        for content, path in zip(images["sha256"], images["path"], strict=True)
    ]
    found = images.assign(reason=pd.Series(reasons, index=images.index, dtype=object))
    found = found[found["reason"].notna()]
    return found.assign(reason=[f"{EXCLUDED}: {text}" if text else EXCLUDED for text in found["reason"]])


def read_exclusions(path: Path, name: str) -> pd.DataFrame:
    """Reads a list of images to leave out: text columns path, sha256 and reason, "" where the file has none.

    Raises:
        CatdogError: no such file, no table, or neither a column path nor sha256. `name` is what the user called it.
    """
    table = _read_table(path, name, "split.exclude")
    if not {"path", "sha256"} & set(table.columns):
        raise CatdogError(f"split.exclude = {name!r} has neither a column path nor sha256; add one as its header")
    table = table.reindex(columns=["path", "sha256", "reason"], fill_value="")
    return table.assign(sha256=table["sha256"].str.lower())


def read_given_splits(path: Path, name: str) -> pd.DataFrame:
    """Reads a given split: text columns path, split (train, val or test) and, where the file has it, label.

    Raises:
        CatdogError: no such file, no table, a column missing, a path twice, or a split of another name.
    """
    table = _read_table(path, name, "split.file")
    missing = [column for column in ("path", "split") if column not in table.columns]
    if missing:
        raise CatdogError(f"split.file = {name!r} has no column {missing[0]}; its header must name path and split")
    table = table.assign(split=[SPLIT_NAMES.get(one, one) for one in table["split"].str.lower()])
    wrong = table[~table["split"].isin((*SPLITS, UNUSED))]
    if not wrong.empty:
        raise CatdogError(
            f"split.file = {name!r} has the split {wrong['split'].iloc[0]!r} for {wrong['path'].iloc[0]!r}; "
            f"use {', '.join(SPLITS)} or {UNUSED}"
        )
    twice = table[table["path"].duplicated()]
    if not twice.empty:
        raise CatdogError(f"split.file = {name!r} names {twice['path'].iloc[0]!r} twice; keep one of the rows")
    if "label" in table.columns and (table["label"] == "").any():
        bare = table.loc[table["label"] == "", "path"].iloc[0]
        raise CatdogError(f"split.file = {name!r} has no label for {bare!r}; fill the column label or drop it")
    return table


def _read_table(path: Path, name: str, parameter: str) -> pd.DataFrame:
    try:
        # As text: a class may be called 1 or NA. Spaces beside a comma, as in `path, split, label`, are no part of it.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except OSError as error:
        raise CatdogError(f"{parameter} = {name!r} cannot be read: {error.strerror} ({path}); check the path") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CatdogError(f"{parameter} = {name!r} is no CSV table in UTF-8: {' '.join(str(error).split())}") from None
    if table.empty:
        raise CatdogError(f"{parameter} = {name!r} lists nothing; fill it, or set {parameter} to ''")
    if not isinstance(table.index, pd.RangeIndex):
        # pandas then takes the first fields for names of the rows, and what follows for the wrong columns.
        raise CatdogError(
            f"{parameter} = {name!r} has more fields in its rows than names in its header, {table.index[0]!r} for one; "
            "name each column, and put texts with a comma in quotes"
        )
    table = table.assign(**{column: table[column].str.strip() for column in table.columns})
    table = table.rename(columns=lambda column: str(column).strip().lower())
    if table.columns.has_duplicates:
        twice = table.columns[table.columns.duplicated()][0]
        raise CatdogError(f"{parameter} = {name!r} has two columns {twice}, whatever their case; keep one of them")
    return table


def assign_splits(
    images: pd.DataFrame,
    *,
    val: int | float | None,
    test: int | float | None,
    seed: int,
    train: int | float | None = None,
) -> pd.Series:
    """Assigns each image to train, val or test.

    Within each class the groups are put in an order drawn from the seed and the content, not from names or
    from the file system. Every split gets its exact size.

    Args:
        images: columns label, sha256 and group (the same value for images that belong together).
        val: validation share of each class, a fraction below 1, or a number of images in all; None for no such split.
        test: test share, likewise.
        seed: draws the order.
        train: training share, likewise; the images beyond it are "unused". None takes all that is left.

    Returns:
        A series of "train", "val", "test" or "unused" with the index of `images`.

    Raises:
        CatdogError: a class has too few images for the splits, or the groups leave no way to fill one.
    """
    labels = images["label"]
    counts = labels.value_counts().sort_index()
    if _all_that_is_left(train, (val, test)):
        train = None
    shares_asked = {"test": test, "val": val, "train": train}
    wanted = {split: _per_class(share, counts, split) for split, share in shares_asked.items() if share is not None}
    asked = " and ".join(f"split.{split} = {share}" for split, share in shares_asked.items() if share is not None)
    for label, count in ((str(name), int(number)) for name, number in counts.items()):
        needed = sum(sizes[label] for sizes in wanted.values()) + (train is None)
        if count < needed:
            raise CatdogError(
                f"class {label!r} has {count} usable images, but {asked} "
                f"need at least {needed}; add images or lower the shares"
            )
    rest = UNUSED if "train" in wanted else "train"
    drawn = _drawn_groups(images, seed)
    shares = {split: sum(sizes.values()) / len(images) for split, sizes in wanted.items()}
    room = {split: dict(sizes) for split, sizes in wanted.items()}
    result = np.full(len(images), rest, dtype=object)

    def place(one: _Group, candidates: Iterable[str]) -> None:
        """Puts a group into the first of these splits that has room for all of it; else it stays in the rest."""
        for split in candidates:
            if all(room[split][label] >= number for label, number in one.labels.items()):
                for label, number in one.labels.items():
                    room[split][label] -= number
                result[one.positions] = split
                return

    # Groups of several images are dealt by lot; single ones, in drawn order, then fill the splits exactly.
    for one in drawn:
        if len(one.positions) == 1:
            place(one, wanted)
        else:
            lot = int(_draw(seed, one.content)[:8], 16) / 16**8
            place(one, [s for s, low, high in _lots(shares) if low <= lot < high])
    # Where nearly everything comes in groups, single images cannot fill the splits: then groups do, large ones first.
    left_over = [one for one in drawn if result[one.positions[0]] == rest]
    for one in sorted(left_over, key=lambda one: -len(one.positions)):
        place(one, wanted)
    if any(left for split in room.values() for left in split.values()):
        raise CatdogError(
            f"the groups of near-duplicates are too large to fill the splits exactly (still short: {room}); "
            "lower the shares of split, or split.near_duplicate_bits"
        )
    assigned = pd.Series(result, index=images.index, name="split")
    _require_training_images(images, assigned)
    return assigned


def _all_that_is_left(train: int | float | None, others: Iterable[int | float | None]) -> bool:
    """Says whether fractions come to one: rounded each, they could come to more images than there are."""
    shares = [train, *others]
    return isinstance(train, float) and math.isclose(sum(one for one in shares if isinstance(one, float)), 1)


def assign_folds(
    images: pd.DataFrame,
    *,
    folds: int,
    fold: int,
    val: int | float,
    seed: int,
    train: int | float | None = None,
) -> pd.Series:
    """Assigns each image for k-fold cross-validation: one fold is test, `val` is drawn from the others.

    Groups stay in one fold, and each fold has its share of every class: exactly, to one image, where no groups
    hinder it. The folds depend on the seed and the contents only, so the runs for fold 0 to folds - 1 together
    test every image once.

    Args:
        images: as for `assign_splits`.
        folds: number of folds, at least 2.
        fold: which one is the test split, from 0.
        val: validation share of all images, or a number of images.
        seed: draws the order.
        train: training share, likewise; the images beyond it are "unused". None takes all that is left.

    Raises:
        CatdogError: a class has fewer images than there are folds, or too few for the validation and training splits.
    """
    counts = images["label"].value_counts()
    if counts.min() < folds:
        raise CatdogError(
            f"class {counts.idxmin()!r} has {counts.min()} usable images, fewer than split.folds = {folds}; lower it"
        )
    number = np.zeros(len(images), np.int64)
    held: list[Counter[str]] = [Counter() for _ in range(folds)]
    # Large groups first: single images then even out what the groups left uneven.
    for one in sorted(_drawn_groups(images, seed), key=lambda one: -len(one.positions)):
        emptiest = min(range(folds), key=lambda i: (sum(held[i][name] for name in one.labels), held[i].total(), i))
        held[emptiest].update(one.labels)
        number[one.positions] = emptiest
    rest = images[number != fold]
    if _all_that_is_left(train, (val, 1 / folds)):
        train = None
    # Shares are of all images, also of those in the fold.
    val_size, train_size = (round(one * len(images)) if isinstance(one, float) else one for one in (val, train))
    assigned = pd.Series("test", index=images.index, name="split")
    assigned.loc[rest.index] = assign_splits(rest, val=val_size, test=None, train=train_size, seed=seed)
    _require_training_images(images, assigned)
    return assigned


def reject_crossing(images: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows that a given split must lose so that no group crosses it, with a `reason` column.

    The images of a group stay in its best guarded split, test before val before train, and leave the others: a
    test split stays what its author made it, and training learns nothing of it.

    Args:
        images: columns group and split; of images that are in no split, nothing is rejected.
    """
    guarded = pd.Categorical(images["split"], ["test", "val", "train", UNUSED], ordered=True)
    rank = pd.Series(guarded.codes, index=images.index)
    best = rank.groupby(images["group"]).transform("min")
    crossing = images[(rank > best) & (images["split"] != UNUSED)]
    names = best[crossing.index].map(dict(enumerate(guarded.categories)))
    return crossing.assign(reason="near-duplicate of an image in the given " + names.astype(str) + " split")


def complete_given(
    images: pd.DataFrame,
    *,
    val: int | float,
    test: int | float,
    seed: int,
    train: int | float | None = None,
    lost: Iterable[str] = (),
) -> pd.Series:
    """Returns the given split of each image, with a missing val or test drawn from the given training images.

    Args:
        images: columns label, sha256, group and split (train, val, test or unused).
        val: share of the training images that become val where none is given, a fraction or a number of images.
        test: likewise.
        seed: draws the order.
        train: share of the training images that stay such, likewise; those beyond it become unused. None keeps all.
        lost: splits of the images that `reject_crossing` took away.

    Raises:
        CatdogError: a class has no training images, or too few to draw from, or a given split has lost all its images.
    """
    assigned = images["split"].copy()
    present = set(assigned) | set(lost)
    emptied = sorted(set(lost) - set(assigned))
    if emptied:
        raise CatdogError(
            f"every image of the given {emptied[0]} split shows nearly the same as one of a better guarded split; "
            "give other images, or split.method = random"
        )
    training = images[assigned == "train"]
    if (train is not None or not present >= {"val", "test"}) and not training.empty:
        assigned.loc[training.index] = assign_splits(
            training,
            val=None if "val" in present else val,
            test=None if "test" in present else test,
            train=train,
            seed=seed,
        )
    _require_training_images(images, assigned)
    return assigned


def _require_training_images(images: pd.DataFrame, assigned: pd.Series) -> None:
    missing = set(images["label"]) - set(images["label"][assigned == "train"])
    if missing:
        raise CatdogError(
            f"class {min(missing)!r} has no training images; add some, or lower the shares of val and test (images "
            "that show nearly the same stay in one split)"
        )


def _drawn_groups(images: pd.DataFrame, seed: int) -> list[_Group]:
    """The groups in an order drawn from seed and content: those of several images first, then single ones."""
    groups: dict[Any, _Group] = {}
    rows = zip(images["group"], images["label"], images["sha256"], strict=True)
    for position, (group, label, content) in enumerate(rows):
        found = groups.setdefault(group, _Group(content))
        found.content = min(found.content, content)
        found.positions.append(position)
        found.labels[str(label)] += 1
    return sorted(groups.values(), key=lambda one: (len(one.positions) == 1, _draw(seed, one.content)))


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


def find_leaks(manifest: pd.DataFrame, max_bits: int = -1) -> pd.DataFrame:
    """Returns the rows of every group that lies in more than one split; empty when nothing leaks.

    The groups are not taken on trust: rows with equal bytes count as a group too, and every perceptual hash is
    compared with every one of another split, without the shortcuts by which the groups were found.

    Args:
        manifest: columns group, sha256, split and, with max_bits >= 0, perceptual_hash (hexadecimal).
        max_bits: pictures whose hashes differ in at most so many bits must not lie in two splits; -1: not compared.
    """
    used = manifest[manifest["split"] != UNUSED]
    crosses = pd.Series(False, index=used.index)
    for column in ("group", "sha256"):
        crosses |= used.groupby(column)["split"].transform("nunique") > 1
    if max_bits >= 0:
        for one, other in combinations(SPLITS, 2):
            left, right = used[used["split"] == one], used[used["split"] == other]
            near_left, near_right = _near(left["perceptual_hash"], right["perceptual_hash"], max_bits)
            crosses[left.index[near_left]] = True
            crosses[right.index[near_right]] = True
    return used[crosses]


def _near(left: pd.Series, right: pd.Series, max_bits: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which hashes of one side are within max_bits of any of the other side, by brute force, bool [n] and [m].

    With bits as -1 and 1, a product of two hashes is 128 - 2 x distance: one matrix product compares all.
    """
    one, other = _signs(left), _signs(right)
    near_one, near_other = np.zeros(len(one), bool), np.zeros(len(other), bool)
    for start in range(0, len(one), 1024):  # 1,024 x 100,000 products are 400 MB
        block = one[start : start + 1024] @ other.T >= one.shape[1] - 2 * max_bits
        near_one[start : start + 1024] = block.any(axis=1)
        near_other |= block.any(axis=0)
    return near_one, near_other


def _signs(hashes: pd.Series) -> npt.NDArray[np.float32]:
    digits = "".join(hashes)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)).reshape(len(hashes), -1)
    return bits.astype(np.float32) * 2 - 1


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
    if size > total or (size == total and name != "train"):
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
    """Returns images by split and class, splits in their usual order and classes sorted; unused ones last, if any."""
    splits = (*SPLITS, UNUSED) if (manifest["split"] == UNUSED).any() else SPLITS
    table = pd.crosstab(manifest["split"], manifest["label"]).reindex(splits, fill_value=0)
    return {str(split): {str(label): int(n) for label, n in row.items()} for split, row in table.iterrows()}
