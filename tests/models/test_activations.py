"""What is in a store is what the model computes for its text, and nothing that breaks goes unnoticed."""

import json
import multiprocessing
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from helpers import settings, training
from helpers.models import activations, teachers
from helpers.models.activations import Moments
from helpers.models.teachers import Splice
from tests import tiny

LAYER, N = 1, 500


@pytest.fixture(scope="module", params=["llama", "gpt-neox"])  # with and without BOS
def teacher(request, tmp_path_factory) -> teachers.Teacher:
    return teachers.load(tiny.save(tmp_path_factory.mktemp("model"), request.param), device="cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "my.txt"
    file.write_text(tiny.text(100))
    return str(file)


@pytest.fixture
def harvest(teacher, corpus, tmp_path):
    def run(**options):
        options = {"layer": LAYER, "n_tokens": N, "max_length": 16, "batch_size": 4, "cache_dir": tmp_path} | options
        return activations.harvest(teacher, corpus, **options)

    return run


@pytest.fixture
def pieces(teacher, corpus):
    return activations.texts(teacher, corpus, n_tokens=N, max_length=16)


def one_by_one(teacher, pieces, site: str) -> torch.Tensor:
    """The slow way: every piece of text alone, no padding, BOS dropped, in order."""
    rows = [
        teacher.run_to(LAYER, torch.tensor(t).long()[None], None, [site])[site][0, pieces.bos :] for t in pieces.tokens
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("site", teachers.SITES)
def test_rows_are_the_models_activations(teacher, harvest, pieces, site):
    store = harvest(sites=[site])
    torch.testing.assert_close(store.tensor(site), one_by_one(teacher, pieces, site), rtol=1e-4, atol=1e-5)


def test_rows_belong_to_their_tokens(teacher, harvest, pieces):
    store = harvest()
    assert len(store) == store.n == N == pieces.n_tokens
    assert store.token_id.tolist() == [int(i) for tokens in pieces.tokens for i in tokens[pieces.bos :]]
    special = {teacher.tokenizer.bos_token_id, teacher.tokenizer.pad_token_id}
    assert not special & set(store.token_id.tolist())
    assert store.position.min() == pieces.bos and store.position.max() < 16
    starts = np.flatnonzero(np.diff(store.rows["text"], prepend=-1))
    assert (store.position[starts] == pieces.bos).all()
    embedded = harvest(sites=["resid_pre"], layer=0)
    expected = teacher.model.get_input_embeddings().weight[torch.from_numpy(np.array(store.token_id)).long()]
    torch.testing.assert_close(embedded.tensor("resid_pre"), expected)


def test_articles_are_those_of_the_corpus(harvest, corpus):
    from helpers.models import corpora

    rows = corpora.load(corpus)
    article_of = {text: article for text, article in zip(rows["text"], rows["article"], strict=True)}
    store = harvest()
    for text in np.unique(store.rows["text"])[:10]:
        inside = store.rows["text"] == text
        words = store.tokenizer.decode(store.token_id[inside])
        found = {article for full, article in article_of.items() if words in full}
        assert set(store.article[inside].tolist()) <= found


def test_context_is_the_text_around(harvest, pieces):
    store = harvest()
    row = int(np.flatnonzero(store.rows["text"] == 2)[2])
    words = store.tokenizer.decode(pieces.tokens[2][pieces.bos :]).split()
    assert store.context(row, before=2, after=1) == (" ".join(words[:2]), words[2], " ".join(words[3:4]))
    first = int(np.flatnonzero(store.rows["text"] == 2)[0])
    assert store.context(first)[0] == ""


def test_smaller_harvest_is_the_beginning(harvest):
    small, large = harvest(n_tokens=100), harvest()
    assert np.array_equal(small.token_id, large.token_id[:100])
    torch.testing.assert_close(small.tensor("mlp_in"), large.tensor("mlp_in", slice(100)), rtol=1e-4, atol=1e-5)


def test_second_harvest_reads_the_disk(harvest, monkeypatch):
    first = harvest()
    monkeypatch.setattr(teachers.Teacher, "run_to", lambda *_: pytest.fail("computed again"))
    again = harvest(sites=("mlp_out",))
    assert np.array_equal(again["mlp_out"], first["mlp_out"])


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 256), min_size=1, max_size=60), st.integers(1, 16))
def test_batches_hold_every_piece_once_and_little_padding(lengths, batch_size):
    pieces = activations.Texts([np.zeros(n, np.int32) for n in lengths], np.zeros(len(lengths), np.int32), 0)
    batches = pieces.batches(batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        inside = [lengths[i] for i in batch]
        assert len(batch) <= batch_size and inside[0] == max(inside) and min(inside) >= activations.FILLED * max(inside)


def test_new_site_is_added_without_the_old(harvest, monkeypatch):
    harvest(sites=["mlp_in"])
    asked = []
    run_to = teachers.Teacher.run_to
    monkeypatch.setattr(teachers.Teacher, "run_to", lambda self, *a: asked.append(a[-1]) or run_to(self, *a))
    store = harvest(sites=["mlp_in", "mlp_out"])
    assert set(asked) == {("mlp_out",)} and store["mlp_in"].shape == store["mlp_out"].shape


def test_everything_that_matters_is_in_the_key(harvest, tmp_path):
    options = [
        {},
        {"layer": 0},
        {"n_tokens": 99},
        {"max_length": 9},
        {"store_dtype": "float16"},
        {"split": "test", "n_tokens": 9},
    ]
    assert len({harvest(**o).key for o in options}) == len(options)


def test_other_weights_and_other_text_are_other_stores(teacher, corpus, tmp_path):
    def key(teacher, corpus):
        return activations.harvest(teacher, corpus, layer=0, n_tokens=9, cache_dir=tmp_path, sites="mlp_in").key

    other = tmp_path / "other.txt"
    other.write_text(tiny.text(100, seed=1))
    assert len({key(teacher, corpus), key(teacher.randomised(0), corpus), key(teacher, str(other))}) == 3


def test_short_corpus_is_used_whole_with_a_warning(harvest):
    with pytest.warns(UserWarning, match=r"has 1,\d+ tokens, not n_tokens=1,000,000"):
        assert 1000 < harvest(n_tokens=1_000_000).n < 2000


def test_half_precision_store(harvest):
    store = harvest(store_dtype="float16")
    assert store["mlp_in"].dtype == np.float16 and store.tensor("mlp_in").dtype == torch.float32
    torch.testing.assert_close(store.tensor("mlp_in"), harvest().tensor("mlp_in"), rtol=1e-3, atol=1e-3)


def test_overflow_is_no_infinity(harvest, monkeypatch):
    run_to = teachers.Teacher.run_to
    big = lambda self, *a: {site: v * 1e6 for site, v in run_to(self, *a).items()}  # noqa: E731
    monkeypatch.setattr(teachers.Teacher, "run_to", big)
    with pytest.raises(ValueError, match="activations overflow store_dtype='float16'; allowed here: 'float32'"):
        harvest(store_dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer=3 is not in teacher"),
        ({"sites": ["mlp"]}, "site='mlp' is unknown"),
        ({"sites": []}, "names no site"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"store_dtype": "int8"}, "store_dtype='int8' is unknown; allowed: float32, float16"),
        ({"split": "dev"}, "split='dev' is unknown"),
    ],
)
def test_bad_parameters(harvest, options, message):
    with pytest.raises(ValueError, match=message):
        harvest(**options)


