"""Every archive and folder becomes one zip with all its files, or one sentence and no file."""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import random
import stat
import struct
import subprocess
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest

from catdog import archives
from catdog.archives import (
    MemberError,
    duplicate_members,
    open_archive,
    pack_archive,
    pack_folder,
    read_member,
)
from catdog.errors import CatdogError

FILES = {
    "Cat/0.jpg": b"first" * 1000,
    "Cat/Ä 猫.jpg": b"",
    "Dog/deep/1.png": os.urandom(3000),
    "Dog/__MACOSX/._1.png": b"hidden",
    ".DS_Store": b"hidden",
    "Dog/Thumbs.db": b"hidden",
}
TAR_MODES = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}
ZEROS = bytes(1 << 20)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "data" / "raw.zip"


def zip_of(files, method=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files given as a mapping, or as pairs of a name or ZipInfo and content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(files, mode="w", **options) -> bytes:
    """A tar of files given as a mapping, or as pairs of a name or TarInfo and content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def pack(data: bytes, target: Path, **options) -> str:
    source = target.parents[1] / "source"
    source.write_bytes(data)
    return pack_archive(source, target, location="pets", **options)


def refused(data: bytes, target: Path) -> str:
    """The sentence that refuses an archive; nothing may be left, whole or in part."""
    with pytest.raises(CatdogError) as caught:
        pack(data, target)
    assert list(target.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("dataset = 'pets")
    return str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    with open_archive(path) as archive:
        assert archive.testzip() is None
        assert duplicate_members(archive) == []
        return {member.filename: archive.read(member) for member in archive.infolist() if not member.is_dir()}


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def zip_member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = mode << 16
    return made


def edited(data: bytes, offset: int, value: bytes, occurrence: int = 0) -> bytes:
    """A zip with bytes replaced in one of its directory's entries."""
    whole, at = bytearray(data), -1
    for _ in range(occurrence + 1):
        at = whole.index(b"PK\x01\x02", at + 1)
    whole[at + offset : at + offset + len(value)] = value
    return bytes(whole)


class RawName(zipfile.ZipInfo):
    """A member whose name is written as bytes, without the flag that it is UTF-8."""

    def __init__(self, raw: bytes, extra: bytes = b"") -> None:
        super().__init__("raw")
        self.raw, self.extra = raw, extra

    def _encodeFilenameFlags(self):  # the standard library's own hook
        return self.raw, self.flag_bits & ~0x800


# --- what is packed --------------------------------------------------------------------------------------------------


def test_sound_zip_is_copied_byte_for_byte(target):
    data = zip_of(FILES)
    assert pack(data, target) == "zip"
    assert target.read_bytes() == data
    assert contents(target) == FILES


@pytest.mark.parametrize("mode", TAR_MODES.values())
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_is_repacked_whole(target, mode, form):
    files = FILES | {"Dog/" + "long" * 60 + ".jpg": b"long"}
    assert pack(tar_of(files, mode, format=form), target) == "tar"
    assert contents(target) == files


def test_lzma_from_before_xz_is_read(target):
    assert pack(lzma.compress(tar_of(FILES), lzma.FORMAT_ALONE), target) == "tar"
    assert contents(target) == FILES


def test_same_files_give_the_same_bytes_from_any_tar(target):
    packed = set()
    for mode in TAR_MODES.values():
        dated = []
        for name, data in FILES.items():
            dated.append((tar_member(name), data))
            dated[-1][0].mtime, dated[-1][0].mode = len(packed) * 1e6, 0o700 + len(packed)
        pack(tar_of(dated, mode), target)
        packed.add(target.read_bytes())
    assert len(packed) == 1


def sparse_tar(folder: Path, megabytes: int) -> bytes:
    """A tar of the one file `folder/Cat`, which is all hole but for two bytes."""
    with (folder / "Cat").open("wb") as file:
        for offset in (70_000, (megabytes << 20) - 1):
            file.seek(offset)
            file.write(b"x")
    try:
        subprocess.run(["tar", "-C", folder, "--sparse", "-cf", folder / "tar", "Cat"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no GNU tar here")
    return (folder / "tar").read_bytes()


def test_sparse_file_of_a_tar_is_read_with_its_holes(tmp_path, target):
    data = sparse_tar(tmp_path, 1)
    assert len(data) < 50_000
    pack(data, target)
    assert contents(target) == {"Cat": (tmp_path / "Cat").read_bytes()}


def test_rename_moves_and_leaves_out(target):
    names = {"Cat/0.jpg": "x/0.jpg", "Dog/deep/1.png": "y/1.png"}
    for data in (zip_of(FILES | {"Cat/": b""}), tar_of(FILES, "w:gz")):
        pack(data, target, rename=names.get)
        assert contents(target) == {new: FILES[old] for old, new in names.items()}
        assert len(zipfile.ZipFile(target).namelist()) == 2


def test_exception_of_rename_is_not_taken_for_a_damaged_archive(target):
    with pytest.raises(KeyError):
        pack(zip_of(FILES), target, rename={}.__getitem__)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_file_whose_name_stands_twice_is_kept_and_told(target, make):
    twice = [("Cat/0.jpg", b"one"), ("Dog/0.jpg", b"dog"), ("Cat/0.jpg", b"two!"), ("Cat/0.jpg", b"three")]
    pack(make(twice), target)
    with open_archive(target) as archive:
        assert archive.read("Cat/0.jpg") == b"three"
        hidden = duplicate_members(archive)
        assert [archive.read(member) for member in hidden] == [b"one", b"two!"]
        assert len(archive.infolist()) == 4


def test_folder_that_stands_twice_is_no_duplicate(target):
    folder = tar_member("Cat", tarfile.DIRTYPE)
    pack(tar_of([(folder, b""), ("Cat/0.jpg", b"1"), (folder, b"")]), target)
    with open_archive(target) as archive:
        assert archive.namelist() == ["Cat/", "Cat/0.jpg"]


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_backslashes_of_windows_become_slashes(target, make):
    pack(make({"PetImages\\Cat\\0.jpg": b"cat", "PetImages\\Dog\\": b"", "readme.txt": b"text"}), target)
    assert contents(target) == {"PetImages/Cat/0.jpg": b"cat", "readme.txt": b"text"}
    with open_archive(target) as archive:
        assert "PetImages/Dog/" in archive.namelist()


def test_backslash_beside_slashes_is_part_of_a_name(target):
    data = zip_of({"Cat/a\\b.jpg": b"1"})
    pack(data, target)
    assert target.read_bytes() == data


def test_empty_zip_stays_empty(target):
    assert pack(zip_of({}), target) == "zip"
    assert contents(target) == {}


def test_what_a_killed_run_left_is_cleared(target):
    left = target.with_name("raw.zip.part.scratch")
    left.mkdir(parents=True)
    (left / "0.zip").write_bytes(b"half")
    pack(zip_of({"a.zip": zip_of(FILES)}), target)
    assert list(target.parent.iterdir()) == [target]


def test_failure_leaves_the_former_file_alone(target):
    pack(zip_of(FILES), target)
    before = target.read_bytes()
    for data in (b"", zip_of({"../x": b""}), tar_of({"../x": b""}), zip_of({"a.zip": b"no"})):
        with pytest.raises(CatdogError):
            pack(data, target)
        assert target.read_bytes() == before
        assert list(target.parent.iterdir()) == [target]


# --- what an archive is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["source", "source.tar.gz", "source.jpg"])
def test_archive_is_told_by_content(tmp_path, target, name):
    path = tmp_path / name
    for data in (zip_of(FILES), *(tar_of(FILES, mode) for mode in TAR_MODES.values())):
        path.write_bytes(data)
        pack_archive(path, target)
        assert contents(target) == FILES


def test_tar_that_ends_with_a_zip_is_a_tar(target):
    files = {"Cat/0.jpg": b"1", "z.zip": zip_of(FILES, zipfile.ZIP_STORED)}
    assert pack(tar_of(files), target) == "tar"
    assert contents(target) == files


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"<html>sign in</html>" * 100, "no archive that can be read"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(100), "is a 7z archive"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(100), "is a RAR archive"),
        (b"\x28\xb5\x2f\xfd\x04\x58" + bytes(100), "is a Zstandard archive"),
        (gzip.compress(b"label,name\n" * 999, mtime=0), "no archive that can be read"),
        (gzip.compress(b"label,name\n" * 999, mtime=0)[:30], "damaged tar archive"),
    ],
)
def test_what_is_no_archive_is_told(target, data, told):
    assert told in refused(data, target)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated_archive_is_told(target, share):
    photos = {f"Cat/{number}.jpg": os.urandom(50_000) for number in range(4)}
    for data in (zip_of(photos), *(tar_of(photos, mode) for mode in TAR_MODES.values())):
        told = refused(data[: int(len(data) * share)], target)
        assert "no archive that can be read" in told or "is a damaged" in told


