"""What the preprocess stage writes, read by others: by TensorFlow Datasets and by the documented code."""

import hashlib
import io
import json
import re
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog import paths
from catdog.config import load_params, validate_params
from catdog.files import read_json, write_json
from catdog.images import model_pixels
from catdog.records import RecordReader, shard_paths, verify_shards
from catdog.tracking import STAGES
from stage_scripts import without_mlflow

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tfrecords.md"
CLASSES = ["Ä hörnchen", "cat", "dog 猫"]
COUNTS = {"train": 41, "val": 7, "test": 12, paths.UNUSED: 5}
SIZE = 40
STORED = {"image_size": SIZE, "resize": "crop", "jpeg_quality": 90, "shard_megabytes": 0.012}


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(coarse).resize((61, 50), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def run_preprocess() -> dict:
    """Runs the stage's script in the working directory, but for what it tells MLflow; returns its report."""
    found = {}
    params = validate_params(load_params(ROOT / "params.yaml").model_dump() | {"preprocess": STORED})

    def finish(report, summary):
        write_json(STAGES["preprocess"].report, report)
        found.update(report, summary=summary)

    def nowhere(values):
        """There is no MLflow."""

    run = types.SimpleNamespace(params=params, finish=finish, measure=nowhere, note=nowhere)
    without_mlflow("preprocess", run).main()
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder after the real preprocess stage: its root, its manifest and the stage's report."""
    root = tmp_path_factory.mktemp("project")
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        paths.RAW.parent.mkdir()
        with zipfile.ZipFile(paths.RAW, "w") as archive:
            for seed, split in enumerate(np.random.default_rng(1).permutation(list(Counter(COUNTS).elements()))):
                label = CLASSES[seed % 3] if split != paths.UNUSED else "not a class"
                name = f"{label}/{seed} ü.png"
                archive.writestr(name, picture(seed))
                rows.append({"path": name, "label": label, "split": split})
        manifest = pd.DataFrame(rows)
        manifest.to_csv(paths.MANIFEST, index=False)
        write_json(paths.DATA_REPORT, {"classes": CLASSES})
        report = run_preprocess()
    return root, manifest, report


@pytest.fixture
def folder(project, monkeypatch):
    """The TFRecords, seen from the repository's root as the documentation names them."""
    monkeypatch.chdir(project[0])
    return paths.TFRECORDS


@pytest.fixture
def builder(folder):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))


def ours(folder, split):
    """Pixels, labels and paths of a split, by the pipeline's own reader."""
    reader = RecordReader(shard_paths(folder, split), 8)
    pixels = np.concatenate(list(reader))
    return pixels, reader.labels.tolist(), reader.paths


@pytest.mark.parametrize("split", paths.SPLITS)
def test_the_stage_stores_the_split_of_the_manifest_in_its_order(project, folder, split):
    _, manifest, report = project
    rows = manifest[manifest["split"] == split]
    pixels, labels, names = ours(folder, split)
    assert names == list(rows["path"])
    assert [CLASSES[label] for label in labels] == list(rows["label"])
    assert len(pixels) == report["images"][split] == COUNTS[split]
    with zipfile.ZipFile(paths.RAW) as archive:
        for name, stored in zip(names, pixels, strict=True):
            expected = model_pixels(archive.read(name), size=SIZE, mode="crop", quality=90)
            assert np.array_equal(stored, expected)


def test_images_outside_the_three_splits_are_left_out(project, folder):
    _, manifest, report = project
    stored = {name for split in paths.SPLITS for name in ours(folder, split)[2]}
    assert stored == set(manifest[manifest["split"] != paths.UNUSED]["path"])
    assert report["images"] == {split: COUNTS[split] for split in paths.SPLITS}
    assert "60 images" in report["summary"]


def test_the_report_describes_the_files(project, folder):
    report = read_json(paths.PREPROCESS_REPORT)
    sizes = [path.stat().st_size for path in folder.glob("*.tfrecord")]
    assert report["shards"] == len(sizes) > 6
    assert report["bytes"] == sum(sizes)
    assert report["largest_shard_bytes"] == max(sizes) < 1.5 * 0.012e6
    assert [report[key] for key in ("classes", "image_size", "resize", "jpeg_quality")] == [CLASSES, SIZE, "crop", 90]
    verify_shards(folder, paths.SPLITS)


@pytest.mark.parametrize("split", paths.SPLITS)
def test_tensorflow_datasets_reads_every_feature_of_every_image_in_order(builder, folder, split):
    pixels, labels, names = ours(folder, split)
    examples = list(builder.as_dataset(split=split).as_numpy_iterator())
    assert len(examples) == builder.info.splits[split].num_examples == COUNTS[split]
    assert [example["image/path"].decode() for example in examples] == names
    assert [example["image/class/label"] for example in examples] == labels
    assert [example["image/class/text"].decode() for example in examples] == [CLASSES[label] for label in labels]
    for example, expected in zip(examples, pixels, strict=True):
        assert (example["image/height"], example["image/width"], example["image/format"]) == (SIZE, SIZE, b"jpeg")
        assert_nearly(example["image/encoded"], expected)


