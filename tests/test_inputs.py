"""Finding pictures: whatever a user points at, in order, with nothing lost and every mistake told in a sentence."""

import contextlib
import gzip
import io
import os
import socket
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from catdog import inputs, paths
from catdog.errors import CatdogError
from catdog.inputs import UnreadableError, find_images, find_unlabelled
from hostile_server import Answer, hostile_server

CAT, DOG = (20, 20, 230), (230, 20, 20)  # RGB


def picture(colour=DOG, suffix=".png") -> bytes:
    pixels = np.full((20, 30, 3), colour, np.uint8)
    return cv2.imencode(suffix, pixels[..., ::-1])[1].tobytes()


def fill(folder: Path, files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def pack_tar(path: Path, files) -> Path:
    with tarfile.open(path, "w:" + path.suffix.lstrip(".").replace("tar", "")) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def archives():
    with contextlib.ExitStack() as stack:
        yield stack


# Folders, patterns, archives


def test_folders_are_searched_sorted_and_without_hidden_files(tmp_path, archives):
    names = ["b/2.JPG", "b/10.png", "b/Ä ö/1.jpeg", "a.webp", ".hidden.jpg", ".cache/x.jpg", "__MACOSX/y.jpg"]
    fill(tmp_path, dict.fromkeys([*names, "notes.txt", "b/table.csv"], b"x"))
    files, others = find_images([tmp_path], archives)
    kept = ["a.webp", "b/10.png", "b/2.JPG", "b/Ä ö/1.jpeg"]
    assert [file.name for file in files] == [f"{tmp_path}/{name}" for name in kept]
    assert others == [f"{tmp_path}/b/table.csv", f"{tmp_path}/notes.txt"]


def test_hidden_folder_that_is_named_itself_is_searched(tmp_path, archives):
    fill(tmp_path / ".photos", {"1.jpg": b"x"})
    files, _ = find_images([tmp_path / ".photos"], archives)
    assert [Path(file.name).name for file in files] == ["1.jpg"]


def test_inputs_keep_their_order_and_a_named_file_needs_no_ending(tmp_path, archives):
    fill(tmp_path, {"z": b"1", "a/2.jpg": b"2", "a/1.jpg": b"3"})
    files, others = find_images([tmp_path / "z", tmp_path / "a"], archives)
    assert [file.read() for file in files] == [b"1", b"3", b"2"]
    assert others == []


def test_archive_members_are_listed_like_a_folders_files(tmp_path, archives):
    members = {"p/b.jpg": b"2", "p/a.png": b"1", "__MACOSX/p/._a.png": b"0", "p/.DS_Store": b"0", "readme.txt": b"0"}
    path = pack(tmp_path / "photos.zip", members)
    files, others = find_images([path], archives)
    assert [(file.name, file.read()) for file in files] == [(f"{path}/p/a.png", b"1"), (f"{path}/p/b.jpg", b"2")]
    assert others == [f"{path}/readme.txt"]


def test_archive_is_known_by_its_content(tmp_path, archives):
    path = pack(tmp_path / "photos.archive", {"a.jpg": b"1"})
    with_tail = tmp_path / "picture.png"  # an archive behind a picture's end is not looked at
    with_tail.write_bytes(picture() + path.read_bytes())
    files, _ = find_images([path, with_tail], archives)
    assert [file.name for file in files] == [f"{path}/a.jpg", str(with_tail)]


def test_links_are_followed_but_not_in_circles(tmp_path, archives):
    fill(tmp_path / "elsewhere", {"1.jpg": b"1"})
    fill(tmp_path / "here", {"0.jpg": b"0"})
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here/up").symlink_to(tmp_path / "here")
    files, _ = find_images([tmp_path / "here"], archives)
    assert [file.read() for file in files] == [b"0", b"1"]


@pytest.mark.parametrize("given", ["p", "p/*", "p/*.jpg", "**/*.jpg"])
def test_a_dangling_link_fails_by_itself(tmp_path, archives, monkeypatch, given):
    fill(tmp_path, {"p/1.jpg": b"1"})
    (tmp_path / "p/0.jpg").symlink_to("absent")
    monkeypatch.chdir(tmp_path)
    files, others = find_images([given], archives)
    assert ([file.name for file in files], others) == (["p/0.jpg", "p/1.jpg"], [])
    with pytest.raises(FileNotFoundError):
        files[0].read()
    assert files[1].read() == b"1"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_tar_archives_are_read_like_zip_archives(tmp_path, archives, suffix):
    members = {"p/b.jpg": b"2", "p/a.png": b"1", "._a.png": b"0", "readme.txt": b"0"}
    path = pack_tar(tmp_path / f"photos{suffix}", members)
    files, others = find_images([path], archives)
    assert [(file.name, file.read()) for file in files] == [(f"{path}/p/a.png", b"1"), (f"{path}/p/b.jpg", b"2")]
    assert others == [f"{path}/readme.txt"]
    repacked = Path(files[0].read.args[0].filename)
    assert repacked.exists()
    archives.close()
    assert not repacked.parent.exists()


def test_tar_with_a_link_out_of_it_is_refused(tmp_path, archives):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(CatdogError, match=r"^'/.*photos\.tar' .*a\.jpg"):
        find_images([path], archives)


def test_patterns_find_what_a_shell_would_and_nothing_twice(tmp_path, archives, monkeypatch):
    fill(tmp_path, dict.fromkeys(["p/2.jpg", "p/10.JPG", "p/q/3.jpg", "p/notes.txt", "p/.x.jpg", "p/Thumbs.db"], b"x"))
    monkeypatch.chdir(tmp_path)

    def found(pattern):
        files, others = find_images([pattern], archives)
        return [file.name for file in files], others

    assert found("p/*.jpg") == (["p/2.jpg"], [])
    assert found("p/[0-9]*") == (["p/10.JPG", "p/2.jpg"], [])
    assert found("p/*") == (["p/10.JPG", "p/2.jpg", "p/q/3.jpg"], ["p/notes.txt"])
    assert sorted(found("**")[0]) == ["p/10.JPG", "p/2.jpg", "p/q/3.jpg"]
    assert found(f"{tmp_path}/p/?.jpg") == ([f"{tmp_path}/p/2.jpg"], [])


def test_pattern_finds_archives_and_a_file_named_like_a_pattern_is_that_file(tmp_path, archives):
    pack(tmp_path / "a.zip", {"1.jpg": b"1"})
    fill(tmp_path, {"[x].jpg": b"2", "x.jpg": b"3"})
    files, _ = find_images([f"{tmp_path}/*.zip", f"{tmp_path}/[x].jpg"], archives)
    assert [file.read() for file in files] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent", "absent does not exist; give image files, folders, archives, patterns such as"),
        ("absent*.jpg", r"absent\*\.jpg matches no file; give image files"),
        ("x" * 300, "cannot be read: File name too long; check the path"),
        ("pipe", "pipe is neither a file nor a folder; give image files"),
        ("empty", "there are no images in .*empty; give image files, or folders or archives"),
        ("text.zip", "there are no images in .*text.zip"),
        ("damaged.zip", "damaged.zip .*archive"),
        ("damaged", "damaged .*archive"),
        ("page.zip", "page.zip .*archive"),
        ("photo.jpg.gz", r"^'/.*photo\.jpg\.gz' is no archive that can be read; give a folder, \.zip"),
        ("damaged.tar.xz", r"^'/.*damaged\.tar\.xz' is a damaged tar archive"),
        ("empty.tar", r"^'/.*empty\.tar' cannot be used: the file is empty"),
    ],
)
def test_nothing_to_classify_is_told(tmp_path, archives, name, told):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    pack(tmp_path / "text.zip", {"a.txt": b"x"})
    damaged = dict.fromkeys(["damaged.zip", "damaged"], b"PK\x03\x04 and then nothing")
    fill(tmp_path, damaged | {"page.zip": b"<html>404</html>", "photo.jpg.gz": gzip.compress(b"1"), "empty.tar": b""})
    whole = pack_tar(tmp_path / "whole.tar.xz", {"a.jpg": bytes(range(256)) * 99}).read_bytes()
    (tmp_path / "damaged.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CatdogError, match=told) as caught:
        find_images([tmp_path / name], archives)
    assert "\n" not in str(caught.value)


def test_folder_that_cannot_be_read_is_told(tmp_path, archives, monkeypatch):
    fill(tmp_path, {"closed/1.jpg": b"1"})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "closed"))

    monkeypatch.setattr(os, "scandir", refuse)  # rights do not bind the user that tests often run as
    with pytest.raises(CatdogError, match="closed cannot be read: Permission denied; check its permissions"):
        find_images([tmp_path], archives)


