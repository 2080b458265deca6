"""`train`, `evaluate` and `predict`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from torch import nn

from ..core.attach import Adapter
from ..core.errors import DataError
from ..core.file import Info, adapter_file, info, load
from ..data import Images, open_data, open_images
from ..models import load_model
from ..train import ddp
from ..train import evaluate as evaluate_images
from ..train import predict as predict_files
from ..train.recipe import read_recipe
from ..train.run import SPLIT, pick_device, run
from . import options as o
from .output import Interrupted, bar, drive, result, say, table


def train(
    changes: o.Changes = None,
    recipe: Annotated[Optional[Path], typer.Option(help="TOML recipe; flags and KEY=VALUE override it.")] = None,  # noqa: UP045
    data: o.Data = None,
    model: o.Model = None,
    weights: o.Weights = None,
    image_size: o.Size = None,
    method: o.MethodName = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the run; else runs/DATA-MODEL-METHOD-SEED.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, from its checkpoint.")] = False,
    epochs: Annotated[Optional[int], typer.Option(help="Same as train.epochs=N.")] = None,  # noqa: UP045
    lr: Annotated[Optional[float], typer.Option(help="Same as train.lr=X.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Same as train.seed=N.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,  # noqa: UP045
    test: Annotated[bool, typer.Option("--test/--no-test", help="Read the test split, once, after training.")] = True,
    json: o.Json = False,
) -> None:
    """Train an adapter: from a folder of images to one small file.

    deltavit train --data flowers/ --model vit_base_patch16_224.augreg_in21k --method lora method.rank=16
    """
    if resume and recipe is None and out is not None and (out / "recipe.toml").exists():
        recipe = out / "recipe.toml"
    chosen = read_recipe(
        recipe,
        [*([f"device={device}"] if device else []), *(changes or [])],
        model={"name": model, "weights": weights, "image_size": image_size},
        method={"name": method},
        data={"path": data},
        train={"epochs": epochs, "lr": lr, "seed": seed},
    )
    if out is None:
        folder = Path(chosen.data.path).resolve().name
        out = Path("runs") / f"{folder}-{chosen.model.name}-{chosen.build_method().name}-{chosen.train.seed}"
    with ddp.group():
        try:
            steps = run(chosen, out, resume=resume, test=test, say=say)
            values = drive(steps, chosen.build_method().name, quiet=ddp.rank() > 0)
        except Interrupted:
            again = f"deltavit train --resume --out {shlex.quote(str(out))}{'' if test else ' --no-test'}"
            raise Interrupted(f"stopped; continue with: {again}") from None
        if ddp.rank() == 0:
            result(_brief(values), json)


def _brief(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in ("preprocessing", "data")}


def evaluate(
    adapter: o.AdapterFile,
    data: Annotated[str, typer.Option(help="As for train.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    model: o.Model = None,
    weights: o.Weights = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Accuracy of an adapter on a split.

    deltavit evaluate --adapter runs/flowers/adapter.safetensors --data flowers/ --split val
    """
    net, loaded, said = opened(adapter, model, weights, device)
    found = open_data(data, **cut_of(said))
    if split == "val" and told_of(said, "data").get("train_on") == "train+val":
        raise DataError("this adapter was trained on val too, so val says nothing about it; evaluate on test")
    part = getattr(found, split, None) if split in ("train", "val", "test") else None
    if part is None:
        raise DataError(f"{data} has no split {split!r}; it has train, val{'' if found.test is None else ', test'}")
    classes = loaded.classes or []
    strange = [c for c in found.classes if c not in classes]
    if strange:
        raise DataError(f"{data} has classes that the adapter was not trained on: {', '.join(strange[:5])}")
    images = Images(part, loaded.preprocessing, broken="miss")
    with bar("evaluate", len(images)) as shown:
        scores = evaluate_images(
            net, images, precision=told_of(said, "train").get("precision", "auto"),
            labels=[classes.index(c) for c in found.classes], progress=shown.advance,
        )  # fmt: skip
    for line in images.broken:
        say(f"counted as a miss: {line}")
    result({**dataclasses.asdict(scores), "split": split, "adapter": str(said.path), "model": said.base}, json)


def cut_of(said: Info) -> dict[str, Any]:
    """How the adapter's run cut its pictures into splits: what it trained on must not be in the test split now."""
    section = read_recipe(data=told_of(said, "data")).data
    return {key: getattr(section, key) for key in SPLIT}


def told_of(said: Info, section: str) -> dict[str, Any]:
    """A section of the recipe that an adapter file keeps; empty where it keeps none."""
    recipe = said.training.get("recipe", {})
    told = recipe.get(section, {}) if isinstance(recipe, dict) else {}
    return told if isinstance(told, dict) else {}


def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders that are searched for them.")],
    adapter: o.AdapterFile,
    top: Annotated[int, typer.Option(min=1, help="How many classes a picture.")] = 3,
    model: o.Model = None,
    weights: o.Weights = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """The most probable classes of pictures.

    deltavit predict photo.jpg more-photos/ --adapter runs/flowers/adapter.safetensors
    """
    paths = open_images(images)
    net, loaded, _ = opened(adapter, model, weights, device)
    found = []
    with bar("predict", len(paths)) as shown:
        for guess in predict_files(net, paths, loaded.classes or [], loaded.preprocessing, top=top):
            found.append(guess)
            shown.advance(len(found))
    broken = [g for g in found if g.error]
    values = [
        {"path": str(g.path), "error": g.error}
        if g.error
        else {"path": str(g.path), "classes": [{"name": n, "probability": round(p, 6)} for n, p in g.classes]}
        for g in found
    ]
    rows = [
        (g.path, g.error or ", ".join(f"{n} {100 * p:.1f} %" for n, p in g.classes))
        for g in found
    ]  # fmt: skip
    result({"predictions": values, "broken": len(broken)}, json, lambda: table("", ("picture", "classes"), rows))
    if broken:
        say(f"{len(broken)} of {len(found)} pictures could not be read")
        raise typer.Exit(1)


def opened(path: Path, name: str | None, weights: str | None, device: str) -> tuple[nn.Module, Adapter, Info]:
    """The base that an adapter file names, with the adapter on it; a run's recipe knows where its weights are."""
    path = adapter_file(path)
    beside = path.parent / "recipe.toml"
    if weights is None and beside.exists():
        weights = read_recipe(beside).model.weights
    said = info(path)
    base = load_model(name or said.base, weights, **said.options)
    adapter = load(path, base)
    return base.to(pick_device(device)).eval(), adapter, said
