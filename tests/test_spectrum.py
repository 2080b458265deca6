"""Spectra: known rotations, known values, low rank, rescaled rows and columns, and the command."""

import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn

import deltavit
from deltavit.analysis.pairs import Pair, of_adapter, of_models, png
from deltavit.analysis.spectrum import (
    MEASURES,
    factors,
    measures,
    picture,
    plain,
    principal_angles,
    rescaling,
    spectra,
    spectrum,
    summary,
)
from deltavit.core.errors import AdapterError, ModelError

OUT, INP, K = 30, 20, 4


def base(seed=0):
    """U, S, V of a weight with well separated singular values."""
    draw = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(OUT, OUT, generator=draw, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(INP, INP, generator=draw, dtype=torch.float64))[0]
    return U[:, :INP], torch.arange(INP, 0, -1, dtype=torch.float64), V


def tuned(method, size=0.1, seed=0, model="tiny", **options):
    adapter = deltavit.attach(deltavit.load_model(model), deltavit.method(method, **options), classes=3)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw))
    return adapter


# --- values and rotations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [(1e-7, 1e-6, 1e-3, 5.0), (10.0, 44.9, 45.1, 80.0), (0.0, 0.0, 0.0, 90.0)])
def test_a_known_rotation_of_the_left_vectors_is_found_and_the_right_ones_stay(degrees):
    U, S, V = base()
    t = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    turned = U.clone()
    turned[:, :K] = t.cos() * U[:, :K] + t.sin() * U[:, K : 2 * K]
    turned[:, K : 2 * K] = -t.sin() * U[:, :K] + t.cos() * U[:, K : 2 * K]
    found = spectrum(U * S @ V.T, turned * S @ V.T, K)
    torch.testing.assert_close(found.left, torch.tensor(degrees, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    assert found.right.max() < 1e-12
    torch.testing.assert_close(found.after, found.before, rtol=1e-12, atol=0)
    assert found.values < 1e-13


def test_a_pure_rotation_changes_no_singular_value():
    U, S, V = base()
    W = U * S @ V.T
    Q = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64))[0]
    found = spectrum(W, Q @ W, K)
    assert found.values < 1e-13
    assert found.right.max() < 1e-12
    assert found.left.max() > 1


def test_scaling_rotates_nothing_and_keeps_the_rank_of_the_weight():
    U, S, V = base()
    W = U * S @ V.T
    found = spectrum(W, 1.1 * W, K)
    assert max(found.left.max(), found.right.max()) < 1e-12
    assert found.values == pytest.approx(0.1)
    assert found.size == pytest.approx(0.1)
    torch.testing.assert_close(found.after, 1.1 * found.before)
    share = S[:K].square().sum() / S.square().sum()
    for value in (found.inside_left, found.inside_right, found.inside):
        assert value == pytest.approx(float(share))
    assert found.rescaled == pytest.approx(1)
    assert found.scaled == pytest.approx(1)


def test_changed_singular_values_alone_are_read_as_such():
    U, S, V = base()
    moved = S.clone()
    moved[:2] += torch.tensor([1.0, 0.5])
    found = spectrum(U * S @ V.T, U * moved @ V.T, K)
    torch.testing.assert_close(found.after - found.before, moved - S, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.delta[:2], moved[:2] - S[:2], rtol=0, atol=1e-12)
    assert found.left.max() < 1e-10
    assert found.inside == pytest.approx(1)
    assert found.values == pytest.approx(found.size)
    assert found.stable_rank == pytest.approx(1.25)
    p = torch.tensor([2 / 3, 1 / 3])
    assert found.rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)


def test_shares_of_a_change_outside_the_leading_subspaces():
    U, S, V = base()
    D = 0.01 * U[:, [10]] @ V[:, [0]].T + 0.02 * U[:, [1]] @ V[:, [12]].T + 0.03 * U[:, [2]] @ V[:, [3]].T
    found = spectrum(U * S @ V.T, U * S @ V.T + D, K)
    assert found.inside_left == pytest.approx(13 / 14)
    assert found.inside_right == pytest.approx(10 / 14)
    assert found.inside == pytest.approx(9 / 14)


def test_principal_angles_are_arccos_of_singular_values_where_that_is_well_conditioned():
    A, B = (torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64))[0] for _ in range(2))
    naive = torch.linalg.svdvals(A.T @ B).arccos().rad2deg()
    torch.testing.assert_close(principal_angles(A, B), naive, rtol=1e-7, atol=0)
    mixed = A @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert principal_angles(A, mixed).max() < 1e-12  # the same space under another basis


