"""Small members of each model family, built from configuration with numbers that hide nothing."""

import families_hf
import timm
import torch
import torchvision.models as tv

import deltavit
from deltavit.core.site import Preprocessing

ViT = timm.models.vision_transformer.VisionTransformer
Eva = timm.models.eva.Eva
Beit = timm.models.beit.Beit
SIZES = {"embed_dim": 24, "num_classes": 7}


def small(kind, **options):
    return stirred(lambda: kind(img_size=16, patch_size=4, depth=2, num_heads=3, **SIZES, **options))


def swin(kind, **options):
    return stirred(lambda: kind(depths=(2, 1), num_heads=(3, 6), **SIZES, **options))


def timm_swin(version):
    return swin(version, img_size=16, patch_size=2, window_size=4)


def torchvision_swin(**options):
    model = swin(
        tv.SwinTransformer, patch_size=[2, 2], window_size=[4, 4], stochastic_depth_prob=0.0, **options
    )  # fmt: skip
    model.preprocessing = Preprocessing(size=16)
    return model


def torchvision_vit():
    return stirred(
        lambda: tv.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=7
        )
    )


def stirred(build):
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for p in model.parameters():  # no zero biases, no unit norms: they would hide a mistake
            p.add_(0.05 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


FAMILIES = {
    "tiny": lambda: deltavit.load_model("tiny"),
    "vit": lambda: small(ViT),
    "deit3": lambda: small(ViT, init_values=0.1, no_embed_class=True),
    "dinov2 with registers": lambda: small(ViT, reg_tokens=4, init_values=0.1, no_embed_class=True),
    "clip": lambda: small(ViT, pre_norm=True),
    "siglip": lambda: small(ViT, class_token=False, global_pool="map"),
    "post-norm": lambda: small(ViT, block_fn=timm.models.vision_transformer.ResPostBlock, global_pool="avg"),
    "eva": lambda: small(Eva, qkv_fused=True, init_values=0.1),
    "eva02": lambda: small(
        Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True
    ),
    "beit": lambda: small(Beit, use_rel_pos_bias=True, init_values=0.1),
    "swin": lambda: timm_swin(timm.models.swin_transformer.SwinTransformer),
    "swin v2": lambda: timm_swin(timm.models.swin_transformer_v2.SwinTransformerV2),
    "torchvision vit": torchvision_vit,
    "torchvision swin": torchvision_swin,
    "torchvision swin v2": lambda: torchvision_swin(
        block=tv.swin_transformer.SwinTransformerBlockV2, downsample_layer=tv.swin_transformer.PatchMergingV2
    ),
}
FAMILIES |= families_hf.FAMILIES
