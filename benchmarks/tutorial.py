"""What a user waits for: this pipeline's embed and train against the recipe of the usual tutorials.

    PYTHONPATH=src python benchmarks/tutorial.py photographs.zip
    PYTHONPATH=src python benchmarks/tutorial.py photographs.zip --epochs 2     # the recipe scaled to its 10 epochs

The recipe is that of www.tensorflow.org/tutorials/images/transfer_learning: a frozen MobileNetV2 inside `fit`, behind
layers that flip, rotate and zoom, fed by `image_dataset_from_directory` in batches of 32; dropout 0.2, Adam with a
learning rate of 0.001, 10 epochs. Against it stand the stages embed and train with the repository's params.yaml:
without augmentation, and with three augmented views of each training image.

All see the same photographs in the same split, with the same ImageNet weights, at the same size. Each is a process of
its own, or two, whose start counts. Not counted is what is done once for any number of experiments: the stages split
and preprocess, and for the recipe the writing of its folders of JPEG files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE_EPOCHS = 10
VIEWS = 3


@dataclass(frozen=True)
class Result:
    """One way of training."""

    name: str
    seconds: float
    accuracy: float  # on the validation split, 0..1
    peak: float  # MiB, of the largest process
    note: str = ""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="a .zip of photographs, one folder a class or with Kaggle's names")
    parser.add_argument("--epochs", type=int, default=RECIPE_EPOCHS, help="of the recipe that are run, 1 to 10")
    parser.add_argument("--images", type=int, default=0, help="take only so many, evenly spread; 0: all")
    parser.add_argument("--recipe", action="store_true", help=argparse.SUPPRESS)  # archive is the project's folder then
    options = parser.parse_args()
    if not 1 <= options.epochs <= RECIPE_EPOCHS:
        parser.error(f"--epochs {options.epochs}: 1 to {RECIPE_EPOCHS}")
    if options.recipe:
        run_recipe(options.archive, options.epochs)
        return
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        prepare(project, options.archive, options.images)
        results = [time_recipe(project, options.epochs)]
        for views in (0, VIEWS):
            results.append(time_pipeline(project, views))
    report(results)


def prepare(project: Path, archive: Path, count: int) -> None:
    """Makes a project with the photographs split and preprocessed, and the same as folders of JPEG files."""
    import cv2
    import numpy as np
    import pandas as pd

    from catdog.archives import open_archive
    from catdog.images import decode

    for name in ("src", "stages", "params.yaml", "dvc.yaml", "pretrained"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, project / name)
    (project / "data").mkdir()
    choose_photographs(archive, count, project / "data/raw.zip")
    for stage in ("split", "preprocess"):
        timed([f"stages/{stage}.py"], project)
    manifest = pd.read_csv(project / "data/manifest.csv", dtype={"path": str, "label": str}, keep_default_na=False)
    manifest = manifest[manifest["split"].isin(["train", "val"])]

    with open_archive(project / "data/raw.zip") as opened, ThreadPoolExecutor() as pool:

        def write(number: int, path: str, label: str, split: str) -> None:
            # TensorFlow cannot read every format that the pipeline accepts.
            _, data = cv2.imencode(".jpg", np.ascontiguousarray(decode(opened.read(path))[..., ::-1]))
            target = project / "folders" / split / label / f"{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.tobytes())

        columns = (manifest[name] for name in ("path", "label", "split"))
        list(pool.map(write, range(len(manifest)), *columns))
    counts = manifest["split"].value_counts()
    print(f"{counts['train']:,} photographs to train, {counts['val']:,} to validate, {machine()}", flush=True)


def machine() -> str:
    """Names the processor."""
    code = "from catdog.runtime import *; prepare_keras(0); print(device_name())"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def choose_photographs(archive: Path, count: int, target: Path) -> None:
    """Copies an archive, or as many of its files as are asked for, evenly spread over its sorted names."""
    if not count:
        shutil.copy2(archive, target)
        return
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as written:
        names = sorted(info.filename for info in source.infolist() if info.file_size and not info.is_dir())
        for position in range(min(count, len(names))):
            name = names[position * len(names) // min(count, len(names))]
            written.writestr(name, source.read(name))


def timed(command: Sequence[str], project: Path) -> tuple[float, float]:
    """Runs a Python script in the project; returns its seconds and its peak memory in MiB."""
    environment = os.environ | {"DVC_ROOT": str(project), "PYTHONPATH": "src"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=project, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def time_pipeline(project: Path, views: int) -> Result:
    """Runs embed and train with so many augmented views of each training image."""
    set_views(project / "params.yaml", views)
    shutil.rmtree(project / "data/features", ignore_errors=True)
    (embed, embed_peak), (train, train_peak) = (timed([f"stages/{name}.py"], project) for name in ("embed", "train"))
    accuracy = json.loads((project / "reports/train.json").read_text())["best_val_accuracy"]
    return Result(
        f"embed + train, {views} views",
        embed + train,
        accuracy,
        max(embed_peak, train_peak),
        f"{embed:.1f} + {train:.1f} s",
    )


def set_views(path: Path, views: int) -> None:
    """Writes augment.views into a params.yaml."""
    from ruamel.yaml import YAML

    yaml = YAML()
    tree = yaml.load(path)
    tree["augment"]["views"] = views
    with path.open("w") as file:
        yaml.dump(tree, file)


def time_recipe(project: Path, epochs: int) -> Result:
    """Runs the recipe, and scales its time to ten epochs where it ran for fewer."""
    script = str(Path(__file__).resolve())
    seconds, peak = timed([script, str(project), "--recipe", "--epochs", str(epochs)], project)
    told = json.loads((project / "recipe.json").read_text())
    missing = RECIPE_EPOCHS - epochs
    # The first epoch also builds the network's graph; the ones left out would not have.
    an_epoch = statistics.mean(told["epoch_seconds"][1:] or told["epoch_seconds"])
    note = f"{an_epoch:.1f} s an epoch"
    if missing:
        note += f"; SCALED from {epochs} of {RECIPE_EPOCHS} epochs (measured {seconds:.1f} s)"
    return Result("the tutorials' recipe", seconds + missing * an_epoch, max(told["val_accuracy"]), peak, note)


def run_recipe(project: Path, epochs: int) -> None:
    """Trains as the tutorials do, in this process, and writes recipe.json: seconds and accuracies by epoch."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from catdog.backbones import get_backbone
    from catdog.runtime import notices_held_back

    with notices_held_back():
        import keras
        import tensorflow as tf

        tf.zeros(())  # the first operation writes a notice once more

    params = json.loads((project / "data/tfrecords/preprocess.json").read_text())
    size = params["image_size"]
    keras.utils.set_random_seed(20)
    train, val = (
        keras.utils.image_dataset_from_directory(
            project / "folders" / split, label_mode="binary", image_size=(size, size), batch_size=32, seed=20
        ).prefetch(tf.data.AUTOTUNE)
        for split in ("train", "val")
    )
    network = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(size, size, 3))
    shipped = get_backbone("mobilenetv2").shipped
    assert shipped
    network.load_weights(project / "pretrained" / shipped)
    network.trainable = False
    pixels = keras.Input((size, size, 3))
    varied = keras.Sequential(
        [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.2), keras.layers.RandomZoom(0.2)]
    )(pixels)
    maps = network(keras.layers.Rescaling(1 / 127.5, offset=-1)(varied), training=False)
    features = keras.layers.Dropout(0.2)(keras.layers.GlobalAveragePooling2D()(maps))
    model = keras.Model(pixels, keras.layers.Dense(1, activation="sigmoid")(features))
    # The default of `compile`, jit_compile="auto", would take XLA, which is 15 times slower on a CPU: the kinder one.
    model.compile(keras.optimizers.Adam(0.001), "binary_crossentropy", metrics=["accuracy"], jit_compile=False)
    marks = [time.perf_counter()]
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: marks.append(time.perf_counter()))
    history = model.fit(train, validation_data=val, epochs=epochs, callbacks=[clock], shuffle=False, verbose=0).history
    told = {
        "epoch_seconds": [after - before for before, after in itertools.pairwise(marks)],
        "val_accuracy": history["val_accuracy"],
    }
    (project / "recipe.json").write_text(json.dumps(told))


def report(results: Sequence[Result]) -> None:
    """Prints the table; the first result is what the others are compared with."""
    print(f"{'':<24} {'seconds':>8} {'ratio':>6} {'best val accuracy':>18} {'peak MiB':>9}")
    for result in results:
        ratio = results[0].seconds / result.seconds
        print(
            f"{result.name:<24} {result.seconds:>8.1f} {ratio:>6.1f} {result.accuracy:>18.4f} {result.peak:>9.0f}"
            f"  {result.note}"
        )


if __name__ == "__main__":
    main()
