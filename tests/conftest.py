"""Tensor shapes in the signatures of the core are checked while the tests run."""

from jaxtyping import install_import_hook

import tests.typechecking  # noqa: F401 (the hook finds the checker by name)

install_import_hook(
    [
        "helpers.dictionary",
        "helpers.losses",
        "helpers.metrics",
        "helpers.training",
        "helpers.activations",
        "helpers.teachers",
        "helpers.padding",
        "helpers.bounds",
        "helpers.constructions",
        "helpers.ablations",
        "helpers.synthetic",
        "helpers.distillation",
        "helpers.remedies",
        "helpers.interventions",
        "helpers.sweep",
        "helpers.latents",
        "helpers.pursuit",
        "helpers.expander",
        "helpers.checkpoints",
        "helpers.frontier",
        "helpers.gaps",
        "helpers.implicit",
        "helpers.layerwise",
    ],
    "tests.typechecking.check",
)
