"""A worker of the preprocess stage: from rows of the manifest to TFRecord files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from catdog.archives import open_archive
from catdog.config import Params
from catdog.records import EncodeRecord, Shard, WrittenShard, encode_record, write_shard
from catdog.runtime import prepare_keras


def open_encoder(raw: Path, params: Params, classes: Sequence[str]) -> EncodeRecord:
    """Opens the raw archive, for as long as the process lives; returns what makes a record of a row.

    Args:
        raw: the archive.
        params: of the run.
        classes: class names by number.

    Raises:
        CatdogError: the archive cannot be read.
    """
    prepare_keras(params.seed)
    settings = params.preprocess
    return functools.partial(
        encode_record,
        archive=open_archive(raw),
        classes=classes,
        size=settings.image_size,
        mode=settings.resize,
        quality=settings.jpeg_quality,
        max_pixels=params.split.max_megapixels * 1e6,
    )


def open_writer(raw: Path, params: Params, classes: Sequence[str], *, folder: Path) -> Callable[[Shard], WrittenShard]:
    """Returns what writes a shard into a folder: `write_shard` with the encoder of `open_encoder`."""
    return functools.partial(write_shard, folder=folder, encode=open_encoder(raw, params, classes))
