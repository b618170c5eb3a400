"""Programs of the pipeline in forks of a process that has imported already: no test waits for the same imports again.

Importing TensorFlow, MLflow and DVC takes most of the time of a stage on a hundred small pictures. A folder that comes
first on PATH has a `python`, a `dvc` and others of its own. They are small: each hands its command, its environment and
its open files to one process of the session, which imported libraries, nothing of this project, and no more than
imported them. A fork of that process runs the command; signals, exit status and death are passed on between the two.

What reads the environment while it is imported starts as it always does: see COLD.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import marshal
import multiprocessing.process
import multiprocessing.spawn
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

ADDRESS = "CATDOG_TESTS_WARM"
"""The variable with the address of the socket at which the process listens; empty: commands run as they always do."""

COLD = ("KERAS_BACKEND", "KERAS_HOME", "TF_", "JAX_", "OMP_", "OPENBLAS_")
"""Variables that libraries read while they are imported: where one is another, the command runs in a fresh process."""

PROGRAMS = ("dvc", "gto", "catdog", "mlflow", "uvicorn")
"""Programs written in Python that are forks, too."""

NAMESPACES = ("/proc/self/ns/user", "/proc/self/ns/mnt")
"""What a fork enters where the command was started in another: as which user, then with which disks."""

# Started for every command, hence with the fewest imports. `{python}` and `{program}` are filled in.
SHIM = """#!{python} -ISE
import marshal, os, signal, socket, sys

PROGRAM, PREFIX = {program!r}, {prefix!r}
environment = dict(os.environ)
address = environment.get({address!r}, "")
arguments = PREFIX + sys.argv[1:]
steering = {{name: value for name, value in environment.items() if name.startswith({cold!r})}}
command = arguments[0] if arguments else ""
if not address or steering != {steering!r} or not (command in ("-c", "-m", *PREFIX) or command.endswith(".py")):
    os.execv(PROGRAM, [PROGRAM, *arguments])
try:
    connection = socket.socket(socket.AF_UNIX)
    others = [os.open(path, os.O_RDONLY) for path, name in {spaces!r} if os.readlink(path) != name]
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if number != connection.fileno()]
    files = [number for number in files if os.path.exists(f"/proc/self/fd/{{number}}")]
    connection.connect(address)
    message = marshal.dumps((arguments, os.getcwd(), environment, files, os.getpgrp() == os.getpid(), others))
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], files)
    connection.sendall(message)
except OSError:
    os.execv(PROGRAM, [PROGRAM, *arguments])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
for number in files:
    os.close(number)
