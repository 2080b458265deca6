"""Run a suite: search, train, record; whatever is done already is not done again.

OUT/suite.json      the suite as read
OUT/records/        a file for each cell: what `deltavit report` reads
OUT/studies/        a file for each search, and what it needs to go on
OUT/runs/           cells under way, each an ordinary run folder with its checkpoints
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.attach import attach
from ..core.errors import DataError
from ..core.sealed import shown, write_bytes
from ..core.site import anatomy
from ..data.digits import write_digits
from ..data.protocols import EMBEDDED
from ..models import load_model, skeleton
from ..store import FolderLock
from ..train.run import open_splits, pick_device
from .engine import Done, Engine, Local
from .record import SUFFIX, read_record, write_record
from .suite import Cell, Study, Suite, differs
from .work import forget

TRIES = 2
"""How often a piece is started whose worker or node was lost."""


@dataclass(frozen=True)
class Outcome:
    """A cell or a search that has just ended.  `done` of `total` cells have a result or have failed."""

    key: str
    kind: str
    result: dict[str, Any] | None
    error: str | None
    done: int
    total: int


def bench(
    suite: Suite,
    out: str | Path,
    engine: Engine | None = None,
    *,
    only: str | None = None,
    retry: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Generator[Outcome, None, list[dict[str, Any]]]:
    """Carry out what a suite still lacks; yields each cell and search as it ends, returns all records.

    Args:
        out: the suite's folder, of which one process at a time is the owner.
        engine: where; without it, one worker process here.
        only: a pattern such as `*~lora~*`; of the cells, those whose keys match.
        retry: also the cells that have failed before.
        stop: asked between two pieces; after it says yes nothing new is begun and what runs is ended, to continue
            from its checkpoint another time.

    Raises:
        DataError: data sets are missing; nothing has begun.
        TrainingError: another process owns the folder.
        FileError: the disk refuses; every record written before is still there.
    """
    out = Path(out)
    cells = [cell for cell in suite.cells() if only is None or fnmatch.fnmatch(cell.key, only)]
    if not cells:
        raise DataError(f"no cell matches {only!r}; a key is like {next(suite.cells()).key}")
    _present(suite)
    with FolderLock(out):
        write_bytes(out / "suite.json", (suite.model_dump_json(indent=1, exclude={"folder"}) + "\n").encode())
        desk = _Desk(out, cells, dict(_records(out / "records", cells, say)), retry)
        tries: Counter[str] = Counter()
        running: dict[str, Cell | Study] = {}
        with engine or Local() as place:
            while (desk.todo or running) and not stop():
                for piece in desk.ready():
                    if not place.free:
                        break
                    if piece.key not in running:
                        running[piece.key] = piece
                        tries[piece.key] += 1
                        spec = piece.spec()
                        needs = {key: desk.found[key] for key in (spec.get("study"), spec["head"]) if key is not None}
                        place.start(piece.key, spec, needs, str(desk.folder(piece)))
                for end in place.finished(timeout=1.0):
                    piece = running.pop(end.key)
                    if end.lost and tries[end.key] < TRIES:
                        say(f"{end.key}: {(end.error or {}).get('line')}; it is tried again")
                    else:
                        yield from desk.settle(piece, end, tries[end.key])
        return [desk.records[cell.key] for cell in cells if cell.key in desk.records]


class _Desk:
    """What of a suite is done and what is not, on disk and in memory."""

    def __init__(self, out: Path, cells: Sequence[Cell], records: dict[str, dict[str, Any]], retry: bool):
        self.out, self.records, self.total = out, records, len(cells)
        self.todo = {c.key: c for c in cells if c.key not in records or (retry and _has_failed(records[c.key]))}
        self.found: dict[str, dict[str, Any]] = {}
        """Results of searches."""
        self.errors: dict[str, dict[str, str]] = {}
        """Of searches that failed."""

    def folder(self, piece: Cell | Study) -> Path:
        return self.out / ("runs" if isinstance(piece, Cell) else "studies") / piece.key

    def ready(self) -> Iterator[Cell | Study]:
        """What can begin now, in the order of the cells: a cell whose search is done, or else that search."""
        seen = set()
        for cell in list(self.todo.values()):
            piece: Cell | Study = cell
            while (needed := piece.study if isinstance(piece, Cell) else piece.head) and not self._has(needed):
                piece = needed
            if piece.key not in seen:
                seen.add(piece.key)
                yield piece

    def settle(self, piece: Cell | Study, end: Done, tries: int) -> Iterator[Outcome]:
        """Write down how a piece ended."""
        if isinstance(piece, Cell):
            record = {**piece.head(), "status": "done", "attempts": tries, **(end.result or {})}
            yield self._record(piece, record if end.result is not None else _failed(piece, end, tries))
            if end.result is not None and not piece.suite.keep_adapters:
                forget(self.folder(piece))
            return
        if end.result is not None:
            self.found[end.key] = end.result
            (self.out / "studies").mkdir(parents=True, exist_ok=True)
            write_bytes(self._file(piece), (json.dumps(end.result, indent=1) + "\n").encode())
        else:
            self.errors[end.key] = end.error or {}
            for cell in [c for c in self.todo.values() if self._hopeless(c.study)]:
                yield self._record(cell, _failed(cell, end, 0, "its search failed: "))
        error = None if end.error is None else end.error["line"]
        yield Outcome(end.key, "search", end.result, error, self.total - len(self.todo), self.total)

    def _record(self, cell: Cell, record: dict[str, Any]) -> Outcome:
        told = self.records[cell.key] = write_record(self.out / "records", record)
        del self.todo[cell.key]
        error = told["error"]["line"] if _has_failed(told) else None
        return Outcome(cell.key, "run", None if error else told, error, self.total - len(self.todo), self.total)

    def _has(self, study: Study) -> bool:
        if study.key not in self.found and self._file(study).is_file():
            with contextlib.suppress(ValueError):  # torn by another program: the search goes through its trials again
                self.found[study.key] = json.loads(self._file(study).read_text(encoding="utf-8"))
        return study.key in self.found

    def _file(self, study: Study) -> Path:
        return self.out / "studies" / (study.key + SUFFIX)

    def _hopeless(self, study: Study | None) -> bool:
        return study is not None and (study.key in self.errors or self._hopeless(study.head))


def _present(suite: Suite) -> None:
    """Refuse missing data sets, all in one line, before anything begins; make those that need nothing but a package."""
    for task in suite.protocol.tasks:
        if task.builder == EMBEDDED and task.name in suite.sets:
            write_digits(Path(suite.place(suite.data.root)) / task.name)
    suite.protocol.find(suite.place(suite.data.root), suite.sets)


def _records(folder: Path, cells: Sequence[Cell], say: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    for cell in cells:
        path = folder / (cell.key + SUFFIX)
        if path.is_file():
            try:
                record = read_record(path)
                if change := differs(record, cell):
                    raise DataError(f"{shown(path)} was run with {change}")
                yield cell.key, record
            except DataError as why:
                aside = path.with_suffix(".aside")
                path.replace(aside)
                say(f"{why}; it is now {aside.name}, and its cell runs again")


def _failed(cell: Cell, end: Done, tries: int, why: str = "") -> dict[str, Any]:
    error = {"line": "no reason given", "traceback": "", **(end.error or {})}
    error["line"] = why + error["line"]
    return {**cell.head(), "status": "failed", "attempts": tries, "recipe": cell.recipe.plain(), "error": error}


def _has_failed(record: dict[str, Any]) -> bool:
    return bool(record["status"] == "failed")


# --- dry run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a suite will take.  `seconds` of one worker, from a measured step of each method; None: not measured.

    `disk` in bytes: records, adapters where they are kept, and checkpoints of one run at a time.
    """

    cells: int
    done: int
    studies: int
    trials: int
    pictures: int
    seconds: float | None
    disk: int
    missing: list[str]
    rows: list[dict[str, Any]]


