"""Every sampling parameter is refused by name when it is out of range or does not fit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import SamplingParams
from jaxserve.sampling.validate import SamplingLimits, stop_ids, validate_sampling

LIMITS = SamplingLimits(vocab_size=100, max_model_len=50, eos_token_ids=(2,))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1, 51]),
        ("temperature", [-0.1, NAN, INF, 101.0]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, 1.01, NAN]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("repetition_penalty", [0.0, -1.0, 0.001, 101.0, NAN, INF]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("presence_penalty", [-2.1, 2.1, INF]),
        ("logit_bias", [{100: 1.0}, {-1: 1.0}, {1: 100.5}, {1: NAN}, dict.fromkeys(range(301), 0.0)]),
        ("allowed_token_ids", [(), (100,), (-1,)]),
        ("bad_words", [((),), ((100,),), ((1, -1),), ((1,) * 17,), ((1, 2),) * 65]),
        ("stop_token_ids", [(100,), (-1,), tuple(range(65))]),
        ("seed", [2**63, -(2**63) - 1]),
        ("logprobs", [-1, 21]),
        ("prompt_logprobs", [-1, 21]),
        ("stop", [("",), ("a", "")]),
    ],
)
def test_out_of_range_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError) as caught:
            validate_sampling(SamplingParams(**{param: value}), LIMITS)
        assert caught.value.param == param
        assert param in caught.value.message


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_tokens=1, min_tokens=1, temperature=0.0, top_p=1e-9, min_p=1.0, top_k=10**9),
        SamplingParams(temperature=100.0, repetition_penalty=0.01, frequency_penalty=-2.0, presence_penalty=2.0),
        SamplingParams(logit_bias=dict.fromkeys(range(100), -100.0), seed=-(2**63)),
        SamplingParams(bad_words=((1,) * 16,) * 64, stop_token_ids=tuple(range(64)), seed=2**63 - 1),
        SamplingParams(allowed_token_ids=tuple(range(100)), logprobs=20, prompt_logprobs=0, stop=("a",)),
    ],
)
def test_borders_are_accepted(params: SamplingParams) -> None:
    validate_sampling(params, LIMITS)


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        validate_sampling(SamplingParams(max_tokens=3, min_tokens=4), LIMITS)


def test_a_request_that_allows_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
        validate_sampling(SamplingParams(allowed_token_ids=(3,), bad_words=((3,),)), LIMITS)
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
        validate_sampling(SamplingParams(allowed_token_ids=(2,), min_tokens=1), LIMITS)
    validate_sampling(SamplingParams(allowed_token_ids=(2,)), LIMITS)
    small = SamplingLimits(vocab_size=2, max_model_len=50)
    with pytest.raises(InvalidRequestError, match="ban every token"):
        validate_sampling(SamplingParams(bad_words=((0,), (1,))), small)


def test_stop_ids_include_the_models_and_no_duplicates() -> None:
    assert stop_ids(SamplingParams(stop_token_ids=(5, 2, 5), ignore_eos=True), (2, 9)) == (5, 2, 9)


def test_validation_needs_no_jax() -> None:
    code = "import sys, jaxserve.sampling.validate; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_end_of_sequence_tokens_are_in_the_vocabulary() -> None:
    """`min_tokens` bans them by scattering to them: one outside would spoil the step of its neighbours."""
    assert SamplingLimits(vocab_size=100, max_model_len=50, eos_token_ids=(0, 99)).eos_token_ids == (0, 99)
    for outside in (-1, 100, 1 << 40):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            SamplingLimits(vocab_size=100, max_model_len=50, eos_token_ids=(2, outside))
