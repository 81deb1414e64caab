"""Logits equal those of `transformers` in float32; the goldens come from tests/goldens/make_model_goldens.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from jaxserve.checkpoint.sources import CheckpointSource, SourceKind, load_params, load_spec, resolve_source
from jaxserve.models.decoder import Blueprint
from jaxserve.models.spec import ModelSpec
from jaxserve.pallas.paged_attention.inputs import RaggedBatch
from jaxserve.sharding.mesh import make_mesh

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-4
PAGE_SIZE = 16


def logprobs_of(spec: ModelSpec, params: dict[str, jax.Array], texts: Sequence[NDArray[np.int32]]) -> list[np.ndarray]:
    """Log-probabilities after every token of every text, all texts in one ragged batch, float32."""
    blueprint = Blueprint.of(spec, dtype=jnp.dtype(jnp.float32))
    lens = np.array([len(text) for text in texts], np.int32)
    pages_per_seq = -(-int(lens.max()) // PAGE_SIZE)
    num_pages = pages_per_seq * len(texts)
    batch = RaggedBatch(
        page_table=jnp.arange(num_pages, dtype=jnp.int32).reshape(len(texts), pages_per_seq),
        context_lens=jnp.asarray(lens),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)),
        num_seqs=jnp.int32(len(texts)),
        num_decodes=jnp.int32(0),
        positions=jnp.asarray(np.concatenate([np.arange(n, dtype=np.int32) for n in lens])),
        token_seq=jnp.asarray(np.repeat(np.arange(len(texts), dtype=np.int32), lens)),
    )
    pool = jnp.zeros((spec.num_layers * num_pages, PAGE_SIZE, 2 * spec.num_kv_heads, spec.head_dim), jnp.float32)

    @jax.jit
    def forward(params: dict[str, jax.Array], token_ids: jax.Array) -> jax.Array:
        decoder = blueprint.bind(params)
        hidden, _ = decoder(token_ids, pool, batch)
        return jax.nn.log_softmax(decoder.logits(hidden), axis=-1)

    flat = np.asarray(forward(params, jnp.asarray(np.concatenate(texts).astype(np.int32))))
    return np.split(flat, np.cumsum(lens)[:-1])


def load(source: CheckpointSource) -> tuple[ModelSpec, dict[str, jax.Array]]:
    spec = load_spec(source)
    abstract = Blueprint.of(spec, dtype=jnp.dtype(jnp.float32)).params()
    return spec, load_params(source, spec, abstract, mesh=make_mesh())


@pytest.mark.parametrize(
    "name", ["llama", "llama-biased-tied", "llama3-rope", "llama-linear-rope", "qwen2", "qwen2-window", "qwen3"]
)
def test_tiny_checkpoints_match_transformers(name: str) -> None:
    folder = GOLDENS / "tiny" / name
    golden = np.load(folder / "golden.npz")
    spec, params = load(CheckpointSource(kind=SourceKind.HF, path=folder, name=name))
    (logprobs,) = logprobs_of(spec, params, [golden["token_ids"]])
    assert np.max(np.abs(logprobs - golden["logprobs"])) <= TOLERANCE
    # A model that ignored its input would pass no such bound by luck: the golden spreads far wider than the tolerance.
    assert np.ptp(golden["logprobs"], axis=0).min() > 100 * TOLERANCE


def test_smollm2_matches_transformers(cache_dir: Path) -> None:
    golden = np.load(GOLDENS / "smollm2.npz")
    prompts = [golden[f"prompt_{index}"] for index in range(10)]
    greedy = [golden[f"greedy_{index}"] for index in range(10)]
    spec, params = load(resolve_source("smollm2-135m", cache_dir=cache_dir))
    texts = [np.concatenate(pair) for pair in zip(prompts, greedy, strict=True)]
    for index, logprobs in enumerate(logprobs_of(spec, params, texts)):
        # Each greedy token is the most likely one after the tokens before it, so generation gives the same 64.
        chosen = np.argmax(logprobs[len(prompts[index]) - 1 : -1], axis=-1)
        np.testing.assert_array_equal(chosen, greedy[index])
        # At every position: of the most likely tokens, and of tokens that are the same everywhere.
        most_likely = np.take_along_axis(logprobs, golden[f"top_ids_{index}"], axis=-1)
        assert np.max(np.abs(most_likely - golden[f"top_logprobs_{index}"])) <= TOLERANCE
        assert np.max(np.abs(logprobs[:, golden["ids"]] - golden[f"logprobs_{index}"])) <= TOLERANCE
