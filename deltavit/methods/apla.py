"""Tuning of a random part of each attention's output projection.

Sorkhei et al. 2025, "APLA: A Simple Adaptation Method for Vision Transformers", arXiv:2503.11335.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.edit import Change, Edit, Rewrite, thin
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Site, Where


class SomeRows(Change):
    """An increment of some rows and of their entries of the bias; no gradient of the others is formed."""

    rows: Tensor

    def __init__(self, site: Site, count: int):
        super().__init__()
        out, inp = site.shape
        if count > out:
            raise ValueError(f"rank={count}, but {site.name} has only {out} rows: give at most {out}")
        self.register_buffer("rows", torch.randperm(out)[:count].sort().values)
        self.delta = nn.Parameter(torch.zeros(count, inp))  # [r, i]
        self.shift = nn.Parameter(torch.zeros(count)) if site.shift is not None else None  # [r]

    def weight(self, W: Tensor) -> Tensor:
        return W.index_add(0, self.rows, self.delta)

    def bias(self, b: Tensor, W: Tensor) -> Tensor:
        return b if self.shift is None else b.index_add(0, self.rows, self.shift)

    @property
    def moves_bias(self) -> bool:
        return self.shift is not None

    def output(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        delta = thin(x, self.delta)
        return y.index_add(-1, self.rows, (delta if self.shift is None else delta + self.shift).to(y.dtype))


@register("apla")
@dataclass(frozen=True)
class APLA(Method):
    r"""APLA: some output rows of each attention's output projection train.

    $$W'_R = W_R + \Delta, \qquad b'_R = b_R + \beta, \qquad
      \Delta \in \mathbb{R}^{r \times i},\ \beta \in \mathbb{R}^r$$

    In every block R is `rank` row numbers, drawn at random without repetition.  Trains r(i + 1) numbers a site: 73,824
    for r=8 on ViT-B/16, and 7,087,104 for r=768, all rows.

    Departure from the paper, where the rows themselves train: here it is their increment, from zero, so that weight
    decay pulls towards the pretrained weights.  The file keeps it, the seed and a hash of the row numbers.

    Sorkhei et al. 2025, arXiv:2503.11335.
    """

    paper = "arXiv:2503.11335"
    rank: int = 8
    where: Where = Where(roles=("o",))

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, SomeRows(site, self.rank))
