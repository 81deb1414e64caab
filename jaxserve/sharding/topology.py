"""Slices of chips: by name, as facts, and as abstract devices to compile for where there is no chip.

`v6e:2x4` is eight chips in two rows of four. A TPU program is compiled by libtpu, which wants its environment before it
is loaded and keeps it; so compiling for a slice happens in a process of its own, with `environment` set.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import IO, Any, TypeAlias

import jax

from jaxserve.core.environment import child_environment
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.sharding.chips import CHIPS, Chip, chip_named

Message: TypeAlias = dict[str, Any]
"""A JSON object from one process to another."""

_NAME = re.compile(r"(?P<chip>\w+):(?P<grid>\d{1,9}(?:x\d{1,9}){0,2})")
_ERROR_LINES = 6
_ERROR = "jaxserve_error"
_CHIPS_PER_HOST = 4
_POD_SIDE = 16
_CUBE_SIDE = 4
_GKE = "cloud.google.com/gke-tpu"

HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
"""
"""XLA's description of a Hopper GPU (`GpuTargetConfigProto`), which it needs to compile without one.

The last line becomes JAX's name of the device, and executables are loaded only where the name is the same: 9.0 alone,
which is all that XLA looks at, would let a program laid out for 132 cores into a GPU of fewer.
"""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips and how they are wired.

    Attributes:
        chip: Their kind.
        grid: How many lie along each axis.
    """

    chip: Chip
    grid: tuple[int, ...]

    def __str__(self) -> str:
        """`v6e:2x4`."""
        return f"{self.chip.name}:{self.size}"

    @property
    def size(self) -> str:
        """`2x4`, as GKE calls it, too."""
        return "x".join(map(str, self.grid))

    @property
    def node_selector(self) -> Mapping[str, str]:
        """What a GKE pod asks for to be put on such a slice; empty for GPUs, which are asked for by number."""
        if self.chip.gke_accelerator is None:
            return {}
        return {f"{_GKE}-accelerator": self.chip.gke_accelerator, f"{_GKE}-topology": self.size}

    @property
    def num_chips(self) -> int:
        """Chips, as they are rented."""
        return math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """JAX devices, as a mesh counts them."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis is closed: in two dimensions one of 16 chips, in three all if they make whole 4x4x4 cubes.

        Smaller slices are cut out of a ring, and optical links close cubes only
        (jax-ml.github.io/scaling-book/tpus, "TPU Networking").
        """
        match self.chip.links.num_axes:
            case 2:
                return tuple(side == _POD_SIDE for side in self.grid)
            case 3:
                return (all(side % _CUBE_SIDE == 0 for side in self.grid),) * 3
        return (False,) * len(self.grid)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_COUNTS = ("1", "2", "4", "8")


def slices(chip: Chip) -> list[Topology]:
    """Slices of a chip that are rented as one, ascending: GKE's topologies up to 512 chips, the GPUs of a host."""
    sizes = {0: _COUNTS, 2: _FLAT, 3: _DEEP}[chip.links.num_axes]
    return [parse_topology(f"{chip.name}:{size}") for size in sizes]


def parse_topology(name: str) -> Topology:
    """Reads `v6e:2x4` (v4, v5p and v7x have three axes, GPUs one number).

    Raises:
        ConfigError: It is no topology, or larger than any slice; the message says what one looks like.
    """
    found = _NAME.fullmatch(name.lower())
    if found is None:
        raise ConfigError(
            f"{name!r} is no topology; write a chip and its grid, such as v6e:2x4 or tpu7x:2x2x1 (chips: "
            f"{', '.join(CHIPS)}).",
            param="topology",
        )
    chip = chip_named(found["chip"])
    grid = tuple(int(side) for side in found["grid"].split("x"))
    wanted = chip.links.num_axes or 1
    if len(grid) != wanted or not all(grid):
        example = {1: "8", 2: "2x4", 3: "2x2x1"}[wanted]
        raise ConfigError(f"{name!r}: a topology of {chip.title} looks like {chip.name}:{example}.", param="topology")
    topology = Topology(chip=chip, grid=grid)
    if topology.num_chips > chip.max_chips:
        raise ConfigError(
            f"{topology} would be {topology.num_chips} chips, and the largest slice of {chip.title} has "
            f"{chip.max_chips}; ask for a smaller one.",
            param="topology",
        )
    return topology


