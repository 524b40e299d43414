"""A mixture of experts small enough to ship: tokenizer, sizes, training from scratch, and writing `data/moe`.

The architecture is OLMoE's (Muennighoff et al. 2024), built and saved by `transformers`, so that whatever reads OLMoE
reads it: pre-norm blocks, RMS-normed queries and keys, rotary positions, SwiGLU experts, a softmax router whose top-k
weights are not renormalised, and Switch's balancing loss. Its dense twin is Qwen3's, the dense class of `transformers`
that is closest (it norms queries and keys head by head, where OLMoE norms all heads together), with d_ff of all experts
that are active for a token.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
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
from helpers.kept import Kept, check_sealed, digest, keep_folder
from helpers.models import activations, corpora, sources, teachers
from helpers.models.teachers import Teacher
from helpers.settings import allowed
from helpers.study import sweep

BOS = "<|endoftext|>"
"""Stands before every paragraph, and so also says that one has ended."""
CHECKPOINT_SECONDS = 60.0


# -- tokenizer and text ------------------------------------------------------------------------------------------------


def tokenizer(corpus: str = "book-texts", vocabulary: int = 4096, *, cache_dir=None) -> PreTrainedTokenizerBase:
    """Byte-level BPE trained on the training split: any text is a sequence of its tokens, and comes back unchanged.

    `BOS` has id 0 and is put before every text. Raises `ValueError` where the vocabulary cannot hold all bytes and BOS.
    """
    allowed(vocabulary >= 257, f"vocabulary={vocabulary} cannot hold 256 bytes and BOS", "at least 257")

    def fill(new: Path) -> None:
        bpe, texts = ByteLevelBPETokenizer(), corpora.load(corpus, "train")["text"][:]
        bpe.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False, special_tokens=[BOS])
        bpe.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        special, plain = dict.fromkeys(("bos_token", "eos_token", "pad_token"), BOS), Tokenizer.from_str(bpe.to_str())
        PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(new)

    asked = ["tokenizer", corpora.fingerprint(corpus), vocabulary]
    return PreTrainedTokenizerFast.from_pretrained(keep_folder("mixture", asked, fill, cache_dir=cache_dir))


def paragraphs(tokenizer: PreTrainedTokenizerBase, corpus: str) -> list[Int[np.ndarray, " _"]]:
    """Token ids of every paragraph of the training split, BOS in front."""
    return [np.array(ids, np.int32) for ids in tokenizer(corpora.load(corpus, "train")["text"][:]).input_ids]


class TokenBatches:
    """Batches of `length` tokens: `batch(step)` depends on the step alone, so a stopped run goes on where it stopped.

    Each epoch puts all paragraphs in a new order, one after the other, and cuts the row of tokens where a sequence is
    full; a sequence that starts within a paragraph has BOS in front, as the pieces have that a harvest reads.
    """

    def __init__(self, texts: Sequence[Int[np.ndarray, " _"]], *, batch_size: int, length: int, seed: int = 0):
        self.texts, self.batch_size, self.length, self.seed = texts, batch_size, length, seed
        self.bos = int(texts[0][0])
        self.n_tokens = sum(map(len, texts))
        self.steps_per_epoch = self.n_tokens // (batch_size * (length - 1))
        given = f"batch_size={batch_size} sequences of {length} tokens"
        allowed(self.steps_per_epoch > 0, given, f"fewer than the {self.n_tokens:,} there are")
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
        given, width = f"n_heads={self.n_heads}", f"numbers that split d_model={self.d_model} evenly in two"
        allowed(self.d_model % (2 * self.n_heads) == 0, given, width)
        allowed(1 <= self.top_k <= self.n_experts, f"top_k={self.top_k}", f"1 to n_experts={self.n_experts}")

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
        with seeded(seed):
            model = OlmoeForCausalLM(config)
        model.register_forward_hook(_balance_layers)
        return model

    def dense(self, seed: int = 0) -> Qwen3ForCausalLM:
        """Its twin: the same widths, and in each MLP as many neurons as `top_k` experts have."""
        config = Qwen3Config(
            **self._shared(), intermediate_size=self.top_k * self.d_ff, head_dim=self.d_model // self.n_heads
        )
        with seeded(seed):
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
def seeded(seed: int) -> Iterator[None]:
    """Within this block all that draws from PyTorch's global stream starts from `seed`; afterwards it is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.mix(seed, 0))
        yield


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainingRecipe:
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
    checkpoints: tuple[int, ...] = ()
    """Steps after which the model is kept, beside the last."""
    log_every: int = 20
    validate_every: int = 100
    n_validation: int = 20_000
    """Tokens of the held-out loss, which is taken every `validate_every` steps and at each checkpoint."""

    def __post_init__(self):
        good = self.steps >= 1 and self.lr > 0 and 0 <= self.dropout < 1 and self.length >= 3
        allowed(good, f"{self}", "steps ≥ 1, lr > 0, 0 ≤ dropout < 1, length ≥ 3")
        bad = [step for step in self.checkpoints if not 0 <= step <= self.steps]
        allowed(not bad, f"checkpoints={bad} are not in the run", f"0 to {self.steps}")

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    recipe: PretrainingRecipe,
    *,
    device: str = "auto",
    cache_dir: str | Path | None = None,
    label: str = "training",
) -> Pretraining:
    """Train `model` from its present weights on the corpus's training split.

    The loss is next-token cross-entropy, and for a mixture of experts the balancing loss times the configuration's
    weight. A run is kept: one that is finished is loaded, one that was killed goes on, two processes share one.
    The curve has the batch's loss every `log_every` steps, and the held-out loss.

    Raises `FloatingPointError` for a loss that is not finite, naming the step.
    """
    where = settings.device(device)
    start = [model.config.to_dict(), digest(*model.state_dict().values()), where.type]
    asked = [start, recipe, corpora.fingerprint(corpus), tokenizer.backend_tokenizer.to_str()]
    run = Pretraining(model.to(where), tokenizer, recipe, Kept("mixture", asked, Pretraining, cache_dir=cache_dir))
    with run.kept.lock():
        run.take_up()
        if run.step < recipe.steps:
            run.advance(corpus, label)
    return run


