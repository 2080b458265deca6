"""Protocols as data: which tasks a benchmark has, their sizes, what is trained on, and where the pictures are.

The facts are in `protocols.toml`; here is what reads them, finds the data under a root, and checks it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..core.errors import DataError, unknown
from .decode import shown
from .splits import Dataset

MANIFEST = "manifest.json"
"""What `deltavit data build` says about a folder that it made."""
LISTS_ONLY = "lists only"
EMBEDDED = "scikit-learn"
"""The builder of tasks whose pictures come in a package: a suite makes them by itself."""
CUT = "deltavit 1"
"""The name of our builder's cut; another number for another rule."""


@dataclass(frozen=True)
class Task:
    """One data set of a protocol.

    `train` and `val` count the pictures to train and to choose on, before any few-shot cut; `test` is the whole
    official test split.  `builder` names the reader in `deltavit.data.build` and `options` are its own; "lists only":
    there is none, and `notes` says why.  `golden` has the digests of the splits that our builder makes.
    """

    name: str
    title: str
    classes: int
    train: int
    val: int
    test: int
    group: str | None = None
    folders: tuple[str, ...] = ()
    source: str = ""
    builder: str = LISTS_ONLY
    options: Mapping[str, Any] = field(default_factory=dict)
    hub_label: str | None = None
    notes: str = ""
    golden: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The folders in which it may be, its own name first."""
        return tuple(dict.fromkeys((self.name, *self.folders)))


@dataclass(frozen=True)
class Protocol:
    """How numbers of one kind are made: tasks, splits, what the last training is on, resize, and the seeds.

    Args:
        train_on: of the final training, "train" or "train+val".
        cut: how our builder makes splits: "thousand" (a few of all official training pictures), or "whole" (all of
            them, with val cut off where there is no official one).
        normalisation: the habits of pixel normalisation in use with it; which one a run had is in its record.
        shots: of few-shot protocols; else empty.
        seeds: the same.
    """

    name: str
    title: str
    source: str
    tasks: tuple[Task, ...]
    train_on: str
    resize: str
    cut: str
    normalisation: tuple[str, ...] = ()
    epochs: int | None = None
    shots: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    notes: str = ""

    @property
    def open(self) -> bool:
        """Whether any folder is a task."""
        return not self.tasks

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Names of tasks by group, in order; empty where there are no groups."""
        found: dict[str, tuple[str, ...]] = {}
        for task in self.tasks:
            if task.group is not None:
                found[task.group] = (*found.get(task.group, ()), task.name)
        return found

    def task(self, name: str) -> Task:
        """The task of that name, or with a folder of that name.

        Raises:
            DataError: there is none.
        """
        for task in self.tasks:
            if name in task.names:
                return task
        raise DataError(unknown(f"task of {self.name}", name, [task.name for task in self.tasks]))

    def find(self, root: str | Path, tasks: Iterable[str] | None = None) -> dict[str, Path]:
        """Where the pictures of tasks are: ROOT/NAME, under any name in use.

        Args:
            tasks: their names; all of them, if not said.

        Raises:
            DataError: some are not there; the line names all of them and where they were looked for.
        """
        root = Path(root)
        names = [task.name for task in self.tasks] if tasks is None else list(tasks)
        folders = {name: (name,) if self.open else self.task(name).names for name in names}
        found = {name: next((root / f for f in folders[name] if (root / f).exists()), None) for name in names}
        missing = [
            name if len(folders[name]) == 1 else f"{name} (nor {', '.join(folders[name][1:])})"
            for name, path in found.items()
            if path is None
        ]
        if not root.is_dir():
            raise DataError(f"{shown(root)} is not a folder; {', '.join(names)} of {self.name} must be in it")
        if missing:
            raise DataError(f"{shown(root)} has no {', no '.join(missing)}: {_way_out(self)}")
        return {name: path for name, path in found.items() if path is not None}

    def data(self, task: str, root: str | Path, *, shots: int | None = None, seed: int = 0) -> dict[str, Any]:
        """The [data] section of a recipe for a task; its `train_on` is that of the final training.

        Args:
            shots: pictures of each class, chosen by `seed`.

        Raises:
            DataError: no such task, its pictures are not there, or shots that this protocol does not have.
        """
        if shots is not None and self.shots and shots not in self.shots:
            raise DataError(f"{self.name} has {', '.join(map(str, self.shots))} shots, not {shots}")
        path = self.find(root, [task])[task]
        section: dict[str, Any] = {"path": str(path), "train_on": self.train_on}
        if not self.open and (path / "train").is_dir():  # folders of classes may leave val to be cut, lists may not
            section["val"] = self.task(task).val / (self.task(task).train + self.task(task).val)
        if shots is not None:
            section |= {"shots": shots, "shots_seed": seed}
        return section

    def check(self, task: str, dataset: Dataset) -> None:
        """That a data set, opened without a few-shot cut, is the one of this protocol.

        Always by its sizes; by its digests where `deltavit data build` made it.  Where all of the official training
        pictures are used, only train and val together are fixed: how many of them are val is a habit.

        Raises:
            DataError: a size or a digest differs; the line has both values.
        """
        if self.open:
            return
        told = self.task(task)
        test = 0 if dataset.test is None else len(dataset.test)
        sizes = [("classes", len(dataset.classes), told.classes), ("test", test, told.test)]
        sizes += [("train and val", len(dataset.whole), told.train + told.val)]
        if self.cut == "thousand":
            sizes += [("val", len(dataset.val), told.val)]
        wrong = [f"{what} {has:,} instead of {wanted:,}" for what, has, wanted in sizes if has != wanted]
        if wrong:
            raise DataError(
                f"{told.name} at {shown(dataset.train.root)} is not that of {self.name}: {', '.join(wrong)}"
            )
        for what, digests in (("when it was built", _built(dataset)), (f"in {self.name}", _golden(told, dataset))):
            for part in (dataset.train, dataset.val, dataset.test):
                if part is not None and digests.get(part.name, part.digest) != part.digest:
                    raise DataError(
                        f"{part.name} of {told.name} at {shown(part.root)} has the digest {part.digest[:12]}, "
                        f"{what} it was {digests[part.name][:12]}: a file has changed; remove it, build again"
                    )


