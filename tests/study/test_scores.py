"""Metrics against closed forms and against plain NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress
from scipy.stats import t as student

from helpers.dictionary import topk_sae
from helpers.settings import generator
from helpers.study import scores
from tests.reference.metrics_numpy import slow_comparison, slow_recovery


def test_fvu_has_its_closed_forms():
    y = torch.randn(500, 6, generator=generator(0)) + 100
    assert scores.fvu(y, y) == 0
    assert scores.fvu(y.double().mean(0).float().expand_as(y), y) == pytest.approx(1, rel=1e-5)
    shifted = y + 1  # a constant offset is an error and must not be forgiven
    variance = float((y - y.mean(0)).square().sum(1).mean())
    assert scores.fvu(shifted, y) == pytest.approx(6 / variance, rel=1e-3)
    with pytest.raises(ValueError, match="constant"):
        scores.fvu(y, torch.ones_like(y))


def test_evaluation_equals_a_dense_recount():
    model = topk_sae(6, 30, 4, generator=generator(0), dtype=torch.float64)
    x = torch.randn(700, 6, generator=generator(1), dtype=torch.float64)
    result = scores.evaluate(model, x.numpy(), batch_size=128)
    codes = model.encode(x).to_dense(30)
    assert len(result.squared_error) == 700
    assert result.fvu == pytest.approx(scores.fvu(model(x).detach(), x), rel=1e-12)
    np.testing.assert_allclose(result.rates, (codes != 0).double().mean(0))
    assert result.dead == pytest.approx(float(((codes != 0).sum(0) == 0).double().mean()))
    assert result.dense == pytest.approx(float(((codes != 0).double().mean(0) > 0.1).double().mean()))
    assert result.largest_rate == pytest.approx(float(result.rates.max()))
    assert result.chosen_but_zero == pytest.approx(1 - float((codes != 0).sum()) / (700 * 4))
    for inputs, targets in ((x, x[:3]), (x[:0], x[:0])):
        told = f"inputs has {len(inputs)} rows, targets {len(targets)}; allowed: as many, at least one"
        with pytest.raises(ValueError, match=told):
            scores.evaluate(model, inputs, targets)


def test_ce_recovered():
    assert scores.ce_recovered(10.0, 4.0, 3.0) == pytest.approx(6 / 7)
    with pytest.raises(ValueError, match="ablated=3.0"):
        scores.ce_recovered(3.0, 4.0, 3.0)


def test_an_interval_of_a_mean_is_students():
    sample = np.random.default_rng(0).normal(5, 1, size=7)
    expected = student.interval(0.9, 6, sample.mean(), sample.std(ddof=1) / 7**0.5)
    assert scores.t_interval(sample, level=0.9) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="1 units; allowed: at least 2"):
        scores.t_interval(np.ones(1))


def test_intervals_leave_whole_units_out():
    pairs = np.c_[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]
    lo, hi = scores.t_interval(pairs, lambda a: a[:, 0].sum() / a[:, 1].sum())
    assert lo == pytest.approx(0.1) and hi == pytest.approx(0.1)


def test_ends_stay_in_the_range_of_a_scale():
    ratio, share = [9.0, 1.0, 0.5], [0.9, 0.99, 0.97]
    plain, log, logit = (
        scores.over_seeds(ratio if of == "log" else share, scale=of) for of in ("plain", "log", "logit")
    )
    assert scores.over_seeds(ratio).ci[0] < 0 < log.ci[0] < log.value < log.ci[1]
    assert plain.ci[1] > 1 > logit.ci[1] > logit.value > logit.ci[0] > 0
    at_edge = scores.over_seeds([1.0, 1.0, 0.9], scale="logit")  # without the last all are 1
    usual = scores.over_seeds([1.0, 1.0, 0.9])
    assert usual.ci[1] > 1 and at_edge.ci == (usual.ci[0], 1)
    assert scores.over_seeds([0.0] * 3, scale="log").ci == (0, 0)
    with pytest.raises(ValueError, match="value=1.5 on scale='logit'; allowed: 0.0 to 1.0"):
        scores.over_seeds([1.0, 2.0], scale="logit")
    with pytest.raises(ValueError, match="scale='root' is unknown; allowed: 'plain', 'log', 'logit'"):
        scores.over_seeds(ratio, scale="root")


def test_a_ratio_on_the_log_scale_is_the_inverse_of_its_inverse():
    errors = np.random.default_rng(0).uniform(1, 2, (2, 3, 6))
    cells = {i: {seed: {"errors": row, "norms": np.ones(6)} for seed, row in enumerate(errors[i])} for i in (0, 1)}
    over, under = (scores.Sums(cells).ratio(*pair) for pair in ((0, 1), (1, 0)))
    assert (over.value, *over.ci) == pytest.approx((1 / under.value, 1 / under.ci[1], 1 / under.ci[0]))


def test_a_slope_has_the_interval_of_the_scatter_about_its_line():
    x, y = [1.0, 2.0, 4.0, 7.0], [2.1, 2.9, 5.2, 7.9]
    found, theirs = scores.slope(x, y, level=0.9), linregress(x, y)
    off = student.ppf(0.95, 2) * theirs.stderr
    assert (found.value, *found.ci) == pytest.approx((theirs.slope, theirs.slope - off, theirs.slope + off))
    assert (found.n, found.resampled) == (4, "sizes")
    with pytest.raises(ValueError, match="x has 2 different values; allowed: at least 3"):
        scores.slope([1, 1, 2], [1, 2, 3])


def test_a_slope_over_two_sizes_rests_on_two():
    found = scores.over_seeds([1.0, 2.0, 3.0])
    assert scores.over_sizes(found, [1, 2, 3]) == found
    few = scores.over_sizes(found, [1, 2, 2])
    assert (few.n, few.resampled, few.ci) == (2, "sizes", found.ci)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_by_group_sums(groups):
    values = torch.arange(len(groups)).double()
    expected = [sum(v for v, g in zip(values.tolist(), groups, strict=True) if g == u) for u in sorted(set(groups))]
    assert scores.by_group(values, torch.tensor(groups)).tolist() == expected


SHAPES = [(1, 1), (3, 5), (5, 3), (5, 5), (6, 2), (2, 6), (4, 0)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_true", "n_learned"), SHAPES)
def test_recovery_equals_the_slow_version_over_all_matchings(n_true, n_learned, seed):
    truth = torch.randn(n_true, 3, generator=generator(seed), dtype=torch.float64)
    learned = torch.randn(n_learned, 3, generator=generator(100 + seed), dtype=torch.float64)
    result = scores.recovery(learned, truth, threshold=0.6)
    expected = slow_recovery(learned.numpy(), truth.numpy(), 0.6)
    found = {name: getattr(result, name) for name in expected}
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert len(result.of_truth) == n_true


def test_recovery_counts_both_directions_and_duplicates():
    truth = torch.eye(4)
    learned = torch.tensor([[3.0, 0, 0, 0], [1, 0.1, 0, 0], [0, -2, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0.2]])
    result = scores.recovery(learned, truth)
    assert result.found == 2 / 4  # the first by two learned ones, the second by the last; a sign is not forgiven
    assert result.matched == 3 / 5
    assert result.duplicates == 2 / 5
    cosines = [1, 1 / 1.04**0.5, 0.5**0.5, 0]
    assert result.mcc == pytest.approx(sum(cosines) / 4)
    assert result.mmcs == pytest.approx((1 + 1 / 1.04**0.5 + 0.5**0.5 + 0.5**0.5) / 4)


def test_recovery_does_not_depend_on_lengths_or_order():
    truth, learned = (torch.randn(n, 4, generator=generator(n), dtype=torch.float64) for n in (7, 9))
    order = torch.randperm(9, generator=generator(0))
    one = scores.recovery(learned, truth, threshold=0.5)
    other = scores.recovery(5 * learned[order], truth / 3, threshold=0.5)
    torch.testing.assert_close(one.of_truth, other.of_truth)
    assert [one.found, one.matched, one.mmcs, one.mcc, one.duplicates] == pytest.approx(
        [other.found, other.matched, other.mmcs, other.mcc, other.duplicates]
    )
    perfect = scores.recovery(2 * truth.flip(0), truth)
    assert [perfect.found, perfect.matched, perfect.mmcs, perfect.mcc] == pytest.approx([1, 1, 1, 1])


def test_a_comparison_has_its_seeds_and_an_interval_that_holds_it():
    data = np.random.default_rng(0).gamma(2.0, size=(3, 40, 2))
    columns = [{"errors": rows[:, 0], "norms": rows[:, 1]} for rows in data]
    ratio = scores.Sums({"a": dict(enumerate(columns))}).fvu("a")
    sums = data.sum(1)
    assert ratio.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())
    assert ratio.by_seed == pytest.approx((sums[:, 0] / sums[:, 1]).tolist())
    assert (ratio.n, ratio.resampled) == ((3, 40), "seed × article")
    # the delta method's standard error, over articles: that of seeds comes on top
    residual = data.mean(0)[:, 0] - ratio.value * data.mean(0)[:, 1]
    error = residual.std() / (data[..., 1].mean() * 40**0.5)
    assert 2.5 * error < ratio.ci[1] - ratio.ci[0] < 12 * error
    one = scores.Sums({"a": {0: columns[0]}}).fvu("a")
    alone = scores.t_interval(data[0], lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), scale="log")
    assert one.resampled == "articles" and one.ci == pytest.approx(alone)


def test_over_seeds_leaves_a_seed_out_of_all_columns():
    first, second = [0.3, 0.5, 0.4], [0.1, 0.2, 0.2]
    found = scores.over_seeds(first, second, statistic=lambda a, b: a.sum() / b.sum())
    theirs = slow_comparison(np.c_[first, second][:, None], lambda some: some[..., 0].sum() / some[..., 1].sum())
    assert found.value == pytest.approx(1.2 / 0.5) and found.ci == pytest.approx(theirs.ci)
    assert found.by_seed == pytest.approx([3.0, 2.5, 2.0])
    assert (found.n, found.resampled) == (3, "seeds")
    mean = scores.over_seeds(first)
    assert mean.value == pytest.approx(0.4) and mean.ci == pytest.approx(scores.t_interval(np.array(first)))
    equal = scores.over_seeds([0.1] * 7)
    assert equal.ci[0] <= equal.value <= equal.ci[1]


def test_a_table_has_no_interval_over_few_units_and_a_wider_one_at_a_higher_level():
    errors = np.random.default_rng(0).uniform(1, 2, (3, 6))
    table = scores.Sums({"a": {seed: {"errors": row, "norms": np.full(6, 4.0)} for seed, row in enumerate(errors)}})
    usual, wide = (table.compare(lambda cell: cell.fvu, level=level) for level in (0.95, 0.99))
    assert usual.value == pytest.approx(errors.sum() / 72)
    assert wide.ci[0] < usual.ci[0] < usual.value < usual.ci[1] < wide.ci[1]
    assert table.compare(lambda cell: cell.fvu, fewest=7) == replace(usual, ci=None)
    assert table.compare(lambda cell: cell.fvu, level=None).ci is None
    lone = scores.Sums({"a": {0: {"errors": errors[0, :1], "norms": np.ones(1)}}})
    assert lone.compare(lambda cell: cell.fvu, fewest=5).value == errors[0, 0]
    with pytest.raises(ValueError, match="at least 2"):
        lone.compare(lambda cell: cell.fvu)


def test_a_constant_target_is_refused_though_its_mean_is_rounded():
    constant = torch.full((1000, 3), 0.1, dtype=torch.float64)
    assert (constant - constant.mean(0)).any()  # or the test would be idle
    with pytest.raises(ValueError, match="constant"):
        scores.fvu(constant + 1, constant)
    with pytest.raises(ValueError, match="constant"):
        _ = scores.evaluate(topk_sae(3, 9, 2, generator=generator(0), dtype=torch.float64), constant).fvu
    with pytest.raises(ValueError, match="constant"):
        scores.Sums({"a": {0: {"errors": np.ones(5), "norms": np.zeros(5)}}}).fvu("a")


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-13, 1e20, 1e38])
def test_recovery_does_not_depend_on_lengths(size):
    truth = torch.randn(5, 8, generator=generator(0))
    learned = torch.cat([truth[:3], torch.randn(4, 8, generator=generator(1)), 2 * truth[:1]])
    plain, scaled = scores.recovery(learned, truth), scores.recovery(learned * (size / 8), truth)
    assert scaled.mcc == pytest.approx(
        plain.mcc, abs=0.05 if size < 1e-38 else 1e-6
    )  # denormal numbers have few digits
    assert (scaled.found, scaled.duplicates) == (plain.found, plain.duplicates)


# ------------------------------------------------------------------------------------------------------ relabelled data
def test_columns_are_dealt_afresh_for_each_seed_and_never_alike_for_all():
    columns = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    drawn = list(scores.relabelled(*columns))
    assert len(drawn) == scores.RELABELLINGS
    for one in drawn:
        assert (np.sort(one, axis=0) == columns).all() and not (one == columns).all()
    assert len({one.tobytes() for one in drawn}) == 2**3 - 2
    assert len(list(scores.relabelled([1.0, 1.0], [1.0, 1.0], draws=3))) == 3
    with pytest.raises(ValueError, match="columns have 1 seeds"):
        next(scores.relabelled([1.0], [2.0]))


def test_a_relabelled_table_keeps_its_pairs_and_loses_what_sets_groups_apart():
    random = np.random.default_rng(0)
    norms = random.uniform(1, 2, size=(4, 3, 30))
    cells = {
        name: {seed: {"errors": level * norms[i, seed], "norms": norms[i, seed]} for seed in range(3)}
        for i, (name, level) in enumerate({"a": 0.9, "b": 0.3, "c": 0.6, "d": 0.2}.items())
    }
    table = scores.Sums(cells)
    gain = lambda a, b, c, d: (a.fvu / b.fvu) / (c.fvu / d.fvu)  # noqa: E731
    assert table.ratio("a", "b").value == pytest.approx(3)
    within = [dealt.ratio("a", "b") for dealt in table.relabelled(["a"], ["b"])]
    assert np.mean([one.ci[0] < 1 < one.ci[1] for one in within]) > 0.9
    for dealt in table.relabelled(["a", "b"], ["c", "d"], draws=3):
        for seed in range(3):
            for pair in (("a", "b"), ("c", "d")):
                first, second = (dealt.cells[name][seed] for name in pair)
                levels = [each["errors"] / each["norms"] for each in (first, second)]
                assert levels[0] / levels[1] == pytest.approx(np.full(30, 3))  # dealt together
        assert dealt.compare(gain, "a", "b", "c", "d").value == pytest.approx(1, abs=0.05)
