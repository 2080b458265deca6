"""LoRAmul and VPTadd, the two changes of every linear map that PACE trains together.

Ni et al. 2024, "PACE: Marrying generalization in PArameter-efficient fine-tuning with Consistency rEgularization",
arXiv:2409.17137.  Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.draw import xavier
from ..core.edit import Change, Edit, Rewrite
from ..core.method import Method, positive, register
from ..core.site import ROLES, Anatomy, Where
from .arc import by_input
from .rlrr import Hadamard


class Multiplied(Hadamard):
    """W' = W o (1 + left right), b' = b o (1 + delta)."""

    def __init__(self, left: nn.Parameter, right: nn.Parameter, delta: nn.Parameter | None):
        super().__init__(left, right)
        self.delta = delta  # [o]

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return b if self.delta is None else b * (1 + self.delta)

    @property
    def moves_bias(self) -> bool:
        return self.delta is not None


class Prompted(Change):
    """x' = x + p, b' = b + W p, with p = weights prompts."""

    def __init__(self, rank: int, inp: int):
        super().__init__()
        self.weights = xavier(1, rank)
        self.prompts = nn.Parameter(torch.zeros(rank, inp))  # zero: p = 0 at the start

    def weight(self, W: Tensor) -> Tensor:
        return W

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return b + W @ (self.weights @ self.prompts)[0]

    def input(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + (self.weights @ self.prompts)[0].to(x.dtype)


@dataclass(frozen=True)
class _OfPACE(Method):
    paper = "arXiv:2409.17137"
    rank: int = 10
    where: Where = Where(roles=ROLES)

    def __post_init__(self) -> None:
        positive("rank", self.rank)


@register("lora-mul")
@dataclass(frozen=True)
class LoRAMul(_OfPACE):
    r"""LoRAmul: weights and biases of every linear map, multiplied by low-rank tables.

    $$W' = W \circ (1 + B A), \qquad b' = b \circ (1 + \delta), \qquad A \in \mathbb{R}^{r \times i},\
      B \in \mathbb{R}^{o \times r}$$

    A is xavier-uniform, B and delta are zero.  Matrices that read one input share A: q, k and v, fc1 and the gate of a
    gated MLP.  Trains r(o + i) + o numbers a module, a fused qkv being one: 1,557,504 for r=10 on ViT-B/16.  PACE's own
    "LoRAmul + VPTadd" is `lora-mul+vpt-add`, 2,203,104.

    Ni et al. 2024, arXiv:2409.17137.
    """

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for sites in by_input(vit, self.where):
            right = xavier(self.rank, sites[0].shape[1])
            for site in sites:
                out = site.shape[0]
                delta = None if site.shift is None else nn.Parameter(torch.zeros(out))
                yield Rewrite(site, Multiplied(nn.Parameter(torch.zeros(out, self.rank)), right, delta))


@register("vpt-add")
@dataclass(frozen=True)
class VPTAdd(_OfPACE):
    r"""VPTadd: a vector added to what every linear map reads.

    $$y = W (x + p) + b, \qquad p = P_d P_u, \qquad P_d \in \mathbb{R}^{1 \times r},\ P_u \in \mathbb{R}^{r \times i}$$

    P_d is xavier-uniform, P_u zero; matrices that read one input share p.  Trains r(i + 1) numbers an input: 645,600
    for r=10 on ViT-B/16.  p moves the bias by W p, so a matrix without one does not see it.

    Departure from the released code: there a matrix without a bias gets one.

    Ni et al. 2024, arXiv:2409.17137.
    """

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for sites in by_input(vit, self.where):
            change = Prompted(self.rank, sites[0].shape[1])
            for site in (site for site in sites if site.shift is not None):
                yield Rewrite(site, change)
