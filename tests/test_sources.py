"""Every kind of source ends as one whole zip archive, or as one sentence and no file."""

import dataclasses
import errno
import hashlib
import io
import os
import tarfile
import warnings
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from catdog import sources
from catdog.catalog import PUBLISHED
from catdog.errors import CatdogError
from catdog.files import DiskError
from catdog.sources import SourceFacts, fetch
from internet import send

FILES = {
    "Cat/0.jpg": b"first" * 1000,
    "Cat/Ä 猫.jpg": b"",
    "Dog/deep/1.png": os.urandom(3000),
    ".DS_Store": b"hidden",
}
DRIVE = "https://drive.google.com/file/d/1abc/view"


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "data" / "raw.zip"


def bring(dataset, target: Path, root: Path | None = None, sha256: str = "") -> SourceFacts:
    return fetch(str(dataset), target, root=root or target.parents[1], seed=1, sample_images=4, sha256=sha256)


def refused(dataset, target: Path, sha256: str = "") -> str:
    """The sentence that refuses a data set; no file may be left, whole or in part."""
    with pytest.raises(CatdogError) as caught:
        bring(dataset, target, sha256=sha256)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def make_folder(folder: Path, files=FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_zip(path: Path, files=FILES, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, mode: str, files=FILES, prefix="") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tar_with(path: Path, *members: tarfile.TarInfo) -> Path:
    make_tar(path, "w")
    with tarfile.open(path, "a") as archive:
        for member in members:
            archive.addfile(member)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def test_zip_is_copied_byte_for_byte(tmp_path, target):
    source = make_zip(tmp_path / "pets.zip")
    facts = bring(source, target)
    assert target.read_bytes() == source.read_bytes()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert facts == SourceFacts(
        "zip", str(source), len(FILES), source.stat().st_size, digest, {"archive_sha256": digest}
    )


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_tar_is_repacked_with_the_same_names_and_contents(tmp_path, target, mode, prefix):
    facts = bring(make_tar(tmp_path / "pets", mode, prefix=prefix), target)
    assert contents(target) == FILES
    assert (facts.kind, facts.files, facts.bytes) == ("tar", len(FILES), target.stat().st_size)
    assert facts.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()


def test_folder_is_packed_with_the_same_names_and_contents(tmp_path, target):
    facts = bring(make_folder(tmp_path / "pets"), target)
    assert contents(target) == FILES
    assert (facts.kind, facts.files) == ("folder", len(FILES))


def test_kind_is_told_by_content_not_by_name(tmp_path, target):
    assert bring(make_zip(tmp_path / "pets.tar.gz"), target).kind == "zip"
    assert bring(make_tar(tmp_path / "other.zip", "w:gz"), target).kind == "tar"


def test_tar_that_ends_with_a_zip_is_a_tar(tmp_path, target):
    inner = make_zip(tmp_path / "inner.zip", {"x.txt": b"x"}).read_bytes()
    facts = bring(make_tar(tmp_path / "pets.tar", "w", {**FILES, "inner.zip": inner}), target)
    assert facts.kind == "tar"
    assert contents(target) == {**FILES, "inner.zip": inner}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_empty_folders_are_kept_and_not_counted(tmp_path, target, kind):
    if kind == "folder":
        source = make_folder(tmp_path / "pets")
        (source / "Bird").mkdir()
    else:
        source = tar_with(tmp_path / "pets.tar", member("./Bird", tarfile.DIRTYPE), member("./", tarfile.DIRTYPE))
    facts = bring(source, target)
    with zipfile.ZipFile(target) as archive:
        assert "Bird/" in archive.namelist()
    assert facts.files == len(FILES)


def test_folder_gives_the_same_bytes_whatever_dates_modes_and_order_of_creation(tmp_path, target):
    one = make_folder(tmp_path / "one")
    two = make_folder(tmp_path / "two", dict(reversed(FILES.items())))
    for number, path in enumerate(sorted(two.rglob("*"))):
        path.chmod(0o755 if path.is_dir() else 0o400)
        os.utime(path, (number * 1e8, number * 1e8))
    first = bring(one, target).sha256
    target.unlink()
    assert bring(two, target).sha256 == first
    (two / "Cat" / "0.jpg").rename(two / "Cat" / "1.jpg")
    assert bring(two, target).sha256 != first


def test_links_in_a_folder_are_followed(tmp_path, target):
    source = make_folder(tmp_path / "pets")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "9.jpg").write_bytes(b"nine")
    (source / "Bird").symlink_to(tmp_path / "elsewhere")
    (source / "Dog" / "link.jpg").symlink_to(source / "Cat" / "0.jpg")
    bring(source, target)
    assert contents(target) == {**FILES, "Bird/9.jpg": b"nine", "Dog/link.jpg": FILES["Cat/0.jpg"]}


