"""`plan` and `attach`: the only file that alters a model.

Base tensors are never written, only shadowed: `detach` is exact to the bit, `merge` is the one writer.  Everything
that is put into a model is a child module of its host, so that it follows `.to`, `deepcopy` and DDP like the rest.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .edit import After, Before, Change, Edit, LowRank, Own, Rewrite, thin
from .errors import AdapterError, MethodError
from .method import Method
from .method import method as build_method
from .site import Anatomy, Site, anatomy, original

# --- plan ------------------------------------------------------------------------------------------------------------


class Plan(tuple[Edit, ...]):
    """The edits of one method on one model, and what they would cost.  Printing it shows them, a line an edit."""

    vit: Anatomy
    method: Method
    head_parameters: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the body that would train."""
        return {name: tuple(p.shape) for name, p in _names(self, self.vit).items()}

    @property
    def trainable_parameters(self) -> int:
        """Numbers that would train in the body; a factor shared between sites counts once, the head not at all."""
        return sum(p.numel() for p in _names(self, self.vit).values())

    @property
    def mergeable(self) -> bool:
        """Whether the change can be written into the base's own tensors."""
        return all(isinstance(edit, (Rewrite, Own)) for edit in self)

    @property
    def sites(self) -> list[str]:
        """Where the method acts: site names, tensor names or module paths."""
        return [e.site.name if isinstance(e, Rewrite) else e.name if isinstance(e, Own) else e.path for e in self]

    def __str__(self) -> str:
        kinds = (f"{type(e).__name__.lower():8} {site}" for e, site in zip(self, self.sites, strict=True))
        return "\n".join([f"{self.method.name} on {self.vit.name}: {self.trainable_parameters:,} parameters", *kinds])


def plan(model: nn.Module, method: Method | str, classes: int | Sequence[str] | None = None) -> Plan:
    """What a method would change in a model, without doing it and without allocating: all its tensors are on meta.

    Raises:
        ModelError: not a Vision Transformer we know.  MethodError: a method or option that does not fit it.
    """
    vit, method = anatomy(model), build_method(method)
    made = Plan(_edits(method, vit, "meta"))
    made.vit, made.method = vit, method
    made.head_parameters = 0 if classes is None else (vit.features + 1) * len(_classes(classes))
    return made


def _edits(method: Method, vit: Anatomy, device: str) -> list[Edit]:
    try:
        with torch.device(device):
            return list(method.edits(vit))
    except ValueError as error:
        raise MethodError(f"{method.name} on {vit.name}: {error}") from None


def _classes(classes: int | Sequence[str]) -> list[str]:
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    if not names:
        raise MethodError("classes must name at least one class")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise MethodError(f"two classes are called {twice!r}")
    return names


def _names(edits: Sequence[Edit], vit: Anatomy) -> dict[str, nn.Parameter]:
    """Every parameter that the edits train, by a stable name; a factor used by several sites is named by its roles."""
    users: dict[int, list[tuple[str, Site]]] = defaultdict(list)
    params: dict[int, nn.Parameter] = {}
    names: dict[str, nn.Parameter] = {}
    base = None
    for edit in edits:
        if isinstance(edit, Rewrite):
            for name, p in edit.change.named_parameters():
                params[id(p)] = p
                users[id(p)].append((name, edit.site))
        elif isinstance(edit, (Before, After)):
            names.update({f"{edit.name}.{n}": p for n, p in edit.module.named_parameters()})
        elif isinstance(edit, Own):
            base = vit.tensors() if base is None else base
            names[edit.name] = base[edit.name]
        else:
            with torch.device("meta"):
                names.update({f"{edit.name}.{n}": p for n, p in edit.build(nn.Identity()).named_parameters()})
    roles = list(dict.fromkeys(site.role for used in users.values() for _, site in used))
    for key, used in users.items():
        attr, site = used[0]
        mine = list(dict.fromkeys(s.role for _, s in used))
        full = f"{site.name}.{attr}" if len(used) == 1 else ".".join(["shared", *([] if mine == roles else mine), attr])
        if full in names:
            raise MethodError(f"two tensors are called {full!r}: give the factors different attribute names")
        names[full] = params[key]
    return names


# --- what is put into a model ----------------------------------------------------------------------------------------


