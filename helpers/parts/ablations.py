"""Students of which one thing is changed: their errors compared in pairs, pure mixtures built to equal students with
a shared part, and what single experts respond to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.dictionary import RankOneDictionary, Rows
from helpers.parts.distilling import Distillation, Spec, Task, judge, judged, train
from helpers.study.scores import Comparison, compared
from helpers.training import Fit

# -- errors in pairs ---------------------------------------------------------------------------------------------------


def compare(
    students: Sequence[Distillation], statistic: Callable[[Float[np.ndarray, " students"]], float], **bootstrap
) -> Comparison:
    """`statistic` of the students' summed squared test errors, resampled in pairs: a draw of seeds and articles is
    the same for all of them. Where the inputs are Gaussian, an "article" is the rows that stand in for its own.

    Raises:
        ValueError: when tasks or seeds differ, since then errors are not in pairs.
    """
    told = sorted({(each.task, tuple(s.seed for s in each.students)) for each in students})
    if len(told) != 1:
        raise ValueError(f"students differ in task or seeds, {told}; allowed: one task and the same seeds")
    data = np.stack([each.errors for each in students], axis=-1)

    def of(errors: np.ndarray) -> float:
        return float(statistic(errors.sum((0, 1))))

    return compared(data, of, **bootstrap)


def ratio(over: Distillation, under: Distillation, **bootstrap) -> Comparison:
    """FVU of the first student over FVU of the second."""
    return compare([over, under], lambda errors: errors[0] / errors[1], **bootstrap)


def every_rate(
    given: Task,
    spec: Spec,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 1024,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> dict[float, Distillation]:
    """As `distil`, but every learning rate is trained with every seed, and each is judged on the test rows.

    The first seed's runs are those that `distil` makes to choose among `lrs`, so finished ones are found.
    """
    if not lrs or not seeds:
        raise ValueError(f"lrs={list(lrs)}, seeds={list(seeds)}; allowed: at least one of each")
    how = {"steps": steps, "batch_size": batch_size, "device": device, "cache_dir": cache_dir, **recipe}
    fits, found = {seed: train(given, spec, lrs, seed, **how) for seed in seeds}, {}
    for lr in lrs:
        first, students = fits[seeds[0]][lr], [judged(given, spec, seed, lr, fits[seed][lr]) for seed in seeds]
        validation = {lr: judge(given, "validation", first.student).fvu}
        on_test, curves = {lr: students[0].fvu}, {lr: (first.steps, first.loss)}
        found[lr] = Distillation(given.name, spec, students, validation, on_test, curves)
    return found


def settled(fits: Sequence[Fit], share: float = 0.1, **bootstrap) -> Comparison:
    """Training loss in the middle of a run over that at its end, for runs of one length with several seeds.

    Each is the mean over a window of `share` of the run, the middle one centred on half. The interval resamples runs
    and logged batches. Rows of a training batch are not held out: the loss is FVU on rows of which some are known.
    """
    total = len(fits[0].loss)
    width = round(share * total)
    if width < 2 or not 0 < share <= 0.5:
        raise ValueError(f"share={share} of {total} logged steps is {width}; allowed: at least 2, and at most half")
    middle = (total - width) // 2
    loss = np.array([fit.loss for fit in fits])
    data = np.stack([loss[:, middle : middle + width], loss[:, total - width :]], axis=-1)

    def of(some: np.ndarray) -> float:
        half, end = some.sum((0, 1))
        return float(half / end)

    return replace(compared(data, of, **bootstrap), n=width)


# -- pure mixtures that equal a student with a shared part, or try to --------------------------------------------------


def _shared_part(student: RankOneDictionary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shared MLP as S neurons: rows they read [S, d_in], biases [S], rows they write [S, d_out], output bias."""
    if student.shared is None or not student.k or student.activation != "gelu" or student.expert_rank != 1:
        raise ValueError(f"{student.knobs} is no student of single GELU neurons beside a shared MLP; allowed: one")
    if student.b_in is not None or student.b_out is not None or student.selection_bias is not None:
        raise ValueError("the student has b_in, b_out or a selection bias; allowed: none of them")
    first, _, second = student.shared
    return tuple(part.detach() for part in (first.weight, first.bias, second.weight.T, second.bias))


