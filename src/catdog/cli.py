"""The `catdog` command.

A command imports what it needs when it runs, so that `catdog --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

    _add_backbones(commands)

    _add_predict(commands)

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

    clean = commands.add_parser(
        "clean",
        help="remove what killed, deleted and forgotten work left behind",
        description="Show what killed, deleted and forgotten work left behind in this repository, with its size; "
        "remove it with --yes. Without one of the kinds, show all of them.",
    )
    clean.add_argument("--checkpoints", action="store_true", help="old checkpoints of trainings, folders of tunings")
    clean.add_argument("--downloads", action="store_true", help="old downloads of data sets, cut off or not used")
    clean.add_argument(
        "--runs",
        action="store_true",
        help="MLflow runs that were deleted or whose parent was; runs that killed processes left RUNNING become KILLED",
    )
    clean.add_argument("--experiments", action="store_true", help="old DVC experiments")
    clean.add_argument(
        "--artifacts",
        action="store_true",
        help="folders in mlruns/ that no run in mlflow.db has; not where another tracking store keeps its files there",
    )
    clean.add_argument(
        "--older-than", type=_days, default=14.0, metavar="DAYS", help="what counts as old (default: 14 days)"
    )
    clean.add_argument("--yes", action="store_true", help="remove it; needs at least one of the kinds")
    clean.set_defaults(run=_clean)

    doctor = commands.add_parser(
        "doctor",
        help="check environment, repository and tracking store",
        description="Check environment, repository and tracking store, a line each with what to do. The exit code is "
        "1 where there is a problem.",
    )
    doctor.add_argument(
        "--fix",
        action="store_true",
        help="repair the paths of MLflow's artifacts after the repository was moved, and DVC's locks of dead processes",
    )
    doctor.set_defaults(run=_doctor)

    ui = commands.add_parser(
        "ui",
        help="compare the experiments in MLflow's pages",
        description="Start MLflow's server for the experiments of this repository and print, or open, the table of "
        "runs with the columns that matter, charts and the comparison of the newest. Where MLFLOW_TRACKING_URI names "
        "a server, print its links and start none.",
    )
    ui.add_argument("--port", type=_port, default=5000, metavar="PORT", help="of the server (default: 5000)")
    ui.add_argument("--no-open", action="store_true", help="only print the links")
    ui.set_defaults(run=_ui)

    _add_compare(commands)
    _add_app(commands)
    _add_promote(commands)
    _add_rollback(commands)
    _add_models(commands)
    _add_fetch(commands)
    _add_export(commands)

    tune = commands.add_parser(
        "tune",
        help="search for a better head on the stored features",
        description="Search for the head's learning rate, optimizer, hidden layers and dropout with Keras Tuner, on "
        "the stored features of the training and validation splits; params.yaml says in its block tune what to try. "
        "Prints the best trials and the command that runs the pipeline with the best. A search that was stopped goes "
        "on when the same command is given again.",
    )
    tune.add_argument("--method", choices=["random", "hyperband", "bayesian"], help="default: tune.method")
    tune.add_argument("--trials", type=_positive, metavar="N", help="at most (default: tune.trials)")
    tune.add_argument("--seed", type=_whole, metavar="N", help="of the search (default: the seed of params.yaml)")
    tune.add_argument(
        "--backbones",
        type=lambda text: text.split(","),
        default=[],
        metavar="A,B",
        help="search on the features of each of these networks, which are computed first, and rank them",
    )
    tune.add_argument("--apply", action="store_true", help="run the command of the best trial, too")
    tune.set_defaults(run=_tune)
    return parser


def _add_backbones(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backbones = commands.add_parser(
        "backbones",
        help="list the pretrained networks that `backbone` may name, tell what they cost, or compare them",
        description="List the pretrained networks that the parameter `backbone` may name; tell what some of them cost; "
        "or compare some: run an experiment with each through DVC's queue, and rank them by validation loss.",
    )
    what = backbones.add_mutually_exclusive_group()
    names: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "A,B"}
    what.add_argument("--cost", **names, help="print parameters, multiply-adds and size; a+b stands for both joined")
    what.add_argument("--compare", **names, help="run an experiment with each and rank them")
    backbones.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --compare: change a parameter for all of them; may be given several times",
    )
    backbones.add_argument(
        "--jobs", type=_positive, metavar="N", help="with --compare: experiments at a time (default: 1)"
    )
    backbones.add_argument("--dry-run", action="store_true", help="with --compare: only print the commands")
    backbones.set_defaults(run=_backbones)


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    predict = commands.add_parser(
        "predict",
        help="classify pictures with the trained model",
        description="Classify pictures with the trained model. Files that show no picture are listed on standard "
        "error, and the exit code is then 1.",
    )
    predict.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="image files, folders, archives (zip, tar, tar.gz, tar.xz), patterns in quotes ('photos/**/*.jpg'), "
        "http(s) addresses of pictures, or - for standard input: the bytes of a picture, or a path a line (default: "
        "the data set's own images without a label)",
    )
    predict.add_argument(
        "--model",
        metavar="MODEL",
        help="a model file, a stage or version of the registry (prod, v1.2.0), or a model in MLflow "
        "(models:/cats-vs-dogs@champion, runs:/<id>/model) (default: models/model.keras)",
    )
    predict.add_argument(
        "--threshold",
        type=_share,
        metavar="P",
        help="of two classes, the probability from which the second is given (default: the model's own)",
    )
    predict.add_argument("--top", type=_positive, metavar="K", help="give the K most probable classes, too")
    predict.add_argument(
        "--gradcam",
        type=Path,
        metavar="DIR",
        help="write each picture with a heat map of the evidence for its label to this folder",
    )
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


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="say which of several runs is better, and whether the test images can tell",
        description="Compare runs with the first of them: the parameters that differ, the metrics, and tests on the "
        "images that both judged. A run is the name of a DVC experiment, a git revision (branch, tag, HEAD, hash), "
        "`workspace`, or the id or name of an MLflow run, looked for in this order; exp:NAME, git:NAME and mlflow:NAME "
        "say which kind is meant.",
    )
    compare.add_argument("baseline", metavar="A", help="the run that the others are compared with")
    compare.add_argument("candidates", nargs="+", metavar="B", help="a run that may be better")
    compare.add_argument("--markdown", action="store_true", help="print GitHub Markdown")
    compare.add_argument("--output", type=Path, metavar="FILE", help="write it to a file instead")
    compare.set_defaults(run=_compare)


def _add_promote(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    promote = commands.add_parser(
        "promote",
        help="make a model a version of the registry and let a stage serve it",
        description="Check a model against the block `promote` of params.yaml and against the model that serves now; "
        "register it as the next version (a git tag of GTO), let a stage serve it, and mirror that in MLflow's "
        "registry. The results of a DVC experiment become a commit on the present branch.",
    )
    promote.add_argument(
        "source",
        nargs="?",
        metavar="EXP|REV",
        help="a DVC experiment, a git revision or a version (default: HEAD); exp:NAME and git:NAME say which is meant",
    )
    _add_stage(promote, "that is to serve it")
    promote.add_argument("--dry-run", action="store_true", help="only show what would be done")
    promote.add_argument(
        "--force", metavar="REASON", help="promote it even though checks fail; the reason is recorded in tag and MLflow"
    )
    promote.add_argument(
        "--branch", default="", metavar="NAME", help="make a branch of the experiment, and leave the present one alone"
    )
    _add_push(promote)
    _add_artifact(promote)
    promote.set_defaults(run=_promote)


def _add_rollback(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rollback = commands.add_parser(
        "rollback",
        help="let a stage serve an earlier version again",
        description="Let a stage serve again what it served before its present version first came to it.",
    )
    _add_stage(rollback, "whose version is changed")
    rollback.add_argument("--to", metavar="VERSION", help="serve this version, e.g. v1.2.0")
    _add_push(rollback)
    _add_artifact(rollback)
    rollback.set_defaults(run=_rollback)


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    models = commands.add_parser(
        "models",
        help="list the registered versions",
        description="List the versions of the model with stages, accuracy, commit, when and by whom they were "
        "registered, as git's tags and MLflow's registry have them, and say whether the two agree.",
    )
    _add_artifact(models)
    models.set_defaults(run=_models)


def _add_fetch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fetch = commands.add_parser(
        "fetch",
        help="get the file of a registered model",
        description="Get the file of a registered model from DVC's cache or its remote, checked by its hash.",
    )
    which = fetch.add_mutually_exclusive_group()
    which.add_argument("--stage", default="prod", metavar="STAGE", help="what this stage serves (default: prod)")
    which.add_argument("--version", metavar="VERSION", help="this version, e.g. v1.2.0")
    fetch.add_argument("--repo", metavar="PATH|URL", help="another repository (default: the one around you)")
    fetch.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    _add_artifact(fetch)
    fetch.set_defaults(run=_fetch)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write the model in the format of another runtime, checked",
        description="Write the trained model for TensorFlow Lite, ONNX, TensorFlow Serving (SavedModel) or OpenVINO, "
        "and compare the export with the Keras model on the test split: labels, probabilities, size and latency. An "
        "export that gives too many other labels is not written, and the exit code is then 1.",
    )
    export.add_argument("--format", required=True, choices=["tflite", "onnx", "saved_model", "openvino"])
    export.add_argument(
        "--precision",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="float16 halves the size; int8 quarters it and computes in whole numbers, whose ranges come from 300 "
        "training images; saved_model has float32 alone (default: float32)",
    )
    export.add_argument(
        "--model",
        metavar="REF",
        help="model file, stage (prod) or version (v1.2.0) of the registry, or address in MLflow "
        "(default: models/model.keras)",
    )
    export.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="the file (tflite, onnx) or folder (saved_model, openvino) to write (default: "
        "models/export/<model>-<precision>.<format>)",
    )
    export.add_argument("--force", action="store_true", help="replace an export that is there")
    export.add_argument(
        "--max-disagreement",
        type=_share,
        metavar="SHARE",
        help="of the test images that may get another label than from the Keras model (default: float32 0, float16 "
        "0.005, int8 0.02)",
    )
    export.add_argument("--no-check", action="store_true", help="write it unseen, e.g. where the data is not at hand")
    export.set_defaults(run=_export)


def _add_stage(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--stage", default="prod", metavar="STAGE", help=f"{what} (default: prod)")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push", action="store_true", help="send the tags to the git remote, all or none")


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", metavar="NAME", help="of the model under `artifacts:` in dvc.yaml (default: models/model.keras's)"
    )


def _add_app(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    app = commands.add_parser(
        "app",
        help="try the model in a web page",
        description="Serve a web page that classifies pictures: dropped, pasted, taken with the camera, or chosen from "
        "examples; and that sorts many of them. Ctrl-C ends it.",
    )
    app.add_argument(
        "--model",
        metavar="REF",
        help="model file, stage (prod) or version (v1.2.0) of the registry, or address in MLflow "
        "(default: models/model.keras)",
    )
    app.add_argument("--port", type=_port, default=8501, metavar="PORT", help="of the server (default: 8501)")
    app.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen on (default: 127.0.0.1, for this machine alone); the page has no password",
    )
    app.add_argument("--examples", type=Path, metavar="DIR", help="pictures to try (default: some of the test split)")
    app.add_argument("--folder", type=Path, metavar="DIR", help="pictures to sort: a folder or archive")
    app.set_defaults(run=_app)


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def _days(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days, 0 or more")
    return number


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, a number from 1 to 65535")
    return number


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return number


def _backbones(options: argparse.Namespace) -> int:
    if options.compare is None and (options.set_param or options.jobs or options.dry_run):
        raise CatdogError("-S, --jobs and --dry-run belong to --compare; name the backbones to compare, as in a,b")
    if options.cost is None and options.compare is None:
        return _list_backbones()

    from catdog import paths
    from catdog.backbone_comparison import run_comparison, run_cost

    root = paths.repository_root()
    if options.cost is not None:
        return run_cost(root, options.cost)
    return run_comparison(root, options.compare, options.set_param, jobs=options.jobs or 1, dry_run=options.dry_run)


def _list_backbones() -> int:
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
        top=options.top,
        threshold=options.threshold,
        gradcam=options.gradcam,
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


def _clean(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.housekeeping import KINDS, run_clean

    kinds = [kind for kind in KINDS if getattr(options, kind)]
    return run_clean(paths.repository_root(), kinds, days=options.older_than, yes=options.yes)


def _doctor(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.doctor import run_doctor

    return run_doctor(paths.repository_root(), fix=options.fix)


def _ui(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.ui import run_ui

    return run_ui(paths.repository_root(), port=options.port, open_browser=not options.no_open)


def _compare(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.compared_runs import read_runs
    from catdog.comparison import compare, format_markdown, format_text
    from catdog.files import write_text

    runs = read_runs(paths.repository_root(), [options.baseline, *options.candidates])
    text = (format_markdown if options.markdown else format_text)(compare(runs))
    if options.output is None:
        print(text, end="")
    else:
        try:
            write_text(options.output, text)
        except OSError as error:
            raise CatdogError(f"--output {options.output} cannot be written: {error.strerror}") from None
        print(f"{options.output} written")
    return 0


def _promote(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.registry import run_promote

    return run_promote(
        paths.repository_root(),
        options.source,
        stage=options.stage,
        name=options.name,
        force=options.force,
        branch=options.branch,
        push=options.push,
        dry_run=options.dry_run,
    )


def _rollback(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.registry import run_rollback

    return run_rollback(
        paths.repository_root(), stage=options.stage, to=options.to, name=options.name, push=options.push
    )


def _models(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.registry_list import run_models

    return run_models(paths.repository_root(), name=options.name)


def _fetch(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.registry_files import run_fetch

    return run_fetch(
        None if options.repo else paths.repository_root(),
        options.output,
        reference=options.version or options.stage,
        repository=options.repo,
        name=options.name,
    )


def _export(options: argparse.Namespace) -> int:
    if options.no_check and options.max_disagreement is not None:
        raise CatdogError("--max-disagreement is for the check; leave it out with --no-check")
    from catdog.export_command import run_export

    return run_export(
        options.format,
        options.precision,
        model=options.model,
        output=options.output,
        force=options.force,
        check=not options.no_check,
        max_disagreement=options.max_disagreement,
    )


def _app(options: argparse.Namespace) -> int:
    from catdog.app_command import run_app

    return run_app(
        model=options.model, host=options.host, port=options.port, examples=options.examples, folder=options.folder
    )


def _tune(options: argparse.Namespace) -> int:
    from catdog import paths
    from catdog.tuning import run_tune

    return run_tune(
        paths.repository_root(),
        method=options.method,
        trials=options.trials,
        seed=options.seed,
        backbones=options.backbones,
        apply=options.apply,
    )


if __name__ == "__main__":
    sys.exit(main())
