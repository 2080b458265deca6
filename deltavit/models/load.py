"""`load_model`: a frozen Vision Transformer by name, with its weights, its anatomy and its fingerprint."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, unknown
from ..core.site import anatomy
from . import huggingface, openclip
from .tiny import TinyViT
from .weights import fetch, fill, first_line, read

OWN = ("tiny", "vit_pico")
"""Models that come with the package: `tiny` has random weights (the same each time), `vit_pico` ones from CIFAR-100."""
LIBRARIES = {"hf": "huggingface", "open_clip": "openclip", "torchvision": "torchvision"}
"""What stands before the colon of a name, and the module here whose `build` makes the model; no colon is timm."""

PIXELS: dict[str, dict[str, Any]] = {
    "checkpoint": {},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "clip": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
    "none": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
}


def load_model(
    name: str | nn.Module,
    weights: str | Path | None = None,
    *,
    image_size: int | None = None,
    resize: str = "squash",
    normalize: bool = False,
    pixels: str = "checkpoint",
) -> nn.Module:
    """A frozen Vision Transformer in eval mode, its anatomy and fingerprint taken.

    Args:
        name: a timm name (`vit_base_patch16_224.augreg_in21k`), `vit_pico` (in the package) or `tiny`; a name of
            another library (`hf:google/vit-base-patch16-224-in21k`, `open_clip:ViT-B-32/laion2b_s34b_b79k`,
            `torchvision:vit_b_16`); or a model of one of these libraries. Of a model with a text tower only the image
            tower is kept, with its projection. One of timm, torchvision or ours is returned as it is.
        weights: a local .safetensors file; None fetches the pretrained ones from the hub; "random" draws them,
            the same ones each time.
        image_size: side of the input in pixels where it differs from the model's own; position embeddings are
            interpolated.
        resize: "squash" brings both sides to `image_size`; "crop" keeps the aspect and takes the centre.
        normalize: bring the features of a transformers or open_clip model to length 1 before the head, as CLIP and
            SigLIP do; `text_head` needs it.
        pixels: how pixels are normalised: as the "checkpoint" was pretrained, or by one of the habits of the field,
            "imagenet" (VPT, NOAH, FacT), "half" (0.5 and 0.5: RLRR, SSF), "clip", "none" (0 to 1).  What was taken is
            in every adapter and record.

    Raises:
        ModelError: an unknown name, not a Vision Transformer we know, weights that are missing or do not fit.
    """
    if resize not in ("squash", "crop"):
        raise ModelError(f"resize = {resize!r} is not 'squash' or 'crop'")
    if pixels not in PIXELS:
        raise ModelError(unknown("normalisation of pixels", pixels, PIXELS))
    asked: dict[str, Any] = {"image_size": image_size, "normalize": normalize or None}
    options = {option: value for option, value in asked.items() if value is not None}
    if isinstance(name, nn.Module):
        found = _adopt(name, weights, options)
        if found is name:
            if pixels != "checkpoint":
                raise ModelError(f"{type(name).__name__} is returned as it is, so pixels cannot be set")
            return found
    else:
        found = _load(name, weights, options)
    found.eval().requires_grad_(False)
    vit = anatomy(found)
    vit.name = name if isinstance(name, str) else vit.name
    vit.options = options
    vit.preprocessing = replace(vit.preprocessing, resize=resize, **PIXELS[pixels])
    return found


def skeleton(name: str, image_size: int | None = None) -> nn.Module:
    """The model without weights, on the meta device: enough for `plan`, in a moment and without a network.

    A transformers model needs its configuration, from a local folder, the cache or else the hub.
    """
    library, name_there = _library(name)
    with torch.device("meta"):
        if library:
            model = library.build(name_there, "random", **({} if image_size is None else {"image_size": image_size}))
        else:
            model = _build(name, image_size, None)
    anatomy(model).name = name
    return model  # type: ignore[no-any-return]


def _library(name: str) -> tuple[Any, str]:
    prefix, colon, name_there = name.partition(":")
    if not colon:
        return None, name
    if prefix not in LIBRARIES:
        raise ModelError(unknown("library", prefix, LIBRARIES))
    return importlib.import_module(f".{LIBRARIES[prefix]}", __package__), name_there


def _adopt(model: nn.Module, weights: str | Path | None, options: dict[str, Any]) -> nn.Module:
    """A model that the user has built, wrapped where its library needs it."""
    kind = type(model).__name__
    if weights is not None:
        raise ModelError(f"weights={weights} is for a model by name; {kind} has its own")
    found = huggingface.wrap(model, **options) if huggingface.owns(model) else None
    if openclip.owns(model):
        if "image_size" in options:
            raise ModelError(f"build {kind} at {options['image_size']} pixels yourself: open_clip moves no positions")
        found = openclip.wrap(model, **options)
    if found is None and options:
        raise ModelError(f"{kind} is returned as it is, so {', '.join(options)} cannot be set")
    if found is None:
        anatomy(model)
    return found or model


def _load(name: str, weights: str | Path | None, options: dict[str, Any]) -> nn.Module:
    library, name_there = _library(name)
    image_size = options.get("image_size")
    if "normalize" in options and name.partition(":")[0] not in ("hf", "open_clip"):
        raise ModelError(f"normalize=True is for the image towers of hf: and open_clip: models, not {name}")
    state: dict[str, Tensor] = {}
    if not library:
        anatomy(skeleton(name, image_size))  # refuses what we do not know before anything is fetched or drawn
        if not (weights == "random" or (name == "tiny" and weights is None)):
            state = read(_path(name) if weights is None else weights)
    head = state.get("head.weight", state.get("head.fc.weight"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # random weights are the same each time, and the caller's state is kept
        if library:
            return library.build(name_there, weights, **options)  # type: ignore[no-any-return]
        model = _build(name, image_size, None if head is None else len(head))
    if state:
        _fill(model, name, state, "the package" if weights is None else Path(weights).name)
    return model


def _build(name: str, image_size: int | None, classes: int | None) -> nn.Module:
    if name == "tiny":
        return TinyViT(size=image_size or 16)
    timm = _timm()
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if classes is not None:
        options["num_classes"] = classes
    try:
        if name == "vit_pico":
            model = timm.models.vision_transformer.VisionTransformer(
                img_size=options.pop("img_size", 32), patch_size=4, embed_dim=128, depth=6, num_heads=4,
                num_classes=options.pop("num_classes", 100),
            )  # fmt: skip
            model.pretrained_cfg = {
                "architecture": "vit_pico", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
            }  # fmt: skip
            return model  # type: ignore[no-any-return]
        if not timm.is_model(name):
            known = [*OWN, *timm.list_models("*vit*"), *timm.list_models("*eva*"), *timm.list_models("*swin*")]
            raise ModelError(unknown("model", name, known).partition("  known:")[0] + "  see timm.list_models()")
        return timm.create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        asked = f" at {image_size} px" if image_size else ""
        raise ModelError(f"{name} cannot be built{asked}: {str(error).splitlines()[0]}") from None


def _timm() -> Any:
    """timm, imported when a model of its is first asked for: it takes seconds, and fails beside a wrong torchvision."""
    try:
        import timm
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"timm cannot be imported ({reason}): `deltavit doctor` says what to do") from None
    return timm


def _path(name: str) -> Path:
    """The pretrained weights of a model of ours or of timm."""
    if name == "vit_pico":
        return Path(str(files("deltavit.models") / "vit_pico.safetensors"))
    cfg = _timm().get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ModelError(f"{name} has no weights on the hub: give weights=FILE.safetensors or weights='random'")
    repo = str(cfg.hf_hub_id)
    return fetch(name, f"{repo}{name}" if repo.endswith("/") else repo, cfg.hf_hub_filename or "model.safetensors")


def _fill(model: nn.Module, name: str, state: dict[str, Tensor], source: str) -> None:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        antialias = {"antialias": True} if "antialias" in inspect.signature(convert).parameters else {}
        try:
            state = convert(state, model, **antialias)
        except (RuntimeError, KeyError, AttributeError) as error:
            raise ModelError(f"{source} does not fit {name}: {first_line(error)}") from None
    fill(model, state, name, source, head=("head.", "head_drop."))
