"""`loldu factorize` and `loldu cache`: output and exit codes."""

import io
import os
import shutil

import pytest
from rich.console import Console

from launcher.factorization import cache, commands


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(screen: Console) -> str:
    text = screen.file.getvalue()
    screen.file.seek(0)
    screen.file.truncate()
    return text


def test_factorize_reports_what_it_computed_and_the_second_time_computes_nothing(babyllama, tmp_path, screen):
    options = {"cache_folder": str(tmp_path), "console": screen}

    first = commands.factorize(
        model=str(babyllama), rank=128, targets=["q_proj", "up_proj"], exclude=["layers.0.mlp.up_proj"], **options
    )
    cold = said(screen)
    second = commands.factorize(
        model=str(babyllama), rank=128, targets=["q_proj", "up_proj"], exclude=["layers.0.mlp.up_proj"], **options
    )
    warm = said(screen)

    assert (first, second) == (0, 0)
    assert "q_proj\t128 x 128\t128\t5\t5\t" in cold
    assert "up_proj\t352 x 128\t128\t4\t4\t" in cold
    assert "9 weights factored, 9 of them now" in cold
    assert "9 weights factored, 0 of them now" in warm
    assert str(tmp_path) in warm
    assert len(warm.splitlines()) == 4


def test_on_a_terminal_there_are_tables_and_a_bar_that_goes_away(babyllama, tmp_path):
    screen = Console(file=io.StringIO(), width=120, force_terminal=True)

    commands.factorize(model=str(babyllama), rank=8, targets=["q_proj"], cache_folder=str(tmp_path), console=screen)
    commands.cache_ls(str(tmp_path), screen)

    text = said(screen)
    assert "━" in text
    assert "model.layers.4.self_attn.q_proj" in text


def test_svfits_factors_are_made_and_listed_with_the_ranks_that_energy_chose(babyllama, tmp_path, screen):
    options = {"method": "svfit", "options": ["energy=0.9"], "cache_folder": str(tmp_path), "console": screen}

    commands.factorize(model=str(babyllama), targets=["q_proj"], **options)
    cold = said(screen)
    commands.factorize(model=str(babyllama), targets=["q_proj"], **options)
    warm = said(screen)
    commands.cache_ls(str(tmp_path), screen)

    ranks = [entry.about["rank"] for entry in cache.entries(tmp_path)]
    assert len(set(ranks)) > 1
    assert f"q_proj\t128 x 128\t{min(ranks)}-{max(ranks)}\t5\t5\t" in cold
    assert f"q_proj\t128 x 128\t{min(ranks)}-{max(ranks)}\t5\t0\t" in warm
    assert "reduced" not in cold
    assert said(screen).count("\tsvfit\t128 x 128\t") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": ["energy=0.9"]}, "unknown option energy of method loldu"),
        ({"options": ["normalise_directions=true"]}, "did you mean normalize_directions"),
        ({"options": ["normalize_directions"]}, "has the form name=value"),
        ({"options": ["normalize_directions=5"]}, "option normalize_directions=5 of method loldu"),
        ({"method": "svft", "options": ["svd=x"]}, r"svd is one of auto, exact, block"),
        ({"method": "losvd"}, "unknown --method losvd"),
        ({"method": "lorasb"}, "--method lorasb makes its factors from gradients"),
        ({"method": "lora"}, "--method lora has no factors to make; these have: loldu, .*loraxs"),
        ({"method": "svfit", "options": ["energy=1.5"]}, "energy is a share between 0 and 1"),
    ],
)
def test_options_of_another_method_are_refused(babyllama, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        commands.factorize(model=str(babyllama), cache_folder=str(tmp_path), **options)


def test_a_reduced_rank_is_reported_once(babyllama, tmp_path, screen):
    commands.factorize(model=str(babyllama), rank=500, targets=["k_proj"], cache_folder=str(tmp_path), console=screen)

    assert said(screen).count("--rank 500 is reduced to the smaller dimension of 5 weights") == 1


@pytest.mark.parametrize(("model", "rank"), [("no/such-model", 4), ("/no/such/folder", 4)])
def test_a_missing_model_is_an_error_with_the_remedy(tmp_path, model, rank):
    with pytest.raises(ValueError, match=rf"there is no model {model}.*hf download {model}"):
        commands.factorize(model=model, rank=rank, targets=["q_proj"], cache_folder=str(tmp_path))


def test_rank_zero_is_refused(babyllama, tmp_path):
    with pytest.raises(ValueError, match=r"--rank .* must be at least 1, got 0"):
        commands.factorize(model=str(babyllama), rank=0, targets=["q_proj"], cache_folder=str(tmp_path))


def test_the_cache_commands_list_verify_and_prune(babyllama, tmp_path, screen):
    commands.factorize(model=str(babyllama), rank=8, targets=["q_proj"], cache_folder=str(tmp_path), console=screen)
    said(screen)

    listed = commands.cache_ls(str(tmp_path), screen), said(screen)
    good = commands.cache_verify(str(tmp_path), screen), said(screen)
    file = cache.entries(tmp_path)[0].file
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    bad = commands.cache_verify(str(tmp_path), screen), said(screen)
    pruned = commands.cache_prune(str(tmp_path), max_gb=0, console=screen), said(screen)

    assert listed[0] == 0
    assert listed[1].count("self_attn.q_proj\tloldu\t128 x 128\t8\tfloat32") == 5
    assert (good[0], bad[0], pruned[0]) == (0, 1, 0)
    assert "5 weights are good, 0 damaged" in good[1]
    assert "4 weights are good, 1 damaged" in bad[1]
    assert str(file.with_suffix(".damaged")) in bad[1]
    assert "removed 5 files" in pruned[1]
    assert cache.entries(tmp_path) == []


@pytest.mark.parametrize("method", ["loldu", "svfit"])
def test_verify_compares_the_factors_with_the_weights_of_their_base(babyllama, tmp_path, screen, method, caplog):
    model, folder = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(babyllama, model)
    how = {"rank": 8, "targets": ["q_proj"], "method": method, "cache_folder": str(folder)}
    commands.factorize(model=str(model), console=screen, **how)
    first, second = cache.entries(folder)[:2]
    wrong = cache.load(folder, second.key)
    cache.store(folder, first.key, wrong._replace(probe=cache.load(folder, first.key).probe), first.about)
    said(screen)

    bad = commands.cache_verify(str(folder), screen), said(screen)
    good = commands.cache_verify(str(folder), screen), said(screen)
    shutil.rmtree(model)
    alone = commands.cache_verify(str(folder), screen), said(screen)

    assert (bad[0], good[0], alone[0]) == (1, 0, 0)
    assert "4 weights are good, 1 damaged" in bad[1]
    assert f"(uid {os.getuid()})" in caplog.text
    assert "4 weights are good, 0 damaged; 4 compared with their base model" in good[1]
    assert "0 compared with their base model, the base models of 4 are gone or changed" in alone[1]


def test_an_empty_or_absent_cache_is_no_error(tmp_path, screen):
    codes = [
        commands.cache_ls(str(tmp_path / "none"), screen),
        commands.cache_verify(str(tmp_path / "none"), screen),
        commands.cache_prune(str(tmp_path / "none"), older_than_days=1, console=screen),
    ]

    assert codes == [0, 0, 0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "give --max-gb X"), ({"max_gb": -1.0}, "--max-gb is at least 0"), ({"older_than_days": -1.0}, "at least 0")],
)
def test_pruning_without_or_with_negative_limits_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        commands.cache_prune(str(tmp_path), **options)
