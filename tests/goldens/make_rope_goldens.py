"""Makes `ropes.json` and `ropes.npz` with `transformers`: scaled ropes, by their frequencies and by what a model says.

Run `pip install torch transformers` and then `python tests/goldens/make_rope_goldens.py`; none of this is needed to run
the tests. A config is what a config.json says besides sizes, in either dialect; both sides read the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent
WEIGHTS = HERE / "tiny" / "llama"
EVERY = 4
"""Of the positions whose log-probabilities are kept."""


def divisors(count: int, last: float) -> list[float]:
    """Like those of published models: from 1 up, each with some digits."""
    return [round(1 + (last - 1) * (index / (count - 1)) ** 2, 3) for index in range(count)]


def yarn(factor: float | None, original: int | None, **more: Any) -> dict[str, Any]:
    sizes = {"factor": factor, "original_max_position_embeddings": original}
    return {"rope_type": "yarn", **{key: value for key, value in sizes.items() if value is not None}, **more}


QWEN = {"max_position_embeddings": 32768, "rope_theta": 1000000.0}
FREQUENCIES: dict[str, tuple[int, dict[str, Any], tuple[int, ...]]] = {
    "qwen2.5, as its card advises": (
        128,
        {**QWEN, "rope_scaling": {**yarn(4.0, 32768), "type": "yarn"}},
        (1000, 100000),
    ),
    "older dialect": (
        128,
        {**QWEN, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        (100000,),
    ),
    "yarn without an original length": (64, {**QWEN, "rope_scaling": yarn(2.0, None)}, (40000,)),
    "yarn whose factor is the ratio": (
        64,
        {"max_position_embeddings": 16384, "rope_parameters": {**yarn(None, 4096, rope_theta=10000.0), "factor": None}},
        (5000,),
    ),
    "gpt-oss": (
        64,
        {
            "max_position_embeddings": 131072,
            "rope_parameters": yarn(32.0, 4096, rope_theta=150000.0, beta_fast=32.0, beta_slow=1.0, truncate=False),
        },
        (100000,),
    ),
    "deepseek": (
        64,
        {
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": yarn(40, 4096, type="yarn", beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=1.0),
        },
        (100000,),
    ),
    "yarn with its own gain": (
        64,
        {"max_position_embeddings": 65536, "rope_scaling": yarn(16.0, 4096, attention_factor=1.5, beta_fast=64.0)},
        (9000,),
    ),
    "dynamic": (
        64,
        {"max_position_embeddings": 2048, "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        (100, 2048, 2049, 5000, 8192),
    ),
    "longrope": (
        64,
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": divisors(32, 3.0), "long_factor": divisors(32, 60.0)},
        },
        (100, 4096, 4097, 131072),
    ),
    "longrope with a factor": (
        32,
        {
            "max_position_embeddings": 65536,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "short_factor": divisors(16, 2.0),
                "long_factor": divisors(16, 20.0),
            },
        },
        (8192, 9000),
    ),
    "linear": (64, {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}, (9000,)),
    "llama3 with the length outside": (
        64,
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        (9000,),
    ),
}
"""Head size, config, and lengths of sequences."""

MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "yarn": ({"max_position_embeddings": 32, "rope_scaling": yarn(4.0, 32)}, (80,)),
    "yarn, mscale, whole ramp": (
        {
            "max_position_embeddings": 256,
            "rope_parameters": yarn(
                *(8.0, 32),
                rope_theta=10000.0,
                beta_fast=4.0,
                beta_slow=0.5,
                mscale=0.7,
                mscale_all_dim=0.2,
                truncate=False,
            ),
        },
        (80,),
    ),
    "dynamic": ({"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, (32, 80)),
    "longrope": (
        {
            "max_position_embeddings": 256,
            "rope_scaling": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.25, 1.5, 2.0],
                "long_factor": [1.5, 3.0, 6.0, 8.0],
            },
        },
        (32, 80),
    ),
}
"""Config of a model with the weights of tiny/llama, and lengths of sequences."""


def frequencies(head_dim: int, config: dict[str, Any], lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    found = []
    for length in lengths:
        whole = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, **copy.deepcopy(config))
        inverse, gain = ROPE_INIT_FUNCTIONS[whole.rope_parameters["rope_type"]](whole, "cpu", seq_len=length)
        found.append({"length": length, "inverse_frequencies": inverse.tolist(), "attention_factor": float(gain)})
    return found


def log_softmax(config: dict[str, Any], token_ids: list[int]) -> np.ndarray:
    """What a fresh model says of one sequence: some ropes remember the longest one."""
    base = json.loads((WEIGHTS / "config.json").read_text())
    del base["rope_parameters"]
    model = LlamaForCausalLM.from_pretrained(
        WEIGHTS, config=LlamaConfig(**{**base, **copy.deepcopy(config)}), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0], dim=-1).numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    token_ids = np.load(WEIGHTS / "golden.npz")["token_ids"].tolist()
    arrays = {
        f"{name}/{length}": log_softmax(config, token_ids[:length])[::EVERY]
        for name, (config, lengths) in MODELS.items()
        for length in lengths
    }
    np.savez_compressed(HERE / "ropes.npz", **arrays)
    said = {
        "every": EVERY,
        "frequencies": {
            name: {"head_dim": head_dim, "config": config, "found": frequencies(head_dim, config, lengths)}
            for name, (head_dim, config, lengths) in FREQUENCIES.items()
        },
        "models": {name: {"config": config, "lengths": lengths} for name, (config, lengths) in MODELS.items()},
    }
    (HERE / "ropes.json").write_text(json.dumps(said, indent=1) + "\n")
