"""Screen in few bits, certify, re-score exactly: which products of a sample with n rows are the largest.

All n products are computed in 8 bits or in bfloat16. Each is within E of the float32 one, so that none of the largest
seems much smaller than those that seem the largest: what does not is a candidate, and float32 products of the few
candidates decide. The choice is that of the float32 products to the last bit, for a half or a quarter of their cost.

**The bound.** Of a sample x and a row w let x̃ and w̃ be the rounded ones, s̃ what the product returns. Rounding to
bfloat16 moves a number by u = 2⁻⁸ of it at most, to float32 by v = 2⁻²⁴. Whatever the order of summation,

    |x̃·w̃ − x·w|  ≤  ‖x̃ − x‖ ‖w̃‖ + ‖x‖ ‖w̃ − w‖             (inputs are rounded; both differences are computed)
    |fl(x̃·w̃) − x̃·w̃|  ≤  γ ‖x̃‖ ‖w̃‖,  γ = 2mv/(1 − 2mv)       (float32 sums of m exact products; none for integers)
    |s̃ − fl(x̃·w̃)|  ≤  u |s̃|                                 (the result is rounded; not for integers)

This is Cauchy and Schwarz, and Higham (2002), section 3.1, whose γ is half of that. As much may lie between x·w and a
float32 product in another order. E is the first line and 3γ‖x‖‖w‖; 2⁻¹⁰ of it more cover the rounding of norms and
thresholds, and m·2⁻¹⁰⁰ what the processor takes for zero (numbers below 2⁻¹²⁶).

**Why thresholds suffice.** Let L be what k of a sample's float32 products are known to reach. Each of its k largest has
L too, so s̃ + u|s̃| + E ≥ L, and s ↦ s + u|s| grows with s. Such an L is, for k = 1, the product of the row that seems
the largest.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers.dictionary.rows import gather_dots, row_products

UNIT = {torch.int8: 0.0, torch.bfloat16: 2.0**-8}
"""The forms in which rows are screened, and what rounding a result does to it, relatively."""

LOOSE = 0.5
"""8 bits are taken where E is at most so many times ‖x‖‖w‖/√m, what the products of random vectors are like: more would
find candidates by the hundred."""

CROWD = 64
"""Candidates a sample, on average, beyond which a finer form is the better way."""

BLOCKS, WIDTH = 64, 16
"""Scores are looked through a block at a time: so many blocks at least, of so many scores at most."""


def forms(weight: Tensor, batch: int) -> list[torch.dtype]:
    """In what products may be screened here, the fastest first: only in what the processor multiplies itself, and
    nothing where products are too few to be worth it."""
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    worth = len(weight) >= 512 and batch * weight.numel() >= 2**24 and weight.shape[1] <= 2**16
    if not plain or not worth or not torch.backends.mkldnn.is_available():
        return []
    asked = {torch.int8: "_is_vnni_supported", torch.bfloat16: "_is_avx512_bf16_supported"}
    here = [form for form, name in asked.items() if getattr(torch.cpu, name, bool)()]
    return here if hasattr(torch, "_int_mm") else [form for form in here if form != torch.int8]


def screen(x: Float[Tensor, "batch m"], weight: Float[Tensor, "n m"]) -> Screen | None:
    """For the products of such samples with these rows; None where float32 is the better way."""
    for form in forms(weight, len(x)):
        few = Screen(weight[:: len(weight) // 256], form)
        share = few.error(x, few.rounded(x)).median(1).values / x.norm(dim=1) / few.longest.amax()
        if form != torch.int8 or share.nanmedian() * x.shape[1] ** 0.5 <= LOOSE:
            return Screen(weight, form)
    return None


def bound(x: Float[Tensor, "batch m"], off: Tensor, longest: Tensor, row_off: Tensor) -> Float[Tensor, "batch some"]:
    """E of each sample, that far `off` from its rounded form, and each group of rows, no longer nor further off."""
    length, m = x.norm(dim=1), x.shape[1]
    sums = 2 * m * 2.0**-24
    often = off + 3 * sums / (1 - sums) * (length + off)
    error = torch.stack([often, length], dim=1) @ torch.stack([longest, row_off])
    return error.mul_(1 + 2.0**-10).add_(m * 2.0**-100)


class Screen:
    """Rows in few bits, and how far their products may be off.

    The score of the p-th row of block b is in column p·blocks + b. In 8 bits the rows of a block have their largest
    numbers alike, and one step for all.
    """

    def __init__(self, weight: Float[Tensor, "n m"], form: torch.dtype):
        self.weight, self.form, self.unit, self.crowded = weight, form, UNIT[form], False
        n, self.width = len(weight), WIDTH
        while self.width > 1 and (n % self.width or n < self.width * BLOCKS):
            self.width //= 2
        width, length = self.width, weight.norm(dim=1)
        if form == torch.int8:
            size = weight.abs().amax(1)
            order = size.argsort()
            self.row = order.view(-1, width).T.reshape(-1)
            step = size[order].view(-1, width)[:, -1] / 127
            self.step = torch.where(step > 0, step, 1)
            near = weight[self.row] / self.step.repeat(width)[:, None]
            bits = near.round().to(form)
            off = (near.sub_(bits).norm(dim=1) * self.step.repeat(width)).view(width, -1).amax(0)
        else:
            self.row, self.step, bits = torch.arange(n), weight.new_ones(n // width), weight.to(form)
            off = (weight - bits).norm(dim=1).amax(0, keepdim=True)
        self.bits, self.off, self.column = bits, off, self.row.argsort()
        self.longest = off + (length[self.row].view(width, -1).amax(0) if form == torch.int8 else length.amax())

    def rounded(self, x: Float[Tensor, "batch m"]) -> tuple[Tensor, Tensor, Tensor]:
        """Samples as they are multiplied, their steps, and how far they are from the samples themselves."""
        if self.form != torch.int8:
            bits = x.to(self.form)
            return bits, x.new_ones(len(x)), (x - bits).norm(dim=1)
        step = x.abs().amax(1).clamp_min(1e-30) / 127
        near = x / step[:, None]
        bits = near.round()
        return bits.to(self.form), step, near.sub_(bits).norm(dim=1) * step

    def error(self, x: Float[Tensor, "batch m"], rounded) -> Float[Tensor, "batch blocks"]:
        """E of each sample and each block."""
        return bound(x, rounded[2], self.longest, self.off)

    def largest(
        self, x: Float[Tensor, "batch m"], *, magnitude: bool, without: Int[Tensor, "batch c"], least: Tensor
    ) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Each sample's largest float32 product and the first row that has it; −∞ and n where none is above `least`.

        Args:
            magnitude: of absolute values.
            without: rows that a sample shall not have.
            least: [batch], ≥ 0.
        """
        rounded = self.rounded(x)
        scores = self._scores(rounded[0])
        if magnitude:
            scores.abs_()
        at = torch.arange(len(x))
        scores[at[:, None], self.column[without]] = -(2**31) if scores.dtype == torch.int32 else -torch.inf
        inside = scores.unflatten(1, (-1, len(self.step)))
        tops = inside.amax(1)
        block = (tops * self.step).max(1).indices
        first = self.row[inside[at, :, block].max(1).indices * len(self.step) + block]
        known = (x * self.weight[first]).sum(1)
        known = known.abs_() if magnitude else known
        sample, row = self._above(inside, tops, torch.maximum(known, least)[:, None] - self.error(x, rounded), rounded)
        found = self.products(x, sample, row)
        found = found.abs_() if magnitude else found
        best = x.new_full((len(x),), -torch.inf).scatter_reduce_(0, sample, found, "amax")
        best = torch.where(best > least, best, -torch.inf)
        wins = found == best[sample]
        return best, torch.full_like(at, len(self.weight)).scatter_reduce_(0, sample[wins], row[wins], "amin")

    def _scores(self, bits: Tensor) -> Tensor:
        return torch._int_mm(bits, self.bits.T) if self.form == torch.int8 else bits @ self.bits.T

    def _above(self, inside: Tensor, tops: Tensor, lowest: Tensor, rounded) -> tuple[Tensor, Tensor]:
        """Samples and rows, in pairs ordered by sample, that may have float32 products of `lowest` + E or more."""
        lowest = lowest - 1.01 * self.unit * lowest.abs() if self.unit else lowest / rounded[1][:, None] / self.step
        lowest.clamp_min_(-(2.0**30))  # what a sample shall not have lies below
        sample, block = (tops >= lowest).nonzero(as_tuple=True)
        pair, place = (inside[sample, :, block] >= lowest.expand_as(tops)[sample, block][:, None]).nonzero(
            as_tuple=True
        )
        self.crowded = len(pair) > CROWD * len(tops)
        return sample[pair], self.row[place * len(self.step) + block[pair]]

    def finer(self) -> Screen | None:
        """What to screen in next: the same, or where candidates were too many a finer form, or nothing."""
        if not self.crowded:
            return self
        here = forms(self.weight, 2**24)
        return Screen(self.weight, torch.bfloat16) if self.form == torch.int8 and torch.bfloat16 in here else None

    def products(self, x: Float[Tensor, "batch m"], sample: Tensor, row: Tensor) -> Float[Tensor, " found"]:
        """In float32, of pairs ordered by sample; each is a sum in one order, whatever stands beside it."""
        ends = torch.bincount(sample, minlength=len(x)).cumsum(0)
        return row_products(x, self.weight, F.pad(ends, (1, 0)), row)


