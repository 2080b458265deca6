"""One training step of every method over the frozen limit, side by side in one run, and HF PEFT's LoRA and LoKr.

    python benchmarks/speed.py                       ViT-B/16 and DeiT-Tiny, times and peak memory
    python benchmarks/speed.py --models vit_base_patch16_224 --rounds 20 --no-memory

The frozen limit is forward and backward through activations alone: no adapter, nothing trains.  A step is forward,
backward, AdamW.  Each round runs every candidate once, in a new order, and divides by the limit's time in that round,
so that a slow minute of a shared machine slows both; medians and quartiles of these ratios are printed.  Candidates run
in groups that fit in memory, each with a limit of its own.  Peak memory
is the largest resident set of a process that does nothing but two steps of that candidate.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltavit
from deltavit.core.edit import Own
from deltavit.models import skeleton

ALL = {"where": {"roles": ["q", "k", "v", "o", "fc1", "fc2"]}}
FUSED = ["qkv"]
LINEARS = ["qkv", "attn.proj", "fc1", "fc2"]
Build = Callable[[nn.Module], None]


def ours(name: str, **options: Any) -> Build:
    def build(model: nn.Module) -> None:
        deltavit.attach(model, deltavit.method(name, **options), classes=100)

    return build


def peft_lora(targets: list[str]) -> Build:
    def build(model: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=targets), model)
        _new_head(model)

    return build


def peft_lokr(targets: list[str]) -> Build:
    def build(model: nn.Module) -> None:
        from peft import LoKrConfig, inject_adapter_in_model

        inject_adapter_in_model(LoKrConfig(r=1, alpha=1, decompose_factor=4, target_modules=targets), model)
        _new_head(model)

    return build


def _new_head(model: nn.Module) -> None:
    model.head = nn.Linear(model.get_submodule("head").in_features, 100)  # type: ignore[arg-type]


def limit(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.get_submodule("patch_embed").register_forward_hook(lambda m, a, y: y.requires_grad_())


def bar(name: str) -> float | None:
    """The most that a method may cost over the limit on ViT-B/16; None where the model's own tensors train."""
    made = deltavit.plan(skeleton("vit_base_patch16_224"), name)
    if any(isinstance(edit, Own) for edit in made) or name in ("linear", "fastfood"):
        return None
    if not made.mergeable:
        return 1.20  # new layers or tokens
    # a rescale of rows and columns needs a product of the size of the weight gradient
    return 1.08 if made.mixed_batch else 1.50


CANDIDATES: dict[str, tuple[Build, float | None]] = {
    "frozen limit": (limit, None),
    "lora q,v r8": (ours("lora"), 1.08),
    "lora all r8": (ours("lora", **ALL), 1.08),
    "lora-fix q,v r8": (ours("lora-fix"), 1.08),
    "kadaptation q,v n4 r1": (ours("kadaptation"), 1.08),
    "kadaptation all n4 r1": (ours("kadaptation", **ALL), 1.08),
    "fact-tt r16": (ours("fact-tt"), 1.08),
    "fact-tk r16": (ours("fact-tk"), 1.08),
    "PEFT LoRA qkv r8": (peft_lora(FUSED), None),
    "PEFT LoRA all r8": (peft_lora(LINEARS), None),
    "PEFT LoKr qkv r1 n4": (peft_lokr(FUSED), None),
    "PEFT LoKr all r1 n4": (peft_lokr(LINEARS), None),
    **{
        name: (ours(name), None)
        for name in deltavit.methods()
        if name not in ("lora", "lora-fix", "kadaptation", "fact-tt", "fact-tk")
    },
}
"""What is run, and the most that it may cost over the limit on ViT-B/16, where `bar` does not say it.  PEFT cannot tell
q and v in a fused projection apart, so it gets the whole of it with one A, which is less work than ours."""
GROUP = 8

BARS = [
    ("lora q,v r8", "PEFT LoRA qkv r8", 1.0),
    ("lora all r8", "PEFT LoRA all r8", 0.95),
    ("kadaptation all n4 r1", "PEFT LoKr all r1 n4", 0.7),
]
BATCH = {"vit_base_patch16_224": 4, "deit_tiny_patch16_224": 16}


