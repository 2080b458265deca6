"""LoRA in the format of HF PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT has one pair A [R, in], B [out, R] a module, ours one a site.  Where q, k and v are one fused layer the two differ:

    export    our pairs of one module become one pair of their summed rank, A stacked, B block-diagonal
    import    each of q, k and v gets its own copy of A and its rows of B

Both keep the function exactly.  What trains on afterwards is not the same: the copies of A part ways.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..core.attach import Adapter, attach
from ..core.edit import Rewrite
from ..core.errors import FileError, MethodError
from ..core.sealed import LIMIT, MOST, reason, shown, write_bytes
from ..core.site import Anatomy, Site, Where, anatomy, original
from ..methods.lora import LoRA, LoRAFix, Product
from ..models.tower import Tower, mean, pooled, token, token_and_mean

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."
_PAIR = re.compile(re.escape(ROOT) + r"(.+)\.lora_[AB]\.weight")
MERGE = "merge it in PEFT and save the model instead"
PADDING = 8
"""How many times its own numbers a file may grow when its ranks are padded to the largest."""

N = TypeVar("N", int, float)
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "modules_to_save", "bias"}
# which modules it chose the tensors tell; the rest says nothing about the function
_NO_MATTER = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "init_lora_weights",
    "eva_config", "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Those that leave the base alone; pissa, olora, corda, loftq and lora_ga change it."""
_CLASSIFIERS = {"ViTModel": token, "DeiTModel": token, "BeitModel": pooled}
# transformers 4 -> 5
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
)  # fmt: skip


# --- export ----------------------------------------------------------------------------------------------------------


