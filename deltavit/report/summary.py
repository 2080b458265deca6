"""From records to what every page shows."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..bench.record import FORMAT
from ..core.errors import DataError, unknown
from ..models.load import PIXELS
from .published import MEANS, contents, find, known_as
from .stats import TASKS, compare, pe, spread

HABITS = {"imagenet": "ImageNet", "clip": "CLIP", "half": "0.5", "none": "none"}
"""What the usual normalisations of pixels are called in a caption."""
GROUPS = ("natural", "specialized", "structured")

Record = dict[str, Any]


def summary(
    records: Sequence[Record], *, title: str = "", planned: Sequence[Record] = (), against: str = ""
) -> dict[str, Any]:
    """What all renderers show, from the records of runs in any order; plain values that JSON can hold.

    A record whose test split was read before training ended, or of another format, is in no table: it is listed with
    the reason.  Means over data sets are taken seed by seed, over the seeds that all data sets have, and their spread
    is over seeds; a method that lacks a data set has none.

    Args:
        planned: {"model", "method", "set", "shots", "seed"} of each cell that there shall be; those without a record
            are missing, as are those that a full grid of what is there would have.
        against: a method; every other row of its model gets the difference to it, paired by data set and seed.

    Returns:
        {"title", "caption": [line, ..], "against", "models": [..], "methods": [..],
             "sets": [{"key", "name", "group", "shots"}, ..],
             "rows": [{"model", "method", "body", "head", "scores": {set key: {"mean", "sd", "n", "values"}},
                       "mean_sets": {"mean", "sd", "n"} | None, "mean_groups": the same | None,
                       "mean_shots": {shots: the same} | None, "against": the same | None, "pe", "rank",
                       "seconds", "peak_bytes", "leaky": {set key: mean} | None}, ..],
             "ranks": {model: what `stats.compare` returns and "blocks": "data sets" | "data sets and seeds"},
             "runs": [{"key", "model", "method", "set", "shots", "seed", "test", "val", "body", "head", "seconds",
                       "peak_bytes", "leaky", "curve", "classes"}, ..],
             "failed": [{"key", "line"}, ..], "excluded": [{"key", "why"}, ..],
             "missing": [{"model", "method", "set", "shots", "seed"}, ..],
             "published": [{"model", "method", "set", "ours", "sd", "accuracy", "difference", "differs": [why, ..],
                            "label", "table", "source", "protocol", "leak": bool | None, "unverified"}, ..]}
            Accuracies are fractions.  `difference` is None wherever `differs` says why the two cannot be compared.

    Raises:
        DataError: two records that belong in no table together (another checkpoint, normalisation, protocol, ..), or
            two of one cell; nothing finished of the method to compare against.
    """
    known = [r for r in records if r.get("format") == FORMAT]
    excluded = [
        {"key": str(r.get("key")), "why": f"format {r.get('format')!r}, this deltavit reads {FORMAT}"}
        for r in records if r.get("format") != FORMAT
    ]  # fmt: skip
    excluded += [
        {"key": r["key"], "why": _unclean(r)} for r in known if r["status"] == "done" and r.get("clean") is not True
    ]
    done = sorted((r for r in known if r["status"] == "done" and r.get("clean") is True), key=_order)
    failed = [r for r in known if r["status"] != "done"]
    _together(done)
    sets = _sets(known)
    methods = _methods(known, done)
    models = sorted({r["model"] for r in known})
    ranks = {model: told for model in models if (told := _ranks(done, model, sets))}
    if against and not any(r["method"] == against for r in done):
        raise DataError(unknown("method", against, sorted({r["method"] for r in done})))
    rows = []
    for model in models:
        own = {m: found for m in methods if (found := [r for r in done if (r["model"], r["method"]) == (model, m)])}
        rows += [
            {**_row(found, sets, ranks.get(model, {})), "against": _apart(found, own.get(against), sets)}
            for found in own.values()
        ]
    return {
        "title": title or " and ".join(sorted({str(r["suite"]) for r in known if r.get("suite")})),
        "caption": _caption(done, models, rows, ranks, against),
        "against": against,
        "models": models,
        "methods": methods,
        "sets": sets,
        "rows": rows,
        "ranks": ranks,
        "runs": [_run(r) for r in sorted(done, key=lambda r: (r["model"], methods.index(r["method"]), *_order(r)))],
        "failed": sorted(({"key": r["key"], "line": _line(r)} for r in failed), key=lambda f: f["key"]),
        "excluded": sorted(excluded, key=lambda e: (e["key"], e["why"])),
        "missing": _missing(known, models, methods, sets, planned),
        "published": [entry for row in rows for entry in _published(row, done, sets)],
    }


def set_key(name: str, shots: int | None) -> str:
    return name if shots is None else f"{name} {shots}-shot"


def pixels(mean: Sequence[float], std: Sequence[float]) -> str:
    """The name of a normalisation, or its numbers."""
    for name, shown in HABITS.items():
        usual = (*PIXELS[name]["mean"], *PIXELS[name]["std"])
        if all(abs(a - b) < 1e-4 for a, b in zip((*mean, *std), usual, strict=True)):
            return shown
    return f"mean {_numbers(mean)}, std {_numbers(std)}"


def _numbers(values: Iterable[float]) -> str:
    return "/".join(f"{v:g}" for v in values)


def _key(record: Record) -> str:
    return set_key(record["set"], record.get("shots"))


def _order(record: Record) -> tuple[Any, ...]:
    shots = record.get("shots")
    return record["set"], -1 if shots is None else shots, record["seed"], record["key"]


def _line(record: Record) -> str:
    error = record.get("error") or {}
    return str(error.get("line") or f"status {record['status']!r}")


def _unclean(record: Record) -> str:
    for read in record.get("test_reads") or ():
        if read.get("step") != read.get("steps"):
            return f"its test split was read at step {read.get('step')} of {read.get('steps')}, before training ended"
    return "its test split was read before training ended"


# What may stand in one table


def _together(done: Sequence[Record]) -> None:
    """Refuse records that no mean and no table may join."""
    cells: dict[tuple[Any, ...], Record] = {}
    first: dict[tuple[Any, ...], tuple[str, Any, str]] = {}
    for record in sorted(done, key=lambda r: r["key"]):
        model, method, name, seed = (record[k] for k in ("model", "method", "set", "seed"))
        cell = (model, method, name, record.get("shots"), seed)
        if cell in cells:
            raise DataError(
                f"{cells[cell]['key']} and {record['key']} are both {model}, {method}, {_key(record)}, seed {seed}: "
                "move the one that is out of date elsewhere"
            )
        cells[cell] = record
        for where, what, value in _settings(record):
            before, other, key = first.setdefault((where, what), (what, value, record["key"]))
            if other != value:
                raise DataError(
                    f"{key} and {record['key']} cannot stand in one table: {before} is {_shown(other)} in the first "
                    f"and {_shown(value)} in the second; report them from two folders"
                )


def _settings(record: Record) -> Iterable[tuple[Any, str, Any]]:
    """What must agree: (among which records, what, its value here)."""
    model, recipe = record["model"], record["recipe"]
    base, seen = record["base"], record["preprocessing"]
    yield "all", "the protocol", record.get("protocol")
    yield "all", "what is trained on", recipe.get("data", {}).get("train_on", "train")
    yield model, "the model", base.get("name")
    yield model, "the checkpoint's fingerprint", base.get("fingerprint")
    yield model, "the picture size", seen["size"]
    yield model, "the pixel normalisation", pixels(seen["mean"], seen["std"])
    yield model, "the resize", _resize(seen)
    yield (model, record["method"]), "the number of epochs", recipe.get("train", {}).get("epochs")
    yield (model, record["method"]), "the method", recipe.get("method", {}).get("name")
    test = record["data"].get("test") if isinstance(record["data"].get("test"), dict) else {}
    yield (record["set"],), "the digest of the test split", test.get("digest")


def _shown(value: Any) -> str:
    return value[:24] + ".." if isinstance(value, str) and len(value) > 48 else repr(value)


def _resize(seen: Mapping[str, Any]) -> str:
    how = seen.get("resize", "squash")
    crop = "" if how == "squash" else f", crop {seen.get('crop', 1.0):g}"
    return f"{how}{crop}, {seen.get('interpolation', 'bicubic')}"


# Axes


def _sets(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Columns: groups in VTAB's order, and data sets within one as in the published tables, then by name."""
    published = next(t["sets"] for t in contents()["tables"] if t["name"] == "VTAB-1k")
    groups = {r["set"]: r.get("group") for r in sorted(records, key=lambda r: r["key"]) if r.get("group")}

    def place(one: dict[str, Any]) -> tuple[Any, ...]:
        group, name = one["group"], known_as(one["name"])
        return (
            GROUPS.index(group) if group in GROUPS else len(GROUPS), group or "",
            published.index(name) if name in published else len(published), one["name"], one["shots"] or 0,
        )  # fmt: skip

    found = {(r["set"], r.get("shots")) for r in records}
    return sorted(
        ({"key": set_key(n, s), "name": n, "group": groups.get(n), "shots": s} for n, s in found), key=place
    )  # fmt: skip


