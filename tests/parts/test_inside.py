"""The implicit SAE and its controls, against slow NumPy, closed forms and a layer whose answer is planted."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from helpers import dictionary
from helpers.dictionary import pursuit
from helpers.models import activations, checkpoints, teachers
from helpers.parts import explained, inside, lens, own_codes
from helpers.parts.explained import Explained, Key, listed
from helpers.parts.language_model import Sae
from helpers.parts.worlds import random_atoms
from helpers.press import figures
from helpers.study import study
from tests import tiny
from tests.reference.metrics_numpy import of_two

D, EXPERTS, TOP_K, LAYER = 16, 6, 2, 1


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A random OLMoE whose experts have W_down of rank one, harvested: (teacher, folder, bench)."""
    cache = tmp_path_factory.mktemp("implicit")
    sizes = dict(vocab_size=64, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    config = transformers.OlmoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=TOP_K, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for block in model.model.layers:
            down = block.mlp.experts.down_proj
            down.copy_(noise(EXPERTS, D, 1, seed=1) * noise(EXPERTS, 1, 8, seed=2))
    model.save_pretrained(cache / "moe")
    tiny.tokenizer(bos=True).save_pretrained(cache / "moe")
    paragraphs = enumerate(tiny.text(300).split("\n\n"))
    corpus = cache / "text.jsonl"
    corpus.write_text("\n".join(json.dumps({"article": i // 3, "text": each}) for i, each in paragraphs), "utf-8")
    teacher = teachers.load(str(cache / "moe"), device="cpu")
    stores = [
        activations.harvest(teacher, str(corpus), layer=LAYER, n_tokens=n, split=split, cache_dir=cache)
        for split, n in (("train", 400), ("validation", 150))
    ]
    moe = checkpoints.read(cache / "moe", [LAYER])[0]
    return teacher, corpus, inside.LayerRows(moe, *stores, rank=3)


@pytest.fixture(scope="module")
def bench(scene):
    return scene[2]


def rows_of(bench, which, site, centred):
    rows = np.array(getattr(bench, which)[site], np.float64)
    return rows - np.array(bench.fitting[site], np.float64).mean(0) if centred else rows


def slow_fve(y, atoms, support):
    """Row by row with NumPy's least squares."""
    explained = 0.0
    for row, chosen in zip(y, np.asarray(support), strict=True):
        basis = atoms[chosen].T
        rebuilt = basis @ np.linalg.lstsq(basis, row, rcond=1e-9)[0]
        explained += (row**2).sum() - ((row - rebuilt) ** 2).sum()
    return explained / (y**2).sum()


def slow_choice(bench):
    scores = np.array(bench.judging["mlp_in"], np.float64) @ bench.moe.router.double().numpy().T
    return np.argsort(-scores, axis=1)[:, :TOP_K]


# -- the dictionary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_the_dictionary_chooses_as_the_layer_does_and_codes_are_its_scores(bench, rank):
    sae = inside.implicit_sae(bench.moe, bench.directions[:, :rank])
    x = bench.rows("judging", "mlp_in", False)
    codes = sae.encode(x)
    assert torch.equal(codes.indices[:, ::rank] // rank, bench.choice().indices)
    scores = (x @ bench.moe.router.T).gather(1, bench.choice().indices).repeat_interleave(rank, 1)
    torch.testing.assert_close(codes.values, scores)
    slow = np.zeros(x.shape)
    for t in range(len(x)):
        for e in slow_choice(bench)[t]:
            score = float(bench.moe.router[e].double() @ x[t].double())
            slow[t] += score * bench.directions[e, :rank].double().sum(0).numpy()
    np.testing.assert_allclose(sae(x).detach(), slow, rtol=1e-4, atol=1e-4)


def test_a_layer_that_chooses_in_another_way_is_named(bench):
    with pytest.raises(ValueError, match="correction"):
        inside.implicit_sae(replace(bench.moe, correction=torch.zeros(EXPERTS)), bench.directions)
    with pytest.raises(ValueError, match="6 × 16"):
        inside.implicit_sae(bench.moe, bench.directions[:, :, 1:])


def test_it_goes_to_saelens_and_back(bench, tmp_path):
    scores = own_codes.weighed(bench, "fitting", "score")
    scores = dictionary.SparseCodes(scores.indices, scores.values.relu())
    atoms = own_codes.scaled(bench.directions[:, 0], scores, bench.rows("fitting", "mlp_in"), "each")
    sae = inside.implicit_sae(bench.moe, atoms[:, None], activation="relu", b_out=bench.mean("mlp_in"))
    dictionary.save_saelens(sae, tmp_path)
    again = dictionary.load_saelens(tmp_path)
    x = bench.rows("judging", "mlp_in", False)
    torch.testing.assert_close(again(x), sae(x))


# -- projections -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(5, 9), st.integers(0, 99))
@hypothesis_settings(max_examples=25, deadline=None)
def test_projection_is_least_squares(k, d, seed):
    atoms, y = noise(7, d, seed=seed).double(), noise(11, d, seed=seed + 1).double()
    support = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i))[:k] for i in range(11)])
    spread = torch.linalg.svdvals(atoms[support])
    assume(bool((spread[:, -1] > 0.01 * spread[:, 0]).all()))  # where atoms nearly depend, a threshold decides
    found = inside.projected(atoms, support, y, 2 * y)
    assert float(found[0].sum() / y.square().sum()) == pytest.approx(slow_fve(y.numpy(), atoms.numpy(), support))
    torch.testing.assert_close(found[1], 4 * found[0])
    values = pursuit.least_squares(y, atoms, support)
    left = y - torch.einsum("bk,bkd->bd", values, atoms[support])
    torch.testing.assert_close(found[0], y.square().sum(1) - left.square().sum(1), rtol=1e-6, atol=1e-8)


def test_atoms_that_depend_on_each_other_count_once():
    atoms = noise(4, 8)
    atoms[1], atoms[2] = atoms[0], -2 * atoms[0]
    y = noise(5, 8, seed=3)
    three = inside.projected(atoms, torch.tensor([[0, 1, 2]] * 5), y)[0]
    one = inside.projected(atoms, torch.tensor([[0]] * 5), y)[0]
    torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(inside.in_span(y, atoms[:3]), one, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="9 atoms a row"):
        inside.projected(atoms, torch.zeros(5, 9, dtype=torch.long))


def test_random_directions_explain_k_of_d_whatever_the_rows():
    """Mean over many draws, within five standard errors; the rows are far from isotropic and the choice is not even."""
    y, k, n, d = noise(40, 12) * torch.logspace(0, -2, 12) + 3.0, 3, 8, 12
    support = (noise(40, n, seed=4) + torch.linspace(2, 0, n)).topk(k, dim=1).indices
    draw = torch.Generator().manual_seed(5)
    shares = torch.tensor([
        float(inside.projected(random_atoms(n, d, draw), support, y)[0].sum())
        for _ in range(400)
    ]) / float(y.double().square().sum())  # fmt: skip
    assert abs(shares.mean() - k / d) < 5 * shares.std() / 400**0.5
    assert shares.std() / 400**0.5 < 0.02


def test_fixed_coefficients_of_random_directions_cost_their_own_squares():
    y, values = noise(30, 10), noise(30, 2, seed=1)
    support, draw = torch.arange(60).view(30, 2) % 5, torch.Generator().manual_seed(2)
    explained = []
    for _ in range(500):
        atoms = random_atoms(5, 10, draw)
        rebuilt = dictionary.weighted_sum(values, support, atoms)
        explained.append(float(y.square().sum() - (y - rebuilt).square().sum()))
    explained = torch.tensor(explained)
    assert abs(explained.mean() + float(values.square().sum())) < 5 * explained.std() / 500**0.5


# -- the ladder --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(bench):
    return inside.ladder(bench, [0, 1], ranks=[1, 2])


def test_directions_are_the_left_singular_vectors(bench):
    w = torch.cat(list(bench.moe.weights())).double().numpy()
    for e in range(EXPERTS):
        u = np.linalg.svd(w[e])[0][:, 0]
        assert abs(u @ bench.directions[e, 0].numpy()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("site", inside.SITES)
@pytest.mark.parametrize("centred", [True, False])
def test_each_rung_is_what_its_name_says(bench, judged, site, centred):
    y, chosen = rows_of(bench, "judging", site, centred), slow_choice(bench)
    first = bench.directions[:, 0].double().numpy()

    def found(control, rank=1):
        return judged[Key(control, site, centred, rank)].fve

    assert found("implicit") == pytest.approx(slow_fve(y, first, chosen), rel=1e-4)
    for control, which, column in (("second", "w_down", 1), ("w_up", "w_up", 0), ("w_gate", "w_gate", 0)):
        w = torch.cat(list(bench.moe.weights(which))).double().numpy()
        if control != "second":  # of a rank-one matrix the second direction means nothing
            other = np.stack([np.linalg.svd(m)[0][:, column] for m in w])
            assert found(control) == pytest.approx(slow_fve(y, other, chosen), rel=1e-4)
    fitting = rows_of(bench, "fitting", site, centred)
    for rank in (1, 2):
        axes = np.linalg.svd(fitting)[2][: TOP_K * rank]
        assert found("pca", rank) == pytest.approx(((y @ axes.T) ** 2).sum() / (y**2).sum(), rel=1e-4)
    everything = np.tile(np.arange(EXPERTS), (len(y), 1))
    assert found("all_directions") == pytest.approx(slow_fve(y, first, everything), rel=1e-4)
    assert found("all_directions") >= found("implicit") - 1e-6
    assert found("implicit", 2) >= found("implicit") - 1e-6


def test_draws_are_those_of_the_seeds_and_pair_what_they_say(bench, judged):
    y, own = rows_of(bench, "judging", "mlp_out", True), bench.choice().indices
    first = bench.directions[:, 0]
    for i, seed in enumerate((0, 1)):
        draw = torch.Generator().manual_seed(seed)
        atoms = random_atoms(EXPERTS, D, draw)
        elsewhere = bench.choice(moe=inside.random_router(bench.moe, draw)).indices
        moved = inside.derangement(EXPERTS, draw)
        assert not (moved == torch.arange(EXPERTS)).any()
        rows = torch.randperm(len(own), generator=draw)
        expected = {
            "random": (atoms, elsewhere),
            "random_directions": (atoms, own),
            "random_router": (first, elsewhere),
            "shuffled": (first[moved], own),
            "other_token": (first, own[rows]),
        }
        after = draw.get_state()
        drawn = torch.randn(EXPERTS, D, generator=draw).double().numpy()
        fitting = rows_of(bench, "fitting", "mlp_out", True)
        values, vectors = np.linalg.eigh(fitting.T @ fitting)
        shaped = torch.from_numpy(drawn @ vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)
        expected["covariance"] = (shaped, elsewhere)
        draw.set_state(after)
        neurons = torch.randn(EXPERTS, bench.moe.d_ff, generator=draw)
        w_down = torch.cat(list(bench.moe.weights()))
        written = torch.stack([w @ g for w, g in zip(w_down, neurons, strict=True)])
        expected["in_w_down"] = (written, own)
        for control, (vectors, support) in expected.items():
            slow = slow_fve(y, vectors.double().numpy(), support.numpy())
            assert judged[Key(control, "mlp_out", True)].by_draw[i] == pytest.approx(slow, rel=1e-4), control


def test_a_layer_of_rank_one_experts_is_rebuilt_exactly_and_its_pairing_matters(judged):
    """The planted answer: outputs lie in the span of the chosen first directions."""
    assert judged[Key("implicit", "mlp_out", False)].fve == pytest.approx(1, abs=1e-5)
    assert judged[Key("implicit", "mlp_in", False)].fve < 0.5
    for broken in ("shuffled", "random_router", "random_directions", "other_token", "random"):
        assert judged[Key(broken, "mlp_out", False)].fve < 0.8, broken
    walk = explained.factors([judged], "mlp_out", TOP_K / D)
    product = walk["directions"].value * walk["routing"].value * walk["pairing"].value
    assert product == pytest.approx(walk["ratio"].value) and walk["ratio"].ci[0] <= product <= walk["ratio"].ci[1]
    assert walk["ratio"].value == pytest.approx(judged[Key("implicit", "mlp_out", True)].fve * D / TOP_K)
    assert walk["covariance"].value * walk["trained"].value == pytest.approx(walk["directions"].value)
    known = {key: part for key, part in judged.items() if key.control != "covariance"}
    assert set(explained.factors([known], "mlp_out", TOP_K / D)) == set(walk) - {"covariance", "trained"}


def test_noise_with_the_covariance_is_that_noise_and_random_neurons_of_a_rank_one_expert_write_its_direction(bench):
    """With one direction a row its expectation is E gᵀC S C g / (gᵀCg tr S), S of the judging rows; at least 1/d."""
    single = replace(bench, moe=replace(bench.moe, top_k=1))
    found = inside.ladder(single, range(60), controls=["covariance", "in_w_down", "implicit"])
    for site in inside.SITES:
        fitting, y = (rows_of(bench, which, site, True) for which in inside.WHICH)
        values, vectors = np.linalg.eigh(fitting.T @ fitting)
        drawn = np.random.default_rng(0).normal(size=(20_000, D)) * np.sqrt(values) @ vectors.T
        along = (drawn @ (y.T @ y) * drawn).sum(1) / (drawn**2).sum(1) / (y**2).sum()
        share = found[Key("covariance", site, True)].fve
        assert 1 / D < share == pytest.approx(along.mean(), rel=0.1)
    own, written = (found[Key(control, "mlp_out", True)] for control in ("implicit", "in_w_down"))
    assert written.by_draw == pytest.approx([own.fve] * 60, rel=1e-4)


def test_overlap_counts_the_handed_directions_of_other_chosen_experts(bench):
    chosen = bench.choice().indices.numpy()
    for seed, share in enumerate(inside.overlap(bench, [0, 1, 2])):
        draw = torch.Generator().manual_seed(seed)
        random_atoms(EXPERTS, D, draw)
        inside.random_router(bench.moe, draw)
        moved = inside.derangement(EXPERTS, draw).numpy()
        kept = [len({int(moved[j]) for j in row} & set(row.tolist())) for row in chosen]
        assert share == pytest.approx(np.mean(kept) / TOP_K)


def test_what_is_made_of_several_shares_is_paired_over_draws_and_articles(judged):
    """As chapter 11 compares the pairing of two checkpoints."""
    own, shuffled = (judged[Key(control, "mlp_out", True)] for control in ("implicit", "shuffled"))
    worse = Explained(4 * shuffled.explained, shuffled.total)

    def grown(shares):
        pairing = (shares[::2] / shares[1::2]).reshape(2, -1)
        return explained.geometric(pairing[0]) / explained.geometric(pairing[1])

    assert listed(explained.estimate(grown, own, shuffled, own, shuffled)) == pytest.approx([1, 1, 1])
    pairs = own, shuffled, own, shuffled, own, shuffled, own, worse
    assert listed(explained.estimate(grown, *pairs)) == pytest.approx([2, 2, 2])


def test_fitted_directions_never_do_worse_where_they_were_fitted(bench):
    y, support, start = bench.rows("fitting", "mlp_in"), bench.choice("fitting").indices, bench.directions[:, 0]
    before = float(inside.projected(start, support, y)[0].sum())
    for rounds in (1, 3, 9):
        fitted = inside.fit_directions(y, start, support, rounds=rounds)
        after = float(inside.projected(fitted, support, y)[0].sum())
        assert after >= before * (1 - 1e-6)
        before = after
    torch.testing.assert_close(fitted.norm(dim=1), torch.ones(EXPERTS))


def test_fitted_directions_find_planted_ones():
    truth = random_atoms(5, 8, torch.Generator().manual_seed(0))
    support = noise(600, 5, seed=1).topk(2, dim=1).indices
    y = dictionary.weighted_sum(noise(len(support), 2), support, truth)
    start = torch.nn.functional.normalize(truth + 0.1 * noise(5, 8, seed=2), dim=1)
    found = inside.fit_directions(y, start, support, rounds=60)
    assert float((found * truth).sum(1).abs().min()) > 0.999


def test_bad_parameters_are_named(scene, bench):
    teacher, corpus, _ = scene
    with pytest.raises(ValueError, match="controls="):
        inside.ladder(bench, [0], controls=["implicit", "nobody"])
    with pytest.raises(ValueError, match=r"ranks=\[1, 4\]; allowed: 1 to 3, the bench's rank"):
        inside.ladder(bench, [0], ranks=[1, 4])
    with pytest.raises(ValueError, match=r"seeds=\[\]"):
        inside.ladder(bench, [])
    with pytest.raises(ValueError, match="rank=9"):
        replace(bench, rank=9)
    with pytest.raises(ValueError, match="both fit and judge"):
        replace(bench, judging=bench.fitting)
    with pytest.raises(ValueError, match="which="):
        bench.rows("test", "mlp_in")
    with pytest.raises(ValueError, match="rule="):
        own_codes.weighed(bench, "fitting", "softmax")
    with pytest.raises(ValueError, match="derangement"):
        inside.derangement(1, torch.Generator())


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"ranks": [2, 4]}, r"ranks=\[2, 4\]; allowed: whole numbers, 1 to 8 = d_model // top_k, 1 among them"),
        ({"ranks": [1, 9]}, r"ranks=\[1, 9\]"),
        ({"seeds": []}, r"seeds=\[\]; allowed: at least one"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"lrs": []}, r"lrs=\[\]; allowed: at least one"),
        ({"controls": ["implicit", "nobody"]}, "controls='nobody' is unknown; allowed: 'implicit', "),
        ({"controls": ["implicit"], "needed": ["implicit", "pca"]}, r"lacks \['pca'\]; allowed: any that hold"),
    ],
)
def test_parameters_are_looked_at_before_long_work(bench, bad, told):
    inside.check([bench.moe], seeds=[0], ranks=[1, 8], lrs=[0.1], controls=["pca"], needed=["pca"])
    with pytest.raises(ValueError, match=told):
        inside.check([bench.moe], **{"seeds": [0], **bad})
    with pytest.raises(ValueError, match="layer 1 chooses with a correction or in groups"):
        inside.check([replace(bench.moe, n_group=2)], seeds=[0])
    with pytest.raises(ValueError, match="layers="):
        inside.check([], seeds=[0])


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_ratios_pair_draws_and_articles():
    random = np.random.default_rng(0)
    total = random.uniform(5, 10, 8)
    many = Explained(random.uniform(1, 2, (4, 8)), total)
    one = Explained(3 * many.explained.mean(0)[None], total)
    assert explained.fve(many).value == pytest.approx(many.explained.sum() / 4 / total.sum())
    thrice = Explained(3 * many.explained, total)
    assert listed(explained.ratio([thrice], [many])) == pytest.approx([3, 3, 3])
    value, low, high = listed(explained.ratio([one], [many]))
    assert value == pytest.approx(3) and low < 3 < high
    both = explained.ratio([thrice, many], [many, many])
    assert listed(both) == pytest.approx([3**0.5] * 3)
    assert (
        both.n == (4, 8)
        and both.resampled == "seed × article"
        and explained.ratio([one], [one]).resampled == "articles"
    )
    assert explained.ratio([many, thrice], 0.1).value == pytest.approx(3**0.5 * explained.fve(many).value / 0.1)
    few = Explained(many.explained[:, :4], total[:4])
    assert listed(explained.ratio([few], [few])) == [pytest.approx(1), None, None]
    lone = Explained(many.explained[:, :1], total[:1])
    assert listed(explained.fve(lone)) == [pytest.approx(lone.fve), None, None]
    assert explained.fve(many, level=None).ci is None
    worse = explained.fve(Explained(-many.explained, total))  # codes by a rule can be worse than nothing
    assert worse.value == pytest.approx(-explained.fve(many).value) and worse.ci[1] < 0
    with pytest.raises(ValueError, match="draws × articles"):
        explained.ratio([many], [few])
    with pytest.raises(ValueError, match="as many"):
        explained.ratio([many, many], [many])


