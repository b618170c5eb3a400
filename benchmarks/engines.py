"""How fast each inference engine runs a backbone here, as a ratio in one process.

    PYTHONPATH=src python -m benchmarks.engines mobilenetv2 --images 512 --rounds 3

The engines take turns, so a drift of the machine's speed meets all of them. The weights are ImageNet's where the
project ships them, else random, which does not change the speed. At the end it says by how much each engine's features
differ from those of `model.predict`, relative to the largest one, and fails above 0.001.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.pictures import draw_pixels
from catdog.backbones import build_backbone, get_backbone
from catdog.inference import Engine, compile_forward
from catdog.model import build_extractor
from catdog.runtime import device_name, prepare_keras
from catdog.weights import load_weights

ROOT = Path(__file__).parents[1]
LARGEST_DIFFERENCE = 1e-3

Floats = npt.NDArray[np.float32]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone", nargs="?", default="mobilenetv2")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()

    prepare_keras(0)
    backbone = get_backbone(options.backbone)
    network = build_backbone(backbone, options.size)
    weights = load_weights(
        network, backbone, "imagenet" if backbone.shipped else "random", pretrained_dir=ROOT / "pretrained", root=ROOT
    )
    extractor = build_extractor([network], [backbone], options.size, "avg")
    count = max(1, options.images // options.batch)
    batches = list(draw_pixels(count * options.batch, options.size).reshape(count, options.batch, options.size, -1, 3))

    def predict() -> Floats:
        pixels = np.concatenate(batches).astype(np.float32)
        features: Floats = extractor.predict(pixels, batch_size=options.batch, verbose=0)
        return features

    def forward_with(engine: Engine) -> Callable[[], Floats]:
        forward = compile_forward(extractor, engine, batch_size=options.batch)
        return lambda: forward(batches)

    engines = {"model.predict": predict, "keras": forward_with("keras"), "openvino": forward_with("openvino")}
    features: dict[str, Floats] = {}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(options.rounds + 1):
        for name, run in engines.items():
            started = time.perf_counter()
            features[name] = run()
            if round_number:  # the first round compiles
                rates[name].append(count * options.batch / (time.perf_counter() - started))
    print(
        f"{backbone.name} ({weights.kind} weights), {options.size} pixels, batches of {options.batch}, {device_name()}"
    )
    reference = statistics.median(rates["model.predict"])
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f}..{max(values):.0f}"
        print(f"{name:<14} {median:7.1f} images/s ({spread}), {median / reference:.2f} x model.predict")

    expected = features["model.predict"]
    for name in ("keras", "openvino"):
        difference = float(np.abs(features[name] - expected).max() / np.abs(expected).max())
        print(f"{name:<14} features differ from model.predict's by {difference:.1e} of the largest")
        if not difference <= LARGEST_DIFFERENCE:
            sys.exit(f"{name}: that is more than {LARGEST_DIFFERENCE}")


if __name__ == "__main__":
    main()
