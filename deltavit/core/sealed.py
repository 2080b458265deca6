"""One sealed safetensors file: adapters and checkpoints are both this.

    8 bytes      n, the length of the header, little-endian
    n bytes      JSON: {"__metadata__": {"deltavit": our header, as JSON in a string, "format": "1", "sha256": seal},
                        name: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, ..}, padded with spaces
    the rest     the tensors, one after the other, no gap

The seal is the SHA-256 of the whole file with the seal itself read as 64 zeros, so any flipped bit is found.  It says
nothing about who wrote the file: whoever can change a file can seal it again.

Any safetensors reader opens these files.  We write the few bytes of the format ourselves: safetensors 0.8 puts the
metadata in another random order at each save, and we promise the same bytes for the same tensors and header.  We read
it ourselves to refuse a hostile file before its payload costs memory.  Nothing here ever opens a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import FileError

FORMAT = 1
LIMIT = 1 << 20
"""Bytes that a header may have; packed, an adapter's has a few thousand."""
MOST = 10_000
"""Tensors that a file may have."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TEMPORARY = ".deltavit-*.tmp"
"""What a save that was killed leaves beside its file."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ZEROS = b"0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # a quote inside a JSON string is escaped, so no string can fake it
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(.+)", re.DOTALL)

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Name of each tensor -> its dtype as safetensors writes it ("F32") and its shape."""
Expected = Mapping[str, tuple[str | None, tuple[int, ...]]]
"""The same, where None takes any dtype."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself.  Only `read` checks the seal, so until then it is only a claim."""

    meta: dict[str, Any]
    tensors: Shapes  # in the order of the payload
    bytes: int  # of the whole file


class Refused(FileError):
    """Why some bytes are not a file of ours; whoever knows the path puts it in front."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """Write a file that is either wholly there, and on the disk, or not there at all.

    A file that was at `path` stays valid until the new one takes its place.  The same tensors and header give the same
    bytes.  Tensors may be anywhere, of any strides, and share memory.

    Returns:
        The size of the file in bytes.

    Raises:
        FileError: the disk refuses (full, read-only, ..), or `read` would refuse the result (dtype, header too long).
    """
    try:
        pieces = _sealed(tensors, header)
    except Refused as why:
        raise FileError(f"cannot write {shown(path)}: {why}") from None
    return write_bytes(path, *pieces)


def write_bytes(path: str | os.PathLike[str], *pieces: bytes | memoryview) -> int:
    """Write bytes so that the file is either wholly there, and on the disk, or not at all; their number.

    Raises:
        FileError: the disk refuses; a file that was there before is still there.
    """
    try:
        _swap_in(Path(path), [memoryview(piece) for piece in pieces])
    except (OSError, ValueError) as why:  # ValueError: a path with a NUL or a lone surrogate
        raise FileError(f"cannot write {shown(path)}: {reason(why)}") from None
    return sum(map(len, pieces))


def write_json(path: str | os.PathLike[str], value: Any) -> int:
    """Write a value as JSON for people to read, as `write_bytes` writes; the number of bytes."""
    return write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_header(path: str | os.PathLike[str], *, limit: int = LIMIT, follow: bool = False) -> Header:
    """What the file claims to hold, at the cost of its header alone.  `follow=True` takes a symbolic link too.

    Raises:
        FileError: not a regular file, not of ours, of a newer format, torn, or with a header above `limit` bytes.
    """
    with _opened(path, follow) as file:
        return _head(file, limit)[1]


def read(
    path: str | os.PathLike[str],
    expect: Expected | None = None,
    *,
    finite: bool = True,
    limit: int = LIMIT,
    follow: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and our header, after every check; each tensor owns its memory.

    Args:
        expect: names, dtypes and shapes that the file must have, neither more nor less.  Compared with the header
            before anything of the payload is read, so a file that lies about its rank costs nothing.
        finite: refuse NaN and Inf.

    Raises:
        FileError: as `read_header`; names, dtypes or shapes that are not `expect`; a broken seal; NaN or Inf.
    """
    with _opened(path, follow) as file:
        head, header = _head(file, limit)
        if expect is not None:
            _compare(header.tensors, expect)
        hashed = hashlib.sha256(_SEAL.sub(b'"sha256":"%s"' % _ZEROS, head))
        tensors = {}
        for name, (code, shape) in header.tensors.items():
            tensors[name] = torch.empty(shape, dtype=DTYPES[code])
            piece = _bytes(tensors[name])
            if file.readinto(piece) != len(piece):
                raise Refused("it was cut while we read it")
            hashed.update(piece)
            if code == "BOOL" and tensors[name].view(torch.uint8).gt(1).any():
                raise Refused(f"{name!r} has a truth value that is neither 0 nor 1")
        if _SEAL.findall(head) != [hashed.hexdigest().encode()]:
            raise Refused("its seal does not match, so bytes of it have changed; copy or train it again")
        bad = [name for name, t in tensors.items() if finite and t.is_floating_point() and not t.isfinite().all()]
        if bad:
            raise Refused(f"NaN or Inf in {_some(bad)}; the run that wrote it diverged")
    return tensors, header.meta


