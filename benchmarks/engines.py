"""How fast each inference engine runs a backbone here, as a ratio in one process.

    PYTHONPATH=src python benchmarks/engines.py mobilenetv2 --images 512 --rounds 3

The engines take turns, so a drift of the machine's speed meets all of them. Weights are random: they do not
change the speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from catdog.backbones import build_backbone, get_backbone
from catdog.inference import compile_forward
from catdog.model import build_extractor
from catdog.runtime import device_name, prepare_keras


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
    extractor = build_extractor(build_backbone(backbone, options.size), backbone, options.size, "avg")
    shape = (options.batch, options.size, options.size, 3)
    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    batches = [batch] * (options.images // options.batch)

    def predict() -> None:
        extractor.predict(np.concatenate(batches).astype(np.float32), batch_size=options.batch, verbose=0)

    def forward_with(engine: str) -> Callable[[], None]:
        forward = compile_forward(extractor, engine)  # type: ignore[arg-type]
        return lambda: void(forward(batches))

    engines = {"model.predict": predict, "keras": forward_with("keras"), "openvino": forward_with("openvino")}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(options.rounds + 1):
        for name, run in engines.items():
            started = time.perf_counter()
            run()
            if round_number:  # the first round compiles
                rates[name].append(len(batches) * options.batch / (time.perf_counter() - started))
    print(f"{backbone.name}, {options.size} pixels, batches of {options.batch}, {device_name()}")
    reference = statistics.median(rates["model.predict"])
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f}..{max(values):.0f}"
        print(f"{name:<14} {median:7.1f} images/s ({spread}), {median / reference:.2f} x model.predict")


def void(value: object) -> None:
    """Drops a result."""


if __name__ == "__main__":
    main()
