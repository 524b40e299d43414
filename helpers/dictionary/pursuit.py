"""Matching pursuit: find k atoms that rebuild a signal, one after another, and the coefficients that do it best.

    r ← x;  k times:  j ← argmax_j |d_j·r|,  S ← S ∪ {j},  r ← x − (its projection on the atoms in S)

The rows d_j of the dictionary are the atoms. Orthogonal matching pursuit (OMP: Pati et al. 1993; Tropp 2004) needs two
things at each step: all correlations d_j·r, and the residual without the new atom's direction. For packed atoms (d
numbers an atom) the first is a gather-and-reduce of cost O(dn), `correlations`; the second costs O(tm) at step t.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.dictionary import GATHER_SHARE, Packed, Rows, SparseCodes, packed_products, weighted_sum
from helpers.dictionary.rows import power_of_two

GATHER_COST, PRODUCT_COST, GRAM_COST, BASIS_COST = 57.0, 22.0, 84.0, 80.0
"""Picoseconds of a multiply-add, one core, float32: gathering packed atoms, a matrix product, summing chosen rows of
the Gram matrix, orthogonalising. Measured at m=512, n=4096; only their ratios are used, in `_gram_pays`."""

HANDING_OVER = 13
"""What a gathered correlation costs beside its d multiply-adds, in as many of them: it is written twice, transposed."""

GRAM_BYTES = 512 * 2**20
"""The Gram matrix of all atoms is built only if it is no larger than this (n ≤ 11,585 in float32)."""

GRAM_CHUNK, RESIDUAL_CHUNK, CUDA_CHUNK = 32, 256, 4096
"""Samples worked on at a time. With the Gram matrix few are best on a CPU: their k rows of it stay in cache."""

_SELECT = ("magnitude", "signed")


# -- correlations ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def correlations(
    x: Float[Tensor, "batch m"], atoms: Rows | Float[Tensor, "n d"], *, method: str | None = None
) -> Float[Tensor, "batch n"]:
    """d_j·x for all atoms, without their biases.

    `method` is "gather" (packed atoms only), O(dn) a sample, or "dense", a matrix product of O(mn) for which packed
    atoms are spread out to n·m numbers first; None takes the faster one, by `dictionary.GATHER_SHARE`:
    at m=512 and a batch of 256, float32, one core of an AMD EPYC, both took the same time at d/m = .47, .38 and .38 for
    n = 1024, 4096 and 16384; `benchmarks.pursuit` measures it anew.

    Raises `ValueError` for an unknown method, or atoms that cannot be gathered.
    """
    atoms = _Atoms(atoms)
    if method not in (None, "gather", "dense"):
        raise ValueError(f"method={method!r} is unknown; allowed: 'gather', 'dense', None")
    if method == "gather" and not atoms.packed:
        raise ValueError("method='gather' with dense atoms; allowed: packed atoms, or method='dense'")
    atoms.gathers = atoms.gathers if method is None else method == "gather"
    return atoms.correlate(_signals(x, atoms).to(atoms.weight.dtype))


class _Atoms:
    """What a pursuit asks of a dictionary, packed or not: correlations, single atoms, products of atoms."""

    def __init__(self, atoms: Rows | Tensor):
        if getattr(atoms, "down", None) is not None:
            raise ValueError("atoms are low-rank rows (down is given); allowed: rows whose weight is the atoms")
        self.weight = (atoms if isinstance(atoms, Tensor) else atoms.weight).detach()
        if self.weight.ndim != 2:
            raise ValueError(f"atoms have shape {list(self.weight.shape)}; allowed: [n, length]")
        self.packed = isinstance(atoms, Packed)
        self.rows = atoms.rows.long() if self.packed else None
        self.width = atoms.width if self.packed else self.weight.shape[1]
        self.gathers = self.packed and self.weight.shape[1] <= GATHER_SHARE * self.width
        self.dtype, self.longest = self.weight.dtype, self.weight.new_ones(())
        self.scale, self.ratio = self.weight.new_ones(len(self)), None
        self._dense = None if self.packed else self.weight

    def __len__(self) -> int:
        return len(self.weight)

    def scaled(self) -> _Atoms:
        """In float32 at least, each divided by a power of two, `scale`, unless lengths are alike and ordinary."""
        self.weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.weight.numel():
            lengths = self.weight.norm(dim=1)
            self.longest = top = lengths.amax()
            if not (1e-6 < top < 1e6 and lengths.amin() > top / 16):
                if not torch.isfinite(largest := self.weight.abs().amax(1)).all():
                    raise ValueError("atoms have entries that are infinite or not a number; allowed: finite ones")
                self.scale = power_of_two(largest).double()
                self.ratio = self.scale / self.scale[largest > 0].amax() if largest.any() else None
                self.weight = (self.weight / self.scale[:, None]).to(self.weight.dtype)
                self.longest = self.weight.norm(dim=1).amax()
        self._dense = None if self.packed else self.weight
        return self

    def weigh(self, score: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Scores with the atoms' own lengths, and what one must be above so that it is no rounding."""
        if self.ratio is None:
            return score, floor
        own = score * self.ratio
        return torch.where(score > floor[:, None], own, own.clamp_max(0)), torch.zeros_like(floor)

    @property
    def dense(self) -> Tensor:
        """[n, m]; packed atoms are spread out once, when first asked for."""
        if self._dense is None:
            self._dense = self.vectors(slice(None))
        return self._dense

    def vectors(self, which: Tensor | slice) -> Tensor:
        """[..., m]: some atoms at full length."""
        if self._dense is not None:
            return self._dense[which]
        values, rows = self.weight[which], self.rows[which]
        return values.new_zeros(*values.shape[:-1], self.width).scatter_(-1, rows, values)

    def correlate(self, x: Tensor) -> Tensor:
        return packed_products(x, self.weight, self.rows) if self.gathers else Rows(self.dense).scores(x)

    def gram(self) -> Tensor:
        """[n, n]: products of all pairs."""
        gram = self.weight.new_empty(len(self), len(self))
        for start in range(0, len(self), 512):
            stop = min(start + 512, len(self))
            block = self.vectors(slice(start, stop))
            if self.gathers:
                gram[start:stop] = self.correlate(block)
            else:  # half of them are enough
                gram[start:stop, :stop] = Rows(self.dense[:stop]).scores(block)
                gram[:start, start:stop] = gram[start:stop, :start].T
        return gram


