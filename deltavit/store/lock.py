"""One process per run folder."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from ..core import sealed as file
from ..core.errors import FileError, TrainingError

_FAR = 1 << 30  # Windows forbids others to read a locked byte, so we lock one that is not there

if sys.platform == "win32":
    import msvcrt

    def _take(handle: int) -> None:
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

    def _drop(handle: int) -> None:
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _drop(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


class FolderLock:
    """`with FolderLock(run_folder): ..`; the folder is made if need be.

    The system drops the lock when the process ends, however it ends; the file `.lock` stays and means nothing.

    Raises:
        TrainingError: another process has the folder; the line says which.
        FileError: the folder cannot be made or locked.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        if self._handle is not None:
            raise RuntimeError(f"this lock on {self.folder} is already taken")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            handle = os.open(self.folder / ".lock", flags, 0o666)
        except OSError as why:
            raise FileError(f"cannot lock {file.shown(self.folder)}: {file.reason(why)}") from None
        try:
            _take(handle)
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except (BlockingIOError, PermissionError):
            who = _holder(handle)
            os.close(handle)
            line = f"{file.shown(self.folder)} is in use by {who}; wait for it, or choose another --out"
            raise TrainingError(line) from None
        except OSError as why:
            os.close(handle)
            raise FileError(f"cannot lock {file.shown(self.folder)}: {file.reason(why)}") from None
        self._handle = handle
        _held.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:  # we are a fork of the process that has the lock
            return
        _held.discard(self)
        handle, self._handle = self._handle, None
        try:
            os.ftruncate(handle, 0)
            _drop(handle)
        finally:
            os.close(handle)


_held: set[FolderLock] = set()


def _holder(handle: int) -> str:
    """Who has the lock, as its owner writes it into the file right after taking it."""
    for _try in range(20):
        os.lseek(handle, 0, os.SEEK_SET)
        pid, _, host = os.read(handle, 300).decode(errors="replace").strip().partition(" ")
        if pid.isdecimal():
            return f"process {pid}" + ("" if host == socket.gethostname() else f" on {file.shown(host)}")
        time.sleep(0.005)
    return "another process"


def _forget() -> None:
    """A forked worker shares our lock, and would keep it after we are killed: close it there."""
    for lock in _held:
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
