"""Methods that rewrite weights: each formula against a slow plain one, and against HF PEFT where it has the method."""

import copy
import itertools

import peft
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import deltavit
from deltavit.core.contract import pictures, stir
from deltavit.core.errors import MethodError
from deltavit.core.site import Site
from deltavit.methods.apla import SomeRows
from deltavit.methods.arc import Recomposed
from deltavit.methods.dora import Decomposed
from deltavit.methods.hta import Householder
from deltavit.methods.ia3 import RescaledInput
from deltavit.methods.loramul import Multiplied, Prompted
from deltavit.methods.lycoris import HadamardProduct, KroneckerProduct
from deltavit.methods.repadapter import Grouped
from deltavit.methods.rlrr import Rescaled
from deltavit.methods.ssf import Rescale
from deltavit.methods.vera import Fixed, Scaled
from deltavit.models import skeleton

# --- formulas: for each change how it is made, and what it puts out, from its paper and as plainly as can be ---------


def empty(*shape):
    return nn.Parameter(torch.zeros(*shape))


def ssf(change, x, W, b):
    return torch.stack([change.gain[o] * (x @ W[o] + b[o]) + change.shift[o] for o in range(len(W))], -1)


def table(change, W):
    scaled = W.clone()
    for o, i in itertools.product(*map(range, W.shape)):
        scaled[o, i] *= 1 + sum(change.left[o, r] * change.right[r, i] for r in range(len(change.right)))
    return scaled


def rlrr(change, x, W, b):
    return x @ table(change, W).t() + b + change.shift


def lora_mul(change, x, W, b):
    return x @ table(change, W).t() + b + b * change.delta


def vpt_add(change, x, W, b):
    prompt = sum(change.weights[0, r] * change.prompts[r] for r in range(len(change.prompts)))
    return (x + prompt) @ W.t() + b


def arc(change, x, W, b):
    D = change.down.t()
    adapted = x + ((x @ D) * change.coefficients) @ D.t() + change.shift
    return adapted @ W.t() + b


def repadapter(change, x, W, b):
    hidden = F.conv1d(x.transpose(1, 2), change.down[:, :, None], change.down_bias)
    bypass = F.conv1d(hidden, change.up[:, :, None], change.up_bias, groups=change.groups).transpose(1, 2)
    return (x + change.scale * bypass) @ W.t() + b


def householder(v, normalise):
    return torch.eye(len(v)) - torch.outer(v, v) * (2 / (v @ v) if normalise else 1)


def hta(change, x, W, b):
    diagonal = torch.zeros_like(W)
    for j, d in enumerate(change.diagonal):
        diagonal[j, j] = d
    sides = [householder(v, change.normalise) for v in (change.left, change.right)]
    low = 0 if change.up is None else change.up @ change.down
    return x @ (W + low + sides[0] @ diagonal @ sides[1]).t() + b


def apla(change, x, W, b):
    W, b = W.clone(), b.clone()
    for j, row in enumerate(change.rows.tolist()):
        W[row] += change.delta[j]
        b[row] += change.shift[j]
    return x @ W.t() + b


def dora(change, x, W, b):
    V = W + change.scale * change.up @ change.down
    m = change.magnitude * W.norm(dim=1)
    return x @ torch.stack([m[o] * V[o] / V[o].norm() for o in range(len(W))]).t() + b


def vera(change, x, W, b):
    A, B = change.fixed.down[:, : W.shape[1]], change.fixed.up[: W.shape[0]]
    return x @ (W + torch.diag(change.b) @ B @ torch.diag(change.d) @ A).t() + b


def ia3(change, x, W, b):
    return (x @ torch.diag(change.gain)) @ W.t() + b


def loha(change, x, W, b):
    return x @ (W + change.scale * (change.up1 @ change.down1) * (change.up2 @ change.down2)).t() + b


def lokr(change, x, W, b):
    return x @ (W + change.scale * torch.kron(change.w, change.up @ change.down)).t() + b


