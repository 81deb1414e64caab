"""Logits equal those of `transformers` in float32; the goldens come from tests/goldens/make_model_goldens.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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

SMOLLM2_TOLERANCE = 2e-4
"""Thirty layers of float32: with sums in another order, as processors differ in, ours moves by up to 1.3e-4, torch's by
up to 1.5e-4."""

PAGE_SIZE = 16
PAGES_PER_SEQ = 16


def batch_of(context_lens: NDArray[np.int32], new_lens: NDArray[np.int32]) -> RaggedBatch:
    """All texts in one ragged batch, the last tokens of each new; they decode if it is one each."""
    num_seqs = len(context_lens)
    spans = zip(context_lens - new_lens, context_lens, strict=True)
    return RaggedBatch(
        page_table=jnp.arange(num_seqs * PAGES_PER_SEQ, dtype=jnp.int32).reshape(num_seqs, PAGES_PER_SEQ),
        context_lens=jnp.asarray(context_lens),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(new_lens)]).astype(np.int32)),
        num_seqs=jnp.int32(num_seqs),
        num_decodes=jnp.int32(num_seqs if np.all(new_lens == 1) else 0),
        positions=jnp.asarray(np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])),
        token_seq=jnp.asarray(np.repeat(np.arange(num_seqs, dtype=np.int32), new_lens)),
    )


def logprobs_of(
    spec: ModelSpec,
    params: dict[str, jax.Array],
    prompts: Sequence[NDArray[np.int32]],
    outputs: NDArray[np.int32],
    *,
    max_len: int = PAGE_SIZE * PAGES_PER_SEQ,
) -> list[NDArray[np.float32]]:
    """Log-probabilities after every token of every text, float32: the prompts at once, the [S, n] outputs by column."""
    blueprint = Blueprint.of(spec, dtype=jnp.dtype(jnp.float32), mesh=make_mesh())

    @partial(jax.jit, donate_argnums=2)
    def forward(
        params: dict[str, jax.Array], token_ids: jax.Array, pool: jax.Array, batch: RaggedBatch
    ) -> tuple[jax.Array, jax.Array]:
        decoder = blueprint.bind(params)
        hidden, pool = decoder(token_ids, pool, batch, max_len=max_len)
        return jax.nn.log_softmax(decoder.logits(hidden), axis=-1), pool

    new_lens = np.array([len(prompt) for prompt in prompts], np.int32)
    lens = new_lens.copy()
    num_pages = spec.num_layers * len(prompts) * PAGES_PER_SEQ
    pool = jnp.zeros((num_pages, PAGE_SIZE, 2 * spec.num_kv_heads, spec.head_dim), jnp.float32)
    flat, pool = forward(params, jnp.asarray(np.concatenate(prompts)), pool, batch_of(lens, new_lens))
    steps = [np.split(np.asarray(flat), np.cumsum(lens)[:-1])]
    for column in outputs.T:
        lens, new_lens = lens + 1, np.ones_like(lens)
        flat, pool = forward(params, jnp.asarray(column), pool, batch_of(lens, new_lens))
        steps.append(np.split(np.asarray(flat), len(lens)))
    return [np.concatenate(parts) for parts in zip(*steps, strict=True)]


def load(source: CheckpointSource) -> tuple[ModelSpec, dict[str, jax.Array]]:
    """The model's spec, and its parameters as programs take them on this platform."""
    spec, mesh = load_spec(source), make_mesh()
    infos = Blueprint.of(spec, dtype=jnp.dtype(jnp.float32), mesh=mesh).params()
    params = load_params(source, spec, infos, mesh=mesh)
    return spec, {
        path: value if (turned := infos[path].turned) is None else jnp.transpose(value, turned)
        for path, value in params.items()
    }


@pytest.mark.parametrize(
    "name", ["llama", "llama-biased-tied", "llama3-rope", "llama-linear-rope", "qwen2", "qwen2-window", "qwen3"]
)
def test_tiny_checkpoints_match_transformers(name: str) -> None:
    folder = GOLDENS / "tiny" / name
    golden = np.load(folder / "golden.npz")
    spec, params = load(CheckpointSource(kind=SourceKind.HF, path=folder, name=name))
    (logprobs,) = logprobs_of(spec, params, [golden["token_ids"].astype(np.int32)], np.zeros((1, 0), np.int32))
    assert np.max(np.abs(logprobs - golden["logprobs"])) <= TOLERANCE
    # A model that ignored its input would pass no such bound by luck: the golden spreads far wider than the tolerance.
    assert np.ptp(golden["logprobs"], axis=0).min() > 100 * TOLERANCE


def test_smollm2_matches_transformers(cache_dir: Path) -> None:
    golden = np.load(GOLDENS / "smollm2.npz")
    prompts = [golden[f"prompt_{index}"] for index in range(10)]
    greedy = np.stack([golden[f"greedy_{index}"] for index in range(10)])
    spec, params = load(resolve_source("smollm2-135m", cache_dir=cache_dir))
    for index, logprobs in enumerate(logprobs_of(spec, params, prompts, greedy)):
        # Each greedy token is the most likely one after the tokens before it, so generation gives the same 64.
        chosen = np.argmax(logprobs[len(prompts[index]) - 1 : -1], axis=-1)
        np.testing.assert_array_equal(chosen, greedy[index])
        # At every position: of the most likely tokens, and of tokens that are the same everywhere.
        most_likely = np.take_along_axis(logprobs, golden[f"top_ids_{index}"], axis=-1)
        for ours, name in ((most_likely, "top_"), (logprobs[:, golden["ids"]], "")):
            float32 = golden[f"{name}logprobs_{index}"]
            float64 = float32 - golden[f"{name}rounding_{index}"].astype(np.float64)
            assert np.max(np.abs(ours - float32)) <= SMOLLM2_TOLERANCE
            assert np.max(np.abs(ours - float64)) <= SMOLLM2_TOLERANCE
