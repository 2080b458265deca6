"""`bench`: a suite of runs."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..bench import Outcome, estimate, read_suite
from ..bench import bench as run_suite
from ..bench.engine import Engine, Here, Local
from ..core.errors import RecipeError
from ..train.fit import drain
from ..train.recipe import parse_value
from . import options as o
from .output import Interrupted, bar, interruptible, result, say, table


def bench(
    suite: Annotated[Path, typer.Argument(help="TOML file: models x methods x data sets x seeds x search.")],
    changes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            help="Any key of the suite as KEY=VALUE: seeds=[0] train.epochs=5 data.root=vtab", show_default=False
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the results; else bench/NAME.")] = None,  # noqa: UP045
    only: Annotated[Optional[str], typer.Option(help="Only cells whose key matches: '*~lora~*'.")] = None,  # noqa: UP045
    retry: Annotated[bool, typer.Option("--retry", help="Also run again what has failed.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes on this machine; 0: this one, for a debugger.")] = 1,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Of each worker; else the cores shared.")] = None,  # noqa: UP045
    devices: Annotated[Optional[str], typer.Option(help="One for each worker in turn: cuda:0,cuda:1.")] = None,  # noqa: UP045
    memory: Annotated[Optional[float], typer.Option(help="GiB that a worker may take.")] = None,  # noqa: UP045
    on: Annotated[
        str | None, typer.Option(help="A Ray cluster: ray://HOST:10001, ray:HOST:6379, ray:auto or ray:local.")
    ] = None,
    cpus: Annotated[float, typer.Option(help="Processors that a piece takes on Ray.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs that a piece takes on Ray; parts are allowed.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Cells, hours and disk; trains nothing.")] = False,
    json: o.Json = False,
) -> None:
    """Run a suite, or continue it: what has a record is not run again.

    deltavit bench recipes/demo-suite.toml --out bench/demo
    """
    told = read_suite(suite, dict(map(_change, changes or [])))
    out = out or Path("bench") / told.name
    if dry_run:
        _dry(told, out, json)
        return
    bytes_ = None if memory is None else int(memory * 2**30)
    engine: Engine
    if on is not None:
        from ..bench.ray import Ray

        if devices or threads or workers > 1:
            raise RecipeError("--workers, --threads and --devices are of this machine; with --on say --cpus and --gpus")
        engine = Ray(on, cpus=cpus, gpus=gpus, memory=bytes_)
    elif workers == 0:
        engine = Here()
    else:
        engine = Local(
            workers, devices=devices.split(",") if devices else (), threads=threads,
            memory=bytes_,
        )  # fmt: skip
    began = time.monotonic()
    with interruptible("stopping: what runs is left to continue later; press Ctrl-C again to stop at once") as asked:
        with bar(told.name, 1) as shown:
            steps = run_suite(told, out, engine, only=only, retry=retry, stop=asked, say=say)

            def see(end: Outcome) -> None:
                shown.total = end.total
                shown.advance(end.done)
                say(f"[{end.done}/{end.total}] {end.key}  {_told(end)}  {time.monotonic() - began:.0f} s")

            records = drain(steps, see)
        failed = [r for r in records if r["status"] == "failed"]
        if asked():
            raise Interrupted(f"stopped; the same command continues it: deltavit {shlex.join(sys.argv[1:])}")
    for record in failed:
        say(f"failed: {record['key']}: {record['error']['line']}")
    values = {
        "suite": told.name, "out": str(out), "done": len(records) - len(failed), "failed": len(failed),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    result(values, json)
    if failed:
        say("the traceback of each is in its record; --retry runs them again")
        raise typer.Exit(1)
    say(f"tables and pictures: deltavit report {shlex.quote(str(out))}")


def _told(end: Outcome) -> str:
    if end.result is None:
        return f"FAILED: {end.error}"
    if end.kind == "search":
        values = ", ".join(
            f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in end.result["values"].items()
        )
        return f"search: {values}, val {100 * end.result['accuracy']:.1f} %"
    return f"test {100 * end.result['test_accuracy']:.1f} %"


def _dry(suite: Any, out: Path, json: bool) -> None:
    say("measuring a training step of every method on every model")
    told = estimate(suite, out)
    values = {k: v for k, v in vars(told).items() if k != "rows"}
    values["hours"] = None if told.seconds is None else round(told.seconds / 3600, 2)

    def shown() -> None:
        rows = [
            (r["model"], r["method"], r["pictures"], f"{1000 * r['per_picture']:.1f}", f"{r['seconds'] / 3600:.2f}")
            for r in told.rows
        ]
        table(suite.title or suite.name, ("model", "method", "pictures", "ms each", "hours"), rows, right=(2, 3, 4))
        print(
            f"{told.cells} cells, {told.done} of them done; {told.studies} searches with {told.trials} trials\n"
            f"about {values['hours']} hours on one worker like this, {told.disk / 2**20:,.0f} MiB of disk"
        )
        for line in told.missing:
            print(f"missing: {line}")

    result(values, json, shown)


def _change(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{change!r} is not key=value, such as seeds=[0] or train.epochs=5")
    return key.strip(), parse_value(value.strip())
