"""Every rule of choosing against its NumPy version and, where another package has it, against that."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import settings
from helpers.dictionary import RULES, RankOneDictionary, Rows, Scaled, Select, gated_sae, topk_sae
from helpers.dictionary.rows import weighted_sum
from helpers.training import remedies
from helpers.training.remedies import Moment, normalised_mse
from tests.reference import select_numpy as reference


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers(rule: str, n: int) -> dict:
    return {"groups": {"n_groups": 3, "groups": 2}, "always": {"always": 2}}.get(rule, {})


def selecting(rule: str, n: int, seed: int = 0, **more) -> tuple[Select, dict]:
    own = numbers(rule, n) | more
    select = Select(rule, n, **own)
    if rule == "threshold":
        select.threshold.data = random(n, seed=seed).double()
        own["threshold"] = select.threshold.detach().numpy()
    return select, own


def chosen(select: Select, scores: torch.Tensor, k: int) -> set[tuple[int, int]]:
    indices, on = select(scores, k)
    on = torch.ones_like(indices, dtype=torch.bool) if on is None else on
    assert all(len(set(row.tolist())) == len(row) for row in indices)  # distinct, the padding too
    return {(int(b), int(indices[b, i])) for b, i in on.nonzero()}


@pytest.mark.parametrize("rule", RULES)
@given(batch=st.integers(1, 7), n=st.sampled_from([6, 9, 12]), seed=st.integers(0, 999), data=st.data())
def test_every_rule_chooses_as_its_numpy_version(rule, batch, n, seed, data):
    k = data.draw(st.integers(2, n // 3 * 2 if rule == "groups" else n))
    select, own = selecting(rule, n, seed)
    scores = random(batch, n, seed=seed + 1)
    assert chosen(select, scores, k) == reference.pairs(scores.numpy(), k, rule, **own)


def member(rule, gate, *, tied, n=9, d=5, k=3, seed=0):
    select, own = selecting(rule, n, seed)
    encoder = Rows(random(n, d, seed=seed + 1), random(n, seed=seed + 2))
    router = None if tied else Rows(random(n, d, seed=seed + 3), random(n, seed=seed + 4))
    b_dec = torch.nn.Parameter(random(d, seed=seed + 5))
    options = {"gate": gate, "activation": "relu", "b_in": b_dec, "b_out": b_dec, "select": select}
    return RankOneDictionary(encoder, Rows(random(n, d, seed=seed + 6)), k=k, router=router, **options), own


@pytest.mark.parametrize("tied", [True, False], ids=["SAE", "MoE"])
@pytest.mark.parametrize("gate", ["hard", "score", "softmax", "softmax before", "sigmoid"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_under_every_gate_equals_the_numpy_version(rule, gate, tied):
    model, own = member(rule, gate, tied=tied)
    x = random(8, model.d_in, seed=40)
    with torch.no_grad():
        scores = model.router.scores(x - model.b_in).numpy()
    pairs = reference.pairs(scores, model.k, rule, **own)
    np.testing.assert_allclose(model(x).detach().numpy(), reference.output(model, x.numpy(), pairs), atol=1e-10)


@pytest.mark.parametrize("gate", ["hard", "softmax", "softmax before", "sigmoid"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_those_through_a_dense_matrix(rule, gate):
    """Codes as a dense [batch, n] matrix behind a mask that is held fixed, by plain autograd."""
    model, own = member(rule, gate, tied=True, seed=7)
    x, y = random(8, model.d_in, seed=41), random(8, model.d_out, seed=42)
    (model(x) - y).square().sum().backward()
    sparse = {name: p.grad.clone() for name, p in model.named_parameters() if "threshold" not in name}
    model.zero_grad()
    scores = (x - model.b_in) @ model.encoder.weight.T + model.encoder.bias
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for pair in reference.pairs(scores.detach().numpy(), model.k, rule, **own):
        mask[pair] = True
    shares = {
        "hard": lambda: torch.ones_like(scores),
        "softmax": lambda: scores.masked_fill(~mask, -1e9).softmax(1),
        "softmax before": lambda: scores.softmax(1),
        "sigmoid": lambda: scores.sigmoid() / (scores.sigmoid() * mask).sum(1, keepdim=True).clamp_min(1e-20),
    }[gate]()
    output = (shares * scores.relu() * mask) @ model.decoder.weight + model.b_out
    (output - y).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in sparse:
            torch.testing.assert_close(sparse[name], parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_ties_and_extremes_leave_numbers_finite(rule):
    """All scores equal, none above θ, and k = n: the right number of codes, and a finite output."""
    model, _ = member(rule, "softmax", tied=True, k=6)
    for x in (torch.zeros(4, 5, dtype=torch.float64), 1e6 * random(4, 5)):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    flat = torch.zeros(4, 9, dtype=torch.float64)
    wanted = {
        "positive": 0,
        "magnitude": 24,
        "token": 24,
        "groups": 24,
        "always": 24,
        "batch": 24,
        "atom": 27,
    }  # three inputs an atom: 6·4/9, rounded
    if rule in wanted:
        assert len(chosen(model.select, flat, 6)) == wanted[rule]


def test_all_at_once_is_the_dense_layer():
    """k = n, θ below everything: every rule without groups is the same function."""
    x, outputs = random(6, 5, seed=3), []
    for rule in ("token", "batch", "threshold", "atom", "always"):
        model, _ = member(rule, "hard", tied=True, k=9)
        if rule == "threshold":
            model.select.threshold.data.fill_(-1e9)
        outputs.append(model(x))
    for one, other in itertools.pairwise(outputs):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_numbers_that_no_input_can_meet_are_named():
    for options, words in [
        ({"rule": "softmax"}, "select='softmax'"),
        ({"rule": "groups", "n_groups": 2, "groups": 3}, "groups=3 of n_groups=2"),
        ({"rule": "threshold", "n_features": 4, "threshold": -1.0}, "threshold=-1.0"),
        ({"rule": "threshold", "n_features": 4, "bandwidth": 0.0}, "bandwidth=0.0"),
        ({"rule": "threshold"}, "n_features=0"),
        ({"always": -1}, "always=-1"),
    ]:
        with pytest.raises(ValueError, match=words):
            Select(**options)
    for select, words in [
        (Select("groups", n_groups=5), "n_groups=5"),
        (Select("groups", n_groups=3, groups=1), "k=5.*up to 4"),
        (Select("always", always=6), "always=6"),
        (Select("threshold", 7), "7 thresholds"),
    ]:
        with pytest.raises(ValueError, match=words):
            topk_sae(4, 12, 5, generator=torch.Generator().manual_seed(0), select=select)


# -- gates of their own ------------------------------------------------------------------------------------------------


def gated(n=9, d=5, seed=0):
    model = gated_sae(d, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = [model.router.weight, model.router.bias, model.encoder.log_scale, model.encoder.bias, model.b_out]
    for i, part in enumerate(parts):
        part.data += 0.5 * random(*part.shape, seed=seed + 60 + i)
    return model


@pytest.mark.parametrize("gates", ["some", "none", "all", "ties"])
def test_a_gated_sae_is_its_numpy_version_with_gradients(gates):
    model, x = gated(), random(8, 5, seed=40)
    model.router.bias.data += {"none": -50.0, "all": 50.0}.get(gates, 0.0)
    if gates == "ties":  # scores of exactly 0, which are not above it
        model.router.bias.data.zero_()
        x = model.b_in.detach().expand(8, 5).clone()
    w, gamma, r, mu = model.router.weight, model.router.bias, model.encoder.log_scale, model.encoder.bias
    with torch.no_grad():
        pairs = reference.pairs(model.router.scores(x - model.b_in).numpy(), 3, "positive")
    assert len(pairs) == {"none": 0, "ties": 0, "all": 72}.get(gates, len(pairs))
    np.testing.assert_allclose(model(x).detach().numpy(), reference.output(model, x.numpy(), pairs), atol=1e-10)
    y = random(8, 5, seed=41)
    (model(x) - y).square().sum().backward()
    sparse = {name: p.grad for name, p in model.named_parameters()}
    assert sparse.pop("router.bias") is None  # a hard gate passes nothing on
    sparse = {name: grad.clone() for name, grad in sparse.items()}
    model.zero_grad()
    centred = x - model.b_in
    acts = ((centred @ w.T).detach() + gamma.detach() > 0) * (centred @ (w * r.exp()[:, None]).T + mu).relu()
    (acts @ model.decoder.weight + model.b_out - y).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in sparse:
            torch.testing.assert_close(sparse[name], parameter.grad, rtol=1e-9, atol=1e-10)


def test_a_gated_sae_is_a_jumprelu_with_other_numbers():
    """w·x + γ > 0 is e^r w·x + μ > μ − e^r γ; where that is below 0 the ReLU decides."""
    model, x = gated(40, 12), random(200, 12, seed=3)
    with torch.no_grad():
        select = Select("threshold", 40)
        select.threshold.data = model.encoder.bias - model.encoder.log_scale.exp() * model.router.bias
        rows = Rows(model.encoder.vectors(), model.encoder.bias)
        jump = RankOneDictionary(rows, model.decoder, k=3, b_in=model.b_in, b_out=model.b_out, select=select)
        torch.testing.assert_close(model(x), jump(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(model.encode(x).to_dense(40) != 0, jump.encode(x).to_dense(40) != 0)


def test_scaled_rows_do_what_rows_do():
    rows = gated().encoder
    plain, x, only = Rows(rows.vectors(), rows.bias.detach()), random(7, 5, seed=1), torch.tensor([4, 0, 8])
    indices, values = torch.tensor([[0, 3]] * 7), random(7, 2, seed=2)
    for call in (
        lambda r: r.scores(x),
        lambda r: r.scores(x, only),
        lambda r: r.chosen(x, indices),
        lambda r: r.chosen(x, indices, r.scores(x).detach().gather(1, indices)),
        lambda r: r.combine(values, indices),
        lambda r: r.vectors(only),
        lambda r: r.twin().scores(x),
    ):
        torch.testing.assert_close(call(rows), call(plain), rtol=1e-12, atol=1e-12)
    assert rows.twin().weight is rows.weight
    with pytest.raises(ValueError, match="allowed: full rows, one scale each"):
        Scaled(Rows(random(9, 2), down=random(2, 5)), random(9), random(9))
    with pytest.raises(ValueError, match="bias has shape"):
        Scaled(rows, random(8), random(8))


# -- against SAELens ---------------------------------------------------------------------------------------------------


def test_jumprelu_and_its_gradients_are_those_of_saelens():
    from sae_lens.saes.jumprelu_sae import JumpReLU, Step

    n, width = 12, 0.4
    scores, theta = random(30, n, seed=1), random(n, seed=2).abs()
    grad = random(30, n, seed=3)
    ours, theirs = (theta.clone().requires_grad_() for _ in range(2))
    expected = JumpReLU.apply(scores, theirs, width, False)
    (expected * grad).sum().backward()
    select = Select("threshold", n, bandwidth=width)
    select.threshold = torch.nn.Parameter(ours)
    indices, on = select(scores, 3)
    values = select.switch(scores.gather(1, indices), scores.gather(1, indices), indices, on)
    dense = torch.zeros_like(scores).scatter(1, indices, values)
    (dense * grad).sum().backward()
    torch.testing.assert_close(dense, expected, rtol=0, atol=0)
    torch.testing.assert_close(select.threshold.grad, theirs.grad)
    assert (theirs.grad != 0).all()
    select.threshold.grad = theirs.grad = None
    select.l0(scores).backward()
    Step.apply(scores, theirs, width, False).sum(1).mean().backward()
    torch.testing.assert_close(select.threshold.grad, theirs.grad)


def test_batchtopk_and_its_threshold_are_those_of_saelens():
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    d, n, k = 6, 20, 3
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d, d_sae=n, k=k, dtype="float64", device="cpu"))
    ours = topk_sae(d, n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64, select=Select("batch"))
    ours.double()
    ours.encoder.weight.data, ours.encoder.bias.data = theirs.W_enc.data.T.clone(), theirs.b_enc.data.clone()
    ours.decoder.weight.data = theirs.W_dec.data.clone()
    ours.decoder.normalise_()
    theirs.W_dec.data = ours.decoder.weight.data.clone()
    for step in range(3):
        x = random(16, d, seed=step)
        acts = theirs.training_forward_pass(TrainStepInput(x, {}, None, step, True)).feature_acts
        torch.testing.assert_close(ours.encode(x).to_dense(n), acts, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.select.threshold.double(), theirs.topk_threshold, rtol=1e-12, atol=1e-12)
    ours.eval()
    assert float(ours.select.threshold) > 0
    scores = ours.encoder.scores(x - ours.b_in)
    above = scores.where(scores > ours.select.threshold, 0)
    torch.testing.assert_close(ours.encode(x).to_dense(n), above, rtol=1e-12, atol=1e-12)


def step_of(theirs, x, **coefficients):
    """Losses and gradients of one training step of theirs, and the variance that ours are divided by."""
    from sae_lens.saes.sae import TrainStepInput

    step = theirs.training_forward_pass(TrainStepInput(x, coefficients, None, 0, False))
    step.loss.backward()
    return step.losses, float((x - x.mean(0)).square().sum(1).mean())


def step_of_ours(model, x, balance, variance):
    trace = model.trace(x)
    loss = normalised_mse(trace.output, x, variance)
    now = Moment(model, x, x, trace, loss, torch.zeros(model.n_atoms, dtype=torch.long), 0, 1, variance=variance)
    more = balance.loss(now)
    (loss + more).backward()
    return float(loss.detach()) * variance, float(more.detach()) * variance


def across(gradient, rows):
    """Without what lies along the rows, which a decoder of unit length does not follow."""
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_a_gated_sae_is_that_of_saelens(frozen):
    """Theirs passes the second output's gradient on to the decoder; as published it is frozen."""
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig

    n, d, l1 = 40, 12, 0.3
    ours, x = gated(n, d), 2 * random(64, d, seed=5)
    theirs = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d, d_sae=n, dtype="float64"))
    roles = {
        "W_enc": ours.router.weight, "b_gate": ours.router.bias, "r_mag": ours.encoder.log_scale,
        "b_mag": ours.encoder.bias, "W_dec": ours.decoder.weight, "b_dec": ours.b_out,
    }  # fmt: skip
    for name, part in roles.items():
        getattr(theirs, name).data = (part.data.T if name == "W_enc" else part.data).clone()
    losses, variance = step_of(theirs, x, l1=l1)
    found = step_of_ours(ours, x, remedies.Gated(l1 / variance**0.5, frozen=frozen), variance)
    assert found[0] == pytest.approx(float(losses["mse_loss"].detach()), rel=1e-12)
    assert found[1] == pytest.approx(sum(float(losses[name].detach()) for name in losses if name != "mse_loss"))
    for name, part in roles.items():
        one, other = part.grad * variance, getattr(theirs, name).grad
        other = other.T if name == "W_enc" else other
        if name == "W_dec":
            one, other = across(one, part.data), across(other, part.data)
        same = torch.allclose(one, other, rtol=1e-9, atol=1e-9)
        assert same != (frozen and name in ("W_dec", "b_dec")), name


