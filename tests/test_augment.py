"""Varied copies: what each amount does to a picture, within which bounds, and from the seed alone."""

import functools
import importlib.util
import io
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from catdog.augment import augmented, build_augmentation, require_variation, reseed, write_preview
from catdog.config import AugmentParams
from catdog.errors import CatdogError
from catdog.records import ImageRow, encode_record, plan_shards, shard_paths, write_index, write_shard

SIZE = 65
MIDDLE = SIZE // 2
NOTHING = {"flip": "none"} | dict.fromkeys(
    ("rotation", "zoom", "shear", "translation", "brightness", "contrast", "saturation"), 0.0
)
COUNT = 64


def only(**amounts):
    """Parameters that vary nothing else."""
    return AugmentParams(**(NOTHING | amounts))


def vary(pixels, params, *key):
    return augmented(pixels, build_augmentation(params, pixels.shape[1], 0), key or (1,))


def spot(x, y):
    """So many pictures, each with a soft bright spot at this place, measured from the middle."""
    down, across = np.mgrid[:SIZE, :SIZE] - MIDDLE
    light = 250 * np.exp(-((across - x) ** 2 + (down - y) ** 2) / 18)
    return np.repeat(light[None, :, :, None], 3, axis=3).repeat(COUNT, axis=0).astype(np.uint8)


def places(pixels):
    """Where the spot is in each picture, measured from the middle: x and y, float [pictures]."""
    light = pixels[..., 0].astype(float)
    light[light < 30] = 0  # not what the mirrored border shows of it
    down, across = np.mgrid[:SIZE, :SIZE] - MIDDLE
    total = light.sum(axis=(1, 2))
    return (light * across).sum(axis=(1, 2)) / total, (light * down).sum(axis=(1, 2)) / total


def photographs(count=COUNT, size=SIZE):
    """Pictures with every value from 0 to 255, no two alike."""
    noise = np.random.default_rng(3).integers(0, 256, (count, 9, 9, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(tile).resize((size, size), Image.Resampling.BICUBIC)) for tile in noise]
    )


def assert_reaches(values, bound, *, slack):
    """Values fill the range from -bound to bound, and none is outside."""
    assert np.abs(values).max() <= bound + slack
    assert values.max() > 0.75 * bound
    assert values.min() < -0.75 * bound
    assert len(np.unique(np.round(values, 3))) > COUNT // 4


@pytest.mark.parametrize(("flip", "axes"), [("horizontal", [(), (2,)]), ("vertical", [(), (1,)])])
def test_flip_mirrors_about_half_of_the_pictures(flip, axes):
    pixels = photographs()
    result = vary(pixels, only(flip=flip))
    kinds = [[np.array_equal(result[i], np.flip(pixels, axis)[i]) for axis in axes] for i in range(COUNT)]
    assert (np.sum(kinds, axis=1) == 1).all()
    assert 0.25 < np.mean(kinds, axis=0)[1] < 0.75


def test_flip_both_gives_all_four():
    pixels = photographs()
    result = vary(pixels, only(flip="both"))
    mirrored = [np.flip(pixels, axes) for axes in ((), (1,), (2,), (1, 2))]
    kinds = np.array([[np.array_equal(result[i], one[i]) for one in mirrored] for i in range(COUNT)])
    assert (kinds.sum(axis=1) == 1).all()
    assert (kinds.mean(axis=0) > 0.08).all()


def test_rotation_turns_around_the_middle_up_to_its_share_of_a_full_turn():
    x, y = places(vary(spot(18, 0), only(rotation=0.1)))
    assert np.abs(np.hypot(x, y) - 18).max() < 0.5
    assert_reaches(np.degrees(np.arctan2(y, x)), 36, slack=1)


def test_zoom_goes_closer_and_farther_up_to_its_share():
    x, y = places(vary(spot(15, 10), only(zoom=0.3)))
    # A spot at 15 that is seen at x was looked up at x * zoom.
    assert np.abs(15 / x - 10 / y).max() < 0.05
    assert_reaches(15 / x - 1, 0.3, slack=0.02)


