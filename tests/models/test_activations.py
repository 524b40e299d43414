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
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from helpers import kept, settings, training
from helpers.models import activations, corpora, teachers
from helpers.models import store as store_files
from helpers.models.activations import Moments
from helpers.models.teachers import Splice
from tests import tiny

LAYER, N = 1, 500


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(activations, "BLOCK", 8)


@pytest.fixture(scope="module", params=["llama", "gpt-neox"])  # with and without BOS
def teacher(request, tmp_path_factory) -> teachers.Teacher:
    return teachers.load(tiny.save(tmp_path_factory.mktemp("model"), request.param), device="cpu")


ONE = pytest.mark.parametrize("teacher", ["llama"], indirect=True)
"""For what does not depend on the model and starts many processes."""


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


def test_second_harvest_reads_the_disk(harvest, monkeypatch):
    first = harvest()
    monkeypatch.setattr(teachers.Teacher, "_sites", lambda *_: pytest.fail("computed again"))
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
        assert len(batch) <= batch_size and inside[0] == max(inside) and min(inside) >= corpora.FILLED * max(inside)


def test_everything_that_matters_is_in_the_key(harvest, tmp_path):
    options = [
        {},
        {"layer": 0},
        {"n_tokens": 99},
        {"batch_size": 3},
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
    sites = teachers.Teacher._sites

    def big(self, *arguments):
        return {n: {site: v * 1e6 for site, v in of.items()} for n, of in sites(self, *arguments).items()}

    monkeypatch.setattr(teachers.Teacher, "_sites", big)
    with pytest.raises(ValueError, match="activations overflow store_dtype='float16'; allowed: 'float32'"):
        harvest(store_dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer=3 is not in teacher"),
        ({"layer": [0, 3]}, "layer=3 is not in teacher"),
        ({"layer": []}, "names no layer; allowed: 0 to 2"),
        ({"sites": ["mlp"]}, "site='mlp' is unknown"),
        ({"sites": []}, "names no site"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"store_dtype": "int8"}, "store_dtype='int8' is unknown; allowed: 'float32', 'float16'"),
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
    assert [type(array) for array in stream.arrays] == [np.memmap, np.memmap]
    for step in (0, 1, stream.steps_per_epoch):
        inputs, outputs = stream(step)
        torch.testing.assert_close(teacher.mlp(LAYER)(inputs), outputs, rtol=1e-4, atol=1e-5)


# -- one store that grows ----------------------------------------------------------------------------------------------


def same(store, whole) -> None:
    """`store` is the beginning of `whole`, bit for bit."""
    assert np.array_equal(store.rows, whole.rows[: store.n])
    for site in store.sites:
        assert np.array_equal(store[site], whole[site][: store.n])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def place(store) -> Path:
    """The folder of all rows."""
    return store.folder.with_name(store.key.partition("@")[0])


@hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(16, N),  # fewer than a piece are cut to shorter ones, as tests of corpora say
            st.sets(st.sampled_from(teachers.SITES), min_size=1),
            st.sets(st.integers(0, 2), min_size=1),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_was_asked_for_before_the_rows_are_the_same(harvest, tmp_path_factory, asked):
    folder = tmp_path_factory.mktemp("cache")
    whole = {n: harvest(layer=n, sites=teachers.SITES) for n in range(3)}
    for n_tokens, sites, layers in asked:
        stores = harvest(n_tokens=n_tokens, sites=sorted(sites), layer=sorted(layers), cache_dir=folder)
        assert sorted(stores) == sorted(layers)
        for layer, store in stores.items():
            assert store.n == n_tokens and set(store.sites) == sites
            same(store, whole[layer])
    for layer, store in harvest(layer=[0, 1, 2], sites=teachers.SITES, cache_dir=folder).items():
        store.verify()
        assert content(place(store)) == content(place(whole[layer]))


def test_a_prefix_is_there_already_and_has_its_own_name(harvest, monkeypatch):
    store = harvest()
    monkeypatch.setattr(corpora, "load", lambda *_: pytest.fail("text was read"))
    part = harvest(n_tokens=100, sites="mlp_out")
    same(part, store)
    assert part.key != store.key and place(part) == place(store)
    assert part.moments("mlp_out").n == 100 and store.moments("mlp_out").n == N


def test_a_worker_opens_the_same_rows_by_the_folders_name(harvest):
    harvest()
    store = harvest(n_tokens=123)
    again = activations.ActivationStore(str(store.folder), ("mlp_out",))
    assert again.key == store.key and np.array_equal(again["mlp_out"], store["mlp_out"])
    for name, message in ((place(store), "ends with @ and rows"), (f"{place(store)}@5000", "has .* rows .* not 5,000")):
        with pytest.raises(ValueError, match=message):
            activations.ActivationStore(name, ("mlp_out",))
    with pytest.raises(ValueError, match="has 0 rows of 'resid_pre', not 123"):
        activations.ActivationStore(store.folder, ("resid_pre",))


def test_one_pass_adds_all_that_is_missing_and_no_more(harvest, monkeypatch):
    asked, sites_of = [], teachers.Teacher._sites

    def noted(self, wanted, *arguments):
        asked.append({layer: tuple(sites) for layer, sites in wanted.items()})
        return sites_of(self, wanted, *arguments)

    monkeypatch.setattr(teachers.Teacher, "_sites", noted)
    harvest(n_tokens=100, sites="mlp_in")
    first = len(asked)
    stores = harvest(n_tokens=100, sites=["mlp_in", "resid_post"], layer=[0, LAYER])
    assert all(store.n == 100 for store in stores.values())
    assert asked[first:] == [{0: ("mlp_in", "resid_post"), LAYER: ("resid_post",)}] * first
    asked.clear()
    harvest(n_tokens=400, sites="mlp_in")
    assert asked == [{LAYER: ("mlp_in",)}] * len(asked)
    more = len(asked)
    asked.clear()
    harvest(n_tokens=400, sites="mlp_in", cache_dir=stores[0].folder.parents[1] / "other")
    assert len(asked) == first + more


def test_opening_what_is_there_reads_no_rows(harvest, monkeypatch):
    harvest()
    monkeypatch.setattr(store_files.Files, "verify", lambda *_: pytest.fail("rows were read"))
    harvest()


def test_a_copy_is_read_once(harvest, monkeypatch, tmp_path):
    harvest()
    other, calls, verify = tmp_path / "other", [], store_files.Files.verify
    shutil.copytree(tmp_path / "activations", other / "activations", copy_function=shutil.copy)
    monkeypatch.setattr(store_files.Files, "verify", lambda self, *a: calls.append(a[0]) or verify(self, *a))
    for _ in range(2):
        harvest(cache_dir=other)
    assert sorted(calls) == ["mlp_in", "mlp_out", "rows"]


def test_a_changed_statement_harvests_anew(harvest, monkeypatch):
    before = harvest().key
    monkeypatch.setattr(kept, "code_of", lambda *_: "other code")
    assert harvest().key != before


# -- what can go wrong on disk -----------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(folder: Path) -> None:
    shutil.copy(folder / "mlp_in.bin", folder / "mlp_out.bin")


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "mlp_in.bin", 999), "mlp_in.bin: it has 999 bytes where"),
    "missing": (lambda f: (f / "mlp_out.bin").unlink(), "mlp_out.bin: it has 0 bytes where"),
    "another's": (swap, "mlp_out.bin: its checksum is wrong"),
    "flipped": (lambda f: flip(f / "mlp_in.bin", 500), "mlp_in.bin: its checksum is wrong"),
    "flipped rows": (lambda f: flip(f / "rows.bin", 500), "rows.bin: its checksum is wrong"),
    "index cut": (lambda f: os.truncate(f / "index.json", 20), "index.json"),
    "index changed": (lambda f: flip(f / "index.json", (f / "index.json").read_bytes().index(b'"d": ') + 5), "index"),
    "index foreign": (lambda f: (f / "index.json").write_text("[1, 2]"), "index.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(harvest, name):
    damage, message = DAMAGE[name]
    store = harvest()
    folder = place(store)
    damage(folder)
    with pytest.raises(ValueError, match=f"store is damaged: .*{message}.*; delete the folder {folder} to harvest"):
        harvest()
    shutil.rmtree(folder)
    harvest().verify()


def test_the_index_of_another_store_is_foreign(harvest):
    one, other = place(harvest()), place(harvest(layer=0))
    shutil.copy(other / "index.json", one / "index.json")
    with pytest.raises(ValueError, match="index.json: it is that of another store"):
        harvest()


def test_one_flipped_value_is_found_by_verify_even_where_the_time_is_the_old(harvest):
    store = harvest()
    path = place(store) / "mlp_in.bin"
    about = path.stat()
    flip(path, 5000)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(ValueError, match="mlp_in.bin: its checksum is wrong in block"):
        store.verify()


def test_full_disk_is_named_before_work(harvest, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=5))
    monkeypatch.setattr(teachers.Teacher, "_sites", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"the harvest takes [\d,]+ bytes, only 5 are free"):
        harvest()
    assert not list(tmp_path.rglob("*.bin"))