def _signals(x: Tensor, atoms: _Atoms) -> Tensor:
    if x.ndim != 2 or x.shape[1] != atoms.width:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: [batch, {atoms.width}], rows as long as the atoms")
    if not torch.isfinite(x).all():
        raise ValueError("x has entries that are infinite or not a number; allowed: finite ones")
    return x if x.is_floating_point() else x.to(atoms.weight.dtype)


def _at_unit_size(x: Tensor, atoms: _Atoms) -> tuple[Tensor, Tensor]:
    """Signals divided by powers of two so that their largest entries are 1 to 2, and these powers."""
    x = _signals(x, atoms)
    size = power_of_two(x.abs().amax(1))
    return (x / size[:, None]).to(atoms.weight.dtype), size


def _at_own_size(values: Tensor, indices: Tensor, size: Tensor, atoms: _Atoms) -> Tensor:
    """Coefficients for signals and atoms as they were given."""
    factor = size.double()[:, None] / atoms.scale.double()[indices]
    found = torch.where(values == 0, 0.0, values.double() * factor).to(atoms.dtype)
    gone = bool(((values != 0).any(1) & ~(found != 0).any(1)).any())
    if gone or not torch.isfinite(found).all():
        different = f"x and atoms have sizes so different that coefficients {'vanish' if gone else 'overflow'}"
        raise ValueError(f"{different}; allowed: what {atoms.dtype} holds")
    return found


