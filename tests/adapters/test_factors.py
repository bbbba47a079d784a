"""LoLDU's factors against torch.linalg.lu in float64, and what all methods share."""

import pytest
import torch

from adapters import METHODS
from adapters.factors import base_fingerprint, delta_weight, lora_pair, probe_digest
from adapters.loldu import loldu_factors, lu_of_panel, rebuilt_error
from adapters.svd import rebuilt_error as svd_rebuilt_error

SQUARE, TALL, WIDE = (24, 24), (40, 24), (24, 40)


def gaussian(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors_of(W, r, **options):
    return loldu_factors(W[:, :r], lambda rows: W[rows.long()], **options)


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("r", [1, 2, 7, 23, 24])
def test_factors_are_the_leading_block_of_the_full_lu(shape, r):
    """The panel's pivots, P L_r and d_r are those of the whole weight; signs and order included."""
    W = gaussian(shape)
    P, L, U = torch.linalg.lu(W)

    write, read, pivots, d, _ = factors_of(W, r)

    assert pivots.tolist() == P.argmax(dim=0)[:r].tolist()
    torch.testing.assert_close(write, (P @ L)[:, :r], rtol=0, atol=1e-12)  # float64 eps x growth over 24 columns
    torch.testing.assert_close(d, U.diagonal()[:r].float(), rtol=1e-6, atol=0)  # stored in float32
    U_r = (U / U.diagonal()[:, None])[:r]
    torch.testing.assert_close(read @ W[pivots.long()], U_r, rtol=0, atol=1e-10)  # through the inverse of L11 and d


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
def test_unit_diagonals_are_exactly_one(shape):
    W = gaussian(shape, dtype=torch.float32)

    own = factors_of(W, 24)
    given = factors_of(W, 24, pivots=torch.randperm(24, generator=torch.Generator().manual_seed(1)))

    for factors in (own, given):
        chosen = factors.write[factors.pivots.long()]
        assert torch.equal(chosen.diagonal(), torch.ones(24))
        assert torch.equal(chosen.triu(1), torch.zeros(24, 24))


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("r", [7, 24])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"embedding": True}, {"pivots": True}], ids=str)
def test_what_is_not_multiplied_is_exactly_zero(shape, r, options):
    """The layer leaves out the zeros of Read, and of Write's chosen rows; also of a weight of nearly low rank."""
    W = gaussian((shape[0], 3)) @ gaussian((3, shape[1]), seed=1) + 1e-4 * gaussian(shape, seed=2)
    if "pivots" in options:
        options = {"pivots": torch.randperm(24, generator=torch.Generator().manual_seed(1))[:r]}

    factors = factors_of(W, r, **options)
    chosen = factors.write[:r] if "embedding" in options else factors.write[factors.pivots.long()]

    assert torch.equal(factors.read, factors.read.tril())
    assert torch.equal(chosen, chosen.tril())


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
def test_full_rank_factors_multiply_back_to_the_weight(shape):
    W = gaussian(shape)

    factors = factors_of(W, 24)

    rebuilt = factors.write @ torch.diag(factors.values.double()) @ factors.read @ W[factors.pivots.long()]
    torch.testing.assert_close(rebuilt, W, rtol=0, atol=1e-5)  # d_r is rounded to float32: 6e-8 x growth


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("r", [1, 7, 24])
def test_given_pivots_are_eliminated_in_their_order(shape, r):
    """With any rows chosen, P L_r diag(d) U_r still agrees with W in the first r columns and those rows."""
    W = gaussian(shape)
    pivots = torch.randperm(shape[0], generator=torch.Generator().manual_seed(2))[:r]

    factors = factors_of(W, r, pivots=pivots)

    product = factors.write @ torch.diag(factors.values.double()) @ (factors.read @ W[pivots])
    assert factors.pivots.tolist() == pivots.tolist()
    growth = factors.write.abs().max()  # no pivoting, no bound on it; float32 d_r gives 6e-8 of it squared
    torch.testing.assert_close(product[:, :r], W[:, :r], rtol=0, atol=1e-6 * float(growth) ** 2)
    torch.testing.assert_close(product[pivots], W[pivots], rtol=0, atol=1e-6 * float(growth) ** 2)


