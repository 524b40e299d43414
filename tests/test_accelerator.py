"""Code for a GPU, on a stand-in (`tests/accelerator.py`): the CPU's numbers, on the right device, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves

from helpers import settings, training
from helpers.dictionary import (
    RankOneDictionary,
    Rows,
    Select,
    dense_mlp,
    expander_sae,
    gated_sae,
    pursuit,
    sae_to_moe,
    secret_moe,
    topk_sae,
)
from helpers.dictionary.family import ACTIVATIONS, GATES
from helpers.kept import Kept
from helpers.models import activations, checkpoints, layerwise, teachers
from helpers.models.teachers import Teacher
from helpers.parts import (
    audit,
    distilling,
    gaps,
    inside,
    language_model,
    lens,
    masks,
    mixture,
    own_codes,
    rivals,
    stand_ins,
    storage,
)
from helpers.study.scores import evaluate
from helpers.study.study import Arm, run
from helpers.study.study import trained as trained_alone
from helpers.training import Fresh, Run, Shuffled, fit, remedies
from tests import tiny
from tests.accelerator import Accelerator, accelerator, left_behind, on_cpu

D, N, K = 12, 32, 4


@pytest.fixture
def machine():
    with accelerator("cuda:1") as there:
        yield there


# -- the stand-in itself -----------------------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_a_gpu_refuses(machine: Accelerator):
    there, here, other = torch.ones(3, device="cuda:1"), torch.ones(3), torch.ones(3, device="cuda")
    assert (there.device, other.device, there[0].device) == (machine.device, torch.device("cuda:0"), machine.device)
    refused = [
        lambda: there + here,
        lambda: there @ other,
        lambda: torch.cat([there, here]),
        lambda: there[torch.arange(2)],
        lambda: there.numpy(),
        lambda: torch.nn.functional.linear(there, torch.ones(2, 3)),
        lambda: torch.randn(3, device="cuda:1", generator=settings.generator(0)),
        lambda: torch.randn(3, generator=settings.generator(0, "cuda:1")),
    ]
    for each in refused:
        with pytest.raises((RuntimeError, TypeError), match="device|numpy"):
            each()
    assert not machine.read
    assert (there + torch.tensor(2.0)).device == machine.device


def test_the_stand_in_counts_what_crosses_to_the_cpu(machine: Accelerator):
    there = torch.arange(4.0).to("cuda:1")
    total = float(there.sum()) + sum(there.tolist()) + there.cpu().sum() + there.to("cpu")[0]
    torch.zeros(4).copy_(there)
    assert total == 18 and machine.read == {"test": 5}


def test_an_mps_has_no_float64():
    with accelerator("mps"):
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, device="mps").double()
        assert torch.ones(2, device=settings.device("mps")).sum() == 2


def test_names_of_devices():
    with accelerator("cuda:1"):
        assert [settings.device(name) for name in ("auto", "cuda:1")] == [torch.device("cuda"), torch.device("cuda:1")]
        for name in ("cuda:2", "mps"):
            with pytest.raises(ValueError, match="not on this machine"):
                settings.device(name)
    with accelerator("mps"):
        assert settings.device("mps").type == "mps"


# -- the family --------------------------------------------------------------------------------------------------------


def packed_rows(degree: int) -> torch.Tensor:
    return torch.stack([torch.randperm(D, generator=settings.generator(i))[:degree] for i in range(N)])


def ruled(rule: str, **numbers) -> Callable[[torch.Generator], RankOneDictionary]:
    return lambda g: topk_sae(D, N, K, generator=g, select=Select(rule, N, **numbers), dtype=torch.float64)


def gate(name: str) -> Callable[[torch.Generator], RankOneDictionary]:
    def build(g: torch.Generator) -> RankOneDictionary:
        model = secret_moe(D, D, N, K, generator=g, dtype=torch.float64)
        model.gate = name
        return model

    return build


def act(name: str) -> Callable[[torch.Generator], RankOneDictionary]:
    return lambda g: topk_sae(D, N, K, generator=g, activation=name, tied=True, dtype=torch.float64)


def ranked(g: torch.Generator) -> RankOneDictionary:
    """Two atoms an expert."""
    how = {"generator": g, "device": g.device, "dtype": torch.float64}
    router, encoder, decoder = (Rows(torch.randn(n, D, **how)) for n in (N // 2, N, N))
    return RankOneDictionary(encoder, decoder, k=K, router=router, gate="softmax", expert_rank=2)


DOUBLE = {"dtype": torch.float64}
MODELS = {
    "token": ruled("token"),
    "batch": ruled("batch"),
    "threshold": ruled("threshold", threshold=0.1, bandwidth=0.2),
    "atom": ruled("atom"),
    "groups": ruled("groups", n_groups=8, groups=3),
    "always": ruled("always", always=2),
    "positive": ruled("positive"),
    "magnitude": ruled("magnitude"),
    **{f"gate {name}": gate(name) for name in GATES},
    **{f"activation {name}": act(name) for name in ACTIVATIONS},
    "bias": lambda g: topk_sae(D, N, K, generator=g, selection_bias=True, b_dec=torch.ones(D), **DOUBLE),
    "gated": lambda g: gated_sae(D, N, K, generator=g, **DOUBLE),
    "gathered": lambda g: expander_sae(packed_rows(3), D, K, generator=g, **DOUBLE),
    "tiled": lambda g: expander_sae(packed_rows(9), D, K, generator=g, degrees=torch.arange(N) % 9 + 1, **DOUBLE),
    "mixture": lambda g: sae_to_moe(topk_sae(D, N, K, generator=g, **DOUBLE)),
    "low rank": lambda g: secret_moe(D, D, N, K, generator=g, router_rank=3, **DOUBLE),
    "alone": lambda g: secret_moe(D, D, N, K, generator=g, shared_neurons=0, **DOUBLE),
    "rank 2": ranked,
    "dense": lambda g: dense_mlp(D, D, 7, generator=g, **DOUBLE),
}


def used(model: RankOneDictionary, x: torch.Tensor) -> dict:
    """What a model says of x, in training and behind it, and all gradients."""
    trace = model.trace(x, score_gradient=True)
    (trace.output.square().sum() + trace.scores.square().sum()).backward()
    sparse = model(x)
    sparse.square().sum().backward()
    model.constrain_gradient_()
    found = {"gradients": {name: p.grad for name, p in model.named_parameters()}, "output": trace.output.detach()}
    found["values"], found["constrained"] = trace.codes.values.detach(), model.constrain_()
    codes = model.eval().encode(x)
    found["codes"] = codes.indices, codes.values.detach(), codes.firing_counts(model.n_atoms)
    found["decoded"] = model.decode(codes).detach()
    return found | {"after": dict(model.state_dict())}


READS = dict.fromkeys(("batch", "threshold", "atom", "positive", "gated"), {"select.py:_widest"})
READS |= dict.fromkeys(("batch", "threshold"), {"select.py:_widest", "select.py:_reaching"})


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_the_same_there(name):
    x = torch.randn(20, D, generator=settings.generator(9), dtype=torch.float64)
    expected = used(MODELS[name](settings.generator(0)), x)
    for built in ("there", "moved"):
        with accelerator() as machine:
            if built == "there":
                model = MODELS[name](settings.generator(0, machine.device))
            else:
                model = MODELS[name](settings.generator(0)).to(machine.device)
            assert not left_behind(model, machine.device)
            machine.read.clear()
            found = used(model, x.to(machine.device))
            assert set(machine.read) <= {f"dictionary/{place}" for place in READS.get(name, ())}
            assert not left_behind(found, machine.device)
        torch.testing.assert_close(on_cpu(found), expected, rtol=1e-10, atol=1e-10)


# -- training ----------------------------------------------------------------------------------------------------------

STEPS, BATCH = 12, 16


def data() -> torch.Tensor:
    mix = torch.randn(D, D, generator=settings.generator(1)) * torch.arange(1, D + 1).rsqrt()
    return torch.randn(200, D, generator=settings.generator(2)) @ mix + 1


def sae(rule: str = "token", **options) -> RankOneDictionary:
    model = topk_sae(D, N, K, generator=settings.generator(0), b_dec=torch.ones(D), select=Select(rule, N), **options)
    with torch.no_grad():
        model.encoder.weight[: N // 2] *= 0.01  # silent, until a remedy finds them
    return model


REMEDIES = {
    "none": (sae, remedies.Balance()),
    "Switch": (sae, remedies.Switch(0.1)),
    "z-loss": (sae, remedies.ZLoss()),
    "loss-free": (lambda: sae(selection_bias=True), remedies.LossFree()),
    "frequency": (sae, rivals.Frequency(0.1)),
    "aligned": (sae, rivals.Aligned()),
    "AuxK": (sae, remedies.AuxK(silent_for=2)),
    "ghost": (sae, remedies.Ghost(silent_for=2)),
    "resampling": (sae, remedies.Resample(every=4)),
    "resampling residuals": (sae, remedies.Resample(every=4, toward="residual", power=1)),
    "annealing": (sae, remedies.Anneal()),
    "nested": (sae, remedies.Nested((8, 16))),
    "L0": (lambda: sae("threshold"), remedies.TargetL0(3)),
    "gated": (lambda: gated_sae(D, N, K, generator=settings.generator(0)), remedies.Gated(0.1)),
    "BatchTopK": (lambda: sae("batch"), remedies.Balance()),
    "together": (sae, remedies.Together(remedies.AuxK(silent_for=2), remedies.During(remedies.Switch(0.1), 0.2, 0.8))),
    "packed": (lambda: expander_sae(packed_rows(9), D, K, generator=settings.generator(0)), remedies.Resample(every=4)),
    "clipped": (sae, remedies.Balance()),
}
WIDE = ("dictionary/select.py:_widest", "dictionary/select.py:_reaching")
ACTS = {"training/remedies.py:after_step": 4, "training/remedies.py:_starts": 2}
FETCHED = {  # of what a step does, besides the loss that is logged
    "gated": {"dictionary/select.py:_widest": STEPS},  # how wide a batch's codes are
    # and whether the few best of each row are enough; for thresholds that start low they are not
    "BatchTopK": dict(zip(WIDE, (STEPS + 4, STEPS), strict=True)),  # in four steps they are not
    "L0": dict(zip(WIDE, (2 * STEPS, STEPS), strict=True)),
    **dict.fromkeys(("resampling", "resampling residuals", "packed"), ACTS),  # at the two steps where atoms start anew
}


def trained(name: str, where: torch.device | str, **options) -> training.Fit:
    build, remedy = REMEDIES[name]
    stream = Shuffled(data(), batch_size=BATCH, device=where)
    clip = 0.5 if name == "clipped" else None
    how = {"steps": STEPS, "log_every": 5, "lr": 1e-2, "clip": clip, "balance": remedy}
    return fit(build().to(where), stream, **(how | options))


@pytest.mark.parametrize("name", REMEDIES)
def test_every_remedy_trains_there(name):
    expected = trained(name, "cpu")
    with accelerator() as machine:
        whole = trained(name, machine.device)
        fetched = machine.read
        assert fetched.pop("training/loop.py:_update") == 4  # the loss is logged at steps 0, 5, 10 and 11
        fetched.pop("training/loop.py:variance")  # once, before the first step
        assert fetched == FETCHED.get(name, {})
        assert not left_behind(whole.student, machine.device)
        state = on_cpu(dict(whole.student.state_dict()))
    assert whole.loss == pytest.approx(expected.loss, rel=1e-4)
    torch.testing.assert_close(state, dict(expected.student.state_dict()), rtol=1e-3, atol=1e-4)


def begun(name: str, where: torch.device | str, stored) -> Run:
    """A training that has taken up what is stored, in whose place it keeps its own."""
    build, remedy = REMEDIES[name]
    recipe = training.Recipe(STEPS, lr=1e-2, balance=remedy)
    run = Run({"": build().to(where)}, Shuffled(data(), batch_size=BATCH, device=where), {"": recipe}, log_every=1)
    run.stores = {"": stored(run)}
    run.load()
    return run


def finished(name: str, where: torch.device | str, stored) -> tuple[list[float], dict]:
    run = begun(name, where, stored)
    run.advance("", 1e9)
    apart = [run.students[""], run.optimisers[""], run.silent]
    assert not [each for one in apart for each in left_behind(one, where)]
    return run.fits[""].loss, on_cpu(dict(run.students[""].state_dict()))


@pytest.mark.parametrize("name", ["AuxK", "resampling", "BatchTopK", "packed", "loss-free"])
@pytest.mark.parametrize(("first", "second"), [("cuda:1", "cuda:1"), ("cuda:1", "cpu"), ("cpu", "cuda:1")])
def test_a_checkpoint_goes_on_anywhere(name, first, second, tmp_path):
    with accelerator():
        expected = finished(name, "cpu", lambda run: run.kept("", tmp_path / "whole"))
        half = begun(name, first, lambda run: run.kept("", tmp_path / "half"))
        for step in range(7):
            half.train_step(step)
        half.save([""])
        found = finished(name, second, lambda run: half.stores[""])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_streams_draw_there(machine: Accelerator):
    rows, targets = Shuffled(data(), data()[:, :3], batch_size=BATCH, device=machine.device, divided_by=2.0)(3)
    drawn, same = Fresh(lambda n, g: torch.randn(n, 2, generator=g, device=g.device), batch_size=9, fingerprint="x")(1)
    there = Fresh(
        lambda n, g: torch.randn(n, 2, generator=g, device=g.device), batch_size=9, fingerprint="x", device="cuda:1"
    )(1)
    assert not left_behind([rows, targets, there], machine.device) and same is drawn
    torch.testing.assert_close(on_cpu(there[0]), drawn)  # the stand-in draws the CPU's numbers


def test_an_mps_trains_and_judges():
    expected = trained("resampling", "cpu")
    with accelerator("mps"):
        found = trained("resampling", "mps")
        judged = on_cpu(evaluate(found.student, data()))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert judged.fvu == pytest.approx(evaluate(expected.student, data()).fvu, rel=1e-3)


# -- half precision ----------------------------------------------------------------------------------------------------

SINGLE = {name: build for name, build in MODELS.items() if not name.startswith(("gate", "activation"))}


@pytest.mark.parametrize("name", SINGLE)
def test_every_model_learns_the_same_in_bfloat16(name):
    """Within 2 % over three seeds; one alone may end 5 % better or worse, since which atoms are chosen drifts apart."""
    ratios = []
    for seed in range(3):
        loss = {}
        for precision in (None, torch.bfloat16):
            model = SINGLE[name](settings.generator(seed)).float()
            stream = Shuffled(data(), batch_size=64, seed=seed)
            result = fit(model, stream, steps=200, lr=1e-2, log_every=1, autocast=precision)
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
            loss[precision] = np.mean(result.loss[-20:])
        ratios.append(loss[torch.bfloat16] / loss[None])
    assert np.mean(ratios) == pytest.approx(1, rel=0.02)


def test_products_are_halved_there_too():
    found = {where: None for where in ("cpu", "cuda:1")}
    with accelerator():
        for where in found:
            found[where] = trained("none", where, autocast=torch.bfloat16).loss
    assert found["cpu"] == pytest.approx(found["cuda:1"], rel=0.02)
    assert found["cuda:1"] != trained("none", "cpu").loss


# -- what chapters do with their `device` ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """A folder with a text, a tiny random mixture of experts and a tiny Llama; what is harvested lies beside them."""

    folder: Path
    where: str = "cpu"

    @property
    def cache(self) -> Path:
        return self.folder / self.where.replace(":", " ")

    @property
    def device(self) -> torch.device:
        return settings.device(self.where)

    @property
    def corpus(self) -> str:
        return str(self.folder / "text.jsonl")

    def teacher(self, name: str) -> Teacher:
        return teachers.load(str(self.folder / name), device=self.where)

    def stores(self, name: str) -> dict[str, activations.ActivationStore]:
        sizes = {"train": 400, "validation": 150, "test": 120}
        about = {"layer": 1, "sites": ("resid_post", "mlp_in", "mlp_out"), "cache_dir": self.cache}
        model = self.teacher(name)
        return {
            split: activations.harvest(model, self.corpus, n_tokens=n, split=split, **about)
            for split, n in sizes.items()
        }

    def problem(self, kind=language_model.SiteRows, name: str = "llama", site: str = "resid_post", *more):
        return kind({split: str(each.folder) for split, each in self.stores(name).items()}, site, 12, 64, *more)

    def ran(self, problem, *arms: Arm) -> list:
        exact = [replace(arm, recipe=arm.recipe | {"autocast": None}) for arm in arms]
        outcomes = run(problem, exact, 0, device=self.where, cache_dir=self.cache)
        return [[each.sums, each.validation, each.about, each.curve] for each in outcomes]

    def bench(self) -> inside.LayerRows:
        moe, stores = checkpoints.read(self.folder / "moe", [1])[0], self.stores("moe")
        return inside.LayerRows(moe, stores["train"], stores["validation"], rank=2, device=self.where)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("home")
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    config = transformers.OlmoeConfig(**sizes, num_experts=6, num_experts_per_tok=2, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(place / "moe")
    tiny.tokenizer(bos=True).save_pretrained(place / "moe")
    tiny.save(place / "llama", "llama")
    paragraphs = enumerate(tiny.text(300).split("\n\n"))
    rows = (json.dumps({"article": i // 3, "title": i // 3, "text": each}) for i, each in paragraphs)
    (place / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return place


def harvested(home: Home) -> list:
    return [store.tensor(site) for store in home.stores("moe").values() for site in store.sites]


def layer_by_layer(home: Home) -> list:
    model = layerwise.load(str(home.folder / "moe"), device=home.where)
    store = activations.harvest(model, home.corpus, layer=1, n_tokens=150, cache_dir=home.cache)
    return [store.tensor(site) for site in store.sites]


def spliced(home: Home) -> list:
    model, sae = home.teacher("llama"), topk_sae(16, N, K, generator=settings.generator(0)).to(home.device)
    functions, mean = {"": lambda rows: sae(rows)}, torch.ones(16).to(home.device)
    about = {"corpus": home.corpus, "n_tokens": 120, "layer": 1, "sites": ("resid_post", "resid_post")}
    random = language_model.by_article(model.randomised(0), activations.loss_texts(model, home.corpus, 120))
    return [audit.losses(model, functions, mean=mean, **about), random.nats.to_numpy()]


def audited(home: Home) -> list:
    store = home.stores("llama")["test"]
    sae, x = topk_sae(16, N, K, generator=settings.generator(0)).to(home.device), store.tensor("resid_post")
    found = audit.measured(sae, x, x, store.article)
    return [found.sums, found.codes, found.gap]


def studied(home: Home) -> list:
    switch = remedies.Switch(0.1)
    arms = Arm("plain", language_model.Sae(32, 3), lr=3e-2), Arm("switch", language_model.Sae(32, 3), switch, 1e-2)
    return home.ran(home.problem(), *arms)


def in_passages(home: Home) -> list:
    about = str(home.folder / "llama"), home.corpus, 1, "resid_post", 110, "test", home.where, str(home.cache)
    passage = language_model.Passage(*about)
    problem = home.problem(storage.Spliced, "llama", "resid_post", passage, language_model.WAYS)
    return home.ran(problem, Arm("expander", storage.Shape(48, 3, "expander", 4), lr=1e-2))


def stored(home: Home) -> list:
    problem, found = home.problem(), []
    for kind in storage.SHAPES:
        shape = storage.Shape(48, 3, kind, None if kind in ("dense", "untied") else 4)
        arm = storage.arm(shape, storage.recipe(shape, 12), 1e-3, 12)
        exact = [
            None if each is None else replace(each, recipe=each.recipe | {"autocast": None})
            for each in (arm, arm.first)
        ]
        found.append(
            trained_alone(problem, replace(exact[0], first=exact[1]), 0, device=home.where, cache_dir=False).loss
        )
    return found


def on_the_ladder(home: Home) -> list:
    bench = home.bench()
    found = [each.explained for each in inside.ladder(bench, [0], ranks=(1, 2)).values()]
    found += [each.explained for each in own_codes.by_rule(bench, [0]).values()]
    sae = inside.implicit_sae(bench.moe, bench.directions[:, :1]).to(bench.device)
    found += [bench.load, inside.overlap(bench, [0]), sae(bench.rows("judging", "mlp_in", False)).detach()]
    return [*found, lens.lens(home.teacher("moe"), lens.oriented(bench))]


def in_gaps(home: Home) -> list:
    sizes = {"train": 400, "validation": 120, "test": 120}
    about = {"layer": 1, "sizes": sizes, "max_length": 16, "cache_dir": home.cache}
    layer, found = gaps.FrozenLayer(home.teacher("llama"), home.corpus, **about), []
    for objective, signal in (("predict", "local"), ("reconstruct", max(stand_ins.SIGNALS, key=stand_ins.SIGNALS.get))):
        kinds = ("mixture", "topk", *(["from weights"] if objective == "predict" else []))
        builds = {kind: stand_ins.family(kind, 4, 8).build for kind in kinds}
        arms = [Arm(name, build, stand_ins.EndToEnd(signal, 0.1), 1e-2) for name, build in builds.items()]
        found += home.ran(gaps.StandIn(layer, objective, 4, 8), *arms)
    return found


def distilled(home: Home) -> list:
    how = {"steps": 8, "batch_size": 32, "cache_dir": home.cache}
    task = distilling.Task(home.teacher("llama"), 1, home.stores("llama"), **how)
    balanced = distilling.Spec(4, 8, router_rank=None, balance=remedies.LossFree())
    specs = distilling.Spec(4, 8, router_rank=2), distilling.Spec(4), balanced
    return home.ran(task, *(Arm(spec.label, spec, spec.balance, 1e-2) for spec in specs))


def pretrained(home: Home, steps: int = 3) -> list:
    size = mixture.Size(d_model=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, d_ff=8, vocabulary=300)
    words = mixture.tokenizer(home.corpus, 300, cache_dir=home.cache)
    recipe = mixture.PretrainingRecipe(steps=50, lr=1e-2, warmup=1)
    training = mixture.Pretraining(size.mixture().to(home.device), words, recipe, Kept("mixture", 0))
    texts = mixture.TokenBatches(mixture.paragraphs(words, home.corpus), batch_size=4, length=16)
    losses = []
    for training.step in range(steps):
        losses.append(training.update(texts.batch(training.step)))
    assert not left_behind([losses, dict(training.model.state_dict())], home.device)
    assert not left_behind(training.optimiser, home.device)
    return losses


def pursued(home: Home) -> list:
    g, found = settings.generator(0), []
    x, dense = torch.randn(30, 16, generator=g).to(home.device), torch.randn(64, 16, generator=g)
    packed = expander_sae(masks.left_regular(40, 16, 4, g), 16, K, generator=g).to(home.device).decoder
    dense = torch.nn.functional.normalize(dense, dim=1).to(home.device)
    ways = {"select": "signed"}, {"nonnegative": True}, {"gram": True}, {"gram": False, "tolerance": 0.3}, {"chunk": 7}
    for atoms in (dense, packed, dense * 1e-9):
        codes = [pursuit.omp(x, atoms, K, **how) for how in ways]
        found += [(each.values, each.firing_counts(len(atoms))) for each in codes]
        found += [pursuit.least_squares(x, atoms, codes[0].indices)]
        found += [pursuit.correlations(x, atoms, method=method) for method in (None, "dense")]
    assert not left_behind(found, home.device)
    return found


PATHS = {
    "harvests, all chapters": harvested,
    "one block in memory, 10": layer_by_layer,
    "splices, 2 and 18": spliced,
    "an audit, 18": audited,
    "SAEs on rows, 9": studied,
    "passages, 9 and 15": in_passages,
    "shapes, 15": stored,
    "ladders, 10 and 11": on_the_ladder,
    "gaps, 12": in_gaps,
    "distilling, 5 and 6": distilled,
    "pretraining, 16": pretrained,
    "pursuit, 14": pursued,
}


@pytest.mark.parametrize("name", PATHS)
def test_what_chapters_do_gives_the_same_numbers_there(name, folder):
    with accelerator():
        found = tree_leaves(on_cpu(PATHS[name](Home(folder, "cuda:1"))))
    expected = tree_leaves(PATHS[name](Home(folder)))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, str) or one is None:
            assert one == other
        else:
            np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=2e-3, atol=1e-4)


def test_a_pretraining_step_fetches_nothing(folder):
    with accelerator() as machine:
        pretrained(Home(folder, "cuda:1"))
        assert not [place for place in machine.read if "mixture.py:update" in place]


def test_an_mps_reads_and_splices(folder):
    with accelerator("mps"):
        found = tree_leaves(on_cpu([spliced(Home(folder, "mps")), studied(Home(folder, "mps"))[0][0]]))
    expected = tree_leaves([spliced(Home(folder)), studied(Home(folder))[0][0]])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4)
