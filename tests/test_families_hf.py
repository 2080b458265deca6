"""transformers and open_clip: wrapped models are the originals, and what their anatomy says is so."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from families_hf import ALL, HUGGINGFACE, RAW, TEXT_CFG, VISION, huggingface, huggingface_model, open_clip
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import deltavit
from deltavit import Where
from deltavit.core.contract import pictures, stir
from deltavit.core.edit import After, Before
from deltavit.core.errors import ModelError
from deltavit.core.method import Method
from deltavit.core.site import ROLES
from deltavit.models import skeleton

x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def own_answer(model):
    """What the library itself gives for a picture: logits, the image embedding, or the class token."""
    if hasattr(model, "encode_image"):
        return model.encode_image(x)
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=x).pooler_output
    y = model(pixel_values=x)
    if type(model).__name__ in ("ViTModel", "DeiTModel"):  # their pooler is for other tasks
        return y.last_hidden_state[:, 0]
    return next(y[key] for key in ("logits", "image_embeds", "pooler_output") if key in y)


@pytest.mark.parametrize("family", RAW)
def test_a_wrapped_model_answers_as_the_original(family):
    model = RAW[family]()
    expected = own_answer(model)
    tower = deltavit.load_model(model)
    assert not tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    with torch.no_grad():
        torch.testing.assert_close(tower(x), expected)
        normal = deltavit.load_model(model, normalize=True)
        if isinstance(normal.head, nn.Identity):
            torch.testing.assert_close(normal(x), expected / expected.norm(dim=-1, keepdim=True))


def entering(model, paths):
    """The first tensor that enters each of the modules, and the first that leaves it, in one pass."""
    seen = {}

    def keep(path):
        def hook(module, args, kwargs, y):
            seen[path] = (args[0] if args else next(iter(kwargs.values())), y[0] if isinstance(y, tuple) else y)

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(p), with_kwargs=True) for p in paths]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ALL)
def test_anatomy_knows_tokens_grid_head_heads_and_what_enters_the_parts(family):
    model = ALL[family]()
    vit = deltavit.anatomy(model)
    inner = [*vit.blocks, *vit.attn, *vit.mlp, *vit.before_attn, *vit.before_mlp, *filter(None, vit.after_heads)]
    seen = entering(model, inner)
    shape = (2, vit.prefix + vit.grid[0] * vit.grid[1], vit.width)
    assert vit.heads == 3
    assert vit.preprocessing.size == 16
    assert model.get_submodule(vit.head).in_features == vit.features
    assert {tuple(t.shape) for pair in seen.values() for t in pair} == {shape}
    for b, block in enumerate(vit.blocks):
        assert torch.equal(seen[block][0], seen[vit.before_attn[b]][0])  # the residual stream
        assert torch.equal(seen[vit.attn[b]][0], seen[vit.before_attn[b]][1])
        assert torch.equal(seen[vit.mlp[b]][0], seen[vit.before_mlp[b]][1])
        if vit.after_heads[b]:
            o = model.get_submodule(vit.linears[b]["o"].path)
            entered = seen[vit.after_heads[b]][1 if "ln_inner" in vit.after_heads[b] else 0]
            assert "ln_inner" in vit.after_heads[b] or torch.equal(o(entered), seen[vit.after_heads[b]][1])


@pytest.mark.parametrize("family", ALL)
def test_every_parameter_of_the_backbone_is_used(family):
    """Nothing that never runs stayed behind: a method that trains it would train nothing."""
    model = ALL[family]().double()
    model.requires_grad_(True)
    model(x.double()).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("family", ALL)
def test_norms_and_biases_are_all_found_in_order(family):
    model = ALL[family]()
    vit = deltavit.anatomy(model)
    kinds = [name for name, m in model.named_modules() if "norm" in type(m).__name__.lower() and list(m.parameters())]
    assert sorted(vit.norms) == sorted(kinds)
    ran = [name for name in entering(model, vit.norms) if "attn_pool" not in name]
    assert ran == [name for name in vit.norms if "attn_pool" not in name]
    named = {n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith("head.")}
    assert set(vit.biases()) == named
    assert all(model.get_submodule(s.path).bias is not None for s in vit.sites(Where(roles=("norm",))) if s.bias)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_sites_are_the_rows_that_the_model_reads(family):
    """LoRA on one role is the same as adding its product to the rows that the site names."""
    model = ALL[family]()
    vit = deltavit.anatomy(model)
    base = model(x)
    for role in vit.linears[0]:
        adapter = deltavit.attach(model, deltavit.method("lora", where={"roles": [role]}))
        stir(adapter)
        adapted, plain = model(x), copy.deepcopy(ALL[family]())
        for site, W0, W1 in adapter.pairs():
            W = plain.get_parameter(site.tensor)[slice(*site.rows)]
            assert torch.equal(W, W0)
            W.copy_(W1)
            bias = None if site.shift is None else plain.get_submodule(site.shift[0]).get_parameter(site.shift[1])
            assert bias is None or len(bias[slice(*site.shift[2])]) == site.shape[0]
        torch.testing.assert_close(plain(x), adapted, atol=1e-5, rtol=1e-5)
        assert (adapted - base).abs().max() > 1e-5, role
        adapter.detach()
    assert set(vit.linears[0]) - {"fc1g"} == set(ROLES)


@pytest.mark.parametrize("family", [f for f in ALL if f not in ("hf beit", "hf beit classifier", "open_clip custom")])
@torch.no_grad()
def test_q_k_and_v_are_not_mistaken_for_each_other(family):
    """No softmax sees the bias of k, unless the keys are rotated or normalised; those of q and v are seen."""
    model = ALL[family]()
    vit = deltavit.anatomy(model)
    base, rotated = model(x), "dinov3" in family
    for role in "qkv":
        if vit.linears[0][role].shift is None:
            assert rotated
            continue
        path, name, rows = vit.linears[0][role].shift
        b = model.get_submodule(path).get_parameter(name)
        kept = b.clone()
        b[slice(*rows)] += 1 + torch.randn(rows[1] - rows[0])
        assert torch.allclose(model(x), base, atol=1e-5) == (role == "k"), role
        b.copy_(kept)


@dataclass(frozen=True)
class Edits(Method):
    """The edits of a test."""

    make: object
    name = "edits"

    def edits(self, vit):
        yield from self.make(vit)


class Nothing(nn.Module):
    def forward(self, x, y):
        return 0 * y


@pytest.mark.parametrize("family", [f for f in ALL if f != "open_clip custom"])  # there a norm follows the branch
@torch.no_grad()
def test_the_branches_are_what_the_blocks_add(family):
    model = ALL[family]()
    vit = deltavit.anatomy(model)
    silent = [After(path, Nothing(), path) for path in (*vit.attn, *vit.mlp)]
    deltavit.attach(model, Edits(lambda _: silent), classes=3)
    seen = entering(model, vit.blocks)
    assert all(torch.equal(before, after) for before, after in seen.values())


class Blinkers(nn.Module):
    """Each token attends to itself alone."""

    def __init__(self, heads, tokens):
        super().__init__()
        self.register_buffer("mask", -1e9 * (1 - torch.eye(tokens)).repeat(heads, 1, 1))

    def forward(self, x):
        return self.mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", HUGGINGFACE)
@torch.no_grad()
def test_a_mask_given_to_the_attention_is_added_to_its_scores(family, attention):
    model = RAW[family]()
    model.set_attn_implementation(attention)
    model = deltavit.load_model(model)
    vit = deltavit.anatomy(model)
    tokens = vit.prefix + vit.grid[0] * vit.grid[1]
    made = [Before(vit.attn[0], Blinkers(vit.heads, tokens), "mask", into=vit.scores)]
    deltavit.attach(model, Edits(lambda _: made), classes=3)
    (entered, left), v, o = (
        entering(model, [vit.attn[0]])[vit.attn[0]],
        *(model.get_submodule(vit.linears[0][r].path) for r in "vo"),
    )
    torch.testing.assert_close(left, o(v(entered)))


def test_an_attention_that_takes_no_such_mask_says_so():
    assert deltavit.anatomy(ALL["open_clip"]()).scores == ""
    model = huggingface_model("hf vit")
    model.config._attn_implementation = "flash_attention_2"
    assert deltavit.anatomy(deltavit.load_model(model)).scores == ""


class Insert(nn.Module):
    def __init__(self, tokens, at):
        super().__init__()
        self.tokens, self.at = nn.Parameter(tokens), at

    def forward(self, x):
        more = self.tokens.expand(len(x), -1, -1)
        return torch.cat([x[:, : self.at], more, x[:, self.at :]], 1)


class Remove(nn.Module):
    def __init__(self, count, at):
        super().__init__()
        self.count, self.at = count, at

    def forward(self, x, y):
        return torch.cat([y[:, : self.at], y[:, self.at + self.count :]], 1)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_tokens_can_be_inserted_wherever_the_anatomy_does_not_forbid_it(family):
    """Among the prefix tokens their place does not matter, for only patches have positions by then."""
    model = ALL[family]()
    vit = deltavit.anatomy(model)
    tokens, base, results = torch.randn(2, vit.width), model(x), []
    for at in sorted({min(1, vit.prefix), vit.prefix}):
        edits = [Before(vit.blocks[0], Insert(tokens, at), "in"), After(vit.blocks[-1], Remove(2, at), "out")]
        adapter = deltavit.attach(model, Edits(lambda _, e=edits: e))
        if vit.fixed_tokens:
            with pytest.raises(RuntimeError):
                model(x)
            assert vit.tables
            adapter.detach()
            return
        results.append(model(x))
        adapter.detach()
    assert not torch.allclose(results[0], base, atol=1e-4)
    torch.testing.assert_close(results[0], results[-1])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["hf vit", "hf clip with text", "open_clip", "open_clip timm siglip"])
def test_a_raw_model_names_the_way_out(family):
    with pytest.raises(ModelError, match=r"deltavit.load_model\(model\)"):
        deltavit.attach(RAW[family](), "lora", classes=3)


def resnet():
    from open_clip import model as library

    text = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1}
    return library.CLIP(16, {"layers": (1, 1, 1, 1), "width": 8, "head_width": 8, "image_size": 32}, text)


def token_features():
    return open_clip(pool_type="none")


def teacher():
    return huggingface("DeiT", "ForImageClassificationWithTeacher")


def naflex():
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    return Siglip2VisionModel(
        Siglip2VisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=3)
    )


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (resnet, "ModifiedResNet"),
        (token_features, "one feature a token"),
        (teacher, "DeiTForImageClassificationWithTeacher is refused"),
        (naflex, "Siglip2VisionModel is refused"),
        (lambda: huggingface("ViT", "Model", image_size=(16, 32)), "square"),
    ],
)
def test_what_has_no_anatomy_is_refused(build, says):
    with pytest.raises(ModelError, match=says) as refusal:
        deltavit.load_model(build())
    assert "\n" not in str(refusal.value)


def test_a_model_that_needs_no_wrapper_comes_back_as_it_is():
    model = deltavit.load_model("tiny")
    assert deltavit.load_model(model) is model
    for options in ({"weights": "random"}, {"image_size": 32}, {"normalize": True}):
        with pytest.raises(ModelError, match=r"has its own|returned as it is"):
            deltavit.load_model(model, **options)
    with pytest.raises(ModelError, match="not a Vision Transformer"):
        deltavit.load_model(nn.Linear(2, 2))


def test_importing_us_imports_neither_library():
    code = "import sys, deltavit; print([m for m in ('transformers', 'open_clip', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# --- by name ---------------------------------------------------------------------------------------------------------


def saved(family, folder, **processor):
    model = huggingface_model(family)
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.parametrize("family", HUGGINGFACE)
def test_a_local_folder_gives_the_librarys_own_answers(tmp_path, family):
    expected = own_answer(saved(family, tmp_path))
    model = deltavit.load_model(f"hf:{tmp_path}")
    vit = deltavit.anatomy(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(deltavit.load_model(f"hf:{tmp_path}", tmp_path / "model.safetensors")(x), expected)
    assert vit.name == f"hf:{tmp_path}"
    bare = deltavit.anatomy(skeleton(f"hf:{tmp_path}"))
    assert all(t.is_meta for t in bare.tensors().values())
    assert (bare.grid, bare.features, bare.linears) == (vit.grid, vit.features, vit.linears)


@pytest.mark.parametrize("family", HUGGINGFACE)
def test_another_image_size_moves_the_positions(tmp_path, family):
    theirs = saved(family, tmp_path)
    model = deltavit.load_model(f"hf:{tmp_path}", image_size=24)
    vit = deltavit.anatomy(model)
    assert (vit.grid, vit.preprocessing.size, vit.options) == ((6, 6), 24, {"image_size": 24})
    block = entering_shape(model, vit.blocks[0])
    assert block == (2, vit.prefix + 36, vit.width)
    same = deltavit.load_model(theirs, image_size=24)
    with torch.no_grad():
        torch.testing.assert_close(same(pictures(same)), model(pictures(model)))


def entering_shape(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    model(pictures(model))
    handle.remove()
    return seen[0]


def test_the_processor_says_how_pictures_are_made(tmp_path):
    said = {
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_center_crop": True,
        "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16},
    }  # fmt: skip
    saved("hf dinov2", tmp_path, **said)
    found = deltavit.anatomy(deltavit.load_model(f"hf:{tmp_path}", resize="crop")).preprocessing
    assert found == deltavit.Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "crop", 0.8)
    for family, mean in (("hf clip", 0.48145466), ("hf siglip", 0.5), ("hf dinov3", 0.485), ("hf vit", 0.5)):
        assert deltavit.anatomy(ALL[family]()).preprocessing.mean[0] == mean


def test_weights_that_do_not_fit_are_refused(tmp_path):
    saved("hf vit classifier", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name, path = f"hf:{tmp_path}", tmp_path / "w.safetensors"
    lost = {k: v.clone() for k, v in whole.items() if "layernorm_before" not in k}
    for state, says in (
        (lost, "4 tensors missing, vit.layers.0.layernorm_before"),
        ({**whole, "vit.layernorm.weight": torch.ones(3)}, "do not fit"),
        (
            {f"vit.encoder.layer.2.{k}": torch.ones(24) for k in ("layernorm_before.weight",)} | whole,
            "not in the model",
        ),
    ):
        save_file(state, path)
        with pytest.raises(ModelError, match=says) as refusal:
            deltavit.load_model(name, path)
        assert "\n" not in str(refusal.value)
    torch.save(whole, tmp_path / "w.bin")
    with pytest.raises(ModelError, match="never opens pickles"):
        deltavit.load_model(name, tmp_path / "w.bin")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "w.bin").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as refusal:
        deltavit.load_model(name)
    assert "\n" not in str(refusal.value)


def test_random_weights_are_the_same_each_time_and_need_no_file(tmp_path):
    saved("hf clip with text", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    before = torch.get_rng_state()
    one, two = (deltavit.load_model(f"hf:{tmp_path}", "random") for _ in range(2))
    assert deltavit.anatomy(one).fingerprint == deltavit.anatomy(two).fingerprint
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:google/vit-base-patch16-224-in21k", "could not be fetched"),
        ("open_clip:ViT-B-32/openai", "could not be fetched"),
        ("open_clip:ViT-B-32", "add a tag"),
        ("open_clip:ViT-B-32/openia", "did you mean 'openai'"),
        ("open_clip:ViT-B-23", "did you mean 'ViT-B-32'"),
        ("hugging:x", "known: hf, open_clip, torchvision"),
    ],
)
def test_a_name_that_cannot_be_had_is_one_clear_line(monkeypatch, tmp_path, name, says):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=says) as refusal:
        deltavit.load_model(name)
    assert "\n" not in str(refusal.value)


def test_open_clip_names_have_an_anatomy_and_a_plan():
    for name, prefix, grid in (("ViT-B-32", 1, 7), ("ViT-B-16-SigLIP", 0, 14), ("coca_ViT-B-32", 1, 7)):
        model = skeleton(f"open_clip:{name}")
        vit = deltavit.anatomy(model)
        assert (vit.name, vit.prefix, vit.grid) == (f"open_clip:{name}", prefix, (grid, grid))
        assert deltavit.plan(model, "lora").trainable_parameters == 12 * 2 * 8 * 2 * 768
    with pytest.raises(ModelError, match="not a Vision Transformer"):
        skeleton("open_clip:convnext_base")


def test_open_clip_weights_from_a_file(tmp_path):
    import open_clip as library

    config = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT_CFG}
    (tmp_path / "small-test.json").write_text(json.dumps(config))
    library.add_model_config(tmp_path)
    whole, path = open_clip(), tmp_path / "w.safetensors"
    state = {k: v.contiguous() for k, v in whole.state_dict().items()}
    save_file(state, path)
    model = deltavit.load_model("open_clip:small-test", path)
    with torch.no_grad():
        torch.testing.assert_close(model(x), own_answer(whole))
    larger = deltavit.load_model("open_clip:small-test", path, image_size=24, normalize=True)
    vit = deltavit.anatomy(larger)
    assert (vit.grid, vit.options) == ((6, 6), {"image_size": 24, "normalize": True})
    assert torch.allclose(larger(pictures(larger)).norm(dim=-1), torch.ones(2))
    del state["visual.ln_post.weight"]
    save_file(state, path)
    with pytest.raises(ModelError, match=r"w.safetensors does not fit small-test: 1 tensors missing, ln_post.weight"):
        deltavit.load_model("open_clip:small-test", path)
    assert F.mse_loss(*(deltavit.load_model("open_clip:small-test", "random")(x) for _ in range(2))) == 0


def test_a_merged_tower_is_a_file_of_its_own_library(tmp_path):
    from safetensors.torch import load_file

    from deltavit.train.merge import merge_to_file

    raw = huggingface_model("hf vit")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = deltavit.load_model(raw)
    adapter = deltavit.attach(model, "lora", classes=3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        expected = model(x)
    merge_to_file(model, adapter, tmp_path / "merged.safetensors")
    state = load_file(tmp_path / "merged.safetensors")
    head = torch.nn.Linear(24, 3)
    head.load_state_dict({n.removeprefix("head."): state.pop(n) for n in ("head.weight", "head.bias")})
    fresh = huggingface_model("hf vit")
    left = fresh.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    with torch.no_grad():
        found = head(fresh(x).last_hidden_state[:, 0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
