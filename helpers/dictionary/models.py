"""Each paper's model as a short constructor: which knobs of the family it sets."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.dictionary.family import RankOneDictionary, check_k
from helpers.dictionary.packed import Packed
from helpers.dictionary.rows import Rows, Scaled
from helpers.dictionary.select import Select


def topk_sae(
    d_model: int,
    n_features: int,
    k: int,
    *,
    generator: torch.Generator,
    b_dec: Float[Tensor, " d_model"] | None = None,
    tied: bool = False,
    activation: str = "relu",
    selection_bias: bool = False,
    select: Select | None = None,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """A TopK SAE with unit-norm decoder (Makhzani & Frey 2013; Gao et al. 2024).

    y = b_dec + Σ_{j ∈ TopK} ReLU(e_j·(x − b_dec) + β_j) d_j. It starts with random unit atoms and e_j = d_j.

    Args:
        b_dec: where the decoder's bias starts, best the mean of the data; zero if None.
        tied: keep e_j = d_j during training.
        selection_bias: whether choosing is by score plus a bias, as loss-free balancing needs.
        select: another rule than the k best of each input: BatchTopK, JumpReLU, …
    """
    check_k(k, n_features)
    atoms = torch.randn(n_features, d_model, generator=generator, device=generator.device, dtype=dtype)
    atoms = F.normalize(atoms, dim=1)
    encoder = Rows(atoms.clone(), atoms.new_zeros(n_features))
    options = {"b_dec": b_dec, "activation": activation, "selection_bias": selection_bias, "select": select}
    return as_sae(encoder, encoder if tied else Rows(atoms), k, **options)


def gated_sae(
    d_model: int,
    n_features: int,
    k: int,
    *,
    generator: torch.Generator,
    b_dec: Float[Tensor, " d_model"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """A Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): rows that choose, others in their directions.

    y = b_dec + Σ_{j: w_j·(x − b_dec) + γ_j > 0} ReLU(e^{r_j} w_j·(x − b_dec) + μ_j) d_j. It starts as `topk_sae` does,
    with r = γ = μ = 0, and `training.remedies.Gate` is its loss. `k` says how many codes one expects, and chooses none.
    """
    sae = topk_sae(d_model, n_features, k, generator=generator, b_dec=b_dec, select=Select("positive"), dtype=dtype)
    sae.router, zeros = sae.encoder, torch.zeros_like(sae.encoder.bias)
    sae.encoder = Scaled(sae.router, zeros, zeros.clone())
    return sae


def expander_sae(
    rows: Int[Tensor, "n q"],
    d_model: int,
    k: int,
    *,
    generator: torch.Generator,
    b_dec: Float[Tensor, " d_model"] | None = None,
    activation: str = "identity",
    degrees: Int[Tensor, " n"] | None = None,
    selection_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """The expander SAE of paper B: tied atoms of unit length with numbers at `rows` only, and a signed TopK.

    y = b_dec + Σ_{j ∈ TopK} (d_j·(x − b_dec) + β_j) d_j, with q·n + n + d_model parameters. It starts with random
    unit atoms.

    Args:
        rows: the mask: where atom j has its q numbers (`helpers.parts.masks` makes them).
        b_dec: where the decoder's bias starts, best the mean of the data; zero if None.
        activation: "identity" keeps a chosen score of either sign.
        degrees: how many of its q places each atom uses, the first ones; all if None.
        selection_bias: whether choosing is by score plus a bias, as loss-free balancing needs.
    """
    check_k(k, len(rows))
    device = generator.device
    values = torch.randn(rows.shape, generator=generator, device=device, dtype=dtype)
    degrees = None if degrees is None else degrees.to(device)
    atoms = Packed(values, rows.to(device), d_model, values.new_zeros(len(rows)), degrees)
    atoms.normalise_()
    return as_sae(atoms, atoms, k, b_dec=b_dec, activation=activation, selection_bias=selection_bias)


def as_sae(encoder: Rows, decoder: Rows, k: int, *, b_dec: Tensor | None = None, **options) -> RankOneDictionary:
    """Encoder and decoder around one bias b_dec (a copy; zero if None), the decoder's rows kept at length 1."""
    like = decoder.weight
    start = like.new_zeros(decoder.width) if b_dec is None else b_dec.to(like.device, like.dtype).clone()
    bias = nn.Parameter(start)
    return RankOneDictionary(encoder, decoder, k=k, b_in=bias, b_out=bias, unit_norm=True, **options)


