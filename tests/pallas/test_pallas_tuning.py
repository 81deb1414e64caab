"""Tuned tiles: what a file holds is what a call takes if it fits, and the heuristic's tiles otherwise."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import test_pallas_tpu_decode
import test_pallas_tpu_prefill
from paged_attention_cases import Length, Shape, build

from jaxserve.pallas import tuning
from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.pallas.paged_attention.tpu import decode_tiles, prefill_tiles
from jaxserve.pallas.paged_attention.tpu.decode_tiles import DecodeTiles, choose_decode_tiles, heuristic_decode_tiles
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import Core, PrefillTiles, Sizes, choose_tiles, heuristic_tiles
from jaxserve.pallas.tuning import Tuned, read_tuned, tuned_tiles, write_tuned
from jaxserve.sharding.chips import chip_named

CORE = Core(wide_matmul=True, vmem_bytes=64 << 20, chip="v6e")
SIZES = Sizes(
    page_size=64,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    query_dtype=jnp.dtype(jnp.bfloat16),
    kv_dtype=jnp.dtype(jnp.bfloat16),
    max_tokens=512,
    max_context=4096,
    sliding_window=None,
)
PROBLEM = "32,8 h128 p64 bfloat16 bfloat16"
PREFILL = replace(heuristic_tiles(SIZES, CORE), pages=4, unroll=6)
DECODE = DecodeTiles(pages=2, items=6)


def entry(tiles: PrefillTiles | DecodeTiles) -> Tuned:
    return Tuned(by="schedule, libtpu 1.2.3", gain=1.0712345, tiles=asdict(tiles))


def holds(monkeypatch: pytest.MonkeyPatch, **tiles: PrefillTiles | DecodeTiles) -> None:
    """Makes the table of v6e hold these tiles for the problem."""

    def lookup(chip: str | None, kernel: str, problem: str) -> Any:
        there = chip == "v6e" and problem == PROBLEM and kernel in tiles
        return asdict(tiles[kernel]) if there else None

    monkeypatch.setattr(prefill_tiles, "tuned_tiles", lookup)
    monkeypatch.setattr(decode_tiles, "tuned_tiles", lookup)


def test_a_file_is_sorted_and_read_back(tmp_path: Path) -> None:
    table = {"prefill": {"b": entry(PREFILL), "a": entry(PREFILL)}, "decode": {PROBLEM: entry(DECODE)}, "none": {}}
    path = write_tuned("v6e", table, tmp_path)
    assert path == tmp_path / "v6e.json"
    found = read_tuned("v6e", tmp_path)
    assert list(found) == ["decode", "prefill"]
    assert list(found["prefill"]) == ["a", "b"]
    assert found["decode"][PROBLEM] == Tuned(by="schedule, libtpu 1.2.3", gain=1.071, tiles=asdict(DECODE))
    assert PrefillTiles(**found["prefill"]["a"].tiles) == PREFILL  # type: ignore[arg-type]  # JSON's fields
    assert read_tuned("v5e", tmp_path) == {}


def test_there_are_no_tuned_tiles_without_a_chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tuned("v6e", {"decode": {PROBLEM: entry(DECODE)}}, tmp_path)
    monkeypatch.setattr(tuning.read_tuned, "__defaults__", (tmp_path,))
    assert tuned_tiles("v6e", "decode", PROBLEM) == asdict(DECODE)
    assert tuned_tiles(None, "decode", PROBLEM) is None
    assert tuned_tiles("v6e", "prefill", PROBLEM) is None
    assert tuned_tiles("v6e", "decode", PROBLEM + " ") is None


def test_tuned_tiles_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    holds(monkeypatch, prefill=PREFILL, decode=DECODE)
    assert choose_tiles(SIZES, CORE) == PREFILL
    assert choose_decode_tiles(SIZES, CORE) == DECODE


@pytest.mark.parametrize(
    ("sizes", "core"),
    [
        ({"page_size": 128}, {}),
        ({"kv_dtype": jnp.dtype(jnp.int8)}, {}),
        ({"sliding_window": 300}, {}),
        ({"max_context": 64, "max_tokens": 64}, {}),
        ({}, {"chip": None}),
        ({}, {"chip": "v5e"}),
        ({}, {"vmem_bytes": 24 << 20}),
    ],
)
def test_calls_that_tuned_tiles_are_not_for_take_the_heuristic(
    sizes: dict[str, Any], core: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    holds(monkeypatch, prefill=PREFILL, decode=replace(DECODE, items=8))
    call, here = replace(SIZES, **sizes), replace(CORE, **core)
    assert choose_tiles(call, here) == heuristic_tiles(call, here)
    assert choose_decode_tiles(call, here) == heuristic_decode_tiles(call, here)


@pytest.mark.parametrize("tiles", [DecodeTiles(pages=2, items=9), DecodeTiles(pages=64, items=8)])
def test_a_decode_s_tiles_that_do_not_fit_are_not_taken(tiles: DecodeTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine items ask for more rows of the page table than there are; 4,096 tokens of 8 heads for too much VMEM."""
    holds(monkeypatch, decode=tiles)
    assert choose_decode_tiles(SIZES, CORE) == heuristic_decode_tiles(SIZES, CORE)


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_comes_with_the_package(path: Path) -> None:
    """Every file is of a chip, every entry of a kernel's own fields, and better than the heuristic."""
    chip = chip_named(path.stem)
    classes: dict[str, type[Any]] = {prefill_tiles.KERNEL: PrefillTiles, decode_tiles.KERNEL: DecodeTiles}
    entries = [(kernel, each) for kernel, problems in read_tuned(chip.name).items() for each in problems.values()]
    assert entries
    for kernel, each in entries:
        assert set(each.tiles) == {field.name for field in fields(classes[kernel])}
        assert each.gain > 1.03


PACKAGED = [
    pytest.param(kernel, problem, each.tiles, id=f"{path.stem} {kernel} {problem}")
    for path in sorted(tuning.FOLDER.glob("*.json"))
    for kernel, problems in read_tuned(path.stem).items()
    for problem, each in problems.items()
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "problem", "tiles"), PACKAGED)
def test_tiles_that_come_with_the_package_attend_right(kernel: str, problem: str, tiles: dict[str, int]) -> None:
    """In the interpreter: several sequences, contexts of a tile and a bit, of less, and of exactly one."""
    match = re.fullmatch(r"(\d+),(\d+) h128 p(\d+) bfloat16 bfloat16", problem)
    assert match is not None
    num_heads, num_kv_heads, page_size = map(int, match.groups())
    tile = tiles["pages"] * page_size
    contexts = (tile + 100, 70, tile, 2 * tile)
    new = 1 if kernel == decode_tiles.KERNEL else 48
    shape = Shape(
        max_seqs=len(contexts),
        max_tokens=new * len(contexts),
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=128,
        page_size=page_size,
        pages_per_seq=2 * tiles["pages"],
    )
    lengths = [Length(cached=context - new, new=new) for context in contexts]
    case = build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=4)
    plain = AttentionConfig(scale=0.2, sliding_window=None, soft_cap=None)
    if kernel == decode_tiles.KERNEL:
        test_pallas_tpu_decode.check(case, plain, DecodeTiles(**tiles))
    else:
        test_pallas_tpu_prefill.check(case, plain, PrefillTiles(**tiles))  # type: ignore[arg-type]  # JSON's fields
