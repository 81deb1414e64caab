"""Plans: estimates against cases computed by hand, and what is said when a model does not fit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from jaxserve.checkpoint.sources import spec_of
from jaxserve.cli import main
from jaxserve.core.errors import ConfigError
from jaxserve.launch import plan as planning
from jaxserve.launch.aot import AotReport, ProgramReport
from jaxserve.launch.estimate import Bound, Estimator, Workload
from jaxserve.launch.plan import GIB, Plan, choose_tensor, fit, plan, weight_bytes
from jaxserve.models.costs import StepShape
from jaxserve.sharding.chips import CHIPS
from jaxserve.sharding.topology import parse_topology

LLAMA = "llama-3.3-70b"
LOAD = Workload(input_len=1024, output_len=256, concurrency=64)

# Llama 3.3 70B over eight devices in bfloat16, by hand: 80 layers of 8192 x (8192 + 2 x 1024) + 8192 x 8192 +
# 3 x 8192 x 28672 weights, a head of 128256 x 8192; per token and layer a key and a value of one head of 128.
LAYER = 8192 * 10240 + 8192 * 8192 + 3 * 8192 * 28672
HEAD = 128256 * 8192
READ = 2 * (80 * LAYER + HEAD) / 8


def estimator(chip: str = "v6e") -> Estimator:
    costs = planning._costs(spec_of(LLAMA), 8, {})
    return Estimator(costs=costs, chip=CHIPS[chip], weight_format="bfloat16", chunk_tokens=2048)


def test_a_decode_step_by_hand() -> None:
    step = estimator().step("decode", StepShape.decode(64, 2048))
    norms, embedded = 161 * 8192 * 2, 64 * 8192 * 2
    kv = 80 * 2 * 128 * 2 * (64 * 2048 + 64)
    assert step.memory_s == pytest.approx((READ + norms + embedded + kv) / 1640e9, rel=1e-12)
    flops = 2 * 64 * (80 * LAYER + HEAD) / 8 + 4 * 80 * 8 * 128 * 64 * 2048
    assert step.compute_s == pytest.approx(flops / 918e12, rel=1e-12)
    sent = 161 * 64 * 8192 * 2 * 2 * 7 / 8 + 64 * 128256 * 4 * 7 / 8
    assert step.interconnect_s == pytest.approx(sent / 180e9, rel=1e-6)
    assert step.bound is Bound.MEMORY
    assert step.seconds == step.memory_s + step.interconnect_s
    # 17.4 GB of weights and 5.4 GB of keys and values at 1.64 TB/s.
    assert step.memory_s == pytest.approx(13.9e-3, rel=0.01)


def test_a_prefill_waits_for_links_more_than_for_arithmetic_or_memory() -> None:
    step = estimator().step("prefill", StepShape.prefill(2048))
    flops = 2 * 2048 * 80 * LAYER / 8 + 2 * HEAD / 8 + 4 * 80 * 8 * 128 * (2048 * 2049 // 2)
    assert step.compute_s == pytest.approx(flops / 918e12, rel=1e-12)
    # 161 sums of 32 MiB around a ring of eight.
    assert step.interconnect_s == pytest.approx((161 * 2048 * 8192 * 2 * 1.75 + 128256 * 4 * 7 / 8) / 180e9, rel=1e-6)
    assert step.memory_s < step.compute_s < step.interconnect_s
    assert step.bound is Bound.INTERCONNECT


def test_a_prompt_is_its_chunks() -> None:
    each = estimator()
    chunks = [StepShape.prefill(2048), StepShape.prefill(2048, 2048), StepShape.prefill(904, 4096)]
    assert each.prefill_s(5000) == pytest.approx(sum(each.step("", chunk).seconds for chunk in chunks))


def test_what_users_see() -> None:
    each = estimator()
    seen = each.service(LOAD)
    decode = each.step("", StepShape.decode(64, 1024 + 128)).seconds
    assert seen.tpot_s == decode
    assert seen.ttft_s == each.prefill_s(1024)
    assert seen.output_tokens_per_s == pytest.approx(64 * 256 / (64 * seen.ttft_s + 256 * decode))


@pytest.mark.parametrize(
    ("topology", "tensor"),
    [("v6e:1x1", 1), ("v6e:2x4", 8), ("v6e:16x16", 8), ("v5e:4x4", 16), ("tpu7x:2x2x1", 8), ("v5p:2x2x1", 4)],
)
def test_a_model_is_shared_as_widely_as_it_has_kv_heads_or_its_weights_need(topology: str, tensor: int) -> None:
    assert choose_tensor(spec_of(LLAMA), parse_topology(topology), {}) == tensor


def test_the_smallest_slices_that_hold_a_model() -> None:
    found = {each.topology.chip.name: each for each in fit(LLAMA, LOAD, settings={})}
    assert {name: str(each.topology) for name, each in found.items()} == {
        "v4": "v4:2x2x2",
        "v5e": "v5e:4x4",
        "v5p": "v5p:2x2x1",
        "v6e": "v6e:2x4",
        "tpu7x": "tpu7x:2x2x1",
        "h100": "h100:4",
        "h200": "h200:2",
    }
    assert found["v6e"].weight_bytes == weight_bytes(spec_of(LLAMA), 8, {})
    assert found["v6e"].kv_tokens == pytest.approx(
        (0.9 * 32 * GIB - found["v6e"].weight_bytes) / (80 * 2 * 128 * 2), abs=1
    )
    small = {
        each.topology.chip.name: str(each.topology) for each in fit(LLAMA, LOAD, settings={"quantization": "int8"})
    }
    assert (small["v5e"], small["h200"]) == ("v5e:2x4", "h200:1")


def test_a_load_that_no_slice_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--fit", "--concurrency", "100000", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"model": LLAMA, "fits": False, "slices": []}


def test_a_model_that_is_too_large_says_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--topology", "v6e:2x2", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False
    assert answer["answer"] == (
        "llama-3.3-70b does not fit v6e:2x2: its weights take 32.9 GiB on each of 4 devices, which have 32 GiB and "
        "need room for sequences; it would with --quantization int8 (16.4 GiB) or on v6e:2x4 (16.4 GiB a device)."
    )


def test_a_mesh_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor=16.* needs 16 devices and v6e:2x4 has 8"):
        plan(LLAMA, parse_topology("v6e:2x4"), LOAD, settings={"mesh": "tensor=16"})


REPORT = AotReport(
    model=LLAMA,
    topology="v6e:2x4",
    mesh={"data": 1, "expert": 1, "tensor": 8},
    dtype="bfloat16",
    kv_dtype="bfloat16",
    page_size=64,
    num_pages=5000,
    max_model_len=8192,
    token_buckets=(16, 64, 256, 2048),
    seq_buckets=(16, 64, 256),
    weight_bytes=16 * GIB,
    kv_bytes=12 * GIB,
    state_bytes=GIB // 8,
    programs=(
        ProgramReport(name="decode", bucket=2048, compile_s=1, temporary_bytes=GIB // 4, code_bytes=8 << 20),
        ProgramReport(name="head", bucket=256, compile_s=1, temporary_bytes=GIB // 2, code_bytes=10 << 20),
    ),
)


def planned(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Plan:
    report = dataclasses.replace(REPORT, **changes)
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: report)
    return plan(LLAMA, parse_topology("v6e:2x4"), LOAD, settings={})


def test_memory_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch)
    assert found.fits
    assert found.memory is not None
    assert found.memory.temporaries == GIB // 2 + GIB // 8
    assert found.memory.code == (4 * 8 + 3 * 10) << 20, "buckets that were not compiled count as the largest one"
    assert found.memory.total == 28 * GIB + found.memory.temporaries + found.memory.code
    assert found.kv_tokens == 320_000
    assert found.sequences == {1024: 312, 4096: 78}
    assert [step.name for step in found.steps] == [
        "decode, 1 sequences",
        "decode, 64 sequences",
        "prefill, 1024 tokens",
    ]
    assert found.settings == {"mesh": "tensor=8"}


def test_programs_that_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, kv_bytes=15 * GIB)
    assert not found.fits
    assert "does not fit v6e:2x4: a device needs 31.7 GiB and has 31.2" in found.sentence
    assert found.service is None


def test_a_pool_too_small_for_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, num_pages=19)
    assert not found.fits
    assert "not one sequence of 1280 tokens does: the pool holds 1216" in found.sentence


def test_a_program_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ProgramReport(name="decode", bucket=2048, compile_s=1, failure="RESOURCE_EXHAUSTED: vmem")
    found = planned(monkeypatch, programs=(broken,))
    assert not found.fits
    assert found.sentence == "llama-3.3-70b does not compile for v6e:2x4: decode 2048: RESOURCE_EXHAUSTED: vmem"


def test_the_tables_say_it_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: REPORT)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", LLAMA, "--topology", "v6e:2x4", "--price", "2.70"]) == 0
    text = capsys.readouterr().out
    for words in (
        "fits v6e:2x4: 64 sequences of 1280 tokens at once",
        "KV cache",
        "12.00",
        "bound by",
        "memory",
        "a dollar",
    ):
        assert words in text
    assert "jaxserve serve llama-3.3-70b --mesh tensor=8" in text


def test_reports_survive_the_way_between_processes() -> None:
    assert AotReport.from_json(json.loads(json.dumps(REPORT.as_json()))) == REPORT
