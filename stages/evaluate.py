"""Judges the saved model, end to end, on the untouched test split."""

import time

import numpy as np
from sklearn.metrics import confusion_matrix

from catdog import paths
from catdog.archives import open_archive, read_member
from catdog.evaluation import class_table, compute_metrics, predict_classes, prediction_table, roc_table
from catdog.files import write_text
from catdog.images import decode
from catdog.inference import choose_engine, compile_forward
from catdog.model import class_probabilities, load_model
from catdog.plots import plot_confusion, plot_gallery, plot_roc
from catdog.records import RecordReader, shard_paths, verify_shards
from catdog.runtime import device_facts, prepare_keras
from catdog.tracking import log_data_hash, stage


def main() -> None:
    """Runs the stage."""
    with stage("evaluate") as run:
        log_data_hash(run, paths.TFRECORDS)
        params = run.params.evaluate
        verify_shards(paths.TFRECORDS, ["test"])
        prepare_keras(run.params.seed, precision=run.params.runtime.precision)
        model, info = load_model(paths.MODEL)
        engine = choose_engine(run.params.embed.engine)
        run.note(device_facts(run.params.runtime.xla) | {"engine": engine})
        batch_size = run.params.embed.batch_size
        forward = compile_forward(model, engine, batch_size=batch_size, xla=run.params.runtime.xla)

        started = time.monotonic()
        reader = RecordReader(shard_paths(paths.TFRECORDS, "test"), batch_size)
        probabilities = class_probabilities(forward(reader))
        run.measure({"images_per_second": round(len(probabilities) / (time.monotonic() - started), 1)})
        labels = reader.labels

        metrics = compute_metrics(labels, probabilities, params.threshold)
        predictions = prediction_table(reader.paths, labels, probabilities, info.class_names, params.threshold)
        roc = roc_table(labels, probabilities, info.class_names)
        classes = class_table(labels, probabilities, info.class_names, params.threshold)
        write_text(paths.PREDICTIONS, predictions.to_csv(index=False))
        write_text(paths.ROC, roc.to_csv(index=False))
        write_text(paths.EVALUATION_PICTURES / "classes.csv", classes.to_csv(index=False))

        predicted = predict_classes(probabilities, params.threshold)
        matrix = confusion_matrix(labels, predicted, labels=np.arange(len(info.class_names)))
        plot_confusion(matrix, info.class_names, paths.EVALUATION_PICTURES / "confusion.png")
        plot_roc(roc, metrics["roc_auc"], paths.EVALUATION_PICTURES / "roc.png")
        wrong = predictions[~predictions["correct"]].sort_values(["confidence", "path"], ascending=[False, True])
        shown = wrong.head(params.gallery)
        with open_archive(paths.RAW) as archive:
            plot_gallery(
                [decode(read_member(archive, path)) for path in shown["path"]],
                [f"{row.label}, called {row.predicted}\n{row.confidence:.1%}" for row in shown.itertuples()],
                paths.EVALUATION_PICTURES / "mistakes.png",
                title=f"The {len(shown)} most confident of {len(wrong):,} mistakes"
                if len(wrong)
                else f"No mistake among {len(predictions):,} test pictures",
            )
        run.finish(
            metrics | {"test_images": len(predictions)},
            f"{metrics['accuracy']:.2%} of {len(predictions):,} test images right, "
            f"log loss {metrics['log_loss']:.4f}, ROC AUC {metrics['roc_auc']:.4f}",
        )


if __name__ == "__main__":
    main()
