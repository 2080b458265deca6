"""What tuning did to the singular values and the singular subspaces of a weight.

W0 = U0 S0 V0^T becomes W1 = U1 S1 V1^T, and D = W1 - W0.  Letters: k the leading singular vectors that are looked at,
o x i the weight's shape.

The reading by rescaled rows and columns is that of Dong et al. 2024, "Low-Rank Rescaled Vision Transformer
Fine-Tuning: A Residual Design Approach", arXiv:2403.19067.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import AdapterError, ModelError
from .pairs import Pair, canvas


class Factors(NamedTuple):
    """The SVD of a weight: all singular values, falling, and the k leading vectors of each side as columns."""

    U: Tensor  # [o, k]
    S: Tensor  # [min(o, i)]
    V: Tensor  # [i, k]


@dataclass(frozen=True)
class Spectrum:
    """One weight before and after.  Shares are of |D|^2, the squared Frobenius norm of the change; all float64."""

    before: Tensor
    """Singular values of W0, falling; `after` of W1, `delta` of D."""
    after: Tensor
    delta: Tensor
    left: Tensor
    """Principal angles between the k leading left singular subspaces before and after, degrees, rising; [k]."""
    right: Tensor
    inside_left: float
    """|U0^T D|^2: what of the change lies in the k leading left singular vectors of W0.  By chance k / o."""
    inside_right: float
    """|D V0|^2.  By chance k / i."""
    inside: float
    """|U0^T D V0|^2, both at once.  By chance k^2 / (o i)."""
    rescaled: float
    """RLRR's form: how much of D is diag(l) W0 diag(r), rows of U0 and columns of V0^T rescaled beside the residual."""
    scaled: float
    """The same without the residual: how much of D is left when W1 is fitted by diag(l) W0 diag(r), taken from 1."""

    @property
    def size(self) -> float:
        """|D| / |W0|."""
        return float(self.delta.norm() / self.before.norm())

    @property
    def values(self) -> float:
        """Change of the singular values, |S1 - S0| / |S0|; at most `size` (Mirsky 1960)."""
        return float((self.after - self.before).norm() / self.before.norm())

    @property
    def rank(self) -> float:
        """Effective rank of D: exp of the entropy of its singular values over their sum (Roy and Vetterli 2007)."""
        p = self.delta / self.delta.sum()
        return math.exp(float(torch.special.entr(p).sum()))

    @property
    def stable_rank(self) -> float:
        """|D|^2 over the square of its largest singular value."""
        return float(self.delta.square().sum() / self.delta[0] ** 2)


def factors(W: Tensor, k: int = 16) -> Factors:
    """The SVD of a matrix, for several `spectrum` calls from one W0.

    Raises:
        ValueError: k is not within the matrix, or W is not finite, or all zero.
    """
    if not 1 <= k <= min(W.shape):
        raise ValueError(f"top {k} of a {W.shape[0]} x {W.shape[1]} weight: choose 1 to {min(W.shape)}")
    if not W.isfinite().all():
        raise ValueError("the weight has a number that is not finite")
    if not W.any():
        raise ValueError("the weight is all zero, which has no singular vectors")
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return Factors(U[:, :k].clone(), S, Vh[:k].T.clone())  # clones, so that what is kept is no view of all of U


