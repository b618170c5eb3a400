"""Real clients of Kaggle, Google Drive and TensorFlow Datasets, in a pretend internet and on real prepared files."""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catdog.catalog import is_drive_url
from catdog.clients import _folder_name, export_tfds, fetch_drive, fetch_kaggle
from catdog.errors import CatdogError
from internet import Internet, Response, redirect, send

HTML = {"Content-Type": "text/html; charset=utf-8"}


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


PHOTOS = np.random.default_rng(0).bytes(3_000_000)
ARCHIVE = zip_of({"train.zip": PHOTOS, "test1.zip": b"test", "sampleSubmission.csv": b"id,label\n1,0\n"})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder without credentials; the clients look at it when they are imported."""
    for name in list(os.environ):
        if name.startswith(("KAGGLE_", "TFDS_", "XDG_")):
            monkeypatch.delenv(name)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("kaggle", "kagglesdk", "gdown"):
            monkeypatch.delitem(sys.modules, name)
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def refused(call, *arguments) -> str:
    with pytest.raises(CatdogError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_below(folder: Path) -> set[str]:
    """The files that a client left, without locks."""
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def kill_midway(internet: Internet, call: str, folder: Path, size: int) -> None:
    """Runs a call in a process of its own and kills it when a file of that size has arrived."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; from catdog.clients import *; {call}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 300
    try:
        while not any(path.stat().st_size >= size for path in folder.rglob("*") if path.is_file()):
            assert process.poll() is None and time.monotonic() < deadline, "it never got so far"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


class Pace:
    """Sends a file in full, or stops midway and keeps the client waiting."""

    def __init__(self, body: bytes, headers: dict[str, str]) -> None:
        self.body, self.headers = body, headers
        self.stops_at: int | None = None
        self.release = threading.Event()

    def __call__(self, request) -> Response:
        whole = send(request, self.body, self.headers)
        return Response(whole.body, whole.status, whole.headers, self.stops_at, self.release)

    @contextlib.contextmanager
    def stopping(self, size: int):
        self.stops_at = size
        try:
            yield
        finally:
            self.stops_at = None
            self.release.set()


# --- Kaggle ---------------------------------------------------------------------------------------------------------

DOWNLOAD = "/v1/competitions.CompetitionApiService/DownloadDataFiles"
STORED = "https://storage.googleapis.com/kaggle-competitions-data/kaggle-v2/3362/31148/bundle/archive.zip?Signature=x"
REFUSED_RULES = {"code": 403, "message": "You must accept this competition's rules before you'll be able to download."}


def sign_in(home: Path) -> None:
    (home / ".kaggle" / "kaggle.json").write_text('{"username": "ann", "key": "secret"}')
    (home / ".kaggle" / "kaggle.json").chmod(0o600)


