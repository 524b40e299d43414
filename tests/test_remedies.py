"""Trials of remedies: settings do not see each other, starts are as they are called, outcomes are the student's own."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from helpers import losses, remedies
from helpers.remedies import Outcome, Problem, Setting, student, trial
from tests.reference import dictionary_numpy
from tests.reference.metrics_numpy import slow_recovery

PROBLEM = Problem(
    n_features=24, k=3, steps=40, n_true=16, d=8, batch_size=32, n_rows=300, world={"active": 3.0, "mean": 2.0}
)
GIVEN = {
    "none": Setting(),
    "switch": Setting(losses.switch(0.1)),
    "auxk": Setting(losses.auxk(silent_for=4), lr=3e-3, centred=True),
    "resample": Setting(losses.resample(every=10), start="untied"),
    "loss_free": Setting(losses.loss_free(0.01), start="small"),
    "anneal": Setting(losses.anneal(4), start="large"),
}


def numbers(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(outcome).items() if name != "seconds"}


@pytest.fixture(scope="module")
def company():
    """All settings trained together, with what `judge` was given for each."""
    given, judge = [], remedies.judge

    def watched(*arguments):
        given.append(arguments)
        return judge(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remedies, "judge", watched)
        outcomes = trial(PROBLEM, 1, GIVEN, cache_dir=False)
    return outcomes, dict(zip(outcomes, given, strict=True))


@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_ends_the_same_alone_and_in_company(company, name):
    alone = trial(PROBLEM, 1, {name: GIVEN[name]}, cache_dir=False)[name]
    np.testing.assert_array_equal(*(list(numbers(each).values()) for each in (alone, company[0][name])))
    assert alone.seconds > 0


def test_settings_and_seeds_end_differently(company):
    ends = [tuple(numbers(outcome).values()) for outcome in company[0].values()]
    ends.append(tuple(numbers(trial(PROBLEM, 2, {"none": Setting()}, cache_dir=False)["none"]).values()))
    assert len(set(ends)) == len(GIVEN) + 1


@pytest.mark.parametrize("name", ["none", "auxk", "loss_free"])
def test_outcomes_are_those_of_a_slow_recomputation(company, name):
    outcome, (sae, validation, test, truth, _) = company[0][name], company[1][name]

    def slow(rows):
        x = rows.double().numpy()
        error = ((dictionary_numpy.output(sae, x) - x) ** 2).sum()
        e, beta, b, c = (
            None if t is None else t.detach().double().numpy()
            for t in (sae.encoder.weight, sae.encoder.bias, sae.b_in, sae.selection_bias)
        )
        fired = np.zeros(sae.n_atoms)
        for sample in x:
            z = e @ (sample - b) + beta
            for j in np.argsort(-(z if c is None else z + c))[: sae.k]:
                fired[j] += z[j] > 0
        return error / ((x - x.mean(0)) ** 2).sum(), fired / len(x)

    fvu, rates = slow(test)
    validation_fvu, validation_rates = slow(validation)
    live = sae.decoder.weight.detach().double().numpy()[rates > 0]
    expected = slow_recovery(live, truth.double().numpy(), 0.9) | {
        "validation_fvu": validation_fvu,
        "validation_dead": (validation_rates == 0).mean(),
        "fvu": fvu,
        "dead": (rates == 0).mean(),
        "dense": (rates > 0.1).mean(),
        "largest_rate": rates.max(),
    }
    assert numbers(outcome) == pytest.approx(expected, rel=1e-4)


def test_rows_for_choosing_and_judging_are_those_of_the_seeds_world_and_differ(company):
    (_, validation, test, truth, _) = company[1]["none"]
    source = PROBLEM.draw(1)
    assert torch.equal(truth, source.atoms)
    assert len(validation) == len(test) == PROBLEM.n_rows
    filled = [rows[(rows != source.mean).any(1)] for rows in (validation, test)]  # where nothing fires, x = mean
    assert torch.cdist(*filled).min() > 0
    for rows in (validation, test):
        spread = (rows - source.expected).std(0) / PROBLEM.n_rows**0.5
        assert ((rows.mean(0) - source.expected).abs() < 5 * spread).all()
    assert all(torch.equal(each[2], test) and torch.equal(each[1], validation) for each in company[1].values())


def test_centring_starts_b_dec_at_the_mean():
    mean = torch.arange(8.0)
    centred, plain = (student(PROBLEM, Setting(centred=flag), 1, mean) for flag in (True, False))
    assert centred.b_in is centred.b_out
    assert torch.equal(centred.b_out.detach(), mean) and not plain.b_out.any()
    with torch.no_grad():
        centred.b_out.add_(1)
    assert mean.tolist() == list(range(8))  # training one student does not move the mean of the next


def test_the_mean_that_centres_is_the_datas(monkeypatch):
    asked = []
    monkeypatch.setattr(remedies, "student", lambda *given: asked.append(given[3]) or student(*given))
    trial(dataclasses.replace(PROBLEM, steps=1, n_rows=4000), 1, {"none": Setting(centred=True)}, cache_dir=False)
    torch.testing.assert_close(asked[0], PROBLEM.draw(1).expected, atol=0.15, rtol=0)
    assert PROBLEM.draw(1).expected.norm() > 1


def test_starts_are_what_they_are_called():
    saes = {start: student(PROBLEM, Setting(start=start), 1, torch.zeros(8)) for start in remedies.STARTS}
    atoms = saes["tied"].decoder.weight
    rows = {start: sae.encoder.weight for start, sae in saes.items()}
    assert all(torch.equal(sae.decoder.weight, atoms) for sae in saes.values())
    torch.testing.assert_close(rows["tied"], atoms)
    torch.testing.assert_close(rows["small"], atoms / 10)
    torch.testing.assert_close(rows["large"], atoms * 4)
    torch.testing.assert_close(rows["untied"].norm(dim=1), torch.ones(24))
    assert (rows["untied"] * atoms).sum(1).abs().mean() < 0.6
    again = student(PROBLEM, Setting(start="untied"), 1, torch.zeros(8))
    assert torch.equal(again.encoder.weight, rows["untied"])
    assert not torch.equal(student(PROBLEM, Setting(), 2, torch.zeros(8)).decoder.weight, atoms)


def test_only_a_remedy_that_needs_it_gets_a_selection_bias():
    for balance, wanted in [(losses.loss_free(), True), (losses.together(losses.loss_free()), True), (None, False)]:
        setting = Setting() if balance is None else Setting(balance)
        assert (student(PROBLEM, setting, 0, torch.zeros(8)).selection_bias is not None) == wanted


def test_an_unknown_start_is_named():
    def build():
        setting = object.__new__(Setting)
        object.__setattr__(setting, "start", "cold")
        inspect.unwrap(Setting.__post_init__)(setting)

    with pytest.raises(ValueError, match="start='cold' is unknown; allowed: 'tied', 'untied', 'small', 'large'"):
        build()
