"""Suites: what they refuse, what a cell's identity is, that nothing is run twice, lost, or shared between runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import deltavit
from deltavit.bench import bench, estimate, read_records, read_suite
from deltavit.bench.engine import Here
from deltavit.bench.work import work
from deltavit.core.errors import DataError, DeltavitError, FileError, RecipeError, TrainingError
from deltavit.core.sealed import write_bytes
from deltavit.train.recipe import Recipe
from deltavit.train.run import run as train

RECIPES = Path(deltavit.__file__).parents[1] / "recipes"
SUITE = """
name = "tiny"
seeds = [0, 1]
[models.pico]
name = "vit_pico"
[data]
root = "sets"
sets = ["colours"]
[train]
epochs = 1
batch_size = 8
[[methods]]
label = "linear probing"
method = "linear"
[[methods]]
method = {name = "lora", rank = 2}
"""
SEARCH = """
[search]
sampler = "grid"
head = "linear probing"
space = {"train.lr" = [0.001, 0.01]}
"""


@pytest.fixture
def suite(tmp_path, pictures):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "colours").symlink_to(pictures)
    return lambda text=SUITE, **changes: read_suite(_write(tmp_path / "suite.toml", text), changes)


def _write(path, text):
    path.write_text(text)
    return path


def drain(steps):
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def run(told, out, **options):
    return drain(bench(told, out, Here(), **options))


TIMES = ("seconds", "peak_bytes")


def lasting(records):
    """What must be equal between two runs of the same cell: all but how long it took."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"methds": []}, "no key at the top named 'methds'; did you mean 'methods'?"),
        ({"data.protcol": "folder"}, "no key data named 'protcol'; did you mean 'protocol'?"),
        ({"train.epoch": 3}, "no key in [train] named 'epoch'; did you mean 'epochs'?"),
        ({"data.protocol": "vtab"}, "no protocol named 'vtab'; did you mean 'vtab-1k'?"),
        ({"data.sets": ["cifar10"], "data.protocol": "vtab-1k"}, "did you mean 'cifar100'?"),
        ({"methods": [{"method": "lora"}, {"method": "lora"}]}, "two methods are labelled 'lora'"),
        ({"methods": [{"method": {"name": "lora", "rnk": 2}}]}, "'rnk'"),
        ({"methods": [{"method": "kronecer"}]}, "kronecer"),
        ({"methods": []}, "must not be empty"),
        ({"seeds": [1, 1]}, "a seed comes twice in [1, 1]"),
        ({"search": {"head": "linear probin", "space": {}}}, "did you mean 'linear probing'?"),
        ({"models.pi~co": {"name": "vit_pico"}}, "label 'pi~co'"),
        ({"train.lr": -1}, "train.lr must be zero or more"),
    ],
)
def test_a_suite_that_cannot_run_is_refused_with_the_way_out(suite, change, line):
    with pytest.raises(DeltavitError) as refused:
        [cell.key for cell in suite(**change).cells()]
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_suite_is_the_product_of_its_parts_seed_by_seed(suite):
    told = suite(**{"seeds": [3, 1], "data.shots": [1, 2]})
    cells = [(c.seed, c.shots, c.method) for c in told.cells()]
    methods = ("linear probing", "lora")
    assert cells == [(s, k, m) for s in (3, 1) for k in (1, 2) for m in methods]
    assert len({c.key for c in told.cells()}) == 8


def test_the_key_of_a_cell_follows_what_decides_its_result_and_not_where_things_lie(suite, tmp_path):
    def keys(**changes):
        return [c.key for c in suite(**changes).cells()]

    plain = keys()
    assert keys(**{"data.workers": 0, "data.root": str(tmp_path / "sets"), "device": "cpu", "title": "T"}) == plain
    for change in ({"train.epochs": 2}, {"models.pico.image_size": 64}, {"leaky": 1}, {"data.train_on": "train+val"}):
        assert not set(keys(**change)) & set(plain)
    both = keys(methods=[{"label": "linear probing", "method": "linear"}, {"method": {"name": "lora", "rank": 3}}])
    assert [a == b for a, b in zip(plain, both, strict=True)] == [True, False, True, False]


