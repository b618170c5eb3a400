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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from catdog import paths
from catdog.archives import MemberError
from catdog.errors import CatdogError
from catdog.files import readable, write_text, writing_where_asked, written_aside
from catdog.gradcam import build_gradcam, overlay
from catdog.images import MAX_PIXELS, ImageError, Pixels, model_pixels
from catdog.inference import choose_engine, compile_forward
from catdog.inputs import ImageFile, UnreadableError, find_images, find_unlabelled
from catdog.model import class_probabilities, load_model, predict_classes, read_info
from catdog.model_reference import find_model
from catdog.parallel import map_in_threads, processors
from catdog.progress import progress
from catdog.runtime import prepare_keras

Layout = Literal["table", "csv", "jsonl"]

_BATCH_SIZE = 8
# Pictures decoded ahead of the forward pass: enough to bridge one slow file, few enough for any memory.
_AHEAD = 32
# Pictures classified and held in memory before their heat maps are drawn.
_EXPLAINED_TOGETHER = 64


class Classifier:
    """A trained model, ready for use: from a file's bytes to the probability of each class.

    Attributes:
        info: what the model file says about itself.
        model: the Keras model.
        batch_size: images a batch.
    """

    def __init__(self, path: Path, *, engine: Literal["auto", "openvino", "keras"] = "auto") -> None:
        """Loads a model file; raises CatdogError where it is no model of this pipeline or the engine cannot run."""
        self.model, self.info = load_model(path)
        self.batch_size = _BATCH_SIZE
        self._forward = compile_forward(self.model, choose_engine(engine), batch_size=self.batch_size)

    def pixels(self, data: bytes, *, max_pixels: float = MAX_PIXELS) -> Pixels:
        """Turns a file's bytes into what the model sees, uint8 [size, size, 3]; raises ImageError."""
        info = self.info
        return model_pixels(
            data, size=info.image_size, mode=info.resize, quality=info.jpeg_quality, max_pixels=max_pixels
        )

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

    def labels(self, probabilities: npt.NDArray[np.float32], threshold: float | None = None) -> npt.NDArray[np.int64]:
        """Returns the number of each image's class, int64 [images].

        Args:
            probabilities: [images, classes].
            threshold: for two classes, the probability from which the second is predicted; None: the model's own.
        """
        return predict_classes(probabilities, self.info.threshold if threshold is None else threshold)


