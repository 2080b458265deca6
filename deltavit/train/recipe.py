"""A recipe: all that a training run is told, from TOML, from the command line, or from code, in one frozen object."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..core.errors import RecipeError, unknown
from ..core.method import Method
from ..core.method import method as build_method
from .fit import Training

NULLABLE = ("head_lr", "clip")
"""Keys of [train] that may be none, which TOML has no word for: they are written as "none"."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    name: str = "vit_pico"
    weights: str | None = None
    image_size: int | None = Field(default=None, ge=1)
    resize: Literal["squash", "crop"] = "squash"
    normalize: bool = False
    """Features of length 1 before the head, as CLIP and SigLIP compare them with texts."""
    pixels: Literal["checkpoint", "imagenet", "half", "clip", "none"] = "checkpoint"


class DataSection(Section):
    path: str = ""
    val: float = 0.1
    test: float = 0.1
    seed: int = 0
    """Of the split, where the data set has none of its own; apart from the seed of training."""
    train_list: str | None = None
    train_on: Literal["train", "train+val"] = "train"
    """`train+val`: the last training of a protocol, once all is chosen on val; there is no val accuracy then."""
    shots: int | None = Field(default=None, ge=1)
    shots_seed: int = 0
    broken: Literal["error", "skip"] = "error"
    ceiling: int = Field(default=0, ge=0)
    workers: int = Field(default=2, ge=0)


class Recipe(Section):
    """`[model]`, `[method]`, `[data]`, `[train]`; `[method]` has `name` and the options of that method.

    Several methods at once: `method = ["lora", {name = "bitfit", which = "linear"}]`, or `name = "lora+bitfit"` in
    `[method]` and the options of each under its name, `lora.rank = 4`.
    """

    model: ModelSection = ModelSection()
    method: dict[str, Any] = {"name": "lora"}
    data: DataSection = DataSection()
    train: Training = Training()
    device: str = "auto"

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return _section(value) if isinstance(value, (list, str)) else value

    @field_validator("train", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            fields = [f.name for f in dataclasses.fields(Training)]
            for key in value:
                if key not in fields:
                    raise RecipeError(unknown("key in [train]", key, fields))
            value = {k: None if v == "none" and k in NULLABLE else v for k, v in value.items()}
        return value

    def build_method(self) -> Method:
        options = dict(self.method)
        return build_method(options.pop("name", "lora"), **options)

    def plain(self) -> dict[str, Any]:
        """Nested dicts of plain values, the method with all its options written out; unset values left out."""
        data = self.model_dump()
        data["train"] |= {key: "none" for key in NULLABLE if data["train"][key] is None}
        made = self.build_method()
        data["method"] = {"name": made.name, **made.options()}
        return _without_none(data)  # type: ignore[no-any-return]

    def toml(self) -> str:
        """The recipe as TOML: reading it gives the same recipe."""
        plain = self.plain()
        lines = [f"{key} = {_toml(value)}" for key, value in plain.items() if not isinstance(value, dict)]
        for section, values in plain.items():
            if isinstance(values, dict):
                lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        return "\n".join(lines).strip() + "\n"


def read_recipe(path: str | Path | None = None, changes: Sequence[str] = (), **sections: dict[str, Any]) -> Recipe:
    """A recipe from a TOML file, then sections given in code or as flags, then `key=value` changes, the last one wins.

    Args:
        changes: like `train.lr=0.002`, `method.rank=16`, `method.where.blocks=0,1`; values are TOML, or else text.

    Raises:
        RecipeError: no such file, not TOML, an unknown key (with the nearest known one), a value that does not fit.
        MethodError: a method or an option of it that does not exist.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not TOML: {error}") from None
    for section, values in sections.items():
        for key, value in values.items():
            if value is not None:
                _put(data, [section, key], value)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{change!r} is not key=value, such as train.lr=0.002 or method.rank=16")
        _put(data, key.strip().split("."), parse_value(text.strip()))
    try:
        recipe = Recipe(**data)
    except pydantic.ValidationError as error:
        raise RecipeError(_first(error)) from None
    recipe.build_method()
    return recipe


def _section(value: Any) -> dict[str, Any]:
    """`[method]` as a table, however it was written."""
    made = build_method(value)
    return {"name": made.name, **made.options()}


def _put(data: dict[str, Any], keys: list[str], value: Any) -> None:
    if keys[0] == "method" and isinstance(data.get("method"), (list, str)):
        data["method"] = _section(data["method"])
    if keys == ["method", "name"] and isinstance(old := data.get("method", {}), dict) and old.get("name") != value:
        data["method"] = {}  # options belong to the method that they were written for
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{'.'.join(keys)}: {key} is not a section")
    data[keys[-1]] = value


def parse_value(text: str) -> Any:
    """A value as TOML has it, or else the text itself."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _first(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *sections, key = (str(part) for part in problem["loc"])
        section: Any = Recipe
        for name in sections:
            section = section.model_fields[name].annotation
        return unknown(f"key in [{'.'.join(sections)}]" if sections else "section", key, section.model_fields)
    return f"{where} = {problem.get('input')!r}: {problem['msg'].lower()}"


def _without_none(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
