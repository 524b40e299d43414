"""The family against a slow NumPy version, its two primitives against autograd, and the conversions both ways."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import dictionary
from helpers.dictionary import RankOneDictionary, Rows, Select, SparseCodes
from helpers.settings import generator
from tests.reference import dictionary_numpy as reference

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9))  # batch, d, n


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed + 17 * sum(shape)), dtype=dtype)


def distinct_indices(batch, n, k, seed=0):
    return torch.stack([torch.randperm(n, generator=generator(seed + b))[:k] for b in range(batch)])


# -- the primitives ----------------------------------------------------------------------------------------------------


@given(SIZES, st.data())
@settings(deadline=None)
def test_primitives_equal_their_definition_with_gradients(sizes, data):
    batch, d, n = sizes
    k = data.draw(st.integers(1, n))
    values, x, weight = random(batch, k), random(batch, d), random(n, d)
    indices = distinct_indices(batch, n, k)
    for fast, slow, inputs in [
        (dictionary.weighted_sum, lambda v, w: (v[:, :, None] * w[indices]).sum(1), (values, weight)),
        (dictionary.gather_dots, lambda a, w: (w[indices] * a[:, None]).sum(2), (x, weight)),
    ]:
        ours, plain = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
        call = (ours[0], indices, ours[1]) if fast is dictionary.weighted_sum else (ours[0], ours[1], indices)
        y, expected = fast(*call), slow(*plain)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        upstream = random(*y.shape, seed=3)
        y.backward(upstream)
        expected.backward(upstream)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_primitives_are_adjoint():
    """<weighted_sum(v), x> = <v, gather_dots(x)> for every v and x."""
    weight, indices, v, x = random(9, 5), distinct_indices(4, 9, 3), random(4, 3), random(4, 5)
    left = (dictionary.weighted_sum(v, indices, weight) * x).sum()
    right = (v * dictionary.gather_dots(x, weight, indices)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_portable_path_of_gather_dots_agrees_and_respects_its_memory_bound(monkeypatch):
    x, weight, indices = random(7, 5), random(11, 5), distinct_indices(7, 11, 3)
    expected = dictionary.gather_dots(x, weight, indices)
    monkeypatch.setattr(dictionary.rows, "GATHER_BYTES", 3 * 5 * 8 * 2)  # room for two samples
    half = dictionary.rows._dots(x.bfloat16(), weight.bfloat16(), indices)  # not a dtype of the sampled product
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.2)


def test_known_products_are_used_and_leave_the_gradient_as_it_was():
    x, indices = random(4, 5), distinct_indices(4, 9, 3)
    grads = []
    for known in (None, dictionary.gather_dots(x, random(9, 5), indices)):
        weight = random(9, 5).requires_grad_()
        dictionary.gather_dots(x, weight, indices, known).square().sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


# -- the family --------------------------------------------------------------------------------------------------------


def member(router, gate, activation, *, tied=False, rank=1, shared=False, biases=True, selection=False, seed=0):
    n, d_in, k = 6, 5, 3
    d_out = d_in if tied else 4
    encoder = Rows(random(n * rank, d_in, seed=seed), random(n * rank, seed=seed + 1) if biases else None)
    routes = {
        "tied": lambda: None,
        "dense": lambda: Rows(random(n, d_in, seed=seed + 2), random(n, seed=seed + 3)),
        "low-rank": lambda: Rows(random(n, 2, seed=seed + 4), down=random(2, d_in, seed=seed + 5)),
    }[router]()
    net = torch.nn.Sequential(torch.nn.Linear(d_in, 3), torch.nn.GELU(), torch.nn.Linear(3, d_out)).double()
    model = RankOneDictionary(
        encoder,
        encoder if tied else Rows(random(n * rank, d_out, seed=seed + 6)),
        k=k,
        router=routes,
        gate=gate,
        activation=activation,
        b_in=random(d_in, seed=seed + 7) if biases else None,
        b_out=random(d_out, seed=seed + 8) if biases else None,
        shared=net if shared else None,
        selection_bias=selection,
        expert_rank=rank,
    )
    if selection:
        model.selection_bias.copy_(3 * random(n, seed=seed + 9))
    return model


CONFIGURATIONS = [
    dict(router="tied", gate="hard", activation="relu"),
    dict(router="tied", gate="hard", activation="identity", tied=True),
    dict(router="dense", gate="softmax", activation="gelu", shared=True),
    dict(router="low-rank", gate="softmax", activation="gelu", shared=True, biases=False),
    dict(router="low-rank", gate="score", activation="identity", rank=2),
    dict(router="dense", gate="hard", activation="relu", rank=3, selection=True),
    dict(router="tied", gate="softmax", activation="relu", selection=True),
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_knob_equals_the_numpy_version(options):
    model = member(**options)
    x = random(8, model.d_in, seed=40)
    np.testing.assert_allclose(model(x).detach().numpy(), reference.output(model, x.numpy()), atol=1e-12)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_sparse_gradients_equal_those_through_the_dense_scores(options):
    """`score_gradient=True` runs plain autograd through a dense product: an independent way to the same gradient."""
    model = member(**options)
    x, y = random(8, model.d_in, seed=41), random(8, model.d_out, seed=42)
    grads = []
    for dense in (False, True):
        model.zero_grad()
        (model.trace(x, score_gradient=dense).output - y).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name in grads[0].keys() | grads[1].keys():
        a, b = (g.get(name, torch.zeros(())) for g in grads)
        torch.testing.assert_close(a.expand_as(b) if a.ndim < b.ndim else a, b.expand_as(a), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", CONFIGURATIONS[:4], ids=lambda o: "-".join(map(str, o.values())))
def test_gradients_equal_finite_differences(options):
    model = member(**options)
    x, h = random(3, model.d_in, seed=43), 1e-6
    model(x).sin().sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        flat, place = parameter.data.view(-1), int(parameter.grad.abs().argmax())
        sides = []
        for step in (h, -h):
            flat[place] += step
            sides.append(float(model(x).sin().sum()))
            flat[place] -= step
        assert parameter.grad.view(-1)[place] == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-5)


def test_codes_fire_where_their_value_is_not_zero():
    codes = SparseCodes(torch.tensor([[0, 2], [2, 1]]), torch.tensor([[1.0, 0.0], [-2.0, 3.0]]))
    assert codes.firing_counts(4).tolist() == [1, 1, 1, 0]
    assert codes.to_dense(4).tolist() == [[1, 0, 0, 0], [0, 3, -2, 0]]


def test_selection_bias_chooses_but_does_not_weigh():
    model = member("tied", "softmax", "relu", selection=True)
    x = random(5, 5, seed=44)
    model.selection_bias.zero_()
    model.selection_bias[4] = 1e6
    codes = model.encode(x)
    assert (codes.indices == 4).any(1).all()
    assert codes.values.max() < 1e3


@given(st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=30)
def test_sae_and_moe_agree_exactly_for_every_k(n, data):
    k = data.draw(st.integers(1, n))
    sae = dictionary.topk_sae(4, n, k, generator=generator(n), dtype=torch.float64)
    moe = dictionary.sae_to_moe(sae)
    assert moe.knobs["router"] == "shared parameters"
    x = random(9, 4)
    torch.testing.assert_close(moe(x), sae(x), rtol=0, atol=1e-14)
    back = copy.deepcopy(moe)
    back.router = back.encoder
    assert back.knobs == sae.knobs
    for (name, a), b in zip(sae.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_conversions_copy_and_refuse_what_has_no_counterpart():
    sae = dictionary.topk_sae(4, 6, 2, generator=generator(0))
    moe = dictionary.sae_to_moe(sae)
    moe.encoder.weight.data.zero_()
    assert sae.encoder.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="router='dense'"):
        dictionary.sae_to_moe(member("dense", "hard", "relu"))


def test_tied_parts_stay_tied_when_copied():
    moe = copy.deepcopy(dictionary.sae_to_moe(dictionary.topk_sae(4, 6, 2, generator=generator(0))))
    assert moe.router.weight is moe.encoder.weight
    assert moe.b_in is moe.b_out
    tied = copy.deepcopy(dictionary.topk_sae(4, 6, 2, generator=generator(0), tied=True))
    assert tied.decoder is tied.encoder


def test_unit_norm_is_kept_and_the_gradient_is_tangent():
    sae = dictionary.topk_sae(5, 600, 4, generator=generator(0), dtype=torch.float64)
    sae(random(64, 5)).square().sum().backward()
    sae.constrain_gradient_()
    rows, grad = sae.decoder.weight.detach(), sae.decoder.weight.grad
    assert grad.abs().max() > 0
    assert (rows * grad).sum(1).abs().max() < 1e-12
    sae.decoder.weight.data.mul_(7)
    sae.constrain_()
    torch.testing.assert_close(sae.decoder.weight.norm(dim=1), torch.ones(600, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dictionary.topk_sae(4, 6, 7, generator=generator(0)), "k=7 .* 1 to n_features=6"),
        (lambda: dictionary.topk_sae(4, 6, 0, generator=generator(0)), "k=0"),
        (lambda: member("tied", "loud", "relu"), "gate='loud'.*'hard'"),
        (lambda: member("tied", "hard", "tanh"), "activation='tanh'.*'relu'"),
        (lambda: RankOneDictionary(Rows(random(4, 3)), Rows(random(5, 3)), k=1), "encoder has 4 rows and decoder 5"),
        (lambda: Rows(random(4, 3), down=random(2, 5)), "down has 2 rows"),
        (lambda: dictionary.secret_moe(4, 4, 3, 5, generator=generator(0)), "k=5"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(5,), (1, 2, 5), (2, 4)])
@pytest.mark.parametrize("dense", [False, True])
def test_inputs_that_are_no_batch_are_refused(shape, dense):
    g = generator(0)
    model = dictionary.dense_mlp(5, 4, 3, generator=g) if dense else dictionary.topk_sae(5, 6, 2, generator=g)
    with pytest.raises(ValueError, match=rf"x has shape \[{', '.join(map(str, shape))}\]; allowed: \[batch, 5\]"):
        model._encode(torch.zeros(shape), score_gradient=False)  # without the types that are checked while tests run


def test_secret_moe_trains_every_part():
    model = dictionary.secret_moe(5, 4, 12, 3, generator=generator(0), router_rank=2, dtype=torch.float64)
    model(random(400, 5)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0} == set()


def test_dictionary_stands_alone():
    """`dictionary` imports nothing of the project, so that it can be lifted out of it."""
    code = """
        import sys
        import helpers.dictionary
        print([m for m in sys.modules if m.startswith("helpers.") and not m.startswith("helpers.dictionary")])
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# -- the dense student, and what a student costs -----------------------------------------------------------------------