def kaggle_site(accepted: str, answer: Response | None = None):
    """Kaggle's interface: whoever has the right credentials is sent to the storage."""

    def site(request) -> Response | None:
        if request.path.endswith("/IntrospectToken"):
            known = json.loads(request.body)["token"] == "a-token"
            body = {"active": known, "username": "ann"} if known else {"active": False}
            return Response(json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        if request.path != DOWNLOAD or request.method != "POST":
            return None
        if request.headers.get("authorization") != accepted:
            return Response(b'{"code":401,"message":"Unauthenticated"}', 401, {"Content-Type": "application/json"})
        assert json.loads(request.body) == {"competitionName": "dogs-vs-cats"}
        return answer or redirect(STORED)

    return site


BASIC = "Basic " + base64.b64encode(b"ann:secret").decode()


@pytest.fixture
def kaggle(internet, home):
    """The internet with Kaggle in it, and a user who is signed in."""
    sign_in(home)
    storage = Pace(ARCHIVE, {"Content-Type": "application/zip", "Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT"})
    internet.sites = {"api.kaggle.com": kaggle_site(BASIC), "storage.googleapis.com": storage}
    internet.storage = storage
    return internet


def test_kaggle_archive_comes_whole_and_once(kaggle, tmp_path, capfd):
    path = fetch_kaggle("dogs-vs-cats", tmp_path / "downloads")
    assert path == tmp_path / "downloads" / "dogs-vs-cats.zip"
    assert path.read_bytes() == ARCHIVE
    assert files_below(tmp_path / "downloads") == {"dogs-vs-cats.zip"}
    assert kaggle.hosts == {"api.kaggle.com", "storage.googleapis.com"}
    assert all("authorization" not in one.headers for one in kaggle.requests if one.host != "api.kaggle.com")
    assert capfd.readouterr() == ("", "")
    asked = len(kaggle.requests)
    assert fetch_kaggle("dogs-vs-cats", tmp_path / "downloads") == path
    assert len(kaggle.requests) == asked


@pytest.mark.parametrize(
    ("environment", "accepted"),
    [
        ({"KAGGLE_USERNAME": "ann", "KAGGLE_KEY": "secret"}, BASIC),
        ({"KAGGLE_API_TOKEN": "a-token"}, "Bearer a-token"),
    ],
)
def test_kaggle_credentials_in_the_environment(kaggle, home, tmp_path, monkeypatch, environment, accepted):
    (home / ".kaggle" / "kaggle.json").unlink()
    kaggle.sites["api.kaggle.com"] = kaggle_site(accepted)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fetch_kaggle("dogs-vs-cats", tmp_path).read_bytes() == ARCHIVE


@pytest.mark.parametrize("token", [None, "expired"])
def test_kaggle_without_valid_credentials_says_how_to_get_them(kaggle, home, tmp_path, monkeypatch, capfd, token):
    (home / ".kaggle" / "kaggle.json").unlink()
    if token:
        monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    told = refused(fetch_kaggle, "dogs-vs-cats", tmp_path / "downloads")
    assert "https://www.kaggle.com/settings/api" in told
    assert capfd.readouterr() == ("", "")
    assert all(not one.path.endswith("DownloadDataFiles") for one in kaggle.requests)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (403, REFUSED_RULES, "https://www.kaggle.com/c/dogs-vs-cats/rules"),
        (401, {"code": 401, "message": "Unauthenticated"}, "does not accept the credentials"),
        (404, {"code": 404, "message": "Not found"}, "Kaggle has no competition 'dogs-vs-cats'"),
        (503, {"code": 503, "message": "Busy"}, "error 503 (Busy); run it again later"),
    ],
)
def test_kaggle_refusal_is_one_sentence(kaggle, tmp_path, status, body, told):
    answer = Response(json.dumps(body).encode(), status, {"Content-Type": "application/json"})
    kaggle.sites["api.kaggle.com"] = kaggle_site(BASIC, answer)
    assert told in refused(fetch_kaggle, "dogs-vs-cats", tmp_path / "downloads")
    assert files_below(tmp_path / "downloads") == set()


def test_kaggle_link_with_its_signature_is_not_shown(kaggle, tmp_path):
    kaggle.sites["storage.googleapis.com"] = lambda request: Response(b"", 403)
    told = refused(fetch_kaggle, "dogs-vs-cats", tmp_path)
    assert "bundle/archive.zip" in told
    assert "Signature" not in told


def test_kaggle_without_network(home, no_network, tmp_path):
    sign_in(home)
    assert "Kaggle cannot be reached" in refused(fetch_kaggle, "dogs-vs-cats", tmp_path / "downloads")
    assert files_below(tmp_path / "downloads") == set()


