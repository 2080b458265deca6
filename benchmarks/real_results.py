"""A real comparison: one pretrained ViT, real image sets, many methods, learning rate and scale chosen on val.

    python benchmarks/real_results.py --data DATA --weights deit_tiny_patch16_224.safetensors --out OUT
    python benchmarks/real_results.py --report OUT --name methods --to docs/results

DATA holds a folder for each set (train/val/test of class folders).  Protocol: on the first set, each method's learning
rate is chosen from its grid by val accuracy with seed 0, the head's rate being the one chosen for linear probing; then
its scale, where it has a grid of those, at that rate.  These serve every set.  The final runs train on train, as the
search did; the test split is read once a run, after the last epoch.  Every run is a JSON record, written whole or not
at all, so the script can be stopped and started, and several of them can share OUT with --methods.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import deltavit
from deltavit import Images, Training
from deltavit.train.recipe import read_recipe

STEPS = [1e-3, 3e-3, 1e-2]
COPIED = [1e-4, 3e-4, 1e-3]
"""Grids of methods with small new parts, and of those that train the model's own matrices."""
PARTIAL = [
    "attention",
    "ffn",
    *(f"{part}-{half}" for part in ("attention", "ffn", "both") for half in ("first", "last")),
]
METHODS: dict[str, tuple[str, dict[str, Any], list[float], list[float]]] = {
    "linear probing": ("linear", {}, [1e-4, 3e-4, *STEPS], []),
    "BitFit": ("bitfit", {}, [3e-4, *STEPS], []),
    "LoRA r8": ("lora", {"rank": 8}, [3e-4, *STEPS, 3e-2], []),
    "Kronecker Adaptation": ("kadaptation", {"n": 4, "rank": 1}, [*STEPS, 3e-2, 1e-1], []),
    "FacT-TT r16": ("fact-tt", {"rank": 16}, [*STEPS, 3e-2], []),
    "full fine-tuning": ("full", {}, [3e-5, *COPIED], []),
    "FacT-TT r4 (8K)": ("fact-tt", {"rank": 4}, [3e-3, 1e-2, 3e-2], [0.1, 10.0]),
    "FacT-TK r16": ("fact-tk", {"rank": 16}, [3e-3, 1e-2, 3e-2], [0.1, 10.0]),
    "RLRR": ("rlrr", {}, STEPS, []),
    "LayerNorm": ("layernorm", {}, STEPS, []),
    "attention": ("attention", {}, COPIED, []),
    "LoRA-Fix r8": ("lora-fix", {"rank": 8}, [3e-3, 1e-2, 3e-2], [0.1, 10.0]),
    "Houlsby adapter r8": ("houlsby", {"rank": 8}, STEPS, []),
    "Pfeiffer adapter r8": ("pfeiffer", {"rank": 8}, STEPS, []),
    "AdapterDrop r64": ("adapterdrop", {"rank": 64}, STEPS, []),
    "Compacter": ("compacter", {}, [3e-3, 1e-2, 3e-2], []),
    "Transformer-probing": ("transformer-probing", {}, COPIED, []),
    "LePE": ("lepe", {}, STEPS, []),
    "RPB": ("rpb", {}, [3e-3, 1e-2, 3e-2], []),
    "VPT-deep": ("vpt-deep", {"tokens": 10}, [3e-3, 1e-2, 3e-2], []),
    "SSF": ("ssf", {}, STEPS, []),
    "AdaptFormer r64": ("adaptformer", {"rank": 64}, STEPS, [0.01, 1.0]),
    "Convpass h8": ("convpass", {"rank": 8}, STEPS, [0.1, 10.0]),
    # the rate that attention tuning and full fine-tuning both chose
    **{f"partial {s}": ("partial", {"strategy": s}, [1e-4], []) for s in PARTIAL},
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=Path)
    flags.add_argument("--weights")
    flags.add_argument("--model", default="deit_tiny_patch16_224")
    flags.add_argument("--sets", default="cifar100,caltech99,sign_digits,omniglot8")
    flags.add_argument("--seeds", default="3,1,1,1", help="seeds of each set")
    flags.add_argument("--image-size", type=int, default=112)
    flags.add_argument("--epochs", type=int, default=10)
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--augment", default="none")
    flags.add_argument("--search-epochs", type=int, help="epochs of a run of the search; else as many as the final")
    flags.add_argument("--methods", help="comma-separated; else all")
    flags.add_argument("--out", type=Path)
    flags.add_argument("--report", type=Path)
    flags.add_argument("--name", default="methods", help="of the page in --to")
    flags.add_argument("--to", type=Path, default=Path("docs/results"))
    chosen = flags.parse_args()
    if chosen.report:
        report(chosen.report, chosen.to, chosen.name)
    else:
        measure(chosen)


