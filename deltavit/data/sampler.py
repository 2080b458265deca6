"""Which picture comes when: a pure function of (seed, epoch, position), so any position can be jumped to.

The raw stream of Philox is fixed by its definition (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
so an order does not change with the version of numpy, as the shuffles of its `Generator` may.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ORDER, DRAWS = 0, 1


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of 0 .. n - 1 in which an epoch visits its pictures, int64."""
    return np.argsort(_stream(seed, epoch, ORDER).random_raw(n), kind="stable")


def draws(seed: int, epoch: int, index: int) -> np.ndarray:
    """Four random uint64 that belong to one picture in one epoch."""
    return np.asarray(_stream(seed, epoch, DRAWS, index).random_raw(4), dtype=np.uint64)


def batches(
    seed: int,
    epoch: int,
    n: int,
    batch_size: int,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The batches of one epoch from number `start` on: (number in the epoch, my indices, all indices).

    The global batch is the same for any world size; each rank takes a contiguous part of it, and the parts differ by
    one picture at most.  The last batch may be short, and with more ranks than pictures some parts are empty.

    Raises:
        ValueError: no such rank, or a batch size below 1.
    """
    if batch_size < 1 or not 0 <= rank < world or start < 0:
        raise ValueError(f"no batch of {batch_size} for rank {rank} of {world} from number {start}")
    chosen = order(seed, epoch, n)
    count = n // batch_size if drop_last else -(-n // batch_size)
    for step in range(start, count):
        every = chosen[step * batch_size : (step + 1) * batch_size]
        yield step, np.array_split(every, world)[rank], every


def _stream(seed: int, epoch: int, purpose: int, index: int = 0) -> np.random.Philox:
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, index, purpose], dtype=np.uint64))
