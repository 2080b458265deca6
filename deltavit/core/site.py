"""Where things are in a frozen Vision Transformer: `Site`, `Where`, `Anatomy`, and the registry of model families.

Letters: D width, L blocks, H heads, F hidden width of the MLP.  Weights are PyTorch's, [out, in].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MethodError, ModelError

ROLES = ("q", "k", "v", "o", "fc1", "fc2")
"""The linear maps of one block, in the order of the computation; `fc1g` is the gate of a gated MLP."""


@dataclass(frozen=True)
class Site:
    """Rows of one frozen matrix, for instance the V third of a fused qkv projection."""

    path: str
    role: str
    block: int
    rows: tuple[int, int]
    shape: tuple[int, int]
    param: str = "weight"
    bias: str | None = "bias"
    called: bool = True
    """False: the module at `path` never runs forward (the model reads its weight itself), so hooks are silent."""

    @property
    def name(self) -> str:
        """Stable name, however the model stores the matrix: `blocks.3.q`."""
        return f"blocks.{self.block}.{self.role}"

    @property
    def tensor(self) -> str:
        """Name of the whole parameter that the rows belong to."""
        return f"{self.path}.{self.param}"


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

    Paths are module paths from the root.  `grid` is (rows, columns) of patches; `prefix` counts the tokens before
    them (class token and registers); `features` is the width that the head reads.
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
    mlp: list[str]
    norms: list[str]
    patch: str
    linears: list[dict[str, Site]]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    options: dict[str, object] = field(default_factory=dict)
    """What `load_model` was asked for beside the name (the image size), so that a file can ask for it again."""
    fingerprint: str = ""

    def sites(self, where: Where) -> list[Site]:
        """The sites that `where` names, block by block.

        Raises:
            MethodError: a role or a block that this model does not have, or no site at all.
        """
        blocks = range(len(self.blocks)) if where.blocks is None else self._blocks(where.blocks)
        known = sorted({role for linears in self.linears for role in linears})
        for role in where.roles:
            if role not in known:
                raise MethodError(f"{self.name} has no role {role!r}; it has {', '.join(known)}")
        found = [
            self.linears[b][role] for b in blocks for role in dict.fromkeys(where.roles) if role in self.linears[b]
        ]
        if not found:
            raise MethodError(f"nothing selected in {self.name}: roles {list(where.roles)}, blocks {where.blocks}")
        return found

    def _blocks(self, chosen: tuple[int, ...]) -> list[int]:
        count = len(self.blocks)
        for b in chosen:
            if not -count <= b < count:
                raise MethodError(f"{self.name} has blocks 0 to {count - 1}, asked for {b}")
        return sorted({b % count for b in chosen})

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
        return [n for n in self.tensors() if n.rsplit(".", 1)[-1] in ("bias", "q_bias", "k_bias", "v_bias")]


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
