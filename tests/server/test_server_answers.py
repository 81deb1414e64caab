"""Answers of both endpoints, whole and streamed, worked out by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion
from server_harness import (
    ASSISTANT,
    BOS,
    CHAT,
    COMPLETIONS,
    CONFIG,
    EOS,
    INFO,
    TOKENIZER,
    chat,
    client_of,
    completion,
    events_of,
    ids,
    make_app,
    make_engine,
)  # fmt: skip

from jaxserve.core.errors import QueueFullError
from jaxserve.core.types import Request, SamplingParams, TokenEvent, TokenLogprobs
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.fake import FakeBehaviour, FakeEngine
from jaxserve.server.openai.app import create_app
from jaxserve.text.chat import ChatTemplate


async def post(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> Any:
    response = await client.post(route, json=body)
    assert response.status_code == 200, response.text
    return events_of(response.text) if body.get("stream") else response.json()


def joined(events: list[Any], number: int = 0) -> str:
    """The text a stream sent for one choice."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == number]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


class TestChat:
    async def test_whole(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, CHAT, chat())
        assert answer.pop("id").startswith("chatcmpl-")
        assert answer.pop("created") > 1.7e9
        assert answer == {
            "object": "chat.completion",
            "model": "fake",
            "system_fingerprint": "jaxserve-1.2.3",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": '!"#$', "refusal": None},
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    async def test_stream(self, client: httpx.AsyncClient) -> None:
        events = await post(client, CHAT, chat(stream=True))
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        assert len({event["id"] for event in events}) == 1
        choices = [event["choices"][0] for event in events]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["delta"] for choice in choices[1:-1]] == [{"content": piece} for piece in '!"#$']
        assert choices[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]

    async def test_stream_of_token_ids(self, client: httpx.AsyncClient) -> None:
        """The prompt's stand at the top of the first chunk, as at the top of a whole answer."""
        body = chat(n=2, return_token_ids=True)
        whole = await post(client, CHAT, body)
        first, *others = await post(client, CHAT, {**body, "stream": True})
        assert first["prompt_token_ids"] == whole["prompt_token_ids"] == [2, *ids("A"), ASSISTANT]
        assert not any("prompt_token_ids" in event for event in others)
        for number in range(2):
            choices = [c for event in (first, *others) for c in event["choices"] if c["index"] == number]
            assert choices[0]["prompt_token_ids"] == whole["choices"][number]["prompt_token_ids"]
            assert [i for c in choices for i in c.get("token_ids", ())] == whole["choices"][number]["token_ids"]

    async def test_stream_headers(self, client: httpx.AsyncClient) -> None:
        response = await client.post(CHAT, json=chat(stream=True))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-request-id"]
        assert "content-length" not in response.headers

    async def test_parts_are_joined_by_lines(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        await post(client, CHAT, chat([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]))
        assert engine.submitted[-1].prompt == (2, *ids("A\nB"), ASSISTANT)

    @pytest.mark.parametrize("role", ["system", "developer", "tool", "assistant"])
    async def test_roles_reach_the_template(self, client: httpx.AsyncClient, engine: FakeEngine, role: str) -> None:
        message = {"role": role, "content": "x"} | ({"tool_call_id": "1"} if role == "tool" else {})
        await post(client, CHAT, chat(messages=[message]))
        assert TOKENIZER.decode(engine.submitted[-1].prompt, skip_special_tokens=False).startswith(f"<|{role}|>x")

    async def test_lm_eval_adds_a_type_to_messages(self, client: httpx.AsyncClient) -> None:
        await post(client, CHAT, chat(messages=[{"role": "user", "content": "A", "type": "text"}]))

    async def test_answers_can_be_sent_back(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        answer = ChatCompletion.model_validate(await post(client, CHAT, chat()))
        history = [{"role": "user", "content": "A"}, answer.choices[0].message.model_dump()]
        await post(client, CHAT, chat(messages=history))
        assert engine.submitted[-1].prompt == (2, *ids("A"), ASSISTANT, *ids('!"#$'), ASSISTANT)

    async def test_tool_calls_of_the_history_reach_the_template(self, engine: FakeEngine) -> None:
        template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.city }}", {})
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "A"}'}}
        async with client_of(create_app(engine, TOKENIZER, template, CONFIG)) as client:
            body = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
            assert (await post(client, CHAT, body))["choices"][0]["message"]["content"] == "BCDE"

    async def test_logprobs(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, CHAT, chat(logprobs=True, top_logprobs=2, max_tokens=1))
        bang = {"token": "!", "logprob": -1.0, "bytes": [33]}
        quote = {"token": '"', "logprob": -2.0, "bytes": [34]}
        expected = [{**bang, "top_logprobs": [bang, quote]}]
        assert answer["choices"][0]["logprobs"] == {"content": expected, "refusal": None}

    async def test_streamed_logprobs_are_the_same(self, client: httpx.AsyncClient) -> None:
        body = chat(logprobs=True, top_logprobs=2)
        whole = await post(client, CHAT, body)
        events = await post(client, CHAT, {**body, "stream": True})
        entries = [
            entry for event in events for c in event["choices"] if c["logprobs"] for entry in c["logprobs"]["content"]
        ]
        assert entries == whole["choices"][0]["logprobs"]["content"]


