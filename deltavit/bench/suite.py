"""A suite: models x methods x data sets x seeds x search, from one TOML file.

name = "digits"
seeds = [0, 1, 2]

[models.pico]                  # a label, and keys of a recipe's [model]
name = "vit_pico"

[data]
protocol = "folder"            # `deltavit data list` names them
root = "pictures"              # relative to this file
sets = ["digits"]

[train]                        # keys of a recipe's [train], for all
epochs = 10

[[methods]]
label = "LoRA r8"
method = {name = "lora", rank = 8}
train = {epochs = 20}          # where this one differs
space = {"train.lr" = [0.001, 0.01]}

[search]
sampler = "grid"
epochs = 4
space = {"train.lr" = [0.001, 0.003, 0.01]}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from ..core.errors import MethodError, RecipeError, unknown
from ..data.protocols import Protocol, protocol
from ..search import Search, default_space
from ..train.recipe import ModelSection, Recipe, Section, read_recipe
from .record import FORMAT

LABEL = re.compile(r"[^\x00-\x1f~]{1,60}")
PLACES = {"model": ("weights",), "data": ("path", "workers")}
"""Keys of a recipe that say where things lie, not what they are: they do not belong to a cell's identity."""


class SuiteData(Section):
    protocol: str = "folder"
    root: str = "."
    sets: list[str] | None = None
    """A part of the protocol's data sets; for `folder`, the folders."""
    shots: list[int] = Field(default_factory=list)
    train_on: Literal["train", "train+val"] | None = None
    """None: as the protocol says."""
    workers: int = Field(default=2, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    """More keys of a recipe's [data], for every set."""


class SuiteMethod(Section):
    method: str | dict[str, Any] | list[Any]
    label: str = ""
    train: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any] = Field(default_factory=dict)
    """Joined to the space of [search]; an empty list takes a key out of it."""

    @model_validator(mode="before")
    @classmethod
    def _labelled(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"method": value}
        if isinstance(value, dict) and not value.get("label") and "method" in value:
            value = {**value, "label": Recipe(method=value["method"]).build_method().name}
        return value


class SuiteSearch(Search):
    space: dict[str, Any] = Field(default_factory=dict)
    on: str = "each"
    """Each data set has a search of its own, or the one named here serves them all."""
    head: str | None = None
    """Label of the method, linear probing say, whose best `train.lr` is the head's rate in all others."""


