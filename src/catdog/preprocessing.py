"""The work of the preprocess stage: from rows of the manifest to TFRecord files, here or on a cluster."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catdog import paths
from catdog.archives import open_archive
from catdog.compute import Compute, MapItems
from catdog.config import Params
from catdog.parallel import image_workers, processors
from catdog.records import (
    EncodeRecord,
    ImageRow,
    Shard,
    WrittenShard,
    encode_picture,
    encode_record,
    make_record,
    write_shard,
)
from catdog.runtime import prepare_keras

if TYPE_CHECKING:
    import pandas as pd


def open_encoder(raw: Path, params: Params, classes: Sequence[str]) -> EncodeRecord:
    """Opens the raw archive, for as long as the process lives; returns what makes a record of a row.

    Args:
        raw: the archive.
        params: of the run.
        classes: class names by number.

    Raises:
        CatdogError: the archive cannot be read.
    """
    return functools.partial(encode_record, classes=classes, **_settings(raw, params))


@contextlib.contextmanager
def shard_writers(
    raw: Path, params: Params, classes: Sequence[str], *, images: int, folder: Path, compute: Compute
) -> Iterator[MapItems[Shard, WrittenShard]]:
    """Starts what writes shards into a folder, which lives until the block ends.

    On a cluster each worker writes a shard. Here all processors encode the pictures of one shard after the other, so
    that none is idle while another one does the last; this process writes them. The files have the same bytes.

    Args:
        raw: the archive.
        params: of the run.
        classes: class names by number.
        images: how many there are in all shards.
        folder: where they are written.
        compute: where the work is done.

    Yields:
        A function that takes shards, as `plan_shards` cuts them, and yields what is known of each, in order.

    Raises:
        CatdogError: the archive cannot be read, or as `image_workers` and `Compute.workers`.
    """
    if not compute.is_local:
        with compute.workers(functools.partial(_open_writer, raw, params, classes, folder), "cpu") as write_all:
            yield write_all
        return
    make = functools.partial(_open_picture_encoder, raw, params)
    settings = params.preprocess
    with image_workers(make, images, workers=processors()) as encode_all:

        def write_here(shards: Sequence[Shard]) -> Iterator[WrittenShard]:
            pictures = encode_all([row for shard in shards for row in shard.rows])

            def next_record(row: ImageRow) -> bytes:
                return make_record(row, next(pictures), classes=classes, size=settings.image_size)

            for shard in shards:
                yield write_shard(shard, folder, next_record)

        yield write_here


def rows_of_splits(manifest: pd.DataFrame, classes: Sequence[str]) -> dict[str, list[ImageRow]]:
    """Returns the images of each of paths.SPLITS in the manifest's order; the manifest may hold some in none."""
    number = {name: index for index, name in enumerate(classes)}
    rows: dict[str, list[ImageRow]] = {}
    for split in paths.SPLITS:
        chosen = manifest[manifest["split"] == split]
        rows[split] = [
            ImageRow(path, number[label]) for path, label in zip(chosen["path"], chosen["label"], strict=True)
        ]
    return rows


def _open_picture_encoder(raw: Path, params: Params) -> Callable[[ImageRow], bytes]:
    return functools.partial(encode_picture, **_settings(raw, params))


def _open_writer(raw: Path, params: Params, classes: Sequence[str], folder: Path) -> Callable[[Shard], WrittenShard]:
    prepare_keras(params.seed)
    return functools.partial(write_shard, folder=folder, encode=open_encoder(raw, params, classes))


def _settings(raw: Path, params: Params) -> dict[str, Any]:
    settings = params.preprocess
    return {
        "archive": open_archive(raw),
        "size": settings.image_size,
        "mode": settings.resize,
        "quality": settings.jpeg_quality,
        "max_pixels": params.split.max_megapixels * 1e6,
    }
