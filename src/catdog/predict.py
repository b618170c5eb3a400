"""Classifies new pictures with a trained model: the `catdog predict` command, and the path that serving shares."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
import sys
import tarfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from catdog import paths
from catdog.archives import MemberError, open_archive, read_member
from catdog.errors import CatdogError
from catdog.files import write_text
from catdog.images import ImageError, Pixels, model_pixels
from catdog.inference import choose_engine, compile_forward
from catdog.model import class_probabilities, load_model, read_info
from catdog.names import IMAGE_SUFFIXES, is_hidden
from catdog.progress import progress
from catdog.runtime import prepare_keras

Layout = Literal["table", "csv", "jsonl"]

# On a CPU the engine runs several small batches at once, which is faster than one large batch.
_BATCH_SIZE = 8
# Pictures decoded ahead of the forward pass: enough to bridge one slow file, few enough for any memory.
_AHEAD = 4 * _BATCH_SIZE
# No picture takes as much, and a small archive can unpack to any size.
_MAX_MEMBER_BYTES = 1 << 30


class Classifier:
    """A trained model, ready for use: from a file's bytes to the probability of each class.

    Attributes:
        info: what the model file says about itself.
    """

    def __init__(self, path: Path, *, engine: Literal["auto", "openvino", "keras"] = "auto") -> None:
        """Loads a model file; raises CatdogError where it is no model of this pipeline or the engine cannot run."""
        model, self.info = load_model(path)
        self._forward = compile_forward(model, choose_engine(engine))

    def pixels(self, data: bytes) -> Pixels:
        """Turns a file's bytes into what the model sees, uint8 [size, size, 3]; raises ImageError."""
        info = self.info
        return model_pixels(data, size=info.image_size, mode=info.resize, quality=info.jpeg_quality)

    def probabilities(self, batches: Iterable[Pixels]) -> npt.NDArray[np.float32]:
        """Classifies batches of uint8 pixels [batch, size, size, 3].

        Returns:
            float32 [images, classes], 0..1, in the order of the images.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            return np.empty((0, len(self.info.class_names)), np.float32)
        return class_probabilities(self._forward(itertools.chain([first], batches)))


def most_probable(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Returns the number of the most probable class of each image, int64 [images], of [images, classes].

    It is what evaluation predicts with its default threshold; equal chances of two classes go to the second.
    """
    from catdog.evaluation import predict_classes

    return predict_classes(probabilities, threshold=0.5)


@dataclass(frozen=True)
class ImageFile:
    """A file to classify."""

    name: str  # as it is told to the user
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Predictions:
    """What became of each file.

    Attributes:
        names: of the files that were classified, in the order they were given.
        probabilities: float32 [names, classes], 0..1.
        unreadable: name and reason of the files that show no picture.
    """

    names: list[str]
    probabilities: npt.NDArray[np.float32]
    unreadable: list[tuple[str, str]]