def test_shear_slides_a_row_by_its_share_of_the_distance_from_the_middle():
    x, y = places(vary(spot(0, 16), only(shear=0.5)))
    assert np.abs(y - 16).max() < 0.4
    assert_reaches(x, 8, slack=0.4)
    assert np.abs(np.concatenate(places(vary(spot(0, 0), only(shear=0.5))))).max() < 0.2


def test_translation_moves_up_to_its_share_of_the_side_in_both_directions():
    x, y = places(vary(spot(0, 0), only(translation=0.2)))
    for shift in (x, y):
        assert_reaches(shift, 0.2 * SIZE, slack=0.2)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.5


def test_movements_are_drawn_apart():
    x, y = places(vary(spot(14, 0), only(rotation=0.1, zoom=0.2)))
    assert abs(np.corrcoef(np.arctan2(y, x), 14 / np.hypot(x, y))[0, 1]) < 0.5


def test_several_movements_at_once_are_one_interpolation():
    """Half a pixel's blur, not four times: sharp edges stay as sharp as after a single movement."""
    across = np.arange(SIZE)
    stripes = np.where((across // 4) % 2 == 0, 0, 255).astype(np.uint8)
    pixels = np.broadcast_to(stripes[None, None, :, None], (COUNT, SIZE, SIZE, 3))

    def sharpness(**amounts):
        return np.diff(vary(pixels, only(**amounts)).astype(float), axis=2).__abs__().max(axis=(1, 2, 3)).mean()

    small = {"rotation": 1e-4, "zoom": 1e-3, "shear": 1e-3, "translation": 0.01}
    assert sharpness(**small) > 0.97 * sharpness(translation=0.01)


def test_brightness_adds_up_to_its_share_of_the_range():
    grey = np.full((COUNT, SIZE, SIZE, 3), 128, np.uint8)
    result = vary(grey, only(brightness=0.2)).astype(float)
    assert result.std(axis=(1, 2, 3)).max() == 0
    assert_reaches(result[:, 0, 0, 0] - 128, 51, slack=0.51)


def test_contrast_spreads_values_around_the_mean():
    halves = np.full((COUNT, SIZE, SIZE, 3), 80, np.uint8)
    halves[:, :, MIDDLE:] = 160
    result = vary(halves, only(contrast=0.3)).astype(float)
    before, after = halves.astype(float).mean(axis=(1, 2, 3)), result.mean(axis=(1, 2, 3))
    assert np.abs(after - before).max() < 0.6
    assert_reaches((result[:, 0, -1, 0] - result[:, 0, 0, 0]) / 80 - 1, 0.3, slack=0.02)


def test_saturation_keeps_brightness_and_hue():
    color = np.broadcast_to(np.array([150, 110, 70], np.uint8), (COUNT, SIZE, SIZE, 3))
    red, green, blue = np.moveaxis(vary(color, only(saturation=0.4))[:, 0, 0].astype(float), 1, 0)
    luma = 0.299 * 150 + 0.587 * 110 + 0.114 * 70
    assert np.abs(0.299 * red + 0.587 * green + 0.114 * blue - luma).max() < 1
    assert np.abs((red - green) - (green - blue)).max() <= 2
    assert_reaches((red - blue) / 80 - 1, 0.4, slack=0.02)


def test_saturation_leaves_grey_alone():
    grey = np.repeat(photographs()[..., :1], 3, axis=3)
    assert np.abs(vary(grey, only(saturation=0.9)).astype(int) - grey).max() <= 1


@pytest.mark.parametrize(
    "params",
    [AugmentParams(shear=0.2), AugmentParams(brightness=1, contrast=0.9, saturation=0.9), AugmentParams(randaugment=3)],
    ids=["default", "strong colours", "randaugment"],
)
def test_values_stay_in_range_and_every_picture_is_varied_in_its_own_way(params):
    same = np.repeat(photographs(1), 8, axis=0)
    augmentation = build_augmentation(params, SIZE, 0)
    different = 0
    for key in range(6):
        reseed(augmentation, (key,))
        result = np.asarray(augmentation(same.astype(np.float32)))
        assert result.dtype == np.float32
        assert result.shape == same.shape
        assert result.min() >= 0
        assert result.max() <= 255
        different += any(not np.array_equal(result[0], other) for other in result[1:])
    assert different >= (3 if params.randaugment else 6)  # two operations of RandAugment have no strength to draw


@pytest.mark.parametrize("params", [AugmentParams(), AugmentParams(randaugment=2)], ids=["default", "randaugment"])
def test_copies_depend_on_the_key_alone(params):
    pixels = photographs(8)
    augmentation = build_augmentation(params, SIZE, 0)
    first = augmented(pixels, augmentation, (1, 2))
    assert first.dtype == np.uint8
    others = [augmented(pixels, augmentation, key) for key in ((1, 3), (2, 2), (1,), (1, 2, 0))]
    assert all(not np.array_equal(first, other) for other in others)
    assert np.array_equal(first, augmented(pixels, augmentation, (1, 2)))
    assert np.array_equal(first, augmented(pixels, build_augmentation(params, SIZE, 99), (1, 2)))


def test_calls_without_a_key_go_on_from_the_seed():
    pixels = photographs(8).astype(np.float32)

    def calls(seed):
        augmentation = build_augmentation(AugmentParams(), SIZE, seed)
        return [np.asarray(augmentation(pixels)) for _ in range(2)]

    first, second = calls(4)
    assert not np.array_equal(first, second)
    assert all(np.array_equal(one, other) for one, other in zip(calls(4), (first, second), strict=True))
    assert not np.array_equal(first, calls(5)[0])


def test_movement_and_colour_are_drawn_apart():
    augmentation = build_augmentation(AugmentParams(), SIZE, 4)
    for _ in range(2):
        states = [np.asarray(layer.generator.state).tolist() for layer in augmentation.layers]
        assert len(states) == 2
        assert states[0] != states[1]
        reseed(augmentation, (1, 2))


def test_one_amount_does_not_change_what_another_draws():
    x, _ = places(vary(spot(0, 0), only(translation=0.2)))
    also, _ = places(vary(spot(0, 0), only(translation=0.2, rotation=1e-6, zoom=1e-6)))
    assert np.abs(x - also).max() < 0.05


def test_without_variation_or_training_pictures_stay_as_they_are():
    pixels = photographs(4).astype(np.float32)
    assert np.array_equal(build_augmentation(only(), SIZE, 0)(pixels), pixels)
    for params in (AugmentParams(), AugmentParams(randaugment=2)):
        assert np.array_equal(build_augmentation(params, SIZE, 0)(pixels, training=False), pixels)


def test_randaugment_grows_with_its_magnitude():
    pixels = photographs(8)

    def change(magnitude):
        augmentation = build_augmentation(AugmentParams(randaugment=2, magnitude=magnitude), SIZE, 0)
        copies = [augmented(pixels, augmentation, (key,)) for key in range(6)]
        return np.mean([np.abs(copy.astype(float) - pixels).mean() for copy in copies])

    weak, middle, strong = change(0.0), change(0.3), change(1.0)
    assert weak < middle < strong
    assert middle < 45  # of 255: recognisable


@pytest.mark.parametrize("params", [AugmentParams(), AugmentParams(randaugment=2)], ids=["default", "randaugment"])
def test_the_same_inside_tf_data(params):
    pixels = photographs(8).astype(np.float32)
    augmentation = build_augmentation(params, SIZE, 0)
    reseed(augmentation, (7,))
    expected = [np.asarray(augmentation(pixels[start : start + 4])) for start in (0, 4)]
    reseed(augmentation, (7,))
    dataset = tf.data.Dataset.from_tensor_slices(pixels).batch(4).map(augmentation)
    for one, other in zip(dataset.as_numpy_iterator(), expected, strict=True):
        assert np.abs(one - other).max() < 0.01


def test_half_precision_does_not_reach_the_pixels():
    pixels = photographs(8)
    for params in (AugmentParams(), AugmentParams(randaugment=2)):
        expected = vary(pixels, params)
        keras.config.set_dtype_policy("mixed_float16")
        try:
            assert np.array_equal(vary(pixels, params), expected)
        finally:
            keras.config.set_dtype_policy("float32")


UNDER_JAX = """
import numpy as np, tensorflow as tf
from catdog.augment import augmented, build_augmentation
from catdog.config import AugmentParams
pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
still = dict.fromkeys(("rotation", "zoom", "shear", "translation", "brightness", "contrast", "saturation"), 0.0)
flip = build_augmentation(AugmentParams(flip="horizontal", **still), 32, 0)
result = augmented(pixels, flip, (1,))
mirrored = [np.array_equal(one, other) for one, other in zip(result, pixels[:, :, ::-1])]
assert 0 < sum(mirrored) < 8
assert all(m or np.array_equal(one, other) for m, one, other in zip(mirrored, result, pixels))
augmentation = build_augmentation(AugmentParams(), 32, 0)
first = augmented(pixels, augmentation, (1, 2))
assert np.array_equal(first, augmented(pixels, augmentation, (1, 2)))
batches = tf.data.Dataset.from_tensor_slices(pixels.astype(np.float32)).batch(4).map(augmentation)
one, two = batches.as_numpy_iterator()
assert one.min() >= 0 and one.max() <= 255 and not np.array_equal(one, two)
"""


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_runs_under_jax_also_inside_tf_data(under_jax):
    under_jax(UNDER_JAX)


def test_copies_without_variation_are_refused():
    with pytest.raises(CatdogError, match=r"augment\.views = 3 .* set augment\.views to 0, or one of flip, rotation"):
        require_variation(AugmentParams(**(NOTHING | {"views": 3})))


@pytest.mark.parametrize(
    "params",
    [
        AugmentParams(**NOTHING),
        AugmentParams(views=3),
        AugmentParams(**(NOTHING | {"views": 1, "shear": 0.1})),
        AugmentParams(**(NOTHING | {"views": 1, "flip": "vertical"})),
        AugmentParams(**(NOTHING | {"views": 1, "randaugment": 1})),
    ],
)
def test_copies_that_vary_are_accepted(params):
    require_variation(params)


@pytest.fixture
def shards(tmp_path):
    """Three shards of training images: red ones of class a, then blue ones of class b."""
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for number in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (250, 10, 10) if number < 6 else (10, 10, 250)).save(buffer, "PNG")
            archive.writestr(f"{number:02d}.png", buffer.getvalue())
    rows = [ImageRow(f"{number:02d}.png", number // 6) for number in range(12)]
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        encode = functools.partial(
            encode_record, archive=archive, classes="ab", size=32, mode="stretch", quality=95, max_pixels=1e6
        )
        written = [write_shard(shard, tmp_path, encode) for shard in plan_shards("train", rows, 4)]
    write_index(tmp_path, written, "ab", size=32)
    return shard_paths(tmp_path, "train")


def test_preview_shows_images_from_all_over_the_shards_beside_their_copies(shards, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        write_preview(shards, ["a", "b"], only(flip="horizontal", brightness=0.2), seed=20, path=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    pixels = np.asarray(Image.open(paths[0]).convert("RGB")).astype(int)
    reds = (pixels[..., 0] > 150) & (pixels[..., 2] < 90)
    blues = (pixels[..., 2] > 150) & (pixels[..., 0] < 90)
    # Eight pictures of 32 x 32 a row; of the second shard, which holds both classes, two red ones and a blue one.
    for kind, rows in ((reds, 5), (blues, 3)):
        assert kind.sum() == rows * 8 * 32 * 32
        colors = {tuple(color) for color in pixels[kind]}
        assert len(colors) > 10  # the copies' brightness differs
