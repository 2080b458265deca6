"""The pages that follow from the code: one for each method, which method fits which model, and the command line.

    python docs/gen.py            write docs/methods/*.md, docs/support.md and docs/cli.md
    python docs/gen.py --readme   rewrite the tables that are committed: README.md's methods and result, the contract's
                                  checks

mkdocs runs this file as a hook, so the pages are never committed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltavit
from deltavit.core import contract
from deltavit.core.edit import After, Before, Own, Rewrite
from deltavit.core.errors import MethodError
from deltavit.core.method import Method
from deltavit.core.site import Anatomy, Where
from deltavit.models import skeleton
from deltavit.report.render import percent
from deltavit.report.stats import spread

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MODELS = {"ViT-B/16": "vit_base_patch16_224", "DeiT-Tiny": "deit_tiny_patch16_224"}
COMMITTED = {"README.md": ("methods", "result"), "docs/adding-a-method.md": ("checks",)}
"""Files with generated tables, each between two comments, and the tables' names."""
RUNS = DOCS / "results" / "mini-vtab-cpu" / "runs.csv"
SHOWN = ("linear probing", "BitFit", "LoRA", "KAdaptation", "FacT-TT", "FacT-TK", "RLRR", "SSF", "VPT-deep", "Adapter",
         "partial: attention, first half", "full fine-tuning")  # fmt: skip
"""Rows of README.md's result."""


# --- what is known of a method ---------------------------------------------------------------------------------------


@functools.cache
def model(name: str) -> nn.Module:
    return skeleton(name)


@functools.cache
def planned(kind: type[Method], label: str = "ViT-B/16") -> deltavit.Plan:
    return deltavit.plan(model(MODELS[label]), kind())


def count(kind: type[Method], label: str) -> str:
    return f"{planned(kind, label).trainable_parameters:,}"


def merges(kind: type[Method]) -> str:
    return "yes" if planned(kind).mergeable else "no"


def mixes(kind: type[Method]) -> str:
    return "yes" if planned(kind).mixed_batch else "no"


def paper(kind: type[Method]) -> str:
    number = kind.paper.removeprefix("arXiv:")
    return f"[{kind.paper}](https://arxiv.org/abs/{number})" if number != kind.paper else kind.paper


def what(kind: type[Method]) -> str:
    """The title without the name that it begins with."""
    head, colon, rest = kind.title.partition(": ")
    return rest if colon else head


def source(kind: type[Method]) -> str:
    return Path(inspect.getsourcefile(kind) or "").resolve().relative_to(ROOT).as_posix()


# --- committed tables -------------------------------------------------------------------------------------------------


def table(link: str) -> str:
    """All methods; `link` is where a name leads, with {name} and {source}."""
    rows = [
        "| method | what | parameters, ViT-B/16 body | merges | mixed batch | paper |",
        "|---|---|---:|---|---|---|",
    ]
    rows += [
        f"| [`{name}`]({link.format(name=name, source=source(kind))}) | {what(kind)} "
        f"| {count(kind, 'ViT-B/16')} | {merges(kind)} | {mixes(kind)} | {paper(kind)} |"
        for name, kind in deltavit.methods().items()
    ]
    return "\n".join(rows)


def checks() -> str:
    """The contract, check by check."""
    rows = [f"| `{c.__name__}` | {' '.join((inspect.getdoc(c) or '').split())} |" for c in contract.CHECKS]
    return "\n".join(["| check | what it holds you to |", "|---|---|", *rows])


