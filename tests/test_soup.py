"""Soups: what is averaged, who gets in, what the file holds, and what is refused."""

import copy
import dataclasses
import json
import random
import shutil
import sys
from fnmatch import fnmatchcase

import pytest
import torch

import deltavit
from deltavit import cli
from deltavit.analysis.soup import members, mix, moved, picture, soup, truncated
from deltavit.core.attach import adapters
from deltavit.core.contract import pictures as random_pictures
from deltavit.core.contract import stir
from deltavit.core.errors import DataError, DeltavitError, FileError, MethodError
from deltavit.core.file import load
from deltavit.core.sealed import read, write
from deltavit.core.site import anatomy
from deltavit.data import Images
from deltavit.methods.tensors import patterns
from deltavit.models import load_model, skeleton

CLASSES = ["blue", "green", "red"]
Q = {"where": {"roles": ["q"]}}
V = {"where": {"roles": ["v"]}}


@pytest.fixture
def base():
    return load_model("tiny")


@pytest.fixture
def saved(tmp_path):
    """Adapter files of these methods, stirred with one seed after the other."""

    def saved(*methods, model="tiny", classes=CLASSES, first=0):
        paths = []
        for i, each in enumerate(methods, first):
            name, options = each if isinstance(each, tuple) else (each, {})
            adapter = deltavit.attach(load_model(model), deltavit.method(name, **options), classes=classes, seed=0)
            stir(adapter, seed=i)
            paths.append(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
            adapter.save(paths[-1])
        return paths

    return saved


def cooked(model, paths, score=None, **options):
    """All tries, and the soup."""
    steps, tries = soup(model, members(paths), score, **options), []
    while True:
        try:
            tries.append(next(steps))
        except StopIteration as end:
            return tries, end.value


def merged(path, model="tiny"):
    """A member's whole state, head included, as a merge leaves it."""
    model = load_model(model)
    load(path, model).merge()
    return model.state_dict()


@torch.no_grad()
def logits(model):
    return model.eval()(random_pictures(model, 4))


# --- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "methods"),
    [
        ("vit_pico", ("lora", "lora", "ssf")),
        ("tiny", ("full", "full")),
        ("tiny", ("linear", "linear")),
        ("tiny", ("lora", "ssf", "bitfit")),
        ("vit_pico", ("linear", "kadaptation", ("partial", {"strategy": "ffn-last"}))),
        ("tiny", ("dora", "fastfood", "lora+bitfit")),
        ("tiny", ("rlrr", ("lora", Q), "layernorm")),
    ],
)
def test_over_all_a_soup_is_the_model_with_the_mean_of_all_weights(model, methods, saved):
    methods = tuple(("fastfood", {"dimension": 8}) if m == "fastfood" else m for m in methods)
    paths = saved(*methods, model=model)
    states = [merged(path, model) for path in paths]
    plain = load_model(model)
    load(paths[0], plain).merge()  # for a head of the right shape
    plain.load_state_dict({n: sum(s[n].double() for s in states) / len(states) for n in states[0]})
    net = load_model(model)
    cooked(net, paths, kind="uniform", over="all")
    torch.testing.assert_close(logits(net), logits(plain), atol=2e-6, rtol=1e-6)


def test_over_tuned_a_tensor_is_averaged_over_those_who_tuned_it(saved, base):
    paths = saved(*(("partial", {"strategy": s}) for s in ("attention", "both-first", "ffn-last")))
    first = {n: t.clone() for n, t in base.state_dict().items()}
    states = [merged(path) for path in paths]
    _, made = cooked(base, paths, kind="uniform", over="tuned")
    found = made.adapter.tensors()
    for name, value in found.items():
        if name.startswith("head."):
            tuned = states
        else:
            tuned = [s for s in states if not torch.equal(s[name], first[name])]
            assert 0 < len(tuned) < 3
        torch.testing.assert_close(value.data, sum(s[name] for s in tuned) / len(tuned))
    assert not [name for name in found if "norm" in name or "embed" in name]


@pytest.mark.parametrize("model", ["tiny", "vit_pico"])
def test_members_that_tuned_other_rows_of_one_tensor_do_not_halve_each_other(model, saved):
    paths = saved(("lora", Q), ("lora", V), model=model)
    net = load_model(model)
    _, made = cooked(net, paths, kind="uniform", over="tuned")
    after = {site.name: W1 for site, _, W1 in made.adapter.pairs()}
    for path, role in zip(paths, "qv", strict=True):
        other = load_model(model)
        for site, _, W1 in load(path, other).pairs():
            assert site.role == role
            torch.testing.assert_close(after[site.name], W1)


