"""Request bodies to engine requests: text to ids, names and defaults of the API to those of `core.types`.

`Translator` holds what all requests share (tokenizer, chat template, limits). A body becomes a `Generation`: the engine
requests to submit, one a prompt, and what the answer is to show. Nothing here waits or touches the network, so large
bodies can be translated in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from jaxserve.core.errors import ContextLengthError, InvalidRequestError, NotFoundError
from jaxserve.core.types import Request, SamplingParams
from jaxserve.engine.api import EngineInfo
from jaxserve.sampling.validate import MAX_BAD_WORDS, MAX_STOP_IDS
from jaxserve.server.openai.asked import check_counts, check_lengths, check_prompt_logprobs
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.conversation import content_text, render_conversation
from jaxserve.server.openai.echo import Echo, echo_of_ids, echo_of_text
from jaxserve.server.openai.encoding import encode
from jaxserve.server.openai.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    Prompt,
    StreamOptions,
    TokenizeBody,
)
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for text completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A body as engine requests, and what its answer shows.

    Attributes:
        response_id: The answer's id.
        model: The name the request called the model by.
        requests: One a prompt.
        echoes: What to put before each prompt's sequences; empty without `echo`.
        num_choices: Choices a prompt gets in the answer; fewer than the engine generates if `best_of` is larger.
        stream: Answer as server-sent events.
        include_usage: Send the usage as the last event of a stream.
        continuous_usage: Send the usage so far with every event.
        logprobs: Alternatives to show for each token; None shows no log-probabilities.
        echo_logprobs: Show those of the prompt before them.
        prompt_logprobs: Alternatives to show for each prompt token, in vLLM's form.
        return_token_ids: Show token ids.
        drop_output: Only the prompt was to be scored; what was generated is not shown.
        end_user: Whom the client says it acts for.
        prompt_cache_key: What the client expects to share prefixes with, for routing.
        metadata: What the client wants to find the request by.
    """

    response_id: str
    model: str
    requests: tuple[Request, ...]
    echoes: tuple[Echo, ...]
    num_choices: int
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    echo_logprobs: bool = False
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    drop_output: bool = False
    end_user: str | None = None
    prompt_cache_key: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class Translator:
    """Turns bodies into generations.

    Args:
        tokenizer: The model's.
        chat_template: The model's; None refuses messages.
        config: Names and limits.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None, config: AppConfig) -> None:
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        self._config = config

    def check_model(self, model: str) -> None:
        """Raises NotFoundError unless the model is served under this name."""
        if model not in self._config.served_model_names:
            served = ", ".join(self._config.served_model_names)
            raise NotFoundError(f"The model {model[:200]!r} is not served here; use one of: {served}.", param="model")

    def chat(self, body: ChatBody, info: EngineInfo, response_id: str) -> Generation:
        """The generation a chat completion asks for.

        Raises:
            InvalidRequestError: Fields contradict each other, or the template refuses the messages.
            NotFoundError: The model is not served.
        """
        self.check_model(body.model)
        if body.max_tokens == 0:
            raise InvalidRequestError("max_tokens must be at least 1.", param="max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = replace(
            self._sampling(body, info),
            max_tokens=_max_tokens(body),
            logprobs=num_logprobs,
        )
        last = body.messages[-1]
        echo = Echo(text=content_text(last)) if body.echo and last.role == "assistant" else Echo()
        check_counts(body, self._config, num_prompts=1, num_sequences=body.n or 1)
        room = _room(body, info)
        prompt = self._truncated(body, self.chat_prompt(body, room=room), sampling, info)
        if sampling.max_tokens is None and (most := self._config.sampling_defaults.max_tokens) is not None:
            # Nobody asked for so many: they are bounded by what there is room for, and by what was asked for.
            most = min(max(most, sampling.min_tokens), info.max_model_len - len(prompt))
            sampling = replace(sampling, max_tokens=max(1, most))
        return self._generation(
            body, response_id, sampling, info, prompts=[prompt], echoes=(echo,), num_sequences=body.n or 1
        )

    def completion(self, body: CompletionBody, info: EngineInfo, response_id: str) -> Generation:
        """The generation a text completion asks for.

        Raises:
            InvalidRequestError: Fields contradict each other, or there are too many prompts.
            NotFoundError: The model is not served.
        """
        self.check_model(body.model)
        num_sequences = self._num_sequences(body)
        max_tokens = _or(_max_tokens(body), DEFAULT_COMPLETION_TOKENS)
        if max_tokens == 0 and not body.echo:
            raise InvalidRequestError("max_tokens 0 needs echo; otherwise give at least 1.", param="max_tokens")
        ranks = num_sequences > (body.n or 1)
        prompt_logprobs = [k for k in (body.prompt_logprobs, body.logprobs if body.echo else None) if k is not None]
        sampling = replace(
            self._sampling(body, info),
            max_tokens=max(1, max_tokens),
            logprobs=0 if ranks and body.logprobs is None else body.logprobs,
            prompt_logprobs=max(prompt_logprobs, default=None),
        )
        check_counts(body, self._config, num_prompts=len(body.prompt), num_sequences=num_sequences)
        encoded = [self._completion_ids(body, prompt, info) for prompt in body.prompt]
        prompts = [self._truncated(body, token_ids, sampling, info) for token_ids in encoded]
        echoes = tuple(
            self._echo(body, *of_prompt) for of_prompt in zip(body.prompt, encoded, map(len, prompts), strict=True)
        )
        generation = self._generation(
            body, response_id, sampling, info, prompts=prompts, echoes=echoes, num_sequences=num_sequences
        )
        return replace(
            generation,
            logprobs=body.logprobs,
            echo_logprobs=bool(body.echo) and body.logprobs is not None,
            drop_output=max_tokens == 0,
        )

    def chat_prompt(self, body: ChatBody | TokenizeBody, *, room: int | None = None) -> list[int]:
        """Token ids of a conversation.

        Args:
            body: Has the messages.
            room: Most tokens there may be; None sets no bound.

        Raises:
            InvalidRequestError: The model has no chat template, or it refuses the messages.
            ContextLengthError: They are more tokens than there may be.
        """
        if self._chat_template is None:
            raise InvalidRequestError("The model has no chat template; use /v1/completions.", param="messages")
        text = render_conversation(
            self._chat_template,
            body.messages or (),
            body.chat_template_kwargs or {},
            add_generation_prompt=_or(body.add_generation_prompt, True),
            continue_final_message=bool(body.continue_final_message),
        )
        return self._encode(text, "messages", room, add_special_tokens=bool(body.add_special_tokens))

    def _encode(self, text: str, param: str, room: int | None, *, add_special_tokens: bool) -> list[int]:
        if room is not None and len(text) > room:
            # To refuse what is far too long at its length costs nothing; tokenising it takes seconds.
            _check_room(self.tokenizer.fewest_tokens(text), param, room, counted=False)
        token_ids = encode(self.tokenizer, text, param, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidRequestError(f"{param} is empty; give at least one token.", param=param)
        _check_room(len(token_ids), param, room)
        return token_ids

    def _completion_ids(self, body: CompletionBody, prompt: Prompt, info: EngineInfo) -> Sequence[int]:
        room = _room(body, info)
        if isinstance(prompt, str):
            return self._encode(prompt, "prompt", room, add_special_tokens=_or(body.add_special_tokens, True))
        _check_room(len(prompt), "prompt", room)
        if min(prompt) < 0 or max(prompt) >= info.vocab_size:
            raise InvalidRequestError(f"prompt must be token ids in [0, {info.vocab_size}).", param="prompt")
        return prompt

    def _echo(self, body: CompletionBody, given: Prompt, token_ids: Sequence[int], num_kept: int) -> Echo:
        skips = _or(body.skip_special_tokens, True)
        if not body.echo:
            return Echo()
        if not isinstance(given, str):
            return echo_of_ids(self.tokenizer, token_ids[-num_kept:], skip_special_tokens=skips)
        return echo_of_text(
            self.tokenizer,
            given,
            token_ids,
            num_kept=num_kept,
            add_special_tokens=_or(body.add_special_tokens, True),
            skip_special_tokens=skips,
        )

    def _num_sequences(self, body: CompletionBody) -> int:
        """How many sequences a prompt gets, by `n` or `best_of`."""
        num_choices = body.n or 1
        if body.best_of is None:
            return num_choices
        if body.best_of < num_choices:
            raise InvalidRequestError("best_of must be at least n.", param="best_of")
        if body.best_of > num_choices and body.stream:
            raise InvalidRequestError("best_of larger than n cannot be streamed.", param="best_of")
        return body.best_of

    def _truncated(
        self, body: GenerationBody, token_ids: Sequence[int], sampling: SamplingParams, info: EngineInfo
    ) -> tuple[int, ...]:
        if body.truncate_prompt_tokens is None:
            return tuple(token_ids)
        if body.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens must be at least 1, or -1 to keep what fits.", param="truncate_prompt_tokens"
            )
        num_kept = body.truncate_prompt_tokens
        if num_kept < 0:
            num_kept = max(1, info.max_model_len - (sampling.max_tokens or 1))
        return tuple(token_ids[-num_kept:])

    def _sampling(self, body: GenerationBody, info: EngineInfo) -> SamplingParams:
        """What both endpoints understand alike; lengths and log-probabilities are theirs to add."""
        defaults = self._config.sampling_defaults.params()
        return SamplingParams(
            min_tokens=body.min_tokens or 0,
            temperature=_or(body.temperature, defaults.temperature),
            top_k=max(0, _or(body.top_k, defaults.top_k)),
            top_p=_or(body.top_p, defaults.top_p),
            min_p=_or(body.min_p, defaults.min_p),
            repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=_logit_bias(body.logit_bias or {}, info),
            allowed_token_ids=_allowed(body, info),
            bad_words=self._bad_words(body.bad_words or ()),
            seed=body.seed,
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            stop_token_ids=_token_ids(body.stop_token_ids, "stop_token_ids", info, most=MAX_STOP_IDS) or (),
            ignore_eos=bool(body.ignore_eos),
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            skip_special_tokens=_or(body.skip_special_tokens, True),
            prompt_logprobs=body.prompt_logprobs,
        )

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is tokenised at the start of a text and inside one."""
        bare = [word.lstrip() for word in words]
        if not all(bare):
            raise InvalidRequestError("bad_words must not hold blank texts.", param="bad_words")
        spelled = [form for word in bare for form in (word, f" {word}")]
        found = (tuple(encode(self.tokenizer, form, "bad_words", add_special_tokens=False)) for form in spelled)
        forms = tuple(dict.fromkeys(ids for ids in found if ids))
        if len(forms) > MAX_BAD_WORDS:
            raise InvalidRequestError(
                f"bad_words: {len(words)} texts have {len(forms)} forms, with and without a space before them; there "
                f"may be {MAX_BAD_WORDS} forms at most.",
                param="bad_words",
            )
        return forms

    def _generation(
        self,
        body: ChatBody | CompletionBody,
        response_id: str,
        sampling: SamplingParams,
        info: EngineInfo,
        *,
        prompts: Sequence[tuple[int, ...]],
        echoes: tuple[Echo, ...],
        num_sequences: int,
    ) -> Generation:
        options = _stream_options(body)
        check_lengths(body, sampling, prompts, info.max_model_len)
        check_prompt_logprobs(body, prompts, num_sequences)
        requests = tuple(
            Request(
                request_id=f"{response_id}-{i}",
                prompt=prompt,
                sampling=sampling,
                n=num_sequences,
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
            )
            for i, prompt in enumerate(prompts)
        )
        return Generation(
            response_id=response_id,
            model=body.model,
            requests=requests,
            echoes=echoes,
            num_choices=body.n or 1,
            stream=bool(body.stream),
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            logprobs=sampling.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            return_token_ids=bool(body.return_token_ids),
            end_user=body.safety_identifier or body.user,
            prompt_cache_key=body.prompt_cache_key,
            metadata=body.metadata or {},
        )


