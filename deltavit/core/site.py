"""Where things are in a frozen Vision Transformer: `Site`, `Where`, `Anatomy`, and the registry of model families.

Letters: D width, L blocks, H heads, F hidden width of the MLP.  Weights are PyTorch's, [out, in].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import MethodError, ModelError

ROLES = ("q", "k", "v", "o", "fc1", "fc2")
"""The linear maps of one block, in the order of the computation; `fc1g` is the gate of a gated MLP."""
NORM, PATCH = "norm", "patch"
"""Roles of what is not a matrix of a block: every norm, inside the blocks and around them, and the patch embedding."""


@dataclass(frozen=True)
class Site:
    """Rows of one frozen matrix, for instance the V third of a fused qkv projection.

    A change always sees a matrix: a patch embedding that convolves is [D, 3pp], and a norm's scale a column [D, 1], for
    each of its features has an input of its own.
    """

    path: str
    role: str
    block: int
    """-1: outside the blocks."""
    rows: tuple[int, int]
    shape: tuple[int, int]
    param: str = "weight"
    bias: str | None = "bias"
    called: bool = True
    """False: the module at `path` never runs forward (the model reads its weight itself), so hooks are silent."""
    kind: Literal["linear", "conv", "norm"] = "linear"
    part: str = ""
    """What the name ends with, where the role alone does not tell: `norm1`."""
    bias_path: str | None = None
    """Path of the module that holds `bias`, where it is not the one at `path`."""
    bias_rows: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Stable name, however the model stores the matrix: `blocks.3.q`."""
        own = self.part or self.role
        return own if self.block < 0 else f"blocks.{self.block}.{own}"

    @property
    def tensor(self) -> str:
        """Name of the whole parameter that the rows belong to."""
        return f"{self.path}.{self.param}"

    @property
    def shift(self) -> tuple[str, str, tuple[int, int]] | None:
        """Where its bias lies: (module path, parameter, rows); None where it has none."""
        if self.bias is None:
            return None
        return self.path if self.bias_path is None else self.bias_path, self.bias, self.bias_rows or self.rows

    @property
    def bias_tensor(self) -> str | None:
        """Name of the whole parameter that its bias belongs to; None where it has none."""
        return None if self.shift is None else f"{self.shift[0]}.{self.shift[1]}"


