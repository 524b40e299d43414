"""The loop: the same numbers as a plain dense loop, resumable after a kill, never repeating a finished run."""

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers import kept, settings, training
from helpers.dictionary import sae_to_moe, topk_sae
from helpers.settings import generator
from helpers.training import Fresh, Recipe, Shuffled, fit, remedies


def rows(n=600, d=12, dtype=torch.float64):
    mix = torch.randn(d, d, generator=generator(1), dtype=dtype) * torch.arange(1, d + 1, dtype=dtype).rsqrt()
    return torch.randn(n, d, generator=generator(0), dtype=dtype) @ mix + 1


def sae(seed=0, k=4, dtype=torch.float64):
    return topk_sae(12, 40, k, generator=generator(seed), dtype=dtype)


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def plain_losses(model, stream, steps, lr, temperature=None, alpha=0.0):
    """Dense codes, autograd and PyTorch's unfused Adam; shares nothing with `fit` but the stream."""
    names = ("w_enc", "b_enc", "w_dec", "b_dec")
    parts = (model.encoder.weight, model.encoder.bias, model.decoder.weight, model.b_out)
    p = {name: part.detach().clone().requires_grad_() for name, part in zip(names, parts, strict=True)}
    adam = torch.optim.Adam(p.values(), lr=lr, foreach=False)
    first = torch.cat([stream(i)[1] for i in range(4)])
    variance = (first - first.mean(0)).square().sum(1).mean()
    history = []
    for step in range(steps):
        x, _ = stream(step)
        pre = (x - p["b_dec"]) @ p["w_enc"].T + p["b_enc"]
        values, chosen = pre.topk(model.k, dim=1)
        codes = torch.zeros_like(pre).scatter(1, chosen, values.clamp_min(0))
        loss = (codes @ p["w_dec"] + p["b_dec"] - x).square().sum() / (len(x) * variance)
        history.append(float(loss.detach()))
        if alpha:
            share = torch.zeros_like(pre).scatter(1, chosen, 1.0).mean(0) / model.k
            loss = loss + alpha * pre.shape[1] * (share * (pre / temperature).softmax(1).mean(0)).sum()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, w = p["w_dec"].grad, p["w_dec"]
            grad -= (grad * w).sum(1, keepdim=True) * w
            adam.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
            adam.step()
            w.copy_(F.normalize(w, dim=1))
    return history


def test_losses_equal_those_of_a_plain_dense_loop():
    stream, model = Shuffled(rows(), batch_size=64), sae()
    expected = plain_losses(model, stream, 50, lr=1e-2)
    result = fit(model, stream, steps=50, lr=1e-2, log_every=1)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-9)
    assert result.loss[-1] < 0.7 * result.loss[0]


def test_switch_balancing_trains_as_its_formula_says():
    stream, model = Shuffled(rows(), batch_size=64), sae()
    expected = plain_losses(model, stream, 30, lr=1e-2, alpha=0.3, temperature=0.5)
    result = fit(model, stream, steps=30, lr=1e-2, log_every=1, balance=remedies.Switch(0.3, temperature=0.5))
    np.testing.assert_allclose(result.loss, expected, rtol=1e-9)


def test_students_over_one_stream_are_those_trained_alone():
    stream = Shuffled(rows(), batch_size=64)
    together = fit({"a": sae(0), "b": sae(1, k=2)}, stream, steps=20, lr={"a": 1e-2, "b": 1e-3})
    alone = fit(sae(1, k=2), stream, steps=20, lr=1e-3)
    assert together["b"].loss == alone.loss
    assert same_parameters(together["b"].student, alone.student)


