"""Adapters beside and behind the branches, against hand-written forward passes and slow, plain formulas."""

import copy
import math

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
from deltavit.methods.adapters import Bottleneck, LayerNorm, down_up
from deltavit.methods.compacter import Hypercomplex
from deltavit.methods.convpass import MapConvolution
from deltavit.methods.probing import Block
from deltavit.models import skeleton

small_numbers = st.integers(1, 4)
seeds = st.integers(0, 1000)
BYPASSES = ("houlsby", "pfeiffer", "adapterdrop", "compacter", "adaptformer", "convpass", "transformer-probing")


def stirred(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) / 2)
    return module.double()


# --- modules ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(small_numbers, min_size=2, max_size=3), width=st.integers(2, 6), rank=small_numbers,
    scale=st.floats(0.1, 10), act=st.sampled_from([nn.GELU, nn.ReLU]), norm=st.booleans(), bias=st.booleans(),
    serial=st.booleans(), seed=seeds,
)  # fmt: skip
def test_a_bottleneck_adds_scale_up_act_down_of_each_token(shape, width, rank, scale, act, norm, bias, serial, seed):
    torch.manual_seed(seed)
    layers = down_up(width, rank, bias)
    module = stirred(Bottleneck(*layers, act(), scale, 0.0, LayerNorm(width) if norm else None, serial))
    x, y = torch.randn(2, *shape, width).double()
    expected = y.clone().view(-1, width)
    for i, z in enumerate((y if serial else x).reshape(-1, width)):
        if norm:
            z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() * module.norm.weight + module.norm.bias
        h = module.down.weight @ z + (module.down.bias if bias else 0)
        h = h.clamp(min=0) if act is nn.ReLU else h / 2 * (1 + torch.erf(h / math.sqrt(2)))
        expected[i] += scale * (module.up.weight @ h + (module.up.bias if bias else 0))
    torch.testing.assert_close(module(x, y), expected.view(y.shape))


@settings(max_examples=30, deadline=None)
@given(n=small_numbers, a=small_numbers, b=small_numbers, seed=seeds)
def test_a_hypercomplex_weight_is_the_sum_of_kronecker_products_in_equation_6(n, a, b, seed):
    torch.manual_seed(seed)
    layer = stirred(Hypercomplex(nn.Parameter(torch.randn(n, n, n)), n * a, n * b))
    plain = sum(torch.kron(A, torch.outer(s, t)) for A, s, t in zip(layer.slow, layer.s, layer.t, strict=True))
    x = torch.randn(2, 3, n * a).double()
    torch.testing.assert_close(layer.weight(), plain)
    torch.testing.assert_close(layer(x), x @ plain.T + layer.bias)


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def convolved(tokens, grid, weight, bias):
    """One picture [N, r], token by token: patches have neighbours on the map, those before them have none."""
    h, w = grid
    prefix = len(tokens) - h * w
    put_out = []
    for i in range(len(tokens)):
        y = bias.clone()
        row, column = divmod(i - prefix, w)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if i < prefix:
                    neighbour = i if dy == dx == 0 else None
                else:
                    on_map = 0 <= row + dy < h and 0 <= column + dx < w
                    neighbour = i + dy * w + dx if on_map else None
                if neighbour is not None:
                    y = y + weight[:, :, dy + 1, dx + 1] @ tokens[neighbour]
        put_out.append(y)
    return torch.stack(put_out)


@settings(max_examples=30, deadline=None)
@given(grid=st.tuples(small_numbers, small_numbers), prefix=st.integers(0, 3), rank=small_numbers, seed=seeds)
def test_convolution_sees_the_map_and_each_token_before_it_alone(grid, prefix, rank, seed):
    torch.manual_seed(seed)
    middle = stirred(MapConvolution(rank, grid, "xavier"))
    x = torch.randn(2, prefix + grid[0] * grid[1], rank).double()
    plain = [quick_gelu(convolved(quick_gelu(one), grid, middle.weight, middle.bias)) for one in x]
    torch.testing.assert_close(middle(x), torch.stack(plain))
    as_map = x[:, prefix:].unflatten(1, grid)
    torch.testing.assert_close(middle(as_map), torch.stack(plain)[:, prefix:].unflatten(1, grid))


def test_convolution_starts_as_the_identity_or_as_xavier():
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(MapConvolution(8, (3, 2), "identity")(x), quick_gelu(quick_gelu(x)))
    drawn = MapConvolution(8, (3, 2), "xavier").weight
    bound = math.sqrt(6 / (8 * 9 + 8 * 9))
    assert 0.95 * bound < drawn.abs().max() <= bound
    assert abs(drawn.mean()) < bound / 10


