"""The adapter file: one sealed safetensors file that holds all that was trained for one task, and what it needs.

    format 1        the tensors that train, equal ones of all blocks stacked as `blocks.*.q.up`, and the head
    "deltavit"      {"adapter": 1, "base": {name, options, fingerprint}, "method": {name, options}, "seed", "frozen",
                     "classes", "preprocessing", "training", "version"}

Loading compares what the file claims with what its method would train on this very base, before it reads the payload.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attach import Adapter, Plan, attach, plan
from .errors import DeltavitError, FileError, MethodError
from .method import Method, method
from .sealed import pack, packed_shapes, read, read_header, shown, unpack, write
from .site import Preprocessing, anatomy

VERSION = 1


def save(adapter: Adapter, path: str | Path) -> int:
    """Write an attached adapter; its size in bytes.  At most the bytes of what trains, and 16 KiB."""
    adapter._must_be("attached", "disabled")
    vit = adapter.vit
    header = {
        "adapter": VERSION,
        "base": {"name": vit.name, "options": vit.options, "fingerprint": vit.fingerprint},
        "method": {"name": adapter.method.name, "options": adapter.method.options()},
        "seed": adapter.seed,
        "frozen": adapter.frozen(),
        "classes": adapter.classes,
        "preprocessing": dataclasses.asdict(adapter.preprocessing),
        "training": adapter.summary,
    }
    return write(path, pack(adapter.tensors()), header)


@dataclasses.dataclass(frozen=True)
class Info:
    """What an adapter file says of itself; only `load` proves it."""

    path: Path
    base: str
    options: dict[str, Any]
    fingerprint: str
    method: Method
    seed: int
    frozen: str
    classes: list[str] | None
    preprocessing: Preprocessing
    training: dict[str, Any]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    bytes: int


def info(path: str | Path) -> Info:
    """Read what an adapter file says, at the cost of its header alone.

    Raises:
        FileError: not an adapter file of ours, or one that says something impossible.
    """
    header = read_header(path, follow=True)
    meta, where = header.meta, shown(path)
    if meta.get("adapter") != VERSION:
        newer = isinstance(meta.get("adapter"), int) and meta["adapter"] > VERSION
        raise FileError(f"{where} is {'of a newer format: update deltavit' if newer else 'not an adapter file'}")
    try:
        base, chosen, classes = meta["base"], meta["method"], meta["classes"]
        shapes = {"mean": tuple(map(float, meta["preprocessing"]["mean"])), "std": tuple(map(float, meta["preprocessing"]["std"]))}
        said = Info(
            path=Path(path),
            base=_text(base["name"]),
            options=_options(base["options"]),
            fingerprint=_text(base["fingerprint"]),
            method=method(_text(chosen["name"]), **chosen["options"]),
            seed=int(meta["seed"]),
            frozen=_text(meta["frozen"]),
            classes=None if classes is None else [_text(c) for c in classes],
            preprocessing=Preprocessing(**{**meta["preprocessing"], **shapes}),
            training=dict(meta["training"]),
            layout=header.tensors,
            bytes=header.bytes,
        )
        if said.classes is not None and len(set(said.classes)) != len(said.classes):
            raise ValueError("a class comes twice")
        if not (type(said.preprocessing.size) is int and 0 < said.preprocessing.size <= 4096):
            raise ValueError(f"pictures of {said.preprocessing.size} pixels")
    except (KeyError, TypeError, ValueError, AttributeError, MethodError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{where} is damaged or of another version: {reason}") from None
    return said


def load(path: str | Path, model: nn.Module) -> Adapter:
    """Attach the adapter in a file to the base that it was trained on.

    Raises:
        FileError: another base; tensors that are missing, extra or misshapen; NaN; a broken seal; not an adapter.
        All of it is refused before anything is allocated or the model is touched, except NaN and the seal, which
        need the payload.
    """
    said, vit, where = info(path), anatomy(model), shown(path)
    if said.fingerprint != vit.fingerprint:
        at = f" at {said.options['image_size']} px" if "image_size" in said.options else ""
        raise FileError(
            f"{where} was trained on {said.base}{at} ({said.fingerprint[:6]}), "
            f"this model is {vit.name} ({vit.fingerprint[:6]}): load that base first"
        )
    dtype = "F64" if next(iter(vit.tensors().values())).dtype == torch.float64 else "F32"
    try:
        wanted = _wanted(plan(model, said.method, said.classes), said.classes, dtype, vit.features)
    except (DeltavitError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise FileError(f"{where} asks for what {vit.name} cannot take: {str(error).splitlines()[0]}") from None
    packed, _ = read(path, packed_shapes(wanted), follow=True)
    values = unpack(packed, list(wanted))
    adapter = attach(model, said.method, classes=said.classes, seed=said.seed)
    if said.frozen != adapter.frozen():
        adapter.detach()
        raise FileError(
            f"{where}: torch {torch.__version__} draws other numbers from seed {said.seed} than the one that trained it, "
            "and they are part of the change; load it with that torch"
        )
    with torch.no_grad():
        for name, p in adapter.tensors().items():
            p.copy_(values[name])
    adapter.preprocessing, adapter.summary = said.preprocessing, said.training
    return adapter


def _wanted(
    made: Plan, classes: Sequence[str] | None, dtype: str, features: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    wanted = {name: (dtype, shape) for name, shape in made.shapes.items()}
    if classes is not None:
        wanted |= {"head.weight": (dtype, (len(classes), features)), "head.bias": (dtype, (len(classes),))}
    return wanted


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not text")
    return value


def _options(value: Any) -> dict[str, Any]:
    if not (isinstance(value, dict) and set(value) <= {"image_size"} and all(type(v) is int for v in value.values())):
        raise TypeError("options of the base that are not known")
    return value