MADE = {
    ssf: lambda site, r, s: Rescale(site),
    rlrr: lambda site, r, s: Rescaled(empty(site.shape[0], r), empty(r, site.shape[1]), empty(site.shape[0])),
    lora_mul: lambda site, r, s: Multiplied(empty(site.shape[0], r), empty(r, site.shape[1]), empty(site.shape[0])),
    vpt_add: lambda site, r, s: Prompted(r, site.shape[1]),
    arc: lambda site, r, s: Recomposed(empty(r, site.shape[1]), empty(r), empty(site.shape[1]), 0.0),
    repadapter: lambda site, r, s: Grouped(
        empty(2 * r, site.shape[1]), empty(site.shape[1], r), (empty(2 * r), empty(site.shape[1])), 2, s, 0.0
    ),
    hta: lambda site, r, s: Householder(site.shape, r - 1, normalise=s > 2),
    apla: lambda site, r, s: SomeRows(site, min(r, site.shape[0])),
    dora: lambda site, r, s: Decomposed(site.shape, r, s, 0.0),
    vera: lambda site, r, s: Scaled(site.shape, Fixed(site.shape[0] + 2, r, site.shape[1] + 1), 0.1, 0.0),
    ia3: lambda site, r, s: RescaledInput(site),
    loha: lambda site, r, s: HadamardProduct(site.shape, r, s, 0.0),
    lokr: lambda site, r, s: KroneckerProduct(site, 2, r, s, 0.0),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("plain", MADE, ids=lambda f: f.__name__)
@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 4), inp=st.integers(1, 4), rank=st.integers(1, 3), scale=st.floats(0.1, 4))
def test_both_faces_are_the_papers_formula(plain, out, inp, rank, scale):
    site = Site("fc", "q", 0, (0, 2 * out), (2 * out, 2 * inp))
    change = MADE[plain](site, rank, scale)
    x, W, b = torch.randn(2, 3, 2 * inp), torch.randn(2 * out, 2 * inp), torch.randn(2 * out)
    with torch.no_grad():
        for p in change.parameters():
            p.copy_(torch.randn(p.shape))  # born zero: there would be nothing to compare
        wanted = plain(change, x, W, b)
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(F.linear(x, change.weight(W), change.bias(b, W)), wanted, **close)
        if change.input is not None:
            torch.testing.assert_close(F.linear(change.input(x), W, b), wanted, **close)
        if change.output is not None:
            more = (W, b) if change.reads_weight else ()
            torch.testing.assert_close(change.output(x, F.linear(x, W, b), *more), wanted, **close)


def test_rank_of_the_products_is_what_their_docstrings_say():
    site = Site("fc", "q", 0, (0, 48), (48, 48))
    for change, rank in ((HadamardProduct(site.shape, 4, 1.0, 0.0), 16), (KroneckerProduct(site, 6, 4, 1.0, 0.0), 24)):
        for p in change.parameters():
            nn.init.normal_(p)
        assert torch.linalg.matrix_rank(change.weight(torch.zeros(48, 48))) == rank
    full = Householder((48, 48), 0, normalise=False)
    nn.init.normal_(full.diagonal)
    assert torch.linalg.matrix_rank(full.weight(torch.zeros(48, 48))) == 48


# --- the same weights in HF PEFT -------------------------------------------------------------------------------------


def fill(**pairs):
    """Copy tensors into PEFT's: attribute = tensor."""
    for p, value in pairs.values():
        weight = getattr(p, "weight", p)
        weight.data = value.detach().reshape(weight.shape).clone()


def lora_to(change, layer):
    fill(A=(layer.lora_A["default"], change.down), B=(layer.lora_B["default"], change.up))


def dora_to(change, layer):
    lora_to(change, layer)
    W = layer.base_layer.weight
    fill(m=(layer.lora_magnitude_vector["default"], change.magnitude * W.norm(dim=1)))


def vera_to(change, layer):
    fill(b=(layer.vera_lambda_b["default"], change.b), d=(layer.vera_lambda_d["default"], change.d))
    layer.vera_A["default"], layer.vera_B["default"] = change.fixed.down, change.fixed.up


def loha_to(change, layer):
    for name, p in (("w1_a", "up1"), ("w1_b", "down1"), ("w2_a", "up2"), ("w2_b", "down2")):
        fill(p=(getattr(layer, f"hada_{name}")["default"], getattr(change, p)))


def lokr_to(change, layer):
    for name, p in (("w1", "w"), ("w2_a", "up"), ("w2_b", "down")):
        fill(p=(getattr(layer, f"lokr_{name}")["default"], getattr(change, p)))


def ia3_to(change, layer):
    fill(l=(layer.ia3_l["default"], change.gain))


