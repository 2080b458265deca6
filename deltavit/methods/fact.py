"""FacT: all weights of a Vision Transformer as one tensor, whose increment is factorised.

Jie and Deng 2023, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", arXiv:2212.03145.
The tensor has one slice [D, D] for each of q, k, v and o, and four each for fc1 (its output columns) and fc2 (its
input rows), in every block: 12 L slices.  Letters: D width, L blocks, r rank.  Where a model has several widths, as
Swin has, there is one such tensor for the blocks of each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.draw import linear_init, xavier
from ..core.edit import Edit, LowRank, Rewrite
from ..core.method import Method, positive, register
from ..core.site import ROLES, Anatomy, Site, Where


class Slices(LowRank):
    """dW of one site: its slices are scale * V S_j U, beside each other along the side that is longer than D.

    U [r, D] and V [D, r] are shared by all sites; `middle` gives S [slices, r, r].  As in the released code, dropout
    acts on the r numbers between S and V.
    """

    def __init__(self, u: nn.Parameter, v: nn.Parameter, site: Site, scale: float, dropout: float):
        super().__init__()
        self.u, self.v = u, v
        self.scale, self.drop = scale, dropout
        width = u.shape[1]
        long = max(site.shape)
        if min(site.shape) != width or long % width:
            raise ValueError(
                f"{site.name} is {site.shape[0]} x {site.shape[1]}, which cannot be cut into {width} x {width} slices"
            )
        self.slices = long // width
        self.wide = site.shape[1] > width
        self.dropout = dropout

    @abstractmethod
    def middle(self) -> Tensor:
        """S, [slices, r, r]."""

    def factors(self) -> tuple[Tensor, Tensor]:
        middle = self.middle() if self.scale == 1 else self.scale * self.middle()
        if self.wide:  # slices along the input: down = [S_1 U, ..., S_m U]
            return self.v, (middle @ self.u).transpose(0, 1).reshape(len(self.u), -1)
        return (self.v @ middle).reshape(-1, len(self.u)), self.u

    def output(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        if not (self.dropout and self.training):
            return super().output(x, y)
        # dropout sits between S and V, one mask for each slice of the output
        middle = self.scale * self.middle()
        if self.wide:
            h = torch.einsum("...jd,bd,jab->...a", x.view(*x.shape[:-1], self.slices, -1), self.u, middle)
            delta = F.dropout(h, self.dropout) @ self.v.t()
        else:
            h = torch.einsum("...d,bd,jab->...ja", x, self.u, middle)
            delta = (F.dropout(h, self.dropout) @ self.v.t()).flatten(-2)
        return y + delta.to(y.dtype)


class TensorTrain(Slices):
    """S belongs to the site."""

    def __init__(self, u: nn.Parameter, v: nn.Parameter, site: Site, scale: float, dropout: float):
        super().__init__(u, v, site, scale, dropout)
        rank = len(u)
        self.core = nn.Parameter(torch.stack([linear_init(rank, rank).detach() for _ in range(self.slices)]))

    def middle(self) -> Tensor:
        return self.core


class Tucker(Slices):
    """S_j = sum_m P[j, m] C_m, with C [r, r, r] and the rows of P [12 L, r] that belong to the site."""

    def __init__(
        self,
        u: nn.Parameter,
        v: nn.Parameter,
        site: Site,
        scale: float,
        dropout: float,
        core: nn.Parameter,
        positions: nn.Parameter,
        at: int,
    ):
        super().__init__(u, v, site, scale, dropout)
        self.core, self.positions, self.at = core, positions, at

    def middle(self) -> Tensor:
        mine = self.positions[self.at : self.at + self.slices]
        return (mine @ self.core.flatten(1)).view(-1, *self.core.shape[1:])


@dataclass(frozen=True)
class _FacT(Method):
    paper = "arXiv:2212.03145"
    rank: int = 16
    scale: float = 1.0
    dropout: float = 0.0
    where: Where = Where(roles=ROLES)

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def by_width(self, vit: Anatomy) -> Iterator[tuple[nn.Parameter, nn.Parameter, list[Site]]]:
        """U, V and the sites that share them: all of them, or those of one width where the model has several."""
        groups: dict[int, list[Site]] = {}
        for site in vit.sites(self.where):
            groups.setdefault(vit.width if site.block < 0 else vit.widths[site.block], []).append(site)
        for width, sites in groups.items():
            yield linear_init(self.rank, width), nn.Parameter(torch.zeros(width, self.rank)), sites


@register("fact-tt")
@dataclass(frozen=True)
class FacTTT(_FacT):
    r"""FacT-TT: the increment of all weights as a tensor train.

    $$\Delta W_j = s\,V \Sigma_j U, \qquad U \in \mathbb{R}^{r \times D},\ V \in \mathbb{R}^{D \times r},\
      \Sigma_j \in \mathbb{R}^{r \times r}$$

    U and V are shared by all slices of all layers, each slice j has its own core.  U and the cores are drawn as
    nn.Linear draws, V is zero; biases are frozen.  Trains 2Dr + 12Lr^2 numbers: 61,440 for r=16 on ViT-B/16, and 8,448
    for r=4, which fits the paper's 8K version.  `scale` is the hyper-parameter that matters most (the released
    configurations have 0.01 to 100); choose it on validation images.

    Departures from the released code: dropout is 0 by default, not 0.1; each core of fc2 is drawn alone, there the four
    of a block as one matrix, which makes them half as large.

    Jie and Deng 2023, arXiv:2212.03145.
    """

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for u, v, sites in self.by_width(vit):
            for site in sites:
                yield Rewrite(site, TensorTrain(u, v, site, self.scale, self.dropout))


@register("fact-tk")
@dataclass(frozen=True)
class FacTTK(_FacT):
    r"""FacT-TK: the increment of all weights in Tucker form.

    $$\Delta W_j = s\,V \Big(\sum_m P_{jm} C_m\Big) U, \qquad C \in \mathbb{R}^{r \times r \times r},\
      P \in \mathbb{R}^{12L \times r}$$

    U, V, C and P are shared by all layers; U is drawn as nn.Linear draws, C and P xavier-uniform, V is zero.  Trains
    2Dr + r^3 + 12Lr numbers: 30,976 for r=16 and 86,528 for r=32 on ViT-B/16.

    Departures from the released code: its reshape of the fc1 and fc2 cores interleaves the slices, ours keeps them
    apart; dropout is 0 by default, not 0.1.

    Jie and Deng 2023, arXiv:2212.03145.
    """

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for u, v, sites in self.by_width(vit):
            counts = [max(site.shape) // u.shape[1] for site in sites]
            core, positions = xavier(self.rank, self.rank, self.rank), xavier(sum(counts), self.rank)
            at = 0
            for site, count in zip(sites, counts, strict=True):
                yield Rewrite(site, Tucker(u, v, site, self.scale, self.dropout, core, positions, at))
                at += count
