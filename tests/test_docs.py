"""What the documents say is so: versions, tables, code, commands, recipes, links."""

import contextlib
import importlib.util
import io
import itertools
import re
import shlex
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import deltavit
from deltavit.bench import read_suite
from deltavit.cli import app
from deltavit.core.errors import MethodError
from deltavit.train.recipe import DataSection, ModelSection, read_recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
GENERATED = {
    DOCS / "cli.md",
    DOCS / "support.md",
    *(DOCS / "methods" / f"{m}.md" for m in ["index", *deltavit.methods()]),
}
WRITTEN = [p for p in PAGES if p not in GENERATED]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOMLS = sorted((ROOT / "recipes").glob("*.toml"))
RECIPES = [path for path in TOMLS if "[[methods]]" not in path.read_text("utf-8")]
"""Of one run; the others are suites, which tests/test_suite.py reads."""
RUN = [
    "README.md",
    "docs/concepts.md",
    "docs/quickstart.md",
    "docs/data.md",
    "docs/training.md",
    "docs/adapter-file.md",
    "docs/models.md",
    "docs/composition.md",
    "docs/interop.md",
]


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, *languages):
    return [text for language, text in FENCE.findall(path.read_text("utf-8")) if language in languages]


@pytest.fixture(scope="module")
def gen():
    spec = importlib.util.spec_from_file_location("gen", DOCS / "gen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(gen):
    pytest.importorskip("latex2mathml", reason="formulas need the docs extra")
    return gen.pages()


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A folder of pictures where the documents have theirs."""
    random = np.random.default_rng(0)
    for folder in ("digits", "demo-out/digits"):
        for split, count in (("train", 4), ("val", 2), ("test", 2)):
            for label in range(4):
                for i in range(count):
                    path = tmp_path / folder / split / str(label) / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- versions and tables ---------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    released = re.findall(
        r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert deltavit.__version__ == project["version"] == released[0]


@pytest.mark.parametrize("file", ["README.md", "docs/adding-a-method.md"])
def test_a_committed_table_is_current(gen, file):
    text = (ROOT / file).read_text("utf-8")
    assert gen.renewed(file, text) == text, "run: python docs/gen.py --readme"


def test_every_method_has_a_page_with_its_drawing_and_formula(pages):
    for method, kind in deltavit.methods().items():
        text = pages[f"methods/{method}.md"]
        assert "<svg" in text
        assert "$$" not in text
        assert text.count("<math") == (kind.__doc__ or "").count("$$") // 2
        for field in fields(kind):
            assert f"`method.{field.name}`" in text


def test_a_drawing_marks_what_the_plan_touches(gen):
    vit = deltavit.anatomy(gen.model("vit_base_patch16_224"))

    def touched(method, **options):
        made = deltavit.plan(gen.model("vit_base_patch16_224"), deltavit.method(method, **options))
        return {part: set(kinds) for part, kinds in gen.parts(made.method, vit, made).items()}

    assert touched("lora") == {"q": {"weight"}, "v": {"weight"}}
    assert touched("kadaptation", bias=True) == {"q": {"weight", "bias"}, "v": {"weight", "bias"}}
    assert touched("houlsby") == {"after attention": {"new module"}, "after the MLP": {"new module"}}
    assert touched("convpass", which="attn") == {"beside attention": {"new module"}}
    assert touched("adaptformer") == {"beside norm and the MLP": {"new module"}}
    assert touched("vpt-deep") == {"new tokens": {"new module"}}
    assert touched("lepe") == {"values": {"new module"}}
    assert touched("rpb") == {"scores": {"new module"}}
    assert touched("transformer-probing") == {"new block": {"new module"}}
    assert touched("layernorm", which="final") == {"final norm": {"weight", "bias"}}
    assert touched("bitfit", which="linear") == {r: {"bias"} for r in ("q", "k", "v", "o", "fc1", "fc2")}
    assert set(touched("full")) == {
        "patch", "tokens", "norm1", "q", "k", "v", "o", "norm2", "fc1", "fc2", "final norm",
    }  # fmt: skip


def test_no_box_of_a_drawing_hides_another(gen):
    for added in gen.ADDED:
        part, x, y, width = added[:4]
        for other, left, top, across, _ in gen.BOXES:
            assert x + width <= left or left + across <= x or y + 28 <= top or top + 28 <= y, (part, other)


def test_every_method_is_in_the_drawings_vocabulary(gen):
    vit = deltavit.anatomy(gen.model("vit_base_patch16_224"))
    boxes = {box[0] for box in [*gen.BOXES, *gen.ADDED]}
    for kind in deltavit.methods().values():
        assert set(gen.parts(kind(), vit, gen.planned(kind))) <= boxes, kind.name


def test_the_choice_of_sites_on_a_methods_page_works(pages):
    for method in deltavit.methods():
        for text in re.findall(r"for instance `(method\.where[^`]*)`", pages[f"methods/{method}.md"]):
            chosen = read_recipe(None, shlex.split(text), method={"name": method}).build_method()
            assert deltavit.plan(deltavit.models.skeleton("vit_base_patch16_224"), chosen).trainable_parameters, text


def test_the_support_page_has_every_method_and_a_reason_for_each_no(pages):
    text = pages["support.md"]
    for method in deltavit.methods():
        assert text.count(f"| [`{method}`]") == 3  # one table a library, and one for the two small ones
    said = {int(n) for n in re.findall(r"no \((\d+)\)", text)}
    assert said == {int(n) for n in re.findall(r"^(\d+)\. `", text, re.MULTILINE)}
    assert re.search(r"`vpt-deep`.*no \(\d+\) \|$", text, re.MULTILINE)
    assert "vit_base" not in text.partition("## Reasons")[2].partition("## The models")[0]


def test_the_readme_says_how_many_methods_there_are():
    assert re.findall(r"(\d+) methods", (ROOT / "README.md").read_text("utf-8")) == [str(len(deltavit.methods()))]


def rows(page):
    """Key and default of a table's rows, as text."""
    return dict(re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", (DOCS / page).read_text("utf-8"), re.MULTILINE))


def test_every_training_option_is_described_with_its_default():
    assert rows("training.md") == {f.name: _text(f.default) for f in fields(deltavit.Training)}


def test_every_key_of_a_recipe_is_described_with_its_default():
    wanted = {"device": '"auto"'}
    for section, kind in (("model", ModelSection), ("data", DataSection)):
        wanted |= {f"{section}.{key}": _text(field.default) for key, field in kind.model_fields.items()}
    assert rows("recipes.md") == wanted


def _text(value):
    return f'"{value}"' if isinstance(value, str) else str(value)


# --- code and commands -----------------------------------------------------------------------------------------------


def run(page):
    scope, printed = {"__name__": "docs"}, io.StringIO()
    for i, code in enumerate(blocks(page, "python")):
        with contextlib.redirect_stdout(printed):
            exec(compile(re.sub(r"epochs=\d+", "epochs=1", code), f"{name(page)} block {i}", "exec"), scope)
    return printed.getvalue()


@pytest.mark.parametrize("page", RUN)
def test_python_in_the_documents_runs(page, digits):
    run(ROOT / page)


def test_what_concepts_prints_is_what_it_shows(digits):
    printed, shown = run(DOCS / "concepts.md"), "".join(blocks(DOCS / "concepts.md", "text"))
    letters = re.compile(r"\([0-9a-f]{6}\)")  # of fingerprints: they follow from torch's draws
    assert letters.sub("()", printed) == letters.sub("()", shown)


@pytest.mark.slow
def test_the_method_in_the_documents_keeps_the_contract():
    try:
        run(DOCS / "adding-a-method.md")
    finally:
        for method in ("row-scale", "gate"):
            deltavit.core.method._methods.pop(method, None)


def commands(path):
    for text in blocks(path, "shell", "console"):
        console = "$ " in text
        for line in text.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ") if not console or line.startswith("$ ") else ""
            if "deltavit " in line.partition(" #")[0]:
                words = shlex.split(line, comments=True)
                if "deltavit" in words:
                    yield words[words.index("deltavit") + 1 :]
    for code in re.findall(r"`deltavit ([a-z][^`]*)`", FENCE.sub("", path.read_text("utf-8"))):
        yield shlex.split(code)


@pytest.mark.parametrize("page", [name(path) for path in [*WRITTEN, *TOMLS]])
def test_every_command_in_the_documents_exists(page):
    path = ROOT / page
    known = typer.main.get_command(app).commands
    if path.suffix == ".toml":
        lines = path.read_text("utf-8").splitlines()
        found = [shlex.split(line)[2:] for line in lines if line.startswith("#   deltavit ")]
        assert found, "a recipe begins with its command"
    else:
        found = list(commands(path))
    for first, *words in found:
        assert first in known, f"{page}: deltavit {first}"
        command = known[first]
        if group := getattr(command, "commands", None):
            assert not words or words[0] in group, f"{page}: deltavit {first} {words[0]}"
            command = group[words[0]] if words else command
        flags = {flag for p in command.params for flag in [*p.opts, *p.secondary_opts]}
        for word in words:
            assert not word.startswith("--") or word.partition("=")[0] in flags, f"{page}: deltavit {first} {word}"
        _changes(first, words, page)


def _changes(command, words, page):
    spaces = [value for flag, value in itertools.pairwise(words) if flag == "--space"]
    changes = [w for w in words if re.fullmatch(r"[a-z_.]+=.*", w) and w not in spaces]
    if command == "bench":
        suite = ROOT / words[0] if words else ROOT / "none"
        if suite.exists():
            read_suite(suite, dict(change.split("=", 1) for change in changes if change.startswith("data.root")))
        return
    if command not in ("train", "plan", "search", "analyze"):
        assert not changes, f"{page}: {command} takes no {changes}"
        return
    values = dict(itertools.pairwise(words))
    if any("rnak" in c for c in changes):  # the example of a refusal
        with pytest.raises(MethodError):
            read_recipe(None, changes)
        return
    recipe = ROOT / values["--recipe"] if "--recipe" in values else None
    read_recipe(recipe if recipe and recipe.exists() else None, changes, method={"name": values.get("--method")})


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_recipe_reads_and_says_what_to_expect(path):
    head = path.read_text("utf-8").partition("[model]")[0]
    assert read_recipe(path).data.path
    assert all(word in head for word in ("seconds", "%", "seeds"))


def test_every_test_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), f"{file} has no {test}"
    from deltavit.core.contract import CHECKS

    held = {c.__name__ for c in CHECKS}
    for line in re.findall(r"contract: (.*?) \|", text):
        assert set(re.findall(r"`(\w+)`", line)) <= held


# --- links and what must not be there --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*map(name, WRITTEN)])
def test_links_inside_the_project_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text("utf-8"))):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() or target in GENERATED, f"{page}: {link}"
        if anchor and target.exists():
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w]+", "-", t.lower()).strip("-") for t in titles}, f"{page}: {link}"


HOSTS = ["pypi" + ".org", "files.python" + "hosted.org", "download.pytorch" + ".org", "npm" + "js"]
PLACES = ["/work" + "/", "/root" + "/", "/home" + "/", "/tmp" + "/"]


def tracked():
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for file in filter(None, listed.split("\0")):
        with contextlib.suppress(UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            yield file, (ROOT / file).read_text("utf-8")


def test_no_file_names_a_registry_or_a_place_on_one_machine():
    for file, text in tracked():
        for wrong in HOSTS if file.startswith("tests/") else HOSTS + PLACES:
            assert wrong not in text, f"{file} has {wrong}"


def test_the_pages_load_nothing_from_elsewhere():
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "font: false" in config
    assert "http" not in config + (DOCS / "style.css").read_text("utf-8")
