"""The pictures of a split as tensors, decoded once and kept in memory where they fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import DataError, unknown
from ..core.site import Preprocessing
from .decode import decode
from .splits import Split
from .transforms import to_tensor

POLICIES = ("error", "skip", "miss")


class Images:
    """Reads pictures by their index.  A broken one is never replaced by another picture or label.

    Args:
        broken: `error` raises at the first one.  `skip` (training) reports it as not ok, up to `ceiling` of them and
            never a whole class.  `miss` (evaluation) reports it as not ok without limit; the caller counts it as wrong.
        cache_bytes: memory for decoded pictures, by default a quarter of what is free, 2 GiB at most.  A split that
            does not fit is decoded anew each time.
        workers: threads that decode; 0 decodes in the caller's.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        broken: str = "error",
        ceiling: int = 0,
        cache_bytes: int | None = None,
        workers: int = 2,
    ):
        if broken not in POLICIES:
            raise DataError(unknown("policy for broken pictures", broken, POLICIES))
        self.split, self.preprocessing = split, preprocessing
        self.policy, self.ceiling, self.workers = broken, ceiling, workers
        self._labels = torch.tensor(split.labels, dtype=torch.int64)
        self._broken: dict[int, str] = {}
        self._cached: set[int] = set()
        self._cache: Tensor | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Tensor | DataError]] = {}
        shape = (len(split), *self._shape)
        if torch.Size(shape).numel() <= (_default_budget() if cache_bytes is None else cache_bytes):
            self._cache = torch.empty(shape, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def broken(self) -> list[str]:
        """One line for each broken picture met so far."""
        return list(self._broken.values())

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, s, s] uint8, labels [B] int64, ok [B] bool; where not ok, the picture is zeros.

        Raises:
            DataError: a broken picture, or more of them than the policy allows.
        """
        asked = [int(i) for i in indices]
        fresh = self._decode([i for i in dict.fromkeys(asked) if i not in self._cached and i not in self._broken])
        pictures = torch.zeros((len(asked), *self._shape), dtype=torch.uint8)
        for row, i in enumerate(asked):
            if i in fresh:
                pictures[row] = fresh[i]
            elif self._cache is not None and i in self._cached:
                pictures[row] = self._cache[i]
        ok = torch.tensor([i not in self._broken for i in asked], dtype=torch.bool)
        return pictures, self._labels[torch.tensor(asked, dtype=torch.int64)], ok

    def ahead(self, indices: Sequence[int]) -> None:
        """Begin to decode pictures that the next `batch` will ask for, while the caller does something else."""
        if self.workers:
            self._pool = self._pool or ThreadPoolExecutor(self.workers, "decode")
            for i in map(int, indices):
                if i not in self._cached and i not in self._broken and i not in self._coming:
                    self._coming[i] = self._pool.submit(self._one, i)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (3, self.preprocessing.size, self.preprocessing.size)

    def _decode(self, missing: list[int]) -> dict[int, Tensor]:
        if len(missing) > 1:
            self.ahead(missing)
        results = [self._coming.pop(i).result() if i in self._coming else self._one(i) for i in missing]
        good = {}
        for i, result in zip(missing, results, strict=True):
            if isinstance(result, DataError):
                self._note(i, result)
                continue
            good[i] = result
            if self._cache is not None:
                self._cache[i] = result
                self._cached.add(i)
        return good

    def _one(self, i: int) -> Tensor | DataError:
        try:
            image = decode(self.split.paths[i])
        except DataError as error:
            return error
        return to_tensor(image, self.preprocessing)

    def _note(self, i: int, error: DataError) -> None:
        if self.policy == "error":
            raise error
        self._broken[i] = str(error)
        if self.policy == "miss":
            return
        if len(self._broken) > self.ceiling:
            first = "; ".join(self.broken[:3])
            raise DataError(
                f"{len(self._broken)} broken pictures in {self.split.name}, {self.ceiling} allowed: {first}"
            )
        label = self.split.labels[i]
        if Counter(self.split.labels[b] for b in self._broken)[label] == self.split.labels.count(label):
            raise DataError(f"every picture of class number {label} in {self.split.name} is broken: {error}")


def _default_budget() -> int:
    return min(2 * 2**30, _free_memory() // 4)


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: a modest guess
        return 4 * 2**30
