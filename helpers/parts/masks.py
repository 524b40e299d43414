"""Which rows of the decoder an atom may use, and what that choice guarantees.

A mask of left-degree d names d distinct row numbers for each of n atoms: an `Int[Tensor, "n degree"]`, sorted within an
atom. As a bipartite graph it joins each atom to its rows; Γ(S) are the rows that a set S of atoms touches. A mask is a
(k, ε, d) expander when |Γ(S)| ≥ (1 − ε)·d·|S| for every set of at most k atoms.

Numbers about all sets of atoms are marked as what they are: exact (every set was visited) or an interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linprog
from torch import Tensor

from helpers import settings
from helpers.dictionary import Packed, Rows, SparseCodes
from helpers.dictionary.rows import power_of_two
from helpers.parts.worlds import random_atoms
from helpers.settings import allowed, one_of

MOST_SETS = 20_000_000
"""Sets of atoms that `expansion` is willing to visit: some seconds on one core."""

TILE_BYTES = 64 * 2**20
"""Largest block of a Gram matrix that is held at once."""


# -- masks -------------------------------------------------------------------------------------------------------------


def left_regular(n_features: int, d_model: int, degree: int, generator: torch.Generator) -> Int[Tensor, "n degree"]:
    """Each atom gets `degree` distinct rows, uniform without replacement, and every row is used.

    Rows that no atom drew are filled afterwards: entries are visited in random order, and one whose row has another
    user is moved to an empty row. So every atom keeps its degree, and the rule favours no atom and no row. All masks
    raise `ValueError` where `degree` is not in 1..d_model, or n_features·degree entries cannot cover d_model rows.
    """
    _check_mask(n_features, d_model, degree)
    rows = _subsets(n_features, d_model, degree, generator)
    return _fill_empty(rows, d_model, generator).sort(dim=1).values


def clustered(
    n_features: int, d_model: int, degree: int, generator: torch.Generator, *, every_row: bool = True
) -> Int[Tensor, "n degree"]:
    """A control whose supports are not diverse: rows are cut into ⌈m/d⌉ blocks of d, and each atom gets one block.

    Rows are shuffled first; the last block is filled up with rows of the first, so that every row is used, and blocks
    are used equally often (±1). With `every_row=False` there are only ⌊m/d⌋ blocks, as in the paper's release, and
    the m mod d rows left over can never be reached: no fair control, kept to show the difference.
    """
    _check_mask(n_features, d_model, degree)
    device = generator.device
    count = -(-d_model // degree) if every_row else d_model // degree
    order = torch.randperm(d_model, generator=generator, device=device)
    blocks = order[torch.arange(count * degree, device=device) % d_model].view(count, degree)
    block_of = torch.randperm(n_features, generator=generator, device=device) % count
    return blocks[block_of].sort(dim=1).values


def informed(
    samples: Float[Tensor, "samples m"], n_features: int, degree: int, generator: torch.Generator
) -> Int[Tensor, "n degree"]:
    """Rows that are large together in the data: each atom takes the `degree` largest coordinates of a random sample.

    Samples are centred and every coordinate is divided by its standard deviation first, so that a few loud coordinates
    do not fill every support. Empty rows are filled as in `left_regular`.
    """
    _check_mask(n_features, samples.shape[1], degree)
    pick = torch.randint(len(samples), (n_features,), generator=generator, device=generator.device).to(samples.device)
    spread = samples.std(dim=0, correction=0).clamp_min(torch.finfo(samples.dtype).tiny)
    sizes = ((samples[pick] - samples.mean(0)) / spread).abs()
    rows = sizes.topk(degree, dim=1).indices.to(generator.device)
    return _fill_empty(rows, samples.shape[1], generator).sort(dim=1).values


def _check_mask(n_features: int, d_model: int, degree: int) -> None:
    allowed(1 <= degree <= d_model, f"degree={degree} distinct rows", f"1 to d_model={d_model}")
    given = f"n_features={n_features} atoms of degree={degree} leave rows empty"
    allowed(n_features * degree >= d_model, given, f"n_features·degree ≥ d_model={d_model}")


def _subsets(n: int, m: int, size: int, generator: torch.Generator) -> Int[Tensor, "n size"]:
    """n independent uniform subsets of {0..m−1}, by Floyd's rule, all atoms at once (Bentley & Floyd 1987).

    For t = m−size … m−1: draw from 0..t; a number that the subset has already is replaced by t itself.
    """
    device = generator.device
    taken = torch.zeros(n, m, dtype=torch.bool, device=device)
    every = torch.arange(n, device=device)
    rows = torch.empty(n, size, dtype=torch.long, device=device)
    for column, t in enumerate(range(m - size, m)):
        drawn = torch.randint(t + 1, (n,), generator=generator, device=device)
        drawn = torch.where(taken[every, drawn], t, drawn)
        taken[every, drawn] = True
        rows[:, column] = drawn
    return rows


def _fill_empty(rows: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """Move entries whose row has another user to the rows that nobody has. Counts only fall, so one visit is enough."""
    flat = rows.flatten()
    uses = torch.bincount(flat, minlength=m).tolist()
    empty = [row for row, count in enumerate(uses) if not count]
    if not empty:
        return rows
    order = iter(torch.randperm(len(flat), generator=generator, device=flat.device).tolist())
    owners = flat.tolist()
    while empty:
        entry = next(order)
        if uses[owners[entry]] > 1:
            uses[owners[entry]] -= 1
            owners[entry] = empty.pop()
    return torch.tensor(owners, device=rows.device).view_as(rows)


# -- expansion ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expansion:
    """How far sets of t = 1, 2, … atoms fall short of d·t rows: ε_t = 1 − min |Γ(S)|/(d·t) over |S| = t.

    `low[t−1] ≤ ε_t ≤ high[t−1]`, in float64; equal where every set was visited. `worst[t−1]` is a set that has `low`,
    or None where no set was looked for.
    """

    low: Float[Tensor, " size"]
    high: Float[Tensor, " size"]
    worst: tuple[Tensor | None, ...]

    @property
    def exact(self) -> bool:
        return torch.equal(self.low, self.high)

    def epsilon(self, size: int) -> tuple[float, float]:
        """Lower and upper bound on the ε of a (size, ε, d) expander: the largest ε_t over ALL t ≤ size.

        ε_t need not grow with t (two equal atoms spoil pairs more than triples), so the last one is not enough.
        """
        allowed(1 <= size <= len(self.low), f"size={size} was not computed", f"1 to {len(self.low)}")
        return float(self.low[:size].max()), float(self.high[:size].max())


def expansion(rows: Int[Tensor, "n degree"], d_model: int, size: int, *, most: int = MOST_SETS) -> Expansion:
    """ε_1 … ε_size exactly, by visiting every set of up to `size` atoms as unions of bit strings.

    Raises `ValueError` for a size outside 1..n, or where there are more than `most` sets.
    """
    n, degree = rows.shape
    _check_size(size, n)
    sets = sum(math.comb(n, t) for t in range(1, size + 1))
    allowed(sets <= most, f"size={size} means {sets:,} sets of n={n} atoms", f"{most:,} (expansion_bounds is fast)")
    on = np.zeros((n, -(-d_model // 64) * 64), dtype=bool)
    np.put_along_axis(on, rows.cpu().numpy(), True, axis=1)
    bits = np.packbits(on, axis=1).view(np.uint64)  # the mask as [n, ⌈m/64⌉] words
    smallest, worst = [d_model + 1] * size, [None] * size
    with settings.progress(total=sets, desc="sets of atoms", unit_scale=True, delay=2) as bar:
        for members, union in _unions(bits, np.arange(n)[:, None], bits, size):
            reached = np.bitwise_count(union).sum(axis=1, dtype=np.int64)
            t, best = members.shape[1], reached.argmin()
            if reached[best] < smallest[t - 1]:
                smallest[t - 1], worst[t - 1] = int(reached[best]), torch.from_numpy(members[best].copy())
            bar.update(len(members))
    epsilon = _shortfall(torch.tensor(smallest), degree)
    return Expansion(epsilon, epsilon, tuple(worst))


def _unions(bits: np.ndarray, members: np.ndarray, union: np.ndarray, size: int) -> Iterator[tuple]:
    """All sets that extend the given ones by later atoms, with their unions: depth first, a block at a time."""
    yield members, union
    if members.shape[1] == size:
        return
    n = len(bits)
    more = n - 1 - members[:, -1]
    parts = 1 + int(more.sum()) * bits.shape[1] * 8 // TILE_BYTES
    for block in np.array_split(np.arange(len(members)), min(parts, len(members))):
        first = np.repeat(block, more[block])
        if not len(first):
            continue
        steps = np.arange(len(first)) - np.repeat(np.cumsum(more[block]) - more[block], more[block])
        added = members[first, -1] + 1 + steps
        extended = np.concatenate([members[first], added[:, None]], axis=1)
        yield from _unions(bits, extended, union[first] | bits[added], size)


def _shortfall(reached: Tensor, degree: int) -> Tensor:
    """ε_t = 1 − |Γ|/(d·t) from the number of rows reached by sets of 1, 2, … atoms."""
    sizes = torch.arange(1, len(reached) + 1, dtype=torch.float64)
    return 1 - reached.double() / (degree * sizes)


def _check_size(size: int, n: int) -> None:
    allowed(1 <= size <= n, f"size={size} is not a number of atoms", f"1 to n={n}")


def expansion_bounds(
    rows: Int[Tensor, "n degree"], d_model: int, size: int, generator: torch.Generator, *, starts=8, visited=0
) -> Expansion:
    """Bounds on ε_1 … ε_size where sets are too many to visit; exact for as many sizes as have `visited` sets at most.

    Above: the rows of a set that meet c of its members satisfy 1[c ≥ 1] ≥ c(2κ + 1 − c)/(κ(κ + 1)) for every whole
    κ ≥ 1 (Dawson & Sankoff 1967; κ = 1 is Bonferroni). Summed, |Γ(S)| ≥ (2/(κ+1))·(d·t − P/κ), where P, the overlaps
    of pairs in S, is at most t/2 times the largest sum of t − 1 overlaps of one atom. Below: bad sets found greedily
    from `starts` atoms, and what no mask can avoid (`expansion_floor`).

    Raises `ValueError` for a size outside 1..n.
    """
    n, degree = rows.shape
    _check_size(size, n)
    ones = Packed(torch.ones(n, degree, device=rows.device), rows, d_model)
    sums = babel(ones, size - 1).double().cpu()
    t = torch.arange(1, size + 1, dtype=torch.float64)
    kappa = t[:, None]
    at_least = (2 / (kappa + 1) * (degree * t - t * sums / 2 / kappa)).amax(0)
    at_least = torch.ceil(at_least - 1e-9).cummax(0).values  # rows are whole, and a larger set reaches no fewer
    reached, sets = crowded_sets(rows, d_model, size, generator, starts=starts)
    floor = torch.tensor([expansion_floor(n, d_model, degree, s) for s in range(1, size + 1)], dtype=torch.float64)
    found, high = _shortfall(reached, degree), _shortfall(at_least, degree)
    worst = tuple(chosen if found[i] >= floor[i] else None for i, chosen in enumerate(sets))
    low = torch.maximum(found, floor)
    counts = itertools.accumulate(math.comb(n, s) for s in range(1, size + 1))  # whole numbers: they overflow a float
    if small := sum(count <= visited for count in counts):
        exact = expansion(rows, d_model, small, most=visited)
        low, high = (torch.cat([exact.low, bound[small:]]) for bound in (low, high))
        worst = exact.worst + worst[small:]
    return Expansion(low, torch.maximum(low, high), worst)


def expansion_floor(n_features: int, d_model: int, degree: int, size: int) -> float:
    """What ε_size is at least, for ANY mask of this shape: the best set of atoms is no better than the average one.

    A row with c atoms is missed by a random set of t with probability f(c) = Π_{i<t} max(0, 1 − c/(n − i)), which is
    convex, so on average at most m·(1 − f(nd/m)) rows are reached. About (t − 1)·d/2m while t·d ≪ m.
    """
    _check_size(size, n_features)
    uses = n_features * degree / d_model
    missed = math.prod(max(0.0, 1 - uses / (n_features - i)) for i in range(size))
    reached = min(math.floor(d_model * (1 - missed) + 1e-9), degree * size)
    return 1 - reached / (degree * size)


def crowded_sets(
    rows: Int[Tensor, "n degree"], d_model: int, size: int, generator: torch.Generator, *, starts: int = 8
) -> tuple[Int[Tensor, " size"], list[Tensor]]:
    """Sets of 1 … `size` atoms that reach few rows: how many the best one of each size reaches, and its atoms.

    Grown greedily from `starts` random atoms by the atom that brings fewest new rows, ties at random. What is found
    exists; that nothing better does is not claimed.
    """
    n, degree = rows.shape
    _check_size(size, n)
    device = rows.device
    rows, graph = rows.long(), _sparse(Packed(torch.ones(n, degree, device=device), rows, d_model))
    order = torch.randperm(n, generator=generator, device=generator.device)[:starts].to(device)[:, None]
    covered = torch.zeros(len(order), d_model, device=device).scatter_(1, rows[order[:, 0]], 1.0)
    reached = [covered.sum(1)]
    for _ in range(1, size):
        inside = (graph @ covered.T).T  # rows of each atom that the set has already
        inside += 0.5 * torch.rand(inside.shape, generator=generator, device=generator.device).to(device)
        following = inside.scatter(1, order, -1.0).argmax(1)
        covered.scatter_(1, rows[following], 1.0)
        order = torch.cat([order, following[:, None]], dim=1)
        reached.append(covered.sum(1))
    smallest, best = torch.stack(reached).min(dim=1)
    return smallest.long().cpu(), [order[start, : t + 1].sort().values.cpu() for t, start in enumerate(best.tolist())]


def _sparse(atoms: Packed) -> Tensor:
    """Packed columns as a sparse [n, m] matrix in CSR form, whose products need no sorting."""
    n, degree = atoms.rows.shape
    starts = torch.arange(0, n * degree + 1, degree, device=atoms.rows.device)
    places, values = atoms.rows.long().flatten(), atoms.weight.detach().flatten()
    return torch.sparse_csr_tensor(starts, places, values, (n, atoms.width), check_invariants=False)


# -- flatness, coherence and gain --------------------------------------------------------------------------------------


def flatness(values: Float[Tensor, "n degree"]) -> float:
    """β = √d·max |W_ij| of unit columns given by their values: 1 where all are ±1/√d, at most √d.

    Raises `ValueError` for columns that are not of length 1.
    """
    values = values.detach().double()
    lengths = values.norm(dim=1)
    longest, shortest = float(lengths.max()), float(lengths.min())
    allowed(0.999 <= shortest <= longest <= 1.001, f"values has a column of length {shortest:g}…{longest:g}", "1")
    return values.shape[1] ** 0.5 * float((values / lengths[:, None]).abs().max())


def babel(atoms: Rows | Tensor, order: int) -> Float[Tensor, " orders"]:
    """μ₁(0), …, μ₁(order): for each t the largest sum of |w_i·w_j| over t other atoms j of one atom i (Tropp 2004).

    μ₁(1) is the coherence. The Gram matrix is made a tile at a time, for packed atoms from a sparse product.

    Args:
        atoms: [n, m] matrix, or the rows of a dictionary, packed or not.
        order: 0 to n − 1, else `ValueError`.
    """
    n = len(atoms)
    allowed(0 <= order < n, f"order={order} has no sum of other atoms", f"0 to n - 1 = {n - 1}")
    atoms = Rows(atoms) if isinstance(atoms, Tensor) else atoms
    matrix = _sparse(atoms) if isinstance(atoms, Packed) else atoms.vectors().detach()
    largest = matrix.new_zeros(order + 1, layout=torch.strided)
    for tile in torch.arange(n, device=matrix.device).split(max(1, TILE_BYTES // (n * matrix.element_size()))):
        products = (matrix @ atoms.vectors(tile).detach().T).abs().T.contiguous()  # topk is slow across rows
        products[torch.arange(len(tile), device=tile.device), tile] = 0
        sums = products.topk(order, dim=1).values.cumsum(1).amax(0)
        largest[1:] = torch.maximum(largest[1:], sums)
    return largest


def recovery_coefficient(atoms: Float[Tensor, "n m"], supports: Int[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    """Tropp's max over j outside Λ of ‖Φ_Λ⁺φ_j‖₁, for each support Λ; below 1 matching pursuit never leaves Λ.

    Infinite where the atoms of Λ are dependent: one has less than √(100 ε) of its length outside the span of others, as
    in `pursuit.least_squares`.
    """
    atoms = atoms / power_of_two(atoms.abs().amax())
    chosen = atoms[supports]
    gram = chosen @ chosen.mT
    factor, failed = torch.linalg.cholesky_ex(gram)
    shares = factor.diagonal(dim1=1, dim2=2).square() / gram.diagonal(dim1=1, dim2=2)
    independent = (failed == 0) & (shares >= 100 * torch.finfo(gram.dtype).eps).all(1)
    solved = torch.cholesky_solve(chosen @ atoms.T, factor)
    sums = solved.abs().sum(1).scatter(1, supports, -math.inf).amax(1)
    return torch.where(independent, sums, math.inf)


def smallest_gain(atoms: Float[Tensor, "size m"]) -> tuple[float, Float[Tensor, " size"]]:
    """The smallest ‖Σ u_j w_j‖₁ over ‖u‖₁ = 1, exactly, and a u that has it: a linear programme for each sign pattern.

    For a few atoms only: 2^(size − 1) programmes. Raises `ValueError` for more than 10.
    """
    allowed(1 <= len(atoms) <= 10, f"size={len(atoms)} atoms", "1 to 10")
    columns = atoms[:, (atoms != 0).any(0)].double().numpy().T
    m, size = columns.shape
    best, at = math.inf, None
    for pattern in range(2 ** (size - 1)):
        signs = np.array([1.0] + [-1.0 if pattern >> bit & 1 else 1.0 for bit in range(size - 1)])
        signed = columns * signs  # u = signs·v with v ≥ 0 and Σv = 1
        found = linprog(
            np.r_[np.zeros(size), np.ones(m)],
            A_ub=np.block([[signed, -np.eye(m)], [-signed, -np.eye(m)]]),
            b_ub=np.zeros(2 * m),
            A_eq=np.r_[np.ones(size), np.zeros(m)][None],
            b_eq=[1.0],
        )
        if found.fun < best:
            best, at = float(found.fun), torch.from_numpy(signs * found.x[:size])
    return best, at


# -- values on a mask, and signals with known codes --------------------------------------------------------------------


def flat_values(n_features: int, degree: int, generator: torch.Generator) -> Float[Tensor, "n degree"]:
    """±1/√d with random signs, in float64: the flattest unit columns, β = 1."""
    signs = 2.0 * torch.randint(2, (n_features, degree), generator=generator, device=generator.device) - 1
    return signs.double() / degree**0.5


def gaussian_values(n_features: int, degree: int, generator: torch.Generator) -> Float[Tensor, "n degree"]:
    """Independent normal values, scaled to unit columns, in float64."""
    return random_atoms(n_features, degree, generator, torch.float64)


VALUES = ("normal", "signs", "wide")
"""Coefficients of `sparse_codes`: standard normal; ±1; random signs with sizes log-uniform over 0.01 … 100."""


def sparse_codes(
    n_features: int, k: int, count: int, generator: torch.Generator, values: str = "normal"
) -> SparseCodes:
    """`count` codes in float64, each on a uniform support of k atoms. Raises `ValueError` for unknown values or k."""
    one_of("values", values, VALUES)
    allowed(1 <= k <= n_features, f"k={k} atoms cannot be active", f"1 to n_features={n_features}")
    noise = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    indices, drawn = _subsets(count, n_features, k, generator), torch.randn(count, k, **noise)
    if values != "normal":
        drawn = drawn.sign()
    if values == "wide":
        drawn *= 10 ** (4 * torch.rand(count, k, **noise) - 2)
    return SparseCodes(indices, drawn)
