"""A mixture of experts small enough to ship: tokenizer, training from scratch, and the trained model in `data/moe`.

The architecture is OLMoE's (Muennighoff et al. 2024), built and saved by `transformers`, so that whatever reads OLMoE
reads it: pre-norm blocks, RMS-normed queries and keys, rotary positions, SwiGLU experts, a softmax router whose top-k
weights are not renormalised, and Switch's balancing loss. Its dense twin is Qwen3's, the dense class of `transformers`
that is closest (it norms queries and keys head by head, where OLMoE norms all heads together), with d_ff of all experts
that are active for a token.

    book-moe        the trained model            teachers.load("book-moe")
    book-moe@256    after 256 steps              teachers.load("book-moe@256"); `sources.steps()` lists them
    book-twin       the dense twin               teachers.load("book-twin")
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.olmoe.modeling_olmoe import MoeCausalLMOutputWithPast, load_balancing_loss_func

from helpers import settings
from helpers.models import activations, corpora, sources, teachers
from helpers.models.teachers import Teacher
from helpers.parts.ngrams import KneserNey
from helpers.study import scores, sweep

BOS = "<|endoftext|>"
"""Stands before every paragraph, and so also says that one has ended."""
CHECKPOINT_SECONDS = 60.0


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete. One that is there already is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield new
        for path in (new, *new.rglob("*")):  # mkdtemp and safetensors make what only their owner can read
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.is_dir():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / "old")
            os.replace(new, target)
            shutil.rmtree(old)
        else:
            os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


# -- tokenizer and text ------------------------------------------------------------------------------------------------


def tokenizer(corpus: str = "book-texts", vocabulary: int = 4096, *, cache_dir=None) -> PreTrainedTokenizerBase:
    """Byte-level BPE trained on the training split: any text is a sequence of its tokens, and comes back unchanged.

    `BOS` has id 0 and is put before every text. Raises `ValueError` where the vocabulary cannot hold all bytes and BOS.
    """
    if vocabulary < 257:
        raise ValueError(f"vocabulary={vocabulary} cannot hold 256 bytes and BOS; allowed: at least 257")
    key = _hash([corpora.fingerprint(corpus), vocabulary, inspect.getsource(_train_bpe)])
    target = settings.cache_dir(cache_dir) / "moe" / f"tokenizer-{key}"
    if not target.is_dir():
        with _new_folder(target) as new:
            PreTrainedTokenizerFast(
                tokenizer_object=_train_bpe(corpora.load(corpus, "train")["text"][:], vocabulary),
                **dict.fromkeys(("bos_token", "eos_token", "pad_token"), BOS),
            ).save_pretrained(new)
    return PreTrainedTokenizerFast.from_pretrained(target)


def _train_bpe(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return bpe


def bytes_of(tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " vocabulary"]:
    """UTF-8 bytes that each token of a byte-level vocabulary stands for; 0 for BOS."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if name == BOS else len(name) for name in names])


def paragraphs(tokenizer: PreTrainedTokenizerBase, corpus: str, split: str = "train") -> list[Int[np.ndarray, " _"]]:
    """Token ids of every paragraph of a split, BOS in front."""
    return [np.array(ids, np.int32) for ids in tokenizer(corpora.load(corpus, split)["text"][:]).input_ids]


class Packed:
    """Batches of `length` tokens: `batch(step)` depends on the step alone, so a stopped run goes on where it stopped.

    Each epoch puts all paragraphs in a new order, one after the other, and cuts the row of tokens where a sequence is
    full; a sequence that starts within a paragraph has BOS in front, as the pieces have that a harvest reads.
    """

    def __init__(self, texts: Sequence[Int[np.ndarray, " _"]], *, batch_size: int, length: int, seed: int = 0):
        self.texts, self.batch_size, self.length, self.seed = texts, batch_size, length, seed
        self.bos = int(texts[0][0])
        self.n_tokens = sum(map(len, texts))
        self.steps_per_epoch = self.n_tokens // (batch_size * (length - 1))
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size={batch_size} sequences of {length} tokens need more than the {self.n_tokens:,} there are"
            )
        self._epoch = (-1, np.empty(0))

    def batch(self, step: int) -> Int[Tensor, "batch length"]:
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            order = np.random.default_rng(settings.mix(self.seed, epoch)).permutation(len(self.texts))
            self._epoch = (epoch, np.concatenate([self.texts[i] for i in order]))
        size = self.batch_size * (self.length - 1)
        rows = self._epoch[1][at * size : (at + 1) * size].reshape(self.batch_size, -1)
        return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=self.bos)).long()


