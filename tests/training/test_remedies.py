"""Each remedy against its slow NumPy version, gradients included, and the steps it takes against its paper's words."""

import inspect
import math

import numpy as np
import pytest
import torch

from helpers import settings
from helpers.dictionary import (
    RankOneDictionary,
    Rows,
    Select,
    SparseCodes,
    Trace,
    expander_sae,
    gated_sae,
    sae_to_moe,
    secret_moe,
    topk_sae,
)
from helpers.parts.known_truth import Pinned
from helpers.settings import generator
from helpers.training import Shuffled, fit, remedies
from helpers.training.remedies import Moment, normalised_mse
from tests.reference import losses_numpy as slow

D, N, K, BATCH, VARIANCE = 4, 9, 2, 8, 3.5  # K·BATCH is a power of two: shares are exact in float32, which holds them
SILENT = torch.tensor([0, 100, 3, 99, 250, 0, 100, 1, 5000])  # with silent_for = 100, four are dead: 1, 4, 6, 8
DEAD = [1, 4, 6, 8]


def normal(*shape, seed, scale=1.0):
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def sae(tied=False, n=N, k=K, **more):
    """An SAE away from its symmetric start: encoder ≠ decoder, biases and b_dec ≠ 0."""
    model = topk_sae(D, n, k, generator=generator(1), b_dec=normal(D, seed=2), tied=tied, dtype=torch.float64, **more)
    with torch.no_grad():
        model.encoder.weight.add_(normal(n, D, seed=3, scale=0.4))
        model.encoder.bias.add_(normal(n, seed=4, scale=0.3))
    return model


def moment(model, silent=SILENT, x=None, step=0, steps=100, optimiser=None, dense=True):
    x = normal(BATCH, D, seed=5) if x is None else x
    trace = model.trace(x, score_gradient=dense)
    loss = normalised_mse(trace.output, x, VARIANCE)
    return Moment(model, x, x, trace, loss, silent.clone(), step, steps, optimiser, variance=VARIANCE)


def arrays(model):
    parts = {"e": model.encoder.weight, "beta": model.encoder.bias, "b": model.b_in}
    if model.decoder is not model.encoder:
        parts["d"] = model.decoder.weight
    return {name: part.detach().numpy().copy() for name, part in parts.items()}


def autograd(model):
    parts = {"e": model.encoder.weight, "beta": model.encoder.bias, "b": model.b_in}
    if model.decoder is not model.encoder:
        parts["d"] = model.decoder.weight
    return {
        name: np.zeros(part.shape) if part.grad is None else part.grad.numpy().copy() for name, part in parts.items()
    }


def check(model, value, expected):
    """The remedy's value and its gradient for e, β, d and b_dec, against the slow loss, a function of the arrays."""
    p = arrays(model)
    assert float(value.detach()) == pytest.approx(expected(p), rel=1e-10)
    model.zero_grad()
    value.backward()
    numerical, analytic = slow.gradients(expected, p), autograd(model)
    for name in p:
        np.testing.assert_allclose(analytic[name], numerical[name], atol=1e-7, rtol=1e-5, err_msg=name)
    return analytic


# -- from mixtures of experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 0.6), (2.0, 1.0), (0.1, 3.0)])
def test_switch_and_its_gradient(alpha, temperature, tied):
    model = sae(tied)
    now, remedy = moment(model), remedies.Switch(alpha, temperature)
    chosen = now.trace.codes.indices.numpy()
    x = now.inputs.numpy()
    assert remedy.needs_scores and not remedy.needs_bias
    gradient = check(model, remedy.loss(now), lambda p: slow.switch(p, x, chosen, alpha, temperature))
    assert tied or not gradient["d"].any()  # it moves no decoder
    unchosen = [j for j in range(N) if j not in chosen]
    assert unchosen and np.abs(gradient["e"][unchosen]).min() > 0  # and it reaches features that nobody chose


