"""Batched matching pursuit against scikit-learn, against plain NumPy, and where signals and dictionaries are bad."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch.nn import functional as F

from helpers.dictionary import Packed, Rows, expander_sae, pursuit
from helpers.parts.masks import left_regular
from helpers.settings import generator
from tests.reference.pursuit_numpy import slow_nonnegative, slow_omp

WAYS = [{"gram": True}, {"gram": False}]


def problem(batch=20, m=32, n=100, k=4, seed=0, dtype=torch.float64, noise=0.05, positive=False):
    """Random unit atoms, and signals made of k of them."""
    g = generator(seed)
    atoms = F.normalize(torch.randn(n, m, generator=g, dtype=dtype), dim=1)
    values = torch.rand(batch, k, generator=g, dtype=dtype) + 1
    if not positive:
        values *= torch.randint(0, 2, (batch, k), generator=g) * 2 - 1
    support = torch.rand(batch, n, generator=g).topk(k).indices
    x = (values[:, None] @ atoms[support])[:, 0]
    return x + noise * torch.randn(batch, m, generator=g, dtype=dtype), atoms


def packed(n=60, m=32, degree=5, seed=0, dtype=torch.float64):
    rows = left_regular(n, m, degree, generator(seed))
    return expander_sae(rows, m, 1, generator=generator(seed), dtype=dtype).decoder


def residual(x, atoms, codes):
    return x - codes.to_dense(len(atoms)) @ atoms


def assert_sound(codes, n):
    assert codes.values.isfinite().all()
    assert 0 <= codes.indices.min() <= codes.indices.max() < n
    ordered = codes.indices.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an index stands twice in one row"


# -- scikit-learn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_same_support_and_coefficients_as_scikit_learn(way, dtype):
    orthogonal_mp = pytest.importorskip("sklearn.linear_model").orthogonal_mp
    x, atoms = problem(batch=50, m=64, n=256, k=6, dtype=dtype)
    theirs = orthogonal_mp(atoms.T.double().numpy(), x.T.double().numpy(), n_nonzero_coefs=6).T
    ours = pursuit.omp(x, atoms, 6, **way).to_dense(256).numpy()
    np.testing.assert_array_equal(ours != 0, theirs != 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_same_early_stop_as_scikit_learn(way):
    orthogonal_mp = pytest.importorskip("sklearn.linear_model").orthogonal_mp
    x, atoms = problem(batch=30, m=64, n=256, k=5, noise=0.1)
    ours = pursuit.omp(x, atoms, 20, tolerance=0.15, **way).to_dense(256).numpy()
    for row, signal in zip(ours, x, strict=True):
        theirs = orthogonal_mp(atoms.T.numpy(), signal.numpy(), tol=0.15**2 * float(signal @ signal))
        np.testing.assert_allclose(row, theirs, atol=1e-9)
    assert len(set((ours != 0).sum(1))) > 1, "samples stop at different steps, or the test shows nothing"


# -- plain NumPy -------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 7),
    st.integers(1, 12),
    st.integers(1, 30),
    st.data(),
    st.sampled_from(pursuit._SELECT),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_equals_numpy_on_any_shape(batch, m, n, data, select, gram):
    k = data.draw(st.integers(1, min(n, max(1, m - 1))))
    g = generator(data.draw(st.integers(0, 99)))
    atoms = F.normalize(torch.randn(n, m, generator=g, dtype=torch.float64), dim=1)
    x = torch.randn(batch, m, generator=g, dtype=torch.float64)
    codes = pursuit.omp(x, atoms, k, select=select, gram=gram, chunk=3)
    assert_sound(codes, n)
    for row, signal in enumerate(x.numpy()):
        support, values = slow_omp(signal, atoms.numpy(), k, signed=select == "signed")
        found = codes.fires[row]
        assert codes.indices[row][found].tolist() == support
        np.testing.assert_allclose(codes.values[row][found], values, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("select", pursuit._SELECT)
def test_tolerance_ends_each_sample_by_itself(way, select):
    x, atoms = problem(batch=40, k=4, noise=0.1, positive=True)
    x[0] = 0
    codes = pursuit.omp(x, atoms, 12, select=select, tolerance=0.15, chunk=16, **way)
    lengths = []
    for row, signal in enumerate(x.numpy()):
        support, values = slow_omp(signal, atoms.numpy(), 12, signed=select == "signed", tolerance=0.15)
        assert codes.indices[row][codes.fires[row]].tolist() == support
        np.testing.assert_allclose(codes.values[row][codes.fires[row]], values, atol=1e-10)
        lengths.append(len(support))
    assert len(set(lengths)) > 2 and lengths[0] == 0
    assert_sound(codes, len(atoms))


def test_signed_and_unsigned_choice_differ():
    atoms = torch.eye(3)
    x = torch.tensor([[-3.0, 2.0, 1.0]])
    assert pursuit.omp(x, atoms, 1).indices.item() == 0
    assert pursuit.omp(x, atoms, 1, select="signed").indices.item() == 1
    codes = pursuit.omp(x, atoms, 3, select="signed")  # stops where no correlation is positive
    assert codes.to_dense(3).tolist() == [[0, 2, 1]]
    assert pursuit.omp(x, atoms, 3, nonnegative=True).to_dense(3).tolist() == [[0, 2, 1]]


# -- non-negative ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_nonnegative_equals_numpy(k):
    x, atoms = problem(batch=25, m=20, n=50, k=5, noise=0.3)
    codes = pursuit.omp(x, atoms, k, nonnegative=True, chunk=10)
    assert_sound(codes, 50)
    expected = [slow_nonnegative(signal, atoms.numpy(), k) for signal in x.numpy()]
    np.testing.assert_allclose(codes.to_dense(50).numpy(), expected, atol=1e-8)
    assert (codes.values >= 0).all()


def test_nonnegative_equals_numpy_where_several_atoms_leave_at_once():
    """Rare, so it takes many atoms: of those beyond zero, the one that is first to reach it must leave."""
    g = generator(4)
    atoms = F.normalize(torch.randn(100, 60, generator=g, dtype=torch.float64), dim=1)
    x = torch.randn(40, 60, generator=g, dtype=torch.float64)
    expected = [slow_nonnegative(signal, atoms.numpy(), 60) for signal in x.numpy()]
    np.testing.assert_allclose(pursuit.omp(x, atoms, 60, nonnegative=True).to_dense(100), expected, atol=1e-7)


def test_nonnegative_becomes_the_best_nonnegative_fit():
    x, atoms = problem(batch=15, m=12, n=40, k=4, noise=0.5)
    codes = pursuit.omp(x, atoms, 40, nonnegative=True)
    best = [nnls(atoms.T.numpy(), signal)[1] for signal in x.numpy()]
    np.testing.assert_allclose(residual(x, atoms, codes).norm(dim=1), best, atol=1e-8)


def test_atoms_leave_in_the_nonnegative_pursuit():
    """The first atom chosen is between two others, which explain the signal without it."""
    atoms = F.normalize(torch.tensor([[1.0, 1.0, -0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64), dim=1)
    x = torch.tensor([[1.0, 1.0, 0.1]], dtype=torch.float64)
    codes = pursuit.omp(x, atoms, 3, nonnegative=True)
    assert pursuit.omp(x, atoms, 1, nonnegative=True).indices.item() == 0
    np.testing.assert_allclose(codes.to_dense(3)[0], [0, 1, 1], atol=1e-12)


# -- what holds whatever the input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_residual_is_orthogonal_and_falls(way):
    x, atoms = problem(batch=30, noise=0.5)
    lengths = [x.norm(dim=1)]
    for k in range(1, 9):
        codes = pursuit.omp(x, atoms, k, **way)
        rest = residual(x, atoms, codes)
        assert (atoms[codes.indices] @ rest[:, :, None]).abs().max() < 1e-12
        lengths.append(rest.norm(dim=1))
    assert (torch.stack(lengths).diff(dim=0) < 0).all()


def test_the_basis_is_orthogonal_where_atoms_are_nearly_parallel():
    """One pass of Gram and Schmidt loses as many digits as the atoms' angles are small, squared."""
    g = generator(0)
    atoms = F.normalize(torch.randn(20, generator=g) + 1e-4 * torch.randn(10, 20, generator=g).double(), dim=1)
    x = torch.randn(3, 20, generator=g).double()
    state = pursuit._ByResidual(x, pursuit.Atoms(atoms), 8)
    indices, used = pursuit._choose(x, state.atoms, 8, "magnitude", None, state)
    assert used.all()
    torch.testing.assert_close(state.basis @ state.basis.mT, torch.eye(8).double().expand(3, 8, 8), atol=1e-12, rtol=0)


