"""Accuracy and predictions of a model, with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.errors import DataError
from ..core.site import Preprocessing
from ..data import Images, decode, normalise, to_tensor
from . import ddp


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy in [0, 1], the mean over classes of their accuracies, the mean loss, and how many pictures.

    `missed` counts broken pictures, each of which counts as wrong.  `by_class` has each class's accuracy in the order
    of the head, None for a class without a picture.
    """

    accuracy: float
    class_accuracy: float
    loss: float
    pictures: int
    missed: int = 0
    by_class: tuple[float | None, ...] = ()


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 itself rather than by emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def computed_in(device: torch.device, precision: str) -> str:
    """What `precision` comes to on a device: `fp32` or `bf16`."""
    return "bf16" if precision == "bf16" or (precision == "auto" and native_bf16(device)) else "fp32"


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The precision to compute in: trainables stay in fp32 whatever it is."""
    with ExitStack() as stack:
        if computed_in(device, precision) == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(_ExactAttention())
        yield


class _ExactAttention(TorchFunctionMode):
    """Attention in fp32: on processors the backward of its bf16 kernel takes 2.5 times as long (torch 2.15)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and torch.is_autocast_enabled("cpu"):
            values, options = [_wide(a) for a in args], {k: _wide(v) for k, v in (kwargs or {}).items()}
            with torch.autocast("cpu", enabled=False):
                return func(*values, **options).to(torch.bfloat16)
        return func(*args, **(kwargs or {}))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    *,
    batch_size: int = 128,
    precision: str = "auto",
    labels: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Run a model over all pictures of a split, in eval mode.

    Args:
        labels: where the data set numbers its classes otherwise than the head: the head's number of each.
        progress: called after each batch with the number of pictures done.
    """
    if not len(images):
        raise DataError(f"{images.split.name} has no pictures to evaluate")
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    mine = range(ddp.rank(), len(images), ddp.world())
    hits = counts = torch.zeros(0, dtype=torch.float64)
    loss, missed = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    try:
        # a process whose share is empty runs a batch too: it learns the number of classes
        for start in range(0, max(len(mine), 1), batch_size):
            images.ahead(mine[start : start + 2 * batch_size])
            x, y, ok = images.batch(mine[start : start + batch_size])
            if labels is not None:
                y = torch.tensor(labels)[y]
            with autocast(device, precision):
                logits = model(normalise(x.to(device), images.preprocessing)).float().cpu()
            if len(y) and int(y.max()) >= logits.shape[1]:
                raise DataError(
                    f"{images.split.name} has class number {int(y.max())}, the head knows {logits.shape[1]}"
                )
            if not len(hits):
                hits, counts = torch.zeros(2, logits.shape[1], dtype=torch.float64)
            right = ((logits.argmax(1) == y) & ok).double()
            hits = hits.index_add(0, y, right)
            counts = counts.index_add(0, y, torch.ones_like(right))
            loss += F.cross_entropy(logits[ok], y[ok], reduction="sum").double()
            missed += (~ok).sum()
            progress(min((start + batch_size) * ddp.world(), len(images)))
    finally:
        model.train(was)
    ddp.total(hits, counts, loss, missed)
    seen = counts > 0
    return Evaluation(
        accuracy=(hits.sum() / counts.sum()).item(),
        class_accuracy=(hits[seen] / counts[seen]).mean().item(),
        loss=(loss / (counts.sum() - missed).clamp(min=1)).item(),
        pictures=int(counts.sum()),
        missed=int(missed),
        by_class=tuple((h / n).item() if n else None for h, n in zip(hits, counts, strict=True)),
    )


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one picture, best first, as (name, probability); or why it could not be read."""

    path: Path
    classes: list[tuple[str, float]]
    error: str | None = None


@torch.no_grad()
def predict(
    model: nn.Module,
    paths: Sequence[Path],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    top: int = 5,
    batch_size: int = 64,
    precision: str = "auto",
) -> Iterator[Prediction]:
    """Classify picture files through the decode path of training; a broken one yields its reason, not a guess."""
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(paths), batch_size):
        tensors: list[Tensor] = []
        errors: dict[Path, str] = {}
        for path in paths[start : start + batch_size]:
            try:
                tensors.append(to_tensor(decode(path), preprocessing))
            except DataError as error:
                errors[path] = str(error)
        rows: Iterator[Tensor] = iter(())
        if tensors:
            with autocast(device, precision):
                logits = model(normalise(torch.stack(tensors).to(device), preprocessing))
            rows = iter(logits.float().softmax(1).cpu())
        for path in paths[start : start + batch_size]:
            if path in errors:
                yield Prediction(path, [], errors[path])
                continue
            best = next(rows).topk(min(top, len(classes)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            yield Prediction(path, [(classes[i], probability) for probability, i in pairs])
