"""What the page of `catdog app` shows: answers with their evidence, examples, and many pictures sorted.

Nothing here knows of Streamlit: `app_page` puts it on the screen, and `app_command` starts the server.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import numpy.typing as npt

from catdog import paths
from catdog.archives import MemberError, open_archive, read_member
from catdog.errors import CatdogError
from catdog.files import read_manifest
from catdog.gradcam import Explain, Heat, build_gradcam, overlay
from catdog.images import ImageError, ResizeMode, decode, encode_jpeg, resize
from catdog.inputs import ImageFile, UnreadableError, find_images
from catdog.pages import data_uri, load_template, printable
from catdog.plots import shrink
from catdog.predict import Classifier, Predictions, classify, format_predictions
from catdog.runtime import prepare_keras

BARS = 5
"""Up to so many classes are shown at once; of more, the most probable ones."""
EXAMPLES = 8
PICTURE_SIDE, THUMBNAIL_SIDE = 800, 240
"""Pixels: the most that the longer side of a picture has, and the side of the square that stands for it among many."""
UNREADABLE = (ImageError, MemberError, UnreadableError, OSError)
"""What reading and decoding a file may raise; the message is the reason."""
_QUALITY = 85


@dataclass(frozen=True)
class Settings:
    """What the page is told when it starts; texts and numbers only, so that they fit on a command line."""

    model: str  # path of the model file
    model_name: str  # what people call it
    accuracy: str  # on the test split, in words; empty where it is not known
    root: str  # of the repository; empty outside of one
    examples: str  # folder of examples; empty for those of the data set
    folder: str  # pictures to sort: a folder, archive or file; empty for none


@dataclass(frozen=True)
class Answer:
    """What the model says of one picture."""

    class_names: tuple[str, ...]
    probabilities: npt.NDArray[np.float32]  # [classes], 0..1
    number: int  # of the class that it is called

    @property
    def label(self) -> str:
        """The class that the picture is called."""
        return self.class_names[self.number]

    @property
    def probability(self) -> float:
        """That of the label, 0..1. With a threshold of its own a model may call the less probable of two classes."""
        return float(self.probabilities[self.number])

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """Every class with its probability, 0..1, the most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")
        return [(self.class_names[number], float(self.probabilities[number])) for number in order]


@dataclass(frozen=True)
class Assistant:
    """A model that is ready to answer and to explain."""

    classifier: Classifier
    explain: Explain | None  # None where the Keras backend gives no gradients


@dataclass(frozen=True)
class Look:
    """A picture as the page shows it."""

    answer: Answer
    picture: bytes  # JPEG
    evidence: bytes | None  # JPEG: the same with the heat map of the answer


@dataclass(frozen=True)
class Example:
    """A picture to try the model on."""

    name: str
    label: str  # its true class; empty where it is not known
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Judged:
    """One of many pictures."""

    key: str  # what tells files of one name apart
    name: str
    answer: Answer


def classify_bytes(classifier: Classifier, data: bytes) -> Answer:
    """Classifies one file, as `catdog predict` does.

    Args:
        classifier: the model.
        data: the file's bytes.

    Raises:
        ImageError: they show no picture; the message is the reason.
    """
    probabilities = classifier.probabilities([classifier.pixels(data)[np.newaxis]])
    return Answer(classifier.info.class_names, probabilities[0], int(classifier.labels(probabilities)[0]))


def load_assistant(path: Path) -> Assistant:
    """Loads a model file to answer and to explain.

    Raises:
        CatdogError: it is no model of this pipeline.
    """
    prepare_keras(seed=0)  # nothing is drawn
    classifier = Classifier(path)
    explain = None
    with contextlib.suppress(CatdogError):
        explain = build_gradcam(classifier.model, classifier.info)
    return Assistant(classifier, explain)


def look_at(assistant: Assistant, data: bytes) -> Look:
    """Classifies one file and draws the evidence for the answer over the picture; raises ImageError."""
    classifier = assistant.classifier
    answer = classify_bytes(classifier, data)
    picture = shrink(decode(data), PICTURE_SIDE)
    evidence = None
    if assistant.explain is not None:
        heat = assistant.explain(classifier.pixels(data)[np.newaxis], np.array([answer.number]))[0]
        height, width = picture.shape[:2]
        evidence = encode_jpeg(overlay(picture, place_heat(heat, height, width, classifier.info.resize)), _QUALITY)
    return Look(answer, encode_jpeg(picture, _QUALITY), evidence)


