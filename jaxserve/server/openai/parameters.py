"""The one table of every request parameter: applied and how, or refused and why.

`refuse_unsupported` reads it for each request, `docs/parameters.md` is generated from it (`write_docs`), and the tests
compare it with the request models, with OpenAI's own client and with what requests do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import MAX_LOGPROBS
from jaxserve.sampling.validate import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    MAX_BIAS_IDS,
    MAX_BIAS_VALUE,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_IDS,
    MIN_REPETITION_PENALTY,
)
from jaxserve.server.openai.config import (
    MAX_ALLOWED_IDS,
    MAX_N,
    MAX_PRIORITY,
    MAX_PROMPT_LOGPROBS,
    MAX_PROMPTS,
    MAX_SEQUENCES,
    MAX_STOP_SEQUENCES,
    MIN_PRIORITY,
)
from jaxserve.server.openai.decode import MAX_FREE_VALUES, json_value
from jaxserve.server.openai.faults import shown
from jaxserve.server.openai.outline import MAX_DEPTH
from jaxserve.server.openai.schema import (
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_METADATA_CHARS,
    MAX_NAME_CHARS,
    MAX_SALT_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
ENDPOINTS = (CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE)
GENERATION = (CHAT, COMPLETIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of one or more endpoints.

    Attributes:
        name: The field's name.
        endpoints: Where it may stand.
        applied: Whether it has an effect; otherwise it is refused with a 400.
        note: What it does, or why it is refused; a sentence without its full stop.
        no_op: Values of a refused parameter that ask for nothing, so they are let through; null always is one.
            Clients and routers send them unasked.
    """

    name: str
    endpoints: tuple[str, ...]
    applied: bool
    note: str
    no_op: tuple[object, ...] = ()


def _applied(name: str, endpoints: tuple[str, ...], note: str) -> Parameter:
    return Parameter(name=name, endpoints=endpoints, applied=True, note=note)


def _refused(name: str, endpoints: tuple[str, ...], note: str, *no_op: object) -> Parameter:
    return Parameter(name=name, endpoints=endpoints, applied=False, note=note, no_op=no_op)


_INPUT = (
    _applied("model", ENDPOINTS, "One of the served names; another is a 404. Required where tokens are generated"),
    _applied("messages", (CHAT, TOKENIZE), "Rendered by the model's chat template; text content only; up to "
             f"{MAX_MESSAGES:,}, and as many parts and tool calls over all of them. Of earlier answers, `reasoning` is "
             "read as reasoning_content, a `refusal` as content, arguments that are no JSON object as text; "
             "annotations and cache_control are passed over"),
    _applied(
        "prompt", (COMPLETIONS, TOKENIZE), "Text, texts, token ids or lists of token ids, up to "
        f"{MAX_PROMPTS:,} prompts; /tokenize takes one text"
    ),
    _applied("tokens", (DETOKENIZE,), "Token ids to turn into text, control tokens included"),
    _applied("add_special_tokens", (*GENERATION, TOKENIZE), "Add what the tokenizer puts around a prompt; default "
             "true for prompts and false for messages, whose template writes it"),
    _applied("add_generation_prompt", (CHAT, TOKENIZE), "End the prompt with the opening of an assistant message; "
             "default true"),
    _applied("continue_final_message", (CHAT, TOKENIZE), "Leave the last message open for the model to continue; needs "
             "add_generation_prompt false"),
    _applied("chat_template_kwargs", (CHAT, TOKENIZE), "Variables for the chat template; up to "
             f"{MAX_FREE_VALUES:,} values, {MAX_DEPTH} levels deep"),
    _applied("truncate_prompt_tokens", GENERATION, "Keep only the last k tokens of the prompt; -1: as many as fit "
             "beside max_tokens"),
    _applied("return_token_strs", (TOKENIZE,), "Also answer with each token's text"),
)  # fmt: skip