# -- orthogonal matching pursuit ---------------------------------------------------------------------------------------


@torch.no_grad()
def omp(
    x: Float[Tensor, "batch m"],
    atoms: Rows | Float[Tensor, "n d"],
    k: int,
    *,
    select: str = "magnitude",
    nonnegative: bool = False,
    tolerance: float | None = None,
    chunk: int | None = None,
    gram: bool | None = None,
) -> SparseCodes:
    """Orthogonal matching pursuit of every sample: at most k atoms each, with their least-squares coefficients.

    Atoms are taken as they are, without their biases, and should have length 1; a longer atom is chosen more readily.
    A sample stops early where its residual is at most `tolerance`·‖x‖, and where no atom correlates with it beyond
    rounding. No atom is chosen twice. An atom that depends on those chosen before (`least_squares` says when) is
    passed over for that sample, and the step is spent. Slots that stay unused have value zero and indices that are
    used nowhere else in their row.

    Args:
        select: "magnitude" chooses by |d_j·r|, as scikit-learn does; "signed" by d_j·r, as paper B does, and stops
            where none is positive. Coefficients may have either sign in both.
        nonnegative: coefficients ≥ 0 (Bruckstein et al. 2008): choose by d_j·r, then solve for non-negative
            coefficients as Lawson and Hanson (1974) do. Atoms at zero leave, and may come back; k counts steps.
        tolerance: of the residual's norm, relative to the signal's; None for k atoms.
        chunk: samples at a time; None: `GRAM_CHUNK`, `RESIDUAL_CHUNK`, or `CUDA_CHUNK` on a GPU. Beside the Gram matrix
            and the dense form of packed atoms, where they are used, at most chunk·(3n + 6k(m + k)) numbers are held.
        gram: whether correlations are updated through the Gram matrix of all atoms (n² numbers, at most `GRAM_BYTES`
            where we choose), or computed from the residual at each step. None takes what costs less.

    Signals and atoms may have any size: they are divided by powers of two first. Raises `ValueError` for parameters out
    of range, x or atoms that are not finite, `gram=True` with `nonnegative`, coefficients beyond the atoms' dtype.
    """
    atoms = _Atoms(atoms).scaled()
    x, size = _at_unit_size(x, atoms)
    _check(k, len(atoms), select, nonnegative, tolerance, chunk, gram)
    gram = not nonnegative and _gram_pays(len(x), atoms, k) if gram is None else gram
    products = atoms.gram() if gram and len(x) else None
    chunk = chunk or (CUDA_CHUNK if x.is_cuda else GRAM_CHUNK if gram else RESIDUAL_CHUNK)
    parts = [
        _nonnegative(part, atoms, k, tolerance) if nonnegative else _free(part, atoms, k, select, tolerance, products)
        for part in x.split(chunk)
    ]
    indices, values = (torch.cat(same) for same in zip(*parts, strict=True))
    return SparseCodes(indices, _at_own_size(values, indices, size, atoms))


