"""Block by block gives what the whole model gives, goes on where it stopped, and holds one block at a time."""

import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2MoeConfig

from helpers import kept
from helpers.models import activations, checkpoints, layerwise, sources, teachers
from helpers.models.layerwise import Layerwise
from tests import tiny
from tests.models import test_checkpoints as built
from tests.reference import deepseek_numpy

MOES = ["olmoe", "mixtral", "qwen2", "qwen3"]  # as tests.test_checkpoints builds them; its qwen2 has a dense layer
DENSE = ["llama", "qwen2", "qwen3"]  # as tests.tiny does
DEEPSEEK = dict(
    model_type="deepseek",
    architectures=["DeepseekForCausalLM"],
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    vocab_size=64,
    hidden_size=16,
    intermediate_size=20,
    moe_intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    n_routed_experts=7,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    norm_topk_prob=False,
    scoring_func="softmax",
    hidden_act="silu",
    rms_norm_eps=1e-2,
    rope_theta=50.0,
    rope_scaling=None,
    attention_bias=False,
    max_position_embeddings=64,
    pretraining_tp=1,
    bos_token_id=2,
    eos_token_id=1,
    aux_loss_alpha=0.001,
    seq_aux=True,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
"""The hub's config.json of DeepSeek-MoE-16B, every name of it, at other sizes."""


def deepseek_tensors(config: dict = DEEPSEEK, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under their names on the hub."""
    generator, d = torch.Generator().manual_seed(seed), config["hidden_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (64, d), "model.norm.weight": (d,), "lm_head.weight": (64, d)}

    def mlp(prefix: str, width: int) -> dict:
        return {f"{prefix}.{part}_proj.weight": (width, d) for part in ("gate", "up")} | {
            f"{prefix}.down_proj.weight": (d, width)
        }

    for n in range(config["num_hidden_layers"]):
        p, width = f"model.layers.{n}.", config["moe_intermediate_size"]
        shapes |= {f"{p}{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        shapes |= {f"{p}self_attn.{name}_proj.weight": (d if name in "qo" else kv, d) for name in "qkvo"}
        if n < config["first_k_dense_replace"] or n % config["moe_layer_freq"]:
            shapes |= mlp(f"{p}mlp", config["intermediate_size"])
            continue
        shapes |= {f"{p}mlp.gate.weight": (config["n_routed_experts"], d)}
        shapes |= mlp(f"{p}mlp.shared_experts", width * config["n_shared_experts"])
        for e in range(config["n_routed_experts"]):
            shapes |= mlp(f"{p}mlp.experts.{e}", width)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_deepseek(folder: Path, config: dict = DEEPSEEK, tensors: dict | None = None) -> str:
    built.shard(folder, tensors or deepseek_tensors(config), config, shards=5)
    tiny.tokenizer(True).save_pretrained(folder)
    return str(folder)


def save(name: str, folder: Path, **options) -> str:
    if name == "deepseek":
        return save_deepseek(folder)
    if name.startswith("dense "):
        return tiny.save(folder, name.removeprefix("dense "))
    built.save(name, folder, d_ff=12, **options)
    tiny.tokenizer(True).save_pretrained(folder)
    return str(folder)


def load(folder: str, **options) -> Layerwise:
    return layerwise.load(folder, device="cpu", **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(activations, "BLOCK", 8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "my.txt"
    file.write_text(tiny.text(80))
    return str(file)


@pytest.fixture
def harvest(corpus, tmp_path):
    def run(teacher, **options):
        options = {"layer": 1, "n_tokens": 300, "max_length": 16, "batch_size": 4, "cache_dir": tmp_path} | options
        return activations.harvest(teacher, corpus, **options)

    return run


@pytest.fixture
def filled(monkeypatch):
    """The blocks that were read, in order; None is the embedding."""
    blocks, fill = [], Layerwise._fill
    monkeypatch.setattr(Layerwise, "_fill", lambda self, module, n: blocks.append(n) or fill(self, module, n))
    return blocks


# -- the numbers -------------------------------------------------------------------------------------------------------


CASES = [(name, original) for name in MOES for original in (True, False)] + [(f"dense {name}", True) for name in DENSE]


@pytest.mark.parametrize(("name", "original"), CASES)  # experts' names as on the hub, or fused
def test_store_is_that_of_the_whole_model(name, original, harvest, tmp_path):
    folder = save(name, tmp_path / "model", save_original_format=original)
    whole, block_by_block = teachers.load(folder, device="cpu"), load(folder)
    for layer in (1, 2):
        theirs, ours = (harvest(t, layer=layer, sites=teachers.SITES) for t in (whole, block_by_block))
        assert theirs.folder != ours.folder and np.array_equal(theirs.rows, ours.rows)
        for site in teachers.SITES:
            torch.testing.assert_close(ours.tensor(site), theirs.tensor(site), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek", "dense qwen3"])
def test_prefixes_that_wrappers_put_into_names_are_understood(name, wrapper, harvest, tmp_path):
    folder = save(name, tmp_path / "model")
    expected = harvest(load(folder), layer=2)
    tiny.rename(folder, tiny.WRAPPERS[wrapper])
    found = harvest(load(folder), layer=2)
    assert found.folder != expected.folder
    for site in found.sites:
        assert np.array_equal(found[site], expected[site])


def test_a_token_without_an_embedding_is_named_before_a_block_is_read(harvest, filled, tmp_path):
    folder = Path(save("mixtral", tmp_path / "model"))
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["vocab"]["bread"] = 64
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"token 64 \('bread'\) has no row in its embedding; allowed: 0 to 63"):
        harvest(load(str(folder)), layer=2)
    assert not filled and not between(tmp_path)


def test_deepseek_is_the_slow_reference(harvest, tmp_path):
    teacher = load(save_deepseek(tmp_path / "model"))
    tensors = {name: tensor.numpy() for name, tensor in deepseek_tensors().items()}
    stores = [harvest(teacher, layer=n, sites=teachers.SITES) for n in range(4)]
    texts = stores[0].rows["text"]
    for text in np.unique(texts)[:6]:
        ids = [2, *stores[0].token_id[texts == text].tolist()]
        for store, expected in zip(stores, deepseek_numpy.forward(tensors, DEEPSEEK, ids), strict=True):
            for site in teachers.SITES:
                np.testing.assert_allclose(store[site][texts == text], expected[site][1:], rtol=1e-4, atol=2e-5)


def test_deepseek_is_a_qwen2_moe_whose_shared_experts_gate_is_a_half(harvest, tmp_path):
    """σ(0) = 1/2: with a gate of zeros and twice W_down, transformers' own class computes the same."""
    same = "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads"
    same += " num_key_value_heads num_experts_per_tok norm_topk_prob rms_norm_eps rope_theta max_position_embeddings"
    config = Qwen2MoeConfig(
        **{name: DEEPSEEK[name] for name in same.split()},
        num_experts=7,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        qkv_bias=False,
    )
    tensors = {}
    for name, tensor in deepseek_tensors().items():
        shared_down = name.endswith("shared_experts.down_proj.weight")
        tensors[name.replace("shared_experts", "shared_expert")] = 2 * tensor if shared_down else tensor
    tensors |= {f"model.layers.{n}.mlp.shared_expert_gate.weight": torch.zeros(1, 16) for n in (1, 2, 3)}
    folder = save_deepseek(tmp_path / "qwen", config.to_dict(), tensors)
    qwen = teachers.load(folder, device="cpu")
    deepseek = load(save_deepseek(tmp_path / "deepseek"))
    for site in teachers.SITES:
        ours, theirs = (harvest(t, layer=3, sites=[site]).tensor(site) for t in (deepseek, qwen))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_some_layers_of_deepseek_may_be_dense(harvest, tmp_path):
    config = DEEPSEEK | dict(moe_layer_freq=2, first_k_dense_replace=2)
    teacher, tensors = load(save_deepseek(tmp_path / "model", config)), deepseek_tensors(config)
    store = harvest(teacher, layer=3, n_tokens=10)
    ids = [2, *store.token_id[store.rows["text"] == 0].tolist()]
    expected = deepseek_numpy.forward({name: t.numpy() for name, t in tensors.items()}, config, ids)[3]["mlp_out"]
    np.testing.assert_allclose(store["mlp_out"][: len(expected) - 1], expected[1:], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_between_blocks_nothing_is_rounded(dtype, harvest, tmp_path):
    folder = save("olmoe", tmp_path / "model")
    whole, ours = teachers.load(folder, device="cpu", dtype=dtype), load(folder, dtype=dtype)
    whole.model.set_experts_implementation("eager")
    stores = [harvest(t, layer=2, sites=["mlp_out"]).tensor("mlp_out") for t in (whole, ours)]
    torch.testing.assert_close(*stores, rtol=0, atol=0)


def test_one_batch_as_any_teacher(tmp_path):
    folder = save("olmoe", tmp_path / "model")
    whole, ours = teachers.load(folder, device="cpu"), load(folder)
    ids = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for site, expected in whole.run_to(2, ids, mask, teachers.SITES).items():
        found = ours.run_to(2, ids, mask, [site])[site]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert (ours.n_layers, ours.d_model, ours.adds_bos, ours.dtype) == (3, 16, True, torch.float32)


def test_deepseek_needs_no_code_from_the_hub_and_has_its_bos(tmp_path):
    folder = Path(save_deepseek(tmp_path / "model"))
    file = folder / "tokenizer.json"
    tokens = json.loads(file.read_text())
    tokens["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    tokens["post_processor"]["use_regex"] = True  # as on the hub, where tokenizer_config.json asks for BOS
    file.write_text(json.dumps(tokens))
    file = folder / "tokenizer_config.json"
    told = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    teacher = load(str(folder))
    assert teacher.adds_bos and teacher.tokenizer("a river").input_ids == [2, 4, 5]
    assert teacher.tokenizer("a river", add_special_tokens=False).input_ids == [4, 5]


# -- one forward, one block --------------------------------------------------------------------------------------------


def between(cache: Path) -> list[Path]:
    return sorted((cache / "activations").glob("between-blocks-*/*-before-*"))


@pytest.mark.parametrize("together", [True, False])
def test_three_layers_take_one_forward(together, harvest, filled, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    for layers in [[0, 2, 3]] if together else [0, 2, 3]:
        harvest(teacher, layer=layers)
    assert filled == [None, 0, 0, 1, 2, 2, 3]  # a layer is read twice: to harvest it, and to go on from it
    harvest(teacher, layer=2)
    assert len(filled) == 7
    files = between(tmp_path)
    assert len(files) > 2 and {file.name.rpartition("-")[2] for file in files} == {"3"}


def test_more_text_is_all_that_is_run_again(harvest, filled, monkeypatch, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    expected = harvest(teacher, layer=3, cache_dir=tmp_path / "whole")
    harvest(teacher, layer=3, n_tokens=60)
    before, shapes, embed = between(tmp_path), [], Layerwise._forward
    monkeypatch.setattr(
        Layerwise, "_forward", lambda self, h, m: shapes.append(h.shape[:2].numel()) or embed(self, h, m)
    )
    store = harvest(teacher, layer=3)
    new = set(between(tmp_path)) - set(before)
    rows = sum(file.stat().st_size - len(kept.digest()) for file in new) // (4 * teacher.d_model)
    assert sum(shapes) == 4 * rows
    assert np.array_equal(store["mlp_out"], expected["mlp_out"])


def test_layers_in_any_order_and_later_sites(harvest, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    stores = {n: harvest(teacher, layer=n, sites=["mlp_in"], cache_dir=tmp_path / "down") for n in (3, 1, 2)}
    stores[2] = harvest(teacher, layer=2, sites=["mlp_in", "resid_post"], cache_dir=tmp_path / "down")
    for n, store in stores.items():
        expected = harvest(teacher, layer=n, sites=store.sites)
        for site in store.sites:
            assert np.array_equal(store[site], expected[site])


def test_other_text_weights_and_dtype_have_other_files(harvest, tmp_path):
    teachers_ = [
        load(save_deepseek(tmp_path / "a")),
        load(save_deepseek(tmp_path / "a2", tensors=deepseek_tensors(seed=1))),
    ]
    teachers_ += [load(str(tmp_path / "a"), dtype="bfloat16"), load(str(tmp_path / "a"), attn_implementation="eager")]
    for teacher in teachers_:
        harvest(teacher)
    harvest(teachers_[0], n_tokens=200)
    harvest(teachers_[0], split="validation", n_tokens=20)
    assert len(list((tmp_path / "activations").glob("between-blocks-*"))) == 4  # more text is more files in them
    assert len({file.name for file in between(tmp_path)}) < len(between(tmp_path))


def parameter_bytes(teacher: Layerwise) -> int:
    return sum(p.nbytes for p in teacher.model.parameters() if p.device.type != "meta")


def test_only_the_block_at_work_has_weights(harvest, monkeypatch, tmp_path):
    teacher, held, sites = load(save("deepseek", tmp_path / "model")), [], Layerwise._sites

    def watched(self, wanted, *rest):
        (layer,) = wanted
        held.append(parameter_bytes(self) - sum(p.numel() * 4 for p in self.blocks[layer].parameters()))
        return sites(self, wanted, *rest)

    monkeypatch.setattr(Layerwise, "_sites", watched)
    harvest(teacher, layer=3)
    assert set(held) == {0} and parameter_bytes(teacher) == 0


def test_memory_is_that_of_a_block(corpus, tmp_path):
    config = DEEPSEEK | dict(hidden_size=256, moe_intermediate_size=256, n_routed_experts=16, num_hidden_layers=8)
    block = 4 * 16 * 3 * 256 * 256
    teacher = load(save_deepseek(tmp_path / "model", config))
    options = dict(n_tokens=100, max_length=16, batch_size=4, cache_dir=tmp_path)
    activations.harvest(teacher, corpus, layer=1, **options)  # what is loaded when first used
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark of resident memory
    except OSError:
        pytest.skip("resident memory has no mark to reset here")

    def resident(which: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
        return int(line.split()[1]) * 1024

    before = resident("VmRSS")
    activations.harvest(teacher, corpus, layer=7, **options)
    assert resident("VmHWM") - before < 3 * block  # of seven


# -- a run that was killed ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def kill(monkeypatch):
    """Die in block `layer` before its batch `number`."""

    def at(layer: int, number: int) -> None:
        seen, sites = [], Layerwise._sites

        def dying(self, wanted, *rest):
            seen.extend(wanted)
            if seen.count(layer) > number:
                monkeypatch.setattr(Layerwise, "_sites", sites)
                raise Killed
            return sites(self, wanted, *rest)

        monkeypatch.setattr(Layerwise, "_sites", dying)

    return at


def test_killed_run_goes_on_at_its_block(harvest, kill, filled, monkeypatch, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    expected = harvest(teacher, layer=3, cache_dir=tmp_path / "whole")
    filled.clear()
    kill(2, 9)
    with pytest.raises(Killed):
        harvest(teacher, layer=3)
    assert parameter_bytes(teacher) == 0
    depths = [file.name.rpartition("-")[2] for file in between(tmp_path)]
    assert set(depths) == {"2", "3"}  # some text has been through block 2, the rest not
    seen, sites = [], Layerwise._sites
    monkeypatch.setattr(Layerwise, "_sites", lambda self, w, *rest: seen.extend(w) or sites(self, w, *rest))
    store = harvest(teacher, layer=3)
    assert filled == [None, 0, 1, 2, 2, 3] and set(seen) == {2, 3} and seen.count(2) < seen.count(3)
    for site in store.sites:
        assert np.array_equal(store[site], expected[site])


def test_killed_harvest_goes_on_at_its_block_of_text(harvest, kill, monkeypatch, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    expected = harvest(teacher, layer=3, cache_dir=tmp_path / "whole")
    kill(3, 9)
    with pytest.raises(Killed):
        harvest(teacher, layer=3)
    seen, sites = [], Layerwise._sites
    monkeypatch.setattr(Layerwise, "_sites", lambda self, w, *rest: seen.extend(w) or sites(self, w, *rest))
    store = harvest(teacher, layer=3)
    resumed = len(seen)
    assert set(seen) == {3}
    harvest(teacher, layer=3, sites="resid_pre")
    assert 0 < resumed < len(seen) - resumed
    for site in store.sites:
        assert np.array_equal(store[site], expected[site])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_of_text_between_blocks_is_named(harvest, tmp_path, damage):
    teacher = load(save("deepseek", tmp_path / "model"))
    harvest(teacher, layer=1)
    file, *_ = between(tmp_path)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    left = {"flipped": len(content), "truncated": len(content) - 40, "empty": 0}[damage]
    file.write_bytes(content[:left])
    with pytest.raises(ValueError, match=f"{file.name} is damaged: its checksum is wrong; delete it"):
        harvest(teacher, layer=2)
    file.unlink()
    assert harvest(teacher, layer=2).n


# -- bad input, named before a block is read ---------------------------------------------------------------------------


@pytest.fixture
def unread(filled):
    yield
    assert not filled, "a block was read before the mistake was named"


def index(folder: str) -> dict[str, str]:
    return json.loads((Path(folder) / checkpoints.INDEX).read_text())["weight_map"]


def changed(tensors: dict, **parts) -> dict:
    """Tensors with some put in, or (None) left out; `__` stands for a dot."""
    new = {name.replace("__", "."): tensor for name, tensor in parts.items()}
    return {name: tensor for name, tensor in (tensors | new).items() if tensor is not None}


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_that_is_not_there(layer, harvest, unread, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    with pytest.raises(ValueError, match=f"layer={layer!r} is not in teacher .*; allowed: 0 to 3"):
        harvest(teacher, layer=layer)


def test_missing_and_truncated_shards(harvest, unread, tmp_path):
    folder = save("deepseek", tmp_path / "model")
    teacher, file = load(folder), Path(folder) / index(folder)["model.layers.1.mlp.experts.3.up_proj.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=f"{file.name} of .* is truncated or damaged"):
        harvest(load(folder), layer=1)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}, which holds .*, is missing"):
        harvest(teacher, layer=1)


def test_shards_of_later_blocks_need_not_be_there(harvest, tmp_path):
    folder = tmp_path / "model"
    built.build("olmoe", 12).save_pretrained(folder, max_shard_size="2KB")  # a shard holds tensors of one block
    tiny.tokenizer(True).save_pretrained(folder)
    teacher, expected = load(str(folder)), harvest(load(str(folder)), layer=0, cache_dir=tmp_path / "whole")
    files = index(str(folder))
    needed = {file for name, file in files.items() if "layers.0." in name or "embed_tokens" in name}
    assert (later := set(files.values()) - needed)
    for file in later:
        (folder / file).unlink()
    assert np.array_equal(harvest(teacher, layer=0)["mlp_out"], expected["mlp_out"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model__layers__2__self_attn__k_proj__weight": None}, r"layer 2 has no self_attn.k_proj.weight; it has"),
        ({"model__embed_tokens__weight": None}, "the embedding has no weight"),
        ({"model__layers__2__self_attn__k_proj__bias": torch.zeros(8)}, "layer 2 has self_attn.k_proj.bias, which"),
        ({"model__layers__0__mlp__up_proj__weight": torch.zeros(21, 16)}, r"is \[21, 16\], not \[20, 16\] as config"),
        ({"model__layers__1__mlp__experts__6__up_proj__weight": None}, "layer 1 has 7 router rows, but w_up differs"),
        ({"model__layers__0__input_layernorm__weight": torch.zeros(16, dtype=torch.int8)}, "is stored as I8; allowed"),
        ({"model__layers__1__mlp__gate__weight": torch.zeros(9, 16)}, r"is \[9, 16\], not \[7, 16\]"),
        ({"lm_head__bias": torch.zeros(64)}, "the checkpoint has without a place for it lm_head.bias"),
        ({"model__layers__4__input_layernorm__weight": torch.zeros(16)}, "layers behind the 4 .*: 4; allowed: 5"),
    ],
)
def test_tensors_that_do_not_fit_are_named(parts, message, harvest, unread, tmp_path):
    folder = save_deepseek(tmp_path / "model", tensors=changed(deepseek_tensors(), **parts))
    with pytest.raises(ValueError, match=message):
        harvest(load(folder), layer=3)


def test_experts_of_another_width(harvest, unread, tmp_path):
    tensors = deepseek_tensors(DEEPSEEK | dict(moe_intermediate_size=10, n_shared_experts=6))
    folder = save_deepseek(tmp_path / "model", DEEPSEEK | dict(n_shared_experts=5), tensors)
    with pytest.raises(
        ValueError, match=r"w_down of layer 1 has \(experts, d_model, d_ff\) = \(7, 16, 10\), not \(7, 16, 12\)"
    ):
        harvest(load(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob=True for model_type='deepseek'; allowed: False"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'.*allowed: 'softmax'"),
        ({"n_shared_experts": None}, "n_shared_experts=None.*allowed: 1 or more"),
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3', layerwise=True; allowed: deepseek, llama, "),
        ({"model_type": "gemma3_text"}, "model_type='gemma3_text', layerwise=True; allowed"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(fp8\).*allowed: F32, BF16, F16"),
    ],
)
def test_models_that_are_not_supported(options, message, unread, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(save_deepseek(tmp_path / "model", DEEPSEEK | options, deepseek_tensors()))


def test_what_a_layerwise_teacher_cannot_do(unread, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    with pytest.raises(ValueError, match="no losses, no splices; allowed: layerwise=False"):
        teacher.loss(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="no random twin"):
        teacher.randomised(0)


def test_full_disk(harvest, unread, monkeypatch, tmp_path):
    teacher = load(save("deepseek", tmp_path / "model"))
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20 + 66_000))
    with pytest.raises(ValueError, match="text between blocks takes .* bytes, only .* are free"):
        harvest(teacher, sites=["mlp_in"], n_tokens=990, layer=2)


@pytest.mark.parametrize("sharded", [True, False])
def test_of_a_hub_id_only_the_shards_needed_are_fetched(sharded, harvest, monkeypatch, tmp_path):
    """A folder plays the hub; files go to the cache when their names are asked for."""
    folder = tmp_path / "model"
    built.build("olmoe", 12).save_pretrained(folder, max_shard_size="2KB" if sharded else "1GB")
    tiny.tokenizer(True).save_pretrained(folder)
    expected = harvest(load(str(folder)), layer=1, cache_dir=tmp_path / "whole")
    cached = tmp_path / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)

    def snapshot_download(repo_id, allow_patterns, revision=None, local_files_only=False):
        assert (repo_id, revision) == ("someone/olmoe", "0123abcd")
        for pattern in allow_patterns:
            for file in folder.glob(pattern):
                shutil.copy(file, cached)
        return str(cached)

    monkeypatch.setattr(layerwise, "snapshot_download", snapshot_download)
    monkeypatch.setattr(sources, "commit", lambda *_: "0123abcd")
    teacher = load("someone/olmoe")
    assert teacher.fingerprint == "0123abcd-layerwise"
    assert [file.name for file in cached.glob("*.safetensors")] == ([] if sharded else [checkpoints.SINGLE])
    store = harvest(teacher, layer=1)
    assert np.array_equal(store["mlp_out"], expected["mlp_out"])
    if not sharded:
        return
    fetched = {file.name for file in cached.glob("*.safetensors")}
    assert fetched == {f for name, f in index(str(folder)).items() if re.search(r"layers\.[01]\.|embed_tokens", name)}


def test_hub_that_does_not_answer(monkeypatch):
    def fails(**_):
        raise OSError("no route to the hub")

    monkeypatch.setattr(layerwise, "snapshot_download", fails)
    monkeypatch.setattr(sources, "commit", lambda *_: "0123abcd")
    with pytest.raises(ValueError, match="'someone/olmoe': its files could not be fetched: no route to the hub"):
        load("someone/olmoe")
