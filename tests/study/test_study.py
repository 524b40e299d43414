"""Runs are kept under what was asked for, choosing follows the stated rule, grids go on where they end too soon."""

import json
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from helpers import settings
from helpers.dictionary import topk_sae
from helpers.kept import Kept
from helpers.settings import generator
from helpers.study import study as module
from helpers.study.scores import Sums, by_group, evaluate
from helpers.study.study import Arm, Judged, Outcome, at_best, choose, fits, run, study, sums, trained, tune
from helpers.training import Shuffled, remedies
from tests.reference.metrics_numpy import slow_comparison


@dataclass(frozen=True)
class Toy:
    """Rows that students give back, judged on ten groups of others."""

    steps: int = 8
    folder: str = "here"

    @property
    def asked(self):
        return {"steps": self.steps}

    def rows(self, seed):
        return torch.randn(200, 6, generator=generator(seed)) + 1

    def stream(self, seed, device):
        return Shuffled(self.rows(0), batch_size=20, seed=seed, device=device, fingerprint="toy")

    def judge(self, student, seed):
        after, group = evaluate(student, self.rows(2)), torch.arange(200) // 20
        sums = {"errors": by_group(after.squared_error, group), "norms": by_group(after.squared_norm, group)}
        before = evaluate(student, self.rows(1))
        return Judged(sums, {"fvu": before.fvu, "dead": before.dead}, {"dead": after.dead, "text": ["a", 1]})


def sae(problem, seed, *, k=2):
    return topk_sae(6, 12, k, generator=generator(seed))


def grown(problem, seed, begun):
    """A second phase that starts as the first one ended, with another k."""
    begun.k = 3
    return begun


PLAIN, WIDER = Arm("plain", sae, lr=1e-2), Arm("wider", partial(sae, k=4), lr=1e-2)


# -- running -----------------------------------------------------------------------------------------------------------


def test_a_run_is_what_its_problem_says_of_the_trained_student(tmp_path):
    options = {"cache_dir": tmp_path}
    one, other = run(Toy(), [PLAIN, WIDER], 3, **options)
    student = trained(Toy(), PLAIN, 3, **options).student
    judged = Toy().judge(student, 3)
    assert one.fvu == pytest.approx(evaluate(student, Toy().rows(2)).fvu)
    assert (one.validation, one.about) == (judged.validation, judged.about)
    assert (one.arm, one.seed, other.arm) == (PLAIN, 3, WIDER)
    assert one.curve[0][-1] == 7 and len(one.curve[1]) == len(one.curve[0])
    alone = run(Toy(), [PLAIN], 3, cache_dir=False)[0]
    assert alone.fvu == one.fvu, "who trains beside it does not matter"
    assert evaluate(student, Toy().rows(2)).fvu < evaluate(sae(Toy(), 3), Toy().rows(2)).fvu


def test_a_run_is_kept_and_only_what_is_missing_is_trained(tmp_path, monkeypatch):
    first = run(Toy(), [PLAIN], 0, cache_dir=tmp_path)[0]
    asked = []
    monkeypatch.setattr(
        module,
        "fits",
        lambda problem, arms, *rest, **options: asked.extend(arms) or fits(problem, arms, *rest, **options),
    )
    again, _ = run(Toy(folder="elsewhere"), [replace(PLAIN, name="renamed"), WIDER], 0, cache_dir=tmp_path)
    assert asked == [WIDER]
    assert again.fvu == first.fvu and again.arm.name == "renamed"


