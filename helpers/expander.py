"""Which rows of the decoder an atom may use, and what that choice guarantees.

A mask of left-degree d names d distinct row numbers for each of n atoms: an `Int[Tensor, "n degree"]`, sorted within an
atom. As a bipartite graph it joins each atom to its rows; how far small sets of atoms spread out in it (expansion)
decides what paper B can prove about the dictionary.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

# -- masks -------------------------------------------------------------------------------------------------------------


def left_regular(n_features: int, d_model: int, degree: int, generator: torch.Generator) -> Int[Tensor, "n degree"]:
    """Each atom gets `degree` distinct rows, uniform without replacement, and every row is used.

    Rows that no atom drew are filled afterwards: entries are visited in random order, and one whose row has another
    user is moved to an empty row. So every atom keeps its degree, and the rule favours no atom and no row.

    Raises `ValueError` where `degree` is not in 1..d_model, or n_features·degree entries cannot cover d_model rows.
    """
    _check_mask(n_features, d_model, degree)
    rows = _subsets(n_features, d_model, degree, generator)
    return _fill_empty(rows, d_model, generator).sort(dim=1).values


def _check_mask(n_features: int, d_model: int, degree: int) -> None:
    if not 1 <= degree <= d_model:
        raise ValueError(f"degree={degree} is not a number of distinct rows; allowed: 1 to d_model={d_model}")
    if n_features * degree < d_model:
        raise ValueError(
            f"n_features={n_features} atoms of degree={degree} leave rows empty; allowed: at least "
            f"{-(-d_model // degree)} atoms, so that n_features·degree ≥ d_model={d_model}"
        )


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
