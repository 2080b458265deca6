"""Local intrinsic dimension: how few numbers, along random directions, tune one module nearly as well as all of it.

Li et al. 2018, arXiv:1804.08838 (the measure); Aghajanyan et al. 2021, arXiv:2012.13255 (Fastfood, DID and SAID);
He et al. 2022, arXiv:2203.16329, Figure 3 (module by module in a Vision Transformer).
Letters: d dimension of the subspace, D numbers of a module, m its tensors.

    dimension.json  what is measured, and how; another measurement in the same folder is refused
    runs/MODULE/..  a run for each point, without its adapter
    points.json     all points so far, as the runs say
    curves.json     references, curves and dimensions, a pure function of the points

All accuracies are on val.  The test split is never read.
"""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..core.attach import plan
from ..core.errors import DataError, Diverged, FileError, MethodError, ModelError, RecipeError, TrainingError, unknown
from ..core.method import method
from ..core.sealed import shown, write_json
from ..core.site import Anatomy, Where, anatomy
from ..models import load_model
from ..models.load import skeleton
from ..store import FolderLock, claim
from ..train.fit import Step
from ..train.recipe import Recipe
from ..train.run import run
from .pairs import canvas

FORMAT = 1
PARTS = ("attention", "ffn")
Head = Literal["frozen", "trained"]
"""`frozen`: drawn from the seed, and kept.  `trained`: along with the module."""
State = Literal["reached", "at most", "not reached", "no gap", "failed"]


@dataclass(frozen=True)
class Module:
    """A set of tensors that is measured as one: linear maps with their biases."""

    name: str
    where: Where


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    dims: tuple[int, ...] = (8, 32, 128, 512, 2048)
    seeds: int = 3
    """Trainings at the best rate: with the recipe's train.seed and the numbers after it."""
    heads: tuple[Head, ...] = ("frozen", "trained")
    rates: tuple[float, ...] = (1e-3, 1e-2)
    """Learning rates of a module, all tried with the first seed; the best on val is taken, of equal ones the smaller.
    In a subspace the rate is times sqrt(D / (m d)): then a step of Adam is as long as one in the whole module."""
    head_rates: tuple[float, ...] = (1e-3,)
    """The same for the linear probe; its best is the head's rate wherever the head trains."""
    fraction: float = 0.9
    said: bool = False
    """The structure-aware form: m of the d numbers scale the tensors."""

    def __post_init__(self) -> None:
        for name in ("dims", "heads", "rates", "head_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise RecipeError(f"{name} = {list(values)}: give at least one, and none twice")
        for head in self.heads:
            if head not in get_args(Head):
                raise RecipeError(unknown("head", head, get_args(Head)))
        if min(self.dims) < 1 or self.seeds < 1:
            raise RecipeError(f"dims {min(self.dims)} and seeds {self.seeds} must be at least 1; a probe has d = 0")
        if not all(0 < rate < math.inf for rate in (*self.rates, *self.head_rates)):
            raise RecipeError(f"rates {list(self.rates)} and head_rates {list(self.head_rates)} must be above 0")
        if not 0 < self.fraction <= 1:
            raise RecipeError(f"fraction = {self.fraction} must be above 0 and at most 1")
        object.__setattr__(self, "dims", tuple(sorted(self.dims)))


class Cell(NamedTuple):
    """What is trained, whatever the rate and the seed.  `dimension`: 0 is the linear probe, None the whole module."""

    module: str
    head: Head
    dimension: int | None


@dataclass(frozen=True)
class Point:
    """One training and its accuracy on val, in [0, 1]; None where it diverged."""

    module: str
    head: Head
    dimension: int | None
    rate: float
    seed: int
    accuracy: float | None
    seconds: float
    error: str | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.module, self.head, self.dimension)


@dataclass(frozen=True)
class Tuned:
    """A cell at its best rate: an accuracy on val each seed."""

    dimension: int | None
    rate: float
    accuracies: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """None where a training diverged: the mean over the others would be of another thing."""
        return None if None in self.accuracies or not self.accuracies else statistics.fmean(self.accuracies)  # type: ignore[arg-type]

    @property
    def sd(self) -> float:
        known = [a for a in self.accuracies if a is not None]
        return statistics.stdev(known) if len(known) > 1 else 0.0