@pytest.mark.parametrize("widths", [(5, 12), (19,)])
def test_a_step_of_a_matryoshka_sae_is_that_of_saelens(widths):
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    d, n, k = 6, 20, 3
    sizes = {"d_in": d, "d_sae": n, "k": k, "dtype": "float64", "rescale_acts_by_decoder_norm": False}
    config = MatryoshkaBatchTopKTrainingSAEConfig(**sizes, matryoshka_widths=[*widths, n])
    theirs = MatryoshkaBatchTopKTrainingSAE(config)
    ours = topk_sae(d, n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64, select=Select("batch"))
    ours.encoder.weight.data += 0.3 * random(n, d, seed=1)
    roles = {"W_enc": ours.encoder.weight, "b_enc": ours.encoder.bias, "W_dec": ours.decoder.weight}
    roles["b_dec"] = ours.b_out
    for name, part in roles.items():
        getattr(theirs, name).data = (part.data.T if name == "W_enc" else part.data).clone()
    x = random(32, d, seed=2)
    losses, variance = step_of(theirs, x)
    found = step_of_ours(ours, x, remedies.Nested(widths), variance)
    inner = sum(float(value.detach()) for name, value in losses.items() if name.startswith("inner"))
    assert found == pytest.approx((float(losses["mse_loss"].detach()), inner), rel=1e-12)
    for name, part in roles.items():
        wanted = getattr(theirs, name).grad
        torch.testing.assert_close(part.grad * variance, wanted.T if name == "W_enc" else wanted, rtol=1e-9, atol=1e-9)


