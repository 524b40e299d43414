"""Remedies on trial: arms do not see each other, starts are as they are called, outcomes are the student's own."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.parts import known_truth
from helpers.parts.known_truth import Candidate, KnownTruth, StartingSae, measured
from helpers.parts.worlds import World
from helpers.study.scores import RELABELLINGS
from helpers.study.study import Arm, Outcome, fits, run, study
from helpers.training import remedies
from tests.reference import dictionary_numpy
from tests.reference.metrics_numpy import of_two, slow_recovery
from tests.reference.worlds_numpy import expected

PROBLEM = KnownTruth(World(16, 8, active=3.0, mean=2.0), n_features=24, k=3, steps=40, batch_size=32, n_rows=300)
ARMS = {
    "none": Arm("none", StartingSae(), lr=1e-2),
    "switch": Arm("switch", StartingSae(), remedies.Switch(0.1), 1e-2),
    "auxk": Arm("auxk", StartingSae(centred=True), remedies.AuxK(silent_for=4), 3e-3),
    "resample": Arm("resample", StartingSae(start="untied"), remedies.Resample(every=10), 1e-2),
    "loss_free": Arm("loss_free", StartingSae(start="small"), remedies.LossFree(0.01), 1e-2),
    "anneal": Arm("anneal", StartingSae(start="large"), remedies.Anneal(4), 1e-2),
}


def numbers(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in measured(outcome).items() if name != "seconds"}


@pytest.fixture(scope="module")
def company():
    """All arms trained together: their outcomes."""
    return dict(zip(ARMS, run(PROBLEM, list(ARMS.values()), 1, cache_dir=False), strict=True))


@pytest.fixture(scope="module")
def students():
    return dict(
        zip(ARMS, (each.student for each in fits(PROBLEM, list(ARMS.values()), 1, cache_dir=False)), strict=True)
    )


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_ends_the_same_alone_and_in_company(company, name):
    (alone,) = run(PROBLEM, [ARMS[name]], 1, cache_dir=False)
    assert numbers(alone) == numbers(company[name])
    for column in ("rates", "cosines"):
        np.testing.assert_array_equal(alone.about[column], company[name].about[column])
    assert alone.seconds > 0


def test_arms_and_seeds_end_differently(company):
    ends = [tuple(numbers(outcome).values()) for outcome in company.values()]
    ends += [tuple(numbers(each).values()) for each in run(PROBLEM, [ARMS["none"]], 2, cache_dir=False)]
    assert len(set(ends)) == len(ARMS) + 1


@pytest.mark.parametrize("name", ["none", "auxk", "loss_free"])
def test_outcomes_are_those_of_a_slow_recomputation(company, students, name):
    sae, (world, _, validation, test) = students[name], known_truth._drawn(PROBLEM, 1)

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
    truth = world.atoms.double().numpy()
    expected = slow_recovery(live, truth, 0.9) | {
        "validation_fvu": validation_fvu,
        "validation_dead": (validation_rates == 0).mean(),
        "fvu": fvu,
        "dead": (rates == 0).mean(),
        "dense": (rates > 0.1).mean(),
        "largest_rate": rates.max(),
    }
    assert numbers(company[name]) == pytest.approx(expected, rel=1e-4)
    about = company[name].about
    np.testing.assert_allclose(about["rates"], rates)
    cosines = (truth @ (live / np.linalg.norm(live, axis=1, keepdims=True)).T).max(1)
    np.testing.assert_allclose(about["cosines"], cosines, rtol=1e-4)


def test_rows_for_choosing_and_judging_are_those_of_the_seeds_world_and_differ(students, monkeypatch):
    seen, evaluate, recovery = [], known_truth.evaluate, known_truth.recovery
    monkeypatch.setattr(known_truth, "evaluate", lambda sae, rows: seen.append(rows) or evaluate(sae, rows))
    monkeypatch.setattr(known_truth, "recovery", lambda live, truth: seen.append(truth) or recovery(live, truth))
    PROBLEM.judge(students["none"], 1)
    validation, test, truth = seen
    world = replace(PROBLEM.world, seed=10)
    assert torch.equal(truth, world.atoms)
    assert len(validation) == len(test) == PROBLEM.n_rows
    filled = [rows[(rows != world.constant).any(1)] for rows in (validation, test)]  # where nothing fires
    assert torch.cdist(*filled).min() > 0
    for rows in (validation, test):
        spread = (rows - expected(world)).std(0) / PROBLEM.n_rows**0.5
        assert ((rows.mean(0) - expected(world)).abs() < 5 * spread).all()


def test_a_seed_draws_a_world_and_its_batches():
    stream, again, other = (PROBLEM.stream(seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(stream(0)[0], again(0)[0]) and not torch.equal(stream(0)[0], other(0)[0])
    assert stream.fingerprint == again.fingerprint != other.fingerprint
    mean = expected(replace(PROBLEM.world, seed=10))
    rows = torch.cat([stream(step)[0] for step in range(40)])
    assert ((rows.mean(0) - mean).abs() < 5 * (rows - mean).std(0) / len(rows) ** 0.5).all()


def test_centring_starts_b_dec_at_the_mean_of_the_data():
    problem = replace(PROBLEM, n_rows=4000)
    centred, plain = (StartingSae(centred=flag)(problem, 1) for flag in (True, False))
    assert centred.b_in is centred.b_out and not plain.b_out.any()
    mean = expected(replace(problem.world, seed=10))
    torch.testing.assert_close(centred.b_out.detach(), mean, atol=0.15, rtol=0)
    assert mean.norm() > 1
    with torch.no_grad():
        centred.b_out.add_(1)  # training one student does not move the mean of the next
    torch.testing.assert_close(StartingSae(centred=True)(problem, 1).b_out.detach(), centred.b_out.detach() - 1)


def test_starts_are_what_they_are_called():
    saes = {start: StartingSae(start=start)(PROBLEM, 1) for start in known_truth.STARTS}
    atoms = saes["tied"].decoder.weight
    rows = {start: sae.encoder.weight for start, sae in saes.items()}
    assert all(torch.equal(sae.decoder.weight, atoms) for sae in saes.values())
    torch.testing.assert_close(rows["tied"], atoms)
    torch.testing.assert_close(rows["small"], atoms / 10)
    torch.testing.assert_close(rows["large"], atoms * 4)
    torch.testing.assert_close(rows["untied"].norm(dim=1), torch.ones(24))
    assert (rows["untied"] * atoms).sum(1).abs().mean() < 0.6
    assert torch.equal(StartingSae(start="untied")(PROBLEM, 1).encoder.weight, rows["untied"])
    assert not torch.equal(StartingSae()(PROBLEM, 2).decoder.weight, atoms)


def test_only_a_remedy_that_needs_it_gets_a_selection_bias():
    tried = [remedies.Balance(), remedies.LossFree(), remedies.Together(remedies.LossFree())]
    arms = [Arm("", StartingSae(), remedy) for remedy in tried]
    trained = fits(replace(PROBLEM, steps=1), arms, 0, cache_dir=False)
    assert [each.student.selection_bias is not None for each in trained] == [False, True, True]


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match="start='cold' is unknown; allowed: 'tied', 'untied', 'small', 'large'"):
        StartingSae(start="cold")


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
    assert name(known_truth.chosen(CONTEST[CONTEST.method == "auxk"])) == ("auxk", 2.0)
    switches = table(of={("switch", 0.1): (0.1609, 0.0), ("switch", 0.2): (0.160, 0.0), ("switch", 0.3): (0.158, 0.5)})
    assert name(known_truth.chosen(switches)) == ("switch", 0.3)  # the others are more than 1 % away
    assert name(known_truth.chosen(switches[switches.strength < 0.3])) == ("switch", 0.2)  # no more dead, less error


def test_the_front_is_what_no_candidate_beats_in_both():
    others = CONTEST[~CONTEST.method.str.contains("switch")]
    assert [name(c) for c in known_truth.pareto_front(others)] == [("auxk", 1.0), ("auxk", 2.0), ("ghost", 1.0)]
    assert [name(c) for c in known_truth.pareto_front(CONTEST)] == [("switch+auxk", (0.1, 1.0))]


def test_matched_asks_for_no_larger_error_and_says_when_nobody_reaches_it():
    mine, rival, reached = known_truth.matched(CONTEST)
    assert (name(mine), name(rival), reached) == (("switch", 0.1), ("auxk", 2.0), True)
    better = CONTEST.assign(validation_fvu=CONTEST.validation_fvu - 0.1 * (CONTEST.method == "switch"))
    mine, rival, reached = known_truth.matched(better)
    assert (name(rival), reached) == (("auxk", 2.0), False)  # fewest dead among equals, and not the least error alone


def test_who_stands_in_where_nobody_reaches_it_is_chosen_with_the_same_ties():
    """Two candidates within one percent: the one with fewer dead features is the rival, as it would be for Switch."""
    near = CONTEST.assign(validation_fvu=CONTEST.validation_fvu - 0.1 * (CONTEST.method == "switch"))
    first = near[(near.method == "auxk") & (near.strength == 1.0)]
    twin = first.assign(strength=7.0, validation_fvu=first.validation_fvu * 1.005, validation_dead=0.0)
    mine, rival, reached = known_truth.matched(pd.concat([near, twin], ignore_index=True))
    assert (name(rival), reached) == (("auxk", 7.0), False)


def test_dominance_names_the_point_that_is_hardest_to_match():
    rival, answer = known_truth.dominance(CONTEST, n_features=100)
    assert (name(rival), name(answer)) == (("auxk", 1.0), ("switch", 0.1))


def test_finalists_are_chosen_apart_and_combinations_are_no_rivals():
    found = {role: name(candidate) for role, candidate in known_truth.finalists(CONTEST).items()}
    both = ("switch+auxk", (0.1, 1.0))
    assert found == {"none": ("none", 0.0), "switch": ("switch", 0.1), "other": ("auxk", 2.0), "both": both}


def test_a_count_of_zero_is_taken_as_one():
    rival, mine = (known_truth.lines_of(CONTEST, c) for c in (("auxk", 2.0, 0.1, True), ("switch", 0.1, 0.1, True)))
    found = known_truth.times_fewer(rival, mine, 100)  # 5 dead of each seed against none at all
    assert (found.value, found.n, found.resampled) == (pytest.approx(10.0), 2, "seeds")
    assert known_truth.times_fewer(mine, rival, 100).value == pytest.approx(0.1)


def test_a_seed_is_left_out_of_both_of_a_pair():
    rival, mine = (known_truth.lines_of(CONTEST, c) for c in (("none", 0.0, 0.1, True), ("switch", 0.1, 0.1, True)))
    found = known_truth.paired(rival, mine, "fvu")
    assert found.value == pytest.approx(0.2 / 0.16)
    assert found.ci == pytest.approx(of_two(found.value, 0.199 / 0.159, 0.201 / 0.161))
    assert known_truth.paired(rival, mine, "dead", known_truth.difference_of_means).ci == pytest.approx((0.3, 0.3))


def test_a_pair_whose_labels_are_dealt_afresh_is_told_apart_no_more():
    rival, mine = (known_truth.lines_of(CONTEST, c) for c in (("auxk", 2.0, 0.1, True), ("switch", 0.1, 0.1, True)))
    drawn = known_truth.times_fewer(rival, mine, 100, dealt=True)
    assert len(drawn) == RELABELLINGS and {each.value for each in drawn} == {1.0}  # with two seeds one of each
    drawn = known_truth.paired(rival, mine, "dead", known_truth.difference_of_means, dealt=True)
    assert max(abs(each.value) for each in drawn) < 1e-12 and all(each.ci[0] < 0 < each.ci[1] for each in drawn)


def test_every_method_has_as_many_candidates():
    rows = pd.DataFrame(known_truth.candidates([1e-2, 2e-2], [1e-3, 3e-3]))
    counts = rows.groupby(["method", "centred"]).size()
    assert set(counts) == {4} and len(counts) == 2 * len(known_truth.REMEDIES)
    few = pd.DataFrame(known_truth.candidates([1e-2, 2e-2], [1e-3, 3e-3], brief=["aligned", "frequency"]))
    counts = few.groupby("method").size()
    assert set(counts[["aligned", "frequency"]]) == {4} and set(counts.drop(["aligned", "frequency"])) == {8}
    with pytest.raises(ValueError, match="brief='best' is unknown"):
        known_truth.candidates([1e-2, 2e-2], [1e-3, 3e-3], brief=["best"])
    with pytest.raises(ValueError, match="extra_lrs has 1 values; allowed: 2"):
        known_truth.candidates([1e-2, 2e-2], [1e-3])


def test_seeds_that_choose_do_not_judge_and_those_that_judge_do_not_choose():
    """By the first seed's validation rows strength 1 is the better one, by the second's and on all test rows 2 is."""
    both = table(of={("auxk", 1.0): (0.2, 0.1), ("auxk", 2.0): (0.1, 0.1), ("switch", 0.1): (0.3, 0.0)})
    first = (both.seed == 0) & (both.strength == 1.0)
    both.loc[first, "validation_fvu"] = 0.05
    assert name(known_truth.chosen(both[both.method == "auxk"])) == ("auxk", 2.0)
    apart = both.assign(judges=both.seed == 1)
    mine = known_truth.chosen(apart[apart.method == "auxk"])
    assert name(mine) == ("auxk", 1.0) and known_truth.validation(apart, mine) == (0.05, 0.1)
    assert known_truth.lines_of(apart, mine).seed.tolist() == [1] and known_truth.judging(apart).seed.eq(1).all()
    points = {"contest": known_truth.as_points(known_truth.judging(apart))}
    points["choosing"] = known_truth.as_points(apart[~apart.judges].drop(columns="judges"))
    again = known_truth.contest_of(json.loads(json.dumps(points))).sort_values(["seed", "strength"], ignore_index=True)
    wanted = apart.sort_values(["seed", "strength"], ignore_index=True)
    pd.testing.assert_frame_equal(again[wanted.columns], wanted, check_dtype=False)
    with pytest.raises(ValueError, match=r"choosing=\[1\] has seeds \[1\] that judge"):
        known_truth.contest(SMALL, {}, [0, 1], [1])


def test_a_cell_where_nobody_finds_a_tenth_is_degenerate():
    none = CONTEST.assign(found=0.09)
    assert not known_truth.degenerate(CONTEST) and known_truth.degenerate(none)
    one = none.assign(found=none.found.where(none.method != "ghost", 0.11))
    assert not known_truth.degenerate(one)
    assert known_truth.degenerate(one.assign(judges=one.method != "ghost"))
    quarter = none.assign(found=0.03)  # with a quarter as many features as truths
    assert not known_truth.degenerate(quarter, 0.25) and known_truth.degenerate(quarter, 0.5)


def test_points_keep_a_contest():
    again = known_truth.from_points(json.loads(json.dumps(known_truth.as_points(CONTEST))))
    pd.testing.assert_frame_equal(again[CONTEST.columns], CONTEST, check_dtype=False)
    by_seed = [{"axis": "k", "value": 2, "seed": 0, "fvu": 0.1}, {"axis": "k", "value": 2, "seed": 1, "fvu": 0.2}]
    pd.testing.assert_frame_equal(known_truth.from_points(by_seed), pd.DataFrame(by_seed))
    assert known_truth.as_points(pd.DataFrame(by_seed)) == [
        {"axis": "k", "value": 2, "seed": [0, 1], "fvu": [0.1, 0.2]}
    ]


SMALL = KnownTruth(World(20, 6, active=2.0, mean=1.0), n_features=24, k=2, steps=8, batch_size=16, n_rows=200)


def test_a_contest_gives_every_candidate_its_own_outcome():
    rows = known_truth.candidates([1e-2], [3e-2], [True])
    frame = known_truth.contest(SMALL, {2: rows, 3: rows[:2]}, [0, 1], cache_dir=False, workers=1)
    assert len(frame) == 2 * (len(rows) + 2)
    for row in (rows[0], rows[-1]):
        (alone,) = run(SMALL, [row.arm(SMALL.steps)], 1, cache_dir=False)
        (line,) = known_truth.lines_of(frame[(frame.k == 2) & (frame.seed == 1)], row).to_dict("records")
        found = measured(alone)
        assert (line["fvu"], line["dead"]) == pytest.approx((found["fvu"], found["dead"]), rel=1e-6)  # other threads
    (line,) = known_truth.lines_of(frame[(frame.k == 3) & (frame.seed == 0)], rows[1]).to_dict("records")
    (alone,) = run(replace(SMALL, k=3), [rows[1].arm(SMALL.steps)], 0, cache_dir=False)
    assert line["fvu"] == pytest.approx(alone.fvu, rel=1e-6)


def test_two_remedies_at_once_are_both_there():
    made = Candidate("switch+auxk", (0.1, 1.0), 0.1, False).arm(100)
    assert made.remedy == remedies.Together(remedies.Switch(0.1), remedies.AuxK(1.0, silent_for=5))
    assert (made.lr, made.build.centred) == (0.1, False)


def test_a_study_under_changed_conditions_becomes_a_table():
    arm, problems = ARMS["none"], {("k", 2): SMALL, ("k", 3): replace(SMALL, k=3)}
    found = study(problems, dict.fromkeys(problems, arm), [0], cache_dir=False, workers=1)
    frame = known_truth.as_table(found, "axis", "value")
    (alone,) = run(problems["k", 3], [arm], 0, cache_dir=False)
    assert frame.value.tolist() == [2, 3] and frame.seed.tolist() == [0, 0]
    assert frame.fvu[1] == pytest.approx(alone.fvu, rel=1e-4)


def test_outcomes_are_kept_until_what_is_asked_changes(tmp_path):
    arm = ARMS["none"]
    (first,) = run(SMALL, [arm], 0, cache_dir=tmp_path)
    (kept,) = (tmp_path / "runs").glob("*.kept")
    for path in (tmp_path / "fits").glob("*.kept"):
        path.unlink()
    (again,) = run(SMALL, [replace(arm, name="another word for it")], 0, cache_dir=tmp_path)
    assert measured(again) == measured(first)
    assert not list((tmp_path / "fits").glob("*.kept"))
    for changed in (
        (replace(SMALL, n_rows=201), 0),
        (replace(SMALL, world=replace(SMALL.world, zipf=0.6)), 0),
        (SMALL, 1),
    ):
        run(changed[0], [arm], changed[1], cache_dir=tmp_path)
    assert len(list((tmp_path / "runs").glob("*.kept"))) == 4
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{kept.name} is damaged.*delete it"):
        run(SMALL, [arm], 0, cache_dir=tmp_path)
