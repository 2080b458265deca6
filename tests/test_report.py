"""The report: what may be averaged, what the statistics say, and that every page is a pure function of the records."""

import copy
import csv
import io
import itertools
import json
import math
import random
import resource
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from deltavit.bench.record import DONE, NEEDED, write_record
from deltavit.cli.report import report
from deltavit.core.errors import DataError
from deltavit.report import figures, stats
from deltavit.report.render import csv_text, latex, markdown
from deltavit.report.summary import dumps, summary

GROUPS = {"cifar100": "natural", "dtd": "natural", "svhn": "natural", "camelyon": "specialized", "kitti": "structured"}
CLASSES = {"cifar100": 100, "dtd": 47, "svhn": 10, "camelyon": 2, "kitti": 4}
METHODS = {"linear": ("linear", 0), "BitFit": ("bitfit", 20_928), "LoRA r8": ("lora", 73_728)}


def record(method="LoRA r8", set="cifar100", seed=0, test=0.5, **changes):
    """One record as `deltavit bench` writes it, of DeiT-Tiny; `changes` go to dotted keys."""
    name, body = METHODS.get(method, (method, 1000))
    made = {
        "format": 1, "key": f"deit~{set}~{method}~{seed}".replace(" ", "-"), "suite": "mini", "status": "done",
        "attempts": 1, "model": "deit", "method": method, "set": set, "group": GROUPS.get(set), "shots": None,
        "seed": seed, "protocol": "folder",
        "recipe": {
            "model": {"name": "deit_tiny_patch16_224"}, "method": {"name": name}, "data": {"train_on": "train"},
            "train": {"epochs": 10, "lr": 0.01, "seed": seed, "pace": 0.0},
        },
        "chosen": {"train.lr": 0.01},
        "search": {"study": f"{set}~{method}", "trials": 4, "val_accuracy": 0.6, "epochs": 10, "on": set},
        "test_accuracy": test, "val_accuracy": test + 0.01, "class_accuracy": {"a": test, "b": test},
        "test_pictures": 1000, "test_missed": 0, "body": body, "head": 193 * CLASSES.get(set, 5),
        "seconds": 60.0 + seed, "peak_bytes": 300 * 2**20, "device": "cpu", "threads": 1, "precision": "fp32",
        "curve": [[1, 2.0, test - 0.1], [2, 1.0, test + 0.01]],
        "test_reads": [{"step": 250, "steps": 250, "weights": "ab" * 32}], "clean": True, "leaky": None,
        "base": {
            "name": "deit_tiny_patch16_224", "fingerprint": "3f9c2e" * 10, "weights": "deit.safetensors",
            "weights_sha256": "ab12" * 16,
        },
        "preprocessing": {
            "size": 112, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic",
            "resize": "squash", "crop": 1.0,
        },
        "data": {"kind": "folders", "seed": 0, "classes": 3, "test": {"size": 1000, "digest": f"digest of {set}"}},
        "versions": {"deltavit": "0.2.0", "torch": "2.10.0", "timm": "1.0.31", "python": "3.11.9"}, "error": None,
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        at = made
        for part in path:
            at = at[part]
        at[last] = value
    return made


def failed(**changes):
    made = record(**changes)
    first = list(made)[: list(made).index("recipe") + 1]
    error = {"line": "the loss is NaN at step 7", "traceback": "Traceback ..."}
    return {**{k: made[k] for k in first}, "status": "failed", "error": error}


def grid(methods=METHODS, sets=GROUPS, seeds=(0, 1, 2), **changes):
    """Three seeds of every method on every set: more parameters are better, sets and seeds differ."""
    numbers = random.Random(0)
    return [
        record(m, s, seed, round(0.5 + 0.1 * i + 0.02 * j + 0.01 * numbers.random(), 4), **changes)
        for i, m in enumerate(methods) for j, s in enumerate(sets) for seed in seeds
    ]  # fmt: skip


def row(told, method):
    return next(r for r in told["rows"] if r["method"] == method)


# Means


def test_both_means_and_their_spread_are_taken_seed_by_seed():
    records = grid()
    got = row(summary(records), "LoRA r8")
    by = {(r["set"], r["seed"]): r["test_accuracy"] for r in records if r["method"] == "LoRA r8"}
    all_sets = [sum(by[s, seed] for s in GROUPS) / 5 for seed in range(3)]
    groups = [
        (sum(by[s, seed] for s in ("cifar100", "dtd", "svhn")) / 3 + by["camelyon", seed] + by["kitti", seed]) / 3
        for seed in range(3)
    ]
    for mean, each in ((got["mean_sets"], all_sets), (got["mean_groups"], groups)):
        assert mean["mean"] == pytest.approx(sum(each) / 3)
        assert mean["sd"] == pytest.approx(math.sqrt(sum((x - sum(each) / 3) ** 2 for x in each) / 2))
        assert mean["n"] == 3
    assert got["mean_sets"]["mean"] != pytest.approx(got["mean_groups"]["mean"], abs=1e-4)
    scores = got["scores"]["dtd"]
    assert scores["values"] == [by["dtd", seed] for seed in range(3)]
    assert scores["sd"] == pytest.approx(statistics.stdev(scores["values"]))


def test_a_mean_takes_only_the_seeds_that_every_set_has():
    records = [record(set="dtd", seed=s, test=t) for s, t in ((0, 0.5), (1, 0.9))]
    records += [record(set="svhn", seed=s, test=t) for s, t in ((1, 0.7), (2, 0.1))]
    got = row(summary(records), "LoRA r8")
    assert got["mean_sets"] == {"mean": pytest.approx(0.8), "sd": None, "n": 1}
    assert got["scores"]["dtd"]["n"] == 2


def test_a_method_that_lacks_a_set_has_no_mean_no_rank_and_its_cells_are_listed():
    records = [r for r in grid() if (r["method"], r["set"]) != ("BitFit", "kitti")]
    told = summary(records)
    got = row(told, "BitFit")
    assert [got[k] for k in ("mean_sets", "mean_groups", "pe", "rank")] == [None] * 4
    assert told["missing"] == [
        {"model": "deit", "method": "BitFit", "set": "kitti", "shots": None, "seed": s} for s in range(3)
    ]
    line = next(line for line in markdown(told).splitlines() if line.startswith("| BitFit"))
    assert line.split("|")[8].strip() == "-"
    assert "deit, BitFit, kitti, seeds: 0, 1, 2" in markdown(told)


def test_without_groups_there_is_one_mean():
    told = summary(grid(group=None))
    assert row(told, "linear")["mean_groups"] is None
    assert "groups" not in markdown(told).split("\n\n")[1]


def test_each_number_of_shots_has_a_mean_of_its_own():
    records = [
        record(set=s, seed=seed, test=0.3 + shots / 10 + seed / 100, shots=shots, key=f"{s}{shots}{seed}")
        for s in ("dtd", "svhn") for shots in (1, 4) for seed in (0, 1)
    ]  # fmt: skip
    got = row(summary(records), "LoRA r8")
    assert list(got["scores"]) == ["dtd 1-shot", "dtd 4-shot", "svhn 1-shot", "svhn 4-shot"]
    assert got["mean_shots"]["4"]["mean"] == pytest.approx(0.705)
    assert "mean of 4-shot" in markdown(summary(records))


def test_a_difference_is_paired_by_set_and_seed():
    records = [r for r in grid() if (r["method"], r["set"], r["seed"]) != ("LoRA r8", "dtd", 1)]
    told = summary(records, against="BitFit")

    def of(method):
        return {(r["set"], r["seed"]): r["test_accuracy"] for r in records if r["method"] == method}

    for method, seeds in {"linear": (0, 1, 2), "LoRA r8": (0, 2)}.items():  # every set has these seeds of both
        mine, other = of(method), of("BitFit")
        means = [statistics.mean(mine[name, seed] - other[name, seed] for name in GROUPS) for seed in seeds]
        assert row(told, method)["against"] == pytest.approx(
            {"mean": statistics.mean(means), "sd": statistics.stdev(means), "n": len(seeds)}
        )
    assert row(told, "BitFit")["against"] is None
    assert any("Against BitFit: mean difference" in line for line in told["caption"])
    assert "| against BitFit |" in markdown(told)
    assert "| -10." in markdown(told)
    assert "| +" in markdown(told)


def test_there_is_no_difference_where_a_set_is_missing_or_nobody_asked():
    records = [r for r in grid() if (r["method"], r["set"]) != ("linear", "dtd")]
    assert row(summary(records, against="BitFit"), "linear")["against"] is None
    assert {r["against"] for r in summary(records)["rows"]} == {None}
    assert "against" not in markdown(summary(records))


def test_a_method_that_has_no_run_is_nothing_to_compare_with():
    with pytest.raises(DataError, match="no method named 'BitFt'; did you mean 'BitFit'"):
        summary(grid(), against="BitFt")


def test_heads_and_costs_are_the_mean_the_median_and_the_peak():
    got = row(summary(grid()), "LoRA r8")
    assert got["body"] == 73_728
    assert got["head"] == round(193 * sum(CLASSES.values()) / 5)
    assert (got["seconds"], got["peak_bytes"]) == (61.0, 300 * 2**20)


# What may stand in one table


def test_the_order_of_the_records_does_not_matter_and_they_are_not_changed():
    records = [*grid(), failed(method="BitFit", seed=7), record(seed=8, clean=False)]
    before, shuffled = copy.deepcopy(records), records[::-1]
    random.Random(1).shuffle(shuffled)
    assert dumps(summary(records)) == dumps(summary(shuffled))
    assert records == before


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"base__fingerprint": "a1b207" * 10}, "the checkpoint's fingerprint"),
        ({"preprocessing__mean": [0.5] * 3, "preprocessing__std": [0.5] * 3}, "the pixel normalisation"),
        ({"preprocessing__size": 224}, "the picture size"),
        ({"preprocessing__resize": "crop"}, "the resize"),
        ({"protocol": "vtab-1k"}, "the protocol"),
        ({"recipe__train__epochs": 100}, "the number of epochs"),
        ({"recipe__data__train_on": "train+val"}, "what is trained on"),
        ({"data__test__digest": "other pictures"}, "the digest of the test split"),
    ],
)
def test_records_that_no_mean_may_join_are_refused_with_both_named(changes, what):
    one, other = record(seed=0), copy.deepcopy(record(seed=1))
    with pytest.raises(DataError, match=what) as refused:
        summary([one, record(seed=1, **changes)])
    assert one["key"] in str(refused.value)
    assert other["key"] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_models_may_differ_in_checkpoint_and_normalisation():
    half = {"preprocessing__mean": [0.5] * 3, "preprocessing__std": [0.5] * 3}
    told = summary([record(), record(key="clip~0", model="clip", base__fingerprint="cc" * 30, **half)])
    assert told["models"] == ["clip", "deit"]
    assert any("clip" in line and "normalisation 0.5 " in line for line in told["caption"])
    assert any("deit" in line and "normalisation ImageNet " in line for line in told["caption"])