def find_images(inputs: Sequence[Path], archives: contextlib.ExitStack) -> tuple[list[ImageFile], list[str]]:
    """Lists the images that a user points at, in the order given; those of a folder or archive sorted by name.

    A folder is searched to its bottom. In folders and archives hidden files are left out, and so is what has not
    the ending of an image; a file that is named itself is always taken for an image.

    Args:
        inputs: files, folders and zip archives.
        archives: closes the archives, which the files are read from.

    Returns:
        The files, and the names of those that were passed over for their ending.

    Raises:
        CatdogError: there is no such file, it cannot be read, or there is no image at all.
    """
    files: list[ImageFile] = []
    others: list[str] = []
    for path in inputs:
        if path.is_dir():
            found = [ImageFile(_readable(file), file.read_bytes) for file in _walk(path)]
        elif re.match(r"[a-z0-9]+:/", str(path)):
            raise CatdogError(f"{_readable(path)} is an address; download the file and give its path")
        elif not path.is_file():
            raise CatdogError(f"{_readable(path)} does not exist; give image files, folders or zip archives")
        elif _is_zip(path):
            found = [
                ImageFile(f"{_readable(path)}/{member.filename}", _reader(archive, member))
                for archive in [archives.enter_context(open_archive(path))]
                for member in sorted(archive.infolist(), key=lambda member: member.filename)
                if not member.is_dir() and not is_hidden(member.filename)
            ]
        elif tarfile.is_tarfile(path):
            raise CatdogError(f"{_readable(path)} is a tar archive; unpack it and give the folder, or give a zip")
        else:
            files.append(ImageFile(_readable(path), path.read_bytes))
            continue
        for file in found:
            if PurePosixPath(file.name).suffix.lower() in IMAGE_SUFFIXES:
                files.append(file)
            else:
                others.append(file.name)
    if not files:
        raise CatdogError(
            f"there are no images in {', '.join(map(_readable, inputs))}; give image files, or folders or zip archives "
            f"of files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files, others


def find_unlabelled(root: Path, archives: contextlib.ExitStack) -> list[ImageFile]:
    """Lists the images of the data set that have no label, as the split stage found them.

    Args:
        root: the repository's root.
        archives: closes the archive, which the files are read from.

    Raises:
        CatdogError: the pipeline has not run, the data set has no such images, or its files disagree.
    """
    listed, raw = root / paths.UNLABELLED, root / paths.RAW
    for path in (listed, raw):
        if not path.is_file():
            raise CatdogError(f"{path} does not exist; run `dvc repro` first, or give the paths of images")
    with listed.open(newline="", encoding="utf-8") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    if not names:
        raise CatdogError("the data set has no images without a label; give the paths of the images to classify")
    archive = archives.enter_context(open_archive(raw))
    members = {member.filename: member for member in archive.infolist()}
    for name in names:
        if name not in members:
            raise CatdogError(f"{paths.UNLABELLED} lists {name!r}, which {paths.RAW} does not hold; run `dvc repro`")
    return [ImageFile(name, _reader(archive, members[name])) for name in names]


def _walk(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, sorted; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise CatdogError(f"folder {error.filename} cannot be read: {error.strerror}; check its permissions")

    found: list[Path] = []
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:  # a link to a folder above would never end
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted(found)


def _is_zip(path: Path) -> bool:
    # Not zipfile.is_zipfile: it also takes a picture with an archive behind its end for a zip.
    with contextlib.suppress(OSError), path.open("rb") as file:
        return path.suffix.lower() == ".zip" or file.read(4) == b"PK\x03\x04"
    return False


def _reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.file_size > _MAX_MEMBER_BYTES:
            raise ImageError(f"{member.file_size:,} bytes are more than the limit of {_MAX_MEMBER_BYTES:,}")
        return read_member(archive, member)

    return read


def _readable(path: Path) -> str:
    """A path as text that any terminal or file can hold, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def classify(classifier: Classifier, files: Sequence[ImageFile]) -> Predictions:
    """Classifies files of any number: decodes in threads, ahead of the forward pass, and holds few of them at once.

    A file that cannot be read or shows no picture is told in `unreadable` and stops nothing.
    """
    names: list[str] = []
    unreadable: list[tuple[str, str]] = []

    def pictures() -> Iterator[Pixels]:
        decoded = _decode_ahead(files, classifier.pixels)
        for file, result in progress(decoded, "predict", len(files), "images"):
            if isinstance(result, str):
                unreadable.append((file.name, result))
            else:
                names.append(file.name)
                yield result

    def batches() -> Iterator[Pixels]:
        source = pictures()
        while batch := list(itertools.islice(source, _BATCH_SIZE)):
            yield np.stack(batch)

    probabilities = classifier.probabilities(batches())
    return Predictions(names, probabilities, unreadable)


def _decode_ahead(
    files: Iterable[ImageFile], pixels: Callable[[bytes], Pixels]
) -> Iterator[tuple[ImageFile, Pixels | str]]:
    """Yields each file, in order, with its pixels or the reason why it has none."""

    def decode(file: ImageFile) -> Pixels | str:
        try:
            return pixels(file.read())
        except (ImageError, MemberError) as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque[tuple[ImageFile, Future[Pixels | str]]] = deque()
        try:
            for file in files:
                waiting.append((file, pool.submit(decode, file)))
                if len(waiting) > _AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def format_predictions(
    predictions: Predictions, class_names: Sequence[str], layout: Layout, *, each_class: bool = False
) -> str:
    """Returns the predictions as text, one line an image: path, label, probability (of the label, 0..1).

    The label is the most probable class, whatever evaluate.threshold says for the report.

    Args:
        predictions: of the model.
        class_names: of the columns of the probabilities.
        layout: `table` for reading, `csv`, or `jsonl` (one JSON object a line).
        each_class: adds p_<class> for every class.
    """
    rows: list[dict[str, str | float]] = []
    labels = most_probable(predictions.probabilities)
    for name, probabilities, best in zip(predictions.names, predictions.probabilities, labels, strict=True):
        row: dict[str, str | float] = {"path": name, "label": class_names[best]}
        row["probability"] = _six_digits(probabilities[best])
        if each_class:
            row |= {f"p_{name}": _six_digits(p) for name, p in zip(class_names, probabilities, strict=True)}
        rows.append(row)
    columns = ["path", "label", "probability", *(f"p_{name}" for name in class_names if each_class)]
    if layout == "csv":
        return _csv(columns, ([row[column] for column in columns] for row in rows))
    if layout == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _table(columns, rows)


def _six_digits(probability: np.float32) -> float:
    return round(float(probability), 6)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, str | float]]) -> str:
    cells = [list(columns)]
    for row in rows:
        values = [row[column] for column in columns]
        cells.append([_printable(value) if isinstance(value, str) else f"{value:.4f}" for value in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = 2  # path and label stand to the left, numbers to the right
    return "".join(
        "  ".join(
            cell.ljust(width) if position < texts else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in cells
    )


def _printable(text: str) -> str:
    """Escapes what would steer a terminal or break a line: names in an archive are a stranger's."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def kaggle_ids(names: Iterable[str]) -> dict[str, int]:
    """Returns the number in each file name, by name: `test1/12.jpg` is 12.

    Raises:
        CatdogError: a name is no number, or two files have the same.
    """
    ids: dict[str, int] = {}
    owners: dict[int, str] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        if not re.fullmatch(r"[0-9]+", stem):
            raise CatdogError(f"a submission needs files named by their id, as 12.jpg, but one is {_printable(name)}")
        number = int(stem)
        if number in owners:
            raise CatdogError(
                f"a submission has one row an id, but {_printable(owners[number])} and {_printable(name)} "
                f"both are {number}; leave one out"
            )
        owners[number] = name
        ids[name] = number
    return ids


def format_submission(predictions: Predictions, ids: Mapping[str, int], *, probabilities: bool = False) -> str:
    """Returns a submission to Kaggle's dogs-vs-cats as CSV: `id,label`, one row an image, sorted by id.

    Args:
        predictions: of a model with two classes.
        ids: by name, from `kaggle_ids`.
        probabilities: label is the probability of the second class (of the Redux competition), else it is 1
            where that is the most probable class (dog, of cat and dog) and 0 elsewhere. Nothing is clipped:
            Kaggle's log loss clips at 1e-15, so that a wrong answer of 0 or 1 costs 34.5.
    """
    if probabilities:
        labels = [f"{probability:.6f}" for probability in predictions.probabilities[:, 1]]
    else:
        labels = [str(number) for number in most_probable(predictions.probabilities)]
    rows = zip((ids[name] for name in predictions.names), labels, strict=True)
    return _csv(["id", "label"], sorted(rows))


def run_predict(
    inputs: Sequence[Path],
    *,
    model: Path | None = None,
    submission: Path | None = None,
    probabilities: bool = False,
    layout: Layout | None = None,
) -> int:
    """Runs the command: classifies images and prints the predictions, or writes a submission.

    Args:
        inputs: files, folders and zip archives; none for the unlabelled images of the data set.
        model: the model file; None for the one that the pipeline trained.
        submission: the CSV file to write in place of printing. It is not written when a file is unreadable:
            Kaggle wants a row for each.
        probabilities: give the probability of each class; in a submission, of the second.
        layout: of what is printed; None for a table.

    Returns:
        The exit code: 0, or 1 where a file was unreadable; each is listed on standard error.

    Raises:
        CatdogError: there are no images or no model, or a submission cannot be made of them.
    """
    if submission and layout:
        raise CatdogError(f"--format {layout} is for predictions that are printed; leave it out with --submission")
    if submission and submission.is_dir():
        raise CatdogError(f"--submission {_readable(submission)} is a folder; give the name of the file to write")
    if model is None:
        model = paths.repository_root() / paths.MODEL
    class_names = read_info(model).class_names
    if submission and len(class_names) != 2:
        raise CatdogError(
            f"a submission tells two classes apart, but {_readable(model)} knows {len(class_names)}: "
            f"{', '.join(class_names)}; leave --submission out"
        )
    with contextlib.ExitStack() as archives:
        if inputs:
            files, others = find_images(inputs, archives)
        else:
            files, others = find_unlabelled(paths.repository_root(), archives), []
        ids = kaggle_ids(file.name for file in files) if submission else {}
        prepare_keras(seed=0)  # nothing is drawn
        predictions = classify(Classifier(model), files)
    if others:
        _tell(f"passed over {_count(len(others), 'file')} without the ending of an image, first {others[0]}")
    if submission is None:
        print(format_predictions(predictions, class_names, layout or "table", each_class=probabilities), end="")
    elif not predictions.unreadable:
        _write_submission(submission, format_submission(predictions, ids, probabilities=probabilities))
        called = np.bincount(most_probable(predictions.probabilities), minlength=2)
        print(f"{_readable(submission)}: {called[1]:,} {class_names[1]} (1), {called[0]:,} {class_names[0]} (0)")
    if not predictions.unreadable:
        return 0
    _tell(f"{len(predictions.unreadable):,} of {_count(len(files), 'file')} cannot be read:")
    for name, reason in predictions.unreadable:
        print(f"  {_printable(name)}: {reason}", file=sys.stderr)
    if submission:
        _tell(f"{_readable(submission)} is not written, as Kaggle wants a row for each; mend or leave out those files")
    return 1


def _write_submission(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise CatdogError(f"{_readable(path)} cannot be written: {error.strerror}; give another place") from None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _tell(message: str) -> None:
    print(f"catdog: {message}", file=sys.stderr)
