"""What `attach` puts into a model, and how each part goes in and out again.

Everything is a child module of its host, so that it follows `.to`, `deepcopy` and DDP like the rest.  Hooks are bound
methods of such children: a closure would keep following the original after a `deepcopy`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .edit import ByRows, Change, LowRank, add_thin, affine, plainly_run
from .site import Site

Piece = tuple[Site, Change]


def as_matrix(t: Tensor) -> Tensor:
    """The matrix that a change sees, as a view: a convolution as [D, 3pp], a norm's scale as a column [D, 1]."""
    return t[:, None] if t.ndim == 1 else t.flatten(1)


def current(host: Any, name: str) -> Tensor:
    """A tensor of the host under its parametrizations: the base's, or an adapter's own copy of it."""
    if parametrize.is_parametrized(host, name):
        return host.parametrizations[name].original  # type: ignore[no-any-return]
    return getattr(host, name)  # type: ignore[no-any-return]


class Weights(nn.Module):
    """The weight face: a parametrization that rewrites rows of one tensor."""

    def __init__(self, pieces: Sequence[Piece]):
        super().__init__()
        self.rows = [site.rows for site, _ in pieces]
        self.changes = nn.ModuleList(change for _, change in pieces)

    def forward(self, W: Tensor) -> Tensor:
        parts, at = [], 0
        exact = torch.promote_types(W.dtype, torch.float32)
        for i, ((a, b), change) in enumerate(zip(self.rows, self.changes, strict=True)):
            parts += [W[at:a], self._rewritten(i, change, W[a:b].to(exact)).to(W.dtype)]
            at = b
        return torch.cat([*parts, W[at:]])

    def _rewritten(self, i: int, change: Any, old: Tensor) -> Tensor:
        return change.weight(as_matrix(old)).view(old.shape)  # type: ignore[no-any-return]


class Biases(Weights):
    """The same for a bias, whose rewriting may need the matrix: `hosts` are the modules that hold it."""

    def __init__(self, pieces: Sequence[Piece], hosts: Sequence[nn.Module]):
        super().__init__(pieces)
        self.rows = [site.shift[2] for site, _ in pieces if site.shift]
        self.weights = [(host, site.param, site.rows) for (site, _), host in zip(pieces, hosts, strict=True)]

    def _rewritten(self, i: int, change: Any, old: Tensor) -> Tensor:
        host, param, (a, b) = self.weights[i]
        return change.bias(old, as_matrix(current(host, param)[a:b].to(old.dtype)))  # type: ignore[no-any-return]


