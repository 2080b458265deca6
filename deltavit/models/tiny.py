"""A small Vision Transformer of our own, for tests and docs: separate q, k and v, and a few thousand numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.site import Anatomy, Preprocessing, Site, family


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, N, D], [heads, N, N]
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TinyViT(nn.Module):
    """Pre-norm ViT with a class token: [B, 3, size, size] -> [B, classes]."""

    def __init__(
        self, size: int = 16, patch: int = 4, width: int = 24, depth: int = 3, heads: int = 3, classes: int = 10
    ):
        super().__init__()
        self.size, self.grid = size, (size // patch, size // patch)
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, 1 + self.grid[0] * self.grid[1], width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


@family("tiny")
def recognise(model: nn.Module) -> Anatomy | None:
    if not isinstance(model, TinyViT):
        return None
    width = model.norm.normalized_shape[0]
    paths = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    linears = []
    for block in range(len(model.blocks)):
        sites = {}
        for role, path in paths.items():
            path = f"blocks.{block}.{path}"
            out, inp = model.get_submodule(path).weight.shape  # type: ignore[union-attr, misc]
            sites[role] = Site(path, role, block, (0, out), (out, inp))  # type: ignore[has-type]
        linears.append(sites)
    blocks = [f"blocks.{b}" for b in range(len(linears))]
    return Anatomy(
        model=model,
        name="tiny",
        family="tiny",
        width=width,
        heads=model.blocks[0].attn.heads,  # type: ignore[union-attr, arg-type]
        grid=model.grid,
        prefix=1,
        head="head",
        features=width,
        blocks=blocks,
        attn=[f"{b}.attn" for b in blocks],
        mlp=[f"{b}.mlp" for b in blocks],
        norms=[n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)],
        patch="patch",
        linears=linears,
        before_attn=[f"{b}.norm1" for b in blocks],
        before_mlp=[f"{b}.norm2" for b in blocks],
        after_heads=[f"{b}.attn.o" for b in blocks],
        scores="mask",
        preprocessing=Preprocessing(size=model.size),
    )