# -- mean and covariance -----------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    st.sampled_from([0.0, 1e3, -1e6]),
    st.integers(0, 2**31),
)
def test_moments_of_parts_are_moments_of_the_whole(sizes, offset, seed):
    parts = [np.random.default_rng(seed).normal(size=(n, 3)) + offset * np.arange(3) for n in sizes]
    total = sum((Moments.of(torch.from_numpy(part)) for part in parts), Moments.empty(3))
    whole = np.concatenate(parts)
    assert total.n == len(whole)
    np.testing.assert_allclose(total.mean, whole.mean(0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(total.cov, np.cov(whole.T, bias=True), atol=1e-9 * max(1.0, abs(offset)))
    assert total.variance == pytest.approx(whole.var(0).mean(), rel=1e-6, abs=1e-12)


def test_moments_of_a_store(harvest, monkeypatch):
    monkeypatch.setattr(activations, "BLOCK_ROWS", 64)
    store = harvest()
    moments, rows = store.moments("mlp_in"), np.asarray(store["mlp_in"], np.float64)
    np.testing.assert_allclose(moments.cov, np.cov(rows.T, bias=True), atol=1e-12)
    monkeypatch.setattr(Moments, "of", lambda *_: pytest.fail("computed again"))
    assert torch.equal(harvest().moments("mlp_in").cov, moments.cov)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_gaussian_has_the_moments(rank):
    generator = settings.generator(0)
    factor = torch.randn(6, rank, generator=generator, dtype=torch.float64)
    wanted = Moments(10, torch.arange(6.0, dtype=torch.float64), factor @ factor.T)
    drawn = Moments.of(wanted.sample(200_000, generator))
    scale = wanted.cov.diagonal().max()
    assert (drawn.mean - wanted.mean).abs().max() < 0.02 * scale.sqrt()
    assert (drawn.cov - wanted.cov).abs().max() < 0.02 * scale
    assert torch.linalg.matrix_rank(drawn.cov, rtol=1e-4) == rank


def test_gaussian_is_repeatable():
    moments = Moments.of(torch.randn(50, 4, generator=settings.generator(1)))
    assert torch.equal(moments.sample(7, settings.generator(2)), moments.sample(7, settings.generator(2)))


# -- batches -----------------------------------------------------------------------------------------------------------


def test_shuffled_batches_keep_sites_together_and_read_only_their_rows(teacher, harvest):
    store = harvest()
    stream = training.Shuffled(store["mlp_in"], store["mlp_out"], batch_size=64, fingerprint=store.key)
    assert isinstance(stream.inputs, np.memmap) and isinstance(stream.targets, np.memmap)
    for step in (0, 1, stream.steps_per_epoch):
        inputs, outputs = stream(step)
        torch.testing.assert_close(teacher.mlp(LAYER)(inputs), outputs, rtol=1e-4, atol=1e-5)


# -- what can go wrong on disk -----------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (lambda f: os.truncate(f / "mlp_in.npy", 999), "mlp_in.npy: it has 999 bytes where"),
        (lambda f: (f / "mlp_out.npy").unlink(), "mlp_out.npy: it has 0 bytes where"),
        (lambda f: (f / "mlp_in.npy").open("ab").write(b"x"), "mlp_in.npy: it has"),
        (lambda f: os.truncate(f / "mlp_in.json", 20), "mlp_in.json"),
        (
            lambda f: flip(f / "mlp_in.json", (f / "mlp_in.json").read_bytes().index(b'"bytes": ') + 9),
            "mlp_in.json: its checksum",
        ),
        (lambda f: flip(f / "rows.npy", 500), "rows.npy: its checksum is wrong"),
    ],
)
def test_damage_is_named(harvest, damage, file):
    folder = harvest().folder
    damage(folder)
    with pytest.raises(ValueError, match=f"store is damaged: .*{file}.*; delete the folder {folder} to harvest again"):
        harvest()
    shutil.rmtree(folder)
    harvest().verify()


