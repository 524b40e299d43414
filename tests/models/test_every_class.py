"""Of every causal class of transformers: losses are the model's own, sites are one module's, or it is refused."""

import collections

import pytest
import torch
import torch.nn.functional as F

from helpers.models.teachers import SITES, Splice
from tests.models import every_class

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(1))
RIGHT = """bloom cohere cohere2 falcon falcon_h1 gemma gemma2 gemma3 gemma3_text gemma4 glm4_moe gpt2 gpt_neox gpt_oss
gptj granite granitemoe hyperclovax llama minicpm3 mistral mixtral mpt nanochat olmo2 olmoe persimmon phi phi3 qwen2
qwen2_moe qwen3 qwen3_moe stablelm starcoder2""".split()  # noqa: SIM905
"""Heads with scales, caps and biases, parallel blocks, experts, towers: none of these may be skipped or refused."""
OUTCOMES = collections.defaultdict(dict)


def nats(model) -> torch.Tensor:
    """Cross-entropy from the model's own logits."""
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none").float()


@pytest.fixture(scope="module", autouse=True)
def counted(pytestconfig):
    yield
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for outcome, kinds in OUTCOMES.items():
            print(f"\n{outcome}: {len(kinds)} of {len(every_class.TYPES)}")
            print(*(f"  {kind}: {why}" if why else f"  {kind}" for kind, why in kinds.items()), sep="\n")


@pytest.mark.parametrize("kind", every_class.TYPES)
def test_a_class_is_right_or_refused(kind):
    try:
        teacher = every_class.teacher(kind)
        own = nats(teacher.model)
    except Exception as error:  # what one table of sizes does not build
        assert kind not in RIGHT, error
        OUTCOMES["not built small"][kind] = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        pytest.skip(OUTCOMES["not built small"][kind])
    torch.testing.assert_close(teacher.loss(IDS).nats, own, rtol=1e-5, atol=1e-5)
    try:
        teacher.check_sites()
    except ValueError as error:
        assert kind not in RIGHT
        assert str(error).startswith(f"teacher={kind!r} ({type(teacher.model).__name__})")
        OUTCOMES["refused by name"][kind] = str(error)[:160].partition(")")[2]
        return
    last = teacher.n_layers - 1
    clean = teacher.loss(IDS).nats
    for site in SITES:
        assert torch.equal(teacher.loss(IDS, None, Splice(last, site, torch.clone)).nats, clean)
    zeroed = teacher.loss(IDS, None, Splice.zero(last, "mlp_out")).nats
    hook = teacher.mlp(last).register_forward_hook(
        lambda module, args, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
    )
    torch.testing.assert_close(zeroed, nats(teacher.model), rtol=1e-5, atol=1e-5)
    hook.remove()
    assert not torch.equal(zeroed, clean)
    OUTCOMES["right"][kind] = "" if teacher._splits else "logits at once"