def test_member_that_unpacks_beyond_any_picture_is_not_read(tmp_path, archives, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 10_000)
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10_000))
        archive.writestr("b.png", bytes(10_001))
    (small, large), _ = find_images([path], archives)
    assert len(small.read()) == 10_000
    with pytest.raises(UnreadableError, match="10,001 bytes are more than the limit of 10,000"):
        large.read()


def data_set(root: Path, members, unlabelled) -> Path:
    pack(root / paths.RAW, members)
    rows = [f"{name},{len(members.get(name, b''))}\n" for name in unlabelled]
    (root / paths.UNLABELLED).write_text("path,bytes\n" + "".join(rows), encoding="utf-8")
    return root


def test_unlabelled_images_are_read_from_the_raw_archive(tmp_path, archives):
    data_set(tmp_path, {"train/cat.1.jpg": b"1", "test1/2.jpg": b"2", "test1/10, ü.jpg": b"10"}, ["test1/2.jpg"])
    assert [(file.name, file.read()) for file in find_unlabelled(tmp_path, archives)] == [("test1/2.jpg", b"2")]


@pytest.mark.parametrize(
    ("missing", "unlabelled", "told"),
    [
        (paths.UNLABELLED, ["a.jpg"], r"unlabelled\.csv does not exist; run `dvc repro` first, or give the paths"),
        (paths.RAW, ["a.jpg"], r"raw\.zip does not exist; run `dvc repro` first"),
        (None, [], "no images without a label; give the paths"),
        (None, ["b.jpg"], r"unlabelled\.csv lists 'b.jpg', which data/raw\.zip does not hold; run `dvc repro`"),
    ],
)
def test_data_set_without_unlabelled_images_is_told(tmp_path, archives, missing, unlabelled, told):
    data_set(tmp_path, {"a.jpg": b"1"}, unlabelled)
    if missing:
        (tmp_path / missing).unlink()
    with pytest.raises(CatdogError, match=told):
        find_unlabelled(tmp_path, archives)