def test_zip_with_a_damaged_directory_is_told(target):
    assert "damaged zip archive" in refused(edited(zip_of(FILES), 0, b"\0"), target)
    assert "damaged zip archive" in refused(edited(zip_of(FILES), 42, b"\xff\xff\xff\x7f"), target)


def test_damage_found_while_a_zip_is_repacked_is_told(target):
    data = bytearray(zip_of({"a\\0.jpg": b"0123456789" * 99}, zipfile.ZIP_STORED))
    data[200] ^= 0xFF
    assert "damaged zip archive (Bad CRC-32" in refused(bytes(data), target)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_damage_behind_the_last_member_of_a_tar_is_told(target, compress):
    whole = bytearray(compress(tar_of({"Cat/0.jpg": os.urandom(30_000)})))
    whole[-6] ^= 0xFF
    assert "damaged tar archive" in refused(bytes(whole), target)


def test_damaged_header_in_the_middle_of_a_tar_is_no_end(target):
    whole = bytearray(tar_of({"Cat/0.jpg": b"0", "Cat/1.jpg": b"1", "Cat/2.jpg": b"2"}))
    whole[whole.index(b"Cat/1.jpg")] ^= 0xFF
    assert "damaged tar archive (a header is damaged)" in refused(bytes(whole), target)


