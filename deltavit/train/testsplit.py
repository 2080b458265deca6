"""The test split of a run, under lock: it is read once training is over, and every reading is on record.

Each reading is a line in `test-reads.jsonl`, on the disk before any picture is handed out, so that no crash hides one.
A run is clean if all its readings came after its last step and its result was read with one set of weights; reading
again with the same weights, after a kill, tells nobody anything new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FileError
from ..core.sealed import reason, shown
from ..data import Split

FILE = "test-reads.jsonl"


class TestSplit:
    """A test split whose pictures are to be had only by `open`.

    Args:
        folder: of the run, which keeps the record of readings.
    """

    __test__ = False  # not a test case of pytest's

    def __init__(self, split: Split, folder: Path):
        self._split, self.folder = split, folder

    def open(self, *, step: int, steps: int, weights: str, purpose: str = "result") -> Split:
        """The split, after writing down who reads it: `step` of `steps` is done, `weights` is their digest.

        Raises:
            FileError: the reading cannot be written down, so it does not take place.
        """
        line = json.dumps({"step": step, "steps": steps, "weights": weights, "for": purpose}) + "\n"
        path = self.folder / FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as why:
            raise FileError(f"cannot write {shown(path)}: {reason(why)}; the test split stays shut") from None
        return self._split


def readings(folder: Path) -> list[dict[str, Any]]:
    """All readings of a run's test split, each different one once."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except OSError as why:
        raise FileError(f"cannot read {shown(folder / FILE)}: {reason(why)}") from None
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill before the split was opened
            continue
        if row not in found:
            found.append(row)
    return found


def clean(read: Sequence[Mapping[str, Any]]) -> bool:
    """Whether test told the run nothing: no reading before the last step, one set of weights behind the result."""
    results = {row["weights"] for row in read if row["for"] == "result"}
    return all(row["step"] >= row["steps"] for row in read) and len(results) <= 1


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, names and bytes in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