@dataclass(frozen=True)
class Crossing:
    """Where a curve first reaches a target.

    `dimension` is interpolated in log d between `lower`, which misses the target, and `upper`, which reaches it.
    "at most": the smallest d of the sweep reaches it, so `dimension` is that d and only a bound.  "not reached": no d
    does, and `lower` is the largest.  "no gap": the module is not better than the probe by more than their spread over
    seeds, so there is nothing to reach.
    """

    state: State
    target: float | None = None
    dimension: float | None = None
    lower: int | None = None
    upper: int | None = None

    def __str__(self) -> str:
        if self.state == "reached":
            return f"{self.dimension:.0f} ({self.lower}..{self.upper})"
        return f"<= {self.upper}" if self.state == "at most" else f"> {self.lower}" if self.lower else self.state


@dataclass(frozen=True)
class Curve:
    """One module under one kind of head."""

    module: str
    head: Head
    numbers: int
    whole: Tuned | None
    probe: Tuned | None
    """None where the head is frozen."""
    sweep: tuple[Tuned, ...]
    crossing: Crossing
    """Of the means over seeds."""
    by_seed: tuple[Crossing, ...]
    """Of each seed alone, against the references of that seed."""


# --- modules ---------------------------------------------------------------------------------------------------------


def module(vit: Anatomy, name: str) -> Module:
    """A module by name: `attention.5`, `ffn.0`, `ffn.-1`, or by roles: `q+k+v.3`.

    Raises:
        MethodError: a part, a role or a block that the model does not have.
    """
    part, _, number = name.rpartition(".")
    if not part or not re.fullmatch(r"-?\d+", number):
        raise MethodError(f"{name!r} is no module: name a part and a block, as in attention.5, ffn.0 or q+k+v.3")
    (block,) = vit.indices((int(number),))
    known = vit.linears[block]
    attention: list[str] = [role for role in ("q", "k", "v", "o") if role in known]
    parts: dict[str, list[str]] = {"attention": attention, "ffn": [role for role in known if role not in attention]}
    roles = parts[part] if part in parts else part.split("+")
    for role in roles:
        if role not in known:
            raise MethodError(unknown("part", role, [*PARTS, *known]))
    if not roles:
        raise MethodError(f"block {block} of {vit.name} has no {part}")
    return Module(f"{part}.{block}", Where(tuple(roles), (block,)))


def modules(vit: Anatomy, parts: Sequence[str] = PARTS, blocks: Sequence[int] | None = None) -> list[Module]:
    """These parts of these blocks, or of all; MethodError where that is nothing."""
    chosen = range(len(vit.blocks)) if blocks is None else vit.indices(tuple(blocks))
    found = [module(vit, f"{part}.{b}") for part in dict.fromkeys(parts) for b in chosen]
    if not found:
        raise MethodError(f"nothing to measure in {vit.name}: name at least one part and one block")
    return found


def sizes(vit: Anatomy, one: Module) -> tuple[int, int]:
    """(D, m): numbers and tensors of a module, biases included; the rows of a fused tensor count as tensors.

    Raises:
        MethodError: the module has some rows of a tensor and not others, which cannot be fine-tuned on their own.
    """
    found, known = vit.sites(one.where), vit.tensors()
    for name in {site.tensor for site in found}:
        rows = sum(b - a for site in found if site.tensor == name for a, b in [site.rows])
        if rows < len(known[name]):
            others = [site.role for site in vit.linears[found[0].block].values() if site.tensor == name]
            raise MethodError(f"{one.name} is a part of {name}: name all of it, {'+'.join(others)}")
    shifts = [site.shape[0] for site in found if site.shift is not None]
    return sum(math.prod(site.shape) for site in found) + sum(shifts), len(found) + len(shifts)


# --- measuring -------------------------------------------------------------------------------------------------------