BESIDE = {
    "lora": (
        {"rank": 3, "scale": 2.0},
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"]),
        lora_to,
    ),
    "dora": (
        {"rank": 3, "scale": 2.0, "where": {"roles": ["q", "fc2"]}},
        peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["q", "fc2"]),
        dora_to,
    ),
    "vera": (
        {"rank": 5, "where": {"roles": ["q", "fc1", "fc2"]}},
        peft.VeraConfig(r=5, target_modules=["q", "fc1", "fc2"]),
        vera_to,
    ),
    "ia3": ({}, peft.IA3Config(target_modules=["k", "v", "fc2"], feedforward_modules=["fc2"]), ia3_to),
    "loha": (
        {"rank": 3, "scale": 2.0},
        peft.LoHaConfig(r=3, alpha=6, target_modules=["q", "v"]),
        loha_to,
    ),
    "lokr": (
        {"n": 2, "rank": 3, "scale": 2.0, "where": {"roles": ["q", "fc1"]}},
        peft.LoKrConfig(r=3, alpha=6, decompose_factor=2, target_modules=["q", "fc1"]),
        lokr_to,
    ),
}


def beside(name):
    """Our adapted model, PEFT's with the same weights, and our adapter."""
    options, config, move = BESIDE[name]
    ours = deltavit.load_model("tiny").double()
    theirs = copy.deepcopy(ours)
    adapter = deltavit.attach(ours, deltavit.method(name, **options))
    stir(adapter)
    peft.get_peft_model(theirs, config)  # works in place
    theirs.double().eval()
    for edit in adapter.edits:
        move(edit.change, theirs.get_submodule(edit.site.path))
    return ours, theirs, adapter


@pytest.mark.parametrize("name", BESIDE)
def test_outputs_are_those_of_peft_with_the_same_weights(name):
    ours, theirs, _ = beside(name)
    x = pictures(ours).double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_gradients_of_dora_are_those_of_peft():
    ours, theirs, adapter = beside("dora")
    for model in (ours, theirs):
        model(pictures(ours).double()).square().sum().backward()
    for edit in adapter.edits:
        change, layer = edit.change, theirs.get_submodule(edit.site.path)
        torch.testing.assert_close(change.up.grad, layer.lora_B["default"].weight.grad)
        torch.testing.assert_close(change.down.grad, layer.lora_A["default"].weight.grad)
        m = layer.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(change.magnitude.grad, m * layer.base_layer.weight.norm(dim=1))


def test_diff_fit_scales_and_shifts_what_each_branch_adds():
    model = deltavit.load_model("tiny").double()
    plain, x = copy.deepcopy(model), pictures(model).double()
    adapter = deltavit.attach(model, deltavit.method("diff-fit"))
    stir(adapter)
    tensors = adapter.tensors()
    for name, p in plain.named_parameters():
        p.data = tensors.get(name, p).detach().clone()
    for name, branch in plain.named_modules():
        if name.endswith((".attn", ".mlp")):
            role = name.replace("attn", "o").replace("mlp", "fc2")
            gain, shift = tensors[f"{role}.gain"], tensors[f"{role}.shift"]
            branch.register_forward_hook(lambda module, args, y, gain=gain, shift=shift: gain * y + shift)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)
    assert {n for n, p in plain.named_parameters() if "norm" in n or n.endswith(("q.bias", "fc1.bias"))} <= set(tensors)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_rlrr_of_the_paper_starts_seven_percent_away():
    W = torch.randn(768, 768)
    adapter = deltavit.attach(skeleton_on_cpu(), deltavit.method("rlrr", init="paper", where={"roles": ["q"]}))
    change = adapter.edits[0].change.double()
    assert ((change.weight(W) - W).norm() / W.norm()).item() == pytest.approx(0.072, abs=0.005)
    assert change.right.abs().max().item() == pytest.approx((6 / 768) ** 0.5, rel=0.01)


def skeleton_on_cpu():
    model = deltavit.models.tiny.TinyViT(width=768, depth=1, heads=12)
    return model.float().eval()


def test_ssf_of_the_paper_is_drawn_around_one_and_zero():
    adapter = deltavit.attach(skeleton_on_cpu(), deltavit.method("ssf", init="paper", where={"roles": ["fc1"]}))
    change = adapter.edits[0].change
    for p, mean in ((change.gain, 1), (change.shift, 0)):
        assert p.mean().item() == pytest.approx(mean, abs=0.002)
        assert p.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("roles", "starts"), [(["q", "k", "v"], True), (["q", "k", "v", "fc1"], False)])
def test_arc_of_the_paper_starts_as_the_base_before_attention_alone(roles, starts):
    assert deltavit.method("arc", init="paper", where={"roles": roles}).starts_as_base == starts


def test_apla_draws_other_rows_for_every_block_and_seed_and_none_twice():
    rows = []
    for seed in (0, 1):
        adapter = deltavit.attach(deltavit.load_model("tiny"), deltavit.method("apla", rank=8), seed=seed)
        rows += [tuple(edit.change.rows.tolist()) for edit in adapter.edits]
    assert len(set(rows)) == len(rows) == 6
    assert all(len(set(r)) == 8 and list(r) == sorted(r) and r[-1] < 24 for r in rows)


