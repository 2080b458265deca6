"""Several processes on one run: the only file that talks to torch.distributed.

The base is replicated and frozen, so what travels each step is the gradient of the trainables alone, in one piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def group() -> Iterator[None]:
    """Join the processes that `torchrun` started; nothing at all where it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
        dist.barrier()  # gloo aborts a process that closes while another still reads from it
    finally:
        dist.destroy_process_group()


def total(*values: Tensor) -> None:
    """Sum each tensor over all processes, in place."""
    if world() > 1:
        exact = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        flat = torch.cat([v.reshape(-1).to(device, exact) for v in values])
        dist.all_reduce(flat)
        for value, part in zip(values, torch.split(flat, [v.numel() for v in values]), strict=True):
            value.copy_(part.view_as(value))


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes; a tensor that no loss reached gets zeros, on one process as on several."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    total(*[p.grad for p in parameters if p.grad is not None])


def same(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the first one's values."""
    if world() > 1:
        for p in parameters:
            dist.broadcast(p.data, 0)
