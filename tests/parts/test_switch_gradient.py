"""The gradient of the Switch loss written out, what holds of it, and that holding parts of it back does just that."""

import numpy as np
import pytest
import torch

from helpers.dictionary import topk_sae
from helpers.parts.known_truth import KnownTruth, Pinned, StartingSae, measured, pull
from helpers.parts.worlds import World, random_atoms
from helpers.settings import generator
from helpers.study.study import Arm, run
from helpers.training import remedies
from helpers.training.remedies import Moment

DOUBLE = torch.float64


def sae(n=12, d=5, k=3):
    model = topk_sae(d, n, k, generator=generator(0), b_dec=0.3 * torch.ones(d, dtype=DOUBLE), dtype=DOUBLE)
    with torch.no_grad():
        model.encoder.bias.copy_(torch.linspace(-0.5, 0.5, n))
    return model


def moment(model, remedy, step=3):
    x = torch.randn(40, model.d_in, generator=generator(1), dtype=DOUBLE)
    trace = model.trace(x, score_gradient=remedy.needs_scores)
    silent = torch.zeros(model.n_atoms, dtype=torch.long)
    return Moment(model, x, x, trace, remedies.normalised_mse(trace.output, x, 1.0), silent, step, 10)


def gradients(remedy, **how):
    """What the remedy alone gives each parameter; zeros where it gives nothing."""
    model = sae()
    remedy.loss(moment(model, remedy, **how)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in dict(model.named_parameters()).items()
    }


def slow_pull(scores, load, alpha, temperature):
    """Sample by sample from the softmax's Jacobian ∂P_i/∂z_bj = p_i (δ_ij − p_j)/(T τ)."""
    out = np.zeros_like(scores)
    batch, n = scores.shape
    for b in range(batch):
        p = np.exp(scores[b] / temperature)
        p /= p.sum()
        for j in range(n):
            for i in range(n):
                out[b, j] += alpha * n * load[i] * p[i] * ((i == j) - p[j]) / (batch * temperature)
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_pull_is_the_gradient_of_the_switch_loss(temperature):
    remedy = remedies.Switch(0.7, temperature)
    now = moment(sae(), remedy)
    scores = now.trace.scores.detach().requires_grad_()
    now.trace = type(now.trace)(now.trace.output, now.trace.codes, scores)
    remedy.loss(now).backward()
    load = remedies.load_shares(now.trace.codes.indices, scores.shape[1], DOUBLE)
    force = pull(scores.detach(), load, 0.7, temperature)
    torch.testing.assert_close(force, scores.grad, rtol=0, atol=1e-15)
    slow = slow_pull(scores.detach().numpy(), load.numpy(), 0.7, temperature)
    np.testing.assert_allclose(force.numpy(), slow, rtol=0, atol=1e-14)


def test_the_pull_sums_to_zero_and_lifts_whatever_bears_no_load():
    scores = 2 * torch.randn(30, 8, generator=generator(2), dtype=DOUBLE)
    load = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=DOUBLE)
    force = pull(scores, load, 0.1)
    torch.testing.assert_close(force.sum(1), torch.zeros(30, dtype=DOUBLE), rtol=0, atol=1e-15)
    assert (force[:, 3:] < 0).all(), "a dead feature is lifted on every sample"
    assert (force[:, 0] > 0).all(), "the busiest one is pushed down on every sample"
    p = scores.softmax(1)[:, 3:]
    ratio = force[:, 3:] / p
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # in proportion to its softmax mass


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_unrestricted_it_is_the_switch_loss_for_every_parameter(temperature):
    whole, ours = (gradients(make(0.3, temperature)) for make in (remedies.Switch, Pinned))
    assert {name for name, g in whole.items() if g.any()} == {"encoder.weight", "encoder.bias", "b_in"}
    for name, expected in whole.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-15, msg=name)


def test_the_places_add_up_and_each_reaches_its_own_parameter_only():
    whole = gradients(Pinned(0.3))
    reached = {"rows": {"encoder.weight"}, "bias": {"encoder.bias"}, "b_dec": {"b_in"}}
    reached["encoder"] = reached["rows"] | reached["bias"]
    for place, names in reached.items():
        for name, got in gradients(Pinned(0.3, acts_on=place)).items():
            expected = whole[name] if name in names else torch.zeros_like(got)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15, msg=f"{place}: {name}")


def test_the_halves_add_up_and_each_has_one_sign():
    whole, lift, push = (gradients(Pinned(0.3, half=half))["encoder.bias"] for half in ("both", "lift", "push"))
    torch.testing.assert_close(lift + push, whole)
    assert (lift <= 0).all() and (push >= 0).all() and lift.any() and push.any()


def test_permuted_loads_are_the_same_numbers_in_an_order_that_changes_with_the_step():
    own = Pinned().balanced(moment(sae(), Pinned()))
    permuted = Pinned(load="permuted")
    first, again, next_step = (permuted.balanced(moment(sae(), permuted, step=s)) for s in (3, 3, 4))
    torch.testing.assert_close(first.sort().values, own.sort().values)
    assert torch.equal(first, again) and not torch.equal(first, own) and not torch.equal(first, next_step)
    other_seed = Pinned(load="permuted", seed=1)
    assert not torch.equal(first, other_seed.balanced(moment(sae(), other_seed)))


def test_random_loads_are_those_of_a_dictionary_that_stays_and_that_the_student_does_not_change():
    remedy = Pinned(load="random", seed=5)
    model = sae()
    now = moment(model, remedy)
    rows = random_atoms(12, 5, generator(5)).to(DOUBLE)
    chosen = ((now.inputs - model.b_in) @ rows.T).topk(3, dim=1).indices
    expected = torch.bincount(chosen.flatten(), minlength=12) / (40 * 3)
    before = remedy.balanced(now)
    torch.testing.assert_close(before, expected.to(DOUBLE))
    with torch.no_grad():
        model.encoder.weight.mul_(-1)
    torch.testing.assert_close(remedy.balanced(moment(model, remedy)), before)


def test_what_cannot_act_is_refused():
    for wrong in ({"alpha": 0}, {"temperature": -1.0}, {"acts_on": "decoder"}, {"half": "none"}, {"load": "mine"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Pinned(**wrong)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_pinned_without_a_restriction_trains_as_switch_does():
    problem = KnownTruth(World(24, 8, active=2.0), n_features=24, k=2, steps=60, batch_size=32, n_rows=400)
    tried = (remedies.Switch(0.1), Pinned(0.1), remedies.Balance())
    arms = [Arm("", StartingSae(), remedy, 1e-2) for remedy in tried]
    switch, pinned, none = (measured(each)["fvu"] for each in run(problem, arms, 0, cache_dir=False))
    assert pinned == pytest.approx(switch, rel=1e-3)
    assert pinned != pytest.approx(none, rel=1e-3)
