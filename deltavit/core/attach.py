"""`plan` and `attach`: with `guests`, the only files that alter a model.

Base tensors are never written, only shadowed: `detach` is exact to the bit, `merge` is the one writer.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .edit import After, Before, ByRows, Chain, Edit, Own, Rewrite, Swap
from .errors import AdapterError, MethodError
from .guests import (
    Around,
    Biases,
    Guest,
    Inputs,
    Noise,
    Outputs,
    Parametrized,
    Part,
    Piece,
    Shadow,
    Weights,
    as_matrix,
    place_of,
)
from .method import Composite, Method
from .method import method as build_method
from .site import Anatomy, Site, anatomy, inside, original

# --- plan ------------------------------------------------------------------------------------------------------------


class Plan(tuple[Edit, ...]):
    """The edits of one method on one model, and what they would cost.  Printing it shows them, a line an edit."""

    vit: Anatomy
    method: Method
    head_parameters: int
    labels: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the body that would train."""
        return {name: tuple(p.shape) for name, p in _names(self, self.labels, self.vit).items()}

    @property
    def trainable_parameters(self) -> int:
        """Numbers that would train in the body; a factor shared between sites counts once, the head not at all."""
        return sum(p.numel() for p in _names(self, self.labels, self.vit).values())

    @property
    def mergeable(self) -> bool:
        """Whether the change can be written into the base's own tensors."""
        return all(isinstance(edit, (Rewrite, Own)) for edit in self)

    @property
    def mixed_batch(self) -> bool:
        """Whether each picture of a batch could have an adapter of its own: all of it acts on activations."""
        return all(
            edit.site.called and (edit.change.output is not None or edit.change.input is not None)
            if isinstance(edit, Rewrite)
            else isinstance(edit, (Before, After))
            for edit in self
        )

    @property
    def sites(self) -> list[str]:
        """Where the method acts: site names, tensor names or module paths."""
        return [e.site.name if isinstance(e, Rewrite) else e.name if isinstance(e, Own) else e.path for e in self]

    def __str__(self) -> str:
        kinds = (f"{type(e).__name__.lower():8} {site}" for e, site in zip(self, self.sites, strict=True))
        return "\n".join([f"{self.method.name} on {self.vit.name}: {self.trainable_parameters:,} parameters", *kinds])


def plan(model: nn.Module, method: Method | str | Sequence[Any], classes: int | Sequence[str] | None = None) -> Plan:
    """What a method would change in a model, without doing it and without allocating: all its tensors are on meta.

    Raises:
        ModelError: not a Vision Transformer we know.  MethodError: a method or option that does not fit it.
    """
    vit, method = anatomy(model), build_method(method)
    edits, labels = _edits(method, vit, "meta")
    made = Plan(edits)
    made.vit, made.method, made.labels = vit, method, labels
    made.head_parameters = 0 if classes is None else (vit.features + 1) * len(_classes(classes))
    return made


def _edits(method: Method, vit: Anatomy, device: str) -> tuple[list[Edit], list[str]]:
    """The edits, and for each the label of the method that it comes from: "" where there is only one method."""
    parts = method.parts if isinstance(method, Composite) else {"": method}
    edits: dict[object, tuple[Edit, str]] = {}
    for label, part in parts.items():
        try:
            with torch.device(device):
                for edit in part.edits(vit):
                    # a tensor that two methods train is one tensor; a site twice in one method is refused later
                    edits[edit if isinstance(edit, Own) else len(edits)] = edit, label
        except ValueError as error:
            raise MethodError(f"{part.name} on {vit.name}: {error}") from None
    swapped = [edit.path for edit, _ in edits.values() if isinstance(edit, Swap)]
    if twice := next((path for path in swapped if swapped.count(path) > 1), None):
        raise MethodError(f"{method.name} replaces {twice} twice")
    return [edit for edit, _ in edits.values()], [label for _, label in edits.values()]


