"""VPT, LePE and RPB against one slow forward pass of a ViT, in which everything they do is written out."""

import math

import pytest
import torch
from families import FAMILIES, ViT, small
from torch.nn import functional as F

import deltavit
from deltavit.core.attach import attach, plan
from deltavit.core.contract import stir
from deltavit.core.errors import MethodError
from deltavit.methods.attention_bias import RelativeBias

REGISTERS = {"reg_tokens": 4, "init_values": 0.1, "no_embed_class": True}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "map"}


def oblong(**options):
    """A ViT on 4 x 6 patches: rows and columns that differ would show in any mix-up."""
    torch.manual_seed(0)
    model = ViT(img_size=(16, 24), patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=7, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.double().eval(), torch.randn(2, 3, 16, 24).double()


def slow(model, x, prompts=(), tables=(), kernels=(), cls=False):
    """The model's logits with prompts, bias tables and kernels, by block: each a dict from the block's number."""
    prompts, tables, kernels = dict(prompts), dict(tables), dict(kernels)
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    patches, count = grid[0] * grid[1], 0
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for b, block in enumerate(model.blocks):
        if b in prompts:
            own = prompts[b].expand(len(x), -1, -1)
            x = torch.cat([x[:, :prefix], own, x[:, prefix + count :]], 1)
            count = own.shape[1]
        attn, heads = block.attn, block.attn.num_heads
        q, k, v = attn.qkv(block.norm1(x)).chunk(3, -1)
        out = torch.zeros_like(v)
        for h, cut in enumerate(torch.arange(v.shape[-1]).chunk(heads)):
            scores = q[..., cut] @ k[..., cut].mT / math.sqrt(len(cut))
            if b in tables:
                scores = scores + loops(tables[b][h], grid, x.shape[1], cls)
            out[..., cut] = scores.softmax(-1) @ v[..., cut]
        if b in kernels:
            weight, bias = kernels[b]
            maps = v[:, -patches:].mT.reshape(len(v), -1, *grid)
            out[:, -patches:] += F.conv2d(maps, weight, bias, padding=1, groups=len(bias)).flatten(2).mT
        x = x + block.ls1(attn.proj(out))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = torch.cat([x[:, :prefix], x[:, prefix + count :]], 1)
    return model.forward_head(model.norm(x))


def loops(table, grid, tokens, cls):
    """One head's bias [N, N], entry by entry.  The class token is the first, patches are the last."""
    h, w = grid
    first = tokens - h * w
    bias = torch.zeros(tokens, tokens, dtype=table.dtype)
    for i in range(tokens):
        for j in range(tokens):
            if i >= first and j >= first:
                (yi, xi), (yj, xj) = divmod(i - first, w), divmod(j - first, w)
                bias[i, j] = table[(yi - yj + h - 1) * (2 * w - 1) + (xi - xj + w - 1)]
            elif cls and i == 0 and j >= first:
                bias[i, j] = table[-3]
            elif cls and i >= first and j == 0:
                bias[i, j] = table[-2]
            elif cls and i == j == 0:
                bias[i, j] = table[-1]
    return bias


def by_block(adapter, end):
    return {int(n.split(".")[1]): t for n, t in adapter.tensors().items() if n.endswith(end)}


@torch.no_grad()
def compare(method, model, x, **options):
    adapter = attach(model, method)
    stir(adapter)
    adapted = model(x)
    tensors = {
        "prompts": by_block(adapter, "prompt.tokens"),
        "tables": by_block(adapter, "rpb.table"),
        "kernels": {
            b: (weight, by_block(adapter, "lepe.bias")[b]) for b, weight in by_block(adapter, "lepe.weight").items()
        },
    }
    adapter.detach()
    assert not torch.allclose(adapted, model(x), atol=1e-6)
    torch.testing.assert_close(adapted, slow(model, x, **tensors, **options), rtol=0, atol=1e-10)
    return tensors


# --- VPT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, REGISTERS, NO_CLASS_TOKEN, {"pre_norm": True}])
@pytest.mark.parametrize(("name", "blocks"), [("vpt-shallow", [0]), ("vpt-deep", [0, 1, 2])])
def test_prompts_enter_behind_the_prefix_are_replaced_and_leave(name, blocks, options):
    used = compare(deltavit.method(name, tokens=5), *oblong(**options))
    assert list(used["prompts"]) == blocks


def test_prompts_are_drawn_from_the_patch_size_and_the_width():
    adapter = attach(deltavit.load_model("tiny"), deltavit.method("vpt-deep", tokens=200))
    bound = math.sqrt(6 / (3 * 4**2 + 24))
    drawn = torch.stack(list(adapter.tensors().values()))
    assert drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_prompt_dropout_acts_in_training_on_each_picture_alone():
    model, x = deltavit.load_model("tiny"), torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    attach(model, deltavit.method("vpt-shallow", dropout=0.5))
    one, two = model.train()(x)
    assert not torch.allclose(one, two)
    one, two = model.eval()(x)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", ["swin", "beit", "eva02"])
def test_models_whose_tokens_are_fixed_refuse_prompts_and_say_why(family):
    model = FAMILIES[family]()
    with pytest.raises(MethodError, match=deltavit.anatomy(model).fixed_tokens):
        plan(model, "vpt-deep")


def test_at_least_one_prompt():
    with pytest.raises(MethodError, match="tokens must be at least 1, got 0"):
        deltavit.method("vpt-shallow", tokens=0)


# --- LePE and RPB ----------------------------------------------------------------------------------------------------

LAST_TOO = {"blocks": [0, 1, 2]}


@pytest.mark.parametrize("options", [{}, REGISTERS, NO_CLASS_TOKEN])
def test_lepe_adds_a_convolution_of_the_values(options):
    used = compare(deltavit.method("lepe", where=LAST_TOO), *oblong(**options))
    assert list(used["kernels"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "cls"), [({}, False), ({}, True), (REGISTERS, False), (REGISTERS, True), (NO_CLASS_TOKEN, False)]
)
def test_rpb_adds_the_tables_entry_of_each_pair(options, cls):
    used = compare(deltavit.method("rpb", cls=cls, where=LAST_TOO), *oblong(**options), cls=cls)
    assert all(table.shape == (3, 7 * 11 + 3 * cls) for table in used["tables"].values())


def test_prompts_have_no_place_in_the_grid():
    used = compare(deltavit.method("vpt-deep+lepe+rpb", rpb={"cls": True}), *oblong(**REGISTERS), cls=True)
    assert all(used.values())


def test_every_entry_of_a_table_is_used():
    bias = RelativeBias(2, (3, 2), cls=True)
    bias(torch.zeros(1, 9, 4)).sum().backward()
    # a table entry stands once for each pair at that distance: 3 - |dy| rows times 2 - |dx| columns; then 6, 6 and 1
    pairs = [(3 - abs(dy)) * (2 - abs(dx)) for dy in range(-2, 3) for dx in range(-1, 2)]
    assert bias.table.grad[0].tolist() == [*pairs, 6, 6, 1]


@pytest.mark.parametrize("name", ["lepe", "rpb"])
def test_the_last_block_is_left_out_where_its_patches_do_not_reach_the_head(name):
    def blocks(model, **options):
        return {edit.name.split(".")[1] for edit in plan(model, deltavit.method(name, **options))}

    assert blocks(small(ViT)) == {"0"}
    assert blocks(small(ViT), where={"blocks": [-1]}) == {"1"}
    assert blocks(small(ViT, **NO_CLASS_TOKEN)) == {"0", "1"}


@pytest.mark.parametrize("family", ["swin", "beit"])
def test_a_model_with_tables_of_its_own_trains_those(family):
    model = FAMILIES[family]()
    tables = [n for n, _ in model.named_parameters() if n.endswith("relative_position_bias_table")]
    assert list(plan(model, "rpb").shapes) == tables
    assert list(plan(model, deltavit.method("rpb", where={"blocks": [-1]})).shapes) == tables[-1:]


@pytest.mark.parametrize(
    ("family", "name", "options", "why"),
    [
        ("eva", "lepe", {}, "reads its weights itself"),
        ("siglip", "rpb", {"cls": True}, "set cls=False"),
        ("swin v2", "rpb", {}, "no way in"),
    ],
)
def test_refusals_have_a_reason(family, name, options, why):
    with pytest.raises(MethodError, match=why):
        plan(FAMILIES[family](), deltavit.method(name, **options))