def most_probable(probabilities: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Returns the numbers of each image's most probable classes, the most probable first, int64 [images, count]."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]


@dataclass(frozen=True)
class Predictions:
    """What became of each file.

    Attributes:
        names: of the files that were classified, in the order they were given.
        probabilities: float32 [names, classes], 0..1.
        labels: number of the class, int64 [names].
        unreadable: name and reason of the files that show no picture.
        heat_maps: file with the heat map of each of `names`; empty where none were drawn.
    """

    names: list[str]
    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    unreadable: list[tuple[str, str]]
    heat_maps: list[Path] = field(default_factory=list)


def classify(
    classifier: Classifier,
    files: Sequence[ImageFile],
    *,
    threshold: float | None = None,
    heat_maps: Sequence[Path] = (),
) -> Predictions:
    """Classifies files of any number: decodes in threads, ahead of the forward pass, and holds few of them at once.

    A file that cannot be read or shows no picture is told in `unreadable` and stops nothing.

    Args:
        classifier: the model.
        files: to classify.
        threshold: as in `Classifier.labels`.
        heat_maps: where to write the Grad-CAM heat map of each file for the class it is called, as PNG; () for none.
    """
    shown: list[int] = []  # positions of the files that were classified
    unreadable: list[tuple[str, str]] = []

    def pictures() -> Iterator[Pixels]:
        decoded = _decode_ahead(files, classifier.pixels)
        for position, result in progress(enumerate(decoded), "predict", len(files), "images"):
            if isinstance(result, str):
                unreadable.append((files[position].name, result))
            else:
                shown.append(position)
                yield result

    if heat_maps:
        explain = build_gradcam(classifier.model, classifier.info)
        parts = [classifier.probabilities([])]
        source = pictures()
        while some := list(itertools.islice(source, _EXPLAINED_TOGETHER)):
            parts.append(classifier.probabilities(_stacked(some, classifier.batch_size)))
            heat = explain(np.stack(some), classifier.labels(parts[-1], threshold))
            for position, pixels, its_heat in zip(shown[-len(some) :], some, heat, strict=True):
                _write_png(overlay(pixels, its_heat), heat_maps[position])
        probabilities = np.concatenate(parts)
    else:
        probabilities = classifier.probabilities(_stacked(pictures(), classifier.batch_size))
    return Predictions(
        [files[position].name for position in shown],
        probabilities,
        classifier.labels(probabilities, threshold),
        unreadable,
        [heat_maps[position] for position in shown] if heat_maps else [],
    )


def _stacked(pictures: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    pictures = iter(pictures)
    while batch := list(itertools.islice(pictures, size)):
        yield np.stack(batch)


def _write_png(pixels: Pixels, path: Path) -> None:
    from PIL import Image

    with writing_where_asked(path), written_aside(path) as aside:
        Image.fromarray(pixels).save(aside, "PNG")


def name_heat_maps(names: Iterable[str], folder: Path) -> list[Path]:
    """Returns a PNG file for the heat map of each picture, named as the picture, with a number where that is taken.

    Raises:
        CatdogError: one of them is there already.
    """
    found: dict[str, Path] = {}  # by a name that is the same on systems that take A for a
    for name in names:
        stem = re.sub(r"[^\w.-]", "_", PurePosixPath(name).stem)[:100].lstrip(".") or "picture"
        number, unique = 1, stem
        while unique.casefold() in found:
            number += 1
            unique = f"{stem}-{number}"
        found[unique.casefold()] = folder / f"{unique}.png"
    for path in found.values():
        if path.exists():
            raise CatdogError(f"--gradcam: {readable(path)} exists already; remove it or give another folder")
    return list(found.values())


def _decode_ahead(files: Iterable[ImageFile], pixels: Callable[[bytes], Pixels]) -> Iterator[Pixels | str]:
    """Returns each file's pixels, in the order of the files, or the reason why it has none."""

    def decode(file: ImageFile) -> Pixels | str:
        try:
            return pixels(file.read())
        except (ImageError, MemberError, UnreadableError) as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    return map_in_threads(decode, files, workers=processors(), ahead=_AHEAD)


def format_predictions(
    predictions: Predictions,
    class_names: Sequence[str],
    layout: Layout,
    *,
    top: int = 0,
    each_class: bool = False,
) -> str:
    """Returns the predictions as text, one line an image: path, label, probability (of the label, 0..1).

    Where heat maps were drawn, `gradcam` names their files.

    Args:
        predictions: of the model.
        class_names: of the columns of the probabilities.
        layout: `table` for reading, `csv`, or `jsonl` (one JSON object a line).
        top: adds label_1, probability_1 and so on for so many of the most probable classes.
        each_class: adds p_<class> for every class.
    """
    columns = ["path", "label", "probability"]
    columns += [f"{kind}_{number}" for number in range(1, top + 1) for kind in ("label", "probability")]
    columns += [f"p_{name}" for name in class_names if each_class]
    columns += ["gradcam"] if predictions.heat_maps else []
    best = most_probable(predictions.probabilities, top)
    rows: list[dict[str, str | float]] = []
    for position, (name, label) in enumerate(zip(predictions.names, predictions.labels, strict=True)):
        probabilities = [_six_digits(value) for value in predictions.probabilities[position]]
        values = [name, class_names[label], probabilities[label]]
        for number in best[position]:
            values += [class_names[number], probabilities[number]]
        values += probabilities if each_class else []
        values += [readable(predictions.heat_maps[position])] if predictions.heat_maps else []
        rows.append(dict(zip(columns, values, strict=True)))
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
    # Texts stand to the left, numbers to the right.
    numbers = [column.startswith(("probability", "p_")) for column in columns]
    return "".join(
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numbers, strict=True)
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
        probabilities: label is the probability of the second class (of the Redux competition), else 1 for
            the images called it (dog, of cat and dog) and 0 for the others. Nothing is clipped:
            Kaggle's log loss clips at 1e-15, so that a wrong answer of 0 or 1 costs 34.5.
    """
    if probabilities:
        labels = [f"{probability:.6f}" for probability in predictions.probabilities[:, 1]]
    else:
        labels = [str(number) for number in predictions.labels]
    rows = zip((ids[name] for name in predictions.names), labels, strict=True)
    return _csv(["id", "label"], sorted(rows))


def run_predict(
    inputs: Sequence[str | Path],
    *,
    model: str | Path | None = None,
    submission: Path | None = None,
    probabilities: bool = False,
    layout: Layout | None = None,
    top: int | None = None,
    threshold: float | None = None,
    gradcam: Path | None = None,
) -> int:
    """Runs the command: classifies images and prints the predictions, or writes a submission.

    Args:
        inputs: as in `inputs.find_images`; none for the unlabelled images of the data set.
        model: as in `model_reference.find_model`.
        submission: the CSV file to write in place of printing. It is not written when a file is unreadable:
            Kaggle wants a row for each.
        probabilities: give the probability of each class; in a submission, of the second.
        layout: of what is printed; None for a table.
        top: give so many of the most probable classes as well.
        threshold: as in `Classifier.labels`.
        gradcam: the folder to write heat maps to.

    Returns:
        The exit code: 0, or 1 where a file was unreadable; each is listed on standard error.

    Raises:
        CatdogError: there are no images or no model, an option does not suit the model, or something cannot be written.
    """
    if submission:
        _require_no_print_options(layout, top)
        if submission.is_dir():
            raise CatdogError(f"--submission {readable(submission)} is a folder; give the name of the file to write")
    with contextlib.ExitStack() as stack:
        path = find_model(None if model is None else os.fspath(model), stack)
        class_names = read_info(path).class_names
        _require_suitable_model(readable(model or path), class_names, submission, top, threshold)
        if inputs:
            files, others = find_images(inputs, stack)
        else:
            files, others = find_unlabelled(paths.repository_root(), stack), []
        ids = kaggle_ids(file.name for file in files) if submission else {}
        heat_maps = name_heat_maps((file.name for file in files), gradcam) if gradcam else []
        if gradcam:
            with writing_where_asked(gradcam):
                gradcam.mkdir(parents=True, exist_ok=True)
        prepare_keras(seed=0)  # nothing is drawn
        predictions = classify(Classifier(path), files, threshold=threshold, heat_maps=heat_maps)
    if others:
        _tell(
            f"passed over {_count(len(others), 'file')} without the ending of an image, first {_printable(others[0])}"
        )
    if submission is None:
        text = format_predictions(predictions, class_names, layout or "table", top=top or 0, each_class=probabilities)
        print(text, end="")
    elif not predictions.unreadable:
        with writing_where_asked(submission):
            write_text(submission, format_submission(predictions, ids, probabilities=probabilities))
        called = np.bincount(predictions.labels, minlength=2)
        print(f"{readable(submission)}: {called[1]:,} {class_names[1]} (1), {called[0]:,} {class_names[0]} (0)")
    if not predictions.unreadable:
        return 0
    _tell(f"{len(predictions.unreadable):,} of {_count(len(files), 'file')} cannot be read:")
    for name, reason in predictions.unreadable:
        print(f"  {_printable(name)}: {reason}", file=sys.stderr)
    if submission:
        _tell(f"{readable(submission)} is not written, as Kaggle wants a row for each; mend or leave out those files")
    return 1


def _require_no_print_options(layout: Layout | None, top: int | None) -> None:
    for option in [f"--format {layout}"] * bool(layout) + [f"--top {top}"] * bool(top):
        raise CatdogError(f"{option} is for predictions that are printed; leave it out with --submission")


def _require_suitable_model(
    model: str, class_names: Sequence[str], submission: Path | None, top: int | None, threshold: float | None
) -> None:
    count = len(class_names)
    known = f"{model} knows {count}: {', '.join(class_names[:5])}{', ...' if count > 5 else ''}"
    if submission and count != 2:
        raise CatdogError(f"a submission tells two classes apart, but {known}; leave --submission out")
    if threshold is not None and count != 2:
        raise CatdogError(f"--threshold tells two classes apart, but {known}; leave it out")
    if top and top > count:
        raise CatdogError(f"--top {top} asks for more classes than there are: {known}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _tell(message: str) -> None:
    print(f"catdog: {message}", file=sys.stderr)
