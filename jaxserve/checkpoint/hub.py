"""Checkpoints from the Hugging Face hub, through `huggingface_hub` and its cache.

The library resumes broken downloads, verifies them, and honours its own settings (HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT, the stored token); here are only the choice of files, progress, and errors a user can act on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import errors
from tqdm.asyncio import tqdm_asyncio

from jaxserve.checkpoint.checksums import Check
from jaxserve.checkpoint.snapshot import Snapshot
from jaxserve.checkpoint.tensors import Progress
from jaxserve.core.errors import CheckpointError

if TYPE_CHECKING:
    _Bar = tqdm_asyncio[Any]
else:
    _Bar = tqdm_asyncio  # generic only for type checkers

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
CONFIG_FILES = ["config.json", "generation_config.json"]
"""What says how a model is shaped; a few kilobytes."""

_NOT_THESE = ["*/*", "consolidated*"]
"""Copies of the weights in other layouts."""


def fetch_snapshot(
    repo_id: str,
    *,
    offline: bool,
    progress: Progress | None,
    files: Sequence[str] = FILES,
    check: Check = Check.SIZES,
    records: Path | None = None,
) -> Path:
    """The folder of a repository in the hub's cache, downloaded as far as it is not there yet.

    Args:
        repo_id: "owner/name".
        offline: Use only what is in the cache.
        progress: Told about bytes downloaded and hashed.
        files: Patterns of the files wanted; all that serving needs by default.
        check: How files that are here already are looked at.
        records: Folder where checksums are kept; None keeps none.

    Raises:
        CheckpointError: The repository cannot be had, or a file of it is damaged; the message says what to do.
    """
    num_fetched = 0

    def watch(what: str, done: int, total: int) -> None:
        nonlocal num_fetched
        num_fetched = max(num_fetched, done)
        if progress is not None:
            progress(what, done, total)

    folder = _download(repo_id, files, watch, offline=offline)
    snapshot = Snapshot(repo_id=repo_id, folder=folder, patterns=tuple(files), records=records)
    damaged = snapshot.damaged(hashes=check is not Check.SIZES, progress=progress)
    if damaged and check is Check.REPAIR and not offline:
        snapshot.remove(damaged)
        _download(repo_id, files, watch, offline=False)
        damaged = snapshot.damaged(hashes=True, progress=progress)
    if damaged:
        raise CheckpointError(
            f"{repo_id} is damaged in {folder} ({'; '.join(damaged.values())}); `jaxserve pull {repo_id}` fetches what "
            "is damaged again."
        )
    if num_fetched or check is not Check.SIZES:
        snapshot.keep()
    return folder


def _download(repo_id: str, files: Sequence[str], progress: Progress, *, offline: bool) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            allow_patterns=list(files),
            ignore_patterns=_NOT_THESE,
            local_files_only=offline,
            tqdm_class=_reporter(progress),
        )
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise CheckpointError(_explanation(repo_id, error, offline=offline)) from error
    return Path(folder)


def _explanation(repo_id: str, error: Exception, *, offline: bool) -> str:
    where = f"https://huggingface.co/{repo_id}"
    match error:
        case errors.GatedRepoError():
            return f"{repo_id} is gated; accept its terms at {where} and log in with `hf auth login`."
        case errors.RepositoryNotFoundError():
            return (
                f"{repo_id} is not on the Hugging Face hub, or private; check the name or log in with `hf auth login`."
            )
        case errors.HFValidationError():
            return f"{repo_id!r} is not a valid Hugging Face repository id ({error})."
        case errors.LocalEntryNotFoundError() if offline:
            return (
                f"{repo_id} is not complete in the local Hugging Face cache, and --offline fetches nothing; leave that "
                "out once, or give the path of a downloaded folder."
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return (
                f"{repo_id} is not complete in the local Hugging Face cache and the hub cannot be reached; check the "
                "network, or give the path of a downloaded folder."
            )
        case errors.HfHubHTTPError():
            return f"The Hugging Face hub refused {repo_id} ({str(error).splitlines()[0]}); try again later."
        case _:
            return f"{repo_id} cannot be downloaded ({error}); check the network and the space on disk."


def _reporter(progress: Progress | None) -> type[_Bar]:
    """A progress bar that draws nothing and reports bytes."""

    class Reporter(_Bar):
        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if progress is not None and self.unit == "B":
                progress("download", int(self.n), int(self.total or 0))

        def close(self) -> None:
            self.display()
            # A disabled bar does not end the line that this one never began.
            self.disable = True

    return Reporter