@pytest.mark.parametrize("over", ["tuned", "all"])
@pytest.mark.parametrize("name", ["lora", "ssf", "full", "apla", "ia3"])
def test_a_uniform_soup_of_one_member_is_that_member(name, over, saved, base):
    [path] = saved(name)
    one = moved(load(path, load_model("tiny")))
    mixed = mix([one], {n: t.detach() for n, t in anatomy(base).tensors().items()}, over)
    state = merged(path)
    assert set(mixed) == {
        n for n, t in base.state_dict().items() if not n.startswith("head") and not torch.equal(t, state[n])
    }
    assert all(torch.equal(mixed[n], state[n]) for n in mixed)


def test_a_mean_of_factors_is_the_mean_of_the_adapters_own_tensors(saved, base):
    paths = saved("lora", "lora", "lora")
    files = [load(path, load_model("tiny")).tensors() for path in paths]
    _, made = cooked(base, paths, kind="uniform", average="factors")
    for name, value in made.adapter.tensors().items():
        torch.testing.assert_close(value.data, sum(f[name].data for f in files) / 3)


def test_the_gap_of_factors_is_how_far_their_change_is_from_the_mean_change(saved, base):
    paths = saved("lora", "lora")
    deltas = [torch.cat([(W1 - W0).flatten() for _, W0, W1 in load(p, load_model("tiny")).pairs()]) for p in paths]
    wanted = (deltas[0] + deltas[1]) / 2
    _, made = cooked(base, paths, kind="uniform", average="factors")
    got = torch.cat([(W1 - W0).flatten() for _, W0, W1 in made.adapter.pairs()])
    assert made.gap == pytest.approx(((got - wanted).norm() / wanted.norm()).item(), rel=1e-4)
    assert made.gap > 0.1


@pytest.mark.parametrize("name", ["bitfit", "ssf", "full"])
def test_what_is_linear_in_its_tensors_has_one_mean(name, saved):
    paths, nets = saved(name, name), [load_model("tiny") for _ in range(2)]
    one = cooked(nets[0], paths, kind="uniform")[1]
    two = cooked(nets[1], paths, kind="uniform", average="factors")[1]
    torch.testing.assert_close(logits(nets[0]), logits(nets[1]), atol=1e-5, rtol=1e-5)
    assert one.gap is None
    assert two.gap < 1e-4


def test_methods_that_add_layers_have_a_mean_of_factors(saved, base):
    paths = saved(("vpt-deep", {"tokens": 2}), ("vpt-deep", {"tokens": 2}))
    _, made = cooked(base, paths, kind="uniform", average="factors")
    assert made.adapter.method.name == "vpt-deep"
    assert made.gap is None


# --- greedy ----------------------------------------------------------------------------------------------------------


def judge(model):
    """A stand-in for val that prefers some weights to others, always the same ones."""
    return round(float(logits(model).softmax(1)[:, 0].mean()), 6)


@pytest.mark.parametrize("average", ["weights", "factors"])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_adds_by_falling_accuracy_whoever_does_not_lower_it(seed, average, saved, base):
    paths = saved(*["lora"] * 5, first=10 * seed)
    tries, made = cooked(base, paths, judge, average=average)

    def accuracy(some):
        net = load_model("tiny")
        return cooked(net, some, judge, kind="uniform", average=average)[1].accuracy

    alone = {t.members[0]: t.accuracy for t in tries[:5]}
    order = sorted(paths, key=lambda p: -alone[p])
    chosen, best = order[:1], alone[order[0]]
    for path in order[1:]:
        if (found := accuracy([*chosen, path])) >= best:
            chosen, best = [*chosen, path], found
    assert [m.path for m in made.taken] == chosen
    assert made.accuracy == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_never_lowers_val(seed, saved, base):
    paths = saved("lora", "ssf", "bitfit", "full", first=10 * seed)
    tries, made = cooked(base, paths, judge)
    assert made.accuracy >= max(made.accuracies) - 2e-6
    kept = [t.accuracy for t in tries[4:] if t.taken]
    assert kept == sorted(kept)
    assert made.record()["best_member_val_accuracy"] == max(made.accuracies)


def test_who_changes_nothing_stays_in_and_equal_ones_keep_their_order(saved, base):
    paths = saved("lora", "lora", "lora")
    _, made = cooked(base, paths, lambda model: 0.5)
    assert [m.path for m in made.taken] == paths


