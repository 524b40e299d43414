"""The one family behind the book: sums of a few rank-one terms, chosen per input.

    y(x) = b_out + shared(x) + Σ_{j ∈ TopK_k(s(x) + c)}  g_j(x) · a(e_j·(x − b_in) + β_j) · d_j

A `RankOneDictionary` is three lists of row vectors (`Rows`): the router's (whose scores s choose), the encoder's (e_j)
and the decoder's (d_j). Two roles that are played by the same `Rows` object are tied. Everything else is a small knob:
the gate g, the activation a, the shared network, the selection bias c, the rule of choosing (`Select`; TopK unless it
is given). Each paper's model is a short constructor.

No function here builds the dense [batch, n] matrix of codes; only the router's scores are dense.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.dictionary.packed import Packed
from helpers.dictionary.rows import Rows, Scaled, SparseCodes, Trace, as_parameter
from helpers.dictionary.screening import Halved
from helpers.dictionary.select import Select

GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard": lambda chosen, scores: torch.ones_like(chosen),
    "softmax": lambda chosen, scores: chosen.softmax(-1),
    "softmax times k": lambda chosen, scores: chosen.shape[-1] * chosen.softmax(-1),
    "softmax before": lambda chosen, scores: (chosen - scores.logsumexp(-1, keepdim=True)).exp(),
    "sigmoid": lambda chosen, scores: chosen.sigmoid() / chosen.sigmoid().sum(-1, keepdim=True).clamp_min(1e-20),
    "score": lambda chosen, scores: chosen,
}
"""Gate weights from the chosen scores: all one; a softmax over the chosen, which sums to one or averages one; over all
before choosing (OLMoE), which has a dense backward pass; sigmoids that sum to one (DeepSeek-V3); the score itself."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "square": torch.square,
    "cube": lambda z: z**3,
}


