"""A repository's files in the hub's cache, and whether they are as they were fetched.

The cache keeps each file under its checksum and links to it from the snapshot's folder, so checksums are there without
asking the hub; sizes are kept in a record of ours (and checksums, where the cache has files instead of links).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from jaxserve.checkpoint.checksums import (
    Fingerprint,
    Hash,
    damage,
    digest_of,
    read_facts,
    read_record,
    write_record,
)
from jaxserve.checkpoint.tensors import Progress
from jaxserve.core.errors import CheckpointError

FOLDER = "hub"
"""Where records are in the cache directory."""

_DIGESTS = {
    Hash.SHA256: re.compile(r"[0-9a-f]{64}"),
    Hash.GIT_SHA1: re.compile(r"[0-9a-f]{40}"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One revision of a repository in the hub's cache.

    Attributes:
        repo_id: "owner/name".
        folder: Its files, named for the revision.
        patterns: Of the files that are looked at.
        records: Folder where checksums are kept; None keeps none.
    """

    repo_id: str
    folder: Path
    patterns: tuple[str, ...]
    records: Path | None

    def damaged(self, *, hashes: bool, progress: Progress | None = None) -> dict[str, str]:
        """Files that are not as they were fetched, each with what is wrong, as a clause.

        Args:
            hashes: Compute checksums, too.
            progress: Told about bytes hashed.
        """
        kept = {} if self._record is None else read_record(self._record)
        found = {}
        for name in sorted({*self._names(), *kept}):
            path = self.folder / name
            expected = kept.get(name) or _by_link(path)
            wrong = None if expected is None else damage(path, expected, hashes=hashes, progress=progress)
            if wrong is not None:
                found[name] = wrong
        return found

    def remove(self, names: dict[str, str]) -> None:
        """Takes files out of the cache, with what they link to there; what is elsewhere is somebody's own.

        Raises:
            CheckpointError: The cache cannot be written.
        """
        cache = self.folder.resolve().parents[2]  # of CACHE/models--owner--name/snapshots/REVISION
        for name in names:
            link = self.folder / name
            try:
                # The cache may keep what several repositories share in a third place.
                if link.is_symlink():
                    for each in (link.resolve(), Path(os.path.normpath(self.folder.resolve() / os.readlink(link)))):
                        if each.is_relative_to(cache):
                            each.unlink(missing_ok=True)
                link.unlink(missing_ok=True)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"The damaged file {link} cannot be removed: {error}.") from error

    def keep(self) -> None:
        """Writes down what the files are now; whoever calls it has found them whole, or fetched them just now.

        Raises:
            CheckpointError: One cannot be read.
        """
        if self._record is None:
            return
        try:
            files = {name: _fingerprint(self.folder / name) for name in self._names()}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from error
        write_record(self._record, files, repo_id=self.repo_id, folder=str(self.folder))

    @property
    def _record(self) -> Path | None:
        return None if self.records is None else self.records / record_name(self.repo_id, self.folder.name)

    def _names(self) -> list[str]:
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if not path.is_dir() and any(fnmatch(path.name, pattern) for pattern in self.patterns)
        )


def record_name(repo_id: str, revision: str) -> str:
    """What a snapshot's record is called."""
    return f"{repo_id.replace('/', '--')}@{revision}.json"


def _fingerprint(path: Path) -> Fingerprint:
    linked = _by_link(path)
    kind, digest = (linked.kind, linked.digest) if linked else (Hash.SHA256, digest_of(path, Hash.SHA256))
    return Fingerprint(num_bytes=path.stat().st_size, kind=kind, digest=digest)


def _by_link(path: Path) -> Fingerprint | None:
    """What the cache's link says of a file; None if it is no link of that kind."""
    if not path.is_symlink():
        return None
    name = Path(os.readlink(path)).name
    for kind, pattern in _DIGESTS.items():
        if pattern.fullmatch(name):
            return Fingerprint(num_bytes=None, kind=kind, digest=name)
    return None


def recorded_snapshots(cache_dir: Path) -> Iterator[Snapshot]:
    """The snapshots that a cache directory has records of, as far as they are still in the hub's cache."""
    for record in sorted((cache_dir / FOLDER).glob("*.json")):
        match read_facts(record):
            case {"repo_id": str(repo_id), "folder": str(folder)} if os.path.isdir(folder):
                yield Snapshot(repo_id=repo_id, folder=Path(folder), patterns=(), records=record.parent)
