"""Sparse sources and worlds of features: slow draws, closed-form moments, what fires with what, bad parameters."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from helpers import kept, settings
from helpers.parts import known_truth, worlds
from helpers.parts.worlds import SparseSource, World, random_atoms, zipf_rates
from tests.reference.worlds_numpy import expected


def source(**changes):
    atoms = random_atoms(24, 10, settings.generator(0), torch.float64)
    return SparseSource(atoms, **{"k": 3, **changes})


@pytest.mark.parametrize("coefficients", ["signs", "gaussian"])
def test_rows_are_the_sum_of_their_codes(coefficients):
    given = source(coefficients=coefficients, energy=2.0)
    codes = given.codes(50, settings.generator(1))
    slow = torch.stack(
        [
            sum(v * given.atoms[i] for v, i in zip(*row, strict=True))
            for row in zip(codes.values, codes.indices, strict=True)
        ]
    )
    torch.testing.assert_close(given.rows(codes, settings.generator(2)), slow)
    assert all(len(set(row.tolist())) == 3 for row in codes.indices)


@pytest.mark.parametrize("changes", [{}, {"coefficients": "signs"}, {"noise": 0.3}, {"energy": 4.0, "k": 1}])
def test_covariance_is_the_closed_form(changes):
    given = source(**changes)
    x = given.sample(200_000, settings.generator(3))
    torch.testing.assert_close(x.T @ x / len(x), given.moments.cov, atol=0.02, rtol=0)
    torch.testing.assert_close(x.mean(0), torch.zeros(10, dtype=torch.float64), atol=0.01, rtol=0)


def test_whitened_has_identity_covariance_and_the_same_codes():
    white = source(noise=0.5).whitened()
    torch.testing.assert_close(white.moments.cov, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(
        white.codes(5, settings.generator(4)).values, source().codes(5, settings.generator(4)).values
    )


def test_atoms_that_do_not_span_cannot_be_whitened():
    with pytest.raises(ValueError, match="allowed: atoms that span all 10"):
        SparseSource(random_atoms(4, 10, settings.generator(0)), 2).whitened()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 25}, "k=25"),
        ({"k": 0}, "k=0"),
        ({"coefficients": "x"}, "coefficients='x'"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"energy": 0.0}, "energy=0.0"),
    ],
)
def test_bad_parameters_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        source(**changes)


# -- a world of features -----------------------------------------------------------------------------------------------

PLAIN = {"active": 5.0, "zipf": 0.8, "group_size": 6}
WORLDS = {
    "independent": PLAIN,
    "correlated": PLAIN | {"correlation": 0.6},
    "hierarchical": PLAIN | {"hierarchy": 0.5},
    "both": PLAIN | {"correlation": 0.6, "hierarchy": 0.5},
}


def a_world(seed=0, n_true=36, d=8, **more):
    return World(n_true, d, seed=seed, **more)


def firings(source, n, parts=4):
    """Which features fire in n samples, as float64."""
    return torch.cat([source.codes(n // parts, settings.generator(i + 1)) > 0 for i in range(parts)]).double()


@pytest.mark.parametrize("name", WORLDS)
def test_marginal_rates_are_exact(name):
    n, source = 200_000, a_world(**WORLDS[name])
    z = (firings(source, n).mean(0) - source.rates) / (source.rates * (1 - source.rates) / n).sqrt()
    assert z.abs().max() < 4.5


@pytest.mark.parametrize("name", ["hierarchical", "both"])
def test_children_fire_only_with_their_parents(name):
    source = a_world(**WORLDS[name])
    child = (source.parents >= 0).nonzero()[:, 0]
    above = source.parents[child]
    assert 0.3 * 36 < len(child) <= 18
    assert (source.parents[above] == -1).all()
    assert (source.rates[above] > source.rates[child]).all()
    assert (source.groups[above] != source.groups[child]).all()
    fires = firings(source, 20_000).bool()
    assert not (fires[:, child] & ~fires[:, above]).any()
    with_parent = [fires[fires[:, p], c].double().mean() for c, p in zip(child, above, strict=True)]
    expected = (source.rates[child] / source.rates[above]).tolist()
    assert max(abs(a - b) for a, b in zip(with_parent, expected, strict=True)) < 0.1


def test_groups_fire_together_and_not_with_others():
    source = a_world(**WORLDS["correlated"])
    assert torch.bincount(source.groups).tolist() == [6] * 6
    together = np.corrcoef(firings(source, 200_000).numpy().T)
    same = (source.groups[:, None] == source.groups).numpy()
    pairs = ~np.eye(36, dtype=bool)
    assert together[same & pairs].min() > 0.1
    assert np.abs(together[~same]).max() < 5 / math.sqrt(200_000)
    alone = np.corrcoef(firings(a_world(**PLAIN), 200_000).numpy().T)
    assert np.abs(alone[pairs]).max() < 5 / math.sqrt(200_000)


@pytest.mark.parametrize("magnitudes", worlds.MAGNITUDES)
def test_magnitudes_are_positive_with_mean_one(magnitudes):
    law = worlds.MAGNITUDES[magnitudes]
    drawn = law(torch.zeros(400_000, dtype=torch.float64), settings.generator(0))
    assert drawn.min() > 0
    assert float(drawn.mean()) == pytest.approx(1, abs=5 * float(drawn.std()) / 400_000**0.5)
    spread = {
        "constant": 0,
        "exponential": 1,
        "halfnormal": (math.pi / 2 - 1) ** 0.5,
        "lognormal": math.expm1(0.25) ** 0.5,
    }
    assert float(drawn.std()) == pytest.approx(spread[magnitudes], rel=0.02)
    source = a_world(active=3.0, magnitudes=magnitudes)
    codes = source.codes(4000, settings.generator(1))
    assert float(codes[codes > 0].mean()) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("magnitudes", ["exponential", "constant"])
def test_expected_is_the_mean_of_the_samples(magnitudes):
    source = a_world(**WORLDS["both"], magnitudes=magnitudes, mean=3.0, noise=0.2)
    n = 200_000
    x = source.sample(n, settings.generator(5)).double()
    z = (x.mean(0) - expected(source)) / (x.std(0) / n**0.5)
    assert z.abs().max() < 4.5
    assert float(source.constant.norm()) == pytest.approx(3.0, rel=1e-5)


def test_rows_are_mean_plus_codes_times_atoms_plus_noise():
    source = a_world(mean=2.0)
    codes = source.codes(20, settings.generator(1))
    slow = [source.constant + sum(code[j] * source.atoms[j] for j in range(36)) for code in codes]
    torch.testing.assert_close(source.rows(codes, settings.generator(2)), torch.stack(slow), atol=1e-5, rtol=1e-5)
    noise = replace(source, noise=0.5).rows(codes.repeat(500, 1), settings.generator(2)) - torch.stack(slow).repeat(
        500, 1
    )
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(source.atoms.norm(dim=1), torch.ones(36))


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 400),
    share=st.floats(0.01, 1.0),
    exponent=st.floats(0, 3),
    cap=st.floats(0.05, 1.0),
)
def test_zipf_rates_sum_to_active_under_the_cap_by_a_power_law(n, share, exponent, cap):
    active = share * cap * n
    rates = zipf_rates(n, active, exponent, cap)
    assert float(rates.sum()) == pytest.approx(active, rel=1e-6)
    assert rates.dtype == torch.float64
    assert rates.min() > 0 and rates.max() <= cap
    assert (rates.diff() <= 0).all()
    free = (rates < cap).nonzero()[:, 0]
    if len(free) > 1:
        first = int(free[0])
        law = ((free + 1).double() / (first + 1)) ** -exponent
        np.testing.assert_allclose(rates[free] / rates[first], law, rtol=1e-9)


def test_zipf_rates_without_exponent_or_cap():
    assert zipf_rates(10, 2.0, 0.0).tolist() == pytest.approx([0.2] * 10)
    assert zipf_rates(3, 1.1, 1.0, cap=1.0).tolist() == pytest.approx([0.6, 0.3, 0.2])
    assert zipf_rates(3, 1.1, 1.0, cap=0.5).tolist() == pytest.approx([0.5, 0.36, 0.24])


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    more = WORLDS["both"] | {"mean": 1.0}
    one, same, other = a_world(0, **more), a_world(0, **more), a_world(1, **more)
    for part in ("atoms", "groups", "parents", "constant"):
        assert torch.equal(getattr(one, part), getattr(same, part))
        assert not torch.equal(getattr(one, part), getattr(other, part))
    assert one == same != other and hash(one) == hash(same)
    draws = [source.sample(5, settings.generator(seed)) for source, seed in ((one, 3), (same, 3), (one, 4))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_worlds_name_holds_every_parameter():
    source = a_world(hierarchy=0.5)
    changed = [
        {"n_true": 37},
        {"d": 9},
        {"active": 5.0},
        {"zipf": 0.8},
        {"group_size": 6},
        {"correlation": 0.1},
        {"hierarchy": 0.4},
        {"magnitudes": "constant"},
        {"noise": 0.1},
        {"mean": 1.0},
        {"seed": 3},
    ]
    assert len({str(replace(source, **change)) for change in changed} | {str(source)}) == len(changed) + 1
    assert {name for change in changed for name in change} == {each.name for each in fields(World) if each.init}


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    n_true=st.integers(1, 30),
    d=st.integers(1, 9),
    share=st.floats(0.05, 1.0),
    zipf=st.floats(0, 2),
    group_size=st.integers(1, 12),
    correlation=st.floats(0, 0.95),
    hierarchy=st.floats(0, 0.95),
    magnitudes=st.sampled_from(sorted(worlds.MAGNITUDES)),
    noise=st.sampled_from([0.0, 0.3]),
    mean=st.sampled_from([0.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_any_world_is_sound(n_true, d, share, seed, **more):
    source = World(n_true, d, active=share * 0.5 * n_true, seed=seed, **more)
    codes = source.codes(64, settings.generator(seed + 1))
    x = source.sample(64, settings.generator(seed + 1))
    assert codes.shape == (64, n_true) and x.shape == (64, d)
    assert x.isfinite().all() and (codes >= 0).all()
    children = (source.parents >= 0).nonzero()[:, 0]
    assert not ((codes[:, children] > 0) & (codes[:, source.parents[children]] == 0)).any()
    assert (source.parents[source.parents[children]] == -1).all()
    assert len(children) <= round(more["hierarchy"] * n_true)
    assert torch.bincount(source.groups).max() <= more["group_size"]
    assert float(source.rates.sum()) == pytest.approx(share * 0.5 * n_true, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_true": 0}, "n_true=0"),
        ({"d": 0}, "d=0"),
        ({"group_size": 0}, "group_size=0"),
        ({"correlation": 1.0}, "correlation=1.0"),
        ({"correlation": -0.1}, "correlation=-0.1"),
        ({"hierarchy": 1.0}, "hierarchy=1.0"),
        ({"hierarchy": -0.5}, "hierarchy=-0.5"),
        ({"magnitudes": "x"}, "magnitudes='x'.*exponential"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"mean": -1.0}, "mean=-1.0"),
        ({"zipf": -0.5}, "zipf=-0.5"),
        ({"active": 0.0}, "active=0.0"),
        ({"active": 18.1}, "active=18.1.*18 = 0.5·n_true"),
    ],
)
def test_a_bad_world_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        a_world(**changes)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_density_of_a_noisy_source_is_that_of_its_mixture(k):
    noise = settings.generator(3)
    source = SparseSource(random_atoms(5, 3, noise, torch.float64), k, energy=2.0, noise=0.4)
    x, parts = source.sample(300, noise), []
    for support in itertools.combinations(range(5), k):
        atoms = source.atoms[list(support)]
        covariance = 0.16 * torch.eye(3, dtype=torch.float64) + 2.0 / k * atoms.T @ atoms
        parts.append(torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x))
    slow = torch.logsumexp(torch.stack(parts), 0) - math.log(len(parts))
    torch.testing.assert_close(source.log_density(x), slow, rtol=1e-12, atol=1e-12)


def test_a_whitened_noisy_source_has_covariance_one_and_is_gaussian_with_all_its_atoms():
    noise = settings.generator(4)
    atoms = random_atoms(6, 4, noise, torch.float64)
    for k in (1, 6):
        source = SparseSource(atoms, k).whitened(0.3)
        torch.testing.assert_close(source.moments.cov, torch.eye(4).double(), rtol=0, atol=1e-12)
    x = source.sample(50, noise)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(source.log_density(x), standard, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "wrong", [{"noise": 0.0}, {"noise": 0.1, "coefficients": "signs"}, {"noise": 0.1, "k": 20}], ids=str
)
def test_a_density_that_cannot_be_summed_is_refused(wrong):
    source = SparseSource(random_atoms(60, 8, settings.generator(0)), **{"k": 2} | wrong)
    with pytest.raises(ValueError, match="allowed: noise above 0, 'gaussian', up to 20,000 supports"):
        source.log_density(torch.zeros(1, 8))


def test_noise_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="noise=1.0; allowed: 0 or more, and below 1"):
        SparseSource(random_atoms(6, 4, settings.generator(0)), 2).whitened(1.0)


# -- the external benchmark --------------------------------------------------------------------------------------------


def small_bench(**changes):
    pytest.importorskip("sae_lens")
    return worlds.SynthSaeBench(**{"n_true": 256, "d": 24} | changes)


def test_atoms_are_made_orthogonal_as_the_benchmark_makes_them():
    theirs = pytest.importorskip("sae_lens.synthetic").orthogonalize_embeddings
    atoms = random_atoms(200, 24, settings.generator(0))
    wanted = theirs(atoms, num_steps=100, lr=3e-4, chunk_size=64)
    found = worlds.orthogonalised(atoms)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (wanted - atoms).abs().max() > 1e-2  # the steps matter
    assert (worlds.orthogonalised(atoms, steps=50) - wanted).abs().max() > 1e-3


def test_a_benchmark_world_is_the_librarys_model_and_its_samples_repeat():
    world, before = small_bench(), torch.random.get_rng_state()
    model = worlds._synth_sae_bench(world)
    torch.testing.assert_close(world.atoms.norm(dim=1), torch.ones(256))
    x = world.sample(1_500, settings.generator(1))
    torch.testing.assert_close(x, world.sample(1_500, settings.generator(1)))
    assert x.shape == (1_500, 24) and (x[:1024] - x[476:]).abs().max() > 1  # the parts are drawn one after another
    assert not torch.equal(x, world.sample(1_500, settings.generator(2)))
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    rows, codes = model.sample_with_features(4_000)
    torch.testing.assert_close(rows, codes @ world.atoms + model.feature_dict.bias, atol=1e-4, rtol=1e-4)
    declared = model.cfg.firing_probability.generate(256, seed=42)
    assert declared.max() <= 0.4 and declared.min() >= 5e-4
    fires, nodes, inner = codes > 0, list(model.hierarchy.roots), 0
    for node in nodes:  # a child fires with its parent only, and one of them at most
        children = [child.feature_index for child in node.children]
        nodes += node.children
        inner += bool(children)
        assert not (fires[:, children].any(1) & ~fires[:, node.feature_index]).any()
        assert not children or fires[:, children].sum(1).max() <= 1
    assert (inner, len(nodes)) == (2 * (1 + 4 + 16), 2 * (1 + 4 + 16 + 64))  # two trees, three deep
    assert not torch.equal(replace(world, seed=1).atoms, world.atoms)


@pytest.mark.parametrize(("changes", "allowed"), [({"n_true": 100}, "multiple of 128"), ({"d": 0}, "at least 1")])
def test_sizes_that_the_benchmark_cannot_have_are_refused(changes, allowed):
    with pytest.raises(ValueError, match=allowed):
        worlds.SynthSaeBench(**changes)


def test_a_benchmark_world_without_its_library_is_refused_at_once_and_its_version_is_in_every_key(monkeypatch):
    now = small_bench()
    monkeypatch.setattr(worlds, "version", lambda name: "0.0.1")
    other = small_bench()
    assert str(now) != str(other) and kept.described(now) != kept.described(other)
    monkeypatch.setattr(worlds, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="without sae-lens; allowed: `pip install"):
        worlds.SynthSaeBench()


def test_a_student_learns_the_benchmark_in_a_contest():
    problem = known_truth.KnownTruth(small_bench(), 64, 4, steps=30, batch_size=64, n_rows=500)
    some = {4: [known_truth.Candidate("none", 0.0, 1e-2, True), known_truth.Candidate("switch", 0.1, 1e-2, True)]}
    frame = known_truth.contest(problem, some, [0, 1], workers=1, cache_dir=False)
    assert len(frame) == 4 and frame.fvu.between(0.05, 1).all() and frame.mcc.between(0, 0.25).all()
