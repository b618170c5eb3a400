"""Looks whether the data set, a list of images or a file of weights changed since the last run, so that DVC uses it.

This stage runs at every `dvc repro`, so it is quick, and it judges nothing: a missing or wrong value is for the
stage that needs it.
"""

import sys

import yaml

from catdog import paths
from catdog.errors import CatdogError
from catdog.files import read_json, told_to_users, write_json
from catdog.fingerprint import curation_fingerprint, fingerprint, weights_fingerprint


def main() -> None:
    """Runs the stage; ends the process with one sentence and exit code 2 where a user can mend what is wrong."""
    try:
        look()
    except (CatdogError, OSError) as error:
        sentence = told_to_users(error) if isinstance(error, OSError) else str(error)
        if sentence is None:
            raise
        print(f"catdog source: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def look() -> None:
    """Writes the three reports."""
    root = paths.repository_root()
    tree = yaml.safe_load(paths.PARAMS.read_text(encoding="utf-8"))
    split = tree.get("split") or {}
    former = read_json(paths.SOURCE_REPORT) if paths.SOURCE_REPORT.exists() else None
    write_json(paths.SOURCE_REPORT, fingerprint(str(tree.get("dataset")), root, former))
    curation = curation_fingerprint(str(split.get("file") or ""), str(split.get("exclude") or ""), root)
    write_json(paths.CURATION_REPORT, curation)
    weights = weights_fingerprint(str(tree.get("weights")), str(tree.get("backbone")), root)
    write_json(paths.WEIGHTS_REPORT, weights)


if __name__ == "__main__":
    main()
