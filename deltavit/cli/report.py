"""`report`: the pages of a benchmark, from its records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..bench.record import read_records
from ..bench.suite import planned
from ..core.errors import DataError, unknown
from ..core.sealed import write_bytes
from ..report.summary import summary
from . import options as o
from .output import result, say

FORMATS = ("md", "latex", "csv", "html", "png")


def report(
    out: Annotated[Path, typer.Argument(help="Folder that `deltavit bench` filled.", show_default=False)],
    to: Annotated[Optional[Path], typer.Option(help="Where the pages go; else OUT/report.")] = None,  # noqa: UP045
    format: Annotated[str, typer.Option(help="Of md, latex, csv, html, png; with commas between.")] = ",".join(FORMATS),
    title: Annotated[str, typer.Option(help="Of the pages; else the suite's name.")] = "",
    against: Annotated[
        str, typer.Option(help="A method of the suite: every other one's difference to it, paired by set and seed.")
    ] = "",
    json: o.Json = False,
) -> None:
    """Tables, statistics, pictures and one page, as a pure function of the records.

    deltavit report OUT --to docs/results
    """
    wanted = [name.strip() for name in format.split(",") if name.strip()]
    for name in wanted:
        if name not in FORMATS:
            raise DataError(unknown("format", name, FORMATS))
    records, problems = read_records(out)
    for line in problems:
        say(f"left out: {line}")
    if not records:
        raise DataError(f"{out} holds no record that can be read")
    known_as, cells = planned(out)
    told = summary(records, title=title or known_as, planned=cells, against=against)
    folder = to or out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in _pages(told, wanted):
        write_bytes(folder / name, content)
        written.append(name)
    values = {
        "folder": str(folder), "files": written, "runs": len(told["runs"]), "failed": len(told["failed"]),
        "excluded": len(told["excluded"]), "missing": len(told["missing"]), "unreadable": len(problems),
    }  # fmt: skip
    result({**values, "summary": told} if json else {**values, "files": ", ".join(written)}, json)
    if problems:
        raise typer.Exit(1)


def _pages(told: dict, wanted: list[str]) -> Iterable[tuple[str, bytes]]:
    from ..report.render import csv_text, latex, markdown

    shown = []
    if "png" in wanted:
        try:
            from ..report.figures import pictures

            for title, name, content in pictures(told):
                shown.append((title, name))
                yield name, content
        except DataError as why:
            say(f"no pictures: {why}")
    if "md" in wanted:
        yield "index.md", markdown(told, shown).encode()
    if "latex" in wanted:
        yield "table.tex", latex(told).encode()
    if "csv" in wanted:
        yield "runs.csv", csv_text(told).encode()
    if "html" in wanted:
        from ..report.html import page

        yield "index.html", page(told).encode()
