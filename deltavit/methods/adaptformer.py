"""AdaptFormer: a bottleneck beside the MLP.

Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv:2205.13535.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..core.edit import After, Edit
from ..core.method import Method, positive, register
from ..core.site import Anatomy, Where
from .adapters import Bottleneck, down_up, only_blocks


@register("adaptformer")
@dataclass(frozen=True)
class AdaptFormer(Method):
    r"""AdaptFormer: a bottleneck parallel to the MLP.

    $$x' = x + \text{MLP}(\text{LN}\,x) + s\,(W_{up}\,\text{ReLU}(W_{down}\,x + b_{down}) + b_{up})$$

    As in the released code, it reads the residual stream x before the norm of the MLP, not after it.  down is
    kaiming-uniform, up and both biases zero.  Trains L(2Dr + r + D) numbers: 1,189,632 for r=64 on ViT-B/16, and
    156,768 for r=8; `bias=False` takes both biases away, 147,456 for r=8.  `learnable=True` trains s as well, one
    number a block; dropout acts on the r numbers.

    Departures from the released code: dropout is 0 by default, not 0.1; a learnable s starts at `scale`, not at 1; the
    sum is taken before a LayerScale, where the model has one.

    Chen et al. 2022, arXiv:2205.13535.
    """

    paper = "arXiv:2205.13535"
    rank: int = 64
    scale: float = 0.1
    learnable: bool = False
    dropout: float = 0.0
    bias: bool = True
    where: Where = Where()

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        only_blocks(self.where)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for b in vit.chosen(self.where):
            scale = nn.Parameter(torch.full((), self.scale)) if self.learnable else self.scale
            layers = down_up(vit.widths[b], self.rank, self.bias)
            module = Bottleneck(*layers, nn.ReLU(), scale, self.dropout)
            yield After(vit.mlp[b], module, f"blocks.{b}.mlp", tap=vit.before_mlp[b])