def test_two_records_of_one_cell_are_refused():
    with pytest.raises(DataError, match="move the one that is out of date"):
        summary([record(), record(key="deit~again")])


def test_what_read_the_test_split_early_or_has_another_format_enters_no_table():
    early = record(seed=1, test=0.99, clean=False, test_reads=[{"step": 3, "steps": 250, "weights": "00"}])
    strange = {"format": 2, "key": "from-the-future"}
    told = summary([record(), early, strange])
    assert row(told, "LoRA r8")["scores"]["cifar100"]["values"] == [0.5]
    assert [r["key"] for r in told["runs"]] == [record()["key"]]
    assert {e["key"]: e["why"] for e in told["excluded"]} == {
        early["key"]: "its test split was read at step 3 of 250, before training ended",
        "from-the-future": "format 2, this deltavit reads 1",
    }
    assert "from-the-future" in markdown(told)


def test_a_failed_cell_is_listed_with_its_line_and_is_not_missing():
    told = summary([*grid(seeds=(0,)), failed(method="BitFit", set="dtd", seed=1)])
    assert told["failed"] == [{"key": "deit~dtd~BitFit~1", "line": "the loss is NaN at step 7"}]
    assert ("BitFit", "dtd") not in {(m["method"], m["set"]) for m in told["missing"]}
    assert "the loss is NaN at step 7" in markdown(told)


