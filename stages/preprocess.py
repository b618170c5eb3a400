"""Decodes and resizes every image once and writes the splits as TFRecord shards."""

import time

from catdog import paths
from catdog.compute import open_compute
from catdog.files import read_json, read_manifest
from catdog.parallel import processors
from catdog.preprocessing import open_encoder, rows_of_splits, shard_writers
from catdog.progress import progress
from catdog.records import images_per_shard, mean_record_bytes, plan_shards, write_index
from catdog.runtime import prepare_keras_for
from catdog.second_process import second_process
from catdog.tracking import log_data_hash, stage


def main() -> None:
    """Runs the stage."""
    with second_process() as second, stage("preprocess", second, meanwhile=prepare_keras_for) as run:
        log_data_hash(run, paths.MANIFEST)
        params = run.params.preprocess
        classes = read_json(paths.DATA_REPORT)["classes"]
        rows = rows_of_splits(read_manifest(paths.MANIFEST), classes)
        images = [row for split in paths.SPLITS for row in rows[split]]
        encode = open_encoder(paths.RAW, run.params, classes)
        with (
            open_compute(run.params.compute, paths.TFRECORDS) as compute,
            shard_writers(
                paths.RAW, run.params, classes, images=len(images), folder=paths.TFRECORDS, compute=compute
            ) as write_all,
        ):
            run.note(compute.facts("cpu"))
            started = time.monotonic()
            record_bytes = mean_record_bytes(images, encode, workers=processors())
            limit = images_per_shard(len(images), record_bytes, params.shard_megabytes * 1e6)
            shards = [shard for split in paths.SPLITS for shard in plan_shards(split, rows[split], limit)]
            written = list(progress(write_all(shards), "preprocess", len(shards), "shards"))
            seconds = time.monotonic() - started
        write_index(paths.TFRECORDS, written, classes, size=params.image_size)
        rate = len(images) / seconds
        total = sum(shard.bytes for shard in written)
        run.measure({"images_per_second": round(rate, 1)})
        run.finish(
            {
                "classes": classes,
                "image_size": params.image_size,
                "resize": params.resize,
                "jpeg_quality": params.jpeg_quality,
                "images": {split: len(rows[split]) for split in paths.SPLITS},
                "shards": len(shards),
                "bytes": total,
                "largest_shard_bytes": max(shard.bytes for shard in written),
            },
            f"{len(images):,} images in {len(shards)} shards, {total / 1e6:,.1f} MB, {rate:,.0f} images/s",
        )


if __name__ == "__main__":
    main()
