"""Parameter counts, against the closed formulas and the published ones, on full-size models without weights."""

import functools

import pytest
from facts import FACTS

import deltavit
from deltavit.models import skeleton

base = functools.cache(skeleton)


@pytest.mark.parametrize(("name", "options", "model", "count", "source"), FACTS)
def test_count_is_the_formulas(name, options, model, count, source):
    assert deltavit.plan(base(model), deltavit.method(name, **options)).trainable_parameters == count, source


def test_every_method_has_a_fact():
    assert {part for name, *_ in FACTS for part in name.split("+")} == set(deltavit.methods())


def test_mean_head_over_vtab_is_38045():
    classes = [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    heads = [deltavit.plan(base("vit_base_patch16_224"), deltavit.method("linear"), c).head_parameters for c in classes]
    assert round(sum(heads) / len(heads)) == 38_045


def test_no_weights_are_allocated():
    model = base("vit_giant_patch14_dinov2")
    assert all(p.is_meta for p in model.parameters())
    assert deltavit.plan(model, deltavit.method("lora")).trainable_parameters == 40 * 2 * 8 * 2 * 1536
