"""The explorer's data beside its page: what came with the book, what a reader made, an index, and all as plain text."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {"book/explorer": False, "_build/explorer": True}
"""Where files of `helpers.parts.explorer` lie, and whether they are the reader's own; of two of one name the later."""
PLACE = "<!-- dictionaries -->"


def stage(root: Path, folder: Path) -> None:
    """Lay the data where the page of the staged `folder` loads it from; nothing where a book has no such page.

    Raises `ValueError` naming a file that is damaged.
    """
    page = folder / "explorer.md"
    if not page.is_file():
        return
    target = folder / "theme" / "explorer"
    target.mkdir()
    shutil.rmtree(folder / "explorer", ignore_errors=True)  # it is no source of pages
    found = {path.stem: (path, own) for part, own in FOLDERS.items() for path in sorted((root / part).glob("*.js"))}
    index = []
    for name, (path, own) in found.items():
        content = read(path)
        index.append(content["about"] | {"own": own, "bytes": path.stat().st_size})
        shutil.copy(path, target / path.name)
        (target / f"{name}.txt").write_text("\n".join(plain(content)) + "\n", encoding="utf-8")
    index.sort(key=lambda about: (about["own"], about["unit"] == "expert"))
    script = f"window.explorer = {{data: {{}}, index: {json.dumps(index, ensure_ascii=False)}}};\n"
    (target / "index.js").write_text(script, encoding="utf-8")
    links = (f'<a href="_static/explorer/{each["name"]}.txt">{html.escape(each["title"])}</a>' for each in index)
    text = page.read_text(encoding="utf-8").replace(PLACE, ", ".join(links) or "nothing yet")
    page.write_text(text, encoding="utf-8")


def read(path: Path) -> dict:
    """What a file hands the page."""
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("=\n")
        content = json.loads(rest.removesuffix(";\n"))
        if f'"{content["about"]["name"]}"' not in first or content["about"]["name"] != path.stem:
            raise ValueError("it is that of another name")
        return content
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, or make it anew") from error


def plain(content: dict) -> Iterator[str]:
    """A dictionary as lines to read: of each latent its rate, its strongest context and the words that it promotes."""
    about, text, (before, after) = content["about"], content["text"], content["window"]
    tokens = [token.replace("\n", "⏎") for token in content["tokens"]]
    words = [tokens[i] for i in text]
    ends = [*content["starts"][1:], len(text)]
    yield f"{about['title']}: {about['n']:,} {about['unit']}s on {len(text):,} tokens of {about['corpus']}"
    yield from filter(None, [about["note"], about["lens"]])
    for j, contexts in enumerate(content["contexts"]):
        rate = content["counts"][j] / len(text)
        yield f"\n{about['unit']} {j}: fires on {rate:.2%}, largest {content['largest'][j]}"
        for row, *_ in contexts[:1]:
            start, end = next(pair for pair in zip(content["starts"], ends, strict=True) if pair[0] <= row < pair[1])
            left, right = words[max(start, row - before) : row], words[row + 1 : min(end, row + after + 1)]
            yield "  " + "".join([*left, ">>", words[row], "<<", *right])
        if "promoted" in content:
            yield "  raises the logit of:" + " |".join(tokens[i] for i in content["promoted"][j])
