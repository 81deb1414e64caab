"""What JAX runs on, in processes whose environment says nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.core.environment import PLATFORMS

ROOT = Path(__file__).parents[2]
SETTLE = "from jaxserve.launch.platform import settle_platform; settle_platform()"
SHOW = "import jax; print(jax.default_backend())"


def run(*lines: str, **variables: str) -> subprocess.CompletedProcess[str]:
    silent = {name: value for name, value in os.environ.items() if name != PLATFORMS and not name.startswith("TPU_")}
    return subprocess.run(
        [sys.executable, "-c", "; ".join(lines)],
        env={**silent, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    or importlib.util.find_spec("jax_plugins") is not None
    or any(Path("/dev").glob("accel*"))
    or any(Path("/dev/vfio").glob("[0-9]*")),
    reason="needs libtpu, no TPU and no other plugin",
)
@pytest.mark.parametrize("before", [[], ["import jax"]])
def test_libtpu_alone_makes_no_noise(before: list[str]) -> None:
    done = run(*before, SETTLE, SHOW)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


def test_a_platform_that_was_chosen_stays() -> None:
    done = run("import jax", "jax.config.update('jax_platforms', 'nowhere')", SETTLE, SHOW)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
