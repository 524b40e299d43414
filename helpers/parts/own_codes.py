"""Codes that are not fitted to the row they stand for: by a fixed rule, or a trained SAE's, with what they explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, topk_sae, weighted_sum
from helpers.models.activations import ActivationStore
from helpers.models.checkpoints import MoELayer
from helpers.parts.explained import Explained
from helpers.parts.inside import SITES, WHICH, LayerRows, derangement, projected, random_directions, random_router
from helpers.settings import one_of
from helpers.study import study
from helpers.study.study import Arm, Judged
from helpers.training import Shuffled

RULES = ("score", "gate")
FITTED = ("none", "one", "each")


# -- coefficients that are not chosen for each row ---------------------------------------------------------------------


def weighed(bench: LayerRows, which: str, rule: str, moe: MoELayer | None = None) -> SparseCodes:
    """Codes by a fixed rule: "score", the router's logit e_j·x (+ bias); "gate", the weight the layer gives the expert.

    Raises `ValueError` for another rule.
    """
    one_of("rule", rule, RULES)
    layer = moe or bench.moe
    choice = bench.choice(which, layer)
    if rule == "gate":
        return choice
    router = Rows(layer.router, layer.bias).to(bench.device).requires_grad_(False)
    return SparseCodes(choice.indices, router.scores(bench.rows(which, "mlp_in", False)).gather(1, choice.indices))


def scaled(
    atoms: Float[Tensor, "n d"], codes: SparseCodes, y: Float[Tensor, "rows d"], fitted: str
) -> Float[Tensor, "n d"]:
    """Atoms times what makes Σ z_j d_j fit `y` best: nothing ("none"), "one" scalar, or one for "each" atom.

    With c_j: Σ_t ‖y_t − Σ_j c_j z_tj d_j‖² is least where A c = b, A_ij = (ZᵀZ)_ij d_i·d_j and b_j = d_j·(Zᵀy)_j.
    """
    one_of("fitted", fitted, FITTED)
    if fitted == "none":
        return atoms
    dense, d = codes.to_dense(len(atoms)).double(), atoms.double()
    a, b = (dense.T @ dense) * (d @ d.T), (d * (dense.T @ y.double())).sum(1)
    if fitted == "one":
        return atoms * float(b.sum() / a.sum())
    used = a.diagonal() > 0
    a.diagonal().add_((~used).double())
    return atoms * torch.linalg.lstsq(a, b[:, None]).solution.to(atoms)


def by_rule(
    bench: LayerRows, seeds: Sequence[int], *, rules: Sequence[str] = RULES, fitted: Sequence[str] = FITTED
) -> dict[tuple[str, str, str, str], Explained]:
    """What fixed coefficients explain (centred), by control, site, rule and what was fitted to the fitting rows.

    Controls: implicit, shuffled, random. Explained is ‖y‖² − ‖y − ŷ‖², which may be negative.
    """
    first, found = bench.directions[:, 0], {}
    n, d = first.shape
    variants: list[tuple[str, Tensor, MoELayer]] = [("implicit", first, bench.moe)]
    for seed in seeds:
        noise = settings.generator(seed)
        variants.append(("random", random_directions(n, d, noise).to(first), random_router(bench.moe, noise)))
        variants.append(("shuffled", first[derangement(n, noise).to(first.device)], bench.moe))
    coded = []
    for rule in rules:
        for control, atoms, moe in variants:
            coded.append((control, rule, atoms, *(weighed(bench, which, rule, moe) for which in WHICH)))
    for site in SITES:
        fitting, judging = (bench.rows(which, site) for which in WHICH)
        for control, rule, atoms, codes, unseen in coded:
            for how in fitted:
                left = judging - weighted_sum(unseen.values, unseen.indices, scaled(atoms, codes, fitting, how))
                explained = judging.double().square().sum(1) - left.double().square().sum(1)
                found.setdefault((control, site, rule, how), []).append(explained)
    return {key: bench.judged(each, key[1], True) for key, each in found.items()}


# -- a dictionary that is trained --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainedSAE:
    """The problem (`study.Problem`) of a TopK SAE of the implicit one's shape (n = experts, k = top_k) at a site.

    It sees the fitting rows divided by one number so that their mean variance is 1, and starts with b_dec at their
    mean. Rates are chosen by what its own codes leave of the `validation` rows.
    """

    bench: LayerRows
    validation: ActivationStore
    site: str
    steps: int
    batch_size: int

    @property
    def asked(self) -> list:
        bench, stores = self.bench, (self.bench.fitting, self.bench.judging, self.validation)
        shape = [bench.moe.n_experts, bench.moe.top_k, self.site]
        return [*shape, [store.key for store in stores], self.steps, self.batch_size]

    @property
    def scale(self) -> float:
        return float(self.bench.fitting.moments(self.site).variance) ** 0.5

    def build(self, seed: int) -> RankOneDictionary:
        moe, b_dec = self.bench.moe, (self.bench.mean(self.site) / self.scale).cpu()
        return topk_sae(moe.d_model, moe.n_experts, moe.top_k, generator=settings.generator(seed), b_dec=b_dec)

    def stream(self, seed: int, device: torch.device) -> Shuffled:
        rows = self.bench.rows("fitting", self.site, False) / self.scale
        identity = f"{self.bench.fitting.key}/{self.site}/{self.scale!r}"
        return Shuffled(rows, batch_size=self.batch_size, seed=seed, fingerprint=identity, device=device)

    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """Sums of squares by article: `total`, and what is explained by its `own` codes and by least squares on its
        `choice`."""
        chosen, own = (self.explained(student, self.bench, own_codes=each) for each in (False, True))
        unseen = self.explained(student, replace(self.bench, judging=self.validation), own_codes=True)
        sums = {"choice": chosen.explained[0], "own": own.explained[0], "total": own.total}
        return Judged(sums, {"fvu": 1 - unseen.fve})

    @torch.no_grad()
    def explained(self, sae: RankOneDictionary, bench: LayerRows, *, own_codes: bool) -> Explained:
        """What it explains of the judging rows: by least squares on its choice, or by its own codes.

        Least squares starts from where the SAE does, its own b_dec, so its own codes can do no better. The total is
        that of all other controls, about the mean of the fitting rows.
        """
        rows, y = bench.rows("judging", self.site, False) / self.scale, bench.rows("judging", self.site)
        if own_codes:
            left = (rows - sae(rows)).double().square().sum(1)
        else:
            rest = rows if sae.b_out is None else rows - sae.b_out
            found = projected(sae.decoder.weight.detach(), sae.encode(rows).indices, rest)[0]
            left = rest.double().square().sum(1) - found
        return bench.judged([y.double().square().sum(1) - self.scale**2 * left], self.site, True)


def best_sae(problem: TrainedSAE, lrs: Sequence[float], seed: int, **options) -> tuple[float, dict[str, Explained]]:
    """The best learning rate of a TopK SAE, and what the SAE explains: `sae` and `sae_own` of the ladder.

    `options` of `study.study`.
    """
    options = {"together": len(lrs), "workers": 0} | options
    arm = Arm(f"SAE of layer {problem.bench.moe.layer}, {problem.site}", TrainedSAE.build)
    tried = study.tune(problem, {"": arm}, sorted(lrs), seed, device=problem.bench.device, **options)[""]
    best = study.choose(tried)
    sums = tried[best].sums
    parts = {"sae": sums["choice"], "sae_own": sums["own"]}
    return best, {name: Explained(part[None], sums["total"]) for name, part in parts.items()}