def _free(
    x, atoms: _Atoms, k: int, select: str, tolerance: float | None, products: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Indices and coefficients [batch, k] of either sign; `products` is the Gram matrix, where it is used."""
    state = _ByResidual(x, atoms, k) if products is None else _ByGram(x, atoms, k, products)
    indices, used = _choose(x, atoms, k, select, tolerance, state)
    return indices, _solve(x, atoms.vectors(indices), used)


def _check(k, n, select, nonnegative, tolerance, chunk, gram) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} atoms cannot be chosen; allowed: 1 to n={n}")
    if select not in _SELECT:
        raise ValueError(f"select={select!r} is unknown; allowed: {', '.join(map(repr, _SELECT))}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} is no share of a norm; allowed: 0 ≤ tolerance < 1, or None")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} samples; allowed: at least 1, or None")
    if gram and nonnegative:
        raise ValueError("gram=True with nonnegative=True; allowed: one of them")


def _gram_pays(batch: int, atoms: _Atoms, k: int) -> bool:
    """Whether building the Gram matrix and summing rows of it costs less than correlating every residual."""
    n, m = len(atoms), atoms.width
    if n * n * atoms.weight.element_size() > GRAM_BYTES:
        return False
    gathered = (atoms.weight.shape[1] + HANDING_OVER) * GATHER_COST
    correlate = n * (gathered if atoms.gathers else m * PRODUCT_COST)
    build = n * correlate * (1 if atoms.gathers else 0.5)
    steps = batch * k
    return build + steps * n * k / 2 * GRAM_COST < steps * (correlate + m * k * BASIS_COST)


def _choose(x, atoms: _Atoms, k: int, select: str, tolerance: float | None, state) -> tuple[Tensor, Tensor]:
    """Indices [batch, k] in the order of choice, and which of them are used."""
    norm = x.norm(dim=1)
    floor = _rounding(norm, atoms)
    indices = x.new_zeros(len(x), k, dtype=torch.long)
    used = torch.zeros_like(indices, dtype=torch.bool)
    live = norm > 0
    for step in range(k):
        score = state.correlations()
        score = score.abs() if select == "magnitude" else score.clone()
        score, least = atoms.weigh(score, floor)
        score.scatter_(1, indices[:, :step], -torch.inf)
        best, chosen = score.max(1)
        live = live & (best > least)
        if tolerance is not None:
            live = live & (state.residual_norm(indices, step) > tolerance * norm)
        if not live.any():  # distinct indices for what stays unused
            indices[:, step:] = score.topk(k - step, dim=1).indices
            break
        indices[:, step] = chosen
        used[:, step] = state.add(step, indices, live)
    return indices, used


def _rounding(norm: Tensor, atoms: _Atoms) -> Tensor:
    """Correlations of this size are rounding: those of a residual that is orthogonal to all atoms."""
    return 64 * torch.finfo(norm.dtype).eps * atoms.longest * norm


def _dependent(dtype: torch.dtype) -> float:
    """Squared share of an atom outside the span of others, below which it counts as dependent on them."""
    return 100 * torch.finfo(dtype).eps


class _ByResidual:
    """Correlations from the residual itself; the chosen atoms are kept as an orthonormal basis [batch, k, m].

    Gram and Schmidt's coefficients are the Cholesky factor of the chosen atoms' Gram matrix, which is never formed. A
    second pass, where an atom is mostly in the span of the others, keeps the basis orthogonal to rounding.
    """

    def __init__(self, x: Tensor, atoms: _Atoms, k: int):
        self.atoms, self.residual, self.basis = atoms, x.clone(), x.new_zeros(len(x), k, x.shape[1])

    def correlations(self) -> Tensor:
        return self.atoms.correlate(self.residual)

    def residual_norm(self, indices: Tensor, step: int) -> Tensor:
        return self.residual.norm(dim=1)

    def add(self, step: int, indices: Tensor, live: Tensor) -> Tensor:
        """Take the atoms at `indices[:, step]` into the basis where `live`; returns where that was possible."""
        atom = self.atoms.vectors(indices[:, step])
        rest, before, length = atom, self.basis[:, :step], atom.norm(dim=1)
        left = length
        for _ in range(2 if step else 0):
            rest = torch.baddbmm(rest[:, :, None], before.mT, before @ rest[:, :, None], alpha=-1)[:, :, 0]
            left = rest.norm(dim=1)
            if (left > length / 2).all():  # little was taken away, so little of it was rounding
                break
        new = live & (left.square() > _dependent(atom.dtype) * length.square())
        direction = rest * torch.where(new, 1 / left, 0)[:, None]
        self.basis[:, step] = direction
        self.residual -= (direction * self.residual).sum(1, keepdim=True) * direction
        return new


class _ByGram:
    """Correlations updated through the Gram matrix G (Rubinstein et al. 2008): α ← α − γ_t Σ_s F_ts G_{j_s}.

    Row t of F = L⁻¹, L the Cholesky factor of the chosen atoms' Gram matrix, holds the coefficients of the t-th
    orthonormal direction q_t in the chosen atoms, and γ_t = q_t·r = α_{j_t}/L_tt.
    """

    def __init__(self, x: Tensor, atoms: _Atoms, k: int, gram: Tensor):
        self.x, self.atoms, self.gram = x, atoms, gram
        self.alpha = atoms.correlate(x)
        self.inverse = x.new_zeros(len(x), k, k)
        self.along = x.new_zeros(len(x), k)

    def correlations(self) -> Tensor:
        return self.alpha

    def residual_norm(self, indices: Tensor, step: int) -> Tensor:
        # afresh: ‖x‖² − Σγ² would lose half of the digits
        if not step:
            return self.x.norm(dim=1)
        values = (self.along[:, None, :step] @ self.inverse[:, :step, :step])[:, 0]
        return (self.x - (values[:, None] @ self.atoms.vectors(indices[:, :step]))[:, 0]).norm(dim=1)

    def add(self, step: int, indices: Tensor, live: Tensor) -> Tensor:
        """As `_ByResidual.add`."""
        chosen, before = indices[:, step], self.inverse[:, :step, :step]
        own = self.gram[chosen, chosen]
        overlap = before @ self.gram[chosen[:, None], indices[:, :step]][:, :, None]
        left = own - overlap.square().sum((1, 2))
        new = live & (left > _dependent(left.dtype) * own)
        scale = torch.where(new, left.rsqrt(), 0)
        row = self.inverse[:, step]
        row[:, :step] = -scale[:, None] * (overlap.mT @ before)[:, 0]
        row[:, step] = scale
        self.along[:, step] = scale * self.alpha.gather(1, chosen[:, None])[:, 0]
        weights = self.along[:, step, None] * row[:, : step + 1]
        self.alpha -= weighted_sum(weights, indices[:, : step + 1], self.gram)
        return new


# -- coefficients on a support -----------------------------------------------------------------------------------------


@torch.no_grad()
def least_squares(
    x: Float[Tensor, "batch m"],
    atoms: Rows | Float[Tensor, "n d"],
    indices: Int[Tensor, "rows k"],
    *,
    chunk: int = RESIDUAL_CHUNK,
) -> Float[Tensor, "rows k"]:
    """The coefficients z that minimise ‖x − Σ_i z_i d_{indices[i]}‖ for each sample.

    Where atoms depend on each other there are many, and the one of least norm (of coefficients times lengths) is
    returned: of two equal atoms each gets half. Atoms count as dependent where one has less than √(100 ε) of its length
    outside the span of others, ε the rounding of their own precision: .35 % in float32, 1.5·10⁻⁷ in float64.
    An atom of zeros gets zero. Sizes, dtypes and refusals are those of `omp`.

    Normal equations by Cholesky, refined once; `chunk` samples at a time, with about 4k(m + k) numbers each.
    """
    atoms = _Atoms(atoms).scaled()
    x, size = _at_unit_size(x, atoms)
    if indices.ndim != 2 or len(indices) != len(x):
        raise ValueError(f"indices has shape {list(indices.shape)}; allowed: [{len(x)}, k], a row for each of x")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(atoms):
        given = f"indices run from {int(indices.min())} to {int(indices.max())}"
        raise ValueError(f"{given}; allowed: 0 to {len(atoms) - 1}")
    values = x.new_zeros(indices.shape)
    if indices.numel():
        for part, at, to in zip(x.split(chunk), indices.split(chunk), values.split(chunk), strict=True):
            to.copy_(_solve(part, atoms.vectors(at)))
    return _at_own_size(values, indices, size, atoms)


def _solve(x: Tensor, vectors: Tensor, used: Tensor | None = None) -> Tensor:
    """Coefficients [batch, k] for given atoms [batch, k, m]; zero where not `used`."""
    length = vectors.norm(dim=2)
    used = length > 0 if used is None else used & (length > 0)
    scale = torch.where(used, 1 / length, 0)
    vectors = vectors * scale[:, :, None]
    gram = (vectors @ vectors.mT).double()
    gram.diagonal(dim1=1, dim2=2).add_(~used)
    factor, failed = torch.linalg.cholesky_ex(gram)
    tolerance = _dependent(x.dtype)
    weak = (failed != 0) | (factor.diagonal(dim1=1, dim2=2).square().amin(1) < tolerance)
    values = torch.zeros_like(scale)[:, :, None]
    for _ in range(2):  # the second time refines: it solves for the residual
        rest = x[:, :, None] - vectors.mT @ values
        values += torch.cholesky_solve((vectors @ rest).double(), factor).to(x.dtype)
    if weak.any():
        values[weak] = torch.linalg.pinv(vectors[weak].mT, rtol=tolerance**0.5) @ x[weak][:, :, None]
    return values[:, :, 0] * scale


def _nonnegative(x: Tensor, atoms: _Atoms, k: int, tolerance: float | None) -> tuple[Tensor, Tensor]:
    """Indices and non-negative coefficients [batch, k], by Lawson and Hanson's active sets, k steps."""
    norm = x.norm(dim=1)
    floor, live = _rounding(norm, atoms), norm > 0
    indices = x.new_zeros(len(x), k, dtype=torch.long)
    used = torch.zeros_like(indices, dtype=torch.bool)
    vectors, values, residual = x.new_zeros(len(x), k, x.shape[1]), x.new_zeros(len(x), k), x
    for step in range(k):
        score, least = atoms.weigh(atoms.correlate(residual), floor)
        best, chosen = _without(score, indices, used).max(1)
        live = live & (best > least)
        if tolerance is not None:
            live = live & (residual.norm(dim=1) > tolerance * norm)
        if not live.any():
            break
        indices[:, step], used[:, step] = chosen, live
        vectors[:, step] = atoms.vectors(chosen)
        values[:, : step + 1] = _inward(x, vectors[:, : step + 1], values[:, : step + 1].clone(), used[:, : step + 1])
        residual = x - (values[:, None] @ vectors)[:, 0]
    # an atom that left, and came back, must not stand in its old place too
    spare = _without(x.new_zeros(len(x), len(atoms)), indices, used).topk(k, dim=1).indices
    return torch.where(used, indices, spare.gather(1, (~used).cumsum(1).sub(1).clamp_min(0))), values


def _without(score: Tensor, indices: Tensor, used: Tensor) -> Tensor:
    """Scores with −∞ at the used indices; the others may name any index, also a used one."""
    sample = torch.arange(len(score), device=score.device)[:, None].expand_as(indices)
    score[sample[used], indices[used]] = -torch.inf
    return score


def _inward(x: Tensor, vectors: Tensor, values: Tensor, used: Tensor) -> Tensor:
    """Lawson and Hanson's inner loop: solve; where a coefficient is not positive, go as far as they all stay ≥ 0,
    drop what has reached zero (`used` is changed in place), and solve again."""
    for _ in range(used.shape[1] + 1):
        goal = _solve(x, vectors, used)
        beyond = used & (goal <= 0)
        if not beyond.any():
            return goal
        ratio = torch.where(beyond, values / (values - goal).clamp_min(torch.finfo(x.dtype).tiny), torch.inf)
        share = ratio.amin(1, keepdim=True)
        values += share.clamp_max(1) * (goal - values)
        used &= ~(beyond & (ratio <= share))
        values.clamp_min_(0).mul_(used)
    return values
