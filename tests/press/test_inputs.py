"""Every chapter that has `corpus` runs on the texts that people have, or says before any harvest what it lacks."""

import ast
import itertools
import json
import re
import shutil
import warnings

import matplotlib.pyplot as plt
import pytest

from helpers import settings
from helpers.press import chapters
from tests import tiny

BOOK_MODELS = ("10_the_sae_inside", "11_the_structure_is_learned", "12_three_gaps", "16_training_the_mixture")
"""Chapters about the book's own mixture: it reads their texts, or they train it."""
SMALL = {
    "00_how_to_read": {"n_tokens": 200},
    "01_topk_sae_is_rank1_moe": {"n_tokens": 600, "n_features": 32, "k": 4, "steps": 5, "seeds": [0]},
    "02_what_an_mlp_sees": {
        "n_tokens": 600, "n_held_out": 300, "n_padded": 300, "n_features": 32, "k": 4, "steps": 5, "n_resamples": 20,
    },
    "05_distilling_an_mlp": {
        "n_tokens": 600, "n_validation": 150, "n_held_out": 300, "n_untrained": 300, "n_ce": 150,
        "dense_widths": [4, 8], "students": [[4, 16]], "controls": [4, 16], "sixteenth": 16, "router_rank": 4,
        "steps": 5, "batch_size": 64, "n_top": 2,
    },
    "06_ablations": {
        "n_tokens": 600, "n_validation": 150, "n_held_out": 300, "active": 4, "experts": 16, "router_experts": [32],
        "shared": [0, 1], "router_rank": 4, "ranks": [2, None], "rates": [1e-2, 3e-2], "steps": 20, "log_every": 1,
        "batch_size": 64,
    },
    "09_dead_features_in_a_language_model": {
        "n_tokens": 600, "n_validation": 150, "n_held_out": 300, "n_features": 32, "k": 4, "steps": 5,
        "batch_size": 64, "lrs": [1e-2],
        "strengths": {"auxk": [0.03], "ghost": [0.1], "resample": [[0.2, "input"]], "switch": [0.1], "bias": [0.1]},
    },
    "10_the_sae_inside": {
        "layers": [0, 1], "n_tokens": 600, "n_validation": 150, "n_held_out": 300, "ranks": [1, 2], "steps": 5,
        "lrs": [1e-2], "seeds": [0, 1],
    },
    "11_the_structure_is_learned": {
        "layers": [3], "n_tokens": 300, "n_held_out": 300, "n_loss": 200, "seeds": [0, 1],
        "controls": ["implicit", "shuffled", "random_router", "covariance", "random", "pca"], "n_experts_shown": 1,
    },
    "12_three_gaps": {
        "n_tokens": 600, "n_validation": 150, "n_held_out": 300, "max_length": 64, "steps": 2, "longer": 3,
        "lrs": [3e-3], "fine_lrs": [8e-3], "control_lrs": [1e-3], "ranks": [1, 4], "experts": 8, "active_experts": 2,
        "longest": {"predict": 4, "reconstruct": 4},
    },
    "13_how_few_numbers": {
        "certified": [[512, 64, 15, 2]], "n_vectors": 50, "m_phase": 32, "n_phase": [64],
        "degrees": [4, 8], "active": [1, 2], "n_signals": 4, "sizes": [[64, 128, 7]], "n_tokens": 600,
        "n_features": 32, "trained_degrees": [4, 8], "k": 4, "steps": 5, "seeds": [0],
    },
    "14_matching_pursuit": {
        "n_tokens": 600, "n_held_out": 300, "n_rows": 50, "n_features": 32, "degree": 4, "k": 4, "steps": 5,
        "ks": [2, 4], "m": 64, "ns": [64, 128], "degrees": [4, 8], "batch": 8, "rounds": 1, "n_signals": 10,
    },
    "15_storage_and_fidelity": {
        "n_tokens": 600, "n_validation": 150, "n_held_out": 300, "n_features": 32, "k": 4, "degrees": [4, 8],
        "control_degrees": [8], "equal_degrees": [8], "steps": 5, "batch_size": 64, "lrs": [1e-2],
        "experts": [2, 4, 4],
    },
    "16_training_the_mixture": {
        "vocabulary": 300, "size": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_experts": 4, "d_ff": 4}, "top_k": 2,
        "steps": 4, "batch_size": 2, "length": 32, "warmup": 1, "checkpoints": [0, 2], "validate_every": 2,
        "n_validation": 100, "n_held_out": 200, "n_routed": 200, "order": 3,
    },
    "17_every_rule_is_a_routing_rule": {
        "n_tokens": 600, "n_held_out": 300, "n_features": 32, "k": 4, "other_ks": [2], "steps": 4, "lrs": [1e-2],
        "divided": True, "n_ce": 60, "seeds": [0, 1],
    },
    "18_read_your_sae_as_a_mixture": {
        "n_tokens": 600, "n_held_out": 300, "n_ce": 150, "n_features": 32, "k": 4, "steps": 5, "seeds": [0, 1],
    },
}  # fmt: skip
"""Parameters with which a chapter takes seconds."""


