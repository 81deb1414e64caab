"""Makes the goldens of the model tests with `transformers`: tiny random checkpoints and what SmolLM2 says.

Each tiny checkpoint is written by `transformers` itself with every parameter random, biases and norms too, so that a
swapped or skipped tensor shows. Run `pip install torch transformers accelerate` and then `python
tests/goldens/make_model_goldens.py`; none of this is needed to run the tests.
"""

from __future__ import annotations

import sys
from functools import partial
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
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

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


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The most likely continuation."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else <|im_end|>, also the padding, is masked
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
    )
    return out[0, len(prompt) :].tolist()


def generated_log_softmax(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """What `log_softmax` gives for both together, computed as `generate` does: the prompt, then token by token."""
    cache, logits = None, []
    with torch.no_grad():
        for token_ids in [prompt, *([token] for token in tokens)]:
            out = model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
    logprobs = torch.log_softmax(torch.cat(logits), dim=-1).numpy()
    np.testing.assert_array_equal(np.argmax(logprobs[len(prompt) - 1 : -1], axis=-1), tokens)
    return logprobs


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout: `transformers` computes norms and rope in float32 whatever the dtype is."""

    def normalise(module: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return module.weight * x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + module.variance_epsilon)

    def rotation(
        module: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None] * module.inv_freq.to(x.dtype)).repeat(1, 1, 2)
        return torch.cos(angles), torch.sin(angles)

    replaced = {LlamaRMSNorm: normalise, LlamaRotaryEmbedding: rotation}
    for module in model.double().modules():
        if type(module) in replaced:
            module.forward = partial(replaced[type(module)], module)
    return model


def make_smollm2(cache_dir: Path) -> None:
    """Writes `smollm2.npz`: the prompts with the clearest continuations, and log-probabilities at every position.

    They are those of the most likely tokens, in order, and of tokens that are the same at every position: in float32,
    on one thread, with `transformers`' default attention and as its `generate` computes them. How far each is from
    float64 stands beside it, in float16, whose steps are 6e-8 there. Torch differs from itself by more than 1e-4 when
    the same text goes through the model in one pass; that is printed.
    """
    source = resolve_source("smollm2-135m", cache_dir=cache_dir)
    tokenizer = load_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    found = []
    for text in PROMPTS:
        prompt = tokenizer.encode(text, add_special_tokens=False)
        tokens = greedy(model, prompt)
        logprobs = generated_log_softmax(model, prompt, tokens)
        top = np.sort(logprobs[len(prompt) - 1 : -1], axis=-1)
        margin = float(np.min(top[:, -1] - top[:, -2]))
        sys.stdout.write(f"{margin:.4f} {text!r} -> {tokenizer.decode(tokens)!r}\n")
        found.append((margin, prompt, tokens, logprobs))
    found = sorted(found, key=lambda item: -item[0])[:NUM_PROMPTS]
    one_pass = [log_softmax(model, [*prompt, *tokens]) for _, prompt, tokens, _ in found]
    model = in_float64(model)
    exact = [log_softmax(model, [*prompt, *tokens]) for _, prompt, tokens, _ in found]
    ids = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, NUM_FIXED_IDS, replace=False))
    arrays: dict[str, np.ndarray] = {"ids": ids.astype(np.int32)}
    for index, (_, prompt, tokens, logprobs) in enumerate(found):
        rounding = (logprobs - exact[index]).astype(np.float16)
        top_ids = np.argsort(-logprobs, axis=-1)[:, :NUM_TOP]
        arrays[f"prompt_{index}"] = np.array(prompt, np.int32)
        arrays[f"greedy_{index}"] = np.array(tokens, np.int32)
        arrays[f"logprobs_{index}"] = logprobs[:, ids]
        arrays[f"rounding_{index}"] = rounding[:, ids]
        arrays[f"top_ids_{index}"] = top_ids.astype(np.int32)
        arrays[f"top_logprobs_{index}"] = np.take_along_axis(logprobs, top_ids, axis=-1)
        arrays[f"top_rounding_{index}"] = np.take_along_axis(rounding, top_ids, axis=-1)
    np.savez_compressed(HERE / "smollm2.npz", **arrays)
    generated = np.concatenate([logprobs for *_, logprobs in found])
    for name, left, right in (
        ("token by token from float64", generated, np.concatenate(exact)),
        ("in one pass from float64", np.concatenate(one_pass), np.concatenate(exact)),
        ("token by token from one pass", generated, np.concatenate(one_pass)),
    ):
        error = np.abs(left - right)
        sys.stdout.write(f"{name}: up to {error.max():.2e}, of the stored ids {error[:, ids].max():.2e}\n")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--cache-dir", type=Path, required=True, help="where the demo model is or will be kept")
    torch.set_num_threads(1)
    make_tiny()
    make_smollm2(parser.parse_args().cache_dir)