def layout(tensors: Mapping[str, Tensor]) -> Shapes:
    """dtype and shape of each tensor, as `read(expect=..)` takes them."""
    return {name: (_code(name, t), tuple(t.shape)) for name, t in tensors.items()}


# Packing: 12 blocks times 12 tensors are 144 entries of a header, or 12 when the blocks are stacked.


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack `blocks.0.x`, `blocks.3.x`, .. of one dtype and shape into one `blocks.*.x`, blocks in increasing order.

    What has no such siblings keeps its name and shape, and so do siblings that differ in dtype or shape.
    """
    packed = {}
    for name, members in _groups({name: (t.dtype, t.shape) for name, t in tensors.items()}).items():
        packed[name] = torch.stack([tensors[m].detach() for m in members]) if members else tensors[name]
    return packed


def packed_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shapes:
    """The layout that `pack` gives to tensors of the layout `shapes`; nothing is allocated."""
    packed = {}
    for name, members in _groups(shapes).items():
        code, shape = shapes[members[0] if members else name]
        packed[name] = (code, (len(members), *shape) if members else shape)
    return packed


def unpack(packed: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Undo `pack`: the tensors called `names`, in that order; those that were stacked are views.

    Raises:
        FileError: a name without a tensor, a tensor without a name, or more or fewer blocks than names.
    """
    names = list(names)
    members = defaultdict(list)
    for name in names:
        if name not in packed:
            members[_packed_name(name)].append(name)
    if set(members) | set(names) & set(packed) != set(packed):
        unknown, missing = set(packed) - set(names) - set(members), set(members) - set(packed)
        raise FileError(f"packed tensors do not fit: missing {_some(missing)}; not expected {_some(unknown)}")
    tensors = {name: packed[name] for name in names if name in packed}
    for stacked, some in members.items():
        if packed[stacked].shape[:1] != (len(some),):
            raise FileError(f"{stacked!r} should stack {len(some)} blocks, and has shape {list(packed[stacked].shape)}")
        tensors.update(zip(sorted(some, key=_block), packed[stacked], strict=True))
    return {name: tensors[name] for name in names}