@dataclass(frozen=True)
class Where:
    """Which sites a method acts on.  `blocks=None` is all of them; negative numbers count from the last block."""

    roles: tuple[str, ...] = ROLES
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a tensor, as the pretrained model expects it; recorded in every adapter."""

    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    resize: str = "squash"
    """`squash`: both sides to `size` (the VTAB-1k habit). `crop`: short side to `size / crop`, then the centre."""
    crop: float = 1.0


@dataclass
class Anatomy:
    """Where things are in one model, as data.  A model family is one function that fills this in.

    Paths are module paths from the root; lists have an entry a block.  `grid` is (rows, columns) of patches; `prefix`
    counts the tokens before them (class token and registers); `features` is the width that the head reads.
    """

    model: nn.Module
    name: str
    family: str
    width: int
    heads: int
    grid: tuple[int, int]
    prefix: int
    head: str
    features: int
    blocks: list[str]
    attn: list[str]
    """Attention branches: modules that put out what is added to the residual stream."""
    mlp: list[str]
    norms: list[str]
    """Every norm, in the order of the computation; the last is the final one."""
    patch: str
    linears: list[dict[str, Site]]
    before_attn: list[str] = field(default_factory=list)
    """Modules that the residual stream enters on its way to attention: the norm, where it comes first."""
    before_mlp: list[str] = field(default_factory=list)
    after_heads: list[str] = field(default_factory=list)
    """Modules that the concatenated heads enter: `o`, or a norm before it; "" where no module runs there."""
    scores: str = ""
    """Keyword of the attention modules that takes an additive mask [heads, N, N]; "" where there is none."""
    tables: list[str] = field(default_factory=list)
    """Names of the tables of relative position biases that the model has of its own."""
    pool: Literal["token", "all"] = "token"
    """What the head reads of the last block: the class token, or all tokens."""
    fixed_tokens: str = ""
    """Why no token can be inserted, as in "its attention is windowed"; "" where it can."""
    widths: list[int] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    """(rows, columns) of the map that each block's MLP sees; `windows` is the same for its attention."""
    windows: list[tuple[int, int]] = field(default_factory=list)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    options: dict[str, object] = field(default_factory=dict)
    """What `load_model` was asked for beside the name (the image size), so that a file can ask for it again."""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        count = len(self.blocks)
        self.widths = self.widths or [self.width] * count
        self.grids = self.grids or [self.grid] * count
        self.windows = self.windows or self.grids
        self.after_heads = self.after_heads or [""] * count

    def sites(self, where: Where) -> list[Site]:
        """The sites that `where` names, in the order of the computation: patch embedding, block by block, outer norms.

        With `blocks` given, only what lies inside those blocks.

        Raises:
            MethodError: a role or a block that this model does not have, or no site at all.
        """
        blocks = list(range(len(self.blocks))) if where.blocks is None else self.indices(where.blocks)
        roles = dict.fromkeys(where.roles)
        known = {role for linears in self.linears for role in linears} | {NORM, PATCH}
        for role in roles:
            if role not in known:
                raise MethodError(f"{self.name} has no role {role!r}; it has {', '.join(sorted(known))}")
        norms = [self._norm(path) for path in self.norms] if NORM in roles else []
        found = [self._patch()] if PATCH in roles and where.blocks is None else []
        for b in blocks:
            found += [self.linears[b][role] for role in roles if role in self.linears[b]]
            found += [site for site in norms if site.block == b]
        if where.blocks is None:
            found += [site for site in norms if site.block < 0]
        if not found:
            raise MethodError(f"nothing selected in {self.name}: roles {list(where.roles)}, blocks {where.blocks}")
        return found

    def _norm(self, path: str) -> Site:
        host: Any = self.model.get_submodule(path)
        size = original(host, "weight").numel()
        block = next((i for i, b in enumerate(self.blocks) if inside(path, b)), -1)
        part = path.removeprefix(self.blocks[block] + ".") if block >= 0 else path
        bias = "bias" if getattr(host, "bias", None) is not None else None
        return Site(path, NORM, block, (0, size), (size, 1), bias=bias, kind="norm", part=part)

    def _patch(self) -> Site:
        host: Any = self.model.get_submodule(self.patch)
        W = original(host, "weight")
        kind: Literal["linear", "conv"] = "linear" if W.ndim == 2 else "conv"
        bias = "bias" if host.bias is not None else None
        return Site(self.patch, PATCH, -1, (0, len(W)), (len(W), W[0].numel()), bias=bias, kind=kind)

    def indices(self, chosen: tuple[int, ...]) -> list[int]:
        """Block numbers, rising, of chosen ones that may count from the end; MethodError where there is no such."""
        count = len(self.blocks)
        for b in chosen:
            if not -count <= b < count:
                raise MethodError(f"{self.name} has blocks 0 to {count - 1}, asked for {b}")
        return sorted({b % count for b in chosen})

    def chosen(self, where: Where) -> list[int]:
        """The blocks that `where` names; for methods that act on blocks as a whole."""
        return list(range(len(self.blocks))) if where.blocks is None else self.indices(where.blocks)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every parameter of the backbone by name, all but the head; the base's own, whatever adapters lie over it."""
        found = {}
        for path, module in self.model.named_modules():
            if inside(path, self.head) or "_deltavit" in path or "parametrizations" in path:
                continue
            over = list(module.parametrizations) if hasattr(module, "parametrizations") else []
            for name in [n for n, p in module._parameters.items() if p is not None] + over:
                found[f"{path}.{name}".lstrip(".")] = original(module, name)
        return found

    def biases(self) -> list[str]:
        """Names of all bias vectors of the backbone, norms and patch embedding included."""
        return [n for n in self.tensors() if n.endswith("bias")]


def original(host: Any, name: str) -> nn.Parameter:
    """The base's own tensor, which an adapter may have shadowed or rewritten."""
    shadows = host._modules.get("_deltavit_shadows")
    if shadows is not None and f"{name}@0" in shadows._parameters:
        return shadows._parameters[f"{name}@0"]  # type: ignore[no-any-return]
    if "parametrizations" in host._modules and name in host.parametrizations:
        return host.parametrizations[name].original  # type: ignore[no-any-return]
    return getattr(host, name)  # type: ignore[no-any-return]


def inside(name: str, path: str) -> bool:
    """Whether a dotted name lies at or below a module path (block 1 is not a prefix of block 10)."""
    return bool(path) and (name == path or name.startswith(path + "."))


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            digest.update(value.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


Family = Callable[[nn.Module], Anatomy | None]
_families: dict[str, Family] = {}


def family(name: str) -> Callable[[Family], Family]:
    """Register a model family: a function from a model to its `Anatomy`, or None where it is not one of its own."""

    def keep(function: Family) -> Family:
        _families[name] = function
        return function

    return keep


def anatomy(model: nn.Module, **known: object) -> Anatomy:
    """The anatomy of a model, found once and kept on it; its fingerprint is that of the values at that moment.

    Raises:
        ModelError: no registered family recognises the model.
    """
    found = model.__dict__.get("_deltavit_anatomy")
    if found is None:
        for recognise in _families.values():
            found = recognise(model)
            if found is not None:
                break
        else:
            raise ModelError(
                f"{type(model).__name__} is not a Vision Transformer whose anatomy deltavit knows; "
                f"known families: {', '.join(sorted(_families)) or 'none'}"
            )
        found = _replace(found, fingerprint=fingerprint(found.tensors()), **known)  # type: ignore[arg-type]
        model.__dict__["_deltavit_anatomy"] = found
    return found