def test_the_two_ways_and_all_chunks_agree():
    x, atoms = problem(batch=37, m=48, n=300, k=6, noise=0.2)
    first = pursuit.omp(x, atoms, 10)
    for way in ({"gram": True}, {"gram": False}, {"chunk": 1}, {"chunk": 8, "gram": True}, {"chunk": 1000}):
        again = pursuit.omp(x, atoms, 10, **way)
        assert (again.indices == first.indices).all(), way
        torch.testing.assert_close(again.values, first.values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [*WAYS, {"nonnegative": True}, {"select": "signed"}, {"tolerance": 0.4}], ids=str)
@pytest.mark.parametrize("degree", [1, 5, 30])
def test_packed_atoms_are_the_dense_ones(options, degree):
    atoms = packed(degree=degree)
    x = torch.randn(25, 32, generator=generator(1), dtype=torch.float64)
    ours, dense = (pursuit.omp(x, a, 6, **options) for a in (atoms, atoms.vectors().detach()))
    assert (ours.indices[ours.fires] == dense.indices[dense.fires]).all()
    torch.testing.assert_close(ours.values, dense.values, rtol=1e-9, atol=1e-11)


@given(st.integers(0, 5), st.integers(2, 40), st.integers(1, 50), st.data())
@settings(max_examples=20, deadline=None)
def test_gathered_correlations_are_the_product(batch, m, n, data):
    degree = data.draw(st.integers(-(-m // n), m))
    atoms = packed(n, m, degree)
    x = torch.randn(batch, m, generator=generator(2), dtype=torch.float64)
    expected = x @ atoms.vectors().detach().T
    for method in ("gather", "dense", None):
        torch.testing.assert_close(pursuit.correlations(x, atoms, method=method), expected, rtol=1e-12, atol=1e-12)


def test_atoms_of_unequal_degree():
    rows = left_regular(40, 16, 6, generator(0))
    degrees = torch.randint(1, 7, (40,), generator=generator(1))
    atoms = Packed(torch.randn(40, 6, generator=generator(2), dtype=torch.float64), rows, 16, degrees=degrees)
    atoms.normalise_()
    x = torch.randn(9, 16, generator=generator(3), dtype=torch.float64)
    one, two = pursuit.omp(x, atoms, 4), pursuit.omp(x, atoms.vectors().detach(), 4)
    assert (one.indices == two.indices).all()


def test_a_bias_is_no_part_of_an_atom():
    x, atoms = problem()
    biased = Rows(atoms, torch.randn(len(atoms), generator=generator(5), dtype=torch.float64))
    assert (pursuit.omp(x, biased, 4).indices == pursuit.omp(x, atoms, 4).indices).all()


def test_the_inputs_are_left_as_they_were():
    x, atoms = problem()
    before = x.clone(), atoms.clone()
    for options in (*WAYS, {"nonnegative": True}):
        pursuit.omp(x, atoms, 5, **options)
    assert torch.equal(x, before[0]) and torch.equal(atoms, before[1])


# -- bad signals and bad dictionaries ----------------------------------------------------------------------------------

EVERY = [*WAYS, {"nonnegative": True}]


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_atoms_are_not_both_chosen(options, dtype):
    x, atoms = problem(n=30, dtype=dtype, noise=0)
    twice = torch.cat([atoms, atoms, -atoms])
    codes = pursuit.omp(x, twice, 20, **options)
    assert_sound(codes, 90)
    atom = torch.where(codes.fires, codes.indices % 30, -1 - torch.arange(20))
    ordered = atom.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    assert residual(x, twice, codes).norm(dim=1).max() < 1e-5 * x.norm(dim=1).max()


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_a_zero_signal_has_a_zero_code(options):
    x, atoms = problem()
    x[3] = 0
    codes = pursuit.omp(x, atoms, 5, **options)
    assert (codes.values[3] == 0).all() and codes.fires[2].any()
    assert_sound(codes, len(atoms))
    assert (pursuit.omp(0 * x, atoms, 5, **options).values == 0).all()


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_more_atoms_than_dimensions(options, dtype):
    x, atoms = problem(m=8, n=40, k=3, dtype=dtype)
    codes = pursuit.omp(x, atoms, 40, **options)
    assert_sound(codes, 40)
    assert codes.fires.sum(1).max() <= 8, "eight dimensions hold eight independent atoms"
    if not options.get("nonnegative"):
        assert residual(x, atoms, codes).norm(dim=1).max() < 1e-5 * x.norm(dim=1).max()


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_dictionary_of_low_rank(options, dtype):
    """Atoms span three of eight dimensions; the signals do not lie there."""
    g = generator(0)
    atoms = F.normalize(torch.randn(30, 3, generator=g, dtype=dtype) @ torch.randn(3, 8, generator=g, dtype=dtype))
    x = torch.randn(20, 8, generator=g, dtype=dtype)
    codes = pursuit.omp(x, atoms, 10, **options)
    assert_sound(codes, 30)
    assert codes.fires.sum(1).max() <= 3
    if not options.get("nonnegative"):
        best = x - x @ torch.linalg.pinv(atoms.double(), rtol=1e-4).to(dtype) @ atoms
        assert (residual(x, atoms, codes) - best).abs().max() < 1e-4


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_atom_in_the_span_of_others_is_passed_over(way):
    """A correlation of 7e-10 is far above rounding, but the third atom is nearly the sum of the first two."""
    near = F.normalize(torch.tensor([[1.0, 1.0, 1e-9, 0.0]], dtype=torch.float64))
    atoms = torch.cat([torch.eye(2, 4, dtype=torch.float64), near, torch.eye(4, dtype=torch.float64)[3:]])
    x = torch.tensor([[1.0, -0.9, 1.0, 1e-10]], dtype=torch.float64)
    codes = pursuit.omp(x, atoms, 4, **way)
    assert_sound(codes, 4)
    assert codes.indices.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_allclose(codes.values[0], [1, -0.9, 0, 1e-10], rtol=1e-6)


def test_an_atom_of_zeros_is_never_chosen():
    x, atoms = problem(n=10)
    atoms[4] = 0
    for options in EVERY:
        codes = pursuit.omp(x, atoms, 10, **options)
        assert_sound(codes, 10)
        assert (codes.values[codes.indices == 4] == 0).all()


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_no_signals_give_no_codes(options):
    _, atoms = problem()
    codes = pursuit.omp(atoms[:0], atoms, 5, **options)
    assert codes.indices.shape == codes.values.shape == (0, 5)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_atom_is_passed_over_below_the_documented_share_alone(way, dtype):
    """At condition 1e4 a pair has a share of 2e-4 outside each other: float64 takes both, float32 a zero for one."""
    bound = (100 * torch.finfo(dtype).eps) ** 0.5
    base = torch.linalg.qr(torch.randn(40, 40, generator=generator(0), dtype=torch.float64)).Q
    x = base[0] + torch.linspace(1, 2, 50, dtype=torch.float64)[:, None] * base[1]
    for share in (bound / 2, 2 * bound, 2e-4, 1e-2):
        atoms = base.clone()
        atoms[1] = (1 - share**2) ** 0.5 * base[0] + share * base[1]
        codes = pursuit.omp(x.to(dtype), atoms.to(dtype), 2, **way)
        assert_sound(codes, 40)
        assert (codes.to_dense(40)[:, :2] != 0).sum(1).tolist() == [2 if share > bound else 1] * 50, share


# -- coefficients on a support -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_least_squares_equals_numpy(dtype):
    x, atoms = problem(batch=12, dtype=dtype)
    indices = torch.rand(12, 100, generator=generator(3)).topk(7).indices
    ours = pursuit.least_squares(x, 3 * atoms, indices, chunk=5)
    for row in range(12):
        expected = np.linalg.lstsq(3 * atoms[indices[row]].T.double().numpy(), x[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(ours[row], expected, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_least_squares_on_a_dependent_support_is_the_smallest_solution(dtype):
    x, atoms = problem(batch=6, m=10, n=12, dtype=dtype)
    atoms[1] = atoms[0]
    atoms[2] = F.normalize(atoms[3] + atoms[4], dim=0)
    indices = torch.arange(6).expand(6, 6)
    ours = pursuit.least_squares(x, atoms, indices)
    expected = np.linalg.lstsq(atoms[:6].T.double().numpy(), x.T.double().numpy(), rcond=1e-6)[0].T
    np.testing.assert_allclose(ours, expected, atol=1e-4 if dtype == torch.float32 else 1e-9)
    torch.testing.assert_close(ours[:, 0], ours[:, 1])
    everything = torch.arange(12).expand(6, 12)  # more atoms than dimensions
    again = pursuit.least_squares(x, atoms, everything)
    assert (x - again @ atoms).abs().max() < 1e-4


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 0}, "k=0 .*allowed: 1 to n=100"),
        ({"k": 101}, "k=101 .*allowed: 1 to n=100"),
        ({"select": "largest"}, "select='largest' is unknown; allowed: 'magnitude', 'signed'"),
        ({"tolerance": 1.5}, "tolerance=1.5"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"chunk": 0}, "chunk=0"),
        ({"gram": True, "nonnegative": True}, "gram=True with nonnegative=True"),
    ],
)
def test_bad_parameters_are_named(options, told):
    x, atoms = problem()
    with pytest.raises(ValueError, match=told):
        pursuit.omp(x, atoms, **{"k": 3, **options})


def test_bad_signals_and_supports_are_named():
    x, atoms = problem()
    with pytest.raises(ValueError, match=r"x has shape \[20, 31\]; allowed: \[batch, 32\]"):
        pursuit.omp(x[:, 1:], atoms, 3)
    with pytest.raises(ValueError, match="not a number"):
        pursuit.omp(x / 0, atoms, 3)
    with pytest.raises(ValueError, match="run from 0 to 100; allowed: 0 to 99"):
        pursuit.least_squares(x, atoms, torch.tensor([[0, 100]]).expand(len(x), 2))
    with pytest.raises(ValueError, match=r"indices has shape \[3, 2\]; allowed: \[20, k\]"):
        pursuit.least_squares(x, atoms, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="low-rank"):
        pursuit.omp(x, Rows(atoms[:, :4], down=torch.randn(4, 32)), 3)
    with pytest.raises(ValueError, match="method='gather' with dense atoms"):
        pursuit.correlations(x, atoms, method="gather")
    with pytest.raises(ValueError, match="method='fast' is unknown"):
        pursuit.correlations(x, atoms, method="fast")


def test_one_signal_alone_is_no_batch():
    """Without the types that are checked while tests run."""
    x, atoms = problem()
    support = torch.zeros(len(x), 2, dtype=torch.long)
    omp, least_squares, correlations = map(unwrap, (pursuit.omp, pursuit.least_squares, pursuit.correlations))
    for shape, signal in {r"\[32\]": x[0], r"\[1, 20, 32\]": x[None], r"\[20, 1, 32\]": x[:, None]}.items():
        for ask in (omp, least_squares, correlations):
            with pytest.raises(ValueError, match=rf"x has shape {shape}; allowed: \[batch, 32\]"):
                ask(signal, atoms, *{omp: (3,), least_squares: (support,)}.get(ask, ()))
    with pytest.raises(ValueError, match=r"atoms have shape \[32\]; allowed: \[n, length\]"):
        omp(x, atoms[0], 3)
    with pytest.raises(ValueError, match=r"indices has shape \[20\]; allowed: \[20, k\]"):
        least_squares(x, atoms, support[:, 0])


def test_the_cheaper_way_is_taken():
    """Many signals pay for a Gram matrix; few do not, nor do thin packed atoms, nor a matrix beyond the limit."""
    _, atoms = problem(m=512, n=2048)
    dense, thin = pursuit.Atoms(atoms.float()), pursuit.Atoms(packed(2048, 512, 3, dtype=torch.float32))
    assert pursuit._gram_pays(10_000, dense, 16) and not pursuit._gram_pays(1, dense, 16)
    assert pursuit._gram_pays(10_000, dense, 64) and not pursuit._gram_pays(100, thin, 16)
    assert thin.gathers and not pursuit.Atoms(packed(64, 32, 30)).gathers


def test_the_gram_matrix_has_a_limit(monkeypatch):
    monkeypatch.setattr(pursuit, "GRAM_BYTES", 100 * 100 * 8 - 1)
    assert not pursuit._gram_pays(10**9, pursuit.Atoms(problem()[1]), 5)


def test_the_gram_matrix_is_that_of_the_atoms():
    for atoms in (packed(1100, 40, 4), packed(1100, 40, 35), problem(m=40, n=1100)[1]):
        dense = atoms if isinstance(atoms, torch.Tensor) else atoms.vectors().detach()
        torch.testing.assert_close(pursuit.Atoms(atoms).gram(), dense @ dense.T, rtol=1e-12, atol=1e-12)


# -- signals and atoms of any size and dtype ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [-140, -64, -12, 4, 60, 126])
def test_neither_signals_nor_atoms_have_a_unit(options, dtype, power):
    """Sizes are powers of two, so codes are the same to the bit; sizes beyond the dtype are left out."""
    x, atoms = problem(dtype=dtype)
    plain = pursuit.omp(x, atoms, 4, **options)
    wide = x.double() * 2.0**power
    small = (atoms.double() * 2.0**power).to(dtype)
    codes = pursuit.omp(wide, atoms.double(), 4, **options)
    torch.testing.assert_close(
        codes.to_dense(100) / 2.0**power, pursuit.omp(x.double(), atoms.double(), 4, **options).to_dense(100)
    )
    small_x = wide.to(dtype)
    holds_x, holds_atoms = (torch.equal(a.double(), b.double() * 2.0**power) for a, b in ((small_x, x), (small, atoms)))
    assert power != 4 or (holds_x and holds_atoms)  # every dtype holds one
    if holds_x:
        codes = pursuit.omp(small_x, atoms, 4, **options)
        assert torch.equal(codes.indices, plain.indices) and torch.equal(codes.values, plain.values * 2.0**power)
    if holds_x and holds_atoms:
        codes = pursuit.omp(small_x, small, 4, **options)
        assert torch.equal(codes.indices, plain.indices) and torch.equal(codes.values, plain.values)
    if holds_atoms:
        codes = pursuit.omp(small[:20], small, 1, **options)  # atoms are their own codes
        assert torch.equal(codes.values, torch.ones_like(codes.values)) or dtype.itemsize == 2
        at = plain.indices
        least = pursuit.least_squares((wide).to(dtype) if dtype.itemsize > 2 else wide, small, at)
        torch.testing.assert_close(least, pursuit.least_squares(x, atoms, at), rtol=1e-2, atol=1e-5)
    assert plain.values.dtype == dtype and plain.fires.sum(1).double().mean() > 3.5


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("long", [1e2, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_long_atom_does_not_hide_the_others(options, long, dtype):
    x, atoms = problem(dtype=dtype)
    atoms[3] *= long
    codes = pursuit.omp(x, atoms, 5, **options)
    wanted = pursuit.omp(
        x.double(), atoms.double() / torch.where(torch.arange(100) == 3, long / 100, 1)[:, None], 5, **options
    )
    assert_sound(codes, 100)
    assert torch.equal(codes.indices.sort().values, wanted.indices.sort().values)
    values = codes.to_dense(100).double()
    values[:, 3] *= long / 100
    torch.testing.assert_close(values, wanted.to_dense(100), rtol=1e-3, atol=1e-4)


def test_what_no_dtype_can_say_is_refused():
    x, atoms = problem(dtype=torch.float32)
    for ask in (lambda a, b: pursuit.omp(a, b, 3), lambda a, b: pursuit.least_squares(a, b, torch.zeros(20, 1).long())):
        for large, what in ((1e30, "overflow"), (1e-30, "vanish")):
            with pytest.raises(ValueError, match=what):
                ask(large * x, atoms / large)
    atoms[17, 2] = torch.nan
    for ask in (lambda: pursuit.omp(x, atoms, 3), lambda: pursuit.least_squares(x, atoms, torch.zeros(20, 1).long())):
        with pytest.raises(ValueError, match="atoms have entries"):
            ask()