# -- architectures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of the mixture, and of the dense model with as many active parameters."""

    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    n_experts: int = 32
    top_k: int = 4
    d_ff: int = 64
    """Hidden neurons of one expert."""
    vocabulary: int = 4096
    balance: float = 0.01
    """Weight of the balancing loss of each layer (`router_aux_loss_coef`)."""

    def __post_init__(self):
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"n_heads={self.n_heads}: allowed: numbers that split d_model={self.d_model} evenly in two"
            )
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k={self.top_k}: allowed: 1 to n_experts={self.n_experts}")

    def _shared(self) -> dict:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,  # a padding token's embedding gets no gradient, and BOS needs one
        }

    def mixture(self, seed: int = 0) -> OlmoeForCausalLM:
        """The mixture of experts with random weights, whose `aux_loss` balances every layer by itself."""
        config = OlmoeConfig(
            **self._shared(),
            intermediate_size=self.d_ff,
            num_experts=self.n_experts,
            num_experts_per_tok=self.top_k,
            router_aux_loss_coef=self.balance,
            experts_implementation="grouped_mm",
        )
        with _seeded(seed):
            model = OlmoeForCausalLM(config)
        model.register_forward_hook(_balance_layers)
        return model

    def dense(self, seed: int = 0) -> Qwen3ForCausalLM:
        """Its twin: the same widths, and in each MLP as many neurons as `top_k` experts have."""
        config = Qwen3Config(
            **self._shared(), intermediate_size=self.top_k * self.d_ff, head_dim=self.d_model // self.n_heads
        )
        with _seeded(seed):
            return Qwen3ForCausalLM(config)


def _balance_layers(model: OlmoeForCausalLM, inputs: tuple, output: MoeCausalLMOutputWithPast) -> None:
    """Switch's balancing loss, E Σ_e f_e p_e, added up over layers (Fedus et al. 2021; OLMoE took the mean, over k).

    That of `transformers` counts the layers' experts together: expert 3 of one layer may take what expert 3 of another
    does not, and a third of each layer's experts end up with no tokens.
    """
    if output.router_logits is not None:
        sizes = model.config.num_experts, model.config.num_experts_per_tok
        output.aux_loss = sum(load_balancing_loss_func((logits,), *sizes) for logits in output.router_logits)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within this block all that draws from PyTorch's global stream starts from `seed`; afterwards it is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.mix(seed, 0))
        yield


