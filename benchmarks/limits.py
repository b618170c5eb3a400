"""How near each step comes to the fastest plain loop over the same libraries, on the same files and threads.

`measure_limits` runs in the benchmark's own process. What it starts, `python -m benchmarks.limits STEP TOLD` in a
project that `dvc repro` has finished, measures one limit in a process of its own, as a stage is one.

| step | ours | limit |
|---|---|---|
| read | | every member of the archive, as bytes, one after another |
| split | `curation.examine`: decode, hash, measure | read, `cv2.imdecode` at full size |
| preprocess | the stage's loop: decode, resize, encode, TFRecord | read, `imdecode`, `resize` by area, `imencode` |
| embed | the stage's loop: read shards, decode, forward pass, save | OpenVINO alone on pixels in memory |
| evaluate | the stage's loop: read shards, decode, forward pass | OpenVINO alone on pixels in memory |

The limits of split and preprocess run in as many Python threads as there are processors. OpenCV would use threads
inside a call too (`cv2.setNumThreads`): both ways are tried on a part of the photographs, and the faster one is
measured. OpenVINO computes in float32, with as many requests at once as it asks for under its hint THROUGHPUT; batches
of 1, 2, 4 and 8 of a fixed shape are tried, and the fastest is measured.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.project import Project
from catdog import paths
from catdog.archives import open_archive
from catdog.config import Params, load_params
from catdog.files import read_json, read_manifest, write_json
from catdog.images import Pixels
from catdog.parallel import processors

if TYPE_CHECKING:
    import zipfile

    import keras

STEPS = ("read", "split", "preprocess", "embed", "evaluate")
_TRIED = 128
"""Images on which settings are tried; they also fill the caches of the processor and of the file system."""
_IN_MEMORY = 1024  # images; at 224 pixels 150 MB
_BATCHES = (1, 2, 4, 8)


def measure_limits(project: Project, step: str) -> dict[str, Any]:
    """Measures a step of ours and its limit, one right after the other.

    Args:
        project: one in which every stage has run.
        step: one of STEPS.

    Returns:
        limit: images, seconds and settings of the plain loop; for each step but `read` also step: images and seconds of
        ours, without the start of the process, and stage: the usage of the whole process.
    """
    result: dict[str, Any] = {}
    if step != "read":
        result["stage"] = project.stage(step)
    if step not in ("read", "split"):  # the others' own clock; split's runs beside its limit
        rate = project.last_metric(step, "images_per_second")
        images = _images(project.root, "test" if step == "evaluate" else None)
        result["step"] = {"images": images, "seconds": round(images / rate, 3)}
    project.run(sys.executable, "-m", "benchmarks.limits", step, "told.json")
    return result | read_json(project.root / "told.json")


def _images(root: Path, split: str | None) -> int:
    counts = read_json(root / paths.PREPROCESS_REPORT)["images"]
    return int(counts[split] if split else sum(counts.values()))


def main() -> None:
    """Measures the limit of a step in this process, for the project in the working directory."""
    step, told = sys.argv[1:]
    if step in ("embed", "evaluate"):
        result = _forward_limit(step)
    else:
        result = {"read": _read_limit, "split": _split_limit, "preprocess": _preprocess_limit}[step]()
    write_json(Path(told), result)


def _read_limit() -> dict[str, Any]:
    with open_archive(paths.RAW) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        started = time.perf_counter()
        read = sum(len(archive.read(member)) for member in members)
        return {"limit": _timed(started, len(members)) | {"megabytes": round(read / 1e6, 3)}}


def _split_limit() -> dict[str, Any]:
    from catdog.curation import examine

    def decode(data: bytes) -> None:
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    params = load_params(paths.PARAMS)
    names = list(read_manifest(paths.MANIFEST)["path"])
    with open_archive(paths.RAW) as archive:
        limit = _best_loop(archive, names, decode)
        started = time.perf_counter()
        examine(archive, params.split, root=Path.cwd(), workers=processors())
        return {"limit": limit, "step": _timed(started, len(archive.namelist()))}


def _preprocess_limit() -> dict[str, Any]:
    params = load_params(paths.PARAMS).preprocess
    side, quality = (params.image_size, params.image_size), [cv2.IMWRITE_JPEG_QUALITY, params.jpeg_quality]

    def shrink(data: bytes) -> None:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        cv2.imencode(".jpg", cv2.resize(pixels, side, interpolation=cv2.INTER_AREA), quality)

    manifest = read_manifest(paths.MANIFEST)
    names = list(manifest[manifest["split"].isin(paths.SPLITS)]["path"])
    with open_archive(paths.RAW) as archive:
        return {"limit": _best_loop(archive, names, shrink)}


def _best_loop(archive: zipfile.ZipFile, names: Sequence[str], work: Callable[[bytes], None]) -> dict[str, Any]:
    """Times reading all members and the work on them, with the better of two settings of OpenCV's own threads."""
    workers = processors()

    def loop(threads: int, some: Sequence[str]) -> float:
        cv2.setNumThreads(threads)
        started = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda name: work(archive.read(name)), some):
                pass
        return time.perf_counter() - started

    inside = cv2.getNumThreads()
    tried = names[:: max(1, len(names) // _TRIED)]
    loop(1, tried)
    threads = min((1, inside), key=lambda one: loop(one, tried))
    seconds = loop(threads, names)
    cv2.setNumThreads(inside)
    settings = f"{workers} Python threads, cv2.setNumThreads({threads})"
    return {"images": len(names), "seconds": round(seconds, 3), "settings": settings}


def _forward_limit(step: str) -> dict[str, Any]:
    from catdog.runtime import prepare_keras

    params = load_params(paths.PARAMS)
    prepare_keras(params.seed, precision="float32")
    split = "test" if step == "evaluate" else "train"
    pixels = _pixels_in_memory(split)
    model = _judged_network() if step == "evaluate" else _extractor(params)
    images = _images(Path(), "test" if step == "evaluate" else None)
    passes = {batch: compile_plain(model, batch) for batch in _BATCHES}
    for batch, forward in passes.items():
        forward(_in_batches(pixels, batch, batch))  # the first pass allocates
    tried = {batch: _time_forward(one, pixels, batch, _TRIED) for batch, one in passes.items()}
    best = min(tried, key=lambda batch: tried[batch])
    seconds = _time_forward(passes[best], pixels, best, images)
    return {"limit": {"images": images, "seconds": round(seconds, 3), "settings": f"batches of {best}, float32"}}


def _time_forward(forward: Callable[[Iterator[Pixels]], None], pixels: Pixels, batch: int, images: int) -> float:
    started = time.perf_counter()
    forward(_in_batches(pixels, batch, images))
    # As many images as were asked for: the last batch is a whole one too.
    return (time.perf_counter() - started) * images / (-(-images // batch) * batch)


def _in_batches(pixels: Pixels, batch: int, images: int) -> Iterator[Pixels]:
    """Yields batches, all of the same size, until `images` were given, from the beginning again where they end."""
    whole = [pixels[start : start + batch] for start in range(0, len(pixels) - batch + 1, batch)]
    return itertools.islice(itertools.cycle(whole), -(-images // batch))


def _pixels_in_memory(split: str) -> Pixels:
    from catdog.records import RecordReader, shard_paths

    batches = itertools.islice(RecordReader(shard_paths(paths.TFRECORDS, split), 8), _IN_MEMORY // 8)
    return np.concatenate(list(batches))


def _extractor(params: Params) -> keras.Model:
    from catdog.backbones import build_backbone, get_backbones
    from catdog.model import build_extractor
    from catdog.weights import load_all

    backbones = get_backbones(params.backbone)
    size = params.preprocess.image_size
    networks = [build_backbone(backbone, size) for backbone in backbones]
    load_all(networks, backbones, params.weights, pretrained_dir=paths.PRETRAINED, root=Path.cwd())
    return build_extractor(networks, backbones, size, params.embed.pooling)


def _judged_network() -> keras.Model:
    from catdog.feature_map import with_features
    from catdog.model import load_model

    return with_features(*load_model(paths.MODEL))


def compile_plain(model: keras.Model, batch: int) -> Callable[[Iterator[Pixels]], None]:
    """Compiles a model with OpenVINO for batches of one size, and returns a loop that keeps its requests busy."""
    # OpenVINO reports every import to its makers, unless its reporter cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino.preprocess import PrePostProcessor

    size = model.input_shape[1]
    network = openvino.convert_model(model, input=[batch, size, size, 3])
    steps = PrePostProcessor(network)
    steps.input().tensor().set_element_type(openvino.Type.u8)
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(steps.build(), "CPU", settings)
    requests = [
        compiled.create_infer_request() for _ in range(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
    ]

    def forward(batches: Iterator[npt.NDArray[np.uint8]]) -> None:
        running: list[Any] = []
        for request, pixels in zip(itertools.cycle(requests), batches, strict=False):
            if len(running) == len(requests):
                running.pop(0).wait()
            request.start_async({0: pixels})
            running.append(request)
        for request in running:
            request.wait()

    return forward


def _timed(started: float, images: int) -> dict[str, Any]:
    return {"images": images, "seconds": round(time.perf_counter() - started, 3)}


if __name__ == "__main__":
    main()
