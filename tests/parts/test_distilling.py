"""Changes of the inputs keep what they say, targets are the teacher's own, gains are the stated ratios, and experts'
rows are the strongest."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers.dictionary import secret_moe
from helpers.models import activations, teachers
from helpers.models.activations import Moments
from helpers.parts import distilling
from helpers.parts.distilling import Distillation, Spec
from helpers.settings import generator
from helpers.study import study
from helpers.study.study import Arm, Outcome
from helpers.training import remedies
from tests import tiny
from tests.reference.metrics_numpy import of_two


@pytest.fixture(scope="module")
def rows():
    """Correlated, skewed rows with a mean, so that every property that a change must keep or break is there."""
    mix = torch.randn(6, 6, generator=generator(0))
    return (torch.randn(4000, 6, generator=generator(1)).exp() - 1) @ mix + 2.0


@pytest.fixture(scope="module")
def moments(rows):
    return Moments.of(rows)


def covariance(rows):
    return Moments.of(rows).cov


# -- changes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [distilling.gaussian, distilling.shuffled, distilling.recoloured])
def test_mean_and_covariance_stay(rows, moments, make):
    changed = make(moments).apply(rows.clone(), generator(2))
    scale = float(moments.cov.diagonal().max())
    torch.testing.assert_close(changed.mean(0).double(), moments.mean, atol=0.15 * scale**0.5, rtol=0)
    torch.testing.assert_close(covariance(changed), moments.cov, atol=0.1 * scale, rtol=0)
    assert not torch.allclose(changed, rows)


def test_shuffling_keeps_each_principal_coordinate_and_breaks_their_company(rows, moments):
    axes = torch.linalg.eigh(moments.cov).eigenvectors.float()
    before = (rows - moments.mean.float()) @ axes
    after = (distilling.shuffled(moments).apply(rows.clone(), generator(2)) - moments.mean.float()) @ axes
    torch.testing.assert_close(after.sort(0).values, before.sort(0).values, atol=1e-3, rtol=1e-3)
    together = [torch.corrcoef(z.abs().T)[~torch.eye(6, dtype=bool)].abs().mean() for z in (before, after)]
    assert together[0] > 0.1 > 0.05 > together[1]


def test_recolouring_is_one_linear_map_that_whitening_turns_into_a_rotation(rows, moments):
    change = distilling.recoloured(moments, seed=3)
    changed = change.apply(rows, generator(0)).double()
    move = torch.linalg.lstsq(rows.double() - moments.mean, changed - moments.mean).solution
    values, axes = torch.linalg.eigh(moments.cov)
    white = (axes * values.rsqrt()) @ axes.T @ move.T @ (axes * values.sqrt()) @ axes.T
    torch.testing.assert_close(white @ white.T, torch.eye(6, dtype=torch.float64), atol=1e-3, rtol=0)
    assert torch.equal(changed, change.apply(rows, generator(9)).double())
    assert change.name != distilling.recoloured(moments, seed=4).name


def test_without_top_empties_just_those_directions(rows, moments):
    changed = distilling.without_top(moments, 2).apply(rows, generator(0))
    axes = torch.linalg.eigh(moments.cov).eigenvectors
    variances = ((changed.double() - moments.mean) @ axes).var(0)
    kept = ((rows.double() - moments.mean) @ axes).var(0)
    torch.testing.assert_close(variances[:4], kept[:4], rtol=1e-4, atol=0)
    assert variances[4:].max() < 1e-6 * kept.max()


def test_padding_takes_the_stated_share_of_rows(rows):
    row = torch.full((6,), 7.0)
    changed = distilling.with_padding(row, 0.3).apply(rows.clone(), generator(0))
    same = (changed == row).all(1)
    assert int(same.sum()) == 1200 and torch.equal(changed[~same], rows[~same])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: distilling.without_top(m, 6), "count=6"),
        (lambda m: distilling.with_padding(m.mean, 1.0), "share=1.0"),
        (lambda m: Spec(0), "active=0"),
        (lambda m: Spec(8, 3), "experts=3"),
        (lambda m: Spec(8, 30, shared=8), "shared=8"),
    ],
)
def test_bad_parameters_are_named(moments, call, named):
    with pytest.raises(ValueError, match=named):
        call(moments)


# -- a task and its students -------------------------------------------------------------------------------------------

LENGTH = {"steps": 60, "batch_size": 64}
SPEC = Spec(8, 30, router_rank=4)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    teacher = teachers.load(tiny.save(folder / "teacher", "llama"), device="cpu")
    (folder / "text.txt").write_text(tiny.text(400))
    options = {"layer": 1, "sites": ["mlp_in"], "cache_dir": folder}
    stores = {
        split: activations.harvest(teacher, str(folder / "text.txt"), n_tokens=n, split=split, **options)
        for split, n in {"train": 2000, "validation": 200, "test": 300}.items()
    }
    return teacher, stores, folder


@pytest.fixture(scope="module")
def real(setting):
    teacher, stores, folder = setting
    return distilling.Task(teacher, 1, stores, cache_dir=folder, **LENGTH)


def test_targets_are_the_mlps_own_and_computed_once(setting):
    teacher, stores, folder = setting
    how = {"cache_dir": folder, **LENGTH}
    noise = distilling.gaussian(stores["train"].moments("mlp_in"))
    given = distilling.Task(teacher, 1, stores, noise, **how)
    torch.testing.assert_close(given.test.outputs * given.scale, teacher.mlp(1)(given.test.inputs))
    assert float(given.train.outputs.var(0).mean()) == pytest.approx(1, rel=1e-4)
    raw = distilling.Task(teacher, 1, stores, noise, scaled=False, **how)
    torch.testing.assert_close(raw.test.outputs, given.test.outputs * given.scale)
    assert raw.asked != given.asked
    assert not torch.equal(given.validation.inputs[:100], given.test.inputs[:100])
    hook = teacher.mlp(1).register_forward_hook(lambda *_: pytest.fail("computed twice"))
    again = distilling.Task(teacher, 1, stores, noise, **how)
    hook.remove()
    assert torch.equal(again.train.outputs, given.train.outputs) and again.asked == given.asked


def test_students_with_padding_are_judged_on_text(setting):
    teacher, stores, folder = setting
    change = distilling.with_padding(torch.ones(16), 0.4)
    given = distilling.Task(teacher, 1, stores, change, judged_on=distilling.REAL, cache_dir=folder, **LENGTH)
    torch.testing.assert_close(given.test.inputs, stores["test"].tensor("mlp_in"))
    assert 0.35 < float((given.train.inputs == 1).all(1).float().mean()) < 0.45


def test_the_learning_rate_is_chosen_on_validation_and_test_sums_are_by_article(setting, real):
    how = {"lrs": [1e-4, 1e-2], "seeds": [0, 1], "cache_dir": setting[2]}
    found = distilling.distil(real, SPEC, **how)
    validation = {lr: each.validation["fvu"] for lr, each in found.tried.items()}
    assert set(validation) == {1e-4, 1e-2} and validation[1e-4] > validation[1e-2]
    assert [each.arm.lr for each in found.outcomes] == [1e-2] * 2 and [each.seed for each in found.outcomes] == [0, 1]
    trained = study.trained(real, found.outcomes[1].arm, 1, cache_dir=setting[2])
    assert trained.from_cache
    output, y = trained.student(real.test.inputs), real.test.outputs
    slow = float((output - y).square().sum() / (y - y.mean(0)).square().sum())
    assert found.outcomes[1].fvu == pytest.approx(slow, rel=1e-5)
    assert len(found.outcomes[0].sums["errors"]) == len(set(real.test.article.tolist()))
    assert found.tried[1e-2].fvu == found.outcomes[0].fvu
    low, high = found.fvu.ci
    assert low < found.fvu.value < high
    row = found.row()
    assert row["multiply_adds"] == trained.student.multiply_adds and row["steps"] == 60
    assert row["fvu"] == pytest.approx([each.fvu for each in found.outcomes]) and row["ci"] == (low, high)
    again = distilling.distil(real, SPEC, **how)
    assert [each.fvu for each in again.outcomes] == [each.fvu for each in found.outcomes]
    with pytest.raises(ValueError, match="lrs="):
        distilling.distil(real, SPEC, **how | {"lrs": []})


def test_mixed_precision_learns_the_same(real):
    arm = Arm("", SPEC, lr=1e-2)
    full, mixed = (
        study.run(real, [dataclasses.replace(arm, recipe={"autocast": dtype})], 0, cache_dir=False)[0]
        for dtype in (None, torch.bfloat16)
    )
    assert mixed.fvu == pytest.approx(full.fvu, rel=0.1) and mixed.fvu != full.fvu
    student = study.trained(real, mixed.arm, 0, cache_dir=False).student
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_a_bias_is_there_where_the_balance_needs_one(real):
    spec = Spec(8, 30, router_rank=None, balance=remedies.LossFree(0.1))
    found = distilling.distil(real, spec, lrs=[1e-3], seeds=[0], recipe={"steps": 5}, cache_dir=False)
    student = study.trained(real, found.outcomes[0].arm, 0, cache_dir=False).student
    assert student.selection_bias.abs().max() > 0 and found.row()["steps"] == 5


# -- gains -------------------------------------------------------------------------------------------------------------


def made_up(active, errors, experts=0, task="real"):
    """A distillation with given test errors [seeds, articles], and an untrained student's costs."""
    spec = Spec(active, experts, router_rank=2)
    about = {name: getattr(spec.build(6, 6, generator(0)), cost) for name, cost in distilling.COSTS.items()}
    sums = [{"errors": np.asarray(e, float), "norms": np.ones(len(e))} for e in errors]
    outcomes = [Outcome(each, {"fvu": 0.1}, about, Arm("", spec), seed) for seed, each in enumerate(sums)]
    return Distillation(task, spec, {1e-3: outcomes[0]}, outcomes)


