"""Weights before and after tuning, matrix by matrix, in float64: what angles and spectra are read from."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.attach import Adapter, adapters
from ..core.errors import DataError, MethodError, ModelError
from ..core.guests import as_matrix
from ..core.site import NORM, Anatomy, Site, Where, anatomy


class Pair(NamedTuple):
    """One site before and after tuning, [out, in] each; where biases were asked for, they are one more column."""

    site: Site
    before: Tensor
    after: Tensor

    @property
    def changed(self) -> bool:
        return not torch.equal(self.before, self.after)


def of_adapter(adapter: Adapter, *, biases: bool = False, norms: bool = False) -> Iterator[Pair]:
    """The linear maps of all blocks under an attached adapter; those it leaves alone are there too, unchanged.

    The sum W0 + dW is taken in float64, on a copy of the model: in float32 its rounding would look like a change of
    full rank.

    Args:
        biases: the biases of these maps as well; then, and with `norms`, the adapter must merge.
        norms: the norms of the blocks as well.

    Raises:
        MethodError: no weight matrix changes under the method (prompts, bypasses), so there is nothing to read.
    """
    vit, twin = adapter.vit, copy.deepcopy(adapter.model).double()
    own = adapters(twin)[adapters(adapter.model).index(adapter)]
    if biases or norms:
        own.merge()
        yield from _pairs(vit, own.vit, biases, norms)
        return
    after = {site.name: W for site, _, W in own.pairs()}
    sites = _sites(vit, norms=False)
    if not after.keys() & {site.name for site in sites}:
        raise MethodError(f"{adapter.method.name} changes no matrix of the blocks of {vit.name}: nothing to analyse")
    known = vit.tensors()
    for site in sites:
        W = _rows(known[site.tensor], site.rows)
        yield Pair(site, W, after.get(site.name, W))


def of_models(before: nn.Module, after: nn.Module, *, biases: bool = False, norms: bool = False) -> Iterator[Pair]:
    """The same of two states of one architecture, such as two checkpoints; heads are not compared.

    Raises:
        ModelError: the two differ in a tensor's name or shape.
    """
    one, two = anatomy(before), anatomy(after)
    left, right = ({name: tuple(t.shape) for name, t in vit.tensors().items()} for vit in (one, two))
    for name in [*left, *right]:
        if left.get(name) != right.get(name):
            shapes = " against ".join(str(list(s)) if (s := side.get(name)) else "none" for side in (left, right))
            raise ModelError(f"{one.name} and {two.name} are two architectures: {name} has shape {shapes}")
    yield from _pairs(one, two, biases, norms)


def _pairs(one: Anatomy, two: Anatomy, biases: bool, norms: bool) -> Iterator[Pair]:
    before, after = one.tensors(), two.tensors()

    def matrix(tensors: dict[str, nn.Parameter], site: Site) -> Tensor:
        W = _rows(tensors[site.tensor], site.rows)
        if biases and site.shift and site.bias_tensor in tensors:
            W = torch.cat([W, _rows(tensors[site.bias_tensor], site.shift[2])], 1)
        return W

    for site in _sites(one, norms):
        yield Pair(site, matrix(before, site), matrix(after, site))


def _sites(vit: Anatomy, norms: bool) -> list[Site]:
    found = [site for linears in vit.linears for site in linears.values()]
    return found + ([s for s in vit.sites(Where(roles=(NORM,))) if s.block >= 0] if norms else [])


def _rows(t: Tensor, rows: tuple[int, int]) -> Tensor:
    return as_matrix(t.detach()[slice(*rows)]).to("cpu", torch.float64)


# --- pictures --------------------------------------------------------------------------------------------------------


def canvas(wide: float, high: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A matplotlib figure that no global state knows, and its grid of axes.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("pictures need matplotlib: pip install 'deltavit[plots]'") from None
    figure = Figure(figsize=(wide, high), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Any) -> bytes:
    """The picture as bytes, the same for the same data with one version of matplotlib."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()
