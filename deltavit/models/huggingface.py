"""Hugging Face transformers (version 5): ViT, DeiT, DINOv2, DINOv3, BEiT, and the image towers of CLIP and SigLIP."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.site import Anatomy, Preprocessing, family
from .tower import (
    CLIP,
    IMAGENET,
    NoHead,
    Tower,
    comes_from,
    linear_site,
    mean,
    norms_of,
    pooled,
    rooted,
    token,
    token_and_mean,
)
from .weights import first_line, read, unreachable

Read = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the parts are in one of the library's image models, and what its own classifier reads."""

    blocks: str
    patch: str
    norms: tuple[str, str] = ("norm1", "norm2")
    attn: str = "attention"
    o: str = "o_proj"
    tokens: int = 1
    """Class tokens; registers are in the configuration."""
    preprocessing: Preprocessing = IMAGENET
    dead: tuple[str, ...] = ("pooler", "embeddings.mask_token")
    """Parts that never run here, and so could never train."""


VIT = Layout(
    "layers",
    "embeddings.patch_embeddings.projection",
    norms=("layernorm_before", "layernorm_after"),
    preprocessing=Preprocessing(interpolation="bilinear"),
)
DINO2 = Layout("encoder.layer", VIT.patch, preprocessing=replace(IMAGENET, crop=0.875))
TEXT = Layout(
    "encoder.layers",
    "embeddings.patch_embedding",
    norms=("layer_norm1", "layer_norm2"),
    attn="self_attn",
    o="out_proj",
    preprocessing=CLIP,
    dead=(),
)
BODIES = {
    "ViTModel": VIT,
    "DeiTModel": replace(VIT, tokens=2, preprocessing=DINO2.preprocessing),
    "Dinov2Model": DINO2,
    "Dinov2WithRegistersModel": DINO2,
    "DINOv3ViTModel": Layout(
        "model.layer",
        "embeddings.patch_embeddings",
        preprocessing=replace(IMAGENET, interpolation="bilinear"),
    ),
    "BeitModel": replace(VIT, preprocessing=Preprocessing(), dead=("embeddings.mask_token",)),
    "CLIPVisionModel": TEXT,
    "SiglipVisionModel": replace(TEXT, tokens=0, preprocessing=Preprocessing()),
}
WITH_TEXT = ("CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel")
RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def owns(model: nn.Module) -> bool:
    return comes_from(model, "transformers")


def wrap(
    model: nn.Module, image_size: int | None = None, normalize: bool = False, preprocessing: Preprocessing | None = None
) -> Tower:
    """The image tower of a transformers model.

    The model is taken over: parts that never run (ViT's pooler, mask tokens) leave it.  A bare ViT, DeiT or DINO gives
    its class token after the final norm, CLIP and SigLIP their image embedding; a model with a classifier, what that
    classifier reads.

    Raises:
        ModelError: another kind of model than those above.
    """
    kind = type(model).__name__
    body: Any = next((m for m in (model, *model.children()) if type(m).__name__ in BODIES), None)
    classifies = kind.endswith("ForImageClassification")
    if body is None or not (body is model or classifies or kind in WITH_TEXT):
        known = ", ".join([*BODIES, *WITH_TEXT])
        raise ModelError(f"{kind} is refused: of transformers deltavit knows {known} and ...ForImageClassification")
    layout, config = BODIES[type(body).__name__], body.config
    sides = set(_pair(config.image_size if image_size is None else image_size))
    if len(sides) > 1:
        raise ModelError(f"{kind} takes pictures of {config.image_size} pixels, and deltavit's are square")
    pictures = replace(preprocessing or layout.preprocessing, size=sides.pop())
    reads, width = _reads(body, config, classifies)
    for path in layout.dead:
        owner, _, part = path.rpartition(".")
        if getattr(body.get_submodule(owner), part, None) is not None:
            setattr(body.get_submodule(owner), part, None)
    project, head = getattr(model, "visual_projection", None), getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear):
        head = NoHead(width if project is None else project.out_features)
    # some of them interpolate their positions unasked, the others when told to
    asks = image_size is not None and "interpolate_pos_encoding" in inspect.signature(body.forward).parameters
    options = {"interpolate_pos_encoding": True} if asks else {}
    name = f"hf:{model.name_or_path}" if model.name_or_path else kind
    return Tower(body, reads, head, name, pictures, project=project, normalize=normalize, options=options)


def _reads(body: Any, config: Any, classifies: bool) -> tuple[Read, int]:
    """What a head is given, and its width; a part that is then left without a use leaves the body."""
    kind, width = type(body).__name__, int(config.hidden_size)
    registers = getattr(config, "num_register_tokens", 0)
    if kind.startswith("Dinov2") and classifies:
        return partial(token_and_mean, prefix=1 + registers), 2 * width
    if kind == "CLIPVisionModel" and classifies:
        body.post_layernorm = nn.Identity()  # the classifier takes what lies before it
        return partial(mean, prefix=1), width
    if kind == "SiglipVisionModel" and (classifies or not body.use_head):
        if body.use_head:
            body.use_head = False
            del body.head
        return partial(mean, prefix=0), width
    pools = kind in ("CLIPVisionModel", "SiglipVisionModel") or (config.model_type == "beit" and _pools(body))
    return (pooled if pools else token), width


def _pools(body: Any) -> bool:
    return body.pooler is not None and body.config.use_mean_pooling  # type: ignore[no-any-return]


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, Iterable) else (size, size)  # type: ignore[index]


