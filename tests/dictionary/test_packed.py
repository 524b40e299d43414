"""Packed rows must be what the dense matrix with zeros is: products, gradients, training, files."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from helpers import dictionary, training
from helpers.dictionary import Packed, Rows, expander_sae, load_packed, save_packed, topk_sae
from helpers.settings import generator
from helpers.training import Shuffled, remedies


def mask(n: int, m: int, q: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return (
        torch.tensor(np.stack([random.choice(m, q, replace=False) for _ in range(n)])) if n else torch.zeros(0, q).int()
    )


def pair(n=12, m=9, q=3, seed=0) -> tuple[Packed, Rows]:
    """Packed rows and the dense rows with the same vectors, both in float64."""
    random = generator(seed)
    weight = torch.randn(n, q, generator=random, dtype=torch.float64)
    bias = torch.randn(n, generator=random, dtype=torch.float64)
    packed = Packed(weight, mask(n, m, q, seed), m, bias)
    dense = np.zeros((n, m))
    for j in range(n):
        for value, row in zip(weight[j].numpy(), packed.rows[j].numpy(), strict=True):
            dense[j, row] = value
    return packed, Rows(torch.tensor(dense), bias.clone())


def small(monkeypatch, tile: int, gather: int, share: float = 0.0) -> None:
    monkeypatch.setattr(dictionary.packed, "TILE_BYTES", tile)
    monkeypatch.setattr(dictionary.packed, "GATHER_SHARE", share)
    monkeypatch.setattr(dictionary.packed, "GATHER_BLOCK", 2 if gather < 1000 else 128)
    monkeypatch.setattr(dictionary.rows, "GATHER_BYTES", gather)


def gradients(rows: Rows, use) -> list[torch.Tensor]:
    """Output of `use(rows, x, values)` and the gradients of its weighted sum; those of the vectors at full width."""
    random = generator(7)
    x = torch.randn(5, rows.width, generator=random, dtype=torch.float64, requires_grad=True)
    values = torch.randn(5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(len(rows), generator=random)[:4] for _ in range(5)])
    output = use(rows, x, values, indices)
    (output * torch.randn(output.shape, generator=random, dtype=torch.float64)).sum().backward()
    told = [output.detach(), x.grad, values.grad, None if rows.bias is None else rows.bias.grad]
    told.append(rows.weight.grad)
    return told


USES = {
    "scores": lambda rows, x, values, indices: rows.scores(x),
    "scores of a few": lambda rows, x, values, indices: rows.scores(x, indices[0]),
    "chosen": lambda rows, x, values, indices: rows.chosen(x, indices),
    "chosen and known": lambda rows, x, values, indices: rows.chosen(
        x, indices, rows.scores(x).detach().gather(1, indices)
    ),
    "combine": lambda rows, x, values, indices: rows.combine(values, indices),
    "vectors": lambda rows, x, values, indices: x @ rows.vectors().T,
    "vectors of a few": lambda rows, x, values, indices: values @ rows.vectors(indices[1]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(("tile", "gather"), [(2**23, 2**26), (3 * 9 * 8, 4 * 3 * 16 * 2), (1, 1)])
def test_every_product_and_gradient_is_the_dense_one(use, tile, gather, share, monkeypatch):
    small(monkeypatch, tile, gather, share)
    packed, dense = pair()
    mine, theirs = gradients(packed, USES[use]), gradients(dense, USES[use])
    theirs[-1] = theirs[-1].gather(1, packed.rows.long())
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 12),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 99),
    tile=st.integers(1, 2000),
    gathers=st.booleans(),
)
def test_packed_is_dense_at_every_shape(n, m, share, seed, tile, gathers):
    q = max(1, round(share * m))
    with pytest.MonkeyPatch.context() as patch:
        small(patch, tile, tile, float(gathers))
        packed, dense = pair(n, m, q, seed)
        x = torch.randn(4, m, generator=generator(seed), dtype=torch.float64)
        torch.testing.assert_close(packed.scores(x), dense.scores(x))
        torch.testing.assert_close(packed.vectors(), dense.vectors())
        torch.testing.assert_close(packed.restrict(dense.vectors(), torch.arange(n)), packed.weight)


@pytest.mark.parametrize("bad", [-1, 12])
def test_indices_outside_are_refused(bad):
    packed, _ = pair()
    x, indices = torch.ones(2, 9, dtype=torch.float64), torch.tensor([[0, 5], [1, bad]])
    for use in (lambda: packed.combine(x[:, :2], indices), lambda: packed.chosen(x, indices)):
        with pytest.raises(ValueError, match=r"indices run from -?\d+ to \d+; allowed: 0 to 11"):
            use()


def test_gradients_agree_with_finite_differences():
    packed, _ = pair(6, 5, 2)
    x = torch.randn(3, 5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, generator=generator(2), dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 3], [5, 1], [2, 3]])
    for use in (lambda x, w: dictionary.packed._PackedScores.apply(x, w, packed.rows),
                lambda x, w: dictionary.packed._PackedDots.apply(x, w, packed.rows, indices, None)):  # fmt: skip
        assert torch.autograd.gradcheck(use, (x, packed.weight))
    sums = lambda v, w: dictionary.packed._PackedSum.apply(v, indices, w, packed.rows, 5)  # noqa: E731
    assert torch.autograd.gradcheck(sums, (values, packed.weight))


@dataclass(frozen=True)
class Masked(remedies.Balance):
    """The released way: a full matrix whose entries outside the mask are held at zero."""

    mask: torch.Tensor

    def loss(self, now):
        now.dictionary.encoder.weight.register_hook(lambda grad: grad * self.mask)
        return 0.0


def twins(balance=lambda: remedies.Balance(), n=24, m=10, q=4, k=3, steps=40):
    """A packed SAE and a dense tied one under a mask, trained on the same rows in float64."""
    packed = expander_sae(mask(n, m, q), m, k, generator=generator(3), dtype=torch.float64)
    dense = topk_sae(m, n, k, generator=generator(4), tied=True, activation="identity", dtype=torch.float64)
    dense.encoder.weight.data = packed.encoder.vectors().detach().clone()
    rows = torch.randn(200, m, generator=generator(5), dtype=torch.float64) * torch.linspace(2, 0.3, m)
    stream = training.Shuffled(rows, batch_size=20, fingerprint="twins")
    held = Masked((packed.encoder.vectors() != 0).double())
    fits = training.fit({"packed": packed, "dense": dense}, stream, steps=steps, lr=1e-2, log_every=1,
                        balance={"packed": balance(), "dense": remedies.Together(held, balance())})  # fmt: skip
    return fits["packed"], fits["dense"]


@pytest.mark.parametrize(
    "balance",
    [remedies.Balance, lambda: remedies.Switch(0.1), lambda: remedies.AuxK(1.0, 3), lambda: remedies.Ghost(1.0, 3)],
)
@pytest.mark.parametrize("q", [3, 4])
def test_training_packed_is_training_under_a_mask(balance, q):
    """By gathering (3 of 10 numbers) and by tiles (4 of 10)."""
    packed, dense = twins(balance, q=q)
    np.testing.assert_allclose(packed.loss, dense.loss, rtol=1e-9)
    torch.testing.assert_close(packed.student.encoder.vectors(), dense.student.encoder.weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(packed.student.b_out, dense.student.b_out, rtol=1e-8, atol=1e-10)


def test_resampled_atoms_keep_their_places_and_unit_length():
    packed, _ = twins(lambda: remedies.Resample(10, toward="residual", power=1.0), n=40, k=1, steps=60)
    atoms = packed.student.encoder
    torch.testing.assert_close(atoms.weight.norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert (atoms.vectors() != 0).sum(1).max() <= 4


def test_nothing_as_large_as_the_dense_matrix_is_kept():
    sae = expander_sae(mask(64, 32, 3), 32, 2, generator=generator(0))
    run = training.Run({"": sae}, training.Shuffled(torch.randn(64, 32), batch_size=16), {"": training.Recipe(4)})
    for step in range(3):
        run.train_step(step)
    assert sae.n_parameters == 64 * 3 + 64 + 32
    state = [t for s in run.optimisers[""].state.values() for t in s.values() if t.numel() > 1]
    assert sum(t.numel() for t in state) == 2 * sae.n_parameters
    assert all(p.grad.shape == p.shape for p in sae.parameters())
    assert sae.encoder.rows.dtype == torch.int16


def test_counts_and_knobs_tell_packed_from_dense():
    sae = expander_sae(mask(20, 16, 5), 16, 3, generator=generator(0))
    assert sae.multiply_adds == 20 * 5 + 3 * 5
    assert sae.knobs["atoms"] == "tied, 5 numbers"
    moe = dictionary.sae_to_moe(sae)
    x = torch.randn(6, 16)
    torch.testing.assert_close(moe(x), sae(x))
    assert moe.knobs["router"] == "shared parameters"


def test_a_signed_topk_may_keep_negative_scores():
    sae = expander_sae(torch.tensor([[0], [1]]), 2, 2, generator=generator(0))
    x = torch.tensor([[-1.0, -2.0]])
    torch.testing.assert_close(sae(x), x)  # both scores negative; a ReLU would return zeros


@pytest.mark.parametrize("selection_bias", [False, True])
def test_a_saved_file_is_as_small_as_its_numbers_and_reads_back(tmp_path, selection_bias):
    sae = expander_sae(mask(50, 40, 4), 40, 3, generator=generator(0), selection_bias=selection_bias)
    if selection_bias:
        sae.selection_bias.normal_()
    path = save_packed(sae, tmp_path / "one" / "sae.safetensors")
    again, x = load_packed(path), torch.randn(7, 40)
    assert torch.equal(again(x), sae(x))
    assert again.knobs == sae.knobs
    numbers = 4 * (50 * 4 + 50 + 40 + 50 * selection_bias) + 2 * 50 * 4
    assert numbers < path.stat().st_size < numbers + 1024
    assert sorted(p.name for p in path.parent.iterdir()) == ["sae.safetensors"]


def test_atoms_of_unequal_degree_use_their_first_places_only(tmp_path):
    rows, degrees = mask(30, 12, 6), torch.arange(30) % 6 + 1
    sae = expander_sae(rows, 12, 3, generator=generator(0), degrees=degrees)
    used = (torch.arange(6) < degrees[:, None]).float()
    data = torch.randn(100, 12, generator=generator(1))
    remedy = remedies.Resample(5, toward="residual")
    training.fit(sae, Shuffled(data, batch_size=20), steps=30, lr=1e-2, balance=remedy)
    assert torch.equal(sae.encoder.weight, sae.encoder.weight * used)
    assert (sae.encoder.weight != 0).sum() == sae.encoder.n_values == degrees.sum()
    assert sae.n_parameters == degrees.sum() + 30 + 12
    torch.testing.assert_close(sae.encoder.weight.norm(dim=1), torch.ones(30))
    path = save_packed(sae, tmp_path / "sae")
    assert path.stat().st_size < (4 + 2) * int(degrees.sum()) + 4 * (30 + 12 + 30) + 1024
    again = load_packed(path)
    assert torch.equal(again.encoder.vectors(), sae.encoder.vectors())
    assert torch.equal(again(data), sae(data))
    with pytest.raises(ValueError, match="degrees=.*allowed: for each row 1 to 6"):
        expander_sae(rows, 12, 3, generator=generator(0), degrees=degrees - 1)


def test_wrong_masks_and_files_are_named(tmp_path):
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"rows has shape \(2, 3\); allowed: \(2, 2\)"):
        Packed(weight, torch.zeros(2, 3).int(), 4)
    with pytest.raises(ValueError, match=r"rows lie in 0 … 4; allowed: 0 … width - 1 = 3"):
        Packed(weight, torch.tensor([[0, 1], [2, 4]]), 4)
    with pytest.raises(ValueError, match="distinct places"):
        Packed(weight, torch.tensor([[0, 1], [2, 2]]), 4)
    with pytest.raises(ValueError, match="k=3 cannot be chosen"):
        expander_sae(torch.tensor([[0], [1]]), 2, 3, generator=generator(0))
    with pytest.raises(ValueError, match="no expander SAE"):
        save_packed(topk_sae(4, 8, 2, generator=generator(0)), tmp_path / "x")
    with pytest.raises(ValueError, match="none.* cannot be read"):
        load_packed(tmp_path / "none")
    path = save_packed(expander_sae(mask(9, 5, 2), 5, 2, generator=generator(0)), tmp_path / "good")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="good.* cannot be read"):
        load_packed(path)


def test_large_widths_number_their_places_by_four_bytes():
    rows = torch.tensor([[0, 40_000]])
    atoms = Packed(torch.ones(1, 2), rows, 40_001)
    assert atoms.rows.dtype == torch.int32
    assert torch.equal(atoms.rows.long(), rows)


def test_a_copy_is_independent():
    sae = expander_sae(mask(6, 5, 2), 5, 2, generator=generator(0))
    other = copy.deepcopy(sae)
    other.encoder.weight.data.zero_()
    assert F.normalize(sae.encoder.weight, dim=1).norm() > 0


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_unused_numbers_of_every_role_stay_zero_in_training(tied, unit_norm):
    rows, degrees = mask(20, 9, 4), torch.arange(20) % 4 + 1
    roles = [Packed(torch.randn(20, 4, generator=generator(i)), rows, 9, degrees=degrees) for i in range(3)]
    encoder, decoder, router = roles[:1] * 3 if tied else roles
    sae = dictionary.RankOneDictionary(encoder, decoder, k=3, router=router, gate="softmax", unit_norm=unit_norm)
    training.fit(sae, Shuffled(torch.randn(64, 9, generator=generator(5)), batch_size=16), steps=20, lr=1e-2)
    unused = torch.arange(4) >= degrees[:, None]
    for role in (encoder, decoder, router):
        assert not role.weight[unused].any() and role.weight[~unused].all()
