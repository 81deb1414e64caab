"""Plans: which slices hold a model, what is said when one does not, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from jaxserve.checkpoint.sources import spec_of
from jaxserve.cli import main
from jaxserve.core.config import MeshShape, ServeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.launch import plan as planning
from jaxserve.launch.aot import AotReport, ProgramReport
from jaxserve.launch.estimate import Workload
from jaxserve.launch.fit import Candidate, candidate, choose_tensor, costs_of, fit, weight_bytes
from jaxserve.launch.plan import Plan, plan
from jaxserve.launch.verdict import GIB
from jaxserve.sharding.chips import CHIPS
from jaxserve.sharding.topology import parse_topology, slices

LLAMA = "llama-3.3-70b"
LOAD = Workload(input_len=1024, output_len=256, concurrency=64)
CONFIG = ServeConfig(model=LLAMA)


@pytest.mark.parametrize(
    ("topology", "tensor"),
    [("v6e:1x1", 1), ("v6e:2x4", 8), ("v6e:16x16", 8), ("v5e:4x4", 16), ("tpu7x:2x2x1", 8), ("v5p:2x2x1", 4)],
)
def test_a_model_is_shared_as_widely_as_it_has_kv_heads_or_its_weights_need(topology: str, tensor: int) -> None:
    assert choose_tensor(spec_of(LLAMA), parse_topology(topology), CONFIG) == tensor


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
    assert found["v6e"].weight_bytes == weight_bytes(spec_of(LLAMA), 8, CONFIG)
    assert found["v6e"].kv_tokens == pytest.approx(
        (0.9 * 32 * GIB - found["v6e"].weight_bytes) / (80 * 2 * 128 * 2), abs=64
    )
    small = {
        each.topology.chip.name: str(each.topology) for each in fit(LLAMA, LOAD, settings={"quantization": "int8"})
    }
    assert (small["v5e"], small["h200"]) == ("v5e:2x4", "h200:1")


LONG = Workload(input_len=7168, output_len=1024, concurrency=64)


def test_more_devices_share_a_model_where_its_sequences_need_them() -> None:
    """Eight v6e have room for 324,000 tokens, sixteen for 535,000; 64 sequences of 8,192 are 524,288."""
    found = {str(each.topology): (each.tensor, each.replicas) for each in fit(LLAMA, LONG, settings={})}
    assert found == {
        "v4:2x2x4": (16, 1),
        "v5p:2x2x1": (4, 1),
        "v6e:4x4": (16, 1),
        "tpu7x:2x2x1": (8, 1),
        "h100:8": (8, 1),
        "h200:4": (4, 1),
    }
    crowd = dataclasses.replace(LONG, concurrency=240)
    found = {str(each.topology): (each.tensor, each.replicas) for each in fit(LLAMA, crowd, settings={})}
    assert found == {"v5p:2x2x4": (16, 1), "tpu7x:2x2x2": (16, 1), "h200:8": (8, 1)}


def test_no_smaller_slice_holds_it_however_it_is_shared() -> None:
    found = {each.topology.chip.name: each.topology.num_chips for each in fit(LLAMA, LONG, settings={})}
    for chip in CHIPS.values():
        for topology in slices(chip):
            meshes = [MeshShape(tensor=1 << power) for power in range(topology.num_devices.bit_length())]
            holds = any(candidate(spec_of(LLAMA), topology, LONG, CONFIG, mesh) for mesh in meshes)
            assert holds == (topology.num_chips >= found.get(chip.name, math.inf)), str(topology)


@pytest.mark.parametrize(
    ("topology", "load", "settings", "tensor"),
    [
        ("v6e:4x4", LOAD, {}, 8),
        ("v6e:4x4", LONG, {}, 16),
        ("v6e:8x8", LONG, {}, 16),
        # No mesh of a pod holds so many, and eight chips hold some of them.
        ("v6e:16x16", dataclasses.replace(LONG, concurrency=240), {}, 8),
        # At 80 KiB a token, 32 chips hold 75,000 beside 8.7 GiB of weights, 64 chips 128,000 beside 4.7.
        ("v5e:8x8", Workload(input_len=100_000, output_len=256, concurrency=64), {"dtype": "float32"}, 64),
    ],
)
def test_a_slice_is_shared_as_the_workload_needs(
    monkeypatch: pytest.MonkeyPatch, topology: str, load: Workload, settings: dict[str, str], tensor: int
) -> None:
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: REPORT)
    found = plan(LLAMA, parse_topology(topology), load, settings=settings)
    assert found.settings["mesh"] == f"tensor={tensor}"
    assert found.replicas == parse_topology(topology).num_devices // tensor


def test_fit_heeds_what_serve_would() -> None:
    """Llama 3.1 8B on one v6e has room for some 113,000 tokens; 64 requests of 1,280 want 81,920."""
    model = "llama-3.1-8b"

    def smallest(load: Workload = LOAD, **settings: str) -> Candidate:
        [found] = [each for each in fit(model, load, settings=settings) if each.topology.chip.name == "v6e"]
        return found

    assert str(smallest().topology) == "v6e:1x1"
    assert smallest(num_pages="1280").kv_tokens == 81_920
    assert not fit(model, LOAD, settings={"num_pages": "1279"})
    assert str(smallest(num_pages="2000").topology) == "v6e:2x2", "128,000 tokens are more than one chip has room for"
    # In pages of 1,024 a request takes two, and 64 of them 131,072 tokens.
    assert str(smallest(page_size="1024").topology) == "v6e:2x2"
    assert str(smallest(max_model_len="120000").topology) == "v6e:2x2"
    crowd = dataclasses.replace(LOAD, concurrency=200)
    assert str(smallest(crowd).topology) == "v6e:2x2"
    few = smallest(crowd, max_num_seqs="16", max_num_batched_tokens="16")
    assert (str(few.topology), few.service.workload.concurrency) == ("v6e:1x1", 16)
    with pytest.raises(ConfigError, match="max_num_batched_tokens=16 is less than max_num_seqs=256"):
        fit(model, LOAD, settings={"max_num_batched_tokens": "16"})


@pytest.mark.parametrize(("attention", "platforms"), [("tpu", {"tpu"}), ("gpu", {"gpu"}), ("xla", {"tpu", "gpu"})])
def test_fit_lists_chips_that_run_the_attention_asked_for(attention: str, platforms: set[str]) -> None:
    found = fit(LLAMA, LOAD, settings={"attention": attention})
    assert {each.topology.chip.platform for each in found} == platforms


def test_a_load_that_no_slice_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--fit", "--concurrency", "4096", "--input-len", "100000", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"model": LLAMA, "fits": False, "slices": []}


def test_a_model_that_is_too_large_says_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--topology", "v6e:2x2", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False
    assert answer["node_selector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    assert answer["answer"] == (
        "llama-3.3-70b does not fit v6e:2x2: its weights take 32.9 GiB on each of 4 devices of 32 GiB, which leaves "
        "too little room for sequences; it would with --quantization int8 (16.4 GiB) or on v6e:2x4 (16.4 GiB a device)."
    )


def test_a_mesh_that_is_too_small_says_which_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--topology", "v6e:2x4", "--mesh", "tensor=4", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["answer"].endswith(
        "it would with --quantization int8 (16.4 GiB) or with --mesh tensor=8 (16.4 GiB a device)."
    )
    assert main(["plan", LLAMA, "--topology", "v6e:2x2", "--mesh", "tensor=4", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["answer"].endswith(
        "or on v6e:2x4 with --mesh tensor=8 (16.4 GiB a device)."
    )


def test_what_would_do_is_shared_as_the_workload_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """The weights fit 32 chips, and such a sequence 64 of them."""
    args = ["--topology", "v5e:2x4", "--dtype", "float32", "--input-len", "100000", "--json"]
    assert main(["plan", LLAMA, *args]) == 1
    said = json.loads(capsys.readouterr().out)["answer"]
    assert said.endswith("it would on v5e:8x8 (4.7 GiB a device).")


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


def planned(monkeypatch: pytest.MonkeyPatch, *, settings: Mapping[str, str] | None = None, **changes: Any) -> Plan:
    report = dataclasses.replace(REPORT, **changes)
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: report)
    return plan(LLAMA, parse_topology("v6e:2x4"), LOAD, settings=settings or {})


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
        "decode, 1 x 1152",
        "decode, 64 x 1152",
        "prefill, 1024",
    ]
    assert found.settings == {"mesh": "tensor=8"}


def test_programs_that_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, kv_bytes=15 * GIB)
    assert not found.fits
    assert found.sentence == (
        "llama-3.3-70b does not fit v6e:2x4 so: a device needs 31.7 GiB and has 31.2; it would with --memory-fraction "
        "0.95, a smaller KV cache."
    )
    assert found.service is None


def test_a_pool_of_so_many_pages_is_to_have_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """31.2 GiB less 0.625 of temporaries, 0.061 of code and 16 of weights leave 14.51 for pages of 3 MiB: 4,954."""
    found = planned(monkeypatch, settings={"num_pages": "5120"}, num_pages=5120, kv_bytes=15 * GIB)
    assert found.sentence == (
        "llama-3.3-70b does not fit v6e:2x4 so: a device needs 31.7 GiB and has 31.2; it would with --num-pages 4954, "
        "a smaller KV cache."
    )


def test_programs_that_leave_no_room_for_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself a larger slice would hold two replicas of the very mesh that is too small."""
    hungry = ProgramReport(name="decode", bucket=2048, compile_s=1, temporary_bytes=16 * GIB)
    for settings in ({}, {"num_pages": "5000"}):
        found = planned(monkeypatch, settings=settings, programs=(hungry,))
        assert found.sentence == (
            "llama-3.3-70b does not fit v6e:2x4 so: a device needs 44.1 GiB and has 31.2; it would with "
            "--quantization int8 (8.2 GiB) or on v6e:4x4 with --mesh tensor=16 (8.4 GiB a device)."
        )