@family("huggingface")
def recognise(model: Any) -> Anatomy | None:
    if owns(model):
        raise ModelError(f"{type(model).__name__} of transformers needs a thin wrapper: deltavit.load_model(model)")
    if not (isinstance(model, Tower) and owns(model.body)):
        return None
    body: Any = model.body
    layout, config = BODIES[type(body).__name__], body.config
    count = len(body.get_submodule(layout.blocks))
    blocks = [f"{layout.blocks}.{b}" for b in range(count)]
    attn = [f"{b}.{layout.attn}" for b in blocks]
    size, (high, wide) = model.preprocessing.size, body.get_submodule(layout.patch).kernel_size
    clip = type(body).__name__ == "CLIPVisionModel"
    tables = [n for n, _ in body.named_parameters() if n.endswith("relative_position_bias_table")]
    known = Anatomy(
        model=model,
        name=model.name,
        family="huggingface",
        width=config.hidden_size,
        heads=config.num_attention_heads,
        grid=(size // high, size // wide),
        prefix=layout.tokens + getattr(config, "num_register_tokens", 0),
        head="head",
        features=model.features,
        blocks=blocks,
        attn=attn,
        mlp=[f"{b}.mlp" for b in blocks],
        norms=norms_of(body),
        patch=layout.patch,
        linears=[_linears(body, layout, b) for b in range(count)],
        before_attn=[f"{b}.{layout.norms[0]}" for b in blocks],
        before_mlp=[f"{b}.{layout.norms[1]}" for b in blocks],
        after_heads=[f"{a}.{layout.o}" for a in attn],
        scores="attention_mask" if config._attn_implementation in ("sdpa", "eager") else "",
        tables=tables,
        pool="token" if model.read is token or (clip and model.read is pooled) else "all",
        fixed_tokens="its table of relative positions has an entry for each pair of its own tokens" if tables else "",
        preprocessing=model.preprocessing,
    )
    return rooted(known, "body")


ROLES = (
    ("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"),
    ("fc1", "fc1"), ("fc1", "up_proj"), ("fc1g", "gate_proj"), ("fc2", "fc2"), ("fc2", "down_proj"),
)  # fmt: skip


def _linears(body: nn.Module, layout: Layout, block: int) -> dict[str, Any]:
    sites = {}
    for role, name in (*ROLES[:3], ("o", layout.o), *ROLES[3:]):
        path = f"{layout.blocks}.{block}.{'mlp' if role.startswith('fc') else layout.attn}"
        if hasattr(body.get_submodule(path), name):
            sites[role] = linear_site(body, f"{path}.{name}", role, block)
    return sites


def build(
    name: str, weights: str | Path | None = None, image_size: int | None = None, normalize: bool = False
) -> Tower:
    """The image tower of a model on the hub or in a local folder.

    Args:
        name: `google/vit-base-patch16-224-in21k`, or a folder with a config.json.
        weights: a local .safetensors file; None takes the repository's or folder's own; "random" draws them.
        image_size, normalize: as `load_model`.

    Raises:
        ModelError: not to be had, without safetensors, of another kind, or weights that do not fit.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, and a dozen kinds of the hub's client
        raise unreachable(f"the configuration of {name}", error) from None
    kind = (config.architectures or ["none"])[0]
    make: Any = getattr(transformers, kind, None)
    if make is None or not (kind in BODIES or kind in WITH_TEXT or kind.endswith("ForImageClassification")):
        raise ModelError(f"{name} is refused: its architecture is {kind}, which deltavit does not know")
    info: dict[str, set[str]] = {"missing_keys": set(), "unexpected_keys": set()}
    if weights == "random":
        model = make(config)
    else:
        state = None if weights is None else read(weights)
        try:
            model, info = make.from_pretrained(
                name if state is None else None, config=config, state_dict=state,
                use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"the weights do not fit {name}: {first_line(error)}") from None
        except Exception as error:
            raise unreachable(f"the weights of {name}", error) from None
    tower = wrap(model, image_size, normalize, _processor(name))
    used = {id(p) for n, p in tower.named_parameters() if not n.startswith("head.")}
    missing = [n for n, p in model.named_parameters() if n in info["missing_keys"] and id(p) in used]
    # of what has no place here only whole blocks tell of another model; a text tower, a decoder's head are no matter
    extra = [n for n in info["unexpected_keys"] if re.search(r"\blayers?\.\d", n) and "text" not in n]
    for what, keys in (("missing", missing), ("not in the model", sorted(extra))):
        if keys:
            raise ModelError(f"the weights do not fit {name}: {len(keys)} tensors {what}, {', '.join(keys[:3])}")
    return tower


def _processor(name: str) -> Preprocessing | None:
    """What the repository says of its pictures; None where it says nothing."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except Exception:  # it is not there, or the hub is out of reach: the family's own numbers are known
        return None
    size, crop = said.get("size", {}), said.get("crop_size", {})
    short, kept = (s.get("shortest_edge", s.get("height")) if isinstance(s, dict) else s for s in (size, crop))
    default = Preprocessing()
    return Preprocessing(
        mean=tuple(said.get("image_mean", default.mean)),
        std=tuple(said.get("image_std", default.std)),
        interpolation=RESAMPLE.get(said.get("resample", 3), default.interpolation),
        crop=min(1.0, kept / short) if said.get("do_center_crop") and short and kept else 1.0,
    )


def _transformers() -> Any:
    try:
        import transformers
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"transformers cannot be imported ({first_line(error)}): pip install transformers") from None
    return transformers
