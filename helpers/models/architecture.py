"""Where a model of `transformers` has its blocks and MLPs, whether a checkpoint filled them, and hooks on them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.models.sources import ALLOWED
from helpers.settings import allowed

SITES = ("resid_pre", "mlp_in", "mlp_out", "resid_post")
OF_MLP = ("mlp_in", "mlp_out")
MLP = re.compile("mlp|moe|expert|ffn|feed_forward")
TOWER = re.compile("vision|visual|image|audio|speech")
BUFFER = re.compile(r"inv_freq|masked_bias|(?:attn|attention)\.bias$|position_ids$|\.version$")
"""What old checkpoints store and models compute."""
NUMBER = re.compile(r"(layers|layer|h|blocks)\.(\d+)\.")
BESIDE = re.compile(r"norm|embed|^ln_|^wpe$")
"""Modules beside the blocks through which every token goes."""
FORETOLD = re.compile("nextn|mtp")
"""Settings of layers behind the last that predict later tokens."""
_WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
PREFIXES = {rf"^(?:(?:module|{_WRAPPERS})\.)+": "", rf"(?<=\.)(?:{_WRAPPERS})\.": ""}
"""What torch.compile, DDP, FSDP and checkpointing put into the names of tensors."""


def unwrapped(tensors: Mapping[str, Any], given: str) -> dict[str, Any]:
    """Tensors by their names without what wrappers put into them; `ValueError` where two come to have the same."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        for prefix, instead in PREFIXES.items():
            name = re.sub(prefix, instead, name)
        allowed(name not in found, f"{given} has {name} with a wrapper's prefix and without", "one of them")
        found[name] = tensor
    return found


class Sum(nn.Module):
    """MLPs side by side in a block: what they return is added."""

    def __init__(self, parts: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch = hidden_states.view(-1, *hidden_states.shape[-2:])  # some take no rows without a batch
        found = (part(batch) for part in self.parts)
        return sum(each[0] if isinstance(each, tuple) else each for each in found).view(hidden_states.shape)


def check_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, info: dict, given: str) -> None:
    """`ValueError` naming tensors that the checkpoint lacks, has in another shape, or has without a place for them;
    tensors with entries that are not finite; a tokenizer with more words than the embedding.

    Args:
        info: what `from_pretrained(output_loading_info=True)` says.
    """
    mismatched = [f"{name} {list(here)}, not {list(wanted)}" for name, here, wanted in info["mismatched_keys"]]
    _check_none(info["missing_keys"], "lacks", given)
    _check_none(mismatched, "has in another shape", given)
    check_spare(model, info["unexpected_keys"], given)
    bad = [name for name, each in model.named_parameters() if not all(end.isfinite() for end in each.aminmax())]
    allowed(not bad, f"{given}: {', '.join(bad[:4])} has entries that are infinite or not a number", "finite weights")
    words, rows = tokenizer.vocab_size, len(model.get_input_embeddings().weight)
    allowed(words <= rows, f"{given}: its tokenizer has {words:,} words", f"at most {rows:,}, as its embedding has")


def check_spare(model: nn.Module, names: Iterable[str], given: str) -> None:
    """`ValueError` where a checkpoint's tensors without a place belong to what text goes through, or to more layers.

    Heads and towers that the class does not have may be there. Layers behind the last are named in a warning where they
    are of another make or the configuration knows of them.

    Args:
        names: of the checkpoint's tensors that the model has no place for.
    """
    blocks = find_blocks(model, given)
    modules = dict(model.named_modules())
    at = next(path for path, module in modules.items() if module is blocks)
    roots = ("", f"{model.base_model_prefix}.")  # a base model is also saved without its prefix
    spare, behind = [], {}
    for name in set(names) - {name for name, _ in model.named_buffers()}:
        parent = name.rpartition(".")[0]
        beside, _, last = parent.rpartition(".")
        if BUFFER.search(name) or TOWER.search(name):
            continue
        if found := NUMBER.search(name):
            if int(found[2]) < len(blocks):
                spare.append(name)
            elif f".{at}".endswith(f".{name[: found.end(1)]}"):
                behind.setdefault(int(found[2]), set()).add(name[found.end() :])
        elif any(root + parent in modules or (BESIDE.search(last) and root + beside in modules) for root in roots):
            spare.append(name)
    _check_none(spare, "has without a place for it", given)
    if behind:
        _check_behind(model, blocks, behind, given)