def test_the_decoder_stays_unit_norm_and_shared_parameters_stay_shared():
    moe = sae_to_moe(topk_sae(12, 40, 4, generator=generator(0), dtype=torch.float64))
    fit(moe, Shuffled(rows(), batch_size=64), steps=10, lr=1e-2)
    torch.testing.assert_close(moe.decoder.weight.norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert moe.router.weight is moe.encoder.weight


def test_every_row_comes_once_an_epoch_and_batches_do_not_depend_on_the_order_of_asking():
    stream = Shuffled(torch.arange(70).float()[:, None], batch_size=10, seed=3)
    late = stream(12)[0]
    epochs = [torch.cat([stream(7 * e + i)[0] for i in range(7)])[:, 0] for e in (0, 1)]
    assert all(sorted(e.tolist()) == list(range(70)) for e in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(late, stream(12)[0])
    assert not torch.equal(late, Shuffled(torch.arange(70).float()[:, None], batch_size=10, seed=4)(12)[0])


def test_fresh_batches_are_a_function_of_seed_and_step():
    def draw(n, g):
        return torch.randn(n, 3, generator=g)

    stream = Fresh(draw, batch_size=5, fingerprint="normal")
    assert torch.equal(stream(4)[0], Fresh(draw, batch_size=5, fingerprint="normal")(4)[0])
    assert not torch.equal(stream(4)[0], stream(5)[0])


def test_a_finished_run_is_loaded_and_any_change_trains_anew(tmp_path):
    def run(seed=0, steps=12, data=None, **more):
        stream = Shuffled(rows() if data is None else data, batch_size=64)
        return fit(sae(seed), stream, steps=steps, cache_dir=tmp_path, **more)

    first, again = run(), run()
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.loss == first.loss
    assert again.seconds == first.seconds
    assert same_parameters(first.student, again.student)
    changed = rows()
    changed[0, 0] += 1
    for other in (run(seed=1), run(steps=13), run(data=changed), run(lr=2e-3), run(balance=remedies.Switch(0.1))):
        assert not other.from_cache


def unkept(path):
    """What a kept file holds."""
    return kept.unpacked(path.read_bytes().removeprefix(kept.MAGIC).partition(b"\n")[2])


SCRIPT = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.training.test_loop import rows, sae
    from helpers.training import Shuffled, fit
    result = fit(sae(), Shuffled(rows(), batch_size=64), steps=3000, cache_dir=sys.argv[1], checkpoint_seconds=0.05)
    torch.save((result.loss, [p.data for p in result.student.parameters()]), sys.argv[2])
"""


def test_a_killed_run_goes_on_and_ends_where_an_undisturbed_one_does(tmp_path):
    root = str(settings.ROOT)
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT.format(root=root)))

    def start(cache, out):
        return subprocess.Popen([sys.executable, script, tmp_path / cache, tmp_path / out])

    assert start("quiet", "quiet.pt").wait() == 0
    process, deadline = start("killed", "killed.pt"), time.monotonic() + 120
    while not list((tmp_path / "killed" / "fits").glob("*.kept")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (stored,) = (tmp_path / "killed" / "fits").glob("*.kept")
    assert 0 < unkept(stored)["step"] < 3000
    assert not (tmp_path / "killed.pt").exists()
    assert start("killed", "killed.pt").wait() == 0
    (loss, weights), (expected, expected_weights) = (torch.load(tmp_path / n) for n in ("killed.pt", "quiet.pt"))
    assert loss == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))


def break_off(monkeypatch, at):
    """Have trainings break off before one step, as a killed process does."""
    step = training.Run.train_step

    def cut(self, number):
        if number == at:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(training.Run, "train_step", cut)


@pytest.mark.parametrize("at", [37, 40])
def test_a_resumed_run_remembers_how_long_features_were_silent(tmp_path, at, monkeypatch):
    """AuxK and resampling read those counts; `at` is between two resamplings, and behind one."""
    stream = Shuffled(rows(), batch_size=64)
    given = {
        "auxk": remedies.AuxK(silent_for=12),
        "both": remedies.Together(remedies.AuxK(silent_for=12, k_aux=3), remedies.Resample(every=20, until=0.9)),
        "none": remedies.Balance(),
    }

    def run(stream, folder):
        students = {name: sae(k=1) for name in given}
        for student in students.values():
            with torch.no_grad():
                student.encoder.weight[:20] *= 0.01  # silent, until a remedy finds them
        return fit(students, stream, steps=70, lr=1e-2, balance=given, cache_dir=folder, checkpoint_seconds=0.0)

    quiet = run(stream, tmp_path / "quiet")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_off(patch, at)
        run(stream, tmp_path / "cut")
    states = [unkept(stored) for stored in (tmp_path / "cut" / "fits").glob("*.kept")]
    assert len(states) == len(given) and all(state["step"] == at for state in states)
    assert max(state["silent"].max() for state in states) == at
    resumed = run(stream, tmp_path / "cut")
    for name in given:
        assert resumed[name].loss == quiet[name].loss
        assert same_parameters(resumed[name].student, quiet[name].student)
    ends = [quiet[name].student for name in given]
    assert not same_parameters(ends[0], ends[2]) and not same_parameters(ends[1], ends[0])  # each remedy acted


def group(folder, names="abc", **more):
    """Students of these names, each the same whoever trains beside it."""
    students = {name: sae(ord(name)) for name in names}
    return fit(students, Shuffled(rows(), batch_size=64), steps=30, lr=1e-2, cache_dir=folder, **more)


def test_each_student_of_a_group_is_found_whoever_trained_beside_it(tmp_path, monkeypatch):
    """One is finished, one half way, one not begun: the first is loaded, the others end where they would have alone."""
    alone = {name: group(False, name)[name] for name in "abc"}
    group(tmp_path, "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_off(patch, 13)
        group(tmp_path, "b", checkpoint_seconds=0.0)
    seen, step = [], training.Run.train_step
    monkeypatch.setattr(training.Run, "train_step", lambda self, at: (seen.append(at), step(self, at)))
    found = group(tmp_path, "cab")
    assert seen == list(range(30))
    assert [found[name].from_cache for name in "abc"] == [True, False, False]
    for name in "abc":
        assert found[name].loss == alone[name].loss and found[name].steps == alone[name].steps
        assert same_parameters(found[name].student, alone[name].student)
    seen.clear()
    assert all(each.from_cache for each in group(tmp_path, "bc").values()) and not seen
    assert len(list((tmp_path / "fits").glob("*.kept"))) == 3


def test_a_half_trained_student_goes_on_without_the_steps_it_has(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_off(patch, 13)
        group(tmp_path, "b", checkpoint_seconds=0.0)
    seen, step = [], training.Run.train_step
    monkeypatch.setattr(training.Run, "train_step", lambda self, at: (seen.append(at), step(self, at)))
    group(tmp_path, "b")
    assert seen == list(range(13, 30))


def test_equal_students_under_two_names_are_one_file_and_both_trained(tmp_path):
    def run(cache_dir):
        students = {"one": sae(), "other": sae()}
        return fit(students, Shuffled(rows(), batch_size=64), steps=9, cache_dir=cache_dir)

    alone = run(False)
    for found in (run(tmp_path), run(tmp_path)):
        for name in ("one", "other"):
            assert found[name].loss == alone[name].loss
            assert same_parameters(found[name].student, alone[name].student)
    assert len(list((tmp_path / "fits").glob("*.kept"))) == 1


def test_locks_are_taken_in_one_order_whatever_the_students_order(tmp_path, monkeypatch):
    """Else two processes, each with one student of the other's, would wait for each other."""
    taken, lock = [], kept.Kept.lock
    monkeypatch.setattr(kept.Kept, "lock", lambda self: (taken.append(self.key), lock(self))[1])
    for names in ("abc", "cba"):
        group(tmp_path / names, names)
    assert taken[:3] == taken[3:] == sorted(taken[:3])


def test_who_waited_for_a_lock_takes_what_the_other_made(tmp_path, monkeypatch):
    lock = kept.Kept.lock

    def late(self):
        monkeypatch.setattr(kept.Kept, "lock", lock)
        group(tmp_path, "a")  # another one is faster
        return lock(self)

    monkeypatch.setattr(kept.Kept, "lock", late)
    assert group(tmp_path, "a")["a"].from_cache


@pytest.mark.parametrize(
    "remedy",
    [
        remedies.LossFree(),
        remedies.Together(remedies.AuxK(), remedies.LossFree()),
        remedies.During(remedies.LossFree(), 0.5),
    ],
)
def test_a_missing_selection_bias_is_named_before_training(remedy):
    student = sae()
    before = [p.detach().clone() for p in student.parameters()]
    with pytest.raises(ValueError, match="student 'b' has selection_bias=False with .*LossFree.*; allowed: True"):
        fit({"b": student}, Shuffled(rows(), batch_size=64), steps=5, balance={"b": remedy})
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_a_damaged_store_is_named(tmp_path):
    stream = Shuffled(rows(), batch_size=64)
    fit(sae(), stream, steps=3, cache_dir=tmp_path)
    (stored,) = (tmp_path / "fits").glob("*.kept")
    stored.write_bytes(stored.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"{stored.name} is damaged.*delete it"):
        fit(sae(), stream, steps=3, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: fit(sae(), s, steps=0), "steps=0"),
        (lambda s: fit(sae(), s, steps=5, lr=0.0), "lr=0.0"),
        (lambda s: fit(sae(), s, steps=5, schedule="zigzag"), "schedule='zigzag'.*'cosine'"),
        (lambda s: fit({"a": sae()}, s, steps=5, lr={"b": 1.0}), "student 'a'.*'b'"),
        (lambda s: fit(topk_sae(7, 9, 2, generator=generator(0)), s, steps=5), "maps 7 to 7 .* 12 to 12"),
        (lambda s: Shuffled(rows(), batch_size=601), "batch_size=601.*1 to 600"),
        (lambda s: Shuffled(rows(), rows()[:5], batch_size=2), "targets has 5 rows.*600"),
        (lambda s: fit(sae(), Shuffled(torch.ones(99, 12).double(), batch_size=9), steps=5), "variance 0.0"),
        (lambda s: remedies.Switch(temperature=0), "temperature=0"),
    ],
)
def test_bad_parameters_are_named_before_training(call, message):
    with pytest.raises(ValueError, match=message):
        call(Shuffled(rows(), batch_size=64))


def test_a_diverging_run_stops_and_says_where():
    with pytest.raises(FloatingPointError, match="at step .*lower lr"):
        fit(sae(dtype=torch.float32), Shuffled(rows(dtype=torch.float32) * 1e16, batch_size=64), steps=50, lr=1e18)


def test_schedules():
    recipe = Recipe(100, lr=2.0, schedule="linear", warmup=10)
    assert [recipe.lr_at(s) for s in (0, 9, 50)] == pytest.approx([0.2, 2 * 0.91, 1.0])
    assert training.SCHEDULES["cosine"](0.5) == pytest.approx(0.5)


def test_divided_rows_are_another_stream():
    data = rows(60)
    plain, halved = (Shuffled(data, data, batch_size=20, divided_by=by) for by in (1.0, 2.0))
    assert all(torch.equal(2 * ours, theirs) for ours, theirs in zip(halved(4), plain(4), strict=True))
    assert halved.fingerprint != plain.fingerprint