def test_nothing_finished_is_a_page_too():
    told = summary([failed()])
    for text in (markdown(told), latex(told), csv_text(told)):
        assert text.endswith("\n")
    assert "No finished run" in markdown(told)
    assert list(figures.pictures(told)) == []


def test_the_caption_tells_checkpoint_normalisation_size_epochs_precision_seeds_search_devices_and_versions():
    text = " ".join(summary(grid())["caption"])
    for told in (
        "deit_tiny_patch16_224", "deit.safetensors", "SHA-256 ab12ab12ab12", "fingerprint 3f9c2e3f9c2e", "112 px",
        "ImageNet (mean 0.485/0.456/0.406", "squash, bicubic", "Protocol folder", "trained on train", "Epochs: 10",
        "Precision: fp32", "Seeds: 0, 1, 2", "train.lr by val accuracy on the same data set", "Devices: cpu",
        "torch 2.10.0", "exp(-log10(parameters / 1e8 + 1))", "Holm",
    ):  # fmt: skip
        assert told in text, told


# Statistics


def brute_force(differences):
    """The p value by hand: every sign pattern, in exact fractions of the smallest step."""
    whole = [round(d * 1000) for d in differences]
    sums = [abs(sum(s * d for s, d in zip(signs, whole, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(whole))]  # fmt: skip
    return sum(s >= abs(sum(whole)) for s in sums) / len(sums)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_sign_flip_test_is_the_share_of_all_patterns(n):
    numbers = random.Random(n)
    for _ in range(5):
        differences = [numbers.randint(-30, 50) / 1000 for _ in range(n)]
        assert stats.sign_flip(differences) == pytest.approx(brute_force(differences))


def test_the_sign_flip_test_knows_its_limits():
    assert stats.sign_flip([0.0] * 8) == 1
    assert stats.sign_flip([0.1] * 8) == pytest.approx(2 / 2**8)
    assert stats.sign_flip([0.1] * 40) == pytest.approx(1 / 10_001)  # drawn: never 0
    assert stats.sign_flip([]) == 1


def test_drawn_signs_come_close_to_all_signs_and_are_the_same_each_time(monkeypatch):
    numbers = random.Random(3)
    differences = [numbers.gauss(0.3, 1) for _ in range(14)]
    exact = stats.sign_flip(differences)
    monkeypatch.setattr(stats, "EXACT", 0)
    drawn = stats.sign_flip(differences)
    assert drawn == stats.sign_flip(differences)
    assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / stats.DRAWS)


def test_the_test_holds_its_level_where_nothing_differs():
    numbers = np.random.default_rng(0)
    p = [stats.sign_flip(numbers.normal(size=8)) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.08


def test_it_agrees_with_wilcoxon_where_all_differences_are_their_ranks():
    scipy = pytest.importorskip("scipy.stats")
    differences = [1.0, -2.0, 3.0, 4.0, 5.0, -6.0, 7.0, 8.0]
    assert stats.sign_flip(differences) == pytest.approx(scipy.wilcoxon(differences, method="exact").pvalue)


def test_equal_scores_share_the_mean_of_their_ranks():
    scipy = pytest.importorskip("scipy.stats")
    assert stats.ranks([0.9, 0.5, 0.9, 0.1]) == [1.5, 3.0, 1.5, 4.0]
    scores = [round(random.Random(i).random(), 1) for i in range(20)]
    assert stats.ranks(scores) == list(scipy.rankdata([-s for s in scores]))


def test_holm_is_the_step_down_of_its_paper():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_a_bar_never_covers_two_methods_that_are_told_apart():
    p = {a: dict.fromkeys("abcd", 1.0) for a in "abcd"}
    for a, b in (("a", "c"), ("a", "d")):
        p[a][b] = p[b][a] = 0.01
    assert stats.stretches("abcd", p) == [["a", "b"], ["b", "c", "d"]]
    p["b"]["c"] = p["c"]["b"] = 0.01
    assert stats.stretches("abcd", p) == [["a", "b"], ["c", "d"]]
    p["b"]["d"] = p["d"]["b"] = 0.5
    assert stats.stretches("ab", {"a": {"b": 0.01}, "b": {"a": 0.01}}) == []


def test_from_six_sets_on_each_set_counts_once():
    sets = [f"set{i}" for i in range(7)]
    told = summary(grid(sets=sets))
    assert (told["ranks"]["deit"]["n"], told["ranks"]["deit"]["blocks"]) == (7, "data sets")
    ranks = told["ranks"]["deit"]
    assert ranks["order"] == ["LoRA r8", "BitFit", "linear"]
    assert ranks["p"]["LoRA r8"]["linear"] == pytest.approx(3 * 2 / 2**7)  # every set agrees, three comparisons
    assert ranks["same"] == []
    assert row(told, "linear")["rank"] == 3


def test_below_six_sets_pairs_of_set_and_seed_are_taken_and_the_caption_says_so():
    told = summary(grid())
    assert (told["ranks"]["deit"]["n"], told["ranks"]["deit"]["blocks"]) == (15, "data sets and seeds")
    assert any("these p values are optimistic" in line for line in told["caption"])
    few = summary(grid(seeds=(0,)))
    assert few["ranks"]["deit"]["test"] == "rank range"  # three comparisons of five blocks: at least 3 * 2 / 2**5
    assert any("range of mean ranks" in line for line in few["caption"])
    assert few["ranks"]["deit"]["same"] == [["LoRA r8", "BitFit"], ["BitFit", "linear"]]


def test_the_rank_range_test_is_the_share_of_all_orders():
    blocks = [[1, 2, 3], [1, 3, 2], [1, 2, 3], [2, 1, 3]]
    orders = list(itertools.permutations((1, 2, 3)))
    sums = [[sum(c) for c in zip(*chosen, strict=True)] for chosen in itertools.product(orders, repeat=len(blocks))]
    totals = [sum(c) for c in zip(*blocks, strict=True)]
    got = stats.rank_range(blocks)
    for i, j in itertools.combinations(range(3), 2):
        exact = sum(max(s) - min(s) >= abs(totals[i] - totals[j]) for s in sums) / len(sums)
        assert got[i, j] == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / stats.DRAWS) + 2e-4)


