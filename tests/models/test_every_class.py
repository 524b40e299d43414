"""Of every causal class of transformers: losses, sites, splices and routing are the model's own, or it is refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from helpers.models import checkpoints
from helpers.models.architecture import mlps_of
from helpers.models.teachers import SITES, Splice
from tests.models import every_class

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(1))
RIGHT = """bloom codegen cohere cohere2 dbrx emu3 falcon falcon_h1 gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text
glm4_moe gpt2 gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared granitemoe_swa hyperclovax
jamba lfm2 lfm2_moe llama minicpm3 mistral mixtral mpt nanochat olmo2 olmoe openai-gpt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next recurrent_gemma stablelm starcoder2""".split()  # noqa: SIM905
"""Heads with scales, caps and biases, parallel blocks, experts, towers: none of these may be skipped or refused."""
REFUSED = {
    "gemma3n_text": "resid_pre of layer 0, with 8 tokens, is [[4, 1, 8, 16]]",  # four streams
    "llama4_text": "mlp_out of layer 0, with 8 tokens, is [[8, 16]]",  # its tokens lose their texts
    "opt": "has no blocks with an MLP",  # its two layers stand in the block itself
}
"""Classes that people use and that have no site as the others have: why each is refused."""
ROUTED = """deepseek_v3 dots1 glm4_moe gpt_oss granitemoe granitemoehybrid granitemoeshared minimax_m2 mixtral olmoe
qwen2_moe qwen3_moe qwen3_next""".split()  # noqa: SIM905
NUMBERED_OTHERWISE = ("rwkv",)  # its hidden states begin after the first block
NOT_BUILT = {
    "blt": "patcher's sizes",
    "gemma3n": "timm is missing",
    "gemma4_assistant": "needs another model's states",
    "gemma4_unified_assistant": "needs another model's states",
    "musicgen": "sound",
    "musicgen_melody": "sound",
    "dots3_note": "adapter's sizes",
}
"""What one table of sizes does not build; all others must be built."""


def nats(model) -> torch.Tensor:
    """Cross-entropy from the model's own logits."""
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none").float()


def zero_first(value):
    return type(value)([value[0] * 0, *value[1:]]) if isinstance(value, tuple | list) else value * 0


@contextlib.contextmanager
def zeroed(block, site: str):
    """A block with zeros at a site, by hooks of its own on the block or on its MLPs."""
    modules = mlps_of(block).values() if site.startswith("mlp") else [block]
    if site in ("resid_pre", "mlp_in"):

        def hook(module, args, kwargs):
            return (
                (zero_first(args), kwargs) if args else (args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0})
            )

        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    else:
        handles = [module.register_forward_hook(lambda module, args, out: zero_first(out)) for module in modules]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture
def outcome(record_property):
    """Writes what became of a class: `tests/conftest.py` prints it at the end, of workers too."""
    return lambda what, why="": record_property("outcome", [what, why])


@pytest.mark.whole
@pytest.mark.parametrize("kind", every_class.TYPES)
def test_a_class_is_right_or_refused(kind, tmp_path, outcome):
    try:
        teacher = every_class.teacher(kind)
        own = nats(teacher.model)
    except Exception as error:  # what one table of sizes does not build
        why = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        assert kind in NOT_BUILT, why
        outcome("not built small", f"{NOT_BUILT[kind]} ({why})")
        pytest.skip(NOT_BUILT[kind])
    assert kind not in NOT_BUILT, "it is built: take it from the list"
    torch.testing.assert_close(teacher.loss(IDS).nats, own, rtol=1e-5, atol=1e-5)
    check_route(kind, teacher.model, tmp_path, outcome)
    try:
        teacher.check_sites()
    except ValueError as error:
        assert kind not in RIGHT and REFUSED.get(kind, "") in str(error)
        assert str(error).startswith(f"teacher={kind!r} ({type(teacher.model).__name__})")
        outcome("refused by name", str(error)[:160].partition(")")[2])
        return
    assert kind not in REFUSED
    check_sites(kind, teacher, outcome)
    outcome("right", "" if teacher._splits else "logits at once")


def check_sites(kind, teacher, outcome):
    clean = teacher.loss(IDS).nats
    for layer in range(teacher.n_layers):
        for site in SITES:
            assert torch.equal(teacher.loss(IDS, None, Splice(layer, site, torch.clone)).nats, clean)
            spliced = teacher.loss(IDS, None, Splice.zero(layer, site)).nats
            with zeroed(teacher.block(layer), site):
                torch.testing.assert_close(spliced, nats(teacher.model), rtol=1e-5, atol=1e-5)
            assert not torch.equal(spliced, clean), (layer, site)
    states = getattr(teacher.model(input_ids=IDS, use_cache=False, output_hidden_states=True), "hidden_states", None)
    if states is None or len(states) <= 1 or kind in NUMBERED_OTHERWISE:
        outcome("no hidden states to compare")
        return
    for layer in range(teacher.n_layers - 1):
        found = teacher.run_to(layer, IDS, None, ["resid_pre", "resid_post"])
        torch.testing.assert_close(found["resid_pre"], states[layer])
        torch.testing.assert_close(found["resid_post"], states[layer + 1])


def check_route(kind, model, folder, outcome):
    """`MoELayer.route` is what the last block's experts are given, or the checkpoint is refused."""
    experts = [
        module
        for path, module in model.named_modules()
        if path.endswith("1.experts") or ".1." in path and path.endswith(".experts")
    ]
    if not experts:
        assert kind not in ROUTED
        return
    model.save_pretrained(folder)
    try:
        (layer,) = checkpoints.read(folder, [1])
    except ValueError as error:
        assert kind not in ROUTED, error
        outcome("routing refused by name", str(error).replace(str(folder), "")[:160])
        return
    given = []
    take = lambda module, args, kwargs: given.extend((*args, *kwargs.values()))  # noqa: E731
    handle = experts[-1].register_forward_pre_hook(take, with_kwargs=True)
    model(input_ids=IDS, use_cache=False)
    handle.remove()
    x, indices, weights = (each.reshape(IDS.numel(), -1) for each in given[:3])
    expected = torch.zeros(len(x), layer.n_experts).scatter(1, indices, weights.float())
    torch.testing.assert_close(layer.route(x).to_dense(layer.n_experts), expected, rtol=1e-4, atol=1e-5)
    outcome("routing right")
