"""Changes of the inputs keep what they say, targets are the teacher's own, and gains are the stated ratios."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers.models import activations, teachers
from helpers.models.activations import Moments
from helpers.parts import distilling
from helpers.parts.distilling import Spec
from helpers.settings import generator
from helpers.training import remedies
from tests import tiny


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


# -- a task and its students -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    teacher = teachers.load(tiny.save(folder / "teacher", "llama"), device="cpu")
    (folder / "text.txt").write_text(tiny.text(400))
    stores = {
        split: activations.harvest(
            teacher,
            str(folder / "text.txt"),
            layer=1,
            sites=["mlp_in"],
            n_tokens=n,
            split=split,
            cache_dir=folder,
        )
        for split, n in {"train": 2000, "validation": 200, "test": 300}.items()
    }
    return teacher, stores, folder


def test_targets_are_the_mlps_own_and_computed_once(setting, monkeypatch):
    teacher, stores, folder = setting
    noise = distilling.gaussian(stores["train"].moments("mlp_in"))
    given = distilling.task(teacher, 1, stores, noise, cache_dir=folder)
    torch.testing.assert_close(given.test.outputs * given.scale, teacher.mlp(1)(given.test.inputs))
    assert float(given.train.outputs.var(0).mean()) == pytest.approx(1, rel=1e-4)
    raw = distilling.task(teacher, 1, stores, noise, scaled=False, cache_dir=folder)
    torch.testing.assert_close(raw.test.outputs, given.test.outputs * given.scale)
    assert raw.fingerprint != given.fingerprint
    assert not torch.equal(given.validation.inputs[:100], given.test.inputs[:100])
    monkeypatch.setattr(distilling, "outputs_of", lambda *_: pytest.fail("computed twice"))
    again = distilling.task(teacher, 1, stores, noise, cache_dir=folder)
    assert torch.equal(again.train.outputs, given.train.outputs)


def test_students_with_padding_are_judged_on_text(setting):
    teacher, stores, folder = setting
    change = distilling.with_padding(torch.ones(16), 0.4)
    given = distilling.task(teacher, 1, stores, change, judged_on=distilling.REAL, cache_dir=folder)
    torch.testing.assert_close(given.test.inputs, stores["test"].tensor("mlp_in"))
    assert 0.35 < float((given.train.inputs == 1).all(1).float().mean()) < 0.45


def test_the_learning_rate_is_chosen_on_validation_and_test_sums_are_by_article(setting):
    teacher, stores, folder = setting
    given = distilling.task(teacher, 1, stores, cache_dir=folder)
    how = dict(lrs=[1e-4, 1e-2], seeds=[0, 1], steps=60, batch_size=64, cache_dir=folder)
    found = distilling.distil(given, Spec(8, 30, router_rank=4), **how)
    assert set(found.validation) == {1e-4, 1e-2} and found.lr == min(found.validation, key=found.validation.get)
    assert [s.lr for s in found.students] == [found.lr] * 2
    student = found.students[1].fit.student
    expected, y = student(given.test.inputs), given.test.outputs
    slow = float((expected - y).square().sum() / (y - y.mean(0)).square().sum())
    assert found.students[1].fvu == pytest.approx(slow, rel=1e-5)
    assert found.errors.sum(1) / found.norms.sum() == pytest.approx([s.fvu for s in found.students])
    assert found.on_test[found.lr] == found.students[0].fvu
    low, high = found.interval()
    assert low < found.fvu < high
    assert found.errors.shape == (2, len(set(given.test.group.tolist())))
    row = found.row()
    assert row["multiply_adds"] == student.multiply_adds and row["steps"] == 60 and len(row["fvu"]) == 2
    again = distilling.distil(given, Spec(8, 30, router_rank=4), **how)
    assert all(s.fit.from_cache for s in again.students)
    assert [s.fvu for s in again.students] == [s.fvu for s in found.students]


def test_mixed_precision_learns_the_same(setting):
    teacher, stores, folder = setting
    given = distilling.task(teacher, 1, stores, cache_dir=folder)
    how = dict(lrs=[1e-2], seeds=[0], steps=60, batch_size=64, cache_dir=False)
    full, mixed = (
        distilling.distil(given, Spec(8, 30, router_rank=4), autocast=dtype, **how) for dtype in (None, torch.bfloat16)
    )
    assert mixed.fvu == pytest.approx(full.fvu, rel=0.1) and mixed.fvu != full.fvu
    assert all(p.dtype == torch.float32 for p in mixed.students[0].fit.student.parameters())


def test_a_bias_is_there_where_the_balance_needs_one(setting):
    teacher, stores, folder = setting
    given = distilling.task(teacher, 1, stores, cache_dir=folder)
    how = dict(lrs=[1e-3], seeds=[0], steps=5, batch_size=64, cache_dir=False)
    spec = Spec(8, 30, router_rank=None, balance=remedies.LossFree(0.1))
    found = distilling.distil(given, spec, **how)
    assert found.students[0].fit.student.selection_bias.abs().max() > 0


# -- gains -------------------------------------------------------------------------------------------------------------


def made_up(active, errors, experts=0, task="real"):
    """A distillation with given test errors [seeds, articles] and an untrained student, for its costs."""
    spec = Spec(active, experts, router_rank=2)
    student = spec.build(6, 6, generator(0))
    fit = distilling.Fit(student)
    evaluation = distilling.Evaluation(torch.ones(1), torch.ones(1), torch.zeros(0), 0.0)
    students = [
        distilling.Distilled(spec, seed, 1e-3, fit, evaluation, np.asarray(e, float), np.ones(len(e)))
        for seed, e in enumerate(errors)
    ]
    return distilling.Distillation(task, spec, students, {1e-3: 0.1}, {1e-3: 0.1}, {1e-3: ([0], [1.0])})


def test_gain_at_equal_neurons_is_the_ratio_of_errors():
    dense = [made_up(4, [[4.0, 2.0], [4.0, 2.0]]), made_up(16, [[1.0, 0.5], [1.0, 0.5]])]
    sparse = made_up(4, [[2.0, 1.0], [1.0, 0.5]], experts=8)
    found = distilling.gain(dense, sparse)
    assert found.value == pytest.approx(12 / 4.5) and found.by_seed == pytest.approx([2.0, 4.0])
    assert found.ci[0] == pytest.approx(2.0) and found.ci[1] == pytest.approx(4.0) and found.width == pytest.approx(4)


def test_gain_at_equal_multiply_adds_reads_between_the_widths():
    dense = [made_up(4, [[4.0, 2.0]]), made_up(16, [[1.0, 0.5]])]
    sparse = made_up(4, [[2.0, 1.0]], experts=8)  # 2·6 + 8·2 + 2·12 + 2·12 = 76 multiply-adds: 6⅓ dense neurons
    found = distilling.gain(dense, sparse, "multiply_adds")
    assert found.width == pytest.approx(76 / 12)
    between = np.log(found.width / 4) / np.log(4)
    assert found.value == pytest.approx(6.0 ** (1 - between) * 1.5**between / 3.0)


def test_gain_is_over_the_seeds_that_all_have():
    dense = [made_up(4, [[4.0, 2.0], [9.0, 9.0]])]
    found = distilling.gain(dense, made_up(4, [[2.0, 1.0]], experts=8))
    assert found.value == pytest.approx(2.0) and found.by_seed == pytest.approx([2.0]) and found.n == 2
    wider = made_up(16, [[1.0, 1.0]])  # its one seed does not matter where another width is exactly as large
    both = made_up(4, [[2.0, 1.0], [3.0, 3.0]], experts=8)
    assert distilling.gain([*dense, wider], both).by_seed == pytest.approx([2.0, 3.0])
    assert distilling.contrast([dense, dense], [both, made_up(4, [[1.0, 1.0]], experts=8)]).by_seed == [2 / 3]


def test_contrast_is_the_ratio_of_two_gains():
    dense = [[made_up(4, [[4.0, 2.0]], task=task)] for task in ("real", "gaussian")]
    sparse = [made_up(4, [[2.0, 1.0]], 8, "real"), made_up(4, [[4.0, 4.0]], 8, "gaussian")]
    found = distilling.contrast(dense, sparse)
    assert found.value == pytest.approx(2.0 / 0.75) and found.ci == pytest.approx((2.0, 4.0))


def test_gain_refuses_what_cannot_be_compared():
    dense, sparse = [made_up(4, [[4.0, 2.0]]), made_up(5, [[1.0, 1.0]])], made_up(4, [[2.0, 1.0]], experts=8)
    with pytest.raises(ValueError, match="76 multiply_adds; allowed: 48 to 60"):
        distilling.gain(dense, sparse, "multiply_adds")
    with pytest.raises(ValueError, match="of task 'real'; allowed: 'gaussian'"):
        distilling.gain(dense, dataclasses.replace(sparse, task="gaussian"))
    with pytest.raises(ValueError, match="equal='time'"):
        distilling.gain(dense, sparse, "time")
