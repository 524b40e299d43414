"""Reading experts out of safetensors, against the built models; leading directions, against NumPy's SVD."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.models import checkpoints, directions, sources
from helpers.models.directions import TOLERANCE
from tests import tiny

D = 16
BASE = dict(vocab_size=64, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
BASE |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
MLA = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
QWEN = BASE | dict(intermediate_size=24, num_experts=6, num_experts_per_tok=2)
DEEPSEEK = BASE | MLA | dict(intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2)
LOCAL = BASE | dict(num_local_experts=6, num_experts_per_tok=2)
V2 = "DeepseekV2", DEEPSEEK | dict(first_k_dense_replace=1, routed_scaling_factor=2.0)
# name: class, its configuration, the parameter that sets d_ff
MODELS = {
    "olmoe": ("Olmoe", QWEN, "intermediate_size"),
    "mixtral": ("Mixtral", LOCAL, "intermediate_size"),
    "qwen2": ("Qwen2Moe", QWEN | dict(mlp_only_layers=[1]), "moe_intermediate_size"),
    "qwen3": ("Qwen3Moe", QWEN | dict(head_dim=8, norm_topk_prob=True), "moe_intermediate_size"),
    "granite": ("GraniteMoe", LOCAL, "intermediate_size"),
    "gpt-oss": ("GptOss", LOCAL | dict(head_dim=8), "intermediate_size"),
    "deepseek-v2-lite": (*V2, "moe_intermediate_size"),
    "deepseek-v2": (
        "DeepseekV2",
        V2[1] | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2),
        "moe_intermediate_size",
    ),
    "deepseek-v3": (
        "DeepseekV3",
        DEEPSEEK | dict(first_k_dense_replace=1, n_group=4, topk_group=2),
        "moe_intermediate_size",
    ),
}
DENSE = {"qwen2": [1], "deepseek-v2-lite": [0], "deepseek-v2": [0], "deepseek-v3": [0]}
BUILT = {}


def build(name: str, d_ff: int = 10):
    """A random model of the class; shared experts and experts' biases are zero, so that a block is its routed part."""
    if (name, d_ff) not in BUILT:
        cls, sizes, parameter = MODELS[name]
        config = getattr(transformers, f"{cls}Config")(**sizes | {parameter: d_ff})
        torch.manual_seed(0)
        model = getattr(transformers, f"{cls}ForCausalLM")._from_config(config, experts_implementation="eager").eval()
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                fill = 0.0 if "shared_expert" in key or key.endswith("proj_bias") else 0.5
                tensor.copy_(fill * torch.randn(tensor.shape))
        BUILT[name, d_ff] = model
    return BUILT[name, d_ff]


def save(name: str, folder: Path, d_ff: int = 10, **options) -> Path:
    build(name, d_ff).save_pretrained(folder, max_shard_size="8KB", **options)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def block(model, layer: int):
    layer = model.model.layers[layer]
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def all_of(layer, which="w_down") -> np.ndarray:
    return torch.cat(list(layer.weights(which))).double().numpy()


def by_hand(layer, x, gpt_oss: bool) -> np.ndarray:
    """A mixture of experts from what was read, in NumPy: one token, one expert at a time."""
    chosen, x = layer.route(x), x.double().numpy()
    down, up, gate = (all_of(layer, which) for which in ("w_down", "w_up", "w_gate"))
    y = np.zeros((len(x), layer.d_model))
    for t in range(len(x)):
        for e, weight in zip(chosen.indices[t].tolist(), chosen.values[t].tolist(), strict=True):
            g, u = gate[e].T @ x[t], up[e].T @ x[t]
            if gpt_oss:  # its own gated unit
                g, u = np.minimum(g, 7), np.clip(u, -7, 7)
                hidden = (u + 1) * g / (1 + np.exp(-1.702 * g))
            else:
                hidden = u * g / (1 + np.exp(-g))
            y[t] += weight * (down[e] @ hidden)
    return y


