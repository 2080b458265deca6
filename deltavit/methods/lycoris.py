"""Increments of high rank from small factors: Hadamard and Kronecker products.

Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv:2108.06098, and Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", arXiv:2309.14859.  Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.draw import linear_init
from ..core.edit import Edit, LowRank, Rewrite
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Site, Where
from .lora import OfLowRank


class HadamardProduct(LowRank):
    """dW = scale (up1 down1) o (up2 down2), of rank r^2: its factors hold the products of all pairs of columns."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, dropout: float):
        super().__init__(dropout)
        out, inp = shape
        self.up1, self.down1 = linear_init(out, rank), linear_init(rank, inp)
        self.up2, self.down2 = nn.Parameter(torch.zeros(out, rank)), linear_init(rank, inp)
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        up = self.up1[:, :, None] * (self.scale * self.up2)[:, None, :]
        down = self.down1[:, None, :] * self.down2[None, :, :]
        return up.flatten(1), down.flatten(0, 1)


class KroneckerProduct(LowRank):
    """dW = scale w (x) (up down), with w [n, n], up [o/n, r] and down [r, i/n]."""

    def __init__(self, site: Site, n: int, rank: int, scale: float, dropout: float):
        super().__init__(dropout)
        out, inp = site.shape
        if out % n or inp % n:
            raise ValueError(f"n={n} must divide both sides of {site.name}, which is {out} x {inp}")
        self.w = linear_init(n, n)
        self.up, self.down = linear_init(out // n, rank), nn.Parameter(torch.zeros(rank, inp // n))
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(self.w), dtype=self.w.dtype, device=self.w.device)
        return torch.kron(self.scale * self.w, self.up), torch.kron(eye, self.down)


@register("loha")
@dataclass(frozen=True)
class LoHa(OfLowRank):
    r"""LoHa: an increment that is the Hadamard product of two of low rank.

    $$W' = W + s\,(B_1 A_1) \circ (B_2 A_2), \qquad A_j \in \mathbb{R}^{r \times i},\ B_j \in \mathbb{R}^{o \times r}$$

    Its rank is r^2.  All are drawn as nn.Linear draws but B_2, which is zero.  Trains 2r(o + i) numbers a site: 294,912
    for r=4 on q and v of ViT-B/16, as many as LoRA with r=8.

    Hyeon-Woo et al. 2022, arXiv:2108.06098; Yeh et al. 2024, arXiv:2309.14859.
    """

    paper = "arXiv:2108.06098"
    rank: int = 4

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, HadamardProduct(site.shape, self.rank, self.scale, self.dropout))


@register("lokr")
@dataclass(frozen=True)
class LoKr(Method):
    r"""LoKr: an increment that is a Kronecker product.

    $$W' = W + s\,C \otimes (B A), \qquad C \in \mathbb{R}^{n \times n},\ A \in \mathbb{R}^{r \times i/n},\
      B \in \mathbb{R}^{o/n \times r}$$

    Its rank is n r.  C and B are drawn as nn.Linear draws, A is zero.  Trains n^2 + r(o + i)/n numbers a site: 74,112
    for n=4, r=8 on q and v of ViT-B/16.  kadaptation is a sum of such products, whose C all layers share.

    Yeh et al. 2024, arXiv:2309.14859.
    """

    paper = "arXiv:2309.14859"
    n: int = 4
    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    where: Where = Where(roles=("q", "v"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("n", self.n)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, KroneckerProduct(site, self.n, self.rank, self.scale, self.dropout))