def test_the_rank_range_test_holds_its_level_over_all_pairs_where_nothing_differs(monkeypatch):
    monkeypatch.setattr(stats, "DRAWS", 500)
    numbers = np.random.default_rng(0)
    tables = ([stats.ranks(list(block)) for block in numbers.normal(size=(4, 6))] for _ in range(300))
    alarms = [np.min(stats.rank_range(table)) <= 0.05 for table in tables]
    assert 0.01 < np.mean(alarms) < 0.09


def test_counts_alone_choose_the_test():
    """26 methods on 12 blocks: sign flips could not go below 325 * 2 / 2**12 = 0.16."""
    numbers = random.Random(0)
    many = {f"m{i}": [i / 10 + numbers.random() / 100 for _ in range(12)] for i in range(26)}
    assert stats.compare(many)["test"] == "rank range"
    assert stats.compare(many)["p"]["m0"]["m25"] < 0.001
    assert stats.compare({k: v + v for k, v in many.items()})["test"] == "sign flips"


def test_the_pe_score_of_the_published_counts():
    """Accuracy and trained parameters of PEViT's README, on 20 data sets; exp(-log10 x) is x to the -1 / ln 10."""
    for parameters in (29_523, 79_699, 1_237_587, 87_878_739):
        assert stats.pe(1.0, parameters) == pytest.approx((1 + parameters / 1e8) ** (-1 / math.log(10)))
    assert round(stats.pe(0.6549, 87_878_739), 3) == 0.498
    assert round(stats.pe(0.6892, 79_699), 3) == 0.689
    assert stats.pe(0.7, 0) == 0.7
    assert stats.pe(1.0, 1e8) == pytest.approx(math.exp(-math.log10(2)))


