"""The features that `catdog tune` searches on: those of the pipeline, or of another backbone, made for the search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catdog import paths
from catdog.checkpoints import run_key
from catdog.comparison import meaning
from catdog.config import Params, flatten, validate_params
from catdog.errors import CatdogError
from catdog.files import read_json, write_json
from catdog.registry_files import read_yaml

SPLITS = ("train", "val")
"""What a search may see."""
IMAGE_STAGES = ("download", "split", "preprocess")
"""The stages that make the images of which features are made."""


def read_features_info(root: Path, folder: Path, params: Params) -> dict[str, Any]:
    """Returns what is known of stored features.

    Args:
        root: of the main repository.
        folder: with the features.
        params: those with which they must have been made.

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
    if folder == root / paths.FEATURES:
        require_current(root, params, (*IMAGE_STAGES, "embed"), f"the features in {paths.FEATURES}")
    return info


def require_current(root: Path, params: Params, stages: Sequence[str], made: str) -> None:
    """Refuses what stages made with other parameters, or from another output of an earlier one, going by dvc.lock.

    Args:
        root: of the main repository.
        params: those that count.
        stages: in the pipeline's order.
        made: what they made, for the message.

    Raises:
        CatdogError: a stage has not run, or in another way.
    """
    lock = root / "dvc.lock"
    entries = read_yaml(lock.read_text(encoding="utf-8"), "dvc.lock").get("stages", {}) if lock.exists() else {}
    current = params.flat()
    outs: dict[str, str] = {}
    for stage in stages:
        if stage not in entries:
            raise CatdogError(f"dvc.lock knows no run of the stage {stage}; run `dvc repro` first")
        used = entries[stage].get("params", {}).get(paths.PARAMS.as_posix(), {})
        for key, value in flatten(used):
            if meaning(current.get(key)) != meaning(value):
                raise CatdogError(
                    f"{made} were made with {key} = {value}, but {paths.PARAMS} says {current.get(key)}; run "
                    "`dvc repro` first"
                )
        for dep in entries[stage].get("deps", []):
            if dep.get("md5") != outs.get(dep["path"], dep.get("md5")):
                raise CatdogError(f"{made} were made before {dep['path']} changed; run `dvc repro` first")
        outs |= {out["path"]: out["md5"] for out in entries[stage].get("outs", []) if "md5" in out}


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
        CatdogError: the pipeline has not run, or with other parameters, its shards are damaged, or the weights cannot
            be had.
    """
    if variant.backbone == params.backbone:
        return root / paths.FEATURES
    if not (root / paths.DATASET_INFO).exists():
        raise CatdogError(f"there are no images in {paths.TFRECORDS}; run `dvc repro` first")
    require_current(root, params, IMAGE_STAGES, f"the images in {paths.TFRECORDS}")

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
    code = ("augment", "backbones", "embedding", "features", "images", "inference", "model", "records", "runtime")
    files = [Path(__file__).with_name(f"{name}.py") for name in (*code, "weights")]
    folder = root / paths.TUNING_FEATURES / run_key(facts, files)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # where `catdog clean` looks for it
        if not (folder / paths.FEATURES_INFO.name).exists():
            verify_shards(root / paths.TFRECORDS, SPLITS)
            _embed(root, variant, shards, folder)
    return folder


def _embed(root: Path, params: Params, shards: Sequence[Path], folder: Path) -> None:
    """Does what the embed stage does, for some shards, those that are there already left out."""
    from catdog.compute import open_compute
    from catdog.embedding import EmbedTask, embed_all

    report = read_json(root / paths.PREPROCESS_REPORT)
    images, views = report["images"], params.augment.views
    print(
        f"tune: computing the features of {params.backbone} for {images['train'] + images['val']:,} images", flush=True
    )
    tasks, done = [], 0
    for shard in shards:
        labels = folder / f"{shard.stem}.labels.npy"  # written last
        if labels.exists():
            done += len(np.load(labels))
        else:
            tasks.append(EmbedTask(shard))
        for view in range(1, views + 1) if shard.name.startswith("train-") else ():
            copy = folder / f"{shard.stem}.view-{view:03d}.npy"
            if copy.exists():
                done += len(np.load(copy, mmap_mode="r"))
            else:
                tasks.append(EmbedTask(shard, view))
    if tasks:
        with open_compute(params.compute, folder) as compute:
            embed_all(
                tasks,
                compute,
                params,
                size=report["image_size"],
                pretrained=root / paths.PRETRAINED,
                root=root,
                folder=folder,
                passes=images["val"] + (1 + views) * images["train"],
                done=done,
            )
    described = {"backbone": params.backbone, "weights": params.weights, "pooling": params.embed.pooling}
    write_json(folder / paths.FEATURES_INFO.name, described | {"views": views})