# --- rescaled rows and columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(30, 20), (16, 64)])
def test_the_form_of_rlrr_is_fitted_exactly(seed, shape):
    draw = torch.Generator().manual_seed(seed)
    W, l, r = (torch.randn(n, generator=draw, dtype=torch.float64) for n in (shape, shape[0], shape[1]))
    found = spectrum(W, W + 1e-3 * l[:, None] * W * r, 3)
    assert found.rescaled == pytest.approx(1, abs=1e-7)
    assert found.scaled < 0.9
    a, b = 1 + 0.1 * l, 1 + 0.1 * r
    assert spectrum(W, a[:, None] * W * b, 3).scaled == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_rescaling_of_a_noisy_target_is_the_best_one(seed):
    draw = torch.Generator().manual_seed(seed)
    W, noise, l, r = (torch.randn(n, generator=draw, dtype=torch.float64) for n in ((12, 9), (12, 9), (12,), (9,)))
    T = l[:, None] * W * r + 0.5 * noise
    ours = float((T - rescaling(W, T)).square().sum())
    best = math.inf
    for _ in range(20):  # plain and slow: gradient descent on l and r from many starts
        l, r = (torch.randn(n, generator=draw, dtype=torch.float64).requires_grad_() for n in (12, 9))
        slow = torch.optim.LBFGS([l, r], max_iter=300, line_search_fn="strong_wolfe")

        def error(l=l, r=r, slow=slow):
            slow.zero_grad()
            loss = (T - l[:, None] * W * r).square().sum()
            loss.backward()
            return loss

        slow.step(error)
        best = min(best, error().item())
    assert ours == pytest.approx(best, rel=1e-6)


def test_a_random_change_is_hardly_explained_by_rescaling():
    W = torch.randn(80, 60, dtype=torch.float64)
    found = spectrum(W, W + 0.01 * torch.randn(80, 60, dtype=torch.float64), 8)
    assert 0 < found.rescaled < 0.2
    assert 0 < found.scaled < 0.2


def test_empty_rows_and_columns_of_a_weight_do_not_disturb_the_fit():
    W = torch.randn(9, 7, dtype=torch.float64)
    W[3], W[:, 2] = 0, 0
    assert spectrum(W, W + 0.1 * torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * W, 2).rescaled == (
        pytest.approx(1)
    )


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("size", [1e-4, 0.1])
def test_the_change_of_lora_has_an_effective_rank_of_at_most_its_rank(rank, size):
    for name, found in spectra(of_adapter(tuned("lora", size, model="vit_pico", rank=rank)), 8):
        if name.endswith((".q", ".v")):
            assert 1 - 1e-9 <= found.stable_rank <= found.rank <= rank + 1e-6
        else:
            assert found is None


def test_methods_that_rescale_are_explained_by_rescaling():
    for method in ("rlrr", "ssf"):
        told = summary({n: s for n, s in spectra(of_adapter(tuned(method, model="vit_pico")), 8) if s})
        assert told["rescaled"][0] == pytest.approx(1, abs=1e-6)
    told = summary({n: s for n, s in spectra(of_adapter(tuned("full", model="vit_pico")), 8) if s})
    assert told["rescaled"][0] < 0.5


def test_one_svd_of_the_base_serves_several_adapters():
    known = {}
    adapter = tuned("lora")
    first = dict(spectra(of_adapter(adapter), 4, known=known))
    kept = dict(known)
    second = dict(spectra(of_adapter(adapter), 4, known=known))
    assert all(known[name] is kept[name] for name in known)
    assert set(known) == {name for name, found in first.items() if found}
    for name in known:
        assert measures(first[name]) == measures(second[name]) == measures(dict(spectra(of_adapter(adapter), 4))[name])


def test_a_summary_is_mean_and_standard_deviation_over_sites():
    found = {n: s for n, s in spectra(of_adapter(tuned("lora")), 4) if s}
    values = torch.tensor([measures(s)["size"] for s in found.values()], dtype=torch.float64)
    assert summary(found)["size"] == (pytest.approx(float(values.mean())), pytest.approx(float(values.std())))
    (name, one), *_ = found.items()
    assert summary({name: one})["rank"] == (pytest.approx(one.rank), 0)
    row = plain(one, 4)
    assert json.loads(json.dumps(row)) == row
    assert set(MEASURES) < set(row)
    assert len(row["singular_before"]) == len(row["left_angles"]) == 4


def test_the_picture_is_the_same_bytes_for_the_same_spectra():
    pytest.importorskip("matplotlib")
    methods = {m: {n: s for n, s in spectra(of_adapter(tuned(m)), 4) if s} for m in ("lora", "rlrr")}
    one, two = (png(picture(methods, 4, "title")) for _ in range(2))
    assert one == two
    assert one.startswith(b"\x89PNG")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("W0", "W1", "k", "why"),
    [
        (torch.ones(3, 2), torch.ones(2, 3), 1, r"\[3, 2\] before and \[2, 3\] after"),
        (torch.ones(3, 2), torch.ones(3, 2), 3, "top 3 of a 3 x 2 weight: choose 1 to 2"),
        (torch.ones(3, 2), torch.ones(3, 2), 0, "choose 1 to 2"),
        (torch.ones(3, 2), torch.ones(3, 2), 1, "did not change"),
        (torch.ones(3, 2), torch.full((3, 2), math.nan), 1, "not finite"),
        (torch.zeros(3, 2), torch.ones(3, 2), 1, "all zero, which has no singular vectors"),
        (torch.ones(3, 2), torch.zeros(3, 2), 1, "all zero"),
    ],
)
def test_what_has_no_spectrum_is_refused(W0, W1, k, why):
    with pytest.raises(ValueError, match=why):
        spectrum(W0, W1, k)


