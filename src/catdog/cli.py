"""The `catdog` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from catdog import __version__
from catdog.backbones import BACKBONES
from catdog.errors import CatdogError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, or 2 for a mistake, which is told in one sentence."""
    parser = argparse.ArgumentParser(prog="catdog", description="Transfer learning on DVC, MLflow and Keras.")
    parser.add_argument("--version", action="version", version=f"catdog {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    backbones = commands.add_parser("backbones", help="list the pretrained networks that `backbone` may name")
    backbones.set_defaults(run=_list_backbones)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except CatdogError as error:
        print(f"catdog: {error}", file=sys.stderr)
        return 2
    return 0


def _list_backbones(options: argparse.Namespace) -> None:
    print(f"{'backbone':<18} {'native size':>11}  {'weights':<9} licence")
    for backbone in BACKBONES.values():
        origin = "shipped" if backbone.shipped else "download"
        print(f"{backbone.name:<18} {backbone.native_size:>11}  {origin:<9} {backbone.license}")


if __name__ == "__main__":
    sys.exit(main())
