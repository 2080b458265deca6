"""The files in which owners of data sets give them away: folders and zips, MATLAB matrices, NORB matrices.

All of it may be hostile.  Nothing is unpacked to the disk, no pickle is opened, and sizes are bounded before memory is
taken.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import stat
import struct
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError
from .decode import FILE_BYTES, shown

Array = NDArray[Any]
FILES = 2_000_000
"""Most files of a source."""
TABLE_BYTES = 4 * 2**30
"""Most bytes of one file that holds many pictures or their labels."""
SIGNATURES = {
    b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif",
}  # fmt: skip


class Tree:
    """The files below a source: a folder, with the zips directly in it read as if they were unpacked there, or a zip.

    Names are relative, with forward slashes.  `read_from` keeps the SHA-256 of each table read, for the manifest.

    Raises:
        DataError: no such source, a damaged zip, or one with an entry that would leave the folder, or is a link.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self.read_from: dict[str, str] = {}
        self._files: dict[str, Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        if self.source.is_dir():
            for where, folders, files in os.walk(self.source):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for path in (Path(where, name) for name in files if not name.startswith(".")):
                    if not path.is_symlink():
                        self._add(path.relative_to(self.source).as_posix(), path)
            for path in sorted(self.source.glob("*.zip")):
                self._mount(path)
        elif zipfile.is_zipfile(self.source):
            self._mount(self.source)
        else:
            raise DataError(f"{shown(self.source)} is neither a folder nor a zip; unpack other archives first")
        self.names = sorted(self._files)
        self._by_last: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._by_last[name.rpartition("/")[2]].append(name)

    def _add(self, name: str, where: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]) -> None:
        if len(self._files) >= FILES:
            raise DataError(f"{shown(self.source)} has more than {FILES:,} files")
        if name in self._files:
            raise DataError(f"{shown(self.source)} has {name[:80]!r} twice, in a folder and in a zip; keep one of them")
        self._files[name] = where

    def _mount(self, path: Path) -> None:
        try:
            archive = zipfile.ZipFile(path)
            entries = archive.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"{shown(path)} is not a readable zip: {error}") from error
        for entry in entries:
            name = PurePosixPath(entry.filename)
            if name.anchor or ".." in name.parts or "\\" in entry.filename or ":" in entry.filename.split("/")[0]:
                raise DataError(f"{shown(path)} has an entry that leaves the folder, {entry.filename[:80]!r}: not read")
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise DataError(f"{shown(path)} has a link, {entry.filename[:80]!r}: not read")
            if entry.flag_bits & 1:
                raise DataError(f"{shown(path)} is encrypted: unpack it first")
            if not entry.is_dir() and "__MACOSX" not in name.parts:
                self._add(name.as_posix(), (archive, entry))

    def find(self, relative: str) -> str | None:
        """The name that is `relative`, or ends in `/relative`; the shortest, where there are several."""
        relative = relative.lstrip("/")
        near = self._by_last.get(relative.rpartition("/")[2], ())
        ends = [name for name in near if name == relative or name.endswith(f"/{relative}")]
        return min(ends, key=lambda name: (len(name), name), default=None)

    def one(self, *wanted: str) -> str:
        """As `find`, for the first of some names that is there.

        Raises:
            DataError: none is.
        """
        for relative in wanted:
            if (name := self.find(relative)) is not None:
                return name
        raise DataError(f"{shown(self.source)} has no {' and no '.join(wanted)}")

    def path(self, name: str) -> Path:
        """Of a file that must be opened by path.

        Raises:
            DataError: it is inside a zip.
        """
        where = self._files[name]
        if not isinstance(where, Path):
            raise DataError(f"{name} must be a plain file: unpack the zip in {shown(self.source)} first")
        return where

    def read(self, name: str, limit: int = FILE_BYTES) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: more than `limit` of them, or a damaged file.
        """
        where = self._files[name]
        try:
            with where.open("rb") if isinstance(where, Path) else where[0].open(where[1]) as file:
                data = file.read(limit + 1)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{name} in {shown(self.source)} cannot be read: {error}") from error
        if len(data) > limit:
            raise DataError(f"{name} in {shown(self.source)} has more than {limit:,} bytes")
        return data

    def table(self, name: str) -> bytes:
        """The bytes of a file that says what others are; its SHA-256 is kept."""
        data = self.read(name, TABLE_BYTES)
        self.read_from[name] = hashlib.sha256(data).hexdigest()
        return data

    def lines(self, name: str) -> list[str]:
        """The lines of a text file that are not blank, without blanks around them."""
        try:
            return [line.strip() for line in self.table(name).decode("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{name} in {shown(self.source)} is not UTF-8 text (byte {error.start})") from error


def png(pixels: Array) -> bytes:
    """A picture as PNG bytes that depend on its pixels alone.

    Stored, not compressed: what a compressor writes depends on its version, and digests of data would with it.

    Args:
        pixels: [height, width] or [height, width, 3], 8 bits.
    """
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)  # a row begins with its filter, 0: none
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    parts = [raw[i : i + 65_535] for i in range(0, len(raw), 65_535)]
    stored = b"".join(
        struct.pack("<BHH", part is parts[-1], len(part), len(part) ^ 0xFFFF) + part for part in parts
    )  # fmt: skip
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def suffix(data: bytes) -> str | None:
    """The suffix that fits the first bytes of a picture; None for a format that `decode` does not read."""
    return next((end for start, end in SIGNATURES.items() if data.startswith(start)), None)


def norb(data: bytes, name: str) -> Array:
    """A matrix in the format of the NORB sets (LeCun et al. 2004), perhaps in gzip.

    Raises:
        DataError: another format, or not the bytes that its header says.
    """
    kinds = {0x1E3D4C55: ("u1", 1), 0x1E3D4C54: ("<i4", 4)}
    try:
        file = gzip.GzipFile(fileobj=io.BytesIO(data)) if data[:2] == b"\x1f\x8b" else io.BytesIO(data)
        magic, dimensions = struct.unpack("<II", file.read(8))
        shape = struct.unpack(f"<{max(3, dimensions)}I", file.read(4 * max(3, dimensions)))[:dimensions]
        kind, width = kinds[magic]
        size = math.prod(shape) * width
        if size > TABLE_BYTES:
            raise ValueError(f"{size:,} bytes are too many")
        values: Array = np.frombuffer(file.read(size), kind).reshape(shape)
        return values
    except (struct.error, KeyError, ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a NORB matrix of bytes or of integers: {error}") from error


def mat(data: bytes, name: str) -> dict[str, Any]:
    """The variables of a MATLAB 5 file: numbers as arrays, text as str, a cell array as list, a struct array as list of
    dicts, both in column order.

    Raises:
        DataError: another version, another kind of variable, or a damaged file.

    Source: MathWorks, "MAT-File Format", chapter 1.  Ours and not SciPy's, which would be a dependency of the lab for
    four kinds of values in four data sets.
    """
    if data.startswith(b"MATLAB 7.3"):
        raise DataError(f"{name} is a MATLAB 7.3 file (HDF5); save it again with -v7")
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        found = {}
        for kind, body in _elements(data[128:], order):
            if kind == 15:
                unpacked = zlib.decompressobj()
                body = unpacked.decompress(body, TABLE_BYTES)
                if unpacked.unconsumed_tail:
                    raise ValueError(f"more than {TABLE_BYTES:,} bytes")
                [(kind, body)] = _elements(body, order)
            if kind != 14:
                raise ValueError(f"an element of type {kind} at the top")
            label, value = _matrix(body, order, 0)
            found[label] = value
        return found
    except (KeyError, ValueError, IndexError, struct.error, zlib.error, UnicodeError) as error:
        raise DataError(f"{name} is not a MATLAB 5 file that can be read: {error}") from error


NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}


def _elements(data: bytes, order: str) -> list[tuple[int, bytes]]:
    """(type, bytes) of each element: an 8-byte tag, then bytes up to a multiple of 8; or 4 bytes inside the tag."""
    found, at = [], 0
    while at + 8 <= len(data):
        (kind,) = struct.unpack_from(f"{order}I", data, at)
        if kind >> 16:
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            (size,) = struct.unpack_from(f"{order}I", data, at + 4)
            start = at + 8
            end = start + size + (0 if kind == 15 else -size % 8)
        if start + size > len(data):
            raise ValueError(f"it ends {start + size - len(data):,} bytes early")
        found.append((kind, data[start : start + size]))
        at = end
    return found


def _matrix(data: bytes, order: str, depth: int) -> tuple[str, Any]:
    if not data:
        return "", np.zeros((0, 0))
    if depth > 8:
        raise ValueError("nested too deep")
    (_, flags), (_, sizes), (_, label), *parts = _elements(data, order)
    kind = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
    shape = np.frombuffer(sizes, f"{order}i4").tolist()
    name = label.decode("latin-1")
    if kind == 1:
        return name, [_matrix(body, order, depth + 1)[1] for _, body in parts]
    if kind == 2:
        (_, width), (_, text), *parts = parts
        step = struct.unpack(f"{order}i", width)[0]
        if step <= 0:
            raise ValueError("a struct with fields of no name")
        fields = [text[i : i + step].split(b"\0")[0].decode("latin-1") for i in range(0, len(text), step)]
        values = [_matrix(body, order, depth + 1)[1] for _, body in parts]
        return name, [dict(zip(fields, values[i : i + len(fields)], strict=True))
                      for i in range(0, len(values), len(fields) or 1)]  # fmt: skip
    if kind == 4:
        code, body = parts[0] if parts else (16, b"")
        text_code = TEXTS[code] + ({"<": "-le", ">": "-be"}[order] if code in (4, 17, 18) else "")
        return name, body.decode(text_code)
    if 6 <= kind <= 15:
        code, body = parts[0]
        return name, np.frombuffer(body, order + NUMBERS[code]).reshape(shape, order="F")
    raise ValueError(f"variable {name!r} is of class {kind}, neither numbers, text, cell nor struct")
