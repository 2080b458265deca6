"""Rescaling of keys, values and hidden features.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.edit import Change, Edit, Rewrite, affine
from ..core.method import Method, register
from ..core.site import Anatomy, Site, Where
from .ssf import Rescale


class RescaledInput(Change):
    """Each input times a number of its own, from 1: W' = W diag(g)."""

    rescales = True

    def __init__(self, site: Site):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(site.shape[1]))  # [i]

    def weight(self, W: Tensor) -> Tensor:
        return W * self.gain

    def input(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return affine(x, self.gain, None)


@register("ia3")
@dataclass(frozen=True)
class IA3(Method):
    r"""(IA)^3: keys, values and hidden features are rescaled.

    $$k' = l_k \circ k, \qquad v' = l_v \circ v, \qquad y = W_2\,(l_{f} \circ \sigma(W_1 x))$$

    All from one.  Trains 2D + F numbers a block: 55,296 on ViT-B/16.  The first two scale the outputs of k and v,
    biases included, the third the inputs of fc2; other roles that `where` names are scaled at their outputs.

    Liu et al. 2022, arXiv:2205.05638, Section 3.3.
    """

    paper = "arXiv:2205.05638"
    where: Where = Where(roles=("k", "v", "fc2"))

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, RescaledInput(site) if site.role == "fc2" else Rescale(site, shift=False))