class Suite(Section):
    name: str
    title: str = ""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2])
    models: dict[str, ModelSection]
    data: SuiteData = Field(default_factory=SuiteData)
    train: dict[str, Any] = Field(default_factory=dict)
    methods: list[SuiteMethod]
    search: SuiteSearch | None = None
    device: str = "auto"
    leaky: int = Field(default=0, ge=0)
    """Also report the best test accuracy over every so many epochs, in a column marked as leaky; 0: no."""
    keep_adapters: bool = False
    folder: str = "."
    """Where the suite's file lies: relative paths in it begin there."""

    @field_validator("seeds", "methods")
    @classmethod
    def _some(cls, value: list[Any]) -> list[Any]:
        if not value:
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _sound(self) -> Suite:
        labels = [entry.label for entry in self.methods]
        for kind, names in (("method", labels), ("model", list(self.models)), ("suite", [self.name])):
            for name in names:
                if not LABEL.fullmatch(name):
                    raise ValueError(f"{kind} label {name!r} must have 1 to 60 characters, none of them ~")
                if names.count(name) > 1:
                    raise ValueError(f"two methods are labelled {name!r}; give one of them another label")
        if self.search is not None and self.search.head is not None and self.search.head not in labels:
            raise ValueError(unknown("method of search.head", self.search.head, labels))
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed comes twice in {self.seeds}")
        return self

    @property
    def protocol(self) -> Protocol:
        return protocol(self.data.protocol)

    @property
    def sets(self) -> list[str]:
        known = [task.name for task in self.protocol.tasks]
        if self.data.sets is None:
            if not known:
                raise RecipeError(f"data.sets is missing: protocol {self.data.protocol!r} does not know the folders")
            return known
        for name in self.data.sets:
            if known and name not in known:
                raise RecipeError(unknown(f"data set in protocol {self.data.protocol}", name, known))
        return self.data.sets

    def place(self, path: str) -> str:
        """A path of the suite, relative to the suite's file."""
        return os.path.abspath(Path(self.folder) / path)

    def recipe(self, model: str, entry: SuiteMethod, name: str, shots: int | None, seed: int) -> Recipe:
        """What a cell trains before a search has chosen anything; its data may be missing still."""
        section = self.models[model].model_dump(exclude_none=True)
        weights = section.get("weights")
        if weights not in (None, "random"):
            section["weights"] = self.place(weights)
        data = {
            "train_on": self.data.train_on or self.protocol.train_on,
            "workers": self.data.workers,
            **self.data.options,
            **entry.data,
        }
        if shots is not None:
            data |= {"shots": shots, "shots_seed": seed}
        return read_recipe(
            model=section, method=_named(entry.method), data=data, train={**self.train, **entry.train, "seed": seed},
        ).model_copy(update={"device": self.device})  # fmt: skip

    def space(self, entry: SuiteMethod) -> dict[str, Any]:
        joined = {**(self.search.space if self.search else {}), **entry.space}
        if self.search is not None and self.search.sampler == "elevater":
            joined = {**default_space(Recipe(), "elevater"), **joined}
        return {key: choices for key, choices in joined.items() if choices != []}

    def entry(self, label: str) -> SuiteMethod:
        return next(entry for entry in self.methods if entry.label == label)

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed, so that a suite that is stopped early has whole columns."""
        for seed in self.seeds:
            for shots in self.data.shots or (None,):
                for model in self.models:
                    for name in self.sets:
                        for entry in self.methods:
                            yield Cell(self, model, entry.label, name, shots, seed)


@dataclass(frozen=True)
class Cell:
    """One training run of a suite."""

    suite: Suite
    model: str
    method: str
    set: str
    shots: int | None
    seed: int

    @cached_property
    def recipe(self) -> Recipe:
        return self.suite.recipe(self.model, self.suite.entry(self.method), self.set, self.shots, self.seed)

    @cached_property
    def study(self) -> Study | None:
        """The search that serves this cell; all seeds share it."""
        entry = self.suite.entry(self.method)
        if self.suite.search is None or not self.suite.space(entry):
            return None
        on = self.set if self.suite.search.on == "each" else self.suite.search.on
        return Study(self.suite, self.model, self.method, on, self.shots)

    @cached_property
    def key(self) -> str:
        """Name of the record: labels for people, and a digest of everything that decides the result."""
        study = self.study
        what = {
            "set": self.set, "protocol": self.suite.data.protocol, "recipe": _what(self.recipe),
            "leaky": self.suite.leaky, "study": study.key if study else None,
        }  # fmt: skip
        shots = "" if self.shots is None else f"~{self.shots}shot"
        return _key(f"{self.model}~{self.set}{shots}~{self.method}~{self.seed}", what)

    def spec(self) -> dict[str, Any]:
        """All that `work` needs, JSON-able."""
        study = self.study
        return {
            "kind": "cell", "key": self.key, "set": self.set, **_where(self.suite), "recipe": self.recipe.plain(),
            "study": study.key if study else None, "head": None, "leaky": self.suite.leaky,
            "keep_adapters": self.suite.keep_adapters,
        }  # fmt: skip

    def head(self) -> dict[str, Any]:
        """What every record begins with, done or failed."""
        task = next((t for t in self.suite.protocol.tasks if t.name == self.set), None)
        return {
            "format": FORMAT, "key": self.key, "suite": self.suite.name, "model": self.model, "method": self.method,
            "set": self.set, "group": task.group if task else None, "shots": self.shots, "seed": self.seed,
            "protocol": self.suite.data.protocol,
        }  # fmt: skip


@dataclass(frozen=True)
class Study:
    """One search: a method on a data set."""

    suite: Suite
    model: str
    method: str
    set: str
    shots: int | None

    @cached_property
    def settings(self) -> SuiteSearch:
        assert self.suite.search is not None
        return self.suite.search

    @cached_property
    def space(self) -> dict[str, Any]:
        return self.suite.space(self.suite.entry(self.method))

    @cached_property
    def recipe(self) -> Recipe:
        """Trained on train alone: val chooses."""
        seed = self.settings.seed
        made = self.suite.recipe(self.model, self.suite.entry(self.method), self.set, self.shots, seed)
        return made.model_copy(update={"data": made.data.model_copy(update={"train_on": "train"})})

    @cached_property
    def head(self) -> Study | None:
        """The study that chooses the head's learning rate for this one."""
        label = self.settings.head
        if label is None or label == self.method:
            return None
        return Study(self.suite, self.model, label, self.set, self.shots)

    @cached_property
    def key(self) -> str:
        told = self.settings.model_dump(exclude={"space", "on", "head", "storage"})
        head = self.head
        what = {
            "set": self.set, "protocol": self.suite.data.protocol, "recipe": _what(self.recipe), "space": self.space,
            "search": told, "head": head.key if head else None,
        }  # fmt: skip
        shots = "" if self.shots is None else f"~{self.shots}shot"
        return _key(f"{self.model}~{self.set}{shots}~{self.method}", what)

    def spec(self) -> dict[str, Any]:
        """All that `work` needs, JSON-able."""
        head = self.head
        return {
            "kind": "study", "key": self.key, "set": self.set, **_where(self.suite), "recipe": self.recipe.plain(),
            "space": self.space, "search": self.settings.model_dump(exclude={"space", "on", "head"}),
            "head": head.key if head else None,
        }  # fmt: skip


