"""Shapes store what they say, and what a cell reports is what its parts say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from helpers.dictionary import Packed, expander_sae, load_packed, save_packed, topk_sae
from helpers.kept import Kept
from helpers.parts import language_model, storage
from helpers.parts.distilling import Spec
from helpers.parts.language_model import Passage, SiteRows
from helpers.parts.masks import left_regular
from helpers.parts.storage import Shape, Spliced
from helpers.settings import generator
from helpers.study.scores import evaluate
from helpers.study.study import run, study, sums, trained
from helpers.training import fit, remedies
from tests import tiny

PLAIN = remedies.Balance()
EXPANDER = Shape(48, 3, "expander", 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def problem(home):
    return SiteRows(home["folders"], "resid_post", 12, 64)


@pytest.fixture
def spliced(home):
    passage = Passage(home["teacher"], home["corpus"], 1, "resid_post", 110, cache_dir=home["cache"])
    return Spliced(home["folders"], "resid_post", 12, 64, passage)


def packed(degree=4, n=24, m=16, k=3, seed=0):
    random = generator(seed)
    return expander_sae(left_regular(n, m, degree, random), m, k, generator=random)


# -- dictionaries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", storage.SHAPES)
def test_every_shape_stores_what_it_says_and_learns(problem, shape, tmp_path):
    build = Shape(48, 3, shape, None if shape in ("dense", "untied") else 4)
    problem = replace(problem, steps=24)
    arm = storage.arm(build, storage.recipe(build, 24), 1e-2, 24)
    sae = trained(problem, arm, 0, cache_dir=tmp_path).student
    n, m = 48, problem.d_model
    decoder = n * m if shape in ("dense", "untied", "low-rank", "packed encoder") else n * 4
    assert storage.stored_values(sae.decoder) == decoder
    encoder = {"untied": n * m, "packed encoder": 4 * n, "low-rank": (4 * n // (n + m)) * (n + m)}.get(shape, 0)
    assert sae.n_parameters == decoder + encoder + n + m and encoder <= max(4 * n, n * m)
    torch.testing.assert_close(sae.decoder.vectors().norm(dim=1), torch.ones(n))
    begun = None if arm.first is None else trained(problem, arm.first, 0, cache_dir=tmp_path).student
    before = evaluate(build(problem, 0, begun), problem.rows("test"))
    assert evaluate(sae, problem.rows("test")).fvu < before.fvu


def test_atoms_of_a_seed_are_those_of_the_seed(problem):
    first, again, other = (EXPANDER(problem, seed) for seed in (0, 0, 1))
    assert torch.equal(first.decoder.weight, again.decoder.weight)
    assert torch.equal(first.decoder.rows, again.decoder.rows)
    assert not torch.equal(first.decoder.weight, other.decoder.weight)
    torch.testing.assert_close(first.b_out.data, problem.mean)


def test_a_dense_untied_arm_is_chapter_nines_dictionary(problem):
    """The same start, stream and loop as chapter 9's, with a signed TopK and clipping in addition."""
    ours = trained(problem, storage.arm(Shape(48, 3, "untied"), PLAIN, 1e-2, 12), 0, cache_dir=False)
    sae = topk_sae(16, 48, 3, generator=generator(0), b_dec=problem.mean, activation="identity")
    theirs = fit(sae, problem.stream(0, torch.device("cpu")), steps=12, lr=1e-2, clip=storage.CLIP)
    torch.testing.assert_close(ours.student.decoder.weight, theirs.student.decoder.weight)