def test_a_key_holds_all_that_decides_and_no_name_or_place():
    def key(problem=None, arm=PLAIN, seed=0, device="cpu"):
        return Kept("runs", [problem or Toy(), arm, seed, device], run).key

    others = [
        key(Toy(9)), key(seed=1), key(device="cuda"), key(arm=WIDER), key(arm=replace(PLAIN, lr=1.0)),
        key(arm=replace(PLAIN, remedy=remedies.Switch(0.1))), key(arm=replace(PLAIN, recipe={"clip": 1.0})),
        key(arm=replace(PLAIN, batches=1)), key(arm=replace(PLAIN, first=PLAIN)), key(arm=replace(PLAIN, first=WIDER)),
    ]  # fmt: skip
    assert len({key(), *others}) == len(others) + 1
    assert key(Toy(folder="elsewhere"), replace(PLAIN, name="x")) == key()


def test_arms_differ_in_recipes_batches_and_remedies_side_by_side():
    arms = [
        PLAIN,
        replace(PLAIN, batches=1),
        replace(PLAIN, recipe={"steps": 4}),
        replace(PLAIN, remedy=remedies.LossFree(0.5)),
    ]
    together = fits(Toy(), arms, 0, cache_dir=False)
    apart = [trained(Toy(), arm, 0, cache_dir=False) for arm in arms]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.student.decoder.weight, other.student.decoder.weight)
    assert [one.steps[-1] for one in together] == [7, 7, 3, 7]
    assert together[3].student.selection_bias.any() and together[0].student.selection_bias is None
    losses = {tuple(one.loss) for one in together}
    assert len(losses) == 4
    shuffled = Toy().stream(settings.mix(0, 1), torch.device("cpu"))
    assert not torch.equal(shuffled(0)[0], Toy().stream(0, torch.device("cpu"))(0)[0])


def test_a_second_phase_starts_from_the_first_ones_student(tmp_path):
    arm = Arm("grown", grown, lr=1e-2, recipe={"steps": 1}, first=PLAIN)
    done, first = trained(Toy(), arm, 0, cache_dir=tmp_path), trained(Toy(), PLAIN, 0, cache_dir=tmp_path)
    assert first.from_cache and done.student.k == 3 and done.seconds > first.seconds
    moved = (done.student.decoder.weight - first.student.decoder.weight).abs().max()
    assert 0 < moved < 0.05, "one step away"


def test_a_grid_has_every_arm_with_every_seed_in_order(tmp_path):
    options = {"cache_dir": tmp_path, "workers": 1}
    found = study(Toy(), [PLAIN, WIDER], [1, 0], **options)
    assert {name: [each.seed for each in some] for name, some in found.items()} == {"plain": [1, 0], "wider": [1, 0]}
    together = study({"a": Toy(), "b": Toy(4)}, {"a": PLAIN, "b": PLAIN}, [0], together=2, **options)
    assert together["a"][0].fvu == found["plain"][1].fvu and together["b"][0].curve[0][-1] == 3
    with pytest.raises(ValueError, match=r"1 arms, seeds=\[\]; allowed: at least one of each"):
        study(Toy(), [PLAIN], [])


# -- cells that go with the book ---------------------------------------------------------------------------------------


def test_a_finished_cell_is_a_small_file_that_goes_on_elsewhere(tmp_path, monkeypatch):
    cells = tmp_path / "cells"
    first = run(Toy(), [PLAIN], 0, cache_dir=tmp_path / "here", cells=cells)[0]
    (file,) = cells.iterdir()
    assert file.name.startswith("plain-seed-0-") and str(tmp_path) not in file.read_text("utf-8")
    problem = json.loads(file.read_text("utf-8"))["asked"][0]
    assert problem == {"object": [f"{__name__}.Toy", {"mapping": [["steps", 8]]}]}
    monkeypatch.setattr(module, "fits", lambda *_, **__: pytest.fail("it was trained again"))
    again = run(Toy(), [PLAIN], 0, cache_dir=tmp_path / "there", cells=cells)[0]
    assert again.fvu == first.fvu and again.validation == first.validation and again.about == first.about
    assert sums({"x": [again]}).fvu("x") == sums({"x": [first]}).fvu("x")
    copied = tmp_path / "copied"
    run(Toy(), [PLAIN], 0, cache_dir=tmp_path / "here", cells=copied)
    assert (copied / file.name).read_text("utf-8") == file.read_text("utf-8"), "what is in the cache is written out"
    whole = file.read_text("utf-8")
    digit = re.compile(r"[1-8]").search(whole, whole.index('"sums"')).start()  # a first digit: no rounding hides it
    for damaged in (whole[:-20], whole[:digit] + str((int(whole[digit]) + 1) % 10) + whole[digit + 1 :]):
        file.write_text(damaged, "utf-8")
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*restore it from the repository"):
            run(Toy(), [PLAIN], 0, cache_dir=False, cells=cells)


