"""The class of every file in an archive, read from its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from catdog.errors import CatdogError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".avif"}
)
_KAGGLE_NAME = re.compile(r"(?P<label>[A-Za-z][\w-]*)\.\d+\.\w+")
_SPLIT_NAMES = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "train_set", "test_set"}
)


@dataclass(frozen=True)
class Labelling:
    """What the names in an archive say.

    Attributes:
        classes: class names, sorted; the position is the class's number.
        labels: class name by file name, for the files that have one.
        unlabelled: reason by file name, for the files that have none.
    """

    classes: tuple[str, ...]
    labels: dict[str, str]
    unlabelled: dict[str, str]


def label_files(names: Iterable[str]) -> Labelling:
    """Finds the classes in an archive's member names.

    Two layouts are known: Kaggle's names (`train/cat.1001.jpg`), when most image names look like that, and
    one folder a class (`PetImages/Cat/0.jpg`), below any number of single top folders.

    Args:
        names: member names; a name that ends with `/` is a folder.

    Raises:
        CatdogError: fewer than two classes, a class without a file, or folders that are splits, not classes.
    """
    names = sorted(names)
    files = [name for name in names if not name.endswith("/")]
    visible = [name for name in files if not is_hidden(name)]
    images = [name for name in visible if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise CatdogError(f"the data set holds no image files among its {len(files)} files; check `dataset`")
    by_name = {name: match["label"] for name in visible if (match := _KAGGLE_NAME.fullmatch(PurePosixPath(name).name))}
    image_labels = [by_name[name] for name in images if name in by_name]
    # `Cat/img.1.jpg` and `Dog/img.2.jpg` look like Kaggle's names too, but the folders are what differs.
    one_folder = len({PurePosixPath(name).parent for name in images}) == 1
    if len(image_labels) > len(images) / 2 and (one_folder or len(set(image_labels)) > 1):
        labels, missing = by_name, "no class in its name"
        folders: set[str] = set()
    else:
        top = _top_folder(images)
        labels = {name: part for name in visible if (part := _folder_below(name, top)) is not None}
        missing = "outside any class folder"
        # A folder counts as a class when it holds a file or lies, empty, beside the class folders.
        folders = {part for name in names if (part := _folder_below(name, top)) and not is_hidden(name)}
    filled = Counter(labels[name] for name in images if name in labels)
    classes = tuple(sorted(filled))
    empty = sorted(folders - set(classes))
    if empty:
        raise CatdogError(f"class folder {empty[0]!r} holds no images; fill it or remove it")
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no class folder"
        raise CatdogError(
            f"the data set has {found}, but two or more are needed; give one folder a class, or names as cat.1.jpg"
        )
    if all(name.lower() in _SPLIT_NAMES for name in classes):
        raise CatdogError(
            f"the folders {', '.join(classes)} are splits, not classes; merge them into one folder a class, "
            "and the split stage will divide them"
        )
    unlabelled = {name: "hidden file" if is_hidden(name) else missing for name in files if name not in labels}
    return Labelling(classes, labels, unlabelled)


def is_hidden(name: str) -> bool:
    """Says whether a file belongs to an operating system or archiver and not to the data set."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


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
