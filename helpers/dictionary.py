"""The one family behind the book: sums of a few rank-one terms, chosen per input.

    y(x) = b_out + shared(x) + Σ_{j ∈ TopK_k(s(x) + c)}  g_j(x) · a(e_j·(x − b_in) + β_j) · d_j

A `RankOneDictionary` is three lists of row vectors (`Rows`): the router's (whose scores s choose), the encoder's (e_j)
and the decoder's (d_j). Two roles that are played by the same `Rows` object are tied. Everything else is a small knob:
the gate g, the activation a, the shared network, the selection bias c. Each paper's model is a short constructor.

No function here builds the dense [batch, n] matrix of codes; only the router's scores are dense.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

# The products of chosen rows are one `sampled_addmm`, whose CSR argument still warns that it is young.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

GATHER_BYTES = 64 * 2**20
"""Largest temporary that the portable path of `gather_dots`, and each product of chosen packed rows, may build."""

TILE_BYTES = 8 * 2**20
"""Largest dense tile of packed rows that a pass over all of them builds; it lives as long as that product."""

GATHER_SHARE, GATHER_BLOCK = 0.35, 128
"""On a CPU all packed rows are gathered, `GATHER_BLOCK` samples at a time, while q ≤ 0.35·width; beyond that, and on a
GPU, a matrix product over tiles is faster (`benchmarks.pursuit`: a gathered multiply-add costs about three of its)."""


# -- two primitives, each the adjoint of the other ---------------------------------------------------------------------


def weighted_sum(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], weight: Float[Tensor, "n d"]
) -> Float[Tensor, "batch d"]:
    """y_b = Σ_i values[b,i] · weight[indices[b,i]], reading k rows per sample instead of all n."""
    return _WeightedSum.apply(values.to(weight.dtype), indices, weight)


def gather_dots(
    x: Float[Tensor, "batch d"],
    weight: Float[Tensor, "n d"],
    indices: Int[Tensor, "batch k"],
    known: Float[Tensor, "batch k"] | None = None,
) -> Float[Tensor, "batch k"]:
    """z_bi = x_b · weight[indices[b,i]].

    `known` holds these products when a dense pass has already computed them; they are then not computed again,
    but the gradient is still the sparse one.
    """
    known = known if known is None else known.to(weight.dtype)  # under autocast a dense pass is half precision
    return _GatherDots.apply(x.to(weight.dtype), weight, indices, known)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; on a CPU, where no gradient is wanted, by oneDNN, whose float32 product is the faster one on AMD."""
    plain = torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != x.dtype
    if plain or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _sum_rows(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def _dots(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    batch, k = indices.shape
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and batch and k:
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, batch * k + 1, k),
            indices.reshape(-1),
            x.new_zeros(batch * k),
            (batch, len(weight)),
            check_invariants=False,  # the rows need not be sorted here, and checking costs more than the product
        )
        return torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0.0).values().view(batch, k)
    rows = max(1, GATHER_BYTES // max(1, k * weight.shape[1] * weight.element_size()))
    parts = [
        torch.einsum("bkd,bd->bk", weight[i], part) for i, part in zip(indices.split(rows), x.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _sum_by_row(values: Tensor, indices: Tensor, inputs: Tensor, n: int) -> Tensor:
    """G_j = Σ_{(b,i): indices[b,i]=j} values[b,i] · inputs[b]: the gradient of both primitives for `weight`.

    Sorted by row, this is again a bag of weighted rows (of `inputs` this time), so no scatter and no [batch, n] matrix.
    """
    order, starts = _starts(indices, n)
    sources = order.div(indices.shape[1], rounding_mode="floor")
    return F.embedding_bag(sources, inputs, starts, per_sample_weights=values.reshape(-1)[order], mode="sum")


def _starts(indices: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """An order of the flat (sample, choice) pairs by chosen row, and where each of the n rows begins in it."""
    flat = indices.reshape(-1)
    starts = torch.zeros(n, dtype=torch.long, device=flat.device)
    starts[1:] = torch.bincount(flat, minlength=n).cumsum(0)[:-1]
    return torch.argsort(flat, stable=True), starts


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, weight):
        ctx.save_for_backward(values, indices, weight)
        return _sum_rows(values, indices, weight)

    @staticmethod
    def backward(ctx, grad):
        values, indices, weight = ctx.saved_tensors
        grad = grad.contiguous()
        for_values = _dots(grad, weight, indices) if ctx.needs_input_grad[0] else None
        for_weight = _sum_by_row(values, indices, grad, len(weight)) if ctx.needs_input_grad[2] else None
        return for_values, None, for_weight


class _GatherDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, indices, known):
        ctx.save_for_backward(x, weight, indices)
        return _dots(x, weight, indices) if known is None else known.clone()

    @staticmethod
    def backward(ctx, grad):
        x, weight, indices = ctx.saved_tensors
        grad = grad.contiguous()
        for_x = _sum_rows(grad, indices, weight) if ctx.needs_input_grad[0] else None
        for_weight = _sum_by_row(grad, indices, x, len(weight)) if ctx.needs_input_grad[1] else None
        return for_x, for_weight, None, None


# -- codes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseCodes:
    """Codes of a batch: which atoms were chosen and with what value. `indices` are distinct within a row.

    An atom fires where its value is not zero; chosen-but-zero (a negative pre-activation under ReLU) does not count.
    """

    indices: Int[Tensor, "batch k"]
    values: Float[Tensor, "batch k"]

    @property
    def fires(self) -> Tensor:
        """Bool [batch, k]: where the value is not zero."""
        return self.values != 0

    def firing_counts(self, n_atoms: int) -> Int[Tensor, " n_atoms"]:
        """How many samples of the batch each atom fires on."""
        return torch.bincount(self.indices[self.fires], minlength=n_atoms)

    def to_dense(self, n_atoms: int) -> Float[Tensor, "batch n_atoms"]:
        """The [batch, n] matrix, for plots and checks at small size; no model uses it."""
        return self.values.new_zeros(len(self.values), n_atoms).scatter(1, self.indices, self.values)


@dataclass(frozen=True)
class Trace:
    """What one forward pass computed. `scores` [batch, n] carry a gradient only if that was asked for."""

    output: Float[Tensor, "batch d_out"]
    codes: SparseCodes
    scores: Float[Tensor, "batch n"]


# -- rows of vectors: the router, the encoder, the decoder -------------------------------------------------------------


class Rows(nn.Module):
    """n row vectors w_j with what a dictionary does with them: score an input, take chosen products, sum chosen rows.

    With `down` (V) the rows act on V x: a low-rank router U(Vx).

    Args:
        weight: [n, d], or [n, rank] when `down` is given.
        bias: [n], added to the scores; None for none.
        down: [rank, d_in]; None for the identity.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, down: Tensor | None = None):
        super().__init__()
        if down is not None and weight.shape[1] != down.shape[0]:
            raise ValueError(f"down has {down.shape[0]} rows; allowed: {weight.shape[1]}, the width of weight")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: {(len(weight),)}, one number per row")
        self.weight = _parameter(weight)
        self.bias = _parameter(bias)
        self.down = _parameter(down)

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def width(self) -> int:
        """Length of the vectors that the rows act on."""
        return (self.weight if self.down is None else self.down).shape[1]

    def scores(self, x: Float[Tensor, "batch d"], only: Int[Tensor, " n"] | None = None) -> Float[Tensor, "batch n"]:
        """w_j·x + bias_j for all rows, or for the same few (`only`) whatever the sample: one matrix product."""
        if only is None:
            return _linear(self._project(x), self.weight, self.bias)
        return _linear(self._project(x), self.weight[only], None if self.bias is None else self.bias[only])

    def chosen(
        self, x: Float[Tensor, "batch d"], indices: Int[Tensor, "batch k"], known: Tensor | None = None
    ) -> Float[Tensor, "batch k"]:
        """w_j·x + bias_j for the chosen rows only, with a gradient that touches only them.

        `known` are these numbers where `scores` has them already.
        """
        if self.bias is None:
            return gather_dots(self._project(x), self.weight, indices, known)
        bias = self.bias[indices]
        dots = gather_dots(self._project(x), self.weight, indices, known)
        # `known` has the bias in it: add an exact zero that only carries the gradient
        return dots + (bias if known is None else bias - bias.detach())

    def combine(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch d"]:
        """Σ_i values[b,i] · w_{indices[b,i]}."""
        return weighted_sum(values, indices, self.weight)

    def vectors(self, only: Tensor | None = None) -> Float[Tensor, "n d"]:
        """The row vectors, all or those of `only`, as a dense matrix that carries their gradient."""
        return self.weight if only is None else self.weight[only]

    def restrict(self, vectors: Float[Tensor, "n d"], only: Int[Tensor, " n"]) -> Float[Tensor, "n q"]:
        """These vectors as numbers of the rows `only`; a packed row keeps what it has a place for."""
        return vectors

    def twin(self) -> Rows:
        """Another object with the very same parameters: roles that share parameters without being tied."""
        return Rows(self.weight, self.bias, self.down)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Scale every row to length 1, a block at a time so that it stays in the processor's cache."""
        for block in self.weight.split(512):
            block.div_(block.norm(dim=1, keepdim=True).clamp_min(torch.finfo(block.dtype).tiny))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Remove from each row's gradient its component along the row, which renormalising would undo."""
        if self.weight.grad is None:
            return
        for row, grad in zip(self.weight.split(512), self.weight.grad.split(512), strict=True):
            grad.sub_((grad * row).sum(1, keepdim=True) * row)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.down is None else F.linear(x, self.down)


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
            return _linear(x, self.vectors(only), None if self.bias is None else self.bias[only])
        if x.device.type == "cpu" and self.weight.shape[1] <= GATHER_SHARE * self.width:
            scores = packed_products(x.to(self.weight.dtype), self.weight, self.rows)
        else:
            scores = _PackedScores.apply(x, self.weight, self.rows)
        return scores if self.bias is None else scores.add_(self.bias)

    def chosen(
        self, x: Float[Tensor, "batch d"], indices: Int[Tensor, "batch k"], known: Tensor | None = None
    ) -> Float[Tensor, "batch k"]:
        known = known if known is None else known.to(self.weight.dtype)  # as `gather_dots` does
        dots = _PackedDots.apply(x.to(self.weight.dtype), self.weight, self.rows, indices, known)
        if self.bias is None:
            return dots
        bias = self.bias[indices]
        return dots + (bias if known is None else bias - bias.detach())

    def combine(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch d"]:
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
    def project_gradient_(self) -> None:
        super().project_gradient_()
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
    size = max(1, GATHER_BYTES // max(1, k * rows.shape[1] * 16))
    for start in range(0, batch, size):
        part = slice(start, start + size)
        yield part, rows[indices[part]].long().flatten(1)


def _sum_packed(parts: Tensor, indices: Tensor, n: int) -> Tensor:
    """Σ of parts [batch·k, q] by chosen row: [n, q]."""
    order, starts = _starts(indices, n)
    return F.embedding_bag(order, parts, starts, mode="sum")


class _PackedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight, rows)
        scores = x.new_empty(len(x), len(weight))
        for part, _, tile in _tiles(weight, rows, x.shape[1]):
            scores[:, part] = _linear(x, tile, None)
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


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    """A parameter as it is (so that two modules can share it), a tensor wrapped, None as None."""
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value)


# -- the family --------------------------------------------------------------------------------------------------------

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "hard": torch.ones_like,
    "softmax": lambda scores: scores.softmax(-1),
    "score": lambda scores: scores,
}
"""Gate weights from the k chosen scores: all one, a softmax over the k, or the score itself."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "square": torch.square,
    "cube": lambda z: z**3,
}


class RankOneDictionary(nn.Module):
    """y(x) = b_out + shared(x) + Σ_{j ∈ TopK_k(s(x) + c)} g_j(x) · a(e_j·(x − b_in) + β_j) · d_j.

    Args:
        encoder: the e_j with biases β_j, n·expert_rank rows of width d_in.
        decoder: the d_j, n·expert_rank rows of width d_out. The same object as `encoder` ties d = e.
        k: how many router rows are chosen per input.
        router: its scores s choose. None (or the encoder itself): the pre-activations choose.
        gate: a name in `GATES`, applied to the k chosen scores.
        activation: a name in `ACTIVATIONS`.
        b_in, b_out: [d_in], [d_out]; the same parameter may serve as both (an SAE's b_dec).
        shared: a network that sees every input.
        selection_bias: whether to keep a buffer c [n] that is added when choosing and not when weighing.
        expert_rank: r atoms per router row, chosen together.
        unit_norm: whether training keeps the decoder's rows at length 1.
    """

    def __init__(
        self,
        encoder: Rows,
        decoder: Rows,
        *,
        k: int,
        router: Rows | None = None,
        gate: str = "hard",
        activation: str = "relu",
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
        shared: nn.Module | None = None,
        selection_bias: bool = False,
        expert_rank: int = 1,
        unit_norm: bool = False,
    ):
        super().__init__()
        _one_of("gate", gate, GATES)
        _one_of("activation", activation, ACTIVATIONS)
        self.encoder, self.decoder = encoder, decoder
        self.router = encoder if router is None else router
        self.n_features, self.n_atoms = len(self.router), len(encoder)
        _check_k(k, self.n_features)
        if not self.n_atoms == len(decoder) == self.n_features * expert_rank:
            raise ValueError(
                f"encoder has {len(encoder)} rows and decoder {len(decoder)}; allowed: "
                f"{self.n_features * expert_rank} = router rows ({self.n_features}) × expert_rank ({expert_rank})"
            )
        if self.router.width != encoder.width:
            raise ValueError(f"router reads {self.router.width} numbers; allowed: {encoder.width}, as the encoder does")
        self.k, self.gate, self.activation = k, gate, activation
        self.expert_rank, self.unit_norm = expert_rank, unit_norm
        self.b_in, self.b_out, self.shared = _parameter(b_in), _parameter(b_out), shared
        self.register_buffer("selection_bias", encoder.weight.new_zeros(self.n_features) if selection_bias else None)

    @property
    def d_in(self) -> int:
        return self.encoder.width

    @property
    def d_out(self) -> int:
        return self.decoder.width

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return self.trace(x).output

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Chosen atoms and their values g·a(z)."""
        return self._encode(x, score_gradient=False)[0]

    def decode(self, codes: SparseCodes) -> Float[Tensor, "batch d_out"]:
        """b_out + Σ values · d_j, without the shared part, which needs the input."""
        if not self.k:
            output = codes.values.new_zeros(len(codes.values), self.d_out)
        else:
            output = self.decoder.combine(codes.values, codes.indices)
        return output if self.b_out is None else output + self.b_out

    def trace(self, x: Float[Tensor, "batch d_in"], *, score_gradient: bool = False) -> Trace:
        """A forward pass with its codes and scores.

        With `score_gradient` the dense scores carry a gradient, as losses on all of them need (Switch balancing);
        without, the backward pass touches only the k chosen rows of each sample.
        """
        codes, scores = self._encode(x, score_gradient)
        output = self.decode(codes)
        return Trace(output if self.shared is None else output + self.shared(x), codes, scores)

    def _encode(self, x: Tensor, score_gradient: bool) -> tuple[SparseCodes, Tensor]:
        if not self.k:  # a dense network, all of it shared: nothing to choose from
            nothing = x[:, :0]
            return SparseCodes(nothing.long(), nothing), nothing
        x = x if self.b_in is None else x - self.b_in
        with torch.set_grad_enabled(score_gradient and torch.is_grad_enabled()):
            scores = self.router.scores(x)
        ranking = scores.detach() if self.selection_bias is None else scores.detach() + self.selection_bias
        experts = ranking.topk(self.k, dim=1).indices
        chosen = scores.gather(1, experts)
        if not score_gradient and (self.gate != "hard" or self.router is self.encoder):
            chosen = self.router.chosen(x, experts, known=chosen)
        atoms = self._atoms_of(experts)
        pre_acts = chosen if self.router is self.encoder else self.encoder.chosen(x, atoms)
        gates = GATES[self.gate](chosen).repeat_interleave(self.expert_rank, dim=1)
        return SparseCodes(atoms, gates * ACTIVATIONS[self.activation](pre_acts)), scores

    def _atoms_of(self, experts: Tensor) -> Tensor:
        if self.expert_rank == 1:
            return experts
        inside = torch.arange(self.expert_rank, device=experts.device)
        return (experts[:, :, None] * self.expert_rank + inside).flatten(1)

    @property
    def active_neurons(self) -> int:
        """Neurons that work on one input: those of the shared network and the k·expert_rank chosen ones."""
        return self.k * self.expert_rank + sum(layer.out_features for layer in self._shared_layers()[:-1])

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one input: scoring all routers, the chosen atoms' two products, the shared network.

        A tied router's chosen scores are the atoms' pre-activations, so they are counted once. Choosing the k largest
        and everything elementwise is left out.
        """
        chosen, router = self.k * self.expert_rank, self.router
        scores = router.weight.numel() + (0 if router.down is None else router.down.numel())
        encode = 0 if self.router is self.encoder else chosen * self.encoder.weight.shape[1]
        if self.router is not self.encoder and self.encoder.down is not None:
            encode += self.encoder.down.numel()
        shared = sum(layer.weight.numel() for layer in self._shared_layers())
        return scores + encode + chosen * self.decoder.weight.shape[1] + shared

    @property
    def n_parameters(self) -> int:
        """All numbers that training moves; a parameter with two roles counts once."""
        packed = {rows.weight: rows for rows in self.modules() if isinstance(rows, Packed)}
        return sum(packed[p].n_values if p in packed else p.numel() for p in self.parameters())

    def _shared_layers(self) -> list[nn.Linear]:
        return [] if self.shared is None else [layer for layer in self.shared.modules() if isinstance(layer, nn.Linear)]

    def constrain_gradient_(self) -> None:
        """Before an optimiser step: what the constraint of `constrain_` makes of the gradient."""
        if self.unit_norm:
            self.decoder.project_gradient_()

    def constrain_(self) -> None:
        """After an optimiser step: unit-norm decoder rows, if the model has them."""
        if self.unit_norm:
            self.decoder.normalise_()

    @property
    def knobs(self) -> dict[str, object]:
        """The model's place in the family, for tables and for cache keys."""
        router = "tied" if self.router is self.encoder else "dense" if self.router.down is None else "low-rank"
        if self.router is not self.encoder and self.router.weight is self.encoder.weight:
            router = "shared parameters"
        return {
            "router": router,
            "gate": self.gate,
            "activation": self.activation,
            "atoms": self._atoms,
            "shared": self.shared is not None,
            "selection_bias": self.selection_bias is not None,
            "expert_rank": self.expert_rank,
            "unit_norm": self.unit_norm,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n_features": self.n_features,
            "k": self.k,
        }

    @property
    def _atoms(self) -> str:
        tied = "tied" if self.decoder is self.encoder else "dense"
        return f"{tied}, {self.decoder.weight.shape[1]} numbers" if isinstance(self.decoder, Packed) else tied

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.knobs.items())


def _one_of(name: str, given: str, allowed) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is unknown; allowed: {', '.join(map(repr, allowed))}")


def _check_k(k: int, n: int) -> None:
    if not min(1, n) <= k <= n:
        raise ValueError(f"k={k} cannot be chosen; allowed: 1 to n_features={n}")


# -- named constructors ------------------------------------------------------------------------------------------------


def topk_sae(
    d_model: int,
    n_features: int,
    k: int,
    *,
    generator: torch.Generator,
    b_dec: Float[Tensor, " d_model"] | None = None,
    tied: bool = False,
    activation: str = "relu",
    selection_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """A TopK SAE with unit-norm decoder (Makhzani & Frey 2013; Gao et al. 2024).

    y = b_dec + Σ_{j ∈ TopK} ReLU(e_j·(x − b_dec) + β_j) d_j. It starts with random unit atoms and e_j = d_j.

    Args:
        b_dec: where the decoder's bias starts, best the mean of the data; zero if None.
        tied: keep e_j = d_j during training.
        selection_bias: whether choosing is by score plus a bias, as loss-free balancing needs.
    """
    _check_k(k, n_features)
    device = generator.device
    atoms = torch.randn(n_features, d_model, generator=generator, device=device, dtype=dtype)
    atoms = F.normalize(atoms, dim=1)
    encoder = Rows(atoms.clone(), torch.zeros(n_features, device=device, dtype=dtype))
    start = torch.zeros(d_model, device=device, dtype=dtype) if b_dec is None else b_dec.to(device, dtype).clone()
    bias = nn.Parameter(start)
    decoder = encoder if tied else Rows(atoms)
    options = {"activation": activation, "selection_bias": selection_bias, "unit_norm": True}
    return RankOneDictionary(encoder, decoder, k=k, b_in=bias, b_out=bias, **options)


def expander_sae(
    rows: Int[Tensor, "n q"],
    d_model: int,
    k: int,
    *,
    generator: torch.Generator,
    b_dec: Float[Tensor, " d_model"] | None = None,
    activation: str = "identity",
    degrees: Int[Tensor, " n"] | None = None,
    selection_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """The expander SAE of paper B: tied atoms of unit length with numbers at `rows` only, and a signed TopK.

    y = b_dec + Σ_{j ∈ TopK} (d_j·(x − b_dec) + β_j) d_j, with q·n + n + d_model parameters. It starts with random
    unit atoms.

    Args:
        rows: the mask: where atom j has its q numbers (`helpers.expander` makes them).
        b_dec: where the decoder's bias starts, best the mean of the data; zero if None.
        activation: "identity" keeps a chosen score of either sign.
        degrees: how many of its q places each atom uses, the first ones; all if None.
        selection_bias: whether choosing is by score plus a bias, as loss-free balancing needs.
    """
    _check_k(k, len(rows))
    device = generator.device
    values = torch.randn(rows.shape, generator=generator, device=device, dtype=dtype)
    bias = torch.zeros(len(rows), device=device, dtype=dtype)
    atoms = Packed(values, rows.to(device), d_model, bias, None if degrees is None else degrees.to(device))
    atoms.normalise_()
    bias = nn.Parameter(
        torch.zeros(d_model, device=device, dtype=dtype) if b_dec is None else b_dec.to(device, dtype).clone()
    )
    options = {"activation": activation, "selection_bias": selection_bias, "unit_norm": True}
    return RankOneDictionary(atoms, atoms, k=k, b_in=bias, b_out=bias, **options)


def rank1_moe(d_model: int, n_experts: int, k: int, *, generator: torch.Generator, **options) -> RankOneDictionary:
    """A mixture of rank-1 experts E_j = d_j e_jᵀ whose router rows are the e_j themselves (paper A).

    The router's and the experts' parameters are the same tensors, but the router scores all n and the chosen experts
    then compute e_j·x for themselves. `options` as for `topk_sae`.
    """
    return sae_to_moe(topk_sae(d_model, n_experts, k, generator=generator, **options))


def sae_to_moe(sae: RankOneDictionary) -> RankOneDictionary:
    """The rank-1 MoE with the parameters of a tied-router dictionary (a copy; the original is untouched)."""
    if sae.router is not sae.encoder:
        raise ValueError(f"router={sae.knobs['router']!r} is not an SAE's; allowed: 'tied'")
    if sae.expert_rank != 1:
        raise ValueError(f"expert_rank={sae.expert_rank} has no rank-1 experts; allowed: 1")
    moe = copy.deepcopy(sae)
    moe.router = moe.encoder.twin()
    return moe


def moe_to_sae(moe: RankOneDictionary) -> RankOneDictionary:
    """The inverse of `sae_to_moe`; only a mixture whose router shares the experts' parameters has one."""
    if moe.router.weight is not moe.encoder.weight or moe.router.bias is not moe.encoder.bias:
        raise ValueError(f"router={moe.knobs['router']!r} has rows of its own; allowed: 'shared parameters'")
    sae = copy.deepcopy(moe)
    sae.router = sae.encoder
    return sae


def secret_moe(
    d_in: int,
    d_out: int,
    n_experts: int,
    k: int,
    *,
    generator: torch.Generator,
    router_rank: int | None = None,
    shared_neurons: int | None = None,
    selection_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """The student of paper C: a small shared MLP beside single-neuron GELU experts under a softmax over the k chosen.

    Args:
        router_rank: rank of the router U(Vx); None for a full one.
        shared_neurons: width of the shared MLP; `k` if None, 0 for no shared part.
        selection_bias: whether choosing is by score plus a bias, as loss-free balancing needs.
    """
    _check_k(k, n_experts)
    noise = {"generator": generator, "dtype": dtype}
    width = k if shared_neurons is None else shared_neurons
    full = router_rank is None
    router = Rows(
        _uniform(n_experts, d_in if full else router_rank, **noise),
        down=None if full else _uniform(router_rank, d_in, **noise),
    )
    encoder = Rows(_uniform(n_experts, d_in, **noise), _uniform(n_experts, 1, fan_in=d_in, **noise)[:, 0])
    decoder = Rows(_uniform(n_experts, d_out, fan_in=k, **noise))
    shared = _mlp(d_in, width, d_out, **noise) if width else None
    b_out = None if shared is not None else torch.zeros(d_out, device=generator.device, dtype=dtype)
    return RankOneDictionary(
        encoder,
        decoder,
        k=k,
        router=router,
        gate="softmax",
        activation="gelu",
        b_out=b_out,
        shared=shared,
        selection_bias=selection_bias,
    )


def dense_mlp(
    d_in: int, d_out: int, width: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> RankOneDictionary:
    """The dense student of paper C, a GELU MLP with `width` neurons: the family's member without atoms."""
    if width < 1:
        raise ValueError(f"width={width} is no network; allowed: at least 1")
    none = {"device": generator.device, "dtype": dtype}
    rows = Rows(torch.empty(0, d_in, **none)), Rows(torch.empty(0, d_out, **none))
    return RankOneDictionary(*rows, k=0, shared=_mlp(d_in, width, d_out, generator=generator, dtype=dtype))


def _uniform(rows: int, columns: int, *, generator: torch.Generator, dtype: torch.dtype, fan_in: int = 0) -> Tensor:
    """Uniform on ±fan_in^−½ (`columns` if not given), PyTorch's start of a linear layer."""
    noise = torch.rand(rows, columns, generator=generator, device=generator.device, dtype=dtype)
    return (2 * noise - 1) * (fan_in or columns) ** -0.5


def _mlp(d_in: int, width: int, d_out: int, **noise) -> nn.Sequential:
    layers = [nn.utils.skip_init(nn.Linear, *sizes, dtype=noise["dtype"]) for sizes in ((d_in, width), (width, d_out))]
    for layer in layers:
        rows, columns = layer.weight.shape
        layer.weight.data = _uniform(rows, columns, **noise)
        layer.bias.data = _uniform(rows, 1, fan_in=columns, **noise)[:, 0]
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


# -- exchange with SAELens ---------------------------------------------------------------------------------------------


def save_saelens(sae: RankOneDictionary, folder: str | Path, metadata: dict[str, object] | None = None) -> Path:
    """Write a TopK SAE as SAELens does (`cfg.json`, `sae_weights.safetensors`), so that `SAE.load_from_disk` reads it.

    The files are written aside and moved into place, so a killed process leaves no half checkpoint. Raises `ValueError`
    for a model that SAELens' TopK SAE cannot express.
    """
    plain = {"router": "tied", "gate": "hard", "activation": "relu", "shared": False, "selection_bias": False}
    for name, allowed in {**plain, "expert_rank": 1}.items():
        if sae.knobs[name] != allowed:
            raise ValueError(f"{name}={sae.knobs[name]!r} is not an SAELens TopK SAE's; allowed: {allowed!r}")
    if sae.b_out is None or (sae.b_in is not None and sae.b_in is not sae.b_out) or sae.encoder.down is not None:
        raise ValueError(
            "b_in differs from b_out, or a low-rank encoder; allowed: b_in = b_out or none, a full encoder"
        )
    tensors = {
        "W_enc": sae.encoder.vectors().T,
        "b_enc": sae.encoder.bias if sae.encoder.bias is not None else sae.decoder.weight.new_zeros(sae.n_features),
        "W_dec": sae.decoder.vectors(),
        "b_dec": sae.b_out,
    }
    config = {
        "architecture": "topk",
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "k": sae.k,
        "dtype": str(sae.decoder.weight.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.b_in is not None,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": metadata or {},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, Path(aside, "weights"))
        Path(aside, "cfg").write_text(json.dumps(config, indent=1))
        os.replace(Path(aside, "weights"), folder / "sae_weights.safetensors")
        os.replace(Path(aside, "cfg"), folder / "cfg.json")
    return folder


def load_saelens(folder: str | Path) -> RankOneDictionary:
    """Read a TopK SAE that SAELens or `save_saelens` wrote.

    `rescale_acts_by_decoder_norm` is folded into the weights, exactly: choosing by ‖d_j‖z_j and dividing again when
    decoding is a unit-norm decoder behind an encoder whose rows are longer by ‖d_j‖.
    """
    folder = Path(folder)
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"folder={str(folder)!r} has no {name}; allowed: a folder written by SAELens")
    config = json.loads((folder / "cfg.json").read_text())
    allowed = {
        "architecture": ("topk",),
        "normalize_activations": ("none", None),
        "reshape_activations": ("none", None),
    }
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{name}={config.get(name)!r} in {folder / 'cfg.json'} is not read; allowed: {values[0]!r}"
            )
    tensors = load_file(folder / "sae_weights.safetensors")
    w_enc, b_enc, w_dec = tensors["W_enc"].T.contiguous(), tensors["b_enc"], tensors["W_dec"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms[:, None], b_enc * norms, w_dec / norms[:, None]
    b_dec = nn.Parameter(tensors["b_dec"])
    b_in = b_dec if config.get("apply_b_dec_to_input", True) else None
    unit = bool(torch.allclose(w_dec.norm(dim=1), w_dec.new_ones(len(w_dec)), atol=1e-3))
    return RankOneDictionary(Rows(w_enc, b_enc), Rows(w_dec), k=config["k"], b_in=b_in, b_out=b_dec, unit_norm=unit)


# -- packed files ------------------------------------------------------------------------------------------------------


def save_packed(sae: RankOneDictionary, path: str | Path) -> Path:
    """Write an expander SAE as one safetensors file: values, row numbers, biases; k and the activation in its header.

    Written aside and moved into place. Raises `ValueError` for a model that `expander_sae` does not make.
    """
    atoms = sae.encoder
    plain = sae.router is sae.decoder is atoms and sae.gate == "hard" and sae.shared is None and sae.b_in is sae.b_out
    if not isinstance(atoms, Packed) or not plain or sae.b_in is None or atoms.bias is None:
        raise ValueError(f"{sae.knobs} is no expander SAE; allowed: what expander_sae makes")
    tensors = {"values": atoms.weight, "rows": atoms.rows, "b_enc": atoms.bias, "b_dec": sae.b_out}
    tensors |= {"degrees": atoms.degrees, "selection_bias": sae.selection_bias}
    if atoms.degrees is not None:  # the numbers in use, one atom after another
        used = ~atoms._unused()
        tensors |= {"values": atoms.weight[used], "rows": atoms.rows[used]}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
        save_file(kept, Path(aside, "packed"), {"k": str(sae.k), "activation": sae.activation})
        os.replace(Path(aside, "packed"), path)
    return path


def load_packed(path: str | Path) -> RankOneDictionary:
    """Read what `save_packed` wrote. Raises `ValueError` naming a file that is missing, damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path={str(path)!r} cannot be read ({error}); allowed: a file of save_packed") from error
    if not {"k", "activation"} <= set(about) or not {"values", "rows", "b_enc", "b_dec"} <= set(tensors):
        raise ValueError(f"path={str(path)!r} holds {sorted(tensors)}; allowed: a file of save_packed")
    values, rows, degrees = tensors["values"], tensors["rows"], tensors.get("degrees")
    if degrees is not None:
        values, rows = _padded(values, rows, degrees, len(tensors["b_dec"]))
    atoms = Packed(values, rows, len(tensors["b_dec"]), tensors["b_enc"], degrees)
    bias, chosen_by = nn.Parameter(tensors["b_dec"]), tensors.get("selection_bias")
    options = {"activation": about["activation"], "selection_bias": chosen_by is not None, "unit_norm": True}
    sae = RankOneDictionary(atoms, atoms, k=int(about["k"]), b_in=bias, b_out=bias, **options)
    if chosen_by is not None:
        sae.selection_bias.copy_(chosen_by)
    return sae


def _padded(values: Tensor, rows: Tensor, degrees: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Flat numbers and places as [n, q]; behind an atom's own stand places that it does not use."""
    q = int(degrees.max())
    used = torch.arange(q) < degrees[:, None]
    full, places = values.new_zeros(used.shape), rows.new_zeros(used.shape)
    full[used], places[used] = values, rows
    for own, free in zip(places, used, strict=True):
        taken = torch.zeros(width, dtype=torch.bool)
        taken[own[free].long()] = True
        own[~free] = (~taken).nonzero()[: int((~free).sum()), 0].to(own.dtype)
    return full, places