def estimate(suite: Suite, out: str | Path | None = None, *, measure: bool = True) -> Estimate:
    """Cells, trials, time and disk of a suite, of which only what is still to be done counts for time.

    Args:
        measure: time one training step of every method on every model, on this device, with random weights.
    """
    cells = list(suite.cells())
    folder = None if out is None else Path(out) / "records"
    done = {c.key for c in cells if folder is not None and (folder / (c.key + SUFFIX)).is_file()}
    left = [c for c in cells if c.key not in done]
    sizes, missing = {}, []
    for name in suite.sets:
        try:
            sizes[name] = _size(suite, name)
        except DataError as why:
            missing.append(str(why))
    costs: dict[tuple[str, str], dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    for cell in left:
        pair = (cell.model, cell.method)
        if pair not in costs:
            costs[pair] = {"model": cell.model, "method": cell.method, "pictures": 0, **_cost(cell, models, measure)}
        costs[pair]["pictures"] += _pictures(cell.recipe.train.epochs, cell, sizes.get(cell.set))
    studies = {s.key: s for c in left if (s := c.study) is not None}
    studies |= {h.key: h for s in list(studies.values()) if (h := s.head) is not None}
    trials = 0
    for study in studies.values():
        count = _trials(study)
        trials += count
        epochs = study.settings.epochs or study.recipe.train.epochs
        row = costs.get((study.model, study.method))
        if row is not None:
            row["pictures"] += count * _pictures(epochs, study, sizes.get(study.set), joined=False)
    for row in costs.values():
        row["seconds"] = None if row["per_picture"] is None else row["per_picture"] * row["pictures"]
    told = [row["seconds"] for row in costs.values()]
    kept = sum(costs[c.model, c.method]["bytes"] for c in left) if suite.keep_adapters else 0
    transient = 6 * max((row["bytes"] for row in costs.values()), default=0)
    return Estimate(
        len(cells), len(done), len(studies), trials, sum(row["pictures"] for row in costs.values()),
        None if None in told else sum(told), kept + transient + 20_000 * len(cells), missing, list(costs.values()),
    )  # fmt: skip


def _size(suite: Suite, name: str) -> tuple[int, int, int]:
    """Pictures of train, val and test; from the protocol, or else from the data themselves."""
    task = next((t for t in suite.protocol.tasks if t.name == name), None)
    if task is not None and task.train is not None:
        return task.train, task.val or 0, task.test or 0
    section = suite.recipe(next(iter(suite.models)), suite.methods[0], name, None, 0).data
    path = suite.protocol.find(suite.place(suite.data.root), [name])[name]
    data = open_splits(section.model_copy(update={"path": str(path)}))
    return len(data.train), len(data.val), 0 if data.test is None else len(data.test)


def _pictures(epochs: int, piece: Cell | Study, size: tuple[int, int, int] | None, joined: bool | None = None) -> int:
    """Pictures that go through a training step; those that are only evaluated cost about a third."""
    if size is None:
        return 0
    train, val, test = size
    task = next((t for t in piece.suite.protocol.tasks if t.name == piece.set), None)
    if piece.shots is not None and task is not None and task.classes is not None:
        train, val = task.classes * piece.shots, min(val, task.classes * min(piece.shots, 4))
    if joined is None:
        joined = piece.recipe.data.train_on == "train+val"
    read = test if isinstance(piece, Cell) else 0
    return epochs * (train + val if joined else train) + (read + (0 if joined else epochs * val)) // 3


def _trials(study: Study) -> int:
    settings = study.settings
    if settings.sampler == "grid":
        return math.prod(len(v) for v in study.space.values() if isinstance(v, list))
    return 6 * 15 if settings.sampler == "elevater" else settings.trials  # 7 coarse points and a climb of about 8 each


def _cost(cell: Cell, models: dict[str, nn.Module], measure: bool) -> dict[str, Any]:
    """Seconds of a training step for each picture, and bytes of what is trained; `models` keeps those made."""
    recipe = cell.recipe
    device = pick_device(recipe.device)
    task = next((t for t in cell.suite.protocol.tasks if t.name == cell.set), None)
    classes = [str(i) for i in range((task.classes if task else None) or 10)]
    if cell.model not in models:
        section = recipe.model.model_copy(update={"weights": "random"})
        made = load_model(**section.model_dump()) if measure else skeleton(section.name, section.image_size)
        models[cell.model] = made.to(device) if measure else made
    model = models[cell.model]
    adapter = attach(model, recipe.build_method(), classes=classes)
    size = 4 * (adapter.trainable_parameters + adapter.head_size)
    if not measure:
        adapter.detach()
        return {"per_picture": None, "bytes": size}
    model.to(device).train()
    few = recipe.train.batch_size if device.type != "cpu" else min(2, recipe.train.batch_size)
    side = anatomy(model).preprocessing.size
    x, y = torch.randn(few, 3, side, side, device=device), torch.zeros(few, dtype=torch.long, device=device)
    best = math.inf
    for _ in range(2):
        began = time.perf_counter()
        F.cross_entropy(model(x).float(), y).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        for p in adapter.parameters():
            p.grad = None
    adapter.detach()
    return {"per_picture": best / few, "bytes": size}