def dimensions(
    recipe: Recipe,
    wanted: Sequence[Module | str],
    settings: Settings,
    out: str | Path,
    *,
    keep: bool = False,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[int, int, Step], None] = lambda done, total, step: None,
) -> Generator[Point, None, list[Curve]]:
    """Measure the dimension of modules, each on its own; yields each point as it ends, and not those of before.

    Killed, closed or interrupted at any moment, the same call goes on.

    Args:
        recipe: model, data and training; its method is not looked at, and train.lr and head_lr only as `settings` say.
        wanted: modules, or their names as `module` reads them.
        out: may hold the same measurement, and then it goes on.
        keep: also keep the adapter of each run.
        watch: called after each step, with the number of points done and of all; what it raises stops the sweep.

    Raises:
        MethodError: no module, one that the model does not have, or a d larger than it.
        ModelError: weights that are not finite.
        TrainingError: another process works here, or the folder holds another measurement.
    """
    out = Path(out)
    if not recipe.data.path:
        raise TrainingError("no data: give --data FOLDER, or data.path in the recipe")
    chosen, told = checked(recipe, wanted, settings)
    with FolderLock(out):
        said = _definition(recipe, chosen, settings)
        claim(out / "dimension.json", said, "measurement")
        work = _Work(recipe, {one.name: one for one in chosen}, told, settings, out, keep, functools.cache(say), watch)
        for cell in work.cells():
            yield from work.tuned(cell)
        return work.write()


def checked(
    recipe: Recipe, wanted: Sequence[Module | str], settings: Settings
) -> tuple[list[Module], dict[str, tuple[int, int]]]:
    """The modules, and (D, m) of each by name; refuses what cannot be measured before anything is trained."""
    model = load_model(
        recipe.model.name, recipe.model.weights, image_size=recipe.model.image_size, resize=recipe.model.resize,
        normalize=recipe.model.normalize, pixels=recipe.model.pixels,
    )  # fmt: skip
    vit = anatomy(model)
    if bad := next((name for name, t in vit.tensors().items() if not t.isfinite().all()), None):
        raise ModelError(f"{bad} of {vit.name} has numbers that are not finite: load other weights")
    chosen = list({one.name: one for one in (module(vit, w) if isinstance(w, str) else w for w in wanted)}.values())
    if not chosen:
        raise MethodError(f"nothing to measure in {vit.name}: name at least one module, such as attention.0")
    told = {one.name: sizes(vit, one) for one in chosen}
    for name, (numbers, tensors) in told.items():
        if settings.dims[-1] > numbers:
            raise MethodError(
                f"d = {settings.dims[-1]:,} is larger than {name} of {vit.name}, which has {numbers:,} numbers: "
                "lower dims"
            )
        if settings.said and settings.dims[0] <= tensors:
            raise MethodError(
                f"d = {settings.dims[0]} leaves said no direction in {name}, whose {tensors} tensors take a factor "
                "each: raise dims"
            )
    return chosen, told


