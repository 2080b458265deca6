"""Names that come from outside: what an adapter may be called, and where that is on the disk."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..core.errors import FileError
from ..core.sealed import shown

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")


def safe_name(text: str) -> str:
    """The text itself, if it can name an adapter on every system.

    Raises:
        FileError: characters outside a-z 0-9 . _ -, more than 64 of them, a first one that is no letter or digit, a
            dot at the end (Windows drops it), or a Windows device, with or without a suffix (`nul.txt`).
    """
    if not isinstance(text, str) or not _NAME.fullmatch(text) or text.endswith("."):
        why = "use 1 to 64 of a-z 0-9 . _ -, beginning with a letter or a digit and not ending in a dot"
        raise FileError(f"{ascii(text)[:80]} cannot be a name; {why}")
    if _DEVICE.fullmatch(text.split(".")[0]):
        raise FileError(f"{text!r} cannot be a name: Windows keeps it for a device")
    return text


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """Where `name` is, or would be, directly under `root`.

    Raises:
        FileError: an unsafe name, or one that is a symbolic link or has a second, hard link elsewhere.
    """
    path = Path(root).resolve() / safe_name(name)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return path
    except OSError as why:
        raise FileError(f"cannot look at {shown(path)}: {why.strerror}") from None
    if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
        raise FileError(f"{shown(path)} is a link; put the file itself there")
    return path
