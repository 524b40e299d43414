"""Router rows and PC1 of W_down of three OLMoE-1B-7B-sized layers: by byte ranges, and through the built model.

The checkpoint is synthetic: three layers with the sizes of OLMoE-1B-7B (a small vocabulary beside them), bfloat16,
names and sharding as on the hub. The other way loads it with `transformers` and calls `torch.linalg.svd` on a few
experts, whose time is scaled up to all of them. Both run in fresh processes, in turns, and read a warm page cache.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from helpers import settings
from helpers.models import checkpoints, directions

LAYERS, EXPERTS, D_MODEL, D_FF, VOCABULARY = 3, 64, 2048, 1024, 1024
SAMPLED, MOST = 6, 512
"""Experts that the other ways decompose, spread over the layers; iterations after which a randomized one gives up."""
SPECTRA = ("noise", "steep")
"""Gaussian entries, as at initialisation (the slowest case: σ₁ hardly stands out); σ falling like i^-½."""


def write_checkpoint(folder: Path, spectrum: str) -> None:
    from safetensors.torch import save_file
    from transformers import OlmoeConfig

    sizes = dict(hidden_size=D_MODEL, intermediate_size=D_FF, num_experts=EXPERTS)
    sizes |= dict(num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    OlmoeConfig(**sizes, **ends, architectures=["OlmoeForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    generator, weight_map = settings.generator(0), {}

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    scale = torch.ones(D_FF) if spectrum == "noise" else torch.arange(1, D_FF + 1).float().rsqrt()
    outside = {"model.embed_tokens.weight": random(VOCABULARY, D_MODEL), "lm_head.weight": random(VOCABULARY, D_MODEL)}
    shard("outside.safetensors", outside | {"model.norm.weight": torch.ones(D_MODEL).bfloat16()})
    for n in range(LAYERS):
        stem = f"model.layers.{n}."
        rest = {f"{stem}self_attn.{p}_proj.weight": random(D_MODEL, D_MODEL) for p in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        rest |= {f"{stem}{norm}.weight": torch.ones(D_MODEL).bfloat16() for norm in norms}
        shard(f"layer-{n}.safetensors", rest | {f"{stem}mlp.gate.weight": random(EXPERTS, D_MODEL)})
        for first in range(0, EXPERTS, 16):
            experts = {}
            for e in range(first, first + 16):
                for part in ("gate", "up"):
                    experts[f"{stem}mlp.experts.{e}.{part}_proj.weight"] = random(D_FF, D_MODEL)
                down = (random(D_MODEL, D_FF).float() * scale).bfloat16()
                experts[f"{stem}mlp.experts.{e}.down_proj.weight"] = down
            shard(f"layer-{n}-experts-{first}.safetensors", experts)
    (folder / checkpoints.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sampled() -> list[tuple[int, int]]:
    """(layer, expert) of those that the other way decomposes."""
    return [(i % LAYERS, i * EXPERTS // SAMPLED) for i in range(SAMPLED)]


def by_ranges(folder: Path) -> dict:
    started = time.perf_counter()
    layers = checkpoints.read(folder, range(LAYERS))
    read = time.perf_counter()
    found = [checkpoints.principal(layer, device="cpu") for layer in layers]
    ended = time.perf_counter()
    directions = [found[n].directions[e, 0].tolist() for n, e in sampled()]
    shares = [found[n].shares[e, 0].item() for n, e in sampled()]
    residual = max(float(f.residuals.max()) for f in found)
    return {"load": read - started, "pc1": ended - read} | dict(u=directions, share=shares, residual=residual)


def by_model(folder: Path) -> dict:
    from transformers import OlmoeForCausalLM  # named, so that its import is not timed

    started = time.perf_counter()
    model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    loaded = time.perf_counter()
    found = []
    for n, e in sampled():
        u, sigma, _ = torch.linalg.svd(model.model.layers[n].mlp.experts.down_proj[e].float(), full_matrices=False)
        found.append((u[:, 0], float(sigma[0] ** 2 / sigma.square().sum())))
    seconds = (time.perf_counter() - loaded) * LAYERS * EXPERTS / SAMPLED
    pairs = zip(sampled(), found, strict=True)
    worst = max(residual(model.model.layers[n].mlp.experts.down_proj[e].float(), u) for (n, e), (u, _) in pairs)
    vectors, shares = [u.tolist() for u, _ in found], [share for _, share in found]
    return {"load": loaded - started, "pc1": seconds, "u": vectors, "share": shares, "residual": worst}


def residual(w: torch.Tensor, u: torch.Tensor) -> float:
    """‖WWᵀu − σ²u‖/σ² with σ² = uᵀWWᵀu, as `directions` checks it."""
    image = w @ (w.T @ u)
    return float((image - (u @ image) * u).norm() / (u @ image))


def by_library(folder: Path) -> dict:
    """PC1 of the sampled experts by randomized methods, each with the fewest iterations (a power of two) that keep the
    residual below the tolerance for all of them; seconds for as many experts as all layers have."""
    from sklearn.utils.extmath import randomized_svd

    def torchs(w: torch.Tensor, iterations: int) -> torch.Tensor:
        return torch.svd_lowrank(w, q=6, niter=iterations)[0][:, 0]

    def sklearns(w: torch.Tensor, iterations: int) -> torch.Tensor:
        options = {"n_components": 1, "n_oversamples": 5, "n_iter": iterations, "random_state": 0}
        return torch.from_numpy(randomized_svd(w.numpy(), **options)[0][:, 0].copy())

    layers = checkpoints.read(folder, range(LAYERS))
    experts = [next(layers[n].weights(experts=[e]))[0] for n, e in sampled()]
    found = {}
    for name, method in {"torch.svd_lowrank": torchs, "sklearn randomized_svd": sklearns}.items():
        iterations, worst = 4, math.inf
        while worst > directions.TOLERANCE and iterations < MOST:
            iterations *= 2
            torch.manual_seed(0)
            started = time.perf_counter()
            vectors = [method(w, iterations) for w in experts]
            seconds = (time.perf_counter() - started) * LAYERS * EXPERTS / SAMPLED
            worst = max(map(residual, experts, vectors))
        found[f"{name}, {iterations} iterations"] = {"pc1": seconds, "residual": worst}
    return {"found": found}


WAYS = {"byte ranges, block Krylov": by_ranges, "model, SVD of each expert": by_model}


def own_peak() -> float:
    """Peak resident memory of this process in GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def in_fresh_process(*arguments: str) -> dict:
    """What this module prints last when it is run with these arguments."""
    command = [sys.executable, "-m", "benchmarks.checkpoints", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def measure(spectrum: str, repeats: int) -> tuple[list[dict], list[dict]]:
    runs, library = {way: [] for way in WAYS}, []
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process("write", folder, spectrum)
        for _ in range(repeats):
            for way in WAYS:
                runs[way].append(in_fresh_process(way, folder))
            library.append(in_fresh_process("library", folder)["found"])
    rows, total = [], {}
    for way, times in runs.items():
        load, pc1, peak = (statistics.median(run[key] for run in times) for key in ("load", "pc1", "peak"))
        total[way] = statistics.median(run["load"] + run["pc1"] for run in times)
        row = {"W_down": spectrum, "way": way, "load (s)": load, "PC1 (s)": pc1, "both (s)": total[way]}
        rows.append(row | {"peak memory (GB)": peak, "residual": max(run["residual"] for run in times)})
    mine, theirs = (runs[way][0] for way in WAYS)
    blank = dict.fromkeys(("load (s)", "both (s)", "peak memory (GB)"))
    peers = {name: [each[name] for each in library] for name in library[0]}
    for name, found in peers.items():
        row = {"way": name, "PC1 (s)": statistics.median(each["pc1"] for each in found)}
        row |= {"residual": max(each["residual"] for each in found)}
        rows.append({column: (blank | row | {"W_down": spectrum})[column] for column in rows[0]})
    share = max(abs(a / b - 1) for a, b in zip(mine["share"], theirs["share"], strict=True))
    ratio = total["model, SVD of each expert"] / total["byte ranges, block Krylov"]
    best = min(row["PC1 (s)"] for row in rows[1:] if row["residual"] <= 2 * directions.TOLERANCE)
    targets = [
        common.at_least(f"{spectrum}: model and SVD / byte ranges and block Krylov, time", ratio, 5),
        common.at_least(
            f"{spectrum}: best of three methods for PC1 / ours, time of PC1 alone", best / rows[0]["PC1 (s)"], 5
        ),
        common.at_most(f"{spectrum}: peak memory by byte ranges, GB", rows[0]["peak memory (GB)"], 1.5),
        common.at_most(f"{spectrum}: largest residual ‖WWᵀu − σ²u‖/σ₁²", mine["residual"], directions.TOLERANCE),
        common.at_most(f"{spectrum}: share of PC1, largest relative difference from SVD", share, 1e-5),
    ]
    if spectrum == "steep":  # noise has a second direction so near that no float32 method tells the first exactly
        cosines = (torch.tensor(mine["u"]) * torch.tensor(theirs["u"])).sum(1).abs()
        targets.append(common.at_most(f"{spectrum}: 1 − |cosine| with SVD's PC1", float(1 - cosines.min()), 1e-5))
    return rows, targets


def main(repeats: int = 3) -> None:
    results = [measure(spectrum, repeats) for spectrum in SPECTRA]
    common.write(
        "checkpoints",
        title="PC1 of the experts of a checkpoint",
        question=f"How long do router rows and PC1 of W_down take for {LAYERS} layers of {EXPERTS} experts, "
        f"d_model={D_MODEL}, d_ff={D_FF}, bfloat16 on disk, float32 arithmetic?",
        rows=[row for rows, _ in results for row in rows],
        targets=[target for _, targets in results for target in targets],
        note=f"Synthetic weights. “noise”: Gaussian W_down, the slowest case; “steep”: columns scaled by i^-½. The SVD "
        f"was timed on {SAMPLED} experts and scaled to {LAYERS * EXPERTS}; the model holds these {LAYERS} layers only, "
        "where the real one has 16 to load. Fresh processes in turns; files in the page cache; imports are not timed, "
        "and are counted in memory.",
        device="cpu",
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["write", folder, spectrum]:
            write_checkpoint(Path(folder), spectrum)
            print("{}")
        case [way, folder]:
            result = (WAYS | {"library": by_library})[way](Path(folder))
            print(json.dumps(result | {"peak": own_peak()}))