# Standard input


def read_in(data: bytes, archives, *more):
    return find_images(["-", *more], archives, read_standard_input=lambda: data)


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "teal").save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_standard_input_may_be_a_picture(archives, kind):
    data = encoded(kind)
    files, others = read_in(data, archives)
    assert ([(file.name, file.read()) for file in files], others) == ([("standard input", data)], [])


@pytest.mark.parametrize("data", [encoded("JPEG")[:60], encoded("PNG")[:20], b"\x00\x01\x02"])
def test_standard_input_that_is_a_damaged_picture_is_no_list_of_paths(archives, data):
    ((file,), _) = read_in(data, archives)
    assert file.read() == data


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_standard_input_may_be_a_path_a_line(tmp_path, archives, end):
    fill(tmp_path, {"BM 1.jpg": b"1", "P6.jpg": b"2", "folder/3.jpg": b"3", "named": b"4"})
    odd = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(odd, "wb") as file:  # noqa: PTH123 a name of bytes
        file.write(b"5")
    names = ["P6.jpg", "folder", "BM 1.jpg", "named"]
    lines = [*(os.fsencode(tmp_path / name) for name in names), odd]
    files, _ = read_in((end or b"\n\n").join(lines) + end, archives, tmp_path / "P6.jpg")
    assert [file.read() for file in files] == [b"2", b"3", b"1", b"4", b"5", b"2"]


def test_names_at_the_beginning_of_a_list_are_not_taken_for_signatures(tmp_path, archives, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("BM.jpg", "P5 1.jpg", "GIF89a", "RIFF", "II*"):
        fill(tmp_path, {name: b"1"})
        ((file,), _) = read_in(name.encode() + b"\n", archives)
        assert file.name == name


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "standard input is empty; send the bytes of an image, or paths, one a line"),
        (b"\n  \r\n", "standard input is empty"),
        (b"-\n", r"names itself \(-\) among the paths; leave that line out"),
        (b"absent.jpg\n", "absent.jpg does not exist"),
        (b"x" * 101, "more than 100 bytes; send one image, or paths"),
    ],
)
def test_standard_input_of_no_use_is_told(archives, monkeypatch, data, told):
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with pytest.raises(CatdogError, match=told):
        read_in(data, archives)


def test_standard_input_is_read_once(archives):
    with pytest.raises(CatdogError, match="- is given twice"):
        find_images(["-", "-"], archives, read_standard_input=partial(pytest.fail, "read"))


# The web


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with hostile_server() as server:
        yield server


