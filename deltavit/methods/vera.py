"""Adaptation by vectors between fixed random matrices.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.draw import kaiming
from ..core.edit import Edit, LowRank, Rewrite
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where


class Fixed(nn.Module):
    """The two matrices that all sites share; a module, so that they stay one pair of tensors on any device."""

    up: Tensor
    down: Tensor

    def __init__(self, out: int, rank: int, inp: int):
        super().__init__()
        self.register_buffer("up", kaiming(out, rank).detach())
        self.register_buffer("down", kaiming(rank, inp).detach())


class Scaled(LowRank):
    """dW = diag(b) up diag(d) down, with the first o rows of `up` and the first i columns of `down`."""

    def __init__(self, shape: tuple[int, int], fixed: Fixed, start: float, dropout: float):
        super().__init__(dropout)
        self.fixed = fixed
        self.b = nn.Parameter(torch.zeros(shape[0]))  # [o]
        self.d = nn.Parameter(torch.full((len(fixed.down),), start))  # [r]
        self.inp = shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        down = self.fixed.down
        if self.inp < down.shape[1]:
            down = down[:, : self.inp]
        # d goes with the first factor: sites that read one input then share the product with the second
        return self.b[:, None] * self.fixed.up[: len(self.b)] * self.d, down


@register("vera")
@dataclass(frozen=True)
class VeRA(Method):
    r"""VeRA: two vectors scale a fixed random pair of matrices.

    $$W' = W + \mathrm{diag}(b)\,B\,\mathrm{diag}(d)\,A, \qquad
      A \in \mathbb{R}^{r \times i},\ B \in \mathbb{R}^{o \times r} \text{ frozen}$$

    A and B are kaiming-uniform, shared by all sites; smaller sites use their first rows and columns.  b is zero, d is
    `start`, 0.1.  Trains r + o numbers a site: 24,576 for r=256 on q and v of ViT-B/16.  The file keeps b, d, the seed
    and a hash of A and B.

    Kopiczko et al. 2023, arXiv:2310.11454.
    """

    paper = "arXiv:2310.11454"
    rank: int = 256
    start: float = 0.1
    dropout: float = 0.0
    where: Where = Where(roles=("q", "v"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        if self.start == 0:
            raise ValueError("start=0 and b=0 give each other no gradient: give another start, such as 0.1")

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        sites = vit.sites(self.where)
        out, inp = (max(site.shape[side] for site in sites) for side in (0, 1))
        fixed = Fixed(out, self.rank, inp)
        for site in sites:
            yield Rewrite(site, Scaled(site.shape, fixed, self.start, self.dropout))
