"""A search: trials one after the other, each an ordinary run in a folder of its own.

    search.json          what is searched, and how; another search in the same folder is refused
    search.db            the study, where no other storage is given
    trials/NAME/         a run for each set of values, without its adapter
    trials.json          all trials that have ended, a pure function of the study
    best.toml            the recipe with the best values

Best is the highest accuracy on val after the last epoch; of equal ones the smaller train.lr, then the first tried.
The test split is never read.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field

from ..core.errors import DataError, DeltavitError, FileError, ModelError, TrainingError
from ..core.file import ADAPTER
from ..core.sealed import write_bytes, write_json
from ..store import FolderLock, claim
from ..train.fit import Step
from ..train.recipe import Recipe, Section
from ..train.run import run
from .ledger import Ledger
from .samplers import Point, distributions, halved, propose
from .space import Plan, Range, Space, Value, Values, checked, described, kind, name_of, placed

FORMAT = 1
GIVE_UP = 5
"""Processes that may die over a trial at the same step before it counts as failed; a killed one is tried again."""
POLL = 5.0
"""Seconds between looks at what other processes of a shared search have done."""


class Search(Section):
    """How to search."""

    sampler: Literal["grid", "tpe", "random", "elevater"] = "tpe"
    pruner: Literal["none", "halving"] = "none"
    trials: int = Field(default=20, ge=1)
    """Different values that `tpe` and `random` try; `grid` and `elevater` end by themselves."""
    epochs: int | None = Field(default=None, ge=1)
    """Of a trial; None: as many as the recipe's."""
    seed: int = Field(default=0, ge=0)
    """Of the sampler; trials are trained with the recipe's own."""
    storage: str | None = None
    """URL of a database that several processes may share, as SQLAlchemy reads it; None: SQLite in the folder."""


@dataclass(frozen=True)
class Trial:
    """Values that were tried, and what came of it.  `number` counts from 0, in the order of first tries."""

    number: int
    values: dict[str, Value]
    accuracy: float | None
    """On val after the last epoch, in [0, 1]; None where it was pruned or failed."""
    epochs: int
    seconds: float
    """Of training, over all processes that had a part in it."""
    state: Literal["complete", "pruned", "failed"]
    error: str | None = None


@dataclass(frozen=True)
class Found:
    """The best values, their accuracy on val, all trials that ended, and the given recipe with these values in it."""

    values: dict[str, Value]
    accuracy: float
    trials: tuple[Trial, ...]
    recipe: Recipe


def search(
    recipe: Recipe,
    space: Space,
    settings: Search,
    out: str | Path,
    *,
    keep: bool = False,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[int, Step | None], None] = lambda number, step: None,
) -> Generator[Trial, None, Found]:
    """Search; yields each trial as it ends, and not those that had ended before.

    Killed, closed or interrupted at any moment, the same call goes on: no trial is lost, and none is trained twice.

    Args:
        space: key of the recipe -> a list of values, or a `Range`, or a table {low, high, log, step}.
        out: may hold the same search, and then it goes on, with more trials if `settings.trials` grew.
        keep: also keep the adapter of each trial.
        watch: called after each step of a trial with its number, and with None while others are waited for; whatever
            it raises stops the search, which a later call continues.

    Raises:
        TrainingError: no Optuna, all trials failed, another process works here, or the folder holds another search.
        RecipeError, MethodError: a key or a value that the recipe or its method refuses.
        DataError, ModelError, FileError: what no trial could do without: the pictures, the model, the disk.
    """
    out = Path(out)
    if not recipe.data.path:
        raise TrainingError("no data: give --data FOLDER, or data.path in the recipe")
    plan = checked(recipe, space, settings.sampler, settings.epochs)
    whole = {key for key, told in plan.items() if isinstance(told, Range) and kind(recipe, key) is int}
    said = _definition(recipe, plan, settings)
    name = "deltavit-" + hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        if settings.storage is None:
            stack.enter_context(FolderLock(out))
        claim(out / "search.json", said, "search")
        ledger = Ledger(settings.storage or out / "search.db", name, distributions(plan, whole))
        stack.callback(ledger.close)
        work = _Work(recipe, settings, out, ledger, keep, say, watch)
        if buried := ledger.bury():
            say(f"{buried} unfinished trial{'s' * (buried > 1)} of an earlier process will go on")
        for point in (points := ledger.points()):
            if point.state in ("complete", "pruned", "failed"):
                work.tidy(point.values)
        while True:
            values = next((point.values for point in points if point.state == "dead"), None) or propose(
                plan, settings.sampler, settings.trials, settings.seed, points, whole
            )
            if values is not None:
                if work.trial(values, points):
                    points = ledger.points()
                    trial = next(trial for trial in _trials(points) if trial.values == values)
                    _write(out, said, points, recipe)
                    yield trial
                    continue
            elif not any(point.state == "running" for point in points):
                break
            else:
                watch(len(points), None)
                time.sleep(POLL)
                ledger.bury()
            points = ledger.points()
        if settings.sampler in ("tpe", "random") and len(points) < settings.trials:
            say(f"the space holds nothing new after {len(points)} trials")
        return _write(out, said, points, recipe) or _nothing(points)


