"""The families jaxserve knows, and the two doors into them: a Hugging Face config and GGUF metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from jaxserve.core.errors import CheckpointError
from jaxserve.models import config_keys
from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.family import Family, GGUFHeader
from jaxserve.models.llama import LLAMA
from jaxserve.models.qwen2 import QWEN2
from jaxserve.models.qwen3 import QWEN3
from jaxserve.models.spec import ModelSpec

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3)


def family_named(name: str) -> Family:
    """The family of a spec."""
    return next(family for family in FAMILIES if family.name == name)


def spec_from_hf(
    config: Mapping[str, object],
    generation: Mapping[str, object],
    origin: str,
    *,
    passed_over: Collection[str] = (),
) -> ModelSpec:
    """A spec from the JSON objects of a Hugging Face folder.

    Args:
        config: config.json.
        generation: generation_config.json; empty if there is none.
        origin: Name of the config for errors.
        passed_over: Unknown keys of it that are to be ignored.

    Raises:
        CheckpointError: The family is unknown, or a key is missing, unknown or not supported; all are listed.
    """
    model_type = config.get("model_type")
    family = next((family for family in FAMILIES if family.name == model_type), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise CheckpointError(f"{origin} has model_type {model_type!r}; jaxserve runs {known}.")
    reader = ConfigReader(config, origin, passed_over)
    reader.take("model_type")
    architectures = reader.take("architectures")
    if isinstance(architectures, list) and not any(each in family.architectures for each in architectures):
        reader.wrong(f"architectures = {architectures!r} (only {', '.join(family.architectures)} is supported)")
    if reader.take("quantization_config") is not None:
        reader.wrong("quantization_config: quantised safetensors are not supported, use the unquantised checkpoint")
    generation_reader = ConfigReader(generation, "generation_config.json")
    generation_reader.problems = reader.problems
    spec = family.spec_from_hf(reader, generation_reader)
    _check_token_ids(reader, spec)
    reader.finish(config_keys.IGNORED, config_keys.NEUTRAL)
    return spec


def spec_from_gguf(
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rope_factors: Mapping[str, NDArray[np.float32]],
    dtype: str,
    origin: str,
    passed_over: Collection[str] = (),
) -> ModelSpec:
    """A spec from the header of a GGUF file.

    Args:
        metadata: All its keys.
        shapes: Shape of each tensor, outermost dimension first.
        rope_factors: Contents of those of `rope_config.GGUF_FACTORS` that are there, [H/2] each.
        dtype: Floating-point type that best holds the stored weights.
        origin: Name of the file for errors.
        passed_over: Unknown keys of the architecture that are to be ignored, without its name.

    Raises:
        CheckpointError: The architecture is unknown, or a key is missing, unknown or not supported; all are listed.
    """
    architecture = metadata.get("general.architecture")
    family = next((family for family in FAMILIES if family.gguf_architecture == architecture), None)
    if family is None:
        known = ", ".join(family.gguf_architecture for family in FAMILIES)
        raise CheckpointError(f"{origin} holds a model of architecture {architecture!r}; jaxserve runs {known}.")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    reader = ConfigReader(own, origin, passed_over)
    header = GGUFHeader(reader=reader, metadata=metadata, shapes=shapes, rope_factors=rope_factors, dtype=dtype)
    spec = family.spec_from_gguf(header)
    _check_token_ids(reader, spec)
    reader.finish()
    return spec


def _check_token_ids(reader: ConfigReader, spec: ModelSpec) -> None:
    """Notes special tokens that the model has no embedding for: it could neither read nor produce them."""
    bos = () if spec.bos_token_id is None else (spec.bos_token_id,)
    for key, ids in (("bos_token_id", bos), ("eos_token_id", spec.eos_token_ids)):
        outside = [token_id for token_id in ids if token_id >= spec.vocab_size]
        if outside:
            reader.wrong(
                f"{key} {', '.join(map(str, outside))} is outside the vocabulary [0, {spec.vocab_size})", "vocab_size"
            )