def _methods(known: Sequence[Record], done: Sequence[Record]) -> list[str]:
    """From the fewest trained parameters of the backbone to the most; those that never ran last."""
    body: dict[str, list[int]] = defaultdict(list)
    for record in done:
        body[record["method"]].append(record["body"])
    return sorted({r["method"] for r in known}, key=lambda m: (max(body[m]) if m in body else float("inf"), m))


def _missing(
    known: Sequence[Record],
    models: Sequence[str],
    methods: Sequence[str],
    sets: Sequence[Mapping[str, Any]],
    planned: Sequence[Record],
) -> list[dict[str, Any]]:
    """Cells of the plan and of the grid that no record answers, not even a failed one."""
    have = {(r["model"], r["method"], _key(r), r["seed"]) for r in known}
    seeds = {s["key"]: sorted({r["seed"] for r in known if _key(r) == s["key"]}) for s in sets}
    grid = [
        {"model": model, "method": method, "set": s["name"], "shots": s["shots"], "seed": seed}
        for model in models for method in methods for s in sets for seed in seeds[s["key"]]
    ]  # fmt: skip
    cells = [*planned, *(cell for cell in grid if cell not in planned)]
    return [dict(c) for c in cells if (c["model"], c["method"], set_key(c["set"], c["shots"]), c["seed"]) not in have]


