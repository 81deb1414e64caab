"""The scheduler's promises, one by one."""

from __future__ import annotations

import pytest
from scheduler_bench import Bench, expected
from scheduler_device import prompt_scores

from jaxserve.core.errors import ContextLengthError, InvalidRequestError, QueueFullError
from jaxserve.core.types import FinishReason


def test_a_prompt_is_cut_into_chunks_under_the_budget() -> None:
    bench = Bench()
    bench.submit("a", list(range(40)))
    bench.finish()
    assert [step.num_tokens for step in bench.steps] == [16, 16, 8, 1, 1, 1]
    assert bench.tokens["a", 0] == expected(list(range(40)), 4)


def test_decodes_go_on_beside_chunks() -> None:
    bench = Bench()
    bench.submit("a", [1, 2, 3], max_tokens=8)
    bench.step()
    bench.submit("b", list(range(40)))
    bench.step()
    step = bench.steps[-1]
    assert step.num_decodes == 1
    assert step.items[0].sequence.request.request_id == "a"
    assert step.num_tokens == 16


def test_forks_share_the_prompt_and_compute_only_its_last_token() -> None:
    bench = Bench()
    prompt = list(range(14))
    bench.submit("a", prompt, n=3, max_tokens=5)
    bench.finish()
    # 14 of the prompt, 2 forks of one token, and 4 more steps for each of the three.
    assert bench.device.num_computed == 14 + 2 + 3 * 4
    assert sum(len(step.page_copies) for step in bench.steps) == 2
    for index in range(3):
        assert bench.tokens["a", index] == expected(prompt, 5, seed=index)


def test_a_full_pool_preempts_the_last_and_its_tokens_stay_the_same() -> None:
    bench = Bench(num_pages=10, watermark=0.0)
    for name in "abc":
        bench.submit(name, [ord(name)] * 8, max_tokens=16)
    bench.finish()
    assert bench.scheduler.stats().num_preemptions > 0
    for name in "abc":
        assert bench.tokens[name, 0] == expected([ord(name)] * 8, 16)
    finished = [event.request_id for event in bench.events if event.finish_reason]
    assert finished[0] == "a", "the first to come was preempted"


@pytest.mark.parametrize(("watermark", "reserve"), [(0.0, 0), (0.1, 2), (0.5, 3)])
@pytest.mark.parametrize("too_many", [0, 1])
def test_admission_leaves_pages_for_those_that_run_to_grow(watermark: float, reserve: int, too_many: int) -> None:
    """One for each, up to the watermark's share of the pool; whoever would need those waits."""
    bench = Bench(num_pages=20, watermark=watermark)
    for name in "abc":
        bench.submit(name, [ord(name)] * 6, max_tokens=20)
    bench.step()
    bench.step()
    num_left = 20 - 3 * 2
    assert bench.kv.num_available == num_left
    bench.submit("new", [9] * (4 * (num_left - reserve + too_many)), max_tokens=1)
    bench.step()
    assert bench.scheduler.num_waiting == too_many
    bench.finish()


def test_admission_of_forks_leaves_pages_too() -> None:
    """The parent takes a page to write on its own; the last one is left for it to grow, though a fork could start."""
    bench = Bench(num_pages=4, watermark=0.5)
    prompt = list(range(7))
    bench.submit("a", prompt, n=3, max_tokens=2)
    bench.step()
    assert (bench.scheduler.num_running, bench.kv.num_available) == (1, 2)
    bench.step()
    assert bench.kv.num_available == 2, "the parent has ended and its forks hold the prompt"
    assert not bench.steps[-1].admitted
    bench.finish()
    for index in range(3):
        assert bench.tokens["a", index] == expected(prompt, 2, seed=index)


def test_a_reserve_saves_work() -> None:
    """The same load takes fewer preemptions, and so fewer tokens are computed twice."""

    def num_computed(watermark: float) -> int:
        bench = Bench(num_pages=24, watermark=watermark, max_num_seqs=8)
        for index in range(24):
            bench.submit(str(index), [index] * 7, max_tokens=24)
        bench.finish()
        return bench.device.num_computed

    assert num_computed(0.3) < 0.9 * num_computed(0.0)


@pytest.mark.parametrize(
    ("prompt_len", "overhead", "sizes"),
    [
        pytest.param(68, 0, [64, 4], id="64 and 4 are cheaper than 128"),
        pytest.param(68, 100, [68], id="two steps cost more than the padding"),
        pytest.param(120, 0, [120], id="little padding"),
        pytest.param(64, 0, [64], id="none"),
        pytest.param(150, 0, [128, 22], id="the budget cuts first"),
        pytest.param(196, 0, [128, 64, 4], id="cut by the budget, then at a bucket"),
    ],
)
def test_chunks_are_cut_where_padding_would_be_most_of_the_work(
    prompt_len: int, overhead: int, sizes: list[int]
) -> None:
    bench = Bench(
        max_num_batched_tokens=128,
        token_buckets=(4, 64, 128),
        max_model_len=256,
        step_overhead_tokens=overhead,
        long_prefill_token_threshold=128,
    )
    bench.submit("a", list(range(prompt_len)), max_tokens=1)
    bench.finish()
    assert [step.num_tokens for step in bench.steps] == sizes


