"""Tiny random teachers of every architecture the book names, saved as folders that `teachers.load` reads."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers import settings
from helpers.models import activations, teachers

WORDS = """a river runs under the old stone bridge and two men carry bread to market while rain falls on green hills
""".split()  # noqa: SIM905
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
GROUPED = SIZES | dict(num_key_value_heads=1, head_dim=8)
GPT2 = dict(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_inner=24)
# name: configuration class, its arguments, where the blocks are
ARCHITECTURES = {
    "gpt-neox": ("GPTNeoXConfig", SIZES, "gpt_neox.layers"),
    "gemma3": ("Gemma3TextConfig", GROUPED | dict(sliding_window=8), "model.layers"),
    "gemma2": ("Gemma2Config", GROUPED | dict(final_logit_softcapping=0.5), "model.layers"),
    "llama": ("LlamaConfig", SIZES, "model.layers"),
    "qwen2": ("Qwen2Config", SIZES | dict(num_key_value_heads=1), "model.layers"),
    "qwen3": ("Qwen3Config", GROUPED, "model.layers"),
    "gpt2": ("GPT2Config", GPT2, "transformer.h"),
}
WITHOUT_BOS = ("gpt-neox", "gpt2", "qwen2")


def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def save(folder: Path, architecture: str, seed: int = 0) -> str:
    """A random model with weights large enough that every path matters; the folder's name."""
    config, sizes, _ = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer(architecture not in WITHOUT_BOS).save_pretrained(folder)
    return str(folder)


WRAPPERS = {
    "compile": lambda name: "_orig_mod." + name,
    "DDP": lambda name: "module." + name,
    "both": lambda name: "module._orig_mod." + name,
    "parts": lambda name: re.sub(r"\.(mlp|block_sparse_moe|self_attn|attention)\.", r"._orig_mod.\1.", name),
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"(\.\d+\.)", r"\1_fsdp_wrapped_module.", name),
}
"""What training with a wrapper makes of a tensor's name."""


def rename(folder: str | Path, new_name: Callable[[str], str]) -> None:
    """Give every tensor of a checkpoint another name, and its index too."""
    for path in Path(folder).glob("*.safetensors"):
        save_file({new_name(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        told = json.loads(index.read_text())
        told["weight_map"] = {new_name(name): file for name, file in told["weight_map"].items()}
        index.write_text(json.dumps(told))


def text(paragraphs: int, seed: int = 0) -> str:
    """Paragraphs of 3 to 30 random words, between blank lines."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 31, (paragraphs,), generator=random).tolist()
    return "\n\n".join(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=random)) for n in lengths)


def harvests(cache: Path) -> dict[str, object]:
    """A tiny random model, a corpus of articles of three paragraphs, and the model's rows after and inside block 1 on
    three splits that share no article: `model`, `teacher`, `corpus`, `folders` by split, `cache`."""
    name, corpus = save(cache / "teacher", "gpt-neox"), cache / "text.jsonl"
    paragraphs = enumerate(text(120).split("\n\n"))
    corpus.write_text("\n".join(json.dumps({"article": i // 3, "text": each}) for i, each in paragraphs), "utf-8")
    model, folders = teachers.load(name, device="cpu"), {}
    options = {"layer": 1, "sites": ("resid_post", "mlp_in"), "cache_dir": cache}
    for split, n in (("train", 600), ("validation", 90), ("test", 110)):
        folders[split] = str(activations.harvest(model, str(corpus), n_tokens=n, split=split, **options).folder)
    return {"model": model, "teacher": name, "corpus": str(corpus), "folders": folders, "cache": str(cache)}


REPOSITORY = {
    "book/bibliography.md": "# Bibliography\n\n```{bibliography}\n:all:\n```\n",  # the book's own leads to its chapters
    "_toc.yml": """format: jb-book
root: index
parts:
- caption: First
  chapters:
  - file: notebooks/00_how_to_read
  - file: map
  - file: scoreboard
  - file: performance
  - file: glossary
  - file: bibliography
""",
    "book/index.md": "# A book\n\n```{include} status.md\n```\n",
    "book/claims.yml": """papers: {p: {letter: A, title: t, cite: rank1moe2026, where: w}}
parts: {I: First}
claims:
- id: own.claim
  statement: It is so.
  source: {paper: p, where: Theorem 1}
  paper_says: {number: '1', setting: a setting}
  part: I
  chapter: 00_how_to_read
  teachers: any
  checks: {only: {metric: m, why: w, control: c, rule: {name: identity, tolerance: 1}}}
""",
    "book/glossary.md": "# Glossary\n",
    "profiles/quick.yml": "common: {}\n",
}
"""What a repository of one chapter has of its own."""


def repository(root: Path, *cells: str) -> None:
    """A copy of this repository with one chapter, made of these cells, which records a claim and its control."""
    for name in ("helpers", "book/theme", "third_party"):
        shutil.copytree(settings.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "mathjax"))
    for name in (
        "_config.yml",
        "requirements.txt",
        *(f"book/{name}" for name in ("references.bib", "scoreboard.md", "map.md")),
    ):
        shutil.copy(settings.ROOT / name, root / name)
    for folder in ("notebooks", "profiles", "data", "results"):
        (root / folder).mkdir(exist_ok=True)
    for name, text in REPOSITORY.items():
        (root / name).write_text(text, encoding="utf-8")
    begin = "from helpers.press import claims\nlog = claims.Chapter.of('00_how_to_read', globals())"
    end = "log.record('own.claim', 0, n=9, scope='analogue')\nlog.control('own.claim', 'only', 2, n=9)\nlog.save()"
    first = nbformat.v4.new_code_cell("results_dir = None", metadata={"tags": ["parameters"]}, id="first")
    made = [nbformat.v4.new_code_cell(text, id=f"cell{i}") for i, text in enumerate((begin, *cells, end))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter", id="title"), first, *made])
    nbformat.write(notebook, root / "notebooks" / "00_how_to_read.ipynb")