@pytest.mark.parametrize("d_ff", [10, D])  # a square matrix shows a transpose in its values only
@pytest.mark.parametrize("original", [True, False], ids=["hub names", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_computes_the_models_layer(name, original, d_ff, tmp_path):
    model, folder = build(name, d_ff), save(name, tmp_path / "model", d_ff, save_original_format=original)
    layers = checkpoints.read(folder)
    assert [layer.layer for layer in layers] == [n for n in range(3) if n not in DENSE.get(name, [])]
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    for layer in layers:
        assert (layer.d_model, layer.d_ff) == (D, d_ff) and all_of(layer).shape == (layer.n_experts, D, d_ff)
        with torch.no_grad():
            theirs = block(model, layer.layer)(x[None])
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        np.testing.assert_allclose(by_hand(layer, x, name == "gpt-oss"), theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_names_on_disk_are_those_of_the_layout_meant(name, tmp_path):
    layouts = {
        o: checkpoints.read(save(name, tmp_path / str(o), save_original_format=o))[0].layout for o in (True, False)
    }
    fused = {"granite": "fused (Granite)", "gpt-oss": "fused (gpt-oss)"}
    assert layouts[True] == fused.get(name, checkpoints.LAYOUTS[0].name)
    assert layouts[False] == ("fused (gpt-oss)" if name == "gpt-oss" else "fused (transformers 5)")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shard(folder: Path, tensors: dict, config: dict, shards: int = 3) -> Path:
    """A sharded checkpoint written by hand, as on the hub."""
    folder.mkdir()
    weight_map, names = {}, sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / checkpoints.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3} | config))
    return folder


