"""`Method`: a frozen dataclass that describes, as data, what it does to a frozen Vision Transformer."""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from .edit import Edit
from .errors import MethodError, unknown
from .site import Anatomy


class Method(ABC):
    """Base of all methods.  Leaves are frozen dataclasses, whose fields are the hyper-parameters."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    starts_as_base: ClassVar[bool] = True
    """Whether the adapted model equals the base before training."""

    @abstractmethod
    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        """What the method does to the model, edit by edit.  Factors shared between sites are local variables here."""

    def options(self) -> dict[str, Any]:
        """The hyper-parameters as plain data: `method(m.name, **m.options()) == m`, through JSON and TOML too."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


M = TypeVar("M", bound=type[Method])
_methods: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Make a method known by a name; its class docstring's first line becomes its title."""

    def keep(cls: M) -> M:
        if _methods.get(name, cls).__qualname__ != cls.__qualname__:
            raise MethodError(f"two methods are called {name!r}: {_methods[name].__qualname__} and {cls.__qualname__}")
        cls.name = name
        cls.title = (cls.__doc__ or name).strip().splitlines()[0].rstrip(".")
        _methods[name] = cls
        return cls

    return keep


def methods() -> dict[str, type[Method]]:
    """All registered methods by name, in alphabetical order."""
    return dict(sorted(_methods.items()))


@dataclasses.dataclass(frozen=True, eq=False)
class Composite(Method):
    """Several methods on one model at once: increments from the pretrained weights are summed, then rescales multiply.

    `parts` has a label for each: its name, or `lora-2` for the second of one name.  Refused where the order of two
    changes of one matrix is not defined.
    """

    parts: dict[str, Method]

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(part.name for part in self.parts.values())

    @property
    def starts_as_base(self) -> bool:  # type: ignore[override]
        return all(part.starts_as_base for part in self.parts.values())

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for part in self.parts.values():
            yield from part.edits(vit)

    def options(self) -> dict[str, Any]:
        return {label: part.options() for label, part in self.parts.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Composite) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(tuple(self.parts.items()))


def method(name: str | Method | Sequence[Any], **options: Any) -> Method:
    """Build a method from its name and options; text, lists and dicts are read as the field's type.

    Several are composed: `method(["lora", method("bitfit")])`, `method("lora+bitfit", lora={"rank": 4})`.

    Raises:
        MethodError: an unknown name or option (the nearest known one is named), or a value that does not fit.
    """
    if isinstance(name, Composite):
        return method(name.name, **{**name.options(), **options}) if options else name
    if isinstance(name, Method):
        return dataclasses.replace(name, **_read(type(name), options)) if options else name  # type: ignore[type-var]
    if not isinstance(name, str):
        return _compose([_one(each) for each in name], options)
    if "+" in name:
        return _compose([(each.strip(), {}) for each in name.split("+")], options)
    if name not in _methods:
        raise MethodError(unknown("method", name, _methods))
    cls = _methods[name]
    try:
        return cls(**_read(cls, options))
    except ValueError as error:
        raise MethodError(f"{name}: {error}") from None


def _one(each: Any) -> tuple[str | Method, dict[str, Any]]:
    if not isinstance(each, (str, Method, Mapping)) or isinstance(each, Composite):
        raise MethodError(f"{each!r:.60} in a list of methods: write one flat list of names, methods and tables")
    if isinstance(each, Mapping):
        options = dict(each)
        return options.pop("name", ""), options
    return each, {}


def _compose(named: list[tuple[str | Method, dict[str, Any]]], options: dict[str, Any]) -> Method:
    parts: dict[str, Method] = {}
    for name, own in named:
        text = name if isinstance(name, str) else name.name
        count = sum(part.name == text for part in parts.values())
        label = f"{text}-{count + 1}" if count else text
        more = options.pop(label, {})
        if not isinstance(more, Mapping):
            raise MethodError(f"{label} = {more!r}: give the options of {label} as {label}.rank=4")
        parts[label] = method(name, **{**own, **more})
    if options:
        raise MethodError(unknown("method of the composition", next(iter(options)), parts))
    if not parts:
        raise MethodError("an empty list of methods")
    return Composite(parts) if len(parts) > 1 else next(iter(parts.values()))


def _read(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    label = getattr(cls, "name", "") or cls.__name__.lower()
    for key in options:
        if key not in known:
            raise MethodError(unknown(f"option of {label}", key, known))
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    read = {}
    for key, value in options.items():
        if dataclasses.is_dataclass(defaults[key]) and isinstance(value, Mapping):
            # where.blocks=0,1 chooses blocks and keeps the roles that the method acts on by default
            read[key] = dataclasses.replace(defaults[key], **_read(type(defaults[key]), value))  # type: ignore[type-var, arg-type]
        else:
            read[key] = _as(known[key], value, f"{label}.{key}")
    return read


def _as(kind: Any, value: Any, label: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() == "none")):
            return None
        for arg in (a for a in args if a is not type(None)):
            try:
                return _as(arg, value, label)
            except MethodError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif isinstance(value, int):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple(_as(args[0], v, label) for v in value)
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return kind(**_read(kind, value))  # type: ignore[operator, arg-type]
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind in (int, float):
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = kind(value)
                if float(number) == float(value) and abs(float(number)) < float("inf"):
                    return number
            except (ValueError, OverflowError):
                pass
    elif isinstance(value, kind):
        return value
    wanted = " or ".join(map(repr, args)) if origin is typing.Literal else getattr(kind, "__name__", str(kind))
    raise MethodError(f"{label} = {value!r} is not {wanted}")


def positive(label: str, value: int) -> None:
    """Refuse a rank or count below one."""
    if value < 1:
        raise ValueError(f"{label} must be at least 1, got {value}")