def spectrum(W0: Tensor, W1: Tensor, k: int = 16, *, start: Factors | None = None) -> Spectrum:
    """What became of a weight's singular values and of its k leading singular vectors.

    Where the k-th and the next singular value nearly agree, the subspace is not well defined and turns far under a
    small change; the largest of the principal angles then says little.

    Args:
        W0, W1: [o, i], before and after.
        start: `factors(W0, k)`, where it is known already.

    Raises:
        ValueError: shapes differ, k is out of range, a weight is zero or not finite, or W1 equals W0.
    """
    if W0.shape != W1.shape:
        raise ValueError(f"the shapes are {list(W0.shape)} before and {list(W1.shape)} after")
    U0, S0, V0 = start or factors(W0, k)
    U1, S1, V1 = factors(W1, k)
    W0, W1 = W0.detach().double(), W1.detach().double()
    D = W1 - W0
    energy = float(D.square().sum())
    if energy == 0:
        raise ValueError("the weight did not change")

    def share(part: Tensor) -> float:
        return float(part.square().sum()) / energy

    return Spectrum(
        S0, S1, torch.linalg.svdvals(D), principal_angles(U0, U1), principal_angles(V0, V1),
        inside_left=share(U0.T @ D), inside_right=share(D @ V0), inside=share(U0.T @ D @ V0),
        rescaled=1 - share(D - rescaling(W0, D, 1e-9 * energy)),
        scaled=1 - share(W1 - rescaling(W0, W1, 1e-9 * energy)),
    )  # fmt: skip


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Angles between two subspaces that orthonormal columns span, degrees, rising: [n, k], [n, k] -> [k].

    From sines and cosines together, so that angles near 0 and near 90 degrees both keep their digits.

    Source: Knyazev and Argentati 2002, "Principal angles between subspaces in an A-based scalar product".
    """
    inner = A.T @ B
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(B - A @ inner).flip(0)
    return torch.atan2(sines, cosines).rad2deg()


def rescaling(W: Tensor, target: Tensor, enough: float = 0.0, rounds: int = 100) -> Tensor:
    """An approximation of a target by diag(l) W diag(r), [o, i]: least squares over l, then over r, in turn.

    Each half step is exact, so the error never rises.  The problem is not convex: where such a form fits well the best
    one is found, where none does it may be a local optimum.  The best of four starts goes on: r = 1, and the three
    leading right singular vectors of W o target, which is l r^T o W^2 where the form fits.  It ends after `rounds`, or
    once a round gains no more than `enough` of the squared error.
    """
    M, N = W * target, W.square()

    def step(r: Tensor) -> tuple[Tensor, Tensor, float]:
        l = _over(M @ r, N @ r.square())
        down = M.T @ l
        r = _over(down, N.T @ l.square())
        return l, r, float(r @ down)  # the last is |target|^2 less the squared error

    V = M[M.square().sum(1).topk(min(3, *M.shape)).indices].T
    for _ in range(10):
        V = torch.linalg.qr(M.T @ (M @ V))[0]
    tried = []
    for r in (torch.ones_like(V[:, 0]), *V.T):
        for _ in range(5):
            l, r, explained = step(r)
        tried.append((explained, l, r))
    explained, l, r = max(tried, key=operator.itemgetter(0))
    for _ in range(rounds):
        before = explained
        l, r, explained = step(r)
        if explained - before <= enough:
            break
    fitted: Tensor = l[:, None] * W * r
    return fitted


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where a row or column of W is empty."""
    return torch.where(b > 0, a / b.clamp_min(1e-300), torch.zeros_like(a))


def spectra(
    pairs: Iterable[Pair], k: int = 16, *, sites: Sequence[str] = (), known: dict[str, Factors] | None = None
) -> Iterator[tuple[str, Spectrum | None]]:
    """(name, spectrum) of each site; None for one that did not change.

    Args:
        sites: patterns of names, such as `blocks.0.*` or `*.q`; none for all.
        known: kept factors of W0 by site, filled here, which spare an SVD a site for the next change of the same base.

    Raises:
        AdapterError: no site has such a name.  ModelError: a weight that is zero or not finite, or k too large.
    """
    known = {} if known is None else known
    names = []
    for pair in pairs:
        name = pair.site.name
        names.append(name)
        if sites and not any(fnmatchcase(name, pattern) for pattern in sites):
            names[-1] = ""
            continue
        try:
            if not pair.changed:
                yield name, None
                continue
            known[name] = known.get(name) or factors(pair.before, k)
            yield name, spectrum(pair.before, pair.after, k, start=known[name])
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None
    if not any(names):
        raise AdapterError(f"no site is called {', '.join(sites) or 'anything'}; they are blocks.0.q, blocks.0.k, ..")


# --- several adapters side by side -----------------------------------------------------------------------------------

