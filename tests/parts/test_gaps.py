"""The three gaps: students against slow versions, the model's own loss against the model itself, walks by hand."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as quickly
from hypothesis import strategies as st
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows
from helpers.models import activations, teachers
from helpers.parts import gaps, stand_ins
from helpers.settings import generator
from helpers.study import study
from helpers.study.study import Arm, Outcome
from helpers.training.remedies import Moment
from tests import tiny

LAYER = 1


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """A bench on a tiny random Llama, whose tokenizer has a BOS token, and a text of random words."""
    folder = tmp_path_factory.mktemp("gaps")
    corpus = folder / "words.txt"
    corpus.write_text(tiny.text(1300), encoding="utf-8")
    teacher = teachers.load(tiny.save(folder / "llama", "llama"), device="cpu")
    sizes = {"train": 600, "validation": 120, "test": 500}
    options = {"layer": LAYER, "sizes": sizes, "max_length": 16, "cache_dir": folder / "cache"}
    return gaps.FrozenLayer(teacher, str(corpus), **options)


def place(on, objective="predict", steps=4, batch_size=8):
    return gaps.StandIn(on, objective, steps, batch_size)


def trained(problem, arm, seed=0):
    """A student, and what is said of it."""
    student = study.trained(problem, arm, seed, cache_dir=False).student
    return student, problem.judge(student, seed)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    sizes = tiny.SIZES | {"intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3}
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes)).save_pretrained(folder)
    tiny.tokenizer(bos=True).save_pretrained(folder)
    return teachers.load(str(folder), device="cpu")


def some(active, total, rank, d=6, seed=0):
    bias = torch.linspace(-1, 1, d)
    return stand_ins.family("mixture", active, total, rank).build(
        SimpleNamespace(biases=(bias.clone(), 2 * bias)), seed
    )


def formulas(*starts):
    """What the chapter's cells that begin so define."""
    cells = json.loads((settings.ROOT / "notebooks" / "12_three_gaps.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    defined = {"itertools": itertools}
    for start in starts:
        (source,) = [source for source in sources if source.startswith(start)]
        exec(source, defined)
    return SimpleNamespace(**defined)


chapter = formulas("def equal_cost", "KNOBS =", "def averages", "def interactions")


# -- students ----------------------------------------------------------------------------------------------------------


def slow_mixture(student, x, rank):
    """One token and one expert after another, in NumPy."""
    w = {name: value.double().numpy() for name, value in student.state_dict().items()}
    outputs = []
    for row in x.double().numpy():
        centred = row - w["b_in"]
        scores = [float(r @ centred) for r in w["router.weight"]]
        chosen = sorted(range(len(scores)), key=lambda j: -scores[j])[: student.k]
        top = max(scores[j] for j in chosen)
        mass = {j: math.exp(scores[j] - top) for j in chosen}
        y = w["b_out"].copy()
        for j in chosen:
            gate = student.k * mass[j] / sum(mass.values())
            for i in range(j * rank, (j + 1) * rank):
                z = float(w["encoder.weight"][i] @ centred) + w["encoder.bias"][i]
                y += gate * z * 0.5 * (1 + math.erf(z / math.sqrt(2))) * w["decoder.weight"][i]
        outputs.append(y)
    return np.stack(outputs)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_mixture_is_what_its_formula_says(rank):
    student, x = some(8, 24, rank), torch.randn(5, 6, generator=generator(1))
    assert (student.n_features, student.k, student.n_atoms) == (24 // rank, 8 // rank, 24)
    np.testing.assert_allclose(student(x).detach().numpy(), slow_mixture(student, x, rank), atol=1e-5)


@quickly(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.integers(2, 7), st.integers(0, 99))
def test_rank_one_contains_every_rank(rank, chosen, more, d, seed):
    """The theorem: each neuron given its expert's router row makes the same function of rank 1."""
    active, total = rank * chosen, rank * (chosen + more)
    block = some(active, total, rank, d, seed)
    one = some(active, total, 1, d, seed)
    with torch.no_grad():
        one.router.weight.copy_(block.router.weight.repeat_interleave(rank, 0))
    x = torch.randn(7, d, generator=generator(seed))
    torch.testing.assert_close(one(x), block(x), atol=1e-4, rtol=1e-4)


def test_gates_average_one_and_neurons_are_the_same_at_every_rank():
    ones, fours = some(8, 24, 1), some(8, 24, 4)
    for name in ("encoder.weight", "encoder.bias", "decoder.weight"):
        assert torch.equal(ones.state_dict()[name], fours.state_dict()[name])
    assert torch.equal(fours.router.weight, ones.router.weight[:6])
    for student in (ones, fours):
        with torch.no_grad():
            student.router.weight.zero_()  # equal scores: every gate is 1
        x = torch.randn(3, 6, generator=generator(2))
        codes = student.encode(x)
        bare = F.gelu(student.encoder.chosen(x - student.b_in, codes.indices))
        torch.testing.assert_close(codes.values, bare)


@pytest.mark.parametrize(("active", "total", "rank"), [(8, 24, 3), (8, 20, 8), (8, 24, 0)])
def test_a_rank_that_does_not_divide_is_named(active, total, rank):
    with pytest.raises(ValueError, match=f"rank={rank} does not divide"):
        stand_ins.family("mixture", active, total, rank)


@quickly(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 6), st.sampled_from([2, 3, 4, 8]))
def test_equal_cost_is_as_many_neurons_as_the_budget_holds(chosen, ratio, rank):
    active, total = chosen * rank, chosen * rank * ratio
    cost = some(active, total, rank).multiply_adds
    fewer, of = chapter.equal_cost(active, total, rank)
    assert of == fewer * ratio
    assert some(fewer, of, 1).multiply_adds <= cost < some(fewer + 1, of + ratio, 1).multiply_adds


def test_topk_students_share_their_start_and_only_the_tied_one_shares_its_parts(on):
    untied, tied = (stand_ins.family(kind, 2, 9).build(place(on, "reconstruct"), 0) for kind in ("topk", "tied"))
    assert tied.encoder is tied.decoder and tied.b_in is tied.b_out
    assert untied.b_in is not untied.b_out and untied.unit_norm and untied.router is untied.encoder
    assert torch.equal(untied.encoder.weight, untied.decoder.weight) and untied.encoder is not untied.decoder
    assert torch.equal(untied.encoder.weight, tied.encoder.weight)


def test_arms_that_cannot_be_are_named(on):
    with pytest.raises(ValueError, match="kind='moe'"):
        stand_ins.family("moe", 2, 8)
    with pytest.raises(ValueError, match="objective='reconstruct'"):
        stand_ins.family("tied", 2, 8).build(place(on), 0)
    with pytest.raises(ValueError, match="active=9"):
        stand_ins.family("topk", 9, 8)
    with pytest.raises(ValueError, match="rank=2"):
        stand_ins.family("topk", 2, 8, 2)
    with pytest.raises(ValueError, match="objective='copy'"):
        place(on, "copy")
    with pytest.raises(ValueError, match="signal='both'"):
        stand_ins.family("topk", 2, 8, signal="both")


def test_a_block_is_the_layer_itself(on, moe):
    student = stand_ins.fresh(moe, LAYER, None, 0)
    x = torch.randn(9, 16, generator=generator(0))
    trace = student.trace(x)
    router, experts = student.block.gate.weight, student.block.experts
    scores = (x @ router.T).softmax(-1)
    assert (student.n_features, student.k) == (4, 2)
    assert torch.equal(trace.codes.indices.sort(1).values, scores.topk(2).indices.sort(1).values)
    slow = torch.zeros_like(x)
    for row, y in zip(x, slow, strict=True):
        gates = (row @ router.T).softmax(-1)
        for j in gates.topk(2).indices:
            gate, up = (experts.gate_up_proj[j] @ row).chunk(2)
            y += (gates[j] * (experts.down_proj[j] @ (F.silu(gate) * up))).detach()
    torch.testing.assert_close(trace.output, slow, atol=1e-5, rtol=1e-4)
    assert place(on).judge(student, 0).about["parameters"] == sum(p.numel() for p in moe.mlp(LAYER).parameters())


def test_fresh_weights_are_trainable_and_leave_the_model_alone(moe):
    before = {name: value.clone() for name, value in moe.mlp(LAYER).state_dict().items()}
    one, same, other = (stand_ins.fresh(moe, LAYER, None, seed) for seed in (0, 0, 1))
    assert all(p.requires_grad for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        next(one.parameters()).add_(1)
    assert all(torch.equal(before[name], value) for name, value in moe.mlp(LAYER).state_dict().items())


def test_a_dense_layer_is_no_block(on):
    with pytest.raises(ValueError, match="has no router"):
        stand_ins.Block(on.teacher.mlp(LAYER), 16)


# -- the bench ---------------------------------------------------------------------------------------------------------


def test_pieces_are_the_rows_of_their_tokens(on):
    stream = gaps.PieceStream(place(on, batch_size=5), 3)
    for step in (0, 1, 40):  # a later epoch too
        ids, mask = stream.tokens(step)
        found = on.teacher.run_to(LAYER, ids, mask)
        kept = on.teacher.rows_kept(ids, mask)
        for site, rows in zip(("mlp_in", "mlp_out"), stream(step), strict=True):
            torch.testing.assert_close(rows * on.scale[site], found[site][kept], atol=1e-4, rtol=1e-4)
    epoch = len(stream.lengths) // 5
    seen = [i for step in range(epoch) for i in stream.pieces(step)]
    assert len(set(seen)) == len(seen) == 5 * epoch
    assert stream.pieces(0) != stream.pieces(epoch)
    inputs, targets = gaps.PieceStream(place(on, "reconstruct", batch_size=5), 3)(1)
    assert torch.equal(inputs, targets) and torch.equal(inputs, stream(1)[0])


def test_a_student_that_is_the_layer_adds_nothing(on):
    student = stand_ins.own(place(on), 0)
    rows = student(on.rows("test", "mlp_in"))
    torch.testing.assert_close(rows, on.rows("test", "mlp_out"), atol=1e-4, rtol=1e-4)
    judged = place(on).judge(student, 0)
    assert judged.sums["errors"].sum() < 1e-6 * judged.sums["norms"].sum() and not len(judged.about["rates"])
    np.testing.assert_allclose(judged.sums["nats"], on.unspliced["clean"], rtol=1e-5)
    alike = RankOneDictionary(student.encoder, student.decoder, k=0, shared=torch.nn.Linear(16, 16, bias=False))
    torch.nn.init.eye_(alike.shared.weight)  # the identity, in front of the layer
    spliced = on.nats("test", place(on, "reconstruct").splice(alike)).nats
    np.testing.assert_allclose(spliced, on.unspliced["clean"], rtol=1e-5)


class Swapped(torch.nn.Module):
    """A student in the model's own module tree: another way to put it in its place."""

    def __init__(self, on, student, mlp=None):
        super().__init__()
        self.on, self.student, self.mlp = on, student, mlp

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]) / self.on.scale["mlp_in"]
        site = "mlp_out" if self.mlp is None else "mlp_in"
        y = (self.student(rows) * self.on.scale[site]).view_as(x)
        y = y.clone()
        y[:, 0] = x[:, 0] if self.mlp is not None else self.on.teacher.mlp_before(x[:, 0])  # BOS is left alone
        return y if self.mlp is None else self.mlp(y)


@pytest.mark.parametrize("objective", ["predict", "reconstruct"])
def test_end_to_end_is_the_gradient_of_the_models_loss(on, objective, monkeypatch):
    """Against a model whose MLP module is replaced and whose loss is written out here."""
    problem = place(on, objective, batch_size=4)
    student, stream = stand_ins.family("mixture", 4, 8, 2).build(problem, 0), gaps.PieceStream(problem, 0)
    inputs, targets = stream(2)
    trace = student.trace(inputs)
    mse = (trace.output - targets).square().mean()
    now = Moment(student, inputs, targets, trace, mse, torch.zeros(8, dtype=torch.long), 2, 4, stream=stream)
    assert stand_ins.EndToEnd("fine-tuned").loss(replace(now, step=1)) == stand_ins.EndToEnd("local").loss(now) == 0.0
    assert torch.equal(stand_ins.EndToEnd("fine-tuned").loss(now), stand_ins.EndToEnd("end to end").loss(now))
    (mse + stand_ins.EndToEnd("end to end").loss(now)).backward()
    ours = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    block, mlp = on.teacher.blocks[LAYER], on.teacher.mlp(LAYER)
    object.__setattr__(on.teacher, "mlp_before", mlp)
    block.mlp = Swapped(on, student, mlp if objective == "reconstruct" else None)
    try:
        ids, mask = stream.tokens(2)
        logits = on.teacher.model(ids).logits[:, :-1]
    finally:
        block.mlp = mlp
        object.__delattr__(on.teacher, "mlp_before")
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    F.cross_entropy(logits[real], ids[:, 1:][real]).backward()
    for mine, p in zip(ours, student.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in on.teacher.model.parameters())


def test_training_on_the_loss_lowers_it_and_fitting_lowers_the_error(on):
    problem = place(on, steps=60)
    arms = (replace(stand_ins.family("mixture", 4, 8, 2, signal), lr=1e-2) for signal in ("local", "end to end"))
    (_, fitted), (joint, other) = (trained(problem, arm) for arm in arms)
    start = stand_ins.family("mixture", 4, 8, 2).build(problem, 0)
    before, after = (on.nats("train", problem.splice(student)).nats.sum() for student in (start, joint))
    assert after < before
    assert fitted.sums["errors"].sum() < other.sums["errors"].sum() and fitted.validation["fvu"] < 1


def test_the_rate_is_chosen_by_what_trains_and_every_seed_is_kept(on):
    problem, arm = place(on, steps=40), stand_ins.family("topk", 3, 12)
    assert arm.remedy.chosen_by == "fvu" and stand_ins.EndToEnd("end to end").chosen_by == "nats"
    tried = study.tune(problem, [arm], [1e-5, 1e-2], 0, by="fvu", cache_dir=False, workers=0)[arm.name]
    best = study.at_best({"": arm}, {"": tried}, by="fvu")
    found = study.study(problem, best, [0, 1], cache_dir=False, workers=0)[""]
    assert best[""].lr == min(tried, key=lambda lr: tried[lr].validation["fvu"])
    row = gaps.row(found, tried)
    assert row["fvu_ci"][0] <= row["fvu"] <= row["fvu_ci"][1] and row["multiply_adds"] == 12 * 16 + 3 * 16
    assert row["seeds"] == 2 and row["dead"] == np.mean([(each.about["rates"] == 0).mean() for each in found])
    student, judged = trained(problem, best[""])
    np.testing.assert_allclose(found[0].sums["nats"], on.nats("test", problem.splice(student)).nats)
    np.testing.assert_array_equal(found[0].sums["errors"], judged.sums["errors"])


def test_a_grid_goes_on_where_its_best_is_an_end(on):
    arm, how = stand_ins.family("topk", 3, 12), {"cache_dir": False, "workers": 0}
    slow = study.tune(place(on, steps=6), [arm], [1e-6, 1e-5], 0, further=2, **how)[arm.name]
    assert list(slow) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])
    assert study.choose(slow) == pytest.approx(1e-3)
    assert len(study.tune(place(on, steps=6), [arm], [1e-6, 1e-5], 0, **how)[arm.name]) == 2
    for bad in ([1e-2, 1e-3], [], [0.0, 1.0]):
        with pytest.raises(ValueError, match="lrs="):
            study.tune(place(on), [arm], bad, 0, **how)