class Silent(nn.Module):
    """A child that is no step of its host: an nn.Sequential, which calls its children in turn, passes through it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Inputs(Silent):
    """The activation face of a change of what a layer reads: a forward pre-hook."""

    noise: Noise | None = None

    def __init__(self, change: Change):
        super().__init__()
        self.change = change

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        new = self.change.input(x)  # type: ignore[misc]
        return (self.noise(x, new) if self.noise and self.training else new, *args[1:]), kwargs


class Outputs(Silent):
    """The activation face of changes of what one layer puts out: a forward hook.

    Low-rank changes of one layer are gathered: each distinct `down` is applied once, and neighbours that share one
    have their `up` in one product.
    """

    noise: Noise | None = None

    def __init__(self, pieces: Sequence[Piece], out: int):
        super().__init__()
        self.rows = [site.rows for site, _ in pieces]
        self.changes = nn.ModuleList(change for _, change in pieces)
        self.channels_first = pieces[0][0].kind == "conv"
        self.out = out

    def after(self, host: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x: Tensor = args[0]
        changes: list[Any] = list(self.changes)
        noise = self.noise if self.training else None
        if noise or not all(isinstance(c, LowRank) and not (c.dropout and c.training) for c in changes):
            old = y.movedim(1, -1) if self.channels_first else y
            new = self._one_by_one(host, x, old)
            new = noise(old, new) if noise else new
            return new.movedim(-1, 1) if self.channels_first else new
        rows: list[tuple[int, int]] = []
        ups: list[list[Tensor]] = []
        downs: list[Tensor] = []
        for (a, b), (up, down) in zip(self.rows, (change.factors() for change in changes), strict=True):
            if downs and downs[-1] is down and rows[-1][1] == a:
                rows[-1], ups[-1] = (rows[-1][0], b), [*ups[-1], up]
            else:
                rows, ups, downs = [*rows, (a, b)], [*ups, [up]], [*downs, down]
        merged = [up[0] if len(up) == 1 else torch.cat(up) for up in ups]
        distinct = list({id(down): down for down in downs}.values())
        down = distinct[0] if len(distinct) == 1 else torch.cat(distinct)
        starts = [0, *itertools.accumulate(len(d) for d in distinct)]
        columns = [next((starts[k], starts[k + 1]) for k, d in enumerate(distinct) if d is mine) for mine in downs]
        if self._owns(host, x, y):
            y = FrozenPlusThin.apply(x, y.detach(), host.weight, down, rows, columns, *merged)
        else:
            y = add_thin(x, y, self._spread(rows, merged, columns, starts[-1]), down)
        shifts = [(rows, c.shift) for rows, c in zip(self.rows, changes, strict=True) if c.shift is not None]
        return y + in_rows(shifts, self.out).to(y.dtype) if shifts else y

    def _one_by_one(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        changes: list[Any] = list(self.changes)
        if all(isinstance(change, ByRows) for change in changes):
            given = [change.affine() for change in changes]
            gain = in_rows([(rows, g) for rows, (g, _) in zip(self.rows, given, strict=True)], self.out, 1.0)
            shifts = [(rows, s) for rows, (_, s) in zip(self.rows, given, strict=True) if s is not None]
            return affine(y, gain, in_rows(shifts, self.out) if shifts else None)
        parts, at = [], 0
        for (a, b), change in zip(self.rows, self.changes, strict=True):
            more = ()
            if change.reads_weight:
                more = (host.weight[a:b], None if host.bias is None else host.bias[a:b])  # type: ignore[assignment]
            parts += [y[..., at:a], change.output(x, y[..., a:b], *more)]  # type: ignore[operator]
            at = b
        return parts[1] if len(parts) == 2 and at == self.out else torch.cat([*parts, y[..., at:]], -1)

    def _owns(self, host: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Whether y is a plain frozen linear layer's alone, so that its backward can be ours too."""
        return (
            type(host) is nn.Linear
            and next(iter(host._forward_hooks.values())) == self.after
            and not (host.weight.requires_grad or (host.bias is not None and host.bias.requires_grad))
            and x.dtype == y.dtype == host.weight.dtype
            and y.is_contiguous()
            and plainly_run()
        )

    def _spread(self, rows: Any, ups: list[Tensor], columns: list[tuple[int, int]], rank: int) -> Tensor:
        """All `up` in one [out, R], with zeros where a row is not rewritten or a column belongs to another site."""
        if len(ups) == 1 and ups[0].shape == (self.out, rank):
            return ups[0]
        wide = [F.pad(up, (a, rank - b)) for up, (a, b) in zip(ups, columns, strict=True)]
        return in_rows(list(zip(rows, wide, strict=True)), self.out)


def in_rows(pieces: list[tuple[tuple[int, int], Tensor]], out: int, fill: float = 0.0) -> Tensor:
    """[out, ...] with each piece in its rows, which are in rising order, and `fill` in all others."""
    if len(pieces) == 1 and pieces[0][0] == (0, out):
        return pieces[0][1]
    parts: list[Tensor] = []
    at = 0
    for (a, b), piece in pieces:
        parts += [piece.new_full((a - at, *piece.shape[1:]), fill), piece]
        at = b
    last = pieces[-1][1]
    return torch.cat([*parts, last.new_full((out - at, *last.shape[1:]), fill)])


@dataclass
class Noise:
    """Multiplicative noise on what a guest adds: z ~ N(1, sigma^2) for each picture and channel.

    Ni et al. 2024, "PACE", arXiv:2409.17137.  It draws from a source of its own, so that two noisy passes can share
    all else that is random.
    """

    sigma: float
    source: torch.Generator

    def __call__(self, old: Tensor, new: Tensor) -> Tensor:
        size = (len(old), *[1] * (old.ndim - 2), old.shape[-1])
        z = torch.randn(size, dtype=old.dtype, device=old.device, generator=self.source)
        return old + (1 + self.sigma * z) * (new - old)