MEASURES = {
    "size": "|D| / |W0|",
    "values": "singular values",
    "left": "left angle",
    "right": "right angle",
    "rank": "effective rank",
    "stable_rank": "stable rank",
    "inside_left": "in left",
    "inside_right": "in right",
    "inside": "in both",
    "rescaled": "rescaled",
    "scaled": "scaled",
}
"""Numbers of one site, and how a table calls them; `left` and `right` are means of k angles, in degrees."""


def measures(found: Spectrum) -> dict[str, float]:
    told = {name: getattr(found, name) for name in MEASURES}
    return {name: float(v.mean()) if isinstance(v, Tensor) else float(v) for name, v in told.items()}


def summary(found: Mapping[str, Spectrum]) -> dict[str, tuple[float, float]]:
    """Measure -> mean and standard deviation over the sites of one method (0 for a single site)."""
    told = [measures(one) for one in found.values()]
    return {
        name: (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for name in MEASURES
        for values in [[row[name] for row in told]]
    }


def plain(found: Spectrum, k: int) -> dict[str, Any]:
    """One site as JSON: every measure, and the first k of each list."""
    lists = {
        "singular_before": found.before[:k],
        "singular_after": found.after[:k],
        "singular_delta": found.delta[:k],
        "left_angles": found.left,
        "right_angles": found.right,
    }
    return {**measures(found), **{name: values.tolist() for name, values in lists.items()}}


def picture(methods: Mapping[str, Mapping[str, Spectrum]], k: int, title: str = "") -> Any:
    """A matplotlib figure of several methods: a line each, the mean over its sites, and their spread as a band."""
    figure, grid = canvas(13, 7, 2, 3)
    from matplotlib.ticker import MaxNLocator

    curves: tuple[tuple[str, Callable[[Spectrum], Tensor]], ...] = (
        ("change of singular values, %", lambda s: 100 * (s.after[:k] - s.before[:k]) / s.before[:k]),
        ("left principal angles, degrees", lambda s: s.left),
        ("right principal angles, degrees", lambda s: s.right),
        ("share of the change in its first directions", lambda s: _cumulated(s.delta)[:k]),
    )  # fmt: skip
    for axes, (label, of) in zip(grid.flat, curves, strict=False):
        for i, (name, sites) in enumerate(methods.items()):
            table = torch.stack([of(one) for one in sites.values()])
            mean, sd = table.mean(0), table.std(0, correction=1 if len(table) > 1 else 0)
            x = range(1, len(mean) + 1)
            axes.plot(x, mean.numpy(), color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3], label=_label(name))
            axes.fill_between(x, (mean - sd).numpy(), (mean + sd).numpy(), color=f"C{i % 10}", alpha=0.15, linewidth=0)
        axes.set(xlabel="index", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid.flat[1:4]:
        axes.set_ylim(bottom=0)
    shares, ranks = grid.flat[4:]
    _dots(shares, methods, ("inside_left", "inside_right", "inside", "rescaled", "scaled"), "share of the change")
    _dots(ranks, methods, ("rank", "stable_rank"), "rank of the change")
    ranks.set_yscale("log")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle(_label(title))
    return figure


def _dots(axes: Any, methods: Mapping[str, Mapping[str, Spectrum]], names: Sequence[str], label: str) -> None:
    for i, sites in enumerate(methods.values()):
        told = summary(sites)
        x = [j + 0.6 * ((i + 0.5) / len(methods) - 0.5) for j in range(len(names))]
        means, sds = zip(*(told[name] for name in names), strict=True)
        axes.errorbar(x, means, sds, marker="o", markersize=4, capsize=2, linestyle="none", color=f"C{i % 10}")
    axes.set_xticks(range(len(names)), [MEASURES[name] for name in names], fontsize="small")
    axes.set_ylabel(label)


def _cumulated(values: Tensor) -> Tensor:
    squares = values.square()
    return squares.cumsum(0) / squares.sum()


def _label(text: str) -> str:
    return text.replace("$", r"\$")
