"""`soup`: one adapter from the average of several."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
from torch import nn

from ..analysis.corrupt import LEVELS, chosen, robustness
from ..analysis.pairs import canvas, png
from ..analysis.soup import Member, Soup, Tried, members, picture
from ..analysis.soup import soup as make
from ..core.errors import DataError, FileError, MethodError
from ..core.file import load
from ..core.sealed import write_bytes
from ..data import Dataset, Images, Split, open_data
from ..train import evaluate as evaluate_images
from ..train.fit import drain
from ..train.merge import merge_to_file
from . import options as o
from .output import bar, percent, result, say, table
from .tasks import cut_of, opened, told_of


def soup(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter files, or folders of runs, of one base and task.")],
    out: Annotated[Optional[Path], typer.Option(help="Adapter file to write.")] = None,  # noqa: UP045
    merged: Annotated[Optional[Path], typer.Option(help="Model file to write, as `deltavit merge` does.")] = None,  # noqa: UP045
    data: o.Data = None,
    kind: Annotated[
        Literal["greedy", "uniform"], typer.Option(help="greedy: members that do not lower val; uniform: all.")
    ] = "greedy",
    average: Annotated[
        Literal["weights", "factors"], typer.Option(help="Merged weights, or the adapters' own tensors (one method).")
    ] = "weights",
    over: Annotated[
        Literal["all", "tuned"], typer.Option(help="A tensor's mean is over all members, or over those that tuned it.")
    ] = "all",
    rank: Annotated[Optional[int], typer.Option(help="Keep the mean of weights as LoRA of this rank.")] = None,  # noqa: UP045
    ood: Annotated[bool, typer.Option("--ood", help="Also accuracies on corrupted val images.")] = False,
    corruptions: Annotated[str, typer.Option(help="Of --ood, with commas between.")] = ",".join(LEVELS),
    severities: Annotated[str, typer.Option(help="Of --ood, 1 to 5, with commas between.")] = "1,2,3,4,5",
    test: Annotated[bool, typer.Option("--test", help="Read the test split, once, with the finished soup.")] = False,
    drawn: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--picture", help="PNG to write: the soup beside its members."),
    ] = None,
    model: o.Model = None,
    weights: o.Weights = None,
    device: o.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    json: o.Json = False,
) -> None:
    """Average adapters of one base and task into one adapter: all of them, or those that do not lower val.

    deltavit soup runs/a runs/b runs/c --data flowers/ --out soup.safetensors
    """
    if out is None and merged is None:
        raise FileError("a soup is written nowhere: give --out, --merged or both")
    for path in filter(None, (out, merged, drawn)):
        if path.exists() and not overwrite:
            raise FileError(f"{path} exists: choose another name, or give --overwrite")
    pairs = chosen([name.strip() for name in corruptions.split(",")], _numbers(severities))
    several = members(adapters)
    if data is None and (ood or test or drawn):
        raise DataError("--ood, --test and --picture need images: give --data")
    if drawn is not None:
        canvas(1, 1, 1, 1)  # says that matplotlib is missing before anything is measured
    pictures = None if data is None else _opened(several, data)
    if test and pictures is not None and pictures.test is None:
        raise DataError(f"{data} has no test split")
    net, first, said = opened(adapters[0], model, weights, device)
    if merged is not None and not first.mergeable:
        raise MethodError(f"{said.method.name} adds layers, so a soup of it does not merge: give --out alone")
    first.detach()
    classes = said.classes or []
    labels = [] if pictures is None else [classes.index(name) for name in pictures.classes]
    precision = told_of(said, "train").get("precision", "auto")

    def shown(split: Split) -> Images:
        return Images(split, said.preprocessing, broken="miss")

    val = None if pictures is None else shown(pictures.val)

    def accuracy(net: nn.Module) -> float:
        return evaluate_images(net, val, precision=precision, labels=labels).accuracy  # type: ignore[arg-type]

    made = _cooked(
        make(net, several, None if val is None else accuracy, kind=kind, average=average, over=over, rank=rank),
        2 * len(several) if kind == "greedy" else len(several) + 1,
    )
    values: dict[str, Any] = {"soup": None if out is None else str(out), "merged": None, **made.record()}
    values["members"] = [
        {**told, "path": str(m.path), "test_accuracy_of_its_run": m.said.training.get("test_accuracy")}
        for told, m in zip(values["members"], made.members, strict=True)
    ]
    values |= {"method": made.adapter.method.name, "parameters": made.adapter.trainable_parameters}
    if made.rank is not None:
        values["compression"]["by_site"] = made.errors
    if test and pictures is not None and pictures.test is not None:
        scored = evaluate_images(net, shown(pictures.test), precision=precision, labels=labels)
        values["test_accuracy"] = made.adapter.summary["test_accuracy"] = scored.accuracy
    if out is not None:
        values["bytes"] = made.adapter.save(out)
    if ood and val is not None:
        values["ood"] = _ood(net, made, val, pairs, labels, precision)
    if merged is not None:
        values["merged"] = str(merged)
        values["merged_bytes"] = merge_to_file(net, made.adapter, merged)
    if drawn is not None:
        write_bytes(drawn, png(picture(values)))
        values["picture"] = str(drawn)
    result(values, json, lambda: _print(values))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--severities {text!r} is not numbers with commas between, such as 1,3,5") from None


def _opened(several: Sequence[Member], data: str) -> Dataset:
    """The pictures, cut as all members' runs cut them: what one was trained on must not be the others' val.

    Raises:
        DataError: other classes than the members', runs that cut these pictures in different ways, or that trained on
            val too.
    """
    for member in several:
        if told_of(member.said, "data").get("train_on") == "train+val":
            raise DataError(
                f"{member.path} was trained on val too, so val says nothing about it; "
                "--kind uniform without --data needs no val"
            )
    first = several[0]
    found = open_data(data, **cut_of(first.said))
    cuts = [cut_of(first.said)]
    for member in several[1:]:
        if cut_of(member.said) in cuts:
            continue
        cuts.append(cut_of(member.said))
        other = open_data(data, **cut_of(member.said))
        if other.val.digest != found.val.digest:
            raise DataError(
                f"{member.path} and {first.path} cut {data} in two ways, so one was trained on val pictures of the "
                "other; train all with the same data.seed and data.val"
            )
    known = first.said.classes or []
    if strange := [name for name in found.classes if name not in known]:
        raise DataError(f"{data} has classes that the members were not trained on: {', '.join(strange[:5])}")
    return found


def _cooked(steps: Generator[Tried, None, Soup], total: int) -> Soup:
    with bar("soup", total) as shown:

        def see(tried: Tried) -> None:
            shown.advance(shown.done + 1)
            last = tried.members[-1]
            verdict = "" if tried.taken is None else "  stays in" if tried.taken else "  left out"
            say(f"val {percent(tried.accuracy):>5} %  {'' if tried.taken is None else 'with '}{last}{verdict}")

        return drain(steps, see)


def _ood(
    net: nn.Module, made: Soup, val: Images, pairs: list[tuple[str, int]], labels: list[int], precision: str
) -> dict[str, Any]:
    """The soup's and each member's accuracies on corrupted val images."""
    kinds, levels = list(dict.fromkeys(name for name, _ in pairs)), sorted({level for _, level in pairs})
    rows: list[dict[str, Any]] = []
    with bar("corrupted", (len(made.members) + 1) * (1 + len(pairs))) as shown:

        def row(name: str) -> None:
            done = len(rows) * (1 + len(pairs))
            found = robustness(
                net, val, names=kinds, severities=levels, labels=labels, precision=precision,
                progress=lambda i: shown.advance(done + i, name),
            )  # fmt: skip
            rows.append({"of": name, **found})

        row("soup")
        with made.adapter.disabled():
            for member in made.members:
                adapter = load(member.path, net)
                row(str(member.path))
                adapter.detach()
    return {"levels": {name: [LEVELS[name][s - 1] for s in levels] for name in kinds}, "severities": levels,
            "seed": 0, "rows": rows}  # fmt: skip


def _print(values: dict[str, Any]) -> None:
    over = f" over {values['over']}" if values["over"] else ""
    rows = [(m["path"], m["method"], percent(m["val_accuracy"]), m["taken"]) for m in values["members"]]
    title = f"{values['kind']} soup, mean of {values['average']}{over}"
    table(title, ("member", "method", "val, %", "in the soup"), [(*r, "yes" if t else "no") for *r, t in rows], (2,))
    if values["val_accuracy"] is not None:
        best = percent(values["best_member_val_accuracy"])
        print(f"val: soup {percent(values['val_accuracy'])} %, best member {best} %")
    if "test_accuracy" in values:
        print(f"test: soup {percent(values['test_accuracy'])} %")
    if (gap := values.get("gap_to_mean_of_weights")) is not None:
        print(f"mean of factors is not mean of weights: its change is {100 * gap:.1f} % off")
    if "compression" in values:
        told = values["compression"]
        sites = [(site, f"{100 * error:.2f}") for site, error in told["by_site"].items()]
        table(f"rank {told['rank']}: what it loses of each change", ("site", "%"), sites, right=(1,))
        print(f"of {told['sites']} sites: at most {100 * told['max']:.2f} %, {100 * told['mean']:.2f} % in the mean")
    if "ood" in values:
        names, told = list(values["ood"]["levels"]), values["ood"]["rows"]
        means = [[percent(sum(found) / len(found)) for found in row["corruptions"].values()] for row in told]
        table(
            f"val images corrupted (ours, not ImageNet-C), mean of severities {values['ood']['severities']}, %",
            ("", "clean", *names, "mean"),
            [(r["of"], percent(r["clean"]), *m, percent(r["mean"])) for r, m in zip(told, means, strict=True)],
            right=range(1, len(names) + 3),
        )
    for key in ("soup", "merged", "picture"):
        if values.get(key):
            print(f"{key}: {values[key]}")