def test_one_flipped_value_is_found_by_verify(harvest):
    store = harvest()
    store.verify()
    flip(store.folder / "mlp_in.npy", 5000)
    with pytest.raises(ValueError, match="mlp_in.npy: its checksum is wrong"):
        store.verify()


def test_full_disk_is_named_before_work(harvest, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=5))
    with pytest.raises(ValueError, match=r"the harvest takes 72,000 bytes, only 5 are free"):
        harvest()
    assert not list(tmp_path.rglob("*.npy"))


def slow_harvest(model: str, corpus: str, cache: str, seconds: float, log: str) -> None:
    """Harvest one text a batch with a checkpoint after each, and write down every batch."""
    activations.CHECKPOINT_BATCHES = 1
    run_to = teachers.Teacher.run_to

    def slow(self, *arguments):
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write("batch\n")
        return run_to(self, *arguments)

    teachers.Teacher.run_to = slow
    teacher = teachers.load(model, device="cpu")
    activations.harvest(teacher, corpus, layer=LAYER, n_tokens=N, max_length=16, batch_size=4, cache_dir=cache)


def batches_done(cache: Path) -> int:
    progress = list(cache.rglob("progress.json"))
    return json.loads(progress[0].read_text())["batches"] if progress else 0


def test_killed_harvest_goes_on_where_it_stopped(teacher, corpus, tmp_path, harvest, pieces):
    cache, log = tmp_path / "killed", tmp_path / "log"
    arguments = (teacher.name, corpus, str(cache))
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=slow_harvest, args=(*arguments, 0.2, str(log)))
    victim.start()
    deadline = time.monotonic() + 120
    while batches_done(cache) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    victim.join()
    done = batches_done(cache)
    assert not list(cache.rglob("mlp_in.json"))
    log.unlink()
    second = context.Process(target=slow_harvest, args=(*arguments, 0.0, str(log)))
    second.start()
    second.join(120)
    assert second.exitcode == 0
    whole = harvest()
    resumed = harvest(cache_dir=cache)
    resumed.verify()
    assert done >= 3 and len(log.read_text().split()) == len(pieces.batches(4)) - done
    assert np.array_equal(resumed["mlp_in"], whole["mlp_in"]) and np.array_equal(resumed.rows, whole.rows)
    assert not list(cache.rglob("partial*"))


