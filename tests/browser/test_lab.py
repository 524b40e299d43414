"""JupyterLab as `make lab` opens it, on a copy: the start page, a chapter run by keyboard, its slider, its prose."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from helpers.settings import ROOT

RUN, READ = "00_how_to_read.ipynb", "03_gaussian_has_nothing_sparse.ipynb"
OPEN = ".jp-NotebookPanel:not(.lm-mod-hidden)"  # the chapter whose tab is in front
PROGRESS = """\
import time
from helpers import settings
for _ in settings.progress(range(30), desc="three seconds"):
    time.sleep(0.1)
print("all cells have run")"""
RAW = re.compile(r":::|```\{|\{(?:term|numref|ref|cite|prf)\b|<!--|\$\$")
KINDS = {
    "prf": ".myst-proof",
    "exercise": "aside.myst-exercise",
    "solution": "details.myst-exercise",
    "dropdown": ".myst-dropdown",
}


def small(notebook, results):
    """Chapter 0 on a little text, with a bar of three seconds as its last cell."""
    (parameters,) = (c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    parameters["source"] += [f"\nn_tokens, results_dir = 160, {str(results)!r}"]
    last = {"cell_type": "code", "id": "progress", "metadata": {}, "outputs": [], "execution_count": None}
    notebook["cells"].append(last | {"source": PROGRESS})
    return notebook


@pytest.fixture
def lab(tmp_path):
    """A copy of three notebooks, and the page that a reader's browser is sent to by `make lab`."""
    folder = tmp_path
    (folder / "notebooks").mkdir()
    for name in ("start.md", RUN, READ):
        text = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
        text = json.dumps(small(json.loads(text), folder / "results")) if name == RUN else text
        (folder / "notebooks" / name).write_text(text, encoding="utf-8")
    made = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ((config, arguments),) = re.findall(r"JUPYTER_CONFIG_PATH=(\S+) \S+ -m (jupyter lab .*)", made)
    places = {"CONFIG_DIR": "config", "RUNTIME_DIR": "runtime", "CONFIG_PATH": config}
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment |= {f"JUPYTER_{name}": str(folder / place) for name, place in places.items()}
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-m", *arguments.split(), "--no-browser", "--allow-root"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 120
        while not (opens := list((folder / "runtime").glob("jpserver-file-to-run-*-open.html"))):
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield SimpleNamespace(opens=opens[0].as_uri(), notebooks=folder / "notebooks", results=folder / "results")
    finally:
        server.terminate()  # it ends its kernels
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait(browser, script, *arguments, seconds=400):  # on a busy machine the model alone takes minutes
    """Until a script returns something true, which is handed on; else what the page shows is told."""
    try:
        return WebDriverWait(browser, seconds, 0.2).until(lambda b: b.execute_script("return " + script, *arguments))
    except Exception as stopped:
        shown = browser.execute_script("return (document.querySelector(arguments[0]) ?? document.body).innerText", OPEN)
        raise AssertionError(f"waited in vain for {script} {arguments}; shown:\n{shown[-3000:]}") from stopped


def press(browser, *keys):
    """One stroke, the earlier keys held down."""
    chain = ActionChains(browser)
    for key in keys[:-1]:
        chain.key_down(key)
    chain.send_keys(keys[-1])
    for key in keys[:-1]:
        chain.key_up(key)
    chain.perform()


def open_chapter(browser, lab, link, name):
    """From the start page, which is shown as prose, to a chapter in a tab of its own, all of whose cells are there."""
    browser.get("about:blank")  # no page of an earlier test asks whether it may be left
    browser.get(lab.opens)
    wait(browser, "document.querySelector('.jp-MarkdownViewer h1')?.innerText == 'Rank-One Experts, to run'")
    browser.find_element(By.CSS_SELECTOR, ".jp-MarkdownViewer").find_element(By.PARTIAL_LINK_TEXT, link).click()
    cells = json.loads((lab.notebooks / name).read_text(encoding="utf-8"))["cells"]
    wait(browser, "document.querySelectorAll(arguments[0]).length == arguments[1]", f"{OPEN} .jp-Cell", len(cells))
    prose = sum(cell["cell_type"] == "markdown" for cell in cells)
    wait(browser, "document.querySelectorAll(arguments[0]).length == arguments[1]", f"{OPEN} .jp-Cell .myst", prose)
    wait(browser, "document.querySelector(arguments[0]).innerText.includes('Python 3')", OPEN)
    return cells


