"""Every parameter gets exactly its tensors: any family, format, mesh, KV repeat, dtype and quantisation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import LLAMA, QWEN2, QWEN3, expected_params, random_tensors, write_folder, write_gguf

from jaxserve.checkpoint import rules, tied
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind, load_params, load_spec, spec_of
from jaxserve.core.errors import CheckpointError
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import spec_from_hf
from jaxserve.models.spec import LongRopeScaling, ModelSpec
from jaxserve.quant.qtensor import quantize_channels
from jaxserve.sharding.mesh import make_mesh

CONFIGS = {
    "llama": LLAMA,
    "llama-biased-tied": {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
CONTRACTED = {
    "layers.attn.qkv.kernel": (1,),
    "layers.attn.out.kernel": (1, 2, 3),
    "layers.mlp.gate_up.kernel": (1,),
    "layers.mlp.down.kernel": (1,),
    "embed.table": (1,),
    "lm_head.table": (1,),
}


def hf(folder: Path) -> CheckpointSource:
    return CheckpointSource(kind=SourceKind.HF, path=folder, name="model")


def loaded(
    source: CheckpointSource,
    *,
    dtype: Any = jnp.float32,
    quantization: str | None = None,
    kv_repeat: int = 1,
    tensor: int = 1,
) -> tuple[ModelSpec, dict[str, jax.Array]]:
    spec = load_spec(source)
    abstract = abstract_params(spec, dtype=jnp.dtype(dtype), quantization=quantization, kv_repeat=kv_repeat)
    params = load_params(source, spec, abstract, mesh=make_mesh(tensor=tensor))
    assert list(params) == list(abstract)
    for path, info in abstract.items():
        assert (params[path].shape, params[path].dtype) == (info.shape, info.dtype), path
    return spec, params


def assert_same(params: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert set(params) == set(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(params[path]), array, err_msg=path)


@pytest.fixture(autouse=True)
def small_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves of a few rows, so that tiny tensors are cut as large ones are."""
    monkeypatch.setattr(rules, "MOVE_ELEMENTS", 70)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("tensor", "kv_repeat"), [(1, 1), (2, 1), (4, 2), (8, 4), (1, 2)])
def test_safetensors_fill_every_parameter(tmp_path: Path, name: str, tensor: int, kv_repeat: int) -> None:
    spec = spec_from_hf(CONFIGS[name], {}, "config.json")
    tensors = random_tensors(spec)
    write_folder(tmp_path, CONFIGS[name], tensors, num_files=1 + len(name) % 3)
    _, params = loaded(hf(tmp_path), tensor=tensor, kv_repeat=kv_repeat)
    assert_same(params, expected_params(spec, tensors, kv_repeat))
    if tensor == 8:
        shard = params["layers.attn.qkv.kernel"].addressable_shards[3]
        assert shard.data.shape[2] == 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_gguf_fills_the_same_parameters(tmp_path: Path, name: str, tensor: int) -> None:
    spec = spec_from_hf(CONFIGS[name], {}, "config.json")
    tensors = random_tensors(spec)
    path = write_gguf(tmp_path / "model.gguf", spec, tensors)
    source = CheckpointSource(kind=SourceKind.GGUF, path=path, name="model")
    found, params = loaded(source, tensor=tensor)
    assert found.qkv_bias == spec.qkv_bias
    assert found.tie_embeddings == spec.tie_embeddings
    assert_same(params, expected_params(spec, tensors))


