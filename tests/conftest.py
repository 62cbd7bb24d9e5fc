"""Shape checks on, Hypothesis profiles, and the `cuda` marker."""

from __future__ import annotations

import os

# Before torch is loaded: on busy cores, OpenMP threads that spin while they wait make tiny models 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests import type_checker

# Before anything imports the package: every annotated type and shape of it is checked while the tests run.
jaxtyping.jaxtyped = type_checker.jaxtyped
jaxtyping.install_import_hook("kvcompress", f"{type_checker.__name__}.check")

# Examples run whole models, so how long one takes says nothing about the strategy that drew it. How to search longer:
# CONTRIBUTING.md. Explaining a failure would trace every line of the models.
settings.register_profile(
    "quick",
    deadline=None,
    max_examples=25,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=500)
settings.load_profile("quick")


if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core; models this small gain nothing from more threads
    torch.set_num_threads(1)


if not torch.cuda.is_available():  # before anything imports Triton: its interpreter runs kernels on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Our own warnings are errors; others are shown.

    Named here, since naming a class of ours in pyproject.toml would import the package before the hook above.
    """
    if config.getoption("dist", "no") != "no":  # the process that only hands tests to others needs no package
        return
    # First, since the hook compiles anew whatever the package is the first to import: 1,500 modules.
    import transformers.modeling_utils  # noqa: F401

    config.addinivalue_line("filterwarnings", "error::kvcompress.errors.KVCompressWarning")
    # Drawn prompts are often so short that sinks and recents alone are more than the budget, of which this one tells.
    config.addinivalue_line("filterwarnings", "ignore:budget. 1 means:kvcompress.errors.BudgetWarning")
    config.addinivalue_line("filterwarnings", "ignore:the budget of .* is below:kvcompress.errors.BudgetWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no such device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
