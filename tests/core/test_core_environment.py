"""A TPU that is not there, though its compiler is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from jaxserve.core import environment
from jaxserve.core.environment import (
    GPU_MEMORY_SHARE,
    GPU_SHARE_VARIABLES,
    cache_dir,
    leave_out_absent_tpu,
    take_gpu_memory,
    tpu_is_absent,
)


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has said anything, and of all that JAX could use libtpu is installed."""
    monkeypatch.setenv("JAX_PLATFORMS", "to be restored")
    for name in [name for name in os.environ if name.startswith("TPU_")] + ["JAX_PLATFORMS"]:
        monkeypatch.delenv(name)
    install(monkeypatch, "libtpu")


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: name if name in packages else None)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir({"JAXSERVE_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}) == Path("/mine")
    assert cache_dir({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/jaxserve")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir({}) == Path("/home/me/.cache/jaxserve")


def test_without_a_home_there_is_no_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.Path, "home", homeless)
    assert cache_dir({}) is None
    assert cache_dir({"JAXSERVE_CACHE": "/mine"}) == Path("/mine")


def test_without_a_tpu_the_cpu_is_chosen(tmp_path: Path) -> None:
    assert tpu_is_absent(tmp_path)
    assert "JAX_PLATFORMS" not in os.environ
    assert leave_out_absent_tpu(tmp_path)
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("packages", [(), ("libtpu", "jax_plugins")])
def test_without_libtpu_or_with_another_plugin_the_choice_is_jaxs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packages: tuple[str, ...]
) -> None:
    install(monkeypatch, *packages)
    assert not leave_out_absent_tpu(tmp_path)
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize(
    ("file", "content"),
    [("dev/accel0", ""), ("dev/vfio/0", ""), ("sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n")],
)
def test_a_tpu_is_not_overlooked(tmp_path: Path, file: str, content: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert not leave_out_absent_tpu(tmp_path)


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"])
def test_what_the_user_says_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(name, "tpu")
    assert not leave_out_absent_tpu(tmp_path)


def test_what_jax_sets_where_there_is_no_tpu_is_not_the_users_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")
    assert tpu_is_absent(tmp_path)


@pytest.mark.parametrize("name", GPU_SHARE_VARIABLES)
def test_jax_takes_most_of_a_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """JAX itself reads it; it refuses to be told twice."""
    for each in GPU_SHARE_VARIABLES:
        monkeypatch.setenv(each, "to be restored")
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "0.5")
    take_gpu_memory()
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.5
    monkeypatch.delenv(name)
    take_gpu_memory()
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == GPU_MEMORY_SHARE
