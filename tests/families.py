"""Small members of each model family, built from configuration with numbers that hide nothing."""

import timm
import torch

import deltavit

ViT = timm.models.vision_transformer.VisionTransformer
Eva = timm.models.eva.Eva
Beit = timm.models.beit.Beit


def small(kind, **options):
    torch.manual_seed(0)
    model = kind(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=7, **options)
    with torch.no_grad():
        for p in model.parameters():  # no zero biases, no unit norms: they would hide a mistake
            p.add_(0.05 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


FAMILIES = {
    "tiny": lambda: deltavit.load_model("tiny"),
    "vit": lambda: small(ViT),
    "dinov2 with registers": lambda: small(ViT, reg_tokens=4, init_values=0.1, no_embed_class=True),
    "clip": lambda: small(ViT, pre_norm=True),
    "siglip": lambda: small(ViT, class_token=False, global_pool="map"),
    "eva": lambda: small(Eva, qkv_fused=True, init_values=0.1),
    "eva02": lambda: small(Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "beit": lambda: small(Beit, use_rel_pos_bias=True, init_values=0.1),
}
