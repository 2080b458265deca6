"""Bottleneck adapters on what a branch puts out: Houlsby, Pfeiffer, AdapterDrop; and the module all bypasses share.

Letters: D width, L blocks, r rank, the width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import After, Edit, like, thin
from ..core.errors import MethodError
from ..core.method import Method, positive, register
from ..core.site import ROLES, Anatomy, Where

BRANCHES = ("attn", "mlp")
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
Layers = Callable[[int, int], tuple[nn.Module, nn.Module]]


class Linear(nn.Linear):
    """nn.Linear in the precision of its input; its bias starts at zero."""

    def __init__(self, inp: int, out: int, bias: bool = True):
        super().__init__(inp, out, bias)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return thin(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = like(x, self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def down_up(width: int, rank: int, bias: bool = True) -> tuple[Linear, Linear]:
    """D -> r as nn.Linear draws it (kaiming-uniform), and r -> D at zero, so that nothing is added at the start."""
    down, up = Linear(width, rank, bias), Linear(rank, width, bias)
    nn.init.zeros_(up.weight)
    return down, up


class Bottleneck(nn.Module):
    """y + scale * up(dropout(middle(down(norm(z))))): z, y [..., D], where z is y itself or what the branch reads."""

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        middle: nn.Module,
        scale: float | nn.Parameter,
        dropout: float,
        norm: nn.Module | None = None,
        serial: bool = False,
    ):
        super().__init__()
        self.norm, self.down, self.middle, self.up = norm or nn.Identity(), down, middle, up
        self.scale, self.dropout, self.serial = scale, dropout, serial

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.middle(self.down(self.norm(y if self.serial else x)))
        delta: Tensor = self.scale * self.up(F.dropout(h, self.dropout, self.training))
        return y + delta.to(y.dtype)


def only_blocks(where: Where) -> None:
    """Refuse roles, for a method that acts on whole branches."""
    if where.roles != ROLES:
        raise ValueError(
            f"where.roles={list(where.roles)} selects matrices, and this method acts on whole branches: "
            "leave roles out, where.blocks selects blocks"
        )


@dataclass(frozen=True)
class _Serial(Method):
    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    norm: bool = False
    act: Literal["gelu", "relu"] = "gelu"

    def __post_init__(self) -> None:
        positive("rank", self.rank)

    def serial(
        self, vit: Anatomy, blocks: Iterable[int], branches: Iterable[str], layers: Layers = down_up
    ) -> Iterator[After]:
        """An adapter after each of these branches; `layers` makes its two linear maps from D and r."""
        for b in blocks:
            for branch in branches:
                width = vit.widths[b]
                norm = LayerNorm(width) if self.norm else None
                middle = ACTIVATIONS[self.act]()
                module = Bottleneck(*layers(width, self.rank), middle, self.scale, self.dropout, norm, serial=True)
                yield After(getattr(vit, branch)[b], module, f"blocks.{b}.{branch}")


@dataclass(frozen=True)
class SerialInBlocks(_Serial):
    """Adapters after branches of chosen blocks."""

    where: Where = Where()

    def __post_init__(self) -> None:
        super().__post_init__()
        only_blocks(self.where)


@register("houlsby")
@dataclass(frozen=True)
class Houlsby(SerialInBlocks):
    r"""Houlsby adapters: a bottleneck after attention and after the MLP.

    $$y' = y + s\,(W_{up}\,\sigma(W_{down}\,y + b_{down}) + b_{up}), \qquad W_{down} \in \mathbb{R}^{r \times D}$$

    y is what a branch puts out, before a LayerScale and before it is added to the residual stream.  down is
    kaiming-uniform, up and both biases zero.  Trains 2L(2Dr + r + D) numbers: 313,536 for r=8 on ViT-B/16.
    `norm=True` puts a trained LayerNorm, 2D numbers, before down; dropout acts on the r numbers.

    Departure from the paper: the start is the base exactly, not nearly (there both matrices are drawn from a truncated
    N(0, 0.01^2)), and the model's own norms stay frozen.

    Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, Section 2.1.
    """

    paper = "arXiv:1902.00751"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        yield from self.serial(vit, vit.chosen(self.where), BRANCHES)


@register("pfeiffer")
@dataclass(frozen=True)
class Pfeiffer(SerialInBlocks):
    r"""Pfeiffer adapters: a bottleneck after the MLP alone.

    $$y' = y + s\,(W_{up}\,\sigma(W_{down}\,y + b_{down}) + b_{up}), \qquad y = \text{MLP}(\text{LN}\,x)$$

    As Houlsby's, with one adapter a block.  Trains L(2Dr + r + D) numbers: 156,768 for r=8 on ViT-B/16.
    `norm=True`, `act="relu"` and r=64 are the adapter in the code of He et al. 2022 (PEViT, arXiv:2203.16329),
    1,208,064.

    Departures from released code: there VPT starts both matrices at zero, so that only the bias of up ever trains, and
    PEViT draws both from N(0, 0.02^2) and computes the MLP twice.

    Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv:2005.00247.
    """

    paper = "arXiv:2005.00247"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        yield from self.serial(vit, vit.chosen(self.where), ("mlp",))


@register("adapterdrop")
@dataclass(frozen=True)
class AdapterDrop(_Serial):
    r"""AdapterDrop: Pfeiffer adapters in the last blocks alone.

    $$y'_l = y_l + s\,(W_{up}\,\sigma(W_{down}\,y_l + b_{down}) + b_{up}), \qquad l > L - k$$

    `top` is k.  The blocks below have no adapter, so their activations need no gradient.  Trains k(2Dr + r + D)
    numbers: 99,136 for k=1, r=64 on ViT-B/16, and 100,672 with `norm=True`, which is what the Kronecker paper's
    published count (230,633 with head) decodes to.

    This is the paper's specialized AdapterDrop, with a fixed k; its robust one, which draws k anew for each training
    batch, is not here.

    Rueckle et al. 2021, "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv:2010.11918, Section 3.
    """

    paper = "arXiv:2010.11918"
    rank: int = 64
    top: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("top", self.top)

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        count = len(vit.blocks)
        if self.top > count:
            raise MethodError(f"adapterdrop.top={self.top}, and {vit.name} has {count} blocks")
        yield from self.serial(vit, range(count - self.top, count), ("mlp",))
