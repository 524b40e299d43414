"""One browser for a file of tests, and the longest test first."""

import pytest

from tests.browser import chromium


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as chrome:
        yield chrome


@pytest.fixture
def wide(browser):
    """A screen as wide as asked; a window itself is never narrower than 500 pixels."""

    def to(width):
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    yield to
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def pytest_collection_modifyitems(items):
    """The longest first: a worker that took it last would keep the others waiting."""
    items.sort(key=lambda item: "the_whole_book" not in item.name)
