"""`Change`, how one frozen (W, b) is rewritten, and the five edits that a method may yield.

A change defines `weight`, the truth, and may define `output`, the same change on activations.  The rule that picks
one is `attach`'s, there is no option for it: a called site whose change has an `output` gets a forward hook, any
other gets a parametrization.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .site import Site


class Change(nn.Module, ABC):
    """How one frozen matrix W [out, in] and its bias b [out] are rewritten."""

    output: Callable[[Tensor, Tensor], Tensor] | None = None
    """Optional `output(x, y) -> y'` with x [..., in] and y = Wx + b [..., out]: must equal the definition."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """The definition, [out, in] -> [out, in]."""

    def bias(self, b: Tensor) -> Tensor:
        """What becomes of the bias, [out] -> [out]."""
        return b

    @property
    def moves_bias(self) -> bool:
        return type(self).bias is not Change.bias


class LowRank(Change):
    """An additive change of low rank, W' = W + up @ down and b' = b + shift; a leaf defines `factors`.

    Every additive delta of this library is of low rank.  Its activation face is two thin products, so that no
    gradient of the size of W is ever formed.
    """

    def __init__(self, dropout: float = 0.0, shift: nn.Parameter | None = None):
        super().__init__()
        self.dropout = dropout
        self.shift = shift

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(up [out, R], down [R, in]), any scale already inside."""

    def weight(self, W: Tensor) -> Tensor:
        up, down = self.factors()
        return W + up @ down

    def bias(self, b: Tensor) -> Tensor:
        return b if self.shift is None else b + self.shift

    @property
    def moves_bias(self) -> bool:
        return self.shift is not None

    def output(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        up, down = self.factors()
        y = y + thin(thin(F.dropout(x, self.dropout, self.training), down), up).to(y.dtype)
        return y if self.shift is None else y + self.shift.to(y.dtype)


def thin(x: Tensor, factor: Tensor) -> Tensor:
    """x @ factor^T in x's precision (a factor stays fp32 over a half-precision base), or autocast's where it is on."""
    return F.linear(x, factor if torch.is_autocast_enabled(x.device.type) else factor.to(x.dtype))


@dataclass(frozen=True)
class Rewrite:
    """Rewrite the rows of a site by a change."""

    site: Site
    change: Change


@dataclass(frozen=True)
class Before:
    """Run `module(x)` on what enters the module at `path`."""

    path: str
    module: nn.Module
    name: str


@dataclass(frozen=True)
class After:
    """Run `module(x, y)` on what enters and what leaves the module at `path`; its value replaces y."""

    path: str
    module: nn.Module
    name: str


@dataclass(frozen=True)
class Swap:
    """Put `build(old)` in the place of the module at `path`."""

    path: str
    build: Callable[[nn.Module], nn.Module]
    name: str


@dataclass(frozen=True)
class Own:
    """Give the adapter its own trainable copy of the tensor called `name`; the base keeps its own."""

    name: str


Edit = Rewrite | Before | After | Swap | Own
