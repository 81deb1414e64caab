"""Slices by name, and devices to compile for that are not here."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.chips import CHIPS, GIB, Chip, chip_named
from jaxserve.sharding.topology import (
    DevicelessError,
    deviceless,
    environment,
    parse_topology,
    run_deviceless,
    slices,
)

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="JAX's CUDA plugin is not installed",
)


@pytest.fixture(autouse=True)
def modules_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the processes that tests start find the modules beside this folder."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")


@pytest.mark.parametrize(
    ("name", "num_chips", "num_devices", "hbm_gib"),
    [("v6e:2x4", 8, 8, 32), ("v5e:16x16", 256, 256, 16), ("v5p:2x2x1", 4, 4, 95), ("tpu7x:2x2x1", 4, 8, 96)],
)
def test_slices(name: str, num_chips: int, num_devices: int, hbm_gib: int) -> None:
    topology = parse_topology(name)
    assert (topology.num_chips, topology.num_devices) == (num_chips, num_devices)
    assert topology.chip.hbm_bytes == hbm_gib * GIB
    assert str(topology) == name


def test_gpus_are_counted() -> None:
    assert parse_topology("h200:8").num_devices == 8


def test_what_gke_is_asked_for() -> None:
    assert parse_topology("tpu7x:2x2x1").node_selector == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "2x2x1",
    }
    assert parse_topology("h200:8").node_selector == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6e", "is no topology; write a chip and its grid, such as v6e:2x4"),
        ("v9:2x2", "'v9' is no chip; the chips are v4, v5e, v5p, v6e, tpu7x, h100, h200"),
        ("v6e:2x2x2", "looks like v6e:2x4"),
        ("v5p:2x2", "looks like v5p:2x2x1"),
        ("h100:2x4", "looks like h100:8"),
        ("v6e:0x4", "looks like v6e:2x4"),
        ("v6e:1000x1000", "v6e:1000x1000 would be 1000000 chips, and the largest slice of TPU v6e .* has 256;"),
        ("v5p:16x16x28", "would be 7168 chips, and .* has 6144; ask for a smaller one"),
        ("h100:16", "would be 16 chips, and the largest slice of NVIDIA H100 SXM has 8;"),
        (f"v6e:{'9' * 5000}x1", "is no topology"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_largest_slice_is_one(chip: Chip) -> None:
    largest = {0: "8", 2: "16x16", 3: f"16x16x{chip.max_chips // 256}"}[chip.links.num_axes]
    assert parse_topology(f"{chip.name}:{largest}").num_chips == chip.max_chips
    assert max(each.num_chips for each in slices(chip)) <= chip.max_chips


def test_v7x_is_an_alias() -> None:
    assert chip_named("v7x") is CHIPS["tpu7x"]
    assert str(parse_topology("V6E:2x4")) == "v6e:2x4"


def test_peaks() -> None:
    assert CHIPS["v6e"].peak_flops("int8") == 2 * CHIPS["v6e"].peak_flops("bfloat16")
    assert CHIPS["v4"].peak_flops("float8_e4m3fn") == CHIPS["v4"].peak_flops("bfloat16"), "no unit of its own"


def test_compilers_stay_off_the_metadata_server() -> None:
    settings = environment(parse_topology("v6e:2x4"))
    assert settings["TPU_SKIP_MDS_QUERY"] == "1"
    assert settings["TPU_ACCELERATOR_TYPE"] == "v6e-8"
    assert settings["JAX_PLATFORMS"] == "cpu"


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.sharding.topology.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[tpu\]'"):
        run_deviceless(parse_topology("v6e:2x4"), "jaxserve", {})
    with pytest.raises(ConfigError, match=r"but no GPU; .* `pip install 'jaxserve\[gpu\]'`, or .* jax-cuda13-pjrt==\d"):
        run_deviceless(parse_topology("h200:1"), "jaxserve", {})


@needs_libtpu
def test_what_a_dead_process_said_last_is_in_the_error() -> None:
    with pytest.raises(DevicelessError, match=r"v6e:1x1 failed: .*No module named no_such_module"):
        run_deviceless(parse_topology("v6e:1x1"), "no_such_module", {})


def test_a_process_does_not_outlive_its_caller() -> None:
    """It has its request while standard input is open, and ends when that closes, as it does when the caller dies."""
    command = [sys.executable, "-m", "deviceless_sleeper"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write('{"wanted": 1}\n')
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == {"asked": {"wanted": 1}}
            process.stdin.close()
            assert process.wait(timeout=10) == 1
        finally:
            process.kill()


@needs_libtpu
def test_a_process_ends_with_its_context_and_so_do_its_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with deviceless(parse_topology("v6e:1x1"), "deviceless_sleeper") as worker:
        [folder] = tmp_path.iterdir()
        (folder / "dump").touch()
    assert worker.process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x4", "v6e:1x1", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_devices_of_slices(name: str) -> None:
    """Counted, and called as the chip says: a bundle is loaded only where devices have the same name."""
    seen: list[object] = []
    topology = parse_topology(name)
    answer = run_deviceless(topology, "deviceless_module", {"topology": name}, on_message=seen.append)
    assert seen == [{"progress": 1}]
    assert answer == {"devices": topology.num_devices, "kind": topology.chip.device_kind}


@needs_cuda
@pytest.mark.parametrize(("name", "kind"), [("h100:2", "NVIDIA H100 80GB HBM3"), ("h200:1", "NVIDIA H200")])
def test_gpus_that_are_not_here_are_called_as_real_ones(name: str, kind: str) -> None:
    """As CUDA's driver calls the SXM models, and so JAX."""
    answer = run_deviceless(parse_topology(name), "deviceless_module", {"topology": name})
    assert answer == {"devices": parse_topology(name).num_devices, "kind": kind}


@needs_libtpu
def test_a_slice_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"There is no slice v6e:3x7 .*TPU v6e .* comes as 1x1, 2x2, 2x4"):
        run_deviceless(parse_topology("v6e:3x7"), "deviceless_module", {"topology": "v6e:3x7"})
