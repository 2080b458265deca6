"""What is searched: keys of the recipe, each with a list of values or a range."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import RecipeError, unknown
from ..train.recipe import Recipe, parse_value, read_recipe

Value = bool | int | float | str
Values = dict[str, Value]
"""Key of the recipe -> the value that a trial gives it."""


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both among them; whole ones where the recipe's key is a whole number.

    `log`: every decade is as probable as any other.  `step`: only low, low + step, low + 2 step, ..
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None


Space = Mapping[str, Sequence[Value] | Range | Mapping[str, Any]]
"""Key of the recipe, `train.lr` or `method.scale` -> its values, or a range as `Range` or as a table of its fields."""
Plan = dict[str, tuple[Value, ...] | Range]
"""A space that the recipe, its method and the sampler have accepted."""

RATES = tuple(10.0**e for e in range(-6, 0))
DECAYS = tuple(10 ** (-6 + e / 8) for e in range(97))
"""The values of the automatic search of ELEVATER (arXiv:2204.08790) and PEViT (arXiv:2203.16329)."""
_LISTS: dict[str, Sequence[Value] | Range] = {
    "train.lr": (1e-4, 1e-3, 1e-2),
    "train.weight_decay": (1e-4, 1e-2),
    "scale": (0.1, 1.0, 10.0),
}
_RANGES: dict[str, Sequence[Value] | Range] = {
    "train.lr": Range(1e-5, 1e-1, log=True), "train.weight_decay": Range(1e-6, 1e-1, log=True),
    "scale": Range(1e-2, 1e2, log=True),
}  # fmt: skip


def default_space(recipe: Recipe, sampler: str = "tpe") -> dict[str, Sequence[Value] | Range]:
    """Learning rate, weight decay, and the scale factor of each method that has one.

    For `elevater` the toolkit's own values of the first two; its search knows no scale.
    """
    if sampler == "elevater":
        return {"train.lr": RATES, "train.weight_decay": DECAYS}
    known = dict(_LISTS if sampler == "grid" else _RANGES)
    scale = known.pop("scale")
    return {**known, **dict.fromkeys(_scales(recipe.build_method().options(), "method"), scale)}


def _scales(options: Mapping[str, Any], name: str) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _scales(value, f"{name}.{key}")
        elif key == "scale" and isinstance(value, float):
            yield f"{name}.{key}"


def parse_space(texts: Sequence[str]) -> dict[str, Sequence[Value] | Range]:
    """Spaces as the command line writes them: `train.lr=1e-4..1e-1` is a range, `method.scale=0.1,1,10` a list.

    A range whose ends are above zero and a factor of 10 or more apart is logarithmic; `log:A..B` and `lin:A..B` say so
    outright.

    Raises:
        RecipeError: not KEY=VALUES, an end that is no number, or a key given twice.
    """
    space: dict[str, Sequence[Value] | Range] = {}
    for text in texts:
        key, equals, told = (part.strip() for part in text.partition("="))
        if not (key and equals and told):
            raise RecipeError(f"{text!r} is not KEY=VALUES, such as train.lr=1e-4..1e-1 or method.scale=0.1,1,10")
        if key in space:
            raise RecipeError(f"the space gives {key} twice: {text!r}")
        found = re.fullmatch(r"(?:(log|lin):)?(.+?)\.\.(.+)", told)
        if not found:
            space[key] = [parse_value(part.strip()) for part in told.split(",")]
            continue
        try:
            low, high = float(found[2]), float(found[3])
        except ValueError:
            raise RecipeError(f"{text!r}: a range is LOW..HIGH, two numbers, such as 1e-4..1e-1") from None
        space[key] = Range(low, high, log=found[1] == "log" or (not found[1] and low > 0 and high >= 10 * low))
    return space


def checked(recipe: Recipe, space: Space, sampler: str, epochs: int | None) -> Plan:
    """The space with every value as the recipe would write it; nothing of it runs before all of it is accepted.

    Raises:
        RecipeError: an empty space, an unknown key, a value that does not fit it, a range that the sampler cannot take.
        MethodError, TrainingError: a value that the method or the training refuses.
    """
    if not space:
        raise RecipeError("nothing to search: give a space, such as train.lr=1e-4..1e-1")
    plan: Plan = {}
    for key, told in space.items():
        if key.partition(".")[0] in ("model", "data", "device"):
            raise RecipeError(f"{key} cannot be searched: accuracies on val only compare within one model and one data")
        if key == "train.epochs" and epochs is not None:
            raise RecipeError(f"train.epochs is searched and also said to be {epochs} for every trial: drop one")
        if isinstance(told, Mapping):
            told = _range(key, told)
        if isinstance(told, Range):
            whole = _whole(recipe, key, told)
            _check(key, told, whole)
            if sampler in ("grid", "elevater"):
                told = _listed(key, told, sampler)
            else:
                plan[key] = told
                for end in (told.low, told.high):
                    _canonical(recipe, key, int(end) if whole else end)
                continue
        if isinstance(told, str) or not isinstance(told, Sequence) or not told:
            raise RecipeError(f"{key} = {told!r} is neither a list of values nor a range {{low = .., high = ..}}")
        plan[key] = tuple(dict.fromkeys(_canonical(recipe, key, value) for value in told))
    if sampler == "elevater":
        _for_elevater(plan)
    return plan


def placed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values written in.

    Raises:
        DeltavitError: the line of whoever refuses: the recipe, the method, the training.
    """
    plain = recipe.plain()
    loose = {key: value for key, value in plain.items() if not isinstance(value, dict)}
    changes = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in {**loose, **values}.items()]
    return read_recipe(None, changes, **{key: value for key, value in plain.items() if isinstance(value, dict)})


