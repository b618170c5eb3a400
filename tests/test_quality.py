"""What is known about each file: decodable or not and why, and which files show the same picture."""

import hashlib
import io
import tracemalloc
import warnings
import zipfile
from itertools import combinations

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from catdog.errors import CatdogError
from catdog.images import ImageError
from catdog.labels import label_files
from catdog.quality import (
    HASH_BITS,
    REJECTED_COLUMNS,
    group_duplicates,
    inspect,
    inspect_archive,
    perceptual_hash,
    require_mostly_accepted,
)
from catdog.sample import draw_animal


def jpeg(pixels: np.ndarray, quality=90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def hash_of(pixels: np.ndarray) -> str:
    return perceptual_hash(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Pictures like photographs; the tests only read them."""
    return [draw_animal(("cat", "dog")[seed % 2], np.random.default_rng(seed)) for seed in range(8)]


def test_hash_is_128_bits_in_hexadecimal(photos):
    digits = hash_of(photos[0])
    assert len(digits) * 4 == HASH_BITS == 128
    assert int(digits, 16) >= 0


def test_hash_of_a_rise_is_all_ones_and_of_a_constant_all_zeros():
    across = np.repeat(np.tile(np.arange(0, 180, 2, dtype=np.uint8), (90, 1))[..., None], 3, axis=2)
    assert hash_of(across) == "f" * 16 + "0" * 16
    assert hash_of(np.ascontiguousarray(across.transpose(1, 0, 2))) == "0" * 16 + "f" * 16
    assert hash_of(np.ascontiguousarray(across[:, ::-1])) == "0" * 32
    assert hash_of(np.full((40, 50, 3), 9, np.uint8)) == "0" * 32


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.5])
@pytest.mark.parametrize("quality", [50, 95])
def test_hash_hardly_moves_when_a_picture_is_rescaled_and_compressed_again(photos, scale, quality):
    moved = []
    for photo in photos:
        scaled = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        again = np.asarray(Image.open(io.BytesIO(jpeg(scaled, quality))))
        moved.append(distance(hash_of(photo), hash_of(again)))
    assert max(moved) <= 8
    assert np.median(moved) <= 4  # the default of split.near_duplicate_bits


def test_hash_hardly_moves_when_brightness_changes_a_little(photos):
    for photo in photos:
        darker = (photo * 0.9).astype(np.uint8)
        assert distance(hash_of(photo), hash_of(darker)) <= 8


def test_hashes_of_different_pictures_are_far_apart(photos):
    hashes = [hash_of(photo) for photo in photos]
    apart = [distance(one, other) for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(apart) > 16  # the largest split.near_duplicate_bits
    mirrored = [hash_of(np.ascontiguousarray(photo[:, ::-1])) for photo in photos]
    assert min(distance(one, other) for one, other in zip(hashes, mirrored, strict=True)) > 16


def brute_force(sha256: list[str], hashes: list[str], max_bits: int) -> list[int]:
    """The definition, pair by pair: the first member of each group."""
    group = list(range(len(sha256)))
    for one in range(len(sha256)):
        for other in range(one):
            if sha256[one] == sha256[other] or distance(hashes[one], hashes[other]) <= max_bits:
                old, new = max(group[one], group[other]), min(group[one], group[other])
                group = [new if value == old else value for value in group]
    return group


def near_hashes(rng: np.random.Generator, count: int) -> list[str]:
    """Hashes around a few centres, so that many pairs lie just below and just above every limit."""
    centres = rng.integers(0, 2, (5, HASH_BITS), dtype=np.uint8)
    found = []
    for _ in range(count):
        bits = centres[rng.integers(len(centres))].copy()
        bits[rng.choice(HASH_BITS, rng.integers(0, 14), replace=False)] ^= 1
        found.append(np.packbits(bits).tobytes().hex())
    return found


@pytest.mark.parametrize("max_bits", [-1, 0, 1, 2, 4, 7, 11, 16])
def test_groups_are_those_of_comparing_every_pair(max_bits):
    sizes = set()
    for seed in range(12):
        rng = np.random.default_rng([seed, max_bits + 1])
        hashes = near_hashes(rng, int(rng.integers(1, 60)))
        sha256 = [f"{number:02x}" for number in rng.integers(0, 50, len(hashes))]
        groups = group_duplicates(sha256, hashes, max_bits)
        assert groups.tolist() == brute_force(sha256, hashes, max_bits)
        sizes.add(len(set(groups.tolist())))
    assert len(sizes) > 1


def test_groups_form_from_neighbour_to_neighbour():
    steps = [f"{(1 << 4 * number) - 1:032x}" for number in range(6)]  # each 4 bits from the next
    assert group_duplicates(list("abcdef"), steps, 4).tolist() == [0] * 6
    assert group_duplicates(list("abcdef"), steps, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert group_duplicates(list("abcdaf"), steps, 3).tolist() == [0, 1, 2, 3, 0, 5]


def test_equal_bytes_and_near_hashes_join_in_one_chain():
    hashes = ["0" * 32, "f" * 32, "f" * 31 + "e"]
    assert group_duplicates(["a", "a", "b"], hashes, 1).tolist() == [0, 0, 0]
    assert group_duplicates(["a", "a", "b"], hashes, 0).tolist() == [0, 0, 2]
    assert group_duplicates(["a", "a", "b"], hashes, -1).tolist() == [0, 0, 2]


def test_minus_one_ignores_the_hashes():
    assert group_duplicates(["a", "b", "c"], ["0" * 32] * 3, -1).tolist() == [0, 1, 2]
    assert group_duplicates(["a", "b", "c"], ["0" * 32] * 3, 0).tolist() == [0, 0, 0]


def test_thousands_of_equal_hashes_are_one_group():
    count = 5000
    groups = group_duplicates([str(number) for number in range(count)], ["0" * 32] * count, 4)
    assert not groups.any()


def test_pictures_that_are_all_near_each_other_do_not_fill_the_memory():
    # Each differs from the first in one or two bits, so any two in at most four: three million pairs, 50 MB a copy.
    flipped = [*combinations(range(HASH_BITS), 2)][:2500]
    hashes = [f"{1 << one | 1 << other:032x}" for one, other in flipped]
    tracemalloc.start()
    groups = group_duplicates([str(number) for number in range(2500)], hashes, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not groups.any()
    assert peak < 250e6


@pytest.mark.parametrize("at_once", [1, 7, 300])
def test_groups_do_not_depend_on_how_many_pairs_are_held_at_a_time(monkeypatch, at_once):
    hashes = near_hashes(np.random.default_rng(8), 120)
    sha256 = [str(number) for number in range(120)]
    monkeypatch.setattr("catdog.quality._AT_ONCE", at_once)
    for max_bits in (2, 7, 11):
        assert group_duplicates(sha256, hashes, max_bits).tolist() == brute_force(sha256, hashes, max_bits)


@pytest.mark.parametrize("max_bits", [-1, 0, 4])
def test_no_pictures_give_no_groups(max_bits):
    assert group_duplicates([], [], max_bits).tolist() == []


def test_inspection_measures_the_picture(photos):
    data = jpeg(photos[0])
    found = inspect(data, max_pixels=1e6)
    assert (found.height, found.width) == photos[0].shape[:2]
    assert found.bytes == len(data)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.perceptual_hash == hash_of(np.asarray(Image.open(io.BytesIO(data))))
    assert found.note == ""
    assert inspect(data[: len(data) * 2 // 3], max_pixels=1e6).note == "ends early"


def test_inspection_counts_pixels_upright(photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(photos[0][:40, :70]).save(buffer, "JPEG", exif=exif.tobytes())
    found = inspect(buffer.getvalue(), max_pixels=1e6)
    assert (found.width, found.height) == (40, 70)


def test_inspection_refuses_what_shows_no_picture(photos):
    with pytest.raises(ImageError, match="empty"):
        inspect(b"", max_pixels=1e6)
    with pytest.raises(ImageError, match="limit"):
        inspect(jpeg(photos[0]), max_pixels=10)


def pack(path, files: dict[str, bytes], method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def inspected(path, **options) -> tuple[pd.DataFrame, pd.DataFrame]:
    with zipfile.ZipFile(path) as archive:
        labelling = label_files(archive.namelist())
        return inspect_archive(archive, labelling, **{"max_pixels": 1e7, "workers": 4, **options})


def damage(path, name: str, *, offset: float = 0.5, count: int = 20) -> None:
    """Flips bytes inside a member's data, as a bad disk does."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
    whole = bytearray(path.read_bytes())
    start = member.header_offset + 30 + len(name.encode()) + int(member.compress_size * offset)
    whole[start : start + count] = bytes(value ^ 0xFF for value in whole[start : start + count])
    path.write_bytes(whole)


def test_one_broken_file_of_each_kind_stops_nothing(photos, tmp_path):
    good = {f"{kind}/{number}.jpg": jpeg(photos[number]) for number, kind in enumerate(["cat", "dog", "cat", "dog"])}
    huge = io.BytesIO()
    Image.new("1", (4000, 4000)).save(huge, "PNG")
    broken = {
        "cat/empty.jpg": b"",
        "cat/text.jpg": b"no picture",
        "dog/Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
        "dog/huge.png": huge.getvalue(),
        "dog/.hidden": b"123",
        "readme.txt": b"words",
    }
    accepted, rejected = inspected(pack(tmp_path / "raw.zip", {**broken, **good}))
    assert accepted["path"].tolist() == sorted(good)
    assert accepted["label"].tolist() == ["cat", "cat", "dog", "dog"]
    assert [(row.width, row.height) for row in accepted.itertuples()] == [photos[n].shape[1::-1] for n in (0, 2, 1, 3)]
    assert list(rejected.columns) == REJECTED_COLUMNS
    assert rejected["path"].tolist() == sorted(broken)
    told = rejected.set_index("path")
    assert told["bytes"].to_dict() == {name: len(data) for name, data in broken.items()}
    labels = {name: name.split("/")[0] if "/" in name else "" for name in broken}
    assert told["label"].to_dict() == labels | {"dog/.hidden": "", "dog/Thumbs.db": ""}
    assert told.loc["cat/empty.jpg", "reason"] == "empty file (0 bytes)"
    assert told.loc["cat/text.jpg", "reason"] == "not an image"
    assert "4000x4000 pixels" in told.loc["dog/huge.png", "reason"]
    assert told.loc["dog/.hidden", "reason"] == told.loc["dog/Thumbs.db", "reason"] == "hidden file"
    assert told.loc["readme.txt", "reason"] == "outside any class folder"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("offset", [0, 0.5])
def test_damage_in_the_archive_rejects_one_file(photos, tmp_path, method, offset):
    files = {f"{kind}/{number}.jpg": jpeg(photos[number]) for number, kind in enumerate(["cat", "dog", "cat", "dog"])}
    path = pack(tmp_path / "raw.zip", files, method)
    damage(path, "dog/1.jpg", offset=offset)
    accepted, rejected = inspected(path)
    assert accepted["path"].tolist() == ["cat/0.jpg", "cat/2.jpg", "dog/3.jpg"]
    assert rejected["path"].tolist() == ["dog/1.jpg"]
    assert rejected["reason"].item().startswith("damaged in the archive")
    assert rejected["bytes"].item() == len(files["dog/1.jpg"])


def test_damaged_local_header_rejects_one_file(photos, tmp_path):
    path = pack(tmp_path / "raw.zip", {"cat/0.jpg": jpeg(photos[0]), "dog/1.jpg": jpeg(photos[1])})
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"dog/1.jpg")] ^= 0xFF
    path.write_bytes(whole)
    accepted, rejected = inspected(path)
    assert accepted["path"].tolist() == ["cat/0.jpg"]
    assert rejected["reason"].item().startswith("damaged in the archive")


