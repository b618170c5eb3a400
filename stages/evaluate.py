"""Judges the saved model, end to end, on the untouched test split."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from catdog import paths
from catdog.archives import open_archive, read_member
from catdog.corruptions import collect_pictures
from catdog.evaluation import LabelledPredictions, choose_images, compute_metrics, prediction_table
from catdog.evaluation_page import write_report
from catdog.evaluation_pictures import choose_galleries, collect_galleries, draw_gallery, draw_tables, import_libraries
from catdog.evaluation_tables import evaluation_tables, robustness_table
from catdog.feature_map import MOST_IMAGES, feature_table, project, split_outputs, with_features
from catdog.files import read_json, read_manifest, sha256_of, write_text
from catdog.gradcam import build_gradcam
from catdog.images import Pixels
from catdog.inference import Forward, choose_engine, compile_forward, single_picture_seconds
from catdog.model import class_probabilities, load_model, predict_classes
from catdog.model_card import write_model_card
from catdog.records import RecordReader, shard_paths, verify_shards
from catdog.report_content import ReportContent, describe_weights
from catdog.runtime import device_facts, prepare_keras_for
from catdog.second_process import second_process
from catdog.slices import sharpness
from catdog.tracking import StageRun, log_data_hash, stage


def main() -> None:
    """Runs the stage."""
    with second_process() as second, stage("evaluate", second, meanwhile=prepare_keras_for) as run:
        second.submit(import_libraries)
        log_data_hash(run, paths.TFRECORDS)
        params, seed = run.params.evaluate, run.params.seed
        verify_shards(paths.TFRECORDS, ["test"])
        model, info = load_model(paths.MODEL)
        outputs = model.output_shape[-1]
        engine = choose_engine(run.params.embed.engine)
        run.note(device_facts(run.params.runtime.xla) | {"engine": engine})
        forward = compile_forward(
            with_features(model, info), engine, batch_size=run.params.embed.batch_size, xla=run.params.runtime.xla
        )

        started = time.monotonic()
        reader = _open_test_images(run)
        sharp: list[npt.NDArray[np.float32]] = []
        features, output = split_outputs(forward(_measured(reader, sharp)), outputs)
        run.measure({"images_per_second": round(len(output) / (time.monotonic() - started), 1)})
        run.measure({"latency_ms": round(1000 * single_picture_seconds(forward, info.image_size), 2)})
        predictions = LabelledPredictions(
            tuple(reader.paths), reader.labels, class_probabilities(output), info.class_names, info.threshold
        )

        # Beside the galleries and their heat maps, which Keras computes here, the other process judges and draws.
        judged = second.submit(
            evaluation_tables,
            predictions,
            read_manifest(paths.MANIFEST),
            np.concatenate(sharp),
            temperature=info.temperature,
            resamples=params.resamples,
            seed=seed,
        )
        measured = second.submit(compute_metrics, predictions)
        shown, points = choose_images(predictions.labels, MOST_IMAGES, seed), None
        if params.feature_map != "none":
            points = second.submit(project, features[shown], params.feature_map, seed)
        tables = judged.result()
        drawn = [second.submit(draw_tables, tables, predictions, paths.EVALUATION_PICTURES)]
        pictures: dict[str, Path] = {"learning_curves": paths.LEARNING_CURVES}
        with open_archive(paths.RAW) as archive:
            galleries = collect_galleries(
                predictions,
                choose_galleries(predictions, params.gallery),
                lambda path: read_member(archive, path),
                info,
                build_gradcam(model, info, engine) if params.gradcam else None,
            )
            for gallery in galleries:
                pictures |= draw_gallery(gallery, paths.EVALUATION_PICTURES)
        asked: dict[str, pd.DataFrame] = {}
        if points is not None:
            asked["features"] = feature_table(predictions, shown, points.result())
        if params.corruptions:
            asked["corruptions"] = _try_corruptions(run, forward, predictions, outputs)
        drawn.append(second.submit(draw_tables, asked, predictions, paths.EVALUATION_PICTURES))
        tables |= asked | {"predictions": prediction_table(predictions)}
        for name, table in tables.items():
            file = paths.PREDICTIONS if name == "predictions" else paths.TABLES / f"{name}.csv"
            write_text(file, table.to_csv(index=False))

        metrics = measured.result()
        of_accuracy = tables["metrics"].set_index("metric").loc["accuracy"].to_dict()
        report = {
            "accuracy": metrics.pop("accuracy"),
            "accuracy_low": of_accuracy["low"],
            "accuracy_high": of_accuracy["high"],
            **metrics,
            "test_images": len(predictions.paths),
        }
        embedded = read_json(paths.FEATURES_INFO)
        content = ReportContent(
            tables=tables,
            metrics=report,
            pictures=pictures | {name: path for part in drawn for name, path in part.result().items()},
            info=info,
            params=run.params,
            facts=read_json(paths.DATA_REPORT)
            | {"dataset": run.params.dataset, "dataset_hash": f"SHA-256:{sha256_of(paths.RAW)}"},
            training=read_json(paths.TRAIN_REPORT),
            weights=describe_weights(info.backbone, info.weights, embedded["weights_sha256"]),
            model_bytes=paths.MODEL.stat().st_size,
        )
        for write, file in ((write_report, paths.REPORT_PAGE), (write_model_card, paths.MODEL_CARD)):
            second.submit(write, file, content).result()
        run.finish(
            report,
            f"{report['accuracy']:.2%} of {len(predictions.paths):,} test images right "
            f"({report['accuracy_low']:.2%} to {report['accuracy_high']:.2%}), log loss {report['log_loss']:.4f}; "
            f"{paths.REPORT_PAGE} shows more",
        )


def _open_test_images(run: StageRun) -> RecordReader:
    return RecordReader(shard_paths(paths.TFRECORDS, "test"), run.params.embed.batch_size)


def _measured(batches: Iterable[Pixels], sharp: list[npt.NDArray[np.float32]]) -> Iterator[Pixels]:
    """Passes the batches on, and keeps how sharp their pictures are."""
    for batch in batches:
        sharp.append(sharpness(batch))
        yield batch


def _try_corruptions(run: StageRun, forward: Forward, predictions: LabelledPredictions, outputs: int) -> pd.DataFrame:
    """The accuracy on damaged copies of some of the test pictures."""

    def predict(batches: Iterable[Pixels]) -> npt.NDArray[np.int64]:
        _, output = split_outputs(forward(batches), outputs)
        return predict_classes(class_probabilities(output), predictions.threshold)

    chosen = choose_images(predictions.labels, run.params.evaluate.corruptions, run.params.seed)
    return robustness_table(
        collect_pictures(_open_test_images(run), chosen),
        chosen,
        predictions,
        predict,
        seed=run.params.seed,
        batch_size=run.params.embed.batch_size,
    )


if __name__ == "__main__":
    main()
