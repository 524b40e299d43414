"""Screening in few bits: the bound holds, and the choice is that of float32 products, whatever the data."""

import pytest
import torch
from torch.nn import functional as F

from helpers.dictionary import Select, pursuit, sae_to_moe, screening, topk_sae
from helpers.dictionary.rows import row_products
from helpers.dictionary.screening import Halved, Screen
from helpers.settings import generator
from helpers.training import Recipe, Run, Shuffled, remedies

FORMS = [torch.int8, torch.bfloat16]


def rows(n=1024, m=48, seed=0):
    return torch.randn(n, m, generator=generator(seed))


def heavy(n=1024, m=48, seed=0):
    """A few coordinates far larger than the others, as in a language model, and lengths over four decades."""
    g = generator(seed)
    large = torch.where(torch.rand(m, generator=g) < 0.05, 300.0, 1.0)
    return torch.randn(n, m, generator=g) * large * 10 ** (4 * torch.rand(n, 1, generator=g) - 2)


def near_ties(n=1024, m=48, seed=0):
    """Groups of rows that differ in the last bits only, and equal ones."""
    weight = rows(n, m, seed)
    weight[1::2] = weight[::2] * (1 + 2.0**-23 * torch.randint(-1, 2, (n // 2, 1), generator=generator(seed)))
    weight[2::8] = weight[::8]
    return weight


def flat(n=1024, m=48, seed=0):
    """All products of equal size: thousands of candidates."""
    return torch.randint(0, 2, (n, m), generator=generator(seed)).float() * 2 - 1


def tiny(n=1024, m=48, seed=0):
    return rows(n, m, seed) * 2.0**-60


KINDS = [rows, heavy, near_ties, flat, tiny]


def all_products(x, weight):
    """In float32, each a sum in the order that re-scoring takes."""
    starts = torch.arange(len(x) + 1) * len(weight)
    return row_products(x, weight, starts, torch.arange(len(weight)).repeat(len(x))).view(len(x), -1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signals", KINDS)
def test_no_product_is_further_off_than_proved(form, kind, signals):
    weight, x = kind(), signals(64, seed=1)
    few = Screen(weight, form)
    rounded = few.rounded(x)
    scores = few._scores(rounded[0]).double() * rounded[1].double()[:, None] * few.step.double().repeat(few.width)
    off = (scores - x.double() @ weight.double().T[:, few.row]).abs() - few.unit * scores.abs()
    error = few.error(x, rounded)
    share = off / (error.repeat(1, few.width) if form == torch.int8 else error)
    assert share.max() <= 1
    if kind is signals is rows:
        assert share.max() > 0.2, "this is not the error that the bound is of"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signals", KINDS)
def test_the_choice_is_that_of_float32(form, magnitude, kind, signals):
    weight, x = kind(), signals(64, seed=1)
    without = torch.rand(64, len(weight), generator=generator(2)).topk(5).indices
    score = all_products(x, weight)
    score = (score.abs() if magnitude else score).scatter(1, without, -torch.inf)
    least = score.amax(1).clamp_min(0) * torch.where(torch.arange(64) % 4 == 0, 1.1, 0.9)
    best, chosen = Screen(weight, form).largest(x, magnitude=magnitude, without=without, least=least)
    wanted = score.max(1).values
    above = wanted > least
    assert torch.equal(best, torch.where(above, wanted, -torch.inf)) and above.any() and not above.all()
    first = (score == wanted[:, None]).int().argmax(1)  # of equal ones the first
    assert torch.equal(chosen, torch.where(above, first, len(weight)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_few_are_candidates_of_random_rows(form):
    """Or nothing is gained."""
    weight, x = F.normalize(rows(4096, 256)), rows(64, 256, seed=1)
    few, seen = Screen(weight, form), []
    few._above = lambda *given: seen.append(found := Screen._above(few, *given)) or found
    few.largest(x, magnitude=True, without=torch.zeros(64, 1).long(), least=torch.zeros(64))
    assert len(seen[0][0]) < {torch.int8: 8, torch.bfloat16: 2}[form] * 64


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("options", [{}, {"select": "signed"}, {"tolerance": 0.6}], ids=str)
@pytest.mark.parametrize("kind", [rows, near_ties, flat])
def test_pursuit_chooses_the_same_atoms(monkeypatch, form, options, kind):
    atoms, x = F.normalize(kind(1024, 64)), rows(96, 64, seed=3)
    x[5] = 0
    plain = pursuit.omp(x, atoms, 9, gram=False, **options)
    monkeypatch.setattr(pursuit, "forms", lambda *given: [form])
    monkeypatch.setattr(pursuit, "screen", lambda x, weight: Screen(weight, form))
    ours = pursuit.omp(x, atoms, 9, **options)
    if kind is rows:
        assert torch.equal(ours.fires, plain.fires) and torch.equal(ours.indices[ours.fires], plain.indices[ours.fires])
        torch.testing.assert_close(ours.values, plain.values, rtol=1e-5, atol=1e-6)
    rest = [(x - codes.to_dense(1024) @ atoms).norm(dim=1) for codes in (ours, plain)]  # of equal atoms either will do
    torch.testing.assert_close(rest[0].mean(), rest[1].mean(), rtol=1e-2, atol=0)
    assert (ours.values[5] == 0).all() and (ours.indices.sort(1).values.diff(dim=1) > 0).all()


def test_a_crowd_is_screened_more_finely(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    few, options = Screen(flat(), torch.int8), {"magnitude": True, "without": torch.zeros(48, 1).long()}
    few.largest(rows(48, seed=1), **options, least=torch.zeros(48))
    assert few.finer() is few
    few.largest(torch.eye(48), **options, least=torch.zeros(48))  # all products are 1 or −1
    assert (few := few.finer()).form == torch.bfloat16
    few.largest(torch.eye(48), **options, least=torch.zeros(48))
    assert few.finer() is None, "float32 is left"


# -- the k largest -----------------------------------------------------------------------------------------------------


def float32_top(x, weight, bias, k):
    """The k largest in order, of equal ones the first."""
    found = (all_products(x, weight) + bias).sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


class Every(Halved):
    """All products in the order of re-scoring."""

    def top(self, x, weight, bias, k):
        return float32_top(x.detach(), weight.detach(), bias.detach(), k)


@pytest.mark.parametrize("size", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signals", KINDS)
def test_the_k_largest_are_those_of_float32(monkeypatch, kind, signals, size):
    monkeypatch.setattr(Halved, "MOST", 1.0)
    weight, x = kind(), signals(64, seed=1)
    bias = size * torch.randn(len(weight), generator=generator(4)) * (x @ weight.T).std()
    values, found = Halved().top(x, weight, bias, 8)
    wanted, rows_of = float32_top(x, weight, bias, 8)
    assert torch.equal(values, wanted)
    assert torch.equal(found.sort(1).values, rows_of.sort(1).values)


def test_nearly_all_samples_of_random_rows_are_certified():
    half, weight, zeros = Halved(), F.normalize(rows(4096, 256)), torch.zeros(4096)
    for seed in range(3):
        x = rows(256, 256, seed)
        found = half.top(x, weight, zeros, 16)[1]
        assert torch.equal(found.sort(1).values, float32_top(x, weight, zeros, 16)[1].sort(1).values)
    assert half.seen == 768 and half.fallen < 8
    assert half.top(x, torch.ones(4096, 256), zeros, 16) is None, "nothing can be certified where all are equal"


def sae_run(screen, balance=None):
    sae = topk_sae(64, 1024, 8, generator=generator(0))
    stream = Shuffled(rows(2048, 64, seed=7), batch_size=128, fingerprint="test")
    recipe = Recipe(50, lr=1e-3, balance=balance or remedies.Balance())
    return Run({"": sae}, stream, {"": recipe}, log_every=1, screen=screen)


def test_training_is_that_of_float32_products(monkeypatch):
    monkeypatch.setattr("helpers.training.loop.forms", lambda *given: [torch.bfloat16])
    screened, every, plain = sae_run(True), sae_run(True), sae_run(False)
    every.screens[""] = Every()
    for run in (screened, every, plain):
        for step in range(50):
            run.train_step(step)
    ours, theirs, usual = (torch.tensor(run.fits[""].loss) for run in (screened, every, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(usual, theirs, rtol=1e-4, atol=0)  # whose products are sums in another order
    assert theirs[-1] < 0.9 * theirs[0] and screened.screens[""].seen == 50 * 128


def test_only_plain_choices_are_screened(monkeypatch):
    monkeypatch.setattr("helpers.training.loop.forms", lambda *given: [torch.bfloat16])

    def sae(n=1024, **options):
        return topk_sae(64, n, 8, generator=generator(0), **options)

    assert sae().screenable and sae(tied=True).screenable
    others = [{"selection_bias": True}, {"select": Select("batch")}, {"select": Select("magnitude")}, {"n": 15}]
    assert not any(sae(**other).screenable for other in others) and not sae_to_moe(sae(tied=True)).screenable
    for balance, wanted in ((remedies.Balance(), True), (remedies.Switch(0.1), False), (remedies.AuxK(), True)):
        run = sae_run(True, balance)
        run.train_step(0)
        assert bool(run.screens) == wanted
    assert sae_run(True).kept("", "cache").key != sae_run(False).kept("", "cache").key


def test_what_is_not_worth_it_is_not_screened(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    weight = rows(4096, 256)
    assert screening.forms(weight, 256) == FORMS
    assert screening.forms(weight, 1) == screening.forms(weight[:100], 10**6) == []
    assert screening.forms(weight.double(), 256) == screening.forms(weight.to("meta"), 256) == []
    assert screening.screen(rows(256, 256, seed=1), F.normalize(weight)).form == torch.int8
    spikes = F.one_hot(torch.arange(256), 256) * 30.0 + rows(256, 256, seed=1)  # one number sets the step
    assert screening.screen(spikes, F.normalize(weight)).form == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert screening.forms(weight, 256) == FORMS[1:]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert screening.screen(rows(256, 256), weight) is None
