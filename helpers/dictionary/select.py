"""How atoms are chosen: the family's sixth knob. Each sparsity rule of the dictionary literature is a routing rule.

    rule       the SAE's name                    the router's name
    token      TopK (Gao et al. 2024)            token choice (Shazeer et al. 2017)
    batch      BatchTopK (Bussmann et al. 2024)  the k·B best of a batch; behind training, scores above a threshold
    threshold  JumpReLU (Rajamanoharan 2024)     a threshold for each expert
    atom       feature choice (Ayonrinde 2024)   expert choice (Zhou et al. 2022): each expert takes its m best tokens
    groups     Switch SAE (Mudide et al. 2024)   group-limited routing (DeepSeek-V2): best groups first, k inside them
    always     dense latents                     shared experts (DeepSeek-MoE): the first few, and k − few of the rest
    positive   ReLU; with gate rows Gated        ReLU routing (ReMoE, Wang et al. 2024): every score above zero
    magnitude  AbsTopK (arXiv 2510.00404)        token choice by |score|

A rule turns scores [batch, n] into indices [batch, K] and a mask of the same shape that says which of them are chosen:
where inputs have different numbers of codes, K is the largest of them, and the rest of a row has value 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helpers.dictionary.rows import starts_by_row

Chosen = tuple[Int[Tensor, "batch K"], Bool[Tensor, "batch K"] | None]
RATE, BLOCK = 0.01, 64
"""Of the running mean of the smallest chosen score, BatchTopK's threshold behind training; rows that fit a cache."""


class Select(nn.Module):
    """One rule and its numbers; `Select()` is the k best of each input. `ValueError` for what no input can meet.

    Args:
        rule: a name in `RULES`.
        n_features: how many scores there are. Only "threshold" needs it, for θ [n_features].
        n_groups, groups: how many equal groups lie side by side, and how many, by their best score, are chosen from.
        always: how many first atoms every input has.
        threshold: where θ starts, for "threshold" a parameter, for "batch" a running mean; ≥ 0.
        bandwidth: ε of the rectangle that stands for the derivative of the step at θ (JumpReLU, eq. 11).
    """

    def __init__(
        self,
        rule: str = "token",
        n_features: int = 0,
        *,
        n_groups: int = 1,
        groups: int = 1,
        always: int = 0,
        threshold: float = 0.0,
        bandwidth: float = 1e-3,
    ):
        super().__init__()
        _allowed(rule in RULES, f"select={rule!r} is unknown", ", ".join(map(repr, RULES)))
        _allowed(1 <= groups <= n_groups, f"groups={groups} of n_groups={n_groups}", "1 to n_groups")
        _allowed(always >= 0, f"always={always}", "at least 0")
        _allowed(0 <= threshold < float("inf"), f"threshold={threshold}", "at least 0")
        _allowed(bandwidth > 0, f"bandwidth={bandwidth}", "above 0")
        self.rule, self.n_groups, self.groups, self.always, self.bandwidth = rule, n_groups, groups, always, bandwidth
        if rule == "threshold":
            _allowed(n_features > 0, f"n_features={n_features} for 'threshold'", "the number of scores")
            self.threshold = nn.Parameter(torch.full((n_features,), float(threshold)))
        elif rule == "batch":
            self.register_buffer("threshold", torch.tensor(float(threshold)))

    def check(self, k: int, n: int) -> None:
        """`ValueError` where this rule cannot choose k of n atoms."""
        own, room = f"select={self.rule!r}", n // self.n_groups * self.groups
        _allowed(n % self.n_groups == 0, f"{own}, n_groups={self.n_groups}", f"a divisor of n_features={n}")
        _allowed(k <= room, f"{own}, k={k}", f"up to {room}, the atoms of {self.groups} groups of {self.n_groups}")
        _allowed(self.always <= k, f"{own}, always={self.always}", f"up to k={k}")
        thresholds = len(self.threshold) if self.rule == "threshold" else n
        _allowed(thresholds == n, f"{own}: {thresholds} thresholds", f"n_features={n}")

    def forward(self, scores: Float[Tensor, "batch n"], k: int) -> Chosen:
        """Indices, and which of them count (None: all do)."""
        return RULES[self.rule](self, scores, k)

    def switch(self, values: Tensor, chosen: Tensor, indices: Tensor, on: Tensor) -> Tensor:
        """`values` where chosen, else 0; θ learns by the straight-through rule, from what lies within ε/2 of it."""
        if self.rule != "threshold":
            return values.where(on, 0)
        threshold = self.threshold[indices]
        return values.where(on, 0) + self._through(chosen, threshold, threshold)  # eq. 11

    def l0(self, scores: Float[Tensor, "batch n"], indices: Int[Tensor, "batch n"] | None = None) -> Float[Tensor, ""]:
        """Mean number of scores (of the atoms `indices`) above θ, which alone has a gradient (JumpReLU, eq. 12)."""
        threshold = self.threshold if indices is None else self.threshold[indices]
        return ((scores > threshold) + self._through(scores, threshold, torch.ones(()))).sum(1).mean()

    def _through(self, scores: Tensor, threshold: Tensor, height: Tensor) -> Tensor:
        """0, whose derivative for θ is −(height/ε) · rectangle((score − θ)/ε): that of a step of this height at θ."""
        window = (scores - threshold).abs() < self.bandwidth / 2  # never where θ is infinite: no number comes of that
        return (threshold.detach() - threshold).where(window, 0) * height.detach().where(window, 0) / self.bandwidth

    @torch.no_grad()
    def constrain_(self) -> None:
        """Below zero a threshold would let negative scores through."""
        if self.rule == "threshold":
            self.threshold.clamp_(min=0)

    @property
    def knobs(self) -> str:
        """The rule with its numbers, for tables and keys."""
        groups, width = f"{self.groups} of {self.n_groups}", f"width {self.bandwidth:g}"
        own = {"groups": groups, "always": self.always, "threshold": width}.get(self.rule)
        return self.rule if own is None else f"{self.rule} ({own})"


