"""The paged-attention API refuses what does not fit together, and dispatch keeps its promises."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
import pytest
from paged_attention_cases import SHAPES, Length, build

from jaxserve.core.errors import ConfigError
from jaxserve.pallas.dispatch import Backend, Target, preference, select
from jaxserve.pallas.paged_attention.api import AttentionConfig, paged_attention

CONFIG = AttentionConfig(scale=0.25, sliding_window=None, soft_cap=None)


def arguments() -> dict[str, Any]:
    case = build(SHAPES["mha"], (Length(cached=3, new=1),))
    arrays = {name: jnp.asarray(getattr(case, name)) for name in ("q", "k", "v", "kv_pages")}
    return {**arrays, "batch": case.batch(), "layer": case.layer(), "config": CONFIG}


def changed(**changes: Any) -> dict[str, Any]:
    return {**arguments(), **changes}


def with_batch(**changes: Any) -> dict[str, Any]:
    return changed(batch=dataclasses.replace(arguments()["batch"], **changes))


def with_layer(**changes: Any) -> dict[str, Any]:
    return changed(layer=dataclasses.replace(arguments()["layer"], **changes))


def test_good_arguments_are_accepted() -> None:
    out, pages = paged_attention(**arguments())
    assert out.shape == arguments()["q"].shape
    assert pages.shape == arguments()["kv_pages"].shape


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: changed(q=jnp.zeros((16, 64))), "q must be"),
        (lambda: changed(v=jnp.zeros((16, 4, 8))), "differ in shape"),
        (lambda: changed(q=jnp.zeros((15, 4, 16))), "tokens and the head dim"),
        (lambda: changed(q=jnp.zeros((16, 6, 16))), "do not divide"),
        (lambda: changed(q=jnp.zeros((16, 4, 16), jnp.int32)), "q must be floating point"),
        (lambda: changed(kv_pages=jnp.zeros((9, 4, 4, 16))), "pages"),
        (lambda: changed(kv_pages=jnp.zeros((9, 4, 8, 16), jnp.int16)), "int16"),
        (lambda: changed(kv_pages=jnp.zeros((9, 4, 8, 16), jnp.int8)), "k_scale and v_scale"),
        (lambda: with_layer(page_offset=jnp.zeros((1,), jnp.int32)), "page_offset"),
        (lambda: with_layer(page_offset=jnp.float32(0)), "page_offset"),
        (lambda: with_layer(sinks=jnp.zeros((3,))), "sinks"),
        (lambda: with_layer(k_scale=jnp.ones((4,))), "k_scale"),
        (lambda: with_layer(v_scale=jnp.int32(1)), "v_scale"),
        (lambda: with_batch(page_table=jnp.zeros((4,), jnp.int32)), "page_table"),
        (lambda: with_batch(context_lens=jnp.zeros((3,), jnp.int32)), "context_lens"),
        (lambda: with_batch(context_lens=jnp.zeros((4,), jnp.float32)), "context_lens"),
        (lambda: with_batch(query_starts=jnp.zeros((4,), jnp.int32)), "query_starts"),
        (lambda: with_batch(num_seqs=jnp.zeros((1,), jnp.int32)), "num_seqs"),
        (lambda: with_batch(num_decodes=jnp.float32(1)), "num_decodes"),
        (lambda: with_batch(positions=jnp.zeros((4,), jnp.int32)), "positions"),
        (lambda: with_batch(token_seq=jnp.zeros((4,), jnp.int32)), "token_seq"),
        (lambda: changed(config=dataclasses.replace(CONFIG, sliding_window=0)), "sliding_window"),
        (lambda: changed(config=dataclasses.replace(CONFIG, soft_cap=0.0)), "soft_cap"),
    ],
)
def test_bad_arguments_are_named(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(**bad())


def refuse(x: int) -> str:
    raise NotImplementedError(f"no {x}")


def test_automatic_choice_prefers_the_platform_and_falls_back_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    backends = {Backend.REFERENCE: lambda x: f"reference {x}", Backend.TPU: refuse, Backend.XLA: lambda x: f"xla {x}"}
    with caplog.at_level(logging.WARNING):
        assert select("op", backends, Target(platform="tpu"))(3) == "xla 3"
    assert [record.getMessage() for record in caplog.records] == ["op: backend tpu cannot do this (no 3); using xla"]
    caplog.clear()
    assert select("op", backends, Target(platform="cpu"))(3) == "xla 3"
    assert not caplog.records


def test_the_last_backend_has_no_fallback() -> None:
    with pytest.raises(NotImplementedError, match="no 4"):
        select("op", {Backend.REFERENCE: refuse, Backend.XLA: refuse}, Target(platform="cpu"))(4)


def test_explicit_choice_is_kept() -> None:
    backends = {Backend.REFERENCE: lambda x: "reference", Backend.XLA: refuse}
    assert select("op", backends, Target(platform="cpu", backend=Backend.REFERENCE))(1) == "reference"
    with pytest.raises(NotImplementedError, match="no 1"):
        select("op", backends, Target(platform="cpu", backend=Backend.XLA))(1)


def test_other_errors_are_not_taken_for_lack_of_support() -> None:
    def broken(x: int) -> str:
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        select("op", {Backend.XLA: broken, Backend.REFERENCE: lambda x: "reference"}, Target(platform="cpu"))(1)


def test_missing_backends_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="no backend gpu; it has xla"):
        select("op", {Backend.XLA: refuse}, Target(backend=Backend.GPU))
    with pytest.raises(ConfigError, match="no backend for cpu"):
        select("op", {Backend.TPU: refuse}, Target(platform="cpu"))


def test_a_backend_for_gpus_is_refused_elsewhere() -> None:
    backends = {Backend.GPU: lambda x: f"gpu {x}", Backend.XLA: refuse}
    assert select("op", backends, Target(platform="gpu", backend=Backend.GPU))(5) == "gpu 5"
    for platform in (None, "cpu", "tpu"):
        with pytest.raises(ConfigError, match="backend gpu runs on GPUs only"):
            select("op", backends, Target(platform=platform, backend=Backend.GPU))


def test_every_platform_ends_with_what_runs_anywhere() -> None:
    assert preference("cpu") == (Backend.XLA, Backend.REFERENCE)
    assert preference("gpu") == (Backend.GPU, Backend.XLA, Backend.REFERENCE)
    assert preference("tpu") == (Backend.TPU, Backend.XLA, Backend.REFERENCE)
    assert preference("METAL") == (Backend.XLA, Backend.REFERENCE)
