"""Rows with a few numbers each, at places of their own: parameters, gradients and products are packed."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers.dictionary import rows as dense
from helpers.dictionary.rows import Rows, check_indices, linear, starts_by_row, weighted_sum

TILE_BYTES = 8 * 2**20
"""Largest dense tile of packed rows that a pass over all of them builds; it lives as long as that product."""

GATHER_SHARE, GATHER_BLOCK = 0.35, 128
"""On a CPU all packed rows are gathered, `GATHER_BLOCK` samples at a time, while q ≤ 0.35·width; beyond that, and on a
GPU, a matrix product over tiles is faster (`benchmarks.pursuit`: a gathered multiply-add costs about three of its)."""


class Packed(Rows):
    """Rows of which each has q numbers in places of its own and zeros elsewhere (paper B's masked columns).

    Parameters, gradients and the optimiser's state are [n, q]. Scores of all rows are gathered, or go through dense
    tiles of at most `TILE_BYTES`; everything else reads and writes only the numbers there are.

    Args:
        weight: [n, q], the numbers.
        rows: [n, q], the place of each number in 0 … width − 1, distinct within a row.
        width: length m of the vectors.
        bias: [n], added to the scores; None for none.
        degrees: [n], how many of its q numbers each row uses; those behind are zero and stay so. None: all q.
    """

    def __init__(
        self,
        weight: Tensor,
        rows: Int[Tensor, "n q"],
        width: int,
        bias: Tensor | None = None,
        degrees: Int[Tensor, " n"] | None = None,
    ):
        super().__init__(weight, bias)
        if rows.shape != weight.shape:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; allowed: {tuple(weight.shape)}, as weight")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < width:
            raise ValueError(f"rows lie in {int(rows.min())} … {int(rows.max())}; allowed: 0 … width - 1 = {width - 1}")
        ordered = rows.long().sort(1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("rows has a place twice in one row; allowed: distinct places")
        if degrees is not None and not (
            degrees.shape == weight.shape[:1] and bool(((degrees >= 1) & (degrees <= weight.shape[1])).all())
        ):
            raise ValueError(f"degrees={degrees.tolist()[:9]}…; allowed: for each row 1 to {weight.shape[1]}")
        self._width = width
        self.register_buffer("degrees", None if degrees is None else degrees.to(torch.int32))
        if degrees is not None:
            self.weight.data.masked_fill_(self._unused(), 0.0)
        self.register_buffer("rows", rows.to(torch.int16 if width <= 2**15 else torch.int32))

    @property
    def width(self) -> int:
        return self._width

    @property
    def n_values(self) -> int:
        """Numbers that the rows use: q·n, or the sum of `degrees`."""
        return self.weight.numel() if self.degrees is None else int(self.degrees.sum())

    def _unused(self) -> Tensor:
        return torch.arange(self.weight.shape[1], device=self.weight.device) >= self.degrees[:, None]

    def scores(self, x: Float[Tensor, "batch d"], only: Int[Tensor, " n"] | None = None) -> Float[Tensor, "batch n"]:
        if only is not None:
            return linear(x, self.vectors(only), None if self.bias is None else self.bias[only])
        if x.device.type == "cpu" and self.weight.shape[1] <= GATHER_SHARE * self.width:
            scores = packed_products(x.to(self.weight.dtype), self.weight, self.rows)
        else:
            scores = _PackedScores.apply(x, self.weight, self.rows)
        return scores if self.bias is None else scores.add_(self.bias)

    def _products(self, x: Tensor, indices: Tensor, known: Tensor | None) -> Tensor:
        check_indices(indices, len(self.weight))
        known = known if known is None else known.to(self.weight.dtype)  # as `gather_dots` does
        return _PackedDots.apply(x.to(self.weight.dtype), self.weight, self.rows, indices, known)

    def combine(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch d"]:
        check_indices(indices, len(self.weight))
        return _PackedSum.apply(values.to(self.weight.dtype), indices, self.weight, self.rows, self.width)

    def vectors(self, only: Tensor | None = None) -> Float[Tensor, "n d"]:
        weight, rows = (self.weight, self.rows) if only is None else (self.weight[only], self.rows[only])
        return weight.new_zeros(len(weight), self.width).scatter(1, rows.long(), weight)

    def restrict(self, vectors: Float[Tensor, "n d"], only: Int[Tensor, " n"]) -> Float[Tensor, "n q"]:
        kept = vectors.gather(1, self.rows[only].long())
        return kept if self.degrees is None else kept.masked_fill(self._unused()[only], 0.0)

    def twin(self) -> Packed:
        return Packed(self.weight, self.rows, self.width, self.bias, self.degrees)

    @torch.no_grad()
    def drop_unused_gradient_(self) -> None:
        """Numbers behind a row's degree get no gradient, so they stay zero."""
        if self.degrees is not None and self.weight.grad is not None:
            self.weight.grad.masked_fill_(self._unused(), 0.0)


def packed_products(
    x: Float[Tensor, "batch d"], weight: Float[Tensor, "n q"], rows: Int[Tensor, "n q"]
) -> Float[Tensor, "batch n"]:
    """w_j·x for all packed rows by gathering, O(qn) a sample, with its gradient.

    With one sample a column, row j's score is a weighted sum of q rows of xᵀ: the first primitive, read the other way.
    """
    if not len(x):
        return x.new_zeros(0, len(weight))
    places = rows.long()
    return torch.cat([weighted_sum(weight, places, part.T.contiguous()).T for part in x.split(GATHER_BLOCK)])


def _tiles(weight: Tensor, rows: Tensor, width: int):
    """Dense tiles of packed rows, one after another in the same memory: (where they lie, their places, the tile)."""
    height = min(len(weight), max(1, TILE_BYTES // (width * weight.element_size())))
    tile = weight.new_zeros(height, width)
    for start in range(0, len(weight), height):
        part = slice(start, min(start + height, len(weight)))
        places = rows[part].long()
        filled = tile[: len(places)].scatter_(1, places, weight[part])
        yield part, places, filled
        filled.scatter_(1, places, 0.0)


def _batches(x: Tensor, indices: Tensor, rows: Tensor):
    """Parts of a batch whose gathered places [batch, k·q] fit `GATHER_BYTES`: (samples, their places)."""
    batch, k = indices.shape
    size = max(1, dense.GATHER_BYTES // max(1, k * rows.shape[1] * 16))
    for start in range(0, batch, size):
        part = slice(start, start + size)
        yield part, rows[indices[part]].long().flatten(1)


def _sum_packed(parts: Tensor, indices: Tensor, n: int) -> Tensor:
    """Σ of parts [batch·k, q] by chosen row: [n, q]."""
    order, starts = starts_by_row(indices, n)
    return F.embedding_bag(order, parts, starts, mode="sum")


class _PackedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight, rows)
        scores = x.new_empty(len(x), len(weight))
        for part, _, tile in _tiles(weight, rows, x.shape[1]):
            scores[:, part] = linear(x, tile, None)
        return scores

    @staticmethod
    def backward(ctx, grad):
        x, weight, rows = ctx.saved_tensors
        for_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for_weight = torch.empty_like(weight)
        for part, places, tile in _tiles(weight, rows, x.shape[1]):
            if for_x is not None:
                for_x.addmm_(grad[:, part], tile)
            for_weight[part] = (grad[:, part].T @ x).gather(1, places)
        return for_x, for_weight, None


class _PackedDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows, indices, known):
        ctx.save_for_backward(x, weight, rows, indices)
        if known is not None:
            return known.clone()
        dots = x.new_empty(indices.shape)
        for part, places in _batches(x, indices, rows):
            dots[part] = (x[part].gather(1, places).view(*indices[part].shape, -1) * weight[indices[part]]).sum(-1)
        return dots

    @staticmethod
    def backward(ctx, grad):
        x, weight, rows, indices = ctx.saved_tensors
        for_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight)
        for part, places in _batches(x, indices, rows):
            some = grad[part][..., None]
            if for_x is not None:
                for_x[part].scatter_add_(1, places, (some * weight[indices[part]]).flatten(1))
            parts = some * x[part].gather(1, places).view(*indices[part].shape, -1)
            for_weight += _sum_packed(parts.flatten(0, 1), indices[part], len(weight))
        return for_x, for_weight, None, None, None


class _PackedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, weight, rows, width):
        ctx.save_for_backward(values, indices, weight, rows)
        output = values.new_zeros(len(values), width)
        for part, places in _batches(values, indices, rows):
            output[part].scatter_add_(1, places, (values[part][..., None] * weight[indices[part]]).flatten(1))
        return output

    @staticmethod
    def backward(ctx, grad):
        values, indices, weight, rows = ctx.saved_tensors
        for_values, for_weight = torch.empty_like(values), torch.zeros_like(weight)
        for part, places in _batches(grad, indices, rows):
            gathered = grad[part].gather(1, places).view(*indices[part].shape, -1)
            for_values[part] = (gathered * weight[indices[part]]).sum(-1)
            gathered.mul_(values[part][..., None])
            for_weight += _sum_packed(gathered.flatten(0, 1), indices[part], len(weight))
        return for_values, None, for_weight, None, None
