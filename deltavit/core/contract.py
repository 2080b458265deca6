"""The contract that every method keeps on every model, as checks that anyone can run on a method of their own.

    from deltavit.core.contract import check
    check(model, MyMethod(rank=4))

Each check takes an untouched model and a method, works on a copy, and raises `Broken` with one line that says what.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attach import Adapter, attach, plan
from .edit import Change, Rewrite
from .errors import DeltavitError, MethodError
from .file import ADAPTER, load
from .method import Method
from .site import anatomy

CLASSES = 5
SHIFTS_OF_K = (".k.shift", ".ln_k.bias", ".k_norm.bias")


class Broken(AssertionError):
    """A method does not keep the contract."""


def check(
    model: nn.Module, method: Method, checks: Sequence[Callable[[nn.Module, Method], None]] | None = None
) -> list[str]:
    """Run every check, or those given; the names of those that held.

    Raises:
        Broken: the first check that does not hold, with the method and the model.
    """
    held = []
    for test in CHECKS if checks is None else checks:
        try:
            test(model, method)
        except Broken as why:
            raise Broken(
                f"{method.name or type(method).__name__} on {anatomy(model).name}: {test.__name__}: {why}"
            ) from None
        held.append(test.__name__)
    return held


def plan_tells_the_truth(model: nn.Module, method: Method) -> None:
    """`plan` names the tensors, shapes and counts that `attach` then trains."""
    model = copy.deepcopy(model)
    made = plan(model, method, CLASSES)
    adapter = attach(model, method, classes=CLASSES)
    found = {n: tuple(t.shape) for n, t in adapter.tensors().items() if not n.startswith("head.")}
    _must(made.shapes == found, f"planned {made.shapes}, attached {found}")
    training = [p for p in model.parameters() if p.requires_grad]
    _must({id(p) for p in training} == {id(p) for p in adapter.parameters()}, "others train than the adapter says")
    _must(sum(p.numel() for p in training) == made.trainable_parameters + made.head_parameters, "counts differ")


def starts_as_base(model: nn.Module, method: Method) -> None:
    """Before training the adapted model equals the base to 1e-6, where the method says so."""
    model, x = copy.deepcopy(model), pictures(model)
    before = _run(model, x)
    if not plan(model, method):
        return  # the head alone trains
    attach(model, method)
    gap = _gap(_run(model, x), before)
    _must((gap <= 1e-6) == method.starts_as_base, f"it starts {gap:.2g} away from the base")


def nothing_is_born_dead(model: nn.Module, method: Method) -> None:
    """Every tensor moves within three steps; in float64, for the start may be slow but not zero."""
    model = copy.deepcopy(model).double()
    adapter = attach(model, method, classes=CLASSES)
    born = {name: t.detach().clone() for name, t in adapter.tensors().items()}
    for _ in _train(model, adapter, steps=3, weight_decay=0.0):
        pass
    for name, t in adapter.tensors().items():
        # softmax cannot see what is added to all keys, so where that is a tensor of its own it cannot train
        if torch.equal(t, born[name]) and name not in _k_biases(model) and not name.endswith(SHIFTS_OF_K):
            raise Broken(f"{name} did not move in three steps")


def only_the_adapter_learns(model: nn.Module, method: Method) -> None:
    """Training with weight decay and momentum leaves every tensor and flag of the base as it was, to the bit."""
    model = copy.deepcopy(model)
    before, flags = _state(model), [p.requires_grad for p in model.parameters()]
    adapter = attach(model, method, classes=CLASSES)
    for _ in _train(model, adapter, steps=5, weight_decay=0.1):
        pass
    adapter.detach()
    _same_state(_state(model), before)
    _must([p.requires_grad for p in model.parameters()] == flags, "requires_grad flags are not as they were")


def detach_is_exact(model: nn.Module, method: Method) -> None:
    """After `detach` the model is the base: outputs, state, modules and hooks."""
    model, x = copy.deepcopy(model), pictures(model)
    names, hooks = [n for n, _ in model.named_modules()], _hooks(model)
    before, output = _state(model), _run(model, x)
    adapter = attach(model, method, classes=CLASSES)
    stir(adapter)
    adapter.detach()
    _same_state(_state(model), before)
    _must(torch.equal(_run(model, x), output), "outputs differ")
    _must([n for n, _ in model.named_modules()] == names and _hooks(model) == hooks, "modules or hooks stayed behind")


def disabled_is_the_base(model: nn.Module, method: Method) -> None:
    """Inside `disabled()` outputs are the base's to the bit, and afterwards the adapter's again."""
    model, x = copy.deepcopy(model), pictures(model)
    base = _run(model, x)
    adapter = attach(model, method, classes=CLASSES)
    stir(adapter)
    adapted = _run(model, x)
    with adapter.disabled():
        _must(torch.equal(_run(model, x), base), "disabled is not the base")
    _must(torch.equal(_run(model, x), adapted), "it came back different")


def merge_keeps_the_function(model: nn.Module, method: Method) -> None:
    """Merged and attached agree to 1e-5 in float32 and 1e-12 in float64, and a merge twice is a merge once."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        copied = copy.deepcopy(model).to(dtype)
        x = pictures(model).to(dtype)
        adapter = attach(copied, method, classes=CLASSES)
        stir(adapter)
        attached = _run(copied, x)
        if not adapter.mergeable:
            _refuses(adapter.merge, "it does not merge, but merge() does not refuse")
            return
        adapter.merge()
        gap = _gap(_run(copied, x), attached)
        _must(gap <= tolerance, f"merged differs from attached by {gap:.2g} in {dtype}")
        adapter.merge()
        _must(_gap(_run(copied, x), attached) == gap, "a second merge changed the weights")
        strange = [n for n, _ in copied.named_modules() if "_deltavit" in n or "parametrizations" in n]
        _must(not strange, f"left behind: {strange[:3]}")