class Candidate:
    def __init__(self, base: nn.Module, name: str, device: torch.device, batch: int, bf16: bool):
        torch.manual_seed(0)
        self.device, self.bf16 = device, bf16
        self.model = base
        CANDIDATES[name][0](self.model)
        self.model.to(device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.count = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, fused=True) if trained else None
        self.x = torch.randn(batch, 3, 224, 224, device=device)

    def step(self) -> float:
        self._wait()
        began = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.x).float().square().mean()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", default=",".join(BATCH))
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--batch", type=int)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--bf16", action="store_true", help="autocast to bf16")
    flags.add_argument(
        "--only", help="candidates whose names hold one of these, comma-separated; the limit always runs"
    )
    flags.add_argument("--no-memory", action="store_true")
    flags.add_argument("--json", help="also write the results to this file")
    flags.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    chosen = flags.parse_args()
    device = torch.device(chosen.device)
    if chosen.peak:
        model, name = chosen.peak
        print(peak(model, name, device, chosen.batch or BATCH.get(model, 8), chosen.bf16))
        return
    results = {}
    for model in chosen.models.split(","):
        results[model] = measure(model, chosen, device)
    missed = bars(results)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(results, file, indent=1)
    sys.exit(1 if missed else 0)


def peak(model: str, name: str, device: torch.device, batch: int, bf16: bool) -> int:
    candidate = Candidate(deltavit.load_model(model, "random"), name, device, batch, bf16)
    candidate.step()
    candidate.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # ru_maxrss begins with what the parent had when it forked
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(model: str, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    batch = chosen.batch or BATCH.get(model, 8)
    wanted = [w for w in (chosen.only or "").split(",") if w]
    names = [n for n in CANDIDATES if n == "frozen limit" or not wanted or any(w in n for w in wanted)]
    base = deltavit.load_model(model, "random")
    print(
        f"\n{model}, batch {batch}, {device}{' bf16' if chosen.bf16 else ''}, {torch.get_num_threads()} threads, "
        f"{chosen.rounds} rounds; torch {version('torch')}, timm {version('timm')}, peft {version('peft')}, "
        f"python {platform.python_version()}"
    )
    print(f"{'':24}{'trains':>12}{'ms':>9}{'over the limit':>16}{'quartiles':>16}{'peak MiB':>10}", flush=True)
    rows: dict[str, Any] = {}
    others = [name for name in names if name != "frozen limit"]
    for first in range(0, max(1, len(others)), GROUP):
        group = ["frozen limit", *others[first : first + GROUP]]
        made = {name: Candidate(copy.deepcopy(base), name, device, batch, chosen.bf16) for name in group}
        for candidate in made.values():
            candidate.step()
        times: dict[str, list[float]] = {name: [] for name in group}
        for turn in range(chosen.rounds):
            order = [*group, "frozen limit"]  # the limit twice a round: everything is divided by it
            random.Random(turn).shuffle(order)
            taken: dict[str, list[float]] = {}
            for name in order:
                taken.setdefault(name, []).append(made[name].step())
            for name in group:
                times[name].append(statistics.mean(taken[name]))
        for name in group if first == 0 else group[1:]:
            row = _row(made[name].count, times[name], times["frozen limit"])
            memory = None if chosen.no_memory else _peak(model, name, chosen, device, batch)
            rows[name] = {**row, "peak_mib": memory}
            shown = "" if memory is None else f"{memory:10.0f}"
            spread = f"{row['low']:.3f}-{row['high']:.3f}"
            print(f"{name:24}{row['trains']:12,}{row['ms']:9.1f}{row['ratio']:16.3f}{spread:>16}{shown}", flush=True)
        made.clear()  # before the next group is built
    return rows


def _row(count: int, times: list[float], limits: list[float]) -> dict[str, Any]:
    ratios = [t / base for t, base in zip(times, limits, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"trains": count, "ms": 1000 * statistics.median(times), "ratio": middle, "low": low, "high": high,
            "times": times}  # fmt: skip


def _peak(model: str, name: str, chosen: argparse.Namespace, device: torch.device, batch: int) -> float:
    flags = [
        "--peak",
        model,
        name,
        "--device",
        str(device),
        "--batch",
        str(batch),
        *(["--bf16"] if chosen.bf16 else []),
    ]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 2**20


def bars(results: dict[str, Any]) -> int:
    """Print each bar with what was measured; the number of those missed.  Bars hold on ViT-B/16."""
    missed = 0
    rows = results.get("vit_base_patch16_224", {})
    for name, (_, most) in CANDIDATES.items():
        if name not in rows:
            continue
        most = bar(name) if name in deltavit.methods() else most
        if most is not None:
            missed += _bar(f"{name} over the frozen limit", rows[name]["ratio"], most)
    for mine, other, most in BARS:
        if mine in rows and other in rows:
            paired = [a / b for a, b in zip(rows[mine]["times"], rows[other]["times"], strict=True)]
            missed += _bar(f"{mine} over {other}", statistics.median(paired), most)
    return missed


def _bar(label: str, value: float, most: float) -> int:
    print(f"{'holds ' if value <= most else 'MISSED'}  {label}: {value:.3f}, at most {most}")
    return value > most


if __name__ == "__main__":
    main()
