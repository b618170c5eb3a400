"""Commands in forks of a process that has imported already behave as commands in fresh processes."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import SMALL_DISK, Project, require_small_disk, wait_until


@pytest.fixture
def project(workshop, tmp_path):
    return Project(tmp_path, workshop.home, warm=True)


FORKED = "import sys; warm = 'tensorflow' in sys.modules; "


def test_a_command_has_its_own_folder_arguments_environment_and_files(project):
    (project.root / "beside.py").write_text("VALUE = 7")
    (project.root / "script.py").write_text(
        "import os, sys, beside\n"
        "print('tensorflow' in sys.modules, 'catdog' in sys.modules, __name__, sys.argv[1:], os.environ['MINE'])\n"
        "print(beside.VALUE, os.getcwd(), sys.stdin.read(), file=sys.stderr)\n"
    )
    process = project.start("python", "script.py", "a", "b c", stdin=subprocess.PIPE, MINE="yes")
    stdout, stderr = process.communicate("given")
    assert stdout == "True False __main__ ['a', 'b c'] yes\n"
    assert stderr == f"7 {project.root} given\n"


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'at the end', file=sys.stderr)", 0, "at the end\n"),
    ],
)
def test_it_ends_as_a_fresh_one_does(project, code, status, told):
    done = project.run("python", "-c", f"{FORKED}assert warm; {code}")
    assert done.returncode == status
    assert done.stderr == told or (status == 1 and done.stderr.endswith(told))


def test_a_second_process_is_a_fork_too(project):
    (project.root / "script.py").write_text(
        "import os, sys\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "def seen(): return 'tensorflow' in sys.modules, os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, get_context('spawn')) as pool:\n"
        "        warm, number = pool.submit(seen).result()\n"
        "    print(warm, number != os.getpid())\n"
    )
    done = project.run("python", "script.py")
    assert (done.stdout, done.stderr) == ("True True\n", "")


WAITS = (
    FORKED + "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
    "open('pid', 'w').write(str(os.getpid()))\n"
    "while True: time.sleep(0.05)"
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGKILL, -9)])
def test_signals_reach_it_and_its_death_with_the_one_who_waits(project, number, status):
    process = project.start("python", "-c", WAITS)
    path = project.root / "pid"
    pid = wait_until(lambda: path.exists() and path.read_text())
    process.send_signal(number)
    process.communicate()
    assert process.returncode == status
    wait_until(lambda: not Path("/proc", pid).exists())


def test_a_group_of_processes_ends_together(project):
    """As when the group of a server is ended that was started as the head of one."""
    code = FORKED + (
        "import subprocess, time\n"
        "assert warm\n"
        "child = subprocess.Popen([sys.executable, '-c', \"import os, sys, time; assert 'tensorflow' in sys.modules; "
        "open('child', 'w').write(str(os.getpid())); time.sleep(600)\"])\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        ["python", "-c", code], cwd=project.root, env=project.environment(), start_new_session=True
    )
    path = project.root / "child"
    pid = wait_until(lambda: path.exists() and path.read_text())
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    wait_until(lambda: not Path("/proc", pid).exists())


def test_it_sees_the_disks_of_whoever_asked(project):
    require_small_disk(project)
    (project.root / "folder").mkdir()
    (project.root / "folder/file").touch()
    script = 'mount -t tmpfs tmpfs folder && python -c "$1" && touch folder/other && ls folder'
    code = f"{FORKED}import os; print(warm, os.getuid(), os.listdir('folder')); open('folder/made', 'w')"
    done = project.run(*SMALL_DISK, "bash", "-c", script, "bash", code)
    assert (done.stdout, done.stderr) == ("True 0 []\nmade\nother\n", "")
    assert [path.name for path in (project.root / "folder").iterdir()] == ["file"]


def test_what_libraries_read_while_they_are_imported_is_read_anew(project):
    done = project.run("python", "-c", f"{FORKED}print(warm)", KERAS_BACKEND="jax")
    assert done.stdout == "False\n"


def test_dvc_is_itself(project):
    assert project.dvc("version").stdout.startswith("DVC version")
    assert project.dvc("none-such").returncode != 0
