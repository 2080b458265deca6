"""The faults that docs/findings.md lists: each shown on its own formula, and shown to be absent from our methods."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltavit
from deltavit import attach, load_model, method
from deltavit.core.site import anatomy
from deltavit.methods.fastfood import walsh_hadamard
from deltavit.methods.rlrr import RLRR
from deltavit.train import evaluate
from deltavit.train.recipe import Recipe

run_module = importlib.import_module("deltavit.train.run")

PAGE = Path(__file__).parent.parent / "docs" / "findings.md"


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(parameters, loss, steps=50, lr=0.1):
    """Which of these have moved at all after many steps of SGD."""
    parameters = dict(parameters)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return {name for name, p in parameters.items() if not torch.equal(p.detach(), start[name])}


def all_of_ours_move(name, **options):
    """Every tensor that a method of ours declares trainable has moved after three steps."""
    model = load_model("tiny").double()
    adapter = attach(model, method(name, **options), classes=3)
    x, y = numbers(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    names = set(adapter.tensors())
    assert moved(adapter.tensors().items(), lambda: F.cross_entropy(model(x), y), steps=3) == names


def images_are_independent(name, **options):
    model = load_model("tiny").double()
    adapter = attach(model, method(name, **options), classes=3)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.1 * numbers(*p.shape, seed=i))
        x = numbers(4, 3, 16, 16)
        torch.testing.assert_close(model(x)[:1], model(x[:1]))


# --- factors that start at zero --------------------------------------------------------------------------------------


def test_a_product_of_two_zero_factors_never_trains():
    u, v, bias = (nn.Parameter(torch.zeros(*shape, dtype=torch.float64)) for shape in ((8, 1), (1, 6), (8,)))
    x, target = numbers(16, 6), numbers(16, 8, seed=1)
    trained = {"u": u, "v": v, "bias": bias}
    assert moved(trained.items(), lambda: F.mse_loss(x @ (u @ v).T + bias, target)) == {"bias"}
    assert not u.grad.any()
    assert not v.grad.any()
    all_of_ours_move("kadaptation", bias=True)


@pytest.mark.parametrize("act", [F.gelu, F.relu])
def test_a_bottleneck_of_two_zero_matrices_only_learns_its_last_bias(act):
    adapter = nn.ModuleDict({"down": nn.Linear(8, 2), "up": nn.Linear(2, 8)}).double()
    for p in adapter.parameters():
        nn.init.zeros_(p)
    y, target = numbers(16, 8), numbers(16, 8, seed=1)

    def loss():
        return F.mse_loss(y + adapter["up"](act(adapter["down"](y))), target)

    assert moved(adapter.named_parameters(), loss) == {"up.bias"}
    all_of_ours_move("pfeiffer", act=act.__name__)


def test_a_lora_with_its_zero_in_the_wrong_place_is_dead_in_v_and_moves_the_base_in_q():
    x, target = numbers(16, 6), numbers(16, 8, seed=1)
    drawn = [nn.Parameter(numbers(*shape, seed=i)) for i, shape in enumerate(((2, 6), (8, 2)))]
    dead = [nn.Parameter(torch.zeros_like(p)) for p in drawn]
    assert (drawn[1] @ drawn[0]).norm() > 1  # q is another model from the first step on
    assert moved(zip("AB", dead, strict=True), lambda: F.mse_loss(x @ (dead[1] @ dead[0]).T, target)) == set()

    model = load_model("tiny").double()
    before = model(numbers(2, 3, 16, 16))
    attach(model, method("lora"))
    torch.testing.assert_close(model(numbers(2, 3, 16, 16)), before, atol=0, rtol=0)
    all_of_ours_move("lora")


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_reshape_without_its_transpose_mixes_the_images_of_a_batch():
    tokens, batch, heads, width = 5, 4, 2, 6
    delta = numbers(tokens, batch, width)  # CLIP's order

    def released(d):
        return d.reshape(d.shape[1] * heads, tokens, width // heads)

    def right(d):
        return d.view(tokens, d.shape[1] * heads, width // heads).transpose(0, 1)

    for image in range(batch):
        alone, own = delta[:, [image]], slice(image * heads, (image + 1) * heads)
        assert torch.equal(right(delta)[own], right(alone))
        assert not torch.equal(released(delta)[own], right(alone))
        assert not torch.equal(released(delta)[own], released(alone))
    assert not torch.equal(released(delta[:, :1]), right(delta[:, :1]))  # heads and tokens, with one image already
    images_are_independent("kadaptation")
    images_are_independent("lora")


def test_a_reshape_of_r_r_4_interleaves_the_slices_and_a_permute_keeps_them():
    rank, V, U = 3, numbers(8, 3), numbers(3, 8, seed=1)
    cores = numbers(rank, rank, 4, seed=2)
    apart = torch.cat([V @ cores[:, :, j] @ U for j in range(4)])

    def stacked(wide):  # four slices side by side, [r, 4r]
        return torch.cat([V @ wide[:, j * rank : (j + 1) * rank] @ U for j in range(4)])

    assert not torch.allclose(stacked(cores.reshape(rank, 4 * rank)), apart)
    torch.testing.assert_close(stacked(cores.permute(0, 2, 1).reshape(rank, 4 * rank)), apart)


def test_each_slice_of_our_fact_tk_is_the_tucker_form_of_its_own_row():
    vit = anatomy(load_model("tiny").double())
    for edit in method("fact-tk", rank=3).edits(vit):
        if edit.site.role not in ("fc1", "fc2"):
            continue
        change = edit.change.double()
        with torch.no_grad():
            change.v.copy_(numbers(*change.v.shape))
        own = change.positions[change.at : change.at + 4]
        slices = [change.v @ torch.einsum("m,mab->ab", row, change.core) @ change.u for row in own]
        plain = torch.cat(slices, 0 if edit.site.role == "fc1" else 1)
        torch.testing.assert_close(change.weight(torch.zeros_like(plain)), plain)


def test_a_substring_makes_block_1_select_10_and_11():
    names = [f"blocks.{b}.attn.qkv.weight" for b in range(12)]
    assert [b for b, name in enumerate(names) if "blocks.1" in name] == [1, 10, 11]
    vit = anatomy(load_model("vit_tiny_patch16_224", weights="random"))
    sites = vit.sites(deltavit.Where(roles=("q",), blocks=(1,)))
    assert [site.block for site in sites] == [1]


# --- scales ----------------------------------------------------------------------------------------------------------


class OnceTooOften(torch.autograd.Function):
    """A Walsh-Hadamard transform whose backward divides by sqrt(n), which its forward does not."""

    @staticmethod
    def forward(ctx, x):
        return walsh_hadamard(x)

    @staticmethod
    def backward(ctx, g):
        return walsh_hadamard(g) / len(g) ** 0.5


def test_a_fastfood_backward_divided_by_sqrt_n_at_each_transform_is_the_gradient_over_n():
    length, gauss, target = 64, numbers(64), numbers(64, seed=1)
    grads = []
    for transform in (OnceTooOften.apply, walsh_hadamard):
        theta = nn.Parameter(numbers(64, seed=2))
        (transform(gauss * transform(theta)) * target).sum().backward()
        grads.append(theta.grad)
    torch.testing.assert_close(grads[0] * length, grads[1])
    theta = numbers(64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: walsh_hadamard(gauss * walsh_hadamard(t)), theta)


def test_the_init_of_the_rlrr_paper_is_7_percent_away_from_the_base_and_ours_is_at_it():
    torch.manual_seed(0)
    W = torch.randn(768, 768)
    left, right = torch.empty(768, 1), torch.empty(1, 768)
    nn.init.kaiming_uniform_(left)
    nn.init.kaiming_uniform_(right)
    far = (W * (left @ right)).norm() / W.norm()
    assert far == pytest.approx(6**0.5 / 3**0.5 * (6 / 768) ** 0.5 / 3**0.5, rel=0.1) == pytest.approx(0.072, rel=0.1)

    model = load_model("tiny")
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    adapter = attach(model, method("rlrr"))
    torch.testing.assert_close(model(x), before)
    adapter.detach()
    attach(model, method("rlrr", init="paper"))
    assert (model(x) - before).abs().max() > 1e-2
    assert RLRR(init="paper").starts_as_base is False
    all_of_ours_move("rlrr")


# --- how results are told --------------------------------------------------------------------------------------------

# the published accuracies on the 19 sets of VTAB-1k, in the usual order: 7 natural, 4 specialised, 8 structured
VTAB = {
    "LoRA": "67.1 91.4 69.4 98.8 90.4 85.3 54.0 84.9 95.3 84.4 73.6 82.9 69.2 49.8 78.5 75.7 47.1 31.0 44.0",
    "NOAH": "69.6 92.7 70.2 99.1 90.4 86.1 53.7 84.4 95.4 83.9 75.8 82.8 68.9 49.9 81.7 81.8 48.3 32.8 44.2",
    "FacT-TT": "71.3 89.6 70.7 98.9 91.0 87.8 54.6 85.2 95.5 83.4 75.7 82.0 69.0 49.8 80.0 79.2 48.4 34.2 41.4",
    "FacT-TK": "70.6 90.6 70.8 99.1 90.7 88.6 54.1 84.8 96.2 84.5 75.7 82.6 68.2 49.8 80.7 80.8 47.4 33.2 43.0",
}


@pytest.mark.parametrize(
    ("name", "groups", "tasks"),
    [("LoRA", 74.60, 72.25), ("NOAH", 75.48, 73.25), ("FacT-TT", 75.34, 73.04), ("FacT-TK", 75.55, 73.23)],
)
def test_the_mean_of_group_means_is_two_points_above_the_mean_of_tasks(name, groups, tasks):
    row = [float(value) for value in VTAB[name].split()]
    parts = row[:7], row[7:11], row[11:]
    assert sum(sum(part) / len(part) for part in parts) / 3 == pytest.approx(groups, abs=0.02)
    assert sum(row) / 19 == pytest.approx(tasks, abs=0.02)
    text = PAGE.read_text("utf-8")
    assert f"| {name} | {groups:.2f} | {tasks:.2f} |" in text


def test_the_best_epoch_on_test_is_above_the_accuracy_that_every_epoch_has():
    true, pictures, runs, epochs = 0.8, 1000, 1000, 100
    generator = torch.Generator().manual_seed(0)
    size = torch.full((2, runs, epochs), float(pictures))
    # nothing is learned: each epoch has the same accuracy, on two test sets
    seen, other = torch.binomial(size, torch.full_like(size, true), generator=generator) / pictures
    assert seen[:, -1].mean() == pytest.approx(true, abs=0.002)
    best = seen.max(1)
    assert 100 * (best.values.mean() - true) == pytest.approx(3.1, abs=0.1)
    # to choose on one set and report on the other has no such bias
    assert other[torch.arange(runs), best.indices].mean() == pytest.approx(true, abs=0.002)


def test_our_training_opens_the_test_split_once_after_its_last_epoch(tmp_path, pictures, monkeypatch):
    read = []

    def watched(model, images, **options):
        found = evaluate(model, images, **options)
        read.append((found.accuracy, {path.parts[-3] for path in images.split.paths}))
        return found

    monkeypatch.setattr(run_module, "evaluate", watched)
    recipe = Recipe(
        model={"name": "tiny"}, data={"path": str(pictures), "workers": 0},
        train={"epochs": 2, "batch_size": 8}, method={"name": "lora"}, device="cpu",
    )  # fmt: skip
    steps = run_module.run(recipe, tmp_path / "run")
    try:
        while True:
            next(steps)
            assert not read
    except StopIteration as end:
        result = end.value
    assert read == [(result["test_accuracy"], {"test"})]


# --- counts ----------------------------------------------------------------------------------------------------------


def test_kadaptation_trains_what_its_formula_says_and_not_a_fourth_of_it():
    model = load_model("vit_base_patch16_224", weights="random")
    made = deltavit.plan(model, method("kadaptation", n=4, rank=1, share=True))
    assert made.trainable_parameters == 12 * 2 * (768 + 768) + 4**3 == 36_928
    assert 2 * 12 * (768 + 1) // 4 + 4**3 == 4_678  # the table's formula


def test_every_finding_has_its_test_and_every_test_its_finding():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text("utf-8")))
    here = {name for name in globals() if name.startswith("test_")} - {
        "test_every_finding_has_its_test_and_every_test_its_finding"
    }
    assert named == here
