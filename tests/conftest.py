"""Tensor shapes in the signatures of all that computes are checked while the tests run."""

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
