"""Fits the head on the features, then saves the whole model."""

import time

from catdog import paths
from catdog.backbones import build_backbone, get_backbone
from catdog.features import open_features
from catdog.files import read_json, write_text
from catdog.model import ModelInfo, assemble, build_head, save_model
from catdog.plots import plot_learning_curves
from catdog.runtime import device_name, prepare_keras
from catdog.serving import log_served_model
from catdog.tracking import log_data_hash, stage
from catdog.training import best_epoch, fit_head
from catdog.weights import load_weights


def main() -> None:
    """Runs the stage."""
    with stage("train") as run:
        log_data_hash(run, paths.FEATURES)
        params = run.params.train
        prepare_keras(run.params.seed)
        run.note({"device": device_name()})
        # What the features were made with, not what params.yaml says: the model must match the features.
        dataset, embedded = read_json(paths.PREPROCESS_REPORT), read_json(paths.FEATURES_INFO)
        # First of all that draws random numbers, as in embed: so `weights: random` is the same network in both.
        backbone = get_backbone(embedded["backbone"])
        network = build_backbone(backbone, dataset["image_size"])
        load_weights(network, backbone, embedded["weights"], pretrained_dir=paths.PRETRAINED, root=run.root)
        train, val = (open_features(paths.FEATURES, split) for split in ("train", "val"))
        head = build_head(train.size, len(dataset["classes"]), params, run.params.seed)
        started = time.monotonic()
        history = fit_head(head, train, val, params, seed=run.params.seed)
        run.measure({"fit_seconds": round(time.monotonic() - started, 2)})
        write_text(paths.HISTORY, history.round(6).to_csv(index=False))
        run.log_curves(history)
        best = best_epoch(history)
        plot_learning_curves(history, int(best["epoch"]), paths.LEARNING_CURVES)

        model = assemble(network, backbone, head, dataset["image_size"], embedded["pooling"])
        info = ModelInfo(
            class_names=tuple(dataset["classes"]),
            image_size=dataset["image_size"],
            resize=dataset["resize"],
            jpeg_quality=dataset["jpeg_quality"],
            backbone=backbone.name,
            weights=embedded["weights"],
            pooling=embedded["pooling"],
        )
        save_model(model, info, paths.MODEL)
        log_served_model(run.run_id, paths.MODEL)
        run.finish(
            {
                "best_epoch": int(best["epoch"]),
                "epochs": len(history),
                "best_val_loss": round(float(best["val_loss"]), 6),
                "best_val_accuracy": round(float(best["val_accuracy"]), 6),
                "head_parameters": head.count_params(),
                "model_parameters": model.count_params(),
                "model_bytes": paths.MODEL.stat().st_size,
            },
            f"best of {len(history)} epochs is {best['epoch']:.0f}: validation loss {best['val_loss']:.4f}, "
            f"accuracy {best['val_accuracy']:.2%}",
        )


if __name__ == "__main__":
    main()