def test_tar_that_ends_inside_the_list_of_a_file_with_holes_is_told(target):
    header = bytearray(tar_member("Cat/1.jpg", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # the list goes on in the next block
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    assert "damaged tar archive" in refused(tar_of({"Cat/0.jpg": b"0"})[:1024] + bytes(header), target)


def test_members_locked_or_compressed_beyond_reading_are_named(target):
    assert "protected by a password (Cat/Ä 猫.jpg)" in refused(edited(zip_of(FILES), 8, b"\x01", 1), target)
    assert "compressed by method 9, which cannot be read here: 'Cat/0.jpg'" in refused(
        edited(zip_of(FILES), 10, b"\x09\x00"), target
    )


def test_random_damage_never_ends_in_anything_but_a_sentence(target):
    random.seed(1)
    files = {"Cat/0.jpg": random.randbytes(300), "Dog/Ä" + "l" * 120: b"x" * 400}
    sound = [zip_of(files), zip_of({"a.zip": zip_of(files)}), *(tar_of(files, mode) for mode in TAR_MODES.values())]
    outcomes = {True: 0, False: 0}
    for data in sound * 40:
        broken = bytearray(data)
        for _ in range(random.choice([1, 3])):
            # Half of it in the last and first bytes, where the structure is.
            place = random.choice([random.randrange(len(data)), random.randrange(-200, 200)])
            broken[place] = random.randrange(256)
        with contextlib.suppress(CatdogError):
            pack(bytes(broken), target)
            with open_archive(target) as archive:
                for member in archive.infolist():
                    with contextlib.suppress(MemberError):
                        read_member(archive, member)
        outcomes[target.exists()] += 1
        assert target.parent.exists()
        assert set(target.parent.iterdir()) <= {target}
        target.unlink(missing_ok=True)
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_file_in_a_zip_is_one_reason(tmp_path, method):
    files = {"Cat/0.jpg": random.Random(1).randbytes(2000), "Dog/Ä.jpg": b"whole"}
    sound = zip_of(files, method)
    damaged = 0
    for position in range(0, 1000, 5):
        broken = bytearray(sound)
        broken[position] ^= 0xFF
        (tmp_path / "a.zip").write_bytes(broken)
        with open_archive(tmp_path / "a.zip") as archive:
            assert read_member(archive, "Dog/Ä.jpg") == b"whole"
            try:
                assert read_member(archive, "Cat/0.jpg") == files["Cat/0.jpg"]
            except MemberError as error:
                assert str(error).startswith("damaged in the archive: ")
                damaged += 1
    assert damaged > 150


def test_name_in_front_of_a_file_that_is_no_utf8_is_one_reason(tmp_path):
    data = zip_of({"Dog/Ä.jpg": b"1"}).replace("Ä".encode(), b"\xff\xff", 1)
    (tmp_path / "a.zip").write_bytes(data)
    with open_archive(tmp_path / "a.zip") as archive, pytest.raises(MemberError, match="damaged in the archive: "):
        read_member(archive, archive.infolist()[0])


def test_file_that_lies_beyond_all_disks_is_one_reason(tmp_path):
    far = struct.pack("<HHQ", 1, 8, 1 << 63)  # the offset, as zip64 has it
    (tmp_path / "a.zip").write_bytes(edited(zip_of([(RawName(b"Cat/0.jpg", far), b"1")]), 42, b"\xff\xff\xff\xff"))
    with open_archive(tmp_path / "a.zip") as archive, pytest.raises(MemberError):
        read_member(archive, "Cat/0.jpg")


def test_file_that_unpacks_to_more_than_it_claims_does_not_fill_the_memory(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    (tmp_path / "a.zip").write_bytes(edited(zip_of({"Cat/0.jpg": ZEROS * 40}), 24, struct.pack("<I", 1000)))
    with open_archive(tmp_path / "a.zip") as archive:
        tracemalloc.start()
        with pytest.raises(MemberError, match="CRC"):
            read_member(archive, "Cat/0.jpg")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3e6


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../out.jpg", "Cat/../../out.jpg", "Cat/..", "..", "/etc/out.jpg", "C:/out.jpg", "c:out.jpg", "\\out.jpg",
        "..\\out.jpg", "Cat\\..\\..\\out.jpg", "Cat/..\\out.jpg", "\\\\server\\share\\out.jpg",
    ],
)  # fmt: skip
def test_member_that_leaves_the_archive_is_named(target, name):
    for make in (zip_of, tar_of):
        told = refused(make([("Cat/0.jpg", b"1"), (name, b"2")]), target)
        assert f"leaves the archive: {name!r}" in told


@pytest.mark.parametrize("name", ["Cat/..jpg", "Cat/...", "a..b/0.jpg", "Cat/c:0.jpg", "./Cat/0.jpg", " ", "Cat/~"])
def test_odd_but_honest_names_are_kept(target, name):
    for make in (zip_of, tar_of):
        pack(make({name: b"1"}), target)
        assert [Path(found) for found in contents(target)] == [Path(name)]


@pytest.mark.parametrize("name", ["Cat/\n.jpg", "Cat/\x1b[2J.jpg", "\x7f", "Cat/\x85.jpg"])
def test_control_characters_are_told_without_being_printed(target, name):
    for make in (zip_of, tar_of):
        told = refused(make({name: b"1"}), target)
        assert "control characters" in told
        assert told.isprintable()


def test_name_that_hides_something_behind_a_zero_byte_is_told(target):
    data = zip_of({"Cat/0.jpg?.exe": b"1"}).replace(b"0.jpg?", b"0.jpg\0")
    assert "control characters: 'Cat/0.jpg\\x00.exe'" in refused(data, target)


def test_empty_and_endless_names_are_told(target):
    assert "name is empty" in refused(zip_of([(RawName(b""), b"1")]), target)
    for make in (zip_of, tar_of):
        assert "has 5,000 characters" in refused(make({"x" * 5000: b"1"}), target)


def names(target: Path) -> list[str]:
    return list(contents(target))


def test_names_without_the_utf8_flag_are_read_as_utf8_where_all_are(target):
    data = zip_of([(RawName("Cat/Ä猫.jpg".encode()), b"1"), ("Dog/Ö犬.jpg", b"2"), ("Dog/1.jpg", b"3")])
    pack(data, target)
    assert target.read_bytes() == data
    assert contents(target) == {"Cat/Ä猫.jpg": b"1", "Dog/Ö犬.jpg": b"2", "Dog/1.jpg": b"3"}


def test_names_that_are_no_utf8_are_read_as_the_zip_standard_says(target):
    pack(zip_of([(RawName(b"Cat/K\x94ter.jpg"), b"1"), ("Dog/Ö.jpg", b"2"), (RawName(b"Cat/K\x99.jpg"), b"3")]), target)
    assert names(target) == ["Cat/Köter.jpg", "Dog/Ö.jpg", "Cat/KÖ.jpg"]


def unicode_path(legacy: bytes, name: str) -> bytes:
    field = struct.pack("<BI", 1, zlib.crc32(legacy)) + name.encode()
    return struct.pack("<HH", 0x7075, len(field)) + field


def test_unicode_name_beside_a_legacy_one_counts(target):
    # Legacy names for what an old code page lacks are equal: only the field tells the files apart.
    files = [("Cat/猫.jpg", b"1"), ("Cat/犬.jpg", b"2")]
    data = zip_of([(RawName(b"Cat/_.jpg", unicode_path(b"Cat/_.jpg", name)), content) for name, content in files])
    pack(data, target)
    assert contents(target) == dict(files)
    legacy = b"Cat/\x94.jpg"
    pack(zip_of([(RawName(legacy, unicode_path(legacy, "Cat/ő.jpg")), b"1")]), target)
    assert names(target) == ["Cat/ő.jpg"]
    stale = unicode_path(b"Cat/old.jpg", "Cat/old.jpg")
    pack(zip_of([(RawName(b"Cat/new.jpg", b"\x55\x54\x00\x00" + stale), b"1")]), target)
    assert names(target) == ["Cat/new.jpg"]


def test_unicode_name_that_leaves_the_archive_is_told(target):
    data = zip_of([(RawName(b"Cat/0.jpg", unicode_path(b"Cat/0.jpg", "../0.jpg")), b"1")])
    assert "leaves the archive: '../0.jpg'" in refused(data, target)


def test_name_flagged_as_utf8_that_is_not_is_told(target):
    data = zip_of({"Cat/Ä.jpg": b"1"}).replace("Ä".encode(), b"\xff\xff")
    assert "damaged zip archive" in refused(data, target)


def test_names_of_a_tar_that_are_no_utf8_are_kept_apart(target):
    files = {"Cat/\xf6.jpg": b"1", "Cat/\xe4.jpg": b"2"}
    pack(tar_of(files, format=tarfile.USTAR_FORMAT, encoding="latin-1"), target)
    assert contents(target) == {"Cat/\\xf6.jpg": b"1", "Cat/\\xe4.jpg": b"2"}


def test_names_that_differ_in_unicode_normalisation_only_stay_apart(target):
    files = {"Cat/\u00e9.jpg": b"1", "Cat/e\u0301.jpg": b"2"}
    for make in (zip_of, tar_of):
        pack(make(files), target)
        assert contents(target) == files


# --- links and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z"])
def test_link_or_device_in_a_tar_is_named(target, kind):
    data = tar_of([("Cat/0.jpg", b"1"), (tar_member("Dog/x.jpg", kind, "Cat/0.jpg"), b"")])
    assert "neither a file nor a folder: 'Dog/x.jpg'" in refused(data, target)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_link_or_device_in_a_zip_is_named(target, kind):
    data = zip_of([("Cat/0.jpg", b"1"), (zip_member("Dog/x.jpg", kind | 0o644), b"../../etc/passwd")])
    assert "neither a file nor a folder: 'Dog/x.jpg'" in refused(data, target)


def test_file_and_folder_modes_of_a_zip_are_no_links(target):
    pack(zip_of([(zip_member("Cat/", stat.S_IFDIR | 0o755), b""), (zip_member("Cat/0", stat.S_IFREG), b"1")]), target)
    assert contents(target) == {"Cat/0": b"1"}


def test_content_under_the_name_of_a_folder_is_told_not_lost(target):
    assert "neither a file nor a folder: 'Cat/'" in refused(zip_of({"Cat/": b"data"}), target)
    data = tar_of([(tar_member("Cat"), b"data")]).replace(b"Cat\0", b"Cat/", 1)
    member = bytearray(data)
    member[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    with pytest.raises(CatdogError, match="neither a file nor a folder"):
        pack(bytes(member), target)


def compressed_tar_of_zeros(members: int, megabytes: int) -> bytes:
    """A tar.gz of files full of zeros, a thousandth of their size."""
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as stream:
        for number in range(members):
            header = tar_member(f"Cat/{number}.jpg")
            header.size = megabytes << 20
            stream.write(header.tobuf())
            for _ in range(megabytes):
                stream.write(ZEROS)
        stream.write(bytes(1024))
    return buffer.getvalue()


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(archives, "BOMB_BYTES", 10 << 20)


def test_bombs_are_told_and_stopped(target, small_limits):
    assert "as a zip bomb does" in refused(zip_of({f"{n}.jpg": ZEROS for n in range(11)}), target)
    for megabytes in (1, 11):
        assert "as a zip bomb does" in refused(compressed_tar_of_zeros(12 // megabytes, megabytes), target)


def test_zeros_behind_the_end_of_a_compressed_tar_do_not_run_for_ever(target, small_limits):
    data = gzip.compress(tar_of({"Cat/0.jpg": b"1"}) + ZEROS * 11)
    assert "as a zip bomb does" in refused(data, target)


def test_bomb_of_holes_is_told_before_it_is_written(tmp_path, target, small_limits):
    resource = pytest.importorskip("resource")
    data = sparse_tar(tmp_path, 30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, hard))  # writing more fails, and not with a sentence
    try:
        assert "as a zip bomb does" in refused(data, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_much_that_compresses_little_and_little_that_compresses_much_are_no_bombs(target, small_limits, monkeypatch):
    blank = {f"Cat/{n}.jpg": ZEROS for n in range(9)}
    for data in (zip_of(blank), compressed_tar_of_zeros(9, 1)):
        pack(data, target)
        assert contents(target) == blank
    monkeypatch.setattr(archives, "BOMB_BYTES", 1000)
    assert pack(zip_of({"Cat/0.jpg": os.urandom(4000)}), target) == "zip"


def test_bomb_of_archives_in_an_archive_is_told(target, small_limits):
    inner = zip_of({f"{n}.jpg": ZEROS for n in range(4)})
    outer = zip_of({f"{n}.zip": inner for n in range(3)})
    assert "as a zip bomb does" in refused(outer, target)


def test_limits_are_those_that_are_meant():
    assert (archives.BOMB_BYTES, archives.BOMB_RATIO) == (10**9, 100)
    assert (archives.MAX_MEMBER_BYTES, archives.MAX_MEMBERS) == (4 * 10**9, 5 * 10**6)


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_absurd_member_and_absurd_count_are_told(target, monkeypatch, make):
    files = {"Cat/0.jpg": b"0" * 2000, "Cat/1.jpg": b"1" * 2001}
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2000)
    assert "'Cat/1.jpg'" in refused(make(files), target)
    # An archive in the archive may be as large as it likes.
    pack(make({"a.zip": zip_of({"Cat/0.jpg": os.urandom(2000)})}), target)
    target.unlink()
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2001)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1)
    assert "more than 1 members" in refused(make(files), target)


def test_tar_header_of_absurd_size_is_told_before_it_is_read(target):
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        header = tar_member("x", kind)
        header.size = 1 << 30
        assert "a header claims to have 1,073,741,824 bytes" in refused(
            tar_of({"a": b"1"})[:1024] + header.tobuf() + bytes(2048), target
        )


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_tar_header_with_a_negative_size_is_told_and_does_not_run_for_ever(target, kind):
    header = bytearray(tar_member("x", kind).tobuf())
    header[124:136] = (-512 & (1 << 96) - 1).to_bytes(12, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    assert "claims to have -512 bytes" in refused(tar_of({"a": b"1"})[:1024] + bytes(header) + bytes(2048), target)


def test_endless_chain_of_tar_headers_is_told(target):
    long_name = tar_member("x", tarfile.GNUTYPE_LONGNAME)
    long_name.size = 1
    link = long_name.tobuf() + b"n".ljust(512, b"\0")
    assert "damaged tar archive" in refused(tar_of({"a": b"1"})[:1024] + link * 2000 + bytes(1024), target)


def test_overlapping_members_of_a_zip_are_told(target):
    # Both entries of the directory point at the same kernel, as in the bombs that hold petabytes.
    data = edited(zip_of({"Cat/0.jpg": os.urandom(99), "Cat/1.jpg": os.urandom(99)}), 42, struct.pack("<I", 0), 1)
    assert "'Cat/0.jpg' overlaps" in refused(data, target)
    longer = zip_of({"Cat/0.jpg": os.urandom(99), "Cat/1.jpg": os.urandom(99)}, zipfile.ZIP_STORED)
    assert "'Cat/0.jpg' overlaps" in refused(edited(longer, 20, struct.pack("<II", 160, 160)), target)
    assert "'Cat/1.jpg' overlaps" in refused(edited(longer, 20, struct.pack("<II", 160, 160), 1), target)


@pytest.mark.parametrize("free", [1000, 5000])
def test_too_little_room_is_told_before_it_is_filled(target, monkeypatch, free):
    # At 5,000 bytes the archive fits, but not what it unpacks to.
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": free}))
    data = zip_of({"a\\0.jpg": bytes(100_000) + os.urandom(3000)})
    assert 1000 < len(data) < 5000
    with pytest.raises(CatdogError, match="MB free"):
        pack(data, target)
    assert list(target.parent.iterdir()) == []


# --- archives in archives --------------------------------------------------------------------------------------------


def test_kaggles_archive_of_archives_is_merged(target):
    train = {"train/cat.0.jpg": b"cat", "train/dog.0.jpg": b"dog"}
    test = {"test1/1.jpg": b"?", "test1/Thumbs.db": b"t"}
    outer = {"train.zip": zip_of({"train/": b""} | train), "test1.zip": zip_of(test), "sampleSubmission.csv": b"id"}
    assert pack(zip_of(outer), target) == "zip"
    assert contents(target) == train | test | {"sampleSubmission.csv": b"id"}


@pytest.mark.parametrize("outer", [zip_of, tar_of])
@pytest.mark.parametrize("inner", [zip_of, tar_of])
def test_any_archive_in_any_archive_is_merged(target, outer, inner):
    pack(
        outer({"wrapped/pets.TAR": inner(FILES), ".hidden.zip": b"no archive", "labels.csv.gz": b"no archive"}), target
    )
    assert contents(target) == FILES | {".hidden.zip": b"no archive", "labels.csv.gz": b"no archive"}


@pytest.mark.parametrize(
    ("one", "other", "first", "second"),
    [
        # parts of one tree
        (("p-1.zip", "Pets/Cat/0.jpg"), ("p-2.zip", "Pets/Dog/0.jpg"), "Pets/Cat/0.jpg", "Pets/Dog/0.jpg"),
        # names collide
        (("a.zip", "Cat/0.jpg"), ("b.tar", "Cat/0.jpg"), "a/Cat/0.jpg", "b/Cat/0.jpg"),
        # the archive is the class
        (("cats.zip", "0.jpg"), ("dogs.tar.gz", "1.jpg"), "cats/0.jpg", "dogs/1.jpg"),
        (("all/cats.tgz", "0.jpg"), ("all/dogs.zip", "0.jpg"), "all/cats/0.jpg", "all/dogs/0.jpg"),
        # the archive is the split
        (("train.zip", "Cat/0.jpg"), ("test.zip", "Cat/1.jpg"), "train/Cat/0.jpg", "test/Cat/1.jpg"),
        (("train.zip", "train/cat.0.jpg"), ("test1.zip", "test1/1.jpg"), "train/cat.0.jpg", "test1/1.jpg"),
        # hidden files do not count
        (("train.zip", "a/0.jpg", "__MACOSX/x"), ("test.zip", "b/0.jpg", "__MACOSX/y"), "a/0.jpg", "b/0.jpg"),
    ],
)
def test_name_of_an_inner_archive_counts_where_it_tells_what_names_do_not(target, one, other, first, second):
    def packed(name, *files):
        return (tar_of if "t" in Path(name).suffix + name[-3:-2] else zip_of)(dict.fromkeys(files, name.encode()))

    pack(zip_of({one[0]: packed(*one), other[0]: packed(*other)}), target)
    found = {name: data for name, data in contents(target).items() if "MACOSX" not in name}
    assert found == {first: one[0].encode(), second: other[0].encode()}


def test_own_file_that_collides_with_an_inner_one_is_kept(target):
    pack(zip_of({"notes.txt": b"outer", "a.zip": zip_of({"notes.txt": b"inner", "Cat/0.jpg": b"1"})}), target)
    assert contents(target) == {"notes.txt": b"outer", "a/notes.txt": b"inner", "a/Cat/0.jpg": b"1"}


def test_archive_beside_pictures_is_a_file(target):
    data = zip_of({"Cat/0.jpg": b"1", "extra.zip": zip_of(FILES)})
    pack(data, target)
    assert target.read_bytes() == data


def test_only_one_level_is_unpacked(target):
    deep = zip_of({"c.zip": zip_of(FILES)})
    pack(zip_of({"b.zip": deep}), target)
    assert contents(target) == {"c.zip": zip_of_contents(deep, "c.zip")}


def zip_of_contents(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name)


def test_renaming_follows_merging(target):
    outer = zip_of({"cats.zip": zip_of({"0.jpg": b"1"}), "dogs.zip": zip_of({"0.jpg": b"2"}), "x.csv": b""})
    pack(outer, target, rename=lambda name: f"all/{name}" if name.endswith(".jpg") else None)
    assert contents(target) == {"all/cats/0.jpg": b"1", "all/dogs/0.jpg": b"2"}


@pytest.mark.parametrize(
    ("inner", "told"),
    [
        (b"", "dataset = 'pets/in.zip' cannot be used: the file is empty"),
        (b"text" * 99, "dataset = 'pets/in.zip' is no archive"),
        (zip_of({"../x": b""}), "dataset = 'pets/in.zip' has a member that leaves the archive"),
        (
            tar_of([(tar_member("x", tarfile.SYMTYPE, "y"), b"")]),
            "dataset = 'pets/in.zip' has a member that is neither",
        ),
        (tar_of(FILES)[:2000], "dataset = 'pets/in.zip' is a damaged tar archive"),
    ],
)
@pytest.mark.parametrize("outer", [zip_of, tar_of])
def test_bad_archive_in_an_archive_is_named(target, outer, inner, told):
    assert refused(outer({"in.zip": inner}), target).startswith(told)


def test_more_archives_than_files_may_be_open_are_merged(target):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = {f"{number}.zip": zip_of({f"{number}/0.jpg": b"%d" % number}) for number in range(100)}
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + 50, hard), hard))
    try:
        pack(zip_of(files), target)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(contents(target)) == 100


