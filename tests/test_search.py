"""Search: proposals that depend on nothing but what is known, and a ledger that a kill does not confuse."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna")

import optuna
import typer
from typer.testing import CliRunner

from deltavit.cli.output import Interrupted
from deltavit.core.errors import DataError, FileError, MethodError, RecipeError, TrainingError
from deltavit.search import Range, Search, default_space, parse_space, search
from deltavit.search.ledger import Ledger
from deltavit.search.samplers import Point, distributions, elevater, grid, halved, propose
from deltavit.search.space import DECAYS, RATES, checked, placed
from deltavit.search.study import GIVE_UP
from deltavit.store import read
from deltavit.train.recipe import read_recipe
from deltavit.train.run import run

cli = import_module("deltavit.cli.search")  # the name may be the function's in deltavit.cli


@pytest.fixture
def recipe(pictures):
    changes = ["train.epochs=2", "train.batch_size=8", "data.workers=0", "train.precision=fp32", "device=cpu"]
    return read_recipe(None, changes, model={"name": "tiny"}, data={"path": str(pictures)})


def carried(steps):
    """What the generator yields, and what it returns."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


# --- the space -------------------------------------------------------------------------------------------------------


def test_the_command_line_writes_ranges_and_lists():
    texts = [
        "train.lr=1e-4..1e-1",
        "train.warmup=0..0.5",
        "train.clip=lin:1..20",
        "train.pace=log:1..2",
        "method.scale=0.1,1",
    ]
    assert parse_space(texts) == {
        "train.lr": Range(1e-4, 1e-1, log=True), "train.warmup": Range(0, 0.5), "train.clip": Range(1, 20),
        "train.pace": Range(1, 2, log=True), "method.scale": [0.1, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("space", "kind", "line"),
    [
        ({}, RecipeError, "nothing to search"),
        ({"train.lrr": [1.0]}, RecipeError, "no key in [train] named 'lrr'; did you mean 'lr'?"),
        ({"trian.lr": [1.0]}, RecipeError, "no section named 'trian'; did you mean 'train'?"),
        ({"lr": [1.0]}, RecipeError, "no section named 'lr'"),
        ({"data.seed": [1, 2]}, RecipeError, "data.seed cannot be searched"),
        ({"model.name": ["tiny"]}, RecipeError, "model.name cannot be searched"),
        ({"method.scael": [1.0]}, MethodError, "scael"),
        ({"method.rank": [0]}, MethodError, "rank"),
        ({"train.lr": [-1.0]}, TrainingError, "train.lr must be zero or more, got -1.0"),
        ({"train.lr": []}, RecipeError, "neither a list of values nor a range"),
        ({"train.lr": 0.1}, RecipeError, "neither a list of values nor a range"),
        ({"train.lr": [float("nan")]}, RecipeError, "not a finite number"),
        ({"train.lr": {"low": 1.0}}, RecipeError, "needs low and high"),
        ({"train.lr": {"low": 1.0, "hihg": 2.0}}, RecipeError, "did you mean 'high'?"),
        ({"train.lr": Range(1.0, 0.1)}, RecipeError, "must rise from low to high"),
        ({"train.lr": Range(0.0, 0.1, log=True)}, RecipeError, "low must be above zero"),
        ({"train.lr": Range(0.0, 0.1, step=0.0)}, RecipeError, "step of train.lr must be above zero"),
        ({"method.rank": Range(1, 2.5)}, RecipeError, "method.rank is a whole number"),
        ({"train.epochs": [1, 2]}, RecipeError, "train.epochs is searched and also said to be 1"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_anything_runs(recipe, tmp_path, space, kind, line):
    with pytest.raises(kind) as refused:
        next(search(recipe, space, Search(epochs=1), tmp_path / "out"))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_values_are_taken_as_the_recipe_has_them(recipe):
    plan = checked(
        recipe, {"method.scale": [1, 1.0, 2], "method.rank": {"low": 1, "high": 8, "log": True}}, "tpe", None
    )
    assert plan == {"method.scale": (1.0, 2.0), "method.rank": Range(1, 8, log=True)}
    stepped = checked(recipe, {"train.warmup": Range(0, 0.3, step=0.1)}, "grid", None)["train.warmup"]
    assert stepped == pytest.approx((0, 0.1, 0.2, 0.3))
    with pytest.raises(RecipeError, match=r"'grid' needs a list of values for train.lr"):
        checked(recipe, {"train.lr": Range(0.1, 1)}, "grid", None)


def test_the_default_space_has_the_scale_of_each_method_that_has_one(recipe):
    for name, scales in {"lora": {"method.scale"}, "bitfit": set(), "lora+bitfit": {"method.lora.scale"}}.items():
        some = read_recipe(None, [f"method.name={name}"])
        for sampler in ("grid", "tpe", "random"):
            space = default_space(some, sampler)
            assert set(space) == {"train.lr", "train.weight_decay"} | scales
            checked(some, space, sampler, None)
    assert set(default_space(recipe, "elevater")) == {"train.lr", "train.weight_decay"}


# --- samplers --------------------------------------------------------------------------------------------------------


def test_a_grid_is_all_combinations_the_last_key_fastest():
    assert [tuple(v.values()) for v in grid({"a": (1, 2), "b": (3, 4)})] == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_the_values_of_elevater_are_those_of_the_toolkit():
    np.testing.assert_allclose(RATES, np.logspace(-6, -1, 6), rtol=1e-14)
    np.testing.assert_allclose(DECAYS, np.logspace(-6, 6, 97), rtol=1e-14)


def toolkit(score, rates, decays):
    """The sweep of the ELEVATER toolkit, told again with loops; what it tries, in order, and what it chooses."""
    tried, best = [], (0, None, None)
    for lr in rates:
        peak, top = None, 0
        for i in range(0, 97, 16):
            tried.append((lr, decays[i]))
            if score(lr, decays[i]) > top:
                peak, top = i, score(lr, decays[i])
        if peak is None:
            continue
        span = 8
        while span > 0:
            left, right = max(peak - span, 0), min(peak + span, 96)
            for i in [i for i in (left, right) if i != peak]:
                tried.append((lr, decays[i]))
                if score(lr, decays[i]) > top:
                    peak, top = i, score(lr, decays[i])
            span //= 2
        if top > best[0]:
            best = (top, lr, decays[peak])
    return tried, best


@pytest.mark.parametrize("seed", range(8))
def test_elevater_tries_what_the_toolkit_tries_and_chooses_the_same(seed):
    numbers = np.random.default_rng(seed)
    a, b, c = numbers.uniform(-6, 6), numbers.uniform(-5, -1), numbers.uniform(0, 1)

    def score(lr, decay):  # a hill with plateaus; high rates diverge
        if np.log10(lr) > -1.5 and seed % 2:
            return None
        return round(float(np.exp(-0.05 * (np.log10(decay) - a) ** 2 - c * (np.log10(lr) - b) ** 2)), 1 + seed % 3)

    plan = {"train.lr": RATES, "train.weight_decay": DECAYS}
    points = []
    while values := elevater(plan, points):
        found = score(*values.values())
        points.append(Point(values, "failed" if found is None else "complete", found))
    tried, best = toolkit(lambda lr, decay: score(lr, decay) or 0, RATES, DECAYS)
    assert [tuple(p.values.values()) for p in points] == tried
    top = max(points, key=lambda p: p.accuracy or 0)
    assert (top.accuracy, *top.values.values()) == best


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_proposal_depends_on_the_points_alone_and_is_new(sampler):
    plan = {"train.lr": Range(1e-4, 1, log=True), "method.rank": Range(1, 4), "method.scale": (0.1, 1.0)}
    points = []
    for i in range(24):
        values = propose(plan, sampler, 24, 5, points, {"method.rank"})
        assert values == propose(plan, sampler, 24, 5, list(points), {"method.rank"})
        assert 1e-4 <= values["train.lr"] <= 1
        assert values["method.rank"] in (1, 2, 3, 4)
        assert values not in [p.values for p in points]
        state = ("complete", "pruned", "failed")[i % 3]
        accuracy = 1 - abs(np.log10(values["train.lr"]) + 2) / 4
        points.append(Point(values, state, accuracy if state == "complete" else None, {1: accuracy}))
    assert propose(plan, sampler, 24, 5, points, {"method.rank"}) is None
    assert propose(plan, sampler, 25, 6, points[:3], {"method.rank"}) != points[3].values


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_small_space_is_used_up_and_nothing_is_proposed_twice(sampler):
    plan = {"method.scale": (0.1, 1.0), "method.rank": Range(1, 3)}
    points = []
    while values := propose(plan, sampler, 50, 0, points, {"method.rank"}):
        points.append(Point(values, "complete", values["method.scale"] / values["method.rank"]))
    assert len({p.name for p in points}) == len(points) == 6


def test_tpe_finds_a_hill_better_than_chance():
    def best(sampler, seed):
        points = []
        while values := propose({"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}, sampler, 30, seed, points, set()):
            points.append(Point(values, "complete", 1 - (values["x"] - 0.3) ** 2 - (values["y"] - 0.8) ** 2))
        return max(p.accuracy for p in points)

    assert np.mean([best("tpe", s) for s in range(5)]) > np.mean([best("random", s) for s in range(5)])


@pytest.mark.parametrize("seed", range(5))
def test_halving_stops_the_trials_that_optuna_would_stop(seed):
    epochs, numbers = 30, np.random.default_rng(seed)
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    )
    others, stopped = [], 0
    for _ in range(30):
        trial, curve = study.ask(), {}
        for epoch in range(1, epochs + 1):
            curve[epoch] = float(numbers.integers(0, 20)) / 20
            trial.report(curve[epoch], epoch)
            asked = trial.should_prune() if epoch < epochs else False
            assert halved(curve, others, epochs) == asked, (epoch, curve)
            if asked:
                stopped += 1
                break
        study.tell(trial, state=optuna.trial.TrialState.PRUNED if asked else None, values=None if asked else 0.0)
        others.append(curve)
    assert 10 < stopped < 30


# --- the search ------------------------------------------------------------------------------------------------------


def test_a_grid_is_trained_and_the_best_is_written_into_the_recipe(recipe, tmp_path):
    space = {"train.lr": [1e-4, 1e-2], "method.scale": [1, 4]}
    seen, found = carried(search(recipe, space, Search(sampler="grid", epochs=1), tmp_path))
    assert tuple(seen) == found.trials
    assert [t.number for t in seen] == [0, 1, 2, 3]
    assert [tuple(t.values.values()) for t in seen] == [(1e-4, 1.0), (1e-4, 4.0), (1e-2, 1.0), (1e-2, 4.0)]
    for trial in seen:  # each is what an ordinary run gives, and test was not read
        plain = placed(recipe, {**trial.values, "train.epochs": 1})
        _, told = carried(run(plain, tmp_path / f"plain-{trial.number}", test=False))
        assert (trial.accuracy, trial.epochs, trial.state) == (told["val_accuracy"], 1, "complete")
    best = sorted(seen, key=lambda t: (-t.accuracy, t.values["train.lr"], t.number))[0]
    assert (found.values, found.accuracy) == (best.values, best.accuracy)
    assert found.recipe == placed(recipe, best.values)
    assert found.recipe.train.epochs == recipe.train.epochs
    assert read_recipe(tmp_path / "best.toml").plain() == found.recipe.plain()
    folders = list((tmp_path / "trials").iterdir())
    assert len(folders) == 4
    assert not list(tmp_path.glob("trials/*/*.safetensors"))
    assert not list(tmp_path.glob("trials/*/test-reads.jsonl"))
    assert all(json.loads((f / "run.json").read_text())["test_accuracy"] is None for f in folders)


def test_a_search_that_is_done_gives_the_same_files_again(recipe, tmp_path):
    settings = Search(sampler="random", trials=2, epochs=1)
    space = {"train.lr": Range(1e-4, 1e-2, log=True)}
    _, found = carried(search(recipe, space, settings, tmp_path))
    files = {name: (tmp_path / name).read_bytes() for name in ("trials.json", "best.toml")}
    for name in files:
        (tmp_path / name).unlink()
    seen, again = carried(search(recipe, space, settings, tmp_path))
    assert seen == []
    assert again == found
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    more, grown = carried(search(recipe, space, settings.model_copy(update={"trials": 3}), tmp_path))
    assert len(more) == 1
    assert grown.trials[:2] == found.trials


def test_another_search_in_the_same_folder_is_refused(recipe, tmp_path):
    settings = Search(sampler="grid", epochs=1)
    carried(search(recipe, {"train.lr": [0.01]}, settings, tmp_path))
    for change in (
        lambda: search(recipe, {"train.lr": [0.02]}, settings, tmp_path),
        lambda: search(recipe, {"train.lr": [0.01]}, Search(sampler="grid", epochs=2), tmp_path),
        lambda: search(placed(recipe, {"train.batch_size": 4}), {"train.lr": [0.01]}, settings, tmp_path),
    ):
        with pytest.raises(TrainingError, match=r"holds another search: .* was .*, now it is .*; choose another --out"):
            next(change())


def test_a_trial_that_diverges_fails_alone(recipe, tmp_path):
    seen, found = carried(search(recipe, {"train.lr": [1e30, 0.01]}, Search(sampler="grid"), tmp_path))
    assert [t.state for t in seen] == ["failed", "complete"]
    assert seen[0].accuracy is None
    assert "lower train.lr" in seen[0].error
    assert "\n" not in seen[0].error
    assert found.values == {"train.lr": 0.01}
    with pytest.raises(
        TrainingError, match=r"none of 1 trials came to an end; the first with train.lr = 1e\+30: the loss is nan"
    ):
        carried(search(recipe, {"train.lr": [1e30]}, Search(sampler="grid"), tmp_path / "all"))
    seen, _ = carried(search(recipe, {"train.lr": [1e30, 0.01]}, Search(sampler="grid"), tmp_path))
    assert seen == []  # it is not tried again


def test_values_that_are_refused_only_together_fail_alone(recipe, tmp_path):
    space = {"train.warmup": [2.0, 0.1]}
    with pytest.raises(TrainingError, match="warmup is a share"):
        next(search(recipe, space, Search(sampler="grid"), tmp_path))
    few = placed(recipe, {"method.name": "kadaptation"})
    seen, _ = carried(search(few, {"method.n": [5, 4]}, Search(sampler="grid", epochs=1), tmp_path / "n"))
    assert [t.state for t in seen] == ["failed", "complete"]
    assert "5" in seen[0].error


def test_what_no_trial_can_do_without_stops_the_search(recipe, tmp_path):
    with pytest.raises(DataError):
        next(
            search(placed(recipe, {"data.path": str(tmp_path / "none")}), {"train.lr": [0.1]}, Search(), tmp_path / "a")
        )
    with pytest.raises(TrainingError, match="no data"):
        next(search(placed(recipe, {"data.path": ""}), {"train.lr": [0.1]}, Search(), tmp_path / "b"))


def test_two_trials_share_no_state(recipe, tmp_path):
    space = {"method.rank": [2, 4]}

    def weights(out, order):
        carried(search(recipe, {"method.rank": order}, Search(sampler="grid"), tmp_path / out, keep=True))
        told = json.loads((tmp_path / out / "trials.json").read_text())
        return {
            t["values"]["method.rank"]: (t["accuracy"], read(tmp_path / out / t["folder"] / "adapter.safetensors")[0])
            for t in told["trials"]
        }

    first, last = weights("up", space["method.rank"]), weights("down", space["method.rank"][::-1])
    for rank, (accuracy, tensors) in first.items():
        assert accuracy == last[rank][0]
        assert all((tensors[name] == last[rank][1][name]).all() for name in tensors)


def test_a_pruned_trial_is_never_the_best_and_is_not_run_again(recipe, tmp_path):
    settings = Search(sampler="grid", pruner="halving", epochs=4)
    space = {"train.lr": [0.01, 1e-6, 1e-7, 0.02]}
    seen, found = carried(search(recipe, space, settings, tmp_path))
    pruned = [t for t in seen if t.state == "pruned"]
    assert pruned
    assert all(t.accuracy is None and t.epochs in (1, 3) for t in pruned)
    assert found.values not in [t.values for t in pruned]
    assert not list(tmp_path.glob("trials/*/*.safetensors"))
    again, _ = carried(search(recipe, space, settings, tmp_path))
    assert again == []


def test_a_search_stopped_in_a_trial_goes_on_from_its_checkpoint(recipe, tmp_path):
    space, settings = {"train.lr": [0.01, 0.003]}, Search(sampler="grid", epochs=3)

    class Stop(Exception):
        pass

    def watch(number, step):
        if (number, step.step) == (1, 5):
            raise Stop

    steps = search(recipe, space, settings, tmp_path / "a", watch=watch)
    next(steps)
    with pytest.raises(Stop):
        next(steps)
    done = []
    seen, _ = carried(search(
        recipe, space, settings, tmp_path / "a", watch=lambda number, step: done.append((number, step.step))
    ))  # fmt: skip
    assert done == [(1, step) for step in range(6, 10)]
    assert [t.number for t in seen] == [1]
    carried(search(recipe, space, settings, tmp_path / "b"))
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")


def without_seconds(out):
    told = json.loads((Path(out) / "trials.json").read_text())
    return {**told, "trials": [{k: v for k, v in trial.items() if k != "seconds"} for trial in told["trials"]]}


# --- the ledger ------------------------------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path):
    space = distributions({"train.lr": (0.1, 0.2, 0.3)}, set())
    made = []

    def open_ledger(home=tmp_path / "{odd} 100% #?.db"):
        made.append(Ledger(home, "one", space))
        return made[-1]

    yield open_ledger
    for ledger in made:
        ledger.close()


def test_a_dead_trial_is_one_point_with_its_second_try(books):
    ledger = books()
    first = ledger.claim({"train.lr": 0.1}, 0)
    ledger.epoch(first, 1, 0.5)
    again = books()
    assert [p.state for p in again.points()] == ["running"]
    assert (again.bury(), again.bury()) == (1, 0)
    (point,) = again.points()
    assert (point.state, point.values, point.curve) == ("dead", {"train.lr": 0.1}, {1: 0.5})
    second = again.claim(point.values, 3)
    again.settle(second, "complete", accuracy=0.75, epochs=2, seconds=1.0)
    other = again.claim({"train.lr": 0.2}, 0)
    again.settle(other, "failed", error="it diverged")
    assert [(p.state, p.accuracy, p.error) for p in books().points()] == [
        ("complete", 0.75, None), ("failed", None, "it diverged"),
    ]  # fmt: skip
    assert not ledger.settle(first, "complete", accuracy=0.1)  # back from the dead: too late
    assert [p.accuracy for p in books().points()] == [0.75, None]


def test_values_that_kill_their_process_again_and_again_are_given_up(recipe, tmp_path):
    space, settings = {"train.lr": [0.01, 0.003]}, Search(sampler="grid", epochs=1)
    steps = search(recipe, space, settings, tmp_path)
    next(steps)
    steps.close()
    told = json.loads((tmp_path / "search.json").read_text())
    name = optuna.get_all_study_names(f"sqlite:///{tmp_path / 'search.db'}")
    ledger = Ledger(
        tmp_path / "search.db", name[0], distributions({"train.lr": tuple(told["space"]["train.lr"])}, set())
    )
    for n in range(GIVE_UP):
        assert [p.stuck for p in ledger.points()][1:] == ([n] if n else [])
        ledger.claim({"train.lr": 0.003}, 0)
        ledger.bury()
    ledger.close()
    seen, _ = carried(search(recipe, space, settings, tmp_path))
    assert [(t.number, t.state) for t in seen] == [(1, "failed")]
    assert "5 processes died of it" in seen[0].error


def test_processes_that_share_a_database_do_not_take_each_others_trials(books, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    mine, yours = books(url), books(url)
    first = mine.claim({"train.lr": 0.1}, 0)
    assert first is not None
    assert yours.claim({"train.lr": 0.1}, 0) is None
    with mine.alive(first):
        assert yours.bury() == 0  # it gives signs of life
    mine.settle(first, "complete", accuracy=0.5)
    assert yours.claim({"train.lr": 0.1}, 0) is None
    assert [p.state for p in yours.points()] == ["complete"]


def test_a_searchs_process_uses_what_another_found_in_a_shared_database(recipe, tmp_path):
    settings = Search(sampler="grid", epochs=1, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    space = {"train.lr": [0.01, 0.003]}
    one = search(recipe, space, settings, tmp_path / "one")
    assert next(one).number == 0
    seen, found = carried(search(recipe, space, settings, tmp_path / "two"))
    assert [t.number for t in seen] == [1]
    assert len(found.trials) == 2
    assert carried(one)[1] == found
    assert "password" not in (tmp_path / "one" / "search.json").read_text()


def test_a_database_that_cannot_be_used_is_one_clear_line(recipe, tmp_path):
    (tmp_path / "search.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(FileError, match=r"search.db cannot be used: file is not a database; it is damaged"):
        next(search(recipe, {"train.lr": [0.1]}, Search(sampler="grid"), tmp_path))
    away = Search(sampler="grid", storage="postgresql://me:secret@127.0.0.1:1/x")
    with pytest.raises((FileError, TrainingError), match=r"postgresql://me:\*\*\*@127.0.0.1:1/x") as refused:
        next(search(recipe, {"train.lr": [0.1]}, away, tmp_path / "b"))
    assert "secret" not in str(refused.value) + (tmp_path / "b" / "search.json").read_text()
    with pytest.raises(FileError, match="no URL such as"):
        next(search(recipe, {"train.lr": [0.1]}, Search(sampler="grid", storage="secret"), tmp_path / "c"))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files")
def test_a_full_disk_is_one_clear_line_and_loses_no_trial(recipe, tmp_path):
    import resource

    space, settings = {"train.lr": [0.01, 0.003]}, Search(sampler="grid", epochs=1)
    steps = search(recipe, space, settings, tmp_path)
    first = next(steps)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        with pytest.raises(FileError, match=r"search.db cannot be used: .*; .*run the same command again"):
            next(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    seen, found = carried(search(recipe, space, settings, tmp_path))
    assert [t.number for t in seen] == [1]
    assert found.trials == (first, *seen)


def test_without_optuna_one_line_says_how_to_get_it(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(TrainingError, match=r"pip install 'deltavit\[search\]'"):
        next(search(recipe, {"train.lr": [0.1]}, Search(sampler="grid"), tmp_path))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(pictures):
    app = typer.Typer()
    app.command()(cli.search)
    app.command("other")(lambda: None)  # with two, the first keeps its name

    def call(out, *args):
        fixed = ["data.workers=0", "train.batch_size=8", "device=cpu", "--json", "--epochs", "1", "--out", str(out)]
        made = ["search", "--data", str(pictures), "--model", "tiny", "--method", "lora", *fixed, *args]
        return CliRunner().invoke(app, made)

    return call


def test_the_command_searches_and_says_what_to_train(command, tmp_path):
    args = ["--sampler", "grid", "--space", "train.lr=0.01,1e30", "--space", "method.rank=2,4"]
    done = command(tmp_path / "out", *args)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["values"]["train.lr"] == 0.01
    assert [t["state"] for t in told["trials"]] == ["complete", "complete", "failed", "failed"]
    best = read_recipe(told["recipe"])
    assert (best.train.lr, best.method["rank"]) == (0.01, told["values"]["method.rank"])
    assert best.train.epochs == read_recipe().train.epochs
    again = command(tmp_path / "out", *args)
    assert json.loads(again.stdout.splitlines()[-1]) == told
    other = command(tmp_path / "out", *args[:2], "--space", "train.lr=0.02,1e30")
    assert isinstance(other.exception, TrainingError)
    assert "holds another search" in str(other.exception)


def test_the_command_refuses_a_sampler_that_there_is_not(command, tmp_path):
    refused = command(tmp_path, "--sampler", "gird")
    assert isinstance(refused.exception, RecipeError)
    assert "--sampler gird: input should be 'grid'" in str(refused.exception)


def test_ctrl_c_leaves_a_search_that_goes_on(command, tmp_path, monkeypatch):
    args = ["--sampler", "grid", "--space", "train.lr=0.01,0.02"]
    said, steps = cli.say, []

    def say(line):  # after the first trial, as a person would
        if line.startswith("trial   0"):
            os.kill(os.getpid(), signal.SIGINT)
        said(line)

    monkeypatch.setattr(cli, "say", say)
    stopped = command(tmp_path, *args)
    assert isinstance(stopped.exception, Interrupted)
    assert "the same command goes on" in str(stopped.exception)
    monkeypatch.setattr(cli, "say", steps.append)
    done = command(tmp_path, *args)
    assert len(json.loads(done.stdout.splitlines()[-1])["trials"]) == 2
    assert "1 unfinished trial" not in " ".join(steps)  # it was given back
    assert [line[:9] for line in steps if line.startswith("trial")] == ["trial   1"]


KILLED = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from deltavit.search import Range, Search, search
from deltavit.train.recipe import read_recipe

recipe = read_recipe(Path(sys.argv[1]))
folder = Path(sys.argv[2])

def work(out, trials, watch=lambda number, step: None):
    space = {"train.lr": Range(1e-4, 1e-1, log=True), "method.rank": Range(1, 8)}
    settings = Search(sampler="tpe", trials=trials, pruner="halving")
    for _ in search(recipe, space, settings, folder / out, watch=watch):
        pass

work("warm", 1)  # what is imported now is not imported after every kill
random.seed(3)  # of which no trial is killed five times at the same step
for _ in range(50):
    seen, told = os.pipe()
    child = os.fork()
    if not child:
        work("killed", 1000, lambda number, step: os.write(told, b"."))
        os._exit(0)
    os.close(told)
    for _ in range(random.randrange(5)):
        assert os.read(seen, 1)
    time.sleep(random.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    os.close(seen)
    print("killed", flush=True)
trials = 2 + len(json.loads((folder / "killed" / "trials.json").read_text())["trials"])
work("killed", trials)
work("whole", trials)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fifty_kills_lose_no_trial_and_count_none_twice(recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(placed(recipe, {"train.epochs": 5, "train.batch_size": 22}).toml())
    worker = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "recipe.toml"), str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told, bests = tmp_path / "killed" / "trials.json", []
    for _ in worker.stdout:
        trials = json.loads(told.read_text())["trials"] if told.exists() else []
        bests.append(max((t["accuracy"] or 0 for t in trials), default=0))
    assert worker.wait() == 0
    assert bests == sorted(bests)  # the best never falls
    assert len(bests) == 50
    found = without_seconds(tmp_path / "killed")
    assert found == without_seconds(tmp_path / "whole")  # not one trial more, less or other than without a kill
    values = [json.dumps(t["values"]) for t in found["trials"]]
    assert len(values) == len(set(values)) > 2
    url = f"sqlite:///{tmp_path / 'killed' / 'search.db'}"
    (name,) = optuna.get_all_study_names(url)
    states = [(json.dumps(t.params), t.state.name) for t in optuna.load_study(study_name=name, storage=url).trials]
    ended = [values for values, state in states if state in ("COMPLETE", "PRUNED")]
    assert sorted(ended) == sorted(values)
    assert sum(state == "FAIL" for _, state in states) > 20  # the kills did hit trials
