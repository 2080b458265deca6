"""`analyze dimension`: local intrinsic dimension, and the Kronecker Adaptation that it selects."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..analysis import dimension as measure
from ..analysis.pairs import png
from ..core.errors import DataError, RecipeError
from ..core.sealed import write_bytes
from ..core.site import anatomy
from ..models.load import skeleton
from ..train.fit import Step, drain
from ..train.recipe import read_recipe
from . import options as o
from .output import Interrupted, bar, interruptible, percent, result, say, table


def dimension(
    changes: o.Changes = None,
    recipe: Annotated[Optional[Path], typer.Option(help="TOML recipe; flags and KEY=VALUE override it.")] = None,  # noqa: UP045
    data: o.Data = None,
    model: o.Model = None,
    weights: o.Weights = None,
    image_size: o.Size = None,
    blocks: Annotated[Optional[str], typer.Option(help="Blocks: 0,5,11 or 0..11; else all.")] = None,  # noqa: UP045
    parts: Annotated[
        str, typer.Option(help="attention, ffn, or roles joined by +, as in q+k+v; several with a comma.")
    ] = ("attention,ffn"),
    dims: Annotated[
        str, typer.Option(help="LOW..HIGH doubles, LOW..HIGH:N takes N on a log scale, or a list.")
    ] = "8..2048:5",
    seeds: Annotated[int, typer.Option(help="Trainings of each point: train.seed=N and the numbers after it.")] = 3,
    heads: Annotated[str, typer.Option(help="frozen, trained, or both with a comma.")] = "frozen,trained",
    rates: Annotated[str, typer.Option(help="Learning rates tried with the first seed; in a subspace scaled.")] = (
        "1e-3,1e-2"
    ),
    head_rates: Annotated[str, typer.Option(help="The same for the linear probe, and so for trained heads.")] = "1e-3",
    fraction: Annotated[float, typer.Option(help="Of module fine-tuning that is to be reached.")] = 0.9,
    said: Annotated[bool, typer.Option("--said", help="Structure-aware: a trained factor for each tensor.")] = False,
    select: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Write a Kronecker Adaptation of this many modules, those of lowest dimension."),
    ] = None,
    by: Annotated[Optional[str], typer.Option(help="Head whose dimensions select; else the first of --heads.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Folder; else runs/dimension-DATA-MODEL.")] = None,  # noqa: UP045
    keep: Annotated[bool, typer.Option("--keep", help="Keep the adapter of each run.")] = False,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,  # noqa: UP045
    json: o.Json = False,
) -> None:
    """In how few random directions each module learns the task nearly as well as whole; on val, never on test.

    The same command again goes on where it stopped.

    deltavit analyze dimension --data flowers/ --blocks 0,5,11 --dims 8..2048 --select 2 --out dimension
    """
    chosen = read_recipe(
        recipe,
        [*([f"device={device}"] if device else []), *(changes or [])],
        model={"name": model, "weights": weights, "image_size": image_size},
        data={"path": data},
    )
    settings = measure.Settings(
        _dims(dims), seeds, tuple(_words(heads)), _numbers("--rates", rates),  # type: ignore[arg-type]
        _numbers("--head-rates", head_rates), fraction, said,
    )  # fmt: skip
    if by is not None and by not in settings.heads:
        raise RecipeError(f"--by {by}: only {', '.join(settings.heads)} is measured")
    vit = anatomy(skeleton(chosen.model.name, chosen.model.image_size))
    wanted = measure.modules(vit, _words(parts), None if blocks is None else _blocks(blocks))
    if select is not None and select > len(wanted):
        raise RecipeError(f"--select {select}: only {len(wanted)} modules are measured")
    if out is None:
        out = Path("runs") / f"dimension-{Path(chosen.data.path).resolve().name}-{chosen.model.name}"
    place = ""
    with interruptible() as asked, bar("point 1", 1) as shown:

        def watch(done: int, total: int, step: Step) -> None:
            nonlocal place
            place, shown.total = f"[{done + 1}/{total}]", step.steps
            shown.advance(step.step, f"point {done + 1} of {total} loss {step.loss:.3f}")
            if asked():
                raise Interrupted(f"stopped; the same command goes on: {shlex.join(['deltavit', *sys.argv[1:]])}")

        points = measure.dimensions(chosen, wanted, settings, out, keep=keep, say=say, watch=watch)
        found = drain(points, lambda point: say(f"{place} {_line(point)}"))
    values = {"out": str(out), "curves": [measure.plain(curve) for curve in found]}
    ends = measure.at_an_end(found, settings)
    values["at_an_end_of_rates"] = ends
    if ends:
        say(f"best at an end of --rates or --head-rates, so a wider list may move d: {'; '.join(ends)}")
    title = f"{Path(chosen.data.path).resolve().name}, {chosen.model.name}"
    try:
        for name, draw in (("curves", measure.curves_picture), ("layers", measure.layers_picture)):
            write_bytes(out / f"{name}.png", png(draw(found, title)))
    except DataError as error:
        say(f"no pictures: {error}")
    if select is not None:
        names = measure.select(found, select, by)  # type: ignore[arg-type]
        made = measure.kronecker(chosen, [one for one in wanted if one.name in names])
        write_bytes(out / "kronecker.toml", made.toml().encode())
        values |= {"selected": names, "recipe": str(out / "kronecker.toml")}

    def print_table() -> None:
        table(
            f"d at {fraction:.0%} of the module (frozen head), or of the gap from the linear probe (trained head)",
            ("module", "head", "numbers", "probe", "module", "target", "d", "by seed"),
            [
                (
                    c.module, c.head, c.numbers, percent(measure.mean_of(c.probe)), percent(measure.mean_of(c.whole)),
                    percent(c.crossing.target), str(c.crossing), ", ".join(map(_short, c.by_seed)),
                )
                for c in found
            ],
        )  # fmt: skip
        if select is not None:
            print(f"selected: {', '.join(names)}")
            print(f"train them: deltavit train --recipe {shlex.quote(str(values['recipe']))}")

    result(values, json, print_table)


def _line(point: measure.Point) -> str:
    what = {0: "linear probe", None: "whole"}.get(point.dimension, f"d {point.dimension}")
    told = point.error if point.accuracy is None else f"val {percent(point.accuracy):>5} %"
    return f"{point.module} {what}, {point.head} head, rate {point.rate:g}, seed {point.seed}: {told}".strip()


def _short(crossing: measure.Crossing) -> str:
    return f"{crossing.dimension:.0f}" if crossing.state == "reached" else str(crossing)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise RecipeError(f"{flag} {text!r}: give numbers with a comma between them, as in 1e-4,1e-3") from None


def _blocks(text: str) -> list[int]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text.strip()):
        return list(range(int(match[1]), int(match[2]) + 1))
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise RecipeError(f"--blocks {text!r}: give numbers, as in 0,5,11 or 0..11") from None


def _dims(text: str) -> tuple[int, ...]:
    """`8..2048`: doubled; `8..2048:5`: 8, 32, 128, 512, 2048; `8,100,1000`: these."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)(?::(\d+))?", text.strip())
    if match is None:
        try:
            return tuple(int(word) for word in _words(text))
        except ValueError:
            raise RecipeError(f"--dims {text!r}: give 8..2048, 8..2048:5, or whole numbers with a comma") from None
    low, high, count = int(match[1]), int(match[2]), match[3]
    if not 1 <= low < high or (count is not None and int(count) < 2):
        raise RecipeError(f"--dims {text!r}: from at least 1 up to more than that, in 2 or more values")
    if count is None:
        return (*_doubled(low, high), high)
    steps = int(count) - 1
    return tuple(dict.fromkeys(round(low * (high / low) ** (i / steps)) for i in range(steps + 1)))


def _doubled(low: int, high: int) -> Sequence[int]:
    return [low << i for i in range(high.bit_length()) if low << i < high]
