"""Static pictures of a summary: accuracy against cost, the rank diagram, learning curves.

The same data give the same bytes, with one version of matplotlib: no dates, and names inside an SVG come from a salt.
"""

from __future__ import annotations

import io
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ..core.errors import DataError

COSTS = {
    "body": "trainable parameters without the head",
    "seconds": "seconds of training",
    "peak_bytes": "peak memory, MiB",
}
MARKS = "osD^v<>P*X"
Row = Mapping[str, Any]


def accuracy_against(
    rows: Sequence[Row],
    x: Literal["body", "seconds", "peak_bytes"] = "body",
    *,
    score: str = "mean_sets",
    label: str = "mean test accuracy, %",
    title: str = "",
) -> Any:
    """One mark a method, with its spread over seeds, and the front of those that nothing cheaper beats.

    Args:
        rows: each with "method", the cost `x`, and `score` as {"mean", "sd"} in fractions; others are left out.
        score: "mean_sets", "mean_groups", or the key of a data set in the rows' "scores".

    Returns:
        A matplotlib Figure; `save` makes bytes of it.
    """
    found = []
    for row in rows:
        value = row.get(score) if score in row else row.get("scores", {}).get(score)
        if value is not None and row.get(x) is not None:
            cost = row[x] / 2**20 if x == "peak_bytes" else row[x]
            found.append((cost, 100 * value["mean"], 100 * (value["sd"] or 0.0), row["method"]))
    figure, axes = _axes(10, 6)
    front: list[tuple[float, float]] = []
    for cost, mean, *_ in sorted(found, key=lambda f: (f[0], -f[1])):
        if not front or mean > front[-1][1]:
            front.append((cost, mean))
    axes.plot([f[0] for f in front], [f[1] for f in front], color="0.75", linewidth=1, zorder=1)
    for i, (cost, mean, sd, name) in enumerate(found):
        axes.errorbar(
            cost, mean, sd or None, marker=MARKS[(i // 10) % len(MARKS)], color=f"C{i % 10}", capsize=3,
            linestyle="none", label=_plain(name),
        )  # fmt: skip
    if x == "body":
        axes.set_xscale("symlog", linthresh=3000)
        axes.set_xlim(left=-300)
    elif found and max(f[0] for f in found) > 20 * max(min(f[0] for f in found), 1e-9):
        axes.set_xscale("log")
    axes.set(xlabel=COSTS[x], ylabel=label, title=_plain(title))
    if found:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def rank_diagram(told: Row, title: str = "") -> Any:
    """Mean ranks on an axis, best at the left; a bar joins methods that are not told apart.

    Source: the critical-difference diagram of Demsar 2006, with `stats.compare` as its test.
    """
    order, rank = told["order"], told["mean_rank"]
    half = (len(order) + 1) // 2
    bars = len(told["same"])
    figure, axes = _axes(10, 1.4 + 0.18 * bars + 0.26 * half)
    top, low = 0.0, -0.35 * (bars + 1)
    axes.set(xlim=(0.5, len(order) + 0.5), ylim=(low - 0.55 * half - 0.2, 0.9), title=_plain(title))
    axes.set_axis_off()
    axes.plot([1, len(order)], [top, top], color="black", linewidth=1)
    for tick in range(1, len(order) + 1):
        axes.plot([tick, tick], [top, top + 0.12], color="black", linewidth=1)
        axes.text(tick, top + 0.2, str(tick), ha="center", va="bottom", fontsize="small")
    for i, name in enumerate(order):
        left = i < half
        y = low - 0.55 * (i if left else len(order) - 1 - i)
        edge = 0.5 if left else len(order) + 0.5
        axes.plot([rank[name], rank[name], edge], [top, y, y], color="0.4", linewidth=0.8)
        axes.text(
            edge, y, f"{_plain(name)} ({rank[name]:.2f}) " if left else f" {_plain(name)} ({rank[name]:.2f})",
            ha="right" if left else "left", va="center", fontsize="small",
        )  # fmt: skip
    for i, bar in enumerate(told["same"]):
        y = -0.35 * (i + 1) + 0.1
        axes.plot([rank[bar[0]] - 0.05, rank[bar[-1]] + 0.05], [y, y], color="C0", linewidth=4, solid_capstyle="butt")
    return figure


def learning_curves(runs: Sequence[Row], title: str = "") -> Any:
    """Of each data set a plot, of each method a line: val accuracy, or training loss where there is no val."""
    sets = list(dict.fromkeys((r["set"], r["shots"]) for r in runs if r["curve"]))
    methods = list(dict.fromkeys(r["method"] for r in runs))
    wide = 2 if len(sets) == 4 else min(3, max(1, len(sets)))
    figure, grid = _axes(4.2 * wide + 2.2, 3.4 * -(-max(1, len(sets)) // wide), -(-max(1, len(sets)) // wide), wide)
    flat = list(grid.flat)
    for axes in flat[len(sets) :]:
        axes.set_axis_off()
    for axes, (name, shots) in zip(flat, sets, strict=False):
        own = [r for r in runs if (r["set"], r["shots"]) == (name, shots) and r["curve"]]
        val = any(point[2] is not None for r in own for point in r["curve"])
        for i, method in enumerate(methods):
            by_epoch: dict[int, list[float]] = defaultdict(list)
            for r in (r for r in own if r["method"] == method):
                for epoch, loss, accuracy in r["curve"]:
                    value = loss if not val else None if accuracy is None else 100 * accuracy
                    if value is not None:
                        by_epoch[epoch].append(value)
            if by_epoch:
                epochs = sorted(by_epoch)
                axes.plot(
                    epochs, [statistics.fmean(by_epoch[e]) for e in epochs], color=f"C{i % 10}", linewidth=1.2,
                    linestyle=("-", "--", ":", "-.")[(i // 10) % 4], label=_plain(method),
                )  # fmt: skip
        axes.set(
            title=_plain(name if shots is None else f"{name}, {shots} shots"), xlabel="epoch",
            ylabel="val accuracy, %" if val else "training loss",
        )  # fmt: skip
    lines = {line.get_label(): line for axes in flat for line in axes.get_lines()}
    shown = [name for name in map(_plain, methods) if name in lines]
    if shown:
        figure.legend([lines[name] for name in shown], shown, loc="outside right upper", fontsize="small")
    figure.suptitle(_plain(title))
    return figure


def save(figure: Any, kind: Literal["png", "svg"] = "png") -> bytes:
    """The picture as bytes, the same for the same data."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "deltavit"}):
        if kind == "svg":
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()


def pictures(summary: Row, kind: Literal["png", "svg"] = "png") -> Iterator[tuple[str, str, bytes]]:
    """(title, file name, bytes) of every picture that the summary has data for."""
    for i, model in enumerate(summary["models"]):
        rows = [r for r in summary["rows"] if r["model"] == model]
        stem = "" if len(summary["models"]) == 1 else f"-{i + 1}"
        whole = [r for r in rows if r["mean_sets"]]
        what = (
            f"mean of {len(summary['sets'])} sets, %" if len(summary["sets"]) > 1 else f"{summary['sets'][0]['key']}, %"
        )
        for x in COSTS:
            if any(r[x] is not None for r in whole):
                title = f"{model}: test accuracy against {COSTS[x].split(',')[0]}"
                made = accuracy_against(whole, x, label=f"test accuracy, {what}", title=title)  # type: ignore[arg-type]
                yield title, f"accuracy-{x.replace('_', '-')}{stem}.{kind}", save(made, kind)
        if model in summary["ranks"]:
            title = f"{model}: mean ranks"
            yield title, f"ranks{stem}.{kind}", save(rank_diagram(summary["ranks"][model], title), kind)
        runs = [r for r in summary["runs"] if r["model"] == model]
        if any(r["curve"] for r in runs):
            title = f"{model}: learning curves, mean over seeds"
            yield title, f"curves{stem}.{kind}", save(learning_curves(runs, title), kind)


def _axes(wide: float, high: float, rows: int = 0, columns: int = 0) -> Any:
    """A figure that no global state of matplotlib knows, with one pair of axes or a grid of them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("pictures need matplotlib: pip install 'deltavit[plots]'") from None
    figure = Figure(figsize=(wide, high), layout="constrained")
    made: Any = figure.subplots(rows or 1, columns or 1, squeeze=False)
    for axes in made.flat:
        axes.grid(alpha=0.3)
    return figure, made if rows else made[0, 0]


def _plain(text: str) -> str:
    """A label as it is: a dollar sign starts no formula."""
    return str(text).replace("$", r"\$")
