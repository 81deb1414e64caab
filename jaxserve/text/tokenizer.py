"""Text to token ids and back, behind one protocol.

Encoding is done by the `tokenizers` library. Decoding is done here, on the bytes of the tokens, so that a whole
decode, an incremental one and the bytes reported beside a log-probability agree by construction.
`tokenizer_from_folder` reads the files of a Hugging Face folder; `jaxserve.text.gguf_tokenizer` builds the same class
from GGUF metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import tokenizers

from jaxserve.core.errors import CheckpointError, InvalidRequestError
from jaxserve.text.coverage import coverage_of
from jaxserve.text.cuts import MAX_UNCUT_CHARS, MAX_WHOLE_CHARS, PART_CHARS, can_be_cut, parts
from jaxserve.text.token_bytes import TokenDecoder, parse_decoder

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which tokenizer_config.json lists special tokens and chat templates read them."""


LONG_TEXT_CHARS = 4096
"""Texts above this are encoded without Python's lock, which costs shorter ones more than it is worth."""


class Tokenizer(Protocol):
    """Turns text into token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
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
            InvalidRequestError: The text has an unpaired surrogate.
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
        prefix_ids: Ids put before a text with special tokens; None leaves it to the backend's post-processor.
        suffix_ids: Ids put after it; None leaves it to the backend's post-processor.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    prefix_ids: tuple[int, ...] | None = None
    suffix_ids: tuple[int, ...] | None = None


class BackendTokenizer:
    """A `Tokenizer` on top of the `tokenizers` library.

    Args:
        backend: Encodes; its decoder says how tokens become bytes.
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
        self._coverage = coverage_of(backend)
        wrapping = _wrapping(backend)
        self._wrapping = wrapping or ([], [])
        self._can_be_cut = wrapping is not None and can_be_cut(backend)
        self._vocab_size = backend.get_vocab_size(with_added_tokens=True)
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
        prefix, suffix = self.facts.prefix_ids, self.facts.suffix_ids
        if not add_special_tokens or prefix is not None or suffix is not None:
            ids = self._encode(text, add_special_tokens=False)
            return [*(prefix or ()), *ids, *(suffix or ())] if add_special_tokens else ids
        return self._encode(text, add_special_tokens=True)

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

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= LONG_TEXT_CHARS:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        if len(text) <= PART_CHARS or not self._can_be_cut:
            return self._encode_long(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        shared: dict[int, int] = {}  # one object an id, of which a long text may have millions
        for part in parts(text):
            part_ids = self._encode_long(part, add_special_tokens=False)
            ids.extend(map(shared.setdefault, part_ids, part_ids))
        if not add_special_tokens:
            return ids
        prefix, suffix = self._wrapping
        return [*prefix, *ids, *suffix]

    def _encode_long(self, text: str, *, add_special_tokens: bool) -> list[int]:
        most = MAX_UNCUT_CHARS if self._can_be_cut else MAX_WHOLE_CHARS
        if len(text) > most:
            raise InvalidRequestError(
                f"The text has {len(text)} characters that can only be tokenised together, at most {most} are; "
                f"{'break it into lines' if self._can_be_cut else 'shorten it'}."
            )
        # Of the library's ways to encode, those for batches let other threads of Python run meanwhile.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)


def _wrapping(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """What the backend's post-processor puts before and behind a text; None if that cannot be told."""
    inner = list(backend.encode("a", add_special_tokens=False).ids)
    whole = list(backend.encode("a", add_special_tokens=True).ids)
    starts = [i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner]
    return (whole[: starts[0]], whole[starts[0] + len(inner) :]) if inner and len(starts) == 1 else None


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
    if not file.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; save the model's fast tokenizer into the folder.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises bare Exception for every malformed file.
        raise CheckpointError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = _read_json(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config)
    special = _special_tokens(config) or _special_tokens(_read_json(folder / "special_tokens_map.json"))
    _mark_special(backend, special.values())
    ids = {role: backend.token_to_id(text) for role, text in special.items()}
    own_eos = [ids["eos_token"]] if ids.get("eos_token") is not None else []
    facts = TokenizerFacts(
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in [*own_eos, *eos_token_ids] if token_id is not None)),
        special_tokens=special,
        chat_templates=_chat_templates(folder, config),
        prefix_ids=_wrapping_ids(config, "add_bos_token", ids.get("bos_token")),
        suffix_ids=_wrapping_ids(config, "add_eos_token", ids.get("eos_token")),
    )
    return BackendTokenizer(backend, facts)


def _read_json(file: Path) -> Mapping[str, object]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object.")
    return value


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
                    f"tokenizer_config.json has a {role} that is neither text nor a token object: {other!r}"
                )
    return special


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, object]) -> None:
    """Adds the tokens that only tokenizer_config.json lists, under the ids it gives them."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise CheckpointError("tokenizer_config.json has an added_tokens_decoder that is not an object.")
    known = backend.get_added_tokens_decoder()
    for token_id, entry in sorted((int(key), entry) for key, entry in listed.items()):
        if token_id in known:
            continue
        flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "normalized", "single_word") if key in entry}
        token = tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags)
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"tokenizer_config.json gives the token {token.content!r} the id {token_id}, but "
                f"tokenizer.json makes it {backend.token_to_id(token.content)}."
            )


def _mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes role tokens of the plain vocabulary special, so that they are found in text and skipped in output."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for text in texts:
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _wrapping_ids(config: Mapping[str, object], key: str, token_id: int | None) -> tuple[int, ...] | None:
    match config.get(key):
        case True if token_id is not None:
            return (token_id,)
        case False:
            return ()
        case _:
            return None


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
        if file.is_file():
            templates[name] = file.read_text(encoding="utf-8")
    return templates
