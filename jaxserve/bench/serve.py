"""Load on an OpenAI server: warm it up, send requests as a closed loop or a Poisson process, report.

A closed loop keeps a number of requests in flight; a Poisson process sends at a mean rate whether or not answers
come. Prompts of completions are token ids if the server takes them, drawn from what its own tokenizer makes of common
words, so they hold no control token; those of chats are text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import httpx
import uvloop

from jaxserve.bench.client import Target, Timing, send
from jaxserve.bench.openai_url import auth_headers, error_of, first_model, root_url
from jaxserve.bench.report import Report, summarise
from jaxserve.bench.workload import WORDS, Item, Shape, make_items, poisson_times
from jaxserve.core.errors import ConfigError, UnavailableError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How requests are sent; one of the two is given.

    Attributes:
        concurrency: Closed loop: requests in flight.
        rate: Open loop: mean requests a second.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"c={self.concurrency}" if self.concurrency is not None else f"{self.rate:g} req/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A benchmark.

    Attributes:
        url: The server.
        endpoint: "completions" or "chat".
        model: Name of the model; None takes the server's first.
        api_key: Key to present.
        shape: Lengths of the requests of each run.
        loads: One run each.
        num_warmup: Requests sent before each run and not reported.
        seed: Draws prompts and arrivals; each run has prompts of its own.
        temperature: 0 is greedy.
        ignore_eos: Generate exactly as many tokens as asked.
        prompt_kind: "tokens", "text", or "auto": token ids if the server takes them.
        timeout_s: Longest silence of the server before a request fails.
        objective_ms: Name of a latency to the most milliseconds a good request takes.
    """

    url: str
    endpoint: str
    model: str | None
    api_key: str | None
    shape: Shape
    loads: tuple[Load, ...]
    num_warmup: int
    seed: int
    temperature: float
    ignore_eos: bool
    prompt_kind: str
    timeout_s: float
    objective_ms: Mapping[str, float]


def run_plan(plan: Plan, progress: Progress) -> list[Report]:
    """Runs a benchmark.

    Args:
        plan: What to do.
        progress: Told about finished requests.

    Returns:
        A report for each load.

    Raises:
        UnavailableError: The server does not answer.
        ConfigError: It does not take prompts of the kind asked for.
    """
    is_text = plan.prompt_kind == "text" or plan.endpoint == "chat"
    if is_text and plan.prompt_kind == "tokens":
        raise ConfigError("A chat's messages are text: leave --prompt-kind tokens out, or use --endpoint completions.")
    root, headers = root_url(plan.url), auth_headers(plan.api_key)
    with httpx.Client(base_url=root, headers=headers, timeout=plan.timeout_s) as client:
        model = plan.model or first_model(client)
        token_ids = None if is_text else _ordinary_tokens(client, model)
    if token_ids is None and plan.prompt_kind == "tokens":
        raise ConfigError(f"{root} does not take token ids, or has no /tokenize; use --prompt-kind text.")
    prompts = _Prompts(plan=plan, model=model, token_ids=token_ids)
    # A token costs the client a third less on uvloop than on asyncio's own loop.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run_all(plan, root, headers, prompts, progress))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompts:
    """Where the runs' requests come from."""

    plan: Plan
    model: str
    token_ids: Sequence[int] | None

    def items(self, run: int, num_requests: int) -> list[Item]:
        """Requests of a run; no two runs share prompts, or the second would find them in the prefix cache."""
        shape = replace(self.plan.shape, num_requests=num_requests)
        return make_items(shape, seed=self.plan.seed * 1_000_003 + run, token_ids=self.token_ids)

    @property
    def target(self) -> Target:
        """What all requests have in common."""
        return Target(
            endpoint=self.plan.endpoint,
            model=self.model,
            temperature=self.plan.temperature,
            ignore_eos=self.plan.ignore_eos,
        )


async def _run_all(
    plan: Plan, root: str, headers: Mapping[str, str], prompts: _Prompts, progress: Progress
) -> list[Report]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    reports = []
    async with httpx.AsyncClient(base_url=root, headers=headers, timeout=plan.timeout_s, limits=limits) as client:
        for run, load in enumerate(plan.loads):
            warmup = prompts.items(2 * run + 1, plan.num_warmup)
            await _closed_loop(client, prompts.target, warmup, plan.num_warmup, lambda _: None)
            items = prompts.items(2 * run, plan.shape.num_requests)
            counter = _Counter(str(load), len(items), progress)
            cpu_s = time.process_time()
            if load.concurrency is not None:
                timings = await _closed_loop(client, prompts.target, items, load.concurrency, counter)
            else:
                times = poisson_times(len(items), rate=load.rate or float("inf"), seed=plan.seed)
                timings = await _open_loop(client, prompts.target, items, times, counter)
            cpu_s = time.process_time() - cpu_s
            reports.append(summarise(str(load), timings, plan.objective_ms, client_cpu_s=cpu_s))
    return reports


async def _closed_loop(
    client: httpx.AsyncClient, target: Target, items: Sequence[Item], concurrency: int, done: Callable[[Timing], None]
) -> list[Timing]:
    """Keeps `concurrency` requests in flight until all are answered."""
    left: Iterator[Item] = iter(items)
    timings: list[Timing] = []

    async def worker() -> None:
        for item in left:
            timings.append(await send(client, target, item))
            done(timings[-1])

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return timings


async def _open_loop(
    client: httpx.AsyncClient,
    target: Target,
    items: Sequence[Item],
    times: Sequence[float],
    done: Callable[[Timing], None],
) -> list[Timing]:
    """Sends each request at its time, however many are in flight."""
    start = time.perf_counter()

    async def one(item: Item, at_s: float) -> Timing:
        await asyncio.sleep(max(0.0, start + at_s - time.perf_counter()))
        timing = await send(client, target, item)
        done(timing)
        return timing

    return await asyncio.gather(*(one(item, at_s) for item, at_s in zip(items, times, strict=True)))


class _Counter:
    """Turns finished requests into progress."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what = what
        self._total = total
        self._progress = progress
        self._done = 0

    def __call__(self, timing: Timing) -> None:
        self._done += 1
        self._progress(self._what, self._done, self._total)


def _ordinary_tokens(client: httpx.Client, model: str) -> list[int] | None:
    """Tokens of common words, or None if the server has no /tokenize or takes no token ids."""
    text = " ".join(WORDS)
    bodies: tuple[dict[str, object], ...] = (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text},  # llama.cpp's form
    )
    ids: list[int] = []
    for body in bodies:
        response = _post(client, "/tokenize", body)
        if response.status_code == 200:
            ids = [token for token in response.json().get("tokens", []) if isinstance(token, int)]
        if ids:
            break
    if not ids:
        return None
    probe = _post(client, "/v1/completions", {"model": model, "prompt": ids[:2], "max_tokens": 1})
    if probe.status_code in (401, 403, 404):
        raise UnavailableError(f"{client.base_url} refuses completions: {error_of(probe)}")
    return sorted(set(ids)) if probe.status_code == 200 else None


def _post(client: httpx.Client, path: str, body: Mapping[str, object]) -> httpx.Response:
    try:
        return client.post(path, json=body)
    except httpx.HTTPError as error:
        raise UnavailableError(f"{client.base_url} does not answer: {error}.") from error
