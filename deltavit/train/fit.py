"""`fit`, a generator: it yields a `Step` after each optimizer step, and the caller's loop shows, prunes or stops.

Nothing random depends on what was drawn before: every number follows from (seed, step) or (seed, epoch, picture), so
a resumed run, or one on another number of processes, sees the same pictures in the same order.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attach import Adapter
from ..core.errors import DataError, Diverged, TrainingError, unknown
from ..data import Images, augment, batches, normalise
from ..store import Checkpoints, pack, unpack
from . import ddp
from .evaluate import autocast, evaluate

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Training:
    """How to train.  `batch_size` is the global batch, over all processes and accumulated parts."""

    epochs: int = 30
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    """Learning rate of the head; None: the same as the body's."""
    weight_decay: float = 1e-4
    """Of matrices; vectors (biases, norms) are not decayed."""
    momentum: float = 0.9
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises linearly; a cosine to zero follows."""
    label_smoothing: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    augment: Literal["none", "flip", "light"] = "none"
    pace: float = 0.0
    """Weight of PACE's consistency between two noisy passes (arXiv:2409.17137); 0 is off, the paper takes about 1."""
    pace_noise: float = 1.0
    """Standard deviation of that noise in the second block; it falls to 1/(L-1) of it in the last."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    val_every: int = 1
    """Epochs from one validation to the next; the last epoch always has one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "val_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup", "label_smoothing", "mixup", "momentum", "pace", "pace_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(f"train.{name} must be zero or more, got {getattr(self, name)}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise TrainingError(f"train.clip must be above zero, or none, got {self.clip}")
        if self.head_lr is not None and not 0 <= self.head_lr < math.inf:
            raise TrainingError(f"train.head_lr must be zero or more, or none, got {self.head_lr}")
        if self.warmup > 1 or self.label_smoothing >= 1:
            raise TrainingError("train.warmup is a share of all steps, and train.label_smoothing below 1")
        if not 0 <= self.seed < 2**63:
            raise TrainingError(f"train.seed must be from 0 to 2^63 - 1, got {self.seed}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise TrainingError(unknown(f"train.{name}", getattr(self, name), known))


_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Training).items() if get_origin(kind) is Literal}


@dataclass(frozen=True)
class Step:
    """One optimizer step.  `accuracy` is that on val, at the last step of an epoch that is validated and else None."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    accuracy: float | None = None
    seconds: float = 0.0


def drain(steps: Generator[S, None, R], see: Callable[[S], None] = lambda step: None) -> R:
    """Run a generator to its end, showing `see` what it yields; the value that it returns."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        see(step)