def test_a_chapter_runs_by_keyboard_and_its_slider_lives(browser, lab):
    cells = open_chapter(browser, lab, "0 how to read", RUN)
    folded = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((c) => !c.querySelector('.cm-editor'))",
        f"{OPEN} .jp-CodeCell",
    )
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert folded == [cell["metadata"].get("jupyter", {}).get("source_hidden", False) for cell in code]

    browser.find_element(By.CSS_SELECTOR, f"{OPEN} h1").click()
    for place in range(len(cells)):
        at = "document.querySelector(arguments[0])?.dataset.windowedListIndex == arguments[1]"
        wait(browser, at, f"{OPEN} .jp-Cell.jp-mod-active", place)
        press(browser, Keys.SHIFT, Keys.ENTER)
    says = "[...document.querySelectorAll(arguments[0])].some((out) => out.innerText.match(arguments[1]))"
    output = f"{OPEN} .jp-OutputArea-output"
    wait(browser, says, output, r"\d+/30\s+\[\d\d:\d\d<\d\d:\d\d")  # with the time left
    wait(browser, says, output, "all cells have run")
    assert [path.suffix for path in lab.results.iterdir()] == [".json"]

    handle = browser.find_element(By.CSS_SELECTOR, f"{OPEN} .jupyter-widgets [role=slider]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    image = f"{OPEN} .jupyter-widgets img"
    drawn = "(() => { const i = document.querySelector(arguments[0]); return i.naturalWidth > 0 && i.alt; })()"
    seen = [wait(browser, drawn, image)]
    for move in (
        lambda: handle.send_keys(Keys.ARROW_RIGHT),
        lambda: ActionChains(browser).drag_and_drop_by_offset(handle, 60, 0).perform(),
    ):
        move()
        seen.append(wait(browser, f"(({drawn}) || arguments[1]) != arguments[1] && {drawn}", image, seen[-1]))
    articles = [int(alt.split()[0]) for alt in seen]
    assert articles[0] == 4 and articles[1] == 5 and articles[2] > 5

    press(browser, Keys.CONTROL, "s")
    until = time.monotonic() + 60
    while (counts := counted(lab.notebooks / RUN)) != list(range(1, len(code) + 1)):
        assert time.monotonic() < until, counts
        time.sleep(0.2)


def counted(path):
    """In which order the cells with code have run, as the saved notebook has it."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except json.JSONDecodeError:  # while it is written
        return []
    return [cell["execution_count"] for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"])]


def test_prose_with_theorems_terms_and_solutions_is_read_as_prose(browser, lab):
    cells = open_chapter(browser, lab, "3 Gaussian inputs", READ)
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for kind, selector in KINDS.items():
        asked = len(re.findall(rf"(?:::|``)\{{{kind}\b", source))
        assert asked and len(browser.find_elements(By.CSS_SELECTOR, f"{OPEN} {selector}")) == asked, kind
    text = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.textContent)", f"{OPEN} .jp-Cell .myst"
    )
    assert not [raw[0] for each in text for raw in [RAW.search(each)] if raw]
    formulas = browser.find_elements(By.CSS_SELECTOR, f"{OPEN} .myst .katex")
    assert formulas and not browser.find_elements(By.CSS_SELECTOR, f"{OPEN} .myst .katex-error")

    read = "\n".join(text).replace("\xa0", " ")
    assert "Theorem 1 (Theorem 3.3, made explicit)" in read  # its number and title
    assert "written out (Theorem 1)" in read and "our sparse students even" in read  # a reference, a term
    assert "On the right of the figure below" in read  # JupyterLab has no figures to count, so names are words

    closed = f"{OPEN} details.myst-dropdown:not([open])"
    proof = browser.find_element(By.CSS_SELECTOR, closed)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", proof)
    assert not proof.find_element(By.CSS_SELECTOR, ".myst-proof").is_displayed()
    proof.find_element(By.TAG_NAME, "summary").click()
    WebDriverWait(browser, 30).until(lambda _: proof.find_element(By.CSS_SELECTOR, ".myst-proof").is_displayed())
