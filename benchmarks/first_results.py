"""The first real comparison: one pretrained ViT, several image sets, six methods, learning rates chosen on val.

    python benchmarks/first_results.py --data DATA --weights deit_tiny_patch16_224.safetensors --out OUT
    python benchmarks/first_results.py --report OUT --to docs/results

DATA holds a folder for each set (train/val/test of class folders).  Protocol: on the first set, each method's learning
rate is chosen from its grid by val accuracy with seed 0, the head's rate being the one chosen for linear probing; these
rates then serve every set.  The final runs train on train, as the search did; the test split is read once a run, after
the last epoch.  Every run is a JSON record, written whole or not at all, so the script can be stopped and started.
"""

from __future__ import annotations

import argparse
import json
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

METHODS: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "linear probing": ("linear", {}, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "BitFit": ("bitfit", {}, [3e-4, 1e-3, 3e-3, 1e-2]),
    "LoRA r8": ("lora", {"rank": 8}, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
    "Kronecker Adaptation": ("kadaptation", {"n": 4, "rank": 1}, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    "FacT-TT r16": ("fact-tt", {"rank": 16}, [1e-3, 3e-3, 1e-2, 3e-2]),
    "full fine-tuning": ("full", {}, [3e-5, 1e-4, 3e-4, 1e-3]),
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
    flags.add_argument("--out", type=Path)
    flags.add_argument("--report", type=Path)
    flags.add_argument("--to", type=Path, default=Path("docs/results"))
    chosen = flags.parse_args()
    if chosen.report:
        report(chosen.report, chosen.to)
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

    def one(name: str, method: str, lr: float, head_lr: float, seed: int, final: bool) -> dict[str, Any]:
        key = f"{'final' if final else 'search'}-{name}-{method.replace(' ', '_')}-{lr:g}-{seed}"
        path = chosen.out / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        registered, options, _ = METHODS[method]
        train, val = split(name, "train"), split(name, "val")
        adapter = deltavit.attach(
            model, deltavit.method(registered, **options), classes=images[name].classes, seed=seed
        )
        training = Training(
            epochs=chosen.epochs, batch_size=chosen.batch, lr=lr, head_lr=head_lr, seed=seed, augment=chosen.augment
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
            "image_size": pre.size, "epochs": chosen.epochs, "batch": chosen.batch, "augment": chosen.augment,
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

    rates: dict[str, float] = {}
    for method, (_, _, grid) in METHODS.items():
        head = [rates["linear probing"]] * len(grid) if rates else grid
        tried: list[dict[str, Any]] = []
        for lr, h in zip(grid, head, strict=True):  # rising; past its best by 5 points, a method only gets worse
            tried.append(one(sets[0], method, lr, h, 0, False))
            if tried[-1]["val"] < max(r["val"] for r in tried) - 0.05:
                break
        rates[method] = max(tried, key=lambda r: r["val"])["lr"]
    print("chosen on val:", rates, flush=True)
    for seed in range(max(seeds.values())):
        for name in sets:
            for method in METHODS:
                if seed < seeds[name]:
                    one(name, method, rates[method], rates["linear probing"], seed, True)


def report(records: Path, to: Path) -> None:
    """The tables in first.md, the picture, and all runs in one file, as a pure function of the records."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    finals = [r for r in rows if r["final"]]
    sets = [s for s in ("cifar100", "caltech99", "sign_digits", "omniglot8") if any(r["set"] == s for r in finals)]
    lines = [
        "| method | trains (body) | learning rate | " + " | ".join(sets) + " | seconds a run |",
        "|---|---:|---:|" + "---:|" * len(sets) + "---:|",
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
            f"| {method} | {mine[0]['body']:,} | {mine[0]['lr']:g} | " + " | ".join(cells)
            + f" | {statistics.median(seconds):.0f} ({min(seconds):.0f}-{max(seconds):.0f}) |"
        )  # fmt: skip
    to.mkdir(parents=True, exist_ok=True)
    search = ["| method | learning rate | val accuracy |", "|---|---:|---:|"]
    search += [
        f"| {r['method']} | {r['lr']:g} | {100 * r['val']:.1f} |"
        for r in sorted((r for r in rows if not r["final"]), key=lambda r: (list(METHODS).index(r["method"]), r["lr"]))
    ]
    page = to / "first.md"
    text = page.read_text() if page.exists() else "# First results\n\n" + "".join(map(_block, ("results", "search")))
    for name, table in (("results", lines), ("search", search)):
        before, begin, rest = text.partition(f"<!-- {name}:begin -->")
        text = before + begin + "\n" + "\n".join(table) + "\n" + rest[rest.index(f"<!-- {name}:end -->") :]
    page.write_text(text)
    keep = ("set", "method", "registered", "options", "lr", "head_lr", "seed", "final", "body", "head", "val", "test",
            "loss", "seconds")  # fmt: skip
    common = {k: rows[0][k] for k in rows[0] if k not in keep and k != "data"}
    (to / "first-records.json").write_text(
        json.dumps({"common": common, "runs": [{k: r[k] for k in keep} for r in rows]}, indent=1) + "\n"
    )
    (to / "recipes").mkdir(exist_ok=True)
    for r in {r["method"]: r for r in finals}.values():
        train = {k: common[k] for k in ("epochs", "augment")} | {"batch_size": common["batch"]}
        recipe = read_recipe(
            None,
            model={"name": common["model"], "weights": "deit_tiny_patch16_224.safetensors",
                   "image_size": common["image_size"]},
            method={"name": r["registered"], **r["options"]},
            data={"path": "cifar100"},
            train={**train, "lr": r["lr"], "head_lr": r["head_lr"]},
        )  # fmt: skip
        (to / "recipes" / f"first-{r['registered']}.toml").write_text(recipe.toml())
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, body, mean, spread in picture:
        axes.errorbar(body, mean, spread, marker="o", capsize=3, linestyle="none", label=method)
    axes.set_xscale("symlog", linthresh=3000)
    axes.set_xticks([0, 1e4, 1e5, 1e6, 1e7])
    axes.legend(loc="lower right")
    axes.set(
        xlabel="trainable parameters without the head",
        ylabel=f"{sets[0]} test accuracy, %",
        title=f"{common['model']}, {common['image_size']} px, {common['epochs']} epochs, 800 training images",
    )
    axes.grid(alpha=0.3)
    figure.savefig(to / "first-picture.png", dpi=130)
    print("\n".join(lines))


def _block(name: str) -> str:
    return f"<!-- {name}:begin -->\n<!-- {name}:end -->\n\n"


if __name__ == "__main__":
    main()
