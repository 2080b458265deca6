"""The Walsh-Hadamard transform against what public code does: log n times stack and reshape.

    python benchmarks/hadamard.py                        2^22 numbers, ViT-B's largest tensor padded, on the processor
    python benchmarks/hadamard.py --threads 1 --bits 20 --rounds 31
    python benchmarks/hadamard.py --device cuda

Each round times both, one after the other in turns, and divides; medians and quartiles of these ratios are printed.
Exit code 1 where a median is below the bar of 5 (2^22 on a processor).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own code, whatever is installed

from deltavit.methods.fastfood import walsh_hadamard

BAR = 5.0


def chain(x: Tensor) -> Tensor:
    """One pass over memory for each bit, and one more for its stack."""
    y, half = x, 1
    while half < len(x):
        y = y.reshape(-1, 2, half)
        y = torch.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], 1)
        half *= 2
    return y.reshape(x.shape)


def forward(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        f(x)


def both(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    f(x.detach().requires_grad_()).backward(x)


def seconds(work: Callable[..., None], f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    work(f, x)
    wait()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    x = torch.randn(1 << chosen.bits, device=chosen.device)
    exact = chain(x.double())
    scale = exact.square().mean().sqrt()
    where = torch.cuda.get_device_name() if x.is_cuda else f"{platform.processor() or 'cpu'}, {chosen.threads} threads"
    print(f"2^{chosen.bits} numbers, torch {torch.__version__}, {where}")
    for name, f in (("ours", walsh_hadamard), ("chain", chain)):
        print(f"{name:6} largest error {((f(x) - exact).abs().max() / scale).item():.1e} of a typical number")
    missed = False
    for label, work in (("forward", forward), ("forward and backward", both)):
        pairs = []
        for i in range(chosen.rounds + 2):  # two to warm up
            order = (walsh_hadamard, chain) if i % 2 else (chain, walsh_hadamard)
            taken = {f: seconds(work, f, x) for f in order}
            pairs.append((taken[walsh_hadamard], taken[chain]))
        ours, theirs = zip(*pairs[2:], strict=True)
        ratios = [b / a for a, b in pairs[2:]]
        low, middle, high = statistics.quantiles(ratios, n=4)
        times = [f"{1e3 * statistics.median(t):.2f} ms" for t in (ours, theirs)]
        print(
            f"{label:21} ours {times[0]}, chain {times[1]}, "
            f"{middle:.1f} times as fast (quartiles {low:.1f} to {high:.1f}, {chosen.rounds} rounds)"
        )
        missed |= middle < BAR and chosen.bits == 22 and not x.is_cuda
    sys.exit(missed)


if __name__ == "__main__":
    main()
