"""The explorer's records against slow NumPy, its files read back, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from helpers import dictionary
from helpers.models import activations
from helpers.models.activations import ActivationStore
from helpers.parts import audit, explorer, latents, lens
from helpers.settings import ROOT
from helpers.training.loop import Fit
from tests import tiny
from tests.parts.test_inside import scene as mixture  # noqa: F401

N, K, LAYER = 24, 3, 1


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tiny teacher, harvested; a random SAE with a dead latent on its rows; and the view of them."""
    cache = tmp_path_factory.mktemp("explorer")
    found = tiny.harvests(cache)
    store = ActivationStore(found["folders"]["train"], ("resid_post",), found["model"].tokenizer)
    rows = store.tensor("resid_post")
    sae = dictionary.topk_sae(16, N, K, generator=torch.Generator().manual_seed(0), b_dec=rows.mean(0))
    with torch.no_grad():
        sae.encoder.bias[5] = -1e4
    shown = latents.Dictionary.of_sae(sae, rows)
    about = {"name": "tiny", "unit": "latent", "teacher": "t", "layer": LAYER, "site": "resid_post", "corpus": "c"}
    documents = explorer.documents(found["corpus"], "train", store.article.tolist())
    view = latents.View(shown, store, about, documents, latents.promoted(found["model"], shown.writes, 4))
    return found | {"store": store, "sae": sae, "view": view, "cache_dir": cache}


@pytest.fixture(scope="module")
def dense(scene):
    """All codes, one by one: of each row the K largest pre-activations, where they are positive."""
    sae, rows = scene["sae"], scene["store"].tensor("resid_post").numpy()
    weight, bias, centre = (t.detach().numpy() for t in (sae.encoder.weight, sae.encoder.bias, sae.b_out))
    codes = np.zeros((len(rows), N))
    for i, row in enumerate(rows):
        scores = weight @ (row - centre) + bias
        for j in np.argsort(-scores)[:K]:
            codes[i, j] = max(scores[j], 0)
    return codes


def test_rates_and_largest_activations(scene, dense):
    shown = scene["view"].dictionary
    assert shown.counts.tolist() == [int((dense[:, j] > 0).sum()) for j in range(N)]
    assert np.allclose(shown.largest, dense.max(0), rtol=1e-5)
    assert shown.counts[5] == 0 and shown.largest[5] == 0 and len(scene["view"].rows[5]) == 0


def test_contexts_are_the_strongest_of_different_pieces(scene, dense):
    text, several = scene["store"].rows["text"], 0
    for j in range(N):
        best = {}
        for row, value in enumerate(dense[:, j]):
            if value > 0 and value > best.get(text[row], (0, 0))[0]:
                best[text[row]] = (value, row)
        wanted = [row for value, row in sorted(best.values(), key=lambda each: (-each[0], each[1]))]
        assert scene["view"].rows[j].tolist() == wanted[: latents.CONTEXTS]
        several += len(wanted) > latents.CONTEXTS
    assert several, "some latent has more pieces than are shown"


def test_codes_of_either_sign_are_ranked_by_their_size():
    codes = dictionary.SparseCodes(torch.tensor([[0], [0], [1], [0]]), torch.tensor([[1.0], [-3.0], [0.0], [2.0]]))
    shown = latents.Dictionary(latents.sparse(codes, 2), torch.eye(2), torch.eye(2))
    assert shown.strongest(0, np.array([0, 0, 1, 1])).tolist() == [1, 3]
    assert shown.largest.tolist() == [3, 0] and shown.counts.tolist() == [3, 0]


def test_load_over_places(scene, dense):
    store = scene["store"]
    place = latents.places(store)
    bounds = [0, 1, 2, 4, 8, 16, 32]
    for row, position in enumerate(store.position - store.position.min()):
        assert bounds[place[row]] <= position and (place[row] == 0 or position < 2 * bounds[place[row]])
    found = scene["view"].dictionary.by_place(place)
    for j in range(N):
        for where in range(place.max() + 1):
            assert found[j, where] == sum(dense[row, j] > 0 for row in range(store.n) if place[row] == where)


