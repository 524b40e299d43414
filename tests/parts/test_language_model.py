"""Counts are the model's own firings, judgements are sums of what `evaluate` says, and keys hold no place."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.kept import Kept
from helpers.parts import language_model
from helpers.parts.language_model import Sae, SiteRows
from helpers.settings import generator
from helpers.study.scores import evaluate
from helpers.study.study import Arm, run, study, sums, trained
from helpers.training import remedies
from tests import tiny

SAE, AT_MEAN = Sae(32, 3), Sae(32, 3, centred=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))["folders"]


@pytest.fixture
def problem(folders):
    return SiteRows(folders, "resid_post", steps=12, batch_size=64)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_divided_by_one_number_that_makes_their_mean_variance_one(problem):
    rows, raw = problem.rows("train"), problem.store("train").tensor("resid_post")
    assert float(rows.double().var(0, correction=0).mean()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(rows * problem.scale, raw)
    torch.testing.assert_close(problem.mean, rows.mean(0), atol=1e-4, rtol=1e-4)


def test_training_sees_divided_rows_and_starts_where_the_arm_says(problem):
    stream = problem.stream(0, torch.device("cpu"))
    x, y = stream(0)
    assert x is y and any(torch.allclose(x[0], row) for row in problem.rows("train"))
    assert not torch.equal(x, problem.stream(1, torch.device("cpu"))(0)[0])
    at_mean, at_zero = AT_MEAN(problem, 0), SAE(problem, 0)
    torch.testing.assert_close(at_mean.b_out.data, problem.mean)
    assert not at_zero.b_out.any() and torch.equal(at_mean.decoder.weight, at_zero.decoder.weight)


def test_a_problem_without_a_split_is_named(folders):
    with pytest.raises(ValueError, match="no test; allowed: train, validation, test"):
        SiteRows({s: folders[s] for s in ("train", "validation")}, "mlp_in", 1)


# -- judging -----------------------------------------------------------------------------------------------------------


def test_firings_are_counted_group_by_group(problem):
    sae, rows = Sae(32, 24)(problem, 0), problem.rows("test")
    groups = torch.tensor([7, 3, 5]).repeat(len(rows) // 3 + 1)[: len(rows)]
    fired = torch.zeros(len(rows), sae.n_atoms)
    codes = sae.encode(rows)
    fired.scatter_(1, codes.indices, (codes.values != 0).float())
    slow = torch.stack([fired[groups == g].sum(0) for g in (3, 5, 7)])
    assert (codes.values == 0).any(), "the test should have chosen latents that do not fire"
    assert np.array_equal(language_model.firings(sae, rows, groups.numpy()), slow.int().numpy())
    some = language_model.codes_on(sae, rows, batch_size=7)
    assert torch.equal(some.indices, codes.indices) and torch.allclose(some.values, codes.values)


def test_a_judgement_is_what_evaluate_says_and_the_arm_learns(problem, tmp_path, monkeypatch):
    arm, options = Arm("none", AT_MEAN, lr=3e-2), {"cache_dir": tmp_path}
    monkeypatch.setattr(language_model, "BUSIEST", 5)
    found = run(problem, [arm], 0, **options)[0]
    sae, rows = trained(problem, arm, 0, **options).student, problem.rows("test")
    whole, before = evaluate(sae, rows), evaluate(sae, problem.rows("validation"))
    assert found.fvu == pytest.approx(whole.fvu) and found.sums["rows"].sum() == len(whole.squared_error)
    assert found.about["n_dense"] == int((whole.rates > 0.1).sum())
    for name in ("dead", "dense", "largest_rate", "chosen_but_zero"):
        assert found.about[name] == getattr(whole, name)
    for name in ("fvu", "dead", "largest_rate"):
        assert found.validation[name] == getattr(before, name)
    lengths = {
        s: ((r := problem.rows(s)) - sae(r).detach()).norm(dim=1) / r.norm(dim=1) for s in ("validation", "test")
    }
    assert found.validation["relative_error"] == pytest.approx(float(lengths["validation"].mean()), rel=1e-4)
    assert found.sums["relative"].sum() == pytest.approx(float(lengths["test"].sum()), rel=1e-4)
    counts = found.sums["counts"]
    article = np.array(problem.store("test").article)
    every = language_model.firings(sae, rows, article)
    assert counts.shape == (len(set(article.tolist())), 5)
    assert counts.sum(0).tolist() == sorted(every.sum(0).tolist())[::-1][:5]
    busiest = every.sum(0).argmax()
    assert (
        counts[:, 0].tolist() == every[:, busiest].tolist()
        and counts[:, 0].sum() / len(whole.squared_error) == whole.largest_rate
    )
    assert found.about["curve"][0] == [1, whole.largest_rate] and found.about["curve"][-1] == [
        32,
        float(whole.rates.min()),
    ]
    assert found.fvu < 0.8 * evaluate(AT_MEAN(problem, 0), rows).fvu
    table = sums({"x": [found]})
    assert table.compare(lambda cell: cell.largest_rate, "x").value == pytest.approx(whole.largest_rate)


def test_an_outcome_belongs_to_its_problem_and_not_to_the_place_of_the_cache(problem):
    def key(problem):
        return Kept("runs", problem, language_model).key

    others = [replace(problem, site="mlp_in"), replace(problem, steps=13), replace(problem, batch_size=32)]
    other_rows = replace(problem, folders=problem.folders | {"test": problem.folders["train"]})
    assert len({key(each) for each in (problem, *others, other_rows)}) == 5
    moved = {split: f"/elsewhere/{folder.rsplit('/', 1)[1]}" for split, folder in problem.folders.items()}
    assert key(replace(problem, folders=moved)) == key(problem)


# -- remedies on trial -------------------------------------------------------------------------------------------------


def test_waits_are_scaled_to_the_run():
    made = language_model.strengths_to_try(
        {"auxk": [0.1], "resample": [[0.3, "residual"]], "bias": [0.1, 0.2]}, steps=80
    )
    assert made["auxk"] == [remedies.AuxK(0.1, silent_for=8)]
    assert made["resample"] == [remedies.Resample(10, scale=0.3, toward="residual", until=0.5)]
    assert [each.gamma for each in made["bias"]] == [0.1, 0.2]
    with pytest.raises(ValueError, match="names auxx; allowed: auxk"):
        language_model.strengths_to_try({"auxx": [1]}, 10)


def test_a_method_is_reported_with_all_that_was_tried(problem, tmp_path):
    options = {"cache_dir": tmp_path, "workers": 1}
    arms = {i: Arm("switch", SAE, remedies.Switch(alpha), 3e-2) for i, alpha in enumerate((0.01, 1.0))}
    tried = [some[0] for some in study(problem, arms, [0], **options).values()]
    key = ("resid_post", False, "switch")
    found = study(problem, {key: arms[1]}, [0, 1], **options)
    row = language_model.reported_method(problem, sums(found), key, found[key], tried)
    assert json.loads(json.dumps(row)) and row["seeds"] == [0, 1] and row["fvu_by_seed"][0] == tried[1].fvu
    assert row["fvu_ci"][0] <= row["fvu"] <= row["fvu_ci"][1] and row["rate_ci"][0] <= row["largest_rate"]
    assert row["largest_rate"] == pytest.approx(np.mean(row["largest_rate_by_seed"]))
    assert [each["fvu"] for each in row["candidates"]] == [each.fvu for each in tried]
    caps = [each.validation["largest_rate"] for each in tried]
    assert row["capped"] == row["candidates"][int(np.argmin(caps))] and row["balance"] == repr(remedies.Switch(1.0))
    alone = language_model.reported(problem, tried[1])
    assert (alone["site"], alone["k"], alone["lr"], alone["n_rows"]) == ("resid_post", 3, 3e-2, row["n_rows"])


def test_before_training_the_mean_decides_who_fires(problem):
    found = language_model.whereabouts(problem, SAE, 0)
    rows = problem.rows("test")
    for name, build in (("fires_at_zero", SAE), ("fires_at_mean", AT_MEAN)):
        assert found[name] == pytest.approx(1 - evaluate(build(problem, 0), rows).dead)
    train = problem.rows("train").double()
    share = float(train.mean(0).square().sum() / train.square().sum(1).mean())
    assert found["mean_share"] == pytest.approx(share, rel=1e-4)
    assert 0 <= found["aligned"] <= 1 and 1 / 16 < found["top_share"] < 1


# -- the mean ----------------------------------------------------------------------------------------------------------


def test_the_means_carriers_add_up_to_the_reconstructions_mean(problem):
    sae, rows = SAE(problem, 0), problem.rows("test") + 3
    with torch.no_grad():
        sae.b_out.copy_(0.3 * rows.mean(0) + torch.randn(rows.shape[1], generator=generator(0)))
        rates = language_model.firings(sae, rows, np.zeros(len(rows), int))[0] / len(rows)
        along = float(sae(rows).double().mean(0) @ rows.double().mean(0) / rows.double().mean(0).square().sum())
    shares = language_model.mean_shares(sae, rows, torch.from_numpy(rates))
    assert sum(shares.values()) == pytest.approx(along, rel=1e-4)
    assert shares["dense"] and shares["others"]
