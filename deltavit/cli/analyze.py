"""`analyze`: what tuning did to a model, and which parts of it are worth tuning."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from torch import nn

from ..analysis import angle as angles_
from ..analysis import spectrum as spectra_
from ..analysis.pairs import Pair, of_adapter, of_models, png
from ..core.errors import DataError, RecipeError
from ..core.file import adapter_file, load
from ..core.sealed import write_bytes, write_json
from ..core.site import anatomy
from ..models import load_model
from ..train.recipe import Recipe, read_recipe
from ..train.run import run
from . import options as o
from .dimension import dimension
from .output import Interrupted, bar, drive, result, say, table
from .tasks import opened
from .tasks import told_of as told

analyze = typer.Typer(
    name="analyze",
    help="Look into a tuned model: intrinsic dimension, fine-tuned angles, spectra.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
analyze.command()(dimension)

WARM_UP = 2
CAREFUL = {"lr": 1e-4, "head_lr": 1e-3}
"""Of a full fine-tuning that no recipe describes; 1e-3 for the body would undo the pretraining."""


@analyze.command()
def angle(
    changes: o.Changes = None,
    adapter: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Adapter file, or the folder of a run; best of a full fine-tuning."),
    ] = None,
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Tuned .safetensors weights of --model, compared with --weights."),
    ] = None,
    data: o.Data = None,
    model: o.Model = None,
    weights: o.Weights = None,
    image_size: o.Size = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="TOML recipe of the warm-up run; its [train] goes into the recipe of --select."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the warm-up run; train.epochs=N is the written recipe's.")] = (
        WARM_UP
    ),
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Adapter file or folder of a run on the same base, whose angles are compared with these."),
    ] = None,
    select: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Write a recipe of partial fine-tuning of this many parts."),
    ] = None,
    largest: Annotated[bool, typer.Option("--largest/--smallest", help="The parts that turned most, or least.")] = True,
    per_part: Annotated[bool, typer.Option("--per-part", help="Select as many of attention, and of ffn.")] = False,
    biases: Annotated[bool, typer.Option("--biases", help="Count the biases of the maps in as well.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Measure the norms of the blocks too.")] = False,
    device: Annotated[Optional[str], typer.Option(help="Of the warm-up run: auto, cpu, cuda.")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="Folder of angles.json, angles.png, partial.toml.")] = Path("angles"),
    json: o.Json = False,
) -> None:
    """How far each part of each block turned under fine-tuning, and a recipe that trains only the chosen parts.

    The angles are those of --adapter, of --checkpoint, or of a short full fine-tuning on --data.

    deltavit analyze angle --adapter runs/flowers-full --select 6 --out angles

    deltavit analyze angle --data flowers/ --model vit_base_patch16_224.augreg_in21k --epochs 2 --select 6 --out angles
    """
    given = [name for name, v in (("adapter", adapter), ("checkpoint", checkpoint), ("data", data or recipe)) if v]
    if len(given) != 1:
        have = f", not {' and '.join(f'--{name}' for name in given)}" if given else ""
        raise RecipeError(f"give one source of angles: --adapter, --checkpoint, or --data for a warm-up run{have}")
    if changes and given != ["data"] and select is None:
        raise RecipeError(f"{changes[0]} is for a recipe: it needs --select, or --data")
    extras = {"biases": biases, "norms": norms}
    if checkpoint is not None:
        net, tuned = _checkpoints(checkpoint, model, weights, image_size)
        found, source = angles_.angles(of_models(net, tuned, **extras)), checkpoint.stem
        section = {"name": model, "weights": weights, "image_size": image_size}
        chosen = read_recipe(None, changes or [], model=section, train=CAREFUL)
    else:
        if adapter is None:
            chosen = read_recipe(
                recipe,
                [*([f"device={device}"] if device else []), *(changes or [])],
                model={"name": model, "weights": weights, "image_size": image_size},
                method={"name": "full"},
                data={"path": data},
                train={} if recipe else CAREFUL,
            )
            adapter = _warm_up(chosen, epochs, out / "warm-up")
        net, loaded, said = opened(adapter, model, weights, "cpu")
        found, source = angles_.angles(of_adapter(loaded, **extras)), f"{said.method.name} on {said.base}"
        loaded.detach()
        if given == ["adapter"]:
            beside = adapter_file(adapter).parent / "recipe.toml"
            sections = {"model": {"name": model or said.base, "weights": weights, **said.options}}
            if not beside.exists():  # the file keeps how it was trained, but not on which folder
                sections |= {"data": told(said, "data"), "train": told(said, "train") or CAREFUL}
            chosen = read_recipe(beside if beside.exists() else None, changes or [], **sections)
    values: dict[str, Any] = {"source": source, **dataclasses.asdict(found)}
    if against is not None:
        other = load(adapter_file(against), net)
        agreed = angles_.compare(found, angles_.angles(of_adapter(other, **extras)), select)
        values["against"] = [dataclasses.asdict(one) for one in agreed]
    out.mkdir(parents=True, exist_ok=True)
    if select is not None:
        layers = angles_.select(found, select, largest=largest, per_part=per_part)
        method = {"name": "partial", "layers": list(layers)}
        write_bytes(out / "partial.toml", chosen.model_copy(update={"method": method}).toml().encode())
        values |= {"selected": list(layers), "recipe": str(out / "partial.toml")}
    write_json(out / "angles.json", values)
    title = f"fine-tuned angles in degrees: {source}"
    _draw(out / "angles.png", lambda: angles_.heat_map(found, title))

    def shown() -> None:
        rows = list(angles_.rows(found))
        columns = angles_.columns_of(column for _, row in rows for column in row)
        cells = [(b, *(f"{row[c]:.3g}" if c in row else "" for c in columns)) for b, row in rows]
        table(title, ("block", *columns), cells, right=range(1, len(columns) + 1))
        print(f"all blocks as one vector: {found.whole:.3g} degrees")
        if "against" in values:
            _print_agreement(values["against"], f"against {against}")
        if "selected" in values:
            print(f"selected: {', '.join(values['selected'])}")
            print(f"train them: deltavit train --recipe {shlex.quote(values['recipe'])}")

    result({**values, "out": str(out)}, json, shown)


def _warm_up(chosen: Recipe, epochs: int, folder: Path) -> Path:
    """A short full fine-tuning that never reads the test split; a finished one is taken as it is."""
    short = chosen.model_copy(update={"train": dataclasses.replace(chosen.train, epochs=epochs)})
    try:
        drive(run(short, folder, resume=(folder / "recipe.toml").exists(), test=False, say=say), "warm-up")
    except Interrupted:
        again = shlex.join(["deltavit", *sys.argv[1:]])
        raise Interrupted(f"stopped; the same command goes on: {again}") from None
    return folder


def _print_agreement(rows: list[dict[str, Any]], title: str) -> None:
    cells = []
    for row in rows:
        shares = (f"{100 * share:.0f} %" for share in (row["largest"], row["smallest"], row["k"] / row["layers"]))
        rho = "" if row["spearman"] is None else f"{row['spearman']:.3f}"
        cells.append((row["part"], row["layers"], rho, row["k"], *shares))
    columns = ("part", "layers", "Spearman", "k", "same largest", "same smallest", "by chance")
    table(title, columns, cells, right=range(1, 7))


@analyze.command()
def spectrum(
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Adapter file, or the folder of a run; several, on one base, are compared."),
    ] = None,
    checkpoint: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Tuned .safetensors weights of --model; several are compared."),
    ] = None,
    model: o.Model = None,
    weights: o.Weights = None,
    image_size: o.Size = None,
    top: Annotated[int, typer.Option(min=1, help="Leading singular vectors whose subspaces are compared.")] = 16,
    sites: Annotated[str, typer.Option(help="Patterns of site names, with commas: 'blocks.0.*,*.q'; else all.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of spectrum.json and spectrum.png.")] = Path("spectra"),
    json: o.Json = False,
) -> None:
    """What tuning did to singular values and singular subspaces, one method beside the other.

    deltavit analyze spectrum --adapter runs/lora --adapter runs/rlrr --adapter runs/full --top 16 --out spectra
    """
    if not adapter and not checkpoint:
        raise RecipeError("give --adapter FILE, or --checkpoint FILE with --model; each may be given several times")
    patterns = tuple(part.strip() for part in sites.split(",") if part.strip())
    known: dict[str, spectra_.Factors] = {}
    methods: dict[str, dict[str, spectra_.Spectrum]] = {}
    for label, pairs, total in _sources(adapter or [], checkpoint or [], model, weights, image_size):
        own: dict[str, spectra_.Spectrum] = {}
        with bar(label, total) as shown:
            for done, (name, found) in enumerate(spectra_.spectra(pairs, top, sites=patterns, known=known), 1):
                shown.advance(done, f"{label} {name}")
                if found is not None:
                    own[name] = found
        if not own:
            raise DataError(f"{label}: none of these sites changed, so there is no spectrum of the change")
        methods[label if label not in methods else f"{label} {len(methods) + 1}"] = own
    means = {label: spectra_.summary(own) for label, own in methods.items()}
    brief = {
        label: {"sites": len(methods[label]), **{name: {"mean": mean, "sd": sd} for name, (mean, sd) in one.items()}}
        for label, one in means.items()
    }
    values = {"top": top, "methods": brief}
    every = {label: {name: spectra_.plain(s, top) for name, s in own.items()} for label, own in methods.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "spectrum.json", {**values, "sites": every})
    _draw(out / "spectrum.png", lambda: spectra_.picture(methods, top, f"spectra, mean over sites, top {top}"))

    def shown_table() -> None:
        cells: list[tuple[Any, ...]] = [("sites", *map(len, methods.values()))]
        for measure, name in spectra_.MEASURES.items():
            cells.append((name, *("{:.3g} ± {:.1g}".format(*one[measure]) for one in means.values())))
        columns = (f"top {top}", *methods)
        table("mean ± standard deviation over sites", columns, cells, right=range(1, len(columns)))

    result({**values, "out": str(out)}, json, shown_table)


def _sources(
    files: Sequence[Path], checkpoints: Sequence[Path], model: str | None, weights: str | None, image_size: int | None
) -> Iterator[tuple[str, Iterator[Pair], int]]:
    """(label, pairs, number of sites) of each file, all on one base, which is loaded once."""
    net: nn.Module | None = None
    labels: list[str] = []
    for path in files:
        if net is None:
            net, loaded, _ = opened(path, model, weights, "cpu")
        else:
            loaded = load(adapter_file(path), net)
        label = loaded.method.name
        if label in labels:
            label = f"{label} ({adapter_file(path).parent.name})"
        labels.append(label)
        yield label, of_adapter(loaded), sum(map(len, loaded.vit.linears))
        loaded.detach()
    for path in checkpoints:
        net, tuned = _checkpoints(path, model, weights, image_size, net)
        yield path.stem, of_models(net, tuned), sum(map(len, anatomy(net).linears))


def _checkpoints(
    path: Path, model: str | None, weights: str | None, image_size: int | None, net: nn.Module | None = None
) -> tuple[nn.Module, nn.Module]:
    """A base and its tuned state, where the base is not loaded already."""
    if model is None:
        raise RecipeError(f"{path} does not say which model it is of: give --model, and --weights of its base")
    net = net or load_model(model, weights, image_size=image_size)
    return net, load_model(model, path, image_size=image_size)


def _draw(path: Path, make: Callable[[], Any]) -> None:
    try:
        write_bytes(path, png(make()))
    except DataError as why:
        say(f"no {path.name}: {why}")
