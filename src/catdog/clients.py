"""Data sources that have a client of their own: Kaggle, Google Drive and TensorFlow Datasets.

Each client is an optional extra of the project and is imported when its source is asked for. What a client says in
its own way (exceptions, exits, pages of help) becomes one sentence here.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from catdog.errors import CatdogError
from catdog.files import ZIP_DATE, require_disk_space
from catdog.labels import SPLIT_NAMES, UNLABELLED_FOLDERS
from catdog.progress import progress
from catdog.runtime import notices_held_back

UNLABELLED = "unlabelled"
"""Folder of the exported images that have no label."""

# Seconds to wait for a connection, and for the next bytes.
_TIMEOUTS = (10.0, 60.0)
_RETRIES = 5
_SUFFIX_BY_SIGNATURE = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"RIFF": "webp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


def fetch_kaggle(competition: str, folder: Path) -> Path:
    """Downloads all files of a Kaggle competition as one zip archive, through Kaggle's own client.

    The credentials are those of that client: KAGGLE_API_TOKEN, ~/.kaggle/access_token, kaggle.json, or KAGGLE_USERNAME
    with KAGGLE_KEY. A download that was cut off is continued by the next call; an archive that is already there, whole,
    is returned as it is.

    Args:
        competition: its name in the address of its page, e.g. "dogs-vs-cats".
        folder: for the archive and for what is left of a download that was cut off; made if absent.

    Returns:
        `<folder>/<competition>.zip`, whole: every member was read and its checksum is right.

    Raises:
        CatdogError: no client, no credentials, the rules are not accepted, no such competition, no network, or what
            came is no sound archive.
    """
    dataset = "dataset = 'kaggle'"
    archive = folder / f"{competition}.zip"
    # The client writes under the final name, so it gets a folder of its own until all is there.
    part = folder / "incomplete" / archive.name
    part.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{competition}.lock"):
        if archive.is_file():
            return archive
        _download_from_kaggle(_kaggle_api(competition, dataset), competition, part, dataset)
        if not part.is_file() or _is_damaged_zip(part):
            _forget(part)
            raise CatdogError(f"{dataset}: what Kaggle sent for {competition!r} is no sound zip archive; run it again")
        part.replace(archive)
    return archive


def _kaggle_api(competition: str, dataset: str) -> Any:
    """Returns Kaggle's client, signed in."""
    api = _client("kaggle", dataset, extra="kaggle").api
    try:
        # It prints a page of help before it exits.
        with contextlib.redirect_stdout(io.StringIO()):
            api.authenticate()
    except SystemExit as error:
        raise CatdogError(
            f"{dataset} needs credentials of a Kaggle account and found none that are valid: create an API token at "
            "https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_token, or its kaggle.json in "
            "~/.kaggle"
        ) from error
    except Exception as error:
        raise _kaggle_failure(error, competition, dataset) from error
    return api


def _download_from_kaggle(api: Any, competition: str, part: Path, dataset: str) -> None:
    try:
        # Its messages go to standard output, which belongs to the program.
        with contextlib.redirect_stdout(sys.stderr):
            api.competition_download_files(competition, path=os.fspath(part.parent), quiet=not sys.stderr.isatty())
    except Exception as error:
        if isinstance(error, ValueError):
            # The client takes an error page for the rest of the file, and notices by the size. Never continue that.
            _forget(part)
        raise _kaggle_failure(error, competition, dataset) from error


def _kaggle_failure(error: Exception, competition: str, dataset: str) -> Exception:
    """Returns the sentence that an exception of Kaggle's client stands for, or the exception when there is none."""
    import requests

    if isinstance(error, requests.exceptions.HTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return CatdogError(
                f"{dataset}: Kaggle does not accept the credentials; create a new API token at "
                "https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_token"
            )
        if status == 403:
            return CatdogError(
                f"{dataset}: Kaggle refuses the files ({_one_line(error)}); open "
                f"https://www.kaggle.com/c/{competition}/rules, signed in, accept the rules, and run it again"
            )
        if status == 404:
            return CatdogError(f"{dataset}: Kaggle has no competition {competition!r}; check its name")
        return CatdogError(f"{dataset}: Kaggle answers with error {status} ({_one_line(error)}); run it again later")
    if _is_network_failure(error):
        return _unreachable(dataset, "Kaggle", error)
    if isinstance(error, requests.exceptions.RequestException | ValueError):
        return CatdogError(f"{dataset}: the download failed ({_one_line(error)}); run it again, it continues")
    return error


def _is_damaged_zip(path: Path) -> bool:
    """Says whether a file is no zip archive, or a member's checksum is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return True


def _forget(part: Path) -> None:
    """Deletes an incomplete download of Kaggle's client and the marker that would let it continue."""
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".kaggle-partial").unlink(missing_ok=True)


