"""The sampler against a numpy oracle: every parameter, mixed freely, and nothing that depends on slot, row or batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import adjusted, kept, log_softmax, probabilities

from jaxserve.core.types import MAX_LOGPROBS, SamplingParams
from jaxserve.sampling.filters import filtered_weights
from jaxserve.sampling.logprobs import SampleOutput, prompt_logprobs
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.state import Filters, SamplingState, admission, admit, init_state
from jaxserve.sampling.validate import SamplingLimits, validate_sampling

VOCAB, LENGTH, SLOTS = 300, 640, 6
EOS = (7, 8)
LIMITS = SamplingLimits(vocab_size=VOCAB, max_model_len=LENGTH, eos_token_ids=EOS)
GREEDY = SamplingParams(temperature=0.0)

jit_sample = jax.jit(sample)
jit_admit = jax.jit(admit)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence about to sample."""

    params: SamplingParams
    tokens: tuple[int, ...] = (1, 2, 3)
    num_prompt: int = 3
    seed: int = 0


def load(rows: Sequence[Row], slots: Sequence[int]) -> SamplingState:
    state = init_state(SLOTS, LIMITS)
    for row, slot in zip(rows, slots, strict=True):
        validate_sampling(row.params, LIMITS)
        packed = admission(row.params, row.tokens, row.num_prompt, row.seed, LIMITS)
        state = jit_admit(state, np.int32(slot), packed)
    return state


def step(
    rows: Sequence[Row], logits: np.ndarray, slots: Sequence[int] | None = None, bucket: int = SLOTS
) -> tuple[SamplingState, SampleOutput]:
    """Samples once for each row in a batch padded to the bucket; padding holds NaN."""
    slots = list(slots) if slots is not None else list(range(len(rows)))
    state = load(rows, slots)
    padded = np.full((bucket, VOCAB), np.nan, np.float32)
    padded[: len(rows)] = logits
    missing = bucket - len(rows)
    state, output = jit_sample(
        jnp.asarray(padded),
        state,
        jnp.asarray([*slots, *[SLOTS] * missing], jnp.int32),
        jnp.asarray([len(row.tokens) for row in rows] + [0] * missing, jnp.int32),
        jnp.asarray([True] * len(rows) + [False] * missing),
    )
    return state, jax.tree.map(np.asarray, output)


def random_logits(num_rows: int, seed: int = 0, *, ties: bool = False) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(num_rows, VOCAB)) * 3
    return (np.round(logits) if ties else logits).astype(np.float32)


def check_row(row: Row, logits: np.ndarray, token: int) -> None:
    x = adjusted(row.params, logits, row.tokens, row.num_prompt, EOS)
    if row.params.greedy:
        assert x[token] >= x.max() - 1e-4 * max(1.0, abs(x.max()))
    else:
        # float32 may put a token on the other side of a border that it all but touches.
        assert kept(row.params, x, slack=1e-4)[token]


ids = st.integers(0, VOCAB - 1)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    def maybe(strategy: st.SearchStrategy[object], default: object) -> object:
        return draw(st.one_of(st.just(default), strategy))

    words = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple), max_size=4).map(tuple)
    allowed = st.lists(st.integers(10, VOCAB - 1), min_size=1, max_size=40).map(tuple)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-9, 0.1, 0.7, 1.0, 5.0])),
        top_k=maybe(st.integers(1, VOCAB + 5), 0),
        top_p=maybe(st.floats(0.01, 1.0), 1.0),
        min_p=maybe(st.floats(0.0, 1.0), 0.0),
        repetition_penalty=maybe(st.floats(0.5, 2.0), 1.0),
        frequency_penalty=maybe(st.floats(-2.0, 2.0), 0.0),
        presence_penalty=maybe(st.floats(-2.0, 2.0), 0.0),
        logit_bias=maybe(st.dictionaries(ids, st.floats(-100, 100), max_size=10), {}),
        allowed_token_ids=maybe(allowed, None),
        bad_words=maybe(words, ()),
        stop_token_ids=maybe(st.lists(st.integers(0, 9), max_size=3).map(tuple), ()),
        min_tokens=maybe(st.integers(1, 5), 0),
        logprobs=maybe(st.integers(0, MAX_LOGPROBS), None),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_mixtures(data: st.DataObject) -> None:
    rows = []
    for _ in range(data.draw(st.integers(1, SLOTS))):
        params = data.draw(sampling_params())
        # A few token ids only, so that penalties and bad words find something.
        tokens = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=30)))
        num_prompt = data.draw(st.integers(1, len(tokens)))
        rows.append(Row(params=params, tokens=tokens, num_prompt=num_prompt, seed=data.draw(st.integers(0, 2**63 - 1))))
    slots = data.draw(st.permutations(range(SLOTS)))[: len(rows)]
    logits = random_logits(len(rows), data.draw(st.integers(0, 1000)), ties=data.draw(st.booleans()))
    state, output = step(rows, logits, slots)
    for i, row in enumerate(rows):
        params = row.params if row.params.temperature >= 1e-5 else replace(row.params, temperature=0.0)
        check_row(replace(row, params=params), logits[i], int(output.token_ids[i]))
        history = np.asarray(state.history[slots[i]])
        assert history[: len(row.tokens) + 1].tolist() == [*row.tokens, output.token_ids[i]]
        assert not history[len(row.tokens) + 1 :].any()
        if params.logprobs is not None:
            check_logprobs(logits[i], jax.tree.map(lambda x, i=i: x[i], output))
    assert not output.token_ids[len(rows) :].any()