def test_a_disk_that_fills_up_leaves_what_was_finished(harvest, monkeypatch):
    harvest(n_tokens=100)
    monkeypatch.setattr(store_files.Files, "_write", lambda _: (_ for _ in ()).throw(ValueError("no room")))
    with pytest.raises(ValueError, match="no room"):
        harvest()
    monkeypatch.undo()
    monkeypatch.setattr(activations, "BLOCK", 8)
    same(harvest(n_tokens=100), harvest())
    harvest().verify()


def slow_harvest(model: str, corpus: str, cache: str, seconds: float, log: str) -> None:
    """Harvest two layers slowly, and write down every batch."""
    activations.BLOCK = 8
    sites = teachers.Teacher._sites

    def slow(self, *arguments):
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write("batch\n")
        return sites(self, *arguments)

    teachers.Teacher._sites = slow
    teacher = teachers.load(model, device="cpu")
    options = {"max_length": 16, "batch_size": 4, "cache_dir": cache}
    activations.harvest(teacher, corpus, layer=[0, LAYER], n_tokens=N, **options)


def start(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=slow_harvest, args=arguments)
    process.start()
    return process


def batches_logged(log: Path) -> int:
    return len(log.read_text().split()) if log.exists() else 0


@ONE
def test_killed_at_any_moment_it_goes_on_and_is_the_same(teacher, corpus, tmp_path, harvest):
    cache, log, whole = tmp_path / "killed", tmp_path / "log", harvest(layer=[0, LAYER])
    moments = np.random.default_rng(0).integers(1, 12, 3)
    for moment in moments:
        log.unlink(missing_ok=True)
        victim = start(teacher.name, corpus, str(cache), 0.03, str(log))
        deadline = time.monotonic() + 120
        while batches_logged(log) < moment and victim.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        victim.kill()
        victim.join()
    done = {layer: Path(f"{cache}/activations/{place(store).name}/index.json") for layer, store in whole.items()}
    ends = [json.loads(path.read_text())["index"]["ends"] for path in done.values() if path.exists()]
    assert ends and any(ends), "none of the killed processes finished a block"
    for layer, store in harvest(layer=[0, LAYER], cache_dir=cache).items():
        store.verify()
        same(store, whole[layer])
        assert content(place(store)) == content(place(whole[layer]))


