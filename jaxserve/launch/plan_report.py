"""A plan as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from jaxserve.launch.estimate import ServiceEstimate, Workload
from jaxserve.launch.plan import GIB, Candidate, Plan
from jaxserve.sharding.topology import Topology

MILLION = 1e6


def tables(plan: Plan, price: float | None) -> list[RenderableType]:
    """What to show of a plan.

    Args:
        plan: The plan.
        price: Dollars a chip costs an hour, or None.
    """
    shown: list[RenderableType] = [Text(plan.sentence, style="bold green" if plan.fits else "bold red")]
    if plan.memory is not None:
        shown.append(_memory_table(plan))
    if plan.steps:
        shown.append(_step_table(plan))
    if plan.service is not None:
        shown.append(_service_table(plan, plan.service, price))
        shown.append(Text(f"jaxserve serve {plan.model} {flags(plan)}"))
    return shown


def flags(plan: Plan) -> str:
    """The flags of serve that the plan stands for."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in plan.settings.items())


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """A plan as a JSON object; bytes are of one device, times of one replica."""
    memory, report, service = plan.memory, plan.report, plan.service
    return {
        "model": plan.model,
        "topology": str(plan.topology),
        "chips": plan.topology.num_chips,
        "fits": plan.fits,
        "answer": plan.sentence,
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
                "compute_ms": 1e3 * step.compute_s,
                "memory_ms": 1e3 * step.memory_s,
                "interconnect_ms": 1e3 * step.interconnect_s,
                "bound": step.bound.value,
            }
            for step in plan.steps
        ],
        "service": None if service is None else _service_json(service, plan.replicas, plan.topology, price),
    }


def fit_json(model: str, candidates: Sequence[Candidate], price: float | None) -> dict[str, Any]:
    """The slices that hold a model as a JSON object."""
    return {
        "model": model,
        "fits": bool(candidates),
        "slices": [
            {
                "topology": str(each.topology),
                "chips": each.topology.num_chips,
                "shards": each.tensor,
                "replicas": each.replicas,
                "weight_bytes": each.weight_bytes,
                "kv_tokens": each.kv_tokens,
                "service": _service_json(each.service, each.replicas, each.topology, price),
            }
            for each in candidates
        ],
    }


def fit_table(model: str, workload: Workload, candidates: Sequence[Candidate], price: float | None) -> Table:
    """A row for each slice that holds a model."""
    grid = Table(
        Column("slice", no_wrap=True),
        *("chips", "shards", "replicas", "weights, GiB"),
        Column("KV tokens", no_wrap=True),
        *("ttft, ms", "tpot, ms", "tok/s"),
        *(["M tok/$"] if price is not None else []),
        title=f"{model}: {workload.concurrency} x ({workload.input_len} + {workload.output_len}) tokens, at best",
        caption="By arithmetic; `jaxserve plan --topology` compiles the programs as well.",
    )
    for each in candidates:
        service = each.service
        rate = service.output_tokens_per_s * each.replicas
        paid = [] if price is None else [_per_dollar(rate, each.topology, price)]
        grid.add_row(
            str(each.topology),
            str(each.topology.num_chips),
            str(each.tensor),
            str(each.replicas),
            f"{each.weight_bytes / GIB:.1f}",
            f"{each.kv_tokens:,}",
            f"{1e3 * service.ttft_s:.0f}",
            f"{1e3 * service.tpot_s:.2f}",
            f"{rate:,.0f}",
            *paid,
        )
    return grid


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    assert memory is not None
    grid = Table("a device's memory", "GiB", title=f"{plan.model} on {plan.topology}, {flags(plan)}", min_width=78)
    parts = {
        "weights": memory.weights,
        "KV cache": memory.kv,
        "temporaries": memory.temporaries,
        "code": memory.code,
        "all": memory.total,
        "there is": memory.capacity,
    }
    for name, size in parts.items():
        grid.add_row(name, f"{size / GIB:.2f}")
    lengths = ", ".join(f"{count} of {length}" for length, count in plan.sequences.items())
    report = plan.report
    assert report is not None
    grid.caption = (
        f"The pool holds {plan.kv_tokens:,} tokens, {report.num_pages} pages of {report.page_size}; sequences at once: "
        f"{lengths}. Decoder compiled for {_list(report.token_buckets)} tokens, head for {_list(report.seq_buckets)} "
        "sequences."
    )
    return grid


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _step_table(plan: Plan) -> Table:
    grid = Table("step, at least", "ms", "compute", "memory", "interconnect", "bound by")
    for step in plan.steps:
        parts = (step.seconds, step.compute_s, step.memory_s, step.interconnect_s)
        grid.add_row(step.name, *(f"{1e3 * seconds:.3f}" for seconds in parts), step.bound.value)
    return grid


def _service_table(plan: Plan, service: ServiceEstimate, price: float | None) -> Table:
    load = service.workload
    grid = Table(
        "users see, at best", "", title=f"{load.concurrency} requests of {load.input_len} + {load.output_len} tokens"
    )
    rate = service.output_tokens_per_s * plan.replicas
    grid.add_row("time to first token", f"{1e3 * service.ttft_s:.1f} ms")
    grid.add_row("time per output token", f"{1e3 * service.tpot_s:.2f} ms")
    grid.add_row(
        "output tokens a second", f"{rate:,.0f}" + (f" ({plan.replicas} replicas)" if plan.replicas > 1 else "")
    )
    if price is not None:
        grid.add_row("million output tokens a dollar", _per_dollar(rate, plan.topology, price))
    return grid


def _per_dollar(tokens_per_s: float, topology: Topology, price: float) -> str:
    return f"{3600 * tokens_per_s / (price * topology.num_chips) / MILLION:.2f}"


def _service_json(service: ServiceEstimate, replicas: int, topology: Topology, price: float | None) -> dict[str, Any]:
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