def deepseek_16b(dtype=torch.float32) -> dict:
    """Hub names of DeepSeek-MoE-16B, whose class is remote code: one dense layer, shared experts, no fused tensor."""
    tensors = {"model.embed_tokens.weight": random(64, 8), "model.layers.0.input_layernorm.weight": random(8)}
    for part, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
        tensors[f"model.layers.0.mlp.{part}_proj.weight"] = random(*shape)
        for n in (1, 2):
            tensors[f"model.layers.{n}.mlp.shared_experts.{part}_proj.weight"] = random(*shape)
            for e in range(11):
                size = (8, 6) if part == "down" else (6, 8)
                tensors[f"model.layers.{n}.mlp.experts.{e}.{part}_proj.weight"] = random(*size, seed=100 * n + e)
    tensors |= {f"model.layers.{n}.mlp.gate.weight": random(11, 8, seed=n) for n in (1, 2)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


DEEPSEEK_16B = dict(model_type="deepseek", num_experts_per_tok=2, norm_topk_prob=False, scoring_func="softmax")


@pytest.fixture
def deepseek(tmp_path):
    return shard(tmp_path / "16b", deepseek_16b(), DEEPSEEK_16B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deepseek_moe_16b_by_its_names_on_the_hub(tmp_path, dtype):
    tensors = deepseek_16b(dtype)
    folder = shard(tmp_path / "16b", tensors, DEEPSEEK_16B)
    assert [layer.layer for layer in checkpoints.read(folder)] == [1, 2]
    (layer,) = checkpoints.read(folder, [2])
    assert torch.equal(layer.router, tensors["model.layers.2.mlp.gate.weight"].float())
    for which, part in (("w_down", "down"), ("w_up", "up"), ("w_gate", "gate")):
        for e, matrix in enumerate(torch.cat(list(layer.weights(which)))):
            stored = tensors[f"model.layers.2.mlp.experts.{e}.{part}_proj.weight"].float()
            assert torch.equal(matrix, stored if part == "down" else stored.T)
    assert layer.notes == (
        "layers 0 have a dense MLP and are skipped",
        "shared experts (mlp.shared_experts) are not read",
    )
    chosen, probabilities = layer.route(random(5, 8)), (random(5, 8) @ layer.router.T).softmax(1)
    assert torch.allclose(chosen.values, probabilities.topk(2).values) and layer.scale == 1


def test_mixtral_by_its_names_on_the_hub(tmp_path):
    tensors, name = (
        {"model.layers.0.block_sparse_moe.gate.weight": random(4, 8)},
        "model.layers.0.block_sparse_moe.experts",
    )
    for e in range(4):
        tensors |= {f"{name}.{e}.w1.weight": random(6, 8, seed=e), f"{name}.{e}.w3.weight": random(6, 8, seed=9 + e)}
        tensors[f"{name}.{e}.w2.weight"] = random(8, 6, seed=20 + e)
    folder = shard(tmp_path / "m", tensors, dict(model_type="mixtral", num_experts_per_tok=2))
    (layer,) = checkpoints.read(folder)
    for which, w in (("w_gate", "w1"), ("w_up", "w3"), ("w_down", "w2")):
        for e, matrix in enumerate(torch.cat(list(layer.weights(which)))):
            stored = tensors[f"{name}.{e}.{w}.weight"]
            assert torch.equal(matrix, stored if w == "w2" else stored.T)
    assert torch.allclose(layer.route(random(5, 8)).values.sum(1), torch.ones(5))


def test_some_experts_in_the_order_asked_for_and_batch_by_batch(deepseek, monkeypatch):
    layer = checkpoints.read(deepseek, [1])[0]
    monkeypatch.setattr(checkpoints, "BATCH_BYTES", 4 * 8 * 6 * 2)
    everything = all_of(layer)
    assert [len(batch) for batch in layer.weights()] == [2, 2, 2, 2, 2, 1]
    np.testing.assert_array_equal(torch.cat(list(layer.weights(experts=[7, 0, 7]))), everything[[7, 0, 7]])
    batched = checkpoints.principal(layer)
    monkeypatch.undo()
    for one, other in zip(batched, checkpoints.principal(layer), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_only_the_bytes_asked_for_are_read(deepseek, monkeypatch):
    opener, read = sources.opener, []

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def readinto(self, data):
            read.append(len(data))
            return self.file.readinto(data)

    opened = opener(str(deepseek), None)
    monkeypatch.setattr(sources, "opener", lambda *_: lambda name: Counted(opened(name)))
    layer = checkpoints.read(deepseek, [2])[0]
    assert read == [4 * 11 * 8]  # the router rows
    batches = layer.weights()
    assert len(read) == 1  # nothing before it is asked for
    list(batches)
    assert read[1:] == [4 * 8 * 6] * 11


def test_shards_of_other_layers_need_not_be_there(tmp_path):
    folder = save("olmoe", tmp_path / "model")
    before = all_of(checkpoints.read(folder, [1])[0])
    index = json.loads((folder / checkpoints.INDEX).read_text())["weight_map"]
    needed = {f for name, f in index.items() if "layers.1.mlp" in name and ("down" in name or "mlp.gate" in name)}
    others = set(index.values()) - needed
    assert others
    for file in others:
        (folder / file).unlink()
    np.testing.assert_array_equal(all_of(checkpoints.read(folder, [1])[0]), before)


def test_a_single_file_needs_no_index(tmp_path):
    build("olmoe").save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / checkpoints.INDEX).exists() and len(checkpoints.read(tmp_path / "m")) == 3


@pytest.mark.parametrize("wrapper", tiny.WRAPPERS)
@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("name", ["olmoe", "granite", "gpt-oss"])
def test_prefixes_that_wrappers_put_into_names_are_understood(name, shards, wrapper, tmp_path):
    folder = tmp_path / "m"
    build(name).save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
    assert (folder / checkpoints.INDEX).exists() == shards
    before = checkpoints.read(folder)
    expected, routers = [all_of(layer) for layer in before], [layer.router for layer in before]
    tiny.rename(folder, tiny.WRAPPERS[wrapper])
    found = checkpoints.read(folder)
    assert len(found) == len(expected)
    for layer, router, experts in zip(found, routers, expected, strict=True):
        assert torch.equal(layer.router, router) and np.array_equal(all_of(layer), experts)


def test_two_tensors_of_one_name_are_refused(deepseek):
    tensors = load_file(shard_of(deepseek, DOWN))
    save_file(tensors | {"module." + DOWN: tensors[DOWN].clone()}, shard_of(deepseek, DOWN))
    with pytest.raises(ValueError, match=f"has {DOWN} with a wrapper's prefix and without"):
        checkpoints.read(deepseek)


def test_modules_after_the_last_layer_are_no_layers(deepseek):
    """DeepSeek-V3 stores its multi-token predictor, experts and all, as one layer more."""
    config = json.loads((deepseek / "config.json").read_text())
    (deepseek / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert [layer.layer for layer in checkpoints.read(deepseek)] == [1]


def test_notes_of_gpt_oss(tmp_path):
    assert "experts.down_proj_bias" in "".join(checkpoints.read(save("gpt-oss", tmp_path / "g"))[0].notes)


@pytest.mark.parametrize("kind", ["other", "phimoe"])  # phimoe's weights are those of a softmax with a threshold
def test_a_class_whose_routing_was_not_compared_is_refused(tmp_path, kind):
    folder = shard(tmp_path / "d", deepseek_16b(), DEEPSEEK_16B | {"model_type": kind})
    with pytest.raises(ValueError, match=f"model_type='{kind}', whose routing was not compared"):
        checkpoints.read(folder)


SIZES = BASE | dict(intermediate_size=24, moe_intermediate_size=8, head_dim=8)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3)
ROUTED = dict(
    n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=0, n_shared_experts=1, n_group=4, topk_group=2
)
LOCAL_EIGHT = dict(num_local_experts=8, num_experts_per_tok=3)
ATTENTION = dict(layer_types=["full_attention"] * 3)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
ROUTERS = {
    "Olmoe": EXPERTS, "FlexOlmo": EXPERTS, "Qwen2Moe": EXPERTS, "Qwen3Moe": EXPERTS | dict(norm_topk_prob=True),
    "Qwen3Next": EXPERTS | ATTENTION | LINEAR | dict(shared_expert_intermediate_size=8),
    "Qwen3_5MoeText": EXPERTS | ATTENTION | LINEAR | dict(shared_expert_intermediate_size=8),
    "Mixtral": LOCAL_EIGHT, "GptOss": LOCAL_EIGHT, "MiniMaxM2": LOCAL_EIGHT, "MiniMax": LOCAL_EIGHT | ATTENTION,
    "GraniteMoe": LOCAL_EIGHT, "GraniteMoeShared": LOCAL_EIGHT | dict(shared_intermediate_size=8),
    "GraniteMoeHybrid": LOCAL_EIGHT | ATTENTION | dict(shared_intermediate_size=8, mamba_n_heads=4),
    "DeepseekV2": ROUTED | MLA | dict(head_dim=4, topk_method="group_limited_greedy", routed_scaling_factor=2.0),
    "DeepseekV3": ROUTED | MLA | dict(head_dim=4),
    "Glm4Moe": ROUTED | dict(norm_topk_prob=True, routed_scaling_factor=1.5),
    "Dots1": ROUTED | ATTENTION,
}  # fmt: skip


def test_all_classes_that_are_allowed_are_compared():
    kinds = {getattr(transformers, f"{name}Config").model_type for name in ROUTERS}
    assert kinds | {"deepseek"} == {*checkpoints.RENORMALISED, *checkpoints.PLAIN}  # deepseek's class is no part of it


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("told", [{}, {"norm_topk_prob": False}, {"norm_topk_prob": True}], ids=str)
def test_route_is_what_the_models_experts_are_given(name, told, tmp_path):
    """Whatever the configuration says of the weights' sum."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **ROUTERS[name], **told})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    given = []
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_((0.3 * torch.randn(tensor.shape)).to(tensor))
        model.save_pretrained(tmp_path)
        ends = "layers.1.mlp.experts", "layers.1.block_sparse_moe.experts"
        experts = next(module for path, module in model.named_modules() if path.endswith(ends))
        take = lambda module, args, kwargs: given.extend((*args, *kwargs.values()))  # noqa: E731
        experts.register_forward_pre_hook(take, with_kwargs=True)
        model(torch.randint(4, 60, (2, 20), generator=torch.Generator().manual_seed(1)))
    x, indices, weights = (each.reshape(40, -1) for each in given[:3])
    expected = torch.zeros(40, 8).scatter(1, indices, weights.float())
    if name == "DeepseekV2" and told.get("norm_topk_prob"):
        with pytest.raises(ValueError, match="model_type='deepseek_v2' and norm_topk_prob; allowed: false or none"):
            checkpoints.read(tmp_path, [1])
        return
    (layer,) = checkpoints.read(tmp_path, [1])
    torch.testing.assert_close(layer.route(x).to_dense(8), expected, rtol=1e-4, atol=1e-5)


# Bad input


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder, old, new):
    """Give a tensor another name in its shard and in the index."""
    index = json.loads((folder / checkpoints.INDEX).read_text())
    file = index["weight_map"].pop(old)
    tensors = load_file(folder / file)
    tensors[new] = tensors.pop(old)
    save_file(tensors, folder / file)
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {new: file}}))


def replace(folder, name, tensor):
    file = folder / json.loads((folder / checkpoints.INDEX).read_text())["weight_map"][name]
    save_file(load_file(file) | {name: tensor}, file)


def drop(folder, name):
    file = folder / json.loads((folder / checkpoints.INDEX).read_text())["weight_map"][name]
    save_file({k: v for k, v in load_file(file).items() if k != name}, file)


def shard_of(folder, name):
    return folder / json.loads((folder / checkpoints.INDEX).read_text())["weight_map"][name]


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
STEM = DOWN.removesuffix(".weight")


def overwrite(name, content):
    """Put `content` (given the shard's bytes) in the place of the shard that holds `name`."""
    return lambda folder: shard_of(folder, name).write_bytes(content(shard_of(folder, name).read_bytes()))


BAD = {
    "dense layer": (lambda f: None, [1, 0], r"layer 0 of .*16b has a dense MLP; allowed: 1 to 2"),
    "out of range": (lambda f: None, [3], r"layers=\[3\]: layer 3 of .* is not there; allowed: 1 to 2"),
    "negative": (lambda f: None, [-1], r"layer -1 of .* is not there"),
    "missing shard": (
        lambda f: shard_of(f, DOWN).unlink(),
        [1],
        r"model-0000\d-of-00003.safetensors, which holds .* is missing",
    ),
    "truncated": (overwrite(DOWN, lambda b: b[:-4]), [1], r"truncated or damaged: [\d,]+ bytes, not [\d,]+"),
    "empty": (overwrite(DOWN, lambda b: b""), [1], r"truncated or no safetensors file \(0 bytes\)"),
    "header cut": (overwrite(DOWN, lambda b: b[:40]), [1], r"truncated or no safetensors file \(40 bytes\)"),
    "header damaged": (
        overwrite(DOWN, lambda b: bytes([9] + 7 * [0]) + b"no header"),
        [1],
        "the header of .* is damaged",
    ),
    "index wrong": (lambda f: drop(f, DOWN), [1], rf"has {DOWN} in model-.*, which does not hold it"),
    "index damaged": (lambda f: (f / checkpoints.INDEX).write_text("{"), [1], rf"{checkpoints.INDEX} of .* is damaged"),
    "expert missing": (
        lambda f: rename(f, DOWN, "other"),
        [1],
        r"layer 1 has 11 .* rows, but w_down differs for \[3\]",
    ),
    "transposed": (lambda f: replace(f, DOWN, random(6, 8)), [1], rf"{DOWN} .* is \[6, 8\]; expected axes df, d=8"),
    "another d_ff": (lambda f: replace(f, DOWN, random(8, 5)), [1], r"layer 1: w_down has d_ff of 5, 6"),
    "one dimension": (lambda f: replace(f, DOWN, random(48)), [1], rf"{DOWN} .* is \[48\]; expected axes df"),
    "FP8": (
        lambda f: replace(f, DOWN, random(8, 6).to(torch.float8_e4m3fn)),
        [1],
        "is stored as F8_E4M3; allowed: F32, BF16, F16",
    ),
    "FP8 by name": (
        lambda f: rename(f, "model.layers.0.input_layernorm.weight", STEM + ".weight_scale_inv"),
        [1],
        r"quantised \(FP8 .*allowed: F32, BF16, F16",
    ),
    "GPTQ": (lambda f: rename(f, DOWN, STEM + ".qweight"), [1], r"quantised \(GPTQ or AWQ: .*\.3.down_proj.qweight"),
    "MXFP4": (
        lambda f: rename(f, DOWN, "model.layers.1.mlp.experts.down_proj_blocks"),
        [1],
        r"quantised \(MXFP4: .*down_proj_blocks",
    ),
    "no router": (
        lambda f: rename(f, "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.door.weight"),
        [1],
        "layer 1 has experts in no known layout .*mlp.door.weight",
    ),
    "top_k": (lambda f: edit_config(f, num_experts_per_tok=12), [1], "num_experts_per_tok=12; allowed: 1 to 11"),
    "no configuration": (lambda f: (f / "config.json").unlink(), [1], "has no config.json"),
    "no safetensors": (
        lambda f: (f / checkpoints.INDEX).unlink(),
        [1],
        "has neither model.safetensors.index.json nor model.safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, deepseek):
    spoil, layers, told = BAD[name]
    spoil(deepseek)
    with pytest.raises(ValueError, match=told):
        checkpoints.read(deepseek, layers)


def test_a_dense_checkpoint_is_named(tmp_path):
    config = transformers.Qwen3Config(**BASE | dict(intermediate_size=24, head_dim=8))
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no experts found in .*dense; layers with MLPs: 0 to 2$"):
        checkpoints.read(tmp_path / "dense")


def test_bad_arguments_are_named(deepseek):
    layer = checkpoints.read(deepseek, [1])[0]
    with pytest.raises(ValueError, match="which='down' is unknown; allowed: 'w_down', 'w_up', 'w_gate'"):
        layer.weights("down")
    with pytest.raises(ValueError, match=r"experts=\[-1, 11\] are not in layer 1; allowed: 0 to 10"):
        layer.weights(experts=[0, -1, 11])
    for rank in (0, 7):
        with pytest.raises(ValueError, match=f"rank={rank}; allowed: 1 to 6"):
            checkpoints.principal(layer, rank)
    with pytest.raises(ValueError, match="source='nowhere' is no folder; allowed: a folder, or a hub id"):
        checkpoints.read("nowhere")


def test_weights_that_are_not_finite_are_named(deepseek):
    replace(deepseek, DOWN, torch.full((8, 6), torch.nan))
    with pytest.raises(ValueError, match="w_down of layer 1, expert 3 has entries that are not finite"):
        checkpoints.principal(checkpoints.read(deepseek, [1])[0])


# Leading directions


def check(w: torch.Tensor, rank: int):
    """Against NumPy in float64: values, residuals recomputed, and directions where their σ stands alone."""
    u, squares, residuals = directions.leading(w, rank)
    left, sigma, _ = np.linalg.svd(w.double().numpy(), full_matrices=False)
    top = sigma[:, :1] ** 2
    np.testing.assert_array_less(abs(squares.numpy() - sigma[:, :rank] ** 2) / top, TOLERANCE)
    np.testing.assert_allclose(u @ u.mT, np.broadcast_to(np.eye(rank), (len(w), rank, rank)), atol=1e-5)
    wide, v = w.double(), u.double()
    error = torch.linalg.vector_norm(v @ wide @ wide.mT - squares[:, :, None] * v, dim=2).numpy() / top
    assert error.max() <= 1.5 * TOLERANCE and abs(error - residuals.numpy()).max() < 5e-6
    gaps = np.diff(sigma**2, append=0)[:, :rank]
    cosine = abs(np.einsum("erd,edr->er", u.numpy(), left[:, :, :rank]))
    alone = np.minimum(abs(gaps), abs(np.diff(sigma**2, prepend=np.inf))[:, :rank]) > 1e-2 * top
    assert (cosine[alone] > 1 - 1e-4).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(0, 99))
def test_small_matrices(n, d, f, rank, seed):
    check(random(n, d, f, seed=seed), min(rank, d, f))


@pytest.mark.parametrize("shape", [(3, 160, 96), (3, 96, 160), (2, 300, 300)])
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("spectrum", ["gaussian", "steep", "one", "equal"])
def test_larger_matrices(shape, rank, spectrum):
    n, d, f = shape
    w = random(*shape)
    if spectrum == "steep":
        w = w * torch.arange(1, f + 1).float().rsqrt()
    elif spectrum == "one":  # a direction that carries nearly all, as a mean would
        w = 0.01 * w + random(n, d, 1, seed=1) * random(n, 1, f, seed=2)
    elif spectrum == "equal":  # σ that are all alike: any direction is right, the share is known
        w = torch.linalg.qr(w if d >= f else w.mT).Q
        w = w if d >= f else w.mT
    check(w, rank)


def test_a_steep_spectrum_takes_no_full_decomposition(monkeypatch):
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sizes.append(m.shape[-1]) or eigh(m))
    check(random(2, 300, 200) * torch.arange(1, 201).float().rsqrt(), 1)
    assert sizes and max(sizes) < 100


@pytest.mark.parametrize("shape", [(200, 160), (160, 200), (45, 90), (17, 8)])
@pytest.mark.parametrize("rank", [1, 3])
def test_experts_of_low_rank_of_zeros_and_of_equal_values(shape, rank):
    """In one batch, so that those found at once go on with nothing but rounding to add."""
    d, f = shape
    w = [random(d, r, seed=r) @ random(r, f, seed=9 + r) * 10.0 ** (r % 5 - 2) for r in (1, 2, 5, 9, 17, 33)]
    two = torch.zeros(d, f)
    two[3, 5], two[-1, -1] = -3, 2
    w += [torch.zeros(d, f), two, torch.eye(max(d, f))[:d, :f], random(d, f) * torch.logspace(0, -12, f)]
    u, squares, residuals = directions.leading(torch.stack(w), rank)
    wanted = np.linalg.svd(torch.stack(w).double().numpy(), compute_uv=False)[:, :rank] ** 2
    largest = wanted[:, :1].clip(1e-9)
    np.testing.assert_allclose(squares.numpy() / largest, wanted / largest, atol=1e-5)
    assert u.isfinite().all() and residuals.max() <= TOLERANCE
    assert u[7, 0].abs().argmax() == 3 and abs(squares[7, 0] - 9) < 1e-5


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e-12, 1e12, 1e25, 1e37])
def test_each_matrix_is_taken_at_its_own_size(size):
    w = random(3, 60, 50)
    sizes = torch.tensor([size, 1.0, 0.0])[:, None, None]
    u, squares, residuals = directions.leading(w * sizes, 2)
    plain, wanted, _ = directions.leading(w, 2)
    assert residuals.max() <= directions.TOLERANCE
    np.testing.assert_allclose(squares, wanted * sizes[:, :, 0].double() ** 2, rtol=1e-5)
    np.testing.assert_allclose((u * plain).sum(2)[:2].abs(), 1, atol=1e-3)


def test_a_tolerance_that_float32_cannot_meet_is_named():
    with pytest.raises(ArithmeticError, match="residual .*, complete basis, tolerance 1.0e-12"):
        directions.leading(random(2, 50, 40), 2, tolerance=1e-12)


@pytest.mark.parametrize("which", checkpoints.WHICH)
def test_principal_of_a_checkpoint(which, tmp_path):
    layer = checkpoints.read(save("qwen3", tmp_path / "model"))[1]
    found, shares, residuals = checkpoints.principal(layer, 3, which)
    left, sigma, _ = np.linalg.svd(all_of(layer, which), full_matrices=False)
    left = left[:, :, :3].transpose(0, 2, 1)
    largest = np.take_along_axis(left, abs(left).argmax(2, keepdims=True), 2)
    np.testing.assert_allclose(found, left * np.sign(largest), atol=2e-5)
    np.testing.assert_allclose(shares, (sigma**2 / (sigma**2).sum(1, keepdims=True))[:, :3], rtol=1e-5)
    assert residuals.shape == shares.shape and residuals.max() <= TOLERANCE
    again = checkpoints.principal(layer, 3, which)
    assert all(torch.equal(a, b) for a, b in zip((found, shares, residuals), again, strict=True))


# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for here, over a folder; what was asked for is written down."""

    folder: Path
    log: list

    def _json(self, content, status=200):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body, status, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if "/tree/" in self.path:
            sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
            return self._json([{"type": "file", "path": p, "size": n, "oid": "0" * 40} for p, n in sizes.items()])
        if self.path.startswith("/api/models/me/moe"):
            return self._json({"id": "me/moe", "sha": "a" * 40, "siblings": [], "private": False, "tags": []})
        if self.path.startswith("/api/"):
            return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        name = self.path.removeprefix(f"/me/moe/resolve/{'a' * 40}/")
        body, asked = (self.folder / name).read_bytes(), self.headers.get("Range")
        if asked is None:
            self.log.append((name, None))
            return self._send(body, 200, {})
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        self.log.append((name, last + 1 - first))
        return self._send(body[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{len(body)}"})

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, deepseek, monkeypatch):
    Hub.folder, Hub.log = deepseek, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint, path = f"http://127.0.0.1:{server.server_port}", "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield Hub.log
    server.shutdown()
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_from_the_hub_come_only_headers_router_rows_and_the_experts(served, deepseek):
    (layer,) = checkpoints.read("me/moe", [2])
    (local,) = checkpoints.read(deepseek, [2])
    assert torch.equal(layer.router, local.router)
    before = len(served)
    np.testing.assert_array_equal(all_of(layer), all_of(local))
    assert [size for _, size in served[before:]] == [4 * 8 * 6] * 11
    shards = sum(size for name, size in served if size and name.endswith(".safetensors"))
    needed = {shard_of(deepseek, DOWN.replace("1", "2")), shard_of(deepseek, "model.layers.2.mlp.gate.weight")}
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in needed)
    assert shards == headers + 4 * 11 * 8 + 11 * 4 * 8 * 6


def test_a_shard_that_the_hub_lacks_and_a_model_that_it_lacks(served, deepseek):
    shard_of(deepseek, DOWN).unlink()
    with pytest.raises(ValueError, match="which holds .* is missing"):
        checkpoints.read("me/moe", [1])
    with pytest.raises(ValueError, match="no public model 'me/other'"):
        checkpoints.read("me/other")


@pytest.mark.parametrize("complete", [True, False])
def test_without_a_network_the_hubs_cache_serves(deepseek, tmp_path, monkeypatch, complete):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshots = tmp_path / "cache" / "models--me--moe" / "snapshots" / ("b" * 40)
    snapshots.mkdir(parents=True)
    refs = snapshots.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    for path in deepseek.iterdir():
        (snapshots / path.name).write_bytes(path.read_bytes())
    if complete:
        assert torch.equal(checkpoints.read("me/moe", [1])[0].router, checkpoints.read(deepseek, [1])[0].router)
    else:
        shard_of(snapshots, DOWN).unlink()
        with pytest.raises(ValueError, match="is missing .not in the hub's cache, and the hub gives no answer"):
            checkpoints.read("me/moe", [1])
