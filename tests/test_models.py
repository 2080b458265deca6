"""`load_model`: real names, local weights, interpolation, and what it refuses."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models as tv
from safetensors.torch import save_file

import deltavit
from deltavit.core.errors import ModelError
from deltavit.models import skeleton

SHARED = Path(deltavit.__file__).parents[2] / "shared" / "weights" / "deit_tiny_patch16_224.safetensors"


@pytest.mark.parametrize(
    ("name", "width", "depth", "prefix", "grid", "norms"),
    [
        ("vit_base_patch16_224.augreg_in21k", 768, 12, 1, 14, 25),
        ("deit_small_patch16_224", 384, 12, 1, 14, 25),
        ("vit_base_patch14_reg4_dinov2", 768, 12, 5, 37, 25),
        ("vit_base_patch32_clip_224", 768, 12, 1, 7, 26),
        ("vit_base_patch16_siglip_224", 768, 12, 0, 14, 26),
        ("eva02_base_patch14_224", 768, 12, 1, 16, 37),
        ("eva02_tiny_patch14_224", 192, 12, 1, 16, 25),
        ("eva_giant_patch14_224", 1408, 40, 1, 16, 81),
        ("vit_small_patch16_dinov3", 384, 12, 5, 16, 25),
        ("beit_base_patch16_224", 768, 12, 1, 14, 25),
        ("swin_tiny_patch4_window7_224", 96, 12, 0, 56, 29),
        ("swinv2_tiny_window8_256", 96, 12, 0, 64, 29),
        ("torchvision:vit_b_32", 768, 12, 1, 7, 25),
        ("torchvision:swin_t", 96, 12, 0, 56, 29),
        ("torchvision:swin_v2_t", 96, 12, 0, 64, 29),
    ],
)
def test_real_names_have_an_anatomy_and_a_plan(name, width, depth, prefix, grid, norms):
    model = skeleton(name)
    vit = deltavit.anatomy(model)
    assert (vit.width, len(vit.blocks), vit.prefix, vit.grid, len(vit.norms)) == (
        width,
        depth,
        prefix,
        (grid, grid),
        norms,
    )
    assert deltavit.plan(model, "lora").trainable_parameters == sum(2 * 8 * 2 * width for width in vit.widths)
    assert len(vit.widths) == depth
    assert all(deltavit.plan(model, m).mergeable for m in ("bitfit", "kadaptation", "attention"))


def test_preprocessing_is_what_the_checkpoint_was_trained_with():
    clip = deltavit.anatomy(skeleton("vit_base_patch32_clip_224.openai")).preprocessing
    assert (clip.size, clip.interpolation) == (224, "bicubic")
    assert clip.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    augreg = deltavit.anatomy(skeleton("vit_base_patch16_224.augreg_in21k")).preprocessing
    assert (augreg.mean, augreg.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_swin_has_windows_and_widths_and_refuses_tokens():
    vit = deltavit.anatomy(skeleton("swin_s3_tiny_224"))
    assert vit.widths == [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert vit.windows == [(7, 7)] * 4 + [(14, 14)] * 6 + [(7, 7)] * 2
    assert [g for g, _ in vit.grids] == [56] * 2 + [28] * 2 + [14] * 6 + [7] * 2
    assert vit.fixed_tokens == "its attention is windowed"


def test_fact_shares_its_factors_within_a_width():
    model, rank = skeleton("swin_tiny_patch4_window7_224"), 4
    blocks = {96: 2, 192: 2, 384: 6, 768: 2}
    made = deltavit.plan(model, deltavit.method("fact-tt", rank=rank))
    assert made.trainable_parameters == sum(2 * D * rank + 12 * L * rank**2 for D, L in blocks.items())
    assert {n: s for n, s in made.shapes.items() if n.endswith(".u")} == {
        f"shared.{i}.u": (rank, D) for i, D in enumerate(blocks)
    }
    made = deltavit.plan(model, deltavit.method("fact-tk", rank=rank))
    assert made.trainable_parameters == sum(2 * D * rank + rank**3 + 12 * L * rank for D, L in blocks.items())
    assert made.shapes["shared.2.positions"] == (12 * 6, rank)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_torchvision_gives_its_own_outputs_from_safetensors(tmp_path, name):
    torch.manual_seed(0)
    theirs = tv.get_model(name, weights=None, num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = deltavit.load_model(f"torchvision:{name}", tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).shape == (1, 7)
        ours.train()
        assert torch.equal(ours(x), theirs(x))  # no path is dropped
    preset = next(iter(tv.get_model_weights(name))).transforms()
    found = deltavit.anatomy(ours).preprocessing
    assert (list(found.mean), list(found.std), found.interpolation) == (
        preset.mean,
        preset.std,
        preset.interpolation.value,
    )
    assert found.size / found.crop == pytest.approx(preset.resize_size[0])


def test_torchvision_at_another_size_moves_positions_as_torchvision_does(tmp_path):
    theirs = tv.get_model("vit_b_32", weights=None)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = deltavit.load_model("torchvision:vit_b_32", tmp_path / "w.safetensors", image_size=96)
    moved = tv.vision_transformer.interpolate_embeddings(96, 32, theirs.state_dict())["encoder.pos_embedding"]
    assert torch.equal(ours.encoder.pos_embedding, moved)
    assert deltavit.anatomy(ours).grid == (3, 3)
    assert deltavit.anatomy(ours).preprocessing.size == 96


def test_torchvision_refuses_pickles_strangers_and_what_does_not_fit(tmp_path):
    with pytest.raises(
        ModelError, match=r"pickles, which deltavit never opens: convert them .* or take the same model"
    ):
        deltavit.load_model("torchvision:vit_b_16")
    with pytest.raises(ModelError, match="no model of torchvision named 'vit_b_17'; did you mean 'vit_b_16'"):
        deltavit.load_model("torchvision:vit_b_17", "random")
    with pytest.raises(ModelError, match="'resnet50'"):
        deltavit.load_model("torchvision:resnet50", "random")
    save_file({"class_token": torch.ones(1, 1, 768)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="does not fit vit_b_32: 151 tensors missing"):
        deltavit.load_model("torchvision:vit_b_32", tmp_path / "w.safetensors")


def test_swin_takes_local_weights_with_another_head(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = deltavit.load_model("swin_tiny_patch4_window7_224", tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def small_state(path, **changes):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()} | changes
    save_file({k: v for k, v in state.items() if v is not None}, path)
    return model


def test_local_weights_give_timms_own_outputs_head_included(tmp_path):
    theirs = small_state(tmp_path / "w.safetensors")
    ours = deltavit.load_model("vit_tiny_patch16_224", tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())


def test_another_image_size_interpolates_positions_as_timm_does(tmp_path):
    theirs = small_state(tmp_path / "w.safetensors")
    ours = deltavit.load_model("vit_tiny_patch16_224", tmp_path / "w.safetensors", image_size=112)
    theirs.set_input_size(112)
    assert torch.allclose(ours.pos_embed, theirs.pos_embed, atol=1e-6)
    assert deltavit.anatomy(ours).preprocessing.size == 112
    assert deltavit.anatomy(ours).options == {"image_size": 112}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm.weight": None}, "1 tensors missing, norm.weight"),
        ({"blocks.12.norm1.weight": torch.ones(192)}, "1 tensors not in the model"),
        ({"blocks.0.attn.qkv.weight": torch.ones(192, 192)}, "1 tensors other shapes"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, says):
    small_state(tmp_path / "w.safetensors", **changes)
    with pytest.raises(ModelError, match=says):
        deltavit.load_model("vit_tiny_patch16_224", tmp_path / "w.safetensors")


def test_a_pickle_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"head.weight": torch.ones(1)}, path)
    monkeypatch.setattr(pickle, "Unpickler", None)
    with pytest.raises(ModelError, match="never opens pickles"):
        deltavit.load_model("vit_tiny_patch16_224", path)
    with pytest.raises(ModelError, match="no weights at"):
        deltavit.load_model("vit_tiny_patch16_224", tmp_path / "absent.safetensors")


@pytest.mark.skipif(not SHARED.exists(), reason="the pretrained DeiT-Tiny is not beside the checkout")
def test_the_pretrained_deit_loads_whole_at_two_sizes():
    whole, half = (deltavit.load_model("deit_tiny_patch16_224", SHARED, image_size=size) for size in (None, 112))
    assert sum(p.numel() for p in whole.parameters()) == 5_717_416
    assert half.pos_embed.shape == (1, 50, 192)
    assert torch.equal(whole.blocks[3].mlp.fc1.weight, half.blocks[3].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("pixels", "mean", "std"),
    [("half", 0.5, 0.5), ("none", 0.0, 1.0), ("imagenet", 0.485, 0.229), ("clip", 0.4815, 0.2686)],
)
def test_pixels_are_normalised_as_asked_and_the_adapter_remembers(tmp_path, pixels, mean, std):
    model = deltavit.load_model("vit_pico", pixels=pixels)
    pre = deltavit.anatomy(model).preprocessing
    assert (pre.mean[0], pre.std[0]) == pytest.approx((mean, std), abs=1e-4)
    deltavit.attach(model, "linear", classes=["a", "b"]).save(tmp_path / "a.safetensors")
    assert deltavit.load(tmp_path / "a.safetensors", deltavit.load_model("vit_pico")).preprocessing == pre
    with pytest.raises(ModelError, match="did you mean 'imagenet'"):
        deltavit.load_model("vit_pico", pixels="imagnet")
