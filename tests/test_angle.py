"""Fine-tuned angles: the metric, what it is read from, the selection, and the command."""

import json
import math
import re
from decimal import Decimal, getcontext

import pytest
import safetensors.torch
import torch
from torch import nn

import deltavit
from deltavit.analysis.angle import Angles, angles, compare, fine_tuned_angle, heat_map, joined, select, spearman, turn
from deltavit.analysis.pairs import Pair, of_adapter, of_models, png
from deltavit.core.attach import plan
from deltavit.core.errors import AdapterError, MethodError, ModelError, RecipeError
from deltavit.models import skeleton
from deltavit.train.recipe import read_recipe

SMALL = ["--model", "tiny", "--device", "cpu", "train.batch_size=8", "data.workers=0"]


def disturb(adapter, size=0.1, seed=0):
    """Move everything that trains away from where it started, some of which is zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw))
    return adapter


def tuned(method="full", size=0.1, seed=0, model=None, **options):
    made = deltavit.method(method, **options)
    return disturb(deltavit.attach(model or deltavit.load_model("tiny"), made, classes=3), size, seed)


# --- the metric ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 6e-6, 0.05, 30.0, 90.0, 179.999, 180.0])
def test_seven_known_angles_in_float64(degrees):
    a, b = torch.linalg.qr(torch.randn(400, 2, dtype=torch.float64))[0].T
    turned = 3 * (math.cos(math.radians(degrees)) * a + math.sin(math.radians(degrees)) * b)
    assert fine_tuned_angle(a.view(20, 20), turned.view(20, 20)) == pytest.approx(degrees, rel=1e-7, abs=1e-13)


def test_the_angle_of_float32_weights_is_arccos_in_fifty_digits():
    a = torch.randn(30, 20)
    b = a + 1e-4 * torch.randn(30, 20)
    getcontext().prec = 50
    x, y = ([Decimal(v) for v in t.flatten().double().tolist()] for t in (a, b))
    inner, xx, yy = (sum(p * q for p, q in zip(u, v, strict=True)) for u, v in ((x, y), (x, x), (y, y)))
    half = ((1 - inner / (xx * yy).sqrt()) / 2).sqrt()  # sin of half the angle, all 50 digits of the cosine kept
    assert fine_tuned_angle(a, b) == pytest.approx(math.degrees(2 * math.asin(float(half))), rel=1e-12)


def test_a_positive_multiple_has_angle_zero_and_a_negative_one_180():
    W = torch.randn(5, 7)
    assert fine_tuned_angle(W, 2 * W) == 0
    assert fine_tuned_angle(W, 0.3 * W.double()) < 1e-5
    assert fine_tuned_angle(W, -4 * W) == 180


@pytest.mark.parametrize(
    ("W0", "W1", "why"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"\[2, 3\] before and \[3, 2\] after"),
        (torch.zeros(2), torch.ones(2), "before is all zero, which has no direction"),
        (torch.ones(2), torch.zeros(2), "after is all zero"),
        (torch.ones(2), torch.tensor([1.0, math.nan]), "after has a number that is not finite"),
        (torch.tensor([1.0, math.inf]), torch.ones(2), "before has a number that is not finite"),
    ],
)
def test_what_has_no_angle_is_refused(W0, W1, why):
    with pytest.raises(ValueError, match=why):
        fine_tuned_angle(W0, W1)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 2.0])
def test_turns_join_to_the_turn_of_the_concatenation(size):
    before = [torch.randn(n, dtype=torch.float64) * s for n, s in ((50, 1.0), (200, 0.01), (9, 30.0))]
    after = [W + size * torch.randn(len(W), dtype=torch.float64) for W in before]
    plain = fine_tuned_angle(torch.cat(before), torch.cat(after))
    assert joined([turn(a, b) for a, b in zip(before, after, strict=True)]).degrees == pytest.approx(plain, rel=1e-6)


# --- what it is read from --------------------------------------------------------------------------------------------


def test_a_part_is_its_maps_as_one_vector_and_the_whole_is_all_of_them():
    adapter = tuned()
    found = angles(of_adapter(adapter))
    pairs = {site.name: (W0.double(), W1.double()) for site, W0, W1 in adapter.pairs()}

    def plain(names):
        return fine_tuned_angle(*(torch.cat([pairs[n][i].flatten() for n in names]) for i in (0, 1)))

    assert set(found.sites) == set(pairs)
    for name, angle in found.sites.items():
        assert angle == pytest.approx(plain([name]), rel=1e-12)
    assert found.parts["1.attention"] == pytest.approx(plain([f"blocks.1.{r}" for r in "qkvo"]), rel=1e-12)
    assert found.parts["2.ffn"] == pytest.approx(plain(["blocks.2.fc1", "blocks.2.fc2"]), rel=1e-12)
    assert set(found.parts) == {f"{b}.{part}" for b in range(3) for part in ("attention", "ffn")}
    assert found.whole == pytest.approx(plain(list(pairs)), rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "rlrr", "kadaptation", "fact-tt", "full", "partial", "dora"])
def test_the_weights_are_those_of_the_merged_model(method):
    adapter = tuned(method, model=deltavit.load_model("vit_pico"))
    base = deltavit.load_model("vit_pico")
    read = {p.site.name: p for p in of_adapter(adapter)}
    adapter.merge()
    merged = {p.site.name: p for p in of_models(base, adapter.model)}
    assert list(read) == list(merged)
    for name, pair in read.items():
        assert pair.before.dtype == pair.after.dtype == torch.float64
        assert torch.equal(pair.before, merged[name].before)
        torch.testing.assert_close(pair.after, merged[name].after, rtol=1e-5, atol=1e-6)
        if method == "lora" and name.endswith((".k", ".o", ".fc1", ".fc2")):
            assert not pair.changed


def test_reading_an_adapter_leaves_the_model_alone():
    adapter = tuned("lora+bitfit")
    state = {name: (t.dtype, t.clone()) for name, t in adapter.model.state_dict().items()}
    angles(of_adapter(adapter, biases=True, norms=True))
    assert adapter.state == "attached"
    for name, t in adapter.model.state_dict().items():
        assert (t.dtype, t.tolist()) == (state[name][0], state[name][1].tolist())


def test_what_did_not_change_is_in_its_part_but_has_no_angle_of_its_own():
    found = angles(of_adapter(tuned("lora")))
    assert {name.split(".")[2] for name in found.sites} == {"q", "v"}
    assert set(found.parts) == {f"{b}.attention" for b in range(3)}
    assert 0 < found.parts["0.attention"] < max(found.sites["blocks.0.q"], found.sites["blocks.0.v"])
    assert found.whole < max(found.parts.values())


def test_biases_and_norms_count_only_when_asked():
    adapter = tuned("layernorm+bitfit")
    with pytest.raises(MethodError, match="changes no matrix of the blocks of tiny"):
        angles(of_adapter(adapter))
    assert set(angles(of_adapter(adapter, norms=True)).parts) == {f"{b}.norm" for b in range(3)}
    found = angles(of_adapter(adapter, biases=True))
    assert {"0.attention", "2.ffn"} <= set(found.parts)
    plain = [Pair(p.site, p.before[:, :-1], p.after[:, :-1]) for p in of_adapter(adapter, biases=True)]
    assert not any(p.changed for p in plain)  # the last column is the bias, and only that moved


def test_methods_without_weights_and_two_architectures_are_refused():
    with pytest.raises(MethodError, match="vpt-deep changes no matrix"):
        angles(of_adapter(tuned("vpt-deep")))
    with pytest.raises(ModelError, match=r"two architectures: .* has shape"):
        list(of_models(deltavit.load_model("tiny"), deltavit.load_model("vit_pico")))


def test_nan_zero_and_untouched_weights_are_one_line_each():
    for value, why in ((math.nan, "not finite"), (0.0, "after is all zero")):
        one, two = deltavit.load_model("tiny"), deltavit.load_model("tiny")
        nn.init.constant_(two.blocks[1].mlp.fc1.weight, value)
        with pytest.raises(ModelError, match=f"blocks.1.fc1: the weight .*{why}"):
            angles(of_models(one, two))
    with pytest.raises(AdapterError, match="no weight changed"):
        angles(of_models(deltavit.load_model("tiny"), deltavit.load_model("tiny")))


# --- selection and comparison ----------------------------------------------------------------------------------------


ONE = Angles({}, {"0.attention": 1.0, "0.ffn": 5.0, "1.attention": 4.0, "1.ffn": 6.0, "2.ffn": 2.0, "2.norm": 9.0}, 3.0)


@pytest.mark.parametrize(
    ("k", "options", "layers"),
    [
        (2, {}, ("0.ffn", "1.ffn")),
        (2, {"largest": False}, ("0.attention", "2.ffn")),
        (1, {"per_part": True}, ("1.attention", "1.ffn")),
        (2, {"per_part": True, "largest": False}, ("0.attention", "0.ffn", "1.attention", "2.ffn")),
        (5, {}, ("0.attention", "0.ffn", "1.attention", "1.ffn", "2.ffn")),
    ],
)
def test_select_takes_the_k_largest_or_smallest_in_the_order_of_the_model(k, options, layers):
    assert select(ONE, k, **options) == layers


def test_of_equal_angles_the_first_block_is_selected():
    assert select(Angles({}, {"10.ffn": 1.0, "2.ffn": 1.0}, 1.0), 1) == ("2.ffn",)


@pytest.mark.parametrize(("k", "per_part", "known"), [(6, False, 5), (3, True, 2), (0, False, 5)])
def test_a_selection_that_is_empty_or_too_large_is_refused(k, per_part, known):
    with pytest.raises(RecipeError, match=f"cannot select {k}: {known} parts .* choose 1 to {known}"):
        select(ONE, k, per_part=per_part)


def test_a_selection_trains_exactly_these_modules():
    layers = select(ONE, 2)
    made = plan(deltavit.load_model("tiny"), deltavit.method("partial", layers=layers))
    want = {f"blocks.{b}.mlp.{m}.{kind}" for b in (0, 1) for m in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert set(made.shapes) == want


def test_a_selection_counts_as_the_sum_of_its_modules_on_vit_b():
    layers = ("0.attention", "3.attention", "3.ffn", "11.ffn")
    made = plan(skeleton("vit_base_patch16_224"), deltavit.method("partial", layers=layers))
    D = 768
    assert made.trainable_parameters == 2 * (4 * D * D + 4 * D) + 2 * (8 * D * D + 5 * D)


def test_spearman_is_the_correlation_of_ranks_with_ties_shared():
    assert spearman([1, 2, 3], [10, 20, 1e9]) == pytest.approx(1)
    assert spearman([1, 2, 3], [5, 4, 3]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1.5, 1.5, 3, 4
    assert spearman([1, 1], [1, 2]) is None
    assert spearman([1], [2]) is None


def test_two_sources_are_compared_part_by_part_over_what_both_have():
    two = Angles({}, {"0.attention": 3.0, "1.attention": 1.0, "0.ffn": 7.0, "1.ffn": 8.0, "5.ffn": 99.0}, 1.0)
    attention, ffn, both = compare(ONE, two)
    assert (attention.spearman, attention.k, attention.largest, attention.smallest) == (pytest.approx(-1), 1, 0, 0)
    assert (ffn.layers, ffn.spearman, ffn.largest) == (2, pytest.approx(1), 1)
    assert (both.layers, both.k, both.largest, both.smallest) == (4, 2, 1, 1)
    (alone,) = compare(ONE, Angles({}, {"0.ffn": 1.0, "2.ffn": 3.0}, 1.0))
    assert (alone.part, alone.layers) == ("ffn", 2)
    with pytest.raises(AdapterError, match="no part in common"):
        compare(ONE, Angles({}, {"7.ffn": 1.0}, 1.0))


def test_the_heat_map_is_the_same_bytes_for_the_same_angles():
    pytest.importorskip("matplotlib")
    found = angles(of_adapter(tuned("partial", layers=("0.ffn", "2.attention"))))
    one, two = (png(heat_map(found, "cost in $")) for _ in range(2))
    assert one == two
    assert one.startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_warm_up_run_becomes_a_recipe_of_partial_tuning_and_agrees_with_itself(run, pictures, tmp_path):
    out = tmp_path / "angles"
    words = ["analyze", "angle", "--data", pictures, *SMALL, "--epochs", "1", "--select", 2, "--out", out]
    code, told, said = run(*words, "train.epochs=9", "--json")
    assert code == 0, said
    values = json.loads(told.splitlines()[-1])
    assert len(values["parts"]) == 6
    assert set(values["selected"]) == set(sorted(values["parts"], key=values["parts"].get)[-2:])
    recipe = read_recipe(out / "partial.toml")
    assert recipe.build_method().layers == tuple(values["selected"])
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.batch_size) == (9, 1e-4, 8)
    assert recipe.data.path == str(pictures)
    done = json.loads((out / "warm-up" / "run.json").read_text())
    assert (done["epochs"], done["test_accuracy"], done["method"]) == (1, None, "full")
    assert not (out / "warm-up" / "test-reads.jsonl").exists()
    assert json.loads((out / "angles.json").read_text())["parts"] == values["parts"]

    code, told, said = run(
        "analyze", "angle", "--adapter", out / "warm-up", "--against", out / "warm-up" / "adapter.safetensors",
        "--select", 1, "--per-part", "--smallest", "--out", tmp_path / "again", "train.lr=0.5", "--json",
    )  # fmt: skip
    assert code == 0, said
    again = json.loads(told.splitlines()[-1])
    assert again["parts"] == values["parts"]
    assert [row["spearman"] for row in again["against"]] == [pytest.approx(1)] * 3
    assert {layer.split(".")[1] for layer in again["selected"]} == {"attention", "ffn"}
    recipe = read_recipe(tmp_path / "again" / "partial.toml")
    assert (recipe.train.lr, recipe.data.path, recipe.model.name) == (0.5, str(pictures), "tiny")
    code, told, said = run("train", "--recipe", tmp_path / "again" / "partial.toml", "--out", tmp_path / "run",
                           "--epochs", 1, "--json")  # fmt: skip
    assert code == 0, said


def test_a_pair_of_checkpoints_gives_the_angles_of_the_adapter(run, tmp_path):
    base, adapter = deltavit.load_model("vit_pico"), tuned("lora", model=deltavit.load_model("vit_pico"))
    adapter.save(tmp_path / "adapter.safetensors")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    adapter.merge()
    safetensors.torch.save_file(adapter.model.state_dict(), tmp_path / "lora.safetensors")
    one = run("analyze", "angle", "--adapter", tmp_path / "adapter.safetensors", "--out", tmp_path / "1", "--json")
    two = run(
        "analyze", "angle", "--model", "vit_pico", "--weights", tmp_path / "base.safetensors", "--checkpoint",
        tmp_path / "lora.safetensors", "--out", tmp_path / "2", "--json",
    )  # fmt: skip
    assert one[0] == two[0] == 0, one[2] + two[2]
    a, b = (json.loads(done[1].splitlines()[-1])["sites"] for done in (one, two))
    assert a == {name: pytest.approx(angle, rel=1e-4) for name, angle in b.items()}


def test_without_a_recipe_beside_it_the_file_says_how_it_was_trained(run, tmp_path):
    adapter = tuned("full")
    adapter.save(tmp_path / "plain.safetensors")
    adapter.summary = {"recipe": {"train": {"lr": 0.25, "epochs": 7}, "data": {"val": 0.2, "train_on": "train"}}}
    adapter.save(tmp_path / "told.safetensors")
    for name, lr, val in (("plain", 1e-4, 0.1), ("told", 0.25, 0.2)):
        code, _, said = run("analyze", "angle", "--adapter", tmp_path / f"{name}.safetensors", "--select", 1, "--out",
                            tmp_path / name, "data.path=here")  # fmt: skip
        assert code == 0, said
        recipe = read_recipe(tmp_path / name / "partial.toml")
        assert (recipe.train.lr, recipe.data.val, recipe.data.path) == (lr, val, "here")


def test_a_person_reads_a_table(run, tmp_path):
    tuned("lora").save(tmp_path / "adapter.safetensors")
    code, told, said = run("analyze", "angle", "--adapter", tmp_path, "--select", 1, "--out", tmp_path / "o")
    assert code == 0, said
    assert "block" in told
    assert "all blocks as one vector" in told
    assert "train them: deltavit train --recipe" in told


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "give one source of angles"),
        (["--adapter", "A", "--data", "pictures"], "not --adapter and --data"),
        (["--adapter", "A", "train.lr=1"], "train.lr=1 is for a recipe"),
        (["--checkpoint", "A"], "does not say which model it is of"),
        (["--adapter", "A", "--select", "4"], "cannot select 4: 3 parts"),
        (["--adapter", "A", "--select", "0"], "cannot select 0"),
        (["--adapter", "A", "--model", "vit_pico"], "was trained on tiny .* this model is vit_pico .*load that base"),
        (["--checkpoint", "P", "--model", "tiny"], "does not fit tiny"),
        (["--adapter", "V"], "vpt-deep changes no matrix"),
    ],
)
def test_each_bad_input_is_one_line(run, tmp_path, words, why):
    files = {"A": "lora", "V": "vpt-deep"}
    for name, method in files.items():
        tuned(method).save(tmp_path / f"{name}.safetensors")
    safetensors.torch.save_file(deltavit.load_model("vit_pico").state_dict(), tmp_path / "P.safetensors")
    paths = [str(tmp_path / f"{w}.safetensors") if w in (*files, "P") else w for w in words]
    code, _, said = run("analyze", "angle", *paths, "--out", tmp_path / "out")
    assert code == 1
    assert said.count("\n") == 1, said
    assert re.search(why, said), said
