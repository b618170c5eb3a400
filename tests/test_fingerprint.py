"""The cheap look at what lies outside the pipeline: it changes when the data does, and only then."""

import hashlib
import http.server
import os
import runpy
import threading

import pytest
import yaml

from catdog.fingerprint import curation_fingerprint, dataset_path, dvc_tracking, fingerprint, weights_fingerprint
from conftest import REPOSITORY


@pytest.fixture
def folder(tmp_path):
    for name in ("pets/cat/1.jpg", "pets/dog/1.jpg", "pets/dog/2.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "pets"


def overwrite(path):
    """Other bytes of the same length, at another time."""
    path.write_bytes(b"y")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda pets: overwrite(pets / "cat/1.jpg"),
        lambda pets: (pets / "cat/1.jpg").rename(pets / "cat/3.jpg"),
        lambda pets: (pets / "cat/1.jpg").rename(pets / "dog/3.jpg"),
        lambda pets: (pets / "dog/2.jpg").unlink(),
        lambda pets: (pets / "dog/9.jpg").write_bytes(b""),
        lambda pets: (pets / "cat/link.jpg").symlink_to(pets / "dog/1.jpg"),
    ],
)
def test_every_change_in_a_folder_is_seen(folder, change):
    before = fingerprint("pets", folder.parent)
    assert fingerprint("pets", folder.parent) == before
    change(folder)
    assert fingerprint("pets", folder.parent) != before


def test_change_behind_a_link_to_a_folder_is_seen_and_a_loop_ends(folder, tmp_path):
    outside = tmp_path / "more"
    outside.mkdir()
    (outside / "5.jpg").write_bytes(b"x")
    (folder / "fox").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    before = fingerprint("pets", tmp_path)
    overwrite(outside / "5.jpg")
    assert fingerprint("pets", tmp_path) != before


def test_change_of_an_archive_is_seen(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"x")
    before = fingerprint("x.zip", tmp_path)
    overwrite(tmp_path / "x.zip")
    after = fingerprint("x.zip", tmp_path)
    assert after != before
    (tmp_path / "x.zip").unlink()
    assert fingerprint("x.zip", tmp_path) not in (before, after)


def test_relative_and_absolute_paths_look_at_the_same_files(folder, monkeypatch):
    monkeypatch.chdir("/")
    relative, absolute = fingerprint("pets", folder.parent), fingerprint(str(folder), folder.parent)
    assert relative["files"] == absolute["files"] is not None


@pytest.mark.parametrize("name", ["sample", "microsoft", "kaggle", "oxford_pets:breeds", "tfds:beans"])
def test_named_sets_are_told_by_their_name(name, tmp_path):
    assert fingerprint(name, tmp_path) == {"dataset": name}


@pytest.mark.parametrize("value", ["gone", "a\0b", "a\0b/../c", "../gone", "~no-such-user/x", "x" * 5000, ""])
def test_value_that_means_nothing_is_left_to_the_download(value, tmp_path):
    assert fingerprint(value, tmp_path / "empty")["files"] is None