def place_heat(heat: Heat, height: int, width: int, mode: ResizeMode) -> Heat:
    """Brings a heat map from the square that a model sees back to the shape of the picture.

    Args:
        heat: float32 [size, size], 0..1.
        height: pixels of the picture.
        width: pixels of the picture.
        mode: how the picture became the square, as in `images.resize`.

    Returns:
        float32 [height, width], 0..1; 0 where the model saw nothing of the picture.
    """

    def fit(part: Heat, height: int, width: int) -> Heat:
        return np.asarray(cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)

    if mode == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        placed = np.zeros((height, width), np.float32)
        placed[top : top + side, left : left + side] = fit(heat, side, side)
        return placed
    if mode == "pad":
        size = len(heat)
        scale = size / max(height, width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (size - inner_height) // 2, (size - inner_width) // 2
        heat = heat[top : top + inner_height, left : left + inner_width]
    return fit(heat, height, width)


def find_examples(root: Path | None, folder: Path | None, archives: contextlib.ExitStack) -> list[Example]:
    """Finds pictures to try the model on.

    Args:
        root: of the repository, whose test split they come from: the first of each class, then the second of each,
            and so on. Of a data set with more classes than examples, classes from all over the alphabet.
        folder: take the first pictures of this folder (or archive) instead.
        archives: closes the archive, which they are read from.

    Returns:
        At most EXAMPLES; none where neither a folder is given nor the pipeline has run.

    Raises:
        CatdogError: the folder has no pictures, or the data set's files disagree.
    """
    if folder is not None:
        return [Example(file.name, "", file.read) for file in find_pictures(folder, archives)[:EXAMPLES]]
    if root is None or not ((root / paths.MANIFEST).is_file() and (root / paths.RAW).is_file()):
        return []
    manifest = read_manifest(root / paths.MANIFEST)
    test = manifest[manifest["split"] == "test"].sort_values("path")
    classes = sorted(test["label"].unique())
    spread = np.linspace(0, len(classes) - 1, min(len(classes), EXAMPLES)).round().astype(int)
    test = test[test["label"].isin([classes[number] for number in spread])]
    test = test.assign(turn=test.groupby("label").cumcount()).sort_values(["turn", "label"]).head(EXAMPLES)

    archive = archives.enter_context(open_archive(root / paths.RAW))
    members = set(archive.namelist())
    for path in test["path"]:
        if path not in members:
            raise CatdogError(f"{paths.MANIFEST} lists {path!r}, which {paths.RAW} does not hold; run `dvc repro`")
    return [
        Example(PurePosixPath(path).name, label, partial(read_member, archive, path))
        for path, label in zip(test["path"], test["label"], strict=True)
    ]


def find_pictures(folder: Path, archives: contextlib.ExitStack) -> list[ImageFile]:
    """Lists the pictures of a folder or archive, or a single one, as `predict.find_images` does.

    Their names begin below the folder: visitors of the page need not know where on the machine it lies.
    """
    files, _ = find_images([folder], archives)
    return [
        ImageFile(file.name.removeprefix(f"{folder}/").removeprefix(f"{folder.parent}/"), file.read) for file in files
    ]


def judge(classifier: Classifier, files: Mapping[str, ImageFile]) -> dict[str, Answer | str]:
    """Classifies many files.

    Args:
        classifier: the model.
        files: by a key that is each one's own.

    Returns:
        By key, what the model says of each picture, or the reason why a file shows none.
    """
    found = classify(classifier, [ImageFile(key, file.read) for key, file in files.items()])
    answers: dict[str, Answer | str] = dict(found.unreadable)
    for key, probabilities, number in zip(found.names, found.probabilities, found.labels, strict=True):
        answers[key] = Answer(classifier.info.class_names, probabilities, int(number))
    return answers


def in_order(judged: Sequence[Judged], *, least_certain_first: bool) -> list[Judged]:
    """Sorts pictures by class, each class with its most certain first; or all of them, the least certain first."""
    if least_certain_first:
        return sorted(judged, key=lambda one: one.answer.probability)
    return sorted(judged, key=lambda one: (one.answer.number, -one.answer.probability))


def count_classes(judged: Sequence[Judged]) -> dict[str, int]:
    """Returns how many pictures each class has, in the order of the classes; those without any are left out."""
    counts = Counter(one.answer.number for one in judged)
    names = {one.answer.number: one.answer.label for one in judged}
    return {names[number]: counts[number] for number in sorted(counts)}


def format_csv(judged: Sequence[Judged]) -> str:
    """Returns a table of the pictures, in their order: path, label, probability and p_<class> for every class."""
    if not judged:
        return ""
    probabilities = np.stack([one.answer.probabilities for one in judged])
    labels = np.array([one.answer.number for one in judged])
    predictions = Predictions([one.name for one in judged], probabilities, labels, [])
    return format_predictions(predictions, judged[0].answer.class_names, "csv", each_class=True)


def thumbnail(data: bytes) -> bytes:
    """Returns a JPEG of the centre of a file's picture, THUMBNAIL_SIDE pixels a side; raises ImageError."""
    return encode_jpeg(resize(decode(data), THUMBNAIL_SIDE, "crop"), _QUALITY)


def percent(probability: float) -> str:
    """Returns a probability, 0..1, in words that claim no certainty which rounding made: `> 99.9 %`, not `100.0 %`."""
    if 0 < probability < 0.001:
        return "< 0.1 %"
    if 0.999 < probability < 1:
        return "> 99.9 %"
    return f"{100 * probability:.1f} %"


def plain(text: str) -> str:
    """Escapes what Markdown would take for more than text: names of files and classes are a stranger's."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(text))


def bars_html(rows: Sequence[tuple[str, float]], label: str) -> str:
    """Draws probabilities as bars.

    Args:
        rows: class and probability, 0..1.
        label: the class that is emphasised.
    """
    bars = [(name, percent(value), 100 * value, name == label) for name, value in rows]
    return load_template("app_bars.html.jinja").render(bars=bars)


def grid_html(judged: Sequence[Judged], thumbnails: Mapping[str, bytes], *, headings: bool) -> str:
    """Draws pictures with their answers.

    Args:
        judged: in their order.
        thumbnails: JPEGs by the pictures' keys.
        headings: begin a new row, with the class above it, wherever the class changes.
    """
    groups = groupby(judged, key=lambda one: one.answer.label if headings else "")
    return load_template("app_grid.html.jinja").render(
        groups=[
            (
                heading,
                [
                    (one.name, one.answer.label, percent(one.answer.probability), data_uri(thumbnails[one.key], "jpeg"))
                    for one in members
                ],
            )
            for heading, members in groups
        ]
    )