def test_what_is_trained_is_kept_under_its_layer_and_not_under_its_name(on, moe, tmp_path):
    arm = Arm("", partial(stand_ins.fresh, moe, LAYER), stand_ins.EndToEnd())
    first, again = (study.run(place(on, steps=2), [arm], 0, cache_dir=tmp_path)[0] for _ in range(2))
    np.testing.assert_array_equal(first.sums["nats"], again.sums["nats"])
    assert first.seconds == again.seconds
    other = study.run(place(on, steps=3), [arm], 0, cache_dir=tmp_path)[0]
    assert (other.sums["nats"] != first.sums["nats"]).any()


def test_half_way_adam_forgets_what_it_knows_of_squared_errors(on):
    stream = gaps.PieceStream(place(on, batch_size=4), 0)
    student, balance, counts = stand_ins.family("topk", 3, 12).build(place(on), 0), stand_ins.EndToEnd("local"), []
    optimiser, silent = torch.optim.Adam(student.parameters()), torch.zeros(12, dtype=torch.long)
    (x, y) = stream(0)
    for step in range(7):
        trace = student.trace(x)
        loss = (trace.output - y).square().mean()
        optimiser.zero_grad()
        (loss + balance.loss(Moment(student, x, y, trace, loss, silent, step, 7, optimiser))).backward()
        optimiser.step()
        counts.append(int(next(iter(optimiser.state.values()))["step"]))
    assert counts == [1, 2, 3, 4, 1, 2, 3]  # half of 7 steps is over behind the fourth


