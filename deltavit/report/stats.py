"""Which methods differ by more than chance: ranks, a paired permutation test, and Holm's correction.

Everything is a pure function of the scores: where a test needs random numbers, their seed is fixed.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EXACT = 16
"""Most pairs whose 2^n signs are all tried."""
DRAWS = 10_000
"""Signs that are drawn where there are more pairs."""
LEVEL = 0.05
TASKS = 6
"""Data sets from which on each one counts once; below, each seed of each data set does."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1 below the line; None for one value) and count."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def ranks(scores: Sequence[float]) -> list[float]:
    """Rank 1 for the highest score; equal scores share the mean of their ranks."""
    order = sorted(scores, reverse=True)
    return [order.index(score) + (1 + order.count(score)) / 2 for score in scores]


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p value of a mean difference under "each pair could as well have been the other way round".

    The share of all sign patterns whose sum is at least as far from zero as the one observed.  Up to 16 pairs every
    pattern is tried; beyond, 10,000 are drawn with a fixed seed and the observed one is counted among them, so p is
    never 0.

    Source: Fisher 1935, "The Design of Experiments", section 21; for comparing classifiers, Smucker et al. 2007.
    """
    return float(_sign_flips(np.asarray([differences], dtype=np.float64))[0])


def _sign_flips(differences: np.ndarray) -> np.ndarray:
    """`sign_flip` of each row of [pairs of methods, n]."""
    rows, n = differences.shape
    if n == 0:
        return np.ones(rows)
    # sums that are equal on paper differ in their last bits
    seen = np.abs(differences.sum(axis=1)) - 1e-9 * np.abs(differences).sum(axis=1)
    if n <= EXACT:  # a pattern and its opposite give the same distance: half of them are enough
        signs = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=n - 1)], dtype=np.float64)
        return np.asarray([np.mean(np.abs(signs @ row) >= least) for row, least in zip(differences, seen, strict=True)])
    drawn = np.random.Generator(np.random.PCG64(0)).integers(0, 2, (DRAWS, n)) * 2.0 - 1.0
    far = np.asarray([np.sum(np.abs(drawn @ row) >= least) for row, least in zip(differences, seen, strict=True)])
    return (far + 1) / (DRAWS + 1)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number: the chance of one false alarm among all stays below the level.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for position, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - position) * values[i]))
        adjusted[i] = largest
    return adjusted


def rank_range(table: Sequence[Sequence[float]]) -> np.ndarray:
    """p values of all pairs at once, [methods, methods], from how far apart mean ranks lie.

    Were all methods alike, each block could as well have its ranks in any other order.  p is the share of 10,000 such
    orders (fixed seed, the observed one counted) whose largest and smallest mean rank lie at least as far apart as
    this pair's, so it is corrected for all pairs.  This is Nemenyi's test, with its distribution drawn instead of
    approximated.

    Args:
        table: ranks, [blocks, methods].

    Source: Nemenyi 1963, "Distribution-free Multiple Comparisons", as Demsar 2006 uses it for classifiers.
    """
    blocks = np.asarray(table, dtype=np.float64)
    numbers = np.random.Generator(np.random.PCG64(0))
    totals = sum(numbers.permuted(np.tile(block, (DRAWS, 1)), axis=1) for block in blocks)
    reach = np.sort(np.ptp(totals, axis=1))
    apart = np.abs(blocks.sum(axis=0)[:, None] - blocks.sum(axis=0)[None, :])
    above = DRAWS - np.searchsorted(reach, apart - 1e-6)
    return np.asarray((above + 1) / (DRAWS + 1))


def compare(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean ranks of methods, and which of them a paired test tells apart.

    Args:
        scores: of each method, its scores on the same blocks (tasks, or tasks and seeds) in the same order.

    Returns:
        `order`: methods by mean rank, ties by name.  `mean_rank` of each.  `p`: of each pair, both ways, corrected for
        the number of pairs.  `same`: longest stretches of `order` in which no two methods are told apart at 0.05, two
        methods or more.  `n`: blocks.  `pairs`: comparisons.  `test`: "sign flips", `sign_flip` with `holm`; or
        "rank range", where so few blocks and so many pairs could never give sign flips a p below 0.05.  The counts
        alone decide that, not the scores.
    """
    names = sorted(scores)
    table = np.array([scores[name] for name in names], dtype=np.float64)  # [methods, blocks]
    blocks = table.shape[1]
    by_block = np.array([ranks(column) for column in table.T.tolist()])  # [blocks, methods]
    mean_rank = {name: float(r) for name, r in zip(names, by_block.mean(axis=0), strict=True)}
    order = sorted(names, key=lambda name: (mean_rank[name], name))
    pairs = list(itertools.combinations(range(len(names)), 2))
    p: dict[str, dict[str, float]] = {name: {} for name in order}
    smallest = 2.0 ** (1 - blocks) if blocks <= EXACT else 1 / (DRAWS + 1)
    flips = smallest * len(pairs) < LEVEL
    if flips and pairs:
        values = holm(_sign_flips(np.array([table[i] - table[j] for i, j in pairs])).tolist())
    else:
        every = rank_range(by_block.tolist())
        values = [float(every[i, j]) for i, j in pairs]
    for (i, j), value in zip(pairs, values, strict=True):
        p[names[i]][names[j]] = p[names[j]][names[i]] = value
    return {
        "order": order, "mean_rank": {name: mean_rank[name] for name in order},
        "p": {name: {other: p[name][other] for other in order if other != name} for name in order},
        "same": stretches(order, p), "n": blocks, "pairs": len(pairs),
        "test": "sign flips" if flips else "rank range",
    }  # fmt: skip


def stretches(order: Sequence[str], p: Mapping[str, Mapping[str, float]], level: float = LEVEL) -> list[list[str]]:
    """The bars of a rank diagram: a bar never covers two methods that the test tells apart.

    So a pair that is not told apart has no bar where one that lies between them differs from either; the p values say.
    """
    found: list[list[str]] = []
    end = 0
    for i in range(len(order)):
        j = i
        while j + 1 < len(order) and all(p[order[k]][order[j + 1]] >= level for k in range(i, j + 1)):
            j += 1
        if j > i and j + 1 > end:
            found.append(list(order[i : j + 1]))
            end = j + 1
    return found


def pe(score: float, parameters: float, scale: float = 1e8) -> float:
    """The performance-efficiency score: score * exp(-log10(parameters / 1e8 + 1)); higher is better.

    Args:
        score: mean accuracy, a fraction.
        parameters: all that train, the head included.
        scale: M0 of the formula, the size of the usual backbones.

    Source: the parameter-efficiency track of ELEVATER (Li et al. 2022, arXiv:2204.08790), whose metric He et al. 2022
    (arXiv:2203.16329) report.  The formula is known to us second-hand: the paper's own text was not at hand.
    A method that trains nothing keeps its accuracy; one that trains 1e8 numbers keeps exp(-log10(2)) = 0.74 of it.
    """
    return score * math.exp(-math.log10(parameters / scale + 1))
