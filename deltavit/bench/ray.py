"""The engine on many machines: each piece of work is one task of a Ray cluster.

The suite's process alone writes records; results travel to it through Ray, so nodes need to share no file system.
Where they do share the suite's folder, pieces work in it, and a piece whose node was lost goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import __version__
from ..core.errors import TrainingError
from ..core.sealed import write_bytes
from ..store import FolderLock
from .engine import Done
from .work import failure, work

MARK = ".nodes"
"""File beside the work folders by which a node knows whether it sees the suite's own file system."""
WAIT = 60.0
"""Seconds in which a cluster must have a node that a piece fits on."""
RELEASE = 120
"""Seconds after which the lock of a lost process is gone, on a network file system too."""


class Ray:
    """Tasks of a Ray cluster; at most twice as many are given to it as it has places.

    Those that wait there tell an autoscaler how much is to be done, and start without a pause.

    Args:
        address: `ray://HOST:10001` (through the cluster's client server), `ray:auto` (the cluster that this machine
            belongs to), `ray:HOST:6379` (a cluster by its head), or `ray:local` (one of this machine alone, which
            nobody else can reach).
        cpus: processors of a piece, and the threads of its torch.
        gpus: GPUs of a piece, of which it sees no others; 0.25 lets four pieces share one.
        memory: bytes that a piece declares; Ray counts them when it chooses a node, and does not enforce them.
        env: environment variables of the pieces.
    """

    def __init__(
        self,
        address: str = "ray:auto",
        *,
        cpus: float = 1,
        gpus: float = 0,
        memory: int | None = None,
        env: dict[str, str] | None = None,
    ):
        if not re.fullmatch(r"ray://[^/:]+:\d+|ray:(auto|local|[^/:]+:\d+)", address):
            raise TrainingError(
                f"{address!r} is no Ray cluster: ray://HOST:10001, ray:HOST:6379, ray:auto or ray:local"
            )
        if cpus < 0 or gpus < 0 or not cpus + gpus:
            raise TrainingError(f"a piece must take some processor or GPU, got cpus = {cpus:g} and gpus = {gpus:g}")
        self.address, self.env = address, dict(env or {})
        self.needs = {name: n for name, n in (("CPU", cpus), ("GPU", gpus), ("memory", memory)) if n}
        self._running: dict[Any, tuple[str, str]] = {}
        self._marks: dict[Path, str] = {}
        self._seen = (-1.0, 0)

    def __enter__(self) -> Ray:
        self._ray = _connect(self.address)
        try:
            until = time.monotonic() + (0 if self.address == "ray:local" else WAIT)
            while not self._places():
                if time.monotonic() > until:
                    raise TrainingError(self._none_fits())
                time.sleep(1)
            cpus, gpus = self.needs.get("CPU", 0), self.needs.get("GPU", 0)
            self._task = self._ray.remote(
                num_cpus=cpus, num_gpus=gpus, memory=self.needs.get("memory"), max_retries=0,
                runtime_env={"env_vars": self.env} if self.env else None,
            )(_piece)  # fmt: skip
            self._plan = {"threads": max(1, int(cpus)), "gpu": bool(gpus), "version": __version__}
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # the cluster may be what has failed
            for task in self._running:
                self._ray.cancel(task, force=True)
            if self._running:
                self._ray.wait(list(self._running), num_returns=len(self._running), timeout=5)
        self._running.clear()
        self._ray.shutdown()

    @property
    def free(self) -> int:
        asked, places = self._seen
        if time.monotonic() > asked + 1:
            places = self._places()
            self._seen = (time.monotonic(), places)
        return 2 * max(1, places) - len(self._running)

    def start(self, key: str, spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: str) -> None:
        place = Path(folder).absolute()
        needed = {k: found[k] for k in (spec.get("study"), spec.get("head")) if k in found}
        self._running[self._task.remote(spec, needed, str(place), self._mark(place.parent), **self._plan)] = (
            key,
            folder,
        )

    def finished(self, timeout: float) -> list[Done]:
        if not self._running:
            return []
        try:
            ready, _ = self._ray.wait(list(self._running), timeout=timeout)
            if ready:
                ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            return [self._collect(task) for task in ready]
        except (ConnectionError, self._ray.exceptions.RaySystemError) as why:
            raise TrainingError(
                f"the Ray cluster at {self.address} is gone ({_line(why)}); run the suite again"
            ) from None

    def _collect(self, task: Any) -> Done:
        key, folder = self._running.pop(task)
        told = self._ray.exceptions
        lost = (told.NodeDiedError, told.WorkerCrashedError, told.OutOfMemoryError, told.LocalRayletDiedError,
                told.ObjectLostError)  # fmt: skip
        try:
            result, error, files = self._ray.get(task)
        except lost as why:
            line = f"its node or its process was lost ({type(why).__name__}: {_line(why)})"
            return Done(key, error={"line": line, "traceback": str(why)[-8000:]}, lost=True)
        except told.RaySystemError:
            raise
        except told.RayError as why:
            line = f"its node could not begin it ({_line(why)}): each needs deltavit {__version__}"
            return Done(key, error={"line": line, "traceback": str(why)[-8000:]})
        for name, content in files.items():
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_bytes(Path(folder) / Path(name).name, content)
        return Done(key, result, error)

    def _places(self) -> int:
        """Pieces that the nodes alive now could hold at once, were there nobody else."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(name, 0) / n + 1e-9) for name, n in self.needs.items()) for node in nodes)

    def _none_fits(self) -> str:
        def told(have: dict[str, float]) -> str:
            return f"{have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU, {have.get('memory', 0) / 2**30:.0f} GiB"

        nodes = sorted({told(node["Resources"]) for node in self._ray.nodes() if node["Alive"]})
        return (
            f"no node of {self.address} can hold a piece that takes {told(self.needs)}: they have {'; '.join(nodes)}. "
            "Lower --cpus or --gpus, or start such a node"
        )

    def _mark(self, parent: Path) -> str:
        """A lasting name for this suite's folder on nodes that cannot see it, and a word that is new each time."""
        if parent not in self._marks:
            path = parent / MARK
            before = re.match(r"[0-9a-f]{16}\b", path.read_text("utf-8")) if path.is_file() else None
            self._marks[parent] = f"{before[0] if before else secrets.token_hex(8)} {secrets.token_hex(8)}"
            parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, self._marks[parent].encode())
        return self._marks[parent]


