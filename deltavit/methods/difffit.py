"""DiffFit: biases, norms and a scale for each branch.

Xie et al. 2023, "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
Fine-Tuning", arXiv:2304.06648.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..core.edit import Edit, Own, Rewrite
from ..core.errors import MethodError
from ..core.method import Method, register
from ..core.site import Anatomy, Where
from .ssf import Rescale


@register("diff-fit")
@dataclass(frozen=True)
class DiffFit(Method):
    r"""DiffFit: biases and norms train, and a scale of each branch.

    $$x' = x + \gamma \circ f(x)$$

    gamma [D], from 1, after attention and after the MLP of every block: it scales the rows of o and fc2 and their
    biases, so it merges.  All biases and all norms' weights train as well: 140,544 numbers on ViT-B/16, of which 18,432
    are gammas.

    Departure: the biases of o and fc2 train behind gamma, gamma o y + shift, from shift = 0; what can be reached is the
    same.

    Xie et al. 2023, arXiv:2304.06648; what trains in a ViT is that of Mai et al. 2024's comparison, arXiv:2409.16434.
    """

    paper = "arXiv:2304.06648"

    def edits(self, vit: Anatomy) -> Iterator[Edit]:
        if any(first == branch for first, branch in zip(vit.before_attn, vit.attn, strict=False)):
            raise MethodError(
                f"diff-fit scales what a branch adds, and {vit.name} puts a norm behind it, which undoes that: try ssf"
            )
        branches = vit.sites(Where(roles=("o", "fc2")))
        shifted = {site.bias_tensor for site in branches}
        names = dict.fromkeys([*vit.biases(), *(f"{path}.weight" for path in vit.norms)])
        yield from (Own(name) for name in names if name not in shifted)
        yield from (Rewrite(site, Rescale(site)) for site in branches)
