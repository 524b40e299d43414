"""The constructions of paper C against slow NumPy versions, closed forms, and the bounds that they must obey."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.dictionary import RankOneDictionary, Rows, dense_mlp, secret_moe
from helpers.parts import constructions as c
from helpers.parts import masks
from helpers.parts.worlds import SparseSource, random_atoms
from helpers.settings import generator
from tests.reference import constructions_numpy as reference

F64 = torch.float64
ROUNDING = 1e-11


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed + 31 * sum(shape)), dtype=F64)


def unit(n, d, seed=0):
    return random_atoms(n, d, generator(seed), F64)


def supports(batch, n, k, seed=0):
    return torch.rand(batch, n, generator=generator(seed)).topk(k, dim=1).indices


def inside(atoms, chosen, seed=0):
    """Inputs in the span of their supports."""
    return torch.einsum("bk,bkd->bd", randn(*chosen.shape, seed=seed), atoms[chosen])


def polynomial(terms, p, m, d, seed=0):
    return c.Polynomial(randn(terms, m, seed=seed), randn(terms, p, d, seed=seed))


def clustered_atoms(clusters, size, d, cosine):
    """Unit atoms in clusters: two of the same one have exactly this cosine, the clusters stand at random."""
    frames = torch.linalg.qr(randn(clusters, d, size + 1)).Q.mT
    return (cosine**0.5 * frames[:, :1] + (1 - cosine) ** 0.5 * frames[:, 1:]).flatten(0, 1)


def linear_bound(atoms, chosen, x, norm=1.0):
    """‖A‖ √(δ_S² ‖P_S x‖² + ‖x − P_S x‖²), for each sample."""
    projected = c.projection(atoms, chosen, x)
    return norm * torch.hypot(c.isometry_of(atoms, chosen) * projected.norm(dim=1), (x - projected).norm(dim=1))


# -- δ -----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_isometry_constants_and_bounds_against_the_slow_versions(n, d, k, seed):
    k = min(k, n)
    atoms = unit(n, d, seed)
    if seed % 3 == 0:  # atoms of other lengths, and a duplicate: singular Gram matrices
        atoms = atoms * (0.5 + torch.rand(n, 1, generator=generator(seed), dtype=F64))
        atoms[-1] = atoms[0]
    chosen = supports(5, n, k, seed)
    exact = c.restricted_isometry(atoms, k)
    assert exact == pytest.approx(reference.restricted_isometry(atoms.numpy(), k), abs=1e-9)
    slow = [reference.isometry(atoms.numpy(), s) for s in chosen.tolist()]
    np.testing.assert_allclose(c.isometry_of(atoms, chosen), slow, atol=1e-9)
    if seed % 3:  # for unit atoms the Babel function lies between δ and the coherence
        upper = float(masks.babel(atoms, k - 1)[-1])
        assert upper == pytest.approx(reference.babel(atoms.numpy(), k), abs=1e-12)
        assert exact <= upper + 1e-9 <= (k - 1) * float((atoms @ atoms.T).abs().fill_diagonal_(0).max()) + 2e-9
    assert max(slow) - 1e-9 <= exact


def test_closed_forms():
    assert c.restricted_isometry(torch.eye(5, dtype=F64), 3) == pytest.approx(0, abs=1e-15)
    angle = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=F64)
    assert c.restricted_isometry(angle, 2) == pytest.approx(math.cos(1.0))
    clustered = clustered_atoms(3, 4, 20, 0.7)
    dots = clustered.reshape(3, 4, 20) @ clustered.reshape(3, 4, 20).transpose(1, 2)
    torch.testing.assert_close(dots, 0.7 + 0.3 * torch.eye(4, dtype=F64).expand(3, 4, 4))
    assert float(c.isometry_of(clustered, torch.tensor([[0, 1, 2, 3]]))) == pytest.approx(3 * 0.7)


def test_more_atoms_can_make_delta_smaller_so_all_sizes_are_visited():
    """Three atoms nearly in a plane leave a small eigenvalue for the axis; a fourth atom along the axis fills it."""
    turn = torch.arange(3, dtype=F64) * 2 * math.pi / 3
    atoms = torch.cat([torch.stack([turn.cos(), turn.sin(), torch.full((3,), 0.1, dtype=F64)], 1), torch.eye(3)[2:]])
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    three, four = (float(c.isometry_of(atoms, torch.arange(size)[None])) for size in (3, 4))
    assert three > 0.95 and four < 0.6
    assert c.restricted_isometry(atoms, 4) == pytest.approx(three)


@given(st.integers(2, 12), st.integers(2, 8), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_worst_inputs_attain_delta_and_no_input_exceeds_it(n, d, k, seed):
    k = min(k, n)
    atoms, chosen = unit(n, d, seed), supports(6, n, k, seed)
    delta, worst = c.isometry_of(atoms, chosen), c.worst_inputs(atoms, chosen)
    torch.testing.assert_close(worst.norm(dim=1), torch.ones(6, dtype=F64))
    torch.testing.assert_close(c.projection(atoms, chosen, worst), worst, atol=1e-6, rtol=0)
    model = c.linear_moe(atoms, torch.eye(d, dtype=F64), k)
    torch.testing.assert_close((c.gated_by(model, worst, chosen) - worst).norm(dim=1), delta, atol=1e-6, rtol=1e-6)
    x = inside(atoms, chosen, seed)
    assert ((c.gated_by(model, x, chosen) - x).norm(dim=1) <= (delta + 1e-9) * x.norm(dim=1)).all()


def test_adversarial_supports_are_distinct_atoms_and_worse_than_random_ones():
    atoms = unit(400, 64)
    hard = c.adversarial_supports(atoms, 6, 20, generator(1))
    assert all(len(set(s)) == 6 for s in hard.tolist())
    assert c.isometry_of(atoms, hard).max() > 1.3 * c.isometry_of(atoms, supports(500, 400, 6)).max()


def test_too_many_supports_and_bad_sizes_are_named():
    with pytest.raises(ValueError, match="k=9 of 60 atoms .* allowed: 2,000,000"):
        c.restricted_isometry(unit(60, 10), 9)
    with pytest.raises(ValueError, match="k=7; allowed: 1 to 6"):
        c.restricted_isometry(unit(6, 3), 7)


# -- linear maps -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_linear_moe_with_an_oracle_is_the_slow_one_and_obeys_its_bound(n, d, m, k, seed):
    k = min(k, n)
    atoms, matrix, chosen = unit(n, d, seed), randn(m, d, seed=seed), supports(4, n, k, seed)
    x = randn(4, d, seed=seed)  # any input, not only sparse ones
    output = c.gated_by(c.linear_moe(atoms, matrix, k), x, chosen)
    for row, support, given_x in zip(output, chosen.tolist(), x, strict=True):
        slow = reference.linear_moe(atoms.numpy(), matrix.numpy(), support, given_x.numpy())
        np.testing.assert_allclose(row, slow, atol=1e-12)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    bound = linear_bound(atoms, chosen, x, norm)
    assert ((output - x @ matrix.T).norm(dim=1) <= bound + 1e-8).all()
    for support, given_x, row in zip(chosen.tolist(), x, c.projection(atoms, chosen, x), strict=True):
        np.testing.assert_allclose(row, reference.project(atoms.numpy(), support, given_x.numpy()), atol=1e-7)


def test_the_router_chooses_the_largest_products_and_signed_ones_their_absolute_value():
    atoms, x = torch.eye(6, dtype=F64), torch.tensor([[0.1, -3.0, 2.0, 0.5, -0.2, 0.3]], dtype=F64)
    plain, signed = (c.linear_moe(atoms, torch.eye(6, dtype=F64), 2, signed=s) for s in (False, True))
    torch.testing.assert_close(plain(x), torch.tensor([[0, 0, 2.0, 0.5, 0, 0]], dtype=F64))
    torch.testing.assert_close(signed(x), torch.tensor([[0, -3.0, 2.0, 0, 0, 0]], dtype=F64))


def test_a_router_of_its_own_chooses_and_the_experts_stay():
    atoms, router, x = unit(9, 5), randn(9, 5, seed=1), randn(30, 5)
    model = c.linear_moe(atoms, None, 3, router=router, signed=True)
    chosen = (x @ router.T).abs().topk(3, dim=1).indices
    assert torch.equal(model.encode(x).indices.remainder(9).sort(1).values, chosen.sort(1).values)
    torch.testing.assert_close(model(x), c.gated_by(c.linear_moe(atoms, torch.eye(5, dtype=F64), 3), x, chosen))


def test_the_check_of_the_bound_can_fail():
    """Gates 1/k that nobody makes up for, and experts that read the wrong atom."""
    atoms = unit(64, 256)
    codes = SparseSource(atoms, 4).codes(200, generator(1))
    x = SparseSource(atoms, 4).rows(codes, generator(2))
    model, bound = c.linear_moe(atoms, torch.eye(256, dtype=F64), 4), linear_bound(atoms, codes.indices, x)
    output = c.gated_by(model, x, codes.indices)
    assert ((output - x).norm(dim=1) <= bound + ROUNDING).all()
    assert ((output / 4 - x).norm(dim=1) > bound).double().mean() > 0.9
    wrong = c.gated_by(model, x, (codes.indices + 1) % 64)
    assert ((wrong - x).norm(dim=1) > bound).double().mean() > 0.9


def test_an_oracle_needs_hard_gates():
    rows = unit(4, 3)
    soft = RankOneDictionary(Rows(rows), Rows(rows.clone()), k=2, gate="softmax")
    with pytest.raises(ValueError, match="gate='softmax'"):
        c.gated_by(soft, rows, torch.zeros(4, 2, dtype=torch.long))


# -- products as sums of powers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", c.METHODS)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_a_product_is_a_sum_of_powers(how, p):
    weights, nodes = c.METHODS[how](p)
    assert len(weights) == {"interpolation": (p + 1) ** p, "polarisation": 2 ** (p - 1)}[how]
    z = randn(50, p)
    torch.testing.assert_close((z @ nodes.T) ** p @ weights, z.prod(1), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("how", c.METHODS)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_symmetric_decomposition_is_the_symmetrised_tensor(how, terms, p, m, d, seed):
    f = polynomial(terms, p, m, d, seed)
    slow = reference.tensor(f.outputs.numpy(), f.factors.numpy(), symmetric=True)
    written, read = c.symmetric_decomposition(f.outputs, f.factors, how)
    np.testing.assert_allclose(reference.power_sum(written.numpy(), read.numpy(), p), slow, atol=1e-11)


def test_unknown_ways_degrees_and_lengths_are_named():
    with pytest.raises(ValueError, match="how='x' is unknown; allowed: 'interpolation'"):
        c.symmetric_decomposition(randn(1, 1), randn(1, 2, 2), "x")
    with pytest.raises(ValueError, match="degree=4"):
        polynomial(1, 4, 1, 2)
    with pytest.raises(ValueError, match="outputs has 2 terms; allowed: 3"):
        c.Polynomial(randn(2, 1), randn(3, 2, 2))
    with pytest.raises(ValueError, match="block=5"):
        c.local_polynomial(12, 2, 5, 1, generator(0))


# -- polynomials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", c.METHODS)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99)
)
@settings(deadline=None, max_examples=25)
def test_polynomial_moe_is_the_slow_one(how, terms, p, m, d, n, seed):
    f, atoms = polynomial(terms, p, m, d, seed), unit(n, d, seed)
    t = reference.tensor(f.outputs.numpy(), f.factors.numpy())
    k = min(2, n)
    chosen, x = supports(4, n, k, seed), randn(4, d, seed=seed)
    output = c.gated_by(c.polynomial_moe(atoms, f, k, how), x, chosen)
    for row, support, given_x in zip(output, chosen.tolist(), x.numpy(), strict=True):
        slow = reference.polynomial_moe(t, atoms.numpy(), support, given_x)
        np.testing.assert_allclose(row, slow, atol=1e-9 * (1 + np.abs(slow).max()))
    np.testing.assert_allclose(f(x)[0], reference.apply(t, *[x[0].numpy()] * p), atol=1e-10)


def test_degree_one_is_the_linear_mixture():
    f, atoms, x = polynomial(5, 1, 3, 6), unit(10, 6), randn(8, 6)
    chosen = supports(8, 10, 3)
    matrix = torch.einsum("lm,ld->md", f.outputs, f.factors[:, 0])
    linear = c.gated_by(c.linear_moe(atoms, matrix, 3), x, chosen)
    for how, width in {"polarisation": 1, "interpolation": 2}.items():
        model = c.polynomial_moe(atoms, f, 3, how)
        torch.testing.assert_close(c.gated_by(model, x, chosen), linear)
        assert model.active_neurons == 3 * width


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_interactions_of_degree_two_have_the_rank_of_their_matrices(terms, m, d, seed):
    f, atoms = polynomial(terms, 2, m, d, seed), unit(4, d, seed)
    outputs, factors = f.interactions(atoms)
    matrices = reference.tensor(f.outputs.numpy(), f.factors.numpy()) @ atoms.numpy().T
    ranks = [np.linalg.matrix_rank(matrices[:, :, j], tol=1e-9) for j in range(4)]
    assert outputs.shape[1] == max(1, *ranks)
    rebuilt = torch.einsum("jrm,jrd->jmd", outputs, factors[:, :, 0])
    np.testing.assert_allclose(rebuilt, matrices.transpose(2, 0, 1), atol=1e-10)


@pytest.mark.parametrize("p", [2, 3])
def test_local_polynomials_have_norm_one_and_low_interaction_rank(p):
    f = c.local_polynomial(12, p, 4, 2, generator(0))
    t = reference.tensor(f.outputs.numpy(), f.factors.numpy())
    rng, best = np.random.default_rng(0), 0.0
    for _ in range(30):  # alternating maximisation climbs to a lower bound on the norm
        vectors = [v / np.linalg.norm(v) for v in rng.standard_normal((p + 1, 12))]
        for step in range(60):
            i = step % (p + 1)
            rest = np.moveaxis(t, i, 0)
            for v in reversed([v for j, v in enumerate(vectors) if j != i]):
                rest = rest @ v
            best = max(best, np.linalg.norm(rest))
            vectors[i] = rest / max(np.linalg.norm(rest), 1e-300)
    assert best == pytest.approx(1, abs=1e-6)
    outputs, factors = f.interactions(torch.eye(12, dtype=F64))
    assert outputs.shape[1] == 2
    assert c.flattening_rank(f) >= 3 * 2


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_flattening_rank_without_the_tensor_is_that_of_the_tensor(terms, p, m, d, seed):
    f = polynomial(terms, p, m, d, seed)
    slow = reference.flattening_rank(reference.tensor(f.outputs.numpy(), f.factors.numpy(), symmetric=True))
    assert c.flattening_rank(f) == slow


def test_no_sum_of_fewer_powers_than_the_flattening_rank():
    """A width-w network of powers has flattening rank at most w: here exactly w, so the bound is reached."""
    powers = randn(3, 6)
    f = c.Polynomial(randn(3, 4), powers[:, None].expand(-1, 3, -1))
    assert c.flattening_rank(f) == 3


@pytest.mark.parametrize(("d", "m", "p"), [(4, 1, 2), (5, 3, 2), (4, 2, 3)])
def test_generic_width_counts_what_a_network_can_reach(d, m, p):
    """The rank of the Jacobian of (w_t, s_t) ↦ Σ w_t ⊗ s_t^p at a random point is the dimension it reaches."""
    basis = randn(200, d)

    def values(flat, width):
        written, read = flat[: width * m].reshape(width, m), flat[width * m :].reshape(width, d)
        return ((basis @ read.T) ** p @ written).flatten()  # enough points determine the polynomial

    width = -(-m * math.comb(d + p - 1, p) // (m + d - 1)) - 1  # chapter 4's generic width, less one
    jacobian = torch.autograd.functional.jacobian(lambda v: values(v, width), randn(width * (m + d)))
    reached = int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))
    assert reached <= width * (m + d - 1) < m * math.comb(d + p - 1, p)


# -- pure mixtures -----------------------------------------------------------------------------------------------------


def student(gate="softmax", shared=3, rank=4, k=2, scale=2.0):
    """A student with scores of some size, so that a softmax over them is far from flat."""
    model = secret_moe(
        12, 10, 9, k, generator=generator(0), router_rank=rank, shared_neurons=shared, dtype=torch.float64
    )
    model.router.weight.data *= scale
    model.gate = gate
    return model


def inputs(n=200):
    return torch.randn(n, 12, generator=generator(1), dtype=torch.float64)


def difference(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max() / a(x).abs().max())


@pytest.mark.parametrize("rank", [None, 4])
def test_with_hard_gates_a_pure_mixture_of_as_many_neurons_is_the_student(rank):
    ours = student("hard", rank=rank)
    pure = c.always_chosen(ours, inputs())
    assert pure.active_neurons == ours.active_neurons == 5 and pure.shared is None
    assert difference(ours, pure, inputs()) < 1e-13
    assert (pure.encode(inputs()).indices < 3).sum(1).tolist() == [3] * 200, "shared neurons always win"


@pytest.mark.parametrize("rank", [None, 4])
def test_with_a_softmax_copies_make_it_exact_and_constants_do_not(rank):
    ours = student(rank=rank)
    copies, constant = c.with_copies(ours), c.always_chosen(ours, inputs())
    assert copies.shared is None and copies.active_neurons == 2 * (3 + 1) and copies.n_features == 9 * 4
    assert difference(ours, copies, inputs()) < 1e-12
    assert constant.active_neurons == 5 and difference(ours, constant, inputs()) > 1e-6
    one = student(rank=rank, k=1)
    assert difference(one, c.with_copies(one), inputs()) < 1e-12
    assert c.with_copies(one).active_neurons == one.active_neurons == 4, "one expert: as many as the student"


def test_a_flat_router_leaves_no_error():
    """Scores that do not depend on the input have a constant ln Z, which an affine function has no trouble with."""
    ours = student(scale=0.0)
    assert difference(ours, c.always_chosen(ours, inputs()), inputs()) < 1e-12


def test_other_models_are_refused():
    for model in (student(shared=0), dense_mlp(12, 10, 4, generator=generator(0))):
        with pytest.raises(ValueError, match="beside a shared MLP"):
            c.with_copies(model)
    with pytest.raises(ValueError, match="gate='hard'"):
        c.with_copies(student("hard"))
    biased = copy.deepcopy(student())
    biased.selection_bias = torch.zeros(9, dtype=torch.float64)
    with pytest.raises(ValueError, match="selection bias"):
        c.always_chosen(biased, inputs())
