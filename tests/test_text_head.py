"""`text_head` gives the zero-shot logits of the model that the texts come from."""

import pytest
import torch
from families_hf import TEXT_CFG, VISION, huggingface_model, open_clip, shaken, timm_trunk
from torch.nn import functional as F

import deltavit
from deltavit.core.errors import ModelError
from deltavit.models.text import text_head

CLASSES = ["tabby_cat", "dog", "red kite"]
LENGTH = 12


class Words:
    """A word is the sum of its letters; begin 62, end 63, padding 0, as in the small text towers."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = []
        for text in texts:
            words = [1 + sum(map(ord, word)) % 61 for word in text.split()]
            row = [62, *words[: max_length - 2], 63]
            rows.append(row + [0] * (max_length - len(row)))
        return {"input_ids": torch.tensor(rows)}


def ids(texts):
    """The same for open_clip, whose tokenizers know their length."""
    return Words()(texts, "max_length", True, LENGTH, "pt")["input_ids"]


def logits_of_huggingface(model, x, texts):
    return model(input_ids=ids(texts), pixel_values=x).logits_per_image


def logits_of_open_clip(model, x, texts):
    return model.get_logits(x, ids(texts))[0]


MODELS = {
    "transformers CLIP": (lambda: huggingface_model("hf clip with text"), Words(), logits_of_huggingface),
    "transformers SigLIP": (lambda: huggingface_model("hf siglip with text"), Words(), logits_of_huggingface),
    "open_clip CLIP": (open_clip, ids, logits_of_open_clip),
    "open_clip SigLIP": (lambda: open_clip("CustomTextCLIP", init_logit_bias=-10.0), ids, logits_of_open_clip),
    "open_clip around timm": (lambda: timm_trunk("token", "linear"), ids, logits_of_open_clip),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_zero_shot_logits_are_the_models_own(name):
    build, tokenizer, own = MODELS[name]
    model = build()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = own(model, x, [f"a photo of a {c.replace('_', ' ')}." for c in CLASSES])
    head = text_head(model, CLASSES, tokenizer=tokenizer)
    vit = deltavit.load_model(model, normalize=True)
    deltavit.attach(vit, "linear", classes=CLASSES, head=head)
    torch.testing.assert_close(vit(x), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(1).min() > 1e-3  # the classes differ, so that something was compared


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_templates_are_averaged_between_two_normalisations(name):
    build, tokenizer, _ = MODELS[name]
    model, templates = build(), ["a photo of a {}.", "the {} at night", "{}"]
    weight, bias = text_head(model, CLASSES, templates, tokenizer)
    for c, row in zip(CLASSES, weight, strict=True):
        mean = 0
        for template in templates:
            tokens = ids([template.format(c.replace("_", " "))])
            open_clips = hasattr(model, "encode_text")
            e = model.encode_text(tokens)[0] if open_clips else model.get_text_features(tokens).pooler_output[0]
            mean = mean + e / e.norm() / 3
        torch.testing.assert_close(row, model.logit_scale.exp() * mean / mean.norm())
    own = getattr(model, "logit_bias", None)
    assert torch.equal(bias, torch.full((3,), 0.0 if own is None else own.item()))
    assert not weight.requires_grad


@torch.no_grad()
def test_the_tokenizer_is_found_beside_a_saved_model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPModel, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "a", "photo", "of", "cat", "dog", "."])}
    tokenizer = Tokenizer(models.WordLevel({**words, "<unk>": 61}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = huggingface_model("hf clip with text")
    model.save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    expected = text_head(model, ["cat", "dog"], tokenizer=fast)
    found = text_head(CLIPModel.from_pretrained(tmp_path), ["cat", "dog"])
    torch.testing.assert_close(found, expected)
    with pytest.raises(ModelError, match=r"no tokenizer for CLIPModel .*give tokenizer=") as refusal:
        text_head(model, ["cat", "dog"])
    assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_open_clips_own_tokenizer_is_taken_where_it_fits():
    import open_clip as library

    torch.manual_seed(0)
    model = shaken(library.CLIP(20, VISION, {**TEXT_CFG, "vocab_size": 49408}))
    e = F.normalize(model.encode_text(library.SimpleTokenizer(context_length=LENGTH)(["a photo of a cat."])), dim=-1)
    torch.testing.assert_close(text_head(model, ["cat"])[0], model.logit_scale.exp() * e)
    with pytest.raises(ModelError, match="has 64 tokens, CLIP's tokenizer 49408: give tokenizer="):
        text_head(open_clip(), ["cat"])


def test_what_has_no_text_tower_is_refused():
    model = huggingface_model("hf clip")
    for given in (model, deltavit.load_model(model), deltavit.load_model("tiny")):
        with pytest.raises(ModelError, match="has no text tower"):
            text_head(given, CLASSES, tokenizer=Words())
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        text_head(model, CLASSES, ["a photo"])
    for classes, templates in (([], ["{}"]), (CLASSES, [])):
        with pytest.raises(ValueError, match="needs classes and templates"):
            text_head(model, classes, templates)
