"""`demo`: the main job on what the package carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..data.digits import write_digits
from ..demo.compare import EPOCHS, METHODS, RATES, SEEDS, run, search
from . import options as o
from .output import bar, result, say, table


def demo(
    out: Annotated[Path, typer.Option(help="Where digits/, demo.json and demo.png go.")] = Path("demo-out"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = SEEDS,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 200 training images.")] = EPOCHS,
    rates: Annotated[bool, typer.Option("--search", help="Choose learning rates on val instead.")] = False,
    json: o.Json = False,
) -> None:
    """Compare six methods on handwritten digits with the backbone in the package; no network is needed."""
    if rates:
        _search(out, epochs, json)
        return
    rows = []
    with bar("demo", len(METHODS)) as shown:
        for row in run(out, seeds, epochs):
            rows.append(row)
            shown.advance(len(rows))
            say(f"{row.method:12} {100 * row.mean:5.1f} % +- {100 * row.spread:.1f}  ({row.seconds:.1f} s a run)")

    def print_table() -> None:
        table(
            f"vit_pico on handwritten digits: 200 training images, {seeds} seeds, mean and standard deviation on test",
            ("method", "trains (body)", "head", "test accuracy", "seconds a run"),
            [
                (r.method, r.trainable_parameters, r.head_parameters, f"{100 * r.mean:.1f} +- {100 * r.spread:.1f} %",
                 f"{r.seconds:.1f}") for r in rows
            ],
            right=(1, 2, 3, 4),
        )  # fmt: skip
        print(f"picture: {out / 'demo.png'}")

    values = [{**dataclasses.asdict(r), "mean": r.mean, "spread": r.spread} for r in rows]
    result({"rows": values, "picture": str(out / "demo.png")}, json, print_table)


def _search(out: Path, epochs: int, json: bool) -> None:
    found: dict[str, dict[float, float]] = {}
    with bar("search", len(METHODS) * len(RATES)) as shown:
        for name, lr, accuracy in search(write_digits(out / "digits"), epochs):
            found.setdefault(name, {})[lr] = accuracy
            shown.advance(sum(map(len, found.values())))
            say(f"{name:12} {lr:7.4f}  val {100 * accuracy:5.1f} %")
    best = {name: max(scores, key=lambda lr: scores[lr]) for name, scores in found.items()}
    values = {"best": best, "val": {n: {str(k): v for k, v in s.items()} for n, s in found.items()}}
    result(values, json, lambda: table("", ("method", "learning rate"), best.items()))
