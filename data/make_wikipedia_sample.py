"""Make `wikipedia_sample.parquet`: paragraphs of 106 English Wikipedia articles, split by article.

    pip install mwparserfromhell==0.7.2 pandas pyarrow
    pip download --no-deps gensim==4.4.0 --dest wheels
    python data/make_wikipedia_sample.py wheels/gensim-4.4.0-*.whl

gensim is not installed: its wheel carries, as test data, the start of a Wikipedia dump of 2016
(`enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2`, 5.7 MB of markup), and only that is read.

What is kept is running prose: lines of at least `MIN_WORDS` words that end like a sentence. Left out are redirects,
tables, infoboxes, references, galleries, captions, headings, lists, categories, pronunciations, paragraphs with a
formula or with an unresolved character, and the sections that close an article (see also, references, …).
Templates that stand for words (`{{convert|10|km}}`, `{{lang|fr|mot}}`) are replaced by those words.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import hashlib
import html
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import mwparserfromhell as mw
import pandas as pd

MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HERE = Path(__file__).resolve().parent
MIN_WORDS = 12
GAP = "\ufffc"  # stands for something that cannot be said in words; its paragraph is dropped
CLOSING_SECTIONS = {
    "see also",
    "references",
    "external links",
    "further reading",
    "notes",
    "bibliography",
    "footnotes",
    "sources",
    "gallery",
    "citations",
    "notes and references",
    "references and notes",
    "works cited",
    "filmography",
    "awards",
    "image gallery",
    "general references",
    "literature",
    "primary sources",
    "secondary sources",
    "explanatory notes",
    "selected bibliography",
    "discography",
    "publications",
    "selected works",
    "works",
    "list of works",
}
FIRST_VALUE = {"nowrap", "small", "big", "tooltip", "vanchor", "angbr", "keypress", "linktext", "sc", "nihongo"}
SECOND_VALUE = {"lang", "transl", "script"}
SYMBOLS = {
    "ndash": "–",
    "snd": " – ",
    "spaced ndash": " – ",
    "nbsp": " ",
    "·": "·",
    "=": "=",
    "'": "'",
    "' \"": "'\"",
    "'s": "'s",
}
UNITS = {
    "C": "°C",
    "km2": "km²",
    "m3": "m³",
    "ft3": "cubic feet",
    "sqmi": "square miles",
    "mi": "miles",
    "ft": "feet",
    "in": "inches",
    "lb": "pounds",
    "nmi": "nautical miles",
    "acre": "acres",
    "e6acre": "million acres",
    "e6carat": "million carats",
    "oilbbl": "barrels",
    "oilbbl/d": "barrels per day",
    "koilbbl/d": "thousand barrels per day",
    "Moilbbl": "million barrels",
    "Moilbbl/d": "million barrels per day",
    "Goilbbl": "billion barrels",
    "Tcuft": "trillion cubic feet",
    "USgal": "gallons",
    "MUSgal": "million gallons",
    "LT": "long tons",
    "MT": "tonnes",
    "PD/sqmi": "inhabitants per square mile",
}
WORDS_WE_CANNOT_WRITE = {
    "val",
    "ill",
    "eqm",
    "simplenuclide2",
    "nuclide2",
    "railgauge",
    "e",
    "pow",
    "music",
    "uss",
    "hms",
    "inflation",
    "currentyear",
    "lsj",
    "nastaliq",
    "vr",
    "marriage",
    "sup",
    "sub",
    "smaller",
    "rtl-lang",
    "noitalic",
    "oetymd",
    "math",
    "chem",
    "!",
    "quote",
    "bquote",
    "cquote",
}


def pages(wheel: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of every article (namespace 0, no redirect), in the order of the dump."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, bz2.open(packed) as dump:
        for _, node in ElementTree.iterparse(dump):
            if node.tag.endswith("}page"):
                field = {child.tag.rsplit("}", 1)[-1]: child for child in node.iter()}
                if field["ns"].text == "0" and "redirect" not in field:
                    yield field["title"].text, field["text"].text or ""
                node.clear()


def words_of(template: mw.nodes.Template) -> str:
    """The words a template prints in running text: GAP where we cannot write them, '' where it prints none."""
    name = str(template.name).strip().lower().replace("_", " ")
    values = [str(p.value).strip() for p in template.params if not p.showkey] or [""]
    if name in SYMBOLS:
        return SYMBOLS[name]
    if name in FIRST_VALUE or name.startswith("lang-"):
        return values[0]
    if name in SECOND_VALUE:
        return values[min(1, len(values) - 1)]
    if name in ("convert", "cvt") and len(values) >= 2:
        return measure(*values)
    if name in ("as of", "circa"):
        return {"as of": "As of ", "circa": "c. "}[name] + values[0]
    if name in ("frac", "sfrac"):
        return "/".join(values) if len(values) == 2 else GAP
    if name == "us$":
        return "US$" + values[0]
    return GAP if name in WORDS_WE_CANNOT_WRITE else ""


def measure(amount: str, unit: str, *more: str) -> str:
    """`{{convert|3|to|5|km|mi}}` in its first unit: 3 to 5 km."""
    if unit in ("to", "-", "–", "by", "and", "and(-)") and len(more) >= 2:
        joint = "–" if unit in "-–" else f" {unit.removesuffix('(-)')} "
        amount, unit = amount + joint + more[0], more[1]
    return f"{amount} {UNITS.get(unit, unit)}"


def drop(code: mw.wikicode.Wikicode, node: object, words: str = "") -> None:
    """Replace a node by words."""
    with contextlib.suppress(ValueError):  # it went with a node that enclosed it
        code.replace(node, words)


def plain(wikitext: str) -> str:
    """Wikitext without its markup: one line per paragraph."""
    wikitext = re.sub(r"<!--.*?-->", "", wikitext, flags=re.S)
    code = mw.parse(re.sub(r"__[A-Z]+__", "", wikitext))
    for tag in code.filter_tags():
        name = str(tag.tag).lower()
        if name in ("math", "chem", "score", "hiero", "timeline"):
            drop(code, tag, GAP)
        elif name in (
            "ref",
            "references",
            "table",
            "gallery",
            "imagemap",
            "syntaxhighlight",
            "source",
            "pre",
            "blockquote",
            "div",
        ):
            drop(code, tag)
        elif name == "sup" and not tag.attributes and re.fullmatch(r"[-−]?\d+", str(tag.contents)):
            drop(code, tag, str(tag.contents).translate(str.maketrans("0123456789-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻")))
        elif name == "sub" and not tag.attributes and re.fullmatch(r"\d+", str(tag.contents)):
            drop(code, tag, str(tag.contents).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")))
        elif name in ("sup", "sub"):
            drop(code, tag, GAP)
        elif name == "br":
            drop(code, tag, " ")
    for link in code.filter_wikilinks():
        if re.match(r"\s*:?\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", str(link.title), re.I):
            drop(code, link)
    for _ in range(3):  # templates inside templates, innermost last
        for template in code.filter_templates(recursive=False):
            drop(code, template, words_of(template))
        code = mw.parse(str(code))
    return html.unescape(code.strip_code(normalize=True, collapse=False))


def body(wikitext: str) -> str:
    """The article without the sections that close it."""
    kept, skipping = [], 0
    for part in re.split(r"(?m)^(?==+[^=\n].*=+[ \t]*$)", wikitext):
        heading = re.match(r"(=+)\s*(.*?)\s*=+[ \t]*(?:\n|$)", part)
        if heading:
            level, name = len(heading[1]), re.sub(r"<.*?>", "", heading[2]).strip().lower()
            if skipping and level > skipping:
                continue
            skipping = level if name in CLOSING_SECTIONS else 0
            part = part[heading.end() :]
        if not skipping:
            kept.append(part)
    return "\n\n".join(kept)


def tidy(line: str) -> str:
    """Close the holes that removed markup leaves in a sentence."""
    line = re.sub(r"[\u200b\u200e\u200f\ufeff\u00ad]", "", line)
    line = re.sub(r"\s+", " ", line.replace("\xa0", " "))
    line = line.replace("'''", "").replace("''", "")
    for _ in range(3):
        line = re.sub(r"\(\s*[;,:]\s*", "(", line)
        line = re.sub(r"\s*[;,:]\s*\)", ")", line)
        line = re.sub(r"([;,])\s*[;,](\s)", r"\1\2", line)
        line = re.sub(r"\s*\(\s*(or|and)?\s*\)|\s*\[\s*\]", "", line)
    line = re.sub(r"\s+([,.;:!?)](?:\s|$))", r"\1", line)
    line = re.sub(r"([(\[])\s+", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()


def is_prose(raw: str, line: str) -> bool:
    if raw[:1] in "*#:;|!=" or GAP in line or len(line.split()) < MIN_WORDS:
        return False
    if re.search(r"[{}|]|\[\[|\]\]|<\w|\w=\"|https?:|thumb\b|\bpx\b|''", line):
        return False
    return (
        line[0] not in ",.;:)"
        and line[-1] in ".!?\"”'’)"
        and sum(c.isalpha() or c == " " for c in line) > 0.85 * len(line)
    )


def paragraphs(wikitext: str) -> list[str]:
    lines = ((raw.strip(), tidy(raw)) for raw in plain(body(wikitext)).split("\n"))
    return [line for raw, line in lines if raw and line and is_prose(raw, line)]


def splits(titles: Iterable[str]) -> dict[str, str]:
    """80/10/10 by article: titles in the order of their SHA-256, the first tenth to test, the next to validation."""
    ranked = sorted(titles, key=lambda title: hashlib.sha256(title.encode()).digest())
    tenth = len(ranked) // 10
    return {title: ("test", "validation", "train")[min(place // tenth, 2)] for place, title in enumerate(ranked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel of gensim 4.4.0")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the parquet file and ATTRIBUTION.md")
    options = parser.parse_args()
    articles = [(title, paragraphs(wikitext)) for title, wikitext in pages(options.wheel)]
    articles = [(title, texts) for title, texts in articles if texts]
    split = splits(title for title, _ in articles)
    rows = [(i, title, split[title], text) for i, (title, texts) in enumerate(articles) for text in texts]
    frame = pd.DataFrame(rows, columns=["article", "title", "split", "text"]).astype({"article": "int32"})
    frame = frame.drop_duplicates("text", ignore_index=True)
    frame.to_parquet(options.out / "wikipedia_sample.parquet", compression="zstd", index=False)
    (options.out / "ATTRIBUTION.md").write_text(attribution(list(split)), encoding="utf-8")
    frame["words"] = frame.text.str.split().str.len()
    by_split = frame.groupby("split")
    print(by_split.agg(articles=("article", "nunique"), paragraphs=("text", "size"), words=("words", "sum")))


def attribution(titles: list[str]) -> str:
    head = """# Articles in the Wikipedia sample

Text by the contributors of the English Wikipedia, from a dump of 2016, under the Creative Commons
Attribution-ShareAlike 3.0 licence (https://creativecommons.org/licenses/by-sa/3.0/). The authors of each article are
in its page history. Changed here: markup, tables, lists, notes and captions were removed, and paragraphs with formulas
left out; see `make_wikipedia_sample.py`.

The other texts have no list of authors to give: `state_of_the_union.parquet` and `moby_dick.parquet` are in the public
domain (see `README.md`).

"""
    return head + "".join(f"- [{title}](https://en.wikipedia.org/wiki/{quote(title)})\n" for title in sorted(titles))


if __name__ == "__main__":
    main()