def measure(chosen: argparse.Namespace) -> None:
    chosen.out.mkdir(parents=True, exist_ok=True)
    sets = chosen.sets.split(",")
    seeds = dict(zip(sets, map(int, chosen.seeds.split(",")), strict=True))
    model = deltavit.load_model(chosen.model, chosen.weights, image_size=chosen.image_size)
    pre = deltavit.anatomy(model).preprocessing
    images: dict[str, Any] = {}

    def split(name: str, part: str) -> Images:
        if name not in images:
            images[name] = deltavit.open_data(chosen.data / name)
        if (name, part) not in images:
            images[name, part] = Images(getattr(images[name], part), pre)
        return images[name, part]  # type: ignore[no-any-return]

    def one(
        name: str, method: str, lr: float, head_lr: float, seed: int, final: bool, scale: float | None
    ) -> dict[str, Any]:
        scaled = "" if scale is None else f"-s{scale:g}"
        key = f"{'final' if final else 'search'}-{name}-{method.replace(' ', '_')}-{lr:g}{scaled}-{seed}"
        path = chosen.out / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        registered, options, *_ = METHODS[method]
        options = options if scale is None else {**options, "scale": scale}
        epochs = chosen.epochs if final else chosen.search_epochs or chosen.epochs
        train, val = split(name, "train"), split(name, "val")
        adapter = deltavit.attach(
            model, deltavit.method(registered, **options), classes=images[name].classes, seed=seed
        )
        training = Training(
            epochs=epochs, batch_size=chosen.batch, lr=lr, head_lr=head_lr, seed=seed, augment=chosen.augment
        )
        began = time.monotonic()
        losses = [step.loss for step in deltavit.fit(model, adapter, train, None, training)]
        seconds = time.monotonic() - began
        record = {
            "set": name, "method": method, "registered": registered, "options": options, "lr": lr, "head_lr": head_lr,
            "seed": seed, "final": final, "body": adapter.trainable_parameters, "head": adapter.head_size,
            "val": deltavit.evaluate(model, val).accuracy,
            "test": deltavit.evaluate(model, split(name, "test")).accuracy if final else None,
            "loss": statistics.mean(losses[-5:]), "seconds": seconds, "model": chosen.model,
            "image_size": pre.size, "epochs": epochs, "batch": chosen.batch, "augment": chosen.augment,
            "fingerprint": deltavit.anatomy(model).fingerprint, "preprocessing": vars(pre),
            "torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads(),
            "python": platform.python_version(), "data": images[name].train.digest,
        }  # fmt: skip
        adapter.detach()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, path)
        print(
            f"{key}  val {record['val']:.3f}  test {record['test']}  loss {record['loss']:.3f}  {seconds:.0f} s",
            flush=True,
        )
        return record

    wanted = chosen.methods.split(",") if chosen.methods else list(METHODS)
    head_lr: float | None = None
    for method in dict.fromkeys(["linear probing", *wanted]):
        _, _, grid, scales = METHODS[method]
        tried: list[dict[str, Any]] = []
        rate, scale = grid[0], None
        if len(grid) > 1:  # else the rate is given
            for lr in grid:  # rising; past its best by 5 points, a method only gets worse
                tried.append(one(sets[0], method, lr, head_lr or lr, 0, False, None))
                if tried[-1]["val"] < max(r["val"] for r in tried) - 0.05:
                    break
            rate = max(tried, key=lambda r: r["val"])["lr"]
            # on beyond an end that is the best, as long as no more runs are made than the grid has steps and one
            while 1 < len(tried) <= len(grid) and rate in (ends := sorted(r["lr"] for r in tried))[:: len(tried) - 1]:
                lr = _next(rate, rate == ends[-1])
                tried.append(one(sets[0], method, lr, head_lr or lr, 0, False, None))
                rate = max(tried, key=lambda r: r["val"])["lr"]
            tried += [one(sets[0], method, rate, head_lr or rate, 0, False, scale) for scale in scales]
            scale = max(tried, key=lambda r: r["val"])["options"].get("scale")
        head_lr = head_lr or rate
        print(f"{method}: chosen on val: learning rate {rate:g}, scale {scale or 'as it is'}", flush=True)
        for name in sets:
            for seed in range(seeds[name] if method in wanted else 0):
                one(name, method, rate, head_lr, seed, True, scale)


def _next(lr: float, up: bool) -> float:
    """The neighbour of a rate on the grid 1, 3, 10, 30, .."""
    digit = round(lr / 10 ** math.floor(math.log10(lr)))
    return float(f"{lr * ((3 if digit == 1 else 10 / 3) if up else (1 / 3 if digit == 3 else 0.3)):.0e}")


