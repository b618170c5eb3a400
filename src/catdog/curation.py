"""From an archive to a manifest: every file is labelled, examined, and kept with a split or rejected with a reason.

Nothing in the archive is changed, and nothing vanishes: each of its files is, exactly once, among the images, the
rejected files or the unlabelled images.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from catdog.config import SplitParams
from catdog.errors import CatdogError
from catdog.labels import HIDDEN, NOT_LISTED, label_by_table, label_files
from catdog.paths import UNUSED, users_path
from catdog.quality import REJECTED_COLUMNS, group_duplicates, inspect_archive
from catdog.split import (
    assign_folds,
    assign_splits,
    complete_given,
    draw_order,
    find_leaks,
    read_exclusions,
    read_given_splits,
    reject_contradictions,
    reject_crossing,
    reject_excluded,
)


@dataclass(frozen=True)
class Examined:
    """What is in an archive.

    Attributes:
        classes: class names, sorted, where split.file is set of what it lists; the position is the class's number.
        images: path, label, the fields of `quality.Inspection`, and given: the split that the data set or
            split.file gives, "" for none. Sorted by path.
        rejected: path, label, reason, bytes; sorted by path.
        unlabelled: path and bytes of the images that are there to be predicted; sorted by path.
        warnings: sentences about what the user may have meant otherwise.
    """

    classes: tuple[str, ...]
    images: pd.DataFrame
    rejected: pd.DataFrame
    unlabelled: pd.DataFrame
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Divided:
    """How the images are divided.

    Attributes:
        method: random, given or folds.
        manifest: the images with columns group and split, in an order drawn from seed and content.
        rejected: rows that a given split had to lose, as `Examined.rejected`.
    """

    method: str
    manifest: pd.DataFrame
    rejected: pd.DataFrame


def examine(archive: zipfile.ZipFile, params: SplitParams, *, root: Path, workers: int) -> Examined:
    """Labels and inspects every file of an archive and applies the user's lists.

    Args:
        archive: the raw data set, from `archives.open_archive`.
        params: the block `split` of params.yaml.
        root: where relative paths of lists start.
        workers: threads.

    Raises:
        CatdogError: no classes can be found, or a list cannot be read or does not fit the archive.
    """
    names = archive.namelist()
    listed = read_given_splits(users_path("split.file", params.file, root), params.file) if params.file else None
    if listed is not None:
        _require_present(listed["path"], names, params.file)
    if listed is not None and "label" in listed.columns:
        labelling = label_by_table(names, dict(zip(listed["path"], listed["label"], strict=True)))
    else:
        labelling = label_files(names)
    given = labelling.splits if listed is None else dict(zip(listed["path"], listed["split"], strict=True))
    classes = labelling.classes if listed is None else _listed_classes(listed["path"], labelling.labels, params.file)

    images, rejected = inspect_archive(archive, labelling, max_pixels=params.max_megapixels * 1e6, workers=workers)
    reasons: list[pd.DataFrame] = []
    warnings: list[str] = []
    # What the user left out is listed as that also where it shows no picture: then it is no defect of the data.
    if listed is not None:
        unlisted = images[~images["path"].isin(listed["path"])].assign(reason=NOT_LISTED)
        images, reasons = images.drop(unlisted.index), [*reasons, unlisted]
        beyond_list = ~rejected["path"].isin(listed["path"]) & (rejected["reason"] != HIDDEN)
        rejected = rejected.assign(reason=rejected["reason"].mask(beyond_list, NOT_LISTED))
    if params.exclude:
        exclusions = read_exclusions(users_path("split.exclude", params.exclude, root), params.exclude)
        warnings += _unmatched(exclusions, images, names, params.exclude)
        excluded = reject_excluded(images, exclusions)
        images, reasons = images.drop(excluded.index), [*reasons, excluded]
        damaged = reject_excluded(rejected[rejected["reason"] != NOT_LISTED].assign(sha256=""), exclusions)
        rejected, reasons = rejected.drop(damaged.index), [*reasons, damaged]
    reasons = [rejected, *reasons]
    contradictions = reject_contradictions(images)
    images, reasons = images.drop(contradictions.index), [*reasons, contradictions]

    missing = sorted(set(classes) - set(images["label"]))
    if missing:
        where = "the data set" if listed is None else f"split.file = {params.file!r}"
        raise CatdogError(f"class {missing[0]!r} has no usable image left of those in {where}; mend or remove them all")
    images = images.assign(given=[given.get(path, "") for path in images["path"]])
    unlabelled = [(path, archive.getinfo(path).file_size) for path in labelling.unlabelled]
    return Examined(
        classes,
        images.reset_index(drop=True),
        pd.concat([one[REJECTED_COLUMNS] for one in reasons]).sort_values("path", ignore_index=True, kind="stable"),
        pd.DataFrame(unlabelled, columns=["path", "bytes"]),
        tuple(warnings),
    )


def _unmatched(exclusions: pd.DataFrame, images: pd.DataFrame, names: list[str], file: str) -> list[str]:
    """Returns a sentence about exclusions that mean nothing in this data set; raises CatdogError when all do."""
    known = exclusions["sha256"].isin(images["sha256"]) | (exclusions["sha256"].eq("") & exclusions["path"].isin(names))
    unknown = exclusions[~known]
    if unknown.empty:
        return []
    first = unknown["path"].iloc[0] or unknown["sha256"].iloc[0]
    sentence = (
        f"{len(unknown):,} of {len(exclusions):,} rows of split.exclude = {file!r} match no image, {first!r} for one"
    )
    if len(unknown) == len(exclusions):
        raise CatdogError(f"{sentence}; its paths must be those inside the archive, as data/manifest.csv shows them")
    return [sentence]


def _require_present(paths: pd.Series, names: list[str], file: str) -> None:
    absent = sorted(set(paths) - set(names))
    if absent:
        raise CatdogError(
            f"split.file = {file!r} names {len(absent):,} files that the data set lacks, {absent[0]!r} for one; "
            "its paths must be those inside the archive, as data/manifest.csv shows them"
        )


def _listed_classes(paths: pd.Series, labels: Mapping[str, str], file: str) -> tuple[str, ...]:
    classes = tuple(sorted({labels[path] for path in paths if path in labels}))
    if len(classes) < 2:
        raise CatdogError(
            f"split.file = {file!r} lists images of {len(classes)} classes, but two or more are needed; list others too"
        )
    return classes


def divide(images: pd.DataFrame, params: SplitParams, *, seed: int) -> Divided:
    """Groups the images that show the same, divides them, and proves that no group crosses the splits.

    Args:
        images: from `examine`.
        params: the block `split` of params.yaml.
        seed: draws splits and order.

    Raises:
        CatdogError: the images cannot be divided as asked; also when the proof fails, which is a defect.
    """
    method = params.method
    is_given = bool((images["given"] != "").any())
    if method == "auto":
        method = "given" if is_given else "random"
    elif method == "given" and not is_given:
        raise CatdogError(
            "split.method = 'given', but the data set has no folders train, val and test and split.file is not set; "
            "set it, or use random"
        )
    images = images.assign(
        group=group_duplicates(
            images["sha256"].tolist(), images["perceptual_hash"].tolist(), params.near_duplicate_bits
        )
    )
    train = None if params.train == "rest" else params.train
    crossing = images.iloc[:0].assign(reason="")
    if method == "given":
        images = images.assign(split=images["given"])
        crossing = reject_crossing(images)
        images = images.drop(crossing.index)
        lost = set(crossing["split"])
        split = complete_given(images, val=params.val, test=params.test, train=train, seed=seed, lost=lost)
    else:
        # What split.file calls unused stays so.
        drawn = images[images["given"] != UNUSED]
        if method == "folds":
            split = assign_folds(drawn, folds=params.folds, fold=params.fold, val=params.val, train=train, seed=seed)
        else:
            split = assign_splits(drawn, val=params.val, test=params.test, train=train, seed=seed)
        split = split.reindex(images.index, fill_value=UNUSED)
    manifest = images.drop(columns="given").assign(split=split)
    manifest = manifest.loc[draw_order(manifest, seed).sort_values().index].reset_index(drop=True)
    if not (leaks := find_leaks(manifest, params.near_duplicate_bits)).empty:
        raise CatdogError(f"the audit found a leak between splits: {', '.join(leaks['path'].head(4))}; report this")
    return Divided(method, manifest, crossing[REJECTED_COLUMNS].reset_index(drop=True))
