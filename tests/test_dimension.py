"""Local intrinsic dimension: the transform against public code, the crossing, the sweep and what it selects."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import deltavit
from deltavit.analysis import dimension as measure
from deltavit.analysis.dimension import Point, Settings, crossing, curves, dimensions, module, modules, sizes
from deltavit.analysis.pairs import png
from deltavit.cli.dimension import _blocks, _dims
from deltavit.core.attach import attach, plan
from deltavit.core.errors import DataError, MethodError, ModelError, RecipeError, TrainingError
from deltavit.core.site import anatomy
from deltavit.methods import fastfood
from deltavit.methods.fastfood import Projection, walsh_hadamard
from deltavit.train.recipe import read_recipe

# --- the transform ---------------------------------------------------------------------------------------------------


def chain(x):
    """What public code does: log n times stack and reshape."""
    y, half = x, 1
    while half < x.shape[-1]:
        y = y.reshape(-1, 2, half)
        y = torch.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], 1)
        half *= 2
    return y.reshape(x.shape)


@pytest.mark.parametrize("piece", [1, 3, 10, 19])
@pytest.mark.parametrize("bits", [1, 2, 9, 13])
def test_the_transform_and_its_gradient_are_those_of_the_chain_whatever_the_pieces(monkeypatch, bits, piece):
    monkeypatch.setattr(fastfood, "PIECE", piece)
    x = torch.randn(3, 1 << bits, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 1 << bits, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), chain(x), rtol=0, atol=1e-10)
    ours, theirs = (torch.autograd.grad(f(x), x, g)[0] for f in (walsh_hadamard, chain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_transform_leaves_its_input_alone_and_is_the_same_each_time():
    x = torch.randn(1 << 12)
    before = x.clone()
    one, two = walsh_hadamard(x), walsh_hadamard(x)
    assert torch.equal(x, before)
    assert torch.equal(one, two)
    assert one.data_ptr() != two.data_ptr()


def test_the_gradient_has_a_gradient_and_transforms_of_functions_see_through():
    x = torch.randn(16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(walsh_hadamard, x)
    rows = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(walsh_hadamard)(rows), chain(rows))


def test_a_tensor_smaller_than_theta_is_taken_along_when_padded():
    torch.manual_seed(0)
    ratios = [(Projection(100, 24, pad=True)(theta).norm() / theta.norm()).item() for theta in torch.randn(200, 100)]
    assert len(Projection(100, 24, pad=True)(torch.randn(100))) == 24
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)  # P still keeps lengths
    model = deltavit.load_model("tiny")
    assert plan(model, deltavit.method("fastfood", dimension=100, bias=True, pad=True)).trainable_parameters == 100


# --- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "vit_pico"])
@pytest.mark.parametrize("part", ["attention.1", "ffn.-1"])
def test_a_module_is_the_tensors_that_partial_tuning_of_it_trains(name, part):
    vit = anatomy(deltavit.load_model(name))
    one = module(vit, part)
    what, block = one.name.split(".")
    whole = plan(vit.model, deltavit.method("partial", layers=[f"{block}.{what}"]))
    assert sizes(vit, one)[0] == whole.trainable_parameters
    same = plan(vit.model, deltavit.method("attention", where={"roles": one.where.roles, "blocks": one.where.blocks}))
    assert same.shapes == whole.shapes


def test_a_subspace_moves_all_tensors_of_its_module_and_no_other():
    model = deltavit.load_model("vit_pico")
    vit = anatomy(model)
    before = {name: t.detach().clone() for name, t in vit.tensors().items()}
    where = {"roles": module(vit, "ffn.2").where.roles, "blocks": (2,)}
    adapter = attach(model, deltavit.method("fastfood", dimension=600, bias=True, pad=True, where=where))
    (theta,) = adapter.tensors().values()
    torch.nn.init.ones_(theta)
    adapter.merge()
    moved = {name for name, t in anatomy(model).tensors().items() if not torch.equal(t, before[name])}
    assert moved == {f"blocks.2.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


def test_modules_that_are_not_there_are_refused_in_a_line():
    vit = anatomy(deltavit.load_model("vit_pico"))
    for name, line in {
        "atention.0": "no part named 'atention'; did you mean 'attention'",
        "attention.6": "vit_pico has blocks 0 to 5, asked for 6",
        "attention": "'attention' is no module: name a part and a block",
    }.items():
        with pytest.raises(MethodError, match=line):
            module(vit, name)
    with pytest.raises(MethodError, match="nothing to measure in vit_pico"):
        modules(vit, [], [0])
    with pytest.raises(MethodError, match=r"q\+v.0 is a part of blocks.0.attn.qkv.weight: name all of it, q\+k\+v"):
        sizes(vit, module(vit, "q+v.0"))
    assert [one.name for one in modules(vit, ["ffn", "attention"], [-1, 0])] == [
        "ffn.0", "ffn.5", "attention.0", "attention.5",
    ]  # fmt: skip


# --- the crossing ----------------------------------------------------------------------------------------------------


def test_the_crossing_is_interpolated_in_log_d_between_its_neighbours():
    found = crossing({10: 0.2, 100: 0.4, 1000: 0.5}, whole=0.5)
    assert (found.state, found.lower, found.upper) == ("reached", 100, 1000)
    assert found.target == pytest.approx(0.45)
    assert found.dimension == pytest.approx(math.sqrt(100 * 1000))  # 0.45 is half way from 0.4 to 0.5


def test_with_a_trained_head_the_target_is_a_share_of_the_gap():
    found = crossing({10: 0.81, 100: 0.895}, whole=0.9, probe=0.8, head="trained")
    assert found.target == pytest.approx(0.89)
    assert (found.lower, found.upper) == (10, 100)
    assert crossing({10: 0.81}, whole=0.9, probe=0.8, head="trained", fraction=0.05).state == "at most"


def test_a_gap_within_the_spread_over_seeds_has_no_dimension():
    sweep = {8: 0.245, 32: 0.255}
    assert crossing(sweep, 0.25, 0.24, "trained").state == "reached"
    assert crossing(sweep, 0.25, 0.24, "trained", noise=0.011).state == "no gap"
    assert crossing({8: 0.2, 32: 0.3}, 0.25, noise=0.5).state == "reached"  # a frozen head has no probe to be above
    cells = {None: (0.25, 0.27), 0: (0.24, 0.26), 8: (0.245, 0.265)}
    points = [
        Point("ffn.1" if d != 0 else "", "trained", d, 1e-3, seed, a, 1.0)
        for d, own in cells.items()
        for seed, a in enumerate(own)
    ]
    (curve,) = curves(points, {"ffn.1": 100}, Settings((8,), seeds=2, heads=("trained",), rates=(1e-3,)))
    assert curve.crossing.state == "no gap"  # one point, of two deviations of 1.4
    assert [seed.state for seed in curve.by_seed] == ["not reached", "not reached"]


def test_what_is_not_reached_is_no_number():
    assert str(crossing({10: 0.2, 100: 0.4}, whole=0.9)) == "> 100"
    assert str(crossing({10: 0.9, 100: 0.4}, whole=0.9)) == "<= 10"
    assert str(crossing({10: 0.9}, whole=0.7, probe=0.7, head="trained")) == "no gap"
    assert crossing({10: 0.9}, whole=None).state == "failed"
    assert crossing({10: 0.9}, whole=0.9, head="trained").state == "failed"
    for state in (crossing({10: 0.2}, whole=0.9), crossing({10: None}, whole=0.9)):
        assert state.dimension is None


def test_a_curve_that_falls_again_counts_where_it_first_reaches_and_a_diverged_d_is_passed_over():
    found = crossing({10: 0.2, 50: None, 100: 0.95, 1000: 0.3}, whole=1.0)
    assert (found.lower, found.upper) == (10, 100)


def points(table, module="attention.0", head="frozen"):
    """{(d, rate): [an accuracy each seed]} -> points."""
    return [
        Point(module, head, d, rate, seed, accuracy, 1.0)
        for (d, rate), row in table.items()
        for seed, accuracy in enumerate(row)
    ]


def test_curves_take_the_best_rate_of_the_first_seed_and_the_mean_of_all():
    told = points({
        (None, 0.1): [0.7], (None, 0.2): [0.8, 0.6],
        (8, 0.1): [0.1, 0.3], (8, 0.2): [0.1],  # equal: the smaller rate
        (64, 0.1): [0.8, 0.5], (64, 0.2): [None],
    })  # fmt: skip
    (curve,) = curves(told, {"attention.0": 1000}, Settings(dims=(64, 8), seeds=2, heads=("frozen",)))
    assert curve.whole.rate == 0.2
    assert curve.whole.mean == pytest.approx(0.7)
    assert [(t.dimension, t.rate, t.mean) for t in curve.sweep] == [(8, 0.1, 0.2), (64, 0.1, 0.65)]
    assert curve.crossing.dimension == pytest.approx(8 * 8 ** ((0.63 - 0.2) / (0.65 - 0.2)))
    one, two = curve.by_seed  # against 0.72 and 0.54
    assert one.dimension == pytest.approx(8 * 8 ** ((0.72 - 0.1) / 0.7))
    assert two.state == "not reached"


def test_what_is_best_at_an_end_of_its_rates_is_told():
    def tuned(d, rate):
        return measure.Tuned(d, rate, (0.5,))

    sweep = (tuned(4, 1e-2), tuned(8, 1e-1))
    nothing = measure.Crossing("no gap")
    curve = measure.Curve("ffn.1", "trained", 9, tuned(None, 1e-3), tuned(0, 1e-2), sweep, nothing, ())
    told = measure.at_an_end([curve, curve], Settings((4, 8), rates=(1e-3, 1e-2, 1e-1), head_rates=(1e-2, 1e-1)))
    own = ["ffn.1 whole, trained head, rate 0.001", "ffn.1 d 8, trained head, rate 0.1"]
    assert told == ["linear probe, rate 0.01", *own, *own]
    assert measure.at_an_end([curve], Settings((4, 8), rates=(1e-2,), head_rates=(1e-2,))) == []  # nothing was chosen


def test_selection_takes_the_lowest_and_refuses_what_was_not_measured():
    rows = {"attention.0": (0.1, 0.9), "ffn.0": (0.5, 0.9), "ffn.1": (0.1, 0.2), "attention.1": (0.9, 0.9)}
    told = [
        point
        for name, (low, high) in rows.items()
        for point in points({(None, 0.1): [0.9], (8, 0.1): [low], (64, 0.1): [high]}, module=name)
    ]
    found = curves(told, dict.fromkeys(rows, 1000), Settings(dims=(8, 64), seeds=1, heads=("frozen",)))
    assert measure.select(found, 3) == ["attention.1", "ffn.0", "attention.0"]
    with pytest.raises(DataError, match="--select 4, but 3 of 4 modules reached their target with the frozen head"):
        measure.select(found, 4)
    for draw in (measure.curves_picture, measure.layers_picture):
        assert png(draw(found, "$x")) == png(draw(found, "$x"))


def test_the_kronecker_recipe_has_the_sites_of_the_selected_modules_and_no_other():
    model = deltavit.load_model("vit_pico")
    chosen = [module(anatomy(model), name) for name in ("ffn.0", "attention.3", "attention.1")]
    made = measure.kronecker(read_recipe(None, ["method.name=kadaptation", "method.rank=2"]), chosen)
    again = read_recipe(None, method=made.plain()["method"])
    adapter = attach(model, again.build_method(), classes=3)
    wanted = {f"blocks.{b}.{role}" for b in (1, 3) for role in "qkvo"} | {"blocks.0.fc1", "blocks.0.fc2"}
    assert set(plan(deltavit.load_model("vit_pico"), again.build_method()).sites) == wanted
    assert adapter.method.parts["kadaptation"].rank == 2
    alone = measure.kronecker(read_recipe(), chosen[:1])
    assert alone.build_method().name == "kadaptation"


# --- the sweep -------------------------------------------------------------------------------------------------------


def recipe(pictures, **changes):
    told = ["train.epochs=1", "train.batch_size=16", "data.workers=0", *(f"{k}={v}" for k, v in changes.items())]
    return read_recipe(None, told, model={"name": "tiny"}, data={"path": str(pictures)})


FEW = Settings(dims=(16, 4), seeds=2, rates=(1e-3, 1e-2))


def drain(steps):
    got = []
    while True:
        try:
            got.append(next(steps))
        except StopIteration as end:
            return got, end.value


@pytest.fixture(scope="module")
def measured(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return (out, *drain(dimensions(recipe(pictures), ["ffn.1"], FEW, out)))


def test_a_sweep_trains_references_and_every_d_with_every_seed(measured):
    out, got, found = measured
    assert len(got) == 2 + 2 * 3 * 3  # the probe, and for each head the module and two d at two rates + one seed
    assert json.loads((out / "points.json").read_text()) == [vars(p) | {"error": None} for p in got]
    assert [curve.head for curve in found] == ["frozen", "trained"]
    assert [len(t.accuracies) for curve in found for t in (curve.whole, *curve.sweep)] == [2] * 6
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("test-reads.jsonl"))  # the test split is not read


def test_its_runs_are_ordinary_ones_and_a_subspace_steps_as_far_as_the_module(measured):
    out, _, _ = measured
    told = read_recipe(out / "runs/ffn.1/trained-d16-rate0.01-seed0/recipe.toml")
    assert told.method["dimension"] == 16
    assert told.method["where"]["blocks"] == [1] or told.method["where"]["blocks"] == (1,)
    assert told.train.lr == pytest.approx(0.01 * math.sqrt((2 * 24 * 96 + 24 + 96) / (4 * 16)))
    assert told.train.head_lr == 1e-3
    assert read_recipe(out / "runs/ffn.1/frozen-whole-rate0.01-seed1/recipe.toml").train.head_lr == 0


def test_a_frozen_head_stays_what_was_drawn(pictures, tmp_path):
    drain(dimensions(recipe(pictures), ["ffn.1"], Settings((4,), 1, ("frozen",), (0.1,)), tmp_path, keep=True))
    (path,) = tmp_path.glob("runs/ffn.1/frozen-d4-*/adapter.safetensors")
    tuned = deltavit.load(path, deltavit.load_model("tiny")).tensors()
    method = read_recipe(path.parent / "recipe.toml").build_method()
    drawn = attach(deltavit.load_model("tiny"), method, classes=3, seed=0).tensors()
    assert torch.equal(tuned["head.weight"], drawn["head.weight"])
    assert torch.equal(tuned["head.bias"], drawn["head.bias"])
    theta = next(name for name in drawn if name.endswith("theta"))
    assert not torch.equal(tuned[theta], drawn[theta])


def test_a_finished_sweep_is_read_and_not_trained_again(measured, pictures):
    out, _, found = measured
    before = (out / "curves.json").read_bytes()
    assert drain(dimensions(recipe(pictures), ["ffn.1"], FEW, out)) == ([], found)
    assert (out / "curves.json").read_bytes() == before


def test_stopped_at_any_point_it_goes_on_to_the_same_curves(measured, pictures, tmp_path):
    class Stop(Exception): ...

    countdown = iter(range(9, -1, -1))

    def watch(done, total, step):
        assert total == 20
        if next(countdown) == 0:
            raise Stop

    with pytest.raises(Stop):
        drain(dimensions(recipe(pictures), ["ffn.1"], FEW, tmp_path, watch=watch))
    drain(dimensions(recipe(pictures), ["ffn.1"], FEW, tmp_path))
    assert (tmp_path / "curves.json").read_bytes() == (measured[0] / "curves.json").read_bytes()


def test_another_measurement_in_the_same_folder_is_refused_by_name(measured, pictures):
    out = measured[0]
    for told, wanted, settings, line in [
        (
            recipe(pictures),
            ["ffn.1"],
            Settings((4, 8), 2, rates=(1e-3, 1e-2)),
            r"dims was \[4, 16\], now it is \[4, 8\]",
        ),
        (recipe(pictures), ["ffn.2"], FEW, "modules.ffn.1.* now it is unset"),
        (recipe(pictures, **{"train.epochs": 2}), ["ffn.1"], FEW, "recipe.train.epochs was 1, now it is 2"),
    ]:
        with pytest.raises(TrainingError, match=f"holds another measurement: {line}"):
            drain(dimensions(told, wanted, settings, out))


def test_a_run_that_diverges_is_a_point_without_accuracy(pictures, tmp_path):
    settings = Settings((4,), 1, ("frozen",), (1e-2, 1e30))
    got, (curve,) = drain(dimensions(recipe(pictures, **{"train.warmup": 0}), ["ffn.1"], settings, tmp_path))
    assert [p.accuracy is None for p in got] == [False, True, False, True]
    assert "lower train.lr" in got[1].error
    assert curve.sweep[0].rate == 1e-2
    assert drain(dimensions(recipe(pictures, **{"train.warmup": 0}), ["ffn.1"], settings, tmp_path))[0] == []


def test_said_counts_its_factors_among_the_d(pictures, tmp_path):
    settings = Settings((8,), 1, ("frozen",), (1e-2,), said=True)
    drain(dimensions(recipe(pictures), ["ffn.1"], settings, tmp_path))
    (path,) = tmp_path.glob("runs/ffn.1/frozen-d8-*/run.json")
    assert json.loads(path.read_text())["trainable_parameters"] == 8
    with pytest.raises(MethodError, match=r"d = 4 leaves said no direction in ffn\.1, whose 4 tensors"):
        next(dimensions(recipe(pictures), ["ffn.1"], Settings((4,), said=True), tmp_path / "no"))


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(pictures, tmp_path):
    with pytest.raises(MethodError, match=r"d = 4,729 is larger than ffn.1 of tiny, which has 4,728 numbers"):
        next(dimensions(recipe(pictures), ["ffn.1"], Settings((8, 4729)), tmp_path))
    with pytest.raises(MethodError, match="nothing to measure in tiny"):
        next(dimensions(recipe(pictures), [], FEW, tmp_path))
    state = deltavit.load_model("vit_pico").state_dict()
    state["blocks.3.mlp.fc1.weight"][0, 0] = math.nan
    save_file(state, tmp_path / "nan.safetensors")
    broken = read_recipe(
        None, model={"name": "vit_pico", "weights": str(tmp_path / "nan.safetensors")}, data={"path": str(pictures)}
    )
    with pytest.raises(ModelError, match=r"blocks\.3\.mlp\.fc1\.weight of vit_pico has numbers that are not finite"):
        next(dimensions(broken, ["ffn.1"], FEW, tmp_path))
    assert not (tmp_path / "dimension.json").exists()


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"dims": ()}, r"dims = \[\]: give at least one"),
        ({"dims": (8, 8)}, "and none twice"),
        ({"dims": (0,)}, "must be at least 1"),
        ({"seeds": 0}, "must be at least 1"),
        ({"heads": ("cold",)}, "no head named 'cold'"),
        ({"rates": (0.0,)}, "must be above 0"),
        ({"fraction": 1.5}, "fraction = 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(told, line):
    with pytest.raises(RecipeError, match=line):
        Settings(**told)


def test_the_command_line_reads_ranges():
    assert _dims("8..2048") == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert _dims("8..2048:5") == (8, 32, 128, 512, 2048)
    assert _dims("10..100") == (10, 20, 40, 80, 100)
    assert _dims("5, 50") == (5, 50)
    assert _blocks("0..2") == [0, 1, 2]
    assert _blocks("0,5,-1") == [0, 5, -1]
    for text in ("8..4", "0..8", "x", "8..64:1"):
        with pytest.raises(RecipeError, match="--dims"):
            _dims(text)
    with pytest.raises(RecipeError, match="--blocks"):
        _blocks("first")