def test_vera_keeps_one_pair_of_matrices_whatever_it_is_moved_to():
    model = deltavit.load_model("tiny")
    adapter = deltavit.attach(model, deltavit.method("vera", where={"roles": ["q", "fc1"]}))
    model.double()
    assert len({id(buffer) for edit in adapter.edits for buffer in edit.change.buffers()}) == 2


@pytest.mark.parametrize("name", ["arc", "repadapter", "dora", "vera", "loha", "lokr"])
def test_dropout_acts_in_training_alone(name):
    model = deltavit.load_model("tiny").double()
    x = pictures(model).double()
    adapter = deltavit.attach(model, deltavit.method(name, dropout=0.5))
    stir(adapter)
    with torch.no_grad():
        dropped = model.eval()(x)
        assert not torch.equal(model.train()(x), model(x))
        adapter.detach()
        without = deltavit.attach(model.eval(), deltavit.method(name))
        stir(without)
        assert torch.equal(model(x), dropped)


# --- where -----------------------------------------------------------------------------------------------------------


def names(family, *method, **options):
    return set(deltavit.plan(FAMILIES[family](), deltavit.method(*method, **options)).shapes)


def test_a_site_without_a_bias_has_no_shift():
    assert "patch.shift" not in names("clip", "ssf")  # CLIP's patch embedding
    for method in ("ssf", "rlrr"):
        found = names("eva", method)  # EVA's k
        assert not {"blocks.0.k.shift", "blocks.0.k.delta"} & found
        assert "blocks.0.fc1.shift" in found
    plan = deltavit.plan(FAMILIES["eva"](), deltavit.method("vpt-add"))
    assert "blocks.0.fc1" in plan.sites
    assert "blocks.0.k" not in plan.sites


def test_what_reads_one_input_shares_one_change():
    plan = deltavit.plan(FAMILIES["eva02"](), deltavit.method("repadapter"))  # a gated MLP
    assert {"blocks.0.fc1", "blocks.0.fc1g"} <= set(plan.sites)
    assert plan.shapes["blocks.0.fc1.fc1g.down"] == (8, 24)
    assert "blocks.0.q.k.v.down" in plan.shapes
    one = deltavit.plan(FAMILIES["vit"](), deltavit.method("repadapter"))
    assert [id(e.change) for e in one][:3] == [id(one[0].change)] * 3


def test_parts_of_arc_are_shared_by_all_layers():
    plan = deltavit.plan(skeleton("vit_base_patch16_224"), deltavit.method("arc"))
    shared = {name: shape for name, shape in plan.shapes.items() if name.startswith("shared")}
    assert shared == {"shared.q.k.v.down": (50, 768), "shared.fc1.down": (50, 768)}


def test_pace_counts_a_fused_qkv_as_one_module():
    base = skeleton("vit_base_patch16_224")
    assert deltavit.plan(base, deltavit.method("lora-mul+vpt-add")).trainable_parameters == 2_203_104


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((m, {"rank": 0}, "rank must be at least 1, got 0") for m in ("rlrr", "arc", "repadapter", "apla", "dora")),
        *((m, {"rank": 0}, "rank must be at least 1, got 0") for m in ("vera", "loha", "lokr", "lora-mul", "vpt-add")),
        ("hta", {"rank": -1}, "rank must not be negative, got -1"),
        ("repadapter", {"rank": 5}, "groups=2 must divide rank=5"),
        ("vera", {"start": 0.0}, "start=0 and b=0"),
        ("lokr", {"n": 0}, "n must be at least 1"),
        ("ssf", {"init": "papers"}, "'identity' or 'paper'"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(MethodError, match=message):
        deltavit.method(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("apla", {"rank": 25}, "rank=25, but blocks.0.o has only 24 rows: give at most 24"),
        ("lokr", {"n": 5}, "n=5 must divide both sides of blocks.0.q, which is 24 x 24"),
        ("repadapter", {"rank": 10, "groups": 5}, "groups=5 must divide what blocks.0.q reads, 24 numbers"),
        ("hta", {"where": {"roles": ["norm"]}}, "which has none"),
        ("dora+lora", {}, "the order of these changes is not defined"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(name, options, message):
    with pytest.raises(MethodError, match=message):
        deltavit.attach(deltavit.load_model("tiny"), deltavit.method(name, **options))


def test_diff_fit_refuses_a_norm_behind_the_branch():
    with pytest.raises(MethodError, match="puts a norm behind it"):
        deltavit.plan(FAMILIES["post-norm"](), deltavit.method("diff-fit"))
