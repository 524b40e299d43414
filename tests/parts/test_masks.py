"""Masks, expansion and certificates, against slow NumPy and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.dictionary import Packed
from helpers.parts import masks
from helpers.settings import generator
from tests.reference import expander_numpy as slow

SMALL = settings(max_examples=40, deadline=None)


@st.composite
def shapes(draw):
    """(n, m, degree) that a mask can have, with rows for more than one word of 64 bits."""
    n, degree = draw(st.integers(2, 9)), draw(st.integers(1, 12))
    return n, draw(st.integers(degree, n * degree)), degree


def is_a_mask(rows, m):
    return bool((rows.diff(dim=1) > 0).all()) and int(rows.min()) >= 0 and int(rows.max()) < m


# -- masks -------------------------------------------------------------------------------------------------------------


@SMALL
@given(m=st.integers(1, 40), degree=st.integers(1, 40), n=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_masks_keep_their_degree_and_reach_every_row(m, degree, n, seed):
    samples = torch.randn(17, m, generator=generator(seed))
    makers = {
        "left_regular": lambda: masks.left_regular(n, m, degree, generator(seed)),
        "clustered": lambda: masks.clustered(n, m, degree, generator(seed)),
        "informed": lambda: masks.informed(samples, n, degree, generator(seed)),
    }
    for make in makers.values():
        if degree > m or n * degree < m:
            with pytest.raises(ValueError, match=f"degree={degree}"):
                make()
            continue
        rows = make()
        assert rows.shape == (n, degree) and is_a_mask(rows, m)
        assert rows.unique().numel() == m
        assert torch.equal(rows, make()), "the same seed gives the same mask"


def test_left_regular_is_uniform():
    """All 35 supports of 3 rows out of 7 equally often: chi-square, 34 degrees of freedom."""
    rows = masks.left_regular(35_000, 7, 3, generator(0))
    names = list(itertools.combinations(range(7), 3))
    counts = np.array([int((rows == torch.tensor(s)).all(1).sum()) for s in names])
    assert counts.sum() == 35_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 34 + 5 * math.sqrt(2 * 34)


def test_filling_empty_rows_favours_no_row_and_no_atom():
    """At n·d = m a mask is a random partition of the rows: each row is atom 0's equally often."""
    uses = torch.zeros(12)
    for seed in range(3000):
        rows = masks.left_regular(4, 12, 3, generator(seed))
        assert torch.equal(rows.flatten().sort().values, torch.arange(12))
        uses[rows[0]] += 1
    assert ((uses - 750) ** 2 / 750).sum() < 11 + 5 * math.sqrt(2 * 11)


def test_the_fair_clustered_mask_reaches_what_the_released_one_does_not():
    fair = masks.clustered(4096, 512, 200, generator(0))
    released = masks.clustered(4096, 512, 200, generator(0), every_row=False)
    assert 512 - released.unique().numel() == 112  # the release at d = 200
    assert fair.unique().numel() == 512
    blocks, uses = fair.unique(dim=0, return_counts=True)
    assert len(blocks) == 3 and int(uses.max() - uses.min()) <= 1


def test_informed_rows_are_the_large_ones_whatever_the_scale():
    """Two groups of coordinates that are never large together: no support mixes them, loud coordinates or not."""
    noise = generator(0)
    samples = (1 + torch.rand(400, 8, generator=noise)) * (2.0 * torch.randint(2, (400, 8), generator=noise) - 1)
    samples[::2, :4] *= 1e-3
    samples[1::2, 4:] *= 1e-3
    rows = masks.informed(samples * torch.logspace(-3, 3, 8) + 5, 64, 4, generator(1))
    assert set(map(tuple, rows.tolist())) == {(0, 1, 2, 3), (4, 5, 6, 7)}


# -- expansion ---------------------------------------------------------------------------------------------------------