class _Work:
    """The runs of one measurement."""

    def __init__(
        self,
        recipe: Recipe,
        chosen: Mapping[str, Module],
        told: Mapping[str, tuple[int, int]],
        settings: Settings,
        out: Path,
        keep: bool,
        say: Callable[[str], None],
        watch: Callable[[int, int, Step], None],
    ):
        self.recipe, self.chosen, self.told, self.settings = recipe, chosen, told, settings
        self.out, self.keep, self.say, self.watch = out, keep, say, watch
        self.seeds = [recipe.train.seed + i for i in range(settings.seeds)]
        self.points: list[Point] = []
        self.done = 0
        self.total = sum(len(self._rates(cell)) + settings.seeds - 1 for cell in self.cells())

    def cells(self) -> Iterator[Cell]:
        """In the order of the work: the probe first, whose rate the others take for their heads."""
        if "trained" in self.settings.heads:
            yield Cell("", "trained", 0)
        for head in self.settings.heads:
            for name in self.chosen:
                for dimension in (None, *self.settings.dims):
                    yield Cell(name, head, dimension)

    def tuned(self, cell: Cell) -> Generator[Point, None, None]:
        """All rates with the first seed, then the best with the others."""
        for rate in self._rates(cell):
            yield from self._point(cell, rate, self.seeds[0])
        best = best_rate(self.points, cell, self.seeds[0])
        for seed in self.seeds[1:] if best is not None else ():
            yield from self._point(cell, best, seed)  # type: ignore[arg-type]
        if cell.dimension == 0 and best is None:
            raise TrainingError("the linear probe diverged at every rate: lower head_rates")

    def _rates(self, cell: Cell) -> tuple[float, ...]:
        return self.settings.head_rates if cell.dimension == 0 else self.settings.rates

    def _point(self, cell: Cell, rate: float, seed: int) -> Generator[Point, None, None]:
        folder = self.out / "runs" / _folder(cell, rate, seed)
        point, new = _ended(folder, cell, rate, seed), False
        if point is None:
            self._train(self._recipe(cell, rate, seed), folder)
            point, new = _ended(folder, cell, rate, seed), True
        assert point is not None
        if not self.keep:
            for path in folder.glob("*.safetensors"):
                path.unlink(missing_ok=True)
        self.points.append(point)
        self.done += 1
        if new:
            self.write()
            yield point

    def _train(self, recipe: Recipe, folder: Path) -> None:
        with closing(run(recipe, folder, resume=True, test=False, curves=False, say=self.say)) as steps:
            try:
                for step in steps:
                    self.watch(self.done, self.total, step)
            except Diverged as error:
                write_json(folder / "failed.json", {"error": str(error)})

    def _recipe(self, cell: Cell, rate: float, seed: int) -> Recipe:
        """The ordinary recipe of one point."""
        how = replace(self.recipe.train, seed=seed, lr=rate, head_lr=rate, val_every=self.recipe.train.epochs)
        told: dict[str, Any] = {"name": "linear"}
        if cell.dimension != 0:
            where = asdict(self.chosen[cell.module].where)
            numbers, tensors = self.told[cell.module]
            head = 0.0 if cell.head == "frozen" else best_rate(self.points, Cell("", "trained", 0), self.seeds[0])
            how = replace(how, head_lr=head)
            told = {"name": "attention", "where": where}  # which trains whatever tensors `where` names
        if cell.dimension:
            theta = cell.dimension - (tensors if self.settings.said else 0)
            how = replace(how, lr=rate * math.sqrt(numbers / (tensors * cell.dimension)))
            told = {
                "name": "fastfood", "dimension": theta, "bias": True, "pad": True, "said": self.settings.said,
                "where": where,
            }  # fmt: skip
        # val is what accuracies are read on, so it is never trained on
        data = self.recipe.data.model_copy(update={"train_on": "train"})
        return self.recipe.model_copy(update={"method": told, "train": how, "data": data})

    def write(self) -> list[Curve]:
        found = curves(self.points, {name: numbers for name, (numbers, _) in self.told.items()}, self.settings)
        write_json(self.out / "points.json", [asdict(point) for point in self.points])
        write_json(self.out / "curves.json", [plain(curve) for curve in found])
        return found


def _folder(cell: Cell, rate: float, seed: int) -> str:
    if cell.dimension == 0:
        return f"probe/rate{rate:g}-seed{seed}"
    what = "whole" if cell.dimension is None else f"d{cell.dimension}"
    return f"{cell.module}/{cell.head}-{what}-rate{rate:g}-seed{seed}"


def _ended(folder: Path, cell: Cell, rate: float, seed: int) -> Point | None:
    """What a run came to; None where it has not ended."""
    for name in ("run.json", "failed.json"):
        path = folder / name
        if path.exists():
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
                return Point(
                    *cell, rate, seed, told.get("val_accuracy"), told.get("train_seconds", 0.0), told.get("error")
                )  # fmt: skip
            except (OSError, ValueError, AttributeError) as why:
                raise FileError(f"cannot read {shown(path)}: {why}; delete {shown(folder)} to train it again") from None
    return None