def fit(
    model: nn.Module,
    adapter: Adapter,
    train: Images,
    val: Images | None = None,
    training: Training | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    every: float = 60.0,
    meta: dict[str, Any] | None = None,
) -> Generator[Step, None, None]:
    """Train an attached adapter; the base is not written.

    Args:
        model: the model that carries the adapter (or its compiled or DDP-wrapped form), on the device to train on.
        val: evaluated at the end of each epoch; never used for anything else here.
        checkpoints: a folder to continue from, where it holds a checkpoint of this very run (base, method, pictures,
            `training`), and to save to: at the end of an epoch, after `every` seconds, and when the caller stops.
        meta: more JSON that makes a run this one; a checkpoint with another is refused.

    Yields:
        A `Step` for each optimizer step not yet done.

    Raises:
        Diverged: a loss, gradient or tensor that is not finite, of which nothing is saved.
        TrainingError: trainables of half precision; a checkpoint of another run.
        AdapterError: the adapter is not attached.  DataError: no picture, or a class that the head does not have.
    """
    training = training or Training()
    adapter._must_be("attached")
    trained: dict[str, nn.Parameter] = adapter.tensors()  # type: ignore[assignment]
    for name, p in trained.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise TrainingError(
                f"{name} is {p.dtype}, in which small steps round to nothing: load the model in float32; "
                "train.precision='bf16' still computes in bf16"
            )
    if not len(train):
        raise DataError(f"{train.split.name} has no pictures to train on")
    if adapter.classes is not None and max(train.split.labels) >= len(adapter.classes):
        raise DataError(
            f"{train.split.name} has a class number {max(train.split.labels)}, "
            f"but the head has {len(adapter.classes)} classes: attach with classes=data.classes"
        )
    ddp.same(list(trained.values()))
    optimizer = _optimizer(trained, training)
    per_epoch = math.ceil(len(train) / training.batch_size)
    steps = per_epoch * training.epochs
    device = next(iter(trained.values())).device
    identity = _identity(adapter, train, training, steps, meta) if checkpoints else {}
    done = _resume(checkpoints, trained, optimizer, identity) if checkpoints else 0
    saved, clock, began = done, time.monotonic(), time.monotonic()

    def save() -> None:
        nonlocal saved, clock
        if checkpoints is not None and saved != done and ddp.rank() == 0:
            _finite(trained, done)
            slots = list(next(iter(optimizer.state.values()), {}))
            checkpoints.save(done, pack(_state(trained, optimizer, slots)), {**identity, "slots": slots})
            saved, clock = done, time.monotonic()

    noisy = ExitStack()
    noise = noisy.enter_context(adapter.noisy(training.pace_noise)) if training.pace else None
    try:
        while done < steps:
            epoch, start = divmod(done, per_epoch)
            order = list(batches(
                training.seed, epoch, len(train), training.batch_size, start=start,
                rank=ddp.rank(), world=ddp.world(),
            ))  # fmt: skip
            for (_, mine, everyone), following in zip_longest(order, order[1:]):
                if following is not None:
                    train.ahead(following[1].tolist())
                lr = _learning_rate(optimizer, training, done, steps)
                model.train()
                loss = _step(
                    model, train, optimizer, trained, training, (done, epoch, steps), mine, everyone, device, noise
                )
                done += 1
                accuracy = None
                if done % per_epoch == 0:
                    _finite(trained, done)
                    if val is not None and ((epoch + 1) % training.val_every == 0 or done == steps):
                        accuracy = evaluate(model, val, precision=training.precision).accuracy
                yield Step(epoch, done, steps, loss, lr, accuracy, time.monotonic() - began)
                if done % per_epoch == 0 or time.monotonic() - clock > every:
                    save()  # after the caller has noted the step, so that no saved step is missing from its record
    except GeneratorExit:  # the caller stops between two steps; after an error there is nothing worth keeping
        save()
        raise
    finally:
        noisy.close()
        model.eval()


def _step(
    model: nn.Module,
    train: Images,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    training: Training,
    position: tuple[int, int, int],
    mine: Any,
    everyone: Any,
    device: torch.device,
    noise: torch.Generator | None,
) -> float:
    done, epoch, steps = position
    partner, share = _mixup(training, done, len(everyone))
    first = int((everyone == mine[0]).nonzero()[0][0]) if len(mine) else 0
    whole = torch.zeros(1, device=device)
    optimizer.zero_grad(set_to_none=True)
    for part in range(training.accumulate):
        a, b = (len(mine) * k // training.accumulate for k in (part, part + 1))
        if a == b:
            continue
        x, labels = _pictures(train, mine[a:b], training, epoch, device)
        targets = [(labels, torch.ones_like(labels, dtype=torch.float32))]
        if share < 1:
            other, others = _pictures(train, everyone[partner[first + a : first + b].numpy()], training, epoch, device)
            weight = torch.where((labels >= 0) & (others >= 0), share, 1.0)
            x = torch.lerp(other, x, weight[:, None, None, None])
            targets = [(labels, weight), (others, 1 - weight)]
        views = []
        for view in range(1 if noise is None else 2):  # dropout and stochastic depth are the same in both
            if noise is not None:
                noise.manual_seed(_draw(training.seed, done, ddp.rank(), part, view))
            with _drawing(device, _draw(training.seed, done, ddp.rank(), part)), autocast(device, training.precision):
                views.append(model(x).float())
        logits = views[0]
        losses = [share * _cross_entropy(logits, labels, training.label_smoothing) for labels, share in targets]
        loss = torch.stack(losses).sum() / len(everyone)
        if noise is not None:
            loss = loss + training.pace * (views[0] - views[1]).square().sum() / len(everyone)
        loss.backward()  # type: ignore[no-untyped-call]
        whole += loss.detach()
    ddp.sum_gradients(list(trained.values()))
    ddp.total(whole)
    value = whole.item()
    where = f"at epoch {epoch + 1}, step {done + 1} of {steps}"
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} {where}: lower train.lr (now {training.lr}), nothing of it was saved")
    norm = nn.utils.clip_grad_norm_(trained.values(), math.inf if training.clip is None else training.clip)
    if not torch.isfinite(norm):
        bad = next((n for n, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()), "?")
        raise Diverged(f"the gradient of {bad} is not finite {where}: lower train.lr (now {training.lr})")
    optimizer.step()
    return value