def parameters_of(model: PreTrainedModel) -> tuple[int, int]:
    """Number of parameters, and of those that a token meets: all but the experts it is not routed to."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    share = model.config.num_experts_per_tok / model.config.num_experts if experts else 0
    return total, total - experts + round(experts * share)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine down to a tenth of `lr`; matrices decay, vectors do not."""

    steps: int
    batch_size: int = 24
    length: int = 128
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    dropout: float = 0.0
    """Of the embeddings, and of what each attention and each MLP adds to the residual stream."""
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or not self.lr > 0 or not 0 <= self.dropout < 1 or self.length < 3:
            raise ValueError(f"{self}: allowed: steps ≥ 1, lr > 0, 0 ≤ dropout < 1, length ≥ 3")

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass
class Trained:
    """A trained model, its curve (one entry a log: step, loss in nats a token, …), and where its checkpoints lie."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    store: Path
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def folder(self, step: int) -> Path:
        """The checkpoint after `step` steps, in the layout of the hub."""
        return self.store / f"step-{step:06d}"

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.store.glob("step-*"))

    @cached_property
    def teacher(self) -> Teacher:
        return teachers.load(str(self.folder(self.steps[-1])), device=str(self.model.device))

    def at(self, step: int) -> Teacher:
        """The checkpoint as a teacher."""
        return teachers.load(str(self.folder(step)), device=str(self.model.device))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    recipe: Recipe,
    *,
    checkpoints: Sequence[int] = (),
    log_every: int = 20,
    validate_every: int = 100,
    n_validation: int = 20_000,
    device: str = "auto",
    cache_dir: str | Path | None = None,
    label: str = "training",
) -> Trained:
    """Train `model` from its present weights on the corpus's training split, and keep a checkpoint after each step of
    `checkpoints` and after the last.

    The loss is next-token cross-entropy, and for a mixture of experts the balancing loss times the configuration's
    weight. A run is stored under what determines it: one that is finished is loaded, one that was killed goes on.
    The curve has the batch's loss every `log_every` steps, and the held-out loss of `n_validation` tokens every
    `validate_every` steps and at each checkpoint.

    Raises `ValueError` for a bad recipe or checkpoint before any training, `FloatingPointError` for a loss that is not
    finite, naming the step.
    """
    if bad := [step for step in checkpoints if not 0 <= step <= recipe.steps]:
        raise ValueError(f"checkpoints={bad} are not in the run; allowed: 0 to {recipe.steps}")
    where = settings.device(device)
    weights = [tensor.detach().cpu().contiguous().view(torch.uint8).numpy() for tensor in model.state_dict().values()]
    settled = [model.config.to_dict(), asdict(recipe), sorted(checkpoints), log_every, validate_every, n_validation]
    texts = [corpora.fingerprint(corpus), tokenizer.backend_tokenizer.to_str(), where.type, torch.__version__]
    code = CODE + [inspect.getsource(_balance_layers)] * isinstance(model, OlmoeForCausalLM)  # the twin has no experts
    key = _hash([settled, texts, code], *weights)
    store = settings.cache_dir(cache_dir) / "moe" / f"run-{key}"
    run = _Run(Trained(model.to(where), tokenizer, store), recipe)
    run.advance(corpus, sorted({*checkpoints, recipe.steps}), log_every, validate_every, n_validation, label)
    return run.trained


def train_both(
    size: Size,
    recipes: Mapping[str, Recipe],
    corpus: str,
    *,
    checkpoints: Sequence[int] = (),
    device: str = "auto",
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    **options,
) -> dict[str, Trained]:
    """`train` for `"mixture"` and `"dense"`, each by its recipe, side by side on a thread each (on a GPU, one by one).

    Widths this small do not fill two cores. `checkpoints` are the mixture's; `options` go to `train`.
    """
    if unknown := set(recipes) - {"mixture", "dense"}:
        raise ValueError(f"recipes={sorted(unknown)}: allowed: 'mixture', 'dense'")
    cells = [
        {"kind": kind, "size": size, "recipe": recipe, "corpus": corpus, "device": device, "cache_dir": cache_dir}
        | {"options": {"checkpoints": list(checkpoints) if kind == "mixture" else [], "label": kind, **options}}
        for kind, recipe in recipes.items()
    ]
    tokenizer(corpus, size.vocabulary, cache_dir=cache_dir)  # once, before both look for it
    workers = 1 if settings.device(device).type != "cpu" else workers
    if workers != 1:
        sweep.sweep(_train_and_store, cells, label="training", workers=workers)
    return {cell["kind"]: _train_kind(**cell) for cell in cells}  # from the store


def _train_and_store(**cell) -> None:
    _train_kind(**cell)


def _train_kind(kind: str, size: Size, recipe: Recipe, corpus: str, device: str, cache_dir, options: dict) -> Trained:
    text = tokenizer(corpus, size.vocabulary, cache_dir=cache_dir)
    model = getattr(size, kind)(recipe.seed)
    return train(model, text, corpus, recipe, device=device, cache_dir=cache_dir, **options)


class _Run:
    """The state of a training, and how it goes on."""

    def __init__(self, trained: Trained, recipe: Recipe):
        self.trained, self.recipe, self.step = trained, recipe, 0
        self.model, self.state = trained.model, trained.store / "state.pt"
        self.optimiser = _optimiser(self.model, recipe)
        if self.state.is_file():
            self.load()

    def advance(self, corpus, checkpoints, log_every, validate_every, n_validation, label) -> None:
        recipe, trained = self.recipe, self.trained
        if self.step == recipe.steps and trained.folder(self.step).is_dir():
            return
        texts = paragraphs(trained.tokenizer, corpus)
        stream = Packed(texts, batch_size=recipe.batch_size, length=recipe.length, seed=recipe.seed)
        reader = Teacher("in training", "", self.model, trained.tokenizer)
        held_back = activations.texts(reader, corpus, n_tokens=n_validation, split="validation")
        before, started = trained.seconds, time.perf_counter()
        saved = started
        bar = settings.progress(total=recipe.steps, initial=self.step, desc=label, unit="step")
        with _dropout(self.model, recipe.dropout):
            while True:
                due = self.step in checkpoints
                if due or self.step % validate_every == 0:
                    self.note(validation=self.validate(reader, held_back))
                if due and not trained.folder(self.step).is_dir():
                    self.keep()
                trained.seconds = before + time.perf_counter() - started
                if self.step == recipe.steps or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.perf_counter()
                if self.step == recipe.steps:
                    break
                losses = self.update(stream.batch(self.step))
                if self.step % log_every == 0:
                    self.note(**losses)
                    bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
                self.step += 1
                bar.update()
        bar.close()

    def update(self, ids: Int[Tensor, "batch length"]) -> dict[str, float]:
        """One step of the optimiser; losses of the batch before it."""
        ids = ids.to(self.model.device)
        self.model.train()
        is_mixture = hasattr(self.model.config, "router_aux_loss_coef")
        with _seeded(settings.mix(self.recipe.seed, self.step)):  # dropout: the same after a restart
            out = self.model(ids, use_cache=False, **({"output_router_logits": True} if is_mixture else {}))
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total, losses = loss, {"loss": float(loss.detach())}
        if is_mixture:
            total = loss + self.model.config.router_aux_loss_coef * out.aux_loss
            losses["balance"] = float(out.aux_loss.detach())
        if not math.isfinite(losses["loss"]):
            raise FloatingPointError(f"the loss is {losses['loss']} at step {self.step}; lower lr={self.recipe.lr}")
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(self.step)
        self.optimiser.step()
        return losses

    def validate(self, reader: Teacher, pieces: activations.Texts) -> float:
        """Held-out loss in nats a token."""
        self.model.eval()
        found = activations.losses(reader, pieces, batch_size=16)
        return float(found.nats.sum() / found.tokens.sum())

    def note(self, **numbers: float) -> None:
        """Add to the curve's entry of this step; a step that is run again after a kill is noted once."""
        curve = self.trained.curve
        if not curve or curve[-1]["step"] != self.step:
            curve.append({"step": self.step})
        curve[-1].update(numbers)

    def keep(self) -> None:
        """A checkpoint in the layout of the hub, per-expert names included: save_pretrained splits what it fused."""
        with _new_folder(self.trained.folder(self.step)) as new:
            self.model.save_pretrained(new)
            self.trained.tokenizer.save_pretrained(new)

    def save(self) -> None:
        """Write aside and move into place: a killed process leaves the last good file."""
        trained = self.trained
        state = {"step": self.step, "model": self.model.state_dict(), "curve": trained.curve}
        state |= {"seconds": trained.seconds, "optimiser": self.optimiser.state_dict()}
        trained.store.mkdir(parents=True, exist_ok=True)
        aside = self.state.with_suffix(f".{os.getpid()}.part")
        try:
            torch.save(state, aside)
            os.replace(aside, self.state)
        finally:
            aside.unlink(missing_ok=True)

    def load(self) -> None:
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"the stored training {self.state} is damaged ({error}); delete it to restart") from error
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.trained.curve, self.trained.seconds = state["step"], state["curve"], state["seconds"]