class RankOneDictionary(nn.Module):
    """y(x) = b_out + shared(x) + Σ_{j ∈ TopK_k(s(x) + c)} g_j(x) · a(e_j·(x − b_in) + β_j) · d_j.

    Args:
        encoder: the e_j with biases β_j, n·expert_rank rows of width d_in.
        decoder: the d_j, n·expert_rank rows of width d_out. The same object as `encoder` ties d = e.
        k: how many router rows are chosen per input.
        router: its scores s choose. None (or the encoder itself): the pre-activations choose.
        gate: a name in `GATES`, applied to the k chosen scores.
        activation: a name in `ACTIVATIONS`.
        b_in, b_out: [d_in], [d_out]; the same parameter may serve as both (an SAE's b_dec).
        shared: a network that sees every input.
        selection_bias: whether to keep a buffer c [n] that is added when choosing and not when weighing.
        expert_rank: r atoms per router row, chosen together.
        unit_norm: whether training keeps the decoder's rows at length 1.
        select: how router rows are chosen; None for the k best of each input.
    """

    def __init__(
        self,
        encoder: Rows,
        decoder: Rows,
        *,
        k: int,
        router: Rows | None = None,
        gate: str = "hard",
        activation: str = "relu",
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
        shared: nn.Module | None = None,
        selection_bias: bool = False,
        expert_rank: int = 1,
        unit_norm: bool = False,
        select: Select | None = None,
    ):
        super().__init__()
        _one_of("gate", gate, GATES)
        _one_of("activation", activation, ACTIVATIONS)
        self.encoder, self.decoder = encoder, decoder
        self.router = encoder if router is None else router
        self.n_features, self.n_atoms = len(self.router), len(encoder)
        check_k(k, self.n_features)
        if not self.n_atoms == len(decoder) == self.n_features * expert_rank:
            raise ValueError(
                f"encoder has {len(encoder)} rows and decoder {len(decoder)}; allowed: "
                f"{self.n_features * expert_rank} = router rows ({self.n_features}) × expert_rank ({expert_rank})"
            )
        if self.router.width != encoder.width:
            raise ValueError(f"router reads {self.router.width} numbers; allowed: {encoder.width}, as the encoder does")
        self.select = Select() if select is None else select.to(encoder.weight.device)
        self.select.check(k, self.n_features)
        self.k, self.gate, self.activation = k, gate, activation
        self.expert_rank, self.unit_norm = expert_rank, unit_norm
        self.b_in, self.b_out, self.shared = as_parameter(b_in), as_parameter(b_out), shared
        self.register_buffer("selection_bias", encoder.weight.new_zeros(self.n_features) if selection_bias else None)

    @property
    def d_in(self) -> int:
        return self.encoder.width

    @property
    def d_out(self) -> int:
        return self.decoder.width

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return self.trace(x).output

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Chosen atoms and their values g·a(z)."""
        return self._encode(x, score_gradient=False)[0]

    def decode(self, codes: SparseCodes) -> Float[Tensor, "batch d_out"]:
        """b_out + Σ values · d_j, without the shared part, which needs the input."""
        if not self.k:
            output = codes.values.new_zeros(len(codes.values), self.d_out)
        else:
            output = self.decoder.combine(codes.values, codes.indices)
        return output if self.b_out is None else output + self.b_out

    def trace(
        self, x: Float[Tensor, "batch d_in"], *, score_gradient: bool = False, screen: Halved | None = None
    ) -> Trace:
        """A forward pass with its codes and scores, or with `screen` codes alone (`screenable` says of what models).

        With `score_gradient` the dense scores carry a gradient, as losses on all of them need (Switch balancing);
        without, the backward pass touches only the k chosen rows of each sample.
        """
        codes, scores = self._encode(x, score_gradient, screen)
        output = self.decode(codes)
        return Trace(output if self.shared is None else output + self.shared(x), codes, scores)

    @property
    def screenable(self) -> bool:
        """Whether chosen scores are all that a forward pass needs: the k best of the encoder's own."""
        own = self.router is self.encoder and type(self.encoder) is Rows and self.encoder.down is None
        plain = self.select.rule == "token" and self.gate == "hard" and self.selection_bias is None
        return own and plain and self.encoder.bias is not None and 2 * self.k < self.n_features

    def _encode(
        self, x: Tensor, score_gradient: bool, screen: Halved | None = None
    ) -> tuple[SparseCodes, Tensor | None]:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"x has shape {list(x.shape)}; allowed: [batch, {self.d_in}]")
        if not self.k:  # a dense network, all of it shared: nothing to choose from
            nothing = x[:, :0]
            return SparseCodes(nothing.long(), nothing), nothing
        x = x if self.b_in is None else x - self.b_in
        score_gradient = score_gradient or self.gate == "softmax before"
        if screen is not None and (found := screen.top(x, self.encoder.weight, self.encoder.bias, self.k)) is not None:
            pre_acts = self.encoder.chosen(x, found[1], known=found[0])
            return SparseCodes(atoms_of(found[1], self.expert_rank), ACTIVATIONS[self.activation](pre_acts)), None
        with torch.set_grad_enabled(score_gradient and torch.is_grad_enabled()):
            scores = self.router.scores(x)
        ranking = scores.detach() if self.selection_bias is None else scores.detach() + self.selection_bias
        experts, on = self.select(ranking, self.k)
        chosen = scores.gather(1, experts)
        if not score_gradient and (self.gate != "hard" or self.router is self.encoder):
            chosen = self.router.chosen(x, experts, known=chosen)
        atoms = atoms_of(experts, self.expert_rank)
        pre_acts = chosen if self.router is self.encoder else self.encoder.chosen(x, atoms)
        weighed = chosen if on is None else chosen.masked_fill(~on, torch.finfo(chosen.dtype).min)
        weighed = chosen if self.gate in ("hard", "score") else weighed  # the others share one whole among the chosen
        gates = GATES[self.gate](weighed, scores).repeat_interleave(self.expert_rank, dim=1)
        values = gates * ACTIVATIONS[self.activation](pre_acts)
        if on is not None:
            repeated = (part.repeat_interleave(self.expert_rank, dim=1) for part in (chosen, experts, on))
            values = self.select.switch(values, *repeated)
        return SparseCodes(atoms, values), scores

    @property
    def active_neurons(self) -> int:
        """Neurons that work on one input: those of the shared network and the k·expert_rank chosen ones."""
        return self.k * self.expert_rank + sum(layer.out_features for layer in self._shared_layers()[:-1])

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one input: scoring all routers, the chosen atoms' two products, the shared network.

        A tied router's chosen scores are the atoms' pre-activations, so they are counted once. Choosing the k largest
        and everything elementwise is left out.
        """
        chosen, router = self.k * self.expert_rank, self.router
        scores = router.weight.numel() + (0 if router.down is None else router.down.numel())
        encode = 0 if self.router is self.encoder else chosen * self.encoder.weight.shape[1]
        if self.router is not self.encoder and self.encoder.down is not None:
            encode += self.encoder.down.numel()
        shared = sum(layer.weight.numel() for layer in self._shared_layers())
        return scores + encode + chosen * self.decoder.weight.shape[1] + shared

    @property
    def n_parameters(self) -> int:
        """All numbers that training moves; a parameter with two roles counts once."""
        packed = {rows.weight: rows for rows in self.modules() if isinstance(rows, Packed)}
        return sum(packed[p].n_values if p in packed else p.numel() for p in self.parameters())

    def _shared_layers(self) -> list[nn.Linear]:
        return [] if self.shared is None else [layer for layer in self.shared.modules() if isinstance(layer, nn.Linear)]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        """PyTorch calls it for a parent's `load_state_dict` too: a parameter with several roles stays one.

        Raises `ValueError` where `state_dict` has different values for its roles.
        """
        roles: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            roles.setdefault(parameter, []).append(prefix + name)
        for parameter, names in roles.items():
            first, *others = [name for name in names if name in state_dict] or [None]
            for other in others:
                if not torch.equal(state_dict[first], state_dict[other]):
                    raise ValueError(f"{first} and {other} differ; allowed: equal ones, since they are one parameter")
            if first is not None and local_metadata.get("assign_to_params_buffers"):
                one = state_dict[first]  # as one parameter it is assigned as it is; a tensor would become several
                one = one if isinstance(one, nn.Parameter) else nn.Parameter(one, parameter.requires_grad)
                state_dict.update(dict.fromkeys(names, one))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def constrain_gradient_(self) -> None:
        """Before an optimiser step: what the constraint of `constrain_` makes of the gradient."""
        if self.unit_norm:
            self.decoder.project_gradient_()
        for rows in self.modules():
            if isinstance(rows, Packed):
                rows.drop_unused_gradient_()

    def constrain_(self) -> None:
        """After an optimiser step: unit-norm decoder rows, if the model has them, and thresholds that are ≥ 0."""
        self.select.constrain_()
        if self.unit_norm:
            self.decoder.normalise_()

    @property
    def knobs(self) -> dict[str, object]:
        """The model's place in the family, for tables and for cache keys."""
        router = "tied" if self.router is self.encoder else "dense" if self.router.down is None else "low-rank"
        if self.router is not self.encoder and self.router.weight is self.encoder.weight:
            router = "tied in direction" if isinstance(self.encoder, Scaled) else "shared parameters"
        return {
            "router": router,
            "select": self.select.knobs,
            "gate": self.gate,
            "activation": self.activation,
            "atoms": self._atoms,
            "shared": self.shared is not None,
            "selection_bias": self.selection_bias is not None,
            "expert_rank": self.expert_rank,
            "unit_norm": self.unit_norm,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n_features": self.n_features,
            "k": self.k,
        }

    @property
    def _atoms(self) -> str:
        tied = "tied" if self.decoder is self.encoder else "dense"
        return f"{tied}, {self.decoder.weight.shape[1]} numbers" if isinstance(self.decoder, Packed) else tied

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.knobs.items())


def atoms_of(experts: Int[Tensor, "batch k"], rank: int) -> Int[Tensor, "batch atoms"]:
    """Numbers of the atoms of chosen experts, of which each has `rank`, one after another."""
    if rank == 1:
        return experts
    return (experts[:, :, None] * rank + torch.arange(rank, device=experts.device)).flatten(1)


def _one_of(name: str, given: str, allowed) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is unknown; allowed: {', '.join(map(repr, allowed))}")


def check_k(k: int, n: int) -> None:
    if not min(1, n) <= k <= n:
        raise ValueError(f"k={k} cannot be chosen; allowed: 1 to n_features={n}")