@pytest.mark.parametrize(
    ("locked", "dataset", "told"),
    [
        ("pets.zip", "pets.zip", "dataset = 'pets.zip' cannot be read: Permission denied; check"),
        ("shut", "shut/pets.zip", "dataset = 'shut/pets.zip' cannot be read: Permission denied; check"),
        ("pets/Cat/0.jpg", "pets", "file that cannot be read: {root}/pets/Cat/0.jpg (Permission denied)"),
        ("pets/Cat", "pets", "dataset folder {root}/pets/Cat cannot be read: Permission denied"),
        ("pets.dvc", "pets", "{root}/pets.dvc cannot be read: Permission denied"),
    ],
)
def test_what_this_user_may_not_read_is_told(ordinary_user, locked, dataset, told):
    root = ordinary_user
    make_folder(root / "pets")
    make_zip(root / "pets.zip")
    (root / "pets.dvc").write_text("outs:\n- md5: abc.dir\n  path: pets\n")
    if locked != "pets.dvc":
        (root / "pets.dvc").unlink()
    (root / "shut").mkdir()
    (root / locked).chmod(0)
    assert told.format(root=root) in refused(dataset, root / "data/raw.zip")
    (root / locked).chmod(0o700)


def test_folder_whose_files_may_be_listed_but_not_looked_at_is_told(ordinary_user):
    make_folder(ordinary_user / "pets")
    (ordinary_user / "pets/Cat").chmod(0o600)
    told = refused("pets", ordinary_user / "data/raw.zip")
    assert f"something that cannot be read: {ordinary_user}/pets/Cat/" in told and "Permission denied" in told
    (ordinary_user / "pets/Cat").chmod(0o700)


def test_home_folder_of_nobody_is_told(target):
    assert "'~no-such-user/x' begins with a home folder that" in refused("~no-such-user/x", target)


def test_dead_link_and_link_upwards_are_named(tmp_path, target):
    source = make_folder(tmp_path / "pets")
    (source / "dead").symlink_to(source / "nothing")
    assert f"link to nothing: {source / 'dead'}" in refused(source, target)
    (source / "dead").unlink()
    (source / "Cat" / "up").symlink_to(source)
    assert f"link to a folder above itself: {source / 'Cat' / 'up'}" in refused(source, target)


def test_relative_path_starts_at_the_root(tmp_path, target, monkeypatch):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make_folder(root / "pets", {"a.jpg": b"right"})
    make_folder(elsewhere / "pets", {"a.jpg": b"wrong"})
    monkeypatch.chdir(elsewhere)
    facts = bring("pets", target, root=root)
    assert contents(target) == {"a.jpg": b"right"}
    assert facts.location == "pets"


