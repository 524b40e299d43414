"""The form of benchmark results, timing in turns, and the performance page made from them."""

import ast
import json
import re
import time
from dataclasses import replace

import pytest

from benchmarks import __main__ as bench
from benchmarks import book, common, faults, gpu, mutations, runs, soak, students
from helpers import settings
from helpers.press import chapters, pages


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def write(**changes):
    what = {
        "title": "A title",
        "question": "How fast?",
        "rows": [{"n": 4096, "ms": 1.25, "who": "a|b"}],
        "note": "by hand",
    }
    return common.write("one", **(what | changes))


def test_timing_goes_round_and_reports_medians(monkeypatch):
    calls, clock = [], iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    timed = common.interleave(
        {"a": lambda turn: calls.append(("a", turn)), "b": lambda turn: calls.append(("b", turn))}, 3
    )
    assert calls == [(name, turn) for turn in range(4) for name in "ab"]
    assert timed["a"] == {"median": 1.0, "iqr": 0.0, "min": 1.0}


def test_the_summary_is_that_of_the_sample():
    assert common._summary([4.0, 1.0, 2.0, 3.0, 100.0]) == {"median": 3.0, "iqr": 2.0, "min": 1.0}


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=2: allowed: 3 or more"):
        common.interleave({}, repeats=2)


def test_targets_know_whether_they_are_met(results, capsys):
    targets = [common.at_least("speed", 9.0, 10), common.at_most("seconds", 60.0, 60)]
    assert [target["met"] for target in targets] == [False, True]
    write(targets=targets)
    assert "MISSED speed: 9 (≥ 10)" in capsys.readouterr().out
    page = pages.performance_markdown(results)
    assert "**1 of 2 targets are met.**" in page
    missed, met = re.findall(r"<tr><td>(?:speed|seconds).*</tr>", page)
    assert "≥ 10" in missed and '<td class="number">9</td>' in missed and "✗ missed" in missed
    assert "≤ 60" in met and "✓ met" in met


def test_rows_become_a_table_with_numbers_to_the_right(results):
    write()
    page = pages.performance_markdown(results)
    assert '<td class="number">4,096</td><td class="number">1.25</td><td>a|b</td>' in page
    assert "targets are met" not in page


def heads(page):
    """Of each table the names of its columns."""
    return [re.findall(r"<th [^>]*>(.*?)</th>", head) for head in re.findall(r"<thead>.*?</thead>", page)]


def test_the_tables_of_this_copy_fit_and_have_names():
    found = heads(pages.performance_markdown())
    assert len(found) > 20 and all(len(names) <= 7 for names in found)
    assert not [name for names in found for name in names if re.search(r"iqr|_|^[mnd]$|W_|^$", name)]


def test_what_faults_did_is_told_in_seven_columns(results):
    row = {name: i for i, name in enumerate(faults.COLUMNS)}
    write(rows=[{"work": "fit"} | row])
    (names,) = heads(page := pages.performance_markdown(results))
    assert names[:5] == ["work", "seconds", "kills", "full disks", "flipped bytes"]
    assert names[5:] == ["what went wrong in all", "work of 8 at once"]
    wrong = sum(row[name] for name in faults.NEVER)
    shown = [f"{row['flipped bytes']} ({row['named']} named)", wrong, row["work of 8 at once / alone"]]
    assert re.findall(r"<td[^>]*>(.*?)</td>", page)[-3:] == list(map(str, shown))


def test_many_rows_are_folded_and_the_file_lies_beside_them(results):
    for many, folded in ((12, False), (13, True)):
        write(rows=[{"n": i, "ms": 1.25, "iqr_ms": 0.5} for i in range(many)])
        page = pages.performance_markdown(results)
        assert (":::{dropdown} All 13 rows" in page) == folded and heads(page) == [["features", "ms"]]
        assert "{download}`one.json <benchmarks/one.json>`" in page


def test_how_times_grow_is_drawn_with_peers_and_the_ratio_of_the_best_is_said(results, tmp_path):
    peers = {"this book": 1.0, "this book, screened": 0.1, "SPAMS": 3.0, "another": 2.0}
    rows = [
        {
            "kernel": kernel,
            "who": who,
            "varied": size,
            "exponent": 1.0,
            "points": [[n, ms * n * more], [10 * n, ms * n]],
        }
        for kernel, more in (("pursuit", 1.0), ("step", 0.5))
        for size, n in (("n", 10), ("k", 2))
        for who, ms in peers.items()
        if (kernel, who) not in (("step", "another"), ("pursuit", "this book, screened"))
    ]
    rows[0]["points"][0][1] *= 4  # there the best peer takes half as long as ours
    write(rows=rows)
    page = pages.performance_markdown(results)
    assert "One pursuit over two decades of each size: the best peer takes 0.5 to 2 times as long" in page
    assert "One step over two decades of each size: the best peer takes 3 to 3 times as long" in page
    assert heads(page) == [["kernel", "who", "varied", "exponent"]]
    pages.draw_growth(tmp_path, results)
    drawn = [(tmp_path / f"one-{number}.svg").read_text() for number in (0, 1)]
    assert [svg.count("<!-- milliseconds -->") for svg in drawn] == [1, 1]
    assert "<!-- another -->" in drawn[0] and "<!-- another -->" not in drawn[1]
    assert all(f"benchmarks/one-{n}.svg" in page for n in (0, 1))


