"""Language models as teachers: find their MLPs, stop at a layer, put something in an activation's place.

Layers are numbered from 0. A layer has four sites, in the order in which a forward pass comes to them:

    resid_pre   the residual stream that enters the block
    mlp_in      what the MLP module is given (after the norm before it)
    mlp_out     what the MLP module returns (in Gemma 3, before the norm after it)
    resid_post  the residual stream that leaves the block

Of several MLPs side by side, such as routed experts and a shared MLP in Granite, mlp_out is the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from helpers import settings
from helpers.kept import keep
from helpers.models import sources
from helpers.models.architecture import OF_MLP, PREFIXES, SITES, Sum, check_loaded, find_blocks, mlps_of, watched
from helpers.models.sources import ALLOWED, EMBEDDED, SECOND
from helpers.settings import allowed, one_of

DTYPES = ("float32", "bfloat16", "float16", "float64")
LOGIT_ROWS = 256
"""Tokens whose logits are held at once: at Gemma's 262,144 words, 256 rows are 268 MB."""
Ids = Int[Tensor, "batch seq"]
"""Token ids of a batch of texts, or its attention mask: 1 for tokens, 0 for padding."""
AtSites = dict[str, Float[Tensor, "batch seq d_model"]]
"""Activations of a batch by site."""


@dataclass(frozen=True)
class Splice:
    """`function` takes the activations of `site` at `layer` and returns what the model goes on with.

    It is given one row per token that a harvest keeps (no padding, no BOS) and must return the same shape. At the site
    `"mlp"` it stands for the MLP itself: it is given what enters the MLP, and returns what leaves it.
    """

    layer: int
    site: str
    function: Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]

    @classmethod
    def zero(cls, layer: int, site: str) -> Splice:
        """Zero ablation."""
        return cls(layer, site, torch.zeros_like)

    @classmethod
    def mean(cls, layer: int, site: str, mean: Float[Tensor, " d_model"]) -> Splice:
        """Mean ablation: every row becomes `mean`."""
        return cls(layer, site, lambda rows: mean.to(rows).expand_as(rows))


