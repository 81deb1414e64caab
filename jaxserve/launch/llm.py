"""The offline API: prompts in, finished generations out, with the engine in this process.

An `LLM` owns an engine and a thread with an asyncio loop that the engine's streams run on. `generate` and `chat` hand
all prompts to that loop, which keeps the engine's slots full, and wait until every sequence has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from jaxserve.core.config import ServeConfig, load
from jaxserve.core.environment import warn_of_service_links
from jaxserve.core.errors import ConfigError, InvalidRequestError, UnavailableError
from jaxserve.core.types import NO_DEFAULTS, Request, SamplingDefaults, SamplingParams
from jaxserve.engine.api import Engine
from jaxserve.launch.batch import GenerationOutput, generate_all
from jaxserve.launch.progress import ProgressDisplay
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A prompt as text or as token ids."""

Message = Mapping[str, object]
"""A chat message with `role` and `content`."""

_Result = TypeVar("_Result")


class LLM:
    """A model to generate with in this process; a context manager.

    Args:
        model: What `jaxserve serve` takes: a preset, a Hugging Face id, a folder, a .gguf file, `random:PRESET`.
        **settings: The flags of `jaxserve serve` with underscores, as values or as text (`mesh="tensor=2"`).

    Raises:
        ConfigError: A setting is unknown or wrong.
        CheckpointError: The model cannot be loaded.
    """

    def __init__(self, model: str, **settings: object) -> None:
        config = _config(model, settings)
        # Imported here so that an LLM around any engine needs no JAX.
        from jaxserve.launch.build import build_engine, find_model
        from jaxserve.launch.platform import settle_platform

        settle_platform()
        with ProgressDisplay() as display:
            found = find_model(config, display)
            engine = build_engine(config, found, progress=display)
        self._attach(engine, found.tokenizer, found.chat_template, found.sampling_defaults, owned=found.chat_template)

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None = None,
        sampling_defaults: SamplingDefaults = NO_DEFAULTS,
    ) -> Self:
        """An LLM around an engine that exists already, which it closes with itself.

        Args:
            engine: Runs the requests.
            tokenizer: Turns prompts into tokens and tokens into text.
            chat_template: For `chat`; not closed with the LLM.
            sampling_defaults: For `default_sampling_params`.
        """
        llm = cls.__new__(cls)
        llm._attach(engine, tokenizer, chat_template, sampling_defaults, owned=None)
        return llm

    def _attach(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        sampling_defaults: SamplingDefaults,
        *,
        owned: ChatTemplate | None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._sampling_defaults = sampling_defaults
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="jaxserve-llm", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, engine, self._loop, self._thread, owned)

    def __enter__(self) -> Self:
        """The LLM itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Frees the engine, its device memory, the thread and the template's processes. Idempotent."""
        self._finalizer()

    def default_sampling_params(self) -> SamplingParams:
        """What the model's makers advise: the sampling parameters of its preset or checkpoint, else neutral ones."""
        return self._sampling_defaults.params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = True,
    ) -> list[GenerationOutput]:
        """Generates from each prompt.

        Args:
            prompts: One prompt or several; a list of integers is one prompt of token ids.
            sampling_params: For all prompts, or one for each; `default_sampling_params` if None.
            n: Sequences for each prompt.
            progress: Show a bar on a terminal, or log lines elsewhere.

        Returns:
            An output for each prompt, in order.

        Raises:
            InvalidRequestError: A prompt or its parameters can never succeed; nothing more is generated.
            EngineError: A step failed on the device.
            UnavailableError: The LLM is closed.
        """
        several = _several(prompts)
        requests = self._requests([self._encoded(prompt) for prompt in several], sampling_params, n=n)
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        return self._run(texts, requests, progress=progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> list[GenerationOutput]:
        """Generates the next message of each conversation.

        Args:
            messages: One conversation or several.
            sampling_params: For all conversations, or one for each; `default_sampling_params` if None.
            tools: JSON schemas of tools the model may call.
            continue_final_message: Continue the last message instead of beginning one.
            chat_template_kwargs: Further variables for the chat template.
            progress: Show a bar on a terminal, or log lines elsewhere.

        Returns:
            An output for each conversation, in order.

        Raises:
            InvalidRequestError: The model has no chat template, or it refuses the messages; else as `generate`.
        """
        if self.chat_template is None:
            raise InvalidRequestError("This model has no chat template; use generate with a prompt.", param="messages")
        self._require_open()
        conversations = _conversations(messages)
        texts = [
            self.chat_template.render(
                conversation,
                tools=tools,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        prompts = [tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        requests = self._requests(prompts, sampling_params)
        return self._run(texts, requests, progress=progress)

    def _requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        n: int = 1,
    ) -> list[Request]:
        each = [self._defaults_for(prompt) for prompt in prompts] if params is None else _one_each(params, len(prompts))
        return [
            Request(request_id=f"llm-{next(self._numbers)}", prompt=prompt, sampling=sampling, n=n)
            for prompt, sampling in zip(prompts, each, strict=True)
        ]

    def _defaults_for(self, prompt: tuple[int, ...]) -> SamplingParams:
        """The model's defaults; nobody asked for their max_tokens, which is bounded by what there is room for."""
        params = self.default_sampling_params()
        if params.max_tokens is None:
            return params
        return replace(params, max_tokens=max(1, min(params.max_tokens, self.engine.info.max_model_len - len(prompt))))

    def _encoded(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _run(
        self, texts: Sequence[str | None], requests: Sequence[Request], *, progress: bool
    ) -> list[GenerationOutput]:
        self._require_open()
        with ProgressDisplay(shown=progress) as display:
            return self._wait(generate_all(self.engine, self.tokenizer, texts, requests, display))

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise UnavailableError("The LLM is closed; make a new one.")

    def _wait(self, work: Coroutine[None, None, _Result]) -> _Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupt from the keyboard ends the requests too.
            future.cancel()
            raise


def _config(model: str, settings: Mapping[str, Any]) -> ServeConfig:
    names = {field.name for field in fields(ServeConfig)} - {"model"}
    if unknown := sorted(settings.keys() - names):
        raise ConfigError(f"LLM has no setting {', '.join(unknown)}; the settings are {', '.join(sorted(names))}.")
    texts = {name: value for name, value in settings.items() if isinstance(value, str)}
    config = load({"model": model, **texts})
    warn_of_service_links()
    return replace(config, **{name: value for name, value in settings.items() if name not in texts})


def _shut_down(
    engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread, template: ChatTemplate | None
) -> None:
    if template is not None:
        template.close()
    asyncio.run_coroutine_threadsafe(_close(engine), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _close(engine: Engine) -> None:
    await engine.close()
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    tokens = [prompt for prompt in prompts if isinstance(prompt, int)]
    if tokens and len(tokens) == len(prompts):
        return [tokens]
    several = [prompt for prompt in prompts if not isinstance(prompt, int)]
    if tokens:
        raise InvalidRequestError("prompts mixes token ids with prompts; wrap the ids in a list.", param="prompts")
    return several


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    single = [entry for entry in messages if isinstance(entry, Mapping)]
    several = [list(entry) for entry in messages if not isinstance(entry, Mapping)]
    if single and several:
        raise InvalidRequestError("messages mixes messages with conversations.", param="messages")
    return [single] if single else several


def _one_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"There are {count} prompts but {len(params)} sampling_params; give one for all or one for each.",
            param="sampling_params",
        )
    return list(params)
