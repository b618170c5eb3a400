"""Runs the frozen backbone once over every image, and over varied copies of training images; stores the features."""

import sys
import time

from tqdm import tqdm

from catdog import paths
from catdog.augment import build_augmentation, require_variation, write_preview
from catdog.backbones import build_backbone, get_backbones
from catdog.features import embed_copy, embed_shard, open_features, reporting
from catdog.files import read_json
from catdog.inference import choose_engine, compile_forward
from catdog.model import build_extractor
from catdog.records import shard_paths, verify_shards
from catdog.runtime import device_facts, distribution, prepare_keras
from catdog.tracking import log_data_hash, stage
from catdog.weights import load_all


def main() -> None:
    """Runs the stage."""
    with stage("embed") as run:
        log_data_hash(run, paths.TFRECORDS)
        params, augment, seed = run.params.embed, run.params.augment, run.params.seed
        require_variation(augment)
        verify_shards(paths.TFRECORDS, paths.SPLITS)
        prepare_keras(seed, precision=run.params.runtime.precision)
        dataset = read_json(paths.PREPROCESS_REPORT)
        size = dataset["image_size"]
        backbones = get_backbones(run.params.backbone)
        engine = choose_engine(params.engine)
        with distribution():
            # First of all that draws random numbers, as in train: so `weights: random` is the same network in both.
            networks = [build_backbone(backbone, size) for backbone in backbones]
            weights = load_all(networks, backbones, run.params.weights, pretrained_dir=paths.PRETRAINED, root=run.root)
            extractor = build_extractor(networks, backbones, size, params.pooling)
            forward = compile_forward(extractor, engine, batch_size=params.batch_size, xla=run.params.runtime.xla)
        for backbone in backbones:
            if backbone.native_size != size:
                print(
                    f"embed: {backbone.name} was trained at {backbone.native_size} pixels, the images have {size}; "
                    f"preprocess.image_size={backbone.native_size} may do better"
                )
        kinds = "+".join(source.kind for source in weights)
        run.note(device_facts(run.params.runtime.xla) | {"engine": engine, "weights.found": kinds})

        train_shards = shard_paths(paths.TFRECORDS, "train")
        write_preview(train_shards, dataset["classes"], augment, seed=seed, path=paths.AUGMENTATION)
        augmentation = build_augmentation(augment, size, seed)
        images = sum(dataset["images"].values())
        passes = images + augment.views * dataset["images"]["train"]
        started = time.monotonic()
        with tqdm(desc="embed", total=passes, unit=" images", disable=not sys.stderr.isatty()) as bar:
            forward = reporting(forward, bar.update)
            for split in paths.SPLITS:
                for shard in shard_paths(paths.TFRECORDS, split):
                    embed_shard(shard, paths.FEATURES, forward, batch_size=params.batch_size)
            for shard in train_shards:
                for view in range(1, augment.views + 1):
                    embed_copy(
                        shard,
                        paths.FEATURES,
                        forward,
                        augmentation,
                        view=view,
                        seed=seed,
                        batch_size=params.batch_size,
                    )
        rate = passes / (time.monotonic() - started)
        run.measure({"images_per_second": round(rate, 1)})
        copies = f" and {augment.views} varied copies of each training image" if augment.views else ""
        run.finish(
            {
                "backbone": run.params.backbone,
                "native_size": "+".join(str(backbone.native_size) for backbone in backbones),
                "weights": run.params.weights,
                "weights_sha256": "+".join(source.sha256 or "none" for source in weights),
                "pooling": params.pooling,
                "feature_size": open_features(paths.FEATURES, "train").size,
                "images": images,
                "views": augment.views,
                "backbone_parameters": extractor.count_params(),
            },
            f"{images:,} images{copies} through {run.params.backbone} ({kinds} weights), {rate:,.0f} images/s on "
            f"{engine}",
        )


if __name__ == "__main__":
    main()
