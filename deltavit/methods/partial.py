"""Methods that train some of the model's sub-modules, or its last blocks, and freeze all others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..core.edit import Edit, Own
from ..core.errors import MethodError
from ..core.method import Method, positive, register
from ..core.site import Anatomy, inside

PARTS = ("attention", "ffn")


@register("partial")
@dataclass(frozen=True)
class Partial(Method):
    """Partial fine-tuning: the attention or the ffn modules of some blocks train.

    Weights and biases of the linear maps in the chosen sub-modules; norms, patch and position embedding are frozen.
    Attention of all blocks is 28,348,416 numbers on ViT-B/16, ffn of all blocks 56,669,184, both in one half of the
    blocks 42,508,800.  `layers` names any set of sub-modules instead, as in ("3.attention", "7.ffn", "-1.ffn"); rank
    them by their fine-tuned angle after a full fine-tuning.

    The eight strategies are a reconstruction from the paper's abstract, which has their number but not their list:
    attention, ffn or both, in all blocks, the first half or the last half, without both in all.  Of an odd number of
    blocks the middle one belongs to both halves.

    Ye et al. 2023, "Partial Fine-Tuning: A Successor to Full Fine-Tuning for Vision Transformers", arXiv:2312.15681.
    """

    paper = "arXiv:2312.15681"
    strategy: Literal[
        "attention",
        "ffn",
        "attention-first",
        "attention-last",
        "ffn-first",
        "ffn-last",
        "both-first",
        "both-last",
    ] = "attention"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            if not re.fullmatch(r"-?\d+\.(attention|ffn)", layer):
                raise ValueError(f"layers has {layer!r}: name a block and a part, as in '3.attention' or '7.ffn'")

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        known = vit.tensors()
        names: dict[str | None, None] = {}
        for b, part in self.chosen(vit):
            for role, site in vit.linears[b].items():
                if (role in ("q", "k", "v", "o")) == (part == "attention"):
                    names.update(dict.fromkeys((site.tensor, site.bias_tensor)))
        yield from (Own(name) for name in names if name in known)

    def chosen(self, vit: Anatomy) -> list[tuple[int, str]]:
        """(block, part) of the sub-modules that train, in the order of the computation."""
        if self.layers:
            named = [layer.split(".") for layer in self.layers]
            return sorted({(b, part) for block, part in named for b in vit.indices((int(block),))})
        part, _, half = self.strategy.partition("-")
        count = (len(vit.blocks) + 1) // 2
        blocks = range(len(vit.blocks))
        blocks = {"first": blocks[:count], "last": blocks[-count:]}.get(half, blocks)
        return [(b, each) for b in blocks for each in PARTS if part in (each, "both")]


@register("partial-k")
@dataclass(frozen=True)
class PartialK(Method):
    """Partial-k: the last blocks and the final norm train.

    Every tensor of the `last` blocks and of the norms after them: 7,089,408 numbers for the last block of ViT-B/16.

    The baseline Partial-1 of Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119.
    """

    paper = "arXiv:2203.12119"
    last: int = 1

    def __post_init__(self) -> None:
        positive("last", self.last)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        if self.last > len(vit.blocks):
            raise MethodError(f"partial-k.last={self.last}, and {vit.name} has {len(vit.blocks)} blocks")
        after = itertools.takewhile(lambda n: not any(inside(n, b) for b in vit.blocks), reversed(vit.norms))
        paths = [*vit.blocks[-self.last :], *after]
        yield from (Own(name) for name in vit.tensors() if any(inside(name, path) for path in paths))