# --- folders ---------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, files=FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def folder_refused(folder: Path, target: Path) -> str:
    with pytest.raises(CatdogError) as caught:
        pack_folder(folder, target)
    assert list(target.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_is_packed_whole_and_the_same_each_time(tmp_path, target):
    one, two = make_folder(tmp_path / "1"), make_folder(tmp_path / "2", dict(reversed(FILES.items())))
    (one / "Cat" / "0.jpg").chmod(0o400)
    os.utime(two / "Cat" / "0.jpg", (0, 0))
    packed = []
    for folder in (one, two):
        pack_folder(folder, target)
        assert contents(target) == FILES
        packed.append(target.read_bytes())
    assert packed[0] == packed[1]
    with open_archive(target) as archive:
        assert archive.namelist() == sorted(archive.namelist(), key=lambda name: Path(name).parts)


def test_links_to_files_and_folders_are_followed(tmp_path, target):
    folder = make_folder(tmp_path / "pets", {"Cat/0.jpg": b"0"})
    make_folder(tmp_path / "else", {"deep/9.jpg": b"9"})
    (folder / "Dog").symlink_to(tmp_path / "else")
    (folder / "Cat" / "1.jpg").symlink_to("0.jpg")
    (folder / "Bird").symlink_to("Dog")
    pack_folder(folder, target)
    assert contents(target) == {"Cat/0.jpg": b"0", "Cat/1.jpg": b"0", "Dog/deep/9.jpg": b"9", "Bird/deep/9.jpg": b"9"}


def test_links_that_lead_in_circles_or_nowhere_are_named(tmp_path, target):
    folder = make_folder(tmp_path / "pets", {"a/0.jpg": b"0", "b/1.jpg": b"1"})
    link = folder / "a" / "link"
    for where in (folder, folder / "a", tmp_path, Path("..")):
        link.symlink_to(where)
        assert f"link to a folder above itself: {link};" in folder_refused(folder, target)
        link.unlink()
    for where in ("nothing", "link"):
        link.symlink_to(where)
        assert f"link to nothing: {link};" in folder_refused(folder, target)
        link.unlink()
    link.symlink_to(folder / "b")
    (folder / "b" / "back").symlink_to(folder / "a")
    assert "link to a folder above itself" in folder_refused(folder, target)


def test_circle_is_found_where_the_folder_is_a_link_itself(tmp_path, target):
    folder = make_folder(tmp_path / "real" / "pets", {"Cat/0.jpg": b"0"})
    (tmp_path / "link").symlink_to(folder)
    (folder / "Cat" / "up").symlink_to(folder)
    assert "link to a folder above itself" in folder_refused(tmp_path / "link", target)


def test_what_is_no_file_is_named(tmp_path, target):
    folder = make_folder(tmp_path / "pets")
    os.mkfifo(folder / "pipe")
    assert f"no file: {folder / 'pipe'};" in folder_refused(folder, target)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path, target):
    folder = make_folder(tmp_path / "pets")
    for path in (folder / "Cat" / "0.jpg", folder / "Dog"):
        path.chmod(0)
        assert str(path) in folder_refused(folder, target)
        path.chmod(0o755)


