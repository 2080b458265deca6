"""One piece of work of a suite, a search or a run: a function of plain values, on whatever machine it is called."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.errors import DataError, DeltavitError
from ..core.file import ADAPTER
from ..core.sealed import write_bytes
from ..data.protocols import protocol
from ..search import Search, search
from ..train.fit import drain
from ..train.recipe import Recipe, read_recipe
from ..train.run import open_splits, run
from .record import FORMAT


def work(spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Carry out what `spec` says.

    Args:
        spec: `Cell.spec()` or `Study.spec()` of deltavit.bench.plan: JSON-able.
        found: results of the studies that this piece needs, by key.
        folder: where it may keep what lets it continue after a kill.

    Returns:
        A record, or the result of a search: JSON-able.
    """
    return (_study if spec["kind"] == "study" else _cell)(spec, found, Path(folder))


def _study(spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    recipe = _opened(spec)
    if spec["head"] is not None and recipe.train.head_lr is None:
        rate = found[spec["head"]]["values"].get("train.lr", recipe.train.lr)
        recipe = _with(recipe, {"train.head_lr": rate})
    told = drain(search(recipe, spec["space"], Search(**spec["search"]), folder))
    return {
        "format": FORMAT, "key": spec["key"], "values": told.values, "accuracy": told.accuracy,
        "set": spec["set"], "head_lr": recipe.train.head_lr, "epochs": spec["search"]["epochs"] or recipe.train.epochs,
        "trials": [{k: v for k, v in vars(t).items() if v is not None} for t in told.trials],
    }  # fmt: skip


def _cell(spec: dict[str, Any], found: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    recipe = _opened(spec)
    chosen: dict[str, Any] = {}
    if spec["study"] is not None:
        study = found[spec["study"]]
        chosen = dict(study["values"])
        if study["head_lr"] is not None:
            chosen["train.head_lr"] = study["head_lr"]
        recipe = _with(recipe, chosen)
    _moved(folder / "recipe.toml", recipe)
    result = drain(run(recipe, folder, resume=True, leaky=spec["leaky"], curves=False))
    if result["test_accuracy"] is None:
        raise DataError(f"{recipe.data.path} has no test split: a benchmark needs one")
    record = {
        "recipe": _as_run(folder),
        "chosen": chosen,
        "search": None if spec["study"] is None else {
            "study": spec["study"], "trials": len(study["trials"]), "val_accuracy": study["accuracy"],
            "epochs": study["epochs"], "on": study["set"],
        },
        "test_accuracy": result["test_accuracy"], "val_accuracy": result["val_accuracy"],
        "class_accuracy": result["by_class"], "test_pictures": result["test_pictures"],
        "test_missed": result["test_missed"], "body": result["trainable_parameters"], "head": result["head_parameters"],
        "seconds": result["train_seconds"], "peak_bytes": result["peak_bytes"], "device": _device(result["device"]),
        "threads": result["threads"], "precision": result["precision"], "curve": _curve(folder / "metrics.jsonl"),
        "test_reads": result["test_reads"], "clean": result["clean"], "leaky": result["leaky"],
        "base": {
            "name": result["model"], "fingerprint": result["fingerprint"], "weights": _name(recipe.model.weights),
            "weights_sha256": _sha256(recipe.model.weights),
        },
        "preprocessing": result["preprocessing"], "data": result["data"],
        "versions": {
            "deltavit": __version__, "torch": torch.__version__, "timm": version("timm"),
            "python": platform.python_version(),
        },
        "error": None,
    }  # fmt: skip
    if not spec["keep_adapters"]:
        (folder / ADAPTER).unlink(missing_ok=True)
    return record


def _opened(spec: dict[str, Any]) -> Recipe:
    """The recipe with its data found, and checked against what the protocol says of it."""
    recipe = Recipe(**spec["recipe"])
    told = protocol(spec["protocol"])
    where = told.data(spec["set"], spec["root"])
    data = recipe.data.model_copy(update={key: value for key, value in where.items() if key in ("path", "val")})
    recipe = recipe.model_copy(update={"data": data})
    if not told.open:
        told.check(spec["set"], open_splits(recipe.data.model_copy(update={"shots": None})))
    return recipe


def _moved(toml: Path, recipe: Recipe) -> None:
    """Let a run go on whose pictures or weights lie elsewhere now; its checkpoint knows them by their digests."""
    if toml.is_file():
        was = read_recipe(toml)
        data = was.data.model_copy(update={"path": recipe.data.path, "workers": recipe.data.workers})
        model = was.model.model_copy(update={"weights": recipe.model.weights})
        write_bytes(
            toml, was.model_copy(update={"data": data, "model": model, "device": recipe.device}).toml().encode()
        )


def _with(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with values at dotted keys."""
    plain = recipe.plain()
    device = plain.pop("device")
    made = read_recipe(None, [f"{key}={json.dumps(value)}" for key, value in values.items()], **plain)
    return made.model_copy(update={"device": device})


def _as_run(folder: Path) -> dict[str, Any]:
    """The recipe of a finished run, its places by their last names: a record says what was run, not where it lay."""
    plain = read_recipe(folder / "recipe.toml").plain()
    plain["data"]["path"] = Path(plain["data"]["path"]).name
    if "weights" in plain["model"]:
        plain["model"]["weights"] = Path(plain["model"]["weights"]).name
    return plain


def _curve(metrics: Path) -> list[list[Any]]:
    """Each epoch's number, mean loss and val accuracy."""
    losses: dict[int, list[float]] = {}
    val: dict[int, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        losses.setdefault(row["epoch"], []).append(row["loss"])
        if "accuracy" in row:
            val[row["epoch"]] = row["accuracy"]
    return [[epoch + 1, round(sum(own) / len(own), 5), val.get(epoch)] for epoch, own in losses.items()]


def _device(name: str) -> str:
    return torch.cuda.get_device_name(name) if name.startswith("cuda") else name


def _name(weights: str | None) -> str | None:
    return None if weights is None else Path(weights).name


def _sha256(weights: str | None) -> str | None:
    if weights is None or not Path(weights).is_file():
        return None
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget(folder: Path) -> None:
    """Drop what a finished cell kept to continue; its record says all."""
    shutil.rmtree(folder, ignore_errors=True)


def failure(error: BaseException) -> dict[str, str]:
    """What a failed piece leaves in its record."""
    import traceback

    line = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, DeltavitError):
        line = f"{type(error).__name__}: {line}"
    return {"line": line[:500], "traceback": "".join(traceback.format_exception(error))[-8000:]}
