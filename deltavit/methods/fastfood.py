"""Fastfood: tuning in a random subspace of all weights, for measuring the intrinsic dimension of a task.

Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv:1804.08838.
Aghajanyan et al. 2021, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
arXiv:2012.13255.  The transform: Le et al. 2013, "Fastfood", arXiv:1408.3060.
Letters: d dimension of the subspace, D numbers of a tensor, n the power of two from D on, m tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import Change, Edit, Rewrite, plainly_run
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where

FACTOR = 4
"""Bits of the largest dense factor: small enough to save work, large enough for few passes over memory."""
PIECE = 19
"""Bits of the pieces that a processor takes through its cache, 2 MiB of float32 each."""


def hadamard(bits: int, like: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix of side 2^bits: symmetric, entries +-1, rows orthogonal."""
    H = like.new_ones(1, 1)
    for _ in range(bits):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x over the last dimension, whose length is a power of two; not normalised, so that twice is length times x.

    H is a Kronecker product of small ones, each of which is one matrix product.  It is symmetric, so the gradient is
    H too, without the factor 1/length of the code that is in circulation.
    """
    length = x.shape[-1]
    if length & (length - 1) or not length:
        raise ValueError(f"a Walsh-Hadamard transform needs a power of two, got {length}")
    with torch.autocast(x.device.type, enabled=False):  # signs and sums: half precision would only lose digits
        if length == 1 or not plainly_run():
            return _passes(x.reshape(-1), _factors(length.bit_length() - 1, x)).view(x.shape)
        return _Transform.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Transform(torch.autograd.Function):
    """The same in two buffers that take turns, and piece by piece: it costs what memory costs, fresh memory most."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        bits = x.shape[-1].bit_length() - 1
        low = min(bits, PIECE) if x.device.type == "cpu" else bits
        inner, outer = _factors(low, x), _factors(bits - low, x)
        y = x.reshape(-1)
        one, two = torch.empty_like(y), torch.empty_like(y)
        for pieces in zip(*(t.view(-1, 1 << low) for t in (y, one, two)), strict=True):
            _passes(pieces[0], inner, 0, *pieces[1:])
        if len(inner) % 2 == 0:
            one, two = two, one
        return _passes(one, outer, low, two, one).view(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return _Transform.apply(g)  # type: ignore[no-any-return, no-untyped-call]


def _factors(bits: int, like: Tensor) -> list[Tensor]:
    """Hadamard matrices whose Kronecker product is that of side 2^bits: as few as FACTOR allows, near equal."""
    count = -(-bits // FACTOR)
    return [hadamard((bits + i) // count, like) for i in reversed(range(count))]


def _passes(y: Tensor, factors: list[Tensor], done: int = 0, *turns: Tensor) -> Tensor:
    """y, flat, transformed over the bits of its index from `done` on, a product each factor.

    `turns`: two buffers; the first pass writes into the first one, the next into the other, and so on.
    """
    for i, H in enumerate(factors):
        shape = (-1, len(H), 1 << done) if done else (-1, len(H))
        y, out = y.view(shape), turns[i % 2].view(shape) if turns else None
        y = torch.bmm(H.expand(len(y), -1, -1), y, out=out) if done else torch.mm(y, H, out=out)
        done += len(H).bit_length() - 1
    return y.view(-1)


class Projection(nn.Module):
    """P of one tensor: [d] -> [D], linear, with |P theta| close to |theta|; its numbers are drawn and fixed.

    P = trunc_D(H G Pi H B [theta; 0]) / sqrt(D sum G^2), with signs B, a permutation Pi, normal G, and H of side n.
    Of the first H only the first d columns count, and they repeat: H [x; 0] is the transform of x, padded to the power
    of two from d on, again and again.  So one long transform is enough, and Pi is kept modulo that power.

    n is the power of two from D on; with `pad`, of a tensor smaller than theta, from d on.
    """

    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, dimension: int, size: int, pad: bool = False):
        super().__init__()
        length, self.fold = _power(size), _power(dimension)
        if dimension > length and not pad:
            raise ValueError(
                f"dimension={dimension} is larger than a tensor of {size} numbers, padded to {length}: lower it, "
                "pad it further with pad=True, or leave such tensors out with bias=False or where=..."
            )
        length = max(length, self.fold)
        self.size = size
        gauss = torch.randn(length)
        self.register_buffer("signs", (2 * torch.randint(2, (dimension,)) - 1).to(torch.int8), persistent=False)
        self.register_buffer("order", (torch.randperm(length) % self.fold).to(torch.int32), persistent=False)
        self.register_buffer("gauss", gauss / (gauss.norm() * size**0.5), persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        short = walsh_hadamard(F.pad(theta * self.signs, (0, self.fold - len(theta))))
        return walsh_hadamard(short.index_select(0, self.order) * self.gauss)[: self.size]


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


class Subspace(Change):
    """W' = W + lambda_1 P_1 theta and b' = b + lambda_2 P_2 theta, with theta shared by every site."""

    def __init__(self, theta: nn.Parameter, shape: tuple[int, int], bias: bool, said: bool, pad: bool = False):
        super().__init__()
        self.theta = theta  # [d]
        self.onto_weight = Projection(len(theta), shape[0] * shape[1], pad)
        self.onto_bias = Projection(len(theta), shape[0], pad) if bias else None
        self.scales = nn.Parameter(torch.ones(1 + bias)) if said else None

    def weight(self, W: Tensor) -> Tensor:
        return W + self._scaled(0, self.onto_weight(self.theta)).view(W.shape)

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return b if self.onto_bias is None else b + self._scaled(1, self.onto_bias(self.theta))

    def _scaled(self, which: int, delta: Tensor) -> Tensor:
        return delta if self.scales is None else self.scales[which] * delta

    @property
    def moves_bias(self) -> bool:
        return self.onto_bias is not None


@register("fastfood")
@dataclass(frozen=True)
class Fastfood(Method):
    r"""Fastfood: all weights move in one random subspace of few dimensions.

    $$W' = W + \lambda\,P\theta, \qquad P\theta = \frac{1}{\sqrt{D \sum G^2}}\,
      \text{trunc}_D\big(H\,G\,\Pi\,H\,B\,[\theta; 0]\big), \qquad \theta \in \mathbb{R}^d$$

    One theta, zero at the start, drives all tensors, each through signs B, a permutation and a normal diagonal G of its
    own, which are drawn from the seed; H is the Walsh-Hadamard transform.  P keeps the length of theta in every tensor,
    so m tensors together move sqrt(m) times as far.  `bias=True` takes the biases of the chosen layers along.
    `said=True` is the structure-aware form, which also trains a factor lambda for each tensor, 1 at the start.
    A tensor of fewer numbers than theta, a bias say, is refused; `pad=True` takes it along, padded to theta's length.

    Trains d numbers, and m more with `said`: 1,000 for d=1000 on ViT-B/16, whatever `where` is.  The fixed numbers are
    not in the file, but need 8 bytes a weight in memory, padded to a power of two: 1.2 GB for all of ViT-B/16.  The
    first factor of P is drawn and applied only where theta is, which gives the same P.

    Departure from released code (Aghajanyan et al., Compacter): there the gradient of each transform has a factor
    1/sqrt(n) too many, which Adam does not see but SGD does.  Here the gradient is exact.

    Aghajanyan et al. 2021, arXiv:2012.13255; for Vision Transformers: He et al. 2022, arXiv:2203.16329.
    """

    paper = "arXiv:2012.13255"
    dimension: int = 1000
    bias: bool = False
    said: bool = False
    pad: bool = False
    where: Where = Where()

    def __post_init__(self) -> None:
        positive("dimension", self.dimension)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        theta = nn.Parameter(torch.zeros(self.dimension))
        for site in vit.sites(self.where):
            bias = self.bias and site.shift is not None
            yield Rewrite(site, Subspace(theta, site.shape, bias, self.said, self.pad))