def name_of(values: Mapping[str, Value]) -> str:
    """One text for equal values, whatever their order."""
    return json.dumps(values, sort_keys=True)


def described(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    return {key: dataclasses.asdict(told) if isinstance(told, Range) else list(told) for key, told in plan.items()}


def kind(recipe: Recipe, key: str) -> type:
    """Of the value that the recipe has under this key; NoneType where it is unset."""
    value: Any = recipe.plain()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return type(value)


def _canonical(recipe: Recipe, key: str, value: Any) -> Value:
    """The value as the recipe has it once it is read: 1 is 1.0 where the key is a float."""
    if not isinstance(value, (bool, int, float, str)):
        raise RecipeError(f"{key} = {value!r} cannot be searched: give numbers, words, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key} = {value} is not a finite number")
    placed(recipe, {key: value})
    return float(value) if type(value) is int and kind(recipe, key) is float else value


def _range(key: str, told: Mapping[str, Any]) -> Range:
    known = [field.name for field in dataclasses.fields(Range)]
    for name in told:
        if name not in known:
            raise RecipeError(unknown(f"key in the range of {key}", name, known))
    if not {"low", "high"} <= set(told):
        raise RecipeError(f"the range of {key} needs low and high, got {dict(told)!r}")
    return Range(**told)


def _whole(recipe: Recipe, key: str, told: Range) -> bool:
    whole = kind(recipe, key) is int
    if whole and any(n != int(n) for n in (told.low, told.high, told.step or 0)):
        raise RecipeError(f"{key} is a whole number: its range {told.low}..{told.high} must have whole ends and steps")
    return whole


def _check(key: str, told: Range, whole: bool) -> None:
    numbers = (told.low, told.high, *([] if told.step is None else [told.step]))
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers) or told.low >= told.high:
        raise RecipeError(f"the range of {key} must rise from low to high, got {told.low!r}..{told.high!r}")
    if told.log and (told.low <= 0 or told.step is not None):
        raise RecipeError(f"the range of {key} is logarithmic: low must be above zero and step left out, got {told}")
    if told.step is not None and told.step <= 0:
        raise RecipeError(f"the step of {key} must be above zero, got {told.step}")


def _listed(key: str, told: Range, sampler: str) -> list[Value]:
    if told.step is None:
        raise RecipeError(
            f"the sampler {sampler!r} needs a list of values for {key}, or a step, not {told.low}..{told.high}"
        )
    return [told.low + i * told.step for i in range(int((told.high - told.low) / told.step + 1e-9) + 1)]


def _for_elevater(plan: Plan) -> None:
    if not {"train.lr", "train.weight_decay"} <= set(plan):
        raise RecipeError(f"the sampler 'elevater' searches train.lr and train.weight_decay, got {', '.join(plan)}")
    if len(plan["train.weight_decay"]) < 7:  # type: ignore[arg-type]
        raise RecipeError("the sampler 'elevater' begins with 7 values of train.weight_decay: give at least as many")