def test_the_interval_over_layers_leaves_layers_out_too():
    total = np.full(8, 2.0)
    parts = [Explained(np.full((1, 8), share), total) for share in (0.4, 1.6)]
    value, low, high = listed(explained.over_layers(parts, 0.1))
    assert value == pytest.approx(explained.ratio(parts, 0.1).value)
    assert listed(explained.ratio(parts, 0.1)) == pytest.approx([value] * 3)  # the articles do not differ: layers do
    assert (low, high) == pytest.approx(of_two(value, 2, 8))
    assert listed(explained.over_layers(parts[:1], 0.1)) == pytest.approx([2, 2, 2])
    assert (explained.over_layers(parts, 0.1).n, explained.over_layers(parts[:1], 0.1).n) == ((2, 8), 8)
    few = [Explained(part.explained[:, :4], total[:4]) for part in parts]
    assert explained.over_layers(few, 0.1).ci is None
    with pytest.raises(ValueError, match=r"parts of \[1, 2\] draws; allowed: one draw each"):
        explained.over_layers([parts[0], Explained(np.ones((2, 8)), total)], 0.1)


def test_predictions_are_graded_by_their_intervals():
    assert explained.above((2, 1.5, 2.5), 1) is True and explained.above((2, 1.5, 2.5), 3) is False
    assert explained.above((2, 1.5, 2.5), 2.2) is None and explained.above((2, None, None), 1) is True


