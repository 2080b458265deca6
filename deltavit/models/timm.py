"""timm's Vision Transformers: ViT, DeiT, DINOv2, CLIP and SigLIP image towers, BEiT, EVA, Swin."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..core.errors import ModelError
from ..core.site import Anatomy, Preprocessing, Site, family

KINDS = ("VisionTransformer", "Eva", "Beit", "SwinTransformer", "SwinTransformerV2")
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
    windowed = hasattr(model, "layers")
    if windowed:
        blocks = [f"layers.{i}.blocks.{j}" for i, stage in enumerate(model.layers) for j in range(len(stage.blocks))]
    else:
        blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    modules = [model.get_submodule(b) for b in blocks]
    linears = [_linears(name, path, i, block) for i, (path, block) in enumerate(zip(blocks, modules, strict=True))]
    tables = [n for n, _ in model.named_parameters() if n.endswith("relative_position_bias_table")]
    if windowed:
        fixed = "its attention is windowed"
    elif getattr(model, "rope", None) is not None:
        fixed = "its rotary position embeddings are for its own patches alone"
    else:
        fixed = "its relative position bias has an entry for its own tokens alone" if tables else ""
    # a module comes before the norm of what it puts out, and after the norm of what it reads
    first = [list(block._modules) for block in modules]
    norms_first = [order.index("norm1") < order.index("attn") for order in first]
    return Anatomy(
        model=model,
        name=f"{name}.{tag}" if tag else name,
        family="timm",
        width=linears[0]["o"].shape[0],
        heads=modules[0].attn.num_heads,
        grid=tuple(model.patch_embed.grid_size),
        prefix=getattr(model, "num_prefix_tokens", 0),
        head="head.fc" if windowed else "head",
        features=model.num_features,
        blocks=blocks,
        attn=[f"{b}.attn" for b in blocks],
        mlp=[f"{b}.mlp" for b in blocks],
        norms=[n for n, m in model.named_modules() if _is_norm(m)],
        patch="patch_embed.proj",
        linears=linears,
        before_attn=[f"{b}.norm1" if pre else f"{b}.attn" for b, pre in zip(blocks, norms_first, strict=True)],
        before_mlp=[f"{b}.norm2" if pre else f"{b}.mlp" for b, pre in zip(blocks, norms_first, strict=True)],
        after_heads=[f"{b}.attn.{_after_heads(block.attn)}" for b, block in zip(blocks, modules, strict=True)],
        scores=_scores(modules[0].attn),
        tables=tables,
        pool="token" if model.global_pool == "token" else "all",
        fixed_tokens=fixed,
        widths=[each["o"].shape[0] for each in linears],
        grids=[tuple(block.input_resolution) for block in modules] if windowed else [],
        windows=[tuple(block.window_size) for block in modules] if windowed else [],
        preprocessing=preprocessing(model),
    )


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _after_heads(attn: Any) -> str:
    # a gate multiplies what the projection reads, so there even a norm that does nothing comes first
    normed = not isinstance(getattr(attn, "norm", None), nn.Identity | None) or getattr(attn, "gate", None) is not None
    return "norm" if normed else "proj"


def _scores(attn: nn.Module) -> str:
    if type(attn).__name__ == "DiffAttention":
        return ""  # two maps a head, and the bias meets them in other shapes in its two kernels
    takes = inspect.signature(attn.forward).parameters
    return next((word for word in ("attn_mask", "shared_rel_pos_bias") if word in takes), "")


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
        # EVA, BEiT and Swin V2 have q and v biases beside it, and compute F.linear(x, self.qkv.weight, ...) themselves
        beside = getattr(attn, "q_bias", None) is not None
        called = not beside or getattr(attn, "qkv_bias_separate", False)
        for i, role in enumerate("qkv"):
            more: dict[str, object] = {"called": called}
            if beside and role != "k":
                more |= {"bias": f"{role}_bias", "bias_path": f"{path}.attn", "bias_rows": (0, width)}
            add(role, "attn.qkv", attn.qkv, (i * width, (i + 1) * width), **more)
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
