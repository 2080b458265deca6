"""The adapter file: one sealed safetensors file that holds all that was trained for one task, and what it needs.

    format 1        the tensors that train, equal ones of all blocks stacked as `blocks.*.q.up`, and the head
    "deltavit"      {"adapter": 1, "base": {name, options, fingerprint}, "method": {name, options}, "seed", "frozen",
                     "classes", "preprocessing", "training", "version"}

Loading compares what the file claims with what its method would train on this very base, before it reads the payload.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attach import Adapter, Plan, attach, plan
from .errors import DeltavitError, FileError, MethodError
from .method import Method, method
from .sealed import pack, packed_shapes, read, read_header, reason, shown, unpack, write
from .site import Preprocessing, anatomy

VERSION = 1
ADAPTER = "adapter.safetensors"
"""Its name in the folder of a run."""
OPTIONS = 2048
"""Bytes that a method's options may have in a file: a role or block named a million times would cost minutes."""


def save(adapter: Adapter, path: str | Path) -> int:
    """Write an attached adapter; its size in bytes.  At most the bytes of what trains, and 16 KiB."""
    adapter._must_be("attached", "disabled")
    vit = adapter.vit
    bad = next((name for name, t in adapter.tensors().items() if not t.isfinite().all()), None)
    if bad is not None:
        raise FileError(f"cannot write {shown(path)}: {bad} is not finite, so the training diverged; lower its lr")
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


def adapter_file(path: str | Path) -> Path:
    """The adapter file that a path means: itself, or that of a run where it is the run's folder."""
    path = Path(path)
    return path / ADAPTER if path.is_dir() else path


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
        if len(json.dumps(chosen["options"])) > OPTIONS:
            raise ValueError(f"its method has more than {OPTIONS:,} bytes of options")
        said = Info(
            path=Path(path),
            base=_text(base["name"]),
            options=_options(base["options"]),
            fingerprint=_text(base["fingerprint"]),
            method=method(_text(chosen["name"]), **chosen["options"]),
            seed=_seed(meta["seed"]),
            frozen=_text(meta["frozen"]),
            classes=None if classes is None else _class_names(classes),
            preprocessing=_preprocessing(**meta["preprocessing"]),
            training=dict(meta["training"]),
            layout=header.tensors,
            bytes=header.bytes,
        )
    except (KeyError, TypeError, ValueError, AttributeError, MethodError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else reason(error)
        raise FileError(f"{where} is damaged or of another version: {why}") from None
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
    if said.preprocessing.size != vit.preprocessing.size:
        sizes = f"{said.preprocessing.size} px, {vit.name} takes {vit.preprocessing.size}"
        raise FileError(f"{where} asks for pictures of {sizes}")
    if said.options.get("normalize") != vit.options.get("normalize"):
        one, two = (
            "features of length 1" if options.get("normalize") else "features as they are"
            for options in (said.options, vit.options)
        )
        raise FileError(f"{where} was trained on {one}, this model gives {two}: load it with normalize as it was")
    dtype = "F64" if next(iter(vit.tensors().values())).dtype == torch.float64 else "F32"
    try:
        wanted = _wanted(plan(model, said.method, said.classes), said.classes, dtype, vit.features)
    except (DeltavitError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise FileError(f"{where} asks for what {vit.name} cannot take: {reason(error)}") from None
    packed, _ = read(path, packed_shapes(wanted), follow=True)
    values = unpack(packed, list(wanted))
    adapter = attach(model, said.method, classes=said.classes, seed=said.seed)
    if said.frozen != adapter.frozen():
        adapter.detach()
        raise FileError(
            f"{where}: torch {torch.__version__} draws other numbers from seed {said.seed} than the one that trained "
            "it, and they are part of the change; load it with that torch"
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
    known: dict[str, Callable[[Any], bool]] = {"image_size": _pixels, "normalize": lambda said: said is True}
    if not (isinstance(value, dict) and set(value) <= set(known) and all(known[k](v) for k, v in value.items())):
        raise TypeError("options of the base that are not known")
    return value


def _pixels(value: Any) -> bool:
    return type(value) is int and 0 < value <= 4096


def _seed(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not a seed")
    return value


def _class_names(value: Any) -> list[str]:
    if not isinstance(value, list) or len({_text(name) for name in value}) != len(value):
        raise ValueError("classes that are no list of different names")
    return value


def _preprocessing(size: Any, mean: Any, std: Any, interpolation: Any, resize: Any, crop: Any) -> Preprocessing:
    said = Preprocessing(
        size, tuple(map(float, mean)), tuple(map(float, std)), _text(interpolation), _text(resize), float(crop)  # type: ignore[arg-type]
    )  # fmt: skip
    if not (_pixels(size) and len(said.mean) == len(said.std) == 3 and min(said.std) > 0 and 0 < said.crop <= 1):
        raise ValueError("a preprocessing that cannot be")
    return said