def _definition(recipe: Recipe, chosen: Sequence[Module], settings: Settings) -> dict[str, Any]:
    """What makes a measurement this one; where it runs may change."""
    told = recipe.plain()
    for section, keys in {"data": ("workers", "train_on"), "train": ("lr", "head_lr", "val_every")}.items():
        for key in keys:
            told[section].pop(key, None)
    told = {key: value for key, value in told.items() if key not in ("device", "method")}
    wheres = {one.name: asdict(one.where) for one in chosen}
    said = {"format": FORMAT, **asdict(settings), "modules": wheres, "recipe": told}
    return json.loads(json.dumps(said))  # type: ignore[no-any-return]


# --- what the points say ---------------------------------------------------------------------------------------------


def best_rate(points: Sequence[Point], cell: Cell, seed: int) -> float | None:
    """The rate of a cell that is best on val with one seed, of equal ones the smaller; None where all diverged."""
    tried = [(p.accuracy, -p.rate) for p in points if p.cell == cell and p.seed == seed and p.accuracy is not None]
    return -max(tried)[1] if tried else None


def curves(points: Sequence[Point], numbers: Mapping[str, int], settings: Settings) -> list[Curve]:
    """References, curve and dimension of each module under each head, from the points alone.

    Args:
        points: in any number; what is missing is left out, and a curve without its references has no dimension yet.
        numbers: name of each module -> D.
    """
    first = min((point.seed for point in points), default=0)

    def tuned(cell: Cell) -> Tuned | None:
        rate = best_rate(points, cell, first)
        if rate is None:
            return None
        own = sorted((p.seed, p.accuracy) for p in points if p.cell == cell and p.rate == rate)
        return Tuned(cell.dimension, rate, tuple(accuracy for _, accuracy in own))

    probe = tuned(Cell("", "trained", 0))
    found = []
    for head in settings.heads:
        for name, size in numbers.items():
            whole, below = tuned(Cell(name, head, None)), probe if head == "trained" else None
            sweep = [t for d in settings.dims if (t := tuned(Cell(name, head, d)))]
            seeds = [
                crossing(
                    {t.dimension: t.accuracies[i] for t in sweep if t.dimension and i < len(t.accuracies)},
                    None if whole is None or i >= len(whole.accuracies) else whole.accuracies[i],
                    None if below is None or i >= len(below.accuracies) else below.accuracies[i],
                    head, settings.fraction,
                )
                for i in range(settings.seeds)
            ]  # fmt: skip
            mean = crossing(
                {t.dimension: t.mean for t in sweep if t.dimension}, mean_of(whole), mean_of(below),
                head, settings.fraction, math.hypot(whole.sd, below.sd) if whole and below else 0.0,
            )  # fmt: skip
            found.append(Curve(name, head, size, whole, below, tuple(sweep), mean, tuple(seeds)))
    return found


def crossing(
    sweep: Mapping[int, float | None],
    whole: float | None,
    probe: float | None = None,
    head: Head = "frozen",
    fraction: float = 0.9,
    noise: float = 0.0,
) -> Crossing:
    """The smallest d at which a curve reaches its target.

    With a frozen head the target is `fraction` of what the whole module reaches.  With a trained one d = 0 is the
    linear probe, which is often that good already, so it is `fraction` of the way from the probe to the module.

    Args:
        sweep: d -> accuracy, None where that training diverged: such a d is passed over.
        noise: standard deviation of whole - probe.  A smaller gap is none: 90 % of chance is no dimension.
    """
    if whole is None or (head == "trained" and probe is None):
        return Crossing("failed")
    low = probe or 0.0
    if whole <= low + (noise if head == "trained" else 0.0):
        return Crossing("no gap")
    target = low + fraction * (whole - low)
    before: tuple[int, float] | None = None
    for d, accuracy in sorted(sweep.items()):
        if accuracy is None:
            continue
        if accuracy >= target:
            if before is None:
                return Crossing("at most", target, float(d), None, d)
            share = (target - before[1]) / (accuracy - before[1])
            return Crossing("reached", target, before[0] * (d / before[0]) ** share, before[0], d)
        before = d, accuracy
    return Crossing("not reached", target, None, before[0]) if before else Crossing("failed", target)


