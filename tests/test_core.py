"""What is said of sites, plans, adapters and formulas, against slow and plain oracles."""

import copy
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import deltavit
from deltavit import Where
from deltavit.core.contract import pictures, stir
from deltavit.core.draw import linear_init
from deltavit.core.edit import After, Before, Rewrite, Swap
from deltavit.core.errors import AdapterError, MethodError, ModelError
from deltavit.core.method import Method
from deltavit.core.site import Site
from deltavit.methods.fact import TensorTrain, Tucker
from deltavit.methods.kadaptation import KroneckerSum
from deltavit.methods.lora import Product
from deltavit.models import skeleton

small_numbers = st.integers(1, 3)


# --- formulas --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), inp=st.integers(1, 9), rank=small_numbers, scale=st.floats(0.1, 10))
def test_lora_increment_is_scale_b_a(out, inp, rank, scale):
    change = Product((out, inp), rank, scale, dropout=0.0, fixed=False)
    nn.init.normal_(change.up)
    plain = torch.zeros(out, inp)
    for o in range(out):
        for i in range(inp):
            for r in range(rank):
                plain[o, i] += scale * change.up[o, r].item() * change.down[r, i].item()
    torch.testing.assert_close(change.weight(torch.zeros(out, inp)).detach(), plain)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), rank=small_numbers, a=small_numbers, b=small_numbers, scale=st.floats(0.1, 10))
def test_kronecker_increment_is_the_sum_in_equation_4(n, rank, a, b, scale):
    slow = nn.Parameter(torch.randn(n, n, n))
    change = KroneckerSum((slow,), (a * n, b * n), rank, scale, dropout=0.0, shift=None)
    nn.init.normal_(change.v)  # born zero: there would be nothing to compare
    plain = scale * sum(torch.kron(A, u @ v) for A, u, v in zip(change.slow, change.u, change.v, strict=True))
    torch.testing.assert_close(change.weight(torch.zeros(a * n, b * n)), plain)
    assert torch.linalg.matrix_rank(plain) <= n * n * rank


@settings(max_examples=20, deadline=None)
@given(slices=small_numbers, wide=st.booleans(), rank=small_numbers, width=st.integers(2, 5), scale=st.floats(0.1, 10))
def test_fact_tt_slice_is_v_sigma_u(slices, wide, rank, width, scale):
    u, v = linear_init(rank, width), nn.Parameter(torch.randn(width, rank))
    shape = (width, slices * width) if wide else (slices * width, width)
    change = TensorTrain(u, v, Site("fc", "fc2" if wide else "fc1", 0, (0, shape[0]), shape), scale, 0.0)
    pieces = [scale * v @ core @ u for core in change.core]
    torch.testing.assert_close(change.weight(torch.zeros(shape)), torch.cat(pieces, 1 if wide else 0))


@settings(max_examples=20, deadline=None)
@given(slices=small_numbers, wide=st.booleans(), rank=small_numbers, width=st.integers(2, 5), at=small_numbers)
def test_fact_tk_core_is_the_tucker_product_of_its_own_slice(slices, wide, rank, width, at):
    u, v = linear_init(rank, width), nn.Parameter(torch.randn(width, rank))
    core, positions = nn.Parameter(torch.randn(rank, rank, rank)), nn.Parameter(torch.randn(at + slices, rank))
    shape = (width, slices * width) if wide else (slices * width, width)
    site = Site("fc", "fc2" if wide else "fc1", 0, (0, shape[0]), shape)
    change = Tucker(u, v, site, 1.0, 0.0, core, positions, at)
    pieces = []
    for j in range(slices):
        middle = torch.zeros(rank, rank)
        for m in range(rank):
            middle += positions[at + j, m] * core[m]
        pieces.append(v @ middle @ u)
    torch.testing.assert_close(change.weight(torch.zeros(shape)), torch.cat(pieces, 1 if wide else 0))


