"""What commands print: messages and progress on standard error, results on standard output."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..train.fit import Step, drain

PATIENCE = 2.0
"""Seconds after which a command shows how far it is."""

errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
T = TypeVar("T")


def say(line: str) -> None:
    """One line for a person, on standard error."""
    errors.print(line)


def result(values: dict[str, Any], as_json: bool, shown: Callable[[], None] | None = None) -> None:
    """The result of a command: one JSON object as the last line of standard output, or what a person reads."""
    if as_json:
        print(json.dumps(values))
    elif shown is not None:
        shown()
    else:
        width = max(map(len, values))
        for key, value in values.items():
            print(f"{key:{width}}  {value}")


def percent(accuracy: float | None) -> str:
    """An accuracy in [0, 1] as a table shows it; nothing where there is none."""
    return "" if accuracy is None else f"{100 * accuracy:.1f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> None:
    made = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in right else "left", no_wrap=i in right or i == 0)
    for row in rows:
        made.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row))
    # names of files and classes are printed as they are: no [markup], no :emoji:
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False).print(made)


class Bar:
    """A progress bar with the time left, which shows itself once the work has taken two seconds."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self.began = time.monotonic()
        self.progress: Progress | None = None

    def advance(self, to: int, label: str | None = None) -> None:
        self.done, self.label = to, label or self.label
        if self.progress is None and errors.is_terminal and time.monotonic() - self.began > PATIENCE:
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=errors, transient=True,
            )  # fmt: skip
            self.task = self.progress.add_task(self.label, total=self.total)
            self.progress.start()
        if self.progress is not None:
            self.progress.update(self.task, completed=to, description=self.label, total=self.total)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


@contextmanager
def bar(label: str, total: int) -> Iterator[Bar]:
    made = Bar(label, total)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def interruptible(
    line: str = "stopping after this step; press Ctrl-C again to stop at once",
) -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the step under way, so that nothing is half done; a second one stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say(line)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """The user asked to stop, and the run was left so that it can go on."""


def drive(steps: Generator[Step, None, T], label: str, quiet: bool = False) -> T:
    """Run a training generator to its end, showing progress and a line an epoch.  Returns its return value."""
    with closing(steps), interruptible() as asked, bar(label, 1) as shown:
        began = time.monotonic()

        def see(step: Step) -> None:
            shown.total = step.steps
            shown.advance(step.step, f"{label} loss {step.loss:.3f}")
            if step.accuracy is not None and not quiet:
                say(
                    f"epoch {step.epoch + 1:3}  loss {step.loss:.4f}  val {percent(step.accuracy):>5} %  "
                    f"{time.monotonic() - began:6.1f} s"
                )
            if asked():
                raise Interrupted

        return drain(steps, see)