def test_a_pool_too_small_for_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, num_pages=19)
    assert not found.fits
    assert found.sentence == (
        "llama-3.3-70b fits v6e:2x4 but not one sequence of 1280 tokens does: the pool holds 1216; it would with "
        "sequences of at most 1216 tokens or with --quantization int8 (8.2 GiB) or on v6e:4x4 with --mesh tensor=16 "
        "(8.4 GiB a device)."
    )


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
        "in turn",
        "room for sequences of a length: 312 of 1024, 78 of 4096; 256 run at once",
        "million output tokens a dollar",
    ):
        assert words in text
    assert "jaxserve serve llama-3.3-70b --mesh tensor=8" in text


def test_reports_survive_the_way_between_processes() -> None:
    assert AotReport.from_json(json.loads(json.dumps(REPORT.as_json()))) == REPORT


def test_fewer_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, num_pages=100)
    assert found.sentence.startswith("llama-3.3-70b fits v6e:2x4: 5 sequences of 1280 tokens at once (of the 64 asked")
    assert found.service is not None
    assert found.service.workload.concurrency == 5


def test_lengths_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: REPORT)
    found = plan(LLAMA, parse_topology("v6e:2x4"), LOAD, settings={}, lengths=(100, 8192, 8193))
    assert found.sequences == {100: 2500, 8192: 39, 8193: 0}, "8193 tokens are one too many for a sequence"
    short = dataclasses.replace(REPORT, max_model_len=256)
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: short)
    assert plan(LLAMA, parse_topology("v6e:2x4"), LOAD, settings={}).sequences == {256: 1250}