@pytest.mark.parametrize("name", ["lora", "kadaptation", "fact-tt", "fact-tk"])
def test_dropout_acts_in_training_alone_and_keeps_the_mean(name):
    model = FAMILIES["tiny"]()
    adapter = deltavit.attach(model, deltavit.method(name, dropout=0.5, rank=2), classes=3)
    stir(adapter)
    x = pictures(model)
    assert torch.equal(model.eval()(x), model.eval()(x))
    assert not torch.equal(model.train()(x), model.train()(x))
    edit = next(e for e in adapter.edits if isinstance(e, Rewrite))
    z, y = torch.randn(1, edit.site.shape[1]).expand(20_000, -1), torch.zeros(20_000, edit.site.shape[0])
    dropped = edit.change.train().output(z, y).mean(0)
    whole = edit.change.eval().output(z[:1], y[:1])[0]
    assert (dropped - whole).abs().max() < 0.06 * whole.abs().max()


# --- anatomy ---------------------------------------------------------------------------------------------------------


def test_block_1_selects_neither_10_nor_11():
    model = skeleton("vit_base_patch16_224")
    made = deltavit.plan(model, deltavit.method("lora", where={"blocks": [1]}))
    assert made.sites == ["blocks.1.q", "blocks.1.v"]


def test_the_fingerprint_survives_cast_and_head_but_no_changed_value():
    one, two = (deltavit.load_model("vit_pico") for _ in range(2))
    assert deltavit.anatomy(one).fingerprint == deltavit.anatomy(two).fingerprint
    one.bfloat16()
    one.head = nn.Linear(128, 3)
    assert deltavit.anatomy(one).fingerprint == deltavit.anatomy(two).fingerprint
    other = copy.deepcopy(two)
    del other.__dict__["_deltavit_anatomy"]
    with torch.no_grad():
        other.blocks[3].mlp.fc1.bias[7] += 1e-3
    assert deltavit.anatomy(other).fingerprint != deltavit.anatomy(two).fingerprint
    assert (
        deltavit.anatomy(deltavit.load_model("vit_pico", image_size=64)).fingerprint
        != deltavit.anatomy(two).fingerprint
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet18", "not a Vision Transformer"),
        ("swinv2_cr_tiny_ns_224", "not a Vision Transformer"),
        ("deit_tiny_distilled_patch16_224", "two heads"),
        ("vit_bse_patch16_224", "did you mean 'vit_base_patch16_224'"),
    ],
)
def test_what_has_no_anatomy_is_refused(name, says):
    with pytest.raises(ModelError, match=says) as refusal:
        deltavit.load_model(name, "random")
    assert "\n" not in str(refusal.value)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_unknown_roles_blocks_options_and_methods_name_what_exists():
    model = FAMILIES["vit"]()
    for options, says in [
        ({"where": {"roles": ["query"]}}, "it has fc1, fc2, k, norm, o, patch, q, v"),
        ({"where": {"blocks": [2]}}, "blocks 0 to 1, asked for 2"),
        ({"rnk": 3}, "did you mean 'rank'"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": "many"}, "'many' is not int"),
        ({"rank": 2.5}, "2.5 is not int"),
        ({"where": {"rolls": ["q"]}}, "did you mean 'roles'"),
    ]:
        with pytest.raises(MethodError, match=says):
            deltavit.attach(model, deltavit.method("lora", **options), classes=3)
    with pytest.raises(MethodError, match="did you mean 'kadaptation'"):
        deltavit.method("kadaptaton")
    assert not deltavit.adapters(model)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("kadaptation", {"n": 5}, "n=5 must divide both sides of the weight, which is 24 x 24"),
        ("lora", {"dropout": 0.1}, "lora.dropout acts on activations"),
        ("kadaptation", {"bias": True, "where": {"roles": ["k"]}}, "shifts the bias of blocks.0.k, but .* has none"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_and_leaves_no_trace(name, options, says):
    model = FAMILIES["eva"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(MethodError, match=says):
        deltavit.attach(model, deltavit.method(name, **options), classes=3)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert "_deltavit_record" not in model.__dict__
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_two_adapters_that_cannot_share_a_tensor_are_refused_and_the_first_stays():
    model = FAMILIES["eva"]()
    x = pictures(model)
    lora = deltavit.attach(model, deltavit.method("lora"), classes=3)  # eva's qkv: the weight face
    stir(lora)
    before = model(x)
    with pytest.raises(AdapterError, match="rewritten by another adapter"):
        deltavit.attach(model, deltavit.method("attention"), classes=3)
    assert torch.equal(model(x), before)
    assert deltavit.adapters(model) == [lora]


def test_attach_draws_from_its_seed_alone():
    state = torch.get_rng_state()
    tensors = []
    for seed in (0, 0, 1):
        adapter = deltavit.attach(FAMILIES["tiny"](), deltavit.method("lora"), classes=3, seed=seed)
        tensors.append(adapter.tensors())
        torch.rand(3)
    torch.set_rng_state(state)
    assert all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])
    assert not torch.equal(tensors[0]["head.weight"], tensors[2]["head.weight"])
    before = torch.get_rng_state()
    deltavit.attach(FAMILIES["tiny"](), deltavit.method("fact-tk"), classes=3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_name_alone_is_the_method_with_its_defaults():
    model = FAMILIES["tiny"]()
    assert (
        deltavit.attach(model, "lora", classes=3).method
        == deltavit.method("lora")
        == deltavit.plan(model, "lora").method
    )


def test_names_are_stable_and_shared_factors_come_once():
    adapter = deltavit.attach(FAMILIES["vit"](), deltavit.method("kadaptation"), classes=3)
    assert list(adapter.tensors())[:3] == ["shared.q.slow", "blocks.0.q.u", "blocks.0.q.v"]
    adapter = deltavit.attach(FAMILIES["vit"](), deltavit.method("fact-tk", rank=2), classes=3)
    assert list(adapter.tensors()) == [
        "shared.u", "shared.v", "shared.core", "shared.positions", "head.weight", "head.bias",
    ]  # fmt: skip


def test_pairs_give_each_site_before_and_after():
    model = FAMILIES["vit"]()
    W = model.blocks[0].attn.qkv.weight.clone()
    for name in ("lora", "attention"):
        adapter = deltavit.attach(model, deltavit.method(name), classes=3)
        stir(adapter)
        pairs = {site.name: (W0, W1) for site, W0, W1 in adapter.pairs()}
        assert torch.equal(pairs["blocks.0.q"][0], W[:24])
        assert torch.equal(pairs["blocks.0.v"][0], W[48:])
        assert not torch.equal(*pairs["blocks.0.v"])
        adapter.detach()


def test_an_adapter_that_left_says_so():
    model = FAMILIES["tiny"]()
    adapter = deltavit.attach(model, deltavit.method("lora"), classes=3)
    adapter.detach()
    for act in (adapter.detach, adapter.merge, lambda: adapter.save("x"), lambda: list(adapter.pairs())):
        with pytest.raises(AdapterError, match="detached"):
            act()
    with pytest.raises(MethodError, match="trains only the head"):
        deltavit.attach(model, deltavit.method("linear"))
    with pytest.raises(MethodError, match="two classes are called 'a'"):
        deltavit.attach(model, deltavit.method("lora"), classes=["a", "b", "a"])


def test_merge_is_refused_under_another_adapter():
    model = FAMILIES["tiny"]()
    one = deltavit.attach(model, deltavit.method("lora"), classes=3)
    two = deltavit.attach(model, deltavit.method("bitfit"), classes=3)
    with pytest.raises(AdapterError, match="1 other adapter"):
        one.merge()
    two.detach()
    one.merge()
    assert one.state == "merged"


def test_different_adapters_add_up_and_leave_the_base():
    model, x = FAMILIES["vit"](), pictures(FAMILIES["vit"]())
    base = model(x)
    lora = deltavit.attach(model, deltavit.method("lora"))
    bitfit = deltavit.attach(model, deltavit.method("bitfit"), classes=3)
    fact = deltavit.attach(model, deltavit.method("fact-tt", rank=2))
    for adapter in (lora, bitfit, fact):
        stir(adapter)
    for adapter in (bitfit, lora, fact):
        adapter.detach()
    assert torch.equal(model(x), base)


def test_a_second_adapter_starts_from_the_base_and_not_from_the_first():
    model = FAMILIES["vit"]()
    bias = model.blocks[0].norm1.bias.clone()
    stir(deltavit.attach(model, deltavit.method("bitfit"), classes=3))
    second = deltavit.attach(model, deltavit.method("layernorm"), classes=3)
    assert torch.equal(second.tensors()["blocks.0.norm1.bias"], bias)


@dataclass(frozen=True)
class Everywhere(Method):
    """A bypass before and after an MLP, and a swapped norm: the edits that the first methods do not use."""

    name = "everywhere"
    starts_as_base = False

    def edits(self, vit):
        yield Before(vit.mlp[0], nn.Linear(vit.width, vit.width), "blocks.0.pre")
        yield After(vit.mlp[0], Gate(vit.width), "blocks.0.post")
        yield Swap(vit.norms[0], lambda old: nn.LayerNorm(vit.width), "blocks.0.norm")


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(width))

    def forward(self, x, y):
        return y + self.gate * x


def test_before_after_and_swap_keep_the_contract():
    from deltavit.core.contract import CHECKS

    for check in CHECKS:
        if check.__name__ != "saves_and_loads":  # a file names a registered method
            check(FAMILIES["vit"](), Everywhere())


def test_a_bypass_refuses_to_merge():
    adapter = deltavit.attach(FAMILIES["vit"](), Everywhere(), classes=3)
    assert not adapter.mergeable
    with pytest.raises(MethodError, match="no weight to merge them into"):
        adapter.merge()


class Products(TorchDispatchMode):
    """Shapes of all matrix products that run."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(word in str(function) for word in ("mm", "linear")) and isinstance(out, torch.Tensor):
            self.shapes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("name", ["lora", "lora-fix", "kadaptation", "fact-tt", "fact-tk"])
def test_the_factored_path_forms_no_full_weight_gradient(name):
    model = deltavit.load_model("vit_pico")
    options = {"where": Where(roles=("q", "k", "v", "o", "fc1", "fc2")), "rank": 2}
    adapter = deltavit.attach(model, deltavit.method(name, **options), classes=3)
    stir(adapter)
    weights = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head}
    with Products() as seen:
        model(pictures(model, 3)).square().sum().backward()
    full = {s for shape in weights for s in (shape, shape[::-1])}
    assert len(seen.shapes) > 4
    assert not seen.shapes & full


def test_half_precision_base_keeps_trainables_in_fp32():
    model = deltavit.load_model("vit_pico")
    expected = None
    for dtype in (torch.float32, torch.bfloat16):
        copied = copy.deepcopy(model).to(dtype)
        adapter = deltavit.attach(copied, deltavit.method("lora"), classes=10)
        stir(adapter)
        assert all(p.dtype == torch.float32 for p in adapter.parameters() if p not in set(adapter.head_parameters()))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
            y = copied(pictures(model, 8).to(dtype)).float()
        expected = y if expected is None else expected
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


def test_hooks_stay_silent_nowhere():
    """Where a model reads the weight itself, the weight face is used: eva's fused projection."""
    model, x = FAMILIES["eva"](), pictures(FAMILIES["eva"]())
    with torch.no_grad():
        base = model(x)
        adapter = deltavit.attach(model, deltavit.method("lora"))
        stir(adapter)
        adapted = model(x)
    assert not torch.allclose(base, adapted, atol=1e-4)
    assert F.mse_loss(base, adapted) > 0
