"""Fine-tuned angles: how far each part of a model turned, and which parts to train because of it.

Ye et al. 2023, "Partial Fine-Tuning: A Successor to Full Fine-Tuning for Vision Transformers", arXiv:2312.15681.
Reconstructed: the abstract names the angle and what it is for; that it is taken on flattened weights is from an
independent implementation, and the selection of the k largest or smallest is ours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import AdapterError, ModelError, RecipeError
from ..core.site import NORM, ROLES
from .pairs import Pair, canvas

PARTS = ("attention", "ffn")
"""What `partial` trains of a block; q, k, v and o are attention, the linear maps of the MLP are ffn."""


def fine_tuned_angle(W0: Tensor, W1: Tensor) -> float:
    """Angle between a weight before and after tuning, each read as one long vector.

    Args:
        W0: the pretrained weight, any shape.
        W1: the tuned weight, same shape.

    Returns:
        Degrees: 0 when W1 is a positive multiple of W0, 90 when orthogonal, 180 when opposite.

    Raises:
        ValueError: shapes differ, a weight is all zero (it has no direction), or a number is not finite.

    Source: Ye et al. 2023, arXiv:2312.15681.  We use 2 atan2(|a - b|, |a + b|) on unit vectors:
    arccos of a float32 dot product is noise below about 0.05 degrees, where adapters often live.
    """
    return turn(W0, W1).degrees


@dataclass(frozen=True)
class Turn:
    """Two vectors as far as their angle goes.

    Turns of several tensors join to the turn of all of them as one vector, so no vector of the whole model is built.
    """

    before: float
    """Length of the first vector; `after` is the second's."""
    after: float
    apart: float
    """|a - b|^2 of the unit vectors; `along` is |a + b|^2."""
    along: float

    @property
    def degrees(self) -> float:
        return math.degrees(2 * math.atan2(math.sqrt(self.apart), math.sqrt(self.along)))


def turn(W0: Tensor, W1: Tensor) -> Turn:
    """From one tensor to another; raises what `fine_tuned_angle` does."""
    if W0.shape != W1.shape:
        raise ValueError(f"the shapes are {list(W0.shape)} before and {list(W1.shape)} after")
    a, b = W0.detach().double(), W1.detach().double()
    lengths = float(a.norm()), float(b.norm())
    for name, length in zip(("before", "after"), lengths, strict=True):
        if not math.isfinite(length):
            raise ValueError(f"the weight {name} has a number that is not finite")
        if length == 0:
            raise ValueError(f"the weight {name} is all zero, which has no direction")
    a, b = a / lengths[0], b / lengths[1]
    return Turn(*lengths, float((a - b).square().sum()), float((a + b).square().sum()))


def joined(turns: Sequence[Turn]) -> Turn:
    """The turn of the concatenated vectors.

    With shares p, q of a piece in the two lengths and unit vectors a, b: |pa - qb|^2 = (p - q)^2 + pq |a - b|^2, a sum
    of what is never negative, so that the smallest angle keeps its digits.
    """
    before, after = math.hypot(*(t.before for t in turns)), math.hypot(*(t.after for t in turns))
    shares = [(t.before / before, t.after / after) for t in turns]
    apart = math.fsum((p - q) ** 2 + p * q * t.apart for t, (p, q) in zip(turns, shares, strict=True))
    along = math.fsum((p - q) ** 2 + p * q * t.along for t, (p, q) in zip(turns, shares, strict=True))
    return Turn(before, after, apart, along)


@dataclass(frozen=True)
class Angles:
    """Degrees.  What did not change at all has no entry, for nobody knows how far it would have turned."""

    sites: dict[str, float]
    """`blocks.3.q` and so on."""
    parts: dict[str, float]
    """`3.attention`, as `partial` takes it: all maps of that part as one vector, those that did not change included."""
    whole: float
    """All blocks as one vector."""


def angles(pairs: Iterable[Pair]) -> Angles:
    """Of each site, of each part of each block, and of all blocks.

    Raises:
        ModelError: a weight that is zero or not finite.  AdapterError: nothing changed.
    """
    sites: dict[str, float] = {}
    turns: dict[str, list[Turn]] = defaultdict(list)
    changed = set()
    for pair in pairs:
        site = pair.site
        part = f"{site.block}.{_part(site.role)}"
        try:
            turned = turn(pair.before, pair.after)
        except ValueError as error:
            raise ModelError(f"{site.name}: {error}") from None
        turns[part].append(turned)
        if pair.changed:
            sites[site.name] = turned.degrees
            changed.add(part)
    if not changed:
        raise AdapterError("no weight changed, so there is no angle; was it trained?")
    parts = {part: joined(own).degrees for part, own in turns.items() if part in changed}
    return Angles(sites, parts, joined([t for own in turns.values() for t in own]).degrees)


def _part(role: str) -> str:
    return "attention" if role in ("q", "k", "v", "o") else NORM if role == NORM else "ffn"


# --- selection -------------------------------------------------------------------------------------------------------


