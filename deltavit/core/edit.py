"""`Change`, how one frozen (W, b) is rewritten, and the five edits that a method may yield.

A change defines `weight`, the truth, and may define `output`, the same change on activations.  The rule that picks
one is `attach`'s, there is no option for it: a called site whose change has an `output` gets a forward hook, any
other gets a parametrization.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .site import Site


class Change(nn.Module, ABC):
    """How one frozen matrix W [out, in] and its bias b [out] are rewritten.

    Beside the definition a change may have one face on activations, which must equal it: `output(x, y) -> y'`, with
    x [..., in] and y = Wx + b [..., out], or `input(x) -> x'`, where W' = W T for a linear T.
    """

    output: Callable[..., Tensor] | None = None
    input: Callable[[Tensor], Tensor] | None = None
    reads_weight: ClassVar[bool] = False
    """The output face is `output(x, y, W, b)`, b None where there is none."""
    rescales: ClassVar[bool] = False
    """It multiplies what is there; else it adds what is computed from the pretrained W.  Where several methods rewrite
    one matrix, all increments are summed first, and rescales then multiply the sum."""
    alone: ClassVar[bool] = False
    """It cannot be composed with another change of the same matrix."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """The definition, [out, in] -> [out, in]."""

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        """What becomes of the bias, [out] -> [out]; W is the matrix before the change."""
        return b

    @property
    def moves_bias(self) -> bool:
        return type(self).bias is not Change.bias


class Chain(Change):
    """Several changes of one matrix: increments from W are summed, then rescales multiply in the order given."""

    def __init__(self, changes: Sequence[Change]):
        super().__init__()
        self.adds = nn.ModuleList(c for c in changes if not c.rescales)
        self.scales = nn.ModuleList(c for c in changes if c.rescales)
        if all(c.output is not None and not c.reads_weight for c in changes):
            self.output = self._output
        self.dropout = max(float(getattr(c, "dropout", 0.0)) for c in changes)

    def _summed(self, W: Tensor) -> Tensor:
        return W + sum(c.weight(W) - W for c in self.adds)  # type: ignore[no-any-return, operator]

    def weight(self, W: Tensor) -> Tensor:
        W = self._summed(W)
        for c in self.scales:
            W = c.weight(W)  # type: ignore[operator]
        return W

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        b = b + sum(c.bias(b, W) - b for c in self.adds)  # type: ignore[operator]
        W = self._summed(W)
        for c in self.scales:
            b, W = c.bias(b, W), c.weight(W)  # type: ignore[operator]
        return b

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        for c in [*self.adds, *self.scales]:
            y = c.output(x, y)  # type: ignore[operator]
        return y

    @property
    def moves_bias(self) -> bool:
        return any(c.moves_bias for c in [*self.adds, *self.scales])


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

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return b if self.shift is None else b + self.shift

    @property
    def moves_bias(self) -> bool:
        return self.shift is not None

    def output(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        up, down = self.factors()
        y = y + thin(thin(F.dropout(x, self.dropout, self.training), down), up).to(y.dtype)
        return y if self.shift is None else y + self.shift.to(y.dtype)


class ByRows(Change):
    """Each output on its own, whatever the inputs: W' = diag(gain) W and b' = gain b + shift; a leaf defines `affine`.

    Only such a change makes sense for a norm, and only such a one acts on what a convolution puts out.
    """

    rescales = True

    @abstractmethod
    def affine(self) -> tuple[Tensor, Tensor | None]:
        """(gain [out], shift [out] or None)."""

    def weight(self, W: Tensor) -> Tensor:
        return self.affine()[0][:, None] * W

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return affine(b, *self.affine())

    def output(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return affine(y, *self.affine())


def affine(y: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
    """gain y + shift, in float32 over a half-precision y, whose steps around 1 are too coarse for a gain."""
    if y.dtype != gain.dtype:
        new = gain * y
        return (new if shift is None else new + shift).to(y.dtype)
    if y.device.type == "cpu" and plainly_run():
        return _Affine.apply(y, gain, shift)  # type: ignore[no-any-return, no-untyped-call]
    return gain * y if shift is None else torch.addcmul(shift, y, gain)


def plainly_run() -> bool:
    """Whether autograd alone looks on: neither torch.compile nor a transform such as vmap traces what is done."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


class _Affine(torch.autograd.Function):
    """`affine` on a processor, where the backward is bound by memory: one pass over g and y, in pieces for a cache."""

    PIECE = 1 << 16

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y, gain)
        ctx.shifts = shift is not None
        return gain * y if shift is None else torch.addcmul(shift, y, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        y, gain = ctx.saved_tensors
        flat, width = g.reshape(-1, g.shape[-1]), g.shape[-1]
        y = y.reshape(-1, width)
        g_y, g_gain, g_shift = torch.empty_like(flat), torch.zeros_like(gain), torch.zeros_like(gain)
        step = max(1, _Affine.PIECE // width)
        for a in range(0, len(flat), step):
            piece = flat[a : a + step]
            g_gain += (piece * y[a : a + step]).sum(0)
            g_shift += piece.sum(0)
            torch.mul(piece, gain, out=g_y[a : a + step])
        return g_y.view(g.shape), g_gain, g_shift if ctx.shifts else None


def like(x: Tensor, *tensors: Tensor | None) -> Iterator[Any]:
    """Tensors in x's precision, for they stay fp32 over a half-precision base; autocast casts them itself."""
    keep = torch.is_autocast_enabled(x.device.type)
    return (t if t is None or keep else t.to(x.dtype) for t in tensors)


def thin(x: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """x factor^T + bias in x's precision, or in autocast's."""
    return F.linear(x, *like(x, factor, bias))


def add_thin(x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y + (x down^T) up^T: x [..., in], y [..., out], up [out, R], down [R, in]."""
    h = thin(x, down)
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype), up.to(y.dtype).t())
    return flat.view(y.shape)


@dataclass(frozen=True)
class Rewrite:
    """Rewrite the rows of a site by a change."""

    site: Site
    change: Change


@dataclass(frozen=True)
class Before:
    """Run `module(x)` on what enters the module at `path`; its value replaces x.

    With `tap`, `module(x, t)`: t is what enters the module at that path, or what leaves the rows of that site, earlier
    in the same forward pass.  With `into`, its value is added to that keyword argument instead of replacing x.
    """

    path: str
    module: nn.Module
    name: str
    tap: str | Site | None = None
    into: str = ""


@dataclass(frozen=True)
class After:
    """Run `module(x, y)` on what enters and what leaves the module at `path`; its value replaces y.

    With `tap`, x is what enters the module at that path instead, earlier in the same forward pass.
    """

    path: str
    module: nn.Module
    name: str
    tap: str | None = None


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
