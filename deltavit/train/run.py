"""A run: a recipe carried out in a folder of its own.

    recipe.toml          the recipe as run, all defaults written out
    metrics.jsonl        a line each optimizer step; `accuracy` (on val) at the end of each epoch that has one
    checkpoint-*         what is needed to continue, gone once the run is done
    adapter.safetensors  the result
    test-reads.jsonl     each reading of the test split: after which step, by which weights
    run.json             the result's numbers, and the manifest of the data
    curves.png           loss and validation accuracy

One process at a time owns the folder; of several processes of one run, the first.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.attach import Adapter, attach
from ..core.errors import TrainingError
from ..core.file import ADAPTER
from ..core.sealed import read, write, write_bytes
from ..core.site import anatomy
from ..data import Dataset, Images, Split, open_data
from ..models import load_model
from ..store import Checkpoints, FolderLock
from . import ddp
from .evaluate import Evaluation, computed_in, evaluate
from .fit import Step, fit
from .memory import forget_peak, peak_memory
from .recipe import DataSection, Recipe, read_recipe
from .testsplit import TestSplit, clean, readings, weights_digest

SPLIT = ("seed", "val", "test", "train_list", "shots", "shots_seed")
"""Keys of [data] that say how pictures are cut into splits; an adapter keeps them, so that its test split stays one."""
EPOCH = "epoch-{}.safetensors"


def open_splits(section: DataSection) -> Dataset:
    """The pictures that a recipe's [data] names, cut as it says."""
    return open_data(section.path, **{key: getattr(section, key) for key in SPLIT})


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
    leaky: int = 0,
    curves: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Generator[Step, None, dict[str, Any]]:
    """Carry out a recipe in the folder `out`; the generator's return value is the content of run.json.

    The test split is read once, after training, where `test` is true and the data set has one.  Closing the generator
    leaves a checkpoint, from which `resume=True` continues: on a CPU to the bit as if it had never stopped.

    Args:
        leaky: also report the best test accuracy among the states of every `leaky`-th epoch, as papers do that choose
            their epoch on test; 0 for no.  The states are kept on disk and read after training, so the result is clean.
        curves: draw curves.png.

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
            return (yield from _run(recipe, out, resume, test, leaky, curves, say, main))
    return (yield from _run(recipe, out, resume, test, leaky, curves, lambda line: None, main))


def _run(
    recipe: Recipe,
    out: Path,
    resume: bool,
    test: bool,
    leaky: int,
    curves: bool,
    say: Callable[[str], None],
    main: bool,
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
    forget_peak(device)
    data = open_splits(recipe.data)
    for note in data.notes:
        say(f"note: {note}")
    model = load_model(
        recipe.model.name, recipe.model.weights, image_size=recipe.model.image_size, resize=recipe.model.resize,
        normalize=recipe.model.normalize, pixels=recipe.model.pixels,
    )  # fmt: skip
    vit = anatomy(model)
    adapter = attach(model, recipe.build_method(), classes=data.classes, seed=recipe.train.seed)
    model.to(device)
    body, head = adapter.trainable_parameters, adapter.head_size
    say(f"{adapter.method.name} on {vit.name}, {device}: {body:,} trainable parameters and a head of {head:,}")
    joined = recipe.data.train_on == "train+val"
    train = Images(
        data.whole if joined else data.train, vit.preprocessing, broken=recipe.data.broken, ceiling=recipe.data.ceiling,
        workers=recipe.data.workers,
    )  # fmt: skip

    def shown(split: Split) -> Images:
        return Images(split, vit.preprocessing, broken="miss", workers=recipe.data.workers)

    def score(images: Images) -> Evaluation:
        return evaluate(model, images, precision=recipe.train.precision)

    val = None if joined else shown(data.val)
    if main and not toml.exists():  # only now, so that a wrong path leaves no run behind
        write_bytes(toml, recipe.toml().encode())
    checkpoints = Checkpoints(out)
    loss, seconds = _keep(metrics_file, checkpoints) if main else (None, 0.0)
    accuracy, trained = None, seconds
    with (
        metrics_file.open("a", encoding="utf-8") if main else open(os.devnull, "w") as log,
        closing(fit(model, adapter, train, val, recipe.train, checkpoints=checkpoints)) as steps,
    ):
        for step in steps:
            loss, accuracy = step.loss, step.accuracy
            row = {k: v for k, v in vars(step).items() if v is not None}
            log.write(json.dumps({**row, "seconds": round(step.seconds + seconds, 3)}) + "\n")
            log.flush()
            trained = step.seconds + seconds
            if main and leaky and step.step % (step.steps // recipe.train.epochs) == 0 and not (step.epoch + 1) % leaky:
                write(out / EPOCH.format(step.epoch + 1), adapter.tensors(), {})
            yield step
    for line in [*checkpoints.notes, *(f"skipped: {b}" for b in train.broken)]:
        say(line)
    if accuracy is None and val is not None:  # a run that had done its last step before it was resumed
        accuracy = score(val).accuracy
    tested = best = None
    if test and data.test is not None:
        done, planned = _last_step(metrics_file), -(-len(train) // recipe.train.batch_size) * recipe.train.epochs

        def unlock(state: Mapping[str, torch.Tensor], purpose: str = "result") -> Split:
            return locked.open(step=done, steps=planned, weights=weights_digest(state), purpose=purpose)

        locked = TestSplit(data.test, out)
        final = shown(unlock(adapter.tensors()) if main else data.test)
        tested = score(final)
        if leaky and main:
            best = _best_on_test(adapter, out, lambda: score(final), unlock)
    result: dict[str, Any] = {
        "test_accuracy": None if tested is None else tested.accuracy,
        "test_class_accuracy": None if tested is None else tested.class_accuracy,
        "test_missed": None if tested is None else tested.missed,
        "test_pictures": None if tested is None else tested.pictures,
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
    cut = {key: told["data"][key] for key in (*SPLIT, "train_on") if key in told["data"]}
    adapter.summary = {**result, "recipe": {"train": told["train"], "data": cut}, "deltavit": __version__}
    if not main:
        return result
    size = adapter.save(out / ADAPTER)
    result |= {
        "adapter": str(out / ADAPTER),
        "adapter_bytes": size,
        "seconds": round(seconds + time.monotonic() - began, 2),
        "train_seconds": round(trained, 2),
        "peak_bytes": peak_memory(device),
        "threads": torch.get_num_threads(),
        "precision": computed_in(device, recipe.train.precision),
        "by_class": None if tested is None else dict(zip(data.classes, tested.by_class, strict=True)),
        "test_reads": (read_before := readings(out)),
        "clean": clean(read_before),
        "leaky": best,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "preprocessing": vars(vit.preprocessing),
        "data": data.manifest(),
    }
    if curves:
        _curves(metrics_file, out / "curves.png", say)
    write_bytes(result_file, (json.dumps(result, indent=2) + "\n").encode())
    for path in [*out.glob("checkpoint-*.safetensors"), *out.glob(EPOCH.format("*"))]:
        path.unlink(missing_ok=True)
    return result


def _best_on_test(
    adapter: Adapter, out: Path, score: Callable[[], Evaluation], unlock: Callable[..., Split]
) -> dict[str, Any]:
    """The best of the kept states on test, and its epoch: what a protocol that leaks would have reported."""
    tensors = adapter.tensors()
    final = {name: value.detach().clone() for name, value in tensors.items()}
    scores = {}
    for path in sorted(out.glob(EPOCH.format("*"))):
        state, _ = read(path)
        unlock(state, "leaky")
        _restore(tensors, state)
        scores[int(path.stem.split("-")[1])] = score().accuracy
    _restore(tensors, final)
    epoch = max(scores, key=lambda epoch: (scores[epoch], -epoch))
    return {"accuracy": scores[epoch], "epoch": epoch}


def _restore(tensors: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(state[name])


def _last_step(metrics: Path) -> int:
    rows = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return int(json.loads(rows[-1])["step"]) if rows else 0


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
