"""The search finds words and their other names, and shows where they stand, on pages from a disk."""

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.chromium import open_page, requested


def results(browser):
    """Titles of the pages found, with the words below each."""
    found = browser.find_elements(By.CSS_SELECTOR, "#search-found > li")
    return {
        li.find_element(By.TAG_NAME, "a").get_attribute("href").split("?")[0].split("/")[-1]: li.text for li in found
    }


@pytest.fixture
def search(browser):
    def look(words):
        open_page(browser, "search")
        browser.find_element(By.ID, "search-words").send_keys(words)
        return results(browser)

    return look


def test_a_feature_is_found_where_it_is_called_a_latent(browser, search):
    found = search("dead features")
    assert "09_dead_features_in_a_language_model.html" in found and len(found) > 3
    assert search("busiest latent").keys() == search("busiest feature").keys() != set()
    assert search("router expert").keys() == search("router atoms").keys() != set()
    assert "also looked for: expert" in browser.find_element(By.ID, "search-status").text


def test_each_result_shows_its_words_and_leads_to_their_section(browser, search):
    found = search("padding rows")
    assert all("padding" in text.lower() for text in found.values())
    assert browser.find_elements(By.CSS_SELECTOR, "#search-found mark")
    browser.find_element(By.CSS_SELECTOR, "#search-found a").click()
    assert browser.execute_script("return document.querySelector(location.hash) !== null")
    assert browser.find_elements(By.CSS_SELECTOR, "article .highlighted")


def test_it_can_be_asked_from_every_page_and_asks_no_network(browser):
    open_page(browser, "glossary")
    browser.find_element(By.CSS_SELECTOR, "body").send_keys(Keys.CONTROL, "k")
    box = browser.switch_to.active_element
    assert box.get_attribute("type") == "search"
    box.send_keys("pursuit", Keys.ENTER)
    WebDriverWait(browser, 10).until(results)
    assert "14_matching_pursuit.html" in results(browser)
    assert [url for url in requested(browser) if not url.startswith(("file:", "data:", "blob:"))] == []


def test_what_is_nowhere_is_not_found(browser, search):
    assert search("zyzzyva") == {}
    assert browser.find_element(By.ID, "search-status").text == "0 pages"
