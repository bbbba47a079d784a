"""What the cache holds is found again, and what has changed is made again."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_weights import ALONE, LU, SIX, factorization, no_reading, requests_for, write_model

from adapters.checkpoint_files import list_tensors
from adapters.factors import base_fingerprint, probe_digest
from launcher.factorization import cache, make
from launcher.factorization.make import factors_of
from launcher.factorization.share import factorize


def test_a_warm_start_makes_nothing(model, folder, monkeypatch):
    requests = requests_for(model)
    cold = factorize(requests, folder, ALONE)

    monkeypatch.setattr(type(LU), "factors", no_reading)
    warm = factorize(requests, folder, ALONE)

    assert all(how.made for how in cold.values())
    assert not any(how.made for how in warm.values())
    assert [how.key for how in warm.values()] == [how.key for how in cold.values()]
    assert list(warm) == [request.module for request in requests]


def test_a_copied_checkpoint_is_read_but_not_factored_again(model, folder, tmp_path, monkeypatch):
    factorize(requests_for(model), folder, ALONE)
    write_model(tmp_path / "copy", SIX)

    monkeypatch.setattr(type(LU), "factors", no_reading)
    again = factorize(requests_for(tmp_path / "copy"), folder, ALONE)

    assert not any(how.made for how in again.values())


def test_another_rank_dtype_option_or_weight_has_another_key(model, folder, tmp_path):
    request = requests_for(model)[0]
    other = write_model(tmp_path / "other", dict(reversed(SIX.items())))  # same shapes, other numbers
    variants = [
        request,
        *(requests_for(model, **options)[0] for options in ({"rank": 3}, {"dtype": "bfloat16"})),
        requests_for(model, method=factorization(normalize_directions=True))[0],
        *(
            requests_for(model, method=factorization("svfit", **options))[0]
            for options in ({}, {"energy": 0.9}, {"svd": "exact"})
        ),
        requests_for(other)[0],
        requests_for(model)[2],
    ]

    keys = {make.make(variant, folder).key for variant in variants}

    assert len(keys) == len(variants)


def test_weights_with_equal_panels_keep_their_own_probes(tmp_path, folder):
    """The panel alone would give both the same key, and one of them a wrong probe."""
    first = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    second = torch.cat([first[:, :4], first[:, 4:] + 1], dim=1)
    save_file({"a.weight": first, "b.weight": second}, tmp_path / "model.safetensors")

    a, b = (factors_of(request, folder) for request in requests_for(tmp_path))

    assert torch.equal(a.write, b.write)
    assert torch.equal(b.probe, probe_digest(second, second.shape))


@pytest.mark.parametrize("verify_base", [False, True])
def test_a_weight_that_changed_is_noticed_though_size_and_time_hide_it(model, folder, verify_base):
    requests, file = requests_for(model), model / "model.safetensors"
    before, stat = factorize(requests, folder, ALONE), os.stat(file)
    weights = load_file(file)
    weights["layers.0.q.weight"] += 1
    save_file(weights, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = factorize(requests, folder, ALONE, verify_base=verify_base)

    assert after["layers.0.q"].key != before["layers.0.q"].key
    assert [name for name, how in after.items() if how.made] == ["layers.0.q"]
    assert cache.find(folder, before["layers.0.q"].key)  # nothing is wrong with the old factors


def test_a_damaged_file_is_made_again_when_it_is_read(model, folder, caplog):
    requests = requests_for(model)
    first = factorize(requests, folder, ALONE)
    before = factors_of(requests[0], folder)
    file = folder / "factors" / f"{first['layers.0.q'].key}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    after = factors_of(requests[0], folder)

    assert "is damaged" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert file.exists()


def test_a_deleted_file_alone_is_made_again(model, folder):
    first = factorize(requests_for(model), folder, ALONE)
    (folder / "factors" / f"{first['layers.1.up'].key}.safetensors").unlink()

    second = factorize(requests_for(model), folder, ALONE)

    assert [name for name, how in second.items() if how.made] == ["layers.1.up"]


def test_the_fingerprint_is_that_of_the_model_in_memory_and_is_remembered(model, folder, monkeypatch):
    save_file({"norm.weight": torch.ones(3), "conv.weight": torch.randn(4, 3, 2)}, model / "extra.safetensors")
    index = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    index |= {"norm.weight": "extra.safetensors", "conv.weight": "extra.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = load_file(model / "model.safetensors") | load_file(model / "extra.safetensors")
    matrices = [weight.flatten(1) for weight in weights.values() if weight.ndim > 1]

    cold = make.fingerprint(list_tensors(model), folder)
    monkeypatch.setattr(make, "open_tensor", no_reading)
    warm = make.fingerprint(list_tensors(model), folder)

    assert cold == warm == base_fingerprint(probe_digest(matrix, matrix.shape) for matrix in matrices)
