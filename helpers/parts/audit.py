"""Somebody's dictionary, read as a mixture of rank-1 experts, and what the field's libraries say of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from transformers import AutoConfig

from helpers import settings
from helpers.dictionary import RankOneDictionary, load_packed, load_saelens
from helpers.dictionary.files import CONFIG
from helpers.dictionary.rows import unit
from helpers.models import activations, sources
from helpers.models.teachers import Splice, Teacher
from helpers.parts.inside import effective_experts
from helpers.parts.language_model import DENSE, Sae, SiteRows, ablated, by_article
from helpers.settings import allowed
from helpers.study.scores import Totals, by_group
from helpers.study.study import Arm, trained
from helpers.training.remedies import Balance, Switch

BATCH = 512
"""Rows whose scores are held at once."""
TWINS, ALIKE = 1024, 0.9
"""Of so many live atoms it is asked whether another lies within this cosine."""


# -- where it comes from -----------------------------------------------------------------------------------------------


def read_sae(source: str) -> RankOneDictionary:
    """An SAE in SAELens' format (a folder, or `release:sae_id` through the installed sae_lens) or packed (a file)."""
    path = settings.place("sae", source)
    named = ":" in source and not path.exists()
    here = "a folder, a packed file, release:sae_id, or 'book'"
    allowed(named or path.exists(), f"sae={source!r}: there is no such file or folder", here)
    try:
        sae = load_packed(path) if path.is_file() else load_saelens(source if named else path)
    except ValueError as error:
        raise ValueError(f"sae={source!r}: {error}") from error
    return sae.to(torch.promote_types(sae.decoder.weight.dtype, torch.float32)).eval()


def written(source: str) -> dict[str, str]:
    """What the file says of itself: its architecture, and where SAELens hooked which model."""
    path = settings.place("sae", source) / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"architecture": source}
    about = config.get("metadata")
    found = config | (about if isinstance(about, dict) else {})
    return {name: str(found[name]) for name in ("architecture", "model_name", "hook_name") if found.get(name)}


def check(sae: RankOneDictionary, source: str, teacher: str, site: str, cache_dir: str | Path | None = None) -> str:
    """The site that the dictionary gives back; `ValueError` where it cannot read `site` of this teacher.

    The teacher is not loaded for it. A transcoder reads what enters the MLP and gives what leaves it.
    """
    width = _width(teacher, cache_dir) or sae.d_in
    given = f"sae={source!r} maps {sae.d_in} numbers to {sae.d_out}"
    allowed(sae.d_in == sae.d_out == width, given, f"{width} to {width}, the width of teacher={teacher!r}")
    if "transcoder" not in written(source).get("architecture", ""):
        return site
    allowed(site == "mlp_in", f"site={site!r} with sae={source!r}, a transcoder", "'mlp_in'")
    return "mlp_out"


def _width(teacher: str, cache_dir: str | Path | None) -> int | None:
    """What a teacher's configuration says; None where it says nothing, or loading it will say what is wrong."""
    place = Path(teacher).expanduser()
    source, _, hub = (place, None, {}) if place.is_dir() else sources.find(teacher, None, cache_dir)
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(decoder=True), "hidden_size", None)


@dataclass(frozen=True)
class Book:
    """The book's own SAE, trained as chapter 9 does with b_dec from the mean: nothing done for dead latents, or load
    balancing of the weight `balance`. It reads rows as the model has them."""

    corpus: str
    layer: int
    site: str
    n_tokens: int
    n_features: int
    k: int
    steps: int
    lr: float
    balance: float = 0.0
    batch_size: int = 1024

    def train(self, teacher: Teacher, seed: int = 0, device: str = "cpu", cache_dir=None) -> RankOneDictionary:
        """One of them; its buffer `quiet` says for how many steps each latent had been silent at the end."""
        options = {"layer": self.layer, "sites": (self.site,), "cache_dir": cache_dir}
        stores = {
            split: activations.harvest(teacher, self.corpus, n_tokens=n, split=split, **options)
            for split, n in {"train": self.n_tokens, "validation": 256, "test": 256}.items()
        }
        folders = {split: str(store.folder) for split, store in stores.items()}
        problem = SiteRows(folders, self.site, self.steps, min(self.batch_size, stores["train"].n))
        remedy = Switch(self.balance) if self.balance else Balance()
        arm = Arm("SAE", Sae(self.n_features, self.k, centred=True), remedy, self.lr)
        fit = trained(problem, arm, seed, device=device, cache_dir=cache_dir)
        sae = fit.student.cpu()
        sae.register_buffer("quiet", fit.silent.cpu())
        with torch.no_grad():  # TopK and ReLU commute with a factor
            sae.b_out.mul_(problem.scale)
            sae.encoder.bias.mul_(problem.scale)
        return sae.eval()