@SMALL
@given(shape=shapes(), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_expansion_is_that_of_every_set(shape, size, seed):
    (n, m, degree), size = shape, min(size, shape[0])
    rows = masks.left_regular(n, m, degree, generator(seed))
    found, bounds = (
        masks.expansion(rows, m, size),
        masks.expansion_bounds(rows, m, size, generator(seed), starts=2),
    )
    assert found.exact and torch.allclose(found.low, torch.tensor(slow.expansion(rows.tolist(), size)).double())
    for t, worst in enumerate(found.worst, start=1):
        assert len(worst) == t
        reached = len(slow.neighbours(rows.tolist(), worst.tolist()))
        assert 1 - reached / (degree * t) == pytest.approx(float(found.low[t - 1]))
        assert masks.expansion_floor(n, m, degree, t) <= float(found.low[t - 1]) + 1e-12
    assert (bounds.low <= found.low + 1e-12).all() and (found.low <= bounds.high + 1e-12).all()
    for t, worst in enumerate(bounds.worst, start=1):
        if worst is not None:
            reached = len(slow.neighbours(rows.tolist(), worst.tolist()))
            assert worst.unique().numel() == t
            assert 1 - reached / (degree * t) == pytest.approx(float(bounds.low[t - 1]))


def test_expansion_in_blocks_is_expansion_at_once(monkeypatch):
    rows = masks.left_regular(14, 70, 6, generator(3))
    at_once = masks.expansion(rows, 70, 4)
    monkeypatch.setattr(masks, "TILE_BYTES", 100)
    in_blocks = masks.expansion(rows, 70, 4)
    assert torch.equal(at_once.low, in_blocks.low)


def test_bounds_are_tight_for_pairs_and_for_disjoint_and_equal_atoms():
    rows = masks.left_regular(40, 100, 6, generator(0))
    exact, bounds = masks.expansion(rows, 100, 2), masks.expansion_bounds(rows, 100, 2, generator(0), starts=40)
    assert float(exact.low[1]) == pytest.approx(float(bounds.high[1]))
    apart = torch.arange(24).view(6, 4)
    for found in (masks.expansion(apart, 24, 5), masks.expansion_bounds(apart, 24, 5, generator(0))):
        assert found.exact and float(found.high.max()) == 0
    equal = torch.arange(4).expand(6, 4).contiguous()
    found = masks.expansion_bounds(equal, 4, 6, generator(0))
    assert torch.allclose(found.low, 1 - 1 / torch.arange(1.0, 7).double()) and found.exact


def test_expansion_is_exact_first_and_bounds_after():
    rows = masks.left_regular(30, 90, 7, generator(0))
    found = masks.expansion_bounds(rows, 90, 6, generator(0), visited=5000)  # 4,525 sets of up to three
    exact = masks.expansion(rows, 90, 4)
    assert torch.equal(found.low[:3], exact.low[:3]) and torch.equal(found.high[:3], exact.low[:3])
    assert found.low[3] <= exact.low[3] <= found.high[3] and found.low[5] < found.high[5]
    assert [len(s) for s in found.worst[:3]] == [1, 2, 3]
    assert not masks.expansion_bounds(rows, 90, 2, generator(0), visited=3).worst[0].numel() > 1
    wide = masks.left_regular(1100, 60, 2, generator(0))  # of 550 atoms there are more sets than a float holds
    assert len(masks.expansion_bounds(wide, 60, 550, generator(0), starts=1).low) == 550


def test_the_epsilon_of_an_expander_is_that_of_all_smaller_sets_too():
    """Twins: pairs lose half of their rows, triples a third."""
    rows = torch.arange(12).view(3, 4).repeat_interleave(2, dim=0)
    found = masks.expansion(rows, 12, 3)
    assert found.low.tolist() == pytest.approx([0, 1 / 2, 1 / 3])
    assert found.epsilon(3) == (0.5, 0.5)


def test_the_floor_is_met_by_a_design():
    """All 2-subsets of 4 rows: sets of 5 of these 6 atoms reach 4 rows, and the average of all sets of 2 is 3.2."""
    rows = torch.tensor(list(itertools.combinations(range(4), 2)))
    assert masks.expansion(rows, 4, 2).low[1] == pytest.approx(0.25)
    assert masks.expansion_floor(6, 4, 2, 2) == pytest.approx(1 - 3 / 4)  # 3.2 rounds down to 3
    assert masks.expansion_floor(6, 4, 2, 5) == pytest.approx(1 - 4 / 10)


def test_crowded_sets_find_the_crowd():
    """Twelve atoms on six rows among many that are spread out: whoever starts inside stays inside."""
    spread = 6 + torch.arange(200).view(50, 4)
    crowd = torch.tensor(list(itertools.combinations(range(6), 4))[:12])
    rows = torch.cat([spread, crowd])
    reached, sets = masks.crowded_sets(rows, 206, 12, generator(0), starts=62)
    assert int(reached[-1]) == 6 and set(sets[-1].tolist()) == set(range(50, 62))
    for size, (count, chosen) in enumerate(zip(reached, sets, strict=True), start=1):
        assert chosen.unique().numel() == size and rows[chosen].unique().numel() == int(count)


def test_supports_are_drawn_independently():
    """Three atoms on the same two rows of five, once in a hundred: what chapter 13's union bound counts."""
    drawn = masks._subsets(3 * 20_000, 5, 2, generator(0)).sort(1).values.view(-1, 3, 2)
    assert float((drawn == drawn[:, :1]).all((1, 2)).double().mean()) == pytest.approx(0.01, abs=0.003)


def test_what_cannot_be_visited_says_so():
    rows = masks.left_regular(200, 64, 4, generator(0))
    with pytest.raises(ValueError, match="size=6 means"):
        masks.expansion(rows, 64, 6)
    for ask in (masks.expansion, lambda *a: masks.expansion_bounds(*a, generator(0))):
        for size in (0, 201):
            with pytest.raises(ValueError, match=f"size={size}"):
                ask(rows, 64, size)
    with pytest.raises(ValueError, match="size=3 was not computed"):
        masks.expansion(rows, 64, 2).epsilon(3)


# -- flatness, coherence, gain -----------------------------------------------------------------------------------------


def packed(n, m, degree, seed, kind=masks.gaussian_values):
    rows = masks.left_regular(n, m, degree, generator(seed))
    return Packed(kind(n, degree, generator(seed + 1)), rows, m).requires_grad_(False)


def test_flatness():
    assert masks.flatness(masks.flat_values(5, 9, generator(0))) == pytest.approx(1)
    assert masks.flatness(torch.tensor([[0.0, 1, 0, 0]])) == 2  # √d, the largest there is
    with pytest.raises(ValueError, match="column of length"):
        masks.flatness(torch.ones(2, 3))


@SMALL
@given(shape=shapes(), order=st.integers(0, 4), seed=st.integers(0, 99))
def test_babel_packed_and_dense_is_the_largest_sum(shape, order, seed):
    (n, m, degree), order = shape, min(order, shape[0] - 1)
    columns = packed(n, m, degree, seed)
    matrix = columns.vectors()
    assert np.allclose(matrix.numpy(), slow.dense(columns.weight.tolist(), columns.rows.tolist(), m))
    expected = torch.tensor(slow.babel(matrix.numpy(), order), dtype=torch.float64)
    assert torch.allclose(masks.babel(columns, order), expected)
    assert torch.allclose(masks.babel(matrix, order), expected)


def test_babel_in_tiles_is_babel_at_once(monkeypatch):
    columns = packed(50, 40, 5, 0)
    at_once = masks.babel(columns, 7)
    monkeypatch.setattr(masks, "TILE_BYTES", 50 * 8 * 3)
    assert torch.allclose(masks.babel(columns, 7), at_once, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="order=50"):
        masks.babel(columns, 50)


@SMALL
@given(seed=st.integers(0, 999), k=st.integers(1, 4))
def test_the_recovery_coefficient_is_tropps_and_below_the_babel_bound(seed, k):
    columns = packed(12, 30, 6, seed)
    atoms = columns.vectors()
    supports = torch.stack([torch.randperm(12, generator=generator(seed + i))[:k] for i in range(3)])
    found = masks.recovery_coefficient(atoms, supports)
    expected = [slow.recovery_coefficient(atoms.numpy(), s.tolist()) for s in supports]
    assert found.tolist() == pytest.approx(expected)
    sums = masks.babel(columns, k)
    if sums[k - 1] < 1:
        assert float(found.max()) <= float(sums[k] / (1 - sums[k - 1])) + 1e-9


def test_dependent_atoms_have_no_recovery_coefficient():
    atoms = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2]]
    found = masks.recovery_coefficient(atoms, torch.tensor([[0, 2], [1, 3]]))
    assert found.tolist() == [math.inf, 0.0]


