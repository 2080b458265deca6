"""A run: a recipe carried out in a folder of its own.

    recipe.toml          the recipe as run, all defaults written out
    metrics.jsonl        a line each optimizer step; `accuracy` (on val) at the end of each epoch
    checkpoint-*         what is needed to continue, gone once the run is done
    adapter.safetensors  the result
    run.json             the result's numbers, and the manifest of the data
    curves.png           loss and validation accuracy
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.attach import attach
from ..core.errors import TrainingError
from ..core.site import anatomy
from ..data import Images, open_data
from ..models import load_model
from ..store import Checkpoints, FolderLock
from . import ddp
from .evaluate import evaluate
from .fit import Step, fit
from .recipe import Recipe


def pick_device(asked: str = "auto") -> torch.device:
    """`auto`: CUDA, else Apple's GPU, else the processor."""
    if asked != "auto":
        device = torch.device(asked)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise TrainingError("device = 'cuda', but torch sees no CUDA device: see `deltavit doctor`")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    test: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Step]:
    """Carry out a recipe in the folder `out`; the generator's return value is the content of run.json.

    The test split is read once, after training, where `test` is true and the data set has one.  Closing the generator
    leaves a checkpoint, from which `resume=True` continues: on a CPU to the bit as if it had never stopped.

    Raises:
        TrainingError: the folder holds a run already (without `resume`), another process owns it, or training fails.
        DeltavitError: what the model, the data, or the method refuse.
    """
    out = Path(out)
    main = ddp.rank() == 0
    if not recipe.data.path:
        raise TrainingError("no data: give --data FOLDER, or data.path in the recipe")
    if main:
        out.mkdir(parents=True, exist_ok=True)
        with FolderLock(out):
            return (yield from _run(recipe, out, resume, test, say, main))
    return (yield from _run(recipe, out, resume, test, say, main))


def _run(
    recipe: Recipe, out: Path, resume: bool, test: bool, say: Callable[[str], None], main: bool
) -> Iterator[Step]:
    toml, result_file, metrics_file = out / "recipe.toml", out / "run.json", out / "metrics.jsonl"
    if main:
        if toml.exists() and not resume:
            raise TrainingError(f"{out} already holds a run: --resume continues it, or choose another --out")
        if toml.exists() and toml.read_text(encoding="utf-8") != recipe.toml():
            raise TrainingError(f"{toml} differs from this recipe: choose another --out, or resume with --recipe {toml}")
        if result_file.exists():
            say(f"{out} is complete already")
            return json.loads(result_file.read_text(encoding="utf-8"))  # type: ignore[return-value]
        toml.write_text(recipe.toml(), encoding="utf-8")
    began = time.monotonic()
    device = pick_device(recipe.device)
    data = open_data(
        recipe.data.path, seed=recipe.data.seed, val=recipe.data.val, test=recipe.data.test,
        train_list=recipe.data.train_list,
    )  # fmt: skip
    for note in data.notes:
        say(f"note: {note}")
    model = load_model(
        recipe.model.name, recipe.model.weights, image_size=recipe.model.image_size, resize=recipe.model.resize
    )
    vit = anatomy(model)
    adapter = attach(model, recipe.build_method(), classes=data.classes, seed=recipe.train.seed)
    model.to(device)
    body, head = sum(p.numel() for p in adapter.parameters()), sum(p.numel() for p in adapter.head_parameters())
    say(f"{adapter.method.name} on {vit.name}: {body - head:,} trainable parameters and a head of {head:,}, on {device}")
    train = Images(
        data.train, vit.preprocessing, broken=recipe.data.broken, ceiling=recipe.data.ceiling,
        workers=recipe.data.workers,
    )  # fmt: skip
    val = Images(data.val, vit.preprocessing, broken="miss", workers=recipe.data.workers)
    checkpoints = Checkpoints(out)
    meta = {"fingerprint": vit.fingerprint, "data": data.train.digest, "method": adapter.method.options()}
    meta["method"] = json.loads(json.dumps(meta["method"]))
    seconds = _keep(metrics_file, checkpoints) if main and resume else 0.0
    last: Step | None = None
    with open(metrics_file, "a", encoding="utf-8") if main else open(os.devnull, "w") as log:
        for step in fit(model, adapter, train, val, recipe.train, checkpoints=checkpoints, meta=meta):
            last = step
            row = {k: v for k, v in vars(step).items() if v is not None}
            log.write(json.dumps({**row, "seconds": round(step.seconds + seconds, 3)}) + "\n")
            log.flush()
            yield step
    for line in [*checkpoints.notes, *(f"skipped: {b}" for b in train.broken)]:
        say(line)
    validated = evaluate(model, val, precision=recipe.train.precision)
    tested = None
    if test and data.test is not None:
        tested = evaluate(
            model, Images(data.test, vit.preprocessing, broken="miss", workers=recipe.data.workers),
            precision=recipe.train.precision,
        )  # fmt: skip
    result: dict[str, Any] = {
        "test_accuracy": None if tested is None else tested.accuracy,
        "test_class_accuracy": None if tested is None else tested.class_accuracy,
        "test_missed": None if tested is None else tested.missed,
        "val_accuracy": validated.accuracy,
        "method": adapter.method.name,
        "model": vit.name,
        "trainable_parameters": body - head,
        "head_parameters": head,
        "seed": recipe.train.seed,
        "epochs": recipe.train.epochs,
        "loss": None if last is None else last.loss,
        "fingerprint": vit.fingerprint,
        "device": str(device),
    }
    adapter.summary = {**result, "recipe": {"train": recipe.plain()["train"]}, "deltavit": __version__}
    if not main:
        return result  # type: ignore[return-value]
    size = adapter.save(out / "adapter.safetensors")
    total = (seconds if last is None else last.seconds + seconds) if last else time.monotonic() - began
    result |= {
        "adapter": str(out / "adapter.safetensors"),
        "adapter_bytes": size,
        "seconds": round(max(total, time.monotonic() - began), 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "preprocessing": vars(vit.preprocessing),
        "data": data.manifest(),
    }
    _curves(metrics_file, out / "curves.png", say)
    result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for path in out.glob("checkpoint-*.safetensors"):
        path.unlink(missing_ok=True)
    return result  # type: ignore[return-value]


def _keep(metrics: Path, checkpoints: Checkpoints) -> float:
    """Drop the metrics of steps that the checkpoint has not seen; the seconds spent up to it."""
    found = checkpoints.latest()
    step = found[0] if found else 0
    rows = []
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            if row["step"] <= step:
                rows.append(row)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return float(rows[-1]["seconds"]) if rows else 0.0


def _curves(metrics: Path, path: Path, say: Callable[[str], None]) -> None:
    try:
        import matplotlib
    except ImportError:
        say("no curves.png: it needs matplotlib, pip install 'deltavit[plots]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([r["step"] for r in rows], [r["loss"] for r in rows], linewidth=1)
    left.set(xlabel="step", ylabel="training loss")
    ends = [r for r in rows if "accuracy" in r]
    right.plot([r["epoch"] + 1 for r in ends], [100 * r["accuracy"] for r in ends], marker="o", markersize=3)
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
