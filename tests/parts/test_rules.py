"""Every rule starts and is judged with the same number of codes, a bench row says what slow sums say, and what looks at
other tokens is caught."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.parts import rules
from helpers.parts.language_model import Passage
from helpers.parts.rules import GatedToward, Ruled, RuleRows
from helpers.study.study import Outcome, study, tune
from helpers.training.remedies import Gated, Moment
from tests import tiny

K = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def problem(made):
    return RuleRows(made["folders"], "mlp_in", steps=6, batch_size=64)


def moved(sae):
    """The dictionary away from its start, so that nothing holds by symmetry."""
    noise = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    sae.constrain_()
    return sae


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["threshold", "gated"])
def test_thresholds_start_where_the_first_rows_have_k_codes_each(problem, rule):
    rows = problem.first(rules.FIRST)
    fires = Ruled(rule, 32, K)(problem, 0).encode(rows).fires.sum()
    assert float(fires) / len(rows) == pytest.approx(K, rel=0.01)


def test_all_rules_start_from_the_atoms_of_the_seed(problem):
    first, *others = (Ruled(rule, 32, K)(problem, 5) for rule in rules.RULES)
    assert all(torch.equal(first.decoder.weight, sae.decoder.weight) for sae in others)
    assert not torch.equal(first.decoder.weight, Ruled("token", 32, K)(problem, 6).decoder.weight)


def test_an_unknown_rule_and_one_that_cannot_choose_k_are_named(problem):
    with pytest.raises(ValueError, match="rule='best'.*allowed: .*token"):
        Ruled("best", 32, K)
    with pytest.raises(ValueError, match="k=17.*up to 16, the atoms of 8 groups of 16"):
        Ruled("groups", 32, 17)(problem, 0)


def test_rows_are_divided_only_where_that_is_asked(problem):
    own = replace(problem, divided=False)
    assert own.scale == 1 and torch.equal(own.rows("test"), own.store("test").tensor("mlp_in"))
    assert problem.scale != 1
    torch.testing.assert_close(problem.first(7) * problem.scale, own.first(7))
    assert torch.equal(own.first(7), own.rows("train")[:7])


def test_a_gated_saes_penalty_grows_with_the_square_of_its_codes(problem):
    sae, x = Ruled("gated", 32, K)(problem, 0), problem.first(64)
    now = Moment(sae, x, x, sae.trace(x), torch.zeros(()), torch.zeros(32, dtype=torch.long), 0, 1)
    l0 = float(now.trace.codes.fires.sum()) / len(x)
    plain, none = (float(Gated(s).loss(now).detach()) for s in (1.0, 1e-9))
    for target in (l0, l0 / 2):
        pulled = float(GatedToward(1.0, target=target).loss(now).detach()) - none
        assert pulled == pytest.approx((plain - none) * (l0 / target) ** 2, rel=1e-4)


# -- the same number of codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["batch", "threshold", "gated", "token"])
def test_one_number_is_added_until_the_rows_have_k_codes_each(problem, rule):
    sae, rows = moved(Ruled(rule, 32, K)(problem, 0)).eval(), problem.rows("test")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    same = rules.calibrated(sae, rows)
    assert float(same.encode(rows).fires.sum()) == pytest.approx(K * len(rows), abs=1 if rule != "token" else 20)
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items()), "the original moved"
    changed = {name for name, value in same.state_dict().items() if not torch.equal(before[name], value)}
    wanted = {"batch": "select.threshold", "threshold": "select.threshold", "gated": "router.bias"}
    assert changed == ({wanted[rule]} if rule in wanted else set())
    if rule in ("threshold", "gated"):
        shift = same.state_dict()[wanted[rule]] - before[wanted[rule]]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift))


def test_the_causal_twin_gives_each_atom_as_many_of_the_rows(problem):
    sae, rows = moved(Ruled("atom", 32, K)(problem, 0)), problem.first(256)
    twin = rules.causal_twin(sae, rows)
    above = (sae.encoder.scores(rows - sae.b_in) >= twin.select.threshold).sum(0)  # some rows occur twice
    assert (above - K * len(rows) // 32).unique().tolist() in ([0], [0, 1])
    assert rules.noticed(twin, rows) == 0


def test_only_rules_that_look_at_other_tokens_notice_one(problem):
    rows = problem.rows("test")[:64]
    seen = {}
    for rule in rules.RULES:
        sae = moved(Ruled(rule, 32, K)(problem, 0))
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        seen[rule] = rules.noticed(sae, rows, training_rule=True)
        assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    assert {rule for rule, count in seen.items() if count} == {"batch", "atom"}


# -- judged ------------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_what_slow_sums_say(problem):
    sae, rows = moved(Ruled("threshold", 32, K)(problem, 0)).eval(), problem.rows("test")
    found = rules.measured(sae, rows)
    dense = sae.encode(rows).to_dense(32).detach().numpy()
    x, y = rows.double().numpy(), sae(rows).detach().double().numpy()
    fires, counts = (dense != 0).sum(1), (dense != 0).sum(0)
    share = counts[counts > 0] / counts.sum()
    slow = {"fvu": ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), "codes": fires.mean()}
    slow |= {"spread": fires.std(ddof=1), "dead": (counts == 0).mean(), "busiest": counts.max() / len(x)}
    slow |= {"max_violation": counts.max() / counts.mean() - 1, "in_effect": np.exp(-(share * np.log(share)).sum())}
    assert {name: rules.numbers(found)[name] for name in slow} == pytest.approx(slow, rel=1e-5)
    by_token = rules.curves(found)["codes by token"]
    assert by_token[0][1] == fires.min() and by_token[-1][1] == fires.max()


def test_a_look_is_closer_only_where_that_is_asked(problem):
    sae = moved(Ruled("atom", 32, K)(problem, 0))
    short, long = problem.judge(sae, 0), replace(problem, closer=True).judge(sae, 0)
    assert short.validation == long.validation and short.about.items() <= long.about.items()
    assert np.isclose(short.sums["errors"].sum() / short.sums["norms"].sum(), short.about["fvu"])
    assert "twin" in long.about and long.about["noticed"] > 0 and long.about["twin"]["noticed in use"] == 0
    assert "twin" not in replace(problem, closer=True).judge(Ruled("token", 32, K)(problem, 0), 0).about


# -- the bench ---------------------------------------------------------------------------------------------------------


def test_a_gated_sae_takes_the_penalty_and_rate_of_least_error_on_validation_rows():
    def outcome(arm, lr, fvu):
        return Outcome({}, {"fvu": fvu}, arm=replace(arm, lr=lr))

    arms = rules.arms([K, 5], 32, [0.1, 1.0])
    assert len(arms) == 2 * (len(rules.RULES) + 1)
    fvus = {("gated", K, 0.1): (3, 4), ("gated", K, 1.0): (5, 2), ("gated", 5, 0.1): (1, 6), ("gated", 5, 1.0): (7, 8)}
    tuned = {key: {lr: outcome(arms[key], lr, fvu) for lr, fvu in enumerate(some, 1)} for key, some in fvus.items()}
    found = rules.best(tuned)
    assert {key: (arm.remedy.sparsity, arm.lr) for key, arm in found.items()} == {
        ("gated", K): (1.0, 2),
        ("gated", 5): (0.1, 1),
    }


@pytest.fixture(scope="module")
def bench(made):
    """The whole bench in small, with the model's loss."""
    problem = RuleRows(made["folders"], "mlp_in", steps=6, batch_size=64)
    how = {"cache_dir": made["cache"], "workers": 1, "cells": f"{made['cache']}/cells"}
    tuned = tune(problem, rules.arms([K], 32, [0.1]), [1e-3, 1e-2], 0, **how)
    passage = Passage(made["teacher"], made["corpus"], 1, "mlp_in", 60, cache_dir=made["cache"])
    runs = study(replace(problem, closer=True, passage=passage), rules.best(tuned), [0, 1], **how)
    again = study(replace(problem, closer=True, passage=passage), rules.best(tuned), [0, 1], **how)  # from their files
    yardstick = passage.scene.yardstick(problem.mean * problem.scale)
    assert rules.reported(again, problem.steps, yardstick) == rules.reported(runs, problem.steps, yardstick)
    return runs, rules.reported(runs, problem.steps, yardstick), yardstick