def test_a_dense_mlp_is_the_member_without_atoms():
    student = dictionary.dense_mlp(5, 4, 7, generator=generator(0), dtype=torch.float64)
    x = random(6, 5, seed=1).requires_grad_()
    first, last = student.shared[0], student.shared[2]
    slow = torch.nn.functional.gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    trace = student.trace(x)
    torch.testing.assert_close(trace.output, slow)
    trace.output.sum().backward()
    assert trace.codes.indices.shape == (6, 0) and all(p.grad is not None for p in student.shared.parameters())
    with pytest.raises(ValueError, match="width=0"):
        dictionary.dense_mlp(5, 4, 0, generator=generator(0))


def count_by_hand(student):
    """Multiply-adds of one input as a plain loop over what is multiplied."""
    total = 0
    for layer in () if student.shared is None else (student.shared[0], student.shared[2]):
        total += layer.in_features * layer.out_features
    if not student.k:
        return total
    router = student.router
    if router.down is not None:
        total += router.down.shape[0] * student.d_in
    total += student.n_features * router.weight.shape[1]
    for _ in range(student.k * student.expert_rank):
        total += student.d_out if router is student.encoder else student.d_in + student.d_out
    return total


def test_costs_are_those_of_the_products_written_out():
    moe = dictionary.secret_moe(10, 6, 20, 4, generator=generator(0), router_rank=3, shared_neurons=5)
    assert moe.multiply_adds == (3 * 10 + 20 * 3) + 4 * (10 + 6) + 5 * (10 + 6) == count_by_hand(moe)
    assert moe.active_neurons == 4 + 5
    assert moe.n_parameters == 3 * 10 + 20 * 3 + 20 * (10 + 1 + 6) + 5 * (10 + 1) + 6 * (5 + 1)
    full = dictionary.secret_moe(10, 6, 20, 4, generator=generator(0), shared_neurons=0)
    assert full.multiply_adds == 20 * 10 + 4 * 16 == count_by_hand(full) and full.active_neurons == 4
    sae = dictionary.topk_sae(10, 20, 4, generator=generator(0))
    assert sae.multiply_adds == 20 * 10 + 4 * 10 == count_by_hand(sae)
    dense = dictionary.dense_mlp(10, 6, 9, generator=generator(0))
    assert dense.multiply_adds == 9 * 16 == count_by_hand(dense) and dense.active_neurons == 9


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_keeps_shared_parameters_shared(assign, inside):
    make = dictionary.topk_sae, {"d_model": 5, "n_features": 9, "k": 2, "dtype": torch.float64}
    ours, theirs = (dictionary.sae_to_moe(make[0](**make[1], generator=generator(seed))) for seed in (0, 1))
    with torch.no_grad():
        theirs.b_in.add_(1)
    prefix, whole = ("part.", torch.nn.ModuleDict({"part": ours})) if inside else ("", ours)
    state = {prefix + name: value.clone() for name, value in theirs.state_dict().items()}
    whole.load_state_dict(state, assign=assign)
    assert ours.b_in is ours.b_out and ours.router.weight is ours.encoder.weight
    assert ours.n_parameters == theirs.n_parameters
    x = random(4, 5)
    assert torch.equal(ours(x), theirs(x))
    state[prefix + "b_out"] += 1
    with pytest.raises(ValueError, match=f"{prefix}b_in and {prefix}b_out differ"):
        whole.load_state_dict(state, assign=assign)