def test_quantised_gguf_is_dequantised_slice_by_slice(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "head_dim": 8}
    spec = spec_from_hf(config, {}, "config.json")
    tensors = random_tensors(spec)
    kind = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "model.gguf", spec, tensors, kind=kind)
    _, params = loaded(CheckpointSource(kind=SourceKind.GGUF, path=path, name="model"), tensor=2)
    rounded = {
        name: gguf.dequantize(gguf.quantize(array, kind), kind) if array.ndim > 1 else array
        for name, array in tensors.items()
    }
    assert_same(params, expected_params(spec, rounded))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("stored", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_any_stored_dtype_becomes_the_serving_dtype(tmp_path: Path, dtype: Any, stored: Any) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    tensors = {name: array.astype(stored) for name, array in random_tensors(spec).items()}
    write_folder(tmp_path, LLAMA, tensors)
    _, params = loaded(hf(tmp_path), dtype=dtype)
    expected = expected_params(spec, tensors)
    assert_same(params, {path: array.astype(dtype) for path, array in expected.items()})


@pytest.mark.parametrize(("tensor", "kv_repeat"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_int8_quantises_each_output_channel(tmp_path: Path, name: str, tensor: int, kv_repeat: int) -> None:
    spec = spec_from_hf(CONFIGS[name], {}, "config.json")
    tensors = random_tensors(spec)
    write_folder(tmp_path, CONFIGS[name], tensors)
    _, params = loaded(hf(tmp_path), quantization="int8", tensor=tensor, kv_repeat=kv_repeat)
    expected = expected_params(spec, tensors, kv_repeat)
    for path, contracted in CONTRACTED.items():
        stem = path.rpartition(".")[0]
        values, scale = quantize_channels(expected[path], contracted)
        expected |= {path: values, f"{stem}.scale": scale}
    assert_same(params, expected)


def test_all_mismatches_are_in_one_error(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    tensors = random_tensors(spec)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.experts.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    write_folder(tmp_path, LLAMA, tensors)
    with pytest.raises(CheckpointError) as caught:
        loaded(hf(tmp_path))
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "unexpected: model.layers.0.mlp.experts.weight" in message
    assert "wrong shape: model.layers.2.self_attn.q_proj.weight has 32x31, not 32x32" in message


def test_known_surplus_tensors_are_ignored_and_only_those(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    spec = spec_from_hf(config, {}, "config.json")
    tensors = random_tensors(spec)
    surplus = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    write_folder(tmp_path / "tied", config, tensors | surplus)
    _, params = loaded(hf(tmp_path / "tied"))
    assert_same(params, expected_params(spec, tensors))
    write_folder(tmp_path / "untied", LLAMA, tensors | {"lm_head.bias": np.ones(40, np.float32)})
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight; unexpected: lm_head.bias"):
        loaded(hf(tmp_path / "untied"))


TIED = {**LLAMA, "tie_word_embeddings": True}


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_head_that_is_not_the_embedding_is_used(tmp_path: Path, place: str, num_files: int) -> None:
    """Whatever the config says, as in transformers; one number is enough."""
    untied = spec_from_hf(LLAMA, {}, "config.json")
    tensors = random_tensors(untied)
    head = tensors["model.embed_tokens.weight"].copy()
    head[(0, 0) if place == "first" else (-1, -1)] += 1
    tensors["lm_head.weight"] = head
    write_folder(tmp_path, TIED, tensors, num_files=num_files)
    spec, params = loaded(hf(tmp_path))
    assert not spec.tie_embeddings
    assert_same(params, expected_params(untied, tensors))
    assert spec_of(str(tmp_path)) == spec


@pytest.mark.parametrize("rows", [7, 40, 4096])
def test_a_head_that_repeats_the_embedding_is_the_embedding(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, NaN included, or number for number where it is stored in another type."""
    monkeypatch.setattr(tied, "_ROWS", rows)
    spec = spec_from_hf(TIED, {}, "config.json")
    tensors = random_tensors(spec)
    tensors["model.embed_tokens.weight"][3, 1] = np.nan
    write_folder(tmp_path / "same", TIED, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    found, params = loaded(hf(tmp_path / "same"))
    assert found == spec
    assert_same(params, expected_params(spec, tensors))
    tensors["model.embed_tokens.weight"] = np.ones((40, 32), np.float32)
    head = np.ones((40, 32), jnp.bfloat16)
    write_folder(tmp_path / "rounded", TIED, {**tensors, "lm_head.weight": head})
    assert loaded(hf(tmp_path / "rounded"))[0] == spec
    head[39, 31] = 2
    write_folder(tmp_path / "other", TIED, {**tensors, "lm_head.weight": head})
    assert not loaded(hf(tmp_path / "other"))[0].tie_embeddings


def test_a_head_that_is_stored_alone_is_the_embedding_too(tmp_path: Path) -> None:
    spec = spec_from_hf(TIED, {}, "config.json")
    tensors = random_tensors(spec)
    renamed = {("lm_head.weight" if "embed" in name else name): value for name, value in tensors.items()}
    write_folder(tmp_path, TIED, renamed)
    found, params = loaded(hf(tmp_path))
    assert found == spec
    assert_same(params, expected_params(spec, tensors))


def test_embeddings_that_fit_neither_way_are_refused(tmp_path: Path) -> None:
    spec = spec_from_hf(TIED, {}, "config.json")
    tensors = random_tensors(spec)
    head = np.zeros((41, 32), np.float32)
    write_folder(tmp_path / "larger", TIED, {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"wrong shape: lm_head\.weight has 41x32, not 40x32"):
        loaded(hf(tmp_path / "larger"))
    del tensors["model.embed_tokens.weight"]
    write_folder(tmp_path / "neither", TIED, tensors)
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        loaded(hf(tmp_path / "neither"))
    # The loader does not trust the spec it is given either.
    write_folder(tmp_path / "other", TIED, {**random_tensors(spec), "lm_head.weight": head[:40]})
    abstract = abstract_params(spec, dtype=jnp.dtype(jnp.float32))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding that the model ties it to"):
        load_params(hf(tmp_path / "other"), spec, abstract, mesh=make_mesh())


def test_biases_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(spec_from_hf({**LLAMA, "attention_bias": True}, {}, "config.json"))
    write_folder(tmp_path, LLAMA, tensors)
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.self_attn\.k_proj\.bias"):
        loaded(hf(tmp_path))


def test_rope_tensors_of_a_gguf_are_used(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    tensors = random_tensors(spec)
    keys = {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.original_context_length": 64}
    short, long = np.array([1, 2], np.float32), np.array([3, 4], np.float32)
    extra = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = write_gguf(tmp_path / "model.gguf", spec, tensors, keys=keys, extra=extra)
    found, params = loaded(CheckpointSource(kind=SourceKind.GGUF, path=path, name="model"))
    assert found.rope.scaling == LongRopeScaling(
        short_factors=(1.0, 2.0), long_factors=(3.0, 4.0), original_max_len=64, attention_factor=1.0
    )
    assert_same(params, expected_params(spec, tensors))


def test_a_long_list_of_mismatches_is_cut(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    write_folder(tmp_path, LLAMA, {"model.norm.weight": random_tensors(spec)["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        loaded(hf(tmp_path))
    assert len(str(caught.value)) < 1000


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    tensors = random_tensors(spec)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    write_folder(tmp_path, LLAMA, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as I8"):
        loaded(hf(tmp_path))


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    spec = spec_from_hf(LLAMA, {}, "config.json")
    write_folder(tmp_path, LLAMA, random_tensors(spec))
    abstract = abstract_params(spec, dtype=jnp.dtype(jnp.bfloat16), quantization="int8")
    calls: list[tuple[str, int, int]] = []
    load_params(hf(tmp_path), spec, abstract, mesh=make_mesh(), progress=lambda *call: calls.append(call))
    total = sum(info.num_bytes for info in abstract.values())
    assert calls[-1] == ("load weights", total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("is_random", [False, True])
def test_each_parameter_is_held_as_soon_as_it_is_loaded(
    tmp_path: Path, quantization: str | None, is_random: bool
) -> None:
    """Largest first: a copy of one never meets all of the others in memory."""
    spec = spec_from_hf(LLAMA, {}, "config.json")
    write_folder(tmp_path, LLAMA, random_tensors(spec))
    (tmp_path / "model.json").write_text(json.dumps({"source": {"hub": "me/model"}, "config": LLAMA}))
    source = CheckpointSource(kind=SourceKind.RANDOM, path=tmp_path / "model.json", name="model")
    abstract = abstract_params(spec, dtype=jnp.dtype(jnp.bfloat16), quantization=quantization)
    held: dict[str, jax.Array] = {}

    def hold(path: str, value: jax.Array) -> jax.Array:
        assert path not in held
        held[path] = value.copy()
        return held[path]

    params = load_params(source if is_random else hf(tmp_path), spec, abstract, mesh=make_mesh(), hold=hold)
    assert all(params[path] is held[path] for path in abstract)
    weights = [value.nbytes for path, value in held.items() if value.dtype != jnp.float32]
    assert weights == sorted(weights, reverse=True)


MEASURE = """
import json, os, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxserve.checkpoint.sources import load_params, load_spec, CheckpointSource, SourceKind
from jaxserve.models.decoder import abstract_params
from jaxserve.sharding.mesh import make_mesh

folder = Path(sys.argv[1])
spec = load_spec(CheckpointSource(kind=SourceKind.HF, path=folder, name="model"))
quantization = sys.argv[2] or None
abstract = abstract_params(spec, dtype=jnp.dtype(jnp.bfloat16), quantization=quantization)
mesh = make_mesh()
jax.block_until_ready(jnp.zeros(8))


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


before = status("VmRSS:")
params = load_params(CheckpointSource(kind=SourceKind.HF, path=folder, name="model"), spec, abstract, mesh=mesh)
jax.block_until_ready(params)
json.dump({"model": sum(a.nbytes for a in params.values()), "peak": status("VmHWM:") - before,
           "after": status("VmRSS:") - before}, sys.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantization", ["", "int8"])
def test_loading_holds_little_more_than_the_model(tmp_path: Path, quantization: str) -> None:
    """The file is twice the model in bfloat16 and four times in int8, so a second copy of anything shows."""
    config = {
        **LLAMA,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        "vocab_size": 16384,
    }
    write_sparse(tmp_path, config)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), quantization]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    assert measured["model"] > 200e6
    assert measured["peak"] < measured["model"] + 160e6
    assert measured["after"] < measured["model"] + 80e6


def write_sparse(folder: Path, config: dict[str, object]) -> None:
    """A checkpoint of zeros in float32 whose file takes no space on the disk."""
    spec = spec_from_hf(config, {}, "config.json")
    d, f, v = spec.hidden_size, spec.ffn_size, spec.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d)}
    shapes["model.norm.weight"] = (d,)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (d, f)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