def test_what_an_input_gets_depends_on_the_batch_only_under_batch_rules():
    """Token choice, thresholds, groups and shared experts are causal; the batch's best and expert choice are not."""
    leaks = {}
    for rule in RULES:
        model, _ = member(rule, "hard", tied=True)
        x = random(8, 5, seed=50)
        with torch.no_grad():
            alone = torch.cat([model(row[None]) for row in x])
            leaks[rule] = not torch.allclose(alone, model(x))
    assert leaks == {rule: rule in ("batch", "atom") for rule in RULES}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2, 6])
def test_thresholds_are_moved_to_the_number_of_codes_asked_for_and_stay_above_zero(target):
    from helpers.training import Shuffled, fit
    from helpers.training.remedies import TargetL0

    x = random(2000, 8, dtype=torch.float32)
    select = Select("threshold", 24, threshold=0.5, bandwidth=0.5)
    sae = topk_sae(8, 24, 4, generator=torch.Generator().manual_seed(0), select=select)
    fit(sae, Shuffled(x, batch_size=200), steps=300, lr=1e-2, balance=TargetL0(target))
    codes = sae.encode(x).fires.sum(1).float().mean()
    assert float(codes) == pytest.approx(target, rel=0.25) and (sae.select.threshold >= 0).all()
    with pytest.raises(ValueError, match="target=0"):
        TargetL0(0)