def test_a_suite_runs_once_and_its_records_are_a_pure_function_of_it(suite, tmp_path):
    told = suite()
    seen, records = run(told, tmp_path / "one")
    assert [end.done for end in seen] == [1, 2, 3, 4]
    assert all(r["status"] == "done" and r["clean"] and 0 <= r["test_accuracy"] <= 1 for r in records)
    files = {p.name: p.read_bytes() for p in (tmp_path / "one" / "records").iterdir()}
    assert run(told, tmp_path / "one") == ([], records)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one" / "records").iterdir()} == files

    last = records[-1]["key"]  # without those that ran before it in the same process
    (tmp_path / "one" / "records" / f"{last}.json").unlink()
    again, whole = run(told, tmp_path / "one")
    assert [end.key for end in again] == [last]
    assert lasting(whole) == lasting(records)
    read, problems = read_records(tmp_path / "one")
    assert not problems
    assert sorted(r["key"] for r in read) == sorted(r["key"] for r in whole)


def test_two_runs_in_one_process_share_no_state(suite, tmp_path):
    told = suite(seeds=[0])
    _, forth = run(told, tmp_path / "forth")
    torch.manual_seed(12)
    told = suite(seeds=[0], methods=[m.model_dump() for m in reversed(told.methods)])
    _, back = run(told, tmp_path / "back")
    assert lasting(back) == lasting(forth[::-1])


def test_the_search_of_a_suite_is_on_val_and_serves_all_seeds(suite, tmp_path):
    told = suite(SUITE + SEARCH)
    seen, records = run(told, tmp_path / "out")
    studies = [end for end in seen if end.kind == "search"]
    assert len(studies) == 2
    linear, lora = (end.result for end in studies)
    assert [t["values"]["train.lr"] for t in lora["trials"]] == [0.001, 0.01]
    assert lora["accuracy"] == max(t["accuracy"] for t in lora["trials"])
    assert lora["head_lr"] == linear["values"]["train.lr"]
    for r in records:
        study = linear if r["method"] == "linear probing" else lora
        assert r["chosen"]["train.lr"] == study["values"]["train.lr"] == r["recipe"]["train"]["lr"]
        assert r["search"]["val_accuracy"] == study["accuracy"]
    assert records[1]["recipe"]["train"]["head_lr"] == linear["values"]["train.lr"]
    assert not list((tmp_path / "out").rglob("trials/**/test-reads.jsonl"))


def test_a_failed_cell_fails_alone_and_keeps_its_traceback(suite, tmp_path):
    told = suite(methods=[
        {"method": "lora", "train": {"lr": 1e30}}, {"method": {"name": "kadaptation", "n": 5}}, {"method": "bitfit"}
    ], seeds=[0])  # fmt: skip
    seen, (hot, odd, good) = run(told, tmp_path / "out")
    assert [end.error is None for end in seen] == [False, False, True]
    assert (hot["status"], odd["status"], good["status"]) == ("failed", "failed", "done")
    assert "lower train.lr" in hot["error"]["line"]
    assert "Traceback (most recent call last)" in hot["error"]["traceback"]
    assert "n=5" in odd["error"]["line"]
    assert run(told, tmp_path / "out")[0] == []
    assert [end.key for end in run(told, tmp_path / "out", retry=True)[0]] == [hot["key"], odd["key"]]


def test_a_failed_search_fails_the_cells_that_need_it(suite, tmp_path):
    told = suite(SUITE + SEARCH, seeds=[0], methods=[
        {"label": "linear probing", "method": "linear"}, {"method": "lora", "space": {"train.lr": [1e30]}}
    ])  # fmt: skip
    _, (linear, lora) = run(told, tmp_path / "out")
    assert linear["status"] == "done"
    assert lora["error"]["line"].startswith("its search failed: ")