def select(found: Angles, k: int, *, largest: bool = True, per_part: bool = False) -> tuple[str, ...]:
    """The k parts of blocks that turned most, or least, as `layers` of the method `partial`, block by block.

    Args:
        per_part: k of attention and k of ffn, instead of k in all.

    Raises:
        RecipeError: k is below 1, or above the number of parts that have an angle.
    """
    chosen = []
    for group in [[part] for part in PARTS] if per_part else [list(PARTS)]:
        known = {layer: angle for layer, angle in found.parts.items() if layer.partition(".")[2] in group}
        if not 1 <= k <= len(known):
            kind = " and ".join(group)
            raise RecipeError(f"cannot select {k}: {len(known)} parts ({kind}) have an angle, choose 1 to {len(known)}")
        chosen += _first(known, k, largest)
    return tuple(sorted(chosen, key=_place))


def _first(known: Mapping[str, float], k: int, largest: bool) -> list[str]:
    """k names by their value; of equal ones those that come first in the model."""
    return sorted(known, key=lambda layer: (-known[layer] if largest else known[layer], _place(layer)))[:k]


def _place(layer: str) -> tuple[int, str]:
    block, _, part = layer.partition(".")
    return int(block), part


# --- two sources of angles -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How alike two sources of angles order the blocks of one part, or of both parts together."""

    part: str
    layers: int
    spearman: float | None
    """Rank correlation; None where a source has the same angle everywhere, or there are fewer than two layers."""
    k: int
    largest: float
    """Share of the k largest that both have; `smallest` of the k smallest.  By chance it is k / layers."""
    smallest: float


def compare(one: Angles, two: Angles, k: int | None = None) -> list[Agreement]:
    """Attention, ffn, and both together; k of each, or half of them, at least one.

    Raises:
        AdapterError: the two have no part in common.
    """
    common = {part: [p for p in one.parts if p in two.parts and p.partition(".")[2] == part] for part in PARTS}
    groups = {part: layers for part, layers in common.items() if layers}
    if not groups:
        raise AdapterError("the two have no part in common that changed in both: nothing to compare")
    if len(groups) == 2:
        groups["both"] = [layer for layers in common.values() for layer in layers]
    found = []
    for part, layers in groups.items():
        a, b = ({layer: source.parts[layer] for layer in layers} for source in (one, two))
        count = min(len(layers), k or max(1, len(layers) // 2))
        shares = (len({*_first(a, count, end)} & {*_first(b, count, end)}) / count for end in (True, False))
        found.append(Agreement(part, len(layers), spearman(list(a.values()), list(b.values())), count, *shares))
    return found


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs; None where it is not defined."""
    if len(one) < 2:
        return None
    a, b = (torch.tensor(_ranks(values), dtype=torch.float64) for values in (one, two))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


# --- picture ---------------------------------------------------------------------------------------------------------


def heat_map(found: Angles, title: str = "") -> Any:
    """A matplotlib figure: blocks by roles, and blocks by parts; grey where nothing changed.

    Each half has its own colours, on a logarithmic scale where its angles span more than a factor of 20.
    """
    by_site = {_place(name.removeprefix("blocks.")): angle for name, angle in found.sites.items()}
    by_part = {_place(layer): angle for layer, angle in found.parts.items()}
    blocks = 1 + max(block for block, _ in by_part)
    figure, grid = canvas(11, 1.6 + 0.34 * blocks, 1, 2)
    for axes, table in zip(grid.flat, (by_site, by_part), strict=True):
        _heat(figure, axes, table, blocks)
    grid.flat[0].set_ylabel("block")
    figure.suptitle(title.replace("$", r"\$"))
    return figure


def _heat(figure: Any, axes: Any, table: Mapping[tuple[int, str], float], blocks: int) -> None:
    from matplotlib.colors import LogNorm, Normalize

    columns = columns_of(column for _, column in table)
    values = torch.full((blocks, len(columns)), math.nan, dtype=torch.float64)
    for (block, column), angle in table.items():
        values[block, columns.index(column)] = angle
    known = [angle for angle in table.values() if angle > 0] or [1.0]
    wide = max(known) > 20 * min(known)
    scale = LogNorm(min(known), max(known)) if wide else Normalize(min(known), max(known))
    axes.set_facecolor("0.85")
    image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", norm=scale)
    for (block, column), angle in table.items():
        dark = angle <= 0 or float(scale(angle)) < 0.6
        axes.text(
            columns.index(column), block, f"{angle:.3g}", ha="center", va="center", fontsize="x-small",
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(blocks))
    figure.colorbar(image, ax=axes, label="degrees", format="%g").minorticks_off()


def rows(found: Angles) -> Iterator[tuple[int, dict[str, float]]]:
    """(block, column -> degrees) for a table: sites by their role, then parts."""
    table: dict[int, dict[str, float]] = defaultdict(dict)
    for name, angle in [*found.sites.items(), *found.parts.items()]:
        block, column = _place(name.removeprefix("blocks."))
        table[block][column] = angle
    yield from sorted(table.items())


def columns_of(names: Iterable[str]) -> list[str]:
    """Roles and parts in the order of the computation, what has no place in it (norms) after them."""
    order = (*ROLES, *PARTS)
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))
