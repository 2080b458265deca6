"""LoRA goes to HF PEFT and comes from it: peft itself computes the logits that ours must equal."""

import copy
import json
import os
import struct

import pytest
import timm
import torch
from families import FAMILIES
from families_hf import huggingface_model
from safetensors.torch import load_file, save_file

import deltavit
from deltavit import attach, load_model, method
from deltavit.core.errors import FileError, MethodError
from deltavit.core.sealed import LIMIT
from deltavit.core.site import anatomy
from deltavit.store.peft import CONFIG, PICKLE, ROOT, WEIGHTS, export_lora, import_lora

peft = pytest.importorskip("peft")
ALL = ("q", "k", "v", "o", "fc1", "fc2")
PLAIN = ["tiny", "vit", "deit3", "dinov2 with registers", "eva02", "swin"]
HUGGINGFACE = [
    "hf vit classifier", "hf deit classifier", "hf dinov2 classifier", "hf dinov2 registers classifier",
    "hf beit classifier", "hf clip classifier", "hf siglip classifier",
]  # fmt: skip


def pictures(model):
    size = anatomy(model).preprocessing.size
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, x):
    y = model.eval()(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def stir(parameters):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def ours(model, classes=7, **options):
    adapter = attach(model, method(options.pop("name", "lora"), **options), classes=classes)
    stir(adapter.parameters())
    return adapter


def theirs(model, folder, **options):
    """A PEFT model none of whose adapter's tensors is what it was born with, saved by PEFT."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    stir(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(folder)
    return wrapped


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def rewritten(folder, change=None, **config):
    """The folder with other tensors or another configuration."""
    if change is not None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**said, **config}))


# --- the same logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "lora-fix"])
@pytest.mark.parametrize("roles", [("q", "v"), ALL], ids=["q,v", "all"])
@pytest.mark.parametrize("family", PLAIN)
def test_peft_computes_our_logits_from_an_export(family, roles, name, tmp_path):
    model = FAMILIES[family]()
    vit = anatomy(model)
    classes = model.get_submodule(vit.head).out_features
    base, x = copy.deepcopy(model), pictures(model)
    adapter = ours(model, classes, name=name, rank=2, scale=0.75, where={"roles": roles})
    export_lora(adapter, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    close(logits(loaded, x), logits(model, x))
    assert (logits(loaded, x) - logits(FAMILIES[family](), x)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", PLAIN)
def test_we_compute_the_logits_of_peft_from_an_import(family, options, tmp_path):
    model = FAMILIES[family]()
    vit = anatomy(model)
    paths = {site.path for linears in vit.linears for role, site in linears.items() if role in ("q", "v", "fc2")}
    ends = sorted({path.split(".")[-1] for path in paths})
    wrapped = theirs(
        copy.deepcopy(model), tmp_path, r=4, lora_alpha=6, target_modules=ends, modules_to_save=[vit.head], **options
    )
    adapter = import_lora(tmp_path, model)
    close(logits(model, pictures(model)), logits(wrapped, pictures(model)))
    assert adapter.method.rank == 4
    assert adapter.method.scale == (3 if options else 1.5)


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_transformers_classifiers_go_both_ways(name, tmp_path):
    tower, raw = load_model(huggingface_model(name)), huggingface_model(name)
    x = pictures(tower)
    close(logits(tower, x), logits(raw, x))
    adapter = ours(tower, rank=2)
    export_lora(adapter, tmp_path / "out")
    close(logits(peft.PeftModel.from_pretrained(raw, tmp_path / "out"), x), logits(tower, x))

    tower, raw = load_model(huggingface_model(name)), huggingface_model(name)
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    wrapped = theirs(raw, tmp_path / "in", r=3, **options)
    import_lora(tmp_path / "in", tower)
    close(logits(tower, x), logits(wrapped, x))


def test_names_of_transformers_4_are_understood(tmp_path):
    tower, raw = load_model(huggingface_model("hf vit classifier")), huggingface_model("hf vit classifier")
    everything = ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]
    wrapped = theirs(raw, tmp_path, r=3, target_modules=everything, modules_to_save=["classifier"])

    def older(tensors):
        for name in list(tensors):
            old = name
            for new, was in (
                (".layers.", ".encoder.layer."), ("q_proj", "attention.query"), ("v_proj", "attention.value"),
                ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):  # fmt: skip
                old = old.replace(new, was)
            tensors[old] = tensors.pop(name)
        assert f"{ROOT}vit.encoder.layer.1.attention.attention.query.lora_A.weight" in tensors

    rewritten(tmp_path, older, target_modules=["query", "value", "dense"])
    import_lora(tmp_path, tower)
    close(logits(tower, pictures(tower)), logits(wrapped, pictures(tower)))


def test_a_model_of_timm_by_name_goes_both_ways(tmp_path):
    model = load_model("vit_tiny_patch16_224", weights="random")
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, strict=False)
    adapter = ours(model, ["ant", "bee", "cat"], rank=2)
    export_lora(adapter, tmp_path)
    close(logits(peft.PeftModel.from_pretrained(base, tmp_path), pictures(model)), logits(model, pictures(model)))


# --- ranks and scales ------------------------------------------------------------------------------------------------


def test_an_export_comes_back_as_it_went(tmp_path):
    adapter = ours(FAMILIES["vit"](), ["ant", "bee", "cat"], rank=3, scale=0.3, dropout=0.25)
    export_lora(adapter, tmp_path)
    back = import_lora(tmp_path, FAMILIES["vit"]())
    assert back.method.where == adapter.method.where
    assert (back.method.rank, back.method.dropout, back.classes) == (3, 0.25, ["ant", "bee", "cat"])
    assert back.method.scale == pytest.approx(0.3)
    for name, value in adapter.tensors().items():
        assert torch.equal(value, back.tensors()[name]), name


def test_a_fused_module_is_exported_as_blocks_of_the_summed_rank(tmp_path):
    adapter = ours(FAMILIES["vit"](), rank=2, scale=2.0, where={"roles": ("q", "v", "o")})
    export_lora(adapter, tmp_path)
    said, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    up = tensors[f"{ROOT}blocks.1.attn.qkv.lora_B.weight"]
    assert up.shape == (72, 4)
    assert not up[:24, 2:].any()
    assert not up[24:48].any()
    assert not up[48:, :2].any()
    ranks = {f"blocks.{b}.attn.{m}": r for b in range(2) for m, r in (("qkv", 4), ("proj", 2))}
    assert {name: said["rank_pattern"].get(name, said["r"]) for name in ranks} == ranks
    assert {name: said["alpha_pattern"].get(name, said["lora_alpha"]) for name in ranks} == {
        name: 2 * rank for name, rank in ranks.items()
    }


def test_different_ranks_and_scales_are_imported_as_one_of_each(tmp_path):
    model = FAMILIES["vit"]()
    patterns = {"rank_pattern": {"blocks.1.attn.qkv": 5, "^blocks.0.mlp.fc1": 1}, "alpha_pattern": {"fc1": 20}}
    wrapped = theirs(copy.deepcopy(model), tmp_path, r=2, lora_alpha=3, target_modules=["qkv", "fc1"], **patterns)
    adapter = import_lora(tmp_path, model)
    assert (adapter.method.rank, adapter.method.scale) == (5, 1.0)
    close(logits(model, pictures(model)), logits(wrapped, pictures(model)))
    padded = adapter.tensors()["blocks.0.fc1.up"][:, 1:]
    assert not padded.any()
    assert adapter.tensors()["blocks.0.fc1.down"].ne(0).all()  # else neither would ever train


def test_some_blocks_and_a_model_without_its_head_keep_what_peft_left(tmp_path):
    model = FAMILIES["vit"]()
    options = {"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"}
    wrapped = theirs(copy.deepcopy(model), tmp_path, r=2, **options)
    adapter = import_lora(tmp_path, model)
    assert adapter.method.where.blocks == (1,)
    assert adapter.classes is None
    close(logits(model, pictures(model)), logits(wrapped, pictures(model)))
    assert import_lora(tmp_path, FAMILIES["vit"](), classes=["a", "b"]).head.weight.shape == (2, 24)


def test_a_site_that_a_file_lacks_among_its_roles_and_blocks_starts_at_zero(tmp_path):
    model = FAMILIES["vit"]()
    chosen = ["blocks.0.attn.proj", "blocks.1.mlp.fc2"]
    wrapped = theirs(copy.deepcopy(model), tmp_path, r=2, target_modules=chosen)
    adapter = import_lora(tmp_path, model)
    close(logits(model, pictures(model)), logits(wrapped, pictures(model)))
    assert not adapter.tensors()["blocks.1.o.up"].any()


def test_an_untrained_lora_of_peft_keeps_its_rank(tmp_path):
    peft.get_peft_model(FAMILIES["vit"](), peft.LoraConfig(r=3, target_modules=["qkv"])).save_pretrained(tmp_path)
    adapter = import_lora(tmp_path, FAMILIES["vit"]())
    assert (adapter.method.rank, adapter.method.where.roles) == (3, ("q", "k", "v"))


def test_half_precision_and_double_bases_are_read(tmp_path):
    model = FAMILIES["vit"]()
    wrapped = theirs(copy.deepcopy(model), tmp_path, r=2, target_modules=["qkv"])
    rewritten(tmp_path, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    double = FAMILIES["vit"]().double()
    adapter = import_lora(tmp_path, double)
    assert adapter.tensors()["blocks.0.q.up"].dtype == torch.float64
    difference = logits(double, pictures(model).double()) - logits(wrapped, pictures(model))
    assert difference.abs().max() < 0.02


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    theirs(FAMILIES["vit"](), tmp_path, r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    return tmp_path


def refused(folder, *words, family="vit", **options):
    model = FAMILIES[family]()
    before = list(model.state_dict())
    with pytest.raises((FileError, MethodError)) as error:
        import_lora(folder, model, **options)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 600
    for word in words:
        assert word in line, line
    assert list(model.state_dict()) == before
    assert not deltavit.adapters(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("fan_in_fan_out", True), ("lora_bias", True),
        ("layer_replication", [[0, 2]]), ("target_parameters", ["blocks.0.w"]), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"), ("trainable_token_indices", [1]), ("an_option_of_tomorrow", 1),
        ("alora_invocation_tokens", [1]), ("use_qalora", True), ("use_bdlora", {"nblocks": 2}),
    ],
)  # fmt: skip
def test_an_option_that_changes_the_function_is_refused_by_name(folder, key, value):
    rewritten(folder, **{key: value})
    refused(folder, f"{key}={value!r}"[:60])


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal"])
def test_an_init_that_leaves_the_base_alone_is_taken(value, tmp_path):
    model = FAMILIES["vit"]()
    wrapped = theirs(copy.deepcopy(model), tmp_path, r=2, target_modules=["qkv"], init_lora_weights=value)
    import_lora(tmp_path, model)
    close(logits(model, pictures(model)), logits(wrapped, pictures(model)))


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"}, {"r": 0}, {"r": 10**400}, {"r": True}, {"r": "2"}, {"lora_alpha": float("nan")},
        {"lora_alpha": None}, {"lora_dropout": 1e999}, {"lora_dropout": -0.1}, {"lora_dropout": 1},
        {"rank_pattern": [1]}, {"rank_pattern": {"(a+)+b": 1}},
        {"alpha_pattern": {"fc1": "x"}}, {"modules_to_save": "head"}, {"modules_to_save": [1]},
        {"target_modules": [["qkv"]]}, {"init_lora_weights": ["x"]}, {"init_lora_weights": {}},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_configuration_is_refused(folder, config):
    rewritten(folder, **config)
    refused(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"{" + b" " * LIMIT + b"}"], ids=range(6))
def test_a_configuration_that_is_no_json_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text)
    refused(folder)


A, B = f"{ROOT}blocks.1.attn.qkv.lora_A.weight", f"{ROOT}blocks.1.attn.qkv.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A), ["qkv.lora_A is missing"]),
        (lambda t: t.pop(B), ["qkv.lora_B is missing"]),
        (lambda t: (t.pop(A), t.pop(B)), ["blocks.1.attn.qkv.lora_A is missing", "target_modules"]),
        (lambda t: t.update({A: t[A].mT.contiguous()}), ["lora_A is [24, 2], and should be [2, 24]"]),
        (lambda t: t.update({A: torch.randn(3, 24), B: torch.randn(72, 3)}), ["lora_A is [3, 24]"]),
        (lambda t: t[B].fill_(float("nan")), ["lora_B", "finite"]),
        (lambda t: t[A].view(-1)[:1].fill_(float("inf")), ["lora_A", "finite"]),
        (lambda t: t.update({A: torch.ones(2, 24, dtype=torch.int8)}), ["lora_A", "finite"]),
        (lambda t: t.update({f"{ROOT}norm.weight": torch.ones(24)}), ["norm.weight", "neither"]),
        (lambda t: t.update({f"{ROOT}blocks.0.attn.qkv.lora_magnitude_vector.weight": torch.ones(72)}), ["magnitude"]),
        (lambda t: t.update({"x": torch.ones(1)}), ["'x'"]),
        (lambda t: t.pop(f"{ROOT}head.weight"), ["head.weight is missing"]),
        (lambda t: t.update({f"{ROOT}head.weight": torch.ones(7, 23)}), ["head.weight is [7, 23]"]),
        (lambda t: t.update({f"{ROOT}head.bias": torch.ones(6)}), ["head.bias is [6], and should be [7]"]),
        (lambda t: t.update({f"{ROOT}patch_embed.proj.lora_A.weight": torch.ones(2, 3)}), ["patch_embed.proj"]),
        (lambda t: t.update({f"{ROOT}blocks.9.attn.qkv.lora_A.weight": torch.ones(2, 24)}), ["blocks.9.attn.qkv"]),
    ],
    ids=range(16),
)
def test_tensors_that_do_not_fit_are_refused_with_their_name(folder, change, words):
    rewritten(folder, change)
    refused(folder, *words)


def test_a_pickle_is_never_opened(folder):
    (folder / WEIGHTS).rename(folder / PICKLE)
    refused(folder, "adapter_model.bin", "never opens pickles")
    (folder / PICKLE).rename(folder / WEIGHTS)
    torch.save({A: torch.ones(1)}, folder / WEIGHTS)
    refused(folder, "not a safetensors file")


def test_files_that_are_not_there_or_not_files_are_refused(folder, tmp_path):
    refused(folder / "nowhere", "not a PEFT adapter")
    (folder / WEIGHTS).unlink()
    refused(folder, f"no {WEIGHTS}")
    os.mkfifo(folder / WEIGHTS)
    refused(folder, f"no {WEIGHTS}")


def test_a_torn_or_hostile_tensor_file_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    for bad in (data[:7], data[:-1], data[: len(data) // 2], struct.pack("<Q", 1 << 62) + data[8:], b"", bytes(100)):
        (folder / WEIGHTS).write_bytes(bad)
        refused(folder)


def test_ranks_that_would_blow_the_file_up_are_refused(tmp_path):
    theirs(
        FAMILIES["vit"](), tmp_path, r=1, target_modules=["qkv", "fc1", "fc2"], rank_pattern={"blocks.0.mlp.fc2": 64}
    )
    rewritten(tmp_path, lambda t: t.update({k: v.half() for k, v in t.items()}))
    import_lora(tmp_path, FAMILIES["vit"]())
    theirs(
        FAMILIES["eva02"](), tmp_path / "more", r=1, target_modules=["q_proj", "k_proj", "v_proj", "attn.proj", "fc2"],
        rank_pattern={"blocks.0.attn.q_proj": 2000},
    )  # fmt: skip
    refused(tmp_path / "more", "padded to one rank of 2000", "merge it in PEFT", family="eva02")


def test_a_head_for_another_number_of_classes_is_refused(folder):
    refused(folder, "7 classes", classes=3)


@pytest.mark.parametrize("family", ["eva", "beit", "torchvision vit"])
def test_a_model_that_reads_its_weight_itself_is_refused_both_ways(family, tmp_path):
    model = FAMILIES[family]()
    with pytest.raises(MethodError, match="reads its weight itself"):
        export_lora(ours(model), tmp_path)
    if family != "torchvision vit":  # PEFT wraps the module, and nothing of the wrapper ever runs
        model = FAMILIES[family]()
        wrapped = theirs(copy.deepcopy(model), tmp_path, r=2, target_modules=["qkv"])
        close(logits(wrapped, pictures(model)), logits(model, pictures(model)))
        refused(tmp_path, "reads its weight itself", family=family)


@pytest.mark.parametrize("name", ["kadaptation", "bitfit", "vpt-deep"])
def test_other_methods_are_refused_with_a_way_out(name, tmp_path):
    way = "own file" if name == "vpt-deep" else "merge it and save the model"
    with pytest.raises(MethodError, match=f"{name}; .*{way}"):
        export_lora(ours(FAMILIES["vit"](), name=name), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_on_other_features_than_a_classifier_of_transformers_reads_is_refused_both_ways(tmp_path):
    with pytest.raises(MethodError, match="other features"):
        export_lora(ours(load_model(huggingface_model("hf siglip"))), tmp_path / "out")
    export_lora(ours(load_model(huggingface_model("hf siglip")), classes=None), tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] is None

    classifier = huggingface_model("hf siglip classifier")
    theirs(classifier, tmp_path / "in", r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    with pytest.raises(MethodError, match="other features"):
        import_lora(tmp_path / "in", load_model(huggingface_model("hf siglip")))


def test_an_adapter_of_the_text_tower_is_refused(tmp_path):
    raw = huggingface_model("hf clip with text")
    theirs(raw, tmp_path, r=2, target_modules=["q_proj"])
    with pytest.raises(FileError, match=r"text_model\..*is no matrix"):
        import_lora(tmp_path, load_model(huggingface_model("hf clip with text")))


def test_a_folder_that_holds_an_adapter_and_numbers_that_are_not_finite_are_refused(tmp_path):
    adapter = ours(FAMILIES["vit"]())
    export_lora(adapter, tmp_path / "a")
    with pytest.raises(FileError, match="already holds"):
        export_lora(adapter, tmp_path / "a")
    with torch.no_grad():
        adapter.head.weight[0, 0] = float("nan")
    with pytest.raises(FileError, match="not finite"):
        export_lora(adapter, tmp_path / "b")
    assert not (tmp_path / "b").exists()
