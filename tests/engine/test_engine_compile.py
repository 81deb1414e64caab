"""Everything is compiled before the engine is ready, nothing after, and nothing twice thanks to the cache on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from engine_conformance import make_request
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import Compiled, compiled, counting, generate_all, serving, start

from jaxserve.engine.batch import Buckets
from jaxserve.engine.compile import CompileCounter, compile_programs, compiles_at_once
from jaxserve.engine.programs import programs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> Compiled:
    return compiled()


def ladders() -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, 600), min_size=1, max_size=8).map(lambda sizes: tuple(sorted(sizes)))


@given(tokens=ladders(), seqs=ladders(), data=st.data())
def test_every_step_has_a_bucket(tokens: tuple[int, ...], seqs: tuple[int, ...], data: st.DataObject) -> None:
    """The smallest that holds it; its page table has a row for each sequence the step can have."""
    buckets = Buckets(tokens=tokens, seqs=seqs)
    num_tokens = data.draw(st.integers(1, tokens[-1]))
    num_seqs = data.draw(st.integers(1, min(num_tokens, seqs[-1])))
    assert buckets.tokens_for(num_tokens) == min(size for size in tokens if size >= num_tokens)
    assert buckets.seqs_for(num_seqs) == min(size for size in seqs if size >= num_seqs)
    assert num_seqs <= buckets.rows_for(buckets.tokens_for(num_tokens)) <= seqs[-1]


def test_every_step_within_the_limits_is_compiled(tiny: Compiled) -> None:
    buckets, resolved = tiny.replica.buckets, tiny.resolved
    used = {("admit", 0), ("copy_pages", 0), ("allocate", 0)}
    for num_tokens in range(1, resolved.max_num_batched_tokens + 1):
        used |= {(name, buckets.tokens_for(num_tokens)) for name in ("decode", "score")}
    used |= {("head", buckets.seqs_for(num_seqs)) for num_seqs in range(1, resolved.max_num_seqs + 1)}
    used |= {("hold", index) for index in range(len(tiny.replica.loaded_otherwise()))}
    assert used == set(tiny.executables)
    assert {program.key for program in programs(tiny.replica)} == used


async def test_nothing_is_compiled_after_ready(tiny: Compiled) -> None:
    counter = CompileCounter()
    async with serving(start(tiny, counter=counter)) as engine:
        with counting(counter):
            requests = [
                make_request(f"r{i}", prompt=tuple(range(5, 6 + 9 * i)), n=1 + i % 3, logprobs=i, prompt_logprobs=i)
                for i in range(8)
            ]
            await generate_all(engine, requests)
        assert engine.stats().num_compiles_after_ready == counter.count == 0


def test_counter_counts() -> None:
    counter = CompileCounter()

    def compile_one(size: int) -> None:
        jax.jit(lambda x: x * 2 + size)(jnp.ones((size,))).block_until_ready()

    compile_one(3)
    assert counter.count == 0
    with counting(counter):
        compile_one(1237)
        counted = counter.count
        assert counted >= 1
        assert counter.seconds > 0
    compile_one(1238)
    assert counter.count == counted
    counter.stop()


def test_other_shapes_raise_instead_of_compiling(tiny: Compiled) -> None:
    with pytest.raises(TypeError):
        tiny.executables["score", 8](tiny.params, jnp.zeros((9, 64)), jnp.zeros((9,), jnp.int32))


def test_no_parameter_is_held_twice(tiny: Compiled) -> None:
    """Those that programs take in another form are given up; a model may fill more than half of the memory."""
    loaded = {path: value.copy() for path, value in tiny.params.items()}
    held = {path: tiny.replica.hold(path, value, tiny.executables) for path, value in loaded.items()}
    otherwise = set(tiny.replica.loaded_otherwise())
    assert otherwise
    assert {path for path, value in loaded.items() if value.is_deleted()} == otherwise
    assert not any(value.is_deleted() for value in held.values())


def test_progress_counts_programs(tiny: Compiled) -> None:
    seen: list[tuple[str, int, int]] = []
    cheap = [program for program in programs(tiny.replica) if program.key[0] in {"admit", "copy_pages"}]
    executables = compile_programs(cheap, num_threads=1, progress=lambda *args: seen.append(args))
    assert list(executables) == [program.key for program in cheap]
    assert seen == [("compile", 1, 2), ("compile", 2, 2)]


@pytest.mark.parametrize(("kind", "at_once"), [("TPU7x", 1), ("TPU v6 lite", 2), ("cpu", 2)])
def test_a_compiler_that_dies_of_company_compiles_alone(kind: str, at_once: int) -> None:
    assert compiles_at_once(kind) == at_once


START = """
import asyncio, json, sys
from dataclasses import replace
from pathlib import Path
import jax
from jax import monitoring
events = {}
monitoring.register_event_listener(lambda event, **_: events.update({event: events.get(event, 0) + 1}))
from jaxserve.engine.compile import enable_persistent_cache
enable_persistent_cache(Path(sys.argv[1]))
from tiny_engine import SMALL, compiled, generate_all, start, tokens_by_index
from engine_conformance import make_request
model = compiled(config=replace(SMALL, max_num_batched_tokens=8))
built = dict(events)

async def main():
    engine = start(model)
    requests = [make_request(f"r{i}", temperature=i % 2 / 1, seed=i, prompt=tuple(range(4, 10 + i))) for i in range(6)]
    results = await generate_all(engine, requests)
    await engine.close()
    return [tokens_by_index(events)[0] for events in results]

tokens = asyncio.run(main())
prefix = "/jax/compilation_cache/cache_"
print(json.dumps({"hits": built.get(prefix + "hits", 0), "misses": events.get(prefix + "misses", 0),
                  "programs": len(model.executables), "tokens": tokens}))
"""


def test_second_start_compiles_nothing_and_gives_the_same_tokens(tmp_path: Path) -> None:
    def begin() -> dict[str, object]:
        paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]
        done = subprocess.run(
            [sys.executable, "-c", START, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, object] = json.loads(done.stdout)
        return result

    first, second = begin(), begin()
    assert isinstance(first["misses"], int)
    assert isinstance(first["programs"], int)
    assert isinstance(second["hits"], int)
    assert first["misses"] >= first["programs"] >= 8
    assert second["misses"] == 0
    assert second["hits"] >= first["programs"]
    assert second["tokens"] == first["tokens"]


@pytest.mark.parametrize("name", ["decode", "head", "score"])
def test_float32_is_not_rounded_to_what_matrix_units_like(tiny: Compiled, name: str) -> None:
    """No CPU would, but TPUs and GPUs round the operands of a matmul unless they are told not to."""
    program = next(each for each in programs(tiny.replica) if each.key[0] == name)
    matmuls = [line for line in program.lower().as_text().splitlines() if "stablehlo.dot_general" in line]
    assert matmuls
    assert [line for line in matmuls if "precision = [HIGHEST, HIGHEST]" not in line] == []
