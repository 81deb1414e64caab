"""The offline API over the fake engine, whose next token is the last one plus one."""

import io
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import jaxserve
from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ConfigError, EngineError, InvalidRequestError, QueueFullError, UnavailableError
from jaxserve.core.types import NO_DEFAULTS, FinishReason, SamplingDefaults
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.fake import FakeBehaviour, FakeEngine
from jaxserve.launch.progress import ProgressDisplay
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import tokenizer_from_folder

TOKENIZER = tokenizer_from_folder(Path(__file__).parent.parent / "text" / "data" / "llama3_folder")
TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ extra }}", {})
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)


def fake_engine(behaviour: FakeBehaviour | None = None, *, max_num_seqs: int = 4) -> FakeEngine:
    info = EngineInfo(
        model="fake",
        max_model_len=128,
        vocab_size=TOKENIZER.vocab_size,
        page_size=16,
        num_pages=64,
        eos_token_ids=TOKENIZER.eos_token_ids,
        max_num_seqs=max_num_seqs,
    )
    return FakeEngine(info, behaviour=behaviour)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM.from_engine(fake_engine(), TOKENIZER, TEMPLATE) as made:
        yield made


def following(prompt: Sequence[int], count: int = 3) -> tuple[int, ...]:
    return tuple(range(prompt[-1] + 1, prompt[-1] + 1 + count))


def test_text_prompts_in_order(llm: LLM) -> None:
    prompts = ["the", "ring", "12"] * 10
    outputs = llm.generate(prompts, GREEDY, progress=False)
    assert [output.prompt for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = TOKENIZER.encode(prompt)
        [sequence] = output.outputs
        assert output.prompt_token_ids == tuple(ids)
        assert sequence.token_ids == following(ids)
        assert output.text == sequence.text == TOKENIZER.decode(following(ids))
        assert sequence.finish_reason is FinishReason.LENGTH


def test_one_prompt_and_token_ids(llm: LLM) -> None:
    [text] = llm.generate("the", GREEDY, progress=False)
    assert text.prompt == "the"
    [tokens] = llm.generate([300, 310], GREEDY, progress=False)
    assert tokens.prompt is None
    assert tokens.prompt_token_ids == (300, 310)
    assert tokens.outputs[0].token_ids == (311, 312, 313)
    several = llm.generate([[300], "the", (320,)], GREEDY, progress=False)
    assert [output.outputs[0].token_ids[0] for output in several] == [301, following(TOKENIZER.encode("the"))[0], 321]
    assert llm.generate([], GREEDY, progress=False) == []


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, logprobs=1 if count == 2 else None) for count in (1, 2)]
    first, second = llm.generate([[300], [400]], params, progress=False)
    assert (len(first.outputs[0].token_ids), first.outputs[0].logprobs) == (1, None)
    assert [entry.token_id for entry in second.outputs[0].logprobs or ()] == [401, 402]
    with pytest.raises(InvalidRequestError, match="2 prompts but 1 sampling_params"):
        llm.generate([[300], [400]], params[:1], progress=False)


def test_the_models_own_parameters_unless_given() -> None:
    engine = fake_engine()
    with LLM.from_engine(engine, TOKENIZER, TEMPLATE, SamplingDefaults(temperature=0.25, max_tokens=2)) as llm:
        assert llm.default_sampling_params() == SamplingParams(temperature=0.25, max_tokens=2)
        llm.generate("the", progress=False)
        llm.chat([{"role": "user", "content": "the"}], progress=False)
        llm.generate("the", GREEDY, progress=False)
    own = SamplingParams(temperature=0.25, max_tokens=2)
    assert [request.sampling for request in engine.submitted] == [own, own, GREEDY]


def test_several_sequences_and_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=1)
    [output] = llm.generate([[300, 301]], params, n=3, progress=False)
    assert [sequence.index for sequence in output.outputs] == [0, 1, 2]
    assert all(sequence.token_ids == (302, 303) for sequence in output.outputs)
    assert output.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, 301]


def test_stop_string_is_the_reason(llm: LLM) -> None:
    stop = TOKENIZER.token_text(302)
    [output] = llm.generate([[300]], SamplingParams(max_tokens=9, stop=(stop,)), progress=False)
    assert output.outputs[0].stop_reason == stop
    assert output.text == TOKENIZER.token_text(301)