def assert_nearly(found, expected):
    """The fast transform for JPEG, TensorFlow's default, moves single values by a few levels."""
    assert (found.shape, found.dtype) == (expected.shape, np.uint8)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 8
    assert difference.mean() < 2


def test_tensorflow_datasets_hands_on_the_stored_bytes(builder, folder):
    import tensorflow_datasets as tfds

    decoders = {"image/encoded": tfds.decode.SkipDecoding()}
    pixels, _, _ = ours(folder, "val")
    for example, expected in zip(
        builder.as_dataset(split="val", decoders=decoders).as_numpy_iterator(), pixels, strict=True
    ):
        stored = np.asarray(Image.open(io.BytesIO(example["image/encoded"])))
        assert np.array_equal(stored, expected)


def test_tensorflow_datasets_knows_classes_splits_sizes_and_files(builder, folder):
    import tensorflow as tf

    features = builder.info.features
    assert (features["image/class/label"].names, features["image/class/label"].num_classes) == (CLASSES, len(CLASSES))
    assert features["image/encoded"].shape == (SIZE, SIZE, 3)
    assert list(builder.info.splits) == list(paths.SPLITS)
    for split in paths.SPLITS:
        info = builder.info.splits[split]
        assert info.filepaths == [Path(path) for path in map(str, shard_paths(folder, split))]
        assert info.num_bytes == sum(path.stat().st_size for path in shard_paths(folder, split))
        records = [sum(1 for _ in tf.data.TFRecordDataset([str(path)])) for path in shard_paths(folder, split)]
        assert info.shard_lengths == records
    assert len(list(builder.as_dataset(split="train[:7]"))) == 7


def test_the_files_are_what_tensorflow_datasets_itself_would_write(builder, folder):
    """All fields in their canonical form: nothing that a reader of the format would not expect."""
    from google.protobuf import json_format

    assert read_json(folder / "features.json") == json_format.MessageToDict(builder.info.features.to_proto())
    written = read_json(folder / "dataset_info.json")
    restored = json_format.MessageToDict(builder.info.as_proto)
    assert written == {name: restored[name] for name in written}


def test_checksums_are_those_of_the_files(builder, folder):
    listed = dict(builder.info.as_proto.download_checksums)
    files = sorted(folder.glob("*.tfrecord"))
    assert sorted(listed) == [path.name for path in files]
    for path in files:
        assert listed[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_stage_again_elsewhere_with_more_processors_writes_the_same_bytes(project, folder, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in (paths.RAW, paths.MANIFEST, paths.DATA_REPORT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # an optional extra: not needed to write
    run_preprocess()
    assert {path.name: path.read_bytes() for path in paths.TFRECORDS.iterdir()} == before


# The documented code


def code_blocks() -> dict[str, str]:
    """The page's Python, by the heading above it."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    blocks = {part.splitlines()[0]: "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL)) for part in sections}
    return {heading: code for heading, code in blocks.items() if code}


def run_block(*headings) -> dict:
    """Runs blocks of the page one after another, as a reader does who pastes them; returns what they define."""
    names: dict = {}
    for heading in headings:
        exec(compile(code_blocks()[heading], f"{PAGE.name}: {heading}", "exec"), names)
    return names


def test_every_block_of_the_page_is_tested_here():
    assert list(code_blocks()) == ["tf.data", "TensorFlow Datasets", "JAX and PyTorch", "Checksums"]


@pytest.mark.parametrize("heading", ["tf.data", "TensorFlow Datasets"])
def test_documented_reader_gives_our_images_and_labels(folder, heading, capsys):
    names = run_block(heading, "JAX and PyTorch")
    batches = list(names["train"].as_numpy_iterator())
    assert [len(images) for images, _ in batches] == [32, 9]
    pixels, labels, _ = ours(folder, "train")
    assert np.concatenate([batch for _, batch in batches]).tolist() == labels
    assert_nearly(np.concatenate([images for images, _ in batches]), pixels)
    assert capsys.readouterr().out == f"(32, {SIZE}, {SIZE}, 3) uint8 int64\n(9, {SIZE}, {SIZE}, 3) uint8 int64\n"
    if heading == "TensorFlow Datasets":
        assert names["classes"] == CLASSES


def test_documented_accurate_transform_gives_the_very_pixels(folder):
    code = code_blocks()["tf.data"].replace("channels=3)", 'channels=3, dct_method="INTEGER_ACCURATE")')
    names: dict = {}
    exec(code, names)
    found = np.concatenate([images for images, _ in names["train"].as_numpy_iterator()])
    assert np.array_equal(found, ours(folder, "train")[0])


def test_documented_check_finds_a_damaged_file(folder, monkeypatch, tmp_path):
    run_block("Checksums")
    copy = tmp_path / folder
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    last = sorted(folder.glob("*.tfrecord"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(AssertionError, match=f"{last.name} is damaged"):
        run_block("Checksums")


def test_documented_table_lists_the_features(folder):
    listed = set(re.findall(r"`(image/[a-z/]+)`", PAGE.read_text(encoding="utf-8")))
    content = json.loads((folder / "features.json").read_text())
    assert listed == set(content["featuresDict"]["features"])