def check_logprobs(logits: np.ndarray, output: SampleOutput) -> None:
    expected = log_softmax(logits)
    token = int(output.token_ids)
    np.testing.assert_allclose(output.logprob, expected[token], atol=1e-4, rtol=1e-5)
    assert output.rank == 1 + np.sum(logits > logits[token])
    best = np.argsort(-logits, kind="stable")[:MAX_LOGPROBS]
    np.testing.assert_array_equal(output.top_ids, best)
    np.testing.assert_allclose(output.top_logprobs, expected[best], atol=1e-4, rtol=1e-5)


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = random_logits(3, ties=True)
    logits[0, [40, 299]] = 50
    logits[1, 299] = 50
    _, output = step([Row(params=GREEDY)] * 3, logits)
    assert output.token_ids[:2].tolist() == [40, 299]
    np.testing.assert_array_equal(output.token_ids[:3], logits.argmax(axis=1))
    assert not output.logprob.any()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.8, min_p=0.02, top_k=30, top_p=0.9),
        SamplingParams(temperature=0.8, logit_bias={3: 8.0, 250: 9.0}, bad_words=((5,),), top_p=0.95),
        SamplingParams(allowed_token_ids=(1, 2, 3, 130, 299)),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0, presence_penalty=-1.0),
    ],
)
def test_distribution(params: SamplingParams) -> None:
    """A chi-square test over 8,192 draws; seeds are fixed, so the result is too."""
    num_draws = 8192
    logits = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32) * 2
    row = Row(params=params, tokens=(1, 2, 3, 4, 4), num_prompt=3, seed=11)
    # Rows of one slot, each a draw with the noise of its own seed.
    state = load([row], [0])
    seeds = jnp.arange(2 * num_draws, dtype=jnp.uint32).reshape(num_draws, 2)
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (num_draws, *x.shape[1:])), state)
    wide = replace(wide, key=seeds)
    _, output = jit_sample(
        jnp.broadcast_to(jnp.asarray(logits)[None], (num_draws, VOCAB)),
        wide,
        jnp.arange(num_draws, dtype=jnp.int32),
        jnp.full((num_draws,), len(row.tokens), jnp.int32),
        jnp.ones((num_draws,), bool),
    )
    expected = num_draws * probabilities(params, adjusted(params, logits, row.tokens, row.num_prompt, EOS))
    counts = np.bincount(np.asarray(output.token_ids), minlength=VOCAB)
    assert not counts[expected == 0].any()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = np.sum((observed - wanted) ** 2 / wanted)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


