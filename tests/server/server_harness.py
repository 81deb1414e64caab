"""A model small enough for hand arithmetic, and ways to put the app in front of it.

Each byte of a text is one token, plus four control tokens, so the fake engine's "next id" reads as the next letter:
the prompt "A" continues "BCDE". A space is the letter `Ġ` of byte-level vocabularies and continues with `ġ`, half of a
character.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.engine.api import Engine, EngineInfo
from jaxserve.engine.fake import FakeBehaviour, FakeEngine
from jaxserve.server.lifecycle import StopSignal, listen, serve
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.config import AppConfig
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import BackendTokenizer, TokenizerFacts

BOS, EOS, USER, ASSISTANT = range(4)
SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' and not message.tool_call_id %}{{ raise_exception('a tool message needs an id') }}"
    "{% endif %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if shout is defined and shout %}!!{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def make_tokenizer() -> BackendTokenizer:
    """Bytes as tokens; a prompt gets a BOS in front when special tokens are added."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *letters])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    facts = TokenizerFacts(
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        prefix_ids=(BOS,),
    )
    return BackendTokenizer(backend, facts)


TOKENIZER = make_tokenizer()
INFO = EngineInfo(
    model="fake",
    max_model_len=256,
    vocab_size=TOKENIZER.vocab_size,
    page_size=16,
    num_pages=256,
    eos_token_ids=(EOS,),
    max_num_seqs=64,
)
CHAT_TEMPLATE = ChatTemplate(TEMPLATE, TOKENIZER.special_tokens)
"""Shared by all tests, for it starts a process."""

CONFIG = AppConfig(served_model_names=("fake", "alias"), version="1.2.3", max_body_bytes=1 << 20)


def ids(text: str) -> list[int]:
    """Token ids of a text, without BOS."""
    return TOKENIZER.encode(text, add_special_tokens=False)


def make_engine(**behaviour: Any) -> FakeEngine:
    return FakeEngine(INFO, behaviour=FakeBehaviour(**behaviour))


def make_app(engine: Engine, config: AppConfig = CONFIG, **others: Any) -> FastAPI:
    return create_app(engine, TOKENIZER, CHAT_TEMPLATE, config, **others)


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the app without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@dataclass(frozen=True, kw_only=True)
class LiveServer:
    """A server on a real socket, in the test's own event loop."""

    url: str
    port: int
    engine: Engine
    stop: StopSignal
    task: asyncio.Task[None]


@asynccontextmanager
async def live_server(
    app: FastAPI, engine: Engine, *, drain_deadline_s: float = 5.0, **others: Any
) -> AsyncIterator[LiveServer]:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    stop = StopSignal()
    task = asyncio.create_task(serve(app, engine, sock, stop=stop, drain_deadline_s=drain_deadline_s, **others))
    try:
        yield LiveServer(url=f"http://127.0.0.1:{port}", port=port, engine=engine, stop=stop, task=task)
    finally:
        stop.next()
        stop.next()
        await task


def chat(content: object = "A", **fields: Any) -> dict[str, Any]:
    """A chat body; the fake model continues its prompt after `<|assistant|>`, that is with `!"#$`."""
    return {"model": "fake", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def completion(prompt: object = "A", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, "max_tokens": 4, **fields}


def events_of(body: str) -> list[Any]:
    """The JSON events of a stream, after checking that it ends in [DONE]."""
    *events, done, rest = body.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(5):
        while (stats := engine.stats()).num_waiting or stats.num_running:
            await asyncio.sleep(0.005)
