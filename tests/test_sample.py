"""The drawn sample: the same bytes for the same seed, well-formed images, an archive that is whole or absent."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from catdog import sample
from catdog.errors import CatdogError
from catdog.sample import SAMPLE_CLASSES, draw_animal, write_sample
from conftest import wait_until

COUNT = 16
ENDLESS = """
import sys
from pathlib import Path
from catdog.sample import write_sample

write_sample(Path(sys.argv[1]), count=100_000, seed=1)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A small archive of seed 3; the tests only read it."""
    path = tmp_path_factory.mktemp("sample") / "sample.zip"
    write_sample(path, count=COUNT, seed=3)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_same_seed_gives_the_same_bytes(archive, tmp_path):
    again = tmp_path / "again.zip"
    write_sample(again, count=COUNT, seed=3)
    assert again.read_bytes() == archive.read_bytes()


def test_number_of_threads_does_not_change_a_pixel():
    before = cv2.getNumThreads()
    try:
        images = []
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            images.append(draw_animal("dog", np.random.default_rng(11)))
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(*images)


def test_smaller_count_gives_a_prefix_of_each_class(archive, tmp_path):
    small = tmp_path / "small.zip"
    write_sample(small, count=6, seed=3)
    whole, part = members(archive), members(small)
    assert len(part) == 6
    assert all(whole[name] == data for name, data in part.items())


def test_processes_draw_the_same(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_LEAST_FOR_PROCESSES", COUNT)
    write_sample(tmp_path / "sample.zip", count=COUNT, seed=3)
    assert (tmp_path / "sample.zip").read_bytes() == archive.read_bytes()


def test_process_that_dies_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sample, "_draw_one", os._exit)
    with pytest.raises(CatdogError, match=r"^one of \d+ processes died at its work; too little memory"):
        list(sample._draw_all([1] * 100))


def test_processes_do_not_outlive_a_first_one_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path / "sample.zip"]) as first:
        wait_until(lambda: (part := tmp_path / "sample.zip.part").exists() and part.stat().st_size)
        drawing = [one for one in psutil.Process(first.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        first.kill()
    assert drawing
    _, alive = psutil.wait_procs(drawing, timeout=60)
    for one in alive:
        one.kill()
    assert not alive


def test_different_seeds_give_different_images(archive, tmp_path):
    other = tmp_path / "other.zip"
    write_sample(other, count=6, seed=4)
    whole = members(archive)
    assert all(whole[name] != data for name, data in members(other).items())


def test_members_are_sorted_stored_balanced_and_undated(archive):
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        assert opened.testzip() is None
    names = [info.filename for info in infos]
    expected = [f"sample/{kind}/{kind}-{i:04d}.jpg" for kind in SAMPLE_CLASSES for i in range(1, COUNT // 2 + 1)]
    assert names == expected == sorted(names)
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}


def test_every_member_is_a_plain_jpeg_and_sizes_vary(archive):
    sizes = set()
    for data in members(archive).values():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.mode in ("RGB", "L")
            assert not image.getexif()
            assert all(120 <= side <= 700 for side in image.size)
            sizes.add(image.size)
    assert len(sizes) > COUNT // 2


@pytest.mark.parametrize("species", SAMPLE_CLASSES)
def test_drawing_is_a_colour_image_with_contrast(species):
    for seed in range(12):
        image = draw_animal(species, np.random.default_rng(seed))
        assert image.dtype == np.uint8
        assert image.ndim == 3 and image.shape[2] == 3
        assert image.std() > 5


@pytest.mark.parametrize("pose", sample._POSES)
@pytest.mark.parametrize("species", SAMPLE_CLASSES)
def test_every_pose_can_be_drawn(species, pose, monkeypatch):
    only = sample.Pose(pose.draw, 1.0, pose.box, pose.head)
    monkeypatch.setattr(sample, "_POSES", (only,))
    for seed in range(3):
        assert draw_animal(species, np.random.default_rng(seed)).size > 0


@pytest.mark.parametrize("scene", sample._SCENES)
def test_every_background_has_the_size_asked_for(scene):
    image = scene(np.random.default_rng(0), 90, 140)
    assert image.shape == (90, 140, 3)
    assert image.dtype == np.float32


@pytest.mark.parametrize("kind", ["fence", "leaves", "grass", "thing", "net"])
def test_every_occlusion_changes_the_image_even_near_the_border(kind, monkeypatch):
    monkeypatch.setattr(sample, "_choose", lambda rng, weights: kind)
    for x, y in ((70.0, 45.0), (139.0, 89.0)):
        image = np.full((90, 140, 3), 0.5, np.float32)
        subject = sample.Subject(np.array([x, y]), 80.0, np.array([x - 20, y - 30]), 15.0)
        sample._occlude(np.random.default_rng(1), image, subject)
        assert np.isfinite(image).all()
        assert (image != 0.5).any()


def test_a_share_of_the_files_is_greyscale(monkeypatch):
    image = draw_animal("cat", np.random.default_rng(0))
    monkeypatch.setattr(sample, "_GREY_SHARE", 1.0)
    with Image.open(io.BytesIO(sample._encode_jpeg(image, np.random.default_rng(0)))) as grey:
        assert grey.mode == "L"


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(species, rng):
        if species == "dog":
            raise RuntimeError("out of paint")
        return np.zeros((120, 120, 3), np.uint8)

    monkeypatch.setattr(sample, "draw_animal", fail)
    with pytest.raises(RuntimeError, match="out of paint"):
        write_sample(tmp_path / "sample.zip", count=4, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_success_leaves_only_the_archive(archive):
    assert [path.name for path in archive.parent.iterdir()] == ["sample.zip"]


def test_failure_keeps_the_archive_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "sample.zip"
    path.write_bytes(b"earlier")

    def fail(species, rng):
        raise RuntimeError("out of paint")

    monkeypatch.setattr(sample, "draw_animal", fail)
    with pytest.raises(RuntimeError):
        write_sample(path, count=2, seed=0)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_mistakes_are_told(tmp_path):
    with pytest.raises(CatdogError, match="horse"):
        draw_animal("horse", np.random.default_rng(0))
    with pytest.raises(CatdogError, match="count 1"):
        write_sample(tmp_path / "x.zip", count=1, seed=0)
    with pytest.raises(CatdogError, match="seed -1"):
        write_sample(tmp_path / "x.zip", seed=-1)
    assert list(tmp_path.iterdir()) == []
