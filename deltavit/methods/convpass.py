"""Convpass: a bottleneck with a convolution on the map of patches, beside both branches.

Jie and Deng 2022, "Convolutional Bypasses Are Better Vision Transformer Adapters", arXiv:2207.07039.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import After, Edit, like
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where
from .adapters import BRANCHES, Bottleneck, down_up, only_blocks


class MapConvolution(nn.Conv2d):
    """QuickGELU, a 3 x 3 convolution, QuickGELU: [B, N, r] or [B, h, w, r] -> the same.

    Patches are the last h w tokens and see their neighbours on the map; each token before them is a map of its own,
    of one place, so only the centre of the kernel sees it.
    """

    def __init__(self, rank: int, grid: tuple[int, int], init: str):
        super().__init__(rank, rank, 3, padding=1)
        self.grid = grid
        if init == "identity":
            nn.init.dirac_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = quick_gelu(x)
        w, b = like(x, self.weight, self.bias)
        if x.ndim == 4:
            return quick_gelu(F.conv2d(x.movedim(-1, 1), w, b, padding=1).movedim(1, -1))
        alone, patches = x.tensor_split([x.shape[1] - self.grid[0] * self.grid[1]], 1)
        patches = (
            F.conv2d(patches.transpose(1, 2).reshape(len(x), -1, *self.grid), w, b, padding=1)
            .flatten(2)
            .transpose(1, 2)
        )
        return quick_gelu(torch.cat([F.linear(alone, w[:, :, 1, 1], b), patches], 1))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@register("convpass")
@dataclass(frozen=True)
class Convpass(Method):
    r"""Convpass: a bottleneck with a 3 x 3 convolution of the patches, parallel to attention and MLP.

    $$x' = x + f(\text{LN}\,x) + s\,W_{up}\,\sigma(\text{Conv}(\sigma(W_{down}\,\text{LN}\,x))), \qquad
      \sigma(z) = z \cdot \text{sigmoid}(1.702\,z)$$

    f is attention or the MLP; the bypass reads what f reads.  The class token and registers are convolved each alone;
    where attention has windows, the patches of a window are the map.  down is xavier-uniform, up and all biases zero,
    the convolution the identity (`init="identity"`) or xavier-uniform.  Trains 2L(2Dr + r + D + 9r^2 + r) numbers:
    327,552 for r=8 on ViT-B/16; `which="attn"` is half of it.  The released configurations choose s, and the init,
    for each data set; dropout acts before up.

    Departures from the released code: dropout is 0 by default, not 0.1; beside attention with windows it convolves the
    whole map; the sum is taken before a LayerScale, where the model has one.

    Jie and Deng 2022, arXiv:2207.07039.
    """

    paper = "arXiv:2207.07039"
    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    which: Literal["both", "attn"] = "both"
    init: Literal["identity", "xavier"] = "identity"
    where: Where = Where()

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        only_blocks(self.where)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for b in vit.chosen(self.where):
            for branch in BRANCHES if self.which == "both" else BRANCHES[:1]:
                down, up = down_up(vit.widths[b], self.rank)
                nn.init.xavier_uniform_(down.weight)
                grid = (vit.windows if branch == "attn" else vit.grids)[b]
                module = Bottleneck(down, up, MapConvolution(self.rank, grid, self.init), self.scale, self.dropout)
                yield After(getattr(vit, branch)[b], module, f"blocks.{b}.{branch}")