def _check_behind(model: nn.Module, blocks: nn.ModuleList, behind: Mapping[int, set[str]], given: str) -> None:
    own = {name for block in blocks for name in block.state_dict()}
    alike = [n for n, names in behind.items() if all(name in own or MLP.search(name) for name in names)]
    settings = model.config.get_text_config(decoder=True).to_dict()
    foretold = any(value for name, value in settings.items() if FORETOLD.search(name))
    numbers = ", ".join(map(str, sorted(behind)))
    said = f"{given}: the checkpoint has layers behind the {len(blocks)} that its config.json names: {numbers}"
    allowed(foretold or not alike, said, f"{max(behind) + 1} layers in config.json")
    warnings.warn(f"{said}; they are left out", stacklevel=2)


def _check_none(names: Iterable[str], what: str, given: str) -> None:
    names = sorted({name for name in names if not TOWER.search(name)})
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    cure = "the tensors of its class by their own names"
    allowed(not names, f"{given}: the checkpoint {what} {', '.join(names[:4])}{more}", cure)


def find_blocks(model: nn.Module, given: str = "the model") -> nn.ModuleList:
    """The list of transformer blocks: the `ModuleList` whose members all have an MLP.

    Towers for images and sound are passed over; `ValueError` where none is left, or several.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not TOWER.search(path)
        if all(mlps_of(block) for block in module)
    }
    allowed(bool(lists), f"{given} has no blocks with an MLP", ALLOWED)
    allowed(len(lists) == 1, f"{given} has several lists of blocks: {', '.join(lists)}", "one")
    return next(iter(lists.values()))


def mlps_of(block: nn.Module) -> dict[str, nn.Module]:
    """A block's MLPs by name; a norm before one, and what has no weights, is none."""
    named = ((n, m) for n, m in block.named_children() if MLP.search(n) and not n.endswith("norm"))
    return {name: module for name, module in named if next(module.parameters(), None) is not None}


@contextlib.contextmanager
def watched(block: nn.Module, site: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` with the activations of a site; what it returns, if anything, takes their place."""
    parts = list(mlps_of(block).values()) if site.startswith("mlp") else [block]
    if site in ("resid_pre", "mlp_in"):
        hook = _on_input(_once(function, len(parts)))
        handles = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in parts]
    else:
        hook = _on_output(_of_sum(function, len(parts)))
        handles = [part.register_forward_hook(hook) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _once(function: Callable, n: int) -> Callable:
    """`function`, called once for the one tensor that n modules are given."""
    given: list[tuple[Tensor, Tensor | None]] = []

    def each(value: Tensor) -> Tensor | None:
        first, new = given[0] if given else (value, function(value))
        same = value is first or (value.shape == first.shape and torch.equal(value, first))
        allowed(same, "MLPs side by side in a block are given different inputs", "one MLP, or several of one input")
        given.append((first, new))
        if len(given) == n:
            given.clear()
        return new

    return each


def _of_sum(function: Callable, n: int) -> Callable:
    """`function` of the sum of what n modules return: the last one returns that for all, the others zeros."""
    held: list[Tensor] = []

    def each(value: Tensor) -> Tensor:
        held.append(value)
        if len(held) < n:
            return torch.zeros_like(value)
        total = sum(held[1:], held[0])
        held.clear()
        new = function(total)
        return total if new is None else new

    return each if n > 1 else function


def _on_input(function: Callable) -> Callable:
    def hook(module, args, kwargs):
        value = args[0] if args else kwargs["hidden_states"]
        if (new := function(value)) is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(function: Callable) -> Callable:
    def hook(module, args, output):
        if not isinstance(output, tuple | list):
            return function(output)
        streams = getattr(output, "_fields", ())  # Reformer's has two
        allowed(not streams, f"{type(module).__name__} returns {', '.join(streams)}", "one residual stream")
        new = function(output[0])
        return None if new is None else type(output)([new, *output[1:]])

    return hook
