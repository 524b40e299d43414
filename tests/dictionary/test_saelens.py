"""Exchange with the real SAELens: for each of its architectures the same outputs and feature activations, both ways."""

import dataclasses
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers import dictionary
from helpers.dictionary import RankOneDictionary, Rows, Select
from helpers.dictionary.files import ARCHITECTURES
from helpers.settings import generator

sae_lens = pytest.importorskip("sae_lens")

EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}
IN_USE = sorted(set(ARCHITECTURES) - {"batchtopk", "matryoshka_batchtopk"})


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def theirs(architecture, *, d=6, n=20, d_out=4, k=4, seed=0, dtype="float32", training=False, **more):
    """One of theirs with random numbers everywhere."""
    from sae_lens.registry import get_sae_class, get_sae_training_class

    find = get_sae_training_class if training else get_sae_class
    kind, config = find(architecture)
    fields = {field.name for field in dataclasses.fields(config)}
    given = {"d_in": d, "d_sae": n, "d_out": d_out, "k": k, "dtype": dtype} | more
    if "transcoder" in architecture:
        given["apply_b_dec_to_input"] = False
    model = kind(config(**{name: value for name, value in given.items() if name in fields}))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(random(*parameter.shape, seed=seed + 100 + i) * (0.3 if "W" in name else 1.0))
        if hasattr(model, "threshold"):
            model.threshold.abs_()
        if hasattr(model, "topk_threshold"):
            model.topk_threshold.fill_(0.3)
    return model.eval()


def agree(ours, model, x, within=None):
    """Outputs and dense feature activations, relative to the largest entry."""
    with torch.no_grad():
        pairs = [(ours(x), model(x)), (ours.encode(x).to_dense(ours.n_features), model.encode(x))]
    for one, other in pairs:
        size = other.abs().max().clamp_min(1)
        torch.testing.assert_close(one / size, other / size, rtol=0, atol=within or EXACT[x.dtype])


# -- they write, we read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", IN_USE)
@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 9), n=st.integers(1, 30), rows=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_what_they_write_is_the_same_function(tmp_path_factory, architecture, d, n, rows, seed, data):
    options = {"d": d, "n": n, "k": data.draw(st.integers(1, n)), "d_out": data.draw(st.integers(1, 9)), "seed": seed}
    options |= {"dtype": data.draw(st.sampled_from(["float32", "float64"]))}
    model = theirs(architecture, **options, apply_b_dec_to_input=data.draw(st.booleans()))
    folder = tmp_path_factory.mktemp("sae")
    model.save_model(folder)
    ours = dictionary.load_saelens(folder)
    assert isinstance(ours, RankOneDictionary)
    agree(ours, model, random(rows, d, seed=seed + 1, dtype=model.dtype))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("before", [True, False])