def test_file_that_fails_while_it_is_read_is_named(tmp_path, target):
    if not Path("/proc/self/mem").exists():
        pytest.skip("no file here that fails to be read")
    folder = make_folder(tmp_path / "pets")
    (folder / "Cat" / "9.jpg").symlink_to("/proc/self/mem")
    assert f"cannot be read: {folder / 'Cat' / '9.jpg'} (Input/output error)" in folder_refused(folder, target)


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda path: path.write_bytes(b"more"), lambda path: path.write_bytes(b"")]
)
def test_file_that_changes_while_it_is_packed_is_named(tmp_path, target, monkeypatch, change):
    folder = make_folder(tmp_path / "pets", {"Cat/0.jpg": b"0", "Dog/1.jpg": b"1"})
    # The check for room lies between listing the files and reading them.
    monkeypatch.setattr(archives, "require_disk_space", lambda *_: change(folder / "Dog" / "1.jpg"))
    assert str(folder / "Dog" / "1.jpg") in folder_refused(folder, target)


def test_names_with_control_characters_in_a_folder_are_told(tmp_path, target):
    folder = make_folder(tmp_path / "pets", {"Cat/\x1b[2J.jpg": b"0"})
    told = folder_refused(folder, target)
    assert "control characters" in told
    assert told.isprintable()


