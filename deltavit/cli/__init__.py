"""The command line: `deltavit COMMAND`, each with `--json`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import torch
import typer

from .. import __version__
from ..core.errors import DeltavitError
from . import files, inspect, tasks
from .analyze import analyze
from .bench import bench
from .data import data as protocols
from .demo import demo
from .output import Interrupted, say
from .report import report
from .search import search
from .soup import soup


def _version(asked: bool) -> None:
    if asked:
        print(f"deltavit {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="deltavit",
    help="Adapt large pretrained Vision Transformers to new image tasks by training a tiny part of them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
) -> None:
    """Adapt large pretrained Vision Transformers to new image tasks by training a tiny part of them."""


for command in (
    tasks.train, tasks.evaluate, tasks.predict, inspect.methods, inspect.plan, files.merge, files.export,
    inspect.doctor, search, bench, report, soup, demo,
):  # fmt: skip
    app.command()(command)
app.add_typer(protocols)
app.add_typer(analyze)


def main() -> None:
    """Run a command; what deltavit refuses becomes one line on standard error and exit code 1."""
    try:
        app()
    except Interrupted as stop:
        say(str(stop))
        sys.exit(130)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except (DeltavitError, MemoryError, OSError, torch.OutOfMemoryError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            line = f"the device is out of memory: raise train.accumulate, or lower train.batch_size ({line[:120]})"
        say(f"deltavit: {line}")
        if "--json" in sys.argv:
            print(json.dumps({"error": line}))
        sys.exit(1)
