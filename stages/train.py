"""Fits the head on the features, fine-tunes the backbones if asked, then saves the whole model.

In a job of several workers (docs/devices.md) the first one does so under DVC, and the others run this script by
themselves: they fine-tune beside it, and write nothing.
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import catdog
from catdog import paths
from catdog.backbones import build_backbone, get_backbones
from catdog.calibration import calibrate, check_threshold_rule
from catdog.checkpoints import Checkpoints, open_checkpoints, run_key
from catdog.config import Params, load_params
from catdog.errors import CatdogError
from catdog.features import FeatureSet, open_features
from catdog.files import read_json, sha256_of, write_text
from catdog.fine_tuning import FineTuned, Images, fine_tune
from catdog.gathered import fit_either_way, gather
from catdog.inference import choose_engine, compile_forward
from catdog.model import ModelInfo, assemble, build_head, logits_of, save_model, set_temperature
from catdog.plots import import_matplotlib, plot_learning_curves
from catdog.records import RecordReader, shard_paths, verify_shards
from catdog.runtime import device_facts, distribution, full_precision, jit_compile, prepare_keras_for
from catdog.second_process import second_process
from catdog.tracking import StageRun, dvc_outs, log_data_hash, stage
from catdog.training import apply_head, join_histories, kept_epoch
from catdog.weights import check_same_weights, load_all
from catdog.workers import Job, JobCheckpoints, leave, read_job, taking_part, weights_from_first

if TYPE_CHECKING:
    import keras
    import pandas as pd

IN_MEMORY_BYTES = 256e6
"""Features of so many bytes are fitted from memory, twice as fast; more stay on the disk, so that memory stays flat."""
BLOCKS = {"seed", "augment", "embed", "train", "fine_tune", "runtime"}
"""The parameters that decide about a training's result."""


def main() -> None:
    """Runs the stage, or works beside the first worker of a job that does."""
    try:
        job = read_job(os.environ)
        if job is not None and not job.is_first:
            _work_beside_the_first(job)
            return
    except CatdogError as error:
        print(f"catdog train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with (
        second_process() as second,
        # JAX must not be used before the workers of a job have met.
        stage("train", second, meanwhile=prepare_keras_for if job is None else None) as run,
        taking_part(job, _facts(job, run.params)),
    ):
        log_data_hash(run, paths.FEATURES)
        params, seed = run.params.train, run.params.seed
        if job is not None:
            prepare_keras_for(run.params)
        second.submit(_import_beside)
        run.note(device_facts(run.params.runtime.xla, trains=True))
        # What the features were made with, not what params.yaml says: the model must match the features.
        embedded = read_json(paths.FEATURES_INFO)
        info = _model_info(read_json(paths.PREPROCESS_REPORT), embedded)
        check_threshold_rule(run.params.calibrate.threshold, class_count=len(info.class_names))
        train, val = open_features(paths.FEATURES, "train", views=True), open_features(paths.FEATURES, "val")
        with open_checkpoints(run.root, _key(run, embedded)) as checkpoints:
            backbones = get_backbones(info.backbone)
            with full_precision():
                # First of all that draws random numbers, as in embed: so `weights: random` is the same network in both.
                networks = [build_backbone(backbone, info.image_size) for backbone in backbones]
                check_same_weights(
                    load_all(networks, backbones, info.weights, pretrained_dir=paths.PRETRAINED, root=run.root),
                    embedded["weights_sha256"],
                )
                head = build_head(train.size, len(info.class_names), params, seed)
                started = time.monotonic()
                gathered = gather(train, val, limit=IN_MEMORY_BYTES)
                head_history = fit_either_way(head, train, val, gathered, params, seed=seed, checkpoints=checkpoints)
                run.measure({"fit_seconds": round(time.monotonic() - started, 2)})
                model = assemble(networks, backbones, head, info.image_size, info.pooling)
            tuned = None
            if run.params.fine_tune.layers != "none":
                tuned = _fine_tune(run, job, model, info, train, val, checkpoints)
            history = join_histories(head_history, tuned.history if tuned else None)
            write_text(paths.HISTORY, history.round(6).to_csv(index=False))
            run.log_curves(history.round(6))
            best = kept_epoch(history, fine_tuned=bool(tuned and tuned.improved))
            logits = _validation_logits(run, model) if tuned and tuned.improved else apply_head(head, val)
            calibrated = second.submit(calibrate, logits, val.labels, run.params.calibrate)
            # After what is waited for: drawn while this process writes the model.
            drawn = second.submit(plot_learning_curves, history, int(best["epoch"]), paths.LEARNING_CURVES)
            calibration = calibrated.result()
            set_temperature(model, calibration.temperature)
            info = replace(info, temperature=calibration.temperature, threshold=calibration.threshold)
            save_model(model, info, paths.MODEL)
            run.log_model(paths.MODEL)
            report = _report(best, len(history), info) | {
                "head_parameters": head.count_params(),
                "model_parameters": model.count_params(),
                "model_bytes": paths.MODEL.stat().st_size,
                **({"fine_tuning": tuned.report()} if tuned else {}),
            }
            drawn.result()
            run.finish(report, _summary(best, len(history), tuned))
            checkpoints.clear()