def _groups(kinds: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Packed name -> the names that are stacked under it; no names for a tensor that stays as it is."""
    siblings = defaultdict(list)
    for name in kinds:
        siblings[_packed_name(name)].append(name)
    groups: dict[str, list[str]] = {}
    for stacked, some in siblings.items():
        if len(some) > 1 and stacked not in kinds and len({kinds[name] for name in some}) == 1:
            groups[stacked] = sorted(some, key=_block)
        else:
            groups.update((name, []) for name in some)
    return groups


def _packed_name(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    return f"blocks.*.{match[2]}" if match else name


def _block(name: str) -> int:
    return int(name.split(".")[1])


# Writing


def _sealed(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> list[memoryview]:
    """The bytes of the file: its head, then those of each tensor."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so each one is aligned
    payload = [_bytes(tensors[name].detach().cpu().contiguous()) for name in order]
    entries: dict[str, Any] = {
        "__metadata__": {"deltavit": _dump(header), "format": str(FORMAT), "sha256": _ZEROS.decode()}
    }
    end = 0
    for name, piece in zip(order, payload, strict=True):
        if name == "__metadata__":
            raise Refused("safetensors keeps the name '__metadata__' for itself")
        begin, end = end, end + len(piece)
        t = tensors[name]
        entries[name] = {"dtype": _code(name, t), "shape": list(t.shape), "data_offsets": [begin, end]}
    text = _dump(entries, sort=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT:
        raise Refused(f"its header would have {len(text):,} bytes, above the limit of {LIMIT:,}; pack the tensors")
    parse(text, end)  # what we would not read we do not write
    head = len(text).to_bytes(8, "little") + text
    hashed = hashlib.sha256(head)
    for piece in payload:
        hashed.update(piece)
    head = _SEAL.sub(b'"sha256":"%s"' % hashed.hexdigest().encode(), head)
    return [memoryview(head), *payload]


def _dump(value: Any, sort: bool = True) -> str:
    try:
        text = json.dumps(
            dict(value),
            sort_keys=sort,
            separators=(",", ":"),
            allow_nan=False,
            ensure_ascii=False,
            check_circular=False,
        )
        text.encode()
    except (TypeError, ValueError, RecursionError) as why:
        raise Refused(f"its header is not plain JSON: {_line(why)}") from None
    return text


def _swap_in(target: Path, pieces: list[memoryview]) -> None:
    """Write beside the target, push to the disk, take its place; only a kill leaves the temporary file behind."""
    temporary = target.parent / TEMPORARY.replace("*", secrets.token_hex(8))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(temporary, flags, 0o666)
        try:
            for piece in pieces:
                while piece:
                    piece = piece[os.write(handle, piece) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Push a new or renamed entry of the folder to the disk: until then, a power cut can bring the old file back."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as why:
        if why.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


# Reading


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], follow: bool) -> Iterator[BufferedReader]:
    """A regular file, open for reading; whatever is refused inside becomes one FileError with the path in front."""
    try:
        with contextlib.ExitStack() as stack:
            try:
                _only_regular(Path(path).stat(follow_symlinks=follow))  # before open, which can hang or act on a device
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                flags |= getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
                handle = os.open(path, flags)
                file = stack.enter_context(os.fdopen(handle, "rb"))
                _only_regular(os.fstat(handle))  # it may have been swapped in between
            except ValueError as why:  # a path with a NUL or a lone surrogate
                raise Refused(str(why)) from None
            yield file
    except (OSError, Refused) as why:
        raise FileError(f"cannot read {shown(path)}: {reason(why)}") from None


def _only_regular(found: os.stat_result) -> None:
    kinds = {stat.S_IFLNK: "symbolic link", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"it is a {kinds.get(stat.S_IFMT(found.st_mode), 'device')}, not a regular file")


def _head(file: BufferedReader, limit: int) -> tuple[bytes, Header]:
    """The first bytes of the file, up to the payload, and what they say."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(limit, size - 8):
        if first[:2] == b"PK" or (first[:1] == b"\x80" and first[1:2] in (b"\2", b"\3", b"\4", b"\5")):
            raise Refused("it is not a safetensors file; deltavit never opens pickles")
        if 2 <= length <= limit:
            raise Refused(f"it is torn: its header has {length:,} bytes, the whole file {size:,}; copy it again")
        raise Refused(
            f"it is not a safetensors file: {size:,} bytes, a header of {length:,}, and the limit is {limit:,}"
        )
    text = file.read(length)
    if text[:1] != b"{":
        raise Refused("it is not a safetensors file; deltavit never opens pickles")
    return first + text, parse(text, size - 8 - length)


def parse(text: bytes, payload: int) -> Header:
    """Check the header of a safetensors file of ours against the number of bytes after it.

    Raises:
        Refused: on anything that is not exactly as `write` would have it.
    """
    entries = _load(text, "header")
    ours = entries.pop("__metadata__", None)
    if not isinstance(ours, dict) or not {"deltavit", "format", "sha256"} <= set(ours):
        raise Refused("it has no deltavit header, so another program wrote it")
    if not all(isinstance(value, str) for value in ours.values()):
        raise Refused("its metadata are not all text")
    if not re.fullmatch("[1-9][0-9]{0,5}", ours["format"]):
        raise Refused("its format is not a number")
    if int(ours["format"]) > FORMAT:
        raise Refused(f"it is of format {ours['format']}, this deltavit reads up to {FORMAT}; upgrade deltavit")
    if len(_SEAL.findall(text)) != 1:
        raise Refused("it has no seal")
    if len(entries) > MOST:
        raise Refused(f"it has {len(entries):,} tensors, above the limit of {MOST:,}")
    parts = sorted((_entry(name, entry) for name, entry in entries.items()), key=lambda part: part[:2])
    at = 0
    for begin, end, name, _, _ in parts:
        if begin != at:
            raise Refused(
                f"its tensor {_brief(name)} leaves a gap or overlaps another: it begins at {_brief(begin)}, not {at}"
            )
        at = end
    if at != payload:
        raise Refused(f"it is torn: its tensors need {_brief(at)} bytes, it has {payload:,}; copy it again")
    tensors = {name: (code, shape) for _, _, name, code, shape in parts}
    return Header(_load(ours["deltavit"].encode(), "deltavit header"), tensors, 8 + len(text) + payload)


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Where a tensor begins and ends, its name, dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"its tensor {_brief(name)} is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise Refused(f"its tensor {_brief(name)} has dtype {_brief(code)}; known: {', '.join(DTYPES)}")
    for numbers, most in ((shape, 16), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > most or any(type(n) is not int or n < 0 for n in numbers):
            raise Refused(f"its tensor {_brief(name)} has an impossible shape or place: {_brief(numbers)}")
    item = DTYPES[code].itemsize
    if math.prod(max(n, 1) for n in shape) * item >= 1 << 63:  # torch counts strides even where there is nothing
        raise Refused(f"its tensor {_brief(name)} has an impossible shape: {_brief(shape)}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * item:
        raise Refused(f"its tensor {_brief(name)}, {code} {shape}, does not fill the place {_brief(offsets)}")
    return offsets[0], offsets[1], name, code, tuple(shape)


def _load(text: bytes, what: str) -> dict[str, Any]:
    """JSON, and strictly: an object, no key twice, no NaN or Inf, no half surrogate, no deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key comes twice")
        return made

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"the number {_brief(digits)}")
        return value

    try:
        with _uncollected():
            value = json.loads(text.decode(), object_pairs_hook=unique, parse_float=number, parse_constant=number)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half of one would break whoever prints it
    except RecursionError:
        raise Refused(f"its {what} is nested too deep") from None
    except ValueError as why:
        raise Refused(f"its {what} is not plain JSON: {_line(why)}") from None
    if not isinstance(value, dict):
        raise Refused(f"its {what} is not a JSON object")
    return value


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which a MiB of empty lists sets off until a second is gone, beside a model."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _compare(found: Shapes, expect: Expected) -> None:
    problems = []
    if missing := [name for name in expect if name not in found]:
        problems.append(f"missing {_some(missing)}")
    if extra := [name for name in found if name not in expect]:
        problems.append(f"not expected {_some(extra)}")
    wrong = []
    for name, (code, shape) in expect.items():
        if name in found and found[name] != (code or found[name][0], tuple(shape)):
            has, wants = found[name], f"{code or ''} {list(shape)}".strip()
            wrong.append(f"{_brief(name)} is {has[0]} {list(has[1])}, expected {wants}")
    if wrong:
        problems.append(", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    if problems:
        raise Refused("its tensors do not fit: " + "; ".join(problems))


def _bytes(t: Tensor) -> memoryview:
    return t.reshape(-1).view(torch.uint8).numpy().data


def _code(name: str, t: Tensor) -> str:
    if t.dtype not in _CODES:
        raise Refused(f"{_brief(name)} is {t.dtype}, which a file cannot hold; known: {', '.join(DTYPES)}")
    return _CODES[t.dtype]


# One line


def reason(why: BaseException) -> str:
    """What went wrong, and for the usual refusals of a disk the way out."""
    if not isinstance(why, OSError):
        return _line(why)
    hints = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "your quota is used up; free some space or choose another folder",
        errno.EROFS: "choose another folder",
        errno.EACCES: "you may not; choose another folder or ask its owner",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ENOENT: "check the path",
    }
    hint = hints.get(why.errno or 0)
    return (why.strerror or str(why)) + (f"; {hint}" if hint else "")


def shown(path: str | os.PathLike[str]) -> str:
    """A path as one printable line of at most 200 characters."""
    text = str(path)
    text = text if len(text) <= 200 else f"{text[:80]}...{text[-117:]}"
    return text if text.isprintable() else ascii(text)


def _line(why: BaseException) -> str:
    return " ".join(str(why).split())[:300]


def _brief(value: Any) -> str:
    """A value from a file nobody vouches for: it may be long, or no text at all."""
    if isinstance(value, int) and abs(value) >= 1 << 70:
        return "an enormous number"
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value[:4]))}{', ..' if len(value) > 4 else ''}]"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > 60:
        return ascii(value[:57]) + ".."
    return ascii(value)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(_brief, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