_MODELS = "the model's, else"
"""Of a parameter that a model's preset or checkpoint may have a default of."""

_SAMPLING = (
    _applied("temperature", GENERATION, f"0 is greedy; 0 to {MAX_TEMPERATURE:g}, default {_MODELS} 1"),
    _applied("top_p", GENERATION, f"In (0, 1], default {_MODELS} 1"),
    _applied("top_k", GENERATION, f"0 or -1 keeps all tokens; default {_MODELS} 0"),
    _applied("min_p", GENERATION, f"In [0, 1], default {_MODELS} 0"),
    _applied("seed", GENERATION, "The same seed, prompt and parameters give the same tokens with `--dtype float32`; in "
             "bfloat16 on CPUs a near-tie may fall the other way when matmuls have other shapes, as they do beside "
             "other requests ([ADR 3](adr/0003-bfloat16-as-bits-on-cpu.md)). Any signed 64-bit integer; -1 draws a "
             "random one, the default"),
    _applied("presence_penalty", GENERATION, f"In [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], default 0"),
    _applied("frequency_penalty", GENERATION, f"In [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], default 0"),
    _applied("repetition_penalty", GENERATION, f"In [{MIN_REPETITION_PENALTY:g}, {MAX_REPETITION_PENALTY:g}], default "
             f"{_MODELS} 1"),
    _applied("logit_bias", GENERATION, f"Token id (as a string) to a value in [-{MAX_BIAS_VALUE:g}, "
             f"{MAX_BIAS_VALUE:g}]; up to {MAX_BIAS_IDS} entries"),
    _applied("allowed_token_ids", GENERATION, "Only these tokens are sampled; their number times the sequences of a "
             f"request may be up to {MAX_ALLOWED_IDS:,}"),
    _applied("bad_words", GENERATION, "Texts that are not generated, with and without a leading space: up to "
             f"{MAX_BAD_WORDS} such forms of {MAX_BAD_WORD_LEN} tokens"),
)  # fmt: skip

_LENGTH = (
    _applied("max_tokens", GENERATION, f"Chat: default {_MODELS} until the context is full. Completions: 16 by "
             "default; 0 with echo only scores the prompt"),
    _applied("max_completion_tokens", GENERATION, "The new name of max_tokens; both may stand only if equal"),
    _applied("min_tokens", GENERATION, "No end of sequence, stop token or stop string before this many tokens"),
    _applied("stop", GENERATION, f"A text or a list of up to {MAX_STOP_STRINGS}, each of up to "
             f"{MAX_STOP_CHARS:,} characters, and up to {MAX_STOP_SEQUENCES:,} over all sequences; found across token "
             "borders"),
    _applied("stop_token_ids", GENERATION, f"Tokens that end a sequence; up to {MAX_STOP_IDS}, the model's own "
             "end-of-sequence tokens among them"),
    _applied("ignore_eos", GENERATION, "Go on past the model's end-of-sequence tokens"),
    _applied("include_stop_str_in_output", GENERATION, "Keep the stop string in the text"),
    _applied("skip_special_tokens", GENERATION, "Leave control tokens out of the text; default true"),
)  # fmt: skip

_OUTPUT = (
    _applied("n", GENERATION, f"Sequences a prompt, up to {MAX_N}; those of all prompts together, up to "
             f"{MAX_SEQUENCES:,} and to what the server runs and lets wait at once (`max_num_seqs` and `max_waiting`)"),
    _applied("best_of", (COMPLETIONS,), f"Generate this many, up to {MAX_N}, and answer with the n of highest mean "
             "log-probability; not with stream"),
    _applied("stream", GENERATION, "Answer as server-sent events"),
    _applied("stream_options", GENERATION, "include_usage, continuous_usage_stats; include_obfuscation only false"),
    _applied("echo", GENERATION, "Completions: the prompt, as the tokenizer has read it, precedes the text, and its "
             "log-probabilities theirs; `text_offset` counts characters of both. Chat: the last message precedes the "
             "content if it is the assistant's"),
    _applied("logprobs", GENERATION, "Chat: true or false. Completions: how many alternatives a token, 0 "
             f"to {MAX_LOGPROBS}"),
    _applied("top_logprobs", (CHAT,), f"Alternatives a token, 0 to {MAX_LOGPROBS}; needs logprobs"),
    _applied("prompt_logprobs", GENERATION, "The same for the prompt's tokens; not with stream. Those of an answer, "
             f"echoed ones too, may be up to {MAX_PROMPT_LOGPROBS:,}"),
    _applied("return_token_ids", GENERATION, "Puts token_ids and prompt_token_ids into each choice"),
)  # fmt: skip