class TestCompletions:
    async def test_whole(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, COMPLETIONS, completion())
        assert answer.pop("id").startswith("cmpl-")
        del answer["created"]
        assert answer["object"] == "text_completion"
        assert answer["choices"] == [
            {"index": 0, "text": "BCDE", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ]

    @pytest.mark.parametrize(
        ("prompt", "texts"),
        [
            ("A", ["BCDE"]),
            (["A", "F"], ["BCDE", "GHIJ"]),
            (ids("A"), ["BCDE"]),
            ([ids("A"), ids("F"), ids("a")], ["BCDE", "GHIJ", "bcde"]),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_forms_of_prompts(
        self, client: httpx.AsyncClient, prompt: Any, texts: list[str], stream: bool
    ) -> None:
        answer = await post(client, COMPLETIONS, completion(prompt, stream=stream))
        if stream:
            assert [joined(answer, number) for number in range(len(texts))] == texts
        else:
            assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(texts))

    @pytest.mark.parametrize("stream", [False, True])
    async def test_n_of_several_prompts(self, client: httpx.AsyncClient, stream: bool) -> None:
        body = completion(["A", "F"], n=2, stream=stream)
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = await post(client, COMPLETIONS, body)
        usage = answer[-1]["usage"] if stream else answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 16)
        texts = [joined(answer, number) for number in range(4)] if stream else [c["text"] for c in answer["choices"]]
        assert texts == ["BCDE", "BCDE", "GHIJ", "GHIJ"]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_stop_string(self, client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
        body = completion(stop=["zz", "DE"], max_tokens=50, stream=stream)
        answer = await post(client, COMPLETIONS, body)
        choice = (answer[-1] if stream else answer)["choices"][0]
        assert (joined(answer) if stream else choice["text"]) == "BC"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "DE")
        assert engine.stats().num_running == 0

    async def test_stop_token(self, client: httpx.AsyncClient) -> None:
        (stop,) = ids("D")
        answer = await post(client, COMPLETIONS, completion(stop_token_ids=[stop]))
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("BC", "stop", stop)

    async def test_eos(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, COMPLETIONS, completion([INFO.vocab_size - 1], max_tokens=9))
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
        answer = await post(
            client, COMPLETIONS, completion([[EOS]], max_tokens=3, ignore_eos=True, skip_special_tokens=False)
        )
        assert answer["choices"][0]["text"] == "<|user|><|assistant|>!"

    async def test_logprobs_with_echo(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, COMPLETIONS, completion("AC", echo=True, logprobs=1, max_tokens=2))
        choice = answer["choices"][0]
        assert choice["text"] == "ACDE"
        assert choice["logprobs"] == {
            "tokens": ["<s>", "A", "C", "D", "E"],
            "token_logprobs": [None, -36.0, -2.0, -1.0, -1.0],
            "top_logprobs": [None, {"</s>": -1.0, "A": -36.0}, {"B": -1.0, "C": -2.0}, {"D": -1.0}, {"E": -1.0}],
            "text_offset": [0, 0, 1, 2, 3],
        }

    @pytest.mark.parametrize("stream", [False, True])
    async def test_lm_eval_loglikelihood(self, client: httpx.AsyncClient, stream: bool) -> None:
        prompt = [ids("AB"), ids("BD")]
        body = completion(prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234, stream=stream)
        answer = await post(client, COMPLETIONS, body)
        if stream:
            chosen = [[c for event in answer for c in event["choices"] if c["index"] == i] for i in range(2)]
            parts = [[c["logprobs"] for c in choices if c["finish_reason"] is None] for choices in chosen]
            logprobs = [{key: [v for p in part for v in p[key]] for key in part[0]} for part in parts]
        else:
            logprobs = [choice["logprobs"] for choice in answer["choices"]]
        assert logprobs[0]["token_logprobs"] == [None, -1.0, -1.0]
        assert logprobs[0]["tokens"] == ["A", "B", "C"]
        assert logprobs[1]["token_logprobs"][:-1] == [None, -2.0]
        # lm-eval takes a continuation as greedy if each token is the likeliest of top_logprobs.
        assert max(logprobs[0]["top_logprobs"][1], key=logprobs[0]["top_logprobs"][1].get) == "B"
        assert max(logprobs[1]["top_logprobs"][1], key=logprobs[1]["top_logprobs"][1].get) == "C"

    @pytest.mark.parametrize("stream", [False, True])
    async def test_scoring_only(self, client: httpx.AsyncClient, stream: bool) -> None:
        body = completion([ids("AB")], echo=True, logprobs=0, max_tokens=0, stream=stream, n=1)
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = await post(client, COMPLETIONS, body)
        if stream:
            assert joined(answer) == "AB"
            usage, finish = answer[-1]["usage"], answer[-2]["choices"][0]["finish_reason"]
        else:
            (choice,) = answer["choices"]
            assert choice["text"] == "AB"
            assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
            usage, finish = answer["usage"], choice["finish_reason"]
        assert usage["completion_tokens"] == 0
        assert finish == "length"

    async def test_echo_of_token_ids(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, COMPLETIONS, completion([BOS, *ids("A")], echo=True))
        assert answer["choices"][0]["text"] == "ABCDE"
        body = completion([BOS, *ids("A")], echo=True, skip_special_tokens=False)
        assert (await post(client, COMPLETIONS, body))["choices"][0]["text"] == "<s>ABCDE"

    async def test_echo_of_a_truncated_prompt(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, COMPLETIONS, completion("XYA", echo=True, truncate_prompt_tokens=1))
        assert answer["choices"][0]["text"] == "ABCDE"

    async def test_split_characters(self) -> None:
        start, (head, tail) = ids("A")[0], ids("ß")
        engine = FakeEngine(INFO, next_token=lambda context: {start: head, head: tail}.get(context[-1], start))
        async with client_of(make_app(engine)) as client:
            answer = await post(client, COMPLETIONS, completion(max_tokens=3, logprobs=1))
            events = await post(client, COMPLETIONS, completion(max_tokens=3, stream=True))
        choice = answer["choices"][0]
        assert choice["text"] == joined(events) == "ßA"
        assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\x9f", "A"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1]
        assert choice["logprobs"]["top_logprobs"][0] == {"bytes:\\xc3": -1.0}
        assert [event["choices"][0]["text"] for event in events] == ["ß", "A", ""]

    async def test_minus_infinity_is_a_number(self) -> None:
        engine = GradedEngine(INFO, grades=(float("-inf"),))
        async with client_of(make_app(engine)) as client:
            answer = await post(client, COMPLETIONS, completion(logprobs=0, max_tokens=1))
            chat_answer = await post(client, CHAT, chat(logprobs=True, max_tokens=1))
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
        assert chat_answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0

    async def test_best_of_shows_the_most_likely(self) -> None:
        engine = GradedEngine(INFO, grades=(-3.0, -1.0, -2.0))
        async with client_of(make_app(engine)) as client:
            answer = await post(client, COMPLETIONS, completion(n=2, best_of=3))
        assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "YYYY"), (1, "ZZZZ")]
        assert answer["usage"]["completion_tokens"] == 12