@given(
    seed=st.integers(0, 2**16),
    ties=st.booleans(),
    scale=st.sampled_from([1e-6, 0.01, 1.0, 30.0]),
    temperature=st.sampled_from([0.05, 1.0, 20.0]),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.001, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 1e-3, 0.5, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_filters_are_exact(
    seed: int, ties: bool, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(2, seed, ties=ties) * np.float32(scale)
    top_p = float(np.float32(top_p))
    filters = Filters(
        temperature=jnp.full((2,), temperature, jnp.float32),
        top_k=jnp.full((2,), top_k, jnp.int32),
        top_p=jnp.full((2,), top_p, jnp.float32),
        min_p=jnp.full((2,), min_p, jnp.float32),
    )
    weights = np.asarray(jax.jit(filtered_weights)(jnp.asarray(logits), filters, jnp.array([True, True])))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for row in range(2):
        got = weights[row] > 0
        wide, narrow = kept(params, logits[row], slack=1e-5), kept(params, logits[row], slack=-1e-5)
        # Tokens whose weight has underflowed are never drawn and may count either way.
        alive = np.exp((logits[row] - logits[row].max()).astype(np.float64) / temperature) > 1e-36
        assert np.all(got[narrow & alive])
        assert not np.any(got[~wide & alive])
        values = logits[row]
        assert np.all(got[(values >= values[got].min()) & alive])


def test_top_k_of_one_is_greedy_even_among_near_ties() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 123] = np.float32(2e-38)
    for seed in range(5):
        _, output = step([Row(params=SamplingParams(top_k=1, temperature=10.0), seed=seed)], logits)
        assert output.token_ids[0] == 123


def test_noise_depends_on_seed_and_position_only() -> None:
    """The same sequences in other slots, rows, company and buckets draw the same tokens."""
    rows = [Row(params=SamplingParams(top_p=0.95), tokens=(1,) * (i + 1), num_prompt=1, seed=100 + i) for i in range(4)]
    logits = random_logits(4, 5)
    _, together = step(rows, logits)
    for i, row in enumerate(rows):
        _, alone = step([row], logits[i : i + 1], slots=[5 - i], bucket=1)
        assert alone.token_ids[0] == together.token_ids[i]
    order = [2, 0, 3, 1]
    _, shuffled = step([rows[i] for i in order], logits[order], slots=[5, 0, 3, 1])
    assert shuffled.token_ids[:4].tolist() == together.token_ids[order].tolist()
    _, with_greedy = step([Row(params=GREEDY), *rows], np.concatenate([logits[:1], logits]))
    assert with_greedy.token_ids[1:5].tolist() == together.token_ids[:4].tolist()


def test_seeds_and_positions_give_different_noise() -> None:
    flat = np.zeros((SLOTS, VOCAB), np.float32)
    for big in (0, 2**32, -1, 2**62):
        by_seed = step([Row(params=SamplingParams(), seed=big + i) for i in range(SLOTS)], flat)[1].token_ids
        by_place = step([Row(params=SamplingParams(), tokens=(1,) * (i + 1), seed=big) for i in range(SLOTS)], flat)[
            1
        ].token_ids
        assert len(set(by_seed.tolist())) >= SLOTS - 1
        assert len(set(by_place.tolist())) >= SLOTS - 1


def decode(state: SamplingState, slot: int, start: int, count: int) -> tuple[SamplingState, list[int]]:
    """Generates with logits that follow from the last token, as a model's would."""
    tokens = []
    for position in range(start, start + count):
        last = int(state.history[slot, position - 1])
        logits = random_logits(1, 1000 + last)
        state, output = jit_sample(
            jnp.asarray(logits),
            state,
            jnp.asarray([slot], jnp.int32),
            jnp.asarray([position], jnp.int32),
            jnp.asarray([True]),
        )
        tokens.append(int(output.token_ids[0]))
    return state, tokens


def test_resuming_after_preemption_continues_the_same() -> None:
    params = SamplingParams(
        temperature=0.9,
        top_p=0.9,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        min_tokens=6,
        stop_token_ids=(4,),
        bad_words=((1, 2),),
    )
    row = Row(params=params, seed=9)
    _, whole = decode(load([row], [0]), 0, 3, 10)
    resumed = replace(row, tokens=(*row.tokens, *whole[:4]))
    _, rest = decode(load([resumed], [3]), 3, 7, 6)
    assert rest == whole[4:]


def test_min_tokens_bans_stop_tokens_until_enough() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, [7, 9]] = 50, 40
    logits[:, 5] = 30
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(9,), ignore_eos=True)
    early = Row(params=params, tokens=(1, 2, 3, 4), num_prompt=3)
    late = Row(params=params, tokens=(1, 2, 3, 4, 4), num_prompt=3)
    assert step([early, late], logits)[1].token_ids[:2].tolist() == [5, 7]


def test_bad_words_are_completed_neither_in_the_output_nor_across_the_prompts_border() -> None:
    logits = np.zeros((5, VOCAB), np.float32)
    logits[:, 30], logits[:, 31] = 50, 40
    params = SamplingParams(temperature=0.0, bad_words=((10, 20, 30),))
    rows = [
        Row(params=params, tokens=(1, 10, 20), num_prompt=1),
        Row(params=params, tokens=(1, 10, 20), num_prompt=2),
        Row(params=params, tokens=(10, 20), num_prompt=2),
        Row(params=params, tokens=(20,), num_prompt=1),
        Row(params=params, tokens=(10, 20, 20), num_prompt=1),
    ]
    assert step(rows, logits)[1].token_ids[:5].tolist() == [31, 31, 31, 30, 30]


