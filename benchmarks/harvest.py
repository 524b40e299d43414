"""Our harvest beside a plain forward with `output_hidden_states`: same texts, same rows, tokens a second and memory."""

from __future__ import annotations

import itertools
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common
from helpers.models import activations, corpora, teachers
from helpers.models.teachers import Teacher

LAYER, BATCH, MAX_LENGTH = 9, 16, 256
CORPUS = "wikipedia-sample"
SITES = ("resid_pre", "mlp_in", "mlp_out")


def n_tokens(teacher: Teacher) -> int:
    """Tokens of two blocks: a harvest computes whole ones, and keeps what was not asked for."""
    pieces = corpora.cut(teacher, CORPUS, "train", MAX_LENGTH)
    return sum(len(ids) for _, ids in itertools.islice(pieces, 2 * activations.BLOCK))


def ours(teacher: Teacher) -> torch.Tensor:
    """A whole harvest into an empty cache: tokenising, running, writing three sites. Returns the residual stream."""
    with tempfile.TemporaryDirectory() as cache:
        store = activations.harvest(
            teacher,
            layer=LAYER,
            sites=SITES,
            n_tokens=n_tokens(teacher),
            max_length=MAX_LENGTH,
            batch_size=BATCH,
            cache_dir=cache,
        )
        return store.tensor("resid_pre")


@torch.inference_mode()
def plain(teacher: Teacher, model: torch.nn.Module) -> torch.Tensor:
    """Every layer of every batch, texts in the order they come, padded to the longest; rows of text kept in memory."""
    texts = corpora.texts(teacher, CORPUS, n_tokens=n_tokens(teacher), max_length=MAX_LENGTH)
    rows = []
    for start in range(0, len(texts.tokens), BATCH):
        ids, mask = texts.padded(range(start, min(start + BATCH, len(texts.tokens))))
        states = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        rows.append(states[LAYER][teacher.rows_kept(ids, mask)])
    return torch.cat(rows)


WAYS: dict[str, Callable[[Teacher], torch.Tensor]] = {
    "our harvest": ours,
    "plain forward, no logits": lambda teacher: plain(teacher, teacher.model.base_model),
    "plain forward": lambda teacher: plain(teacher, teacher.model),
}


def floor(teacher: Teacher, repeats: int = 11) -> float:
    """Tokens a second if the blocks up to the layer were products alone, at the rate of their largest in float32.

    Two operations for each weight of a block's matrices; attention, norms and activations cost nothing here.
    """
    blocks = teacher.blocks[: LAYER + 1]
    matrices = [part.weight for block in blocks for part in block.modules() if isinstance(part, torch.nn.Linear)]
    largest = max(matrices, key=torch.Tensor.numel)
    x = torch.randn(4096, largest.shape[1])
    with torch.inference_mode():
        times = common.interleave({"product": lambda turn: torch.nn.functional.linear(x, largest)}, repeats)
    rate = 2 * len(x) * largest.numel() / times["product"]["median"]
    return rate / sum(2 * each.numel() for each in matrices)


def own_peak() -> int:
    """Peak resident bytes of this process; `getrusage` would count those of the process that started it as well."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def peak_bytes(way: str) -> int:
    """Peak resident memory of a process of its own that does this once."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.harvest", way], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(repeats: int = 3) -> None:
    teacher = teachers.load(device="cpu")
    wanted = plain(teacher, teacher.model.base_model)
    difference = float((ours(teacher) - wanted).abs().max() / wanted.abs().max())
    seconds = common.interleave(
        {way: lambda turn, run=run: run(teacher) for way, run in WAYS.items()}, repeats, warmup=0
    )
    n = n_tokens(teacher)
    speed = {way: n / time["median"] for way, time in seconds.items()}
    memory = {way: peak_bytes(way) / 1e9 for way in WAYS}
    bottom = floor(teacher)
    table = [
        {"way": way, "tokens / s": speed[way], "iqr (s)": seconds[way]["iqr"], "peak memory (GB)": memory[way]}
        for way in WAYS
    ]
    table.append({"way": "floor: products alone", "tokens / s": bottom, "iqr (s)": None, "peak memory (GB)": None})
    common.write(
        "harvest",
        title="Harvest",
        question=f"How fast do activations of Gemma 3 270M at layer {LAYER} of {teacher.n_layers} come, float32, "
        f"{n:,} tokens of the Wikipedia sample in batches of {BATCH}?",
        rows=table,
        targets=[
            common.at_most("largest difference of the residual stream, relative", difference, 1e-4),
            common.at_least("harvest speed / plain forward", speed["our harvest"] / speed["plain forward"], 2),
            common.at_least(
                "harvest speed / plain forward without logits",
                speed["our harvest"] / speed["plain forward, no logits"],
                3,
            ),
            common.at_most("floor / harvest speed", bottom / speed["our harvest"], 1.3),
            common.at_most("peak memory of a harvest, GB", memory["our harvest"], 3),
        ],
        note=f"{common.processor()}. Each way tokenises the same texts. Ours also writes three sites to disk with "
        "checksums; the plain ways keep one in memory. Memory: peak of a process that does it once, with imports and "
        f"weights. Floor: the matrices of the {LAYER + 1} blocks that are needed, at the rate of the largest.",
        device="cpu",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        WAYS[sys.argv[1]](teachers.load(device="cpu"))
        print(own_peak())
    else:
        main()