def test_gain_at_equal_neurons_is_the_ratio_of_errors():
    dense = [made_up(4, [[4.0, 2.0], [4.0, 2.0]]), made_up(16, [[1.0, 0.5], [1.0, 0.5]])]
    sparse = made_up(4, [[2.0, 1.0], [1.0, 0.5]], experts=8)
    found = distilling.gain(dense, sparse)
    assert found.value == pytest.approx(12 / 4.5) and found.by_seed == pytest.approx([2.0, 4.0])
    assert found.ci == pytest.approx(of_two(found.value, 2.0, 4.0))
    assert distilling.dense_width(dense, sparse) == pytest.approx(4)


def test_gain_at_equal_multiply_adds_reads_between_the_widths():
    dense = [made_up(4, [[4.0, 2.0]]), made_up(16, [[1.0, 0.5]])]
    sparse = made_up(4, [[2.0, 1.0]], experts=8)  # 2·6 + 8·2 + 2·12 + 2·12 = 76 multiply-adds: 6⅓ dense neurons
    found = distilling.gain(dense, sparse, "multiply_adds")
    width = distilling.dense_width(dense, sparse, "multiply_adds")
    assert width == pytest.approx(76 / 12)
    between = np.log(width / 4) / np.log(4)
    assert found.value == pytest.approx(6.0 ** (1 - between) * 1.5**between / 3.0)


