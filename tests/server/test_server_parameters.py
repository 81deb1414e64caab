"""Every parameter has an effect or is refused: the table, the models, OpenAI's client and the server agree."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat_params
from server_harness import (
    ASSISTANT,
    BOS,
    CONFIG,
    INFO,
    TEMPLATE,
    TOKENIZER,
    chat,
    client_of,
    completion,
    events_of,
    ids,
    make_app,
)

from jaxserve.core.types import SamplingParams
from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai import parameters, schema
from jaxserve.server.openai.body import body_decoder
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS, DETOKENIZE, PARAMETERS, TOKENIZE
from jaxserve.server.openai.translate import Translator
from jaxserve.text.chat import ChatTemplate

MODELS: dict[str, type[schema.Body]] = {
    CHAT: schema.ChatBody,
    COMPLETIONS: schema.CompletionBody,
    TOKENIZE: schema.TokenizeBody,
    DETOKENIZE: schema.DetokenizeBody,
}
VLLM_EXTRAS = """
    top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, min_tokens, allowed_token_ids, bad_words,
    prompt_logprobs, structured_outputs, chat_template_kwargs, priority, cache_salt, return_token_ids,
    truncate_prompt_tokens, kv_transfer_params, include_stop_str_in_output, skip_special_tokens,
    add_generation_prompt, continue_final_message, echo
"""

# Parameters that end up in SamplingParams: value sent, attribute, value expected.
SAMPLING: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.9, "top_p", 0.9),
    "top_k": (7, "top_k", 7),
    "min_p": (0.1, "min_p", 0.1),
    "seed": (42, "seed", 42),
    "presence_penalty": (1, "presence_penalty", 1.0),
    "frequency_penalty": (-1.5, "frequency_penalty", -1.5),
    "repetition_penalty": (1.2, "repetition_penalty", 1.2),
    "logit_bias": ({"7": -3, "8": 100}, "logit_bias", {7: -3.0, 8: 100.0}),
    "allowed_token_ids": ([5, 6], "allowed_token_ids", (5, 6)),
    "bad_words": (["B"], "bad_words", ((37,), (224, 37))),
    "max_tokens": (3, "max_tokens", 3),
    "min_tokens": (2, "min_tokens", 2),
    "stop": (["x", "yz"], "stop", ("x", "yz")),
    "stop_token_ids": ([9], "stop_token_ids", (9,)),
    "ignore_eos": (True, "ignore_eos", True),
    "include_stop_str_in_output": (True, "include_stop_str_in_output", True),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "prompt_logprobs": (3, "prompt_logprobs", 3),
}

Ask = Callable[..., Awaitable[Any]]


def body_for(route: str, **fields: Any) -> dict[str, Any]:
    return {CHAT: chat, COMPLETIONS: completion}[route](**fields)


@pytest.fixture
def ask(client: httpx.AsyncClient) -> Ask:
    async def ask(route: str, **fields: Any) -> Any:
        response = await client.post(route, json=body_for(route, **fields))
        assert response.status_code == 200, response.text
        return events_of(response.text) if fields.get("stream") else response.json()

    return ask


def _piece(event: Any) -> str:
    """The text of a chunk's only choice."""
    [choice] = event["choices"]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


def text(answer: Any) -> str:
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