def test_a_greedy_soup_of_the_best_alone_is_the_best(saved, base):
    paths = saved("lora", "ssf")
    falling = iter([0.3, 0.9, 0.2, 0.9])
    _, made = cooked(base, paths, lambda model: next(falling))
    assert [m.path for m in made.taken] == paths[1:]
    net = load_model("tiny")
    load(paths[1], net)
    torch.testing.assert_close(logits(base), logits(net), atol=1e-6, rtol=1e-6)


def test_a_soup_that_is_given_up_leaves_the_base_to_the_bit(saved, base):
    before, paths = copy.deepcopy(base.state_dict()), saved("lora", "full", "ssf")
    steps = soup(base, members(paths), judge)
    for _ in range(4):
        next(steps)
    steps.close()
    assert not adapters(base)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


# --- what the file holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "methods", "options", "holder"),
    [
        ("tiny", ("full", "full"), {}, deltavit.method("full")),
        (
            "tiny",
            ("lora", "lora"),
            {},
            deltavit.method("tensors", names=["blocks.*.attn.q.weight", "blocks.*.attn.v.weight"]),
        ),
        ("tiny", ("bitfit", "layernorm"), {}, None),
        ("tiny", ("lora", "lora"), {"rank": 4}, deltavit.method("lora", rank=4)),
        ("tiny", ("lora", "lora"), {"average": "factors"}, deltavit.method("lora")),
        ("vit_pico", ("lora", "bitfit"), {"rank": 4}, None),
        ("vit_pico", ("full", "ssf"), {"rank": 2}, None),
        ("tiny", ("partial", ("partial", {"layers": "0.ffn,2.attention"})), {}, None),
    ],
)
def test_a_soup_is_an_adapter_file_that_loads_to_the_same_outputs(model, methods, options, holder, saved, tmp_path):
    net = load_model(model)
    _, made = cooked(net, saved(*methods, model=model), judge, kind="uniform", **options)
    assert holder in (None, made.adapter.method)
    made.adapter.save(tmp_path / "soup")
    again = load_model(model)
    back = load(tmp_path / "soup", again)
    assert back.classes == CLASSES
    assert torch.equal(logits(again), logits(net))
    assert back.summary["soup"] == json.loads(json.dumps(made.record()))
    assert back.summary["soup"]["average"] == options.get("average", "weights")
    assert str(tmp_path) not in json.dumps(back.summary)
    with pytest.raises(FileError, match="load that base first"):
        load(tmp_path / "soup", load_model({"tiny": "vit_pico", "vit_pico": "tiny"}[model]))