@SMALL
@given(seed=st.integers(0, 999), k=st.integers(1, 3), gaussian=st.booleans())
def test_coherence_is_bounded_by_expansion(seed, k, gaussian):
    """μ₁(k) ≤ β²ε_{k+1}(k + 1), the step from expanders to Tropp's condition."""
    columns = packed(10, 30, 5, seed, masks.gaussian_values if gaussian else masks.flat_values)
    sums = masks.babel(columns, k)
    found, beta = masks.expansion(columns.rows, 30, k + 1), masks.flatness(columns.weight)
    assert float(sums[k]) <= beta**2 * float(found.low[k]) * (k + 1) + 1e-9
    assert float(sums[k - 1] + sums[k]) <= beta**2 * found.epsilon(k + 1)[0] * (2 * k + 1) + 1e-9


@SMALL
@given(seed=st.integers(0, 999), size=st.integers(1, 4), gaussian=st.booleans())
def test_no_sparse_vector_gains_less_than_the_theorem_or_the_programmes_allow(seed, size, gaussian):
    columns = packed(9, 30, 6, seed, masks.gaussian_values if gaussian else masks.flat_values)
    atoms, noise = columns.vectors(), generator(seed)
    epsilon, _ = masks.expansion(columns.rows, 30, size).epsilon(size)
    beta = masks.flatness(columns.weight)
    bound = 6**0.5 * (1 / beta - 2 * beta * epsilon)  # Theorem 3.1
    support = torch.randperm(9, generator=noise)[:size]
    least, at = masks.smallest_gain(atoms[support])
    assert at.abs().sum() == pytest.approx(1) and float((at @ atoms[support]).abs().sum()) == pytest.approx(least)
    u = torch.randn(200, size, generator=noise, dtype=torch.float64)
    gains = (u @ atoms[support]).abs().sum(1) / u.abs().sum(1)
    assert least <= float(gains.min()) + 1e-9
    assert bound <= least + 1e-9