def fetch_drive(url: str, folder: Path) -> Path:
    """Downloads a shared file or folder of Google Drive, through gdown.

    A download that was cut off is continued by the next call, where `folder` is still there; what was finished is
    returned as it is, with a line on standard error, since Drive does not tell whether a file changed.

    Args:
        url: address of a file or folder, as "Copy link" or a browser gives it.
        folder: for what is downloaded, whole or in part; made if absent.

    Returns:
        The file under its own name, or the folder, somewhere below `folder`.

    Raises:
        CatdogError: no client, no such address, not shared with everyone, downloaded too often, no network, an empty
            folder, or two files of one name in a folder.
    """
    dataset = f"dataset = {url!r}"
    gdown = _client("gdown", dataset, extra="drive")
    identifier, is_folder = _drive_identifier(url)
    finished = folder / identifier
    incomplete = folder / f"{identifier}.incomplete"
    incomplete.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "quiet": not sys.stderr.isatty(),
        "resume": True,
        "retries": _RETRIES,
        "timeout": _TIMEOUTS,
    }
    with FileLock(folder / f"{identifier}.lock"):
        if finished.is_dir():
            print(
                f"download: {url} was fetched before and is taken from {finished}; delete that folder and run again if "
                "it has changed since",
                file=sys.stderr,
            )
            return finished if is_folder else next(finished.iterdir())
        continued = any(incomplete.rglob("*.part"))
        try:
            # gdown tells its steps on standard output, which belongs to the program.
            with contextlib.redirect_stdout(sys.stderr):
                if is_folder:
                    paths = gdown.download_folder(id=identifier, output=os.fspath(incomplete), **options)
                else:
                    paths = [gdown.download(id=identifier, output=os.fspath(incomplete) + os.sep, **options)]
        except Exception as error:
            raise _drive_failure(error, gdown, dataset) from error
        if not paths:
            raise CatdogError(
                f"{dataset} is a folder without files, or not shared with everyone; set its access to 'Anyone with "
                "the link' and check the address"
            )
        double = next((path for path in paths if paths.count(path) > 1), None) if is_folder else None
        if double is not None:
            raise CatdogError(
                f"{dataset} holds two files called {Path(double).name!r} in one folder; rename one of them there"
            )
        # gdown continues a file without asking whether it is still the same.
        if continued and not is_folder and zipfile.is_zipfile(paths[0]) and _is_damaged_zip(Path(paths[0])):
            shutil.rmtree(incomplete)
            raise CatdogError(f"{dataset} changed while it was downloaded; run it again")
        incomplete.rename(finished)
    return finished if is_folder else finished / Path(paths[0]).name


def _drive_identifier(url: str) -> tuple[str, bool]:
    """Returns Drive's name of what is behind an address, and whether that is a folder."""
    parts = urllib.parse.urlsplit(url)
    if match := re.search(r"/(folders|d)/([-\w]+)", parts.path):
        return match[2], match[1] == "folders"
    identifier = urllib.parse.parse_qs(parts.query).get("id", [""])[0]
    if not re.fullmatch(r"[-\w]+", identifier):
        raise CatdogError(
            f"dataset = {url!r} names no file and no folder of Google Drive; take the address that Share > Copy link "
            "gives"
        )
    return identifier, parts.path.endswith("folderview")


def _drive_failure(error: Exception, gdown: Any, dataset: str) -> Exception:
    """Returns the sentence that an exception of gdown stands for, or the exception when there is none."""
    import requests

    message = " ".join(str(error).split())
    if _is_network_failure(error):
        return _unreachable(dataset, "Google Drive", error)
    if "Too many users" in message or "quota" in message.lower():
        return CatdogError(
            f"{dataset} was downloaded too often lately, and Google Drive gives it to nobody for up to 24 hours; run "
            "it again later, or copy it to a Drive of your own and give that address"
        )
    if message.startswith("Failed to download the following files"):
        lost = message.count(" - ")
        return CatdogError(
            f"{dataset}: {lost} of the folder's files could not be had, because they are not shared with 'Anyone with "
            "the link' or were downloaded too often; run it again, it continues"
        )
    status = re.search(r"status code (\d+)", message)  # of the page that lists a folder
    if isinstance(error, gdown.FileURLRetrievalError) or (status and status[1] in ("401", "403", "404")):
        return CatdogError(
            f"{dataset} does not exist or is not shared with everyone; check the address and set the access to "
            "'Anyone with the link'"
        )
    if isinstance(error, gdown.DownloadError | requests.exceptions.RequestException):
        return CatdogError(f"{dataset} could not be downloaded whole ({_one_line(error)}); run it again, it continues")
    return error