def test_participation_ratio_is_that_of_the_covariance(bench):
    values = np.linalg.eigvalsh(np.cov(rows_of(bench, "fitting", "mlp_in", False).T))
    assert inside.participation(bench, "mlp_in") == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)


# -- fixed coefficients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", own_codes.RULES)
def test_what_is_fitted_is_least_squares(bench, rule):
    scores, atoms = own_codes.weighed(bench, "fitting", rule), bench.directions[:, 0]
    y = bench.rows("fitting", "mlp_out")
    z, d = scores.to_dense(EXPERTS).double().numpy(), atoms.double().numpy()
    design = np.einsum("tn,nd->tdn", z, d).reshape(-1, EXPERTS)
    each = np.linalg.lstsq(design, y.double().numpy().ravel(), rcond=None)[0]
    found = own_codes.scaled(atoms, scores, y, "each").double().numpy()
    np.testing.assert_allclose(found, each[:, None] * d, atol=1e-4)
    total = design.sum(1)
    one = total @ y.double().numpy().ravel() / (total @ total)
    np.testing.assert_allclose(own_codes.scaled(atoms, scores, y, "one"), one * d, atol=1e-5)
    assert own_codes.scaled(atoms, scores, y, "none") is atoms
    with pytest.raises(ValueError, match="fitted="):
        own_codes.scaled(atoms, scores, y, "two")