def test_the_gradient_on_a_score_is_the_derived_one():
    now = moment(sae())
    (found,) = torch.autograd.grad(remedies.Switch(0.3, 0.6).loss(now), now.trace.scores)
    chosen = now.trace.codes.indices.numpy()
    expected = slow.switch_gradient(now.trace.scores.detach().numpy(), chosen, 0.3, 0.6)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_uniform_use_costs_alpha_and_a_single_choice_costs_alpha_n():
    nothing = torch.zeros(4, 8, dtype=torch.float64)
    even, one = torch.arange(8).reshape(4, 2), torch.zeros(4, 1, dtype=torch.long)
    model, values = sae(), []
    for chosen, scores in ((even, nothing), (one, nothing + 50 * torch.eye(8, dtype=torch.float64)[0])):
        trace = Trace(nothing[:, :D], SparseCodes(chosen, chosen.double()), scores)
        now = Moment(model, nothing[:, :D], nothing[:, :D], trace, torch.tensor(0.0), SILENT, 0, 1)
        values.append(float(remedies.Switch(0.3).loss(now)))
    assert values == pytest.approx([0.3, 8 * 0.3])
    np.testing.assert_allclose(remedies.load_shares(even, 8), np.full(8, 1 / 8))
    np.testing.assert_allclose(remedies.load_shares(torch.tensor([[0, 2], [2, 1]]), 4), [0.25, 0.25, 0.5, 0])


@pytest.mark.parametrize("tied", [False, True])
def test_zloss_and_its_gradient(tied):
    model, remedy = sae(tied), remedies.ZLoss(0.02)
    now = moment(model)
    assert remedy.needs_scores
    check(model, remedy.loss(now), lambda p: slow.zloss(p, now.inputs.numpy(), 0.02))


@pytest.mark.parametrize(
    "choices",
    [
        [[0, 1], [0, 2], [0, 1]],  # loads 3, 2, 1, 0, 0; mean 1.2
        [[0, 1], [0, 2], [3, 4], [1, 2], [3, 4]],  # all at the mean: nothing moves
        [[0, 1], [0, 1], [0, 2], [0, 3], [0, 2]],  # loads 5, 2, 2, 1, 0; mean 2
    ],
)
def test_loss_free_moves_each_bias_against_its_load(choices):
    model = secret_moe(4, 4, 5, 2, generator=generator(0), selection_bias=True)
    model.selection_bias += torch.tensor([0.5, -0.25, 0, 0, 1])
    expected = slow.loss_free(model.selection_bias.tolist(), choices, 0.01)
    codes = SparseCodes(torch.tensor(choices), torch.ones(len(choices), 2))
    trace = Trace(torch.zeros(len(choices), 4), codes, torch.zeros(len(choices), 5))
    now = Moment(model, trace.output, trace.output, trace, torch.tensor(0.0), torch.zeros(5).long(), 0, 1)
    remedy = remedies.LossFree(0.01)
    assert remedy.needs_bias and not remedy.needs_scores
    assert remedy.loss(now) == 0
    remedy.after_step(now)
    np.testing.assert_allclose(model.selection_bias, expected, rtol=1e-6)


