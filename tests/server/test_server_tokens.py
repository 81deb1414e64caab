"""Answers made of tokens: render, tokenize, detokenize, in one piece and in many, the same text either way."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import (
    ASSISTANT,
    BOS,
    CHAT,
    COMPLETIONS,
    CONFIG,
    TOKENIZER,
    USER,
    chat,
    client_of,
    completion,
    ids,
    make_app,
    make_engine,
)

from jaxserve.core.errors import QueueFullError
from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai import offload, token_answers
from jaxserve.server.openai import offload as offload_module
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.offload import Offload
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import BackendTokenizer

VOCABULARIES = json.loads(
    (Path(__file__).parents[1] / "text" / "data" / "vocabularies.json").read_text(encoding="utf-8")
)


async def post(client: httpx.AsyncClient, route: str, body: Any) -> Any:
    response = await client.post(route, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


@pytest.mark.parametrize("piece_tokens", [1, 2, 8192])
class TestRender:
    @pytest.fixture(autouse=True)
    def _pieces(self, monkeypatch: pytest.MonkeyPatch, piece_tokens: int) -> None:
        monkeypatch.setattr(token_answers, "PIECE_TOKENS", piece_tokens)

    async def test_chat(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        rendered = await post(client, f"{CHAT}/render", chat("Hi", stream=True))
        assert rendered == {"token_ids": [USER, *ids("Hi"), ASSISTANT]}
        assert not engine.submitted
        await post(client, CHAT, chat("Hi"))
        assert list(engine.submitted[-1].prompt) == rendered["token_ids"]

    async def test_completion(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        assert await post(client, f"{COMPLETIONS}/render", completion("Hi")) == [{"token_ids": [BOS, *ids("Hi")]}]
        prompts = [[5, 6], [7]]
        rendered = await post(client, f"{COMPLETIONS}/render", completion(prompts, n=2))
        assert rendered == [{"token_ids": [5, 6]}, {"token_ids": [7]}]
        assert not engine.submitted

    async def test_truncation_counts(self, client: httpx.AsyncClient) -> None:
        body = completion("Hello", truncate_prompt_tokens=2)
        assert await post(client, f"{COMPLETIONS}/render", body) == [{"token_ids": ids("lo")}]

    async def test_what_would_be_refused_is_refused(self, client: httpx.AsyncClient) -> None:
        for body, status in ((chat(n=0), 400), (chat("x" * 300), 400), (chat(model="x"), 404), (chat(zzz=1), 400)):
            assert (await client.post(f"{CHAT}/render", json=body)).status_code == status

    async def test_tokenize(self, client: httpx.AsyncClient) -> None:
        answer = await post(client, "/tokenize", {"prompt": 'A\u00df\n"', "return_token_strs": True})
        tokens = [BOS, *ids('A\u00df\n"')]
        texts = [TOKENIZER.token_text(token_id) for token_id in tokens]
        assert answer == {"count": 6, "max_model_len": 256, "tokens": tokens, "token_strs": texts}
        assert (await post(client, "/tokenize", {"prompt": "AB"}))["token_strs"] is None
        empty = await post(client, "/tokenize", {"prompt": "", "add_special_tokens": False, "return_token_strs": True})
        assert (empty["tokens"], empty["token_strs"]) == ([], [])

    @pytest.mark.parametrize("vocabulary", ["byte_level", "sentence_piece"])
    async def test_detokenize_is_a_whole_decode(self, vocabulary: str) -> None:
        """Characters over the borders of pieces, and the spaces that SentencePiece drops at the start of a text."""
        model = {"byte_level": {"model": "gpt2", "pre": "smollm"}, "sentence_piece": {"model": "llama"}}[vocabulary]
        tokenizer = tokenizer_from_gguf(
            {f"tokenizer.ggml.{key}": value for key, value in {**VOCABULARIES[vocabulary], **model}.items()}
        )
        engine = make_engine()
        async with client_of(create_app(engine, tokenizer, None, CONFIG)) as client:
            for text in ("", "a", "  two words", ' \u4e2d\u6587\U0001f600 "\n', "\u00e9"):
                token_ids = tokenizer.encode(text)
                for given in (token_ids, token_ids[1:], token_ids[:-1], token_ids * 3):
                    answer = await post(client, "/detokenize", {"tokens": given})
                    assert answer == {"prompt": tokenizer.decode(given, skip_special_tokens=False)}
        await engine.close()


async def test_long_answers_are_made_in_pieces_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Watched(BackendTokenizer):
        def token_text(self, token_id: int) -> str:
            threads.append(threading.get_ident())
            return super().token_text(token_id)

    monkeypatch.setattr(token_answers, "PIECE_TOKENS", 100)
    tokenizer = Watched(TOKENIZER.backend, TOKENIZER.facts)
    engine = make_engine()
    async with (
        client_of(create_app(engine, tokenizer, None, CONFIG)) as client,
        client.stream("POST", "/tokenize", json={"prompt": "a" * 1000, "return_token_strs": True}) as response,
    ):
        assert "content-length" not in response.headers
        answer = json.loads(await response.aread())
    await engine.close()
    assert len(answer["token_strs"]) == 1001
    assert len(threads) == 1001
    assert threading.get_ident() not in threads


class TestOffload:
    async def test_memory_of_huge_bodies_goes_back_to_the_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        released: list[int] = []
        monkeypatch.setattr(offload, "release_free_memory", lambda: released.append(1))
        work = offload.Offload()
        assert await work.run(offload.HUGE_BYTES, lambda: "large") == "large"
        assert await work.run(offload.HUGE_BYTES + 1, lambda: "huge") == "huge"
        assert await work.run(offload.HUGE_BYTES + 1, lambda: "after it") == "after it"
        assert released

    async def test_by_size(self) -> None:
        threads = Offload()
        here = threading.current_thread().name
        names = [
            await threads.run(size, lambda: threading.current_thread().name)
            for size in (0, offload_module.LARGE_BYTES, offload_module.LARGE_BYTES + 1, offload_module.HUGE_BYTES + 1)
        ]
        assert names[:2] == [here, here]
        assert names[2].startswith("jaxserve-large-body")
        assert names[3].startswith("jaxserve-huge-body")

    async def test_huge_bodies_take_turns_and_hold_up_nobody_else(self) -> None:
        threads = Offload()
        begun, go = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            assert go.wait(30)

        huge = offload_module.HUGE_BYTES + 1
        waiting = [asyncio.create_task(threads.run(huge, work)) for _ in range(offload_module.MAX_HUGE_WAITING)]
        assert await asyncio.to_thread(begun.wait, 30)
        with pytest.raises(QueueFullError) as error:
            await threads.run(huge, work)
        assert error.value.retry_after_s == offload_module.RETRY_AFTER_S
        assert await threads.run(offload_module.LARGE_BYTES + 1, lambda: 5) == 5
        go.set()
        await asyncio.gather(*waiting)
        assert await threads.run(huge, lambda: 6) == 6

    async def test_what_work_raises_is_raised(self) -> None:
        threads = Offload()

        def work() -> None:
            raise ValueError("no")

        for size in (0, offload_module.LARGE_BYTES + 1, offload_module.HUGE_BYTES + 1):
            with pytest.raises(ValueError, match="no"):
                await threads.run(size, work)


async def test_too_many_huge_bodies_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(offload_module, "HUGE_BYTES", 1)
    monkeypatch.setattr(offload_module, "MAX_HUGE_WAITING", 0)
    engine = make_engine()
    async with client_of(make_app(engine)) as client:
        response = await client.post(COMPLETIONS, json=completion())
    await engine.close()
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) == offload_module.RETRY_AFTER_S
