"""What each model family says of itself, held against what its models do."""

import copy
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn import functional as F

import deltavit
from deltavit import Where
from deltavit.core.contract import pictures
from deltavit.core.edit import After, Before, LowRank, Rewrite
from deltavit.core.method import Method


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@dataclass(frozen=True)
class These(Method):
    """The edits that a test makes by hand."""

    make: object

    name = "these"

    def edits(self, vit):
        return iter(self.make(vit))


def watched(model, paths, x=None):
    """What enters and what leaves the modules at these paths, in one forward pass."""
    seen, handles = {}, []
    for path in dict.fromkeys(paths):

        def keep(module, args, kwargs, y, path=path):
            entered = args[0] if args else next(iter(kwargs.values()))
            seen[path] = entered.detach(), (y[0] if isinstance(y, tuple) else y).detach()

        handles.append(model.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(pictures(model).to(next(model.parameters()).dtype) if x is None else x)
    for handle in handles:
        handle.remove()
    return seen


def linear_roles(vit):
    return tuple(dict.fromkeys(role for linears in vit.linears for role in linears))


# --- sites -----------------------------------------------------------------------------------------------------------


def test_sites_are_the_rows_that_the_model_reads(model):
    """Changing the rows of one site changes the output, and all sites together cover each matrix once."""
    vit = deltavit.anatomy(model)
    covered = {}
    for linears in vit.linears:
        for site in linears.values():
            covered.setdefault(site.tensor, []).append(site.rows)
            assert model.get_parameter(site.tensor).shape[1] == site.shape[1]
            assert site.shape[0] == site.rows[1] - site.rows[0]
    for tensor, rows in covered.items():
        rows.sort()
        assert [a for a, _ in rows] == [0, *(b for _, b in rows[:-1])]
        assert rows[-1][1] == model.get_parameter(tensor).shape[0]
    x = pictures(model)
    with torch.no_grad():
        base = model(x)
        for role, site in vit.linears[0].items():
            W = model.get_parameter(site.tensor)
            kept = W.clone()
            W[slice(*site.rows)] += torch.randn(site.shape)
            assert not torch.equal(model(x), base), role
            W.copy_(kept)


class RankOne(LowRank):
    def __init__(self, site):
        out, inp = site.shape
        super().__init__(shift=None if site.shift is None else nn.Parameter(torch.randn(out) / 8))
        self.up, self.down = nn.Parameter(torch.randn(out, 1) / 8), nn.Parameter(torch.randn(1, inp) / 8)

    def factors(self):
        return self.up, self.down


@pytest.mark.parametrize("grad", [False, True])
def test_a_change_of_every_site_is_the_same_edit_of_the_raw_weights_and_biases(model, grad):
    """With and without gradients: nn.MultiheadAttention has a kernel of its own for each."""
    model = model.double()
    raw, x = copy.deepcopy(model), pictures(model).double()
    vit = deltavit.anatomy(model)
    sites = vit.sites(Where(roles=linear_roles(vit)))
    adapter = deltavit.attach(model, These(lambda vit: [Rewrite(site, RankOne(site)) for site in sites]))
    with torch.no_grad():
        base = raw(x)
        for edit in adapter.edits:
            site = edit.site
            raw.get_parameter(site.tensor)[slice(*site.rows)] += edit.change.up @ edit.change.down
            if site.shift is not None:
                path, name, rows = site.shift
                raw.get_submodule(path).get_parameter(name)[slice(*rows)] += edit.change.shift
    with torch.set_grad_enabled(grad):
        one, two = model(x), raw(x)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    assert not torch.allclose(two, base, atol=1e-3)


def test_norms_are_all_there_in_the_order_of_the_computation(model):
    vit = deltavit.anatomy(model)
    scales = [n for n, m in model.named_modules() if getattr(m._parameters.get("weight"), "ndim", 0) == 1]
    ran = list(watched(model, scales))
    assert ran == vit.norms
    x = pictures(model)
    with torch.no_grad():
        base = model(x)
        final = model.get_submodule(vit.norms[-1])
        final.weight += 1
        assert not torch.allclose(model(x), base)


def test_tables_of_relative_positions_are_all_there_and_read(model):
    vit = deltavit.anatomy(model)
    tables = [n for n, p in model.named_parameters() if "relative_position" in n and p.ndim == 2]
    assert vit.tables == [n for n in tables if n.rsplit(".", 1)[-1] == "relative_position_bias_table"]
    x = pictures(model)
    with torch.no_grad():
        for table in vit.tables:
            base = model(x)
            p = model.get_parameter(table)
            p += torch.randn_like(p)
            assert not torch.allclose(model(x), base)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_anatomy_knows_tokens_maps_widths_and_head(model):
    vit = deltavit.anatomy(model)
    assert len(vit.blocks) == len(vit.attn) == len(vit.mlp) == len(vit.before_attn) == len(vit.before_mlp)
    seen = watched(model, [*vit.blocks, *vit.attn, *vit.mlp])
    for b, block in enumerate(vit.blocks):
        for path, (rows, columns) in ((block, vit.grids[b]), (vit.attn[b], vit.windows[b]), (vit.mlp[b], vit.grids[b])):
            x, y = seen[path]
            assert x.shape[-1] == y.shape[-1] == vit.widths[b]
            tokens = (rows, columns) if x.ndim == 4 else (vit.prefix + rows * columns,)
            assert x.ndim == 3 or vit.prefix == 0
            assert x.shape[1:-1] == y.shape[1:-1] == tokens, path
    assert (vit.grid, vit.width) == (vit.grids[0], vit.widths[0])
    assert model.get_submodule(vit.head).in_features == vit.features
    assert not any(name.startswith(vit.head + ".") for name in vit.tensors())


@torch.no_grad()
def test_pool_says_what_the_head_reads(model):
    vit, x = deltavit.anatomy(model), pictures(model)
    base = model(x)

    def moves(tokens):
        def change(module, args, y):
            new = (y[0] if isinstance(y, tuple) else y).clone()
            new[:, tokens] += torch.randn_like(new[:, tokens])
            return (new, *y[1:]) if isinstance(y, tuple) else new

        handle = model.get_submodule(vit.blocks[-1]).register_forward_hook(change)
        moved = not torch.allclose(model(x), base, atol=1e-6)
        handle.remove()
        return moved

    assert moves(slice(vit.prefix, None)) == (vit.pool == "all")
    if vit.pool == "token":
        assert moves(slice(0, 1))
        assert not moves(slice(1, None))


class Insert(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.at, self.prompt = vit.prefix, nn.Parameter(torch.randn(1, 2, vit.width))

    def forward(self, x):
        return torch.cat([x[:, : self.at], self.prompt.expand(len(x), -1, -1), x[:, self.at :]], 1)


class Remove(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.at = vit.prefix

    def forward(self, x, y):
        return torch.cat([y[:, : self.at], y[:, self.at + 2 :]], 1)


def test_two_tokens_can_be_inserted_where_nothing_speaks_against_it(model):
    vit, x = deltavit.anatomy(model), pictures(model)
    base = model(x)
    deltavit.attach(
        model,
        These(
            lambda vit: [
                Before(vit.blocks[0], Insert(vit), "blocks.0.prompt"),
                After(vit.blocks[-1], Remove(vit), "blocks.1.prompt"),
            ]
        ),
    )
    if vit.fixed_tokens:
        with pytest.raises((RuntimeError, ValueError, AssertionError, IndexError)):
            model(x)
        return
    y = model(x)
    assert y.shape == base.shape
    assert y.isfinite().all()
    assert not torch.allclose(y, base)


# --- branches --------------------------------------------------------------------------------------------------------


def test_the_residual_stream_is_where_the_anatomy_says(model):
    """It enters `before_attn` and `before_mlp`, and a block puts out that plus what the MLP branch gives, scaled."""
    model = model.double()
    vit = deltavit.anatomy(model)
    seen = watched(model, [*vit.blocks, *vit.before_attn, *vit.before_mlp, *vit.mlp, *vit.norms])
    for b, block in enumerate(vit.blocks):
        x, y = seen[block]
        entered = seen[vit.before_attn[b]][0]
        if entered.numel() == x.numel() and len(entered) != len(x):  # in windows
            entered, x = entered.flatten().sort().values, x.flatten().sort().values
        torch.testing.assert_close(entered.reshape(x.shape), x)
        middle = seen[vit.before_mlp[b]][0].reshape(-1, vit.widths[b])
        given = seen[vit.mlp[b]][1]
        if vit.before_mlp[b] == vit.mlp[b]:
            given = seen[[n for n in vit.norms if n.startswith(block + ".")][-1]][1]
        given, added = given.reshape(middle.shape), y.reshape(middle.shape) - middle
        gamma = (given * added).sum(0) / given.square().sum(0)  # LayerScale
        torch.testing.assert_close(added, given * gamma, rtol=0, atol=1e-9)
        assert gamma.abs().max() > 1e-3


class Bias(nn.Module):
    """What is added to the scores, whatever the tokens are."""

    def __init__(self, scores):
        super().__init__()
        self.register_buffer("scores", scores)

    def forward(self, x):
        return self.scores


def biased(vit, scores):
    made = [Before(path, Bias(scores), f"blocks.{b}.attn", into=vit.scores) for b, path in enumerate(vit.attn)]
    return These(lambda vit: made)


def test_the_concatenated_heads_enter_after_heads_and_the_mask_reaches_the_scores(model):
    """A head whose tokens see but themselves hands on its rows of v; heads without such a mask do not."""
    model = model.double()
    vit = deltavit.anatomy(model)
    paths = [path for path in vit.after_heads if path]
    seen = watched(model, [*paths, *vit.attn])
    for b, path in enumerate(paths):
        assert seen[path][0].shape == (*seen[vit.attn[b]][0].shape[:-1], vit.linears[b]["o"].shape[1])
    if not vit.scores:
        return
    tokens = vit.prefix + vit.grid[0] * vit.grid[1]
    alone = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).fill_diagonal_(0)
    scores = torch.zeros(vit.heads, tokens, tokens, dtype=torch.float64)
    scores[1] = alone
    adapter = deltavit.attach(model, biased(vit, scores))
    seen = watched(model, [*paths, *vit.attn])
    for b, path in enumerate(paths):
        site, x = vit.linears[b]["v"], seen[vit.attn[b]][0]
        v = x @ model.get_parameter(site.tensor)[slice(*site.rows)].t()
        if site.shift is not None:
            host, name, rows = site.shift
            v = v + model.get_submodule(host).get_parameter(name)[slice(*rows)]
        heads, v = (t.unflatten(-1, (vit.heads, -1)) for t in (seen[path][0], v))
        torch.testing.assert_close(heads[..., 1, :], v[..., 1, :])
        assert not torch.allclose(heads[..., 0, :], v[..., 0, :], atol=1e-3)
    adapter.detach()


@torch.no_grad()
def test_the_scores_take_a_bias_in_every_kernel(model):
    """In the fused kernel and in the plain one alike; a constant for all keys is nothing to softmax."""
    model = model.double()
    vit, x = deltavit.anatomy(model), pictures(model).double()
    if not vit.scores:
        pytest.skip("it takes no bias")
    tokens = vit.prefix + vit.grid[0] * vit.grid[1]
    scores = torch.randn(vit.heads, tokens, tokens, dtype=torch.float64)
    base, outputs = model(x), []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        for more in (scores, scores + torch.randn(vit.heads, tokens, 1)):
            adapter = deltavit.attach(model, biased(vit, more))
            outputs.append(model(x))
            adapter.detach()
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0])
    assert not torch.allclose(outputs[0], base, atol=1e-4)