# -- losses and padded batches -----------------------------------------------------------------------------------------


def test_losses_are_those_of_each_text(teacher, corpus):
    pieces = activations.texts(teacher, corpus, n_tokens=120, max_length=16)
    frame = activations.losses(teacher, pieces, batch_size=3)
    for i, tokens in enumerate(pieces.tokens):
        ids = torch.tensor(tokens).long()[None]
        logits = teacher.model(ids).logits[0, :-1]
        alone = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        assert frame.nats[i] == pytest.approx(alone, rel=1e-4) and frame.tokens[i] == len(tokens) - 1
    assert frame.article.tolist() == pieces.articles.tolist()
    zero = activations.losses(teacher, pieces, Splice.zero(LAYER, "mlp_out"), batch_size=3)
    assert zero.nats.sum() != frame.nats.sum() and zero.tokens.equals(frame.tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_run_counts_every_row_of_left_padded_batches(corpus, tmp_path, attention):
    teacher = teachers.load(tiny.save(tmp_path / "model", "llama"), attn_implementation=attention, device="cpu")
    options = {"n_tokens": 200, "max_length": 16}
    run = activations.padded(teacher, corpus, layer=LAYER, min_length=6, batch_size=8, cache_dir=tmp_path, **options)
    pieces = activations.texts(teacher, corpus, **options)
    long = [tokens for tokens in pieces.tokens if len(tokens) >= 6]
    rows, is_padding = [], []
    for start in range(0, len(long), 8):
        batch = long[start : start + 8]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(tokens)) + tokens.tolist() for tokens in batch])
        rows.append(teacher.run_to(LAYER, ids, (ids != 0).long(), ["mlp_in"])["mlp_in"].flatten(0, 1))
        is_padding.append((ids == 0).flatten())
    rows, is_padding = torch.cat(rows).double().numpy(), torch.cat(is_padding).numpy()
    assert run.share == pytest.approx(is_padding.mean())
    np.testing.assert_allclose(run.of("mlp_in").cov, np.cov(rows.T, bias=True), atol=1e-5)
    np.testing.assert_allclose(run.of("mlp_in", "padding").mean, rows[is_padding].mean(0), atol=1e-5)
    assert run.of("mlp_in", "bos").n == len(long)
    gaps = np.linalg.norm(rows[is_padding] - run.padding_row["mlp_in"].double().numpy(), axis=1)
    norm = run.padding_row["mlp_in"].norm().item()
    assert run.padding_spread["mlp_in"] == pytest.approx(gaps.max() / norm, abs=1e-4)
    again = activations.padded(teacher, corpus, layer=LAYER, min_length=6, batch_size=8, cache_dir=tmp_path, **options)
    assert torch.equal(again.of("mlp_in").cov, run.of("mlp_in").cov) and again.share == run.share


def test_padded_run_without_long_texts(teacher, corpus, tmp_path):
    with pytest.raises(ValueError, match="min_length=99: no text of corpus"):
        activations.padded(teacher, corpus, layer=0, n_tokens=50, min_length=99, cache_dir=tmp_path)