class FrozenPlusThin(torch.autograd.Function):
    """`add_thin` over a frozen linear layer, adding in place both ways: y here, and the gradient of x in the backward.

    It takes over the layer's own backward, g W, because autograd would else add the two gradients of x in a pass and a
    buffer of their own.  No gradient of the size of W is formed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, y: Tensor, W: Tensor, down: Tensor, rows: list[Any], columns: list[Any], *ups: Tensor
    ) -> Tensor:
        flat, down = x.reshape(-1, x.shape[-1]), down.to(x.dtype)
        ups = tuple(up.to(x.dtype) for up in ups)
        h = flat @ down.t()
        into = y.view(-1, y.shape[-1])
        for (a, b), (c, d), up in zip(rows, columns, ups, strict=True):
            into[:, a:b].addmm_(h[:, c:d], up.t())
        ctx.mark_dirty(y)
        ctx.rows, ctx.columns = rows, columns
        ctx.save_for_backward(flat if ctx.needs_input_grad[3] else None, h, W, down, *ups)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        flat, h, W, down, *ups = ctx.saved_tensors
        g = g.reshape(-1, g.shape[-1])
        ghs: dict[tuple[int, int], Tensor] = {}
        g_ups: list[Tensor | None] = []
        for rows, column, up, needed in zip(ctx.rows, ctx.columns, ups, ctx.needs_input_grad[6:], strict=True):
            part = g[:, slice(*rows)]
            # a product with 8 columns is several times slower than its transpose with 8 rows
            gh = (up.t() @ part.t()).t() if up.shape[1] < 12 else part @ up
            ghs[column] = ghs[column] + gh if column in ghs else gh
            g_ups.append((h[:, slice(*column)].t() @ part).t() if needed else None)
        gh = torch.cat([ghs[column] for column in sorted(ghs)], 1)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (g @ W).addmm_(gh, down).view(ctx.shape)
        g_down = gh.t() @ flat if ctx.needs_input_grad[3] else None
        return gx, None, None, g_down, None, None, *g_ups


class Around(Silent):
    """A module that runs before or after its host, and may be given what was tapped earlier in the same pass."""

    noise: Noise | None = None

    def __init__(self, module: nn.Module, rows: tuple[int, int] | None = None, into: tuple[str, int] | None = None):
        super().__init__()
        self.module = module
        self.rows, self.into = rows, into
        self.kept: list[Tensor] = []
        self.taps = False

    def keep_input(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kept = [_first(args, kwargs)]

    def keep_output(self, host: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        a, b = self.rows  # type: ignore[misc]
        self.kept = [y[..., a:b]]

    def _tapped(self) -> list[Tensor]:
        kept, self.kept = self.kept, []  # not held any longer than needed
        return kept

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _first(args, kwargs)
        new = self.module(x, *self._tapped())
        if self.into is None:
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})
        word, place = self.into
        autocast = torch.is_autocast_enabled(x.device.type)
        new = new.to(torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)
        if len(args) > place:
            old = args[place]
            return (*args[:place], new if old is None else old + new, *args[place + 1 :]), kwargs
        old = kwargs.get(word)
        return args, {**kwargs, word: new if old is None else old + new}

    def after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        old = y[0] if isinstance(y, tuple) else y
        x = self._tapped()[0] if self.taps else _first(args, kwargs)
        new = self.module(x, old)
        if self.noise and self.training:
            new = self.noise(old, new)
        return (new, *y[1:]) if isinstance(y, tuple) else new


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]


class Shadows(Silent):
    """What adapters have shadowed in one host, bottom first; registered, so that it follows `.to` and `deepcopy`."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: dict[str, list[int]] = {}
        """Per name the owners above the base, bottom first; the last one's value is the one in the host."""

    def of(self, name: str, level: int) -> str:
        return f"{name}@{level}"


def _slot(host: nn.Module, name: str) -> dict[str, Any]:
    return host._parameters if name in host._parameters else host._modules


