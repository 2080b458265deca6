"""Kronecker Adaptation: a weight increment that is a sum of Kronecker products.

He et al. 2022, "Parameter-efficient Fine-tuning for Vision Transformers", arXiv:2203.16329v1, Eq. 4.
Letters: n products, r rank, o x i the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.edit import Edit, LowRank, Rewrite
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where


class KroneckerSum(LowRank):
    """dW = scale * sum_k A_k (x) u_k v_k, with the slow weights A shared by every site."""

    def __init__(self, slow: nn.Parameter, shape: tuple[int, int], rank: int, scale: float, dropout: float, bias: bool):
        n, (out, inp) = len(slow), shape
        if out % n or inp % n:
            raise ValueError(f"n={n} must divide both sides of the weight, which is {out} x {inp}")
        super().__init__(dropout, nn.Parameter(torch.zeros(out)) if bias else None)
        self.slow = slow  # [n, n, n]
        self.u = nn.Parameter(torch.empty(n, out // n, rank))
        nn.init.kaiming_uniform_(self.u, a=5**0.5)
        self.v = nn.Parameter(torch.zeros(n, rank, inp // n))  # zero: dW = 0 at the start
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        # sum_k A_k (x) u_k v_k = [A_k (x) u_k]_k @ [I (x) v_k]_k, of rank n n r
        n, rank = len(self.slow), self.v.shape[1]
        up = self.slow.permute(1, 0, 2)[:, None, :, :, None] * self.u.transpose(0, 1)[:, :, None, :]  # [a, c, k, b, r]
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
    n=4, r=1 on q and v of ViT-B/16.  `bias=True` adds a trainable shift of the output.

    Departures from the released code (PEViT), which cannot learn: there u and v both start at zero, so their gradients
    are zero for ever and only the bias trains; its scale is 160; a missing transpose mixes the images of a batch.
    The parameter formula in the paper's Table 1 divides by n where it must not; ours counts what trains.

    He et al. 2022, arXiv:2203.16329, Eq. 4.
    """

    paper = "arXiv:2203.16329"
    n: int = 4
    rank: int = 1
    scale: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    share: bool = False
    where: Where = Where(roles=("q", "v"))

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        positive("n", self.n)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        slow: dict[str, nn.Parameter] = {}
        for site in vit.sites(self.where):
            key = "" if self.share else site.role
            if key not in slow:
                slow[key] = nn.Parameter(torch.randn(self.n, self.n, self.n) / self.n**0.5)
            change = KroneckerSum(slow[key], site.shape, self.rank, self.scale, self.dropout, self.bias)
            yield Rewrite(site, change)
