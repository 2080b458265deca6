"""open_clip: the image towers of CLIP, CoCa and SigLIP models, its own Vision Transformers and timm's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..core.errors import ModelError, unknown
from ..core.site import Anatomy, Site, family
from .timm import recognise as timm_anatomy
from .tower import CLIP, NoHead, Tower, comes_from, linear_site, norms_of, rooted, whole
from .weights import fetch, fill, first_line, read

TOWERS = ("VisionTransformer", "TimmModel")


def owns(model: nn.Module) -> bool:
    return comes_from(model, "open_clip")


def wrap(model: nn.Module, normalize: bool = False, name: str = "") -> Tower:
    """The image tower of an open_clip model, with its projection.

    Raises:
        ModelError: its image tower is no Vision Transformer that we know.
    """
    visual: Any = getattr(model, "visual", model)
    kind = type(visual).__name__
    if kind not in TOWERS:
        known = ", ".join(TOWERS)
        raise ModelError(f"{type(model).__name__} is refused: its image tower is a {kind}, and deltavit knows {known}")
    said = getattr(visual, "preprocess_cfg", None) or {}
    if kind == "TimmModel":
        features = _out_features(visual)
        trunk = timm_anatomy(visual.trunk)
        if trunk is None:
            raise ModelError(
                f"{name or type(model).__name__} is refused: its image tower is timm's {type(visual.trunk).__name__}, "
                "not a Vision Transformer whose anatomy deltavit knows"
            )
        pictures = trunk.preprocessing
    elif visual.attn_pool is None and visual.pool_type == "none":
        raise ModelError(f"{type(model).__name__} is refused: its image tower gives one feature a token, not a picture")
    else:
        features = visual.output_dim if visual.proj is not None else visual.ln_post.normalized_shape[0]
        pictures = replace(CLIP, size=visual.image_size[0])
    if visual.image_size[0] != visual.image_size[1]:
        raise ModelError(f"{type(model).__name__} takes pictures of {visual.image_size} pixels; deltavit's are square")
    pictures = replace(
        pictures,
        mean=tuple(said.get("mean", pictures.mean)),
        std=tuple(said.get("std", pictures.std)),
        interpolation=str(said.get("interpolation", pictures.interpolation)),
    )
    return Tower(visual, whole, NoHead(features), name or type(model).__name__, pictures, normalize=normalize)


def _out_features(visual: Any) -> int:
    linears = [m for m in visual.head.modules() if isinstance(m, nn.Linear)]
    if linears:
        return linears[-1].out_features
    return int(visual.trunk.num_classes or visual.trunk.num_features)


@family("open_clip")
def recognise(model: Any) -> Anatomy | None:
    if owns(model):
        raise ModelError(f"{type(model).__name__} of open_clip needs a thin wrapper: deltavit.load_model(model)")
    if not (isinstance(model, Tower) and owns(model.body)):
        return None
    body: Any = model.body
    own: dict[str, Any] = {
        "model": model, "name": model.name, "family": "open_clip", "head": "head", "features": model.features,
        "preprocessing": model.preprocessing,
    }  # fmt: skip
    if type(body).__name__ == "TimmModel":
        return rooted(timm_anatomy(body.trunk), "body.trunk", **own)  # type: ignore[arg-type]
    blocks = [f"transformer.resblocks.{b}" for b in range(len(body.transformer.resblocks))]
    first = body.transformer.resblocks[0]
    # nn.MultiheadAttention reads its weights itself; in open_clip's own attention the last projection does run
    runs = not isinstance(first.attn, nn.MultiheadAttention)
    entered = "ln_inner" if isinstance(getattr(first.attn, "ln_inner", None), nn.LayerNorm) else "out_proj"
    known = Anatomy(
        **own,
        width=body.transformer.width,
        heads=first.attn.num_heads,
        grid=body.grid_size,
        prefix=1,
        blocks=blocks,
        attn=[f"{b}.attn" for b in blocks],
        mlp=[f"{b}.mlp" for b in blocks],
        norms=norms_of(body),
        patch="conv1",
        linears=[_linears(body, path, b, runs) for b, path in enumerate(blocks)],
        before_attn=[f"{b}.ln_1" for b in blocks],
        before_mlp=[f"{b}.ln_2" for b in blocks],
        after_heads=[f"{b}.attn.{entered}" if runs else "" for b in blocks],
        pool="token" if body.attn_pool is None and body.pool_type == "tok" else "all",
    )
    return rooted(known, "body")


def _linears(body: nn.Module, path: str, block: int, runs: bool) -> dict[str, Site]:
    attn: Any = body.get_submodule(f"{path}.attn")
    width = attn.in_proj_weight.shape[1]
    bias = None if attn.in_proj_bias is None else "in_proj_bias"
    sites = {}
    for i, role in enumerate("qkv"):
        rows = (i * width, (i + 1) * width)
        sites[role] = Site(
            f"{path}.attn", role, block, rows, (width, width), param="in_proj_weight", bias=bias, called=False
        )
    sites["o"] = linear_site(body, f"{path}.attn.out_proj", "o", block, called=runs)
    sites["fc1"] = linear_site(body, f"{path}.mlp.c_fc", "fc1", block)
    sites["fc2"] = linear_site(body, f"{path}.mlp.c_proj", "fc2", block)
    return sites


def build(
    name: str, weights: str | Path | None = None, image_size: int | None = None, normalize: bool = False
) -> Tower:
    """The image tower of an open_clip model; its text tower is not built.

    Args:
        name: `ViT-B-32`, or with a tag of pretrained weights `ViT-B-32/laion2b_s34b_b79k`.
        weights: a local .safetensors file of the whole model; None fetches those of the tag; "random" draws them.
        image_size, normalize: as `load_model`.

    Raises:
        ModelError: an unknown name or tag, not a Vision Transformer, weights that are missing or do not fit.
    """
    try:
        import open_clip  # type: ignore[import-untyped]
        from open_clip.model import _build_vision_tower, resize_pos_embed  # type: ignore[import-untyped]
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"open_clip cannot be imported ({first_line(error)}): pip install open_clip_torch") from None
    kind, _, tag = name.partition("/")
    if kind not in open_clip.list_models():
        raise ModelError(unknown("open_clip model", kind, open_clip.list_models()).partition("  known:")[0])
    said = open_clip.get_pretrained_cfg(kind, tag) if tag else {}
    if tag and not said:
        raise ModelError(unknown("weights of " + kind, tag, open_clip.list_pretrained_tags_by_model(kind)))
    config = open_clip.get_model_config(kind)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    if image_size is not None:
        if "timm_model_name" in vision:
            raise ModelError(f"{kind} takes no image_size: load {vision['timm_model_name']} itself, which does")
        vision["image_size"] = image_size
    visual = _build_vision_tower(config["embed_dim"], vision, bool(config.get("quick_gelu") or said.get("quick_gelu")))
    if said:
        visual.preprocess_cfg = said
    tower = wrap(visual, normalize, f"open_clip:{name}")
    if weights != "random":
        if weights is None:
            weights = _fetch(name, said)
        state = {k: v for k, v in read(weights).items() if k.startswith("visual.")}
        resize_pos_embed(state, SimpleNamespace(visual=visual))
        fill(visual, {k.removeprefix("visual."): v for k, v in state.items()}, name, Path(weights).name)
    return tower


def _fetch(name: str, said: dict[str, Any]) -> Path:
    if not said:
        raise ModelError(
            f"{name} alone has no weights: add a tag ({name}/TAG), or weights=FILE.safetensors or 'random'"
        )
    repo, _, file = str(said["hf_hub"]).rpartition("/")
    return fetch(name, repo, (file or "open_clip_model.bin").removesuffix(".bin") + ".safetensors")