def test_choosing_by_the_length_of_decoder_rows_is_folded_exactly(tmp_path, architecture, dtype, before):
    options = {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": before, "dtype": dtype}
    model = theirs(architecture, **options)
    model.save_model(tmp_path)
    ours = dictionary.load_saelens(tmp_path)
    agree(ours, model, random(50, 6, dtype=model.dtype))
    assert ours.unit_norm


@pytest.mark.parametrize("architecture", IN_USE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_every_number(tmp_path, architecture, dtype):
    model = theirs(architecture, dtype=dtype)
    model.save_model(tmp_path)
    ours, x = dictionary.load_saelens(tmp_path), random(30, 6, dtype=model.dtype)
    held = dict(model.named_parameters())
    assert ours.decoder.weight.dtype == model.dtype and torch.equal(ours.decoder.weight, held["W_dec"])
    assert torch.equal(ours.router.vectors().T, held["W_enc"]) and torch.equal(ours.b_out, held["b_dec"])
    assert ours(x).dtype == model.dtype
    assert torch.equal(ours.double().router.bias.detach(), held.get("b_enc", held.get("b_gate")).double())
    agree(ours, model.to(torch.float64), x.double(), within=1e-12)
    dictionary.save_saelens(dictionary.load_saelens(tmp_path), tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again/sae_weights.safetensors").items():
        assert torch.equal(tensor, held[name]), name


def test_a_rescaled_file_in_half_precision_is_read_in_float32(tmp_path):
    model = theirs("topk", dtype="bfloat16", rescale_acts_by_decoder_norm=True)
    model.save_model(tmp_path)
    ours, x = dictionary.load_saelens(tmp_path), random(40, 6, dtype=torch.float32)
    agree(ours, model.to(torch.float32), x)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batchtopk_is_read_from_a_checkpoint_and_as_they_save_it_for_use(tmp_path, architecture, rescale):
    more = {"matryoshka_widths": [5, 20], "rescale_acts_by_decoder_norm": rescale, "dtype": "float64"}
    model = theirs(architecture, training=True, **more)
    model.save_inference_model(tmp_path / "use")
    model.save_model(tmp_path / "checkpoint")
    wanted, x = sae_lens.SAE.load_from_disk(tmp_path / "use"), random(60, 6)
    for folder in ("use", "checkpoint"):
        ours = dictionary.load_saelens(tmp_path / folder)
        agree(ours, wanted, x)
        assert ours.k == 4
    assert ours.select.rule == "batch" and 0 < wanted.encode(x).count_nonzero() < 60 * 20


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_checkpoints_of_their_training_are_read(tmp_path, architecture):
    model = theirs(architecture, training=True, dtype="float64", rescale_acts_by_decoder_norm=True)
    model.save_model(tmp_path / "checkpoint")
    model.save_inference_model(tmp_path / "use")
    wanted = sae_lens.SAE.load_from_disk(tmp_path / "use")
    agree(dictionary.load_saelens(tmp_path / "checkpoint"), wanted, random(60, 6))


@pytest.mark.parametrize("level", ["nothing", "everything"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "jumprelu_skip_transcoder"])
def test_thresholds_that_choose_nothing_and_everything(tmp_path, architecture, level):
    model, x = theirs(architecture, dtype="float64"), random(12, 6)
    with torch.no_grad():
        for name in ("b_enc", "b_gate", "b_mag"):
            if getattr(model, name, None) is not None:
                getattr(model, name).fill_(50.0 if level == "everything" else -50.0)
        if hasattr(model, "threshold"):
            model.threshold.fill_(-1.0 if level == "everything" else torch.inf)
    model.save_model(tmp_path)
    ours = dictionary.load_saelens(tmp_path)
    agree(ours, model, x)
    assert ours.encode(x).fires.sum() == (12 * 20 if level == "everything" else 0)


@pytest.mark.parametrize("architecture", IN_USE)
def test_scores_at_their_threshold_and_equal_ones(tmp_path, architecture):
    """All scores are 0, as are thresholds: what is chosen of equal ones may differ, the output may not."""
    model = theirs(architecture, dtype="float64")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("b_", "threshold")):
                parameter.zero_()
    model.save_model(tmp_path)
    agree(dictionary.load_saelens(tmp_path), model, torch.zeros(3, 6, dtype=torch.float64))


# -- inputs that were normalised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_what_stands_beside_a_checkpoint_goes_into_the_weights(tmp_path, architecture, before, kind):
    from sae_lens.training.activation_scaler import ActivationScaler

    model = theirs(architecture, dtype="float64", apply_b_dec_to_input=before, normalize_activations=kind)
    model.save_model(tmp_path)
    scaler, x = ActivationScaler(), 3 + 7 * random(200, 6)
    batches = iter([x] * 2)
    if kind == "covariance_whitening":
        scaler.estimate_whitening(6, batches, 2)
    else:
        scaler.estimate_scaling_factor(6, batches, 2)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    ours = dictionary.load_saelens(tmp_path)
    with torch.no_grad():
        wanted = scaler.unscale(model(scaler(x)))
        torch.testing.assert_close(ours(x), wanted, rtol=1e-9, atol=1e-9)
        acts = model.encode(scaler(x))
    torch.testing.assert_close(ours.encode(x).to_dense(20), acts, rtol=1e-9, atol=1e-9)
    if kind == "covariance_whitening":
        whitening = scaler.whitening
        model.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    else:
        model.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        (tmp_path / "activation_scaler.json").unlink()
        agree(dictionary.load_saelens(tmp_path, norm_factor=scaler.scaling_factor), model, x, within=1e-9)
    agree(ours, model, x, within=1e-9)


def test_a_rescaled_batchtopk_with_a_factor(tmp_path):
    more = {"normalize_activations": "expected_average_only_in", "dtype": "float64"}
    model, x = theirs("batchtopk", training=True, rescale_acts_by_decoder_norm=True, **more), 5 * random(60, 6)
    model.save_model(tmp_path / "checkpoint")
    model.fold_activation_norm_scaling_factor(0.2)
    model.save_inference_model(tmp_path / "use")
    ours = dictionary.load_saelens(tmp_path / "checkpoint", norm_factor=0.2)
    with torch.no_grad():
        wanted = sae_lens.SAE.load_from_disk(tmp_path / "use")(x)
        torch.testing.assert_close(ours(x), wanted, rtol=1e-10, atol=1e-10)
    assert 0 < ours.encode(x).fires.sum() < 60 * 20


# -- we write, they read -----------------------------------------------------------------------------------------------


def ours_of(rule, *, d=6, d_out=6, n=20, k=4, seed=0, dtype=torch.float64, before="b_out", skip=False, gated=False):
    select = Select(rule, n)
    if rule in ("threshold", "batch"):
        select.threshold.data = random(n, seed=seed + 5, dtype=dtype).abs()[: select.threshold.numel()]
        select.threshold.data = select.threshold.data.view(() if rule == "batch" else (n,))
    rows = Rows(random(n, d, seed=seed, dtype=dtype), random(n, seed=seed + 1, dtype=dtype))
    b_out = torch.nn.Parameter(random(d_out, seed=seed + 2, dtype=dtype))
    encoder = rows
    if gated:
        own = (0.3 * random(n, seed=seed + 7, dtype=dtype), random(n, seed=seed + 8, dtype=dtype))
        encoder = dictionary.Scaled(rows, *own)
    b_in = {"b_out": b_out, "own": random(d, seed=seed + 3, dtype=dtype), None: None}[before]
    shared = torch.nn.Linear(d, d_out, bias=False, dtype=dtype) if skip else None
    how = {"activation": "identity" if rule == "magnitude" else "relu", "select": select, "shared": shared}
    decoder = Rows(random(n, d_out, seed=seed + 4, dtype=dtype))
    return RankOneDictionary(encoder, decoder, k=k, router=rows, b_in=b_in, b_out=b_out, **how).eval()


MEMBERS = {
    "topk": {"rule": "token"},
    "abstopk": {"rule": "magnitude"},
    "standard": {"rule": "positive"},
    "gated": {"rule": "positive", "gated": True},
    "jumprelu": {"rule": "threshold"},
    "jumprelu, of BatchTopK": {"rule": "batch"},
    "transcoder": {"rule": "positive", "d_out": 4, "before": None},
    "skip_transcoder": {"rule": "positive", "skip": True, "before": None},
    "jumprelu_transcoder": {"rule": "threshold", "d_out": 3, "before": None},
    "jumprelu_skip_transcoder": {"rule": "batch", "d_out": 5, "skip": True, "before": "own"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", ["b_out", "own", None])
@pytest.mark.parametrize("name", MEMBERS)
def test_they_read_what_we_write_and_we_read_it_again(tmp_path, name, before, dtype):
    how = MEMBERS[name]
    if before == "b_out" and how.get("d_out", 6) != 6:
        before = "own"
    ours = ours_of(**how | {"before": before}, dtype=dtype)
    x = random(40, 6, seed=9, dtype=dtype)
    folder = dictionary.save_saelens(ours, tmp_path / "ours", {"hook_name": "blocks.3.hook_mlp_in"})
    model = sae_lens.SAE.load_from_disk(folder)
    assert model.cfg.architecture() == name.split(",")[0] and model.cfg.metadata.hook_name == "blocks.3.hook_mlp_in"
    within = 100 * torch.finfo(dtype).eps if before == "own" else None
    agree(ours, model, x, within)
    model.save_model(tmp_path / "theirs")
    again = [dictionary.load_saelens(tmp_path / folder) for folder in ("ours", "theirs")]
    for back in again:
        agree(back, model, x)
    assert again[0].k == ours.k
    kept = [load_file(tmp_path / folder / "sae_weights.safetensors") for folder in ("ours", "theirs")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in set(kept[0]) | set(kept[1]))
    dictionary.save_saelens(again[0], tmp_path / "twice")
    twice = load_file(tmp_path / "twice/sae_weights.safetensors")
    assert all(torch.equal(kept[0][name], twice[name]) for name in set(kept[0]) | set(twice))


def test_parameters_come_back_and_so_does_what_is_trained_on(tmp_path):
    """Bit for bit; and a dictionary that was read goes on training."""
    from helpers.training import Shuffled, fit

    ours = dictionary.topk_sae(6, 20, 4, generator=generator(0))
    dictionary.save_saelens(ours, tmp_path)
    back = dictionary.load_saelens(tmp_path)
    for (name, one), other in zip(ours.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    rows = random(400, 6, dtype=torch.float32)
    losses = [fit(model, Shuffled(rows, batch_size=100), steps=30).loss for model in (ours, back)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


# -- what cannot be ----------------------------------------------------------------------------------------------------


def change_config(**change):
    def act(folder):
        config = json.loads((folder / "cfg.json").read_text()) | change
        (folder / "cfg.json").write_text(json.dumps(config))

    return act


def change_tensors(drop=(), **change):
    def act(folder):
        tensors = load_file(folder / "sae_weights.safetensors") | change
        save_file({name: t for name, t in tensors.items() if name not in drop}, folder / "sae_weights.safetensors")

    return act


def truncate(name, to):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])


def test_folders_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no cfg.json"):
        dictionary.load_saelens(tmp_path)
    with pytest.raises(ValueError, match="has no cfg.json"):
        dictionary.load_saelens(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "has no sae_weights.safetensors"),
        (truncate("sae_weights.safetensors", 100), "is damaged"),
        (truncate("sae_weights.safetensors", -1), "is damaged"),
        (truncate("cfg.json", 40), "is damaged"),
        (change_config(architecture="temporal"), "architecture='temporal' in .*cfg.json.*'gated'"),
        (change_config(architecture="matching_pursuit"), "architecture='matching_pursuit'"),
        (change_config(architecture=["topk"]), r"architecture=\['topk'\]"),
        (change_config(architecture="gated"), "holds .*allowed with 'gated': .*'r_mag'"),
        (change_config(normalize_activations="layer_norm"), "normalize_activations='layer_norm'"),
        (change_config(normalize_activations="constant_norm_rescale"), "constant_norm_rescale.*'none'"),
        (change_config(normalize_activations="expected_average_only_in"), "activation_scaler.json, or norm_factor"),
        (change_config(normalize_activations="covariance_whitening"), "with activation_whitening.safetensors"),
        (change_config(reshape_activations="heads"), "reshape_activations='heads'"),
        (change_config(activation_fn="tanh-relu"), "activation_fn='tanh-relu'"),
        (change_config(dtype="int8"), "dtype='int8'.*'bfloat16'"),
        (change_config(k=21), "k=21.*1 to d_sae=20"),
        (change_config(k=0), "k=0"),
        (change_config(k="many"), "k='many'"),
        (change_config(k=2.5), "k=2.5"),
        (change_config(d_in=7), "W_.* in .*sae_weights.safetensors is .*float32.*; allowed: .*7"),
        (change_config(d_sae=10**15), "10{15}"),
        (change_tensors(drop=["b_enc"]), "holds .*allowed with 'topk': .*'b_enc'"),
        (change_tensors(W_skip=torch.zeros(6, 6)), "'W_skip'.*allowed with 'topk'"),
        (change_tensors(b_dec=torch.full((6,), torch.nan)), "b_dec in .* not a number"),
        (change_tensors(b_enc=torch.full((20,), torch.inf)), "b_enc in .* infinite"),
        (change_tensors(b_dec=torch.zeros(6, dtype=torch.int64)), "b_dec in .*int64"),
        (change_tensors(scaling_factor=torch.full((20,), 2.0)), "'scaling_factor'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    dictionary.save_saelens(dictionary.topk_sae(6, 20, 4, generator=generator(0)), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        dictionary.load_saelens(tmp_path)


@pytest.mark.parametrize("factor", [0.0, -1.0, torch.inf, torch.nan])
def test_factors_that_cannot_be_are_named(tmp_path, factor):
    dictionary.save_saelens(dictionary.topk_sae(6, 20, 4, generator=generator(0)), tmp_path)
    for other in (factor, 2.0):  # with normalize_activations="none" none can be
        with pytest.raises(ValueError, match=f"norm_factor={other}"):
            dictionary.load_saelens(tmp_path, norm_factor=other)
    change_config(normalize_activations="expected_average_only_in")(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    for how in ({}, {"norm_factor": factor}):
        with pytest.raises(ValueError, match=f"not with norm_factor={factor}"):
            dictionary.load_saelens(tmp_path, **how)


def test_a_whitening_that_does_not_fit_is_named(tmp_path):
    dictionary.save_saelens(dictionary.topk_sae(6, 20, 4, generator=generator(0)), tmp_path)
    change_config(normalize_activations="covariance_whitening")(tmp_path)
    for d, names in ((5, ("mean", "matrix", "inverse_matrix")), (6, ("mean", "matrix"))):
        held = {name: torch.eye(d)[0] if name == "mean" else torch.eye(d) for name in names}
        save_file({name: part.clone() for name, part in held.items()}, tmp_path / "activation_whitening.safetensors")
        with pytest.raises(ValueError, match="with activation_whitening.safetensors"):
            dictionary.load_saelens(tmp_path)


@pytest.mark.parametrize(("details", "k"), [({"k": 3}, 3), ({"target_l0": 2.4}, 2), ({"k": 99}, 20), ("none", 20)])
def test_where_the_rule_leaves_the_number_open_metadata_may_say_it(tmp_path, details, k):
    theirs("jumprelu").save_model(tmp_path)
    change_config(metadata={"training_architecture_details": details, "sae_lens_version": "6.54.12"})(tmp_path)
    assert dictionary.load_saelens(tmp_path).k == k


def untied():
    return RankOneDictionary(Rows(random(20, 6)), Rows(random(20, 6)), k=4, router=Rows(random(20, 6)))


def low_rank():
    return RankOneDictionary(Rows(random(20, 2), down=random(2, 6)), Rows(random(20, 6)), k=4)


def sae(**options):
    return dictionary.topk_sae(6, 20, 4, generator=generator(0), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (untied, "router='dense'"),
        (low_rank, "low-rank rows=.'encoder', 'router'."),
        (lambda: sae(activation="gelu"), "activation='gelu'"),
        (lambda: sae(activation="identity"), "activation='identity'"),
        (lambda: sae(selection_bias=True), "selection_bias=True"),
        (lambda: sae(select=Select("atom")), "select='atom'.*'token'"),
        (lambda: sae(select=Select("groups", n_groups=4, groups=2)), "select='groups'"),
        (lambda: sae(select=Select("always", always=2)), "select='always'"),
        (lambda: dictionary.sae_to_moe(sae(select=Select("positive"))), "router='shared parameters'"),
        (lambda: ours_of("token", d_out=4, before=None), "architecture='topk transcoder'"),
        (lambda: ours_of("positive", gated=True, skip=True), "architecture='gated skip_transcoder'"),
        (lambda: dictionary.dense_mlp(6, 6, 3, generator=generator(0)), "atoms='none'"),
        (lambda: dictionary.secret_moe(6, 6, 20, 4, generator=generator(0)), "router='dense'"),
    ],
)
def test_what_they_have_no_name_for_is_refused_before_a_file_is_written(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        dictionary.save_saelens(make(), tmp_path / "no")
    assert not (tmp_path / "no").exists()


# -- old files, and names on a hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old",
    [
        {},
        {"activation_fn_str": "relu", "hook_point": "blocks.0.hook_mlp_out", "normalize_activations": False},
        {
            "activation_fn": "topk",
            "activation_fn_kwargs": {"k": 3},
            "architecture": "standard",
            "dtype": "torch.float64",
        },
        {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    ],
)
def test_files_from_before_version_6(tmp_path, old):
    config = {"d_in": 6, "d_sae": 20, "dtype": "float64", "finetuning_scaling_factor": False} | old
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = {"W_enc": random(6, 20), "W_dec": random(20, 6), "b_enc": random(20), "b_dec": random(6)}
    tensors |= {"threshold": random(20).abs()} if "architecture" in old and old["architecture"] == "jumprelu" else {}
    save_file(tensors | {"scaling_factor": torch.ones(20)}, tmp_path / "sae_weights.safetensors")
    agree(dictionary.load_saelens(tmp_path), sae_lens.SAE.load_from_disk(tmp_path), random(30, 6))


def test_heads_side_by_side(tmp_path):
    model = theirs("standard", reshape_activations="hook_z", dtype="float64")
    model.save_model(tmp_path)
    x = random(10, 2, 3)
    wanted = model(x)
    torch.testing.assert_close(dictionary.load_saelens(tmp_path)(x.flatten(1)), wanted.flatten(1))


def test_a_name_on_a_hub_goes_to_sae_lens_itself(monkeypatch):
    """Without a network: what it hands over is read, and what it cannot load is named."""
    model, asked = theirs("jumprelu", dtype="float64"), []

    def stand_in(release, own):
        asked.append((release, own))
        if release == "unknown":
            raise ValueError(f"Release {release} not found")
        return model

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", stand_in)
    agree(dictionary.load_saelens("gemma-scope-2-270m-pt-res:layer_9/width_16k"), model, random(20, 6))
    assert asked == [("gemma-scope-2-270m-pt-res", "layer_9/width_16k")]
    with pytest.raises(ValueError, match="unknown:any.*not found"):
        dictionary.load_saelens("unknown:any")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ValueError, match="needs the package sae-lens"):
        dictionary.load_saelens("gemma-scope-2-270m-pt-res:layer_9/width_16k")


def test_a_decoder_may_have_rows_of_zeros(tmp_path):
    """A dead latent, choosing by |d_j|·z_j: it adds nothing."""
    sae = dictionary.topk_sae(6, 12, 10, generator=generator(0))
    with torch.no_grad():
        sae.decoder.weight.mul_(torch.arange(12)[:, None])
    dictionary.save_saelens(sae, tmp_path)
    change_config(rescale_acts_by_decoder_norm=True)(tmp_path)
    read = dictionary.load_saelens(tmp_path)
    x = random(30, 6).float()
    z = (sae.encoder.scores(x - sae.b_in)).clamp_min(0).detach()
    chosen = torch.zeros_like(z).scatter(1, (z * torch.arange(12)).topk(10).indices, 1)
    expected = (chosen * z) @ sae.decoder.weight + sae.b_out
    torch.testing.assert_close(read(x), expected, rtol=1e-5, atol=1e-5)
    assert read.unit_norm and not read.decoder.weight[0].any()