def test_a_whole_model_is_compared_on_the_same_tokens(on, moe, tmp_path):
    whole = gaps.whole(moe, on, [0, 1])
    theirs = activations.losses(moe, on.pieces["test"])
    expected = (theirs.nats.sum() - on.unspliced["clean"].sum()) / on.unspliced["tokens"].sum()
    assert [each.seed for each in whole] == [0, 1]
    assert study.sums({"": whole}).compare(lambda cell: cell.added).value == pytest.approx(expected)
    other = teachers.load(tiny.save(tmp_path, "qwen2"), device="cpu")  # without BOS
    with pytest.raises(ValueError, match="another tokenizer"):
        gaps.whole(other, on, [0])


def test_a_layer_needs_all_three_splits(on):
    with pytest.raises(ValueError, match="one for each of train, validation, test"):
        gaps.FrozenLayer(on.teacher, on.texts["test"]["corpus"], layer=LAYER, sizes={"train": 10})
    with pytest.raises(ValueError, match="corpus=.*: 4 held-out tokens come from . documents; allowed: at least 5"):
        sizes = {"train": 9, "validation": 9, "test": 4}
        gaps.FrozenLayer(on.teacher, on.texts["test"]["corpus"], layer=LAYER, sizes=sizes)
    with pytest.raises(ValueError, match="batch_size=0"):
        place(on, batch_size=0).stream(0, torch.device("cpu"))