def _connect(address: str) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to Ray's makers
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "ray:local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: listen on the loopback address only
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # and to nobody else on this machine
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    elif address != "ray:auto":
        host, _, port = address.removeprefix("ray:").removeprefix("//").rpartition(":")
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as why:
            raise TrainingError(
                f"no Ray cluster answers at {address} ({why}): start it with `ray start --head`"
            ) from None
    try:
        import ray
    except ImportError:
        raise TrainingError(f"{address} needs Ray: pip install 'deltavit[ray]'") from None
    try:
        ray.init(address if address.startswith("ray://") else address.removeprefix("ray:"), **options)
    except ImportError as why:
        raise TrainingError(f"{address} needs Ray's client ({_line(why)}): pip install 'deltavit[ray]'") from None
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as why:
        raise TrainingError(f"cannot join the Ray cluster {address}: {_line(why)}") from None
    return ray


def _piece(
    spec: dict[str, Any],
    found: dict[str, dict[str, Any]],
    folder: str,
    mark: str,
    threads: int,
    gpu: bool,
    version: str,
) -> tuple[dict[str, Any] | None, dict[str, str] | None, dict[str, bytes]]:
    """On a node: the result or the error, and the files that the suite's folder must have but cannot see here."""
    if not gpu:  # a GPU that was not asked for belongs to somebody else
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(threads)
    try:
        if version != __version__:
            raise TrainingError(
                f"the node {socket.gethostname()} has deltavit {__version__}, the suite {version}: install the same"
            )
        place = _place(Path(folder), mark)
        if shared := place == Path(folder):
            _wait_for(place)
        result = work(spec, found, str(place))
        files = {}
        if not shared:
            if spec.get("keep_adapters"):
                files = {p.name: p.read_bytes() for p in place.iterdir() if p.is_file() and p.name[0] != "."}
            shutil.rmtree(place, ignore_errors=True)
        return result, None, files
    except Exception as error:
        return None, failure(error), {}


def _place(folder: Path, mark: str) -> Path:
    """The folder itself where this node sees it, else one that only we can open, the same for each try."""
    with contextlib.suppress(OSError):
        if (folder.parent / MARK).read_text("utf-8") == mark:
            return folder
    own = Path(tempfile.gettempdir()) / f"deltavit-{mark.split()[0]}"
    own.mkdir(mode=0o700, exist_ok=True)
    return own / folder.name


def _wait_for(folder: Path) -> None:
    """A process that was cut off from the cluster may live a moment longer than its node."""
    for _ in range(RELEASE):
        try:
            with FolderLock(folder):
                return
        except TrainingError:
            time.sleep(1)


def _line(why: BaseException) -> str:
    """What an error of Ray says in one line: the first, or of a remote traceback the last."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()] or [type(why).__name__]
    return lines[-1 if any(line.startswith("Traceback") for line in lines) else 0][:300]
