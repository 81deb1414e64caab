"""Programs of a replica compiled for a slice that is not here: memory, collectives, and a bundle of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.checkpoint.presets import default_presets_dir, preset_names
from jaxserve.checkpoint.sources import spec_of
from jaxserve.cli import main
from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.programs import Program
from jaxserve.kv.pool import tiled
from jaxserve.launch import aot_suite
from jaxserve.launch.aot import AotReport, ProgramReport, aot_report, compile_report, config_for, optimised_hlo
from jaxserve.launch.aot_suite import (
    MAX_DECODE_TEMPORARY_BYTES,
    Case,
    Outcome,
    default_topologies_dir,
    expected_collectives,
    problems_of,
    read_cases,
    run_cases,
)
from jaxserve.launch.bundle import open_bundle
from jaxserve.launch.compile import compile_bundle
from jaxserve.launch.fit import costs_of
from jaxserve.models.costs import CostModel
from jaxserve.models.decoder import Blueprint
from jaxserve.sharding.collectives import Collective
from jaxserve.sharding.mesh import abstract_mesh
from jaxserve.sharding.topology import parse_topology, run_deviceless

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="JAX's CUDA plugin is not installed",
)

MODEL = "smollm2-135m"
TINY = Path(__file__).parents[1] / "goldens" / "tiny" / "llama"
SPEC = spec_of("llama-3.1-8b")
COSTS = CostModel(
    blueprint=Blueprint.of(SPEC, dtype=jnp.dtype("bfloat16")),
    mesh=abstract_mesh(tensor=8),
    kv_bytes_per_token=0,
    kv_heads=8,
)
RESIDUAL = 256 * 4096 * 2
DECODE = ProgramReport(
    name="decode",
    bucket=256,
    compile_s=1.0,
    temporary_bytes=1 << 20,
    collectives=(Collective(kind="all-reduce", shape="bf16[256,4096]", count=65, num_bytes=RESIDUAL),),
)


def report_of(*programs: ProgramReport) -> AotReport:
    return AotReport(
        model=MODEL,
        topology="v6e:2x4",
        mesh={"data": 1, "expert": 1, "tensor": 8},
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_size=64,
        num_pages=8,
        max_model_len=512,
        token_buckets=(16, 256, 2048),
        seq_buckets=(16, 256),
        weight_bytes=1,
        kv_bytes=2,
        state_bytes=3,
        programs=programs,
    )


@needs_libtpu
def test_steps_compile_for_a_slice() -> None:
    """Two of a mesh's devices split what divides: 9 query heads do not, the feed-forward block and the tables do."""
    settings = {"mesh": "tensor=2", "max_num_seqs": "16", "max_model_len": "1024", "num_pages": "64"}
    done: list[int] = []
    report = aot_report(
        MODEL,
        parse_topology("v6e:2x4"),
        settings=settings,
        wanted=(("head", 16), ("decode", 16), ("copy_pages", 0), ("allocate", 0)),
        progress=lambda what, count, total: done.append(count),
    )
    assert not report.failures
    assert done == [0, 1, 2, 3, 4]
    head, decode, copy, allocate = report.programs
    assert [each.key for each in report.programs] == [("head", 16), ("decode", 16), ("copy_pages", 0), ("allocate", 0)]
    assert head.aliased_bytes >= report.state_bytes
    assert all(each.serialized_bytes > 10_000 for each in report.programs)
    assert report.kv_bytes == 30 * 64 * 64 * 8 * 128 * 2, "6 rows of 64 lanes are held as 8 of 128"
    for each in (decode, copy):
        assert each.aliased_bytes >= report.kv_bytes, "the pool is changed in place"
        assert each.temporary_bytes < MAX_DECODE_TEMPORARY_BYTES
        assert report.kv_bytes <= each.argument_bytes
    assert allocate.output_bytes >= report.kv_bytes
    assert decode.argument_bytes >= report.kv_bytes + report.weight_bytes
    spec = spec_of(MODEL)
    costs = CostModel(
        blueprint=Blueprint.of(spec, dtype=jnp.dtype("bfloat16")),
        mesh=abstract_mesh(tensor=2),
        kv_bytes_per_token=0,
        kv_heads=3,
    )
    assert list(problems_of(report, costs)) == []
    assert AotReport.from_json(json.loads(json.dumps(report.as_json()))) == report


