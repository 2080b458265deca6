"""The flags that several commands share.  There is none for a single method: those go as `method.KEY=VALUE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Model = Annotated[
    Optional[str],  # noqa: UP045  (typer reads it)
    typer.Option(
        "--model", help="timm name, or vit_pico (in the package), or hf:NAME, open_clip:NAME, torchvision:NAME."
    ),
]
Weights = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--weights", help="Local .safetensors file; without it the weights come from the hub."),
]
MethodName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--method", help="Name from `deltavit methods`, or several, lora+bitfit; options follow as method.KEY=VALUE."
    ),
]
Size = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--image-size", help="Side of the input in pixels, where it differs from the model's own."),
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--data", help="Folder (train/val/test, or one of classes), folder with VTAB lists, or CSV."),
]
AdapterFile = Annotated[Path, typer.Option("--adapter", help="Adapter file, or the folder of a run.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Changes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="Any key of the recipe as KEY=VALUE: method.rank=16 train.lr=0.002", show_default=False),
]
