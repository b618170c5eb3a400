"""The whole pipeline through DVC: what it leaves, what it repeats, and that it repeats it exactly."""

import csv
import json
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from conftest import SHAPES, SPLITS, STAGES, declared_outs


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text())


def count_records(shard):
    """The records of a TFRecord file, counted from its framing: length, checksum, data, checksum."""
    data, position, count = shard.read_bytes(), 0, 0
    while position < len(data):
        position += 8 + 4 + int.from_bytes(data[position : position + 8], "little") + 4
        count += 1
    assert position == len(data), f"{shard} ends inside a record"
    return count


# After one `dvc repro`


def test_every_declared_output_exists_and_is_locked(finished):
    outs = declared_outs(finished)
    assert list(outs) == ["source", *STAGES]
    assert set(finished.lock()) == {"source", *STAGES}
    for name, paths in outs.items():
        assert {out["path"] for out in finished.lock()[name].get("outs", [])} == set(paths)
        assert [path for path in paths if not (finished.root / path).exists()] == []


def test_metrics_are_finite_and_better_than_guessing(finished):
    metrics = read_json(finished.root / "reports/metrics.json")
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["accuracy"] > 0.6
    assert metrics["test_images"] == len(read_csv(finished.root / "reports/predictions.csv"))


def test_second_repro_runs_nothing(finished):
    assert finished.repro() == []


def test_dvc_shows_metrics_and_plots(finished):
    shown = finished.dvc("metrics", "show", "--json")
    numbers = json.loads(shown.stdout)[""]["data"]["reports/metrics.json"]["data"]
    assert numbers == read_json(finished.root / "reports/metrics.json")


def test_no_group_and_no_content_crosses_splits(finished):
    rows = read_csv(finished.root / "data/manifest.csv")
    assert {row["split"] for row in rows} == set(SPLITS)
    for column in ("group", "sha256"):
        assert len({(row[column], row["split"]) for row in rows}) == len({row[column] for row in rows})


def test_manifest_and_rejected_list_every_raw_file_once(finished):
    listed = [
        row["path"] for name in ("data/manifest.csv", "reports/rejected.csv") for row in read_csv(finished.root / name)
    ]
    with zipfile.ZipFile(finished.root / "data/raw.zip") as archive:
        files = [member.filename for member in archive.infolist() if not member.is_dir()]
    assert sorted(listed) == sorted(files)


@pytest.mark.parametrize("split", SPLITS)
def test_shards_and_features_hold_every_image_of_a_split(finished, split):
    info = read_json(finished.root / "data/tfrecords/preprocess.json")
    rows = [row for row in read_csv(finished.root / "data/manifest.csv") if row["split"] == split]
    shards = sorted((finished.root / "data/tfrecords").glob(f"{split}-*.tfrecord"))
    assert [*map(count_records, shards)] == [
        len(np.load(finished.root / f"data/features/{shard.stem}.features.npy")) for shard in shards
    ]
    assert sum(map(count_records, shards)) == info["images"][split] == len(rows)
    labels = np.concatenate([np.load(finished.root / f"data/features/{shard.stem}.labels.npy") for shard in shards])
    assert [info["classes"][number] for number in labels] == [row["label"] for row in rows]
    assert len(shards) > (split == "train")  # several, so that their order is put to the test


PREDICT = """
import base64, json, sys, zipfile
import keras, mlflow, numpy as np, pandas as pd
from catdog.images import model_pixels

uri, run_id, *paths = sys.argv[1:]
model = keras.models.load_model("models/model.keras")
info = json.load(open("data/tfrecords/preprocess.json"))
archive = zipfile.ZipFile("data/raw.zip")
files = [archive.read(path) for path in paths]
pixels = [
    model_pixels(data, size=info["image_size"], mode=info["resize"], quality=info["jpeg_quality"]) for data in files
]
plain = model.predict(np.stack(pixels).astype("float32"), verbose=0)[:, 0]
mlflow.set_tracking_uri(uri)
served = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
table = served.predict(pd.DataFrame({"image": [base64.b64encode(data).decode() for data in files]}))
print(json.dumps({"plain": plain.tolist(), "served": table["p_" + info["classes"][1]].tolist(),
                  "label": table["label"].tolist()}))
"""


def test_evaluation_plain_keras_and_the_served_model_agree(finished):
    rows = read_csv(finished.root / "reports/predictions.csv")[:5]
    second = read_json(finished.root / "data/tfrecords/preprocess.json")["classes"][1]
    run = finished.store().last_child("train")
    uri = f"sqlite:///{finished.root / 'mlflow.db'}"
    asked = ("-c", PREDICT, uri, run.info.run_id, *(row["path"] for row in rows))
    done = replace(finished, warm=True).run("python", *asked, PYTHONPATH="src")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    evaluated = [float(row[f"p_{second}"]) for row in rows]
    assert answers["plain"] == pytest.approx(evaluated, abs=1e-4)
    assert answers["served"] == pytest.approx(evaluated, abs=1e-4)
    assert answers["label"] == [row["predicted"] for row in rows]


# What a change repeats


def test_another_learning_rate_repeats_only_the_head(experiment_stages):
    assert experiment_stages["calm"] == ["train", "evaluate", "track"]


def test_larger_galleries_repeat_only_the_evaluation(experiment_stages):
    assert experiment_stages["repro"] == ["evaluate", "track"]


def test_another_backbone_repeats_embed_and_what_follows_without_network(experiment_stages):
    assert experiment_stages["vgg16"] == ["embed", "train", "evaluate", "track"]


def test_the_same_experiment_again_comes_from_the_cache(experiment_stages):
    assert experiment_stages["again"] == ["track"]
    assert experiment_stages["gallery"] == ["track"]


# From nothing, at another place


def test_outputs_are_byte_identical_at_another_place_after_interruptions(finished, elsewhere):
    assert elsewhere.out_hashes() == finished.out_hashes()


def test_the_users_tracking_store_is_respected(elsewhere, other_store):
    (parent,) = other_store.parents()
    assert parent.info.status == "FINISHED"
    assert not (elsewhere.root / "mlflow.db").exists()


def test_a_folder_with_three_classes_goes_through(shapes):
    root = shapes.root
    assert read_json(root / "data/tfrecords/preprocess.json")["classes"] == list(SHAPES)
    rows = read_csv(root / "reports/predictions.csv")
    assert {row["label"] for row in rows} == set(SHAPES)
    for row in rows:
        chances = {kind: float(row[f"p_{kind}"]) for kind in SHAPES}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == max(chances, key=chances.get)
    metrics = read_json(root / "reports/metrics.json")
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["accuracy"] > 0.6
    (parent,) = shapes.store().parents()
    assert parent.data.metrics["accuracy"] == metrics["accuracy"]
