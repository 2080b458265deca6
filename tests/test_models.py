"""`load_model`: real names, local weights, interpolation, and what it refuses."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
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
    assert deltavit.plan(model, "lora").trainable_parameters == depth * 2 * 8 * 2 * width
    assert all(deltavit.plan(model, m).mergeable for m in ("bitfit", "kadaptation", "attention"))


def test_preprocessing_is_what_the_checkpoint_was_trained_with():
    clip = deltavit.anatomy(skeleton("vit_base_patch32_clip_224.openai")).preprocessing
    assert (clip.size, clip.interpolation) == (224, "bicubic")
    assert clip.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    augreg = deltavit.anatomy(skeleton("vit_base_patch16_224.augreg_in21k")).preprocessing
    assert (augreg.mean, augreg.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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
