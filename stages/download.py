"""Brings the data set in as one archive, data/raw.zip."""

from catdog import paths
from catdog.backbones import get_backbones
from catdog.sources import fetch
from catdog.tracking import stage
from catdog.weights import check_weights_available


def main() -> None:
    """Runs the stage."""
    with stage("download") as run:
        params = run.params
        # The first stage asks at once for what a later one would miss after minutes of work.
        check_weights_available(
            get_backbones(params.backbone), params.weights, pretrained_dir=paths.PRETRAINED, root=run.root
        )
        facts = fetch(
            params.dataset,
            paths.RAW,
            root=run.root,
            seed=params.seed,
            sample_images=params.download.sample_images,
            sha256=params.download.sha256,
        )
        run.finish(facts.as_dict(), f"{facts.files:,} files, {facts.bytes / 1e6:,.1f} MB from {facts.location}")


if __name__ == "__main__":
    main()