def test_what_cannot_be_is_named(spliced):
    with pytest.raises(ValueError, match="shape='square' is unknown; allowed: 'dense'"):
        Shape(48, 3, "square")
    with pytest.raises(ValueError, match="degree=None with shape='expander'"):
        Shape(48, 3, "expander")
    with pytest.raises(ValueError, match="degree=3 with shape='dense'"):
        Shape(48, 3, degree=3)
    with pytest.raises(ValueError, match=r"ways=\('encoder', 'guess'\); allowed: 'encoder', and beside it solved"):
        replace(spliced, ways=("encoder", "guess"))
    with pytest.raises(ValueError, match=r"ways=\('pursuit',\)"):
        replace(spliced, ways=("pursuit",))
    with pytest.raises(ValueError, match="passage=None; allowed: a Passage"):
        replace(spliced, passage=None)


def test_rivals_have_as_many_values():
    expander = Shape(48, 3, "expander", 5)
    tied, free = (storage.equal_values(expander, 16, shape) for shape in ("dense", "untied"))
    assert tied.n_features * 16 <= 5 * 48 < (tied.n_features + 1) * 16
    assert 2 * free.n_features * 16 <= 5 * 48 and (free.shape, free.degree) == ("untied", None)
    with pytest.raises(ValueError, match="leaves n=3 atoms of full length; allowed: at least k=4"):
        storage.equal_values(Shape(48, 4, "expander", 1), 16)


def test_pruning_keeps_the_largest_entries():
    dense = topk_sae(16, 24, 3, generator=generator(0), tied=True, activation="identity", b_dec=torch.ones(16))
    dense.encoder.bias.data.normal_(generator=generator(1))
    small = storage.pruned(dense, 4)
    atoms = dense.decoder.weight.detach().numpy().copy()
    for atom in atoms:
        atom[np.argsort(-np.abs(atom))[4:]] = 0
    kept = F.normalize(torch.from_numpy(atoms), dim=1)
    torch.testing.assert_close(small.decoder.vectors(), kept)
    assert torch.equal(small.encoder.bias, dense.encoder.bias) and torch.equal(small.b_out, dense.b_out)
    assert small.decoder is small.encoder and small.activation == "identity"


def test_adapting_moves_numbers_to_atoms_that_fire_and_changes_no_other(tmp_path):
    sae, samples = packed(degree=4), torch.randn(500, 16, generator=generator(1))
    fired = torch.zeros(24)
    codes = sae.encode(samples)
    fired.index_add_(0, codes.indices.flatten(), torch.ones(codes.indices.numel()))
    other = storage.adapted(sae, samples, generator(2))
    degrees = other.decoder.degrees
    assert storage.stored_values(other.decoder) == storage.stored_values(sae.decoder) == int(degrees.sum())
    assert degrees.min() >= 1 and degrees.max() <= 16
    order = fired.argsort()
    assert degrees[order[-6:]].float().mean() > degrees[order[:6]].float().mean()
    grown = degrees >= 4
    torch.testing.assert_close(other.decoder.vectors()[grown], sae.decoder.vectors()[grown])
    assert not torch.allclose(other.decoder.vectors()[~grown], sae.decoder.vectors()[~grown])
    torch.testing.assert_close(other(samples), load_packed(save_packed(other, tmp_path / "kept"))(samples))


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=40), st.integers(1, 9), st.data())
def test_shares_add_up_and_follow_the_weights(weights, most, data):
    n, weight = len(weights), torch.tensor(weights, dtype=torch.float64)
    total = data.draw(st.integers(n, n * most))
    shares = storage.allotted(weight, total, most)
    assert int(shares.sum()) == total and 1 <= int(shares.min()) <= int(shares.max()) <= most
    for i in range(n):
        assert all(shares[i] <= shares[j] + 1 for j in range(n) if weight[i] <= weight[j])


def test_shares_are_proportional_where_no_limit_binds():
    assert storage.allotted(torch.tensor([1.0, 2.0, 3.0]), 60, 100).tolist() == [10, 20, 30]
    with pytest.raises(ValueError, match="total=7 cannot be shared by 3 atoms of 1 to most=2"):
        storage.allotted(torch.ones(3), 7, 2)