def export_lora(adapter: Adapter, folder: str | Path) -> int:
    """Write a `lora` or `lora-fix` adapter as a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    The head becomes one of `modules_to_save`, so the base must have a head for as many classes.  A model of
    transformers is written under the names of its `...ForImageClassification`.  Class names go into the metadata of
    the tensors, where only `import_lora` looks; preprocessing is left behind.

    Args:
        folder: made where it is missing; must not hold a PEFT adapter yet.

    Returns:
        The size of both files in bytes.

    Raises:
        MethodError: another method, or a model on which PEFT cannot give the same function.
        FileError: the folder holds an adapter, a number is not finite, or the disk refuses.
    """
    adapter._must_be("attached", "disabled")
    method, vit, folder = adapter.method, adapter.vit, Path(folder)
    if not isinstance(method, (LoRA, LoRAFix)):
        way = "merge it and save the model instead" if adapter.mergeable else "keep it in deltavit's own file"
        raise MethodError(f"PEFT's LoRA cannot hold {method.name}; {way}")
    modules: dict[str, list[Rewrite]] = defaultdict(list)
    for edit in adapter.edits:
        assert isinstance(edit, Rewrite)
        modules[edit.site.path].append(edit)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, edits in modules.items():
        _hooked(vit, edits[0].site)
        name = _outer(vit, path)
        down, up = _blocks(edits, len(original(vit.model.get_submodule(path), edits[0].site.param)))
        tensors |= {f"{ROOT}{name}.lora_A.weight": down, f"{ROOT}{name}.lora_B.weight": up}
        ranks[name] = len(down)
    if adapter.head is not None:
        _same_features(vit)
        tensors |= {f"{ROOT}{_head(vit)}.{n}": p for n, p in adapter.head.named_parameters()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    bad = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    if bad is not None:
        raise FileError(f"cannot write {shown(folder)}: {bad} is not finite, so the training diverged; lower its lr")
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": vit.name.removeprefix("hf:"),
        "r": common,
        "lora_alpha": _plain(method.scale * common),
        "lora_dropout": method.dropout,
        "rank_pattern": other,
        "alpha_pattern": {name: _plain(method.scale * rank) for name, rank in other.items()},
        "target_modules": list(ranks),
        "modules_to_save": None if adapter.head is None else [_head(vit)],
        "bias": "none",
        "inference_mode": True,
    }
    if held := [name for name in (CONFIG, WEIGHTS, PICKLE) if (folder / name).exists()]:
        raise FileError(f"{shown(folder)} already holds {held[0]}: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as why:
        raise FileError(f"cannot write {shown(folder)}: {reason(why)}") from None
    meta = {"format": "pt"} if adapter.classes is None else {"format": "pt", "classes": json.dumps(adapter.classes)}
    # the configuration last: without it the folder is no adapter
    size = write_bytes(folder / WEIGHTS, to_bytes(tensors, meta))
    return size + write_bytes(folder / CONFIG, json.dumps(config, indent=2).encode())


def _blocks(edits: Sequence[Rewrite], out: int) -> tuple[Tensor, Tensor]:
    """The pairs of one module as one: A [R, in] stacked, B [out, R] with a block of its own for each site's rows."""
    changes = [edit.change for edit in edits]
    down = torch.cat([c.down for c in changes])  # type: ignore[misc]
    up, at = down.new_zeros(out, len(down)), 0
    for edit, change in zip(edits, changes, strict=True):
        assert isinstance(change, Product)
        a, b = edit.site.rows
        up[a:b, at : at + len(change.down)] = change.up
        at += len(change.down)
    return down, up


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


# --- names -----------------------------------------------------------------------------------------------------------


def _hooked(vit: Anatomy, site: Site) -> None:
    if not site.called or site.param != "weight":
        raise MethodError(
            f"PEFT changes what {site.path} puts out, and {vit.name} reads its weight itself, so nothing would happen; "
            "merge the adapter and save the model instead"
        )


def _body(vit: Anatomy) -> str:
    """What transformers calls the part that `Tower` calls body: `vit`, `vision_model`; "" where names are the same."""
    body = getattr(vit.model, "body", None)
    prefix = str(getattr(body, "base_model_prefix", ""))
    return "vision_model" if prefix and type(body).__name__.endswith("VisionModel") else prefix


def _outer(vit: Anatomy, path: str) -> str:
    return f"{_body(vit)}.{path.removeprefix('body.')}" if _body(vit) else path


def _inner(vit: Anatomy, name: str, known: dict[str, list[Site]]) -> str:
    """The path in our model of a module that PEFT names."""
    body = _body(vit)
    if not body or name in known:
        return name
    for old, new in _RENAMED:
        name = name.replace(old, new)
    name = f"body.{name.removeprefix(f'{body}.')}"
    return name if name in known else name.replace("encoder.layer.", "layers.", 1)


def _head(vit: Anatomy) -> str:
    return "classifier" if _body(vit) else vit.head


def _same_features(vit: Anatomy) -> None:
    """Refuse a head where the tower reads other features than the classifier of the other library does."""
    tower = vit.model
    if not isinstance(tower, Tower):
        return
    reads = getattr(tower.read, "func", tower.read)
    fits = reads in (mean, token_and_mean) or reads is _CLASSIFIERS.get(type(tower.body).__name__)
    if not _body(vit) or tower.project is not None or tower.normalize or not fits:
        raise MethodError(
            f"the head on {vit.name} reads other features than a classifier of its library, so it cannot be the same; "
            "take a model ..ForImageClassification, or leave the head out"
        )


# --- import ----------------------------------------------------------------------------------------------------------


def import_lora(folder: str | Path, model: nn.Module, classes: int | Sequence[str] | None = None) -> Adapter:
    """Attach the LoRA of a PEFT folder as ours: the same function, with one rank and one scale.

    Ranks are padded to the largest: the added columns of B are zero, the added rows of A as our LoRA draws them.  Where
    scales differ they go into B.  Rows of a fused module whose B is zero are left out.  Roles and blocks are those that
    the file has; a pair of them that it lacks starts at zero.  `lora_dropout` becomes our `dropout`.

    A PEFT folder has no fingerprint: nothing tells whether `model` is the base that it was trained on.

    Args:
        folder: a local folder; files in it may be links, as in the cache of the hub.
        classes: names of the classes, or their number; None takes the file's.  Where the file has no head, a new one
            is made, or with None the model keeps its own.

    Raises:
        FileError: a pickle; an option that our LoRA does not have; a module that is no matrix of this model; tensors
            that are missing, extra or misshapen; NaN.  The model is then as it was.
        MethodError: the model reads a weight itself, where PEFT's change is silent.
    """
    folder, vit = Path(folder), anatomy(model)
    dtype = torch.promote_types(next(iter(vit.tensors().values())).dtype, torch.float32)
    try:
        config = _config(folder)
        with _opened(folder) as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names[: MOST + 1]}
            modules = _modules(config, vit, shapes)
            head = _classifier(config, vit, {n: s for n, s in shapes.items() if not _PAIR.fullmatch(n)})
            names_of_classes = _classes((file.metadata() or {}).get("classes", ""), head, classes)
            values = {name: _finite(name, file.get_tensor(name)).to(dtype) for name in names}
        scales = {scale for _, scale in modules.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        pairs = _pairs(modules, values, scale)
        where = _where(vit, pairs)
        rank = max(len(down) for _, down in pairs.values())
        size = sum(rank * sum(site.shape) for site in vit.sites(where))
        if size > PADDING * sum(t.numel() for t in values.values()):
            raise ValueError(f"padded to one rank of {rank} it would have {size:,} numbers; {MERGE}")
    except (OSError, SafetensorError, ValueError, OverflowError) as why:
        raise FileError(f"cannot import {shown(folder)}: {reason(why)}") from None
    adapter = attach(model, LoRA(rank, scale, config.dropout, where), classes=names_of_classes)
    with torch.no_grad():
        for edit in adapter.edits:
            assert isinstance(edit, Rewrite)
            assert isinstance(edit.change, Product)
            if edit.site in pairs:
                up, down = pairs[edit.site]
                edit.change.up[:, : up.shape[1]] = up
                edit.change.down[: len(down)] = down
        if head and adapter.head is not None:
            adapter.head.weight.copy_(values[head["weight"][0]])
            if "bias" in head:
                adapter.head.bias.copy_(values[head["bias"][0]])
    return adapter


@dataclass(frozen=True)
class _Config:
    """What `adapter_config.json` says of the function: PEFT's options by our names."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rslora: bool
    dropout: float
    targets: list[str]
    """Modules that must be there; empty where the configuration chooses them in another way."""
    saved: list[str]

    def scale(self, name: str) -> tuple[int, float]:
        """The rank of a module and what its B A is multiplied by."""
        rank, alpha = _matching(self.ranks, name, self.rank), _matching(self.alphas, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _config(folder: Path) -> _Config:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"it has no {CONFIG}, so it is not a PEFT adapter")
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{CONFIG} has more than {LIMIT:,} bytes")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{CONFIG} is not plain JSON") from None
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else None
        raise ValueError(f"it is of type {kind!r:.40}, and deltavit imports LORA")
    refused = {key: value for key, value in said.items() if value and key not in _READ | _NO_MATTER}
    if said.get("bias", "none") != "none":
        refused["bias"] = said["bias"]
    if said.get("init_lora_weights", True) not in _INITS:
        refused["init_lora_weights"] = said["init_lora_weights"]
    for key, value in refused.items():
        raise ValueError(f"{key:.60}={value!r:.60}, which our lora does not have; {MERGE}")
    dropout = _number("lora_dropout", said.get("lora_dropout", 0), float)
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout={dropout} in {CONFIG}, which is no share")
    targets, chosen = said.get("target_modules"), any(map(said.get, ("layers_to_transform", "exclude_modules")))
    return _Config(
        rank=_number("r", said.get("r", 8), int),
        alpha=_number("lora_alpha", said.get("lora_alpha", 8), float),
        ranks=_patterns("rank_pattern", said, int),
        alphas=_patterns("alpha_pattern", said, float),
        rslora=bool(said.get("use_rslora")),
        dropout=dropout,
        targets=_texts("target_modules", targets) if isinstance(targets, list) and not chosen else [],
        saved=_texts("modules_to_save", said.get("modules_to_save") or []),
    )


def _number(label: str, value: Any, kind: type[N]) -> N:
    allowed = (int,) if kind is int else (int, float)
    if type(value) not in allowed or not math.isfinite(value) or (kind is int and value < 1):
        raise ValueError(f"{label}={value!r:.40} in {CONFIG}, which is not possible")
    return kind(value)


def _texts(label: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value) or len(value) > MOST:
        raise ValueError(f"{label} in {CONFIG} is no list of names")
    return value


def _patterns(label: str, said: Mapping[str, Any], kind: type[N]) -> dict[str, N]:
    """PEFT reads these keys as regular expressions; from a stranger's file we take names alone."""
    value = said.get(label) or {}
    if not isinstance(value, dict) or len(value) > MOST:
        raise ValueError(f"{label} in {CONFIG} is not a table")
    for key in value:
        if not re.fullmatch(r"\^?(\w|-|\\?\.)+", key):
            raise ValueError(f"{label} has the expression {key!r:.60}: write the names of modules instead")
    return {key.replace("\\.", "."): _number(f"{label} of {key:.60}", v, kind) for key, v in value.items()}


def _matching(patterns: Mapping[str, N], name: str, default: N) -> N:
    for key, value in patterns.items():
        if name == key.removeprefix("^") or (not key.startswith("^") and name.endswith(f".{key}")):
            return value
    return default


def _opened(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = (folder / PICKLE).exists()
        raise ValueError(f"it has {PICKLE}, and deltavit never opens pickles" if pickle else f"it has no {WEIGHTS}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LIMIT:
        raise ValueError(f"{WEIGHTS} is not a safetensors file, or its header has more than {LIMIT:,} bytes")
    return safe_open(path, "pt")


def _modules(
    config: _Config, vit: Anatomy, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[list[Site], float]]:
    """PEFT's name of each module -> our sites in it and its scale, once names and shapes are what they must be."""
    if len(shapes) > MOST:
        raise ValueError(f"{WEIGHTS} has more than {MOST:,} tensors")
    known: dict[str, list[Site]] = defaultdict(list)
    for site in (s for linears in vit.linears for s in linears.values()):
        known[site.path].append(site)
    modules: dict[str, tuple[list[Site], float]] = {}
    for tensor in shapes:
        match = _PAIR.fullmatch(tensor)
        if match is None or match[1] in modules:
            continue
        name = match[1]
        sites = known.get(_inner(vit, name, known))
        if sites is None:
            raise ValueError(f"{name!r:.120} is no matrix in the blocks of {vit.name}")
        _hooked(vit, sites[0])
        rank, scale = config.scale(name)
        out, inp = original(vit.model.get_submodule(sites[0].path), "weight").shape
        for part, shape in (("lora_A", (rank, inp)), ("lora_B", (out, rank))):
            _same(f"{name}.{part}", shapes.get(f"{ROOT}{name}.{part}.weight"), shape)
        modules[name] = sites, scale
    if not modules:
        raise ValueError(f"{WEIGHTS} has no tensor {ROOT}..lora_A.weight")
    there = {sites[0].path for sites, _ in modules.values()}
    for path in known.keys() - there:
        name = _outer(vit, path)
        if any(f".{name}".endswith(f".{target}") for target in config.targets):
            raise ValueError(f"{name}.lora_A is missing, and target_modules names it")
    if len(there) < len(modules):
        raise ValueError("two of its modules are the same matrix")
    return modules


def _classifier(
    config: _Config, vit: Anatomy, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """weight, bias -> name and shape of the tensor; empty where there is no head."""
    head = _head(vit)
    parts = {f"{ROOT}{head}.{part}": part for part in ("weight", "bias")}
    for name in shapes:
        if name not in parts:
            raise ValueError(f"{name!r:.120} is neither LoRA nor the head; {MERGE}")
    found = {parts[name]: (name, shape) for name, shape in shapes.items()}
    if found or head in config.saved:
        _same_features(vit)
        count = next(iter(found["weight"][1]), 0) if "weight" in found else 0
        _same(f"{head}.weight", found.get("weight", ("", None))[1], (max(count, 1), vit.features))
        if "bias" in found:
            _same(f"{head}.bias", found["bias"][1], (count,))
    return found


def _same(name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> None:
    if found != wanted:
        has = "missing" if found is None else list(found)
        raise ValueError(f"{name:.120} is {has}, and should be {list(wanted)}")


def _classes(
    said: str, head: Mapping[str, tuple[str, tuple[int, ...]]], asked: int | Sequence[str] | None
) -> int | Sequence[str] | None:
    if not head:
        return asked
    count = head["weight"][1][0]
    if asked is not None:
        if count != (asked if isinstance(asked, int) else len(asked)):
            raise ValueError(f"its head has {count} classes")
        return asked
    try:
        names = json.loads(said)
    except (ValueError, RecursionError):  # another program's file does not say
        return count
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if listed and len(set(names)) == len(names) == count else count


def _finite(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or not value.isfinite().all():
        raise ValueError(f"{name:.120} is not a tensor of finite numbers")
    return value


def _pairs(
    modules: Mapping[str, tuple[list[Site], float]], values: Mapping[str, Tensor], scale: float
) -> dict[Site, tuple[Tensor, Tensor]]:
    """(B, A) of each site, without the columns of B that are zero in its rows; all where B was never trained."""
    pairs = {}
    for name, (sites, own) in modules.items():
        down, up = (values[f"{ROOT}{name}.lora_{letter}.weight"] for letter in "AB")
        for site in sites:
            rows = up[slice(*site.rows)]
            kept = rows.ne(0).any(0) if up.any() else torch.ones(len(down), dtype=torch.bool)
            if kept.any():
                pairs[site] = rows[:, kept] if own == scale else rows[:, kept] * (own / scale), down[kept]
    return pairs


def _where(vit: Anatomy, pairs: Mapping[Site, object]) -> Where:
    roles, blocks = {site.role for site in pairs}, {site.block for site in pairs}
    order = dict.fromkeys(role for linears in vit.linears for role in linears if role in roles)
    return Where(tuple(order), None if len(blocks) == len(vit.blocks) else tuple(sorted(blocks)))