def test_tilde_is_the_home_folder(tmp_path, target, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_folder(tmp_path / "home" / "pets")
    assert bring("~/pets", target).files == len(FILES)


def test_sample_is_drawn(tmp_path, target):
    facts = bring("sample", target)
    assert (facts.kind, facts.files) == ("sample", 4)
    again = tmp_path / "again" / "raw.zip"
    assert bring("sample", again).sha256 == facts.sha256


@pytest.mark.parametrize("dataset", ["data", "data/", ".", "", "..", "link", "pets/.."])
def test_folder_that_holds_the_pipelines_own_files_is_told(tmp_path, dataset):
    root = tmp_path / "project"
    for pets in ("data/pets", "pets"):
        make_folder(root / pets)
    (root / "link").symlink_to("data")
    with pytest.raises(CatdogError, match="pipeline's own files") as caught:
        bring(dataset, root / "data/raw.zip")
    assert str(caught.value).startswith(f"dataset = {dataset!r} holds {root}")
    assert "move the pictures into a folder of their own" in str(caught.value)
    assert bring("data/pets", root / "data/raw.zip").files == len(FILES)  # beside them


def test_missing_path_is_named_with_the_place_looked_at(tmp_path, target):
    told = refused("data/none.zip", target)
    assert "'data/none.zip' does not exist" in told
    assert str(tmp_path / "data" / "none.zip") in told


def test_name_too_long_for_a_file_is_one_sentence(target):
    refused("x" * 300, target)


def test_empty_file_is_told(tmp_path, target):
    (tmp_path / "pets.zip").touch()
    assert "the file is empty (0 bytes)" in refused("pets.zip", target)


def test_file_that_is_no_archive_is_told(tmp_path, target):
    (tmp_path / "pets.zip").write_text("<html>404</html>" * 100)
    assert "no archive that can be read" in refused("pets.zip", target)


def test_truncated_zip_is_told(tmp_path, target):
    whole = make_zip(tmp_path / "pets.zip").read_bytes()
    (tmp_path / "pets.zip").write_bytes(whole[: len(whole) * 2 // 3])
    assert "no archive that can be read" in refused("pets.zip", target)


def test_zip_with_a_broken_directory_is_told(tmp_path, target):
    whole = bytearray(make_zip(tmp_path / "pets.zip").read_bytes())
    whole[whole.index(b"PK\x01\x02")] = 0
    (tmp_path / "pets.zip").write_bytes(whole)
    assert "damaged zip archive" in refused("pets.zip", target)


def test_zip_with_a_password_is_told_with_a_member(tmp_path, target):
    whole = bytearray(make_zip(tmp_path / "pets.zip").read_bytes())
    second = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 4)
    whole[second + 8] |= 0x1  # the general purpose flag in the directory
    (tmp_path / "pets.zip").write_bytes(whole)
    told = refused("pets.zip", target)
    assert "protected by a password (Cat/Ä 猫.jpg)" in told


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_truncated_tar_is_told(tmp_path, target, mode, share):
    big = {f"Cat/{number}.jpg": os.urandom(100_000) for number in range(5)}
    whole = make_tar(tmp_path / "pets.tar", mode, big).read_bytes()
    (tmp_path / "pets.tar").write_bytes(whole[: int(len(whole) * share)])
    assert "damaged tar archive" in refused("pets.tar", target)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("flipped", [1, 50])
def test_compressed_tar_with_flipped_bytes_is_told(tmp_path, target, mode, flipped):
    photos = {f"Cat/{number}.jpg": np.random.default_rng(number).bytes(400_000) for number in range(3)}
    whole = bytearray(make_tar(tmp_path / "pets.tar", mode, photos).read_bytes())
    middle = len(whole) * 4 // 5
    whole[middle : middle + flipped] = bytes(value ^ 0xFF for value in whole[middle : middle + flipped])
    (tmp_path / "pets.tar").write_bytes(whole)
    assert "damaged tar archive" in refused("pets.tar", target)


def test_tar_with_a_damaged_header_in_its_middle_is_told_not_cut_short(tmp_path, target):
    whole = bytearray(make_tar(tmp_path / "pets.tar", "w").read_bytes())
    whole[whole.index(b"Dog/deep/1.png")] ^= 0xFF
    (tmp_path / "pets.tar").write_bytes(whole)
    assert "damaged tar archive" in refused("pets.tar", target)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_tar_with_a_link_or_a_device_is_told(tmp_path, target, kind):
    tar_with(tmp_path / "pets.tar", member("Dog/x.jpg", kind, "Cat/0.jpg"))
    assert "neither a file nor a folder: 'Dog/x.jpg'" in refused("pets.tar", target)


@pytest.mark.parametrize("name", ["../out.jpg", "Cat/../../out.jpg", "/etc/out.jpg", "./../out.jpg"])
def test_tar_with_a_member_that_leaves_it_is_told(tmp_path, target, name):
    tar_with(tmp_path / "pets.tar", member(name))
    assert "leaves the archive" in refused("pets.tar", target)
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_name_that_is_no_utf8_is_kept_or_told(tmp_path, target, kind):
    if kind == "folder":
        source = make_folder(tmp_path / "pets", {"Dog/1.jpg": b"1"})
        Path(os.fsdecode(os.fsencode(source / "Dog") + b"/K\xf6ter.jpg")).write_bytes(b"2")
    else:
        source = tmp_path / "pets.tar"
        with tarfile.open(source, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
            archive.addfile(member("Dog/K\xf6ter.jpg"))
    try:
        facts = bring(source, target)
    except CatdogError as error:
        assert "ter.jpg" in str(error)
        assert list(target.parent.iterdir()) == []
    else:
        assert len(contents(target)) == facts.files


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_source_without_files_is_told(tmp_path, target, kind):
    source = tmp_path / "pets"
    if kind == "folder":
        (source / "Cat").mkdir(parents=True)
    elif kind == "zip":
        make_zip(source, {"Cat/": b""})
    else:
        with tarfile.open(source, "w") as archive:
            archive.addfile(member("Cat", tarfile.DIRTYPE))
    assert "holds no files" in refused(source, target)


def test_too_little_room_is_told_before_copying(tmp_path, target, monkeypatch):
    source = make_zip(tmp_path / "pets.zip")
    usage = type("Usage", (), {"free": source.stat().st_size - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert "MB free" in refused(source, target)


def test_failure_leaves_the_former_archive_alone(tmp_path, target):
    bring(make_zip(tmp_path / "pets.zip"), target)
    before = target.read_bytes()
    with pytest.raises(CatdogError):
        bring(tar_with(tmp_path / "bad.tar", member("../x")), target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["raw.zip"]


def test_name_that_stands_twice_in_a_tar_does_not_stop_it(tmp_path, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bring(tar_with(tmp_path / "pets.tar", member("Cat/0.jpg")), target)
    with zipfile.ZipFile(target) as archive:
        assert archive.read("Cat/0.jpg") == b""  # the last one, as tar extracts it


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), DiskError("full")])
@pytest.mark.parametrize("dataset", ["microsoft", "https://data.example.org/x.zip", "kaggle", DRIVE])
def test_finished_download_outlives_packing_that_was_cut_off(
    tmp_path, target, internet, monkeypatch, capsys, dataset, interruption
):
    data = make_zip(tmp_path / "x.zip").read_bytes()
    publish(monkeypatch, "microsoft", data)
    for host in ("download.microsoft.com", "data.example.org"):
        internet.sites[host] = lambda request: send(request, data)
    asked = []

    def finish(folder, name):  # as `fetch_kaggle` and `fetch_drive` do
        if not (folder / name).exists():
            asked.append(name)
            folder.mkdir()
            (folder / name).write_bytes(data)
        return folder / name

    monkeypatch.setattr(sources, "fetch_kaggle", lambda competition, folder: finish(folder, "k.zip"))
    monkeypatch.setattr(sources, "fetch_drive", lambda url, folder: finish(folder, "d.zip"))
    with monkeypatch.context() as patch, pytest.raises(type(interruption)):
        patch.setattr("shutil.copyfile", Mock(side_effect=interruption))
        bring(dataset, target)
    assert list(target.parent.iterdir()) == []
    kept = tmp_path / ".dvc/tmp/downloads"
    assert sum(path.stat().st_size for path in kept.rglob("*")) > len(data)
    bring(dataset, target)
    assert target.read_bytes() == data
    assert len(asked) <= 1 and sum("range" not in request.headers for request in internet.requests) <= 1
    assert {path.suffix for path in kept.iterdir()} == {".lock"}


@pytest.mark.parametrize("dataset", ["https://data.example.org/x.zip", "kaggle"])
def test_download_that_is_no_archive_is_not_kept(tmp_path, target, internet, monkeypatch, dataset):
    internet.sites["data.example.org"] = lambda request: send(request, b"no archive")

    def fetch_kaggle(competition, folder):
        folder.mkdir()
        (folder / "k.zip").write_bytes(b"no archive")
        return folder / "k.zip"

    monkeypatch.setattr(sources, "fetch_kaggle", fetch_kaggle)
    assert "no archive" in refused(dataset, target)
    assert {path.suffix for path in (tmp_path / ".dvc/tmp/downloads").iterdir()} == {".lock"}


def publish(monkeypatch, name: str, data: bytes) -> None:
    """Makes the table expect these bytes at the real addresses of a published set."""
    expected = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], **expected))


PETS = {
    "images/Maine_Coon_12.jpg": b"coon",
    "images/Abyssinian_100.mat": b"matlab",
    "images/beagle_7.jpg": b"beagle",
    "images/": b"",
}


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("oxford_pets", {"cat/Maine_Coon_12.jpg", "cat/Abyssinian_100.mat", "dog/beagle_7.jpg"}),
        (
            "oxford_pets:breeds",
            {"Maine_Coon/Maine_Coon_12.jpg", "Abyssinian/Abyssinian_100.mat", "beagle/beagle_7.jpg"},
        ),
    ],
)
def test_oxford_pets_come_from_their_second_address_when_the_first_is_gone(
    tmp_path, target, internet, monkeypatch, capsys, dataset, expected
):
    data = make_tar(tmp_path / "images.tar.gz", "w:gz", {k: v for k, v in PETS.items() if v}).read_bytes()
    publish(monkeypatch, dataset, data)
    path = "/~vgg/data/pets/data/images.tar.gz"
    internet.sites["www.robots.ox.ac.uk"] = lambda request: send(request, data) if request.path == path else None
    facts = bring(dataset, target)
    assert set(contents(target)) == expected
    assert internet.hosts == {"thor.robots.ox.ac.uk", "www.robots.ox.ac.uk"}
    assert facts.origin["url"] == f"https://www.robots.ox.ac.uk{path}"
    assert facts.origin["license"] == "CC BY-SA 4.0"
    assert facts.origin["archive_sha256"] == hashlib.sha256(data).hexdigest()
    assert not list((tmp_path / ".dvc/tmp/downloads").glob("*/")), "nothing big is left behind"


