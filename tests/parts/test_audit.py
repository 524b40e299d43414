"""A reader's dictionary: found and refused by name, measured as slow NumPy does it, judged by the field's formulas."""

import json

import numpy as np
import pytest
import torch

from helpers import dictionary
from helpers.dictionary import Select
from helpers.parts import audit, language_model
from helpers.settings import generator
from helpers.study.scores import Sums, Totals
from tests import tiny

N, D, ROWS = 20, 6, 300
RULES = {
    "token": {}, "magnitude": {}, "positive": {}, "threshold": {"threshold": 0.4}, "batch": {"threshold": 0.5},
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def random_sae(rule):
    select = Select(rule, N, **RULES[rule])
    activation = "identity" if rule == "magnitude" else "relu"
    sae = dictionary.topk_sae(D, N, 3, generator=generator(1), select=select, activation=activation).double()
    with torch.no_grad():
        sae.encoder.bias.copy_(0.2 * random(N, seed=2))
        sae.encoder.bias[4] = -1e4  # one that is dead under most rules
        sae.b_out.copy_(random(D, seed=3))
    return sae.eval()


@pytest.fixture(params=RULES)
def sae(request):
    return random_sae(request.param)


@pytest.fixture
def rows():
    return 3 + random(ROWS, D, seed=4), np.repeat([3, 1, 8], ROWS // 3)


def in_numpy(sae, x):
    """Scores less thresholds, who is chosen, codes and outputs, one token at a time."""
    weight, bias, write, b = (
        t.detach().numpy() for t in (sae.encoder.weight, sae.encoder.bias, sae.decoder.weight, sae.b_out)
    )
    threshold = getattr(sae.select, "threshold", torch.zeros(())).detach().numpy()
    for row in x.numpy():
        scores = weight @ (row - b) + bias
        ranked = np.abs(scores) if sae.select.rule == "magnitude" else scores - threshold
        best = np.argsort(-ranked)
        on = set(best[: sae.k]) if sae.select.rule in ("token", "magnitude") else set(np.flatnonzero(ranked > 0))
        codes = np.array([0.0 if j not in on else scores[j] for j in range(N)])
        codes = codes if sae.select.rule == "magnitude" else np.maximum(codes, 0)
        gap = np.nan
        if 0 < len(on) < N:
            gap = (min(ranked[list(on)]) - max(r for j, r in enumerate(ranked) if j not in on)) / scores.std(ddof=1)
        yield on, codes, b + codes @ write, gap


def test_sums_codes_and_gaps_are_numpy_s(sae, rows, monkeypatch):
    monkeypatch.setattr(audit, "BATCH", 70)
    x, article = rows
    found = audit.measured(sae, x, x, article)
    on, codes, output, gap = zip(*in_numpy(sae, x), strict=True)
    codes, y, e = np.array(codes), x.numpy(), x.numpy() - np.array(output)
    np.testing.assert_allclose(found.gap, gap, rtol=1e-9)
    assert found.codes.tolist() == (codes != 0).sum(1).tolist()
    norms = ((y - y.mean(0)) ** 2).sum(1)
    cut = [set_of for set_of, *_ in in_numpy(sae, x.bfloat16().double())]
    by_row = {"errors": (e**2).sum(1), "squares": (y**2).sum(1), "ratios": (e**2).sum(1) / norms, "rows": np.ones(ROWS)}
    by_row |= {"error": e, "row": y, "counts": codes != 0, "codes": (codes != 0).sum(1)}
    by_row |= {"flips": np.array([a != b for a, b in zip(on, cut, strict=True)])}
    assert set(by_row) == set(found.sums)
    for name, values in by_row.items():
        wanted = [values[article == each].sum(0) for each in (1, 3, 8)]
        np.testing.assert_allclose(found.sums[name], wanted, rtol=1e-9, err_msg=name)


def test_every_formula_is_what_it_says(rows):
    x, article = rows
    sae = random_sae("token")
    found = audit.measured(sae, x, x, article).sums
    table = Sums({"a": {0: found, 1: found}})
    with torch.no_grad():
        e = (x - sae(x)).numpy()
    y, size = x.numpy(), (x.numpy() ** 2).sum() / ROWS
    wanted = {
        "mean": (e**2).sum() / ((y - y.mean(0)) ** 2).sum(),
        "offset": e.var(0).sum() / y.var(0).sum(),
        "tokens": ((e**2).sum(1) / ((y - y.mean(0)) ** 2).sum(1)).mean(),
        "scalar": (e**2).mean() / ((y - y.mean()) ** 2).mean(),
        "zero": (e**2).sum() / (y**2).sum(),
        "squared": (e**2).sum() / ROWS / (size - (size / D) ** 2),
    }
    for name, value in wanted.items():
        left = table.compare(lambda total, name=name: audit.unexplained(total)[name], "a", level=None)
        assert left.value == pytest.approx(value, rel=1e-9), name
    m = (y.mean(0) ** 2).sum() / size
    assert wanted["zero"] == pytest.approx((1 - m) * wanted["mean"])  # the proposition of chapter 18


def total(sums):
    """All units of one cell."""
    columns = {name: np.asarray(values, float)[None] for name, values in sums.items()}
    return Totals(columns, np.arange(1), np.ones(len(sums["rows"])))


def test_other_units_move_three_formulas_and_no_other(rows):
    x, article = rows
    found = audit.measured(random_sae("token"), x, x, article).sums
    moved = audit.in_other_units(found, 1.0, 0.5 * x.mean(0).numpy())
    scaled = audit.in_other_units(found, 0.1, np.zeros(D))
    plain, moved, scaled = (audit.unexplained(total(each)) for each in (found, moved, scaled))
    for name in ("mean", "offset", "tokens"):
        assert moved[name] == pytest.approx(plain[name]) == pytest.approx(scaled[name]), name
    assert moved["zero"] > 1.2 * plain["zero"] and scaled["zero"] == pytest.approx(plain["zero"])
    assert abs(scaled["squared"] / plain["squared"] - 1) > 0.2


def test_the_field_s_own_code_says_the_same(rows):
    evals = pytest.importorskip("sae_lens.evals")
    x, article = rows
    sae = random_sae("threshold")
    with torch.no_grad():
        output = sae(x)
    theirs = evals.ExplainedVarianceCalculator()
    for part in torch.arange(ROWS).split(90):
        theirs.add_batch(sae_output=output[part], hidden_acts=x[part])
    ours = audit.unexplained(total(audit.measured(sae, x, x, article).sums))
    assert 1 - ours["mean"] == pytest.approx(theirs.compute(), rel=1e-9)


def test_load_is_a_mixture_s():
    even, one = np.full(8, 5), np.array([40, 0, 0, 0, 0, 0, 0, 0])
    flat, shut = audit.load(even, 40), audit.load(one, 40)
    assert flat["in_effect"] == pytest.approx(8) and flat["max_violation"] == pytest.approx(0) and flat["dead"] == 0
    assert flat["nine_tenths"] == 1 and flat["busiest"] == pytest.approx(1 / 8)
    assert shut["in_effect"] == pytest.approx(1) and shut["max_violation"] == pytest.approx(7)
    assert shut["dead"] == 7 / 8 and shut["dense"] == 1 / 8 and shut["nine_tenths"] == 1 / 8


def test_rarefaction_is_what_a_random_part_of_the_text_shows():
    counts = np.array([0, 1, 2, 5, 50])
    fires = np.zeros((200, 5), bool)
    for j, count in enumerate(counts):
        fires[:count, j] = True
    draws = np.random.default_rng(0)
    seen = [(~fires[draws.permutation(200)[:40]].any(0)).mean() for _ in range(4000)]
    assert audit.silent(counts, 0.2) == pytest.approx(np.mean(seen), abs=0.01)
    assert audit.silent(counts) == 0.2


def test_twins_are_counted_among_the_living():
    sae = dictionary.topk_sae(6, 6, 2, generator=generator(0))
    with torch.no_grad():
        sae.decoder.weight.copy_(torch.eye(6))
        sae.decoder.weight[3] = sae.decoder.weight[2]
    counts = np.ones(6, int)
    assert audit.twins(sae, counts) == pytest.approx(2 / 6)
    counts[3] = 0
    assert audit.twins(sae, counts) == 0


def test_codes_of_different_numbers_are_filled_up_with_zeros():
    sae, x = random_sae("threshold"), random(40, D)
    codes = language_model.codes_on(sae, x, batch_size=1)
    torch.testing.assert_close(codes.to_dense(N), sae.encode(x).to_dense(N))


# -- where it comes from -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))


def saved(folder, d=16, **config):
    """An SAE of ours on disk, with its configuration changed."""
    dictionary.save_saelens(dictionary.topk_sae(d, 8, 2, generator=generator(0)), folder, {"hook_name": "blocks.1.x"})
    if config:
        path = folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_what_cannot_be_read_is_refused_by_the_parameter(home, tmp_path):
    for source in ("nowhere", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="sae='.*': there is no such file or folder; allowed: a folder, a packed"):
            audit.read_sae(source)
    with pytest.raises(ValueError, match="sae='.*architecture='temporal' .* is not read; allowed: 'standard'"):
        audit.read_sae(saved(tmp_path / "temporal", architecture="temporal"))
    narrow = saved(tmp_path / "narrow", 12)
    with pytest.raises(ValueError, match="sae='.*' maps 12 numbers to 12; allowed: 16 to 16, the width of teacher='"):
        audit.check(audit.read_sae(narrow), narrow, home["teacher"], "resid_post")


def test_a_transcoder_reads_what_enters_the_mlp(home, tmp_path):
    sae = dictionary.topk_sae(16, 8, 2, generator=generator(0), select=Select("positive"))
    sae.b_in = torch.nn.Parameter(torch.zeros(16))
    folder = saved(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert audit.written(folder) == {"architecture": "topk", "hook_name": "blocks.1.x"}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | {"architecture": "transcoder"}))
    read = audit.read_sae(folder)
    assert audit.check(read, folder, home["teacher"], "mlp_in") == "mlp_out"
    with pytest.raises(ValueError, match="site='resid_post' with sae='.*', a transcoder; allowed: 'mlp_in'"):
        audit.check(read, folder, home["teacher"], "resid_post")


def test_half_precision_becomes_float32_and_packed_files_are_read(tmp_path):
    half = dictionary.topk_sae(16, 8, 2, generator=generator(0)).half()
    dictionary.save_saelens(half, tmp_path / "half")
    assert audit.read_sae(str(tmp_path / "half")).decoder.weight.dtype == torch.float32
    mask = torch.stack([torch.randperm(16, generator=generator(j))[:4] for j in range(8)])
    packed = dictionary.expander_sae(mask, 16, 2, generator=generator(0))
    dictionary.save_packed(packed, tmp_path / "packed")
    read, x = audit.read_sae(str(tmp_path / "packed")), torch.randn(9, 16, generator=generator(1))
    torch.testing.assert_close(read(x), packed(x))
    assert audit.written(str(tmp_path / "packed"))["architecture"] == str(tmp_path / "packed")


def test_the_book_s_own_counts_as_a_trainer_does(home):
    book = audit.Book(home["corpus"], 1, "resid_post", 600, 12, 2, 7, 1e-2, batch_size=32)
    sae = book.train(home["model"], 0, cache_dir=home["cache"])
    again = book.train(home["model"], 0, cache_dir=home["cache"])
    assert torch.equal(sae.quiet, again.quiet) and sae.quiet.min() >= 0 and sae.quiet.max() <= 7
    assert not torch.equal(sae.quiet, torch.zeros_like(sae.quiet)), "some latent was silent at the last step"


def test_a_release_name_is_loaded_by_the_installed_saelens(monkeypatch):
    sae_lens = pytest.importorskip("sae_lens")
    from tests.dictionary.test_saelens import theirs

    model, asked = theirs("jumprelu", d=6, n=20), []
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *names: asked.append(names) or model)
    read, x = audit.read_sae("some-release:layer_9"), random(30, 6).float()
    torch.testing.assert_close(read(x), model(x))
    assert asked == [("some-release", "layer_9")]
    assert audit.written("some-transcoders:layer_9") == {"architecture": "some-transcoders:layer_9"}
