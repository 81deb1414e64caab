"""Text events over the fake engine: detokenisation, stop tokens, stop strings, aborts."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import FinishReason, Request, SamplingParams
from jaxserve.engine import generation
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.fake import FakeBehaviour, FakeEngine
from jaxserve.engine.generation import TextEvent, generate_text
from jaxserve.sampling.stop import StopTable


class Letters:
    """Token i is the i-th byte; 0 is the control token that ends a sequence."""

    vocab_size = 256
    bos_token_id: int | None = None
    eos_token_ids = (0,)
    chat_template: str | None = None
    tool_chat_template: str | None = None
    special_tokens: dict[str, str] = {}  # noqa: RUF012 - the protocol wants an instance attribute

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def fewest_tokens(self, text: str) -> int:
        return len(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == 0 else bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id == 0


LETTERS = Letters()


def engine_saying(output: bytes, behaviour: FakeBehaviour | None = None) -> FakeEngine:
    """An engine that answers a one-token prompt with the given tokens and then with its end token."""
    info = EngineInfo(
        model="fake",
        max_model_len=512,
        vocab_size=256,
        page_size=16,
        num_pages=64,
        eos_token_ids=(0,),
        max_num_seqs=8,
    )
    follow: Callable[[Sequence[int]], int] = lambda ids: (*output, 0)[min(len(ids) - 1, len(output))]  # noqa: E731 - it needs the annotation
    return FakeEngine(info, next_token=follow, behaviour=behaviour)


def request(n: int = 1, **sampling: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 100, **sampling})
    return Request(request_id="r", prompt=(65,), sampling=params, n=n)


async def collect(engine: FakeEngine, asked: Request) -> list[TextEvent]:
    return [event async for event in generate_text(engine, asked, LETTERS)]


def text_of(events: list[TextEvent], index: int = 0) -> str:
    return "".join(event.text for event in events if event.index == index)


async def test_text_ends_before_the_end_token() -> None:
    events = await collect(engine_saying("né😀".encode()), request())
    assert text_of(events) == "né😀"
    assert [event.text for event in events] == ["n", "", "é", "", "", "", "😀", ""]
    last = events[-1]
    assert (last.token_ids, last.finish_reason, last.stop_reason) == ((0,), FinishReason.STOP, None)
    assert [event.finish_reason for event in events[:-1]] == [None] * 7


async def test_end_token_can_be_shown() -> None:
    shown = request(include_stop_str_in_output=True, skip_special_tokens=False)
    assert text_of(await collect(engine_saying(b"hi"), shown)) == "hi<end>"
    assert text_of(await collect(engine_saying(b"hi"), request(skip_special_tokens=False))) == "hi"


async def test_control_tokens_in_the_middle() -> None:
    assert text_of(await collect(engine_saying(b"a\0b"), request(ignore_eos=True, max_tokens=3))) == "ab"
    kept = request(ignore_eos=True, max_tokens=3, skip_special_tokens=False)
    assert text_of(await collect(engine_saying(b"a\0b"), kept)) == "a<end>b"


async def test_stop_token_is_the_reason_only_if_asked_for() -> None:
    events = await collect(engine_saying(b"hi!x"), request(stop_token_ids=(ord("!"),)))
    assert text_of(events) == "hi"
    assert (events[-1].stop_reason, events[-1].token_ids) == (ord("!"), (ord("!"),))
    kept = request(stop_token_ids=(ord("!"),), include_stop_str_in_output=True)
    assert text_of(await collect(engine_saying(b"hi!x"), kept)) == "hi!"


async def test_length_gives_what_is_held_back() -> None:
    events = await collect(engine_saying(b"abcd"), request(max_tokens=3, stop=("cde",)))
    assert text_of(events) == "abc"
    assert [event.text for event in events] == ["a", "b", "c"]
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_unfinished_character_at_the_limit() -> None:
    assert text_of(await collect(engine_saying("é".encode()), request(max_tokens=1))) == "\ufffd"


async def test_stop_string_across_tokens() -> None:
    engine = engine_saying(b"one STOP two")
    events = await collect(engine, request(stop=("STOP", "zzz")))
    assert text_of(events) == "one "
    assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, "STOP")
    assert b"".join(bytes(event.token_ids) for event in events) == b"one STOP"
    assert engine.stats().num_running == 0
    kept = request(stop=("STOP",), include_stop_str_in_output=True)
    assert text_of(await collect(engine_saying(b"one STOP two"), kept)) == "one STOP"


async def test_no_stop_string_before_min_tokens() -> None:
    assert text_of(await collect(engine_saying(b"a.b.c.d"), request(stop=(".",), min_tokens=3))) == "a.b"
    assert text_of(await collect(engine_saying(b"a.b.c.d"), request(stop=(".",), min_tokens=4))) == "a.b.c"
    assert text_of(await collect(engine_saying(b"abXYc"), request(stop=("XY",), min_tokens=3))) == "ab"


async def test_logprobs_end_with_the_stop_string() -> None:
    events = await collect(engine_saying(b"ab!c"), request(stop=("!",), logprobs=2))
    assert [entry.token_id for event in events for entry in event.logprobs or ()] == list(b"ab!")


async def test_prompt_facts_pass_through() -> None:
    engine = engine_saying(b"ab", FakeBehaviour(num_cached_tokens=0))
    events = await collect(engine, request(prompt_logprobs=1))
    assert events[0].prompt_logprobs == (None,)
    assert events[0].num_cached_tokens == 0
    assert events[0].queue_s is not None
    assert events[0].prefill_s is not None


async def test_every_sequence_has_its_own_text_and_end() -> None:
    events = await collect(engine_saying("aé.b".encode()), request(n=3, stop=(".",)))
    for index in range(3):
        assert text_of(events, index) == "aé"
        assert sum(event.finish_reason is not None for event in events if event.index == index) == 1


async def test_failing_step_ends_with_its_error() -> None:
    events = await collect(engine_saying(b"abcdef", FakeBehaviour(error_after_tokens=2)), request(stop=("bz",)))
    assert events[-1].finish_reason is FinishReason.ERROR
    assert events[-1].error
    assert text_of(events) == "ab"


async def test_bad_request_raises_at_the_call() -> None:
    with pytest.raises(InvalidRequestError):
        generate_text(engine_saying(b""), Request(request_id="r", prompt=(999,), sampling=SamplingParams()), LETTERS)


async def test_closing_aborts_whether_it_was_read_or_not() -> None:
    engine = engine_saying(b"abc", FakeBehaviour(step_delay_s=0.01))
    unread = generate_text(engine, request(), LETTERS)
    await unread.aclose()
    await unread.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(unread)
    stream = generate_text(engine, request(), LETTERS)
    assert (await anext(stream)).text == "a"
    await stream.aclose()
    await asyncio.wait_for(engine.drain(1.0), 2.0)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)


async def test_abort_from_outside_is_the_last_event() -> None:
    engine = engine_saying(b"abc", FakeBehaviour(step_delay_s=0.01))
    stream = generate_text(engine, request(), LETTERS)
    first = await anext(stream)
    engine.abort("r")
    rest = [event async for event in stream]
    assert first.text == "a"
    assert [event.finish_reason for event in rest] == [FinishReason.ABORT]


async def test_sequences_share_one_table_of_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 strings of 1,024 characters for each of 128 sequences are eight million characters to prepare."""
    made: list[StopTable] = []

    def table(stops: Sequence[str]) -> StopTable:
        made.append(StopTable(stops))
        return made[-1]

    monkeypatch.setattr(generation, "StopTable", table)
    stops = tuple(f"{i:02d}" + "x" * 1022 for i in range(64))
    events = await collect(engine_saying(b"abc"), request(n=8, stop=(*stops, "c")))
    assert all(text_of(events, index) == "ab" for index in range(8))
    assert len(made) == 1
    assert made[0].num_states < 10
