"""Mixtures of text and a constant row, against rows that are really mixed; shares are found again."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers.models.activations import Moments
from helpers.parts import padding
from helpers.parts.padding import ByArticle, Mixture
from helpers.settings import generator
from helpers.study.scores import interval

D = 6


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    articles = np.sort(random.integers(0, 12, size=900))
    centres = random.normal(size=(12, D))
    return (random.normal(size=(900, D)) + 0.5 * centres[articles] + 3).astype(np.float32), articles


@pytest.fixture(scope="module")
def mixture(rows):
    weight = torch.randn(D, D, generator=generator(1))
    mlp = lambda x: torch.relu(x @ weight)  # noqa: E731
    x, row = torch.from_numpy(rows[0]), torch.full((D,), -4.0)
    draws = padding.noise(40_000, D, generator(2))
    return Mixture(Moments.of(x), Moments.of(mlp(x)), row, mlp(row[None])[0], mlp, draws)


def mixed(rows: torch.Tensor, row: torch.Tensor, share: float) -> torch.Tensor:
    """Text and as many copies of the padding row as make the share."""
    return torch.cat([rows, row.expand(round(share / (1 - share) * len(rows)), -1)]).double()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("overall", [False, True])
def test_curves_are_the_variances_of_mixed_rows(rows, mixture, share, overall):
    from dataclasses import replace

    x = torch.from_numpy(rows[0])
    mixture = replace(mixture, overall=overall)
    variance = lambda y: float(y.var(unbiased=False) if overall else y.var(0, unbiased=False).mean())  # noqa: E731
    inputs, outputs = mixed(x, mixture.input_row, share), mixed(mixture.mlp(x), mixture.output_row, share)
    at = np.array([share])
    assert mixture.curve("input", at)[0] == pytest.approx(variance(inputs), rel=1e-6)
    assert mixture.curve("output", at)[0] == pytest.approx(variance(outputs), rel=1e-6)
    drawn = mixture.mlp(Moments.of(inputs).sample(40_000, generator(3))).double()
    assert mixture.curve("gaussian", at)[0] == pytest.approx(variance(drawn), rel=0.03)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.42])
def test_a_share_is_found_again(mixture, share):
    wanted = {q: float(mixture.curve(q, np.array([share]))[0]) for q in padding.QUANTITIES}
    for quantity, found in padding.implied_shares(mixture, wanted).items():
        assert found == pytest.approx(share, abs=0.005), quantity


def test_solutions_are_all_crossings():
    shares, curve = np.array([0.0, 0.5, 0.9]), np.array([1.0, 3.0, 2.0])
    assert padding.solutions(shares, curve, 2.5) == pytest.approx([0.375, 0.7])
    assert padding.solutions(shares, curve, 1.5) == [0.125]
    assert padding.solutions(shares, curve, 0.5) == [0]
    assert padding.solutions(shares, curve, 9.0) == [0.5]


def test_the_solutions_that_agree_are_chosen(mixture):
    """Beyond the top of a curve the same variance has a smaller share as well, which the other quantities rule out."""
    wanted = {q: float(mixture.curve(q, np.array([0.7]))[0]) for q in padding.QUANTITIES}
    first = {q: padding.solutions(padding.GRID, mixture.curve(q, padding.GRID), v)[0] for q, v in wanted.items()}
    assert min(first.values()) < 0.6
    assert all(found == pytest.approx(0.7, abs=0.01) for found in padding.implied_shares(mixture, wanted).values())


@pytest.mark.parametrize("full", [True, False])
def test_moments_of_a_resample_are_those_of_its_rows(rows, full):
    x, articles = rows
    by_article = ByArticle(x, articles, full=full)
    times = torch.tensor([0, 2, 1, 1, 3, 0, 1, 0, 0, 2, 1, 1])
    taken = np.concatenate([x[articles == a] for a, t in enumerate(times) for _ in range(t)]).astype(np.float64)
    found = by_article.moments(times)
    assert found.n == len(taken)
    np.testing.assert_allclose(found.mean, taken.mean(0), rtol=1e-6)
    wanted = np.cov(taken.T, bias=True)
    np.testing.assert_allclose(found.cov, wanted if full else np.diag(np.diag(wanted)), rtol=1e-4, atol=1e-5)
    assert torch.allclose(by_article.moments().mean, Moments.of(torch.from_numpy(x)).mean)


def test_an_interval_of_shares_holds_the_share_that_gave_the_variances(rows, mixture):
    x, articles = rows
    inputs = ByArticle(x, articles, full=True)
    outputs = ByArticle(mixture.mlp(torch.from_numpy(x)).numpy(), articles)
    wanted = {q: float(mixture.curve(q, np.array([0.3]))[0]) for q in padding.QUANTITIES}
    without = padding.shares_without_each(mixture, inputs, outputs, wanted)
    assert without.shape == (12, 3)
    for quantity, share in padding.implied_shares(mixture, wanted).items():
        low, high = interval(share, without[quantity].to_numpy(), scale="logit")
        assert 0 < low < 0.3 < high < 1 and 0.01 < high - low < 4 * padding.AROUND
    rest = articles != articles.min()
    moments = Moments.of(torch.from_numpy(x[rest]))
    outputs = Moments.of(mixture.mlp(torch.from_numpy(x[rest])))
    slow = padding.implied_shares(dataclasses.replace(mixture, inputs=moments, outputs=outputs), wanted)
    assert without.loc[0, ["input", "output"]].tolist() == pytest.approx([slow["input"], slow["output"]], abs=1e-4)


def test_text_alone_implies_no_padding(rows, mixture):
    x, articles = rows
    wanted = {"input": mixture.inputs.variance * 0.9}
    assert padding.implied_shares(mixture, wanted) == {"input": 0}


def test_noise_is_standard():
    z, w = padding.noise(20_000, 3, generator(0))
    assert (
        z.shape == (20_000, 3)
        and abs(float(w.mean())) < 1e-6
        and float(w.square().mean()) == pytest.approx(1, abs=1e-5)
    )
    assert abs(float((z[:, 0] * w).mean())) < 0.03


def test_released_variances_of_the_papers_layers():
    found = padding.released("google/gemma-3-270m", 9)
    assert found == padding.released("gemma-3-270m", 9)
    assert all(low <= median <= high for median, low, high in found.values())
    assert 0.231 <= found["input"][0] <= 0.234 and 0.0195 <= found["output"][0] <= 0.0196
    assert padding.released("EleutherAI/pythia-70m", 3) is not None
    table = padding.released_runs("google/gemma-3-270m", 9)
    point = table[(table.active_neurons == 128) & (table.experts == 100_000) & (table.inputs == "activations")]
    assert point[point.student == "moe-lowrank-router"].fvu_best_lr.tolist() == [0.01756, 0.01745]
    assert padding.released("gemma-3-270m", 8) is None and padding.released("gpt2", 9) is None


def test_unknown_quantity(mixture):
    with pytest.raises(ValueError, match="quantity='norm' is unknown; allowed: 'input', 'output', 'gaussian'"):
        mixture.curve("norm", padding.GRID)