def test_gain_is_over_the_seeds_that_all_have():
    dense = [made_up(4, [[4.0, 2.0], [9.0, 9.0]])]
    found = distilling.gain(dense, made_up(4, [[2.0, 1.0]], experts=8))
    assert found.value == pytest.approx(2.0) and found.by_seed == pytest.approx([2.0]) and found.n == 2
    wider = made_up(16, [[1.0, 1.0]])  # its one seed does not matter where another width is exactly as large
    both = made_up(4, [[2.0, 1.0], [3.0, 3.0]], experts=8)
    assert distilling.gain([*dense, wider], both).by_seed == pytest.approx([2.0, 3.0])
    assert distilling.contrast([dense, dense], [both, made_up(4, [[1.0, 1.0]], experts=8)]).by_seed == pytest.approx(
        [2 / 3]
    )


def test_contrast_is_the_ratio_of_two_gains():
    dense = [[made_up(4, [[4.0, 2.0]], task=task)] for task in ("real", "gaussian")]
    sparse = [made_up(4, [[2.0, 1.0]], 8, "real"), made_up(4, [[4.0, 4.0]], 8, "gaussian")]
    found = distilling.contrast(dense, sparse)
    assert found.value == pytest.approx(2.0 / 0.75) and found.ci == pytest.approx(of_two(found.value, 2.0, 4.0))


