"""Tensor shapes in the signatures of all that computes are checked while the tests run."""

import collections
from pathlib import Path

from jaxtyping import install_import_hook

import tests.typechecking  # noqa: F401 (the hook finds the checker by name)
from tests import accelerator

HELPERS = Path(__file__).parent.parent / "helpers"
ROOMS = ("dictionary", "training", "models", "study", "parts")

install_import_hook(
    [
        f"helpers.{room}.{path.stem}"
        for room in ROOMS
        for path in sorted((HELPERS / room).glob("*.py"))
        if "jaxtyping" in path.read_text(encoding="utf-8")
    ],
    "tests.typechecking.check",
)

# autograd counts devices at its first backward pass in a process, whichever test that is in
accelerator.registered()


def pytest_terminal_summary(terminalreporter):
    """What became of each case of a test that writes an `outcome`, counted and named; workers send it along."""
    found = collections.defaultdict(dict)
    for report in (each for each in sum(terminalreporter.stats.values(), []) if hasattr(each, "user_properties")):
        for name, value in report.user_properties:
            if name == "outcome":
                found[value[0]][report.nodeid.partition("[")[2].rstrip("]")] = value[1]
    for outcome, cases in found.items():
        terminalreporter.write_line(f"\n{outcome}: {len(cases)}")
        for case, why in cases.items():
            terminalreporter.write_line(f"  {case}: {why}" if why else f"  {case}")