class _Work:
    """Trials of one search, in this process."""

    def __init__(
        self,
        recipe: Recipe,
        settings: Search,
        out: Path,
        ledger: Ledger,
        keep: bool,
        say: Callable[[str], None],
        watch: Callable[[int, Step | None], None],
    ):
        told: Values = {"data.train_on": "train"}  # a protocol's last training is on val too; a trial is judged on it
        if settings.epochs is not None:
            told["train.epochs"] = settings.epochs
        self.recipe, self.halving = placed(recipe, told), settings.pruner == "halving"
        self.out, self.ledger, self.keep, self.watch = out, ledger, keep, watch
        self.say = functools.cache(say)  # each line once: trials have most of theirs in common

    def trial(self, values: Values, points: list[Point]) -> bool:
        """Try values to the end; false where another process has them."""
        folder = _folder(self.out, values)
        number = next((i for i, point in enumerate(points) if point.values == values), len(points))
        others = [point.curve or {} for i, point in enumerate(points) if i != number]
        if self.ledger.shared:
            with FolderLock(folder):  # a process that the database thinks dead may still be at work
                pass
        trial = self.ledger.claim(values, _step(folder))
        if trial is None:
            return False
        if number < len(points) and points[number].stuck >= GIVE_UP:
            curve = points[number].curve or {}
            line = f"{points[number].stuck} processes died of it, one after the other, after epoch {len(curve)}"
            return self.ledger.settle(trial, "failed", epochs=len(curve), error=line)
        try:
            with self.ledger.alive(trial):
                told = self._train(trial, number, values, folder, others)
        except BaseException:
            with suppress(FileError):  # the database is what failed: then the trial is dead, which comes to the same
                self.ledger.release(trial)
            raise
        settled = self.ledger.settle(trial, **told)
        if settled:
            self.tidy(values)
        return settled

    def _train(
        self, trial: int, number: int, values: Values, folder: Path, others: list[Mapping[int, float]]
    ) -> dict[str, Any]:
        """Train as far as is worth it; what `settle` is to be told."""
        try:
            recipe = placed(self.recipe, values)
        except DeltavitError as error:  # values that are only refused together
            return {"state": "failed", "error": str(error)}
        if self.halving:  # which looks at every epoch
            recipe = recipe.model_copy(update={"train": replace(recipe.train, val_every=1)})
        epochs, curve = recipe.train.epochs, _curve(folder)
        for epoch, accuracy in curve.items():
            self.ledger.epoch(trial, epoch, accuracy)
        with closing(run(recipe, folder, resume=True, test=False, curves=False, say=self.say)) as steps:
            while True:
                if self.halving and halved(curve, others, epochs):
                    return {"state": "pruned", "epochs": max(curve), "seconds": _seconds(folder)}
                try:
                    step = next(steps)
                except StopIteration as end:
                    result = end.value
                    break
                except (DataError, ModelError, FileError, OSError):
                    raise  # no other values would do better
                except Exception as error:
                    told = {"state": "failed", "error": _failure(error, folder), "epochs": max(curve, default=0)}
                    return {**told, "seconds": _seconds(folder)}
                self.watch(number, step)
                if step.accuracy is not None:
                    curve[step.epoch + 1] = step.accuracy
                    self.ledger.epoch(trial, step.epoch + 1, step.accuracy)
        return {
            "state": "complete", "accuracy": result["val_accuracy"], "epochs": epochs,
            "seconds": result["train_seconds"],
        }  # fmt: skip

    def tidy(self, values: Values) -> None:
        """Delete what a trial that has ended needs no more."""
        folder = _folder(self.out, values)
        for path in folder.glob("*.safetensors"):
            if not (self.keep and path.name == ADAPTER):
                path.unlink(missing_ok=True)


