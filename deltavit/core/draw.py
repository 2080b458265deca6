"""What factors are drawn from at the start; each takes the next numbers of torch's default generator."""

from __future__ import annotations

import torch
from torch import nn


def linear_init(*shape: int) -> nn.Parameter:
    """What nn.Linear draws for a weight of that shape."""
    weight = torch.empty(*shape)
    nn.init.kaiming_uniform_(weight, a=5**0.5)
    return nn.Parameter(weight)


def kaiming(*shape: int) -> nn.Parameter:
    """U(-b, b) with b = sqrt(6 / columns)."""
    weight = torch.empty(*shape)
    nn.init.kaiming_uniform_(weight)
    return nn.Parameter(weight)


def xavier(*shape: int) -> nn.Parameter:
    """U(-b, b) with b = sqrt(6 / (rows + columns))."""
    weight = torch.empty(*shape)
    nn.init.xavier_uniform_(weight)
    return nn.Parameter(weight)
