"""The image and the services of compose.yaml: what their files say, and the services' commands run as processes.

No image is built and no container started here: file systems, users and networks of containers are not tested.
"""

import base64
import contextlib
import csv
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from ruamel.yaml import YAML

from catdog import cli, serving
from catdog.tracking import KEY_TAG
from conftest import REPOSITORY, Project, Store, copy_project, wait_until
from test_tracking_servers import free_port, postgres, postgres_programs, running

# The parser in C knows no ":" in an unquoted member of a list, which YAML 1.2 and Compose allow.
COMPOSE = YAML(typ="safe", pure=True).load(REPOSITORY / "compose.yaml")
SERVICES = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
PASSWORDS = {"POSTGRES_PASSWORD": "pass/word of@database", "STORAGE_PASSWORD": "pass/word+of=store"}
PORTS = {"postgres": 5432, "storage": 8333, "mlflow": 5000, "server": 5001, "app": 8501}
"""On which each service listens in its container."""


# What the files say


def instructions():
    """The Dockerfile's instructions, each with its arguments as one text; comments left out, continued lines joined."""
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def stage_instructions(number):
    """The instructions of one of the Dockerfile's stages."""
    starts = [index for index, (name, _) in enumerate(instructions()) if name == "FROM"]
    return instructions()[starts[number] : [*starts[1:], None][number]]


