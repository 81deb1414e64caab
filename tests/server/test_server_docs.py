"""What the pages promise: the limits of parameters, and what a seed is good for."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.server.connections import SILENT_UPLOAD_S
from jaxserve.server.limits import LIMITS, MAX_CONNECTIONS
from jaxserve.server.openai.intake import BODIES_AT_ONCE, SMALL_BODY_BYTES, BodyLimits
from jaxserve.server.openai.middleware import OPEN_PATHS
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


@pytest.mark.parametrize(
    ("what", "limit"),
    [
        ("request line and headers", f"{LIMITS.head_bytes:,} bytes"),
        ("time for a head", f"{LIMITS.head_s:g} s"),
        ("an idle connection", f"{LIMITS.keep_alive_s:g} s"),
        ("silence within a body", f"{BodyLimits(max_bytes=1).silence_s:g} s"),
        ("time for a whole body", f"{BodyLimits(max_bytes=1).total_s:g} s"),
        ("bodies that are being read", f"{BODIES_AT_ONCE} of the largest; the first {SMALL_BODY_BYTES:,} bytes"),
        ("bodies that are being read", f"silent for {BodyLimits(max_bytes=1).spare_s:g} s"),
        ("an answer that its client", f"{LIMITS.stall_s:g} s"),
        ("rest of a request", f"{LIMITS.linger_s:g} s"),
    ],
)
def test_limits_of_clients_are_told(what: str, limit: str) -> None:
    [row] = [line for line in _limits().splitlines() if line.startswith(f"| {what}")]
    assert limit in row


def test_connections_are_told() -> None:
    assert f"at most\n{MAX_CONNECTIONS:,}" in _limits()
    assert all(f"`{path}`" in _limits() for path in OPEN_PATHS)
    assert BodyLimits(max_bytes=1).spare_s == SILENT_UPLOAD_S


def _limits() -> str:
    return (DOCS / "limits.md").read_text(encoding="utf-8")
