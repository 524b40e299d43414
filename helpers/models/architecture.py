"""Where a model of `transformers` has its blocks and MLPs, and whether its checkpoint filled them."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from helpers.models.sources import ALLOWED
from helpers.settings import allowed

ATTENTION, MLP = re.compile("attn|attention"), re.compile("mlp|moe|expert|ffn|feed_forward")
TOWER = re.compile("vision|visual|image|audio|speech")
BUFFER = re.compile(r"inv_freq|masked_bias|(?:attn|attention)\.bias$")
"""What old checkpoints store and models compute."""


def check_loaded(model: PreTrainedModel, info: dict, given: str) -> None:
    """`ValueError` naming tensors that the checkpoint lacks, has in another shape, or has in a block without a place.

    Args:
        info: what `from_pretrained(output_loading_info=True)` says.
    """
    n_blocks = len(find_blocks(model, given))
    number = re.compile(r"(?:layers|layer|h|blocks)\.(\d+)\.")
    spare = [
        name
        for name in info["unexpected_keys"]
        if (found := number.search(name)) and int(found[1]) < n_blocks and not BUFFER.search(name)
    ]
    mismatched = [f"{name} {list(here)}, not {list(wanted)}" for name, here, wanted in info["mismatched_keys"]]
    for what, names in {
        "lacks": set(info["missing_keys"]),
        "has in another shape": set(mismatched),
        "has without a place for it": set(spare),
    }.items():
        names = sorted(name for name in names if not TOWER.search(name))
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        cure = "the tensors of its class by their own names (a prefix _orig_mod. or module. must go)"
        allowed(not names, f"{given}: the checkpoint {what} {', '.join(names[:4])}{more}", cure)


def find_blocks(model: nn.Module, given: str = "the model") -> nn.ModuleList:
    """The list of transformer blocks: the `ModuleList` whose members all have attention and an MLP.

    Towers for images and sound are passed over; `ValueError` where none is left, or several.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not TOWER.search(path)
        if all(children(block, ATTENTION) and children(block, MLP) for block in module)
    }
    allowed(bool(lists), f"{given} has no blocks with attention and an MLP", ALLOWED)
    allowed(len(lists) == 1, f"{given} has several lists of blocks: {', '.join(lists)}", "one")
    return next(iter(lists.values()))


def children(block: nn.Module, pattern: re.Pattern) -> dict[str, nn.Module]:
    """A block's modules of a kind, by name; a norm before one, and what has no weights, is none."""
    named = ((n, m) for n, m in block.named_children() if pattern.search(n) and not n.endswith("norm"))
    return {name: module for name, module in named if next(module.parameters(), None) is not None}
