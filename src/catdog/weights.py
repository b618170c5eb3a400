"""Where a backbone gets its weights from.

``weights`` is one word or a path:

* "imagenet": the published weights: the file under ``pretrained/``, else Keras' own cache, else
  Keras' download
* "random": the values the network was built with
* anything else: the path of a weights file (``.weights.h5``, or ``.h5`` of older Keras versions)

For several backbones it is one word for all of them, or one word or path each, joined by "+".

Weights that cannot be had are an error. Nothing here ever falls back to random weights, because
a network trained from noise looks like a working one until someone reads its accuracy.

Importing this module imports no deep-learning framework.
"""

from __future__ import annotations

import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from catdog.backbones import BACKBONES, Backbone
from catdog.errors import CatdogError
from catdog.files import sha256_of
from catdog.paths import users_path

if TYPE_CHECKING:
    import keras

# A server that is silent for so many seconds counts as unreachable.
NETWORK_TIMEOUT_SECONDS = 10.0

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class WeightsSource:
    """Where the weights of a model came from.

    Attributes:
        kind: "pretrained": a file of this project; "keras-cache": Keras had it on disk;
            "keras-download": Keras fetched it now; "random": no file; "file": the user's file.
        path: the file, or None for "random".
        sha256: SHA-256 of the file (64 hexadecimal digits), or None for "random".
        description: one line for people.
    """

    kind: Literal["pretrained", "keras-cache", "keras-download", "random", "file"]
    path: Path | None
    sha256: str | None
    description: str


def load_weights(
    model: keras.Model, backbone: Backbone, weights: str, *, pretrained_dir: Path, root: Path
) -> WeightsSource:
    """Fill ``model`` with the weights that ``weights`` names.

    Args:
        model: the network from :func:`catdog.backbones.build_backbone`; changed in place.
        backbone: the record the model was built from.
        weights: "imagenet", "random" or the path of a weights file.
        pretrained_dir: the directory with the weights this project ships.
        root: what a relative path in ``weights`` is relative to.

    Raises:
        CatdogError: the file is missing, damaged, no weights file or made for another network,
            or the ImageNet weights are neither on disk nor to be downloaded. The model may be
            partly filled then: do not use it.
    """
    if weights == "random":
        return WeightsSource("random", None, None, f"random weights for {backbone.name}")
    if weights != "imagenet":
        path = _user_file(weights, root)
        _load_file(model, backbone, path)
        return WeightsSource("file", path, sha256_of(path), f"weights for {backbone.name} from {weights}")

    shipped = _shipped_file(backbone, pretrained_dir)
    if shipped is not None:
        _load_file(model, backbone, shipped)
        return WeightsSource(
            "pretrained",
            shipped,
            backbone.shipped_sha256,
            f"ImageNet weights for {backbone.name} shipped with the project",
        )

    path, downloaded = _fetch_with_keras(backbone, pretrained_dir)
    _load_file(model, backbone, path)
    how = "downloaded by Keras" if downloaded else "from the Keras cache"
    return WeightsSource(
        "keras-download" if downloaded else "keras-cache",
        path,
        sha256_of(path),
        f"ImageNet weights for {backbone.name} {how}",
    )


def load_all(
    networks: Sequence[keras.Model], backbones: Sequence[Backbone], weights: str, *, pretrained_dir: Path, root: Path
) -> tuple[WeightsSource, ...]:
    """Fill one or several networks with the weights that ``weights`` names.

    Args:
        networks: from :func:`catdog.backbones.build_backbone`; changed in place.
        backbones: their records, in the same order.
        weights: as :func:`load_weights` takes it; for several backbones one word for all, or one
            word or path each, joined by "+" in their order.
        pretrained_dir: the directory with the weights this project ships.
        root: what a relative path is relative to.

    Returns:
        One source a network, in the same order.

    Raises:
        CatdogError: as :func:`load_weights`; or ``weights`` names too few or too many, or one path
            for several networks.
    """
    return tuple(
        load_weights(network, backbone, part, pretrained_dir=pretrained_dir, root=root)
        for network, backbone, part in zip(networks, backbones, _one_each(weights, backbones), strict=True)
    )


def joined_sha256(sources: Sequence[WeightsSource]) -> str:
    """Return the SHA-256 of the files of all networks, joined by "+"; "none" stands for random weights."""
    return "+".join(source.sha256 or "none" for source in sources)


def check_same_weights(sources: Sequence[WeightsSource], features_sha256: str) -> None:
    """Refuse weights that are others than the features were made with: a head fits one network only.

    Args:
        sources: what :func:`load_all` loaded now.
        features_sha256: from :func:`joined_sha256` when the features were made.

    Raises:
        CatdogError: they differ.
    """
    found = joined_sha256(sources)
    if found != features_sha256:
        raise CatdogError(
            f"the backbone's weights changed since its features were made (SHA-256 {found}, before {features_sha256});"
            " `dvc repro --force --single-item embed` makes the features anew"
        )


