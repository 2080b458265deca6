"""`data list`, `data build` and `data check`: the protocols, and the pictures that they need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..core.errors import DataError
from ..data import open_data
from ..data.build import build as build_task
from ..data.protocols import Protocol, Task, protocol, protocols
from . import options as o
from .output import bar, result, say, table

data = typer.Typer(
    name="data",
    help="The protocols of benchmarks, and the pictures that they need.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Name = Annotated[str, typer.Argument(metavar="PROTOCOL", help="Its name in `deltavit data list`.")]


@data.command("list")
def known(
    name: Annotated[Optional[str], typer.Argument(metavar="[PROTOCOL]", help="Only this one.")] = None,  # noqa: UP045
    json: o.Json = False,
) -> None:
    """The protocols, their tasks, sizes, and where the pictures come from.

    deltavit data list vtab-1k
    """
    chosen = protocols() if name is None else {name: protocol(name)}
    values = {key: {**_told(one), "tasks": {t.name: _facts(t) for t in one.tasks}} for key, one in chosen.items()}

    def shown() -> None:
        for one in chosen.values():
            if one.open:
                print(f"{one.name}: {one.title}.  {one.notes}")
                continue
            columns = ("task", "", "classes", "train", "val", "test", "built from")
            table(
                f"{one.name}: {one.title}, trained on {one.train_on}",
                columns,
                [(t.name, t.group or "", t.classes, t.train, t.val, t.test, t.builder) for t in one.tasks],
                right=range(2, 6),
            )
            print(f"{one.source}\n{one.notes}\n")

    result({"protocols": values}, json, shown)


def _told(one: Protocol) -> dict[str, Any]:
    return {
        "title": one.title, "source": one.source, "train_on": one.train_on, "resize": one.resize, "epochs": one.epochs,
        "shots": list(one.shots), "seeds": list(one.seeds), "normalisation": list(one.normalisation),
        "notes": one.notes,
    }  # fmt: skip


def _facts(task: Task) -> dict[str, Any]:
    return {
        "title": task.title, "group": task.group, "classes": task.classes, "train": task.train, "val": task.val,
        "test": task.test, "folders": list(task.names), "source": task.source, "builder": task.builder,
        "notes": task.notes,
    }  # fmt: skip


@data.command("build")
def build(
    name: Name,
    task: Annotated[str, typer.Argument(help="Its name in `deltavit data list PROTOCOL`.")],
    source: Annotated[
        str, typer.Option("--from", help="Folder or zip with the owner's files, or hf:NAME for the library datasets.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder of all tasks; TASK is made in it, whole or not at all.")],
    json: o.Json = False,
) -> None:
    """Make the data of one task from the files that its owners give away.

    deltavit data build vtab-1k cifar100 --from cifar-100-binary/ --to vtab-1k/
    """
    made = build_task(protocol(name), task, source, to)
    for note in made["notes"]:
        say(note)
    result(made | {"path": str(to / made["task"])}, json)


@data.command("check")
def check(
    name: Name,
    root: Annotated[Path, typer.Argument(help="Folder of all tasks.")],
    json: o.Json = False,
) -> None:
    """What of a protocol is there, whether it has the right sizes and digests, and what is missing.

    deltavit data check vtab-1k vtab-1k/
    """
    told = protocol(name)
    tasks = [task.name for task in told.tasks]
    if told.open:
        tasks = sorted(path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
    found: dict[str, dict[str, Any]] = {}
    with bar("check", len(tasks)) as progress:
        for i, task in enumerate(tasks, 1):
            found[task] = _checked(told, task, root)
            progress.advance(i, task)
    bad = [task for task, state in found.items() if state["state"] != "good"]

    def shown() -> None:
        rows = [(task, v["state"], v.get("path", ""), v.get("reason", "")) for task, v in found.items()]
        table(f"{told.name} in {root}", ("task", "state", "path", ""), rows)

    result({"protocol": told.name, "root": str(root), "tasks": found, "good": len(found) - len(bad)}, json, shown)
    if bad or not found:
        say(f"{len(found) - len(bad)} of {len(found)} tasks of {told.name} are ready")
        raise typer.Exit(1)


def _checked(told: Protocol, task: str, root: Path) -> dict[str, Any]:
    try:
        section = told.data(task, root)
    except DataError as error:
        return {"state": "missing", "reason": str(error)}
    values: dict[str, Any] = {"state": "good", "path": section["path"]}
    try:
        found = open_data(section["path"], **({"val": section["val"]} if "val" in section else {}))
        told.check(task, found)
        for part in (found.train, found.val, found.test):
            if part is not None:
                values[part.name] = {"size": len(part), "digest": part.digest}
    except DataError as error:
        return values | {"state": "bad", "reason": str(error)}
    return values