class GradedEngine(FakeEngine):
    """Says X, Y or Z for a request's first, second and third sequence, with the given log-probabilities."""

    def __init__(self, info: EngineInfo, *, grades: tuple[float, ...]) -> None:
        super().__init__(info)
        self.grades = grades

    async def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        async for event in super().stream(request):
            token_id, grade = ids("XYZ")[event.index], self.grades[event.index]
            entry = TokenLogprobs(token_id=token_id, logprob=grade, rank=1)
            yield replace(event, token_ids=(token_id,), logprobs=(entry,))


class TestErrors:
    async def test_engine_error(self) -> None:
        engine = make_engine(error_after_tokens=2)
        async with client_of(make_app(engine)) as client:
            response = await client.post(CHAT, json=chat())
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
            *chunks, error = await post(client, CHAT, chat(stream=True))
            assert joined(chunks) == '!"'
            assert error == response.json()

    async def test_queue_full(self) -> None:
        behaviour = FakeBehaviour(max_num_waiting=2, step_delay_s=0.05)
        engine = FakeEngine(replace(INFO, max_num_seqs=1), behaviour=behaviour)
        async with client_of(make_app(engine)) as client:
            sampling = SamplingParams(ignore_eos=True)
            engine.stream(Request(request_id="other", prompt=(5,), sampling=sampling))
            for stream in (False, True):
                response = await client.post(CHAT, json=chat(n=3, stream=stream))
                assert response.status_code == 429
                assert response.headers["retry-after"] == "1"
                assert response.json()["error"]["type"] == "rate_limit_error"
            response = await client.post(COMPLETIONS, json=completion(["A", "B", "C"]))
            assert response.status_code == 429
            assert engine.stats().num_waiting + engine.stats().num_running == 1
            await post(client, CHAT, chat(n=2))

    @pytest.mark.parametrize(
        ("route", "body", "param"),
        [
            (CHAT, chat(n=4), "n"),
            (COMPLETIONS, completion(n=4), "n"),
            (COMPLETIONS, completion(best_of=4), "best_of"),
            (COMPLETIONS, completion(["A", "B", "C", "D"]), "prompt"),
            (COMPLETIONS, completion(["A", "B"], n=2), "prompt"),
        ],
    )
    async def test_more_sequences_than_the_server_ever_holds(self, route: str, body: Any, param: str) -> None:
        """To come back later would not help, so it is no 429; the server is idle."""
        engine = FakeEngine(replace(INFO, max_num_seqs=1), behaviour=FakeBehaviour(max_num_waiting=2))
        async with client_of(make_app(engine)) as client:
            response = await client.post(route, json=body)
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == param
            assert param in error["message"]
            assert "3" in error["message"]
            assert engine.stats().num_waiting + engine.stats().num_running == 0
            await post(client, COMPLETIONS, completion(["A", "B", "C"]))

    async def test_queue_full_for_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(request: object) -> None:
            raise QueueFullError("The queue is full; try again later.", retry_after_s=17)

        engine = make_engine()
        monkeypatch.setattr(engine, "stream", refuse)
        async with client_of(make_app(engine)) as client:
            response = await client.post(CHAT, json=chat())
            assert (response.status_code, response.headers["retry-after"]) == (429, "17")

    async def test_dead_engine(self) -> None:
        engine = make_engine()
        engine.kill("The device is gone.")
        async with client_of(make_app(engine)) as client:
            response = await client.post(CHAT, json=chat())
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "The device is gone."

    async def test_bug_in_the_engine(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(FakeEngine):
            def stream(self, request: Any) -> Any:
                raise ZeroDivisionError("secret")

        async with client_of(make_app(Broken(INFO))) as client:
            response = await client.post(CHAT, json=chat())
        assert response.status_code == 500
        assert response.headers["x-request-id"]
        assert "secret" not in response.text
        assert "secret" in caplog.text

    async def test_bug_in_a_stream(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(FakeEngine):
            async def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
                async for event in super().stream(request):
                    yield event
                    raise ZeroDivisionError("secret")

        for prompt in ("A", ["A", "B"]):
            async with client_of(make_app(Broken(INFO))) as client:
                *_, error = await post(client, COMPLETIONS, completion(prompt, stream=True))
            assert error["error"]["type"] == "server_error"
            assert "secret" not in str(error)
        assert "secret" in caplog.text

    async def test_cached_tokens(self) -> None:
        engine = make_engine(num_cached_tokens=2)
        async with client_of(make_app(engine)) as client:
            answer = await post(client, COMPLETIONS, completion(["ABCD", "EFGH"], n=2))
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