def check_weights_available(backbones: Sequence[Backbone], weights: str, *, pretrained_dir: Path, root: Path) -> None:
    """Refuse, before any work and without a deep-learning framework, weights that cannot load.

    For a path: the file exists and is an HDF5 file. For "imagenet": the shipped file, if there is
    one, is intact; otherwise nothing is checked, because Keras checks its own cache and only a
    download can tell whether it works. The arguments are those of :func:`load_all`.

    Raises:
        CatdogError: the file is missing, damaged or no weights file, or ``weights`` does not fit
            the number of backbones.
    """
    for backbone, part in zip(backbones, _one_each(weights, backbones), strict=True):
        if part == "imagenet":
            _shipped_file(backbone, pretrained_dir)
        elif part != "random":
            _user_file(part, root)


def _one_each(weights: str, backbones: Sequence[Backbone]) -> list[str]:
    """Return what ``weights`` says of each backbone; raise CatdogError if it does not fit their number."""
    if len(backbones) == 1:
        return [weights]  # a path may hold a "+"
    names = "+".join(backbone.name for backbone in backbones)
    parts = weights.split("+")
    if len(parts) == 1 and weights in ("imagenet", "random"):
        return parts * len(backbones)
    if len(parts) == 1:
        raise CatdogError(
            f"weights = '{weights}' is one file, but '{names}' are {len(backbones)} networks: give one each, joined"
            f" by +, for example imagenet+{weights}"
        )
    if len(parts) != len(backbones) or not all(parts):
        raise CatdogError(
            f"weights = '{weights}' does not name one source for each of the {len(backbones)} networks '{names}':"
            f" give imagenet or random for all, or one each, joined by + (no path may hold a + itself)"
        )
    return parts


def _shipped_file(backbone: Backbone, pretrained_dir: Path) -> Path | None:
    """Return this project's file with the ImageNet weights, or None if there is none.

    Raises:
        CatdogError: the file is there, but not as it was shipped.
    """
    if backbone.shipped is None:
        return None
    path = pretrained_dir / backbone.shipped
    if not path.is_file():
        return None
    digest = sha256_of(path)
    if digest != backbone.shipped_sha256:
        raise CatdogError(
            f"'{path}' is damaged or was changed: its SHA-256 is {digest}, not {backbone.shipped_sha256};"
            f" restore it (git checkout) or delete it"
        )
    return path


def _user_file(weights: str, root: Path) -> Path:
    """Return the path of the user's weights file; raise CatdogError if it cannot be one."""
    path = users_path("weights", weights, root)
    try:
        found = path.is_file()
    except OSError as error:  # a name that is too long, or a folder that this user may not look into
        raise CatdogError(f"weights file '{path}' cannot be read: {error.strerror}") from None
    if not found:
        raise CatdogError(f'there is no weights file \'{path}\': weights is "imagenet", "random" or the path of a file')
    if path.suffix not in _SUFFIXES:
        raise CatdogError(f"weights file '{path}' must end in .weights.h5 or .h5: Keras reads no other kind")
    _check_hdf5(path)
    return path


def _check_hdf5(path: Path) -> None:
    """Raise CatdogError unless the file starts as HDF5 files do."""
    try:
        with path.open("rb") as file:
            signature = file.read(len(_HDF5_SIGNATURE))
    except OSError as error:
        raise CatdogError(f"weights file '{path}' cannot be read: {error.strerror}") from None
    if signature != _HDF5_SIGNATURE:
        raise CatdogError(f"'{path}' is not an HDF5 file: give a weights file that Keras saved")


def _load_file(model: keras.Model, backbone: Backbone, path: Path) -> None:
    """Load a weights file into the model; raise CatdogError if it does not fit.

    Variables keep their type (float32): Keras casts what the file holds.
    """
    try:
        with warnings.catch_warnings():
            # Keras only warns when the file lacks some layers, which then stay random.
            warnings.filterwarnings("error", message="Skipping nested container")
            model.load_weights(path)
    except (OSError, ValueError, KeyError, TypeError, UserWarning) as error:  # of Keras and h5py, for unfit files
        raise CatdogError(
            f"'{path}' does not hold weights for '{backbone.name}': it is damaged or was saved from another network"
        ) from error


def _keras_models_directory() -> Path:
    """Return the directory where ``keras.utils.get_file`` keeps weights (the same rules, without Keras)."""
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser()
    if not os.access(home, os.W_OK):
        home = Path("/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()) / ".keras"
    return home / "models"


def _fetch_with_keras(backbone: Backbone, pretrained_dir: Path) -> tuple[Path, bool]:
    """Let Keras find, check or download the ImageNet weights.

    Returns:
        The file, and whether it was downloaded now.

    Raises:
        CatdogError: the file is not on disk and cannot be downloaded.
    """
    import keras

    path = _keras_models_directory() / backbone.weights_file
    before = _stamp(path)
    size = backbone.native_size
    builder = getattr(keras.applications, backbone.builder)
    try:
        with _network_timeout(NETWORK_TIMEOUT_SECONDS):
            # The builder knows the address and the checksum; the network it builds is not needed.
            builder(weights="imagenet", include_top=False, input_shape=(size, size, 3))
    except Exception as error:  # get_file raises plain Exception when a download fails
        offline = ", ".join(name for name, other in BACKBONES.items() if other.shipped is not None)
        raise CatdogError(
            f"the ImageNet weights of '{backbone.name}' are missing and could not be downloaded"
            f" ({_first_line(error)}): put {backbone.weights_file} into {path.parent},"
            f" or choose a backbone that works offline: {offline}"
        ) from error
    return path, _stamp(path) != before


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written anew, or None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Bound every wait for the network inside the block; without it Keras may wait for minutes."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
