"""Soups: one adapter from the average of several that were trained on one base for one task.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", arXiv:2203.05482.  Over adapters tuned on different layers: Ye et al. 2023, "Partial Fine-Tuning",
arXiv:2312.15681, of which we know the abstract, so that this is a reconstruction.
Letters: K members, W0 a tensor of the base, W_k the same tensor with member k merged into it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import __version__
from ..core.attach import Adapter, attach, plan
from ..core.edit import Edit, Own, Rewrite
from ..core.errors import DataError, FileError, MethodError
from ..core.file import ADAPTER, OPTIONS, Info, adapter_file, info, load
from ..core.guests import as_matrix
from ..core.method import Method, method, positive
from ..core.sealed import shown
from ..core.site import Anatomy, Site, Where, anatomy
from ..methods.lora import LoRA
from ..methods.tensors import Tensors, patterns
from .pairs import canvas

Kind = Literal["greedy", "uniform"]
Average = Literal["weights", "factors"]
Over = Literal["all", "tuned"]
Moved = dict[str, tuple[Tensor, Tensor]]
"""Name of each tensor of the base that an adapter acts on -> (its value after a merge, True where it can differ)."""


@dataclass(frozen=True)
class Member:
    """An adapter file that goes into a soup, and what it says of itself."""

    path: Path
    said: Info

    @property
    def label(self) -> str:
        """A short name for files, which must not tell where on a machine something lay."""
        return self.path.parent.name if self.path.name == ADAPTER else self.path.name


@dataclass(frozen=True)
class Tried:
    """One or more members together, their accuracy on val, and whether the soup is now made of them.

    `taken` is None for a member on its own, which is measured before any are put together.
    """

    members: tuple[Path, ...]
    accuracy: float
    taken: bool | None = None


@dataclass(frozen=True)
class Soup:
    """A soup, attached to the model, and how it came about.  Accuracies are those of val, None where nobody asked."""

    adapter: Adapter
    kind: Kind
    average: Average
    over: Over | None
    """None for factors: the members of such a soup act on the same tensors."""
    members: tuple[Member, ...]
    taken: tuple[Member, ...]
    accuracies: tuple[float | None, ...]
    """Of each member alone, in the form that is averaged."""
    accuracy: float | None
    """Of the soup that is attached, low-rank where that was asked."""
    rank: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    """Of low rank, for each matrix |dW - up down| / |dW|."""
    gap: float | None = None
    """Of factors, |dW of the mean factors - mean dW| / |mean dW| over all tensors; None where nothing merges."""

    def record(self) -> dict[str, Any]:
        """What there is to tell, as plain JSON; without paths, since an adapter file keeps it."""
        best = max((a for a in self.accuracies if a is not None), default=None)
        values: dict[str, Any] = {
            "kind": self.kind,
            "average": self.average,
            "over": self.over,
            "members": [
                {"name": m.label, "method": m.said.method.name, "seed": m.said.seed, "val_accuracy": a,
                 "taken": m in self.taken}
                for m, a in zip(self.members, self.accuracies, strict=True)
            ],
            "best_member_val_accuracy": best,
            "val_accuracy": self.accuracy,
        }  # fmt: skip
        if self.rank is not None:
            several = list(self.errors.values()) or [0.0]
            values["compression"] = {
                "rank": self.rank, "sites": len(self.errors), "max": max(several), "mean": sum(several) / len(several),
            }  # fmt: skip
        if self.average == "factors":
            values["gap_to_mean_of_weights"] = self.gap
        return values


# --- which adapters can be one soup ----------------------------------------------------------------------------------


def members(paths: Sequence[str | Path]) -> list[Member]:
    """Adapter files, or folders of runs, that can be averaged: of one base, with the same classes and pixels.

    Raises:
        FileError: fewer than two, one twice, a file that is no adapter, another base, other classes or another order
            of them, another preprocessing.
    """
    found = []
    for path in map(adapter_file, paths):
        found.append(Member(path, info(path)))
    if len(found) < 2:
        given = f"only {shown(found[0].path)}" if found else "none"
        raise FileError(f"a soup needs two adapters or more, given {given}")
    resolved = [m.path.resolve() for m in found]
    for member, path in zip(found, resolved, strict=True):
        if resolved.count(path) > 1:
            raise FileError(f"{shown(member.path)} is given twice")
    first, *others = found
    for member in others:
        if why := _differs(first.said, member.said):
            raise FileError(f"{shown(member.path)} and {shown(first.path)} cannot be one soup: {why}")
    if first.said.classes is None:
        raise FileError(f"{shown(first.path)} has no classes, so there is no head to average: train with classes=...")
    return found


def _differs(one: Info, other: Info) -> str:
    """Why two adapters cannot be averaged; empty where they can."""
    if one.fingerprint != other.fingerprint:
        bases = f"{other.base} ({other.fingerprint[:6]}), the other on {one.base} ({one.fingerprint[:6]})"
        return f"one was trained on {bases}"
    if one.classes != other.classes:
        a, b = one.classes or [], other.classes or []
        if set(a) == set(b):
            i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            return f"the same classes in another order; class {i} is {b[i]!r} in one and {a[i]!r} in the other"
        odd = [*sorted(set(a) ^ set(b))][:3]
        return f"one has {len(b)} classes and the other {len(a)}; not in both: {', '.join(odd)}"
    if one.preprocessing != other.preprocessing or one.options != other.options:
        return "their pictures are prepared in two ways (size, pixels or resize)"
    return ""


def _refuse(model: nn.Module, several: Sequence[Member], average: Average) -> None:
    """Members whose methods cannot be averaged in this way, before anything is loaded."""
    first, *others = several
    if average == "weights":
        for member in several:
            if not plan(model, member.said.method).mergeable:
                raise MethodError(
                    f"{shown(member.path)} is {member.said.method.name}, which adds layers, so there are no merged "
                    "weights to average; several of one method have --average factors"
                )
        return
    for member in others:
        one, two = first.said.method, member.said.method
        if one != two:
            which = f"{two.name} and {one.name}" if one.name != two.name else f"{one.name} with two sets of options"
            raise MethodError(f"factors of {which} have no mean ({shown(member.path)}): give --average weights")
        if first.said.frozen != member.said.frozen:
            raise MethodError(
                f"{shown(member.path)} has seed {member.said.seed}, {shown(first.path)} {first.said.seed}: what does "
                f"not train of {one.name} was drawn from it, so factors have no mean; give --average weights"
            )


# --- averages --------------------------------------------------------------------------------------------------------


def moved(adapter: Adapter) -> Moved:
    """Merge an adapter, and say what it has made of the base's tensors; so its model should be a copy.

    Raises:
        MethodError: the method does not merge.
    """
    adapter.merge()
    found: Moved = {}
    for name, rows in (reached for edit in adapter.edits for reached in _reaches(edit)):
        if name not in found:
            value = _kept(adapter.model.get_parameter(name))
            found[name] = value, torch.zeros_like(value, dtype=torch.bool)
        mask = found[name][1]
        (mask if rows is None else mask[slice(*rows)]).fill_(True)
    return found


def _kept(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.promote_types(t.dtype, torch.float32), copy=True)


def _reaches(edit: Edit) -> Iterable[tuple[str, tuple[int, int] | None]]:
    """Tensors that an edit can write, and which rows of them, None for all."""
    if isinstance(edit, Own):
        yield edit.name, None
    elif isinstance(edit, Rewrite):
        site = edit.site
        yield site.tensor, site.rows
        if edit.change.moves_bias and site.shift:
            path, name, rows = site.shift
            yield f"{path}.{name}", rows


def mix(several: Sequence[Moved], base: Mapping[str, Tensor], over: Over = "all") -> dict[str, Tensor]:
    """W0 + sum_k (W_k - W0) / n for each tensor that a member acts on, summed in float64.

    `over="all"`: n is K, so that a member pulls what it does not act on towards the base, and the result is the mean of
    the K models.  `over="tuned"`: n is how many members act on these rows.  The same where all act on the same rows.
    """
    mixed = {}
    for name in dict.fromkeys(name for member in several for name in member):
        W0 = base[name].double()
        total, count = torch.zeros_like(W0), torch.zeros_like(W0)
        for value, acts in (member[name] for member in several if name in member):
            total += value.double() - W0
            count += acts
        mixed[name] = (W0 + total / (len(several) if over == "all" else count.clamp(min=1))).to(base[name].dtype)
    return mixed


def mean(several: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of tensors of the same names, summed in float64: of heads and of factors."""
    total = {name: torch.stack([t[name].double() for t in several]).mean(0) for name in several[0]}
    return {name: value.to(several[0][name].dtype) for name, value in total.items()}


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of that rank, (up [o, r], down [r, i]), and |delta - up down| / |delta|.

    A rank above both sides is padded with zeros; of a zero delta the error is 0.
    """
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    up, down = delta.new_zeros(len(delta), rank), delta.new_zeros(rank, delta.shape[1])
    up[:, :kept], down[:kept] = U[:, :kept] * root, root[:, None] * V[:kept]
    return up, down, (S[kept:].norm() / S.norm()).item() if S.any() else 0.0


# --- soups -----------------------------------------------------------------------------------------------------------


def soup(
    model: nn.Module,
    several: Sequence[Member],
    score: Callable[[nn.Module], float] | None = None,
    *,
    kind: Kind = "greedy",
    average: Average = "weights",
    over: Over = "all",
    rank: int | None = None,
) -> Generator[Tried, None, Soup]:
    """Average adapters and attach the result to their base; the generator's return value is the `Soup`.

    Greedy: members in falling order of accuracy, of equal ones the first given; the best is the first soup, and each
    next one stays in if the accuracy of the soup does not fall.  Source: Wortsman et al. 2022, Recipe 1; their released
    code asks for a rise.  Every accuracy is that of the form that is averaged and kept, merged weights or factors.

    Args:
        model: the base of all members, without adapters.
        several: from `members`.
        score: accuracy on val of the model as it is when called; None for a uniform soup that nobody measures.
        rank: keep the mean of weights as LoRA of this rank on linear layers; biases, norms and the rest stay as they
            are.

    Raises:
        MethodError: methods that cannot be averaged so, options that contradict each other.
        DataError: a greedy soup without `score`.  FileError: as `load`.
    """
    if kind == "greedy" and score is None:
        raise DataError("a greedy soup chooses its members on val: give --data, or --kind uniform")
    if average == "factors" and rank is not None:
        raise MethodError("--rank is for --average weights: a mean of factors has the rank of its members")
    if rank is not None:
        try:
            positive("--rank", rank)
        except ValueError as error:
            raise MethodError(str(error)) from None
    _refuse(model, several, average)
    vit = anatomy(model)
    pot = _Pot(model, several, average, over)
    if rank is not None and not _whole(vit, pot.base):
        raise MethodError("--rank: these members change no linear layer of a block, so there is nothing to compress")
    chosen = list(range(len(several)))
    alone: list[float] = []
    trial = pot.fill(chosen)
    try:
        if score is not None:

            def taste(some: list[int]) -> float:
                pot.fill(some, trial)
                return score(model)

            for i, member in enumerate(several):
                alone.append(taste([i]))
                yield Tried((member.path,), alone[i])
            if kind == "greedy":
                chosen = yield from _greedy(several, alone, taste)
    finally:
        trial.detach()
    gap, errors = pot.gap(chosen), dict[str, float]()
    if rank is None:
        made = pot.fill(chosen)
    else:
        made, errors = pot.low_rank(chosen, rank)
    first = several[0].said
    made.preprocessing = first.preprocessing
    accuracy = None if score is None else score(model)
    result = Soup(
        made, kind, average, over if average == "weights" else None, tuple(several),
        tuple(several[i] for i in chosen), tuple(alone) or (None,) * len(several), accuracy, rank, errors,
        gap,
    )  # fmt: skip
    made.summary = {
        "val_accuracy": accuracy, "method": made.method.name, "model": vit.name, "fingerprint": vit.fingerprint,
        "trainable_parameters": made.trainable_parameters, "head_parameters": made.head_size,
        "soup": result.record(), "recipe": _recipe(first), "deltavit": __version__,
    }  # fmt: skip
    return result


def _greedy(
    several: Sequence[Member], alone: Sequence[float], taste: Callable[[list[int]], float]
) -> Generator[Tried, None, list[int]]:
    order = sorted(range(len(several)), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        accuracy = taste([*chosen, i])
        taken = accuracy >= best
        yield Tried(tuple(several[j].path for j in [*chosen, i]), accuracy, taken)
        if taken:
            chosen, best = [*chosen, i], accuracy
    return chosen


def _recipe(said: Info) -> dict[str, Any]:
    """How a member's run cut its pictures and in which precision it computed, for whoever evaluates the soup."""
    recipe = said.training.get("recipe")
    kept = {key: recipe.get(key) for key in ("data", "train")} if isinstance(recipe, dict) else {}
    data, train = (value if isinstance(value, dict) else {} for value in (kept.get("data"), kept.get("train")))
    return {"data": data, "train": {"precision": train.get("precision", "auto")}}