class Halved:
    """Rows that change in bfloat16 beside them, and the k largest scores (products and bias) of samples with them.

    The `ROOM`·k scores that seem the largest are computed in float32. Where the k-th of these is above whatever the
    next one may be, nothing else can be among the k largest; the samples where it is not, and those with equal scores
    in the last place, get float32 products with all rows (`fallen` counts them, of `seen`), and of equal ones the
    first. A bias is rounded too, and the result once more behind it, which adds u|β| and u(|s̃| + |β|) to E.
    """

    ROOM, BLOCK, MOST = 2, 512, 1 / 16

    def __init__(self):
        self.half, self.seen, self.fallen = None, 0, 0

    def take(self, weight: Float[Tensor, "n m"]) -> tuple[Tensor, Tensor]:
        """Convert the rows, a block at a time so that it stays in the processor's cache; their E needs these two."""
        if self.half is None:
            self.half = torch.empty_like(weight, dtype=torch.bfloat16)
        longest, off = [], []
        for rows, half in zip(weight.split(self.BLOCK), self.half.split(self.BLOCK), strict=True):
            half.copy_(rows)
            longest.append(rows.norm(dim=1).amax())
            off.append((rows - half).norm(dim=1).amax())
        off = torch.stack(off).amax(0, keepdim=True)
        return torch.stack(longest).amax(0, keepdim=True) + off, off

    @torch.no_grad()
    def top(
        self, x: Float[Tensor, "batch m"], weight: Float[Tensor, "n m"], bias: Float[Tensor, " n"], k: int
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]] | None:
        """Scores and rows; None where float32 is the better way, since too few samples can be certified."""
        room, n, near, unit = self.ROOM * k, len(weight), x.to(torch.bfloat16), UNIT[torch.bfloat16]
        error = bound(x, (x - near).norm(dim=1), *self.take(weight))[:, 0] + 2.1 * unit * bias.abs().amax()
        scores = F.linear(near, self.half, bias.to(near.dtype))
        width = max(width for width in (16, 8, 4, 2, 1) if n % width == 0 and (n >= width * 4 * room or width == 1))
        inside = scores.unflatten(1, (width, -1))
        block = inside.amax(1).topk(room, dim=1, sorted=False).indices
        seem = inside.gather(2, block[:, None].expand(-1, width, -1)).flatten(1).topk(room, dim=1, sorted=False)
        row = seem.indices.div(room, rounding_mode="floor") * (n // width) + block.gather(1, seem.indices % room)
        best = (gather_dots(x, weight, row) + bias[row]).topk(k + 1, dim=1)
        next_one = seem.values.amin(1).float()
        below = next_one + 2.03 * unit * next_one.abs() + error
        unsure = (below >= best.values[:, k - 1]) | (best.values[:, k - 1] == best.values[:, k])
        values, rows = best.values[:, :k], row.gather(1, best.indices[:, :k])
        self.seen, self.fallen = self.seen + len(x), self.fallen + int(unsure.sum())
        if unsure.float().mean() > self.MOST:
            return None
        if unsure.any():
            every = torch.arange(n).expand(int(unsure.sum()), n)
            score, order = (gather_dots(x[unsure], weight, every) + bias).sort(dim=1, descending=True, stable=True)
            values[unsure], rows[unsure] = score[:, :k], order[:, :k]
        return values, rows
