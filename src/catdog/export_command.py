"""`catdog export`: writes a model in the format of another runtime, checked against the Keras model."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from catdog import paths
from catdog.corruptions import collect_pictures
from catdog.errors import CatdogError
from catdog.export import NETWORK, Format, Precision, describe, require_format, write_export
from catdog.export_check import ALLOWED, Check, check_export, format_check
from catdog.export_runtimes import open_export, runtime_version
from catdog.files import read_json, sha256_of, write_json, writing_where_asked
from catdog.images import Pixels
from catdog.inference import compile_forward
from catdog.model import ModelInfo, class_probabilities, load_model, read_info
from catdog.model_reference import find_model
from catdog.records import RecordReader, read_labels, shard_paths, verify_shards
from catdog.runtime import device_name, prepare_keras

if TYPE_CHECKING:
    import keras

CALIBRATION_IMAGES = 300
"""Training images that give the ranges of int8, at most: as many as NNCF takes by default."""

_SEED = 0
_BATCH_SIZE = 8
# By what a folder is known to be an export, which --force may replace.
_MARKS = ("saved_model.pb", NETWORK)


def run_export(
    format_: Format,
    precision: Precision,
    *,
    model: str | None = None,
    output: Path | None = None,
    force: bool = False,
    check: bool = True,
    max_disagreement: float | None = None,
) -> int:
    """Runs the command: writes the export and, beside it, what was found about it, as JSON.

    Args:
        format_: of the export.
        precision: of its weights and, with int8, of what it computes.
        model: as in `model_reference.find_model`.
        output: the file or folder to write; None for one in models/export.
        force: replace an export that is there.
        check: compare it with the Keras model on the test split.
        max_disagreement: share of the test images to which it may give another label; None for that of ALLOWED.

    Returns:
        The exit code: 0, or 1 where the export gives too many other labels; nothing is written then.

    Raises:
        CatdogError: the format has no such precision, something is not installed, there is no model or no data for it,
            or the output is there or cannot be written.
    """
    require_format(format_, precision)
    target = output or _default_target(model, format_, precision)
    _require_free(target, format_, force)
    with contextlib.ExitStack() as stack:
        path = find_model(model, stack)
        info = read_info(path)
        data = paths.repository_root() / paths.TFRECORDS if check or precision == "int8" else None
        if data is not None:
            _require_data_of(info, data, check, precision)
        _prepare()
        loaded, _ = load_model(path)
        pictures = _calibration_pictures(data) if data is not None and precision == "int8" else None
        description = describe(
            info,
            precision,
            model_sha256=sha256_of(path),
            calibration_images=0 if pictures is None else len(pictures),
        )
        with _written_aside(target) as aside:
            with writing_where_asked(target):
                write_export(loaded, description, aside, format_, precision, calibration=pictures)
            facts = {
                "export": target.name,
                "format": format_,
                "runtime": runtime_version(format_),
                "bytes": _size(aside),
                "model_bytes": path.stat().st_size,
                **description,
            }
            found = None
            if check and data is not None:
                allowed = ALLOWED[precision] if max_disagreement is None else max_disagreement
                found = _check(loaded, info, aside, format_, data, allowed)
                name = f"{format_} {precision} ({facts['runtime']})"
                print(
                    format_check(found, export=name, size=facts["bytes"], model_size=facts["model_bytes"]),
                    end="",
                    flush=True,
                )
                if not found.passed:
                    _tell_failure(found, target)
                    return 1
            with writing_where_asked(target):
                _move(aside, target)
                write_json(_report_of(target), facts | _findings(found))
    print(f"{target}: {facts['bytes'] / 1e6:.1f} MB{'' if check else ', not checked'}; {_report_of(target)} says more")
    return 0


def _default_target(model: str | None, format_: Format, precision: Precision) -> Path:
    name = "model" if model is None else Path(model).stem if Path(model).is_file() else model
    name = re.sub(r"[^\w.]+", "-", name).strip("-.") or "model"
    return paths.repository_root() / paths.EXPORTS / f"{name}-{precision}.{format_}"


def _report_of(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _require_free(target: Path, format_: Format, force: bool) -> None:
    is_folder = format_ in ("saved_model", "openvino")
    if target.is_dir() and not (is_folder and any((target / mark).exists() for mark in _MARKS)):
        raise CatdogError(f"-o {target} is a folder; name what is to be written, e.g. {target / f'model.{format_}'}")
    if target.is_file() and is_folder:
        raise CatdogError(f"-o {target} is a file, and {format_} is written as a folder; give another name")
    if target.exists() and not force:
        raise CatdogError(f"{target} exists already; --force replaces it, -o names another place")
    report = _report_of(target)
    if report.is_dir():
        raise CatdogError(f"{report}, where the report of the export goes, is a folder; -o names another place")
    if report.exists() and not force:
        raise CatdogError(
            f"{report}, where the report of the export goes, exists already; "
            "--force replaces it, -o names another place"
        )


def _require_data_of(info: ModelInfo, data: Path, check: bool, precision: Precision) -> None:
    """Stops where the stored pictures are missing or are not those that the model takes."""
    need = "int8 needs training images" if precision == "int8" else "the check needs the test images"
    without = "" if precision == "int8" else ", or --no-check exports without it"
    report = data / paths.PREPROCESS_REPORT.name
    if not report.exists():
        raise CatdogError(f"{need}, but {data} is not there; `dvc repro preprocess` or `dvc pull` brings it{without}")
    stored = read_json(report)
    for key, ours in (
        ("classes", list(info.class_names)),
        ("image_size", info.image_size),
        ("resize", info.resize),
        ("jpeg_quality", info.jpeg_quality),
    ):
        if stored[key] != ours:
            raise CatdogError(
                f"{need}, but those in {data} have {key} = {stored[key]} and the model takes {ours}; bring the data of "
                f"that model (`git checkout` its commit, `dvc checkout`){without}"
            )
    verify_shards(data, ["test"] * check + ["train"] * (precision == "int8"))


def _prepare() -> None:
    # Exports run on the CPU here, so the Keras model does as well: a GPU would round in another way.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    prepare_keras(_SEED)
    import keras

    if keras.backend.backend() != "tensorflow":
        raise CatdogError(
            f"exports are made through TensorFlow, but the Keras backend is {keras.backend.backend()}; "
            "set KERAS_BACKEND=tensorflow for this command"
        )


def _calibration_pictures(data: Path) -> Pixels:
    """Takes as many training images of each class, uint8 [images, size, size, 3]."""
    shards = shard_paths(data, "train")
    chosen = balanced_sample(read_labels(shards), CALIBRATION_IMAGES, _SEED)
    return collect_pictures(RecordReader(shards, _BATCH_SIZE), chosen)


def balanced_sample(labels: npt.NDArray[np.int64], limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Chooses images so that every class has as many, or all of its own where those are fewer.

    Args:
        labels: class numbers, int64 [images].
        limit: how many at most.
        seed: what the choice is drawn from.

    Returns:
        Their positions, int64 [chosen], ascending.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels), np.int64)  # of an image among those of its class, in drawn order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = np.arange(len(members))
    return np.sort(order[np.argsort(place[order], kind="stable")][:limit]).astype(np.int64)


def _check(model: keras.Model, info: ModelInfo, export: Path, format_: Format, data: Path, allowed: float) -> Check:
    forward = compile_forward(model, "keras", batch_size=_BATCH_SIZE)
    shards = shard_paths(data, "test")
    return check_export(
        lambda pictures: class_probabilities(forward(pictures)),
        open_export(export, format_),
        RecordReader(shards, _BATCH_SIZE),
        read_labels(shards),
        size=info.image_size,
        threshold=info.threshold,
        allowed=allowed,
    )


def _findings(check: Check | None) -> dict[str, Any]:
    return {"check": None if check is None else check.report() | {"split": "test", "device": device_name()}}


def _tell_failure(check: Check, target: Path) -> None:
    agreement = check.agreement
    print(
        f"catdog: {target.name} gives {agreement.other_labels:,} of {agreement.images:,} test images another label "
        f"than the Keras model, more than the {check.allowed:.2%} allowed, and is not written; another precision may "
        "do better, --max-disagreement allows more",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """Yields a path beside the target, for a file or a folder, that is gone after the block where it was not moved."""
    with contextlib.ExitStack() as stack:
        with writing_where_asked(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent))
        yield Path(folder, target.name)


def _move(made: Path, target: Path) -> None:
    """Moves an export to its place; what is there goes where the block of `_written_aside` ends."""
    if target.exists():
        target.rename(made.with_name("former"))
    made.rename(target)


def _size(export: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [export, *export.rglob("*")] if file.is_file())
