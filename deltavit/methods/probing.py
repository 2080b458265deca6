"""Transformer-probing: one more block on a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import After, Edit
from ..core.method import Method, register
from ..core.site import Anatomy
from .adapters import LayerNorm, Linear


class Block(nn.Module):
    """A pre-norm Transformer block on what the block before it puts out; it starts as the identity.

    [B, N, D], or a map [B, h, w, D], whose places are then its tokens.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = LayerNorm(width), Linear(width, 3 * width), Linear(width, width)
        self.norm2, self.fc1, self.fc2 = LayerNorm(width), Linear(width, 4 * width), Linear(4 * width, width)
        for inner, last in ((self.qkv, self.proj), (self.fc1, self.fc2)):
            nn.init.trunc_normal_(inner.weight, std=0.02)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = y.flatten(1, -2)
        q, k, v = self.qkv(self.norm1(z)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = z + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).to(z.dtype)
        z = z + self.fc2(F.gelu(self.fc1(self.norm2(z)))).to(z.dtype)
        return z.view(y.shape)


@register("transformer-probing")
@dataclass(frozen=True)
class TransformerProbing(Method):
    r"""Transformer-probing: a new block between the frozen backbone and the head.

    $$z = y + \text{Attention}(\text{LN}\,y), \qquad y' = z + \text{MLP}(\text{LN}\,z)$$

    y is what the last block puts out; the model's final norm and the head follow.  The new block is as wide as the last
    one and has heads of the same width, biases everywhere and a hidden layer of 4D.  Weights are truncated normal with
    deviation 0.02, the last map of each branch and all biases zero.  Trains 12D^2 + 13D numbers: 7,087,872 on ViT-B/16.

    Departure from the published count (3,236,521 with head, a block of width 512 on the output of CLIP for every
    model): the width is the model's.

    Compared in He et al. 2022, arXiv:2203.16329v1, Table 2.
    """

    paper = "arXiv:2203.16329"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        width = vit.widths[-1]
        heads = vit.heads * width // vit.width
        yield After(vit.blocks[-1], Block(width, heads), f"blocks.{len(vit.blocks) - 1}.probe")
