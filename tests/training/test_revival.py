"""No straw men: each remedy revives features, or keeps them alive, where its authors say it does.

In a world of 32 features in 32 dimensions (not orthogonal), half of the student's 32 start where they cannot fire. Left
alone they stay dead. `quiet`: encoder rows ×1/100, so that they lose every choice. `deep`: a bias of −4, so that ReLU
hides them too.
"""

from functools import cache

import pytest
import torch

from helpers.dictionary import topk_sae
from helpers.parts.known_truth import KnownTruth, StartingSae, measured
from helpers.parts.worlds import World
from helpers.settings import generator
from helpers.study.scores import evaluate, recovery
from helpers.study.study import Arm, run
from helpers.training import Fresh, fit, remedies

N, D, K, STEPS = 32, 32, 3, 300

REMEDIES = {
    "quiet": {
        "none": remedies.Balance(),
        "auxk": remedies.AuxK(silent_for=20),
        "switch": remedies.Switch(0.1, temperature=0.5),
        "loss_free": remedies.LossFree(0.02),
        "anneal": remedies.Anneal(8.0, over=0.5),
        "resample": remedies.Resample(every=50),
    },
    "deep": {
        "none": remedies.Balance(),
        "ghost": remedies.Ghost(silent_for=20),
        "resample": remedies.Resample(every=50),
        "toward residual": remedies.Resample(every=50, toward="residual"),
    },
}


def student(start, selection_bias, seed, b_dec=None):
    sae = topk_sae(D, N, K, generator=generator(seed + 1), b_dec=b_dec, selection_bias=selection_bias)
    with torch.no_grad():
        if start == "quiet":
            sae.encoder.weight[: N // 2] *= 0.01
        if start == "deep":
            sae.encoder.bias[: N // 2] = -4.0
    return sae


def judged(sae, source):
    """Share of dead features, FVU and share of true features found, on rows no training saw."""
    result = evaluate(sae, source.sample(2000, generator(7)))
    match = recovery(sae.decoder.weight.detach()[result.rates > 0], source.atoms)
    return result.dead, result.fvu, match.found


def source(seed, **more):
    return World(N, D, seed=seed, active=3.0, zipf=0.0, magnitudes="constant", **more)


@cache
def trained(start, name, seed=0):
    given, remedy = source(seed), REMEDIES[start][name]
    sae = student(start, remedy.needs_bias, seed)
    stream = Fresh(given.sample, batch_size=64, fingerprint="revival", seed=seed)
    return judged(fit(sae, stream, steps=STEPS, lr=1e-2, balance=remedy).student, given)


# how much of the dead share may be left, and whether 300 steps are enough for a better reconstruction too
LEFT = {
    "auxk": 0.2,
    "switch": 0.2,
    "loss_free": 0.2,
    "anneal": 0.2,
    "resample": 0.8,
    "toward residual": 0.8,
    "ghost": 0.9,
}
CASES = [(start, name) for start, some in REMEDIES.items() for name in some if name != "none"]


@pytest.mark.parametrize(("start", "name"), CASES)
def test_a_remedy_revives_what_would_stay_dead(start, name):
    (dead, fvu, found), (dead_alone, fvu_alone, found_alone) = trained(start, name), trained(start, "none")
    assert dead_alone > 0.3
    assert dead < LEFT[name] * dead_alone
    if name not in ("anneal", "ghost"):
        assert fvu < fvu_alone
        assert found > found_alone


@cache
def centred(at_mean, seed=0):
    given = source(seed, mean=10.0)
    sae = student("plain", False, seed, given.sample(2000, generator(8)).mean(0) if at_mean else None)
    stream = Fresh(given.sample, batch_size=64, fingerprint="centring", seed=seed)
    return judged(fit(sae, stream, steps=200, lr=3e-3).student, given)


def test_b_dec_at_the_mean_prevents_dead_features_where_the_mean_is_large():
    (dead, fvu, _), (dead_alone, fvu_alone, _) = centred(True), centred(False)
    assert dead_alone > 0.3
    assert dead < 0.1
    assert fvu < fvu_alone


def test_ghosts_and_resampling_revive_and_find_truths_over_five_seeds():
    """Where one feature is active and many die on the way: fewer dead, and more truths found, in the mean of seeds."""
    problem = KnownTruth(World(64, 12, active=3.0, mean=1.0), 64, 1, 400, batch_size=64, n_rows=4000)
    tried = {"none": remedies.Balance(), "ghost": remedies.Ghost(0.1, 20), "resample": remedies.Resample(50, 1.0, 0.7)}
    arms = [Arm(name, StartingSae(), remedy, 2e-2) for name, remedy in tried.items()]
    seen = [run(problem, arms, seed, cache_dir=False) for seed in range(5)]
    by_name = {name: [measured(each[i]) for each in seen] for i, name in enumerate(tried)}
    dead, found = ({n: sum(each[what] for each in by_name[n]) for n in tried} for what in ("dead", "found"))
    assert dead["none"] > 5 * 0.2
    assert dead["ghost"] < 0.75 * dead["none"]
    assert dead["resample"] < 0.7 * dead["none"]
    assert min(found["ghost"], found["resample"]) > found["none"]
