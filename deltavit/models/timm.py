"""timm's Vision Transformers: ViT, DeiT, DINOv2, CLIP and SigLIP image towers, BEiT, EVA."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import ModelError
from ..core.site import Anatomy, Preprocessing, Site, family

KINDS = ("VisionTransformer", "Eva", "Beit")
REFUSED = {"VisionTransformerDistilled": "it has two heads, whose logits it averages"}


@family("timm")
def recognise(model: Any) -> Anatomy | None:
    # by name, so that importing us does not import timm, which takes seconds
    kinds = {c.__name__ for c in type(model).__mro__ if c.__module__.startswith("timm.models.")}
    if not kinds.intersection(KINDS):
        return None
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)
    tag = str((getattr(model, "pretrained_cfg", None) or {}).get("tag") or "")
    for kind, reason in REFUSED.items():
        if kind in kinds:
            raise ModelError(f"{name} is refused: {reason}, and deltavit trains one")
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    attention = model.blocks[0].attn
    patch = next(n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return Anatomy(
        model=model,
        name=f"{name}.{tag}" if tag else name,
        family="timm",
        width=model.embed_dim,
        heads=attention.num_heads,
        grid=tuple(model.patch_embed.grid_size),
        prefix=model.num_prefix_tokens,
        head="head",
        features=model.num_features,
        blocks=blocks,
        attn=[f"{b}.attn" for b in blocks],
        mlp=[f"{b}.mlp" for b in blocks],
        norms=[n for n, m in model.named_modules() if _is_norm(m)],
        patch=patch,
        linears=[
            _linears(name, path, i, block) for i, (path, block) in enumerate(zip(blocks, model.blocks, strict=True))
        ],
        preprocessing=preprocessing(model),
    )


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _linears(name: str, path: str, block: int, module: nn.Module) -> dict[str, Site]:
    attn, mlp = getattr(module, "attn", None), getattr(module, "mlp", None)
    if attn is None or mlp is None or not hasattr(mlp, "fc2"):
        raise ModelError(
            f"{name} is refused: its blocks are {type(module).__name__}, whose parts deltavit does not know"
        )
    sites = {}

    def add(role: str, owner: str, linear: nn.Linear, rows: tuple[int, int] | None = None, **more: object) -> None:
        out, inp = linear.weight.shape
        a, b = rows or (0, out)
        more = {"bias": None if linear.bias is None else "bias", **more}
        sites[role] = Site(f"{path}.{owner}", role, block, (a, b), (b - a, inp), **more)  # type: ignore[arg-type]

    if getattr(attn, "qkv", None) is not None:
        width = attn.qkv.out_features // 3
        # with q and v biases beside it, EVA and BEiT compute F.linear(x, self.qkv.weight, ...) themselves
        beside = getattr(attn, "q_bias", None) is not None
        called = not beside or getattr(attn, "qkv_bias_separate", False)
        for i, role in enumerate("qkv"):
            add(role, "attn.qkv", attn.qkv, (i * width, (i + 1) * width), called=called)
    else:
        for role in "qkv":
            add(role, f"attn.{role}_proj", getattr(attn, f"{role}_proj"))
    add("o", "attn.proj", attn.proj)
    if hasattr(mlp, "fc1_x"):
        add("fc1", "mlp.fc1_x", mlp.fc1_x)
        add("fc1g", "mlp.fc1_g", mlp.fc1_g)
    else:
        add("fc1", "mlp.fc1", mlp.fc1)
    add("fc2", "mlp.fc2", mlp.fc2)
    return sites


def preprocessing(model: Any) -> Preprocessing:
    """What the checkpoint was trained with, at the size that this model was built for."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    default = Preprocessing()
    return Preprocessing(
        size=int(model.patch_embed.img_size[0]),  # type: ignore[union-attr, index, arg-type]
        mean=tuple(cfg.get("mean", default.mean)),  # type: ignore[arg-type]
        std=tuple(cfg.get("std", default.std)),  # type: ignore[arg-type]
        interpolation=str(cfg.get("interpolation", default.interpolation)),
        crop=float(cfg.get("crop_pct") or default.crop),
    )