def test_the_pe_of_a_row_counts_its_head():
    got = row(summary(grid()), "LoRA r8")
    assert got["pe"] == pytest.approx(stats.pe(got["mean_sets"]["mean"], got["body"] + got["head"]))


# Renderers


def test_the_markdown_table_has_body_and_head_apart_and_spread():
    lines = markdown(summary(grid())).splitlines()
    heads = next(line for line in lines if line.startswith("| method"))
    assert heads.strip("| ").split(" | ") == [
        "method", "body", "head", "cifar100", "dtd", "svhn", "camelyon", "kitti", "mean of 5 sets", "mean of 3 groups",
        "PE", "rank", "seconds", "peak MiB",
    ]  # fmt: skip
    cells = next(line for line in lines if line.startswith("| LoRA")).strip("| ").split(" | ")
    values = [r["test_accuracy"] for r in grid() if (r["method"], r["set"]) == ("LoRA r8", "cifar100")]
    assert cells[1] == "73,728"
    assert cells[3] == f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    rows = [line for line in lines if line.startswith(("| linear | 0", "| LoRA r8 | 7", "| BitFit | 20"))]
    assert [line.count("|") for line in rows] == [heads.count("|")] * 3


def test_the_leaky_column_is_there_only_where_a_record_has_one_and_says_what_it_is():
    assert "leaky" not in markdown(summary(grid())) + csv_text(summary(grid()))
    told = summary(grid(leaky={"accuracy": 0.9, "epoch": 4}))
    heads = next(line for line in markdown(told).splitlines() if line.startswith("| method"))
    assert heads.endswith("| best epoch on test (leaky) |")
    assert "best epoch on test (leaky)" in latex(told)
    assert row(told, "linear")["leaky"] == dict.fromkeys(GROUPS, pytest.approx(0.9))
    assert row(told, "linear")["scores"]["dtd"]["mean"] < 0.9
    part = summary([record(leaky={"accuracy": 0.9, "epoch": 4}), record(seed=1)])
    assert row(part, "LoRA r8")["leaky"] is None