# -- rows and walks ----------------------------------------------------------------------------------------------------


def outcomes(nats, errors):
    base = {name: np.full(3, value) for name, value in (("clean", 10.0), ("zero", 20.0), ("mean", 18.0), ("tokens", 5))}
    about = {"objective": "predict", "rates": [0.0, 1.0], "parameters": 1, "multiply_adds": 1, "router": 1}
    arm = stand_ins.family("topk", 1, 2)
    columns = [{"nats": np.array(n, float), "errors": np.array(e, float)} for n, e in zip(nats, errors, strict=True)]
    norms = {"norms": np.full(3, 4.0)}
    return [Outcome(c | norms | base, {}, about, arm=arm, seed=seed) for seed, c in enumerate(columns)]


def test_numbers_of_a_row_are_ratios_of_sums():
    one = outcomes([[11, 12, 13], [11, 12, 10]], [[1, 2, 3], [1, 2, 0]])
    two = outcomes([[15, 15, 15], [15, 15, 15]], [[1, 1, 1], [1, 1, 1]])
    row = gaps.row(one, {})
    assert row["added"] == pytest.approx((36 + 33) / 2 / 15 - 2) and row["dead"] == 0.5
    assert row["recovered"] == pytest.approx((60 - 34.5) / 30)
    assert row["recovered_mean"] == pytest.approx(19.5 / 24)
    assert row["fvu"] == pytest.approx(4.5 / 12)
    found = study.sums({"one": one, "two": two}).compare(lambda a, b: b.added - a.added)
    assert found.value == pytest.approx(1 - row["added"]) and found.resampled == "seed × article"
    assert found.by_seed == pytest.approx([(45 - 36) / 15, (45 - 33) / 15]) and found.n == (2, 3)
    assert found.ci[0] < found.value < found.ci[1]


