"""Trials of remedies: settings do not see each other, starts are as they are called, outcomes are the student's own."""

import dataclasses
import inspect
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.parts import known_truth
from helpers.parts.known_truth import Outcome, Problem, Setting, student, trial
from helpers.training import remedies
from tests.reference import dictionary_numpy
from tests.reference.metrics_numpy import slow_recovery

PROBLEM = Problem(
    n_features=24, k=3, steps=40, n_true=16, d=8, batch_size=32, n_rows=300, world={"active": 3.0, "mean": 2.0}
)
GIVEN = {
    "none": Setting(),
    "switch": Setting(remedies.Switch(0.1)),
    "auxk": Setting(remedies.AuxK(silent_for=4), lr=3e-3, centred=True),
    "resample": Setting(remedies.Resample(every=10), start="untied"),
    "loss_free": Setting(remedies.LossFree(0.01), start="small"),
    "anneal": Setting(remedies.Anneal(4), start="large"),
}


def numbers(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(outcome).items() if name != "seconds"}


@pytest.fixture(scope="module")
def company():
    """All settings trained together, with what `judge` was given for each."""
    given, judge = [], known_truth.judge

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
    saes = {start: student(PROBLEM, Setting(start=start), 1, torch.zeros(8)) for start in known_truth.STARTS}
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
    for balance, wanted in [(remedies.LossFree(), True), (remedies.Together(remedies.LossFree()), True), (None, False)]:
        setting = Setting() if balance is None else Setting(balance)
        assert (student(PROBLEM, setting, 0, torch.zeros(8)).selection_bias is not None) == wanted


def test_an_unknown_start_is_named():
    def build():
        setting = object.__new__(Setting)
        object.__setattr__(setting, "start", "cold")
        inspect.unwrap(Setting.__post_init__)(setting)

    with pytest.raises(ValueError, match="start='cold' is unknown; allowed: 'tied', 'untied', 'small', 'large'"):
        build()


# -- the contest -------------------------------------------------------------------------------------------------------


def table(**columns):
    """Two seeds a candidate, by hand: (method, strength): (validation FVU, validation dead)."""
    lines = []
    for (method, strength), (fvu, dead) in columns["of"].items():
        for seed, shift in ((0, -0.001), (1, 0.001)):
            told = {"k": 4, "seed": seed, "method": method, "strength": strength, "lr": 0.1, "centred": True}
            judged = {"validation_fvu": fvu + shift, "validation_dead": dead, "fvu": fvu + shift, "dead": dead}
            lines.append(told | judged | {"found": 0.5})
    return pd.DataFrame(lines)


CONTEST = table(
    of={
        ("none", 0.0): (0.200, 0.30),
        ("auxk", 1.0): (0.150, 0.10),
        ("auxk", 2.0): (0.151, 0.05),
        ("ghost", 1.0): (0.180, 0.02),
        ("switch", 0.1): (0.160, 0.00),
        ("switch", 0.2): (0.210, 0.00),
        ("switch+auxk", (0.1, 1.0)): (0.140, 0.00),
    }
)


def name(candidate):
    return candidate[0], candidate[1]


def test_the_rule_takes_the_fewest_dead_among_errors_within_one_percent():
    assert name(known_truth.choose(CONTEST[CONTEST.method == "auxk"])) == ("auxk", 2.0)
    assert name(known_truth.choose(CONTEST[CONTEST.method == "auxk"], tolerance=0.0)) == ("auxk", 1.0)


def test_the_front_is_what_no_candidate_beats_in_both():
    others = CONTEST[~CONTEST.method.str.contains("switch")]
    assert [name(c) for c in known_truth.front(others)] == [("auxk", 1.0), ("auxk", 2.0), ("ghost", 1.0)]
    assert [name(c) for c in known_truth.front(CONTEST)] == [("switch+auxk", (0.1, 1.0))]


def test_matched_asks_for_no_larger_error_and_says_when_nobody_reaches_it():
    mine, rival, reached = known_truth.matched(CONTEST)
    assert (name(mine), name(rival), reached) == (("switch", 0.1), ("auxk", 2.0), True)
    better = CONTEST.assign(validation_fvu=CONTEST.validation_fvu - 0.1 * (CONTEST.method == "switch"))
    mine, rival, reached = known_truth.matched(better)
    assert (name(rival), reached) == (("auxk", 1.0), False)


def test_dominance_names_the_point_that_is_hardest_to_match():
    rival, answer = known_truth.dominance(CONTEST, n_features=100)
    assert (name(rival), name(answer)) == (("auxk", 1.0), ("switch", 0.1))


def test_finalists_are_chosen_apart_and_combinations_are_no_rivals():
    found = {role: name(candidate) for role, candidate in known_truth.finalists(CONTEST).items()}
    both = ("switch+auxk", (0.1, 1.0))
    assert found == {"none": ("none", 0.0), "switch": ("switch", 0.1), "other": ("auxk", 2.0), "both": both}


