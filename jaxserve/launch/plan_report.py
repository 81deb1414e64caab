"""A plan as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from jaxserve.launch.estimate import Bound, ServiceEstimate, Workload
from jaxserve.launch.fit import Candidate
from jaxserve.launch.plan import Plan
from jaxserve.launch.verdict import GIB
from jaxserve.sharding.topology import Topology

MILLION = 1e6

_WIDTH = 78

_BOUNDS = {Bound.COMPUTE: "compute", Bound.MEMORY: "memory", Bound.INTERCONNECT: "links"}
"""What a table calls what a step waits for."""


def tables(plan: Plan, price: float | None) -> list[RenderableType]:
    """What to show of a plan.

    Args:
        plan: The plan.
        price: Dollars a chip costs an hour, or None.
    """
    shown: list[RenderableType] = [Text(plan.sentence, style="bold green" if plan.fits else "bold red")]
    shown += [Text(note) for note in plan.notes]
    if plan.memory is not None:
        shown += [_memory_table(plan), *_lines(plan)]
    if plan.service is not None and plan.service_in_turn is not None:
        shown += [_step_table(plan), _service_table(plan, plan.service, plan.service_in_turn, price)]
        shown.append(Text(f"jaxserve serve {plan.model} {flags(plan)}"))
    return shown


def flags(plan: Plan) -> str:
    """The flags of serve that the plan stands for."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in plan.settings.items())


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """A plan as a JSON object; bytes are of one device, times of one replica, tokens a second of all replicas."""
    memory, report = plan.memory, plan.report
    return {
        "model": plan.model,
        "topology": str(plan.topology),
        "chips": plan.topology.num_chips,
        "node_selector": dict(plan.topology.node_selector),
        "fits": plan.fits,
        "answer": plan.sentence,
        "notes": list(plan.notes),
        "settings": dict(plan.settings),
        "replicas": plan.replicas,
        "memory_bytes": None
        if memory is None
        else {
            "weights": memory.weights,
            "kv": memory.kv,
            "temporaries": memory.temporaries,
            "code": memory.code,
            "total": memory.total,
            "capacity": memory.capacity,
        },
        "kv_tokens": plan.kv_tokens,
        "sequences": {str(length): count for length, count in plan.sequences.items()},
        "programs": None if report is None else report.as_json(),
        "steps": [
            {
                "name": step.name,
                "ms": 1e3 * step.seconds,
                "in_turn_ms": 1e3 * step.in_turn_s,
                "compute_ms": 1e3 * step.compute_s,
                "memory_ms": 1e3 * step.memory_s,
                "interconnect_ms": 1e3 * step.interconnect_s,
                "bound": step.bound.value,
            }
            for step in plan.steps
        ],
        "service": _service_json(plan.service, plan.replicas, plan.topology, price),
        "service_in_turn": _service_json(plan.service_in_turn, plan.replicas, plan.topology, price),
    }


def fit_json(model: str, candidates: Sequence[Candidate], prices: Sequence[float | None]) -> dict[str, Any]:
    """The slices that hold a model as a JSON object."""
    return {
        "model": model,
        "fits": bool(candidates),
        "slices": [
            {
                "topology": str(each.topology),
                "chips": each.topology.num_chips,
                "node_selector": dict(each.topology.node_selector),
                "shards": each.tensor,
                "replicas": each.replicas,
                "weight_bytes": each.weight_bytes,
                "kv_tokens": each.kv_tokens,
                "service": _service_json(each.service, each.replicas, each.topology, price),
            }
            for each, price in zip(candidates, prices, strict=True)
        ],
    }