def test_neighbours(scene):
    vectors = scene["sae"].decoder.weight.detach().numpy().astype(float)
    others, cosines = latents.nearest(torch.from_numpy(vectors), 3)
    for j in range(N):
        all_of = {
            i: v @ vectors[j] / np.linalg.norm(v) / np.linalg.norm(vectors[j]) for i, v in enumerate(vectors) if i != j
        }
        wanted = sorted(all_of, key=all_of.get, reverse=True)[:3]
        assert others[j].tolist() == wanted
        assert np.allclose(cosines[j], [all_of[i] for i in wanted], atol=1e-6)


def test_words_that_a_latent_promotes(scene):
    model = scene["model"].model
    norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings().weight.numpy().astype(float)
    for j, vector in enumerate(scene["view"].dictionary.writes.numpy().astype(float)):
        long = vector * len(vector) ** 0.5
        normed = (long - long.mean()) / np.sqrt(long.var() + norm.eps) * norm.weight.numpy() + norm.bias.numpy()
        logits = head @ normed
        for name, order in (("promoted", np.argsort(-logits)), ("suppressed", np.argsort(logits))):
            ids, values = (each[j] for each in scene["view"].logits[name])
            assert ids.tolist() == order[:4].tolist()
            assert np.allclose(values, logits[order[:4]], atol=1e-4)


def read(path):
    """The data of a file as a page has it, and the name it goes by."""
    first, _, rest = path.read_text(encoding="utf-8").partition("=\n")
    return first.strip().removeprefix('window.explorer.data["').removesuffix('"]'), json.loads(rest.removesuffix(";\n"))


def test_the_file_says_the_same(scene, dense, tmp_path):
    view, store = scene["view"], scene["store"]
    name, page = read(explorer.write(tmp_path / "tiny.js", explorer.page(view)))
    assert name == page["about"]["name"] == "tiny"
    tokens = store.tokenizer.convert_ids_to_tokens(store.token_id.tolist())
    assert [page["tokens"][i].strip() for i in page["text"]] == tokens
    assert page["counts"] == view.dictionary.counts.tolist() and np.sum(page["places"]) == store.n
    starts = [row for row in range(store.n) if row == 0 or store.rows["text"][row] != store.rows["text"][row - 1]]
    assert page["starts"] == starts
    titles = [page["documents"][i][0] for i in page["document"]]
    assert titles == [f"document {store.article[row]}" for row in starts]
    for j in range(N):
        assert [context[0] for context in page["contexts"][j]] == view.rows[j].tolist()
        for row, *pairs in page["contexts"][j]:
            piece = np.flatnonzero(store.rows["text"] == store.rows["text"][row])
            window = [t for t in piece if row - latents.BEFORE <= t <= row + latents.AFTER]
            fires = [t for t in window if dense[t, j] > 0]
            assert [row + off for off in pairs[::2]] == fires
            shades = np.array(pairs[1::2]) / explorer.SHADES * dense[:, j].max()
            assert np.abs(shades - dense[fires, j]).max() <= dense[:, j].max() / explorer.SHADES
            assert min(pairs[1::2]) >= 1
    ids = view.logits["promoted"][0]
    words = [[page["tokens"][i].strip() for i in some] for some in page["promoted"]]
    named = [store.tokenizer.convert_ids_to_tokens(some) for some in ids.tolist()]
    assert words == [[word or "" for word in some] for some in named], "a row without a word has an empty one"
    others, cosines = latents.nearest(view.dictionary.reads)
    assert [some[::2] for some in page["reads"]] == others.tolist()
    assert np.allclose([some[1::2] for some in page["reads"]], 100 * cosines, atol=0.51)


FIELDS = """feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices
correlated_features_l1 correlated_features_pearson neg_str neg_values pos_str pos_values frac_nonzero
freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_heights logits_hist_data_bar_values
n_prompts_total n_tokens_in_prompt dataset activations decoder_weights_dist""".split()  # noqa: SIM905
"""Of SAEDashboard's `NeuronpediaDashboardFeature`."""


