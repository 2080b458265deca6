"""Methods that train a subset of the model's own tensors.  They merge exactly: they *are* the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..core.edit import Edit, Own
from ..core.method import Method, register
from ..core.site import Anatomy, Where, inside


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning.

    Every tensor of the backbone trains: 85,798,656 on ViT-B/16.  Give the body a smaller learning rate than the head
    (AdamW at most 1e-4 in every careful comparison).
    """

    paper = "baseline"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        yield from map(Own, vit.tensors())


@register("linear")
@dataclass(frozen=True)
class Linear(Method):
    """Linear probing.

    Only the head trains, C(D+1) numbers, on the features after the final norm.  No batch norm before the head,
    which AdaptFormer's and PEViT's code add.
    """

    paper = "baseline"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        yield from ()


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """BitFit: the biases train.

    `which="all"`: every bias vector, of linear layers, norms and patch embedding, 102,912 numbers on ViT-B/16.
    `which="linear"`: those of the blocks' linear layers alone, 82,944.  The bias of k is among them although softmax
    cannot see it, as in all released code, so that counts agree.

    Ben Zaken et al. 2022, "BitFit", arXiv:2106.10199; sites as in VPT's code.
    """

    paper = "arXiv:2106.10199"
    which: Literal["all", "linear"] = "all"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        linear = {site.bias_tensor for linears in vit.linears for site in linears.values()}
        for name in vit.biases():
            if self.which == "all" or name in linear:
                yield Own(name)


@register("layernorm")
@dataclass(frozen=True)
class LayerNorm(Method):
    """LayerNorm tuning: the norms' weights and biases train.

    `which="all"`: all norms, 38,400 numbers on ViT-B/16 (25 norms; CLIP's towers have a 26th, 39,936).
    `which="final"`: the last one only, 1,536, which is what the Kronecker paper's published count (131,497 with head)
    decodes to.  `which="outer"`: those outside the blocks, 3,072 on a CLIP tower, that table's other count.

    Compared in He et al. 2022, arXiv:2203.16329v1, Table 2.
    """

    paper = "arXiv:2203.16329"
    which: Literal["all", "final", "outer"] = "all"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        tensors = vit.tensors()
        outer = [path for path in vit.norms if not any(inside(path, block) for block in vit.blocks)]
        for path in {"all": vit.norms, "final": vit.norms[-1:], "outer": outer}[self.which]:
            yield from (Own(f"{path}.{p}") for p in ("weight", "bias") if f"{path}.{p}" in tensors)


@register("attention")
@dataclass(frozen=True)
class Attention(Method):
    """Attention tuning: all linear maps of the attention train.

    q, k, v and the output projection with their biases, in the chosen blocks: 28,348,416 numbers on ViT-B/16.
    Norms are not included.

    Touvron et al. 2022, "Three things everyone should know about Vision Transformers", arXiv:2203.09795.
    """

    paper = "arXiv:2203.09795"
    where: Where = Where(roles=("q", "k", "v", "o"))

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        tensors = vit.tensors()
        names = dict.fromkeys(name for site in vit.sites(self.where) for name in (site.tensor, site.bias_tensor))
        yield from (Own(name) for name in names if name in tensors)