def test_labels_stay_labels_in_every_renderer():
    name = r"a|b_100% \#{$x$} <i> & ~^"
    told = summary([record(method=name, key="k", recipe__method__name="lora")])
    line = next(line for line in markdown(told).splitlines() if line.startswith("| a"))
    heads = next(line for line in markdown(told).splitlines() if line.startswith("| method"))
    assert line.replace("\\|", "").count("|") == heads.count("|")
    assert "<i>" not in line.replace("\\<", "")
    tex = latex(told)
    assert r"a\textbar{}b\_100\% \textbackslash{}\#\{\$x\$\} \textless{}i\textgreater{} \& \textasciitilde{}" in tex
    assert next(csv.DictReader(io.StringIO(csv_text(told))))["method"] == name


def test_the_latex_table_is_balanced_and_names_its_groups():
    tex = latex(summary(grid()))
    for word in ("table*", "tabular"):
        assert tex.count(rf"\begin{{{word}}}") == tex.count(rf"\end{{{word}}}") == 1
    assert tex.count("{") == tex.count("}")
    columns = tex.split(r"\begin{tabular}{")[1].split("}")[0]
    for line in tex.splitlines():
        if line.startswith(("method", "linear", "LoRA")):
            assert line.count("&") == len(columns) - 1
    assert r"\multicolumn{3}{c}{natural}" in tex
    assert r"\cmidrule(lr){4-6}" in tex