def test_two_phases_train_one_dictionary_after_another(problem, tmp_path):
    arm = storage.arm(Shape(48, 3, "pruned", 4), PLAIN, 1e-2, 12)
    done = trained(problem, arm, 0, cache_dir=tmp_path)
    alone = storage.arm(Shape(48, 3), PLAIN, 1e-2, 6)
    first = trained(replace(problem, steps=6), alone, 0, cache_dir=tmp_path)
    assert first.from_cache and done.steps[-1] == 5 and done.seconds > first.seconds
    start = arm.build(problem, 0, first.student)
    torch.testing.assert_close(start.decoder.vectors(), storage.pruned(first.student, 4).decoder.vectors())
    later = storage.arm(Shape(48, 3, "adaptive", 4), PLAIN, 1e-2, 12)
    assert (later.first.recipe["steps"], later.recipe["steps"], later.first.build.shape) == (3, 9, "expander")


def test_bytes_are_those_of_the_file_and_of_the_tensors(tmp_path):
    sae, dense = packed(degree=4, n=200), topk_sae(16, 200, 3, generator=generator(0), tied=True)
    stored = storage.bytes_of(sae)
    assert stored["file"] == save_packed(sae, tmp_path / "x").stat().st_size
    assert stored["memory"] == 4 * sae.n_parameters + 2 * 800 and stored["training"] == 16 * sae.n_parameters + 1600
    whole = storage.bytes_of(dense)
    assert whole["memory"] == 4 * dense.n_parameters == 4 * (200 * 16 + 200 + 16)
    assert 0 < whole["file"] - whole["memory"] < 1000


# -- what is measured --------------------------------------------------------------------------------------------------


def test_a_spectrum_is_what_is_left_of_each_direction(problem):
    rows = problem.rows("train")
    np.testing.assert_allclose(storage.spectrum(problem, rows, rows), 0, atol=1e-9)
    np.testing.assert_allclose(storage.spectrum(problem, rows, rows.mean(0).expand_as(rows)), 1, rtol=1e-5)
    axes = torch.linalg.eigh(problem.store("train").moments("resid_post").cov).eigenvectors.flip(1).float()
    without = rows - (rows - rows.mean(0)) @ axes[:, :1] @ axes[:, :1].T
    left = storage.spectrum(problem, rows, without)
    assert left[0] == pytest.approx(1, rel=1e-4) and np.abs(left[1:]).max() < 1e-6


def test_a_judgement_is_what_its_parts_say(spliced, tmp_path):
    every, arm = replace(spliced, ways=language_model.WAYS), storage.arm(EXPANDER, PLAIN, 1e-2, 12)
    found = run(every, [arm], 0, cache_dir=tmp_path)[0]
    sae, rows = trained(every, arm, 0, cache_dir=tmp_path).student, every.rows("test")
    after, sums_ = evaluate(sae, rows), found.sums
    assert found.fvu == pytest.approx(after.fvu) and found.about["dead"] == after.dead
    scene = every.passage.scene
    for way, column in storage.NATS.items():
        guess = language_model.reconstructions(sae, scene.rows / every.scale, way)
        np.testing.assert_allclose(sums_[column], scene.nats(guess * every.scale), rtol=1e-5)
    errors = {way: sums_[f"{way}_errors"].sum() / sums_["passage_norms"].sum() for way in language_model.WAYS}
    assert errors["pursuit"] < errors["solved"] < errors["encoder"]
    # text that is the test split's own: errors of both agree
    assert errors["encoder"] == pytest.approx(after.fvu, rel=1e-3)
    assert (found.about["values"], found.about["parameters"]) == (192, sae.n_parameters)
    json.dumps(found.about)
    plain = run(spliced, [arm], 0, cache_dir=tmp_path)[0]
    assert plain.fvu == found.fvu and not {"pursuit_nats", "pursuit_errors", "solved_errors"} & set(plain.sums)
    whole = storage.spectrum(
        every, scene.rows / every.scale, language_model.reconstructions(sae, scene.rows / every.scale)
    )
    assert found.about["spectrum"][0] == [1.0, pytest.approx(float(whole[0]))] and len(found.about["spectrum"]) <= 40


