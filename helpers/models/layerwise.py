"""A forward pass that holds one block: all text goes through a block before the next block's weights are read.

In bfloat16 OLMoE-1B-7B takes 14 GB and DeepSeek-MoE-16B 33 GB, one of their blocks 0.8 and 1.2 GB; in float32, which a
CPU wants, everything takes twice that. `teachers.load(name, layerwise=True)` gives a teacher whose modules are
built without memory; a block is filled from the safetensors (`checkpoints`) when the text has come to it and emptied
afterwards. Between blocks the residual streams lie in a file, so that a harvest that was killed goes on at the
block where it stopped, and a harvest at a later layer goes on from the one before. What is computed is the model's own
code; `activations.harvest` is used as with any teacher.

On the device are one block, or the embedding, and one batch of text; in host memory, besides what is on the device if
that is the CPU, about four times `checkpoints.BATCH_BYTES` while experts are read, or the embedding in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from helpers import settings
from helpers.models import checkpoints, sources
from helpers.models.checkpoints import Checkpoint
from helpers.models.teachers import DTYPES, EMBEDDED, Teacher, TokenLosses, check_sites
from helpers.settings import one_of

FORMAT = 1
"""Version of the files between blocks: raise it when the same key would hold other numbers."""
TYPES = ("deepseek", "llama", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LOOP = "eager"
"""Experts run one after another, each on its tokens; grouped products want certain widths and dtypes. The two differ by
rounding, and so by an expert where two score alike."""
SMALL = ("*.json", "*.model", "*.txt")
"""What is fetched from the hub at once; a shard is fetched when a harvest needs one of its blocks."""


class _Passed(nn.Module):
    """Stands for a block that the text has been through."""

    def forward(self, hidden_states: Tensor, **_) -> Tensor:
        return hidden_states


@dataclass(frozen=True, eq=False, repr=False)
class Layerwise(Teacher):
    """A teacher whose weights are on disk, except for those of the block that is at work."""

    checkpoint: Checkpoint
    where: torch.device
    hub: dict
    """What `snapshot_download` needs to fetch shards; empty for a local folder."""

    @property
    def device(self) -> torch.device:
        return self.where

    @torch.inference_mode()
    def run_to(
        self,
        layer: int,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        sites: Iterable[str] = ("mlp_in", "mlp_out"),
    ) -> dict[str, Float[Tensor, "batch seq d_model"]]:
        """As `Teacher.run_to`: all blocks up to `layer` are read for this one batch (a harvest reads each once)."""
        sites = check_sites(sites)
        self.check(layer)
        with self._filled(None) as embedding:
            hidden = embedding(input_ids.to(self.where))
        for n in range(layer):
            with self._filled(n):
                hidden = self._sites(n, hidden, attention_mask, ("resid_post",))["resid_post"]
        with self._filled(layer):
            return self._sites(layer, hidden, attention_mask, sites)

    def through(
        self, layer: int, batches: Sequence[Int[Tensor, "_ _"]], sites: Sequence[str], *, start: int, scratch: Path
    ) -> Iterator[dict[str, Float[Tensor, "batch seq d_model"]]]:
        """As `Teacher.through`: every block up to `layer` is read once, for all batches.

        The residual streams before `layer` stay in a folder of `scratch` (d_model numbers in the model's dtype for
        each token and each pad): a call for a later layer goes on from there. Raises `ValueError` before a block is
        read for a tensor or shard that is missing or of another shape, and for a disk that is too full.
        """
        if not sites:
            yield from ({} for _ in batches[start:])
            return
        self.check(layer)
        states = _States(scratch / f"between-blocks-{self._key(batches)}", batches, self.d_model, self.dtype)
        with FileLock(states.folder / "lock"):
            self._advance(layer, batches, states)
            with self._filled(layer):
                for hidden in states.read(layer, start):
                    yield self._sites(layer, hidden.to(self.where), None, sites)

    def loss(self, *_, **__) -> TokenLosses:
        raise ValueError(f"teacher={self.name!r}, layerwise=True: no losses, no splices; allowed: layerwise=False")

    def randomised(self, seed: int) -> Teacher:
        raise ValueError(f"teacher={self.name!r}, layerwise=True: no random twin; allowed: layerwise=False")

    def check(self, layer: int) -> None:
        """`ValueError` unless the embedding and the blocks up to `layer` are on disk, as large as the model's.

        Shards that a hub id has and this machine has not are fetched here.
        """
        self.block(layer)
        parts = [None, *range(layer + 1)]
        if self.hub:
            names = [*self._names(None).values(), *(w for n in parts[1:] for w in self.checkpoint.names[n].values())]
            files = {self.checkpoint.file_of[name] for name in names}
            _fetch(files, self.hub)
        for n in parts:
            parameters = dict(self._module(n).named_parameters())
            for parameter, name in self._names(n).items():
                shape, expected = self.checkpoint.entry(name).shape, tuple(parameters[parameter].shape)
                if shape != expected:
                    raise ValueError(f"{self.name}: {name} is {list(shape)}, not {list(expected)} as config.json says")
            if EXPERTS[1] in parameters:
                self._check_experts(n, tuple(parameters[EXPERTS[1]].shape))

    def _check_experts(self, n: int, expected: tuple[int, int, int]) -> None:
        layer = self.checkpoint.layer(n)
        for which in checkpoints.WHICH:
            found = (layer.n_experts, layer.d_model, layer.plan(which)[0].d_ff)
            if found != expected:
                raise ValueError(
                    f"{self.name}: {which} of layer {n} has (experts, d_model, d_ff) = {found}, not {expected} as "
                    "config.json says"
                )

    def _module(self, n: int | None) -> nn.Module:
        """Block `n`, or the embedding."""
        return self.model.get_input_embeddings() if n is None else self.blocks[n]

    def _names(self, n: int | None) -> dict[str, str]:
        """What the checkpoint calls each parameter of block `n` (None: the embedding) that is no routed expert's."""
        if n is None:
            there = {m[1]: name for name in self.checkpoint.file_of if (m := re.search(r"embed_tokens\.(.+)$", name))}
        else:
            there = {_renamed(name): whole for name, whole in self.checkpoint.names[n].items()}
        wanted = {name for name, _ in self._module(n).named_parameters()} - set(EXPERTS)
        where = "the embedding" if n is None else f"layer {n}"
        if lost := sorted(wanted - set(there)):
            raise ValueError(f"{self.name}: {where} has no {', '.join(lost)}; it has {', '.join(sorted(there))}")
        if spare := sorted(name for name in set(there) - wanted if not re.search(r"\bexperts\.|inv_freq", name)):
            kind = self.checkpoint.config["model_type"]
            raise ValueError(f"{self.name}: {where} has {', '.join(spare)}, which model_type={kind!r} has no place for")
        return {name: there[name] for name in wanted}

    @contextlib.contextmanager
    def _filled(self, n: int | None) -> Iterator[nn.Module]:
        """Block `n` (None: the embedding) with its weights, the blocks before it passing on what they are given."""
        module, base = self._module(n), self.model.base_model
        if n is not None:
            base.layers = nn.ModuleList([*(_Passed() for _ in range(n)), *self.blocks[n:]])
        try:
            self._fill(module.to_empty(device=self.where), n)
            yield module
        finally:
            module.to("meta")
            base.layers = self.blocks

    @torch.no_grad()
    def _fill(self, module: nn.Module, n: int | None) -> None:
        parameters = dict(module.named_parameters())
        for parameter, name in self._names(n).items():
            parameters[parameter].copy_(self.checkpoint.tensor(name))
        if EXPERTS[0] not in parameters:
            return
        layer, (joined, down) = self.checkpoint.layer(n), (parameters[name] for name in EXPERTS)
        gate, up = joined.chunk(2, dim=1)
        for which, into in {"w_gate": gate.mT, "w_up": up.mT, "w_down": down}.items():
            done = 0
            for experts in layer.weights(which):
                into[done : done + len(experts)].copy_(experts)
                done += len(experts)

    @torch.inference_mode()
    def _sites(self, *args) -> dict[str, Tensor]:
        return super()._sites(*args)

    def _base(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.to(self.where)
        return self.model.base_model(inputs_embeds=hidden, attention_mask=mask, use_cache=False)[0]

    def _advance(self, layer: int, batches: Sequence[Tensor], states: _States) -> None:
        """Take the text through the blocks before `layer`, from the latest of them that it has been through."""
        at = max((n for n in states.kept() if n <= layer), default=None)
        if at == layer:
            return
        states.check(files=2 if at is None else 1)
        total = states.rows * (layer - (at or 0))
        with settings.progress(total=total, desc=f"blocks before {layer}", unit="token", unit_scale=True) as bar:
            if at is None:
                at = 0
                with self._filled(None) as embedding:
                    states.write(0, (embedding(ids.to(self.where)) for ids in batches))
            for n in range(at, layer):
                with self._filled(n):
                    outputs = (
                        self._sites(n, hidden.to(self.where), None, ("resid_post",))["resid_post"]
                        for hidden in states.read(n)
                    )
                    states.write(n + 1, outputs, bar)
                states.drop(n)

    def _key(self, batches: Sequence[Tensor]) -> str:
        """Names the residual streams of these batches by all that determines them."""
        what = [FORMAT, self.fingerprint, str(self.dtype), self.attn_implementation, self.where.type]
        digest = hashlib.sha256(json.dumps(what + [list(ids.shape) for ids in batches]).encode())
        for ids in batches:
            digest.update(ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:24]


class _States:
    """Residual streams of all batches before one block, in one file, whole or not there."""

    def __init__(self, folder: Path, batches: Sequence[Tensor], d_model: int, dtype: torch.dtype):
        self.folder, self.dtype, self.shapes = folder, dtype, [(*ids.shape, d_model) for ids in batches]
        self.ends = np.cumsum([ids.numel() for ids in batches]).tolist()
        self.rows, self.row_bytes = self.ends[-1], d_model * dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)

    def check(self, files: int) -> None:
        """`ValueError` where the disk has no room for so many files more."""
        needed, free = files * self.rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if free < needed * 1.02 + 2**20:
            raise ValueError(f"{self.folder}: text between blocks takes {needed:,} bytes, only {free:,} are free")

    def kept(self) -> list[int]:
        return [int(path.name.removeprefix("before-")) for path in self.folder.glob("before-*[0-9]")]

    def drop(self, n: int) -> None:
        (self.folder / f"before-{n}").unlink()

    def read(self, n: int, start: int = 0) -> Iterator[Float[Tensor, "batch seq d_model"]]:
        """What enters block `n`, batch after batch from number `start`."""
        rows = np.memmap(self.folder / f"before-{n}", np.uint8, "r", shape=(self.rows, self.row_bytes))
        for number in range(start, len(self.shapes)):
            first = self.ends[number - 1] if number else 0
            part = torch.from_numpy(np.array(rows[first : self.ends[number]]))
            yield part.view(self.dtype).view(self.shapes[number])

    def write(self, n: int, batches: Iterable[Float[Tensor, "batch seq d_model"]], bar=None) -> None:
        part = self.folder / "part"
        rows, first = np.memmap(part, np.uint8, "w+", shape=(self.rows, self.row_bytes)), 0
        for hidden, last in zip(batches, self.ends, strict=True):
            rows[first:last] = hidden.cpu().contiguous().view(torch.uint8).reshape(-1, self.row_bytes).numpy()
            if bar is not None:
                bar.update(last - first)
            first = last
        rows.flush()
        part.rename(self.folder / f"before-{n}")


