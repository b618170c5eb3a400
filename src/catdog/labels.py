"""The class of every file in an archive, read from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from catdog.errors import CatdogError
from catdog.names import IMAGE_SUFFIXES, is_hidden

HIDDEN = "hidden file"
NOT_LISTED = "not listed in split.file"
EXCLUDED = "excluded"
_KAGGLE_NAME = re.compile(r"(?P<label>[A-Za-z][\w-]*)\.\d+\.\w+")
_NUMBER_NAME = re.compile(r"\d+\.\w+")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "train_set", "training_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validation_set", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "test_set"), "test"),
}
"""What folders of splits are called, in lower case, and which split they mean."""
UNLABELLED_FOLDERS = frozenset({"unlabelled", "unlabeled", "unsupervised"})
"""What folders of images to predict are called, in lower case."""


@dataclass(frozen=True)
class Labelling:
    """What the names in an archive say.

    Every file is in exactly one of `labels`, `unlabelled` and `refused`.

    Attributes:
        classes: class names, sorted; the position is the class's number.
        labels: class name by file name, for the files that have one.
        splits: train, val or test by file name, for all that have a label; empty where the names give no split.
        unlabelled: names of the images that are there to be predicted, sorted.
        refused: reason by file name, for the files that are neither.
    """

    classes: tuple[str, ...]
    labels: dict[str, str]
    splits: dict[str, str]
    unlabelled: tuple[str, ...]
    refused: dict[str, str]


def label_files(names: Iterable[str]) -> Labelling:
    """Finds the classes, and splits if there are some, in an archive's member names.

    Two layouts are known: Kaggle's names (`train/cat.1001.jpg`), when most image names look like that, and
    one folder a class (`PetImages/Cat/0.jpg`), below any number of single top folders. Folders named train,
    val and test (or the like) above either give the split. Images to predict are those with nothing but a number
    for a name beside Kaggle's names (`test1/1.jpg`), in a folder `unlabelled`, or in a test folder without classes.

    Args:
        names: member names; a name that ends with `/` is a folder.

    Raises:
        CatdogError: fewer than two classes, a class without a file, folders that are splits without classes, or
            names and folders that each tell other classes.
    """
    names = sorted(names)
    files = [name for name in names if not name.endswith("/")]
    visible = [name for name in files if not is_hidden(name)]
    images = [name for name in visible if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise CatdogError(f"the data set holds no image files among its {len(files)} files; check `dataset`")
    found = _label_by_kaggle_names(visible, images) or _label_by_folders(names, visible, images)
    classes = tuple(sorted({found.labels[name] for name in images if name in found.labels}))
    # A class is what at least one image name stands for: notes called fox.1.txt make none.
    labels = {name: label for name, label in found.labels.items() if label in classes}
    empty = sorted(found.folders - set(classes))
    if empty:
        raise CatdogError(f"class folder {empty[0]!r} holds no images; fill it or remove it")
    if len(classes) < 2:
        what = f"only the class {classes[0]!r}" if classes else "no class folder"
        raise CatdogError(
            f"the data set has {what}, but two or more are needed; give one folder a class, or names as cat.1.jpg"
        )
    if all(name.lower() in SPLIT_NAMES for name in classes):
        raise CatdogError(
            f"the folders {', '.join(classes)} are splits, and hold no class folders; give one folder a class, below "
            "train, val and test or alone"
        )
    # One split is none: `train/` beside images to predict is where everything lies.
    splits = {name: split for name, split in found.splits.items() if name in labels}
    splits = splits if len(set(splits.values())) > 1 else {}
    unlabelled = found.unlabelled - labels.keys()
    refused = {
        name: HIDDEN if is_hidden(name) else found.missing
        for name in files
        if name not in labels and name not in unlabelled
    }
    return Labelling(classes, labels, splits, tuple(sorted(unlabelled)), refused)


def label_by_table(names: Iterable[str], table: Mapping[str, str]) -> Labelling:
    """Takes the classes from a table instead of from names.

    Args:
        names: member names; a name that ends with `/` is a folder.
        table: class by member name; files that it does not name are refused, but for images in a folder `test` or
            `unlabelled`, which are there to be predicted.

    Raises:
        CatdogError: fewer than two classes.
    """
    files = sorted(name for name in names if not name.endswith("/"))
    labels = {name: table[name] for name in files if name in table}
    classes = tuple(sorted(set(labels.values())))
    if len(classes) < 2:
        raise CatdogError(f"split.file names {len(classes)} classes, but two or more are needed; fill its column label")
    rest = [name for name in files if name not in labels]
    # Images to predict have no label to list.
    unlabelled = tuple(name for name in rest if _is_to_predict(name))
    refused = {name: HIDDEN if is_hidden(name) else NOT_LISTED for name in rest if not _is_to_predict(name)}
    return Labelling(classes, labels, {}, unlabelled, refused)


def _is_to_predict(name: str) -> bool:
    """Says whether a file without a label is an image in a folder for tests or for unlabelled images."""
    folders = [part.lower() for part in PurePosixPath(name).parts[:-1]]
    meant = any(one in UNLABELLED_FOLDERS or SPLIT_NAMES.get(one) == "test" or one == "test1" for one in folders)
    return meant and not is_hidden(name) and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class _Found:
    """What one of the layouts says."""

    labels: dict[str, str]
    splits: dict[str, str]
    unlabelled: set[str]
    folders: set[str]  # class folders, also empty ones
    missing: str  # why any other file has no label


def _label_by_kaggle_names(visible: list[str], images: list[str]) -> _Found | None:
    """Reads names like `train/cat.1001.jpg`; None when the images are not called like that."""
    by_name = {name: match["label"] for name in visible if (match := _KAGGLE_NAME.fullmatch(PurePosixPath(name).name))}
    labelled_folders = {PurePosixPath(name).parent for name in by_name}
    unlabelled = {
        name
        for name in images
        if PurePosixPath(name).parent not in labelled_folders and _NUMBER_NAME.fullmatch(PurePosixPath(name).name)
    }
    rest = [name for name in images if name not in unlabelled]
    image_labels = [by_name[name] for name in rest if name in by_name]
    # `Cat/img.1.jpg` and `Dog/img.2.jpg` look like Kaggle's names too, but the folders are what differs.
    one_folder = len({PurePosixPath(name).parent for name in images}) == 1
    if len(image_labels) <= len(rest) / 2 or not (one_folder or len(set(image_labels)) > 1):
        return None
    _require_one_meaning(by_name, images)
    splits = {name: _split_above(name) for name in by_name}
    splits = splits if all(splits.values()) else {}
    return _Found(by_name, splits, unlabelled, set(), "no class in its name")


def _require_one_meaning(labels: Mapping[str, str], images: list[str]) -> None:
    """Raises CatdogError where one label of Kaggle's names lies in several folders, as if those were the classes.

    Nothing tells `Cat/flickr.1.jpg` and `Dog/flickr.2.jpg` from `part1/cat.1.jpg` and `part2/cat.2.jpg`.
    """
    labelled = [name for name in images if name in labels]
    # Without the folders of splits, so that `train/cats/cat.1.jpg` and `val/cats/cat.2.jpg` are in one class folder.
    bare = {name: _without_splits(name) for name in labelled}
    top = _top_folder(list(bare.values()))
    inside = [(labels[name], below, name) for name in labelled if (below := _folder_below(bare[name], top)) is not None]
    folders: dict[str, dict[str, str]] = {}  # by label, an image in each class folder where it occurs
    for label, below, name in inside:
        folders.setdefault(label, {}).setdefault(below, name)
    shared = next((label for label, one in sorted(folders.items()) if len(one) > 1), None)
    if shared is None or len(inside) <= len(labelled) / 2:
        return
    one, other = list(folders[shared].values())[:2]
    raise CatdogError(
        f"images are named alike in several folders, as {one!r} and {other!r}: their class may be the folder, or the "
        f"name ({shared!r}); put all images into one folder if it is the name, rename them if it is the folder, or "
        "list them with their label in split.file"
    )


def _without_splits(name: str) -> str:
    """The name without folders that are called like a split or for unlabelled images."""
    *above, last = PurePosixPath(name).parts
    kept = [one for one in above if one.lower() not in SPLIT_NAMES and one.lower() not in UNLABELLED_FOLDERS]
    return "/".join([*kept, last])


def _split_above(name: str) -> str:
    """The split that the nearest folder called like one stands for, "" where there is none."""
    folders = reversed(PurePosixPath(name).parts[:-1])
    return next((SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES), "")


def _label_by_folders(names: list[str], visible: list[str], images: list[str]) -> _Found:
    """Reads one folder a class, below train, val and test where such folders are all there is."""
    top = _top_folder(images)
    inner: dict[str, list[str]] = {}  # images by the folder below `top`
    for name in images:
        if (part := _folder_below(name, top)) is not None:
            inner.setdefault(part, []).append(name)
    given = {part for part in inner if part.lower() in SPLIT_NAMES}
    aside = {part for part in inner if part.lower() in UNLABELLED_FOLDERS}
    unlabelled = {name for part in aside for name in inner[part]}
    tops = {top: ""}
    if given and given | aside == inner.keys():
        split_tops = {part: _below_wrappers((*top, part), inner[part]) for part in given}
        classless = {
            part
            for part, one in split_tops.items()
            if {_folder_below(name, one) for name in inner[part]} <= {None, "unknown", *UNLABELLED_FOLDERS}
        }
        if classless < given and all(SPLIT_NAMES[part.lower()] == "test" for part in classless):
            unlabelled |= {name for part in classless for name in inner[part]}
            tops = {split_tops[part]: SPLIT_NAMES[part.lower()] for part in sorted(given - classless)}
    else:
        _refuse_split_beside_others(given, inner, top)
    splits: dict[str, str] = {}
    labels: dict[str, str] = {}
    folders: set[str] = set()
    for one, split in tops.items():
        for name in visible:
            if name not in unlabelled and (part := _folder_below(name, one)) is not None:
                labels[name] = part
                if split:
                    splits[name] = split
        # A folder counts as a class when it holds a file or lies, empty, beside the class folders.
        folders |= {part for name in names if (part := _folder_below(name, one)) and not is_hidden(name)}
    return _Found(labels, splits, unlabelled, folders - aside, "outside any class folder")


def _below_wrappers(folder: tuple[str, ...], images: list[str]) -> tuple[str, ...]:
    """The folder below any that only repeat a split's name, as in `test_set/test_set/cats`."""
    while len(parts := {_folder_below(name, folder) for name in images}) == 1:
        (part,) = parts
        if part is None or part.lower() not in SPLIT_NAMES:
            break
        folder = (*folder, part)
    return folder