# -- one pass over rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """A dictionary on rows: `sums` by article (columns as `unexplained` and `load` take them), and of each row the
    number of its `codes` and its router's `gap` (`margins`)."""

    sums: dict[str, np.ndarray]
    codes: Int[Tensor, " rows"]
    gap: Float[Tensor, " rows"]


@torch.no_grad()
def measured(
    sae: RankOneDictionary,
    inputs: Float[Tensor, "rows d_in"],
    targets: Float[Tensor, "rows d_out"],
    article: Int[np.ndarray, " rows"],
) -> Reading:
    """Everything that the chapter says of a dictionary on rows, but the model's loss.

    Columns: `rows`, `counts` (of firings, by latent), `codes`; `errors` Σ‖e‖², `squares` Σ‖y‖², `error` Σe, `row` Σy,
    `ratios` Σ‖e‖²/‖y − ȳ‖² with ȳ of all rows; `flips`, rows whose choice changes where inputs are cut to bfloat16.
    """
    names, group = np.unique(np.asarray(article), return_inverse=True)
    mean, where = targets.double().mean(0), next(sae.parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in ("codes", "gap", "errors", "squares", "ratios", "flips")}
    counts = torch.zeros(len(names), sae.n_atoms, dtype=torch.long)
    error, row = (torch.zeros(len(names), targets.shape[1], dtype=torch.float64) for _ in range(2))
    for part in torch.arange(len(inputs)).split(BATCH):
        x, y = inputs[part].to(where.device, where.dtype), targets[part].double()
        trace = sae.trace(x)
        on, e, own = chosen(sae, trace.scores), y - trace.output.cpu().double(), torch.from_numpy(group[part])
        fires = trace.codes.fires.cpu()
        cells = own[:, None] * sae.n_atoms + trace.codes.indices.cpu()
        counts += torch.bincount(cells[fires], minlength=counts.numel()).view_as(counts)
        error.index_add_(0, own, e)
        row.index_add_(0, own, y)
        squared = e.square().sum(1)
        found = {"codes": fires.sum(1), "gap": margins(sae, trace.scores, on), "errors": squared}
        found |= {"squares": y.square().sum(1), "ratios": squared / (y - mean).square().sum(1)}
        found |= {"flips": (chosen(sae, sae.trace(x.bfloat16().to(x)).scores) != on).any(1)}
        for name, values in found.items():
            rows[name].append(values.cpu())
    whole = {name: torch.cat(parts) for name, parts in rows.items()}
    sums = {name: by_group(whole[name].double(), group) for name in ("errors", "squares", "ratios", "flips", "codes")}
    sums |= {"rows": np.bincount(group).astype(float), "counts": counts.numpy()}
    return Reading(sums | {"error": error.numpy(), "row": row.numpy()}, whole["codes"], whole["gap"])


def chosen(sae: RankOneDictionary, scores: Float[Tensor, "batch n"]) -> Bool[Tensor, "batch n"]:
    """The router's choice as a mask over all experts."""
    indices, on = sae.select(scores, sae.k)
    on = torch.ones_like(indices, dtype=torch.bool) if on is None else on
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, on)


def margins(
    sae: RankOneDictionary, scores: Float[Tensor, "batch n"], on: Bool[Tensor, "batch n"]
) -> Float[Tensor, " batch"]:
    """How far the last chosen expert is ahead of the first that was not: difference of their scores, less thresholds,
    in standard deviations of the token's scores. NaN where all or none are chosen."""
    threshold = getattr(sae.select, "threshold", torch.zeros(()))
    ranked = scores.abs() if sae.select.rule == "magnitude" else scores - threshold.to(scores)
    last, first = ranked.masked_fill(~on, torch.inf).amin(1), ranked.masked_fill(on, -torch.inf).amax(1)
    gap = (last - first) / scores.std(1)
    return gap.where(gap.isfinite(), torch.nan)


# -- what is said of it ------------------------------------------------------------------------------------------------