def report(records: Path, to: Path, stem: str) -> None:
    """The tables in first.md, the picture, and all runs in one file, as a pure function of the records."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    finals = [r for r in rows if r["final"]]
    sets = [s for s in ("cifar100", "caltech99", "sign_digits", "omniglot8") if any(r["set"] == s for r in finals)]
    lines = [
        "| method | trains (body) | learning rate | scale | " + " | ".join(sets) + " | seconds a run |",
        "|---|---:|---:|---:|" + "---:|" * len(sets) + "---:|",
    ]
    picture: list[tuple[str, int, float, float]] = []
    for method in METHODS:
        mine = [r for r in finals if r["method"] == method]
        if not mine:
            continue
        cells = []
        for name in sets:
            scores = [100 * r["test"] for r in mine if r["set"] == name]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread}" if scores else "-")
        first = [100 * r["test"] for r in mine if r["set"] == sets[0]]
        picture.append(
            (method, mine[0]["body"], statistics.mean(first), statistics.stdev(first) if len(first) > 1 else 0)
        )
        seconds = [r["seconds"] for r in mine]
        lines.append(
            f"| {method} | {mine[0]['body']:,} | {mine[0]['lr']:g} | {_scale(mine[0])} | " + " | ".join(cells)
            + f" | {statistics.median(seconds):.0f} ({min(seconds):.0f}-{max(seconds):.0f}) |"
        )  # fmt: skip
    to.mkdir(parents=True, exist_ok=True)
    search = ["| method | learning rate | scale | epochs | val accuracy |", "|---|---:|---:|---:|---:|"]
    search += [
        f"| {r['method']} | {r['lr']:g} | {_scale(r)} | {r['epochs']} | {100 * r['val']:.1f} |"
        for r in sorted((r for r in rows if not r["final"]), key=lambda r: (list(METHODS).index(r["method"]), r["lr"]))
    ]
    page = to / f"{stem}.md"
    text = page.read_text() if page.exists() else "# Results\n\n" + "".join(map(_block, ("results", "search")))
    for name, table in (("results", lines), ("search", search)):
        before, begin, rest = text.partition(f"<!-- {name}:begin -->")
        text = before + begin + "\n" + "\n".join(table) + "\n" + rest[rest.index(f"<!-- {name}:end -->") :]
    page.write_text(text)
    keep = ("set", "method", "registered", "options", "lr", "head_lr", "seed", "final", "body", "head", "val", "test",
            "loss", "seconds", "epochs")  # fmt: skip
    common = {k: rows[0][k] for k in rows[0] if k not in keep and k != "data"}
    (to / f"{stem}-records.json").write_text(
        json.dumps({"common": common, "runs": [{k: r[k] for k in keep} for r in rows]}, indent=1) + "\n"
    )
    (to / "recipes").mkdir(exist_ok=True)
    for r in {r["method"]: r for r in finals}.values():
        train = {"epochs": r["epochs"], "augment": common["augment"], "batch_size": common["batch"]}
        recipe = read_recipe(
            None,
            model={"name": common["model"], "weights": "deit_tiny_patch16_224.safetensors",
                   "image_size": common["image_size"]},
            method={"name": r["registered"], **r["options"]},
            data={"path": "cifar100"},
            train={**train, "lr": r["lr"], "head_lr": r["head_lr"]},
        )  # fmt: skip
        (
            to / "recipes" / f"{stem}-{r['method'].replace(' ', '-').replace('(', '').replace(')', '').lower()}.toml"
        ).write_text(recipe.toml())
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = finals[0]["epochs"]
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for i, (method, body, mean, spread) in enumerate(picture):
        axes.errorbar(body, mean, spread, marker="o^sDv"[i // 10], capsize=3, linestyle="none", label=method)
    axes.set_xscale("symlog", linthresh=3000)
    axes.set_xticks([0, 1e4, 1e5, 1e6, 1e7])
    figure.legend(loc="outside right upper", fontsize="small")
    axes.set(
        xlabel="trainable parameters without the head",
        ylabel=f"{sets[0]} test accuracy, %",
        title=f"{common['model']}, {common['image_size']} px, {epochs} epochs, 800 training images",
    )
    axes.grid(alpha=0.3)
    figure.savefig(to / f"{stem}-picture.png", dpi=130)
    print("\n".join(lines))


def _scale(record: dict[str, Any]) -> str:
    scale = getattr(deltavit.method(record["registered"], **record["options"]), "scale", None)
    return "-" if scale is None else f"{scale:g}"


def _block(name: str) -> str:
    return f"<!-- {name}:begin -->\n<!-- {name}:end -->\n\n"


if __name__ == "__main__":
    main()