_SERVICE = (
    _applied("priority", GENERATION, f"Lower runs first, and a level is worth a minute of waiting; {MIN_PRIORITY} to "
             f"{MAX_PRIORITY} unless the server (`min_priority`, `max_priority`) or the API key has other bounds; "
             "default 0"),
    _applied("cache_salt", GENERATION, "Prefix-cache pages are shared only between requests of the same salt; up to "
             f"{MAX_SALT_CHARS:,} characters. Where there are several API keys each has salts of its own "
             "(`share_prefix_cache`)"),
    _applied("user", GENERATION, f"Written to the request's log line and span; up to {MAX_NAME_CHARS} characters"),
    _applied("safety_identifier", GENERATION, "Written to the request's log line and span in place of user, and as "
             "long"),
    _applied("prompt_cache_key", GENERATION, "Kept with the request for routing; prefixes are found by content; up to "
             f"{MAX_NAME_CHARS} characters"),
    _applied("metadata", GENERATION, f"Written to the request's span; up to {MAX_METADATA} texts of up to "
             f"{MAX_METADATA_CHARS} characters"),
)  # fmt: skip

_NOT_BUILT = (
    _refused("tools", (CHAT, TOKENIZE), "Tool calls are not parsed out of the output", []),
    _refused("tool_choice", (CHAT,), "Tool calls are not parsed out of the output", "none", "auto"),
    _refused("parallel_tool_calls", (CHAT,), "Tool calls are not parsed out of the output", True, False),
    _refused("functions", (CHAT,), "Replaced by tools, which are not parsed out of the output", []),
    _refused("function_call", (CHAT,), "Replaced by tools, which are not parsed out of the output", "none"),
    _refused("response_format", GENERATION, "Output cannot be constrained to a format", {"type": "text"}),
    _refused("structured_outputs", GENERATION, "Output cannot be constrained to a grammar"),
    _refused("kv_transfer_params", GENERATION, "This server does not exchange KV pages with others"),
    _refused("suffix", (COMPLETIONS,), "The model does not fill in the middle of a text", ""),
    _refused("audio", (CHAT,), "The model does not speak"),
    _refused("modalities", (CHAT,), "The model answers with text only", ["text"]),
    _refused("prediction", (CHAT,), "Predicted output is not used to speed up generation"),
    _refused("reasoning_effort", (CHAT,), "Use chat_template_kwargs if the model's template has such a switch"),
    _refused("verbosity", (CHAT,), "The model has no such switch; ask for it in a message", "medium"),
    _refused("web_search_options", (CHAT,), "The server does not search the web"),
    _refused("moderation", (CHAT,), "The server does not moderate"),
    _refused("store", (CHAT,), "Answers are not stored", False),
    _refused("service_tier", (CHAT,), "There is one tier; use priority", "auto", "default"),
    _refused("prompt_cache_options", (CHAT,), "The prefix cache has no options a request could set"),
    _refused("prompt_cache_retention", (CHAT,), "The prefix cache keeps pages as long as memory allows", "in_memory",
             "in-memory"),
    _refused("chat_template", (CHAT, TOKENIZE), "A template is code; only the model's own is run"),
    _refused("use_beam_search", GENERATION, "Sequences are sampled; use n and best_of", False),
    _refused("length_penalty", GENERATION, "It is a parameter of beam search, which is not built", 1.0, 1),
    _refused("early_stopping", GENERATION, "It is a parameter of beam search, which is not built", False),
    _refused("spaces_between_special_tokens", GENERATION, "Text is what the tokens' bytes spell", True),
    _refused("return_tokens_as_token_ids", GENERATION, "Use return_token_ids", False),
    _refused("no_stop_trim", GENERATION, "Use include_stop_str_in_output", False),
    _refused("separate_reasoning", GENERATION, "Reasoning is not parsed out of the output", True),
    _refused("stream_reasoning", GENERATION, "Reasoning is not parsed out of the output", True),
    _refused("include_reasoning", GENERATION, "Reasoning is not parsed out of the output", True),
    _refused("return_hidden_states", GENERATION, "Hidden states do not leave the device", False),
)  # fmt: skip