def test_what_a_kill_left_of_an_outcome_goes_when_it_is_written_again(tmp_path):
    here, cells = tmp_path / "here", tmp_path / "cells"
    run(Toy(), [PLAIN], 0, cache_dir=here, cells=cells)
    (file,), (kept,) = cells.iterdir(), (here / "runs").glob("*.kept")
    for path in (file, kept):
        path.with_name(f".{path.name}.killed.part").write_text("ha")
        path.unlink()
    run(Toy(), [PLAIN], 0, cache_dir=here, cells=cells)
    assert file.is_file() and kept.is_file() and not list(tmp_path.rglob("*.part"))


# -- choosing ----------------------------------------------------------------------------------------------------------


def outcome(fvu, dead=0.0, lr=1e-2, seed=0):
    return Outcome({}, {"fvu": fvu, "dead": dead}, arm=replace(PLAIN, lr=lr), seed=seed)


def test_the_rule_takes_the_fewest_dead_of_those_within_one_percent():
    made = {"a": (0.500, 0.9), "b": (0.504, 0.2), "c": (0.506, 0.0), "d": (0.700, 0.0)}
    some = {name: outcome(*each) for name, each in made.items()}
    assert choose(some) == "a" and choose(some, ties="dead") == "b" and choose(some, "dead") == "c"
    assert choose({"a": some["a"]}, ties="dead") == "a"
    two = {"x": [outcome(0.1), outcome(0.9)], "y": [outcome(0.4), outcome(0.5)]}
    assert choose(two) == "y", "means over seeds"
    with pytest.raises(ValueError, match="candidates is empty"):
        choose({})


@pytest.mark.parametrize(("best", "tried"), [(0.01, 3), (0.03, 4), (0.1, 5), (0.3, 5), (2.5e-3, 4), (1e-6, 5)])
def test_a_grid_goes_on_where_its_best_rate_is_an_end(monkeypatch, best, tried):
    """Error falls towards one rate: the grid 3e-3, 1e-2, 3e-2 reaches it, or stops after two further rates."""

    def told(problem, arms, seed):
        return [outcome(abs(np.log(arm.lr / best)), lr=arm.lr) for arm in arms]

    monkeypatch.setattr(module, "run", told)
    found = tune(Toy(), [PLAIN], [3e-3, 1e-2, 3e-2], 0, further=2, workers=1)["plain"]
    assert len(found) == tried and list(found) == sorted(found) and {3e-3, 1e-2, 3e-2} <= set(found)
    chosen = choose(found)
    assert chosen not in (min(found), max(found)) or len(found) == 5
    assert at_best({"plain": PLAIN}, {"plain": found})["plain"] == replace(PLAIN, lr=chosen)


def test_rates_rise():
    with pytest.raises(ValueError, match=r"lrs=\[0.01, 0.003\]; allowed: positive rates that rise"):
        tune(Toy(), [PLAIN], [1e-2, 3e-3], 0)


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    random = np.random.default_rng(0)

    def cell(low):
        return {"errors": random.gamma(2, size=9), "norms": 3 + random.gamma(2, size=9), "nats": low + random.random(9)}

    cells = {"a": {seed: cell(1) for seed in (0, 1, 2)}, "b": {seed: cell(2) for seed in (2, 0)}, "c": {7: cell(1)}}
    return Sums(cells, {"clean": random.random(9), "zero": 5 + random.random(9), "mean": 4 + random.random(9)})


