"""gOMP, CoSaMP and NIHT against slow NumPy, and where theory says what they must find."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.dictionary import expander_sae, pursuit
from helpers.dictionary.atoms import Atoms
from helpers.parts import masks, pursuits
from helpers.parts.worlds import random_atoms

WAYS = {"gomp": pursuits.gomp, "cosamp": pursuits.cosamp, "niht": pursuits.niht}


def planted(n=60, m=48, k=3, rows=20, seed=0, dtype=torch.float64):
    noise = torch.Generator().manual_seed(seed)
    atoms = random_atoms(n, m, noise).to(dtype)
    support = torch.rand(rows, n, generator=noise).topk(k, dim=1).indices
    values = torch.randn(rows, k, generator=noise, dtype=dtype).sign() * (1 + torch.rand(rows, k, generator=noise))
    return atoms, support, (values[:, :, None] * atoms[support]).sum(1)


def solve(x, atoms, support):
    values = np.linalg.lstsq(atoms[support].T, x, rcond=None)[0]
    return values, x - values @ atoms[support]


def slow_gomp(x, atoms, k, at_once):
    support, rest = [], x
    while len(support) < k:
        score = np.abs(atoms @ rest)
        score[support] = -1
        support += list(np.argsort(-score, kind="stable")[: min(at_once, k - len(support))])
        rest = solve(x, atoms, support)[1]
    return support


def slow_cosamp(x, atoms, k, rounds):
    support = list(np.argsort(-np.abs(atoms @ x))[:k])
    rest = solve(x, atoms, support)[1]
    for _ in range(rounds):
        score = np.abs(atoms @ rest)
        score[support] = -1
        merged = np.array(support + list(np.argsort(-score)[: 2 * k]))
        pruned = list(merged[np.argsort(-np.abs(solve(x, atoms, merged)[0]))[:k]])
        left = solve(x, atoms, pruned)[1]
        if np.linalg.norm(left) >= np.linalg.norm(rest):
            break
        support, rest = pruned, left
    return support


def slow_niht(x, atoms, k, rounds):
    z = np.zeros(len(atoms))
    support = np.argsort(-np.abs(atoms @ x))[:k]
    for _ in range(rounds):
        g = atoms @ (x - z @ atoms)
        step = (g[support] ** 2).sum() / max(((g[support] @ atoms[support]) ** 2).sum(), 1e-30)
        while True:
            moved = z + step * g
            kept = np.argsort(-np.abs(moved))[:k]
            new = np.zeros_like(z)
            new[kept] = moved[kept]
            if set(kept) == set(support):
                break
            bound = 0.99 * ((new - z) ** 2).sum() / max((((new - z) @ atoms) ** 2).sum(), 1e-30)
            if step <= bound:
                break
            step /= 2
        z, support = new, kept
    return support


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_each_pursuit_is_its_slow_twin_on_noise(seed, k, at_once, sparse):
    atoms, _, x = planted(40, 24, k, 6, seed)
    if not sparse:
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at_once, plain = min(at_once, k), atoms.numpy()
    slow = {
        "gomp": (pursuits.gomp(x, atoms, k, at_once=at_once), lambda row: slow_gomp(row, plain, k, at_once)),
        "cosamp": (pursuits.cosamp(x, atoms, k, rounds=4), lambda row: slow_cosamp(row, plain, k, 4)),
        "niht": (pursuits.niht(x, atoms, k, rounds=7), lambda row: slow_niht(row, plain, k, 7)),
    }
    for name, (codes, by_hand) in slow.items():
        for row, indices, values in zip(x.numpy(), codes.indices.numpy(), codes.values.numpy(), strict=True):
            assert len(set(indices)) == k
            left = solve(row, plain, list(by_hand(row)))[1]
            ours = row - values @ plain[indices]
            assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(left), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_planted_atoms_are_found_and_the_signal_rebuilt(name, dtype):
    atoms, support, x = planted(dtype=dtype)
    codes = WAYS[name](x, atoms, 3)
    assert (codes.indices.sort(1).values == support.sort(1).values).all(1).double().mean() >= 0.9
    assert codes.values.dtype == dtype


def test_one_atom_at_a_time_is_omp_and_all_at_once_one_look():
    atoms, _, x = planted(k=6)
    one, omp = pursuits.gomp(x, atoms, 6, at_once=1), pursuit.omp(x, atoms, 6)
    torch.testing.assert_close(one.to_dense(60), omp.to_dense(60))
    look = pursuits.gomp(x, atoms, 6, at_once=6).indices.sort(1).values
    assert (look == (x @ atoms.T).abs().topk(6).indices.sort(1).values).all()


@pytest.mark.parametrize("name", WAYS)
def test_packed_atoms_give_what_dense_ones_do(name):
    mask = masks.left_regular(50, 32, 8, torch.Generator().manual_seed(1))
    sae = expander_sae(mask, 32, 4, generator=torch.Generator().manual_seed(2))
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(3))
    packed = WAYS[name](x, sae.decoder, 4)
    dense = WAYS[name](x, Atoms(sae.decoder).dense, 4)
    torch.testing.assert_close(packed.to_dense(50), dense.to_dense(50), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("power", [-100, -50, 50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signals_have_no_unit(name, power, dtype):
    """Sizes are powers of two, so codes are the same to the bit."""
    atoms, _, x = planted(k=5, dtype=dtype)
    plain, codes = WAYS[name](x, atoms, 5), WAYS[name](x * 2.0**power, atoms, 5)
    assert torch.equal(codes.indices, plain.indices) and torch.equal(codes.values, plain.values * 2.0**power)


@pytest.mark.parametrize("name", WAYS)
def test_atoms_not_of_length_one_are_refused_and_zeros_never_chosen(name):
    atoms, _, x = planted()
    for change, told in ((3 * atoms, "3 to 3"), (atoms * 1e-12, "1e-12 to 1e-12"), (atoms * torch.nan, "nan to nan")):
        with pytest.raises(ValueError, match=f"atoms have lengths from {told}; allowed: 1"):
            WAYS[name](x, change, 3)
    one = atoms.clone()
    one[7] *= 1.5
    with pytest.raises(ValueError, match="atoms have lengths from 1 to 1.5; allowed: 1"):
        WAYS[name](x, one, 3)
    one[7] = 0
    codes = WAYS[name](x, one, 3)
    assert not codes.values[codes.indices == 7].any()
    assert WAYS[name](x.float(), atoms.bfloat16(), 3).values.isfinite().all()


@pytest.mark.parametrize("name", WAYS)
def test_impossible_sizes_are_named_and_no_rows_are_fine(name):
    atoms, _, x = planted()
    with pytest.raises(ValueError, match="k=.*allowed: 1 to 48"):
        WAYS[name](x, atoms, 49)
    with pytest.raises(ValueError, match="not a number"):
        WAYS[name](x * torch.nan, atoms, 2)
    assert WAYS[name](x[:0], atoms, 2).indices.shape == (0, 2)
    assert not WAYS[name](x * 0, atoms, 2).values.any()
    with pytest.raises(ValueError, match="at_once=3 with k=2.*allowed: 1 to 2"):
        pursuits.gomp(x, atoms, 2, at_once=3)
