"""Sizes and checksums of fetched files, kept in a record, to find out later whether the files are still whole.

Sizes are compared whenever a model is used, which costs nothing; hashing takes about a second a gigabyte and is done
when somebody asks for it (`jaxserve pull`, `jaxserve doctor`, `serve --verify-model`).
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxserve.checkpoint.tensors import Progress
from jaxserve.core.errors import CheckpointError
from jaxserve.core.json_file import read_optional_object
from jaxserve.core.regular_file import open_regular

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20


class Check(enum.Enum):
    """How a model that is here already is looked at before it is used."""

    SIZES = "sizes"
    """Compare sizes; a damaged file is an error."""

    HASHES = "hashes"
    """Compare checksums too; a damaged file is an error."""

    REPAIR = "repair"
    """Compare checksums too; a damaged file is fetched again."""


class Hash(enum.StrEnum):
    """How a checksum is computed."""

    SHA256 = "sha256"
    GIT_SHA1 = "git-sha1"
    """Git's name of a file: the hub names small files by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What tells a file from a damaged one.

    Attributes:
        num_bytes: Its size; None if it is not known.
        kind: How the checksum is computed.
        digest: The checksum, in hexadecimal; it may be cut off.
        mtime_ns: When the file was last written, if it was whole then; 0 if that is not kept.
    """

    num_bytes: int | None
    kind: Hash
    digest: str
    mtime_ns: int = 0


def damage(path: Path, expected: Fingerprint, *, hashes: bool, progress: Progress | None = None) -> str | None:
    """What is wrong with a file, as a clause; None if nothing is.

    Args:
        path: The file.
        expected: What it should be.
        hashes: Compute its checksum, too.
        progress: Told about bytes hashed.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        if expected.num_bytes not in (None, size):
            return f"{path.name} has {size} bytes, not {expected.num_bytes}"
        if not hashes:
            return None
        found = digest_of(path, expected.kind, progress)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if found.startswith(expected.digest):
        return None
    return f"{path.name} has the {expected.kind} {found}, not {expected.digest}"


def digest_of(path: Path, kind: Hash, progress: Progress | None = None) -> str:
    """The checksum of a file, in hexadecimal.

    Args:
        path: The file.
        kind: How it is computed.
        progress: Told about bytes hashed.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256() if kind is Hash.SHA256 else hashlib.sha1(usedforsecurity=False)
        if kind is Hash.GIT_SHA1:
            digest.update(f"blob {size}\0".encode())
        done = 0
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress("check files", done, size)
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Fingerprint]:
    """The fingerprints in a record, by file name; empty if there is none.

    A record that cannot be read is no reason to refuse a model: it counts as absent, and a warning says so.
    """
    files = read_facts(path).get("files")
    found = {}
    for name, entry in files.items() if isinstance(files, dict) else ():
        if os.path.basename(name) != name:
            continue  # no file of the model's folder
        match entry:
            case {"num_bytes": int(num_bytes), "kind": ("sha256" | "git-sha1") as kind, "digest": str(digest)}:
                mtime_ns = entry.get("mtime_ns")
                found[name] = Fingerprint(
                    num_bytes=num_bytes,
                    kind=Hash(kind),
                    digest=digest,
                    mtime_ns=mtime_ns if isinstance(mtime_ns, int) else 0,
                )
    return found


def read_facts(path: Path) -> dict[str, object]:
    """All of a record, as it was written; empty if there is none."""
    try:
        return read_optional_object(path)
    except CheckpointError as error:
        logger.warning("checksums are not compared: %s", error)
        return {}


def write_record(path: Path, files: Mapping[str, Fingerprint], **facts: str) -> None:
    """Keeps fingerprints; where nothing can be written nothing is kept, and a warning says so.

    Args:
        path: The record, replaced if it is there.
        files: By file name.
        **facts: What else to keep in it.
    """
    content = json.dumps({**facts, "files": {name: asdict(each) for name, each in files.items()}}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}-{os.getpid()}")
        written.write_text(content)
        written.replace(path)
    except OSError as error:
        logger.warning("checksums cannot be kept in %s: %s", path, error.strerror)
