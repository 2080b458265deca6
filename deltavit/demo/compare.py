"""Six methods on one frozen backbone: handwritten digits, three seeds, one table and one picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.attach import attach
from ..core.method import method
from ..core.site import anatomy
from ..data import Images, open_data
from ..data.digits import TRAIN, write_digits
from ..models import load_model
from ..train import Training, evaluate, fit

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"lr": 5e-2},
    "bitfit": {"lr": 2e-2},
    "lora": {"lr": 1e-2, "options": {"rank": 8}},
    "kadaptation": {"lr": 5e-2, "options": {"n": 4, "rank": 1}},
    "fact-tt": {"lr": 2e-2, "options": {"rank": 8}},
    "full": {"lr": 5e-4},
}
"""What is compared, with the rates that `deltavit demo --search --epochs 15` chooses on the val split with seed 0."""

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
EPOCHS, BATCH, SEEDS = 12, 32, 3
HEAD_RATE = 1e-2


@dataclasses.dataclass(frozen=True)
class Row:
    """One method over all seeds; accuracies of the test split, in [0, 1]."""

    method: str
    trainable_parameters: int
    head_parameters: int
    accuracies: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


class Bench:
    """The backbone and the digits in `folder`, opened once."""

    def __init__(self, folder: Path, epochs: int):
        self.data, self.model, self.epochs = open_data(folder), load_model("vit_pico"), epochs
        pre = anatomy(self.model).preprocessing
        self.train, self.val = Images(self.data.train, pre), Images(self.data.val, pre)
        self.test = self.val if self.data.test is None else Images(self.data.test, pre)

    def run(self, name: str, lr: float, seed: int, on: Images) -> tuple[float, int, int]:
        """Train one method, then read `on` once: accuracy, parameters of the body, of the head."""
        chosen = method(name, **METHODS[name].get("options", {}))
        adapter = attach(self.model, chosen, classes=self.data.classes, seed=seed)
        head_rate = lr if name == "linear" else HEAD_RATE
        training = Training(epochs=self.epochs, batch_size=BATCH, lr=lr, head_lr=head_rate, seed=seed)
        for _ in fit(self.model, adapter, self.train, None, training):
            pass
        accuracy = evaluate(self.model, on).accuracy
        adapter.detach()
        return accuracy, adapter.trainable_parameters, adapter.head_size


def compare(folder: Path, seeds: int = SEEDS, epochs: int = EPOCHS) -> Iterator[Row]:
    """Train every method of `METHODS` with every seed on the digits in `folder`; the test split is read once a run."""
    bench = Bench(folder, epochs)
    for name, chosen in METHODS.items():
        began = time.monotonic()
        runs = [bench.run(name, chosen["lr"], seed, bench.test) for seed in range(seeds)]
        _, body, head = runs[0]
        yield Row(name, body, head, [accuracy for accuracy, _, _ in runs], (time.monotonic() - began) / seeds)


def search(folder: Path, epochs: int = EPOCHS) -> Iterator[tuple[str, float, float]]:
    """(method, learning rate, val accuracy) for every method and rate, seed 0; the test split stays shut."""
    bench = Bench(folder, epochs)
    for name in METHODS:
        for lr in RATES:
            yield name, lr, bench.run(name, lr, 0, bench.val)[0]


def picture(rows: list[Row], path: Path, title: str) -> None:
    """Accuracy against trainable parameters, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        count, mean, spread = row.trainable_parameters, 100 * row.mean, 100 * row.spread
        axes.errorbar(count, mean, spread, marker="o", capsize=3, linestyle="none", label=row.method)
    axes.set_xscale("symlog", linthresh=1000)
    axes.set_xticks([0, 1e4, 1e5, 1e6])
    axes.legend(loc="lower right")
    axes.set(xlabel="trainable parameters without the head", ylabel="test accuracy, %", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run(out: Path, seeds: int = SEEDS, epochs: int = EPOCHS) -> Iterator[Row]:
    """The whole demo in the folder `out`: digits/, demo.json and demo.png."""
    rows = []
    for row in compare(write_digits(out / "digits"), seeds, epochs):
        rows.append(row)
        yield row
    (out / "demo.json").write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")
    title = f"vit_pico on handwritten digits, {TRAIN} training images, {seeds} seeds"
    picture(rows, out / "demo.png", title)
