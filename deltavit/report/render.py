"""A summary as Markdown, LaTeX and CSV: the form of the Kronecker paper's Table 2, body and head counted apart."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
NOTHING = "-"
MEANS = {"mean_sets": "mean of sets", "mean_groups": "mean of groups"}
LEAKY = "best epoch on test (leaky)"
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    head: str
    show: Callable[[Row], str]


def columns(summary: Row) -> list[Column]:
    """The main table: what no row has is left out."""
    rows, sets = summary["rows"], summary["sets"]
    made = [Column("method", lambda r: r["method"]), Column("body", lambda r: f"{r['body']:,}"),
            Column("head", lambda r: f"{r['head']:,}")]  # fmt: skip
    if len(summary["models"]) > 1:
        made.insert(0, Column("model", lambda r: r["model"]))
    made += [Column(s["key"], lambda r, key=s["key"]: percent(r["scores"].get(key))) for s in sets]  # type: ignore[misc]
    if len(sets) > 1:
        what = "sets" if len({s["shots"] for s in sets}) == 1 else "columns"
        made.append(Column(f"mean of {len(sets)} {what}", lambda r: percent(r["mean_sets"])))
    groups = {s["group"] for s in sets}
    if any(r["mean_groups"] for r in rows):
        made.append(Column(f"mean of {len(groups)} groups", lambda r: percent(r["mean_groups"])))
    for n in sorted({s["shots"] for s in sets} - {None}) if any(r["mean_shots"] for r in rows) else ():
        made.append(Column(f"mean of {n}-shot", lambda r, n=str(n): percent(r["mean_shots"][n])))  # type: ignore[misc]
    if summary["against"]:
        made.append(Column(f"against {summary['against']}", lambda r: percent(r["against"], "+.1f")))
    made += [
        Column("PE", lambda r: _number(r["pe"], ".3f")),
        Column("rank", lambda r: _number(r["rank"], ".2f")),
        Column("seconds", lambda r: _number(r["seconds"], ",.0f" if r["seconds"] >= 10 else ".1f")),
        Column("peak MiB", lambda r: _number(r["peak_bytes"], ",.0f", 2**20)),
    ]
    if any(r["leaky"] for r in rows):
        made.append(Column(LEAKY, lambda r: leaky(r, sets)))
    return made


def percent(value: Row | float | None, form: str = ".1f") -> str:
    """71.3 ± 0.4, or without a spread where there is one value only."""
    if value is None:
        return NOTHING
    if not isinstance(value, Mapping):
        return f"{100 * value:{form}}"
    return f"{100 * value['mean']:{form}}" + ("" if value["sd"] is None else f" ± {100 * value['sd']:.1f}")


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return NOTHING if value is None else format(value / unit, form)


def leaky(row: Row, sets: Sequence[Row]) -> str:
    """The mean over data sets, where all of them have it."""
    found = row["leaky"] or {}
    if any(s["key"] not in found for s in sets):
        return NOTHING
    return percent(sum(found[s["key"]] for s in sets) / len(sets))


# Markdown


def markdown(summary: Row, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The page index.md.

    Args:
        pictures: (title, file name beside the page) of each.
    """
    shown = columns(summary)
    words = sum(c.head in ("model", "method") for c in shown)
    parts = [
        f"# {_md(summary['title'] or 'Benchmark')}",
        _md_table([c.head for c in shown], [[c.show(r) for c in shown] for r in summary["rows"]], [*range(words)])
        if summary["rows"] else "No finished run.",
        "\n".join(f"- {_md(line)}" for line in summary["caption"]),
        *_md_ranks(summary),
        *(f"![{_md(title)}]({name})" for title, name in pictures),
        *_md_published(summary),
        *_md_gaps(summary),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _md_ranks(summary: Row) -> Iterable[str]:
    for model, told in summary["ranks"].items():
        yield "## Ranks" + (f" of {_md(model)}" if len(summary["ranks"]) > 1 else "")
        letters = {
            method: " ".join(str(i + 1) for i, bar in enumerate(told["same"]) if method in bar)
            for method in told["order"]
        }
        yield "Methods that share a number are not told apart by the test."
        rows = [[m, f"{told['mean_rank'][m]:.2f}", letters[m] or NOTHING] for m in told["order"]]
        yield _md_table(["method", "mean rank", "not told apart"], rows, [0, 2])


def _md_published(summary: Row) -> Iterable[str]:
    if not summary["published"]:
        return
    yield "## Ours next to published numbers"
    yield (
        "A difference is given only where protocol, checkpoint, picture size, epochs and pixel normalisation agree and "
        "the paper did not choose its epoch on test. Elsewhere the last column says what differs."
    )
    several = len(summary["models"]) > 1
    rows = []
    for p in summary["published"]:
        gap = NOTHING if p["difference"] is None else f"{100 * p['difference']:+.1f}"
        rows.append([
            *([p["model"]] if several else []), p["method"], MEANS.get(p["set"], p["set"]),
            percent({"mean": p["ours"], "sd": p["sd"]}), percent(p["accuracy"]), gap, f"{p['label']}: {p['source']}",
            p["table"], "; ".join(p["differs"]) or "comparable",
        ])  # fmt: skip
    heads = ["method", "set", "ours", "published", "difference", "source", "table", "not comparable because"]
    words = [i + several for i in (0, 1, 5, 6, 7)]
    yield _md_table(["model", *heads] if several else heads, rows, [0, *words])


def _md_gaps(summary: Row) -> Iterable[str]:
    for key, title in (("failed", "Failed runs"), ("excluded", "Left out of every table")):
        if summary[key]:
            lines = [f"- {_md(one['key'])}: {_md(one.get('line', one.get('why', '')))}" for one in summary[key]]
            yield f"## {title}\n\n" + "\n".join(lines)
    if summary["missing"]:
        lines = [f"- {_md(cell)}: {', '.join(map(str, seeds))}" for cell, seeds in _gaps(summary["missing"]).items()]
        yield "## Not run yet\n\n" + "\n".join(lines)


def _gaps(missing: Sequence[Row]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in missing:
        shots = "" if one["shots"] is None else f" {one['shots']}-shot"
        found.setdefault(f"{one['model']}, {one['method']}, {one['set']}{shots}, seeds", []).append(one["seed"])
    return found


def _md_table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int]) -> str:
    """Columns in `words` begin at the left, numbers end at the right."""
    rule = "".join("---|" if i in words else "---:|" for i in range(len(heads)))
    lines = ["| " + " | ".join(map(_md, heads)) + " |", "|" + rule]
    return "\n".join([*lines, *("| " + " | ".join(map(_md, row)) + " |" for row in rows)])


