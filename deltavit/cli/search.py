"""`search`: values of a recipe chosen on val."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from pydantic import ValidationError

from ..core.errors import RecipeError
from ..search import Search, Trial, default_space, parse_space
from ..search import search as run_search
from ..train.fit import Step, drain
from ..train.recipe import read_recipe
from . import options as o
from .output import Interrupted, bar, interruptible, result, say, table


def search(
    changes: o.Changes = None,
    recipe: Annotated[Optional[Path], typer.Option(help="TOML recipe; flags and KEY=VALUE override it.")] = None,  # noqa: UP045
    data: o.Data = None,
    model: o.Model = None,
    weights: o.Weights = None,
    image_size: o.Size = None,
    method: o.MethodName = None,
    space: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="KEY=LOW..HIGH or KEY=A,B,C, once a key; else learning rate, weight decay, and any scale."),
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random, tpe, or elevater.")] = "tpe",
    pruner: Annotated[
        str, typer.Option(help="none, or halving: stop trials that lag behind after 1, 3, 9, .. epochs.")
    ] = "none",
    trials: Annotated[int, typer.Option(min=1, help="Values that tpe and random try.")] = 20,
    epochs: Annotated[Optional[int], typer.Option(min=1, help="Of a trial; else the recipe's.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler; train.seed=N is the trials'.")] = 0,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="URL of a database that several processes share; else SQLite in --out."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder; else runs/search-DATA-MODEL-METHOD.")] = None,  # noqa: UP045
    keep: Annotated[bool, typer.Option("--keep", help="Keep the adapter of each trial.")] = False,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,  # noqa: UP045
    json: o.Json = False,
) -> None:
    """Choose values of the recipe on val, never on test; the same command again goes on where it stopped.

    deltavit search --data flowers/ --method lora --space train.lr=1e-4..1e-1 --space method.scale=0.1,1,10 --epochs 5
    """
    chosen = read_recipe(
        recipe,
        [*([f"device={device}"] if device else []), *(changes or [])],
        model={"name": model, "weights": weights, "image_size": image_size},
        method={"name": method},
        data={"path": data},
    )
    try:
        settings = Search(
            sampler=sampler, pruner=pruner, trials=trials, epochs=epochs, seed=seed, storage=storage  # type: ignore[arg-type]
        )  # fmt: skip
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(f"--{problem['loc'][0]} {problem['input']}: {problem['msg'].lower()}") from None
    if out is None:
        folder = Path(chosen.data.path).resolve().name
        out = Path("runs") / f"search-{folder}-{chosen.model.name}-{chosen.build_method().name}"
    wanted = parse_space(space) if space else default_space(chosen, sampler)
    with interruptible() as asked, bar("trial 0", 1) as shown:

        def watch(number: int, step: Step | None) -> None:
            if step is not None:
                shown.total = step.steps
                shown.advance(step.step, f"trial {number} loss {step.loss:.3f}")
            if asked():
                raise Interrupted(f"stopped; the same command goes on: {shlex.join(['deltavit', *sys.argv[1:]])}")

        steps = run_search(chosen, wanted, settings, out, keep=keep, say=say, watch=watch)
        found = drain(steps, lambda trial: say(_line(trial)))
    best = out / "best.toml"
    again = f"deltavit train --recipe {shlex.quote(str(best))}"
    values = {
        "values": found.values, "val_accuracy": found.accuracy, "recipe": str(best), "out": str(out),
        "trials": [asdict(trial) for trial in found.trials],
    }  # fmt: skip

    def print_table() -> None:
        order = sorted(found.trials, key=lambda t: (t.accuracy is None, -(t.accuracy or 0.0), t.number))
        table(
            f"{len(order)} trials, best first",
            ("trial", *found.values, "val", "epochs", "seconds"),
            [(t.number, *map(_short, t.values.values()), _val(t), t.epochs, f"{t.seconds:.1f}") for t in order],
        )
        print(f"best: {', '.join(f'{key} = {value}' for key, value in found.values.items())}")
        print(f"train with it: {again}")

    result(values, json, print_table)


def _line(trial: Trial) -> str:
    values = ", ".join(f"{key} {_short(value)}" for key, value in trial.values.items())
    error = f": {trial.error}" if trial.error else ""
    return f"trial {trial.number:3}  {values}  {_val(trial)}{error}  {trial.seconds:.1f} s"


def _val(trial: Trial) -> str:
    return trial.state if trial.accuracy is None else f"val {100 * trial.accuracy:5.1f} %"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