def test_loads_are_counted_by_expert_where_an_expert_is_a_block_of_atoms():
    rows = [Rows(torch.randn(n, 3, generator=generator(1))) for n in (4, 8, 8)]
    model = RankOneDictionary(*rows[1:], k=1, router=rows[0], expert_rank=2, selection_bias=True)
    x = torch.randn(20, 3, generator=generator(2))
    trace = model.trace(x)
    now = Moment(model, x, x, trace, torch.tensor(0.0), torch.zeros(8).long(), 0, 1)
    load = torch.bincount(trace.scores.argmax(1), minlength=4).float()
    switch = 0.3 * 4 * (load / 20 * trace.scores.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(remedies.Switch(0.3).loss(now), switch)
    torch.testing.assert_close(Pinned().balanced(now), load / 20)
    remedies.LossFree(1.0).after_step(now)
    torch.testing.assert_close(model.selection_bias, torch.sign(load.mean() - load))


def test_loss_free_needs_a_bias_to_move():
    with pytest.raises(ValueError, match="selection_bias=False"):
        remedies.LossFree().after_step(moment(sae()))


# -- AuxK and ghost gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k_aux", [1, 3, 4, 50, None])
def test_auxk_and_its_gradient(k_aux, tied):
    """Top-k_aux among the dead only, ReLU'd, over the residual's own variance, and no gradient through the residual."""
    model = sae(tied)
    now = moment(model, dense=False)
    residual, x = (now.target - now.trace.output).detach().numpy(), now.inputs.numpy()
    wanted = D // 2 if k_aux is None else k_aux
    value = remedies.AuxK(0.7, silent_for=100, k_aux=k_aux).loss(now)
    gradient = check(model, value, lambda p: slow.auxk(p, x, residual, DEAD, wanted, 0.7))
    live = [j for j in range(N) if j not in DEAD]
    assert not gradient["e"][live].any() and not gradient["beta"][live].any()
    assert gradient["e"][DEAD].any()


def test_auxk_clips_dead_pre_activations_at_zero():
    model = sae()
    with torch.no_grad():
        model.encoder.bias[DEAD] = -100.0
    now = moment(model)
    value = remedies.AuxK(0.7, 100, 4).loss(now)
    e = now.residual
    assert float(value.detach()) == pytest.approx(0.7 * float(e.square().sum() / (e - e.mean(0)).square().sum()))
    value.backward()
    assert model.encoder.weight.grad is None or not model.encoder.weight.grad.any()


def gated(seed=0):
    """A Gated SAE away from its start, and its numbers by name."""
    model = gated_sae(D, N, K, generator=generator(seed), b_dec=normal(D, seed=seed + 2), dtype=torch.float64)
    router, encoder = model.router, model.encoder
    parts = {"w": router.weight, "gamma": router.bias, "r": encoder.log_scale, "mu": encoder.bias}
    with torch.no_grad():
        for i, part in enumerate(parts.values()):
            part.add_(normal(*part.shape, seed=seed + 10 + i, scale=0.4))
    return model, parts | {"d": model.decoder.weight, "b": model.b_out}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("gates", ["some", "none", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_gated_and_its_gradient(seed, gates, frozen):
    model, parts = gated(seed)
    with torch.no_grad():
        parts["gamma"].add_({"some": 0.0, "none": -50.0, "all": 50.0}[gates])
    now, remedy = moment(model, dense=False), remedies.Gated(0.7, frozen=frozen)
    p = {name: part.detach().numpy().copy() for name, part in parts.items()}
    fixed = {"d": p["d"].copy(), "b": p["b"].copy()} if frozen else {}
    x = now.inputs.numpy()

    def expected(p):
        error = ((x - slow.gated_output(p, x)) ** 2).sum() / (len(x) * VARIANCE)
        return error + slow.gated(p, x, 0.7, VARIANCE, **fixed)

    value = now.loss + remedy.loss(now)
    assert float(value.detach()) == pytest.approx(expected(p), rel=1e-10)
    value.backward()
    for name, numerical in slow.gradients(expected, p).items():
        analytic = np.zeros_like(p[name]) if parts[name].grad is None else parts[name].grad.numpy()
        np.testing.assert_allclose(analytic, numerical, atol=2e-6, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("k", [1, 3, N])
@pytest.mark.parametrize("widths", [(1,), (2, 5), tuple(range(1, N))])
def test_nested_and_its_gradient(widths, k):
    model = sae(k=k)
    now = moment(model)
    value = remedies.Nested(widths).loss(now)
    check(model, value, lambda p: slow.nested(p, now.inputs.numpy(), k, widths, VARIANCE))


def test_nested_counts_what_sees_every_input():
    """A shared part belongs to every prefix."""
    model = secret_moe(D, D, N, K, generator=generator(0), dtype=torch.float64)
    now = moment(model)
    prefix = now.trace.codes.values.where(now.trace.codes.indices < 4, 0)
    output = model.decoder.combine(prefix, now.trace.codes.indices) + model.shared(now.inputs)
    expected = normalised_mse(output, now.target, VARIANCE)
    torch.testing.assert_close(remedies.Nested((4,)).loss(now), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_ghost_and_its_gradient(tied):
    """Scale ‖e‖/2‖g‖ for each sample, then to the main loss; neither scale nor the residual has a gradient."""
    model = sae(tied)
    now = moment(model, dense=False)
    residual, x = (now.target - now.trace.output).detach().numpy(), now.inputs.numpy()
    p = arrays(model)
    scales = slow.ghost_scales(p, x, residual, DEAD)
    assert max(scales) > 2 * min(scales)  # one scale for all samples would be another loss
    main = slow.reconstruction(p, x, K, VARIANCE)
    assert float(now.loss.detach()) == pytest.approx(main, rel=1e-10)
    factor = main / slow.ghost_error(p, x, residual, DEAD, scales)
    value = remedies.Ghost(0.4, silent_for=100).loss(now)
    gradient = check(model, value, lambda p: 0.4 * factor * slow.ghost_error(p, x, residual, DEAD, scales))
    live = [j for j in range(N) if j not in DEAD]
    assert not gradient["e"][live].any() and not gradient["beta"][live].any()
    assert np.abs(gradient["e"][DEAD]).sum(1).min() > 0  # every dead feature is pulled, however negative its z


@pytest.mark.parametrize("level", [1000.0, -1000.0])
def test_ghost_does_not_overflow(level):
    """A common shift of the dead pre-activations drops out in the rescaling, so nothing may change."""
    found = []
    for shift in (0.0, level):
        model = sae()
        with torch.no_grad():
            model.encoder.bias[DEAD] += shift
            if shift > 0:
                model.k = 1
        x = normal(BATCH, D, seed=5)
        y = normal(BATCH, D, seed=6)
        trace = Trace(y, SparseCodes(torch.zeros(BATCH, 1).long(), torch.ones(BATCH, 1)), torch.zeros(BATCH, N))
        now = Moment(model, x, x, trace, normalised_mse(y, x, VARIANCE), SILENT, 0, 1)
        remedies.Ghost(1.0, 100).loss(now).backward()
        found.append(autograd(model))
    for name in found[0]:
        assert np.isfinite(found[1][name]).all()
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("remedy", [remedies.AuxK(silent_for=100), remedies.Ghost(silent_for=100)])
def test_nothing_is_added_while_nothing_is_dead(remedy):
    assert remedy.loss(moment(sae(), torch.full((N,), 99))) == 0
    assert remedy.loss(moment(sae(), SILENT)) > 0


# -- resampling --------------------------------------------------------------------------------------------------------


def resampled(remedy, model=None, silent=SILENT, done=50, steps=100, x=None, steps_before=3):
    """The state before and behind the step that makes `done` steps: arrays, Adam's moments, and the moment itself."""
    model = sae() if model is None else model
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps_before):
        optimiser.zero_grad()
        model(normal(BATCH, D, seed=7)).square().sum().backward()
        (sum((p * p).sum() for p in model.parameters())).backward()
        optimiser.step()
    now = moment(model, silent, x, step=done - 1, steps=steps, optimiser=optimiser)
    before = arrays(model), _moments(model, optimiser)
    remedy.after_step(now)
    return now, before, (arrays(model), _moments(model, optimiser))


def _moments(model, optimiser):
    parts = {"e": model.encoder.weight, "beta": model.encoder.bias, "d": model.decoder.weight}
    return {
        (name, moment): optimiser.state[part][moment].numpy().copy()
        for name, part in parts.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("toward", ["input", "residual"])
@pytest.mark.parametrize("tied", [False, True])
def test_resampling_starts_dead_features_at_samples(tied, toward):
    remedy = remedies.Resample(every=50, scale=0.3, toward=toward)
    silent = torch.tensor([0, 25, 3, 24, 250, 0, 25, 1, 5000])  # half of 50
    now, (old, adam_old), (new, adam) = resampled(remedy, sae(tied), silent)
    live = [j for j in range(N) if j not in DEAD]
    starts = now.residual.numpy() if toward == "residual" else now.inputs.numpy() - old["b"]
    starts = starts / np.linalg.norm(starts, axis=1, keepdims=True)
    length = 0.3 * np.mean([np.linalg.norm(old["e"][j]) for j in live])
    for j in DEAD:
        row = new["e" if tied else "d"][j]
        picked = np.abs(starts - row).max(1).argmin()
        np.testing.assert_allclose(row, starts[picked], atol=1e-12)
        if not tied:
            np.testing.assert_allclose(new["e"][j], length * starts[picked], atol=1e-12)
        assert new["beta"][j] == 0
    for name in set(old) - {"b"}:
        np.testing.assert_array_equal(new[name][live], old[name][live])
    np.testing.assert_array_equal(new["b"], old["b"])
    for key, values in adam.items():
        assert not values[DEAD].any()
        assert adam_old[key][DEAD].any()
        np.testing.assert_array_equal(values[live], adam_old[key][live])
    assert now.silent.tolist() == [0, 0, 3, 24, 0, 0, 0, 1, 0]


def test_resampling_draws_inputs_in_proportion_to_the_squared_loss():
    n = 60_000
    model = topk_sae(D, n, 1, generator=generator(0), dtype=torch.float64)
    silent = torch.full((n,), 1000)
    silent[0] = 0
    x = normal(5, D, seed=8) * torch.tensor([0.5, 1.0, 1.3, 1.5, 1.7], dtype=torch.float64)[:, None]
    with torch.no_grad():
        model.encoder.weight.mul_(1e-3)  # so that the loss is that of the input itself, nearly
    now = moment(model, silent, x, step=9, steps=100)
    squared = now.residual.square().sum(1).numpy()
    chances = squared**2 / (squared**2).sum()
    remedies.Resample(every=10).after_step(now)
    drawn = (model.decoder.weight.detach()[1:] @ torch.nn.functional.normalize(x, dim=1).T).argmax(1)
    counts = np.bincount(drawn.numpy(), minlength=5)
    z = (counts - (n - 1) * chances) / np.sqrt((n - 1) * chances * (1 - chances))
    assert np.abs(z).max() < 4
    assert np.abs(chances - squared / squared.sum()).max() > 0.02  # ∝ loss would be told from ∝ loss²


def test_resampling_draws_anew_each_time_and_by_its_seed():
    n = 200
    silent = torch.full((n,), 1000)
    silent[0] = 0

    def drawn(seed, done):
        now = moment(sae(n=n), silent, step=done - 1, steps=100)
        remedies.Resample(every=10, seed=seed).after_step(now)
        return now.dictionary.decoder.weight.detach()

    first = drawn(0, 10)
    torch.testing.assert_close(first, drawn(0, 10))
    assert not torch.allclose(first, drawn(0, 20))
    assert not torch.allclose(first, drawn(1, 10))


@pytest.mark.parametrize(
    ("done", "acts"), [(1, False), (49, False), (50, True), (80, False), (100, True), (150, False)]
)
def test_resampling_acts_at_its_multiples_and_up_to_its_end(done, acts):
    now, (old, _), (new, _) = resampled(remedies.Resample(every=50, until=0.5), done=done, steps=200)
    assert (not np.array_equal(old["d"], new["d"])) == acts
    assert (now.silent[4] == 0) == acts


def test_resampling_where_nothing_or_everything_is_dead():
    _, (old, _), (new, _) = resampled(remedies.Resample(every=50), silent=torch.full((N,), 24))
    assert all(np.array_equal(old[name], new[name]) for name in old)
    now, (old, _), (new, _) = resampled(remedies.Resample(every=50, scale=0.3), silent=torch.full((N,), 25))
    mean = np.linalg.norm(old["e"], axis=1).mean()
    np.testing.assert_allclose(np.linalg.norm(new["e"], axis=1), 0.3 * mean)
    assert not now.silent.any()


def test_resampling_a_mixture_with_shared_parameters_moves_its_router_too():
    moe = sae_to_moe(topk_sae(D, N, K, generator=generator(1), b_dec=normal(D, seed=2), dtype=torch.float64))
    now = moment(moe, step=49)
    remedies.Resample(every=50).after_step(now)
    assert moe.router.weight is moe.encoder.weight
    assert not now.silent[DEAD].any()


# -- k-annealing, and combinations -------------------------------------------------------------------------------------


def test_resampling_a_gated_sae_opens_its_gates_too():
    model, parts = gated()
    before = {name: part.detach().clone() for name, part in parts.items()}
    now = moment(model, step=249, steps=10_000, dense=False)
    remedies.Resample(every=250, seed=1).after_step(now)
    dead = torch.tensor([4, 8])  # silent for 125 steps
    for name in ("gamma", "mu"):
        assert not parts[name][dead].any() and torch.equal(parts[name][0], before[name][0])
    assert not torch.equal(parts["w"][dead], before["w"][dead])


def test_annealing_falls_from_its_start_to_k():
    remedy = remedies.Anneal(4, over=0.5)
    assert [remedy.k_at(8, done) for done in (0.0, 0.25, 0.5, 0.75, 1.0)] == [32, 20, 8, 8, 8]
    assert [remedies.Anneal(2.5, over=1.0).k_at(4, done) for done in (0.0, 0.5, 1.0)] == [10, 7, 4]
    ks = [remedy.k_at(3, done) for done in np.linspace(0, 1, 101)]
    assert sorted(ks, reverse=True) == ks and set(ks) == set(range(3, 13))
    assert remedies.Anneal(1.0).k_at(8, 0.1) == 8


class Watch(remedies.Balance):
    """Notes how many are chosen and what `dictionary.k` says in the step and behind it."""

    def __init__(self, k_at):
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "k_at", k_at)

    def loss(self, now):
        self.seen.append((now.step, now.trace.codes.indices.shape[1], now.dictionary.k))
        return 0.0

    def after_step(self, now):
        assert now.dictionary.k == self.seen[-1][2]


def test_fit_chooses_as_many_as_the_remedy_says_and_restores_k():
    model, watch = sae(n=9, k=3), Watch(remedies.Anneal(4, over=0.5).k_at)
    fit(model, Shuffled(normal(64, D, seed=9), batch_size=16), steps=8, balance=watch)
    assert [chosen for _, chosen, _ in watch.seen] == [9, 9, 8, 5, 3, 3, 3, 3]  # 12 and 10 are more than there are
    assert {k for *_, k in watch.seen} == {3}
    assert model.k == 3


@pytest.mark.parametrize("start, stop", [(0.0, 0.3), (0.3, 0.6), (0.6, 1.0)])
def test_during_is_inert_outside_its_window(start, stop):
    what = remedies.Together(remedies.Switch(0.3), remedies.Anneal(4, over=1.0), remedies.Resample(every=1, until=1.0))
    limited = remedies.During(what, start, stop)
    assert limited.needs_scores and not limited.needs_bias
    assert remedies.During(remedies.LossFree()).needs_bias
    for step in range(10):
        inside = start <= step / 10 < stop
        model, now = (m := sae()), moment(m, step=step, steps=10)
        before = arrays(model)["d"]
        assert limited.loss(now) == (what.loss(now) if inside else 0)
        assert limited.k_at(2, step / 10) == (what.k_at(2, step / 10) if inside else 2)
        limited.after_step(now)
        assert (not np.array_equal(arrays(model)["d"], before)) == inside


def test_together_sums_losses_takes_the_largest_k_and_does_all_steps():
    parts = [remedies.Switch(0.3, 0.7), remedies.AuxK(0.5), remedies.Ghost(0.2), remedies.Anneal(3), remedies.Anneal(2)]
    both, now = remedies.Together(*parts), moment(sae())
    added = [float(torch.as_tensor(part.loss(now)).detach()) for part in parts]
    assert min(added[:3]) > 0 and float(both.loss(now).detach()) == pytest.approx(sum(added))
    assert both.k_at(4, 0.0) == 12
    assert both.needs_scores and not both.needs_bias
    assert not remedies.Together(remedies.AuxK(), remedies.Anneal()).needs_scores
    assert remedies.Together(remedies.AuxK(), remedies.LossFree()).needs_bias
    model = sae(selection_bias=True)
    now = moment(model, step=49)
    remedies.Together(remedies.LossFree(0.1), remedies.Resample(every=50)).after_step(now)
    assert model.selection_bias.any() and not now.silent[DEAD].any()
    assert remedies.Together(remedies.Balance()).loss(now) == 0


def test_a_balance_does_nothing_by_default():
    remedy, now = remedies.Balance(), moment(sae())
    before = arrays(now.dictionary)
    remedy.after_step(now)
    assert (remedy.loss(now), remedy.k_at(7, 0.5)) == (0, 7)
    assert all(np.array_equal(before[name], values) for name, values in arrays(now.dictionary).items())
    assert now.dead(100).tolist() == DEAD
    assert not now.residual.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: remedies.Switch(temperature=0), "temperature=0"),
        (lambda: remedies.Switch(temperature=math.nan), "temperature=nan"),
        (lambda: remedies.LossFree(0), "gamma=0"),
        (lambda: remedies.LossFree(-1e-3), "gamma=-0.001"),
        (lambda: remedies.AuxK(silent_for=0), "silent_for=0"),
        (lambda: remedies.AuxK(k_aux=0), "k_aux=0"),
        (lambda: remedies.Ghost(silent_for=-1), "silent_for=-1"),
        (lambda: remedies.Resample(every=0), "every=0"),
        (lambda: remedies.Resample(scale=0.0), "scale=0.0"),
        (lambda: inspect.unwrap(remedies.Resample)(toward="mean"), "toward='mean'.*'input', 'residual'"),
        (lambda: remedies.Anneal(start=0.5), "start=0.5"),
        (lambda: remedies.Anneal(over=0.0), "over=0.0"),
        (lambda: remedies.Anneal(over=1.5), "over=1.5"),
        (lambda: remedies.Gated(0.0), "sparsity=0.0"),
        (lambda: remedies.Gated(1.0).loss(moment(sae())), r"Gated\(sparsity=1.0.*'select': 'token'"),
        (lambda: remedies.Nested(()), r"widths=\(\)"),
        (lambda: remedies.Nested((4, 4)), r"widths=\(4, 4\)"),
        (lambda: remedies.Nested((0, 4)), r"widths=\(0, 4\)"),
        (lambda: remedies.Nested((4, N)).loss(moment(sae())), r"widths=\(4, 9\).*less than 9"),
        (lambda: remedies.During(remedies.Switch(), 0.5, 0.5), "start=0.5, stop=0.5"),
        (lambda: remedies.During(remedies.Switch(), -0.1, 0.5), "start=-0.1"),
        (lambda: remedies.During(remedies.Switch(), 0.1, 1.1), "stop=1.1"),
    ],
)
def test_bad_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- where nothing is left to explain ----------------------------------------------------------------------------------

ACTING = [remedies.AuxK(), remedies.Ghost(), remedies.Resample(every=1), remedies.Resample(every=1, toward="residual")]


@pytest.mark.parametrize("remedy", ACTING)
@pytest.mark.parametrize("error", ["none", "rounding", "the same everywhere"])
def test_a_perfect_batch_is_left_alone(remedy, error):
    model = sae()
    x = 1e3 + normal(BATCH, D, seed=5)
    off = {"none": 0.0, "rounding": 1e-13 * normal(BATCH, D, seed=6), "the same everywhere": 0.1}[error]
    trace = Trace(x - off, SparseCodes(torch.zeros(BATCH, 1).long(), torch.ones(BATCH, 1)), torch.zeros(BATCH, N))
    now = Moment(model, x, x, trace, normalised_mse(trace.output, x, VARIANCE), SILENT.clone(), 0, 100)
    before = arrays(model)
    value = torch.as_tensor(remedy.loss(now))
    remedy.after_step(now)
    for rows in (model.encoder, model.decoder):
        assert torch.isfinite(rows.weight).all()
    if value.requires_grad:
        value.backward()
        assert all(np.isfinite(gradient).all() for gradient in autograd(model).values())
    assert torch.isfinite(value)
    if error != "the same everywhere" or isinstance(remedy, remedies.AuxK):  # an offset is no variance, but a residual
        assert value == 0 and now.silent.equal(SILENT)
        assert all(np.array_equal(old, new) for old, new in zip(before.values(), arrays(model).values(), strict=True))


def jumping():
    return topk_sae(D, N, K, generator=generator(1), select=Select("threshold", N, threshold=0.1), dtype=torch.float64)


ALWAYS = {
    "gated": (lambda: gated()[0], remedies.Gated(0.7)),
    "nested": (sae, remedies.Nested((2, 5))),
    "switch": (sae, remedies.Switch(0.3)),
    "l0": (jumping, remedies.TargetL0(2.0)),
}
"""Remedies whose losses are about more than the residual, each with a model for it."""


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("rows", ["perfect", "zeros", "one row"])
def test_losses_that_are_not_about_the_residual_are_finite_on_a_perfect_batch(name, rows):
    model, remedy = ALWAYS[name][0](), ALWAYS[name][1]
    x = {"perfect": normal(BATCH, D, seed=5), "zeros": torch.zeros(BATCH, D).double(), "one row": normal(1, D, seed=5)}
    now = moment(model, x=x[rows].expand(BATCH, D), dense=remedy.needs_scores)
    imperfect = remedy.loss(now)
    now.target = now.trace.output.detach()
    now.loss = normalised_mse(now.trace.output, now.target, VARIANCE)
    value = torch.as_tensor(remedy.loss(now))
    assert now.loss == 0 and torch.isfinite(value) and value >= 0
    assert name in ("gated", "nested") or value == imperfect  # they see scores alone
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    before = arrays(model) if name != "gated" else {}
    remedy.after_step(now)
    assert now.silent.equal(SILENT)
    assert all(np.array_equal(old, new) for old, new in zip(before.values(), arrays(model).values(), strict=False))


RESTS = (
    ALWAYS
    | {
        "none": (sae, remedies.Balance()),
        "auxk": (sae, remedies.AuxK(silent_for=5)),
        "ghost": (sae, remedies.Ghost(silent_for=5)),
    }
    | {f"resample, {toward}": (sae, remedies.Resample(every=5, toward=toward)) for toward in ("input", "residual")}
)


@pytest.mark.parametrize("name", RESTS)
@pytest.mark.parametrize("bad", ["not a number", "infinite", "1e30"])
@pytest.mark.parametrize("late", [False, True])
def test_rows_that_cannot_be_learned_from_stop_the_training_by_name(name, bad, late):
    """Early ones are in the batches that the variance is of; late ones come where no loss is recorded."""
    model, remedy = RESTS[name][0]().float(), RESTS[name][1]
    x = torch.randn(80 * BATCH, D, generator=generator(5))
    order = torch.randperm(len(x), generator=generator(settings.mix(0, 0)))  # of `Shuffled`
    x[order[(33 if late else 1) * BATCH]] *= {"not a number": torch.nan, "infinite": torch.inf, "1e30": 1e30}[bad]
    with pytest.raises((ValueError, FloatingPointError), match="targets that vary and are finite|all rows are finite"):
        fit(model, Shuffled(x, batch_size=BATCH), steps=60, balance=remedy)


def test_ghosts_of_zero_atoms_are_nothing():
    model = sae()
    with torch.no_grad():
        model.decoder.weight[DEAD] = 0
    value = remedies.Ghost().loss(moment(model, dense=False))
    value.backward()
    assert torch.isfinite(value) and all(np.isfinite(gradient).all() for gradient in autograd(model).values())


@pytest.mark.parametrize("toward", ["input", "residual"])
def test_a_packed_atom_without_a_place_for_its_sample_stays(toward):
    model = expander_sae(torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]]), 4, 1, generator=generator(0))
    x = torch.tensor([[3.0, 1, 0, 0], [2, 5, 0, 0]])
    nothing = Trace(torch.zeros(2, 4), SparseCodes(torch.zeros(2, 1).long(), torch.ones(2, 1)), torch.zeros(2, 4))
    silent, before = torch.tensor([0, 9, 0, 9]), model.decoder.weight.detach().clone()
    remedies.Resample(every=1, toward=toward).after_step(Moment(model, x, x, nothing, x.sum(), silent, 0, 100))
    after = model.decoder.weight.detach()
    torch.testing.assert_close(after.norm(dim=1), torch.ones(4))
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(after[1], before[1])
    assert silent.tolist() == [0, 0, 0, 9]