def test_codes_by_rule_are_the_layers_own(bench):
    x = bench.rows("judging", "mlp_in", False).double()
    logits = x @ bench.moe.router.double().T
    chosen = bench.choice().indices
    torch.testing.assert_close(
        own_codes.weighed(bench, "judging", "score").values.double(), logits.gather(1, chosen), rtol=1e-4, atol=1e-5
    )
    gates = own_codes.weighed(bench, "judging", "gate").values.double()
    torch.testing.assert_close(gates, logits.softmax(1).gather(1, chosen), rtol=1e-4, atol=1e-6)


def test_rules_are_judged_on_what_they_leave(bench):
    found = own_codes.by_rule(bench, [0, 1, 2])
    y, gates = rows_of(bench, "judging", "mlp_out", True), own_codes.weighed(bench, "judging", "gate")
    rebuilt = gates.to_dense(EXPERTS).double().numpy() @ bench.directions[:, 0].double().numpy()
    expected = 1 - ((y - rebuilt) ** 2).sum() / (y**2).sum()
    assert found["implicit", "mlp_out", "gate", "none"].fve == pytest.approx(expected, rel=1e-4)
    assert len(found["random", "mlp_in", "score", "one"].explained) == 3
    assert found["random", "mlp_in", "score", "none"].fve < 0


