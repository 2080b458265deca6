"""PACE: two passes with multiplicative noise on what the adapter adds, and a penalty on their difference."""

import pytest
import torch
from families import FAMILIES

import deltavit
from deltavit.core.contract import pictures as random_pictures
from deltavit.core.contract import stir
from deltavit.core.errors import MethodError


def attached(name="lora", **options):
    model = FAMILIES["vit"]()
    adapter = deltavit.attach(model, deltavit.method(name, **options), classes=5)
    stir(adapter)
    return model, adapter, random_pictures(model, 4)


@pytest.mark.parametrize("name", ["lora", "fact-tt", "pfeiffer", "adaptformer", "repadapter", "ssf"])
def test_noise_is_on_what_the_adapter_adds_and_only_in_training(name):
    if name == "ssf":
        model, adapter, _ = attached(name)
        with pytest.raises(MethodError, match="adds to activations, which ssf"), adapter.noisy(1.0):
            pass
        return
    model, adapter, x = attached(name, **({"rank": 2} if name == "fact-tt" else {}))
    quiet = model(x)
    with adapter.noisy(1.0) as source:
        assert torch.equal(model(x), quiet)  # eval
        model.train()
        source.manual_seed(0)
        one, two = model(x), model(x)
        source.manual_seed(0)
        again = model(x)
        model.eval()
    assert not torch.allclose(one, two)
    assert torch.equal(one, again)
    assert torch.equal(model(x), quiet)
    with adapter.noisy(0.0):
        torch.testing.assert_close(model.train()(x), quiet, atol=1e-5, rtol=0)


def test_the_noise_is_one_plus_sigma_z_for_each_picture_and_channel_of_later_blocks():
    model, adapter, x = attached(where={"roles": ["o"]})
    seen = []
    host = model.blocks[1].attn.proj

    def look(module, args, y):
        seen.append(y.detach())

    with adapter.noisy(0.5) as source:
        handles = [host.register_forward_hook(look)]
        model.train()
        source.manual_seed(3)
        model(x)
        handles[0].remove()
    z = 1 + 0.5 * torch.randn(4, 1, 24, generator=torch.Generator().manual_seed(3))
    # block 0 has no noise, so what enters block 1 is the quiet one's
    inputs = []
    handle = host.register_forward_pre_hook(lambda m, a: inputs.append(a[0].detach()))
    model.eval()(x)
    handle.remove()
    up, down = adapter.tensors()["blocks.1.o.up"], adapter.tensors()["blocks.1.o.down"]
    base_y = torch.nn.functional.linear(inputs[0], host.weight, host.bias)
    torch.testing.assert_close(seen[0], base_y + z * (inputs[0] @ down.t() @ up.t()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bitfit", "vpt-deep", "rlrr", "linear"])
def test_what_adds_nothing_to_activations_is_refused(name):
    _, adapter, _ = attached(name)
    with pytest.raises(MethodError, match="PACE needs a change that adds to activations"), adapter.noisy(1.0):
        pass


def test_training_with_pace_keeps_the_two_passes_together(pictures):
    data = deltavit.open_data(pictures)
    gaps = {}
    for weight in (0.0, 5.0):
        model = deltavit.load_model("vit_pico")
        train = deltavit.Images(data.train, deltavit.anatomy(model).preprocessing)
        adapter = deltavit.attach(model, deltavit.method("lora", rank=4), classes=data.classes)
        training = deltavit.Training(epochs=20, lr=1e-2, pace=weight, pace_noise=1.0, precision="fp32")
        losses = [step.loss for step in deltavit.fit(model, adapter, train, None, training)]
        assert losses[-1] < losses[0]
        x = random_pictures(model, 16)
        with adapter.noisy(1.0), torch.no_grad():
            model.train()
            gaps[weight] = (model(x) - model(x)).square().sum(1).mean().item()
    assert gaps[5.0] < gaps[0.0] / 2, gaps