def _manifest(dataset: Dataset) -> dict[str, Any]:
    """What our builder said of a folder; empty where it is of other making."""
    path = dataset.train.root / MANIFEST
    try:
        said = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}") from error
    return said if isinstance(said, dict) else {}


def _built(dataset: Dataset) -> dict[str, str]:
    said = _manifest(dataset)
    parts = {split: said.get(split) for split in ("train", "val", "test")}
    return {split: str(part["digest"]) for split, part in parts.items() if isinstance(part, dict) and "digest" in part}


def _golden(task: Task, dataset: Dataset) -> Mapping[str, str]:
    return task.golden if _manifest(dataset).get("cut") == CUT else {}


def _way_out(protocol: Protocol) -> str:
    return "put it there" if protocol.open else f"put it there, or make it with deltavit data build {protocol.name}"


@cache
def protocols() -> dict[str, Protocol]:
    """All protocols by name, as `protocols.toml` has them."""
    said = tomllib.loads(resources.files("deltavit.data").joinpath("protocols.toml").read_text("utf-8"))
    sets = said.pop("sets")
    return {name: _protocol(name, values, sets) for name, values in said.items()}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        DataError: there is none; the line names the nearest.
    """
    if name not in protocols():
        raise DataError(unknown("protocol", name, protocols()))
    return protocols()[name]


def _protocol(name: str, values: dict[str, Any], sets: dict[str, dict[str, Any]]) -> Protocol:
    tasks = values.pop("tasks", {})
    made = tuple(Task(**_tuples({"name": key} | sets.get(key, {}) | task)) for key, task in tasks.items())
    return Protocol(name=name, tasks=made, **_tuples(values))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
