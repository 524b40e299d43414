"""Leading singular vectors of many matrices at once.

`torch.svd_lowrank` iterates on one block; on Gaussian noise of [1024, 512] it takes 128 rounds and 12 times as long to
come to the residual that is asked for here.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.dictionary.rows import power_of_two

TOLERANCE = 1e-5
"""`leading` stops where ‖WWᵀu − σ²u‖ ≤ TOLERANCE·σ₁² for each direction u asked for."""


def leading(
    w: Float[Tensor, "batch d_model d_ff"], rank: int, tolerance: float = TOLERANCE
) -> tuple[Float[Tensor, "batch rank d_model"], Float[Tensor, "batch rank"], Float[Tensor, "batch rank"]]:
    """Top left singular vectors of each matrix, their σ² (float64), and their residuals ‖WWᵀu − σ²u‖/σ₁².

    Block Krylov (Golub & Underwood 1977; Musco & Musco 2015): orthonormal rows that span X, XWWᵀ, X(WWᵀ)², … from a
    random block X, and within them the best approximation (Rayleigh–Ritz), until the residuals are small. It takes
    products with thin blocks only: few where σ₁ stands out, some 25 for Gaussian noise. Raises `ArithmeticError` where
    even rows that span everything leave a larger residual, as for a tolerance below what float32 resolves.
    """
    scale = power_of_two(w.abs().amax((1, 2), keepdim=True))
    if ((scale < 1e-4) | (scale > 1e4)).any():  # their fourth powers must be numbers of float32
        u, squares, residuals = leading(w / scale, rank, tolerance)
        return u, squares * scale[:, :, 0].double().square(), residuals
    limit = min(w.shape[1:])
    block = min(rank + 7, limit)
    new = torch.randn(block, w.shape[2], generator=torch.Generator().manual_seed(0)).to(w) @ w.mT
    widths = (w.shape[1], w.shape[2], w.shape[1])  # of rows, rows·W and rows·WWᵀ; untouched, the room takes no memory
    room, size = [w.new_empty(len(w), 2 * limit + block, width) for width in widths], 0
    for blocks in itertools.count(1):
        rows = _orthonormal(new, room[0][:, :size])
        image = rows @ w
        new = image @ w.mT
        for all_of, part in zip(room, (rows, image, new), strict=True):
            all_of[:, size : size + block] = part
        size += block
        if size >= limit or blocks % 4 == 0:
            basis, images, back = (all_of[:, :size] for all_of in room)
            squares, mix = (t.float() for t in torch.linalg.eigh((images @ images.mT).double()))
            squares, mix = squares[:, -rank:].flip(1).clamp_min(0), mix[:, :, -rank:].flip(2).mT
            u = mix @ basis
            error = torch.linalg.vector_norm(mix @ back - squares[:, :, None] * u, dim=2)
            residuals = error / squares[:, :1].clamp_min(torch.finfo(w.dtype).tiny)
            if residuals.max() <= tolerance:
                return u, squares.double(), residuals
            if size >= 2 * limit:
                raise ArithmeticError(f"residual {residuals.max():.1e}, complete basis, tolerance {tolerance:.1e}")


def _orthonormal(new: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows for what `new` adds to `basis`; rows of zeros where it adds nothing but rounding.

    By the Gram matrix of the rows in float64 (Stathopoulos & Wu 2002), twice, since once is not enough in float32:
    first against the last two blocks, all that `new` overlaps but for rounding, then against the whole basis.
    """
    recent = basis[:, -2 * new.shape[1] :]
    for rows in (recent, basis):
        left = (new - (new @ rows.mT) @ rows).double()
        squares, mix = torch.linalg.eigh(left @ left.mT)
        kept = squares > (0.25 if rows is basis else 1e-14 * squares[:, -1:])
        new = ((mix * torch.where(kept, squares.rsqrt(), 0.0)[:, None]).mT @ left).float()
    return new