@settings(max_examples=20, deadline=None)
@given(heads=small_numbers, width=small_numbers, grid=st.tuples(small_numbers, small_numbers), seed=seeds)
def test_the_new_block_is_torchs_own_encoder_layer(heads, width, grid, seed):
    torch.manual_seed(seed)
    width *= heads
    block = stirred(Block(width, heads))
    torchs = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
    ).double()
    parts = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj.", "linear1.": "fc1.", "linear2.": "fc2.",
        "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    ours = block.state_dict()
    torchs.load_state_dict({theirs + p: ours[name + p] for theirs, name in parts.items() for p in ("weight", "bias")})
    y = torch.randn(2, grid[0] * grid[1], width).double()
    torch.testing.assert_close(block(None, y), torchs(y))
    torch.testing.assert_close(block(None, y.unflatten(1, grid)), torchs(y).unflatten(1, grid))


# --- where they sit --------------------------------------------------------------------------------------------------


def adapted(family, name, **options):
    """(base, adapted model, its adapter), in double precision and with every trained tensor stirred."""
    base = FAMILIES[family]().double()
    model = copy.deepcopy(base)
    adapter = deltavit.attach(model, deltavit.method(name, **options))
    stir(adapter)
    return base, model, adapter


def two_layers(adapter, name, act, middle=lambda h: h):
    """x -> up(middle(act(down(x)))) from the tensors of that name."""
    t = {key.removeprefix(name + "."): value for key, value in adapter.tensors().items() if key.startswith(name + ".")}
    assert {"down.weight", "up.weight"} <= set(t)

    def delta(x):
        h = act(F.linear(x, t["down.weight"], t.get("down.bias")))
        return F.linear(middle(h), t["up.weight"], t.get("up.bias"))

    return delta


def none(stream, read, put_out):
    return 0


def by_hand(block, x, attn=none, mlp=none):
    """timm's pre-norm block with LayerScale; `attn` and `mlp` say what a bypass adds to their branch."""
    read = block.norm1(x)
    put_out = block.attn(read)
    x = x + block.ls1(put_out + attn(x, read, put_out))
    read = block.norm2(x)
    put_out = block.mlp(read)
    return x + block.ls2(put_out + mlp(x, read, put_out))


REGISTERS = "dinov2 with registers"  # a class token, four registers, LayerScale


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_houlsby_reads_what_both_branches_put_out_and_pfeiffer_the_mlp(act):
    x = torch.randn(2, 21, 24).double()
    for name, branches in (("houlsby", ("attn", "mlp")), ("pfeiffer", ("mlp",))):
        base, model, adapter = adapted(REGISTERS, name, rank=3, scale=0.7, act=act)
        f = {each: two_layers(adapter, f"blocks.1.{each}", getattr(F, act)) for each in branches}
        bypasses = {each: lambda stream, read, put_out, f=f[each]: 0.7 * f(put_out) for each in branches}
        torch.testing.assert_close(model.blocks[1](x), by_hand(base.blocks[1], x, **bypasses))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_adaptformer_reads_the_stream_before_the_norm_of_the_mlp(learnable, bias):
    base, model, adapter = adapted(REGISTERS, "adaptformer", rank=3, scale=0.7, bias=bias, learnable=learnable)
    f = two_layers(adapter, "blocks.1.mlp", F.relu)
    scale = adapter.tensors()["blocks.1.mlp.scale"] if learnable else 0.7
    assert scale != 0.7 or not learnable  # stirred
    assert len(adapter.tensors()) == 2 * (2 + 2 * bias + learnable)
    x = torch.randn(2, 21, 24).double()
    expected = by_hand(base.blocks[1], x, mlp=lambda stream, read, put_out: scale * f(stream))
    torch.testing.assert_close(model.blocks[1](x), expected)


@pytest.mark.parametrize("which", ["both", "attn"])
def test_convpass_reads_what_the_branches_read(which):
    base, model, adapter = adapted(REGISTERS, "convpass", rank=3, scale=0.7, which=which, init="xavier")

    def bypass(branch):
        t = adapter.tensors()
        weight, bias = (t[f"blocks.1.{branch}.middle.{p}"] for p in ("weight", "bias"))

        def middle(h):
            patches = F.conv2d(h[:, 5:].mT.unflatten(2, (4, 4)), weight, bias, padding=1).flatten(2).mT
            # a token alone is a map of one place, with zeros around it
            alone = [F.conv2d(h[:, i, :, None, None], weight, bias, padding=1).flatten(1) for i in range(5)]
            return quick_gelu(torch.cat([torch.stack(alone, 1), patches], 1))

        f = two_layers(adapter, f"blocks.1.{branch}", quick_gelu, middle)
        return lambda stream, read, put_out: 0.7 * f(read)

    x = torch.randn(2, 21, 24).double()
    branches = ("attn", "mlp") if which == "both" else ("attn",)
    assert len(adapter.tensors()) == 2 * len(branches) * 6
    expected = by_hand(base.blocks[1], x, **{branch: bypass(branch) for branch in branches})
    torch.testing.assert_close(model.blocks[1](x), expected)