def test_codes_are_not_counted_where_a_bias_chose_others():
    from helpers.training import Shuffled, fit

    sae = topk_sae(6, 12, 3, generator=settings.generator(0), selection_bias=True, select=Select("threshold", 12))
    rows = Shuffled(random(40, 6).float(), batch_size=20)
    with pytest.raises(ValueError, match="TargetL0 with a selection bias; allowed: a dictionary without one"):
        fit(sae, rows, steps=1, balance=remedies.TargetL0(3.0), cache_dir=False)


def sparse_world(n=16, d=12, rows=1000):
    """Few atoms on at a time: what an SAE is for."""
    g = torch.Generator().manual_seed(3)
    atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    on = torch.rand(rows, n, generator=g) < 2 / n
    return (on * (1 + torch.rand(rows, n, generator=g))) @ atoms


def test_a_gated_sae_learns_and_its_weight_sets_how_many_gates_open():
    from helpers.training import Shuffled, fit

    x, codes, errors = sparse_world(), [], []
    for sparsity in (0.1, 0.6):
        sae = gated_sae(12, 24, 4, generator=torch.Generator().manual_seed(0))
        start = sae.router.bias.clone()
        done = fit(sae, Shuffled(x, batch_size=100), steps=200, lr=1e-2, balance=remedies.Gated(sparsity))
        codes.append(float(sae.encode(x).fires.sum(1).float().mean()))
        errors.append(done.loss[-1])
        assert done.loss[-1] < 0.5 * done.loss[0] and not torch.equal(sae.router.bias, start)
        assert sae.router.weight is sae.encoder.weight and sae.encoder.log_scale.any()
    assert codes[1] < 0.8 * codes[0] and errors[1] > errors[0]