def test_kaggle_token_cannot_be_checked_without_network(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-token")
    assert "Kaggle cannot be reached" in refused(fetch_kaggle, "dogs-vs-cats", tmp_path)


@pytest.mark.parametrize("damage", ["page", "flipped byte", "no end"])
def test_kaggle_archive_that_is_damaged_is_not_kept(kaggle, tmp_path, damage):
    flipped = bytearray(ARCHIVE)
    flipped[1_000_000] ^= 1
    kaggle.storage.body = {"page": b"<html>" * 100, "flipped byte": bytes(flipped), "no end": ARCHIVE[:-100]}[damage]
    assert "no sound zip archive" in refused(fetch_kaggle, "dogs-vs-cats", tmp_path / "downloads")
    assert files_below(tmp_path / "downloads") == set()


def test_kaggle_download_that_was_killed_is_continued(kaggle, tmp_path):
    folder = tmp_path / "downloads"
    with kaggle.storage.stopping(2_500_000):
        kill_midway(kaggle, f"fetch_kaggle('dogs-vs-cats', Path({str(folder)!r}))", folder, 1 << 21)
    assert not (folder / "dogs-vs-cats.zip").exists()
    (part,) = folder.rglob("dogs-vs-cats.zip")
    size = part.stat().st_size
    assert 0 < size < len(ARCHIVE)
    assert fetch_kaggle("dogs-vs-cats", folder).read_bytes() == ARCHIVE
    assert kaggle.requests[-1].headers["range"] == f"bytes={size}-"
    assert files_below(folder) == {"dogs-vs-cats.zip"}


def test_kaggle_error_page_in_place_of_the_rest_is_never_continued(kaggle, tmp_path):
    whole = kaggle.storage

    def fails_midway(request) -> Response:
        if sum(one.host == request.host for one in kaggle.requests) == 1:
            first = whole(request)
            return Response(first.body, 200, first.headers, cut=2_000_000)
        return Response(b"<html>out of order</html>", 500, HTML)

    kaggle.sites["storage.googleapis.com"] = fails_midway
    assert "run it again" in refused(fetch_kaggle, "dogs-vs-cats", tmp_path / "downloads")
    assert files_below(tmp_path / "downloads") == set()
    kaggle.sites["storage.googleapis.com"] = whole
    assert fetch_kaggle("dogs-vs-cats", tmp_path / "downloads").read_bytes() == ARCHIVE


# --- Google Drive ---------------------------------------------------------------------------------------------------

FILE = "1a_File-0123456789abcdefghijklmnop"
FOLDER = "1a_Folder-0123456789abcdefghijklmno"
QUOTA = b"""<html><title>Google Drive - Quota exceeded</title><p class="uc-error-caption">Sorry</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently. Please try again.</p>"""
CONFIRM = (
    b'<html><form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    b'<input type="hidden" name="id" value="%s"><input type="hidden" name="confirm" value="t"></form>'
)


def attachment(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


class Drive:
    """A Drive: files by their identifiers, and folders as lists of links."""

    def __init__(self, internet: Internet) -> None:
        self.internet = internet
        self.files: dict[str, Pace | Response] = {FILE: Pace(ARCHIVE, attachment("pets.zip"))}
        self.folders: dict[str, list[tuple[str, str]]] = {}
        self.asks_to_confirm = False
        internet.sites = {
            "drive.google.com": self.front,
            "drive.usercontent.google.com": self.content,
            "accounts.google.com": lambda request: Response(b"<html><title>Sign in</title>", headers=HTML),
        }

    def front(self, request) -> Response | None:
        path, _, query = request.path.partition("?")
        identifier = query.removeprefix("id=")
        if path == "/embeddedfolderview" and identifier in self.folders:
            # The page's title is the folder's name.
            names = {to.rpartition("/")[2]: name for links in self.folders.values() for to, name in links}
            links = "".join(
                f'<a href="https://drive.google.com{to}">{name}</a>' for to, name in self.folders[identifier]
            )
            return Response(f"<html><title>{names.get(identifier, 'Pets')}</title>{links}".encode(), headers=HTML)
        if path != "/uc" or identifier not in self.files:
            return Response(b"<html><title>Error 404</title>", 404, HTML)
        found = self.files[identifier]
        if isinstance(found, Response):
            return found
        if self.asks_to_confirm:
            return Response(CONFIRM % identifier.encode(), headers=HTML)
        return redirect(f"https://drive.usercontent.google.com/download?id={identifier}")

    def content(self, request) -> Response:
        (identifier,) = [one for one in self.files if f"id={one}" in request.path]
        assert not self.asks_to_confirm or "confirm=t" in request.path
        return self.files[identifier](request)


@pytest.fixture
def drive(internet):
    return Drive(internet)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://drive.google.com/file/d/x/view", True),
        ("http://drive.google.com/drive/folders/x", True),
        ("https://docs.google.com/uc?export=download&id=x", True),
        ("https://drive.usercontent.google.com/download?id=x", True),
        ("https://drive.google.com.evil.example/file/d/x", False),
        ("https://example.org/drive.google.com/file/d/x", False),
        ("gs://drive.google.com/x", False),
        ("drive.google.com/file/d/x", False),
        ("https://[broken", False),
        ("data/drive", False),
    ],
)
def test_drive_address_is_told_by_its_host(url, expected):
    assert is_drive_url(url) is expected


