"""What a viewer shows is accepted and shown right; what shows no picture is refused with a reason."""

import functools
import io
import struct
import time
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from catdog.images import (
    ImageError,
    decode,
    decode_stored,
    decode_viewable,
    encode_jpeg,
    model_pixels,
    resize,
)
from catdog.records import ImageRow, RecordReader, Shard, encode_record, write_shard
from catdog.sample import draw_animal

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(height=32, width=48) -> np.ndarray:
    """Red, green over blue, white: every turn and every mirror image differs."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, WHITE
    return pixels


def scene(height=120, width=160, seed=0) -> np.ndarray:
    """A smooth picture with structure at every place, as photographs have it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def saved(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(pixels, **options) -> bytes:
    return saved(pixels, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def close(shown: np.ndarray, meant: np.ndarray, tolerance: float) -> bool:
    """Equal in size, and in colour but for what a lossy format costs."""
    return shown.shape == meant.shape and np.abs(shown.astype(int) - meant.astype(int)).mean() <= tolerance


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for kinds that Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + png_chunk(b"IEND", b"")


def reason(data: bytes, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return str(caught.value)


# What must be done to the stored picture, by EXIF orientation, so that it stands upright.
TURNED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(TURNED[orientation](quadrants()))
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    assert close(decode(saved(stored, kind, exif=exif.tobytes(), **options)), quadrants(), 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_to_the_very_pixels_of_pillow(kind):
    for orientation in (0, *TURNED, 9):  # those beyond 8 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(scene(13, 21), kind, exif=exif.tobytes())
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(decode(data), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))), orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 1
    whole = exif.tobytes()
    for block in (whole[:11], whole[:14] + b"\xff" * 40, b"Exif\0\0nonsense", b"Exif\0\0"):
        assert close(decode(jpeg(quadrants(), exif=block)), quadrants(), 3)


def exif_block(orientation: int, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF by hand, with a tag of a type that Pillow does not write for it."""
    place = 8 + 2 + 2 * 12 + 4
    turn, odd = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0), struct.pack("<HHII", tag, kind, count, place)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turn + odd + bytes(4) + value


ODDLY_TYPED = {
    "ResolutionUnit as text": (0x0128, 2, 6, b"inches"),
    "YCbCrPositioning as text": (0x0213, 2, 9, b"centered\0"),
    "Make as a rational": (0x010F, 5, 1, struct.pack("<II", 1, 3)),
    "Software as a double": (0x0131, 12, 1, struct.pack("<d", 1.5)),
}


@pytest.mark.parametrize("tag", ODDLY_TYPED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_tags_of_an_odd_type_do_not_hinder_turning_a_picture_upright(kind, tag):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation, turned in TURNED.items():
        stored = np.ascontiguousarray(turned(quadrants()))
        data = saved(stored, kind, exif=exif_block(orientation, *ODDLY_TYPED[tag]), **options)
        assert close(decode(data), quadrants(), 3), orientation


def test_result_is_rgb_uint8_of_the_pictures_size():
    shown = decode(saved(quadrants(), "PNG"))
    assert (shown.dtype, shown.shape) == (np.uint8, (32, 48, 3))
    assert np.array_equal(shown, quadrants())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "DIB", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_formats_are_exact(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(saved(quadrants(), kind, **options)), quadrants())


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 3), ("MPO", 3), ("WEBP", 8), ("AVIF", 8)])
def test_lossy_formats_are_close(kind, tolerance):
    assert close(decode(saved(scene(), kind, quality=95)), scene(), tolerance)


def test_progressive_jpeg():
    data = jpeg(scene(), progressive=True)
    assert b"\xff\xc2" in data
    assert close(decode(data), scene(), 3)


SAVED = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "stored as RGB": {"keep_rgb": True},
    "coarse": {"quality": 12},
}


GREY = ("progressive", "restart markers", "coarse")  # the others are choices about colour


@pytest.mark.parametrize("shape", [(120, 160), (37, 53), (1, 9)], ids=str)
@pytest.mark.parametrize(("colours", "kind"), [*(("RGB", kind) for kind in SAVED), *(("L", kind) for kind in GREY)])
def test_plain_jpegs_are_decoded_by_the_fast_decoder_to_the_very_pixels_of_pillow(colours, kind, shape, monkeypatch):
    data = saved(Image.fromarray(scene(*shape)).convert(colours), "JPEG", **{"quality": 90, **SAVED[kind]})
    with monkeypatch.context() as patch:
        patch.setattr("catdog.images._to_rgb", None)  # Pillow's way would fail
        fast = decode_viewable(data)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(fast.pixels, np.asarray(image.convert("RGB")))
    assert (fast.format, fast.mode, fast.whole) == ("JPEG", colours, True)


def test_damaged_jpeg_is_shown_as_pillow_shows_it_and_without_a_word_from_the_decoder(capfd):
    data = bytearray(jpeg(scene()))
    data[len(data) // 2 : len(data) // 2 + 20] = b"\x13" * 20
    shown = decode(bytes(data))
    with Image.open(io.BytesIO(bytes(data))) as image:
        assert np.array_equal(shown, np.asarray(image.convert("RGB")))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_greyscale_becomes_three_equal_channels(kind):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert close(decode(saved(grey, kind)), np.stack([grey] * 3, axis=-1), 2)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_has_the_right_colours(kind):
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(Image.fromarray(quadrants()).convert("CMYK"), kind, **options)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert close(decode(data), quadrants(), 3)


def test_palette():
    image = Image.fromarray(quadrants()).quantize(4)
    assert np.array_equal(decode(saved(image, "PNG")), quadrants())


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_shows_white(kind):
    image = Image.new("P", (4, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 1])
    assert decode(saved(image, kind, transparency=1))[0].tolist() == [[*RED], [*WHITE], [*BLUE], [*WHITE]]


def test_palette_with_partial_transparency_is_blended_with_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    shown = decode(saved(image, "PNG", transparency=bytes([51, 255])))  # 51 = a fifth
    assert shown[0].tolist() == [[255, 204, 204], [*BLUE]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_blended_with_white(kind):
    pixels = np.array([[[0, 0, 0, 0], [255, 0, 0, 51], [0, 0, 255, 255]]], np.uint8)
    shown = decode(saved(pixels, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert shown[0].tolist() == [[*WHITE], [255, 204, 204], [*BLUE]]


def test_grey_with_alpha_is_blended_with_white():
    pixels = np.array([[[0, 0], [0, 51], [100, 255]]], np.uint8)
    image = Image.fromarray(pixels)
    assert image.mode == "LA"
    assert decode(saved(image, "PNG"))[0].tolist() == [[*WHITE], [204] * 3, [100] * 3]


def test_transparent_grey_level_shows_white():
    data = png(3, 1, 8, 0, b"\0" + bytes([0, 128, 255]), png_chunk(b"tRNS", b"\0\x80"))
    assert decode(data)[0].tolist() == [[0] * 3, [*WHITE], [*WHITE]]


def test_transparent_colour_of_an_rgb_picture_shows_white():
    colours = struct.pack(">HHH", *GREEN)
    data = png(3, 1, 8, 2, b"\0" + bytes([*RED, *GREEN, *BLUE]), png_chunk(b"tRNS", colours))
    assert decode(data)[0].tolist() == [[*RED], [*WHITE], [*BLUE]]


def test_sixteen_bit_grey_has_the_right_brightness():
    levels = [0, 257, 32 * 257, 128 * 257, 65535]
    shown = decode(png(5, 1, 16, 0, b"\0" + struct.pack(">5H", *levels)))
    assert shown[0].tolist() == [[value] * 3 for value in (0, 1, 32, 128, 255)]


def test_dark_sixteen_bit_grey_stays_dark():
    shown = decode(png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0, 100, 200, 255)))
    assert shown.max() <= 1


def test_sixteen_bit_tiff_has_the_right_brightness():
    levels = np.array([[0, 32 * 257, 128 * 257, 65535]], np.uint16)
    assert decode(saved(levels, "TIFF"))[0, :, 0].tolist() == [0, 32, 128, 255]


@pytest.mark.parametrize("highest", [1.0, 255.0, 65535.0])
def test_float_tiff_has_the_right_brightness_whatever_its_range(highest):
    shares = np.array([[0, 32 / 255, 128 / 255, 1]])
    data = saved((shares * highest + 1e-3 * (shares > 0) * (shares < 1)).astype(np.float32), "TIFF")
    assert decode_viewable(data).mode == "F"
    assert decode(data)[0].tolist() == [[value] * 3 for value in (0, 32, 128, 255)]


def test_float_tiff_without_light_stays_black():
    assert not decode(saved(np.zeros((4, 5), np.float32), "TIFF")).any()
    assert not decode(saved(np.full((4, 5), -0.5, np.float32), "TIFF")).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_tiff_with_values_that_are_no_numbers_is_refused(value):
    assert reason(saved(np.array([[0.5, value]], np.float32), "TIFF")) == "holds values that are no finite numbers"


def test_sixteen_bit_colour_has_the_right_brightness():
    rows = b"\0" + struct.pack(">6H", 65535, 0, 128 * 257, 0, 32 * 257, 257)
    assert decode(png(2, 1, 16, 2, rows))[0].tolist() == [[255, 0, 128], [0, 32, 1]]


def test_sixteen_bit_colour_with_alpha_is_blended_with_white():
    rows = b"\0" + struct.pack(">8H", 65535, 0, 0, 51 * 257, 0, 0, 0, 65535)
    assert decode(png(2, 1, 16, 6, rows))[0].tolist() == [[255, 204, 204], [0, 0, 0]]


def test_one_bit():
    image = Image.fromarray(np.array([[0, 255, 0, 255, 255]], np.uint8)).convert("1")
    for kind in ("PNG", "BMP", "TIFF"):
        assert decode(saved(image, kind))[0].tolist() == [[value] * 3 for value in (0, 255, 0, 255, 255)]


def test_content_rules_not_the_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for kind in ("BMP", "GIF", "WEBP", "PNG"):
            archive.writestr(f"{kind}.jpg", saved(quadrants(), kind, **({"lossless": True} if kind == "WEBP" else {})))
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        for name in archive.namelist():
            assert np.array_equal(decode(archive.read(name)), quadrants()), name


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(kind):
    later = Image.fromarray(np.ascontiguousarray(quadrants()[::-1]))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(quadrants(), kind, save_all=True, append_images=[later], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(decode(data), quadrants())


def test_jpeg_with_junk_before_its_end_marker():
    data = jpeg(scene())
    assert close(decode(data[:-2] + b"\x00\x12junk" * 20 + data[-2:]), scene(), 3)


@pytest.mark.parametrize("junk", [b"\0", b"<html>", bytes(10_000), b"\xff\xd8\xff" * 2000])
def test_jpeg_followed_by_junk_is_whole(junk):
    data = jpeg(scene())
    assert np.array_equal(decode(data + junk), decode(data))
    assert decode_viewable(data + junk).whole


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_that_ends_half_way_shows_its_upper_half(progressive):
    whole = jpeg(scene(240, 320), progressive=progressive)
    if progressive:
        # Its scans refine the whole picture: half the bytes show all of it, roughly.
        shown = decode(whole[: len(whole) * 3 // 4])
        assert close(shown, scene(240, 320), 12)
    else:
        shown = decode(whole[: len(whole) // 2])
        assert np.array_equal(shown[:96], decode(whole)[:96])
        assert (shown[-16:] == 128).all()
    assert shown.shape == (240, 320, 3)
    assert not decode_viewable(whole[: len(whole) // 2]).whole
    assert decode_viewable(whole).whole


def test_jpeg_that_only_lacks_its_end_marker_is_shown_whole():
    data = jpeg(scene())
    assert np.array_equal(decode(data[:-2]), decode(data))


def test_truncated_jpeg_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 8
    data = jpeg(scene(240, 320), exif=exif.tobytes())
    assert decode(data[: len(data) // 2]).shape == (320, 240, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_one_pixel(kind):
    shown = decode(saved(np.full((1, 1, 3), 77, np.uint8), kind))
    assert shown.shape == (1, 1, 3)
    assert np.abs(shown.astype(int) - 77).max() <= 3


@pytest.mark.parametrize("shape", [(1, 6000), (6000, 1), (3, 5000)])
@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_very_elongated_picture_becomes_a_square(shape, mode):
    data = saved(np.full((*shape, 3), 90, np.uint8), "PNG")
    shown = resize(decode(data), 64, mode)
    assert shown.shape == (64, 64, 3)
    assert {*shown.ravel().tolist()} == ({0, 90} if mode == "pad" else {90})


def test_empty_file_is_refused():
    assert reason(b"") == "empty file (0 bytes)"


@pytest.mark.parametrize(
    "data",
    [
        b"this is no picture\n" * 20,
        b"<html><body>404</body></html>",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2040),  # Thumbs.db: an OLE file
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
        b"%PDF-1.4\n1 0 obj\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0",
        b"\xff",
    ],
    ids=["text", "html", "thumbs.db", "eps", "pdf", "svg", "one zero", "one byte"],
)
def test_what_is_no_picture_is_refused(data):
    assert reason(data) == "not an image"


def test_eps_that_pillow_would_show_with_ghostscript_is_refused():
    assert reason(saved(quadrants(), "EPS")) == "not an image"


def test_jpeg_that_ends_after_its_header_is_refused():
    data = jpeg(scene())
    scan = data.index(b"\xff\xda")
    told = [reason(data[:end]) for end in (2, 20, scan, scan + 14)]
    assert all(told)
    assert told[-1] == "truncated before any picture data"


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_png_is_refused(share):
    data = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "PNG")
    assert reason(data[: int(len(data) * share)])


def test_damaged_png_is_refused():
    data = bytearray(saved(scene(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert "cannot be decoded" in reason(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_cut_and_every_flipped_byte_is_shown_or_refused_never_a_crash():
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = saved(scene(24, 20), kind)
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            try:
                shown = decode(bytes(data), max_pixels=1e6)
            except ImageError as error:
                assert str(error)
            else:
                assert (shown.dtype, shown.ndim, shown.shape[2]) == (np.uint8, 3, 3)


@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [(50_000, 50_000, 100e6), (9000, 9000, 80e6), (11, 10, 109)],
)
def test_too_many_pixels_are_refused_before_they_are_decoded(width, height, limit):
    # The file has a header and no picture data: decoding it would fail for another reason.
    data = png(width, height, 8, 2, b"")
    started = time.perf_counter()
    told = reason(data, max_pixels=limit)
    assert time.perf_counter() - started < 1
    assert "pixels" in told
    assert "limit" in told
    assert "truncated" not in told


def test_picture_at_the_limit_is_accepted():
    assert decode(saved(quadrants(10, 11), "PNG"), max_pixels=110).shape == (10, 11, 3)


def test_limit_also_holds_for_a_truncated_jpeg():
    data = jpeg(scene())
    assert "limit" in reason(data[: len(data) // 2], max_pixels=100)


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 50), (50, 7), (33, 33), (300, 200), (20, 300)])
@pytest.mark.parametrize("size", [1, 33, 64])
def test_resize_gives_the_size_and_keeps_a_constant_picture(mode, shape, size):
    result = resize(np.full((*shape, 3), (10, 120, 250), np.uint8), size, mode)
    assert (result.dtype, result.shape) == (np.uint8, (size, size, 3))
    inside = result if mode != "pad" else result[result.any(axis=2)]
    assert (inside.reshape(-1, 3) == (10, 120, 250)).all()


def test_same_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for mode in ("stretch", "crop", "pad"):
        assert np.array_equal(resize(pixels, 40, mode), pixels)


def test_pad_centres_the_picture_between_black_bars():
    wide = resize(np.full((10, 40, 3), 200, np.uint8), 40, "pad")
    assert (wide[15:25] == 200).all()
    assert not wide[:15].any()
    assert not wide[25:].any()
    tall = resize(np.full((80, 20, 3), 200, np.uint8), 40, "pad")
    assert (tall[:, 15:25] == 200).all()
    assert not tall[:, :15].any()
    assert not tall[:, 25:].any()


def test_crop_takes_the_centre_square():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    assert (resize(pixels, 20, "crop") == 200).all()
    assert (resize(pixels.transpose(1, 0, 2), 10, "crop") == 200).all()


def test_stretch_keeps_the_corners():
    for shape in ((32, 48), (96, 200), (8, 300)):
        small = resize(quadrants(*shape), 16, "stretch")
        corners = [small[row, column].tolist() for row in (0, -1) for column in (0, -1)]
        assert corners == [[*RED], [*GREEN], [*BLUE], [*WHITE]]


@pytest.mark.parametrize("shape", [(64, 64), (100, 130), (257, 99)])
def test_shrinking_keeps_the_mean(shape):
    pixels = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    small = resize(pixels, 32, "stretch")
    assert np.abs(small.mean(axis=(0, 1)) - pixels.mean(axis=(0, 1))).max() < 0.6


def test_shrinking_by_a_whole_number_is_the_mean_of_each_block():
    pixels = np.random.default_rng(3).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    blocks = pixels.reshape(32, 3, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize(pixels, 32, "stretch") - blocks).max() <= 0.51


@pytest.mark.parametrize("side", [201, 256, 300])
def test_fine_checkerboard_becomes_grey_not_a_pattern(side):
    board = np.indices((side, side)).sum(axis=0) % 2 * 255
    small = resize(np.stack([board] * 3, axis=-1).astype(np.uint8), 50, "stretch")
    assert small.std() < 20
    assert abs(small.mean() - 127.5) < 2


def test_stripes_along_the_axis_that_shrinks_become_grey_where_the_other_grows():
    stripes = np.zeros((10, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    result = resize(stripes, 40, "stretch")
    assert np.abs(result.astype(int) - 127).max() <= 2
    turned = resize(np.ascontiguousarray(stripes.transpose(1, 0, 2)), 40, "stretch")
    assert np.abs(turned.astype(int) - 127).max() <= 2


def test_growing_interpolates_between_the_pixels():
    ramp = np.repeat(np.array([[0, 100, 200]], np.uint8)[..., None], 3, axis=2)
    row = resize(ramp, 30, "stretch")[0, :, 0].astype(int)
    assert (np.diff(row) >= 0).all()
    assert np.diff(row).max() <= 11
    assert (row[0], row[-1]) == (0, 200)


def test_growing_one_axis_leaves_the_other_exact():
    pixels = np.random.default_rng(4).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    pixels[:] = pixels[:1]
    assert np.array_equal(resize(pixels, 32, "stretch"), np.repeat(pixels[:1], 32, axis=0))


def test_stored_jpeg_is_close_to_the_pixels_in_rgb():
    data = encode_jpeg(scene(64, 64), 95)
    assert data.startswith(b"\xff\xd8")
    assert close(decode_stored(data), scene(64, 64), 4)
    assert close(decode(data), scene(64, 64), 4)
    assert len(encode_jpeg(scene(64, 64), 30)) < len(data)


def awkward_pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = jpeg(scene(200, 150))
    return {
        "noise.png": saved(rng.integers(0, 256, (97, 61, 3), dtype=np.uint8), "PNG"),
        "noise.jpg": jpeg(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8), subsampling=2),
        "scene.jpg": jpeg(scene(301, 211)),
        "cat.jpg": jpeg(draw_animal("cat", np.random.default_rng(6))),
        "dog.png": saved(draw_animal("dog", np.random.default_rng(7)), "PNG"),
        "primary.png": saved(quadrants(), "PNG"),
        "turned.jpg": jpeg(scene(60, 90), exif=exif.tobytes()),
        "grey.jpg": saved(Image.fromarray(scene()).convert("L"), "JPEG"),
        "cmyk.jpg": saved(Image.fromarray(scene()).convert("CMYK"), "JPEG"),
        "short.jpg": whole[: len(whole) // 2],
        "pixel.png": saved(np.full((1, 1, 3), 77, np.uint8), "PNG"),
        "long.png": saved(rng.integers(0, 256, (3, 400, 3), dtype=np.uint8), "PNG"),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The awkward pictures, by name and in one archive; the tests only read them."""
    named = awkward_pictures()
    path = tmp_path_factory.mktemp("pictures") / "raw.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in named.items():
            archive.writestr(name, data)
    return named, path


@pytest.mark.parametrize(
    ("size", "mode", "quality"),
    [(224, "stretch", 95), (33, "crop", 95), (97, "pad", 60), (150, "stretch", 100), (32, "pad", 1), (65, "crop", 30)],
)
def test_model_pixels_are_bit_for_bit_those_of_the_shard(pictures, tmp_path, size, mode, quality):
    named, raw = pictures
    shard = Shard("test-00000-of-00001.tfrecord", "test", tuple(ImageRow(name, 0) for name in named))
    options = {"classes": ("any",), "size": size, "mode": mode, "quality": quality, "max_pixels": 1e6}
    with zipfile.ZipFile(raw) as archive:
        write_shard(shard, tmp_path, functools.partial(encode_record, archive=archive, **options))
    stored = np.concatenate(list(RecordReader([tmp_path / shard.name], 5)))
    assert stored.shape == (len(named), size, size, 3)
    for name, pixels in zip(named, stored, strict=True):
        served = model_pixels(named[name], size=size, mode=mode, quality=quality)
        assert np.array_equal(served, pixels), name


def test_model_pixels_refuse_what_decode_refuses():
    for data in (b"", b"text", png(50_000, 50_000, 8, 2, b"")):
        with pytest.raises(ImageError):
            model_pixels(data, size=32, mode="stretch", quality=95)