@needs_libtpu
def test_what_int8_weights_exchange() -> None:
    """Sums of integers and maxima of rows, which floating-point weights do without."""
    settings = {"mesh": "tensor=2", "quantization": "int8", "max_model_len": "1024", "num_pages": "64"}
    topology, model = parse_topology("v6e:2x4"), "qwen3-0.6b"
    report = aot_report(model, topology, settings=settings, wanted=(("decode", 16),))
    config = config_for(model, settings, topology)
    costs = costs_of(spec_of(model), 2, config, "tpu")
    assert sorted(expected_collectives(report.programs[0], costs).items()) == [
        (("all-reduce", 16 * 4), 57),
        (("all-reduce", 16 * 1024), 1),
        (("all-reduce", 16 * 1024 * 4), 56),
    ]
    assert list(problems_of(report, costs)) == []


@needs_libtpu
def test_weights_are_not_copied_on_v7x() -> None:
    """There the compiler likes taller tiles than arguments have, and a table of few columns turned round.

    A copy of the kernels is some 150 MiB, one of the table 60. libtpu 0.0.42 still copies the queries' kernels, 36 MiB;
    later ones copy nothing.
    """
    settings = {"mesh": "tensor=1", "max_num_seqs": "16", "max_model_len": "1024", "num_pages": "64"}
    report = aot_report(MODEL, parse_topology("tpu7x:2x2x1"), settings=settings, wanted=(("decode", 16),))
    [decode] = report.programs
    assert decode.failure is None
    assert decode.temporary_bytes < 40 << 20
    assert decode.collectives == ()


@needs_cuda
def test_steps_compile_for_gpus() -> None:
    model, spec = "qwen3-0.6b", spec_of("qwen3-0.6b")
    settings = {"mesh": "tensor=2", "max_num_seqs": "16", "max_model_len": "1024", "num_pages": "64"}
    report = aot_report(model, parse_topology("h100:2"), settings=settings, wanted=(("head", 16), ("decode", 16)))
    assert not report.failures
    head, decode = report.programs
    assert decode.aliased_bytes >= report.kv_bytes, "the pool is changed in place"
    assert decode.argument_bytes >= report.kv_bytes + report.weight_bytes
    assert {each.kind for each in head.collectives} == {"all-gather"}
    assert {each.kind for each in decode.collectives} == {"all-reduce"}
    assert sum(each.count for each in decode.collectives) == 2 * spec.num_layers + 1
    assert decode.temporary_bytes < spec.hidden_size * 2 * spec.ffn_size, "no layer's weights are copied"


@pytest.mark.parametrize(("said", "failure"), [("", "RuntimeError"), ("\nno room\nat all", "no room")])
def test_a_failure_is_the_first_line_of_what_the_compiler_says(said: str, failure: str) -> None:
    def fails() -> None:
        raise RuntimeError(said)

    program = Program(key=("decode", 16), function=jax.jit(fails), args=())
    assert compile_report(program, jax.make_mesh((1,), ("tensor",))).failure == failure


@pytest.mark.parametrize(
    ("ours", "another"),
    [
        (".cl_1.after_optimizations", ".cl_1.after_optimizations-buffer-assignment"),
        (".sm_9.0a_gpu_after_optimizations", ".sm_9.0a_gpu_after_optimizations-live-range"),
    ],
)
def test_the_optimised_program_is_found_among_what_a_compiler_dumps(tmp_path: Path, ours: str, another: str) -> None:
    (tmp_path / f"module_0001.jit_decode{ours}.txt").write_text("HloModule jit_decode")
    (tmp_path / f"module_0001.jit_decode{another}.txt").write_text("else")
    (tmp_path / "module_0001.jit_decode.before_optimizations.txt").write_text("before")
    assert optimised_hlo(tmp_path) == "HloModule jit_decode"


@needs_libtpu
def test_settings_that_cannot_be_served_are_the_callers() -> None:
    with pytest.raises(ConfigError, match="max_model_len=999999 is beyond the model's 8192"):
        aot_report(MODEL, parse_topology("v6e:1x1"), settings={"max_model_len": "999999"}, wanted=())