def test_a_row_has_means_over_seeds_and_the_twin_stands_beside_its_rule(bench):
    runs, rows, _ = bench
    assert [row["rule"] for row in rows] == [*rules.RULES[:4], rules.TWIN, *rules.RULES[4:]]
    for row in rows:
        some = runs["atom" if row["rule"] == rules.TWIN else row["rule"], K]
        abouts = [each.about["twin"] if row["rule"] == rules.TWIN else each.about for each in some]
        assert row["fvu_by_seed"] == [each["fvu"] for each in abouts] and len(row["fvu_by_seed"]) == 2
        assert row["dead"] == np.mean([each["dead"] for each in abouts])
        exact = row["rule"] in ("batch", "threshold", "gated", rules.TWIN)  # else a chosen score may be below zero
        assert (row["codes"] == pytest.approx(K, abs=0.02) if exact else row["codes"] <= K) and row["ms_step"] > 0


def test_ce_recovered_is_that_of_the_losses_over_all_articles_and_seeds(bench):
    runs, rows, yardstick = bench
    nats = np.mean([np.sum(each.about["nats"]) for each in runs["groups", K]])
    clean, mean = (yardstick[name].sum() for name in ("clean", "mean"))
    row = next(row for row in rows if row["rule"] == "groups")
    assert row["ce_mean"][0] == pytest.approx((mean - nats) / (mean - clean), rel=1e-9)
    assert rules.reported(runs, 6)[0]["ce_mean"] is None


def test_errors_are_compared_with_topk_of_as_many_codes(bench):
    _, rows, _ = bench
    other = [row | {"k": 9, "fvu_by_seed": [2 * each for each in row["fvu_by_seed"]]} for row in rows]
    found = rules.against_token(rows + other)
    assert {rule for rule, _ in found} == {*rules.RULES, rules.TWIN} - {"token"}
    by = {row["rule"]: row["fvu_by_seed"] for row in rows}
    assert found["atom", K].value == pytest.approx(sum(by["atom"]) / sum(by["token"]))
    assert found["atom", 9].value == pytest.approx(found["atom", K].value) and found["atom", K].n == 2