def test_saedashboard_finds_its_fields(scene, dense):
    batch = json.loads(json.dumps(explorer.neuronpedia(scene["view"]), default=np.ndarray.tolist, allow_nan=False))
    assert {"model_id": "t", "layer": LAYER, "sae_set": "tiny"}.items() <= batch.items()
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(N))
    for j, feature in enumerate(batch["features"]):
        assert sorted(feature) == sorted(FIELDS)
        assert feature["frac_nonzero"] == (dense[:, j] > 0).mean()
        assert sum(feature["freq_hist_data_bar_heights"]) == (dense[:, j] > 0).sum()
        assert len(feature["pos_str"]) == len(feature["neg_values"]) == 4
        for each in feature["activations"]:
            assert len(each["tokens"]) == len(each["values"])
            assert each["values"][each["qualifying_token_index"]] == max(each["values"]) <= each["bin_max"] + 1e-3


def test_the_experts_of_a_mixture(mixture, tmp_path, monkeypatch):  # noqa: F811
    teacher, corpus, bench = mixture
    monkeypatch.setenv("RANK1_CACHE", str(corpus.parent))
    monkeypatch.setattr(explorer, "FITTING", bench.fitting.n)
    asked = ["--experts", "--teacher", teacher.name, "--layer", "1", "--name", "moe", "--corpus", str(corpus)]
    asked += ["--split", "validation", "--tokens", str(bench.judging.n), "--to", str(tmp_path)]
    assert explorer.main([*asked, "--export", "neuronpedia"]) == 0
    name, page = read(tmp_path / "moe-1.js")
    assert name == "moe-1" and (tmp_path / "moe-1" / "batch-0.json").is_file()
    assert page["about"]["unit"] == "expert" and page["about"]["n"] == len(page["counts"]) == 6
    assert page["about"]["k"] == 2 and "--experts" in page["about"]["command"]
    assert sum(page["counts"]) == 2 * page["about"]["n_tokens"] == 2 * bench.judging.n
    weights = bench.choice().to_dense(6).numpy()
    assert np.allclose(page["largest"], weights.max(0), rtol=1e-3)
    assert [contexts[0][0] for contexts in page["contexts"]] == weights.argmax(0).tolist()
    logits = lens.lens(teacher, lens.oriented(bench))
    known = latents.words(teacher.tokenizer, logits.argmax(1).tolist())
    assert [page["tokens"][some[0]] for some in page["promoted"]] == known
    cosines = torch.nn.functional.normalize(bench.moe.router, dim=1)
    cosines = cosines @ cosines.T - 2 * torch.eye(6)
    assert [some[0] for some in page["reads"]] == cosines.argmax(1).tolist()


# -- what is refused ---------------------------------------------------------------------------------------------------


def asked(scene, tmp_path, monkeypatch, *more, sae=None):
    monkeypatch.setenv("RANK1_CACHE", str(scene["cache_dir"]))
    usual = {"--teacher": scene["teacher"], "--layer": str(LAYER), "--corpus": scene["corpus"], "--name": "mine"}
    usual |= {"--sae": str(sae), "--tokens": "90", "--split": "validation", "--to": str(tmp_path / "to")}
    usual |= dict(zip(more[::2], more[1::2], strict=True))
    return explorer.main([part for pair in usual.items() for part in pair])


def saved(folder, width):
    random = torch.Generator().manual_seed(1)
    return dictionary.save_saelens(dictionary.topk_sae(width, 8, 2, generator=random), folder)


def test_an_sae_of_a_folder(scene, tmp_path, monkeypatch):
    assert asked(scene, tmp_path, monkeypatch, "--site", "mlp_in", sae=saved(tmp_path / "sae", 16)) == 0
    _, page = read(tmp_path / "to" / "mine.js")
    assert page["about"]["n_tokens"] == 90 and page["about"]["lens"].startswith("mlp_in is what the MLP reads")
    assert "promoted" not in page and page["about"]["note"] == ""


