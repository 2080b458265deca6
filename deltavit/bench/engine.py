"""Where pieces of work are carried out.  The local engine: worker processes of this machine, each watched.

A piece that raises fails alone.  A worker that dies (killed for memory, a crash in native code) takes its piece with
it, and the suite decides whether to try that again; a new worker takes its place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

PATIENCE = 1.0
"""Seconds between two looks at the memory of the workers."""


@dataclass(frozen=True)
class Done:
    """How a piece of work ended: with a result, with an error that it raised, or `lost` with its worker."""

    key: str
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    lost: bool = False


class Engine(Protocol):
    """Carries out `work` somewhere.  `free` says how many more pieces may be started now."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all that still runs; what a piece has written to its folder lets it continue another time."""

    @property
    def free(self) -> int: ...

    def start(self, key: str, spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: str) -> None: ...

    def finished(self, timeout: float) -> list[Done]:
        """What has ended since the last call, after waiting up to `timeout` seconds for the first."""


class Here:
    """This very process, one piece at a time: for a debugger, and for small suites.  It cannot survive a crash."""

    def __init__(self) -> None:
        self._ended: list[Done] = []

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def free(self) -> int:
        return int(not self._ended)

    def start(self, key: str, spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: str) -> None:
        from .work import failure, work

        try:
            self._ended.append(Done(key, work(spec, found, folder)))
        except Exception as error:
            self._ended.append(Done(key, error=failure(error)))

    def finished(self, timeout: float) -> list[Done]:
        ended, self._ended = self._ended, []
        return ended


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    device: str | None
    key: str | None = None
    over: str | None = None


class Local:
    """Worker processes on this machine.

    Args:
        workers: how many pieces run at once.
        devices: given to the workers in turn, `cuda:0` say; without it each recipe's own device.
        threads: of each worker's torch; None: the processors shared evenly.
        memory: bytes that a worker may have resident; above it, it is killed and its piece fails with a line.
    """

    def __init__(
        self, workers: int = 1, *, devices: Sequence[str] = (), threads: int | None = None, memory: int | None = None
    ):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.threads = threads or max(
            1, len(os.sched_getaffinity(0)) // workers if hasattr(os, "sched_getaffinity") else 1
        )
        self.memory = memory
        self._places = [devices[i % len(devices)] if devices else None for i in range(workers)]
        self._workers: list[_Worker] = []

    def __enter__(self) -> Local:
        self._workers = [self._begin(place) for place in self._places]
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            self._end(worker)

    @property
    def free(self) -> int:
        return sum(worker.key is None for worker in self._workers)

    def start(self, key: str, spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: str) -> None:
        i = next(i for i, worker in enumerate(self._workers) if worker.key is None)
        worker = self._workers[i]
        if worker.device is not None:
            spec = {**spec, "recipe": {**spec["recipe"], "device": worker.device}}
        try:
            worker.pipe.send((spec, found, folder))
        except OSError:  # it died while it had nothing to do
            self._end(worker)
            worker = self._workers[i] = self._begin(worker.device)
            worker.pipe.send((spec, found, folder))
        worker.key = key

    def finished(self, timeout: float) -> list[Done]:
        until = time.monotonic() + timeout
        while True:
            busy = {worker.pipe: i for i, worker in enumerate(self._workers) if worker.key is not None}
            left = until - time.monotonic()
            ready = wait(list(busy), max(0.0, min(PATIENCE, left))) if busy else []
            ended = [self._collect(busy[pipe]) for pipe in ready]  # type: ignore[index]
            if ended or left <= 0 or not busy:
                return ended
            self._watch()

    def _collect(self, i: int) -> Done:
        worker = self._workers[i]
        key, worker.key = worker.key, None
        assert key is not None
        try:
            result, error = worker.pipe.recv()
            return Done(key, result, error)
        except (EOFError, OSError):
            self._end(worker)
            self._workers[i] = self._begin(worker.device)
            if worker.over is not None:
                return Done(key, error={"line": worker.over, "traceback": ""})
            code = worker.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return Done(
                key, error={"line": f"its process ended ({how}), perhaps for memory", "traceback": ""}, lost=True
            )

    def _watch(self) -> None:
        if self.memory is None:
            return
        for worker in self._workers:
            used = _resident(worker.process.pid)
            if worker.key is not None and used > self.memory:
                worker.over = (
                    f"it took {used / 2**30:.1f} GiB of memory, the limit is {self.memory / 2**30:.1f}: "
                    "raise --memory, or lower train.batch_size or raise train.accumulate"
                )
                worker.process.kill()

    def _begin(self, device: str | None) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.threads), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, device)

    def _end(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection, threads: int) -> None:
    """A worker's life: one piece after the other, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group; the suite decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    import torch

    from .work import failure, work

    torch.set_num_threads(threads)
    while True:
        try:
            spec, found, folder = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Any, Any] = (work(spec, found, folder), None)
        except Exception as error:
            answer = (None, failure(error))
        with contextlib.suppress(OSError):
            pipe.send(answer)


def _die_with(parent: int) -> None:
    """A suite that is killed cannot tell its workers: they look whether it is still there."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _resident(pid: int) -> int:
    """Bytes of memory that a process has resident; 0 where the system does not tell."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
