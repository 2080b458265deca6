"""Kronecker Adaptation: a weight increment that is a sum of Kronecker products.

He et al. 2022, "Parameter-efficient Fine-tuning for Vision Transformers", arXiv:2203.16329v1, Eq. 4;
its later versions are called "Parameter-efficient Model Adaptation for Vision Transformers".
Letters: n products, r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.draw import linear_init
from ..core.edit import Edit, LowRank, Rewrite
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where


class KroneckerSum(LowRank):
    """dW = scale * sum_k A_k (x) u_k v_k, with the slow weights A shared by every site.

    `slow` is A [n, n, n] itself, or the columns and rows [n, n] of A_k = column_k row_k.
    """

    def __init__(
        self,
        slow: tuple[nn.Parameter, ...],
        shape: tuple[int, int],
        rank: int,
        scale: float,
        dropout: float,
        shift: nn.Parameter | None,
    ):
        n, (out, inp) = len(slow[0]), shape
        if out % n or inp % n:
            raise ValueError(f"n={n} must divide both sides of the weight, which is {out} x {inp}")
        super().__init__(dropout, shift)
        if len(slow) == 1:
            self.slow = slow[0]
        else:
            self.slow_columns, self.slow_rows = slow
        self.n = n
        self.u = linear_init(n, out // n, rank)
        self.v = nn.Parameter(torch.zeros(n, rank, inp // n))  # zero: dW = 0 at the start
        self.scale = scale

    def slow_weights(self) -> Tensor:
        """A, [n, n, n]."""
        return self.slow if hasattr(self, "slow") else self.slow_columns[:, :, None] * self.slow_rows[:, None, :]

    def factors(self) -> tuple[Tensor, Tensor]:
        # sum_k A_k (x) u_k v_k = [A_k (x) u_k]_k @ [I (x) v_k]_k, of rank n n r
        n, rank = self.n, self.v.shape[1]
        slow = self.slow_weights().permute(1, 0, 2)[:, None, :, :, None]
        up = slow * self.u.transpose(0, 1)[:, :, None, :]  # [a, c, k, b, r]
        eye = torch.eye(n, dtype=self.v.dtype, device=self.v.device)
        down = eye[:, None, :, None] * self.v[:, None, :, None, :]  # [k, b, r, d, i/n]
        up, down = up.reshape(-1, n * n * rank), down.reshape(n * n * rank, -1)
        return (up if self.scale == 1 else self.scale * up), down


@register("kadaptation")
@dataclass(frozen=True)
class KAdaptation(Method):
    r"""Kronecker Adaptation: a sum of Kronecker products with shared slow weights.

    $$W' = W + s \sum_{k=1}^{n} A_k \otimes (u_k v_k), \qquad
      A_k \in \mathbb{R}^{n \times n},\ u_k \in \mathbb{R}^{o/n \times r},\ v_k \in \mathbb{R}^{r \times i/n}$$

    The slow weights A are shared by all layers, one set for each role (`share=True`: one set for all roles), drawn from
    N(0, 1/n); u is kaiming-uniform, v zero.  Trains r(o + i) numbers a site, whatever n is, and n^3 a set: 36,992 for
    n=4, r=1 on q and v of ViT-B/16.  `slow="rank-1"` makes every A_k a product of two vectors, and `bias=True` adds a
    shift of the output that the sites of a block share: with n=32 the count of PEViT, 50,176.

    Departures from the released code (PEViT), which cannot learn: there u and v both start at zero, so their gradients
    are zero for ever and only the bias trains; its scale is 160; a missing transpose mixes the images of a batch.
    The parameter formula in the paper's Table 1 divides by n where it must not; ours counts what trains.

    He et al. 2022, arXiv:2203.16329v1, Eq. 4.
    """

    paper = "arXiv:2203.16329"
    n: int = 4
    rank: int = 1
    scale: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    slow: Literal["full", "rank-1"] = "full"
    share: bool = False
    where: Where = Where(roles=("q", "v"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("n", self.n)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        slow: dict[str, tuple[nn.Parameter, ...]] = {}
        shifts: dict[tuple[int, int], nn.Parameter] = {}
        for site in vit.sites(self.where):
            key = "" if self.share else site.role
            if key not in slow:
                slow[key] = self._slow()
            where = site.block, site.shape[0]
            if self.bias and where not in shifts:
                shifts[where] = nn.Parameter(torch.zeros(site.shape[0]))
            change = KroneckerSum(slow[key], site.shape, self.rank, self.scale, self.dropout, shifts.get(where))
            yield Rewrite(site, change)

    def _slow(self) -> tuple[nn.Parameter, ...]:
        if self.slow == "full":
            return (nn.Parameter(torch.randn(self.n, self.n, self.n) / self.n**0.5),)
        # the variance of a full A_k's entries, 1/n
        return tuple(nn.Parameter(torch.randn(self.n, self.n) / self.n**0.25) for _ in range(2))