def _import_beside() -> None:
    """Imports what the second process will need, while this one builds and fits."""
    import mlflow.pyfunc  # noqa: F401
    import scipy.optimize  # noqa: F401

    import_matplotlib()


def _report(best: "pd.Series[Any]", epochs: int, info: ModelInfo) -> dict[str, Any]:
    return {
        "best_epoch": int(best["epoch"]),
        "epochs": epochs,
        "best_val_loss": round(float(best["val_loss"]), 6),
        "best_val_accuracy": round(float(best["val_accuracy"]), 6),
        "temperature": round(info.temperature, 6),
        "threshold": round(info.threshold, 6),
    }


def _summary(best: "pd.Series[Any]", epochs: int, tuned: FineTuned | None) -> str:
    text = (
        f"best of {epochs} epochs is {best['epoch']:.0f}: validation loss {best['val_loss']:.4f}, "
        f"accuracy {best['val_accuracy']:.2%}"
    )
    if tuned:
        text += f"; fine-tuning {'improved' if tuned.improved else 'did not improve'} the frozen model"
    return text


def _validation_logits(run: StageRun, model: "keras.Model") -> npt.NDArray[np.float32]:
    """The logits of the validation images, float32 [images, 1 or classes], from the stored pictures."""
    embed = run.params.embed
    forward = compile_forward(
        logits_of(model), choose_engine(embed.engine), batch_size=embed.batch_size, xla=run.params.runtime.xla
    )
    return forward(RecordReader(shard_paths(paths.TFRECORDS, "val"), embed.batch_size))


