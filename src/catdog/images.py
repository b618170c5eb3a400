"""From a file's bytes to the pixels that a model sees: the one path of training, evaluation and serving."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]
"""RGB, uint8 [height, width, 3], 0..255."""

ResizeMode = Literal["stretch", "crop", "pad"]

# What viewers show. Formats that run programs (EPS, PDF) or read other files are left out on purpose.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 178e6
"""Pillow refuses larger pictures on its own, as attacks on memory."""
_END_OF_JPEG = b"\xff\xd9"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a stored picture upright, by EXIF orientation."""


class ImageError(Exception):
    """These bytes show no picture; the message is the reason, for a table of rejected files."""


@dataclass(frozen=True)
class Decoded:
    """A decoded file."""

    pixels: Pixels  # uint8 [height, width, 3], RGB, upright
    format: str  # of the file, e.g. JPEG, whatever its name says
    mode: str  # colours of the file as Pillow names them, e.g. RGB, L, CMYK, P
    whole: bool  # False for a JPEG that ends early


def decode(data: bytes, *, max_pixels: float = MAX_PIXELS) -> Pixels:
    """Decodes a picture as a viewer shows it, in RGB; see `decode_viewable`."""
    return decode_viewable(data, max_pixels=max_pixels).pixels


def decode_viewable(data: bytes, *, max_pixels: float = MAX_PIXELS) -> Decoded:
    """Decodes a picture as a viewer shows it: any format by content, upright, on white, in RGB.

    A JPEG that ends early is decoded as far as it goes. Animations give their first frame.

    Args:
        data: the file's bytes.
        max_pixels: refuse larger pictures before decoding them.

    Raises:
        ImageError: empty, not an image, damaged beyond viewing, or too large.
    """
    if not data:
        raise ImageError("empty file (0 bytes)")
    try:
        return _decode(data, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        if data.startswith(b"\xff\xd8") and "truncated" in str(error):
            return _decode_truncated_jpeg(data, max_pixels)
        raise ImageError(f"cannot be decoded: {error}") from None


def _decode_truncated_jpeg(data: bytes, max_pixels: float) -> Decoded:
    # With an end marker the decoder fills what is missing with grey, as viewers do.
    try:
        decoded = _decode(data + _END_OF_JPEG, max_pixels)
    except Exception as error:
        raise ImageError(f"cannot be decoded: {error}") from None
    pixels = decoded.pixels
    shown = (np.abs(pixels.astype(np.int16) - pixels[-1, -1]) > 8).any(axis=2).mean()
    if shown < 0.02:
        raise ImageError("truncated before any picture data")
    return replace(decoded, whole=False)


def _decode(data: bytes, max_pixels: float) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{width}x{height} pixels are more than the limit of {max_pixels / 1e6:g} million")
        pixels = _decode_plain_jpeg(data, image)
        if pixels is None:
            pixels = np.asarray(_to_rgb(_turn_upright(image)))
        return Decoded(pixels, image.format or "", image.mode, whole=True)


def _decode_plain_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Decodes most photographs to Pillow's very pixels in two thirds of its time; None for what Pillow must look at.

    That is: other formats, CMYK, a picture to be turned, and any on which libjpeg-turbo has a warning.
    """
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    if not plain or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB"), np.uint8)
    except ValueError:
        return None


def _turn_upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: that writes the EXIF block anew, which fails where a tag has an unusual type.
    image.load()  # a PNG may tell its orientation after its pixels
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit and float greyscale: Pillow's own conversion clips at 255 and would show white, or black up to 1.
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageError("holds values that are no finite numbers")
        brightest = values.max(initial=0)
        if image.mode == "F" and brightest <= 1:
            scale = 255.0
        else:
            scale = 255 / 65535 if image.mode.startswith("I;16") or brightest > 255 else 1
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize(pixels: Pixels, size: int, mode: ResizeMode) -> Pixels:
    """Resizes to a square, averaging where it shrinks (no aliasing) and interpolating where it grows.

    Args:
        pixels: uint8 [height, width, 3].
        size: pixels a side of the result.
        mode: `stretch` ignores the aspect, `crop` takes the centre square, `pad` adds black bars.

    Returns:
        uint8 [size, size, 3].
    """
    height, width = pixels.shape[:2]
    if mode == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _resample(pixels[top : top + side, left : left + side], size, size)
    if mode == "pad":
        scale = size / max(height, width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
        canvas = np.zeros((size, size, 3), np.uint8)
        top, left = (size - inner_height) // 2, (size - inner_width) // 2
        canvas[top : top + inner_height, left : left + inner_width] = _resample(pixels, inner_height, inner_width)
        return canvas
    return _resample(pixels, size, size)


def _resample(pixels: Pixels, height: int, width: int) -> Pixels:
    # OpenCV's area averaging is right only where an axis shrinks, so a mixed case takes two passes.
    shrinks_down, shrinks_across = pixels.shape[0] >= height, pixels.shape[1] >= width
    if shrinks_down != shrinks_across:
        between = (height, pixels.shape[1]) if shrinks_down else (pixels.shape[0], width)
        pixels = _resample(pixels, *between)
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=interpolation), np.uint8)


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encodes RGB pixels as the JPEG that a shard stores (4:2:0, standard Huffman tables)."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "OpenCV encodes any uint8 picture"
    return data.tobytes()


def decode_stored(data: bytes) -> Pixels:
    """Decodes a JPEG that `encode_jpeg` wrote to uint8 RGB [size, size, 3]."""
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB"), np.uint8)


def model_pixels(data: bytes, *, size: int, mode: ResizeMode, quality: int, max_pixels: float = MAX_PIXELS) -> Pixels:
    """Turns a file's bytes into exactly the pixels that training saw for it.

    The shards store JPEGs, so the picture makes the same round trip through JPEG here.

    Returns:
        uint8 [size, size, 3], RGB.

    Raises:
        ImageError: as `decode`.
    """
    return decode_stored(encode_jpeg(resize(decode(data, max_pixels=max_pixels), size, mode), quality))
