"""A run: a recipe carried out in a folder of its own.

    recipe.toml          the recipe as run, all defaults written out
    metrics.jsonl        a line each optimizer step; `accuracy` (on val) at the end of each epoch
    checkpoint-*         what is needed to continue, gone once the run is done
    adapter.safetensors  the result
    run.json             the result's numbers, and the manifest of the data
    curves.png           loss and validation accuracy

One process at a time owns the folder; of several processes of one run, the first.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.attach import attach
from ..core.errors import TrainingError
from ..core.sealed import write_bytes
from ..core.site import anatomy
from ..data import Images, open_data
from ..models import load_model
from ..store import Checkpoints, FolderLock
from . import ddp
from .evaluate import evaluate
from .fit import Step, fit
from .recipe import Recipe, read_recipe

SPLIT = ("seed", "val", "test", "train_list")
"""Keys of [data] that say how pictures are cut into splits; an adapter keeps them, so that its test split stays one."""


def pick_device(asked: str = "auto") -> torch.device:
    """`auto`: CUDA, else Apple's GPU, else the processor."""
    if asked != "auto":
        try:
            device = torch.device(asked)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise TrainingError(f"device = {asked!r} cannot be used ({reason}): see `deltavit doctor`") from None
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
) -> Generator[Step, None, dict[str, Any]]:
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
        with FolderLock(out):
            return (yield from _run(recipe, out, resume, test, say, main))
    return (yield from _run(recipe, out, resume, test, lambda line: None, main))


def _run(
    recipe: Recipe, out: Path, resume: bool, test: bool, say: Callable[[str], None], main: bool
) -> Generator[Step, None, dict[str, Any]]:
    toml, result_file, metrics_file = out / "recipe.toml", out / "run.json", out / "metrics.jsonl"
    if main and toml.exists():
        if not resume:
            raise TrainingError(f"{out} already holds a run: --resume continues it, or choose another --out")
        if change := _changed(read_recipe(toml).plain(), recipe.plain()):
            raise TrainingError(f"{toml} says {change}: choose another --out, or resume with --recipe {toml}")
    if resume and result_file.exists():
        say(f"{out} is complete already")
        return json.loads(result_file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    began = time.monotonic()
    device = pick_device(recipe.device)
    data = open_data(
        recipe.data.path, seed=recipe.data.seed, val=recipe.data.val, test=recipe.data.test,
        train_list=recipe.data.train_list,
    )  # fmt: skip
    for note in data.notes:
        say(f"note: {note}")
    model = load_model(
        recipe.model.name, recipe.model.weights, image_size=recipe.model.image_size, resize=recipe.model.resize,
        normalize=recipe.model.normalize,
    )  # fmt: skip
    vit = anatomy(model)
    adapter = attach(model, recipe.build_method(), classes=data.classes, seed=recipe.train.seed)
    model.to(device)
    body, head = adapter.trainable_parameters, adapter.head_size
    say(f"{adapter.method.name} on {vit.name}, {device}: {body:,} trainable parameters and a head of {head:,}")
    train = Images(
        data.train, vit.preprocessing, broken=recipe.data.broken, ceiling=recipe.data.ceiling,
        workers=recipe.data.workers,
    )  # fmt: skip
    val = Images(data.val, vit.preprocessing, broken="miss", workers=recipe.data.workers)
    if main and not toml.exists():  # only now, so that a wrong path leaves no run behind
        write_bytes(toml, recipe.toml().encode())
    checkpoints = Checkpoints(out)
    loss, seconds = _keep(metrics_file, checkpoints) if main else (None, 0.0)
    accuracy = None
    with (
        metrics_file.open("a", encoding="utf-8") if main else open(os.devnull, "w") as log,
        closing(fit(model, adapter, train, val, recipe.train, checkpoints=checkpoints)) as steps,
    ):
        for step in steps:
            loss, accuracy = step.loss, step.accuracy
            row = {k: v for k, v in vars(step).items() if v is not None}
            log.write(json.dumps({**row, "seconds": round(step.seconds + seconds, 3)}) + "\n")
            log.flush()
            yield step
    for line in [*checkpoints.notes, *(f"skipped: {b}" for b in train.broken)]:
        say(line)
    if accuracy is None:  # a run that had done its last step before it was resumed
        accuracy = evaluate(model, val, precision=recipe.train.precision).accuracy
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
        "val_accuracy": accuracy,
        "method": adapter.method.name,
        "model": vit.name,
        "trainable_parameters": body,
        "head_parameters": head,
        "seed": recipe.train.seed,
        "epochs": recipe.train.epochs,
        "loss": loss,
        "fingerprint": vit.fingerprint,
        "device": str(device),
    }
    told = recipe.plain()
    split = {key: told["data"][key] for key in SPLIT if key in told["data"]}
    adapter.summary = {**result, "recipe": {"train": told["train"], "data": split}, "deltavit": __version__}
    if not main:
        return result
    size = adapter.save(out / "adapter.safetensors")
    result |= {
        "adapter": str(out / "adapter.safetensors"),
        "adapter_bytes": size,
        "seconds": round(seconds + time.monotonic() - began, 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "preprocessing": vars(vit.preprocessing),
        "data": data.manifest(),
    }
    _curves(metrics_file, out / "curves.png", say)
    write_bytes(result_file, (json.dumps(result, indent=2) + "\n").encode())
    for path in out.glob("checkpoint-*.safetensors"):
        path.unlink(missing_ok=True)
    return result


def _changed(was: Any, now: Any, name: str = "") -> str:
    """The first key in which two recipes differ, with both values; empty where none does."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return "" if was == now else f"{name} = {was!r}, not {now!r}"
    keys = [*was, *(key for key in now if key not in was)]
    changes = (_changed(was.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
    return next(filter(None, changes), "")


def _keep(metrics: Path, checkpoints: Checkpoints) -> tuple[float | None, float]:
    """Drop the metrics of steps that the newest checkpoint has not seen; the last loss and the seconds up to there."""
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
    return (rows[-1]["loss"], float(rows[-1]["seconds"])) if rows else (None, 0.0)


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
