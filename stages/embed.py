"""Runs the frozen backbone once over every image, and over varied copies of training images; stores the features."""

from catdog import paths
from catdog.augment import require_variation, write_preview
from catdog.backbones import get_backbones
from catdog.compute import open_compute
from catdog.embedding import EmbedTask, embed_all
from catdog.features import open_features
from catdog.files import read_json
from catdog.records import shard_paths, verify_shards
from catdog.runtime import prepare_keras_for
from catdog.second_process import second_process
from catdog.tracking import log_data_hash, stage


def main() -> None:
    """Runs the stage."""
    with second_process() as second, stage("embed", second, meanwhile=prepare_keras_for) as run:
        log_data_hash(run, paths.TFRECORDS)
        params, augment, seed = run.params.embed, run.params.augment, run.params.seed
        require_variation(augment)
        verify_shards(paths.TFRECORDS, paths.SPLITS)
        dataset = read_json(paths.PREPROCESS_REPORT)
        size = dataset["image_size"]
        backbones = get_backbones(run.params.backbone)
        for backbone in backbones:
            if backbone.native_size != size:
                print(
                    f"embed: {backbone.name} was trained at {backbone.native_size} pixels, the images have {size}; "
                    f"preprocess.image_size={backbone.native_size} may do better"
                )
        train_shards = shard_paths(paths.TFRECORDS, "train")
        write_preview(train_shards, dataset["classes"], augment, seed=seed, path=paths.AUGMENTATION)
        images = sum(dataset["images"].values())
        passes = images + augment.views * dataset["images"]["train"]
        tasks = [EmbedTask(shard) for split in paths.SPLITS for shard in shard_paths(paths.TFRECORDS, split)]
        tasks += [EmbedTask(shard, view) for shard in train_shards for view in range(1, augment.views + 1)]
        with open_compute(run.params.compute, paths.FEATURES) as compute:
            run.note(compute.facts("node"))
            network, seconds = embed_all(
                tasks,
                compute,
                run.params,
                size=size,
                pretrained=paths.PRETRAINED,
                root=run.root,
                folder=paths.FEATURES,
                passes=passes,
            )
        run.note(network.facts | {"engine": network.engine, "weights.found": network.kinds})
        rate = passes / seconds
        run.measure({"images_per_second": round(rate, 1)})
        copies = f" and {augment.views} varied copies of each training image" if augment.views else ""
        run.finish(
            {
                "backbone": run.params.backbone,
                "native_size": "+".join(str(backbone.native_size) for backbone in backbones),
                "weights": run.params.weights,
                "weights_sha256": network.sha256,
                "pooling": params.pooling,
                "feature_size": open_features(paths.FEATURES, "train").size,
                "images": images,
                "views": augment.views,
                "backbone_parameters": network.parameters,
            },
            f"{images:,} images{copies} through {run.params.backbone} ({network.kinds} weights), {rate:,.0f} images/s "
            f"on {network.engine}",
        )


if __name__ == "__main__":
    main()
