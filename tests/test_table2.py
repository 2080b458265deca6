"""Table 2 of the Kronecker paper (arXiv:2203.16329): the cells of its parameter column that can be decoded.

Its heads are the mean over CIFAR-10, CIFAR-100 and SUN-397 of C(D + 1).  Several CLIP cells were counted at the width
of the text tower, 512 with 8 heads, on a 7 x 7 grid.  Cells that no setting gives (BitFit 349,701, RPB 201,704, both of
Kronecker Adaptation, ..) are left alone.
"""

import functools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import deltavit
from deltavit.models import skeleton

CLASSES = (10, 100, 397)
BLOCKS = {"where": {"blocks": list(range(12))}}
base = functools.cache(skeleton)


@functools.cache
def of_width_512():
    with torch.device("meta"):
        return VisionTransformer(img_size=224, patch_size=32, embed_dim=512, depth=12, num_heads=8)


def body(model, name, options):
    return deltavit.plan(model, deltavit.method(name, **options)).trainable_parameters


def mean_head(width):
    return sum(classes * (width + 1) for classes in CLASSES) // len(CLASSES)


def test_the_mean_heads():
    plans = [deltavit.plan(base("vit_base_patch16_224"), "linear", classes) for classes in CLASSES]
    assert sum(p.head_parameters for p in plans) // 3 == mean_head(768) == 129_961
    assert mean_head(512) == 86_697


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("adapterdrop", {"rank": 64, "norm": True}, 230_633),
        ("lora", {"rank": 4}, 277_417),
        ("lora-fix", {"rank": 4}, 203_689),
        ("layernorm", {"which": "final"}, 131_497),
        ("attention", {}, 28_478_377),  # printed as 284,783,77
    ],
)
def test_supervised_column(name, options, published):
    assert body(base("vit_base_patch16_224"), name, options) + mean_head(768) == published


def test_supervised_full_counts_an_unused_head():
    assert body(base("vit_base_patch16_224"), "full", {}) + 1000 * 769 + mean_head(768) == 86_697_617


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("linear", {}, 86_697),
        ("lora", {"rank": 4}, 185_001),
        ("lora-fix", {"rank": 4}, 135_849),
        ("lepe", BLOCKS, 148_137),
        ("rpb", BLOCKS, 102_921),
    ],
)
def test_clip_column_at_the_text_towers_width(name, options, published):
    assert body(of_width_512(), name, options) + mean_head(512) == published


def test_clip_layernorm_is_the_two_outer_norms():
    assert body(base("vit_base_patch32_clip_224"), "layernorm", {"which": "outer"}) + mean_head(512) == 89_769


def test_clip_bitfit_is_the_supervised_value_with_an_unused_head():
    assert body(base("vit_base_patch16_224"), "bitfit", {}) + 1000 + mean_head(768) == 233_873


def test_clip_full_and_attention_count_both_towers():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, device="meta")
    assert sum(p.numel() for p in clip.parameters()) + mean_head(512) == 151_364_010
    towers = [m for m in clip.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert sum(p.numel() for m in towers for p in m.parameters()) + mean_head(512) == 41_042_601
