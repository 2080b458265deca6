"""The last few states of a run, of which the newest good one always survives a crash."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import sealed as file
from ..core.errors import FileError

_NAME = re.compile(r"checkpoint-([0-9]{9,18})\.safetensors")


class Checkpoints:
    """`checkpoint-000001200.safetensors`, .. in one folder; only one process may save at a time, see `FolderLock`.

    A step counts once `save` has returned: then its file is whole and on the disk.  `notes` has one line for each file
    that the last `save` or `latest` could not delete or use.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self.notes: list[str] = []

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:09d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
        """Save, and only when that is on the disk, delete what is older than the newest `keep` up to this step.

        Files of later steps stay: after a restart from an older checkpoint they are torn, and overwritten in time.

        Raises:
            FileError: the disk refused; everything saved before is still there.
        """
        if step < 0:
            raise ValueError(f"a step cannot be {step}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as why:
            raise FileError(f"cannot make the folder {file.shown(self.folder)}: {file.reason(why)}") from None
        path = self.path(step)
        file.write(path, tensors, {"checkpoint": step, "state": dict(header)})
        self.notes = []
        older = [old for old in self._steps() if old < step]
        for old in [self.path(old) for old in older[self.keep - 1 :]] + list(self.folder.glob(file.TEMPORARY)):
            try:
                old.unlink(missing_ok=True)
            except OSError as why:
                self.notes.append(f"cannot delete {file.shown(old)}: {file.reason(why)}")
        return path

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Step, tensors and header of the newest checkpoint that is whole, or None; changes nothing on the disk.

        A file that is torn, changed, or no checkpoint of this step is passed over with a note.
        """
        self.notes = []
        for step in self._steps():
            try:
                tensors, header = file.read(self.path(step), finite=False)  # sealed, so it is what the run had
                if header.get("checkpoint") != step or not isinstance(header.get("state"), dict):
                    raise FileError(f"{file.shown(self.path(step))} is not the checkpoint of step {step}")
            except FileError as why:
                self.notes.append(f"skipped: {why}")
            else:
                return step, tensors, header["state"]
        return None

    def _steps(self) -> list[int]:
        """Newest first."""
        try:
            names = {path.name for path in self.folder.iterdir()}
        except FileNotFoundError:
            return []
        except OSError as why:
            raise FileError(f"cannot look into {file.shown(self.folder)}: {file.reason(why)}") from None
        steps = (int(match[1]) for match in map(_NAME.fullmatch, names) if match)
        return sorted({step for step in steps if self.path(step).name in names}, reverse=True)
