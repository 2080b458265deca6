"""What `decode` accepts, what it refuses, and that it does both quickly."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from deltavit.core.errors import DataError
from deltavit.data import decode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest resets the filter that decode sets
RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(*chunks):
    """A PNG of raw chunks, the end added."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width, height, bits, colour):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def tiff(*tags, body=b""):
    """A little-endian TIFF of raw tags (number, type, count, value); the body starts at byte 8."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def bomb(side):
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    return png(header(side, side, 1, 0), (b"IDAT", rows))


def tile_bomb():
    sides = ((256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1))
    body = zlib.compress(bytes(10**6))
    return tiff(*sides, (322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, len(body)), body=body)


def tag_bomb(tags=20_000, size=60_000):
    """A JPEG whose EXIF block claims the same bytes for thousands of tags."""
    entries = b"".join(struct.pack("<HHII", 1000 + i, 7, size, 8) for i in range(tags))
    block = b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(size)
    pieces = [b"Exif\0\0" + block[i : i + 65_000] for i in range(0, len(block), 65_000)]
    jpeg = encoded(PHOTO, "JPEG")
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in pieces) + jpeg[20:]


def scan_bomb(side=2000, scans=20_000):
    jpeg = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return jpeg[:-2] + last * scans + b"\xff\xd9"


def text_bomb():
    text = b"a\0\0" + zlib.compress(bytes(50 * 2**20), 9)
    return png(header(8, 8, 8, 0), *[(b"zTXt", text)] * 50, (b"IDAT", zlib.compress(bytes(72))))


def profile_bomb():
    profile = b"a\0\0" + zlib.compress(bytes(200 * 2**20), 9)
    return png(header(8, 8, 8, 0), (b"iCCP", profile), (b"IDAT", zlib.compress(bytes(72))))


def decoded_or_reason(data):
    try:
        return decode(data)
    except DataError as error:
        return str(error)


HOSTILE = {
    "9000 x 9000": lambda: bomb(9000),
    "14000 x 14000": lambda: bomb(14_000),
    "16000 x 16000 WebP": lambda: (
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (15_999).to_bytes(3, "little") * 2 + b"VP8L\0\0\0\0"
    ),
    "TIFF tiles": tile_bomb,
    "EXIF tags": tag_bomb,
    "scans": scan_bomb,
    "text": text_bomb,
    "profile": profile_bomb,
    "long side": lambda: png(header(70_000, 1, 8, 0), (b"IDAT", zlib.compress(bytes(70_001)))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_picture_is_decoded_or_refused_within_a_second(name):
    data = HOSTILE[name]()
    start = time.process_time()
    result = decoded_or_reason(data)
    assert "\n" not in result if isinstance(result, str) else name == "EXIF tags"
    assert time.process_time() - start < 1


def test_all_hostile_pictures_together_take_less_than_200_mb(tmp_path):
    pytest.importorskip("resource")
    for i, make in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.png").write_bytes(make())
    script = """if True:
        import pathlib, resource, sys
        from deltavit.core.errors import DataError
        from deltavit.data import decode
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try:
                decode(path)
            except DataError:
                pass
        print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
    """
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200e6
    assert "Warning" not in done.stderr


def test_the_pixel_limit_names_the_size_and_the_limit():
    with pytest.raises(DataError, match=r"9000 x 9000 is 81,000,000 pixels; the limit is 25,000,000"):
        decode(bomb(9000))
    with pytest.raises(DataError, match=r"30 x 20 is 600 pixels; the limit is 599"):
        decode(encoded(PHOTO, "PNG"), limit=599)
    assert decode(encoded(PHOTO, "PNG"), limit=600).size == (30, 20)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(format):
    assert decode(encoded(PHOTO, format)).tobytes() == PHOTO.tobytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_the_content_decides_the_format_not_the_suffix(tmp_path, format):
    path = tmp_path / "cat.jpg"
    path.write_bytes(encoded(PHOTO, format))
    image = decode(path)
    assert (image.mode, image.size) == ("RGB", PHOTO.size)
    assert image.tobytes() == decode(path.read_bytes()).tobytes()


@pytest.mark.parametrize("format", ["GIF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_formats_not_on_the_list_are_refused(format):
    with pytest.raises(DataError, match="is not a JPEG, PNG, WebP, BMP or TIFF picture"):
        decode(encoded(PHOTO, format))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_exif_orientation_gives_the_same_upright_picture(format, orientation):
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # undoes the orientation: 90 and 270 degrees swapped
    red = np.full((16, 32, 3), 255, np.uint8)
    red[:8, :16] = (255, 0, 0)
    upright = Image.fromarray(red)
    stored = upright.transpose(Image.Transpose(turned[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    image = decode(encoded(stored, format, exif=exif, **options))
    assert image.size == (32, 16)
    np.testing.assert_allclose(np.asarray(image), red, atol=4)


def test_broken_exif_does_not_make_a_picture_unreadable():
    jpeg = encoded(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(20))
    assert decode(jpeg).size == PHOTO.size


def test_one_bit_grey_and_cmyk_become_rgb():
    assert decode(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("L", (4, 4), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    cyan = decode(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")).getpixel((8, 8))
    assert np.allclose(cyan, (0, 255, 255), atol=4)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_16_bit_ramp_keeps_its_ramp(format):
    ramp = np.arange(0, 65_536, 16, dtype=np.uint16).reshape(64, 64)
    image = np.asarray(decode(encoded(Image.fromarray(ramp), format)))
    np.testing.assert_array_equal(image[..., 0], ramp // 256)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_16_bit_colour_keeps_its_high_byte():
    rows = b"".join(b"\0" + struct.pack(">6H", *(v * 1000 for v in range(6))) for _ in range(2))
    image = decode(png(header(2, 2, 16, 2), (b"IDAT", zlib.compress(rows))))
    assert image.getpixel((1, 0)) == tuple(v * 1000 // 256 for v in (3, 4, 5))


def test_32_bit_integers_are_read_as_16_bit_where_they_fit_and_refused_elsewhere():
    grey = np.array([[0, 65_535]], np.int32)
    assert decode(encoded(Image.fromarray(grey), "TIFF")).getpixel((1, 0)) == (255, 255, 255)
    with pytest.raises(DataError, match="integer pixels from 0 to 65536 have no known range"):
        decode(encoded(Image.fromarray(grey + np.int32([[0, 1]])), "TIFF"))


def test_float_pixels_are_refused():
    with pytest.raises(DataError, match="float pixels have no known range"):
        decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


@pytest.mark.parametrize(("mode", "clear", "half"), [("RGBA", (9, 9, 9, 0), (0, 0, 0, 51)), ("LA", (9, 0), (0, 51))])
def test_transparency_is_composited_on_white(mode, clear, half):
    assert decode(encoded(Image.new(mode, (2, 2), clear), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new(mode, (2, 2), half), "PNG")).getpixel((0, 0)) == (204, 204, 204)


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, "PNG", transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_picture_cut_anywhere_is_refused_or_whole(format):
    data = encoded(PHOTO, format)
    whole = decode(data).tobytes()
    for end in range(0, len(data) - 1, max(1, len(data) // 150)):
        try:
            assert decode(data[:end]).tobytes() == whole  # only what follows the pixels was lost
            assert end > len(data) * 0.8
        except DataError:
            pass


@settings(max_examples=150, deadline=1000)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF"]), st.data())
def test_flipped_bytes_raise_nothing_but_data_errors(format, data):
    picture = bytearray(encoded(PHOTO, format))
    for _ in range(data.draw(st.integers(1, 8))):
        picture[data.draw(st.integers(0, len(picture) - 1))] = data.draw(st.integers(0, 255))
    result = decoded_or_reason(bytes(picture))
    assert "\n" not in result if isinstance(result, str) else result.mode == "RGB"


def test_long_text_and_profile_are_read_past():
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 500_000, zip=True)
    assert decode(encoded(PHOTO, "PNG", pnginfo=info, icc_profile=bytes(500_000))).tobytes() == PHOTO.tobytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"<!DOCTYPE html><html>404</html>", "is not a JPEG"), (b"\xff\xd8\xff", "is not a JPEG")],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"cat.jpg {reason}"):
        decode(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("fifo.png", "folder.png", "device.png"):
        with pytest.raises(DataError, match=f"{name} is not a regular file"):
            decode(tmp_path / name)
    with pytest.raises(DataError, match=r"none.png cannot be read: No such file"):
        decode(tmp_path / "none.png")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.bmp"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="over the limit of 67,108,864"):
        decode(path)


def test_a_name_with_a_newline_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb.png"
    path.write_bytes(b"no")
    with pytest.raises(DataError) as caught:
        decode(path)
    assert "\n" not in str(caught.value)