def test_convpass_in_a_window_sees_the_window_as_its_map():
    base, model, adapter = adapted("swin", "convpass", rank=3, init="xavier")
    t = {n.removeprefix("blocks.1.attn."): p for n, p in adapter.tensors().items() if n.startswith("blocks.1.attn.")}
    windows = torch.randn(8, 16, 24).double()  # two pictures of 8 x 8, in windows of 4 x 4
    h = quick_gelu(F.linear(windows, t["down.weight"], t["down.bias"]))
    h = torch.stack([convolved(one, (4, 4), t["middle.weight"], t["middle.bias"]) for one in h])
    added = F.linear(quick_gelu(h), t["up.weight"], t["up.bias"])
    path = "layers.0.blocks.1.attn"
    torch.testing.assert_close(model.get_submodule(path)(windows), base.get_submodule(path)(windows) + added)


@pytest.mark.parametrize("family", ["swin", "torchvision swin", "torchvision swin v2"])
def test_convpass_beside_the_mlp_of_a_windowed_model_sees_the_whole_map(family):
    _, model, _ = adapted(family, "convpass", rank=3, init="xavier")
    mlp = model.get_submodule(deltavit.anatomy(model).mlp[0])
    flat = family == "swin"
    x = torch.randn(1, 8, 8, 24).double()
    moved = x.clone()
    moved[0, 3, 3] += 1  # the last place of the first window
    one, two = (mlp(z.flatten(1, 2) if flat else z).view(8, 8, -1) for z in (x, moved))
    reached = (one - two).abs().amax(-1) > 1e-9
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 2:5] = True
    assert torch.equal(reached, expected)


def test_compacter_adapters_are_houlsbys_with_kronecker_sums_that_share_their_slow_weights():
    base, model, adapter = adapted(REGISTERS, "compacter", rank=6, n=3, scale=0.7)
    t = adapter.tensors()
    assert t["shared.slow"].shape == (3, 3, 3)
    assert sum("slow" in name for name in t) == 1

    def bypass(branch):
        def layer(x, name):
            name = f"blocks.1.{branch}.{name}"
            products = zip(t["shared.slow"], t[f"{name}.s"], t[f"{name}.t"], strict=True)
            return F.linear(x, sum(torch.kron(A, torch.outer(u, v)) for A, u, v in products), t[f"{name}.bias"])

        return lambda stream, read, put_out: 0.7 * layer(F.gelu(layer(put_out, "down")), "up")

    x = torch.randn(2, 21, 24).double()
    expected = by_hand(base.blocks[1], x, attn=bypass("attn"), mlp=bypass("mlp"))
    torch.testing.assert_close(model.blocks[1](x), expected)


def test_fixed_slow_weights_are_the_same_in_all_layers_and_come_from_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        model = FAMILIES["vit"]()
        adapter = deltavit.attach(model, deltavit.method("compacter", rank=8, fixed=True), seed=seed)
        assert not any("slow" in name for name in adapter.tensors())
        copies = [buffer for name, buffer in model.named_buffers() if name.endswith("slow")]
        assert len(copies) == 2 * 2 * 2
        assert all(torch.equal(each, copies[0]) for each in copies)
        drawn.append((copies[0], adapter.frozen()))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1] == drawn[1][1]
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert drawn[0][1] != drawn[2][1]


@pytest.mark.parametrize(("top", "blocks"), [(1, {2}), (2, {1, 2})])
def test_adapterdrop_acts_in_the_last_blocks_alone(top, blocks):
    base, model, adapter = adapted("tiny", "adapterdrop", rank=3, top=top)
    assert {int(name.split(".")[1]) for name in adapter.tensors()} == blocks
    x = torch.randn(2, 17, 24).double()
    for b in range(3):
        assert torch.equal(model.blocks[b](x), base.blocks[b](x)) == (b not in blocks)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "compacter", "adaptformer", "convpass"])
def test_only_chosen_blocks_have_adapters(name):
    method = deltavit.method(name, rank=4, where={"blocks": [0, -1]})
    names = deltavit.attach(FAMILIES["tiny"](), method).tensors()
    assert {n.split(".")[1] for n in names if n.startswith("blocks.")} == {"0", "2"}