def test_a_rank_that_is_the_sum_of_the_members_loses_nothing(saved):
    paths = saved(("lora", {"rank": 2}), ("lora", {"rank": 3}))
    nets = [load_model("tiny") for _ in range(2)]
    cooked(nets[0], paths, kind="uniform")
    _, made = cooked(nets[1], paths, kind="uniform", rank=5)
    assert made.adapter.method.name == "lora"
    assert max(made.errors.values()) < 1e-4
    torch.testing.assert_close(logits(nets[1]), logits(nets[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["tiny", "vit_pico"])
def test_low_rank_is_the_nearest_matrix_of_that_rank_and_says_how_near(model, saved):
    paths, nets = saved("full", "lora", model=model), [load_model(model) for _ in range(2)]
    dense = cooked(nets[0], paths, kind="uniform")[1].adapter
    _, made = cooked(nets[1], paths, kind="uniform", rank=2)
    thin = {site.name: W1 for site, _, W1 in made.adapter.pairs()}
    assert set(thin) == set(made.errors)
    for site, W0, W1 in dense.pairs():
        U, S, V = torch.linalg.svd((W1 - W0).double())
        plain = U[:, :2] @ torch.diag(S[:2]) @ V[:2]
        torch.testing.assert_close((thin[site.name] - W0).double(), plain, atol=1e-5, rtol=1e-3)
        error = (W1 - W0 - plain).norm() / (W1 - W0).norm()
        assert made.errors[site.name] == pytest.approx(error.item(), rel=1e-3)
    for name, value in made.adapter.tensors().items():  # what is no matrix of a block stays as it is
        if name in dense.tensors():
            assert torch.equal(value, dense.tensors()[name])
    told = made.record()["compression"]
    assert told["max"] == max(made.errors.values()) >= told["mean"] > 0


def test_truncation_pads_a_rank_that_a_matrix_does_not_have():
    delta = torch.randn(3, 5)
    up, down, error = truncated(delta, 7)
    assert (up.shape, down.shape, error) == ((3, 7), (7, 5), 0.0)
    torch.testing.assert_close(up @ down, delta)
    assert truncated(torch.zeros(3, 5), 1)[2] == 0.0


def test_patterns_name_a_set_of_tensors_and_nothing_else():
    known = list(anatomy(skeleton("vit_base_patch16_224")).tensors())
    numbers = random.Random(0)
    sets = [numbers.sample(known, numbers.randint(1, len(known))) for _ in range(5)]
    sets += [[n for n in known if ".attn." in n], [n for n in known if n.endswith("bias")], known]
    for names in sets:
        found = patterns(names, known)
        assert [n for n in known if any(fnmatchcase(n, p) for p in found)] == [n for n in known if n in set(names)]
    assert patterns(known, known) == ("*",)
    assert patterns(sets[-2], known) == ("*.bias",)


def test_a_soup_of_more_tensors_than_a_file_can_name_still_loads(saved, tmp_path):
    known = [n for n in anatomy(load_model("vit_pico")).tensors() if "weight" in n or "bias" in n]
    numbers, net = random.Random(1), load_model("vit_pico")
    several = [("tensors", {"names": numbers.sample(known, 22)}) for _ in range(2)]
    for rank in (None, 2):
        _, made = cooked(net, saved(*several, model="vit_pico"), kind="uniform", rank=rank)
        made.adapter.save(tmp_path / "soup")
        y = logits(net)
        made.adapter.detach()
        load(tmp_path / "soup", again := load_model("vit_pico"))
        assert torch.equal(logits(again), y)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_one_soup_are_refused_with_the_reason(saved, tmp_path):
    [one] = saved("lora")
    with pytest.raises(FileError, match=r"two adapters or more, given none"):
        members([])
    with pytest.raises(FileError, match=r"two adapters or more, given only .*0\.safetensors"):
        members([one])
    with pytest.raises(FileError, match=r"0\.safetensors is given twice"):
        members([one, one.parent / "." / one.name])
    with pytest.raises(FileError, match=r"cannot read .*nothing"):
        members([one, tmp_path / "nothing"])
    with pytest.raises(FileError, match=r"one was trained on vit_pico \(.{6}\), the other on tiny \(.{6}\)"):
        members([one, *saved("lora", model="vit_pico")])
    with pytest.raises(FileError, match=r"another order; class 1 is 'red' in one and 'green' in the other"):
        members([one, *saved("lora", classes=["blue", "red", "green"])])
    with pytest.raises(FileError, match=r"one has 2 classes and the other 3; not in both: red"):
        members([one, *saved("lora", classes=["blue", "green"])])
    with pytest.raises(FileError, match="no head to average"):
        members(saved("lora", "ssf", classes=None))
    adapter = load(one, load_model("tiny"))
    adapter.preprocessing = dataclasses.replace(adapter.preprocessing, resize="crop")
    adapter.save(tmp_path / "crop")
    with pytest.raises(FileError, match="prepared in two ways"):
        members([one, tmp_path / "crop"])


@pytest.mark.parametrize(
    ("methods", "options", "line"),
    [
        (("lora", ("vpt-deep", {"tokens": 2})), {}, "is vpt-deep, which adds layers, so there are no merged weights"),
        (("adaptformer", "adaptformer"), {}, "several of one method have --average factors"),
        (("lora", "ssf"), {"average": "factors"}, "factors of ssf and lora have no mean"),
        (("lora", ("lora", {"rank": 2})), {"average": "factors"}, "factors of lora with two sets of options"),
        (("lora", "lora"), {"average": "factors", "rank": 2}, "--rank is for --average weights"),
        (("lora", "lora"), {"rank": 0}, "--rank must be at least 1, got 0"),
        (("bitfit", "layernorm"), {"rank": 2}, "change no linear layer of a block"),
    ],
)
def test_what_cannot_be_averaged_so_is_refused_before_the_base_is_touched(methods, options, line, saved, base):
    with pytest.raises(MethodError, match=line) as refused:
        cooked(base, saved(*methods), kind="uniform", **options)
    assert "\n" not in str(refused.value)
    assert not adapters(base)


def test_factors_of_other_draws_have_no_mean(base, tmp_path):
    paths = []
    for seed in (0, 1):
        adapter = deltavit.attach(load_model("tiny"), "lora-fix", classes=CLASSES, seed=seed)
        stir(adapter)
        paths.append(tmp_path / f"{seed}")
        adapter.save(paths[-1])
    with pytest.raises(MethodError, match=r"has seed 1, .* 0: what does not train of lora-fix was drawn from it"):
        cooked(base, paths, kind="uniform", average="factors")
    cooked(base, paths, kind="uniform")  # weights have one


def test_a_greedy_soup_needs_val(saved, base):
    with pytest.raises(DataError, match="chooses its members on val"):
        cooked(base, saved("lora", "lora"))


def test_nan_in_a_member_is_refused(saved, base):
    one, two = saved("lora", "lora")
    values, meta = read(two)
    next(iter(values.values())).view(-1)[0] = float("nan")
    write(two, values, meta)
    with pytest.raises(FileError, match="NaN or Inf in"):
        cooked(base, [one, two], kind="uniform")
    assert not adapters(base)


@pytest.mark.parametrize(
    ("names", "line"),
    [((), "names is empty"), (("blocks.*", "blocs.*"), r"tiny has no tensor 'blocs\.\*'")],
)
def test_tensors_that_do_not_exist_are_refused(names, line, base):
    with pytest.raises(MethodError, match=line):
        deltavit.attach(base, deltavit.method("tensors", names=names), classes=2)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run):
    """Run a command with --json: its exit code, what it told, and standard error."""

    def run_json(*words):
        done = run(*words, "--json")
        return done.code, done.json, done.err

    return run_json


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """Three short runs on tiny."""
    out = tmp_path_factory.mktemp("runs")
    for i, method in enumerate(("lora", "lora", "ssf")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [
                "deltavit", "train", "--data", str(pictures), "--model", "tiny", "--method", method, "--seed", str(i),
                "--out", str(out / str(i)), "--device", "cpu", "--epochs", "2", "data.workers=0", "train.lr=0.01",
            ])  # fmt: skip
            with pytest.raises(SystemExit, match="0"):
                cli.main()
    return [out / str(i) for i in range(3)]


def test_the_command_says_who_is_in_what_was_averaged_and_how_good_it_is(run, runs, pictures, tmp_path, monkeypatch):
    read_splits, plain = set(), Images.batch
    monkeypatch.setattr(Images, "batch", lambda self, at: (read_splits.add(self.split.name), plain(self, at))[1])
    out, whole = tmp_path / "soup.safetensors", tmp_path / "whole.safetensors"
    code, told, said = run("soup", *runs, "--data", pictures, "--out", out, "--merged", whole, "--device", "cpu")
    assert code == 0, said
    assert read_splits == {"val"}
    assert (told["kind"], told["average"], told["over"]) == ("greedy", "weights", "all")
    assert [m["path"] for m in told["members"]] == [str(r / "adapter.safetensors") for r in runs]
    for member, folder in zip(told["members"], runs, strict=True):
        record = json.loads((folder / "run.json").read_text())
        assert member["val_accuracy"] == record["val_accuracy"]
        assert member["test_accuracy_of_its_run"] == record["test_accuracy"]
    assert told["val_accuracy"] >= told["best_member_val_accuracy"]
    assert said.count("val ") >= 5

    code, again, said = run("evaluate", "--adapter", out, "--data", pictures, "--split", "val", "--device", "cpu")
    assert again["accuracy"] == told["val_accuracy"]
    net = load_model("tiny")
    load(out, net)
    other = load_model("tiny")
    other.head = torch.nn.Linear(other.head.in_features, 3)
    from safetensors.torch import load_file

    other.load_state_dict(load_file(whole))
    torch.testing.assert_close(logits(other), logits(net), atol=1e-6, rtol=1e-6)


def test_the_command_measures_test_and_corrupted_val_where_asked(run, runs, pictures, tmp_path):
    out = tmp_path / "soup.safetensors"
    code, told, said = run(
        "soup", *runs, "--data", pictures, "--out", out, "--kind", "uniform", "--rank", 4, "--test", "--device", "cpu",
        "--ood", "--corruptions", "jpeg,blur", "--severities", "5,1", "--picture", tmp_path / "soup.png",
    )  # fmt: skip
    assert code == 0, said
    assert (tmp_path / "soup.png").read_bytes().startswith(b"\x89PNG")
    assert told["picture"] == str(tmp_path / "soup.png")
    assert load(out, load_model("tiny")).summary["test_accuracy"] == told["test_accuracy"]
    assert told["compression"]["max"] == max(told["compression"]["by_site"].values())
    assert told["ood"]["severities"] == [1, 5]
    assert [row["of"] for row in told["ood"]["rows"]] == ["soup", *(str(r / "adapter.safetensors") for r in runs)]
    assert all({len(a) for a in row["corruptions"].values()} == {2} for row in told["ood"]["rows"])
    assert told["ood"]["rows"][0]["clean"] == told["val_accuracy"]


def test_the_picture_has_a_mark_for_every_accuracy_and_shows_who_was_left_out():
    told = {
        "kind": "greedy", "average": "weights", "over": "tuned", "val_accuracy": 0.5, "test_accuracy": 0.25,
        "members": [
            {"name": "a", "method": "lora", "val_accuracy": 0.5, "taken": True, "test_accuracy_of_its_run": 0.125},
            {"name": "b", "method": "ssf", "val_accuracy": 0.375, "taken": False, "test_accuracy_of_its_run": None},
        ],
    }  # fmt: skip
    (axes,) = picture(told).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["greedy soup of 1", "a (lora)", "b (ssf)"]
    marks = {(x, y): line.get_markerfacecolor() for line in axes.lines if len(line.get_xdata()) == 1
             for x, y in [(line.get_xdata()[0], line.get_ydata()[0])]}  # fmt: skip
    assert set(marks) == {(50.0, 0), (50.0, 1), (37.5, 2), (25.0, 0), (12.5, 1)}
    assert [at for at, face in marks.items() if face == "none"] == [(37.5, 2)]
    nothing = {"kind": "uniform", "average": "factors", "over": None, "val_accuracy": None, "members": []}
    with pytest.raises(DataError, match="give --data"):
        picture(nothing)


def test_a_person_reads_tables(runs, pictures, tmp_path, monkeypatch, capsys):
    words = ["soup", *runs, "--data", pictures, "--out", tmp_path / "soup", "--kind", "uniform", "--rank", 4, "--ood",
             "--corruptions", "blur", "--severities", "3", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["deltavit", *map(str, words)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    shown = capsys.readouterr().out
    for part in ("uniform soup, mean of weights over all", "best member", "rank 4", "ours, not ImageNet-C", "blur"):
        assert part in shown


def test_without_pictures_a_uniform_soup_is_made_but_not_measured(run, runs, tmp_path):
    code, told, said = run("soup", *runs[:2], "--out", tmp_path / "s", "--kind", "uniform", "--average", "factors")
    assert code == 0, said
    assert told["val_accuracy"] is None
    assert told["method"] == "lora"
    assert 0 < told["gap_to_mean_of_weights"] < 2


def test_runs_that_cut_the_pictures_otherwise_are_refused(run, runs, pictures, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(pictures / "train", flat)
    changed = []
    for i, recipe in enumerate(({"seed": 0}, {"seed": 1}, {"train_on": "train+val"})):
        adapter = load(runs[i] / "adapter.safetensors", load_model("tiny"))
        adapter.summary["recipe"]["data"] |= recipe
        changed.append(tmp_path / f"{i}")
        adapter.save(changed[-1])
    out = tmp_path / "soup"
    code, told, _ = run("soup", *changed[:2], "--data", flat, "--out", out)
    assert code == 1
    assert "in two ways, so one was trained on val pictures of the other" in told["error"]
    code, told, _ = run("soup", changed[0], changed[2], "--data", pictures, "--out", out)
    assert code == 1
    assert "was trained on val too" in told["error"]
    assert run("soup", *changed[:2], "--data", pictures, "--out", out)[0] == 0  # its own val split is one for both


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "give --out, --merged or both"),
        (("--out", "soup"), "a greedy soup chooses its members on val: give --data"),
        (("--out", "soup", "--kind", "uniform", "--ood"), "--ood, --test and --picture need images: give --data"),
        (("--out", "soup", "--corruptions", "fog"), "no corruption named 'fog'"),
        (("--out", "soup", "--severities", "high"), "--severities 'high' is not numbers"),
        (("--out", "pyproject.toml"), "pyproject.toml exists: choose another name, or give --overwrite"),
    ],
)
def test_the_command_refuses_in_one_line(words, line, run, runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    code, told, said = run("soup", *runs[:2], *words)
    assert code == 1
    assert line in told["error"]
    assert said.splitlines()[-1].startswith("deltavit: ")


def test_errors_are_ours(saved, base):
    """Whatever is wrong with members is a DeltavitError, never a traceback from below."""
    good, bad = saved("lora", "lora")
    bad.write_bytes(good.read_bytes()[:-8])
    with pytest.raises(DeltavitError):
        cooked(base, [good, bad], kind="uniform")