def load(
    teacher: str = EMBEDDED,
    *,
    device: str = "auto",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Layerwise:
    """As `teachers.load`, but the embedding and the blocks stay on disk.

    Raises `ValueError` for a model type that was not tested block by block, quantised weights, an index that lacks
    tensors, and files that are not there or not those of the model.
    """
    one_of("dtype", dtype, DTYPES)
    where = settings.device(device)
    source, fingerprint, hub = sources.find(teacher, revision, cache_dir)
    folder = Path(source)
    if folder.is_dir():
        hub = {}
    else:
        hub = {"repo_id": source} | hub
        folder = _fetch(SMALL, hub)
        if not (folder / checkpoints.INDEX).exists():
            _fetch([checkpoints.SINGLE], hub)
        fingerprint = fingerprint or folder.name  # the cache names a snapshot by its commit
    checkpoint = Checkpoint(str(folder), None)
    kind = checkpoint.config.get("model_type")
    if kind not in TYPES:
        raise ValueError(f"teacher={teacher!r} has model_type={kind!r}, layerwise=True; allowed: {', '.join(TYPES)}")
    if quantised := checkpoint.config.get("quantization_config"):
        method = quantised.get("quant_method", "of a kind not named")
        raise ValueError(
            f"teacher={teacher!r} is quantised ({method}), layerwise=True; allowed: {', '.join(checkpoints.DTYPES)}"
        )
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    try:
        model = _on_meta(folder, checkpoint.config, **options)
        tokens = (_deepseek_tokenizer if kind == "deepseek" else AutoTokenizer.from_pretrained)(folder)
    except Exception as error:  # transformers and tokenizers raise their own kinds
        why = f"{type(error).__name__}: {sources.reason(error)}"
        raise ValueError(f"teacher={teacher!r}, layerwise=True: {why}") from error
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=base.config).to(where)
    loaded = Layerwise(teacher, f"{fingerprint}-layerwise", model, tokens, checkpoint, where, hub)
    for n in (None, *range(loaded.n_layers)):
        loaded._names(n)
    return loaded


