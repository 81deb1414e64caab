"""PyTorch's kernels get the problem that ours get; they are timed where PyTorch has a GPU, and nowhere else."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxserve.bench.torch_clock import flash, sdpa, torch_kernels
from jaxserve.pallas.paged_attention.shapes import DEVICE_SHAPES, AttentionShape

PROMPT = AttentionShape(
    num_heads=4, num_kv_heads=2, head_dim=16, page_size=8, num_seqs=2, context=12, query_tokens=12, dtype="float32",
    kv_dtype="float32",
)  # fmt: skip


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """In float64: [S, N, new, H] and [S, K, context, H]."""
    group, new, context = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(each.astype(np.float64), group, axis=1) for each in (k, v))
    logits = np.einsum("snqh,snkh->snqk", q, k) * scale
    seen = np.arange(context) <= np.arange(context - new, context)[:, None]
    weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    return np.einsum("snqk,snkh->snqh", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("shape", [PROMPT, replace(PROMPT, query_tokens=1)], ids=["prompt", "decode"])
def test_sdpa_attends_as_we_do(shape: AttentionShape) -> None:
    torch = pytest.importorskip("torch")
    call, sizes = sdpa(torch, shape, "cpu")
    arrays = [np.random.default_rng(0).standard_normal(size).astype(np.float32) for size in sizes.values()]
    out = call(*map(torch.from_numpy, arrays)).numpy()
    np.testing.assert_allclose(out, attention(*arrays, shape.config.scale), rtol=1e-5, atol=1e-5)
    assert sizes["k"] == (2, 2, 12, 16)


def test_sdpa_has_no_cache_and_no_ragged_batches() -> None:
    torch = ModuleType("torch")
    for shape in (replace(PROMPT, query_tokens=3), DEVICE_SHAPES["prefill ragged"]):
        with pytest.raises(NotImplementedError, match="one length"):
            sdpa(torch, shape, "cpu")


def test_flash_takes_a_ragged_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own runs on GPUs only, so what it is called with is looked at."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    fake = SimpleNamespace(varlen_attn=lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    torch: Any = SimpleNamespace(int32="int32", tensor=lambda values, dtype, device: (values, dtype, device))
    ragged = replace(PROMPT, lengths=((12, 12), (3, 7)))
    call, sizes = flash(torch, ragged, "cuda")
    assert sizes == {"q": (15, 4, 16), "k": (19, 2, 16), "v": (19, 2, 16)}
    call("q", "k", "v")
    ((args, kwargs),) = calls
    assert args == ("q", "k", "v", ([0, 12, 15], "int32", "cuda"), ([0, 12, 19], "int32", "cuda"), 12, 12)
    assert kwargs == {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True}


def test_without_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.bench.torch_clock.find_spec", lambda _: None)
    assert torch_kernels() == {}
    monkeypatch.setattr("jaxserve.bench.torch_clock.find_spec", lambda _: object())
    fake = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert torch_kernels() == {}