@pytest.fixture
def server():
    """A server whose answer to a look can be changed: `state` holds ETag and size; with None it gives nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            if self.server.state:
                self.send_header("ETag", f'"{self.server.state}"')
                self.send_header("Content-Length", "7")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.state = "one"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_change_behind_an_address_is_seen(server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/x.zip"
    before = fingerprint(url, tmp_path)
    assert fingerprint(url, tmp_path, former=before) == before
    server.state = "two"
    assert fingerprint(url, tmp_path, former=before) != before


def test_address_that_does_not_answer_keeps_the_former_state_and_says_so(server, tmp_path, capsys):
    url = f"http://user:secret@127.0.0.1:{server.server_port}/x.zip"
    before = fingerprint(url, tmp_path)
    server.shutdown()
    server.server_close()
    capsys.readouterr()
    assert fingerprint(url, tmp_path, former=before) == before
    assert "cannot be asked whether it changed" in (line := capsys.readouterr().err) and "secret" not in line
    assert fingerprint(url, tmp_path, former={"dataset": "sample"}) != before
    assert "secret" not in str(before)


def test_file_of_dvc_is_found_beside_the_data_and_above_it(folder, tmp_path):
    assert dvc_tracking(folder, tmp_path) is None
    (tmp_path / "pets.dvc").write_text(yaml.safe_dump({"outs": [{"md5": "abc.dir", "path": "pets"}]}))
    assert dvc_tracking(folder, tmp_path) == (tmp_path / "pets.dvc", "abc.dir")
    assert dvc_tracking(folder / "cat", tmp_path) == (tmp_path / "pets.dvc", "abc.dir")
    assert dvc_tracking(tmp_path / "other", tmp_path) is None
    # What lies outside the repository is none of its .dvc files' business.
    assert dvc_tracking(folder, tmp_path / "repository") is None
    before = fingerprint("pets", tmp_path)
    assert before["dvc_hash"] == "abc.dir"
    (tmp_path / "pets.dvc").write_text(yaml.safe_dump({"outs": [{"md5": "def.dir", "path": "pets"}]}))
    assert fingerprint("pets", tmp_path) != before


def test_path_into_another_project_of_dvc_is_none_of_this_ones_business(folder, tmp_path):
    (tmp_path / "pets.dvc").write_text(yaml.safe_dump({"outs": [{"md5": "abc.dir", "path": "pets"}]}))
    (root := tmp_path / "project").mkdir()
    assert dataset_path("../pets", root) == folder
    assert dvc_tracking(dataset_path("../pets", root), root) is None
    assert "dvc_hash" not in fingerprint("../pets", root)
    assert dvc_tracking(dataset_path("project/../pets", tmp_path), tmp_path) == (tmp_path / "pets.dvc", "abc.dir")


def test_links_stay_in_a_path_and_above_one_is_what_the_system_finds_there(folder, tmp_path):
    (root := tmp_path / "project").mkdir()
    (root / "link").symlink_to(folder / "cat")
    assert dataset_path("link", root) == root / "link"
    assert dataset_path("link/../dog", root) == folder / "dog"
    assert fingerprint("link/../dog", root)["files"] == fingerprint(str(folder / "dog"), root)["files"] is not None


def test_lists_are_told_by_their_contents(tmp_path):
    assert curation_fingerprint("", "", tmp_path) == {"split.file": None, "split.exclude": None}
    (tmp_path / "a.csv").write_text("path,split\n")
    before = curation_fingerprint("a.csv", "gone.csv", tmp_path)
    assert before["split.file"] is not None and before["split.exclude"] is None
    (tmp_path / "a.csv").write_text("path,label\n")
    assert curation_fingerprint("a.csv", "gone.csv", tmp_path) != before


@pytest.mark.parametrize(
    ("weights", "backbone", "paths"),
    [
        ("imagenet", "vgg16", []),
        ("random", "mobilenetv2+vgg16", []),
        ("a+b.h5", "vgg16", ["a+b.h5"]),
        ("imagenet+a.h5", "mobilenetv2+vgg16", ["a.h5"]),
        ("gone.h5+random", "mobilenetv2+vgg16", ["gone.h5"]),
    ],
)
def test_files_of_weights_are_told_by_their_content(tmp_path, weights, backbone, paths):
    assert weights_fingerprint(weights, backbone, tmp_path) == dict.fromkeys(paths)
    for path in paths[:1]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"1")
        assert weights_fingerprint(weights, backbone, tmp_path) == {path: hashlib.sha256(b"1").hexdigest()}


@pytest.mark.parametrize("value", ["locked.csv", "shut/list.csv", "folder", "~no-such-user/list.csv", "a\0b"])
def test_list_that_cannot_be_read_is_left_to_the_split(ordinary_user, value):
    for folder in ("folder", "shut"):
        (ordinary_user / folder).mkdir()
    for name in ("locked.csv", "shut/list.csv"):
        (ordinary_user / name).write_text("path,split\n")
    (ordinary_user / "locked.csv").chmod(0)
    (ordinary_user / "shut").chmod(0)
    nothing = {"split.file": None, "split.exclude": None}
    assert curation_fingerprint(value, value, ordinary_user) == nothing
    (ordinary_user / "shut").chmod(0o700)


def test_file_of_dvc_that_cannot_be_read_is_left_to_the_download(ordinary_user):
    (ordinary_user / "pets").mkdir()
    (ordinary_user / "pets.dvc").write_text("outs: []\n")
    (ordinary_user / "pets.dvc").chmod(0)
    assert fingerprint("pets", ordinary_user)["files"] is not None


@pytest.mark.parametrize("locked", ["params.yaml", "reports"])
def test_stage_ends_with_one_sentence(ordinary_user, locked, monkeypatch, capsys):
    script = runpy.run_path(str(REPOSITORY / "stages/source.py"))
    monkeypatch.chdir(ordinary_user)
    monkeypatch.setenv("DVC_ROOT", str(ordinary_user))
    (ordinary_user / "params.yaml").write_text("dataset: sample\n")
    (ordinary_user / "reports").mkdir()
    (ordinary_user / locked).chmod(0)
    with pytest.raises(SystemExit) as stopped:
        script["main"]()
    (ordinary_user / locked).chmod(0o700)
    assert stopped.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"catdog source: {locked}") and "cannot be read or written: Permission denied" in told


def test_server_that_tells_no_version_is_named(server, tmp_path, capsys):
    server.state = ""
    fingerprint(f"http://127.0.0.1:{server.server_port}/x.zip", tmp_path)
    assert "tells no version of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["https://drive.google.com/file/d/1abc/view", "https://drive.usercontent.google.com/uc?id=1"]
)
def test_drive_is_not_asked(url, tmp_path):
    assert fingerprint(url, tmp_path) == {"dataset": url}


def test_address_that_only_mentions_drive_is_asked(tmp_path, server):
    url = f"http://127.0.0.1:{server.server_port}/drive.google.com.zip"
    assert fingerprint(url, tmp_path)["remote"]["etag"] == '"one"'