def words(n: int, start: int) -> str:
    """Words in an order of their own for each start."""
    return " ".join(itertools.islice(tiny.text(n, start).split(), n))


def rows(count: int, length: int) -> str:
    return "\n".join(json.dumps({"text": words(length, i)}) for i in range(count))


TEXTS = {
    "book.txt": lambda: tiny.text(400),
    "note.txt": lambda: tiny.text(31),
    "lines.txt": lambda: "\n".join(words(40, i) for i in range(120)),
    "short.jsonl": lambda: rows(200, 20),
    "five.jsonl": lambda: rows(5, 3_000),
    "article.txt": lambda: "\n\n".join(words(300, i) for i in range(12)),
    "one.jsonl": lambda: rows(1, 3_000),
}
CASES = [
    (chapter, text, mlp)
    for chapter in chapters.find()
    if "corpus" in chapter.defaults
    for text in TEXTS
    for mlp in (("",) if chapter.slug in BOOK_MODELS else ("llama", "gpt-neox"))  # a gated MLP, and one without gates
]
QUICK = ("00_how_to_read", "02_what_an_mlp_sees", "05_distilling_an_mlp", "06_ablations", "10_the_sae_inside")
ALSO = {
    "book.txt": (
        "06_ablations", "09_dead_features_in_a_language_model", "13_how_few_numbers", "15_storage_and_fidelity",
    ),
    "lines.txt": ("00_how_to_read",), "short.jsonl": ("02_what_an_mlp_sees",),
    "article.txt": ("01_topk_sae_is_rank1_moe",), "note.txt": ("00_how_to_read",),
}  # fmt: skip


def sampled(chapter: chapters.Chapter, text: str, mlp: str) -> bool:
    """Every chapter on the text that is too short, the quick ones on the fewest documents, each other text in some."""
    if text == "five.jsonl":
        return mlp != "llama" and chapter.slug in QUICK
    return mlp != "gpt-neox" and (text == "one.jsonl" or chapter.slug in ALSO.get(text, ()))


SAMPLE = [case for case in CASES if sampled(*case)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {mlp: tiny.save(tmp_path_factory.mktemp(mlp), mlp) for mlp in ("llama", "gpt-neox")}


def run(chapter: chapters.Chapter, parameters: dict) -> None:
    """The cells of a chapter in this process, as a kernel runs them."""
    names = {"__name__": "__main__", "display": lambda *_: None}
    for cell in chapter.cells:
        if cell["cell_type"] == "code":
            exec(compile(ast.parse(cell["source"]), chapter.slug, "exec"), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}


def read(chapter, text, mlp, teachers, folder, monkeypatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(settings, "cores", lambda: 1)  # in this process
    plt.switch_backend("agg")
    corpus, cache, results = folder / text, folder / "cache", folder / "results"
    corpus.write_text(TEXTS[text](), encoding="utf-8")
    given = {"corpus": str(corpus), "cache_dir": str(cache), "results_dir": str(results), "device": "cpu", "workers": 1}
    given |= {"teacher": teachers.get(mlp), "layer": 1} if mlp else {}
    given = {name: value for name, value in given.items() if name in chapter.defaults}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of texts that are shorter than asked for
            run(chapter, given | SMALL[chapter.slug])
        assert (results / f"{chapter.slug}.json").is_file()
        assert text != "one.jsonl", "one document is no split"
    except ValueError as error:
        assert text != "book.txt", error  # a plain text is read by every chapter
        assert re.search(r"(corpus|n_\w+)=.*document.*; allowed: at least \d", str(error)), error
        assert not [*cache.rglob("*.bin")], "said before any harvest"
    finally:
        plt.close("all")


@pytest.mark.parametrize(("chapter", "text", "mlp"), SAMPLE, ids=lambda value: getattr(value, "slug", value))
def test_a_sample_of_chapters_and_texts(chapter, text, mlp, teachers, tmp_path, monkeypatch):
    read(chapter, text, mlp, teachers, tmp_path, monkeypatch)


def test_the_sample_has_every_text():
    assert {text for _, text, _ in SAMPLE} == set(TEXTS)


def test_a_chapter_reads_a_teacher_without_a_token_for_padding(teachers, tmp_path, monkeypatch):
    """Pythia's and GPT-2's tokenizers have none; this chapter looks at padded batches."""
    (chapter,) = (each for each in chapters.find() if each.slug == "02_what_an_mlp_sees")
    shutil.copytree(teachers["gpt-neox"], tmp_path / "teacher")
    tokens = tiny.tokenizer(bos=False)
    tokens.pad_token = None
    tokens.save_pretrained(tmp_path / "teacher")
    read(chapter, "book.txt", "padless", {"padless": str(tmp_path / "teacher")}, tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize(("chapter", "text", "mlp"), CASES, ids=lambda value: getattr(value, "slug", value))
def test_every_chapter_reads_every_text(chapter, text, mlp, teachers, tmp_path, monkeypatch):
    read(chapter, text, mlp, teachers, tmp_path, monkeypatch)
