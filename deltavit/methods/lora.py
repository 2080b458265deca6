"""Low-rank adaptation of weights.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, Section 4.1.
Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.draw import linear_init
from ..core.edit import Edit, LowRank, Rewrite
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where


class Product(LowRank):
    """dW = scale * up @ down, with down kaiming-uniform (a=sqrt 5) and up zero, so that dW = 0 at the start."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, dropout: float, fixed: bool):
        super().__init__(dropout)
        out, inp = shape
        down = linear_init(rank, inp)  # [r, i]
        if fixed:
            self.register_buffer("down", down.detach())
        else:
            self.down = down
        self.up = nn.Parameter(torch.zeros(out, rank))  # [o, r]
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        return (self.up if self.scale == 1 else self.scale * self.up), self.down


@dataclass(frozen=True)
class OfLowRank(Method):
    """The options that LoRA and its kin share."""

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    where: Where = Where(roles=("q", "v"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)


@register("lora")
@dataclass(frozen=True)
class LoRA(OfLowRank):
    r"""LoRA: a low-rank increment of chosen weights.

    $$W' = W + s\,BA, \qquad A \in \mathbb{R}^{r \times i},\ B \in \mathbb{R}^{o \times r}$$

    A is kaiming-uniform, B zero; biases are frozen.  Trains r(o + i) numbers a site: 294,912 for r=8 on q and v of
    ViT-B/16.  `scale` is s = alpha / r of the paper; it differs 30-fold between released codes, and is 1 here.

    Hu et al. 2021, arXiv:2106.09685, Section 4.1.
    """

    paper = "arXiv:2106.09685"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, Product(site.shape, self.rank, self.scale, self.dropout, fixed=False))


@register("lora-fix")
@dataclass(frozen=True)
class LoRAFix(OfLowRank):
    r"""LoRA-Fix: LoRA whose first factor stays as drawn.

    $$W' = W + s\,BA, \qquad A \text{ frozen}$$

    A is drawn from the seed and never trains, B starts at zero.  Half of LoRA's numbers: 73,728 for r=4 on q and v of
    ViT-B/16.  The file keeps B, the seed and a hash of A, and refuses to load where the seed draws another A.

    Compared in He et al. 2022, arXiv:2203.16329v1, Table 2.
    """

    paper = "arXiv:2203.16329"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, Product(site.shape, self.rank, self.scale, self.dropout, fixed=True))