# -- trained dictionaries ----------------------------------------------------------------------------------------------


def test_a_trained_sae_of_the_same_shape(bench):
    stores = {"train": bench.fitting, "validation": bench.judging, "test": bench.judging}
    folders, shape = {split: str(store.folder) for split, store in stores.items()}, (EXPERTS, TOP_K)
    problem = own_codes.TrainedSAE(folders, "mlp_in", steps=30, batch_size=64)
    sae = study.trained(problem, study.Arm("", Sae(*shape, centred=True), lr=1e-2), 0, cache_dir=False).student
    assert (sae.n_features, sae.k, sae.d_in) == (EXPERTS, TOP_K, D)
    rate, parts = own_codes.best_sae(problem, shape, [1e-2, 1e-9], 0, cache_dir=False)
    free, own = parts["sae"], parts["sae_own"]
    assert 0 < free.fve < 1 and rate == 1e-2
    scale = float(bench.fitting.moments("mlp_in").variance) ** 0.5
    x = bench.rows("judging", "mlp_in", False)
    y = rows_of(bench, "judging", "mlp_in", True)
    left = x.numpy() - scale * sae(x / scale).detach().numpy()
    assert own.fve == pytest.approx(1 - (left**2).sum() / (y**2).sum(), rel=1e-4)
    assert (free.explained > own.explained - 1e-6).all(), (
        "least squares starts from b_dec, so its own codes are in reach"
    )
    rest = x.double().numpy() - scale * sae.b_out.detach().double().numpy()
    chosen, atoms = sae.encode(x / scale).indices.numpy(), sae.decoder.weight.detach().double().numpy()
    left = (rest**2).sum() * (1 - slow_fve(rest, atoms, chosen))
    assert free.fve == pytest.approx(1 - left / (y**2).sum(), rel=1e-4)


