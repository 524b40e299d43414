"""Losses belong to their articles, rows come back where they came from, and codes are found in three ways."""

import numpy as np
import pytest
import torch

from helpers.dictionary import expander_sae
from helpers.models import activations
from helpers.models.teachers import Splice
from helpers.parts import language_model
from helpers.parts.language_model import Passage, SiteRows
from helpers.parts.masks import left_regular
from helpers.settings import generator
from tests import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.harvests(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def problem(home):
    return SiteRows(home["folders"], "resid_post", 12, 64)


def test_a_scene_puts_rows_where_they_came_from(home, problem):
    passage = Passage(home["teacher"], home["corpus"], 1, "resid_post", 110, cache_dir=home["cache"])
    scene = passage.scene
    assert scene is passage.scene
    np.testing.assert_allclose(scene.nats(scene.rows), scene.clean, rtol=1e-5)
    store = problem.store("test")
    raw, article = store.tensor("resid_post"), np.array(store.article)
    for number in set(article.tolist()):
        ours = scene.rows[scene.articles == number].sum(0)
        torch.testing.assert_close(ours, raw[article == number].sum(0), rtol=1e-4, atol=1e-3)
    pieces = activations.texts(home["model"], home["corpus"], n_tokens=110, split="test")
    frame = activations.losses(home["model"], pieces, Splice.zero(1, "resid_post"))
    yardstick = scene.yardstick(raw.mean(0))
    np.testing.assert_allclose(yardstick["zero"], frame.groupby("article").nats.sum(), rtol=1e-5)
    frame = activations.losses(home["model"], pieces, Splice.mean(1, "resid_post", raw.mean(0)))
    np.testing.assert_allclose(yardstick["mean"], frame.groupby("article").nats.sum(), rtol=1e-5)
    assert yardstick["clean"] is scene.clean
    with pytest.raises(ValueError, match="as the passage's"):
        scene.nats(scene.rows[:-1])


def test_three_ways_to_code(problem):
    random, rows = generator(0), problem.rows("test")
    mask = left_regular(48, 16, 4, random)
    sae = expander_sae(mask, 16, 5, generator=random, b_dec=problem.mean)
    found = {way: language_model.reconstructions(sae, rows, way, batch_size=16).detach() for way in language_model.WAYS}
    torch.testing.assert_close(found["encoder"], sae(rows).detach())
    codes = sae.encode(rows)
    rest = rows - found["solved"]
    along = torch.einsum("bkm,bm->bk", sae.decoder.vectors()[codes.indices], rest)
    assert along.abs().max() < 1e-3, "least squares leave a residual that is orthogonal to the chosen atoms"
    errors = {way: (rows - guess).square().sum(1) for way, guess in found.items()}
    assert (errors["solved"] <= errors["encoder"] + 1e-4).all()
    assert errors["pursuit"].mean() < errors["encoder"].mean()