def test_a_count_of_zero_is_taken_as_one_and_said():
    rival, mine = (known_truth.of(CONTEST, c) for c in (("auxk", 2.0, 0.1, True), ("switch", 0.1, 0.1, True)))
    found = known_truth.times_fewer(rival, mine, 100)  # 5 dead of each seed against none at all
    assert (found.value, found.bound, found.n) == (10.0, True, 2)
    back = known_truth.times_fewer(mine, rival, 100)
    assert (back.value, back.bound) == (pytest.approx(0.1), False)


def test_paired_resamples_seeds_together():
    rival, mine = (known_truth.of(CONTEST, c) for c in (("none", 0.0, 0.1, True), ("switch", 0.1, 0.1, True)))
    found = known_truth.paired(rival, mine, "fvu")
    assert found.value == pytest.approx(0.2 / 0.16)
    assert found.ci == pytest.approx((0.199 / 0.159, 0.201 / 0.161)[::-1])
    assert known_truth.paired(rival, mine, "dead", "difference").ci == pytest.approx((0.3, 0.3))


def test_every_method_has_as_many_candidates():
    rows = pd.DataFrame(known_truth.candidates([1e-2, 2e-2], [1e-3, 3e-3]))
    counts = rows.groupby(["method", "centred"]).size()
    assert set(counts) == {4} and len(counts) == 2 * len(known_truth.METHODS)
    with pytest.raises(ValueError, match="extra_lrs has 1 values; allowed: 2"):
        known_truth.candidates([1e-2, 2e-2], [1e-3])


def test_packing_keeps_a_contest():
    again = known_truth.unpacked(json.loads(json.dumps(known_truth.packed(CONTEST))))
    pd.testing.assert_frame_equal(again[CONTEST.columns], CONTEST)


def test_a_contest_gives_every_candidate_its_own_outcome():
    problem = Problem(24, 2, 8, 20, 6, 16, 200, {"active": 2.0})
    rows = known_truth.candidates([1e-2], [3e-2], [True])
    frame = known_truth.contest(problem, rows, ks=[2, 3], seeds=[0, 1], cache_dir=False, workers=1)
    assert len(frame) == 2 * 2 * len(rows)
    for row in (rows[0], rows[-1]):
        alone = known_truth.trial(problem, 1, {"x": known_truth.setting(row, problem.steps)}, cache_dir=False)["x"]
        (line,) = known_truth.of(frame[(frame.k == 2) & (frame.seed == 1)], tuple(row.values())).to_dict("records")
        assert (line["fvu"], line["dead"]) == pytest.approx((alone.fvu, alone.dead), rel=1e-6)  # other threads


def test_two_remedies_at_once_are_both_there():
    row = {"method": "switch+auxk", "strength": (0.1, 1.0), "lr": 0.1, "centred": False}
    made = known_truth.setting(row, 100)
    assert made.balance == remedies.Together(remedies.Switch(0.1), remedies.AuxK(1.0, silent_for=5))
    assert (made.lr, made.centred) == (0.1, False)


def test_regimes_are_the_trials_under_changed_conditions():
    problem, given = Problem(24, 2, 8, 20, 6, 16, 200, {"active": 2.0}), Setting(lr=1e-2)
    frame = known_truth.regimes(
        {"k": {2: (problem, given), 3: (replace(problem, k=3), given)}}, [0], cache_dir=False, workers=1
    )
    alone = known_truth.trial(replace(problem, k=3), 0, {"x": given}, cache_dir=False)["x"]
    assert frame.value.tolist() == [2, 3]
    assert frame.fvu[1] == pytest.approx(alone.fvu, rel=1e-4)


def test_outcomes_are_kept_until_the_cell_changes(tmp_path):
    problem = Problem(24, 2, 8, 20, 6, 16, 200, {"active": 2.0, "mean": 1.0})
    first = trial(problem, 0, {"x": Setting()}, tmp_path)
    (kept,) = (tmp_path / "trials").glob("*.kept")
    for path in (tmp_path / "fits").glob("*.kept"):
        path.unlink()
    turned = replace(problem, world={"mean": 1.0, "active": 2.0})  # the order of a mapping means nothing
    assert trial(turned, 0, {"x": Setting()}, tmp_path) == first
    assert not list((tmp_path / "fits").glob("*.kept"))
    for changed in ((replace(problem, n_rows=201), 0), (problem, 1)):
        trial(*changed, {"x": Setting()}, tmp_path)
    assert len(list((tmp_path / "trials").glob("*.kept"))) == 3
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{kept.name} is damaged.*delete it"):
        trial(problem, 0, {"x": Setting()}, tmp_path)
