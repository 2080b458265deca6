"""Corrupted pictures: deterministic, harsher with severity, and the clean ones left alone."""

import itertools

import pytest
import torch

import deltavit
from deltavit.analysis.corrupt import LEVELS, Corrupted, corrupt, robustness
from deltavit.core.errors import DataError
from deltavit.core.site import Preprocessing
from deltavit.data import Images, open_data
from deltavit.train import evaluate


@pytest.fixture(scope="module")
def waves():
    """Two pictures of 64 x 64, soft waves with a texture on them, uint8."""
    at = torch.linspace(0, 6, 64)
    soft = torch.stack([(at.sin()[:, None] + at.cos()[None] * k) * 40 + 128 for k in (0.5, 1.0, 1.5)])
    texture = 25 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return (soft + texture).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", LEVELS)
def test_each_severity_moves_pictures_further_than_the_one_before(name, waves):
    before = waves.clone()
    off = [(corrupt(waves, name, s, indices=[0, 1]).float() - waves.float()).square().mean() for s in range(1, 6)]
    assert torch.equal(waves, before)
    assert off[0] > 0
    assert all(a < b for a, b in itertools.pairwise(off)), off


@pytest.mark.parametrize("name", LEVELS)
def test_a_corrupted_picture_follows_from_seed_and_index_alone(name, waves):
    torch.manual_seed(0)
    both = corrupt(waves, name, 3, seed=5, indices=[7, 9])
    state = torch.get_rng_state()
    alone = corrupt(waves[1:], name, 3, seed=5, indices=[9])
    assert both.dtype == torch.uint8
    assert both.shape == waves.shape
    assert torch.equal(both[1:], alone)
    assert torch.equal(torch.get_rng_state(), state)
    if name.endswith("noise"):
        assert not torch.equal(alone, corrupt(waves[1:], name, 3, seed=6, indices=[9]))
        assert not torch.equal(alone, corrupt(waves[1:], name, 3, seed=5, indices=[8]))


def test_gaussian_noise_has_the_deviation_that_it_says():
    grey = torch.full((1, 3, 128, 128), 128, dtype=torch.uint8)
    for severity, sigma in enumerate(LEVELS["gaussian-noise"][:3], 1):
        noise = corrupt(grey, "gaussian-noise", severity, indices=[0]).double() / 255 - 128 / 255
        assert noise.std() == pytest.approx(sigma, rel=0.02)


def test_shot_noise_has_the_variance_of_counted_photons():
    grey = torch.full((1, 3, 128, 128), 102, dtype=torch.uint8)  # 0.4 of white
    noise = corrupt(grey, "shot-noise", 1, indices=[0]).double() / 255
    assert noise.mean() == pytest.approx(0.4, abs=0.005)
    assert noise.var() == pytest.approx(0.4 / LEVELS["shot-noise"][0], rel=0.05)


def test_pixelated_pictures_have_few_different_columns(waves):
    columns = corrupt(waves, "pixelate", 5, indices=[0, 1])[0].flatten(0, 1).T
    assert len(columns.unique(dim=0)) <= round(0.2 * 64)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("name", LEVELS)
def test_small_pictures_and_empty_batches_are_taken(name, side):
    x = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    assert corrupt(x, name, 5, indices=[0, 1, 2]).shape == x.shape
    assert corrupt(x[:0], name, 5, indices=[]).shape == (0, 3, side, side)


def test_a_corrupted_split_is_the_clean_one_with_each_batch_corrupted(pictures):
    clean = Images(open_data(pictures).val, Preprocessing(size=16), workers=0)
    shown = Corrupted(clean, "gaussian-noise", 2, seed=3)
    assert len(shown) == len(clean) == 7
    x, y, ok = clean.batch([4, 1])
    noisy, labels, fine = shown.batch([4, 1])
    assert torch.equal(noisy, corrupt(x, "gaussian-noise", 2, seed=3, indices=[4, 1]))
    assert torch.equal(labels, y)
    assert torch.equal(fine, ok)


def test_robustness_is_the_accuracy_on_every_corrupted_split(pictures):
    data = open_data(pictures)
    model = deltavit.load_model("tiny")
    adapter = deltavit.attach(model, "linear", classes=data.classes)
    torch.nn.init.normal_(adapter.head.weight, generator=torch.Generator().manual_seed(0))
    images, steps = Images(data.val, adapter.preprocessing, workers=0), []
    found = robustness(model, images, names=["blur", "jpeg"], severities=[5, 1], progress=steps.append)
    plain = {name: [evaluate(model, Corrupted(images, name, s)).accuracy for s in (1, 5)] for name in ("blur", "jpeg")}
    assert found["corruptions"] == plain
    assert found["clean"] == evaluate(model, images).accuracy
    assert found["mean"] == pytest.approx(sum(map(sum, plain.values())) / 4)
    assert steps[-1] == 5


@pytest.mark.parametrize(
    ("names", "severities", "line"),
    [
        (["blurr"], [1], "no corruption named 'blurr'; did you mean 'blur'?"),
        (["blur"], [6], "severity 6 is not 1, 2, 3, 4 or 5"),
        ([], [1], "no corruption or no severity"),
        (["blur"], [], "no corruption or no severity"),
    ],
)
def test_corruptions_that_do_not_exist_are_refused(names, severities, line):
    with pytest.raises(DataError, match=line.replace("?", r"\?")):
        robustness(deltavit.load_model("tiny"), None, names=names, severities=severities)