def test_nested_prefixes_do_by_themselves_what_a_plain_dictionary_cannot():
    from helpers.training import Shuffled, fit

    x, alone = sparse_world(), {}
    for name, balance in {"plain": None, "nested": remedies.Nested((6,))}.items():
        sae = topk_sae(12, 24, 3, generator=torch.Generator().manual_seed(0), select=Select("batch"))
        fit(sae, Shuffled(x, batch_size=100), steps=200, lr=1e-2, balance=balance)
        codes = sae.eval().encode(x)
        inside = codes.values.where(codes.indices < 6, 0)
        prefix = sae.decoder.combine(inside, codes.indices) + sae.b_out
        alone[name] = float((x - prefix.detach()).square().sum() / (x - x.mean(0)).square().sum())
    assert alone["nested"] < 0.9 * alone["plain"]


@pytest.mark.parametrize("rule", ["batch", "threshold"])
def test_codes_that_crowd_in_one_row_are_all_found(rule):
    """More than the few best that are looked at first, in a row; none in others."""
    scores = torch.rand(6, 64, generator=settings.generator(0), dtype=torch.float64)
    scores[2] += 1
    select = Select(rule, 64, threshold=1.2, bandwidth=0.1) if rule == "threshold" else Select(rule)
    indices, on = select(scores, 6 if rule == "batch" else 1)
    found = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, on)
    cut = scores.flatten().topk(36).values[-1] if rule == "batch" else 1.2 + 1e-12
    assert torch.equal(found, scores >= cut) and found[2].sum() > 24 and not found[0].any()


