"""Weight decomposition into magnitude and direction.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.draw import linear_init
from ..core.edit import Change, Edit, Rewrite, add_thin, affine
from ..core.method import register
from ..core.site import Anatomy
from .lora import OfLowRank


class Decomposed(Change):
    """W' = ratio o V, with V = W + scale up down and ratio = magnitude |W| / |V|, norms of rows, from the value W."""

    reads_weight = True
    alone = True

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, dropout: float):
        super().__init__()
        out, inp = shape
        self.down = linear_init(rank, inp)  # [r, i]
        self.up = nn.Parameter(torch.zeros(out, rank))  # [o, r]
        self.magnitude = nn.Parameter(torch.ones(out))  # [o], in units of |W|
        self.scale, self.dropout = scale, dropout

    def weight(self, W: Tensor) -> Tensor:
        return self._ratio(W)[:, None] * (W + self.scale * self.up @ self.down)

    def output(self, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None) -> Tensor:  # type: ignore[override]
        ratio = self._ratio(W)
        turned = affine(y, ratio, None if b is None else (1 - ratio) * b)  # ratio (y - b) + b
        x = F.dropout(x, self.dropout, self.training)
        return add_thin(x, turned, (ratio * self.scale)[:, None] * self.up, self.down)

    def _ratio(self, W: Tensor) -> Tensor:
        """magnitude |W| / |V|, without V: |V|^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B, B A A^T>, row by row."""
        with torch.no_grad(), torch.autocast(W.device.type, enabled=False):  # a constant to the gradient
            up, down = self.scale * self.up, self.down
            old = torch.linalg.vector_norm(W, dim=1, dtype=down.dtype).square()
            new = old + (up * (2 * W.to(down.dtype) @ down.t() + up @ (down @ down.t()))).sum(1)
            tiny = torch.finfo(down.dtype).tiny  # a row of zeros stays one
            ratio = (old / new.clamp_min(tiny)).sqrt()
        return self.magnitude * ratio  # type: ignore[no-any-return]


@register("dora")
@dataclass(frozen=True)
class DoRA(OfLowRank):
    r"""DoRA: LoRA turns each row of a weight, a magnitude sets its length.

    $$W' = m \circ \frac{W + s\,BA}{\lVert W + s\,BA \rVert}, \qquad m = g \circ \lVert W \rVert$$

    The norm is that of a row, and a constant to the gradient.  A is drawn as nn.Linear draws, B is zero, g is one.
    Trains r(o + i) + o numbers a site: 313,344 for r=8 on q and v of ViT-B/16.

    Departure from the paper, which trains m: g = m / ||W|| trains here, from 1, so that one learning rate fits rows of
    any length.  The paper's step in m is ours times ||W|| under Adam, times its square under SGD.  The change is not
    composed with others of the same matrix, for it normalises their sum.

    Liu et al. 2024, arXiv:2402.09353, Eq. 5; the constant norm: Section 4.3.
    """

    paper = "arXiv:2402.09353"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, Decomposed(site.shape, self.rank, self.scale, self.dropout))