def test_without_results_the_page_says_so(tmp_path):
    assert "No benchmark has been run" in pages.performance_markdown(tmp_path)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c.pop("rows"), "rows: Field required"),
        (lambda c: c.update(speed=1), "speed: Extra inputs"),
        (lambda c: c["rows"].append({"n": 1}), "rows do not all have the same columns"),
        (lambda c: c.update(targets=[{"what": "x"}]), "targets.0.target: Field required"),
    ],
)
def test_results_of_another_form_are_named(results, edit, told):
    path = write()
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"one.json does not fit.*\n.*{re.escape(told)}"):
        pages.performance_markdown(results)


def test_a_truncated_file_is_named(results):
    path = write()
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"one\.json is damaged"):
        pages.performance_markdown(results)


def test_an_unknown_benchmark_is_refused(capsys):
    assert bench.main(["nothing"]) == 2
    assert "no benchmark nothing; there are: " in capsys.readouterr().err


@pytest.mark.parametrize("make", [students.Gathering, students.Grouped])
def test_the_other_students_are_the_same_function(make):
    outputs, gradients = students.differences(200, 8, make)
    assert outputs < 1e-5 and gradients < 1e-4


def test_a_leading_run_axis_trains_the_same_models():
    assert runs.difference(40, 8, 3, 32) < 1e-4


REPORT = """<testsuites><testsuite>
<testcase name="test_a_run_ends[1]" time="2.5"/>
<testcase name="test_a_run_ends[2]" time="1"><failure message="no"/></testcase>
<testcase name="test_a_disk" time="0"><skipped message="no tmpfs"/></testcase>
<testcase name="test_a_disk[2]" time="1"><error message="set up"/></testcase>
</testsuite></testsuites>"""


def test_the_soak_counts_what_fails_and_names_what_is_skipped(results, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = soak.rows(tmp_path / "report.xml")
    counted = [{name: row[name] for name in ("check", "seconds", *soak.OUTCOMES)} for row in found]
    assert counted == [
        {"check": "a run ends", "seconds": 3.5, "passed": 1, "failed": 1, "skipped": 0},
        {"check": "a disk", "seconds": 1.0, "passed": 0, "failed": 1, "skipped": 1},
    ]
    assert [row["skipped because"] for row in found] == ["", "no tmpfs"]
    soak.write(found)
    page = pages.performance_markdown(results)
    assert "cases that fail, of 4" in page and "✗ missed" in page and "no tmpfs" in page
    assert len(heads(page)[1]) == 7
    soak.write([found[0] | {"failed": 0, "passed": 2}])  # one of them again
    page = pages.performance_markdown(results)
    assert "cases that fail, of 4" in page and page.count("a disk") == 1


def test_the_soak_runs_what_is_marked_and_reads_its_report(tmp_path):
    soak.run(tmp_path / "report.xml", "tests/press/test_errors.py", "-k", "verify_99")
    (row,) = soak.rows(tmp_path / "report.xml")
    assert row["passed"] == 1 and not row["failed"] and not row["skipped because"]


def test_the_page_can_be_made_of_the_records_that_are_kept():
    page = pages.performance_markdown()
    assert "## Reliability" in page and "<td>sweep</td>" in page


# -- a borrowed GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "students", "pursuits"])
def test_a_gpus_timings_run_on_a_cpu_at_a_hundredth(name, tmp_path):
    small = replace(gpu.REHEARSAL, saes=(256,), students=((64, 4),), pursuits=((16, 32, 3, 8),), batch=32)
    gpu.one(name, small, tmp_path)
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert {row["who"] for row in rows} >= {"this book"} and all(row["ms"] > 0 for row in rows)


def test_a_chapters_rehearsal_names_parameters_that_it_has():
    by_number = {chapter.number: chapter.defaults for chapter in chapters.find()}
    assert all(set(given) <= set(by_number[number]) for number, given in gpu.REHEARSAL.given.items())


def test_a_gpus_jobs_are_done_once_and_one_that_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch):
    started = []

    class Process:
        def __init__(self, command, **_):
            self.name, self.pid = command[4], 2**22 + 1  # a number that no process has
            started.append(self.name)

        def wait(self, left):
            if self.name == "slow":
                raise gpu.subprocess.TimeoutExpired("slow", left)
            return int(self.name == "wrong")

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    (tmp_path / "there.json").write_text("[]")
    jobs = ["there", "wrong", "slow", "good"]
    expected = {"there": "kept", "wrong": "failed", "slow": "no time left", "good": "done"}
    assert gpu.everything(gpu.GPU, tmp_path, jobs=jobs) == expected and started == jobs[1:]
    assert gpu.everything(gpu.GPU, tmp_path, 0, jobs)["good"] == "no time left"