def test_chat_renders_each_conversation(llm: LLM) -> None:
    hello = [{"role": "user", "content": "hi"}]
    [single] = llm.chat(hello, GREEDY, progress=False)
    assert single.prompt == "<user>hi"
    assert single.prompt_token_ids == tuple(TOKENIZER.encode("<user>hi", add_special_tokens=False))
    several = llm.chat([hello, hello * 2], GREEDY, chat_template_kwargs={"extra": "!"}, progress=False)
    assert [output.prompt for output in several] == ["<user>hi!", "<user>hi<user>hi!"]
    [continued] = llm.chat([*hello, {"role": "assistant", "content": "ok "}], continue_final_message=True)
    assert continued.prompt == "<user>hi<assistant>ok "


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, "the"], "mixes token ids"),
        ([[10**6]], "token ids must be in"),
        ([[]], "at least one"),
        (["a\ud800"], "unpaired surrogate"),
    ],
)
def test_wrong_prompts_are_refused(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, GREEDY, progress=False)
    assert llm.engine.stats().num_running == 0


def test_chat_without_template() -> None:
    with (
        LLM.from_engine(fake_engine(), TOKENIZER) as llm,
        pytest.raises(InvalidRequestError, match="no chat template"),
    ):
        llm.chat([{"role": "user", "content": "hi"}])


def test_failure_ends_everything() -> None:
    with LLM.from_engine(fake_engine(FakeBehaviour(error_after_tokens=1)), TOKENIZER) as llm:
        with pytest.raises(EngineError):
            llm.generate([[300], [400]], GREEDY, progress=False)
        assert llm.engine.stats().num_running + llm.engine.stats().num_waiting == 0


def test_short_queue_is_waited_for() -> None:
    engine = fake_engine(FakeBehaviour(max_num_waiting=1), max_num_seqs=2)
    with LLM.from_engine(engine, TOKENIZER) as llm:
        assert len(llm.generate([[300 + i] for i in range(20)], GREEDY, progress=False)) == 20


def test_queue_that_takes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: object) -> None:
        raise QueueFullError("There is no room.")

    engine = fake_engine()
    monkeypatch.setattr(engine, "stream", refuse)
    with LLM.from_engine(engine, TOKENIZER) as llm, pytest.raises(QueueFullError):
        llm.generate([[300]], GREEDY, progress=False)


def test_closing_twice_and_using_it_afterwards() -> None:
    llm = LLM.from_engine(fake_engine(), TOKENIZER)
    num_threads = threading.active_count()
    llm.close()
    llm.close()
    assert threading.active_count() == num_threads - 1
    with pytest.raises(UnavailableError, match="closed"):
        llm.generate("the")


def test_process_ends_without_close() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_launch_llm import *\n"
        "print(LLM.from_engine(fake_engine(), TOKENIZER).generate('the', GREEDY)[0].outputs[0].finish_reason)\n"
        "keep = LLM.from_engine(fake_engine(), TOKENIZER)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "length\n", "")


def test_unknown_settings_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"no setting colour, flavour; the settings are .*max_num_seqs"):
        LLM("smollm2-135m", flavour=1, colour=2)
    with pytest.raises(ConfigError, match="page-size"):
        LLM("smollm2-135m", page_size="many")


def test_progress_is_logged_without_a_terminal(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        llm.generate([[300], [301]], GREEDY)
    assert "Generating: 2 of 2" in caplog.messages
    caplog.clear()
    with caplog.at_level(logging.INFO):
        llm.generate([[300], [301]], GREEDY, progress=False)
    assert caplog.messages == []


def test_progress_is_a_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    with ProgressDisplay(console=Console(file=screen, force_terminal=True, width=80)) as display:
        display("Generating", 1, 2)
        display("Generating", 2, 2)
    assert "Generating" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_names_of_the_package_are_lazy() -> None:
    code = "import sys, jaxserve; jaxserve.SamplingParams; assert 'jax' not in sys.modules; jaxserve.LLM"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        jaxserve.__getattr__("Nothing")


def test_close_ends_the_processes_of_the_models_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was passed in stays open, for others may use it."""
    from jaxserve.launch import build, platform

    template = ChatTemplate("{{ messages[0].content }}", {})
    found = SimpleNamespace(tokenizer=TOKENIZER, chat_template=template, sampling_defaults=NO_DEFAULTS)
    monkeypatch.setattr(platform, "settle_platform", lambda: None)
    monkeypatch.setattr(build, "find_model", lambda *given: found)
    monkeypatch.setattr(build, "build_engine", lambda *given, **named: fake_engine())
    message = {"role": "user", "content": "the"}
    with LLM("any") as llm:
        assert llm.chat([message], GREEDY, progress=False)[0].prompt == "the"
    with pytest.raises(UnavailableError, match="The LLM is closed"):
        llm.chat([message], GREEDY, progress=False)
    with pytest.raises(UnavailableError, match="template is closed"):
        template.render([message])
    with LLM.from_engine(fake_engine(), TOKENIZER, TEMPLATE):
        pass
    assert TEMPLATE.render([message]) == "<user>the"
