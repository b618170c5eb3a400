"""`catdog app`: finds the model and starts Streamlit's server with the page."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from catdog import paths
from catdog.app import Settings, find_examples, find_pictures
from catdog.errors import CatdogError
from catdog.files import writing_where_asked
from catdog.model import read_info
from catdog.plots import BLUE, SKY

HOST, PORT = "127.0.0.1", 8501
MAX_UPLOAD_MEGABYTES = 50
"""Of one file."""
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class FoundModel:
    """The model that answers."""

    path: Path  # of a file that nobody changes
    name: str  # as the page shows it
    accuracy: str  # on the test split, in words; empty where it is not known


def run_app(
    *, model: str | None, host: str = HOST, port: int = PORT, examples: Path | None = None, folder: Path | None = None
) -> int:
    """Serves the page until Ctrl-C; mistakes are told before that. Returns the exit code.

    Args:
        model: as in `model_reference.find_model`.
        host: address to listen on.
        port: 1 to 65535.
        examples: folder of pictures to try; None for some of the data set's test split.
        folder: folder, archive or file whose pictures are sorted.

    Raises:
        CatdogError: Streamlit is not installed, the port is taken, there is no such model, or no such pictures.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise CatdogError("the page needs Streamlit, which is not installed; `pip install 'catdog[app]'` installs it")
    require_free_port(host, port)
    root = _root_or_none()
    examples, folder = (path and path.absolute() for path in (examples, folder))
    with contextlib.ExitStack() as downloads:
        found = find_model(root, model, downloads)
        with contextlib.ExitStack() as archives:
            find_examples(root, examples, archives)
            if folder:
                find_pictures(folder, archives)
        settings = Settings(
            model=str(found.path.absolute()),
            model_name=found.name,
            accuracy=found.accuracy,
            root=str(root or ""),
            examples=str(examples or ""),
            folder=str(folder or ""),
        )
        print("starting the page; Ctrl-C ends it", flush=True)
        from streamlit.web import cli

        # In this process: Streamlit ends at Ctrl-C and SIGTERM by itself, and what was downloaded is removed then.
        cli.main(server_arguments(settings, host, port), standalone_mode=False)
    return 0


def server_arguments(settings: Settings, host: str, port: int) -> list[str]:
    """Returns the arguments of Streamlit's command that serves the page."""
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",  # no questions and no browser
        "server.fileWatcherType": "none",
        "server.maxUploadSize": MAX_UPLOAD_MEGABYTES,
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",  # a visitor sees no stack trace; the terminal does
        "client.toolbarMode": "minimal",
        "theme.light.primaryColor": BLUE,
        "theme.dark.primaryColor": SKY,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    if host in _THIS_MACHINE:
        # A page elsewhere on the web cannot reach the server by letting its own name point to this machine.
        flags += [f"--server.allowedHosts={name}" for name in _THIS_MACHINE]
    page = Path(__file__).with_name("app_page.py")
    return ["run", str(page), *flags, "--", json.dumps(asdict(settings))]


def require_free_port(host: str, port: int) -> None:
    """Raises CatdogError where a server cannot listen on the port of the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a connection that just ended does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except PermissionError:
        raise CatdogError(f"port {port} is for the system only; give one above 1023, e.g. --port {PORT}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = PORT + 1 if port == PORT else PORT
            raise CatdogError(
                f"port {port} is taken by another program; end that one, or give another, e.g. --port {other}"
            ) from None
        raise CatdogError(
            f"--host {host} is no address of this machine; {HOST} is for this machine alone, 0.0.0.0 for its network"
        ) from None


def find_model(root: Path | None, reference: str | None, downloads: contextlib.ExitStack) -> FoundModel:
    """Finds the model that a user means, and says what it is.

    Args:
        root: of the repository; None outside of one.
        reference: as in `model_reference.find_model`.
        downloads: removes what was downloaded or copied.

    Returns:
        A file that stays as it is described: of one that `dvc repro` may write anew a copy.

    Raises:
        CatdogError: there is no such model.
    """
    from catdog import model_reference
    from catdog.registry_files import CACHE
    from catdog.tracking import dvc_hash

    path = model_reference.find_model(reference, downloads)
    read_info(path)
    if root and reference and path.parent == Path.home() / CACHE and str(path) != reference:
        return _describe_promoted(root, reference, path, dvc_hash(path))
    in_mlflow = reference is not None and ":/" in reference
    if not in_mlflow:  # what MLflow gave was downloaded for this alone; the page loads the file at the first visit
        path = _copy(path, downloads)
    md5 = dvc_hash(path)

    def read(name: str) -> str:
        with contextlib.suppress(OSError):
            return (root / name).read_text(encoding="utf-8") if root else ""
        return ""

    # Of a file its name alone: visitors of the page need not know where on the machine it lies.
    name = reference if in_mlflow else path.name
    return FoundModel(path, f"{name} (md5 {md5[:8]})", find_accuracy(md5, read))


def _copy(path: Path, downloads: contextlib.ExitStack) -> Path:
    copy = Path(downloads.enter_context(tempfile.TemporaryDirectory(prefix="catdog-")), path.name)
    with writing_where_asked(copy):
        shutil.copyfile(path, copy)
    return copy


def _describe_promoted(root: Path, reference: str, path: Path, md5: str) -> FoundModel:
    from catdog.registry_files import find_artifact, find_version
    from catdog.registry_tags import read_registry, try_git

    artifact = find_artifact(root, "HEAD", None)
    version = find_version(read_registry(root, artifact), reference)
    stages = f" ({', '.join(version.stages)})" if version.stages else ""
    accuracy = find_accuracy(md5, lambda name: try_git(root, "show", f"{version.commit}:{name}"))
    return FoundModel(path, f"{artifact} {version.name}{stages}", accuracy)


def find_accuracy(md5: str, read: Callable[[str], str]) -> str:
    """Says how a model did on the test split, if the metrics at hand are this model's.

    Args:
        md5: hash of the model file.
        read: returns the text of dvc.lock or of the metrics, empty where it does not exist.

    Returns:
        E.g. "96.7 % of 120 test pictures right (95 % interval: 91.7 to 98.7)"; empty where it is not known.
    """
    from catdog.registry_files import read_yaml

    try:
        lock = read_yaml(read("dvc.lock"), "dvc.lock")
    except CatdogError:  # a merge under way leaves its markers there
        return ""
    stage = lock.get("stages", {}).get("evaluate", {})
    judged = {dep["path"]: dep.get("md5") for dep in stage.get("deps", [])}
    written = {out["path"]: out.get("md5") for out in stage.get("outs", [])}
    text = read(paths.METRICS.as_posix())
    if judged.get(paths.MODEL.as_posix()) != md5:
        return ""
    if written.get(paths.METRICS.as_posix()) != hashlib.md5(text.encode()).hexdigest():
        return ""
    metrics = json.loads(text)
    sentence = f"{100 * metrics['accuracy']:.1f} % of {metrics['test_images']:,} test pictures right"
    if "accuracy_low" in metrics:
        low, high = 100 * metrics["accuracy_low"], 100 * metrics["accuracy_high"]
        sentence += f" (95 % interval: {low:.1f} to {high:.1f})"
    return sentence


def _root_or_none() -> Path | None:
    with contextlib.suppress(CatdogError):
        return paths.repository_root()
    return None