def test_a_gpus_record_says_what_became_of_each_job(results, tmp_path):
    rows = [
        {"what": "step", "who": who, "ms": ms, "/ ours": ms} for who, ms in [("this book", 1.0), ("eai-sparsify", 1.1)]
    ]
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "steps.json").write_text(json.dumps(rows))
    write()
    without = pages.performance_markdown(results)
    gpu.record(folder, {"steps": "done", "chapter-5": "no time left"})
    found = json.loads((results / "gpu.json").read_text())
    assert found["targets"][0]["met"] is False and "chapter-5: no time left." in found["note"]
    page = pages.performance_markdown(results)
    assert "A quarter of an hour" in page and "No GPU has run" not in page and "No GPU has run" in without


def test_without_a_gpu_its_programme_says_what_is_here(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device='cuda' is not on this machine; allowed here: auto, cpu"):
        gpu.main()


# -- lines broken on purpose -------------------------------------------------------------------------------------------


def test_a_broken_line_is_code_and_does_something_else():
    """Of all files: it parses, its tree is another one, and only its line has changed."""
    found = 0
    for path in (settings.ROOT / "helpers").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        tree = ast.dump(ast.parse(source))
        for mutant in list(mutations.mutants(source, path.name))[::50]:
            broken = mutant.of(source)
            assert ast.dump(ast.parse(broken)) != tree, (path, mutant)
            found += 1
    assert found > 100


def test_what_is_only_said_or_only_a_size_is_not_broken():
    source = """BLOCK = 32

def f(x: Literal[1], scale=2, batch_size=16):
    allowed(x > 1, f"x={x + 1}", "at least 2")
    y = keep(x, workers=2)
    return (y @ scale) - "a" + 3.5
"""
    found = [(each.line, each.of(source).splitlines()[each.line - 1].strip()) for each in mutations.mutants(source, "")]
    assert sorted(found) == [
        (3, "def f(x: Literal[1], scale=3, batch_size=16):"),
        (4, 'allowed(x > 2, f"x={x + 1}", "at least 2")'),
        (4, 'allowed(x >= 1, f"x={x + 1}", "at least 2")'),
        (6, 'return (y * scale) - "a" + 3.5'),
        (6, 'return (y @ scale) - "a" + 7.0'),
        (6, 'return (y @ scale) - "a" - 3.5'),
    ]


def test_a_broken_line_is_noticed_by_its_own_test_and_mended_again(tmp_path):
    (tmp_path / "tests" / "study").mkdir(parents=True)
    (tmp_path / "helpers").mkdir()
    source = "def double(x):\n    return 2 * x\n"
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "helpers" / "more.py").write_text(source)
    test = "from helpers.more import double\n\n\ndef test_it():\n    assert double(3) == 6\n"
    (tmp_path / "tests" / "study" / "test_more.py").write_text(test)
    mutant = next(each for each in mutations.mutants(source, "helpers/more.py") if each.text == "/")
    assert "test_it" in mutations.noticed(mutant, tmp_path)[0]
    assert (tmp_path / "helpers" / "more.py").read_text() == source


def test_lines_to_break_are_drawn_by_a_seed():
    assert mutations.chosen(5, 1) == mutations.chosen(5, 1) != mutations.chosen(5, 2)
    with pytest.raises(ValueError, match=r"count=0; allowed: 1 to \d+ lines"):
        mutations.chosen(0, 1)


def test_a_simulated_book_takes_as_long_as_its_longest_chain():
    """One after another it is the sum; with a place for each, the longest; in between, a bound of list scheduling."""
    jobs = chapters.plan((), "quick")
    seconds = [float(10 + 7 * i % 50) for i in range(len(jobs))]
    alone, two, four, all_ = (book.simulated(jobs, seconds, n) for n in (1, 2, 4, len(jobs)))
    assert alone == sum(seconds) and all_ == max(seconds)
    for n, found in ((2, two), (4, four)):
        assert sum(seconds) / n <= found <= sum(seconds) / n + (1 - 1 / n) * max(seconds)
