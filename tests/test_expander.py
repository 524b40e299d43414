"""Masks, expansion and certificates, against slow NumPy and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import expander
from helpers.settings import generator


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), degree=st.integers(1, 40), n=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_left_regular_keeps_its_degree_and_covers_all_rows(m, degree, n, seed):
    if degree > m or n * degree < m:
        with pytest.raises(ValueError, match="degree"):
            expander.left_regular(n, m, degree, generator(seed))
        return
    rows = expander.left_regular(n, m, degree, generator(seed))
    assert rows.shape == (n, degree)
    assert (rows.diff(dim=1) > 0).all()  # sorted and distinct
    assert rows.min() >= 0 and rows.unique().numel() == m  # every row is used
    assert torch.equal(rows, expander.left_regular(n, m, degree, generator(seed)))
