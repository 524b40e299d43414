"""Router rows and expert matrices out of sharded safetensors, by byte ranges, without building the model.

A checkpoint of 14 GB holds 0.8 GB of what an implicit SAE of three layers is made of. Only those bytes are read: from a
local folder, the hub's cache, or the hub by range requests. One reader serves all three (`safetensors` reads local
files): the length of a header (8 bytes), the header (JSON: dtype, shape and bytes of each tensor), and the tensors.

Every expert matrix comes as [d_model, d_ff], one column a neuron: W_down as it maps hidden to residual, W_up and W_gate
transposed. `principal` finds the leading directions of these columns in the residual stream.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from helpers import settings
from helpers.dictionary import SparseCodes
from helpers.models import sources
from helpers.models.architecture import unwrapped
from helpers.models.directions import leading
from helpers.models.sources import Opener
from helpers.settings import allowed, one_of

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BATCH_BYTES = 2**27
"""Experts are handled in batches of this size as float32 (16 experts of OLMoE-1B-7B), or one at a time."""
LONGEST = 2**25
"""Bytes of a header or an index: some 200,000 tensors."""
READERS = 8  # ranges asked for at once: a request to the hub mostly waits


class Layout(NamedTuple):
    """Names after `layers.N.` and what their axes mean: e(xpert), d(_model), f (d_ff, or twice that where joined)."""

    name: str
    router: str
    tensors: dict[str, tuple[str, str, str]]  # which: pattern, axes, part of the f axis


_MOE = r"(?:mlp|block_sparse_moe)\."
_JOINED = _MOE + r"experts\.gate_up_proj"
LAYOUTS = (
    Layout("one tensor an expert (OLMoE, DeepSeek, Mixtral, Qwen)", _MOE + r"gate\.weight", {
        "w_down": (_MOE + r"experts\.(\d+)\.(?:down_proj|w2)\.weight", "df", "all"),
        "w_up": (_MOE + r"experts\.(\d+)\.(?:up_proj|w3)\.weight", "fd", "all"),
        "w_gate": (_MOE + r"experts\.(\d+)\.(?:gate_proj|w1)\.weight", "fd", "all"),
    }),
    Layout("fused (transformers 5)", r"(?:mlp\.gate|block_sparse_moe\.router)\.weight", {
        "w_down": (_MOE + r"experts\.down_proj", "edf", "all"),
        "w_up": (_JOINED, "efd", "second half"),
        "w_gate": (_JOINED, "efd", "first half"),
    }),
    Layout("fused (Granite)", r"block_sparse_moe\.router\.layer\.weight", {
        "w_down": (r"block_sparse_moe\.output_linear\.weight", "edf", "all"),
        "w_up": (r"block_sparse_moe\.input_linear\.weight", "efd", "second half"),
        "w_gate": (r"block_sparse_moe\.input_linear\.weight", "efd", "first half"),
    }),
    Layout("fused (gpt-oss)", r"mlp\.router\.weight", {
        "w_down": (_MOE + r"experts\.down_proj", "efd", "all"),
        "w_up": (_JOINED, "edf", "odd columns"),
        "w_gate": (_JOINED, "edf", "even columns"),
    }),
)  # fmt: skip
WHICH = tuple(LAYOUTS[0].tensors)
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda m: m,
    "first half": lambda m: m[:, : m.shape[1] // 2],
    "second half": lambda m: m[:, m.shape[1] // 2 :],
    "even columns": lambda m: m[:, ::2],
    "odd columns": lambda m: m[:, 1::2],
}
QUANTISED = {  # the end of an expert tensor's name tells
    "MXFP4": r"_proj_(?:blocks|scales)",
    "FP8 with block scales": r"weight_scale(?:_inv)?",
    "GPTQ or AWQ": r"(?:qweight|qzeros|g_idx)",
    "compressed-tensors": r"weight_packed",
    "bitsandbytes": r"(?:SCB|weight\.(?:absmax|quant_map|quant_state\S*))",
}
# Of these the weights add up to 1, whatever the configuration says; of PLAIN they do if it says so.
_GRANITE, _DEEPSEEK = ("granitemoe", "granitemoeshared", "granitemoehybrid"), ("deepseek", "deepseek_v2", "deepseek_v3")
RENORMALISED = (*_GRANITE, "mixtral", "gpt_oss", "minimax", "minimax_m2", "qwen3_5_moe_text")
PLAIN = (*_DEEPSEEK, "olmoe", "flex_olmo", "dots1", "glm4_moe", "qwen2_moe", "qwen3_moe", "qwen3_next")


class Entry(NamedTuple):
    """One tensor of a safetensors file."""

    file: str
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, file: str, first: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
        """From its entry in a header; `ValueError` where the bytes do not hold the shape."""
        start, end = data_offsets
        good = len(shape) <= 8 and all(type(number) is int and number >= 0 for number in (*shape, start, end))
        size = math.prod(shape) * DTYPES[dtype].itemsize if good and dtype in DTYPES else end - start
        if not good or not 0 <= end - start == size:
            raise ValueError(f"{dtype} of shape={shape!s:.80} in bytes {start} to {end}; allowed: {size} bytes")
        return cls(file, first + start, first + end, dtype, tuple(shape))

    def read(self, open_file: Opener) -> Tensor:
        """The tensor as a view of the bytes that are read, in the stored precision."""
        data = bytearray(self.end - self.start)
        with open_file(self.file) as opened:
            opened.seek(self.start)
            if (got := opened.readinto(data)) != len(data):
                raise ValueError(f"{self.file} is truncated: {got:,} of {len(data):,} bytes at byte {self.start:,}")
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape)


class Slab(NamedTuple):
    """One expert's matrix as it is stored: [d_model, f] once transposed if need be, and a part of f."""

    stored: Entry
    transposed: bool
    part: str

    @property
    def d_ff(self) -> int:
        return self.stored.shape[not self.transposed] // (1 if self.part == "all" else 2)

    def read(self, open_file: Opener) -> Float[Tensor, "d_model d_ff"]:
        """The matrix in the stored precision."""
        matrix = self.stored.read(open_file)
        return PARTS[self.part](matrix.T if self.transposed else matrix)


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One layer's router, and where its experts' matrices are. Shared experts are no part of it (see `notes`).

    An expert's score is `scoring` ("softmax" over all experts or "sigmoid") of router·x + bias. The `top_k` largest
    score + correction are chosen (if `n_group` > 1, within the best `topk_group` groups of experts); their weights are
    the scores, divided by their sum if `norm_topk_prob`, times `scale`.
    """

    layer: int
    router: Float[Tensor, "experts d_model"]
    bias: Float[Tensor, " experts"] | None
    """Added to the logits (gpt-oss)."""
    correction: Float[Tensor, " experts"] | None
    """Added to the scores when choosing, not when weighing (loss-free balancing in DeepSeek-V3)."""
    top_k: int
    scoring: str
    norm_topk_prob: bool
    scale: float
    n_group: int
    topk_group: int
    layout: str
    notes: tuple[str, ...]
    """What the checkpoint has and this leaves out, and what was assumed."""
    d_ff: int
    plan: Callable[[str], list[Slab]] = field(repr=False)
    """Where each expert's matrix lies, by `which`."""
    _open: Opener = field(repr=False)

    @property
    def n_experts(self) -> int:
        return self.router.shape[0]

    @property
    def d_model(self) -> int:
        return self.router.shape[1]

    def route(self, x: Float[Tensor, "batch d_model"]) -> SparseCodes:
        """The experts chosen for each row and their weights: what the model's own router gives."""
        logits = x.float() @ self.router.to(x.device).T
        if self.bias is not None:
            logits = logits + self.bias.to(x.device)
        scores = logits.softmax(1) if self.scoring == "softmax" else logits.sigmoid()
        choice = scores if self.correction is None else scores + self.correction.to(x.device)
        if self.n_group > 1:
            groups = choice.view(len(x), self.n_group, -1)
            best = groups.amax(2) if self.correction is None else groups.topk(2, dim=2).values.sum(2)
            kept = torch.zeros_like(best).scatter(1, best.topk(self.topk_group, dim=1).indices, 1).bool()
            choice = groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
        indices = choice.topk(self.top_k, dim=1).indices
        values = scores.gather(1, indices)
        if self.norm_topk_prob:
            values = values / values.sum(1, keepdim=True)
        return SparseCodes(indices, values * self.scale)

    def weights(self, which: str = "w_down", experts: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Batches of experts (all, or those numbered) as float32 [batch, d_model, d_ff], in order, read when asked for.

        One batch is in memory at a time (see `BATCH_BYTES`). Raises `ValueError` at once for a `which` or an expert
        that is not there, or a shard that is missing, truncated or quantised.
        """
        experts = range(self.n_experts) if experts is None else experts
        outside = [e for e in experts if not 0 <= e < self.n_experts]
        allowed(not outside, f"experts={outside} are not in layer {self.layer}", f"0 to {self.n_experts - 1}")
        slabs = self.plan(which)
        return self._batches([slabs[e] for e in experts])

    def _batches(self, slabs: list[Slab]) -> Iterator[Float[Tensor, "batch d_model d_ff"]]:
        size = max(1, BATCH_BYTES // (4 * self.d_model * self.d_ff))
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(0, len(slabs), size):
                batch = slabs[first : first + size]
                stacked = torch.empty(len(batch), self.d_model, self.d_ff)
                # Threads only read bytes. OpenMP gives each thread that computes a team of its own; with more of those
                # than cores, all products take twice as long from then on, here too.
                for expert, matrix in zip(stacked, pool.map(lambda slab: slab.read(self._open), batch), strict=True):
                    expert.copy_(matrix)
                yield stacked


def read(source: str | Path, layers: Sequence[int] | None = None, *, revision: str | None = None) -> list[MoELayer]:
    """The MoE layers numbered `layers` (default: all that have experts) of a local folder or a hub id.

    Reads config.json, the index, the headers of the shards that hold these layers, and the router rows. Everything is
    checked here, before the experts are read: `ValueError` says what is wrong with a dense checkpoint or layer, a layer
    that is not there, a missing or truncated shard, a tensor of another shape or of a quantised format.
    """
    checkpoint = Checkpoint(str(source), revision)
    with_experts, dense = checkpoint.layers_with_experts, checkpoint.dense_layers
    if not with_experts:
        raise ValueError(f"no experts found in {source}; layers with MLPs: {_ranges(dense) or 'none'}")
    wanted = with_experts if layers is None else list(layers)
    for layer in wanted:
        given = f"layers={wanted}: layer {layer} of {source} {'has a dense MLP' if layer in dense else 'is not there'}"
        allowed(layer in with_experts, given, _ranges(with_experts))
    return [checkpoint.layer(layer) for layer in wanted]


class Principal(NamedTuple):
    """Leading directions of every expert; see `principal`."""

    directions: Float[Tensor, "experts rank d_model"]
    shares: Float[Tensor, "experts rank"]
    residuals: Float[Tensor, "experts rank"]


def principal(layer: MoELayer, rank: int = 1, which: str = "w_down", *, device: str = "auto") -> Principal:
    """The `rank` leading directions of every expert's columns: the top left singular vectors of W [d_model, d_ff].

    W is not centred. Directions are unit vectors, float32 on the CPU, the entry of largest magnitude positive; `shares`
    are σ²/Σσ²; `residuals` are ‖WWᵀu − σ²u‖/σ₁², at most `TOLERANCE`. So the angle by which a direction is off is at
    most about TOLERANCE·σ₁²/(distance of its σ² to the nearest other one), and its share is off by less than TOLERANCE.
    Where σ = 0 the share is 0 and the direction means nothing. Raises `ValueError` for a rank beyond the matrix and for
    weights that are not finite.
    """
    largest = min(layer.d_model, layer.d_ff)
    allowed(1 <= rank <= largest, f"rank={rank}", f"1 to {largest}, the smaller side of layer {layer.layer}'s matrices")
    where, parts, done = settings.device(device), [], 0
    for w in layer.weights(which):
        w = w.to(where)
        total = torch.linalg.vector_norm(w, dim=(1, 2), dtype=torch.float64).square()
        if not total.isfinite().all():
            expert = done + int((~total.isfinite()).nonzero()[0])
            raise ValueError(f"{which} of layer {layer.layer}, expert {expert} has entries that are not finite")
        directions, squares, residuals = leading(w, rank)
        sign = directions.gather(2, directions.abs().argmax(2, keepdim=True)).sign()
        shares = (squares / total.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).float()
        parts.append((directions * sign, shares, residuals))
        done += len(w)
    return Principal(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


class Checkpoint:
    """Names, places and shapes of a checkpoint's tensors; headers are read when a tensor of their file is asked for.

    Names are those of the model, without what `torch.compile`, DDP or FSDP put into them.
    """

    def __init__(self, source: str, revision: str | None):
        self.source, self.open = source, sources.opener(source, revision)
        self._header = cache(self._header)
        config, index = self._json("config.json"), self._json(INDEX)
        allowed(config is not None, f"source={source!r} has no config.json", "a model's folder or hub id")
        self.config = config | config.get("text_config", {})
        try:
            files = dict.fromkeys(self._header(SINGLE), SINGLE) if index is None else index.get("weight_map", {})
            files = unwrapped(files, f"{INDEX} of {source}")
        except FileNotFoundError as error:
            raise ValueError(f"source={source!r} has neither {INDEX} nor {SINGLE}: {error}") from error
        self.file_of: dict[str, str] = files
        self.names: dict[int, dict[str, str]] = defaultdict(dict)
        count = self.config.get("num_hidden_layers", math.inf)  # after these come modules that predict several tokens
        for name in self.file_of:
            if (found := re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", name)) and int(found[1]) < count:
                self.names[int(found[1])][found[2]] = name

    def _json(self, name: str) -> dict | None:
        """What a file holds; None where it is not there."""
        try:
            with self.open(name) as file:
                found = json.loads(file.read(LONGEST))
            allowed(isinstance(found, dict) and isinstance(found.get("weight_map", {}), dict), "a list", "names")
            return found
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} of {self.source} is damaged: {error}") from error
        except FileNotFoundError:
            return None

    def _header(self, file: str) -> dict[str, Entry]:
        """What a safetensors file holds; its length must be what its header says."""
        with self.open(file) as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"{file} of {self.source} is truncated or no safetensors file ({size:,} bytes)")
            given = f"the header of {file} of {self.source} is {length:,} bytes long"
            allowed(length <= LONGEST, given, f"at most {LONGEST:,}")
            try:
                header = json.loads(opened.read(length))
                header.pop("__metadata__", None)
                named = unwrapped(header, "it")
                entries = {name: Entry.of(file, 8 + length, **tensor) for name, tensor in named.items()}
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
                raise ValueError(f"the header of {file} of {self.source} is damaged: {error}") from error
        if size != (expected := max((each.end for each in entries.values()), default=8 + length)):
            raise ValueError(f"{file} of {self.source} is truncated or damaged: {size:,} bytes, not {expected:,}")
        return entries

    def entry(self, name: str) -> Entry:
        file = self.file_of[name]
        try:
            entry = self._header(file).get(name)
        except FileNotFoundError as error:
            raise ValueError(f"{self.source}: {file}, which holds {name}, is missing ({error})") from error
        if entry is None:
            raise ValueError(f"{self.source}: {INDEX} has {name} in {file}, which does not hold it")
        allowed(entry.dtype in DTYPES, f"{self.source}: {name} is stored as {entry.dtype}", ", ".join(DTYPES))
        return entry

    def tensor(self, name: str | None) -> Tensor | None:
        return None if name is None else self.entry(name).read(self.open).float()

    @cached_property
    def layers_with_experts(self) -> list[int]:
        return sorted(n for n, names in self.names.items() if any(map(_is_expert, names)))

    @cached_property
    def dense_layers(self) -> list[int]:
        has_mlp = re.compile(r"mlp|feed_forward|ffn|fc1").search
        return sorted(n for n in set(self.names) - set(self.layers_with_experts) if any(map(has_mlp, self.names[n])))

    def layer(self, n: int) -> MoELayer:
        names, config = self.names[n], self.config
        for kind, pattern in QUANTISED.items():
            if found := [name for name in names if _is_expert(name) and re.search(pattern + "$", name)]:
                raise ValueError(
                    f"{self.source}: layer {n}'s experts are quantised ({kind}: {names[min(found)]}), which is not "
                    f"supported; allowed: {', '.join(DTYPES)}, as in a copy saved with dtype=torch.bfloat16"
                )
        layout, router_name = self._layout(n)
        known, model_type, top_k = RENORMALISED + PLAIN, config.get("model_type"), config.get("num_experts_per_tok")
        given = f"{self.source} has model_type={model_type!r}"
        allowed(model_type in known, f"{given}, whose routing was not compared with its class", ", ".join(known))
        if model_type == "deepseek_v2":  # the authors' own class divides by the sum, that of transformers does not
            allowed(not config.get("norm_topk_prob"), f"{given} and norm_topk_prob", "false or none")
        router = self.tensor(names[router_name])
        correction = self.tensor(next((names[s] for s in names if s.endswith("e_score_correction_bias")), None))
        plan = partial(self.slabs, n, layout, tuple(router.shape))
        good = isinstance(top_k, int) and 1 <= top_k <= len(router)
        allowed(good, f"config.json of {self.source}: num_experts_per_tok={top_k}", f"1 to {len(router)}")
        grouped = config.get("topk_method", "greedy" if correction is None else "noaux_tc") != "greedy"
        return MoELayer(
            layer=n,
            router=router,
            bias=self.tensor(names.get(router_name.removesuffix("weight") + "bias")),
            correction=correction,
            top_k=top_k,
            scoring=config.get("scoring_func") or ("softmax" if correction is None else "sigmoid"),
            norm_topk_prob=model_type in RENORMALISED or bool(config.get("norm_topk_prob", False)),
            scale=float(config.get("routed_scaling_factor") or 1),
            n_group=(grouped and config.get("n_group")) or 1,
            topk_group=(grouped and config.get("topk_group")) or 1,
            layout=layout.name,
            notes=tuple(self._notes(names)),
            d_ff=plan("w_down")[0].d_ff,
            plan=plan,
            _open=self.open,
        )

    def _layout(self, n: int) -> tuple[Layout, str]:
        """The first layout that the layer's names fit, and the router's name."""
        for layout in LAYOUTS:
            router = [name for name in self.names[n] if re.fullmatch(layout.router, name)]
            if router and any(re.fullmatch(layout.tensors["w_down"][0], name) for name in self.names[n]):
                return layout, router[0]
        known = "; ".join(layout.name for layout in LAYOUTS)
        found = ", ".join(sorted({re.sub(r"\d+", "N", name) for name in self.names[n] if "norm" not in name}))
        raise ValueError(f"{self.source}: layer {n} has experts in no known layout ({known}); it has {found}")

    def slabs(self, n: int, layout: Layout, router_shape: tuple[int, ...], which: str) -> list[Slab]:
        """Where each expert's matrix lies, checked: one for each router row, [d_model, d_ff] with one d_ff."""
        one_of("which", which, WHICH)
        (n_experts, d_model), (pattern, axes, part) = router_shape, layout.tensors[which]
        found = {m: name for suffix, name in self.names[n].items() if (m := re.fullmatch(pattern, suffix))}
        slabs: dict[int, Slab] = {}
        for match, name in found.items():
            entry = self.entry(name)
            if len(entry.shape) != len(axes) or entry.shape[axes.index("d")] != d_model:
                raise ValueError(f"{name} of {self.source} is {list(entry.shape)}; expected axes {axes}, d={d_model}")
            *fused, rows, columns = entry.shape
            size = rows * columns * DTYPES[entry.dtype].itemsize
            for i in range(fused[0] if fused else 1):
                start = entry.start + i * size
                stored = entry._replace(start=start, end=start + size, shape=(rows, columns))
                slabs[i if fused else int(match[1])] = Slab(stored, axes.endswith("fd"), part)
        if lost := sorted(set(range(n_experts)) ^ set(slabs)):
            raise ValueError(f"{self.source}: layer {n} has {n_experts} router rows, but {which} differs for {lost}")
        if len(widths := {slab.d_ff for slab in slabs.values()}) > 1:
            raise ValueError(f"{self.source}: layer {n}: {which} has d_ff of {', '.join(map(str, sorted(widths)))}")
        return [slabs[e] for e in range(n_experts)]

    def _notes(self, names: dict[str, str]) -> Iterator[str]:
        if self.dense_layers:
            yield f"layers {_ranges(self.dense_layers)} have a dense MLP and are skipped"
        if shared := sorted({m[0] for name in names if (m := re.search(r"(?:mlp|moe)\.shared_experts?(?=\.)", name))}):
            yield f"shared experts ({', '.join(shared)}) are not read"
        if biases := sorted(name for name in names if _is_expert(name) and name.endswith("bias")):
            yield f"biases of the experts ({', '.join(biases)}) are not read"


def _is_expert(name: str) -> bool:
    return bool(re.search(r"(?:^|\.)experts\.|block_sparse_moe\.(?:in|out)put_linear", name))


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as '0 to 2, 5'."""
    places = enumerate(sorted(numbers))
    runs = [[n for _, n in run] for _, run in itertools.groupby(places, lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
