"""A TPU that is not there, though its compiler is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxserve.core.environment import leave_out_absent_tpu


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "to be restored")
    for name in [name for name in os.environ if name.startswith("TPU_")] + ["JAX_PLATFORMS"]:
        monkeypatch.delenv(name)


def test_without_a_tpu_the_cpu_is_chosen(tmp_path: Path) -> None:
    assert not leave_out_absent_tpu(has_libtpu=False, has_cuda=False, root=tmp_path)
    assert not leave_out_absent_tpu(has_libtpu=True, has_cuda=True, root=tmp_path)
    assert "JAX_PLATFORMS" not in os.environ
    assert leave_out_absent_tpu(has_libtpu=True, has_cuda=False, root=tmp_path)
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("file", "content"),
    [("dev/accel0", ""), ("dev/vfio/0", ""), ("sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n")],
)
def test_a_tpu_is_not_overlooked(tmp_path: Path, file: str, content: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert not leave_out_absent_tpu(has_libtpu=True, has_cuda=False, root=tmp_path)


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"])
def test_what_the_user_says_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(name, "tpu")
    assert not leave_out_absent_tpu(has_libtpu=True, has_cuda=False, root=tmp_path)