# One row


def _by_seed(own: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Set key -> seed -> test accuracy."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for record in own:
        found[_key(record)][record["seed"]] = record["test_accuracy"]
    return found


def _row(own: Sequence[Record], sets: Sequence[Mapping[str, Any]], ranked: Mapping[str, Any]) -> dict[str, Any]:
    by_seed = _by_seed(own)
    scores = {}
    for s in sets:
        if values := [by_seed[s["key"]][seed] for seed in sorted(by_seed.get(s["key"], {}))]:
            scores[s["key"]] = {**spread(values), "values": values}
    mean = _mean(by_seed, [[s["key"]] for s in sets])
    groups = list(dict.fromkeys(s["group"] for s in sets))
    grouped = None not in groups and len(groups) > 1
    shots = sorted({s["shots"] for s in sets if s["shots"] is not None})
    body, head = (round(_over_sets(own, part)) for part in ("body", "head"))
    peaks = [r["peak_bytes"] for r in own if r.get("peak_bytes") is not None]
    return {
        "model": own[0]["model"],
        "method": own[0]["method"],
        "body": body,
        "head": head,
        "scores": scores,
        "mean_sets": mean,
        "mean_groups": (
            _mean(by_seed, [[s["key"] for s in sets if s["group"] == g] for g in groups]) if grouped else None
        ),
        "mean_shots": {
            str(n): _mean(by_seed, [[s["key"]] for s in sets if s["shots"] == n]) for n in shots
        } if len(shots) > 1 else None,
        "pe": None if mean is None else pe(mean["mean"], body + head),
        "rank": ranked.get("mean_rank", {}).get(own[0]["method"]),
        "seconds": statistics.median(r["seconds"] for r in own),
        "peak_bytes": max(peaks, default=None),
        "leaky": _leaky(own, sets),
    }  # fmt: skip


def _over_sets(own: Sequence[Record], part: str) -> float:
    """Mean over data sets: the head grows with the classes, the body where a search chose the rank."""
    found: dict[str, list[int]] = defaultdict(list)
    for record in own:
        found[_key(record)].append(record[part])
    return statistics.fmean(statistics.fmean(values) for values in found.values())


def _mean(by_seed: Mapping[str, Mapping[int, float]], groups: Sequence[Sequence[str]]) -> dict[str, Any] | None:
    """Mean of the groups' means, for each seed that every set has; None where a set is missing."""
    keys = [key for group in groups for key in group]
    if not keys or any(key not in by_seed for key in keys):
        return None
    seeds = sorted(set.intersection(*(set(by_seed[key]) for key in keys)))
    each = [
        statistics.fmean(statistics.fmean(by_seed[key][seed] for key in group) for group in groups) for seed in seeds
    ]
    return spread(each) if each else None


def _apart(
    own: Sequence[Record], other: Sequence[Record] | None, sets: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Mean of the differences to another method, data set by data set and seed by seed, where both have every set."""
    if other is None or other == own:
        return None
    mine, theirs = _by_seed(own), _by_seed(other)
    both = {
        key: {seed: value - theirs[key][seed] for seed, value in mine[key].items() if seed in theirs[key]}
        for key in mine if key in theirs
    }  # fmt: skip
    return _mean(both, [[s["key"]] for s in sets])


def _leaky(own: Sequence[Record], sets: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    found = {}
    for s in sets:
        runs = [r for r in own if _key(r) == s["key"]]
        if runs and all(r.get("leaky") for r in runs):
            found[s["key"]] = statistics.fmean(r["leaky"]["accuracy"] for r in runs)
    return found or None


def _run(record: Record) -> dict[str, Any]:
    leaky = record.get("leaky")
    return {
        "key": record["key"], "model": record["model"], "method": record["method"], "set": record["set"],
        "shots": record.get("shots"), "seed": record["seed"], "test": record["test_accuracy"],
        "val": record.get("val_accuracy"), "body": record["body"], "head": record["head"],
        "seconds": record["seconds"], "peak_bytes": record.get("peak_bytes"),
        "leaky": leaky["accuracy"] if leaky else None, "curve": record.get("curve") or [],
        "classes": record.get("class_accuracy") or {},
    }  # fmt: skip


# Ranks


def _ranks(done: Sequence[Record], model: str, sets: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Compare the methods that have every data set; None for fewer than two of them, or no seed in common."""
    own: dict[str, list[Record]] = defaultdict(list)
    for record in done:
        if record["model"] == model:
            own[record["method"]].append(record)
    keys = [s["key"] for s in sets]
    scores = {method: _by_seed(runs) for method, runs in own.items()}
    whole = {method: by for method, by in scores.items() if all(key in by for key in keys)}
    if len(whole) < 2:
        return None
    seeds = {key: sorted(set.intersection(*(set(by[key]) for by in whole.values()))) for key in keys}
    if not all(seeds.values()):
        return None
    names = list(dict.fromkeys(s["name"] for s in sets))
    alone = len(names) >= TASKS  # then a data set counts once: its seeds are not so many data sets

    def blocks(by: Mapping[str, Mapping[int, float]]) -> list[float]:
        each = {name: [by[s["key"]][n] for s in sets if s["name"] == name for n in seeds[s["key"]]] for name in names}
        return [statistics.fmean(v) for v in each.values()] if alone else [x for v in each.values() for x in v]

    told = compare({method: blocks(by) for method, by in whole.items()})
    return {**told, "blocks": "data sets" if alone else "data sets and seeds"}


# Ours next to the published numbers


def _published(
    row: Mapping[str, Any], done: Sequence[Record], sets: Sequence[Mapping[str, Any]]
) -> Iterable[dict[str, Any]]:
    own = [r for r in done if (r["model"], r["method"]) == (row["model"], row["method"])]
    one = own[0]
    train, seen = one["recipe"].get("train", {}), one["preprocessing"]
    method = str(one["recipe"].get("method", {}).get("name")) + ("+pace" if train.get("pace") else "")
    ours = (str(one.get("protocol")), str(one["base"].get("name")), seen["size"], train.get("epochs"),
            pixels(seen["mean"], seen["std"]))  # fmt: skip
    everywhere = {known_as(s["name"]) for s in sets}
    shots = {s["shots"] for s in sets}
    wanted: list[tuple[str, str, int | None, Mapping[str, Any] | None]] = [
        (s["key"], s["name"], s["shots"], row["scores"].get(s["key"])) for s in sets
    ]
    wanted += [(mean, mean, next(iter(shots)), row[mean]) for mean in ("mean_sets", "mean_groups") if len(shots) == 1]
    wanted += [(f"mean_sets {n}-shot", "mean_sets", int(n), value) for n, value in (row["mean_shots"] or {}).items()]
    for key, name, count, mine in wanted:
        if mine is None:
            continue
        for theirs in find(method, name, ours[1], count):
            if theirs.set in MEANS and set(theirs.over) != everywhere:
                continue  # a mean over other data sets is another quantity
            differs = theirs.differs(*ours)
            yield {
                "model": row["model"], "method": row["method"], "set": key, "ours": mine["mean"], "sd": mine["sd"],
                "accuracy": theirs.accuracy, "difference": None if differs else mine["mean"] - theirs.accuracy,
                "differs": differs, "label": theirs.label, "table": theirs.table, "source": theirs.paper,
                "protocol": theirs.protocol, "leak": theirs.leak, "unverified": theirs.unverified, "note": theirs.note,
            }  # fmt: skip


# Caption


def _caption(
    done: Sequence[Record],
    models: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    ranks: Mapping[str, Any],
    against: str,
) -> list[str]:
    if not done:
        return ["No finished run whose test split stayed locked until its end."]
    lines = []
    for model in models:
        own = [r for r in done if r["model"] == model]
        if own:
            lines += _model_lines(model, own[0])
    protocol, trained_on = done[0].get("protocol"), done[0]["recipe"].get("data", {}).get("train_on", "train")
    seeds = sorted({r["seed"] for r in done})
    lines += [
        f"Protocol {protocol}; trained on {trained_on}; test accuracy after the last epoch, the test split read once.",
        f"Epochs: {_counted(r['recipe'].get('train', {}).get('epochs') for r in done)}. "
        f"Precision: {_counted(r.get('precision') for r in done)}. Seeds: {', '.join(map(str, seeds))}.",
        *_search_lines(done),
        f"Devices: {_counted(r.get('device') for r in done)}. "
        f"Versions: {', '.join(f'{name} {_several(done, name)}' for name in ('deltavit', 'torch', 'timm', 'python'))}.",
        "Accuracy: mean over seeds in percent, ± standard deviation over seeds (n - 1). Means over data sets are taken "
        "seed by seed, and their spread is over seeds.",
    ]  # fmt: skip
    if any(row["mean_groups"] for row in rows):
        lines.append(
            "Two means: of all data sets, and of the groups' means. They differ; papers print one or the other."
        )
    if against:
        lines.append(
            f"Against {against}: mean difference in points, paired by data set and seed, ± standard deviation over "
            "seeds of the means over data sets."
        )
    lines.append(
        "PE = mean accuracy * exp(-log10(parameters / 1e8 + 1)), parameters: body and head, mean over data sets "
        "(ELEVATER, arXiv:2204.08790)."
    )
    for model, told in ranks.items():
        lines.append(_rank_line(model if len(ranks) > 1 else "", told))
    if any(row["leaky"] for row in rows):
        lines.append(
            "The leaky column is the best epoch chosen on the test pictures: no result, only for comparing with papers."
        )
    return lines


def _model_lines(model: str, one: Record) -> list[str]:
    base, seen = one["base"], one["preprocessing"]
    sha = base.get("weights_sha256")
    weights = f"weights {base['weights']}" if base.get("weights") else "weights as named"
    name = pixels(seen["mean"], seen["std"])
    numbers = "" if name.startswith("mean") else f" (mean {_numbers(seen['mean'])}, std {_numbers(seen['std'])})"
    return [
        f"{model}: {base.get('name')}, {weights}{f', SHA-256 {sha[:12]}' if sha else ''}, "
        f"fingerprint {str(base.get('fingerprint'))[:12]}; {seen['size']} px, resize {_resize(seen)}; "
        f"pixel normalisation {name}{numbers}."
    ]


def _search_lines(done: Sequence[Record]) -> list[str]:
    """What was chosen on val, on which data set, from how many trials of how many epochs."""
    told: Counter[str] = Counter()
    for record in done:
        search = record.get("search")
        if search is None:
            told["nothing"] += 1
            continue
        keys = ", ".join(sorted(record.get("chosen") or {})) or "nothing"
        on = "the same data set" if search.get("on") in (None, record["set"]) else str(search["on"])
        told[f"{keys} by val accuracy on {on}, trials of {search.get('epochs')} epochs"] += 1
    trials = sorted(r["search"]["trials"] for r in done if r.get("search"))
    counts = f" Trials a search: {trials[0]} to {trials[-1]}." if trials else ""
    return [f"Searched: {'; '.join(f'{what} ({n} runs)' for what, n in sorted(told.items()))}.{counts}"]


def _rank_line(model: str, told: Mapping[str, Any]) -> str:
    what = "data sets, each the mean of its seeds" if told["blocks"] == "data sets" else "pairs of data set and seed"
    test = f"paired sign-flip permutation test, Holm's correction over {told['pairs']} comparisons"
    if told["test"] == "rank range":
        test = f"permutation test of the range of mean ranks, for all {told['pairs']} comparisons at once"
    line = f"{f'{model}: r' if model else 'R'}anks and significance over {told['n']} {what}: {test}, level 0.05."
    if told["blocks"] != "data sets":
        line += " Seeds of one data set are not independent of each other, so these p values are optimistic."
    return line


def _counted(values: Iterable[Any]) -> str:
    """Each value, and in how many runs where there are several."""
    found = Counter("not known" if v is None else str(v) for v in values)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{value} ({n} runs)" for value, n in sorted(found.items()))


def _several(done: Sequence[Record], name: str) -> str:
    return " and ".join(sorted({str((r.get("versions") or {}).get(name, "not known")) for r in done}))


def dumps(told: Mapping[str, Any]) -> str:
    """A summary as JSON: the same bytes for the same records."""
    return json.dumps(told, indent=1, allow_nan=False) + "\n"