def pretrain_both(
    size: Size, recipes: Mapping[str, PretrainingRecipe], corpus: str, *, workers: int | None = None, **options
) -> dict[str, Pretraining]:
    """`pretrain` for `"mixture"` and `"dense"`, side by side on a CPU, a thread each; `options` go to `pretrain`."""
    unknown = sorted(set(recipes) - {"mixture", "dense"})
    allowed(not unknown, f"recipes={unknown}", "'mixture', 'dense'")
    common = {"size": size, "corpus": corpus, **options}
    cells = [common | {"kind": kind, "recipe": recipe} for kind, recipe in recipes.items()]
    workers = workers if settings.device(options.get("device", "auto")).type == "cpu" else 1
    if workers != 1:
        sweep.sweep(_pretrain_and_keep, cells, label="training", workers=workers)
    return {cell["kind"]: _pretrain_kind(**cell) for cell in cells}  # from the cache


def _pretrain_and_keep(**cell) -> None:
    _pretrain_kind(**cell)  # a model that has run cannot be pickled: it stays there


def _pretrain_kind(kind: str, size: Size, recipe: PretrainingRecipe, corpus: str, cache_dir=None, **options):
    model, bpe = getattr(size, kind)(recipe.seed), tokenizer(corpus, size.vocabulary, cache_dir=cache_dir)
    return pretrain(model, bpe, corpus, recipe, cache_dir=cache_dir, label=kind, **options)


