"""`methods`, `plan` and `doctor`: look, and change nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.attach import plan as make_plan
from ..core.errors import MethodError
from ..core.method import method as build_method
from ..core.method import methods as all_methods
from ..core.site import anatomy
from ..models import skeleton
from ..train.evaluate import native_bf16
from ..train.recipe import read_recipe
from . import options as o
from .output import result, say, table


def methods(
    model: Annotated[str, typer.Option("--model", help="Count on this model.")] = "vit_base_patch16_224",
    classes: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 100,
    image_size: o.Size = None,
    json: o.Json = False,
) -> None:
    """All methods with their defaults: what would train on a model, whether it merges and mixes, the paper.

    A method mixes if each picture of a batch could have an adapter of its own.

    deltavit methods --model vit_base_patch16_224 --classes 100
    """
    net = skeleton(model, image_size)
    whole = sum(p.numel() for p in anatomy(net).tensors().values())
    rows: list[dict[str, Any]] = []
    for name, kind in all_methods().items():
        row: dict[str, Any] = {"name": name, "title": kind.title, "paper": kind.paper}
        try:
            made = make_plan(net, build_method(name), classes)
            row |= {
                "trainable_parameters": made.trainable_parameters,
                "head_parameters": made.head_parameters,
                "share": made.trainable_parameters / whole,
                "mergeable": made.mergeable,
                "mixed_batch": made.mixed_batch,
            }
        except MethodError as error:
            row["refused"] = str(error)
        rows.append(row)

    def shown() -> None:
        table(
            f"{model}, {whole:,} parameters without its head, {classes} classes",
            ("method", "trains (body)", "head", "share", "merges", "mixes", "paper", "what"),
            [
                (r["name"], r["trainable_parameters"], r["head_parameters"], f"{100 * r['share']:.3g} %",
                 "yes" if r["mergeable"] else "no", "yes" if r["mixed_batch"] else "no", r["paper"], r["title"])
                if "refused" not in r else (r["name"], "-", "-", "-", "-", "-", r["paper"], f"refused: {r['refused']}")
                for r in rows
            ],
            right=(1, 2, 3),
        )  # fmt: skip

    result({"model": model, "parameters": whole, "classes": classes, "methods": rows}, json, shown)


def plan(
    changes: o.Changes = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", help="timm name, vit_pico, tiny, open_clip:NAME, torchvision:NAME; no weights are needed."
        ),
    ] = "vit_pico",
    method: Annotated[
        str, typer.Option("--method", help="Name from `deltavit methods`, or several: lora+bitfit.")
    ] = "lora",
    classes: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 100,
    image_size: o.Size = None,
    json: o.Json = False,
) -> None:
    """What a method would change in a model, without doing it and without weights.

    deltavit plan --model vit_base_patch16_224 --method lora --classes 100 method.rank=16
    """
    recipe = read_recipe(None, changes or [], method={"name": method})
    net = skeleton(model, image_size)
    made = make_plan(net, recipe.build_method(), classes)
    values = {
        "model": model,
        "method": made.method.name,
        "options": made.method.options(),
        "trainable_parameters": made.trainable_parameters,
        "head_parameters": made.head_parameters,
        "mergeable": made.mergeable,
        "mixed_batch": made.mixed_batch,
        "sites": made.sites,
    }
    result(values, json, lambda: print(f"{made}\nhead: {made.head_parameters:,} parameters, merges: {made.mergeable}"))


def doctor(json: o.Json = False) -> None:
    """Versions, devices, free memory and disk, and the faults of an installation that we know.  Exit code 1 on one."""
    import torch

    faults = []
    versions = {"deltavit": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "safetensors", "pillow", "numpy", "matplotlib", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with its build, such as +cu132
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (RuntimeError, ImportError, AttributeError) as error:
        faults.append(
            f"torch {versions['torch']} and torchvision {versions['torchvision']} do not match "
            f"({str(error).splitlines()[0]}): install both from one registry, `pip install -U torch torchvision`"
        )
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 10):
        faults.append(f"torch {torch.__version__} has CVE-2026-24747: `pip install -U 'torch>=2.10' torchvision`")
    cpu = torch.device("cpu")
    devices = [f"cpu, {torch.get_num_threads()} threads{', bf16' if native_bf16(cpu) else ''}"]
    for i in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(i)
        bf16 = ", bf16" if native_bf16(torch.device("cuda", i)) else ""
        devices.append(
            f"cuda:{i} {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free{bf16}"
        )
    if torch.backends.mps.is_available():
        devices.append("mps")
    memory = None
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    disk = shutil.disk_usage(Path.cwd()).free
    if disk < 2**30:
        faults.append(f"only {disk / 2**20:.0f} MiB of disk are free in {Path.cwd()}")
    values = {
        "versions": versions,
        "devices": devices,
        "free_memory_gib": None if memory is None else round(memory / 2**30, 2),
        "free_disk_gib": round(disk / 2**30, 2),
        "processors": os.cpu_count(),
        "faults": faults,
    }

    def shown() -> None:
        print("\n".join(f"{k:12} {v}" for k, v in versions.items()))
        print("\n".join(f"{'device':12} {d}" for d in devices))
        print(f"{'free':12} {values['free_memory_gib']} GiB of memory, {values['free_disk_gib']} GiB of disk")
        print("no fault found" if not faults else "")

    result(values, json, shown)
    for fault in faults:
        say(f"fault: {fault}")
    if faults:
        raise typer.Exit(1)
