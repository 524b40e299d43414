"""The constructions of paper C as slowly and plainly as possible: one support, one atom, one tensor entry at a time."""

import itertools
import math

import numpy as np


def isometry(atoms: np.ndarray, support) -> float:
    """‖A_S A_Sᵀ − P_S‖, both built as d×d matrices, P_S from an orthonormal basis."""
    chosen = atoms[list(support)].T
    basis, values, _ = np.linalg.svd(chosen, full_matrices=False)
    basis = basis[:, values > 1e-6 * values[0]]
    return np.linalg.norm(chosen @ chosen.T - basis @ basis.T, 2)


def restricted_isometry(atoms: np.ndarray, k: int) -> float:
    return max(
        isometry(atoms, support)
        for size in range(1, k + 1)
        for support in itertools.combinations(range(len(atoms)), size)
    )


def babel(atoms: np.ndarray, k: int) -> float:
    """max over j and over ALL sets of k − 1 other atoms."""
    n, gram = len(atoms), np.abs(atoms @ atoms.T)
    return max(
        abs(gram[j, j] - 1) + sum(gram[j, i] for i in others)
        for j in range(n)
        for others in itertools.combinations([i for i in range(n) if i != j], k - 1)
    )


def project(atoms: np.ndarray, support, x: np.ndarray) -> np.ndarray:
    chosen = atoms[list(support)].T
    return chosen @ np.linalg.lstsq(chosen, x, rcond=1e-9)[0]


def linear_moe(atoms: np.ndarray, matrix: np.ndarray, support, x: np.ndarray) -> np.ndarray:
    """Definition 2.2's gates 1/k, with experts k times as large."""
    k, y = len(support), np.zeros(len(matrix))
    for j in support:
        expert = k * matrix @ atoms[j] * (atoms[j] @ x)
        y += expert / k
    return y


def tensor(outputs: np.ndarray, factors: np.ndarray, symmetric: bool = False) -> np.ndarray:
    """Σ_l u_l ⊗ v_l1 ⊗ … ⊗ v_lp, averaged over the orders of the inputs if `symmetric`."""
    (terms, m), (_, p, d) = outputs.shape, factors.shape
    total = np.zeros((m,) + (d,) * p)
    for l, place in itertools.product(range(terms), itertools.product(range(d), repeat=p)):  # noqa: E741
        total[(slice(None), *place)] += outputs[l] * math.prod(factors[l, i, place[i]] for i in range(p))
    if not symmetric:
        return total
    orders = list(itertools.permutations(range(p)))
    return sum(np.transpose(total, (0, *(1 + i for i in order))) for order in orders) / len(orders)


def power_sum(written: np.ndarray, read: np.ndarray, p: int) -> np.ndarray:
    """Σ_t w_t ⊗ s_t^{⊗p}."""
    total = 0
    for w, s in zip(written, read, strict=True):
        term = w
        for _ in range(p):
            term = np.multiply.outer(term, s)
        total = total + term
    return total


def apply(tensor: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """T[x_1, …, x_q]: contract the last index with the last input, and so on."""
    for x in reversed(inputs):
        tensor = tensor @ x
    return tensor


def polynomial_moe(t: np.ndarray, atoms: np.ndarray, support, x: np.ndarray) -> np.ndarray:
    """Σ_{j in S} (a_j·x) · (T a_j)[x, …, x], from the tensor itself."""
    p = t.ndim - 1
    return sum((atoms[j] @ x) * apply(t, *[x] * (p - 1), atoms[j]) for j in support)


def flattening_rank(symmetric: np.ndarray) -> int:
    m, *ds = symmetric.shape
    p, d = len(ds), ds[0]
    return max(np.linalg.matrix_rank(symmetric.reshape(m * d**a, d ** (p - a)), tol=1e-8) for a in range(p))
