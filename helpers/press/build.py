"""Build the rendered book from the executed chapters, strictly, and check that it is complete and needs no network."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml
from bs4 import BeautifulSoup
from papermill.exceptions import strip_color
from rich.console import Console
from rich.markup import escape

from helpers import kept, settings
from helpers.press import browse, claims, execution, finding, pages, polish, publish, reading, scoreboard
from helpers.press.chapters import Job, digest_files
from helpers.press.numbers import unmarked, words

FOR_TOOLS = re.compile(r"[ \t]*# (?:fmt: (?:skip|off|on)|noqa).*$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
LOADED = ("script", "img", "iframe", "source", "video", "audio", "embed")
"""Elements that a browser fetches for, from their `src`."""
REMOTE = re.compile(r"^(https?:)?//")
REMOTE_CSS = re.compile(r"(?:@import\s+['\"]|url\(\s*['\"]?)((?:https?:)?//[^'\")\s]+)")

SOURCES = ("book", "third_party", "notebooks", "results", "benchmarks/results", "helpers/press")
SOURCES += ("requirements.txt", "_config.yml", "_toc.yml", "_build/executed", "_build/results", "_build/explorer")
JUPYTER_BOOK = """
import os, threading, time
def end_with_parent(parent=os.getppid()):  # a killed build leaves no one behind who writes in its folder
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
from jupyter_book.cli.main import main
main()
"""


def make(jobs: list[Job], profile: str, console: Console, at_once: int, root: Path = settings.ROOT) -> int:
    """Execute what is not valid any more, then build `_build/html`; 0 when every chapter and page is there.

    A chapter that fails does not keep the others from running, but no book is built then.
    """
    started = time.perf_counter()
    failures = execution.run(jobs, console, at_once=at_once)
    if failures:
        console.print(f"[bold red]{len(failures)} of {len(jobs)} chapters failed[/]; the book was not built")
        return 1
    made, stamp = _made_from(profile, root), root / "_build" / "pages.stamp"
    html = root / "_build" / "html"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == f"{made} {digest_files(html)}":
        console.print(f"nothing changed; the book is at {html / 'index.html'}", markup=False)
        return 0
    console.print("building the pages (about half a minute)", markup=False)
    records = root / "_build" / "results" / profile
    try:
        stage(jobs, profile, root)
        faults = build(root) + list(claims.passing_controls(records)) + list(claims.passing_controls(claims.REFERENCE))
    except ValueError as error:
        faults = [str(error)]
    except OSError as error:
        copied = error.args[0][0] if isinstance(error, shutil.Error) else (None, error.filename, error.strerror)
        faults = [f"{copied[1] or root / '_build'}: {copied[2]}; allowed: a folder of yours with room"]
    for fault in faults:
        console.print(f"[bold red]fault[/] {escape(fault)}")
    if not faults:
        for row in pages.spent(jobs):
            said = "chapter {chapter:>3}: {seconds:6.0f} s, {computed:5.0f} s of them to compute for good  {of these}"
            console.print(said.format(**row).rstrip(), markup=False)
        settings.write(stamp, f"{made} {digest_files(html)}".encode())
        seconds = time.perf_counter() - started
        console.print(f"the book is at {html / 'index.html'} ({seconds:.0f} s)", markup=False)
    return 1 if faults else 0


def _made_from(profile: str, root: Path) -> str:
    """Hash of all that the pages follow from, where they are published included."""
    parts = [root / name for name in SOURCES]
    return kept.digest(profile, str(publish.address(root)), *(digest_files(part) for part in parts if part.exists()))


def stage(jobs: list[Job], profile: str, root: Path) -> None:
    """Lay out in `_build/stage` what the pages are made from: prose, executed chapters, pages made from records."""
    folder = root / "_build" / "stage"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "book", folder)
    shutil.copytree(root / "third_party", folder / "third_party")
    if pages.BENCHMARKS.is_dir():
        shutil.copytree(pages.BENCHMARKS, folder / "benchmarks")
        pages.draw_growth(folder / "benchmarks")
    (folder / "notebooks").mkdir()
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, folder / name)
    board = scoreboard.Board.of_build(profile, root)
    for job in jobs:
        try:
            notebook = _as_page(nbformat.read(job.executed, as_version=4))
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{job.executed} is damaged; delete it, and its chapter runs again") from error
        first = notebook.cells[0]  # other pages name a chapter by its number
        first.source = first.source.replace("# ", f"# {job.chapter.number} · ", 1)
        nbformat.write(finding.page(notebook, job.chapter.slug, board), folder / "notebooks" / job.executed.name)
    made = scoreboard.pages(board, profile)
    made |= {"map.md": reading.page(jobs), "performance.md": pages.performance_markdown(jobs=jobs)}
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    browse.stage(root, folder)


def build(root: Path) -> list[str]:
    """Build `_build/html` from `_build/stage`, every warning an error; returns what is wrong with it, if anything.

    The pages replace the former ones only when Sphinx ended well. Its output is kept in `_build/book.log`.
    """
    folder, log = root / "_build" / "stage", root / "_build" / "book.log"
    strict = ["-W", "-n", "--keep-going"]
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", str(folder), "--path-output", str(folder), *strict]
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status and shutil.disk_usage(folder).free < 2**20:
        return [f"{folder}: No space left on device; allowed: a disk with room"]
    if status:
        lines = strip_color(log.read_text(encoding="utf-8", errors="replace")).splitlines()
        wrong = [line for line in lines if "WARNING" in line or "ERROR" in line]
        return [*(wrong or lines[-20:]), f"the build ended with status {status}; all it said: {log}"]
    polish.site(folder / "_build" / "html", root)
    html = root / "_build" / "html"
    for left in html.parent.glob(".html.*"):  # of a killed build
        shutil.rmtree(left, ignore_errors=True)
    with settings.new_folder(html) as new:
        os.replace(folder / "_build" / "html", new)
    return list(faults(html, root / "_toc.yml"))


def faults(html: Path, toc: Path) -> Iterator[str]:
    """What a reader would miss: pages of the table of contents, alt texts, and anything fetched from the network."""
    for page in toc_files(yaml.safe_load(toc.read_text(encoding="utf-8"))):
        if not (html / f"{page}.html").is_file():
            yield f"page missing: {page}.html"
    for path in sorted(html.rglob("*.html")):
        name, soup = path.relative_to(html), BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        yield from (f"{name}: loads {url} from the network" for url in _remote(soup))
        article = soup.find("article") or soup
        yield from (
            f"{name}: no alt text on an image ({str(i)[:80]}…)" for i in article.find_all("img") if not i.get("alt")
        )
    for path in sorted(html.rglob("*.css")):
        for url in REMOTE_CSS.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(html)}: loads {url} from the network"


def toc_files(node: Any) -> Iterator[str]:
    """Every page of a table of contents, in order."""
    if isinstance(node, dict):
        yield from (str(node[key]) for key in ("root", "file") if key in node)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from toc_files(child)


def _remote(soup: BeautifulSoup) -> Iterator[str]:
    yield from (e["src"] for e in soup.find_all(LOADED) if REMOTE.match(e.get("src") or ""))
    for link in soup.find_all("link"):
        if not {"canonical", "license", "next", "prev", "author"} & set(link.get("rel") or []):
            yield from (url for url in [link.get("href") or ""] if REMOTE.match(url))
    for style in soup.find_all("style"):
        yield from REMOTE_CSS.findall(style.get_text())


def _as_page(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A page has no kernel: it takes the HTML of a slider, and needs no widget runtime and no comment for a tool."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
        tags = cell.metadata.get("tags", [])
        for holder, key in words(cell):
            holder[key] = unmarked(holder[key])
        if cell.cell_type == "code":
            cell.source = FOR_TOOLS.sub("", cell.source)
            cell.metadata["tags"] = [*tags, "hide-input"] if "injected-parameters" in tags else tags
        if "parameters" in tags:
            names = [node.targets[0].id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
            shown = f"Parameters ({len(names)}): {', '.join(names[:4])} … change them here, or with -p"
            cell.metadata.setdefault("mystnb", {})["code_prompt_show"] = shown
    return notebook
