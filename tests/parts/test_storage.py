"""Shapes store what they say, losses belong to their articles, and comparisons are the arithmetic they claim."""

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
from helpers.models import activations
from helpers.models.teachers import Splice
from helpers.parts import storage
from helpers.parts.distilling import Spec
from helpers.parts.known_truth import Setting
from helpers.parts.language_model import train as train_plain
from helpers.parts.masks import left_regular
from helpers.parts.storage import Arm, Passage, Yardstick
from helpers.settings import generator
from helpers.study.scores import evaluate
from helpers.training import remedies
from tests import tiny

CENTRED = Setting(remedies.Balance(), 1e-2, centred=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def arm(home):
    return Arm(home["folders"], "resid_post", 48, 3, 12, 64)


@pytest.fixture
def passage(home):
    return Passage(home["teacher"], home["corpus"], 1, "resid_post", 110, cache_dir=home["cache"])


def packed(degree=4, n=24, m=16, k=3, seed=0):
    random = generator(seed)
    return expander_sae(left_regular(n, m, degree, random), m, k, generator=random)


# -- dictionaries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", storage.SHAPES)
def test_every_shape_stores_what_it_says_and_learns(arm, shape, tmp_path):
    degree = None if shape in ("dense", "untied") else 4
    this = replace(arm, shape=shape, degree=degree, steps=24)
    sae = storage.train(this, Setting(storage.recipe(this), 1e-2, True), 0, cache_dir=tmp_path).student
    n, m = this.n_features, this.width
    decoder = n * m if shape in ("dense", "untied", "low-rank", "packed encoder") else n * 4
    assert storage.decoder_values(sae) == decoder
    encoder = {"untied": n * m, "packed encoder": 4 * n, "low-rank": (4 * n // (n + m)) * (n + m)}.get(shape, 0)
    assert sae.n_parameters == decoder + encoder + n + m and encoder <= max(4 * n, n * m)
    torch.testing.assert_close(sae.decoder.vectors().norm(dim=1), torch.ones(n))
    before = evaluate(this.student(CENTRED, 0, cache_dir=tmp_path), this.rows("test"))
    assert evaluate(sae, this.rows("test")).fvu < before.fvu


def test_atoms_of_a_seed_are_those_of_the_seed(arm):
    first, again, other = (replace(arm, shape="expander", degree=4).student(CENTRED, seed) for seed in (0, 0, 1))
    assert torch.equal(first.decoder.weight, again.decoder.weight) and torch.equal(
        first.decoder.rows, again.decoder.rows
    )
    assert not torch.equal(first.decoder.weight, other.decoder.weight)
    torch.testing.assert_close(first.b_out.data, arm.mean)
    tied, free = (replace(arm, shape=shape).student(CENTRED, 0) for shape in ("dense", "untied"))
    assert torch.equal(tied.decoder.weight, free.encoder.weight) and free.encoder is not free.decoder


def test_a_dense_untied_arm_is_chapter_nines_dictionary(arm, tmp_path):
    """The same start, stream and loop as `language_model.train`, with a signed TopK and clipping in addition."""
    this = replace(arm, shape="untied")
    ours = storage.train(this, CENTRED, 0, cache_dir=tmp_path)
    theirs = train_plain(this, CENTRED, 0, cache_dir=False, clip=storage.CLIP)
    torch.testing.assert_close(ours.student.decoder.weight, theirs.student.decoder.weight)


def test_what_cannot_be_is_named(arm, passage):
    with pytest.raises(ValueError, match="shape='square' is unknown; allowed: 'dense'"):
        replace(arm, shape="square")
    with pytest.raises(ValueError, match="degree=None with shape='expander'"):
        replace(arm, shape="expander")
    with pytest.raises(ValueError, match="degree=3 with shape='dense'"):
        replace(arm, degree=3)
    with pytest.raises(ValueError, match="ways names guess"):
        storage.trial(arm, CENTRED, 0, passage, ("guess",))
    with pytest.raises(ValueError, match="leaves out 'encoder'"):
        storage.trial(arm, CENTRED, 0, passage, ("pursuit",))


def test_rivals_have_as_many_values(arm):
    expander = replace(arm, shape="expander", degree=5)
    tied, free = (storage.equal_values(expander, shape) for shape in ("dense", "untied"))
    assert tied.n_features * arm.width <= 5 * arm.n_features < (tied.n_features + 1) * arm.width
    assert 2 * free.n_features * arm.width <= 5 * arm.n_features
    with pytest.raises(ValueError, match="leaves n=3 atoms of full length; allowed: at least k=4"):
        storage.equal_values(replace(arm, shape="expander", degree=1, k=4))


def test_pruning_keeps_the_largest_entries(arm):
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
    assert storage.decoder_values(other) == storage.decoder_values(sae) == int(degrees.sum())
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


def test_two_phases_train_one_dictionary_after_another(arm, tmp_path):
    this = replace(arm, shape="pruned", degree=4)
    done = storage.train(this, CENTRED, 0, cache_dir=tmp_path)
    first = storage.train(replace(arm, steps=6), CENTRED, 0, cache_dir=tmp_path)
    assert first.from_cache and done.steps[-1] == 5 and this.first_steps == 6 and done.seconds > first.seconds
    start = this.student(CENTRED, 0, cache_dir=tmp_path)
    torch.testing.assert_close(start.decoder.vectors(), storage.pruned(first.student, 4).decoder.vectors())


def test_bytes_are_those_of_the_file_and_of_the_tensors(tmp_path):
    sae, dense = packed(degree=4, n=200), topk_sae(16, 200, 3, generator=generator(0), tied=True)
    stored = storage.bytes_of(sae)
    assert stored["file"] == save_packed(sae, tmp_path / "x").stat().st_size
    assert stored["memory"] == 4 * sae.n_parameters + 2 * 800 and stored["training"] == 16 * sae.n_parameters + 1600
    whole = storage.bytes_of(dense)
    assert whole["memory"] == 4 * dense.n_parameters == 4 * (200 * 16 + 200 + 16)
    assert 0 < whole["file"] - whole["memory"] < 1000


# -- losses ------------------------------------------------------------------------------------------------------------


def test_a_scene_puts_rows_where_they_came_from(home, passage, arm):
    scene = passage.scene
    assert scene is passage.scene
    np.testing.assert_allclose(scene.nats(scene.rows), scene.clean, rtol=1e-5)
    store = arm.store("test")
    raw, article = store.tensor("resid_post"), torch.from_numpy(np.array(store.article, np.int64))
    for number in article.unique():
        ours = scene.rows[scene.articles == number].sum(0)
        torch.testing.assert_close(ours, raw[article == number].sum(0), rtol=1e-4, atol=1e-3)
    pieces = activations.texts(home["model"], home["corpus"], n_tokens=110, split="test")
    frame = activations.losses(home["model"], pieces, Splice.zero(1, "resid_post"))
    np.testing.assert_allclose(scene.ablated(torch.zeros(16)), frame.groupby("article").nats.sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="as the passage's"):
        scene.nats(scene.rows[:-1])


def test_three_ways_to_code(arm):
    sae, rows = replace(arm, shape="expander", degree=4, k=5).student(CENTRED, 0), arm.rows("test")
    found = {way: storage.reconstructions(sae, rows, way, batch_size=16).detach() for way in storage.WAYS}
    torch.testing.assert_close(found["encoder"], sae(rows).detach())
    codes = sae.encode(rows)
    rest = rows - found["solved"]
    along = torch.einsum("bkm,bm->bk", sae.decoder.vectors()[codes.indices], rest)
    assert along.abs().max() < 1e-3, "least squares leave a residual that is orthogonal to the chosen atoms"
    errors = {way: (rows - guess).square().sum(1) for way, guess in found.items()}
    assert (errors["solved"] <= errors["encoder"] + 1e-4).all()
    assert errors["pursuit"].mean() < errors["encoder"].mean()


def test_a_spectrum_is_what_is_left_of_each_direction(arm):
    rows = arm.rows("train")
    np.testing.assert_allclose(storage.spectrum(arm, rows, rows), 0, atol=1e-9)
    np.testing.assert_allclose(storage.spectrum(arm, rows, rows.mean(0).expand_as(rows)), 1, rtol=1e-5)
    axes = torch.linalg.eigh(arm.store("train").moments("resid_post").cov).eigenvectors.flip(1).float()
    without = rows - (rows - rows.mean(0)) @ axes[:, :1] @ axes[:, :1].T
    left = storage.spectrum(arm, rows, without)
    assert left[0] == pytest.approx(1, rel=1e-4) and np.abs(left[1:]).max() < 1e-6


def test_a_trial_is_what_its_parts_say_and_is_kept(arm, passage, tmp_path, monkeypatch):
    this = replace(arm, shape="expander", degree=4)
    given_ = (this, CENTRED, 0, passage, storage.WAYS)
    found = storage.trial(*given_, cache_dir=tmp_path)
    sae, rows = storage.train(this, CENTRED, 0, cache_dir=tmp_path).student, this.rows("test")
    after = evaluate(sae, rows)
    assert found.fvu == pytest.approx(after.fvu) and found.dead == after.dead
    lengths = (rows - sae(rows).detach()).norm(dim=1) / rows.norm(dim=1)
    assert found.relative_error == pytest.approx(float(lengths.mean()), rel=1e-4)
    scene = passage.scene
    spliced = scene.nats(storage.reconstructions(sae, scene.rows / arm.scale) * arm.scale)
    np.testing.assert_allclose(found.nats_of("encoder"), spliced, rtol=1e-5)
    pursued = scene.nats(storage.reconstructions(sae, scene.rows / arm.scale, "pursuit") * arm.scale)
    np.testing.assert_allclose(found.nats_of("pursuit"), pursued, rtol=1e-5)
    assert found.way_fvu("pursuit") < found.way_fvu("solved") < found.way_fvu("encoder")
    # text that is the test split's own: errors of both agree
    assert found.way_fvu("encoder") == pytest.approx(after.fvu, rel=1e-3)
    assert (found.values, found.parameters) == (192, sae.n_parameters)
    json.dumps(found.row())
    monkeypatch.setattr(storage, "bytes_of", lambda *_: pytest.fail("it was repeated"))
    again = storage.trial(*given_, cache_dir=tmp_path)
    assert again.row() == found.row() and np.array_equal(again.nats, found.nats)


def test_a_trial_belongs_to_its_cell(arm, passage):
    def key(arm, *rest):
        return Kept("trials", [arm.nameless, *rest], storage).key

    own = key(arm, CENTRED, 0, passage, ("encoder",), "cpu")
    other = [
        (replace(arm, k=2), CENTRED, 0, passage, ("encoder",), "cpu"),
        (replace(arm, shape="untied"), CENTRED, 0, passage, ("encoder",), "cpu"),
        (arm, replace(CENTRED, lr=1.0), 0, passage, ("encoder",), "cpu"),
        (arm, CENTRED, 1, passage, ("encoder",), "cpu"),
        (arm, CENTRED, 0, replace(passage, n_tokens=90), ("encoder",), "cpu"),
        (arm, CENTRED, 0, passage, ("encoder", "pursuit"), "cpu"),
    ]
    assert len({own, *(key(*each) for each in other)}) == 7
    assert key(arm, CENTRED, 0, replace(passage, cache_dir="elsewhere"), ("encoder",), "cpu") == own


# -- comparisons -------------------------------------------------------------------------------------------------------


@pytest.fixture
def yardstick():
    return Yardstick(np.array([1.0, 2.0]), np.array([3.0, 6.0]), np.array([2.0, 3.0]))


def test_ce_recovered_is_a_ratio_of_sums(yardstick):
    series = {"a": {0: np.array([2.0, 3.0]), 1: np.array([2.0, 5.0])}, "b": {0: np.array([1.0, 2.0]), 1: np.ones(2)}}
    told = yardstick.compare(series, lambda ce: ce["a"])
    assert told.value == pytest.approx((9 - 6) / (9 - 3)) and told.by_seed == pytest.approx([4 / 6, 2 / 6])
    assert told.ci[0] <= told.value <= told.ci[1] and told.resampled == "seed × article"
    assert yardstick.compare(series, lambda ce: ce["a"], "mean").value == pytest.approx((5 - 6) / 2)
    gap = yardstick.compare(series, lambda ce: ce["b"] - ce["a"])
    assert gap.value == pytest.approx((6 - 2.5) / 6)
    same = yardstick.compare({"a": series["a"], "b": series["a"]}, lambda ce: ce["a"] - ce["b"])
    assert same.ci == (0, 0), "seeds and articles are resampled together"
    with pytest.raises(ValueError, match="ablation='none' is unknown"):
        yardstick.compare(series, lambda ce: 0, "none")
    with pytest.raises(ValueError, match="no seed is common to a, b"):
        yardstick.compare({"a": {0: np.ones(2)}, "b": {1: np.ones(2)}}, lambda ce: 0)


def test_a_slope_is_per_factor_of_ten():
    assert storage.slope({10: 0.1, 100: 0.3, 1000: 0.5}) == pytest.approx(0.2)
    assert storage.slope({10: 0.5, 1000: 0.1}) == pytest.approx(-0.2)
    assert storage.falls([0.1, 0.3, 0.2, 0.2, 0.1]) == 2


def test_grids_come_back_by_name_and_seed(arm, passage, tmp_path):
    arms = {("expander", 4): replace(arm, shape="expander", degree=4), ("dense", 16): arm}
    how = {"device": "cpu", "cache_dir": str(tmp_path), "workers": 1}
    cells = {name: (each, CENTRED) for name, each in arms.items()}
    tried = storage.tuned(cells, [1e-3, 1e-2], 0, **how)
    one = storage.validation_error(arm, CENTRED, 0, cache_dir=tmp_path)
    assert tried["dense", 16][1e-2] == one and tried["dense", 16][1e-3] != one
    found = storage.trials(cells, [0, 1], passage, ways={"expander": ("encoder", "pursuit")}, label="x", **how)
    assert [[t.seed for t in some] for some in found.values()] == [[0, 1], [0, 1]]
    assert [found[name][0].arm.shape for name in arms] == ["expander", "dense"]
    assert found["dense", 16][0].ways == ("encoder",) and len(found["expander", 4][0].nats) == 2
    yard = Yardstick.of(passage.scene, arm.mean * arm.scale)
    rows = storage.points(found, yard, n_resamples=50)
    json.dumps(rows)
    assert rows[0]["encoder_zero"][0] == pytest.approx(yard.recovered(found["expander", 4], n_resamples=9).value)
    assert len(rows[0]["fvu_by_seed"]) == 2 and rows[1]["cell"] == "dense"


# -- packed experts ----------------------------------------------------------------------------------------------------


def test_packed_experts_store_as_much_as_dense_ones():
    dense = Spec(8, 20, 4, router_rank=3)
    spec = storage.packed_experts(dense, 4, 16, 12)
    student, rival = (each.build(16, 12, generator(0)) for each in (spec, dense))
    assert storage.expert_values(student) == storage.expert_values(rival) == 20 * 28
    assert spec.experts == 70 and spec.k == dense.k and student.active_neurons == rival.active_neurons
    assert isinstance(student.decoder, Packed) and "packed 4" in spec.label and student.gate == "softmax"
    x = torch.randn(64, 16, generator=generator(1))
    student(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    spread = [float((each.encoder.scores(x) - each.encoder.bias).detach().std()) for each in (student, rival)]
    assert spread[0] == pytest.approx(spread[1], rel=0.25)
    with pytest.raises(ValueError, match="degree=15 leaves 18 experts; allowed: at most 14"):
        storage.packed_experts(dense, 15, 16, 12)


@pytest.mark.parametrize(("best", "tried"), [(0.01, 3), (0.03, 4), (0.1, 5), (0.3, 5), (2.5e-3, 4), (1e-6, 5)])
def test_a_grid_goes_on_where_its_best_rate_is_an_end(arm, monkeypatch, best, tried):
    """Error falls towards one rate: the grid 3e-3, 1e-2, 3e-2 reaches it, or stops after two further rates."""
    monkeypatch.setattr(storage, "validation_error", lambda setting, **_: abs(np.log(setting.lr / best)))
    monkeypatch.setattr(storage, "sweep", lambda task, arguments, **_: [task(**each) for each in arguments])
    how = {"further": 2, "device": "cpu", "cache_dir": None, "workers": 1}
    found = storage.tuned({("dense", 16): (arm, CENTRED)}, [3e-3, 1e-2, 3e-2], 0, **how)["dense", 16]
    assert len(found) == tried and list(found) == sorted(found) and {3e-3, 1e-2, 3e-2} <= set(found)
    chosen = min(found, key=found.get)
    inside = chosen not in (min(found), max(found))
    assert inside or len(found) == 5
    with pytest.raises(ValueError, match=r"lrs=\[0.01, 0.003\]; allowed: positive rates that rise"):
        storage.tuned({}, [1e-2, 3e-3], 0, **how)


# -- what a page shows -------------------------------------------------------------------------------------------------


def point(cell, degree=7, recovered=0.5, size=100, **more):
    return {"cell": cell, "degree": degree, "encoder_zero": [recovered, 0, 1], "file_bytes": size} | more


def test_a_table_shows_values_and_means_over_seeds():
    points = [point("expander", dead_by_seed=[0.1, 0.3]), point("informed", 50, 0.75, dead_by_seed=[0.0, 0.5])]
    shown = storage.table(points, ["degree", "encoder_zero", "dead_by_seed"])
    assert list(shown.columns) == ["degree", "encoder_zero", "dead"]
    assert list(shown.index) == ["expander", "co-occurrence"]
    assert shown.to_numpy().tolist() == [[7, 0.5, 0.2], [50, 0.75, 0.25]]


def test_an_interval_that_touches_neither_side_is_a_tie():
    intervals = {"equal": (0.1, 0.2), "clustered": (-0.1, 0.1), "informed": (-0.2, -0.1), "pruned": (0.0, 0.1)}
    found = storage.outcomes([point(cell, ci=ci) for cell, ci in intervals.items()])
    assert found == {
        "beats": ["dense, as many values, d = 7"],
        "ties with": ["clustered, all rows, d = 7", "pruned and retuned, d = 7"],
        "loses to": ["co-occurrence, d = 7"],
    }


def test_the_best_is_the_best_of_those_that_fit():
    points = [point("expander", 7, 0.5, 10), point("expander", 50, 0.7, 60), point("dense", 640, 0.9, 500)]
    assert [storage.best(points, budget) for budget in (9, 10, 60, 499, 500)] == [None, *points[:2], *points[1:]]
