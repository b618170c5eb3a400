"""A worker of the embed stage, which holds the compiled network; and the work of the stage, shard by shard."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from catdog.augment import build_augmentation
from catdog.backbones import build_backbone, get_backbones
from catdog.compute import Compute
from catdog.config import Params
from catdog.errors import CatdogError
from catdog.features import embed_copy, embed_shard, reporting
from catdog.inference import choose_engine, compile_forward
from catdog.model import build_extractor
from catdog.runtime import device_facts, distribution, full_precision, prepare_keras
from catdog.weights import joined_sha256, load_all


@dataclass(frozen=True)
class EmbedTask:
    """A shard to embed, the images as they are or one varied copy of each."""

    shard: Path
    view: int = 0  # 0: as they are, else the number of the copy

    @property
    def name(self) -> str:
        """What it is called in a message."""
        return f"copy {self.view} of {self.shard.name}" if self.view else self.shard.name


@dataclass(frozen=True)
class Network:
    """What computed features; of two workers all but `device` must be equal."""

    kinds: str  # of the weights' sources, as "pretrained", joined by +
    sha256: str  # of the weights' files, joined by +
    parameters: int
    engine: str
    facts: dict[str, str] = field(compare=False)  # of the device, as `runtime.device_facts`


@dataclass(frozen=True)
class Embedded:
    """A task that is done."""

    images: int
    network: Network


def open_embedder(
    params: Params,
    *,
    size: int,
    pretrained: Path,
    root: Path,
    folder: Path,
    report: Callable[[int], object] | None = None,
) -> Callable[[EmbedTask], Embedded]:
    """Builds and compiles the network; returns what embeds a shard into a folder.

    Args:
        params: of the run.
        size: pixels a side of the stored pictures.
        pretrained: the directory with the weights this project ships.
        root: what a relative path in `params.weights` is relative to.
        folder: receives the features, as `embed_shard` and `embed_copy` write them.
        report: is told the number of images of each batch when it is taken.

    Raises:
        CatdogError: the weights cannot be had, or the engine cannot run.
    """
    prepare_keras(params.seed, precision=params.runtime.precision)
    settings, xla = params.embed, params.runtime.xla
    engine = choose_engine(settings.engine)
    backbones = get_backbones(params.backbone)
    # OpenVINO computes in float32 whatever the policy: of bfloat16 it reads the outputs as float16, or nothing at all.
    with full_precision() if engine == "openvino" else contextlib.nullcontext(), distribution():
        # First of all that draws random numbers, as in train: so `weights: random` is the same network in both.
        networks = [build_backbone(backbone, size) for backbone in backbones]
        weights = load_all(networks, backbones, params.weights, pretrained_dir=pretrained, root=root)
        extractor = build_extractor(networks, backbones, size, settings.pooling)
        forward = compile_forward(extractor, engine, batch_size=settings.batch_size, xla=xla)
        facts = device_facts(xla)
    if report is not None:
        forward = reporting(forward, report)
    network = Network(
        "+".join(source.kind for source in weights),
        joined_sha256(weights),
        extractor.count_params(),
        engine,
        facts,
    )
    augmentation = build_augmentation(params.augment, size, params.seed)
    # Two shards at a time are for OpenVINO: a GPU has no use for it, and layers that vary pictures keep their seeds in
    # themselves.
    taking_turns = threading.Lock()

    def embed(task: EmbedTask) -> Embedded:
        alone = engine != "openvino" or task.view > 0
        with taking_turns if alone else contextlib.nullcontext():
            if task.view:
                images = embed_copy(
                    task.shard,
                    folder,
                    forward,
                    augmentation,
                    view=task.view,
                    seed=params.seed,
                    batch_size=settings.batch_size,
                )
            else:
                images = embed_shard(task.shard, folder, forward, batch_size=settings.batch_size)
        return Embedded(images, network)

    return embed


def embed_all(
    tasks: Sequence[EmbedTask],
    compute: Compute,
    params: Params,
    *,
    size: int,
    pretrained: Path,
    root: Path,
    folder: Path,
    passes: int,
    done: int = 0,
) -> tuple[Network, float]:
    """Embeds shards, wherever `compute` says, with a progress bar that counts images.

    Args:
        tasks: what to embed, one or more.
        compute: from `compute.open_compute`.
        params: of the run; as `open_embedder`, which also explains the next four.
        size: see there.
        pretrained: see there.
        root: see there.
        folder: see there.
        passes: images of all tasks, and of those that were done before.
        done: images that were done before.

    Returns:
        The network that did it, and how many seconds it took without setting up a worker in this process.

    Raises:
        CatdogError: as `open_embedder`; or two nodes of a cluster computed with different networks.
    """
    make = functools.partial(open_embedder, params, size=size, pretrained=pretrained, root=root, folder=folder)
    with tqdm(desc="embed", total=passes, initial=done, unit=" images", disable=not sys.stderr.isatty()) as bar:
        if compute.is_local:  # batch by batch; from elsewhere only whole shards are told
            make = functools.partial(make, report=bar.update)
        with compute.workers(make, "node") as map_tasks:
            started = time.monotonic()
            network: Network | None = None
            for result in map_tasks(tasks):
                network = network or result.network
                require_one_network(network, result.network)
                if not compute.is_local:
                    bar.update(result.images)
            assert network is not None, "nothing to embed"
            return network, time.monotonic() - started


def require_one_network(first: Network, other: Network) -> None:
    """Refuses features of which some come from other weights, or another engine; raises CatdogError."""
    if first != other:
        raise CatdogError(
            f"the nodes of the cluster computed with different networks, {_described(first)} and {_described(other)}: "
            "give them the same weights files (copy one into the shared `pretrained` folder, or name it in `weights`), "
            "and set embed.engine where some have a GPU"
        )


def _described(network: Network) -> str:
    return f"{network.kinds} weights {network.sha256[:12]} on {network.engine}"