class _Weights(nn.Module):
    """The weight face: a parametrization that rewrites rows of one tensor (`param` of a module, or its bias)."""

    def __init__(self, pieces: list[tuple[Site, Change]], bias: bool):
        super().__init__()
        self.rows = [site.rows for site, _ in pieces]
        self.changes = nn.ModuleList(change for _, change in pieces)
        self.of_bias = bias

    def forward(self, W: Tensor) -> Tensor:
        parts, at = [], 0
        exact = torch.promote_types(W.dtype, torch.float32)
        for (a, b), change in zip(self.rows, self.changes, strict=True):
            old = W[a:b].to(exact)
            new = change.bias(old) if self.of_bias else change.weight(old)  # type: ignore[operator]
            parts += [W[at:a], new.to(W.dtype)]
            at = b
        return torch.cat([*parts, W[at:]])


class _Outputs(nn.Module):
    """The activation face: a forward hook that applies the changes of one linear layer to what it puts out.

    Low-rank changes of one layer are gathered: each distinct `down` is applied once, and each `up` adds to its rows.
    """

    def __init__(self, pieces: list[tuple[Site, Change]], out: int):
        super().__init__()
        self.rows = [site.rows for site, _ in pieces]
        self.changes = nn.ModuleList(change for _, change in pieces)
        self.out = out

    def hook(self, host: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x: Tensor = args[0]
        changes: list[Any] = list(self.changes)
        if not all(isinstance(c, LowRank) and not (c.dropout and c.training) for c in changes):
            parts, at = [], 0
            for (a, b), change in zip(self.rows, changes, strict=True):
                parts += [y[..., at:a], change.output(x, y[..., a:b])]
                at = b
            return torch.cat([*parts, y[..., at:]], -1) if len(parts) > 2 or at < self.out else parts[1]
        factors = [change.factors() for change in changes]
        downs = list({id(down): down for _, down in factors}.values())
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        starts = [0, *itertools.accumulate(len(d) for d in downs)]
        columns = [next((starts[k], starts[k + 1]) for k, d in enumerate(downs) if d is mine) for _, mine in factors]
        ups = [up for up, _ in factors]
        if self._owns(host, x, y):
            y = _FrozenPlusThin.apply(x, y.detach(), host.weight, down, self.rows, columns, *ups)
        else:
            y = add_thin(x, y, self._spread(ups, columns, starts[-1]), down)
        shifts = [(rows, c.shift) for rows, c in zip(self.rows, changes, strict=True) if c.shift is not None]
        return y + _rows(shifts, self.out).to(y.dtype) if shifts else y

    def _owns(self, host: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Whether y is a plain frozen linear layer's alone, so that its backward can be ours too."""
        return (
            type(host) is nn.Linear
            and next(iter(host._forward_hooks.values())) == self.hook
            and not (host.weight.requires_grad or (host.bias is not None and host.bias.requires_grad))
            and x.dtype == y.dtype == host.weight.dtype
            and y.is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        )

    def _spread(self, ups: list[Tensor], columns: list[tuple[int, int]], rank: int) -> Tensor:
        """All `up` in one [out, R], with zeros where a row is not rewritten or a column belongs to another site."""
        if len(ups) == 1 and ups[0].shape == (self.out, rank):
            return ups[0]
        wide = [F.pad(up, (a, rank - b)) for up, (a, b) in zip(ups, columns, strict=True)]
        return _rows(list(zip(self.rows, wide, strict=True)), self.out)


def _rows(pieces: list[tuple[tuple[int, int], Tensor]], out: int) -> Tensor:
    """[out, ...] with each piece in its rows, which are in rising order, and zeros in all others."""
    parts: list[Tensor] = []
    at = 0
    for (a, b), piece in pieces:
        parts += [piece.new_zeros(a - at, *piece.shape[1:]), piece]
        at = b
    return torch.cat([*parts, pieces[-1][1].new_zeros(out - at, *pieces[-1][1].shape[1:])])


def add_thin(x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y + (x down^T) up^T: x [..., in], y [..., out], up [out, R], down [R, in]."""
    h = thin(x, down)
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype), up.to(y.dtype).t())
    return flat.view(y.shape)


class _FrozenPlusThin(torch.autograd.Function):
    """The same over a frozen linear layer, adding in place both ways: y here, and the gradient of x in the backward.

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


class _Around(nn.Module):
    """A module that runs before or after its host."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.module(args[0]), *args[1:])

    def after(self, host: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        return self.module(args[0], y)


class _Shadows(nn.Module):
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
    shadows: Any = host._modules.setdefault("_deltavit_shadows", None) or _Shadows()
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
class _Guest:
    """One guest module in one host: how it goes in, and out."""

    host: nn.Module
    key: str
    module: nn.Module
    handle: Any = None

    def install(self) -> None:
        self.host.add_module(self.key, self.module)
        self.module.train(self.host.training)
        if isinstance(self.module, _Outputs):
            self.handle = self.host.register_forward_hook(self.module.hook)
        elif self.key.endswith("before"):
            self.handle = self.host.register_forward_pre_hook(self.module.before)  # type: ignore[arg-type]
        else:
            self.handle = self.host.register_forward_hook(self.module.after)  # type: ignore[arg-type]

    def remove(self, keep: bool = False) -> None:
        self.handle.remove()
        del self.host._modules[self.key]


@dataclass
class _Parametrized:
    host: nn.Module
    param: str
    module: _Weights

    def install(self) -> None:
        self.module.train(self.host.training)
        # unsafe: the check that it skips runs the change once for nothing, and shapes are checked by the tests
        parametrize.register_parametrization(self.host, self.param, self.module, unsafe=True)

    def remove(self, keep: bool = False) -> None:
        several: nn.ModuleList = self.host.parametrizations[self.param]  # type: ignore[index, union-attr, assignment]
        kept = [m for m in several if m is not self.module]
        parametrize.remove_parametrizations(self.host, self.param, leave_parametrized=False)
        for module in kept:
            parametrize.register_parametrization(self.host, self.param, module, unsafe=True)


@dataclass
class _Shadow:
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


# --- attach ----------------------------------------------------------------------------------------------------------


class _Record:
    """What deltavit knows of a model that carries adapters; kept on the model, so that `deepcopy` copies it too."""

    def __init__(self, model: nn.Module):
        self.adapters: list[Adapter] = []
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.count = 0


def adapters(model: nn.Module) -> list[Adapter]:
    """The adapters that a model carries, oldest first."""
    record = model.__dict__.get("_deltavit_record")
    return list(record.adapters) if record else []


def attach(
    model: nn.Module, method: Method | str, *, classes: int | Sequence[str] | None = None, seed: int = 0
) -> Adapter:
    """Freeze a model and carry out a method's edits on it.  Afterwards `.to`, compile and DDP as usual.

    Args:
        model: a Vision Transformer whose anatomy is known; nothing of it is written.
        method: `method("lora", rank=4)`, or a name alone for its defaults.
        classes: names of the classes in order, or their number: a new head [classes, features] is made. None keeps
            the model's own head, frozen.
        seed: of every number drawn here; the global random state is left as it was.

    Raises:
        ModelError, MethodError: as `plan`.  AdapterError: a second adapter rewrites a tensor the first one owns.
    """
    vit, method = anatomy(model), build_method(method)
    names = None if classes is None else _classes(classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPU too
        edits = _edits(method, vit, "cpu")
        head = None if names is None else _head(vit, len(names))
    if not edits and head is None:
        raise MethodError(f"{method.name} trains only the head: attach it with classes=...")
    record: _Record = model.__dict__.get("_deltavit_record") or _Record(model)
    own = {e.name: nn.Parameter(vit.tensors()[e.name].detach().clone()) for e in edits if isinstance(e, Own)}
    trained = {**_names(edits, vit), **own}
    adapter = Adapter(model, vit, method, edits, trained, own, head, names, seed, record.count)
    adapter._fits()  # nothing is touched before this line
    for p, _ in record.flags:
        p.requires_grad_(False)
    adapter._install()
    model.__dict__["_deltavit_record"] = record
    record.adapters.append(adapter)
    record.count += 1
    return adapter


def _head(vit: Anatomy, classes: int) -> nn.Linear:
    head = nn.Linear(vit.features, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


class Adapter:
    """A handle on what was trained for one task: the change, the head, the class names, the preprocessing."""

    def __init__(
        self,
        model: nn.Module,
        vit: Anatomy,
        method: Method,
        edits: list[Edit],
        trained: dict[str, nn.Parameter],
        own: dict[str, nn.Parameter],
        head: nn.Linear | None,
        classes: list[str] | None,
        seed: int,
        number: int,
    ):
        self.model, self.vit, self.method, self.seed = model, vit, method, seed
        self.edits = edits
        self.head = head
        self.classes = classes
        self.preprocessing = vit.preprocessing
        self.summary: dict[str, Any] = {}
        """What training leaves for the file: accuracies, seconds, the recipe; plain JSON."""
        self.state = "attached"
        self._number = number
        self._parts: list[_Guest | _Parametrized | _Shadow] = []
        self._trained = trained
        self._build(own)

    # what it holds

    def tensors(self) -> dict[str, Tensor]:
        """Everything that trains, by stable names, however it is installed; the head as `head.weight`, `head.bias`."""
        head = {} if self.head is None else {f"head.{n}": p for n, p in self.head.named_parameters()}
        return {**self._trained, **head}

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is given: the body first, then the head."""
        return list(self.tensors().values())  # type: ignore[arg-type]

    def head_parameters(self) -> list[nn.Parameter]:
        """The head's own tensors, for a learning rate of their own."""
        return [] if self.head is None else list(self.head.parameters())

    def frozen(self) -> str:
        """SHA-256 of what was drawn from the seed and does not train (LoRA-Fix's A); a file keeps only this."""
        digest = hashlib.sha256()
        for edit in self.edits:
            module = edit.change if isinstance(edit, Rewrite) else getattr(edit, "module", None)
            for name, buffer in module.named_buffers() if module is not None else ():
                digest.update(name.encode())
                digest.update(buffer.detach().to("cpu", torch.float32).contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def mergeable(self) -> bool:
        return all(isinstance(edit, (Rewrite, Own)) for edit in self.edits)

    def pairs(self) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """Every matrix that the adapter changes, before and after: (site, W0, W1), for analysis."""
        self._must_be("attached")
        for edit in self.edits:
            if isinstance(edit, Rewrite):
                W0 = self._base(edit.site)
                exact = W0.to(torch.promote_types(W0.dtype, torch.float32))
                with torch.no_grad():
                    yield edit.site, W0, edit.change.weight(exact)
            elif isinstance(edit, Own) and self._trained[edit.name].ndim == 2:
                for linears in self.vit.linears:
                    for site in linears.values():
                        if site.tensor == edit.name:
                            a, b = site.rows
                            yield site, self._base(site), self._trained[edit.name].detach()[a:b]

    def _base(self, site: Site) -> Tensor:
        a, b = site.rows
        return original(self.model.get_submodule(site.path), site.param).detach()[a:b]

    # in and out

    def _build(self, own: dict[str, nn.Parameter]) -> None:
        device = next(iter(self.vit.tensors().values())).device
        dtype = torch.promote_types(next(iter(self.vit.tensors().values())).dtype, torch.float32)
        modules = self.model.get_submodule
        groups: dict[tuple[str, str], list[tuple[Site, Change]]] = defaultdict(list)
        for edit in self.edits:
            if isinstance(edit, Rewrite):
                edit.change.to(device, dtype)
                groups[edit.site.path, edit.site.param].append((edit.site, edit.change))
            elif isinstance(edit, (Before, After)):
                edit.module.to(device, dtype)
                kind = type(edit).__name__.lower()
                key = f"_deltavit_{self._number}_{len(self._parts)}_{kind}"
                self._parts.append(_Guest(modules(edit.path), key, _Around(edit.module)))
            elif isinstance(edit, Own):
                path, _, name = edit.name.rpartition(".")
                self._parts.append(_Shadow(modules(path), name, own[edit.name], self._number))
            else:
                path, _, name = edit.path.rpartition(".")
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(self.seed)
                    new = edit.build(modules(edit.path)).to(device, dtype)
                self._trained.update({f"{edit.name}.{n}": p for n, p in new.named_parameters()})
                self._parts.append(_Shadow(modules(path), name, new, self._number))
        for (path, param), pieces in groups.items():
            self._parts += self._rewrite(modules(path), path, param, sorted(pieces, key=lambda p: p[0].rows))
        if self.head is not None:
            path, _, name = self.vit.head.rpartition(".")
            self.head.to(device, dtype)
            self._parts.append(_Shadow(modules(path), name, self.head, self._number))

    def _rewrite(
        self, host: nn.Module, path: str, param: str, pieces: list[tuple[Site, Change]]
    ) -> list[_Guest | _Parametrized | _Shadow]:
        for (one, _), (two, _) in itertools.pairwise(pieces):
            if one.rows[1] > two.rows[0]:
                raise MethodError(f"{self.method.name} rewrites {two.name} twice")
        for site, change in pieces:
            if not site.called and getattr(change, "dropout", None):
                raise MethodError(
                    f"{self.method.name}.dropout acts on activations, but {self.vit.name} reads the weight "
                    f"of {site.name} itself: set dropout=0"
                )
            if change.moves_bias and site.bias is None:
                raise MethodError(f"{self.method.name} shifts the bias of {site.name}, but {path} has none")
        if all(site.called and change.output is not None for site, change in pieces):
            key = f"_deltavit_{self._number}_{param}"
            return [_Guest(host, key, _Outputs(pieces, getattr(host, param).shape[0]))]
        parts: list[_Guest | _Parametrized | _Shadow] = [_Parametrized(host, param, _Weights(pieces, bias=False))]
        shifted = [(site, change) for site, change in pieces if change.moves_bias]
        if shifted:
            parts.append(_Parametrized(host, shifted[0][0].bias or "", _Weights(shifted, bias=True)))
        return parts

    def _fits(self) -> None:
        for part in self._parts:
            if isinstance(part, _Parametrized) and part.param not in part.host._parameters | _parametrized(part.host):
                raise AdapterError(f"{part.param} is owned by another adapter: detach that one first")
            if isinstance(part, _Shadow) and part.name in _parametrized(part.host):
                raise AdapterError(f"{part.name} is rewritten by another adapter: detach that one first")

    def _install(self) -> None:
        for part in self._parts:
            part.install()
        self.state = "attached"

    def _remove(self, keep: bool = False) -> None:
        for part in reversed(self._parts):
            part.remove(keep and isinstance(part, _Shadow))

    def _must_be(self, *states: str) -> None:
        if self.state not in states:
            raise AdapterError(f"this adapter is {self.state}: attach it again, or load it from its file")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model is the base again, head included."""
        self._must_be("attached")
        self._remove()
        self.state = "disabled"
        try:
            yield
        finally:
            self._install()

    def detach(self) -> None:
        """Leave the model: every base tensor, flag and module is exactly what it was."""
        self._must_be("attached")
        self._remove()
        self._leave("detached")

    @torch.no_grad()
    def merge(self) -> None:
        """Write the change into the base's own tensors, once; the model then runs without deltavit, head included.

        Raises:
            MethodError: the method adds layers or tokens, so there is no weight to merge them into.
            AdapterError: another adapter is attached, whose base would change under it.
        """
        if self.state == "merged":
            return
        self._must_be("attached")
        if not self.mergeable:
            raise MethodError(
                f"{self.method.name} adds layers, so there is no weight to merge them into; "
                "use detach(), or keep it attached"
            )
        others = [a for a in adapters(self.model) if a is not self]
        if others:
            raise AdapterError(f"{len(others)} other adapter(s) attached: detach them before merging this one")
        writes: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
        for edit in self.edits:
            if isinstance(edit, Rewrite):
                site, host = edit.site, self.model.get_submodule(edit.site.path)
                writes.append((self._base(site), edit.change.weight))
                if edit.change.moves_bias and site.bias:
                    a, b = site.rows
                    writes.append((original(host, site.bias).detach()[a:b], edit.change.bias))
        self._remove(keep=True)
        for old, new in writes:
            old.copy_(new(old.to(torch.promote_types(old.dtype, torch.float32))))
        self._leave("merged")
        self.model.__dict__.pop("_deltavit_anatomy", None)  # another base now, with another fingerprint

    def _leave(self, state: str) -> None:
        self.state = state
        record: _Record = self.model.__dict__["_deltavit_record"]
        record.adapters.remove(self)
        if not record.adapters:
            for p, flag in record.flags:
                p.requires_grad_(flag)
            del self.model.__dict__["_deltavit_record"]

    # files

    def save(self, path: str | Path) -> int:
        """Write the adapter as one sealed safetensors file; its size in bytes."""
        from .file import save

        return save(self, path)

    def __repr__(self) -> str:
        body, head = sum(p.numel() for p in self._trained.values()), sum(p.numel() for p in self.head_parameters())
        return f"Adapter({self.method.name} on {self.vit.name}, {body:,} + {head:,} parameters, {self.state})"


def _parametrized(host: nn.Module) -> dict[str, Any]:
    return dict(host.parametrizations.items()) if parametrize.is_parametrized(host) else {}  # type: ignore[union-attr, operator]
