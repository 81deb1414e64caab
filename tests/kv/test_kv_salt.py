"""Whose prefixes a request can see."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kv.salt import effective_salt

PAIRS = st.tuples(st.text(min_size=1), st.text())


@given(PAIRS, PAIRS)
def test_another_pair_has_another_salt(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (effective_salt(*one) == effective_salt(*other)) == (one == other)


def test_where_one_text_ends_and_the_next_begins() -> None:
    assert len({effective_salt(*pair) for pair in (("ab", "c"), ("a", "bc"), ("abc", ""), ("a", "b\0c"))}) == 4


@given(st.text())
def test_without_a_key_the_salt_is_the_requests_own(salt: str) -> None:
    assert effective_salt("", salt) == salt


def test_nobody_can_bring_the_salt_of_another() -> None:
    """Who knows the effective salt of another, and sends it as their own, shares nothing with them."""
    theirs = effective_salt("them", "")
    assert effective_salt("me", theirs) != theirs
    assert "them" not in theirs


def test_any_text_is_a_salt() -> None:
    assert effective_salt("k", "\ud800") != effective_salt("k", "\ud801")


def test_it_is_the_same_in_every_process() -> None:
    code = (
        "import sys; from jaxserve.kv.salt import effective_salt; assert 'jax' not in sys.modules; "
        "print(effective_salt('key', 'salt'))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == effective_salt("key", "salt")
