"""Theorem 3.3's bound against a slow inversion, closed forms and challengers; what counts as w against Jacobians."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import dictionary
from helpers.parts import bounds, worlds
from helpers.settings import generator
from tests.reference import bounds_numpy as slow


def random_subspaces(n, w, d, seed):
    """n orthonormal bases of w-dimensional subspaces, evenly drawn."""
    return torch.linalg.qr(torch.randn(n, d, w, generator=generator(seed), dtype=torch.float64)).Q


def left_outside(x, bases):
    """‖x − P x‖² with the subspace that holds most of each row."""
    held = torch.stack([(x @ basis).square().sum(1) for basis in bases.to(x.dtype)])
    return (x.square().sum(1) - held.amax(0)).clamp_min(0)


SIZES = [(1, 8, 3.0), (8, 64, 20.0), (128, 640, 531.7), (3, 4, 9.0), (0, 5, 2.0), (20, 1024, 0.3)]


@pytest.mark.parametrize(("n", "k"), [(5, 0), (5, 5), (7, 3), (1000, 16), (100_000, 64)])
def test_configurations_are_binomial_coefficients(n, k):
    assert bounds.log_configurations(n, k) == pytest.approx(slow.log_configurations(n, k), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_bound_is_the_slow_inversion(size):
    assert bounds.fvu_bound(*size) == pytest.approx(slow.fvu_bound(*size), rel=1e-9)


def test_bound_is_broadcast():
    w, log_n = np.arange(1, 5)[:, None], np.array([0.0, 2.0, 40.0])
    expected = [[slow.fvu_bound(a, 16, b) for b in log_n] for a in w[:, 0]]
    np.testing.assert_allclose(bounds.fvu_bound(w, 16, log_n), expected, rtol=1e-8)


@given(st.integers(0, 60), st.integers(1, 64), st.floats(0, 200))
@settings(max_examples=200, deadline=None)
def test_bound_solves_its_equation_and_falls_with_w_and_n(w, d, log_n):
    f = float(bounds.fvu_bound(w, d, log_n))
    if w >= d:
        assert f == 0
        return
    assert 0 < f <= (1 - w / d) * (1 + 1e-12)
    assert slow.kl_of_fvu(w / d, f) >= 2 * log_n / d * (1 - 1e-12) - 1e-12  # never overstated
    if log_n > 1e-6:  # nearer to 0 the equation says little about F: its root is a double one
        assert slow.kl_of_fvu(w / d, f * (1 - 1e-6)) > 2 * log_n / d > slow.kl_of_fvu(w / d, f * (1 + 1e-4)) - 1e-7
    assert bounds.fvu_bound(w + 1, d, log_n) <= f * (1 + 1e-9)
    assert bounds.fvu_bound(w, d, log_n + 1) < f


def test_limits_with_a_closed_form():
    # one region: the best fixed subspace
    assert bounds.fvu_bound(3, 12, 0.0) == pytest.approx(0.75, rel=1e-9)
    # no measurements: N codewords, Shannon's distortion–rate function e^(−2R)
    assert bounds.fvu_bound(0, 10, 7.0) == pytest.approx(math.exp(-1.4), rel=1e-9)
    # all measurements
    assert bounds.fvu_bound(10, 10, 0.0) == bounds.fvu_bound(11, 10, 5.0) == 0
    # lines in the plane: kl(1/2 ‖ 1 − F) = −½ ln 4F(1 − F)
    n = np.array([1, 2, 16, 1000])
    np.testing.assert_allclose(bounds.fvu_bound(1, 2, np.log(n)), (1 - np.sqrt(1 - n**-2.0)) / 2, rtol=1e-7)
    # so large a budget that F is smaller than any float's share of 1
    assert bounds.fvu_bound(1, 2, 300.0) == pytest.approx(math.exp(-600) / 4, rel=1e-9)


def test_the_papers_sizes():
    log_n = bounds.log_configurations(100_000, 64)
    assert round(float(bounds.fvu_bound(128, 640, log_n)), 3) == 0.068
    assert round(float(bounds.fvu_bound(192, 640, log_n)), 3) == 0.040


def test_the_best_lines_of_the_plane_obey_the_bound_and_are_measured_right():
    """N evenly spaced lines leave ½(1 − sin(π/N)/(π/N)), which is small like the bound, 1/N²."""
    x = torch.randn(200_000, 2, generator=generator(0), dtype=torch.float64)
    for n in (1, 2, 5, 20):
        angles = torch.arange(n, dtype=torch.float64) * math.pi / n
        bases = torch.stack([angles.cos(), angles.sin()], dim=1)[:, :, None]
        left = float(left_outside(x, bases).mean()) / 2
        exact = (1 - math.sin(math.pi / n) / (math.pi / n)) / 2
        assert left == pytest.approx(exact, rel=0.02)
        assert bounds.fvu_bound(1, 2, math.log(n)) <= exact * (1 + 1e-12)


@pytest.mark.parametrize(("n", "w", "d"), [(40, 1, 3), (9, 2, 8), (200, 3, 12)])
def test_no_oracle_beats_the_bound(n, w, d):
    """Random subspaces, and those of most variance of the rows that each is nearest to, on those very rows."""
    x = torch.randn(20_000, d, generator=generator(1), dtype=torch.float64)
    start = random_subspaces(n, w, d, 2)
    bound, fitted = float(bounds.fvu_bound(w, d, math.log(n))), start.clone()
    nearest = torch.stack([(x @ basis).square().sum(1) for basis in start]).argmax(0)
    for j in range(n):
        rows = x[nearest == j]
        fitted[j] = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -w:]
    fvus = []
    for bases in (start, fitted):
        left = left_outside(x, bases) / d
        assert float(left.mean() + 4 * left.std() / len(x) ** 0.5) > bound
        fvus.append(float(left.mean()))
    assert bound < fvus[1] < fvus[0] < 1 - w / d


@pytest.mark.parametrize(("n", "w", "d"), [(1, 1, 2), (1, 30, 31), (64, 1, 8), (300, 4, 16)])
def test_random_subspaces_have_the_average_fvu_of_the_formula(n, w, d):
    left = []
    for seed in range(60):
        x = torch.randn(400, d, generator=generator(100 + seed), dtype=torch.float64)
        outside = left_outside(x, random_subspaces(n, w, d, seed))
        left.append(float((outside / x.square().sum(1)).mean()))
    exact = bounds.random_subspaces_fvu(w, d, math.log(n))
    assert exact == pytest.approx(np.mean(left), abs=4 * np.std(left) / len(left) ** 0.5)
    assert exact == pytest.approx(np.mean(left), rel=0.05)
    if n == 1:
        assert exact == pytest.approx(1 - w / d, rel=1e-6)


def test_random_subspaces_meet_the_bound_as_the_dimension_grows():
    """At a fixed w/d and ln N / d: never below, and closer at every doubling."""
    gaps = []
    for d in (16, 32, 64, 128, 256, 512, 1024):
        bound = float(bounds.fvu_bound(d // 8, d, 0.3 * d))
        gaps.append(bounds.random_subspaces_fvu(d // 8, d, 0.3 * d) / bound - 1)
    assert gaps[-1] > 0 and gaps[-1] < 0.02 and np.all(np.diff(gaps) < 0)


def models():
    g = generator(0)
    options = {"generator": g, "dtype": torch.float64}
    atoms = [dictionary.Rows(torch.randn(40, 24, **options)) for _ in range(3)]
    return {
        "hard, own router": (dictionary.RankOneDictionary(*atoms[:2], k=4, router=atoms[2], activation="gelu"), 4, 4),
        "dense": (dictionary.dense_mlp(24, 24, 5, **options), 5, 5),
        "sae": (dictionary.topk_sae(24, 40, 4, activation="identity", **options), 4, 4),
        "rank-1 moe": (dictionary.sae_to_moe(dictionary.topk_sae(24, 40, 4, activation="identity", **options)), 4, 4),
        # a softmax needs the differences of the k scores only: one less than is counted
        "soft": (dictionary.secret_moe(24, 24, 40, 3, shared_neurons=0, **options), 6, 5),
        "soft, shared": (dictionary.secret_moe(24, 24, 40, 3, **options), 9, 8),
        "soft, low rank": (dictionary.secret_moe(24, 24, 40, 5, router_rank=2, **options), 12, 12),
    }


@pytest.mark.parametrize("name", models())
def test_measurements_are_the_directions_a_regions_output_depends_on(name):
    """The Jacobians at many inputs of ONE region span no more than w directions, and as many as are there."""
    model, counted, there = models()[name]
    x = torch.randn(1, 24, generator=generator(1), dtype=torch.float64)
    near = x + 1e-3 * torch.randn(60, 24, generator=generator(2), dtype=torch.float64)
    regions = [frozenset(row.tolist()) for row in model.encode(near).indices]
    same = [i for i, region in enumerate(regions) if region == regions[0]]
    assert len(same) > 20
    rows = torch.cat([torch.autograd.functional.jacobian(lambda v: model(v[None])[0], near[i]) for i in same])
    found = torch.linalg.svdvals(rows)
    assert bounds.measurements(model) == counted
    assert int((found > 1e-9 * found[0]).sum()) == there <= counted


def test_bound_of_a_model_reads_it_off():
    model, w, _ = models()["soft, shared"]
    assert bounds.model_bound(model) == pytest.approx(slow.fvu_bound(w, 24, math.log(math.comb(40, 3))), rel=1e-9)
    assert bounds.model_bound(models()["dense"][0]) == pytest.approx(1 - 5 / 24)


def test_sparse_data_of_the_same_covariance_is_not_bound():
    """One atom a sample: choosing it is all there is, and one number is left. The bound is about Gaussians."""
    source = worlds.SparseSource(worlds.random_atoms(32, 16, generator(0), torch.float64), 1).whitened()
    lines = torch.nn.functional.normalize(source.atoms, dim=1)[:, :, None]
    fvu = {}
    for name, x in (
        ("sparse", source.sample(5000, generator(1))),
        ("gaussian", torch.randn(5000, 16, generator=generator(1), dtype=torch.float64)),
    ):
        fvu[name] = float(left_outside(x, lines).sum() / x.square().sum())
    assert fvu["sparse"] < 1e-12 < bounds.fvu_bound(1, 16, math.log(32)) < fvu["gaussian"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: bounds.log_configurations(3, 4), "k=4.*allowed: 0 to n_experts=3"),
        (lambda: bounds.fvu_bound(-1, 3, 1.0), "w=-1"),
        (lambda: bounds.fvu_bound(1, 0, 1.0), "d=0"),
        (lambda: bounds.fvu_bound(1, 3, -1.0), "log_n=-1"),
        (lambda: bounds.fvu_bound(1, 3, math.nan), "log_n=nan"),
        (lambda: bounds.random_subspaces_fvu(4, 4, 1.0), "w=4.*allowed: 1 to d - 1 = 3"),
        (lambda: bounds.random_subspaces_fvu(1, 4, -1.0), "log_n=-1"),
        (lambda: bounds.model_bound(dictionary.dense_mlp(3, 4, 2, generator=generator(0))), "d_out=4.*d_in=3"),
    ],
)
def test_bad_parameters_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@given(st.integers(0, 2000), st.integers(1, 2000), st.floats(-12, 4))
@settings(max_examples=100, deadline=None)
def test_rounding_never_overstates_the_bound(w, more, log_size):
    """In 60 digits, the divergence at the bound is at least the budget, and at a little more it is not."""
    d, log_n = w + more, 10**log_size
    found = float(bounds.fvu_bound(w, d, log_n))
    if found < 1e-290:
        return
    with mpmath.workdps(60):
        p, budget = mpmath.mpf(w) / d, 2 * mpmath.mpf(log_n) / d

        def kl(f):
            return (p * mpmath.log(p / (1 - f)) if w else 0) + (1 - p) * mpmath.log((1 - p) / f)

        assert kl(mpmath.mpf(found)) >= budget
        slack = 1 + mpmath.mpf(2e-14) * (1 + abs(mpmath.log(found)))
        assert found * slack >= 1 - p or kl(found * slack) < budget