def test_a_site_is_named_where_its_weight_is_bad():
    one, two = deltavit.load_model("tiny"), deltavit.load_model("tiny")
    nn.init.constant_(two.blocks[1].mlp.fc1.weight, math.nan)
    with pytest.raises(ModelError, match=r"blocks.1.fc1: .*not finite"):
        dict(spectra(of_models(one, two), 4))
    with pytest.raises(ModelError, match=r"blocks.0.q: top 999 .* choose 1 to"):
        dict(spectra(of_adapter(tuned("lora")), 999))


def test_sites_are_chosen_by_pattern_and_an_empty_choice_is_refused():
    adapter = tuned("full")
    names = [name for name, _ in spectra(of_adapter(adapter), 2, sites=("blocks.0.*", "*.fc1"))]
    assert names == [f"blocks.0.{r}" for r in ("q", "k", "v", "o", "fc1", "fc2")] + ["blocks.1.fc1", "blocks.2.fc1"]
    with pytest.raises(AdapterError, match=r"no site is called blocks.9.q; they are blocks.0.q"):
        list(spectra(of_adapter(adapter), 2, sites=("blocks.9.q",)))


def test_factors_keep_only_what_is_used():
    W = torch.randn(50, 40)
    U, S, V = factors(W, 3)
    assert (U.shape, S.shape, V.shape) == ((50, 3), (40,), (40, 3))
    assert U.untyped_storage().nbytes() == 50 * 3 * 8
    torch.testing.assert_close(W.double() @ V, U * S[:3])
    assert Pair._fields == ("site", "before", "after")


# --- the command -----------------------------------------------------------------------------------------------------


def test_several_adapters_are_compared_on_one_base(run, tmp_path):
    for folder, method in (("one", "lora"), ("two", "lora"), ("three", "rlrr")):
        (tmp_path / folder).mkdir()
        tuned(method, seed=len(folder)).save(tmp_path / folder / "adapter.safetensors")
    words = ["analyze", "spectrum", "--top", 4, "--out", tmp_path / "out"]
    for folder in ("one", "two", "three"):
        words += ["--adapter", tmp_path / folder]
    code, told, said = run(*words, "--json")
    assert code == 0, said
    values = json.loads(told.splitlines()[-1])
    assert list(values["methods"]) == ["lora", "lora (two)", "rlrr"]
    assert (values["methods"]["lora"]["sites"], values["methods"]["rlrr"]["sites"]) == (6, 18)
    assert values["methods"]["rlrr"]["rescaled"]["mean"] == pytest.approx(1)
    sites = json.loads((tmp_path / "out" / "spectrum.json").read_text())["sites"]
    found = dict(spectra(of_adapter(tuned("rlrr", seed=5)), 4))
    assert sites["rlrr"] == {name: plain(one, 4) for name, one in found.items()}
    code, told, said = run(*words, "--sites", "*.q")
    assert code == 0, said
    assert "effective rank" in told
    assert "lora (two)" in told


def test_checkpoints_are_read_beside_their_base(run, tmp_path):
    adapter = tuned("rlrr", model="vit_pico")
    adapter.merge()
    safetensors.torch.save_file(adapter.model.state_dict(), tmp_path / "tuned.safetensors")
    code, told, said = run(
        "analyze", "spectrum", "--model", "vit_pico", "--checkpoint", tmp_path / "tuned.safetensors", "--top", 2,
        "--sites", "blocks.1.*", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, said
    values = json.loads(told.splitlines()[-1])["methods"]["tuned"]
    assert values["sites"] == 6
    assert values["rescaled"]["mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "give --adapter FILE, or --checkpoint FILE"),
        (["--checkpoint", "lora"], "does not say which model it is of"),
        (["--adapter", "lora", "--adapter", "other"], "was trained on vit_pico"),
        (["--adapter", "lora", "--sites", "head"], "no site is called head"),
        (["--adapter", "lora", "--sites", "*.fc1"], "lora: none of these sites changed"),
        (["--adapter", "lora", "--top", "999"], "blocks.0.q: top 999 of a"),
        (["--adapter", "bitfit"], "bitfit changes no matrix of the blocks"),
    ],
)
def test_each_bad_input_is_one_line(run, tmp_path, words, why):
    for name, model in (("lora", "tiny"), ("bitfit", "tiny"), ("other", "vit_pico")):
        tuned("lora" if name == "other" else name, model=model).save(tmp_path / f"{name}.safetensors")
    files = ("lora", "bitfit", "other")
    paths = [str(tmp_path / f"{w}.safetensors") if w in files else w for w in words]
    code, _, said = run("analyze", "spectrum", *paths, "--out", tmp_path / "out")
    assert code == 1
    assert said.count("\n") == 1, said
    assert why in said
