"""torchvision's Vision Transformers: ViT and Swin, both versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import ModelError, unknown
from ..core.site import Anatomy, Preprocessing, Site, family
from .tower import IMAGENET
from .weights import fill, read


@family("torchvision")
def recognise(model: Any) -> Anatomy | None:
    # by name, so that importing us does not import torchvision, which takes seconds
    kinds = {c.__name__ for c in type(model).__mro__ if c.__module__.startswith("torchvision.models.")}
    if "VisionTransformer" in kinds:
        return _vit(model)
    return _swin(model) if "SwinTransformer" in kinds else None


def _vit(model: Any) -> Anatomy:
    blocks = [f"encoder.layers.{n}" for n, _ in model.encoder.layers.named_children()]
    side = model.image_size // model.patch_size
    return _anatomy(
        model,
        blocks,
        "self_attention",
        heads=model.encoder.layers[0].num_heads,
        grid=(side, side),
        prefix=1,
        head="heads.head",
        patch="conv_proj",
        before_attn=[f"{b}.ln_1" for b in blocks],
        before_mlp=[f"{b}.ln_2" for b in blocks],
    )


def _swin(model: Any) -> Anatomy:
    size, patch = _preprocessing(model).size, model.features[0][0].kernel_size
    grid = (size // patch[0], size // patch[1])
    blocks: list[str] = []
    grids: list[tuple[int, int]] = []
    for i, part in enumerate(model.features[1:], 1):
        if isinstance(part, nn.Sequential):
            blocks += [f"features.{i}.{j}" for j in range(len(part))]
            grids += [grid] * len(part)
        else:
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    first = model.get_submodule(blocks[0])
    norms_first = not hasattr(first.attn, "logit_scale")  # version 2 has cosine attention, and norms after
    return _anatomy(
        model,
        blocks,
        "attn",
        heads=first.attn.num_heads,
        grid=grids[0],
        prefix=0,
        head="head",
        patch="features.0.0",
        before_attn=[f"{b}.{'norm1' if norms_first else 'attn'}" for b in blocks],
        before_mlp=[f"{b}.{'norm2' if norms_first else 'mlp'}" for b in blocks],
        tables=[n for n, _ in model.named_parameters() if n.endswith("relative_position_bias_table")],
        pool="all",
        fixed_tokens="its attention is windowed",
        grids=grids,  # windows are the same: its attention modules take the whole map, and cut it themselves
    )


def _anatomy(model: Any, blocks: list[str], attn: str, **more: Any) -> Anatomy:
    linears = [_linears(model.get_submodule(b), b, attn, i) for i, b in enumerate(blocks)]
    widths = [sites["o"].shape[0] for sites in linears]
    return Anatomy(
        model=model,
        name=type(model).__name__,
        family="torchvision",
        width=widths[0],
        features=model.get_submodule(more["head"]).in_features,
        blocks=blocks,
        attn=[f"{b}.{attn}" for b in blocks],
        mlp=[f"{b}.mlp" for b in blocks],
        norms=[n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)],
        linears=linears,
        widths=widths,
        preprocessing=_preprocessing(model),
        **more,
    )


def _linears(block: nn.Module, path: str, attn: str, number: int) -> dict[str, Site]:
    # attention reads all its weights itself: nn.MultiheadAttention in ViT, a function in Swin
    if attn == "self_attention":
        owner, out, param, bias = attn, f"{attn}.out_proj", "in_proj_weight", "in_proj_bias"
    else:
        owner, out, param, bias = f"{attn}.qkv", f"{attn}.proj", "weight", "bias"
    width = block.get_submodule(owner).get_parameter(param).shape[1]
    sites = {}
    for i, role in enumerate("qkv"):
        # Swin V2 puts zeros in the place of k's bias
        shift = None if role == "k" and hasattr(block.get_submodule(attn), "logit_scale") else bias
        rows = (i * width, (i + 1) * width)
        sites[role] = Site(f"{path}.{owner}", role, number, rows, (width, width), param, shift, called=False)
    for role, owner, called in (("o", out, False), ("fc1", "mlp.0", True), ("fc2", "mlp.3", True)):
        o, i = block.get_submodule(owner).get_parameter("weight").shape
        sites[role] = Site(f"{path}.{owner}", role, number, (0, o), (o, i), called=called)
    return sites


def _preprocessing(model: Any) -> Preprocessing:
    size = getattr(model, "image_size", 224)  # a Swin does not say, and the first version's are all of 224
    return getattr(model, "preprocessing", None) or replace(IMAGENET, size=size, interpolation="bilinear", crop=0.875)


def build(name: str, weights: str | Path | None = None, image_size: int | None = None) -> nn.Module:
    """A model by torchvision's own name for it, such as `vit_b_16` or `swin_t`; it drops no paths, as timm's do not.

    Args:
        weights: a local .safetensors file with its state, or "random".
        image_size: side of the input in pixels where it differs from the model's own; the position embeddings of a
            ViT are interpolated.

    Raises:
        ModelError: not a ViT or Swin of torchvision; weights=None, since what torchvision offers are pickles; weights
            that do not fit.
    """
    import torchvision.models as tv

    known = [n for n in tv.list_models(module=tv) if n.startswith(("vit_", "swin_"))]
    if name not in known:
        raise ModelError(unknown("model of torchvision", name, known))
    if weights is None:
        raise ModelError(
            f"torchvision's own weights of {name} are pickles, which deltavit never opens: convert them and give "
            "weights=FILE.safetensors, or take the same model from timm"
        )
    state = {} if weights == "random" else read(weights)
    options: dict[str, Any] = {}
    head = state.get("heads.head.weight", state.get("head.weight"))
    if head is not None:
        options["num_classes"] = len(head)
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size
    model: Any = tv.get_model(name, weights=None, **options)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    preset: Any = next(iter(tv.get_model_weights(name))).transforms()
    size = preset.crop_size[0]
    model.preprocessing = Preprocessing(
        image_size or getattr(model, "image_size", size),
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
        crop=size / preset.resize_size[0],
    )
    if state:
        if "encoder.pos_embedding" in state:
            state = tv.vision_transformer.interpolate_embeddings(model.image_size, model.patch_size, state)  # type: ignore[arg-type, assignment]
        fill(model, state, name, Path(weights).name)
    return model  # type: ignore[no-any-return]