def fit_table(
    model: str, workload: Workload, candidates: Sequence[Candidate], prices: Sequence[float | None]
) -> RenderableType:
    """A row for each slice that holds a model.

    Args:
        model: As it was named.
        workload: What was asked for.
        candidates: The slices.
        prices: What a chip of each costs an hour in dollars, or None.
    """
    priced = any(price is not None for price in prices)
    numbers = ["chips", "shards", "GiB", "KV tokens", "ttft", "tpot", "tok/s", *(["M tok/$"] if priced else [])]
    grid = Table(
        Column("slice", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in numbers),
        title=f"{model}: {workload.concurrency} requests of {workload.input_len} + {workload.output_len} tokens",
        caption="By arithmetic: GiB of weights a device; milliseconds to the first token and between tokens, at best. "
        "`jaxserve plan --topology` compiles the programs, too.",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for each, price in zip(candidates, prices, strict=True):
        service = each.service
        rate = service.output_tokens_per_s * each.replicas
        grid.add_row(
            str(each.topology),
            str(each.topology.num_chips),
            f"{each.tensor}" + (f" x {each.replicas}" if each.replicas > 1 else ""),
            f"{each.weight_bytes / GIB:.1f}",
            f"{each.kv_tokens:,}",
            f"{1e3 * service.ttft_s:.1f}",
            f"{1e3 * service.tpot_s:.2f}",
            f"{rate:,.0f}",
            *([_per_dollar(rate, each.topology, price)] if priced else []),
        )
    return grid


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    assert memory is not None
    grid = Table(
        "a device's memory",
        Column("GiB", justify="right"),
        title=f"{plan.model} on {plan.topology}, {flags(plan)}",
        min_width=_WIDTH,
        box=box.SIMPLE_HEAD,
    )
    parts = {
        "weights": memory.weights,
        "KV cache": memory.kv,
        "temporaries": memory.temporaries,
        "code": memory.code,
        "all": memory.total,
        "there is": memory.capacity,
    }
    for name, size in parts.items():
        grid.add_row(name, f"{size / GIB:.2f}", end_section=name == "code")
    return grid


def _lines(plan: Plan) -> list[Text]:
    """What the pool holds, and what was compiled."""
    report = plan.report
    assert report is not None
    room = ", ".join(f"{count:,} of {length}" for length, count in plan.sequences.items())
    return [
        Text(
            f"KV cache: {plan.kv_tokens:,} tokens in {report.num_pages:,} pages of {report.page_size}; room for "
            f"sequences of a length: {room}; {report.seq_buckets[-1]} run at once."
        ),
        Text(
            f"Programs: decoder for {_list(report.token_buckets)} tokens, head for {_list(report.seq_buckets)} "
            f"sequences; {report.dtype}, KV cache in {report.kv_dtype}, up to {report.max_model_len} tokens a sequence."
        ),
    ]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _step_table(plan: Plan) -> Table:
    exchanging = any(step.interconnect_s for step in plan.steps)
    names = ["at best", *(["in turn"] if exchanging else []), "compute", "memory", *(["links"] if exchanging else [])]
    grid = Table(
        "step, ms",
        *(Column(name, justify="right") for name in names),
        "bound by",
        min_width=_WIDTH,
        box=box.SIMPLE_HEAD,
        caption="Decode: sequences x tokens of context; prefill: tokens of a prompt."
        + (" In turn: nothing else is done during exchanges between devices." if exchanging else ""),
    )
    for step in plan.steps:
        parts = [step.seconds, *([step.in_turn_s] if exchanging else []), step.compute_s, step.memory_s]
        parts += [step.interconnect_s] if exchanging else []
        grid.add_row(step.name, *(f"{1e3 * seconds:.3f}" for seconds in parts), _BOUNDS[step.bound])
    return grid


def _service_table(plan: Plan, best: ServiceEstimate, in_turn: ServiceEstimate, price: float | None) -> Table:
    load = best.workload
    columns = {"at best": best, **({"in turn": in_turn} if in_turn != best else {})}
    grid = Table(
        "users see",
        *(Column(name, justify="right") for name in columns),
        title=f"{load.concurrency} requests at once, {load.input_len} + {load.output_len} tokens",
        min_width=_WIDTH,
        box=box.SIMPLE_HEAD,
    )
    rates = [each.output_tokens_per_s * plan.replicas for each in columns.values()]
    grid.add_row("time to first token, ms", *(f"{1e3 * each.ttft_s:.1f}" for each in columns.values()))
    grid.add_row("time per output token, ms", *(f"{1e3 * each.tpot_s:.2f}" for each in columns.values()))
    grid.add_row("output tokens a second", *(f"{rate:,.0f}" for rate in rates))
    if price is not None:
        dollars = (_per_dollar(rate, plan.topology, price) for rate in rates)
        grid.add_row("million output tokens a dollar", *dollars)
    return grid


def _per_dollar(tokens_per_s: float, topology: Topology, price: float | None) -> str:
    return "" if price is None else f"{3600 * tokens_per_s / (price * topology.num_chips) / MILLION:.2f}"


def _service_json(
    service: ServiceEstimate | None, replicas: int, topology: Topology, price: float | None
) -> dict[str, Any] | None:
    if service is None:
        return None
    load = service.workload
    rate = service.output_tokens_per_s * replicas
    return {
        "input_len": load.input_len,
        "output_len": load.output_len,
        "concurrency": load.concurrency,
        "ttft_ms": 1e3 * service.ttft_s,
        "tpot_ms": 1e3 * service.tpot_s,
        "output_tokens_per_s": rate,
        "output_tokens_per_dollar": None if price is None else 3600 * rate / (price * topology.num_chips),
    }