def _optimiser(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = model.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=1e-8, fused=fused)


@contextlib.contextmanager
def _dropout(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Dropout of embeddings and of every block's two updates, while the model is in training mode."""

    def hook(module: nn.Module, _, output):
        if not module.training:
            return None
        if isinstance(output, tuple):
            return (F.dropout(output[0], share), *output[1:])
        return F.dropout(output, share)

    blocks = teachers.find_blocks(model)
    places = [model.get_input_embeddings(), *(part for b in blocks for part in (b.self_attn, b.mlp))]
    hooks = [place.register_forward_hook(hook) for place in places] if share else []
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _hash(content, *parts) -> str:
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


CODE = [inspect.getsource(part) for part in (Packed, Recipe, _Run, _dropout, _optimiser)]
"""What a stored run depends on, beside its parameters: a change of anything else here keeps it."""


# -- held-out loss -----------------------------------------------------------------------------------------------------


def held_out(
    model: Teacher | KneserNey, corpus: str, split: str, n_tokens: int, *, reader: Teacher | None = None
) -> pd.DataFrame:
    """Loss of held-out text: one row a piece with `article`, `source`, `nats`, `tokens` and `bytes` (UTF-8).

    Every model is given the same pieces, those that `reader` reads (default: the model itself): at most 256 tokens
    with BOS, and nothing before them. Raises `ValueError` for n-grams without a reader, and for a model whose tokens
    are not the reader's.
    """
    reader = reader or model
    if not isinstance(reader, Teacher):
        raise ValueError("reader=None: n-grams have no tokenizer; allowed: the teacher they are compared with")
    pieces = activations.texts(reader, corpus, n_tokens=n_tokens, split=split)
    if isinstance(model, Teacher):
        if model.tokenizer.get_vocab() != reader.tokenizer.get_vocab():
            raise ValueError(f"model={model.name!r} has another tokenizer; allowed: that of reader={reader.name!r}")
        found = activations.losses(model, pieces, batch_size=16)
    else:
        tokens = [len(piece) - 1 for piece in pieces.tokens]
        found = pd.DataFrame({"article": pieces.articles, "nats": model.nats(pieces.tokens), "tokens": tokens})
    size = bytes_of(reader.tokenizer)
    return found.assign(
        bytes=[int(size[piece].sum()) for piece in pieces.tokens], source=found.article.map(sources_of(corpus, split))
    )


def sources_of(corpus: str, split: str) -> dict[int, str]:
    """The source of each document of a corpus; its name where it has one source."""
    rows = corpora.load(corpus, split).to_pandas()
    return dict(zip(rows.article, rows.source if "source" in rows else [corpus] * len(rows), strict=True))


def bits_per_byte(losses: pd.DataFrame, *, seed: int = 0) -> tuple[float, float, float]:
    """Bits per byte of a table of `held_out`, with the ends of a 95 % bootstrap interval over documents.

    The ends are NaN for fewer than `FEWEST` documents.
    """
    sums = _by_document(losses)

    def ratio(a: Float[np.ndarray, "documents 2"]) -> float:
        return float(a[:, 0].sum() / a[:, 1].sum() / math.log(2))

    return ratio(sums), *_interval(sums, ratio, seed)


FEWEST = 5
"""Documents below which an interval over documents would say little."""


def _interval(data: np.ndarray, statistic, seed: int) -> tuple[float, float]:
    if len(data) < FEWEST:
        return math.nan, math.nan
    return scores.bootstrap_interval(data, statistic, seed=seed)


def compare(tables: dict[str, pd.DataFrame], against: str, *, seed: int = 0) -> pd.DataFrame:
    """Bits per byte of each model and source, and the difference to model `against` on the same documents.

    Columns model, source, documents, perplexity (per token), bits, low, high, difference, difference_low,
    difference_high; intervals are 95 % bootstraps over documents, the difference's over the same draws for both models.
    """
    rows = []
    for model, table in tables.items():
        everything = [("all", table), *table.groupby("source")]
        for source, part in everything:
            other = tables[against]
            other = other if source == "all" else other[other.source == source]
            pairs = np.c_[_by_document(part), _by_document(other)]

            def gap(a: np.ndarray) -> float:
                return float((a[:, 0].sum() - a[:, 2].sum()) / a[:, 1].sum() / math.log(2))

            bits, low, high = bits_per_byte(part, seed=seed)
            gap_low, gap_high = _interval(pairs, gap, seed)
            rows.append(
                {
                    "model": model,
                    "source": source,
                    "documents": len(pairs),
                    "perplexity": math.exp(part.nats.sum() / part.tokens.sum()),
                    "bits": bits,
                    "low": low,
                    "high": high,
                    "difference": gap(pairs),
                    "difference_low": gap_low,
                    "difference_high": gap_high,
                }
            )
    return pd.DataFrame(rows)


def _by_document(losses: pd.DataFrame) -> Float[np.ndarray, "documents 2"]:
    return losses.groupby("article")[["nats", "bytes"]].sum().to_numpy()


# -- what the router does ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Which experts each token of a text was sent to, the most weighted first; neither BOS nor padding is in it."""

    tokens: Int[np.ndarray, " rows"]
    pieces: Int[np.ndarray, " rows"]
    """Number of the piece of text; its tokens stand one after the other."""
    experts: Int[np.ndarray, "rows layers k"]
    n_experts: int

    def load(self) -> Float[np.ndarray, "layers experts"]:
        """Share of all choices that fall on each expert: 1/n_experts where the load is even."""
        return np.stack([np.bincount(e.ravel(), minlength=self.n_experts) / e.size for e in self._by_layer()])

    def information(self, offset: int = 0, *, shuffles: int = 20, seed: int = 0) -> pd.DataFrame:
        """Mutual information in bits of the token `offset` places on (0: the routed one) and an expert drawn from its
        chosen k: one row a layer with `bits`, and `shuffled` and `largest shuffled`, its mean and largest value over
        `shuffles` times that tokens were dealt out anew (`bits` above the largest: p ≤ 1/(shuffles + 1)).

        Counts alone give positive information between things that have none to do with each other, the more the rarer
        the tokens are; `shuffled` is how much.
        """
        there = np.flatnonzero(self.pieces == np.roll(self.pieces, -offset))
        there = there[(there + offset >= 0) & (there + offset < len(self.pieces))]
        tokens = np.unique(self.tokens[there + offset], return_inverse=True)[1]
        random, rows = np.random.default_rng(seed), []
        for layer, experts in enumerate(self._by_layer()):
            chosen = experts[there]
            by_chance = [_information(random.permutation(tokens), chosen, self.n_experts) for _ in range(shuffles)]
            found = _information(tokens, chosen, self.n_experts)
            rows.append(
                {"layer": layer, "bits": found, "shuffled": np.mean(by_chance), "largest shuffled": max(by_chance)}
            )
        return pd.DataFrame(rows)

    def favourites(
        self, layer: int, tokenizer: PreTrainedTokenizerBase, *, n: int = 5, least: int = 10
    ) -> pd.DataFrame:
        """For each expert its `load`, and of the tokens seen `least` times or more the `n` that are sent to it most
        often (of equals the more frequent): `tokens`, and `shares`, how often each is."""
        chosen = np.zeros((self.tokens.max() + 1, self.n_experts))
        np.add.at(chosen, (np.repeat(self.tokens, self.experts.shape[2]), self.experts[:, layer].ravel()), 1)
        seen = np.bincount(self.tokens)
        known = np.flatnonzero(seen >= least)
        share, load = chosen[known] / seen[known, None], self.load()[layer]
        rows = []
        for expert in range(self.n_experts):
            best = np.lexsort((-seen[known], -share[:, expert]))[:n]
            words = [tokenizer.decode([int(known[i])]) for i in best]
            rows.append({"expert": expert, "load": load[expert], "tokens": words, "shares": share[best, expert]})
        return pd.DataFrame(rows)

    def _by_layer(self) -> Iterator[Int[np.ndarray, "rows k"]]:
        return iter(self.experts.transpose(1, 0, 2))


def _information(tokens: Int[np.ndarray, " rows"], experts: Int[np.ndarray, "rows k"], n_experts: int) -> float:
    k = experts.shape[1]
    cells = np.repeat(tokens, k) * n_experts + experts.ravel()
    joint = np.bincount(cells, minlength=(tokens.max() + 1) * n_experts).reshape(-1, n_experts) / cells.size
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    full = joint > 0
    return float((joint[full] * np.log2(joint[full] / apart[full])).sum())


@torch.inference_mode()
def routing(teacher: Teacher, corpus: str, *, n_tokens: int, split: str = "test") -> Routing:
    """Where the tokens of a text are sent at every layer. Raises `ValueError` for a model without routers."""
    if not hasattr(teacher.model.config, "num_experts_per_tok"):
        raise ValueError(f"teacher={teacher.name!r} has no router; allowed: a mixture of experts")
    pieces = activations.texts(teacher, corpus, n_tokens=n_tokens, split=split)
    k, found = teacher.model.config.num_experts_per_tok, []
    for batch in pieces.batches(16):
        ids, mask = pieces.padded(batch)
        ids, mask = ids.to(teacher.device), mask.to(teacher.device)
        out = teacher.model(ids, attention_mask=mask, output_router_logits=True, use_cache=False, logits_to_keep=1)
        kept = teacher.rows_kept(ids, mask)
        chosen = torch.stack([logits.topk(k).indices.view(*ids.shape, k)[kept] for logits in out.router_logits], 1)
        number = torch.tensor(batch)[:, None].expand_as(ids.cpu())[kept.cpu()]
        found.append((ids[kept].cpu().numpy(), number.numpy(), chosen.cpu().numpy()))
    return Routing(*(np.concatenate(part) for part in zip(*found, strict=True)), teacher.model.config.num_experts)


def sample(teacher: Teacher, prompt: str, *, n_tokens: int = 60, temperature: float = 0.8, seed: int = 0) -> str:
    """`prompt` and what the model writes after it, at most `n_tokens` tokens, until it ends the paragraph."""
    ids = teacher.tokenizer(prompt, return_tensors="pt").to(teacher.device)
    with _seeded(seed):
        out = teacher.model.generate(
            **ids, max_new_tokens=n_tokens, do_sample=True, temperature=temperature, top_k=50, pad_token_id=0
        )
    return teacher.tokenizer.decode(out[0], skip_special_tokens=True)


# -- shipping ----------------------------------------------------------------------------------------------------------


def ship(mixture: Trained, twin: Trained, content: dict, folder: str | Path | None = None) -> Path:
    """Write the shipped model: final weights of both in bfloat16, the mixture's checkpoints in 8 bits, the record.

    `content` goes into training.json beside the number of steps and the checkpoints. All or nothing: a folder that is
    there is replaced when the new one is complete.
    """
    folder, last = Path(folder or sources.FOLDER), mixture.steps[-1]
    with _new_folder(folder) as new:
        _halved(mixture.folder(last), new)
        _halved(twin.folder(twin.steps[-1]), new / "twin")
        (new / "checkpoints").mkdir()
        for step in mixture.steps[:-1]:
            weights = load_file(mixture.folder(step) / "model.safetensors")
            sources.pack(weights, new / "checkpoints" / f"{step:06d}.safetensors")
        settings.write_json(new / "training.json", {"steps": last, **content})
    return folder


def _halved(source: Path, target: Path) -> None:
    """Copy a folder of the hub's layout with its weights in bfloat16."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, target / path.name)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    settings.write_json(target / "config.json", config | {"dtype": "bfloat16"})