# -- what experts write ------------------------------------------------------------------------------------------------


def test_the_lens_is_the_final_norm_and_the_unembedding(scene, bench):
    teacher = scene[0]
    gamma = teacher.model.model.norm.weight.double().numpy()
    by_hand = (bench.directions[:, 0].double().numpy() * gamma) @ teacher.model.lm_head.weight.double().numpy().T
    np.testing.assert_allclose(lens.lens(teacher, bench.directions[:, 0]), by_hand * D**0.5, rtol=1e-2, atol=1e-3)


def test_signs_are_those_of_the_experts_tokens(bench):
    turned, y = lens.oriented(bench), rows_of(bench, "fitting", "mlp_out", True)
    chosen = bench.choice("fitting").indices.numpy()
    for e in range(EXPERTS):
        mine = y[(chosen == e).any(1)]
        if len(mine):
            assert (mine @ turned[e].double().numpy()).sum() >= 0
        assert abs(float(turned[e] @ bench.directions[e, 0])) == pytest.approx(1, abs=1e-5)


def test_hits_of_the_lens_one_token_at_a_time(bench):
    logits, top = noise(EXPERTS, 64, seed=9), 5
    hits = lens.lens_hits(bench, logits, top)
    words = np.argsort(-logits.numpy(), axis=1)[:, :top]
    chosen, store = bench.choice().indices.numpy(), bench.judging
    pairs = [
        (t, store.token_id[t + 1]) for t in range(store.n - 1) if store.rows["text"][t] == store.rows["text"][t + 1]
    ]
    base = np.mean([[after in words[i] for i in range(EXPERTS)] for _, after in pairs], axis=0)
    own, own_base, shuffled = [], [], []
    for t, after in pairs:
        strangers = [i for i in range(EXPERTS) if i not in chosen[t]]
        for j in chosen[t]:
            own.append(after in words[j])
            own_base.append(base[j])
            shuffled.append(np.mean([(after in words[i]) - base[i] for i in strangers]))
    own, own_base, shuffled = map(np.mean, (own, own_base, shuffled))
    assert hits["own"].value == pytest.approx(own) and hits["base"].value == pytest.approx(own_base)
    assert hits["shuffled"].value == pytest.approx(shuffled)
    assert hits["lift"].value == pytest.approx(own - own_base - shuffled)
    assert hits["lift"].ci[0] <= hits["lift"].value <= hits["lift"].ci[1]


