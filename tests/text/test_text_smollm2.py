"""The demo model's own tokenizer and template, out of its GGUF file, against llama.cpp and by hand."""

import json
from pathlib import Path

import pytest

from jaxserve.checkpoint.sources import load_tokenizer, resolve_source
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tokenizer(cache_dir: Path) -> Tokenizer:
    return load_tokenizer(resolve_source("smollm2-135m", cache_dir=cache_dir))


def test_ids_equal_llama_cpp(tokenizer: Tokenizer) -> None:
    texts = json.loads((DATA / "hard_texts.json").read_text(encoding="utf-8"))
    golden = json.loads((DATA / "tokenizer_goldens.json").read_text(encoding="utf-8"))["cases"]["smollm2"]["ids"]
    different = {
        text: (tokenizer.encode(text), ids)
        for text, ids in zip(texts, golden, strict=True)
        if tokenizer.encode(text) != ids
    }
    assert different == {}


def test_facts(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2, 0, 4))
    assert [token_id for token_id in range(100) if tokenizer.is_special(token_id)] == list(range(17))
    assert tokenizer.encode("12345") == [tokenizer.encode(digit)[0] for digit in "12345"]


def test_template_adds_the_default_system_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    text = template.render([{"role": "user", "content": "What is the capital of France?"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == 1
    assert ids.count(2) == 2