def test_microsofts_archive_stays_as_it_is(tmp_path, target, internet, monkeypatch):
    data = make_zip(tmp_path / "x.zip").read_bytes()
    publish(monkeypatch, "microsoft", data)
    internet.sites["download.microsoft.com"] = lambda request: send(request, data)
    facts = bring("microsoft", target)
    assert target.read_bytes() == data and facts.kind == "zip" and facts.location == "microsoft"
    assert internet.requests[-1].path.endswith("/kagglecatsanddogs_5340.zip")


def test_published_archive_with_other_bytes_is_refused_at_every_address(tmp_path, target, internet, monkeypatch):
    data = make_zip(tmp_path / "x.zip").read_bytes()
    publish(monkeypatch, "microsoft", data)
    other = make_zip(tmp_path / "y.zip", {"Cat/evil.jpg": bytes(len(data) - 150)}).read_bytes()[: len(data)]
    for host in ("download.microsoft.com", "web.archive.org"):
        internet.sites[host] = lambda request: send(request, other + bytes(len(data) - len(other)))
    told = refused("microsoft", target)
    assert "download.microsoft.com" in told and "web.archive.org" in told
    # The publisher may change the file; then the user may say so.
    internet.sites["download.microsoft.com"] = lambda request: send(request, data + b"")
    assert bring("microsoft", target, sha256=hashlib.sha256(data).hexdigest()).kind == "zip"