def _max_tokens(body: GenerationBody) -> int | None:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ; give only max_completion_tokens.", param="max_tokens"
        )
    return _or(body.max_completion_tokens, body.max_tokens)


def _stream_options(body: GenerationBody) -> StreamOptions:
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise InvalidRequestError(
            "stream_options.include_obfuscation must be false; chunks are not padded.",
            param="stream_options.include_obfuscation",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        instead = "" if isinstance(body, ChatBody) else ", or use echo and logprobs"
        raise InvalidRequestError(
            f"prompt_logprobs cannot be streamed; leave stream out{instead}.", param="prompt_logprobs"
        )
    return body.stream_options or StreamOptions()


def _room(body: GenerationBody, info: EngineInfo) -> int | None:
    """Most tokens a prompt may have as it comes; None if it is cut to size."""
    return info.max_model_len - 1 if body.truncate_prompt_tokens is None else None


def _check_room(num_tokens: int, param: str, room: int | None, *, counted: bool = True) -> None:
    if room is not None and num_tokens > room:
        raise ContextLengthError(
            f"{param}: {num_tokens if counted else f'at least {num_tokens}'} tokens leave no room for output in the "
            f"context of {room + 1} tokens; shorten it, or set truncate_prompt_tokens.",
            param=param,
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _logit_bias(bias: Mapping[str, float], info: EngineInfo) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"logit_bias has the key {key[:40]!r}, which is not a token id in [0, {info.vocab_size}).",
                param="logit_bias",
            )
        found[token_id] = value
    return found


def _allowed(body: GenerationBody, info: EngineInfo) -> tuple[int, ...] | None:
    if body.allowed_token_ids == ():
        raise InvalidRequestError("allowed_token_ids must not be empty.", param="allowed_token_ids")
    return _token_ids(body.allowed_token_ids, "allowed_token_ids", info, most=info.vocab_size)


def _token_ids(token_ids: Sequence[int] | None, param: str, info: EngineInfo, *, most: int) -> tuple[int, ...] | None:
    if token_ids is None:
        return None
    if len(token_ids) > most:
        raise InvalidRequestError(f"{param} may hold at most {most} token ids.", param=param)
    if any(token_id >= info.vocab_size for token_id in token_ids):
        raise InvalidRequestError(f"{param} must be token ids in [0, {info.vocab_size}).", param=param)
    return tuple(dict.fromkeys(token_ids))