def test_archive_without_a_broken_file_has_an_empty_table_of_them(photos, tmp_path):
    accepted, rejected = inspected(
        pack(tmp_path / "raw.zip", {"cat/0.jpg": jpeg(photos[0]), "dog/1.jpg": jpeg(photos[1])})
    )
    assert len(accepted) == 2
    assert list(rejected.columns) == REJECTED_COLUMNS
    assert rejected.empty


def test_number_of_workers_changes_nothing(photos, tmp_path):
    files = {f"{kind}/{number}.jpg": jpeg(photos[number]) for number in range(6) for kind in ("cat", "dog")}
    path = pack(tmp_path / "raw.zip", {**files, "cat/x.jpg": b"x", "dog/y.jpg": b""})
    for one, four in zip(inspected(path, workers=1), inspected(path, workers=4), strict=True):
        pd.testing.assert_frame_equal(one, four)


def rejections(count: int) -> pd.DataFrame:
    reasons = ["not an image"] * (count - 1) + ["empty file (0 bytes)"] * min(count, 1)
    return pd.DataFrame({"path": "x", "label": "", "reason": reasons, "bytes": 0}, columns=REJECTED_COLUMNS)


@pytest.mark.parametrize(
    ("accepted", "rejected", "share"), [(95, 5, 0.05), (10, 0, 0), (0, 3, 1), (0, 0, 0), (1, 1, 0.5)]
)
def test_share_of_rejected_files_up_to_the_limit_is_accepted(accepted, rejected, share):
    require_mostly_accepted(accepted, rejections(rejected), share)


