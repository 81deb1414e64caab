"""Which tokens of a GGUF vocabulary end a generation."""

from __future__ import annotations

import pytest

from jaxserve.text.gguf_ends import end_token_ids
from jaxserve.text.gguf_tokenizer import TokenType, tokenizer_from_gguf


def metadata(*tokens: str, **ids: int) -> dict[str, object]:
    return {"tokenizer.ggml.tokens": [*tokens]} | {f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items()}


@pytest.mark.parametrize(
    ("tokens", "ids", "ends"),
    [
        (("a", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), {"eos": 1}, (1, 2, 3)),  # Llama 3
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), {"eos": 0}, (0, 2)),  # Qwen 2.5
        (("<pad>", "<eos>", "<bos>", "<end_of_turn>"), {"eos": 1}, (1, 3)),  # Gemma
        (("<unk>", "<s>", "</s>", "a"), {}, (2,)),
        (("<|endoftext|>", "<|assistant|>", "<|end|>"), {"eos": 0}, (0, 2)),  # Phi 3
        (("<|return|>", "<|call|>", "<|end|>"), {"eos": 0}, (0, 1)),  # where <|end|> ends a message only
        (("<|tool_response>", "</s>", "<turn|>"), {}, (0, 2)),
        (("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>"), {}, (0, 1, 2)),
        (("a", "b", "c", "d"), {"eot": 2, "eos": 3, "eom": 2, "fim_sep": 0}, (3, 2, 0)),
        (("a", "b"), {"eos": 2, "eot": 1 << 40}, ()),
        ((), {"eos": 0}, ()),
    ],
)
def test_ends(tokens: tuple[str, ...], ids: dict[str, int], ends: tuple[int, ...]) -> None:
    assert end_token_ids(metadata(*tokens, **ids)) == ends


def test_malformed_metadata_has_no_ends() -> None:
    assert end_token_ids({}) == ()
    assert end_token_ids({"tokenizer.ggml.tokens": "</s>", "tokenizer.ggml.eos_token_id": "0"}) == ()


def test_a_known_end_is_a_control_token_whatever_its_type() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "<|im_end|>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.NORMAL, TokenType.NORMAL, TokenType.USER_DEFINED]
    keys = {"model": "llama", "tokens": tokens, "token_type": types, "scores": [0.0] * 5, "add_bos_token": False}
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert tokenizer.eos_token_ids == (2, 4)
    assert tokenizer.encode("<|im_end|>") == [4]
    assert tokenizer.decode([3, 4, 2]) == "a"
