"""Pursuits beside `dictionary.pursuit.omp`: several atoms at once, or a support that is chosen anew at every round.

All give k atoms a sample with least-squares coefficients, so that they differ in the atoms alone:

    gOMP    (Wang, Kwon and Shim 2012)       a few atoms at a time, none is given back; all k at once: one look
    CoSaMP  (Needell and Tropp 2009)         2k more atoms, solve for all, keep the k largest coefficients
    NIHT    (Blumensath and Davies 2010)     z ← H_k(z + μ Dᵀ(x − Dz)), μ the best step on the present support
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import settings
from helpers.dictionary import Rows, SparseCodes
from helpers.dictionary.atoms import Atoms, at_unit_size
from helpers.dictionary.pursuit import least_squares
from helpers.settings import allowed

CHUNK = 512
"""Samples at a time: a few numbers for each of the n atoms are held for each."""


def gomp(x: Float[Tensor, "batch m"], atoms: Rows | Float[Tensor, "n m"], k: int, *, at_once: int = 2) -> SparseCodes:
    """Generalised OMP: at every step the `at_once` atoms of largest |d_j·r| that are not chosen yet, fewer at the end.

    Raises `ValueError` for k above n or m, `at_once` outside 1 to k, x that is not finite, atoms not of length 1 or 0.
    """
    allowed(1 <= at_once <= k, f"at_once={at_once} with k={k}", f"1 to {k}")

    def chosen(x: Tensor, every: Atoms) -> Int[Tensor, "batch k"]:
        support, rest = torch.empty(len(x), 0, dtype=torch.long, device=x.device), x
        while support.shape[1] < k:
            score = every.correlate(rest).abs().scatter_(1, support, -1)
            more = score.topk(min(at_once, k - support.shape[1]), dim=1).indices
            support = torch.cat([support, more], 1)
            rest = x - every.combine(least_squares(x, atoms, support), support)
        return support

    return _found(x, atoms, k, k, chosen)


def cosamp(x: Float[Tensor, "batch m"], atoms: Rows | Float[Tensor, "n m"], k: int, *, rounds: int = 20) -> SparseCodes:
    """Compressive sampling matching pursuit; a sample stops at the round that no longer lowers its error.

    Raises `ValueError` as `gomp` does, and for 3k above n or m: so many atoms are solved for at once.
    """

    def chosen(x: Tensor, every: Atoms) -> Int[Tensor, "batch k"]:
        support = every.correlate(x).abs().topk(k, dim=1).indices
        rest = x - every.combine(least_squares(x, atoms, support), support)
        going = torch.arange(len(x), device=x.device)  # those that got better so far
        for _ in range(rounds):
            some, at = x[going], support[going]
            score = every.correlate(rest[going]).abs().scatter_(1, at, -1)
            merged = torch.cat([at, score.topk(2 * k, dim=1).indices], 1)
            values = least_squares(some, atoms, merged)
            pruned = merged.gather(1, values.abs().topk(k, dim=1).indices)
            left = some - every.combine(least_squares(some, atoms, pruned), pruned)
            better = left.norm(dim=1) < rest[going].norm(dim=1)
            going, left, pruned = going[better], left[better], pruned[better]
            if not len(going):
                break
            support[going], rest[going] = pruned, left
        return support

    return _found(x, atoms, k, 3 * k, chosen)


def niht(x: Float[Tensor, "batch m"], atoms: Rows | Float[Tensor, "n m"], k: int, *, rounds: int = 100) -> SparseCodes:
    """Normalised iterative hard thresholding, with the paper's step size and its halving where the support moves.

    Raises `ValueError` as `gomp` does.
    """

    def chosen(x: Tensor, every: Atoms) -> Int[Tensor, "batch k"]:
        support = every.correlate(x).abs().topk(k, dim=1).indices
        values, rest = torch.zeros_like(support, dtype=x.dtype), x
        for _ in range(rounds):
            downhill = every.correlate(rest)
            along = downhill.gather(1, support)
            step = along.square().sum(1) / every.combine(along, support).square().sum(1).clamp_min(1e-30)
            dense = torch.zeros_like(downhill).scatter_(1, support, values)
            before = every.combine(values, support)
            while True:
                moved = dense + step[:, None] * downhill
                proposed = moved.abs().topk(k, dim=1).indices
                change = moved.gather(1, proposed)
                stays = (proposed.sort(1).values == support.sort(1).values).all(1)
                after = every.combine(change, proposed)
                ahead = torch.zeros_like(dense).scatter_(1, proposed, change) - dense
                bound = 0.99 * ahead.square().sum(1) / (after - before).square().sum(1).clamp_min(1e-30)
                long = ~stays & (step > bound)
                if not long.any():
                    break
                step = torch.where(long, step / 2, step)
            support, values, rest = proposed, change, x - after
        return support

    return _found(x, atoms, k, k, chosen)


@torch.no_grad()
def _found(
    x: Tensor, atoms: Rows | Tensor, k: int, most: int, chosen: Callable[[Tensor, Atoms], Tensor]
) -> SparseCodes:
    """Codes on the atoms that `chosen` picks, a chunk of samples at a time; `most` are solved for at once."""
    every = Atoms(atoms)
    lengths = every.weight.double().norm(dim=1)
    alike = ((lengths - 1).abs() < 0.02) | (lengths == 0)  # as far as half precision holds a length
    given = f"atoms have lengths from {float(lengths.amin()):.3g} to {float(lengths.amax()):.3g}"
    allowed(bool(alike.all()), given, "1 (or 0): divide each by its length")
    scaled, least = at_unit_size(x, every)[0], min(len(every), every.width)
    allowed(k >= 1 and most <= least, f"k={k}: {most} atoms at once", f"1 to {least}, of n={len(every)} atoms")
    chunks = settings.progress(scaled.split(CHUNK), "pursuit", delay=2)
    parts = [chosen(part, every) for part in chunks]  # signals of any size
    supports = torch.cat(parts) if len(x) else torch.zeros(0, k, dtype=torch.long, device=x.device)
    return SparseCodes(supports, least_squares(x, atoms, supports))