def _md(text: str) -> str:
    """A label as it is: no markup, no new column, no new line."""
    text = " ".join(str(text).split())
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, "\\" + mark)
    return text


# LaTeX


def latex(summary: Row) -> str:
    """The main table as a `table*` for the packages booktabs and graphicx."""
    shown = columns(summary)
    words = sum(c.head in ("model", "method") for c in shown)
    sets = {s["key"]: s["group"] or "" for s in summary["sets"]}
    lines = [
        r"\begin{table*}", r"\centering", r"\resizebox{\textwidth}{!}{%",
        r"\begin{tabular}{" + "l" * words + "r" * (len(shown) - words) + "}", r"\toprule",
    ]  # fmt: skip
    if any(sets.values()):
        lines += _tex_groups([sets.get(c.head, "") for c in shown])
    lines += [" & ".join(_tex(c.head) for c in shown) + r" \\", r"\midrule"]
    lines += [" & ".join(_tex(c.show(row)) for c in shown) + r" \\" for row in summary["rows"]]
    caption = [summary["title"] or "Benchmark", *summary["caption"], *_tex_gaps(summary)]
    lines += [r"\bottomrule", r"\end{tabular}}", r"\caption{" + " ".join(_tex(_stop(line)) for line in caption) + "}"]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def _tex_groups(groups: Sequence[str]) -> list[str]:
    """A line above the heads with the names of the groups, and rules under them."""
    cells, rules, at = [], [], 0
    while at < len(groups):
        end = at + 1
        while end < len(groups) and groups[at] and groups[end] == groups[at]:
            end += 1
        if groups[at]:
            cells.append(rf"\multicolumn{{{end - at}}}{{c}}{{{_tex(groups[at])}}}")
            rules.append(rf"\cmidrule(lr){{{at + 1}-{end}}}")
        else:
            cells.append("")
        at = end
    return [" & ".join(cells) + r" \\", "".join(rules)]


def _tex_gaps(summary: Row) -> Iterable[str]:
    for key, title in (("failed", "Failed"), ("excluded", "Left out")):
        if summary[key]:
            yield f"{title}: {', '.join(one['key'] for one in summary[key])}."
    if summary["missing"]:
        yield f"Not run yet: {len(summary['missing'])} cells."


def _tex(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in " ".join(text.split()))


def _stop(line: str) -> str:
    return line if line.endswith(".") else line + "."


# CSV


def csv_text(summary: Row) -> str:
    """One line a run, accuracies as fractions with all their digits."""
    heads = ["key", "model", "method", "set", "shots", "seed", "test", "val", "body", "head", "seconds", "peak_bytes"]
    if any(run["leaky"] is not None for run in summary["runs"]):
        heads.append("leaky")
    out = io.StringIO()
    written = csv.writer(out, lineterminator="\n")
    written.writerow([LEAKY if head == "leaky" else head for head in heads])
    written.writerows([_cell(run[head]) for head in heads] for run in summary["runs"])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A label that a spreadsheet would read as a formula gets an apostrophe."""
    return "'" + value if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