def test_the_csv_has_a_line_a_run_with_all_digits():
    records = grid()
    lines = list(csv.DictReader(io.StringIO(csv_text(summary(records)))))
    assert len(lines) == len(records)
    assert {(x["key"], float(x["test"])) for x in lines} == {(r["key"], r["test_accuracy"]) for r in records}


def test_a_label_is_no_formula_for_a_spreadsheet():
    told = summary([record(method="=1+1", key="k", recipe__method__name="lora")])
    assert next(csv.DictReader(io.StringIO(csv_text(told))))["method"] == "'=1+1"


# Ours next to the published numbers


def vtab(**changes):
    settings = {
        "protocol": "vtab-1k", "recipe__train__epochs": 100, "recipe__data__train_on": "train+val",
        "base__name": "vit_base_patch16_224.orig_in21k", "preprocessing__size": 224,
        "preprocessing__mean": [0.0] * 3, "preprocessing__std": [1.0] * 3,
    }  # fmt: skip
    return record(test=0.71, **{**settings, **changes})


def test_a_difference_is_given_only_where_all_settings_agree():
    told = summary([vtab()])["published"]
    by_source = {p["table"] + "|" + p["source"]: p for p in told}
    same = by_source["VTAB-1k, one recipe for all|Mai et al. 2024, arXiv:2409.16434, its logs"]
    assert same["accuracy"] == pytest.approx(0.702)
    assert (same["differs"], same["difference"]) == ([], pytest.approx(0.008))
    noah = next(p for p in told if p["label"] == "LoRA r=8 (NOAH run)")
    assert noah["difference"] is None
    assert noah["differs"] == ["ImageNet pixels, ours none", "best epoch on test"]
    assert all((p["difference"] is None) == bool(p["differs"]) for p in told)
    assert "| +0.8 |" in markdown(summary([vtab()]))


def test_what_differs_is_named():
    told = summary([record()])["published"]
    why = next(p for p in told if p["table"] == "VTAB-1k, one recipe for all")["differs"]
    assert why == [
        "protocol vtab-1k, ours folder", "ViT-B/16 vit_base_patch16_224.orig_in21k, ours deit_tiny_patch16_224",
        "224 px, ours 112", "100 epochs, ours 10", "none pixels, ours ImageNet",
    ]  # fmt: skip
    assert all(p["difference"] is None for p in told)


def test_a_published_mean_stands_only_beside_the_mean_of_the_same_sets():
    from deltavit.report.published import contents

    assert not any(p["set"].startswith("mean") for p in summary(grid())["published"])
    sets = next(t["sets"] for t in contents()["tables"] if t["name"] == "VTAB-1k")
    whole = summary([vtab(set=s, key=s, group="abc"[i % 3]) for i, s in enumerate(sets)])["published"]
    means = {p["set"]: p for p in whole if p["set"].startswith("mean") and not p["differs"]}
    assert means["mean_sets"]["accuracy"] == pytest.approx(0.729)
    assert means["mean_groups"]["accuracy"] == pytest.approx(0.752)


# Pictures


