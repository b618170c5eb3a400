"""The `catdog` command.

A command imports what it needs when it runs, so that `catdog --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from catdog import __version__
from catdog.errors import CatdogError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    0 is success, 1 means that some of the work could not be done, and 2 a mistake, which is told in one sentence.
    """
    options = _parser().parse_args(arguments)
    try:
        exit_code: int = options.run(options)
        sys.stdout.flush()
    except CatdogError as error:
        print(f"catdog: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough. What is left must not fail once more when Python flushes it at its
        # end (Python's documentation of the module signal, "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="catdog", description="Transfer learning on DVC, MLflow and Keras.")
    parser.add_argument("--version", action="version", version=f"catdog {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    backbones = commands.add_parser("backbones", help="list the pretrained networks that `backbone` may name")
    backbones.set_defaults(run=_list_backbones)

    predict = commands.add_parser(
        "predict",
        help="classify pictures with the trained model",
        description="Classify pictures with the trained model. Files that show no picture are listed on standard "
        "error, and the exit code is then 1.",
    )
    predict.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="image files, folders and zip archives (default: the data set's own images without a label)",
    )
    predict.add_argument("--model", type=Path, metavar="FILE", help="model file (default: models/model.keras)")
    predict.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="write the CSV that Kaggle's dogs-vs-cats takes: id (the number in the file name) and label, which is 1 "
        "for the second class (dog) and 0 for the first",
    )
    predict.add_argument(
        "--probabilities",
        action="store_true",
        help="give the probability of each class; in a submission, that of the second in place of 0 and 1",
    )
    predict.add_argument("--format", choices=["table", "csv", "jsonl"], help="of what is printed (default: table)")
    predict.set_defaults(run=_predict)

    audit = commands.add_parser(
        "audit",
        help="list the images whose label the features contradict",
        description="List the images whose label a model trained on the others most confidently contradicts, with a "
        "montage: reports/suspects.csv and reports/suspects.png.",
    )
    audit.add_argument("--top", type=_positive, default=40, metavar="N", help="how many to list (default: 40)")
    audit.add_argument(
        "--minimum",
        type=_share,
        default=0.9,
        metavar="P",
        help="probability of another label from which an image is written to --exclude (default: 0.9)",
    )
    audit.add_argument(
        "--exclude", type=Path, metavar="FILE", help="CSV to add them to, for the parameter split.exclude"
    )
    audit.add_argument(
        "--include-test",
        action="store_true",
        help="write images of the test split to it, too: then a model has a say in its own exam",
    )
    audit.set_defaults(run=_audit)

    recipe = commands.add_parser(
        "recipe",
        help="list, print or run published recipes",
        description="Print the command that runs a published recipe, or run it. Without a name, list the recipes.",
    )
    recipe.add_argument("name", nargs="?", metavar="NAME", help="the recipe")
    recipe.add_argument("--list", action="store_true", help="list the recipes with what their sources report")
    recipe.add_argument("--run", action="store_true", dest="start", help="run the command, too")
    recipe.add_argument("--queue", action="store_true", help="put it into DVC's queue; `dvc queue start` runs that")
    recipe.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a parameter further, e.g. dataset=path/to/pictures; may be given several times",
    )
    recipe.set_defaults(run=_recipe)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return number


def _list_backbones(options: argparse.Namespace) -> int:
    from catdog.backbones import BACKBONES

    print("several are joined by +, e.g. mobilenetv2+xception\n")
    print(f"{'backbone':<18} {'native size':>11}  {'weights':<9} licence")
    for backbone in BACKBONES.values():
        origin = "shipped" if backbone.shipped else "download"
        print(f"{backbone.name:<18} {backbone.native_size:>11}  {origin:<9} {backbone.license}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from catdog.predict import run_predict

    return run_predict(
        options.paths,
        model=options.model,
        submission=options.submission,
        probabilities=options.probabilities,
        layout=options.format,
    )


def _audit(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.config import load_params
    from catdog.suspects import run_audit

    root = paths.repository_root()
    run_audit(
        root,
        top=options.top,
        minimum=options.minimum,
        exclude=options.exclude,
        include_test=options.include_test,
        seed=load_params(root / paths.PARAMS).seed,
    )
    return 0


def _recipe(options: argparse.Namespace) -> int:
    import shlex

    from catdog import paths
    from catdog.recipes import get_recipe, list_recipes, recipe_command, run_command

    root = paths.repository_root()
    if options.list or options.name is None:
        if options.start or options.queue or options.set_param:
            raise CatdogError("--run, --queue and -S need the name of a recipe; `catdog recipe --list` lists them")
        for recipe in list_recipes(root):
            print(f"{recipe.name}\n    {recipe.about}\n    published: {recipe.published or 'nothing'}")
        return 0
    command = recipe_command(root, get_recipe(root, options.name), options.set_param, queue=options.queue)
    print(shlex.join(command), flush=True)
    return run_command(root, command) if options.start else 0


if __name__ == "__main__":
    sys.exit(main())