def test_a_prompt_is_scored_once_though_it_is_computed_twice() -> None:
    bench = Bench(num_pages=14, max_num_batched_tokens=4, token_buckets=(4,))
    bench.submit("short", list(range(8)), max_tokens=20)
    bench.step()
    bench.step()
    bench.submit("scored", list(range(40)), prompt_logprobs=1, max_tokens=2)
    bench.finish()
    assert bench.scheduler.stats().num_preemptions == 1
    computed = sum(item.num_tokens for step in bench.steps for item in step.items if item.sequence.index == 0)
    assert computed > 8 + 20 + 40 + 2, "the preemption fell before the first chunk"
    assert bench.first("scored").prompt_logprobs == prompt_scores(range(40), 1)


def test_a_scored_prompt_is_computed_though_it_is_cached() -> None:
    bench = Bench()
    bench.submit("plain", list(range(20)))
    bench.finish()
    bench.submit("scored", list(range(20)), prompt_logprobs=0)
    bench.finish()
    assert bench.first("scored").num_cached_tokens == 0
    assert bench.first("scored").prompt_logprobs == prompt_scores(range(20), 0)


def test_a_prefix_is_computed_once() -> None:
    bench = Bench()
    prompt = list(range(20))
    bench.submit("a", prompt)
    bench.finish()
    before = bench.device.num_computed
    bench.submit("b", [*prompt, 99])
    bench.finish()
    assert bench.device.num_computed - before == 1 + 3
    assert bench.first("b").num_cached_tokens == 20
    assert bench.scheduler.stats().prefix_cache_hits_tokens == 20
    assert bench.scheduler.stats().prefix_cache_queries_tokens == 41


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    bench = Bench()
    for name in "ab":
        bench.submit(name, list(range(16)))
        bench.finish()
    assert bench.first("b").num_cached_tokens == 12


def test_salts_do_not_share() -> None:
    bench = Bench()
    for name, salt in (("a", ""), ("b", "x"), ("c", "x")):
        bench.submit(name, list(range(20)), salt=salt)
        bench.finish()
    assert [bench.first(name).num_cached_tokens for name in "abc"] == [0, 0, 16]


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    bench = Bench(max_num_seqs=1, aging_s=10.0)
    bench.submit("running", [1])
    bench.step()
    bench.submit("patient", [2])
    bench.now = 5.0
    bench.submit("urgent", [3], priority=-1)
    bench.now = 30.0
    bench.submit("late", [4], priority=-1)
    bench.finish()
    order = [event.request_id for event in bench.events if event.finish_reason]
    assert order == ["running", "urgent", "patient", "late"]


def test_a_long_prompt_leaves_room_for_short_ones() -> None:
    bench = Bench(long_prefill_token_threshold=8)
    bench.submit("long", list(range(48)))
    bench.submit("short", [1, 2, 3, 4])
    bench.step()
    assert {item.sequence.request.request_id: item.num_tokens for item in bench.steps[0].items} == {
        "long": 8,
        "short": 4,
    }
    bench.finish()
    assert bench.tokens["long", 0] == expected(list(range(48)), 4)


def test_short_prompts_do_not_starve_a_long_one() -> None:
    bench = Bench(max_num_seqs=2, num_pages=16)
    bench.submit("s0", [1], max_tokens=8)
    bench.step()
    bench.submit("long", list(range(50)), max_tokens=2)
    for index in range(1, 20):
        bench.submit(f"s{index}", [1], max_tokens=8)
    bench.finish()
    order = [event.request_id for event in bench.events if event.finish_reason]
    assert order.index("long") <= 3


def test_the_queue_is_bounded() -> None:
    bench = Bench(max_num_seqs=1, max_waiting=2)
    bench.submit("a", [1], n=2)
    with pytest.raises(QueueFullError) as error:
        bench.submit("b", [1], n=2)
    assert error.value.retry_after_s >= 1
    assert error.value.capacity == 3
    bench.submit("c", [1])
    bench.finish()
    assert len(bench.tokens) == 3