def test_one_process_that_fails_ends_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread waits for as long as its process lives, and nobody wants the answer any more."""
    asked, ended = threading.Event(), threading.Event()
    ended_in_time = []

    class Worker:
        def ask(self, request: dict[str, int], on_message: object) -> dict[str, int]:
            if request["part"] == 0:
                assert asked.wait(10)
                raise ConfigError("no")
            asked.set()
            ended_in_time.append(ended.wait(10))
            return {}

    @contextmanager
    def start(*_: object) -> Iterator[Worker]:
        try:
            yield Worker()
        finally:
            ended.set()

    monkeypatch.setattr("jaxserve.launch.aot.deviceless", start)
    with pytest.raises(ConfigError, match="no"):
        aot_report(MODEL, parse_topology("v6e:1x1"))
    assert ended_in_time == [True]


@pytest.mark.parametrize(
    ("rows", "lanes", "dtype", "held"),
    [
        (2, 128, "bfloat16", (2, 128)),
        (6, 64, "bfloat16", (8, 128)),
        (12, 128, "bfloat16", (16, 128)),
        (16, 80, "float32", (16, 128)),
        (2, 128, "int8", (4, 128)),
        (2, 256, "float8_e4m3fn", (4, 256)),
    ],
)
def test_tiles(rows: int, lanes: int, dtype: str, held: tuple[int, int]) -> None:
    """As libtpu lays out arrays whose dimensions are in order."""
    assert tiled(rows, lanes, jnp.dtype(dtype)) == held


def test_collectives_that_a_sharding_calls_for() -> None:
    """32 layers sum twice, the embedding once; a head gathers its logits, a scorer a block of 32 rows at a time."""
    assert expected_collectives(DECODE, COSTS) == Counter({("all-reduce", RESIDUAL): 65})
    head = ProgramReport(name="head", bucket=64, compile_s=1.0)
    assert expected_collectives(head, COSTS) == Counter({("all-gather", 64 * 128256 * 4): 1})
    score = ProgramReport(name="score", bucket=2048, compile_s=1.0)
    assert expected_collectives(score, COSTS) == Counter({("all-gather", 32 * 128256 * 4): 64})
    assert not expected_collectives(ProgramReport(name="admit", bucket=0, compile_s=1.0), COSTS)


def test_what_is_wrong_is_said() -> None:
    assert list(problems_of(report_of(DECODE), COSTS)) == []
    failed = ProgramReport(name="head", bucket=16, compile_s=1.0, failure="no room")
    second_pool = ProgramReport(
        name="decode",
        bucket=256,
        compile_s=1.0,
        temporary_bytes=70 << 20,
        collectives=(
            *DECODE.collectives,
            Collective(kind="all-gather", shape="bf16[4096,14336]", count=32, num_bytes=117440512),
        ),
    )
    problems = list(problems_of(report_of(failed, second_pool), COSTS))
    assert problems[0] == "head 16 does not compile: no room"
    assert problems[1] == "decode 256 needs 70 MiB besides its arguments"
    assert "('all-gather', 117440512): 32" in problems[2]
    assert len(problems) == 3


def test_configured_cases() -> None:
    """Every preset on the four kinds of slice that are looked after, and 8B on one chip."""
    cases = {(str(case.topology), case.model) for case in read_cases(default_topologies_dir())}
    slices = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
    presets = preset_names(default_presets_dir())
    assert {(name, model) for name in slices for model in presets} | {("v6e:1x1", "llama-3.1-8b")} == cases


def test_a_model_that_is_too_large_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"topology": "v5e:2x4", "models": ["llama-3.3-70b"]}')
    [outcome] = run_cases(read_cases(tmp_path))
    assert outcome.report is None
    assert outcome.problems == ()
    assert outcome.weight_bytes > 0.9 * 16 * 2**30
    (tmp_path / "one.json").write_text('{"topology": "v5e:2x4"}')
    with pytest.raises(ConfigError, match='needs "topology"'):
        read_cases(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--only", "nosuch"),
            "--only: 'nosuch' is none of the slices tpu7x:2x2x1, v5e:2x4, .* presets .*llama-3.1-8b",
        ),
        (("--only", "v6e-1x1"), "'v6e-1x1' is none of the slices .*v6e:1x1"),
        (("--only", ""), "'' is none of"),
        (("--only", "v5e:2x4", "--only", "v6e:2x4"), "nothing is at once v5e:2x4 and v6e:2x4"),
        (("--topologies", "/nonexist"), "--topologies: /nonexist has no .json file"),
    ],
)
def test_nothing_to_check_is_no_success(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["aot", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_prints_whole_names_and_fails_on_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcomes(cases: list[Case], **kwargs: object) -> Iterator[Outcome]:
        for case in cases:
            problems = ("decode 256 needs 99 MiB",) if case.model == "qwen3-0.6b" else ()
            yield Outcome(case=case, seconds=1.0, weight_bytes=1, report=report_of(DECODE), problems=problems)

    monkeypatch.setattr(aot_suite, "run_cases", outcomes)
    assert main(["aot", "--only", "tpu7x:2x2x1", "--only", "llama-3.3-70b"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "70b" in line]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["tpu7x:2x2x1", "llama-3.3-70b", "1", "0.00", "0.00", "0.00", "1.0", "0.0", "0.0", "0.0 of 96", "1"]
    assert main(["aot", "--only", "qwen3-0.6b", "--only", "v5e:2x4"]) == 1
    assert "qwen3-0.6b on v5e:2x4: decode 256 needs 99 MiB" in capsys.readouterr().out
    assert main(["aot", "--only", "qwen3-0.6b", "--only", "v5e:2x4", "--json"]) == 1
    [shown] = json.loads(capsys.readouterr().out)
    assert shown["case"] == {"model": "qwen3-0.6b", "topology": "v5e:2x4"}
    assert shown["problems"] == ["decode 256 needs 99 MiB"]
    assert AotReport.from_json(shown["report"]) == report_of(DECODE)


SQUARE = "0,0,0/0 1,0,0/0 0,1,0/0 1,1,0/0"


def differences(bundle: Path, topology: str) -> list[str]:
    """What keeps a bundle of the tiny model from the first devices of a slice."""
    request = {"bundle": str(bundle), "model": str(TINY), "topology": topology}
    found: list[str] = run_deviceless(parse_topology(topology), "deviceless_bundle", request)["differences"]
    return found


@pytest.mark.parametrize(
    ("topology", "kind", "places", "another"),
    [
        pytest.param("v6e:2x4", "TPU v6 lite", SQUARE, "v6e:4x4", marks=needs_libtpu),
        pytest.param("h200:4", "NVIDIA H200", None, None, marks=needs_cuda),
    ],
)
def test_a_bundle_for_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: str, kind: str, places: str | None, another: str | None
) -> None:
    """Written without its devices, read back, and refused where as many chips are part of another grid."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    settings = {"mesh": "tensor=4", "max_num_seqs": "4", "max_num_batched_tokens": "16", "num_pages": "32"}
    (tmp_path / "key").write_text("a secret")
    out = tmp_path / "out"
    written = compile_bundle(str(TINY), topology, out, settings=settings, key=tmp_path / "key")
    bundle = open_bundle(out, b"a secret")
    assert (bundle.topology, bundle.origin.device_kind) == (topology, kind)
    assert bundle.origin.places == (places and f"{places} of 2x4x1")
    assert bundle.origin.mesh == {"data": 1, "expert": 1, "tensor": 4}
    assert bundle.origin.compiler is not None
    assert bundle.cpu_features == ()
    assert written.num_programs == len(bundle.entries)
    assert written.num_bytes == sum(path.stat().st_size for path in out.glob("*.bin"))
    assert {entry.name for entry in bundle.entries} >= {"head", "decode", "score", "admit", "copy_pages", "allocate"}
    for entry in bundle.entries:
        assert hashlib.sha256((out / entry.file).read_bytes()).hexdigest() == entry.sha256
    assert bundle.adopt(ServeConfig(model=str(TINY))).num_pages == 32
    assert differences(out, topology) == []
    if another is not None:
        assert differences(out, another) == [f"devices at {places} of 2x4x1 (here {places} of 4x4x1)"]