status = int.from_bytes(connection.recv(2), "big", signed=True)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def programs(environment: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """Starts the process, which ends with this one; returns the folder for PATH and the variable for its programs."""
    # A socket's path may be no longer than 100 characters, which pytest's folders are.
    folder = Path(tempfile.mkdtemp(prefix="catdog-warm-"))
    binaries = Path(sys.executable).parent
    for name in ("python", *PROGRAMS):
        shim, prefix = folder / name, [str(binaries / name)] if name in PROGRAMS else []
        shim.write_text(
            SHIM.format(
                python=binaries / "python",
                program=str(binaries / "python"),
                prefix=prefix,
                address=ADDRESS,
                cold=COLD,
                steering={key: value for key, value in environment.items() if key.startswith(COLD)},
                spaces=[(path, str(Path(path).readlink())) for path in NAMESPACES],
            )
        )
        shim.chmod(0o755)
    address = str(folder / "socket")
    with (folder / "log").open("w") as log:  # of native code's notices
        process = subprocess.Popen(
            [sys.executable, __file__, address, str(folder / "python")],
            env=environment | {"HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )

    def end() -> None:
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError((folder / "log").read_text())
    return folder, {ADDRESS: address}


OF_STAGES = (
    "keras",
    "cv2",
    "pandas",
    "PIL.Image",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.pyfunc",
    "dvc.cli",
    "dvc.repo.index",
    "dvc.scm",
    "dvc.commands.experiments.run",
    "dvc.commands.repro",
    "dvc.cli.parser",
    "dvc.repo.experiments.queue.celery",
    "dvc.utils.hydra",
    "networkx",
    "dulwich.porcelain",
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
    "opentelemetry.sdk.metrics",
    "filelock",
    "PIL.ImageOps",
    "ruamel.yaml",
    "pydantic",
)
UNDER_JAX = ("jax", "keras", "tensorflow", "cv2", "pandas", "pydantic")
"""What training imports where Keras computes with JAX; TensorFlow reads the shards."""


def import_libraries() -> None:
    """Imports what the stages and DVC import, and computes nothing: once it has, TensorFlow does not survive a fork.

    Not pygit2: when it is imported it looks for git's settings below HOME, which commands have each their own.
    """
    gc.disable()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    hidden = dict.fromkeys(("sklearn", "matplotlib", "IPython", "jax"))  # as in catdog.runtime
    jax = os.environ.get("KERAS_BACKEND") == "jax"
    for name in UNDER_JAX if jax else OF_STAGES:
        if name == "keras":
            sys.modules.update(hidden | sys.modules)
        importlib.import_module(name)
        if name == "keras":
            for other in [other for other in hidden if sys.modules[other] is None]:
                del sys.modules[other]
    if jax:
        _share_compiled()
    gc.enable()
    gc.freeze()


def _share_compiled() -> None:
    """Lets forks read from the disk what JAX compiled for another one.

    There are no locks: with a limit of the size JAX takes some, and reads all that it kept to keep one more. A fork
    that reads what another one still writes cannot unpack it, and compiles by itself.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="compiled-", dir=os.environ["HOME"]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class Serving:
    """Forks for whoever connects, and tells each how its command ended."""

    def __init__(self, address: str, shim: str) -> None:
        self.shim, self.selector = shim, selectors.DefaultSelector()
        self.path = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self.end)
        self.children: dict[int, tuple[int, socket.socket, bool]] = {}

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                key.data()

    def end(self) -> None:
        for child, *_ in self.children.values():
            os.kill(child, signal.SIGKILL)
        os._exit(0)

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        head, files, _, _ = socket.recv_fds(connection, 8, 64)
        message = bytearray()
        while len(message) < int.from_bytes(head, "big"):
            message += connection.recv(65536)
        arguments, folder, environment, numbers, leads, others = marshal.loads(message)
        child = os.fork()
        if child == 0:
            given = dict(zip(numbers, files, strict=True))
            spaces = [given.pop(number) for number in others]
            self.become(arguments, folder, environment, given, connection, leads, spaces)
        for number in files:
            os.close(number)
        handle = os.pidfd_open(child)
        self.children[handle] = (child, connection, leads)
        self.selector.register(handle, selectors.EVENT_READ, lambda: self.ended(handle))
        self.selector.register(connection, selectors.EVENT_READ, lambda: self.told(handle))

    def ended(self, handle: int) -> None:
        child, connection, _ = self.children.pop(handle)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.selector.unregister(handle)
        os.close(handle)
        if connection in self.selector.get_map():
            self.selector.unregister(connection)
        with contextlib.suppress(OSError):  # whoever waited for it was killed
            connection.send(status.to_bytes(2, "big", signed=True))
        connection.close()

    def told(self, handle: int) -> None:
        if handle not in self.children:  # it ended in the same moment
            return
        child, connection, leads = self.children[handle]
        try:
            numbers = connection.recv(16)
        except OSError:
            numbers = b""
        if not numbers:  # whoever waited for it was killed
            self.selector.unregister(connection)
        for number in numbers or [signal.SIGKILL]:
            try:
                (os.killpg if leads else os.kill)(child, number)
            except ProcessLookupError:  # it is not yet the head of its group
                os.kill(child, number)

    def become(self, arguments, folder, environment, files, connection, leads, spaces) -> None:
        """In the fork: runs the command as a fresh process would."""
        code: object = 1
        try:
            if leads:  # a group of processes, which ends with it
                os.setsid()
            _enter(spaces)
            self.selector.close()
            for one in (self.listener, connection, *(pair[1] for pair in self.children.values())):
                one.close()
            for handle in self.children:
                os.close(handle)
            highest = max([*files, *files.values()]) + 1
            moved = {
                number: os.dup2(received, highest + place) for place, (number, received) in enumerate(files.items())
            }
            os.closerange(0, highest)
            for number, place in moved.items():
                os.dup2(place, number)
                os.close(place)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            given = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
            command, *rest = arguments
            first = "" if command in ("-c", "-m") else str(Path(command).resolve().parent)
            sys.path[:] = [first, *(str(Path(folder, entry)) for entry in given), *self.path]
            multiprocessing.process.ORIGINAL_DIR = folder
            sys.executable = self.shim
            multiprocessing.spawn.set_executable(self.shim)
            code = 0
            if command == "-c":
                sys.argv = ["-c", *rest[1:]]
                sys.modules["__main__"] = main = types.ModuleType("__main__")
                exec(compile(rest[0], "<string>", "exec"), main.__dict__)
            elif command == "-m":
                sys.argv = rest
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            else:
                sys.argv = [command, *rest]
                runpy.run_path(command, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
            if not isinstance(code, int | None):
                print(code, file=sys.stderr)
                code = 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            _finish(code or 0)


def _enter(spaces: list[int]) -> None:
    """Has this process see the disks, and be the user, that whoever asked sees and is."""
    libc = ctypes.CDLL(None, use_errno=True)
    for space in spaces:
        if libc.setns(space, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)


def _finish(code) -> None:
    """Ends a fork as the interpreter would: threads, then what is registered, then what is buffered."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code & 0xFF)


if __name__ == "__main__":
    import_libraries()
    serving = Serving(sys.argv[1], sys.argv[2])
    print("ready", flush=True)
    serving.run()