def test_an_sae_that_is_trained(scene, tmp_path, monkeypatch):
    sizes = ["--features", "20", "--k", "2", "--steps", "3", "--train-tokens", "600"]
    assert asked(scene, tmp_path, monkeypatch, *sizes, sae="book") == 0
    _, page = read(tmp_path / "to" / "mine.js")
    assert page["about"]["n"] == 20 and page["about"]["k"] == 2 and sum(page["counts"]) <= 2 * 90


def test_the_trained_sae_reads_rows_as_the_model_has_them(scene, monkeypatch):
    book = audit.Book(scene["corpus"], 1, "resid_post", 600, 20, 2, 3, 1e-2)
    monkeypatch.setattr(audit, "trained", lambda *_, **__: Fit(scaled, silent=torch.zeros(20)))
    random = torch.Generator().manual_seed(2)
    scaled = dictionary.topk_sae(16, 20, 2, generator=random, b_dec=torch.randn(16, generator=random))
    with torch.no_grad():
        scaled.encoder.bias.copy_(torch.randn(20, generator=random))
    x = torch.randn(50, 16, generator=random)
    before = scaled(x)
    scale = scene["store"].moments("resid_post").variance ** 0.5
    assert abs(scale - 1) > 0.1
    sae = book.train(scene["model"], cache_dir=scene["cache_dir"])
    assert torch.allclose(sae(scale * x), scale * before, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--name", "a/b"), "name='a/b'; allowed: letters"),
        (("--layer", "7"), "layer=7 is not in teacher"),
        (("--device", "abacus"), "device='abacus' is not a device"),
        (("--tokens", "0"), "n_tokens=0 is no text"),
        (("--corpus", "nowhere.txt"), "corpus='nowhere.txt': there is no such file"),
        (("--teacher", "nobody"), "teacher='nobody' is unknown"),
    ],
)
def test_bad_questions_are_answered(scene, tmp_path, monkeypatch, capsys, more, says):
    assert asked(scene, tmp_path, monkeypatch, *more, sae=saved(tmp_path / "sae", 16)) == 2
    assert says in capsys.readouterr().err and not list((tmp_path / "to").glob("*.js"))


def test_bad_saes_are_refused_before_anything_is_read(scene, tmp_path, monkeypatch, capsys):
    def refused(sae):
        assert asked(scene, tmp_path, monkeypatch, sae=sae) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(activations, "harvest", lambda *_, **__: pytest.fail("rows were harvested"))
    assert "there is no such file or folder; allowed: a folder" in refused(tmp_path / "none")
    assert "reads 12 numbers; allowed: 16, as resid_post of layer 1" in refused(saved(tmp_path / "narrow", 12))
    damaged = saved(tmp_path / "damaged", 16)
    weights = damaged / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "damaged" in refused(damaged)
    (tmp_path / "file").write_bytes(b"no dictionary")
    assert "cannot be read" in refused(tmp_path / "file")


def test_weights_that_are_no_numbers_are_refused(scene):
    sae = dictionary.topk_sae(16, 8, 2, generator=torch.Generator())
    with torch.no_grad():
        sae.decoder.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite; allowed: numbers"):
        latents.Dictionary.of_sae(sae, scene["store"].tensor("resid_post"))


# -- what is committed -------------------------------------------------------------------------------------------------


def test_the_committed_data_is_small_and_whole():
    files = sorted((ROOT / "book" / "explorer").glob("*.js"))
    assert sum(path.stat().st_size for path in files) <= 6e6
    pages = dict(map(read, files))
    assert all(name == path.stem for name, path in zip(pages, files, strict=True))
    experts = [page for page in pages.values() if page["about"]["teacher"] == "book-moe"]
    assert sum(page["about"]["n"] for page in experts) == 4 * 32
    sae = pages["smollm2"]
    assert sae["about"]["teacher"] == "smollm2-135m" and sae["about"]["n"] >= 500
    assert sum(count > 0 for count in sae["counts"]) >= 500
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in pages.values():
        assert page["about"]["corpus"] == "book-texts" and page["about"]["note"]
        command = page["about"]["command"].removeprefix("python -m helpers.parts.explorer --to book/explorer ")
        assert f"$(EXPLORE) {command}\n" in make