def _classes(classes: int | Sequence[str]) -> list[str]:
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    if not names:
        raise MethodError("classes must name at least one class")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise MethodError(f"two classes are called {twice!r}")
    return names


def _names(edits: Sequence[Edit], labels: Sequence[str], vit: Anatomy) -> dict[str, nn.Parameter]:
    """Every parameter that the edits train, by a stable name; one that serves several places is named by its roles."""
    users: dict[int, list[tuple[int, str, str]]] = defaultdict(list)
    params: dict[int, nn.Parameter] = {}
    own: dict[str, nn.Parameter] = {}
    base = None

    def uses(module: nn.Module, block: int, role: str, label: str) -> None:
        for attr, p in module.named_parameters():
            params[id(p)] = p
            users[id(p)].append((block, f"{label}.{role}".lstrip("."), attr))

    for edit, label in zip(edits, labels, strict=True):
        if isinstance(edit, Rewrite):
            uses(edit.change, edit.site.block, edit.site.part or edit.site.role, label)
        elif isinstance(edit, Own):
            base = vit.tensors() if base is None else base
            own[edit.name] = base[edit.name]
        else:
            if isinstance(edit, Swap):
                with torch.device("meta"):
                    module = edit.build(nn.Identity())
            else:
                module = edit.module
            head, _, rest = edit.name.partition(".")
            number, _, role = rest.partition(".")
            inner = head == "blocks" and number.isdigit()
            uses(module, int(number) if inner else -1, role if inner else edit.name, label)

    everywhere = list(dict.fromkeys(role for used in users.values() for _, role, _ in used))
    full = {key: _name(used, everywhere) for key, used in users.items()}
    names = dict(own)
    several = {name: keys for name in full.values() if len(keys := [k for k, n in full.items() if n == name]) > 1}
    for key, name in full.items():
        if name in several and name.startswith("shared."):  # one for each width of the model
            name = f"shared.{several[name].index(key)}.{name.removeprefix('shared.')}"
        if name in names:
            raise MethodError(f"two tensors are called {name!r}: give the factors different attribute names")
        names[name] = params[key]
    return names


def _name(used: list[tuple[int, str, str]], everywhere: list[str]) -> str:
    blocks = {block for block, _, _ in used}
    roles = list(dict.fromkeys(role for _, role, _ in used))
    attr = used[0][2]
    if len(blocks) > 1:
        return ".".join(["shared", *([] if roles == everywhere else roles), attr])
    return ".".join([*(f"blocks.{b}" for b in blocks if b >= 0), *roles, attr])


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
    model: nn.Module,
    method: Method | str | Sequence[Any],
    *,
    classes: int | Sequence[str] | None = None,
    seed: int = 0,
    head: tuple[Tensor, Tensor] | None = None,
) -> Adapter:
    """Freeze a model and carry out a method's edits on it.  Afterwards `.to`, compile and DDP as usual.

    Args:
        model: a Vision Transformer whose anatomy is known; nothing of it is written.
        method: `method("lora", rank=4)`, a name alone for its defaults, or a list of these, which are composed.
        classes: names of the classes in order, or their number: a new head [classes, features] is made. None keeps
            the model's own head, frozen.
        seed: of every number drawn here; the global random state is left as it was.
        head: (weight [classes, features], bias [classes]) that the head starts from, such as text embeddings.

    Raises:
        ModelError, MethodError: as `plan`.  AdapterError: a second adapter rewrites a tensor the first one owns.
    """
    vit, method = anatomy(model), build_method(method)
    names = None if classes is None else _classes(classes)
    if head is not None and names is None:
        raise MethodError("head=... needs classes=..., which it is the head of")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPU too
        edits, labels = _edits(method, vit, "cpu")
        new_head = None if names is None else _head(vit, len(names), head)
    if not edits and new_head is None:
        raise MethodError(f"{method.name} trains only the head: attach it with classes=...")
    record: _Record = model.__dict__.get("_deltavit_record") or _Record(model)
    own = {e.name: nn.Parameter(vit.tensors()[e.name].detach().clone()) for e in edits if isinstance(e, Own)}
    trained = {**_names(edits, labels, vit), **own}
    adapter = Adapter(model, vit, method, edits, trained, own, new_head, names, seed, record.count)
    adapter._fits()  # nothing is touched before this line
    for p, _ in record.flags:
        p.requires_grad_(False)
    adapter._install()
    model.__dict__["_deltavit_record"] = record
    record.adapters.append(adapter)
    record.count += 1
    return adapter


