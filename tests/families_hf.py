"""Small members of the transformers and open_clip families, built from configuration; nothing is fetched."""

import functools

import torch

import deltavit

SIZES = {
    "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_labels": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48, "vocab_size": 64,
    "max_position_embeddings": 12, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0, "projection_size": 24,
}  # fmt: skip


def shaken(model):
    """No zero biases, no unit norms: they would hide a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def huggingface(family, kind, **options):
    """A model of transformers by its family's prefix and the rest of its class name."""
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES, **({} if family.startswith("Dinov2") else {"intermediate_size": 96}), **options}
    name = {"CLIP": "CLIPVision", "Siglip": "SiglipVision"}.get(family, family) + "Config"
    config = getattr(transformers, name)(**sizes)
    if family in ("CLIP", "Siglip") and kind in ("Model", "ForImageClassification"):
        more = {"projection_dim": 20} if family == "CLIP" else {}
        whole = getattr(transformers, f"{family}Config")
        config = whole(vision_config=config.to_dict(), text_config=TEXT, num_labels=7, **more)
    return shaken(getattr(transformers, family + kind)(config))


VISION = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 2, "head_width": 8}
TEXT_CFG = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1}


def open_clip(kind="CLIP", init_logit_bias=None, **vision):
    """A model of open_clip with both towers; `timm` is a trunk of that library."""
    from open_clip import model as library

    torch.manual_seed(0)
    made = getattr(library, kind)(20, {**VISION, **vision}, TEXT_CFG, init_logit_bias=init_logit_bias)
    return shaken(made)


def timm_trunk(pool="map", proj="none"):
    """open_clip around a small trunk of timm; its models are made by name, so the trunk is put in afterwards."""
    import timm
    from open_clip.timm_model import TimmModel

    made = open_clip("CustomTextCLIP", init_logit_bias=-10.0)
    torch.manual_seed(0)
    tower = TimmModel("test_vit", 20, image_size=16, pool=pool, proj=proj)
    tower.trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0, global_pool=pool,
        class_token=pool != "map",
    )  # fmt: skip
    if proj == "linear":
        tower.head.proj = torch.nn.Linear(24, 20, bias=False)
    made.visual = shaken(tower)
    return made


HUGGINGFACE = {
    "hf vit": ("ViT", "Model"),
    "hf vit classifier": ("ViT", "ForImageClassification"),
    "hf deit": ("DeiT", "Model"),
    "hf deit classifier": ("DeiT", "ForImageClassification"),
    "hf dinov2": ("Dinov2", "Model"),
    "hf dinov2 classifier": ("Dinov2", "ForImageClassification"),
    "hf dinov2 registers": ("Dinov2WithRegisters", "Model"),
    "hf dinov2 registers classifier": ("Dinov2WithRegisters", "ForImageClassification"),
    "hf dinov2 gated": ("Dinov2", "Model", {"use_swiglu_ffn": True}),
    "hf dinov3": ("DINOv3ViT", "Model", {"num_register_tokens": 4}),
    "hf dinov3 gated": ("DINOv3ViT", "Model", {"use_gated_mlp": True, "mlp_bias": False}),
    "hf beit": ("Beit", "Model", {"use_relative_position_bias": True}),
    "hf beit classifier": ("Beit", "ForImageClassification", {"use_shared_relative_position_bias": True}),
    "hf clip": ("CLIP", "VisionModel"),
    "hf clip projection": ("CLIP", "VisionModelWithProjection", {"projection_dim": 20}),
    "hf clip with text": ("CLIP", "Model"),
    "hf clip classifier": ("CLIP", "ForImageClassification"),
    "hf siglip": ("Siglip", "VisionModel"),
    "hf siglip with text": ("Siglip", "Model"),
    "hf siglip classifier": ("Siglip", "ForImageClassification"),
}


def huggingface_model(name):
    family, kind, *options = HUGGINGFACE[name]
    return huggingface(family, kind, **(options[0] if options else {}))


CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
OPEN_CLIP = {
    "open_clip": open_clip,
    "open_clip layer scale": lambda: open_clip("CustomTextCLIP", ls_init_value=0.1, pool_type="avg"),
    "open_clip custom": lambda: open_clip(**CUSTOM),
    "open_clip attention pool": lambda: open_clip(attentional_pool=True, attn_pooler_queries=1, attn_pooler_heads=2),
    "open_clip timm siglip": timm_trunk,
    "open_clip timm projected": lambda: timm_trunk("token", "linear"),
}

RAW = {**{name: functools.partial(huggingface_model, name) for name in HUGGINGFACE}, **OPEN_CLIP}
ALL = {name: (lambda build=build: deltavit.load_model(build())) for name, build in RAW.items()}
FAMILIES = {
    name: ALL[name]
    for name in (
        "hf vit", "hf dinov2 registers classifier", "hf dinov3", "hf beit", "hf clip with text", "hf siglip",
        "open_clip", "open_clip custom", "open_clip timm siglip",
    )
}  # fmt: skip
