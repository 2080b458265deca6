"""Visual prompts: learned tokens among those of the picture.

Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119.
Letters: p prompts, D width, L blocks, h side of a patch in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import After, Before, Edit
from ..core.errors import MethodError
from ..core.method import Method, positive, register
from ..core.site import Anatomy


class Prompt(nn.Module):
    """Put p tokens behind the prefix, or into the places of the p that are there: [B, N, D] -> [B, N + p or N, D]."""

    def __init__(self, tokens: Tensor, prefix: int, dropout: float, replace: bool):
        super().__init__()
        self.tokens = nn.Parameter(tokens)  # [p, D]
        self.prefix, self.dropout = prefix, dropout
        self.resume = prefix + replace * len(tokens)

    def forward(self, x: Tensor) -> Tensor:
        own = F.dropout(self.tokens.to(x.dtype).expand(len(x), -1, -1), self.dropout, self.training)
        return torch.cat([x[:, : self.prefix], own, x[:, self.resume :]], 1)


class Remove(nn.Module):
    """Take the p tokens behind the prefix out again."""

    def __init__(self, prefix: int, count: int):
        super().__init__()
        self.prefix, self.count = prefix, count

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, : self.prefix], y[:, self.prefix + self.count :]], 1)


@dataclass(frozen=True)
class _VPT(Method):
    paper = "arXiv:2203.12119"
    starts_as_base = False
    tokens: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        positive("tokens", self.tokens)

    def prompted(self, vit: Anatomy, blocks: list[str]) -> Iterator[Edit]:
        """Prompts enter at the first of these blocks, are replaced at the others, and leave after the model's last."""
        if vit.fixed_tokens:
            raise MethodError(f"{self.name} inserts tokens, and {vit.name} refuses them: {vit.fixed_tokens}")
        side = vit.preprocessing.size // vit.grid[0]
        bound = (6 / (3 * side**2 + vit.width)) ** 0.5
        for b, path in enumerate(blocks):
            tokens = torch.empty(self.tokens, vit.width).uniform_(-bound, bound)
            yield Before(path, Prompt(tokens, vit.prefix, self.dropout, replace=b > 0), f"blocks.{b}.prompt")
        yield After(vit.blocks[-1], Remove(vit.prefix, self.tokens), "remove")


@register("vpt-shallow")
@dataclass(frozen=True)
class VPTShallow(_VPT):
    r"""VPT-shallow: learned tokens that enter before the first block.

    $$[c,\ P,\ E] \to \text{block}_1 \to \dots \to \text{block}_L, \qquad P \in \mathbb{R}^{p \times D}$$

    The prompts stand between the class token (and registers) and the patches, have no position embedding, and leave
    after the last block.  P is uniform in +-sqrt(6 / (3 h^2 + D)), so the model does not start as the base.  Trains p D
    numbers: 7,680 for p=10 on ViT-B/16.  `dropout` acts on the prompts.

    Departure from the released code: the prompts leave before the final norm, not after it, so that a head which reads
    all tokens does not read them; for one that reads the class token this is the same.

    Jia et al. 2022, arXiv:2203.12119.
    """

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        yield from self.prompted(vit, vit.blocks[:1])


@register("vpt-deep")
@dataclass(frozen=True)
class VPTDeep(_VPT):
    r"""VPT-deep: learned tokens, others in every block.

    $$[c_l,\ \_,\ E_l] = \text{block}_l([c_{l-1},\ P_{l-1},\ E_{l-1}]), \qquad P_l \in \mathbb{R}^{p \times D}$$

    As VPT-shallow, but each block has prompts of its own, in whose places those of the block before have left.  Trains
    L p D numbers: 92,160 for p=10 on ViT-B/16.

    Jia et al. 2022, arXiv:2203.12119.
    """

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        yield from self.prompted(vit, vit.blocks)