def test_the_new_block_is_between_the_last_block_and_the_final_norm():
    base, model, adapter = adapted("tiny", "transformer-probing")
    probe = Block(24, 3).double()
    probe.load_state_dict({n.removeprefix("blocks.2.probe."): p for n, p in adapter.tensors().items()})
    x = pictures(base).double()
    base.blocks.append(nn.Identity())
    base.blocks[-1].forward = lambda y: probe(None, y)
    torch.testing.assert_close(model(x), base(x))


def test_the_new_block_has_heads_of_the_width_of_the_models():
    plan = deltavit.plan(FAMILIES["swin"](), deltavit.method("transformer-probing"))
    assert plan[0].module.heads == 6  # 48 wide, and the first stage has 3 heads of 8
    assert plan.trainable_parameters == 12 * 48**2 + 13 * 48


# --- what they keep --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BYPASSES)
def test_a_half_precision_base_runs_in_its_precision(name):
    base = FAMILIES["vit"]()
    x = pictures(base)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(base).to(dtype)
        adapter = deltavit.attach(model, name)
        stir(adapter)
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
        outputs.append(model(x.to(dtype)))
        assert outputs[-1].dtype == dtype
        outputs[-1].float().square().mean().backward()
        assert all(p.grad is not None for p in adapter.parameters())
    torch.testing.assert_close(outputs[1].float(), outputs[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", BYPASSES)
def test_autocast_casts_the_adapter_too(name):
    model = FAMILIES["vit"]()
    x = pictures(model)
    stir(deltavit.attach(model, name))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "adapterdrop", "compacter", "adaptformer", "convpass"])
def test_dropout_acts_in_training_alone(name):
    model, same = FAMILIES["vit"](), FAMILIES["vit"]()
    x = pictures(model)
    for each, dropout in ((model, 0.5), (same, 0.0)):
        stir(deltavit.attach(each, deltavit.method(name, dropout=dropout)))
    assert torch.equal(model(x), same(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("houlsby", {"rank": 8}, 313_536),
        ("houlsby", {"rank": 64}, 2_379_264),
        ("pfeiffer", {"rank": 8}, 156_768),
        ("pfeiffer", {"rank": 64}, 1_189_632),
        ("pfeiffer", {"rank": 64, "norm": True}, 1_208_064),
        ("adapterdrop", {}, 99_136),
        ("adapterdrop", {"norm": True}, 100_672),
        ("compacter", {}, 59_968),
        ("compacter", {"which": "mlp", "norm": True}, 48_448),
        ("compacter", {"which": "mlp", "norm": True, "fixed": True}, 48_384),
        ("adaptformer", {"rank": 8}, 156_768),
        ("adaptformer", {"rank": 8, "bias": False}, 147_456),
        ("adaptformer", {"rank": 8, "learnable": True}, 156_780),
        ("adaptformer", {"rank": 32}, 599_424),
        ("adaptformer", {}, 1_189_632),
        ("convpass", {}, 327_552),
        ("convpass", {"which": "attn"}, 163_776),
        ("convpass", {"rank": 16}, 664_320),
        ("transformer-probing", {}, 7_087_872),
    ],
)
def test_counts_on_vit_b(name, options, count):
    plan = deltavit.plan(skeleton("vit_base_patch16_224"), deltavit.method(name, **options))
    assert plan.trainable_parameters == count
    assert not plan.mergeable


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("houlsby", {"rank": 0}, "rank must be at least 1, got 0"),
        ("houlsby", {"act": "tanh"}, "act = 'tanh' is not 'gelu' or 'relu'"),
        ("pfeiffer", {"where": {"roles": ["q"]}}, r"where.roles=\['q'\] selects matrices.*where.blocks selects blocks"),
        ("adapterdrop", {"top": 0}, "top must be at least 1, got 0"),
        ("adapterdrop", {"where": {"blocks": [0]}}, "where"),
        ("adapterdrop", {"top": 4}, "adapterdrop.top=4, and tiny has 3 blocks"),
        ("compacter", {"n": 0}, "n must be at least 1, got 0"),
        ("compacter", {"n": 5, "rank": 10}, "n=5 must divide the width and the rank, which are 24 and 10"),
        ("compacter", {"rank": 6}, "n=4 must divide the width and the rank, which are 24 and 6"),
        ("adaptformer", {"where": {"roles": ["fc1"]}}, "selects matrices"),
        ("convpass", {"where": {"roles": ["o"]}}, "selects matrices"),
        ("convpass", {"init": "zero"}, "init = 'zero' is not 'identity' or 'xavier'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, options, message):
    with pytest.raises(MethodError, match=message) as error:
        deltavit.plan(FAMILIES["tiny"](), deltavit.method(name, **options))
    assert "\n" not in str(error.value)
