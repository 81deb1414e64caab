"""The demo model gives the same tokens whichever implementation of paged attention serves it."""

from __future__ import annotations

import pytest

from jaxserve import LLM, SamplingParams

PROMPT = (504, 3575, 282, 4649, 314)
SMALL = {
    "dtype": "float32",
    "max_num_seqs": 1,
    "max_num_batched_tokens": 8,
    "max_model_len": 32,
    "page_size": 16,
    "num_pages": 4,
    "compilation_cache": False,
}


def tokens(attention: str) -> tuple[int, ...]:
    with LLM("smollm2-135m", attention=attention, **SMALL) as llm:
        [answer] = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=3))
    return tuple(answer.outputs[0].token_ids)


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    found = tokens("xla")
    assert len(found) == 3
    return found


# The TPU's kernels run in JAX's interpreter here, which takes seconds for each step.
@pytest.mark.parametrize("attention", ["reference", "tpu"])
def test_same_tokens(attention: str, expected: tuple[int, ...]) -> None:
    assert tokens(attention) == expected