# --- a trial's folder ------------------------------------------------------------------------------------------------


def _folder(out: Path, values: Values) -> Path:
    return out / "trials" / hashlib.sha256(name_of(values).encode()).hexdigest()[:12]


def _step(folder: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    return max((int(path.stem.split("-")[1]) for path in folder.glob("checkpoint-*.safetensors")), default=0)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the last line of a process that was killed
            rows.append(json.loads(line))
    return rows


def _curve(folder: Path) -> dict[int, float]:
    """Accuracy after each epoch that the run will not do again."""
    step = math.inf if (folder / "run.json").exists() else _step(folder)
    return {row["epoch"] + 1: row["accuracy"] for row in _rows(folder) if "accuracy" in row and row["step"] <= step}


def _seconds(folder: Path) -> float:
    rows = _rows(folder)
    return float(rows[-1]["seconds"]) if rows else 0.0


def _failure(error: Exception, folder: Path) -> str:
    """One line; what nobody foresaw also leaves its traceback in the folder."""
    line = " ".join(str(error).split())[:300]
    if not isinstance(error, DeltavitError):
        line = f"{type(error).__name__}: {line}"
        with suppress(FileError):
            write_bytes(folder / "error.txt", "".join(traceback.format_exception(error)).encode())
    if torch.cuda.is_available():  # out of memory, perhaps: the next trial begins with all of it
        error.__traceback__ = None
        gc.collect()
        torch.cuda.empty_cache()
    return line


# --- the search's folder ---------------------------------------------------------------------------------------------


def _definition(recipe: Recipe, plan: Plan, settings: Search) -> dict[str, Any]:
    """What makes a search this one, as JSON has it; where it runs, and for how many trials, it may change."""
    plain = recipe.plain()
    del plain["device"], plain["data"]["workers"]
    told = settings.model_dump(include={"sampler", "pruner", "epochs", "seed"})
    return json.loads(json.dumps({"format": FORMAT, **told, "space": described(plan), "recipe": plain}))  # type: ignore[no-any-return]


def _trials(points: Sequence[Point]) -> list[Trial]:
    return [
        Trial(i, dict(p.values), p.accuracy, p.epochs, p.seconds, p.state, p.error)
        for i, p in enumerate(points)
        if p.state in ("complete", "pruned", "failed")
    ]


def _best(trials: Sequence[Trial]) -> Trial | None:
    complete = [trial for trial in trials if trial.state == "complete" and trial.accuracy is not None]
    return min(complete, key=lambda t: (-(t.accuracy or 0.0), t.values.get("train.lr", 0.0), t.number), default=None)


def _write(out: Path, said: dict[str, Any], points: Sequence[Point], recipe: Recipe) -> Found | None:
    """`trials.json` and `best.toml` as they are now; None while no trial is complete."""
    trials = _trials(points)
    best = _best(trials)
    curves = {i: {str(e): a for e, a in sorted((point.curve or {}).items())} for i, point in enumerate(points)}
    told = [
        {**asdict(trial), "curve": curves[trial.number], "folder": f"trials/{_folder(out, trial.values).name}"}
        for trial in trials
    ]
    write_json(out / "trials.json", {**said, "best": best and best.number, "trials": told})
    if best is None or best.accuracy is None:
        return None
    chosen = placed(recipe, best.values)
    write_bytes(out / "best.toml", chosen.toml().encode())
    return Found(best.values, best.accuracy, tuple(trials), chosen)


def _nothing(points: Sequence[Point]) -> NoReturn:
    first = next((point for point in points if point.error), None)
    line = f"; the first with {_told(first.values)}: {first.error}" if first else ""
    raise TrainingError(f"none of {len(points)} trials came to an end{line}")


def _told(values: Values) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())
