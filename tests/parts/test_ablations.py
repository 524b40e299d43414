"""Comparisons are the stated ratios in pairs, pure mixtures equal what they say, experts' rows are the strongest."""

import copy

import numpy as np
import pytest
import torch

from helpers.dictionary import dense_mlp, secret_moe
from helpers.models import activations, teachers
from helpers.parts import ablations, distilling
from helpers.parts.distilling import Spec
from helpers.settings import generator
from helpers.training import Fit
from tests import tiny


def made_up(errors, task="real"):
    """A distillation with given test errors [seeds, articles] and an untrained student."""
    fit = Fit(Spec(4).build(6, 6, generator(0)))
    judged = distilling.Evaluation(torch.ones(1), torch.ones(1), torch.zeros(0), 0.0)
    students = [
        distilling.Distilled(Spec(4), seed, 1e-3, fit, judged, np.asarray(e, float), np.ones(len(e)))
        for seed, e in enumerate(errors)
    ]
    return distilling.Distillation(task, Spec(4), students, {1e-3: 0.1}, {1e-3: 0.1}, {1e-3: ([0], [1.0])})


# -- comparisons -------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_sums_and_its_interval_is_paired():
    """Articles differ a hundredfold, seeds tenfold, and the ratio is 2 for each of them: so is every draw's."""
    under = np.outer([1.0, 10.0], [1.0, 100.0, 3.0])
    found = ablations.ratio(made_up(2 * under), made_up(under))
    assert found.value == pytest.approx(2) and found.ci == pytest.approx((2, 2)) and found.by_seed == [2, 2]
    assert found.n == 6 and found.resampled == "seed × article"
    uneven = ablations.ratio(made_up([[3.0, 100.0]]), made_up([[1.0, 100.0]]))
    assert uneven.value == pytest.approx(103 / 101) and uneven.ci == pytest.approx((1, 3))
    assert uneven.resampled == "articles"


def test_what_is_not_in_pairs_is_refused():
    with pytest.raises(ValueError, match="one task and the same seeds"):
        ablations.ratio(made_up([[1.0, 2.0]]), made_up([[1.0, 2.0]], task="gaussian"))
    with pytest.raises(ValueError, match="one task and the same seeds"):
        ablations.ratio(made_up([[1.0, 2.0]]), made_up([[1.0, 2.0], [1.0, 2.0]]))


def test_settled_compares_the_middle_with_the_end():
    student = Spec(4).build(6, 6, generator(0))
    loss = [9.0] * 45 + [3.0] * 10 + [7.0] * 35 + [2.0] * 10
    fits = [Fit(student, list(range(100)), loss), Fit(student, list(range(100)), [2 * each for each in loss])]
    found = ablations.settled(fits)
    assert found.value == pytest.approx(1.5) and found.ci == pytest.approx((1.5, 1.5)) and found.n == 10
    with pytest.raises(ValueError, match="share=0.01"):
        ablations.settled(fits, 0.01)


def test_every_rate_is_judged_and_the_first_seed_is_that_of_distil(tmp_path):
    teacher = teachers.load(tiny.save(tmp_path / "teacher", "llama"), device="cpu")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    options = {"layer": 1, "sites": ["mlp_in"], "cache_dir": tmp_path}
    stores = {
        split: activations.harvest(teacher, str(tmp_path / "text.txt"), n_tokens=n, split=split, **options)
        for split, n in {"train": 1500, "validation": 200, "test": 300}.items()
    }
    given = distilling.task(teacher, 1, stores, cache_dir=tmp_path)
    how = {"lrs": [1e-4, 1e-2], "steps": 40, "batch_size": 64, "cache_dir": tmp_path}
    one = distilling.distil(given, Spec(8, 30, router_rank=4), seeds=[0], **how)
    found = ablations.every_rate(given, Spec(8, 30, router_rank=4), seeds=[0, 1], **how)
    assert list(found) == [1e-4, 1e-2] and all(len(each.students) == 2 for each in found.values())
    assert found[one.lr].students[0].fit.from_cache and found[one.lr].students[0].fvu == one.fvu
    assert {lr: each.validation[lr] for lr, each in found.items()} == pytest.approx(one.validation)
    assert found[1e-4].fvu > found[1e-2].fvu and found[1e-2].students[0].fvu != found[1e-2].students[1].fvu
    with pytest.raises(ValueError, match="lrs="):
        ablations.every_rate(given, Spec(8), seeds=[0], **how | {"lrs": []})


