"""Positions inside attention: LePE on its values, RPB on its scores.

Compared in He et al. 2022, "Parameter-efficient Fine-tuning for Vision Transformers", arXiv:2203.16329v1,
Table 2.
Letters: H heads, D width, d width of a head, h x w the grid of patches, or the window where attention has windows.
Patches are the last h w tokens; what stands before them (class token, registers, prompts) has no place in the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.edit import Before, Edit, Own
from ..core.errors import MethodError
from ..core.method import Method, register
from ..core.site import Anatomy, Where, inside


def reaching(vit: Anatomy, where: Where) -> list[int]:
    """The chosen blocks; by default those whose patch tokens reach the head.

    Where it reads the class token alone, patches of the last block do not, so nothing there could train.
    """
    blocks = vit.chosen(where)
    return blocks[:-1] if where.blocks is None and vit.pool == "token" else blocks


class ValueConv(nn.Module):
    """x + DWConv(v): x [B, N, D] the concatenated heads, v [B, N, D] the values, on the map of patches."""

    def __init__(self, width: int, grid: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        self.grid = grid

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        before = v.shape[1] - self.grid[0] * self.grid[1]
        maps = v[:, before:].transpose(1, 2).reshape(len(v), -1, *self.grid)
        local = F.conv2d(maps, self.weight.to(v.dtype), self.bias.to(v.dtype), padding=1, groups=len(self.bias))
        return x + F.pad(local.flatten(2).transpose(1, 2), (0, 0, before, 0)).to(x.dtype)


@register("lepe")
@dataclass(frozen=True)
class LePE(Method):
    r"""LePE: a depthwise convolution of the values beside attention.

    $$\text{softmax}(QK^\top / \sqrt{d})\,V + \text{DWConv}(V)$$

    A 3 x 3 kernel and a bias for each channel of V, on the map of patches; the class token has no part in it.  All
    start at zero.  Trains 10 D numbers a block: 92,160 on ViT-B/16 with `where.blocks` 0 to 11.  By default the last
    block is left out where the head reads the class token alone, for what LePE does to patches there is read by
    nobody: 84,480.

    Departure from CSWin: LePE is added to a frozen model, so it starts at zero.

    Dong et al. 2022, "CSWin Transformer", arXiv:2107.00652; as a way of tuning: He et al. 2022, arXiv:2203.16329.
    """

    paper = "arXiv:2107.00652"
    where: Where = Where()

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        for b in reaching(vit, self.where):
            v = vit.linears[b]["v"]
            if not (v.called and vit.after_heads[b]):
                raise MethodError(
                    f"lepe works between the values and the output projection, and {vit.name} keeps them inside "
                    f"{vit.attn[b]}: its attention reads its weights itself; use a method of weights, such as lora"
                )
            module = ValueConv(v.shape[0], vit.windows[b])
            yield Before(vit.after_heads[b], module, f"blocks.{b}.lepe", tap=v)


class RelativeBias(nn.Module):
    """What is added to the scores, [H, N, N], for x [B, N, D]; row: who looks, column: who is looked at."""

    index: Tensor

    def __init__(self, heads: int, grid: tuple[int, int], cls: bool):
        super().__init__()
        h, w = grid
        self.patches, self.cls = h * w, cls
        self.table = nn.Parameter(torch.zeros(heads, (2 * h - 1) * (2 * w - 1) + 3 * cls))
        row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
        index = (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1
        self.register_buffer("index", index.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        before = x.shape[1] - self.patches - self.cls
        among = self.table.index_select(1, self.index).view(-1, self.patches, self.patches)
        bias = F.pad(among, (before, 0, before, 0))
        if not self.cls:
            return bias
        to_patch, from_patch, own = self.table[:, -3:, None].expand(-1, -1, self.patches).unbind(1)  # each [H, hw]
        top = torch.cat([own[:, :1], F.pad(to_patch, (before, 0))], 1)
        left = F.pad(from_patch, (before, 0))
        return torch.cat([top[:, None], torch.cat([left[..., None], bias], 2)], 1)


@register("rpb")
@dataclass(frozen=True)
class RPB(Method):
    r"""RPB: a trained bias of attention for every relative position.

    $$\text{softmax}(QK^\top / \sqrt{d} + B)\,V, \qquad B_{ij} = T[y_i - y_j,\ x_i - x_j]$$

    A table T [H, (2h-1)(2w-1)] for each block, zero at the start; pairs with a class token or register have no bias.
    `cls=True` gives the class token three more entries a head, as in BEiT: for looking at a patch, for being looked at
    by one, and for itself.  Trains 104,976 numbers on ViT-B/16 with `where.blocks` 0 to 11, and 105,408 with `cls`.  By
    default the last block is left out where the head reads the class token alone: rows of patches are read by nobody
    there, so at most two numbers a head could train.

    A model that has such tables of its own (Swin, BEiT) trains those, as they are, in all its blocks.

    Liu et al. 2021, "Swin Transformer", arXiv:2103.14030, Eq. 4; as a way of tuning: He et al. 2022, arXiv:2203.16329.
    """

    paper = "arXiv:2103.14030"
    cls: bool = False
    where: Where = Where()

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        if vit.tables:
            within = [vit.blocks[b] for b in vit.chosen(self.where)]
            for name in vit.tables:
                if self.where.blocks is None or any(inside(name, block) for block in within):
                    yield Own(name)
            return
        if not vit.scores:
            raise MethodError(
                f"rpb adds to attention scores, and {vit.name} has no way in for that: its attention takes no mask; "
                "use a method of weights, such as lora"
            )
        if self.cls and not vit.prefix:
            raise MethodError(f"rpb.cls=True is for a class token, and {vit.name} has none: set cls=False")
        for b in reaching(vit, self.where):
            module = RelativeBias(vit.heads, vit.windows[b], self.cls)
            yield Before(vit.attn[b], module, f"blocks.{b}.rpb", into=vit.scores)
