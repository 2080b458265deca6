"""`load_model`: a frozen Vision Transformer by name, with its weights, its anatomy and its fingerprint."""

from __future__ import annotations

import inspect
import logging
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.errors import ModelError, unknown
from ..core.site import anatomy
from .tiny import TinyViT

OWN = ("tiny", "vit_pico")
"""Models that come with the package: `tiny` has random weights (the same each time), `vit_pico` ones from CIFAR-100."""


def load_model(
    name: str,
    weights: str | Path | None = None,
    *,
    image_size: int | None = None,
    resize: str = "squash",
) -> nn.Module:
    """A frozen Vision Transformer in eval mode, its anatomy and fingerprint taken.

    Args:
        name: a timm name (`vit_base_patch16_224.augreg_in21k`), `vit_pico` (in the package) or `tiny`.
        weights: a local .safetensors file; None fetches the pretrained ones from the hub; "random" draws them,
            the same ones each time.
        image_size: side of the input in pixels where it differs from the model's own; position embeddings are
            interpolated.
        resize: "squash" brings both sides to `image_size`; "crop" keeps the aspect and takes the centre.

    Raises:
        ModelError: an unknown name, not a Vision Transformer we know, weights that are missing or do not fit.
    """
    if resize not in ("squash", "crop"):
        raise ModelError(f"resize = {resize!r} is not 'squash' or 'crop'")
    anatomy(skeleton(name, image_size))  # refuses what is no Vision Transformer before anything is fetched or drawn
    random = weights == "random" or (name == "tiny" and weights is None)
    state, classes = ({}, None) if random else _state(name, weights)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # random weights are the same each time, and the caller's state is kept
        model = _build(name, image_size, classes)
    if state:
        _fill(model, name, state, weights)
    model.eval().requires_grad_(False)
    vit = anatomy(model)
    vit.name = name
    vit.options = {} if image_size is None else {"image_size": image_size}
    vit.preprocessing = replace(vit.preprocessing, resize=resize)
    return model


def skeleton(name: str, image_size: int | None = None) -> nn.Module:
    """The model without weights, on the meta device: enough for `plan`, in a moment and without a network."""
    with torch.device("meta"):
        model = _build(name, image_size, None)
    anatomy(model).name = name
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
            known = [*OWN, *timm.list_models("*vit*"), *timm.list_models("*eva*")]
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


def _state(name: str, weights: str | Path | None) -> tuple[dict[str, Tensor], int | None]:
    """The checkpoint's tensors, and the number of classes its head has."""
    if name == "vit_pico" and weights is None:
        path = Path(str(files("deltavit.models") / "vit_pico.safetensors"))
    elif weights is None:
        path = _fetch(name)
    else:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ModelError(f"no weights at {path}: give a .safetensors file")
    try:
        state = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        reason = "deltavit never opens pickles" if _is_pickle(path) else str(error).splitlines()[0]
        raise ModelError(f"{path.name} is not a safetensors file ({reason}): convert the weights to one") from None
    head = state.get("head.weight")
    return {k: v.float() for k, v in state.items()}, None if head is None else len(head)


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04")


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cfg = _timm().get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ModelError(f"{name} has no weights on the hub: give weights=FILE.safetensors or weights='random'")
    repo = str(cfg.hf_hub_id)
    repo = f"{repo}{name}" if repo.endswith("/") else repo
    try:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return Path(hf_hub_download(repo, cfg.hf_hub_filename or "model.safetensors"))
    except Exception as error:  # the hub's client raises a dozen kinds, all but one of which mean the same here
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"{repo} holds no safetensors file, and deltavit never opens pickles") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ModelError(
            f"the weights of {name} could not be fetched ({type(error).__name__}: {reason}); "
            "give a local file: weights=FILE.safetensors"
        ) from None


def _fill(model: nn.Module, name: str, state: dict[str, Tensor], weights: str | Path | None) -> None:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    source = "the package" if weights is None else Path(weights).name
    try:
        if convert is not None:
            antialias = {"antialias": True} if "antialias" in inspect.signature(convert).parameters else {}
            state = convert(state, model, **antialias)
        wanted = model.state_dict()
        fitting = {k: v for k, v in state.items() if k not in wanted or v.shape == wanted[k].shape}
        misshapen = sorted(set(state) - set(fitting))
        missing, extra = model.load_state_dict(fitting, strict=False)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"{source} does not fit {name}: {str(error).splitlines()[0]}") from None
    missing = [k for k in missing if not k.startswith("head.")]
    extra = [k for k in extra if not k.startswith(("head.", "head_drop."))]
    for what, keys in (("other shapes", misshapen), ("missing", missing), ("not in the model", extra)):
        if keys:
            raise ModelError(f"{source} does not fit {name}: {len(keys)} tensors {what}, {', '.join(keys[:3])}")
