"""From a weight table to reads: which slice of which stored tensor fills which slice of a parameter.

`match` pairs the tensors of a checkpoint with the parameters of a model and refuses anything left over on either
side. `moves_into` then cuts one shard of one parameter into `Move`s, each small enough that its float32 form is a
bounded buffer, and `fetch` reads a move and brings it into the parameter's dimension order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxserve.checkpoint.tensors import Range, TensorReader
from jaxserve.checkpoint.tied import EMBED, HEAD, tensor_of
from jaxserve.core.errors import CheckpointError
from jaxserve.models.family import Part, WeightRule, WeightTable
from jaxserve.models.spec import ModelSpec

MOVE_ELEMENTS = 1 << 20
"""Most elements of one move, so that its float32 form and its temporaries stay under about 20 MB."""

_MOST_LISTED = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The size behind each dimension letter.

    Attributes:
        stored: In the checkpoint.
        served: In the parameters, where each KV head may stand `kv_repeat` times in a row.
        kv_repeat: How often.
    """

    stored: Mapping[str, int]
    served: Mapping[str, int]
    kv_repeat: int


def sizes_of(spec: ModelSpec, served_kv_heads: int) -> Sizes:
    """The sizes of a model whose parameters have this many KV heads, a multiple of the spec's."""
    stored = {
        "V": spec.vocab_size,
        "D": spec.hidden_size,
        "K": spec.num_kv_heads,
        "G": spec.q_per_kv,
        "H": spec.head_dim,
        "F": spec.ffn_size,
    }
    repeat = served_kv_heads // spec.num_kv_heads
    served = stored | {"K": served_kv_heads, "G": spec.q_per_kv // repeat}
    return Sizes(stored=stored, served=served, kv_repeat=repeat)


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A slice of a stored tensor on its way into a slice of a shard.

    Attributes:
        rule: How the tensor is laid out.
        name: Its stored name.
        letters: Interval of each stored letter, in served sizes.
        target: Slices of the shard it fills, layer first for parameters of layers.
    """

    rule: WeightRule
    name: str
    letters: Mapping[str, Range]
    target: tuple[slice | int, ...]


def match(
    table: WeightTable, spec: ModelSpec, params: Iterable[str], stored: Mapping[str, tuple[int, ...]]
) -> dict[str, list[WeightRule]]:
    """The rules that fill each parameter.

    Args:
        table: The family's tensors in this format.
        spec: The model.
        params: Paths of the parameters to fill, without the scales of quantised ones.
        stored: Shape of every tensor in the checkpoint.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of the wrong shape; all are listed.
    """
    wanted = set(params)
    rules = [rule for rule in table.rules if rule.param in wanted]
    if spec.tie_embeddings and (head := tensor_of(table, HEAD)) in stored and tensor_of(table, EMBED) not in stored:
        rules = [replace(rule, name=head) if rule.param == EMBED else rule for rule in rules]
    unfilled = sorted(wanted - {rule.param for rule in rules})
    sizes = sizes_of(spec, spec.num_kv_heads).stored
    expected = {
        name: tuple(prod(sizes[letter] for letter in group) for group in rule.stored)
        for rule in rules
        for name in _names(rule.name, spec.num_layers)
    }
    ignored = table.ignored + (table.ignored_if_tied if spec.tie_embeddings else ())
    ignorable = re.compile("|".join(re.escape(name).replace(r"\{layer\}", r"\d+") for name in ignored) or r"(?!)")
    unexpected = [name for name in stored if name not in expected and not ignorable.fullmatch(name)]
    wrong = [
        f"{name} has {_dims(stored[name])}, not {_dims(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    problems = [
        *_listed("no rule fills", unfilled),
        *_listed("missing", [name for name in expected if name not in stored]),
        *_listed("unexpected", sorted(unexpected)),
        *_listed("wrong shape", wrong),
    ]
    if problems:
        raise CheckpointError(
            f"The checkpoint's tensors do not fit a {spec.family} model of its config: {'; '.join(problems)}."
        )
    return {param: [rule for rule in rules if rule.param == param] for param in wanted}


def moves_into(rules: Iterable[WeightRule], shard: tuple[Range, ...], sizes: Sizes) -> Iterator[Move]:
    """Cuts one shard of a parameter into moves, layer after layer.

    Args:
        rules: The rules that fill the parameter.
        shard: The shard's interval in each dimension of the whole parameter.
        sizes: Sizes of the letters.
    """
    rules = tuple(rules)
    layered = any("{layer}" in rule.name for rule in rules)
    layers = range(*shard[0]) if layered else range(1)
    dims = shard[1:] if layered else shard
    for layer in layers:
        lead: tuple[int, ...] = (layer - shard[0][0],) if layered else ()
        for rule in rules:
            placed = _place(rule, dims, sizes)
            if placed is not None:
                letters, target = placed
                yield from _chunked(rule, rule.name.format(layer=layer), letters, target, lead)


def fetch(reader: TensorReader, move: Move, sizes: Sizes) -> NDArray[Any]:
    """Reads a move's slice and brings it into the order of the parameter's dimensions."""
    rule = move.rule
    sized = sizes.served  # K * G is the same product in both, so query heads need no other treatment
    repeated = rule.part in (Part.KEY, Part.VALUE) and sizes.kv_repeat > 1
    stored = dict(move.letters)
    if repeated:
        start, stop = stored["K"]
        stored["K"] = (start // sizes.kv_repeat, -(-stop // sizes.kv_repeat))
        sized = {**sized, "K": sizes.stored["K"]}
    ranges, inner = [], []
    shape: list[int] = []
    for group in rule.stored:
        rest = prod(sized[letter] for letter in group[1:])
        start, stop = stored[group[0]]
        ranges.append((start * rest, stop * rest))
        shape += [stop - start, *(sized[letter] for letter in group[1:])]
        inner += [slice(None), *(slice(*stored[letter]) for letter in group[1:])]
    array = reader.read(move.name, tuple(ranges)).reshape(shape)
    letters = "".join(rule.stored)
    if rule.interleaved:
        array = _halves(array, letters.index("H"))
    array = array[tuple(inner)]
    if repeated:
        heads = np.arange(*move.letters["K"]) // sizes.kv_repeat - stored["K"][0]
        array = np.take(array, heads, axis=letters.index("K"))
    array = np.transpose(array, [letters.index(letter) for letter in rule.order if letter != "."])
    return np.expand_dims(array, rule.order.index(".")) if "." in rule.order else array


def _names(pattern: str, num_layers: int) -> list[str]:
    return [pattern.format(layer=layer) for layer in range(num_layers)] if "{layer}" in pattern else [pattern]


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return [f"{kind}: {', '.join(names[:_MOST_LISTED])}{more}"]


def _place(rule: WeightRule, dims: tuple[Range, ...], sizes: Sizes) -> tuple[dict[str, Range], list[Range]] | None:
    """The letters a rule contributes to a shard and where they go in it; None if it misses the shard."""
    queries = sizes.served["G"]
    start = {Part.KEY: queries, Part.VALUE: queries + 1, Part.UP: 1}.get(rule.part, 0)
    letters: dict[str, Range] = {}
    target: list[Range] = []
    for letter, (low, high) in zip(rule.order, dims, strict=True):
        fused = letter == "." or (letter == "G" and rule.part is Part.QUERY)
        stop = start + (1 if letter == "." else queries) if fused else high
        first, last = (max(low, start), min(high, stop)) if fused else (low, high)
        if first >= last:
            return None
        if letter != ".":
            letters[letter] = (first, last)
        target.append((first - low, last - low))
    return letters, target


def _chunked(
    rule: WeightRule, name: str, letters: dict[str, Range], target: list[Range], lead: tuple[int, ...]
) -> Iterator[Move]:
    """Splits along the outermost stored letter, an output channel in every layout, so that no scale is split."""
    outer = rule.stored[0][0]
    axis = rule.order.index(outer)
    start, stop = letters[outer]
    row = prod(high - low for low, high in letters.values()) // (stop - start)
    step = max(1, MOVE_ELEMENTS // row)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        offset = target[axis][0] - start
        placed = [*target[:axis], (low + offset, high + offset), *target[axis + 1 :]]
        yield Move(
            rule=rule,
            name=name,
            letters=letters | {outer: (low, high)},
            target=(*lead, *(slice(*interval) for interval in placed)),
        )


def _halves(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Undoes llama.cpp's permutation: pairs of neighbours [H/2, 2] become two halves [2, H/2]."""
    shape = array.shape
    pairs = array.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return np.swapaxes(pairs, axis, axis + 1).reshape(shape)
