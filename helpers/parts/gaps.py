"""Three knobs between a TopK SAE and the layer of a mixture of experts, each turned alone: rank, training, objective.

Every student sees the same pieces of text and is judged on held-out articles: FVU, nats added to the model's loss, dead
atoms.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers.dictionary import RankOneDictionary
from helpers.models import activations
from helpers.models.corpora import SPLITS
from helpers.models.teachers import Splice, Teacher
from helpers.parts.language_model import ablated, by_article
from helpers.settings import allowed, one_of
from helpers.study.scores import FEWEST, by_group, evaluate
from helpers.study.study import Judged, Outcome, sums
from helpers.training import Shuffled

SITE = {"reconstruct": "mlp_in", "predict": "mlp_out"}
"""Where a student's output stands: a reconstruction goes into the MLP, a prediction takes the MLP's place."""


# -- the layer, and students in it -------------------------------------------------------------------------------------


KEPT_BYTES = 2**29
"""Of what entered a layer, at most: a long run's side-by-side students, a quick run's all."""


def _bytes(output: Any) -> int:
    """Of what a block returns: a tensor, or several with other things among them."""
    parts = output if isinstance(output, tuple) else (output,)
    return sum(each.nbytes for each in parts if isinstance(each, Tensor))


class FrozenLayer:
    """One layer of a frozen model, harvested: by split `stores` of the rows that enter and leave its MLP, the `pieces`
    of text they come from (cut by `activations.texts(teacher, **texts[split])`), and the model's loss there.

    Students see rows divided by one number for each site (the root of the training rows' mean variance). `sizes` are
    the tokens of train, validation and test. Raises `ValueError` for a split without a size, for test text of fewer
    than five articles, over which no interval can be given, and what `activations.harvest` raises.
    """

    def __init__(
        self,
        teacher: Teacher,
        corpus: str,
        *,
        layer: int,
        sizes: Mapping[str, int],
        max_length: int = 128,
        cache_dir: str | Path | None = None,
    ):
        allowed(set(sizes) == set(SPLITS), f"sizes={dict(sizes)}", f"one for each of {', '.join(SPLITS)}")
        self.teacher, self.number, how = teacher, layer, {"corpus": corpus, "max_length": max_length}
        self.texts = {split: how | {"split": split, "n_tokens": n} for split, n in sizes.items()}
        self.pieces = {split: activations.texts(teacher, **each) for split, each in self.texts.items()}
        articles = len(np.unique(self.pieces["test"].articles))
        given = f"corpus={corpus!r}: {sizes['test']} held-out tokens come from {articles} documents"
        allowed(articles >= FEWEST, given, f"at least {FEWEST}, by more tokens or a corpus of {3 * FEWEST} documents")
        where = {"layer": layer, "sites": list(SITE.values()), "cache_dir": cache_dir}
        self._entered: dict[Hashable, Any] = {}
        self.stores = {split: activations.harvest(teacher, **where, **each) for split, each in self.texts.items()}

    @property
    def asked(self) -> list:
        """What determines it, for keys."""
        return [self.teacher.fingerprint, self.number, {split: store.key for split, store in self.stores.items()}]

    @cached_property
    def scale(self) -> dict[str, float]:
        return {site: self.stores["train"].moments(site).variance ** 0.5 for site in SITE.values()}

    def mean(self, site: str) -> Float[Tensor, " d"]:
        """Mean of the training rows, divided as they are."""
        return (self.stores["train"].moments(site).mean / self.scale[site]).float()

    def rows(self, split: str, site: str) -> Float[Tensor, "rows d"]:
        return self.stores[split].tensor(site) / self.scale[site]

    def nats(self, split: str, splice: Splice | None = None) -> pd.DataFrame:
        """`by_article` of the model on a split."""
        with self.resumed(split):
            return by_article(self.teacher, self.pieces[split], splice)

    @contextlib.contextmanager
    def resumed(self, what: Hashable) -> Iterator[None]:
        """Within it the blocks before the layer run once for each text, and return what they did where it comes again.

        `what` names the texts, which come in the same order each time.
        """
        blocks, calls = self.teacher.blocks[: self.number], itertools.count()

        def instead(block: nn.Module, forward: Callable, *args, **kwargs):
            text = what, next(calls) // len(blocks)  # each text passes through all blocks before the next one comes
            if text in self._entered:
                return self._entered[text]
            output = forward(*args, **kwargs)
            if block is blocks[-1]:
                self._entered[text] = output
                while sum(map(_bytes, self._entered.values())) > KEPT_BYTES:
                    del self._entered[next(iter(self._entered))]  # the oldest
            return output

        with contextlib.ExitStack() as patched:
            for block in blocks:
                patched.enter_context(mock.patch.object(block, "forward", partial(instead, block, block.forward)))
            yield

    @cached_property
    def unspliced(self) -> dict[str, Float[np.ndarray, " articles"]]:
        """What every splice is compared with, by test article: the loss `clean`, with the MLP's output at `zero` and
        at its training `mean`, and the `tokens` predicted."""
        clean, mean = self.nats("test"), self.stores["train"].moments("mlp_out").mean
        columns = {"clean": clean.nats.to_numpy(), "tokens": clean.tokens.to_numpy(float)}
        return columns | ablated(self.teacher, self.pieces["test"], self.number, "mlp_out", mean)


@dataclass(frozen=True, eq=False)
class StandIn:
    """The problem of a student in a layer (`study.Problem`): it reads what enters the MLP, and its output goes into the
    MLP ("reconstruct"), or takes the place of what the MLP returns ("predict").

    Args:
        batch_size: pieces of text in a batch.
        judged: splits that students are judged on; rates are chosen on "validation" alone.
    """

    layer: FrozenLayer
    objective: str
    steps: int
    batch_size: int
    judged: tuple[str, ...] = SPLITS[1:]

    def __post_init__(self):
        one_of("objective", self.objective, SITE)

    @property
    def site(self) -> str:
        return SITE[self.objective]

    @property
    def biases(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Where b_in and b_out start."""
        return self.layer.mean("mlp_in"), self.layer.mean(self.site)

    def stream(self, seed: int, device: torch.device) -> PieceStream:
        return PieceStream(self, seed)

    def splice(self, student: nn.Module) -> Splice:
        """The student in its place in the model."""
        where, scale = next(student.parameters()), self.layer.scale

        def put(rows: Tensor) -> Tensor:
            return student(rows.to(where.device, where.dtype) / scale["mlp_in"]) * scale[self.site]

        return Splice(self.layer.number, "mlp_in" if self.objective == "reconstruct" else "mlp", put)

    def judge(self, student: nn.Module, seed: int) -> Judged:
        """Sums by test article: `errors` and `norms` of the site, `nats` of the spliced model and of `unspliced` ones.

        `about`: how often each atom is active, parameters, multiply-adds of a token and the router's part of them
        (those are of the family's members; None elsewhere).
        """
        splice = self.splice(student)
        spliced = {split: self.layer.nats(split, splice) for split in self.judged}
        seen = {
            split: evaluate(student, *(self.layer.rows(split, site) for site in ("mlp_in", self.site)))
            for split in self.judged
        }
        rates, unseen = seen[self.judged[-1]].rates.numpy(), spliced["validation"]
        own = student if isinstance(student, RankOneDictionary) and student.k else None
        about = {
            "objective": self.objective,
            "rates": rates,
            "parameters": sum(p.numel() for p in student.parameters()),
            "multiply_adds": own and own.multiply_adds,
            "router": own and own.router.weight.numel(),
        }
        validation = {"fvu": seen["validation"].fvu, "nats": float(unseen.nats.sum() / unseen.tokens.sum())}
        validation["dead"] = seen["validation"].dead if len(rates) else 0.0
        if "test" not in self.judged:
            return Judged({}, validation, about)
        rows = {"errors": seen["test"].squared_error, "norms": seen["test"].squared_norm}
        found = {name: by_group(values, self.layer.stores["test"].article) for name, values in rows.items()}
        found |= {"nats": spliced["test"].nats.to_numpy()} | self.layer.unspliced
        return Judged(found, validation, about)


class PieceStream:
    """Batches of whole pieces of text, each epoch in a new order: rows for errors, and tokens for the model's loss."""

    def __init__(self, problem: StandIn, seed: int):
        self.layer, self.site, rows = problem.layer, problem.site, problem.layer.stores["train"].rows
        self.lengths = np.bincount(rows["text"], minlength=len(self.layer.pieces["train"].tokens))
        self.starts = np.cumsum(self.lengths) - self.lengths
        about = {"batch_size": problem.batch_size, "seed": seed, "fingerprint": f"pieces of {self.layer.asked}"}
        self.numbers = Shuffled(np.arange(len(self.lengths)), **about)
        self.fingerprint = f"{self.numbers.fingerprint} at {self.site}"

    def pieces(self, step: int) -> list[int]:
        """Numbers of the pieces of this step's batch."""
        return self.numbers(step)[0].tolist()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in self.pieces(step)])
        store, scale = self.layer.stores["train"], self.layer.scale
        inputs, targets = (store.tensor(site, rows) / scale[site] for site in ("mlp_in", self.site))
        return inputs, targets

    def tokens(self, step: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Ids and mask of the same batch, whose kept tokens are the rows of `__call__` in the same order."""
        return self.layer.pieces["train"].padded(self.pieces(step))


# -- what is said of students ------------------------------------------------------------------------------------------


def whole(model: Teacher, on: FrozenLayer, seeds: Sequence[int]) -> list[Outcome]:
    """Another model on the layer's held-out text, as if its loss were that of a splice; it has no FVU.

    Raises `ValueError` where it cuts the text into other tokens: nats per token would be of different things.
    """
    cut = activations.texts(model, **on.texts["test"]), on.pieces["test"]
    theirs, ours = ([piece.tolist() for piece in pieces.tokens] for pieces in cut)
    allowed(theirs == ours, f"model={model.name!r} has another tokenizer", f"that of {on.teacher.name!r}")
    columns = {"nats": by_article(model, on.pieces["test"]).nats.to_numpy()} | on.unspliced
    return [Outcome(columns, {}, seed=seed) for seed in seeds]


def row(outcomes: Sequence[Outcome], tried: Mapping[float, Outcome]) -> dict[str, object]:
    """A student as a table and a results file have it; intervals are 95 %, over articles and seeds. `tried` are the
    outcomes at each learning rate, first seed."""
    first, table = outcomes[0], sums({"": outcomes})
    fvu, added = table.fvu(""), table.compare(lambda cell: cell.added)
    rates = [np.asarray(each.about["rates"]) for each in outcomes]
    return {
        "cell": first.arm.name,
        "objective": first.about["objective"],
        "signal": first.arm.remedy.signal,
        "switch": first.arm.remedy.switch,
        "fvu": fvu.value,
        "fvu_ci": fvu.ci,
        "added": added.value,
        "added_ci": added.ci,
        "recovered": table.compare(lambda cell: cell.ce_recovered(), level=None).value,
        "recovered_mean": table.compare(lambda cell: cell.ce_recovered("mean"), level=None).value,
        "dead": float(np.mean([(each == 0).mean() for each in rates])) if all(map(len, rates)) else None,
        "lr": first.arm.lr,
        "tried": {f"{lr:g}": [each.validation["nats"], each.validation["fvu"]] for lr, each in tried.items()},
        **{name: first.about[name] for name in ("parameters", "multiply_adds", "router")},
        "seeds": len(outcomes),
        "seconds": round(sum(each.seconds for each in outcomes), 1),
    }
