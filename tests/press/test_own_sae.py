"""Chapter 18 on folders that the real SAELens wrote: every architecture, read as a mixture, with verdicts."""

import json

import matplotlib.pyplot as plt
import pytest

from helpers import settings
from helpers.press import chapters
from tests import tiny
from tests.dictionary.test_saelens import theirs
from tests.press.test_inputs import SMALL, TEXTS, run

SLUG = "18_read_your_sae_as_a_mixture"
ARCHITECTURES = {
    "standard": {}, "topk": {}, "jumprelu": {}, "gated": {}, "transcoder": {}, "skip_transcoder": {},
    "topk rescaled": {"rescale_acts_by_decoder_norm": True}, "half": {"dtype": "bfloat16"},
    "batchtopk": {"training": True}, "matryoshka_batchtopk": {"training": True, "matryoshka_widths": [5, 24]},
}  # fmt: skip
"""With what is asked of SAELens; those of a training are saved for use, and as their checkpoint."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "book.txt").write_text(TEXTS["book.txt"](), encoding="utf-8")
    return {"teacher": tiny.save(folder / "teacher", "llama"), "corpus": str(folder / "book.txt"), "folder": folder}


def read(home, sae, monkeypatch, **given):
    """The records that the chapter writes of a dictionary, and its points."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(settings, "cores", lambda: 1)
    plt.switch_backend("agg")
    (chapter,) = chapters.choose(["18"], chapters.find())
    results, cache = home["folder"] / f"results-{len(list(home['folder'].iterdir()))}", home["folder"] / "cache"
    given = {"sae": str(sae), "teacher": home["teacher"], "layer": 1, "corpus": home["corpus"], "device": "cpu"} | given
    try:
        run(chapter, SMALL[SLUG] | given | {"cache_dir": str(cache), "results_dir": str(results)})
    finally:
        plt.close("all")
    return json.loads((results / f"{SLUG}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_of_saelens_is_read_as_a_mixture(home, tmp_path, monkeypatch, name):
    pytest.importorskip("sae_lens")
    options = {"d": 16, "n": 24, "k": 3, "d_out": 16} | ARCHITECTURES[name]
    model = theirs(name.split()[0].replace("half", "topk"), **options)
    model.save_inference_model(tmp_path) if options.get("training") else model.save_model(tmp_path)
    site = "mlp_in" if "transcoder" in name else "resid_post"
    found = read(home, tmp_path, monkeypatch, site=site)
    of = {(row["claim"], row["metric"]): row for row in found["records"]}
    same = [row for (claim, _), row in of.items() if claim == "reader.mixture"]
    assert len(same) == 2 and {row["verdict"] for row in same} == {"reproduced"}, same
    names = [row["name"] for row in found["points"]["headlines"]]
    assert names == ["tokens", "mean", "offset", "scalar", "zero", "squared", "mean ablation", "zero ablation", "tenth",
                     "held_out"]  # fmt: skip
    claims = [row["claim"] for row in found["points"]["verdicts"]]
    assert claims[:2] == ["One layer under every rule", "Token rules see one token"]
    assert ("A pretrained MLP is nearly a sparse MoE" in claims) == ("transcoder" in name)
    assert all(control["rejected"] for control in found["controls"] if control["claim"] == "reader.mixture")


def test_a_checkpoint_of_their_training_is_read_with_its_own_threshold(home, tmp_path, monkeypatch):
    pytest.importorskip("sae_lens")
    theirs("batchtopk", d=16, n=24, k=3, training=True).save_model(tmp_path)
    found = read(home, tmp_path, monkeypatch)
    assert {row["verdict"] for row in found["records"] if row["claim"] == "reader.mixture"} == {"reproduced"}


def test_the_book_s_own_has_a_counter_and_every_record(home, monkeypatch):
    found = read(home, "book", monkeypatch)
    assert {row["claim"] for row in found["records"]} == {
        "reader.mixture",
        "audit.variance",
        "audit.loss",
        "audit.dead",
    }
    assert found["points"]["headlines"][-1]["name"] == "counter" and found["points"]["counter"]
