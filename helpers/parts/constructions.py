"""Mixtures that are built and not trained (paper C, Theorems 3.6 and C.6; chapter 6), and what bounds their errors.

Atoms a_1 … a_n are the rows of `atoms`, a support S is a row of k atom numbers, A_S holds its atoms as columns,
G_S = A_SᵀA_S is their Gram matrix, F_S = A_S A_Sᵀ their frame operator and P_S the projection on their span. A
polynomial of degree p is f(x) = T[x, …, x], T a tensor with one output index and p input indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice, product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.dictionary import ACTIVATIONS, RankOneDictionary, Rows, SparseCodes, pursuit, weighted_sum
from helpers.dictionary.family import atoms_of
from helpers.settings import allowed, one_of

POWERS = {1: "identity", 2: "square", 3: "cube"}
"""Activation z^p for each degree p that is built here."""

RANK_TOLERANCE = 1e-10
"""Eigenvalues below this share of the largest count as zero."""

GATHER_BYTES = 2**26
"""Largest temporary for the gathered atoms of a batch of supports."""


# -- how far a dictionary is from orthogonal ---------------------------------------------------------------------------


def isometry_of(atoms: Float[Tensor, "n d"], supports: Int[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    """δ_S = ‖F_S − P_S‖, the largest |λ − 1| over the non-zero eigenvalues λ of G_S; exact, float64."""
    return torch.cat([_isometry(gram) for _, gram in _grams(atoms, supports)])


def restricted_isometry(atoms: Float[Tensor, "n d"], k: int) -> float:
    """δ = max over 1 ≤ |S| ≤ k of δ_S, exact, by enumeration.

    All sizes are visited: with linearly dependent atoms δ_S can shrink when S grows. Raises `ValueError` for k outside
    1 to n, and for over two million supports; there the Babel function of unit atoms (chapter 4) is an upper bound, and
    any `isometry_of` a lower one.
    """
    n, own = len(atoms), atoms.detach().double()
    allowed(1 <= k <= n, f"k={k}", f"1 to {n}, the number of atoms")
    count = sum(math.comb(n, size) for size in range(1, k + 1))
    given = f"k={k} of {n} atoms makes {count:,} supports"
    allowed(count <= 2_000_000, given, "2,000,000; the Babel function bounds δ")
    gram, worst = own @ own.T, 0.0
    for size in range(1, k + 1):
        rest: Iterator[tuple[int, ...]] = combinations(range(n), size)
        while part := list(islice(rest, 65_536)):
            s = torch.tensor(part)
            worst = max(worst, float(_isometry(gram[s[:, :, None], s[:, None, :]]).max()))
    return worst


def adversarial_supports(
    atoms: Float[Tensor, "n d"], k: int, starts: int, generator: torch.Generator
) -> Int[Tensor, "starts k"]:
    """Supports with a large λ_max(G_S), by the truncated power method (Yuan & Zhang 2013) from random atoms.

    Each of ten steps takes a vector's products with all atoms, keeps the k largest, and sums those atoms. Their δ_S are
    lower bounds on δ, and nothing says that they reach it.
    """
    allowed(1 <= k <= len(atoms), f"k={k}", f"1 to {len(atoms)}, the number of atoms")
    u = atoms[torch.randint(len(atoms), (starts,), generator=generator, device=generator.device)]
    for _ in range(10):
        dots = u @ atoms.T
        supports = dots.abs().topk(k, dim=1).indices
        u = torch.einsum("bk,bkd->bd", dots.gather(1, supports), atoms[supports])
        u = u / u.norm(dim=1, keepdim=True)
    return supports


def worst_inputs(atoms: Float[Tensor, "n d"], supports: Int[Tensor, "batch k"]) -> Float[Tensor, "batch d"]:
    """Unit x of span(S) with ‖F_S x − x‖ = δ_S: the eigenvector of F_S whose eigenvalue is furthest from 1."""
    found = []
    for rows, gram in _grams(atoms, supports):
        values, vectors = torch.linalg.eigh(gram)
        off = torch.where(_non_zero(values), (values - 1).abs(), -1.0)
        place = off.argmax(1)
        codes = vectors[torch.arange(len(rows)), :, place] * values.gather(1, place[:, None]).rsqrt()
        found.append(torch.einsum("bk,bkd->bd", codes, atoms[rows].double()))
    return torch.cat(found).to(atoms.dtype)


def projection(
    atoms: Float[Tensor, "n d"], supports: Int[Tensor, "batch k"], x: Float[Tensor, "batch d"]
) -> Float[Tensor, "batch d"]:
    """P_S x for each row of x with its own support, in float64."""
    atoms = atoms.detach().double()
    return weighted_sum(pursuit.least_squares(x.double(), atoms, supports), supports, atoms)


def _grams(atoms: Tensor, supports: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Supports, a block at a time, with their Gram matrices in float64."""
    for rows in supports.split(max(1, GATHER_BYTES // (8 * supports.shape[1] * atoms.shape[1]))):
        chosen = atoms.detach()[rows].double()
        yield rows, chosen @ chosen.transpose(1, 2)


def _non_zero(values: Tensor) -> Tensor:
    return values > RANK_TOLERANCE * values.amax(1, keepdim=True)


def _isometry(grams: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(grams)
    return torch.where(_non_zero(values), (values - 1).abs(), 0.0).amax(1)


# -- linear maps: one neuron per atom (Theorem 3.6) --------------------------------------------------------------------


def linear_moe(
    atoms: Float[Tensor, "n d"],
    matrix: Float[Tensor, "m d"] | None,
    k: int,
    *,
    signed: bool = False,
    router: Float[Tensor, "n d"] | None = None,
) -> RankOneDictionary:
    """The mixture of Theorem 3.6 for x ↦ A x: expert j is the linear neuron x ↦ (a_j·x) A a_j.

    Gates are 1: the paper's hard gates weigh by 1/k, which its experts make up for by a factor k, and the sum is the
    same. For gates that an oracle sets use `gated_by`.

    Args:
        matrix: A; None for the identity, whose decoder is tied to its encoder.
        signed: let the router have rows ±r_j and 2n experts, of which j and n + j are the same function, so that TopK
            chooses the largest |r_j·x| in the place of the largest r_j·x.
        router: the rows r_j; the atoms themselves if None.
    """

    def rows(one_way: Tensor) -> Tensor:
        return torch.cat([one_way, -one_way]) if signed else one_way.clone()

    encoder = Rows(rows(atoms))
    decoder = encoder if matrix is None else Rows(rows(atoms @ matrix.T))
    chooses = None if router is None else Rows(rows(router))
    return RankOneDictionary(encoder, decoder, k=k, router=chooses, activation="identity")


def gated_by(
    model: RankOneDictionary, x: Float[Tensor, "batch d_in"], supports: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch d_out"]:
    """The output of a hard-gated mixture when an oracle sets the gates: exactly the experts `supports` are active.

    Raises `ValueError` for soft gates or a shared part, which an oracle for supports leaves open.
    """
    given = f"gate={model.gate!r}, shared={model.shared is not None}"
    allowed(model.gate == "hard" and model.shared is None, given, "'hard' and no shared part")
    neurons = atoms_of(supports, model.expert_rank)
    with torch.no_grad():
        x = x if model.b_in is None else x - model.b_in
        values = ACTIVATIONS[model.activation](model.encoder.chosen(x, neurons))
        return model.decode(SparseCodes(neurons, values))


# -- products of p linear forms as sums of p-th powers (Lemma C.10) ----------------------------------------------------


def interpolation(p: int) -> tuple[Float[Tensor, " terms"], Float[Tensor, "terms p"]]:
    """Weights ω and nodes β with z_1 ⋯ z_p = Σ_t ω_t (Σ_i β_ti z_i)^p, as in Lemma C.10: (p + 1)^p terms.

    In each variable the weights c of p + 1 nodes b solve the Vandermonde system Σ_b c_b b^m = [m = 1], m = 0 … p; then
    ω_t = Π_i c(β_ti) / p!.
    """
    nodes = np.arange(p + 1) - p / 2
    c = np.linalg.solve(np.vander(nodes, increasing=True).T, np.arange(p + 1) == 1)
    weights = [math.prod(term) / math.factorial(p) for term in product(c, repeat=p)]
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(list(product(nodes, repeat=p)), dtype=torch.float64)


def polarisation(p: int) -> tuple[Float[Tensor, " terms"], Float[Tensor, "terms p"]]:
    """The same identity from signs alone: 2^(p−1) terms, β_t1 = 1, β_ti = ±1, ω_t = Π_i β_ti / (2^(p−1) p!)."""
    signs = torch.tensor(list(product([1.0, -1.0], repeat=p - 1)), dtype=torch.float64).reshape(2 ** (p - 1), p - 1)
    signs = torch.cat([torch.ones(len(signs), 1, dtype=torch.float64), signs], 1)
    return signs.prod(1) / (2 ** (p - 1) * math.factorial(p)), signs


METHODS = {"interpolation": interpolation, "polarisation": polarisation}
"""Ways to write a product as a sum of powers: the paper's, and the one with the fewest terms."""


def symmetric_decomposition(
    outputs: Float[Tensor, "terms m"], factors: Float[Tensor, "terms p d"], how: str = "polarisation"
) -> tuple[Float[Tensor, "powers m"], Float[Tensor, "powers d"]]:
    """Lemma C.10: Sym(Σ_l u_l ⊗ v_l1 ⊗ … ⊗ v_lp) = Σ_t w_t ⊗ s_t^{⊗p}; returns the w_t and the s_t.

    Sym averages over the orders of the p inputs and leaves x ↦ T[x, …, x] as it is. There are (p + 1)^p or 2^(p−1)
    powers for each term, in the order of the terms.
    """
    one_of("how", how, METHODS)
    weights, nodes = (part.to(factors) for part in METHODS[how](factors.shape[1]))
    powers = torch.einsum("tp,lpd->ltd", nodes, factors).flatten(0, 1)
    return torch.einsum("t,lm->ltm", weights, outputs).flatten(0, 1), powers


# -- polynomials: one small network per atom (Theorem C.6) -------------------------------------------------------------


@dataclass(frozen=True)
class Polynomial:
    """f(x) = Σ_l u_l Π_i (v_li·x), homogeneous of degree p: its tensor is T = Σ_l u_l ⊗ v_l1 ⊗ … ⊗ v_lp.

    Args:
        outputs: [terms, m], the u_l.
        factors: [terms, p, d], the v_li. Every tensor is such a sum.
    """

    outputs: Float[Tensor, "terms m"]
    factors: Float[Tensor, "_ p d"]  # as many terms: checked below, by name

    def __post_init__(self):
        terms = len(self.factors)
        allowed(len(self.outputs) == terms, f"outputs has {len(self.outputs)} terms", f"{terms}, as many as factors")
        one_of("degree", self.degree, POWERS)

    @property
    def degree(self) -> int:
        return self.factors.shape[1]

    def __call__(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch m"]:
        return torch.einsum("lpd,bd->blp", self.factors, x).prod(2) @ self.outputs

    def interactions(self, atoms: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n r m"], Float[Tensor, "n r q d"]]:
        """T a_j for each atom (T contracted with a_j at its last index) as a sum of r terms, q = p − 1 factors each.

        For p ≤ 2, r is the largest rank of the T a_j, from singular values. For p = 3, whose rank is NP-hard, it is the
        largest number of terms l with v_lp·a_j ≠ 0: an upper bound on the rank. Missing terms are zeros.
        """
        dots = self.factors[:, -1] @ atoms.T
        if self.degree == 1:
            return (dots.T @ self.outputs)[:, None], atoms.new_zeros(len(atoms), 1, 0, atoms.shape[1])
        if self.degree == 2:
            matrices = torch.einsum("lj,lm,ld->jmd", dots, self.outputs, self.factors[:, 0])
            left, values, right = torch.linalg.svd(matrices, full_matrices=False)
            rank = max(1, int((values > 1e-10 * values.max()).sum(1).max()))
            return (left * values[:, None]).transpose(1, 2)[:, :rank], right[:, :rank, None]
        there = dots.abs() > 1e-12 * dots.abs().max()
        rank = max(1, int(there.sum(0).max()))
        terms = there.T.double().topk(rank, dim=1).indices
        scale = (dots * there).T.gather(1, terms)
        return scale[:, :, None] * self.outputs[terms], self.factors[terms][:, :, :-1]


def local_polynomial(d: int, p: int, block: int, rank: int, generator: torch.Generator) -> Polynomial:
    """A polynomial map of d inputs and d outputs in which a coordinate meets only the others of its block.

    Each of the d/block blocks has `rank` terms, so T e_j has rank at most `rank` for every basis vector e_j. Outputs
    u_l and first factors v_l1 are orthonormal and the other factors unit vectors, so ‖T‖ = 1 (max over unit vectors of
    T[u, x_1, …, x_p]); all in float64. Raises `ValueError` unless block divides d and rank ≤ block.
    """
    good = d % block == 0 and 1 <= rank <= block
    allowed(good, f"block={block}, rank={rank}", f"a divisor of d={d}, and rank from 1 to block")
    blocks, how = d // block, {"generator": generator, "device": generator.device, "dtype": torch.float64}
    first = torch.linalg.qr(torch.randn(blocks, block, rank, **how)).Q.transpose(1, 2)[:, :, None]
    rest = torch.nn.functional.normalize(torch.randn(blocks, rank, p - 1, block, **how), dim=3)
    inside = torch.cat([first, rest], 2)
    factors = inside.new_zeros(blocks, rank, p, blocks, block)
    own = torch.arange(blocks)
    factors[own, :, :, own] = inside
    outputs = torch.linalg.qr(torch.randn(d, blocks * rank, **how)).Q.T
    return Polynomial(outputs, factors.reshape(blocks * rank, p, d))


def polynomial_moe(
    atoms: Float[Tensor, "n d"], polynomial: Polynomial, k: int, how: str = "polarisation"
) -> RankOneDictionary:
    """The mixture of Theorem C.6: expert j computes x ↦ (a_j·x) · (T a_j)[x, …, x] by neurons with activation z^p.

    Expert j is the symmetric decomposition (`how`) of T a_j ⊗ a_j: r·2^(p−1), or r·(p+1)^p, neurons. Its knob
    `expert_rank` holds that number, and k times it are active.
    """
    outputs, factors = polynomial.interactions(atoms)
    n, r, _ = outputs.shape
    with_atom = torch.cat([factors, atoms[:, None, None].expand(n, r, 1, -1)], 2)
    written, read = symmetric_decomposition(outputs.flatten(0, 1), with_atom.flatten(0, 1), how)
    return RankOneDictionary(
        Rows(read),
        Rows(written),
        k=k,
        router=Rows(atoms.clone()),
        activation=POWERS[polynomial.degree],
        expert_rank=len(read) // n,
    )


# -- pure mixtures that equal a student with a shared part, or try to --------------------------------------------------


def _shared_part(student: RankOneDictionary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shared MLP as S neurons: rows they read [S, d_in], biases [S], rows they write [S, d_out], output bias."""
    single = student.shared is not None and student.k and student.activation == "gelu" and student.expert_rank == 1
    allowed(single, f"student={student.knobs}", "single GELU neurons beside a shared MLP")
    biases = [student.b_in, student.b_out, student.selection_bias]
    allowed(all(each is None for each in biases), "the student has b_in, b_out or a selection bias", "none of them")
    first, _, second = student.shared
    return tuple(part.detach() for part in (first.weight, first.bias, second.weight.T, second.bias))


def always_chosen(student: RankOneDictionary, inputs: Float[Tensor, "n d_in"]) -> RankOneDictionary:
    """A pure mixture with as many active neurons: the shared neurons are experts that win on all of `inputs`.

    Their scores are one constant above all others, by a bias that the router is given. With hard gates this is the
    student. With a softmax it is not: a routed gate is exp(s_j) / (S·exp(c) + Z), Z the sum of exp over the chosen
    scores, where the student has exp(s_j) / Z. We subtract from all s_j the affine function of x that is nearest to
    ln Z on `inputs`, which a softmax over the k does not notice, and size the decoder for Z = 1. What is left of ln Z
    is the error. `ValueError` for a student that is not one of single GELU neurons beside a shared MLP.
    """
    (read, read_bias, write, b_out), router = _shared_part(student), student.router
    x, count = inputs.to(read.dtype), len(read)
    rows = (router.weight if router.down is None else router.weight @ router.down).detach()
    bias = rows.new_zeros(len(rows)) if router.bias is None else router.bias.detach()
    if soft := student.gate == "softmax":
        log_z = (x @ rows.T + bias).topk(student.k).values.logsumexp(1)
        wide = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        nearest = torch.linalg.lstsq(wide, log_z[:, None], driver="gelsd").solution[:, 0]
        rows, bias = rows - nearest[:-1], bias - nearest[-1]
    top = float((x @ rows.T + bias).max()) + 1
    for_shared, for_routed = (count + math.exp(-top), count * math.exp(top) + 1) if soft else (1.0, 1.0)
    return RankOneDictionary(
        Rows(torch.cat([read, student.encoder.weight]), torch.cat([read_bias, student.encoder.bias])),
        Rows(torch.cat([for_shared * write, for_routed * student.decoder.weight])),
        k=count + student.k,
        router=Rows(torch.cat([torch.zeros_like(read), rows]), torch.cat([torch.full_like(read_bias, top), bias])),
        gate=student.gate,
        activation=student.activation,
        b_out=b_out,
    )


def with_copies(student: RankOneDictionary) -> RankOneDictionary:
    """The pure softmax mixture that equals the student: every expert brings a copy of all S shared neurons.

    Router rows repeat S + 1 times, so a chosen expert's block ties with itself and comes whole. The gates of a shared
    neuron's copies add up to 1/(S + 1), whatever was chosen. k·(S + 1) neurons are active, of E·(S + 1). `ValueError`
    for other gates than a softmax, or as `always_chosen`.
    """
    (read, read_bias, write, b_out), router = _shared_part(student), student.router
    allowed(student.gate == "softmax", f"gate={student.gate!r} needs no copies", "'softmax'")
    block = len(read) + 1

    def blocks(shared: Tensor, own: Tensor) -> Tensor:
        return torch.cat([shared.expand(student.n_features, *shared.shape), own[:, None]], 1).flatten(0, 1)

    bias = None if router.bias is None else router.bias.detach().repeat_interleave(block)
    return RankOneDictionary(
        Rows(blocks(read, student.encoder.weight), blocks(read_bias, student.encoder.bias)),
        Rows(block * blocks(write, student.decoder.weight)),
        k=student.k * block,
        router=Rows(router.weight.detach().repeat_interleave(block, 0), bias, router.down),
        gate="softmax",
        activation=student.activation,
        b_out=b_out,
    )


# -- what a dense network needs ----------------------------------------------------------------------------------------


def flattening_rank(polynomial: Polynomial) -> int:
    """The largest rank of a flattening of Sym(T): a lower bound on the width of any dense MLP that computes f.

    Flattenings keep the output and a of the inputs as rows, p − a inputs as columns, a = 0 … p − 1. With Sym(T) =
    Σ_t w_t ⊗ s_t^{⊗p} a flattening is XᵀY, the rows of X and Y being rank-one tensors, so its singular values are those
    of √(XXᵀ)√(YYᵀ), and these Gram matrices are products of powers of (w_t·w_u) and (s_t·s_u): no tensor is built.
    Singular values below 10⁻⁶ of the largest count as zero, which can only lower the bound.
    """
    written, read = symmetric_decomposition(polynomial.outputs.double(), polynomial.factors.double())
    p, outer, inner = polynomial.degree, written @ written.T, read @ read.T
    products = (_root(outer * inner**a) @ _root(inner ** (p - a)) for a in range(p))
    spectra = (torch.linalg.svdvals(product) for product in products)
    return max(int((values > 1e-6 * values[0]).sum()) for values in spectra)


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