@pytest.mark.parametrize(
    "url",
    [
        f"https://drive.google.com/file/d/{FILE}/view?usp=sharing",
        f"https://drive.google.com/file/u/0/d/{FILE}",
        f"https://drive.google.com/open?id={FILE}&usp=drive_fs",
        f"https://docs.google.com/uc?export=download&id={FILE}",
        f"https://drive.usercontent.google.com/download?id={FILE}&export=download&confirm=t",
    ],
)
@pytest.mark.parametrize("asks", [False, True])
def test_drive_file_comes_under_its_own_name(drive, tmp_path, capfd, url, asks):
    drive.asks_to_confirm = asks
    path = fetch_drive(url, tmp_path / "downloads")
    assert path.name == "pets.zip"
    assert path.read_bytes() == ARCHIVE
    assert files_below(tmp_path / "downloads") == {path.relative_to(tmp_path / "downloads").as_posix()}
    assert capfd.readouterr() == ("", "")


def test_drive_file_that_was_fetched_is_taken_until_it_is_removed(drive, tmp_path, capsys):
    url = f"https://drive.google.com/file/d/{FILE}/view"
    path = fetch_drive(url, tmp_path)
    drive.files[FILE] = Pace(b"another", attachment("pets.zip"))
    asked = len(drive.internet.requests)
    assert fetch_drive(url, tmp_path) == path and path.read_bytes() == ARCHIVE
    assert len(drive.internet.requests) == asked
    told = capsys.readouterr().err
    assert f"fetched before and is taken from {path.parent}; delete that folder" in told and told.count("\n") == 1
    shutil.rmtree(path.parent)
    assert fetch_drive(url, tmp_path).read_bytes() == b"another"


def test_drive_folder_that_was_fetched_is_taken(drive, tmp_path):
    one = "1a_" + "D" * 30
    drive.folders = {FOLDER: [(f"/file/d/{one}/view", "1.jpg")]}
    drive.files = {one: Pace(b"cat", attachment("1.jpg"))}
    url = f"https://drive.google.com/drive/folders/{FOLDER}"
    path = fetch_drive(url, tmp_path)
    asked = len(drive.internet.requests)
    assert fetch_drive(url, tmp_path) == path and files_below(path) == {"1.jpg"}
    assert len(drive.internet.requests) == asked


def test_drive_folder_keeps_names_and_subfolders(drive, tmp_path):
    cats, one, two = ("1a_" + letter * 30 for letter in "CDE")
    drive.folders = {
        FOLDER: [(f"/drive/folders/{cats}", "Cat"), (f"/file/d/{two}/view?usp=drive_web", "notes.txt")],
        cats: [(f"/file/d/{one}/view?usp=drive_web", "ä 1.jpg")],
    }
    drive.files = {one: Pace(b"cat", attachment("1.jpg")), two: Pace(b"notes", attachment("notes.txt"))}
    path = fetch_drive(f"https://drive.google.com/drive/u/0/folders/{FOLDER}?usp=sharing", tmp_path)
    assert files_below(path) == {"Cat/ä 1.jpg", "notes.txt"}
    assert (path / "Cat" / "ä 1.jpg").read_bytes() == b"cat"


def test_drive_folder_of_which_a_file_is_refused_is_no_success_and_goes_on_later(drive, tmp_path):
    one, two = ("1a_" + letter * 30 for letter in "DE")
    drive.folders = {FOLDER: [(f"/file/d/{one}/view", "1.jpg"), (f"/file/d/{two}/view", "2.jpg")]}
    drive.files = {one: Pace(b"cat", attachment("1.jpg")), two: Response(QUOTA, headers=HTML)}
    url = f"https://drive.google.com/drive/folders/{FOLDER}"
    assert "1 of the folder's files could not be had" in refused(fetch_drive, url, tmp_path)
    drive.files[two] = Pace(b"dog", attachment("2.jpg"))
    assert files_below(fetch_drive(url, tmp_path)) == {"1.jpg", "2.jpg"}