def _refuse_split_beside_others(given: set[str], inner: Mapping[str, list[str]], top: tuple[str, ...]) -> None:
    """Stops where a folder is called like a split, holds class folders, and has something else beside it."""
    for part in sorted(given):
        below = {_folder_below(name, (*top, part)) for name in inner[part]} - {None}
        if len(below) > 1:
            other = min(inner.keys() - given)
            raise CatdogError(
                f"the folder {part!r} looks like a split, with class folders in it, but {other!r} stands beside it; "
                "move or rename that one (known are train, val, validation, test, and unlabelled for images to predict)"
            )


def _top_folder(images: list[str]) -> tuple[str, ...]:
    """The folder whose subfolders are the classes: below every single folder that only wraps the next one."""
    parents = {PurePosixPath(name).parent.parts for name in images}
    depth = 0
    while True:
        below = {parent[depth] for parent in parents if len(parent) > depth}
        wraps = len(below) == 1 and any(len(parent) > depth + 1 for parent in parents)
        if not wraps:
            return max((parent[:depth] for parent in parents), key=len)
        depth += 1


def _folder_below(name: str, top: tuple[str, ...]) -> str | None:
    """The first folder below `top` on the way to a file or folder, or None when there is none."""
    parts = PurePosixPath(name).parts
    folders = parts if name.endswith("/") else parts[:-1]
    return folders[len(top)] if len(folders) > len(top) and folders[: len(top)] == top else None