def test_a_sequence_that_has_banned_all_it_may_take_stays_within_what_is_allowed() -> None:
    params = SamplingParams(allowed_token_ids=(5, 6), bad_words=((3, 5), (3, 6)))
    for temperature in (0.0, 1.0):
        row = Row(params=replace(params, temperature=temperature), tokens=(3,), num_prompt=1)
        assert step([row], random_logits(1))[1].token_ids[0] in (5, 6)


def test_penalties_count_all_of_a_long_history() -> None:
    """Longer than a block of the counting loop, and unlike for every row."""
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 1], logits[:, 2] = 6.0, 1.0
    params = SamplingParams(temperature=0.0, frequency_penalty=0.01)
    rows = [
        Row(params=params, tokens=(*([1] * 100), *([1] * 501)), num_prompt=100),
        Row(params=params, tokens=(*([1] * 100), *([1] * 499)), num_prompt=100),
        Row(params=params, tokens=(1,), num_prompt=1),
    ]
    assert step(rows, logits)[1].token_ids[:3].tolist() == [2, 1, 1]
    logits[:, 1], logits[:, 2] = 6.0, 4.0
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    rows = [Row(params=params, tokens=(1, *([9] * 600)), num_prompt=601), Row(params=params, tokens=(9,), num_prompt=1)]
    assert step(rows, logits[:2])[1].token_ids[:2].tolist() == [2, 1]


def test_nan_stays_in_its_row() -> None:
    logits = random_logits(4, 2)
    rows = [Row(params=p) for p in (GREEDY, SamplingParams(top_p=0.9, top_k=9), SamplingParams(min_p=0.1), GREEDY)]
    _, clean = step(rows, logits)
    poisoned = logits.copy()
    poisoned[[0, 2]] = np.nan
    _, output = step(rows, poisoned)
    assert output.token_ids[[1, 3]].tolist() == clean.token_ids[[1, 3]].tolist()
    assert np.all((output.token_ids >= 0) & (output.token_ids < VOCAB))


def test_rows_that_do_not_sample_leave_everything_alone() -> None:
    rows = [Row(params=SamplingParams(top_p=0.5, logprobs=3, repetition_penalty=2.0))] * 2
    state = load(rows, [0, 1])
    after, output = jit_sample(
        jnp.asarray(random_logits(2)),
        state,
        jnp.asarray([0, -1], jnp.int32),
        jnp.asarray([3, 3], jnp.int32),
        jnp.asarray([False, True]),
    )
    for before_leaf, after_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before_leaf, after_leaf)
    assert not output.token_ids.any()
    assert not output.top_ids.any()


def test_logprobs_are_of_raw_logits() -> None:
    logits = random_logits(1, 4)
    params = SamplingParams(temperature=0.0, logprobs=20, logit_bias={17: 100.0}, repetition_penalty=2.0)
    _, output = step([Row(params=params)], logits)
    assert output.token_ids[0] == 17
    check_logprobs(logits[0], jax.tree.map(lambda x: x[0], output))


@pytest.mark.parametrize("vocab", [5, 20, 300])
def test_prompt_logprobs(vocab: int) -> None:
    logits = np.random.default_rng(0).normal(size=(4, vocab)).astype(np.float32)
    ids_ = np.array([0, 1, 4, vocab - 1], np.int32)
    output = jax.tree.map(np.asarray, jax.jit(prompt_logprobs)(jnp.asarray(logits), jnp.asarray(ids_)))
    for t in range(4):
        expected = log_softmax(logits[t])
        np.testing.assert_allclose(output.logprob[t], expected[ids_[t]], atol=1e-5)
        assert output.rank[t] == 1 + np.sum(logits[t] > logits[t, ids_[t]])
        best = np.argsort(-logits[t], kind="stable")[:MAX_LOGPROBS]
        np.testing.assert_array_equal(output.top_ids[t, : len(best)], best)
        np.testing.assert_allclose(output.top_logprobs[t, : len(best)], expected[best], atol=1e-5)
        assert np.all(output.top_logprobs[t, len(best) :] == -np.inf)


def test_one_program_serves_every_mix() -> None:
    program = jax.jit(functools.partial(sample))
    arguments = (jnp.asarray([0, 1], jnp.int32), jnp.asarray([3, 3], jnp.int32), jnp.asarray([True, True]))
    for params in (GREEDY, SamplingParams(), SamplingParams(top_k=3, logprobs=2, bad_words=((1,),), min_tokens=3)):
        program(jnp.asarray(random_logits(2)), load([Row(params=params)] * 2, [0, 1]), *arguments)
    assert program._cache_size() == 1
