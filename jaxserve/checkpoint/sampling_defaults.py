"""How a model's makers sample from it: the defaults of requests that do not say.

They stand in generation_config.json of a Hugging Face folder, under `general.sampling.` in a GGUF file (llama.cpp's
keys, which its converter takes from that JSON file), and in a preset, which has its model card's and comes first. As
in vLLM, `do_sample` changes nothing: what the file says of temperature and the rest counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

from jaxserve.checkpoint.gguf_parts import GGUFParts
from jaxserve.checkpoint.presets import Preset
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind
from jaxserve.core.errors import CheckpointError
from jaxserve.core.json_file import read_optional_object
from jaxserve.core.types import NO_DEFAULTS, SamplingDefaults

_NAMES = {**{field.name: field.name for field in fields(SamplingDefaults)}, "max_tokens": "max_new_tokens"}
"""What generation_config.json calls each field."""

_GGUF_NAMES = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
"""What GGUF files call a field after `general.sampling.`, where it has another name."""

_WHOLE = ("top_k", "max_tokens")


def load_sampling_defaults(source: CheckpointSource, preset: Preset | None) -> SamplingDefaults:
    """The defaults of a model; random weights have none.

    Args:
        source: The model.
        preset: The preset that it was named by, if it was.

    Raises:
        CheckpointError: A value is no number, or a file cannot be read.
    """
    if source.kind is SourceKind.RANDOM:
        return NO_DEFAULTS
    stored = _stored(source)
    if preset is not None:
        stored |= _by_field(preset.sampling, f"the preset {preset.name}")
        if unknown := sorted(preset.sampling.keys() - _NAMES.values()):
            raise CheckpointError(f"The preset {preset.name} has sampling keys that are none: {', '.join(unknown)}.")
    return _defaults(stored)


def _stored(source: CheckpointSource) -> dict[str, tuple[object, str]]:
    """What a checkpoint says, by field, each with where it stands."""
    if source.kind is SourceKind.GGUF:
        file = GGUFParts(source.path)
        try:
            metadata: Mapping[str, object] = file.metadata
        finally:
            file.close()
        keys = {name: f"general.sampling.{_GGUF_NAMES.get(name, name)}" for name in _NAMES}
        return {name: (metadata[key], f"{source.path}: {key}") for name, key in keys.items() if key in metadata}
    path = source.path / "generation_config.json"
    return _by_field(read_optional_object(path), str(path))


def _by_field(found: Mapping[str, object], origin: str) -> dict[str, tuple[object, str]]:
    """Values by field, from values by the names of generation_config.json."""
    return {field: (found[name], f"{origin}: {name}") for field, name in _NAMES.items() if name in found}


def _defaults(given: Mapping[str, tuple[object, str]]) -> SamplingDefaults:
    """Defaults from values of any type.

    Args:
        given: Values by field, each with where it stands; null means that nothing is said.

    Raises:
        CheckpointError: A value is no number, or no whole number where one is needed.
    """
    values: dict[str, float] = {}
    for name, (value, origin) in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{origin} is {value!r} and no number; {_ADVICE}")
        if name in _WHOLE and value != int(value):
            raise CheckpointError(f"{origin} is {value!r} and no whole number; {_ADVICE}")
        # GGUF files keep float32; seven digits are what was meant.
        values[name] = int(value) if name in _WHOLE else float(f"{value:.7g}")
    # The same as 0 for those who learned it elsewhere.
    if values.get("top_k") == -1:
        values["top_k"] = 0
    return SamplingDefaults(**values)  # type: ignore[arg-type]  # whole where they must be


_ADVICE = "correct it, or pass over the checkpoint's sampling defaults with --generation-config none."
