"""What a serving benchmark sends: prompts of a given length, and when each leaves.

Prompts are drawn from a seed. As token ids they have an exact length on any server that takes ids; as text they are
words, and the server says afterwards how many tokens they were. Prompts may begin with one of a few shared prefixes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompt = str | tuple[int, ...]

_WORDS_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information
back parent face others level office door health person art war history party result change morning reason
research girl guy moment air teacher force education foot boy age policy music market sense nation plan college
interest death experience effect use class control field development role effort rate heart drug show leader
light voice wife police mind price report decision son view relationship town road arm difference value building
action season society tax director position player record paper space ground form event official matter center
couple site project activity star table court produce energy
"""

WORDS = tuple(_WORDS_TEXT.split())
"""Common English words; with a space before it, each is about one token in any English vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Lengths of the requests.

    Attributes:
        num_requests: How many.
        input_tokens: Length of a prompt, shared prefix included.
        output_tokens: Tokens to generate.
        length_spread: Lengths are drawn evenly from [(1 - spread) x, (1 + spread) x]; 0 makes all equal.
        prefix_tokens: Tokens at the beginning that requests share.
        num_prefixes: How many different shared prefixes there are.
    """

    num_requests: int
    input_tokens: int
    output_tokens: int
    length_spread: float = 0.0
    prefix_tokens: int = 0
    num_prefixes: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One request to send.

    Attributes:
        prompt: Text or token ids.
        output_tokens: Tokens to generate.
    """

    prompt: Prompt
    output_tokens: int


def make_items(shape: Shape, *, seed: int, token_ids: Sequence[int] | None) -> list[Item]:
    """Draws the requests.

    Args:
        shape: Their lengths.
        seed: The same seed draws the same requests.
        token_ids: Ordinary tokens to make prompts of; None makes prompts of words.
    """
    rng = random.Random(seed)
    source: Sequence[int | str] = WORDS if token_ids is None else token_ids
    prefixes = [rng.choices(source, k=shape.prefix_tokens) for _ in range(shape.num_prefixes)]
    items = []
    for number in range(shape.num_requests):
        prefix = prefixes[number % len(prefixes)]
        length = max(_spread(rng, shape.input_tokens, shape.length_spread) - len(prefix), 1)
        units = prefix + rng.choices(source, k=length)
        output_tokens = max(_spread(rng, shape.output_tokens, shape.length_spread), 1)
        items.append(Item(prompt=_prompt(units), output_tokens=output_tokens))
    return items


def poisson_times(num_requests: int, *, rate: float, seed: int) -> list[float]:
    """When requests of a Poisson process leave, in seconds from the start; the first leaves at once.

    Args:
        num_requests: How many.
        rate: Mean requests a second; infinity sends all at once.
        seed: The same seed draws the same times.
    """
    rng = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(num_requests):
        times.append(now)
        now += rng.expovariate(rate) if rate != float("inf") else 0.0
    return times


def _prompt(units: Sequence[int | str]) -> Prompt:
    ids = tuple(unit for unit in units if isinstance(unit, int))
    return ids or " ".join(str(unit) for unit in units)


def _spread(rng: random.Random, mean: int, spread: float) -> int:
    return rng.randint(round(mean * (1 - spread)), round(mean * (1 + spread)))