class _Pot:
    """What is averaged of each member, and how an adapter is made of some of them."""

    def __init__(self, model: nn.Module, several: Sequence[Member], average: Average, over: Over):
        self.model, self.average, self.over = model, average, over
        self.said = [m.said for m in several]
        self.own: list[dict[str, Tensor]] = []
        """What trains in each member, head included."""
        self.moved: list[Moved] = []
        for member in several:
            adapter = load(member.path, copy.deepcopy(model))
            self.own.append({n: t.detach().cpu().clone() for n, t in adapter.tensors().items()})
            if adapter.mergeable:
                self.moved.append(moved(adapter))
        names = {name for each in self.moved for name in each}
        self.base = {n: _kept(t) for n, t in anatomy(model).tensors().items() if n in names}

    def mixed(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        return mix([self.moved[i] for i in chosen], self.base, self.over)

    def fill(self, chosen: Sequence[int], into: Adapter | None = None, model: nn.Module | None = None) -> Adapter:
        """The soup of these members: in an adapter of its own, or in one that holds them and others."""
        first, model = self.said[0], model or self.model
        if self.average == "factors":
            into = into or attach(model, first.method, classes=first.classes, seed=first.seed)
            return _poured(into, mean([self.own[i] for i in chosen]))
        mixed = self.mixed(chosen)
        into = into or attach(model, self._holder(chosen, mixed), classes=first.classes)
        return _poured(into, {**self.base, **mixed, **self._head(chosen)})

    def low_rank(self, chosen: Sequence[int], rank: int) -> tuple[Adapter, dict[str, float]]:
        """The soup as LoRA where whole matrices are those of linear layers, and the error at each site."""
        vit, mixed = anatomy(self.model), self.mixed(chosen)
        deltas: dict[str, Tensor] = {}
        sites: list[Site] = []
        for site in _whole(vit, mixed):
            delta = as_matrix((mixed[site.tensor] - self.base[site.tensor])[slice(*site.rows)])
            if delta.any():
                sites.append(site)
                deltas[site.name] = delta
        if not sites:
            return self.fill(chosen), {}
        roles = tuple(dict.fromkeys(site.role for site in sites))
        blocks = tuple(sorted({site.block for site in sites}))
        lora = LoRA(rank=rank, where=Where(roles, None if len(blocks) == len(vit.blocks) else blocks))
        linear = {site.tensor for site in _whole(vit, mixed)}
        rest = [name for name in mixed if name not in linear]
        parts: list[Method] = [lora, _by_name(rest, vit, without=vit.linears)] if rest else [lora]
        made = attach(self.model, method(parts), classes=self.said[0].classes)
        _poured(made, {**self.base, **mixed, **self._head(chosen)})
        errors = {}
        for edit in made.edits:
            if isinstance(edit, Rewrite):
                name, change = edit.site.name, cast(Any, edit.change)
                up, down, error = truncated(deltas.get(name, torch.zeros(edit.site.shape)), rank)
                if name in deltas:
                    errors[name] = error
                with torch.no_grad():
                    change.up.copy_(up)
                    change.down.copy_(down)
        return made, errors

    def gap(self, chosen: Sequence[int]) -> float | None:
        if self.average == "weights" or not self.moved:
            return None
        wanted, got = self.mixed(chosen), moved(self.fill(chosen, model=copy.deepcopy(self.model)))
        off = sum((got[n][0] - wanted[n]).double().square().sum() for n in wanted)
        size = sum((wanted[n] - self.base[n]).double().square().sum() for n in wanted)
        return float((off / size) ** 0.5) if size else 0.0

    def _head(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        names = ("head.weight", "head.bias")
        return mean([{name: self.own[i][name] for name in names} for i in chosen])

    def _holder(self, chosen: Sequence[int], mixed: Mapping[str, Tensor]) -> Method:
        """The method whose tensors are the mean of weights: the members' own, where these are copies of tensors."""
        one, *others = (self.said[i].method for i in chosen)
        if all(other == one for other in others) and all(isinstance(e, Own) for e in plan(self.model, one)):
            return one
        return _by_name(mixed, anatomy(self.model))


def _by_name(names: Iterable[str], vit: Anatomy, without: Sequence[Mapping[str, Site]] = ()) -> Tensors:
    """The method that holds these tensors; where a file has no room for their names, all but those of some sites."""
    known = vit.tensors()
    made = Tensors(patterns(set(names), known))
    if len(json.dumps(made.options())) <= OPTIONS // 2:  # the other half is for LoRA's
        return made
    never = {site.tensor for linears in without for site in linears.values()}
    return Tensors(patterns({name for name in known if name not in never}, known))


def _whole(vit: Anatomy, tensors: Mapping[str, Tensor]) -> list[Site]:
    """The linear maps of the blocks that lie in these tensors, where together they are all of a tensor."""
    sites = [site for linears in vit.linears for site in linears.values() if site.tensor in tensors]
    rows: dict[str, int] = {}
    for site in sites:
        rows[site.tensor] = rows.get(site.tensor, 0) + site.rows[1] - site.rows[0]
    return [site for site in sites if rows[site.tensor] == len(tensors[site.tensor])]


def _poured(adapter: Adapter, values: Mapping[str, Tensor]) -> Adapter:
    """The adapter with these values in the tensors of their names."""
    with torch.no_grad():
        for name, p in adapter.tensors().items():
            if name in values:
                p.copy_(values[name])
    return adapter


# --- the picture -----------------------------------------------------------------------------------------------------


def picture(told: Mapping[str, Any]) -> Any:
    """Members and their soup: a row each, the soup on top; accuracy on val, on test and on corrupted val in %.

    A full mark went into the soup, an open one did not; dotted lines are the soup's.

    Args:
        told: what `deltavit soup --json` prints; what it has not measured is not drawn.

    Returns:
        A matplotlib Figure.

    Raises:
        DataError: nothing was measured, or matplotlib is not installed.
    """
    several = list(told["members"])
    corrupted = [row["mean"] for row in told["ood"]["rows"]] if "ood" in told else [None] * (len(several) + 1)
    series = {
        "val": [told["val_accuracy"], *(m["val_accuracy"] for m in several)],
        "test": [told.get("test_accuracy"), *(m.get("test_accuracy_of_its_run") for m in several)],
        "val, corrupted": corrupted,
    }
    if all(a is None for values in series.values() for a in values):
        raise DataError("a picture of a soup shows accuracies: give --data")
    kept = [True, *(m["taken"] for m in several)]
    names = [f"{told['kind']} soup of {sum(kept) - 1}", *(f"{m['name']} ({m['method']})" for m in several)]
    figure, ((axes,),) = canvas(7.0, 1.3 + 0.32 * len(names), 1, 1)
    for i, (what, values) in enumerate(series.items()):
        for y, (accuracy, taken) in enumerate(zip(values, kept, strict=True)):
            if accuracy is not None:
                face = f"C{i}" if taken else "none"
                axes.plot(100 * accuracy, y, color=f"C{i}", marker="o^s"[i], markerfacecolor=face, linestyle="none")
        if values[0] is not None:
            axes.axvline(100 * values[0], color=f"C{i}", linestyle=":", linewidth=1)
            axes.plot([], [], color=f"C{i}", marker="o^s"[i], linestyle=":", linewidth=1, label=what)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    over = f" over {told['over']}" if told["over"] else ""
    figure.suptitle(f"soup of {told['average']}{over}")
    return figure
