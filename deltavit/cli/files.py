"""`merge`: an adapter written into its base.  `export`: an adapter in another library's format, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.errors import FileError, ModelError
from ..models import load_model
from ..store.peft import CONFIG, export_lora, import_lora
from ..train.merge import merge_to_file
from . import options as o
from .output import result
from .tasks import opened


def merge(
    adapter: o.AdapterFile,
    out: Annotated[Path, typer.Option(help="Where to write the model, a .safetensors file.")],
    model: o.Model = None,
    weights: o.Weights = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it exists.")] = False,
    json: o.Json = False,
) -> None:
    """Write base and adapter as one plain safetensors file, which needs no deltavit; a timm model loads in timm.

    deltavit merge --adapter runs/flowers/adapter.safetensors --out flowers.safetensors
    """
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists: choose another --out, or give --overwrite")
    net, loaded, said = opened(adapter, model, weights, "cpu")
    size = merge_to_file(net, loaded, out)
    result(
        {"model": str(out), "bytes": size, "base": said.base, "classes": loaded.classes, "method": said.method.name},
        json,
    )


def export(
    adapter: Annotated[Path, typer.Option("--adapter", help="Adapter file, folder of a run, or PEFT's folder.")],
    out: Annotated[Path, typer.Option(help="PEFT's folder, or the .safetensors file of deltavit, to write.")],
    to: Annotated[Literal["peft", "deltavit"], typer.Option(help="Format to write.")] = "peft",
    model: o.Model = None,
    weights: o.Weights = None,
    image_size: o.Size = None,
    json: o.Json = False,
) -> None:
    """LoRA in the format of HF PEFT, or PEFT's LoRA as an adapter file; both give the same logits.

    deltavit export --adapter runs/flowers/adapter.safetensors --to peft --out flowers-peft
    """
    if (adapter / CONFIG).exists() == (to == "peft"):
        wrong = "is in PEFT's format already" if to == "peft" else f"has no {CONFIG}, so it is not PEFT's"
        raise FileError(f"{adapter} {wrong}: choose the other --to")
    if to == "peft":
        _, loaded, said = opened(adapter, model, weights, "cpu")
        size, base = export_lora(loaded, out), said.base
    else:
        if out.exists():
            raise FileError(f"{out} exists: choose another --out")
        if model is None:
            raise ModelError(f"{adapter} does not say reliably which base it belongs to: give --model")
        net = load_model(model, weights, image_size=image_size)
        loaded, base = import_lora(adapter, net), model
        size = loaded.save(out)
    values = {"adapter": str(out), "format": to, "bytes": size, "base": base, "classes": loaded.classes}
    result({**values, "method": loaded.method.name, "rank": getattr(loaded.method, "rank", None)}, json)
