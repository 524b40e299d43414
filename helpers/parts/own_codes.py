"""Codes that are not fitted to the row they stand for: by a fixed rule, or a trained SAE's, with what they explain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, weighted_sum
from helpers.models.checkpoints import MoELayer
from helpers.parts.explained import Explained
from helpers.parts.inside import SITES, WHICH, LayerRows, derangement, projected, random_router
from helpers.parts.language_model import Sae, SiteRows
from helpers.parts.worlds import random_atoms
from helpers.settings import one_of
from helpers.study import study
from helpers.study.scores import by_group
from helpers.study.study import Arm, Judged

RULES = ("score", "gate")
FITTED = ("none", "one", "each")


# -- coefficients that are not chosen for each row ---------------------------------------------------------------------


def weighed(bench: LayerRows, which: str, rule: str, moe: MoELayer | None = None) -> SparseCodes:
    """Codes by a fixed rule: "score", the router's logit e_j·x (+ bias); "gate", the weight the layer gives it."""
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


def by_rule(bench: LayerRows, seeds: Sequence[int]) -> dict[tuple[str, str, str, str], Explained]:
    """What fixed coefficients explain (centred), by control (implicit, shuffled, random), site, rule and what was
    fitted to the fitting rows. Explained is ‖y‖² − ‖y − ŷ‖², which may be negative."""
    first, found = bench.directions[:, 0], {}
    n, d = first.shape
    variants: list[tuple[str, Tensor, MoELayer]] = [("implicit", first, bench.moe)]
    for seed in seeds:
        noise = settings.generator(seed)
        variants.append(("random", random_atoms(n, d, noise).to(first), random_router(bench.moe, noise)))
        variants.append(("shuffled", first[derangement(n, noise).to(first.device)], bench.moe))
    coded = []
    for rule in RULES:
        for control, atoms, moe in variants:
            coded.append((control, rule, atoms, *(weighed(bench, which, rule, moe) for which in WHICH)))
    for site in SITES:
        fitting, judging = (bench.rows(which, site) for which in WHICH)
        for control, rule, atoms, codes, unseen in coded:
            for how in FITTED:
                left = judging - weighted_sum(unseen.values, unseen.indices, scaled(atoms, codes, fitting, how))
                explained = judging.double().square().sum(1) - left.double().square().sum(1)
                found.setdefault((control, site, rule, how), []).append(explained)
    return {key: bench.judged(each, key[1], True) for key, each in found.items()}


# -- a dictionary that is trained --------------------------------------------------------------------------------------


class TrainedSAE(SiteRows):
    """The problem of a TopK SAE at a site of the layer, judged as the ladder's controls are.

    Train rows are those that fit the controls, test rows those that judge them; rates are chosen by what the SAE's own
    codes leave of the validation rows.
    """

    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """Sums of squares by article: `total`, and what is explained by its `own` codes and by least squares on its
        `choice`."""
        unseen = self.explained(student, "validation")
        return Judged(self.explained(student, "test"), {"fvu": 1 - float(unseen["own"].sum() / unseen["total"].sum())})

    @torch.no_grad()
    def explained(self, sae: RankOneDictionary, split: str) -> dict[str, Float[np.ndarray, " articles"]]:
        """The total is that of all other controls, about the mean of the train rows. Least squares starts from where
        the SAE does, its own b_dec, so its own codes can do no better."""
        rows = self.rows(split).to(sae.b_out)
        rest, total = rows - sae.b_out, (rows - self.mean.to(rows)).double().square().sum(1)
        found = projected(sae.decoder.weight, sae.encode(rows).indices, rest)[0]
        left = {"choice": rest.double().square().sum(1) - found, "own": (rows - sae(rows)).double().square().sum(1)}
        sums = {"total": total} | {name: total - each for name, each in left.items()}
        return {name: by_group(each, self.store(split).article) for name, each in sums.items()}


def best_sae(
    problem: TrainedSAE, shape: tuple[int, int], lrs: Sequence[float], seed: int, **options
) -> tuple[float, dict[str, Explained]]:
    """The best learning rate of a TopK SAE of the implicit one's `shape` (n = experts, k = top_k), whose b_dec starts
    at the mean, and what the SAE explains: `sae` and `sae_own` of the ladder. `options` of `study.study`."""
    arm = Arm(f"SAE, {problem.site}", Sae(*shape, centred=True))
    tried = study.tune(problem, {"": arm}, sorted(lrs), seed, **{"together": len(lrs), "workers": 0} | options)[""]
    sums = tried[best := study.choose(tried)].sums
    parts = {"sae": sums["choice"], "sae_own": sums["own"]}
    return best, {name: Explained(part[None], sums["total"]) for name, part in parts.items()}