def test_addresses_are_fetched_when_they_are_read(server, archives):
    url = server.offer("/p.jpg?size=2", Answer(b"bytes"))
    hidden = url.replace("://", "://user:secret@") + "&token=secret"
    server.offer("/p.jpg?size=2&token=secret", Answer(b"other"))
    (plain, signed), _ = find_images([url, hidden], archives)
    assert (plain.name, signed.name) == (url, url)
    assert server.seen == []
    assert (plain.read(), signed.read()) == (b"bytes", b"other")
    assert [seen.encoding for seen in server.seen] == ["identity", "identity"]


def test_redirects_are_followed(server, archives):
    target = server.offer("/target", Answer(b"bytes", chunked=True))
    for number, location in enumerate([target, "/target"]):
        url = server.offer(f"/{number}", Answer(status=302, headers={"Location": location}))
        assert find_images([url], archives)[0][0].read() == b"bytes"


def moved(location: str, **more) -> Answer:
    return Answer(status=302, headers={"Location": location}, **more)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_body_of_a_redirect_is_not_read(server, archives, monkeypatch, chunked):
    monkeypatch.setattr(inputs, "_SILENCE_SECONDS", (5, 2))
    server.offer("/target", Answer(b"bytes"))
    url = server.offer("/f", moved("/target", stall=0, announce=1, chunked=chunked))  # whoever reads it waits
    assert find_images([url], archives)[0][0].read() == b"bytes"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=404), "the server answers 404 Not Found"),
        (Answer(status=500), "the server answers 500 Internal Server Error"),
        (Answer(b"<html>", headers={"Content-Type": "text/html; charset=utf-8"}), "is a web page; give the address of"),
        (moved("file:///etc/passwd"), "redirects to something other than http or https"),
        (moved("ftp://example.org/1.jpg"), "redirects to something other than http or https"),
        (moved("/f"), "redirects without end"),
        (Answer(b"x" * 1001), "is larger than 0.001 MB, the limit of a download"),
        (Answer(b"x" * 1001, chunked=True), "is larger than 0.001 MB"),
        (Answer(b"x" * 100, cut=50), r"it was cut \(IncompleteRead\)"),
        (Answer(b"x" * 100, cut=50, chunked=True), "it was cut"),
        (Answer(b"x" * 100, announce=10), r"it was cut \(IncompleteRead\)"),
        (Answer(b"x" * 100, stall=50), "nothing came for 0.2 seconds"),
        (Answer(hang_up=True), r"no connection, or it was cut \("),
    ],
)
def test_servers_that_give_no_picture_are_told(server, archives, monkeypatch, answer, told):
    monkeypatch.setattr(inputs, "MAX_DOWNLOAD_BYTES", 1000)
    monkeypatch.setattr(inputs, "_SILENCE_SECONDS", (0.2, 0.2))
    ((file,), _) = find_images([server.offer("/f", answer)], archives)
    with pytest.raises(UnreadableError, match=told) as caught:
        file.read()
    assert "\n" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


def test_a_server_that_drips_is_given_up(server, archives, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_DOWNLOAD_SECONDS", 0.0)
    ((file,), _) = find_images([server.offer("/f", Answer(b"x" * 9))], archives)
    with pytest.raises(UnreadableError, match="does not come within 0 seconds, the limit of a download"):
        file.read()
    with pytest.raises(UnreadableError, match="does not come within 0 seconds"):  # nor does its thread read on
        inputs._fetch(file.name, deadline=0.0)


@pytest.mark.parametrize("answer", [Answer(b"x", drip=True), moved("/f", drip=True)])
def test_a_server_that_drips_its_headers_is_given_up(server, archives, monkeypatch, answer):
    monkeypatch.setattr(inputs, "MAX_DOWNLOAD_SECONDS", 0.1)
    ((file,), _) = find_images([server.offer("/f", answer)], archives)
    with pytest.raises(UnreadableError, match=r"does not come within 0\.1 seconds, the limit of a download"):
        file.read()


def test_nobody_at_the_address_is_told(archives, server):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/f"
    ((file,), _) = find_images([url], archives)
    with pytest.raises(UnreadableError, match=r"no connection, or it was cut \(Connection refused\)"):
        file.read()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://bucket/1.jpg", "s3://bucket/1.jpg is no http or https address; download the file and give its path"),
        ("file:///etc/passwd", "file:///etc/passwd is no http or https address"),
        ("https://", "https:// names no server; give a whole address"),
        ("https://[::1/1.jpg", "is no address that can be understood; check it"),
    ],
)
def test_addresses_of_other_kinds_are_told(archives, url, told):
    with pytest.raises(CatdogError) as caught:
        find_images([url], archives)
    assert told in str(caught.value)
