"""A forward pass that holds one block: all text goes through a block before the next block's weights are read.

In bfloat16 OLMoE-1B-7B takes 14 GB and DeepSeek-MoE-16B 33 GB, one of their blocks 0.8 and 1.2 GB; in float32, which a
CPU wants, everything takes twice that. `layerwise.load(name)` gives a teacher whose modules are
built without memory; a block is filled from the safetensors (`checkpoints`) when the text has come to it and emptied
afterwards. Between blocks the residual streams lie in a file, so that a harvest that was killed goes on at the
block where it stopped, and a harvest at a later layer goes on from the one before. What is computed is the model's own
code; `activations.harvest` is used as with any teacher.

On the device are one block, or the embedding, and one batch of text; in host memory, besides what is on the device if
that is the CPU, about four times `checkpoints.BATCH_BYTES` while experts are read, or the embedding in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from transformers.utils import ModelOutput

from helpers import kept, settings
from helpers.models import checkpoints, sources
from helpers.models.architecture import OF_MLP, check_spare
from helpers.models.checkpoints import Checkpoint
from helpers.models.teachers import DTYPES, EMBEDDED, SAFE, AtSites, Ids, Teacher, TokenLosses, check_sites
from helpers.settings import allowed, one_of

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
        self, layer: int, input_ids: Ids, attention_mask: Ids | None = None, sites: Iterable[str] = OF_MLP
    ) -> AtSites:
        """As `Teacher.run_to`: all blocks up to `layer` are read for this one batch (a harvest reads each once)."""
        sites = check_sites(sites)
        self.check(layer)
        self.check_ids(input_ids)
        with self._filled(None) as embedding:
            hidden = embedding(input_ids.to(self.where))
        for n in range(layer):
            with self._filled(n):
                hidden = self._after(n, hidden, attention_mask)
        with self._filled(layer):
            return self._sites({layer: sites}, hidden, attention_mask)[layer]

    @torch.inference_mode()
    def through(
        self, wanted: Mapping[int, Sequence[str]], blocks: Sequence[Sequence[Int[Tensor, "_ _"]]], *, scratch: Path
    ) -> Iterator[tuple[int, int, list[AtSites]]]:
        """As `Teacher.through`: every block of the model is read once, for all text.

        The residual streams before the last layer stay in a folder of `scratch` (d_model numbers in the model's dtype
        for each token and each pad): a later call with the same text goes on from there. Raises `ValueError` before a
        block is read for a tensor or shard that is missing or of another shape, and for a disk that is too full.
        """
        self.check(max(wanted))
        for ids in itertools.chain.from_iterable(blocks):
            self.check_ids(ids)
        what = [self.fingerprint, self.dtype, self.attn_implementation, self.where.type]
        key = kept.digest(json.dumps(kept.described(what)), kept.code_of(Layerwise))
        states = _States(scratch / f"between-blocks-{key}", self.d_model, self.dtype)
        with FileLock(states.folder / "lock"):
            for left in states.folder.glob(".*.part"):  # of a killed process: the lock is ours
                left.unlink()
            for layer, sites in sorted(wanted.items()):
                self._advance(layer, blocks, states)
                with self._filled(layer):
                    for number, batches in enumerate(blocks):
                        streams = (hidden.to(self.where) for hidden in states.read(layer, batches))
                        found = [self._sites({layer: sites}, hidden, None)[layer] for hidden in streams]
                        yield layer, number, found

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
                sizes = f"(experts, d_model, d_ff) = {found}, not {expected} as config.json says"
                raise ValueError(f"{self.name}: {which} of layer {n} has {sizes}")

    def _module(self, n: int | None) -> nn.Module:
        """Block `n`, or the embedding."""
        return self.model.get_input_embeddings() if n is None else self.blocks[n]

    def _names(self, n: int | None) -> dict[str, str]:
        """What the checkpoint calls each parameter of block `n` (None: the embedding) that is no routed expert's."""
        if n is None:
            there = {m[1]: name for name in self.checkpoint.file_of if (m := re.search(r"embed_tokens\.(.+)$", name))}
        else:
            own = self.checkpoint.names[n].items()
            there = {name.replace("block_sparse_moe.", "mlp."): whole for name, whole in own}  # as in transformers 5
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

    def _after(self, n: int, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after block `n`."""
        return self._sites({n: ("resid_post",)}, hidden, attention_mask)[n]["resid_post"]

    def _forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        mask = None if attention_mask is None else attention_mask.to(self.where)
        return self.model.base_model(inputs_embeds=hidden, attention_mask=mask, use_cache=False)

    def _advance(self, layer: int, blocks: Sequence[Sequence[Tensor]], states: _States) -> None:
        """Take all text through the blocks before `layer`, from the latest of them that it has been through."""
        at = [max((n for n in states.kept(batches) if n <= layer), default=None) for batches in blocks]
        states.check([batches for batches, n in zip(blocks, at, strict=True) if n is None])
        total = sum(layer - (n or 0) for n in at)
        with settings.progress(total=total, desc=f"blocks before {layer}", unit="block") as bar:
            if None in at:
                with self._filled(None) as embedding:
                    for batches, n in zip(blocks, at, strict=True):
                        if n is None:
                            states.write(0, batches, [embedding(ids.to(self.where)) for ids in batches])
            for n in range(min((n or 0 for n in at), default=layer), layer):
                with self._filled(n):
                    for batches, start in zip(blocks, at, strict=True):
                        if (start or 0) <= n:
                            outputs = [self._after(n, hidden.to(self.where)) for hidden in states.read(n, batches)]
                            states.write(n + 1, batches, outputs)
                            states.drop(n, batches)
                            bar.update()


class _States:
    """Residual streams between blocks, a file for each block of text, whole or not there."""

    def __init__(self, folder: Path, d_model: int, dtype: torch.dtype):
        self.folder, self.d_model, self.dtype = folder, d_model, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def check(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        """`ValueError` where the disk has no room for these blocks of text."""
        rows = sum(ids.numel() for batches in blocks for ids in batches)
        sources.check_room(self.folder, rows * self.d_model * self.dtype.itemsize, "text between blocks")

    def kept(self, batches: Sequence[Tensor]) -> list[int]:
        """The blocks of the model before which this text is kept."""
        return [int(path.name.rpartition("-")[2]) for path in self.folder.glob(f"{self._name(batches)}-before-*[0-9]")]

    def drop(self, n: int, batches: Sequence[Tensor]) -> None:
        self._file(n, batches).unlink()

    def read(self, n: int, batches: Sequence[Tensor]) -> Iterator[Float[Tensor, "batch seq d_model"]]:
        """What enters block `n`, batch after batch. Raises `ValueError` naming a file that is damaged."""
        path = self._file(n, batches)
        ends = np.cumsum([ids.numel() * self.d_model * self.dtype.itemsize for ids in batches])
        *parts, check = np.split(np.fromfile(path, np.uint8), ends)
        if kept.digest(*parts).encode() != check.tobytes():
            raise ValueError(f"the kept file {path} is damaged: its checksum is wrong; delete it to make it anew")
        for ids, part in zip(batches, parts, strict=True):
            yield torch.from_numpy(part).view(self.dtype).view(*ids.shape, self.d_model)

    def write(self, n: int, batches: Sequence[Tensor], streams: Iterable[Float[Tensor, "_ _ d_model"]]) -> None:
        parts = [hidden.cpu().contiguous().view(torch.uint8).numpy() for hidden in streams]
        with settings.written(self._file(n, batches)) as aside, aside.open("wb") as file:
            for part in parts:
                file.write(part.data)
            file.write(kept.digest(*parts).encode())

    def _file(self, n: int, batches: Sequence[Tensor]) -> Path:
        return self.folder / f"{self._name(batches)}-before-{n}"

    def _name(self, batches: Sequence[Tensor]) -> str:
        return kept.digest(*(part for ids in batches for part in (str(list(ids.shape)), ids)))


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
    folder, hub = Path(source), {} if Path(source).is_dir() else {"repo_id": source} | hub
    if hub:
        folder = _fetch(SMALL, hub)
        if not (folder / checkpoints.INDEX).exists():
            _fetch([checkpoints.SINGLE], hub)
    checkpoint = Checkpoint(str(folder), None)
    kind = checkpoint.config.get("model_type")
    allowed(kind in TYPES, f"teacher={teacher!r} has model_type={kind!r}, layerwise=True", ", ".join(TYPES))
    quantised = checkpoint.config.get("quantization_config") or {}
    given = f"teacher={teacher!r} is quantised ({quantised.get('quant_method')}), layerwise=True"
    allowed(not quantised, given, ", ".join(checkpoints.DTYPES))
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    try:
        model = _on_meta(folder, checkpoint.config, **options)
        tokens = _deepseek_tokenizer(folder) if kind == "deepseek" else AutoTokenizer.from_pretrained(folder, **SAFE)
    except Exception as error:  # transformers and tokenizers raise their own kinds
        why = f"{type(error).__name__}: {sources.reason(error)}"
        raise ValueError(f"teacher={teacher!r}, layerwise=True: {why}") from error
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=base.config).to(where)
    loaded = Layerwise(teacher, f"{fingerprint}-layerwise", model, tokens, checkpoint, where, hub)
    of_blocks = {name for n in range(loaded.n_layers) for name in checkpoint.names[n].values()}
    for n in (None, *range(loaded.n_layers)):
        loaded._names(n)
    own = {name.removeprefix(f"{model.base_model_prefix}.") for name in model.state_dict()} | set(model.state_dict())
    check_spare(model, set(checkpoint.file_of) - of_blocks - own, f"teacher={teacher!r}, layerwise=True")
    return loaded


def _fetch(patterns: Iterable[str], hub: dict) -> Path:
    """The folder in the hub's cache that has these files of a model, fetched if need be."""
    try:
        return Path(snapshot_download(allow_patterns=sorted(patterns), **hub))
    except Exception as error:  # the client has its own kinds for each thing that goes wrong
        given = f"teacher={hub['repo_id']!r}: its files could not be fetched"
        raise ValueError(f"{given}: {sources.reason(error)}") from error


def _on_meta(folder: Path, config: dict, **options) -> PreTrainedModel:
    """The model with shapes and without weights."""
    deepseek = config["model_type"] == "deepseek"
    built = _llama_of(config) if deepseek else AutoConfig.from_pretrained(folder, **SAFE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built, experts_implementation=LOOP, **options)
        if deepseek:
            _put_experts(model, config)
    return model.to(options["dtype"]).eval().requires_grad_(False)


def _deepseek_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json as it is, and BOS where tokenizer_config.json asks for it.

    Its `LlamaTokenizerFast` loses the spaces in transformers 5 (issue 45488), whose other tokenizers leave out its BOS.
    """
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    extra = {"add_bos_token": True} if told.get("add_bos_token") else {}
    return PreTrainedTokenizerFast.from_pretrained(folder, **extra)


def _llama_of(config: dict) -> LlamaConfig:
    """DeepSeek-MoE-16B's attention, norms and dense layer are Llama's; its own class is code on the hub."""
    known = {"scoring_func": ("softmax",), "norm_topk_prob": (False, None), "topk_method": ("greedy", None)}
    for option, good in known.items():
        value = config.get(option, good[0])
        allowed(value in good, f"config.json has {option}={value!r} for model_type='deepseek'", repr(good[0]))
    shared = config.get("n_shared_experts")
    allowed(bool(shared), f"config.json has n_shared_experts={shared} for model_type='deepseek'", "1 or more")
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
