"""Counts are the model's own firings, choosing follows the stated rule, and a trial that is kept is not repeated."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.kept import Kept
from helpers.parts import language_model
from helpers.parts.known_truth import Setting
from helpers.parts.language_model import Bench, Entry, Trial
from helpers.settings import generator
from helpers.training import remedies
from tests import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))["folders"]


@pytest.fixture
def bench(folders):
    return Bench(folders, "resid_post", n_features=32, k=3, steps=12, batch_size=64)


def trial(bench, counts, rows=None, *, seed=0, setting=None, fvu=0.5, dead=0.1, busiest=0.5):
    """A trial that says what a test wants it to."""
    counts = np.asarray(counts)
    rows = np.full(len(counts), 10.0) if rows is None else np.asarray(rows, float)
    flat = np.ones(len(counts))
    return Trial(
        bench, setting or Setting(), seed, fvu, dead, busiest, fvu * flat, flat, rows, counts, 0.0, 0.0
    )  # fmt: skip


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_divided_by_one_number_that_makes_their_mean_variance_one(bench):
    rows, raw = bench.rows("train"), bench.store("train").tensor("resid_post")
    assert float(rows.double().var(0, correction=0).mean()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(rows * bench.scale, raw)
    torch.testing.assert_close(bench.mean, rows.mean(0), atol=1e-4, rtol=1e-4)


def test_training_sees_divided_rows_and_starts_where_the_setting_says(bench):
    from helpers.training import Shuffled

    stream = language_model.Divided(
        Shuffled(bench.store("train")["resid_post"], batch_size=8, fingerprint="x"), bench.scale
    )
    x, y = stream(0)
    assert x is y and any(torch.allclose(x[0], row) for row in bench.rows("train"))
    assert stream.fingerprint != language_model.Divided(stream.stream, 2 * bench.scale).fingerprint
    at_mean, at_zero = (bench.student(Setting(centred=c), 0) for c in (True, False))
    torch.testing.assert_close(at_mean.b_out.data, bench.mean)
    assert not at_zero.b_out.any() and torch.equal(at_mean.decoder.weight, at_zero.decoder.weight)
    assert at_zero.selection_bias is None
    assert bench.student(Setting(remedies.LossFree(0.1)), 0).selection_bias is not None


def test_a_bench_without_a_split_is_named(folders):
    with pytest.raises(ValueError, match="no test; allowed: train, validation, test"):
        Bench({s: folders[s] for s in ("train", "validation")}, "mlp_in", 8, 2, 1)


# -- trials ------------------------------------------------------------------------------------------------------------


def test_firings_are_counted_group_by_group(bench):
    sae, rows = replace(bench, k=24).student(Setting(), 0), bench.rows("test")
    groups = torch.tensor([7, 3, 5]).repeat(len(rows) // 3 + 1)[: len(rows)]
    fired = torch.zeros(len(rows), sae.n_atoms)
    codes = sae.encode(rows)
    fired.scatter_(1, codes.indices, (codes.values != 0).float())
    slow = torch.stack([fired[groups == g].sum(0) for g in (3, 5, 7)])
    assert (codes.values == 0).any(), "the test should have chosen latents that do not fire"
    assert np.array_equal(language_model.firings(sae, rows, groups, batch_size=32), slow.int().numpy())


def test_a_trial_is_what_evaluate_says_and_learns(bench, tmp_path):
    found = language_model.trial(bench, Setting(lr=3e-2, centred=True), 0, cache_dir=tmp_path)
    sae = language_model.train(bench, found.setting, 0, cache_dir=tmp_path).student
    whole = language_model.evaluate(sae, bench.rows("test"))
    assert found.fvu == pytest.approx(whole.fvu) and found.n == whole.n
    np.testing.assert_allclose(found.rates, whole.rates)
    assert (found.dead, found.dense) == (whole.dead, whole.dense)
    assert found.largest_rate == pytest.approx(whole.largest_rate)
    assert found.validation_fvu == language_model.evaluate(sae, bench.rows("validation")).fvu
    before = language_model.evaluate(bench.student(found.setting, 0), bench.rows("test"))
    assert found.fvu < 0.8 * before.fvu


def test_a_trial_is_kept_and_belongs_to_its_setting(bench, tmp_path, monkeypatch):
    setting = Setting(remedies.Switch(0.1))
    first = language_model.trial(bench, setting, 0, cache_dir=tmp_path)
    monkeypatch.setattr(language_model, "_trial", lambda *_: pytest.fail("it was repeated"))
    again = language_model.trial(bench, setting, 0, cache_dir=tmp_path)
    assert again.fvu == first.fvu and np.array_equal(again.counts, first.counts)
    key = Kept("trials", [bench.nameless, setting, 0], language_model).key
    others = [
        (replace(bench, k=2), setting, 0),
        (replace(bench, site="mlp_in"), setting, 0),
        (bench, Setting(remedies.Switch(0.2)), 0),
        (bench, replace(setting, centred=True), 0),
        (bench, setting, 1),
    ]
    assert key not in {Kept("trials", [b.nameless, *rest], language_model).key for b, *rest in others}


def test_spliced_in_it_returns_the_models_own_units(bench):
    sae, raw = bench.student(Setting(), 0), bench.store("test").tensor("resid_post")[:20]
    splice = language_model.in_place(sae, bench, layer=1)
    assert (splice.layer, splice.site) == (1, "resid_post")
    torch.testing.assert_close(splice.function(raw), bench.scale * sae(raw / bench.scale))


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_the_rule_takes_the_fewest_dead_of_those_within_one_percent(bench):
    made = [(0.500, 0.9), (0.504, 0.2), (0.506, 0.0), (0.700, 0.0)]
    some = [trial(bench, [[1]], fvu=fvu, dead=dead) for fvu, dead in made]
    assert language_model.chosen(some) is some[1]
    assert language_model.chosen(some[:1]) is some[0]
    with pytest.raises(ValueError, match="candidates is empty"):
        language_model.chosen([])
    caps = [trial(bench, [[1]], busiest=rate) for rate in (0.5, 0.1, 0.3)]
    assert language_model.capping(caps) is caps[1]


def test_waits_are_scaled_to_the_run():
    made = language_model.strengths_to_try(
        {"auxk": [0.1], "resample": [[0.3, "residual"]], "bias": [0.1, 0.2]}, steps=80
    )
    assert made["auxk"] == [remedies.AuxK(0.1, silent_for=8)]
    assert made["resample"] == [remedies.Resample(10, scale=0.3, toward="residual", until=0.5)]
    assert [each.gamma for each in made["bias"]] == [0.1, 0.2]
    with pytest.raises(ValueError, match="names auxx; allowed: auxk"):
        language_model.strengths_to_try({"auxx": [1]}, 10)


def test_a_contest_tries_everything_once_and_the_chosen_ones_again(bench, tmp_path):
    options = {"lrs": [1e-2, 3e-2], "seeds": [0, 1], "cache_dir": tmp_path, "workers": 1}
    found = language_model.contest(
        [bench], language_model.strengths_to_try({"switch": [0.01, 1.0]}, bench.steps), **options
    )
    assert list(found) == [("resid_post", c, name) for name in ("none", "switch") for c in (False, True)]
    for (_, centred, name), entry in found.items():
        assert len(entry.candidates) == 2 and [t.seed for t in entry.trials] == [0, 1]
        assert entry.trials[0] is language_model.chosen(entry.candidates)
        assert all(t.setting == entry.setting and t.setting.centred == centred for t in entry.trials)
        if name == "switch":
            assert entry.setting.lr == found["resid_post", centred, "none"].setting.lr
    other = language_model.at_other_k(found, [2], ["switch"], cache_dir=tmp_path, workers=1)
    assert {key[-1] for key in other} == {2} and all(t.bench.k == 2 for t in other.values())
    row = language_model.points(found)[0]
    assert row["fvu_ci"][0] <= row["fvu"] <= row["fvu_ci"][1]
    assert row["curve"][0] == [1, found["resid_post", False, "none"].trials[0].largest_rate]


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_largest_rates_are_means_over_seeds_of_each_seeds_own_busiest_latent(bench):
    a = [trial(bench, [[9, 1], [8, 0]], seed=0), trial(bench, [[0, 6], [1, 8]], seed=1)]
    b = [trial(bench, [[3, 0], [0, 2]], seed=1), trial(bench, [[1, 1], [5, 1]], seed=0)]
    found = language_model.largest_rates({"a": a, "b": b}, lambda r: r["b"] / r["a"])
    assert found.value == pytest.approx(((3 + 6) / 2) / ((17 + 14) / 2))
    assert found.by_seed == pytest.approx([6 / 17, 3 / 14])
    assert found.ci[0] <= found.value <= found.ci[1] and found.resampled == "seed × article"
    one = language_model.largest_rates({"a": a[:1], "b": b}, lambda r: r["b"] / r["a"])
    assert one.by_seed == [one.value] and one.resampled == "articles"
    with pytest.raises(ValueError, match="no seed is common to a, b"):
        language_model.largest_rates({"a": a[:1], "b": b[:1]}, lambda r: r["a"])


def test_the_error_is_a_ratio_of_sums(bench):
    some = trial(bench, [[1], [1]])
    some = replace(some, errors=np.array([1.0, 3.0]), norms=np.array([2.0, 14.0]))
    assert language_model.error([some]).value == pytest.approx(0.25)


# -- the mean ----------------------------------------------------------------------------------------------------------


def test_the_means_carriers_add_up_to_the_reconstructions_mean(bench):
    sae, rows = bench.student(Setting(), 0), bench.rows("test") + 3
    with torch.no_grad():
        sae.b_out.copy_(0.3 * rows.mean(0) + torch.randn(rows.shape[1], generator=generator(0)))
        rates = language_model.firings(sae, rows, torch.zeros(len(rows)).long())[0] / len(rows)
        along = float(sae(rows).double().mean(0) @ rows.double().mean(0) / rows.double().mean(0).square().sum())
    shares = language_model.mean_shares(sae, rows, rates)
    assert shares.bias + shares.dense + shares.others == pytest.approx(along, rel=1e-4)
    assert shares.dense and shares.others
    codes = language_model.codes_of(sae, rows, [4, 9], batch_size=50)
    torch.testing.assert_close(
        codes.double().mean(0), language_model.mean_codes(sae, rows)[[4, 9]], atol=1e-5, rtol=1e-4
    )


def test_cosines_are_of_directions(bench):
    sae = bench.student(Setting(), 0)
    assert language_model.cosines(sae, 5 * sae.decoder.weight[3].detach())[3] == pytest.approx(1, abs=1e-5)


def test_an_entry_speaks_for_its_chosen_setting(bench):
    one = trial(bench, [[1]], setting=Setting(lr=0.5))
    assert Entry([one], [one], [one]).setting.lr == 0.5
