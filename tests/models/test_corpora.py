"""The shipped text has no markup left in it; files of the reader are split so that held-out text stays held out."""

import gzip
import itertools
import json
import re
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import activations, corpora, files, sources, teachers
from helpers.press import chapters
from helpers.settings import ROOT
from helpers.study.scores import t_interval
from tests import tiny

zipped = partial(gzip.compress, mtime=0)  # workers of pytest collect the same names

SAMPLE = pd.read_parquet(corpora.WIKIPEDIA_SAMPLE)


def test_sample_has_the_rows_its_readme_states():
    counts = SAMPLE.groupby("split").agg(articles=("article", "nunique"), paragraphs=("text", "size"))
    readme = (corpora.WIKIPEDIA_SAMPLE.parent / "README.md").read_text()
    for split, row in counts.iterrows():
        assert f"| {split} | {row.articles} | {row.paragraphs:,} |" in readme
    assert counts.articles.sum() == 105
    assert SAMPLE.text.is_unique


def test_sample_is_split_by_article():
    assert (SAMPLE.groupby("title").split.nunique() == 1).all()
    assert (SAMPLE.groupby("article").title.nunique() == 1).all()
    share = SAMPLE.text.str.len().groupby(SAMPLE.split).sum() / SAMPLE.text.str.len().sum()
    assert 0.7 < share["train"] < 0.9 and share.min() > 0.05


@pytest.mark.parametrize(
    "remnant",
    [
        r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]",
        r"</?\w+[ />]",
        r"'''?",
        r"&\w+;",
        r"https?://",
        r"^(File|Image|Category|Template):",
        r"__\w+__",
        r"\bthumb\||\d+px\b",
        r"\(\s*[;,)]",
        r"\s[,;](\s|$)",
        r"  ",
        r"[\ufffc\ufffd\u200b\n]",
        r"^==|^[*#:;|]",
    ],
)
def test_sample_has_no_markup(remnant):
    found = SAMPLE.text[[bool(re.search(remnant, text)) for text in SAMPLE.text]]
    assert found.empty, found.iloc[0]


def test_sample_loads_by_split():
    rows = {split: corpora.load(split=split) for split in corpora.SPLITS}
    assert sum(map(len, rows.values())) == len(SAMPLE)
    assert all(r.column_names == ["article", "title", "text"] for r in rows.values())


def test_every_article_is_attributed():
    listed = (corpora.WIKIPEDIA_SAMPLE.parent / "ATTRIBUTION.md").read_text()
    assert all(f"[{title}]" in listed for title in SAMPLE.title.unique())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("abc é", min_size=1).filter(str.strip), min_size=20, max_size=90, unique=True))
def test_local_text_is_divided_whole_and_without_overlap(tmp_path_factory, paragraphs):
    file = tmp_path_factory.mktemp("text") / "my.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    parts = {split: corpora.load(str(file), split) for split in corpora.SPLITS}
    texts = sorted(text for part in parts.values() for text in part["text"])
    assert texts == sorted(" ".join(p.split()) for p in paragraphs)
    articles = [set(part["article"]) for part in parts.values()]
    assert sum(map(len, articles)) == len(set.union(*articles))
    assert corpora.load(str(file), "test").to_dict() == parts["test"].to_dict()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_keep_documents_together(tmp_path, kind):
    frame = pd.DataFrame({"title": [f"t{i // 3}" for i in range(60)], "text": [f"paragraph {i}" for i in range(60)]})
    file = tmp_path / f"my.{kind}"
    frame.to_parquet(file) if kind == "parquet" else frame.to_json(file, orient="records", lines=True)
    titles = [set(corpora.load(str(file), split)["title"]) for split in corpora.SPLITS]
    assert [len(t) for t in titles] == [10, 5, 5]
    assert len(set.union(*titles)) == 20


