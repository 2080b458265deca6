"""Imports go down the floors, and the core needs nothing but torch and safetensors."""

import ast
import sys
from pathlib import Path

import deltavit

FLOORS = {
    "core": 0, "models": 1, "methods": 1, "analysis": 4, "data": 2, "store": 2, "train": 3,
    "search": 4, "serve": 4, "demo": 4, "bench": 5, "report": 6, "cli": 7,
}  # fmt: skip
ROOT = Path(deltavit.__file__).parent


def imports(path):
    """(package of deltavit, or None; full name) for each import of a file, relative ones resolved."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts
    package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(p for p in (base, node.module) if p)
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == "deltavit" else [stem]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield (parts[1] if parts[0] == "deltavit" and len(parts) > 1 else None), name


def test_imports_go_down():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if len(parts) == 1:
            continue
        floor = FLOORS[parts[0]]
        for target, name in imports(path):
            if target in FLOORS and target != parts[0]:
                assert FLOORS[target] < floor, f"{path.relative_to(ROOT)} imports {name}, which is not below it"


def test_models_and_methods_do_not_know_each_other():
    for one, other in (("models", "methods"), ("methods", "models")):
        for path in (ROOT / one).glob("*.py"):
            assert other not in {target for target, _ in imports(path)}, path


def test_core_needs_only_torch_and_safetensors():
    allowed = {"torch", "safetensors", "deltavit", "__future__", *sys.stdlib_module_names}
    for path in (ROOT / "core").glob("*.py"):
        for _, name in imports(path):
            assert name.split(".")[0] in allowed, f"core/{path.name} imports {name}"


def test_only_ddp_talks_to_torch_distributed():
    for path in ROOT.rglob("*.py"):
        if path.name != "ddp.py":
            assert not any(name.startswith("torch.distributed") for _, name in imports(path)), path


def test_nothing_opens_a_pickle():
    for path in ROOT.rglob("*.py"):
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not calls & {"torch.load", "pickle.load", "pickle.loads", "joblib.load"}, path
        assert not {name.split(".")[0] for _, name in imports(path)} & {"pickle", "joblib", "dill"}, path


def test_a_method_file_mentions_no_trainer_no_device_and_no_model_family():
    for path in (ROOT / "methods").glob("*.py"):
        code = path.read_text()
        for word in ("timm", "cuda", ".device(", "merge(", "save(", "distributed", "optimizer"):
            assert word not in code, f"{path.name} mentions {word}"