def test_names_in_a_folder_that_are_no_utf8_are_kept_apart(tmp_path, target):
    folder = make_folder(tmp_path / "pets", {"Dog/1.jpg": b"1"})
    try:
        for number, byte in enumerate((b"\xf6", b"\xe4")):
            Path(os.fsdecode(os.fsencode(folder / "Dog") + b"/" + byte)).write_bytes(b"%d" % number)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    pack_folder(folder, target)
    assert contents(target) == {"Dog/1.jpg": b"1", "Dog/\\xe4": b"1", "Dog/\\xf6": b"0"}


# --- cost ------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_or_size_of_members(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    many = {f"Cat/{number}.jpg": b"x" for number in range(3000)}
    large = {f"Cat/{number}.jpg": bytes(10 << 20) for number in range(2)}
    target = tmp_path / "data" / "raw.zip"
    for files, limit in ((many, 3.5e6), (large, 8e6)):
        data = tar_of(files, "w:gz", compresslevel=1)
        (tmp_path / "source").write_bytes(data)
        del data
        tracemalloc.start()
        pack_archive(tmp_path / "source", target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit, f"{peak / 1e6:.1f} MB"


def test_opening_what_is_no_zip_is_one_sentence(tmp_path):
    for name, data in (("text", b"text" * 99), ("empty", b""), ("cut", zip_of(FILES)[:-30])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CatdogError, match="cannot be read as a zip archive"):
            open_archive(tmp_path / name)


def test_every_combination_of_flags_and_encodings_opens(tmp_path):
    raw = [b"Cat/plain.jpg", "Cat/Ä.jpg".encode(), b"Cat/\x8e.jpg"]
    for chosen in itertools.product(raw, ["Dog/plain.jpg", "Dog/犬.jpg"]):
        (tmp_path / "a.zip").write_bytes(zip_of([(RawName(chosen[0]), b"1"), (chosen[1], b"2")]))
        with open_archive(tmp_path / "a.zip") as archive:
            assert archive.namelist()[1] == chosen[1]
            assert [archive.read(name) for name in archive.namelist()] == [b"1", b"2"]
