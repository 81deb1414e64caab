"""A slot's state is exactly its admission, whatever was there before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.types import SamplingParams
from jaxserve.sampling.state import admission, admit, init_state
from jaxserve.sampling.validate import SamplingLimits

LIMITS = SamplingLimits(vocab_size=70, max_model_len=12, eos_token_ids=(2,), max_bad_words=3, max_bad_word_len=4)
FULL = SamplingParams(
    temperature=0.5,
    top_k=4,
    top_p=0.25,
    min_p=0.125,
    repetition_penalty=1.5,
    frequency_penalty=-1.0,
    presence_penalty=2.0,
    logit_bias={5: -3.5, 60: 1.0},
    allowed_token_ids=(0, 31, 32, 69),
    bad_words=((9,), (1, 2, 3)),
    stop_token_ids=(8,),
    min_tokens=3,
    logprobs=4,
)


def test_admission_fills_every_row_of_the_slot_and_no_other() -> None:
    state = init_state(3, LIMITS)
    after = jax.jit(admit, donate_argnums=0)(
        jax.tree.map(jnp.copy, state), np.int32(1), admission(FULL, [4, 5, 6], 2, 2**32 + 9, LIMITS)
    )
    assert after.history[1].tolist() == [4, 5, 6] + [0] * 9
    assert after.prompt_len[1] == 2
    assert after.key[1].tolist() == [1, 9]
    assert after.num_logprobs[1] == 4
    filters, penalties, constraints = after.filters, after.penalties, after.constraints
    assert (filters.temperature[1], filters.top_k[1], filters.top_p[1], filters.min_p[1]) == (0.5, 4, 0.25, 0.125)
    assert (penalties.repetition[1], penalties.frequency[1], penalties.presence[1]) == (1.5, -1.0, 2.0)
    assert constraints.min_len[1] == 5
    assert constraints.stop_ids[1, :3].tolist() == [8, 2, -1]
    assert constraints.bias_ids[1, :3].tolist() == [5, 60, -1]
    assert constraints.bias_values[1, :3].tolist() == [-3.5, 1.0, 0.0]
    assert constraints.restricted[1] == 1
    assert constraints.allowed[1].tolist() == [1 | 1 << 31, 1, 1 << 5]
    assert constraints.bad_words[1].tolist() == [[-1, -1, -1, 9], [-1, 1, 2, 3], [-1] * 4]
    for before_leaf, after_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before_leaf[::2], after_leaf[::2])


def test_a_new_owner_finds_nothing_of_the_former_one() -> None:
    plain = admission(SamplingParams(), [1], 1, 0, LIMITS)
    fresh = admit(init_state(2, LIMITS), jnp.int32(0), jnp.asarray(plain))
    used = admit(init_state(2, LIMITS), jnp.int32(0), jnp.asarray(admission(FULL, [9] * 12, 5, 77, LIMITS)))
    reused = admit(used, jnp.int32(0), jnp.asarray(plain))
    for fresh_leaf, reused_leaf in zip(jax.tree.leaves(fresh), jax.tree.leaves(reused), strict=True):
        np.testing.assert_array_equal(fresh_leaf, reused_leaf)


def test_seeds_keep_their_low_64_bits() -> None:
    for seed, key in ((-1, [2**32 - 1, 2**32 - 1]), (2**64 + 5, [0, 5]), (-(2**63), [2**31, 0])):
        state = admit(init_state(1, LIMITS), jnp.int32(0), jnp.asarray(admission(FULL, [1], 1, seed, LIMITS)))
        assert state.key[0].tolist() == key


def test_tiny_temperatures_are_greedy_and_large_top_k_keeps_all() -> None:
    packed = admission(SamplingParams(temperature=1e-6, top_k=10**12), [1], 1, 0, LIMITS)
    state = admit(init_state(1, LIMITS), jnp.int32(0), jnp.asarray(packed))
    assert state.filters.temperature[0] == 0
    assert state.filters.top_k[0] == 70


def test_an_admission_for_other_limits_is_refused() -> None:
    other = SamplingLimits(vocab_size=70, max_model_len=13)
    with pytest.raises(ValueError, match="words"):
        admit(init_state(1, LIMITS), jnp.int32(0), jnp.asarray(admission(FULL, [1], 1, 0, other)))


def test_state_is_placed_where_it_is_told() -> None:
    device = jax.devices()[-1]
    state = init_state(2, LIMITS, sharding=jax.sharding.SingleDeviceSharding(device))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(state))