def in_context(path):
    """Whether .dockerignore lets a file of the repository into the image: the last pattern that matches decides."""
    parts = path.split("/")
    above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    decision = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if not line or line.startswith("#"):
            continue
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            matches = any(fnmatch.fnmatchcase(p, pattern) and p.count("/") == pattern.count("/") for p in above)
        if matches:
            decision = line.startswith("!")
    return decision


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def texts(value):
    """Every text in a tree of dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [str(value)]


def variables(tree):
    """What Compose takes from the environment: names, each with what follows it, as ":-5000" or ":?set it"."""
    return [found for text in texts(tree) for found in re.findall(r"\$\{(\w+)([^}]*)\}", text)]


def test_the_image_is_built_from_files_that_are_there():
    copied = [shlex.split(rest) for name, rest in instructions() if name == "COPY" and "--from=" not in rest]
    assert len(copied) == 3
    for words in copied:
        *sources, _ = [word for word in words if not word.startswith("--")]
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert source == "." or any(in_context(name) for name in tracked_files() if name.startswith(source)), source


def test_the_environment_is_made_by_the_projects_set_up_before_the_code_comes():
    """A change of the code leaves the layers of the environment alone."""
    copied = {word for name, rest in stage_instructions(0) if name == "COPY" for word in rest.split()}
    assert copied == {"Makefile", "pyproject.toml", "requirements.lock", "requirements-gpu.lock", "./"}
    assert "make setup" in stage_instructions(0)[-1][1]


@pytest.mark.parametrize(("gpu", "lock"), [("", "requirements.lock"), ("1", "requirements-gpu.lock")])
def test_the_build_argument_chooses_the_lock_file(gpu, lock):
    assert ("ARG", 'GPU=""') in stage_instructions(0)
    (run,) = [rest for _, rest in stage_instructions(0) if "make setup" in rest]
    words = shlex.split(run.replace("${GPU}", gpu))
    told = subprocess.run(
        ["make", "--dry-run", "--always-make", *words[words.index("make") + 1 :]],
        cwd=REPOSITORY,
        env={**os.environ, "GPU": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"--require-hashes -r {lock}\n" in told.stdout


@pytest.mark.parametrize(
    ("there", "given", "lock"),
    [
        (None, [], "requirements.lock"),
        ("requirements.lock", [], "requirements.lock"),
        ("requirements-gpu.lock", [], "requirements-gpu.lock"),
        ("requirements-gpu.lock", ["GPU="], "requirements.lock"),
        ("requirements.lock", ["GPU=1"], "requirements-gpu.lock"),
    ],
)
@pytest.mark.parametrize("target", ["setup", "repro", "ui", "test", "bench", "lint", "format"])
def test_make_keeps_the_environment_that_is_there(tmp_path, there, given, lock, target):
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-gpu.lock"):
        shutil.copy2(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    if there:
        (tmp_path / f".venv/.ready-{there}").touch()
    told = subprocess.run(
        ["make", "--dry-run", target, *given],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in ("GPU", "MAKEFLAGS")},
        capture_output=True,
        text=True,
        check=True,
    )
    made = re.findall(r"--require-hashes -r (requirements\S*)", told.stdout)
    assert made == ([] if lock == there else [lock])


def test_the_image_runs_as_a_plain_user():
    assert [rest for name, rest in stage_instructions(1) if name == "USER"] == ["${UID}"]
    (uid,) = [rest.partition("=")[2] for name, rest in stage_instructions(1) if name == "ARG"]
    assert int(uid) > 0


def test_the_image_names_no_host_and_no_secret():
    text = (REPOSITORY / "Dockerfile").read_text()
    assert "://" not in text
    named = [rest for name, rest in instructions() if name in ("ARG", "ENV")]
    assert len(named) == 7
    assert not [rest for rest in named if re.search("PASSW|TOKEN|SECRET|://", rest)]


def test_the_image_holds_what_the_pipeline_needs():
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    made = {next(iter(out)) if isinstance(out, dict) else out for s in stages.values() for out in s.get("outs", [])}
    needed = {dep for stage in stages.values() for dep in stage["deps"]} - made
    needed = {dep for dep in needed if not any(dep.startswith(f"{out}/") for out in made)}
    files = [name for name in tracked_files() if in_context(name)]
    assert "pretrained/mobilenetv2_imagenet_notop_fp16.weights.h5" in needed
    for dep in needed:
        assert any(name == dep or name.startswith(f"{dep}/") for name in files), dep
    assert {"dvc.yaml", "params.yaml", ".dvc/config", ".gitignore", "LICENSE", "NOTICE"} <= set(files)


@pytest.mark.parametrize(
    "path",
    [
        *(".env", ".dvc/config.local", ".dvc/cache/files/md5/00/1", ".dvc/tmp/lock", ".git/config", ".venv/bin/python"),
        *("mlflow.db", "mlruns/1/model.keras", "data/raw.zip", "models/model.keras", "reports/predictions.csv"),
        *("src/catdog/__pycache__/cli.pyc", "src/catdog.egg-info/PKG-INFO", "tests/conftest.py"),
    ],
)
def test_nothing_else_of_a_checkout_comes_into_the_image(path):
    assert not in_context(path)


def test_ports_are_open_on_this_machine_only():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"mlflow", "server", "app"}
    for name, (port,) in published.items():
        assert re.fullmatch(rf"127\.0\.0\.1:\$\{{\w+:-{PORTS[name]}\}}:{PORTS[name]}", port)


def test_database_and_store_are_reached_through_mlflow_only():
    assert COMPOSE["networks"] == {"inside": {"internal": True}}
    inside = {name: service["networks"] for name, service in SERVICES.items() if "networks" in service}
    assert inside == {
        "postgres": ["inside"],
        "storage": ["inside"],
        "bucket": ["inside"],
        "mlflow": ["inside", "default"],
    }
    for name in ("server", "app", "pipeline"):
        assert SERVICES[name]["environment"] == COMPOSE["x-mlflow-client"]


def test_no_password_has_a_default():
    secret = {(name, rest) for name, rest in variables(COMPOSE) if "PASSWORD" in name}
    assert secret == {(name, ":?set it in .env") for name in PASSWORDS}
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert value.startswith("${") or not re.search("PASSW|SECRET|TOKEN", name), name


def test_env_example_names_every_variable_and_no_password():
    example = (REPOSITORY / ".env.example").read_text()
    named = dict(re.findall(r"^#?(\w+)=(.*)$", example, re.MULTILINE))
    assert set(named) == {name for name, _ in variables(COMPOSE)} - {"CATDOG_IMAGE"}
    assert {name: named[name] for name in PASSWORDS} == dict.fromkeys(PASSWORDS, "")
    assert subprocess.run(["git", "check-ignore", "--quiet", ".env"], cwd=REPOSITORY, check=False).returncode == 0


def test_services_wait_for_what_can_tell_that_it_is_ready():
    waits = [(name, *wait) for name, service in SERVICES.items() for wait in service.get("depends_on", {}).items()]
    assert len(waits) == 6
    for name, other, condition in waits:
        if condition == {"condition": "service_completed_successfully"}:
            assert SERVICES[other]["restart"] == "no", name
        else:
            assert condition == {"condition": "service_healthy"}
            assert SERVICES[other]["healthcheck"]["test"][0] == "CMD", name


def test_every_volume_is_declared_and_every_image_has_a_version():
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert mounted - {"."} == set(COMPOSE["volumes"])
    for name, service in SERVICES.items():
        assert name in OURS or re.search(r":\d+[\w.-]*$", service["image"]), service["image"]


@pytest.mark.parametrize("name", OURS)
def test_our_containers_may_do_little(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] == (name != "pipeline")


@pytest.mark.parametrize("name", OURS)
def test_every_command_exists_with_its_options(name):
    program, *arguments = SERVICES[name]["command"]
    if program == "catdog":
        assert cli._parser().parse_args(arguments).command == arguments[0]
    elif program == "dvc":
        from dvc.cli import parse_args

        assert parse_args(arguments).cmd == "repro"
    elif program == "mlflow":
        from mlflow.cli import cli as mlflow

        command = mlflow
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        context = command.make_context(command.name, arguments)
        assert (context.params["host"], context.params["port"]) == ("0.0.0.0", PORTS[name])
    else:
        assert program == "python"
        compile(arguments[1], name, "exec")


def test_the_gpu_file_changes_the_pipeline_only():
    gpu = YAML(typ="safe").load(REPOSITORY / "compose.gpu.yaml")["services"]
    assert list(gpu) == ["pipeline"]
    assert gpu["pipeline"]["build"]["args"] == {"GPU": "1"}
    assert gpu["pipeline"]["image"] != SERVICES["pipeline"]["image"]
    assert gpu["pipeline"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


# The services as processes: the commands, environment and health checks of compose.yaml, with other addresses


class Stack:
    """What compose.yaml describes, on free ports of this machine."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.ports = {name: free_port() for name in PORTS}

    def here(self, text):
        """Fills in the passwords, and turns addresses of containers into those of processes here."""
        text = re.sub(r"\$\{(\w+)(?::-([^}]*)|[^}]*)\}", lambda found: PASSWORDS.get(found[1], found[2]), text)
        for name, port in PORTS.items():
            text = re.sub(rf"\b({name}|127\.0\.0\.1):{port}\b", f"127.0.0.1:{self.ports[name]}", text)
            text = text.replace(f"--port={port}", f"--port={self.ports[name]}")
        return text.replace("--host=0.0.0.0", "--host=127.0.0.1")

    def environment(self, name):
        """The environment of a service's process; names by which a server may be called are no addresses."""
        given = SERVICES[name].get("environment", {})
        given = {key: value if key.endswith("_HOSTS") else self.here(value) for key, value in given.items()}
        given = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for key, value in given.items()}
        kept = self.project.environment(NO_PROXY="*", no_proxy="*", **given)
        return {key: value for key, value in kept.items() if key in given or not key.startswith(("AWS_", "PG"))}

    def command(self, name):
        return [self.here(word) for word in SERVICES[name]["command"]]

    def run(self, name, *command):
        """Runs a service that ends by itself, or another command in its place; it must succeed."""
        command = command or self.command(name)
        done = subprocess.run(
            command, cwd=self.project.root, env=self.environment(name), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def service(self, name):
        """Runs a service for the block, which starts when its health check passes."""
        log = self.log(name)
        check = [self.here(word) for word in SERVICES[name]["healthcheck"]["test"][1:]]
        with (
            log.open("w") as file,
            running(
                *self.command(name), env=self.environment(name), cwd=self.project.root, stdout=file, stderr=file
            ) as process,
        ):

            def healthy():
                assert process.poll() is None, log.read_text()
                done = subprocess.run(check, env=self.environment(name), capture_output=True, check=False)
                return done.returncode == 0

            wait_until(healthy, every=2)  # each look starts a process
            yield

    def log(self, name):
        """The file into which a service prints."""
        return self.project.root.parent / f"{name}.log"

    def address(self, name):
        return f"http://127.0.0.1:{self.ports[name]}"


@contextlib.contextmanager
def database(stack):
    """PostgreSQL with the user and the database that the official image makes of the service's environment."""
    import psycopg

    environment = {name: stack.here(value) for name, value in SERVICES["postgres"]["environment"].items()}
    user, password, name = (environment[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
    with postgres(postgres_programs()) as address:
        stack.ports["postgres"] = urlsplit(address).port
        with psycopg.connect(address.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
            connection.execute(f"CREATE DATABASE {name} OWNER {user}")
        yield


@contextlib.contextmanager
def store(stack):
    """SeaweedFS with the service's command, where `weed` is on PATH; else moto's S3, which takes any password."""
    health = stack.here(SERVICES["storage"]["healthcheck"]["test"][-1])
    if shutil.which("weed"):
        folder = stack.project.root.parent / "storage"
        folder.mkdir()
        command = [word.replace("/data", str(folder)) for word in stack.command("storage")]
        # Its parts talk through sockets that are named by their ports, and lie in /tmp for all of the machine.
        ports = {f"{part}.port": free_port() for part in ("master", "volume", "filer")}
        ports |= {f"{part}.port.grpc": free_port() for part in ("master", "volume", "filer", "s3")}
        ports |= {"s3.port": stack.ports["storage"], "s3.port.iceberg": 0}
        command = ["weed", *command, "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"-{k}={v}" for k, v in ports.items())]
        with running(*command, env=stack.environment("storage"), cwd=folder):
            wait_until(lambda: answers(health), every=0.3)
            yield
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=stack.ports["storage"], verbose=False)
    server.start()
    try:
        yield
    finally:
        server.stop()


def answers(address):
    """Whether a server says that all is well; proxies of the environment are not asked."""
    with contextlib.suppress(requests.ConnectionError), requests.Session() as direct:
        direct.trust_env = False
        return direct.get(address, timeout=5).ok


@pytest.fixture(scope="module")
def up(finished, tmp_path_factory):
    """All services, after the pipeline ran and its model was promoted: the story at the head of compose.yaml."""
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed (`initdb` is neither on PATH nor in /usr/lib/postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (`pip install 'catdog[postgres]'`)")
    project = copy_project(finished, tmp_path_factory.mktemp("stack") / "project")
    for path in project.root.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree(project.root / "mlruns")
    # Only `track` depends on this: it tells the whole pipeline from its report files.
    project.set_params({"tune.trials": 71})
    stack = Stack(project)
    with contextlib.ExitStack() as running_services:
        running_services.enter_context(database(stack))
        running_services.enter_context(store(stack))
        for _ in range(2):  # at the first start, and at another
            stack.run("bucket")
        running_services.enter_context(stack.service("mlflow"))
        stack.run("pipeline")
        project.commit()
        stack.run("pipeline", "catdog", "promote", "--force", "a small model will do")
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(running_services.enter_context, stack.service(name)) for name in ("server", "app")]
            for start in starts:
                start.result()
        yield stack


@pytest.fixture
def direct():
    """A client that asks no proxy."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_the_pipelines_run_is_in_the_database_and_its_files_in_the_store(up, monkeypatch, tmp_path):
    for name, value in {**SERVICES["pipeline"]["environment"], "NO_PROXY": "*", "no_proxy": "*"}.items():
        monkeypatch.setenv(name, value)
    store = Store(up.address("mlflow"))
    (parent,) = [run for run in store.parents() if KEY_TAG in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert parent.info.artifact_uri.startswith("mlflow-artifacts:")
    file = Path(store.client.download_artifacts(parent.info.run_id, "metrics.json", str(tmp_path)))
    assert file.read_bytes() == (up.project.root / "reports/metrics.json").read_bytes()
    listing = "import fsspec; print(*fsspec.filesystem('s3').find('mlflow'), sep='\\n')"
    stored = up.run("bucket", "python", "-c", listing).splitlines()
    assert any(name.endswith(f"{parent.info.run_id}/artifacts/metrics.json") for name in stored)
    assert any(re.search(r"/models/m-\w+/artifacts/artifacts/[^/]+\.keras$", name) for name in stored)
    assert [path.name for path in up.project.root.glob("ml*")] == []  # nothing of MLflow in the checkout


def some_test_picture(project):
    """A test picture that the model gets right, and the row of predictions.csv about it."""
    with (project.root / "reports/predictions.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["correct"] == "True")
    with zipfile.ZipFile(project.root / "data/raw.zip") as archive:
        return archive.read(row["path"]), row


def test_the_server_answers_with_the_promoted_model(up, direct):
    picture, row = some_test_picture(up.project)
    body = {"inputs": [base64.b64encode(picture).decode()]}
    (answer,) = direct.post(f"{up.address('server')}/invocations", json=body, timeout=300).json()["predictions"]
    assert answer["label"] == row["label"]
    assert answer["p_dog"] == pytest.approx(float(row["p_dog"]), abs=1e-4)


def test_the_page_is_there(up, direct):
    assert "<title>" in direct.get(up.address("app"), timeout=300).text


def test_files_come_through_mlflow(up):
    """In containers only MLflow reaches the store. Here everybody does, but MLflow's log tells who was sent there."""
    log = up.log("mlflow").read_text()
    assert "GET /api/2.0/mlflow-artifacts/artifacts/" in log
    assert "PUT /api/2.0/mlflow-artifacts/artifacts/" in log
    assert "presigned" not in log


@pytest.mark.parametrize(
    ("host", "status"), [("mlflow:5000", 200), ("localhost:5000", 200), ("127.0.0.1:9999", 200), ("elsewhere.org", 403)]
)
def test_mlflow_answers_to_its_own_names_only(up, direct, host, status):
    address = f"{up.address('mlflow')}/api/2.0/mlflow/experiments/get-by-name?experiment_name=catdog"
    assert direct.get(address, headers={"Host": host}, timeout=300).status_code == status


def test_passwords_are_in_no_command_line(up):
    for name in OURS:
        assert not set(PASSWORDS.values()) & set(texts(up.command(name)))
        assert not any(secret in word for secret in PASSWORDS.values() for word in up.command(name))


def test_mlflow_makes_the_files_of_an_image_of_the_model(up, tmp_path):
    """`mlflow models build-docker` builds from these files."""
    uri = "models:/cats-vs-dogs@champion"
    up.run("server", "mlflow", "models", "generate-dockerfile", "--model-uri", uri, "--output-directory", str(tmp_path))
    text = (tmp_path / "Dockerfile").read_text()
    assert re.search("^COPY model_dir /opt/ml/model$", text, re.MULTILINE)
    asked = (tmp_path / "model_dir/requirements.txt").read_text().split()
    assert set(serving._requirements()) <= set(asked)
    # OpenCV's other build would need libraries of a desktop, which the image has not.
    assert any(line.startswith("opencv-python-headless==") for line in asked)
    assert (tmp_path / "model_dir/code/catdog/serving.py").is_file()
    (model,) = (tmp_path / "model_dir").rglob("*.keras")
    assert model.read_bytes() == (up.project.root / "models/model.keras").read_bytes()