@pytest.mark.parametrize(("accepted", "rejected", "share"), [(94, 6, 0.05), (10**6, 1, 0), (1, 3, 0.5)])
def test_more_rejected_files_than_the_limit_stop_the_run(accepted, rejected, share):
    with pytest.raises(CatdogError) as caught:
        require_mostly_accepted(accepted, rejections(rejected), share)
    told = str(caught.value)
    assert f"{rejected} of {accepted + rejected:,} files" in told
    assert f"split.max_rejected = {share:g}" in told
    assert "reports/rejected.csv" in told


def test_commonest_reason_is_told():
    with pytest.raises(CatdogError, match="mostly: not an image, 5 times"):
        require_mostly_accepted(2, rejections(6), 0.1)


@pytest.mark.parametrize("reason", ["hidden file", "not listed in split.file", "excluded", "excluded: blurred"])
def test_what_is_no_defect_of_the_data_does_not_count(reason):
    left_out = rejections(500).assign(reason=reason)
    require_mostly_accepted(95, pd.concat([left_out, rejections(5)]), 0.05)
    with pytest.raises(CatdogError, match="6 of 100 files"):
        require_mostly_accepted(94, pd.concat([left_out, rejections(6)]), 0.05)


def test_inspection_measures_colours_and_brightness():
    grey = io.BytesIO()
    Image.new("L", (40, 20), 200).save(grey, "PNG")
    found = inspect(grey.getvalue(), max_pixels=1e6)
    assert (found.width, found.height, found.format, found.mode, found.brightness) == (40, 20, "PNG", "L", 200.0)
    black_and_white = np.zeros((20, 20, 3), np.uint8)
    black_and_white[:10] = 255
    found = inspect(jpeg(black_and_white, 100), max_pixels=1e6)
    assert (found.format, found.mode) == ("JPEG", "RGB") and abs(found.brightness - 127.5) < 1