PARAMETERS = (*_INPUT, *_SAMPLING, *_LENGTH, *_OUTPUT, *_SERVICE, *_NOT_BUILT)

_BY_NAME: Mapping[tuple[str, str], Parameter] = {
    (endpoint, parameter.name): parameter for parameter in PARAMETERS for endpoint in parameter.endpoints
}
_REFUSED = {key: parameter for key, parameter in _BY_NAME.items() if not parameter.applied}
_MAX_NO_OP_BYTES = 256


def refuse_unsupported(endpoint: str, name: str, field: bytes) -> None:
    """Judges a field of a body that its model does not declare.

    Args:
        endpoint: The route, such as `CHAT`.
        name: The field's.
        field: Its value as JSON, not null.

    Raises:
        InvalidRequestError: The field is unknown, or asks for something that is not built.
    """
    parameter = _REFUSED.get((endpoint, name))
    if parameter is None:
        raise InvalidRequestError(f"{shown(name)} is not a known field of {endpoint}; remove it.", param=shown(name))
    if len(field) <= _MAX_NO_OP_BYTES and parameter.no_op:
        value = json_value(field, name)
        if any(type(value) is type(no_op) and value == no_op for no_op in parameter.no_op):
            return
    raise InvalidRequestError(f"{name} is not supported. {parameter.note}.", param=name)


def markdown() -> str:
    """The page `docs/parameters.md`."""
    lines = [
        "# Request parameters",
        "",
        "Generated from `jaxserve/server/openai/parameters.py` by "
        "`python -m jaxserve.server.openai.parameters docs/parameters.md`.",
        "",
        "Every parameter is applied, or refused with a 400 that names it. A refused one is let through if it is null "
        "or has a value listed beside it. Unknown fields are refused unless they are null. `null` always means the "
        "default. `/v1/chat/completions/render` and `/v1/completions/render` take the same bodies and answer with the "
        "prompts' token ids.",
        "",
        "A model may come with defaults of its own: a preset has its model card's, a Hugging Face folder a "
        "`generation_config.json`, a GGUF file keys that begin with `general.sampling.`. `/v1/models` shows them as "
        "`default_sampling_params`; `--generation-config none` passes over them.",
    ]
    for endpoint in ENDPOINTS:
        lines += ["", f"## `POST {endpoint}`", "", "| parameter | | what it does, or why not |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in PARAMETERS if endpoint in parameter.endpoints]
    return "\n".join(lines) + "\n"


def write_docs(path: Path) -> None:
    """Writes the page."""
    path.write_text(markdown(), encoding="utf-8")


def _row(parameter: Parameter) -> str:
    allowed = ", ".join(f"`{json.dumps(value)}`" for value in parameter.no_op)
    status = "applied" if parameter.applied else "refused"
    note = f"{parameter.note}." + (f" Let through: {allowed}." if allowed else "")
    return f"| `{parameter.name}` | {status} | {note} |"


if __name__ == "__main__":
    write_docs(Path(sys.argv[1]))