def test_drive_folder_with_two_files_of_one_name_is_refused(drive, tmp_path):
    one, two = ("1a_" + letter * 30 for letter in "DE")
    drive.folders = {FOLDER: [(f"/file/d/{one}/view", "1.jpg"), (f"/file/d/{two}/view", "1.jpg")]}
    drive.files = {one: Pace(b"cat", attachment("1.jpg")), two: Pace(b"dog", attachment("1.jpg"))}
    told = refused(fetch_drive, f"https://drive.google.com/drive/folders/{FOLDER}", tmp_path)
    assert "two files called '1.jpg'" in told


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Response(QUOTA, headers=HTML), "for up to 24 hours"),
        (redirect("https://accounts.google.com/ServiceLogin"), "not shared with everyone"),
        (Response(b"<html><title>Error 404</title>", 404, HTML), "does not exist or is not shared"),
    ],
)
def test_drive_refusal_is_one_sentence(drive, tmp_path, answer, told):
    drive.files[FILE] = answer
    assert told in refused(fetch_drive, f"https://drive.google.com/file/d/{FILE}/view", tmp_path / "downloads")
    assert files_below(tmp_path / "downloads") == set()


@pytest.mark.parametrize("listing", [None, []])
def test_drive_folder_that_is_missing_or_empty_is_told(drive, tmp_path, listing):
    if listing is not None:
        drive.folders = {FOLDER: listing}
    told = refused(fetch_drive, f"https://drive.google.com/drive/folders/{FOLDER}", tmp_path)
    assert "shared with everyone" in told


def test_drive_without_network(no_network, tmp_path):
    url = f"https://drive.google.com/file/d/{FILE}/view"
    assert "Google Drive cannot be reached" in refused(fetch_drive, url, tmp_path)


def test_drive_address_without_a_file_is_told(tmp_path):
    assert "names no file and no folder" in refused(fetch_drive, "https://drive.google.com/drive/my-drive", tmp_path)


@pytest.mark.parametrize("changed", [False, True])
def test_drive_download_that_was_killed_is_continued(drive, tmp_path, changed):
    url, folder, file = f"https://drive.google.com/file/d/{FILE}/view", tmp_path / "downloads", drive.files[FILE]
    with file.stopping(2_500_000):
        kill_midway(drive.internet, f"fetch_drive({url!r}, Path({str(folder)!r}))", folder, 1 << 19)
    (part,) = [folder / name for name in files_below(folder)]
    size = part.stat().st_size
    if changed:
        file.body = ARCHIVE.replace(PHOTOS, PHOTOS[::-1])
        assert "changed while it was downloaded" in refused(fetch_drive, url, folder)
        assert files_below(folder) == set()
        size = None
    assert fetch_drive(url, folder).read_bytes() == file.body
    assert drive.internet.requests[-1].headers.get("range") == (f"bytes={size}-" if size else None)


# --- TensorFlow Datasets --------------------------------------------------------------------------------------------

CLASSES = ["cat", "a/b", "a%2Fb", ".hidden", "unlabelled"]


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG" if number % 2 else "PNG")
    return buffer.getvalue()


def prepare_data_sets() -> None:
    """Run in a process of its own: writes small data sets into TFDS_DATA_DIR, as their publishers would."""
    import tensorflow_datasets as tfds

    class Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features, keys, _ = SETS[self.name]
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys, citation="A. Uthor")

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SETS[self.name][2]}

        def _generate_examples(self, split):
            features, _, splits = SETS[self.name]
            for number in splits[split]:
                label = -1 if split == "unlabelled" else number % 5
                values = {
                    "image": np.zeros((2, 2, 1), np.float32) if self.name == "floats" else io.BytesIO(picture(number)),
                    "mask": np.zeros((3, 3, 1), np.uint8),
                    "label": label,
                    "other": label % 2,
                }
                yield number, {key: values[key] for key in features}

    class Pictures(Writer):
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="small"),)

    class Plain(Writer):
        """One photograph and its mask, one class, one split."""

    class Two(Writer):
        """Two classes an image, of which none is said to be the one to learn."""

    class Floats(Writer):
        """Numbers that are stored like pictures."""

    image = tfds.features.Image(shape=(None, None, 3))
    mask = tfds.features.LabeledImage(labels=2, shape=(None, None, 1))
    named, five, two = (
        tfds.features.ClassLabel(names=CLASSES),
        tfds.features.ClassLabel(num_classes=5),
        tfds.features.ClassLabel(num_classes=2),
    )
    keys = ("image", "label")
    splits = {"train": range(12), "unlabelled": range(12, 14), "validation": range(14, 20), "extra": range(3)}
    numbers = tfds.features.Image(shape=(2, 2, 1), dtype=np.float32)
    SETS = {
        "pictures": ({"image": image, "mask": mask, "label": named, "other": two}, keys, splits),
        "plain": ({"image": image, "mask": mask, "label": five}, None, {"train": range(11)}),
        "two": ({"image": image, "label": five, "other": two}, None, {"train": range(2)}),
        "floats": ({"image": numbers, "label": five}, keys, {"train": range(2)}),
    }
    for builder in (Pictures(), Plain(), Two(), Floats()):
        builder.download_and_prepare()