corner_values = st.lists(st.floats(-5, 5), min_size=8, max_size=8).map(
    lambda v: dict(zip(chapter.CORNERS, v, strict=True))
)


@quickly(deadline=None, max_examples=50)
@given(corner_values)
def test_every_walk_ends_where_all_others_do(values):
    orders = chapter.walks(values)
    assert set(orders) == set(itertools.permutations(chapter.KNOBS))
    whole = values[True, True, True] - values[False, False, False]
    for steps in orders.values():
        assert sum(steps.values()) == pytest.approx(whole, abs=1e-9)
    assert sum(chapter.averages(values).values()) == pytest.approx(whole, abs=1e-9)


@quickly(deadline=None, max_examples=50)
@given(corner_values)
def test_averages_and_interactions_by_their_formulas(values):
    def v(*turned):
        return values[tuple(knob in turned for knob in chapter.KNOBS)]

    edges, twists = chapter.edges(values), chapter.interactions(values)
    assert len(edges) == 12 and len(twists) == 6
    for (i, j, on), twist in twists.items():
        k = {knob for knob in chapter.KNOBS if knob not in (i, j)} if on else set()
        assert twist == pytest.approx(v(i, j, *k) - v(i, *k) - v(j, *k) + v(*k), abs=1e-9)
    for i in chapter.KNOBS:
        j, k = (knob for knob in chapter.KNOBS if knob != i)
        four = [v(i) - v(), v(i, j) - v(j), v(i, k) - v(k), v(i, j, k) - v(j, k)]
        assert chapter.averages(values)[i] == pytest.approx(np.dot(four, [1 / 3, 1 / 6, 1 / 6, 1 / 3]), abs=1e-9)
        assert sorted(step for (knob, _), step in edges.items() if knob == i) == pytest.approx(sorted(four), abs=1e-9)