def at_an_end(found: Sequence[Curve], settings: Settings) -> list[str]:
    """What was best at the smallest or the largest of several rates: a wider list might do better, and move d.

    Returns:
        A line each, as in `attention.5 whole, frozen head, rate 0.01`.
    """
    probes = {c.probe: f"linear probe, rate {c.probe.rate:g}" for c in found if c.probe}
    lines = [line for probe, line in probes.items() if _outermost(probe.rate, settings.head_rates)]
    for c in found:
        for t in (c.whole, *c.sweep):
            if t and _outermost(t.rate, settings.rates):
                what = "whole" if t.dimension is None else f"d {t.dimension}"
                lines.append(f"{c.module} {what}, {c.head} head, rate {t.rate:g}")
    return lines


def _outermost(rate: float, rates: Sequence[float]) -> bool:
    return len(rates) > 1 and rate in (min(rates), max(rates))


def mean_of(t: Tuned | None) -> float | None:
    return None if t is None else t.mean


def plain(curve: Curve) -> dict[str, Any]:
    """A curve as JSON has it, with means and deviations."""

    def told(t: Tuned | None) -> dict[str, Any] | None:
        return None if t is None else {**asdict(t), "mean": t.mean, "sd": t.sd}

    return {
        **asdict(curve), "whole": told(curve.whole), "probe": told(curve.probe),
        "sweep": [told(t) for t in curve.sweep],
    }  # fmt: skip


# --- from the measurement to a recipe --------------------------------------------------------------------------------


def select(found: Sequence[Curve], k: int, head: Head | None = None) -> list[str]:
    """The k modules of the lowest dimension, lowest first; equal ones in the order of measuring.

    Args:
        head: whose dimensions count; None: the first that was measured.

    Raises:
        DataError: fewer modules than k reached their target, so the sweep does not say which are lowest.
    """
    if k < 1:
        raise DataError(f"--select {k}: at least one module")
    head = head or found[0].head
    known = [(c.crossing.dimension, c.module) for c in found if c.head == head and c.crossing.dimension is not None]
    if len(known) < k:
        total = sum(c.head == head for c in found)
        raise DataError(
            f"--select {k}, but {len(known)} of {total} modules reached their target with the {head} head: "
            "select fewer, or measure larger dims"
        )
    return [name for _, name in sorted(known, key=lambda pair: pair[0])[:k]]


def kronecker(recipe: Recipe, chosen: Sequence[Module]) -> Recipe:
    """The recipe with Kronecker Adaptation at the sites of these modules, and nowhere else.

    All sites that were measured: q, k, v and o of an attention, all linear maps of an MLP.  Slow weights are shared by
    the sites of one role, as that method has it.  Its options are the recipe's, where that is its method already.

    Raises:
        MethodError: a weight that the method cannot take.  DataError: no module.
    """
    if not chosen:
        raise DataError("no module to put a Kronecker Adaptation on")
    options = {k: v for k, v in recipe.method.items() if recipe.method.get("name") == "kadaptation" and k != "where"}
    blocks: dict[tuple[str, ...], list[int]] = {}
    for one in chosen:
        blocks.setdefault(one.where.roles, []).extend(one.where.blocks or ())
    tables = [
        {**options, "name": "kadaptation", "where": {"roles": list(roles), "blocks": sorted(set(own))}}
        for roles, own in sorted(blocks.items(), key=lambda pair: pair[0][0] not in "qkvo")
    ]
    made = method(tables)
    plan(skeleton(recipe.model.name, recipe.model.image_size), made)
    return recipe.model_copy(update={"method": {"name": made.name, **made.options()}})


# --- pictures --------------------------------------------------------------------------------------------------------