@pytest.mark.parametrize("rule", ["batch", "threshold"])
@given(seed=st.integers(0, 999), order=st.lists(st.sampled_from(["plain", "crowded", "ties", "none"]), max_size=6))
def test_what_was_looked_at_before_changes_no_choice(rule, seed, order):
    """How many scores of a row are looked at first is what the batch before needed."""
    select, own = selecting(rule, 48, seed)
    kinds = {"plain": random(5, 48, seed=seed), "none": -9 - random(5, 48, seed=seed).abs()}
    kinds["crowded"] = kinds["plain"] + 9 * (torch.arange(5) == seed % 5)[:, None]
    kinds["ties"] = kinds["plain"].round()
    for kind in order:
        found = chosen(select, kinds[kind], 4)
        if kind != "ties":
            assert found == reference.pairs(kinds[kind].numpy(), 4, rule, **own)
        assert sorted(kinds[kind][b, j].item() for b, j in found) == sorted(
            kinds[kind][b, j].item() for b, j in reference.pairs(kinds[kind].numpy(), 4, rule, **own)
        )


@pytest.mark.parametrize("rounded", [False, True])
def test_places_that_stay_empty_under_expert_choice_hold_other_atoms(rounded):
    scores = random(7, 40, seed=2)
    indices, on = Select("atom")(scores.round() if rounded else scores, 6)
    assert on.sum() == 40 and not on.all()
    assert all(len(set(row.tolist())) == len(row) for row in indices) and indices.min() >= 0 and indices.max() < 40


def test_padded_codes_add_nothing_to_sums_or_gradients():
    g = settings.generator(1)
    weight = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(9, generator=g)[:6] for _ in range(4)])
    values = torch.randn(4, 6, generator=g, dtype=torch.float64)
    values[:, 2:], values[3] = 0, 0  # most are padding, and a row has nothing
    values.requires_grad_()
    ours = weighted_sum(values, indices, weight)
    plain = (values[:, :, None] * weight[indices]).sum(1)
    upstream = torch.randn(4, 5, generator=g, dtype=torch.float64)
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (values, weight), upstream),
        torch.autograd.grad(plain, (values, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
