"""Makes the goldens of the model tests with `transformers`: tiny random checkpoints and what SmolLM2 says.

Each tiny checkpoint is written by `transformers` itself with every parameter random, biases and norms too, so that a
swapped or skipped tensor shows. Run `pip install torch transformers accelerate` and then `python
tests/goldens/make_model_goldens.py`; none of this is needed to run the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jaxserve.checkpoint.sources import load_tokenizer, resolve_source

HERE = Path(__file__).parent
NUM_TOKENS = 80
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "The capital of Germany is",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5, 6, 7,",
    "The first law of thermodynamics states that",
    "<|im_start|>user\nName three primary colors.<|im_end|>\n<|im_start|>assistant\n",
    "The Earth revolves around the",
    "In 1969, Neil Armstrong became the first",
    "A, B, C, D, E,",
    "SELECT name, age FROM",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "The three states of matter are",
    "#include <stdio.h>\n\nint main() {\n",
)
NUM_GREEDY = 64
NUM_PROMPTS = 10
NUM_TOP = 20
NUM_FIXED_IDS = 256


def tiny_models() -> dict[str, PreTrainedModel]:
    """One model for each kind of mathematics."""
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "llama-biased-tied": LlamaForCausalLM(
            LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        ),
        "llama3-rope": LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
        "llama-linear-rope": LlamaForCausalLM(
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0})
        ),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "qwen2-window": Qwen2ForCausalLM(
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=0)
        ),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    }


def log_softmax(model: PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    """Log-probabilities after each token, [T, V] float32, computed in the model's dtype."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits, dim=-1).numpy().astype(np.float32)


def make_tiny() -> None:
    """Writes `tiny/NAME/`: a checkpoint, token ids, and log-probabilities."""
    for seed, (name, model) in enumerate(tiny_models().items()):
        generator = torch.Generator().manual_seed(seed)
        model.eval()
        for path, parameter in model.named_parameters():
            spread = 0.3 if path.endswith("norm.weight") else 0.15
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.data = noise + 1.0 if path.endswith("norm.weight") else noise
        folder = HERE / "tiny" / name
        shard = "60KB" if name == "qwen3" else "5GB"
        model.save_pretrained(folder, max_shard_size=shard)
        token_ids = torch.randint(SIZES["vocab_size"], (NUM_TOKENS,), generator=generator).tolist()
        np.savez_compressed(folder / "golden.npz", token_ids=token_ids, logprobs=log_softmax(model, token_ids))


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """The most likely continuation, and the smallest lead of a chosen token over the next best."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else <|im_end|>, also the padding, is masked
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logprobs = log_softmax(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(np.argmax(logprobs, axis=-1), tokens)
    top = np.sort(logprobs, axis=-1)
    return tokens, float(np.min(top[:, -1] - top[:, -2]))


def make_smollm2(cache_dir: Path) -> None:
    """Writes `smollm2.npz`: the prompts with the clearest continuations, and log-probabilities at every position.

    They are those of the most likely tokens, in order, and of tokens that are the same at every position. The
    continuations are computed in float32, the log-probabilities in float64 (norms and rope stay in float32): among the
    unlikely tokens torch's own rounding in float32, which `rounding` states, is as large as the tests' tolerance.
    """
    source = resolve_source("smollm2-135m", cache_dir=cache_dir)
    tokenizer = load_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).eval()
    found = []
    for text in PROMPTS:
        prompt = tokenizer.encode(text, add_special_tokens=False)
        tokens, margin = greedy(model, prompt)
        sys.stdout.write(f"{margin:.4f} {text!r} -> {tokenizer.decode(tokens)!r}\n")
        found.append((margin, prompt, tokens))
    found = sorted(found, key=lambda item: -item[0])[:NUM_PROMPTS]
    rounded = [log_softmax(model, [*prompt, *tokens]) for _, prompt, tokens in found]
    model, rounding = model.double(), 0.0
    ids = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, NUM_FIXED_IDS, replace=False))
    arrays: dict[str, np.ndarray] = {"ids": ids.astype(np.int32)}
    for index, (_, prompt, tokens) in enumerate(found):
        logprobs = log_softmax(model, [*prompt, *tokens])
        rounding = max(rounding, float(np.max(np.abs(rounded[index] - logprobs))))
        top_ids = np.argsort(-logprobs, axis=-1)[:, :NUM_TOP]
        arrays[f"prompt_{index}"] = np.array(prompt, np.int32)
        arrays[f"greedy_{index}"] = np.array(tokens, np.int32)
        arrays[f"logprobs_{index}"] = logprobs[:, ids]
        arrays[f"top_ids_{index}"] = top_ids.astype(np.int32)
        arrays[f"top_logprobs_{index}"] = np.take_along_axis(logprobs, top_ids, axis=-1)
    sys.stdout.write(f"float32 differs from float64 by up to {rounding:.1e}\n")
    margin = min(margin for margin, _, _ in found)
    np.savez_compressed(HERE / "smollm2.npz", margin=margin, rounding=rounding, **arrays)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--cache-dir", type=Path, required=True, help="where the demo model is or will be kept")
    make_tiny()
    make_smollm2(parser.parse_args().cache_dir)
