"""Sparse sources against a slow draw, their closed-form covariance, and bad parameters."""

import pytest
import torch

from helpers import settings
from helpers.synthetic import SparseSource, random_atoms


def source(**changes):
    atoms = random_atoms(24, 10, settings.generator(0), torch.float64)
    return SparseSource(atoms, **{"k": 3, **changes})


@pytest.mark.parametrize("coefficients", ["signs", "gaussian"])
def test_rows_are_the_sum_of_their_codes(coefficients):
    given = source(coefficients=coefficients, energy=2.0)
    codes = given.codes(50, settings.generator(1))
    slow = torch.stack(
        [
            sum(v * given.atoms[i] for v, i in zip(*row, strict=True))
            for row in zip(codes.values, codes.indices, strict=True)
        ]
    )
    torch.testing.assert_close(given.rows(codes, settings.generator(2)), slow)
    assert all(len(set(row.tolist())) == 3 for row in codes.indices)


@pytest.mark.parametrize("changes", [{}, {"coefficients": "signs"}, {"noise": 0.3}, {"energy": 4.0, "k": 1}])
def test_covariance_is_the_closed_form(changes):
    given = source(**changes)
    x = given.sample(200_000, settings.generator(3))
    torch.testing.assert_close(x.T @ x / len(x), given.moments.cov, atol=0.02, rtol=0)
    torch.testing.assert_close(x.mean(0), torch.zeros(10, dtype=torch.float64), atol=0.01, rtol=0)


def test_whitened_has_identity_covariance_and_the_same_codes():
    white = source(noise=0.5).whitened()
    torch.testing.assert_close(white.moments.cov, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(
        white.codes(5, settings.generator(4)).values, source().codes(5, settings.generator(4)).values
    )


def test_atoms_that_do_not_span_cannot_be_whitened():
    with pytest.raises(ValueError, match="allowed: atoms that span all 10"):
        SparseSource(random_atoms(4, 10, settings.generator(0)), 2).whitened()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 25}, "k=25"),
        ({"k": 0}, "k=0"),
        ({"coefficients": "x"}, "coefficients='x'"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"energy": 0.0}, "energy=0.0"),
    ],
)
def test_bad_parameters_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        source(**changes)
