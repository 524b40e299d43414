"""The mixture of experts: its text, its tokenizer, a training that can be killed, and what is shipped."""

import dataclasses
import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.kept import Kept
from helpers.models import checkpoints, corpora, sources, teachers
from helpers.parts import held_out, mixture
from helpers.parts.held_out import KneserNey
from tests import tiny

SIZE = mixture.Size(d_model=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, d_ff=8, vocabulary=300)
RECIPE = mixture.PretrainingRecipe(
    steps=6, batch_size=2, length=16, warmup=2, dropout=0.1, checkpoints=(0, 2), log_every=1, validate_every=3,
    n_validation=60,
)  # fmt: skip
SHIPPED = pytest.mark.skipif(not (sources.FOLDER / "training.json").is_file(), reason="no model is shipped yet")
SENTENCE = "the whale swam under a ship and sailors of old saw it – naïvely night"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty documents of three paragraphs each."""
    random, words = np.random.default_rng(0), SENTENCE.split()
    rows = [
        {"title": f"document {n}", "text": " ".join(random.choice(words, size=random.integers(8, 40))) + f" {n}.{i}"}
        for n in range(60)
        for i in range(3)
    ]
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return mixture.tokenizer(corpus, 300, cache_dir=tmp_path_factory.mktemp("cache"))


def train(model, tokenizer, corpus, cache, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return mixture.pretrain(model, tokenizer, corpus, recipe, device="cpu", cache_dir=cache)


@pytest.fixture(scope="module")
def trained(corpus, tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {
        "mixture": train(SIZE.mixture(), tokenizer, corpus, cache),
        "twin": train(SIZE.dense(), tokenizer, corpus, cache, checkpoints=()),
    }


@pytest.fixture(scope="module")
def shipped(trained, tmp_path_factory):
    return mixture.ship(trained["mixture"], trained["twin"], {"note": "tiny"}, tmp_path_factory.mktemp("data") / "moe")


# -- text --------------------------------------------------------------------------------------------------------------


def test_no_document_of_the_book_texts_is_in_two_splits_and_no_paragraph_either():
    rows = {split: corpora.load("book-texts", split).to_pandas() for split in corpora.SPLITS}
    for a, b in itertools.combinations(rows.values(), 2):
        assert not set(a.article) & set(b.article)
        assert not set(a.source + a.title) & set(b.source + b.title)
        assert not set(a.text) & set(b.text)
    every = pd.concat(rows.values())
    assert set(every.source) == set(corpora.BOOK_TEXTS)
    assert (every.groupby("article")[["title", "source"]].nunique() == 1).all(axis=None)
    alone = {source: pd.read_parquet(path) for source, path in corpora.BOOK_TEXTS.items()}
    assert {s: len(t) for s, t in alone.items()} == every.source.value_counts().to_dict()


def test_the_readme_states_the_rows_of_the_texts():
    readme = (sources.FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for name in ("State of the Union", "Moby Dick"):
        path = corpora.BOOK_TEXTS[name]
        rows = pd.read_parquet(path)
        rows["words"] = rows.text.str.split().str.len()
        found = rows.groupby("split").agg(d=("article", "nunique"), p=("text", "size"), w=("words", "sum"))
        for split, row in found.iterrows():
            assert f"| `{path.name}` | {split} | {row.d} | {row.p:,} | {row.w:,} |" in readme
        assert not rows.text.str.contains(r"\[p\.|[\x00-\x1f]|  |\[\d+\]").any()


def test_the_corpus_has_a_fingerprint_of_all_its_files():
    parts = corpora.fingerprint("book-texts").split("+")
    assert parts == [corpora.fingerprint(str(path)) for path in corpora.BOOK_TEXTS.values()]


@given(st.text())
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    if mixture.BOS not in text:
        assert held_out.bytes_per_token(tokenizer)[ids].sum() == len(text.encode("utf-8"))


def test_a_batch_depends_on_its_step_alone_and_an_epoch_reads_every_token_once():
    texts = [np.array([0, *range(10 * i + 1, 10 * i + 1 + n)]) for i, n in enumerate((3, 7, 5, 8, 6, 9, 4))]
    stream = mixture.TokenBatches(texts, batch_size=2, length=5)
    batches = [stream.batch(step) for step in range(2 * stream.steps_per_epoch)]
    assert all(b.shape == (2, 5) and (b[:, 0] == 0).all() for b in batches)
    again = mixture.TokenBatches(texts, batch_size=2, length=5)
    assert all(torch.equal(again.batch(step), batches[step]) for step in (7, 0, 3))
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        read = torch.cat([b[:, 1:].flatten() for b in epoch])
        read = read[read > 0]
        assert len(read.unique()) == len(read) > sum(map(len, texts)) - len(texts) - 8
    assert not torch.equal(batches[0], batches[stream.steps_per_epoch])
    with pytest.raises(ValueError, match="allowed: fewer than the"):
        mixture.TokenBatches(texts, batch_size=20, length=50)


# -- models and training -----------------------------------------------------------------------------------------------


def test_the_twin_has_the_active_parameters_of_the_mixture_but_for_the_router():
    full = mixture.Size()
    total, dense = (sum(p.numel() for p in m.parameters()) for m in (full.mixture(), full.dense()))
    experts = [p for name, p in full.mixture().named_parameters() if ".experts." in name]
    active = total - sum(p.numel() for p in experts) * (full.n_experts - full.top_k) // full.n_experts
    assert abs(active - dense - full.n_layers * full.n_experts * full.d_model) < 0.001 * dense
    assert total - active == full.n_layers * (full.n_experts - full.top_k) * 3 * full.d_model * full.d_ff
    assert 2 * total < 25e6  # bytes in bfloat16


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    recipe = mixture.PretrainingRecipe(steps=1000, lr=2.0, warmup=100)
    rates = [recipe.lr_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[100] == 2.0
    assert rates[-1] == pytest.approx(0.2, rel=1e-3) and np.argmax(rates) in (99, 100)
    assert rates[550] == pytest.approx(0.2 + 0.9)


def slow_balance(logits):
    """E Σ_e f_e p_e of one layer, one token after another."""
    sent, mass = np.zeros(SIZE.n_experts), np.zeros(SIZE.n_experts)
    for row in logits.astype(float):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        mass += probabilities / len(logits)
        sent[np.argsort(-probabilities)[: SIZE.top_k]] += 1 / len(logits)
    return SIZE.n_experts * (sent * mass).sum()


def test_every_layer_is_balanced_by_itself():
    """Two layers that are one-sided in opposite ways are no balanced pair, as they are for `transformers`."""
    model, e = SIZE.mixture(), SIZE.n_experts
    one_sided = torch.zeros(6, e)
    one_sided[:, : SIZE.top_k] = 20.0
    output = mixture.MoeCausalLMOutputWithPast(router_logits=(one_sided, one_sided.flip(1)))
    mixture._balance_layers(model, (), output)
    assert float(output.aux_loss) == pytest.approx(2 * e, rel=1e-4)  # twice E Σ 1/k · 1 over the k chosen
    pooled = mixture.load_balancing_loss_func(output.router_logits, e, SIZE.top_k)
    assert float(pooled) == pytest.approx(SIZE.top_k, rel=1e-4)  # as if all were even


def test_a_step_lowers_the_loss_of_its_batch_and_counts_the_balance(corpus, tokenizer):
    recipe = mixture.PretrainingRecipe(steps=50, lr=1e-2, warmup=1)
    run = mixture.Pretraining(SIZE.mixture(), tokenizer, recipe, Kept("mixture", 0))
    ids = mixture.TokenBatches(mixture.paragraphs(tokenizer, corpus), batch_size=4, length=16).batch(0)
    with torch.no_grad():
        out = run.model(ids, output_router_logits=True)
    first = run.update(ids)
    assert first["balance"] == pytest.approx(
        sum(slow_balance(logits.numpy()) for logits in out.router_logits), rel=1e-5
    )
    assert len(out.router_logits) == SIZE.n_layers
    assert first["loss"] == pytest.approx(math.log(300), rel=0.05)
    for run.step in range(1, 20):
        last = run.update(ids)
    assert last["loss"] < first["loss"] - 1


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_numbers(trained, corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "CHECKPOINT_SECONDS", 0.0)
    update, calls = mixture.Pretraining.update, itertools.count(1)

    def dies(self, ids):
        if next(calls) == 5:
            raise Killed
        return update(self, ids)

    monkeypatch.setattr(mixture.Pretraining, "update", dies)
    with pytest.raises(Killed):
        train(SIZE.mixture(), tokenizer, corpus, tmp_path)
    resumed = train(SIZE.mixture(), tokenizer, corpus, tmp_path)
    assert next(calls) == 5 + 2 + 1  # four steps were done and stored, the fifth died, two were left
    whole = trained["mixture"]
    assert resumed.curve == whole.curve and list(resumed.checkpoints) == list(whole.checkpoints) == [0, 2, 6]
    for step in whole.checkpoints:
        ours, theirs = (load_file(run.checkpoints[step] / "model.safetensors") for run in (resumed, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = train(SIZE.mixture(), tokenizer, corpus, tmp_path)  # finished: nothing is trained
    assert next(calls) == 5 + 2 + 2 and again.curve == whole.curve and again.checkpoints == resumed.checkpoints
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    shutil.rmtree(again.checkpoints[2])  # what is gone is made anew, from the start
    anew = train(SIZE.mixture(), tokenizer, corpus, tmp_path)
    assert next(calls) == 5 + 2 + 3 + 6 and anew.checkpoints == resumed.checkpoints and anew.curve == whole.curve
    weights = anew.checkpoints[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .* delete the folder"):
        train(SIZE.mixture(), tokenizer, corpus, tmp_path)
    for state in tmp_path.glob("mixture/*.kept"):
        state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.kept is damaged: .* delete it"):
        train(SIZE.mixture(), tokenizer, corpus, tmp_path)


def test_two_at_once_train_once(trained, corpus, tokenizer, tmp_path, monkeypatch):
    update, calls = mixture.Pretraining.update, itertools.count()

    def counts(self, ids):
        next(calls)
        return update(self, ids)

    monkeypatch.setattr(mixture.Pretraining, "update", counts)
    starts = SIZE.mixture(), SIZE.mixture()
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda model: train(model, tokenizer, corpus, tmp_path), starts))
    assert next(calls) == 6 and runs[0].checkpoints == runs[1].checkpoints
    assert runs[0].curve == runs[1].curve == trained["mixture"].curve


def test_both_are_trained_by_their_own_recipes(corpus, tmp_path):
    recipes = {"mixture": RECIPE, "dense": dataclasses.replace(RECIPE, lr=1e-3)}
    recipes["mixture"] = dataclasses.replace(RECIPE, checkpoints=(1,))
    both = mixture.pretrain_both(SIZE, recipes, corpus, device="cpu", workers=1, cache_dir=tmp_path)
    assert list(both["mixture"].checkpoints) == [1, 6] and list(both["dense"].checkpoints) == [0, 2, 6]
    assert both["mixture"].model.config.model_type == "olmoe" and both["dense"].model.config.model_type == "qwen3"
    alone = mixture.tokenizer(corpus, 300, cache_dir=tmp_path)
    again = mixture.pretrain(SIZE.dense(), alone, corpus, recipes["dense"], device="cpu", cache_dir=tmp_path)
    assert again.checkpoints == both["dense"].checkpoints
    with pytest.raises(ValueError, match=r"recipes=\['twin'\]; allowed: 'mixture', 'dense'"):
        mixture.pretrain_both(SIZE, {"twin": RECIPE}, corpus)


def test_another_seed_or_rate_is_another_run(trained, corpus, tokenizer, tmp_path):
    first = trained["mixture"]
    other = train(SIZE.mixture(seed=1), tokenizer, corpus, first.checkpoints[0].parent.parent)
    assert not set(other.checkpoints.values()) & set(first.checkpoints.values())
    assert first.curve[0]["validation"] == pytest.approx(math.log(300), rel=0.05)
    assert first.curve[-1]["step"] == 6 and {"step", "validation", "loss", "balance"} == set(first.curve[0])


def test_dropout_acts_in_training_and_leaves_no_hook_behind(trained):
    model, ids = SIZE.mixture(), torch.arange(20)[None]
    with torch.no_grad():
        model.eval()
        clean = model(ids).logits
        with mixture._dropout(model, 0.5):
            assert torch.equal(model(ids).logits, clean)
            model.train()
            assert not torch.allclose(model(ids).logits, clean)
        assert torch.allclose(model(ids).logits, clean)


def test_a_loss_that_is_not_finite_is_named(corpus, tokenizer, tmp_path, monkeypatch):
    """Of what it starts from by the first held-out loss, later by the step."""
    model, update = SIZE.mixture(), mixture.Pretraining.update

    def poisoned(self, ids):
        if self.step == 1:
            self.model.model.norm.weight.data.fill_(torch.nan)
        return update(self, ids)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        patch.setattr(mixture.Pretraining, "update", poisoned)
        train(model, tokenizer, corpus, tmp_path, checkpoints=())
    with pytest.raises(ValueError, match="'in training'.* the loss is not finite"):
        train(model, tokenizer, corpus, tmp_path / "again", checkpoints=())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture.PretrainingRecipe(steps=0), "allowed: steps ≥ 1"),
        (lambda: mixture.PretrainingRecipe(steps=1, dropout=1.0), "0 ≤ dropout < 1"),
        (lambda: mixture.Size(d_model=20, n_heads=3), "n_heads=3"),
        (lambda: mixture.Size(n_experts=4, top_k=5), "top_k=5; allowed: 1 to n_experts=4"),
        (lambda: mixture.tokenizer("book-texts", 256), "vocabulary=256 .* at least 257"),
        (lambda: sources.record(sources.FOLDER / "nowhere"), "allowed: a folder written by mixture.ship"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_after_the_end_is_refused_before_training(corpus, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints=\[7\] are not in the run; allowed: 0 to 6"):
        train(SIZE.mixture(), tokenizer, corpus, tmp_path, checkpoints=(0, 7))
    assert not list(tmp_path.iterdir())


# -- held-out loss -----------------------------------------------------------------------------------------------------


def test_every_model_is_judged_on_the_same_bytes(trained, corpus, tokenizer, tmp_path):
    counted = KneserNey(mixture.paragraphs(tokenizer, corpus), vocabulary=300, bos=0, order=3)
    models, reader = {"mixture": trained["mixture"].teacher, "counts": counted}, trained["mixture"].teacher
    tables = {
        name: held_out.held_out_losses(model, corpus, "test", 500, reader=reader) for name, model in models.items()
    }
    a, b = tables.values()
    assert (a[["article", "tokens", "bytes"]] == b[["article", "tokens", "bytes"]]).all(axis=None)
    assert a.tokens.sum() == 500 and a.article.nunique() >= 5
    found = held_out.bits_table(tables, against="counts").set_index(["model", "source"])
    row = found.loc["mixture", "all"]
    bits = a.nats.sum() / a.bytes.sum() / math.log(2)
    assert row.bits == pytest.approx(bits) and row.perplexity == pytest.approx(math.exp(a.nats.sum() / 500))
    assert row.difference == pytest.approx(bits - b.nats.sum() / b.bytes.sum() / math.log(2))
    assert found.loc[("counts", "all"), ["difference", "difference_low", "difference_high"]].eq(0).all()
    with pytest.raises(ValueError, match="n-grams have no tokenizer"):
        held_out.held_out_losses(counted, corpus, "test", 150)
    other = teachers.load(tiny.save(tmp_path, "qwen2"), device="cpu")
    with pytest.raises(ValueError, match="has another tokenizer; allowed: that of reader="):
        held_out.held_out_losses(other, corpus, "test", 150, reader=reader)


def test_an_interval_over_too_few_documents_is_not_given():
    rows = pd.DataFrame({"article": [0, 0, 1], "nats": [3.0, 2.0, 4.0], "bytes": [2, 2, 4]})
    bits, low, high = held_out.bits_per_byte(rows)
    assert bits == pytest.approx(9 / 8 / math.log(2)) and math.isnan(low) and math.isnan(high)


# -- what the router does ----------------------------------------------------------------------------------------------


def routing_by(rule, n=4000, vocabulary=12, n_experts=4, k=2):
    random = np.random.default_rng(0)
    tokens = random.integers(1, vocabulary, n)
    experts = np.stack([rule(tokens, random), rule(tokens, random)], 1)
    return held_out.Routing(tokens, np.repeat(np.arange(n // 10), 10), experts, n_experts)


def test_information_is_all_there_is_where_the_token_decides_and_none_where_it_does_not():
    decided = routing_by(lambda tokens, _: np.stack([tokens % 4, (tokens + 1) % 4], 1))
    expected = []  # entropy of the expert minus one bit, for the draw from two
    for share in decided.load():
        expected.append(-(share * np.log2(share)).sum() - 1)
    assert decided.information().bits.to_list() == pytest.approx(expected, abs=1e-9)
    assert (decided.information(-1).bits < 0.02).all()
    noise = routing_by(lambda tokens, random: random.random((len(tokens), 4)).argsort(1)[:, :2]).information()
    assert (noise.bits > 0).all() and (noise.bits < 2 * noise.shuffled).all()
    assert (decided.information().low > 0.9).all(), "the interval is far from chance, and about the value"
    assert ((noise.low < 0) & (noise.high > 0)).all()


def test_the_token_before_is_taken_from_the_same_piece():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 5, 5000)
    experts = np.roll(tokens, 1)[:, None, None] % 4
    found = held_out.Routing(tokens, np.zeros(5000, int), experts, 4)
    assert found.information(-1).bits[0] == pytest.approx(2, abs=0.01)
    assert found.information(1).bits[0] < 0.01 and found.information(0).bits[0] < 0.01


def test_favourites_are_the_tokens_that_go_to_an_expert_most_often(tokenizer):
    tokens = np.repeat([10, 11, 12], [20, 20, 5])
    experts = np.where(tokens == 10, 1, 0)[:, None, None].copy()
    experts[:5] = 0
    found = held_out.Routing(tokens, np.zeros(45, int), experts, 3).favourites(0, tokenizer, n=1).set_index("expert")
    assert found.tokens[1] == [tokenizer.decode([10])] and found.shares[1] == pytest.approx([0.75])
    assert found.tokens[0] == [tokenizer.decode([11])] and found.shares[0] == pytest.approx([1.0])
    assert found.load.to_list() == pytest.approx([30 / 45, 15 / 45, 0])


def test_routes_are_those_of_the_stored_router(trained, corpus, tokenizer):
    run = trained["mixture"]
    found = held_out.routing(run.teacher, corpus, n_tokens=120)
    assert found.experts.shape == (120, 2, 2) and found.load().sum(1) == pytest.approx([1, 1])
    assert 0 not in found.tokens
    layers = checkpoints.read(run.checkpoints[6])
    seen = {}
    for piece in np.unique(found.pieces)[:3]:
        ids = torch.tensor([[0, *found.tokens[found.pieces == piece]]])
        for n, layer in enumerate(layers):
            x = run.teacher.run_to(n, ids, sites=["mlp_in"])["mlp_in"][0, 1:]
            seen[piece, n] = layer.route(x).indices.numpy()
            assert (seen[piece, n] == found.experts[found.pieces == piece, n]).all()
    with pytest.raises(ValueError, match="has no router"):
        held_out.routing(trained["twin"].teacher, corpus, n_tokens=10)


# -- shipping ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-6, 1e4), st.integers(0, 9))
def test_eight_bits_are_off_by_half_a_scale_at_most(tmp_path_factory, rows, columns, size, seed):
    noise = torch.Generator().manual_seed(seed)
    tensors = {"a": torch.randn(rows, columns, generator=noise) * size, "norm": torch.randn(columns, generator=noise)}
    tensors["a"][0] = 0
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    sources.pack(tensors, path)
    back = sources.unpack(path)
    assert set(back) == set(tensors) and torch.equal(back["norm"], tensors["norm"])
    half = tensors["a"].abs().amax(1, keepdim=True) / 254
    assert ((back["a"] - tensors["a"]).abs() <= half * 1.001).all() and (back["a"][0] == 0).all()


def test_what_is_shipped_has_a_tensor_for_each_expert_and_loads_anywhere(trained, shipped):
    with safe_open(shipped / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
    for layer, expert, part in itertools.product(range(2), range(4), ("up", "gate", "down")):
        assert f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" in names
    assert not (shipped / "kept.json").exists()
    assert "model.layers.0.mlp.gate.weight" in names and not any("gate_up_proj" in name for name in names)

    whole = trained["mixture"].teacher.model
    plain = AutoModelForCausalLM.from_pretrained(shipped, experts_implementation="eager", dtype=torch.float32)
    ids = torch.arange(1, 30)[None]
    assert torch.allclose(plain(ids).logits, whole(ids).logits, atol=0.02)
    assert AutoTokenizer.from_pretrained(shipped)("the ship").input_ids[0] == 0
    assert AutoModelForCausalLM.from_pretrained(shipped / "twin").config.model_type == "qwen3"

    stored = load_file(trained["mixture"].checkpoints[6] / "model.safetensors")
    for n, layer in enumerate(checkpoints.read(shipped)):
        experts = torch.cat(list(layer.weights("w_down")))
        for expert in range(4):
            name = f"model.layers.{n}.mlp.experts.{expert}.down_proj.weight"
            assert torch.equal(experts[expert], stored[name].bfloat16().float())


def test_names_of_the_book_lead_to_folders_of_the_hub(trained, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FOLDER", shipped)
    assert sources.steps() == [0, 2, 6] and sources.record()["note"] == "tiny"
    assert sources.folder("book-moe") == sources.folder("book-moe@6") == shipped
    assert sources.folder("book-twin") == shipped / "twin"
    early = teachers.load("book-moe@2", device="cpu", cache_dir=tmp_path)
    assert early.fingerprint != teachers.load("book-moe", device="cpu").fingerprint
    exact = teachers.load(str(trained["mixture"].checkpoints[2]), device="cpu")
    ids = torch.arange(1, 30)[None]
    assert torch.allclose(early.model(ids).logits, exact.model(ids).logits, atol=0.01)
    assert [layer.layer for layer in checkpoints.read(sources.folder("book-moe@0", cache_dir=tmp_path))] == [0, 1]
    for name in ("book-moe@5", "book-twin@2", "book-gpt"):
        with pytest.raises(ValueError, match=r"STEP of \[0, 2, 6\]"):
            sources.folder(name)
        with pytest.raises(ValueError, match="is not among the shipped models"):
            teachers.load(name)


def test_a_folder_that_could_not_be_written_leaves_the_old_one(shipped, trained, tmp_path, monkeypatch):
    target = mixture.ship(trained["mixture"], trained["twin"], {"n": 1}, tmp_path / "moe")
    monkeypatch.setattr(sources, "pack", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match="moe cannot be written: disk full"):
        mixture.ship(trained["mixture"], trained["twin"], {"n": 2}, tmp_path / "moe")
    assert sources.record(target)["n"] == 1 and [p.name for p in tmp_path.iterdir()] == ["moe"]


@SHIPPED
def test_the_shipped_model_is_small_and_whole():
    sizes = {path: path.stat().st_size for path in sources.FOLDER.rglob("*") if path.is_file()}
    assert sizes[sources.FOLDER / "model.safetensors"] <= 25e6 and sum(sizes.values()) <= 60e6
    assert sum(p.stat().st_size for p in sources.FOLDER.parent.iterdir() if p.is_file()) < 8e6
    config = json.loads((sources.FOLDER / "config.json").read_text())
    assert config["model_type"] == "olmoe" and config["num_experts"] >= 32
    assert config["num_experts_per_tok"] >= 4 and config["num_hidden_layers"] >= 4
    assert sources.steps()[0] == 0 and sources.steps()[-1] == sources.record()["steps"]
    assert len(checkpoints.read(sources.FOLDER)) == config["num_hidden_layers"]


@SHIPPED
def test_the_shipped_model_beats_the_counts_on_held_out_documents():
    rows = {row["model"]: row for row in sources.record()["held_out"] if row["source"] == "all"}
    assert rows["mixture"]["documents"] >= 40 and rows["mixture"]["difference_high"] < 0


@SHIPPED
def test_no_expert_of_the_shipped_model_is_idle_in_any_layer():
    load = held_out.routing(teachers.load("book-moe", device="cpu"), "book-texts", n_tokens=4_000).load()
    assert load.min() * load.shape[1] > 0.5 and load.max() * load.shape[1] < 2


@SHIPPED
def test_the_shipped_tokenizer_was_trained_on_the_book_texts(tmp_path):
    """Trained again, it is the same: the merges are a function of the text."""
    again = mixture.tokenizer("book-texts", 4096, cache_dir=tmp_path).backend_tokenizer
    kept = json.loads((sources.FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(again.to_str())["model"] == kept["model"]