def export_data_sets(names: list[str], folder: str) -> None:
    """Run in a process of its own: exports each data set, and prints what was returned or told, as JSON."""
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = 0  # its ten attempts take minutes
    told = {}
    for position, name in enumerate(names):
        if name == OFFLINE:
            os.environ["HTTPS_PROXY"] = os.environ["https_proxy"] = "http://127.0.0.1:9"
        try:
            told[name] = export_tfds(name, Path(folder, f"{position}.zip"))
        except CatdogError as error:
            told[name] = str(error)
    print(json.dumps(told))


NAMES = [
    "pictures/small",
    "pictures/small:1.*.*",
    "pictures",
    "plain",
    "two",
    "floats",
    "pictures:9.9.9",
    "imagenete",
    "../x",
    "mnist",
    "imagenet2012",
    "cifar10",
]
OFFLINE = "cifar10"


class Exports:
    """What `export_tfds` said and wrote for every one of NAMES."""

    def __init__(self, folder: Path, process: subprocess.CompletedProcess, internet: Internet) -> None:
        self.folder, self.process, self.internet = folder, process, internet
        self.told = json.loads(process.stdout)

    def path(self, name: str) -> Path:
        return self.folder / f"{NAMES.index(name)}.zip"

    def files(self, name: str) -> dict[str, bytes]:
        with zipfile.ZipFile(self.path(name)) as archive:
            return {member: archive.read(member) for member in archive.namelist()}


@pytest.fixture(scope="module")
def exports(workshop, tmp_path_factory) -> Exports:
    from conftest import MODULES, Project  # which the processes do without

    folder = tmp_path_factory.mktemp("tfds")
    (folder / "home").mkdir()
    environment = {"HOME": str(folder / "home"), "TFDS_DATA_DIR": str(folder / "data"), "PYTHONPATH": MODULES}
    project = Project(folder, workshop.home, warm=True)

    def run(code: str, **changes: str) -> subprocess.CompletedProcess:
        command = ("python", "-c", f"import test_clients; test_clients.{code}")
        done = project.run(*command, **environment | changes)
        assert done.returncode == 0, done.stderr
        return done

    run("prepare_data_sets()")
    with Internet() as internet:
        done = run(f"export_data_sets({NAMES!r}, {str(folder)!r})", **internet.environment)
    return Exports(folder, done, internet)


def test_tfds_members_are_split_class_and_index_with_the_bytes_as_they_are(exports):
    files = exports.files("pictures/small")
    numbers = {hashlib.sha256(picture(number)).hexdigest(): number for number in range(20)}
    folders = ["cat", "a%2Fb", "a%252Fb", "%2Ehidden", "%75nlabelled"]
    seen: dict[str, list[str]] = {"train": [], "unlabelled": [], "validation": []}
    for name, data in files.items():
        number = numbers.pop(hashlib.sha256(data).hexdigest())
        split = "train" if number < 12 else "unlabelled" if number < 14 else "validation"
        folder = "unlabelled/unlabelled" if split == "unlabelled" else f"{split}/{folders[number % 5]}"
        parent, _, file = name.rpartition("/")
        assert parent == folder
        assert file.endswith(".jpg" if number % 2 else ".png")
        seen[split].append(file.partition(".")[0])
    assert numbers == {}
    # The archive keeps the set's own order, and so do the sorted names.
    assert seen["train"] == [f"{index:02d}" for index in range(12)]
    assert seen["unlabelled"] == ["0", "1"]
    assert seen["validation"] == [f"{index}" for index in range(6)]


