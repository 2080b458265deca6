"""Adapter re-composing: linear adapters before the frozen matrices, made from bases that all layers share.

Dong et al. 2023, "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing", arXiv:2310.06234.
Letters: r rank, i the width of what a matrix reads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.draw import xavier
from ..core.edit import Change, Edit, Rewrite, thin
from ..core.method import positive, register
from ..core.site import Anatomy, Site, Where
from .ssf import ChosenInit


def by_input(vit: Anatomy, where: Where) -> Iterable[list[Site]]:
    """The chosen sites in groups that read one input: q, k and v of a block, and fc1 with the gate of a gated MLP."""
    if "fc1" in where.roles and any("fc1g" in linears for linears in vit.linears):
        where = replace(where, roles=(*where.roles, "fc1g"))
    groups: dict[tuple[int, str], list[Site]] = {}
    for site in vit.sites(where):
        reads = {"k": "q", "v": "q", "fc1g": "fc1"}.get(site.role, site.role)
        groups.setdefault((site.block, reads), []).append(site)
    return groups.values()


class Serial(Change):
    """A linear adapter before the matrix, x' = x + up down x + offset: W' = W + W up down, b' = b + W offset."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(up [i, r], down [r, i])."""

    @abstractmethod
    def offset(self) -> Tensor | None:
        """[i]; None before a matrix without a bias, which there would be nothing to merge into."""

    def weight(self, W: Tensor) -> Tensor:
        up, down = self.factors()
        return W + (W @ up) @ down

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        offset = self.offset()
        return b if offset is None else b + W @ offset

    @property
    def moves_bias(self) -> bool:
        return self.offset() is not None

    def input(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (up, down), offset = self.factors(), self.offset()
        return x + thin(F.dropout(thin(x, down), self.dropout, self.training), up, offset).to(x.dtype)


class Recomposed(Serial):
    """up = down^T diag(coefficients), with `down` shared by all layers."""

    def __init__(self, down: nn.Parameter, coefficients: nn.Parameter, shift: nn.Parameter | None, dropout: float):
        super().__init__(dropout)
        self.down = down  # [r, i]
        self.coefficients = coefficients  # [r]
        self.shift = shift  # [i]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down.t() * self.coefficients, self.down

    def offset(self) -> Tensor | None:
        return self.shift


@register("arc")
@dataclass(frozen=True)
class ARC(ChosenInit):
    r"""ARC: linear adapters re-composed from a base that all layers share.

    $$x' = x + D\,\mathrm{diag}(c)\,D^\top x + b, \qquad
      W' = W\,(I + D\,\mathrm{diag}(c)\,D^\top),\quad b_W' = b_W + W b$$

    Before q, k and v of a block, which share c and b, and before fc1 (and the gate of a gated MLP).  D [i, r] is
    shared by all layers, one before attention and one before the MLP, and one for each width where a model has
    several.  D is xavier-uniform; c and b are zero.  Trains 2(ir + L(i + r)) numbers: 96,432 for r=50 on ViT-B/16;
    48,216 before attention alone, where.roles=q,k,v, the paper's ARC_att.  b does not reach a matrix without a bias,
    so that all of it merges.

    Departures from the released code: one version of it draws c xavier-uniform before the MLP (`init="paper"`), so that
    the model does not start as the pretrained one, another has zero as here; dropout, on the r numbers, is 0 by
    default, not 0.1.

    Dong et al. 2023, arXiv:2310.06234.
    """

    paper = "arXiv:2310.06234"
    rank: int = 50
    dropout: float = 0.0
    where: Where = Where(roles=("q", "k", "v", "fc1"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    @property
    def starts_as_base(self) -> bool:  # type: ignore[override]
        return self.init == "identity" or set(self.where.roles) <= set("qkv")

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        bases: dict[tuple[str, int], nn.Parameter] = {}
        for sites in by_input(vit, self.where):
            role, width = sites[0].role, sites[0].shape[1]
            if (role, width) not in bases:
                bases[role, width] = xavier(self.rank, width)
            drawn = self.init == "paper" and role not in "qkv"
            start = xavier(1, self.rank)[0] if drawn else torch.zeros(self.rank)
            shared = bases[role, width], nn.Parameter(start.detach())
            full = Recomposed(*shared, nn.Parameter(torch.zeros(width)), self.dropout)
            unshifted = Recomposed(*shared, None, self.dropout)
            for site in sites:
                yield Rewrite(site, unshifted if site.shift is None else full)
