"""Scaled ropes equal those of `transformers`; the goldens come from tests/goldens/make_rope_goldens.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray
from test_models_families import GGUF, LLAMA, read, read_gguf
from test_models_parity import GOLDENS, TOLERANCE, load, logprobs_of

from jaxserve.checkpoint.sources import CheckpointSource, SourceKind
from jaxserve.core.errors import CheckpointError
from jaxserve.models.layers.rope import attention_factor, inverse_frequencies
from jaxserve.models.spec import DynamicRopeScaling, LongRopeScaling, ModelSpec, RopeSpec, YarnRopeScaling

SAID = json.loads((GOLDENS / "ropes.json").read_text())
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}


def sized(head_dim: int, config: dict[str, Any]) -> dict[str, Any]:
    """A config with heads of a size."""
    own = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "max_position_embeddings")}
    return {**own, "head_dim": head_dim, **config}


@pytest.mark.parametrize("name", SAID["frequencies"])
def test_frequencies_are_those_of_transformers(name: str) -> None:
    case = SAID["frequencies"][name]
    rope = read(sized(case["head_dim"], case["config"])).rope
    for found in case["found"]:
        ours = inverse_frequencies(rope, case["head_dim"], found["length"])
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, np.array(found["inverse_frequencies"], np.float32), rtol=1e-6, err_msg=name)
        assert attention_factor(rope) == pytest.approx(found["attention_factor"], rel=1e-9)


def tiny(name: str, folder: Path) -> tuple[ModelSpec, dict[str, Array], NDArray[np.int32]]:
    """The model of tiny/llama with another rope, and 80 tokens."""
    base = GOLDENS / "tiny" / "llama"
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | SAID["models"][name]["config"]))
    shutil.copy(base / "model.safetensors", folder)
    spec, params = load(CheckpointSource(kind=SourceKind.HF, path=folder, name=name))
    return spec, params, np.load(base / "golden.npz")["token_ids"].astype(np.int32)


@pytest.mark.parametrize("name", SAID["models"])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of whole sequences as long as the longest that is served."""
    spec, params, token_ids = tiny(name, tmp_path)
    goldens, nothing = np.load(GOLDENS / "ropes.npz"), np.zeros((1, 0), np.int32)
    plain = np.load(GOLDENS / "tiny" / "llama" / "golden.npz")["logprobs"]
    for length in SAID["models"][name]["lengths"]:
        (ours,) = logprobs_of(spec, params, [token_ids[:length]], nothing, max_len=length)
        assert np.max(np.abs(ours[:: SAID["every"]] - goldens[f"{name}/{length}"])) <= TOLERANCE
        # The plain rope says something else wherever the scaling is not left out.
        is_plain = name == "dynamic" and length == 32
        assert (np.max(np.abs(ours - plain[:length])) <= TOLERANCE) == is_plain


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_longer_service_scales_all_positions_alike(name: str) -> None:
    """A token's rotation depends on the longest sequence that is served, not on its own: the KV cache stays true."""
    case = next(each for key, each in SAID["frequencies"].items() if key == name)
    spec = read(sized(case["head_dim"], case["config"]))
    assert isinstance(spec.rope.scaling, DynamicRopeScaling | LongRopeScaling)
    original = spec.rope.scaling.original_max_len
    assert spec.default_max_len == original < spec.max_position
    short, at, beyond = (
        inverse_frequencies(spec.rope, case["head_dim"], length) for length in (2, original, original + 1)
    )
    np.testing.assert_array_equal(short, at)
    assert not np.array_equal(at, beyond)


