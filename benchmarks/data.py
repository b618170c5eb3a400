"""What `split` and `preprocess` cost, from 2,000 to 25,000 photographs: images a second and peak memory.

    PYTHONPATH=src python benchmarks/data.py photographs.zip more.zip --counts 2000 12500 25000

The photographs of the archives, one folder a class or Kaggle's names, are repeated with noise until there are enough.
The real stage scripts run, as processes of their own, in a copy of the project; their start (imports, tracking store)
counts. The search for near-duplicates is measured alone, on 100,000 hashes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from catdog.archives import open_archive
from catdog.labels import label_files
from catdog.quality import group_duplicates

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--counts", nargs="+", type=int, default=[2000, 12500, 25000])
    options = parser.parse_args()
    print(f"{'images':>7}  {'stage':<10} {'seconds':>8} {'images/s':>9} {'peak MiB':>9}")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder)
            for name in ("src", "stages", "params.yaml", "dvc.yaml"):
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
                copy(ROOT / name, project / name)
            (project / "data").mkdir()
            write_photographs(project / "data" / "raw.zip", options.archives, count)
            for stage in ("split", "preprocess"):
                seconds, peak = run_stage(stage, project)
                print(f"{count:>7,}  {stage:<10} {seconds:>8.1f} {count / seconds:>9.0f} {peak:>9.0f}", flush=True)
    print()
    print(f"{'hashes':>7}  {'distance':<10} {'seconds':>8}")
    hashes = near_hashes(100_000)
    for bits in (4, 8, 16):
        started = time.perf_counter()
        group_duplicates([str(number) for number in range(len(hashes))], hashes, bits)
        print(f"{len(hashes):>7,}  {bits:<10} {time.perf_counter() - started:>8.1f}", flush=True)


def run_stage(name: str, project: Path) -> tuple[float, float]:
    """Runs a stage and returns its seconds and its peak memory in MiB."""
    environment = os.environ | {"DVC_ROOT": str(project), "PYTHONPATH": "src"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, f"stages/{name}.py"], cwd=project, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"stage {name} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def write_photographs(target: Path, archives: Sequence[Path], count: int) -> None:
    """Writes `count` photographs, as one folder a class; from the second round on each has noise of its own."""
    with ThreadPoolExecutor() as pool, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as written:
        for number, (label, data) in enumerate(pool.map(with_noise, range(count), photographs(archives, count))):
            written.writestr(f"{label}/{number}.jpg", data)


def photographs(archives: Sequence[Path], count: int) -> Iterator[tuple[str, bytes, bool]]:
    """Yields label, file and whether it was there before, round by round."""
    first_round, given = True, 0
    while True:
        for path in archives:
            with open_archive(path) as archive:
                for name, label in label_files(archive.namelist()).labels.items():
                    data = archive.read(name)
                    if data and name.lower().endswith(".jpg"):
                        yield label.lower(), data, not first_round
                        given += 1
                        if given == count:
                            return
        first_round = False


def with_noise(number: int, photograph: tuple[str, bytes, bool]) -> tuple[str, bytes]:
    """Returns label and file; a photograph that was there before gets strong blots, so that it is a new picture."""
    label, data, again = photograph
    if not again:
        return label, data
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    blots = np.random.default_rng(number).normal(0, 60, (8, 8, 3)).astype(np.float32)
    noise = cv2.resize(blots, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    done, encoded = cv2.imencode(
        ".jpg", np.clip(pixels + noise, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90]
    )
    assert done, "OpenCV encodes any uint8 picture"
    return label, encoded.tobytes()


def near_hashes(count: int) -> list[str]:
    """Perceptual hashes, as hexadecimal digits, of which four fifths are near another one: 0 to 24 bits away."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (count // 5, 128), dtype=np.uint8)
    bits = bits[random.integers(0, len(bits), count)]
    for row in bits:
        row[random.choice(128, random.integers(0, 25), replace=False)] ^= 1
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


if __name__ == "__main__":
    main()