def test_a_comparison_is_that_of_stacked_sums(table):
    data = np.stack([[table.cells["a"][seed][c] for c in ("errors", "norms")] for seed in (0, 1, 2)]).swapaxes(1, 2)
    theirs = slow_comparison(data, lambda some: some[..., 0].sum() / some[..., 1].sum(), log=True)
    assert numbers(table.fvu("a")) == pytest.approx(numbers(theirs)) and table.fvu("a").n == theirs.n == (3, 9)
    columns = [
        [table.cells["a"][seed]["nats"], table.cells["b"][seed]["nats"], table.shared["mean"], table.shared["clean"]]
        for seed in (0, 2)
    ]

    def gap(some):
        a, b, mean, clean = some.sum((0, 1))
        return (mean - a) / (mean - clean) - (mean - b) / (mean - clean)

    ours = table.compare(lambda a, b: a.ce_recovered("mean") - b.ce_recovered("mean"), "a", "b")
    theirs = slow_comparison(np.stack(columns).swapaxes(1, 2), gap)
    assert numbers(ours) == pytest.approx(numbers(theirs))
    assert ours.n == theirs.n == (2, 9) and ours.resampled == theirs.resampled == "seed × article"
    assert table.compare(lambda a, b: a.fvu - b.fvu, "a", "a").ci == (0, 0), "the same are left out of all cells"
    assert table.ratio("a", "b").value == pytest.approx(table.compare(lambda b, a: a.fvu / b.fvu, "b", "a").value)
    assert table.fvu("c").resampled == "articles"


def test_an_fvu_over_targets_that_do_not_vary_is_refused():
    outcome = Outcome({"errors": np.ones(3), "norms": np.zeros(3)}, {})
    with pytest.raises(ValueError, match="targets are constant; allowed: rows that vary"):
        _ = outcome.fvu


def numbers(comparison):
    return [comparison.value, *comparison.ci, *comparison.by_seed]


def test_largest_rates_are_means_over_seeds_of_each_seeds_own_busiest_latent():
    def cell(counts):
        return {"counts": np.array(counts), "rows": np.full(2, 10.0)}

    a = {0: cell([[9, 1], [8, 0]]), 1: cell([[0, 6], [1, 8]])}
    b = {1: cell([[3, 0], [0, 2]]), 0: cell([[1, 1], [5, 1]])}
    ratio = Sums({"a": a, "b": b}).compare(lambda a, b: b.largest_rate / a.largest_rate, "a", "b")
    assert ratio.value == pytest.approx(((3 + 6) / 2) / ((17 + 14) / 2))
    assert ratio.by_seed == pytest.approx([6 / 17, 3 / 14])
    assert ratio.ci[0] <= ratio.value <= ratio.ci[1] and ratio.resampled == "seed × article"


def test_columns_over_other_units_stay_aside(table):
    with_more = {name: {s: c | {"errors": np.ones(4)} for s, c in some.items()} for name, some in table.cells.items()}
    mixed = Sums(with_more, table.shared)
    assert mixed.compare(lambda a: a.ce_recovered(), "a") == table.compare(lambda a: a.ce_recovered(), "a")
    with pytest.raises(ValueError, match="column 'errors' has 4 units; allowed: 9"):
        mixed.fvu("a")
    with pytest.raises(ValueError, match=r"cells have \[4, 9\] units"):
        Sums(with_more).fvu("a")


def test_cells_without_a_common_seed_or_unknown_ones_are_named(table):
    with pytest.raises(ValueError, match="no seed is common to a, c; allowed: at least one"):
        table.compare(lambda a, c: 0.0, "a", "c")
    with pytest.raises(ValueError, match=r"cells=\['d'\] are not in the table; allowed: a, b, c"):
        table.fvu("d")
