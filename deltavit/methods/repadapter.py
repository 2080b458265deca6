"""RepAdapter: linear adapters before the frozen matrices, whose second map works in groups.

Luo et al. 2023, "Towards Efficient Visual Adaption via Structural Re-parameterization", arXiv:2302.08106.
Letters: r rank, i the width of what a matrix reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.draw import xavier
from ..core.edit import Edit, Rewrite
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where
from .arc import Serial, by_input


class Grouped(Serial):
    """x' = x + scale (up (down x + a) + b), where each group of outputs of `up` reads a group of the r numbers."""

    def __init__(
        self,
        down: nn.Parameter,
        up: nn.Parameter,
        biases: tuple[nn.Parameter, nn.Parameter] | tuple[None, None],
        groups: int,
        scale: float,
        dropout: float,
    ):
        super().__init__(dropout)
        self.down, self.up = down, up  # [r, i], [i, r / groups]
        self.down_bias: nn.Parameter | None
        self.up_bias: nn.Parameter | None
        self.down_bias, self.up_bias = biases  # [r], [i]
        self.groups, self.scale = groups, scale

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * torch.block_diag(*self.up.chunk(self.groups)), self.down  # type: ignore[no-untyped-call]

    def offset(self) -> Tensor | None:
        if self.down_bias is None or self.up_bias is None:
            return None
        return self.factors()[0] @ self.down_bias + self.scale * self.up_bias


@register("repadapter")
@dataclass(frozen=True)
class RepAdapter(Method):
    r"""RepAdapter: linear adapters, in groups, that merge into the next matrix.

    $$x' = x + s\,\big(U (V x + a) + b\big), \qquad W' = W\,(I + s\,U V),\quad b_W' = b_W + s\,W (U a + b)$$

    V [r, i] is xavier-uniform, U block-diagonal in `groups` blocks [i/g, r/g], zero, as a and b are.  Before q, k and v
    of a block, which share one, and before fc1 (and the gate of a gated MLP).  Trains ir(1 + 1/g) + r + i numbers each:
    239,808 for r=8, g=2 on ViT-B/16, of which 18,624 in a and b, which published counts (0.22 M) leave out.  a and b do
    not reach a matrix without a bias, so that all of it merges.

    Departures from the released code: dropout, on the r numbers, is 0 by default, not 0.1, and leaves a alone.

    Luo et al. 2023, arXiv:2302.08106.
    """

    paper = "arXiv:2302.08106"
    rank: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.0
    where: Where = Where(roles=("q", "k", "v", "fc1"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("groups", self.groups)
        if self.rank % self.groups:
            raise ValueError(f"groups={self.groups} must divide rank={self.rank}")

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for sites in by_input(vit, self.where):
            width = sites[0].shape[1]
            if width % self.groups:
                raise ValueError(f"groups={self.groups} must divide what {sites[0].name} reads, {width} numbers")
            maps = xavier(self.rank, width), nn.Parameter(torch.zeros(width, self.rank // self.groups))
            biases = nn.Parameter(torch.zeros(self.rank)), nn.Parameter(torch.zeros(width))
            full = Grouped(*maps, biases, self.groups, self.scale, self.dropout)
            unshifted = Grouped(*maps, (None, None), self.groups, self.scale, self.dropout)
            for site in sites:
                yield Rewrite(site, unshifted if site.shift is None else full)
