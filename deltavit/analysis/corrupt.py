"""Corrupted pictures: how much accuracy is left on pictures unlike those of training.

After Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv:1903.12261.  This is not ImageNet-C: seven of its kinds of corruption with severities of our own, applied to the
picture as the model takes it, so numbers do not compare with published ones.

Letters: B pictures, s the side of the square that the model takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import DataError, unknown
from ..data import Images
from ..data.sampler import draws
from ..train import evaluate

LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian-noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, of pixels from 0 to 1
    "shot-noise": (100, 50, 25, 12, 6),  # photons of a white pixel
    "blur": (1.0, 2.0, 3.0, 4.5, 6.0),  # standard deviation in pixels of a picture of 224
    "jpeg": (40, 25, 15, 10, 5),  # quality
    "contrast": (0.75, 0.5, 0.35, 0.25, 0.15),  # factor on the distance from the mean grey
    "brightness": (1.3, 1.6, 2.0, 2.5, 3.0),  # factor
    "pixelate": (0.6, 0.45, 0.35, 0.27, 0.2),  # side of the small picture, as a part of s
}
"""Each corruption, and what its severities 1 to 5 are."""


def chosen(names: Sequence[str], severities: Sequence[int]) -> list[tuple[str, int]]:
    """Each of these corruptions at each of these severities, rising, once.

    Raises:
        DataError: no such corruption or severity, or none at all.
    """
    for name in names:
        if name not in LEVELS:
            raise DataError(unknown("corruption", name, LEVELS))
    for severity in severities:
        if severity not in range(1, 6):
            raise DataError(f"severity {severity} is not 1, 2, 3, 4 or 5")
    if not names or not severities:
        raise DataError("no corruption or no severity to evaluate on: give at least one of each")
    return [(name, severity) for name in dict.fromkeys(names) for severity in sorted(set(severities))]


def corrupt(batch: Tensor, name: str, severity: int, *, seed: int = 0, indices: Sequence[int]) -> Tensor:
    """Corrupted variants of pictures, uint8 [B, 3, s, s] to the same shape.

    Noise of a picture follows from (seed, its index in the split) alone, the same normal draw at every severity; all
    else is not random.

    Raises:
        DataError: as `chosen`, or no torchvision to compute it.
    """
    chosen([name], [severity])
    if not len(batch):
        return batch
    level, side = LEVELS[name][severity - 1], batch.shape[-1]
    if name in ("gaussian-noise", "shot-noise"):
        return torch.stack([_noisy(x, name, level, _source(seed, i)) for x, i in zip(batch, indices, strict=True)])
    F = _torchvision()
    if name == "blur":
        sigma = level * side / 224
        reach = min(math.ceil(3 * sigma), side - 1)  # the border is mirrored, once
        return F.gaussian_blur(batch, [2 * reach + 1] * 2, [sigma] * 2)  # type: ignore[no-any-return]
    if name == "jpeg":
        return torch.stack([F.jpeg(x, int(level)) for x in batch])
    if name == "pixelate":
        small = F.resize(batch, [max(1, round(level * side))] * 2, antialias=True)
        return F.resize(small, [side, side], F.InterpolationMode.NEAREST)  # type: ignore[no-any-return]
    return {"contrast": F.adjust_contrast, "brightness": F.adjust_brightness}[name](batch, level)  # type: ignore[no-any-return]


def _noisy(x: Tensor, name: str, level: float, source: torch.Generator) -> Tensor:
    x = x.to(torch.float32) / 255
    if name == "shot-noise":
        x = torch.poisson(x * level, generator=source) / level
    else:
        x = x + level * torch.randn(x.shape, generator=source)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def _source(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(draws(seed, 0, index)[0] >> 1))


def _torchvision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision of another torch fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"torchvision cannot be imported ({reason}): `deltavit doctor` says what to do") from None
    return functional


class Corrupted(Images):
    """The pictures of a split, corrupted; what is decoded stays in the memory of the clean ones."""

    def __init__(self, clean: Images, name: str, severity: int, seed: int = 0):
        self.clean, self.name, self.severity, self.seed = clean, name, severity, seed
        self.split, self.preprocessing = clean.split, clean.preprocessing

    @property
    def broken(self) -> list[str]:
        return self.clean.broken

    def ahead(self, indices: Sequence[int]) -> None:
        self.clean.ahead(indices)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        x, y, ok = self.clean.batch(indices)
        return corrupt(x, self.name, self.severity, seed=self.seed, indices=[int(i) for i in indices]), y, ok


def robustness(
    model: nn.Module,
    images: Images,
    *,
    names: Sequence[str] = tuple(LEVELS),
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    labels: Sequence[int] | None = None,
    precision: str = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Accuracy of a model on clean and on corrupted pictures.

    Args:
        labels: as `evaluate` takes them.
        progress: called with the number of evaluations done, of 1 + len(names) * len(severities).

    Returns:
        {"clean": accuracy, "corruptions": {name: [accuracy at each severity]}, "mean": over all corrupted ones}.

    Raises:
        DataError: as `chosen`.
    """
    pairs = chosen(names, severities)

    def accuracy(shown: Images) -> float:
        return evaluate(model, shown, precision=precision, labels=labels).accuracy

    clean = accuracy(images)
    found: dict[str, list[float]] = {}
    for done, (name, severity) in enumerate(pairs, 1):
        progress(done)
        found.setdefault(name, []).append(accuracy(Corrupted(images, name, severity, seed)))
    progress(len(pairs) + 1)
    mean = sum(map(sum, found.values())) / len(pairs)
    return {"clean": clean, "corruptions": found, "mean": mean}