def test_a_lens_that_knows_the_next_token_is_found_out(bench):
    """Experts' words are the commonest next tokens of their own rows: the lift must see the pairing."""
    rows, after = lens.next_tokens(bench.judging)
    chosen = bench.choice().indices.numpy()[rows]
    logits = torch.zeros(EXPERTS, 64)
    for e in range(EXPERTS):
        mine = after[(chosen == e).any(1)]
        logits[e] = torch.bincount(torch.from_numpy(mine), minlength=64) / max(len(mine), 1) - torch.bincount(
            torch.from_numpy(after), minlength=64
        ) / len(after)
    planted = lens.lens_hits(bench, logits, 5)["lift"].value
    blind = lens.lens_hits(bench, noise(EXPERTS, 64, seed=1), 5)["lift"].value
    assert planted > 0.03 > abs(blind) - 0.05


def test_contexts_are_the_rows_an_expert_weighs_most(bench):
    choice = bench.choice()
    expert = int(bench.load.argmax())
    weights = [float(v) for i, v in zip(choice.indices.flatten(), choice.values.flatten(), strict=True) if i == expert]
    found = lens.contexts(bench, expert, 3)
    top = torch.where(choice.indices == expert, choice.values, 0).amax(1).argsort(descending=True)[:3]
    assert found == [bench.judging.context(int(row), 6, 3) for row in top]
    assert len(lens.contexts(bench, expert, 10**6)) == len(weights)


