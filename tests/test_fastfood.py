"""Fastfood: the transform against a dense matrix, the projection against its formula, and its exact adjoint."""

import pytest
import torch
from torch import nn

import deltavit
from deltavit.core.attach import attach, plan
from deltavit.core.errors import MethodError
from deltavit.methods import fastfood
from deltavit.methods.fastfood import Projection, Subspace, walsh_hadamard


def dense(bits):
    """Hadamard's matrix from its definition: the sign is the parity of the bits that row and column share."""
    side = range(1 << bits)
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in side] for i in side], dtype=torch.float64)


@pytest.mark.parametrize("factor", [1, 3, 5])
@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_walsh_hadamard_is_the_dense_product(monkeypatch, bits, factor):
    monkeypatch.setattr(fastfood, "FACTOR", factor)
    x = torch.randn(3, 1 << bits, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ dense(bits), rtol=0, atol=1e-12)
    torch.testing.assert_close(walsh_hadamard(x[0]), x[0] @ dense(bits), rtol=0, atol=1e-12)


def test_walsh_hadamard_twice_is_the_length_times():
    x = torch.randn(1 << 17, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), len(x) * x, rtol=0, atol=1e-7)


def test_walsh_hadamard_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two, got 12"):
        walsh_hadamard(torch.ones(12))


def test_autocast_does_not_round_the_transform():
    x = torch.randn(256)
    with torch.autocast("cpu", torch.bfloat16):
        inside = walsh_hadamard(x)
    torch.testing.assert_close(inside, walsh_hadamard(x), rtol=0, atol=0)


@pytest.mark.parametrize(("dimension", "size"), [(1, 1), (5, 24), (16, 16), (20, 100), (32, 32)])
def test_projection_is_the_formula_with_a_full_permutation(dimension, size):
    torch.manual_seed(0)
    one = Projection(dimension, size).double()
    length = len(one.gauss)
    bits = length.bit_length() - 1
    assert length / 2 < size <= length
    # any permutation that agrees modulo the padded dimension gives the same
    free = [[i for i in range(length) if i % one.fold == r] for r in range(one.fold)]
    pi = torch.zeros(length, length, dtype=torch.float64)
    for row, residue in enumerate(one.order.tolist()):
        pi[row, free[residue].pop()] = 1
    assert (pi.sum(0) == 1).all()
    theta = torch.randn(dimension, dtype=torch.float64)
    padded = torch.zeros(length, dtype=torch.float64)
    padded[:dimension] = one.signs * theta
    gauss = torch.diag(one.gauss)
    want = (dense(bits) @ gauss @ pi @ dense(bits) @ padded)[:size] / (size * gauss.square().sum()).sqrt()
    torch.testing.assert_close(one(theta), want, rtol=1e-6, atol=1e-6)  # G is normalised in float32


def test_gradient_is_the_exact_adjoint():
    one = Projection(100, 5000).double()
    x, y = torch.randn(100).double().requires_grad_(), torch.randn(5000).double()
    forward = one(x) @ y
    (transposed,) = torch.autograd.grad(forward, x)
    assert abs(forward.item() - (x @ transposed).item()) < 1e-10
    assert torch.autograd.gradcheck(Projection(6, 20).double(), torch.randn(6).double().requires_grad_())


@pytest.mark.parametrize("size", [4096, 5000, 24 * 96])
def test_projection_keeps_the_length(size):
    torch.manual_seed(0)
    ratios = []
    for _ in range(20):
        theta = torch.randn(64)
        ratios.append((Projection(64, size)(theta).norm() / theta.norm()).item())
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)
    assert all(0.8 < ratio < 1.2 for ratio in ratios)


def test_one_theta_drives_all_tensors_each_through_numbers_of_its_own():
    theta = nn.Parameter(torch.randn(8))
    one, two = (Subspace(theta, (8, 6), bias=True, said=False) for _ in range(2))
    W, b = torch.zeros(8, 6), torch.zeros(8)
    assert one.theta is two.theta
    assert not torch.allclose(one.weight(W), two.weight(W))
    assert not torch.allclose(one.bias(b, W), two.bias(b, W))


def test_counts_are_theta_and_with_said_a_factor_for_each_tensor():
    model = deltavit.load_model("tiny")
    assert plan(model, deltavit.method("fastfood", dimension=20)).shapes == {"shared.theta": (20,)}
    assert plan(model, deltavit.method("fastfood", dimension=20, bias=True)).trainable_parameters == 20
    assert plan(model, deltavit.method("fastfood", dimension=20, said=True)).trainable_parameters == 20 + 18
    assert plan(model, deltavit.method("fastfood", dimension=20, bias=True, said=True)).trainable_parameters == 20 + 36


def test_a_larger_dimension_than_a_tensor_is_refused():
    with pytest.raises(MethodError, match="fastfood on tiny: dimension=1025 is larger than a tensor of 576"):
        plan(deltavit.load_model("tiny"), deltavit.method("fastfood", dimension=1025))
    with pytest.raises(
        MethodError, match=r"dimension=40 is larger than a tensor of 24 numbers, padded to 32.*bias=False"
    ):
        plan(deltavit.load_model("tiny"), deltavit.method("fastfood", dimension=40, bias=True))
    with pytest.raises(MethodError, match="dimension must be at least 1"):
        deltavit.method("fastfood", dimension=0)


def test_said_scales_the_increment():
    theta = nn.Parameter(torch.randn(8))
    change = Subspace(theta, (8, 6), bias=True, said=True)
    W, b = torch.randn(8, 6), torch.randn(8)
    weight, bias = change.weight(W) - W, change.bias(b, W) - b
    with torch.no_grad():
        change.scales.copy_(torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(change.weight(W) - W, 2 * weight)
    torch.testing.assert_close(change.bias(b, W) - b, -3 * bias)


def test_the_file_holds_theta_and_none_of_the_drawn_numbers(tmp_path):
    adapter = attach(deltavit.load_model("tiny"), deltavit.method("fastfood", dimension=50))
    assert adapter.save(tmp_path / "theta.safetensors") < 50 * 4 + 4096
    other = attach(deltavit.load_model("tiny"), deltavit.method("fastfood", dimension=50), seed=1)
    assert adapter.frozen() != other.frozen()