def test_how_far_a_model_reaches() -> None:
    """YaRN and dynamic NTK stretch the length that the config gives, unless it gives the stretched one."""
    assert read(LLAMA, rope_scaling=YARN).max_position == 512
    assert read(LLAMA, max_position_embeddings=128, rope_scaling=YARN).max_position == 512
    yarn = read(LLAMA, max_position_embeddings=128, rope_scaling={"type": "yarn", "factor": 4.0})
    assert (yarn.max_position, yarn.default_max_len) == (512, 512)
    dynamic = read(LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert (dynamic.max_position, dynamic.default_max_len) == (1024, 512)
    assert dynamic.rope.scaling == DynamicRopeScaling(factor=2.0, original_max_len=512)
    long = read(LLAMA, rope_scaling=LONG)
    assert (long.max_position, long.default_max_len) == (512, 128)
    assert read(LLAMA, rope_scaling={"type": "linear", "factor": 4.0}).max_position == 512


def test_names_that_mean_the_same() -> None:
    assert read(LLAMA, rope_scaling={**LONG, "rope_type": "su"}) == read(LLAMA, rope_scaling=LONG)
    yarn = read(LLAMA, rope_scaling=YARN)
    assert yarn == read(LLAMA, rope_scaling={**YARN, "finetuned": True, "attn_factor": 1.0, "extrapolation_factor": 1})
    assert yarn == read(LLAMA, rope_scaling={**YARN, "beta_fast": None, "mscale": 1.0, "truncate": True})
    assert yarn == read(LLAMA, original_max_position_embeddings=128, rope_scaling={"type": "yarn", "factor": 4.0})
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 500000.0}}
    assert read(LLAMA, rope_parameters=nested) == read(LLAMA)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({**YARN, "attn_factor": 2.0}, "attn_factor = 2.0 is not supported"),
        ({**YARN, "apply_to": "keys"}, "unknown key apply_to"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta = 1 must be above 1 with YaRN"),
        ({**YARN, "truncate": "no"}, "truncate must be true or false"),
        ({**LONG, "long_factor": [1.0, 2.0]}, "long_factor has 2 numbers and a head has 4 frequencies"),
        ({**LONG, "short_factor": [1.0, 1.0, 1.0, 0.0]}, "short_factor must be a list of numbers above zero"),
        ({**LONG, "short_factor": None}, "short_factor must be a list of numbers above zero"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, "original_max_position_emb"),
        ({"rope_type": "dynamic", "alpha": 1000.0}, "unknown key alpha"),
        ({"rope_type": "dynamic", "factor": math.inf}, "factor must be a number above zero"),
        ({"rope_type": "linear", "factor": 10**400}, "factor must be a number above zero"),
        ({"rope_type": "proportional"}, r"only default, linear, dynamic, yarn, longrope, llama3"),
    ],
)
def test_what_is_no_such_rope_is_refused(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read(LLAMA, rope_scaling=section)


def test_a_length_outside_the_section_counts_where_it_is_used() -> None:
    assert read(LLAMA, original_max_position_embeddings=512) == read(LLAMA)
    with pytest.raises(CheckpointError, match="original_max_position_embeddings = 64"):
        read(LLAMA, original_max_position_embeddings=64)


def test_heads_that_cannot_be_rotated_in_halves() -> None:
    with pytest.raises(CheckpointError, match="a head of 7 dimensions"):
        read(LLAMA, head_dim=7)
    with pytest.raises(CheckpointError, match="heads of more than 2 dimensions"):
        read(LLAMA, head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


GGUF_YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 128,
}


def test_gguf_yarn_is_that_of_the_config() -> None:
    assert read_gguf(GGUF_YARN) == read(LLAMA, rope_scaling=YARN)
    tuned = {
        "llama.rope.scaling.attn_factor": 0.5,
        "llama.rope.scaling.yarn_attn_factor": 1.5,
        "llama.rope.scaling.yarn_ext_factor": 1.0,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
    }
    assert read_gguf(GGUF_YARN | tuned).rope.scaling == YarnRopeScaling(
        factor=4.0,
        original_max_len=128,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=True,
        attention_factor=pytest.approx(0.75 * (0.1 * math.log(4) + 1)),
    )
    with pytest.raises(CheckpointError, match="yarn_ext_factor"):
        read_gguf(GGUF_YARN | {"llama.rope.scaling.yarn_ext_factor": 0.5})
    assert GGUF["llama.context_length"] == 512


def test_gguf_longrope_is_made_of_its_tensors() -> None:
    keys = {
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.attn_factor": 1.25,
    }
    short, long = np.array([1, 1.5, 2, 2.5], np.float32), np.array([1, 2, 4, 8], np.float32)
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    spec = read_gguf(keys, rope_factors=tensors)
    assert spec.rope == RopeSpec(
        theta=500000.0,
        scaling=LongRopeScaling(
            short_factors=(1.0, 1.5, 2.0, 2.5),
            long_factors=(1.0, 2.0, 4.0, 8.0),
            original_max_len=128,
            attention_factor=1.25,
        ),
    )
    assert (spec.max_position, spec.default_max_len) == (512, 128)
    with pytest.raises(CheckpointError, match=r"needs 4 factors above zero in rope_factors_long\.weight"):
        read_gguf(keys, rope_factors={"rope_factors_short.weight": short})
    with pytest.raises(CheckpointError, match=r"needs 4 factors above zero in rope_factors_long\.weight"):
        read_gguf(keys, rope_factors={**tensors, "rope_factors_long.weight": long[:3]})


@pytest.mark.parametrize("kind", ["none", "linear", "yarn"])
def test_gguf_factors_that_nobody_uses_are_refused(kind: str) -> None:
    tensors = {"rope_factors_long.weight": np.ones(4, np.float32)}
    with pytest.raises(CheckpointError, match=rf"type = '{kind}' does not go with rope_factors_long\.weight"):
        read_gguf({**GGUF_YARN, "llama.rope.scaling.type": kind}, rope_factors=tensors)
    gain = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.attn_factor": 2.0}
    with pytest.raises(CheckpointError, match=r"attn_factor = 2 is not supported"):
        read_gguf(gain)


def test_tokens_do_not_depend_on_the_schedule(tmp_path: Path) -> None:
    """A sequence that grows token by token past the original length says what it says in one pass."""
    spec, params, token_ids = tiny("dynamic", tmp_path)
    (grown,) = logprobs_of(spec, params, [token_ids[:24]], token_ids[None, 24:], max_len=80)
    assert np.max(np.abs(grown[:: SAID["every"]] - np.load(GOLDENS / "ropes.npz")["dynamic/80"])) <= TOLERANCE