def both_faces_agree(model: nn.Module, method: Method) -> None:
    """A face on activations equals `weight(W) x + bias(b, W)` to 1e-10 in float64, for every change that has one."""
    copied = copy.deepcopy(model).double()
    adapter = attach(copied, method, classes=CLASSES)
    stir(adapter)
    generator = torch.Generator().manual_seed(0)
    for edit in adapter.edits:
        if not isinstance(edit, Rewrite) or (edit.change.output is None and edit.change.input is None):
            continue
        change: Change = edit.change.eval()
        out, inp = edit.site.shape
        W, b, x = (torch.randn(*s, generator=generator).double() for s in ((out, inp), (out,), (2, 3, inp)))
        with torch.no_grad():
            if change.input is not None:
                one = F.linear(change.input(x), W, b)
            else:
                one = change.output(x, F.linear(x, W, b), *((W, b) if change.reads_weight else ()))  # type: ignore[misc]
            two = F.linear(x, change.weight(W), change.bias(b, W))
        _must(_gap(one, two) <= 1e-10, f"the faces differ by {_gap(one, two):.2g} at {edit.site.name}")


def saves_and_loads(model: nn.Module, method: Method) -> None:
    """A file brings back the same outputs to the bit, head and class names included, whatever the random state."""
    one, two, x = copy.deepcopy(model), copy.deepcopy(model), pictures(model)
    names = [f"class {i}" for i in range(CLASSES)]
    adapter = attach(one, method, classes=names, seed=3)
    stir(adapter)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ADAPTER
        size = adapter.save(path)
        trained = sum(t.numel() * t.element_size() for t in adapter.tensors().values())
        _must(size <= trained + 16 * 1024, f"the file has {size - trained} bytes more than what trains")
        torch.rand(7)
        back = load(path, two)
    _must(back.classes == names and back.preprocessing == adapter.preprocessing, "class names or preprocessing differ")
    _must(torch.equal(_run(one, x), _run(two, x)), "outputs differ after loading")


def a_copy_is_independent(model: nn.Module, method: Method) -> None:
    """Stirring a `deepcopy` leaves the original alone, and each one's own adapter can leave it, in turn."""
    one, x = copy.deepcopy(model), pictures(model)
    base = _run(one, x)
    adapter = attach(one, method, classes=CLASSES)
    stir(adapter)
    before = _run(one, x)
    two, other = copy.deepcopy((one, adapter))
    _must(torch.equal(_run(two, x), before), "the copy is not equal")
    stir(other, seed=1)
    _must(torch.equal(_run(one, x), before), "stirring the copy moved the original")
    _must(not torch.equal(_run(two, x), before), "stirring the copy's adapter did not move the copy")
    other.detach()
    _must(torch.equal(_run(two, x), base), "the copy's adapter did not leave it")
    _must(torch.equal(_run(one, x), before), "the copy's adapter, leaving, moved the original")
    adapter.detach()
    _must(torch.equal(_run(one, x), base), "the original's adapter did not leave after the copy's")