def _head(vit: Anatomy, classes: int, start: tuple[Tensor, Tensor] | None) -> nn.Linear:
    head = nn.Linear(vit.features, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    for p, value in zip((head.weight, head.bias), start or (), strict=False):
        if value.shape != p.shape:
            shapes = f"{list(value.shape)}, {vit.name} with {classes} classes needs {list(p.shape)}"
            raise MethodError(f"head=... has a tensor of shape {shapes}")
        p.data.copy_(value)
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
        self._parts: list[Part] = []
        self._rewrites: list[Piece] = []
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

    @property
    def trainable_parameters(self) -> int:
        """Numbers that train in the body, the head apart; a factor shared between sites counts once."""
        return sum(p.numel() for p in self._trained.values())

    @property
    def head_size(self) -> int:
        """Numbers in the head."""
        return sum(p.numel() for p in self.head_parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """The head's own tensors, for a learning rate of their own."""
        return [] if self.head is None else list(self.head.parameters())

    def frozen(self) -> str:
        """SHA-256 of what was drawn from the seed and does not train (LoRA-Fix's A); a file keeps only this."""
        digest, seen = hashlib.sha256(), set()
        for edit in self.edits:
            module = edit.change if isinstance(edit, Rewrite) else getattr(edit, "module", None)
            for name, buffer in module.named_buffers() if module is not None else ():
                if id(buffer) in seen:
                    continue
                seen.add(id(buffer))
                digest.update(name.encode())
                digest.update(buffer.detach().to("cpu", torch.float32).contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def mergeable(self) -> bool:
        return all(isinstance(edit, (Rewrite, Own)) for edit in self.edits)

    def pairs(self) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """Every matrix that the adapter changes, before and after: (site, W0, W1), for analysis."""
        self._must_be("attached")
        for site, change in self._rewrites:
            W0, W = self._base(site), self._own.get(site.tensor)
            with torch.no_grad():
                yield site, W0, change.weight(_exact(W0 if W is None else as_matrix(W.detach()[slice(*site.rows)])))
        rewritten = {site.tensor for site, _ in self._rewrites}
        for name in self._own:
            for site in (s for linears in self.vit.linears for s in linears.values() if s.tensor == name):
                if name not in rewritten:
                    yield site, self._base(site), self._own[name].detach()[slice(*site.rows)]

    def _base(self, site: Site) -> Tensor:
        return as_matrix(original(self.model.get_submodule(site.path), site.param).detach()[slice(*site.rows)])

    # in and out

    def _build(self, own: dict[str, nn.Parameter]) -> None:
        self._own = own
        like = next(iter(self.vit.tensors().values()))
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        modules = self.model.get_submodule
        changes: dict[tuple[str, str], dict[tuple[int, int], list[Piece]]] = defaultdict(lambda: defaultdict(list))
        arounds: list[Guest] = []
        for edit in self.edits:
            if isinstance(edit, Rewrite):
                edit.change.to(device, dtype)
                changes[edit.site.path, edit.site.param][edit.site.rows].append((edit.site, edit.change))
            elif isinstance(edit, (Before, After)):
                edit.module.to(device, dtype)
                arounds.append(self._around(edit, len(arounds)))
            elif isinstance(edit, Own):
                path, _, name = edit.name.rpartition(".")
                self._parts.append(Shadow(modules(path), name, own[edit.name], self._number))
            else:
                path, _, name = edit.path.rpartition(".")
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(self.seed)
                    new = edit.build(modules(edit.path)).to(device, dtype)
                self._trained.update({f"{edit.name}.{n}": p for n, p in new.named_parameters()})
                self._parts.append(Shadow(modules(path), name, new, self._number))
        shifted: dict[tuple[str, str], list[tuple[Piece, nn.Module]]] = defaultdict(list)
        for (path, param), by_rows in changes.items():
            pieces = [self._chained(by_rows[rows]) for rows in sorted(by_rows)]
            self._rewrites += pieces
            self._parts += self._faces(modules(path), param, pieces, shifted)
        for (path, name), several in shifted.items():
            several.sort(key=lambda each: each[0][0].shift[2])  # type: ignore[index]
            rewriting = Biases([piece for piece, _ in several], [host for _, host in several])
            self._parts.append(Parametrized(modules(path), name, rewriting))
        self._parts += arounds  # last, so that what they tap has been rewritten
        if self.head is not None:
            path, _, name = self.vit.head.rpartition(".")
            self.head.to(device, dtype)
            self._parts.append(Shadow(modules(path), name, self.head, self._number))

    def _around(self, edit: Before | After, number: int) -> Guest:
        host, tap, rows, into = self.model.get_submodule(edit.path), None, None, None
        kind = type(edit).__name__.lower()
        if isinstance(edit.tap, Site):
            tap, rows = self.model.get_submodule(edit.tap.path), edit.tap.rows
        elif edit.tap is not None:
            tap = self.model.get_submodule(edit.tap)
        if isinstance(edit, Before) and edit.into:
            into = edit.into, place_of(host, edit.into)
        module = Around(edit.module, rows, into)
        module.taps = tap is not None
        block = next((i for i, b in enumerate(self.vit.blocks) if inside(edit.path, b)), -1)
        return Guest(host, f"_deltavit_{self._number}_{number}_{kind}", module, kind, block, tap)

    def _chained(self, pieces: list[Piece]) -> Piece:
        """One change for one site: its own, or that of several methods together."""
        (site, change), *others = pieces
        if others:
            if not isinstance(self.method, Composite):
                raise MethodError(f"{self.method.name} rewrites {site.name} twice")
            if any(c.alone for _, c in pieces):
                raise MethodError(f"{self.method.name} on {site.name}: the order of these changes is not defined")
            change = Chain([c for _, c in pieces])
        if site.kind == "norm" and not all(isinstance(c, ByRows) for _, c in pieces):
            raise MethodError(f"{self.method.name} changes matrices, and {site.name} is a norm, which has none")
        if site.tensor in self._own and any(c.input is not None and not c.rescales for _, c in pieces):
            raise MethodError(
                f"{self.method.name}: an increment is computed from the pretrained {site.name}, which trains as well"
            )
        return site, change

    def _faces(
        self,
        host: nn.Module,
        param: str,
        pieces: list[Piece],
        shifted: dict[tuple[str, str], list[tuple[Piece, nn.Module]]],
    ) -> list[Part]:
        """The one rule that picks a face: on activations where the layer runs and the change can, else on weights."""
        for (one, _), (two, _) in itertools.pairwise(pieces):
            if one.rows[1] > two.rows[0]:
                raise MethodError(f"{self.method.name} rewrites {two.name} twice")
        for site, change in pieces:
            if change.moves_bias and site.shift is None:
                raise MethodError(f"{self.method.name} shifts the bias of {site.name}, but {site.path} has none")
        key = f"_deltavit_{self._number}_{param}"
        size = sum(b - a for (a, b) in (site.rows for site, _ in pieces))
        whole = size == len(original(host, param))
        runs = all(site.called for site, _ in pieces)
        matrices = all(site.kind == "linear" for site, _ in pieces)
        if runs and matrices and whole and len({id(c) for _, c in pieces}) == 1 and pieces[0][1].input is not None:
            return [Guest(host, key, Inputs(pieces[0][1]), "before", pieces[0][0].block)]
        # a norm is rewritten by its two vectors, which costs no pass over the activations
        sees = all(
            site.kind == "linear" or (site.kind == "conv" and isinstance(change, ByRows)) for site, change in pieces
        )
        if runs and sees and all(change.output is not None for _, change in pieces):
            return [Guest(host, key, Outputs(pieces, len(original(host, param))), "after", pieces[0][0].block)]
        for site, change in pieces:
            if getattr(change, "dropout", None):
                reads = "reads its weight itself" if not site.called else "is rewritten as a weight"
                raise MethodError(
                    f"{self.method.name}.dropout acts on activations, but {site.name} of {self.vit.name} {reads}: "
                    "set dropout=0"
                )
            if change.moves_bias and site.shift is not None:
                shifted[site.shift[:2]].append(((site, change), host))
        return [Parametrized(host, param, Weights(pieces))]

    def _fits(self) -> None:
        for part in self._parts:
            if isinstance(part, Parametrized) and part.param not in part.host._parameters | _parametrized(part.host):
                raise AdapterError(f"{part.param} is owned by another adapter: detach that one first")
            if isinstance(part, Shadow) and part.name in _parametrized(part.host):
                raise AdapterError(f"{part.name} is rewritten by another adapter: detach that one first")

    def _install(self) -> None:
        for part in self._parts:
            part.install()
        self.state = "attached"

    def _remove(self, keep: bool = False) -> None:
        for part in reversed(self._parts):
            part.remove(keep and isinstance(part, Shadow))

    def _must_be(self, *states: str) -> None:
        if self.state not in states:
            raise AdapterError(f"this adapter is {self.state}: attach it again, or load it from its file")

    @contextmanager
    def noisy(self, sigma: float) -> Iterator[torch.Generator]:
        """Inside the block, what the adapter adds is noisy in training (PACE, arXiv:2409.17137).

        The first block is left alone, then sigma falls in equal steps, from `sigma` in block 1 to sigma / (L-1) in the
        last.  Yields the generator that the noise is drawn from.

        Raises:
            MethodError: part of the change is not something added to activations.
        """
        self._must_be("attached")
        parts = [p for p in self._parts if not (isinstance(p, Shadow) and p.value is self.head)]
        guests = [p for p in parts if isinstance(p, Guest) and (p.kind == "after" or isinstance(p.module, Inputs))]
        if len(guests) < len(parts) or not guests:
            raise MethodError(
                f"PACE needs a change that adds to activations, which {self.method.name} on {self.vit.name} is not"
            )
        last = len(self.vit.blocks) - 1
        source = torch.Generator(next(self.model.parameters()).device)
        for guest in guests:
            if guest.block > 0:
                guest.module.noise = Noise(sigma * (last + 1 - guest.block) / last, source)
        try:
            yield source
        finally:
            for guest in guests:
                guest.module.noise = None

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
        self._remove(keep=True)
        writes: list[tuple[Tensor, Tensor]] = []
        for site, change in self._rewrites:
            W = self._base(site)
            writes.append((W, change.weight(_exact(W))))
            if change.moves_bias and site.shift:
                path, name, rows = site.shift
                b = original(self.model.get_submodule(path), name).detach()[slice(*rows)]
                writes.append((b, change.bias(_exact(b), _exact(W))))
        for old, new in writes:
            old.copy_(new)
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
        counts = f"{self.trainable_parameters:,} + {self.head_size:,} parameters"
        return f"Adapter({self.method.name} on {self.vit.name}, {counts}, {self.state})"


def _parametrized(host: nn.Module) -> dict[str, Any]:
    return dict(host.parametrizations.items()) if parametrize.is_parametrized(host) else {}  # type: ignore[union-attr, operator]


def _exact(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
