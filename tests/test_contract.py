"""Every method keeps the contract on every model family; and the contract catches methods that do not."""

import os
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES
from torch import nn

import deltavit
from deltavit.core.contract import CHECKS, Broken, check
from deltavit.core.edit import After, Change, LowRank, Rewrite
from deltavit.core.errors import MethodError
from deltavit.core.method import Method
from deltavit.core.site import Where

OPTIONS = {
    "fact-tt": {"rank": 4}, "fact-tk": {"rank": 4}, "kadaptation": {"n": 4, "rank": 2}, "fastfood": {"dimension": 16},
    "vpt-deep": {"tokens": 2}, "vpt-shallow": {"tokens": 2}, "adaptformer": {"rank": 4}, "adapterdrop": {"rank": 4},
    "compacter": {"rank": 4}, "arc": {"rank": 4}, "vera": {"rank": 8},
}  # fmt: skip
"""Small enough for a width of 24."""
WINDOWS = ("swin", "swin v2", "torchvision swin", "torchvision swin v2")
HIDDEN = ("torchvision vit", "torchvision swin", "torchvision swin v2", "open_clip", "open_clip custom")
REFUSED = {
    "diff-fit": (("post-norm", "swin v2", "torchvision swin v2"), "puts a norm behind it"),
    "lepe": (("eva", "beit", "swin v2", *HIDDEN), "reads its weights itself"),
    "rpb": (("swin v2", "torchvision vit", "torchvision swin v2", "open_clip", "open_clip custom"), "takes no mask"),
    "vpt-deep": (("eva02", "beit", "hf beit", *WINDOWS), "inserts tokens, and .* refuses them: its"),
    "vpt-shallow": (("eva02", "beit", "hf beit", *WINDOWS), "inserts tokens, and .* refuses them: its"),
}
"""Method -> the families that it refuses, and the reason that it gives."""
COMPILED = {
    **dict.fromkeys(("tiny", "vit"), tuple(deltavit.methods())),
    **dict.fromkeys(
        ("swin", "eva", "open_clip", "hf vit"), ("lora", "ssf", "rlrr", "arc", "adaptformer", "rpb", "vpt-deep")
    ),
}
"""Compiling takes nine tenths of the time, so it is tried where something new can go wrong: every method on two
families, one of each kind on four others.  DELTAVIT_COMPILE_ALL=1 tries every pair, which takes half an hour."""


@pytest.mark.parametrize("name", deltavit.methods())
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family, name):
    model, method = FAMILIES[family](), deltavit.method(name, **OPTIONS.get(name, {}))
    families, reason = REFUSED.get(name, ((), ""))
    if family in families:
        with pytest.raises(MethodError, match=reason):
            deltavit.plan(model, method)
        return
    whole = "DELTAVIT_COMPILE_ALL" in os.environ or name in COMPILED.get(family, ())
    checks = CHECKS if whole else tuple(c for c in CHECKS if c.__name__ != "compiles_whole")
    assert len(check(model, method, checks)) == len(checks)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kadaptation", {"bias": True, "share": True, "n": 2}),
        ("lora", {"where": {"roles": ["q", "k", "v", "o", "fc1", "fc2"], "blocks": [-1]}, "scale": 4.0}),
        ("lora", {"where": {"roles": ["k"]}}),
        ("fact-tk", {"rank": 2, "where": {"roles": ["fc1", "fc2"]}}),
        ("fact-tt", {"rank": 2, "scale": 10.0, "where": {"roles": ["v", "fc2"]}}),
        ("bitfit", {"which": "linear"}),
        ("layernorm", {"which": "final"}),
        ("attention", {"where": {"roles": ["q"], "blocks": [1]}}),
        ("kadaptation", {"n": 4, "slow": "rank-1", "bias": True}),
        ("rlrr", {"init": "paper", "rank": 2}),
        ("ssf", {"init": "paper"}),
        ("arc", {"init": "paper", "rank": 4}),
        ("hta", {"rank": 0, "normalise": True, "where": {"roles": ["fc1", "fc2"]}}),
        ("dora", {"scale": 2.0, "where": {"roles": ["k", "fc2"]}}),
        ("apla", {"rank": 3, "where": {"roles": ["q", "fc1"]}}),
        ("repadapter", {"where": {"roles": ["q"]}}),
        ("vera", {"rank": 8, "where": {"roles": ["q", "fc1", "fc2"]}}),
        ("houlsby", {"norm": True, "act": "relu", "scale": 0.5}),
        ("compacter", {"rank": 4, "which": "mlp", "norm": True, "fixed": True}),
        ("adaptformer", {"rank": 4, "learnable": True, "bias": False}),
        ("convpass", {"which": "attn", "init": "xavier"}),
        ("partial", {"layers": ["0.attention", "1.ffn"]}),
        ("fastfood", {"dimension": 16, "bias": True, "said": True}),
    ],
)
@pytest.mark.parametrize("family", ["tiny", "vit", "eva"])
def test_contract_with_options(family, name, options):
    check(FAMILIES[family](), deltavit.method(name, **options))


def test_contract_on_the_backbone_in_the_package():
    for name in ("lora", "bitfit"):
        check(deltavit.load_model("vit_pico"), deltavit.method(name))


# --- faults that the contract must catch -----------------------------------------------------------------------------


class DeadFactors(LowRank):
    """Both factors start at zero, as in the released Kronecker adapter."""

    def __init__(self, shape):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(shape[0], 2)), nn.Parameter(torch.zeros(2, shape[1]))

    def factors(self):
        return self.up, self.down


class OtherFace(DeadFactors):
    """The activation face forgets the scale."""

    def __init__(self, shape):
        super().__init__(shape)
        nn.init.normal_(self.down)

    def weight(self, W):
        return W + 2 * self.up @ self.down


class OffCentre(Change):
    """Says that it starts as the base, and does not."""

    def __init__(self, shape):
        super().__init__()
        self.by = nn.Parameter(torch.full(shape[:1], 1.1))

    def weight(self, W):
        return W * self.by[:, None]


class MixesPictures(nn.Module):
    """A bypass whose output depends on the other images of the batch."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x, y):
        return y + self.gain * y.mean(0, keepdim=True)


@dataclass(frozen=True)
class Faulty(Method):
    kind: type

    name = "faulty"

    def edits(self, vit):
        if self.kind is MixesPictures:
            yield After(vit.mlp[0], MixesPictures(vit.width), "mix")
            return
        for site in vit.sites(Where(roles=("q",))):
            yield Rewrite(site, self.kind(site.shape))


@pytest.mark.parametrize(
    ("kind", "check_name"),
    [
        (DeadFactors, "nothing_is_born_dead"),
        (OtherFace, "merge_keeps_the_function"),
        (OffCentre, "starts_as_base"),
        (MixesPictures, "pictures_do_not_meet"),
    ],
)
def test_the_contract_catches(kind, check_name):
    with pytest.raises(Broken, match=check_name):
        check(FAMILIES["tiny"](), Faulty(kind))
