"""`merge`: an adapter written into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import FileError
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
    """Write base and adapter as one plain safetensors file, which timm loads without deltavit.

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
