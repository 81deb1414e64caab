"""The size of a JSON text, counted on its bytes, is that of the values a decoder would build."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.openai import outline as module
from jaxserve.server.openai.outline import outline

TEXTS = st.text(max_size=6) | st.sampled_from(['"', "\\", '\\"', "[,]", "{:}", "\\\\", '"[', "\u00e9"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def num_values(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(num_values, inner))


@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]), size=st.integers(1, 9))
def test_counts(value: Any, ascii_only: bool, indent: int | None, size: int) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE_BYTES", size)
        found = outline(data)
    assert found == outline(data)
    assert found.depth == depth_of(value)
    assert found.num_fields == (len(value) if isinstance(value, dict) else 0)
    # An empty list or object counts as if it held a value.
    assert num_values(value) <= found.num_values <= 2 * num_values(value)


def test_fields_that_stand_twice_are_counted_twice() -> None:
    assert outline(b'{"a":{"a":1,"b":2},"a":[{"c":1}]}').num_fields == 2


@pytest.mark.parametrize("data", [b"", b'"', b'"\\', b"\\", b"]]]", b'"a" "b', b"\xff\xfe"])
def test_what_is_not_json(data: bytes) -> None:
    assert outline(data).depth == 0
