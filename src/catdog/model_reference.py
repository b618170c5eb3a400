"""What a user may call a model: a file, a stage or version of the registry, or an address in MLflow."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from catdog import paths
from catdog.errors import CatdogError

_MLFLOW = re.compile(r"(models|runs|mlflow-artifacts):/")


def find_model(reference: str | None, downloads: contextlib.ExitStack) -> Path:
    """Returns the model file that a user means, and brings it here first where it is elsewhere.

    Args:
        reference: a file; a folder that holds one, as MLflow's models do; a stage or a version of the DVC registry,
            as prod or v1.2.0; an address in MLflow, as models:/cats-vs-dogs@champion, models:/cats-vs-dogs/3 or
            runs:/<id>/model; or None for the model that the pipeline trained. A file goes before a stage of the same
            name.
        downloads: removes what was downloaded from MLflow.

    Raises:
        CatdogError: there is no such model, or it cannot be read; a file that is not there is left to `read_info`.
    """
    if reference is None:
        reference = str(paths.repository_root() / paths.MODEL)
    if _MLFLOW.match(reference):
        return _from_mlflow(reference, downloads)
    path = Path(reference)
    try:
        if path.is_dir():
            path = _only_model(path, reference)
        if path.is_file() or os.sep in reference or path.suffix == paths.MODEL.suffix:
            with contextlib.suppress(FileNotFoundError), path.open("rb"):
                return path
            return path
    except OSError as error:
        raise CatdogError(
            f"the model {path} cannot be read ({error.strerror}); correct its path or its permissions"
        ) from None
    return _from_registry(reference)


def _from_registry(reference: str) -> Path:
    from catdog.registry_files import resolve_model

    try:
        return resolve_model(paths.repository_root(), reference)
    except CatdogError as error:
        raise CatdogError(f"there is no model file {reference!r}, and as a name in the registry: {error}") from None


def _from_mlflow(reference: str, downloads: contextlib.ExitStack) -> Path:
    from catdog.tracking import connect, public_address, store_uri

    root = paths.repository_root()
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        raise CatdogError(
            f"{reference} is a model in MLflow, but {root} has no tracking store yet; `dvc repro` makes it, or set "
            "MLFLOW_TRACKING_URI"
        )
    connect(root)
    from mlflow.artifacts import download_artifacts

    folder = downloads.enter_context(tempfile.TemporaryDirectory(prefix="catdog-"))
    try:
        found = Path(download_artifacts(artifact_uri=reference, dst_path=folder))
    except Exception as error:  # every store and every artifact store has its own
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CatdogError(f"{reference} cannot be had from {public_address(store_uri(root))} ({cause})") from None
    return found if found.is_file() else _only_model(found, reference)


def _only_model(folder: Path, reference: str) -> Path:
    models = sorted(folder.rglob(f"*{paths.MODEL.suffix}"))
    if len(models) != 1:
        raise CatdogError(
            f"{reference} holds {len(models)} {paths.MODEL.suffix} files, where one is needed; name the file, or "
            "in MLflow the model that `train` logged, as runs:/<train run>/model"
        )
    return models[0]
