"""The features that `catdog tune` searches on: those of the pipeline, or of another backbone, made for the search."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catdog import paths
from catdog.checkpoints import run_key
from catdog.config import Params, validate_params
from catdog.errors import CatdogError
from catdog.files import read_json, write_json

SPLITS = ("train", "val")
"""What a search may see."""


def read_features_info(folder: Path, params: Params) -> dict[str, Any]:
    """Returns what is known of stored features.

    Raises:
        CatdogError: there are none, or they were not made with these parameters.
    """
    try:
        info = read_json(folder / paths.FEATURES_INFO.name)
    except FileNotFoundError:
        raise CatdogError(f"there are no features in {paths.FEATURES}; run `dvc repro` first") from None
    wanted = {
        "backbone": ("backbone", params.backbone),
        "weights": ("weights", params.weights),
        "pooling": ("embed.pooling", params.embed.pooling),
        "views": ("augment.views", params.augment.views),
    }
    for key, (name, value) in wanted.items():
        if info[key] != value:
            raise CatdogError(
                f"the features in {paths.FEATURES} were made with {name} = {info[key]}, but {paths.PARAMS} says "
                f"{value}; run `dvc repro` first"
            )
    return info


def with_backbone(params: Params, name: str) -> Params:
    """The parameters with another backbone; raises CatdogError where there is none of this name, or it does not fit."""
    return validate_params({**params.model_dump(), "backbone": name}, source="--backbones")


def check_weights(root: Path, params: Params, variant: Params) -> None:
    """Refuses, before any work, weights that cannot be those of the variant's backbone; raises CatdogError."""
    from catdog.backbones import get_backbones
    from catdog.weights import check_weights_available

    if variant.backbone != params.backbone and params.weights not in ("imagenet", "random"):
        raise CatdogError(
            f"weights = {params.weights} are those of {params.backbone}; --backbones needs imagenet or random"
        )
    backbones = get_backbones(variant.backbone)
    check_weights_available(backbones, variant.weights, pretrained_dir=root / paths.PRETRAINED, root=root)


def features_of(root: Path, params: Params, variant: Params) -> Path:
    """Returns the folder with a backbone's features, which it computes shard by shard where they are missing.

    Those of the pipeline's own backbone are its own. The others lie under `.dvc/tmp/features/`, where only `catdog
    tune` looks for them: an experiment with that backbone computes its features as a stage, with those of the test
    split. What a killed process has finished is kept.

    Args:
        root: of the main repository.
        params: those of the pipeline.
        variant: the same with the backbone that is wanted.

    Raises:
        CatdogError: the pipeline has not run, its shards are damaged, or the weights cannot be had.
    """
    if variant.backbone == params.backbone:
        return root / paths.FEATURES
    if not (root / paths.DATASET_INFO).exists():
        raise CatdogError(f"there are no images in {paths.TFRECORDS}; run `dvc repro` first")

    from filelock import FileLock

    from catdog.inference import choose_engine
    from catdog.records import shard_paths, verify_shards
    from catdog.runtime import prepare_keras

    prepare_keras(params.seed, precision=params.runtime.precision)
    engine = choose_engine(params.embed.engine)
    checksums = read_json(root / paths.DATASET_INFO)["downloadChecksums"]
    shards = [shard for split in SPLITS for shard in shard_paths(root / paths.TFRECORDS, split)]
    facts = {
        "backbone": variant.backbone,
        "weights": variant.weights,
        "blocks": variant.model_dump(mode="json", include={"seed", "embed", "augment", "runtime"}),
        "engine": engine,
        "shards": {shard.name: checksums[shard.name] for shard in shards},
    }
    code = ("augment", "backbones", "features", "images", "inference", "model", "records", "runtime", "weights")
    folder = root / paths.TUNING_FEATURES / run_key(facts, [Path(__file__).with_name(f"{name}.py") for name in code])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # where `catdog clean` looks for it
        if not (folder / paths.FEATURES_INFO.name).exists():
            verify_shards(root / paths.TFRECORDS, SPLITS)
            _embed(root, variant, shards, folder, engine)
    return folder


def _embed(root: Path, params: Params, shards: Sequence[Path], folder: Path, engine: Any) -> None:
    """Does what the embed stage does, for some shards, those that are there already left out."""
    from tqdm import tqdm

    from catdog.augment import build_augmentation
    from catdog.backbones import build_backbone, get_backbones
    from catdog.features import embed_copy, embed_shard, reporting
    from catdog.inference import compile_forward
    from catdog.model import build_extractor
    from catdog.runtime import distribution
    from catdog.weights import load_all

    embed, augment = params.embed, params.augment
    report = read_json(root / paths.PREPROCESS_REPORT)
    size = report["image_size"]
    backbones = get_backbones(params.backbone)
    with distribution():
        networks = [build_backbone(backbone, size) for backbone in backbones]
        load_all(networks, backbones, params.weights, pretrained_dir=root / paths.PRETRAINED, root=root)
        extractor = build_extractor(networks, backbones, size, embed.pooling)
        forward = compile_forward(extractor, engine, batch_size=embed.batch_size, xla=params.runtime.xla)
    augmentation = build_augmentation(augment, size, params.seed)
    images = report["images"]
    total = images["val"] + (1 + augment.views) * images["train"]
    print(
        f"tune: computing the features of {params.backbone} for {images['train'] + images['val']:,} images", flush=True
    )
    with tqdm(desc="embed", total=total, unit=" images", disable=not sys.stderr.isatty()) as bar:
        counted = reporting(forward, bar.update)
        for shard in shards:
            labels = folder / f"{shard.stem}.labels.npy"  # written last
            if labels.exists():
                bar.update(len(np.load(labels)))
            else:
                embed_shard(shard, folder, counted, batch_size=embed.batch_size)
            for view in range(1, augment.views + 1) if shard.name.startswith("train-") else ():
                copy = folder / f"{shard.stem}.view-{view:03d}.npy"
                if copy.exists():
                    bar.update(len(np.load(copy, mmap_mode="r")))
                    continue
                settings = {"view": view, "seed": params.seed, "batch_size": embed.batch_size}
                embed_copy(shard, folder, counted, augmentation, **settings)
    described = {"backbone": params.backbone, "weights": params.weights, "pooling": embed.pooling}
    write_json(folder / paths.FEATURES_INFO.name, described | {"views": augment.views})