@pytest.mark.parametrize("bad", [-1, 6, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_indices_outside_are_refused(bad, dtype):
    x, weight, indices = torch.ones(2, 3, dtype=dtype), torch.ones(6, 3, dtype=dtype), torch.tensor([[0, 5], [1, bad]])
    with pytest.raises(ValueError, match=r"indices run from -?\d+ to \d+; allowed: 0 to 5"):
        dictionary.gather_dots(x, weight, indices)


def test_indices_are_checked_once_a_call(monkeypatch):
    seen, check = [], dictionary.rows.check_indices
    monkeypatch.setattr(dictionary.rows, "check_indices", lambda *given: seen.append(check(*given)))
    x, weight = random(4, 5).requires_grad_(), random(9, 5).requires_grad_()
    dictionary.gather_dots(x, weight, distinct_indices(4, 9, 3)).sum().backward()
    assert len(seen) == 1  # by the pass back neither


def test_every_rule_of_choosing_is_among_the_models():
    assert {model.select.rule for model in every_model().values()} == set(dictionary.RULES)


def every_model() -> dict[str, RankOneDictionary]:
    """A model of each constructor; packed rows that are gathered, and packed rows that go through tiles."""
    rows = {q: torch.stack([torch.randperm(16, generator=generator(i))[:q] for i in range(32)]) for q in (4, 12)}
    sae = dictionary.topk_sae(16, 32, 4, generator=generator(0))
    return (
        {
            "topk_sae": sae,
            "sae_to_moe": dictionary.sae_to_moe(sae),
            "secret_moe": dictionary.secret_moe(16, 16, 32, 4, router_rank=3, generator=generator(0)),
            "dense_mlp": dictionary.dense_mlp(16, 16, 8, generator=generator(0)),
            "gated_sae": dictionary.gated_sae(16, 32, 4, generator=generator(0)),
        }
        | {f"expander_sae, {q}": dictionary.expander_sae(rows[q], 16, 4, generator=generator(0)) for q in rows}
        | {
            f"select, {rule}": dictionary.topk_sae(16, 32, 4, generator=generator(0), select=Select(rule, **numbers))
            for rule, numbers in SELECTS.items()
        }
    )


SELECTS = {
    "batch": {}, "threshold": {"n_features": 32, "threshold": 0.1, "bandwidth": 0.5}, "atom": {}, "positive": {},
    "groups": {"n_groups": 4, "groups": 2}, "always": {"always": 1}, "magnitude": {},
}  # fmt: skip
"""Rules of choosing beside the k best."""
WIDE_AS_SCORES_SAY = ("batch", "threshold", "atom", "positive")
"""Rules that give inputs different numbers of codes: how wide the indices are is read from the scores, and there a
compiler must stop, so that these are several graphs."""


def compiles(name: str) -> None:
    """Into one graph with nothing in it that PyTorch's own compiler cannot lower, to the same numbers and gradients."""
    model, x, names = every_model()[name], random(8, 16).float(), []

    def backend(graph, _):
        inner = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        names.extend(str(node.target) for part in inner for node in part.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    one = model.select.rule not in WIDE_AS_SCORES_SAY
    compiled, grads, outputs = torch.compile(model, backend=backend, fullgraph=one), [], []
    for run in (model, compiled):
        model.zero_grad()
        outputs.append(run(x))
        outputs[-1].square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)
    assert names and not [name for name in names if "mkldnn" in name or "sparse" in name]
    torch._dynamo.reset()
    if not one:  # else it is to be taken from the list
        with pytest.raises(RuntimeError, match="(?i)data.dependent"):
            torch.compile(model, backend=backend, fullgraph=True)(x)


def test_every_model_compiles():
    """In a process of its own, since the compiler cannot look into functions whose shapes are checked."""
    code = "from tests.dictionary import test_dictionary as t; [t.compiles(name) for name in t.every_model()]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", every_model())
def test_under_autocast_choices_do_not_depend_on_a_gradient_through_the_scores(name):
    model, x = every_model()[name], random(200, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        plain, dense = (model.trace(x, score_gradient=wanted).codes for wanted in (False, True))
        with torch.no_grad():
            frozen = model.encode(x)
    assert torch.equal(plain.indices, dense.indices) and torch.equal(plain.indices, frozen.indices)
    torch.testing.assert_close(plain.values.float(), dense.values.float(), rtol=0.02, atol=0.02)
