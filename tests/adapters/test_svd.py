"""SVFit's page of maths, against torch.linalg.svd in float64."""

import logging

import pytest
import torch

from adapters import svd
from adapters.svd import leading_block, leading_exact, rebuilt_error, svd_factors

SHAPES = [(24, 24), (40, 24), (24, 40)]


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power_law(shape, alpha, seed=0):
    """W (m, n) in float32 with singular values i^-alpha."""
    k = min(shape)
    U, V = (torch.linalg.qr(gaussian((side, k), seed + i)).Q for i, side in enumerate(shape))
    return ((U * torch.arange(1, k + 1).double() ** -alpha) @ V.T).float()


def angles(a, b):
    """The angle between each column of a and that of b."""
    return (a - b * (a * b).sum(0).sign()).norm(dim=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 7, 24])
def test_factors_are_the_leading_singular_vectors(shape, r):
    W = gaussian(shape)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)

    write, read, pivots, values, _ = svd_factors(W, r)

    assert float(angles(write, U[:, :r]).max()) < 1e-10  # float64 eps x the largest square over the nearest distance
    torch.testing.assert_close(values, s[:r].float())
    right = read[:, None] * (write.T @ W)
    assert float(angles(right.T, Vh[:r].T).max()) < 1e-10
    assert torch.equal(pivots.long(), U[:, :r].abs().argmax(0))
    torch.testing.assert_close((write / read) @ right, U[:, :r] * s[:r] @ Vh[:r], rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_make_the_largest_entry_of_every_direction_positive(shape):
    W = gaussian(shape)

    up, down = svd_factors(W, 9).write, svd_factors(-W, 9).write

    assert (up.gather(0, up.abs().argmax(0)[None]) > 0).all()
    torch.testing.assert_close(up, down, rtol=0, atol=1e-12)


def test_saved_pivots_keep_the_signs_where_another_entry_has_become_the_largest():
    W = torch.tensor([[3.0, 0.0], [-2.99, 0.0], [0.0, 1.0]])
    pivots = svd_factors(W, 1).pivots
    rounded = torch.tensor([[2.98, 0.0], [-3.0, 0.0], [0.0, 1.0]])

    alone, kept = svd_factors(rounded, 1), svd_factors(rounded, 1, pivots=pivots)

    assert pivots.tolist() == [0]
    assert alone.write[0] < 0 < kept.write[0]


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_chooses_the_least_rank_that_holds_its_share(shape, energy):
    W = gaussian(shape)
    held = torch.linalg.svdvals(W).square().cumsum(0) / W.square().sum()

    r = len(svd_factors(W, None, energy=energy).values)

    assert held[r - 1] >= energy
    assert r == 1 or held[r - 2] < energy


@pytest.mark.parametrize("shape", [(256, 256), (300, 200), (200, 300)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_the_block_methods_error_bounds_every_direction(shape, alpha):
    W, r = power_law(shape, alpha), 16
    exact, s = leading_exact(W, r)

    U, values, bound = leading_block(W, r)

    assert float(angles(U, exact).max()) < bound < svd.BLOCK_ERROR
    subspace = 1 - torch.linalg.svdvals(U.T @ exact).min().square()
    assert float(subspace.clamp(min=0).sqrt()) < bound
    assert 0 <= float(s.square().sum() / values.square().sum()) - 1 + 1e-12 < 1e-6
    torch.testing.assert_close(U.T @ U, torch.eye(r).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("r", [1, 5, 16, 60, 64])
def test_the_block_method_works_at_any_rank(r):
    """Even if its basis is the whole space."""
    W = power_law((64, 90), 1.0)

    U, _, bound = leading_block(W, r)

    assert float(angles(U, leading_exact(W, r)[0]).max()) < max(bound, 1e-6)


def test_a_flat_spectrum_is_refused_by_block_and_solved_exactly_by_auto(monkeypatch, caplog):
    W = gaussian((400, 300)).float()
    monkeypatch.setattr(svd, "BLOCK_FROM", 256)
    caplog.set_level(logging.INFO)

    with pytest.raises(ValueError, match=r"block method the directions at rank 16 are off by .*: choose method exact"):
        svd_factors(W, 16, method="block")
    chosen = svd_factors(W, 16)

    assert torch.equal(chosen.write, svd_factors(W, 16, method="exact").write)
    assert "off by at most" in caplog.text
    assert "now exactly" in caplog.text


def test_auto_takes_block_where_it_is_good_and_says_how_good(monkeypatch, caplog):
    W = power_law((300, 400), 1.0)
    monkeypatch.setattr(svd, "BLOCK_FROM", 256)
    caplog.set_level(logging.INFO)

    chosen = svd_factors(W, 16)

    assert torch.equal(chosen.write, svd_factors(W, 16, method="block").write)
    assert not torch.equal(chosen.write, svd_factors(W, 16, method="exact").write)
    assert "300 x 400: by the block method the directions at rank 16 are off by at most" in caplog.text


def test_a_rank_above_the_weights_own_is_refused():
    W = gaussian((24, 6)) @ gaussian((6, 30))

    with pytest.raises(ValueError, match="singular value 6 is zero: it has only 6 directions"):
        svd_factors(W, 8)

    assert len(svd_factors(W, 6).values) == 6


@pytest.mark.parametrize("method", ["exact", "block"])
def test_a_weight_of_zeros_has_no_directions(method):
    with pytest.raises(ValueError, match=r"has only 0 directions|directions at rank 4 are off by"):
        svd_factors(torch.zeros(12, 8), 4, method=method)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_counted(bad):
    W = gaussian((12, 8))
    W[3, 1] = W[4, 2] = bad

    with pytest.raises(ValueError, match="2 of its 96 numbers are NaN or infinite"):
        svd_factors(W, 2)


@pytest.mark.parametrize("r", [1, 8, 64])
def test_the_effect_of_rounding_on_the_update_is_predicted_from_the_singular_values(r):
    """Within a factor of 2 (3 at rank 1, from one number), without using the directions it was made with."""
    W = gaussian((96, 64)).float()
    own, rounded = svd_factors(W, r), W.bfloat16().float()
    again = svd_factors(rounded, r)
    core = torch.randn(r, generator=torch.Generator().manual_seed(1))

    foretold = rebuilt_error(rounded, own.values)

    update, moved = (f.write * core @ (f.read[:, None] * (f.write.T @ X)) for f, X in ((own, W), (again, rounded)))
    true = float((moved - update).norm() / update.norm())
    assert 1 / 3 < foretold / true < 3
    assert rebuilt_error(W, own.values) < 1e-4
    assert rebuilt_error(gaussian((96, 64), seed=5), own.values) > 0.5