def test_tiny_attends_with_the_mask_as_the_formula_says():
    model = FAMILIES["tiny"]()
    attn, x, mask = model.blocks[0].attn, torch.randn(2, 5, 24), torch.randn(3, 5, 5)
    q, k, v = (f(x).view(2, 5, 3, 8).transpose(1, 2) for f in (attn.q, attn.k, attn.v))
    weights = F.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1)
    torch.testing.assert_close(attn(x, mask=mask), attn.o((weights @ v).transpose(1, 2).reshape(2, 5, 24)))


@torch.no_grad()
def test_softmax_sees_the_bias_of_q_and_not_that_of_k(model):
    """Which tells q from k: added to all keys alike, it moves each row of the scores by a constant."""
    model = model.double()
    vit, x = deltavit.anatomy(model), pictures(model).double()
    between = [n for n in vit.norms if n.startswith(vit.attn[0] + ".") and n != vit.after_heads[0]]
    if vit.linears[0]["k"].shift is None or between:
        pytest.skip("k has no bias, or a norm after it")
    for role in "kq":
        base = model(x)
        for linears in vit.linears:
            host, name, rows = linears[role].shift
            model.get_submodule(host).get_parameter(name)[slice(*rows)] += 1
        assert torch.allclose(model(x), base, rtol=0, atol=1e-9) == (role == "k")


@torch.no_grad()
def test_without_v_attention_gives_the_same_for_every_token(model):
    vit = deltavit.anatomy(model)
    assert all(y.flatten(0, -2).std(0).max() > 1e-3 for _, y in watched(model, vit.attn).values())
    for linears in vit.linears:
        site = linears["v"]
        model.get_parameter(site.tensor)[slice(*site.rows)] = 0
        if site.shift is not None:
            host, name, rows = site.shift
            model.get_submodule(host).get_parameter(name)[slice(*rows)] = 0
    for _, y in watched(model, vit.attn).values():
        assert y.flatten(0, -2).std(0).max() < 1e-6
