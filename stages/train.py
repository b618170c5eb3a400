"""Fits the head on the features, fine-tunes the backbones if asked, then saves the whole model."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import catdog
from catdog import paths
from catdog.backbones import build_backbone, get_backbones
from catdog.calibration import calibrate, check_threshold_rule
from catdog.checkpoints import Checkpoints, open_checkpoints, run_key
from catdog.features import FeatureSet, open_features
from catdog.files import read_json, write_text
from catdog.fine_tuning import FineTuned, Images, fine_tune
from catdog.gathered import fit_either_way, gather
from catdog.inference import choose_engine, compile_forward
from catdog.model import ModelInfo, assemble, build_head, logits_of, save_model, set_temperature
from catdog.plots import plot_learning_curves
from catdog.records import RecordReader, shard_paths, verify_shards
from catdog.runtime import device_facts, distribution, full_precision, jit_compile, prepare_keras
from catdog.tracking import StageRun, dvc_outs, log_data_hash, stage
from catdog.training import apply_head, best_epoch, join_histories
from catdog.weights import load_all

if TYPE_CHECKING:
    import keras

IN_MEMORY_BYTES = 256e6
"""Features of so many bytes are fitted from memory, twice as fast; more stay on the disk, so that memory stays flat."""


def main() -> None:
    """Runs the stage."""
    with stage("train") as run:
        log_data_hash(run, paths.FEATURES)
        params, seed = run.params.train, run.params.seed
        prepare_keras(seed, precision=run.params.runtime.precision)
        run.note(device_facts(run.params.runtime.xla, trains=True))
        # What the features were made with, not what params.yaml says: the model must match the features.
        dataset, embedded = read_json(paths.PREPROCESS_REPORT), read_json(paths.FEATURES_INFO)
        info = ModelInfo(
            class_names=tuple(dataset["classes"]),
            image_size=dataset["image_size"],
            resize=dataset["resize"],
            jpeg_quality=dataset["jpeg_quality"],
            backbone=embedded["backbone"],
            weights=embedded["weights"],
            pooling=embedded["pooling"],
        )
        check_threshold_rule(run.params.calibrate.threshold, class_count=len(info.class_names))
        train, val = open_features(paths.FEATURES, "train", views=True), open_features(paths.FEATURES, "val")
        with open_checkpoints(run.root, _key(run, embedded)) as checkpoints:
            backbones = get_backbones(info.backbone)
            with full_precision():
                # First of all that draws random numbers, as in embed: so `weights: random` is the same network in both.
                networks = [build_backbone(backbone, info.image_size) for backbone in backbones]
                load_all(networks, backbones, info.weights, pretrained_dir=paths.PRETRAINED, root=run.root)
                head = build_head(train.size, len(info.class_names), params, seed)
                started = time.monotonic()
                gathered = gather(train, val, limit=IN_MEMORY_BYTES)
                head_history = fit_either_way(head, train, val, gathered, params, seed=seed, checkpoints=checkpoints)
                run.measure({"fit_seconds": round(time.monotonic() - started, 2)})
                model = assemble(networks, backbones, head, info.image_size, info.pooling)
            tuned = None
            if run.params.fine_tune.layers != "none":
                tuned = _fine_tune(run, model, info, train, val, checkpoints)
            history = join_histories(head_history, tuned.history if tuned else None)
            write_text(paths.HISTORY, history.round(6).to_csv(index=False))
            run.log_curves(history.round(6))
            best = best_epoch(history if tuned and tuned.improved else history.head(len(head_history)))
            plot_learning_curves(history, int(best["epoch"]), paths.LEARNING_CURVES)

            improved = tuned is not None and tuned.improved
            logits = _validation_logits(run, model) if improved else apply_head(head, val)
            calibration = calibrate(logits, val.labels, run.params.calibrate)
            set_temperature(model, calibration.temperature)
            info = replace(info, temperature=calibration.temperature, threshold=calibration.threshold)
            save_model(model, info, paths.MODEL)
            run.log_model(paths.MODEL)
            report: dict[str, Any] = {
                "best_epoch": int(best["epoch"]),
                "epochs": len(history),
                "best_val_loss": round(float(best["val_loss"]), 6),
                "best_val_accuracy": round(float(best["val_accuracy"]), 6),
                "temperature": round(calibration.temperature, 6),
                "threshold": round(calibration.threshold, 6),
                "head_parameters": head.count_params(),
                "model_parameters": model.count_params(),
                "model_bytes": paths.MODEL.stat().st_size,
            }
            summary = (
                f"best of {len(history)} epochs is {best['epoch']:.0f}: validation loss {best['val_loss']:.4f}, "
                f"accuracy {best['val_accuracy']:.2%}"
            )
            if tuned:
                report["fine_tuning"] = tuned.report()
                summary += f"; fine-tuning {'improved' if tuned.improved else 'did not improve'} the frozen model"
            run.finish(report, summary)
            checkpoints.clear()


def _validation_logits(run: StageRun, model: "keras.Model") -> npt.NDArray[np.float32]:
    """The logits of the validation images, float32 [images, 1 or classes], from the stored pictures."""
    embed = run.params.embed
    forward = compile_forward(
        logits_of(model), choose_engine(embed.engine), batch_size=embed.batch_size, xla=run.params.runtime.xla
    )
    return forward(RecordReader(shard_paths(paths.TFRECORDS, "val"), embed.batch_size))


def _key(run: StageRun, embedded: dict[str, Any]) -> str:
    """Names this training by all that decides about its result."""
    blocks = {"seed", "augment", "embed", "train", "fine_tune", "runtime"}
    facts = {
        "params": run.params.model_dump(include=blocks),
        "images": read_json(paths.DATASET_INFO),  # with the SHA-256 of every shard
        "features": [embedded, dvc_outs().get(paths.FEATURES.as_posix())],
    }
    return run_key(facts, code=[Path(__file__), *Path(catdog.__file__).parent.rglob("*.py")])


def _fine_tune(
    run: StageRun, model: "keras.Model", info: ModelInfo, train: FeatureSet, val: FeatureSet, checkpoints: Checkpoints
) -> FineTuned:
    """Fine-tunes a copy of the model, in the precision and on the devices of the run; takes over what is better."""
    params, seed = run.params, run.params.seed
    verify_shards(paths.TFRECORDS, ("train", "val"))
    backbones = get_backbones(info.backbone)
    started = time.monotonic()
    with distribution():
        networks = [build_backbone(backbone, info.image_size) for backbone in backbones]
        head = build_head(train.size, len(info.class_names), params.train, seed)
        copy = assemble(networks, backbones, head, info.image_size, info.pooling)
        copy.set_weights(model.get_weights())
        tuned = fine_tune(
            copy,
            networks,
            backbones,
            Images(tuple(shard_paths(paths.TFRECORDS, "train")), train.labels),
            Images(tuple(shard_paths(paths.TFRECORDS, "val")), val.labels),
            params.fine_tune,
            params.train,
            params.augment,
            seed=seed,
            checkpoints=checkpoints,
            jit_compile=jit_compile(params.runtime.xla, trains=True),
        )
    if tuned.improved:
        model.set_weights(copy.get_weights())
    run.measure({"fine_tune_seconds": round(time.monotonic() - started, 2)})
    if tuned.images_per_second:
        run.measure({"fine_tune_images_per_second": round(tuned.images_per_second, 1)})
    return tuned


if __name__ == "__main__":
    main()
