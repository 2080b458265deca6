"""Scaling and shifting of features.

Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv:2210.08823.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.edit import ByRows, Edit, Rewrite
from ..core.method import Method, register
from ..core.site import NORM, PATCH, ROLES, Anatomy, Site, Where

AROUND = 0.02
"""Standard deviation of the paper's init, N(1, 0.02) for a scale and N(0, 0.02) for a shift."""


class Rescale(ByRows):
    """Each output times a number of its own, plus another, from gain = 1, shift = 0.

    A site without a bias has no shift: there would be nothing to merge it into.
    """

    def __init__(self, site: Site, shift: bool = True, std: float = 0.0):
        super().__init__()
        out = site.shape[0]
        self.biased = site.shift is not None
        self.gain = nn.Parameter(1 + std * torch.randn(out))  # [o]
        self.shift = nn.Parameter(std * torch.randn(out)) if shift and self.biased else None  # [o]

    def affine(self) -> tuple[Tensor, Tensor | None]:
        return self.gain, self.shift

    @property
    def moves_bias(self) -> bool:
        return self.biased


@dataclass(frozen=True)
class ChosenInit(Method):
    """A method whose paper starts it away from the pretrained model; here that is an option."""

    init: Literal["identity", "paper"] = "identity"

    @property
    def starts_as_base(self) -> bool:  # type: ignore[override]
        return self.init == "identity"


@register("ssf")
@dataclass(frozen=True)
class SSF(ChosenInit):
    r"""SSF: a scale and a shift after every operation.

    $$y' = \gamma \circ y + \beta, \qquad W' = \mathrm{diag}(\gamma)\,W,\quad b' = \gamma \circ b + \beta$$

    After the patch embedding, every norm and every linear map of the blocks.  Trains 2o numbers a site of o outputs:
    205,824 on ViT-B/16.  A site without a bias trains the scale alone, so that it merges.

    Departure from the paper: it starts at gamma = 1, beta = 0, the pretrained model; `init="paper"` draws gamma from
    N(1, 0.02) and beta from N(0, 0.02).

    Lian et al. 2022, arXiv:2210.08823.
    """

    paper = "arXiv:2210.08823"
    where: Where = Where(roles=(PATCH, NORM, *ROLES))

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for site in vit.sites(self.where):
            yield Rewrite(site, Rescale(site, std=AROUND * (self.init == "paper")))