@ONE
def test_two_processes_do_not_work_twice(teacher, corpus, tmp_path, harvest):
    cache, log = tmp_path / "both", tmp_path / "log"
    both = [start(teacher.name, corpus, str(cache), 0.05, str(log)) for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    twice = batches_logged(log)
    log.unlink()
    start(teacher.name, corpus, str(tmp_path / "one"), 0.0, str(log)).join(120)
    assert twice == batches_logged(log)
    same(harvest(cache_dir=cache), harvest())


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
    np.testing.assert_allclose(run.padding_row["mlp_in"], rows[is_padding][0], atol=1e-5)
    again = activations.padded(teacher, corpus, layer=LAYER, min_length=6, batch_size=8, cache_dir=tmp_path, **options)
    assert torch.equal(again.of("mlp_in").cov, run.of("mlp_in").cov) and again.share == run.share


@pytest.mark.parametrize(("n_tokens", "batch_size"), [(150, 8), (135, 8), (30, 8), (75, 2), (15, 8)])
def test_texts_that_are_all_full_get_padding(tmp_path, n_tokens, batch_size):
    """Also where the last of them is a batch by itself, and where there is one alone."""
    long, teacher = tmp_path / "long.jsonl", teachers.load(tiny.save(tmp_path / "model", "llama"), device="cpu")
    texts = (tiny.text(60, i).replace("\n\n", " ") for i in range(20 if n_tokens > 15 else 1))
    long.write_text("\n".join(json.dumps({"text": each, "split": "train"}) for each in texts))
    options = {"n_tokens": n_tokens, "max_length": 16}
    assert {len(tokens) for tokens in activations.texts(teacher, str(long), **options).tokens} in ({16}, {7})
    options |= {"layer": LAYER, "min_length": 6, "batch_size": batch_size, "cache_dir": tmp_path}
    run = activations.padded(teacher, str(long), **options)
    assert 0 < run.share < 0.4 and run.padding_row.keys() == {"mlp_in", "mlp_out"}


def test_padded_run_without_long_texts(teacher, corpus, tmp_path):
    with pytest.raises(ValueError, match="n_tokens=50 has no text of min_length=99 and more; allowed: more tokens"):
        activations.padded(teacher, corpus, layer=0, n_tokens=50, min_length=99, cache_dir=tmp_path)