@pytest.mark.parametrize("max_waiting", [0, 3])
def test_arrivals_between_two_steps_have_the_free_slots(max_waiting: int) -> None:
    bench = Bench(max_num_seqs=16, token_buckets=(16,), max_waiting=max_waiting)
    for index in range(12):
        bench.submit(f"early {index}", [1])
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (12, 0)
    for index in range(4 + max_waiting):
        bench.submit(f"late {index}", [1])
    with pytest.raises(QueueFullError):
        bench.submit("too late", [1])
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (16, max_waiting)
    bench.finish()
    bench.submit("later", [1])


def test_more_sequences_than_there_can_ever_be() -> None:
    bench = Bench(max_num_seqs=4, max_waiting=3)
    with pytest.raises(InvalidRequestError, match=r"n=8 .* more than the 7 .*more --max-waiting") as error:
        bench.submit("a", [1], n=8)
    assert error.value.param == "n"
    bench.submit("b", [1], n=7)
    with pytest.raises(InvalidRequestError, match="n=8"):
        bench.submit("c", [1], n=8)
    bench.finish()
    assert len(bench.tokens) == 7


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [(70, None, "prompt"), (64, 1, "prompt"), (60, 5, "max_tokens"), (30, 40, "max_tokens")],
)
def test_what_never_fits_is_refused(length: int, max_tokens: int | None, param: str) -> None:
    bench = Bench()
    with pytest.raises(ContextLengthError) as error:
        bench.submit("a", [1] * length, max_tokens=max_tokens)
    assert error.value.param == param
    assert not bench.scheduler.has_work


def test_no_limit_means_to_the_end_of_the_context() -> None:
    bench = Bench()
    bench.submit("a", [1] * 10, max_tokens=None)
    bench.finish()
    assert len(bench.tokens["a", 0]) == 54
    assert bench.events[-1].finish_reason is FinishReason.LENGTH


def test_stop_tokens_end_a_sequence_unless_told_otherwise() -> None:
    prompt = [3, 1]
    history = expected(prompt, 40)
    stop = history[2]
    first = history.index(stop)
    bench = Bench()
    bench.submit("a", prompt, max_tokens=30, stop_token_ids=(stop,))
    bench.submit("b", prompt, max_tokens=30, stop_token_ids=(stop,), min_tokens=first + 2)
    bench.finish()
    assert bench.tokens["a", 0] == history[: first + 1]
    last = [event for event in bench.events if event.request_id == "a"][-1]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, stop)
    assert len(bench.tokens["b", 0]) > first + 1


@pytest.mark.parametrize("seed", [-2, 1 - 2**63, -(2**63), 2**63 - 1, 0, 1])
def test_any_int64_is_a_seed(seed: int) -> None:
    bench = Bench()
    bench.submit("a", [1], seed=seed, n=2)
    bench.finish()
    sequences = {item.sequence.index: item.sequence.seed for step in bench.steps for item in step.items}
    assert sequences == {0: seed % 2**64, 1: (seed + 1) % 2**64}


@pytest.mark.parametrize("seed", [None, -1])
def test_requests_without_a_seed_differ(seed: int | None) -> None:
    bench = Bench()
    bench.submit("a", [1], seed=seed, n=2)
    bench.submit("b", [1], seed=seed)
    bench.finish()
    seeds = {item.sequence.seed for step in bench.steps for item in step.items}
    assert len(seeds) == 3
    assert not seeds & {0, 2**63 - 1, 2**64 - 1}


def test_ids_and_priorities_are_checked() -> None:
    bench = Bench()
    bench.submit("a", [1])
    with pytest.raises(InvalidRequestError, match="in flight"):
        bench.submit("a", [1])
    with pytest.raises(InvalidRequestError) as error:
        bench.submit("b", [1], priority=10**7)
    assert error.value.param == "priority"


def test_a_failed_step_ends_its_sequences_and_those_that_wait_for_their_prompt() -> None:
    bench = Bench()
    bench.submit("a", list(range(30)), n=2)
    step = bench.scheduler.schedule()
    assert step is not None
    events = bench.scheduler.fail(step, "broken")
    assert sorted((event.index, event.finish_reason, event.error) for event in events) == [
        (0, FinishReason.ERROR, "broken"),
        (1, FinishReason.ERROR, "broken"),
    ]
    bench.scheduler.restart()
    bench.scheduler.check_integrity()
    assert not bench.scheduler.has_work


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    bench = Bench(max_num_batched_tokens=16)
    for index in range(2500):
        for sub in range(4):
            bench.submit(f"{index}-{sub}", [index % 40, sub, 3], max_tokens=2)
        while bench.step():
            pass
        bench.events.clear()
        bench.steps.clear()
    assert not bench.scheduler.has_work
    assert bench.kv.stats().num_owned == 0
    held = vars(bench.scheduler)
    assert not held["_requests"]
    assert not held["_waiting"]
    assert not held["_slots"]