def test_earlier_files_of_the_same_name_are_listed(photos, tmp_path):
    path = tmp_path / "raw.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, number in [("cat/1.jpg", 0), ("dog/1.jpg", 1), ("cat/1.jpg", 2)]:
            archive.writestr(name, jpeg(photos[number]))
    accepted, rejected = inspected(path)
    assert accepted["sha256"].tolist() == [hashlib.sha256(jpeg(photos[n])).hexdigest() for n in (2, 1)]
    assert rejected[["path", "reason", "bytes"]].values.tolist() == [
        ["cat/1.jpg", "a later file in the archive has the same name", len(jpeg(photos[0]))]
    ]


def test_near_pairs_equal_brute_force_at_any_distance():
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2, (60, 128))
    bits = np.concatenate([bits, *(bits ^ (rng.random((60, 128)) < p) for p in (0.01, 0.05, 0.1, 0.15))])
    hashes = [np.packbits(row).tobytes().hex() for row in bits]
    for max_bits in (0, 1, 4, 9, 16):
        groups = group_duplicates([str(i) for i in range(300)], hashes, max_bits)
        near = [(i, j) for i in range(300) for j in range(i) if (bits[i] != bits[j]).sum() <= max_bits]
        expected = np.arange(300)
        for _ in range(300):
            before = expected.copy()
            for i, j in near:
                expected[i] = expected[j] = min(expected[i], expected[j])
            if (before == expected).all():
                break
        assert groups.tolist() == expected.tolist()
