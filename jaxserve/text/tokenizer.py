"""Text to token ids and back, behind one protocol.

Encoding is done by the `tokenizers` library. Decoding is done here, on the bytes of the tokens, so that a whole
decode, an incremental one and the bytes reported beside a log-probability agree by construction.
`tokenizer_from_folder` reads the files of a Hugging Face folder; `jaxserve.text.gguf_tokenizer` builds the same class
from GGUF metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import tokenizers

from jaxserve.core.errors import CheckpointError, InvalidRequestError
from jaxserve.core.json_file import read_optional_object
from jaxserve.core.regular_file import read_optional
from jaxserve.text.added_tokens import listed_tokens, load_backend, mark_special
from jaxserve.text.coverage import coverage_of
from jaxserve.text.cuts import MAX_UNCUT_CHARS, MAX_WHOLE_CHARS, PART_CHARS, can_be_cut, parts
from jaxserve.text.library_errors import library_errors
from jaxserve.text.token_bytes import TokenDecoder, parse_decoder
from jaxserve.text.wrapping import wrapping_ids

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which tokenizer_config.json lists special tokens and chat templates read them."""


MAX_TOKENIZER_BYTES = 512 << 20
"""Largest tokenizer.json that is read; those of a vocabulary of 260,000 tokens have 35 MB."""

MAX_TEMPLATE_BYTES = 16 << 20
"""Largest chat template that is read."""

LONG_TEXT_CHARS = 4096
"""Texts above this are encoded without Python's lock, which costs shorter ones more than it is worth."""


class Tokenizer(Protocol):
    """Turns text into token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; ids below it may have no token."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The token a prompt begins with, if the model has one."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja chat template, if it has one."""
        ...

    @property
    def tool_chat_template(self) -> str | None:
        """Another one for requests with tools, if the model has one ("tool_use")."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Text of special tokens by role (`bos_token`, `eos_token`, ...), for chat templates."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; control tokens written in it become those tokens.

        Args:
            text: Any text that UTF-8 can express.
            add_special_tokens: Add what the model expects around a prompt (a BOS token); False for rendered chats.

        Raises:
            InvalidRequestError: The text has an unpaired surrogate, or the tokenizer fails on it.
        """
        ...

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of a text that takes no tokenisation; 0 if nothing is known."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids from the start of a text; ill-formed UTF-8 becomes U+FFFD, unknown ids nothing."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token alone as text, with U+FFFD where it is a part of a character."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; empty for an id without a token."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which `skip_special_tokens` leaves out."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFacts:
    """What a tokenizer's backend does not know about the model.

    Attributes:
        bos_token_id: The token a prompt begins with, if the model has one.
        eos_token_ids: Tokens that end a sequence.
        special_tokens: Text of special tokens by role.
        chat_templates: Chat templates by name; the usual one is "default", one for tool calls "tool_use".
        prefix_ids: Ids put before a text with special tokens.
        suffix_ids: Ids put after it.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()


class BackendTokenizer:
    """A `Tokenizer` on top of the `tokenizers` library.

    Args:
        backend: Encodes; its decoder says how tokens become bytes. What its post-processor would put around a text is
            in `facts`.
        facts: What the model's other files say.
    """

    def __init__(self, backend: tokenizers.Tokenizer, facts: TokenizerFacts) -> None:
        self.backend = backend
        self.facts = facts
        self._decoder: TokenDecoder = parse_decoder(
            None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        )
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._coverage = coverage_of(backend, vocabulary)
        self._can_be_cut = can_be_cut(backend)
        # Not how many there are: in a vocabulary with holes the largest ids are beyond that.
        self._vocab_size = 1 + max(vocabulary.values(), default=-1)
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The token a prompt begins with, if the model has one."""
        return self.facts.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return self.facts.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja chat template, if it has one."""
        return self.facts.chat_templates.get("default")

    @property
    def tool_chat_template(self) -> str | None:
        """Another one for requests with tools, if the model has one."""
        return self.facts.chat_templates.get("tool_use")

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Text of special tokens by role."""
        return self.facts.special_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The text has an unpaired surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}, which no Unicode text may have."
            ) from error
        ids = self._encode(text)
        if add_special_tokens:
            # In place: there may be millions.
            ids[:0] = self.facts.prefix_ids
            ids.extend(self.facts.suffix_ids)
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of a text; see `Tokenizer.fewest_tokens`."""
        return 0 if self._coverage is None else self._coverage.fewest_tokens(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids from the start of a text; see `Tokenizer.decode`."""
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self._special]
        return self._decoder.join([self.token_bytes(token_id) for token_id in ids])

    def token_text(self, token_id: int) -> str:
        """One token alone as text, with U+FFFD where it is a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; empty for an id without a token."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) if 0 <= token_id < self._vocab_size else None
            if token is None:
                return b""
            found = self._bytes[token_id] = self._decoder.token_bytes(token)
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token."""
        return token_id in self._special

    def _encode(self, text: str) -> list[int]:
        with library_errors(_cannot_tokenise):
            if len(text) <= LONG_TEXT_CHARS:
                return list(self.backend.encode(text, add_special_tokens=False).ids)
            if len(text) <= PART_CHARS or not self._can_be_cut:
                return self._encode_long(text)
            ids: list[int] = []
            shared: dict[int, int] = {}  # one object an id, of which a long text may have millions
            for part in parts(text):
                part_ids = self._encode_long(part)
                ids.extend(map(shared.setdefault, part_ids, part_ids))
            return ids

    def _encode_long(self, text: str) -> list[int]:
        most = MAX_UNCUT_CHARS if self._can_be_cut else MAX_WHOLE_CHARS
        if len(text) > most:
            raise InvalidRequestError(
                f"The text has {len(text)} characters that can only be tokenised together, at most {most} are; "
                f"{'break it into lines' if self._can_be_cut else 'shorten it'}."
            )
        # Of the library's ways to encode, those for batches let other threads of Python run meanwhile.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)


