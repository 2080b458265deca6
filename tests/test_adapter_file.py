"""The adapter file: it comes back to the bit in another process, it is small, and a hostile one is refused cheaply."""

import copy
import hashlib
import json
import math
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import deltavit
from deltavit import attach, info, load, load_model, method, methods
from deltavit.core import sealed
from deltavit.core.errors import FileError
from deltavit.core.site import anatomy
from deltavit.store import Checkpoints, pack
from deltavit.train.merge import merge_to_file

CLASSES = ["cat", "dog", "Käfer\n:-)"]
CAR_NAMES = [f"{year} Make Model Coupe {i}" for i, year in enumerate(range(1900, 2000))]


def stirred(model, name, classes=CLASSES, seed=5, **options):
    """An adapter none of whose tensors is what it was born with."""
    adapter = attach(model, method(name, **options), classes=classes, seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return adapter


def pictures(model):
    size = anatomy(model).preprocessing.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def fingerprint_of_logits(model):
    return hashlib.sha256(model.eval()(pictures(model)).numpy().tobytes()).hexdigest()


def state(model):
    """Everything of a model that a refused file must leave alone."""
    values = {name: t.detach().clone() for name, t in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return values, flags, [name for name, _ in model.named_modules()], deltavit.adapters(model)


def same(a, b):
    return list(a[0]) == list(b[0]) and all(torch.equal(a[0][n], b[0][n]) for n in a[0]) and a[1:] == b[1:]


# --- there and back --------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_adapter_file import fingerprint_of_logits
import deltavit
found = {{}}
for path in json.load(sys.stdin):
    model = deltavit.load_model(deltavit.info(path).base)
    adapter = deltavit.load(path, model)
    found[path] = [fingerprint_of_logits(model), adapter.classes, adapter.summary]
print(json.dumps(found))
"""


def test_a_new_process_gets_bit_equal_logits_classes_and_summary_of_every_method(tmp_path):
    expected = {}
    for base in ("tiny", "vit_pico"):
        for name in methods():
            model = load_model(base)
            adapter = stirred(model, name)
            adapter.summary = {"val_accuracy": 0.1 + 0.2}
            path = str(tmp_path / f"{base}-{name}.safetensors")
            adapter.save(path)
            expected[path] = [fingerprint_of_logits(model), CLASSES, adapter.summary]
    several = len({logits for logits, *_ in expected.values()})  # partial and attention train the same tensors
    assert several >= len(expected) - 4
    script = OTHER_PROCESS.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(list(expected)), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("name", methods())
def test_detaching_a_loaded_adapter_leaves_the_base_to_the_bit(name, tmp_path):
    stirred(load_model("tiny"), name).save(tmp_path / "a.safetensors")
    model = load_model("tiny")
    before = state(model)
    load(tmp_path / "a.safetensors", model).detach()
    assert same(before, state(model))


def test_the_frozen_factor_of_lora_fix_comes_back_from_its_seed(tmp_path):
    adapter = stirred(load_model("tiny"), "lora-fix", seed=11)
    adapter.save(tmp_path / "a.safetensors")
    tensors, _ = sealed.read(tmp_path / "a.safetensors")
    assert not any("down" in name for name in tensors)
    model = load_model("tiny")
    attach(model, method("lora-fix"), classes=3, seed=12).detach()  # another draw in between changes nothing
    again = load(tmp_path / "a.safetensors", model)
    for one, two in zip(adapter.edits, again.edits, strict=True):
        assert torch.equal(one.change.down, two.change.down)


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    for file in ("a", "b"):
        stirred(load_model("tiny"), "fact-tk").save(tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("base", ["vit_pico", "vit_tiny_patch16_224"])
def test_a_file_is_at_most_its_trainables_and_16_kib(base, tmp_path):
    model = load_model(base, None if base == "vit_pico" else "random")
    for name in methods():
        adapter = attach(model, method(name), classes=CAR_NAMES)
        size = adapter.save(tmp_path / "a.safetensors")
        trains = sum(p.numel() * p.element_size() for p in adapter.parameters())
        adapter.detach()
        assert size == (tmp_path / "a.safetensors").stat().st_size
        assert trains < size <= trains + 16 * 1024, name


def test_a_diverged_adapter_is_not_written(tmp_path):
    adapter = stirred(load_model("tiny"), "lora")
    with torch.no_grad():
        adapter.head.bias[1] = math.inf
    with pytest.raises(FileError, match=r"head\.bias is not finite"):
        adapter.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, options in (("lora", {"rank": 2}), ("kadaptation", {}), ("lora-fix", {"rank": 2}), ("attention", {})):
        stirred(load_model("tiny"), name, **options).save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def tiny():
    return load_model("tiny")


def refused(path, model, kilo=100_000):
    """The line with which a file is refused: at once, for nothing, and with the model left alone."""
    before = state(model)
    peak, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(FileError) as error:
        load(path, model)
    assert time.process_time() - clock < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < kilo
    assert same(before, state(model))
    assert "_deltavit_record" not in model.__dict__
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 700
    return line


def put(*keys, value):
    """Change the header: `put("method", "options", "rank", value=9)`; a callable gets the old value."""

    def change(tensors, header):
        inner = header
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value(inner[keys[-1]]) if callable(value) else value

    return change


def drop(*keys):
    def change(tensors, header):
        inner = header
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return change


def tensors_with(change):
    return lambda tensors, header: change(tensors)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = {"rank": value}
    return value


UP, DOWN, HEAD = "blocks.*.q.up", "blocks.*.v.down", "head.weight"
HOSTILE = {
    "rank bomb": ("lora", put("method", "options", "rank", value=200_000), "do not fit"),
    "rank of a billion": ("lora", put("method", "options", "rank", value=10**9), "do not fit"),
    "rank beyond int64": ("lora", put("method", "options", "rank", value=10**30), ""),
    "rank 0": ("lora", put("method", "options", "rank", value=0), "at least 1"),
    "rank that is no whole number": ("lora", put("method", "options", "rank", value=2.5), "not int"),
    "rank that is a list": ("lora", put("method", "options", "rank", value=[2]), "not int"),
    "n bomb": ("kadaptation", put("method", "options", "n", value=10**6), ""),
    "n that divides": ("kadaptation", put("method", "options", "n", value=24), "do not fit"),
    "rank of Kronecker": ("kadaptation", put("method", "options", "rank", value=10**8), "do not fit"),
    "a million blocks": ("lora", put("method", "options", "where", "blocks", value=[0] * 10**5), "bytes of options"),
    "hundreds of blocks": ("lora", put("method", "options", "where", "blocks", value=[0, 2] * 200), "do not fit"),
    "a block that is not there": ("lora", put("method", "options", "where", "blocks", value=[3]), "blocks 0 to 2"),
    "a hundred thousand roles": ("lora", put("method", "options", "where", "roles", value=["q"] * 10**5), "options"),
    "hundreds of roles": ("lora", put("method", "options", "where", "roles", value=["q"] * 400), ""),
    "nested options": ("lora", put("method", "options", value=nested(100)), "lora.rank"),
    "options that are a list": ("lora", put("method", "options", value=["rank"]), ""),
    "an unknown option": ("lora", put("method", "options", "ranks", value=2), "did you mean 'rank'"),
    "an unknown method": ("lora", put("method", "name", value="lorra"), "did you mean 'lora'"),
    "a method that is no text": ("lora", put("method", "name", value=3), "not text"),
    "another method": ("lora", put("method", value={"name": "lora-fix", "options": {"rank": 2}}), "not expected"),
    "a class twice": ("lora", put("classes", value=["a", "b", "a"]), "different names"),
    "classes that are no text": ("lora", put("classes", value=[1, 2, 3]), "not text"),
    "classes that are text": ("lora", put("classes", value="abc"), "different names"),
    "no class": ("lora", put("classes", value=[]), "at least one class"),
    "one class too many": ("lora", put("classes", value=lambda c: [*c, "eel"]), "do not fit"),
    "a newer version": ("lora", put("adapter", value=2), "newer"),
    "a version that is text": ("lora", put("adapter", value="1"), "not an adapter"),
    "another frozen factor": ("lora-fix", put("frozen", value="0" * 64), "draws other numbers"),
    "another seed": ("lora-fix", put("seed", value=6), "draws other numbers"),
    "a seed beyond int64": ("lora", put("seed", value=2**70), "not a seed"),
    "a seed that is text": ("lora", put("seed", value="1"), "not a seed"),
    "an image size that would cost a terabyte": ("lora", put("base", "options", value={"image_size": 10**6}), "option"),
    "an option of the base nobody knows": ("lora", put("base", "options", value={"remote_code": 1}), "option"),
    "a fingerprint of another base": ("lora", put("base", "fingerprint", value="f" * 64), "load that base first"),
    "pictures of another size": ("lora", put("preprocessing", "size", value=32), "32 px"),
    "a picture of 10^9 pixels a side": ("lora", put("preprocessing", "size", value=10**9), "preprocessing"),
    "a std of zero": ("lora", put("preprocessing", "std", value=[1, 0, 1]), "preprocessing"),
    "a mean of two colours": ("lora", put("preprocessing", "mean", value=[1, 0]), "preprocessing"),
    "a crop of nothing": ("lora", put("preprocessing", "crop", value=0), "preprocessing"),
    "an interpolation that is no text": ("lora", put("preprocessing", "interpolation", value=3), "not text"),
    "a key of preprocessing too many": ("lora", put("preprocessing", "code", value="x"), "code"),
    "a summary that is a list": ("lora", put("training", value=[1]), ""),
    "a tensor missing": ("lora", tensors_with(lambda t: t.pop(UP)), "missing"),
    "a tensor too many": ("lora", tensors_with(lambda t: t.update(more=t[UP])), "not expected 'more'"),
    "a tensor renamed": ("lora", tensors_with(lambda t: t.update({"blocks.*.k.up": t.pop(UP)})), "missing"),
    "the head missing": ("lora", tensors_with(lambda t: t.pop(HEAD)), "missing 'head.weight'"),
    "one column less": ("lora", tensors_with(lambda t: t.update({DOWN: t[DOWN][..., :-1].contiguous()})), "expected"),
    "one block less": ("lora", tensors_with(lambda t: t.update({DOWN: t[DOWN][:-1]})), "expected"),
    "transposed": ("lora", tensors_with(lambda t: t.update({DOWN: t[DOWN].mT.contiguous()})), "expected"),
    "half precision": ("lora", tensors_with(lambda t: t.update({UP: t[UP].half()})), "F16"),
    "whole numbers": ("lora", tensors_with(lambda t: t.update({UP: t[UP].int()})), "I32"),
    "NaN": ("lora", tensors_with(lambda t: t[UP][0].fill_(math.nan)), "NaN or Inf"),
    "Inf in the head": ("lora", tensors_with(lambda t: t[HEAD][0].fill_(-math.inf)), "NaN or Inf"),
} | {
    f"no {'.'.join(keys)}": ("lora", drop(*keys), "damaged" if keys != ("adapter",) else "not an adapter")
    for keys in [
        ("adapter",), ("base",), ("base", "name"), ("base", "options"), ("base", "fingerprint"), ("method",),
        ("method", "name"), ("method", "options"), ("seed",), ("frozen",), ("classes",), ("preprocessing",),
        ("preprocessing", "mean"), ("preprocessing", "crop"), ("training",),
    ]
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_resealed_lie_is_refused_at_once_in_one_line_and_the_model_stays_clean(case, folder, tmp_path, tiny):
    name, change, names = HOSTILE[case]
    tensors, header = sealed.read(folder / f"{name}.safetensors")
    header = copy.deepcopy(header)
    change(tensors, header)
    sealed.write(tmp_path / "a.safetensors", tensors, header)
    assert names in refused(tmp_path / "a.safetensors", tiny)


def test_the_good_files_do_load(folder, tiny):
    for path in folder.iterdir():
        load(path, tiny).detach()


def test_the_same_architecture_with_other_weights_is_refused(folder):
    other = load_model("tiny")
    del other.__dict__["_deltavit_anatomy"]
    with torch.no_grad():
        other.blocks[1].attn.q.weight[0, 0] += 1e-6
    assert "load that base first" in refused(folder / "lora.safetensors", other)


def test_a_base_whose_square_matrices_are_transposed_is_refused(folder):
    other = load_model("tiny")
    del other.__dict__["_deltavit_anatomy"]
    with torch.no_grad():
        other.blocks[1].attn.q.weight.copy_(other.blocks[1].attn.q.weight.t().clone())
    assert "load that base first" in refused(folder / "lora.safetensors", other)


def test_a_square_matrix_transposed_in_the_payload_breaks_the_seal(folder, tmp_path, tiny):
    good, bad = folder / "attention.safetensors", tmp_path / "a.safetensors"
    tensors, header = sealed.read(good)
    name = next(n for n, t in tensors.items() if t.shape[-2:] == (24, 24))
    sealed.write(bad, {**tensors, name: tensors[name].mT.contiguous()}, header)
    seal = json.loads(good.read_bytes()[8 : 8 + int.from_bytes(good.read_bytes()[:8], "little")])["__metadata__"][
        "sha256"
    ]
    forged = json.loads(bad.read_bytes()[8 : 8 + int.from_bytes(bad.read_bytes()[:8], "little")])["__metadata__"][
        "sha256"
    ]
    bad.write_bytes(bad.read_bytes().replace(forged.encode(), seal.encode()))
    assert "seal does not match" in refused(bad, tiny)


def test_a_base_at_another_image_size_is_refused_and_the_size_named(tmp_path, tiny):
    stirred(load_model("tiny", image_size=32), "lora").save(tmp_path / "a.safetensors")
    assert "tiny at 32 px" in refused(tmp_path / "a.safetensors", tiny)


def test_another_file_of_ours_or_of_others_is_no_adapter(folder, tmp_path, tiny):
    model = load_model("vit_pico")
    adapter = stirred(model, "lora")
    Checkpoints(tmp_path).save(1, pack(adapter.tensors()), {"slots": []})
    merge_to_file(model, adapter, tmp_path / "merged.safetensors")
    safetensors.torch.save_file({"head.weight": torch.ones(3, 24)}, tmp_path / "plain.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(1)}, tmp_path / "torch.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "short.safetensors").write_bytes((folder / "lora.safetensors").read_bytes()[:-1])
    for name, says in {
        "checkpoint-000000001": "not an adapter file",
        "merged": "another program wrote it",
        "plain": "another program wrote it",
        "pickle": "",
        "torch": "never opens pickles",
        "empty": "not a safetensors file",
        "short": "torn",
        "missing": "",
    }.items():
        assert says in refused(tmp_path / f"{name}.safetensors", tiny), name


def test_info_tells_what_a_file_needs_without_reading_its_tensors(folder):
    said = info(folder / "lora.safetensors")
    assert (said.base, said.options, said.classes, said.seed) == ("tiny", {}, CLASSES, 5)
    assert said.method == method("lora", rank=2)
    assert said.preprocessing == anatomy(load_model("tiny")).preprocessing