def export_tfds(name: str, target: Path) -> dict[str, Any]:
    """Writes an image classification set of TensorFlow Datasets as a zip archive; the image files stay as they are.

    Members are `<split>/<class>/<index>.<suffix>`, without `<split>/` where there is one split only, and
    `unlabelled/<split>/<index>.<suffix>` for images without a label. The index counts from 0 in the order of the set
    itself; the suffix follows from the content. Characters of a class name that make no safe folder name are written
    as %XX. The same version gives the same bytes.

    TensorFlow Datasets downloads and prepares the set in its own folder, TFDS_DATA_DIR or ~/tensorflow_datasets,
    unless it lies there already.

    Args:
        name: as `tensorflow_datasets.load` takes it, e.g. "beans", "imagenette/320px" or "cifar10:3.*.*".
        target: the archive to write.

    Returns:
        `version`, `config` (None for a set without), `splits` (number of images by split), and, where there are any,
        `splits_left_out` (not train, validation or test), `citation` and `license`.

    Raises:
        CatdogError: no client, no such set, no image classification set, no network, or files that have to be
            downloaded by hand.
    """
    dataset = f"dataset = 'tfds:{name}'"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with notices_held_back():
        tfds = _client("tensorflow_datasets", dataset, extra="tfds")
        import tensorflow as tf

        tf.zeros(())  # the first operation writes TensorFlow's notices once more
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        builder = _tfds_builder(tfds, name, dataset)
        image, label = _image_and_label(tfds, builder.info, dataset)
        _prepare_tfds(tfds, builder, dataset)
    every = {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}
    # Sets have splits such as `extra` or `small1`, of which only their papers say what they are for.
    known = SPLIT_NAMES.keys() | UNLABELLED_FOLDERS
    counts = {split: count for split, count in every.items() if split.lower() in known or len(every) == 1}
    left_out = [split for split in every if split not in counts]
    if not counts:
        raise CatdogError(
            f"{dataset} has the splits {', '.join(every)}, but no train, validation or test; choose another"
        )
    if left_out:
        print(f"download: tfds:{name} is taken without its splits {', '.join(left_out)}", file=sys.stderr)
    require_disk_space(target.parent, builder.info.dataset_size, f"exporting tfds:{name}")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        examples = _tfds_examples(tfds, builder, counts, image, label)
        try:
            for member, encoded in progress(examples, "export", sum(counts.values()), "images"):
                archive.writestr(zipfile.ZipInfo(member, ZIP_DATE), encoded)
        except tf.errors.OpError as error:
            raise CatdogError(
                f"{dataset}: the prepared files in {builder.data_dir} cannot be read ({_one_line(error)}); delete that "
                "folder and run it again"
            ) from error
    facts = {
        "version": str(builder.version),
        "config": builder.builder_config.name if builder.builder_config else None,
        "splits": counts,
        "splits_left_out": left_out,
        "citation": builder.info.citation,
        "license": builder.info.redistribution_info.license,
    }
    return {key: value for key, value in facts.items() if value or key == "config"}


