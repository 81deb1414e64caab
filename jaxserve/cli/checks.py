"""The checks of `jaxserve doctor`: each looks at one thing and says what it found and what to do.

Whatever can hang (JAX looking for devices, a host of the slice that does not answer) runs under a time limit.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxserve.cli.version import installed_version, versions

GIB = 1 << 30
COORDINATOR_PORT = 8476
"""Where the leader of a slice listens for the others (JAX's default)."""

OLDEST_JAX = (0, 10, 2)

VECTOR_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Instruction sets that XLA's matmuls profit from, as Linux names them."""

PLUGINS = ("libtpu", *(f"jax-cuda{release}-{part}" for release in (12, 13) for part in ("plugin", "pjrt")))
"""Packages that bring an accelerator to JAX."""

_DEVICE_SCRIPT = """
import json, jax
devices = jax.local_devices()
limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
print("FOUND " + json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind, "local": len(devices),
    "global": jax.device_count(), "memory_bytes": limits[0]}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        name: What was looked at.
        status: "ok", "warning" (works, but not well) or "problem" (will not work).
        found: What is there.
        advice: What to do; empty if all is well.
    """

    name: str
    status: str
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """As a JSON object."""
        return asdict(self)


def check_versions() -> list[Finding]:
    """Are the packages installed, and JAX new enough?"""
    findings = []
    for name, found in versions().items():
        if found is None:
            advice = f"Install it: pip install {name}."
            findings.append(Finding(name=name, status="problem", found="not installed", advice=advice))
        elif name in ("jax", "jaxlib") and _release(found) < OLDEST_JAX:
            advice = "Upgrade it: pip install -U jax jaxlib."
            findings.append(Finding(name=name, status="problem", found=found, advice=advice))
        else:
            findings.append(Finding(name=name, status="ok", found=found))
    return findings


def check_plugins() -> Finding:
    """Which accelerators is JAX installed for, and do the plugins belong to this JAX?"""
    installed = {name: version for name in PLUGINS if (version := installed_version(name)) is not None}
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    jaxlib = installed_version("jaxlib") or ""
    # CUDA plugins are released with jaxlib; libtpu has releases of its own.
    others = [name for name, version in installed.items() if name != "libtpu" and _release(version) != _release(jaxlib)]
    if jaxlib and others:
        wanted = " ".join(f"{name}=={jaxlib}" for name in others)
        advice = f"JAX ignores plugins of another release than its own: pip install {wanted}."
        return Finding(name="plugins", status="problem", found=f"{found}, but jaxlib {jaxlib}", advice=advice)
    return Finding(name="plugins", status="ok", found=found or "none: JAX runs on the CPU")


def check_devices(timeout_s: float, script: str = _DEVICE_SCRIPT) -> Finding:
    """Does JAX find its devices, in another process and in time?

    Args:
        timeout_s: Longest it may take.
        script: Prints `FOUND` and a JSON object.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(
            name="devices",
            status="problem",
            found=f"JAX did not find its devices within {timeout_s:g} s",
            advice="On TPUs another process may hold the chips, or other hosts of the slice have not started: "
            "end that process "
            "or start the same command on every host. JAX_PLATFORMS=cpu leaves accelerators out.",
        )
    answers = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not answers:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(
            name="devices",
            status="problem",
            found=reason[:300],
            advice="Check JAX_PLATFORMS and the accelerator's driver.",
        )
    facts = json.loads(answers[-1])
    memory = "" if facts["memory_bytes"] is None else f", {facts['memory_bytes'] / GIB:.1f} GiB each"
    found = f"{facts['local']} local and {facts['global']} in all, {facts['platform']} ({facts['kind']}{memory})"
    return _judge_devices(facts["platform"], found)


def check_cpu(info: Path = Path("/proc/cpuinfo")) -> Finding:
    """How many cores are ours, and which vector units they have.

    Args:
        info: Linux's description of the processor.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    lines = info.read_text().splitlines() if info.exists() else []
    words = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    units = [unit for unit in VECTOR_UNITS if unit in words]
    found = f"{cores} cores; {' '.join(units) or 'vector units unknown'}"
    if cores < 2:
        return Finding(
            name="cpu", status="warning", found=found, advice="Two cores or more: the host's work needs its own."
        )
    if words and "avx2" not in words:
        return Finding(
            name="cpu", status="warning", found=found, advice="Without AVX2 a model on the CPU will be slow."
        )
    return Finding(name="cpu", status="ok", found=found)


def check_memory(info: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Finding:
    """Is there memory for the smallest model?

    Args:
        info: Linux's account of its memory.
        limit: What the container may use, in bytes or "max".
    """
    sizes = [line.split() for line in info.read_text().splitlines()] if info.exists() else []
    available = next((int(words[1]) * 1024 for words in sizes if words[0] == "MemAvailable:"), None)
    text = limit.read_text().strip() if limit.exists() else "max"
    bounds = [size for size in (available, int(text) if text.isdigit() else None) if size is not None]
    if not bounds:
        return Finding(
            name="memory", status="warning", found="unknown", advice="Make sure that weights and KV pool fit."
        )
    found = f"{min(bounds) / GIB:.1f} GiB available"
    if min(bounds) < 2 * GIB:
        return Finding(
            name="memory", status="warning", found=found, advice="The demo model takes up to 1.6 GB; free some."
        )
    return Finding(name="memory", status="ok", found=found)


def check_folder(folder: Path | None) -> Finding:
    """Can the cache be written, and is there room?

    Args:
        folder: The cache directory; it is made if it is not there. None if there is no home for one.
    """
    if folder is None:
        advice = "Models and compiled programs are kept nowhere: name a folder with --cache-dir or JAXSERVE_CACHE."
        return Finding(name="cache", status="problem", found="there is no home directory", advice=advice)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        advice = "Make it writable, or choose another with --cache-dir or JAXSERVE_CACHE."
        return Finding(name="cache", status="problem", found=f"{folder}: {error.strerror}", advice=advice)
    found = f"{folder}, {free / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Finding(name="cache", status="warning", found=found, advice="Free some space: models are kept there.")
    return Finding(name="cache", status="ok", found=found)


def check_port(host: str, port: int) -> Finding:
    """Can the server listen there?

    Args:
        host: Address.
        port: Port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            # As servers do: a port whose last connections are still winding down is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        advice = _listening_advice(error)
        return Finding(name="port", status="problem", found=f"{host}:{port}: {error.strerror or error}", advice=advice)
    return Finding(name="port", status="ok", found=f"{host}:{port} is free")


def _listening_advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "End what listens there, or choose another with --port."
    if isinstance(error, PermissionError):
        return "Ports below 1024 may be root's alone; choose another with --port."
    return "That is no address of this machine; give one with --host, such as 127.0.0.1, or 0.0.0.0 for all it has."


def check_cluster(
    variables: Mapping[str, str], *, timeout_s: float = 3.0, port: int = COORDINATOR_PORT
) -> list[Finding]:
    """Can the other hosts of the slice be reached?

    A host that refuses the connection is up: nothing listens there before serving starts.

    Args:
        variables: What the cluster says about the slice.
        timeout_s: Longest a host may take to answer.
        port: Where to knock.
    """
    names = [name.strip() for name in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
    findings = []
    index = variables.get("TPU_WORKER_ID", variables.get("LWS_WORKER_INDEX"))
    size = variables.get("LWS_GROUP_SIZE")
    if size is not None and names and size != str(len(names)):
        found = f"LWS_GROUP_SIZE={size} but {len(names)} names in TPU_WORKER_HOSTNAMES"
        advice = "Make the LeaderWorkerSet's size the number of hosts of the slice."
        findings.append(Finding(name="slice", status="problem", found=found, advice=advice))
    if len(names) > 1 and (index is None or not index.isdigit() or int(index) >= len(names)):
        found = f"{len(names)} hosts, but this one's number is {index}"
        advice = f"TPU_WORKER_ID must be 0 to {len(names) - 1}, another on each host."
        findings.append(Finding(name="slice", status="problem", found=found, advice=advice))
    leader = variables.get("LWS_LEADER_ADDRESS")
    hosts = [*names, *([leader] if leader else [])] if len(names) > 1 or leader else []
    return findings + [_check_host(host, port, timeout_s) for host in dict.fromkeys(hosts)]


def _check_host(host: str, port: int, timeout_s: float) -> Finding:
    name = f"host {host}"
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except ConnectionRefusedError:
        return Finding(name=name, status="ok", found="answers")
    except socket.gaierror:
        advice = "Its pod may not have started, or the headless service is missing: kubectl get pods,services."
        return Finding(name=name, status="problem", found="no such name", advice=advice)
    except OSError as error:
        found = "no answer in time" if isinstance(error, TimeoutError) else str(error.strerror or error)
        advice = "Check that the pod runs and that no network policy stands between the hosts."
        return Finding(name=name, status="problem", found=found, advice=advice)
    return Finding(name=name, status="ok", found=f"listens on {port}")


def _judge_devices(platform: str, found: str) -> Finding:
    """JAX runs on the CPU: is there an accelerator that it does not see?"""
    has_tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio/0").exists()
    has_gpu = Path("/dev/nvidia0").exists()
    if platform == "cpu" and (has_tpu or has_gpu):
        extra = "tpu" if has_tpu else "gpu"
        advice = f"Install its support: pip install 'jaxserve[{extra}]'; JAX_PLATFORMS must not say cpu."
        return Finding(name="devices", status="warning", found=f"{found}; a {extra.upper()} is not used", advice=advice)
    return Finding(name="devices", status="ok", found=found)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
