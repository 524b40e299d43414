"""Each remedy against an independent NumPy version, gradient included, and what it does to a lopsided router."""

import numpy as np
import pytest
import torch

from helpers import dictionary, losses
from helpers.dictionary import SparseCodes, Trace
from helpers.settings import generator


def trace(batch=7, n=5, k=2):
    scores = torch.randn(batch, n, generator=generator(0), dtype=torch.float64).mul_(2).requires_grad_()
    chosen = scores.detach().topk(k, dim=1)
    return Trace(scores.detach()[:, :3], SparseCodes(chosen.indices, chosen.values), scores)


def slow_switch(scores, chosen, alpha, temperature):
    n, total = scores.shape[1], 0.0
    for j in range(n):
        f = (chosen == j).sum() / chosen.size
        p = np.mean([np.exp(row[j] / temperature) / np.exp(row / temperature).sum() for row in scores])
        total += f * p
    return alpha * n * total


def slow_zloss(scores, coefficient):
    return coefficient * np.mean([np.log(np.exp(row).sum()) ** 2 for row in scores])


def numerical_gradient(function, scores, step=1e-6):
    gradient = np.zeros_like(scores)
    for at in np.ndindex(*scores.shape):
        up, down = scores.copy(), scores.copy()
        up[at], down[at] = up[at] + step, down[at] - step
        gradient[at] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    ("remedy", "slow"),
    [
        (losses.switch(0.3, 0.7), lambda s, chosen: slow_switch(s, chosen, 0.3, 0.7)),
        (losses.zloss(0.02), lambda s, chosen: slow_zloss(s, 0.02)),
    ],
)
def test_loss_and_gradient_equal_the_slow_version(remedy, slow):
    given = trace()
    chosen, scores = given.codes.indices.numpy(), given.scores.detach().numpy()
    value = remedy.loss(given, given.output)
    value.backward()
    assert remedy.needs_scores
    assert float(value.detach()) == pytest.approx(slow(scores, chosen), rel=1e-12)
    np.testing.assert_allclose(given.scores.grad, numerical_gradient(lambda s: slow(s, chosen), scores), atol=1e-8)


def test_loss_free_moves_each_bias_against_its_load():
    model = dictionary.secret_moe(4, 4, 5, 2, generator=generator(0), selection_bias=True)
    indices = torch.tensor([[0, 1], [0, 2], [0, 1]])  # loads 3, 2, 1, 0, 0; mean 1.2
    given = Trace(torch.zeros(3, 4), SparseCodes(indices, torch.ones(3, 2)), torch.zeros(3, 5))
    losses.loss_free(0.01).after_step(model, given, 0)
    np.testing.assert_allclose(model.selection_bias, [-0.01, -0.01, 0.01, 0.01, 0.01], rtol=1e-6)


def test_loss_free_counts_experts_where_an_expert_is_a_block_of_atoms():
    rows = [dictionary.Rows(torch.randn(n, 3, generator=generator(1))) for n in (4, 8, 8)]
    model = dictionary.RankOneDictionary(*rows[1:], k=1, router=rows[0], expert_rank=2, selection_bias=True)
    given = model.trace(torch.randn(20, 3, generator=generator(2)))
    losses.loss_free(1.0).after_step(model, given, 0)
    load = torch.bincount(given.scores.argmax(1), minlength=4).float()
    torch.testing.assert_close(model.selection_bias, torch.sign(load.mean() - load))


def test_loss_free_needs_a_bias_to_move():
    model = dictionary.secret_moe(4, 4, 5, 2, generator=generator(0))
    with pytest.raises(ValueError, match="selection_bias=False"):
        losses.loss_free().after_step(model, model.trace(torch.zeros(1, 4)), 0)
    with pytest.raises(ValueError, match="gamma=0"):
        losses.loss_free(0)