def always_chosen(student: RankOneDictionary, inputs: Float[Tensor, "n d_in"]) -> RankOneDictionary:
    """A pure mixture with as many active neurons: the shared neurons are experts that win on all of `inputs`.

    Their scores are one constant above all others, by a bias that the router is given. With hard gates this is the
    student. With a softmax it is not: a routed gate is exp(s_j) / (S·exp(c) + Z), Z the sum of exp over the chosen
    scores, where the student has exp(s_j) / Z. We subtract from all s_j the affine function of x that is nearest to
    ln Z on `inputs`, which a softmax over the k does not notice, and size the decoder for Z = 1. What is left of ln Z
    is the error.

    Raises:
        ValueError: for a student that is not one of single GELU neurons beside a shared MLP.
    """
    (read, read_bias, write, b_out), router = _shared_part(student), student.router
    x, count = inputs.to(read.dtype), len(read)
    rows = (router.weight if router.down is None else router.weight @ router.down).detach()
    bias = rows.new_zeros(len(rows)) if router.bias is None else router.bias.detach()
    if soft := student.gate == "softmax":
        log_z = (x @ rows.T + bias).topk(student.k).values.logsumexp(1)
        wide = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        nearest = torch.linalg.lstsq(wide, log_z[:, None], driver="gelsd").solution[:, 0]
        rows, bias = rows - nearest[:-1], bias - nearest[-1]
    top = float((x @ rows.T + bias).max()) + 1
    for_shared, for_routed = (count + math.exp(-top), count * math.exp(top) + 1) if soft else (1.0, 1.0)
    return RankOneDictionary(
        Rows(torch.cat([read, student.encoder.weight]), torch.cat([read_bias, student.encoder.bias])),
        Rows(torch.cat([for_shared * write, for_routed * student.decoder.weight])),
        k=count + student.k,
        router=Rows(torch.cat([torch.zeros_like(read), rows]), torch.cat([torch.full_like(read_bias, top), bias])),
        gate=student.gate,
        activation=student.activation,
        b_out=b_out,
    )


def with_copies(student: RankOneDictionary) -> RankOneDictionary:
    """The pure softmax mixture that equals the student: every expert brings a copy of all S shared neurons.

    Router rows repeat S + 1 times, so a chosen expert's block ties with itself and comes whole. The gates of a shared
    neuron's copies add up to 1/(S + 1), whatever was chosen. k·(S + 1) neurons are active, of E·(S + 1).

    Raises:
        ValueError: for other gates than a softmax, or as `always_chosen`.
    """
    (read, read_bias, write, b_out), router = _shared_part(student), student.router
    if student.gate != "softmax":
        raise ValueError(f"gate={student.gate!r} needs no copies; allowed: 'softmax'")
    block = len(read) + 1

    def blocks(shared: Tensor, own: Tensor) -> Tensor:
        return torch.cat([shared.expand(student.n_features, *shared.shape), own[:, None]], 1).flatten(0, 1)

    bias = None if router.bias is None else router.bias.detach().repeat_interleave(block)
    return RankOneDictionary(
        Rows(blocks(read, student.encoder.weight), blocks(read_bias, student.encoder.bias)),
        Rows(block * blocks(write, student.decoder.weight)),
        k=student.k * block,
        router=Rows(router.weight.detach().repeat_interleave(block, 0), bias, router.down),
        gate="softmax",
        activation=student.activation,
        b_out=b_out,
    )


# -- what an expert responds to ----------------------------------------------------------------------------------------


@torch.no_grad()
def strongest(
    model: RankOneDictionary, inputs: Float[Tensor, "n d_in"], count: int, *, batch_size: int = 4096
) -> list[Int[np.ndarray, " rows"]]:
    """For each atom the rows of `inputs` on which its value is largest in size, the strongest first; at most `count`,
    fewer where it fires on fewer."""
    if count < 1:
        raise ValueError(f"count={count} shows nothing; allowed: at least 1")
    where, rows, atoms, sizes = next(model.parameters()), [], [], []
    for start in range(0, len(inputs), batch_size):
        codes = model.encode(inputs[start : start + batch_size].to(where.device, where.dtype))
        row, place = codes.fires.nonzero(as_tuple=True)
        rows.append((row + start).cpu())
        atoms.append(codes.indices[row, place].cpu())
        sizes.append(codes.values[row, place].abs().cpu())
    row, atom, size = (torch.cat(parts).numpy() for parts in (rows, atoms, sizes))
    order = np.lexsort((-size, atom))
    starts = np.searchsorted(atom[order], np.arange(model.n_atoms + 1))
    return [row[order[a : min(b, a + count)]] for a, b in itertools.pairwise(starts)]


def concentration(rows: Sequence[Int[np.ndarray, " _"]], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " a"]:
    """For each list of rows, the share of its commonest label (token, article)."""
    return np.array([np.unique(labels[some], return_counts=True)[1].max() / len(some) for some in rows])
