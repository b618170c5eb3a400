"""Corruptions: as strong as ImageNet-C's, the same in every batch, and their table by hand."""

from collections import Counter

import cv2
import numpy as np
import pytest

from catdog.corruptions import (
    COLUMNS,
    CORRUPTIONS,
    collect_pictures,
    corrupt,
    corrupted_batches,
    corruption_table,
)
from catdog.images import decode_stored, encode_jpeg
from catdog.slices import sharpness, wilson_interval

BY_NAME = {(corruption.name, corruption.severity): corruption for corruption in CORRUPTIONS}
DRAWN = [key for key in BY_NAME if key[0] == "Gaussian noise"]
EVERY = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda one: f"{one.name} {one.severity}")


def pictures(count=3, size=224):
    """Shapes and texture of every scale, drawn."""
    random = np.random.default_rng(4)
    layers = [random.integers(0, 64, (count, side, side, 3), np.uint8) for side in (4, 16, 64)]
    grown = [
        np.stack([cv2.resize(one, (size, size), interpolation=cv2.INTER_LINEAR) for one in layer]) for layer in layers
    ]
    return sum(grown).astype(np.uint8) + random.integers(0, 64, (count, size, size, 3), np.uint8)


def damaged(name, severity, pixels, seed=1):
    return corrupt(pixels, BY_NAME[name, severity], [f"{number}.jpg" for number in range(len(pixels))], seed)


def plain(value, size=224):
    return np.full((1, size, size, 3), value, np.uint8)


def test_every_corruption_has_its_severities():
    found = Counter(name for name, _ in BY_NAME)
    assert len(BY_NAME) == len(CORRUPTIONS) == 20
    assert found.pop("horizontal flip") == found.pop("vertical flip") == 1
    assert set(found) == {"JPEG compression", "Gaussian blur", "Gaussian noise", "brighter", "darker", "centre crop"}
    assert {severity for name, severity in BY_NAME if name in found} == {1, 3, 5}
    assert all(count == 3 for count in found.values())
    assert len({corruption.description for corruption in CORRUPTIONS}) == 20


@EVERY
def test_pictures_stay_pictures_and_the_originals_as_they_were(corruption):
    for height, width in ((224, 224), (120, 170)):
        pixels = pictures(2)[:, :height, :width]
        before = pixels.copy()
        found = corrupt(pixels, corruption, ["a", "b"], 1)
        assert found.dtype == np.uint8
        assert found.shape == pixels.shape
        assert (found != pixels).any()
        assert (pixels == before).all()


@EVERY
def test_batch_does_not_matter(corruption):
    pixels, paths = pictures(4, 64), ["a/1.jpg", "a/2.jpg", "b/é.jpg", "4"]
    whole = corrupt(pixels, corruption, paths, 7)
    backwards = corrupt(pixels[::-1], corruption, paths[::-1], 7)[::-1]
    alone = np.concatenate([corrupt(pixels[n : n + 1], corruption, paths[n : n + 1], 7) for n in range(4)])
    assert (whole == backwards).all()
    assert (whole == alone).all()


@pytest.mark.parametrize("key", DRAWN, ids=str)
def test_noise_depends_on_path_and_seed(key):
    same = np.concatenate([plain(128, 32)] * 3)
    one = corrupt(same, BY_NAME[key], ["a", "b", "a"], 1)
    assert (one[0] == one[2]).all()
    assert (one[0] != one[1]).mean() > 0.9
    assert (corrupt(same, BY_NAME[key], ["a", "b", "a"], 2)[0] != one[0]).mean() > 0.9


@EVERY
def test_only_noise_draws(corruption):
    pixels = pictures(1, 64)
    same = (corrupt(pixels, corruption, ["a"], 1) == corrupt(pixels, corruption, ["b"], 2)).all()
    assert same == (corruption.name != "Gaussian noise")


@pytest.mark.parametrize("name", ["JPEG compression", "Gaussian blur", "Gaussian noise", "brighter", "darker"])
def test_higher_severity_changes_more(name):
    pixels = pictures().astype(int)
    changes = [np.abs(damaged(name, s, pixels.astype(np.uint8)) - pixels).mean() for s in (1, 3, 5)]
    assert 0.5 < changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (3, 0.18), (5, 0.38)])
