"""The report as one HTML file: no network, no library, and the same bytes for the same summary.

Every table is written here as real HTML, so that the page reads without JavaScript; page.js sorts and filters the
tables and draws what needs a choice (cost, learning curves, classes) from the summary, which is embedded as JSON.
A Content-Security-Policy names the hashes of the one style and the one script: nothing else runs, and nothing loads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Any

MISSING = "–"
MEANS = {"mean_sets": "mean of sets", "mean_groups": "mean of groups"}

FIND = (
    '<div class="controls"><label>Rows with '
    '<input class="find" type="search" placeholder="words, in any column" autocomplete="off"></label></div>'
)
"""Stands right above a table, and hides the rows that lack one of its words."""

Row = dict[str, Any]


def page(summary: dict[str, Any]) -> str:
    """The whole page.  It opens from a disk, prints, and follows the reader's light or dark setting.

    Args:
        summary: what `deltavit.report.summary.summary` returns; its labels may hold any text.
    """
    frame, style, script = (
        files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    sections = [s for s in (make(summary) for make in SECTIONS) if s]
    return Template(frame).substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        title=_text(summary["title"] or "Benchmark"),
        facts=" · ".join(_facts(summary)),
        nav="".join(f'<li><a href="#{s.id}">{s.title}</a></li>' for s in sections),
        sections="\n".join(
            f'<section id="{s.id}" aria-labelledby="{s.id}-t">\n<h2 id="{s.id}-t">{s.title}</h2>\n{s.body}\n</section>'
            for s in sections
        ),
        data=_embedded(summary),
        style=style,
        script=script,
    )


# ---- text that is safe anywhere


def _text(value: Any) -> str:
    return escape(str(value).encode("utf-8", "replace").decode())  # a lone surrogate has no bytes


def _embedded(summary: dict[str, Any]) -> str:
    """JSON that no label can end early: no < > & nothing outside ASCII; and numbers to six digits."""
    kept = {key: summary[key] for key in ("models", "methods", "sets", "rows", "runs")}
    plain = json.dumps(_short(kept), separators=(",", ":"))
    return plain.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list | tuple) else value


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _facts(summary: dict[str, Any]) -> Iterable[str]:
    for key, one in (("methods", "method"), ("models", "model"), ("sets", "data set"), ("runs", "run")):
        count = len(summary[key])
        yield f"{count:,} {one}{'' if count == 1 else 's'}"


# ---- numbers


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def whole(value: float) -> str:
    return f"{value:,}"


# ---- tables


@dataclass(frozen=True)
class Cell:
    """One cell: what it shows (HTML), and what it sorts by; no value means that there is nothing to show."""

    shown: str
    value: float | str | None = None
    kind: str = ""
    head: bool = False

    def html(self, extra: str = "") -> str:
        tag, scope = ("th", ' scope="row"') if self.head else ("td", "")
        value = "" if self.value is None else f' data-v="{_text(self.value)}"'
        kind = f' class="{self.kind}"' if self.kind else ""
        return f"<{tag}{scope}{kind}{value}{extra}>{self.shown}</{tag}>"


def name(label: Any, kind: str = "", head: bool = False) -> Cell:
    """A cell of words."""
    return Cell(_text(label), label, kind, head) if label is not None else Cell(MISSING, None, kind)


def number(value: float | None, shown: Callable[[Any], str], sd: float | None = None, kind: str = "") -> Cell:
    """A cell of figures, with its spread where there is one."""
    if value is None:
        return Cell(MISSING, None, f"n {kind}".strip())
    spread = "" if sd is None else f" <small>± {shown(sd)}</small>"
    return Cell(shown(value) + spread, value, f"n {kind}".strip())


@dataclass(frozen=True)
class Head:
    """The head of a column; `key` is the data set it belongs to, and `group` what stands above it."""

    label: str
    kind: str = ""
    group: str = ""
    key: str = ""

    @property
    def extra(self) -> str:
        return f' data-set="{_text(self.key)}"' if self.key else ""


def _box(label: str, head: str, body: str, kind: str) -> str:
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{label}"><table class="{kind}">'
        f'<caption class="unseen">{label}</caption><thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def table(label: str, heads: Sequence[Head], rows: Iterable[tuple[int | None, Sequence[Cell]]]) -> str:
    """A table that a click on a head sorts, in a box that scrolls; rows are (which row of the summary, cells)."""
    above = ""
    if any(h.group for h in heads):
        spans = [(group, len(list(of))) for group, of in groupby(heads, key=lambda h: h.group)]
        tag = {False: "td", True: 'th scope="colgroup"'}
        cells = (f'<{tag[bool(group)]} colspan="{n}">{_text(group)}</{tag[bool(group)][:2]}>' for group, n in spans)
        above = f'<tr class="groups">{"".join(cells)}</tr>'
    head = "".join(
        f'<th scope="col" class="{h.kind}" aria-sort="none"{h.extra}>'
        f'<button type="button">{_text(h.label)}</button></th>'
        for h in heads
    )
    body = "\n".join(
        ("<tr>" if i is None else f'<tr data-row="{i}">')
        + "".join(c.html(h.extra) for c, h in zip(cells, heads, strict=True))
        + "</tr>"
        for i, cells in rows
    )
    return _box(_text(label), f"{above}<tr>{head}</tr>", body, "sortable")


# ---- sections


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    body: str


def _select(id: str, label: str, options: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{_text(value)}">{_text(shown)}</option>' for value, shown in options)
    return f'<label>{label} <select id="{id}">{inside}</select></label>'


def _drawn(id: str, controls: str, note: str) -> str:
    return (
        f'<p class="note">{note}</p><div class="controls">{controls}</div><div id="{id}" class="chart"></div>'
        "<noscript><p>This picture needs JavaScript; its numbers are in the tables.</p></noscript>"
    )


@dataclass(frozen=True)
class Column:
    """A column of the main table: where a row holds its value, how it reads, and which end is best."""

    head: Head
    path: tuple[str, ...]
    shown: Callable[[Any], str]
    best: Callable[[Iterable[float]], float] | None = None

    def of(self, row: Row) -> tuple[float | None, float | None]:
        """Value and spread."""
        at: Any = row
        for key in self.path:
            at = (at or {}).get(key)
        return (at["mean"], at["sd"]) if isinstance(at, dict) else (at, None)


def results(summary: dict[str, Any]) -> Section:
    sets, models = summary["sets"], summary["models"]
    rows = [{**row, "leaky": _leaky(row, sets)} for row in summary["rows"]]
    shots = sorted({s["shots"] for s in sets} - {None})
    columns = [
        Column(Head("Body", "n"), ("body",), whole),
        Column(Head("Head", "n"), ("head",), whole),
        *(Column(Head(s["key"], "n", s["group"] or "", s["key"]), ("scores", s["key"]), percent, max) for s in sets),
        *([Column(Head(_over(sets), "n mean"), ("mean_sets",), percent, max)] if len(sets) > 1 else []),
        Column(Head(f"Mean of {len({s['group'] for s in sets})} groups", "n mean"), ("mean_groups",), percent, max),
        *(Column(Head(f"Mean of {n}-shot", "n mean"), ("mean_shots", str(n)), percent, max) for n in shots),
        Column(Head(f"Against {summary['against']}", "n"), ("against",), points, max),
        Column(Head("PE", "n"), ("pe",), "{:.3f}".format, max),
        Column(Head("Rank", "n"), ("rank",), "{:.2f}".format, min),
        Column(Head("Seconds", "n"), ("seconds",), seconds),
        Column(Head("Peak MiB", "n"), ("peak_bytes",), mebibytes),
        Column(Head("Best epoch on test", "n leaky", "Leaky, no result"), ("leaky",), percent),
    ]
    # a column that nobody fills says nothing; a data set without results stays, as a gap to be seen
    columns = [c for c in columns if c.path[0] == "scores" or any(c.of(row)[0] is not None for row in rows)]
    best = {}  # (column, model) -> as shown: what reads the same is equally good
    for column in columns:
        for model in models:
            values = [v for row in rows if row["model"] == model and (v := column.of(row)[0]) is not None]
            if column.best and len(values) > 1:
                best[column.path, model] = column.shown(column.best(values))

    def cells(row: Row) -> list[Cell]:
        made = [name(row["method"], head=True), name(row["model"])]
        for column in columns:
            value, sd = column.of(row)
            good = value is not None and best.get((column.path, row["model"])) == column.shown(value)
            made.append(number(value, column.shown, sd, column.head.kind[2:] + " best" * good))
        return made if len(models) > 1 else [made[0], *made[2:]]

    heads = [Head("Method"), *([Head("Model")] if len(models) > 1 else []), *(c.head for c in columns)]
    made = table("Accuracy and cost of every method", heads, [(i, cells(row)) for i, row in enumerate(rows)])
    boxes = "".join(
        f"<fieldset><legend>{_text(group or 'All')}</legend>"
        + "".join(
            f'<label><input type="checkbox" checked value="{_text(s["key"])}"> {_text(s["key"])}</label>' for s in of
        )
        + "</fieldset>"
        for group, of in groupby(sets, key=lambda s: s["group"])
    )
    both = '<p><button type="button" value="on">all</button> <button type="button" value="">none</button></p>'
    controls = (
        '<label>Method <input id="filter" type="search" placeholder="any part of a name" autocomplete="off"></label>'
        + (_select("model", "Model", [("", "all"), *((m, m) for m in models)]) if len(models) > 1 else "")
        + f'<details id="sets"><summary>Data sets</summary><div>{boxes}{both}</div></details>'
        '<output id="shown"></output>'
    )
    note = (
        "Percent of test pictures named right, mean over seeds ± standard deviation; the best of a column in colour. "
        "Body and head: trained parameters of the backbone and of the classifier. Seconds: the median of a training. "
        "Click a head to sort."
    )
    caption = "".join(f"<li>{_text(line)}</li>" for line in summary["caption"])
    return Section(
        "results",
        "Results",
        f'<p class="note">{note}</p><div class="controls">{controls}</div>{made}<ul class="caption">{caption}</ul>',
    )


def _over(sets: Sequence[Row]) -> str:
    return f"Mean of {len(sets)} {'sets' if len({s['shots'] for s in sets}) == 1 else 'columns'}"


def _leaky(row: Row, sets: Sequence[Row]) -> float | None:
    """The mean over data sets, where all of them have it."""
    found = row["leaky"] or {}
    return sum(found[s["key"]] for s in sets) / len(sets) if all(s["key"] in found for s in sets) else None


def cost(summary: dict[str, Any]) -> Section | None:
    rows = summary["rows"]
    costs = [("body", "parameters of the body"), ("seconds", "seconds of training"), ("peak_bytes", "peak memory")]
    gains = [("mean_sets", _over(summary["sets"])), ("mean_groups", "Mean of groups")]
    x = [(key, label) for key, label in costs if any(row[key] is not None for row in rows)]
    y = [(key, label) for key, label in gains[len(summary["sets"]) < 2 :] if any(row[key] for row in rows)]
    y += [(f"scores/{s['key']}", s["key"]) for s in summary["sets"]]
    if not rows or not x:
        return None
    note = (
        "Up and to the left is better. The line is the Pareto front: no other method is both as cheap and as accurate. "
        "Bars are one standard deviation; point at a mark, or tab to it, to read it. The table's filters hold here too."
    )
    return Section(
        "cost",
        "Accuracy against cost",
        _drawn("cost-chart", _select("y", "Accuracy", y) + _select("x", "against", x), note),
    )


def ranks(summary: dict[str, Any]) -> Section | None:
    made = "".join(
        _ranks(model, of, len(summary["ranks"]) > 1) for model, of in summary["ranks"].items() if of["order"]
    )
    note = (
        "Rank 1 is best. A bar joins neighbours of which no two are told apart by the paired test, at the 5 % level "
        "for all comparisons together; the p values below say it of every pair."
    )
    return Section("ranks", "Ranks", f'<p class="note">{note}</p>{made}') if made else None


def _ranks(model: str, of: dict[str, Any], several: bool) -> str:
    order, bars = of["order"], [set(group) for group in of["same"] if len(group) > 1]
    reach = [[i for i, method in enumerate(order) if method in bar] for bar in bars]

    def track(rank: float) -> str:
        at = 100 * (rank - 1) / max(len(order) - 1, 1)
        line = '<line x1="0" x2="100%" y1="8" y2="8"/>'
        dot = f'<circle cx="{at:.2f}%" cy="8" r="5"/>'
        return f'<svg class="track" aria-hidden="true" width="100%" height="16">{line}{dot}</svg>'

    def cells(i: int, method: str) -> str:
        marks = "".join(
            f'<td class="bar{" on" * (at[0] <= i <= at[-1])}{" from" * (i == at[0])}{" to" * (i == at[-1])}">'
            f"{'<i></i>' if i in at else ''}"
            f'<span class="unseen">{f"in bar {b + 1}" if i in at else ""}</span></td>'
            for b, at in enumerate(reach)
        )
        rank = of["mean_rank"][method]
        figures = f'<td class="n">{rank:.2f}</td><td class="wide">{track(rank)}</td>'
        return f'<tr><th scope="row">{_text(method)}</th>{figures}{marks}</tr>'

    def p(a: str, b: str) -> str:
        value = of["p"].get(a, {}).get(b, of["p"].get(b, {}).get(a))
        if a == b or value is None:
            return '<td class="n self"></td>'
        level = "p3" if value < 0.001 else "p2" if value < 0.01 else "p1" if value < 0.05 else ""
        return f'<td class="n {level}">{"&lt;.001" if value < 0.001 else f"{value:.3f}".lstrip("0")}</td>'

    head = '<th scope="col">Method</th><th scope="col" class="n">Mean rank</th>'
    head += f'<th scope="col" class="wide"><span class="ends"><span>1</span><span>{len(order)}</span></span></th>'
    head += f'<th scope="colgroup" colspan="{len(bars)}">not told apart</th>' if bars else ""
    plot = "".join(cells(i, method) for i, method in enumerate(order))
    columns = "".join(f'<th scope="col" class="n">{_text(m)}</th>' for m in order)
    matrix = "".join(f'<tr><th scope="row">{_text(a)}</th>{"".join(p(a, b) for b in order)}</tr>' for a in order)
    title = f"{_text(model)}, " if several else ""
    return (
        (f"<h3>{_text(model)}</h3>" if several else "")
        + _box(
            f"{title}mean rank of {len(order)} methods over {of['n']} {of['blocks']}", f"<tr>{head}</tr>", plot, "ranks"
        )
        + '<details class="print"><summary>p values of every pair of methods</summary>'
        + _box(f"{title}p values", f"<tr><td></td>{columns}</tr>", matrix, "matrix")
        + "</details>"
    )


def curves(summary: dict[str, Any]) -> Section | None:
    runs, sets = summary["runs"], summary["sets"]
    if not any(run["curve"] for run in runs):
        return None
    controls = _select("curve-set", "Data set", [(s["key"], s["key"]) for s in sets])
    if len(summary["models"]) > 1:
        controls += _select("curve-model", "Model", [(m, m) for m in summary["models"]])
    note = "Thick: the mean over seeds; thin: each seed. Choose up to six methods."
    drawn = _drawn(
        "curves-chart",
        controls + '<div id="curve-methods" class="chips" role="group" aria-label="Methods"></div>',
        note,
    )
    heads = [Head(h) for h in ("Method", "Model", "Data set")]
    heads += [Head(h, "n") for h in ("Seed", "Test", "Val", "Epochs", "Last loss", "Body", "Seconds", "Memory, MiB")]
    keys = {(s["name"], s["shots"]): s["key"] for s in sets}

    def cells(run: Row) -> list[Cell]:
        curve = run["curve"] or []
        return [
            name(run["method"], head=True), name(run["model"]),
            name(keys[run["set"], run["shots"]]), number(run["seed"], str),
            number(run["test"], percent), number(run["val"], percent),
            number(len(curve) or None, str), number(curve[-1][1] if curve else None, "{:.4f}".format),
            number(run["body"], whole), number(run["seconds"], seconds), number(run["peak_bytes"], mebibytes),
        ]  # fmt: skip

    listed = table("Every run", heads, [(None, cells(run)) for run in runs])
    return Section(
        "curves", "Learning curves", f"{drawn}<details><summary>Every run in numbers</summary>{FIND}{listed}</details>"
    )


def classes(summary: dict[str, Any]) -> Section | None:
    if not any(run["classes"] for run in summary["runs"]):
        return None
    several = len(summary["models"]) > 1
    rows = [
        (str(i), f"{r['method']} · {r['model']}" if several else r["method"]) for i, r in enumerate(summary["rows"])
    ]
    controls = _select("class-set", "Data set", [(s["key"], s["key"]) for s in summary["sets"]])
    controls += _select("class-a", "", rows).replace("<label>", '<label class="a">')
    controls += _select("class-b", "against", rows).replace("<label>", '<label class="b">')
    note = "Accuracy of each class, mean over seeds, the largest difference first."
    return Section("classes", "Accuracy by class", _drawn("classes-chart", controls, note))


def published(summary: dict[str, Any]) -> Section | None:
    rows = summary["published"]
    if not rows:
        return None
    several = len(summary["models"]) > 1
    heads = [Head("Method"), *([Head("Model")] if several else []), Head("Data set")]
    heads += [Head("Ours", "n"), Head("Published", "n"), Head("Difference", "n")]
    heads += [Head(h) for h in ("What differs", "Leaky", "Printed as", "Source", "Their protocol")]

    def cells(row: Row) -> list[Cell]:
        why = "; ".join(row["differs"])
        leak = {True: "leaky", False: "no", None: "not known"}[row["leak"]]
        source = f"{row['source']}, {row['table']}" + "; unverified" * bool(row["unverified"])
        return [
            name(row["method"], head=True), *([name(row["model"])] if several else []),
            name(MEANS.get(row["set"], row["set"])), number(row["ours"], percent, row["sd"]),
            number(row["accuracy"], percent), number(row["difference"], points),
            Cell(f"<strong>not comparable:</strong> {_text(why)}", why, "words") if why else name("nothing known"),
            name(leak, "leak" if row["leak"] else ""), name(row["label"]), name(source, "words"),
            name("; ".join(filter(None, (row["protocol"], row.get("note")))), "words"),
        ]  # fmt: skip

    note = (
        "A difference, in points, is given only where protocol, checkpoint, picture size, epochs and pixel "
        "normalisation agree. A leaky number chose its epoch on the test pictures."
    )
    made = table("Ours next to published numbers", heads, [(None, cells(row)) for row in rows])
    return Section("published", "Published numbers", f'<p class="note">{note}</p>{FIND}{made}')


def gaps(summary: dict[str, Any]) -> Section:
    kinds = (("failed", "Failed"), ("excluded", "Left out of every table"), ("missing", "Not run yet"))
    made = ""
    for key, title in kinds:
        rows = summary[key]
        if rows:
            heads = list(rows[0])
            cells = [
                (None, [name(row.get(h), "words" if h in ("line", "why") else "", head=h == heads[0]) for h in heads])
                for row in rows
            ]
            made += f"<h3>{title}: {len(rows):,}</h3>" + table(title, [Head(h.capitalize()) for h in heads], cells)
    return Section("gaps", "Missing runs", made or "<p>None: every run of the suite is in the tables.</p>")


def rebuild(summary: dict[str, Any]) -> Section:
    return Section(
        "rebuild",
        "Rebuild this page",
        "<pre>deltavit report OUT</pre>"
        "<p>OUT is the folder that <code>deltavit bench SUITE.toml --out OUT</code> filled. "
        "Every number here is a pure function of the files in its <code>records</code> folder: delete this page, "
        "build it again, and it has the same bytes.</p>",
    )


SECTIONS: tuple[Callable[[dict[str, Any]], Section | None], ...] = (
    results, cost, ranks, curves, classes, published, gaps, rebuild,
)  # fmt: skip
