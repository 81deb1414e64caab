"""Chips and formats that kernels are not for: refused while traced, so that plain XLA takes over."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_attention_cases import Length, Shape, build, exact

from jaxserve.pallas.dispatch import Target
from jaxserve.pallas.hopper import require_hopper
from jaxserve.pallas.page_copy.api import copy_pages
from jaxserve.pallas.paged_attention.api import AttentionConfig, paged_attention

SHAPE = Shape(max_seqs=4, max_tokens=16, num_kv_heads=2, group=3, head_dim=64, page_size=16, pages_per_seq=4)


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])


@pytest.mark.parametrize("capability", ["8.0", "8.9", "10.0"])
def test_other_gpus_are_refused(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, capability)
    with pytest.raises(NotImplementedError, match=f"capability 9.0, not {capability}"):
        require_hopper()


def test_hopper_and_no_gpu_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    require_hopper()
    on_gpu(monkeypatch, "9.0")
    require_hopper()


def test_pages_are_copied_on_other_gpus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    on_gpu(monkeypatch, "8.0")
    pool = np.arange(3 * 16 * 4 * 64, dtype=np.float32).reshape(3, 16, 4, 64)
    ids = [jnp.asarray([page], jnp.int32) for page in (0, 2)]
    with caplog.at_level(logging.WARNING):
        copied = copy_pages(jnp.asarray(pool), *ids, num_layers=1, target=Target(platform="gpu"))
    assert "capability 9.0, not 8.0); using xla" in caplog.text
    np.testing.assert_array_equal(copied, pool[[0, 1, 0]])


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float16", "float16"), ("bfloat16", "float16")])
def test_float16_runs_in_plain_xla_on_tpus(dtype: str, kv_dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    plain = AttentionConfig(scale=0.1, sliding_window=None, soft_cap=None)
    case = build(SHAPE, [Length(cached=9, new=1), Length(cached=20, new=5)], dtype=dtype, kv_dtype=kv_dtype)
    arrays = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages))
    with caplog.at_level(logging.WARNING):
        out, pool = paged_attention(*arrays, case.batch(), case.layer(), config=plain, target=Target(platform="tpu"))
    assert "TPUs have no arithmetic for float16); using xla" in caplog.text
    wanted = exact(case, np.asarray(pool), plain)
    assert np.all(np.abs(np.asarray(out) - wanted.out)[: case.num_tokens] <= wanted.bound[: case.num_tokens])
