"""Partial fine-tuning: which tensors each strategy trains."""

import functools

import pytest
import torch
from families import FAMILIES

import deltavit
from deltavit.core.attach import plan
from deltavit.core.errors import MethodError
from deltavit.models import skeleton

base = functools.cache(skeleton)
ATTENTION, FFN = 2_362_368, 4_722_432  # of one block of ViT-B/16, weights and biases


@pytest.mark.parametrize(
    ("strategy", "blocks", "each"),
    [
        ("attention", range(12), ATTENTION),
        ("ffn", range(12), FFN),
        ("attention-first", range(6), ATTENTION),
        ("attention-last", range(6, 12), ATTENTION),
        ("ffn-first", range(6), FFN),
        ("ffn-last", range(6, 12), FFN),
        ("both-first", range(6), ATTENTION + FFN),
        ("both-last", range(6, 12), ATTENTION + FFN),
    ],
)
def test_a_strategy_is_parts_times_blocks(strategy, blocks, each):
    made = plan(base("vit_base_patch16_224"), deltavit.method("partial", strategy=strategy))
    assert made.trainable_parameters == len(blocks) * each
    assert {int(name.split(".")[1]) for name in made.shapes} == set(blocks)
    parts = {"attention": {"attn"}, "ffn": {"mlp"}, "both": {"attn", "mlp"}}[strategy.split("-")[0]]
    assert {name.split(".")[2] for name in made.shapes} == parts
    assert not [name for name in made.shapes if "norm" in name]


def test_the_middle_block_of_an_odd_number_is_in_both_halves():
    model = deltavit.load_model("tiny")
    for strategy, blocks in (("ffn-first", {"0", "1"}), ("ffn-last", {"1", "2"})):
        made = plan(model, deltavit.method("partial", strategy=strategy))
        assert {name.split(".")[1] for name in made.shapes} == blocks


def test_layers_name_any_sub_modules():
    made = plan(deltavit.load_model("tiny"), deltavit.method("partial", strategy="ffn", layers="0.attention,-1.ffn"))
    kinds = [f"blocks.0.attn.{role}.{kind}" for role in "qkvo" for kind in ("weight", "bias")]
    kinds += [f"blocks.2.mlp.{linear}.{kind}" for linear in ("fc1", "fc2") for kind in ("weight", "bias")]
    assert list(made.shapes) == kinds


def test_biases_beside_a_fused_projection_and_gates_of_an_mlp_are_among_them():
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= set(plan(FAMILIES["eva"](), "partial").shapes)
    gated = plan(FAMILIES["eva02"](), deltavit.method("partial", strategy="ffn")).shapes
    assert {"blocks.1.mlp.fc1_g.weight", "blocks.1.mlp.fc1_x.weight", "blocks.1.mlp.fc2.bias"} <= set(gated)


@pytest.mark.parametrize("layer", ["3", "attention", "3.mlp", "first.ffn", "3.ffn.fc1"])
def test_a_layer_that_is_none_is_refused(layer):
    with pytest.raises(MethodError, match=f"layers has '{layer}'.*'3.attention' or '7.ffn'"):
        deltavit.method("partial", layers=[layer])


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(MethodError, match="blocks 0 to 2, asked for 3"):
        plan(deltavit.load_model("tiny"), deltavit.method("partial", layers=["3.ffn"]))


@pytest.mark.parametrize("last", [1, 3])
def test_partial_k_is_the_last_blocks_and_the_final_norm(last):
    model = deltavit.load_model("tiny")
    want = {n for n, _ in model.named_parameters() if n.startswith("norm.")}
    want |= {n for n, _ in model.named_parameters() if n.split(".")[0] == "blocks" and int(n.split(".")[1]) >= 3 - last}
    assert set(plan(model, deltavit.method("partial-k", last=last)).shapes) == want


def test_partial_k_has_every_norm_after_the_blocks():
    names = set(plan(FAMILIES["siglip"](), "partial-k").shapes)
    assert {"norm.weight", "attn_pool.norm.weight"} <= names
    assert "blocks.0.norm1.weight" not in names


@pytest.mark.parametrize(("last", "why"), [(0, "last must be at least 1, got 0"), (4, "last=4, and tiny has 3 blocks")])
def test_partial_k_refuses(last, why):
    with pytest.raises(MethodError, match=why):
        plan(deltavit.load_model("tiny"), deltavit.method("partial-k", last=last))


def test_what_is_not_chosen_keeps_its_values():
    model = deltavit.load_model("tiny")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = deltavit.attach(model, deltavit.method("partial", layers=["1.ffn"]))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1)
    adapter.merge()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [f"blocks.1.mlp.{linear}.{kind}" for linear in ("fc1", "fc2") for kind in ("weight", "bias")]