@quickly(deadline=None, max_examples=50)
@given(st.tuples(*[st.floats(-3, 3)] * 4))
def test_gaps_that_add_have_no_spread(parts):
    start, *steps = parts
    values = {c: start + sum(s for s, turned in zip(steps, c, strict=True) if turned) for c in chapter.CORNERS}
    assert max(map(abs, chapter.interactions(values).values())) < 1e-9
    assert list(chapter.averages(values).values()) == pytest.approx(steps, abs=1e-9)


def gated(neurons, on):
    """The layer's MLP from a tiny Llama's, neuron by neuron: activations and what they write."""
    mlp, x = on.teacher.mlp(LAYER), on.rows("train", "mlp_in") * on.scale["mlp_in"]
    gate, up, down = (part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    acts = F.silu(x @ gate[neurons].T) * (x @ up[neurons].T)
    return x, acts, up[neurons], down[:, neurons]


def test_a_transcoder_from_the_mlps_weights_is_its_neurons_made_linear(on):
    """With all of its latents active, against least squares neuron by neuron."""
    neurons = on.teacher.mlp(LAYER).up_proj.weight.shape[0]
    student = stand_ins.family("from weights", 2 * neurons, 2 * neurons).build(place(on), 0)
    x, acts, up, down = gated(slice(None), on)
    centred, expected = x - x.mean(0), torch.zeros_like(x)
    for i in range(neurons):
        read = centred @ up[i]
        slope = ((acts[:, i] - acts[:, i].mean()) * read).sum() / read.square().sum()
        expected += torch.outer(slope * read, down[:, i])
    found = student(x / on.scale["mlp_in"]) * on.scale["mlp_out"] - on.mean("mlp_out") * on.scale["mlp_out"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(student.decoder.weight.norm(dim=1), torch.ones(2 * neurons))


def test_few_latents_take_the_neurons_that_write_most_and_many_leave_some_at_random(on):
    _, acts, up, down = gated(slice(None), on)
    writes = acts.square().mean(0) * down.square().sum(0)
    few = stand_ins.family("from weights", 2, 4).build(place(on), 0)
    kept = writes.topk(2).indices
    torch.testing.assert_close(few.decoder.weight[:2], F.normalize(down.T[kept], dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(few.decoder.weight[2:], -few.decoder.weight[:2])
    neurons = len(up)
    many, plain = (stand_ins.family(kind, 2, 3 * neurons).build(place(on), 0) for kind in ("from weights", "topk"))
    assert torch.equal(many.decoder.weight[2 * neurons :], plain.decoder.weight[2 * neurons :])
    assert not torch.equal(many.decoder.weight[: 2 * neurons], plain.decoder.weight[: 2 * neurons])
    with pytest.raises(ValueError, match="objective='reconstruct' has no such start; allowed: 'predict'"):
        stand_ins.family("from weights", 2, 4).build(place(on, "reconstruct"), 0)


def test_an_mlp_whose_maps_are_not_found_is_named():
    with pytest.raises(ValueError, match="Linear has linear maps"):
        stand_ins._up_and_down(torch.nn.Linear(4, 4))


@pytest.mark.parametrize("signal", ["local", "fine-tuned"])
def test_a_balanced_twin_adds_the_switch_loss_and_nothing_else(on, signal):
    arm = stand_ins.family("mixture", 4, 8, 2, signal)
    twin, stream = stand_ins.balanced(arm, 0.5), gaps.PieceStream(place(on, batch_size=4), 0)
    assert not arm.remedy.needs_scores and twin.remedy.needs_scores and twin.remedy.chosen_by == arm.remedy.chosen_by
    student = arm.build(place(on), 0)
    for step in (1, 3):  # in both halves
        inputs, targets = stream(step)
        trace = student.trace(inputs, score_gradient=True)
        mse = (trace.output - targets).square().mean()
        now = Moment(student, inputs, targets, trace, mse, torch.zeros(8, dtype=torch.long), step, 4, stream=stream)
        scores = trace.scores
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0).mean(0) / 2
        expected = 0.5 * scores.shape[1] * (chosen * scores.softmax(-1).mean(0)).sum()
        more = twin.remedy.loss(now) - arm.remedy.loss(now)
        torch.testing.assert_close(more, expected, atol=1e-4, rtol=1e-4)


def test_rates_are_chosen_on_validation_rows_alone(on):
    student = stand_ins.family("topk", 3, 12).build(place(on), 0)
    both, one = (
        replace(place(on), judged=splits).judge(student, 0) for splits in (("validation", "test"), ("validation",))
    )
    assert both.validation == one.validation and both.sums and not one.sums
    seen = student.encode(on.rows("validation", "mlp_in")).indices
    assert one.validation["dead"] == pytest.approx(1 - len(seen.unique()) / 12, abs=0.2)  # chosen, at times with a zero


def test_blocks_before_the_layer_run_once_and_change_nothing(on, monkeypatch):
    problem = place(on, "reconstruct", batch_size=4)
    student, runs = stand_ins.family("topk", 3, 12).build(problem, 0), []
    hook = on.teacher.blocks[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    try:
        on._entered.clear()
        first = problem.judge(student, 0).sums["nats"]
        often = len(runs)
        again = problem.judge(student, 0).sums["nats"]
        assert often and len(runs) == often
        monkeypatch.setattr(gaps, "KEPT_BYTES", 0)
        on._entered.clear()
        plain = problem.judge(student, 0).sums["nats"]
        assert not on._entered
        problem.judge(student, 0)
        assert len(runs) > often
    finally:
        hook.remove()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, plain)
    assert "forward" not in vars(on.teacher.blocks[0])


def test_a_dense_layer_is_the_familys_member_without_atoms(on):
    student = stand_ins.own(place(on), 0)
    assert isinstance(student, RankOneDictionary) and student.k == 0 and isinstance(student.encoder, Rows)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in on.teacher.model.parameters())
