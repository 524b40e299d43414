"""One training step of a sparse student beside the straightforward one that gathers each token's expert weights, and
one that sorts tokens by expert for PyTorch's grouped product, as ScatterMoE does on a GPU.

All start from the same parameters; outputs and gradients are compared before anything is timed. Peak memory is that of
a fresh process for each, above what it holds once model and batch are there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from helpers import dictionary, settings, training

D_MODEL, BATCH, RANK = 640, 1024, 64
SIZES = {(1_000, 32): 2.5, (10_000, 64): 3.0, (100_000, 64): 3.0}
"""Experts and how many of them are active; how many times as long as ours gathering is to take."""


class Gathering(nn.Module):
    """The obvious implementation: embedding look-ups of the chosen experts' weights, and einsum."""

    def __init__(self, student: dictionary.RankOneDictionary):
        super().__init__()
        n, self.k = student.n_features, student.k
        self.down, self.router = nn.Linear(D_MODEL, RANK, bias=False), nn.Linear(RANK, n, bias=False)
        self.w_up, self.b_up, self.w_down = nn.Embedding(n, D_MODEL), nn.Embedding(n, 1), nn.Embedding(n, D_MODEL)
        self.shared = nn.Sequential(nn.Linear(D_MODEL, self.k), nn.GELU(), nn.Linear(self.k, D_MODEL))
        self.shared.load_state_dict(student.shared.state_dict())
        with torch.no_grad():
            for mine, theirs in self.pairs(student):
                mine.copy_(theirs.view_as(mine))

    def pairs(self, student: dictionary.RankOneDictionary) -> list[tuple[Tensor, Tensor]]:
        """Its parameters beside the family's."""
        return [
            (self.down.weight, student.router.down),
            (self.router.weight, student.router.weight),
            (self.w_up.weight, student.encoder.weight),
            (self.b_up.weight, student.encoder.bias),
            (self.w_down.weight, student.decoder.weight),
        ] + list(zip(self.shared.parameters(), student.shared.parameters(), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(self.down(x)).topk(self.k, dim=-1)
        pre_acts = torch.einsum("bd,bkd->bk", x, self.w_up(chosen)) + self.b_up(chosen)[..., 0]
        values = scores.softmax(-1) * F.gelu(pre_acts)
        return self.shared(x) + torch.einsum("bk,bkd->bd", values, self.w_down(chosen))


class Grouped(Gathering):
    """Tokens sorted by expert, and one product for each expert's: `grouped_mm` takes rows of at least 16 bytes, so the
    one neuron of an expert stands beside three of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(self.down(x)).topk(self.k, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        tokens, experts = order // self.k, chosen.flatten()[order]
        ends = torch.bincount(experts, minlength=len(self.w_up.weight)).cumsum(0).int()
        up = F.pad(self.w_up.weight[:, :, None], (0, 3))
        pre_acts = F.grouped_mm(x[tokens], up, offs=ends)[:, 0] + self.b_up(experts)[:, 0]
        values = scores.softmax(-1).flatten()[order] * F.gelu(pre_acts)
        down = F.pad(self.w_down.weight[:, None], (0, 0, 0, 3))
        found = F.grouped_mm(F.pad(values[:, None], (0, 3)), down, offs=ends)
        return self.shared(x).index_add(0, tokens, found)


def new_student(n: int, k: int) -> dictionary.RankOneDictionary:
    return dictionary.secret_moe(D_MODEL, D_MODEL, n, k, generator=settings.generator(0), router_rank=RANK)


def batches(batch: int = BATCH) -> training.Fresh:
    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(n, D_MODEL, generator=generator), torch.randn(n, D_MODEL, generator=generator)

    return training.Fresh(draw, batch_size=batch, fingerprint="normal pairs")


def ours(n: int, k: int, device: str = "cpu", batch: int = BATCH) -> Callable[[int], None]:
    stream = _Same(device, batch)
    return training.Run({"": new_student(n, k).to(device)}, stream, {"": training.Recipe(10**6)}).train_step


def gathering(
    n: int, k: int, fused: bool, device: str = "cpu", batch: int = BATCH, make: type[Gathering] = Gathering
) -> Callable[[int], None]:
    model, stream = make(new_student(n, k)).to(device), _Same(device, batch)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)

    def step(i: int) -> None:
        x, y = stream(i)
        optimiser.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimiser.step()

    return step


class _Same:
    """The first batch again and again, so that drawing it is not timed."""

    fingerprint = "one batch"

    def __init__(self, device: str = "cpu", batch: int = BATCH):
        self.batch = tuple(each.to(device) for each in batches(batch)(0))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.batch


IMPLEMENTATIONS = {
    "this book": ours,
    "gathers weights": lambda n, k: gathering(n, k, fused=False),
    "gathers weights + fused Adam": lambda n, k: gathering(n, k, fused=True),
    "grouped product + fused Adam": lambda n, k: gathering(n, k, fused=True, make=Grouped),
}
MOST_GROUPED = 10_000
"""Experts: of more, their zeros fill the memory of a laptop."""


def differences(n: int, k: int, make: type[Gathering] = Gathering) -> tuple[float, float]:
    """Largest difference of outputs and of gradients, each relative to the largest entry of its tensor."""
    student = new_student(n, k)
    model, (x, y) = make(student), batches()(0)
    outputs = [each(x) for each in (student, model)]
    for output in outputs:
        F.mse_loss(output, y).backward()
    gradients = [(mine.grad, theirs.grad.view_as(mine)) for mine, theirs in model.pairs(student)]

    def largest(a: Tensor, b: Tensor) -> float:
        return float((a - b).detach().abs().max() / b.detach().abs().max())

    return largest(*outputs), max(largest(*pair) for pair in gradients)


def _peak(name: str, n: int, k: int, answer) -> None:
    step = IMPLEMENTATIONS[name](n, k)
    before = common.memory("VmRSS")
    for i in range(3):
        step(i)
    answer.put(common.memory("VmHWM") - before)


def peak_memory(name: str, n: int, k: int) -> float:
    """MiB that three steps need beyond the model and the batch, gradients and optimiser state included."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(name, n, k, answer))
    process.start()
    peak = answer.get(timeout=300)
    process.join()
    return peak


def _best(times: Mapping[str, Mapping[str, float]]) -> float:
    return min(t["median"] for name, t in times.items() if name != "this book")


def main(repeats: int = 9) -> None:
    rows, targets = [], []
    for (n, k), goal in SIZES.items():
        grouped = n <= MOST_GROUPED
        pairs = zip(*(differences(n, k, make) for make in (Gathering, Grouped)[: 1 + grouped]), strict=True)
        output, gradient = map(max, pairs)
        timed = {name: make for name, make in IMPLEMENTATIONS.items() if grouped or "grouped" not in name}
        times = common.interleave({name: make(n, k) for name, make in timed.items()}, repeats=repeats)
        for name, t in times.items():
            peak = peak_memory(name, n, k)
            rows.append(
                {
                    "experts": n,
                    "active": k,
                    "what": name,
                    "ms": 1e3 * t["median"],
                    "iqr_ms": 1e3 * t["iqr"],
                    "peak MiB": peak,
                }
            )
        where = f"E={n:,}, k={k}"
        mine = times["this book"]["median"]
        targets += [
            common.at_most(f"{where}: largest relative difference of outputs", output, 1e-5),
            common.at_most(f"{where}: largest relative difference of gradients", gradient, 1e-4),
            common.at_least(f"{where}: steps/s over the best of the others", _best(times) / mine, goal),
        ]
    common.write(
        "students",
        title="One training step of a sparse student",
        question=f"How long is a step with Adam, d_model={D_MODEL}, batch={BATCH}, router rank {RANK}, float32?",
        rows=rows,
        targets=targets,
        note="Medians of interleaved repeats. Peak: resident memory beyond model and batch, in a process of its own.",
    )


if __name__ == "__main__":
    main()
