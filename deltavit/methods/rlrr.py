"""Low-rank rescaling of weights, with a residual.

Dong et al. 2024, "Low-Rank Rescaled Vision Transformer Fine-Tuning: A Residual Design Approach", arXiv:2403.19067.
Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.draw import kaiming
from ..core.edit import Change, Edit, Rewrite
from ..core.method import positive, register
from ..core.site import NORM, PATCH, ROLES, Anatomy, Where
from .ssf import AROUND, ChosenInit, Rescale


class Hadamard(Change):
    """W' = W o (1 + left right): every entry times a number of its own, from a low-rank table [o, i].

    There is no face on activations: it would be a second product with W, which costs more than to rebuild W.
    """

    rescales = True

    def __init__(self, left: nn.Parameter, right: nn.Parameter):
        super().__init__()
        self.left, self.right = left, right  # [o, r], [r, i]

    def weight(self, W: Tensor) -> Tensor:
        return W * (1 + self.left @ self.right)


class Rescaled(Hadamard):
    """The same, and b' = b + shift."""

    def __init__(self, left: nn.Parameter, right: nn.Parameter, shift: nn.Parameter | None):
        super().__init__(left, right)
        self.shift = shift  # [o]

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return b if self.shift is None else b + self.shift

    @property
    def moves_bias(self) -> bool:
        return self.shift is not None


@register("rlrr")
@dataclass(frozen=True)
class RLRR(ChosenInit):
    r"""RLRR: rows and columns of every weight rescaled, with a residual.

    $$W' = W \circ (1 + l\,r^\top), \qquad b' = b + f, \qquad
      l \in \mathbb{R}^{o \times \rho},\ r \in \mathbb{R}^{i \times \rho}$$

    q, k, v, o, fc1 and fc2 are rescaled so; norms and patch embedding by a scale and a shift, as in SSF.  `rank` is
    rho, 1 in the paper.  Trains rho(o + i) + o numbers a matrix and 2o a norm: 288,768 for rho=1 on ViT-B/16.  A site
    without a bias has no f.

    Departure from the paper: l = 0, r kaiming-uniform and scales of 1, so that it starts at the pretrained model;
    `init="paper"` draws l kaiming-uniform too, which moves the weights by 7 %, and scales and shifts as SSF does.

    Dong et al. 2024, arXiv:2403.19067.
    """

    paper = "arXiv:2403.19067"
    rank: int = 1
    where: Where = Where(roles=(PATCH, NORM, *ROLES))

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        drawn = self.init == "paper"
        for site in vit.sites(self.where):
            if site.role in (NORM, PATCH):
                yield Rewrite(site, Rescale(site, std=AROUND * drawn))
                continue
            out, inp = site.shape
            left = kaiming(out, self.rank) if drawn else nn.Parameter(torch.zeros(out, self.rank))
            shift = None if site.shift is None else nn.Parameter(torch.zeros(out))
            yield Rewrite(site, Rescaled(left, kaiming(self.rank, inp), shift))
