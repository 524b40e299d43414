"""Codes, the two primitives that every model is made of, and rows of vectors: a router, an encoder, a decoder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# The products of chosen rows are one `sampled_addmm`, whose CSR argument still warns that it is young.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

GATHER_BYTES = 64 * 2**20
"""Largest temporary that the portable path of `gather_dots`, and each product of chosen packed rows, may build."""


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
    but the gradient is still the sparse one. Raises `ValueError` for an index outside 0 … n − 1 on a CPU, where nothing
    else would notice one.
    """
    check_indices(indices, len(weight))
    known = known if known is None else known.to(weight.dtype)  # under autocast a dense pass is half precision
    return _GatherDots.apply(x.to(weight.dtype), weight, indices, known)


def check_indices(indices: Tensor, n: int) -> None:
    """`ValueError` for an index outside 0 … n − 1 on a CPU, where a negative one would count from the end."""
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(indices)
        if low < 0 or high >= n:
            raise ValueError(f"indices run from {int(low)} to {int(high)}; allowed: 0 to {n - 1}")


def power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is no larger than each size, 1 for 0: to divide by it rounds nothing."""
    return torch.where(size > 0, size / (2 * torch.frexp(size).mantissa), 1.0)


def unit(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Vectors at length 1, however short or long they are; zeros stay zeros."""
    return F.normalize(vectors / power_of_two(vectors.abs().amax(1, keepdim=True)), dim=1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; on a CPU, where no gradient is wanted, by oneDNN, whose float32 product is the faster one on AMD."""
    plain = torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != x.dtype
    # autocast and the compiler do not know this product
    plain = plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if plain or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _sum_rows(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    if (live := _live(values)) is None:
        return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
    starts = F.pad(live.sum(1).cumsum(0)[:-1], (1, 0))
    return F.embedding_bag(indices[live], weight, starts, per_sample_weights=values[live], mode="sum")


def _live(values: Tensor) -> Tensor | None:
    """Where values are not zero; None unless most are zero, on a CPU. Rules that give inputs different numbers of codes
    pad them, and what is padded adds nothing."""
    if values.device.type != "cpu" or values.ndim != 2 or torch.compiler.is_compiling():
        return None
    live = values != 0
    return live if 2 * int(live.sum()) < live.numel() else None


def row_products(x: Tensor, weight: Tensor, starts: Tensor, row: Tensor) -> Tensor:
    """x_b · weight[j] for the rows j = `row`[starts[b] : starts[b + 1]] of each sample b, on a CPU."""
    pattern = torch.sparse_csr_tensor(
        starts,
        row,
        x.new_zeros(len(row)),
        (len(x), len(weight)),
        check_invariants=False,  # the rows need not be sorted here, and checking costs more than the product
    )
    return torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0.0).values()


def _dots(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    batch, k = indices.shape
    sampled = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and batch and k
    if sampled and not torch.compiler.is_compiling():  # which breaks its graph at a sparse tensor
        return row_products(x, weight, torch.arange(0, batch * k + 1, k), indices.reshape(-1)).view(batch, k)
    rows = max(1, GATHER_BYTES // max(1, k * weight.shape[1] * weight.element_size()))
    parts = [
        torch.einsum("bkd,bd->bk", weight[i], part) for i, part in zip(indices.split(rows), x.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _sum_by_row(values: Tensor, indices: Tensor, inputs: Tensor, n: int) -> Tensor:
    """G_j = Σ_{(b,i): indices[b,i]=j} values[b,i] · inputs[b]: the gradient of both primitives for `weight`.

    Sorted by row, this is again a bag of weighted rows (of `inputs` this time), so no scatter and no [batch, n] matrix.
    """
    if (live := _live(values)) is None:
        order, starts = starts_by_row(indices, n)
        sources = order.div(indices.shape[1], rounding_mode="floor")
        return F.embedding_bag(sources, inputs, starts, per_sample_weights=values.reshape(-1)[order], mode="sum")
    order, starts = starts_by_row(indices[live], n)
    sources = live.nonzero()[:, 0][order]
    return F.embedding_bag(sources, inputs, starts, per_sample_weights=values[live][order], mode="sum")


def starts_by_row(indices: Tensor, n: int) -> tuple[Tensor, Tensor]:
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
    """What one forward pass computed. `scores` [batch, n] carry a gradient only if that was asked for; None where they
    were screened, and only the chosen ones are known."""

    output: Float[Tensor, "batch d_out"]
    codes: SparseCodes
    scores: Float[Tensor, "batch n"] | None


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
        self.weight = as_parameter(weight)
        self.bias = as_parameter(bias)
        self.down = as_parameter(down)

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def width(self) -> int:
        """Length of the vectors that the rows act on."""
        return (self.weight if self.down is None else self.down).shape[1]

    def scores(self, x: Float[Tensor, "batch d"], only: Int[Tensor, " n"] | None = None) -> Float[Tensor, "batch n"]:
        """w_j·x + bias_j for all rows, or for the same few (`only`) whatever the sample: one matrix product."""
        if only is None:
            return linear(self._project(x), self.weight, self.bias)
        return linear(self._project(x), self.weight[only], None if self.bias is None else self.bias[only])

    def chosen(
        self, x: Float[Tensor, "batch d"], indices: Int[Tensor, "batch k"], known: Tensor | None = None
    ) -> Float[Tensor, "batch k"]:
        """w_j·x + bias_j for the chosen rows only, with a gradient that touches only them.

        `known` are these numbers where `scores` has them already.
        """
        dots = self._products(x, indices, known)
        if self.bias is None:
            return dots
        bias = self.bias[indices]
        # `known` has the bias in it: add an exact zero that only carries the gradient
        return dots + (bias if known is None else bias - bias.detach())

    def _products(self, x: Tensor, indices: Tensor, known: Tensor | None) -> Tensor:
        return gather_dots(self._project(x), self.weight, indices, known)

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


class Scaled(Rows):
    """Rows in the directions of others (Gated SAEs): e^{r_j} w_j, with biases of their own.

    Args:
        rows: the w_j, whose parameter this object shares.
        log_scale: the r_j.
        bias: [n], added to the scores.
    """

    def __init__(self, rows: Rows, log_scale: Float[Tensor, " n"], bias: Float[Tensor, " n"]):
        super().__init__(rows.weight, bias)
        if rows.down is not None or log_scale.shape != bias.shape:
            raise ValueError("rows of low rank, or scales that are not one a row; allowed: full rows, one scale each")
        self.log_scale = as_parameter(log_scale)

    def scores(self, x: Float[Tensor, "batch d"], only: Int[Tensor, " n"] | None = None) -> Float[Tensor, "batch n"]:
        only = slice(None) if only is None else only
        return linear(x, self.weight[only], None) * self.log_scale[only].exp() + self.bias[only]

    def chosen(
        self, x: Float[Tensor, "batch d"], indices: Int[Tensor, "batch k"], known: Tensor | None = None
    ) -> Float[Tensor, "batch k"]:
        return gather_dots(x, self.weight, indices) * self.log_scale.exp()[indices] + self.bias[indices]

    def combine(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch d"]:
        return super().combine(values * self.log_scale.exp()[indices], indices)

    def vectors(self, only: Tensor | None = None) -> Float[Tensor, "n d"]:
        only = slice(None) if only is None else only
        return self.weight[only] * self.log_scale[only].exp()[:, None]

    def twin(self) -> Scaled:
        return Scaled(Rows(self.weight), self.log_scale, self.bias)


def as_parameter(value: Tensor | None) -> nn.Parameter | None:
    """A parameter as it is (so that two modules can share it), a tensor wrapped, None as None."""
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value)
