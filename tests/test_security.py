"""Hostile files: nothing is unpickled or run, headers that lie are refused at once, HTML is shown as text."""

import ast
import contextlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt

from helpers import settings
from helpers.dictionary import load_packed
from helpers.dictionary.files import load_saelens, save_packed
from helpers.dictionary.models import expander_sae
from helpers.models import teachers
from helpers.press import slider
from tests import tiny

# -- nothing is unpickled or run ---------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_a_models_folder_is_not_unpickled(tmp_path):
    folder, mark = Path(tiny.save(tmp_path / "model", "gpt2")), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="teacher=.* could not be loaded"):
        teachers.load(str(folder), device="cpu")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="teacher=.* could not be loaded"):
        teachers.load(str(folder), device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_in_a_models_folder_is_not_run(tmp_path, part):
    folder, mark = Path(tiny.save(tmp_path / "model", "gpt2")), tmp_path / "ran"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nOwn = 1\n")
    content = json.loads((folder / part).read_text())
    names = ("AutoConfig", "AutoModelForCausalLM") if part == "config.json" else ("AutoTokenizer",)
    own = ["own.Own", None] if names == ("AutoTokenizer",) else "own.Own"
    content |= {"auto_map": dict.fromkeys(names, own), "model_type": "own", "tokenizer_class": "Own"}
    (folder / part).write_text(json.dumps(content))
    with contextlib.suppress(ValueError):  # its own tokenizer is passed over where the file of a plain one is there
        teachers.load(str(folder), device="cpu")
    assert not mark.exists()


SOURCES = [
    path
    for folder in ("helpers", "benchmarks", "notebooks")
    for path in sorted((settings.ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".ipynb")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_remote_code_is_trusted_nowhere(path):
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"] if path.suffix == ".ipynb" else [{"cell_type": "code", "source": [text]}]
    for cell in cells if "trust_remote_code" in text else ():
        for node in ast.walk(ast.parse("".join(cell["source"]))) if cell["cell_type"] == "code" else ():
            given = {each.arg: each.value for each in node.keywords} if isinstance(node, ast.Call) else {}
            if isinstance(node, ast.Dict):
                given = {getattr(k, "value", None): v for k, v in zip(node.keys, node.values, strict=True)}
            assert getattr(given.get("trust_remote_code"), "value", False) is False


# -- headers that lie --------------------------------------------------------------------------------------------------

MEASURED = """
    import json, resource, sys, time
    from pathlib import Path
    from helpers.dictionary.files import load_packed, load_saelens
    from helpers.models import checkpoints, corpora, layerwise, teachers
    READERS = {"checkpoints": checkpoints.read, "teachers": lambda p: teachers.load(p, device="cpu"),
               "layerwise": lambda p: layerwise.load(p, device="cpu"), "saelens": load_saelens,
               "packed": lambda p: load_packed(p + "/model.safetensors"),
               "corpora": lambda p: corpora.load(p)}
    for line in sys.stdin:
        which, path = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark of resident memory
        status = lambda: dict(l.split(":") for l in Path("/proc/self/status").read_text().splitlines() if ":" in l)
        before, started = int(status()["VmRSS"].split()[0]), time.process_time()
        try:
            READERS[which](path)
            told = ["none", "it was read"]
        except BaseException as error:
            told = [type(error).__name__, str(error)]
        used = time.process_time() - started, (int(status()["VmHWM"].split()[0]) - before) / 1000
        print(json.dumps([*told, *used]), flush=True)
"""


def file(header, length=None, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ROUTER = "model.layers.0.mlp.gate.weight"
HEADERS = {
    "a header longer than the file": file(b"{}", 10**10),
    "a header of all memory": file(b"{}", 2**63),
    "a tensor beyond the file": file({ROUTER: tensor([4, 4], [0, 10**12])}),
    "a shape beyond its bytes": file({ROUTER: tensor([10**9, 10**9], [0, 64])}, body=bytes(64)),
    "a shape below nothing": file({ROUTER: tensor([-4, -4], [0, 64])}, body=bytes(64)),
    "a shape of a million numbers": file({ROUTER: tensor([10**18] * 10**6, [0, 64])}, body=bytes(64)),
    "bytes that run backwards": file({ROUTER: tensor([4, 4], [64, 0])}, body=bytes(64)),
    "deep nesting": file(b"[" * 10**6),
    "deep objects": file(b'{"a":' * 10**6),
    "a list": file([1, 2]),
    "tensors that are numbers": file({ROUTER: 1}),
    "no offsets": file({ROUTER: {"dtype": "F32", "shape": [4]}}),
    "no JSON": file(b"\xff" * 100),
}
CONFIG = {"model_type": "olmoe", "num_hidden_layers": 1, "num_experts_per_tok": 1, "hidden_size": 4}
JSONS = {
    "deep nesting": b"[" * 10**6,
    "deep objects": b'{"a":' * 10**6,
    "a list": b"[1]",
    "a billion layers": json.dumps(CONFIG | {"num_hidden_layers": 10**9}).encode(),
    "no JSON": b"\xff" * 100,
}


@pytest.fixture(scope="module")
def reader():
    """A process with everything imported, which reads what it is told to, and says what came and what it took."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory has no mark to reset here")
    code = [sys.executable, "-c", textwrap.dedent(MEASURED)]
    process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=settings.ROOT)

    def read(which, path):
        process.stdin.write(json.dumps([which, str(path)]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield read
    process.stdin.close()
    process.wait(60)


def refused(answer):
    kind, message, seconds, megabytes = answer
    assert kind == "ValueError" and len(message) < 1000, answer
    assert seconds < 1 and megabytes < 200, answer


TENSORS = ["checkpoints", "teachers", "layerwise", "saelens", "packed"]
"""Readers of safetensors."""


@pytest.mark.parametrize("which", TENSORS)
@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused_at_once(reader, tmp_path, which, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": 1}))
    for weights in ("model.safetensors", "sae_weights.safetensors"):
        (tmp_path / weights).write_bytes(HEADERS[name])
    refused(reader(which, tmp_path))


@pytest.mark.parametrize("which", TENSORS)
def test_a_header_of_a_billion_tensors_is_refused_at_once(reader, tmp_path, which):
    """Sixty gigabytes that are not there: the file has holes."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": 1}))
    with (tmp_path / ("sae_weights.safetensors" if which == "saelens" else "model.safetensors")).open("wb") as weights:
        weights.write((60 * 10**9).to_bytes(8, "little") + b'{"a')
        weights.truncate(61 * 10**9)
    refused(reader(which, tmp_path))


@pytest.mark.parametrize("which", ["checkpoints", "teachers", "layerwise", "saelens"])
@pytest.mark.parametrize("name", JSONS)
def test_a_hostile_json_is_refused_at_once(reader, tmp_path, which, name):
    good = file({ROUTER: tensor([4, 4], [0, 64])}, body=bytes(64))
    for weights in ("model.safetensors", "sae_weights.safetensors"):
        (tmp_path / weights).write_bytes(good)
    for config in ("config.json", "cfg.json"):
        (tmp_path / config).write_bytes(JSONS[name])
    refused(reader(which, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_bytes(JSONS[name])
    if which == "checkpoints":
        refused(reader(which, tmp_path))


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6], ids=["lists", "objects"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_corpus_of_deep_nesting_is_refused_at_once(reader, tmp_path, ending, text):
    path = tmp_path / f"deep.{ending}"
    path.write_text(text)
    answer = reader("corpora", path)
    refused(answer)
    assert answer[1].startswith(f"corpus={str(path)!r} cannot be read as .{ending}: ")


@pytest.mark.parametrize("change", [{"degrees": 10**9}, {"degrees": -1}, {"rows": 10**4}, {"rows": -1}, {"k": "many"}])
def test_a_packed_file_whose_parts_do_not_fit_is_refused(tmp_path, change):
    from safetensors.torch import load_file, save_file

    places = torch.stack([torch.arange(3) + i for i in range(8)])
    sae = expander_sae(places, 12, 2, generator=settings.generator(0))
    path = save_packed(sae, tmp_path / "sae.safetensors")
    tensors, about = load_file(path), {"k": "2", "activation": "relu"}
    if "k" in change:
        about |= change
    if "rows" in change:
        tensors["rows"][0, 0] = change["rows"]
    if "degrees" in change:
        tensors |= {"degrees": torch.tensor([change["degrees"]]), "values": tensors["values"].flatten()}
        tensors["rows"] = tensors["rows"].flatten()
    save_file(tensors, path, about)
    with pytest.raises(ValueError):
        load_packed(path)


def test_a_saelens_folder_that_is_no_such_thing_is_named(tmp_path):
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* is damaged"):
        load_saelens(tmp_path)


# -- HTML in a corpus --------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>hurt()</script>",
    "<img src=x onerror=hurt()>",
    "</script><script>hurt()</script>",
    "<!--<script>hurt()",
    "--><svg onload=hurt()>",
    "\"'><b onclick=hurt()>",
    "</figure></div></body>",
    "&lt;b&gt;",
    "]]><!DOCTYPE html>",
    "<style>*{display:none}",
)


def harmless(soup: BeautifulSoup) -> None:
    for element in soup.find_all(True):
        assert not any("hurt" in str(value) for name, value in element.attrs.items() if name.startswith("on")), element
        assert element.name != "script" or "hurt" not in element.text or element.get("type") == "application/json"
    assert not any("display:none" in element.text for element in soup.find_all("style"))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_slider_shows_html_as_text(text):
    def draw(token, title):
        return plt.figure(figsize=(1, 1))

    made = slider.slider(
        draw,
        {"token": [text, "b"], "title": [1, 2]},
        alt=lambda token, title: f"{token} of {title}",
        label={"token": text, "title": f"title {text}"},
        caption=text,
    )
    soup = BeautifulSoup(made.html() + "<p>after</p>", "html.parser")
    harmless(soup)
    assert soup.find("figcaption").text == text and soup.find("img")["alt"] == f"{text} of 1"
    assert [legend.text for legend in soup.find_all("legend")] == [text]  # names are chosen by buttons
    assert [label.text.strip() for label in soup.select("fieldset label")] == [text, "b"]
    assert soup.select_one(".book-slider-knob label").text == f"title {text}" and soup.find("p").text == "after"
    assert len(soup.find_all("script")) == 2 and len(soup.find_all("figure")) == 1
    data = soup.find("script").text
    assert "<" not in data, "a comment with a script in it would go on behind the script's end"
    assert json.loads(data)["values"][0][0] == text
    live = made.widget()
    harmless(BeautifulSoup(live.children[0].value, "html.parser"))


SHOWS = """
import json, pandas
from IPython.display import Markdown
from matplotlib import pyplot as plt
from helpers.press.slider import slider
texts = json.loads({texts!r})
for text in texts:
    print(text)
pandas.DataFrame({{"title": texts, "token": texts}})
---
frame = {{"alt": lambda i: texts[i], "label": texts[2], "caption": " ".join(texts)}}
slider(lambda i: plt.figure(figsize=(1, 1)), {{"i": [0, 1]}}, **frame)
---
log.record("own.claim", 0, n=9, scope="analogue", note=" ".join(texts))
"""


def test_pages_show_html_as_text(tmp_path):
    """A small book whose chapter prints, tabulates, draws and records a hostile corpus's titles and tokens."""
    cells = SHOWS.format(texts=json.dumps(HOSTILE)).split("---")
    tiny.repository(tmp_path, *cells)
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    done = subprocess.run([sys.executable, "-m", "helpers", "book"], capture_output=True, text=True, **where)
    assert not done.returncode, done.stdout
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "_build" / "html").rglob("*.html")}
    soups = {name: BeautifulSoup(page, "html.parser") for name, page in pages.items()}
    for soup in soups.values():
        harmless(soup)
    shown = " ".join(soups["00_how_to_read"].find("article").get_text(" ").split())
    assert [text for text in HOSTILE if " ".join(text.split()) not in shown] == []
