"""Runs the frozen backbone once over every image and stores the features."""

import time

from catdog import paths
from catdog.backbones import build_backbone, get_backbone
from catdog.features import embed_shard, open_features
from catdog.files import read_json
from catdog.inference import choose_engine, compile_forward
from catdog.model import build_extractor
from catdog.progress import progress
from catdog.records import shard_paths, verify_shards
from catdog.runtime import device_name, prepare_keras
from catdog.tracking import log_data_hash, stage
from catdog.weights import load_weights


def main() -> None:
    """Runs the stage."""
    with stage("embed") as run:
        log_data_hash(run, paths.TFRECORDS)
        params = run.params.embed
        verify_shards(paths.TFRECORDS, paths.SPLITS)
        prepare_keras(run.params.seed)
        dataset = read_json(paths.PREPROCESS_REPORT)
        backbone = get_backbone(run.params.backbone)
        network = build_backbone(backbone, dataset["image_size"])
        weights = load_weights(network, backbone, run.params.weights, pretrained_dir=paths.PRETRAINED, root=run.root)
        if backbone.native_size != dataset["image_size"]:
            print(
                f"embed: {backbone.name} was trained at {backbone.native_size} pixels, the images have "
                f"{dataset['image_size']}; preprocess.image_size={backbone.native_size} may do better"
            )
        engine = choose_engine(params.engine)
        run.note({"device": device_name(), "engine": engine, "weights.found": weights.kind})
        extractor = build_extractor(network, backbone, dataset["image_size"], params.pooling)
        forward = compile_forward(extractor, engine)

        shards = [shard for split in paths.SPLITS for shard in shard_paths(paths.TFRECORDS, split)]
        images = 0
        started = time.monotonic()
        for shard in progress(shards, "embed", len(shards), "shards"):
            images += embed_shard(shard, paths.FEATURES, forward, batch_size=params.batch_size)
        seconds = time.monotonic() - started
        rate = images / seconds
        run.measure({"images_per_second": round(rate, 1)})
        run.finish(
            {
                "backbone": backbone.name,
                "native_size": backbone.native_size,
                "weights": run.params.weights,
                "weights_sha256": weights.sha256,
                "pooling": params.pooling,
                "feature_size": open_features(paths.FEATURES, "train").size,
                "images": images,
                "backbone_parameters": extractor.count_params(),
            },
            f"{images:,} images through {backbone.name} ({weights.kind} weights), {rate:,.0f} images/s on {engine}",
        )


if __name__ == "__main__":
    main()