def test_smallest_gain_of_two_atoms_by_hand():
    """(1, 1)/√2 and (1, −1)/√2 : u = (½, ±½) gives one row of 1/√2; opposite atoms cancel entirely."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    assert masks.smallest_gain(pair)[0] == pytest.approx(1 / 2**0.5)
    assert masks.smallest_gain(torch.tensor([[1.0, 0], [-1.0, 0]]))[0] == pytest.approx(0)
    with pytest.raises(ValueError, match="size=11"):
        masks.smallest_gain(torch.eye(11))


@pytest.mark.parametrize(
    "m,n,degree,k,spread", [(512, 64, 15, 2, False), (200, 24, 9, 1, True), (900, 30, 31, 3, False)]
)
def test_certified_dictionaries_are_recovered_always(m, n, degree, k, spread):
    for seed in range(20):
        columns = packed(n, m, degree, seed, masks.flat_values)
        if spread:  # columns that are not flat
            noise = 1 + 0.2 * torch.rand(n, degree, generator=generator(seed), dtype=torch.float64)
            columns.weight.mul_(noise)
            columns.normalise_()
        epsilon, _ = masks.expansion(columns.rows, m, k + 1).epsilon(k + 1)
        if masks.flatness(columns.weight) ** 2 * epsilon * (2 * k + 1) < 1:  # Corollary 3.2
            break
    else:
        pytest.fail("no certified dictionary among 20 seeds")
    atoms = columns.vectors().numpy()
    rng = np.random.default_rng(0)
    for _ in range(50):
        support = rng.choice(n, k, replace=False)
        values = rng.choice([-1, 1], k) * 10.0 ** rng.uniform(-2, 2, k)
        found, solved = slow.matching_pursuit(values @ atoms[support], atoms, k)
        assert set(found) == set(support)
        assert solved == pytest.approx(values[[list(support).index(j) for j in found]])


def test_sparse_codes_are_what_they_say():
    for values in masks.VALUES:
        codes = masks.sparse_codes(9, 4, 500, generator(0), values)
        assert (codes.indices.sort(1).values.diff(dim=1) > 0).all() and codes.values.dtype == torch.float64
        assert codes.indices.unique().numel() == 9 and 0.4 < float((codes.values > 0).double().mean()) < 0.6
    assert 0.01 <= float(codes.values.abs().min()) < 0.02 and 50 < float(codes.values.abs().max()) <= 100
    for wrong in ({"k": 10}, {"values": "large"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            masks.sparse_codes(**{"n_features": 9, "k": 4, "count": 1, "generator": generator(0)} | wrong)


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e20, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependence_that_rounding_hides_is_seen(size, dtype):
    atoms = size * torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=dtype)
    found = masks.recovery_coefficient(atoms, torch.tensor([[0, 1, 2], [0, 1, 3]]))
    assert found.tolist() == [math.inf, pytest.approx(1.4)]
