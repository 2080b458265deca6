"""What a benchmark adds to a run: few shots, a last training on train and val, and a test split under lock."""

import json
import os

import pytest

from deltavit.core.errors import DataError, FileError
from deltavit.data import open_data
from deltavit.data.splits import few
from deltavit.train.recipe import read_recipe
from deltavit.train.run import run
from deltavit.train.testsplit import FILE, TestSplit, clean, readings


def result(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def recipe(pictures, **data):
    return read_recipe(data={"path": str(pictures), **data}, train={"epochs": 1, "batch_size": 8})


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_shots_are_the_same_number_of_every_class_and_follow_the_seed(pictures, shots):
    data = open_data(pictures, shots=shots, shots_seed=3)
    assert sorted(data.train.labels) == sorted([*range(3)] * shots)
    assert all(data.val.labels.count(c) <= min(shots, 4) for c in range(3))
    assert open_data(pictures, shots=shots, shots_seed=3).train == data.train
    seeds = {open_data(pictures, shots=shots, shots_seed=s).train.names for s in range(8)}
    assert len(seeds) > 1
    assert data.test == open_data(pictures).test


def test_more_shots_keep_the_pictures_of_fewer(pictures):
    names = [set(open_data(pictures, shots=k).train.names) for k in (1, 2, 4)]
    assert names[0] < names[1] < names[2]


def test_a_class_with_too_few_pictures_is_refused(pictures):
    with pytest.raises(DataError, match="has 6 pictures in train, fewer than shots=7"):
        open_data(pictures, shots=7)
    with pytest.raises(DataError, match="at least one"):
        open_data(pictures, shots=0)
    assert len(few(open_data(pictures).train, 100, 0, exactly=False)) == 22


def test_the_last_training_takes_train_and_val_and_has_no_val_accuracy(pictures, tmp_path):
    told = result(run(recipe(pictures, train_on="train+val"), tmp_path / "run"))
    assert told["val_accuracy"] is None
    assert told["test_accuracy"] is not None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == -(-(22 + 7) // 8)
    assert not any("accuracy" in row for row in rows)


def test_lists_that_hold_val_twice_are_joined_once(pictures, tmp_path):
    data = open_data(pictures)
    for name, parts in {"train800": [data.train], "val200": [data.val], "test": [data.test],
                        "train800val200": [data.train, data.val]}.items():  # fmt: skip
        lines = [f"{n} {c}" for part in parts for n, c in zip(part.names, part.labels, strict=True)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    for split in ("train", "val", "test"):
        (tmp_path / split).symlink_to(pictures / split)
    joined = open_data(tmp_path, train_list="train800val200.txt")
    assert joined.whole.names == joined.train.names
    assert open_data(tmp_path, train_list="train800.txt").whole.names == joined.train.names


def test_a_run_reads_test_once_after_its_last_step(pictures, tmp_path):
    told = result(run(recipe(pictures), tmp_path / "run"))
    assert [(r["step"], r["steps"], r["for"]) for r in told["test_reads"]] == [(3, 3, "result")]
    assert told["clean"]
    assert result(run(recipe(pictures), tmp_path / "no", test=False))["test_reads"] == []


def test_a_run_whose_test_split_was_read_before_its_end_is_marked(pictures, tmp_path):
    steps = run(recipe(pictures), tmp_path / "run")
    next(steps)
    split = TestSplit(open_data(pictures).test, tmp_path / "run")
    assert len(split.open(step=1, steps=3, weights="of step 1", purpose="a look")) == 7
    told = result(steps)
    assert [r["step"] for r in told["test_reads"]] == [1, 3]
    assert not told["clean"]


def test_reading_again_with_the_same_weights_is_clean_and_with_others_is_not():
    end = {"step": 3, "steps": 3, "for": "result"}
    assert clean([])
    assert clean([{**end, "weights": "a"}, {**end, "weights": "a"}])
    assert not clean([{**end, "weights": "a"}, {**end, "weights": "b"}])
    assert clean([{**end, "weights": "a"}, {**end, "weights": "b", "for": "leaky"}])
    assert not clean([{**end, "weights": "a"}, {**end, "weights": "b", "for": "leaky", "step": 2}])


def test_a_kill_in_the_final_evaluation_leaves_one_reading(pictures, tmp_path, monkeypatch):
    def killed(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("deltavit.train.run.evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            result(run(recipe(pictures, train_on="train+val"), tmp_path / "run"))
    assert len(readings(tmp_path / "run")) == 1
    told = result(run(recipe(pictures, train_on="train+val"), tmp_path / "run", resume=True))
    assert told["clean"]
    assert len(told["test_reads"]) == 1


@pytest.mark.skipif(os.name == "nt", reason="symbolic links to devices")
def test_a_reading_that_cannot_be_written_down_does_not_take_place(pictures, tmp_path):
    (tmp_path / FILE).symlink_to("/dev/full")
    with pytest.raises(FileError, match="the test split stays shut"):
        TestSplit(open_data(pictures).test, tmp_path).open(step=3, steps=3, weights="w")


def test_the_accuracy_of_each_class_adds_up(pictures, tmp_path):
    told = result(run(recipe(pictures), tmp_path / "run"))
    counts = {"blue": 3, "green": 2, "red": 2}
    right = sum(told["by_class"][name] * n for name, n in counts.items())
    assert right / 7 == pytest.approx(told["test_accuracy"])
    assert sum(told["by_class"].values()) / 3 == pytest.approx(told["test_class_accuracy"])
