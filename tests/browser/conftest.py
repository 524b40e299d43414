"""One browser for a file of tests."""

import pytest

from tests.browser import chromium


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as chrome:
        yield chrome
