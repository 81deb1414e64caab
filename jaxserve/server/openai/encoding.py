"""Text of a request to token ids, with errors that name the field it came from."""

from __future__ import annotations

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: The model's.
        text: The text.
        param: The field it is from, which an error names.
        add_special_tokens: Add what the model expects around a prompt.

    Raises:
        InvalidRequestError: The text cannot be tokenised.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{param}: {error.message}", param=param) from error