def _finite(trained: dict[str, nn.Parameter], done: int) -> None:
    bad = next((name for name, p in trained.items() if not p.isfinite().all()), None)
    if bad is not None:
        raise Diverged(f"{bad} is not finite after step {done}: lower train.lr; nothing of it was saved")


def _pictures(
    train: Images, indices: Any, training: Training, epoch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Augmented, normalised pictures and their labels; a broken picture that policy skips has label -1."""
    x, labels, ok = train.batch(indices)
    x = augment(x, training.augment, seed=training.seed, epoch=epoch, indices=indices)
    labels = torch.where(ok, labels, torch.full_like(labels, -1))
    return normalise(x.to(device, non_blocking=True), train.preprocessing), labels.to(device)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """[B, C], [B] -> [B]; zero where the label is -1."""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="none", label_smoothing=smoothing)


def _mixup(training: Training, done: int, size: int) -> tuple[Tensor, float]:
    """Each picture's partner in the global batch, and its own share; drawn from (seed, step) alone."""
    if not training.mixup:
        return torch.arange(size), 1.0
    generator = torch.Generator().manual_seed(_draw(training.seed, done, -1, 0))
    partner = torch.randperm(size, generator=generator)
    gamma = [torch._standard_gamma(torch.tensor(training.mixup), generator=generator).item() for _ in range(2)]
    share = gamma[0] / (sum(gamma) or 1.0)
    return partner, max(share, 1 - share)


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """What layers draw here, dropout say, follows from the seed alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def _draw(*key: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


# --- optimizer -------------------------------------------------------------------------------------------------------


def _optimizer(trained: dict[str, nn.Parameter], training: Training) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in trained.items():
        groups.setdefault((name.startswith("head."), p.ndim > 1), []).append(p)
    options = [
        {
            "params": params,
            "peak": training.head_lr if head and training.head_lr is not None else training.lr,
            "head": head,
            "weight_decay": training.weight_decay if matrix else 0.0,
        }
        for (head, matrix), params in groups.items()
    ]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=training.lr, fused=True)
    return torch.optim.SGD(options, lr=training.lr, momentum=training.momentum, fused=True)


def _learning_rate(optimizer: torch.optim.Optimizer, training: Training, done: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero.  Returns the body's, or the head's where only that trains."""
    rise = math.ceil(training.warmup * steps)
    factor = (done + 1) / rise if done < rise else 0.5 * (1 + math.cos(math.pi * (done - rise) / max(1, steps - rise)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(next((g for g in optimizer.param_groups if not g["head"]), optimizer.param_groups[0])["lr"])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _identity(
    adapter: Adapter, train: Images, training: Training, steps: int, meta: dict[str, Any] | None
) -> dict[str, Any]:
    """What makes a run this one and no other, as it comes back from JSON."""
    said = {
        "base": adapter.vit.fingerprint,
        "method": {"name": adapter.method.name, **adapter.method.options()},
        "classes": len(adapter.classes or ()),
        "seed": adapter.seed,
        "data": train.split.digest,
        "training": {k: v for k, v in asdict(training).items() if k != "val_every"},  # which changes nothing trained
        "steps": steps,
        **(meta or {}),
    }
    return json.loads(json.dumps(said))  # type: ignore[no-any-return]


def _state(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, slots: list[str]) -> dict[str, Tensor]:
    """What is trained, and what the optimizer keeps of it, by name: `blocks.0.q.up` and `blocks.0.q.up.exp_avg`."""
    state: dict[str, Tensor] = {name: p.detach() for name, p in trained.items()}
    return state | {f"{name}.{k}": optimizer.state[p][k] for name, p in trained.items() for k in slots}


def _resume(
    checkpoints: Checkpoints,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> int:
    found = checkpoints.latest()
    if found is None:
        return 0
    step, packed, was = found
    for key in identity:
        if was.get(key) != identity[key]:
            change = _differences(was.get(key), identity[key])
            raise TrainingError(
                f"the checkpoint at step {step} is of another run: {key} was {change}; "
                "choose another --out, or put the recipe back"
            )
    slots = [str(k) for k in was["slots"]]
    state = unpack(packed, [n for name in trained for n in (name, *(f"{name}.{k}" for k in slots))])
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state[name])
            optimizer.state[p] = {k: state[f"{name}.{k}"].clone().to(p.device) for k in slots}
    return step


def _differences(was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        return ", ".join(f"{k} = {was.get(k)!r}, now {now[k]!r}" for k in now if was.get(k) != now[k])
    return f"{was!r}, now {now!r}"
