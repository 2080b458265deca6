"""`Tower`: an image tower of another library in the shape that we use, pictures -> features -> head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.site import Anatomy, Preprocessing, Site

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = Preprocessing(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


class NoHead(nn.Identity):
    """In the place of a head: lets the features [B, in_features] through."""

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features = in_features


class Tower(nn.Module):
    """[B, 3, size, size] -> [B, classes], or features [B, F] where the model came without a head.

    Args:
        body: the other library's image model.
        read: what the head is given, from what the body puts out.
        head: `NoHead`, or the linear head that the model came with.
        project: the projection into the space that images share with texts.
        normalize: bring features to length 1, as CLIP does before it compares them with texts.
        options: keyword arguments of every call of the body.
    """

    def __init__(
        self,
        body: nn.Module,
        read: Callable[[Any], Tensor],
        head: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        *,
        project: nn.Module | None = None,
        normalize: bool = False,
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.body, self.project, self.head = body, project, head
        self.read, self.normalize, self.options = read, normalize, options or {}
        self.name, self.preprocessing = name, preprocessing

    def forward(self, x: Tensor) -> Tensor:
        features = self.read(self.body(x, **self.options))
        if self.project is not None:
            features = self.project(features)
        if self.normalize:
            features = F.normalize(features, dim=-1)
        return self.head(features)  # type: ignore[no-any-return]

    @property
    def features(self) -> int:
        return int(self.head.in_features)  # type: ignore[arg-type]


def comes_from(model: nn.Module, package: str) -> bool:
    """Whether a library defines the model's class; by name, so that asking does not import the library."""
    return any(c.__module__.split(".")[0] == package for c in type(model).__mro__)


def linear_site(model: nn.Module, path: str, role: str, block: int, called: bool = True) -> Site:
    """The site of a whole linear layer."""
    host: Any = model.get_submodule(path)
    out, inp = host.weight.shape
    bias = None if host.bias is None else "bias"
    return Site(path, role, block, (0, out), (out, inp), bias=bias, called=called)


def norms_of(model: nn.Module) -> list[str]:
    """Every LayerNorm, in the order in which the modules were made."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]


def rooted(vit: Anatomy, root: str, **known: Any) -> Anatomy:
    """The anatomy of a model, seen from one that holds it at `root`."""

    def at(value: Any) -> Any:
        if isinstance(value, list):
            return [at(v) for v in value]
        if isinstance(value, dict):
            return {role: at(v) for role, v in value.items()}
        if isinstance(value, Site):
            return replace(value, path=at(value.path), bias_path=at(value.bias_path))
        return f"{root}.{value}" if value else value

    paths = ("blocks", "attn", "mlp", "norms", "patch", "linears", "before_attn", "before_mlp", "after_heads", "tables")
    moved = {f.name: at(getattr(vit, f.name)) for f in fields(vit) if f.name in paths}
    return replace(vit, **moved, **known)


# what a head reads; plain functions, for a closure would not survive a copy of the model


def whole(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]


def pooled(y: Any) -> Tensor:
    return y.pooler_output  # type: ignore[no-any-return]


def token(y: Any) -> Tensor:
    return y.last_hidden_state[:, 0]  # type: ignore[no-any-return]


def mean(y: Any, prefix: int) -> Tensor:
    return y.last_hidden_state[:, prefix:].mean(1)  # type: ignore[no-any-return]


def token_and_mean(y: Any, prefix: int) -> Tensor:
    return torch.cat([token(y), mean(y, prefix)], -1)
