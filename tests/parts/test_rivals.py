"""The newer remedies: the penalty on frequency against its slow version, and aligned rows against what they promise."""

import numpy as np
import pytest
import torch

from helpers.dictionary import SparseCodes, Trace
from helpers.parts.rivals import Aligned, Frequency
from helpers.training import Shuffled, fit
from helpers.training.remedies import Moment
from tests.reference import losses_numpy as slow
from tests.training.test_remedies import SILENT, D, N, arrays, check, moment, normal, sae


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 0.6), (2.0, 1.0)])
def test_frequency_and_its_gradient(alpha, temperature, tied):
    model = sae(tied)
    now, remedy = moment(model), Frequency(alpha, temperature)
    chosen, x, held = now.trace.codes.indices.numpy(), now.inputs.numpy(), arrays(model)
    assert remedy.needs_scores and not remedy.needs_bias
    gradient = check(model, remedy.loss(now), lambda p: slow.frequency(p, x, chosen, alpha, temperature, held))
    unchosen = [j for j in range(N) if j not in chosen]
    assert unchosen and gradient["beta"][unchosen].max() < 0  # what never fires is lifted
    assert gradient["beta"].sum() == pytest.approx(0, abs=1e-12)  # at the cost of the others


def test_uniform_frequency_costs_alpha_and_a_single_choice_alpha_n():
    nothing = torch.zeros(4, 8, dtype=torch.float64)
    model, values = sae(), []
    for chosen in (torch.arange(8).reshape(4, 2), torch.zeros(4, 1, dtype=torch.long)):
        trace = Trace(nothing[:, :D], SparseCodes(chosen, chosen.double()), nothing)
        now = Moment(model, nothing[:, :D], nothing[:, :D], trace, torch.tensor(0.0), SILENT, 0, 1)
        values.append(float(Frequency(0.3).loss(now)))
    assert values == pytest.approx([0.3, 8 * 0.3])


def test_aligned_rows_are_the_nearest_whose_product_with_the_decoder_is_one():
    model = sae()
    before = arrays(model)
    Aligned().after_step(moment(model))
    after = arrays(model)
    for e, d, old in zip(after["e"], before["d"], before["e"], strict=True):
        assert e @ d == pytest.approx(1)
        away = e - old
        np.testing.assert_allclose(away, d * (away @ d) / (d @ d), atol=1e-12)  # nearest: straight along d
    assert all(np.array_equal(before[name], after[name]) for name in ("d", "beta", "b"))
    Aligned().after_step(moment(model))
    np.testing.assert_allclose(arrays(model)["e"], after["e"], atol=1e-12)


def test_an_atom_of_zeros_has_no_aligned_row_and_stays():
    model = sae()
    with torch.no_grad():
        model.decoder.weight[3] = 0
    before = arrays(model)["e"][3]
    Aligned().after_step(moment(model))
    np.testing.assert_array_equal(arrays(model)["e"][3], before)


def test_a_training_with_aligned_rows_ends_aligned():
    model = sae().float()
    x = normal(64, D, seed=8).float()
    fit(model, Shuffled(x, batch_size=16, seed=0), steps=5, lr=0.1, balance=Aligned(), cache_dir=False)
    np.testing.assert_allclose((model.encoder.weight * model.decoder.weight).sum(1).detach(), 1, atol=1e-5)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match="temperature=0"):
        Frequency(temperature=0)
    with pytest.raises(ValueError, match="Aligned with .*an encoder of its own"):
        Aligned().after_step(moment(sae(tied=True)))