def sae_to_moe(sae: RankOneDictionary) -> RankOneDictionary:
    """A mixture of rank-1 experts E_j = d_j e_jᵀ whose router rows are the e_j themselves (paper A), from a tied SAE.

    A copy; the original is untouched. The router's and the experts' parameters are the same tensors, but the router
    scores all n and the chosen experts then compute e_j·x for themselves. To set `router = encoder` is the inverse.
    """
    if sae.router is not sae.encoder:
        raise ValueError(f"router={sae.knobs['router']!r} is not an SAE's; allowed: 'tied'")
    if sae.expert_rank != 1:
        raise ValueError(f"expert_rank={sae.expert_rank} has no rank-1 experts; allowed: 1")
    moe = copy.deepcopy(sae)
    moe.router = moe.encoder.twin()
    return moe


def secret_moe(
    d_in: int,
    d_out: int,
    n_experts: int,
    k: int,
    *,
    generator: torch.Generator,
    router_rank: int | None = None,
    shared_neurons: int | None = None,
    selection_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RankOneDictionary:
    """The student of paper C: a small shared MLP beside single-neuron GELU experts under a softmax over the k chosen.

    Args:
        router_rank: rank of the router U(Vx); None for a full one.
        shared_neurons: width of the shared MLP; `k` if None, 0 for no shared part.
        selection_bias: whether choosing is by score plus a bias, as loss-free balancing needs.
    """
    check_k(k, n_experts)
    noise = {"generator": generator, "dtype": dtype}
    width = k if shared_neurons is None else shared_neurons
    full = router_rank is None
    router = Rows(
        _uniform(n_experts, d_in if full else router_rank, **noise),
        down=None if full else _uniform(router_rank, d_in, **noise),
    )
    encoder = Rows(_uniform(n_experts, d_in, **noise), _uniform(n_experts, 1, fan_in=d_in, **noise)[:, 0])
    decoder = Rows(_uniform(n_experts, d_out, fan_in=k, **noise))
    shared = _mlp(d_in, width, d_out, **noise) if width else None
    b_out = None if shared is not None else torch.zeros(d_out, device=generator.device, dtype=dtype)
    return RankOneDictionary(
        encoder,
        decoder,
        k=k,
        router=router,
        gate="softmax",
        activation="gelu",
        b_out=b_out,
        shared=shared,
        selection_bias=selection_bias,
    )


def dense_mlp(
    d_in: int, d_out: int, width: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> RankOneDictionary:
    """The dense student of paper C, a GELU MLP with `width` neurons: the family's member without atoms."""
    if width < 1:
        raise ValueError(f"width={width} is no network; allowed: at least 1")
    none = {"device": generator.device, "dtype": dtype}
    rows = Rows(torch.empty(0, d_in, **none)), Rows(torch.empty(0, d_out, **none))
    return RankOneDictionary(*rows, k=0, shared=_mlp(d_in, width, d_out, generator=generator, dtype=dtype))


def _uniform(rows: int, columns: int, *, generator: torch.Generator, dtype: torch.dtype, fan_in: int = 0) -> Tensor:
    """Uniform on ±fan_in^−½ (`columns` if not given), PyTorch's start of a linear layer."""
    noise = torch.rand(rows, columns, generator=generator, device=generator.device, dtype=dtype)
    return (2 * noise - 1) * (fan_in or columns) ** -0.5


def _mlp(d_in: int, width: int, d_out: int, **noise) -> nn.Sequential:
    layers = [nn.utils.skip_init(nn.Linear, *sizes, dtype=noise["dtype"]) for sizes in ((d_in, width), (width, d_out))]
    for layer in layers:
        rows, columns = layer.weight.shape
        layer.weight.data = _uniform(rows, columns, **noise)
        layer.bias.data = _uniform(rows, 1, fan_in=columns, **noise)[:, 0]
    return nn.Sequential(layers[0], nn.GELU(), layers[1])