def test_pictures_have_the_same_bytes_each_time_and_no_date():
    told = summary(grid(sets=["dtd", "svhn"], seeds=(0, 1)))
    first = {name: content for _, name, content in figures.pictures(told)}
    assert {"accuracy-body.png", "accuracy-seconds.png", "accuracy-peak-bytes.png", "ranks.png", "curves.png"} == set(
        first
    )
    assert first == {name: content for _, name, content in figures.pictures(told)}
    drawn = [figures.save(figures.rank_diagram(told["ranks"]["deit"]), "svg") for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert b"<dc:date>" not in drawn[0]


def test_a_picture_of_cost_shows_every_method_that_has_a_mean():
    told = summary([r for r in grid() if (r["method"], r["set"]) != ("BitFit", "kitti")])
    made = figures.accuracy_against(told["rows"], "seconds")
    assert sorted(t.get_text() for t in made.legends[0].get_texts()) == ["LoRA r8", "linear"]
    one = figures.accuracy_against(told["rows"], "body", score="dtd")
    assert len(one.legends[0].get_texts()) == 3


def test_learning_curves_show_the_loss_where_no_val_was_kept():
    told = summary(grid(curve=[[1, 2.0, None], [2, 1.0, None]]))
    made = figures.learning_curves(told["runs"])
    assert {axes.get_ylabel() for axes in made.axes if axes.axison} == {"training loss"}


# The command

app = typer.Typer()
app.command()(report)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def out(tmp_path):
    for each in [*grid(seeds=(0, 1)), failed(method="BitFit", seed=5)]:
        write_record(tmp_path / "records", each)
    return tmp_path


def test_delete_and_rebuild_gives_the_same_bytes(out):
    formats = ("--format", "md,latex,csv,png")
    assert run(out, *formats).exit_code == 0
    first = {p.name: p.read_bytes() for p in (out / "report").iterdir()}
    assert {"index.md", "table.tex", "runs.csv", "accuracy-body.png"} <= set(first)
    assert all(f"]({name})" in first["index.md"].decode() for name in first if name.endswith(".png"))
    for path in (out / "report").iterdir():
        path.unlink()
    assert run(out, *formats).exit_code == 0
    assert {p.name: p.read_bytes() for p in (out / "report").iterdir()} == first


def test_the_html_page_is_one_of_the_formats(out):
    assert run(out, "--format", "html", "--to", out / "page").exit_code == 0
    assert [p.name for p in (out / "page").iterdir()] == ["index.html"]


def test_json_is_the_summary_as_the_last_line(out):
    done = run(out, "--format", "csv", "--json")
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["files"] == ["runs.csv"]
    assert (values["runs"], values["failed"]) == (30, 1)
    assert len(values["summary"]["rows"]) == 3


def test_an_unreadable_record_costs_only_itself(out):
    (out / "records" / "torn.json").write_text('{"format": 1, "key": "to')
    done = run(out, "--format", "csv")
    assert done.exit_code == 1
    assert "torn.json" in done.stderr
    assert len((out / "report" / "runs.csv").read_text().splitlines()) == 31


@pytest.mark.parametrize(("folder", "line"), [("records", "no record"), ("nowhere", "not a folder")])
def test_an_empty_folder_is_one_line(tmp_path, folder, line):
    (tmp_path / "records").mkdir()
    done = run(tmp_path if folder == "records" else tmp_path / folder)
    assert isinstance(done.exception, DataError)
    assert line in str(done.exception)
    assert "\n" not in str(done.exception)


def test_an_unknown_format_is_refused_before_anything_is_written(out):
    done = run(out, "--format", "md,pdf")
    assert "'pdf'" in str(done.exception)
    assert not (out / "report").exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_page_whole(out):
    assert run(out, "--format", "md").exit_code == 0
    before = (out / "report" / "index.md").read_bytes()
    for each in grid(seeds=(2,)):
        write_record(out / "records", each)

    def limited():  # the kernel refuses every file above 100 bytes, as a full disk would
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    code = (
        "import sys, pathlib; from deltavit.cli.report import report; from deltavit.core.errors import FileError\n"
        "try: report(pathlib.Path(sys.argv[1]), None, 'md', '', False)\n"
        "except FileError as why: sys.exit(f'one line: {why}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], preexec_fn=limited, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("one line: cannot write")
    assert done.stderr.count("\n") == 1
    assert (out / "report" / "index.md").read_bytes() == before
    assert len(list((out / "report").iterdir())) == 1


def test_the_records_of_these_tests_are_whole():
    assert {*NEEDED, *DONE} <= set(record())
    assert set(NEEDED) <= set(failed())