def test_an_outcome_belongs_to_its_problem(spliced):
    def key(problem):
        return Kept("runs", problem, storage).key

    others = [
        replace(spliced, steps=13),
        replace(spliced, ways=("encoder", "pursuit")),
        replace(spliced, passage=replace(spliced.passage, n_tokens=90)),
    ]
    assert len({key(each) for each in (spliced, *others)}) == 4
    assert key(replace(spliced, passage=replace(spliced.passage, cache_dir="elsewhere"))) == key(spliced)


def test_cells_are_reported_by_name_over_seeds(spliced, tmp_path):
    arms = {("expander", 4): EXPANDER, ("dense", 16): Shape(48, 3)}
    arms = {name: storage.arm(build, PLAIN, 1e-2, 12) for name, build in arms.items()}
    problems = {("expander", 4): replace(spliced, ways=("encoder", "pursuit")), ("dense", 16): spliced}
    found = study(problems, arms, [0, 1], cache_dir=str(tmp_path), workers=1)
    scene = spliced.passage.scene
    table = sums(found, **scene.yardstick(spliced.mean * spliced.scale))
    rows = [storage.reported_cell(name, runs, table, 12) for name, runs in found.items()]
    json.dumps(rows)
    packed_row, dense_row = rows
    assert [(row["cell"], row["degree"]) for row in rows] == list(arms)
    runs = found["expander", 4]
    lost = sum(each.sums["nats"].sum() for each in runs) / 2
    zero, clean = table.shared["zero"].sum(), table.shared["clean"].sum()
    assert packed_row["encoder_zero"][0] == pytest.approx((zero - lost) / (zero - clean))
    assert packed_row["fvu_by_seed"] == [each.fvu for each in runs] and packed_row["seeds"] == [0, 1]
    relative = [each.sums["relative"].sum() / each.sums["rows"].sum() for each in runs]
    assert packed_row["relative_error_by_seed"] == pytest.approx(relative)
    gain = table.compare(lambda a: a.ce_recovered("mean", "pursuit_nats") - a.ce_recovered("mean"), ("expander", 4))
    assert packed_row["pursuit_mean"][0] - packed_row["encoder_mean"][0] == pytest.approx(gain.value)
    assert list(packed_row["way_fvu"]) == ["encoder", "pursuit"] and "pursuit_zero" not in dense_row


# -- packed experts ----------------------------------------------------------------------------------------------------


def test_packed_experts_store_as_much_as_dense_ones():
    dense = Spec(8, 20, 4, router_rank=3)
    spec = storage.packed_experts(dense, 4, 16, 12)
    student, rival = (each.build(16, 12, generator(0)) for each in (spec, dense))
    values = [storage.stored_values(each.encoder) + storage.stored_values(each.decoder) for each in (student, rival)]
    assert values == [20 * 28] * 2
    assert spec.experts == 70 and spec.k == dense.k and student.active_neurons == rival.active_neurons
    assert isinstance(student.decoder, Packed) and "packed 4" in spec.label and student.gate == "softmax"
    x = torch.randn(64, 16, generator=generator(1))
    student(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    spread = [float((each.encoder.scores(x) - each.encoder.bias).detach().std()) for each in (student, rival)]
    assert spread[0] == pytest.approx(spread[1], rel=0.25)
    with pytest.raises(ValueError, match="degree=15 leaves 18 experts; allowed: at most 14"):
        storage.packed_experts(dense, 15, 16, 12)


# -- what a page shows -------------------------------------------------------------------------------------------------


def test_a_point_is_named_by_its_cell_and_degree():
    assert storage.named({"cell": "informed", "degree": 50}) == "co-occurrence, d = 50"
