"""Sampling defaults: where they stand, which come first, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from jaxserve.checkpoint.presets import HubSource, Preset, default_presets_dir, preset_names, read_preset
from jaxserve.checkpoint.sampling_defaults import load_sampling_defaults
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind
from jaxserve.core.errors import CheckpointError
from jaxserve.core.types import NO_DEFAULTS, SamplingDefaults, SamplingParams

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}


def folder(path: Path, generation: object = None) -> CheckpointSource:
    path.mkdir(exist_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return CheckpointSource(kind=SourceKind.HF, path=path, name="model")


def preset(**sampling: object) -> Preset:
    return Preset(name="p", config={}, source=HubSource(repo_id="a/b"), sampling=sampling)


def gguf_file(path: Path, **values: float) -> CheckpointSource:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return CheckpointSource(kind=SourceKind.GGUF, path=path, name="model")


def test_generation_config(tmp_path: Path) -> None:
    defaults = load_sampling_defaults(folder(tmp_path, QWEN3), None)
    assert defaults == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert defaults.params() == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert defaults.said() == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


def test_every_key(tmp_path: Path) -> None:
    generation = {"temperature": 1, "top_k": -1, "top_p": 1, "min_p": 0.1, "repetition_penalty": 1.05}
    found = load_sampling_defaults(folder(tmp_path, {**generation, "max_new_tokens": 2048.0}), None)
    assert found == SamplingDefaults(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.1, repetition_penalty=1.05, max_tokens=2048
    )
    assert [type(value) for value in (found.top_k, found.max_tokens)] == [int, int]


def test_nothing_said(tmp_path: Path) -> None:
    assert load_sampling_defaults(folder(tmp_path / "a"), None) == NO_DEFAULTS
    said_nothing = folder(tmp_path / "b", {"temperature": None, "do_sample": False})
    assert load_sampling_defaults(said_nothing, None) == NO_DEFAULTS


def test_gguf_keys(tmp_path: Path) -> None:
    """Floats are float32 there, and the nearest to 0.6 is 0.60000002384."""
    source = gguf_file(tmp_path / "m.gguf", temp=0.6, top_k=40, top_p=0.95, min_p=0.05, penalty_repeat=1.1, mirostat=0)
    assert load_sampling_defaults(source, None) == SamplingDefaults(
        temperature=0.6, top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.1
    )
    assert load_sampling_defaults(gguf_file(tmp_path / "n.gguf"), None) == NO_DEFAULTS


def test_the_preset_comes_first(tmp_path: Path) -> None:
    found = load_sampling_defaults(folder(tmp_path, QWEN3), preset(temperature=0.2, min_p=0.5))
    assert found == SamplingDefaults(temperature=0.2, top_k=20, top_p=0.95, min_p=0.5)


def test_random_weights_have_none() -> None:
    path = default_presets_dir() / "qwen3-8b.json"
    source = CheckpointSource(kind=SourceKind.RANDOM, path=path, name="random:qwen3-8b")
    assert load_sampling_defaults(source, read_preset("qwen3-8b", default_presets_dir())) == NO_DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "0.6"), ("top_p", True), ("min_p", [1]), ("top_k", 2.5), ("max_new_tokens", 1.5)],
)
def test_what_is_no_number(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {key} is .*--generation-config none"):
        load_sampling_defaults(folder(tmp_path, {key: value}), None)


def test_infinity_is_no_number(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": Infinity}')
    with pytest.raises(CheckpointError, match="no number"):
        load_sampling_defaults(source, None)


def test_presets_have_their_cards(tmp_path: Path) -> None:
    """Every preset says how its makers sample; the demo's answers are gibberish at temperature 1."""
    found = {}
    for name in preset_names(default_presets_dir()):
        found[name] = load_sampling_defaults(folder(tmp_path / name), read_preset(name, default_presets_dir()))
    assert found["smollm2-135m"] == SamplingDefaults(temperature=0.2, top_p=0.9)
    assert found["llama-3.1-8b"] == found["llama-3.3-70b"] == SamplingDefaults(temperature=0.6, top_p=0.9)
    assert found["qwen3-8b"] == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
    assert NO_DEFAULTS not in found.values()


def test_a_preset_with_another_key_for_it_is_malformed(tmp_path: Path) -> None:
    text = json.loads((default_presets_dir() / "smollm2-135m.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**text, "sampling": [0.2]}))
    with pytest.raises(CheckpointError, match="sampling"):
        read_preset("mine", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({**text, "sampling": {"temprature": 0.2}}))
    with pytest.raises(CheckpointError, match="temprature"):
        load_sampling_defaults(folder(tmp_path / "m"), read_preset("mine", tmp_path))
