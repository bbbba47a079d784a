"""Cached factors that are not those of their weight are set aside and made again."""

import logging
import os
import re

import pytest
import torch
from communicators import together
from safetensors.torch import load_file, save_file
from small_weights import ALONE, LU, factorization, notes_of, requests_for

from launcher.factorization import cache, make
from launcher.factorization.make import factors_of
from launcher.factorization.share import factorize


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (
            lambda f: f._replace(write=f.write[:, :2], read=f.read[:2, :2], values=f.values[:2]),
            "it has rank 2, expected 4",
        ),
        (lambda f: f._replace(write=f.write[1:]), r"its maps have the shapes \(15, 4\) and \(4, 4\)"),
        (lambda f: f._replace(read=f.read * float("nan")), "it has NaN or infinite numbers"),
        (lambda f: f._replace(pivots=f.pivots + 1000), "its pivots are not rows of the weight"),
        (lambda f: f._replace(probe=f.probe.flip(0)), "it was made from another weight"),
    ],
)
def test_a_well_formed_file_that_does_not_fit_the_weight_is_set_aside_and_made_again(model, folder, caplog, lie, said):
    request = requests_for(model)[0]
    good = factors_of(request, folder)
    (entry,) = cache.entries(folder)
    cache.store(folder, entry.key, lie(good), entry.about)

    again = factors_of(request, folder)

    assert all(torch.equal(one, other) for one, other in zip(again, good, strict=True))
    assert re.search(f"{said}; it belongs to user .*renamed to", caplog.text)


THAT_COMPARE = {
    "loldu": LU, "loldu, norm one": factorization(normalize_directions=True), "svfit": factorization("svfit"),
    "loraxs": factorization("loraxs"),
}  # fmt: skip
LIES = {
    "random factors": lambda f, other: f._replace(write=torch.randn_like(f.write), read=torch.randn_like(f.read)),
    "those of another weight": lambda f, other: other._replace(probe=f.probe),
    "the write map of another weight": lambda f, other: f._replace(write=other.write),
    "half the rows of another weight": lambda f, other: f._replace(write=torch.cat([f.write[:8], other.write[8:]])),
    "shuffled rows": lambda f, other: f._replace(write=f.write.roll(3, 0)),
    "directions three times as long": lambda f, other: f._replace(write=3 * f.write, read=f.read / 3),
    "other values": lambda f, other: f._replace(values=2 * f.values),
}


@pytest.mark.parametrize("method", THAT_COMPARE)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("verify_base", [False, True])
def test_factors_that_are_not_the_weights_are_set_aside_and_made_again(model, folder, caplog, method, lie, verify_base):
    """As another user may leave them in a shared cache: well-formed, finite, of the right shape and checksums."""
    request, second = requests_for(model, method=THAT_COMPARE[method])[:3:2]  # of the same shape
    good, other = factors_of(request, folder), factors_of(second, folder)
    made = {name: how.key for name, how in factorize([request, second], folder, ALONE).items()}
    entry = cache.find(folder, made[request.module])
    wrong = LIES[lie](good, other)
    cache.store(folder, entry.key, wrong._replace(write=wrong.write.contiguous()), entry.about)

    with caplog.at_level(logging.WARNING):
        results = together(2, lambda comm: factorize([request, second], folder, comm, verify_base=verify_base))

    again = factors_of(request, folder)
    assert [[how.made for how in result.values()] for result in results] == [[True, False]] * 2
    assert all(torch.equal(one, another) for one, another in zip(again, good, strict=True))
    assert re.search(rf"{entry.file} is damaged .*it belongs to user .* \(uid {os.getuid()}\)", caplog.text)


@pytest.mark.parametrize("method", ["loldu", "svfit"])
def test_factors_are_compared_with_their_weight_once_and_again_if_others_can_write_the_note(
    model, folder, monkeypatch, method
):
    request = requests_for(model, method=factorization(method))[0]
    factors_of(request, folder)
    compared = []
    monkeypatch.setattr(make, "compare", lambda *_args: compared.append(1))

    factorize([request], folder, ALONE)
    made_here = len(compared)
    (note,) = notes_of(folder)
    note.chmod(0o666)
    factorize([request], folder, ALONE)  # which also writes the note again
    by_others = len(compared)
    factorize([request], folder, ALONE)

    assert (made_here, by_others, len(compared)) == (0, 1, 1)


def test_factors_from_gradients_are_used_only_if_this_user_has_made_them(model, folder, caplog):
    """They cannot be compared with the weight."""
    (request,) = requests_for(model, method=factorization("lorasb"), gradients="of some samples")[:1]
    make.make(request, folder, gradient=lambda: torch.randn(request.shape, generator=torch.Generator().manual_seed(0)))
    (entry,) = cache.entries(folder)

    mine = make.check(request, folder, entry.key)
    notes_of(folder)[0].unlink()
    another_users = make.check(request, folder, entry.key)

    assert mine
    assert mine.seal == entry.seal
    assert another_users is None
    assert "another user may have made it; it belongs to user" in caplog.text
    assert not entry.file.exists()


def test_a_weight_that_changed_under_its_old_time_is_noticed_although_its_factors_were_compared(model, folder):
    request = requests_for(model)[0]
    first, before = factors_of(request, folder), request.tensor.file.stat()
    weights = load_file(request.tensor.file)
    weights[request.tensor.name] += 1
    save_file(weights, request.tensor.file)
    os.utime(request.tensor.file, ns=(before.st_atime_ns, before.st_mtime_ns))

    again = factorize([request], folder, ALONE)

    assert again[request.module].made
    assert not torch.equal(factors_of(request, folder).values, first.values)