def test_its_own_pivots_given_back_give_the_same_bits():
    W = gaussian((64, 48), dtype=torch.float32)
    own = factors_of(W, 32)

    again = factors_of(W, 32, pivots=own.pivots)

    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))


def test_elimination_in_the_given_order_equals_lapack_on_rows_already_in_order():
    """Rows sorted by another weight's pivots need no swap; then both ways must agree."""
    W = gaussian((32, 32))
    P, L, U = torch.linalg.lu(W)

    lower, upper, _ = lu_of_panel(torch.cat([P.T @ W, 9 * W]), pivots=torch.arange(32))

    torch.testing.assert_close(lower[:32], L, rtol=0, atol=1e-11)
    torch.testing.assert_close(upper, U, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("r", [1, 7, 24])
def test_the_update_is_p_l_diag_core_u(shape, embedding, normalize, r):
    """Linear and embedding forms, plain and with directions of norm one, are the same update of W."""
    W, core = gaussian(shape), gaussian((r,), seed=1)
    P, L, U = torch.linalg.lu(W)
    left, right = (P @ L)[:, :r], (U / U.diagonal()[:, None])[:r]
    if normalize:
        left, right = left / left.norm(dim=0), right / right.norm(dim=1, keepdim=True)

    factors = factors_of(W, r, embedding=embedding, normalize=normalize)
    update = delta_weight(W, factors, core, embedding=embedding)
    A, B = lora_pair(W, factors, core, embedding=embedding)

    torch.testing.assert_close(update, left * core @ right, rtol=0, atol=1e-9)
    assert A.shape[0] == B.shape[1] == r
    torch.testing.assert_close((B @ A).T if embedding else B @ A, update)


def test_rows_of_the_weight_are_fetched_only_where_they_are_needed():
    """Factors of an unnormalised linear weight come from the panel alone: a disk reads r columns."""
    W = gaussian(WIDE)

    def refuse(rows):
        raise AssertionError("rows were asked for")

    loldu_factors(W[:, :4], refuse)
    with pytest.raises(AssertionError, match="asked for"):
        loldu_factors(W[:, :4], refuse, normalize=True)


def test_a_zero_pivot_names_its_column():
    W = gaussian((12, 10))
    W[:, 5] = W[:, 2] - 2 * W[:, 3]

    with pytest.raises(ValueError, match=r"zero pivot in column 5: .* beyond rank 5"):
        factors_of(W, 8)

    assert len(factors_of(W, 5).values) == 5


@pytest.mark.parametrize("zero", [(12, 1), (12, 8)])
def test_a_weight_of_zeros_has_no_factors(zero):
    with pytest.raises(ValueError, match="zero pivot in column 0"):
        lu_of_panel(torch.zeros(zero))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_counted(bad):
    W = gaussian((12, 8))
    W[3, 1] = W[4, 2] = bad

    with pytest.raises(ValueError, match="2 of the 96 numbers in its first 8 columns are NaN or infinite"):
        lu_of_panel(W)


@pytest.mark.parametrize("pivots", [[0, 1], [0, 1, 1], [0, 1, 12], [-1, 1, 2]])
def test_pivots_that_are_not_r_different_rows_are_refused(pivots):
    with pytest.raises(ValueError, match=r"saved pivots are not 3 different rows out of 12"):
        lu_of_panel(gaussian((12, 3)), torch.tensor(pivots))


def test_saved_pivots_with_a_zero_in_the_way_are_refused():
    W = gaussian((12, 3))
    W[7, 0] = 0

    with pytest.raises(ValueError, match="zero pivot in column 0"):
        lu_of_panel(W, torch.tensor([7, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_factored_in_float32(dtype):
    W = gaussian((24, 16)).to(dtype)

    lower, upper, pivots = lu_of_panel(W)

    assert lower.dtype == upper.dtype == torch.float32
    assert pivots.tolist() == lu_of_panel(W.float())[2].tolist()


def test_the_probe_knows_a_float16_weight_loaded_as_float32_and_no_other_change():
    W = gaussian((300, 200)).half()

    digest = probe_digest(W, W.shape)

    assert torch.equal(digest, probe_digest(W.float(), W.shape))
    assert not torch.equal(digest, probe_digest(W.bfloat16(), W.shape))
    assert not torch.equal(digest, probe_digest(W.view(200, 300), (200, 300)))
    assert not torch.equal(digest, probe_digest(W.roll(1, 0), W.shape))
    assert not torch.equal(digest, probe_digest(W.roll(1, 1), W.shape))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 5), (64, 16), (65, 1000)])
def test_the_probe_reads_first_and_last_rows_of_any_shape(shape):
    W = gaussian(shape)
    first, last = W.clone(), W.clone()
    first[0] += 1
    last[-1] += 2

    assert len({bytes(probe_digest(X, shape).tolist()) for X in (W, first, last)}) == 3


def test_the_fingerprint_forgets_order_and_repeats_but_no_tensor():
    a, b, c = (probe_digest(gaussian((8, 8), seed), (8, 8)) for seed in range(3))

    assert base_fingerprint([a, b]) == base_fingerprint([b, a, a])
    assert len({base_fingerprint(part) for part in ([a], [a, b], [a, b, c])}) == 3


@pytest.mark.parametrize("r", [1, 8, 64])
def test_rebuilt_error_tells_rounding_from_another_weight(r):
    """bf16 (0.4 % per entry) stays below half the bound of 0.1; another Gaussian weight is far above."""
    W = gaussian((96, 64), dtype=torch.float32)
    own = factors_of(W, r)

    same, rounded, other = (
        rebuilt_error(X[:, :r], own.pivots, own.values)
        for X in (W, W.bfloat16().float(), gaussian((96, 64), seed=5, dtype=torch.float32))
    )

    assert same < 1e-6
    assert rounded < 0.05
    assert other > 0.3


@pytest.mark.parametrize("error_of", [lambda W, saved: rebuilt_error(W, torch.arange(4), saved), svd_rebuilt_error])
def test_rebuilt_error_moves_saved_values_to_the_weight(error_of):
    """Adapters are loaded in main memory. Meta is the second device here, and can be moved nowhere."""
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        error_of(torch.eye(4), torch.ones(4, device="meta"))


def test_rebuilt_error_sees_growth_where_the_diagonal_agrees():
    """A row that now outgrows the saved pivot: d_r is the same, L is three times what pivoting allows."""
    panel = torch.tensor([[1.0], [3.0], [0.5]])

    error = rebuilt_error(panel, torch.tensor([0]), torch.tensor([1.0]))

    assert error == 2


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize_directions": True}], ids=["plain", "norm one"])
@pytest.mark.parametrize("method", ["loldu", "svfit", "loraxs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_factors_of_a_weight_are_taken_for_them(method, options, embedding, dtype):
    """Even for ill-conditioned weights, any rank and rounded write maps; and with a tenth of the rows from another
    weight."""
    how, draw = METHODS[method](**options).factorization(), torch.Generator().manual_seed(0)
    left, right = torch.randn(120, 96, generator=draw), torch.randn(96, 200, generator=draw)
    for W in (left @ right, left @ torch.logspace(0, -5, 96).diag() @ right, right.T.bfloat16()):
        for r in (1, 8, 90):

            def factors(W, r=r):
                found = how.factors(how.panel(W, r), r, rows=lambda at: W[at.long()], embedding=embedding)
                return found._replace(write=found.write.to(dtype))

            own = factors(W)
            other = factors(torch.randn(W.shape, generator=draw))

            assert how.misfit(W, own, embedding=embedding) is None
            assert how.misfit(W, other, embedding=embedding)
            if method == "loldu":
                rows = own.write.clone()
                rows[7::10] = torch.randn(rows[7::10].shape, generator=draw).to(dtype)
                assert how.misfit(W, own._replace(write=rows), embedding=embedding)


def test_comparing_factors_leaves_torchs_random_numbers_alone():
    how, W = METHODS["loldu"]().factorization(), torch.randn(50, 40)
    own = how.factors(W[:, :8], 8, rows=lambda rows: W[rows.long()])
    torch.manual_seed(0)

    how.misfit(W, own)

    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