def environment(topology: Topology) -> dict[str, str]:
    """What a process that compiles for a topology must have in its environment before it loads JAX."""
    common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if topology.chip.platform == "gpu":
        return common
    counted = topology.num_chips * topology.chip.counted_per_chip
    return common | {
        # Without these libtpu asks a metadata server that is not there.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology.chip.slice_type.format(max(counted, topology.chip.counted_per_chip * 4)),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def require_compiler(topology: Topology) -> None:
    """Makes sure that what compiles for a topology is installed.

    Raises:
        ConfigError: It is not; the message says what to install.
    """
    if topology.chip.platform == "tpu":
        if find_spec("libtpu") is None:
            raise ConfigError(
                f"Compiling for {topology} needs libtpu; install it with `pip install 'jaxserve[tpu]'`.",
                param="topology",
            )
    elif find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        raise ConfigError(
            f"Compiling for {topology} needs JAX's CUDA plugin, but no GPU; install it with `pip install "
            f"'jaxserve[gpu]'`, or the compiler alone with `pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
            f"jax-cuda13-pjrt=={jax.__version__}`.",
            param="topology",
        )


def abstract_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology that is not here, in the order of its grid; only in a process with `environment`.

    Raises:
        ConfigError: The compiler is missing, or knows no such slice.
    """
    from jax.experimental import topologies

    require_compiler(topology)
    chip = topology.chip
    try:
        if chip.platform == "tpu":
            # A host has four chips unless the slice is smaller.
            bounds = (
                {"chips_per_host_bounds": (*topology.grid, 1, 1)[:3]} if topology.num_chips < _CHIPS_PER_HOST else {}
            )
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **bounds)
        else:
            target = HOPPER.format(
                cores=chip.cores, bandwidth=int(chip.hbm_bytes_per_s), memory=chip.hbm_bytes, kind=chip.device_kind
            )
            found = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=target, topology=f"1x1x{topology.num_devices}"
            )
    except Exception as error:  # libtpu raises what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sizes = ", ".join(each.size for each in slices(chip))
        raise ConfigError(
            f"There is no slice {topology} ({reason}); {chip.title} comes as {sizes}, among others.", param="topology"
        ) from error
    # A description of v4 has a device for each of a chip's cores; a real v4 joins them.
    devices: list[Any] = list(found.devices)
    return [device for device in devices if chip.name != "v4" or device.core_on_chip == 0]


class DevicelessError(JaxserveError):
    """Compiling without devices failed in the process that did it."""


@dataclass(frozen=True, kw_only=True)
class Deviceless:
    """A process that compiles for a topology and waits for its one request; see `deviceless`.

    Attributes:
        topology: What it compiles for.
        process: The process.
        log: What it writes to standard error.
    """

    topology: Topology
    process: subprocess.Popen[str]
    log: IO[str]

    def ask(self, request: Message, on_message: Callable[[Message], None] | None = None) -> Message:
        """Sends the request and waits for the answer.

        Args:
            request: What the module is told.
            on_message: Told every object but the last as it comes.

        Raises:
            ConfigError: The module raised an error of ours.
            DevicelessError: The process failed; the message ends with what it said last.
        """
        said = _converse(self.process, request, on_message)
        if said is None:
            self.log.seek(0)
            lines = [line.strip() for line in self.log if line.strip()][-_ERROR_LINES:]
            raise DevicelessError(
                f"Compiling for {self.topology} failed: {' | '.join(lines) or 'the process died silently'}"
            )
        if _ERROR in said:
            raise ConfigError(said[_ERROR])
        return said


@contextlib.contextmanager
def deviceless(
    topology: Topology, module: str, *, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Deviceless]:
    """Starts a module in a process that can compile for a topology; it and its temporary files end with the context.

    The module reads one JSON object from standard input, a line, and writes JSON objects to standard output, a line
    each; the last one is its answer. Standard input stays open for as long as this process wants the answer: when it
    closes, because this process was killed, that one ends, too.

    Args:
        topology: What to compile for.
        module: What runs, as `python -m module`.
        variables: What its environment holds besides, such as flags of the compiler.

    Raises:
        ConfigError: The compiler is missing.
    """
    require_compiler(topology)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        tempfile.TemporaryDirectory(prefix="jaxserve-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-m", module],
            env=child_environment({**environment(topology), "TMPDIR": folder, **variables}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Deviceless(topology=topology, process=process, log=log)
        finally:
            process.kill()


def run_deviceless(
    topology: Topology,
    module: str,
    request: Message,
    *,
    on_message: Callable[[Message], None] | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Message:
    """Asks one thing of a `deviceless` process.

    Args:
        topology: What to compile for.
        module: What runs, as `python -m module`.
        request: What it is told.
        on_message: Told every object but the last as it comes.
        variables: What its environment holds besides, such as flags of the compiler.

    Raises:
        ConfigError: The compiler is missing, or the module raised an error of ours.
        DevicelessError: The process failed; the message ends with what it said last.
    """
    with deviceless(topology, module, variables=variables) as process:
        return process.ask(request, on_message)


def reply(message: Message) -> None:
    """Sends a message from the process that `run_deviceless` started."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(respond: Callable[[Message], Message]) -> None:
    """Answers the request that `run_deviceless` made, in the process it started.

    Args:
        respond: Turns the request into the answer; errors of ours become the caller's.
    """
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_caller, name="jaxserve-caller", daemon=True).start()
    try:
        reply(respond(request))
    except JaxserveError as error:
        reply({_ERROR: error.message})


def _end_with_caller() -> None:
    """Ends this process once nobody holds the other end of its standard input; nothing else comes in there."""
    # The descriptor itself: a thread that waits in `sys.stdin` would hold its lock when the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _converse(
    process: subprocess.Popen[str], request: Message, on_message: Callable[[Message], None] | None
) -> Message | None:
    """Sends the request and reads messages to the end; the last one, or None if the process failed."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:  # it died before it read; what it said tells why
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    last: Message | None = None
    for line in process.stdout:
        if last is not None and on_message is not None:
            on_message(last)
        last = json.loads(line)
    return last if process.wait() == 0 else None
