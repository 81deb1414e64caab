"""Which tokens of a GGUF vocabulary end a generation.

A file names its end-of-sequence token, seldom the token that ends a turn, so a chat would run on past its answer.
llama.cpp therefore knows the usual end tokens by their text, and files are made and tested with it; the same texts are
known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "</s>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_utterance>",
        # What follows a piece of code that was filled in: padding, another repository, another file.
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    }
)
"""Texts of tokens that end a generation, whatever their type says."""

END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
"""Keys that name such a token."""

# In vocabularies with the tokens on the left those on the right end a part of a message or nothing at all.
_OVERRULED = (
    (frozenset({"<|return|>", "<|call|>", "<|end|>"}), "<|end|>"),
    (frozenset({"<|flush|>", "<|calls|>", "<|end|>"}), "<|end|>"),
    (frozenset({"<|tool_response>", "</s>"}), "</s>"),
)


def end_texts(tokens: Sequence[str]) -> frozenset[str]:
    """Those texts of a vocabulary that end a generation.

    Args:
        tokens: The vocabulary, by id.
    """
    found = END_TEXTS.intersection(tokens)
    return found - {text for together, text in _OVERRULED if together <= found}


def end_token_ids(metadata: Mapping[str, object]) -> tuple[int, ...]:
    """Ids of the tokens of a GGUF file that end a generation: those that keys name first, then those known by text.

    Args:
        metadata: The file's; what is malformed in it counts as absent.
    """
    listed = metadata.get("tokenizer.ggml.tokens")
    tokens = [token for token in listed if isinstance(token, str)] if isinstance(listed, list) else []
    named = [metadata.get(key) for key in END_KEYS]
    known = end_texts(tokens)
    ids = [each for each in named if isinstance(each, int) and 0 <= each < len(tokens)]
    return tuple(dict.fromkeys((*ids, *(token_id for token_id, token in enumerate(tokens) if token in known))))