@dataclass(frozen=True)
class TokenLosses:
    """Next-token cross-entropy in nats; `mask` is True where the predicted token is real."""

    nats: Float[Tensor, "batch targets"]
    mask: Bool[Tensor, "batch targets"]

    def per_text(self) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Sum in nats and number of predicted tokens of each text, for a bootstrap over articles."""
        return (self.nats.cpu().double() * self.mask.cpu()).sum(1), self.mask.sum(1).cpu()


class _Stop(Exception):
    """Ends a forward pass from within a hook."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A causal language model, frozen, and what the chapters ask of it."""

    name: str
    fingerprint: str
    """What determines the weights: a commit of the hub or a content hash. Part of every cache key."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __repr__(self) -> str:
        return f"Teacher({self.name!r}, {self.n_layers} layers, d_model={self.d_model}, {self.dtype}, {self.device})"

    @property
    def _named(self) -> str:
        return f"teacher={self.name!r} ({type(self.model).__name__})"

    @property
    def asked(self) -> str:
        """What a key says of it."""
        return self.fingerprint

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def attn_implementation(self) -> str:
        return self.model.config._attn_implementation

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, found by structure."""
        return find_blocks(self.model, self._named)

    def block(self, layer: int) -> nn.Module:
        """The block at `layer`; `ValueError` when there is none."""
        good = isinstance(layer, int) and 0 <= layer < self.n_layers
        allowed(good, f"layer={layer!r} is not in teacher {self.name!r}", f"0 to {self.n_layers - 1}")
        return self.blocks[layer]

    def mlp(self, layer: int) -> nn.Module:
        """The MLP module at `layer`, `Sum` where there are several; `ValueError` when there is no such layer."""
        found = list(mlps_of(self.block(layer)).values())
        return found[0] if len(found) == 1 else Sum(found)

    @property
    def n_positions(self) -> int | None:
        """The longest text, BOS included, that the model was made for; None where it does not say."""
        said = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return said if said and said > 0 else None

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS token before a text."""
        first = self.tokenizer("a").input_ids[:1]
        return self.tokenizer.bos_token_id is not None and first == [self.tokenizer.bos_token_id]

    def rows_kept(self, input_ids: Ids, attention_mask: Ids | None = None) -> Bool[Tensor, "batch seq"]:
        """True for the tokens that are text: neither padding nor the BOS token."""
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = given.to(input_ids.device).bool()
        return kept & (input_ids != self.tokenizer.bos_token_id) if self.adds_bos else kept

    @torch.inference_mode()
    def run_to(
        self, layer: int, input_ids: Ids, attention_mask: Ids | None = None, sites: Iterable[str] = OF_MLP
    ) -> AtSites:
        """Activations of `sites` at `layer`, padding included. The forward ends there: nothing later is computed."""
        return self._sites({layer: check_sites(sites)}, input_ids, attention_mask)[layer]

    @torch.inference_mode()
    def through(
        self, wanted: Mapping[int, Sequence[str]], blocks: Sequence[Sequence[Int[Tensor, "_ _"]]], *, scratch: Path
    ) -> Iterator[tuple[int, int, list[AtSites]]]:
        """Activations of the sites `wanted` of each layer, block of batches after block: layer, number of the block,
        and of each of its batches what `run_to` gives. One forward pass gives all; of one layer blocks come in order.

        Args:
            scratch: a folder that outlives the call.
        """
        for number, batches in enumerate(blocks):
            found = [self._sites(wanted, input_ids, None) for input_ids in batches]
            for layer in wanted:
                yield layer, number, [of_batch[layer] for of_batch in found]

    @torch.inference_mode()
    def loss(self, input_ids: Ids, attention_mask: Ids | None = None, splice: Splice | None = None) -> TokenLosses:
        """Next-token cross-entropy −log p(token t+1 | tokens ≤ t) in nats, with `splice` in force if given."""
        found = self.loss_with_gradient(input_ids, attention_mask, splice)
        self._check_finite(found.nats, "the loss" if splice is None else f"the loss with {splice.site} spliced")
        return found

    def loss_with_gradient(
        self, input_ids: Ids, attention_mask: Ids | None = None, splice: Splice | None = None
    ) -> TokenLosses:
        """As `loss`; where the splice's rows carry a gradient, so do the nats. The model's own weights stay frozen."""
        self.check_ids(input_ids)
        input_ids = input_ids.to(self.device)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        mask = (real[:, 1:] * real[:, :-1]).bool()
        logits = self._logits_by_rows if self._splits else self._logits_at_once
        hooks = contextlib.nullcontext()
        if splice is not None:
            hooks = self._splice(splice, self.rows_kept(input_ids, attention_mask))
        nats = torch.zeros(mask.shape, device=self.device)
        targets = input_ids[:, 1:][mask].split(LOGIT_ROWS)
        with hooks:
            chunks = zip(logits(input_ids, attention_mask, F.pad(mask, (0, 1))), targets, strict=True)
            parts = [F.cross_entropy(rows.float(), target, reduction="none") for rows, target in chunks]
        nats[mask] = torch.cat(parts)
        return TokenLosses(nats, mask)

    def randomised(self, seed: int) -> Teacher:
        """A twin with freshly initialised weights: the same architecture and tokenizer, nothing learned."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = type(self.model.config).from_dict(self.model.config.to_dict())
            model = type(self.model)._from_config(config, attn_implementation=self.attn_implementation)
        model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        name, fingerprint = f"{self.name} (random, seed {seed})", f"{self.fingerprint}-random{seed}"
        return replace(self, name=name, fingerprint=fingerprint, model=model)

    def _sites(
        self, wanted: Mapping[int, Sequence[str]], inputs: Tensor, attention_mask: Tensor | None
    ) -> dict[int, AtSites]:
        found: dict[int, AtSites] = {layer: {} for layer in wanted}
        last = max(wanted), max(wanted[max(wanted)], key=SITES.index)
        if not inputs.is_floating_point():  # of blocks that are in memory one at a time, residual streams
            self.check_ids(inputs)

        def take(layer: int, site: str, value: Tensor) -> None:
            real = value if attention_mask is None else value[attention_mask.to(value.device).bool()]
            self._check_finite(real, f"{site} of layer {layer}")
            found[layer][site] = value
            if (layer, site) == last:
                raise _Stop

        with contextlib.ExitStack() as hooks:
            for layer, sites in wanted.items():
                for site in sites:
                    hooks.enter_context(watched(self.block(layer), site, partial(take, layer, site)))
            hooks.enter_context(contextlib.suppress(_Stop))
            self._forward(inputs, attention_mask)
        return found

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """The whole of the model's own forward pass."""
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return self.model(input_ids=input_ids.to(self.device), attention_mask=mask, use_cache=False)

    def _logits_at_once(
        self, input_ids: Tensor, attention_mask: Tensor | None, wanted: Bool[Tensor, "batch seq"], n: int = LOGIT_ROWS
    ) -> tuple[Float[Tensor, "rows vocabulary"], ...]:
        """The model's own logits of the `wanted` tokens, `n` rows each."""
        return self._forward(input_ids, attention_mask).logits[wanted].split(n)

    def _logits_by_rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, wanted: Bool[Tensor, "batch seq"], n: int = LOGIT_ROWS
    ) -> Iterator[Float[Tensor, "rows vocabulary"]]:
        """As `_logits_at_once`, `n` rows in memory at a time.

        The base model runs once; then the model's forward runs on its hidden states, `n` rows in the base's place: what
        a class does to them (scales, caps, biases) is its own.
        """
        base, outputs = self.model.base_model, []

        def take(module: nn.Module, args: tuple, output: ModelOutput) -> None:
            outputs.append(output)
            raise _Stop

        hook = base.register_forward_hook(take)
        try:
            self._forward(input_ids, attention_mask)
        except _Stop:
            pass
        finally:
            hook.remove()
        for rows, ids in zip(outputs[0][0][wanted].split(n), input_ids[wanted].split(n), strict=True):
            given = replace(outputs[0], last_hidden_state=rows[None])
            with mock.patch.object(base, "forward", lambda *_, given=given, **__: given):
                yield self._forward(ids[None]).logits[0]

    def check_ids(self, input_ids: Ids) -> None:
        """`ValueError` for a text that is longer than the model's positions, or a token without an embedding."""
        length, highest = input_ids.shape[1], int(input_ids.max())
        given = f"{self._named}: a text of {length} tokens"
        allowed(self.n_positions is None or length <= self.n_positions, given, f"max_length={self.n_positions}")
        rows = self.model.get_input_embeddings().weight.shape[0]
        named = self.tokenizer.convert_ids_to_tokens(highest) if highest >= rows else ""
        given = f"{self._named}: token {highest} ({named!r}) has no row in its embedding"
        allowed(highest < rows, given, f"0 to {rows - 1}, as the tokenizer of this model gives")

    def _check_finite(self, values: Tensor, what: str) -> None:
        good = bool(torch.isfinite(values).all())
        allowed(good, f"{self._named}: {what} is not finite, dtype={str(self.dtype)[6:]!r}", "a dtype that holds it")

    @torch.inference_mode()
    def check_sites(self) -> bool:
        """`ValueError` unless text comes to every site once, as [batch, seq, d_model] of finite numbers.

        And unless MLPs side by side read the same, and what they return adds up to what comes next. Gives `_splits`.
        """
        ids = torch.arange(1, 9, device=self.device)[None]
        seen = {(layer, site): [] for layer in range(self.n_layers) for site in SITES}
        try:
            own = self._forward(ids).logits
            with contextlib.ExitStack() as hooks:
                for (layer, site), values in seen.items():
                    hooks.enter_context(watched(self.block(layer), site, values.append))
                seen_by = self._forward(ids).logits
        except Exception as error:  # each class fails in its own way
            raise ValueError(f"{self._named} cannot be watched on text alone: {sources.reason(error)}") from error
        for (layer, site), values in seen.items():
            shapes = [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
            given = f"{self._named}: {site} of layer {layer}, with 8 tokens, is {shapes or 'never reached'}"
            allowed(shapes == [[1, 8, self.d_model]], given, f"once [1, 8, {self.d_model}]")
            self._check_finite(values[0], f"{site} of layer {layer}")
        several = {layer: ", ".join(mlps_of(self.block(layer))) for layer in range(self.n_layers)}
        given = f"{self._named}: its layers have {' and '.join(sorted(set(several.values())))}, which do not add up"
        allowed(torch.equal(own, seen_by), given, "one MLP in a block, or several whose sum it takes")
        return self._splits  # its passes are no part of a later one that is watched

    @cached_property
    @torch.no_grad()
    def _splits(self) -> bool:
        """Whether `_logits_by_rows` gives the model's own logits, seen on a few tokens in three parts."""
        ids = torch.arange(1, 9, device=self.device)[None]
        tokens = ids, None, torch.ones_like(ids).bool()
        own = torch.cat(self._logits_at_once(*tokens))
        try:
            by_rows = torch.cat(list(self._logits_by_rows(*tokens, n=3)))
        except Exception:  # a class whose base model is itself, or is not called, fails in its own way
            return False
        close = max(1e-4, 4 * torch.finfo(own.dtype).eps) * own.abs().max()
        return by_rows.shape == own.shape and bool((by_rows - own).abs().max() <= close)

    @contextlib.contextmanager
    def _splice(self, splice: Splice, kept: Bool[Tensor, "batch seq"]) -> Iterator[None]:
        block = self.block(splice.layer)
        if splice.site != "mlp":
            check_sites([splice.site])
            with watched(block, splice.site, lambda value: _replace_rows(value, kept, splice.function)):
                yield
            return
        entered: list[Tensor] = []

        def stand_in(value: Tensor) -> Tensor:
            return _replace_rows(value, kept, lambda _: splice.function(entered.pop()[kept]))

        with watched(block, "mlp_in", entered.append), watched(block, "mlp_out", stand_in):
            yield


SAFE = {"trust_remote_code": False}
"""Code of a model's author is not run. Where this is not said `transformers` asks at the keyboard."""


def load(
    teacher: str = EMBEDDED,
    *,
    device: str = "auto",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Teacher:
    """The embedded Gemma 3 270M or SmolLM2 135M (4-bit, unpacked once into the cache), a hub id or a local folder.

    `"book-moe"`, `"book-moe@STEP"` and `"book-twin"` are the book's mixture, its checkpoints and its dense twin.

    `attn_implementation` None is PyTorch's (`"sdpa"`) where the architecture has it, else `"eager"`. Of a model that is
    larger than memory `layerwise.load` holds one block at a time.

    Raises `ValueError` for a teacher, revision, device, dtype or attention that is not there, and for a hub id that was
    not downloaded before when the hub cannot be reached.
    """
    one_of("dtype", dtype, DTYPES)
    where = settings.device(device)
    source, fingerprint, hub = sources.find(teacher, revision, cache_dir)
    hub |= SAFE
    options = {**hub, "attn_implementation": attn_implementation, "dtype": getattr(torch, dtype)}
    # mismatched sizes are named below
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "key_mapping": PREFIXES}
    try:
        with sources.no_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **hub)
            model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # transformers, safetensors and the hub client each raise their own kinds
        remedy = f"delete {source} to unpack it again" if teacher in (EMBEDDED, SECOND) else f"allowed: {ALLOWED}"
        given = f"teacher={teacher!r} (revision={revision!r}, attn_implementation={attn_implementation!r})"
        raise ValueError(f"{given} could not be loaded: {sources.reason(error)}; {remedy}") from error
    check_loaded(model, tokenizer, info, f"teacher={teacher!r} ({type(model).__name__})")
    if where.type == "cpu" and model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm" if _aligned(model) else "eager")
    if tokenizer.pad_token_id is None:  # attention never sees it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    loaded = Teacher(teacher, fingerprint, model.to(where).eval().requires_grad_(False), tokenizer)
    asked = [fingerprint, dtype, loaded.attn_implementation, where.type]
    once = cache_dir if teacher in (EMBEDDED, SECOND) else False  # those lie in the cache, and so may the answer
    vars(loaded)["_splits"] = keep("checked", asked, loaded.check_sites, cache_dir=once)  # now, not after a harvest
    return loaded


def _aligned(model: PreTrainedModel) -> bool:
    """Whether experts have rows and columns of whole 16 bytes and no float64, as grouped_mm wants on a CPU.

    It was 0.4 s for a training step of a small OLMoE, `eager` 0.6 s, and the default of `transformers` 5.23 some 20 s.
    """
    experts = (p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
    fits = (p.dtype != torch.float64 and side * p.element_size() % 16 == 0 for p in experts for side in p.shape[1:])
    return all(fits)


def check_sites(sites: Iterable[str]) -> tuple[str, ...]:
    """The sites as a tuple; `ValueError` naming one that is unknown."""
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    allowed(bool(sites), "sites=() names no site", ", ".join(SITES))
    for site in sites:
        one_of("site", site, SITES)
    return sites


def _replace_rows(value: Tensor, kept: Bool[Tensor, "batch seq"], function: Callable) -> Tensor:
    value = value.clone()
    value[kept] = function(value[kept]).to(value)
    return value