def pictures_do_not_meet(model: nn.Module, method: Method) -> None:
    """The output of a picture is the same alone and among others, to 1e-5."""
    model, x = copy.deepcopy(model), pictures(model, 64)
    adapter = attach(model, method, classes=CLASSES)
    stir(adapter)
    gap = _gap(_run(model, x[:1]), _run(model, x)[:1])
    _must(gap <= 1e-5, f"the first picture's output moves by {gap:.2g} with the others")


def adapters_leave_in_any_order(model: nn.Module, method: Method) -> None:
    """Of two adapters on one model, the first may leave first: the base comes back to the bit either way."""
    for order in ((0, 1), (1, 0)):
        copied, x = copy.deepcopy(model), pictures(model)
        before, output = _state(copied), _run(copied, x)
        both = [attach(copied, method, classes=CLASSES, seed=0)]
        try:
            both.append(attach(copied, method, classes=3, seed=1))
        except DeltavitError as error:
            raise Broken(f"a second adapter is not possible: {error}") from None
        for adapter in both:
            stir(adapter)
        for i in order:
            both[i].detach()
        _same_state(_state(copied), before)
        _must(torch.equal(_run(copied, x), output), f"left in order {order}, outputs differ")


def compiles_whole(model: nn.Module, method: Method) -> None:
    """`torch.compile` takes the adapted model without a graph break, and its outputs and gradients agree to 1e-4."""
    model, x = copy.deepcopy(model), pictures(model)
    adapter = attach(model, method, classes=CLASSES)
    stir(adapter)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in (model, compiled):
        for p in adapter.parameters():
            p.grad = None
        y = function(x)
        torch.autograd.backward(y.square().mean())
        results.append((y.detach(), [p.grad.clone() for p in adapter.parameters() if p.grad is not None]))
    (y1, g1), (y2, g2) = results
    _must(_gap(y1, y2) <= 1e-4 and len(g1) == len(g2), "compiled outputs differ")
    _must(all(_gap(a, b) <= 1e-4 for a, b in zip(g1, g2, strict=True)), "compiled gradients differ")


CHECKS: tuple[Callable[[nn.Module, Method], None], ...] = (
    plan_tells_the_truth,
    starts_as_base,
    nothing_is_born_dead,
    only_the_adapter_learns,
    detach_is_exact,
    disabled_is_the_base,
    merge_keeps_the_function,
    both_faces_agree,
    pictures_do_not_meet,
    a_copy_is_independent,
    saves_and_loads,
    adapters_leave_in_any_order,
    compiles_whole,
)


# --- what the checks share -------------------------------------------------------------------------------------------


def pictures(model: nn.Module, count: int = 2) -> Tensor:
    """The same random pictures every time, of the size that the model takes: [count, 3, size, size]."""
    size = anatomy(model).preprocessing.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stir(adapter: Adapter, seed: int = 0) -> None:
    """Move every trainable tensor: a zero-initialised head or factor would hide every difference."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))


def _train(model: nn.Module, adapter: Adapter, steps: int, weight_decay: float) -> Iterator[None]:
    generator = torch.Generator().manual_seed(1)
    x, y = pictures(model, 4).to(adapter.parameters()[0].dtype), torch.arange(4) % CLASSES
    with torch.no_grad():  # a zero head would give the body no gradient in the first step
        for p in adapter.head_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield
    model.eval()


@torch.no_grad()  # one grad mode for all: nn.MultiheadAttention uses another kernel in each
def _run(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)  # type: ignore[no-any-return]


def _k_biases(model: nn.Module) -> set[str]:
    sites = [linears["k"] for linears in anatomy(model).linears if "k" in linears]
    whole = [s for s in sites if s.shift and model.get_submodule(s.path).get_parameter(s.param).shape[0] == s.shape[0]]
    return {s.bias_tensor for s in whole if s.bias_tensor}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _same_state(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    _must(list(now) == list(before), f"the state has other keys: {sorted(set(now) ^ set(before))[:3]}")
    moved = [name for name in before if not torch.equal(now[name], before[name])]
    _must(not moved, f"tensors of the base moved: {moved[:3]}")


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def _refuses(call: Callable[[], object], otherwise: str) -> None:
    try:
        call()
    except MethodError:
        return
    raise Broken(otherwise)