# -- pure mixtures -----------------------------------------------------------------------------------------------------


def student(gate="softmax", shared=3, rank=4, k=2, scale=2.0):
    """A student with scores of some size, so that a softmax over them is far from flat."""
    model = secret_moe(
        12, 10, 9, k, generator=generator(0), router_rank=rank, shared_neurons=shared, dtype=torch.float64
    )
    model.router.weight.data *= scale
    model.gate = gate
    return model


def inputs(n=200):
    return torch.randn(n, 12, generator=generator(1), dtype=torch.float64)


def difference(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max() / a(x).abs().max())


@pytest.mark.parametrize("rank", [None, 4])
def test_with_hard_gates_a_pure_mixture_of_as_many_neurons_is_the_student(rank):
    ours = student("hard", rank=rank)
    pure = ablations.always_chosen(ours, inputs())
    assert pure.active_neurons == ours.active_neurons == 5 and pure.shared is None
    assert difference(ours, pure, inputs()) < 1e-13
    assert (pure.encode(inputs()).indices < 3).sum(1).tolist() == [3] * 200, "shared neurons always win"


@pytest.mark.parametrize("rank", [None, 4])
def test_with_a_softmax_copies_make_it_exact_and_constants_do_not(rank):
    ours = student(rank=rank)
    copies, constant = ablations.with_copies(ours), ablations.always_chosen(ours, inputs())
    assert copies.shared is None and copies.active_neurons == 2 * (3 + 1) and copies.n_features == 9 * 4
    assert difference(ours, copies, inputs()) < 1e-12
    assert constant.active_neurons == 5 and difference(ours, constant, inputs()) > 1e-6
    one = student(rank=rank, k=1)
    assert difference(one, ablations.with_copies(one), inputs()) < 1e-12
    assert ablations.with_copies(one).active_neurons == one.active_neurons == 4, "one expert: as many as the student"


def test_a_flat_router_leaves_no_error():
    """Scores that do not depend on the input have a constant ln Z, which an affine function has no trouble with."""
    ours = student(scale=0.0)
    assert difference(ours, ablations.always_chosen(ours, inputs()), inputs()) < 1e-12


def test_other_models_are_refused():
    for model in (student(shared=0), dense_mlp(12, 10, 4, generator=generator(0))):
        with pytest.raises(ValueError, match="beside a shared MLP"):
            ablations.with_copies(model)
    with pytest.raises(ValueError, match="gate='hard'"):
        ablations.with_copies(student("hard"))
    biased = copy.deepcopy(student())
    biased.selection_bias = torch.zeros(9, dtype=torch.float64)
    with pytest.raises(ValueError, match="selection bias"):
        ablations.always_chosen(biased, inputs())


# -- what an expert responds to ----------------------------------------------------------------------------------------


def test_strongest_rows_are_those_of_the_dense_code_matrix():
    ours, x = student(), inputs()
    with torch.no_grad():
        dense = ours.encode(x).to_dense(9).abs()
    found = ablations.strongest(ours, x, 5, batch_size=64)
    for atom, rows in enumerate(found):
        slow = sorted((r for r in range(200) if dense[r, atom] > 0), key=lambda r: -float(dense[r, atom]))[:5]
        assert rows.tolist() == slow
    with pytest.raises(ValueError, match="count=0"):
        ablations.strongest(ours, x, 0)


def test_concentration_is_the_share_of_the_commonest_label():
    labels = np.array([5, 5, 7, 8, 5])
    assert ablations.concentration([np.array([0, 1, 2, 3]), np.array([2]), np.arange(5)], labels).tolist() == [
        0.5,
        1.0,
        0.6,
    ]