def test_a_split_column_is_used(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text("\n".join(json.dumps({"text": s, "split": s}) for s in corpora.SPLITS * 2))
    assert corpora.load(str(file), "test")["text"][:] == ["test"] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_split_column_of_categories_is_used(tmp_path, kind):
    """A category that no row has, and the order of the categories, say nothing."""
    splits = pd.Categorical([*corpora.SPLITS] * 2, categories=["unused", *reversed(corpora.SPLITS)])
    frame, file = pd.DataFrame({"text": [f"{s} {i}" for i, s in enumerate(splits)], "split": splits}), f"my.{kind}"
    content = {"jsonl": lambda: frame.to_json(orient="records", lines=True), "parquet": frame.to_parquet}
    content = content.get(kind, lambda: frame.to_csv(index=False))()
    corpus = write(tmp_path, file, content if isinstance(content, bytes) else content.encode())
    assert {s: corpora.load(corpus, s)["text"][:] for s in corpora.SPLITS} == {
        s: [f"{s} {i}", f"{s} {i + 3}"] for i, s in enumerate(corpora.SPLITS)
    }


def write(folder, name, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "not UTF-8: byte 0xe9 at offset 3"),
        ("latin.jsonl", b'{"text": "\xff"}', "not UTF-8: byte 0xff at offset 10"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("other.jsonl", b'{"body": "x", "notes": "y"}', r"columns \['body', 'notes'\]; allowed: 'text', a single one"),
        ("few.txt", b"one\n\ntwo", "has 2 documents to train, validate and test; allowed: at least 5"),
        ("lone.jsonl", b'{"text": "x", "split": "test"}', "has 1 document in split='test'; allowed: at least 2"),
        ("cut.jsonl", b'{"text": "x"}\n{"text": "y', "line 2"),
        ("mixed.jsonl", b'{"text": "x"}\n{"text": 7}', "holds 7 in row 1"),
        ("null.jsonl", b'{"text": "x", "split": "test"}\n{"text": "y", "split": null}', r"'split' holds \[None\]"),
        ("numbers.jsonl", b'{"text": 3}', "column 'text' holds"),
        ("broken.jsonl", b'{"text": ', "cannot be read as .jsonl"),
        ("broken.parquet", b"PAR1", "cannot be read as .parquet"),
        ("splits.jsonl", b'{"text": "x", "split": "dev"}', r"column 'split' holds \['dev'\]"),
        ("nulls.jsonl", b'{"text": null}', "no text"),
        ("book.pdf", b"%PDF", "no such file"),
        (
            "cjk.txt",
            "\n\n".join(["这是一段。"] * 9).encode("utf-16-le"),
            "not UTF-8: .* allowed: UTF-8, UTF-16, UTF-32",
        ),
        ("odd.txt", "\n\n".join(["plain words"] * 9).encode("utf-16")[:-1], "not UTF-16"),
        ("deep.json", b"[" * 100_000, "cannot be read as .json: maximum recursion"),
        ("deep.jsonl", b'{"text": "x"}\n{"text": "y", "a": ' + b"[" * 100_000, "maximum recursion"),
        ("two.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', r"rows stand in each of \['a', 'b'\]: keep one"),
        ("lengths.json", b'{"text": ["x", "y"], "title": ["z"]}', r"\['text', 'title'\] are not of one length"),
        ("lists.jsonl", b'{"text": "x"}\n["y"]', r"line 2: \['y'\] stands where a row should"),
        ("extra.csv", b"text,n\none, two,1\n", "line 2 has more fields than the header; quote what holds ','"),
        ("twice.csv", b"text,text\none,two\n", "several columns are called 'text'"),
        ("open.csv", b'text,n\n"one,1\n', "cannot be read as .csv"),
        ("listed.jsonl", b'{"text": "x", "split": ["test"]}', "column 'split' holds"),
        ("cut.txt.gz", zipped(b"one\n\n" * 99)[:-9], "cannot be read as .txt"),
        ("plain.txt.gz", b"one\n\ntwo", "cannot be read as .txt"),
        (
            "twice.jsonl.gz.gz",
            zipped(zipped(b'{"text": "x"}')),
            "twice.jsonl.gz.gz is packed twice; allowed",
        ),
        ("zero.txt", "caf\xe9 \0 au lait".encode(), "has 1 document to train"),  # not 'not UTF-16-BE'
        ("zero_and_latin.txt", b"one\n\ntwo\0 caf\xe9 " + b"au lait " * 9, "not UTF-8: byte 0xe9 at offset 13"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        corpora.load(write(tmp_path, name, content))
    assert name in str(error.value)


@pytest.mark.parametrize("corpus", ["wikipedia", "a/b/c", "missing.txt", "/nowhere/at/all", ""])
def test_unknown_names_say_what_is_allowed(corpus):
    with pytest.raises(ValueError, match="allowed: 'wikipedia-sample', 'book-texts', a hub id"):
        corpora.load(corpus)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev' is unknown; allowed: 'train', 'validation', 'test'"):
        corpora.load(split="dev")


def test_no_network_is_an_error_within_seconds(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"Salesforce/wikitext:wikitext-2-raw-v1.*no answer from the hub"):
        corpora.load("Salesforce/wikitext:wikitext-2-raw-v1")
    assert time.monotonic() - started < 5


def test_hub_errors_name_the_corpus(monkeypatch):
    def unknown(*_):
        raise ValueError("the hub has no public dataset 'some/thing'")

    monkeypatch.setattr(sources, "commit", unknown)
    with pytest.raises(ValueError, match="corpus='some/thing': the hub has no public dataset"):
        corpora.load("some/thing")


def test_wikitext_headings_start_articles(monkeypatch):
    lines = [
        "",
        " = Gold dollar = \n",
        " The gold dollar .\n",
        " = = History = = \n",
        " It was struck .\n",
        " = Lead = \n",
        " x = 3 .\n",
    ]
    monkeypatch.setattr(sources, "commit", lambda *_: "c0ffee")
    monkeypatch.setattr(corpora, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": lines}))
    rows = corpora.load("Salesforce/wikitext:wikitext-2-raw-v1")
    assert [text.strip() for text in rows["text"]] == ["The gold dollar .", "It was struck .", "x = 3 ."]
    assert rows["title"][:] == ["Gold dollar", "Gold dollar", "Lead"]
    assert re.fullmatch(".*@c0ffee", corpora.fingerprint("Salesforce/wikitext:wikitext-2-raw-v1"))


def test_fingerprint_follows_content(tmp_path):
    one = corpora.fingerprint(write(tmp_path, "my.txt", b"one"))
    assert one != corpora.fingerprint(write(tmp_path, "my.txt", b"two"))
    assert one == corpora.fingerprint(write(tmp_path, "other.txt", b"one"))


TEXTS = [f"the {i} th paragraph, é 这 🙂" for i in range(60)]
ROWS = [{"text": text} for text in TEXTS]


def lines(rows, end="\n") -> bytes:
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def table(**columns) -> bytes:
    return pd.DataFrame(columns).to_parquet()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def comma_separated(separator=",") -> bytes:
    return pd.DataFrame({"n": range(60), "text": TEXTS}).to_csv(index=False, sep=separator).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mac.txt", "\r\r".join(TEXTS).encode()),
        ("dos.txt", "\r\n\r\n".join(TEXTS).encode()),
        ("NOTES.TXT", "\n\n".join(TEXTS).encode("utf-8-sig")),
        ("wide.txt", "\n\n".join(TEXTS).encode("utf-16")),
        ("wider.txt", "\n\n".join(TEXTS).encode("utf-32")),
        ("unmarked.txt", "\n\n".join(TEXTS).encode("utf-16-le")),
        ("unmarked_be.txt", "\n\n".join(TEXTS).encode("utf-16-be")),
        ("unmarked_32.txt", "\n\n".join(TEXTS).encode("utf-32-be")),
        ("unmarked.jsonl", lines(ROWS).decode().encode("utf-32-le")),
        ("unmarked.csv", comma_separated().decode().encode("utf-16-le")),
        ("two_parts.txt.gz", b"".join(zipped(f"{text}\n\n".encode()) for text in TEXTS)),
        ("lines.txt", "\n".join(TEXTS).encode()),
        ("packed.txt.gz", zipped("\n\n".join(TEXTS).encode())),
        ("zstd.txt.zst", zstd("\n\n".join(TEXTS).encode())),
        ("zstd.jsonl.zst", zstd(lines(ROWS))),
        ("ZSTD.CSV.ZST", zstd(comma_separated())),
        ("null.jsonl", lines({"article": None, "title": None, "text": t} for t in TEXTS)),
        ("some.jsonl", lines({"article": i if i % 2 else None, "text": t} for i, t in enumerate(TEXTS))),
        ("null.parquet", table(article=pd.Series([None] * 60, dtype="string"), text=TEXTS)),
        ("plain.jsonl", lines(ROWS)),
        ("UPPER.JSONL", lines(ROWS, "\r\n") + b"\r\n\r\n"),
        ("mark.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("wide.jsonl", lines(ROWS).decode().encode("utf-16")),
        ("packed.JSONL.GZ", zipped(lines(ROWS))),
        ("array.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("array.json", json.dumps(ROWS).encode()),
        ("member.json", json.dumps({"data": ROWS}, indent=1).encode()),
        ("version.json", json.dumps({"version": "1.0", "data": ROWS, "tags": ["a"]}).encode()),
        ("nested.json", json.dumps({"version": 1, "data": {"rows": ROWS}}, indent=1).encode()),
        ("columns.json", json.dumps({"text": TEXTS, "n": [*range(60)]}).encode()),
        ("pandas.json", pd.DataFrame({"text": TEXTS, "n": 1}).to_json().encode()),
        ("index.json", pd.DataFrame({"text": TEXTS, "n": 1}).to_json(orient="index").encode()),
        ("schema.json", pd.DataFrame({"text": TEXTS, "n": 1}).to_json(orient="table").encode()),
        ("strings.json", json.dumps(TEXTS).encode()),
        ("ids.jsonl", lines({"id": 10**20 + i, "text": t} for i, t in enumerate(TEXTS))),
        ("articles.jsonl", lines({"article": 10**20 + i, "text": t} for i, t in enumerate(TEXTS))),
        ("kinds.jsonl", lines({"article": str(i) if i % 2 else i + 1, "text": t} for i, t in enumerate(TEXTS))),
        (
            "huge.jsonl",
            "\n".join(f'{{"article": {"9" * 5_000}{i}, "text": "{t}"}}' for i, t in enumerate(TEXTS)).encode(),
        ),
        (
            "close.jsonl",
            "\n".join(f'{{"article": 0.1{"0" * 20}{i}, "text": "{t}"}}' for i, t in enumerate(TEXTS)).encode(),
        ),
        ("zeros.jsonl", lines({"article": "0" * i + "7" if i else 7, "text": t} for i, t in enumerate(TEXTS))),
        ("zeros.csv", ("text,article\n" + "\n".join(f'"{t}",{"0" * i}7' for i, t in enumerate(TEXTS))).encode()),
        ("unsigned.parquet", table(article=np.arange(60, dtype=np.uint64) + 2**63, text=TEXTS)),
        ("titles.jsonl", lines({"title": None if i % 2 else "", "text": t} for i, t in enumerate(TEXTS))),
        ("half.jsonl", lines({"title": f"t{i}" if i % 2 else None, "text": t} for i, t in enumerate(TEXTS))),
        ("unused.jsonl", lines({"meta": {"a": i} if i % 2 else "x", "text": t} for i, t in enumerate(TEXTS))),
        ("body.jsonl", lines({"id": i, "date": "2020-01-01"[:i], "body": t} for i, t in enumerate(TEXTS))),
        ("plain.csv", comma_separated()),
        ("single.csv", ("text\n" + "\n".join(TEXTS)).encode()),
        ("trailing.csv", ("text;n;\n" + "\n".join(f"{t};1;;" for t in TEXTS)).encode()),
        ("other.csv", ("n,text\n" + "\n".join(f'5" pipe,"{t}"' for t in TEXTS)).encode()),
        ("nested.parquet", table(text=TEXTS, meta=[{"a": [i]} for i in range(60)], other=TEXTS)),
        ("body.parquet", table(body=TEXTS, id=TEXTS, meta=[{"a": "words"}] * 60, n=range(60))),
        ("semicolon.CSV", comma_separated(";")),
        ("packed.csv.gz", zipped(comma_separated())),
        ("plain.parquet", table(text=TEXTS)),
        ("bytes.parquet", table(text=[text.encode() for text in TEXTS])),
        ("categories.parquet", table(text=pd.Categorical(TEXTS), title=pd.Categorical([f"t{i}" for i in range(60)]))),
        ("packed.parquet.gz", zipped(table(text=TEXTS))),
    ],
)
def test_files_are_read_as_people_write_them(tmp_path, name, content):
    corpus = write(tmp_path, name, content)
    parts = {split: corpora.load(corpus, split) for split in corpora.SPLITS}
    assert sorted(text for part in parts.values() for text in part["text"]) == sorted(TEXTS)
    articles = [set(part["article"]) for part in parts.values()]
    assert sum(map(len, articles)) == 60 and min(map(len, articles)) >= 5


def test_text_is_kept_exactly(tmp_path):
    odd = ["a\x00b tail", " blanks  and\nbreaks ", "12", "z" * 100_000]
    corpus = write(tmp_path, "odd.jsonl", lines({"text": t, "split": "train"} for t in odd))
    assert corpora.load(corpus)["text"][:] == odd
    lone = write(tmp_path, "lone.jsonl", b'{"text": "cut \\ud83d", "split": "train"}')
    assert corpora.load(lone)["text"][:] == ["cut \ufffd"]


def test_a_colon_decides(tmp_path, capsys):
    file = write(tmp_path, "my.txt", "\n\n".join(f"first {t}\nsecond {t}" for t in TEXTS).encode())
    assert sum(len(corpora.load(file, split)) for split in corpora.SPLITS) == 60
    assert "60 paragraphs between blank lines" in capsys.readouterr().err
    assert sum(len(corpora.load(f"{file}:lines", split)) for split in corpora.SPLITS) == 120
    assert corpora.fingerprint(file) != corpora.fingerprint(f"{file}:lines")
    two = write(tmp_path, "two.jsonl", lines({"text": "x", "body": t} for t in TEXTS))
    assert set(corpora.load(f"{two}:body")["text"]) < set(TEXTS)
    for wrong in (f"{two}:other", f"{file}:chapters"):
        with pytest.raises(ValueError, match="allowed: "):
            corpora.load(wrong)


LONG = "and so on with more and more words " * 8


@pytest.mark.parametrize(
    ("name", "blocks", "how", "rows", "documents"),
    [
        ("wrapped", ["\n".join([f"{i} is a line that ends where"] * 6) for i in range(100)], "paragraphs", 100, 50),
        ("one line each", [f"{i} {LONG}" for i in range(100)], "paragraphs", 100, 50),
        ("strays", ["\n".join(f"{i} {j} {LONG}" for j in range(50)) for i in range(10)], "lines", 500, 500),
        ("no blanks", ["\n".join(f"{i} and so on" for i in range(100))], "lines", 100, 100),
        ("two blanks", ["\n".join(f"{i} {j} and so on" for j in range(50)) for i in range(3)], "lines", 150, 150),
        ("chapters", ["\n".join(f"Sentence {i} {j}." for j in range(900)) for i in range(12)], "paragraphs", 12, 12),
    ],
)
def test_blank_lines_separate_unless_they_are_strays(tmp_path, capsys, name, blocks, how, rows, documents):
    corpus = write(tmp_path, f"{name}.txt", "\n\n\n".join(blocks).encode())
    parts = [corpora.load(corpus, split) for split in corpora.SPLITS]
    assert sum(map(len, parts)) == rows and sum(len(set(part["article"])) for part in parts) == documents
    said = capsys.readouterr().err
    assert f"{rows:,} {how}" in said and f"add ':{'lines' if how == 'paragraphs' else 'paragraphs'}'" in said


def test_an_article_of_one_object_is_a_row(tmp_path):
    """Lists beside a long text are not the rows, whatever the text is called."""
    for i in range(6):
        article = {"body": f"{i} {LONG}", "tags": ["one", "two"], "comments": [{"text": "no"}], "meta": {"a": 1}}
        write(tmp_path, f"{i}.json", json.dumps(article).encode())
    texts = [text for split in corpora.SPLITS for text in corpora.load(str(tmp_path), split)["text"]]
    assert sorted(texts) == [f"{i} {LONG}" for i in range(6)]


def test_rows_under_the_names_of_splits(tmp_path):
    content = {
        "train": [{"text": "a"}, {"text": "b"}],
        "validation": ["c", "d"],
        "test": [{"text": "e"}, {"text": "f"}],
    }
    corpus = write(tmp_path, "my.json", json.dumps(content).encode())
    assert [corpora.load(corpus, split)["text"][:] for split in corpora.SPLITS] == [["a", "b"], ["c", "d"], ["e", "f"]]


@pytest.mark.parametrize("key", ["article", "title"])
def test_files_of_a_folder_share_no_document(tmp_path, key):
    for i in range(6):
        write(tmp_path, f"{i}.jsonl", lines({key: "one", "text": f"{part} of {i}"} for part in range(2)))
    write(tmp_path, ".hidden.json", b"broken")
    rows = [corpora.load(str(tmp_path), split) for split in corpora.SPLITS]
    assert sum(len(set(part["article"])) for part in rows) == 6 and sum(map(len, rows)) == 12
    write(tmp_path, "broken.jsonl", b'{"words": 1}')
    with pytest.raises(ValueError, match=r"broken.jsonl' has columns"):
        corpora.load(str(tmp_path))


def test_an_unused_column_may_be_broken(tmp_path, monkeypatch):
    """Only the columns of the corpus are read where the format allows it."""
    asked, iter_batches = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, columns: asked.append(columns) or iter_batches(self, size, columns=columns),
    )
    corpora.load(write(tmp_path, "my.parquet", table(text=TEXTS, other=TEXTS, title=TEXTS)))
    assert asked == [["text", "title"]]


def test_a_folder_is_read_whole(tmp_path):
    for i in range(6):
        write(tmp_path, f"{i}.txt", f"one of {i}\n\ntwo of {i}".encode())
    before = corpora.fingerprint(str(tmp_path))
    rows = [corpora.load(str(tmp_path), split) for split in corpora.SPLITS]
    assert [len(set(part["article"])) for part in rows] == [2, 2, 2] and sum(map(len, rows)) == 12
    write(tmp_path, "7.jsonl", lines(ROWS))
    assert sum(len(corpora.load(str(tmp_path), split)) for split in corpora.SPLITS) == 72
    assert corpora.fingerprint(str(tmp_path)) != before


# -- text, cut to what a model reads at once ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return teachers.load(tiny.save(tmp_path_factory.mktemp("model"), "llama"), device="cpu")


def documents(folder, *sizes: int) -> str:
    """A file of documents of so many words each, one paragraph a document, all in the training split."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for i, n in enumerate(sizes):
        words = [tiny.WORDS[j] for j in torch.randint(len(tiny.WORDS), (n,), generator=random)]
        rows.append(json.dumps({"article": i, "text": " ".join(words), "split": "train"}))
    return write(folder, "documents.jsonl", "\n".join(rows).encode())


def shares(pieces: corpora.Texts) -> dict[int, int]:
    """Tokens of each document."""
    return {int(a): int(pieces.lengths[pieces.articles == a].sum()) for a in np.unique(pieces.articles)}


def test_no_document_fills_a_split(reader, tmp_path):
    corpus = documents(tmp_path, 20_000, *[60] * 30)
    found = shares(corpora.texts(reader, corpus, n_tokens=1_000, max_length=33))
    assert len(found) == 31 and found[0] <= 64
    five = documents(tmp_path, *[5_000] * 5)
    found = sorted(shares(corpora.texts(reader, five, n_tokens=1_600, max_length=33)).values())
    assert len(found) == 5 and found[-1] - found[0] <= 64


def test_pieces_are_a_prefix_and_all_of_the_text(reader, tmp_path):
    corpus = documents(tmp_path, 3_000, 10, 700, 1, 45)
    whole = corpora.texts(reader, corpus, n_tokens=3_756, max_length=20)
    assert shares(whole) == {0: 3_000, 1: 10, 2: 700, 3: 1, 4: 45}
    for n in (100, 101, 500, 3_755):
        part = corpora.texts(reader, corpus, n_tokens=n, max_length=20)
        assert part.n_tokens == n and np.array_equal(part.articles, whole.articles[: len(part.tokens)])
        for ours, theirs in zip(part.tokens, whole.tokens, strict=False):
            assert np.array_equal(ours, theirs[: len(ours)])
    rows = corpora.load(corpus)
    for article, text in zip(rows["article"], rows["text"], strict=True):
        words = [
            reader.tokenizer.decode(t[1:]) for t, a in zip(whole.tokens, whole.articles, strict=True) if a == article
        ]
        assert " ".join(words) == text


def test_a_long_document_costs_no_more_than_what_is_asked_for(reader, tmp_path, monkeypatch):
    corpus, seen, call = documents(tmp_path, 200_000), [], type(reader.tokenizer).__call__
    monkeypatch.setattr(
        type(reader.tokenizer), "__call__", lambda self, text, **o: seen.extend(text) or call(self, text, **o)
    )
    adds_bos = teachers.Teacher.adds_bos
    monkeypatch.setattr(teachers.Teacher, "adds_bos", property(lambda self: True))
    corpora.texts(reader, corpus, n_tokens=500, max_length=32)
    assert sum(map(len, seen)) < 20 * 500
    monkeypatch.setattr(teachers.Teacher, "adds_bos", adds_bos)


PEAKS = """
    import sys
    from pathlib import Path
    from helpers.models import corpora, teachers
    teacher = teachers.load(sys.argv[1], device="cpu")
    for corpus in sys.argv[2:]:
        assert corpora.texts(teacher, corpus, n_tokens=1_000, max_length=32).n_tokens == 1_000
        status = Path("/proc/self/status").read_text()
        print(next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no mark of the highest resident memory here")
def test_memory_does_not_grow_with_the_files(tmp_path):
    """Forty documents of .2 MB and of 1.5 MB: what their files are larger by is not found in memory."""
    corpora_of = {}
    for size in (200_000, 1_500_000):
        texts = [f"{i} " + " ".join(tiny.WORDS) * (size // len(" ".join(tiny.WORDS))) for i in range(40)]
        contents = {
            "jsonl": "\n".join(json.dumps({"text": text}) for text in texts).encode(),
            "txt": "\n\n".join(texts).encode(),
            "csv": ("text\n" + "\n".join(texts)).encode(),
        }
        corpora_of[size] = [write(tmp_path, f"{size}.{ending}", content) for ending, content in contents.items()]
    small, large = corpora_of.values()
    model = tiny.save(tmp_path / "model", "llama")
    code = [sys.executable, "-c", textwrap.dedent(PEAKS), model, *small, *large]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    peaks = list(map(int, done.stdout.split()))
    assert len(peaks) == 6 and peaks[-1] - peaks[2] < 1.5 * 52, peaks  # MB; each file is 52 MB longer


def test_texts_laid_away_are_the_texts(monkeypatch, tmp_path):
    corpus = documents(tmp_path, *[90] * 30)
    whole = corpora.load(corpus).to_dict()
    monkeypatch.setattr(files, "AWAY", 1_000)
    for _ in ("a disk with room", "a full one"):
        corpora._documents.cache_clear()
        assert corpora.load(corpus).to_dict() == whole
        assert len(corpora._rows(corpus, "train")[0]["text"].chunks) > 9
        monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    corpora._documents.cache_clear()


def full():
    raise OSError("No space left on device")


@pytest.mark.parametrize("packed", ["", *files.PACKED])
def test_a_folder_is_known_for_one_of_texts_before_a_kernel_starts(packed):
    for kind in files.KINDS:
        assert chapters.TEXT_FILE.fullmatch(f"My{kind.upper()}{packed}")
        assert not chapters.TEXT_FILE.fullmatch(f".my{kind}{packed}")
    assert not chapters.TEXT_FILE.fullmatch("my.pdf")


def test_a_file_of_a_folder_that_is_packed_twice_is_not_passed_over(tmp_path):
    for i in range(6):
        write(tmp_path, f"{i}.txt", b"one\n\ntwo")
    write(tmp_path, "more.txt.gz.ZST", b"")
    with pytest.raises(ValueError, match="more.txt.gz.ZST is packed twice; allowed: a file packed once"):
        corpora.load(str(tmp_path))


def test_text_without_whitespace_is_cut_too(reader, tmp_path):
    corpus = write(tmp_path, "one.jsonl", json.dumps({"text": "x" * 10_000, "split": "train"}).encode())
    with pytest.warns(UserWarning, match="has .* tokens, not n_tokens=1,000"):
        assert corpora.texts(reader, corpus, n_tokens=1_000, max_length=32).n_tokens == 20  # of 512 characters each


def test_the_same_bytes_read_in_two_ways_are_two_corpora(tmp_path):
    """A harvest of one must not be served for the other; a copy under another name is the same corpus."""
    for name in ("a.jsonl", "b.jsonl", "a.txt"):
        (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    first, copy, lines = (corpora.fingerprint(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "a.txt"))
    assert first == copy != lines


def long_words(n: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(tiny.WORDS), n))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blocks.txt", "\n\n".join(f"{i} {long_words(2_000)}" for i in range(40)).encode()),
        ("lines.txt", "\n".join(f"{i} {long_words(600)}" for i in range(40)).encode()),
        ("short.jsonl", lines({"text": f"{i} {long_words(20)}"} for i in range(200))),
        ("five.jsonl", lines({"text": f"{i} {long_words(9_000)}"} for i in range(5))),
        ("article.txt", "\n\n".join(f"{i} {long_words(300)}" for i in range(12)).encode()),
    ],
)
@pytest.mark.parametrize("n_tokens", [150, 250, 400, 900])
def test_few_tokens_come_from_several_documents(reader, tmp_path, name, content, n_tokens):
    corpus = write(tmp_path, name, content)
    for split in corpora.SPLITS[1:]:
        pieces = corpora.texts(reader, corpus, n_tokens=n_tokens, split=split)
        losses = activations.losses(reader, pieces).groupby("article")[["nats", "tokens"]].sum().to_numpy()
        documents = len(set(corpora.load(corpus, split)["article"]))
        assert pieces.n_tokens == min(n_tokens, 420 if name == "short.jsonl" else n_tokens)
        assert len(losses) >= min(documents, corpora.SEVERAL)
        t_interval(losses, lambda sums: float(sums[:, 0].sum() / sums[:, 1].sum()))


@pytest.mark.parametrize(
    ("n_tokens", "documents"), [(100, 5), (319, 5), (640, 10), (2_000, 30), (7_000, 30), (9_000, 36)]
)
def test_a_loss_has_units_enough(reader, tmp_path, n_tokens, documents):
    """At most 256 tokens of each of 30 documents, and fewer where they are enough."""
    corpus = write(tmp_path, "long.jsonl", lines({"text": f"{i} {long_words(2_000)}"} for i in range(400)))
    pieces = activations.loss_texts(reader, corpus, n_tokens)
    assert pieces.n_tokens == n_tokens and len(set(pieces.articles)) == documents


@pytest.mark.parametrize("n_tokens", [3, 100, 200])
def test_a_small_harvest_comes_from_several_documents_too(reader, tmp_path, n_tokens):
    corpus = write(tmp_path, "long.jsonl", lines({"text": f"{i} {long_words(2_000)}"} for i in range(40)))
    options = {"layer": 1, "split": "test", "cache_dir": tmp_path / "cache"}
    store = activations.harvest(reader, corpus, n_tokens=n_tokens, **options)
    pieces = corpora.texts(reader, corpus, n_tokens=n_tokens, split="test")
    assert store.n == n_tokens and len(set(store.article)) == min(n_tokens, corpora.SEVERAL)
    assert np.array_equal(store.token_id, np.concatenate([tokens[pieces.bos :] for tokens in pieces.tokens]))
    lone = documents(tmp_path, 2_000)  # there is no other document to take from
    assert corpora.texts(reader, lone, n_tokens=100).lengths.tolist() == [100]


def test_one_article_of_one_paragraph_is_refused_before_any_work(reader, tmp_path):
    corpus = write(tmp_path, "one.txt", long_words(5_000).encode())
    with pytest.raises(ValueError, match=r"corpus=.*has 1 document to .*; allowed: at least 5"):
        activations.harvest(reader, corpus, layer=1, n_tokens=100, cache_dir=tmp_path / "cache")
    assert not any(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
