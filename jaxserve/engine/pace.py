"""How fast the engine works, and with it how soon places in the queue become free.

What ended in the past says little: after a flood nothing has ended, aborts are no progress, and an idle hour is no slow
one. So the estimate looks at what runs now: how many tokens each sequence may still generate, how often a sequence ends
before that, and how long steps have taken lately.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.engine.sequence import Sequence

UNKNOWN_STEP_S = 0.05
"""A step's seconds while none has ended."""

MEMORY = 0.98
"""How much of a step's weight is left when the next one is noted: some fifty steps count."""

GUESSED_TOKENS = 512.0
"""Output of a sequence that stops by itself, while none has."""

MAX_NOTED_STOPS = 1000.0
"""Stops beyond which older ones count half."""


class Pace:
    """Seconds of a step as a linear function of its tokens, and how many tokens end a sequence."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._tokens_squared = 0.0
        self._tokens_seconds = 0.0
        self._num_sampled = 0.0
        self._num_stops = 0.0

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """A step has ended.

        Args:
            num_tokens: Tokens it computed.
            seconds: How long the device was busy with it.
        """
        self._weight = self._weight * MEMORY + 1.0
        self._tokens = self._tokens * MEMORY + num_tokens
        self._seconds = self._seconds * MEMORY + seconds
        self._tokens_squared = self._tokens_squared * MEMORY + num_tokens * num_tokens
        self._tokens_seconds = self._tokens_seconds * MEMORY + num_tokens * seconds

    def note_end(self, sequence: Sequence, *, stopped: bool) -> None:
        """A sequence has ended.

        Args:
            sequence: The sequence.
            stopped: Whether by a token of its own; limits and aborts say nothing about the next one.
        """
        if sequence.terms.stop_ids:
            self._num_sampled += sequence.num_output
            self._num_stops += stopped
        if self._num_stops > MAX_NOTED_STOPS:
            self._num_sampled /= 2
            self._num_stops /= 2

    def step_s(self) -> tuple[float, float]:
        """Seconds of a step: those before its first token, and those a token (least squares, neither negative).

        As long as all steps were alike, half is taken for the one and half for the other.
        """
        if not self._weight:
            return UNKNOWN_STEP_S, 0.0
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        spread = self._tokens_squared / self._weight - mean_tokens**2
        if spread <= 1e-6 * mean_tokens**2:
            return mean_s / 2, mean_s / 2 / mean_tokens
        a_token = (self._tokens_seconds / self._weight - mean_tokens * mean_s) / spread
        a_token = min(max(a_token, 0.0), mean_s / mean_tokens)
        return mean_s - a_token * mean_tokens, a_token

    def seconds_until(self, num_ends: int, sequences: Iterable[Sequence]) -> float:
        """Seconds until so many sequences have ended.

        Args:
            num_ends: How many, at least one.
            sequences: Those that hold slots, or will at the next step; at least one.
        """
        limits: list[int] = []
        num_stopping = num_sampled = num_uncomputed = 0
        for sequence in sequences:
            limits.append(sequence.terms.max_len - len(sequence.token_ids))
            if sequence.terms.stop_ids:
                num_stopping += 1
                num_sampled += sequence.num_output
            num_uncomputed += max(0, sequence.num_uncomputed - 1)
        stop_rate = (self._num_stops + 1.0) / (self._num_sampled + num_sampled + GUESSED_TOKENS)
        overhead_s, token_s = self.step_s()
        num_steps = _steps_until(num_ends, sorted(limits), num_stopping * stop_rate)
        return num_steps * (overhead_s + token_s * len(limits)) + token_s * num_uncomputed


def _steps_until(num_ends: int, limits: list[int], stops_a_step: float) -> float:
    """Steps until so many sequences are likely to have ended.

    Args:
        num_ends: How many.
        limits: Steps after which each ends at the latest, ascending; each that ends makes room for another like it.
        stops_a_step: How many end before that in each step.
    """
    for num_ended, limit in enumerate(limits):
        missing = num_ends - num_ended
        if stops_a_step * limit >= missing:
            return missing / stops_a_step
        if stops_a_step * limit + 1 >= missing:
            return limit
    return limits[-1] * num_ends / (len(limits) + stops_a_step * limits[-1])