def test_load_is_a_share_of_choices(bench):
    assert float(bench.load.sum()) == pytest.approx(1)
    assert inside.effective_experts(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert inside.effective_experts(torch.tensor([1.0, 0, 0])) == pytest.approx(1)


# -- for the chapters --------------------------------------------------------------------------------------------------


def test_rows_of_a_ladder_are_plain(judged):
    rows = json.loads(json.dumps(explained.ladder_rows(judged, TOP_K / D, layer=1)))
    assert len(rows) == len(judged) and all(row["layer"] == 1 for row in rows)
    own = next(row for row in rows if (row["control"], row["site"], row["centred"]) == ("implicit", "mlp_out", True))
    assert own["fve"][0] == pytest.approx(judged[Key("implicit", "mlp_out", True)].fve)
    assert (
        own["ratio"] == pytest.approx([each * D / TOP_K for each in own["fve"]]) and own["ratio"][1] < own["ratio"][0]
    )
    assert {row["control"] for row in rows} == set(inside.CONTROLS) <= set(figures.LADDER)


def test_mean_loss_is_over_tokens_and_its_interval_over_articles():
    table = pd.DataFrame({"article": [0, 0, 1, 2, 3, 4], "nats": [2.0, 4, 3, 8, 1, 5], "tokens": [1, 3, 1, 4, 1, 2]})
    found = listed(explained.mean_loss(table))
    assert found[0] == pytest.approx(23 / 12) and found[1] < found[0] < found[2]
    assert explained.mean_loss(table[table.article < 4]).ci is None


def test_layers_are_read_by_the_teachers_name(scene):
    assert inside.read(scene[0].name, [0, 1])[1].layer == 1
    with pytest.raises(ValueError, match="layers=.*allowed: 0 to 1"):
        inside.read(scene[0].name, [2])