def curves_picture(found: Sequence[Curve], title: str = "") -> Any:
    """The Kronecker paper's Figure 3 (arXiv:2203.16329): accuracy against d, a plot each block, a row each head.

    Lines are modules with their spread over seeds; dashed is the whole module, dotted the target, gray the probe.

    Returns:
        A matplotlib Figure.
    """
    heads = list(dict.fromkeys(c.head for c in found))
    blocks = sorted({_block(c.module) for c in found})
    parts = list(dict.fromkeys(_part(c.module) for c in found))
    figure, grid = canvas(3.4 * len(blocks) + 1.8, 3.0 * len(heads) + 0.4, len(heads), len(blocks))
    for first, *others in grid:
        for axes in others:
            axes.sharey(first)
    for curve in found:
        axes = grid[heads.index(curve.head), blocks.index(_block(curve.module))]
        color = f"C{parts.index(_part(curve.module))}"
        known = [(t.dimension, 100 * t.mean, 100 * t.sd) for t in curve.sweep if t.mean is not None]
        if known:
            d, mean, sd = zip(*known, strict=True)
            axes.errorbar(d, mean, sd, color=color, marker="o", markersize=3, capsize=2, label=_part(curve.module))
        if curve.whole and curve.whole.mean is not None:
            axes.axhline(100 * curve.whole.mean, color=color, linestyle="--", linewidth=1)
        if curve.crossing.target is not None:
            axes.axhline(100 * curve.crossing.target, color=color, linestyle=":", linewidth=1)
        if curve.probe and curve.probe.mean is not None:
            axes.axhline(100 * curve.probe.mean, color="0.6", linewidth=1)
        if curve.crossing.state == "reached" and curve.crossing.target is not None:
            axes.plot(curve.crossing.dimension, 100 * curve.crossing.target, marker="*", color=color, markersize=11)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    for i, head in enumerate(heads):
        grid[i, 0].set_ylabel(f"val accuracy, %\n({head} head)")
    for j, block in enumerate(blocks):
        grid[0, j].set_title(f"block {block}")
        grid[-1, j].set_xlabel("d")
    lines = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.suptitle(title.replace("$", r"\$"))
    return figure


def layers_picture(found: Sequence[Curve], title: str = "") -> Any:
    """Dimension against block, a plot each kind of head.

    A full mark is measured, with its range over the seeds that reached their target; an open one is a bound: a triangle
    up where it was not reached within the sweep, down where the smallest d reached it.  No mark: no gap, or diverged.
    """
    heads = list(dict.fromkeys(c.head for c in found))
    parts = list(dict.fromkeys(_part(c.module) for c in found))
    figure, (row,) = canvas(4.4 * len(heads) + 1.8, 3.4, 1, len(heads))
    for axes in row[1:]:
        axes.sharey(row[0])
    for axes, head in zip(row, heads, strict=True):
        for i, part in enumerate(parts):
            own = sorted((_block(c.module), c) for c in found if (c.head, _part(c.module)) == (head, part))
            shift = 0.12 * (i - (len(parts) - 1) / 2)  # so that marks of one block stand side by side
            line = [(b + shift, c.crossing.dimension) for b, c in own if c.crossing.state == "reached"]
            axes.plot(*zip(*line, strict=True) if line else ([], []), color=f"C{i}", marker="o", label=part)
            for b, c in own:
                spread = [s.dimension for s in c.by_seed if s.dimension is not None]
                if c.crossing.state == "reached" and spread:
                    axes.plot([b + shift] * 2, [min(spread), max(spread)], color=f"C{i}", linewidth=1)
                bound, mark = {"not reached": (c.crossing.lower, "^"), "at most": (c.crossing.upper, "v")}.get(
                    c.crossing.state, (None, "")
                )
                if bound:
                    axes.plot(b + shift, bound, color=f"C{i}", marker=mark, markerfacecolor="none", linestyle="none")
        axes.set_yscale("log", base=2)
        axes.set(xlabel="block", title=f"{head} head")
        axes.set_xticks(sorted({_block(c.module) for c in found}))
        axes.grid(alpha=0.3)
    row[0].set_ylabel("d at the target")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title.replace("$", r"\$"))
    return figure


def _part(name: str) -> str:
    return name.rpartition(".")[0]


def _block(name: str) -> int:
    return int(name.rpartition(".")[2])
