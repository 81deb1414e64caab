"""What the pages promise: the limits of parameters, and what a seed is good for."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.server.openai.parameters import PARAMETERS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("repetition_penalty", "[0.01, 100]"),
        ("n", "128"),
        ("n", "2,048"),
        ("logit_bias", "300"),
        ("stop", "64"),
        ("stop", "1,024"),
        ("stop_token_ids", "64"),
        ("bad_words", "64"),
        ("prompt", "1,024"),
        ("messages", "16,384"),
        ("priority", "-10 to 10"),
    ],
)
def test_limits_are_told(name: str, limit: str) -> None:
    """That they are held to is tested with the other bad input."""
    [parameter] = [p for p in PARAMETERS if p.name == name]
    assert limit in parameter.note


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [("parameters.md", "| `seed` |", " |\n"), ("architecture.md", "- A request with a seed", "\n- ")],
)
def test_a_seed_is_promised_what_it_keeps(page: str, begin: str, end: str) -> None:
    _, *found = (DOCS / page).read_text(encoding="utf-8").split(begin)
    assert found
    for text in found:
        promise, adr = text.partition(end)[0], "adr/0003-bfloat16-as-bits-on-cpu.md"
        assert "with `--dtype float32`" in promise
        assert "in bfloat16 on CPUs a near-tie may fall the other way" in promise
        assert f"]({adr})" in promise
        assert (DOCS / adr).is_file()
