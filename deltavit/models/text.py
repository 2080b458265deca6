"""`text_head`: a head that starts from the class names, for image towers that were trained beside a text tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ModelError
from . import huggingface, openclip
from .weights import first_line

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@torch.no_grad()
def text_head(
    model: nn.Module,
    classes: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    tokenizer: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The zero-shot classifier of a CLIP or SigLIP model as (weight [classes, features], bias [classes]).

    Over features of length 1 (`load_model(model, normalize=True)`) it gives the model's own logits: row c is
    exp(logit scale) times the mean, brought to length 1, of the embeddings of all templates filled with class c; the
    bias is SigLIP's logit bias, and zero in CLIP.

        weight, bias = deltavit.text_head(clip, classes)
        vit = deltavit.load_model(clip, normalize=True)
        adapter = deltavit.attach(vit, "lora", classes=classes, head=(weight, bias))

    Args:
        model: the whole model, text tower included: transformers' CLIPModel or SiglipModel, open_clip's CLIP or
            CustomTextCLIP.
        classes: their names; an underscore is read as a space.
        templates: sentences with one `{}`. One is the CLIP paper's default; its ImageNet figures average 80.
        tokenizer: None takes the model's own. Else transformers' kind, or for open_clip a function from a list of
            texts to token ids [texts, length].

    Raises:
        ModelError: no text tower, or no tokenizer to be had.
        ValueError: no class, no template, or a template without `{}`.

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.4; Zhai et al. 2023, arXiv:2303.15343, Algorithm 1.
    """
    if not classes or not templates:
        raise ValueError(f"text_head needs classes and templates, got {len(classes)} and {len(templates)}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the name of the class")
    embed = _embedder(model, tokenizer)
    was_training = model.training
    model.eval()
    rows = []
    for name in classes:
        each = F.normalize(embed([t.format(name.replace("_", " ")) for t in templates]), dim=-1)
        rows.append(F.normalize(each.mean(0), dim=-1))
    model.train(was_training)
    scale: Any = model.logit_scale
    bias: Any = getattr(model, "logit_bias", None)
    weight = scale.exp() * torch.stack(rows)
    return weight, weight.new_zeros(len(classes)) + (0 if bias is None else bias)


def _embedder(model: Any, tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """A function from texts to their embeddings [texts, features]."""
    device = next(model.parameters()).device
    if huggingface.owns(model) and hasattr(model, "get_text_features"):
        tokenizer = tokenizer or _tokenizer(model)
        length = model.config.text_config.max_position_embeddings

        def embed(texts: list[str]) -> Tensor:
            # all padded to the full length, as SigLIP was trained; in CLIP no token looks at what comes after it
            found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            return model.get_text_features(found["input_ids"].to(device)).pooler_output  # type: ignore[no-any-return]

        return embed
    if openclip.owns(model) and hasattr(model, "encode_text"):
        tokenizer = tokenizer or _simple_tokenizer(model)
        return lambda texts: model.encode_text(tokenizer(texts).to(device))  # type: ignore[no-any-return]
    raise ModelError(
        f"{type(model).__name__} has no text tower: give the whole CLIP or SigLIP model, before load_model"
    )


def _tokenizer(model: Any) -> Any:
    import transformers

    name = model.name_or_path
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and a dozen kinds of the hub's client
        raise ModelError(
            f"no tokenizer for {name or type(model).__name__} ({first_line(error)[:120]}): give tokenizer=..."
        ) from None


def _simple_tokenizer(model: Any) -> Any:
    import open_clip  # type: ignore[import-untyped]

    known = open_clip.SimpleTokenizer(context_length=model.context_length)
    if known.vocab_size != model.vocab_size:
        raise ModelError(
            f"the text tower has {model.vocab_size} tokens, CLIP's tokenizer {known.vocab_size}: "
            "give tokenizer=open_clip.get_tokenizer(NAME)"
        )
    return known
