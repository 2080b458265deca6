"""Adaptation by Householder transformations.

Dong et al. 2024, "Efficient Adaptation of Pre-trained Vision Transformer via Householder Transformation",
arXiv:2410.22952.  Letters: r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.draw import linear_init
from ..core.edit import Change, Edit, Rewrite, add_thin, affine
from ..core.method import Method, register
from ..core.site import Anatomy, Where


class Householder(Change):
    """dW = up down + (I - l l^T) diag(d) (I - r r^T), of full rank, yet cheap to apply: a reflection is a dot product.

    `normalise` makes them true reflections, I - 2 v v^T / |v|^2.
    """

    def __init__(self, shape: tuple[int, int], rank: int, normalise: bool):
        super().__init__()
        out, inp = shape
        self.left = nn.Parameter(torch.randn(out) / out**0.5)  # [o]
        self.right = nn.Parameter(torch.randn(inp) / inp**0.5)  # [i]
        self.diagonal = nn.Parameter(torch.zeros(min(shape)))
        self.up = nn.Parameter(torch.zeros(out, rank)) if rank else None  # [o, r]
        self.down = linear_init(rank, inp) if rank else None  # [r, i]
        self.normalise = normalise

    def weight(self, W: Tensor) -> Tensor:
        up, down = self._factors()
        out, inp = W.shape
        return (
            W + F.pad(torch.diag(self.diagonal), (0, inp - len(self.diagonal), 0, out - len(self.diagonal))) + up @ down
        )

    def output(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        up, down = self._factors()
        n = len(self.diagonal)
        straight = affine(x[..., :n], self.diagonal, None).to(y.dtype)
        if n < len(self.left):
            straight = F.pad(straight, (0, len(self.left) - n))
        return add_thin(x, y + straight, up, down)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The increment without its diagonal d, which is of rank 2 + r.

        (I - a l l^T) d (I - b r r^T) = d - a l (l^T d) + (a b (l^T d r) l - b d r) r^T; up [o, 2 + r], down [2 + r, i].
        """
        left, right, d = self.left, self.right, self.diagonal
        a, b = (2 / v.square().sum() if self.normalise else 1.0 for v in (left, right))
        n = len(d)
        ld, dr = F.pad(left[:n] * d, (0, len(right) - n)), F.pad(d * right[:n], (0, len(left) - n))
        ups, downs = [-a * left, a * b * (left @ dr) * left - b * dr], [ld, right]
        up, down = torch.stack(ups, 1), torch.stack(downs)
        if self.up is None or self.down is None:
            return up, down
        return torch.cat([up, self.up], 1), torch.cat([down, self.down])


@register("hta")
@dataclass(frozen=True)
class HTA(Method):
    r"""HTA: an increment of full rank between two Householder transformations.

    $$W' = W + B A + (I - v_l v_l^\top)\,\mathrm{diag}(\delta)\,(I - v_r v_r^\top), \qquad
      A \in \mathbb{R}^{r \times i},\ B \in \mathbb{R}^{o \times r},\ \delta \in \mathbb{R}^{\min(o, i)}$$

    The diagonal is rectangular where the matrix is.  delta and B are zero, A is drawn as nn.Linear draws, v from
    N(0, 1/length).  `rank=0` leaves B A out.  Trains (r + 1)(o + i) + min(o, i) numbers a site: 184,320 for r=1 on q,
    k, v and o of ViT-B/16; biases are frozen.

    The paper does not normalise v, so that its I - v v^T reflects only where |v|^2 = 2; `normalise=True` uses
    I - 2 v v^T / |v|^2 instead.

    Dong et al. 2024, arXiv:2410.22952.
    """

    paper = "arXiv:2410.22952"
    rank: int = 1
    normalise: bool = False
    where: Where = Where(roles=("q", "k", "v", "o"))

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, Householder(site.shape, self.rank, self.normalise))