def test_more_requests_than_serve_runs_by_default_get_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def report(*args: object, settings: dict[str, str], **kwargs: object) -> AotReport:
        asked.append(settings)
        return REPORT

    monkeypatch.setattr(planning, "aot_report", report)
    load = dataclasses.replace(LOAD, concurrency=3000)
    found = plan(LLAMA, parse_topology("v6e:2x4"), load, settings={})
    assert asked == [{"max_num_seqs": "3000", "max_num_batched_tokens": "3000", "mesh": "tensor=8"}]
    assert found.settings == asked[0]
    with pytest.raises(ConfigError, match="at most 4096 requests at once, not 5000"):
        plan(LLAMA, parse_topology("v6e:2x4"), dataclasses.replace(LOAD, concurrency=5000), settings={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Sequences of 131000 [+] 256 tokens are longer than the 131072 that the model has positions for"),
        ({"max_model_len": "2048"}, "longer than the 2048 that --max-model-len allows; raise it, or lower --input-len"),
    ],
)
def test_sequences_that_are_too_long(settings: dict[str, str], message: str) -> None:
    load = dataclasses.replace(LOAD, input_len=131000)
    with pytest.raises(ConfigError, match=message):
        plan(LLAMA, parse_topology("v6e:2x4"), load, settings=settings)
    with pytest.raises(ConfigError, match=message):
        fit(LLAMA, load, settings=settings)


