"""A tokenizer from the metadata of a GGUF file.

GGUF keeps the vocabulary, token types, and either merges (`tokenizer.ggml.model` = gpt2, byte-level BPE) or scores
(llama, SentencePiece BPE). How a byte-level model cuts text into words before merging is not stored, only named
(`tokenizer.ggml.pre`); the table here gives the rule for each name. The result is the same class that Hugging Face
folders give.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from jaxserve.core.errors import CheckpointError
from jaxserve.text.gguf_ends import END_KEYS, end_texts, end_token_ids
from jaxserve.text.library_errors import library_errors
from jaxserve.text.token_bytes import SPACE_MARK
from jaxserve.text.tokenizer import BackendTokenizer, TokenizerFacts


class TokenType(enum.IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class PreTokenizer:
    """How a byte-level model cuts text into words.

    Attributes:
        patterns: Regular expressions applied one after the other, each match becoming a piece of its own.
        nfc: Text is brought to Unicode's composed form first.
        ignore_merges: A word that is a token needs no merges.
        adds_bos: Whether a BOS token is added when the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = PreTokenizer(patterns=(_GPT2_WORDS,))
_SINGLE_DIGITS = PreTokenizer(patterns=(r"\p{N}", _GPT2_WORDS))
_LLAMA3 = PreTokenizer(patterns=(_CL100K_WORDS.format(digits=r"\p{N}{1,3}"),), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer(patterns=(_CL100K_WORDS.format(digits=r"\p{N}"),), nfc=True)
_DEFAULT = PreTokenizer(
    patterns=(
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""The rule behind each known value of `tokenizer.ggml.pre`."""

_MAX_CUT_CHARS = 1 << 29
"""Most characters of all ways to cut the tokens of a SentencePiece vocabulary in two, ten times what real ones have."""

_ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_MARKED_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def tokenizer_from_gguf(metadata: Mapping[str, object], *, eos_token_ids: Sequence[int] = ()) -> BackendTokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Tokens that are known to end a generation by their text are control tokens, whatever type the file gives them.

    Args:
        metadata: The file's metadata, key to plain Python value.
        eos_token_ids: Further tokens that end a sequence.

    Raises:
        CheckpointError: A key is missing or has the wrong type, or the kind of tokenizer is not supported.
    """
    fields = _Fields(metadata)
    tokens = fields.strings("tokens")
    types = fields.integers("token_type") if fields.has("token_type") else [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError("The GGUF file's tokenizer.ggml.tokens and token_type do not describe one token each.")
    ends = end_texts(tokens)
    types = [TokenType.CONTROL if token in ends else kind for token, kind in zip(tokens, types, strict=True)]
    model = fields.text("model")
    with library_errors(lambda reason: CheckpointError(f"The GGUF file's tokenizer is inconsistent: {reason}")):
        match model:
            case "gpt2":
                rule = _pre_tokenizer(fields)
                backend, adds_bos = _byte_level(fields, tokens, rule), rule.adds_bos
            case "llama":
                backend, adds_bos = _sentence_piece(fields, tokens, types), True
            case _:
                raise CheckpointError(
                    f"The GGUF file's tokenizer.ggml.model is {model!r}; supported are 'gpt2' (byte-level BPE) "
                    "and 'llama' (SentencePiece BPE)."
                )
        _add_marked_tokens(backend, tokens, types)
        return BackendTokenizer(backend, _facts(fields, tokens, adds_bos=adds_bos, eos_token_ids=eos_token_ids))


class _Fields:
    """Typed reading of the keys under `tokenizer.ggml.`."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self.metadata = metadata

    def has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self.metadata

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        problem = f"must be {expected}" if self.has(name) else "is missing"
        return CheckpointError(f"The GGUF file's metadata key tokenizer.ggml.{name} {problem}.")

    def text(self, name: str) -> str:
        match self.metadata.get(f"tokenizer.ggml.{name}"):
            case str(value):
                return value
            case _:
                raise self._wrong(name, "text")

    def flag(self, name: str, *, default: bool) -> bool:
        match self.metadata.get(f"tokenizer.ggml.{name}", default):
            case bool(value):
                return value
            case _:
                raise self._wrong(name, "true or false")

    def token_id(self, name: str, num_tokens: int) -> int | None:
        match self.metadata.get(f"tokenizer.ggml.{name}"):
            case None:
                return None
            case int(value) if 0 <= value < num_tokens:
                return value
            case _:
                raise self._wrong(name, "a token id of the vocabulary")

    def strings(self, name: str) -> list[str]:
        match self.metadata.get(f"tokenizer.ggml.{name}"):
            case list(values) if all(isinstance(value, str) for value in values):
                return values
            case _:
                raise self._wrong(name, "a list of strings")

    def integers(self, name: str) -> list[int]:
        match self.metadata.get(f"tokenizer.ggml.{name}"):
            case list(values) if all(isinstance(value, int) for value in values):
                return values
            case _:
                raise self._wrong(name, "a list of integers")

    def floats(self, name: str) -> list[float]:
        match self.metadata.get(f"tokenizer.ggml.{name}"):
            case list(values) if all(isinstance(value, float) for value in values):
                return values
            case _:
                raise self._wrong(name, "a list of floats")


def _pre_tokenizer(fields: _Fields) -> PreTokenizer:
    name = fields.text("pre") if fields.has("pre") else "default"
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        raise CheckpointError(
            f"The GGUF file's tokenizer.ggml.pre is {name!r}, whose word splitting is not known here; known are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}."
        )
    return rule


def _byte_level(fields: _Fields, tokens: list[str], rule: PreTokenizer) -> Tokenizer:
    """Byte-level BPE: the words of the rule, written as printable bytes, merged in the order of the merges."""
    merges: list[tuple[str, str]] = []
    for merge in fields.strings("merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(
                f"The GGUF file's tokenizer.ggml.merges has an entry that is not two tokens: {merge!r}."
            )
        merges.append((left, right))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(fields: _Fields, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece BPE: of all neighbours whose union is a token, those with the best score merge first.

    That order is written as merges: every way to cut a token into two tokens, best score first.
    """
    scores = fields.floats("scores")
    if len(scores) != len(tokens):
        raise CheckpointError("The GGUF file's tokenizer.ggml.scores must have one entry a token.")
    if sum(len(token) ** 2 for token in tokens) > _MAX_CUT_CHARS:
        raise CheckpointError(
            "The GGUF file's tokenizer.ggml.tokens are too long to be a vocabulary; download it again."
        )
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    ranked = sorted((-scores[i], i) for i in range(len(tokens)) if types[i] in mergeable and len(tokens[i]) > 1)
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[i] for _, i in ranked)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    adds_space = fields.flag("add_space_prefix", default=True)
    mark_spaces = normalizers.Replace(" ", SPACE_MARK)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE_MARK), mark_spaces]) if adds_space else mark_spaces
    )
    plain = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if adds_space else plain)
    return backend