def test_missing_data_sets_are_all_named_before_anything_begins(suite, tmp_path):
    told = suite(**{"data.sets": ["colours", "shapes", "sizes"]})
    with pytest.raises(DataError, match=r"shapes.*sizes"):
        run(told, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_record_is_put_aside_and_its_cell_runs_again(suite, tmp_path):
    told = suite(seeds=[0])
    _, records = run(told, tmp_path / "out")
    path = tmp_path / "out" / "records" / (records[0]["key"] + ".json")
    torn = path.read_bytes()[:-40]
    path.write_bytes(torn)
    said = []
    seen, again = run(told, tmp_path / "out", say=said.append)
    assert [end.key for end in seen] == [records[0]["key"]]
    assert lasting(again) == lasting(records)
    assert path.with_suffix(".aside").read_bytes() == torn
    assert len(said) == 1
    assert "torn" in said[0]


def test_a_record_that_was_run_with_other_values_is_put_aside(suite, tmp_path):
    told = suite(seeds=[0], methods=["linear"])
    _, (record,) = run(told, tmp_path / "out")
    record["recipe"]["train"]["clip"] = 5.0  # as if the default had been another
    record["recipe"]["train"]["of_another_version"] = 1
    write_bytes(tmp_path / "out" / "records" / (record["key"] + ".json"), json.dumps(record).encode())
    said = []
    _, (again,) = run(told, tmp_path / "out", say=said.append)
    assert "train.clip = 5.0, now 1.0" in said[0]
    assert again["recipe"]["train"]["clip"] == 1.0


@pytest.mark.parametrize(
    ("bytes_", "line"),
    [
        (b"{", "torn"), (b"[]", "format None"), (b'{"format": 2}', "format 2"), (b'{"format": 1}', "lacks key"),
        (b"\xff", "torn"), (b"[" * 100_000, "torn"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record_is_one_line_and_the_others_are_read(suite, tmp_path, bytes_, line):
    _, records = run(suite(seeds=[0], methods=["linear"]), tmp_path / "out")
    (tmp_path / "out" / "records" / "bad.json").write_bytes(bytes_)
    read, problems = read_records(tmp_path / "out")
    assert [r["key"] for r in read] == [r["key"] for r in records]
    assert len(problems) == 1
    assert line in problems[0]
    assert "bad.json" in problems[0]


def test_a_full_disk_is_one_line_and_every_record_before_it_stays(suite, tmp_path, monkeypatch):
    told = suite()
    steps = bench(told, tmp_path / "out", Here())
    next(steps)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out" / "records").iterdir()}

    def full(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(FileError, match="No space left"):
        drain(steps)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "records").glob("*.json")} == kept
    assert len(run(told, tmp_path / "out")[1]) == 4


def test_one_process_owns_the_folder(suite, tmp_path):
    first = bench(suite(), tmp_path / "out", Here())
    next(first)
    with pytest.raises(TrainingError, match="is in use by"):
        run(suite(), tmp_path / "out")
    first.close()


def test_only_takes_the_cells_that_match(suite, tmp_path):
    _, records = run(suite(), tmp_path / "out", only="*~linear-probing~0~*")
    assert [(r["method"], r["seed"]) for r in records] == [("linear probing", 0)]
    with pytest.raises(DataError, match="no cell matches"):
        run(suite(), tmp_path / "out", only="*~dora~*")


def test_a_dry_run_counts_what_is_left(suite, tmp_path):
    told = suite(SUITE + SEARCH)
    guess = estimate(told, tmp_path / "out")
    assert (guess.cells, guess.done, guess.studies, guess.trials) == (4, 0, 2, 4)
    assert guess.seconds > 0
    # each cell: 22 pictures of train, and a third of 7 of val and 7 of test; each trial: a third of 7 of val alone
    assert guess.pictures == 4 * (22 + 14 // 3) + 4 * (22 + 7 // 3)
    run(told, tmp_path / "out", only="*~0~*")
    assert estimate(told, tmp_path / "out", measure=False).done == 2
    assert estimate(suite(**{"data.sets": ["nothing"]}), measure=False).missing


def test_the_leaky_column_is_the_best_epoch_on_test_and_changes_nothing_else(suite, tmp_path):
    honest = run(suite(seeds=[0], **{"train.epochs": 3}), tmp_path / "honest")[1]
    leaky = run(suite(seeds=[0], leaky=1, **{"train.epochs": 3}), tmp_path / "leaky")[1]
    for h, k in zip(honest, leaky, strict=True):
        assert h["leaky"] is None
        assert k["test_accuracy"] == h["test_accuracy"]
        assert k["leaky"]["accuracy"] >= k["test_accuracy"]
        assert 1 <= k["leaky"]["epoch"] <= 3
        assert k["clean"]
        assert all(r["step"] == r["steps"] for r in k["test_reads"])
    model = deltavit.load_model("vit_pico")  # each epoch's state, read by hand
    data = deltavit.open_data(tmp_path / "sets" / "colours")
    train, test = (deltavit.Images(part, deltavit.anatomy(model).preprocessing) for part in (data.train, data.test))
    adapter = deltavit.attach(model, deltavit.method("lora", rank=2), classes=data.classes, seed=0)
    training = deltavit.Training(epochs=3, batch_size=8, seed=0)
    ends = [deltavit.evaluate(model, test).accuracy for s in deltavit.fit(model, adapter, train, None, training)
            if s.step % 3 == 0]  # fmt: skip
    assert leaky[1]["leaky"] == {"accuracy": max(ends), "epoch": 1 + ends.index(max(ends))}


def test_records_hold_no_path_of_this_machine(suite, tmp_path):
    _, records = run(suite(seeds=[0], methods=["linear"]), tmp_path / "out")
    assert str(tmp_path) not in json.dumps(records)
    shutil.rmtree(tmp_path / "out")


def test_a_suite_file_that_is_not_there_or_not_toml_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="cannot read the suite"):
        read_suite(tmp_path / "none.toml")
    write_bytes(tmp_path / "bad.toml", b"name = ")
    with pytest.raises(RecipeError, match="is not TOML"):
        read_suite(tmp_path / "bad.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_suite_that_comes_with_us_can_be_read_and_counted_without_its_data(path):
    if "[[methods]]" not in path.read_text():
        pytest.skip("a recipe of one run")
    told = read_suite(path)
    guess = estimate(told, measure=False)
    assert guess.cells == len(list(told.cells())) > 0
    assert guess.disk > 0
    assert guess.pictures > 0 or guess.missing


def test_a_run_under_way_goes_on_where_its_pictures_lie_elsewhere(suite, tmp_path, pictures):
    told = suite(seeds=[0], methods=["bitfit"], **{"train.epochs": 2})
    (cell,) = told.cells()
    spec = cell.spec()
    steps = train(Recipe(**spec["recipe"]).model_copy(update={"data": _at(spec, pictures)}), tmp_path / "run")
    while next(steps).epoch < 1:
        pass
    steps.close()
    (tmp_path / "sets" / "colours").rename(tmp_path / "sets" / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "colours").symlink_to(pictures)
    moved = work({**spec, "root": str(tmp_path / "elsewhere")}, {}, str(tmp_path / "run"))
    (tmp_path / "sets" / "moved").rename(tmp_path / "sets" / "colours")
    _, (whole,) = run(told, tmp_path / "out")
    assert moved["test_accuracy"] == whole["test_accuracy"]
    assert moved["test_reads"] == whole["test_reads"]


def _at(spec, pictures):
    return Recipe(**spec["recipe"]).data.model_copy(update={"path": str(pictures)})
