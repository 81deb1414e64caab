"""Programs are dropped as tests go: each that XLA compiles for the CPU takes some maps of memory of a process's 65,530.

A test in the GPU's interpreter compiles hundreds; all slow ones in one process ended in an abort of the compiler.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module_are_dropped() -> Iterator[None]:
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def programs_of_a_slow_test_are_dropped(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()