def test_tfds_facts(exports):
    assert exports.told["pictures/small"] == {
        "version": "1.2.0",
        "config": "small",
        "splits": {"train": 12, "unlabelled": 2, "validation": 6},
        "splits_left_out": ["extra"],
        "citation": "A. Uthor",
    }
    assert exports.told["plain"]["config"] is None
    assert exports.told["pictures"] == exports.told["pictures/small"]


def test_tfds_single_split_without_class_names_gives_numbered_class_folders(exports):
    names = sorted(exports.files("plain"))
    assert len(names) == 11
    assert {name.partition("/")[0] for name in names} == {"0", "1", "2", "3", "4"}
    assert sorted(name.partition("/")[2][:2] for name in names) == [f"{index:02d}" for index in range(11)]


def test_tfds_archive_is_repeatable_and_stored(exports):
    first, second = (exports.path(name).read_bytes() for name in ("pictures/small", "pictures/small:1.*.*"))
    assert first == second
    with zipfile.ZipFile(exports.path("plain")) as archive:
        for member in archive.infolist():
            assert (member.compress_type, member.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))


@pytest.mark.parametrize("name", ["two", "floats"])
def test_tfds_set_that_is_no_image_classification_is_refused_with_its_features(exports, name):
    assert f"'tfds:{name}' is no image classification set" in exports.told[name]
    assert f"its features are {'image, label, other' if name == 'two' else 'image, label'};" in exports.told[name]
    assert not exports.path(name).exists()


def test_tfds_unknown_name_version_and_nonsense_are_told(exports):
    assert "did you mean imagenet" in exports.told["imagenete"]
    assert "imagenette" in exports.told["imagenete"]
    assert "'tfds:pictures:9.9.9'" in exports.told["pictures:9.9.9"]
    assert "check name, config and version" in exports.told["../x"]


def test_tfds_set_that_cannot_be_downloaded_is_told(exports):
    assert "HTTP code: 404" in exports.told["mnist"]
    assert exports.internet.hosts == {"storage.googleapis.com"}
    assert (
        "data/downloads/manual as https://www.tensorflow.org/datasets/catalog/imagenet2012"
        in (exports.told["imagenet2012"])
    )


def test_tfds_without_network(exports):
    assert "its publisher cannot be reached" in exports.told[OFFLINE]


def test_tfds_says_nothing_where_there_is_no_terminal(exports):
    left_out = re.compile("download: tfds:pictures.* is taken without its splits extra")
    assert all(left_out.fullmatch(line) for line in exports.process.stderr.splitlines()), exports.process.stderr
    assert exports.process.stdout.count("\n") == 1
    assert all("\n" not in told for told in exports.told.values() if isinstance(told, str))


def test_class_folders_are_safe_and_different_for_different_names():
    names = [
        "",
        ".",
        "..",
        "a",
        "a.",
        "a ",
        "%",
        "%2E",
        "a/b",
        "a\\b",
        "a:b",
        "a%2Fb",
        "\n",
        "unlabelled",
        "Unlabelled",
    ]
    names += ["__MACOSX", "English springer", "n01440764", "猫", ".git", "%75nlabelled", "C:"]
    folders = [_folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder == folder.strip(" .\n") != ""
        assert not set(folder) & set('/\\:*?"<>|\n')
        assert folder.lower() not in ("unlabelled", "unlabeled", "__macosx")
    assert [_folder_name(name) for name in ("a", "English springer", "猫")] == ["a", "English springer", "猫"]


# --- All of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("kaggle", "kaggle", lambda folder: fetch_kaggle("dogs-vs-cats", folder)),
        ("gdown", "drive", lambda folder: fetch_drive(f"https://drive.google.com/file/d/{FILE}/view", folder)),
        ("tensorflow_datasets", "tfds", lambda folder: export_tfds("mnist", folder / "raw.zip")),
    ],
)
def test_client_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, module, extra, call):
    monkeypatch.setitem(sys.modules, module, None)
    told = refused(call, tmp_path)
    assert f"needs the extra {extra!r}" in told
    assert f"pip install --editable '.[{extra}]'" in told
    assert files_below(tmp_path) == set()