def read_suite(path: str | Path, changes: dict[str, Any] | None = None) -> Suite:
    """A suite from a TOML file.

    Args:
        changes: top-level keys, or `section.key`, that replace what the file says.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a value that does not fit; everything is checked here,
            also each method, its options and the keys to search, before anything runs.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the suite {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from None
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        into = data
        for section in sections:
            into = into.setdefault(section, {})
        into[last] = value
    try:
        suite = Suite(**{**data, "folder": str(path.parent)})
    except pydantic.ValidationError as error:
        raise RecipeError(f"{path.name}: {_line(error)}") from None
    first = next(iter(suite.models))
    for entry in suite.methods:  # a wrong method or option is found now, not after a night
        suite.recipe(first, entry, suite.sets[0], None, suite.seeds[0])
    return suite


def planned(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Title and cells of the suite that a folder of results was made from; nothing where it does not tell."""
    try:
        suite = Suite(**json.loads((folder / "suite.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecipeError):  # records alone, of several suites perhaps
        return "", []
    names = ("model", "method", "set", "shots", "seed")
    return suite.title or suite.name, [{name: getattr(cell, name) for name in names} for cell in suite.cells()]


def _line(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function"))
    if problem["type"] == "extra_forbidden":
        section: Any = Suite
        for part in problem["loc"][:-1]:
            kind = (
                section.model_fields[part].annotation if isinstance(part, str) and part in section.model_fields else {}
            )
            section = {"data": SuiteData, "search": SuiteSearch, "models": ModelSection, "methods": SuiteMethod}.get(
                str(part), kind if hasattr(kind, "model_fields") else section
            )
        return unknown(f"key {where.rpartition('.')[0] or 'at the top'}", str(problem["loc"][-1]), section.model_fields)
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower() + message[1:]}" if where else message


def _where(suite: Suite) -> dict[str, Any]:
    return {"protocol": suite.data.protocol, "root": suite.place(suite.data.root)}


def _named(method: Any) -> dict[str, Any]:
    return method if isinstance(method, dict) else Recipe(method=method).method


def _what(recipe: Recipe) -> dict[str, Any]:
    """What differs from the defaults: an option that a later version adds does not change who a cell is."""
    plain, usual = recipe.plain(), Recipe().plain()
    with contextlib.suppress(MethodError):  # one with options that it cannot do without
        usual["method"] = Recipe(method={"name": plain["method"]["name"]}).plain()["method"]
    usual["method"] = {k: v for k, v in usual["method"].items() if k != "name"}
    return {
        name: {k: v for k, v in plain[name].items() if k not in PLACES.get(name, ()) and usual[name].get(k) != v}
        for name in ("model", "method", "data", "train")
    }


def differs(record: dict[str, Any], cell: Cell) -> str:
    """Where a record was run with other values than its cell has now, as when a default has changed; else empty."""
    now = cell.recipe.plain()
    for name in ("model", "method", "train"):
        for key, value in record["recipe"][name].items():
            free = key in PLACES.get(name, ()) or f"{name}.{key}" in record.get("chosen", {})
            if not free and now[name].get(key, value) != value:
                return f"{name}.{key} = {value!r}, now {now[name][key]!r}"
    return ""


def _key(labels: str, what: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
    return re.sub(r"[^A-Za-z0-9~._-]+", "-", labels)[:120] + "~" + digest
