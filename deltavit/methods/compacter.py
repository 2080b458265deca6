"""Compacter: adapters whose matrices are sums of Kronecker products.

Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647, Eq. 5.
Letters: n products, D width, L blocks, r the width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import Edit, like
from ..core.method import positive, register
from ..core.site import Anatomy
from .adapters import BRANCHES, SerialInBlocks


class Hypercomplex(nn.Module):
    """x W^T + b with W = sum_k A_k (x) s_k t_k: x [..., in] -> [..., out].

    The slow weights A [n, n, n] are a parameter that layers share, or a fixed tensor, of which each has a copy.
    """

    slow: Tensor

    def __init__(self, slow: Tensor, inp: int, out: int):
        super().__init__()
        n = len(slow)
        if inp % n or out % n:
            raise ValueError(f"n={n} must divide the width and the rank, which are {inp} and {out}")
        if isinstance(slow, nn.Parameter):
            self.slow = slow
        else:
            self.register_buffer("slow", slow.clone())
        self.s = nn.Parameter(glorot(n, out // n))
        self.t = nn.Parameter(glorot(n, inp // n))
        self.bias = nn.Parameter(torch.zeros(out))

    def weight(self) -> Tensor:
        """[out, in]"""
        return torch.einsum("kab,kc,kd->acbd", self.slow, self.s, self.t).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *like(x, self.weight(), self.bias))


def glorot(n: int, length: int) -> Tensor:
    """n vectors, each drawn as a matrix with one row, with gain sqrt 2."""
    bound = (2 * 6 / (length + 1)) ** 0.5
    return torch.empty(n, length).uniform_(-bound, bound)


@register("compacter")
@dataclass(frozen=True)
class Compacter(SerialInBlocks):
    r"""Compacter: adapters made of Kronecker products with shared slow weights.

    $$W = \sum_{k=1}^{n} A_k \otimes (s_k t_k), \qquad
      A_k \in \mathbb{R}^{n \times n},\ s_k \in \mathbb{R}^{o/n},\ t_k \in \mathbb{R}^{i/n}$$

    Houlsby's adapters, or Pfeiffer's with `which="mlp"` (the paper's Compacter++), whose W_down [r, D] and W_up [D, r]
    are such sums.  All layers share the slow weights A, drawn from N(0, 1/n); s and t are glorot-uniform with gain
    sqrt 2, s of up and all biases are zero.  Trains 3m(D + r) + n^3 numbers for m adapters: 59,968 for r=64 and n=4 on
    ViT-B/16.  `fixed=True` keeps A as drawn from the seed: 48,384 with `which="mlp"` and `norm=True`.

    Departures from the released code: there A is N(0, 0.01^2) for a start near the base, which slows its gradients and
    is not needed where s of up is zero; PEViT freezes A, by a name filter.  The model's own norms stay frozen.

    Karimi Mahabadi et al. 2021, arXiv:2106.04647, Eq. 5.
    """

    paper = "arXiv:2106.04647"
    rank: int = 64
    n: int = 4
    which: Literal["both", "mlp"] = "both"
    fixed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("n", self.n)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        slow = torch.randn(self.n, self.n, self.n) / self.n**0.5
        if not self.fixed:
            slow = nn.Parameter(slow)

        def layers(width: int, rank: int) -> tuple[nn.Module, nn.Module]:
            down, up = Hypercomplex(slow, width, rank), Hypercomplex(slow, rank, width)
            nn.init.zeros_(up.s)
            return down, up

        branches = BRANCHES if self.which == "both" else BRANCHES[1:]
        for edit in self.serial(vit, vit.chosen(self.where), branches, layers):
            if not self.fixed:
                edit.module.slow = slow  # so that it is called shared.slow, not after the first layer that uses it
            yield edit
