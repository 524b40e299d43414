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

from helpers.dictionary.atoms import Atoms, at_own_size, at_unit_size, signals
from helpers.dictionary.rows import Rows, SparseCodes, weighted_sum
from helpers.dictionary.screening import Screen, forms, screen

GATHER_COST, PRODUCT_COST, GRAM_COST, BASIS_COST = 57.0, 22.0, 84.0, 80.0
"""Picoseconds of a multiply-add, one core, float32: gathering packed atoms, a matrix product, summing chosen rows of
the Gram matrix, orthogonalising. Measured at m=512, n=4096; only their ratios are used, in `_gram_pays`."""

HANDING_OVER = 13
"""What a gathered correlation costs beside its d multiply-adds, in as many of them: it is written twice, transposed."""

GRAM_BYTES = 512 * 2**20
"""The Gram matrix of all atoms is built only if it is no larger than this (n ≤ 11,585 in float32)."""

GRAM_CHUNK, RESIDUAL_CHUNK, GPU_CHUNK = 32, 256, 4096
"""Samples worked on at a time. With the Gram matrix few are best on a CPU: their k rows of it stay in cache."""

BLOCK = 64
"""Correlations of which the largest is found first, and then the one that it is."""

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
    atoms = Atoms(atoms)
    if method not in (None, "gather", "dense"):
        raise ValueError(f"method={method!r} is unknown; allowed: 'gather', 'dense', None")
    if method == "gather" and not atoms.packed:
        raise ValueError("method='gather' with dense atoms; allowed: packed atoms, or method='dense'")
    atoms.gathers = atoms.gathers if method is None else method == "gather"
    return atoms.correlate(signals(x, atoms).to(atoms.weight.dtype))


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
        chunk: samples at a time; None: `GRAM_CHUNK`, `RESIDUAL_CHUNK`, or `GPU_CHUNK` on a GPU. Beside the Gram matrix
            and the dense form of packed atoms, where they are used, at most chunk·(3n + 6k(m + k)) numbers are held.
        gram: whether correlations are updated through the Gram matrix of all atoms (n² numbers, at most `GRAM_BYTES`
            where we choose), or follow from the residual at each step, by `screening`. None takes what costs less.

    Signals and atoms may have any size: they are divided by powers of two first. Raises `ValueError` for parameters out
    of range, x or atoms that are not finite, `gram=True` with `nonnegative`, coefficients beyond the atoms' dtype.
    """
    atoms = Atoms(atoms).scaled()
    x, size = at_unit_size(x, atoms)
    _check(k, len(atoms), select, nonnegative, tolerance, chunk, gram)
    few = None if nonnegative or gram else _screen(x, atoms)
    gram = not nonnegative and few is None and _gram_pays(len(x), atoms, k) if gram is None else gram
    products = atoms.gram() if gram and len(x) else None
    chunk = chunk or (GPU_CHUNK if x.device.type != "cpu" else GRAM_CHUNK if gram else RESIDUAL_CHUNK)
    pursue, how = (_nonnegative, (tolerance,)) if nonnegative else (_free, (tolerance, select, products, few))
    parts = [pursue(part, atoms, k, *how) for part in x.split(chunk)]
    indices, values = (torch.cat(same) for same in zip(*parts, strict=True))
    return SparseCodes(indices, at_own_size(values, indices, size, atoms))


def _screen(x: Tensor, atoms: Atoms) -> Screen | None:
    """In what correlations are found first, where that pays: dense atoms whose lengths are alike."""
    dense = atoms.ratio is None and not atoms.gathers and forms(atoms.weight, len(x))
    return screen(x[:RESIDUAL_CHUNK], atoms.dense) if dense else None


def _free(
    x, atoms: Atoms, k: int, tolerance: float | None, select: str, products: Tensor | None, few: Screen | None
) -> tuple[Tensor, Tensor]:
    """Indices and coefficients [batch, k] of either sign; `products` is the Gram matrix, where it is used."""
    state = _ByResidual(x, atoms, k, few) if products is None else _ByGram(x, atoms, k, products)
    indices, used = _choose(x, atoms, k, select, tolerance, state)
    return indices, _refined(x, atoms, indices, used, state)


def _refined(x: Tensor, atoms: Atoms, indices: Tensor, used: Tensor, state) -> Tensor:
    """Coefficients from the factor that the pursuit leaves, and once more for what they leave of the signal."""
    inverse = state.inverse_factor(used)
    values = (state.along[:, None] @ inverse)[:, 0]
    rest = x - atoms.combine(values, indices)
    along = torch.where(used, atoms.products(rest, indices), 0)
    return values + ((inverse @ along[:, :, None]).mT @ inverse)[:, 0]


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


def _gram_pays(batch: int, atoms: Atoms, k: int) -> bool:
    """Whether building the Gram matrix and summing rows of it costs less than correlating every residual."""
    n, m = len(atoms), atoms.width
    if n * n * atoms.weight.element_size() > GRAM_BYTES:
        return False
    gathered = (atoms.weight.shape[1] + HANDING_OVER) * GATHER_COST
    correlate = n * (gathered if atoms.gathers else m * PRODUCT_COST)
    build = n * correlate * (1 if atoms.gathers else 0.5)
    steps = batch * k
    return build + steps * n * k / 2 * GRAM_COST < steps * (correlate + m * k * BASIS_COST)


def _choose(x, atoms: Atoms, k: int, select: str, tolerance: float | None, state) -> tuple[Tensor, Tensor]:
    """Indices [batch, k] in the order of choice, and which of them are used."""
    norm = x.norm(dim=1)
    floor = _rounding(norm, atoms)
    indices = x.new_zeros(len(x), k, dtype=torch.long)
    taken, used = torch.zeros_like(indices, dtype=torch.bool), torch.zeros_like(indices, dtype=torch.bool)
    live = norm > 0
    for step in range(k):
        best, chosen = state.best(select == "magnitude", indices[:, :step], floor.masked_fill(~live, torch.inf))
        live = live & (best > 0)
        if tolerance is not None:
            live = live & (state.residual_norm(indices, step) > tolerance * norm)
        if not live.any():
            break
        indices[:, step], taken[:, step] = torch.where(live, chosen, 0), live
        used[:, step] = state.add(step, indices, live)
    return _distinct(indices, taken, len(atoms)), used


def _best(score: Tensor, atoms: Atoms, magnitude: bool, before: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The largest correlation of each sample, −∞ where it is rounding, and its atom, which is none of those before."""
    score, least = atoms.weigh(score.abs() if magnitude else score.clone(), floor)
    score.scatter_(1, before, -torch.inf)
    if score.shape[1] % BLOCK:
        best, chosen = score.max(1)
    else:  # where the largest is takes ten times as long to find as how large it is
        inside = score.unflatten(1, (-1, BLOCK))
        best, block = inside.amax(2).max(1)
        chosen = inside[torch.arange(len(score), device=score.device), block].argmax(1).add_(block, alpha=BLOCK)
    return torch.where(best > least, best, -torch.inf), chosen