def _add_marked_tokens(backend: Tokenizer, tokens: list[str], types: Sequence[int]) -> None:
    """Makes control and user-defined tokens be found in text before anything is cut into words."""
    marked = [
        AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in _MARKED_TYPES and token
    ]
    backend.add_special_tokens([token for token in marked if token.special])
    backend.add_tokens([token for token in marked if not token.special])


def _facts(fields: _Fields, tokens: list[str], *, adds_bos: bool, eos_token_ids: Sequence[int]) -> TokenizerFacts:
    roles = {role: fields.token_id(key, len(tokens)) for role, key in _ROLE_KEYS.items()}
    bos, eos = roles["bos_token"], roles["eos_token"]
    for key in END_KEYS:
        fields.token_id(key.removeprefix("tokenizer.ggml."), len(tokens))
    prefix = (bos,) if bos is not None and fields.flag("add_bos_token", default=adds_bos) else ()
    suffix = (eos,) if eos is not None and fields.flag("add_eos_token", default=False) else ()
    templates = {
        key.removeprefix("tokenizer.chat_template.") if key != "tokenizer.chat_template" else "default": value
        for key, value in fields.metadata.items()
        if (key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")) and isinstance(value, str)
    }
    return TokenizerFacts(
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys((*end_token_ids(fields.metadata), *eos_token_ids))),
        special_tokens={role: tokens[token_id] for role, token_id in roles.items() if token_id is not None},
        chat_templates=templates,
        prefix_ids=prefix,
        suffix_ids=suffix,
    )