def _tfds_builder(tfds: Any, name: str, dataset: str) -> Any:
    try:
        return tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(re.split("[/:]", name)[0], known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "it is none of them"
        raise CatdogError(
            f"{dataset}: TensorFlow Datasets has no set of that name; {hint} "
            "(https://www.tensorflow.org/datasets/catalog/overview)"
        ) from error
    except Exception as error:  # ValueError, AssertionError, ImportError...: each builder has its own
        raise CatdogError(f"{dataset} cannot be opened ({_one_line(error)}); check name, config and version") from error


def _image_and_label(tfds: Any, info: Any, dataset: str) -> tuple[str, str]:
    """Returns the names of the features that hold the encoded image and its class."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    # Subclasses hold masks, not photographs; pictures of floating-point numbers are no pictures in their encoded form.
    images = [
        key for key, one in features.items() if type(one) is tfds.features.Image and np.dtype(one.np_dtype).kind == "u"
    ]
    labels = [key for key, one in features.items() if isinstance(one, tfds.features.ClassLabel)]
    for pair in (info.supervised_keys or ()), (*images, *labels):
        if len(pair) == 2 and pair[0] in images and pair[1] in labels:
            return pair[0], pair[1]
    raise CatdogError(
        f"{dataset} is no image classification set, with one image and one class each: its features are "
        f"{', '.join(sorted(features)) or type(info.features).__name__}; choose another set"
    )


def _prepare_tfds(tfds: Any, builder: Any, dataset: str) -> None:
    """Downloads and prepares a set, unless that was done before."""
    if sys.stderr.isatty():
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except Exception as error:  # each builder has its own: AssertionError, DownloadError, ImportError, OSError...
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if _is_network_failure(error):
            raise _unreachable(dataset, "its publisher", error) from error
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            manual = Path(builder.data_dir_root, "downloads", "manual")
            page = f"https://www.tensorflow.org/datasets/catalog/{builder.name}"
            raise CatdogError(
                f"{dataset} has files that its publisher gives only by hand; put them into {manual} as {page} says"
            ) from error
        raise CatdogError(
            f"{dataset} could not be prepared by TensorFlow Datasets ({type(error).__name__}: {_one_line(error)}); "
            "run it again, or give the images as a folder or archive"
        ) from error


def _tfds_examples(
    tfds: Any, builder: Any, counts: dict[str, int], image: str, label: str
) -> Iterator[tuple[str, bytes]]:
    """Yields the member name and the encoded image of every example, split by split."""
    feature = builder.info.features[label]
    folders = [_folder_name(one) for one in feature.names]
    # One file after another, and nothing kept: the order is the set's own, and the memory bounded.
    reading = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    reading.options.deterministic = True
    encoded_only = tfds.decode.PartialDecoding({image: True, label: True}, decoders={image: tfds.decode.SkipDecoding()})
    for split, count in counts.items():
        examples = builder.as_dataset(
            split=split, shuffle_files=False, decoders=encoded_only, read_config=reading
        ).as_numpy_iterator()
        digits = len(str(count - 1))
        for index, example in enumerate(examples):
            number = int(example[label])
            if number < 0:
                folder = f"{UNLABELLED}/{split}"
            else:
                folder = f"{split}/{folders[number]}" if len(counts) > 1 else folders[number]
            encoded = bytes(example[image])
            yield f"{folder}/{index:0{digits}d}.{_suffix_of(encoded)}", encoded


def _folder_name(class_name: str) -> str:
    """Returns a class's name as a folder name: the same, but for characters that are unsafe; different stay different.

    Unsafe are separators, control characters, and a beginning or end by which the folder would be taken for a hidden
    or special one. They are written as %XX, and so is %.
    """
    name = re.sub(r'[%/\\:*?"<>|\x00-\x1f\x7f]|^[. ]|[. ]$', lambda match: f"%{ord(match[0]):02X}", class_name)
    if name.lower() in ("__macosx", "", *UNLABELLED_FOLDERS):
        name = f"%{ord(name[0]):02X}{name[1:]}" if name else "%"
    return name


def _suffix_of(encoded: bytes) -> str:
    known = (suffix for signature, suffix in _SUFFIX_BY_SIGNATURE.items() if encoded.startswith(signature))
    return next(known, "bin")


def _client(module: str, dataset: str, *, extra: str) -> Any:
    """Imports the client of a data source; raises CatdogError when it is not installed."""
    try:
        # Kaggle's asks for credentials while it is imported, and tells at length when there are none.
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ImportError as error:
        raise CatdogError(
            f"{dataset} needs the extra {extra!r}, which is not installed ({_one_line(error)}); `make setup` installs "
            f"it, or `pip install --editable '.[{extra}]'` in the repository root"
        ) from error


def _is_network_failure(error: BaseException) -> bool:
    """Says whether an exception, or one that it came from, means that no connection could be made or kept."""
    import requests

    kinds = (requests.exceptions.ConnectionError, requests.exceptions.Timeout, urllib.error.URLError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, kinds) and not isinstance(cause, urllib.error.HTTPError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _unreachable(dataset: str, place: str, error: BaseException) -> CatdogError:
    return CatdogError(
        f"{dataset}: {place} cannot be reached ({type(error).__name__}); check the network connection and run it "
        "again, or give the path of a copy"
    )


def _one_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, without the queries of addresses, which may hold secrets."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", line)


__all__ = ["UNLABELLED", "export_tfds", "fetch_drive", "fetch_kaggle"]