def _fetch(patterns: Iterable[str], hub: dict) -> Path:
    """The folder in the hub's cache that has these files of a model, fetched if need be."""
    try:
        return Path(snapshot_download(allow_patterns=sorted(patterns), **hub))
    except Exception as error:  # the client has its own kinds for each thing that goes wrong
        raise ValueError(
            f"teacher={hub['repo_id']!r}: its files could not be fetched: {sources.reason(error)}"
        ) from error


def _on_meta(folder: Path, config: dict, **options) -> PreTrainedModel:
    """The model with shapes and without weights."""
    deepseek = config["model_type"] == "deepseek"
    built = _llama_of(config) if deepseek else AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built, experts_implementation=LOOP, **options)
        if deepseek:
            _put_experts(model, config)
    return model.to(options["dtype"]).eval().requires_grad_(False)


def _deepseek_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json as it is, and BOS where tokenizer_config.json asks for it.

    Its `LlamaTokenizerFast` loses the spaces in transformers 5 (issue 45488), whose other tokenizers leave out the BOS
    that the model was trained with.
    """
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    extra = {"add_bos_token": True} if told.get("add_bos_token") else {}
    return PreTrainedTokenizerFast.from_pretrained(folder, **extra)


def _llama_of(config: dict) -> LlamaConfig:
    """DeepSeek-MoE-16B's attention, norms and dense layer are Llama's; its own class is code on the hub."""
    known = {"scoring_func": ("softmax",), "norm_topk_prob": (False, None), "topk_method": ("greedy", None)}
    for option, allowed in known.items():
        if (value := config.get(option, allowed[0])) not in allowed:
            raise ValueError(f"config.json has {option}={value!r} for model_type='deepseek'; allowed: {allowed[0]!r}")
    if not config.get("n_shared_experts"):
        raise ValueError("config.json has n_shared_experts=None for model_type='deepseek'; allowed: 1 or more")
    ours = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "auto_map")}
    return LlamaConfig(**ours)


def _put_experts(model: PreTrainedModel, config: dict) -> None:
    """DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066, eqs. 9–11), which transformers has as a part of DeepSeek-V2.

    Softmax over all experts, the largest top_k, not divided by their sum, plus experts that every token goes through.
    """
    same = "hidden_size hidden_act moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok"
    moe = DeepseekV2Config(**{name: config[name] for name in [*same.split(), "num_attention_heads"]})
    moe._experts_implementation = LOOP
    first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    for n, block in enumerate(model.base_model.layers):
        if n >= first and n % every == 0:
            block.mlp = DeepseekV2Moe(moe)


def _renamed(name: str) -> str:
    """A tensor's name in a block as transformers 5 has it."""
    return name.replace("block_sparse_moe.", "mlp.")
