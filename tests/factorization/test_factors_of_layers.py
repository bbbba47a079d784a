"""The factors of every kind of layer are those of torch's decompositions."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_weights import ALONE, factorization, requests_for, write_model

from adapters.factors import Factors, probe_digest
from adapters.loldu import loldu_factors
from adapters.svd import svd_factors
from launcher.factorization import cache, make
from launcher.factorization.make import factors_of
from launcher.factorization.share import factorize


@pytest.mark.parametrize(("m", "n", "r"), [(24, 24, 24), (40, 24, 5), (24, 40, 24), (24, 40, 1)])
def test_factors_from_the_panel_on_disk_are_those_of_the_lu_of_the_whole(tmp_path, folder, m, n, r):
    """float64 throughout: 1e-12 is a few hundred roundings."""
    (request,) = requests_for(write_model(tmp_path, {"w": (m, n)}, torch.float64), r, dtype="float64")
    weight = load_file(tmp_path / "model.safetensors")["w.weight"]

    factorize([request], folder, ALONE)
    factors = factors_of(request, folder)

    P, L, U = torch.linalg.lu(weight)
    torch.testing.assert_close(factors.write, (P @ L)[:, :r], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors.values, U.diagonal()[:r].float(), rtol=1e-6, atol=0)
    assert torch.equal(factors.pivots.long(), P.argmax(dim=0)[:r])
    reading = factors.read @ weight[factors.pivots.long()]  # what the layer computes: U_r
    torch.testing.assert_close(reading, U[:r] / U.diagonal()[:r, None], rtol=1e-10, atol=1e-10)
    assert torch.equal(factors.probe, probe_digest(weight, weight.shape))
    about = cache.entries(folder)[0].about
    assert about["residual"] < 1e-6  # it goes through d_r, which is kept in float32
    assert about["norms"]["panel"] == pytest.approx(float(weight[:, :r].norm()))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((12, 20), {"transposed": True}),
        ((12, 20), {"transposed": True, "normalize": True}),
        ((20, 12), {"normalize": True}),
        ((20, 12), {"embedding": True}),
        ((20, 12), {"embedding": True, "normalize": True}),
        ((8, 3, 2, 2), {}),
    ],
)
def test_every_kind_of_layer_gets_the_factors_of_its_matrix(tmp_path, folder, shape, options):
    how = factorization(normalize_directions=options.get("normalize", False))
    layout = {name: value for name, value in options.items() if name != "normalize"}
    (request,) = requests_for(write_model(tmp_path, {"w": shape}), 5, how, **layout)
    stored = load_file(tmp_path / "model.safetensors")["w.weight"]
    W = stored.T if options.get("transposed") else stored.flatten(1)
    maths = {name: value for name, value in options.items() if name != "transposed"}
    expected = loldu_factors(W[:, :5], lambda rows: W[rows.long()], **maths)._replace(probe=probe_digest(W, W.shape))

    factors = factors_of(request, folder)

    for name in Factors._fields:
        torch.testing.assert_close(getattr(factors, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert cache.entries(folder)[0].about["residual"] < 1e-5  # float32, 5 columns
    assert request.shape == tuple(W.shape)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((20, 12), {}), ((12, 20), {"transposed": True}), ((20, 12), {"embedding": True}), ((8, 3, 2, 2), {})],
)
@pytest.mark.parametrize("energy", [None, 0.8])
def test_every_kind_of_layer_gets_svfits_factors_of_its_matrix(tmp_path, folder, shape, options, energy):
    model = write_model(tmp_path, {"w": shape})
    (request,) = requests_for(model, 5, factorization("svfit", energy=energy), **options)
    stored = load_file(tmp_path / "model.safetensors")["w.weight"]
    W = stored.T if options.get("transposed") else stored.flatten(1)
    outputs = W.T if options.get("embedding") else W
    expected = svd_factors(outputs, None if energy else 5, energy=energy or 1.0)

    how = factorize([request], folder, ALONE)["w"]
    factors = factors_of(request, folder)
    part = factors_of(request, folder, slice(2, 5))

    for name in ("write", "read", "values"):
        torch.testing.assert_close(getattr(factors, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(factors.probe, probe_digest(W, W.shape))
    assert torch.equal(part.write, factors.write[2:5])
    assert how.rank == len(factors.values) == len(expected.values)
    assert factorize([request], folder, ALONE)["w"] == how._replace(made=False)
    assert cache.entries(folder)[0].about["residual"] < 1e-6  # float32 roundings of columns of 20
    assert cache.verify(folder) == []


def test_a_whole_weight_of_svfit_is_the_key_and_not_its_panel(tmp_path, folder):
    """One number in the last column is another SVD, though LoLDU's panel and the probe may not have it."""
    first = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[1, 199] += 1
    assert torch.equal(probe_digest(first, first.shape), probe_digest(second, second.shape))
    save_file({"a.weight": first, "b.weight": second}, tmp_path / "model.safetensors")

    keys = {make.make(request, folder).key for request in requests_for(tmp_path, method=factorization("svfit"))}
    panels = {make.make(request, folder).key for request in requests_for(tmp_path)}

    assert (len(keys), len(panels)) == (2, 1)


def test_the_write_map_is_stored_in_the_asked_dtype_and_the_rest_in_float32(model, folder):
    request = requests_for(model, dtype="bfloat16")[0]

    factors = factors_of(request, folder, slice(2, 9))

    assert [tensor.dtype for tensor in factors] == [
        torch.bfloat16,
        torch.float32,
        torch.int32,
        torch.float32,
        torch.uint8,
    ]
    assert factors.write.shape == (7, 4)


def test_a_zero_pivot_says_which_column_and_what_to_type(tmp_path, folder):
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    weight[:, 2] = weight[:, 1]
    save_file({"q.weight": weight}, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"^q \(q.weight in .*zero pivot in column 2.*--exclude q, or lower --rank"):
        factorize(requests_for(tmp_path), folder, ALONE)


def test_a_weight_with_nan_is_a_damaged_checkpoint_and_no_layer_to_leave_out(tmp_path, folder):
    """Without its adapter the layer would still compute NaN."""
    weight = torch.randn(16, 12)
    weight[3, 0] = float("nan")
    save_file({"q.weight": weight}, tmp_path / "model.safetensors")

    with pytest.raises(
        ValueError, match=r"^q \(q.weight in .*NaN or infinite; the checkpoint is damaged: fetch it again"
    ):
        factorize(requests_for(tmp_path), folder, ALONE)
