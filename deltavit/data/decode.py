"""The one way from a file to pixels, for training, evaluation and prediction alike.

Whoever made the file may be hostile: formats are on a list, sizes are read from the header before anything is decoded,
and whatever goes wrong is one `DataError` that names the file.
"""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..core.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
PIXELS = 25_000_000
SIDE = 65_535  # the table of a resize grows with the longer side, not with the area
FILE_BYTES = 64 * 2**20
SCANNED_PIXELS = 10_000_000_000  # scans x pixels of a progressive JPEG: about three seconds
RULES = "EXIF orientation applied, transparency on white, 16 bit to its high byte, first frame, colour profile ignored"
"""What `decode` decides, in words, for the manifest."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A TIFF of 1 MB can print 65,000 of Pillow's warnings, and a filter set per call is not safe between threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(source: Path | bytes, limit: int = PIXELS) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Args:
        source: a regular file of at most 64 MiB, or its bytes.  The content decides the format, not the suffix.
        limit: most pixels, read from the header before decoding.

    Returns:
        RGB.  Transparency is composited on white, 16-bit greys keep their high byte (as Pillow does for 16-bit colour),
        the EXIF orientation is applied, an animation gives its first frame, a colour profile is ignored.

    Raises:
        DataError: anything else: another format, truncated, too large, float pixels, not a regular file.
    """
    name, data = _read(source)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check(picture, data, limit)
            picture.load()
            return _rgb(_upright(picture))
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a JPEG, PNG, WebP, BMP or TIFF picture, or its header is damaged") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, and more, on hostile bytes
        raise DataError(f"{name} cannot be decoded: {_line(error)}") from error


def shown(path: Path) -> str:
    """The path as one line, whatever its name contains."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _read(source: Path | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        name, size = f"a picture of {len(source)} bytes", len(source)
    else:
        name = shown(source)
        try:
            status = source.stat()
        except (OSError, ValueError) as error:
            raise DataError(f"{name} cannot be read: {_line(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name} is not a regular file")
        size = status.st_size
    if not size:
        raise DataError(f"{name} is empty (zero bytes)")
    if size > FILE_BYTES:
        raise DataError(f"{name} has {size:,} bytes, over the limit of {FILE_BYTES:,}")
    if isinstance(source, bytes):
        return name, source
    try:
        with source.open("rb") as file:
            return name, file.read(FILE_BYTES)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {_line(error)}") from error


def _check(picture: Image.Image, data: bytes, limit: int) -> None:
    """Refuse by the header what would take too much memory or time."""
    width, height = picture.size
    if width * height > limit or max(width, height) > SIDE:
        raise ValueError(
            f"{width} x {height} is {width * height:,} pixels; the limit is {limit:,}, and {SIDE:,} a side; shrink it"
        )
    tags = getattr(picture, "tag_v2", {})
    tile = tags.get(322, 0) * tags.get(323, 0)  # TileWidth, TileLength: a 1 KB file can ask for gigabytes
    if tile > limit:
        raise ValueError(f"its TIFF tiles have {tile:,} pixels, the limit is {limit:,}")
    scans = data.count(b"\xff\xda") if picture.info.get("progressive") else 1  # a JPEG can hold a million empty ones
    if scans * width * height > SCANNED_PIXELS:
        raise ValueError(f"it is a progressive JPEG of {width} x {height} with {scans:,} scans; save it anew")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(picture.getexif().get(0x0112, 1))
    except Exception:  # broken metadata does not make a picture unreadable
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("float pixels have no known range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        return _eight_bits(np.asarray(picture)).convert("RGB")
    if picture.has_transparency_data:
        picture = _in(picture, "RGBA")
        paper = Image.new("RGB", picture.size, "white")
        paper.paste(picture, mask=picture)
        return paper
    return _in(picture, "RGB")


def _in(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode else picture.convert(mode)  # convert always copies, 100 MB at the limit


def _eight_bits(grey: np.ndarray) -> Image.Image:
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65_535:
        raise ValueError(f"integer pixels from {low} to {high} have no known range; save it with 8 or 16 bits")
    return Image.fromarray((grey >> 8).astype(np.uint8))


def _line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