def test_a_mesh_that_does_not_divide_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: REPORT)
    load = dataclasses.replace(LOAD, concurrency=1)
    found = plan("qwen3-8b", parse_topology("v6e:2x4"), load, settings={"mesh": "tensor=3"})
    assert found.replicas == 2
    assert list(found.notes) == [
        "The slice holds 2 replicas of 3 devices; memory and times are of one, tokens a second of all.",
        "2 of the slice's 8 devices are left over.",
        "tensor=3 does not split the model's 32 query and 8 KV heads evenly: every device computes all of attention "
        "and holds all of the KV cache.",
    ]


def test_chips_of_two_cores_are_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "aot_report", lambda *args, **kwargs: REPORT)
    said = "A TPU v5p has 2 TensorCores, of which the attention kernels use one; times are those of the whole chip."
    for name, expected in (("v5p:2x2x1", [said]), ("v6e:2x2", []), ("tpu7x:2x2x1", []), ("h100:4", [])):
        found = plan("qwen3-8b", parse_topology(name), LOAD, settings={"mesh": "tensor=4"})
        assert [note for note in found.notes if "Core" in note] == expected


def test_prices_by_chip(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen3-8b", "--fit", "--price", "v6e=2.70,h100=3", "--json"]) == 0
    slices = {each["topology"]: each["service"] for each in json.loads(capsys.readouterr().out)["slices"]}
    for name, price in {"v6e:1x1": 2.70, "h100:1": 3}.items():
        expected = 3600 * slices[name]["output_tokens_per_s"] / price
        assert slices[name]["output_tokens_per_dollar"] == pytest.approx(expected)
    assert slices["h200:1"]["output_tokens_per_dollar"] is None


@pytest.mark.parametrize(
    ("price", "message"),
    [("-1", "-1 is not greater than 0"), ("v9=1", "'v9' is no chip"), ("much", "'much' is no number; write 2.70")],
)
def test_prices_that_are_none(capsys: pytest.CaptureFixture[str], price: str, message: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "qwen3-8b", "--fit", "--price", price])
    assert message in capsys.readouterr().err


def test_fit_keeps_to_a_mesh() -> None:
    found = {str(each.topology): each for each in fit("qwen3-8b", LOAD, settings={"mesh": "tensor=2"})}
    assert found["h100:2"].tensor == 2
    assert found["v6e:2x2"].replicas == 2, "one chip is too few for two devices"


def test_heads_are_padded_in_a_tpus_pool() -> None:
    """Of the demo model's 3 KV heads of 64, keys and values are 6 rows of 64 elements: held as 8 of 128."""
    spec, config = spec_of("smollm2-135m"), ServeConfig(model="smollm2-135m")
    assert costs_of(spec, 1, config, "tpu").kv_bytes_per_token == 30 * 8 * 128 * 2
    assert costs_of(spec, 1, config, "gpu").kv_bytes_per_token == 30 * 6 * 64 * 2