def _distinct(indices: Tensor, taken: Tensor, n: int) -> Tensor:
    """Indices with those that are not taken replaced by some that stand nowhere else in their row."""
    if taken.all():
        return indices
    free = _without(torch.zeros(len(indices), n, device=indices.device), indices, taken)
    spare = free.topk(indices.shape[1], dim=1).indices
    return torch.where(taken, indices, spare.gather(1, (~taken).cumsum(1).sub(1).clamp_min(0)))


def _rounding(norm: Tensor, atoms: Atoms) -> Tensor:
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

    def __init__(self, x: Tensor, atoms: Atoms, k: int, few: Screen | None = None):
        self.atoms, self.few = atoms, few
        self.residual, self.basis = x.clone(), x.new_empty(len(x), k, x.shape[1])
        self.factor, self.along = x.new_zeros(len(x), k, k), x.new_zeros(len(x), k)

    def best(self, magnitude: bool, before: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        if self.few is not None:
            found = self.few.largest(self.residual, magnitude=magnitude, without=before, least=floor)
            self.few = self.few.finer()
            return found
        return _best(self.atoms.correlate(self.residual), self.atoms, magnitude, before, floor)

    def residual_norm(self, indices: Tensor, step: int) -> Tensor:
        return self.residual.norm(dim=1)

    def add(self, step: int, indices: Tensor, live: Tensor) -> Tensor:
        """Take the atoms at `indices[:, step]` into the basis where `live`; returns where that was possible."""
        atom = self.atoms.vectors(indices[:, step])
        rest, before, length = atom, self.basis[:, :step], atom.norm(dim=1)
        left = length
        for _ in range(2 if step else 0):
            overlap = rest[:, None] @ before.mT
            rest = torch.baddbmm(rest[:, None], overlap, before, alpha=-1)[:, 0]
            left = rest.norm(dim=1)
            self.factor[:, step, :step] += overlap[:, 0]
            if (left > length / 2).all():  # little was taken away, so little of it was rounding
                break
        new = live & (left.square() > _dependent(atom.dtype) * length.square())
        direction = torch.mul(rest, torch.where(new, 1 / left, 0)[:, None], out=self.basis[:, step])
        self.along[:, step] = along = (direction * self.residual).sum(1)
        self.factor[:, step, step] = left
        self.residual.addcmul_(direction, along[:, None], value=-1)
        return new

    def inverse_factor(self, used: Tensor) -> Tensor:
        """F = L⁻¹, for which the rows of F Φ are the basis, Φ the chosen atoms; those not used have zeros."""
        factor = self.factor.masked_fill_(~used[:, :, None], 0.0)
        factor.diagonal(dim1=1, dim2=2).add_(~used)
        one = torch.eye(used.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        return torch.linalg.solve_triangular(factor, one, upper=False)


class _ByGram:
    """Correlations updated through the Gram matrix G (Rubinstein et al. 2008): α ← α − γ_t Σ_s F_ts G_{j_s}.

    Row t of F = L⁻¹, L the Cholesky factor of the chosen atoms' Gram matrix, holds the coefficients of the t-th
    orthonormal direction q_t in the chosen atoms, and γ_t = q_t·r = α_{j_t}/L_tt.
    """

    def __init__(self, x: Tensor, atoms: Atoms, k: int, gram: Tensor):
        self.x, self.atoms, self.gram = x, atoms, gram
        self.alpha = atoms.correlate(x)
        self.inverse = x.new_zeros(len(x), k, k)
        self.along = x.new_zeros(len(x), k)

    def best(self, magnitude: bool, before: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        return _best(self.alpha, self.atoms, magnitude, before, floor)

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

    def inverse_factor(self, used: Tensor) -> Tensor:
        return self.inverse


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
    atoms = Atoms(atoms).scaled()
    x, size = at_unit_size(x, atoms)
    if indices.ndim != 2 or len(indices) != len(x):
        raise ValueError(f"indices has shape {list(indices.shape)}; allowed: [{len(x)}, k], a row for each of x")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(atoms):
        given = f"indices run from {int(indices.min())} to {int(indices.max())}"
        raise ValueError(f"{given}; allowed: 0 to {len(atoms) - 1}")
    values = x.new_zeros(indices.shape)
    if indices.numel():
        for part, at, to in zip(x.split(chunk), indices.split(chunk), values.split(chunk), strict=True):
            to.copy_(_solve(part, atoms.vectors(at)))
    return at_own_size(values, indices, size, atoms)


def _solve(x: Tensor, vectors: Tensor, used: Tensor | None = None) -> Tensor:
    """Coefficients [batch, k] for given atoms [batch, k, m]; zero where not `used`."""
    length = vectors.norm(dim=2)
    used = length > 0 if used is None else used & (length > 0)
    scale = torch.where(used, 1 / length, 0)
    gram = (vectors @ vectors.mT).mul_(scale[:, :, None]).mul_(scale[:, None]).double()
    gram.diagonal(dim1=1, dim2=2).add_(~used)
    factor, failed = torch.linalg.cholesky_ex(gram)
    tolerance = _dependent(x.dtype)
    weak = (failed != 0) | (factor.diagonal(dim1=1, dim2=2).square().amin(1) < tolerance)
    values = torch.zeros_like(scale)
    for _ in range(2):  # the second time refines: it solves for the residual
        rest = torch.baddbmm(x[:, None], (values * scale)[:, None], vectors, alpha=-1)
        along = (rest @ vectors.mT)[:, 0] * scale
        values += torch.cholesky_solve(along[:, :, None].double(), factor)[:, :, 0].to(x.dtype)
    if weak.any():
        unit = vectors[weak] * scale[weak][:, :, None]
        values[weak] = (torch.linalg.pinv(unit.mT, rtol=tolerance**0.5) @ x[weak][:, :, None])[:, :, 0]
    return values * scale


def _nonnegative(x: Tensor, atoms: Atoms, k: int, tolerance: float | None) -> tuple[Tensor, Tensor]:
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
    return _distinct(indices, used, len(atoms)), values  # one that left, and came back, must not stand there twice


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