def _allowed(good: bool, given: str, what: str) -> None:
    if not good:
        raise ValueError(f"{given} cannot be; allowed: {what}")


def _token(select: Select, scores: Tensor, k: int) -> Chosen:
    return (scores.abs() if select.rule == "magnitude" else scores).topk(k, dim=1).indices, None


def _batch(select: Select, scores: Tensor, k: int) -> Chosen:
    if not select.training:
        return _positive(select, scores, k, select.threshold)
    values, indices = _reaching(scores, 2 * k, lambda best: best.flatten().topk(k * len(best)).values[-1])
    best, flat = values.flatten().topk(k * len(values))
    if (above := best[best > 0]).numel():  # the smallest that fires
        select.threshold.lerp_(above.min().to(select.threshold), RATE)
    counts = torch.bincount(flat.div(values.shape[1], rounding_mode="floor"), minlength=len(values))
    return _padded(indices[:, : _widest(counts)], counts)


def _threshold(select: Select, scores: Tensor, k: int) -> Chosen:
    near = -select.bandwidth / 2  # not chosen, but θ's gradient is theirs too
    margins, indices = _reaching(scores, 4 * k, lambda _: near, select.threshold.detach())
    return _padded(indices[:, : _widest((margins > near).sum(1))], (margins > 0).sum(1))


def _atom(select: Select, scores: Tensor, k: int) -> Chosen:
    """Each atom takes its k·batch / n best inputs, rounded, one at least; what an input gets depends on the others."""
    batch, n = scores.shape
    taken = min(batch, max(1, round(k * batch / n)))
    parts = (some.contiguous() for some in scores.split(BLOCK, dim=1))
    takers = torch.cat([part.topk(taken, dim=0).indices for part in parts], 1)
    order, starts = starts_by_row(takers, batch)
    atoms, counts = order % n, torch.bincount(takers.flatten(), minlength=batch)
    rows = torch.arange(batch, device=scores.device).repeat_interleave(counts)
    free = torch.ones(batch, _widest(counts), dtype=torch.int, device=scores.device)
    first = atoms < free.shape[1]
    free[rows[first], atoms[first]] = 0
    indices = free.argsort(dim=1, stable=True)  # at the places that stay padded: first atoms that are not chosen
    indices[rows, torch.arange(len(rows), device=scores.device) - starts[rows]] = atoms
    return _padded(indices, counts)


def _groups(select: Select, scores: Tensor, k: int) -> Chosen:
    inside = scores.unflatten(1, (select.n_groups, -1))
    best = inside.amax(2).topk(select.groups, dim=1).indices
    shut = torch.ones_like(inside[:, :, 0], dtype=torch.bool).scatter_(1, best, False)
    return inside.masked_fill(shut[:, :, None], -torch.inf).flatten(1).topk(k, dim=1).indices, None


def _always(select: Select, scores: Tensor, k: int) -> Chosen:
    first = torch.arange(select.always, device=scores.device).expand(len(scores), -1)
    rest = scores[:, select.always :].topk(k - select.always, dim=1).indices + select.always
    return torch.cat([first, rest], dim=1), None


def _positive(select: Select, scores: Tensor, k: int, above: Tensor | float = 0.0) -> Chosen:
    """Every score above that; a row is padded by its next best."""
    counts = (scores > above).sum(1)
    return _padded(scores.topk(_widest(counts), dim=1).indices, counts)


def _widest(counts: Tensor) -> int:
    return max(1, int(counts.max()))


def _padded(indices: Tensor, counts: Tensor) -> Chosen:
    """Indices, and which of them count."""
    return indices, torch.arange(indices.shape[1], device=indices.device) < counts[:, None]


def _reaching(scores: Tensor, start: int, floor: Callable, shift: Tensor | None = None) -> list[Tensor]:
    """The best of each row less `shift`, values and indices, so many that none is left out that reaches the floor,
    which the first `start` of each row set: to look through all of them in order takes longer."""
    width, n = min(start, scores.shape[1]), scores.shape[1]
    for enough in (width == n, True):
        parts = [(part if shift is None else part - shift).topk(width) for part in scores.split(BLOCK)]
        values, indices = (torch.cat(each) for each in zip(*parts, strict=True))
        low = floor(values)  # with more of them it can only rise
        if enough or not bool((values[:, -1] >= low).any()):
            break
        width = _widest((scores >= low if shift is None else scores - shift >= low).sum(1))
    return [values, indices]


NAMED = (_token, _batch, _threshold, _atom, _groups, _always, _positive)
RULES: dict[str, Callable[..., Chosen]] = {rule.__name__[1:]: rule for rule in NAMED} | {"magnitude": _token}