def _cannot_tokenise(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The model's tokenizer cannot tokenise this text ({reason}); send another.")


def tokenizer_from_folder(path: str | Path, *, eos_token_ids: Sequence[int] = ()) -> BackendTokenizer:
    """Loads the tokenizer of a Hugging Face folder.

    Args:
        path: Folder with tokenizer.json and, if the model has them, tokenizer_config.json and chat_template.jinja.
        eos_token_ids: Further tokens that end a sequence, such as those of generation_config.json.

    Raises:
        CheckpointError: A file is missing, malformed, or describes a tokenizer that is not supported.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    data = _read_optional(file, MAX_TOKENIZER_BYTES)
    if data is None:
        raise CheckpointError(f"{folder} has no tokenizer.json; save the model's fast tokenizer into the folder.")
    config = read_optional_object(folder / "tokenizer_config.json")
    special = _special_tokens(config) or _special_tokens(read_optional_object(folder / "special_tokens_map.json"))
    with library_errors(
        lambda reason: CheckpointError(f"{file} is not a tokenizer that the tokenizers library can read: {reason}")
    ):
        backend = load_backend(data, listed_tokens(config), str(file))
        backend.no_padding()
        backend.no_truncation()
        mark_special(backend, special.values())
        ids = {role: backend.token_to_id(text) for role, text in special.items()}
        prefix, suffix = wrapping_ids(backend, config, bos=ids.get("bos_token"), eos=ids.get("eos_token"))
        own_eos = [ids["eos_token"]] if ids.get("eos_token") is not None else []
        ends = (token_id for token_id in [*own_eos, *eos_token_ids] if token_id is not None)
        facts = TokenizerFacts(
            bos_token_id=ids.get("bos_token"),
            eos_token_ids=tuple(dict.fromkeys(ends)),
            special_tokens=special,
            chat_templates=_chat_templates(folder, config),
            prefix_ids=prefix,
            suffix_ids=suffix,
        )
        return BackendTokenizer(backend, facts)


def _read_optional(file: Path, max_bytes: int) -> bytes | None:
    try:
        return read_optional(file, max_bytes=max_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Special tokens by role; each is a string or an object with its `content`, and may be null."""
    special: dict[str, str] = {}
    for role in SPECIAL_ROLES:
        match config.get(role):
            case str(text) | {"content": str(text)}:
                special[role] = text
            case None:
                continue
            case other:
                raise CheckpointError(
                    f"tokenizer_config.json has a {role} that is neither text nor a token object: {other!r:.80}"
                )
    return special


def _chat_templates(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
    """Templates by name; a chat_template.jinja file wins over the one in tokenizer_config.json."""
    templates: dict[str, str] = {}
    match config.get("chat_template"):
        case str(text):
            templates["default"] = text
        case list(entries):
            for entry in entries:
                match entry:
                    case {"name": str(name), "template": str(text)}:
                        templates[name] = text
                    case _:
                        raise CheckpointError(
                            "tokenizer_config.json has a chat_template entry without name and template."
                        )
        case None:
            pass
        case _:
            raise CheckpointError("tokenizer_config.json has a chat_template that is neither text nor a list.")
    for name, file in [("default", folder / "chat_template.jinja")] + [
        (file.stem, file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    ]:
        data = _read_optional(file, MAX_TEMPLATE_BYTES)
        if data is None:
            continue
        try:
            templates[name] = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 ({error}); save it as UTF-8.") from error
    return templates
