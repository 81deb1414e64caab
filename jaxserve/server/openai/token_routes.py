"""`/tokenize` and `/detokenize`: text to token ids and back, as prompts would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequestError
from jaxserve.engine.api import Engine
from jaxserve.server.openai.body import body_decoder, read_body
from jaxserve.server.openai.decode import BodyDecoder
from jaxserve.server.openai.encoding import encode
from jaxserve.server.openai.intake import body_is_parsed
from jaxserve.server.openai.offload import Offload
from jaxserve.server.openai.parameters import DETOKENIZE, TOKENIZE
from jaxserve.server.openai.schema import DetokenizeBody, TokenizeBody
from jaxserve.server.openai.token_answers import detokenized_json, pieces_response, tokenized_json
from jaxserve.server.openai.translate import Translator


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRoutes:
    """Routes that generate nothing but tokens.

    Attributes:
        engine: Knows the length of the context.
        translator: Has the tokenizer.
        offload: Where large bodies are read and large answers made.
    """

    engine: Engine
    translator: Translator
    offload: Offload
    tokenize_bodies: BodyDecoder[TokenizeBody] = field(default_factory=lambda: body_decoder(TokenizeBody, TOKENIZE))
    detokenize_bodies: BodyDecoder[DetokenizeBody] = field(
        default_factory=lambda: body_decoder(DetokenizeBody, DETOKENIZE)
    )

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        data = await read_body(request)
        token_ids, with_texts = await self.offload.run(
            len(data), lambda: self._tokenize(data), renders=b'"messages"' in data
        )
        del data
        body_is_parsed(request.scope)
        max_model_len = self.engine.info.max_model_len
        pieces = tokenized_json(token_ids, max_model_len, self.translator.tokenizer, with_texts=with_texts)
        return await pieces_response(self.offload, len(token_ids), pieces)

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        data = await read_body(request)
        token_ids = await self.offload.run(len(data), lambda: self._detokenize(data))
        del data
        body_is_parsed(request.scope)
        return await pieces_response(
            self.offload, len(token_ids), detokenized_json(token_ids, self.translator.tokenizer)
        )

    def _tokenize(self, data: bytes) -> tuple[Sequence[int], bool]:
        """Token ids, and whether their texts are asked for."""
        body = self.tokenize_bodies.decode(data)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("Give either prompt or messages.", param="prompt")
        if body.prompt is None:
            token_ids = self.translator.chat_prompt(body)
        else:
            add_special_tokens = body.add_special_tokens is not False
            token_ids = encode(self.translator.tokenizer, body.prompt, "prompt", add_special_tokens=add_special_tokens)
        return token_ids, bool(body.return_token_strs)

    def _detokenize(self, data: bytes) -> tuple[int, ...]:
        body = self.detokenize_bodies.decode(data)
        self._check_model(body.model)
        # A model may have rows beyond the tokenizer's tokens, and generate their ids; they have no text.
        num_ids = max(self.translator.tokenizer.vocab_size, self.engine.info.vocab_size)
        if body.tokens and max(body.tokens) >= num_ids:
            raise InvalidRequestError(f"tokens must be token ids in [0, {num_ids}).", param="tokens")
        return body.tokens

    def _check_model(self, model: str | None) -> None:
        if model is not None:
            self.translator.check_model(model)
