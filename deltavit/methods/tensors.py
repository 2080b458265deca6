"""Tuning of any of the model's own tensors, by name; what a soup of several methods is held in."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..core.edit import Edit, Own
from ..core.errors import MethodError
from ..core.method import Method, register
from ..core.site import Anatomy


@register("tensors")
@dataclass(frozen=True)
class Tensors(Method):
    """Tensors by name: those whose names match train.

    `names` are the model's own, as `deltavit plan --method full` lists them. `*` in a name stands for any text, `?` for
    one character, `[0-5]` for one of several: ("blocks.*.attn.*", "blocks.[0-5].mlp.*", "norm.weight"). By default all
    tensors of the backbone, as for `full`: 85,798,656 numbers on ViT-B/16.
    """

    paper = "baseline"
    names: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names is empty: give one or more, or '*' for all tensors")

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        known = vit.tensors()
        for pattern in self.names:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise MethodError(f"{vit.name} has no tensor {pattern!r}: `deltavit plan --method full` lists them")
        yield from (Own(name) for name in known if any(fnmatchcase(name, pattern) for pattern in self.names))


def patterns(names: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """Few patterns that match `names`, and of `known` nothing else: the greedy cover by what `*` can stand for."""
    others = [name for name in known if name not in names]
    covers: dict[str, set[str]] = {}
    for name in names:
        for wide in _wider(name):
            if wide not in covers and not any(fnmatchcase(other, wide) for other in others):
                covers[wide] = {each for each in names if fnmatchcase(each, wide)}
    left, found = set(names), []
    while left:
        best = max(covers, key=lambda wide: (len(covers[wide] & left), -len(wide), wide))
        found.append(best)
        left -= covers[best]
    return tuple(sorted(found))


def _wider(name: str) -> Iterator[str]:
    """A name, the modules that it lies in, all tensors that end like it, and each of these for all block numbers."""
    parts = name.split(".")
    for text in (name, *(".".join([*parts[:i], "*"]) for i in range(len(parts)))):
        yield text
        yield re.sub(r"\.\d+\.", ".*.", text)
    yield f"*.{parts[-1]}"