def _place(host: nn.Module, name: str, value: nn.Parameter | nn.Module, owner: int) -> None:
    """Put a value over what the host calls `name`."""
    shadows: Any = host._modules.setdefault("_deltavit_shadows", None) or Shadows()
    host._modules["_deltavit_shadows"] = shadows
    slot, stack = _slot(host, name), shadows.stacks.setdefault(name, [])
    store = shadows._parameters if isinstance(value, nn.Parameter) else shadows._modules
    store[shadows.of(name, len(stack))] = slot[name]
    stack.append(owner)
    slot[name] = value


def _withdraw(host: nn.Module, name: str, owner: int, keep: bool = False) -> None:
    """Take an owner's value away again, wherever in the stack it is; `keep` makes it the new base instead."""
    shadows: Any = host._modules["_deltavit_shadows"]
    slot, stack = _slot(host, name), shadows.stacks[name]
    store = shadows._parameters if slot is host._parameters else shadows._modules
    values = [store.pop(shadows.of(name, i)) for i in range(len(stack))] + [slot[name]]
    level = stack.index(owner)
    del stack[level], values[0 if keep else level + 1]
    slot[name] = values.pop()
    store.update({shadows.of(name, i): value for i, value in enumerate(values)})
    if not stack:
        del shadows.stacks[name]
    if not shadows.stacks:
        del host._modules["_deltavit_shadows"]


@dataclass
class Guest:
    """One guest module in one host: how it goes in, and out."""

    host: nn.Module
    key: str
    module: Inputs | Outputs | Around
    kind: str
    block: int
    """-1: outside the blocks."""
    tap: nn.Module | None = None
    handles: list[Any] = field(default_factory=list)

    def install(self) -> None:
        self.host.add_module(self.key, self.module)
        self.module.train(self.host.training)
        guest: Any = self.module
        if self.tap is not None and guest.rows is not None:
            self.handles.append(self.tap.register_forward_hook(guest.keep_output))
        elif self.tap is not None:
            self.handles.append(self.tap.register_forward_pre_hook(guest.keep_input, with_kwargs=True))
        if self.kind == "before":
            self.handles.append(self.host.register_forward_pre_hook(guest.before, with_kwargs=True))
        else:
            self.handles.append(
                self.host.register_forward_hook(guest.after, with_kwargs=isinstance(self.module, Around))
            )

    def remove(self, keep: bool = False) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        del self.host._modules[self.key]


def place_of(host: nn.Module, word: str) -> int:
    """Position of an argument of a module's forward, for a caller that gives it without its name."""
    return list(inspect.signature(host.forward).parameters).index(word)


@dataclass
class Parametrized:
    """One parametrization of one tensor."""

    host: nn.Module
    param: str
    module: Weights

    def install(self) -> None:
        self.module.train(self.host.training)
        self.host.__dict__.setdefault("_deltavit_order", list(self.host._parameters))
        _own_class(self.host)
        # unsafe: the check that it skips runs the change once for nothing, and shapes are checked by the tests
        parametrize.register_parametrization(self.host, self.param, self.module, unsafe=True)

    def remove(self, keep: bool = False) -> None:
        several: nn.ModuleList = self.host.parametrizations[self.param]  # type: ignore[index, union-attr, assignment]
        kept = [m for m in several if m is not self.module]
        _own_class(self.host)
        parametrize.remove_parametrizations(self.host, self.param, leave_parametrized=False)
        for module in kept:
            parametrize.register_parametrization(self.host, self.param, module, unsafe=True)
        if not parametrize.is_parametrized(self.host):  # torch has put the tensors back behind all others
            values = dict(self.host._parameters)
            self.host._parameters.clear()
            self.host._parameters.update({n: values[n] for n in self.host.__dict__.pop("_deltavit_order")})


def _own_class(host: nn.Module) -> None:
    """Give a parametrized module a class of its own: torch lets deep copies share one, and alters it for them all."""
    if parametrize.is_parametrized(host):
        shared = type(host)
        host.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


@dataclass
class Shadow:
    """One tensor or module put over what the host calls by a name."""

    host: nn.Module
    name: str
    value: nn.Parameter | nn.Module
    owner: int

    def install(self) -> None:
        if isinstance(self.value, nn.Module):
            self.value.train(self.host.training)
        _place(self.host, self.name, self.value, self.owner)

    def remove(self, keep: bool = False) -> None:
        _withdraw(self.host, self.name, self.owner, keep)


Part = Guest | Parametrized | Shadow