def test_gain_refuses_what_cannot_be_compared():
    dense, sparse = [made_up(4, [[4.0, 2.0]]), made_up(5, [[1.0, 1.0]])], made_up(4, [[2.0, 1.0]], experts=8)
    with pytest.raises(ValueError, match="76 multiply_adds; allowed: 48 to 60"):
        distilling.gain(dense, sparse, "multiply_adds")
    with pytest.raises(ValueError, match="of task .*'real'.*; allowed: 'gaussian'"):
        distilling.gain(dense, dataclasses.replace(sparse, task="gaussian"))
    with pytest.raises(ValueError, match="equal='time'"):
        distilling.gain(dense, sparse, "time")


def test_a_ratio_is_of_sums_and_its_interval_is_paired():
    """Articles differ a hundredfold, seeds tenfold, and the ratio is 2 for each of them: so it is without any."""
    under = np.outer([1.0, 10.0], [1.0, 100.0, 3.0])
    over, under = made_up(4, 2 * under), made_up(5, under)
    found = distilling.ratio(over, under)
    assert found.value == pytest.approx(2) and found.ci == pytest.approx((2, 2)) and found.by_seed == [2, 2]
    assert found.n == (2, 3) and found.resampled == "seed × article"
    over, under = made_up(4, [[3.0, 100.0]]), made_up(5, [[1.0, 100.0]])
    uneven = distilling.ratio(over, under)
    assert uneven.value == pytest.approx(103 / 101) and uneven.ci == pytest.approx(of_two(uneven.value, 1, 3))
    assert uneven.resampled == "articles"
    with pytest.raises(ValueError, match="'real' and 'gaussian'; allowed: one task"):
        distilling.ratio(over, made_up(5, [[1.0, 100.0]], task="gaussian"))


# -- what an expert responds to ----------------------------------------------------------------------------------------


def test_strongest_rows_are_those_of_the_dense_code_matrix():
    random = {"generator": generator(0), "dtype": torch.float64}
    ours = secret_moe(12, 10, 9, 2, router_rank=4, shared_neurons=3, **random)
    x = torch.randn(200, 12, generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        dense = ours.encode(x).to_dense(9).abs()
    found = distilling.strongest(ours, x, 5)
    for atom, rows in enumerate(found):
        slow = sorted((r for r in range(200) if dense[r, atom] > 0), key=lambda r: -float(dense[r, atom]))[:5]
        assert rows.tolist() == slow
    with pytest.raises(ValueError, match="count=0"):
        distilling.strongest(ours, x, 0)


def test_concentration_is_the_share_of_the_commonest_label():
    labels = np.array([5, 5, 7, 8, 5])
    assert distilling.concentration([np.array([0, 1, 2, 3]), np.array([2]), np.arange(5)], labels).tolist() == [
        0.5,
        1.0,
        0.6,
    ]