def test_noise_has_the_published_deviation(severity, deviation):
    found = damaged("Gaussian noise", severity, plain(128))[0].astype(float)
    # What clipping at 0 and 255 leaves of a normal distribution is worked out from many draws.
    draws = np.random.default_rng(0).normal(128, deviation * 255, 1_000_000)
    assert found.std() == pytest.approx(np.clip(draws, 0, 255).std(), rel=0.01)
    assert found.mean() == pytest.approx(128, abs=1)
    # Each pixel and each colour has its own.
    assert abs(np.corrcoef(found[..., 0].ravel(), found[..., 1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(found[:, :-1, 0].ravel(), found[:, 1:, 0].ravel())[0, 1]) < 0.02


def test_noise_of_all_severities_is_one_pattern():
    weak, strong = (damaged("Gaussian noise", severity, plain(128))[0].astype(int) - 128 for severity in (1, 5))
    inside = np.abs(strong) < 120
    assert np.allclose(weak[inside], strong[inside] * 0.08 / 0.38, atol=0.7)


@pytest.mark.parametrize(("severity", "sigma"), [(1, 1), (3, 3), (5, 6)])
@pytest.mark.parametrize("size", [224, 448, 112])
def test_blur_spreads_a_point_as_the_size_asks(severity, sigma, size):
    # An edge becomes the normal distribution function: it crosses 84 % one standard deviation past its middle.
    edge = np.zeros((1, size, size, 3), np.uint8)
    edge[:, :, size // 2 :] = 255
    row = damaged("Gaussian blur", severity, edge)[0, size // 2, :, 0].astype(float)
    places = np.interp([0.1587 * 255, 0.8413 * 255], row, np.arange(size))
    assert np.diff(places) / 2 == pytest.approx(sigma * size / 224, rel=0.12, abs=0.1)


def test_blur_keeps_plain_colours_up_to_the_border():
    assert (damaged("Gaussian blur", 5, plain(201)) == 201).all()


@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (3, 15), (5, 7)])
def test_compression_is_a_jpeg_of_that_quality(severity, quality):
    pixels = pictures(1)
    assert (damaged("JPEG compression", severity, pixels)[0] == decode_stored(encode_jpeg(pixels[0], quality))).all()


@pytest.mark.parametrize(("severity", "amount"), [(1, 0.1), (3, 0.3), (5, 0.5)])
@pytest.mark.parametrize(("name", "sign"), [("brighter", 1), ("darker", -1)])
def test_brightness_moves_the_value_and_keeps_the_hue(severity, amount, name, sign):
    pixels = pictures(1)
    found = damaged(name, severity, pixels)
    before, after = (cv2.cvtColor((one[0] / 255).astype(np.float32), cv2.COLOR_RGB2HSV) for one in (pixels, found))
    expected = np.clip(before[..., 2] + sign * amount, 0, 1)
    assert np.abs(after[..., 2] - expected).max() <= 0.5 / 255 + 1e-6
    bright = (after[..., 2] > 0.3) & (before[..., 1] > 0.2)
    assert bright.any()
    assert np.abs(after[..., 1] - before[..., 1])[bright].max() < 0.02
    turn = np.abs(after[..., 0] - before[..., 0])[bright]
    assert np.minimum(turn, 360 - turn).max() < 8


def test_black_and_white_at_the_ends():
    assert (damaged("brighter", 5, plain(255)) == 255).all()
    assert (damaged("darker", 5, plain(127)) == 0).all()
    assert (damaged("darker", 5, plain(0)) == 0).all()
    assert np.unique(damaged("brighter", 1, plain(0))).tolist() in ([25], [26])
    # Nearly black is as bright as black.
    assert np.unique(damaged("brighter", 1, plain(1))).tolist() in ([26], [27])


@pytest.mark.parametrize(("severity", "kept"), [(1, 202), (3, 168), (5, 112)])
def test_crop_shows_the_middle_enlarged(severity, kept):
    ramp = np.zeros((1, 224, 224, 3), np.uint8)
    ramp[0, :, :, 0] = np.arange(224)
    ramp[0, :, :, 1] = np.arange(224)[:, None]
    found = damaged("centre crop", severity, ramp)[0].astype(int)
    edge = (224 - kept) / 2
    for channel, line in ((0, found[100, :, 0]), (1, found[:, 100, 1])):
        assert line[0] == pytest.approx(edge, abs=1), channel
        assert line[-1] == pytest.approx(223 - edge, abs=1), channel
        assert np.abs(line - np.linspace(edge, 223 - edge, 224)).max() < 1.1


def test_crop_is_interpolated():
    edge = plain(0)
    edge[:, :, 112:] = 200
    row = damaged("centre crop", 5, edge)[0, 100, :, 0]
    assert row[:111].tolist() == [0] * 111
    assert row[111:113].tolist() == [50, 150]
    assert row[113:].tolist() == [200] * 111


def test_flips_turn_the_right_way_and_back():
    pixels = pictures(1)
    assert (damaged("horizontal flip", 1, pixels) == pixels[:, :, ::-1]).all()
    assert (damaged("vertical flip", 1, pixels) == pixels[:, ::-1]).all()


def test_blurred_pictures_are_measured_as_less_sharp():
    pixels = pictures()
    assert (sharpness(damaged("Gaussian blur", 1, pixels)) < sharpness(pixels)).all()


def in_batches(pixels, size):
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]


@pytest.mark.parametrize("size", [1, 3, 7, 20])
@pytest.mark.parametrize("positions", [[0], [19], [0, 1, 2, 3], [2, 9, 10, 17], list(range(20))], ids=str)
def test_chosen_pictures_are_picked_from_the_stream(size, positions):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    found = collect_pictures(in_batches(pixels, size), np.array(positions))
    assert (found == pixels[positions]).all()


def test_stream_is_read_no_further_than_needed():
    batches = in_batches(np.zeros((20, 2, 2, 3), np.uint8), 5)
    collect_pictures(batches, np.array([1, 6]))
    assert len(list(batches)) == 2


def test_stream_that_ends_early_is_a_defect():
    with pytest.raises(ValueError, match="picture 20 is chosen, but there are only 20"):
        collect_pictures(in_batches(np.zeros((20, 2, 2, 3), np.uint8), 6), np.array([3, 20]))
    with pytest.raises(ValueError, match="no pictures are chosen"):
        collect_pictures([], np.empty(0, np.int64))


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_batches_of_damaged_pictures_are_the_same_whatever_their_size(size):
    pixels, paths = pictures(5, 48), list("abcde")
    corruption = BY_NAME["Gaussian noise", 3]
    found = list(corrupted_batches(pixels, paths, corruption, seed=9, batch_size=size))
    assert [len(batch) for batch in found] == [len(batch) for batch in in_batches(pixels, size)]
    assert (np.concatenate(found) == corrupt(pixels, corruption, paths, 9)).all()


def right(count, images=10):
    return np.arange(images) < count


def test_table_compares_with_the_undamaged_pictures():
    table = corruption_table(right(8), {("darker", 3): right(5), ("blur", 1): right(9)})
    assert list(table.columns) == list(COLUMNS)
    assert table["corruption"].tolist() == ["none", "darker", "blur"]
    assert table["severity"].tolist() == [0, 3, 1]
    assert table["images"].tolist() == [10] * 3
    assert table["accuracy"].tolist() == [0.8, 0.5, 0.9]
    assert table["lost"].tolist() == [0, 0.3, -0.1]
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx(wilson_interval(5, 10), abs=1e-6)
    assert table.to_csv(index=False).splitlines()[1].startswith("none,0,10,0.8,")


def test_table_without_images_has_only_its_head():
    nothing = np.empty(0, bool)
    assert corruption_table(nothing, {("blur", 1): nothing}).to_csv(index=False).strip() == ",".join(COLUMNS)
    assert corruption_table(nothing, {}).empty


def test_table_of_unequal_numbers_is_a_defect():
    with pytest.raises(ValueError, match="10 undamaged pictures, but 9 of blur, severity 1"):
        corruption_table(right(8), {("blur", 1): right(5, images=9)})