def test_address_gives_an_archive_and_its_facts_without_the_password(tmp_path, target, internet):
    data = make_tar(tmp_path / "x.tar.xz", "w:xz").read_bytes()
    stamp = {"ETag": '"v1"', "Last-Modified": "Sat, 01 Nov 2025 10:00:00 GMT"}
    internet.sites["data.example.org"] = lambda request: send(request, data, stamp)
    facts = bring("https://me:secret@data.example.org/pets.tar.xz", target)
    assert contents(target) == FILES
    assert facts.kind == "tar" and facts.location == "https://data.example.org/pets.tar.xz"
    assert facts.origin["etag"] == '"v1"' and facts.origin["last_modified"] == stamp["Last-Modified"]
    assert "secret" not in str(facts)


def test_expected_hash_is_checked_for_files_and_addresses(tmp_path, target, internet):
    source = make_zip(tmp_path / "pets.zip")
    data = source.read_bytes()
    right, wrong = hashlib.sha256(data).hexdigest(), "0" * 64
    internet.sites["data.example.org"] = lambda request: send(request, data)
    told = refused(source, target, sha256=wrong)
    assert right in told and wrong in told and "download.sha256" in told
    assert wrong in refused("https://data.example.org/x.zip", target, sha256=wrong)
    for dataset in (source, "https://data.example.org/x.zip"):
        assert bring(dataset, target, sha256=right.upper()).origin["archive_sha256"] == right