def _model_info(dataset: Mapping[str, Any], embedded: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(
        class_names=tuple(dataset["classes"]),
        image_size=dataset["image_size"],
        resize=dataset["resize"],
        jpeg_quality=dataset["jpeg_quality"],
        backbone=embedded["backbone"],
        weights=embedded["weights"],
        pooling=embedded["pooling"],
    )


def _key(run: StageRun, embedded: dict[str, Any]) -> str:
    """Names this training by all that decides about its result."""
    facts = {
        "params": run.params.model_dump(include=BLOCKS),
        "images": read_json(paths.DATASET_INFO),  # with the SHA-256 of every shard
        "features": [embedded, dvc_outs().get(paths.FEATURES.as_posix())],
    }
    return run_key(facts, code=_code())


def _code() -> list[Path]:
    return [Path(__file__), *Path(catdog.__file__).parent.rglob("*.py")]


def _facts(job: Job | None, params: Params) -> dict[str, str]:
    """What must be the same for all workers of a job, by names for messages."""
    if job is None:
        return {}
    if params.fine_tune.layers == "none":
        raise CatdogError(
            f"a job of {job.workers} workers shares nothing but fine-tuning, and fine_tune.layers = 'none'; set it, or "
            "unset KERAS_DISTRIBUTION_*"
        )
    told = {name: value for name, value in params.flat().items() if name.partition(".")[0] in BLOCKS}
    try:
        files = {str(path): sha256_of(path)[:12] for path in (paths.DATASET_INFO, paths.FEATURES_INFO)}
    except FileNotFoundError as error:
        raise CatdogError(
            f"{error.filename} is missing; every worker needs the same data: `dvc pull preprocess embed` brings it"
        ) from None
    return told | files | {"the code and Keras": run_key({}, code=_code())[:12], "JAX": version("jax")}


def _fine_tune(
    run: StageRun,
    job: Job | None,
    model: "keras.Model",
    info: ModelInfo,
    train: FeatureSet,
    val: FeatureSet,
    checkpoints: Checkpoints,
) -> FineTuned:
    """Fine-tunes a copy of the model, in the precision and on the devices of the run; takes over what is better."""
    started = time.monotonic()
    copy, tuned = _fine_tune_copy(job, model.get_weights(), run.params, info, train, val, checkpoints)
    if tuned.improved:
        model.set_weights(copy.get_weights())
    leave(job)
    run.measure({"fine_tune_seconds": round(time.monotonic() - started, 2)})
    if tuned.images_per_second:
        run.measure({"fine_tune_images_per_second": round(tuned.images_per_second, 1)})
    return tuned


def _work_beside_the_first(job: Job) -> None:
    """Fine-tunes as one more worker of a job; the first one keeps what comes of it."""
    if "DVC_STAGE" in os.environ:
        raise CatdogError(
            f"KERAS_DISTRIBUTION_PROCESS_ID = {job.number} under DVC, which belongs to the first worker, number 0; "
            "start the others with PYTHONPATH=src python stages/train.py"
        )
    settings = load_params(paths.PARAMS)
    with taking_part(job, _facts(job, settings)):
        prepare_keras_for(settings)
        info = _model_info(read_json(paths.PREPROCESS_REPORT), read_json(paths.FEATURES_INFO))
        train, val = open_features(paths.FEATURES, "train"), open_features(paths.FEATURES, "val")
        _, tuned = _fine_tune_copy(job, [], settings, info, train, val, Checkpoints(None))
        leave(job)
    print(
        f"train: worker {job.number} of {job.workers} is done, {len(tuned.history)} epochs; the first one has the model"
    )


def _fine_tune_copy(
    job: Job | None,
    weights: list[npt.NDArray[Any]],
    params: Params,
    info: ModelInfo,
    train: FeatureSet,
    val: FeatureSet,
    checkpoints: Checkpoints,
) -> "tuple[keras.Model, FineTuned]":
    """Fine-tunes a model with these weights; in a job, with those that the first worker has."""
    import keras

    verify_shards(paths.TFRECORDS, ("train", "val"))
    backbones = get_backbones(info.backbone)
    weights = weights_from_first(job, weights)
    # The first worker has drawn more by now than the others, and all must begin to build with the same weights.
    keras.utils.set_random_seed(params.seed)
    with distribution():
        networks = [build_backbone(backbone, info.image_size) for backbone in backbones]
        head = build_head(train.size, len(info.class_names), params.train, params.seed)
        copy = assemble(networks, backbones, head, info.image_size, info.pooling)
        copy.set_weights(weights)
        tuned = fine_tune(
            copy,
            networks,
            backbones,
            Images(tuple(shard_paths(paths.TFRECORDS, "train")), train.labels),
            Images(tuple(shard_paths(paths.TFRECORDS, "val")), val.labels),
            params.fine_tune,
            params.train,
            params.augment,
            seed=params.seed,
            checkpoints=checkpoints if job is None else JobCheckpoints(job, checkpoints),
            jit_compile=jit_compile(params.runtime.xla, trains=True),
        )
    return copy, tuned


if __name__ == "__main__":
    main()