def load(counts: Num[np.ndarray, " n"], rows: float) -> dict[str, float]:
    """A mixture's diagnostics from how often each expert served: experts in effect (exp of the load's entropy), max
    violation (Wang et al. 2024: the busiest's load over the mean, less 1), the rate of the busiest, the share of
    experts that take nine tenths of the load, and the shares that are dead or dense."""
    counts = np.asarray(counts, dtype=float)
    share, rates = np.sort(counts / max(counts.sum(), 1))[::-1], counts / rows
    return {
        "in_effect": effective_experts(torch.from_numpy(share.copy())),
        "max_violation": float(share[0] * len(share) - 1),
        "busiest": float(rates.max()),
        "nine_tenths": float((np.searchsorted(share.cumsum(), 0.9) + 1) / len(share)),
        "dead": float((counts == 0).mean()),
        "dense": float((rates > DENSE).mean()),
    }


def twins(sae: RankOneDictionary, counts: Num[np.ndarray, " n"]) -> float:
    """Share of live atoms that write along another live one: what a mixture calls collapsed experts."""
    vectors = unit(sae.decoder.vectors().detach().cpu().float()[np.asarray(counts) > 0])
    asked = torch.randperm(len(vectors), generator=settings.generator(0))[:TWINS]
    cosines = vectors[asked] @ vectors.T
    cosines[torch.arange(len(asked)), asked] = -1
    return float((cosines.amax(1) > ALIKE).double().mean()) if len(vectors) > 1 else 0.0


def silent(counts: Num[np.ndarray, "... n"], share: float = 1.0) -> float:
    """Share of latents that a random part of the text of this size would show as dead: rarefaction."""
    return float(((1 - share) ** np.asarray(counts, dtype=float)).mean())


def unexplained(total: Totals) -> dict[str, float]:
    """What is left unexplained, by each library's formula, from the sums of `measured`.

    `mean` is FVU; `offset` forgives the error its mean (dictionary_learning 0.1); `tokens` is the mean of the tokens'
    own ratios (`explained_variance_legacy` of SAELens and SAEBench); `scalar` measures from one number, the mean of all
    entries (overcomplete 0.3); `zero` from the origin; `squared` takes the square of the mean square for that of the
    mean (SAEBench 0.6): about zero where rows have length √d, and of no meaning in other units.
    """
    rows, errors, squares = total["rows"], total["errors"], total["squares"]
    d = total["row"].shape[-1]
    spread = (squares - (total["row"] ** 2).sum(-1) / rows).sum()
    return {
        "mean": errors.sum() / spread,
        "offset": (errors - (total["error"] ** 2).sum(-1) / rows).sum() / spread,
        "tokens": total["ratios"].sum() / rows.sum(),
        "scalar": errors.sum() / (squares - total["row"].sum(-1) ** 2 / (rows * d)).sum(),
        "zero": errors.sum() / squares.sum(),
        "squared": (errors / rows).sum() / (squares / rows - (squares / rows / d) ** 2).sum(),
    }


def in_other_units(sums: Mapping[str, np.ndarray], factor: float, less: Float[np.ndarray, " d"]) -> dict:
    """The sums of the same errors where rows are y − `less`, and all is multiplied by `factor`."""
    rows, row = sums["rows"][:, None], sums["row"]
    squares = sums["squares"] - 2 * row @ less + sums["rows"] * (less @ less)
    moved = {"errors": factor**2 * sums["errors"], "squares": factor**2 * squares}
    return dict(sums) | moved | {"error": factor * sums["error"], "row": factor * (row - rows * less)}


def losses(
    teacher: Teacher,
    functions: Mapping[Hashable, Callable[[Tensor], Tensor]],
    *,
    corpus: str,
    n_tokens: int,
    layer: int,
    sites: tuple[str, str],
    mean: Float[Tensor, " d_model"],
) -> tuple[dict[str, np.ndarray], dict[Hashable, np.ndarray]]:
    """The model's loss by article: `clean`, with `zero` and with the `mean` in the place of the second of `sites`, and
    its `tokens`; and with what each function makes of the first one's rows there."""
    pieces, (reads, gives) = activations.loss_texts(teacher, corpus, n_tokens), sites
    clean = by_article(teacher, pieces)
    shared = {"clean": clean.nats.to_numpy(), "tokens": clean.tokens.to_numpy()}
    shared |= ablated(teacher, pieces, layer, gives, mean)
    place = gives if reads == gives else "mlp"
    splices = {name: Splice(layer, place, function) for name, function in functions.items()}
    return shared, {name: by_article(teacher, pieces, each).nats.to_numpy() for name, each in splices.items()}