class Pretraining:
    """A training, how it goes on, and what it leaves: `model`, `checkpoints` (folders by step in the layout of the hub;
    the last is the final model), `curve` (one entry a log: step, loss in nats a token, …) and `seconds`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: PretrainingRecipe, kept: Kept
    ):
        self.model, self.tokenizer, self.recipe, self.kept = model, tokenizer, recipe, kept
        self.step, self.seconds = 0, 0.0
        self.checkpoints: dict[int, Path] = {}
        self.curve: list[dict[str, float]] = []
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        how = {"lr": recipe.lr, "betas": recipe.betas, "eps": 1e-8, "fused": model.device.type in ("cpu", "cuda")}
        self.optimiser = torch.optim.AdamW(groups, **how)

    @cached_property
    def teacher(self) -> Teacher:
        """The final model as a teacher."""
        return teachers.load(str(self.checkpoints[max(self.checkpoints)]), device=str(self.model.device))

    def advance(self, corpus: str, label: str) -> None:
        """Train to the end, from the step that it has come to."""
        recipe, texts = self.recipe, paragraphs(self.tokenizer, corpus)
        stream = TokenBatches(texts, batch_size=recipe.batch_size, length=recipe.length, seed=recipe.seed)
        reader = Teacher("in training", "", self.model, self.tokenizer)
        held_back = activations.texts(reader, corpus, n_tokens=recipe.n_validation, split="validation")
        before = self.seconds
        saved = started = time.perf_counter()
        bar = settings.progress(total=recipe.steps, initial=self.step, desc=label, unit="step")
        with bar, _dropout(self.model, recipe.dropout):
            while True:
                due = self.step in (*recipe.checkpoints, recipe.steps)
                if due or self.step % recipe.validate_every == 0:
                    self.note(validation=self.validate(reader, held_back))
                if due:
                    asked = [self.kept.asked, self.step]
                    place = keep_folder("mixture", asked, self.write_checkpoint, cache_dir=self.kept.folder.parent)
                    self.checkpoints[self.step] = place
                self.seconds = before + time.perf_counter() - started
                if self.step == recipe.steps or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.perf_counter()
                if self.step == recipe.steps:
                    return
                losses = self.update(stream.batch(self.step))
                if self.step % recipe.log_every == 0:
                    found = {name: float(value) for name, value in losses.items()}  # no other step waits for a GPU
                    if not math.isfinite(found["loss"]):
                        raise FloatingPointError(
                            f"the loss is {found['loss']} at step {self.step}; lower lr={recipe.lr}"
                        )
                    self.note(**found)
                    bar.set_postfix(loss=f"{found['loss']:.3f}", refresh=False)
                self.step += 1
                bar.update()

    def update(self, ids: Int[Tensor, "batch length"]) -> dict[str, Float[Tensor, ""]]:
        """One step of the optimiser; losses of the batch before it."""
        ids = ids.to(self.model.device)
        self.model.train()
        is_mixture = hasattr(self.model.config, "router_aux_loss_coef")
        with seeded(settings.mix(self.recipe.seed, self.step)):  # dropout: the same after a restart
            out = self.model(ids, use_cache=False, **({"output_router_logits": True} if is_mixture else {}))
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total, losses = loss, {"loss": loss.detach()}
        if is_mixture:
            total = loss + self.model.config.router_aux_loss_coef * out.aux_loss
            losses["balance"] = out.aux_loss.detach()
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
        if not self.curve or self.curve[-1]["step"] != self.step:
            self.curve.append({"step": self.step})
        self.curve[-1].update(numbers)

    def write_checkpoint(self, new: Path) -> None:
        """In the layout of the hub, per-expert names included: save_pretrained splits what it fused."""
        self.model.save_pretrained(new)
        self.tokenizer.save_pretrained(new)

    def save(self) -> None:
        """Keep the state, without an optimiser's where nothing is left to do."""
        optimiser = None if self.step == self.recipe.steps else self.optimiser.state_dict()
        state = {"step": self.step, "model": self.model.state_dict(), "curve": self.curve, "seconds": self.seconds}
        checkpoints = {step: path.name for step, path in self.checkpoints.items()}
        self.kept.write(state | {"optimiser": optimiser, "checkpoints": checkpoints})

    def take_up(self) -> None:
        """Go on from the state that is kept, if any; from the start where a checkpoint of it was deleted."""
        if (state := self.kept.read()) is None:
            return
        folders = {step: self.kept.folder / name for step, name in state["checkpoints"].items()}
        if not all(path.is_dir() for path in folders.values()):
            return
        for path in folders.values():
            check_sealed(path, path.name)
        self.model.load_state_dict(state["model"])
        if state["optimiser"]:
            self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.curve, self.seconds, self.checkpoints = state["step"], state["curve"], state["seconds"], folders


@contextlib.contextmanager
def _dropout(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Dropout of embeddings and of every block's two updates, while the model is in training mode."""

    def hook(module: nn.Module, _, output):
        if isinstance(output, tuple):
            return F.dropout(output[0], share, module.training), *output[1:]
        return F.dropout(output, share, module.training)

    places = [model.get_input_embeddings(), *(p for b in teachers.find_blocks(model) for p in (b.self_attn, b.mlp))]
    with contextlib.ExitStack() as hooks:
        for place in places if share else []:
            hooks.enter_context(place.register_forward_hook(hook))
        yield


# -- shipping ----------------------------------------------------------------------------------------------------------


def ship(mixture: Pretraining, twin: Pretraining, content: dict, folder: str | Path | None = None) -> Path:
    """Write the shipped model: final weights of both in bfloat16, the mixture's checkpoints in 8 bits, the record.

    `content` goes into training.json beside the number of steps. A folder is replaced when the new one is complete.
    """
    folder = Path(folder or sources.FOLDER)
    *early, last = sorted(mixture.checkpoints)
    with settings.new_folder(folder) as new:
        for run, place in ((mixture, new), (twin, new / "twin")):
            final = run.checkpoints[max(run.checkpoints)]
            AutoModelForCausalLM.from_pretrained(final, dtype=torch.bfloat16).save_pretrained(place)
            run.tokenizer.save_pretrained(place)
        (new / "checkpoints").mkdir()
        for step in early:
            weights = load_file(mixture.checkpoints[step] / "model.safetensors")
            sources.pack(weights, new / "checkpoints" / f"{step:06d}.safetensors")
        settings.write_json(new / "training.json", {"steps": last, **content})
    return folder