def result() -> str:
    """Test accuracy of some methods of mini-vtab: mean and standard deviation over seeds, from the runs themselves."""
    with RUNS.open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    sets = list(dict.fromkeys(run["set"] for run in runs))
    lines = [f"| method | trains | {' | '.join(sets)} |", f"|---|---:|{'---:|' * len(sets)}"]
    for method in SHOWN:
        cells = []
        for name in sets:
            own = [float(run["test"]) for run in runs if (run["method"], run["set"]) == (method, name)]
            cells.append(percent(spread(own)))
        body = next(int(run["body"]) for run in runs if run["method"] == method)
        lines.append(f"| {method} | {body:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def renewed(file: str, text: str) -> str:
    """The text of a committed file with its generated tables made anew."""
    make = {"methods": lambda: table("{source}"), "result": result, "checks": checks}
    for name in COMMITTED[file]:
        before, begin, rest = text.partition(f"<!-- {name}:begin -->")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        text = f"{before}{begin}\n{make[name]()}\n{end}{after}"
    return text


# --- one page for each method ----------------------------------------------------------------------------------------

WEIGHT, BIAS, NEW = "weight", "bias", "new module"


def parts(method: Method, vit: Anatomy, made: deltavit.Plan) -> dict[str, dict[str, set[int]]]:
    """Part of the model -> what of it changes -> in which blocks (-1 where the part is in no block)."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for edit in made:
        if isinstance(edit, Rewrite):
            part = _norm(edit.site.path, vit) if edit.site.kind == "norm" else edit.site.role
            found[part][WEIGHT].add(edit.site.block)
            if edit.change.moves_bias:
                found[part][BIAS].add(edit.site.block)
        elif isinstance(edit, Own):
            for part, block in owners(edit.name, vit):
                found[part][BIAS if edit.name.rsplit(".", 1)[-1].endswith("bias") else WEIGHT].add(block)
        elif any(True for _ in edit.module.parameters()):  # one without takes tokens out again
            found[_place(edit, vit)][NEW].add(_block(edit.path, vit))
    return found


def _place(edit: Before | After, vit: Anatomy) -> str:
    """Where a new module is, by the name of its box in the drawing."""
    if isinstance(edit, Before) and edit.into:
        return "scores"
    if edit.path in vit.blocks:
        return "new tokens" if isinstance(edit, Before) else "new block"
    if isinstance(edit, Before):
        return "values"
    branch = "attention" if edit.path in vit.attn else "the MLP"
    if getattr(edit.module, "serial", False):
        return f"after {branch}"
    return f"beside {branch}" if edit.tap is None else f"beside norm and {branch}"


def owners(name: str, vit: Anatomy) -> list[tuple[str, int]]:
    """Which parts a tensor of the backbone belongs to: q, k and v where it is the weight of a fused projection."""
    mine = [(s.role, s.block) for linears in vit.linears for s in linears.values() if name.rpartition(".")[0] == s.path]
    if mine:
        return mine
    path = name.rpartition(".")[0]
    if path in vit.norms:
        return [(_norm(path, vit), _block(path, vit))]
    return [("patch" if path == vit.patch else "tokens", -1)]


def _norm(path: str, vit: Anatomy) -> str:
    block = _block(path, vit)
    if block < 0:
        return "final norm"
    inner = [n for n in vit.norms if _block(n, vit) == block]
    return "norm1" if inner.index(path) == 0 else "norm2"


def _block(path: str, vit: Anatomy) -> int:
    return next((i for i, b in enumerate(vit.blocks) if path == b or path.startswith(b + ".")), -1)


def blocks(numbers: set[int], depth: int) -> str:
    if numbers == {-1}:
        return "outside the blocks"
    if numbers == set(range(depth)):
        return f"all {depth}"
    return ", ".join(map(str, sorted(numbers)))


def formulas(text: str) -> str:
    """`$$..$$` as MathML, which browsers draw themselves."""
    from latex2mathml.converter import convert

    def one(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(" ".join(match[1].split()), display="block")}</div>'

    return re.sub(r"\$\$(.+?)\$\$", one, text, flags=re.DOTALL)


BOXES = [  # part, x, y, width, label
    ("patch", 0, 52, 52, "patch"),
    ("tokens", 60, 52, 56, "+ pos"),
    ("norm1", 140, 52, 50, "norm1"),
    ("q", 204, 10, 34, "q"),
    ("k", 204, 52, 34, "k"),
    ("v", 204, 94, 34, "v"),
    ("attention", 252, 52, 66, "attention"),
    ("o", 332, 52, 34, "o"),
    ("norm2", 404, 52, 50, "norm2"),
    ("fc1", 468, 52, 40, "fc1"),
    ("act", 522, 52, 40, "act"),
    ("fc2", 576, 52, 40, "fc2"),
    ("final norm", 664, 52, 42, "norm"),
    ("head", 720, 52, 42, "head"),
]
ADDED = [  # the same, and how it is joined to the others; drawn only where a method puts a module there
    ("new tokens", 54, 94, 66, "new tokens", "M120 108H134V66"),
    ("scores", 248, 16, 74, "new: scores", "M285 44V52"),
    ("values", 250, 94, 72, "new: values", "M238 108H250 M322 108L332 76"),
    ("after attention", 366, 94, 36, "new", "M372 66V94 M384 94V72"),
    ("after the MLP", 606, 94, 36, "new", "M620 66V94 M632 94V72"),
    ("beside attention", 366, 94, 36, "new", "M193 66V128H358V108H366 M384 94V72"),
    ("beside the MLP", 606, 94, 36, "new", "M461 66V108H606 M632 94V72"),
    ("beside norm and the MLP", 606, 94, 36, "new", "M398 66V108H606 M632 94V72"),
    ("new block", 660, 12, 66, "new block", "M655 66V26H660 M685 40V52"),
]


def drawing(found: dict[str, dict[str, set[int]]], depth: int) -> str:
    """One block of the model, the touched parts filled: wholly, or along the bottom where only a bias is."""
    lines = [
        '<svg class="block" viewBox="-6 -14 776 158" role="img" aria-label="What the method touches in a block">',
        '<rect x="128" y="-8" width="522" height="146" rx="8" class="frame"/>',
        f'<text x="520" y="132" class="small">one of {depth} blocks</text>',
        '<path d="M52 66H60 M116 66H140 M190 66H204 M190 66L204 24 M190 66L204 108 M238 24L252 60 M238 66H252 '
        "M238 108L252 72 M318 66H332 M366 66H378 M390 66H404 M454 66H468 M508 66H522 M562 66H576 M616 66H626 "
        'M638 66H664 M706 66H720"/>',
        '<circle cx="384" cy="66" r="6"/><path d="M384 62V70 M380 66H388"/>',
        '<circle cx="632" cy="66" r="6"/><path d="M632 62V70 M628 66H636"/>',
        '<path class="skip" d="M134 66V-2H384V60 M394 66V2H632V60"/>',
    ]
    added = [box for box in ADDED if box[0] in found]
    lines += [f'<path d="{joins}"/>' for *_, joins in added]
    for part, x, y, width, label in [*BOXES, *(box[:5] for box in added)]:
        touched = found.get(part, {})
        only_bias = set(touched) == {BIAS}
        kind = "head" if part == "head" else "trained" if touched and not only_bias else "plain"
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="28" rx="4" class="{kind}"/>')
        if only_bias:
            lines.append(f'<rect x="{x}" y="{y + 20}" width="{width}" height="8" rx="3" class="trained"/>')
        style = ' class="on"' if kind == "trained" else ""
        lines.append(f'<text x="{x + width / 2:g}" y="{y + 17}"{style}>{label}</text>')
    return '<div class="drawing">' + "".join([*lines, "</svg>"]) + "</div>"


def _default(value: Any) -> str:
    return f"roles {', '.join(value.roles)}; all blocks" if isinstance(value, Where) else f"`{value!r}`"


def _kind(field: dataclasses.Field[Any]) -> str:
    text = field.type if isinstance(field.type, str) else field.type.__name__
    return text.replace("|", "\\|")


def page(name: str, kind: type[Method]) -> str:
    """A method in Markdown: what its docstring says, and what follows from its plan."""
    vit = deltavit.anatomy(model(MODELS["ViT-B/16"]))
    method = kind()
    made = planned(kind)
    found = parts(method, vit, made)
    depth = len(vit.blocks)
    text = (inspect.getdoc(kind) or "").partition("\n")[2].strip()
    rows = [
        f"| {part} | {', '.join(sorted(kinds, reverse=True))} | {blocks(set().union(*kinds.values()), depth)} |"
        for part, kinds in sorted(found.items(), key=lambda item: _order(item[0]))
    ]
    of_matrices = any(isinstance(edit, (Rewrite, Own)) for edit in made)
    fields = [
        f"| `method.{f.name}` | {_kind(f)} "
        f"| {'all blocks' if f.name == 'where' and not of_matrices else _default(getattr(method, f.name))} |"
        for f in dataclasses.fields(method)  # type: ignore[arg-type]
    ]
    out = [
        f"# {kind.title.partition(': ')[0]}",
        f"`{name}` · {what(kind)} · paper: {paper(kind)} · merges: {merges(kind)} · mixed batch: {mixes(kind)}",
        formulas(text),
        "## Where it acts",
        drawing(found, depth),
        "Filled: trained, rewritten by a trained change, or a new module. A strip at the bottom: only the bias. "
        "The head (dashed) trains with every method and is counted apart.",
    ]
    if rows:
        head = ["On ViT-B/16, with default options:", "", "| part | what | blocks |", "|---|---|---|"]
        out.append("\n".join([*head, *rows]))
    out += [
        "## What trains",
        "\n".join(["| model | body |", "|---|---:|", *(f"| {m} | {count(kind, m)} |" for m in MODELS)]),
        "Shared factors count once; `deltavit plan` counts any other model or setting.",
        "## Options",
        "\n".join(["| option | type | default |", "|---|---|---|", *fields]) if fields else "None.",
    ]
    names = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    if "where" in names and of_matrices:
        out.append("`method.where.roles` and `method.where.blocks` choose the sites, for instance "
                   f"`{chosen(method)}` for the last block alone.")  # fmt: skip
    elif "where" in names:
        out.append("`method.where.blocks` chooses the blocks, for instance `method.where.blocks=0` for the first one "
                   "alone; roles have no meaning here.")  # fmt: skip
    rank = " method.rank=4" if "rank" in names else ""
    out += [
        "## Use",
        f"```shell\ndeltavit plan --model vit_base_patch16_224 --method {name}{rank}\n"
        f"deltavit train --data flowers/ --model vit_base_patch16_224.augreg_in21k --method {name}{rank}\n```",
        f"Source: `{source(kind)}`, class `{kind.__name__}`.",
    ]
    return "\n\n".join(out) + "\n"


def chosen(method: Method) -> str:
    """Two of the roles that the method acts on by default, in the last block, as in the shell."""
    roles = ",".join(f'"{role}"' for role in method.where.roles[-2:])  # type: ignore[attr-defined]
    return f"method.where.roles='[{roles}]' method.where.blocks=-1"


def _order(part: str) -> int:
    names = [box[0] for box in [*BOXES, *ADDED]]
    return names.index(part) if part in names else len(names)


def index() -> str:
    return (
        "\n\n".join(
            [
                "# Methods",
                'Each is a frozen dataclass whose fields are its options, so `deltavit.method("lora", rank=16)`, '
                "`--method lora method.rank=16` and `[method]` in a recipe build the same object. "
                "The counts are of the body with default options; a head of `C` classes adds `C (D + 1)`.",
                table("{name}.md"),
                "*Merges*: the change can be written into the base's own weights. *Mixed batch*: all of the change "
                "acts on activations, so each picture of a batch could have an adapter of its own; it says what a "
                "method allows, and deltavit itself runs a whole batch with the same adapters.",
                "`deltavit methods --model NAME` counts on any other model; "
                "[which method fits which model](../support.md) is a page of its own. Where a paper and its released "
                "code differ, the method's page says which one this is. Several methods can be "
                "[composed](../composition.md).",
            ]
        )
        + "\n"
    )


# --- which method fits which model -----------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, str | tuple[str, str, dict[str, Any]]]] = {
    "timm": {
        "ViT": "vit_base_patch16_224",
        "DeiT III": "deit3_base_patch16_224",
        "DINOv2": "vit_base_patch14_reg4_dinov2",
        "CLIP": "vit_base_patch16_clip_224",
        "SigLIP": "vit_base_patch16_siglip_224",
        "BEiT": "beit_base_patch16_224",
        "EVA": "eva_large_patch14_196",
        "EVA-02": "eva02_base_patch14_224",
        "Swin": "swin_tiny_patch4_window7_224",
        "Swin V2": "swinv2_tiny_window8_256",
    },
    "torchvision and open_clip": {
        "torchvision ViT": "torchvision:vit_b_16",
        "torchvision Swin": "torchvision:swin_t",
        "torchvision Swin V2": "torchvision:swin_v2_t",
        "open_clip CLIP": "open_clip:ViT-B-32",
    },
    "Hugging Face transformers": {
        "ViT": ("ViTConfig", "ViTModel", {}),
        "DINOv2": ("Dinov2Config", "Dinov2Model", {}),
        "DINOv3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}),
        "BEiT": ("BeitConfig", "BeitModel", {"use_relative_position_bias": True}),
        "CLIP": ("CLIPVisionConfig", "CLIPVisionModel", {}),
        "SigLIP": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    },
}
"""Column -> what it is built from: a name for `load_model`, or a configuration and a model of transformers."""


def built(made_of: str | tuple[str, str, dict[str, Any]]) -> nn.Module:
    """A whole model of full size, without weights."""
    if isinstance(made_of, str):
        return skeleton(made_of)
    import transformers

    config, kind, options = made_of
    with torch.device("meta"):
        return deltavit.load_model(getattr(transformers, kind)(getattr(transformers, config)(**options)))


def reason(refusal: MethodError, method: str, vit: Anatomy) -> str:
    """Why a method refuses a model, in words that do for any model of the kind."""
    text = str(refusal).replace(vit.attn[0], "its attention").replace(vit.name, "the model")
    return re.sub(rf"^{method} (on the model: )?", "", text)


def support() -> str:
    """Every method on every family: the count of the body, or the number of the reason why not."""
    users: dict[str, set[str]] = defaultdict(set)
    tables = []
    for library, columns in FAMILIES.items():
        cells: dict[str, list[str]] = {name: [] for name in deltavit.methods()}
        for made_of in columns.values():
            model = built(made_of)
            for name, kind in deltavit.methods().items():
                try:
                    cells[name].append(f"{deltavit.plan(model, kind()).trainable_parameters:,}")
                except MethodError as refusal:
                    why = reason(refusal, name, deltavit.anatomy(model))
                    users[why].add(name)
                    cells[name].append(f"no ({list(users).index(why) + 1})")
        tables.append("\n".join([
            f"## {library}\n",
            f"| method | {' | '.join(columns)} |",
            f"|---|{'---:|' * len(columns)}",
            *(f"| [`{name}`](methods/{name}.md) | {' | '.join(row)} |" for name, row in cells.items()),
        ]))  # fmt: skip
    sources = [
        f"| {library} | {column} | {'`' + made_of + '`' if isinstance(made_of, str) else _from_config(*made_of)} |"
        for library, columns in FAMILIES.items()
        for column, made_of in columns.items()
    ]
    reasons = [f"{i}. {', '.join(f'`{n}`' for n in sorted(users[why]))}: {why}" for i, why in enumerate(users, 1)]
    return "\n\n".join([
        "# Which method fits which model",
        "Made from the code: `deltavit.plan` of every method with its default options, on whole models of the usual "
        "sizes without weights. A number is what trains in the body, the head apart; *no* has its reason [below]"
        "(#reasons). The tests run the [contract](adding-a-method.md#the-contract) of every method on small models of "
        "these families. [Models](models.md) says how each is loaded.",
        *tables,
        "## Reasons",
        "\n".join(reasons),
        "Where the reason lies in a role, the others may do: `fact-tt` takes EVA-02 with "
        "`method.where.roles='[\"q\",\"k\",\"v\",\"o\"]'`. `deltavit plan` tries any setting on any model in a moment.",
        "## The models",
        "\n".join(["| library | column | built from |", "|---|---|---|", *sources]),
    ]) + "\n"  # fmt: skip


def _from_config(config: str, kind: str, options: dict[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"`{kind}({config}({given}))`"


# --- the command line ------------------------------------------------------------------------------------------------


def cli() -> str:
    """Every command with its arguments and flags, as typer knows them."""
    import typer

    from deltavit.cli import app

    root = typer.main.get_command(app)
    out = [
        "# Command line",
        "Results go to standard output, messages and progress to standard error. With `--json` the last line of "
        "standard output is one JSON object. What deltavit refuses is one line and exit code 1; a run stopped with "
        "Ctrl-C leaves a checkpoint, says how to continue, and exits with 130.",
        "There is no flag for a single method: its options go as `method.KEY=VALUE`, and any other key of a "
        "[recipe](recipes.md) can be changed the same way, as in `train.weight_decay=0.01`.",
    ]
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        text, _, example = inspect.cleandoc(command.help or "").partition("\n\n")
        rows = []
        for p in command.params:
            if "--help" in p.opts:
                continue
            names = [*p.opts, *p.secondary_opts] if p.param_type_name == "option" else [p.name.upper()]
            flag = ", ".join(f"`{one}`" for one in names)
            default = "required" if p.required else "" if p.default in (None, False, ()) else f"`{_plain(p.default)}`"
            what_for = " ".join((getattr(p, "help", None) or "").split())
            rows.append(f"| {flag} | {what_for} | {default} |".replace("[", "\\["))
        out += [f"## {name}", " ".join(text.split())]
        if example:
            out.append(f"```shell\n{' '.join(example.split())}\n```")
        out.append("\n".join(["| flag | what | default |", "|---|---|---|", *rows]))
    return "\n\n".join(out) + "\n"


def _plain(value: object) -> str:
    return "--test" if value is True else str(value)


# --- writing ---------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown of every generated page."""
    return {
        "methods/index.md": index(),
        **{f"methods/{name}.md": page(name, kind) for name, kind in deltavit.methods().items()},
        "support.md": support(),
        "cli.md": cli(),
    }


def write(folder: Path) -> None:
    """Write the pages; one that is the same stays untouched, so that `mkdocs serve` does not chase itself."""
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_config(config: Any) -> Any:
    """mkdocs: write the pages, and put every method into the navigation."""
    write(Path(config.docs_dir))
    methods = ["methods/index.md", *({name: f"methods/{name}.md"} for name in deltavit.methods())]
    notes = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    found = {
        "Methods": methods,
        "Decisions": ["decisions/index.md", *(f"decisions/{note}" for note in notes)],
        "Results": ["results.md", *(f"results/{path.name}" for path, _ in results())],
    }
    for entry in config.nav:
        entry |= {title: pages for title, pages in found.items() if title in entry}
    return config


def on_page_markdown(markdown: str, page: Any, **more: Any) -> str:
    """mkdocs: list the results that are there."""
    lines = [f"- [{title}](results/{path.name})" for path, title in results()]
    return markdown.replace("<!-- results -->", "\n".join(lines) or "None is in this checkout.")


def results() -> list[tuple[Path, str]]:
    """The pages of docs/results and their titles; tables that a page includes have none."""
    pages = [(path, path.read_text(encoding="utf-8")) for path in sorted((DOCS / "results").glob("*.md"))]
    return [(path, text.splitlines()[0][2:]) for path, text in pages if text.startswith("# ")]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--readme", action="store_true", help="rewrite the tables that are committed")
    if flags.parse_args().readme:
        for file in COMMITTED:
            path = ROOT / file
            path.write_text(renewed(file, path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        write(DOCS)


if __name__ == "__main__":
    sys.exit(main())
