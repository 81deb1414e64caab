"""What bytes a token stands for: the decoder of a `tokenizers` tokenizer, compiled to a function of one token.

Two kinds of decoder exist among generative models. Byte-level ones (GPT-2, Llama 3, Qwen) write each byte of a token
as one printable character; byte-fallback ones (SentencePiece) write text with U+2581 for the space and spell unknown
bytes as `<0x0A>`. In both a text is the concatenation of its tokens' bytes, except for a space that SentencePiece
puts before the text; so decoding needs no look at the neighbours and can be done token by token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxserve.core.errors import CheckpointError
from jaxserve.text.growth import require_bounded_growth

SPACE_MARK = "\u2581"
"""How SentencePiece writes a space inside a token."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The printable character of each byte, as GPT-2's byte-level BPE writes it, inverted: character to byte.

    Bytes that print as themselves in Latin-1 keep their code point; the other 68 get the code points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDecoder:
    """How tokens become bytes.

    Attributes:
        alphabet: Character to byte for byte-level tokens; empty if tokens are plain text.
        replacements: Strings replaced in a token, in order.
        byte_fallback: Tokens of the form `<0x0A>` are that byte.
        strip_left: Spaces removed from the start of a whole text, at most this many.
        strip_first_token: All spaces at the start of a text's first token are removed.
    """

    alphabet: Mapping[str, int]
    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    strip_left: int
    strip_first_token: bool

    def token_bytes(self, token: str) -> bytes:
        """The bytes of one token, as it stands in the vocabulary.

        A byte-level token with a character outside the alphabet (an added token such as one with a space in it) is
        plain text.
        """
        if self.alphabet:
            values = [self.alphabet.get(char) for char in token]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                return bytes(known)
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        return token.encode()

    def join(self, pieces: Sequence[bytes]) -> str:
        """The text of a sequence of tokens' bytes, from its start; ill-formed UTF-8 becomes U+FFFD."""
        if self.strip_first_token and pieces:
            pieces = [pieces[0].lstrip(b" "), *pieces[1:]]
        text = b"".join(pieces).decode("utf-8", "replace")
        num_spaces = len(text) - len(text.lstrip(" "))
        return text[min(num_spaces, self.strip_left) :]


_PLAIN = TokenDecoder(alphabet={}, replacements=(), byte_fallback=False, strip_left=0, strip_first_token=False)


def parse_decoder(config: object) -> TokenDecoder:
    """Compiles the `decoder` object of a tokenizer.json.

    Args:
        config: The JSON value under "decoder".

    Raises:
        CheckpointError: The decoder, or a step of it, is not one whose tokens decode independently of each other, or
            it can make tokens absurdly long.
    """
    if not isinstance(config, dict):
        raise CheckpointError("tokenizer.json has no decoder, so tokens cannot be turned back into text.")
    steps = config["decoders"] if config.get("type") == "Sequence" else [config]
    require_bounded_growth(config, "decoder")
    decoder = _PLAIN
    for step in steps:
        decoder = _apply_step(decoder, step)
    return decoder


def _apply_step(decoder: TokenDecoder, step: Mapping[str, object]) -> TokenDecoder:
    match step:
        case {"type": "ByteLevel"}:
            return replace(decoder, alphabet=byte_alphabet())
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return replace(decoder, replacements=(*decoder.replacements, (old, new)))
        case {"type": "ByteFallback"}:
            return replace(decoder, byte_fallback=True)
        case {"type": "Fuse"}:
            return decoder
        case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
            return replace(decoder, strip_left=start)
        case {"type": "Metaspace", "replacement": str(mark)}:
            strips = step.get("prepend_scheme", "always") != "never"
            return replace(decoder, replacements=(*decoder.replacements, (mark, " ")), strip_first_token=strips)
        case _:
            raise CheckpointError(
                f"tokenizer.json uses the decoder {step.get('type')!r} in a way that is not supported; supported "
                "are ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and a left Strip."
            )