class TestTable:
    @pytest.mark.parametrize("route", parameters.ENDPOINTS)
    def test_applied_are_the_fields_of_the_model(self, route: str) -> None:
        applied = {p.name for p in PARAMETERS if p.applied and route in p.endpoints}
        assert applied == set(MODELS[route].__struct_fields__)

    @pytest.mark.parametrize("route", parameters.ENDPOINTS)
    def test_each_is_listed_once(self, route: str) -> None:
        names = [p.name for p in PARAMETERS if route in p.endpoints]
        assert len(names) == len(set(names))

    @pytest.mark.parametrize(
        ("route", "typed_dict"),
        [
            (CHAT, chat_params.CompletionCreateParamsStreaming),
            (COMPLETIONS, completion_create_params.CompletionCreateParamsStreaming),
        ],
    )
    def test_all_of_openai_is_listed(self, route: str, typed_dict: Any) -> None:
        names = typed_dict.__required_keys__ | typed_dict.__optional_keys__
        assert names
        assert names <= {p.name for p in PARAMETERS if route in p.endpoints}

    def test_all_stream_options_are_fields(self) -> None:
        keys = chat_completion_stream_options_param.ChatCompletionStreamOptionsParam.__optional_keys__
        assert keys <= set(schema.StreamOptions.__struct_fields__)

    def test_all_of_vllm_is_listed(self) -> None:
        assert set(VLLM_EXTRAS.replace(",", " ").split()) <= {p.name for p in PARAMETERS}

    def test_docs_are_fresh(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "parameters.md"
        assert page.read_text(encoding="utf-8") == parameters.markdown()

    def test_docs_are_written_by_the_command(self, tmp_path: Path) -> None:
        page = tmp_path / "parameters.md"
        subprocess.run([sys.executable, "-m", "jaxserve.server.openai.parameters", str(page)], check=True, timeout=60)
        assert page.read_text(encoding="utf-8") == parameters.markdown()


REFUSED = [(route, p) for p in PARAMETERS if not p.applied for route in p.endpoints]


class TestRefused:
    @pytest.mark.parametrize(("route", "parameter"), REFUSED, ids=lambda value: getattr(value, "name", value))
    async def test_is_refused_by_name(
        self, client: httpx.AsyncClient, route: str, parameter: parameters.Parameter
    ) -> None:
        base = {"prompt": "A"} if route == TOKENIZE else body_for(route)
        for value in ("x", 5, {"a": 1}, ["x"]):
            response = await client.post(route, json={**base, parameter.name: value})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == parameter.name
            assert error["message"] == f"{parameter.name} is not supported. {parameter.note}."

    @pytest.mark.parametrize(("route", "parameter"), REFUSED, ids=lambda value: getattr(value, "name", value))
    async def test_asking_for_nothing_is_let_through(
        self, client: httpx.AsyncClient, route: str, parameter: parameters.Parameter
    ) -> None:
        base = {"prompt": "A"} if route == TOKENIZE else body_for(route)
        for value in (None, *parameter.no_op):
            response = await client.post(route, json={**base, parameter.name: value})
            assert response.status_code == 200, response.text

    async def test_numbers_are_no_booleans(self, client: httpx.AsyncClient) -> None:
        for name, value in (("store", 0), ("parallel_tool_calls", 1), ("use_beam_search", 0), ("include_reasoning", 1)):
            response = await client.post(CHAT, json=chat(**{name: value}))
            assert response.json()["error"]["param"] == name

    async def test_obfuscation_only_off(self, client: httpx.AsyncClient, ask: Ask) -> None:
        await ask(CHAT, stream=True, stream_options={"include_obfuscation": False})
        response = await client.post(CHAT, json=chat(stream=True, stream_options={"include_obfuscation": True}))
        assert response.json()["error"]["param"] == "stream_options.include_obfuscation"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
class TestSampling:
    @pytest.mark.parametrize("name", SAMPLING)
    async def test_is_applied(self, ask: Ask, engine: FakeEngine, route: str, name: str) -> None:
        value, attribute, expected = SAMPLING[name]
        await ask(route)
        before = engine.submitted[-1].sampling
        await ask(route, **{name: value})
        after = engine.submitted[-1].sampling
        assert getattr(after, attribute) == expected
        assert getattr(before, attribute) != expected

    @pytest.mark.parametrize("name", sorted(SAMPLING.keys() - {"max_tokens"}))
    async def test_null_is_the_default(self, ask: Ask, engine: FakeEngine, route: str, name: str) -> None:
        await ask(route, **{name: None})
        assert engine.submitted[-1].sampling == SamplingParams(max_tokens=4)

    async def test_all_fields_of_sampling_are_reached(self, route: str) -> None:
        reached = {attribute for _, attribute, _ in SAMPLING.values()}
        assert set(SamplingParams.__dataclass_fields__) - reached == {"logprobs"}

    async def test_max_tokens_default(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        await ask(route, max_tokens=None)
        assert engine.submitted[-1].sampling.max_tokens == {CHAT: None, COMPLETIONS: 16}[route]

    @pytest.mark.parametrize("value", [0, -1])
    async def test_top_k_off(self, ask: Ask, engine: FakeEngine, route: str, value: int) -> None:
        await ask(route, top_k=value)
        assert engine.submitted[-1].sampling.top_k == 0

    async def test_single_stop(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        await ask(route, stop="x")
        assert engine.submitted[-1].sampling.stop == ("x",)

    async def test_n(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        answer = await ask(route, n=3)
        assert engine.submitted[-1].n == 3
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]

    async def test_priority(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        await ask(route)
        assert engine.submitted[-1].priority == 0
        await ask(route, priority=-3)
        assert engine.submitted[-1].priority == -3

    async def test_cache_salt(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        await ask(route)
        assert engine.submitted[-1].cache_salt == ""
        await ask(route, cache_salt="pepper")
        assert engine.submitted[-1].cache_salt == "pepper"

    async def test_truncate_prompt_tokens(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        await ask(route)
        whole = engine.submitted[-1].prompt
        await ask(route, truncate_prompt_tokens=2)
        assert engine.submitted[-1].prompt == whole[-2:]
        await ask(route, truncate_prompt_tokens=1000)
        assert engine.submitted[-1].prompt == whole

    async def test_truncate_to_what_fits(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        long = {CHAT: {"content": "x" * 1000}, COMPLETIONS: {"prompt": "x" * 1000}}[route]
        await ask(route, truncate_prompt_tokens=-1, max_tokens=6, **long)
        assert len(engine.submitted[-1].prompt) == INFO.max_model_len - 6

    async def test_user_is_logged(self, ask: Ask, caplog: pytest.LogCaptureFixture, route: str) -> None:
        caplog.set_level("INFO")
        await ask(route)
        assert logged_users(caplog) == []
        await ask(route, user="ann")
        assert logged_users(caplog) == ["ann"]

    async def test_model_names_the_answer(self, ask: Ask, route: str) -> None:
        assert (await ask(route, model="alias"))["model"] == "alias"

    async def test_stream(self, ask: Ask, route: str) -> None:
        assert len(await ask(route, stream=True)) >= 4

    async def test_stream_options(self, ask: Ask, route: str) -> None:
        plain = await ask(route, stream=True)
        assert not any("usage" in event for event in plain)
        *chunks, last = await ask(route, stream=True, stream_options={"include_usage": True})
        assert all(event["usage"] is None for event in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
        continuous = await ask(route, stream=True, stream_options={"continuous_usage_stats": True})
        told = [(_piece(event), event["usage"]["completion_tokens"]) for event in continuous]
        expected = [("B", 1), ("C", 2), ("D", 3), ("E", 4), ("", 4)]
        assert told == (
            expected if route == COMPLETIONS else [("", 0), ("!", 1), ('"', 2), ("#", 3), ("$", 4), ("", 4)]
        )

    async def test_return_token_ids(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        assert "token_ids" not in (await ask(route))["choices"][0]
        answer = await ask(route, return_token_ids=True)
        choice = answer["choices"][0]
        assert choice["prompt_token_ids"] == list(engine.submitted[-1].prompt)
        assert choice["token_ids"] == [(choice["prompt_token_ids"][-1] + i) for i in range(1, 5)]
        if route == CHAT:
            assert answer["prompt_token_ids"] == choice["prompt_token_ids"]
        chunks = [c for event in await ask(route, return_token_ids=True, stream=True) for c in event["choices"]]
        assert [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c] == [choice["prompt_token_ids"]]
        assert [token_id for c in chunks for token_id in c.get("token_ids", [])] == choice["token_ids"]

    async def test_logprobs(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        assert (await ask(route))["choices"][0]["logprobs"] is None
        assert engine.submitted[-1].sampling.logprobs is None
        answer = await ask(route, logprobs={CHAT: True, COMPLETIONS: 0}[route])
        assert answer["choices"][0]["logprobs"] is not None
        assert engine.submitted[-1].sampling.logprobs == 0

    async def test_prompt_logprobs(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        answer = await ask(route, prompt_logprobs=1)
        (first, *rest), prompt = answer["choices"][0]["prompt_logprobs"], engine.submitted[-1].prompt
        assert first is None
        assert len(rest) == len(prompt) - 1
        for token_id, entry in zip(prompt[1:], rest, strict=True):
            assert entry[str(token_id)]["decoded_token"] == TOKENIZER.token_text(token_id)
            assert {value["rank"] for value in entry.values()} >= {1}
        if route == CHAT:
            assert answer["prompt_logprobs"] == answer["choices"][0]["prompt_logprobs"]

    async def test_add_special_tokens(self, ask: Ask, engine: FakeEngine, route: str) -> None:
        await ask(route, add_special_tokens=True)
        assert engine.submitted[-1].prompt[0] == BOS
        await ask(route, add_special_tokens=False)
        assert engine.submitted[-1].prompt[0] != BOS
        await ask(route)
        assert (engine.submitted[-1].prompt[0] == BOS) is (route == COMPLETIONS)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_prompt_cache_key_is_kept(route: str) -> None:
    translator = Translator(TOKENIZER, ChatTemplate(TEMPLATE, TOKENIZER.special_tokens), CONFIG)
    for fields, kept in (({}, None), ({"prompt_cache_key": "session"}, "session")):
        data = json.dumps(body_for(route, **fields)).encode()
        if route == CHAT:
            generation = translator.chat(body_decoder(schema.ChatBody, route).decode(data), INFO, "id")
        else:
            generation = translator.completion(body_decoder(schema.CompletionBody, route).decode(data), INFO, "id")
        assert generation.prompt_cache_key == kept


def logged_users(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.__dict__["end_user"] for record in caplog.records if "end_user" in record.__dict__]


class TestChat:
    async def test_safety_identifier_is_logged(self, ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        await ask(CHAT, user="ann", safety_identifier="bob")
        assert logged_users(caplog) == ["bob"]

    async def test_messages(self, ask: Ask, engine: FakeEngine) -> None:
        await ask(CHAT, content="Hi")
        assert engine.submitted[-1].prompt == (2, *ids("Hi"), ASSISTANT)

    async def test_max_completion_tokens(self, ask: Ask, engine: FakeEngine) -> None:
        await ask(CHAT, max_tokens=None, max_completion_tokens=2)
        assert engine.submitted[-1].sampling.max_tokens == 2
        await ask(CHAT, max_tokens=2, max_completion_tokens=2)
        assert engine.submitted[-1].sampling.max_tokens == 2

    async def test_top_logprobs(self, ask: Ask, engine: FakeEngine) -> None:
        answer = await ask(CHAT, logprobs=True, top_logprobs=3)
        assert engine.submitted[-1].sampling.logprobs == 3
        assert all(len(entry["top_logprobs"]) == 3 for entry in answer["choices"][0]["logprobs"]["content"])
        await ask(CHAT, logprobs=False, top_logprobs=0)
        assert engine.submitted[-1].sampling.logprobs is None

    async def test_add_generation_prompt(self, ask: Ask, engine: FakeEngine) -> None:
        await ask(CHAT, add_generation_prompt=False)
        assert engine.submitted[-1].prompt == (2, *ids("A"))

    async def test_continue_final_message(self, ask: Ask, engine: FakeEngine) -> None:
        messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        answer = await ask(CHAT, messages=messages, continue_final_message=True, add_generation_prompt=False)
        assert engine.submitted[-1].prompt == (2, *ids("A"), ASSISTANT, *ids("B"))
        assert text(answer) == "CDEF"

    async def test_echo(self, ask: Ask) -> None:
        messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
        assert text(await ask(CHAT, **fields)) == "BCDEF"
        streamed = await ask(CHAT, stream=True, **fields)
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == "BCDEF"

    async def test_chat_template_kwargs(self, ask: Ask, engine: FakeEngine) -> None:
        await ask(CHAT, chat_template_kwargs={"shout": True})
        assert engine.submitted[-1].prompt == (2, *ids("A!!"), ASSISTANT)


class TestCompletions:
    async def test_prompt(self, ask: Ask, engine: FakeEngine) -> None:
        await ask(COMPLETIONS, prompt="Hi")
        assert engine.submitted[-1].prompt == (BOS, *ids("Hi"))

    async def test_best_of(self, ask: Ask, engine: FakeEngine) -> None:
        answer = await ask(COMPLETIONS, n=2, best_of=5)
        assert engine.submitted[-1].n == 5
        assert len(answer["choices"]) == 2
        assert answer["choices"][0]["logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 5 * 4

    async def test_echo(self, ask: Ask) -> None:
        assert text(await ask(COMPLETIONS, echo=True)) == "ABCDE"
        assert text(await ask(COMPLETIONS, echo=False)) == "BCDE"

    async def test_continuous_usage_counts_no_echo(self, ask: Ask) -> None:
        options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
        told = await ask(COMPLETIONS, echo=True, logprobs=0, **options)
        assert [(_piece(event), event["usage"]["completion_tokens"]) for event in told][:2] == [("A", 0), ("B", 1)]
        told = await ask(COMPLETIONS, echo=True, logprobs=0, max_tokens=0, **options)
        assert [(_piece(event), event["usage"]["completion_tokens"]) for event in told] == [("A", 0), ("", 0)]

    async def test_logprobs(self, ask: Ask) -> None:
        answer = await ask(COMPLETIONS, logprobs=2)
        assert answer["choices"][0]["logprobs"]["top_logprobs"][0] == {"B": -1.0, "C": -2.0}


class TestTokens:
    async def post(self, client: httpx.AsyncClient, route: str, **body: Any) -> Any:
        response = await client.post(route, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def test_prompt(self, client: httpx.AsyncClient) -> None:
        answer = await self.post(client, TOKENIZE, prompt="AB", model="fake")
        assert answer == {"count": 3, "max_model_len": 256, "tokens": [BOS, *ids("AB")], "token_strs": None}

    async def test_empty_prompt(self, client: httpx.AsyncClient) -> None:
        assert (await self.post(client, TOKENIZE, prompt="", add_special_tokens=False))["tokens"] == []

    async def test_add_special_tokens(self, client: httpx.AsyncClient) -> None:
        assert (await self.post(client, TOKENIZE, prompt="A", add_special_tokens=False))["tokens"] == ids("A")

    async def test_return_token_strs(self, client: httpx.AsyncClient) -> None:
        assert (await self.post(client, TOKENIZE, prompt="AB", return_token_strs=True))["token_strs"] == [
            "<s>", "A", "B",
        ]  # fmt: skip

    async def test_messages(self, client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": "A"}]
        whole = [2, *ids("A"), ASSISTANT]
        assert (await self.post(client, TOKENIZE, messages=messages))["tokens"] == whole
        for fields, tokens in (
            ({"add_generation_prompt": False}, whole[:-1]),
            ({"chat_template_kwargs": {"shout": True}}, [2, *ids("A!!"), ASSISTANT]),
            ({"add_special_tokens": True}, [BOS, *whole]),
            ({"continue_final_message": True, "add_generation_prompt": False}, whole[:-1]),
        ):
            assert (await self.post(client, TOKENIZE, messages=messages, **fields))["tokens"] == tokens

    async def test_detokenize(self, client: httpx.AsyncClient) -> None:
        answer = await self.post(client, DETOKENIZE, tokens=[BOS, *ids("Aß")], model="alias")
        assert answer == {"prompt": "<s>Aß"}
        assert await self.post(client, DETOKENIZE, tokens=[]) == {"prompt": ""}

    async def test_ids_that_a_model_has_beyond_its_tokenizer(self) -> None:
        info = dataclasses.replace(INFO, vocab_size=INFO.vocab_size + 64)
        async with client_of(make_app(FakeEngine(info))) as client:
            tokens = [*ids("A"), INFO.vocab_size, info.vocab_size - 1, *ids("B")]
            assert await self.post(client, DETOKENIZE, tokens=tokens) == {"prompt": "AB"}
            response = await client.post(DETOKENIZE, json={"tokens": [info.vocab_size]})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")