@pytest.mark.parametrize("dataset", ["sample", "folder"])
def test_expected_hash_of_what_is_no_archive_is_a_mistake(tmp_path, target, dataset):
    make_folder(tmp_path / "folder")
    assert "download.sha256 is set, but" in refused(dataset, target, sha256="0" * 64)


def test_misspelt_name_is_answered_with_the_right_one(target):
    assert "did you mean microsoft?" in refused("microsft", target)


def test_archive_with_archives_inside_as_kaggle_gives_it(tmp_path, target):
    train = make_zip(tmp_path / "train.zip", {"train/cat.0.jpg": b"c", "train/dog.0.jpg": b"d"})
    test = make_zip(tmp_path / "test1.zip", {"test1/1.jpg": b"t"})
    inner = {"train.zip": train.read_bytes(), "test1.zip": test.read_bytes(), "sampleSubmission.csv": b"id,label\n"}
    facts = bring(make_zip(tmp_path / "dogs-vs-cats.zip", inner), target)
    assert set(contents(target)) == {"train/cat.0.jpg", "train/dog.0.jpg", "test1/1.jpg", "sampleSubmission.csv"}
    assert facts.files == 4


def test_data_that_dvc_tracks_but_did_not_bring_is_told(tmp_path, target):
    (tmp_path / "pets.dvc").write_text("outs:\n- md5: abc.dir\n  path: pets\n")
    assert "`dvc pull pets.dvc` brings it" in refused("pets", target)
    (root := tmp_path / "project").mkdir()
    with pytest.raises(CatdogError, match=f"`dvc pull` in {tmp_path} brings it"):
        bring("../pets", target, root=root)


def test_data_of_another_project_of_dvc_comes_by_a_relative_path(tmp_path, target):
    make_folder(tmp_path / "registry/pets")
    (tmp_path / "registry/pets.dvc").write_text("outs:\n- md5: abc.dir\n  path: pets\n")
    (root := tmp_path / "project").mkdir()
    facts = bring("../registry/pets", target, root=root)
    assert facts.files == len(FILES) and facts.origin == {}
