"""Decodes and resizes every image once and writes the splits as TFRecord shards."""

import functools
import os
import time

import pandas as pd

from catdog import paths
from catdog.files import read_json
from catdog.progress import progress
from catdog.records import ImageRow, map_shards, plan_shards, write_shard
from catdog.runtime import prepare_keras
from catdog.tracking import log_data_hash, stage


def main() -> None:
    """Runs the stage."""
    with stage("preprocess") as run:
        log_data_hash(run, paths.MANIFEST)
        params = run.params.preprocess
        prepare_keras(run.params.seed)
        classes = read_json(paths.DATA_REPORT)["classes"]
        number = {name: index for index, name in enumerate(classes)}
        # As text: a class may be called 1 or NA.
        manifest = pd.read_csv(paths.MANIFEST, dtype={"path": str, "label": str}, keep_default_na=False)
        shards = []
        for split, rows in manifest.groupby("split"):
            images = [ImageRow(path, number[label]) for path, label in zip(rows["path"], rows["label"], strict=True)]
            shards += plan_shards(str(split), images, params.images_per_shard)
        write = functools.partial(
            write_shard,
            raw=paths.RAW,
            folder=paths.TFRECORDS,
            size=params.image_size,
            mode=params.resize,
            quality=params.jpeg_quality,
            max_pixels=run.params.split.max_megapixels * 1e6,
        )
        started = time.monotonic()
        written = map_shards(write, shards, workers=os.cpu_count() or 1)
        sizes = list(progress(written, "preprocess", len(shards), "shards"))
        seconds = time.monotonic() - started
        rate = len(manifest) / seconds
        run.measure({"images_per_second": round(rate, 1)})
        run.finish(
            {
                "classes": classes,
                "image_size": params.image_size,
                "resize": params.resize,
                "jpeg_quality": params.jpeg_quality,
                "images": {split: int((manifest["split"] == split).sum()) for split in paths.SPLITS},
                "shards": len(shards),
                "bytes": sum(sizes),
                "largest_shard_bytes": max(sizes),
            },
            f"{len(manifest):,} images in {len(shards)} shards, {sum(sizes) / 1e6:,.1f} MB, {rate:,.0f} images/s",
        )


if __name__ == "__main__":
    main()
