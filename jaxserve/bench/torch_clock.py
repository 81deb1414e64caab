"""PyTorch's attention kernels timed on this machine's GPU, where there is a PyTorch that can use it.

`scaled_dot_product_attention` takes sequences of one length, `varlen_attn` (FlashAttention) any; both take keys and
values that lie together, without pages. A CUDA graph holds a call on each state, so that no time of the host is in what
CUDA's events say.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from jaxserve.bench.kernel_names import TORCH_FLASH, TORCH_SDPA
from jaxserve.pallas.paged_attention.shapes import AttentionShape

Seconds: TypeAlias = Callable[[AttentionShape, int, int], float]
"""Times a call, given the problem, how many states take turns, and how many rounds of them to go."""

Call: TypeAlias = Callable[[Any, Any, Any], Any]
"""Attention of queries, keys and values."""


def torch_kernels() -> dict[str, Seconds]:
    """PyTorch's kernels by name; none where PyTorch or its CUDA is missing."""
    if find_spec("torch") is None:
        return {}
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {}

    def timed(make: Callable[[ModuleType, AttentionShape, str], tuple[Call, Mapping[str, tuple[int, ...]]]]) -> Seconds:
        def seconds(shape: AttentionShape, num_states: int, rounds: int) -> float:
            call, sizes = make(torch, shape, "cuda")
            dtype = torch.__dict__[shape.dtype]
            states = [
                tuple(torch.randn(size, dtype=dtype, device="cuda") for size in sizes.values())
                for _ in range(num_states)
            ]
            with torch.no_grad():
                return _time(torch, call, states, rounds)

        return seconds

    return {TORCH_SDPA: timed(sdpa), TORCH_FLASH: timed(flash)}


def sdpa(torch: ModuleType, shape: AttentionShape, device: str) -> tuple[Call, Mapping[str, tuple[int, ...]]]:
    """Attention of a batch of sequences as long as each other, and the shapes of its arguments: [S, heads, tokens, H].

    Args:
        torch: PyTorch.
        shape: The problem.
        device: Where it will run; any.

    Raises:
        NotImplementedError: Sequences differ, or chunks have something before them.
    """
    del device
    if len(set(shape.sequences)) > 1 or shape.query_tokens not in (1, shape.context):
        raise NotImplementedError("it takes decodes and whole prompts of one length")

    def call(q: Any, k: Any, v: Any) -> Any:  # noqa: ANN401 - torch's arrays
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=not shape.is_decode, scale=shape.config.scale, enable_gqa=True
        )

    kv = (shape.num_seqs, shape.num_kv_heads, shape.context, shape.head_dim)
    return call, {"q": (shape.num_seqs, shape.num_heads, shape.query_tokens, shape.head_dim), "k": kv, "v": kv}


def flash(torch: ModuleType, shape: AttentionShape, device: str) -> tuple[Call, Mapping[str, tuple[int, ...]]]:
    """FlashAttention of sequences of any lengths, and the shapes of its arguments: [tokens, heads, H].

    Args:
        torch: PyTorch.
        shape: The problem.
        device: Where it will run.
    """
    attention = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    new, seen = (np.array(column) for column in zip(*shape.sequences, strict=True))
    starts = [torch.tensor([0, *np.cumsum(each).tolist()], dtype=torch.int32, device=device) for each in (new, seen)]

    def call(q: Any, k: Any, v: Any) -> Any:  # noqa: ANN401 - torch's arrays
        lengths = (*starts, int(new.max()), int(seen.max()))
        return attention(q, k, v, *lengths, scale=shape.config.scale, window_size=(-1, 0), enable_gqa=True)

    kv = (int(seen.sum()), shape.num_kv_heads, shape.head_dim)
    return call, {"q": (int(new.sum()), shape.num_heads, shape.head_dim), "k": kv, "v": kv}


def _time(torch: Any, call: Call, states: list[tuple[Any, ...]], rounds: int) -> float:  # noqa: ANN401 - a module
    """Seconds of a call."""

    def turn() -> None:
        for state in states:
            call(*state)

    # The first turn chooses kernels and loads them, which a graph cannot.
    turn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / (rounds * len(states))
