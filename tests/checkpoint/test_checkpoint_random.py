"""Random weights: right shapes, the same on every mesh, quick, and numerically tame."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import LLAMA

from jaxserve.checkpoint.random import random_params
from jaxserve.checkpoint.sources import CheckpointSource, load_params, load_spec, resolve_source
from jaxserve.models.decoder import abstract_params
from jaxserve.sharding.mesh import make_mesh


def middling(tmp_path: Path) -> CheckpointSource:
    """Large enough for statistics, small enough to be quick."""
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 768, "head_dim": 32, "vocab_size": 4096}
    (tmp_path / "middling.json").write_text(json.dumps({"source": {"hub": "me/middling"}, "config": config}))
    return resolve_source("random:middling", cache_dir=tmp_path, presets_dir=tmp_path)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_random_weights_do_not_depend_on_the_mesh(tmp_path: Path, quantization: str | None) -> None:
    source = middling(tmp_path)
    spec = load_spec(source)
    abstract = abstract_params(spec, dtype=jnp.dtype(jnp.bfloat16), quantization=quantization)
    one = load_params(source, spec, abstract, mesh=make_mesh())
    two = load_params(source, spec, abstract, mesh=make_mesh(tensor=2))
    assert list(one) == list(abstract)
    for path, info in abstract.items():
        assert (one[path].shape, one[path].dtype) == (info.shape, info.dtype)
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(two[path]), err_msg=path)


def test_random_kernels_keep_the_scale_of_activations(tmp_path: Path) -> None:
    source = middling(tmp_path)
    spec = load_spec(source)
    for quantization in (None, "int8"):
        abstract = abstract_params(spec, dtype=jnp.dtype(jnp.float32), quantization=quantization)
        params = load_params(source, spec, abstract, mesh=make_mesh())
        kernel = np.asarray(params["layers.mlp.down.kernel"]).astype(np.float32)
        if quantization:
            kernel = kernel * np.asarray(params["layers.mlp.down.scale"])[:, None, :]
        assert np.std(kernel) == pytest.approx(spec.ffn_size**-0.5, rel=0.02)
        assert abs(np.mean(kernel)) < 1e-3
        rows = kernel[0].reshape(spec.ffn_size, spec.hidden_size)
        assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 0.2
        assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.01
        np.testing.assert_array_equal(np.asarray(params["final_norm.scale"]), 1.0)


def test_seeds_differ_and_making_is_quick(tmp_path: Path) -> None:
    spec = load_spec(resolve_source("random:qwen3-0.6b", cache_dir=tmp_path))
    abstract = abstract_params(spec, dtype=jnp.dtype(jnp.bfloat16))
    start = time.monotonic()
    first = random_params(spec, abstract, mesh=make_mesh(), seed=0)
    jax.block_until_ready(first)
    assert time.monotonic() - start < 60  # 0.6 billion elements; a generator that draws them one by one takes minutes
    small = {"final": abstract["layers.attn.q_norm.scale"], "embed.table": abstract["embed.table"]}
    second = random_params(spec, small, mesh=make_mesh(), seed=1)
    assert not np.array_equal(np.asarray(first["embed.table"][:4]), np.asarray(second["embed.table"][:4]))
